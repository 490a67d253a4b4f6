"""The inflight region of packed queues: see ``pyvhost.inflight``."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

from pyvhost.errors import RingError
from pyvhost.inflight import (
    DESC_NUM_WORD,
    DESC_STATE_PACKED,
    REGION_PACKED,
    VERSION,
    VERSION_WORD,
    capacity,
    entries_of,
)
from pyvhost.vring.packed import DESC, DESC_F_AVAIL, DESC_F_USED, pack_base

__all__ = ["PackedInflight", "Taken"]

_MASK = 0xFFFF
_COUNTER_MASK = (1 << 64) - 1
# Where the words of a part are, in units of their own size. What is one store here are neighbours in the document's
# layout.
_HEADS = 3  # of 32 bits: free_head, old_free_head
_POSITIONS = 2  # of 64 bits: used_idx, old_used_idx, used_wrap_counter, old_used_wrap_counter, and padding
_FIRST = REGION_PACKED.size // 8  # of 64 bits; then, of each entry's four:
_STATE, _COUNTER, _BUFFER, _ADDRESS = 0, 1, 2, 3  # inflight, next, last, num; counter; id, flags, len; addr
_LONGS = DESC_STATE_PACKED.size // 8
_BOTH = DESC_F_AVAIL | DESC_F_USED


class Taken(NamedTuple):
    """A request in flight on a packed queue: the entries it begins and ends with, its id, and its descriptors as they
    were in the ring."""

    first: int
    last: int
    head: int
    descriptors: bytes


class PackedInflight:
    """The recorder of one packed queue. ``view`` is its part of the region: ``region_size(…, packed=True)`` bytes, or
    more.

    The queue calls, in this order: ``recover()`` or ``resume()`` once; ``taken()`` for each request popped;
    ``returning()``, then writes the descriptor's flags, then ``returned()`` for each one pushed. ``content()`` when
    it is stopped is what ``resume()`` wants.

    A position in the ring is meant with its wrap counter, in one store: the document compares and stores positions
    alone, which a request that fills the ring does not move.
    """

    __slots__ = ("_counter", "_slots", "_used", "free", "ints", "links", "longs", "view", "words")

    def __init__(self, view: memoryview) -> None:
        self.view = view
        #: the part's memory as 16-bit, 32-bit and 64-bit words
        self.words = view.cast("H")
        self.ints = view.cast("I")
        self.longs = view.cast("Q")
        #: the private copy of what decides where to write: each entry's ``next``, and the first free entry
        self.links = array("H")
        self.free = 0
        self._used = 0  # position and wrap counter as in a base's upper half
        self._counter = 0
        self._slots: dict[int, tuple[int, int, int]] = {}  # by id: first entry, last entry, number

    def _fresh(self, ring_size: int, base: int) -> None:
        """Make a part ready that was never used."""
        self.links = array("H", range(1, ring_size + 1))
        self.free = 0
        for n, following in enumerate(self.links):
            self.longs[_FIRST + _LONGS * n] = following << 16
        self.ints[_HEADS] = 0
        self._used = base >> 16
        self.longs[_POSITIONS] = _positions(self._used, self._used)
        self.words[DESC_NUM_WORD] = ring_size
        self.words[VERSION_WORD] = VERSION  # last: up to here, the part was never used

    def recover(self, ring_size: int, base: int, ring: memoryview) -> tuple[int, list[Taken]] | None:
        """What the last backend had taken and not returned, in the order of taking, and the base of the ring behind
        all that; None: there was no backend before that recorded here. ``base`` is where the frontend thinks the ring
        is, ``ring`` its descriptors.

        :raises RingError: what is written here makes no sense
        """
        if not entries_of(self.words, capacity(len(self.view), packed=True), ring_size):
            self._fresh(ring_size, base)
            return None
        heads, positions = self.ints[_HEADS], self.longs[_POSITIONS]
        free, old_free = heads & _MASK, heads >> 16
        used, old = _unpack_positions(positions)
        if max(used & 0x7FFF, old & 0x7FFF) >= ring_size or positions >> 32 & 0xFEFE:
            raise RingError("an inflight region that refers to a position outside of the ring")
        if used != old:  # killed while it returned something: the driver may have seen it
            flags = ring[16 * (old & 0x7FFF) :][:16].cast("H")[7]
            if flags & _BOTH != (DESC_F_AVAIL if old >> 15 else DESC_F_USED):
                old_free, old = free, used
        counters, state = self._load(self.view.tobytes(), ring_size, old_free)
        # The end of what was under way: as often as it is killed again, it comes to the same.
        self.ints[_HEADS] = free | old_free << 16
        self.longs[_POSITIONS] = _positions(used, old)
        self.ints[_HEADS] = old_free | old_free << 16
        self.longs[_POSITIONS] = _positions(old, old)
        begun = {request.first for request in state}
        for n, following in enumerate(self.links):
            if n not in begun and self.view[_FIRST * 8 + _LONGS * 8 * n]:
                self.longs[_FIRST + _LONGS * n] = following << 16
        self._used = old
        self._counter = (max(counters) + 1) & _COUNTER_MASK if counters else 0
        position = (old & 0x7FFF) + sum(len(request.descriptors) >> 4 for request in state)
        wrap = old >> 15
        if position >= ring_size:
            position -= ring_size
            wrap ^= 1
        return pack_base(position, wrap, old & 0x7FFF, old >> 15), state

    def _load(self, content: bytes, ring_size: int, free: int) -> tuple[list[int], list[Taken]]:
        """Read a part, from a private copy: its entries are each in one request, or on the list of free ones that
        begins with ``free``. Counters of the requests, and these in the order of the counters.

        :raises RingError: they are not
        """
        count = int.from_bytes(content[2 * DESC_NUM_WORD :][:2], "little")
        entries = [DESC_STATE_PACKED.unpack(content, _FIRST * 8 + _LONGS * 8 * n) for n in range(count)]
        seen = bytearray(count)
        index = free
        while index != count:
            if index > count or seen[index]:
                raise RingError("an inflight region whose list of free entries makes no sense")
            seen[index] = 1
            index = entries[index].next
        found: list[tuple[int, Taken]] = []
        total = 0
        for first, entry in enumerate(entries):
            if not entry.inflight or seen[first]:
                continue
            total += entry.num
            if not entry.num or total > ring_size:
                raise RingError("an inflight region with more descriptors than the ring is long")
            descriptors = []
            index = last = first
            for _ in range(entry.num):
                if index >= count or seen[index]:
                    raise RingError("an inflight region with a request that makes no sense")
                seen[index] = 1
                last, part = index, entries[index]
                descriptors.append(DESC.pack(part.addr, part.len, part.id, part.flags))
                index = part.next
            if last != entry.last:
                raise RingError("an inflight region with a request that does not end where it should")
            found.append((entry.counter, Taken(first, last, entries[last].id, b"".join(descriptors))))
        if not all(seen) or len({request.head for _, request in found}) != len(found):
            raise RingError("an inflight region with entries that belong to nothing, or an id twice")
        found.sort()
        self.links = array("H", (entry.next for entry in entries))
        self.free = free
        self._slots = {r.head: (r.first, r.last, len(r.descriptors) >> 4) for _, r in found}
        return [counter for counter, _ in found], [request for _, request in found]

    def content(self) -> bytes:
        """The part as it is, between two calls of the queue."""
        return self.view.tobytes()

    def resume(self, ring_size: int, content: bytes) -> list[Taken]:
        """After a pause: make the part say what it said then, maybe in another region.

        :raises RingError: the frontend has changed what it said, or there is no room for it
        """
        heads, positions = memoryview(content).cast("I")[_HEADS], memoryview(content).cast("Q")[_POSITIONS]
        count = entries_of(memoryview(content).cast("H"), capacity(len(content), packed=True), ring_size)
        if not count or count > capacity(len(self.view), packed=True):
            raise RingError("an inflight region that does not go with the ring")
        counters, requests = self._load(content, ring_size, heads & _MASK)
        self._used = _unpack_positions(positions)[0]
        self._counter = (max(counters) + 1) & _COUNTER_MASK if counters else 0
        used = _FIRST * 8 + _LONGS * 8 * count
        if self.view[:used] != content[:used]:
            self.words[VERSION_WORD] = 0
            self.view[2 * DESC_NUM_WORD : used] = content[2 * DESC_NUM_WORD : used]
            self.words[VERSION_WORD] = VERSION
        return requests

    def clear(self) -> None:
        """Nothing is in flight: the driver was reset. The part is as if never used."""
        self.words[VERSION_WORD] = 0

    def taken(self, head: int, descriptors: Sequence[tuple[int, int, int]]) -> None:
        """``head`` was popped, which consists of these descriptors of the ring: address, length, flags.
        Its id, which only the last one has to have, is written with each."""
        longs, links = self.longs, self.links
        first = index = last = self.free
        for addr, length, flags in descriptors:
            at = _FIRST + _LONGS * index
            longs[at + _BUFFER] = head | flags << 16 | length << 32
            longs[at + _ADDRESS] = addr
            last = index
            index = links[index]
        count = len(descriptors)
        at = _FIRST + _LONGS * first
        longs[at + _COUNTER] = self._counter
        self._counter = (self._counter + 1) & _COUNTER_MASK
        longs[at] = 1 | links[first] << 16 | last << 32 | count << 48
        self.free = index
        self.ints[_HEADS] = index | index << 16  # up to here, it was not taken
        self._slots[head] = (first, last, count)

    def returning(self, head: int, used: int) -> None:
        """``head`` is in the ring but for its flags; ``used`` is the position of the device behind it, with its wrap
        counter as in the upper half of a base."""
        longs, links = self.longs, self.links
        first, last, count = self._slots[head]
        free, links[last] = self.free, self.free
        if first == last:
            longs[_FIRST + _LONGS * first] = 1 | free << 16 | last << 32 | count << 48
        else:
            longs[_FIRST + _LONGS * last] = free << 16
        self.ints[_HEADS] = first | free << 16
        longs[_POSITIONS] = _positions(used, self._used)
        self.free = first
        self._used = used

    def returned(self, head: int) -> None:
        """The flags are written: the driver can see it."""
        first, _, _ = self._slots.pop(head)
        self.longs[_FIRST + _LONGS * first] = self.links[first] << 16
        self.ints[_HEADS] = first | first << 16
        self.longs[_POSITIONS] = _positions(self._used, self._used)


def _positions(used: int, old: int) -> int:
    """Two positions with their wrap counters, as the packed part has them in one word."""
    return used & 0x7FFF | (old & 0x7FFF) << 16 | used >> 15 << 32 | old >> 15 << 40


def _unpack_positions(word: int) -> tuple[int, int]:
    return word & 0x7FFF | (word >> 32 & 1) << 15, word >> 16 & 0x7FFF | (word >> 40 & 1) << 15
