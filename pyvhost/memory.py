"""Guest memory as a backend sees it: regions, address translation, and leases that keep a mapping alive.

A ``GuestMemory`` is a snapshot: a change of the table (``SET_MEM_TABLE``, ``ADD_MEM_REG``, ``REM_MEM_REG``) makes a new
one that shares the mappings of the regions both have. A mapping is unmapped when its last user lets go: the snapshots
that list it, and the leases taken on it by calls that are still running. Nothing here is thread-safe: a memory
belongs to the data-plane thread.

Slices that ``translate()`` returned also keep their bytes mapped for as long as they live, because a Python buffer
cannot be unmapped under its exports; a lease is for whoever hands an *address* on (to an ioctl, to C), or wants to
know when memory is free.

Live migration needs to know what a device has written. The writable part of a request is logged when the request is
completed; whoever writes elsewhere, or later, says so: ``GuestMemory.mark_dirty()``, ``Lease.mark_dirty()``, or a lease
that is taken with ``writes=True``.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from pyvhost.errors import MemoryFault

__all__ = ["GuestMemory", "Lease", "Mapping", "Region"]

_TOP = 1 << 64


class Mapping:
    """Counted ownership of one mapped buffer.

    ``view`` is a writable memoryview of bytes; ``close`` is called once, when the last reference is released. A new
    mapping has no references: the first ``GuestMemory`` that lists it takes one; ``discard()`` ends one that was
    never listed.
    """

    __slots__ = ("_close", "_references", "readonly", "view")

    def __init__(self, view: memoryview, close: Callable[[], object] | None = None) -> None:
        self.view = view
        #: the same bytes, not writable: what a device may read only
        self.readonly = view.toreadonly()
        self._close = close
        self._references = 0

    def acquire(self) -> None:
        self._references += 1

    def release(self) -> None:
        self._references -= 1
        if self._references <= 0:
            self.discard()

    def discard(self) -> None:
        """Unmap now (whoever holds slices keeps the bytes alive until they are dropped)."""
        close, self._close = self._close, None
        if close is not None:
            self.view = self.readonly = memoryview(b"")
            close()


@dataclass(frozen=True, slots=True)
class Region:
    """One line of the memory table; all numbers in bytes.

    ``user_addr`` is where the frontend sees the region (vring addresses are given so). ``mapping`` holds ``size``
    bytes.
    """

    guest_addr: int
    size: int
    user_addr: int
    mapping: Mapping

    def __post_init__(self) -> None:
        if self.size <= 0:
            raise MemoryFault("a memory region of no bytes")
        if self.guest_addr + self.size > _TOP or self.user_addr + self.size > _TOP:
            raise MemoryFault("a memory region that ends beyond 2^64")
        if len(self.mapping.view) != self.size:
            raise MemoryFault("a memory region whose mapping has another size")

    # Not kept here: a region that outlives its mapping must not keep the buffer.
    @property
    def view(self) -> memoryview:
        return self.mapping.view

    @property
    def readonly(self) -> memoryview:
        return self.mapping.readonly


class Lease:
    """Keeps mappings alive until ``release()``; a context manager. ``views`` are the leased ranges, each as
    translated pieces. ``dirty`` logs the ranges as written."""

    __slots__ = ("_dirty", "_mappings", "_writes", "views")

    def __init__(
        self,
        mappings: Iterable[Mapping],
        views: tuple[tuple[memoryview, ...], ...],
        *,
        dirty: Callable[[], object] | None = None,
        writes: bool = False,
    ) -> None:
        self._mappings = tuple(mappings)
        self._dirty = dirty
        self._writes = writes
        self.views = views
        for mapping in self._mappings:
            mapping.acquire()

    def mark_dirty(self) -> None:
        """The leased ranges were written: a live migration shall copy them (again). Nothing after ``release()``."""
        if self._dirty is not None:
            self._dirty()

    def release(self) -> None:
        """Let go; a second call does nothing. With ``writes``, the ranges are logged as written."""
        if self._writes:
            self.mark_dirty()
        self._dirty = None
        mappings, self._mappings = self._mappings, ()
        self.views = ()
        for mapping in mappings:
            mapping.release()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class GuestMemory:
    """A snapshot of the memory table. Regions may touch, but not overlap, neither in guest nor in user addresses.
    ``dirty`` logs a range, guest address and length, as written.

    :raises MemoryFault: overlapping regions
    """

    __slots__ = ("_by_user", "_closed", "_dirty", "_starts", "_user_starts", "regions")

    def __init__(self, regions: Iterable[Region] = (), *, dirty: Callable[[int, int], object] | None = None) -> None:
        self._dirty = dirty
        #: ordered by guest address
        self.regions: tuple[Region, ...] = tuple(sorted(regions, key=lambda r: r.guest_addr))
        self._by_user = tuple(sorted(self.regions, key=lambda r: r.user_addr))
        self._starts = [r.guest_addr for r in self.regions]
        self._user_starts = [r.user_addr for r in self._by_user]
        for one, two in zip(self.regions, self.regions[1:], strict=False):
            if one.guest_addr + one.size > two.guest_addr:
                raise MemoryFault("memory regions overlap in guest addresses")
        for one, two in zip(self._by_user, self._by_user[1:], strict=False):
            if one.user_addr + one.size > two.user_addr:
                raise MemoryFault("memory regions overlap in user addresses")
        self._closed = False
        for region in self.regions:
            region.mapping.acquire()

    def __iter__(self) -> Iterator[Region]:
        return iter(self.regions)

    def __len__(self) -> int:
        return len(self.regions)

    def close(self) -> None:
        """Drop this snapshot's own references: it has been replaced. Leases go on holding theirs; a second call does
        nothing."""
        if not self._closed:
            self._closed = True
            for region in self.regions:
                region.mapping.release()

    def with_region(self, region: Region) -> GuestMemory:
        """A new snapshot with one region more (hot-plug). This one stays open.

        :raises MemoryFault: it overlaps another
        """
        return GuestMemory((*self.regions, region), dirty=self._dirty)

    def without_region(self, guest_addr: int, user_addr: int, size: int) -> GuestMemory:
        """A new snapshot without that region. This one stays open.

        :raises MemoryFault: there is no such region
        """
        rest = [r for r in self.regions if (r.guest_addr, r.user_addr, r.size) != (guest_addr, user_addr, size)]
        if len(rest) == len(self.regions):
            raise MemoryFault("no such memory region")
        return GuestMemory(rest, dirty=self._dirty)

    def find(self, addr: int) -> Region:
        """The region that holds guest address ``addr``.

        :raises MemoryFault: none does
        """
        index = bisect_right(self._starts, addr) - 1
        if index >= 0:
            region = self.regions[index]
            if addr - region.guest_addr < region.size:
                return region
        raise MemoryFault("guest address outside of all memory regions")

    def translate(self, addr: int, length: int, writable: bool = True) -> tuple[memoryview, ...]:
        """The ``length`` bytes at guest address ``addr``, in one piece or, across adjoining regions, in several. Not
        writable pieces are read-only views. A length of 0 gives no pieces, whatever the address.

        :raises MemoryFault: part of the range is in no region, or its end is beyond 2^64
        """
        if length <= 0:
            if length:
                raise MemoryFault("a negative length")
            return ()
        if addr + length > _TOP:
            raise MemoryFault("a range that ends beyond 2^64")
        region = self.find(addr)
        offset = addr - region.guest_addr
        if offset + length <= region.size:
            view = region.view if writable else region.readonly
            return (view[offset : offset + length],)
        pieces: list[memoryview] = []
        while length:
            region = self.find(addr)
            offset = addr - region.guest_addr
            count = min(length, region.size - offset)
            view = region.view if writable else region.readonly
            pieces.append(view[offset : offset + count])
            addr += count
            length -= count
        return tuple(pieces)

    def translate_user(self, addr: int, length: int) -> memoryview:
        """The ``length`` > 0 bytes at the *frontend's* address ``addr``, in one piece, as a vring must lie.

        :raises MemoryFault: the range is not in one region
        """
        index = bisect_right(self._user_starts, addr) - 1
        if index >= 0:
            region = self._by_user[index]
            offset = addr - region.user_addr
            if offset + length <= region.size:
                return region.view[offset : offset + length]
        raise MemoryFault("user address range outside of all memory regions")

    def mark_dirty(self, addr: int, length: int) -> None:
        """The ``length`` bytes at guest address ``addr`` were written outside of a request's writable part, or after
        it was completed. To be called after the writing; costs nothing unless a live migration is on."""
        if self._dirty is not None:
            self._dirty(addr, length)

    def lease(self, *ranges: tuple[int, int], writes: bool = False) -> Lease:
        """Keep the mappings of ``ranges`` (each a guest address and a length) until the lease is released; of all
        regions if none are given. ``lease.views`` are the ranges, translated. ``writes``: whoever holds the lease
        writes to them, so its end logs them as written.

        :raises MemoryFault: part of a range is in no region
        """
        if not ranges:
            ranges = tuple((r.guest_addr, r.size) for r in self.regions)
            views: tuple[tuple[memoryview, ...], ...] = ()
        else:
            views = tuple(self.translate(addr, length) for addr, length in ranges)
        held: dict[int, Mapping] = {}
        for addr, length in ranges:
            end = addr + length
            while addr < end:
                region = self.find(addr)
                held[id(region.mapping)] = region.mapping
                addr = region.guest_addr + region.size
        mark = self._dirty

        def dirty() -> None:
            if mark is not None:
                for addr, length in ranges:
                    mark(addr, length)

        return Lease(held.values(), views, dirty=dirty if mark is not None else None, writes=writes)
