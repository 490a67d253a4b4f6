"""OP-TEE's partition: serves OPTEE_FFA_* on any :class:`~tee.driver.TeeDriver`.

Sans-I/O: the TEE runs while the partition has the processor, which is while a VM's direct request is being answered, or
after FFA_RUN. It never waits: a call for which nothing can be done now comes back with INTERRUPT, and goes on with
RESUME. VMs are not trusted: registers, handles and messages are checked before they are used, messages are read once.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, ClassVar

from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, Frame, halves, pair
from ffa.abi.ids import (
    DIRECT_FRAMEWORK_BIT,
    FLAG_TYPE_SHIFT,
    PAGE_SIZE,
    TRANSACTION_TYPES,
    VERSION_1_2,
    Data,
    Error,
    FfaError,
    FrameworkMessage,
    Property,
    fid,
)
from ffa.abi.ids import Call as Ffa
from ffa.optee.guests import Ask, Guest, Limits, Session, Shm, Thread
from ffa.optee.msg import (
    API_VERSION,
    CANCEL_RESUME,
    CLIENT_COMMANDS,
    HEADER_SIZE,
    MAX_NOTIFICATION,
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
    uuid_of,
)
from ffa.roles.endpoint import Endpoint, respond, response_to
from ffa.roles.machine import Access, AccessFaultError, Machine
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
from tee.driver import AtOnce, Done, Event, InvokesAtOnce, Notification, OffersServices, RpcWithdrawn, TeeDriver
from tee.memory import FfaShare, Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType

log = logging.getLogger(__name__)

RUNS = 64
"""How often the TEE is run for one direct request, at most, where nothing else is said."""
OS_VERSION = (4, 10, 0)

_BAD = Result.BAD_PARAMETERS
_LOGINS = frozenset(Login) - {Login.REE_KERNEL, Login.TRUSTED_APP}
"""What a VM's client can be; the others are the host's own, and a TA's."""
_CODES = {Error.NO_MEMORY: Result.OUT_OF_MEMORY, Error.BUSY: Result.BUSY}
_SHARED = TRANSACTION_TYPES[Ffa.MEM_SHARE] << FLAG_TYPE_SHIFT

Words = tuple[int, ...]
"""w3 to w7 of an answer."""


class OpteePartition(Endpoint):
    """The partition. VMs' memory has to have a backing (:meth:`~ffa.roles.machine.Machine.add`): the TEE works on the
    bytes themselves.

    ``tee`` is the partition's alone; its buffers have to be mapped before the first call. ``names`` says what the TEE
    is told of a VM's name, ``runs`` how often the TEE is run for one direct request, at most. ``proxies`` says whose
    memory a VM may name besides its own: VM → VMs (a host's device, for the guest that it serves).
    """

    def __init__(
        self,
        id: int,
        machine: Machine,
        tee: TeeDriver,
        *,
        limits: Limits | None = None,
        version: int = VERSION_1_2,
        names: Mapping[int, str] | None = None,
        proxies: Mapping[int, Collection[int]] | None = None,
        runs: int = RUNS,
    ) -> None:
        properties = Property.DIRECT_REQ_RECV | Property.NOTIFICATIONS | Property.AARCH64
        properties |= Property.VM_CREATED | Property.VM_DESTROYED
        super().__init__(id, machine, uuid=OPTEE_UUID, properties=properties, version=version)
        self.tee = tee
        self.limits = limits or Limits()
        self.names = names or {}
        self.proxies = proxies or {}
        self._runs = runs
        self.due: float | None = None  #: when the TEE wants to run again, as it has said last
        self._rpc_params = self.limits.rpc_params
        self._rpc_arg_size = message_size(self._rpc_params)
        self.guests: dict[int, Guest] = {}
        self._threads: dict[int, Thread] = {}
        self._idents = itertools.count(1)
        self._by_call: dict[Call, Thread] = {}
        self._ends: dict[Call, Callable[[Done], None]] = {}
        self._at_once = tee.invoke_at_once if isinstance(tee, InvokesAtOnce) else None
        self._leaving: set[Guest] = set()
        """VMs that are gone, and of which the TEE still has something."""
        self._given: dict[Rpc, tuple[Guest, MemRef]] = {}
        """SHM_ALLOCs whose memory the TEE has."""
        tee.attach(self._take)

    def usage(self) -> dict[str, int]:
        """How many there are now of what the partition keeps."""
        guests = self.guests.values()
        return {
            "threads": len(self._threads),
            "sessions": sum(len(g.sessions) for g in guests),
            "regions": sum(len(g.shms) for g in guests),
            "lent": sum(len(g.lent) for g in guests),
        }

    def end(self, vm: int) -> None:
        """The VM is gone: its calls end, its sessions close, its memory is relinquished, as fast as the TEE can."""
        guest = self.guests.pop(vm, None)
        if guest is None:
            return
        guest.ended = True
        self._leaving.add(guest)
        for thread in list(guest.threads.values()):
            thread.then = None
            for ask in [*thread.asks, *([thread.asked] if thread.asked is not None else ())]:
                if ask.own is None and not ask.withdrawn:
                    self.tee.answer(ask.rpc, RpcReply(Result.COMMUNICATION))
            self._leave(thread)
        if guest.context is not None:
            self._start(CloseContext(owner=guest, context=guest.context), partial(self._guest_gone, guest))
        elif guest.opening is None:
            self._let_go(guest)
        self.work()

    def _guest_gone(self, guest: Guest, done: Done) -> None:
        self._let_go(guest)

    def _let_go(self, guest: Guest) -> None:
        for shm in list(guest.shms.values()):
            self._relinquish(guest, shm)
        if isinstance(self.tee, OffersServices):
            self.tee.forget_machine(f"vm{guest.vm}")
        self._leaving.discard(guest)

    def _created(self, vm: int) -> int:
        if vm in self.guests:
            return Error.INVALID_PARAMETERS
        return Error.RETRY if any(guest.vm == vm for guest in self._leaving) else 0

    def _destroyed(self, vm: int) -> int:
        """RETRY: the TEE still has something of it."""
        self.end(vm)
        for guest in self.guests.values():
            for shm in [s for s in guest.shms.values() if s.owner == vm and not s.users and s.registering is None]:
                self._begin_unregister(guest, shm)
        self.work()
        left = any(guest.vm == vm for guest in self._leaving)
        left |= any(shm.owner == vm for guest in self.guests.values() for shm in guest.shms.values())
        return Error.RETRY if left else 0

    _FRAMEWORK: ClassVar[dict[int, Callable[[Any, int], int]]] = {
        FrameworkMessage.VM_CREATED: _created,
        FrameworkMessage.VM_DESTROYED: _destroyed,
    }

    # -- FF-A

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        """Answers direct requests; FFA_RUN lets the TEE work."""
        function = frame[0] & MASK32
        if function not in _REQUESTS:
            if response_to(function) is not None:
                return respond(frame, Result.NOT_SUPPORTED)
            self.work()
            return Frame.of(Ffa.MSG_WAIT)
        x = frame.narrow
        if x[2] and (framework := self._FRAMEWORK.get(x[2] ^ DIRECT_FRAMEWORK_BIT)) is not None:
            answer = respond(frame, framework(self, x[5]) & MASK32)
            return Frame(*answer[:2], x[2] + 1, *answer[3:])
        serve = self._SERVICES.get(x[3])
        if serve is None:
            return respond(frame, Result.NOT_SUPPORTED)
        vm = x[1] >> 16
        guest = self.guests.get(vm)
        if guest is None:
            guest = self.guests[vm] = Guest(vm, self.limits, self.names.get(vm, f"vm{vm}"))
        try:
            return respond(frame, *serve(self, guest, x))
        except MessageError as e:
            log.debug("vm %s: %s refused: %s", vm, Service(x[3]).name, e)
            return respond(frame, e.code)

    def work(self) -> None:
        """Lets the TEE work, outside of any request."""
        for _ in range(self._runs):
            if not self._run():
                break

    def _run(self) -> bool:
        """Lets the TEE work; whether it has more to do."""
        self.due = self.tee.run()
        return self.due == 0

    def _api_version(self, guest: Guest, x: Frame) -> Words:
        return API_VERSION

    def _os_version(self, guest: Guest, x: Frame) -> Words:
        return OS_VERSION

    def _exchange(self, guest: Guest, x: Frame) -> Words:
        return 0, self._rpc_params, Capability.ARG_OFFSET | Capability.ASYNC_NOTIF, MAX_NOTIFICATION

    def _enable_notifications(self, guest: Guest, x: Frame) -> Words:
        if x[4] > MAX_NOTIFICATION:
            raise MessageError(_BAD, f"there is no notification {x[4]}")
        guest.notification = x[4]
        if guest.values:
            self._notify(guest)
        return (0,)

    def _unregister(self, guest: Guest, x: Frame) -> Words:
        shm = guest.shms.get(pair(x[4], x[5]))
        if shm is None:
            raise MessageError(Result.ITEM_NOT_FOUND, "the partition does not have it")
        if shm.users or shm.registering is not None:
            raise MessageError(Result.BUSY, "in use")
        self._begin_unregister(guest, shm)
        for _ in range(self._runs):
            more = self._run()
            if shm.unregistering is None or not more:
                break
        if guest.shms.get(shm.handle) is shm:
            raise MessageError(Result.BUSY, "the TEE still has it")
        return (0,)

    def _begin_unregister(self, guest: Guest, shm: Shm) -> None:
        """Ends a registration, and the retrieval with it; at once where the TEE does not know it."""
        if not shm.ready:
            self._relinquish(guest, shm)
        elif shm.unregistering is None:
            shm.unregistering = UnregisterMemory(owner=guest, context=guest.context, memory=shm.memory)
            self._start(shm.unregistering, partial(self._unregistered, guest, shm))

    def _unregistered(self, guest: Guest, shm: Shm, done: Done) -> None:
        shm.unregistering = None
        if done.code == Result.SUCCESS:
            self._relinquish(guest, shm)

    def _call_with_arg(self, guest: Guest, x: Frame) -> Words:
        shm, at = self._shm(guest, pair(x[4], x[5])), x[6]
        message, params = self._read(guest, shm, at)
        try:
            begin = self._COMMANDS.get(message.cmd)
            if begin is None:
                raise MessageError(Result.NOT_IMPLEMENTED, f"no command {message.cmd}")
            wires = unpack_params(params) if params else []
        except MessageError as e:
            log.debug("vm %s: message refused: %s", guest.vm, e)
            message.end(e.code, Origin.TEE)
            shm.memory.write(at, message.pack())
            return _DONE
        if message.cmd == _INVOKE and self._at_once is not None:
            words = self._invoke_at_once(self._at_once, guest, shm, at, message, wires)
            if words is not None:
                return words
        thread = self._thread(guest, shm, at, message, wires)
        try:
            begin(self, thread)
        except MessageError as e:
            log.debug("vm %s: message refused: %s", guest.vm, e)
            thread.end(e.code, Origin.TEE)
        return self._go_on(thread)

    def _invoke_at_once(
        self, at_once: AtOnce, guest: Guest, shm: Shm, at: int, message: Message, wires: list[Wire]
    ) -> Words | None:
        """The answer to an INVOKE that could begin at once. None: nothing has happened, and that takes a thread and a
        call, be it to refuse it."""
        session = guest.sessions.get(message.session)
        if session is None or session.closing:
            return None
        params: list[Param] = []
        if wires:
            if len(wires) > TEE_PARAMS or any(wire.meta for wire in wires):
                return None
            try:
                params = [to_param(wire, guest.ready) for wire in wires]
            except MessageError:
                return None
        outcome = at_once(session.handle, message.func, params)
        if outcome is None:
            return None
        if isinstance(outcome, tuple):
            message.end(*outcome)
            _write_outcome(shm.memory, at, message, wires, params)
            self.due = self.tee.run()
            return _DONE
        thread = self._thread(guest, shm, at, message, wires)
        thread.params = params
        for wire in wires:
            if isinstance(wire, Fmem) and not wire.null:
                thread.hold(guest.shms[wire.handle])
        call = Invoke(owner=guest, session=session.handle, func=message.func, params=params)
        self._by_call[call], self._ends[call] = thread, partial(self._ended, thread)
        thread.call = call
        outcome.becomes(call)
        return self._go_on(thread)

    def _resume(self, guest: Guest, x: Frame) -> Words:
        thread = guest.threads.get(x[7])
        if thread is None:
            raise MessageError(_BAD, f"nothing to resume by {x[7]:#x}")
        ask, thread.asked = thread.asked, None
        if ask is not None:
            self._answered(thread, ask)
        return self._go_on(thread)

    _SERVICES: ClassVar[dict[int, Callable[[Any, Guest, Frame], Words]]] = {
        Service.GET_API_VERSION: _api_version,
        Service.GET_OS_VERSION: _os_version,
        Service.EXCHANGE_CAPABILITIES: _exchange,
        Service.UNREGISTER_SHM: _unregister,
        Service.ENABLE_ASYNC_NOTIF: _enable_notifications,
        Service.CALL_WITH_ARG: _call_with_arg,
        Service.RESUME: _resume,
    }

    # -- memory

    def _shm(self, guest: Guest, handle: int) -> Shm:
        """The region of a handle, retrieved now if it is not yet. Raises MessageError."""
        found = guest.shms.get(handle)
        if found is not None:
            if found.unregistering is not None:
                raise MessageError(_BAD, f"{handle:#x} is being unregistered")
            return found
        return self._retrieve(guest, FfaShare(handle, owner=guest.vm))

    def _retrieve(self, guest: Guest, share: FfaShare, permissions: int = 0) -> Shm:
        """A region of ``guest``'s from now on, with all permissions or those that are named. Raises MessageError."""
        handle = share.handle
        if len(guest.shms) >= self.limits.regions:
            raise MessageError(Result.OUT_OF_MEMORY, "too many regions: unregister some")
        receivers = (abi.Receiver(self.id, permissions),)
        answer, data = self.retrieve(abi.Transaction(share.owner, receivers, 0, _SHARED, handle, share.tag))
        if answer.fid != fid(Ffa.MEM_RETRIEVE_RESP):
            code = _CODES.get(answer.error, _BAD) if answer.error is not None else _BAD
            raise MessageError(code, f"{handle:#x} cannot be retrieved: {answer!r}")
        try:
            memory = self._views(share, data)
        except (FfaError, AccessFaultError, ValueError) as e:
            self.relinquish(handle)
            raise MessageError(Result.NOT_SUPPORTED, f"{handle:#x} cannot be used: {e}") from None
        found = guest.shms[handle] = Shm(handle, share.owner, memory)
        return found

    def _views(self, share: FfaShare, data: bytes) -> Memory:
        """The memory that a retrieve response describes. Raises FfaError, AccessFaultError, ValueError."""
        (receiver,) = abi.parse(data, self.version).receivers
        read_only = receiver.permissions & 3 != Data.RW
        composite = abi.parse_composite(data, receiver.composite)
        access = Access.R if read_only else Access.RW
        ranges = abi.parse_ranges(data[composite.ranges :])
        views = [self.machine.view(self.id, address, pages * PAGE_SIZE, access) for address, pages in ranges]
        return Memory(views, read_only=read_only, ffa=share)

    def _relinquish(self, guest: Guest, shm: Shm) -> None:
        shm.memory.forget()
        del guest.shms[shm.handle]
        answer = self.relinquish(shm.handle)
        if not answer.ok:
            log.warning("vm %s: %#x cannot be relinquished: %r", guest.vm, shm.handle, answer)

    def _hold(self, thread: Thread, handle: int) -> Memory:
        """The memory of a handle, in use until the thread's end. Raises MessageError."""
        shm = self._shm(thread.guest, handle)
        thread.hold(shm)
        return shm.memory

    def _register(self, thread: Thread) -> None:
        """Goes on with the thread when the TEE knows its VM and its memory."""
        guest = thread.guest
        if thread.then is None:
            return
        if guest.context is None:
            if guest.opening is None:
                guest.opening = OpenContext(owner=guest, vm=guest.name)
                self._start(guest.opening, partial(self._context_opened, guest))
            return
        ready = True
        for shm in thread.held:
            if shm is not thread.shm and not shm.ready:
                ready = False
                if shm.registering is None:
                    shm.registering = RegisterMemory(owner=guest, context=guest.context, memory=shm.memory)
                    self._start(shm.registering, partial(self._registered, guest, shm))
        if ready:
            then, thread.then = thread.then, None
            then(Result.SUCCESS)

    def _context_opened(self, guest: Guest, done: Done) -> None:
        guest.opening = None
        if done.code == Result.SUCCESS:
            guest.context = done.value
            if guest.ended:
                self._start(CloseContext(owner=guest, context=guest.context), partial(self._guest_gone, guest))
        elif guest.ended:
            self._let_go(guest)
        self._registered_or_not([t for t in guest.threads.values() if t.then is not None], done.code)

    def _registered(self, guest: Guest, shm: Shm, done: Done) -> None:
        shm.registering = None
        self._registered_or_not([t for t in guest.threads.values() if t.then is not None and shm in t.held], done.code)

    def _registered_or_not(self, threads: list[Thread], code: int) -> None:
        for thread in threads:
            if code == Result.SUCCESS:
                self._register(thread)
            elif thread.then is not None:
                then, thread.then = thread.then, None
                then(code)

    # -- threads

    def _read(self, guest: Guest, shm: Shm, at: int) -> tuple[Message, bytes]:
        """The message at an offset, and its parameters. Raises MessageError: it cannot be one, or there are too many
        threads."""
        memory = shm.memory
        if at % 8 or at + HEADER_SIZE > memory.size or memory.read_only:
            raise MessageError(_BAD, f"no message at {at} of {memory.size} bytes")
        message = Message.unpack(memory.read(at, HEADER_SIZE))
        count = message.num_params
        end = at + HEADER_SIZE + count * PARAM_SIZE
        if count > META_PARAMS + TEE_PARAMS or end + self._rpc_arg_size > memory.size:
            raise MessageError(_BAD, f"a message with {count} parameters at {at} of {memory.size} bytes")
        # there is always one for those that end at once
        full = len(guest.threads) >= self.limits.threads_per_vm or len(self._threads) >= self.limits.threads
        if full and message.cmd not in _WITHOUT_THREAD:
            raise MessageError(Result.BUSY, "no thread is free")
        return message, memory.read(at + HEADER_SIZE, count * PARAM_SIZE) if count else b""

    def _thread(self, guest: Guest, shm: Shm, at: int, message: Message, wires: list[Wire]) -> Thread:
        """A thread for the message at an offset."""
        rpc_at = at + message_size(message.num_params)
        thread = Thread(next(self._idents) & 0xFFFF_FFFF, guest, shm, at, rpc_at, message, wires)
        thread.hold(shm)
        self._threads[thread.ident] = guest.threads[thread.ident] = thread
        return thread

    def _leave(self, thread: Thread) -> None:
        for rpc in thread.lent:
            _, given = self._given.pop(rpc, (None, None))
            if given is not None and given.memory is not None:
                thread.guest.give_back(given.memory)  # the TEE uses it no longer than the call lasts
        for shm in thread.held:
            shm.users -= 1
        del self._threads[thread.ident], thread.guest.threads[thread.ident]

    def _go_on(self, thread: Thread) -> Words:
        """Lets the TEE work until the thread has something to say, or nothing can be done now."""
        for _ in range(self._runs):
            if (thread.done and thread.then is None) or thread.asks or not self._run():
                break
        while thread.asks:
            ask = thread.asks.popleft()
            if self._ask(thread, ask):
                return 0, Yield.RPC_CMD, 0, 0, thread.ident
        if thread.done and thread.then is None:
            _write_outcome(thread.shm.memory, thread.at, thread.message, thread.wires, thread.params, thread.first)
            self._leave(thread)
            return _DONE
        return 0, Yield.INTERRUPT, 0, 0, thread.ident

    def _start(self, call: Call, end: Callable[[Done], None]) -> None:
        self._ends[call] = end
        self.tee.start(call)

    def _start_in(self, thread: Thread, call: Call, end: Callable[[Done], None]) -> None:
        thread.call = call
        self._by_call[call] = thread
        self._start(call, end)

    # -- commands

    def _take_params(self, thread: Thread, first: int) -> None:
        """What the TA is given: those from ``first`` on. Raises MessageError."""
        thread.wires, thread.first = thread.wires[first:], first
        if len(thread.wires) > TEE_PARAMS or any(wire.meta for wire in thread.wires):
            raise MessageError(_BAD, "more parameters than a TA can be given, or meta parameters among them")
        thread.params = [to_param(wire, partial(self._hold, thread)) for wire in thread.wires]

    def _open_session(self, thread: Thread) -> None:
        guest = thread.guest
        match thread.wires[:META_PARAMS]:
            case [
                Value(direction=Direction.IN, meta=True) as ta,
                Value(direction=Direction.IN, meta=True) as client,
            ]:
                pass
            case _:
                raise MessageError(_BAD, "OPEN_SESSION without its meta parameters")
        if client.c not in _LOGINS:
            raise MessageError(Result.ACCESS_DENIED, f"a VM's client cannot log in as {client.c:#x}")
        if len(guest.sessions) + guest.opening_sessions >= self.limits.sessions:
            raise MessageError(Result.OUT_OF_MEMORY, "too many sessions: close some")
        self._take_params(thread, META_PARAMS)
        thread.message.session = 0
        identity = Client(client.c, uuid_of(client), guest.name)
        guest.opening_sessions += 1

        def then(code: int) -> None:
            if code:
                guest.opening_sessions -= 1
                thread.end(code, Origin.TEE)
                return
            call = OpenSession(
                owner=guest, context=guest.context, uuid=uuid_of(ta), client=identity, params=thread.params
            )
            self._start_in(thread, call, partial(self._session_opened, thread))

        thread.then = then
        self._register(thread)

    def _session_opened(self, thread: Thread, done: Done) -> None:
        thread.guest.opening_sessions -= 1
        ident = thread.guest.new_session(done.value) if done.code == Result.SUCCESS else 0
        thread.end(done.code, done.origin, ident)

    def _invoke(self, thread: Thread) -> None:
        guest, message = thread.guest, thread.message
        guest.session(message.session)
        self._take_params(thread, 0)

        def then(code: int) -> None:
            session = guest.sessions.get(message.session)
            if code or session is None or session.closing:
                thread.end(code or _BAD, Origin.TEE)
                return
            call = Invoke(owner=guest, session=session.handle, func=message.func, params=thread.params)
            self._start_in(thread, call, partial(self._ended, thread))

        thread.then = then
        self._register(thread)

    def _ended(self, thread: Thread, done: Done) -> None:
        thread.end(done.code, done.origin)

    def _close_session(self, thread: Thread) -> None:
        session = thread.guest.session(thread.message.session)
        session.closing = True
        call = CloseSession(owner=thread.guest, session=session.handle)
        self._start_in(thread, call, partial(self._session_closed, thread, session))

    def _session_closed(self, thread: Thread, session: Session, done: Done) -> None:
        if done.code == Result.SUCCESS:
            thread.guest.sessions.pop(thread.message.session, None)
        session.closing = False
        thread.end(done.code, done.origin)

    def _cancel(self, thread: Thread) -> None:
        wanted = thread.message
        for other in list(thread.guest.threads.values()):
            message = other.message
            if other is thread or other.done or message.cmd not in _CANCELLED or message.session != wanted.session:
                continue
            if message.cancel_id == wanted.cancel_id:
                if other.call is not None:
                    self.tee.cancel(other.call)
                    self.work()
                    if other.asked is not None and other.asked.withdrawn:
                        wanted.func = CANCEL_RESUME
                elif other.then is not None:
                    then, other.then = other.then, None
                    then(Result.CANCEL)
                thread.end(Result.SUCCESS, Origin.TEE)
                return
        raise MessageError(Result.ITEM_NOT_FOUND, "no such call")

    def _register_shm(self, thread: Thread) -> None:
        """Takes memory that another VM has shared, for a VM that may speak for it. What is not that VM's, and what was
        never shared, are told apart by nobody."""
        guest = thread.guest
        if guest.vm not in self.proxies:
            raise MessageError(Result.NOT_IMPLEMENTED, "for VMs that speak for others")
        match thread.wires:
            case [
                Value(direction=Direction.IN, meta=True, a=handle, b=tag, c=owner),
                Value(direction=Direction.IN, meta=True, a=size, b=flags),
            ] if not flags & ~REGISTER_READ_ONLY:
                pass
            case _:
                raise MessageError(_BAD, "REGISTER_SHM without its meta parameters, or with unknown flags")
        if owner not in self.proxies[guest.vm]:
            raise MessageError(Result.ACCESS_DENIED, f"VM {guest.vm:#x} does not speak for {owner:#x}")
        if any(handle in g.shms and g.shms[handle].owner == owner for g in self.guests.values()):
            raise MessageError(Result.BUSY, f"{handle:#x} is registered already")
        try:
            shm = self._retrieve(guest, FfaShare(handle, tag, owner), Data.RO if flags else Data.NOT_SPECIFIED)
        except MessageError as e:
            code = Result.ITEM_NOT_FOUND if e.code == _BAD else e.code
            raise MessageError(code, str(e)) from None
        if shm.memory.size != size or (shm.memory.read_only and not flags):
            code = _BAD if shm.memory.size != size else Result.ACCESS_DENIED
            self._relinquish(guest, shm)
            raise MessageError(code, f"{handle:#x} has another size, or is read-only")
        thread.end(Result.SUCCESS, Origin.TEE)

    def _bottom_half(self, thread: Thread) -> None:
        """What was raised since the last time, each value by an RPC."""
        values = thread.guest.values
        while values:
            self._own(thread, RpcCommand.NOTIFICATION, Value(Direction.IN, NOTIFY_SEND, values.popleft()))
        thread.end(Result.SUCCESS, Origin.TEE)

    def _stop_notifications(self, thread: Thread) -> None:
        thread.guest.notification = None
        thread.guest.values.clear()
        thread.end(Result.SUCCESS, Origin.TEE)

    _COMMANDS: ClassVar[dict[int, Callable[[Any, Thread], None]]] = {
        Command.OPEN_SESSION: _open_session,
        Command.INVOKE_COMMAND: _invoke,
        Command.CLOSE_SESSION: _close_session,
        Command.CANCEL: _cancel,
        Command.REGISTER_SHM: _register_shm,
        Command.DO_BOTTOM_HALF: _bottom_half,
        Command.STOP_ASYNC_NOTIF: _stop_notifications,
    }

    # -- RPCs

    def _own(self, thread: Thread, command: int, wire: Wire) -> None:
        thread.asks.append(Ask(Rpc(command, []), own=[wire]))

    def _ask(self, thread: Thread, ask: Ask) -> bool:
        """Puts an RPC into the thread's RPC argument; whether it could be. The TEE is told if not."""
        guest, rpc = thread.guest, ask.rpc
        try:
            wires = self._question(guest, rpc) if ask.own is None else ask.own
            if len(wires) > self._rpc_params:
                raise MessageError(Result.NOT_SUPPORTED, f"an RPC with {len(wires)} parameters")
            command = CLIENT_COMMANDS[rpc.command] if rpc.to_client else rpc.command
            data = Message(command, num_params=len(wires)).pack() + pack_params(wires)
        except MessageError as e:
            log.warning("an RPC of the TEE cannot be sent: %s", e)
            if ask.own is None:
                self.tee.answer(rpc, RpcReply(e.code))
            return False
        thread.shm.memory.write(thread.rpc_at, data)
        thread.asked = ask
        return True

    def _question(self, guest: Guest, rpc: Rpc) -> list[Wire]:
        """The parameters of an RPC. Raises MessageError."""
        if rpc.command != RpcCommand.SHM_FREE:
            return [to_wire(param, lambda memory: guest.shm_of(memory).handle) for param in rpc.params]
        match rpc.params:
            case [Value(a=kind), MemRef(memory=Memory() as memory)]:
                shm = guest.shm_of(memory)
                guest.give_back(memory)
                for given in [r for r, (_, ref) in self._given.items() if ref.memory is memory]:
                    del self._given[given]
                return [Value(Direction.IN, kind, shm.handle)]
        raise MessageError(Result.GENERIC, "a SHM_FREE that makes no sense")

    def _answered(self, thread: Thread, ask: Ask) -> None:
        """The VM has answered an RPC; what it says is read once."""
        rpc, memory = ask.rpc, thread.shm.memory
        message = Message.unpack(memory.read(thread.rpc_at, HEADER_SIZE))
        try:
            count = message.num_params
            if count > self._rpc_params:
                raise MessageError(Result.COMMUNICATION, f"an answer with {count} parameters")
            wires = unpack_params(memory.read(thread.rpc_at + HEADER_SIZE, message_size(count) - HEADER_SIZE))
            if rpc.command == RpcCommand.SHM_ALLOC:
                self._allocated(thread, ask, message.ret, wires)
                return
            if ask.own is not None:
                return
            if rpc.command == RpcCommand.SHM_FREE:
                reply = RpcReply(message.ret)
            else:
                reply = RpcReply(message.ret, take_outputs(rpc.params, wires, message.ret), message.ret_origin)
        except MessageError as e:
            log.debug("vm %s: answer refused: %s", thread.guest.vm, e)
            reply = RpcReply(Result.COMMUNICATION)
        self._reply(ask, reply)

    def _reply(self, ask: Ask, reply: RpcReply) -> None:
        if ask.own is None and not ask.withdrawn:
            self.tee.answer(ask.rpc, reply)

    def _allocated(self, thread: Thread, ask: Ask, code: int, wires: list[Wire]) -> None:
        """The answer to a SHM_ALLOC: memory of the VM's, at least as much as was asked for. Raises MessageError."""
        if code != Result.SUCCESS:
            self._reply(ask, RpcReply(code))
            return
        match wires:
            case [Fmem(direction=direction, null=False) as wire] if direction.is_output:
                pass
            case _:
                raise MessageError(Result.COMMUNICATION, "SHM_ALLOC is answered with one output memory reference")
        asked = ask.rpc.params[0] if ask.rpc.params else Nothing()
        held = len(thread.held)
        try:
            if isinstance(asked, Value) and wire.size < asked.b:
                raise MessageError(Result.COMMUNICATION, f"{wire.size} bytes where {asked.b} were asked for")
            found = to_param(wire, partial(self._hold, thread))
        except MessageError:
            for shm in thread.held[held:]:
                shm.users -= 1
            del thread.held[held:]
            self._free(thread, wire.handle)
            raise
        assert isinstance(found, MemRef)
        assert found.memory is not None
        given = MemRef(Direction.INOUT, found.memory, found.offset, found.size)
        shm = thread.guest.shm_of(found.memory)

        def then(code: int) -> None:
            thread.held.remove(shm)
            thread.taking = None
            if code:
                shm.users -= 1
                self._free(thread, shm.handle)
                self._reply(ask, RpcReply(Result.COMMUNICATION))
            elif ask.withdrawn:
                shm.users -= 1
                self._free(thread, shm.handle)
            else:
                thread.guest.lent.append(shm)
                thread.lent.append(ask.rpc)
                self._given[ask.rpc] = thread.guest, given
                self.tee.answer(ask.rpc, RpcReply(Result.SUCCESS, [given]))

        thread.taking, thread.then = ask, then
        self._register(thread)

    def _free(self, thread: Thread, handle: int) -> None:
        """The VM has given memory that nobody can use."""
        self._own(thread, RpcCommand.SHM_FREE, Value(Direction.IN, ShmType.APPLICATION, handle))

    # -- events of the TEE

    def _take(self, event: Event) -> None:
        match event:
            case Done():
                self._by_call.pop(event.call, None)
                end = self._ends.pop(event.call, None)
                if end is not None:
                    end(event)
            case Rpc():
                thread = self._by_call.get(event.call) if event.call is not None else None
                if thread is None or thread.guest.ended:
                    self.tee.answer(event, RpcReply(Result.COMMUNICATION))
                else:
                    thread.asks.append(Ask(event))
            case RpcWithdrawn():
                self._withdrawn(event.rpc)
            case Notification():
                if isinstance(event.owner, Guest):
                    self._notified(event.owner, event.value)

    def _withdrawn(self, rpc: Rpc) -> None:
        thread = self._by_call.get(rpc.call) if rpc.call is not None else None
        guest, given = self._given.pop(rpc, (None, None))
        if guest is not None and given is not None and given.memory is not None:
            guest.give_back(given.memory)
            if thread is not None and given.memory.ffa is not None:
                self._free(thread, given.memory.ffa.handle)
        if thread is None:
            return
        for ask in list(thread.asks):
            if ask.rpc is rpc:
                thread.asks.remove(ask)
        for had in (thread.asked, thread.taking):
            if had is not None and had.rpc is rpc:
                had.withdrawn = True

    def _notified(self, guest: Guest, value: int) -> None:
        if value in guest.values:
            return
        if guest.ended or len(guest.values) >= self.limits.notifications:
            log.warning("vm %s: notification %#x is lost", guest.vm, value)
            return
        guest.values.append(value)
        if guest.notification is not None:
            self._notify(guest)

    def _notify(self, guest: Guest) -> None:
        assert guest.notification is not None
        answer = self.call(Ffa.NOTIFICATION_SET, self.id << 16 | guest.vm, 0, *halves(1 << guest.notification))
        if not answer.ok:
            log.debug("vm %s: cannot be notified: %r", guest.vm, answer)


_CANCELLED = frozenset({Command.OPEN_SESSION, Command.INVOKE_COMMAND})
_REQUESTS = fid(Ffa.MSG_SEND_DIRECT_REQ), fid(Ffa.MSG_SEND_DIRECT_REQ, True)
_INVOKE = int(Command.INVOKE_COMMAND)
_WITHOUT_THREAD = frozenset({Command.CANCEL, Command.REGISTER_SHM})
_DONE: Words = (0, int(Yield.DONE))


def _write_outcome(
    memory: Memory, at: int, message: Message, wires: list[Wire], params: list[Param], first: int = 0
) -> None:
    """Writes a message back that has ended, with the outputs of its parameters from number ``first`` on."""
    if params:
        try:
            outputs = [_output(wire, param) for wire, param in zip(wires, params, strict=True)]
        except MessageError as e:
            log.error("the TEE has given what no message can hold: %s", e)
            outputs = []
            message.end(Result.GENERIC, Origin.TEE)
        for number, written in enumerate(outputs, first):
            if written is not None:
                memory.write(at + message_size(number), written)
    memory.write(at, message.pack())


def _output(wire: Wire, param: Param) -> bytes | None:
    """What is written back of a parameter that came as ``wire``; None: nothing."""
    match wire, param:
        case Value(direction=direction), Value() if direction.is_output:
            return pack_params([param])
        case Fmem(direction=direction), MemRef() if direction.is_output:
            return pack_params([Fmem(direction, wire.offset, param.size, wire.handle)])
    return None
