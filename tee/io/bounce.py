"""Memory of our own for what the TEE cannot use in place: shared with it when we start, and never given up, so that no
client can use up what the TEE takes (OP-TEE over FF-A: 63 regions).

Each thread that makes calls has a part of it. A part holds zeros between calls: a TA that reads beyond what it was
given finds nothing of another's.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass

from tee.io.linux import LinuxTee, Shm

_ALIGNMENT = 64
"""Bytes: no two parameters share a cache line."""


@dataclass(slots=True)
class Taken:
    """``view`` are bytes of a part; the TEE knows them as those at ``offset`` of the shared memory ``ident``."""

    ident: int
    offset: int
    view: memoryview


class Part:
    """One thread's."""

    def __init__(self, shm: Shm, offset: int, size: int) -> None:
        self.size = size
        self._shm = shm
        self._offset = offset
        self._view = shm.data[offset : offset + size]
        self._used = 0

    def close(self) -> None:
        """The TEE shall forget it, and the others of the same region. May block."""
        self._shm.close()

    @staticmethod
    def needed(size: int) -> int:
        """How many bytes of a part are taken up by ``size``."""
        return -(-size // _ALIGNMENT) * _ALIGNMENT

    def take(self, size: int) -> Taken:
        """Room for ``size`` bytes, all zero. The caller has seen to it that there is enough."""
        at, self._used = self._used, self._used + self.needed(size)
        assert self._used <= self.size
        return Taken(self._shm.id, self._offset + at, self._view[at : at + size])

    def clear(self) -> None:
        """Give all of it back."""
        used, self._used = self._used, 0
        for at in range(0, used, len(_ZEROS)):
            end = min(used, at + len(_ZEROS))
            self._view[at:end] = _ZEROS[: end - at]


_ZEROS = memoryview(bytes(1 << 18))


def parts(device: LinuxTee, count: int, size: int, *, registered: bool) -> list[Part]:
    """``count`` parts of ``size`` bytes each, which is rounded up to whole pages. ``registered``: of this process's
    memory, as one region; otherwise the kernel has to allocate each. Raises OSError."""
    size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    if registered:
        shm = device.register(mmap.mmap(-1, count * size))
        return [Part(shm, number * size, size) for number in range(count)]
    return [Part(device.allocate(size), 0, size) for _ in range(count)]
