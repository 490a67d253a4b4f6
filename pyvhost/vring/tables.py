"""Indirect tables of two and three entries, which most requests are: request and answer; header, data and status.

Written out they take half the time of a loop over entries. Whatever is not as usual is left to the loop of the ring's
format, which begins again and reads for itself: what is wrong is found there alone.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from pyvhost.vring.api import RegionChain

__all__ = ["ShortTable", "short_table"]

#: head, the region's view, the table's place in it and its length, the region's guest address and size; all in bytes
ShortTable = Callable[[int, memoryview, int, int, int, int], RegionChain | None]

# Of each entry: address, length, and the two 16-bit words as one.
_unpack_two, _unpack_three = Struct("<QIIQII").unpack_from, Struct("<QIIQIIQII").unpack_from
_MAX_TOTAL = 1 << 32  # virtio 1.2, sections 2.7.5 and 2.8.5: no chain is longer, in bytes


def short_table(mask: int, first: int, read: int, write: int, last_mask: int, last: int) -> ShortTable:
    """The reader for one ring format. ``first``, ``read`` and ``write``, under ``mask``, are the words of a readable
    first entry and of a readable or writable second one of three; ``last``, under ``last_mask``, those of a writable
    last one.

    What it returns translates a table that lies in the region, reading each entry once; None: look closer.
    """

    def reader(head: int, view: memoryview, at: int, length: int, base: int, span: int) -> RegionChain | None:
        if length == 48:
            addr0, length0, words0, addr1, length1, words1, addr2, length2, words2 = _unpack_three(view, at)
            start0 = addr0 - base
            start1 = addr1 - base
            start2 = addr2 - base
            end0 = start0 + length0
            end1 = start1 + length1
            end2 = start2 + length2
            if (
                words0 & mask == first
                and words2 & last_mask == last
                and 0 <= start0 < end0 <= span
                and 0 <= start1 < end1 <= span
                and 0 <= start2 < end2 <= span
                and length0 + length1 + length2 <= _MAX_TOTAL
            ):
                words1 &= mask
                spans = (start0, end0, start1, end1, start2, end2)
                if words1 == write:
                    return RegionChain(head, view, spans, 1, length0, length1 + length2)
                if words1 == read:
                    return RegionChain(head, view, spans, 2, length0 + length1, length2)
        elif length == 32:
            addr0, length0, words0, addr1, length1, words1 = _unpack_two(view, at)
            start0 = addr0 - base
            start1 = addr1 - base
            end0 = start0 + length0
            end1 = start1 + length1
            if (
                words0 & mask == first
                and words1 & last_mask == last
                and 0 <= start0 < end0 <= span
                and 0 <= start1 < end1 <= span
                and length0 + length1 <= _MAX_TOTAL
            ):
                return RegionChain(head, view, (start0, end0, start1, end1), 1, length0, length1)
        return None

    return reader
