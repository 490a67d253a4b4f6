"""The split virtqueue's layout, for both sides. Source: virtio 1.2, section 2.7.

All three parts are little-endian in guest memory; words that the other side polls are read and written through
``memoryview.cast``, one aligned access each, because ``struct.pack_into`` clears its target first and the peer can
see that. Casts use the host's byte order, so big-endian hosts are not supported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from construct import Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Codec

__all__ = [
    "DESC",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_WRITE",
    "MAX_SIZE",
    "NO_SIGNAL",
    "SplitLayout",
    "valid_size",
]

if sys.byteorder != "little":  # pragma: no cover
    raise ImportError("pyvhost's rings need a little-endian host")

#: virtq_desc, section 2.7.5
DESC = Codec("virtq_desc", Struct("addr" / Int64ul, "len" / Int32ul, "flags" / Int16ul, "next" / Int16ul))

DESC_F_NEXT = 1  #: the chain goes on at ``next``
DESC_F_WRITE = 2  #: for the device to write (else to read)
DESC_F_INDIRECT = 4  #: the buffer holds a table of descriptors

#: flags of the available ring (VIRTQ_AVAIL_F_NO_INTERRUPT) and of the used ring (VIRTQ_USED_F_NO_NOTIFY): the same bit
NO_SIGNAL = 1

MAX_SIZE = 1 << 15


def valid_size(size: int) -> bool:
    """Whether a split ring may have ``size`` entries: a power of two up to 2^15."""
    return 0 < size <= MAX_SIZE and not size & (size - 1)


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """Where the parts of a ring of ``size`` entries lie when they follow each other, in bytes from its start."""

    size: int

    @property
    def desc_bytes(self) -> int:
        return 16 * self.size

    @property
    def avail_bytes(self) -> int:
        """flags, idx, the ring, used_event; 2 bytes each."""
        return 6 + 2 * self.size

    @property
    def used_bytes(self) -> int:
        """flags, idx (2 bytes each), the ring of 8-byte elements, avail_event (2 bytes)."""
        return 6 + 8 * self.size

    @property
    def avail_offset(self) -> int:
        return self.desc_bytes

    @property
    def used_offset(self) -> int:
        """4-byte aligned."""
        return (self.avail_offset + self.avail_bytes + 3) & ~3

    @property
    def total_bytes(self) -> int:
        return self.used_offset + self.used_bytes
