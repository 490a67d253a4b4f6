"""The page allocator and the pool of buffers."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guest_driver.arena import PAGE, Arena
from guest_driver.buffers import SLOT, Buffers, segments
from tee.memory import Memory, Range

PIECES = (Range(0x10_0000, 3 * PAGE), Range(0x50_0000, 2 * PAGE), Range(0x20_0000, 11 * PAGE))
TOTAL = sum(piece.length for piece in PIECES)


def arena(pieces: Sequence[Range] = PIECES) -> tuple[Arena, bytearray]:
    data = bytearray(sum(piece.length for piece in pieces))
    return Arena(memoryview(data), pieces), data


@given(st.lists(st.one_of(st.integers(0, 5 * PAGE), st.integers(-20, -1)), max_size=60))
def test_allocations(steps: list[int]) -> None:
    """Positive: allocate that many bytes; negative: release one."""
    pages, data = arena()
    given: list[tuple[Memory, bytes]] = []
    for number, step in enumerate(steps):
        if step >= 0:
            try:
                memory = pages.allocate(step)
            except MemoryError:
                continue
            assert memory.size == sum(piece.length for piece in memory.ranges) == step
            assert memory.read(0, step) == bytes(step)
            mark = bytes([number % 255 + 1]) * step
            memory.write(0, mark)
            given.append((memory, mark))
            for piece in memory.ranges:
                home = next(p for p in PIECES if p.address <= piece.address < p.address + p.length)
                assert piece.address + piece.length <= home.address + home.length
        elif given:
            memory, mark = given.pop(step % len(given))
            assert memory.read(0, len(mark)) == mark
            pages.release(memory)
            pages.release(memory)
    addresses = [(r.address, r.address + r.length) for memory, _ in given for r in memory.ranges]
    assert all(a[1] <= b[0] for a, b in zip(sorted(addresses), sorted(addresses)[1:], strict=False))
    for memory, mark in given:
        assert memory.read(0, len(mark)) == mark
        pages.release(memory)
    assert pages.in_use == 0
    whole = pages.allocate(TOTAL)  # all of it is in one piece again
    assert whole.ranges == PIECES
    assert not any(data)


def test_bad_ranges() -> None:
    with pytest.raises(ValueError, match="ranges"):
        Arena(memoryview(bytearray(PAGE)), [Range(0, 2 * PAGE)])
    with pytest.raises(ValueError, match="ranges"):
        Arena(memoryview(bytearray(PAGE + 1)), [Range(0, PAGE + 1)])
    with pytest.raises(MemoryError):
        arena()[0].allocate(TOTAL + 1)


@given(st.integers(0, 600), st.integers(0, 600))
def test_segments(offset: int, size: int) -> None:
    memory = Memory((memoryview(bytearray(500)),), ranges=[Range(1000, 100), Range(5000, 150), Range(2000, 250)])
    if offset + size > 500:
        if size:
            with pytest.raises(ValueError, match="outside"):
                segments(memory, offset, size)
        return
    places = [a for r in memory.ranges for a in range(r.address, r.address + r.length)][offset : offset + size]
    assert [a for start, length in segments(memory, offset, size) for a in range(start, start + length)] == places


class Pages:
    """As much of a transport as buffers need."""

    def __init__(self) -> None:
        self.arena = Arena(memoryview(bytearray(64 * PAGE)), [Range(0x1000, 64 * PAGE)])
        self.allocate, self.release = self.arena.allocate, self.arena.release


def test_buffers() -> None:
    pages = Pages()
    pool = Buffers(pages)  # type: ignore[arg-type]
    small = [pool.take(size) for size in (1, SLOT, 100)]
    assert len({(id(b.memory), b.offset) for b in small}) == 3
    large = pool.take(SLOT + 1)
    before = pages.arena.in_use
    large.write(b"abc")
    assert (large.read(1, 2), large.segments(0, 3)[0][1]) == (b"bc", 3)
    pool.give(large)
    assert pages.arena.in_use < before
    for buffer in small:
        pool.give(buffer)
    again = [pool.take(10) for _ in range(32)]
    assert len({(id(b.memory), b.offset) for b in again}) == 32
    with pytest.raises(MemoryError):
        pool.take(64 * PAGE)
