"""The dirty log: which pages of guest memory a backend has written, for live migration. Source: QEMU,
docs/interop/vhost-user.rst, section "Migration".

One bit for each page of 4 KiB, from guest address 0 on, in memory that the frontend gives (``SET_LOG_BASE``) and reads
and clears while the backend sets bits; other backends may set bits in it too. So bits are set by an atomic OR where
the system has one, and else by storing bytes of ones, which marks up to seven pages more but loses nothing.

A page is marked after it was written, never before: the frontend might clear the mark and copy the old content.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from pyvhost.memory import Mapping

__all__ = ["PAGE", "AtomicOr", "DirtyLog", "RingLog", "store_ones"]

log = logging.getLogger("pyvhost")

PAGE = 0x1000  #: bytes of guest memory for each bit (VHOST_LOG_PAGE)

_SHIFT = 12
_BYTE_SHIFT = _SHIFT + 3  # bytes of guest memory for each byte of the log

#: sets the bits of a mask in one byte of the log, by its index
AtomicOr = Callable[[int, int], object]


def store_ones(view: memoryview) -> AtomicOr:
    """An ``AtomicOr`` without atomic operations: it sets all bits of the byte."""

    def set_all(index: int, mask: int) -> None:
        view[index] = 0xFF

    return set_all


class DirtyLog:
    """One connection's log; it lives as long as the connection, while its memory comes, moves and goes.

    ``enabled`` follows the feature LOG_ALL; without it, or without memory, ``mark()`` does nothing.
    """

    __slots__ = ("_mapping", "_or", "_order", "_size", "_view", "_warned", "enabled", "touched")

    def __init__(self, order: Callable[[], object] | None = None) -> None:
        self.enabled = False
        self.touched = False  #: something was marked since the frontend was last told
        self._order = order  # stores stay behind stores; None where they always do
        self._mapping: Mapping | None = None
        self._view = memoryview(b"")
        self._size = 0
        self._or: AtomicOr = store_ones(self._view)
        self._warned = False

    @property
    def active(self) -> bool:
        return self.enabled and self._size > 0

    def remap(self, mapping: Mapping | None, atomic_or: AtomicOr | None = None) -> None:
        """Log into this memory from now on; None: into none. Takes the mapping over."""
        old, self._mapping = self._mapping, mapping
        self._view = memoryview(b"") if mapping is None else mapping.view
        self._size = len(self._view)
        self._or = atomic_or if atomic_or is not None else store_ones(self._view)
        self._warned = False
        if old is not None:
            old.discard()

    def mark(self, addr: int, length: int) -> None:
        """The ``length`` bytes at guest address ``addr`` were written."""
        if not self.enabled or length <= 0 or not self._size:
            return
        if self._order is not None:
            self._order()  # what was written is there before the mark
        first, last = addr >> _SHIFT, (addr + length - 1) >> _SHIFT
        if last >= self._size << 3 or addr < 0:
            self._outside(addr, length)
            last = min(last, (self._size << 3) - 1)
            if first > last or addr < 0:
                return
        self.touched = True
        start, end = first >> 3, last >> 3
        low, high = 0xFF << (first & 7) & 0xFF, 0xFF >> (7 - (last & 7))
        if start == end:
            self._or(start, low & high)
            return
        self._or(start, low)
        if end - start > 1:
            self._view[start + 1 : end] = b"\xff" * (end - start - 1)
        self._or(end, high)

    def _outside(self, addr: int, length: int) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the frontend's dirty log is too small: pages beyond it are not logged")


@dataclass(frozen=True, slots=True)
class RingLog:
    """What a queue needs to log its work. ``used`` is the guest address that stands for the used ring (for a packed
    ring, the descriptor ring), None where its writes are not to be logged."""

    mark: Callable[[int, int], object]  #: guest address, length
    used: int | None = None
