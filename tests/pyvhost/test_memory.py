"""Guest memory: translation, snapshots, leases."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.errors import MemoryFault
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.testing import USER_OFFSET, plain_memory


def region(guest: int, size: int, user: int | None = None, closed: list[int] | None = None) -> Region:
    mapping = Mapping(memoryview(bytearray(size)), None if closed is None else lambda: closed.append(guest))
    return Region(guest, size, guest + USER_OFFSET if user is None else user, mapping)


# two adjoining regions, a hole, one more
REGIONS = ((0x1000, 0x1000), (0x2000, 0x1000), (0x8000, 0x800))


@pytest.fixture
def memory() -> GuestMemory:
    memory = plain_memory(*REGIONS)
    for r in memory:
        for n in range(r.size):
            r.view[n] = (r.guest_addr + n) * 7 & 0xFF
    return memory


@given(st.integers(0, 0x9000), st.integers(0, 0x3000))
def test_translate_gives_exactly_the_bytes_or_faults(addr: int, length: int) -> None:
    memory = plain_memory(*REGIONS)
    for r in memory:
        r.view[:] = bytes((r.guest_addr + n) * 7 & 0xFF for n in range(r.size))
    inside = all(any(g <= a < g + s for g, s in REGIONS) for a in range(addr, addr + length))
    if inside:
        data = b"".join(memory.translate(addr, length))
        assert data == bytes((addr + n) * 7 & 0xFF for n in range(length))
    else:
        with pytest.raises(MemoryFault):
            memory.translate(addr, length)


def test_pieces_and_access(memory: GuestMemory) -> None:
    one, two = memory.translate(0x1FF0, 0x20)
    assert (len(one), len(two)) == (0x10, 0x10)
    one[0] = 99
    assert memory.translate(0x1FF0, 1)[0][0] == 99
    assert memory.translate(0x1FF0, 0x20, writable=False)[0].readonly
    assert memory.translate(0xDEAD_0000, 0) == ()


@pytest.mark.parametrize("addr", [(1 << 64) - 8, (1 << 64) - 1, (1 << 63), 0])
def test_nothing_wraps_around(addr: int) -> None:
    memory = GuestMemory([region(0, 0x1000), region((1 << 64) - 0x1000, 0x1000, user=0x5000)])
    with pytest.raises(MemoryFault):
        memory.translate(addr, (1 << 64) - addr + 8)
    assert len(memory.translate((1 << 64) - 8, 8)) == 1
    with pytest.raises(MemoryFault):
        memory.translate(0, -1)


def test_user_addresses_are_in_one_piece(memory: GuestMemory) -> None:
    assert memory.translate_user(0x1000 + USER_OFFSET, 4)[0] == 0x1000 * 7 & 0xFF
    for addr, length in ((0x1FF0 + USER_OFFSET, 0x20), (0x5000 + USER_OFFSET, 4), (0, 4), ((1 << 64) - 1, 4)):
        with pytest.raises(MemoryFault):
            memory.translate_user(addr, length)


@pytest.mark.parametrize(
    "regions",
    [
        [(0x1000, 0x1001, 0x100000), (0x2000, 0x1000, 0x200000)],
        [(0x1000, 0x1000, 0x100000), (0x2000, 0x1000, 0x100FFF)],
        [(0x1000, 0x1000, 0x100000), (0x1000, 0x1000, 0x900000)],
    ],
)
def test_overlaps_are_refused(regions: list[tuple[int, int, int]]) -> None:
    with pytest.raises(MemoryFault, match="overlap"):
        GuestMemory([region(*r) for r in regions])


@pytest.mark.parametrize(("guest", "size", "user"), [(0, 0, 0), ((1 << 64) - 1, 2, 0), (0, 2, (1 << 64) - 1)])
def test_impossible_regions_are_refused(guest: int, size: int, user: int) -> None:
    with pytest.raises(MemoryFault):
        region(guest, size, user)
    with pytest.raises(MemoryFault):
        Region(0, 5, 0, Mapping(memoryview(bytearray(4))))


def test_a_mapping_lives_as_long_as_its_last_user() -> None:
    closed: list[int] = []
    one = GuestMemory([region(0x1000, 16, closed=closed), region(0x2000, 16, closed=closed)])
    lease = one.lease((0x1008, 8))
    assert [len(v) for v in lease.views[0]] == [8]
    two = one.without_region(0x1000, 0x1000 + USER_OFFSET, 16)
    one.close()
    one.close()
    assert closed == []  # 0x1000 is leased, 0x2000 is in the new snapshot
    lease.release()
    assert closed == [0x1000]
    lease.release()
    two.close()
    assert closed == [0x1000, 0x2000]


def test_leases_of_all_and_across_regions() -> None:
    closed: list[int] = []
    memory = GuestMemory([region(0x1000, 16, closed=closed), region(0x1010, 16, closed=closed)])
    with memory.lease(), memory.lease((0x1008, 16), (0x1000, 4)) as both:
        memory.close()
        assert [len(v) for v in both.views] == [2, 1]
        assert closed == []
    assert sorted(closed) == [0x1000, 0x1010]
    memory = GuestMemory([region(0x1000, 16)])
    with pytest.raises(MemoryFault):
        memory.lease((0x1000, 4), (0x2000, 4))


def test_hot_plug_shares_mappings() -> None:
    closed: list[int] = []
    one = GuestMemory([region(0x1000, 16, closed=closed)])
    two = one.with_region(region(0x2000, 16, closed=closed))
    one.close()
    assert len(two) == 2
    assert closed == []
    with pytest.raises(MemoryFault, match="overlap"):
        two.with_region(region(0x2008, 16))
    with pytest.raises(MemoryFault, match="no such"):
        two.without_region(0x2000, 0, 16)
    two.close()
    assert sorted(closed) == [0x1000, 0x2000]
