"""What a device author writes: a subclass of ``Device``.

The library negotiates, maps memory, sets up rings and polls; the device serves its queues. **All hooks are called on
one thread**, the data-plane thread, one at a time, and must return soon: they share that thread with every other
device of the process. An exception that leaves a hook ends this device's connection (it is logged), nothing else.

>>> class Echo(Device):
...     num_queues = 1
...
...     def process(self, index):
...         return self.queues[index].drain(self.echo)
...
...     def echo(self, chain):
...         data = chain.read(length=chain.writable_bytes)
...         return chain.write(data)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from pyvhost.errors import MessageError
from pyvhost.memory import GuestMemory
from pyvhost.vring.api import DeviceQueue

__all__ = ["Device", "Link"]


class Link(Protocol):
    """A device's way back to the library, as long as one frontend is connected."""

    def config_changed(self) -> bool:
        """Tell the driver that the config space has changed (``VHOST_USER_BACKEND_CONFIG_CHANGE_MSG``). False if the
        frontend has no channel for it."""
        ...

    def notify(self, index: int) -> bool:
        """Signal the driver for queue ``index`` if it asked for it: ``queue.notify()``."""
        ...

    def wake(self, index: int) -> None:
        """Have ``process(index)`` called in the next turn of the loop."""
        ...

    def enabled(self, index: int) -> bool:
        """Whether queue ``index`` is started and enabled. ``process()`` is called for such queues only; whoever looks
        at another one on its own account, or fills buffers that were posted there, asks first (vhost-user.rst, "Ring
        states": a disabled ring has no side effects)."""
        ...

    def tracked(self, index: int) -> bool:
        """Whether the frontend keeps an inflight region for queue ``index``. Without, ``recovered`` is empty, and what
        another backend may have taken is available (again) as if it were new."""
        ...

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call`` called on the data-plane thread; dropped if the connection has ended by then. The one method
        that **any thread** may use: for the results of blocking work."""
        ...

    def close(self, why: str) -> None:
        """End the connection; ``disconnected()`` follows."""
        ...


SPIN_US = 20
"""What a sleep and a wake-up cost, in microseconds, about."""


class Device:
    """Base class. The class attributes describe the device; the library sets the instance attributes and calls the
    hooks.

    A device object serves one frontend at a time; it may be served again after ``disconnected()``.
    """

    # --- what the device is: set these in the subclass, or in __init__

    #: virtqueues; fixed while a frontend is connected
    num_queues: int = 1
    #: largest ring a driver may set up, a power of two
    max_queue_size: int = 1024
    #: feature bits of the device type; the library adds VERSION_1, ring features and what vhost-user needs
    features: int = 0
    #: bytes of config space; 0: none
    config_size: int = 0
    #: offer VIRTIO_F_IN_ORDER: the library gives requests back in the order in which the driver made them available,
    #: in whatever order they are completed. For devices whose requests take about the same time
    in_order: bool = False
    #: whether all that the device writes to guest memory outside of requests' writable parts, or after their
    #: completion, is told by ``mark_dirty()`` or by leases with ``writes``. Without it, the guest cannot be migrated
    #: live
    logs_writes: bool = True
    #: bytes of device state, at most, that ``save_state()`` and ``load_state()`` transfer; 0: the device has none, or
    #: cannot. Beyond some MiB, it holds up the data plane
    max_state_size: int = 0
    #: microseconds for which a queue goes on looking at an empty ring before it asks for kicks, if nothing else of the
    #: data plane is to be done; less often while that is in vain. By default about as long as it takes to fall asleep
    #: and be woken; more gives quicker answers for a busier processor, 0 sleeps at once. The pure queues hold up all
    #: other threads meanwhile
    spin_us: int = SPIN_US

    # --- what the library knows: kept up to date by it, each before the hook that tells of it

    link: Link
    #: acknowledged feature bits
    acked_features: int = 0
    #: guest memory; empty while there is none
    memory: GuestMemory = GuestMemory()
    #: one for each virtqueue; None until it is started first, and after a reset; during a pause it is a stopped one
    queues: list[DeviceQueue | None]

    # --- config space; called at any time, also before any queue is started

    def read_config(self, offset: int, length: int) -> bytes:
        """``length`` bytes of config space from ``offset`` on; the library has checked that they lie within
        ``config_size``."""
        return bytes(length)

    def write_config(self, offset: int, data: bytes) -> None:
        """The driver wrote to config space, within ``config_size``. Raise ``ProtocolError`` to refuse."""
        raise MessageError("this device's config space is read-only")

    # --- hooks

    def connected(self, link: Link) -> None:
        """A frontend is there. What was kept of the last one must be forgotten by now."""

    def negotiated(self, features: int) -> None:
        """The driver's features are known, or have changed."""

    def memory_changed(self, memory: GuestMemory) -> None:
        """There is a new memory table. Chains in flight keep their views; take a ``memory.lease()`` before handing
        addresses on."""

    def queue_started(self, index: int, queue: DeviceQueue, resumed: bool) -> None:
        """Queue ``index`` can be used from now on; ``process(index)`` follows at once.

        ``resumed``: this ends a pause. Requests that were in flight when it was stopped are in flight on ``queue``
        and can be pushed. Otherwise heads from before must be forgotten; if there was a before, ``reset()`` has been
        called. Nothing is in flight then but ``queue.recovered``: what a backend that died, or lost its frontend, had
        taken and not returned, in the order of taking. ``pop()`` gives them out again first, so that a device whose
        requests can be done twice need not care. Others take them from there, here or at the first ``process()``, and
        complete them with an error.
        """

    def queue_stopped(self, index: int) -> None:
        """The frontend has stopped the queue (``GET_VRING_BASE``) and waits for the answer, so return at once. Keep
        requests in flight and do not push them, until ``queue_started()``, ``reset()`` or ``disconnected()`` says how
        it goes on: a guest's pause, migration, reset and end all begin like this.
        """

    def reset(self) -> None:
        """Forget all driver state: RESET_DEVICE came, or the rings start in a way that shows a reset. No queue is
        started. If something still uses guest memory, do not process queues until it has let go."""

    def save_state(self) -> bytes:
        """The device's state, for another backend that shall go on with this driver: up to ``max_state_size`` bytes.
        All queues are stopped, and nothing is in flight unless the frontend keeps an inflight region, which then goes
        with the guest. Raise ``ProtocolError`` to refuse."""
        raise MessageError("this device's state cannot be saved")

    def load_state(self, data: bytes) -> None:
        """Go on from what ``save_state()`` returned, in another process, maybe of another version: check it. Raise
        ``ProtocolError`` to refuse. Queues start afterwards, not ``resumed``, at the bases where they were stopped."""
        raise MessageError("this device's state cannot be loaded")

    def disconnected(self) -> None:
        """The frontend is gone; queues are stopped, memory will be unmapped when the last lease is released."""

    def process(self, index: int) -> bool:
        """There may be requests in queue ``index``: the driver kicked, or the queue was started or enabled. Do a
        bounded amount of work and return True if more is left: the loop comes back after it has served others. Return
        False only when the driver will kick again: after ``drain()`` or ``enable_notifications()`` returned False.
        """
        return False

    # --- background work

    #: file descriptors that the loop polls for reading on the device's behalf; read when ``connected()`` returns
    wakeups: Sequence[int] = ()

    def on_wakeup(self, fd: int) -> None:
        """One of ``wakeups`` is readable. Read it, or the loop will spin."""

    def run(self) -> float | None:
        """Do a bounded amount of background work; called in each turn of the loop in which it is due or something was
        called on the device. Returns seconds until it must be called again: 0 for at once, None for when something
        happens."""
        return None
