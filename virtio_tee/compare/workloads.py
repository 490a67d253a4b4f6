"""What is done on each path: the table of workloads."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ffa.optee.client import Pages
from guest_driver.client import (
    Context,
    PendingCall,
    Session,
    SharedMemory,
    TempIn,
    TempInOut,
    TempOut,
    ValueIn,
    ValueInOut,
    ValueOut,
)
from tee.calls import RegisterMemory, UnregisterMemory
from tee.io.runtime import TeeRuntime
from tee.memory import Memory
from tee.params import Direction
from tee.results import Result, TeeError
from tee.soft.examples import UUIDS
from virtio_tee.compare.meter import PAGE
from virtio_tee.compare.site import LOADED, Kit, Site

KIB, MIB = 1 << 10, 1 << 20
SIZES = (0, 4 * KIB, 64 * KIB, MIB, 16 * MIB)
"""Bytes of memory that is passed."""
PIECES = 512
"""Of a scattered buffer, a page each."""
SESSIONS, GUESTS = 32, 4
DEPTH = 8
"""Calls under way at a time where throughput is measured."""
NULL, ADD, TOUCH = 0, 1, 3
"""Commands of the probe TA."""
WRITE, READ = 1, 0
"""Commands of the secure storage TA."""


@dataclass(frozen=True, slots=True)
class Job:
    """A workload that is ready to run. ``call`` does one unit of it and gives what came of it, which ``answer`` makes
    bytes of; ``begin`` begins one that may overlap with others."""

    call: Callable[[], Any]
    answer: Callable[[Any], bytes]
    begin: Callable[[], PendingCall] | None = None


Prepare = Callable[["Workload", Site], AbstractContextManager[Job]]


@dataclass(frozen=True, slots=True)
class Workload:
    """One kind of work. ``size`` is the bytes of memory that one unit passes; ``payload`` what is looked for when it
    is asked who can read it, piece by piece."""

    name: str
    group: str
    what: str
    prepare: Prepare
    size: int = 0
    sessions: int = 1
    guests: int = 1
    payload: Callable[[Workload, Kit], Sequence[bytes]] = lambda workload, kit: ()


def data_of(workload: Workload) -> bytes:
    """The bytes that are passed: the same ones on each path, found nowhere else."""
    return random.Random(workload.name).randbytes(workload.size)


def word_of(workload: Workload) -> int:
    """A number of 63 bits, likewise."""
    return random.Random(workload.name).getrandbits(63)


def _the_data(workload: Workload, kit: Kit) -> Sequence[bytes]:
    return [data_of(workload)] if workload.size else []


def _its_pages(workload: Workload, kit: Kit) -> Sequence[bytes]:
    data = data_of(workload)
    return [data[at : at + PAGE] for at in range(0, len(data), PAGE)]


def _the_word(workload: Workload, kit: Kit) -> Sequence[bytes]:
    return [word_of(workload).to_bytes(8, "little")]


def _the_package(workload: Workload, kit: Kit) -> Sequence[bytes]:
    return [kit.package]


def _plain(answers: Any) -> bytes:
    """Numbers and bytes, whatever is nested in what."""
    if isinstance(answers, bytes):
        return answers
    if isinstance(answers, list | tuple):
        return b"[" + b",".join(_plain(answer) for answer in answers) + b"]"
    return repr(answers).encode()


@contextmanager
def _probe(site: Site) -> Iterator[tuple[Context, Session]]:
    with site.context() as context, context.open_session(UUIDS["probe"]) as session:
        yield context, session


@contextmanager
def _open(workload: Workload, site: Site) -> Iterator[Job]:
    def call() -> bool:
        with _probe(site):
            return True

    yield Job(call, _plain)


@contextmanager
def _null(workload: Workload, site: Site) -> Iterator[Job]:
    with _probe(site) as (_, session):
        yield Job(lambda: session.invoke(NULL), _plain, lambda: session.begin(NULL))


@contextmanager
def _values(workload: Workload, site: Site) -> Iterator[Job]:
    params = (ValueIn(word_of(workload), 1), ValueOut(), ValueInOut(4, 5))
    with _probe(site) as (_, session):
        yield Job(lambda: session.invoke(ADD, *params), _plain, lambda: session.begin(ADD, *params))


@contextmanager
def _temporary(workload: Workload, site: Site) -> Iterator[Job]:
    data = data_of(workload)
    with _probe(site) as (_, session):
        yield Job(lambda: session.invoke(TOUCH, TempInOut(data)), _plain)


@contextmanager
def _registered(workload: Workload, site: Site) -> Iterator[Job]:
    with _probe(site) as (context, session), context.allocate(max(workload.size, 1)) as shared:
        shared.write(data_of(workload))
        part = shared.part(Direction.INOUT, 0, workload.size)
        session.invoke(NULL, shared.part(Direction.INOUT, 0, 0))  # what is done when a region is used first, is done
        yield Job(
            lambda: session.invoke(TOUCH, part),
            lambda _: shared.read(),
            lambda: session.begin(TOUCH, part),
        )


@contextmanager
def _scattered(workload: Workload, site: Site) -> Iterator[Job]:
    runtime, data = site.guests[0], data_of(workload)
    with _probe(site) as (context, session), _pieces(site.pages or runtime, workload.size // PAGE) as pieces:
        pieces.write(0, data)

        def call() -> None:
            with site.shared(pieces) as memory:
                _done(runtime, RegisterMemory(context=context.handle, memory=memory))
                try:
                    session.invoke(TOUCH, SharedMemory(context, memory, owned=False).whole(Direction.INOUT))
                finally:
                    _done(runtime, UnregisterMemory(context=context.handle, memory=memory))

        yield Job(call, lambda _: pieces.read(0, pieces.size))


@contextmanager
def _pieces(pages: Pages | TeeRuntime, count: int) -> Iterator[Memory]:
    """Memory of pages no two of which lie side by side."""
    given = [pages.allocate(PAGE) for _ in range(2 * count)]
    used = given[::2]
    try:
        yield Memory([page.segments[0] for page in used], ranges=[r for page in used for r in page.ranges])
    finally:
        for page in given:
            pages.release(page)


def _done(runtime: TeeRuntime, call: RegisterMemory | UnregisterMemory) -> None:
    done = runtime.call(call)
    if done.code != Result.SUCCESS:
        raise TeeError(done.code, done.origin, type(call).__name__)


@contextmanager
def _load(workload: Workload, site: Site) -> Iterator[Job]:
    with site.context() as context:

        def call() -> Any:
            with context.open_session(UUIDS[LOADED]) as session:
                return session.invoke(0, ValueInOut(41))

        yield Job(call, _plain)


@contextmanager
def _storage(workload: Workload, site: Site) -> Iterator[Job]:
    name, data = b"compare", data_of(workload)
    with (
        site.context() as context,
        context.open_session(UUIDS["secure_storage"]) as session,
    ):

        def call() -> Any:
            session.invoke(WRITE, TempIn(name), TempIn(data))
            return session.invoke(READ, TempIn(name), TempOut(len(data)))

        yield Job(call, _plain)


@contextmanager
def _many_sessions(workload: Workload, site: Site) -> Iterator[Job]:
    with site.context() as context, ExitStack() as stack:
        yield _all_at_once(
            [stack.enter_context(context.open_session(UUIDS["probe"])) for _ in range(workload.sessions)]
        )


@contextmanager
def _many_guests(workload: Workload, site: Site) -> Iterator[Job]:
    with ExitStack() as stack:
        sessions = []
        for number in range(workload.guests):
            context = stack.enter_context(site.context(number))
            sessions.append(stack.enter_context(context.open_session(UUIDS["probe"])))
        yield _all_at_once(sessions)


def _all_at_once(sessions: Sequence[Session]) -> Job:
    def call() -> list[Any]:
        begun = [
            session.begin(ADD, ValueIn(number), ValueOut(), ValueInOut(4, 5)) for number, session in enumerate(sessions)
        ]
        return [one.wait() for one in begun]

    return Job(call, _plain)


def _size(size: int) -> str:
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if size >= unit:
            return f"{size // unit} {name}"
    return f"{size} B"


def _of_each_size(name: str, what: str, prepare: Prepare) -> Iterator[Workload]:
    for size in SIZES:
        shown = _size(size)
        yield Workload(
            f"{name}-{shown.replace(' ', '')}", f"{name} memory", f"{what} {shown}", prepare, size, payload=_the_data
        )


WORKLOADS: Sequence[Workload] = (
    Workload("open", "calls", "open a context and a session, close both", _open),
    Workload("null", "calls", "invoke a command that does nothing", _null),
    Workload("values", "calls", "invoke with three values", _values, payload=_the_word),
    *_of_each_size("temporary", "invoke with memory for this call alone, in and out:", _temporary),
    *_of_each_size("registered", "invoke with memory that was registered before, in and out:", _registered),
    Workload(
        "scattered",
        "scattered memory",
        f"register {PIECES} single pages, invoke with them, unregister them",
        _scattered,
        PIECES * PAGE,
        payload=_its_pages,
    ),
    Workload("load", "RPC", "load a TA from the guest's supplicant, invoke it, close it", _load, payload=_the_package),
    Workload(
        "storage",
        "RPC",
        "write an object of 4 KiB to secure storage in the guest's files, and read it",
        _storage,
        4 * KIB,
        payload=_the_data,
    ),
    Workload(
        "sessions",
        "many",
        f"one invoke with values in each of {SESSIONS} sessions, all at once",
        _many_sessions,
        sessions=SESSIONS,
    ),
    Workload(
        "guests",
        "many",
        f"one invoke with values from each of {GUESTS} guests, all at once",
        _many_guests,
        sessions=GUESTS,
        guests=GUESTS,
    ),
)
"""All of them, in the order in which they are shown."""

DIAGRAMS = ("null", "temporary-64KiB", "load")
"""Workloads of which each message is kept, to be drawn."""


def digest(answer: bytes) -> str:
    """What is compared between paths."""
    return sha256(answer).hexdigest()
