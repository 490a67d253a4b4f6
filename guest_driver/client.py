"""The TEE Client API for Python, over any :class:`~tee.driver.TeeDriver` that a :class:`~tee.io.runtime.TeeRuntime`
runs.

It has the concepts of GlobalPlatform's C API, and the same results and origins:

>>> with Context(runtime) as context, context.open_session(HELLO_WORLD) as session:      # doctest: +SKIP
...     (value,) = session.invoke(0, ValueInOut(41))
...     print(value.a)
42

Values and memory go in as parameters, results come back as a list with one entry for each: ``None`` for inputs and
empty ones, a :class:`Words` for values, ``bytes`` for temporary memory, the size for shared memory and the NULL
reference. A call that fails raises :class:`CallError`, a :class:`~tee.results.TeeError` that has what came back, too:
SHORT_BUFFER's sizes, for one.

Temporary memory is copied. Below :data:`REGISTER_FROM` bytes it is passed along as it is (a virtio driver sends it
inside the request); from there on it is registered for the time of the call. What is used often, or must be seen by
both sides during a call, belongs into a :class:`SharedMemory`.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import NamedTuple
from uuid import UUID

from guest_driver.ocalls import Handler, run
from tee.calls import (
    NIL_UUID,
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
from tee.driver import Done
from tee.io.notifications import Notifications
from tee.io.ocalls import OcallServer
from tee.io.runtime import Pending, TeeRuntime
from tee.memory import FfaShare, Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc

__all__ = [
    "REGISTER_FROM",
    "CallError",
    "CancelToken",
    "Context",
    "Empty",
    "Notifications",
    "Null",
    "Parameter",
    "PendingCall",
    "Session",
    "SharedMemory",
    "TempIn",
    "TempInOut",
    "TempOut",
    "ValueIn",
    "ValueInOut",
    "ValueOut",
    "Words",
]

#: Temporary memory of this many bytes or more is registered for the time of its call.
REGISTER_FROM = 32 << 10


class Words(NamedTuple):
    """The three 64-bit words of a value."""

    a: int = 0
    b: int = 0
    c: int = 0


Answer = Words | bytes | int | None


class CallError(TeeError):
    """A call failed; ``answers`` is what came back in its parameters, ``sizes`` the sizes of its memory references."""

    def __init__(self, code: int, origin: int, answers: list[Answer], sizes: list[int | None], why: str = "") -> None:
        super().__init__(code, origin, why)
        self.answers = answers
        self.sizes = sizes


class Parameter(ABC):
    """One parameter of a call, as the caller gives it."""

    __slots__ = ()

    @abstractmethod
    def prepare(self, context: Context, after: ExitStack, *, register: bool = False) -> Param:
        """What is sent; ``after`` is unwound when the call has ended. ``register``: temporary memory of any size is
        registered for the time of the call, so that OCALLs can name it."""

    @abstractmethod
    def answer(self, param: Param) -> Answer:
        """What came back in it."""


class Empty(Parameter):
    """An empty slot."""

    def prepare(self, context: Context, after: ExitStack, *, register: bool = False) -> Param:
        """See :class:`Parameter`."""
        return Nothing()

    def answer(self, param: Param) -> Answer:
        """See :class:`Parameter`."""
        return None


class _Words(Parameter):
    direction = Direction.IN

    def __init__(self, a: int = 0, b: int = 0, c: int = 0) -> None:
        for word in (a, b, c):
            if not 0 <= word < 1 << 64:
                raise ValueError(f"{word} does not fit 64 bits")
        self.words = Words(a, b, c)

    def prepare(self, context: Context, after: ExitStack, *, register: bool = False) -> Param:
        """See :class:`Parameter`."""
        return Value(self.direction, *self.words)

    def answer(self, param: Param) -> Answer:
        """See :class:`Parameter`."""
        if self.direction == Direction.IN or not isinstance(param, Value):
            return None
        return Words(param.a, param.b, param.c)


class ValueIn(_Words):
    """Three words for the TA."""


class ValueInOut(_Words):
    """Three words for the TA, which answers three."""

    direction = Direction.INOUT


class ValueOut(_Words):
    """Three words from the TA."""

    direction = Direction.OUT

    def __init__(self) -> None:
        super().__init__()


class _Temporary(Parameter):
    direction = Direction.IN

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self.data = data

    def prepare(self, context: Context, after: ExitStack, *, register: bool = False) -> Param:
        """See :class:`Parameter`."""
        size = len(self.data)
        register = size > 0 and (register or size >= context.register_from)
        memory = context.borrow(size, after) if register else Memory.of(bytearray(size))
        if self.direction != Direction.OUT:
            memory.write(0, self.data)
        if not register and self.direction == Direction.IN:
            memory.read_only = True
        param = MemRef(self.direction, memory, 0, size)
        if self.direction != Direction.IN:
            # Read before the memory is given back; that is what unwinding in reverse order does.
            after.callback(self._keep, param, memory, size)
        self._came_back = b""
        return param

    def answer(self, param: Param) -> Answer:
        """See :class:`Parameter`."""
        return None if self.direction == Direction.IN else self._came_back

    def _keep(self, param: MemRef, memory: Memory, room: int) -> None:
        # A size above the room is what SHORT_BUFFER says; a TEE is not trusted to say it only then.
        self._came_back = memory.read(0, param.size) if 0 <= param.size <= room else b""
        if isinstance(self.data, bytearray | memoryview):
            self.data[: len(self._came_back)] = self._came_back


class TempIn(_Temporary):
    """Bytes for the TA."""


class TempInOut(_Temporary):
    """Bytes for the TA, which answers at most as many. A ``bytearray`` gets them in place, too."""

    direction = Direction.INOUT


class TempOut(_Temporary):
    """Room for bytes from the TA: a number of bytes, or a ``bytearray``, which gets them in place, too."""

    direction = Direction.OUT

    def __init__(self, room: int | bytearray | memoryview) -> None:
        super().__init__(bytearray(room) if isinstance(room, int) else room)


class Null(Parameter):
    """The NULL reference: no memory. A TA that answers SHORT_BUFFER to it says how much it needs."""

    def __init__(self, direction: Direction = Direction.OUT, size: int = 0) -> None:
        self.direction = direction
        self.size = size

    def prepare(self, context: Context, after: ExitStack, *, register: bool = False) -> Param:
        """See :class:`Parameter`."""
        return MemRef(self.direction, None, 0, self.size)

    def answer(self, param: Param) -> Answer:
        """See :class:`Parameter`."""
        return param.size if isinstance(param, MemRef) else None


class _Part(Parameter):
    def __init__(self, shared: SharedMemory, direction: Direction, offset: int, size: int) -> None:
        self.shared = shared
        self.direction = direction
        self.offset = offset
        self.size = size

    def prepare(self, context: Context, after: ExitStack, *, register: bool = False) -> Param:
        """See :class:`Parameter`."""
        if self.shared.context is not context:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "shared memory of another context")
        return MemRef(self.direction, self.shared.memory, self.offset, self.size)

    def answer(self, param: Param) -> Answer:
        """See :class:`Parameter`."""
        return param.size if isinstance(param, MemRef) and self.direction != Direction.IN else None


class SharedMemory:
    """Memory that both sides see, until :meth:`close` or the end of its context. A context manager."""

    def __init__(self, context: Context, memory: Memory, *, owned: bool) -> None:
        self.context = context
        self._memory: Memory | None = memory
        self._owned = owned

    def __enter__(self) -> SharedMemory:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def memory(self) -> Memory:
        """The memory. TeeError BAD_STATE after :meth:`close`."""
        if self._memory is None:
            raise TeeError(Result.BAD_STATE, Origin.API, "the shared memory is released")
        return self._memory

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.memory.size

    def view(self) -> memoryview:
        """All of it in place. ValueError where it lies in several pieces: then use read and write."""
        view = self.memory.view(0, self.size)
        if view is None:
            raise ValueError("this memory is not in one piece")
        return view

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """A copy of ``size`` bytes (default: all from ``offset`` on)."""
        return self.memory.read(offset, self.size - offset if size is None else size)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy ``data`` in."""
        self.memory.write(offset, data)

    def whole(self, direction: Direction) -> Parameter:
        """All of it, as a parameter."""
        return _Part(self, direction, 0, self.size)

    def part(self, direction: Direction, offset: int, size: int) -> Parameter:
        """Some of it, as a parameter. Its bounds are the TEE's to check."""
        return _Part(self, direction, offset, size)

    def close(self) -> None:
        """End the registration; waits for calls that use the memory, but not in a handler of OCALLs: there it ends
        when they have ended. Nothing where that has happened."""
        memory, self._memory = self._memory, None
        if memory is not None:
            self.context.unshare(self, memory, self._owned)


class CancelToken:
    """Cancels whatever call it is given to, also from another thread, also before that has begun."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending: list[Pending] = []
        self._cancelled = False

    @property
    def cancelled(self) -> bool:
        """It was used."""
        return self._cancelled

    def cancel(self) -> None:
        """Ask the calls to end early; they do so with CANCEL, or as they would have otherwise."""
        with self._lock:
            self._cancelled = True
            pending = tuple(self._pending)
        for one in pending:
            one.cancel()

    def watch(self, pending: Pending) -> None:
        """For calls: ``pending`` is one of this token's."""
        with self._lock:
            self._pending.append(pending)
            cancelled = self._cancelled
        if cancelled:
            pending.cancel()

    def unwatch(self, pending: Pending) -> None:
        """For calls: ``pending`` has ended."""
        with self._lock:
            self._pending.remove(pending)


class PendingCall:
    """An invocation under way: :meth:`wait` for it, or :meth:`cancel` it and then wait. Its memory is free after
    ``wait`` only.
    """

    def __init__(
        self,
        context: Context,
        call: OpenSession | Invoke,
        parameters: Sequence[Parameter],
        cancel: CancelToken | None,
        ocalls: Handler | None = None,
    ) -> None:
        self._context = context
        self._parameters = parameters
        self._cancel = cancel
        self._after = ExitStack()
        self._done: Done | None = None
        self._answers: list[Answer] = []
        try:
            register = ocalls is not None
            call.params = self._params = [p.prepare(context, self._after, register=register) for p in parameters]
            self._pending = context.submit(call, _Client(context, ocalls) if ocalls is not None else None)
        except BaseException:
            self._after.close()
            raise
        if cancel is not None:
            cancel.watch(self._pending)

    def cancel(self) -> None:
        """Ask the call to end early."""
        self._pending.cancel()

    def finish(self, timeout: float | None = None) -> Done:
        """Wait for the end of the call. TimeoutError after ``timeout`` seconds: it then still runs. CallError where
        it failed.
        """
        if self._done is None:
            try:
                done = self._pending.wait(timeout)
            except KeyboardInterrupt:
                self._pending.cancel()
                raise
            if self._cancel is not None:
                self._cancel.unwatch(self._pending)
            self._after.close()
            self._answers = [p.answer(param) for p, param in zip(self._parameters, self._params, strict=True)]
            self._done = done
        if self._done.code != Result.SUCCESS:
            sizes = [param.size if isinstance(param, MemRef) else None for param in self._params]
            why = "it may have run" if self._done.may_have_run else ""
            raise CallError(self._done.code, self._done.origin, self._answers, sizes, why)
        return self._done

    def wait(self, timeout: float | None = None) -> list[Answer]:
        """Wait for the end of the call, and give its answers. See :meth:`finish` for what it raises."""
        self.finish(timeout)
        return self._answers


class _Client:
    """This client, as its TAs' OCALLs see it (:class:`~tee.io.ocalls.OcallServer`)."""

    def __init__(self, context: Context, handler: Handler) -> None:
        self._context = context
        self._handler = handler
        self.context = context.handle

    def call(self, function: int, rpc: Rpc) -> int:
        return run(self._handler, function, rpc.params[1:])

    def allocate(self, size: int) -> Memory:
        return self._context.lend(size)

    def release(self, memory: Memory) -> None:
        self._context.take_back(memory)


class Session:
    """A session with a TA. A context manager."""

    def __init__(self, context: Context, session: object, answers: list[Answer]) -> None:
        self._context = context
        self._session: object | None = session
        self.answers = answers  #: what the TA answered when it opened the session

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def invoke(
        self,
        command: int,
        *parameters: Parameter,
        cancel: CancelToken | None = None,
        ocalls: Handler | None = None,
    ) -> list[Answer]:
        """Have the TA do ``command``, and wait for it. ``ocalls`` serves what it calls this client for
        (:mod:`guest_driver.ocalls`). Raises CallError."""
        return self.begin(command, *parameters, cancel=cancel, ocalls=ocalls).wait()

    def begin(
        self,
        command: int,
        *parameters: Parameter,
        cancel: CancelToken | None = None,
        ocalls: Handler | None = None,
    ) -> PendingCall:
        """Have the TA do ``command``, without waiting."""
        if self._session is None:
            raise TeeError(Result.BAD_STATE, Origin.API, "the session is closed")
        if not 0 <= command < 1 << 32:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "a command has 32 bits")
        return PendingCall(self._context, Invoke(session=self._session, func=command), parameters, cancel, ocalls)

    def close(self) -> None:
        """Close it; waits for its calls. Nothing where that has happened."""
        session, self._session = self._session, None
        if session is not None:
            self._context.close_session(session)


class Context:
    """A connection to a TEE. A context manager; may be used by several threads."""

    def __init__(self, runtime: TeeRuntime, *, vm: str = "", register_from: int = REGISTER_FROM) -> None:
        """``vm`` is for TEEs that serve several machines from one place. Temporary memory of ``register_from`` bytes or
        more is registered for the time of its call: 1 keeps all data out of requests."""
        self._runtime = runtime
        self.register_from = register_from
        self._shared: set[SharedMemory] = set()
        done = self._call(OpenContext(vm=vm))
        self._context: object | None = done.value

    def __enter__(self) -> Context:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def open_session(
        self,
        uuid: UUID | str,
        *parameters: Parameter,
        login: int = Login.PUBLIC,
        client_uuid: UUID = NIL_UUID,
        cancel: CancelToken | None = None,
        ocalls: Handler | None = None,
    ) -> Session:
        """Open a session with the TA ``uuid``; ``ocalls`` as in :meth:`Session.invoke`. Raises CallError."""
        uuid = uuid if isinstance(uuid, UUID) else UUID(uuid)
        call = OpenSession(context=self.handle, uuid=uuid, client=Client(login, client_uuid))
        pending = PendingCall(self, call, parameters, cancel, ocalls)
        try:
            answers = pending.wait()
        except KeyboardInterrupt:
            self._drop(pending)
            raise
        return Session(self, pending.finish().value, answers)

    def allocate(self, size: int) -> SharedMemory:
        """Shared memory of ``size`` bytes, zeroed. Raises TeeError OUT_OF_MEMORY, or what the TEE says."""
        try:
            memory = self._runtime.allocate_registered(self.handle, size)
        except MemoryError as error:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.API, str(error)) from None
        shared = SharedMemory(self, memory, owned=True)
        self._shared.add(shared)
        return shared

    def register(self, buffer: bytearray | memoryview) -> SharedMemory:
        """``buffer`` itself as shared memory, where the driver can reach memory of this process. Raises TeeError."""
        memory = Memory.of(buffer)
        self._call(RegisterMemory(context=self.handle, memory=memory))
        shared = SharedMemory(self, memory, owned=False)
        self._shared.add(shared)
        return shared

    def register_handle(self, handle: int, size: int, *, tag: int = 0, read_only: bool = False) -> SharedMemory:
        """Memory of ``size`` bytes that this VM has shared with the TEE by FF-A; its bytes are not to be seen by this
        object. Raises TeeError: ITEM_NOT_FOUND, the TEE does not know the handle as this VM's, with this tag;
        BUSY, it is registered; BAD_PARAMETERS, it has another size; ACCESS_DENIED, it was shared read-only."""
        memory = Memory(size=size, read_only=read_only, ffa=FfaShare(handle, tag))
        self._call(RegisterMemory(context=self.handle, memory=memory))
        shared = SharedMemory(self, memory, owned=False)
        self._shared.add(shared)
        return shared

    def notifications(self, *values: int) -> Notifications:
        """What the TEE raises from now on for this machine: ``values``, or all. See :class:`Notifications`."""
        return self._runtime.notifications(*values)

    def close(self) -> None:
        """Close it with all that is open under it. Nothing where that has happened."""
        context, self._context = self._context, None
        if context is None:
            return
        self._ignore_closed(CloseContext(context=context))
        for shared in tuple(self._shared):
            shared.close()

    # For the other classes of this module.

    @property
    def handle(self) -> object:
        """The driver's context. TeeError BAD_STATE after :meth:`close`."""
        if self._context is None:
            raise TeeError(Result.BAD_STATE, Origin.API, "the context is closed")
        return self._context

    def submit(self, call: Call, ocalls: OcallServer | None = None) -> Pending:
        """Start ``call``."""
        try:
            return self._runtime.submit(call, ocalls)
        except RuntimeError as error:
            raise TeeError(Result.COMMUNICATION, Origin.API, str(error)) from None

    def borrow(self, size: int, after: ExitStack) -> Memory:
        """Registered memory until ``after`` is unwound."""
        shared = self.allocate(size)
        after.callback(shared.close)
        return shared.memory

    def unshare(self, shared: SharedMemory, memory: Memory, owned: bool) -> None:
        """End a registration; release what was allocated, let go of what is the caller's."""
        self._shared.discard(shared)
        if self._runtime.in_handler:  # the call that it serves may be using it, and would be waited for
            self._runtime.aside(lambda: self._end_sharing(memory, owned))
        else:
            self._end_sharing(memory, owned)

    def _end_sharing(self, memory: Memory, owned: bool) -> None:
        if self._context is not None:
            self._ignore_closed(UnregisterMemory(context=self._context, memory=memory))
        if owned:
            self._runtime.release(memory)
        else:
            memory.forget()

    def lend(self, size: int) -> Memory:
        """Registered memory for a TA. Raises MemoryError, or TeeError."""
        return self._runtime.allocate_registered(self.handle, size)

    def take_back(self, memory: Memory) -> None:
        """What :meth:`lend` gave."""
        if self._context is not None:
            self._ignore_closed(UnregisterMemory(context=self._context, memory=memory))
        self._runtime.release(memory)

    def close_session(self, session: object) -> None:
        """Close a session; where the context is closed that has happened with it."""
        if self._context is not None:
            self._ignore_closed(CloseSession(session=session))

    def _drop(self, pending: PendingCall) -> None:
        """A session whose opening Ctrl-C interrupted must not stay."""
        try:
            self.close_session(pending.finish(1.0).value)
        except (TeeError, TimeoutError):
            return

    def _call(self, call: Call) -> Done:
        done = self.submit(call).wait()
        if done.code != Result.SUCCESS:
            raise TeeError(done.code, done.origin, type(call).__name__)
        return done

    def _ignore_closed(self, call: Call) -> None:
        """For calls that end something: where the runtime is closed, it has ended all."""
        try:
            self._runtime.submit(call).wait()
        except RuntimeError:
            return
