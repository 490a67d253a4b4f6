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
from pyvhost.dirtylog import AtomicOr, DirtyLog, RingLog
from pyvhost.effects import Effect, RegionInfo, RingSetup
from pyvhost.errors import Disconnected, MemoryFault, MessageError, ProtocolError, RingError
from pyvhost.inflight import SplitInflight
from pyvhost.memory import GuestMemory, Region
from pyvhost.memory import Mapping as MemoryMapping
from pyvhost.messages import BackendRequest, Feature, ProtocolFeature, encode
from pyvhost.vring.api import Fences, Inflight
from pyvhost.vring.choice import QueueFactory, part_sizes, queue_class
from pyvhost.vring.in_order import InOrderPackedQueue, InOrderSplitQueue
from pyvhost.vring.packed_inflight import PackedInflight

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

    def allocate(self, size: int) -> int:
        """A file descriptor of fresh zeroed memory that can be mapped and cannot shrink.

        :raises MemoryFault: there is none
        """
        ...

    def atomic_or(self, view: memoryview) -> AtomicOr | None:
        """What sets bits in one byte of a mapped ``view`` atomically; None: this system cannot."""
        ...

    def close_fd(self, fd: int) -> None: ...

    def transfer(self, fd: int, data: bytes | None, limit: int, done: Callable[[bytes | None], object]) -> None:
        """Write ``data`` to ``fd``, or, if it is None, read ``limit`` bytes at most from it up to its end; then close
        it and call ``done`` on this thread, with what was read (b"" after writing), or None if it failed. Never
        blocks. A ``CHECK_DEVICE_STATE`` that comes meanwhile is to be given to ``receive()`` afterwards.
        """
        ...

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

    def check_signal(self, fd: int) -> None:
        """Before the first ``signal(fd)``.

        :raises MessageError: ``fd`` is nothing that can be signalled without being held up
        """
        ...

    def send(self, fd: int, message: bytes) -> bool:
        """Send on the backend's request channel; False if it is closed or full. Never blocks."""
        ...

    def wake(self, call: Callable[[], object]) -> None:
        """Call in the next turn of the loop."""
        ...

    def alone(self) -> bool:
        """Whether nothing else is to be done in this turn of the loop."""
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

    def enabled(self, index: int) -> bool:
        return self._session.enabled(index)

    def tracked(self, index: int) -> bool:
        return self._session.tracked[index]

    def post(self, call: Callable[[], object]) -> None:
        self._session.ports.post(lambda: self._session.guarded(call))

    def close(self, why: str) -> None:
        if self._session.open:
            self._session.ports.hang_up(why)


class _Inflight:
    """The inflight region of a connection."""

    __slots__ = ("mapping", "part_size", "queues")

    def __init__(self, mapping: MemoryMapping, queues: int, part_size: int) -> None:
        self.mapping = mapping
        self.queues = queues
        self.part_size = part_size

    def part(self, index: int, packed: bool) -> Inflight | None:
        """The recorder of queue ``index``; None: the region has no part for it."""
        if index >= self.queues:
            return None
        view = self.mapping.view[index * self.part_size : (index + 1) * self.part_size]
        return PackedInflight(view) if packed else SplitInflight(view)


class _Transfer:
    """A transfer of device state, and how it went."""

    __slots__ = ("failed", "over")

    def __init__(self) -> None:
        self.over = False
        self.failed: ProtocolError | None = None


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
        "_inflight",
        "_kick",
        "_log_fd",
        "_reported",
        "_transfer",
        "_waiting",
        "backend",
        "device",
        "dirty_log",
        "failed",
        "open",
        "ports",
        "touched",
        "tracked",
    )

    def __init__(self, device: Device, ports: Ports) -> None:
        self.device = device
        self.ports = ports
        self.backend = Backend(
            DeviceInfo(
                device.num_queues,
                device.max_queue_size,
                device.features,
                device.config_size,
                device.in_order,
                device.logs_writes,
                device.max_state_size > 0,
            )
        )
        count = device.num_queues
        self._awake = [False] * count  # running: enabled, and not stopped
        self._waiting = [False] * count  # a look at the queue is already due in the next turn
        self._reported = [False] * count  # that it is broken
        self.tracked = [False] * count  # what it has in flight is recorded
        self._kick: list[int | None] = [None] * count
        self._call: list[int | None] = [None] * count
        self._err: list[int | None] = [None] * count
        self._channel: int | None = None
        self._inflight: _Inflight | None = None
        self._log_fd: int | None = None
        self._transfer: _Transfer | None = None
        self.dirty_log = DirtyLog(ports.fences.order)
        self.open = True
        self.failed = False  # a hook raised
        self.touched = False  # something was called on the device since the loop last looked
        device.queues = [None] * count
        device.memory = GuestMemory(dirty=self.dirty_log.mark)
        device.acked_features = 0
        device.link = _Link(self)
        device.connected(device.link)

    # --- the control plane's calls

    def receive(self, header: bytes, payload: bytes, fds: list[int]) -> fx.Reply | None:
        """Obey one message of the frontend; the reply to send, if any, whose file descriptors are then the caller's.
        Takes ``fds`` over.

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
        self.dirty_log.remap(None)
        if self._inflight is not None:
            self._inflight.mapping.discard()
            self._inflight = None
        try:
            device.disconnected()
        except Exception:
            log.exception("%s.disconnected()", type(device).__name__)
        memory.close()

    def _do(self, steps: Generator[Effect, Any, None], closing: bool = False) -> fx.Reply | None:
        """Drive the machine through one message. ``closing``: whatever hooks raise, go on to the end."""
        reply: fx.Reply | None = None
        answer: Any = None
        error: ProtocolError | None = None
        while True:
            try:
                effect = steps.throw(error) if error is not None else steps.send(answer)
            except StopIteration:
                return reply
            error = answer = None
            if isinstance(effect, fx.Reply):
                reply = effect
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
        queue = self.device.queues[index]
        if queue is not None:
            queue.spin_us = self.device.spin_us if self.ports.alone() else 0
        try:
            if self.device.process(index):
                self.wake(index)
        except Exception as e:
            self.fail(e)
        queue = self.device.queues[index]
        if queue is not None and queue.broken is not None and not self._reported[index]:
            self._report(index, queue.broken)
        if self.dirty_log.touched:
            self._tell_logged()

    def _tell_logged(self) -> None:
        self.dirty_log.touched = False
        if self._log_fd is not None:
            self.ports.signal(self._log_fd)

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
        finally:
            if self.dirty_log.touched:
                self._tell_logged()

    def fail(self, error: Exception) -> None:
        """The device raised: no hook is called any more but those of the end, and the connection is closed."""
        log.error("%s failed, its connection ends", type(self.device).__name__, exc_info=error)
        self.failed = True
        self._awake = [False] * len(self._awake)
        self.ports.hang_up(f"the device failed: {error!r}")

    def enabled(self, index: int) -> bool:
        return self._awake[index]

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
        if effect.fd == self._log_fd:
            self._log_fd = None
        for fds in (self._call, self._err):
            for index, fd in enumerate(fds):
                if fd == effect.fd:
                    fds[index] = None

    def _negotiated(self, effect: fx.Negotiated) -> None:
        self.device.acked_features = effect.features
        enabled = bool(effect.features & Feature.LOG_ALL)
        if enabled is not self.dirty_log.enabled:
            self.dirty_log.enabled = enabled
            for index, queue in enumerate(self.device.queues):
                if queue is not None and not queue.stopped:
                    queue.log_to(self._ring_log(self.backend.rings[index].setup))
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
            memory = GuestMemory(regions, dirty=self.dirty_log.mark)
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
            if queue is not None and not queue.stopped:
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
        if effect.fd is not None:
            self.ports.check_signal(effect.fd)
        self._call[effect.index] = effect.fd

    def _set_err(self, effect: fx.SetErr) -> None:
        if effect.fd is not None:
            self.ports.check_signal(effect.fd)
        self._err[effect.index] = effect.fd

    def _set_channel(self, effect: fx.SetChannel) -> None:
        self.ports.check_channel(effect.fd)
        self._channel = effect.fd

    def _parts(self, memory: GuestMemory, setup: RingSetup) -> tuple[memoryview, memoryview, memoryview]:
        desc, avail, used = part_sizes(self.backend.packed, setup.size)
        return (
            memory.translate_user(setup.desc, desc),
            memory.translate_user(setup.avail, avail),
            memory.translate_user(setup.used, used),
        )

    def _start_queue(self, effect: fx.StartQueue) -> None:
        index, setup = effect.index, effect.setup
        device, features = self.device, self.backend.features
        memory = device.memory

        def signal() -> None:
            fd = self._call[index]
            if fd is not None:
                self.ports.signal(fd)

        packed = self.backend.packed
        if features & Feature.IN_ORDER:
            kind: QueueFactory = InOrderPackedQueue if packed else InOrderSplitQueue
        else:
            kind = queue_class(packed)
        queue = kind(
            setup.size,
            memory,
            *self._parts(memory, setup),
            fences=self.ports.fences,
            base=setup.base,
            indirect=bool(features & Feature.INDIRECT_DESC),
            event_idx=bool(features & Feature.EVENT_IDX),
            signal=signal,
        )
        paused = device.queues[index] if effect.resumed else None
        if paused is not None:
            queue.adopt(paused)
        part = self._inflight.part(index, packed) if self._inflight is not None else None
        if part is not None:
            try:
                queue.track(part)
            except ProtocolError:
                if paused is not None:  # goes on being paused
                    queue.stop()
                    paused.adopt(queue)
                raise
        self.tracked[index] = part is not None
        queue.log_to(self._ring_log(setup))
        device.queues[index] = queue
        self._reported[index] = False
        self._awake[index] = True
        device.queue_started(index, queue, effect.resumed)
        self.wake(index)

    def _move_queue(self, effect: fx.MoveQueue) -> None:
        queue = self.device.queues[effect.index]
        if queue is not None:
            memory = self.device.memory
            queue.rebind(memory, *self._parts(memory, effect.setup))
            queue.log_to(self._ring_log(effect.setup))

    def _ring_log(self, setup: RingSetup) -> RingLog | None:
        return RingLog(self.dirty_log.mark, setup.log) if self.dirty_log.enabled else None

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
        if self._inflight is not None:
            for index in range(self._inflight.queues):
                part = self._inflight.part(index, self.backend.packed)
                if part is not None:
                    part.clear()
        self.device.queues = [None] * self.device.num_queues
        self.device.reset()

    def _read_config(self, effect: fx.ReadConfig) -> bytes:
        return self.device.read_config(effect.offset, effect.size)

    def _write_config(self, effect: fx.WriteConfig) -> None:
        self.device.write_config(effect.offset, effect.data)

    def _make_inflight(self, effect: fx.MakeInflight) -> int:
        return self.ports.allocate(effect.size)

    def _set_inflight(self, effect: fx.SetInflight) -> None:
        mapping = self.ports.map(effect.fd, effect.queues * effect.part_size, effect.offset)
        old, self._inflight = self._inflight, _Inflight(mapping, effect.queues, effect.part_size)
        if old is not None:
            old.mapping.discard()

    def _set_log(self, effect: fx.SetLog) -> None:
        mapping = self.ports.map(effect.fd, effect.size, effect.offset)
        self.dirty_log.remap(mapping, self.ports.atomic_or(mapping.view))

    def _set_log_signal(self, effect: fx.SetLogSignal) -> None:
        self._log_fd = effect.fd

    def _transfer_state(self, effect: fx.TransferState) -> None:
        if self._transfer is not None and not self._transfer.over:
            raise MessageError("a transfer of state while another one is under way")
        device = self.device
        data: bytes | None = None
        if not effect.load:
            for index, queue in enumerate(device.queues):
                if queue is not None and queue.in_flight and not self.tracked[index]:
                    raise MessageError("requests are in flight, and there is no inflight region to go with them")
            data = device.save_state()
            if len(data) > device.max_state_size:
                raise MessageError(f"a state of {len(data)} bytes, more than the device's maximum")
        transfer = self._transfer = _Transfer()

        def done(result: bytes | None) -> None:
            transfer.over = True
            try:
                if result is None:
                    raise MessageError("the transfer of state failed")
                if effect.load:
                    device.load_state(result)
            except ProtocolError as e:
                transfer.failed = e

        self.ports.transfer(effect.fd, data, device.max_state_size, lambda result: self.guarded(lambda: done(result)))

    def _check_state(self, effect: fx.CheckState) -> None:
        transfer, self._transfer = self._transfer, None
        if transfer is None or not transfer.over:
            raise MessageError("CHECK_DEVICE_STATE, and no transfer is over")
        if transfer.failed is not None:
            raise transfer.failed

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
    fx.MakeInflight: Session._make_inflight,
    fx.SetInflight: Session._set_inflight,
    fx.SetLog: Session._set_log,
    fx.SetLogSignal: Session._set_log_signal,
    fx.TransferState: Session._transfer_state,
    fx.CheckState: Session._check_state,
    fx.Refused: Session._refused,
}
