"""The device side of a packed ring with a driver that breaks every rule: bounded work, the id returned where it is
known, the queue latched."""

from __future__ import annotations

import mmap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.memory import Mapping, Region
from pyvhost.testing import RawPackedRing, plain_memory
from pyvhost.vring.api import Chain
from pyvhost.vring.packed import DESC_F_AVAIL, DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_USED, DESC_F_WRITE
from tests.pyvhost.vring.kinds import each_queue

NEXT, WRITE, INDIRECT = DESC_F_NEXT, DESC_F_WRITE, DESC_F_INDIRECT
BASE, SIZE = 0x1_0000, 0x8000
BUF = BASE + 0x4000  # where data is
TABLE = BASE + 0x2000  # where indirect tables are

Descriptor = tuple[int, int, int, int]


def raw(queue: str, **options: bool) -> RawPackedRing:
    return RawPackedRing(8, plain_memory((BASE, SIZE), (BASE + SIZE, 0x1000)), queue=queue, **options)


#: name: the chain, and what is in the indirect table at TABLE
WITH_AN_ID: dict[str, tuple[list[Descriptor], list[Descriptor]]] = {
    "readable_after_writable": ([(BUF, 4, 9, NEXT | WRITE), (BUF, 4, 3, 0)], []),
    "address_outside": ([(0x10, 4, 3, 0)], []),
    "address_outside_then_more": ([(0x10, 4, 9, NEXT), (BUF, 4, 9, NEXT), (BUF, 4, 3, 0)], []),
    "address_past_the_end": ([(BASE + SIZE + 0x1000 - 2, 4, 3, 0)], []),
    "address_wraps": ([((1 << 64) - 2, 4, 3, 0)], []),
    "length_outside": ([(BUF, 0xFFFF_FFFF, 3, 0)], []),
    "no_bytes": ([(BUF, 0, 3, 0)], []),
    "no_bytes_in_a_chain": ([(BUF, 4, 3, NEXT), (BUF, 0, 3, WRITE)], []),
    "indirect_in_indirect": ([(TABLE, 16, 3, INDIRECT)], [(TABLE, 16, 0, INDIRECT)]),
    "indirect_with_next": ([(TABLE, 16, 3, INDIRECT | NEXT), (BUF, 4, 3, 0)], [(BUF, 4, 0, 0)]),
    "indirect_in_a_chain": ([(BUF, 4, 3, NEXT), (TABLE, 16, 3, INDIRECT)], [(BUF, 4, 0, 0)]),
    "indirect_of_odd_length": ([(TABLE, 17, 3, INDIRECT)], [(BUF, 4, 0, 0)]),
    "indirect_empty": ([(TABLE, 0, 3, INDIRECT)], []),
    "indirect_huge": ([(TABLE, 0xFFFF_FFF0, 3, INDIRECT)], []),
    "indirect_longer_than_allowed": ([(BASE, 16 * 1025, 3, INDIRECT)], []),
    "indirect_outside": ([(0x10, 16, 3, INDIRECT)], []),
    "indirect_wrong_directions": ([(TABLE, 32, 3, INDIRECT)], [(BUF, 4, 0, WRITE), (BUF, 4, 0, 0)]),
}


@pytest.mark.requirement("DEV-QUE-8")
@each_queue
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("name", WITH_AN_ID)
def test_a_bad_chain_is_returned_and_breaks_the_queue(queue: str, name: str, event_idx: bool) -> None:
    chain, table = WITH_AN_ID[name]
    ring = raw(queue, event_idx=event_idx)
    ring.table(TABLE, *table)
    ring.offer((BUF, 4, 5, WRITE))
    good = ring.device.pop()
    assert good is not None
    ring.offer(*chain)
    assert ring.device.pop() is None
    assert ring.device.broken is not None
    assert str(ring.device.broken)
    assert ring.used(len(chain)) == [(3, 0)]
    assert ring.signals == 1
    ring.offer((BUF, 4, 6, 0))
    assert ring.device.pop() is None  # latched
    assert not ring.device.enable_notifications()
    assert ring.device.drain(lambda chain: 0) is False
    ring.device.push(good.head, 4)  # what was good before is still completed
    assert ring.used() == [(5, 4)]


@each_queue
def test_indirect_needs_negotiation(queue: str) -> None:
    ring = raw(queue, indirect=False)
    ring.offer((TABLE, ring.table(TABLE, (BUF, 4, 0, 0)), 0, INDIRECT))
    assert ring.device.pop() is None
    assert "not negotiated" in str(ring.device.broken)


@each_queue
def test_an_id_twice_in_flight_is_not_returned_twice(queue: str) -> None:
    for second in ([(BUF, 4, 3, 0)], [(BUF, 4, 0, NEXT), (BUF, 4, 3, 0)]):
        ring = raw(queue)
        ring.offer((BUF, 4, 3, 0), *second)
        chain = ring.device.pop()
        assert chain is not None
        assert ring.device.pop() is None
        assert "in flight" in str(ring.device.broken)
        ring.device.push(chain.head)
        assert ring.used() == [(3, 0)]


@each_queue
def test_a_chain_around_the_ring_has_no_id(queue: str) -> None:
    ring = raw(queue)
    ring.offer(*[(BUF, 4, n, NEXT) for n in range(8)])
    assert ring.device.pop() is None
    assert "loop" in str(ring.device.broken)
    assert ring.used() == []


@each_queue
def test_a_chain_into_what_is_in_flight(queue: str) -> None:
    ring = raw(queue)
    ring.offer((BUF, 4, 0, NEXT), (BUF, 4, 0, 0))
    assert ring.device.pop() is not None
    ring.offer(*[(BUF, 4, 1, NEXT) for n in range(6)], (BUF, 4, 1, 0))  # 7 where 6 are free
    assert ring.device.pop() is None
    assert "loop" in str(ring.device.broken)


@each_queue
def test_more_than_the_ring_holds(queue: str) -> None:
    ring = raw(queue)
    ring.offer(*[(BUF, 4, n, 0) for n in range(8)])
    assert all(ring.device.pop() for _ in range(8))
    assert ring.device.pop() is None
    assert ring.device.broken is None
    ring.offer((BUF, 4, 8, 0))
    assert ring.device.pop() is None
    assert "than the ring is long" in str(ring.device.broken)


@each_queue
def test_a_chain_through_the_whole_ring_is_legal(queue: str) -> None:
    ring = raw(queue)
    ring.offer(*[(BUF + n, 1, 2, NEXT if n < 7 else 0) for n in range(8)])
    chain = ring.device.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes) == (2, 8)
    ring.device.push(2)
    assert ring.used(8) == [(2, 0)]


@each_queue
def test_an_indirect_table_longer_than_the_ring_is_legal(queue: str) -> None:
    ring = raw(queue)
    # flags that mean nothing in a table, ids that neither do
    entries = [(BUF + n, 1, 77, (NEXT | 0x8080 if n % 2 else 0) | (WRITE if n > 20 else 0)) for n in range(32)]
    ring.offer((TABLE, ring.table(TABLE, *entries), 4, INDIRECT))
    chain = ring.device.pop()
    assert chain is not None
    assert (chain.head, chain.readable_bytes, chain.writable_bytes) == (4, 21, 11)


@each_queue
def test_buffers_across_regions_come_in_pieces(queue: str) -> None:
    ring = raw(queue)
    ring.offer((BASE + SIZE - 3, 8, 0, NEXT), (BASE + SIZE - 5, 8, 0, WRITE))
    chain = ring.device.pop()
    assert chain is not None
    assert [len(v) for v in chain.readable] == [3, 5]
    assert [len(v) for v in chain.writable] == [5, 3]
    assert all(v.readonly for v in chain.readable)


@each_queue
def test_too_many_bytes_in_total(queue: str) -> None:
    gigabyte = mmap.mmap(-1, 1 << 30)
    memory = plain_memory((BASE, SIZE)).with_region(Region(1 << 40, 1 << 30, 1 << 50, Mapping(memoryview(gigabyte))))
    ring = RawPackedRing(8, memory, queue=queue)
    ring.offer(*[(1 << 40, 1 << 30, 0, NEXT if n < 4 else 0) for n in range(5)])
    assert ring.device.pop() is None
    assert "2^32" in str(ring.device.broken)


descriptors = st.tuples(
    st.sampled_from([BUF, BUF + 16, TABLE, BASE, BASE + SIZE - 2, 0, (1 << 64) - 1, BASE + SIZE + 0xFFF]),
    st.sampled_from([0, 1, 4, 16, 32, 48, 128, 0x1000, 0xFFFF_FFFF]),
    st.integers(0, 9) | st.integers(0, 0xFFFF),
    st.builds(
        lambda kind, state: kind | state,
        st.sampled_from([0, WRITE, NEXT, NEXT | WRITE, INDIRECT]) | st.integers(0, 0xFFFF),
        st.sampled_from([DESC_F_AVAIL, DESC_F_AVAIL, DESC_F_AVAIL, DESC_F_USED, 0]),
    ),
)


@each_queue
@given(
    ring_descs=st.lists(descriptors, min_size=8, max_size=8),
    table=st.lists(descriptors, max_size=8),
    event=st.tuples(st.integers(0, 0xFFFF), st.integers(0, 0xFFFF)),
    event_idx=st.booleans(),
)
def test_any_ring_gives_chains_or_breaks(
    queue: str, ring_descs: list[Descriptor], table: list[Descriptor], event: tuple[int, int], event_idx: bool
) -> None:
    ring = raw(queue, event_idx=event_idx)
    ring.table(TABLE, *table)
    for n, d in enumerate(ring_descs):
        ring.desc(n, *d)
    ring.event(*event)
    calls = returned = 0

    def handler(chain: Chain) -> int | None:
        nonlocal calls, returned
        calls += 1
        assert sum(map(len, chain.readable)) == chain.readable_bytes
        assert sum(map(len, chain.writable)) == chain.writable_bytes
        if not chain.head % 3:
            return None
        returned += 1
        return min(1, chain.writable_bytes)

    ring.device.drain(handler, budget=20)
    assert calls <= 16  # what the device gives back may look available once more
    assert ring.device.in_flight == calls - returned


@pytest.mark.requirement("DEV-QUE-8")
@each_queue
@given(data=st.binary(min_size=136, max_size=136))
def test_random_bytes_as_a_ring(queue: str, data: bytes) -> None:
    ring = raw(queue)
    ring.view[:] = data
    ring.device.drain(lambda chain: 0, budget=64)
