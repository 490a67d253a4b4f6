"""Programs of system calls on a Linux TEE device, always the same ones, for `tests/lab/guest/player.c`.

A program is what one or two threads of a process do. Most steps are calls that would be right but for one thing: a
length, a count, an address, an id of something else, of another's, or of nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from functools import cache
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tee.linux.ioctls import ATTR_META, MEMREF_NULL, Ioctl
from tee.soft.examples import UUIDS

PAGE = 4096
ARENA = 64 * PAGE
SLOTS = 8  # of descriptors, sessions and shared memory; the last place of the latter two is another process's
PRIVILEGED = 1  # the descriptor of /dev/teepriv0, in programs of supplicants
MOST = 9  # parameters of a request to a supplicant
COMMANDS = 100  # more than the TA for tests has


class Kind(IntEnum):
    """Steps: what the player does."""

    OPEN = 0
    CLOSE = 1
    IOCTL = 2
    CLOSE_SHM = 3
    MAP_SHM = 4
    UNMAP = 5
    PAUSE = 6


class Place(IntEnum):
    """Where an argument is; RAW: its first 8 bytes are the address."""

    PLAIN = 0
    READ_ONLY = 1
    EDGE = 2
    RAW = 3


class Fill(IntEnum):
    """What a patch writes: an address, an id that the player learnt, or a number as it is."""

    ROOM = 0
    READ_ONLY = 1
    EDGE = 2
    ARENA = 3
    SESSION = 4
    SHM = 5
    WORD = 6


@dataclass(frozen=True)
class Patch:
    """`number`: an offset for ARENA, a slot for an id."""

    in_room: bool
    fill: Fill
    offset: int
    number: int = 0


@dataclass(frozen=True)
class Step:
    """`argument` is what the ioctl gets; `room` what that names, if it names a buffer."""

    kind: Kind
    slot: int = 0
    number: int = 0
    place: Place = Place.PLAIN
    argument: bytes = b""
    room: bytes = b""
    patches: tuple[Patch, ...] = ()
    repeat: int = 1
    answers: bool = False

    def encoded(self) -> bytes:
        head = (self.kind, self.slot, self.place, len(self.patches), self.number, self.repeat)
        sizes = (len(self.argument), len(self.room), self.answers, 0)
        patches = (struct.pack("<BBHI", p.in_room, p.fill, p.offset, p.number) for p in self.patches)
        return struct.pack("<BBBBIHHHBB", *head, *sizes) + b"".join(patches) + self.argument + self.room


@dataclass(frozen=True, eq=False)
class Program:
    """Times are µs from its start; `signal_us` 0: no signal."""

    first: Sequence[Step]
    second: Sequence[Step]
    signal_us: int
    kill_us: int

    def encoded(self) -> bytes:
        first, second = (b"".join(step.encoded() for step in part) for part in (self.first, self.second))
        return struct.pack("<IIII", len(first + second), len(first), self.signal_us, self.kill_us) + first + second


# -- numbers

slots = st.integers(0, SLOTS - 1)
u32 = st.sampled_from([0, 1, 2, 4, 255, 1 << 16, (1 << 31) - 1, 1 << 31, (1 << 32) - 1]) | st.integers(0, (1 << 32) - 1)
u64 = st.sampled_from(
    [*(0, 1, PAGE - 1, PAGE, PAGE + 1, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 63, (1 << 64) - PAGE, (1 << 64) - 1)]
) | st.integers(0, (1 << 64) - 1)
WILD = [0, 1, PAGE, 1 << 46, (1 << 47) - PAGE, 1 << 47, 0xDEAD << 48, 0xFFFF8880 << 32, (1 << 64) - PAGE, (1 << 64) - 1]
wild = st.sampled_from(WILD)
times = st.sampled_from([1, 5, 20])  # ms that a TA waits


def often(usual: st.SearchStrategy[Any], seldom: st.SearchStrategy[Any], weight: int = 7) -> st.SearchStrategy[Any]:
    return st.integers(0, weight).flatmap(lambda n: usual if n else seldom)


# -- parameters of calls

Param = tuple[bytes, int | None]  # and the slot of the shared memory that it names, if it does


def _param(attr: int, a: int, b: int, c: int) -> bytes:
    return struct.pack("<QQQQ", attr, a, b, c)


values = st.builds(
    lambda kind, meta, a, b, c: (_param(kind | meta, a, b, c), None),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([0, 0, 0, ATTR_META]),
    u64,
    u64,
    u64,
)
memory = st.builds(
    lambda kind, offset, size, slot: (_param(kind, offset, size, 0), slot),
    st.sampled_from([5, 6, 7]),
    often(st.sampled_from([0, 1, 100]), u64),
    often(st.sampled_from([0, 1, 100, PAGE]), u64),
    slots,
)
odd = st.builds(
    lambda attr, a, b, c: (_param(attr, a, b, c), None),
    often(st.sampled_from([0, 4, 5, 7, 8, 0xFF, ATTR_META, 0x200, 1 << 32]), u64),
    u64,
    u64,
    st.sampled_from([MEMREF_NULL, 0, 1, (1 << 31) - 1, 1 << 31, 1 << 32]),
)
params: st.SearchStrategy[list[Param]] = st.lists(values | memory | odd, max_size=6)


def _right(*given_params: Param) -> st.SearchStrategy[list[Param]]:
    return st.just(list(given_params))


#: commands of the TA for tests with parameters that it takes; WAIT 0 and HOLD end by being cancelled or killed only
right_calls = st.one_of(
    st.tuples(st.just(2), slots.flatmap(lambda s: _right((_param(7, 0, 100, 0), s), (_param(1, 0xFF, 0, 0), None)))),
    st.tuples(st.just(3), slots.flatmap(lambda s: _right((_param(7, 0, PAGE, 0), s)))),
    st.tuples(st.just(4), times.flatmap(lambda ms: _right((_param(1, ms, 0, 0), None)))),
    st.tuples(st.just(4), _right((_param(1, 0, 0, 0), None))),
    st.tuples(st.just(5), slots.flatmap(lambda s: _right((_param(6, 1, 10, 0), s), (_param(1, 20, 0, 0), None)))),
    st.tuples(st.just(6), _right()),
    st.tuples(st.just(8), slots.flatmap(lambda s: _right((_param(7, 0, PAGE, 0), s), (_param(3, 10**6, 0, 0), None)))),
    st.tuples(st.just(8), slots.flatmap(lambda s: _right((_param(7, 0, PAGE, 0), s), (_param(3, 5, 0, 0), None)))),
)
calls = st.one_of(right_calls, right_calls, st.tuples(st.sampled_from([0, 7, COMMANDS]) | st.integers(0, 11), params))


# -- ioctls

places = often(st.just(Place.PLAIN), st.sampled_from([Place.READ_ONLY, Place.EDGE]))
descriptors = often(st.sampled_from([0, 0, 0, 0, 0, 0, 0, 1, 2]), st.integers(0, 2 * SLOTS - 1), 15)
repeats = often(st.just(1), st.sampled_from([2, 20]), 15)


@st.composite
def simple(draw: st.DrawFn, number: Ioctl, argument: bytes, patches: Sequence[Patch] = ()) -> Step:
    """An argument that is the structure itself; a wild address, now and then."""
    if not draw(st.integers(0, 15)):
        return Step(Kind.IOCTL, draw(descriptors), number, Place.RAW, struct.pack("<Q", draw(wild)))
    return Step(
        *(Kind.IOCTL, draw(descriptors), number, draw(places), argument),
        patches=tuple(patches),
        repeat=draw(repeats),
    )


@st.composite
def buffered(
    draw: st.DrawFn, number: Ioctl, head: bytes, given_params: list[Param], patches: Sequence[Patch] = ()
) -> Step:
    """An argument that names a buffer, whose last word before the parameters is their number."""
    count = draw(often(st.just(len(given_params)), u32, 15))
    room = head + struct.pack("<I", count) + b"".join(data for data, _ in given_params)
    named = [
        Patch(True, Fill.SHM, len(head) + 4 + 32 * index + 24, slot)
        for index, (_, slot) in enumerate(given_params)
        if slot is not None
    ]
    size = draw(often(st.just(len(room)), st.sampled_from([len(room) - 1, len(room) + 1, len(room) + 32]) | u64, 15))
    where = draw(often(st.just(Fill.ROOM), st.sampled_from([Fill.READ_ONLY, Fill.EDGE, None]), 15))
    address = 0 if where is not None else draw(wild)
    target = [Patch(False, where, 0)] if where is not None else []
    return Step(
        *(Kind.IOCTL, draw(descriptors), number, draw(places), struct.pack("<QQ", address, size), room),
        patches=(*patches, *named, *target),
        repeat=draw(repeats),
    )


uuids = often(
    st.just(UUIDS["probe"].bytes),
    st.sampled_from([UUIDS["hello_world"].bytes, bytes(16)]) | st.binary(min_size=16, max_size=16),
    5,
)
named_sessions = st.builds(lambda slot: (0, (Patch(True, Fill.SESSION, 4, slot),)), often(st.just(0), slots, 2))
sessions = often(named_sessions, st.builds(lambda ident: (ident, ()), u32), 3)
cancel_ids = often(st.just(1), st.integers(0, 2), 3)


@st.composite
def open_sessions(draw: st.DrawFn) -> Step:
    login = draw(often(st.just(0), st.sampled_from([1, 2, 4, 5, 6, 77, 1 << 31]) | u32))
    words = struct.pack("<IIIII", login, draw(cancel_ids), draw(u32), draw(u32), draw(u32))
    return draw(buffered(Ioctl.OPEN_SESSION, draw(uuids) + bytes(16) + words, draw(st.just([]) | params)))


@st.composite
def invokes(draw: st.DrawFn) -> Step:
    func, given_params = draw(calls)
    session, patches = draw(often(named_sessions, sessions))
    head = struct.pack("<IIIII", func, session, draw(cancel_ids), 0, 0)
    return draw(buffered(Ioctl.INVOKE, head, given_params, patches))


@st.composite
def registrations(draw: st.DrawFn) -> Step:
    length = draw(often(st.sampled_from([1, 100, PAGE, 5 * PAGE + 1, ARENA // 2]), u64 | st.just(1 << 16)))
    if draw(st.integers(0, 7)):
        patches: tuple[Patch, ...] = (
            Patch(False, Fill.ARENA, 0, draw(st.sampled_from([0, 1, ARENA // 2, ARENA - PAGE, ARENA]))),
        )
        address = 0
    else:
        patches, address = (), draw(wild)
    flags = draw(often(st.just(0), u32))
    return draw(simple(Ioctl.SHM_REGISTER, struct.pack("<QQIi", address, length, flags, 0), patches))


@st.composite
def allocations(draw: st.DrawFn) -> Step:
    size = draw(often(st.sampled_from([1, PAGE, 10 * PAGE]), u64))
    return draw(simple(Ioctl.SHM_ALLOC, struct.pack("<QIi", size, draw(often(st.just(0), u32)), 0)))


@st.composite
def cancels(draw: st.DrawFn) -> Step:
    session, patches = draw(sessions)
    argument = struct.pack("<II", draw(cancel_ids), session)
    return draw(simple(Ioctl.CANCEL, argument, [Patch(False, p.fill, p.offset, p.number) for p in patches]))


@st.composite
def closings(draw: st.DrawFn) -> Step:
    session, patches = draw(sessions)
    return draw(
        simple(Ioctl.CLOSE_SESSION, struct.pack("<I", session), [Patch(False, p.fill, 0, p.number) for p in patches])
    )


@st.composite
def receptions(draw: st.DrawFn) -> Step:
    """Mostly as a supplicant asks: empty parameters, the first one META."""
    first = (_param(draw(st.sampled_from([0, ATTR_META, ATTR_META])), 0, 0, 0), None)
    room: list[Param] = [first, *[(_param(0, 0, 0, 0), None)] * draw(st.sampled_from([0, 1, 4, 4, 4, 6]))]
    step: Step = draw(buffered(Ioctl.SUPPL_RECV, bytes(4), draw(often(st.just(room), params))))
    return step


@st.composite
def answers(draw: st.DrawFn) -> Step:
    """Mostly the request that was received last, with memory or with what makes no sense."""
    code = draw(often(st.just(0), st.sampled_from([0xFFFF0008, 0xFFFF000C]) | u32, 3))
    step: Step = draw(
        buffered(
            Ioctl.SUPPL_SEND, struct.pack("<I", code), draw(st.lists(values | memory | odd, min_size=1, max_size=5))
        )
    )
    if not draw(st.integers(0, 7)):
        return step
    kept = tuple(patch for patch in step.patches if not patch.in_room)
    # c of a SHM_ALLOC's value, behind the META parameter, names the memory
    patches = [Patch(True, Fill.SHM, 8 + 32 + 24, draw(often(st.just(0), slots)))] * draw(st.integers(0, 1))
    patches += [Patch(True, Fill.WORD, 8 * draw(st.integers(1, 16)), draw(u32))] * (not draw(st.integers(0, 3)))
    room = struct.pack("<II", code, 0) + bytes(32 * MOST)
    argument = step.argument[:8] + struct.pack("<Q", len(room))
    return Step(Kind.IOCTL, 0, step.number, step.place, argument, room, (*kept, *patches), answers=True)


@st.composite
def nonsense(draw: st.DrawFn) -> Step:
    """Any command: of this type, or of another one, with any size in it."""
    number = draw(
        st.sampled_from(list(Ioctl))
        | st.builds(lambda n, s: n | 0xA4 << 8 | s << 16 | 3 << 30, st.integers(0, 15), st.integers(0, 99))
        | u32
    )
    argument = draw(st.binary(min_size=16, max_size=64))
    return Step(Kind.IOCTL, draw(descriptors), number, draw(st.sampled_from(list(Place))), argument)


others = st.one_of(
    st.builds(lambda slot, device: Step(Kind.OPEN, slot % 3, device), slots, st.sampled_from([0, 0, 1])),
    st.builds(lambda slot: Step(Kind.CLOSE, slot % 3), slots),
    st.builds(lambda slot: Step(Kind.CLOSE_SHM, slot), slots),
    st.builds(lambda slot, size: Step(Kind.MAP_SHM, slot, size), slots, st.sampled_from([1, PAGE, 10 * PAGE, 1 << 30])),
    st.just(Step(Kind.UNMAP)),
    st.builds(lambda us: Step(Kind.PAUSE, number=us), st.sampled_from([100, 2000, 6000])),
)
version = simple(Ioctl.VERSION, bytes(12))
of_clients = st.one_of(
    *(open_sessions(), invokes(), invokes(), invokes(), invokes(), registrations(), allocations(), cancels()),
    *(closings(), others, nonsense(), version),
)
of_supplicants = st.one_of(
    *(receptions(), receptions(), answers(), answers(), answers(), registrations(), allocations(), others, nonsense())
)


def _right_step(number: Ioctl, head: bytes, slot: int = 0, given_params: Sequence[bytes] = ()) -> Step:
    room = head + struct.pack("<I", len(given_params)) + b"".join(given_params)
    argument = struct.pack("<QQ", 0, len(room))
    return Step(Kind.IOCTL, slot, number, argument=argument, room=room, patches=(Patch(False, Fill.ROOM, 0),))


#: what a client starts with, so that there is something to get wrong
READY = (
    _right_step(Ioctl.OPEN_SESSION, UUIDS["probe"].bytes + bytes(36)),
    Step(Kind.IOCTL, 0, Ioctl.SHM_ALLOC, argument=struct.pack("<QIi", PAGE, 0, 0)),
    Step(
        Kind.IOCTL,
        0,
        Ioctl.SHM_REGISTER,
        argument=struct.pack("<QQIi", 0, PAGE, 0, 0),
        patches=(Patch(False, Fill.ARENA, 0, ARENA // 2),),
    ),
)
CANCEL = Step(
    *(Kind.IOCTL, 0, Ioctl.CANCEL), argument=struct.pack("<II", 1, 0), patches=(Patch(False, Fill.SESSION, 4, 0),)
)
LOAD = _right_step(Ioctl.OPEN_SESSION, bytes(52))  # a TA that there is not
RECEIVE = _right_step(Ioctl.SUPPL_RECV, bytes(4), PRIVILEGED, [_param(ATTR_META, 0, 0, 0), *[bytes(32)] * (MOST - 1)])
SUPPLICANT = (
    Step(Kind.OPEN, PRIVILEGED, 1),
    Step(Kind.IOCTL, PRIVILEGED, Ioctl.SHM_ALLOC, argument=struct.pack("<QIi", 10 * PAGE, 0, 0)),
)


steps = st.lists(of_clients, min_size=6, max_size=16)
second_steps = st.lists(often(of_clients, st.just(CANCEL), 3), min_size=6, max_size=16)
#: when a program is killed, in µs: few that do not wait for good take longer than the longest of these
ends = often(st.just(150_000), st.integers(2_000, 30_000), 2)
signals = often(st.just(0), st.integers(2_000, 30_000), 3)


@st.composite
def clients(draw: st.DrawFn) -> Program:
    """One or two threads that use the same descriptors."""
    first = [*(READY if draw(st.integers(0, 15)) else ()), *draw(steps)]
    second = draw(often(second_steps, st.just([]), 1))
    return Program(first, second, draw(signals), draw(ends))


@st.composite
def supplicants(draw: st.DrawFn) -> Program:
    """A supplicant that has anything in mind, and beside it a client whose TAs it should load."""
    turns = st.tuples(often(st.just(RECEIVE), receptions()), often(answers(), of_supplicants, 4))
    first = [
        *SUPPLICANT,
        *(_privileged(step) for turn in draw(st.lists(turns, min_size=3, max_size=8)) for step in turn),
    ]
    second = [
        Step(Kind.PAUSE, number=8_000),
        *draw(st.lists(st.just(LOAD) | st.just(LOAD) | of_clients, min_size=3, max_size=8)),
    ]
    return Program(first, second, draw(signals), 20_000 + draw(ends) // 2)


def _privileged(step: Step) -> Step:
    if step.kind is not Kind.IOCTL or step.slot:
        return step
    return Step(
        *(
            step.kind,
            PRIVILEGED,
            step.number,
            step.place,
            step.argument,
            step.room,
            step.patches,
            step.repeat,
            step.answers,
        )
    )


def _right_invoke(func: int, *given_params: bytes) -> Step:
    """With the first session, and 1 to cancel it by."""
    step = _right_step(Ioctl.INVOKE, struct.pack("<IIIII", func, 0, 1, 0, 0), given_params=given_params)
    return replace(step, patches=(*step.patches, Patch(True, Fill.SESSION, 4, 0)))


_ANSWER = _right_step(Ioctl.SUPPL_SEND, struct.pack("<I", 0xFFFF0008), PRIVILEGED, [bytes(32)] * MOST)
PATIENCE_US = 4_000_000
#: what is right from end to end, and has the time for it: a call that is cancelled, a request that is answered
RIGHT_CLIENT = Program(
    [
        *READY,
        Step(Kind.IOCTL, 0, Ioctl.VERSION, argument=bytes(12)),
        _right_invoke(4, _param(1, 0, 0, 0)),
        Step(Kind.IOCTL, 0, Ioctl.CLOSE_SESSION, argument=bytes(4), patches=(Patch(False, Fill.SESSION, 0, 0),)),
    ],
    [Step(Kind.PAUSE, number=200_000), CANCEL] * 10,
    0,
    PATIENCE_US,
)
RIGHT_SUPPLICANT = Program(
    [*SUPPLICANT, RECEIVE, replace(_ANSWER, answers=True), _ANSWER],
    [Step(Kind.PAUSE, number=200_000), LOAD],
    0,
    PATIENCE_US,
)


@cache
def made(programs: Callable[[], st.SearchStrategy[Program]], right: Program, count: int) -> bytes:
    """So many programs, the same ones each time, for the player; the first one is `right`."""
    found = [right.encoded()]

    @settings(
        max_examples=count - 1,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def keep(program: Program) -> None:
        found.append(program.encoded())

    keep()
    return b"".join(found)
