"""What both ring formats check of the memory that their parts are in."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable

from pyvhost.errors import RingError

__all__ = ["check_parts"]


def check_parts(parts: Iterable[tuple[memoryview, int, int]]) -> None:
    """Each part as a writable view, the bytes it must have, and what its address must be a multiple of: words that
    two sides share are read and written by one access each.

    :raises RingError: a part that is too small or misaligned
    """
    for view, size, alignment in parts:
        if len(view) < size:
            raise RingError("a part of the ring is too small for its size")
        if ctypes.addressof(ctypes.c_char.from_buffer(view)) % alignment:
            raise RingError("a part of the ring is misaligned")
