"""OP-TEE's driver in a VM, over FF-A: a :class:`~tee.driver.TeeDriver`.

Sans-I/O but for the calls that the endpoint makes, which the VM's hypervisor answers. The partition is not trusted:
what it answers is checked before it is used, and one that breaks the rules ends the calls that it is about with
COMMUNICATION.

There are no interrupts in this model: what the partition notifies is found when :meth:`FfaTeeDriver.run` runs, and a
call that came back with INTERRUPT is resumed a little later.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, Frame, halves, pair
from ffa.abi.ids import ATTRIBUTES_NORMAL, GET_FROM_SP, PAGE_SIZE, Data, Error, FfaError, fid, permissions
from ffa.abi.ids import Call as Ffa
from ffa.abi.messages import parse_infos, uuid_to_words
from ffa.optee.msg import (
    API_VERSION,
    CANCEL_RESUME,
    CLIENT_COMMANDS,
    HEADER_SIZE,
    META_PARAMS,
    NOTIFY_SEND,
    OPTEE_UUID,
    PARAM_SIZE,
    REGISTER_READ_ONLY,
    TEE_PARAMS,
    Capability,
    Command,
    Fmem,
    Message,
    MessageError,
    Service,
    Wire,
    Yield,
    message_size,
    pack_params,
    take_outputs,
    to_param,
    to_wire,
    unpack_params,
    uuid_words,
)
from ffa.roles.endpoint import Endpoint
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
from tee.driver import Begun, Done, Event, GenCap, Notification, Outcome, RpcWithdrawn, Sink, TeeInfo, TeeKind
from tee.memory import FfaShare, Memory, Range
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply

log = logging.getLogger(__name__)

IMPL_OPTEE = 1
"""Implementation id of OP-TEE (Linux uapi/linux/tee.h)."""
INFO = TeeInfo(TeeKind.FFA, IMPL_OPTEE, 0, GenCap.GP | GenCap.REG_MEM | GenCap.MEMREF_NULL)
MAX_RPC_PARAMS = 16
"""Parameters of the RPC argument that this driver has room for."""
RETRY_S = 0.001
"""Seconds after which a call is resumed that came back without any progress."""
POLL_S = 0.05
"""Seconds between looks for notifications while a context is open."""
LOOK_S = 0.001
"""… after the partition has worked for this VM, which is when most are raised. A look costs as much as a call."""
CLIENT_S = 10.0
"""Seconds that a client has to answer its TA."""
UNREGISTER_TRIES = 1000
"""How often the partition is asked to give memory back."""

_REFUSED = frozenset(
    {
        *(RpcCommand.RPMB, RpcCommand.SUSPEND, RpcCommand.BENCH_REG, RpcCommand.I2C_TRANSFER),
        *(RpcCommand.RPMB_PROBE_RESET, RpcCommand.RPMB_PROBE_NEXT, RpcCommand.RPMB_FRAMES),
    }
)
"""RPCs for a kernel, or for hardware, that there is not."""


class Pages(Protocol):
    """Where the driver has its memory from: whole pages of the VM's own (:class:`guest_driver.arena.Arena`)."""

    def allocate(self, size: int) -> Memory:
        """``size`` bytes from a page's start on, zeroed, with their ``ranges``. Raises MemoryError."""

    def release(self, memory: Memory) -> None:
        """Give them back."""


@dataclass(slots=True, eq=False)
class FfaContext:
    """A client's context. OP-TEE knows none: the driver keeps what hangs under it."""

    driver: FfaTeeDriver
    owner: object = None  #: of the call that opened it: who is told of notifications
    sessions: set[FfaSession] = field(default_factory=set)
    registered: dict[Memory, FfaRegion] = field(default_factory=dict)
    closing: CloseContext | None = None


@dataclass(slots=True, eq=False)
class FfaSession:
    """A session."""

    context: FfaContext
    ident: int
    closing: bool = False


@dataclass(slots=True, eq=False)
class FfaRegion:
    """Memory that is shared: what ``Memory.handle`` is on this path."""

    handle: int
    memory: Memory
    copy: Memory | None = None  #: what is shared in its place, where it is not the VM's
    foreign: bool = False  #: another VM has shared it, and takes it back
    users: int = 0
    ending: UnregisterMemory | None = None
    send: Frame | None = None  #: the request to work on the message in it, if that is what it is for


_OF_CLIENTS: dict[int, RpcCommand] = {wire: RpcCommand(command) for command, wire in CLIENT_COMMANDS.items()}
_NOTHING = Frame()
_NO_MEMORY: Callable[[Memory], int] = lambda memory: 0  # noqa: E731
_REQUEST, _RESPONSE = fid(Ffa.MSG_SEND_DIRECT_REQ), fid(Ffa.MSG_SEND_DIRECT_RESP)
_BUSY, _DONE = int(Result.BUSY), int(Yield.DONE)
_INVOKE, _OPEN_SESSION = int(Command.INVOKE_COMMAND), int(Command.OPEN_SESSION)
_CLOSE_SESSION, _REGISTER_SHM = int(Command.CLOSE_SESSION), int(Command.REGISTER_SHM)


@dataclass(slots=True, eq=False)
class _Copied:
    """A parameter whose bytes the partition has in a copy."""

    param: MemRef
    copy: Memory
    at: int = 0  #: where they are in it
    size: int | None = None  #: bytes that come back; None: those that were written


@dataclass(slots=True, eq=False)
class _Flight:
    """A message that the partition has, or is to get."""

    message: Message
    wires: Sequence[Wire] = ()
    call: Call | None = None  #: None: of the driver itself
    context: FfaContext | None = None
    session: FfaSession | None = None
    params: Sequence[Param] = ()
    first: int = 0  #: number of the first of them
    used: Sequence[FfaRegion] = ()
    copied: Sequence[_Copied] = ()
    page: FfaRegion | None = None  #: where the message is
    begun: bool = False
    frame: Frame = _NOTHING  #: the next request
    rpc: Rpc | None = None  #: that somebody is to answer
    lent: Sequence[tuple[Rpc, MemRef]] = ()  #: memory that its RPCs were answered with


@dataclass(slots=True, eq=False)
class _Begun:
    """An invoke that has come back and is to be resumed."""

    driver: FfaTeeDriver
    flight: _Flight
    answer: Frame

    def becomes(self, call: Invoke) -> None:
        """See :class:`~tee.driver.Begun`."""
        self.driver.go_on(self.flight, call, self.answer)


class FfaTeeDriver:
    """Drives OP-TEE's partition for one VM.

    ``endpoint`` is the VM, taken in by its hypervisor and with buffers mapped. Raises TeeError(COMMUNICATION): there is
    no such partition, or it is one that cannot be used; MemoryError.

    Memory that another VM has shared (:attr:`Memory.ffa <tee.memory.Memory>`) is registered by its handle, where the
    partition lets this VM speak for the other. RegisterMemory ends with ITEM_NOT_FOUND then if the partition cannot
    get it, with BUSY if it is registered, BAD_PARAMETERS: it has another size, ACCESS_DENIED: it may only be read.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        pages: Pages,
        *,
        copies: bool = False,
        now: Callable[[], int] = time.time_ns,
        clock: Callable[[], float] = time.monotonic,
        look_s: float = LOOK_S,
        client_s: float | None = CLIENT_S,
    ) -> None:
        """``copies``: memory that is registered is not the VM's own, which has the TEE work on a copy: brought up to
        date before a call and after it, and around the RPCs that name it. ``now`` tells the VM's time to a TEE that
        asks for it: nanoseconds since 1970. ``clock`` counts seconds; ``look_s`` of them are between two looks for
        notifications, at least; ``client_s`` has a client to answer what its TA asks it: meanwhile that has a thread of
        OP-TEE's, which nobody can take from it. None: those who pass what is asked on to clients see to that."""
        self._copies = copies
        self._look_s = look_s
        self._client_s = client_s
        self._asking: dict[Rpc, float] = {}  #: of clients, and until when
        self._endpoint = endpoint
        self._pages = pages
        self._now = now
        self._clock = clock
        self._look_at = 0.0  #: when to look for notifications
        self._worked = False  #: the partition has, since the last look
        self._sink: Sink | None = None
        self._ready: deque[Event] = deque()
        self._waiting: deque[_Flight] = deque()  #: for a free thread
        self._runnable: deque[_Flight] = deque()  #: to be resumed
        self._flights: dict[Call, _Flight] = {}
        self._all: set[_Flight] = set()
        self._rpcs: dict[Rpc, _Flight] = {}
        self._regions: dict[int, FfaRegion] = {}  #: by handle
        self._lent: dict[Memory, MemRef] = {}  #: what was the answer to a SHM_ALLOC, and was not freed
        self._ending: dict[FfaRegion, int] = {}  #: regions to be given back, and how often that was tried
        self._released: set[Memory] = set()  #: by their owner, while they are shared
        self._spare: list[FfaRegion] = []  #: pages for messages
        self._contexts: set[FfaContext] = set()
        self._closing: set[FfaContext] = set()  #: those of them that are being closed
        self._cancel_ids = 0
        self._closed = False
        self._partition = find_optee(endpoint)
        self._rpc_params, self._notifies = self._exchange()
        self._rpc_arg = Message(0, num_params=self._rpc_params).pack() + bytes(self._rpc_params * PARAM_SIZE)
        self._bit = 0
        if self._notifies:
            self._enable_notifications()

    def _exchange(self) -> tuple[int, bool]:
        answer = self._ask(Service.GET_API_VERSION)
        if answer is None or answer[3] != API_VERSION[0] or answer[4] < API_VERSION[1]:
            raise _unusable(f"OP-TEE has another interface: {answer!r}")
        answer = self._ask(Service.EXCHANGE_CAPABILITIES)
        if answer is None or answer[3] != Result.SUCCESS:
            raise _unusable(f"OP-TEE refuses to work with us: {answer!r}")
        count = answer[4] & 0xFF
        if not answer[5] & Capability.ARG_OFFSET or not 0 < count <= MAX_RPC_PARAMS:
            raise _unusable(f"OP-TEE wants an RPC argument that we do not have: {answer!r}")
        return count, bool(answer[5] & Capability.ASYNC_NOTIF)

    def _enable_notifications(self) -> None:
        ids = self._partition << 16 | self._endpoint.id
        for number in range(64):
            if self._endpoint.call(Ffa.NOTIFICATION_BIND, ids, 0, *halves(1 << number)).ok:
                answer = self._ask(Service.ENABLE_ASYNC_NOTIF, number)
                if answer is not None and answer[3] == Result.SUCCESS:
                    self._bit = 1 << number
                    return
                self._endpoint.call(Ffa.NOTIFICATION_UNBIND, ids, 0, *halves(1 << number))
                break
        log.info("no notifications: OP-TEE or the hypervisor refuses them")

    # -- the contract

    @property
    def info(self) -> TeeInfo:
        """OP-TEE."""
        return INFO

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink

    def fileno(self) -> int | None:
        """See :class:`~tee.driver.TeeDriver`."""
        return None

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        if size < 1:
            raise MemoryError(f"{size} bytes cannot be allocated")
        return self._pages.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`. What is still shared stays reserved until it is not."""
        if any(region.memory is memory for region in self._regions.values()):
            self._released.add(memory)
        else:
            self._pages.release(memory)

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`."""
        return {
            "calls": len(self._flights),
            "contexts": len(self._contexts),
            "sessions": sum(len(context.sessions) for context in self._contexts),
            "registrations": sum(len(context.registered) for context in self._contexts),
            "rpcs": len(self._rpcs),
        }

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        try:
            if self._closed:
                raise TeeError(Result.COMMUNICATION, Origin.COMMS)
            starter = self._STARTERS.get(type(call))
            if starter is None:
                raise TeeError(Result.NOT_SUPPORTED, Origin.API)
            starter(self, call)
        except TeeError as e:
            self._done(call, e.code, e.origin)
        except MemoryError:
            self._done(call, Result.OUT_OF_MEMORY, Origin.API)
        except MessageError as e:
            self._done(call, e.code, Origin.API)

    def invoke_at_once(self, session: object, func: int, params: Sequence[Param]) -> Outcome | Begun | None:
        """See :class:`~tee.driver.InvokesAtOnce`. Others have their turn while messages wait or are to be resumed."""
        if type(session) is not FfaSession or session.closing or self._waiting or self._runnable or self._closed:
            return None
        context = session.context
        if context not in self._contexts or context.closing is not None or session not in context.sessions:
            return None
        if not 0 <= func <= MASK32:
            return None
        flight = _Flight(Message(_INVOKE, func, session.ident), (), None, context, session)
        try:
            if params:
                self._take_params(flight, params)
            self._put(flight)
        except (MessageError, MemoryError):
            self._let_go(flight)
            return None
        self._worked = True
        answer = self._endpoint.send(flight.frame).narrow
        if answer[0] == _RESPONSE and not answer[3]:
            if answer[4] == _DONE:
                try:
                    message = self._outcome(flight)
                except MessageError:
                    pass  # it may have run, which is for its Done to say
                else:
                    self._let_go(flight)
                    return message.ret, message.ret_origin
            self._all.add(flight)
            return _Begun(self, flight, answer)
        self._let_go(flight)
        if answer[0] == _RESPONSE and answer[3] == _BUSY:
            return None
        log.warning("OP-TEE refuses a call with %r", answer)
        return Result.COMMUNICATION, Origin.COMMS

    def go_on(self, flight: _Flight, call: Invoke, answer: Frame) -> None:
        """``call`` is what was begun at once and came back with ``answer`` (for :class:`_Begun`)."""
        flight.call = call
        self._flights[call] = flight
        self._came_back(flight, answer)

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        flight = self._flights.get(call)
        if flight is None or flight.message.cmd not in (Command.OPEN_SESSION, Command.INVOKE_COMMAND):
            return
        if not flight.begun:
            self._waiting.remove(flight)
            self._end(flight, Result.CANCEL, Origin.API)
            return
        message = Message(Command.CANCEL, session=flight.message.session, cancel_id=flight.message.cancel_id)
        try:
            self._send(_Flight(message), first=True)
        except MemoryError:
            log.warning("no memory for a CANCEL: the call ends by itself")

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        flight = self._rpcs.pop(rpc, None)
        if flight is None:
            return
        self._asking.pop(rpc, None)
        for copy, param in _copies_of(rpc):
            if param.direction.is_output and param.memory is not None:
                _copy(param.memory, param.offset, copy, param.offset, param.size)
        try:
            code, wires = reply.code, self._reply_wires(rpc, reply)
            pack_params(wires)
        except MessageError as e:
            log.warning("an RPC was answered with what OP-TEE cannot be told: %s", e)
            self._ready.append(RpcWithdrawn(rpc))
            code, wires = Result.BAD_PARAMETERS, []
        else:
            if rpc.command == RpcCommand.SHM_ALLOC and code == Result.SUCCESS:
                for given in reply.params:
                    if isinstance(given, MemRef) and given.memory is not None:
                        self._lent[given.memory] = given
                        flight.lent = [*flight.lent, (rpc, given)]
        flight.rpc = None
        self._answer(flight, code, wires, reply.origin)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        progress = self._look_for_notifications() if self._bit else False
        due = self._give_up_clients() if self._asking else None
        for flights in (self._runnable, self._waiting):
            for _ in range(len(flights)):
                if flights:  # the end of one may end others
                    flight = flights.popleft()
                    if flight.message.cmd == _CLOSE_SESSION and self._has_calls(flight):
                        self._waiting.append(flight)
                        continue
                    self._worked = True
                    progress |= self._came_back(flight, self._endpoint.send(flight.frame))
        for context in list(self._closing) if self._closing else ():
            self._go_on_closing(context)
        if self._ending:
            self._give_back()
        sink = self._sink
        assert sink is not None
        while self._ready:
            progress = True
            sink(self._ready.popleft())
        if self._runnable or self._waiting or self._ending or self._closing:
            return 0.0 if progress else RETRY_S
        if progress:
            return 0.0
        if not self._bit or not self._contexts:
            return due
        look = max(self._look_at - self._clock(), 0.0) if self._worked else POLL_S
        return look if due is None else min(look, due)

    def _give_up_clients(self) -> float | None:
        """Those that have had their time; seconds until the next one has."""
        for rpc in [rpc for rpc, until in self._asking.items() if until <= self._clock()]:
            log.warning("a client has not answered its TA in %g s", self._client_s)
            self._withdraw(self._rpcs[rpc])
        return max(min(self._asking.values()) - self._clock(), 0.0) if self._asking else None

    def _withdraw(self, flight: _Flight) -> None:
        """Nobody in the VM answers what the partition asks any more: OP-TEE's thread goes on without."""
        rpc, flight.rpc = flight.rpc, None
        if rpc is not None:
            del self._rpcs[rpc]
            self._asking.pop(rpc, None)
            self._ready.append(RpcWithdrawn(rpc))
            self._answer(flight, Result.COMMUNICATION, [])

    def close(self) -> None:
        """Ends the use of the partition: all calls end, messages' pages are taken back."""
        self._closed = True
        for flight in list(self._all):
            self._end(flight, Result.COMMUNICATION, Origin.COMMS, may_have_run=flight.begun)
        for context in self._contexts:
            for region in context.registered.values():
                self._unshare(region)
            if context.closing is not None:
                self._done(context.closing, Result.COMMUNICATION, Origin.COMMS, may_have_run=True)
                context.closing = None
        self._closing.clear()
        if self._bit:
            ids = self._partition << 16 | self._endpoint.id
            self._endpoint.call(Ffa.NOTIFICATION_UNBIND, ids, 0, *halves(self._bit))
            self._bit = 0
        self._ending.update(dict.fromkeys(self._spare, 0))
        self._spare.clear()
        self._give_back()
        for region in self._ending:  # OP-TEE still has it: run() goes on trying, but nobody is kept waiting
            if region.ending is not None:
                self._done(region.ending, Result.COMMUNICATION, Origin.COMMS, may_have_run=True)
                region.ending = None

    # -- FF-A

    def _ask(self, service: Service, *words: int) -> Frame | None:
        """The answer to a direct request: None if there is none."""
        answer = self._endpoint.send(self._request(service, *words)).narrow
        return answer if answer[0] == _RESPONSE else None

    def _request(self, *words: int) -> Frame:
        return Frame(_REQUEST, self._endpoint.id << 16 | self._partition, 0, *words)

    def _share(self, memory: Memory, copy: Memory | None = None) -> FfaRegion:
        """Raises MessageError(BAD_PARAMETERS): the memory is not the VM's, or is shared; MemoryError."""
        ranges = (copy or memory).ranges
        handle = share(self._endpoint, self._partition, ranges, read_only=memory.read_only)
        region = self._regions[handle] = FfaRegion(handle, memory, copy)
        return region

    def _give_back(self) -> None:
        """Takes memory back that is shared no more, as far as the partition lets go of it."""
        for region, tries in list(self._ending.items()):
            answer = self._ask(Service.UNREGISTER_SHM, *halves(region.handle))
            gone = answer is not None and answer[3] in (Result.SUCCESS, Result.ITEM_NOT_FOUND)
            if gone and (region.foreign or self._endpoint.reclaim(region.handle).ok):
                self._taken_back(region, Result.SUCCESS)
            elif tries < UNREGISTER_TRIES:
                self._ending[region] = tries + 1
            else:
                log.warning("OP-TEE keeps memory %#x: it is lost", region.handle)
                self._taken_back(region, Result.COMMUNICATION)

    def _taken_back(self, region: FfaRegion, code: int) -> None:
        del self._ending[region]
        memory = region.memory
        if code == Result.SUCCESS:
            del self._regions[region.handle]
            if region.copy is not None:
                self._pages.release(region.copy)
            if memory in self._released:
                self._released.discard(memory)
                self._pages.release(memory)
        memory.handle = None
        for context in list(self._contexts):
            if context.registered.pop(memory, None) is not None:
                self._go_on_closing(context)
        if region.ending is not None:
            self._done(region.ending, code, Origin.COMMS if code else Origin.TEE)

    def _unshare(self, region: FfaRegion) -> None:
        self._ending.setdefault(region, 0)

    # -- calls

    def _done(self, call: Call, code: int, origin: int, value: object = None, *, may_have_run: bool = False) -> None:
        self._ready.append(Done(call, code, origin, value, may_have_run))

    def _context(self, handle: object) -> FfaContext:
        if not isinstance(handle, FfaContext) or handle not in self._contexts or handle.closing is not None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "no such context")
        return handle

    def _session(self, handle: object) -> FfaSession:
        if type(handle) is not FfaSession or handle.closing or handle not in handle.context.sessions:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "no such session")
        if handle.context.closing is not None or handle.context not in self._contexts:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "no such context")
        return handle

    def _open_context(self, call: OpenContext) -> None:
        context = FfaContext(self, call.owner)
        self._contexts.add(context)
        self._done(call, Result.SUCCESS, Origin.TEE, context)

    def _close_context(self, call: CloseContext) -> None:
        context = self._context(call.context)
        context.closing = call
        self._closing.add(context)
        self._end_calls([f for f in self._all if f.context is context])
        self._go_on_closing(context)

    def _end_calls(self, flights: list[_Flight]) -> None:
        """Cancels them; what they ask for is not waited for any more."""
        for flight in flights:
            if flight.call is None:
                continue
            self.cancel(flight.call)
            self._withdraw(flight)

    def _go_on_closing(self, context: FfaContext) -> None:
        """Calls end first, then sessions, then registrations; then the context is closed."""
        if self._closed or context.closing is None or any(f.context is context for f in self._all):
            return
        try:
            for session in [s for s in context.sessions if not s.closing]:
                self._close(session, None)
        except MemoryError:
            return  # run() tries again
        if context.sessions:
            return
        for region in context.registered.values():
            self._unshare(region)
        if not context.registered and context in self._contexts:
            self._contexts.discard(context)
            self._closing.discard(context)
            call, context.closing, context.owner = context.closing, None, None  # they refer to the context
            self._done(call, Result.SUCCESS, Origin.TEE)

    def _open_session(self, call: OpenSession) -> None:
        context = self._context(call.context)
        ta, client = uuid_words(call.uuid), uuid_words(call.client.uuid)
        meta: list[Wire] = [
            Value(Direction.IN, *ta, 0, meta=True),
            Value(Direction.IN, *client, call.client.login, meta=True),
        ]
        flight = _Flight(Message(Command.OPEN_SESSION), meta, call, context, first=META_PARAMS)
        self._send_with(flight, call.params)

    def _invoke(self, call: Invoke) -> None:
        session = self._session(call.session)
        if not 0 <= call.func < 1 << 32:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API)
        message = Message(_INVOKE, call.func, session.ident)
        flight = _Flight(message, (), call, session.context, session)
        if call.params:
            self._send_with(flight, call.params)
        else:
            self._send(flight)

    def _close_session(self, call: CloseSession) -> None:
        self._close(self._session(call.session), call)

    def _close(self, session: FfaSession, call: CloseSession | None) -> None:
        self._end_calls([f for f in self._all if f.session is session])
        session.closing = True
        message = Message(Command.CLOSE_SESSION, session=session.ident)
        try:
            self._send(_Flight(message, (), call, session.context, session))
        except MemoryError:
            session.closing = False
            raise

    def _register(self, call: RegisterMemory) -> None:
        context, memory = self._context(call.context), call.memory
        if memory.handle is not None:
            raise TeeError(Result.BAD_STATE, Origin.API, "registered already")
        if memory.ffa is not None:
            self._name(call, context, memory, memory.ffa)
            return
        copy = self._pages.allocate(memory.size) if self._copies else None
        try:
            region = self._share(memory, copy)
        except (MessageError, MemoryError):
            if copy is not None:
                self._pages.release(copy)
            raise
        self._take_in(context, region)
        self._done(call, Result.SUCCESS, Origin.TEE)

    def _name(self, call: RegisterMemory, context: FfaContext, memory: Memory, share: FfaShare) -> None:
        """Registers memory that another VM has shared."""
        flags = REGISTER_READ_ONLY if memory.read_only else 0
        meta: list[Wire] = [
            Value(Direction.IN, share.handle, share.tag, share.owner, meta=True),
            Value(Direction.IN, memory.size, flags, meta=True),
        ]
        pack_params(meta)
        self._send(_Flight(Message(Command.REGISTER_SHM), meta, call, context, first=len(meta)))

    def _take_in(self, context: FfaContext, region: FfaRegion) -> None:
        region.memory.handle = context.registered[region.memory] = region

    def _unregister(self, call: UnregisterMemory) -> None:
        region = self._context(call.context).registered.get(call.memory)
        if region is None or region.ending is not None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "not registered")
        region.ending = call
        if not region.users:
            self._unshare(region)

    _STARTERS: ClassVar[dict[type[Call], Callable[[Any, Any], None]]] = {
        OpenContext: _open_context,
        CloseContext: _close_context,
        OpenSession: _open_session,
        CloseSession: _close_session,
        Invoke: _invoke,
        RegisterMemory: _register,
        UnregisterMemory: _unregister,
    }

    # -- messages

    def _send_with(self, flight: _Flight, params: Sequence[Param]) -> None:
        """Raises MessageError, MemoryError: then nothing has happened."""
        try:
            self._take_params(flight, params)
            self._send(flight)
        except (MessageError, MemoryError):
            self._let_go(flight)
            raise

    def _take_params(self, flight: _Flight, params: Sequence[Param]) -> None:
        """Raises MessageError, MemoryError: then what the flight has taken is to be let go of."""
        if len(params) > TEE_PARAMS:
            raise MessageError(Result.BAD_PARAMETERS, f"{len(params)} parameters: a TA can be given {TEE_PARAMS}")
        flight.params = params
        flight.wires = [*flight.wires, *[self._wire(flight, param) for param in params]]

    def _wire(self, flight: _Flight, param: Param) -> Wire:
        """How a parameter is sent: temporary memory in a copy that is shared for the time of the call."""
        if not isinstance(param, MemRef) or param.memory is None:
            return to_wire(param, _NO_MEMORY)
        memory = param.memory
        try:
            data = memory.read(param.offset, param.size) if memory.handle is None and param.size else b""
        except ValueError as e:
            raise MessageError(Result.BAD_PARAMETERS, str(e)) from None
        if isinstance(memory.handle, FfaRegion):
            region = memory.handle
            if region.ending is not None or self._regions.get(region.handle) is not region:
                raise MessageError(Result.BAD_PARAMETERS, "memory that is being unregistered")
            if param.offset < 0 or param.offset + param.size > memory.size:
                raise MessageError(Result.BAD_PARAMETERS, "a reference outside its memory")
            if region.copy is not None:
                _copy(memory, param.offset, region.copy, param.offset, param.size)
                if param.direction.is_output:
                    flight.copied = [*flight.copied, _Copied(param, region.copy, param.offset, param.size)]
            region.users += 1
            flight.used = [*flight.used, region]
            return to_wire(param, lambda memory: region.handle)
        if memory.handle is not None:
            raise MessageError(Result.BAD_PARAMETERS, "memory of another driver's")
        if memory.read_only and param.direction.is_output:
            raise MessageError(Result.BAD_PARAMETERS, "output into read-only memory")
        copy = self._pages.allocate(max(param.size, 1))
        try:
            region = self._share(copy)
        except (MessageError, MemoryError):
            self._pages.release(copy)
            raise
        if param.direction.is_input:
            copy.write(0, data)
        region.users += 1
        self._released.add(copy)
        flight.used = [*flight.used, region]
        if param.direction.is_output:
            flight.copied = [*flight.copied, _Copied(param, copy)]
        return Fmem(param.direction, 0, param.size, region.handle, param.meta)

    def _send(self, flight: _Flight, *, first: bool = False) -> None:
        """Has a message sent. Raises MessageError: a number does not fit its field; MemoryError."""
        self._put(flight)
        self._all.add(flight)
        if flight.call is not None:
            self._flights[flight.call] = flight
        if first:
            self._runnable.appendleft(flight)
        else:
            self._waiting.append(flight)

    def _put(self, flight: _Flight) -> None:
        """Writes a message into a page. Raises MessageError: a number does not fit its field; MemoryError."""
        message, wires = flight.message, flight.wires
        params = pack_params(wires) if wires else b""
        flight.page = page = self._spare.pop() if self._spare else self._new_page()
        if not message.cancel_id:
            self._cancel_ids = message.cancel_id = self._cancel_ids + 1 & MASK32
        message.num_params = len(wires)
        page.memory.write(0, message.pack() + params + self._rpc_arg)
        assert page.send is not None
        flight.frame = page.send

    def _new_page(self) -> FfaRegion:
        memory = self._pages.allocate(PAGE_SIZE)
        try:
            page = self._share(memory)
        except MessageError as e:
            self._pages.release(memory)
            raise MemoryError(str(e)) from None
        except MemoryError:
            self._pages.release(memory)
            raise
        page.send = self._request(Service.CALL_WITH_ARG, *halves(page.handle), 0)
        return page

    def _has_calls(self, closing: _Flight) -> bool:
        """Whether a session that is to be closed has calls, which are to end before."""
        return any(f.session is closing.session and f is not closing for f in self._all)

    def _came_back(self, flight: _Flight, answer: Frame) -> bool:
        """What the partition says of a message that it has worked on; whether it got on."""
        answer = answer.narrow
        if answer[0] != _RESPONSE:
            self._end(flight, Result.COMMUNICATION, Origin.COMMS, may_have_run=flight.begun)
            return True
        if answer[3] == _BUSY and not flight.begun:
            self._waiting.append(flight)
            return False
        if answer[3]:
            log.warning("OP-TEE refuses a call with %#x", answer[3])
            self._end(flight, Result.COMMUNICATION, Origin.COMMS, may_have_run=flight.begun)
            return True
        began, flight.begun = not flight.begun, True
        try:
            if answer[4] == _DONE:
                message = self._outcome(flight)
                self._end(flight, message.ret, message.ret_origin, message.session)
                if flight.message.cmd == Command.CANCEL and message.func == CANCEL_RESUME:
                    self._cancelled_in_rpc(flight.message)
                return True
            flight.frame = self._request(Service.RESUME, 0, 0, 0, answer[7])
            if answer[4] == Yield.INTERRUPT:
                self._runnable.append(flight)
                return began
            if answer[4] != Yield.RPC_CMD:
                raise MessageError(Result.COMMUNICATION, f"a call came back with {answer[4]}")
            self._asked(flight)
        except MessageError as e:
            log.warning("OP-TEE gives an answer that makes no sense: %s", e)
            self._end(flight, Result.COMMUNICATION, Origin.COMMS, may_have_run=True)
        return True

    def _cancelled_in_rpc(self, cancel: Message) -> None:
        """OP-TEE does not wait for what the cancelled call has asked: it is to be resumed."""
        for flight in list(self._rpcs.values()):
            if (flight.message.session, flight.message.cancel_id) == (cancel.session, cancel.cancel_id):
                self._withdraw(flight)

    def _outcome(self, flight: _Flight) -> Message:
        """The message as it came back, its outputs given. Raises MessageError: it makes no sense; nothing is given."""
        assert flight.page is not None
        memory = flight.page.memory
        message = Message.unpack(memory.read(0, HEADER_SIZE))
        outputs: list[Param] = []
        if flight.params:
            wires = unpack_params(memory.read(HEADER_SIZE, len(flight.wires) * PARAM_SIZE))[flight.first :]
            outputs = take_outputs(flight.params, wires, message.ret)
        if flight.message.cmd == _OPEN_SESSION and not message.ret:
            ident = message.session
            if any(s.ident == ident for c in self._contexts for s in c.sessions):
                raise MessageError(Result.COMMUNICATION, f"session {ident} is open already")
        if flight.message.cmd == _REGISTER_SHM and not message.ret:
            self._named(flight)
        if outputs:
            _give_outputs(flight, outputs)
        return message

    def _named(self, flight: _Flight) -> None:
        """The partition has memory of another VM's. Raises MessageError: it had it already."""
        assert isinstance(flight.call, RegisterMemory)
        memory = flight.call.memory
        assert memory.ffa is not None
        assert flight.context is not None
        handle = memory.ffa.handle
        if handle in self._regions:
            raise MessageError(Result.COMMUNICATION, f"memory {handle:#x} is there already")
        self._regions[handle] = region = FfaRegion(handle, memory, foreign=True)
        self._take_in(flight.context, region)

    def _end(self, flight: _Flight, code: int, origin: int, session: int = 0, *, may_have_run: bool = False) -> None:
        """A message is over, whatever came of it."""
        self._all.discard(flight)
        for flights in (self._waiting, self._runnable):
            if flights and flight in flights:
                flights.remove(flight)
        if flight.rpc is not None:
            self._rpcs.pop(flight.rpc, None)
            self._asking.pop(flight.rpc, None)
            self._ready.append(RpcWithdrawn(flight.rpc))
        for rpc, given in flight.lent:
            if given.memory is not None and self._lent.get(given.memory) is given:
                del self._lent[given.memory]  # the TEE uses it no longer than the call lasts
                self._ready.append(RpcWithdrawn(rpc))
        self._let_go(flight, keep_page=not may_have_run)
        value: object = None
        context, command = flight.context, flight.message.cmd
        if command != _INVOKE and context is not None:
            if command == Command.OPEN_SESSION and code == Result.SUCCESS:
                value = FfaSession(context, session)
                context.sessions.add(value)
                if context.closing is not None:
                    code, origin, value = Result.CANCEL, Origin.API, None
            if command == Command.CLOSE_SESSION and flight.session is not None:
                context.sessions.discard(flight.session)
        if flight.call is not None:
            del self._flights[flight.call]
            self._ready.append(Done(flight.call, code, origin, value, may_have_run))
        if context is not None and context.closing is not None:
            self._go_on_closing(context)

    def _let_go(self, flight: _Flight, *, keep_page: bool = True) -> None:
        for region in flight.used:
            region.users -= 1
            if not region.users and (region.ending is not None or region.memory in self._released):
                self._unshare(region)
        flight.used = ()
        if flight.page is not None:
            if keep_page and not self._closed:
                self._spare.append(flight.page)
            else:
                self._released.add(flight.page.memory)
                self._unshare(flight.page)
        flight.page = None

    # -- RPCs

    def _asked(self, flight: _Flight) -> None:
        """The partition asks for something; it is read once. Raises MessageError: it makes no sense."""
        assert flight.page is not None
        at = message_size(len(flight.wires))
        message = Message.unpack(flight.page.memory.read(at, HEADER_SIZE))
        if message.num_params > self._rpc_params:
            raise MessageError(Result.COMMUNICATION, f"an RPC with {message.num_params} parameters")
        size = message_size(message.num_params) - HEADER_SIZE
        wires = unpack_params(flight.page.memory.read(at + HEADER_SIZE, size))
        client = _OF_CLIENTS.get(message.cmd)
        command = message.cmd if client is None else client
        try:
            params = self._rpc_params_of(command, wires)
        except MessageError as e:
            log.warning("OP-TEE asks for what makes no sense: %s", e)
            self._answer(flight, e.code, wires)
            return
        own = self._own_answer(command, params)
        if own is not None:
            self._answer(flight, own.code, [to_wire(p, self._handle) for p in own.params] or wires)
            return
        flight.rpc = rpc = Rpc(command, params, flight.call, client is not None)
        for copy, param in _copies_of(rpc):
            if param.direction.is_input:
                _copy(copy, param.offset, param.memory, param.offset, param.size)
        self._rpcs[rpc] = flight
        if client is not None and self._client_s is not None:
            self._asking[rpc] = self._clock() + self._client_s
        self._ready.append(rpc)

    def _rpc_params_of(self, command: int, wires: list[Wire]) -> list[Param]:
        """Raises MessageError(BAD_PARAMETERS)."""
        if command != RpcCommand.SHM_FREE:
            return [to_param(wire, self._memory) for wire in wires]
        match wires:
            case [Value(direction=Direction.IN, a=kind, b=handle)]:
                memory = self._memory(handle)
                if memory in self._lent:
                    given = self._lent.pop(memory)
                    return [Value(Direction.IN, kind), MemRef(Direction.INOUT, memory, given.offset, given.size)]
        raise MessageError(Result.BAD_PARAMETERS, "a SHM_FREE of what was not lent")

    def _memory(self, handle: int) -> Memory:
        """Memory that the partition may name: not that of messages."""
        region = self._regions.get(handle)
        if region is None or not (region.users or region.memory.handle is region):
            raise MessageError(Result.BAD_PARAMETERS, f"memory {handle:#x} was not given to OP-TEE")
        return region.memory

    def _handle(self, memory: Memory) -> int:
        if isinstance(memory.handle, FfaRegion):
            return memory.handle.handle
        for region in self._regions.values():
            if region.memory is memory:
                return region.handle
        raise MessageError(Result.BAD_PARAMETERS, "memory that is not registered")

    def _own_answer(self, command: int, params: list[Param]) -> RpcReply | None:
        """To an RPC that is for the driver."""
        if command in _REFUSED:
            return RpcReply(Result.NOT_SUPPORTED)
        match command, params:
            case RpcCommand.GET_TIME, [Value(direction=Direction.OUT, meta=False)]:
                return RpcReply(Result.SUCCESS, [Value(Direction.OUT, *divmod(self._now(), 10**9))])
            case RpcCommand.GET_TIME, _:
                return RpcReply(Result.BAD_PARAMETERS)
            case RpcCommand.NOTIFICATION, [Value(direction=Direction.IN, a=kind, b=value)] if kind == NOTIFY_SEND:
                owner = next((c.owner for c in self._contexts if c.closing is None), None)
                self._ready.append(Notification(value & 0xFFFF_FFFF, owner))
                return RpcReply(Result.SUCCESS)
            case RpcCommand.NOTIFICATION, _:
                return RpcReply(Result.NOT_SUPPORTED)
        return None

    def _reply_wires(self, rpc: Rpc, reply: RpcReply) -> list[Wire]:
        """Raises MessageError: what stands in the reply is not an answer to the RPC."""
        if rpc.command == RpcCommand.SHM_FREE:
            return []
        if rpc.command == RpcCommand.SHM_ALLOC:
            if reply.code != Result.SUCCESS:
                return []
            match reply.params:
                case [MemRef(memory=Memory() as memory, offset=offset, size=size)]:
                    return [Fmem(Direction.OUT, offset, size, self._handle(memory))]
            raise MessageError(Result.BAD_PARAMETERS, "SHM_ALLOC is answered with one memory reference")
        params = reply.params or rpc.params
        if len(params) != len(rpc.params):
            raise MessageError(Result.BAD_PARAMETERS, "an answer with another number of parameters")
        return [to_wire(param, self._handle) for param in params]

    def _answer(self, flight: _Flight, code: int, wires: list[Wire], origin: int = Origin.COMMS) -> None:
        assert flight.page is not None
        at = message_size(len(flight.wires))
        message = Message(0, ret=code & 0xFFFF_FFFF, ret_origin=origin, num_params=len(wires))
        flight.page.memory.write(at, message.pack() + pack_params(wires))
        self._runnable.append(flight)

    # -- notifications

    def _look_for_notifications(self) -> bool:
        if not self._bit or self._closed:
            return False
        at = self._clock()
        if at < self._look_at:
            return False
        self._look_at, self._worked = at + self._look_s, False
        answer = self._endpoint.call(Ffa.NOTIFICATION_GET, self._endpoint.id, GET_FROM_SP)
        if not answer.ok or not pair(answer[2], answer[3]) & self._bit:
            return False
        try:
            self._send(_Flight(Message(Command.DO_BOTTOM_HALF)))
        except MemoryError:
            log.warning("no memory for a bottom half: notifications wait for the next")
        return True


def share(endpoint: Endpoint, partition: int, ranges: Sequence[Range], *, read_only: bool = False, tag: int = 0) -> int:
    """Shares pages of ``endpoint``'s with ``partition``; the handle, by which they are reclaimed.

    Raises MessageError(BAD_PARAMETERS): they are not the endpoint's alone, or do not start at a page; MemoryError.
    """
    if not ranges:
        raise MessageError(Result.BAD_PARAMETERS, "only memory of the driver's can be shared: allocate() it")
    receivers = (abi.Receiver(partition, permissions(Data.RO if read_only else Data.RW)),)
    transaction = abi.Transaction(endpoint.id, receivers, ATTRIBUTES_NORMAL, tag=tag)
    answer = endpoint.send_memory(Ffa.MEM_SHARE, transaction, [_pages_of(r) for r in ranges])
    if not answer.ok:
        if answer.error in (Error.NO_MEMORY, Error.BUSY):
            raise MemoryError(f"FFA_MEM_SHARE is answered with {answer!r}")
        raise MessageError(Result.BAD_PARAMETERS, f"FFA_MEM_SHARE is answered with {answer!r}")
    return pair(answer[2], answer[3])


def find_optee(endpoint: Endpoint) -> int:
    """The id of OP-TEE's partition. Raises TeeError(COMMUNICATION): there is none."""
    answer = endpoint.call(Ffa.PARTITION_INFO_GET, *uuid_to_words(OPTEE_UUID))
    if not answer.ok:
        raise _unusable(f"there is no OP-TEE: {answer!r}")
    try:
        data = endpoint.got(min(answer[2] * max(answer[3], 1), endpoint.buffer_size))
        infos = parse_infos(data, answer[2], endpoint.version)
    except FfaError as e:
        raise _unusable(str(e)) from None
    finally:
        endpoint.call(Ffa.RX_RELEASE)
    if not infos:
        raise _unusable("there is no OP-TEE")
    return infos[0].id


def _pages_of(piece: Range) -> abi.AddressRange:
    """Raises MessageError(BAD_PARAMETERS): it does not start at a page."""
    if piece.address % PAGE_SIZE:
        raise MessageError(Result.BAD_PARAMETERS, "only whole pages can be shared")
    return piece.address, -(-piece.length // PAGE_SIZE)


def _give_outputs(flight: _Flight, outputs: list[Param]) -> None:
    """Into the call's parameters, and from copies into temporary memory."""
    copied = {id(one.param): one for one in flight.copied}
    for param, given in zip(flight.params, outputs, strict=True):
        match param, given:
            case Value(), Value():
                param.a, param.b, param.c = given.a, given.b, given.c
            case MemRef(), MemRef():
                one = copied.get(id(param))
                if one is not None:
                    size = min(given.size, param.size) if one.size is None else one.size
                    _copy(one.copy, one.at, param.memory, param.offset, size)
                param.size = given.size


def _copies_of(rpc: Rpc) -> list[tuple[Memory, MemRef]]:
    """The references of an RPC to memory of which the partition has a copy, each with that."""
    found = []
    for param in rpc.params:
        region = param.memory.handle if isinstance(param, MemRef) and param.memory is not None else None
        if isinstance(param, MemRef) and isinstance(region, FfaRegion) and region.copy is not None:
            found.append((region.copy, param))
    return found


def _copy(source: Memory, at: int, target: Memory | None, to: int, size: int) -> None:
    """Nothing where one of them has gone meanwhile, or must not be written."""
    if target is not None:
        with suppress(ValueError):
            target.write(to, source.read(at, size))


def _unusable(why: str) -> TeeError:
    return TeeError(Result.COMMUNICATION, Origin.COMMS, why)
