"""Scattered shared memory of this process seen in one piece: what a system call needs that takes one address.

A *gather view* is a reserved range of addresses into which the pages are mapped a second time, piece by piece and each
at its place. Source: mremap(2), whose old size of 0 makes a second mapping of shared pages. It needs neither the file
nor the offset, and whoever writes through one mapping is seen through the other.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PAGE = mmap.PAGESIZE
_MAYMOVE, _FIXED = 1, 2
_NO_ACCESS = 0
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE
_FAILED = ctypes.c_void_p(-1).value
_DEFAULT_MAP_COUNT = 65530

_libc = ctypes.CDLL(None, use_errno=True)
_mmap, _mremap, _munmap = _libc.mmap, _libc.mremap, _libc.munmap
_mmap.restype = _mremap.restype = ctypes.c_void_p
_mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)
_munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)


class CannotGatherError(Exception):
    """There can be no such view; the text says why, in a few words."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Whole pages: ``length`` bytes at ``address``."""

    address: int
    length: int


def map_count() -> int:
    """How many mappings the kernel lets a process have (vm.max_map_count)."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text())
    except (OSError, ValueError):
        return _DEFAULT_MAP_COUNT


def address_of(view: memoryview) -> int:
    """Where the bytes of a writable view lie. It is good for as long as the view's buffer is."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))


@contextmanager
def gathered(segments: Sequence[memoryview], most: int) -> Iterator[int]:
    """The address at which ``segments`` can be seen in one piece, inside of the ``with``. At most ``most`` mappings are
    made for it. One segment is taken as it is.

    :raises CannotGatherError: pieces that do not meet at page boundaries, memory that is not shared, or too many
    """
    segments = [segment for segment in segments if len(segment)]
    if len(segments) == 1:
        yield address_of(segments[0])
        return
    if len(segments) > most:
        raise CannotGatherError("too many pieces")
    pieces, lead = _pieces(segments)
    span = sum(piece.length for piece in pieces)
    base = _mmap(None, span, _NO_ACCESS, _RESERVED, -1, 0)
    if base == _FAILED:
        raise CannotGatherError("no address space")
    hole = 0, 0
    try:
        at = base
        for piece in pieces:
            # in two steps: a second mapping that fails leaves the reserved range whole
            twin = _mremap(piece.address, 0, piece.length, _MAYMOVE, None)
            if twin == _FAILED:
                raise CannotGatherError(f"mremap: {os.strerror(ctypes.get_errno())}")
            if _mremap(twin, piece.length, piece.length, _MAYMOVE | _FIXED, at) == _FAILED:
                hole = at, at + piece.length
                why = os.strerror(ctypes.get_errno())
                _munmap(twin, piece.length)
                raise CannotGatherError(f"mremap: {why}")
            at += piece.length
        yield base + lead
    finally:
        if not hole[1]:
            _munmap(base, span)
        else:  # what is in the hole now may be another thread's
            if hole[0] > base:
                _munmap(base, hole[0] - base)
            if base + span > hole[1]:
                _munmap(hole[1], base + span - hole[1])


def _pieces(segments: Sequence[memoryview]) -> tuple[list[_Piece], int]:
    """The pages of ``segments``, and the offset of the first byte in the first."""
    pieces: list[_Piece] = []
    lead = 0
    last = len(segments) - 1
    for index, segment in enumerate(segments):
        address = address_of(segment)
        start, end = address - address % PAGE, address + len(segment)
        if (index and start != address) or (index < last and end % PAGE):
            raise CannotGatherError("pieces not of whole pages")
        if not index:
            lead = address - start
        pieces.append(_Piece(start, -(-(end - start) // PAGE) * PAGE))
    return pieces, lead
