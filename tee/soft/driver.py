"""The software TEE as a :class:`~tee.driver.TeeDriver`: who may call what, which instance serves it, and how all of
it ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from tee import package
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
from tee.driver import Done, Event, GenCap, RpcWithdrawn, Sink, TeeInfo, TeeKind
from tee.memory import Memory
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcReply
from tee.soft.entities import Context, Instance, Program, Registration, Session
from tee.soft.loader import Loader
from tee.soft.params import admit, check_sizes, let_go, registration_of, write_back
from tee.soft.scheduler import Scheduler, Task
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
from tee.soft.ta import Environment, TrustedApplication

#: How many calls to begin and coroutines to step in one :meth:`SoftTee.run`.
STEPS_PER_RUN = 64

_OPEN = SessionState.OPEN


class SoftTee:
    """A TEE without a secure world: TAs are Python coroutines in this process.

    :param clock: seconds of a monotonic clock (``time.monotonic``)
    :param random: gives n bytes of cryptographic quality (``secrets.token_bytes``)
    :param keys: public keys (PEM, or objects of ``cryptography``) of those who may sign TAs; none: no TA is loaded by
        RPC
    :param built_in: TAs that are there without being loaded
    :param threads: how many calls can be inside TAs at once; others wait their turn
    :param max_ta_size: the largest TA package, in bytes
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
        log: Callable[[str], None] | None = None,
    ) -> None:
        self._clock = clock
        self._random = random
        self._log = log if log is not None else _no_log
        self._loader = Loader(keys, max_ta_size, self._new_use, self._end_use)
        self._built_in = {u: Program(u, ta, ta.version) for u, ta in (built_in or {}).items()}
        self._inbox: deque[Call] = deque()
        self._outbox: deque[Event] = deque()
        self._calls: dict[Call, Task | None] = {}
        self._cancelled: set[Call] = set()
        self._singles: dict[UUID, Instance] = {}
        self._contexts: set[Context] = set()
        self._sink: Sink | None = None
        self._scheduler = Scheduler(
            clock=clock,
            threads=threads,
            emit_rpc=self._outbox.append,
            emit_withdrawn=lambda rpc: self._outbox.append(RpcWithdrawn(rpc)),
        )
        self._begin: dict[type[Call], Callable[[Any], None]] = {
            OpenContext: self._open_context,
            CloseContext: self._close_context,
            OpenSession: self._open_session,
            CloseSession: self._close_session,
            Invoke: self._invoke,
            RegisterMemory: self._register,
            UnregisterMemory: self._unregister,
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

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`. Only OpenSession and Invoke are cancelled; others end soon by
        themselves.
        """
        if call not in self._calls:
            return
        task = self._calls[call]
        if task is not None:
            self._scheduler.cancel(task)
        elif type(call) is Invoke or type(call) is OpenSession:
            self._cancelled.add(call)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._scheduler.answer(rpc, reply)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        inbox, outbox, scheduler, sink = self._inbox, self._outbox, self._scheduler, self._sink
        if sink is None:
            raise RuntimeError("attach a sink first")
        ready = scheduler.ready
        scheduler.expire()
        for _ in range(STEPS_PER_RUN):
            if inbox:
                self._start(inbox.popleft())
            if ready:
                scheduler.step()
            while outbox:
                sink(outbox.popleft())
            if not inbox and not ready:
                left = scheduler.expire()
                return 0.0 if ready else left
        return 0.0

    def fileno(self) -> int | None:
        """None: there is nothing to wait for but calls, answers and time."""
        return None

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
        instances = {session.instance for context in self._contexts for session in context.sessions}
        instances.update(self._singles.values())
        return {
            "calls": len(self._calls),
            "contexts": len(self._contexts),
            "sessions": sum(len(context.sessions) for context in self._contexts),
            "instances": len(instances),
            "registrations": sum(len(context.registrations) for context in self._contexts),
            "rpcs": len(self._scheduler.rpcs),
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

    def _task(self, call: OpenSession | Invoke, context: Context) -> Task:
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
        if not task.entered:
            if isinstance(error, TeeError):
                return error.code, error.origin
            return Result.GENERIC, Origin.TEE
        code: int = Result.SUCCESS
        if error is None or isinstance(error, TeeError):
            pairs = task.pairs
            if error is not None:
                code = _own_code(error)
            if not pairs:
                return code, Origin.TRUSTED_APP
            try:
                if error is None:
                    check_sizes(pairs)
                write_back(pairs)
            except (ValueError, TypeError, AttributeError) as nonsense:
                error = nonsense
            else:
                let_go(pairs)
                return code, Origin.TRUSTED_APP
        let_go(task.pairs)
        self._log(f"TA {task.instance.program.uuid} panicked: {error!r}")
        self._move_instance(task.instance, InstanceEvent.PANIC)
        return Result.TARGET_DEAD, Origin.TEE

    # Contexts.

    def _open_context(self, call: OpenContext) -> None:
        context = Context(self, str(call.vm))
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
        assert context.closer is not None
        self._finish(context.closer)

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
        self._place(self._task(call, self._context(call.context)))

    def _place(self, task: Task) -> None:
        """Find or make the instance that serves an OpenSession; load its program first where there is none yet."""
        call = task.call
        assert isinstance(call, OpenSession)
        if task.cancelled or task.forced:
            self._end_task(task, Result.CANCEL)
            return
        instance = self._singles.get(call.uuid)
        if instance is None:
            program = task.program or self._built_in.get(call.uuid)
            if program is None:
                task.masked = False
                task.main = lambda task: self._loader.load(task, call.uuid)
                task.ended = self._loaded
                self._scheduler.submit(task)
                return
            instance = self._new_instance(program)
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

    def _loaded(self, task: Task, program: Any, error: BaseException | None) -> None:
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

    def _new_instance(self, program: Program) -> Instance:
        env = Environment(program.uuid, program.version, clock=self._clock, random=self._random, log=self._log)
        instance = Instance(program, env)
        if program.ta.single_instance:
            self._singles[program.uuid] = instance
        return instance

    async def _enter_session(self, task: Task) -> object:
        """What runs for an OpenSession, inside the instance."""
        instance, call = task.instance, task.call
        self._enter(task)
        assert isinstance(call, OpenSession)
        if instance.state == InstanceState.CREATING:
            instance.ta = instance.program.ta(instance.env)
            await instance.ta.create()
            self._move_instance(instance, InstanceEvent.CREATED)
        try:
            return await instance.ta.open_session(task.params, call.client)
        except TeeError:
            await self._leave(instance, task.session)
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
            # Where nobody else waits to create the instance, it will never be: it must not stay.
            if instance.state == InstanceState.CREATING and (task.entered or not instance.sessions):
                self._move_instance(instance, InstanceEvent.FAILED)
        self._release(task, instance)
        self._end_task(task, code, origin, session if code == Result.SUCCESS else None)

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
        session.context.tasks.add(task)
        instance = session.instance
        for other in (instance.owner, *instance.queue):
            if other is not None and other.session is session:
                self._scheduler.cancel(other)
        self._acquire(task, instance)

    def _close_dead(self, session: Session, task: Task) -> None:
        self._forget_session(session)
        self._end_task(task)

    async def _leave_session(self, task: Task) -> None:
        """What runs for a CloseSession, inside the instance."""
        instance, session = task.instance, task.session
        self._enter(task)
        try:
            await instance.ta.close_session(session.data)
        except TeeError as error:
            self._log(f"TA {instance.program.uuid}: close_session ended with {error}")
        await self._leave(instance, session)

    async def _leave(self, instance: Instance, session: Session | None) -> None:
        """``session`` no longer counts; with the last one the instance ends, unless it is kept alive."""
        if session is not None:
            instance.sessions.discard(session)
        ta = instance.program.ta
        if instance.sessions or (ta.single_instance and ta.keep_alive):
            return
        self._move_instance(instance, InstanceEvent.EMPTY)
        assert instance.ta is not None
        try:
            await instance.ta.destroy()
        except TeeError as error:
            self._log(f"TA {instance.program.uuid}: destroy ended with {error}")
        self._move_instance(instance, InstanceEvent.DESTROYED)

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
        return task.instance.ta.invoke(task.session.data, task.call.func, task.params)  # type: ignore[union-attr]

    def _invoked(self, task: Task, _: object, error: BaseException | None) -> None:
        code, origin = self._outcome(task, error)
        self._release(task, task.instance)
        self._end_task(task, code, origin)

    # Instances.

    def _acquire(self, task: Task, instance: Instance) -> None:
        """Let ``task`` into ``instance`` when nobody else is in it. Only then it waits for a thread: never the other
        way.
        """
        task.instance = instance
        if instance.owner is None:
            instance.owner = task
            self._scheduler.submit(task)
        else:
            instance.queue.append(task)

    def _enter(self, task: Task) -> None:
        task.entered = True
        task.instance.env.enter(task)

    def _release(self, task: Task, instance: Instance) -> None:
        """``task`` has ended: the next in the queue may enter, if it was ``task`` that was inside."""
        if instance.owner is not task:
            return
        instance.env.enter(None)
        instance.owner = None
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
            self._reap(task.context, instance)

    def _reap(self, context: Context, instance: Instance) -> None:
        """End an instance whose last session went away before it was entered (its OpenSession was cancelled)."""
        ta = instance.program.ta
        if ta.single_instance and ta.keep_alive:
            return
        task = Task(None, context)
        task.needs_thread = task.cancellable = False
        task.main, task.ended = self._leave_nobody, self._nobody_left
        context.tasks.add(task)
        self._acquire(task, instance)

    async def _leave_nobody(self, task: Task) -> None:
        self._enter(task)
        if not task.instance.sessions:
            await self._leave(task.instance, None)

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

    def _move_instance(self, instance: Instance, event: InstanceEvent) -> None:
        instance.state, action = INSTANCE[instance.state, event]
        if action:
            getattr(self, f"_{action}")(instance)

    def _bury_instance(self, instance: Instance) -> None:
        self._forget_instance(instance)
        for session in instance.sessions:
            self._move_session(session, SessionEvent.PANIC)

    def _forget_instance(self, instance: Instance) -> None:
        if self._singles.get(instance.program.uuid) is instance:
            del self._singles[instance.program.uuid]


_MISSING = object()


def _target_dead() -> TeeError:
    return TeeError(Result.TARGET_DEAD, Origin.TEE, "the TA has panicked")


def _own_code(error: TeeError) -> int:
    """The code that a TA ended with, if it is one that a client can be given."""
    code = error.code
    return code if isinstance(code, int) and 0 < code < 1 << 32 else Result.GENERIC


def _no_log(_: str) -> None:
    return
