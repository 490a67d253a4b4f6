"""The driver's side of a packed virtqueue. Source: virtio 1.2, section 2.8; methods as ``DriverQueue`` documents them.

The device overwrites descriptors, and a hostile one does so at will. So all bookkeeping is private; of shared memory,
used descriptors and the device's event suppression structure are read, with ids and lengths checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pyvhost.errors import DeviceError, QueueFull
from pyvhost.vring.api import Fences, Segment
from pyvhost.vring.packed import (
    DESC,
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    INITIAL_BASE,
    WRAP,
    PackedLayout,
    unpack_base,
    valid_size,
)

__all__ = ["PackedDriverQueue"]

_pack_desc = DESC.raw.pack_into
_BOTH = DESC_F_AVAIL | DESC_F_USED


class PackedDriverQueue:
    """See ``DriverQueue``; the arguments are those of ``SplitDriverQueue``. ``avail_addr`` and ``used_addr`` are the
    addresses of the event suppression structures of the driver and of the device. ``base`` is where the device is,
    as ``pack_base()`` makes it, with nothing in flight.

    :raises ValueError: a size that is not 1 to 2^15, a view too small, a misaligned address, a base that cannot be
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
        base: int = INITIAL_BASE,
    ) -> None:
        if not valid_size(size):
            raise ValueError(f"a packed ring cannot have {size} entries")
        if len(view) < self.memory_size(size, indirect) or address & 15:
            raise ValueError("the ring's memory is too small or misaligned")
        layout = PackedLayout(size)
        self._next, self._wrap, self._used_next, self._used_wrap = unpack_base(base)
        if self._next >= size or base & 0xFFFF != base >> 16:
            raise ValueError(f"a base of {base:#x}")
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
        self._words = view[: layout.desc_bytes].cast("H")
        self._avail = view[layout.avail_offset : layout.avail_offset + layout.avail_bytes].cast("H")
        self._used = view[layout.used_offset : layout.used_offset + layout.used_bytes].cast("H")
        self._ids = list(range(size - 1, -1, -1))
        self._requests: dict[int, tuple[Any, int, int]] = {}  # by id: token, descriptors, writable bytes
        self._free = size
        self._unkicked = 0  # descriptors added since the device's wish was looked at
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
        segments = (*readable, *writable)
        if any(length <= 0 for _, length in segments):
            raise ValueError("a segment of no bytes")
        needed = 1 if through_table else count
        if needed > self._free:
            raise QueueFull(f"{needed} descriptors needed, {self._free} free")
        head = self._ids.pop()
        kinds = [0] * len(readable) + [DESC_F_WRITE] * len(writable)
        if through_table:
            offset = 16 * self._indirect * head
            for n, (addr, length) in enumerate(segments):
                _pack_desc(self._view, self._tables_at + offset + 16 * n, addr, length, 0, kinds[n])
            segments, kinds = ((self._tables_addr + offset, 16 * count),), [DESC_F_INDIRECT]
        self._requests[head] = (token, needed, sum(length for _, length in writable))
        first, first_flags = self._next, 0
        for n, (addr, length) in enumerate(segments):
            at = self._next
            flags = kinds[n] | (DESC_F_AVAIL if self._wrap else DESC_F_USED)
            if n < needed - 1:
                flags |= DESC_F_NEXT
            if n == 0:  # its flags come last: they make the whole chain available
                first_flags = flags
                flags = self._words[8 * at + 7]
            _put(self._words, at, addr, length, head, flags)
            self._next += 1
            if self._next == self.size:
                self._next = 0
                self._wrap ^= 1
        self._free -= needed
        self._unkicked += needed
        if self._order is not None:
            self._order()  # the chain is there before the first flags say so
        self._words[8 * first + 7] = first_flags

    def kick_needed(self) -> bool:
        added = self._unkicked
        if not added:
            return False
        self._full()  # the flags are visible before looking whether the device sleeps
        self._unkicked = 0
        wish = self._used[1] & 3
        if wish == EVENT_DESC and self._event_idx and added < self.size:
            if self._order is not None:
                self._order()
            event = self._used[0]
            position = event & (WRAP - 1)
            if event >> 15 != self._wrap:
                position -= self.size
            return self._next - added <= position < self._next
        return wish != EVENT_DISABLE

    def poll(self) -> list[tuple[Any, int]]:
        if self.broken:
            raise self.broken
        done: list[tuple[Any, int]] = []
        words = self._words
        while self._is_used():
            if self._order is not None:
                self._order()  # the element is not older than its flags
            word = self._used_next << 3
            written = words[word + 4] | words[word + 5] << 16
            head = words[word + 6]
            request = self._requests.get(head)
            if request is None:
                return self._break(done, "the device returned an id that is not in flight")
            token, count, room = request
            if written > room:
                return self._break(done, "the device says it wrote more than there is room for")
            del self._requests[head]
            self._ids.append(head)
            self._free += count
            self._used_next += count
            if self._used_next >= self.size:
                self._used_next -= self.size
                self._used_wrap ^= 1
            done.append((token, written))
        return done

    def _is_used(self) -> bool:
        """Whether the next descriptor to come back has done so."""
        if not self._requests:
            return False
        return self._words[8 * self._used_next + 7] & _BOTH == (_BOTH if self._used_wrap else 0)

    def _break(self, done: list[tuple[Any, int]], why: str) -> list[tuple[Any, int]]:
        self.broken = DeviceError(why)
        if not done:
            raise self.broken
        return done

    def disable_notifications(self) -> None:
        self._avail[1] = EVENT_DISABLE

    def enable_notifications(self) -> bool:
        if self._event_idx:
            self._avail[0] = self._used_next | self._used_wrap << 15
            if self._order is not None:
                self._order()  # the position is there before the flags refer to it
            self._avail[1] = EVENT_DESC
        else:
            self._avail[1] = EVENT_ENABLE
        self._full()  # the device sees the wish before the ring is looked at again
        return self._is_used()

    @property
    def free_slots(self) -> int:
        return self._free

    @property
    def in_flight(self) -> int:
        return len(self._requests)


def _put(words: memoryview, at: int, addr: int, length: int, head: int, flags: int) -> None:
    """Write descriptor ``at``, word by word: the device polls its flags, so none may be seen half written."""
    word = at << 3
    words[word] = addr & 0xFFFF
    words[word + 1] = addr >> 16 & 0xFFFF
    words[word + 2] = addr >> 32 & 0xFFFF
    words[word + 3] = addr >> 48
    words[word + 4] = length & 0xFFFF
    words[word + 5] = length >> 16
    words[word + 6] = head
    words[word + 7] = flags


def _tables_offset(size: int) -> int:
    """Where the indirect tables begin: after the ring, 16-byte aligned."""
    return (PackedLayout(size).total_bytes + 15) & ~15
