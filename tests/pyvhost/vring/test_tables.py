"""Short indirect tables, which are read without a loop: nothing gets through that the loop would not let through, and
what does is the same."""

from __future__ import annotations

import struct

from hypothesis import example, given, settings
from hypothesis import strategies as st

from pyvhost.errors import MemoryFault, RingError
from pyvhost.memory import GuestMemory
from pyvhost.testing import plain_memory
from pyvhost.vring.api import Chain, Fences, RegionChain
from pyvhost.vring.packed_device import PackedDeviceQueue
from pyvhost.vring.split import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, SplitLayout
from pyvhost.vring.split_device import SplitDeviceQueue

BASE, SIZE = 0x10000, 0x4000
TABLE = 0x3000  # in the region
ENTRY = struct.Struct("<QIHH")

addresses = st.sampled_from(
    [BASE, BASE + 0x1000, BASE + SIZE - 1, BASE + SIZE, BASE - 1, BASE + 2 * SIZE, 0, 2**64 - 1]
)
lengths = st.sampled_from([0, 1, 16, 4096, SIZE, 2**32 - 1])
entries = st.lists(st.tuples(addresses, lengths, st.integers(0, 7), st.integers(0, 4)), min_size=1, max_size=4)


def split_queue(memory: GuestMemory, max_descriptors: int) -> SplitDeviceQueue:
    layout = SplitLayout(1)
    view = memory.regions[0].view
    parts = (
        view[:16],
        view[layout.avail_offset :][: layout.avail_bytes],
        view[layout.used_offset :][: layout.used_bytes],
    )
    queue = SplitDeviceQueue(1, memory, *parts, fences=Fences.none(), max_descriptors=max_descriptors)
    queue._locate(BASE, 1)
    return queue


def outcome(chain: Chain) -> tuple[object, ...]:
    return (
        chain.head,
        chain.readable_bytes,
        chain.writable_bytes,
        [(bytes(view), view.readonly) for view in chain.readable],
        [(bytes(view), view.readonly) for view in chain.writable],
    )


@settings(max_examples=1500, deadline=None)
@given(entries, st.integers(-16, 32), st.sampled_from([1, 2, 3, 1024]))
@example([(BASE, 16, 1, 1), (BASE + 0x1000, 4096, 3, 2), (BASE + SIZE - 1, 1, 2, 0)], 0, 1024)
@example([(BASE, 16, 1, 1), (BASE + 0x1000, 4096, 1, 2), (BASE + SIZE - 1, 1, 2, 3)], 0, 3)
@example([(BASE, 16, 1, 1), (BASE + SIZE - 1, 1, 2, 4)], 0, 2)
@example([(BASE, 16, 1, 1), (BASE + SIZE - 1, 1, 2, 4)], 0, 1)
def test_split(table: list[tuple[int, int, int, int]], extra: int, limit: int) -> None:
    memory = plain_memory((BASE, SIZE))
    view = memory.regions[0].view
    view[0x100:] = bytes(n % 251 for n in range(SIZE - 0x100))
    for n, entry in enumerate(table):
        ENTRY.pack_into(view, TABLE + 16 * n, *entry)
    length = max(0, 16 * len(table) + extra // 16 * 16 + (extra == 1))
    ENTRY.pack_into(view, 0, BASE + TABLE, length, DESC_F_INDIRECT, 0)
    queue = split_queue(memory, limit)
    try:
        expected = outcome(queue._follow(0))
    except (RingError, MemoryFault) as e:
        expected = (type(e), str(e))
    queue._locate(BASE, 1)
    try:
        got = outcome(queue._walk(0))
    except (RingError, MemoryFault) as e:
        got = (type(e), str(e))
    assert got == expected


def packed_queue(memory: GuestMemory, max_descriptors: int) -> PackedDeviceQueue:
    view = memory.regions[0].view
    queue = PackedDeviceQueue(
        1, memory, view[:16], view[16:20], view[20:24], fences=Fences.none(), max_descriptors=max_descriptors
    )
    queue._locate(BASE, 1)
    return queue


@settings(max_examples=1500, deadline=None)
@given(entries, st.integers(-16, 32), st.sampled_from([1, 2, 3, 1024]), st.sampled_from([0, DESC_F_NEXT]))
@example([(BASE, 16, 0, 0), (BASE + 0x1000, 4096, 2, 0), (BASE + SIZE - 1, 1, 2, 0)], 0, 1024, 0)
@example([(BASE, 16, 0, 0), (BASE + 0x1000, 4096, 0, 0), (BASE + SIZE - 1, 1, 2, 0)], 0, 3, 0)
@example([(BASE, 16, 1, 0), (BASE + SIZE - 1, 1, 2, 0)], 0, 2, 0)
@example([(BASE, 16, 0, 0), (BASE + SIZE - 1, 1, 2, 0)], 0, 1, 0)
def test_packed(table: list[tuple[int, int, int, int]], extra: int, limit: int, more: int) -> None:
    memory = plain_memory((BASE, SIZE))
    view = memory.regions[0].view
    view[0x100:] = bytes(n % 251 for n in range(SIZE - 0x100))
    for n, (addr, size, flags, number) in enumerate(table):
        ENTRY.pack_into(view, TABLE + 16 * n, addr, size, number, flags)
    length = max(0, 16 * len(table) + extra // 16 * 16 + (extra == 1))
    outcomes = []
    for short in (False, True):
        queue = packed_queue(memory, limit)
        queue._tables &= short
        chain = queue._chain(7, [(BASE + TABLE, length, DESC_F_INDIRECT | more)], 1)
        writes = [entry for entry in queue._held.get(7, (0, 0, ()))[2] if entry[2] & DESC_F_WRITE]
        ranges = [(addr, size) for addr, size, _ in writes]
        outcomes.append((str(queue.broken), chain and outcome(chain), ranges, queue.in_flight))
    assert outcomes[0] == outcomes[1]


def test_the_usual_ones_are_read_so() -> None:
    """Else the tests above test nothing."""
    memory = plain_memory((BASE, SIZE))
    view = memory.regions[0].view
    queue = split_queue(memory, 1024)
    for table in (
        [(BASE, 16, 1, 1), (BASE + 32, 64, 2, 0)],
        [(BASE, 16, 1, 1), (BASE + 32, 64, 3, 2), (BASE + 100, 1, 2, 7)],
        [(BASE, 16, 1, 1), (BASE + 32, 64, 1, 2), (BASE + 100, 1, 2, 0)],
    ):
        for n, entry in enumerate(table):
            ENTRY.pack_into(view, TABLE + 16 * n, *entry)
        ENTRY.pack_into(view, 0, BASE + TABLE, 16 * len(table), DESC_F_INDIRECT, 0)
        assert isinstance(queue._walk(0), RegionChain)
        for n, (addr, size, flags, _) in enumerate(table):
            ENTRY.pack_into(view, TABLE + 16 * n, addr, size, 9, flags & DESC_F_WRITE)
        packed = packed_queue(memory, 1024)
        assert isinstance(packed._chain(0, [(BASE + TABLE, 16 * len(table), DESC_F_INDIRECT)], 1), RegionChain)
