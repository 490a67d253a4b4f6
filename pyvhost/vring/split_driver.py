"""The driver's side of a split virtqueue. Source: virtio 1.2, section 2.7; methods as ``DriverQueue`` documents them.

The device can write to the used ring, and a hostile one to the descriptors too. So all bookkeeping (free descriptors,
what each request owns) is private; shared memory is written, and only the used ring is read, with ids and lengths
checked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from pyvhost.errors import DeviceError, QueueFull
from pyvhost.vring.api import Fences, Segment
from pyvhost.vring.split import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    NO_SIGNAL,
    SplitLayout,
    valid_size,
)

__all__ = ["SplitDriverQueue"]

_pack_desc = DESC.raw.pack_into
_MASK = 0xFFFF


class SplitDriverQueue:
    """See ``DriverQueue``. ``view`` is the memory of the ring (``memory_size()`` bytes or more, zeroed, writable),
    which the device sees at guest address ``address`` (16-byte aligned). ``indirect`` is the number of entries of
    each indirect table, 0 for none: a request with more than one segment and no more than that many goes into one.
    ``base`` is where the indexes in ``view`` already are. ``in_order``: IN_ORDER was agreed on, so descriptors are used
    in the order of the table, and one used element may stand for all requests up to the one it names, each taken as
    filled.

    :raises ValueError: a size that is no power of two up to 2^15, a view too small, a misaligned address
    """

    def __init__(
        self,
        size: int,
        view: memoryview,
        address: int,
        *,
        fences: Fences,
        event_idx: bool = False,
        indirect: int = 0,
        base: int = 0,
        in_order: bool = False,
    ) -> None:
        if not valid_size(size):
            raise ValueError(f"a split ring cannot have {size} entries")
        if len(view) < self.memory_size(size, indirect) or address & 15:
            raise ValueError("the ring's memory is too small or misaligned")
        layout = SplitLayout(size)
        self.size = size
        self.desc_addr = address
        self.avail_addr = address + layout.avail_offset
        self.used_addr = address + layout.used_offset
        self._full, self._order = fences.full, fences.order
        self._event_idx = event_idx
        self._indirect = indirect
        self._tables_at = _tables_offset(size)
        self._tables_addr = address + self._tables_at
        self._view = view
        used = view[layout.used_offset : layout.used_offset + layout.used_bytes]
        self._avail = view[layout.avail_offset : layout.avail_offset + layout.avail_bytes].cast("H")
        self._used = used.cast("H")
        self._used32 = used[4 : 4 + 8 * size].cast("I")
        self._in_order = in_order
        self._free = deque(range(size - 1, -1, -1))
        self._requests: dict[int, tuple[Any, list[int], int]] = {}  # by head: token, descriptors, writable bytes
        self._added = base  # our index in the available ring
        self._kicked = base  # … when the device was last kicked or found awake
        self._taken = base  # our index in the used ring
        self.broken: DeviceError | None = None

    @staticmethod
    def memory_size(size: int, indirect: int = 0) -> int:
        """Bytes of memory that a ring of ``size`` entries needs, with its indirect tables."""
        return _tables_offset(size) + 16 * indirect * size

    def add(self, readable: Sequence[Segment], writable: Sequence[Segment], token: Any) -> None:
        count = len(readable) + len(writable)
        through_table = 1 < count <= self._indirect
        if not count or count > max(self.size, self._indirect):
            raise ValueError(f"a request of {count} segments")
        if any(length <= 0 for _, length in (*readable, *writable)):
            raise ValueError("a segment of no bytes")
        needed = 1 if through_table else count
        if needed > len(self._free):
            raise QueueFull(f"{needed} descriptors needed, {len(self._free)} free")
        taken = [self._free.pop() for _ in range(needed)]
        head = taken[0]
        if through_table:
            offset = 16 * self._indirect * head
            self._fill(self._tables_at + offset, range(count), readable, writable)
            table = self._tables_addr + offset
            _pack_desc(self._view, 16 * head, table, 16 * count, DESC_F_INDIRECT, 0)
        else:
            self._fill(0, taken, readable, writable)
        self._requests[head] = (token, taken, sum(length for _, length in writable))
        self._avail[2 + (self._added & (self.size - 1))] = head
        if self._order is not None:
            self._order()  # descriptors and entry are there before the index says so
        self._added = self._avail[1] = (self._added + 1) & _MASK

    def _fill(self, at: int, indexes: Sequence[int], readable: Sequence[Segment], writable: Sequence[Segment]) -> None:
        """Write a chain into the descriptors ``indexes`` of the table at byte ``at``."""
        last = len(indexes) - 1
        for n, (addr, length) in enumerate((*readable, *writable)):
            flags = DESC_F_WRITE if n >= len(readable) else 0
            following = 0
            if n < last:
                flags |= DESC_F_NEXT
                following = indexes[n + 1]
            _pack_desc(self._view, at + 16 * indexes[n], addr, length, flags, following)

    def kick_needed(self) -> bool:
        if self._added == self._kicked:
            return False
        self._full()  # our index is visible before looking whether the device sleeps
        if self._event_idx:
            event = self._used[2 + 4 * self.size]
            needed = (self._added - event - 1) & _MASK < (self._added - self._kicked) & _MASK
        else:
            needed = not self._used[0] & NO_SIGNAL
        self._kicked = self._added
        return needed

    def poll(self) -> list[tuple[Any, int]]:
        if self.broken:
            raise self.broken
        done: list[tuple[Any, int]] = []
        new = (self._used[1] - self._taken) & _MASK
        if new > len(self._requests):
            return self._break(done, "the used index is further ahead than there are requests")
        if self._order is not None:
            self._order()  # the ring's elements are not older than the index
        if self._in_order:
            return self._poll_in_order(new)
        for _ in range(new):
            slot = (self._taken & (self.size - 1)) << 1
            head, written = self._used32[slot], self._used32[slot + 1]
            request = self._requests.get(head)
            if request is None:
                return self._break(done, "the device returned an id that is not in flight")
            token, descriptors, room = request
            if written > room:
                return self._break(done, "the device says it wrote more than there is room for")
            del self._requests[head]
            self._free += reversed(descriptors)
            self._taken = (self._taken + 1) & _MASK
            done.append((token, written))
        return done

    def _poll_in_order(self, new: int) -> list[tuple[Any, int]]:
        """Section 2.7.9: an element names the last request of a batch, and the next element is behind the batch."""
        done: list[tuple[Any, int]] = []
        while new:
            slot = (self._taken & (self.size - 1)) << 1
            last, written = self._used32[slot], self._used32[slot + 1]
            if last not in self._requests:
                return self._break(done, "the device returned an id that is not in flight")
            while True:
                head = next(iter(self._requests))  # they are in order, the oldest first
                token, descriptors, room = self._requests[head]
                if not new:
                    return self._break(done, "the device returned a request that the used index does not cover")
                if head == last and written > room:
                    return self._break(done, "the device says it wrote more than there is room for")
                del self._requests[head]
                self._free.extendleft(descriptors)
                self._taken = (self._taken + 1) & _MASK
                new -= 1
                done.append((token, written if head == last else room))
                if head == last:
                    break
        return done

    def _break(self, done: list[tuple[Any, int]], why: str) -> list[tuple[Any, int]]:
        self.broken = DeviceError(why)
        if not done:
            raise self.broken
        return done

    def disable_notifications(self) -> None:
        # With EVENT_IDX the device stays silent until its index passes used_event, so there is nothing to say.
        if not self._event_idx:
            self._avail[0] = NO_SIGNAL

    def enable_notifications(self) -> bool:
        if self._event_idx:
            self._avail[2 + self.size] = self._taken
        else:
            self._avail[0] = 0
        self._full()  # the device sees the wish before its index is looked at again
        return self._used[1] != self._taken

    @property
    def free_slots(self) -> int:
        return len(self._free)

    @property
    def in_flight(self) -> int:
        return len(self._requests)


def _tables_offset(size: int) -> int:
    """Where the indirect tables begin: after the ring, 16-byte aligned."""
    return (SplitLayout(size).total_bytes + 15) & ~15
