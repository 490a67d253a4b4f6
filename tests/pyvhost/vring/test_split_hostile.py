"""The device side of a split ring with a driver that breaks every rule: bounded work, the head returned, the queue
latched."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pyvhost.memory import Mapping, Region
from pyvhost.testing import RawRing, plain_memory
from pyvhost.vring.api import Chain
from pyvhost.vring.split import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE
from tests.pyvhost.vring.kinds import each_queue

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
BASE, SIZE = 0x1_0000, 0x8000
BUF = BASE + 0x4000  # where data is
TABLE = BASE + 0x2000  # where indirect tables are


def raw(queue: str, **options: bool) -> RawRing:
    return RawRing(8, plain_memory((BASE, SIZE), (BASE + SIZE, 0x1000)), queue=queue, **options)


def loop(ring: RawRing) -> None:
    ring.desc(0, BUF, 4, NEXT, 1)
    ring.desc(1, BUF, 4, NEXT, 0)


def self_loop(ring: RawRing) -> None:
    ring.desc(0, BUF, 4, NEXT, 0)


def next_outside(ring: RawRing) -> None:
    ring.desc(0, BUF, 4, NEXT, 8)


def next_far_outside(ring: RawRing) -> None:
    ring.desc(0, BUF, 4, NEXT, 0xFFFF)


def readable_after_writable(ring: RawRing) -> None:
    ring.desc(0, BUF, 4, NEXT | WRITE, 1)
    ring.desc(1, BUF, 4)


def address_outside(ring: RawRing) -> None:
    ring.desc(0, 0x10, 4)


def address_past_the_end(ring: RawRing) -> None:
    ring.desc(0, BASE + SIZE + 0x1000 - 2, 4)


def address_wraps(ring: RawRing) -> None:
    ring.desc(0, (1 << 64) - 2, 4)


def length_outside(ring: RawRing) -> None:
    ring.desc(0, BUF, 0xFFFF_FFFF)


def no_bytes(ring: RawRing) -> None:
    ring.desc(0, BUF, 0)


def indirect_in_indirect(ring: RawRing) -> None:
    length = ring.table(TABLE, (TABLE, 16, INDIRECT, 0))
    ring.desc(0, TABLE, length, INDIRECT)


def indirect_with_next(ring: RawRing) -> None:
    length = ring.table(TABLE, (BUF, 16, 0, 0))
    ring.desc(0, TABLE, length, INDIRECT | NEXT, 1)
    ring.desc(1, BUF, 4)


def indirect_loop(ring: RawRing) -> None:
    length = ring.table(TABLE, (BUF, 16, NEXT, 1), (BUF, 16, NEXT, 0))
    ring.desc(0, TABLE, length, INDIRECT)


def indirect_next_outside(ring: RawRing) -> None:
    length = ring.table(TABLE, (BUF, 16, NEXT, 2), (BUF, 16, 0, 0))
    ring.desc(0, TABLE, length, INDIRECT)


def indirect_of_odd_length(ring: RawRing) -> None:
    ring.desc(0, TABLE, 17, INDIRECT)


def indirect_empty(ring: RawRing) -> None:
    ring.desc(0, TABLE, 0, INDIRECT)


def indirect_huge(ring: RawRing) -> None:
    ring.desc(0, TABLE, 0xFFFF_FFF0, INDIRECT)


def indirect_longer_than_allowed(ring: RawRing) -> None:
    ring.desc(0, BASE, 16 * 1025, INDIRECT)


def indirect_outside(ring: RawRing) -> None:
    ring.desc(0, 0x10, 16, INDIRECT)


WITH_A_HEAD: list[Callable[[RawRing], None]] = [
    loop,
    self_loop,
    next_outside,
    next_far_outside,
    readable_after_writable,
    address_outside,
    address_past_the_end,
    address_wraps,
    length_outside,
    no_bytes,
    indirect_in_indirect,
    indirect_with_next,
    indirect_loop,
    indirect_next_outside,
    indirect_of_odd_length,
    indirect_empty,
    indirect_huge,
    indirect_longer_than_allowed,
    indirect_outside,
]


@pytest.mark.requirement("DEV-QUE-8")
@each_queue
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("evil", WITH_A_HEAD, ids=lambda f: f.__name__)
@pytest.mark.fault("broken-ring")
def test_a_bad_chain_is_returned_and_breaks_the_queue(
    queue: str, evil: Callable[[RawRing], None], event_idx: bool
) -> None:
    ring = raw(queue, event_idx=event_idx)
    ring.desc(5, BUF, 4, WRITE)
    ring.offer(5)
    good = ring.device.pop()
    assert good is not None
    evil(ring)
    ring.offer(0)
    assert ring.device.pop() is None
    assert ring.device.broken is not None
    assert str(ring.device.broken)
    assert ring.used() == [(0, 0)]
    assert ring.signals == 1
    ring.desc(6, BUF, 4)
    ring.offer(6)
    assert ring.device.pop() is None  # latched
    assert not ring.device.enable_notifications()
    assert ring.device.drain(lambda chain: 0) is False
    ring.device.push(good.head, 4)  # what was good before is still completed
    assert ring.used() == [(0, 0), (5, 4)]


@each_queue
def test_indirect_needs_negotiation(queue: str) -> None:
    ring = raw(queue, indirect=False)
    ring.desc(0, TABLE, ring.table(TABLE, (BUF, 4, 0, 0)), INDIRECT)
    ring.offer(0)
    assert ring.device.pop() is None
    assert "not negotiated" in str(ring.device.broken)


@pytest.mark.requirement("DEV-QUE-8")
@each_queue
@pytest.mark.parametrize("head", [8, 0xFFFF])
def test_a_wild_head_is_not_returned(queue: str, head: int) -> None:
    ring = raw(queue)
    ring.offer(head)
    assert ring.device.pop() is None
    assert ring.device.broken is not None
    assert ring.used() == []


@each_queue
def test_a_head_twice_in_flight_is_not_returned_twice(queue: str) -> None:
    ring = raw(queue)
    ring.desc(3, BUF, 4)
    ring.offer(3, 3)
    chain = ring.device.pop()
    assert chain is not None
    assert ring.device.pop() is None
    assert "in flight" in str(ring.device.broken)
    ring.device.push(chain.head)
    assert ring.used() == [(3, 0)]


@each_queue
@pytest.mark.parametrize("index", [9, 100, 0x8000, 0xFFFF])
def test_an_index_further_ahead_than_the_ring(queue: str, index: int) -> None:
    ring = raw(queue)
    ring.avail_idx(index)
    assert ring.device.pop() is None
    assert "further ahead" in str(ring.device.broken)
    assert ring.used() == []


@each_queue
def test_a_chain_through_the_whole_ring_is_legal(queue: str) -> None:
    ring = raw(queue)
    for n in range(8):
        ring.desc(n, BUF + n, 1, NEXT if n < 7 else 0, n + 1)
    ring.offer(0)
    chain = ring.device.pop()
    assert chain is not None
    assert chain.readable_bytes == 8


@each_queue
def test_direct_descriptors_before_an_indirect_one_are_legal(queue: str) -> None:
    ring = raw(queue)
    ring.desc(0, BUF, 2, NEXT, 1)
    ring.desc(1, TABLE, ring.table(TABLE, (BUF + 2, 3, NEXT, 1), (BUF, 4, WRITE, 0)), INDIRECT)
    ring.offer(0)
    chain = ring.device.pop()
    assert chain is not None
    assert (chain.readable_bytes, chain.writable_bytes) == (5, 4)


@each_queue
def test_an_indirect_table_longer_than_the_ring_is_legal(queue: str) -> None:
    ring = raw(queue)
    entries = [(BUF + n, 1, NEXT if n < 31 else 0, n + 1) for n in range(32)]
    ring.desc(0, TABLE, ring.table(TABLE, *entries), INDIRECT)
    ring.offer(0)
    chain = ring.device.pop()
    assert chain is not None
    assert chain.readable_bytes == 32


@each_queue
def test_buffers_across_regions_come_in_pieces(queue: str) -> None:
    ring = raw(queue)
    ring.desc(0, BASE + SIZE - 3, 8, NEXT, 1)
    ring.desc(1, BASE + SIZE - 5, 8, WRITE)
    ring.offer(0)
    chain = ring.device.pop()
    assert chain is not None
    assert [len(v) for v in chain.readable] == [3, 5]
    assert [len(v) for v in chain.writable] == [5, 3]
    assert all(v.readonly for v in chain.readable)


@each_queue
def test_too_many_bytes_in_total(queue: str) -> None:
    # A table that names the same gigabyte five times; nothing touches it, so it takes no memory.
    gigabyte = mmap.mmap(-1, 1 << 30)
    plain = plain_memory((BASE, SIZE))
    memory = plain.with_region(Region(1 << 40, 1 << 30, 1 << 50, Mapping(memoryview(gigabyte))))
    ring = RawRing(8, memory, queue=queue)
    for n in range(5):
        ring.desc(n, 1 << 40, 1 << 30, NEXT if n < 4 else 0, n + 1)
    ring.offer(0)
    assert ring.device.pop() is None
    assert "2^32" in str(ring.device.broken)
    assert ring.used() == [(0, 0)]


descriptors = st.tuples(
    st.sampled_from([BUF, BUF + 16, TABLE, BASE, BASE + SIZE - 2, 0, (1 << 64) - 1, BASE + SIZE + 0xFFF]),
    st.sampled_from([0, 1, 4, 16, 32, 48, 128, 0x1000, 0xFFFF_FFFF]),
    st.integers(0, 7) | st.integers(0, 0xFFFF),
    st.integers(0, 9) | st.just(0xFFFF),
)


@given(
    st.lists(descriptors, min_size=8, max_size=8),
    st.lists(descriptors, max_size=8),
    st.lists(st.integers(0, 8) | st.integers(0, 0xFFFF), max_size=8),
    st.none() | st.integers(0, 0xFFFF),
    st.booleans(),
)
@example([(TABLE, 128, 4, 0)] * 8, [(TABLE, 128, 4, 0)] * 8, [0, 1, 2], None, False)
@each_queue
def test_any_ring_gives_chains_or_breaks(
    queue: str,
    ring_descs: list[tuple[int, int, int, int]],
    table: list[tuple[int, int, int, int]],
    heads: list[int],
    index: int | None,
    event_idx: bool,
) -> None:
    ring = raw(queue, event_idx=event_idx)
    for n, d in enumerate(ring_descs):
        ring.desc(n, *d)
    if table:
        ring.table(TABLE, *table)
    ring.offer(*heads)
    if index is not None:
        ring.avail_idx(index)
    calls = 0

    def handler(chain: Chain) -> int | None:
        nonlocal calls
        calls += 1
        assert sum(map(len, chain.readable)) == chain.readable_bytes
        assert sum(map(len, chain.writable)) == chain.writable_bytes
        return min(1, chain.writable_bytes) if chain.head % 3 else None

    ring.device.drain(handler, budget=20)
    assert calls <= len(heads) + 8
    broken = ring.device.broken is not None
    returned = len(ring.used())
    assert returned + ring.device.in_flight in (calls, calls + broken)


@pytest.mark.requirement("DEV-QUE-8")
@given(st.binary(min_size=300, max_size=300))
@each_queue
@pytest.mark.fault("broken-ring")
def test_random_bytes_as_a_ring(queue: str, data: bytes) -> None:
    ring = raw(queue)
    ring.view[:] = data[: len(ring.view)]
    (count,) = struct.unpack_from("<H", ring.view, ring.layout.avail_offset + 2)
    ring.device.drain(lambda chain: 0, budget=64)
    assert ring.device.broken is not None or count <= 8
