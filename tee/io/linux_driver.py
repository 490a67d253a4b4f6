"""A :class:`~tee.driver.TeeDriver` on a Linux TEE device (``/dev/teeN``): OP-TEE, AMD-TEE, or a guest's virtio device.

System calls that may block run on threads of three kinds, none of which is the caller's: *calls* (open session, invoke)
on as many as were asked for, *ends* (close, unregister) on two, *cancels* on one. So a call that waits keeps neither a
cancel nor an answer to an RPC waiting.

All clients share one open device, and with it the memory for copies, which the TEE has got to know at the start. What
is whose is kept here. Where the TEE behind the device is lost, clients that come afterwards get it opened anew.

RPCs do not come this way on Linux: the kernel hands them to whoever has opened ``/dev/teeprivN``. A
:class:`RpcSource` can bring them here.
"""

from __future__ import annotations

import errno
import itertools
import logging
import mmap
import os
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple, Protocol
from uuid import UUID

from tee.calls import (
    Call,
    CloseContext,
    CloseSession,
    Invoke,
    Login,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Event, GenCap, Placed, Sink, TeeInfo, TeeKind
from tee.io.bounce import Part, parts
from tee.io.cancel_lane import CancelLane
from tee.io.fair_pool import FairPool, Job
from tee.io.linux import Answer, LinuxTee
from tee.io.linux_memory import Marshalled, Placing, Region
from tee.linux.errors import LOST, result_of
from tee.linux.ioctls import MOST_PARAMS
from tee.memory import Memory
from tee.params import MemRef
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcReply

#: Threads for calls. A TEE has a fixed number of threads, which user space cannot ask for (OP-TEE: CFG_NUM_THREADS),
#: and a call holds one of them even while it waits: what is left is for cancels, ends and other programs of the host.
THREADS = 2

#: Bytes for copies, of each thread: so much can go by copies in one call.
BOUNCE = 4 << 20

_END_THREADS = 2
_TURN = 64
_GROUP_LOGINS = frozenset({Login.GROUP, Login.GROUP_APPLICATION})

_log = logging.getLogger(__name__)

Post = Callable[[Callable[[], None]], None]
"""Have something called by :meth:`LinuxTeeDriver.run`. Any thread may."""


class RpcSource(Protocol):
    """Where RPCs come from: what speaks with the owner of ``/dev/teeprivN``. All but :meth:`enters` is called on the
    driver's thread."""

    def attach(self, post: Post, sink: Sink) -> None:
        """RPCs and withdrawals go to ``sink``, which must be called by way of ``post``."""

    def begun(self, call: OpenSession | Invoke, vm: str) -> None:
        """A call of a guest's, which waits for its turn."""

    def enters(self, call: OpenSession | Invoke) -> None:
        """The TEE may make RPCs for this call from now on. On the thread that makes it, and may block for a moment."""

    def ended(self, call: OpenSession | Invoke) -> None:
        """… and no longer."""

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """The answer to an RPC. Ignored where it was answered or withdrawn."""

    def usage(self) -> dict[str, int]:
        """How many there are now of what it keeps, by name."""

    def close(self) -> None:
        """Nothing comes any more."""


class _Outcome(NamedTuple):
    """How a call has ended. ``session`` is the kernel's id of one that was opened."""

    code: int = Result.SUCCESS
    origin: int = Origin.TEE
    session: int = 0
    may_have_run: bool = False


@dataclass(slots=True, eq=False)
class _Connection:
    """An open device, with the memory for copies that it has got to know."""

    device: LinuxTee
    bounce: list[Part]
    contexts: int = 0
    lost: bool = False

    def close(self) -> None:
        """Nobody uses it any more. May block."""
        for part in self.bounce:
            part.close()
        self.device.close()


@dataclass(slots=True, eq=False)
class Context:
    """A client's. ``ends`` counts what is being closed in it; after ``closing`` nothing is written to its memory."""

    connection: _Connection
    vm: str
    lock: threading.Lock = field(default_factory=threading.Lock)
    closing: bool = False
    flights: set[_Flight] = field(default_factory=set)
    sessions: set[Session] = field(default_factory=set)
    regions: set[Region] = field(default_factory=set)
    ends: int = 0
    closer: CloseContext | None = None

    def store(self, to: memoryview, data: memoryview) -> bool:
        """Copy to a client's memory, if the context is not closing."""
        with self.lock:
            if not self.closing:
                to[:] = data
            return not self.closing


@dataclass(slots=True, eq=False)
class Session:
    """A session; ``ident`` is the kernel's."""

    context: Context
    ident: int
    closer: CloseSession | None = None


@dataclass(slots=True, eq=False)
class _Flight:
    """A call that runs in the TEE, or waits for a thread."""

    call: OpenSession | Invoke
    context: Context
    session: Session | None
    cancel_id: int
    regions: list[Region]
    job: Job | None = None
    cancelled: bool = False
    over: bool = False


class LinuxTeeDriver:
    """See :class:`~tee.driver.TeeDriver`."""

    def __init__(
        self,
        open_device: Callable[[], LinuxTee] = LinuxTee,
        *,
        threads: int = THREADS,
        bounce: int = BOUNCE,
        zero_copy: bool = True,
        logins: frozenset[int] | None = None,
        rpcs: RpcSource | None = None,
    ) -> None:
        """``logins``: those that may be used; None: all that the kernel lets this process have. Raises OSError where
        the device cannot be used."""
        self._open_device = open_device
        self._threads = threads
        self._bounce_size = bounce
        self._rpcs = rpcs
        self._connecting = threading.Lock()
        self._closed = False
        device = open_device()
        try:
            impl_id, impl_caps, gen_caps = device.version()
            self._info = TeeInfo(TeeKind.LINUX, impl_id, impl_caps, gen_caps, logins)
            self._connection = self._connected(device)
        except BaseException:
            device.close()
            raise
        self._placing = Placing.of(gen_caps, zero_copy=zero_copy, threads=threads)
        self._nulls = bool(gen_caps & GenCap.MEMREF_NULL)
        self._sink: Sink = lambda _: None
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._posted: deque[Callable[[], None]] = deque()
        self._events: deque[Event] = deque()
        self._contexts: set[Context] = set()
        self._calls: set[Call] = set()
        self._flights: dict[Call, _Flight] = {}
        self._unregister: dict[Region, UnregisterMemory] = {}
        """What waits until its memory is not used any more."""
        self._cancel_ids = itertools.cycle(range(1, 1 << 32))
        self._pool = FairPool("tee-call", threads)
        self._ends = FairPool("tee-end", _END_THREADS)
        self._cancels = CancelLane("tee-cancel")
        self._begin: dict[type[Call], Callable[..., None]] = {
            OpenContext: self._open_context,
            CloseContext: self._close_context,
            OpenSession: self._open_session,
            CloseSession: self._close_session,
            Invoke: self._invoke,
            RegisterMemory: self._register,
            UnregisterMemory: self._end_registration,
        }
        if rpcs is not None:
            rpcs.attach(self.post, self._tell)

    def close(self, timeout: float = 1.0) -> None:
        """Begin nothing more; wait up to ``timeout`` seconds for each kind of threads, and close the device. May be
        called again."""
        if self._closed:
            return
        self._closed = True
        if self._rpcs is not None:
            self._rpcs.close()
        ended = [lane.close(timeout) for lane in (self._pool, self._ends, self._cancels)]
        if all(ended):  # else one of them will use it yet
            self._connection.close()
            os.close(self._wake)

    @property
    def max_params(self) -> int:
        """Parameters that a call can have."""
        return MOST_PARAMS

    def system_calls(self) -> dict[str, bool]:
        """Which of the kernel's newer system calls this device has. None of them is needed here: SHM_REGISTER_FD takes
        dma-bufs, and memory of guests is none; OBJECT_INVOKE is about objects, which clients of ours do not have."""
        device = self._connection.device
        return {"object_invoke": device.has_object_invoke(), "shm_register_fd": device.has_register_fd()}

    # The contract.

    @property
    def info(self) -> TeeInfo:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._info

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._calls.add(call)
        try:
            begin = self._begin.get(type(call))
            if begin is None:
                raise TeeError(Result.NOT_SUPPORTED, Origin.API, f"no call {type(call).__name__}")
            begin(call)
        except TeeError as error:
            self._finish(call, error.code, error.origin)

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        flight = self._flights.get(call)
        if flight is not None:
            self._cancel(flight)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        if self._rpcs is not None:
            self._rpcs.answer(rpc, reply)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        for _ in range(min(_TURN, len(self._posted))):
            self._posted.popleft()()
        for _ in range(min(_TURN, len(self._events))):
            self._sink(self._events.popleft())
        return 0.0 if self._posted or self._events else None

    def fileno(self) -> int:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._wake

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        try:
            return Memory((memoryview(mmap.mmap(-1, size)),))
        except (OSError, ValueError, OverflowError) as error:
            raise MemoryError(f"{size} bytes cannot be allocated: {error}") from None

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        memory.forget()

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`."""
        contexts = tuple(self._contexts)
        regions = [region for context in contexts for region in tuple(context.regions)]
        return {
            **(self._rpcs.usage() if self._rpcs is not None else {}),
            "calls": len(self._calls),
            "contexts": len(contexts),
            "sessions": sum(len(context.sessions) for context in contexts),
            "registrations": len(regions),
            "registrations_in_place": sum(region.in_place for region in regions),
            "registrations_copied": sum(region.copied for region in regions),
            "threads_busy": self._pool.busy,
            "calls_waiting": self._pool.waiting,
        }

    def post(self, action: Callable[[], None]) -> None:
        """See :data:`Post`."""
        self._posted.append(action)
        os.eventfd_write(self._wake, 1)

    def _tell(self, event: Event) -> None:
        self._sink(event)

    # Contexts.

    def _connected(self, device: LinuxTee) -> _Connection:
        registered = bool(self._info.gen_caps & GenCap.REG_MEM)
        return _Connection(device, parts(device, self._threads, self._bounce_size, registered=registered))

    def _open_context(self, call: OpenContext) -> None:
        if not self._connection.lost:
            self._context_opened(call, self._connection)
            return
        self._ends.put(call.vm, lambda _: self._connect_again(call))

    def _connect_again(self, call: OpenContext) -> None:
        """On a thread for ends."""
        with self._connecting:
            if self._connection.lost:
                try:
                    device = self._open_device()
                    try:
                        connection = self._connected(device)
                    except BaseException:
                        device.close()
                        raise
                except OSError as error:
                    _log.warning("the TEE was lost, and cannot be opened again: %s", error)
                    code = result_of(error)[0]
                    self.post(lambda: self._finish(call, code, Origin.COMMS))
                    return
                _log.warning("the TEE was lost, and is opened again")
                old, self._connection = self._connection, connection
                self.post(lambda: self._drop(old))
            connection = self._connection
        self.post(lambda: self._context_opened(call, connection))

    def _context_opened(self, call: OpenContext, connection: _Connection) -> None:
        context = Context(connection, call.vm)
        connection.contexts += 1
        self._contexts.add(context)
        for pool in (self._pool, self._ends):
            pool.enter(call.vm)
        self._finish(call, value=context)

    def _close_context(self, call: CloseContext) -> None:
        context = self._context(call.context)
        with context.lock:
            context.closing = True
        context.closer = call
        self._cancel(*context.flights)
        self._go_on_closing(context)

    def _go_on_closing(self, context: Context) -> None:
        """Nothing runs any more in a context that is to be closed? Then close all that is left."""
        if context.closer is None or context.flights or context.ends:
            return
        call, context.closer = context.closer, None
        sessions, regions = tuple(context.sessions), tuple(context.regions)
        device = context.connection.device

        def close() -> None:
            for session in sessions:
                _close_session(device, session)
            for region in regions:
                region.close()

        def closed() -> None:
            for region in regions:
                region.memory.handle = None
            context.regions.clear()
            context.sessions.clear()
            self._contexts.discard(context)
            for pool in (self._pool, self._ends):
                pool.leave(context.vm)
            context.connection.contexts -= 1
            self._drop(context.connection)
            self._finish(call)

        self._in_the_end(context.vm, close, closed)

    def _drop(self, connection: _Connection) -> None:
        """Close a device that was lost and that nobody uses any more."""
        if connection is not self._connection and not connection.contexts:
            self._in_the_end("", connection.close, lambda: None)

    def _context(self, context: object) -> Context:
        if not isinstance(context, Context) or context not in self._contexts or context.closing:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "no such context")
        return context

    def _in_the_end(self, vm: str, action: Callable[[], None], then: Callable[[], None]) -> None:
        """Do ``action``, which may block and does not raise, on a thread for ends; ``then`` on the driver's."""

        def work(_: int) -> None:
            try:
                action()
            except Exception:
                _log.exception("the TEE device did not let go of something")
            self.post(then)

        self._ends.put(vm, work)

    # Sessions and calls.

    def _open_session(self, call: OpenSession) -> None:
        context = self._context(call.context)
        logins = self._info.logins
        if logins is not None and call.client.login not in logins:
            raise TeeError(Result.ACCESS_DENIED, Origin.COMMS, "a login that is not to be carried to this TEE")
        self._fly(call, context, None)

    def _invoke(self, call: Invoke) -> None:
        session = self._session(call.session)
        if not 0 <= call.func < 1 << 32:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "a command has 32 bits")
        self._fly(call, session.context, session)

    def _session(self, session: object) -> Session:
        if not isinstance(session, Session) or session not in session.context.sessions or session.closer is not None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "no such session")
        self._context(session.context)
        return session

    def _fly(self, call: OpenSession | Invoke, context: Context, session: Session | None) -> None:
        if len(call.params) > MOST_PARAMS:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, f"more than {MOST_PARAMS} parameters")
        flight = _Flight(call, context, session, next(self._cancel_ids), self._regions(call, context))
        for region in flight.regions:
            region.users += 1
        context.flights.add(flight)
        self._flights[call] = flight
        if self._rpcs is not None:
            self._rpcs.begun(call, context.vm)
        flight.job = partial(self._work, flight)
        self._pool.put(context.vm, flight.job)

    def _regions(self, call: OpenSession | Invoke, context: Context) -> list[Region]:
        """The registered memory that a call names. Raises TeeError where it is another context's, or is going."""
        found = []
        for param in call.params:
            region = param.memory.handle if isinstance(param, MemRef) and param.memory is not None else None
            if region is None:
                continue
            if not isinstance(region, Region) or region.context is not context or region in self._unregister:
                raise TeeError(Result.BAD_PARAMETERS, Origin.API, "memory that is not registered in this context")
            found.append(region)
        return found

    def _work(self, flight: _Flight, thread: int) -> None:
        """On a thread for calls: from here to the call's end."""
        try:
            outcome = self._call(flight, flight.context.connection.bounce[thread])
        except TeeError as error:
            outcome = _Outcome(error.code, error.origin)
        except OSError as error:
            code, may_have_run = result_of(error)
            if error.errno in LOST:
                flight.context.connection.lost = True
            elif error.errno in _WITHOUT_ROOM:
                _log.warning("too many open files: raise the limit of this process (LimitNOFILE=, ulimit -n)")
            outcome = _Outcome(code, Origin.COMMS, may_have_run=may_have_run)
        except Exception:
            _log.exception("a call to the TEE failed here; others go on: report this")
            outcome = _Outcome(Result.GENERIC, Origin.COMMS, may_have_run=True)
        flight.over = True
        self.post(lambda: self._land(flight, outcome))

    def _call(self, flight: _Flight, part: Part) -> _Outcome:
        call, context, device = flight.call, flight.context, flight.context.connection.device
        marshalled = Marshalled(
            call.params,
            part,
            lambda region: region.shm(device, self._placing, lambda why: self._placed(region, why)),
            nulls=self._nulls,
        )
        try:
            if flight.cancelled:
                return _Outcome(Result.CANCEL, Origin.COMMS)
            if self._rpcs is not None:
                self._rpcs.enters(call)
            if isinstance(call, OpenSession):
                answer = device.open_session(
                    call.uuid.bytes,
                    marshalled.raw,
                    login=call.client.login,
                    client=_client_of(call),
                    cancel_id=flight.cancel_id,
                )
            else:
                assert flight.session is not None
                answer = device.invoke(flight.session.ident, call.func, marshalled.raw, cancel_id=flight.cancel_id)
            if _is_lost(answer):
                context.connection.lost = True
            marshalled.finish(answer, context.store)
            return _Outcome(answer.code, answer.origin, answer.session)
        finally:
            marshalled.close()

    def _placed(self, region: Region, why: str) -> None:
        self.post(lambda: self._events.append(Placed(region.owner, region.memory.size, why)))

    def _land(self, flight: _Flight, outcome: _Outcome) -> None:
        """A call has ended."""
        call, context, session = flight.call, flight.context, flight.session
        context.flights.discard(flight)
        del self._flights[call]
        if self._rpcs is not None:
            self._rpcs.ended(call)
        opened = None
        if isinstance(call, OpenSession) and outcome.code == Result.SUCCESS:
            opened = Session(context, outcome.session)
            context.sessions.add(opened)
        self._finish(call, outcome.code, outcome.origin, opened, outcome.may_have_run)
        for region in flight.regions:
            region.users -= 1
            self._unregister_if_unused(region)
        if session is not None:
            self._close_if_unused(session)
        self._go_on_closing(context)

    def _cancel(self, *flights: _Flight) -> None:
        running = [flight for flight in flights if not flight.cancelled]
        for flight in running:  # all, before one that ends leaves its thread to another
            flight.cancelled = True
        for flight in running:
            assert flight.job is not None
            if self._pool.take_back(flight.context.vm, flight.job):
                self.post(partial(self._land, flight, _Outcome(Result.CANCEL, Origin.COMMS)))
            else:
                self._cancels.put(partial(self._cancel_attempt, flight))

    def _cancel_attempt(self, flight: _Flight) -> bool:
        """On the thread for cancels."""
        if flight.over:
            return False
        session = flight.session.ident if flight.session is not None else 0
        try:
            flight.context.connection.device.cancel(flight.cancel_id, session)
        except OSError as error:
            return error.errno in _NOT_YET
        return False

    def _close_session(self, call: CloseSession) -> None:
        session = self._session(call.session)
        session.closer = call
        self._cancel(*(flight for flight in session.context.flights if flight.session is session))
        self._close_if_unused(session)

    def _close_if_unused(self, session: Session) -> None:
        call, context = session.closer, session.context
        if call is None or session not in context.sessions or any(f.session is session for f in context.flights):
            return
        context.sessions.discard(session)
        context.ends += 1

        def closed() -> None:
            self._finish(call)
            context.ends -= 1
            self._go_on_closing(context)

        self._in_the_end(context.vm, lambda: _close_session(context.connection.device, session), closed)

    # Memory.

    def _register(self, call: RegisterMemory) -> None:
        context, memory = self._context(call.context), call.memory
        if memory.handle is not None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "the memory is registered already")
        if memory.size and not memory.segments:
            raise TeeError(Result.NOT_SUPPORTED, Origin.API, "memory that this side has no mapping of")
        region = Region(memory, context, call.owner)
        context.regions.add(region)
        memory.handle = region
        self._finish(call)

    def _end_registration(self, call: UnregisterMemory) -> None:
        context, region = self._context(call.context), call.memory.handle
        if not isinstance(region, Region) or region.context is not context or region in self._unregister:
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, "memory that is not registered in this context")
        self._unregister[region] = call
        self._unregister_if_unused(region)

    def _unregister_if_unused(self, region: Region) -> None:
        if region.users or region not in self._unregister:
            return
        call = self._unregister.pop(region)
        context = self._context_of(region)
        context.regions.discard(region)

        def gone() -> None:
            region.memory.handle = None
            self._finish(call)

        if not region.in_place:
            gone()
            return
        context.ends += 1

        def closed() -> None:
            gone()
            context.ends -= 1
            self._go_on_closing(context)

        self._in_the_end(context.vm, region.close, closed)

    @staticmethod
    def _context_of(region: Region) -> Context:
        assert isinstance(region.context, Context)
        return region.context

    def _finish(
        self,
        call: Call,
        code: int = Result.SUCCESS,
        origin: int = Origin.TEE,
        value: object = None,
        may_have_run: bool = False,
    ) -> None:
        self._calls.discard(call)
        self._events.append(Done(call, code, origin, value, may_have_run))


_NOT_YET = frozenset({errno.ENOENT, errno.EINTR, errno.EBUSY, errno.EAGAIN, errno.ENOMEM})
_WITHOUT_ROOM = frozenset({errno.EMFILE, errno.ENFILE})


def _close_session(device: LinuxTee, session: Session) -> None:
    try:
        device.close_session(session.ident)
    except OSError as error:  # then it is none
        _log.info("session %d could not be closed: %s", session.ident, error)


def _is_lost(answer: Answer) -> bool:
    """Whether the way to the TEE says that all is gone."""
    return answer.code == Result.TARGET_DEAD and answer.origin == Origin.COMMS


def _client_of(call: OpenSession) -> bytes:
    """What the kernel wants to know of a client: for a group its number, else nothing. It computes the identity itself,
    from this process."""
    client = call.client
    if client.login not in _GROUP_LOGINS:
        return bytes(16)
    if client.vm or client.uuid == UUID(int=0):  # of a guest's groups the host knows nothing
        return os.getegid().to_bytes(16, "little")
    return client.uuid.bytes
