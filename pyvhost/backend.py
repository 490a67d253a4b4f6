"""The vhost-user backend's state machine, without I/O. Source: QEMU, docs/interop/vhost-user.rst.

``receive()`` takes one message and its file descriptors and is a generator of effects (``pyvhost.effects``). Whoever
drives it does each effect, and sends the answer in, or throws in the ``ProtocolError`` that came of it. ``RULES`` is
the one table of what is implemented: dispatch, checks and the offered protocol features all come from it.

What a wrong message leads to: the reply that REPLY_ACK or the request has for failure, where the frontend asked for
one; else the connection is closed. Either way, nothing has changed, and every file descriptor that came with it is
closed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pyvhost import effects as fx
from pyvhost.effects import Answer, Effect, RegionInfo, RingSetup
from pyvhost.errors import FormatError, MessageError, ProtocolError
from pyvhost.inflight import ALIGN as INFLIGHT_ALIGN
from pyvhost.inflight import region_size
from pyvhost.messages import (
    CONFIG,
    CONFIG_F_MIGRATION,
    FRONTEND_PAYLOADS,
    HEADER,
    INFLIGHT,
    MAX_CONFIG,
    MAX_PAYLOAD,
    MEM_TABLE,
    REGION,
    U64,
    VRING_ADDR_F_LOG,
    VRING_INDEX_MASK,
    VRING_NOFD,
    VRING_STATE,
    Feature,
    Flag,
    FrontendRequest,
    ProtocolFeature,
    TransferDirection,
    TransferPhase,
    encode,
)
from pyvhost.ringstate import RING_TABLE, RingAction, RingEvent, RingState
from pyvhost.vring.packed import INITIAL_BASE
from pyvhost.vring.packed import valid_size as valid_packed_size
from pyvhost.vring.split import MAX_SIZE, valid_size

__all__ = ["MEM_SLOTS", "MEM_TABLE_REGIONS", "RING_FEATURES", "RULES", "Backend", "DeviceInfo"]

Steps = Generator[Effect, Answer, bytes | None]

MEM_SLOTS = 509  #: regions by ADD_MEM_REG; as many as QEMU can use
MEM_TABLE_REGIONS = 8  #: regions in one SET_MEM_TABLE

#: user-mode-linux always sends its whole array of two regions, whatever the count says
_UML_MEM_TABLE_BYTES = MEM_TABLE.size + 2 * REGION.size

#: the inflight description may end with what C pads its struct with, as QEMU's does
_INFLIGHT_PADDING = (0, 4)

#: what the rings of this library can do, offered for every device
RING_FEATURES = (
    Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX | Feature.RING_PACKED | Feature.PROTOCOL_FEATURES
)

_NO_FEATURE = ProtocolFeature(0)

#: protocol features that have no message of their own
_FLAG_FEATURES = ProtocolFeature.REPLY_ACK


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """What the machine needs to know of a device; see ``Device`` for the fields' meaning."""

    num_queues: int
    max_queue_size: int = 1024
    features: int = 0
    config_size: int = 0
    in_order: bool = False
    logs_writes: bool = True
    has_state: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_queues <= VRING_INDEX_MASK + 1:
            raise ValueError(f"{self.num_queues} queues: 1 to 256 are possible")
        if not valid_size(self.max_queue_size):
            raise ValueError(f"a queue size of {self.max_queue_size} is not a power of two up to 2^15")
        if not 0 <= self.config_size <= MAX_CONFIG:
            raise ValueError(f"a config space of {self.config_size} bytes: up to {MAX_CONFIG} are possible")


@dataclass(slots=True)
class _Ring:
    state: RingState = RingState.STOPPED
    size: int = 0
    base: int = 0
    answered: int | None = None  # what GET_VRING_BASE said when a pause (or reset) began; None: no pause
    addr: Any = None  # VRING_ADDR record
    live: bool = False  # the queue is set up: StartQueue was done, StopQueue was not
    kick: int | None = None
    call: int | None = None
    err: int | None = None

    @property
    def setup(self) -> RingSetup:
        addr = self.addr
        log = addr.log if addr.flags & VRING_ADDR_F_LOG else None
        return RingSetup(self.size, self.base, addr.desc, addr.avail, addr.used, log)


@dataclass(slots=True)
class _Message:
    request: FrontendRequest
    body: Any  # the payload's record, None where there is none
    tail: bytes  # what follows it
    fds: list[int]  # taken out by the handler that keeps them


@dataclass(frozen=True, slots=True)
class Rule:
    """How one request is checked and handled. ``fds``: fewest and most. ``tail``: bytes may follow the payload's
    layout, the handler checks them. ``replies``: with a message of its own, whatever REPLY_ACK says."""

    handler: Callable[[Backend, _Message], Steps]
    needs: ProtocolFeature = _NO_FEATURE
    fds: tuple[int, int] = (0, 0)
    tail: bool = False
    replies: bool = False


@dataclass(slots=True)
class Backend:
    """One connection. Make a new one for the next."""

    info: DeviceInfo
    features: int = 0  #: acknowledged
    protocol_features: ProtocolFeature = _NO_FEATURE  #: acknowledged
    reset_seen: bool = False  #: RESET_DEVICE has come on this connection
    status: int = 0  #: the last SET_STATUS
    closed: bool = False
    has_channel: bool = False
    rings: list[_Ring] = field(init=False)
    _regions: list[RegionInfo] = field(default_factory=list)
    _fds: set[int] = field(default_factory=set)  # all that are ours to close
    _channel: int | None = None
    _log_fd: int | None = None
    _reply_fds: tuple[int, ...] = ()  # of the reply that is under way
    _is_uml: bool = False  # only user-mode-linux sends such a memory table
    _resuming: bool = False  # what was concluded when the first ring of those that run now started
    _touched: bool = False  # a queue has been set up since the start, or the last reset

    def __post_init__(self) -> None:
        self.rings = [_Ring() for _ in range(self.info.num_queues)]

    # --- what is offered

    @property
    def offered_features(self) -> int:
        features = self.info.features | RING_FEATURES
        if self.info.in_order:
            features |= Feature.IN_ORDER
        if self.info.logs_writes:
            features |= Feature.LOG_ALL
        return int(features)  # plain, because ~ of an IntFlag knows only named bits

    @property
    def packed(self) -> bool:
        """Whether the rings are packed ones."""
        return bool(self.features & Feature.RING_PACKED)

    @property
    def offered_protocol_features(self) -> ProtocolFeature:
        return offered_protocol_features(self.info)

    # --- messages

    @staticmethod
    def payload_size(header: bytes) -> int:
        """Bytes of payload that follow this header, to be read before ``receive()``.

        :raises MessageError: not a request of version 1, or too large to be any; the connection cannot go on
        :raises FormatError: fewer than 12 bytes
        """
        head = HEADER.unpack(header)
        if head.flags & Flag.VERSION_MASK != Flag.VERSION or head.flags & Flag.REPLY:
            raise MessageError(f"not a request of protocol version 1: flags {head.flags:#x}")
        if head.size > MAX_PAYLOAD:
            raise MessageError(f"a payload of {head.size} bytes")
        size: int = head.size
        return size

    def receive(self, header: bytes, payload: bytes, fds: Sequence[int] = ()) -> Generator[Effect, Answer, None]:
        """Obey one message. All of ``fds`` are the machine's from now on: each will be named in a ``CloseFd`` some
        time."""
        self._fds.update(fds)
        unused = list(fds)
        number = flags = 0
        has_reply = False
        reply: bytes | None = None
        error: ProtocolError | None = None
        try:
            if self.payload_size(header) != len(payload):
                raise MessageError("a payload that is not as long as its header says")
            number, flags, _ = HEADER.unpack(header)
            rule = self._rule(number)
            has_reply = rule.replies
            message = self._check(rule, FrontendRequest(number), payload, unused)
            reply = yield from rule.handler(self, message)
        except ProtocolError as e:
            error = e
        for fd in unused:
            yield from self._close(fd)
        # looked at last: user-mode-linux wants the reply to the very message that acknowledges REPLY_ACK
        need_reply = bool(flags & Flag.NEED_REPLY and self.protocol_features & ProtocolFeature.REPLY_ACK)
        if error is None:
            if reply is None and need_reply:
                reply = U64.pack(0)
            if reply is not None:
                reply_fds, self._reply_fds = self._reply_fds, ()
                yield fx.Reply(encode(number, reply, Flag.REPLY), reply_fds)
            return
        refusal = _REFUSALS.get(number)
        if need_reply and not has_reply:
            refusal = U64.pack(1)
        if refusal is None or self.closed:
            self.closed = True
            yield fx.Hangup(str(error))
        else:
            yield fx.Reply(encode(number, refusal, Flag.REPLY))
            yield fx.Refused(str(error))

    def disconnect(self) -> Generator[Effect, Answer, None]:
        """The frontend is gone: stop all and close all."""
        self.closed = True
        for index, ring in enumerate(self.rings):
            if ring.live:
                ring.live = False
                yield fx.StopQueue(index)
            ring.state = RingState.STOPPED
            if ring.kick is not None:
                ring.kick = None
                yield fx.SetKick(index, None)
        for fd in sorted(self._fds):
            yield from self._close(fd)

    def _rule(self, number: int) -> Rule:
        if self.closed:
            raise MessageError("a message after the end of the connection")
        try:
            return RULES[FrontendRequest(number)]
        except (ValueError, KeyError):
            raise MessageError(f"request {number} is not implemented") from None

    def _check(self, rule: Rule, request: FrontendRequest, payload: bytes, fds: list[int]) -> _Message:
        """All that can be checked without knowing the request's meaning."""
        name = request.name
        if rule.needs & ~self.protocol_features:
            raise MessageError(f"{name} without its protocol feature acknowledged")
        fewest, most = rule.fds
        if not fewest <= len(fds) <= most:
            raise MessageError(f"{name} with {len(fds)} file descriptors")
        codec = FRONTEND_PAYLOADS[request]
        body, tail = None, payload
        if codec is not None:
            try:
                body = codec.unpack(payload)
            except FormatError as e:
                raise MessageError(f"{name}: {e}") from None
            tail = payload[codec.size :]
        if tail and not rule.tail:
            raise MessageError(f"{name} with a payload of {len(payload)} bytes")
        return _Message(request, body, tail, fds)

    def _close(self, fd: int | None) -> Generator[Effect, Answer, None]:
        if fd is not None and fd in self._fds:
            self._fds.discard(fd)
            yield fx.CloseFd(fd)

    # --- negotiation

    def _nothing(self, message: _Message) -> Steps:
        return None
        yield

    def _get_features(self, message: _Message) -> Steps:
        return U64.pack(self.offered_features)
        yield

    def _set_features(self, message: _Message) -> Steps:
        features = message.body.value
        if features & ~self.offered_features:
            raise MessageError(f"features that were not offered: {features & ~self.offered_features:#x}")
        self.features = features
        yield fx.Negotiated(features)
        if not features & Feature.PROTOCOL_FEATURES:
            for index in range(len(self.rings)):
                yield from self._event(index, RingEvent.ENABLE)
        return None

    def _get_protocol_features(self, message: _Message) -> Steps:
        return U64.pack(self.offered_protocol_features)
        yield

    def _set_protocol_features(self, message: _Message) -> Steps:
        features = message.body.value
        if features & ~int(self.offered_protocol_features):
            raise MessageError(f"protocol features that were not offered: {features:#x}")
        self.protocol_features = ProtocolFeature(features)
        return None
        yield

    def _get_queue_num(self, message: _Message) -> Steps:
        return U64.pack(self.info.num_queues)
        yield

    def _get_max_mem_slots(self, message: _Message) -> Steps:
        return U64.pack(MEM_SLOTS)
        yield

    def _set_channel(self, message: _Message) -> Steps:
        yield fx.SetChannel(message.fds[0])
        old, self._channel = self._channel, message.fds.pop()
        self.has_channel = True
        yield from self._close(old)
        return None

    # --- memory

    def _set_mem_table(self, message: _Message) -> Steps:
        count = message.body.count
        if count > MEM_TABLE_REGIONS or len(message.fds) != count:
            raise MessageError(f"SET_MEM_TABLE of {count} regions with {len(message.fds)} file descriptors")
        size = MEM_TABLE.size + len(message.tail)
        if size != MEM_TABLE.size + count * REGION.size and (size, count) != (_UML_MEM_TABLE_BYTES, 1):
            raise MessageError(f"SET_MEM_TABLE of {count} regions in {size} bytes")
        self._is_uml = (size, count) == (_UML_MEM_TABLE_BYTES, 1)
        regions = [RegionInfo(*REGION.unpack(message.tail, n * REGION.size)) for n in range(count)]
        yield fx.ReplaceMemory(tuple(zip(regions, message.fds, strict=True)))
        self._regions = regions
        return None

    def _add_mem_reg(self, message: _Message) -> Steps:
        if len(self._regions) >= MEM_SLOTS:
            raise MessageError("no memory slot left")
        region = RegionInfo(*message.body.region)
        yield fx.AddRegion(region, message.fds[0])
        self._regions.append(region)
        return None

    def _rem_mem_reg(self, message: _Message) -> Steps:
        wanted = message.body.region
        for region in self._regions:
            if (region.guest_addr, region.size, region.user_addr) == wanted[:3]:  # the offset is ignored
                yield fx.RemoveRegion(region)
                self._regions.remove(region)
                return None
        raise MessageError("REM_MEM_REG of a region that was not added")

    # --- config space

    def _config_range(self, body: Any) -> None:
        if body.size > MAX_CONFIG or body.offset + body.size > self.info.config_size:
            raise MessageError(f"config space of {self.info.config_size} bytes, access at {body.offset}+{body.size}")

    def _get_config(self, message: _Message) -> Steps:
        body = message.body
        if len(message.tail) != body.size:
            raise MessageError("GET_CONFIG without room for its answer")
        self._config_range(body)
        data = yield fx.ReadConfig(body.offset, body.size)
        if len(data) != body.size:
            raise MessageError("the device's config space is shorter than it says")
        return CONFIG.pack(body) + bytes(data)

    def _set_config(self, message: _Message) -> Steps:
        body = message.body
        if len(message.tail) != body.size or body.flags & ~CONFIG_F_MIGRATION:
            raise MessageError("SET_CONFIG with a wrong size or unknown flags")
        self._config_range(body)
        yield fx.WriteConfig(body.offset, message.tail, bool(body.flags))
        return None

    # --- rings

    def _ring(self, index: int) -> _Ring:
        if index >= len(self.rings):
            raise MessageError(f"ring {index} of {len(self.rings)}")
        return self.rings[index]

    def _reconfigure(self, index: int) -> Generator[Effect, Answer, None]:
        """What a started ring cannot change is about to be changed (user-mode-linux stops rings only by disabling
        them): stop it first. As nobody asked for its base, this is no pause."""
        if self.rings[index].state.started:
            yield from self._stop(index)
            self.rings[index].answered = None

    def _set_vring_num(self, message: _Message) -> Steps:
        index, size = message.body
        ring = self._ring(index)
        valid = valid_packed_size if self.packed else valid_size
        if not valid(size) or size > self.info.max_queue_size:
            raise MessageError(f"a ring of {size} entries")
        if size != ring.size:
            yield from self._reconfigure(index)
            ring.answered = None  # another ring than the one that was paused
        ring.size = size
        yield from self._start_if_ready(index)
        return None

    def _set_vring_base(self, message: _Message) -> Steps:
        index, base = message.body
        ring = self._ring(index)
        if base > 0xFFFF and not self.packed:
            raise MessageError(f"a base of {base:#x} for a split ring")
        yield from self._reconfigure(index)
        if self.packed and self._is_uml and not base:
            base = INITIAL_BASE  # it always says 0, and its ring always begins with both wrap counters 1
        ring.base = base
        return None

    def _set_vring_addr(self, message: _Message) -> Steps:
        addr = message.body
        ring = self._ring(addr.index)
        if addr.desc & 15 or addr.avail & (3 if self.packed else 1) or addr.used & 3:
            raise MessageError("a part of a ring is misaligned")
        old, ring.addr = ring.addr, addr
        if ring.live and addr != old:
            try:
                yield fx.MoveQueue(addr.index, ring.setup)
            except ProtocolError:
                ring.addr = old
                raise
        yield from self._start_if_ready(addr.index)
        return None

    def _vring_fd(self, message: _Message) -> tuple[int, int | None]:
        """The ring and the eventfd of SET_VRING_KICK, _CALL, _ERR; the fd stays in ``message.fds``."""
        value = message.body.value
        if value & ~(VRING_INDEX_MASK | VRING_NOFD):
            raise MessageError(f"unknown bits beside a ring's index: {value:#x}")
        if bool(value & VRING_NOFD) == bool(message.fds):
            raise MessageError("an eventfd that is not there, or not announced")
        index = value & VRING_INDEX_MASK
        self._ring(index)
        return index, message.fds[0] if message.fds else None

    def _set_vring_kick(self, message: _Message) -> Steps:
        index, fd = self._vring_fd(message)
        if fd is None:
            raise MessageError("a ring without a kick eventfd would have to be polled, which is not implemented")
        yield fx.SetKick(index, fd)
        message.fds.clear()
        ring = self.rings[index]
        old, ring.kick = ring.kick, fd
        yield from self._close(old)
        if ring.live and ring.state is RingState.RUNNING:
            yield fx.EnableQueue(index)  # what the old eventfd said may be lost
        yield from self._start_if_ready(index)
        return None

    def _start_if_ready(self, index: int) -> Generator[Effect, Answer, None]:
        ring = self.rings[index]
        if not ring.state.started and ring.size and ring.addr is not None and ring.kick is not None:
            yield from self._event(index, RingEvent.START)

    def _set_vring_call(self, message: _Message) -> Steps:
        index, fd = self._vring_fd(message)
        yield fx.SetCall(index, fd)
        message.fds.clear()
        old, self.rings[index].call = self.rings[index].call, fd
        yield from self._close(old)
        return None

    def _set_vring_err(self, message: _Message) -> Steps:
        index, fd = self._vring_fd(message)
        yield fx.SetErr(index, fd)
        message.fds.clear()
        old, self.rings[index].err = self.rings[index].err, fd
        yield from self._close(old)
        return None

    def _set_vring_enable(self, message: _Message) -> Steps:
        index, on = message.body
        self._ring(index)
        if not self.features & Feature.PROTOCOL_FEATURES:
            raise MessageError("SET_VRING_ENABLE without PROTOCOL_FEATURES acknowledged")
        if on > 1:
            raise MessageError(f"SET_VRING_ENABLE {on}")
        yield from self._event(index, RingEvent.ENABLE if on else RingEvent.DISABLE)
        return None

    def _get_vring_base(self, message: _Message) -> Steps:
        index = message.body.index
        ring = self._ring(index)
        started = ring.state.started
        yield from self._stop(index)
        if started:
            ring.answered = ring.base
        return VRING_STATE.pack(index, ring.base)

    def _stop(self, index: int) -> Generator[Effect, Answer, None]:
        """Stop a ring; ``base`` is where it would go on. Its kick fd goes: a start needs a new one."""
        ring = self.rings[index]
        yield from self._event(index, RingEvent.STOP)
        if ring.kick is not None:
            yield fx.SetKick(index, None)
            old, ring.kick = ring.kick, None
            yield from self._close(old)

    def _event(self, index: int, event: RingEvent) -> Generator[Effect, Answer, None]:
        ring = self.rings[index]
        before = ring.state
        ring.state, action = RING_TABLE[before, event]
        if action is RingAction.RUN:
            try:
                yield from self._run(index)
            except ProtocolError:
                ring.state = before
                raise
        elif ring.live and action is RingAction.PAUSE:
            yield fx.DisableQueue(index)
        elif ring.live and action is RingAction.STOP:
            ring.live = False
            ring.base = yield fx.StopQueue(index)

    def _run(self, index: int) -> Generator[Effect, Answer, None]:
        """A ring runs now: set up its queue, after finding out whether this goes on or begins anew."""
        ring = self.rings[index]
        if ring.live:
            yield fx.EnableQueue(index)
            return
        live = [i for i, r in enumerate(self.rings) if r.live]
        restart: list[int] = []
        if not live:
            self._resuming = self._is_pause_end()
            if self._touched and not self._resuming:
                yield from self._begin_anew()
        elif self._resuming and ring.answered != ring.base:
            # Others have started as after a pause, and this one shows that it was none.
            self._resuming = False
            yield from self._begin_anew()
            restart = live
        for i in (index, *restart):
            yield fx.StartQueue(i, self.rings[i].setup, self._resuming)
            self._touched = self.rings[i].live = True
            self.rings[i].answered = None

    def _is_pause_end(self) -> bool:
        """Whether all started rings go on where GET_VRING_BASE said they would, and that means something: with every
        base at its initial value it does only if this frontend tells of resets."""
        started = [r for r in self.rings if r.state.started]
        initial = INITIAL_BASE if self.packed else 0
        moved = any(r.base != initial for r in started)
        return all(r.answered == r.base for r in started) and (self.reset_seen or moved)

    def _begin_anew(self) -> Generator[Effect, Answer, None]:
        for index, ring in enumerate(self.rings):
            ring.answered = None
            if ring.live:
                ring.live = False
                yield fx.StopQueue(index)
        self._touched = False
        yield fx.ResetDevice(told=False)

    # --- what is in flight, and what was written

    def _check_inflight(self, message: _Message) -> None:
        body = message.body
        if len(message.tail) not in _INFLIGHT_PADDING:
            raise MessageError("an inflight description of another size")
        if not 1 <= body.num_queues <= len(self.rings) or not 1 <= body.queue_size <= MAX_SIZE:
            raise MessageError(f"an inflight region for {body.num_queues} queues of {body.queue_size}")

    def _get_inflight_fd(self, message: _Message) -> Steps:
        """For the largest rings that there can be: QEMU asks with its option ``queue-size``, which does not keep its
        driver from a larger one."""
        self._check_inflight(message)
        body = message.body
        entries = max(body.queue_size, self.info.max_queue_size)
        size = body.num_queues * region_size(entries, packed=self.packed)
        fd = yield fx.MakeInflight(size)
        self._reply_fds = (fd,)
        return INFLIGHT.pack(size, 0, body.num_queues, entries) + bytes(len(message.tail))

    def _set_inflight_fd(self, message: _Message) -> Steps:
        """``queue_size`` may be what the frontend asked for, rather than what it got: the size of the region decides.
        A ring that it has no room for is refused when it starts."""
        self._check_inflight(message)
        body = message.body
        if body.mmap_size < body.num_queues * region_size(body.queue_size, packed=self.packed):
            raise MessageError(f"an inflight region of {body.mmap_size} bytes, which is too small")
        if body.mmap_offset % INFLIGHT_ALIGN:
            raise MessageError(f"an inflight region at offset {body.mmap_offset}, which is misaligned")
        part = body.mmap_size // body.num_queues // INFLIGHT_ALIGN * INFLIGHT_ALIGN
        part = min(part, region_size(MAX_SIZE, packed=True))
        yield fx.SetInflight(message.fds[0], body.mmap_offset, body.num_queues, part)
        return None

    def _set_log_base(self, message: _Message) -> Steps:
        yield fx.SetLog(message.fds[0], message.body.offset, message.body.size)
        return U64.pack(0)

    def _set_log_fd(self, message: _Message) -> Steps:
        fd = message.fds.pop()
        yield fx.SetLogSignal(fd)
        old, self._log_fd = self._log_fd, fd
        yield from self._close(old)
        return None

    # --- device state

    def _set_device_state_fd(self, message: _Message) -> Steps:
        direction, phase = message.body
        if direction not in (TransferDirection.SAVE, TransferDirection.LOAD) or phase != TransferPhase.STOPPED:
            raise MessageError(f"a transfer of state in direction {direction}, phase {phase}")
        if any(ring.state.started for ring in self.rings):
            raise MessageError("a transfer of state while rings are started")
        yield fx.TransferState(message.fds[0], direction == TransferDirection.LOAD)
        self._fds.discard(message.fds.pop())
        return U64.pack(VRING_NOFD)  # no fd of ours: use the one that was given

    def _check_device_state(self, message: _Message) -> Steps:
        yield fx.CheckState()
        return U64.pack(0)

    def _reset_device(self, message: _Message) -> Steps:
        for index, ring in enumerate(self.rings):
            yield from self._stop(index)
            yield from self._event(index, RingEvent.DISABLE)
            ring.size = ring.base = 0
            ring.addr = ring.answered = None
        self.reset_seen = True
        self.status = 0
        self._touched = False
        yield fx.ResetDevice(told=True)
        if not self.features & Feature.PROTOCOL_FEATURES:
            for ring in self.rings:
                ring.state = RingState.ARMED
        return None

    def _set_status(self, message: _Message) -> Steps:
        value = message.body.value
        if value > 0xFF:
            raise MessageError(f"a device status of {value:#x}")
        self.status = value
        return None
        yield

    def _get_status(self, message: _Message) -> Steps:
        return U64.pack(self.status)
        yield


_F, _P = FrontendRequest, ProtocolFeature

#: everything that is implemented
RULES: Mapping[FrontendRequest, Rule] = {
    _F.GET_FEATURES: Rule(Backend._get_features, replies=True),
    _F.SET_FEATURES: Rule(Backend._set_features),
    _F.SET_OWNER: Rule(Backend._nothing),
    _F.RESET_OWNER: Rule(Backend._nothing),  # obsolete; the document recommends to ignore it
    _F.SET_MEM_TABLE: Rule(Backend._set_mem_table, fds=(0, MEM_TABLE_REGIONS), tail=True),
    _F.SET_VRING_NUM: Rule(Backend._set_vring_num),
    _F.SET_VRING_ADDR: Rule(Backend._set_vring_addr),
    _F.SET_VRING_BASE: Rule(Backend._set_vring_base),
    _F.GET_VRING_BASE: Rule(Backend._get_vring_base, replies=True),
    _F.SET_VRING_KICK: Rule(Backend._set_vring_kick, fds=(0, 1)),
    _F.SET_VRING_CALL: Rule(Backend._set_vring_call, fds=(0, 1)),
    _F.SET_VRING_ERR: Rule(Backend._set_vring_err, fds=(0, 1)),
    _F.GET_PROTOCOL_FEATURES: Rule(Backend._get_protocol_features, replies=True),
    _F.SET_PROTOCOL_FEATURES: Rule(Backend._set_protocol_features),
    _F.GET_QUEUE_NUM: Rule(Backend._get_queue_num, _P.MQ, replies=True),
    _F.SET_VRING_ENABLE: Rule(Backend._set_vring_enable),
    _F.SET_BACKEND_REQ_FD: Rule(Backend._set_channel, _P.BACKEND_REQ, fds=(1, 1)),
    _F.GET_CONFIG: Rule(Backend._get_config, _P.CONFIG, tail=True, replies=True),
    _F.SET_CONFIG: Rule(Backend._set_config, _P.CONFIG, tail=True),
    _F.RESET_DEVICE: Rule(Backend._reset_device, _P.RESET_DEVICE),
    _F.GET_MAX_MEM_SLOTS: Rule(Backend._get_max_mem_slots, _P.CONFIGURE_MEM_SLOTS, replies=True),
    _F.ADD_MEM_REG: Rule(Backend._add_mem_reg, _P.CONFIGURE_MEM_SLOTS, fds=(1, 1)),
    # a compatible frontend may send the fd again; it is closed unused
    _F.REM_MEM_REG: Rule(Backend._rem_mem_reg, _P.CONFIGURE_MEM_SLOTS, fds=(0, 1)),
    _F.SET_STATUS: Rule(Backend._set_status, _P.STATUS),
    _F.GET_STATUS: Rule(Backend._get_status, _P.STATUS, replies=True),
    _F.GET_INFLIGHT_FD: Rule(Backend._get_inflight_fd, _P.INFLIGHT_SHMFD, tail=True, replies=True),
    _F.SET_INFLIGHT_FD: Rule(Backend._set_inflight_fd, _P.INFLIGHT_SHMFD, fds=(1, 1), tail=True),
    _F.SET_LOG_BASE: Rule(Backend._set_log_base, _P.LOG_SHMFD, fds=(1, 1), replies=True),
    _F.SET_LOG_FD: Rule(Backend._set_log_fd, _P.LOG_SHMFD, fds=(1, 1)),
    _F.SET_DEVICE_STATE_FD: Rule(Backend._set_device_state_fd, _P.DEVICE_STATE, fds=(1, 1), replies=True),
    _F.CHECK_DEVICE_STATE: Rule(Backend._check_device_state, _P.DEVICE_STATE, replies=True),
}

#: how requests that have a reply of their own say no; the others cannot
_REFUSALS: Mapping[int, bytes] = {
    _F.GET_CONFIG: b"",
    _F.SET_DEVICE_STATE_FD: U64.pack(VRING_NOFD | 1),
    _F.CHECK_DEVICE_STATE: U64.pack(1),
}


def offered_protocol_features(info: DeviceInfo) -> ProtocolFeature:
    """All that ``RULES`` has a request for, and those without one, but for what this device does not have."""
    offered = _FLAG_FEATURES
    for rule in RULES.values():
        offered |= rule.needs
    has = {_P.CONFIG: info.config_size, _P.LOG_SHMFD: info.logs_writes, _P.DEVICE_STATE: info.has_state}
    for feature, there in has.items():
        if not there:
            offered &= ~feature
    return offered
