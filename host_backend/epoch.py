"""One epoch of a guest: its requests become calls of the TEE, what the TEE answers becomes responses.

Sans-I/O. When the guest is reset, its epoch ends and another begins; the old one lives on until the TEE has let go of
all that was its. Nothing of an ended epoch reaches the guest.
"""

from __future__ import annotations

import logging
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import TypeVar
from uuid import UUID

from device.config import Limits
from device.ids import IdTable
from device.machines import CALL, CallAction, CallEvent, CallState
from device.messages import CALLS, REQUEST_HEADER, REQUESTS
from device.params import (
    MEMREF_TYPES,
    PARAM_SIZE,
    VALUE_TYPES,
    RawParam,
    RequestError,
    check_raw,
    padded,
    unpack_raw,
)
from device.requests import RESPONSE_HEADER_SIZE, ParsedRequest, pack_response, parse_request, refusal
from device.wire import (
    NULL_REGION,
    PARAM_INLINE,
    PARAM_META,
    PARAM_TYPE_MASK,
    Feature,
    Queue,
    RegionFlag,
    Request,
    ResponseFlag,
    Status,
)
from host_backend import services
from host_backend.answers import add, ids, outputs
from host_backend.rpcs import GuestRpcs
from host_backend.slots import Port, Slot
from host_backend.tables import ContextEntry, Pending, RegionEntry, SessionEntry
from host_backend.trace import Recorder
from pyvhost.errors import MemoryFault
from tee.calls import (
    Call,
    Client,
    CloseContext,
    CloseSession,
    Invoke,
    Login,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Begun, Done, GenCap, InvokesAtOnce, OffersServices, TeeDriver
from tee.memory import FfaShare, Memory, Range
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result
from tee.services import Refusal

log = logging.getLogger(__name__)

T = TypeVar("T")
Place = TypeVar("Place")
_INVOKE = int(Request.INVOKE)
_IN, _OUT = Direction.IN, Direction.OUT
_MAX_ADDRESS = 1 << 64


class Epoch:
    """The tables of one epoch, and what each request does to them."""

    def __init__(
        self,
        number: int,
        tee: TeeDriver,
        port: Port,
        *,
        vm: str,
        features: Feature,
        limits: Limits,
        clock: Callable[[], float],
        on_drained: Callable[[Epoch], None],
        trace: Recorder | None = None,
        ffa_vm: int | None = None,
    ) -> None:
        self.number = number
        self.tee = tee
        self.port = port
        self.vm = vm
        self.ffa_vm = ffa_vm
        self.features = features
        self.limits = limits
        self.ended = False
        self._over = False
        self._failed = False
        """An error of our own has made the tables unreliable: only what the TEE says counts from here on."""
        self.contexts: IdTable[ContextEntry] = IdTable(limits.max_contexts)
        self.sessions: IdTable[SessionEntry] = IdTable(limits.max_sessions)
        self.regions: IdTable[RegionEntry] = IdTable(limits.max_regions)
        self.region_bytes = 0
        self.by_memory: dict[int, RegionEntry] = {}
        """Regions by the identity of their memory: how the TEE's RPCs name them."""
        self.calls: dict[int, Pending] = {}
        """Requests in progress by tag."""
        self.running = 0
        """How many of them run code in the TEE."""
        self.held: list[Pending] = []
        """Requests whose responses wait for their ring."""
        self._closing: set[ContextEntry] = set()
        """Contexts that the device closes on its own behalf."""
        self._sought: dict[int, list[Pending]] = {}
        """CANCELs by the tag that they look for, which may lie in a ring yet."""
        self._sought_late: dict[int, list[Pending]] = {}
        """Those that came when the search had begun."""
        self._max_calls = limits.max_calls
        self._logins = tee.info.logins
        self._on_drained = on_drained
        self.trace = trace
        self._at_once = tee.invoke_at_once if isinstance(tee, InvokesAtOnce) else None
        self.rpcs = GuestRpcs(self, clock)

    # -- requests

    def submit(
        self,
        data: bytes,
        room: int,
        queue: Queue,
        place: Place,
        slot_of: Callable[[Place], Slot],
        begun: Unfinished | None = None,
    ) -> bytes | None:
        """Take a request: its copied bytes, and ``room`` bytes (at least a header) for the response. ``begun`` is what
        :meth:`invoke_at_once` has left of it.

        Returns the response if the request has ended by now. Otherwise it will be given to ``slot_of(place)``, which is
        called before this returns.
        """
        try:
            request = parse_request(data, room, queue, epoch=self.number, features=self.features, limits=self.limits)
            if begun is not None:
                self._invoke_begun(slot_of(place), request, begun)
                return None
            return HANDLERS[request.type](self, slot_of(place), request)
        except RequestError as e:
            if self.trace is not None:
                self.trace.answered(self.vm, int.from_bytes(data[:4], "little"), e.status)
            log.debug("vm %s: request refused with %s: %s", self.vm, e.status.name, e.why)
            return refusal(e.status)

    def context_of(self, request: ParsedRequest) -> ContextEntry:
        """The open context that a request names. Raises RequestError(NO_CONTEXT)."""
        context = self.contexts.get(request.context)
        if context is None or context.handle is None or context.closing:
            raise RequestError(Status.NO_CONTEXT, f"no context {request.context}")
        return context

    def session_of(self, context: ContextEntry, ident: int, kind: type[SessionEntry] = SessionEntry) -> SessionEntry:
        """The session, enclave or server (``kind``) of ``context``. Raises RequestError(NO_SESSION)."""
        session = self.sessions.get(ident)
        if type(session) is not kind or session.context is not context or session.handle is None or session.closing:
            raise RequestError(Status.NO_SESSION, f"no {kind.what} {ident} in context {context.ident}")
        return session

    def region(self, ident: int, context: ContextEntry | None = None) -> RegionEntry:
        """The region with this id, of ``context`` if one is given. Raises RequestError(NO_REGION)."""
        region = self.regions.get(ident)
        if region is None or not region.ready or region.unregister is not None or region.context.closing:
            raise RequestError(Status.NO_REGION, f"no region {ident}")
        if context is not None and region.context is not context:
            raise RequestError(Status.NO_REGION, f"region {ident} is not of context {context.ident}")
        return region

    def check_login(self, login: int) -> None:
        """Raise RequestError(DENIED) for a login that cannot be carried to this TEE."""
        if login == Login.REE_KERNEL:
            raise RequestError(Status.DENIED, "a guest's client cannot be the host's kernel")
        if self._logins is not None and login not in self._logins:
            raise RequestError(Status.DENIED, f"login {login} cannot be carried to this TEE")

    def admit(self, request: ParsedRequest) -> None:
        """Raise RequestError where there may not be this request beside those in progress."""
        if request.tag in self.calls:
            raise RequestError(Status.DUPLICATE_TAG, f"tag {request.tag:#x} is in use")
        if request.type in CALLS and self.running >= self.limits.max_calls:
            raise RequestError(Status.LIMIT, f"{self.running} calls are in progress")

    def begin(self, pending: Pending, call: Call, begun: Begun | None = None, at: int = 0) -> None:
        """The request is in progress from here on, as ``call``, which is started (or goes on, if it was ``begun``)."""
        pending.call = call
        self.calls[pending.request.tag] = pending
        self.running += pending.request.type in CALLS
        for region in pending.regions:
            region.users += 1
        if self.trace is not None:
            self.trace.request(self.vm, pending.request.type, pending.request.tag, at or time.monotonic_ns())
        pending.at_tee = True
        if begun is not None:
            assert isinstance(call, Invoke)
            begun.becomes(call)
            return
        if self._sought and self._cancel_sought(pending):
            return
        self.tee.start(call)

    def open_context(self, slot: Slot, request: ParsedRequest) -> None:
        if request.body.flags:
            raise RequestError(Status.MALFORMED, "unknown flags")
        self.admit(request)
        context = ContextEntry()
        context.ident = add(self.contexts, context, "contexts")
        pending = Pending(self, slot, request, context, Epoch._context_opened)
        self.begin(pending, OpenContext(owner=pending, vm=self.vm))

    def _context_opened(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        if done.code != Result.SUCCESS:
            self.contexts.remove(pending.context.ident)
            return (ids(0),)
        pending.context.handle = done.value
        return (ids(pending.context.ident),)

    def close_context(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        self.admit(request)
        context.closing = True
        self.rpcs.hurry(context=context)
        pending = Pending(self, slot, request, context, Epoch._context_closed)
        self.begin(pending, CloseContext(owner=pending, context=context.handle))

    def _context_closed(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        self._forget_context(pending.context)
        return ()

    def _forget_context(self, context: ContextEntry) -> None:
        for session in self.sessions:
            if session.context is context:
                self.sessions.remove(session.ident)
        for region in self.regions:
            if region.context is context:
                self._forget_region(region)
        self.contexts.remove(context.ident)

    def open_session(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        body = request.body
        self.check_login(body.client_login)
        params, regions = self.params_of(request.params, request.data, request.inline_at, context)
        self.admit(request)
        session = SessionEntry(context)
        session.ident = add(self.sessions, session, "sessions")
        pending = Pending(self, slot, request, context, Epoch._session_opened, session=session, regions=regions)
        # PUBLIC is nobody in particular
        octets = bytes(16) if body.client_login == Login.PUBLIC else body.client_uuid
        client = Client(body.client_login, UUID(bytes=octets), self.vm)
        call = OpenSession(
            owner=pending, context=context.handle, uuid=UUID(bytes=body.uuid), client=client, params=params
        )
        self.begin(pending, call)

    def _session_opened(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        session = pending.session
        assert session is not None
        assert isinstance(pending.call, OpenSession)
        if done.code == Result.SUCCESS:
            session.handle = done.value
        elif session.ident in self.sessions:
            self.sessions.remove(session.ident)
        head = ids(session.ident if done.code == Result.SUCCESS else 0, len(pending.request.params))
        return (head, *outputs(pending.request.params, pending.call.params, done.code))

    def close_session(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        session = self.session_of(context, request.body.session)
        self.admit(request)
        session.closing = True
        self.rpcs.hurry(session=session)
        pending = Pending(self, slot, request, context, Epoch._session_closed, session=session)
        self.begin(pending, CloseSession(owner=pending, session=session.handle))

    def _session_closed(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        assert pending.session is not None
        if pending.session.ident in self.sessions:
            self.sessions.remove(pending.session.ident)
        return ()

    def invoke(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        body = request.body
        session = self.session_of(context, body.session)
        params, regions = self.params_of(request.params, request.data, request.inline_at, context)
        self.admit(request)
        pending = Pending(self, slot, request, context, Epoch._invoked, session=session, regions=regions)
        self.begin(pending, Invoke(owner=pending, session=session.handle, func=body.func, params=params))

    def invoke_at_once(self, data: bytes, room: int) -> bytes | Unfinished | None:
        """The response to a request from a request queue, an INVOKE that could be run at once, or what is still to be
        done of it by :meth:`submit`; None: nothing has happened, and that goes the long way, be it to refuse the
        request. This costs a fraction of it.
        """
        at_once = self._at_once
        if at_once is None or len(data) < _INVOKE_SIZE:
            return None
        kind, flags, epoch, tag, ident, zero, session_ident, func, count, zero_too = _unpack_invoke(data)
        session = self.sessions.get(session_ident)
        if (
            kind != _INVOKE
            or epoch != self.number
            or flags | zero | zero_too
            or not tag
            or tag in self.calls
            or session is None
            or session.handle is None
            or session.closing
            or (context := session.context).ident != ident
            or context.closing
            or self.running >= self._max_calls
            or self._sought
        ):
            return None
        at = time.monotonic_ns() if self.trace is not None else 0
        if not count:
            if len(data) != _INVOKE_SIZE or room < _BARE_RESPONSE:
                return None
            outcome = at_once(session.handle, func, ())
            if isinstance(outcome, tuple):
                if self.trace is not None:
                    self.trace.served(self.vm, _INVOKE, tag, at, outcome[0])
                return _bare_response(*outcome)
            return None if outcome is None else Unfinished(outcome, at, session, [], [])
        end = INVOKE_HEAD.size + count * PARAM_SIZE
        if count > self.limits.max_params or end > len(data):
            return None
        given = unpack_raw(data, INVOKE_HEAD.size, count)
        try:
            inline_in, inline_out = check_raw(given, inline=bool(self.features & Feature.INLINE))
            if (
                len(data) != end + inline_in
                or max(inline_in, inline_out) > self.limits.max_inline_bytes
                or room < _BARE_RESPONSE + count * PARAM_SIZE + inline_out
            ):
                return None
            params, regions = self.params_of(given, data, end, context)
        except RequestError:
            return None
        outcome = at_once(session.handle, func, params)
        if isinstance(outcome, tuple):
            code, origin = outcome
            if self.trace is not None:
                self.trace.served(self.vm, _INVOKE, tag, at, code)
            return b"".join((pack_response(Status.OK, code, origin), *_invoke_tail(given, params, code)))
        return None if outcome is None else Unfinished(outcome, at, session, params, regions)

    def _invoke_begun(self, slot: Slot, request: ParsedRequest, unfinished: Unfinished) -> None:
        """An INVOKE that :meth:`invoke_at_once` has begun waits now."""
        session = unfinished.session
        pending = Pending(
            self, slot, request, session.context, Epoch._invoked, session=session, regions=unfinished.regions
        )
        call = Invoke(owner=pending, session=session.handle, func=request.body.func, params=unfinished.params)
        self.begin(pending, call, unfinished.begun, unfinished.at)

    def _invoked(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        assert isinstance(pending.call, Invoke)
        return _invoke_tail(pending.request.params, pending.call.params, done.code)

    def register_memory(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        body = request.body
        if body.flags & ~int(RegionFlag.READ_ONLY):
            raise RequestError(Status.MALFORMED, "unknown flags")
        ranges = _merge(request.ranges)
        if sum(length for _, length in ranges) != body.size:
            raise RequestError(Status.MALFORMED, "the ranges' lengths do not add up to the size")
        if self.region_bytes + body.size > self.limits.max_region_bytes:
            raise RequestError(Status.LIMIT, f"more than {self.limits.max_region_bytes} bytes in regions")
        self.admit(request)
        try:
            views, lease = self.port.views(ranges)
        except MemoryFault as e:
            raise RequestError(Status.BAD_RANGE, str(e)) from None
        memory = Memory(views, ranges=[Range(*r) for r in ranges], read_only=bool(body.flags & RegionFlag.READ_ONLY))
        region = RegionEntry(context, memory, lease, version=self.port.memory_version)
        try:
            region.ident = add(self.regions, region, "regions")
        except RequestError:
            region.release()
            raise
        self._register(slot, request, region)

    def register_ffa(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        body = request.body
        if body.flags & ~int(RegionFlag.READ_ONLY):
            raise RequestError(Status.MALFORMED, "unknown flags")
        if not body.size:
            raise RequestError(Status.BAD_RANGE, "a region without bytes")
        self.admit(request)
        assert self.ffa_vm is not None, "otherwise the feature is not offered"
        share = FfaShare(body.handle, body.tag, self.ffa_vm)
        memory = Memory(size=body.size, read_only=bool(body.flags & RegionFlag.READ_ONLY), ffa=share)
        region = RegionEntry(context, memory, None)
        region.ident = add(self.regions, region, "regions")
        self._register(slot, request, region)

    def _register(self, slot: Slot, request: ParsedRequest, region: RegionEntry) -> None:
        self.region_bytes += region.bytes
        self.by_memory[id(region.memory)] = region
        pending = Pending(self, slot, request, region.context, Epoch._registered, regions=[region])
        self.begin(pending, RegisterMemory(owner=pending, context=region.context.handle, memory=region.memory))

    def _registered(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        region = pending.regions[0]
        if done.code != Result.SUCCESS:
            if region.memory.ffa is not None:
                pending.status = _HANDLE_REFUSED.get(done.code, Status.OK)
            self._forget_region(region)
            return (ids(0),)
        region.ready = True
        return (ids(region.ident),)

    def unregister_memory(self, slot: Slot, request: ParsedRequest) -> None:
        context = self.context_of(request)
        region = self.region(request.body.region, context)
        self.admit(request)
        pending = Pending(self, slot, request, context, Epoch._unregistered)
        pending.call = UnregisterMemory(owner=pending, context=context.handle, memory=region.memory)
        self.calls[request.tag] = pending
        region.unregister = pending
        if self.trace is not None:
            self.trace.request(self.vm, request.type, request.tag, time.monotonic_ns())
        self._unregister_if_unused(region)

    def _unregister_if_unused(self, region: RegionEntry) -> None:
        pending = region.unregister
        if pending is None or region.users or pending.regions:
            return
        if region.context.closing:
            self._give_up_unregister(region)
            return
        pending.regions.append(region)
        assert pending.call is not None
        region.users += 1
        pending.at_tee = True
        self.tee.start(pending.call)

    def _give_up_unregister(self, region: RegionEntry) -> None:
        """The context closes: what waits to unregister its memory has nothing left to do."""
        pending = region.unregister
        if pending is not None and not pending.regions:
            region.unregister = None
            assert pending.call is not None
            self._return(pending, Done(pending.call, Result.CANCEL, Origin.COMMS), ())

    def _unregistered(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        (region,) = pending.regions
        region.unregister = None
        self._forget_region(region)
        return ()

    def cancel(self, slot: Slot, request: ParsedRequest) -> bytes | None:
        context = self.context_of(request)
        self.admit(request)
        target = self.calls.get(request.body.tag)
        if target is None:
            # the request to cancel may lie in a ring that has not been looked at since
            pending = Pending(self, slot, request, context, Epoch._nothing)
            self.calls[request.tag] = pending
            if self._sought:
                self._sought_late.setdefault(request.body.tag, []).append(pending)
            else:
                self._sought[request.body.tag] = [pending]
                self.port.look_for_requests()
            return None
        if target.context is not context or target.request.type == Request.CANCEL:
            raise RequestError(Status.NOT_FOUND, f"no request with tag {request.body.tag:#x} in this context")
        self._step(target, CallEvent.CANCEL)
        return self._answered(request)

    def _nothing(self, pending: Pending, done: Done) -> tuple[bytes, ...]:
        return ()

    def _cancel_sought(self, target: Pending) -> bool:
        """``target`` comes from a ring, and CANCELs look for it perhaps; whether it has ended, without having run."""
        tag, found = target.request.tag, False
        for sought in (self._sought, self._sought_late):
            for pending in sought.get(tag, ()):
                ours = pending.context is target.context
                found |= ours
                self._end_cancel(pending, Status.OK if ours else Status.NOT_FOUND)
            if tag in sought:
                sought[tag] = []
        if not found or target.request.type not in CALLS:
            return False
        assert target.call is not None
        self.done(target, Done(target.call, Result.CANCEL, Origin.COMMS))
        return True

    def searched(self) -> None:
        """All rings were looked at: what CANCELs have looked for is not there."""
        over, self._sought, self._sought_late = self._sought, self._sought_late, {}
        for pendings in over.values():
            for pending in pendings:
                self._end_cancel(pending, Status.NOT_FOUND)
        if self._sought:
            self.port.look_for_requests()

    def _end_cancel(self, pending: Pending, status: Status) -> None:
        if self.trace is not None:
            self.trace.answered(self.vm, Request.CANCEL, status)
        pending.response = (pack_response() if status is Status.OK else refusal(status),)
        self._respond(pending)

    def _answered(self, request: ParsedRequest) -> bytes:
        """The response to a request that never became a call of the TEE and is carried out."""
        if self.trace is not None:
            self.trace.answered(self.vm, request.type, Status.OK)
        return pack_response()

    def rpc_reply(self, slot: Slot, request: ParsedRequest) -> bytes:
        self.admit(request)
        self.rpcs.reply(request)
        return self._answered(request)

    def rpc_withdrawn_ack(self, slot: Slot, request: ParsedRequest) -> bytes:
        self.admit(request)
        self.rpcs.acknowledge(request)
        return self._answered(request)

    # -- parameters

    def params_of(
        self, given: list[RawParam], data: bytes, at: int, context: ContextEntry
    ) -> tuple[list[Param], list[RegionEntry]]:
        """The parameters as the TEE takes them, with inline memory from ``data[at:]``, and the regions that they use.

        Raises RequestError.
        """
        params: list[Param] = []
        regions: list[RegionEntry] = []
        for attr, a, b, c in given:
            meta = bool(attr & PARAM_META)
            kind = attr & PARAM_TYPE_MASK
            if kind in VALUE_TYPES:
                direction = VALUE_TYPES[kind]
                params.append(
                    Value(direction, a, b, c, meta) if direction is not _OUT else Value(direction, 0, 0, 0, meta)
                )
            elif kind in MEMREF_TYPES:
                direction = MEMREF_TYPES[kind]
                if attr & PARAM_INLINE:
                    params.append(MemRef(direction, _inline(direction, data, at, b), 0, b, meta))
                    if direction.is_input:
                        at += padded(b)
                elif c == NULL_REGION:
                    if not self.tee.info.gen_caps & GenCap.MEMREF_NULL:
                        raise RequestError(Status.NO_REGION, "this TEE knows no NULL references")
                    params.append(MemRef(direction, None, 0, b, meta))
                else:
                    region = self.region(c, context)
                    if a + b > region.memory.size:
                        raise RequestError(Status.BAD_RANGE, f"{b} bytes at {a} are outside region {c}")
                    if region.memory.read_only and direction.is_output:
                        raise RequestError(Status.BAD_RANGE, f"region {c} is read-only")
                    self._check_place(region)
                    regions.append(region)
                    params.append(MemRef(direction, region.memory, a, b, meta))
            else:
                params.append(Nothing(meta))
        return params, regions

    def _check_place(self, region: RegionEntry) -> None:
        """Raise RequestError(BAD_RANGE) if the guest's memory is no longer where the region says."""
        if region.lease is not None and region.version != self.port.memory_version:
            try:
                self.port.views([(r.address, r.length) for r in region.memory.ranges])[1].release()
            except MemoryFault as e:
                raise RequestError(Status.BAD_RANGE, str(e)) from None
            region.version = self.port.memory_version

    # -- what the TEE says

    def done(self, pending: Pending, done: Done) -> None:
        """A call of this epoch has ended."""
        if isinstance(pending.call, CloseContext) and self._in_use(pending.context):
            pending.context.then = lambda: self.done(pending, done)
            return
        if pending.regions:
            self._log_writes(pending.call)
        self._return(pending, done, pending.finish(self, pending, done))
        # only now: what waits for this memory comes after this request
        used, pending.regions, pending.held = [*pending.regions, *pending.held], [], []
        for region in used:
            self.unuse(region)
        self._drained()

    def _log_writes(self, call: Call | None) -> None:
        """The TEE has written to regions: a live migration shall copy them, if there is one."""
        if isinstance(call, Invoke | OpenSession):
            for param in call.params:
                if type(param) is MemRef and param.direction is not _IN:
                    region = self.by_memory.get(id(param.memory))
                    if region is not None and region.lease is not None:
                        region.lease.mark_dirty()

    def _return(self, pending: Pending, done: Done, rest: tuple[bytes, ...]) -> None:
        """Write the response to a request that has ended, or keep it while the ring is stopped."""
        if pending.state is CallState.ABANDONED:
            self._forget(pending, CallEvent.DONE)
            if isinstance(done.call, OpenContext) and done.code == Result.SUCCESS:
                self._close_for_good(pending.context)
            return
        if isinstance(done.value, Refusal):
            pending.status = services.STATUSES[done.value]
        status = Status.ABANDONED if done.may_have_run else pending.status
        if self.trace is not None:
            self.trace.response(self.vm, pending.request.type, pending.request.tag, status, done.code)
        if done.may_have_run:
            # the TEE was lost under the call
            pending.response = (refusal(status, ResponseFlag.MAY_HAVE_RUN),)
        elif status is not Status.OK:
            pending.response = (refusal(status),)
        else:
            pending.response = (pack_response(status, done.code, done.origin), *rest)
        self._respond(pending)

    def _respond(self, pending: Pending) -> None:
        assert pending.slot is not None
        if pending.slot.respond(*pending.response):
            self._forget(pending, CallEvent.DONE)
        else:
            self._step(pending, CallEvent.DONE_STOPPED)
            self.held.append(pending)

    def _forget(self, pending: Pending, event: CallEvent) -> None:
        """The request is no longer in progress: its tag is free."""
        self._step(pending, event)
        del self.calls[pending.request.tag]
        self.running -= pending.request.type in CALLS
        # The call refers to it, too: undone here, else the guest's memory would stay until a garbage collection.
        pending.slot = pending.call = None

    def resume(self) -> None:
        """The rings run again after a pause: give out what was kept."""
        held, self.held = self.held, []
        for pending in held:
            assert pending.slot is not None
            if pending.slot.respond(*pending.response):
                self._forget(pending, CallEvent.RESUME)
            else:
                self.held.append(pending)
        self.rpcs.pump()

    def _step(self, pending: Pending, event: CallEvent) -> None:
        pending.state, action = CALL.step(pending.state, event)
        if action is CallAction.CANCEL and pending.call is not None and pending.request.type in CALLS:
            self.tee.cancel(pending.call)

    def unuse(self, region: RegionEntry) -> None:
        """One user less of a region."""
        region.users -= 1
        if region.users:
            return
        self._unregister_if_unused(region)
        then = region.context.then
        if then is not None and not self._in_use(region.context):
            region.context.then = None
            then()

    def _in_use(self, context: ContextEntry) -> bool:
        """Whether an RPC of another context still uses memory of this one (its supplicant has gone meanwhile)."""
        return not self._failed and any(region.users and region.context is context for region in self.regions)

    def _forget_region(self, region: RegionEntry) -> None:
        if region.ident in self.regions:
            self.regions.remove(region.ident)
            self.region_bytes -= region.bytes
            del self.by_memory[id(region.memory)]
            region.release()

    # -- the end

    def end(self) -> None:
        """The guest was reset or has gone: end everything. ``on_drained`` is called when the TEE has let go of all."""
        self.ended = True
        self.rpcs.reset()
        if self._failed:
            self._end_failed()
            return
        sought = [p for some in (self._sought, self._sought_late) for pendings in some.values() for p in pendings]
        for pending in (*self.held, *sought):
            self._forget(pending, CallEvent.RESET)
        for gone in (self.held, self._sought, self._sought_late):
            gone.clear()
        for pending in self.calls.values():
            pending.slot = None
            self._step(pending, CallEvent.RESET)
            if self.trace is not None:
                self.trace.response(
                    self.vm, pending.request.type, pending.request.tag, Status.ABANDONED, Result.COMMUNICATION
                )
        for region in self.regions:
            self._give_up_unregister(region)
        for context in self.contexts:
            if context.handle is not None and not context.closing:
                self._close_for_good(context)
        self._drained()

    def _close_for_good(self, context: ContextEntry) -> None:
        context.closing = True
        self._closing.add(context)
        self.tee.start(CloseContext(owner=_Closer(self, context), context=context.handle))

    def closed(self, context: ContextEntry) -> None:
        """A context that the device closed on its own behalf is closed."""
        if self._in_use(context):
            context.then = lambda: self.closed(context)
            return
        self._closing.discard(context)
        self._forget_context(context)
        self._drained()

    def _drained(self) -> None:
        if self.ended and not self._over and not self.calls and not self._closing:
            self._over = True
            if isinstance(self.tee, OffersServices):
                self.tee.forget_machine(self.vm)
            for region in self.regions:  # there is none, unless we have failed
                self._forget_region(region)
            self._on_drained(self)

    # -- errors of our own

    def give_up(self, done: Done | None = None) -> None:
        """We have failed, in what ``done`` had told or in ending the epoch. The guest is lost, but it must be possible
        to serve the next one: nothing may wait for what never comes."""
        self._failed = True
        pending = done.call.owner if done is not None else None
        if isinstance(pending, Pending):
            assert done is not None
            if isinstance(done.call, OpenContext) and done.code == Result.SUCCESS:
                pending.context.handle = done.value
        elif isinstance(pending, _Closer):
            self._closing.discard(pending.context)
        if self.ended:
            self._end_failed()

    def _end_failed(self) -> None:
        """What :meth:`end` does, by what the TEE has and not by the state of the tables."""
        self.calls = {tag: pending for tag, pending in self.calls.items() if pending.at_tee}
        for pending in self.calls.values():
            pending.slot = None
            pending.state = CallState.ABANDONED
        for context in self.contexts:
            if context.then is not None:  # it is closed, but for the tables
                self._closing.discard(context)
            elif context.handle is not None and not context.closing:
                self._close_for_good(context)
            context.then = None
        self._drained()


class _Closer:
    """Owner of a CloseContext that no request asked for."""

    __slots__ = ("context", "epoch")

    def __init__(self, epoch: Epoch, context: ContextEntry) -> None:
        self.epoch = epoch
        self.context = context


def deliver(done: Done) -> None:
    """Give a Done to the epoch whose call it ends."""
    owner = done.call.owner
    if isinstance(owner, Pending):
        owner.at_tee = False
        owner.epoch.done(owner, done)
    elif isinstance(owner, _Closer):
        owner.epoch.closed(owner.context)


HANDLERS: dict[int, Callable[[Epoch, Slot, ParsedRequest], bytes | None]] = {
    Request.OPEN_CONTEXT: Epoch.open_context,
    Request.CLOSE_CONTEXT: Epoch.close_context,
    Request.OPEN_SESSION: Epoch.open_session,
    Request.CLOSE_SESSION: Epoch.close_session,
    Request.INVOKE: Epoch.invoke,
    Request.REGISTER_MEMORY: Epoch.register_memory,
    Request.REGISTER_FFA: Epoch.register_ffa,
    Request.UNREGISTER_MEMORY: Epoch.unregister_memory,
    Request.CANCEL: Epoch.cancel,
    Request.RPC_REPLY: Epoch.rpc_reply,
    Request.RPC_WITHDRAWN_ACK: Epoch.rpc_withdrawn_ack,
    **services.HANDLERS,
}
"""Request type → what serves it, and returns the response if there is one by then. Types that are not here belong to
features that this backend does not offer."""

IMPLEMENTED_FEATURES = (
    Feature.INLINE | Feature.RPC | Feature.OCALL | Feature.NOTIFICATION | Feature.FFA_HANDLE
) | services.FEATURES
"""FFA_HANDLE is offered to guests whose FF-A endpoint the operator has named, by a TEE that knows it."""

_HANDLE_REFUSED: dict[int, Status] = {
    Result.ITEM_NOT_FOUND: Status.NOT_FOUND,
    Result.BUSY: Status.IN_USE,
    Result.BAD_PARAMETERS: Status.BAD_RANGE,
    Result.ACCESS_DENIED: Status.DENIED,
}
"""What the TEE says of a handle → the status that it means."""


def features_of(tee: TeeDriver) -> Feature:
    """What a device before this TEE offers."""
    return IMPLEMENTED_FEATURES if isinstance(tee, OffersServices) else IMPLEMENTED_FEATURES & ~services.FEATURES


_NO_PARAMS = ids(0)

INVOKE_HEAD = struct.Struct(
    (REQUEST_HEADER.raw.format + REQUESTS[Request.INVOKE].body.codec.raw.format[1:]).replace("4s", "I")
)
"""An INVOKE up to its parameters; its reserved words too, as numbers."""
_INVOKE_SIZE, _unpack_invoke = INVOKE_HEAD.size, INVOKE_HEAD.unpack_from
_BARE_RESPONSE = RESPONSE_HEADER_SIZE + len(_NO_PARAMS)


@dataclass(slots=True)
class Unfinished:
    """An INVOKE that was begun at once and waits: what :meth:`Epoch.invoke_at_once` has found out about it."""

    begun: Begun
    at: int
    """When, in nanoseconds, if anybody wants to know."""
    session: SessionEntry
    params: list[Param]
    regions: list[RegionEntry]


@lru_cache(maxsize=256)
def _bare_response(code: int, origin: int) -> bytes:
    return pack_response(Status.OK, code, origin) + _NO_PARAMS


def _invoke_tail(given: list[RawParam], params: list[Param], code: int) -> tuple[bytes, ...]:
    """An INVOKE's response after its header."""
    return (ids(len(given)), *outputs(given, params, code)) if given else (_NO_PARAMS,)


def _inline(direction: Direction, data: bytes, at: int, size: int) -> Memory:
    if direction is Direction.IN:
        return Memory((memoryview(data)[at : at + size],), read_only=True)
    return Memory.of(bytearray(data[at : at + size]) if direction is Direction.INOUT else bytearray(size))


def _merge(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Check (address, length) ranges and join those that follow each other."""
    merged: list[tuple[int, int]] = []
    end = -1
    for address, length in ranges:
        if not length or address + length > _MAX_ADDRESS:
            raise RequestError(Status.BAD_RANGE, f"a range of {length} bytes at {address:#x}")
        if address == end:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((address, length))
        end = address + length
    if not merged:
        raise RequestError(Status.MALFORMED, "a region without ranges")
    return merged
