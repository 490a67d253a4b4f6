"""The inflight region: what a backend had taken and not returned, kept by the frontend while backends come and go.
Source: QEMU, docs/interop/vhost-user.rst, section "Inflight I/O tracking".

The region is one piece of shared memory with a part for each queue. A backend writes down each request that it takes
and each that it returns, in an order that leaves the part true wherever the backend is killed: a request is lost by
no crash, and none that the driver has seen completed is done again. (A killed process has done all stores up to some
instruction and none after it, so the order of the program is enough, without barriers.)

Everything in the region is checked: it comes from the frontend. The recorder of packed queues is in
``pyvhost.vring.packed_inflight``.
"""

from __future__ import annotations

from collections.abc import Iterable

from construct import Array, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Codec, Ignored
from pyvhost.errors import RingError

__all__ = [
    "ALIGN",
    "DESC_NUM_WORD",
    "DESC_STATE_PACKED",
    "DESC_STATE_SPLIT",
    "REGION_PACKED",
    "REGION_SPLIT",
    "VERSION",
    "VERSION_WORD",
    "SplitInflight",
    "capacity",
    "entries_of",
    "region_size",
]

VERSION = 1  #: of both layouts; 0: a part that was never used

#: head of a split queue's part; ``desc_num`` entries of DESC_STATE_SPLIT follow
REGION_SPLIT = Codec(
    "inflight_split",
    Struct(
        "features" / Int64ul,
        "version" / Int16ul,
        "desc_num" / Int16ul,
        "last_batch_head" / Int16ul,
        "used_idx" / Int16ul,
    ),
)

DESC_STATE_SPLIT = Codec(
    "desc_state_split",
    Struct("inflight" / Int8ul, Ignored(5), "next" / Int16ul, "counter" / Int64ul),
)

#: head of a packed queue's part; ``desc_num`` entries of DESC_STATE_PACKED follow
REGION_PACKED = Codec(
    "inflight_packed",
    Struct(
        "features" / Int64ul,
        "version" / Int16ul,
        "desc_num" / Int16ul,
        "free_head" / Int16ul,
        "old_free_head" / Int16ul,
        "used_idx" / Int16ul,
        "old_used_idx" / Int16ul,
        "used_wrap_counter" / Int8ul,
        "old_used_wrap_counter" / Int8ul,
        "padding" / Array(7, Int8ul),
        Ignored(3),  # C's, before entries that hold 64-bit words
    ),
)

DESC_STATE_PACKED = Codec(
    "desc_state_packed",
    Struct(
        "inflight" / Int8ul,
        Ignored(1),
        "next" / Int16ul,
        "last" / Int16ul,
        "num" / Int16ul,
        "counter" / Int64ul,
        "id" / Int16ul,
        "flags" / Int16ul,
        "len" / Int32ul,
        "addr" / Int64ul,
    ),
)

ALIGN = 64  #: of each queue's part, in bytes, as every backend has it
_MASK = 0xFFFF
COUNTER_MASK = (1 << 64) - 1
_MAX_ENTRIES = 1 << 15  # of a ring


def region_size(queue_size: int, *, packed: bool = False) -> int:
    """Bytes of one queue's part for a ring of ``queue_size`` entries."""
    head, entry = _sizes(packed)
    return -(-(head + queue_size * entry) // ALIGN) * ALIGN


def capacity(size: int, *, packed: bool = False) -> int:
    """Entries of the largest ring that a part of ``size`` bytes has room for."""
    head, entry = _sizes(packed)
    return max(0, min((size - head) // entry, _MAX_ENTRIES))


def _sizes(packed: bool) -> tuple[int, int]:
    head, entry = (REGION_PACKED, DESC_STATE_PACKED) if packed else (REGION_SPLIT, DESC_STATE_SPLIT)
    return head.size, entry.size


# Where 16-bit words of both layouts are.
VERSION_WORD, DESC_NUM_WORD = 4, 5


def entries_of(words: memoryview, room: int, ring_size: int) -> int:
    """The entries of a part that has been in use before; 0: it has not.

    :raises RingError: another version, or too small for the ring
    """
    if ring_size > room:
        raise RingError(f"an inflight region for {room} entries, a ring of {ring_size}")
    version, count = words[VERSION_WORD], words[DESC_NUM_WORD]
    if version and (version != VERSION or not ring_size <= count <= room):
        raise RingError("an inflight region of another version or size")
    return count if version else 0


# Those of a split part, in units of their own size.
LAST_HEAD, USED_IDX = 6, 7
_FIRST_FLAG = REGION_SPLIT.size
_FIRST_NEXT = (REGION_SPLIT.size + 6) // 2
_FIRST_COUNTER = (REGION_SPLIT.size + 8) // 8


class SplitInflight:
    """The recorder of one split queue. ``view`` is its part of the region: ``region_size()`` bytes, or more.

    The queue calls, in this order: ``recover()`` or ``resume()`` once; ``taken()`` for each request popped;
    ``returning()``, then advances the used index, then ``returned()`` for each one pushed.
    """

    __slots__ = ("_counter", "counters", "flags", "longs", "marks", "nexts", "words")

    def __init__(self, view: memoryview) -> None:
        #: the part's memory as bytes, 16-bit and 64-bit words
        self.flags = view
        self.words = view.cast("H")
        self.longs = view.cast("Q")
        #: of the entries, by head: inflight, counter, next
        self.marks = self.flags[_FIRST_FLAG::16]
        self.counters = self.longs[_FIRST_COUNTER::2]
        self.nexts = self.words[_FIRST_NEXT::8]
        self._counter = 0

    def _check(self, ring_size: int, used_idx: int) -> bool:
        """Whether the part has been in use before; else it is made ready now.

        :raises RingError: another layout, or too small for the ring
        """
        words = self.words
        if entries_of(words, capacity(len(self.flags)), ring_size):
            return True
        words[DESC_NUM_WORD] = ring_size
        words[USED_IDX] = used_idx
        words[VERSION_WORD] = VERSION  # last: up to here, the part was never used
        return False

    def recover(self, ring_size: int, used_idx: int) -> list[int] | None:
        """The heads that the last backend had taken and not returned, in the order of taking; None: there was no
        backend before that recorded here. ``used_idx`` is the index in the used ring.

        :raises RingError: what is written here makes no sense
        """
        if not self._check(ring_size, used_idx):
            return None
        words, flags, longs = self.words, self.flags, self.longs
        # The driver may have seen the last ones completed though they are still marked: the backend died in between.
        unmarked = (used_idx - words[USED_IDX]) & _MASK
        if not any(flags[_FIRST_FLAG::16]):
            unmarked = 0
        if unmarked > ring_size:
            raise RingError("the used index is further ahead of the inflight region than the ring is long")
        head = words[LAST_HEAD]
        for _ in range(unmarked):
            if head >= ring_size:
                raise RingError("an inflight region that refers to a head outside of the ring")
            flags[_FIRST_FLAG + 16 * head] = 0
            head = words[_FIRST_NEXT + 8 * head]
        words[USED_IDX] = used_idx
        found = [(longs[_FIRST_COUNTER + 2 * n], n) for n in range(ring_size) if flags[_FIRST_FLAG + 16 * n]]
        found.sort()
        self._counter = (found[-1][0] + 1) & COUNTER_MASK if found else 0
        return [head for _, head in found]

    def resume(self, ring_size: int, used_idx: int, heads: Iterable[int]) -> None:
        """After a pause: make the part say that ``heads`` are in flight, and nothing else.

        :raises RingError: as ``recover()``
        """
        before = self.recover(ring_size, used_idx) or []
        heads = set(heads)
        for head in before:
            if head not in heads:
                self.flags[_FIRST_FLAG + 16 * head] = 0
        for head in sorted(heads.difference(before)):
            self.taken(head)

    def clear(self) -> None:
        """Nothing is in flight: the driver was reset. The part is as if never used."""
        self.words[VERSION_WORD] = 0
        self.flags[:] = bytes(len(self.flags))

    def taken(self, head: int) -> None:
        """``head`` was popped."""
        counter = self._counter
        self.counters[head] = counter
        self._counter = (counter + 1) & COUNTER_MASK
        self.marks[head] = 1

    def returning(self, head: int) -> None:
        """``head`` is in the used ring, the used index does not say so yet."""
        words = self.words
        self.nexts[head] = words[LAST_HEAD]
        words[LAST_HEAD] = head

    def returned(self, head: int, used_idx: int) -> None:
        """The used index is ``used_idx`` now."""
        self.marks[head] = 0
        self.words[USED_IDX] = used_idx
