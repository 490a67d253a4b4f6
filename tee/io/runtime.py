"""A thread that owns a :class:`~tee.driver.TeeDriver`, and a synchronous, thread-safe API to it.

The owner thread runs the driver and nothing else; RPCs are served on others (:mod:`tee.io.lanes`), so that a slow
service (a TA read from a slow disk) holds neither completions nor cancels up, and one that waits no other RPCs.
"""

from __future__ import annotations

import itertools
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

from tee.calls import Call, CloseContext, CloseSession, OpenContext, RegisterMemory, UnregisterMemory
from tee.driver import Done, Event, Notification, RpcWithdrawn, TeeDriver, TeeInfo
from tee.io.lanes import Lane, Lanes
from tee.io.notifications import Notifications
from tee.io.ocalls import Ocalls, OcallServer, refusal
from tee.io.supplicant import Allocator, RpcServer
from tee.memory import Memory
from tee.params import MemRef
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply

#: How long :meth:`TeeRuntime.close` waits for contexts to end, in seconds.
CLOSE_TIMEOUT = 5.0

#: How long a call that Ctrl-C interrupts is waited for after it was cancelled, in seconds.
INTERRUPT_GRACE = 2.0

#: Handlers of OCALLs that run at a time; further OCALLs wait for one to end.
MAX_HANDLERS = 64

_LOST = frozenset({Result.TARGET_DEAD, Result.COMMUNICATION})
"""What a call in a context gets that the TEE, or the way to it, has lost."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What an observer is told. ``time`` is ``time.monotonic()`` in seconds.

    ``kind`` is "start", "cancel", "done" (``subject`` the Call; ``detail`` its Done), "rpc", "answer" (``detail`` the
    reply) or "withdrawn" (``subject`` the Rpc).
    """

    time: float
    kind: str
    subject: Call | Rpc
    detail: Done | RpcReply | None = None


_log = logging.getLogger(__name__)
_thread = threading.local()

Observer = Callable[[Observation], None]


class Pending:
    """A call that was submitted."""

    __slots__ = ("_done", "_runtime", "_woken", "call", "ocalls")

    def __init__(self, runtime: TeeRuntime, call: Call, ocalls: Ocalls | None = None) -> None:
        self.call = call
        self.ocalls = ocalls
        self._runtime = runtime
        self._woken = threading.Event()
        self._done: Done | None = None

    @property
    def done(self) -> Done | None:
        """How the call ended, or None while it has not."""
        return self._done

    def wait(self, timeout: float | None = None) -> Done:
        """Wait for the call to end. TimeoutError after ``timeout`` seconds: the call then still runs."""
        if not self._woken.wait(timeout):
            raise TimeoutError(f"{type(self.call).__name__} has not ended after {timeout} s")
        assert self._done is not None
        return self._done

    def cancel(self) -> None:
        """Ask the call to end early. It still ends by its Done."""
        self._runtime.cancel(self.call)

    def end(self, done: Done) -> None:
        """For the runtime: the call has ended."""
        self._done = done
        self._woken.set()


class TeeRuntime:
    """Runs ``driver``. ``supplicant`` answers its RPCs (without one: COMMUNICATION). A context manager.

    ``on_event`` is called with an :class:`Observation` of each call, RPC and answer, mostly on the owner thread: it
    must be quick and must not call the runtime.
    """

    def __init__(
        self,
        driver: TeeDriver,
        supplicant: RpcServer | None = None,
        on_event: Observer | None = None,
        *,
        vm: str = "",
    ) -> None:
        """``vm`` names the machine in whose context the supplicant's memory is registered."""
        self._driver = driver
        self._supplicant = supplicant
        self._observe = on_event
        self._vm = vm
        self._commands: deque[Callable[[], None]] = deque()
        self._lock = threading.Lock()  # guards what follows, up to the wake-up
        self._pending: dict[Call, Pending] = {}
        self._contexts: set[object] = set()
        self._outstanding: set[Rpc] = set()
        self._given: dict[Rpc, RpcReply] = {}  # answered SHM_ALLOCs whose memory the TEE has
        self._asked_clients: dict[Rpc, Ocalls] = {}  # what was asked of clients, while it is outstanding or given
        self._listeners: set[Notifications] = set()
        self._closed = False  # nothing can be submitted any more
        self._finished = False  # close() has begun
        self._stopping = False
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._waking = threading.Lock()
        self._asleep = False  # for ever
        self._memory = _SupplicantMemory(self)
        self._names = next(_numbers)
        driver.attach(self._sink)
        self._owner = threading.Thread(target=self._own, name=f"tee-runtime-{self._names}", daemon=True)
        self._clients: Lane[Callable[[], None]] = Lane(f"tee-ocalls-{self._names}", MAX_HANDLERS, lambda work: work())
        self._work: Lanes[Rpc | RpcReply] = Lanes(f"tee-supplicant-{self._names}", self._serve)
        self._owner.start()

    def __enter__(self) -> TeeRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def info(self) -> TeeInfo:
        """Which TEE it is."""
        return self._driver.info

    def submit(self, call: Call, ocalls: OcallServer | None = None) -> Pending:
        """Start ``call``; RuntimeError after :meth:`close`. ``ocalls`` serves what its TA calls the client for; without
        it that is refused."""
        pending = Pending(self, call, Ocalls(ocalls) if ocalls is not None else None)
        with self._lock:
            if self._closed:
                raise RuntimeError("the runtime is closed")
            if call in self._pending:
                raise ValueError("this call has been started already")
            self._pending[call] = pending
        if isinstance(call, CloseContext | CloseSession):
            self._end_asking_clients(call)
        self._tell("start", call)
        self._post(lambda: self._driver.start(call))
        return pending

    def _end_asking_clients(self, call: CloseContext | CloseSession) -> None:
        """The client goes: its OCALLs are answered before what they name is closed."""
        with self._lock:
            asked = [
                rpc
                for rpc, ocalls in self._asked_clients.items()
                if (isinstance(call, CloseContext) and ocalls.context is call.context)
                or (isinstance(call, CloseSession) and getattr(rpc.call, "session", None) is call.session)
            ]
        for rpc in asked:
            self._answer(rpc, RpcReply(Result.COMMUNICATION))

    def call(self, call: Call, timeout: float | None = None) -> Done:
        """Start ``call`` and wait for its end.

        After ``timeout`` seconds the call is cancelled and TimeoutError raised; it ends by itself some time later.
        Ctrl-C cancels it, and is raised when it has ended (or has not within :data:`INTERRUPT_GRACE`).
        """
        pending = self.submit(call)
        try:
            return pending.wait(timeout)
        except TimeoutError:
            pending.cancel()
            raise
        except KeyboardInterrupt:
            pending.cancel()
            with suppress(TimeoutError):
                pending.wait(INTERRUPT_GRACE)
            raise

    def cancel(self, call: Call) -> None:
        """Ask ``call`` to end early; nothing where it has ended."""
        with self._lock:
            if call not in self._pending or self._stopping:
                return
        self._tell("cancel", call)
        self._post(lambda: self._driver.cancel(call))

    def allocate(self, size: int) -> Memory:
        """Memory that the TEE can reach, not registered. Raises MemoryError. :meth:`release` gives it back."""
        memory: list[Memory | MemoryError] = []

        def allocate() -> None:
            try:
                memory.append(self._driver.allocate(size))
            except MemoryError as error:
                memory.append(error)

        self._run_on_owner(allocate)
        if not memory:
            raise MemoryError("the runtime is closed")
        if isinstance(memory[0], MemoryError):
            raise memory[0]
        return memory[0]

    def release(self, memory: Memory) -> None:
        """Give back what :meth:`allocate` gave."""
        self._run_on_owner(lambda: self._driver.release(memory))

    def allocate_registered(self, context: object, size: int) -> Memory:
        """Memory that is allocated and registered in ``context``. Raises MemoryError, or TeeError where it is
        refused.
        """
        memory = self.allocate(size)
        done = self.call(RegisterMemory(context=context, memory=memory))
        if done.code != Result.SUCCESS:
            self.release(memory)
            raise TeeError(done.code, done.origin, f"registering {size} bytes")
        return memory

    def release_registered(self, context: object, memory: Memory) -> None:
        """Unregister, then release. Where the context has ended, its registrations have ended with it."""
        self.call(UnregisterMemory(context=context, memory=memory))
        self.release(memory)

    @property
    def in_handler(self) -> bool:
        """This thread serves an OCALL: it must not wait for the call that made it."""
        return getattr(_thread, "runtime", None) is self

    def aside(self, work: Callable[[], None]) -> None:
        """Have ``work`` done on another thread, at some time; nothing after :meth:`close`."""
        self._clients.put(work)

    def notifications(self, *values: int) -> Notifications:
        """What the TEE raises from now on: ``values``, or all. RuntimeError after :meth:`close`."""
        listener = Notifications(frozenset(values), self._unlisten)
        with self._lock:
            if self._closed:
                raise RuntimeError("the runtime is closed")
            self._listeners.add(listener)
        return listener

    def _unlisten(self, listener: Notifications) -> None:
        with self._lock:
            self._listeners.discard(listener)

    def close(self) -> None:
        """End all contexts, answer all RPCs, stop all threads. Calls that have not ended then end with
        COMMUNICATION.
        """
        with self._lock:
            if self._finished:
                return
            self._closed = self._finished = True
            contexts = () if self._stopping else tuple(self._contexts)
            calls: list[Call] = [CloseContext(context=context) for context in contexts]
            waits = [Pending(self, call) for call in calls]
            self._pending.update(zip(calls, waits, strict=True))
            outstanding = tuple(self._outstanding)
        for rpc in outstanding:
            self._answer(rpc, RpcReply(Result.COMMUNICATION))
        for call in calls:
            self._tell("start", call)
            self._post(lambda call=call: self._driver.start(call))  # type: ignore[misc]
        deadline = time.monotonic() + CLOSE_TIMEOUT
        for wait in waits:
            try:
                wait.wait(max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                break
        with self._lock:
            self._stopping = True
        self._work.close(CLOSE_TIMEOUT)
        self._clients.end()
        self._post(lambda: None)
        self._owner.join(CLOSE_TIMEOUT)
        self._end_all()
        if not self._owner.is_alive():
            with self._waking:  # others may be about to wake it, and its number may be another file's soon
                self._asleep = True
                os.close(self._wake)

    # The owner thread.

    def _own(self) -> None:
        try:
            self._loop()
        except BaseException:
            # The driver is broken. Nobody must wait for it for ever.
            with self._lock:
                self._closed = self._stopping = True
            self._end_all()
            raise

    def _end_all(self) -> None:
        with self._lock:
            left = tuple(self._pending.values())
            self._pending.clear()
            listeners = tuple(self._listeners)
            self._listeners.clear()
        for listener in listeners:
            listener.end()
        for pending in left:
            pending.end(Done(pending.call, Result.COMMUNICATION, Origin.API, may_have_run=True))

    def _loop(self) -> None:
        driver, poll, commands = self._driver, select.poll(), self._commands
        poll.register(self._wake, select.POLLIN)
        fd = driver.fileno()
        if fd is not None:
            poll.register(fd, select.POLLIN)
        while True:
            while commands:
                commands.popleft()()
            left = driver.run()
            if commands or left == 0:
                continue
            if self._stopping:
                return
            # Rounded up: to wake early would mean to run without anything to do.
            poll.poll(None if left is None else int(left * 1000) + 1)
            try:
                os.eventfd_read(self._wake)
            except BlockingIOError:
                continue

    def _post(self, command: Callable[[], None]) -> None:
        self._commands.append(command)
        if threading.current_thread() is not self._owner:
            with self._waking:
                if not self._asleep:
                    os.eventfd_write(self._wake, 1)

    def _run_on_owner(self, action: Callable[[], None]) -> None:
        """Run ``action`` on the owner thread and wait for it; not at all where that thread has ended."""
        if threading.current_thread() is self._owner:
            action()
            return
        finished = threading.Event()

        def run() -> None:
            try:
                action()
            finally:
                finished.set()

        with self._lock:
            if self._stopping:
                return
            self._commands.append(run)
            os.eventfd_write(self._wake, 1)
        while not finished.wait(1.0):
            if not self._owner.is_alive():
                return

    def _sink(self, event: Event) -> None:
        if isinstance(event, Done):
            self._ended(event)
        elif isinstance(event, RpcWithdrawn):
            with self._lock:
                self._outstanding.discard(event.rpc)
                given = self._given.pop(event.rpc, None)
                ocalls = self._asked_clients.pop(event.rpc, None)
            self._tell("withdrawn", event.rpc)
            if given is not None and ocalls is not None:
                self._clients.put(lambda: self._forget(ocalls, given))
            elif given is not None:  # it was answered, but the TEE could not take the memory
                self._work.put(RpcCommand.SHM_ALLOC, given)
        elif isinstance(event, Notification):
            with self._lock:
                listeners = tuple(self._listeners)
            for listener in listeners:
                listener.take(event.value)
        elif isinstance(event, Rpc):
            self._asked(event)

    def _ended(self, done: Done) -> None:
        call = done.call
        with self._lock:
            pending = self._pending.pop(call, None)
            if isinstance(call, OpenContext) and done.code == Result.SUCCESS:
                self._contexts.add(done.value)
            elif isinstance(call, CloseContext):
                self._contexts.discard(call.context)
        self._tell("done", call, done)
        if pending is not None:
            if pending.ocalls is not None:
                self._end_ocalls(call, pending.ocalls)
            pending.end(done)

    def _end_ocalls(self, call: Call, ocalls: Ocalls) -> None:
        with self._lock:
            for rpc in [rpc for rpc, asked in self._asked_clients.items() if asked is ocalls]:
                del self._asked_clients[rpc]
                self._given.pop(rpc, None)
        if ocalls.lends:
            self._clients.put(ocalls.end)
        else:
            ocalls.end()

    def _asked(self, rpc: Rpc) -> None:
        self._tell("rpc", rpc)
        with self._lock:
            self._outstanding.add(rpc)
            pending = self._pending.get(rpc.call) if rpc.to_client and rpc.call is not None else None
            ocalls = pending.ocalls if pending is not None else None
            refuse = self._closed or (self._supplicant is None and not rpc.to_client)
            if ocalls is not None and not refuse:
                self._asked_clients[rpc] = ocalls
        if refuse:
            self._answer(rpc, RpcReply(Result.COMMUNICATION))
        elif ocalls is not None:
            self._clients.put(lambda: self._serve_client(rpc, ocalls))
        elif rpc.to_client:
            self._answer(rpc, refusal(rpc))
        else:
            self._work.put(rpc.command, rpc)

    def _answer(self, rpc: Rpc, reply: RpcReply) -> bool:
        """Answer ``rpc``; False where it is no longer wanted."""
        with self._lock:
            if rpc not in self._outstanding:
                return False
            self._outstanding.discard(rpc)
            if rpc.command == RpcCommand.SHM_ALLOC and reply.code == Result.SUCCESS:
                self._given[rpc] = reply
            else:
                self._asked_clients.pop(rpc, None)
        self._tell("answer", rpc, reply)
        self._post(lambda: self._driver.answer(rpc, reply))
        return True

    # The supplicant's threads.

    def _serve(self, rpc: Rpc | RpcReply) -> None:
        supplicant = self._supplicant
        if supplicant is None:
            return
        if isinstance(rpc, RpcReply):
            self._forget(supplicant, rpc)
            return
        with self._lock:
            wanted = rpc in self._outstanding
        # Memory is freed also where the TEE has stopped waiting for that.
        if not wanted and rpc.command != RpcCommand.SHM_FREE:
            return
        try:
            reply = supplicant.serve(rpc, self._memory)
        except Exception:
            _log.exception("a service of the supplicant failed")
            reply = RpcReply(Result.GENERIC)
        if not self._answer(rpc, reply) and rpc.command == RpcCommand.SHM_ALLOC:
            self._forget(supplicant, reply)
        elif rpc.command == RpcCommand.SHM_FREE:
            self._taken_back(rpc)

    # The clients' threads: a handler may wait for anything, also for other handlers.

    def _serve_client(self, rpc: Rpc, ocalls: Ocalls) -> None:
        with self._lock:
            wanted = rpc in self._outstanding
        if not wanted and rpc.command != RpcCommand.SHM_FREE:
            return
        _thread.runtime = self
        try:
            reply = ocalls.serve(rpc)
        finally:
            del _thread.runtime
        if not self._answer(rpc, reply) and rpc.command == RpcCommand.SHM_ALLOC:
            self._forget(ocalls, reply)
        elif rpc.command == RpcCommand.SHM_FREE:
            self._taken_back(rpc)

    def _taken_back(self, free: Rpc) -> None:
        """The memory of ``free`` is no longer the TEE's."""
        memory = {id(param.memory) for param in free.params if isinstance(param, MemRef)}
        with self._lock:
            for rpc, reply in tuple(self._given.items()):
                if any(isinstance(param, MemRef) and id(param.memory) in memory for param in reply.params):
                    del self._given[rpc]
                    self._asked_clients.pop(rpc, None)

    def _forget(self, supplicant: RpcServer | Ocalls, reply: RpcReply) -> None:
        """Free memory that the TEE asked for, but whose answer came too late."""
        for param in reply.params:
            if isinstance(param, MemRef) and param.memory is not None:
                supplicant.forget(param.memory)

    def open_supplicant_context(self) -> object:
        """For the allocator: open that context."""
        done = self.call(OpenContext(vm=self._vm))
        if done.code != Result.SUCCESS:
            raise TeeError(done.code, done.origin, "the supplicant's context")
        return done.value

    def _tell(self, kind: str, subject: Call | Rpc, detail: Done | RpcReply | None = None) -> None:
        if self._observe is not None:
            self._observe(Observation(time.monotonic(), kind, subject, detail))


class _SupplicantMemory(Allocator):
    """Memory for SHM_ALLOC, registered in a context of its own that is opened when it is first needed."""

    def __init__(self, runtime: TeeRuntime) -> None:
        self._runtime = runtime
        self._context: object = None
        self._contexts: dict[Memory, object] = {}

    def context(self) -> object:
        if self._context is None:
            self._context = self._runtime.open_supplicant_context()
        return self._context

    def allocate(self, size: int) -> Memory:
        try:
            try:
                return self._registered(size)
            except TeeError as error:
                if error.code not in _LOST:
                    raise
                self._context = None  # the TEE has lost its state since: the next life wants a context of its own
                return self._registered(size)
        except RuntimeError:  # closed meanwhile
            raise MemoryError from None

    def _registered(self, size: int) -> Memory:
        context = self.context()
        memory = self._runtime.allocate_registered(context, size)
        self._contexts[memory] = context
        return memory

    def free(self, memory: Memory) -> None:
        try:
            self._runtime.release_registered(self._contexts.pop(memory), memory)
        except RuntimeError:  # closed: the memory has gone with its context
            return


_numbers = itertools.count(1)
