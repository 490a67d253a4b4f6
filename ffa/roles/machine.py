"""The machine's memory: who owns each page, who may access it, and its bytes.

It is one for all roles, as the hardware is: hypervisor and SPMC each change what they are responsible for. Guest
physical addresses are physical ones (identity mapping, as in Hafnium and pKVM).
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntFlag
from functools import cache

from ffa.abi.ids import PAGE_SIZE
from ffa.abi.transactions import AddressRange

POISON = 0xA5
"""What buffers are filled with when nobody may rely on their bytes."""


CHUNK = 1 << 21
"""Bytes that are backed at once, when the first of them is written."""


class Access(IntFlag):
    """What an endpoint may do with a page."""

    NONE = 0
    R = 1
    W = 2
    X = 4
    RW = 3
    RWX = 7


class AccessFaultError(Exception):
    """An endpoint touched memory that it has no access to: on hardware, a data abort in that endpoint."""


@dataclass(frozen=True, slots=True)
class PageState:
    """Who owns a page and who may access it. Pages in the same state share one object."""

    owner: int
    access: tuple[tuple[int, Access], ...]  #: (endpoint, what it may do), no endpoint twice, none with NONE
    handle: int | None = None  #: the memory transaction that the page is in
    buffer: bool = False  #: mapped as RX or TX

    def of(self, endpoint: int) -> Access:
        """What ``endpoint`` may do."""
        return next((access for who, access in self.access if who == endpoint), Access.NONE)

    def granting(self, endpoint: int, access: Access) -> PageState:
        """This state with ``endpoint``'s access replaced; NONE takes it away."""
        others = tuple(item for item in self.access if item[0] != endpoint)
        return PageState(self.owner, (*others, (endpoint, access)) if access else others, self.handle, self.buffer)


@cache
def exclusive(owner: int) -> PageState:
    """Only the owner has access, and the page is in no transaction."""
    return PageState(owner, ((owner, Access.RWX),))


@cache
def buffer_of(owner: int) -> PageState:
    """The page is the owner's RX or TX buffer: not to be given away."""
    return PageState(owner, ((owner, Access.RW),), buffer=True)


@dataclass(slots=True, eq=False)
class Region:
    """A piece of the address space, of one kind and first given to one endpoint."""

    first: int  #: page number
    pages: int
    owner: int
    secure: bool = False
    device: bool = False
    backing: memoryview | None = field(default=None, repr=False)  #: all its bytes, if they are somebody's buffer
    chunks: dict[int, bytearray] = field(default_factory=dict, repr=False)  #: else those that somebody has written to

    @property
    def end(self) -> int:
        """The page number after the last page."""
        return self.first + self.pages


class Machine:
    """All regions, the state of each page, and the bytes. Cost of an operation is linear in the pages it names."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self.states: dict[int, PageState] = {}  #: pages that are not in their region's first state

    def add(
        self,
        owner: int,
        address: int,
        pages: int,
        *,
        secure: bool = False,
        device: bool = False,
        backing: bytearray | memoryview | None = None,
    ) -> Region:
        """A new region at ``address`` (page-aligned), whose bytes are in ``backing`` if that is given (writable, and as
        long as the region). Raises ValueError if it overlaps one that is there."""
        buffer = None if backing is None else memoryview(backing).cast("B")
        if buffer is not None and (buffer.readonly or len(buffer) != pages * PAGE_SIZE):
            raise ValueError("a region's backing is writable, and as long as the region")
        region = Region(address // PAGE_SIZE, pages, owner, secure, device, buffer)
        if address % PAGE_SIZE or pages < 1 or address < 0 or address + pages * PAGE_SIZE > 1 << 64:
            raise ValueError("a region starts at a page and has at least one, all in 64 bits")
        if any(r.first < region.end and region.first < r.end for r in self.regions):
            raise ValueError("the region overlaps another")
        self.regions.append(region)
        self.regions.sort(key=lambda r: r.first)
        self._starts = [r.first for r in self.regions]
        return region

    def region(self, page: int) -> Region | None:
        """The region that a page is in."""
        at = bisect_right(self._starts, page) - 1
        if at < 0:
            return None
        found = self.regions[at]
        return found if page < found.end else None

    def regions_of(self, ranges: Iterable[AddressRange]) -> set[Region | None]:
        """The regions that ``ranges`` are in, by identity; None if a range is not wholly in one region."""
        found: set[Region | None] = set()
        for address, count in ranges:
            first = address // PAGE_SIZE
            region = self.region(first)
            if region is not None and first + count > region.end:
                region = None
            found.add(region)
        return found

    def state(self, page: int) -> PageState | None:
        """The state of a page; None where there is no memory."""
        found = self.states.get(page)
        if found is None:
            region = self.region(page)
            return None if region is None else exclusive(region.owner)
        return found

    def states_of(self, pages: Iterable[int]) -> set[PageState | None]:
        """All states that occur among ``pages``."""
        get = self.states.get
        out: set[PageState | None] = set()
        region: Region | None = None
        for page in pages:
            state = get(page)
            if state is None:
                if region is None or not region.first <= page < region.end:
                    region = self.region(page)
                out.add(None if region is None else exclusive(region.owner))
            else:
                out.add(state)
        return out

    def set_state(self, pages: Iterable[int], state: PageState) -> None:
        """Puts all ``pages`` (which exist) into ``state``."""
        self.states.update(dict.fromkeys(pages, state))

    # -- bytes

    def read(self, endpoint: int, address: int, size: int) -> bytes:
        """Bytes as ``endpoint`` reads them. Raises AccessFaultError."""
        self._check(endpoint, address, size, Access.R)
        return self.fetch(address, size)

    def write(self, endpoint: int, address: int, data: bytes) -> None:
        """Writes as ``endpoint``. Raises AccessFaultError."""
        self._check(endpoint, address, len(data), Access.W)
        self.store(address, data)

    def view(self, endpoint: int, address: int, size: int, access: Access = Access.RW) -> memoryview:
        """The bytes themselves, for as long as the caller keeps its access, which is checked now and not again: whoever
        relinquishes memory drops its views first. Raises AccessFaultError; ValueError without a ``backing``."""
        self._check(endpoint, address, size, access)
        region = self._backing(address, size)
        if region.backing is None:
            raise ValueError("only a region with a backing has views: Machine.add(..., backing=...)")
        at = address - region.first * PAGE_SIZE
        found = region.backing[at : at + size]
        return found if Access.W in access else found.toreadonly()

    def _check(self, endpoint: int, address: int, size: int, wanted: Access) -> None:
        for page in range(address // PAGE_SIZE, (address + max(size, 1) - 1) // PAGE_SIZE + 1):
            state = self.state(page)
            if state is None or wanted not in state.of(endpoint):
                raise AccessFaultError(f"endpoint {endpoint:#x} has no {wanted.name} access to {page * PAGE_SIZE:#x}")

    def fetch(self, address: int, size: int) -> bytes:
        """Bytes as a partition manager reads them, which has checked that they exist. Raises AccessFaultError."""
        region = self._backing(address, size)
        if region.backing is not None:
            at = address - region.first * PAGE_SIZE
            return bytes(region.backing[at : at + size])
        return b"".join(
            bytes(chunk[at : at + count]) if (chunk := region.chunks.get(number)) is not None else bytes(count)
            for number, at, count in _pieces(address, size)
        )

    def store(self, address: int, data: bytes) -> None:
        """Writes as a partition manager, which has checked that the bytes exist. Raises AccessFaultError if not."""
        region = self._backing(address, len(data))
        if region.backing is not None:
            at = address - region.first * PAGE_SIZE
            region.backing[at : at + len(data)] = data
            return
        done = 0
        for number, at, count in _pieces(address, len(data)):
            chunk = region.chunks.get(number)
            if chunk is None:
                chunk = region.chunks[number] = bytearray(CHUNK)
            chunk[at : at + count] = data[done : done + count]
            done += count

    def clear(self, ranges: Sequence[AddressRange]) -> None:
        """Writes zeros."""
        for address, count in ranges:
            region = self._backing(address, count * PAGE_SIZE)
            if region.backing is not None:
                self.store(address, bytes(count * PAGE_SIZE))
                continue
            for number, at, size in _pieces(address, count * PAGE_SIZE):
                if number in region.chunks:
                    region.chunks[number][at : at + size] = bytes(size)

    def _backing(self, address: int, size: int) -> Region:
        region = self.region(address // PAGE_SIZE)
        if region is None or address + size > region.end * PAGE_SIZE:
            raise AccessFaultError(f"no memory at {address:#x}")
        return region


def _pieces(address: int, size: int) -> Iterator[tuple[int, int, int]]:
    """The chunks that bytes are in: number of the chunk, first byte in it, bytes."""
    end = address + size
    while address < end:
        at = address % CHUNK
        count = min(CHUNK - at, end - address)
        yield address // CHUNK, at, count
        address += count
