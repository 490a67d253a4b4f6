"""Memory that two sides see: a client's buffer as the TEE, the device or the driver holds it."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Range:
    """``length`` bytes at ``address`` of the address space that is shared with the other side (guest-physical)."""

    address: int
    length: int


@dataclass(frozen=True, slots=True)
class FfaShare:
    """Memory that was shared with the TEE by FF-A, as others can name it.

    ``handle`` and ``tag`` have 64 bits; ``owner`` is the endpoint that has shared it (0: whoever names it).
    """

    handle: int
    tag: int = 0
    owner: int = 0


class Memory:
    """A run of bytes, in one piece here or in several.

    ``segments`` are this side's views of the bytes, in order (none where this side has no mapping: an FF-A handle).
    ``ranges`` say where the same bytes lie for the other side, where that is known. ``handle`` belongs to the
    :class:`~tee.driver.TeeDriver` with which the memory is registered; None means that it is registered with none, and
    a call that names it passes it as temporary memory. ``ffa`` says how the bytes were shared with the TEE by FF-A, if
    they were.
    """

    __slots__ = ("_segments", "_starts", "ffa", "handle", "ranges", "read_only", "size")

    def __init__(
        self,
        segments: Sequence[memoryview] = (),
        *,
        ranges: Sequence[Range] = (),
        size: int | None = None,
        read_only: bool = False,
        ffa: FfaShare | None = None,
    ) -> None:
        self._segments = tuple(segments)
        self._starts: list[int] = []
        total = 0
        for segment in self._segments:
            self._starts.append(total)
            total += len(segment)
        self.size = total if size is None else size
        self.ranges = tuple(ranges)
        self.read_only = read_only
        self.ffa = ffa
        self.handle: object | None = None

    @classmethod
    def of(cls, data: bytearray | memoryview) -> Memory:
        """Memory over one buffer of this process."""
        return cls((memoryview(data).cast("B"),))

    @property
    def segments(self) -> tuple[memoryview, ...]:
        """This side's views, in order; empty after :meth:`forget` and for an FF-A handle."""
        return self._segments

    def view(self, offset: int, size: int) -> memoryview | None:
        """The bytes in place, or None where they lie in more than one segment. Raises ValueError outside the memory."""
        self._check(offset, size)
        if len(self._segments) == 1:
            return self._segments[0][offset : offset + size]
        pieces = self._pieces(offset, size)
        return pieces[0] if len(pieces) == 1 else None

    def read(self, offset: int, size: int) -> bytes:
        """A private copy of ``size`` bytes. Raises ValueError outside the memory."""
        self._check(offset, size)
        if len(self._segments) == 1:
            return bytes(self._segments[0][offset : offset + size])
        return b"".join(self._pieces(offset, size))

    def write(self, offset: int, data: bytes | bytearray | memoryview) -> None:
        """Copy ``data`` in. Raises ValueError outside the memory or where it is read-only."""
        self._check(offset, len(data))
        if self.read_only:
            raise ValueError("memory is read-only")
        if len(self._segments) == 1:
            self._segments[0][offset : offset + len(data)] = data
            return
        done = 0
        for piece in self._pieces(offset, len(data)):
            piece[:] = data[done : done + len(piece)]
            done += len(piece)

    def pieces(self, offset: int, size: int) -> list[memoryview]:
        """The bytes in place, in order. Raises ValueError outside the memory."""
        self._check(offset, size)
        return self._pieces(offset, size)

    def forget(self) -> None:
        """Give up the views: from here on nothing can be read or written through this object."""
        self._segments = ()
        self._starts = []
        self.size = 0

    def _check(self, offset: int, size: int) -> None:
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{size} bytes at offset {offset} are outside a memory of {self.size} bytes")
        if size and not self._segments:
            raise ValueError("this side has no mapping of the memory")

    def _pieces(self, offset: int, size: int) -> list[memoryview]:
        pieces: list[memoryview] = []
        index = bisect_right(self._starts, offset) - 1
        while size > 0:
            segment = self._segments[index]
            start = offset - self._starts[index]
            piece = segment[start : start + size]
            if len(piece):
                pieces.append(piece)
            offset += len(piece)
            size -= len(piece)
            index += 1
        return pieces
