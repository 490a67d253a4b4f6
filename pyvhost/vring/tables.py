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

#: bytes in one request; virtio 1.2 (sections 2.7.5 and 2.8.5) allows four times as many, and CPython is fast up to here
_MOST = (1 << 30) - 1


def short_table(entry: str, last_entry: str, first: int, read: int, write: int, last: int) -> ShortTable:
    """The reader for one ring format. ``entry`` and ``last_entry`` say to ``struct`` what an entry is: 16 bytes with
    address, length and one word that is looked at. That word is ``first`` in a readable first entry, ``read`` or
    ``write`` in a second one of three, and ``last`` in a writable last one.

    What it returns translates a table that lies in the region, reading each entry once; None: look closer.
    """
    unpack_two = Struct(f"<{entry}{last_entry}").unpack_from
    unpack_three = Struct(f"<{entry}{entry}{last_entry}").unpack_from
    new = object.__new__

    def reader(head: int, view: memoryview, at: int, length: int, base: int, top: int) -> RegionChain | None:
        if length == 48:
            entries = unpack_three(view, at)
            addr0, length0, word0, addr1, length1, word1, addr2, length2, word2 = entries
            room = length1 + length2
            if (
                word0 == first
                and word2 == last
                and base <= addr0
                and base <= addr1
                and base <= addr2
                and length0
                and length1
                and length2
                and addr0 + length0 <= top
                and addr1 + length1 <= top
                and addr2 + length2 <= top
                and length0 + room <= _MOST
            ):
                if word1 == write:
                    readables, before = 1, length1
                elif word1 == read:
                    readables, before = 2, 0
                    length0 += length1
                    room = length2
                else:
                    return None
                origin = addr2 - base - before
            else:
                return None
        elif length == 32:
            entries = unpack_two(view, at)
            addr0, length0, word0, addr1, room, word1 = entries
            if (
                word0 == first
                and word1 == last
                and base <= addr0
                and base <= addr1
                and length0
                and room
                and addr0 + length0 <= top
                and addr1 + room <= top
                and length0 + room <= _MOST
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
