"""The packed virtqueue's layout, for both sides. Source: virtio 1.2, section 2.8.

One ring of descriptors, which the driver makes available and the device overwrites when it is done with them, and an
event suppression structure for each side. Flags are what the other side polls: they are read and written through
``memoryview.cast``, one aligned access each (see ``pyvhost.vring.split``), and written last.
"""

from __future__ import annotations

from dataclasses import dataclass

from construct import Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Codec
from pyvhost.vring.split import DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, MAX_SIZE

__all__ = [
    "DESC",
    "DESC_F_AVAIL",
    "DESC_F_INDIRECT",
    "DESC_F_NEXT",
    "DESC_F_USED",
    "DESC_F_WRITE",
    "EVENT_DESC",
    "EVENT_DISABLE",
    "EVENT_ENABLE",
    "INITIAL_BASE",
    "WRAP",
    "PackedLayout",
    "pack_base",
    "unpack_base",
    "valid_size",
]

#: pvirtq_desc, section 2.8.13
DESC = Codec("pvirtq_desc", Struct("addr" / Int64ul, "len" / Int32ul, "id" / Int16ul, "flags" / Int16ul))

DESC_F_AVAIL = 1 << 7  #: the driver's wrap counter when it made the descriptor available
DESC_F_USED = 1 << 15  #: its opposite then; when the device is done, both bits are the device's wrap counter

#: flags of an event suppression structure, section 2.8.14: what the side that writes it wants to be told
EVENT_ENABLE = 0  #: of everything
EVENT_DISABLE = 1  #: of nothing
EVENT_DESC = 2  #: when the other side gets to the descriptor in ``desc``; only with EVENT_IDX

WRAP = 1 << 15  #: the wrap counter beside a ring position, in ``desc`` of an event suppression structure and in a base

#: vhost-user's ``SET_VRING_BASE`` of a ring that was never used: both positions 0, both wrap counters 1
INITIAL_BASE = (WRAP << 16) | WRAP


def valid_size(size: int) -> bool:
    """Whether a packed ring may have ``size`` entries: any number up to 2^15."""
    return 0 < size <= MAX_SIZE


def pack_base(avail: int, avail_wrap: int, used: int, used_wrap: int) -> int:
    """The 32 bits of ``GET_VRING_BASE``: where the device goes on taking, and where it goes on giving back."""
    return avail | avail_wrap << 15 | used << 16 | used_wrap << 31


def unpack_base(base: int) -> tuple[int, int, int, int]:
    """``pack_base()``'s arguments."""
    return base & 0x7FFF, base >> 15 & 1, base >> 16 & 0x7FFF, base >> 31 & 1


@dataclass(frozen=True, slots=True)
class PackedLayout:
    """Where the parts of a ring of ``size`` entries lie when they follow each other, in bytes from its start. The
    names are those of the vhost-user message: ``avail`` is the driver's event suppression structure, ``used`` the
    device's."""

    size: int

    @property
    def desc_bytes(self) -> int:
        return 16 * self.size

    @property
    def avail_bytes(self) -> int:
        """desc and flags, 2 bytes each."""
        return 4

    @property
    def used_bytes(self) -> int:
        """As ``avail_bytes``."""
        return 4

    @property
    def avail_offset(self) -> int:
        return self.desc_bytes

    @property
    def used_offset(self) -> int:
        return self.avail_offset + self.avail_bytes

    @property
    def total_bytes(self) -> int:
        return self.used_offset + self.used_bytes
