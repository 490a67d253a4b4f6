"""The software TEE as a :class:`~tee.driver.TeeDriver`: who may call what, which instance serves it, and how all of
it ends.
"""

from __future__ import annotations

import secrets
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any
from uuid import UUID

from tee import attestation, package
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
from tee.driver import Begun, Done, Event, GenCap, Notification, Outcome, RpcWithdrawn, Sink, TeeInfo, TeeKind
from tee.memory import Memory
from tee.params import Param
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcReply
from tee.services import (
    NONCE_SIZE,
    SERVICES_UUID,
    CallReturn,
    Loaded,
    Refusal,
    RefusedError,
    ServiceCall,
    ServiceFlag,
    ServiceList,
)
from tee.services import Service as ListedService
from tee.soft.desk import CANCELLABLE, SERVED, Desk
from tee.soft.enclaves import Enclave, EnclavePolicy, Enclaves, Server, innermost, lineage
from tee.soft.entities import Context, Instance, Program, Registration, Session, Visit
from tee.soft.grpc import GenericRpc
from tee.soft.inbox import Inbox
from tee.soft.inside import inside
from tee.soft.limits import SoftLimits
from tee.soft.loader import Loader
from tee.soft.ocalls import Ocalls
from tee.soft.outside import Borrowed, Outside
from tee.soft.params import Pairs, admit, bring_back, check_sizes, let_go, pass_on, registration_of, write_back
from tee.soft.scheduler import Park, Rare, Scheduler, Task, Wait, suspend
from tee.soft.services import Services, measured
from tee.soft.states import (
    CONTEXT,
    INSTANCE,
    SESSION,
    CallState,
    ContextEvent,
    ContextState,
    InstanceEvent,
    InstanceState,
    SessionEvent,
    SessionState,
)
from tee.soft.storage import Storage, Vault
from tee.soft.ta import Environment, MemoryReference, Parameters, TaParam, TrustedApplication, properties_of
from tee.soft.workers import Workers

#: How many calls to begin and coroutines to step in one :meth:`SoftTee.run`.
STEPS_PER_RUN = 64

#: … and for how many seconds: whoever calls it has others to look after, and a cancel may be among what waits there.
RUN_TIME = 0.002

_OPEN, _CONTEXT_OPEN = SessionState.OPEN, ContextState.OPEN
_NO_PARAMETERS: tuple[Parameters, Pairs, list[Registration]] = (Parameters(), [], [])
_WELL: Outcome = (int(Result.SUCCESS), int(Origin.TRUSTED_APP))


class SoftTee:
    """A TEE without a secure world: TAs are Python coroutines in this process.

    :param clock: seconds of a monotonic clock (``time.monotonic``)
    :param random: gives n bytes of cryptographic quality (``secrets.token_bytes``)
    :param keys: public keys (PEM, or objects of ``cryptography``) of those who may sign TAs; none: no TA is loaded by
        RPC
    :param built_in: TAs that are there without being loaded
    :param threads: how many calls can be inside TAs at once; others wait their turn, machine by machine. A machine
        that has none inside gets a thread of its own, so that none can keep another one out
    :param max_ta_size: the largest TA package, in bytes
    :param limits: how much of everything there is
    :param longest_call: seconds that a call may take from the first time that it waits; then what it waits for is
        refused, and a TA that goes on nevertheless is ended. A TA that never waits is out of reach: it holds the
        whole TEE
    :param storage_key: the device key under which TAs' objects are stored, at least 16 secret bytes; none: a random
        one that is thrown away, and with it all that was stored, when this TEE ends
    :param host_tas: gives a TA package that lies on the host, or None. It is asked where the caller's supplicant has
        none, or nobody answers for it
    :param workers: for work that cannot be cut into steps (TAs' ``env.work``, and ``host_tas``); none: it is done at
        once, and all else waits
    :param attestation_key: the private key (PEM, or an object of ``cryptography``) that signs statements about
        services; none: one that is made when it is first needed, and thrown away
    :param enclaves: who may create, share and acquire server enclaves; none: each machine has its own
    :param log: takes lines for whoever operates the TEE: panics, refused packages, what TAs log
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        keys: Sequence[bytes | package.PublicKey] = (),
        built_in: Mapping[UUID, type[TrustedApplication]] | None = None,
        threads: int = 4,
        max_ta_size: int = package.MAX_PACKAGE,
        limits: SoftLimits | None = None,
        longest_call: float | None = None,
        storage_key: bytes | None = None,
        host_tas: Callable[[UUID], bytes | None] | None = None,
        workers: Workers | None = None,
        attestation_key: bytes | package.PrivateKey | None = None,
        enclaves: EnclavePolicy | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._clock = clock
        self._random = random
        self._log = log if log is not None else _no_log
        self.limits = limits if limits is not None else SoftLimits()
        outside = Outside(self._new_use, self._end_use)
        self._host_tas = host_tas
        self._workers = workers
        self._working = 0  # pieces of work that the workers have
        self._ocalls = Ocalls(outside)
        self._loader = Loader(keys, max_ta_size, outside, self._on_host)
        desk = type("ServicesDesk", (Desk,), {"tee": self})
        built_in = {**(built_in or {}), GenericRpc.uuid: GenericRpc, SERVICES_UUID: desk}
        self._built_in = {u: Program(u, ta, ta.version) for u, ta in built_in.items()}
        self._services = Services(keys, max_ta_size, self.limits, self._built_in)
        self.enclaves = Enclaves(self, enclaves if enclaves is not None else EnclavePolicy(), self.limits.enclaves)
        self._attestation_key = package.load_private_key(attestation_key) if attestation_key is not None else None
        self._inbox = Inbox()
        self._started = self._inbox.lines  # whether there are any is asked often
        self._outbox: deque[Event] = deque()
        self._calls: dict[Call, Task | None] = {}
        self._cancelled: set[Call] = set()
        self._singles: dict[UUID | Program, Instance] = {}  # of installed services each has its own
        self._contexts: set[Context] = set()
        self._instances: set[Instance] = set()
        self._instances_of: dict[str, int] = {}  # how many of them, by machine
        self._loaded = 0  # how many of them came in packages
        self._memory = 0  # what they have declared
        self._sink: Sink | None = None
        self._spare: Task | None = None  # of an invoke that has ended at once, for the next one
        self._scheduler = Scheduler(
            clock=clock,
            threads=threads,
            emit_rpc=self._outbox.append,
            emit_withdrawn=lambda rpc: self._outbox.append(RpcWithdrawn(rpc)),
            longest=longest_call,
        )
        self._vault = Vault(
            storage_key if storage_key is not None else secrets.token_bytes(32),
            random=random,
            limits=self.limits,
            outside=outside,
            scheduler=self._scheduler,
        )
        self._begin: dict[type[Call], Callable[[Any], None]] = {
            OpenContext: self._open_context,
            CloseContext: self._close_context,
            OpenSession: self._open_session,
            CloseSession: self._close_session,
            Invoke: self._invoke,
            RegisterMemory: self._register,
            UnregisterMemory: self._unregister,
            **dict.fromkeys(SERVED, self._serve),
        }

    # The contract.

    @property
    def info(self) -> TeeInfo:
        """It says that it is OP-TEE, because supplicants and clients serve nothing else; ``kind`` tells it apart."""
        return TeeInfo(
            kind=TeeKind.SOFT, impl_id=1, impl_caps=1, gen_caps=GenCap.GP | GenCap.REG_MEM | GenCap.MEMREF_NULL
        )

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        if self._sink is not None:
            raise RuntimeError("a sink is attached already")
        self._sink = sink

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`. A call object is started once: ValueError while it is still under way."""
        if call in self._calls:
            raise ValueError("this call has been started already")
        self._calls[call] = None
        self._inbox.append(call)

    def invoke_at_once(self, session: object, func: int, params: Sequence[Param]) -> Outcome | Begun | None:
        """See :class:`~tee.driver.InvokesAtOnce`. Others have their turn while anything at all is ready to run."""
        scheduler = self._scheduler
        if type(session) is not Session or self._started or scheduler.ready or scheduler.free <= 0:
            return None
        instance, context = session.instance, session.context
        if (
            session.state is not _OPEN
            or instance.owner is not None
            or context.state is not _CONTEXT_OPEN
            or context.tee is not self
        ):
            return None
        seen, pairs, leases = _NO_PARAMETERS
        try:
            if not 0 <= func < 1 << 32:
                return None
            if params:
                seen, pairs, leases = admit(params, context)
            else:
                seen = Parameters()
        except (TeeError, TypeError, AttributeError):
            return None
        task = self._spare
        if task is None:
            task = Task(None, context)
            task.entered = True
            task.state = CallState.RUNNING
        else:
            self._spare = None
            task.context = context
        task.instance, task.session = instance, session
        task.pairs = pairs
        instance.owner = task
        instance.env.task = task
        error: BaseException | None = None
        coroutine = None
        try:
            coroutine = instance.ta.invoke(session.data, func, seen)  # type: ignore[union-attr]
            wait = coroutine.send(None)
        except StopIteration:
            pass
        except KeyboardInterrupt:
            raise  # it is for whoever runs the TEE
        except BaseException as raised:
            error = raised
        else:
            return _Begun(self, task, coroutine, wait, leases)
        outcome = _WELL if error is None and not pairs and task.rare is None else self._outcome(task, error)
        error = None  # its traceback refers to this frame, and so to the client's memory
        if outcome is not _WELL:
            self._release(task, instance)
        else:  # nobody can have begun to wait for the instance: not even looked for, which costs where there are many
            instance.owner = None
            instance.env.task = None
        if task.rare is None:
            task.masked = True
            task.context = task.instance = task.session = task.pairs = None
            self._spare = task
        return outcome

    def go_on(
        self,
        call: Invoke,
        task: Task,
        leases: Sequence[Registration],
        coroutine: Coroutine[Wait, Any, Any],
        wait: Any,
    ) -> None:
        """``call`` is served by ``task``, which was begun at once and awaits ``wait`` (for :class:`_Begun`)."""
        if call in self._calls:
            raise ValueError("this call has been started already")
        self._calls[call] = task
        task.call = call
        task.leases = leases
        for registration in leases:
            registration.users += 1
        task.ended = self._invoked
        task.context.tasks.add(task)
        self._scheduler.take_thread(task.context.vm)  # for what ends at once, nobody sees that it has one
        self._scheduler.go_on(task, coroutine, wait)

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`. Only OpenSession and Invoke are cancelled; others end soon by
        themselves.
        """
        if call not in self._calls:
            return
        task = self._calls[call]
        if task is not None:
            self._scheduler.cancel(task)
        elif type(call) is Invoke or type(call) is OpenSession or type(call) in CANCELLABLE:
            self._cancelled.add(call)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._scheduler.answer(rpc, reply)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        started, outbox, scheduler, sink = self._started, self._outbox, self._scheduler, self._sink
        if sink is None:
            raise RuntimeError("attach a sink first")
        ready = scheduler.ready
        if self._working:
            assert self._workers is not None
            self._workers.collect()
        scheduler.expire()
        end: float | None = None  # the clock is not asked where there is one step to make
        for _ in range(STEPS_PER_RUN):
            if started:
                self._start(self._inbox.popleft())
            if ready:
                scheduler.step()
            while outbox:
                sink(outbox.popleft())
            if not started and not ready:
                left = scheduler.expire()
                return 0.0 if ready else left
            if end is None:
                end = self._clock() + RUN_TIME
            elif self._clock() >= end:
                break
        return 0.0

    def fileno(self) -> int | None:
        """Of the workers. Without them there is nothing to wait for but calls, answers and time."""
        return self._workers.fileno() if self._workers is not None else None

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        if size < 1:
            raise MemoryError(f"{size} bytes cannot be allocated")
        return Memory.of(bytearray(size))

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        memory.forget()

    def usage(self) -> dict[str, int]:
        """How many there are now of what this TEE keeps, by name; for metrics, and for tests that look for leaks."""
        opened = [instance.opened.sessions for instance in self._instances]
        return {
            "calls": len(self._calls),
            "contexts": len(self._contexts),
            "sessions": sum(len(context.sessions) for context in self._contexts) + sum(map(len, opened)),
            "instances": len(self._instances),
            "registrations": sum(len(context.registrations) for context in self._contexts),
            "rpcs": len(self._scheduler.rpcs),
            "services": self._services.count(),
            "enclaves": self.enclaves.count(),
            "threads_busy": self._scheduler.threads - self._scheduler.free,
        }

    # Beginning and ending calls.

    def _start(self, call: Call) -> None:
        begin = self._begin.get(type(call))
        try:
            if begin is None:
                raise TeeError(Result.NOT_SUPPORTED, Origin.TEE, f"no call {type(call).__name__}")
            if self._cancelled and call in self._cancelled:
                raise TeeError(Result.CANCEL, Origin.TEE, "cancelled before it began")
            begin(call)
        except TeeError as error:
            self._finish(call, error.code, error.origin)
        except (TypeError, AttributeError) as error:  # a field of the call is not of the type that it is said to be
            self._log(f"{type(call).__name__} refused: {error}")
            self._finish(call, Result.BAD_PARAMETERS, Origin.TEE)

    def _finish(self, call: Call, code: int = Result.SUCCESS, origin: int = Origin.TEE, value: object = None) -> None:
        if self._calls.pop(call, _MISSING) is _MISSING:
            return
        if self._cancelled:
            self._cancelled.discard(call)
        self._outbox.append(Done(call, code, origin, value))

    def _context(self, context: object) -> Context:
        """``context`` as one that is open here. Raises BAD_PARAMETERS."""
        if type(context) is not Context or context not in self._contexts or context.state != ContextState.OPEN:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "no such context")
        return context

    def _session(self, session: object) -> Session:
        """``session`` as one that was opened here and has not ended. Raises BAD_PARAMETERS."""
        if type(session) is not Session or session not in session.context.sessions:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "no such session")
        if session.context.tee is not self:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "a session of another TEE")
        return session

    def _task(self, call: OpenSession | Invoke | ServiceCall, context: Context) -> Task:
        """The task of a call with parameters, which are checked; from here on their memory is in use."""
        seen, pairs, leases = admit(call.params, context)
        task = Task(call, context)
        task.params = seen
        task.pairs = pairs
        if leases:
            task.leases = leases
            for registration in leases:
                registration.users += 1
        self._calls[call] = task
        context.tasks.add(task)
        return task

    def _end_task(self, task: Task, code: int = Result.SUCCESS, origin: int = Origin.TEE, value: object = None) -> None:
        """The call of ``task`` ends: it no longer counts in its context, and its memory is free."""
        for registration in task.leases:
            self._end_use(registration)
        task.leases = ()
        context = task.context
        context.tasks.discard(task)
        if task.call is not None:
            self._finish(task.call, code, origin, value)
        if context.state != ContextState.OPEN:
            self._go_on_closing(context)

    def _outcome(self, task: Task, error: BaseException | None) -> tuple[int, int]:
        """What came of ``task``, as code and origin: the TA's results, error or panic, or this TEE's own error."""
        if task.rare is not None:
            self.end_visits(task.rare)
            self._ocalls.end(task)
        if not task.entered:
            if isinstance(error, TeeError):
                return error.code, error.origin
            return Result.GENERIC, Origin.TEE
        code: int = Result.SUCCESS
        origin: int = Origin.TRUSTED_APP
        if error is None or isinstance(error, TeeError):
            pairs = task.pairs
            if error is not None:
                code = _own_code(error)
                if task.instance.concurrent:  # it is the TEE itself
                    origin = error.origin
            if not pairs:
                return code, origin
            try:
                if error is None:
                    check_sizes(pairs)
                write_back(pairs)
            except (ValueError, TypeError, AttributeError) as nonsense:
                error = nonsense
            else:
                let_go(pairs)
                return code, origin
        let_go(task.pairs)
        self._panic(task.instance, task, error)
        return Result.TARGET_DEAD, Origin.TEE

    def _panic(self, instance: Instance, task: Task, error: BaseException | None) -> None:
        if instance.concurrent:  # one call of many: the others go on
            self._log(f"a call in TA {instance.program.uuid} was ended: {error!r}")
        else:
            self.panic(instance, task, error)

    def panic(self, instance: Instance, task: Task, error: BaseException | None) -> None:
        """A TA has done what it must not: its instance and all its sessions are dead."""
        if (instance.state, InstanceEvent.PANIC) in INSTANCE:  # else it is dead or gone already
            self._log(f"TA {instance.program.uuid} panicked: {error!r}")
            self._move_instance(instance, InstanceEvent.PANIC, task.context)

    # Contexts.

    def _open_context(self, call: OpenContext) -> None:
        context = Context(self, str(call.vm), call.owner)
        self._contexts.add(context)
        self._finish(call, value=context)

    def _close_context(self, call: CloseContext) -> None:
        context = self._context(call.context)
        context.closer = call
        self._move_context(context, ContextEvent.CLOSE)

    def _move_context(self, context: Context, event: ContextEvent) -> None:
        context.state, action = CONTEXT[context.state, event]
        getattr(self, f"_{action}")(context)

    def _go_on_closing(self, context: Context) -> None:
        """Go to the next step of closing where the present one has nothing left to wait for."""
        if context.state == ContextState.ENDING_CALLS and not context.tasks:
            self._move_context(context, ContextEvent.NO_CALLS)
        elif context.state == ContextState.CLOSING_SESSIONS and not context.sessions and not context.tasks:
            self._move_context(context, ContextEvent.NO_SESSIONS)
        elif context.state == ContextState.FREEING_MEMORY and not context.registrations:
            self._move_context(context, ContextEvent.NO_USERS)

    def _interrupt_calls(self, context: Context) -> None:
        for task in tuple(context.tasks):
            self._scheduler.force(task)
        self._go_on_closing(context)

    def _close_sessions(self, context: Context) -> None:
        for session in tuple(context.sessions):
            task = Task(None, context)
            task.needs_thread = False  # it must not wait behind another client's calls
            task.forced = True
            self._begin_close(session, task)
        self._go_on_closing(context)

    def _end_registrations(self, context: Context) -> None:
        for registration in tuple(context.registrations):
            registration.ending = True
            self._end_if_unused(registration)
        self._go_on_closing(context)

    def _context_closed(self, context: Context) -> None:
        self._contexts.discard(context)
        closer, context.closer = context.closer, None  # they refer to each other
        context.owner = None
        assert closer is not None
        self._finish(closer)

    # Memory.

    def _register(self, call: RegisterMemory) -> None:
        context = self._context(call.context)
        memory = call.memory
        if memory.handle is not None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "the memory is registered already")
        if not memory.size:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "there is nothing to register")
        if not memory.segments:
            raise TeeError(Result.NOT_SUPPORTED, Origin.TEE, "the software TEE has no way to this memory")
        memory.handle = registration = Registration(context, memory)
        context.registrations.add(registration)
        self._finish(call)

    def _unregister(self, call: UnregisterMemory) -> None:
        registration = registration_of(call.memory, self._context(call.context))
        registration.ending = True
        registration.unregister = call
        self._end_if_unused(registration)

    def _new_use(self, registration: Registration) -> None:
        registration.users += 1

    def _end_use(self, registration: Registration) -> None:
        registration.users -= 1
        if registration.ending:
            self._end_if_unused(registration)

    def _end_if_unused(self, registration: Registration) -> None:
        if registration.users:
            return
        context = registration.context
        context.registrations.discard(registration)
        registration.memory.handle = None
        if registration.unregister is not None:
            self._finish(registration.unregister)
        if context.state != ContextState.OPEN:
            self._go_on_closing(context)

    # Sessions.

    def _open_session(self, call: OpenSession) -> None:
        if not isinstance(call.uuid, UUID):
            raise TypeError("a TA is named by a UUID")
        if call.client.login >= Login.TRUSTED_APP:
            raise TeeError(Result.ACCESS_DENIED, Origin.TEE, "a client cannot say that it is a TA")
        self._place(self._task(call, self._context(call.context)))

    def _place(self, task: Task) -> None:
        """Find or make the instance that serves an OpenSession; load its program first where there is none yet."""
        call = task.call
        assert isinstance(call, OpenSession)
        if task.cancelled or task.forced:
            self._end_task(task, Result.CANCEL)
            return
        installed = self._services.installed(task.context.vm, call.uuid)
        instance = self._singles.get(installed or call.uuid)
        if instance is None:
            program = installed or task.program or self._built_in.get(call.uuid)
            try:
                self._check_room(program, task.context.vm)
                if program is not None:
                    instance = self._new_instance(program, task.context)
            except TeeError as error:
                self._log(f"no instance of TA {call.uuid}: {error}")
                self._end_task(task, error.code, error.origin)
                return
            if instance is None:
                task.masked = False
                task.main = lambda task: self._loader.load(task, call.uuid)
                task.ended = self._program_loaded
                self._scheduler.submit(task)
                return
        elif instance.state == InstanceState.DESTROYING:
            # Two of a single instance must not overlap: look again when this one is gone.
            task.main, task.ended = self._enter_session, self._session_entered
            task.instance = instance
            instance.queue.append(task)
            return
        elif instance.sessions and not instance.program.ta.multi_session:
            self._end_task(task, Result.BUSY)  # it serves one session at a time
            return
        task.masked = True
        task.session = session = Session(task.context, instance)
        task.context.sessions.add(session)
        instance.sessions.add(session)
        task.main, task.ended = self._enter_session, self._session_entered
        self._acquire(task, instance)

    def _program_loaded(self, task: Task, program: Any, error: BaseException | None) -> None:
        if error is None:
            self._scheduler.rearm(task)
            task.program = program
            self._place(task)
            return
        if not isinstance(error, TeeError):
            error = TeeError(Result.GENERIC, Origin.TEE, f"loading failed: {error!r}")
        assert isinstance(task.call, OpenSession)
        self._log(f"TA {task.call.uuid} is not loaded: {error}")
        self._end_task(task, error.code, error.origin)

    def _check_room(self, program: Program | None, vm: str) -> None:
        """OUT_OF_MEMORY unless there may be one more instance: of ``program``, or of one that is to be loaded."""
        limits = self.limits
        why = ""
        if len(self._instances) >= limits.instances or self._instances_of.get(vm, 0) >= limits.instances_per_vm:
            why = "there are too many instances"
        elif (program is None or program.loaded) and self._loaded >= limits.loaded:
            why = "too many TAs are loaded"
        elif program is not None:
            size = program.ta.data_size
            if size > limits.instance_memory or self._memory + size > limits.memory:
                why = f"the TA wants {size} bytes of memory"
        if why:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, why)

    def new_concurrent(self, program: Program, context: Context) -> Instance:
        """An instance in which calls do not wait for each other, whatever the flags of its TA. Raises OUT_OF_MEMORY."""
        self._check_room(program, context.vm)
        return self._new_instance(program, context, concurrent=True)

    def _new_instance(self, program: Program, context: Context, *, concurrent: bool = False) -> Instance:
        ta = program.ta
        concurrent |= program.uuid == SERVICES_UUID
        env = Environment(
            program.uuid,
            program.version,
            clock=self._clock,
            random=self._random,
            log=self._log,
            services=self,
            properties=properties_of(ta, program.version),
            memory=ta.data_size,
        )
        env.storage = Storage(self._vault, env)
        instance = Instance(program, env, context.vm, Context(self, context.vm))
        self._instances.add(instance)
        self._instances_of[context.vm] = self._instances_of.get(context.vm, 0) + 1
        self._loaded += program.loaded
        self._memory += ta.data_size
        if concurrent:
            instance.concurrent = True
            instance.owner = Task(None, context)  # never ends, so that nobody else waits for the instance
        elif ta.single_instance:
            self._singles[_key(program)] = instance
        return instance

    async def _enter_session(self, task: Task) -> object:
        """What runs for an OpenSession, inside the instance."""
        instance, call = task.instance, task.call
        self._enter(task)
        assert isinstance(call, OpenSession)
        if instance.state == InstanceState.CREATING:
            instance.ta = instance.program.ta(instance.env)
            await instance.ta.create()
            self._move_instance(instance, InstanceEvent.CREATED, task.context)
        try:
            return await instance.ta.open_session(task.params, call.client)
        except TeeError:
            await self._leave(instance, task.session, task.context)
            raise

    def _session_entered(self, task: Task, data: object, error: BaseException | None) -> None:
        instance, session = task.instance, task.session
        code, origin = self._outcome(task, error)
        if session is None:  # it waited for an instance to be gone, and was cancelled
            self._end_task(task, code, origin)
            return
        if code == Result.SUCCESS:
            session.data = data
            self._move_session(session, SessionEvent.OPENED)
        else:
            self._move_session(session, SessionEvent.FAILED)
            self._give_up_creating(instance, task.context, task.entered)
        self._release(task, instance)
        self._end_task(task, code, origin, session if code == Result.SUCCESS else None)

    def _give_up_creating(self, instance: Instance, context: Context, entered: bool) -> None:
        """An opening has failed. Where nobody else waits to create the instance, it will never be: it must not stay."""
        if instance.state == InstanceState.CREATING and (entered or not instance.sessions):
            self._move_instance(instance, InstanceEvent.FAILED, context)

    def _close_session(self, call: CloseSession) -> None:
        session = self._session(call.session)
        if session.context.state != ContextState.OPEN:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "the session's context is closing")
        task = Task(call, session.context)
        self._begin_close(session, task)

    def _begin_close(self, session: Session, task: Task) -> None:
        row = SESSION.get((session.state, SessionEvent.CLOSE))
        if row is None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "the session is not open")
        session.state, action = row
        task.session = session
        task.cancellable = False
        getattr(self, f"_{action}")(session, task)

    def _close_by_ta(self, session: Session, task: Task) -> None:
        task.main, task.ended = self._leave_session, self._session_left
        if task.call is not None:
            self._calls[task.call] = task
        task.context.tasks.add(task)
        instance = session.instance
        others = session.context.tasks if instance.concurrent else (instance.owner, *instance.queue)
        for other in tuple(others):
            if isinstance(other, Task) and other.session is session and other is not task:
                self._scheduler.cancel(other)
                self._scheduler.give_up_client(other)
        self._acquire(task, instance)

    def _close_dead(self, session: Session, task: Task) -> None:
        self._forget_session(session)
        self._end_task(task)

    async def _leave_session(self, task: Task) -> None:
        """What runs for a CloseSession, inside the instance."""
        instance, session = task.instance, task.session
        if instance.concurrent:
            session.closer = task
            while any(other.session is session and other is not task for other in session.context.tasks):
                await suspend(Park(shielded=True))
        self._enter(task)
        try:
            await instance.ta.close_session(session.data)
        except TeeError as error:
            self._log(f"TA {instance.program.uuid}: close_session ended with {error}")
        await self._leave(instance, session, task.context)

    async def _leave(self, instance: Instance, session: Session | None, context: Context) -> None:
        """``session`` no longer counts; with the last one the instance ends, unless it is kept alive."""
        if session is not None:
            instance.sessions.discard(session)
        if instance.sessions or _stays(instance.program):
            return
        self._move_instance(instance, InstanceEvent.EMPTY, context)
        assert instance.ta is not None
        try:
            await instance.ta.destroy()
        except TeeError as error:
            self._log(f"TA {instance.program.uuid}: destroy ended with {error}")
        self._move_instance(instance, InstanceEvent.DESTROYED, context)

    def _session_left(self, task: Task, _: object, error: BaseException | None) -> None:
        # Closing never fails for the client; but a panic on the way is told.
        code, _origin = self._outcome(task, error)
        self._move_session(task.session, SessionEvent.CLOSED)
        self._release(task, task.instance)
        self._end_task(task, Result.TARGET_DEAD if code == Result.TARGET_DEAD and task.entered else Result.SUCCESS)

    def _move_session(self, session: Session, event: SessionEvent) -> None:
        row = SESSION.get((session.state, event))
        if row is not None:
            session.state, action = row
            if action:
                getattr(self, f"_{action}")(session)

    def _forget_session(self, session: Session) -> None:
        session.context.sessions.discard(session)
        session.instance.sessions.discard(session)

    # Invocations.

    def _invoke(self, call: Invoke) -> None:
        session = self._session(call.session)
        if session.state != _OPEN:
            row = SESSION.get((session.state, SessionEvent.INVOKE))
            if row is None:
                raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "the session is not open")
            raise _target_dead()
        if not 0 <= call.func < 1 << 32:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "a command has 32 bits")
        context = session.context
        if context.state != ContextState.OPEN:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "the session's context is closing")
        task = self._task(call, context)
        task.session = session
        task.main = self._enter_invoke
        task.ended = self._invoked
        self._acquire(task, session.instance)

    def _enter_invoke(self, task: Task) -> Any:
        """The coroutine of an Invoke. Not a coroutine itself: that would cost every call one more."""
        self._enter(task)
        instance = task.instance
        running = instance.ta.invoke(task.session.data, task.call.func, task.params)  # type: ignore[union-attr]
        return inside(instance.env, task, running) if instance.concurrent else running

    def _invoked(self, task: Task, _: object, error: BaseException | None) -> None:
        code, origin = self._outcome(task, error)
        self._release(task, task.instance)
        self._end_task(task, code, origin)
        self._wake_closer(task.session)

    def _wake_closer(self, session: Session) -> None:
        if session.closer is not None:
            self._scheduler.wake(session.closer, True)

    # Instances.

    def _acquire(self, task: Task, instance: Instance) -> None:
        """Let ``task`` into ``instance`` when nobody else is in it. Only then it waits for a thread: never the other
        way.
        """
        task.instance = instance
        if instance.owner is None:
            instance.owner = task
            self._scheduler.submit(task)
        elif instance.concurrent:
            self._scheduler.submit(task)
        elif task.cancellable and self._asks_client(instance, task):
            self._scheduler.abandon(task, _waits_for_client())
        else:
            instance.queue.append(task)

    def _asks_client(self, instance: Instance, task: Task) -> bool:
        """Whether the call that is in ``instance`` waits for its client, on the machine of ``task``: which may then
        wait for this very task. Others wait for their turn."""
        owner = instance.owner.task if isinstance(instance.owner, Visit) else instance.owner
        return owner is not None and owner.asks_client and bool(owner.context.vm == task.context.vm)

    def _enter(self, task: Task) -> None:
        task.entered = True
        task.instance.env.task = task

    def _release(self, task: Task, instance: Instance) -> None:
        """``task`` has ended: the next in the queue may enter, if it was ``task`` that was inside."""
        if instance.owner is not task:
            return
        instance.env.task = None
        self._pass_on(instance, task.context)

    def _pass_on(self, instance: Instance, context: Context) -> None:
        """Nobody is in ``instance`` any more, in which a call of ``context`` was: let the next one in."""
        instance.owner = None
        if instance.visits:
            self._let_visits_in(instance)
        queue = instance.queue
        while queue and instance.owner is None:
            task = queue.popleft()
            if task.state != CallState.WAITING:
                continue
            if instance.state == InstanceState.GONE:
                self._place_again(task, instance)
            elif instance.state == InstanceState.DEAD:
                self._scheduler.abandon(task, _target_dead())
            else:
                instance.owner = task
                self._scheduler.submit(task)
        if not instance.sessions and instance.state == InstanceState.ALIVE and instance.owner is None:
            self._reap(context, instance)

    def _retire(self, program: Program, context: Context) -> None:
        """A service was replaced or removed: what was kept alive of it ends."""
        program.retired = True
        for instance in tuple(self._instances):
            idle = not instance.sessions and instance.owner is None and not instance.concurrent
            if instance.program is program and instance.state == InstanceState.ALIVE and idle:
                self._reap(context, instance)

    def _reap(self, context: Context, instance: Instance) -> None:
        """End an instance whose last session went away before it was entered (its OpenSession was cancelled)."""
        if _stays(instance.program):
            return
        task = Task(None, context)
        task.needs_thread = task.cancellable = False
        task.main, task.ended = self._leave_nobody, self._nobody_left
        context.tasks.add(task)
        self._acquire(task, instance)

    async def _leave_nobody(self, task: Task) -> None:
        self._enter(task)
        if not task.instance.sessions:
            await self._leave(task.instance, None, task.context)

    def _nobody_left(self, task: Task, _: object, error: BaseException | None) -> None:
        self._outcome(task, error)
        self._release(task, task.instance)
        self._end_task(task)

    def _place_again(self, task: Task, instance: Instance) -> None:
        """The instance that an OpenSession waited for is gone: it looks for another."""
        if task.session is not None:
            self._forget_session(task.session)
            task.session = None
        self._place(task)

    def _move_instance(self, instance: Instance, event: InstanceEvent, context: Context) -> None:
        """``context`` is that of the call in which it happens: what has to be done then counts as under it."""
        instance.state, action = INSTANCE[instance.state, event]
        if action:
            getattr(self, f"_{action}")(instance, context)

    def _bury_instance(self, instance: Instance, context: Context) -> None:
        self._forget_instance(instance, context)
        for session in instance.sessions:
            self._move_session(session, SessionEvent.PANIC)

    def _forget_instance(self, instance: Instance, context: Context) -> None:
        key = _key(instance.program)
        if self._singles.get(key) is instance:
            del self._singles[key]
        self._instances.discard(instance)
        self._loaded -= instance.program.loaded
        self._memory -= instance.program.ta.data_size
        left = self._instances_of[instance.vm] - 1
        if left:
            self._instances_of[instance.vm] = left
        else:
            del self._instances_of[instance.vm]
        instance.env.storage.end()
        for session in tuple(instance.opened.sessions):
            self._end_opened(session, context)

    # Services and server enclaves: calls, and what the pseudo-TA asks.

    @property
    def scheduler(self) -> Scheduler:
        """What runs the calls (for the parts of this TEE)."""
        return self._scheduler

    def say(self, line: str) -> None:
        """A line for whoever operates the TEE."""
        self._log(line)

    def move_instance(self, instance: Instance, event: InstanceEvent, context: Context) -> bool:
        """What has happened to an enclave's instance; False where it cannot happen to it any more."""
        if (instance.state, event) not in INSTANCE:
            return False
        self._move_instance(instance, event, context)
        return True

    def forget_machine(self, vm: str) -> None:
        """See :class:`~tee.driver.OffersServices`."""
        for program in self._services.forget(vm):
            self._retire(program, Context(self, vm))

    def _serve(self, call: ServiceCall) -> None:
        context = self._context(call.context)
        if context.desk is None:
            context.desk = self._new_desk(context)
        task = self._task(call, context)
        task.session = context.desk
        task.cancellable = type(call) in CANCELLABLE
        task.needs_thread = task.cancellable
        task.main, task.ended = self._enter_desk, self._served
        self._acquire(task, context.desk.instance)

    def _new_desk(self, context: Context) -> Session:
        """The context's own session with the pseudo-TA; it closes with the context."""
        program = self._built_in[SERVICES_UUID]
        instance = self.new_concurrent(program, context)
        instance.ta, instance.state = program.ta(instance.env), InstanceState.ALIVE
        session = Session(context, instance, _OPEN)
        context.sessions.add(session)
        instance.sessions.add(session)
        return session

    def _enter_desk(self, task: Task) -> Any:
        self._enter(task)
        desk = task.instance.ta
        assert isinstance(desk, Desk)
        assert isinstance(task.call, ServiceCall)
        return inside(task.instance.env, task, desk.serve(task, task.call, task.params))

    def _served(self, task: Task, value: object, error: BaseException | None) -> None:
        code, origin = self._outcome(task, error)
        refusal = error.refusal if isinstance(error, RefusedError) else None
        self._end_task(task, code, origin, value if code == Result.SUCCESS else refusal)
        self._wake_closer(task.session)

    def list_services(self, vm: str, first: int, most: int) -> ServiceList:
        """The services that a machine sees: ``most`` at most, from the entry ``first`` on."""
        programs = self._services.of(vm)
        used = {
            session.instance.program for context in self._contexts if context.vm == vm for session in context.sessions
        }
        used.update(enclave.instance.program for enclave in self.enclaves.of(vm))
        return ServiceList(len(programs), [_listed(program, used) for program in programs[first : first + most]])

    async def load_service(self, task: Task, given: MemoryReference) -> Loaded:
        """Install a service from its signed package. It is verified, and used, as a private copy."""
        if given.capacity > self._services.limit:
            raise RefusedError(
                Refusal.LIMIT, f"a package of {given.capacity} bytes; {self._services.limit} is the limit"
            )
        data = given.read()
        task.masked = False
        verified = await self._beside(task, lambda: self._services.verify(data))
        replaced = self._services.install(task.context.vm, verified, len(data))
        if replaced is not None:
            self._retire(replaced, task.context)
        return Loaded(verified.uuid, verified.version)

    async def remove_service(self, task: Task, uuid: UUID) -> None:
        """Remove a service that the machine has installed."""
        vm = task.context.vm
        program = self._services.check_removal(vm, uuid)
        for instance in self._instances:
            old = instance.program
            in_use = instance.sessions or instance.concurrent or instance.owner is not None
            if old.uuid == uuid and old.installed and instance.vm == vm and in_use:
                raise RefusedError(Refusal.IN_USE, f"service {uuid} is in use")
        self._services.remove(vm, uuid)
        self._retire(program, task.context)

    async def run_service(self, task: Task, uuid: UUID, client: Client, func: int, params: Sequence[TaParam]) -> None:
        """Open a session for ``client``, invoke and close it."""
        if client.login >= Login.TRUSTED_APP:
            raise TeeError(Result.ACCESS_DENIED, Origin.TEE, "a client cannot say that it is a TA")
        task.masked = False  # what is cancelled is the service's call, which has a mask of its own
        session = await self._open_from(task, uuid, (), client)
        try:
            await self._invoke_from(task, session, func, params)
        except GeneratorExit:
            self._end_opened(session, task.context)
            raise
        except BaseException:
            await self._close_masked(task, session)
            raise
        await self._close_masked(task, session)

    async def _close_masked(self, task: Task, session: Session) -> None:
        task.masked = True  # a session is closed also if its call was cancelled
        await self._close_from(task, session)

    async def attest_service(self, task: Task, uuid: UUID, nonce: bytes, room: MemoryReference) -> None:
        """Sign a statement about a service, as the machine sees it now."""
        program = self._services.seen(task.context.vm, uuid)
        if program is None:
            raise RefusedError(Refusal.NOT_FOUND, f"no service {uuid}")
        if len(nonce) != NONCE_SIZE:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"a nonce has {NONCE_SIZE} bytes")
        key = await self._key_to_attest(task)
        size = attestation.size(key)
        if room.capacity < size:
            room.need(size)
        digest = program.digest or measured(program.ta)
        said = attestation.Statement(uuid, program.version, self.info.kind, digest)
        room.put(await self._beside(task, lambda: attestation.make(key, said, nonce)))

    async def _key_to_attest(self, task: Task) -> package.PrivateKey:
        if self._attestation_key is None:
            try:
                made = await self._beside(task, lambda: package.keygen(package.algorithm_named("ecdsa-p256-sha256")))
            except ImportError:
                raise TeeError(Result.NOT_SUPPORTED, Origin.TEE, "there is no key to sign with") from None
            if self._attestation_key is None:  # another call may have made one meanwhile
                self._attestation_key = package.load_private_key(made.private)
        return self._attestation_key

    async def create_enclave(self, task: Task, uuid: UUID, name: bytes, flags: int) -> Enclave:
        """A server enclave that runs a service that the machine sees."""
        program = self._services.seen(task.context.vm, uuid)
        if program is None:
            raise RefusedError(Refusal.NOT_FOUND, f"no service {uuid}")
        task.masked = False
        return await self.enclaves.create(task, program, name, flags)

    def acquire_enclave(self, env: Environment, name: str) -> Server:
        """See :meth:`tee.soft.ta.Environment.acquire`."""
        return self.enclaves.acquire(env.current().context.vm, name.encode())

    async def call_enclave(
        self, env: Environment, server: Server, regs: Sequence[int], memory: MemoryReference | None
    ) -> CallReturn:
        """See :meth:`tee.soft.ta.TaServer.call`."""
        task = env.current()
        client = Client(Login.TRUSTED_APP, env.uuid, task.context.vm)
        return await self.enclaves.call(task, server, client, regs, memory)

    async def release_enclave(self, env: Environment, server: Server) -> None:
        """See :meth:`tee.soft.ta.TaServer.release`."""
        await self.enclaves.release(env.current(), server)

    # What a TA asks of the TEE beside calls.

    def notify(self, env: Environment, value: int) -> None:
        """See :meth:`tee.soft.ta.Environment.notify`."""
        context: Context = env.current().context
        if context.state is _CONTEXT_OPEN and context in self._contexts:
            self._outbox.append(Notification(value, context.owner))

    async def ocall(self, env: Environment, function: int, params: Sequence[TaParam], timeout: float | None) -> int:  # noqa: ASYNC109
        """See :meth:`tee.soft.ta.Environment.ocall`."""
        return await self._ocalls.call(env.current(), function, params, timeout)

    async def borrow(self, env: Environment, size: int) -> Borrowed:
        """See :meth:`tee.soft.ta.Environment.client_memory`."""
        return await self._ocalls.borrow(env.current(), size)

    async def give_back(self, env: Environment, borrowed: Borrowed, *, told: bool) -> None:
        """See :meth:`tee.soft.ta.Environment.client_memory`."""
        await self._ocalls.give_back(env.current(), borrowed, told=told)

    async def work(self, env: Environment, function: Callable[[], Any]) -> Any:
        """See :meth:`tee.soft.ta.Environment.work`."""
        return await self._beside(env.current(), function)

    async def _beside(self, task: Task, function: Callable[[], Any]) -> Any:
        if self._workers is None:
            return function()
        waits = True

        def ended(value: Any, error: BaseException | None) -> None:
            self._working -= 1
            if waits:
                self._scheduler.wake(task, (value, error))

        self._working += 1
        self._workers.submit(function, ended)
        try:
            value, error = await suspend(Park())
        finally:
            waits = False
        if error is not None:
            raise error
        return value

    async def _on_host(self, task: Task, uuid: UUID) -> bytes | None:
        host_tas = self._host_tas
        return None if host_tas is None else await self._beside(task, lambda: host_tas(uuid))

    # Calls from TA to TA. They run in the task of the outer call, and so on its thread.

    async def open_inner(self, env: Environment, uuid: UUID, params: Sequence[TaParam]) -> Session:
        """See :meth:`tee.soft.ta.Environment.open_session`."""
        task = env.current()
        return await self._open_from(task, uuid, params, Client(Login.TRUSTED_APP, env.uuid, task.context.vm))

    async def _open_from(self, task: Task, uuid: UUID, params: Sequence[TaParam], client: Client) -> Session:
        """A session for the instance in which ``task`` is now, which acts for ``client``."""
        opener = self._inside(task)
        seen, pairs = pass_on(params)
        while True:
            instance = await self._instance_for(task, uuid)
            session = Session(opener.opened, instance)
            opener.opened.sessions.add(session)
            instance.sessions.add(session)
            visit = Visit(task, instance, session)
            try:
                if await self._visit(visit, lambda s=session: self._open_inside(task, s, seen, client), pairs):  # type: ignore[misc]
                    return session
                self._forget_session(session)  # somebody else's opening has failed, and the instance with it
            except BaseException:
                if session.state == SessionState.OPENING:
                    self._move_session(session, SessionEvent.FAILED)
                    self._give_up_creating(instance, task.context, visit.entered)
                raise
            finally:
                self._go_out(visit)

    async def _open_inside(self, task: Task, session: Session, params: Parameters, client: Client) -> None:
        instance = session.instance
        if instance.state == InstanceState.CREATING:
            instance.ta = instance.program.ta(instance.env)
            await instance.ta.create()
            self._move_instance(instance, InstanceEvent.CREATED, task.context)
        assert instance.ta is not None
        try:
            session.data = await instance.ta.open_session(params, client)
        except TeeError:
            await self._leave(instance, session, task.context)
            raise
        self._move_session(session, SessionEvent.OPENED)

    async def invoke_inner(self, env: Environment, session: Session, command: int, params: Sequence[TaParam]) -> None:
        """See :meth:`tee.soft.ta.TaSession.invoke`."""
        await self._invoke_from(self._task_of_opener(env, session), session, command, params)

    async def _invoke_from(self, task: Task, session: Session, command: int, params: Sequence[TaParam]) -> None:
        if session.state == SessionState.DEAD:
            raise _target_dead()
        if session.state != _OPEN:
            raise TeeError(Result.BAD_STATE, Origin.TEE, "the session is closed")
        if not 0 <= command < 1 << 32:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "a command has 32 bits")
        seen, pairs = pass_on(params)
        visit = Visit(task, session.instance, session)
        ta = session.instance.ta
        assert ta is not None
        try:
            await self._visit(visit, lambda: ta.invoke(session.data, command, seen), pairs)
        finally:
            self._go_out(visit)

    async def close_inner(self, env: Environment, session: Session) -> None:
        """See :meth:`tee.soft.ta.TaSession.close`."""
        await self._close_from(self._task_of_opener(env, session), session)

    async def _close_from(self, task: Task, session: Session) -> None:
        visit = Visit(task, session.instance, session)
        try:
            if session.state == _OPEN:
                await self._visit(visit, lambda: self._close_inside(task, session), [])
        except TeeError as error:  # it was not reached, or panicked on the way
            self._log(f"closing a TA's session with {session.instance.program.uuid} ended with {error}")
        finally:
            self._go_out(visit)
        self._end_opened(session, task.context)

    async def _close_inside(self, task: Task, session: Session) -> None:
        session.state, _ = SESSION[session.state, SessionEvent.CLOSE]
        instance = session.instance
        assert instance.ta is not None
        try:
            await instance.ta.close_session(session.data)
        except TeeError as error:
            self._log(f"TA {instance.program.uuid}: close_session ended with {error}")
        await self._leave(instance, session, task.context)
        self._move_session(session, SessionEvent.CLOSED)

    def _end_opened(self, session: Session, context: Context) -> None:
        """A session that a TA had opened ends, by the TEE's own hand where it has to: that waits for nobody."""
        if session.state in (_OPEN, SessionState.DEAD):
            task = Task(None, context)
            task.needs_thread = False
            task.forced = True
            self._begin_close(session, task)
        elif session.state != SessionState.CLOSED:
            self._forget_session(session)  # its TA was ended while it opened or closed it

    async def _instance_for(self, task: Task, uuid: UUID) -> Instance:
        """The instance with which another TA's session is opened, new or not."""
        if not isinstance(uuid, UUID):
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "a TA is named by a UUID")
        if uuid == SERVICES_UUID:
            raise TeeError(Result.ACCESS_DENIED, Origin.TEE, "TAs acquire enclaves by their environment")
        program: Program | None = None
        while True:
            installed = self._services.installed(task.context.vm, uuid)
            instance = self._singles.get(installed or uuid)
            if instance is None:
                program = installed or program or self._built_in.get(uuid)
                self._check_room(program, task.context.vm)
                if program is not None:
                    return self._new_instance(program, task.context)
                program = await self._load_inside(task, uuid)
            elif instance.state == InstanceState.DESTROYING:
                # Two of a single instance must not overlap: look again when this one is gone.
                visit = Visit(task, instance)
                try:
                    await self._come_in(visit)
                finally:
                    self._go_out(visit)
            elif instance.sessions and not instance.program.ta.multi_session:
                raise TeeError(Result.BUSY, Origin.TEE, "the TA serves one session at a time")
            else:
                return instance

    async def _load_inside(self, task: Task, uuid: UUID) -> Program:
        try:
            return await self._loader.load(task, uuid)
        except TeeError as error:
            self._log(f"TA {uuid} is not loaded: {error}")
            raise
        except Exception as error:  # that is not the calling TA's fault, and no panic of it
            self._log(f"TA {uuid} is not loaded: {error!r}")
            raise TeeError(Result.GENERIC, Origin.TEE, f"loading failed: {error!r}") from error

    async def _visit(
        self,
        visit: Visit,
        enter: Callable[[], Coroutine[Any, Any, None]],
        pairs: Sequence[tuple[TaParam, TaParam]],
    ) -> bool:
        """Wait until nobody else is in the instance, and run ``enter`` there; False where the instance is gone.

        Whoever calls this calls :meth:`_go_out` when all is done.
        """
        task, instance = visit.task, visit.instance
        visits = task.more().visits
        if len(visits) >= self.limits.depth:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, f"{len(visits)} TAs call one another")
        if not await self._come_in(visit):
            return False
        visit.masked, visit.entered = task.masked, True
        visits.append(visit)
        instance.env.enter_from(task, floor=visit.masked)
        error: TeeError | None = None
        try:
            await enter()
        except TeeError as own:
            error = own
        except KeyboardInterrupt:
            raise  # it is for whoever runs the TEE
        except GeneratorExit as end:  # the whole call is ended from outside
            self._panic(instance, task, end)
            raise
        except BaseException as nonsense:
            self._panic(instance, task, nonsense)
            let_go(pairs)
            raise _target_dead() from nonsense
        try:
            bring_back(pairs, succeeded=error is None)
        except (ValueError, TypeError, AttributeError) as nonsense:
            self._panic(instance, task, nonsense)
            raise _target_dead() from nonsense
        finally:
            let_go(pairs)
        if error is not None:
            raise TeeError(_own_code(error), Origin.TRUSTED_APP, error.why) from error
        return True

    async def _come_in(self, visit: Visit) -> bool:
        """Wait until nobody else is in the instance; False where it is gone then. BUSY where that could never be."""
        task, instance = visit.task, visit.instance
        owner = instance.owner
        if owner is None:
            instance.owner = visit
            return True
        if isinstance(owner, Task) and owner.state == CallState.WAITING:
            # It has not begun, for want of a thread: whoever has one goes first, else both might wait for ever.
            self._scheduler.withdraw(owner)
            instance.queue.appendleft(owner)
            instance.owner = visit
            return True
        if self._asks_client(instance, task):
            raise _waits_for_client()
        place: Instance | None = instance
        line = lineage(task)
        while place is not None and place.owner is not None:
            occupant = place.owner.task if isinstance(place.owner, Visit) else place.owner
            if occupant in line:
                raise TeeError(Result.BUSY, Origin.TEE, "the TA waits for the one that calls it")
            place = innermost(occupant).more().parked_at
        instance.visits.append(visit)
        task.more().parked_at = instance
        return bool(await suspend(Park()))

    def _let_visits_in(self, instance: Instance) -> None:
        while instance.visits and instance.owner is None:
            visit = instance.visits.popleft()
            visit.task.more().parked_at = None  # at once: who looks for circles must not see a wait that has ended
            if instance.state == InstanceState.DEAD:
                self._scheduler.wake(visit.task, _target_dead())
            elif instance.state == InstanceState.GONE:
                self._scheduler.wake(visit.task, False)
            else:
                instance.owner = visit
                self._scheduler.wake(visit.task, True)

    def _go_out(self, visit: Visit) -> None:
        """``visit`` has ended, or will not be: the next may enter."""
        task, instance = visit.task, visit.instance
        task.more().parked_at = None
        if visit.entered:
            visit.entered = False
            task.more().visits.remove(visit)
            task.masked = visit.masked
            instance.env.leave_from()
        if instance.owner is visit:
            self._pass_on(instance, task.context)
        elif visit in instance.visits:
            instance.visits.remove(visit)

    def end_visits(self, rare: Rare) -> None:
        """A task was ended from outside, and TAs kept the visits from being ended with it."""
        for visit in reversed(tuple(rare.visits)):
            self._panic(visit.instance, visit.task, None)
            self._go_out(visit)

    def _inside(self, task: Task) -> Instance:
        """The instance in which ``task`` is now."""
        visits = task.more().visits
        instance: Instance = visits[-1].instance if visits else task.instance
        return instance

    def _task_of_opener(self, env: Environment, session: Session) -> Task:
        task = env.current()
        if self._inside(task).opened is not session.context:
            raise TeeError(Result.BAD_STATE, Origin.TEE, "another instance's session")
        return task


class _Begun:
    """An invoke that was begun at once and waits: see :class:`~tee.driver.Begun`."""

    __slots__ = ("_coroutine", "_leases", "_task", "_tee", "_wait")

    def __init__(
        self,
        tee: SoftTee,
        task: Task,
        coroutine: Coroutine[Wait, Any, Any],
        wait: Any,
        leases: Sequence[Registration],
    ) -> None:
        self._tee = tee
        self._task = task
        self._coroutine = coroutine
        self._wait = wait
        self._leases = leases

    def becomes(self, call: Invoke) -> None:
        """See :class:`~tee.driver.Begun`."""
        self._tee.go_on(call, self._task, self._leases, self._coroutine, self._wait)


_MISSING = object()


def _listed(program: Program, used: set[Program]) -> ListedService:
    flags = ServiceFlag.LOADED if program.installed else ServiceFlag.BUILT_IN
    if program in used:
        flags |= ServiceFlag.IN_USE
    return ListedService(program.uuid, program.version, program.ta.api_level, flags, program.ta.description)


def _key(program: Program) -> UUID | Program:
    """By what a single instance is found. An installed service is for one machine only, and in one version."""
    return program if program.installed else program.uuid


def _stays(program: Program) -> bool:
    """Whether an instance outlives its last session."""
    return program.ta.single_instance and program.ta.keep_alive and not program.retired


def _target_dead() -> TeeError:
    return TeeError(Result.TARGET_DEAD, Origin.TEE, "the TA has panicked")


def _waits_for_client() -> TeeError:
    return TeeError(Result.BUSY, Origin.TEE, "the TA waits for a client")


def _own_code(error: TeeError) -> int:
    """The code that a TA ended with, if it is one that a client can be given."""
    code = error.code
    return code if isinstance(code, int) and 0 < code < 1 << 32 else Result.GENERIC


def _no_log(_: str) -> None:
    return
