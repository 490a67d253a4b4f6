"""A page allocator over memory that the device can reach."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Sequence

from tee.memory import Memory, Range

PAGE = 4096


class Arena:
    """Gives out whole pages of one mapping, first fit, zeroed.

    ``ranges`` say where the bytes of ``view`` lie for the device, in order. Not thread-safe.
    """

    def __init__(self, view: memoryview, ranges: Sequence[Range]) -> None:
        if sum(r.length for r in ranges) != len(view) or len(view) % PAGE:
            raise ValueError("the ranges do not describe the mapping, or it is not whole pages")
        self._view = view
        self._ranges = tuple(ranges)
        self._starts: list[int] = []
        at = 0
        for piece in self._ranges:
            self._starts.append(at)
            at += piece.length
        self._free: list[tuple[int, int]] = [(0, len(view))]
        """(offset, length), ordered, never touching."""
        self._given: dict[Memory, tuple[int, int]] = {}

    @property
    def in_use(self) -> int:
        """Bytes that are given out."""
        return sum(length for _, length in self._given.values())

    def allocate(self, size: int) -> Memory:
        """``size`` bytes (at least 1) at a page's start. Raises MemoryError."""
        length = (max(size, 1) + PAGE - 1) // PAGE * PAGE
        for index, (offset, free) in enumerate(self._free):
            if free >= length:
                if free == length:
                    del self._free[index]
                else:
                    self._free[index] = (offset + length, free - length)
                break
        else:
            raise MemoryError(f"no {length} bytes in one piece in the memory that is shared with the device")
        self._view[offset : offset + length] = bytes(length)
        memory = Memory((self._view[offset : offset + size],), ranges=self._locate(offset, size))
        self._given[memory] = (offset, length)
        return memory

    def release(self, memory: Memory) -> None:
        """Take back what :meth:`allocate` gave; a second time is ignored."""
        given = self._given.pop(memory, None)
        if given is None:
            return
        memory.forget()
        insort(self._free, given)
        index = bisect_right(self._free, given) - 1
        for left in (index, index - 1):
            if 0 <= left < len(self._free) - 1:
                (start, length), (after, more) = self._free[left], self._free[left + 1]
                if start + length == after:
                    self._free[left : left + 2] = [(start, length + more)]

    def _locate(self, offset: int, size: int) -> list[Range]:
        found: list[Range] = []
        index = bisect_right(self._starts, offset) - 1
        while size > 0:
            piece, within = self._ranges[index], offset - self._starts[index]
            length = min(size, piece.length - within)
            found.append(Range(piece.address + within, length))
            offset += length
            size -= length
            index += 1
        return found
