"""The guest's driver of the virtio-tee device: a :class:`~tee.driver.TeeDriver` over any transport.

Sans-I/O but for what the transport does. The device is not trusted: what it answers is checked before it is used, and a
device that breaks the rules ends all calls with COMMUNICATION.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from device.config import Config
from device.messages import CONFIG, EVENT_HEADER, EVENTS, PARAM, REQUESTS, RESPONSE_HEADER
from device.params import (
    MEMREF_TYPES,
    VALUE_TYPES,
    RawParam,
    attribute,
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
    Event,
    Feature,
    Queue,
    RegionFlag,
    Request,
    ResponseFlag,
    Status,
)
from guest_driver.buffers import Buffer, Buffers
from guest_driver.transport import Transport
from pyvhost.errors import FormatError, ProtocolError, QueueFull
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
from tee.driver import Done, RpcWithdrawn, Sink, TeeInfo
from tee.memory import Memory
from tee.params import MemRef, Nothing, Param, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcReply

log = logging.getLogger(__name__)

DRIVER_FEATURES = Feature.INLINE | Feature.RPC
"""Feature bits that this driver knows how to use."""

_RESPONSE_HEADER_SIZE = RESPONSE_HEADER.size
_STATUS_OK = bytes(4)


@dataclass(slots=True, eq=False)
class GuestContext:
    """A context of the device. Its requests carry the epoch in which it was opened."""

    ident: int
    epoch: int


@dataclass(slots=True, eq=False)
class GuestSession:
    """A session of the device."""

    context: GuestContext
    ident: int


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
    tag: int = 0
    raw: list[RawParam] = field(default_factory=list)
    answers: Rpc | None = None
    """The RPC that an RPC_REPLY is for."""


@dataclass(slots=True)
class _Outgoing:
    """A request that is ready to go, with its queue."""

    queue: int
    flight: _InFlight


class VirtioTeeDriver:
    """Drives the device behind ``transport``. Raises FormatError if it is not a virtio-tee device that we know."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._buffers = Buffers(transport)
        self._sink: Sink | None = None
        self._features = Feature(transport.features) & DRIVER_FEATURES
        self.config = Config.unpack(transport.read_config(CONFIG.size))
        # a VMM may have been told to make fewer queues than the device could serve
        self._request_queues = min(self.config.num_request_queues, len(transport.queues) - Queue.REQUEST)
        if self._request_queues < 1:
            raise FormatError(f"a device with {len(transport.queues)} queues is too small")
        self._ready: deque[Done | Rpc | RpcWithdrawn] = deque()
        self._waiting: deque[_Outgoing] = deque()
        self._in_flight: dict[int, _InFlight] = {}
        """By tag, requests that somebody waits for."""
        self._by_call: dict[Call, _InFlight] = {}
        self._rpcs: dict[int, Rpc] = {}
        self._rpc_ids: dict[Rpc, int] = {}
        self._regions: dict[int, Memory] = {}
        self._next_tag = 1
        self._next_queue = 0
        self._dead = ""
        for _ in range(self.config.limits.num_event_buffers):
            self._post_event_buffer(self._buffers.take(self.config.limits.event_buffer_size))
        transport.kick(Queue.EVENT)

    # -- the contract

    @property
    def info(self) -> TeeInfo:
        """Which TEE stands behind the device."""
        return self.config.info

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink

    def fileno(self) -> int | None:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._transport.fileno()

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._transport.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._transport.release(memory)

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        if self._dead:
            self._ready.append(Done(call, Result.COMMUNICATION, Origin.COMMS))
            return
        try:
            self._STARTERS[type(call)](self, call)
        except _RefusedError as e:
            self._ready.append(Done(call, e.code, Origin.API))
        except MemoryError:
            self._ready.append(Done(call, Result.OUT_OF_MEMORY, Origin.API))

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        flight = self._by_call.get(call)
        if flight is None or flight.context is None or self._dead:
            return
        for outgoing in self._waiting:
            if outgoing.flight is flight:
                self._waiting.remove(outgoing)
                self._end(flight)
                self._buffers.give(flight.buffer)
                self._ready.append(Done(call, Result.CANCEL, Origin.API))
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
            raw = [self._raw_answer(param) for param in reply.params]
        except _RefusedError:
            log.warning("an RPC was answered with memory that the device does not know")
            raw, reply = [], RpcReply(Result.BAD_PARAMETERS)
        body = REQUESTS[Request.RPC_REPLY].body.codec.pack(
            rpc=ident, ret=reply.code, origin=reply.origin, num_params=len(raw)
        )
        self._control(Request.RPC_REPLY, body, raw=raw, answers=rpc)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        if self._transport.acknowledge():
            self._check_epoch()
        if not self._dead:
            try:
                self._poll()
            except ProtocolError as e:
                self._die(str(e))
        sink = self._sink
        assert sink is not None
        while self._ready:
            sink(self._ready.popleft())
        return None

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`."""
        return {"calls": len(self._in_flight), "registrations": len(self._regions), "rpcs": len(self._rpcs)}

    def close(self) -> None:
        """End the device's use: all calls end, the device is reset."""
        self._die("the driver was closed")
        self._transport.close()

    # -- requests

    def _send(
        self,
        request: Request,
        body: bytes,
        *,
        queue: int,
        call: Call | None = None,
        context: GuestContext | None = None,
        raw: list[RawParam] | None = None,
        tail: bytes = b"",
        inline_in: bytes = b"",
        inline_out: int = 0,
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
        room = response_size(REQUESTS[request], len(raw), inline_out)
        buffer = self._buffers.take(readable + room)
        buffer.write(data + inline_in)
        flight = _InFlight(request, buffer, readable, room, call, context, tag, raw, answers)
        if call is not None:
            self._in_flight[tag] = flight
            self._by_call[call] = flight
        outgoing = _Outgoing(queue, flight)
        if self._waiting or not self._submit(outgoing):
            self._waiting.append(outgoing)

    def _control(self, request: Request, body: bytes, **more: Any) -> None:
        try:
            self._send(request, body, queue=Queue.CONTROL, **more)
        except MemoryError:
            log.warning("no memory for a %s request; the device's deadline will end what it is about", request.name)

    def _request(self, request: Request, body: bytes, call: Call, context: GuestContext | None, **more: Any) -> None:
        queue = Queue.REQUEST + self._next_queue
        self._next_queue = (self._next_queue + 1) % self._request_queues
        self._send(request, body, queue=queue, call=call, context=context, **more)

    def _submit(self, outgoing: _Outgoing) -> bool:
        flight = outgoing.flight
        queue = self._transport.queues[outgoing.queue]
        buffer = flight.buffer
        try:
            queue.add(buffer.segments(0, flight.readable), buffer.segments(flight.readable, flight.room), flight)
        except QueueFull:
            return False
        if queue.kick_needed():
            self._transport.kick(outgoing.queue)
        return True

    def _open_context(self, call: OpenContext) -> None:
        self._request(Request.OPEN_CONTEXT, _body(Request.OPEN_CONTEXT, flags=0), call, None)

    def _close_context(self, call: CloseContext) -> None:
        self._request(Request.CLOSE_CONTEXT, b"", call, _context(call.context))

    def _open_session(self, call: OpenSession) -> None:
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
        session = _session(call.session)
        self._request(Request.CLOSE_SESSION, _body(Request.CLOSE_SESSION, session=session.ident), call, session.context)

    def _invoke(self, call: Invoke) -> None:
        session = _session(call.session)
        raw, inline_in, inline_out = self._raw_params(call.params)
        body = _body(Request.INVOKE, session=session.ident, func=call.func & 0xFFFF_FFFF, num_params=len(raw))
        self._request(Request.INVOKE, body, call, session.context, raw=raw, inline_in=inline_in, inline_out=inline_out)

    def _register(self, call: RegisterMemory) -> None:
        ranges = call.memory.ranges
        if not ranges or len(ranges) > self.config.limits.max_region_ranges:
            raise _RefusedError(Result.OUT_OF_MEMORY)
        flags = RegionFlag.READ_ONLY if call.memory.read_only else 0
        body = _body(Request.REGISTER_MEMORY, flags=flags, num_ranges=len(ranges), size=call.memory.size)
        tail = b"".join(r.address.to_bytes(8, "little") + r.length.to_bytes(8, "little") for r in ranges)
        assert len(tail) == len(ranges) * RANGE_SIZE
        self._request(Request.REGISTER_MEMORY, body, call, _context(call.context), tail=tail)

    def _unregister(self, call: UnregisterMemory) -> None:
        region = call.memory.handle
        if not isinstance(region, GuestRegion):
            raise _RefusedError(Result.BAD_PARAMETERS)
        body = _body(Request.UNREGISTER_MEMORY, region=region.ident)
        self._request(Request.UNREGISTER_MEMORY, body, call, region.context)

    _STARTERS: ClassVar[dict[type[Call], Callable[[Any, Any], None]]] = {
        OpenContext: _open_context,
        CloseContext: _close_context,
        OpenSession: _open_session,
        CloseSession: _close_session,
        Invoke: _invoke,
        RegisterMemory: _register,
        UnregisterMemory: _unregister,
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

    def _poll(self) -> None:
        for index, queue in enumerate(self._transport.queues):
            while True:
                for token, written in queue.poll():
                    if index == Queue.EVENT:
                        self._take_event(token, written)
                    else:
                        self._complete(token, written)
                if not queue.enable_notifications():
                    break
        while self._waiting and self._submit(self._waiting[0]):
            self._waiting.popleft()

    def _complete(self, flight: _InFlight, written: int) -> None:
        data = flight.buffer.read(flight.readable, written)
        self._buffers.give(flight.buffer)
        call = flight.call
        if call is None:
            self._controlled(flight, data)
            return
        self._end(flight)
        if len(data) < _RESPONSE_HEADER_SIZE:
            raise ProtocolError(f"the device answered {flight.request.name} with {len(data)} bytes")
        header = RESPONSE_HEADER.unpack(data)
        done = Done(call, header.ret, header.origin, may_have_run=bool(header.flags & ResponseFlag.MAY_HAVE_RUN))
        if header.status == Status.OK:
            if len(data) != flight.room:
                raise ProtocolError(f"the device answered {flight.request.name} with {len(data)} bytes")
            self._FINISHERS[flight.request](self, flight, done, data)
        elif header.ret == Result.SUCCESS:
            done.code, done.origin = Result.COMMUNICATION, Origin.COMMS
        if header.status == Status.STALE_EPOCH:
            self._check_epoch()
        self._ready.append(done)

    def _controlled(self, flight: _InFlight, data: bytes) -> None:
        """A control request is done, or a call for which nobody waits any more."""
        if flight.answers is not None and data[:4] != _STATUS_OK:
            # the TEE did not take the answer: what it gave (SHM_ALLOC's memory) is the supplicant's again
            self._ready.append(RpcWithdrawn(flight.answers))

    def _end(self, flight: _InFlight) -> None:
        self._in_flight.pop(flight.tag, None)
        if flight.call is not None:
            self._by_call.pop(flight.call, None)
            flight.call = None

    def _response_body(self, flight: _InFlight, data: bytes) -> Any:
        response = REQUESTS[flight.request].response
        assert response is not None
        return response.codec.unpack(data, _RESPONSE_HEADER_SIZE)

    def _context_opened(self, flight: _InFlight, done: Done, data: bytes) -> None:
        if done.code == Result.SUCCESS:
            done.value = GuestContext(self._response_body(flight, data).context, self.config.epoch)

    def _session_opened(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, OpenSession)
        body = self._response_body(flight, data)
        self._take_params(flight, done, data, done.call.params, body.num_params)
        if done.code == Result.SUCCESS:
            assert flight.context is not None
            done.value = GuestSession(flight.context, body.session)

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
        take_results(flight.raw, got, params)
        at += count * PARAM.size
        for (attr, _, capacity, _), param in zip(flight.raw, params, strict=True):
            if not isinstance(param, MemRef) or not param.direction.is_output:
                continue
            if param.size > capacity and param.memory is not None and done.code != Result.SHORT_BUFFER:
                raise ProtocolError("the device says that more was written than there is room for")
            if attr & PARAM_INLINE:
                if param.size <= capacity and param.memory is not None:
                    param.memory.write(param.offset, data[at : at + param.size])
                at += padded(capacity)

    def _registered(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, RegisterMemory)
        if done.code == Result.SUCCESS:
            assert flight.context is not None
            ident = self._response_body(flight, data).region
            done.call.memory.handle = GuestRegion(flight.context, ident)
            self._regions[ident] = done.call.memory

    def _unregistered(self, flight: _InFlight, done: Done, data: bytes) -> None:
        assert isinstance(done.call, UnregisterMemory)
        self._forget(done.call.memory)

    def _context_closed(self, flight: _InFlight, done: Done, data: bytes) -> None:
        for memory in list(self._regions.values()):
            if isinstance(memory.handle, GuestRegion) and memory.handle.context is flight.context:
                self._forget(memory)

    def _forget(self, memory: Memory) -> None:
        if isinstance(memory.handle, GuestRegion):
            self._regions.pop(memory.handle.ident, None)
            memory.handle = None

    def _nothing(self, flight: _InFlight, done: Done, data: bytes) -> None:
        pass

    _FINISHERS: ClassVar[dict[Request, Callable[[Any, _InFlight, Done, bytes], None]]] = {
        Request.OPEN_CONTEXT: _context_opened,
        Request.CLOSE_CONTEXT: _context_closed,
        Request.OPEN_SESSION: _session_opened,
        Request.CLOSE_SESSION: _nothing,
        Request.INVOKE: _invoked,
        Request.REGISTER_MEMORY: _registered,
        Request.UNREGISTER_MEMORY: _unregistered,
    }

    # -- events

    def _post_event_buffer(self, buffer: Buffer) -> None:
        size = self.config.limits.event_buffer_size
        self._transport.queues[Queue.EVENT].add([], buffer.segments(0, size), buffer)

    def _take_event(self, buffer: Buffer, written: int) -> None:
        data = buffer.read(0, written)
        self._post_event_buffer(buffer)
        if self._transport.queues[Queue.EVENT].kick_needed():
            self._transport.kick(Queue.EVENT)
        try:
            header = EVENT_HEADER.unpack(data)
            take = self._EVENTS.get(header.type)
            if header.epoch != self.config.epoch:
                self._check_epoch()
            if take is not None and header.epoch == self.config.epoch:
                take(self, data[EVENT_HEADER.size :])
        except FormatError as e:
            raise ProtocolError(f"the device sent an event that makes no sense: {e}") from None

    def _rpc(self, data: bytes) -> None:
        body = EVENTS[Event.RPC].codec.unpack(data)
        at = EVENTS[Event.RPC].codec.size
        if len(data) != at + body.num_params * PARAM.size or body.rpc in self._rpcs:
            raise ProtocolError("the device sent an RPC that makes no sense")
        flight = self._in_flight.get(body.call)
        params = [self._rpc_param(raw) for raw in unpack_raw(data, at, body.num_params)]
        rpc = Rpc(body.command, params, flight.call if flight is not None else None)
        self._rpcs[body.rpc] = rpc
        self._rpc_ids[rpc] = body.rpc
        self._ready.append(rpc)

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
            return MemRef(MEMREF_TYPES[kind], memory, a, b, meta)
        return Nothing(meta)

    def _rpc_withdrawn(self, data: bytes) -> None:
        ident = EVENTS[Event.RPC_WITHDRAWN].codec.unpack(data).rpc
        self._control(Request.RPC_WITHDRAWN_ACK, _body(Request.RPC_WITHDRAWN_ACK, rpc=ident))
        rpc = self._rpcs.pop(ident, None)
        if rpc is not None:
            del self._rpc_ids[rpc]
            self._ready.append(RpcWithdrawn(rpc))

    def _ignored(self, data: bytes) -> None:
        pass

    _EVENTS: ClassVar[dict[int, Callable[[Any, bytes], None]]] = {
        Event.RPC: _rpc,
        Event.RPC_WITHDRAWN: _rpc_withdrawn,
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
        if config.epoch != self.config.epoch:
            log.warning("the device has lost its state; all contexts are gone")
            self.config = config
            self._abandon()

    def _abandon(self) -> None:
        """Nobody will answer what is under way."""
        for flight in list(self._in_flight.values()):
            call = flight.call
            self._end(flight)
            if call is not None:
                self._ready.append(Done(call, Result.COMMUNICATION, Origin.COMMS, may_have_run=True))
        for rpc in self._rpcs.values():
            self._ready.append(RpcWithdrawn(rpc))
        self._rpcs.clear()
        self._rpc_ids.clear()
        for memory in list(self._regions.values()):
            self._forget(memory)

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


def _session(handle: object) -> GuestSession:
    if not isinstance(handle, GuestSession):
        raise _RefusedError(Result.BAD_PARAMETERS)
    return handle
