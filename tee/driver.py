"""The one contract for every TEE: the software TEE, Linux's ``/dev/teeN``, OP-TEE over FF-A, the guest's virtio driver.

Event-driven and sans-I/O: ``start``, ``cancel`` and ``answer`` return at once and never call the sink; events come from
``run``, which whoever owns the driver calls on one thread.

The rules of the contract:

* every started call ends in exactly one :class:`Done`, also after a cancel and when its context is closed;
* every :class:`~tee.rpc.Rpc` ends in one ``answer`` or one :class:`RpcWithdrawn`; an ``answer`` to an RPC that was
  withdrawn is ignored; an RpcWithdrawn after an answer says that the TEE could not take it (memory given in it is
  free);
* CloseContext and CloseSession cancel the calls that run in them, and end when those have ended;
* a call's parameters belong to the TEE until its ``Done``; afterwards outputs stand in them;
* CloseContext and UnregisterMemory are done only when nothing uses the memory any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol, runtime_checkable

from tee.calls import Call, Invoke
from tee.memory import Memory
from tee.params import Param
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcReply


class TeeKind(IntEnum):
    """What stands behind a driver; the device tells it in its config space."""

    SOFT = 1
    LINUX = 2
    FFA = 3


class GenCap(IntEnum):
    """Generic capabilities (Linux uapi/linux/tee.h, TEE_GEN_CAP_*)."""

    GP = 1 << 0
    PRIVILEGED = 1 << 1
    REG_MEM = 1 << 2
    MEMREF_NULL = 1 << 3


@dataclass(frozen=True, slots=True)
class TeeInfo:
    """Which TEE it is: what ``TEE_IOC_VERSION`` tells on Linux (three 32-bit words), and what stands behind."""

    kind: int
    impl_id: int
    impl_caps: int
    gen_caps: int
    logins: frozenset[int] | None = None
    """Logins that it can be told faithfully; None: all. Sessions with others are not to be opened."""


@dataclass(slots=True)
class Done:
    """A call has ended. ``value`` is the new context or session where the call opens one."""

    call: Call
    code: int = Result.SUCCESS
    origin: int = Origin.TEE
    value: object = None
    may_have_run: bool = False


@dataclass(slots=True)
class RpcWithdrawn:
    """The TEE no longer waits for the answer to ``rpc``."""

    rpc: Rpc


@dataclass(slots=True)
class Notification:
    """The TEE tells a machine that something has happened; nobody answers. ``value`` has 32 bits.

    ``owner`` is that of the call in which it was raised, or of the OpenContext under which that runs. None: the TEE
    does not say for whom it is.
    """

    value: int
    owner: object = None


@dataclass(slots=True)
class Placed:
    """A region of ``size`` bytes, registered by ``owner``, is used in place from now on; or by copies, and ``why``."""

    owner: object
    size: int
    why: str = ""


Event = Done | Rpc | RpcWithdrawn | Notification | Placed
Sink = Callable[[Event], None]


class TeeDriver(Protocol):
    """A way to a TEE."""

    @property
    def info(self) -> TeeInfo:
        """Which TEE it is."""

    def attach(self, sink: Sink) -> None:
        """Say who receives events. Called once, before anything is started."""

    def start(self, call: Call) -> None:
        """Begin a call. Errors of any kind come back by its Done."""

    def cancel(self, call: Call) -> None:
        """Ask a started call to end early; it still ends by its Done. Ignored where it has ended already."""

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """Complete an RPC. Ignored where the RPC was answered before or withdrawn."""

    def run(self) -> float | None:
        """Do a bounded amount of work and hand events to the sink.

        Returns the seconds after which it wants to be called again: 0 at once, None only after the next ``start``,
        ``cancel`` or ``answer``, or when :meth:`fileno` is readable.
        """

    def fileno(self) -> int | None:
        """A file descriptor that is readable when ``run`` has something to do, or None if there is none."""

    def allocate(self, size: int) -> Memory:
        """Memory of ``size`` bytes (at least 1), zeroed, that this TEE can reach. Raises MemoryError."""

    def release(self, memory: Memory) -> None:
        """Give back what :meth:`allocate` gave. It is not registered any more."""

    def usage(self) -> dict[str, int]:
        """How many there are now of what this driver keeps, by name: for metrics, and to see that nothing is left."""


@runtime_checkable
class TakesHandles(Protocol):
    """What a driver can offer besides: memory that a VM has shared with the TEE by FF-A, and that is only named here.

    RegisterMemory of a memory that has ``ffa`` then ends with ITEM_NOT_FOUND: the TEE cannot get it as that VM's with
    this handle and tag; BUSY: it is registered already; BAD_PARAMETERS: it has another size; ACCESS_DENIED: the TEE may
    only read it, and it is not to be registered read-only. When it is unregistered, the TEE has relinquished it.
    """

    def takes_handles_of(self, vm: str, owner: int) -> bool:
        """Whether contexts that are opened for ``vm`` may name memory of FF-A endpoint ``owner``."""


class Begun(Protocol):
    """An invoke that waits in the middle."""

    def becomes(self, call: Invoke) -> None:
        """Give it the call that it is from here on, with the session, command and parameters that it was begun with:
        as if that had been started, it can be cancelled and ends by a Done."""


Outcome = tuple[int, int]
"""Result code and origin."""


AtOnce = Callable[[object, int, Sequence[Param]], Outcome | Begun | None]
"""What :meth:`InvokesAtOnce.invoke_at_once` is."""


@runtime_checkable
class InvokesAtOnce(Protocol):
    """What a driver can offer besides: invokes that end without waiting cost neither a call object nor an event."""

    def invoke_at_once(self, session: object, func: int, params: Sequence[Param]) -> Outcome | Begun | None:
        """Let the TA of ``session`` run right now. Not from inside the sink.

        Returns the outcome, with outputs in ``params``; or what was begun and waits in the middle, whose ``becomes`` is
        to be called before anything else of the driver; or None where it cannot begin now (others have their turn, or
        it is to be refused): nothing has happened then, and ``start`` does it. In any case ``run`` is due.
        """


@runtime_checkable
class OffersServices(Protocol):
    """What a driver can offer besides: services and server enclaves, by the calls of :mod:`tee.services`."""

    def forget_machine(self, vm: str) -> None:
        """All contexts of the machine ``vm`` have closed, and it is gone or begins anew: what it had installed goes."""
