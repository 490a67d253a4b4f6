"""One frontend's connection to one device: does what the backend's state machine asks for, and calls the device's
hooks.

Without I/O itself: what touches the system is behind ``Ports``. All calls on the data-plane thread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping
from typing import Any, Protocol, TypeVar

from pyvhost import effects as fx
from pyvhost.backend import Backend, DeviceInfo
from pyvhost.device import Device
from pyvhost.effects import Effect, RegionInfo, RingSetup
from pyvhost.errors import Disconnected, MemoryFault, ProtocolError, RingError
from pyvhost.memory import GuestMemory, Region
from pyvhost.memory import Mapping as MemoryMapping
from pyvhost.messages import BackendRequest, Feature, ProtocolFeature, encode
from pyvhost.vring.api import Fences
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_device import SplitDeviceQueue

__all__ = ["Ports", "Session"]

log = logging.getLogger("pyvhost")

_T = TypeVar("_T")


class Ports(Protocol):
    """What a session needs of the system."""

    @property
    def fences(self) -> Fences: ...

    def map(self, fd: int, size: int, offset: int) -> MemoryMapping:
        """Map ``size`` bytes of ``fd`` from ``offset`` on, shared and writable. The fd stays the caller's.

        :raises MemoryFault: it cannot be mapped, or is shorter
        """
        ...

    def close_fd(self, fd: int) -> None: ...

    def watch(self, fd: int, call: Callable[[], object]) -> None:
        """Call when ``fd`` (an eventfd of the frontend's) is signalled.

        :raises MessageError: it cannot be polled
        """
        ...

    def unwatch(self, fd: int) -> None: ...

    def signal(self, fd: int) -> None:
        """Signal an eventfd; never raises."""
        ...

    def check_channel(self, fd: int) -> None:
        """:raises MessageError: ``fd`` is not a stream socket"""
        ...

    def send(self, fd: int, message: bytes) -> bool:
        """Send on the backend's request channel; False if it is closed or full. Never blocks."""
        ...

    def wake(self, call: Callable[[], object]) -> None:
        """Call in the next turn of the loop."""
        ...

    def post(self, call: Callable[[], object]) -> None:
        """Call on this thread; may be used from any thread."""
        ...

    def hang_up(self, why: str) -> None:
        """Have the connection closed; ``Session.disconnect()`` follows."""
        ...


class _Link:
    """The ``Link`` of one connection; does nothing once it has ended."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    def config_changed(self) -> bool:
        return self._session.config_changed()

    def notify(self, index: int) -> bool:
        queue = self._session.device.queues[index]
        return queue is not None and queue.notify()

    def wake(self, index: int) -> None:
        self._session.wake(index)

    def post(self, call: Callable[[], object]) -> None:
        self._session.ports.post(lambda: self._session.guarded(call))

    def close(self, why: str) -> None:
        if self._session.open:
            self._session.ports.hang_up(why)


class Session:
    """Binds ``device`` to a new connection and calls its ``connected()``.

    ``receive()`` and ``disconnect()`` are for the control plane; ``look()``, ``guarded()`` and what ``Ports.watch``
    was given for the loop.
    """

    __slots__ = (
        "_awake",
        "_call",
        "_channel",
        "_err",
        "_kick",
        "_reported",
        "_waiting",
        "backend",
        "device",
        "failed",
        "open",
        "ports",
        "touched",
    )

    def __init__(self, device: Device, ports: Ports) -> None:
        self.device = device
        self.ports = ports
        self.backend = Backend(
            DeviceInfo(device.num_queues, device.max_queue_size, device.features, device.config_size)
        )
        count = device.num_queues
        self._awake = [False] * count  # running: enabled, and not stopped
        self._waiting = [False] * count  # a look at the queue is already due in the next turn
        self._reported = [False] * count  # that it is broken
        self._kick: list[int | None] = [None] * count
        self._call: list[int | None] = [None] * count
        self._err: list[int | None] = [None] * count
        self._channel: int | None = None
        self.open = True
        self.failed = False  # a hook raised
        self.touched = False  # something was called on the device since the loop last looked
        device.queues = [None] * count
        device.memory = GuestMemory()
        device.acked_features = 0
        device.link = _Link(self)
        device.connected(device.link)

    # --- the control plane's calls

    def receive(self, header: bytes, payload: bytes, fds: list[int]) -> bytes:
        """Obey one message of the frontend; the reply to send, if any. Takes ``fds`` over.

        :raises Disconnected: the connection is to be closed
        """
        self.touched = True
        try:
            return self._do(self.backend.receive(header, payload, fds))
        except (Disconnected, ProtocolError):
            raise
        except Exception:
            self.failed = True
            self._awake = [False] * len(self._awake)
            raise

    def disconnect(self) -> None:
        """The frontend is gone. A second call does nothing."""
        if not self.open:
            return
        self.open = False
        self._do(self.backend.disconnect(), closing=True)
        device = self.device
        memory, device.memory = device.memory, GuestMemory()
        device.queues = [None] * device.num_queues
        try:
            device.disconnected()
        except Exception:
            log.exception("%s.disconnected()", type(device).__name__)
        memory.close()

    def _do(self, steps: Generator[Effect, Any, None], closing: bool = False) -> bytes:
        """Drive the machine through one message. ``closing``: whatever hooks raise, go on to the end."""
        reply = b""
        answer: Any = None
        error: ProtocolError | None = None
        while True:
            try:
                effect = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration:
                return reply
            error = answer = None
            if isinstance(effect, fx.Reply):
                reply = effect.data
                continue
            if isinstance(effect, fx.Hangup):
                raise Disconnected(effect.why)
            try:
                answer = _DO[type(effect)](self, effect)
            except ProtocolError as e:
                error = e
            except Exception:
                if not closing:
                    raise
                log.exception("%s, while its connection ended", type(self.device).__name__)

    # --- the loop's calls

    def look(self, index: int) -> None:
        """Queue ``index`` was kicked, or is to be looked at: one bounded piece of work, and another one in the next
        turn if the device says so."""
        self._waiting[index] = False
        if not self._awake[index]:
            return
        self.touched = True
        try:
            if self.device.process(index):
                self.wake(index)
        except Exception as e:
            self.fail(e)
        queue = self.device.queues[index]
        if queue is not None and queue.broken is not None and not self._reported[index]:
            self._report(index, queue.broken)

    def guarded(self, call: Callable[[], _T]) -> _T | None:
        """Call something of the device's (a wakeup, ``run()``, what was posted); nothing it raises gets out."""
        if not self.open or self.failed:
            return None
        self.touched = True
        try:
            return call()
        except Exception as e:
            self.fail(e)
            return None

    def fail(self, error: Exception) -> None:
        """The device raised: no hook is called any more but those of the end, and the connection is closed."""
        log.error("%s failed, its connection ends", type(self.device).__name__, exc_info=error)
        self.failed = True
        self._awake = [False] * len(self._awake)
        self.ports.hang_up(f"the device failed: {error!r}")

    def wake(self, index: int) -> None:
        if not self._waiting[index]:
            self._waiting[index] = True
            self.ports.wake(lambda: self.look(index))

    def config_changed(self) -> bool:
        wanted = ProtocolFeature.BACKEND_REQ | ProtocolFeature.CONFIG
        if not self.open or self._channel is None or wanted & ~self.backend.protocol_features:
            return False
        return self.ports.send(self._channel, encode(BackendRequest.CONFIG_CHANGE_MSG))

    def _report(self, index: int, error: RingError) -> None:
        """A broken queue says so: in the log, and to the frontend by its error eventfd."""
        self._reported[index] = True
        log.warning("queue %d is broken: %s", index, error)
        fd = self._err[index]
        if fd is not None:
            self.ports.signal(fd)

    # --- effects

    def _close_fd(self, effect: fx.CloseFd) -> None:
        self.ports.close_fd(effect.fd)
        if effect.fd == self._channel:
            self._channel = None
        for fds in (self._call, self._err):
            for index, fd in enumerate(fds):
                if fd == effect.fd:
                    fds[index] = None

    def _negotiated(self, effect: fx.Negotiated) -> None:
        self.device.acked_features = effect.features
        self.device.negotiated(effect.features)

    def _map(self, info: RegionInfo, fd: int) -> Region:
        mapping = self.ports.map(fd, info.size, info.mmap_offset)
        try:
            return Region(info.guest_addr, info.size, info.user_addr, mapping)
        except MemoryFault:
            mapping.discard()
            raise

    def _replace_memory(self, effect: fx.ReplaceMemory) -> None:
        regions: list[Region] = []
        try:
            for info, fd in effect.regions:
                regions.append(self._map(info, fd))
            memory = GuestMemory(regions)
        except MemoryFault:
            for region in regions:
                region.mapping.discard()
            raise
        self._new_memory(memory)

    def _add_region(self, effect: fx.AddRegion) -> None:
        region = self._map(effect.region, effect.fd)
        try:
            memory = self.device.memory.with_region(region)
        except MemoryFault:
            region.mapping.discard()
            raise
        self._new_memory(memory)

    def _remove_region(self, effect: fx.RemoveRegion) -> None:
        gone = effect.region
        self._new_memory(self.device.memory.without_region(gone.guest_addr, gone.user_addr, gone.size))

    def _new_memory(self, memory: GuestMemory) -> None:
        old, self.device.memory = self.device.memory, memory
        for index, queue in enumerate(self.device.queues):
            if isinstance(queue, SplitDeviceQueue) and not queue.stopped:
                try:
                    queue.rebind(memory, *self._parts(memory, self.backend.rings[index].setup))
                except ProtocolError as e:
                    queue.give_up(f"the ring is not in the new memory: {e}")
                    self._report(index, queue.broken or RingError(str(e)))
        self.device.memory_changed(memory)
        old.close()

    def _set_kick(self, effect: fx.SetKick) -> None:
        index = effect.index
        if effect.fd is not None:
            self.ports.watch(effect.fd, lambda: self.look(index))
        old, self._kick[index] = self._kick[index], effect.fd
        if old is not None:
            self.ports.unwatch(old)

    def _set_call(self, effect: fx.SetCall) -> None:
        self._call[effect.index] = effect.fd

    def _set_err(self, effect: fx.SetErr) -> None:
        self._err[effect.index] = effect.fd

    def _set_channel(self, effect: fx.SetChannel) -> None:
        self.ports.check_channel(effect.fd)
        self._channel = effect.fd

    def _parts(self, memory: GuestMemory, setup: RingSetup) -> tuple[memoryview, memoryview, memoryview]:
        layout = SplitLayout(setup.size)
        return (
            memory.translate_user(setup.desc, layout.desc_bytes),
            memory.translate_user(setup.avail, layout.avail_bytes),
            memory.translate_user(setup.used, layout.used_bytes),
        )

    def _start_queue(self, effect: fx.StartQueue) -> None:
        index, setup = effect.index, effect.setup
        device, features = self.device, self.backend.features
        memory = device.memory

        def signal() -> None:
            fd = self._call[index]
            if fd is not None:
                self.ports.signal(fd)

        queue = SplitDeviceQueue(
            setup.size,
            memory,
            *self._parts(memory, setup),
            fences=self.ports.fences,
            base=setup.base,
            indirect=bool(features & Feature.INDIRECT_DESC),
            event_idx=bool(features & Feature.EVENT_IDX),
            signal=signal,
        )
        paused = device.queues[index]
        if effect.resumed and paused is not None:
            queue.adopt(paused)
        device.queues[index] = queue
        self._reported[index] = False
        self._awake[index] = True
        device.queue_started(index, queue, effect.resumed)
        self.wake(index)

    def _move_queue(self, effect: fx.MoveQueue) -> None:
        queue = self.device.queues[effect.index]
        if isinstance(queue, SplitDeviceQueue):
            memory = self.device.memory
            queue.rebind(memory, *self._parts(memory, effect.setup))

    def _enable_queue(self, effect: fx.EnableQueue) -> None:
        self._awake[effect.index] = True
        self.wake(effect.index)

    def _disable_queue(self, effect: fx.DisableQueue) -> None:
        self._awake[effect.index] = False

    def _stop_queue(self, effect: fx.StopQueue) -> int:
        index = effect.index
        self._awake[index] = False
        queue = self.device.queues[index]
        if queue is None:
            return 0
        base = queue.stop()
        self.device.queue_stopped(index)
        return base

    def _reset_device(self, effect: fx.ResetDevice) -> None:
        self.device.queues = [None] * self.device.num_queues
        self.device.reset()

    def _read_config(self, effect: fx.ReadConfig) -> bytes:
        return self.device.read_config(effect.offset, effect.size)

    def _write_config(self, effect: fx.WriteConfig) -> None:
        self.device.write_config(effect.offset, effect.data)

    def _refused(self, effect: fx.Refused) -> None:
        log.warning("refused a message: %s", effect.why)


_DO: Mapping[type[Effect], Callable[[Session, Any], Any]] = {
    fx.CloseFd: Session._close_fd,
    fx.Negotiated: Session._negotiated,
    fx.ReplaceMemory: Session._replace_memory,
    fx.AddRegion: Session._add_region,
    fx.RemoveRegion: Session._remove_region,
    fx.SetKick: Session._set_kick,
    fx.SetCall: Session._set_call,
    fx.SetErr: Session._set_err,
    fx.SetChannel: Session._set_channel,
    fx.StartQueue: Session._start_queue,
    fx.MoveQueue: Session._move_queue,
    fx.EnableQueue: Session._enable_queue,
    fx.DisableQueue: Session._disable_queue,
    fx.StopQueue: Session._stop_queue,
    fx.ResetDevice: Session._reset_device,
    fx.ReadConfig: Session._read_config,
    fx.WriteConfig: Session._write_config,
    fx.Refused: Session._refused,
}
