"""What goes on while ``drain()`` does: handlers, and whoever signals, that work on the queue, drivers that break the
rules in the middle, and how often there is a signal."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvhost.dirtylog import RingLog
from pyvhost.errors import StateError
from pyvhost.inflight import COUNTER_MASK, SplitInflight, region_size
from pyvhost.testing import RawRing, RingPair, plain_memory
from pyvhost.vring.api import Chain, Fences
from pyvhost.vring.packed_inflight import PackedInflight
from pyvhost.vring.tables import short_table
from tests.pyvhost.vring.kinds import Kind, each_kind, each_queue

SIZE = 8
WRONG = {"too long": 6, "negative": -1}  # answers that no request has room for


def record_of(kind: Kind) -> memoryview:
    return memoryview(bytearray(region_size(SIZE, packed=kind.packed)))


def recorder(kind: Kind, record: memoryview) -> Any:
    return PackedInflight(record) if kind.packed else SplitInflight(record)


def queue_of(kind: Kind, pair: RingPair, base: int, **options: Any) -> Any:
    return kind.factory(SIZE, pair.memory, *pair.parts, **{"fences": Fences.none(), **options}, base=base)


class Working:
    """A handler that does something with the queue, or to it, before it answers, keeps or fails. Which request is
    which is known by what the driver wrote into it."""

    def __init__(self, kind: Kind, requests: int, indirect: int, actions: list[str]) -> None:
        self.kind = kind
        self.pair = kind.pair(SIZE, base=requests, indirect=indirect)
        self.base = kind.base(SIZE, requests)
        self.record = record_of(kind)
        self.queue = queue_of(kind, self.pair, self.base, indirect=bool(indirect))
        self.queue.track(recorder(kind, self.record))
        self.needed = 1 if indirect else 3  # descriptors of the ring for one request
        self.actions = actions
        self.added = 0
        self.served: list[int] = []  # in the order of taking
        self.kept: list[tuple[int, int]] = []  # head and number
        self.done: list[int] = []

    def add(self) -> None:
        if self.pair.driver.free_slots >= self.needed:
            at = self.pair.data + 64 * (self.added % 512)
            self.pair.write(at, self.added.to_bytes(4, "little"))
            self.pair.driver.add([(at, 4)], [(at + 8, 4), (at + 16, 1)], self.added)
            self.added += 1

    def poll(self) -> None:
        self.done += [token for token, _ in self.pair.driver.poll()]  # raises for what is completed twice

    def push(self, place: int) -> None:
        self.queue.push(self.kept.pop(place)[0], 5)

    def take(self, chain: Chain) -> int:
        number = int.from_bytes(chain.read(), "little")
        self.served.append(number)
        return number

    def serve(self, chain: Chain) -> int | None:
        number = self.take(chain)
        for action in self.actions[2 * number : 2 * number + 2]:
            if action == "keep":
                self.kept.append((chain.head, number))
                return None
            if action in WRONG:
                return WRONG[action]
            if action == "fail":
                raise ArithmeticError
            self.work(action)
        return chain.write(b"\0", 4)

    def work(self, action: str) -> None:
        if action == "push" and self.kept:
            self.push(0)
        elif action == "push last" and self.kept:
            self.push(-1)
        elif action == "pop" and (other := self.queue.pop()) is not None:
            self.kept.append((other.head, self.take(other)))
        elif action == "drain":
            self.drain(2)
        elif action == "notify":
            self.queue.notify()
        elif action == "add":
            self.add()
            self.queue.enable_notifications()
        elif action == "poll":
            self.poll()
        elif action == "rebind":
            self.queue.rebind(self.pair.memory, *self.pair.parts)
        elif action == "log":
            self.queue.log_to(None)

    def drain(self, budget: int) -> None:
        with contextlib.suppress(ArithmeticError, ValueError):  # that request stays in flight, and is found below
            self.queue.drain(self.serve, budget, 2)


ACTIONS = ["", "", "keep", "push", "push last", "pop", "drain", "notify", "add", "poll", "rebind", "log"]


@each_kind
@given(
    requests=st.sampled_from([0, 3, 65530, 65533]),
    indirect=st.sampled_from([0, 3]),
    actions=st.lists(st.sampled_from([*ACTIONS, *WRONG, "fail"]), max_size=40),
    waiting=st.integers(1, SIZE),
)
@example(65533, 3, [""] * 40, SIZE)
@example(0, 3, ["negative", "", "too long"], SIZE)
@example(0, 3, ["keep", "", "pop", "push", "drain", "", "push last", "", "poll", "add"], SIZE)
def test_each_request_is_served_once(
    kind: Kind, requests: int, indirect: int, actions: list[str], waiting: int
) -> None:
    work = Working(kind, requests, indirect, actions)
    for _ in range(waiting):
        work.add()
    for _ in range(5):
        work.drain(5)
        work.poll()
        for _ in range(waiting):
            work.add()
    assert work.queue.broken is None
    assert work.served == list(range(len(work.served)))  # each one, once, in the order of the driver's
    left = [number for number in work.served if number not in work.done]
    assert work.queue.in_flight == len(left)
    # the record says the same: another backend takes these, and then what nobody has taken
    following = queue_of(kind, work.pair, work.base, indirect=bool(indirect))
    following.track(recorder(kind, work.record))
    found = []
    while (chain := following.pop()) is not None:
        found.append(work.take(chain))
        following.push(chain.head, 5)
    assert following.broken is None
    assert found == [*left, *range(len(work.served) - len(found), work.added)]
    work.poll()
    assert sorted(work.done) == list(range(work.added))


@each_kind
@pytest.mark.parametrize("indirect", [0, 3])
def test_what_a_drain_writes_is_logged(kind: Kind, indirect: int) -> None:
    pair = kind.pair(SIZE, indirect=indirect)
    marks: list[tuple[int, int]] = []
    log = RingLog(lambda addr, length: marks.append((addr, length)), None)
    for n in range(4 if indirect else 2):
        pair.driver.add([(pair.data, 4)], [(pair.data + 64 + n, 1)], n)

    def serve(chain: Chain) -> int:
        if len(served) == 1:
            pair.device.log_to(log)  # migration begins
        served.append(chain.head)
        return 1

    served: list[int] = []
    assert pair.device.drain(serve) is False
    assert marks == [(pair.data + 64 + n, 1) for n in range(1, len(served))]
    marks.clear()
    pair.driver.poll()
    pair.driver.add([(pair.data, 4)], [(pair.data + 64, 1)], 9)
    pair.device.drain(serve)
    assert marks == [(pair.data + 64, 1)]


@each_kind
@pytest.mark.parametrize("indirect", [0, 3])
def test_memory_that_moves_under_a_drain(kind: Kind, indirect: int) -> None:
    """What is answered after that is in the new place, and nothing more in the old one."""
    pair = kind.pair(SIZE, indirect=indirect)
    moved = plain_memory((0x1000, 1 << 16))
    (old,), (new,) = (memory.translate(0x1000, 1 << 16) for memory in (pair.memory, moved))
    starts = [address - 0x1000 for address in (pair.driver.desc_addr, pair.driver.avail_addr, pair.driver.used_addr)]
    for n in range(4):
        pair.driver.add([(pair.data, 1)] if indirect else [], [(pair.data + 64 + n, 1)], n)
    served = []

    def serve(chain: Chain) -> int:
        served.append(chain.head)
        if len(served) == 2:
            new[:] = old
            parts = [new[start : start + len(part)] for start, part in zip(starts, pair.parts, strict=True)]
            pair.device.rebind(moved, *parts)
        return chain.write(b"!")

    assert pair.device.drain(serve) is False
    assert [token for token, _ in pair.driver.poll()] == [0]
    place = pair.data - 0x1000 + 64
    assert bytes(old[place : place + 4]) == b"!!\0\0"  # the second one's chain is older than the move
    old[:] = new
    assert [token for token, _ in pair.driver.poll()] == [1, 2, 3]
    assert bytes(new[place : place + 4]) == b"!\0!!"


@each_kind
def test_whoever_signals_may_stop_the_queue(kind: Kind) -> None:
    pair = kind.pair(SIZE, indirect=3)
    for n in range(6):
        pair.driver.add([(pair.data, 4)], [(pair.data + 8, 4)], n)
    queue = queue_of(kind, pair, pair.device.next_base, signal=lambda: queue.stop())
    served = []

    def serve(chain: Chain) -> int:
        served.append(chain.head)
        return 0

    assert queue.drain(serve, notify_every=2) is False
    assert len(served) == 2
    assert queue.stopped
    assert queue.in_flight == 0
    assert [token for token, _ in pair.driver.poll()] == [0, 1]


@each_kind
def test_a_handler_that_completes_its_own_request(kind: Kind) -> None:
    pair = kind.pair(SIZE)
    for n in range(3):
        pair.driver.add([(pair.data, 4)], [(pair.data + 8, 4)], n)

    def serve(chain: Chain) -> None:
        pair.device.push(chain.head, 3)

    assert pair.device.drain(serve) is False
    assert pair.driver.poll() == [(0, 3), (1, 3), (2, 3)]
    pair.driver.add([(pair.data, 4)], [(pair.data + 8, 4)], 3)

    def twice(chain: Chain) -> int:
        pair.device.push(chain.head, 3)
        return 3

    with pytest.raises(StateError, match="not in flight"):
        pair.device.drain(twice)
    assert pair.driver.poll() == [(3, 3)]


def twice(ring: RawRing) -> None:
    ring.offer(0, 1, 2, 1)


def outside(ring: RawRing) -> None:
    ring.offer(0, 1, 2, 8)


def bad_table(ring: RawRing) -> None:
    ring.desc(3, 0x1000, 40, 4)
    ring.offer(0, 1, 2, 3)


@each_queue
@pytest.mark.fault("broken-ring")
@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize(("bad", "returned"), [(twice, 0), (outside, 0), (bad_table, 1)])
def test_what_was_there_before_a_bad_one_is_served(
    queue: str, kept: bool, bad: Callable[[RawRing], None], returned: int
) -> None:
    ring = RawRing(SIZE, plain_memory((0x1000, 0x8000)), queue=queue)
    for n in range(3):
        length = ring.table(0x3000 + 64 * n, (0x4000, 4, 1, 1), (0x4010, 8, 3, 2), (0x4020, 1, 2, 0))
        ring.desc(n, 0x3000 + 64 * n, length, 4)
    bad(ring)
    seen = []

    def serve(chain: Chain) -> int | None:
        seen.append((chain.head, chain.readable_bytes, chain.writable_bytes))
        return None if kept else 9

    assert ring.device.drain(serve) is False
    again = bad is twice and not kept  # it was given back in between, so it is not in flight: that is allowed
    assert seen == [(n, 4, 9) for n in ((0, 1, 2, 1) if again else (0, 1, 2))]
    assert (ring.device.broken is None) == again
    assert ring.device.in_flight == (3 if kept else 0)
    assert ring.used() == [(n, 9) for n, _, _ in seen if not kept] + [(3, 0)] * returned


class Clock:
    def __init__(self) -> None:
        self.now = 5.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("tables", [True, False])
@pytest.mark.parametrize(("us", "signals"), [(1.1, [24]), (1.7, [16]), (3.2, [8, 16, 24]), (10, [8, 16, 24])])
def test_signals_keep_apart_while_there_is_work(tables: bool, us: float, signals: list[int]) -> None:
    """The pure split queue: every 8 requests, if it is 25 µs since the last signal; and when the ring is empty."""
    kind = Kind(False, "pure")
    pair = kind.pair(64, indirect=3 if tables else 0)
    told: list[int] = []
    clock = Clock()
    served = 0
    queue = kind.factory(
        64,
        pair.memory,
        *pair.parts,
        fences=Fences(full=int, clock=clock),
        base=pair.device.next_base,
        signal=lambda: told.append(served),
    )

    def serve(chain: Chain) -> int:
        nonlocal served
        served += 1
        clock.now += us / 1e6
        return 0

    pair.driver.add([(pair.data, 4)], [(pair.data + 8, 4)], "first")
    queue.drain(serve)
    assert told == [1]
    pair.driver.poll()
    served = 0
    for n in range(30 if tables else 21):
        pair.driver.add([(pair.data, 4)], [(pair.data + 8, 4)], n)
    queue.drain(serve)
    last = 30 if tables else 21
    assert told[1:] == [*(n for n in signals if n < last), last]


@each_queue
def test_a_count_that_comes_to_its_end(queue: str) -> None:
    """The order of taking is kept in 64 bits, which a frontend may have set to anything."""
    kind = Kind(False, queue)
    pair = kind.pair(SIZE)
    record = record_of(kind)
    device = queue_of(kind, pair, 0)
    device.track(recorder(kind, record))
    pair.driver.add([(pair.data, 4)], [], 0)
    assert device.pop() is not None
    SplitInflight(record).counters[0] = COUNTER_MASK - 2
    device = queue_of(kind, pair, 0)
    device.track(recorder(kind, record))
    heads = [device.pop().head]
    for n in range(1, 5):
        pair.driver.add([(pair.data, 4)], [], n)
    device.drain(lambda chain: heads.append(chain.head))
    counters = SplitInflight(record).counters
    assert [counters[head] for head in heads] == [COUNTER_MASK - 2, COUNTER_MASK - 1, COUNTER_MASK, 0, 1]


def test_what_is_large_is_left_to_the_loop() -> None:
    """Up to what is fast, a short table is read at once; the limit of a chain's length is far above."""
    read = short_table("QII", "QIH2x", 1, 2, 3, 4)
    half = 1 << 29
    top = 1 << 40
    for size, fits in ((half - 1, True), (half, False)):
        words = [0x1000, half, 1, 0x2000, size, 4]
        table = b"".join(word.to_bytes(4 if n % 3 else 8, "little") for n, word in enumerate(words))
        chain = read(0, memoryview(bytearray(table)), 0, 32, 0, top)
        assert (chain is not None) == fits
    words = [0x1000, half, 1, 0x2000, half, 3, 0x3000, 1, 4]
    table = b"".join(word.to_bytes(4 if n % 3 else 8, "little") for n, word in enumerate(words))
    assert read(0, memoryview(bytearray(table)), 0, 48, 0, top) is None


@each_kind
@pytest.mark.parametrize("data", [b"\x80", bytearray(b"\x80"), memoryview(b"\x80")])
@pytest.mark.parametrize("writable", [[1], [3, 1], [1, 3]])
def test_one_byte_is_written_as_any_others_are(kind: Kind, data: Any, writable: list[int]) -> None:
    pair = kind.pair(SIZE, indirect=3)
    for n in range(2):  # the region is known the second time
        pair.driver.add([(pair.data, 4)], [(pair.data + 8 + 8 * n, size) for n, size in enumerate(writable)], n)
        chain = pair.device.pop()
        assert chain is not None
        for offset in range(sum(writable)):
            for view in chain.writable:
                view[:] = bytes(len(view))
            assert chain.write(data, offset) == offset + 1
            expected = bytes(offset) + b"\x80" + bytes(sum(writable) - offset - 1)
            assert b"".join(bytes(view) for view in chain.writable) == expected
        with pytest.raises(ValueError, match="do not fit"):
            chain.write(data, sum(writable))
        pair.device.push(chain.head)
        assert pair.driver.poll() == [(n, 0)]
