"""Buffers for requests and responses, in memory that the device can reach."""

from __future__ import annotations

from dataclasses import dataclass

from guest_driver.transport import Transport
from pyvhost.vring.api import Segment
from tee.memory import Memory

SLOT = 2048
"""Bytes of a small buffer: enough for a call with 24 parameters and its response."""

_BATCH = 32
"""Small buffers that are made at a time."""


@dataclass(slots=True, eq=False)
class Buffer:
    """``size`` bytes at ``offset`` of a memory."""

    memory: Memory
    offset: int
    size: int

    def write(self, data: bytes) -> None:
        """Put ``data`` at the start."""
        self.memory.write(self.offset, data)

    def read(self, start: int, size: int) -> bytes:
        """A copy of ``size`` bytes from ``start`` on."""
        return self.memory.read(self.offset + start, size)

    def segments(self, start: int, size: int) -> list[Segment]:
        """Where ``size`` bytes from ``start`` on lie for the device."""
        return segments(self.memory, self.offset + start, size)


def segments(memory: Memory, offset: int, size: int) -> list[Segment]:
    """The guest-physical (address, length) pieces of a part of a memory."""
    found: list[Segment] = []
    for piece in memory.ranges:
        if size <= 0:
            break
        if offset >= piece.length:
            offset -= piece.length
            continue
        length = min(size, piece.length - offset)
        found.append((piece.address + offset, length))
        offset = 0
        size -= length
    if size > 0:
        raise ValueError("outside the memory")
    return found


class Buffers:
    """A pool of small buffers, and larger ones on demand."""

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._free: list[Buffer] = []

    def take(self, size: int) -> Buffer:
        """A buffer of at least ``size`` bytes. Raises MemoryError."""
        if size > SLOT:
            return Buffer(self._transport.allocate(size), 0, size)
        if not self._free:
            memory = self._transport.allocate(SLOT * _BATCH)
            self._free = [Buffer(memory, i * SLOT, SLOT) for i in range(_BATCH)]
        return self._free.pop()

    def give(self, buffer: Buffer) -> None:
        """Take it back."""
        if buffer.size == SLOT:
            self._free.append(buffer)
        else:
            self._transport.release(buffer.memory)
