"""Server enclaves: instances of services with a name, which clients, TAs and other enclaves acquire and call.

Each call to an enclave is a task of its own, for which the caller's task waits: so one of many calls can be ended
without its caller, whichever side ends.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from tee.calls import Client
from tee.params import Direction
from tee.results import Origin, Result, TeeError
from tee.services import MAX_CHAIN, REGS, CallReturn, EnclaveFlag, Refusal, RefusedError, check_name
from tee.soft.entities import Instance, Program
from tee.soft.inside import inside
from tee.soft.scheduler import CallOut, Park, Task, suspend
from tee.soft.states import ENCLAVE, EnclaveEvent, EnclaveState, InstanceEvent
from tee.soft.ta import MemoryReference, TrustedApplication

if TYPE_CHECKING:
    from tee.soft.driver import SoftTee

_WORD = 1 << 64


@dataclass(frozen=True, slots=True)
class SharedNames:
    """Names that enclaves may share among machines. All three are patterns as of a shell (``clock-*``).

    Machines that match ``sharers`` may create such an enclave for all that match ``users``; who matches either sees
    that there is one.
    """

    names: str
    sharers: str
    users: str


@dataclass(frozen=True, slots=True)
class EnclavePolicy:
    """Who may do what with server enclaves. By default each machine has its own, and nothing is shared."""

    creators: str = "*"  #: machines that may create enclaves, as a pattern
    shared: Sequence[SharedNames] = ()

    def may_create(self, vm: str, name: str, *, shared: bool) -> bool:
        """Whether ``vm`` may create this enclave."""
        if not fnmatchcase(vm, self.creators):
            return False
        return not shared or any(fnmatchcase(vm, rule.sharers) for rule in self._about(name))

    def sees(self, vm: str, name: str) -> bool:
        """Whether ``vm`` may know of a shared enclave of another machine."""
        return self.may_use(vm, name) or any(fnmatchcase(vm, rule.sharers) for rule in self._about(name))

    def may_use(self, vm: str, name: str) -> bool:
        """Whether ``vm`` may acquire it."""
        return any(fnmatchcase(vm, rule.users) for rule in self._about(name))

    def _about(self, name: str) -> list[SharedNames]:
        return [rule for rule in self.shared if fnmatchcase(name, rule.names)]


@dataclass(slots=True, eq=False)
class Enclave:
    """A server enclave of the machine ``vm``. The object itself is what its creator is given."""

    name: str
    vm: str
    shared: bool
    instance: Instance
    ident: int = 0
    state: EnclaveState = EnclaveState.CREATING
    calls: set[Task] = field(default_factory=set)
    waiting: list[Task] = field(default_factory=list)
    """Who waits for there to be none."""


@dataclass(slots=True, eq=False)
class Server:
    """An enclave that somebody has acquired; the object itself is what it is called by."""

    enclave: Enclave
    ident: int = 0
    callers: set[Task] = field(default_factory=set)
    waiting: list[Task] = field(default_factory=list)
    released: bool = False


@dataclass(slots=True, eq=False)
class _Visitor:
    """A call to an enclave, for whoever waits for it: ``outcome`` once it has ended."""

    enclave: Enclave
    caller: Task
    memory: MemoryReference | None
    outcome: CallReturn | TeeError | None = None


class Enclaves:
    """All server enclaves of a TEE."""

    def __init__(self, tee: SoftTee, policy: EnclavePolicy, limit: int) -> None:
        """``limit`` is how many enclaves a machine can have."""
        self._tee = tee
        self._policy = policy
        self._limit = limit
        self._named: dict[str, list[Enclave]] = {}
        self.acquired: Counter[str] = Counter()
        """How many servers the clients of each machine have."""

    def count(self) -> int:
        """How many there are."""
        return sum(map(len, self._named.values()))

    def of(self, vm: str) -> list[Enclave]:
        """Those of a machine."""
        return [enclave for enclaves in self._named.values() for enclave in enclaves if enclave.vm == vm]

    # Names.

    def _visible(self, vm: str, name: str) -> Enclave | None:
        """The enclave that ``vm`` means by ``name``: its own before others'."""
        there = self._named.get(name, ())
        own = next((enclave for enclave in there if enclave.vm == vm), None)
        if own is None and self._policy.sees(vm, name):
            return next((enclave for enclave in there if enclave.shared), None)
        return own

    def _free_name(self, enclave: Enclave) -> None:
        there = self._named[enclave.name]
        there.remove(enclave)
        if not there:
            del self._named[enclave.name]

    # Creating and destroying.

    async def create(self, task: Task, program: Program, octets: bytes, flags: int) -> Enclave:
        """A new enclave of ``program`` for the machine of ``task``.

        :raises RefusedError: MALFORMED, IN_USE, DENIED, LIMIT
        :raises TeeError: NOT_SUPPORTED where the service is no server; what the service says; TARGET_DEAD
        """
        name, vm = check_name(octets), task.context.vm
        if flags & ~int(EnclaveFlag.SHARED):
            raise RefusedError(Refusal.MALFORMED, "unknown flags")
        shared = bool(flags & EnclaveFlag.SHARED)
        if not self._policy.may_create(vm, name, shared=shared):
            raise RefusedError(Refusal.DENIED, f"machine {vm!r} may not create the enclave {name!r}")
        if self._visible(vm, name) is not None:
            raise RefusedError(Refusal.IN_USE, f"there is an enclave {name!r}")
        if len(self.of(vm)) >= self._limit:
            raise RefusedError(Refusal.LIMIT, f"machine {vm!r} has {self._limit} enclaves")
        if program.ta.enclave_call is TrustedApplication.enclave_call:
            raise TeeError(Result.NOT_SUPPORTED, Origin.TEE, f"service {program.uuid} is no server")
        try:
            instance = self._tee.new_concurrent(program, task.context)
        except TeeError as error:
            raise RefusedError(Refusal.LIMIT, error.why) from error
        enclave = Enclave(name, vm, shared, instance)
        self._named.setdefault(name, []).append(enclave)
        try:
            instance.ta = program.ta(instance.env)
            await inside(instance.env, task, instance.ta.create(), lambda wait: not wait.rpc.to_client)
        except BaseException as error:
            self._move(enclave, EnclaveEvent.FAILED)
            if isinstance(error, TeeError):
                self._tee.move_instance(instance, InstanceEvent.FAILED, task.context)
                raise TeeError(_own_code(error), Origin.TRUSTED_APP, error.why) from error
            self._tee.panic(instance, task, error)
            if isinstance(error, Exception):
                raise _target_dead("the service has panicked") from error
            raise
        self._tee.move_instance(instance, InstanceEvent.CREATED, task.context)
        self._move(enclave, EnclaveEvent.CREATED)
        return enclave

    async def destroy(self, task: Task, enclave: Enclave) -> None:
        """End it: its name is free, calls in it end with TARGET_DEAD. Returns when nobody is in it."""
        self._move(enclave, EnclaveEvent.DESTROY)
        while enclave.calls:
            enclave.waiting.append(task)
            await suspend(Park(shielded=True))
        self._move(enclave, EnclaveEvent.EMPTY)
        instance = enclave.instance
        if not self._tee.move_instance(instance, InstanceEvent.EMPTY, task.context):
            return  # it has panicked
        assert instance.ta is not None
        try:
            await inside(instance.env, task, instance.ta.destroy(), lambda wait: not wait.rpc.to_client)
        except TeeError as error:
            self._tee.say(f"TA {instance.program.uuid}: destroy ended with {error}")
        except BaseException as error:
            self._tee.panic(instance, task, error)
            if not isinstance(error, Exception):
                raise
            return
        self._tee.move_instance(instance, InstanceEvent.DESTROYED, task.context)

    def _move(self, enclave: Enclave, event: EnclaveEvent) -> None:
        row = ENCLAVE.get((enclave.state, event))
        if row is not None:
            enclave.state, action = row
            if action:
                getattr(self, f"_{action}")(enclave)

    def _end_calls(self, enclave: Enclave) -> None:
        for call in tuple(enclave.calls):
            call.more().why = "the enclave has ended"
            self._tee.scheduler.force(call)

    def _free_name_and_end_calls(self, enclave: Enclave) -> None:
        self._free_name(enclave)
        self._end_calls(enclave)

    # Acquiring and releasing.

    def acquire(self, vm: str, octets: bytes) -> Server:
        """The enclave that ``vm`` means by a name. Raises RefusedError MALFORMED, NOT_FOUND, DENIED."""
        name = check_name(octets)
        enclave = self._visible(vm, name)
        if enclave is None or enclave.state == EnclaveState.CREATING:
            raise RefusedError(Refusal.NOT_FOUND, f"there is no enclave {name!r}")
        if enclave.vm != vm and not self._policy.may_use(vm, name):
            raise RefusedError(Refusal.DENIED, f"machine {vm!r} may not use the enclave {name!r}")
        return Server(enclave)

    async def release(self, task: Task, server: Server) -> None:
        """Cancel the calls by ``server``, and return after them."""
        server.released = True
        for caller in tuple(server.callers):
            self._tee.scheduler.cancel(caller)
        while server.callers:
            server.waiting.append(task)
            await suspend(Park(shielded=True))

    # Calling.

    async def call(
        self, task: Task, server: Server, client: Client, regs: Sequence[int], memory: MemoryReference | None
    ) -> CallReturn:
        """Call the enclave, in place of ``task``, which waits for it.

        :raises TeeError: TARGET_DEAD where the enclave has ended; ACCESS_CONFLICT where it waits for this very call;
            OVERFLOW; BAD_PARAMETERS; CANCEL; what the enclave says
        """
        enclave = server.enclave
        if len(regs) != REGS or not all(isinstance(reg, int) and 0 <= reg < _WORD for reg in regs):
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"a call has {REGS} register values of 64 bits")
        if memory is not None and memory.direction != Direction.INOUT:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "an enclave's memory is read and written")
        if server.released:
            raise TeeError(Result.BAD_STATE, Origin.TEE, "the enclave was released")
        if enclave.state != EnclaveState.OPEN:
            raise _target_dead("the enclave has ended")
        chain = task.rare.chain if task.rare is not None else ()
        if enclave in chain:
            raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, "the enclave waits for the one that calls it")
        if len(chain) > MAX_CHAIN:
            raise TeeError(Result.OVERFLOW, Origin.TEE, f"more than {MAX_CHAIN} enclaves call one another")
        visitor = _Visitor(enclave, task, None if memory is None else memory.passed_on())
        child = self._child(visitor, client, tuple(regs), (*chain, enclave))
        server.callers.add(task)
        task.more().callee = child
        try:
            self._tee.scheduler.submit(child)
            outcome = await self._wait_for(visitor, child)
        finally:
            task.more().callee = None
            server.callers.discard(task)
            if not server.callers:
                self._wake(server.waiting)
        if isinstance(outcome, TeeError):
            raise outcome
        return outcome

    def _child(self, visitor: _Visitor, client: Client, regs: tuple[int, ...], chain: tuple[Enclave, ...]) -> Task:
        """The task of a call. On behalf of another machine, the enclave is still its own machine's."""
        enclave, caller = visitor.enclave, visitor.caller
        instance = enclave.instance
        own = caller.context.vm == enclave.vm
        child = Task(caller.call, caller.context if own else instance.opened)
        child.needs_thread = False  # it has its caller's
        child.entered = True
        child.instance = instance
        child.more().caller, child.more().chain = caller, chain

        def may_call_out(wait: CallOut) -> bool:
            return own and not wait.rpc.to_client

        def main(task: Task) -> Any:
            ta = instance.ta
            assert ta is not None
            return inside(instance.env, task, ta.enclave_call(client, regs, visitor.memory), may_call_out)

        child.main = main
        child.ended = lambda task, value, error: self._ended(visitor, task, value, error)
        enclave.calls.add(child)
        return child

    async def _wait_for(self, visitor: _Visitor, child: Task) -> CallReturn | TeeError:
        """The outcome of ``child``, which is always waited for: it uses the caller's memory. A cancel is passed on."""
        caller, scheduler = visitor.caller, self._tee.scheduler
        masked = caller.masked
        try:
            while visitor.outcome is None:
                try:
                    await suspend(Park(shielded=caller.forced and child.forced))
                except TeeError:  # the caller is interrupted: by a cancel once, and for good
                    caller.masked = True
                    if caller.forced:
                        scheduler.force(child)
                    else:
                        scheduler.cancel(child)
        except GeneratorExit:  # the caller is ended from outside, and cannot wait
            if visitor.memory is not None:
                visitor.memory.revoke()
            scheduler.force(child)
            raise
        finally:
            caller.masked = masked
        return visitor.outcome

    def _ended(self, visitor: _Visitor, child: Task, value: Any, error: BaseException | None) -> None:
        """A call has ended, with a value or an error."""
        enclave = visitor.enclave
        instance = enclave.instance
        assert child.rare is not None
        self._tee.end_visits(child.rare)
        if error is None and not _is_return(value, visitor.memory):
            error = ValueError(f"enclave_call returned {value!r}")
        if error is not None and not isinstance(error, TeeError):
            self._tee.panic(instance, child, error)
            self._move(enclave, EnclaveEvent.PANIC)
        enclave.calls.discard(child)
        if visitor.memory is not None:
            visitor.memory.revoke()
        if enclave.state != EnclaveState.OPEN:
            visitor.outcome = _target_dead("the enclave has ended")
        elif isinstance(error, TeeError):
            visitor.outcome = TeeError(_own_code(error), Origin.TRUSTED_APP, error.why)
        else:
            visitor.outcome = value
        self._tee.scheduler.wake(visitor.caller, True)
        if not enclave.calls:
            self._wake(enclave.waiting)

    def _wake(self, waiting: list[Task]) -> None:
        while waiting:
            self._tee.scheduler.wake(waiting.pop(), True)


def lineage(task: Task) -> list[Task]:
    """``task``, and those that wait for it because it is their call to an enclave."""
    line = [task]
    while (caller := line[-1].more().caller) is not None:
        line.append(caller)
    return line


def innermost(task: Task) -> Task:
    """The call to an enclave that ``task`` waits for, through as many as there are; or itself."""
    while (callee := task.more().callee) is not None:
        task = callee
    return task


def _is_return(value: Any, memory: MemoryReference | None) -> bool:
    """Whether an enclave has returned what it may."""
    if not isinstance(value, CallReturn):
        return False
    words = (value.value, value.offset, value.size)
    room = 0 if memory is None else memory.capacity
    return all(isinstance(word, int) and 0 <= word < _WORD for word in words) and value.offset + value.size <= room


def _own_code(error: TeeError) -> int:
    code = error.code
    return code if isinstance(code, int) and 0 < code < 1 << 32 else Result.GENERIC


def _target_dead(why: str) -> TeeError:
    return TeeError(Result.TARGET_DEAD, Origin.TEE, why)
