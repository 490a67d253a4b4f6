"""Helpers for tests of queues and devices: both sides of a ring in plain memory, without a socket, a thread or a
system call.

``ring_pair()`` gives an honest driver and the device's side of its ring. ``RawRing`` and ``RawPackedRing`` are drivers
that write whatever they are told to, for tests with a hostile one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.vring import packed as packed_ring
from pyvhost.vring.api import DeviceQueue, Fences
from pyvhost.vring.choice import part_sizes, queue_class
from pyvhost.vring.packed import DESC_F_AVAIL, DESC_F_USED, INITIAL_BASE, PackedLayout
from pyvhost.vring.packed_driver import PackedDriverQueue
from pyvhost.vring.split import DESC, SplitLayout
from pyvhost.vring.split_driver import SplitDriverQueue

__all__ = ["RawPackedRing", "RawRing", "RingPair", "plain_memory", "ring_pair"]

#: between guest and user addresses of ``plain_memory``
USER_OFFSET = 0x7F00_0000_0000


def plain_memory(*regions: tuple[int, int]) -> GuestMemory:
    """Guest memory of zeroed private bytes: each region a guest address and a size."""
    return GuestMemory(
        Region(addr, size, addr + USER_OFFSET, Mapping(memoryview(bytearray(size)))) for addr, size in regions
    )


@dataclass(slots=True)
class RingPair:
    """Driver, device and the memory they share. ``data`` is the guest address of the part of memory that the ring
    does not use."""

    memory: GuestMemory
    driver: SplitDriverQueue | PackedDriverQueue
    device: DeviceQueue
    data: int
    parts: tuple[memoryview, memoryview, memoryview]  #: of the ring, as a device queue takes them
    signals: list[int] = field(default_factory=list)  #: one entry for each signal of the device's

    def write(self, addr: int, data: bytes) -> None:
        """Put bytes into guest memory."""
        for view in self.memory.translate(addr, len(data)):
            view[:] = data[: len(view)]
            data = data[len(view) :]

    def read(self, addr: int, length: int) -> bytes:
        return b"".join(self.memory.translate(addr, length))


def ring_pair(
    size: int = 8,
    *,
    base: int | None = None,
    event_idx: bool = False,
    indirect: int = 0,
    regions: Sequence[tuple[int, int]] = ((0x1000, 1 << 16),),
    packed: bool = False,
    queue: str | None = None,
) -> RingPair:
    """A ring at the start of the first region. ``base``: both sides are there, as after that many requests; for a
    packed ring, as ``pack_base()`` makes it. ``queue``: "pure" or "compiled", by default whichever would be served.
    """
    if base is None:
        base = INITIAL_BASE if packed else 0
    memory = plain_memory(*regions)
    address = regions[0][0]
    kind = PackedDriverQueue if packed else SplitDriverQueue
    total = kind.memory_size(size, indirect)
    (view,) = memory.translate(address, total)
    layout = PackedLayout(size) if packed else SplitLayout(size)
    desc_bytes, avail_bytes, used_bytes = part_sizes(packed, size)
    parts = (
        view[:desc_bytes],
        view[layout.avail_offset :][:avail_bytes],
        view[layout.used_offset :][:used_bytes],
    )
    if not packed:
        parts[1][2:4] = parts[2][2:4] = base.to_bytes(2, "little")
    driver = kind(size, view, address, fences=Fences.none(), event_idx=event_idx, indirect=indirect, base=base)
    signals: list[int] = []
    device = queue_class(packed, queue)(
        size,
        memory,
        *parts,
        fences=Fences.none(),
        base=base,
        indirect=bool(indirect),
        event_idx=event_idx,
        signal=lambda: signals.append(1),
    )
    return RingPair(memory, driver, device, address + total, parts, signals)


class RawRing:
    """A split ring that a test writes word by word, at the start of ``memory``'s first region, and the device's side
    of it.

    ``data`` is the guest address where the ring ends.
    """

    def __init__(
        self,
        size: int,
        memory: GuestMemory,
        *,
        indirect: bool = True,
        event_idx: bool = False,
        queue: str | None = None,
    ) -> None:
        self.size = size
        self.memory = memory
        self.layout = SplitLayout(size)
        self.address = memory.regions[0].guest_addr
        self.data = self.address + self.layout.total_bytes
        (view,) = memory.translate(self.address, self.layout.total_bytes)
        self.view = view
        self.signals = 0
        self.device = queue_class(False, queue)(
            size,
            memory,
            view[: self.layout.desc_bytes],
            view[self.layout.avail_offset :][: self.layout.avail_bytes],
            view[self.layout.used_offset :][: self.layout.used_bytes],
            fences=Fences.none(),
            indirect=indirect,
            event_idx=event_idx,
            signal=self._signal,
        )

    def _signal(self) -> None:
        self.signals += 1

    def desc(self, index: int, addr: int, length: int, flags: int = 0, following: int = 0) -> None:
        """Write descriptor ``index``."""
        self.view[16 * index : 16 * index + 16] = DESC.pack(addr, length, flags, following)

    def table(self, addr: int, *descriptors: tuple[int, int, int, int]) -> int:
        """Write an indirect table at guest address ``addr``; its length in bytes."""
        data = b"".join(DESC.pack(*d) for d in descriptors)
        (view,) = self.memory.translate(addr, len(data))
        view[:] = data
        return len(data)

    def offer(self, *heads: int) -> None:
        """Put heads into the available ring and advance its index."""
        index = self._word(self.layout.avail_offset + 2)
        for head in heads:
            self._set(self.layout.avail_offset + 4 + 2 * (index % self.size), head)
            index = (index + 1) & 0xFFFF
        self.avail_idx(index)

    def avail_idx(self, index: int) -> None:
        self._set(self.layout.avail_offset + 2, index)

    def avail_flags(self, flags: int) -> None:
        self._set(self.layout.avail_offset, flags)

    def used(self) -> list[tuple[int, int]]:
        """What the device has returned so far, up to one turn of the ring: (id, length)."""
        at = self.layout.used_offset
        count = self._word(at + 2)
        elements = [self.view[at + 4 + 8 * (n % self.size) :][:8] for n in range(min(count, self.size))]
        return [(int.from_bytes(e[:4], "little"), int.from_bytes(e[4:], "little")) for e in elements]

    def _word(self, at: int) -> int:
        return int.from_bytes(self.view[at : at + 2], "little")

    def _set(self, at: int, value: int) -> None:
        self.view[at : at + 2] = value.to_bytes(2, "little")


class RawPackedRing:
    """As ``RawRing``, for a packed ring. ``at`` is where ``offer()`` goes on; it leaves alone what it does not
    write."""

    def __init__(
        self,
        size: int,
        memory: GuestMemory,
        *,
        indirect: bool = True,
        event_idx: bool = False,
        queue: str | None = None,
        base: int = INITIAL_BASE,
    ) -> None:
        self.size = size
        self.memory = memory
        self.layout = layout = PackedLayout(size)
        self.address = memory.regions[0].guest_addr
        self.data = self.address + layout.total_bytes
        (view,) = memory.translate(self.address, layout.total_bytes)
        self.view = view
        self.signals = 0
        self.at, self._wrap, self._back, self._back_wrap = packed_ring.unpack_base(base)
        self.device = queue_class(True, queue)(
            size,
            memory,
            view[: layout.desc_bytes],
            view[layout.avail_offset :][: layout.avail_bytes],
            view[layout.used_offset :][: layout.used_bytes],
            fences=Fences.none(),
            base=base,
            indirect=indirect,
            event_idx=event_idx,
            signal=self._signal,
        )

    def _signal(self) -> None:
        self.signals += 1

    def offer(self, *descriptors: tuple[int, int, int, int]) -> None:
        """Make descriptors available: each an address, a length, an id, and flags but for those of availability."""
        for addr, length, head, flags in descriptors:
            flags |= DESC_F_AVAIL if self._wrap else DESC_F_USED
            self.desc(self.at, addr, length, head, flags)
            self.at += 1
            if self.at == self.size:
                self.at = 0
                self._wrap ^= 1

    def desc(self, index: int, addr: int, length: int, head: int = 0, flags: int = 0) -> None:
        """Write descriptor ``index`` as it is."""
        self.view[16 * index : 16 * index + 16] = packed_ring.DESC.pack(addr, length, head, flags)

    def table(self, addr: int, *descriptors: tuple[int, int, int, int]) -> int:
        """Write an indirect table at guest address ``addr``; its length in bytes."""
        data = b"".join(packed_ring.DESC.pack(*d) for d in descriptors)
        for view in self.memory.translate(addr, len(data)):
            view[:] = data
        return len(data)

    def event(self, position: int, flags: int) -> None:
        """Write the driver's event suppression structure."""
        at = self.layout.avail_offset
        self.view[at : at + 4] = position.to_bytes(2, "little") + flags.to_bytes(2, "little")

    def used(self, *counts: int) -> list[tuple[int, int]]:
        """What the device has returned since the last call: (id, length). ``counts`` are the descriptors of each
        request expected; one each by default."""
        result: list[tuple[int, int]] = []
        expected = list(counts)
        while len(result) < self.size:
            _, length, head, flags = packed_ring.DESC.unpack(self.view, 16 * self._back)
            both = DESC_F_AVAIL | DESC_F_USED
            if flags & both != (both if self._back_wrap else 0):
                break
            result.append((head, length))
            self._back += expected.pop(0) if expected else 1
            if self._back >= self.size:
                self._back -= self.size
                self._back_wrap ^= 1
        return result
