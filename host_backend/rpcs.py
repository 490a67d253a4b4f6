"""RPCs of one epoch: from the TEE to the guest's supplicant or client, and the answers back.

Memory for an RPC is the guest's: it answers SHM_ALLOC with one of its regions, which counts as used until the TEE gives
it back (SHM_FREE) or the call that asked for it ends.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from device.ids import IdTable
from device.machines import RPC, RpcAction, RpcEvent, RpcState
from device.messages import EVENT_HEADER, EVENTS
from device.params import MEMREF_TYPES, VALUE_TYPES, RawParam, RequestError, attribute, pack_raw
from device.requests import ParsedRequest
from device.wire import (
    NULL_REGION,
    PARAM_TYPE_MASK,
    RPC_SERVERS,
    Event,
    Feature,
    ParamType,
    Request,
    RpcServer,
    RpcTarget,
    Status,
)
from host_backend.tables import ContextEntry, Pending, RegionEntry, SessionEntry
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply, describe_command

if TYPE_CHECKING:
    from host_backend.epoch import Epoch

log = logging.getLogger(__name__)

_UNKNOWN_COMMAND = (RpcServer.NOBODY, Result.NOT_SUPPORTED)
_WITH_PARAMS = frozenset({Result.SUCCESS, Result.SHORT_BUFFER})
"""Result codes of answers that have parameters; others may leave them out."""

MAX_PAUSE = 300.0
"""Seconds, for each RPC, in which its deadline does not run because rings are stopped: a call that waits for an RPC
holds a thread of the TEE, which other guests share."""

_OF_EITHER = frozenset({RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE})
_CALLING = frozenset({Request.OPEN_SESSION, Request.INVOKE, Request.SERVICE_TASK})
"""Requests during which a TA may call its client."""

_RPC_EVENT = EVENTS[Event.RPC].codec
_RPC_WITHDRAWN = EVENTS[Event.RPC_WITHDRAWN].codec
_NOTIFICATION = EVENTS[Event.NOTIFICATION].codec


@dataclass(slots=True, eq=False)
class RpcEntry:
    """An RPC for the guest. ``ident`` is 0 while it waits for one of the guest's ``max_rpcs`` places."""

    rpc: Rpc
    pending: Pending
    deadline: float
    """On the clock of :class:`GuestRpcs`, which pauses."""
    latest: float
    """On the clock that does not."""
    raw: list[RawParam] = field(default_factory=list)
    regions: list[RegionEntry] = field(default_factory=list)
    """Those that it names."""
    ident: int = 0
    state: RpcState = RpcState.QUEUED


class GuestRpcs:
    """All RPCs of one epoch, and the notifications that share the event queue with them."""

    def __init__(self, epoch: Epoch, clock: Callable[[], float]) -> None:
        self._epoch = epoch
        self._clock = clock
        self._table: IdTable[RpcEntry] = IdTable(epoch.limits.max_rpcs)
        self._backlog: dict[RpcEntry, None] = {}
        """No place in the table yet; in order."""
        self._outbox: dict[RpcEntry, None] = {}
        """Each waits for an event buffer: QUEUED for its RPC event, WITHDRAWING for its RPC_WITHDRAWN event."""
        self._entries: dict[Rpc, RpcEntry] = {}
        """By the TEE's own object, as long as the TEE waits."""
        self._notifications: dict[int, None] = {}
        """Values to be told, each once, in the order in which they were raised first."""
        self._notification_next = False
        """An RPC or withdrawal was sent since the last notification."""
        self._paused_at: float | None = None
        self._missed = 0.0
        """Seconds that do not count."""

    def __len__(self) -> int:
        return len(self._table) + len(self._backlog)

    # -- from the TEE

    def send(self, rpc: Rpc, pending: Pending) -> None:
        """The TEE asks something of this guest."""
        epoch = self._epoch
        code = RPC_SERVERS.get(rpc.command, _UNKNOWN_COMMAND)[1]
        if not epoch.features & Feature.RPC:
            self._refuse(rpc, "the driver has not negotiated RPC", code)
            return
        if len(rpc.params) > epoch.limits.max_params:
            self._refuse(rpc, "more parameters than the driver takes", code)
            return
        why = self._unfit(rpc, pending)
        if why:
            self._refuse(rpc, why, Result.NOT_SUPPORTED)
            return
        patience = 0.0 if _closes(pending) else epoch.limits.rpc_deadline_ms / 1000
        now = self._now()
        entry = RpcEntry(rpc, pending, now + patience, now + self._missed + patience + MAX_PAUSE)
        try:
            entry.regions = [
                epoch.by_memory[id(param.memory)]
                for param in rpc.params
                if isinstance(param, MemRef) and param.memory is not None
            ]
        except LookupError:
            log.warning(
                "vm %s: %s refers to memory that is not the guest's, and is refused; the TA should ask for the memory "
                "of its RPCs (SHM_ALLOC): tell its author",
                *(epoch.vm, describe_command(rpc.command)),
            )
            self._refuse(rpc, "memory that is not the guest's", Result.NOT_SUPPORTED)
            return
        entry.raw = [self._raw(param) for param in rpc.params]
        self._entries[rpc] = entry
        if epoch.trace is not None:
            epoch.trace.rpc(epoch.vm, rpc, rpc.command, "guest")
        self._backlog[entry] = None
        if rpc.command == RpcCommand.SHM_FREE:
            self._give_back(entry)
        else:
            for region in entry.regions:
                region.users += 1
        self.pump()

    def _unfit(self, rpc: Rpc, pending: Pending) -> str:
        """Why it cannot be one of the guest's; empty: it can."""
        if any(param.meta for param in rpc.params[rpc.command == RpcCommand.OCALL :]):
            return "a META parameter, which only an OCALL has"
        if rpc.to_client is not (rpc.command == RpcCommand.OCALL) and rpc.command not in _OF_EITHER:
            return "of the supplicant and for the client, or the other way round"
        if not rpc.to_client:
            return ""
        if not self._epoch.features & Feature.OCALL:
            return "the driver has not negotiated OCALL"
        if pending.request.type not in _CALLING:
            return "a call to the client of a request that has no parameters for it"
        if rpc.command == RpcCommand.OCALL and not (
            rpc.params and isinstance(rpc.params[0], Value) and rpc.params[0].meta
        ):
            return "an OCALL without its function"
        given = {*map(id, pending.regions), *map(id, pending.held)}
        for param in rpc.params:
            region = self._epoch.by_memory.get(id(param.memory)) if isinstance(param, MemRef) and param.memory else None
            if region is not None and id(region) not in given:
                return "memory that the call was not given"
        return ""

    def hurry(self, *, context: ContextEntry | None = None, session: SessionEntry | None = None) -> None:
        """The context or the session closes: what its calls wait for in the guest is not waited for any longer."""
        for entry in self._entries.values():
            if entry.pending.context is context or (session is not None and entry.pending.session is session):
                entry.deadline = self._now()

    def notify(self, value: int) -> None:
        """The TEE tells this guest ``value``: once, however often it does so before the guest could be told."""
        if self._epoch.features & Feature.NOTIFICATION:
            self._notifications[value] = None
            self.pump()

    def withdraw(self, rpc: Rpc) -> None:
        """The TEE no longer waits for it."""
        entry = self._entries.pop(rpc, None)
        if entry is not None:
            self._record(rpc, "nobody: withdrawn", Result.CANCEL)
            self._step(entry, RpcEvent.WITHDRAW)
            self._let_go(entry)

    # -- to the guest

    def pump(self) -> None:
        """Send what can be sent: there may be new event buffers, or free places."""
        while self._backlog and len(self._table) < self._table.limit:
            entry = next(iter(self._backlog))
            del self._backlog[entry]
            entry.ident = self._table.add(entry)
            self._outbox[entry] = None
        while self._outbox or self._notifications:
            if self._notifications and (self._notification_next or not self._outbox):
                if not self._tell_notification():
                    return
                continue
            entry = next(iter(self._outbox))
            if entry.state is RpcState.QUEUED and entry.rpc.command == RpcCommand.SHM_FREE and not self._wanted(entry):
                self._answer(entry, RpcReply(), "nobody: the guest has ended the registration")
                self._step(entry, RpcEvent.WITHDRAW)
                continue
            if not self._epoch.port.send_event(self._event(entry)):
                return
            del self._outbox[entry]
            self._notification_next = True
            self._step(entry, RpcEvent.BUFFER)

    def _tell_notification(self) -> bool:
        value = next(iter(self._notifications))
        event = EVENT_HEADER.pack(Event.NOTIFICATION, 0, self._epoch.number) + _NOTIFICATION.pack(value=value)
        if not self._epoch.port.send_event(event):
            return False
        del self._notifications[value]
        self._notification_next = False
        if self._epoch.trace is not None:
            self._epoch.trace.mark(self._epoch.vm, "notification", value=value)
        return True

    def _wanted(self, entry: RpcEntry) -> bool:
        """Whether the guest still has the regions that a SHM_FREE names: it may have ended them before."""
        return all(
            region.ident in self._epoch.regions and region.unregister is None and not region.context.closing
            for region in entry.regions
        )

    def _event(self, entry: RpcEntry) -> bytes:
        if entry.state is RpcState.WITHDRAWING:
            header = EVENT_HEADER.pack(Event.RPC_WITHDRAWN, 0, self._epoch.number)
            return header + _RPC_WITHDRAWN.pack(entry.ident)
        pending, session = entry.pending, entry.pending.session
        body = _RPC_EVENT.pack(
            rpc=entry.ident,
            command=entry.rpc.command,
            target=RpcTarget.CLIENT if entry.rpc.to_client else RpcTarget.SUPPLICANT,
            deadline_ms=max(1, int((entry.deadline - self._now()) * 1000)),
            call=pending.request.tag,
            context=pending.context.ident,
            session=session.ident if session is not None and session.handle is not None else 0,  # 0 while it opens
            num_params=len(entry.raw),
        )
        return EVENT_HEADER.pack(Event.RPC, 0, self._epoch.number) + body + pack_raw(entry.raw)

    def _raw(self, param: Param) -> RawParam:
        if isinstance(param, Value):
            return (attribute(param), param.a, param.b, param.c)
        if isinstance(param, MemRef):
            region = NULL_REGION if param.memory is None else self._epoch.by_memory[id(param.memory)].ident
            return (attribute(param), param.offset, param.size, region)
        return (attribute(param), 0, 0, 0)

    # -- from the guest

    def reply(self, request: ParsedRequest) -> None:
        """The driver answers. Raises RequestError; an answer that makes no sense has ended the RPC nevertheless."""
        body = request.body
        entry = self._find(body.rpc)
        state, action = RPC.step(entry.state, RpcEvent.REPLY)
        if action is RpcAction.REFUSE:
            raise RequestError(Status.NOT_FOUND, f"RPC {body.rpc} is {entry.state.value}")
        answered_by = "guest"
        try:
            reply = RpcReply(body.ret, self._reply_params(entry, request.params, body.ret), body.origin)
        except RequestError as e:
            reply, answered_by = RpcReply(Result.COMMUNICATION), f"nobody: the guest's answer is refused: {e.why}"
            raise
        finally:
            entry.state = state
            self._free(entry)
            self._answer(entry, reply, answered_by)
            self.pump()

    def acknowledge(self, request: ParsedRequest) -> None:
        """The driver knows that an RPC was withdrawn. Raises RequestError(NOT_FOUND)."""
        entry = self._find(request.body.rpc)
        if self._step(entry, RpcEvent.ACK) is RpcAction.REFUSE:
            raise RequestError(Status.NOT_FOUND, f"RPC {request.body.rpc} is {entry.state.value}")

    def _find(self, ident: int) -> RpcEntry:
        entry = self._table.get(ident)
        if entry is None:
            raise RequestError(Status.NOT_FOUND, f"no RPC {ident}")
        return entry

    def _reply_params(self, entry: RpcEntry, raw: list[RawParam], code: int) -> list[Param]:
        """The answer's parameters, held against the question's."""
        if entry.rpc.command == RpcCommand.SHM_ALLOC:
            return self._given_memory(entry, raw) if code == Result.SUCCESS else []
        if entry.rpc.command == RpcCommand.SHM_FREE:
            if raw and code in _WITH_PARAMS:
                raise RequestError(Status.MALFORMED, "the answer to SHM_FREE has no parameters")
            return []
        if not raw and code not in _WITH_PARAMS:
            return list(entry.rpc.params)
        if len(raw) != len(entry.raw):
            raise RequestError(Status.MALFORMED, f"an answer with {len(raw)} parameters to {len(entry.raw)}")
        params: list[Param] = []
        for asked, given, param in zip(entry.raw, raw, entry.rpc.params, strict=True):
            kind = asked[0] & PARAM_TYPE_MASK
            if given[0] != asked[0]:
                raise RequestError(Status.MALFORMED, "an answer changes a parameter's attribute")
            if isinstance(param, Value) and kind in VALUE_TYPES and param.direction.is_output:
                params.append(Value(param.direction, *given[1:], meta=param.meta))
            elif isinstance(param, MemRef) and kind in MEMREF_TYPES and param.direction.is_output:
                if given[2] > param.size and param.memory is not None and code != Result.SHORT_BUFFER:
                    raise RequestError(Status.BAD_RANGE, f"{given[2]} bytes in answer to {param.size}")
                params.append(MemRef(param.direction, param.memory, param.offset, given[2], param.meta))
            else:
                params.append(param)
        return params

    def _given_memory(self, entry: RpcEntry, raw: list[RawParam]) -> list[Param]:
        """SHM_ALLOC's answer: a region of the guest's, at least as large as asked; it is in use from here on."""
        if len(raw) != 1 or raw[0][0] != ParamType.MEMREF_INOUT:
            raise RequestError(Status.MALFORMED, "SHM_ALLOC is answered with one INOUT memory reference")
        _, offset, size, ident = raw[0]
        region = self._epoch.region(ident)
        asked = entry.rpc.params[0]
        wanted = asked.b if isinstance(asked, Value) else 0
        if offset + size > region.memory.size or size < wanted:
            raise RequestError(Status.BAD_RANGE, f"{size} bytes at {offset} of region {ident} for {wanted}")
        if region.memory.read_only:
            raise RequestError(Status.BAD_RANGE, f"region {ident} is read-only")
        region.users += 1
        entry.pending.held.append(region)
        param = MemRef(Direction.INOUT, region.memory, offset, size)
        return [param]

    def _give_back(self, entry: RpcEntry) -> None:
        """SHM_FREE: the TEE uses that memory no more."""
        for region in entry.regions:
            if region in entry.pending.held:
                entry.pending.held.remove(region)
                self._epoch.unuse(region)

    # -- time and the end

    def _now(self) -> float:
        return (self._clock() if self._paused_at is None else self._paused_at) - self._missed

    def pause(self) -> None:
        """No RPC can be answered from now on: time does not count, up to MAX_PAUSE for each."""
        if self._paused_at is None:
            self._paused_at = self._clock()

    def resume(self) -> None:
        """They can be answered again."""
        if self._paused_at is not None:
            self._missed += self._clock() - self._paused_at
            self._paused_at = None

    def expire(self) -> float | None:
        """Give up RPCs whose deadline has passed; the seconds to the next one's, None without any."""
        entries = self._entries.values()
        if not entries:
            return None
        now, clock = self._now(), self._clock()
        late = [e for e in entries if e.deadline <= now or e.latest <= clock]
        if not late:
            latest = min(e.latest for e in entries) - clock
            return latest if self._paused_at is not None else min(latest, min(e.deadline for e in entries) - now)
        for entry in late:
            log.warning(
                "vm %s: %s was not answered in time, and its call fails; look whether the guest's supplicant runs, or "
                "raise --rpc-deadline-ms",
                *(self._epoch.vm, _name(entry)),
            )
            self._step(entry, RpcEvent.DEADLINE)
        return 0.0

    def reset(self) -> None:
        """The epoch ends: the TEE gets an error for all that is outstanding."""
        entries = [*self._backlog, *self._table]
        self._backlog.clear()
        self._outbox.clear()
        self._notifications.clear()
        for entry in entries:
            self._step(entry, RpcEvent.RESET)

    def _step(self, entry: RpcEntry, event: RpcEvent) -> RpcAction:
        entry.state, action = RPC.step(entry.state, event)
        if entry.state is RpcState.ENDED:
            self._free(entry)
        if action in (RpcAction.QUEUE_WITHDRAWN, RpcAction.FAIL_AND_QUEUE_WITHDRAWN):
            self._outbox[entry] = None
        if action in (RpcAction.FAIL, RpcAction.FAIL_AND_QUEUE_WITHDRAWN):
            self._answer(entry, RpcReply(Result.COMMUNICATION), f"nobody: {event.value}")
        if action in (RpcAction.FREE, RpcAction.QUEUE_WITHDRAWN, RpcAction.FAIL_AND_QUEUE_WITHDRAWN):
            self.pump()
        return action

    def _free(self, entry: RpcEntry) -> None:
        if entry.ident:
            self._table.remove(entry.ident)
            entry.ident = 0
        self._backlog.pop(entry, None)
        self._outbox.pop(entry, None)

    def _answer(self, entry: RpcEntry, reply: RpcReply, answered_by: str) -> None:
        if self._entries.pop(entry.rpc, None) is not None:
            self._record(entry.rpc, answered_by, reply.code)
            self._epoch.tee.answer(entry.rpc, reply)
            self._let_go(entry)

    def _let_go(self, entry: RpcEntry) -> None:
        """The TEE does not wait for it any more: it no longer uses the memory that it names."""
        if entry.rpc.command != RpcCommand.SHM_FREE:
            for region in entry.regions:
                self._epoch.unuse(region)

    def _refuse(self, rpc: Rpc, why: str, code: int) -> None:
        if self._epoch.trace is not None:
            self._epoch.trace.rpc_refused(self._epoch.vm, rpc, rpc.command, why, code)
        self._epoch.tee.answer(rpc, RpcReply(code))

    def _record(self, rpc: Rpc, answered_by: str, code: int) -> None:
        if self._epoch.trace is not None:
            self._epoch.trace.rpc_ended(self._epoch.vm, rpc, rpc.command, answered_by, code)


def _closes(pending: Pending) -> bool:
    """Whether the call's context or session is being closed. Only a TA that closes may still ask something."""
    if pending.context.closing:
        return True
    return pending.session is not None and pending.session.closing and pending.request.type != Request.CLOSE_SESSION


def _name(entry: RpcEntry) -> str:
    return f"RPC {describe_command(entry.rpc.command)}"
