"""Indirect tables of two and three entries, which most requests are: request and answer; header, data and status.

Written out they take half the time of a loop over entries. Whatever is not as usual is left to the loop of the ring's
format, which begins again and reads for itself: what is wrong is found there alone.
"""

from __future__ import annotations

from collections.abc import Callable
from struct import Struct

from pyvhost.vring.api import RegionChain

__all__ = ["ShortTable", "short_table"]

#: head, the region's view, the table's place in it and its length, the region's guest address and its end; all in bytes
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

    new = object.__new__

    def reader(head: int, view: memoryview, at: int, length: int, base: int, top: int) -> RegionChain | None:
        if length == 48:
            entries = _unpack_three(view, at)
            addr0, length0, words0, addr1, length1, words1, addr2, length2, words2 = entries
            room = length1 + length2
            if (
                words0 & mask == first
                and words2 & last_mask == last
                and base <= addr0
                and base <= addr1
                and base <= addr2
                and length0
                and length1
                and length2
                and addr0 + length0 <= top
                and addr1 + length1 <= top
                and addr2 + length2 <= top
                and length0 + room <= _MAX_TOTAL
            ):
                words1 &= mask
                if words1 == write:
                    readables, before = 1, length1
                elif words1 == read:
                    readables, before = 2, 0
                    length0 += length1
                    room = length2
                else:
                    return None
                origin = addr2 - base - before
            else:
                return None
        elif length == 32:
            entries = _unpack_two(view, at)
            addr0, length0, words0, addr1, room, words1 = entries
            if (
                words0 & mask == first
                and words1 & last_mask == last
                and base <= addr0
                and base <= addr1
                and length0
                and room
                and addr0 + length0 <= top
                and addr1 + room <= top
                and length0 + room <= _MAX_TOTAL
            ):
                readables, before = 1, 0
                origin = addr1 - base
            else:
                return None
        else:
            return None
        chain = new(RegionChain)
        chain.head = head
        chain.readable_bytes = length0
        chain.writable_bytes = room
        chain._view = view
        chain._base = base
        chain._entries = entries
        chain._readables = readables
        chain._before_last = before
        chain._origin = origin
        return chain

    return reader
