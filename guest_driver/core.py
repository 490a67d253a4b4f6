"""The guest's driver of the virtio-tee device: a :class:`~tee.driver.TeeDriver` over any transport.

Sans-I/O but for what the transport does. The device is not trusted: what it answers is checked before it is used, and a
device that breaks the rules ends all calls with COMMUNICATION.
"""

from __future__ import annotations

import logging
import struct
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar
from uuid import UUID

from construct import ConstructError

from device.config import Config
from device.messages import CALLS, CONFIG, EVENT_HEADER, EVENTS, PARAM, REQUESTS, RESPONSE_HEADER
from device.params import (
    MEMREF_TYPES,
    VALUE_TYPES,
    RawParam,
    attribute,
    check_raw,
    pack_raw,
    padded,
    take_results,
    unpack_raw,
)
from device.requests import RANGE_SIZE, pack_request, response_size
from device.wire import (
    NULL_REGION,
    PARAM_INLINE,
    PARAM_META,
    PARAM_TYPE_MASK,
    RPC_SERVERS,
    Event,
    Feature,
    ParamType,
    Queue,
    RegionFlag,
    Request,
    ResponseFlag,
    RpcServer,
    RpcTarget,
    Status,
    only_usable,
)
from guest_driver.buffers import Buffer, Buffers
from guest_driver.ffa_memory import FfaMemory, shared_size
from guest_driver.service_requests import GIVES_BACK, MAX_LISTED, SERVICE_REQUESTS, TAKES
from guest_driver.transport import Transport, TransportError
from pyvhost.errors import FormatError, ProtocolError, QueueFull
from pyvhost.vring.api import DriverQueue
from tee.calls import (
    Call,
    CloseContext,
    CloseSession,
    Invoke,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Notification, RpcWithdrawn, Sink, TeeInfo
from tee.memory import FfaShare, Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.services import ENTRY_SIZE, CallReturn, ListServices, Loaded, Service, ServiceCall, ServiceList

log = logging.getLogger(__name__)

DRIVER_FEATURES = (Feature.INLINE | Feature.RPC | Feature.OCALL | Feature.NOTIFICATION | Feature.FFA_HANDLE) | (
    Feature.SERVICES | Feature.ATTESTATION | Feature.ENCLAVES
)
"""Feature bits that this driver knows how to use."""

_RESPONSE_HEADER_SIZE = RESPONSE_HEADER.size
_STATUS_OK = bytes(4)
_WITH_PARAMS = frozenset({Result.SUCCESS, Result.SHORT_BUFFER})
"""Result codes of answers to RPCs that have parameters; others may leave them out."""

_FOR_CLIENTS = frozenset({RpcCommand.OCALL, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE})
"""RPCs that the client may be asked whose call it is."""

_REPLY_ATTRIBUTES: dict[int, list[int]] = {
    RpcCommand.SHM_ALLOC: [ParamType.MEMREF_INOUT],
    RpcCommand.SHM_FREE: [],
}
"""RPC command → its answer's attributes, where they are not those of the question."""

_UNKNOWN_COMMAND = (RpcServer.SUPPLICANT, Result.NOT_SUPPORTED)

_OPENED_BY = {
    Request.ENCLAVE_DESTROY: Request.ENCLAVE_CREATE,
    Request.ENCLAVE_RELEASE: Request.ENCLAVE_ACQUIRE,
    Request.ENCLAVE_CALL: Request.ENCLAVE_ACQUIRE,
}
"""Request → which one gave the id that it takes."""

_RESERVED = 16
"""Descriptors of a request queue that calls leave free, so that an RPC's answer can register memory."""


@dataclass(slots=True, eq=False)
class GuestContext:
    """A context of the device. Its requests carry the epoch in which it was opened."""

    ident: int
    epoch: int


@dataclass(slots=True, eq=False)
class GuestSession:
    """A session of the device; or an enclave or server, by the request that gave its id."""

    context: GuestContext
    ident: int
    opened_by: Request = Request.OPEN_SESSION


@dataclass(slots=True, eq=False)
class GuestRegion:
    """A registration with the device: what ``Memory.handle`` is on this path."""

    context: GuestContext
    ident: int


@dataclass(slots=True, eq=False)
class _InFlight:
    """A request that the device has. ``call`` is None once nobody waits for it."""

    request: Request
    buffer: Buffer
    readable: int
    room: int
    call: Call | None = None
    context: GuestContext | None = None
    session: GuestSession | None = None
    tag: int = 0
    raw: list[RawParam] = field(default_factory=list)
    answers: Rpc | None = None
    """The RPC that an RPC_REPLY is for."""


class VirtioTeeDriver:
    """Drives the device behind ``transport``.

    Raises FormatError if it is not a virtio-tee device that we know, TransportError if it has gone already.
    """

    def __init__(
        self, transport: Transport, *, memory: FfaMemory | None = None, now: Callable[[], int] = time.time_ns
    ) -> None:
        """``now`` tells the guest's time to a TEE that asks for it: nanoseconds since 1970. With ``memory``, what is
        allocated is shared with the TEE by FF-A, and the device is told its handle. Raises FormatError: this device
        takes none."""
        self._transport = transport
        self._now = now
        self._buffers = Buffers(transport)
        self._sink: Sink | None = None
        self._features = Feature(only_usable(transport.features)) & DRIVER_FEATURES
        if memory is not None and not self._features & Feature.FFA_HANDLE:
            raise FormatError(
                "the device takes no FF-A handles: its operator has to name the guest's endpoint (--ffa-vm)"
            )
        self._memory: FfaMemory | Transport = memory or transport
        self.config = Config.unpack(transport.read_config(CONFIG.size))
        # a VMM may have been told to make fewer queues than the device could serve
        self._request_queues = min(self.config.num_request_queues, len(transport.queues) - Queue.REQUEST)
        if self._request_queues < 1:
            raise FormatError(f"a device with {len(transport.queues)} queues is too small")
        self._ready: deque[Done | Rpc | RpcWithdrawn | Notification] = deque()
        self._controls: deque[_InFlight] = deque()
        """Requests that wait for room in the control queue."""
        self._others: deque[_InFlight] = deque()
        """Those that wait for room in a request queue, but calls: they go first, an RPC's answer may depend on them."""
        self._calls: deque[_InFlight] = deque()
        """Calls that wait, also because the device has as many as it takes."""
        self._running: set[_InFlight] = set()
        """Calls that the device has."""
        self._in_flight: dict[int, _InFlight] = {}
        """By tag, requests that somebody waits for."""
        self._by_call: dict[Call, _InFlight] = {}
        self._rpcs: dict[int, Rpc] = {}
        self._rpc_ids: dict[Rpc, int] = {}
        self._owed = 0
        """Answers to RPCs and acknowledgements that the device has not returned."""
        self._lent: dict[Memory, Rpc] = {}
        """Memory that was the answer to a SHM_ALLOC and was not freed by a SHM_FREE."""
        self._contexts: set[GuestContext] = set()
        self._sessions: set[GuestSession] = set()
        self._opening: Counter[Request] = Counter()
        """Requests under way that may add to them."""
        self._regions: dict[int, Memory] = {}
        self._given: set[_InFlight] = set()
        """Requests that the device has."""
        self._lost: set[_InFlight] = set()
        """Those of them that were made before its state was lost."""
        self._shared: dict[Memory, int] = {}
        """Memory that the device may use, as it is registered, or will be; with its bytes."""
        self._shared_bytes = 0
        self._kept: dict[Memory, None] = {}
        """… of an epoch that is over, until all of ``_lost`` were returned."""
        self._released: dict[Memory, None] = {}
        """What was released while the device may use it: reserved until it does not."""
        self._next_tag = 1
        self._next_queue = 0
        self._dead = ""
        self._closed = False
        self._event_size = self.config.limits.event_buffer_size
        self._post_event_buffers()
        transport.kick(Queue.EVENT)

    # -- the contract

    @property
    def info(self) -> TeeInfo:
        """Which TEE stands behind the device."""
        return self.config.info

    @property
    def max_params(self) -> int:
        """Parameters that a call can have."""
        return self.config.limits.max_params

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink

    def fileno(self) -> int | None:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._transport.fileno()

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._memory.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`. What the device may still use stays reserved until it does not."""
        if memory in self._shared or memory in self._kept:
            self._released[memory] = None
        else:
            self._memory.release(memory)

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        if self._dead:
            self._ready.append(Done(call, Result.COMMUNICATION, Origin.COMMS))
            return
        try:
            starter = self._STARTERS.get(type(call))
            if starter is None:
                raise _RefusedError(Result.NOT_SUPPORTED)
            starter(self, call)
        except _RefusedError as e:
            self._ready.append(Done(call, e.code, Origin.API))
        except MemoryError:
            self._ready.append(Done(call, Result.OUT_OF_MEMORY, Origin.API))
        except (ValueError, TypeError, AttributeError, struct.error) as e:
            log.debug("%s cannot be sent: %s", type(call).__name__, e)
            self._ready.append(Done(call, Result.BAD_PARAMETERS, Origin.API))

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        flight = self._by_call.get(call)
        if flight is None or flight.request not in CALLS or self._dead:
            return
        if flight in self._calls:
            self._drop(flight)
            return
        body = REQUESTS[Request.CANCEL].body.codec.pack(tag=flight.tag)
        self._control(Request.CANCEL, body, context=flight.context)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        ident = self._rpc_ids.pop(rpc, None)
        if ident is None or self._dead:
            return
        del self._rpcs[ident]
        try:
            raw = self._raw_reply(rpc, reply)
            pack_raw(raw)
            body = _body(Request.RPC_REPLY, rpc=ident, ret=reply.code, origin=reply.origin, num_params=len(raw))
        except (_RefusedError, ValueError, struct.error):
            log.warning("an RPC was answered with what the device cannot be told")
            self._ready.append(RpcWithdrawn(rpc))
            raw, reply = [], RpcReply(Result.BAD_PARAMETERS)
            body = _body(Request.RPC_REPLY, rpc=ident, ret=reply.code, origin=reply.origin, num_params=0)
        if rpc.command == RpcCommand.SHM_ALLOC and reply.code == Result.SUCCESS:
            self._lent.update((p.memory, rpc) for p in reply.params if isinstance(p, MemRef) and p.memory is not None)
        self._control(Request.RPC_REPLY, body, raw=raw, answers=rpc)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        more = False
        if not self._closed:
            try:
                more = self._serve()
            except (ProtocolError, TransportError) as e:
                self._die(str(e))
        sink = self._sink
        assert sink is not None
        while self._ready:
            sink(self._ready.popleft())
        return 0.0 if more else None

    def _serve(self) -> bool:
        """Take what the device has for us; whether there is more. Raises ProtocolError, TransportError."""
        try:
            if self._transport.acknowledge():
                self._check_epoch()
        except TransportError:
            if not self._dead:
                self._poll()  # what it did before it went
            raise
        return not self._dead and self._poll()

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`."""
        return {"calls": len(self._in_flight), "registrations": len(self._regions), "rpcs": len(self._rpcs)}

    def close(self) -> None:
        """End the device's use: all calls end, the device is reset."""
        self._die("the driver was closed")
        if not self._closed:
            self._closed = True
            self._transport.close()

    # -- requests

    def _send(
        self,
        request: Request,
        body: bytes,
        *,
        call: Call | None = None,
        context: GuestContext | None = None,
        session: GuestSession | None = None,
        raw: list[RawParam] | None = None,
        tail: bytes = b"",
        inline_in: bytes = b"",
        inline_out: int = 0,
        entries: int = 0,
        answers: Rpc | None = None,
    ) -> None:
        raw = raw or []
        tag = self._next_tag
        self._next_tag += 1
        data = pack_request(
            request,
            epoch=context.epoch if context is not None else self.config.epoch,
            tag=tag,
            context=context.ident if context is not None else 0,
            body=body,
            tail=tail or (pack_raw(raw) if raw else b""),
        )
        readable = len(data) + len(inline_in)
        room = response_size(REQUESTS[request], len(raw), inline_out, entries)
        buffer = self._buffers.take(readable + room)
        buffer.write(data + inline_in)
        flight = _InFlight(request, buffer, readable, room, call, context, session, tag, raw, answers)
        if call is not None:
            self._in_flight[tag] = flight
            self._by_call[call] = flight
            if request in TAKES:
                self._opening[TAKES[request]] += 1
        if REQUESTS[request].queue is Queue.CONTROL:
            self._controls.append(flight)
        elif request in CALLS:
            self._calls.append(flight)
        else:
            self._others.append(flight)
        self._flush()

    def _control(self, request: Request, body: bytes, *, answers: Rpc | None = None, **more: Any) -> None:
        try:
            self._send(request, body, answers=answers, **more)
        except MemoryError:
            log.warning("no memory for a %s request; the device's deadline will end what it is about", request.name)
            if answers is not None:
                self._take_back(answers)
            return
        self._owed += request != Request.CANCEL

    def _request(self, request: Request, body: bytes, call: Call, context: GuestContext | None, **more: Any) -> None:
        self._send(request, body, call=call, context=context, **more)

    def _flush(self) -> None:
        """Give the device what waits, as far as there is room."""
        queues = self._transport.queues
        while self._controls and self._add(Queue.CONTROL, queues[Queue.CONTROL], self._controls[0]):
            self._controls.popleft()
        while self._others and self._place(queues, self._others[0], call=False):
            self._others.popleft()
        while (
            self._calls
            and len(self._running) < self.config.limits.max_calls
            and self._place(queues, self._calls[0], call=True)
        ):
            self._running.add(self._calls.popleft())

    def _place(self, queues: Sequence[DriverQueue], flight: _InFlight, *, call: bool) -> bool:
        """Put a request into the next request queue that has room. Calls leave some for what is no call."""
        for _ in range(self._request_queues):
            index = Queue.REQUEST + self._next_queue
            self._next_queue = (self._next_queue + 1) % self._request_queues
            queue = queues[index]
            reserved = min(_RESERVED, queue.size // 2) if call and queue.in_flight else 0
            if queue.free_slots > reserved and self._add(index, queue, flight):
                return True
        return False

    def _add(self, index: int, queue: DriverQueue, flight: _InFlight) -> bool:
        buffer = flight.buffer
        try:
            queue.add(buffer.segments(0, flight.readable), buffer.segments(flight.readable, flight.room), flight)
        except QueueFull:
            return False
        self._given.add(flight)
        if queue.kick_needed():
            self._transport.kick(index)
        return True

    def _drop(self, flight: _InFlight) -> None:
        """End a call that waits: the device has not seen it."""
        call = flight.call
        assert call is not None
        self._calls.remove(flight)
        self._end(flight)
        self._buffers.give(flight.buffer)
        self._ready.append(Done(call, Result.CANCEL, Origin.API))

    def _check_room(self, request: Request, there: int, limit: int) -> None:
        if there + self._opening[request] >= limit:
            raise _RefusedError(Result.OUT_OF_MEMORY)

    def _open_context(self, call: OpenContext) -> None:
        self._check_room(Request.OPEN_CONTEXT, len(self._contexts), self.config.limits.max_contexts)
        self._request(Request.OPEN_CONTEXT, _body(Request.OPEN_CONTEXT, flags=0), call, None)

    def _close_context(self, call: CloseContext) -> None:
        context = _context(call.context)
        for flight in [f for f in self._calls if f.context is context]:
            self._drop(flight)
        self._request(Request.CLOSE_CONTEXT, b"", call, context)

    def _open_session(self, call: OpenSession) -> None:
        self._check_room(Request.OPEN_SESSION, len(self._sessions), self.config.limits.max_sessions)
        raw, inline_in, inline_out = self._raw_params(call.params)
        body = _body(
            Request.OPEN_SESSION,
            uuid=call.uuid.bytes,
            client_uuid=call.client.uuid.bytes,
            client_login=call.client.login,
            num_params=len(raw),
        )
        context = _context(call.context)
        self._request(Request.OPEN_SESSION, body, call, context, raw=raw, inline_in=inline_in, inline_out=inline_out)

    def _close_session(self, call: CloseSession) -> None:
        session = _plain_session(call.session)
        for flight in [f for f in self._calls if f.session is session]:
            self._drop(flight)
        body = _body(Request.CLOSE_SESSION, session=session.ident)
        self._request(Request.CLOSE_SESSION, body, call, session.context, session=session)

    def _invoke(self, call: Invoke) -> None:
        session = _plain_session(call.session)
        raw, inline_in, inline_out = self._raw_params(call.params)
        body = _body(Request.INVOKE, session=session.ident, func=call.func, num_params=len(raw))
        self._request(
            Request.INVOKE,
            body,
            call,
            session.context,
            session=session,
            raw=raw,
            inline_in=inline_in,
            inline_out=inline_out,
        )

    def _register(self, call: RegisterMemory) -> None:
        if call.memory.ffa is not None:
            self._register_handle(call, call.memory.ffa)
            return
        ranges = call.memory.ranges
        limits = self.config.limits
        if (
            not 0 < len(ranges) <= limits.max_region_ranges
            or len(self._shared) >= limits.max_regions
            or self._shared_bytes + call.memory.size > limits.max_region_bytes
        ):
            raise _RefusedError(Result.OUT_OF_MEMORY)
        flags = RegionFlag.READ_ONLY if call.memory.read_only else 0
        body = _body(Request.REGISTER_MEMORY, flags=flags, num_ranges=len(ranges), size=call.memory.size)
        tail = b"".join(r.address.to_bytes(8, "little") + r.length.to_bytes(8, "little") for r in ranges)
        assert len(tail) == len(ranges) * RANGE_SIZE
        self._request(Request.REGISTER_MEMORY, body, call, _context(call.context), tail=tail)
        if call.memory not in self._shared:
            self._shared[call.memory] = call.memory.size
            self._shared_bytes += call.memory.size

    def _register_handle(self, call: RegisterMemory, share: FfaShare) -> None:
        """Memory that the guest has shared with the TEE by FF-A: the device is not told where it is."""
        if not self._features & Feature.FFA_HANDLE:
            raise _RefusedError(Result.NOT_SUPPORTED)
        if len(self._shared) >= self.config.limits.max_regions:
            raise _RefusedError(Result.OUT_OF_MEMORY)
        body = _body(
            Request.REGISTER_FFA,
            handle=share.handle,
            tag=share.tag,
            size=shared_size(call.memory),
            flags=RegionFlag.READ_ONLY if call.memory.read_only else 0,
        )
        self._request(Request.REGISTER_FFA, body, call, _context(call.context))
        self._shared.setdefault(call.memory, 0)

    def _unregister(self, call: UnregisterMemory) -> None:
        region = call.memory.handle
        if not isinstance(region, GuestRegion):
            raise _RefusedError(Result.BAD_PARAMETERS)
        body = _body(Request.UNREGISTER_MEMORY, region=region.ident)
        self._request(Request.UNREGISTER_MEMORY, body, call, region.context)

    def _service(self, call: ServiceCall) -> None:
        about = SERVICE_REQUESTS[type(call)]
        if REQUESTS[about.request].feature & ~self._features:
            raise _RefusedError(Result.NOT_SUPPORTED)
        if about.request in TAKES:
            self._check_room(Request.OPEN_SESSION, len(self._sessions), self.config.limits.max_sessions)
        context = _context(call.context)
        fields = about.fields(call)
        session = _session(getattr(call, about.handle)) if about.handle else None
        if session is not None:
            if session.context is not context or session.opened_by is not _OPENED_BY[about.request]:
                raise _RefusedError(Result.BAD_PARAMETERS)
            fields[about.handle] = session.ident
        raw, inline_in, inline_out = self._raw_params(call.params)
        if about.params:
            fields["num_params"] = len(raw)
        elif raw:
            raise _RefusedError(Result.BAD_PARAMETERS)
        if about.request in GIVES_BACK:
            for flight in [f for f in self._calls if f.session is session]:
                self._drop(flight)
        self._request(
            about.request,
            _body(about.request, **fields),
            call,
            context,
            session=session,
            raw=raw,
            inline_in=inline_in,
            inline_out=inline_out,
            entries=min(call.max_entries, MAX_LISTED) if isinstance(call, ListServices) else 0,
        )

    _STARTERS: ClassVar[dict[type[Call], Callable[[Any, Any], None]]] = {
        OpenContext: _open_context,
        CloseContext: _close_context,
        OpenSession: _open_session,
        CloseSession: _close_session,
        Invoke: _invoke,
        RegisterMemory: _register,
        UnregisterMemory: _unregister,
        **dict.fromkeys(SERVICE_REQUESTS, _service),
    }

    # -- parameters

    def _raw_params(self, params: list[Param]) -> tuple[list[RawParam], bytes, int]:
        """Parameters as the wire has them, and their inline data: bytes in, size of the room for bytes out."""
        if len(params) > self.config.limits.max_params:
            raise _RefusedError(Result.BAD_PARAMETERS)
        raw: list[RawParam] = []
        data_in: list[bytes] = []
        size_in = size_out = 0
        for param in params:
            attr = attribute(param)
            if isinstance(param, Nothing):
                raw.append((attr, 0, 0, 0))
            elif isinstance(param, Value):
                raw.append((attr, param.a, param.b, param.c))
            elif param.memory is None:
                raw.append((attr, 0, param.size, NULL_REGION))
            elif isinstance(param.memory.handle, GuestRegion):
                raw.append((attr, param.offset, param.size, param.memory.handle.ident))
            else:
                if not self._features & Feature.INLINE:
                    raise _RefusedError(Result.NOT_SUPPORTED)
                if not 0 <= param.offset <= param.offset + param.size <= param.memory.size:
                    raise _RefusedError(Result.BAD_PARAMETERS)
                if param.memory.read_only and param.direction.is_output:
                    raise _RefusedError(Result.BAD_PARAMETERS)
                size = padded(param.size)
                if param.direction.is_input:
                    size_in += size
                if param.direction.is_output:
                    size_out += size
                if max(size_in, size_out) > self.config.limits.max_inline_bytes:
                    raise _RefusedError(Result.OUT_OF_MEMORY)
                if param.direction.is_input:
                    data_in.append(param.memory.read(param.offset, param.size) + bytes(size - param.size))
                raw.append((attr | PARAM_INLINE, 0, param.size, 0))
        return raw, b"".join(data_in), size_out

    def _raw_reply(self, rpc: Rpc, reply: RpcReply) -> list[RawParam]:
        """The parameters of an answer, which are those of the question, but for SHM_ALLOC and SHM_FREE (DRV-RPC-6)."""
        raw = [self._raw_answer(param) for param in reply.params]
        wanted = _REPLY_ATTRIBUTES.get(rpc.command)
        if wanted is None:
            wanted = [attribute(param) for param in rpc.params]
        if [attr for attr, *_ in raw] == wanted:
            return raw
        if reply.code in _WITH_PARAMS:
            raise _RefusedError(Result.BAD_PARAMETERS)
        return []

    def _raw_answer(self, param: Param) -> RawParam:
        if isinstance(param, Value):
            return (attribute(param), param.a, param.b, param.c)
        if isinstance(param, MemRef):
            if param.memory is None:
                return (attribute(param), 0, param.size, NULL_REGION)
            region = param.memory.handle
            if not isinstance(region, GuestRegion):
                raise _RefusedError(Result.BAD_PARAMETERS)
            return (attribute(param), param.offset, param.size, region.ident)
        return (attribute(param), 0, 0, 0)

    # -- from the device

    def _poll(self) -> bool:
        """Take what was completed; whether there is more already. Raises ProtocolError, TransportError."""
        queues = self._transport.queues
        returned = [item for index, queue in enumerate(queues) if index != Queue.EVENT for item in queue.poll()]
        # looked at later, but acted on first: what an event names was there when it was sent, and may be gone
        # with a response that came after it
        for buffer, written in queues[Queue.EVENT].poll():
            self._take_event(buffer, written)
        for flight, written in returned:
            self._complete(flight, written)
        more = [queue.enable_notifications() for queue in queues]
        if not self._dead:
            self._flush()
        return any(more)

    def _complete(self, flight: _InFlight, written: int) -> None:
        data = flight.buffer.read(flight.readable, written)
        self._buffers.give(flight.buffer)
        self._running.discard(flight)
        self._given.discard(flight)
        if self._lost:
            self._lost.discard(flight)
            self._free_kept()
        call = flight.call
        if call is None:
            self._controlled(flight, data)
            return
        for rpc in [rpc for rpc in self._lent.values() if rpc.call is call]:
            self._take_back(rpc)
        self._end(flight)
        try:
            done, status = self._done(flight, call, data)
        except ProtocolError:
            self._ready.append(Done(call, Result.COMMUNICATION, Origin.COMMS, may_have_run=True))
            raise
        if isinstance(call, RegisterMemory) and call.memory.handle is None:
            self._unshare(call.memory)
        elif flight.request in GIVES_BACK and flight.session is not None:
            self._sessions.discard(flight.session)
        elif flight.request == Request.CLOSE_CONTEXT and flight.context is not None:
            self._contexts.discard(flight.context)
            self._sessions = {session for session in self._sessions if session.context in self._contexts}
        self._ready.append(done)
        if status == Status.STALE_EPOCH:
            self._check_epoch()

    def _done(self, flight: _InFlight, call: Call, data: bytes) -> tuple[Done, int]:
        """How a call has ended, and the response's status. Raises ProtocolError."""
        if len(data) < _RESPONSE_HEADER_SIZE:
            raise ProtocolError(f"the device answered {flight.request.name} with {len(data)} bytes")
        header = RESPONSE_HEADER.unpack(data)
        done = Done(call, header.ret, header.origin, may_have_run=bool(header.flags & ResponseFlag.MAY_HAVE_RUN))
        if header.status == Status.OK:
            if len(data) != flight.room and flight.request != Request.SERVICE_LIST:
                raise ProtocolError(f"the device answered {flight.request.name} with {len(data)} bytes")
            self._FINISHERS[flight.request](self, flight, done, data)
        elif header.ret == Result.SUCCESS:
            done.code, done.origin = Result.COMMUNICATION, Origin.COMMS
        return done, header.status

    def _controlled(self, flight: _InFlight, data: bytes) -> None:
        """A control request is done, or a call for which nobody waits any more."""
        self._owed -= flight.request in (Request.RPC_REPLY, Request.RPC_WITHDRAWN_ACK)
        if flight.answers is not None and data[:4] != _STATUS_OK:
            self._take_back(flight.answers)

    def _take_back(self, rpc: Rpc) -> None:
        """The TEE did not take the answer to ``rpc``, or has ended with what it was given (SHM_ALLOC's memory)."""
        for memory in [memory for memory, lent in self._lent.items() if lent is rpc]:
            del self._lent[memory]
        self._ready.append(RpcWithdrawn(rpc))

    def _end(self, flight: _InFlight) -> None:
        self._in_flight.pop(flight.tag, None)
        if flight.call is not None:
            self._by_call.pop(flight.call, None)
            if flight.request in TAKES:
                self._opening[TAKES[flight.request]] -= 1
            flight.call = None

    def _response_body(self, flight: _InFlight, data: bytes) -> Any:
        response = REQUESTS[flight.request].response
        assert response is not None
        return response.codec.unpack(data, _RESPONSE_HEADER_SIZE)

    def _opened(self, flight: _InFlight, done: Done, data: bytes, name: str) -> int:
        """The id that a response gives: 0 exactly if it failed."""
        ident = int(getattr(self._response_body(flight, data), name))
        if (ident != 0) is not (done.code == Result.SUCCESS):
            raise ProtocolError(f"the device gave {name} {ident} with result {done.code:#x}")
        return ident

    def _context_opened(self, flight: _InFlight, done: Done, data: bytes) -> None:
        ident = self._opened(flight, done, data, "context")
        if ident:
            done.value = context = GuestContext(ident, self.config.epoch)
            self._contexts.add(context)

    def _service_listed(self, flight: _InFlight, done: Done, data: bytes) -> None:
        response = REQUESTS[Request.SERVICE_LIST].response
        assert response is not None
        at = _RESPONSE_HEADER_SIZE + response.codec.size
        if not at <= len(data) <= flight.room:
            raise ProtocolError(f"the device answered {flight.request.name} with {len(data)} bytes")
        body = response.codec.unpack(data, _RESPONSE_HEADER_SIZE)
        if len(data) != at + body.count * ENTRY_SIZE or body.count > body.total:
            raise ProtocolError(f"the device listed {body.count} of {body.total} services in {len(data)} bytes")
        try:
            entries = [Service.unpack(data[i : i + ENTRY_SIZE]) for i in range(at, len(data), ENTRY_SIZE)]
        except ConstructError as e:
            raise ProtocolError(f"the device listed a service that makes no sense: {e}") from None
        done.value = ServiceList(body.total, entries)

    def _service_loaded(self, flight: _InFlight, done: Done, data: bytes) -> None:
        body = self._response_body(flight, data)
        self._take_params(flight, done, data, _params_of(done), body.num_params)
        if done.code == Result.SUCCESS:
            done.value = Loaded(UUID(bytes=body.uuid), body.version)

    def _service_run(self, flight: _InFlight, done: Done, data: bytes) -> None:
        self._take_params(flight, done, data, _params_of(done), self._response_body(flight, data).num_params)

    def _enclave_opened(self, flight: _InFlight, done: Done, data: bytes) -> None:
        name = "enclave" if flight.request == Request.ENCLAVE_CREATE else "server"
        ident = self._opened(flight, done, data, name)
        if ident:
            assert flight.context is not None
            done.value = session = GuestSession(flight.context, ident, flight.request)
            self._sessions.add(session)

    def _enclave_called(self, flight: _InFlight, done: Done, data: bytes) -> None:
        body = self._response_body(flight, data)
        params = _params_of(done)
        self._take_params(flight, done, data, params, body.num_params)
        if done.code == Result.SUCCESS:
            room = sum(raw[2] for raw in flight.raw)
            if body.offset + body.size > room:
                raise ProtocolError(f"the device returned {body.size} bytes at {body.offset} of {room}")
            done.value = CallReturn(body.value, body.offset, body.size)

    def _session_opened(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, OpenSession)
        ident = self._opened(flight, done, data, "session")
        self._take_params(flight, done, data, done.call.params, self._response_body(flight, data).num_params)
        if ident:
            assert flight.context is not None
            done.value = session = GuestSession(flight.context, ident)
            self._sessions.add(session)

    def _invoked(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, Invoke)
        self._take_params(flight, done, data, done.call.params, self._response_body(flight, data).num_params)

    def _take_params(self, flight: _InFlight, done: Done, data: bytes, params: list[Param], count: int) -> None:
        if count != len(flight.raw):
            raise ProtocolError("the device answered with another number of parameters")
        response = REQUESTS[flight.request].response
        assert response is not None
        at = _RESPONSE_HEADER_SIZE + response.codec.size
        got = unpack_raw(data, at, count)
        take_results(flight.raw, got, params, done.code)
        at += count * PARAM.size
        for (attr, _, capacity, _), param in zip(flight.raw, params, strict=True):
            if attr & PARAM_INLINE and isinstance(param, MemRef) and param.direction.is_output:
                if param.size <= capacity and param.memory is not None:
                    try:
                        param.memory.write(param.offset, data[at : at + param.size])
                    except ValueError:  # the client has taken its memory away meanwhile
                        done.code, done.origin = Result.BAD_PARAMETERS, Origin.API
                at += padded(capacity)

    def _registered(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, RegisterMemory)
        ident = self._opened(flight, done, data, "region")
        if ident:
            assert flight.context is not None
            if ident in self._regions:
                raise ProtocolError("the device gave the id of a region that there is already")
            done.call.memory.handle = GuestRegion(flight.context, ident)
            self._regions[ident] = done.call.memory

    def _unregistered(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, UnregisterMemory)
        if done.code == Result.SUCCESS:  # otherwise its context closes, and it is used until that has closed
            self._forget(done.call.memory)

    def _context_closed(self, flight: _InFlight, done: Done, data: bytes) -> None:
        for memory in list(self._regions.values()):
            if isinstance(memory.handle, GuestRegion) and memory.handle.context is flight.context:
                self._forget(memory)

    def _forget(self, memory: Memory) -> None:
        if isinstance(memory.handle, GuestRegion):
            self._regions.pop(memory.handle.ident, None)
            memory.handle = None
        self._unshare(memory)

    def _unshare(self, memory: Memory) -> None:
        """The device does not use it any more."""
        self._shared_bytes -= self._shared.pop(memory, 0)
        if memory in self._released and memory not in self._kept:
            del self._released[memory]
            self._memory.release(memory)

    def _free_kept(self) -> None:
        """Nothing of an earlier epoch is used any more, once all its requests were returned."""
        if not self._lost:
            kept, self._kept = self._kept, {}
            for memory in kept:
                if memory not in self._shared:
                    self._unshare(memory)

    def _nothing(self, flight: _InFlight, done: Done, data: bytes) -> None:
        pass

    _FINISHERS: ClassVar[dict[Request, Callable[[Any, _InFlight, Done, bytes], None]]] = {
        Request.OPEN_CONTEXT: _context_opened,
        Request.CLOSE_CONTEXT: _context_closed,
        Request.OPEN_SESSION: _session_opened,
        Request.CLOSE_SESSION: _nothing,
        Request.INVOKE: _invoked,
        Request.REGISTER_MEMORY: _registered,
        Request.REGISTER_FFA: _registered,
        Request.UNREGISTER_MEMORY: _unregistered,
        Request.SERVICE_LIST: _service_listed,
        Request.SERVICE_LOAD: _service_loaded,
        Request.SERVICE_REMOVE: _nothing,
        Request.SERVICE_TASK: _service_run,
        Request.SERVICE_ATTEST: _service_run,
        Request.ENCLAVE_CREATE: _enclave_opened,
        Request.ENCLAVE_DESTROY: _nothing,
        Request.ENCLAVE_ACQUIRE: _enclave_opened,
        Request.ENCLAVE_RELEASE: _nothing,
        Request.ENCLAVE_CALL: _enclave_called,
    }

    # -- events

    def _post_event_buffers(self) -> None:
        """As many as the device wants, or as the ring holds."""
        for _ in range(min(self.config.limits.num_event_buffers, self._transport.queues[Queue.EVENT].size)):
            try:
                buffer = self._buffers.take(self._event_size)
            except MemoryError as e:
                raise FormatError(f"the device wants event buffers for which there is no memory: {e}") from None
            try:
                self._post_event_buffer(buffer)
            except QueueFull:
                self._buffers.give(buffer)
                return

    def _post_event_buffer(self, buffer: Buffer) -> None:
        self._transport.queues[Queue.EVENT].add([], buffer.segments(0, self._event_size), buffer)

    def _take_event(self, buffer: Buffer, written: int) -> None:
        data = buffer.read(0, written)
        self._post_event_buffer(buffer)
        if self._transport.queues[Queue.EVENT].kick_needed():
            self._transport.kick(Queue.EVENT)
        try:
            header = EVENT_HEADER.unpack(data)
            take = self._EVENTS.get(header.type)
            if header.type == Event.EPOCH and header.epoch != self.config.epoch:
                self._check_epoch()
            if self._dead:
                return
            if take is not None and header.epoch == self.config.epoch:
                take(self, data[EVENT_HEADER.size :])
        except FormatError as e:
            raise ProtocolError(f"the device sent an event that makes no sense: {e}") from None

    def _rpc(self, data: bytes) -> None:
        body = EVENTS[Event.RPC].codec.unpack(data)
        at = EVENTS[Event.RPC].codec.size
        if len(data) != at + body.num_params * PARAM.size or not body.rpc or body.rpc in self._rpcs:
            raise ProtocolError("the device sent an RPC that makes no sense")
        if len(self._rpcs) >= self.config.limits.max_rpcs:
            raise ProtocolError("the device sent more RPCs than it may")
        flight = self._in_flight.get(body.call)
        raw = unpack_raw(data, at, body.num_params)
        check_raw(raw, inline=False)
        params = [self._rpc_param(one) for one in raw]
        rpc = Rpc(body.command, params, flight.call if flight is not None else None, body.target == RpcTarget.CLIENT)
        if body.target != RpcTarget.SUPPLICANT:
            self._check_for_client(body, rpc, flight)
        elif rpc.command == RpcCommand.OCALL:
            raise ProtocolError("the device sent an OCALL for the supplicant")
        if rpc.command == RpcCommand.SHM_FREE:
            for param in params:
                if isinstance(param, MemRef) and param.memory is not None:
                    self._lent.pop(param.memory, None)
        self._rpcs[body.rpc] = rpc
        self._rpc_ids[rpc] = body.rpc
        if RPC_SERVERS.get(rpc.command, _UNKNOWN_COMMAND)[0] is RpcServer.DRIVER:
            self.answer(rpc, self._own_answer(rpc))
        else:
            self._ready.append(rpc)

    def _check_for_client(self, body: Any, rpc: Rpc, flight: _InFlight | None) -> None:
        """Raises ProtocolError for what no client may be called with."""
        if not rpc.to_client or not self._features & Feature.OCALL or rpc.command not in _FOR_CLIENTS:
            raise ProtocolError(f"the device sent RPC {body.command} for target {body.target}")
        if flight is None:
            return  # its call has been returned meanwhile: nobody serves it
        context = flight.context
        if flight.request not in CALLS or (context is not None and body.context != context.ident):
            raise ProtocolError("the device sent an OCALL for another client than its call's")
        for param in rpc.params:
            region = param.memory.handle if isinstance(param, MemRef) and param.memory is not None else None
            if isinstance(region, GuestRegion) and region.context is not context:
                raise ProtocolError("the device named another client's memory in an OCALL")

    def _own_answer(self, rpc: Rpc) -> RpcReply:
        """To an RPC that is for the driver: GET_TIME. There are no threads here that could wait for another one."""
        if rpc.command != RpcCommand.GET_TIME:
            return RpcReply(RPC_SERVERS[rpc.command][1])
        (place, *others) = rpc.params or [Nothing()]
        if others or not isinstance(place, Value) or place.direction is not Direction.OUT or place.meta:
            return RpcReply(Result.BAD_PARAMETERS)
        return RpcReply(Result.SUCCESS, [Value(Direction.OUT, *divmod(self._now(), 10**9))])

    def _rpc_param(self, raw: RawParam) -> Param:
        attr, a, b, c = raw
        kind = attr & PARAM_TYPE_MASK
        meta = bool(attr & PARAM_META)
        if kind in VALUE_TYPES:
            return Value(VALUE_TYPES[kind], a, b, c, meta)
        if kind in MEMREF_TYPES:
            memory = None if c == NULL_REGION else self._regions.get(c)
            if c != NULL_REGION and (memory is None or a + b > memory.size):
                raise ProtocolError("the device named memory in an RPC that was not given to it")
            if memory is not None and memory.read_only and MEMREF_TYPES[kind].is_output:
                raise ProtocolError("the device wants read-only memory to be written")
            return MemRef(MEMREF_TYPES[kind], memory, a, b, meta)
        return Nothing(meta)

    def _rpc_withdrawn(self, data: bytes) -> None:
        ident = EVENTS[Event.RPC_WITHDRAWN].codec.unpack(data).rpc
        if self._owed > 2 * self.config.limits.max_rpcs + self._transport.queues[Queue.CONTROL].size:
            raise ProtocolError("the device does not take answers, but goes on asking")
        self._control(Request.RPC_WITHDRAWN_ACK, _body(Request.RPC_WITHDRAWN_ACK, rpc=ident))
        rpc = self._rpcs.pop(ident, None)
        if rpc is not None:
            del self._rpc_ids[rpc]
            self._ready.append(RpcWithdrawn(rpc))

    def _notified(self, data: bytes) -> None:
        if self._features & Feature.NOTIFICATION:
            self._ready.append(Notification(EVENTS[Event.NOTIFICATION].codec.unpack(data).value))

    def _ignored(self, data: bytes) -> None:
        pass

    _EVENTS: ClassVar[dict[int, Callable[[Any, bytes], None]]] = {
        Event.RPC: _rpc,
        Event.RPC_WITHDRAWN: _rpc_withdrawn,
        Event.NOTIFICATION: _notified,
        Event.EPOCH: _ignored,
    }

    # -- the device's other lives

    def _check_epoch(self) -> None:
        """The device may have lost its state: then all that was opened is gone."""
        try:
            config = Config.unpack(self._transport.read_config(CONFIG.size))
        except FormatError as e:
            self._die(str(e))
            return
        if replace(config, epoch=self.config.epoch) != self.config:
            self._die("the device has become another one")
        elif config.epoch != self.config.epoch:
            log.warning("the device has lost its state; all contexts are gone")
            self.config = config
            self._abandon()

    def _abandon(self) -> None:
        """Nobody will answer what is under way."""
        self._lost |= self._given
        self._kept.update(dict.fromkeys(self._shared))
        self._shared.clear()
        self._shared_bytes = 0
        for flight in list(self._in_flight.values()):
            call = flight.call
            self._end(flight)
            if call is not None:
                self._ready.append(Done(call, Result.COMMUNICATION, Origin.COMMS, may_have_run=True))
        for rpc in (*self._rpcs.values(), *dict.fromkeys(self._lent.values())):
            self._ready.append(RpcWithdrawn(rpc))
        self._contexts.clear()
        self._sessions.clear()
        self._rpcs.clear()
        self._rpc_ids.clear()
        self._lent.clear()
        self._running.clear()
        for flight in self._calls:
            self._buffers.give(flight.buffer)
        self._calls.clear()
        for memory in list(self._regions.values()):
            self._forget(memory)
        self._free_kept()

    def _die(self, why: str) -> None:
        if not self._dead:
            self._dead = why
            log.info("the device is not used any more: %s", why)
            self._abandon()


class _RefusedError(Exception):
    """A call that the driver does not send."""

    def __init__(self, code: Result) -> None:
        super().__init__(code.name)
        self.code = code


def _body(request: Request, **fields: Any) -> bytes:
    return REQUESTS[request].body.codec.pack(**fields)


def _context(handle: object) -> GuestContext:
    if not isinstance(handle, GuestContext):
        raise _RefusedError(Result.BAD_PARAMETERS)
    return handle


def _params_of(done: Done) -> list[Param]:
    assert isinstance(done.call, ServiceCall)
    return done.call.params


def _session(handle: object) -> GuestSession:
    if not isinstance(handle, GuestSession):
        raise _RefusedError(Result.BAD_PARAMETERS)
    return handle


def _plain_session(handle: object) -> GuestSession:
    session = _session(handle)
    if session.opened_by is not Request.OPEN_SESSION:
        raise _RefusedError(Result.BAD_PARAMETERS)
    return session
