"""Mapping guest memory, with what can be known about it checked first.

A file that shrinks after it was mapped kills whoever touches the lost part, by SIGBUS. Only a memfd sealed against
shrinking excludes that, so others are reported once, or refused.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import stat

from pyvhost.errors import MemoryFault
from pyvhost.memory import Mapping

__all__ = ["Mapper", "allocate"]

log = logging.getLogger("pyvhost")

_F_ADD_SEALS = getattr(fcntl, "F_ADD_SEALS", 1033)
_F_GET_SEALS = getattr(fcntl, "F_GET_SEALS", 1034)
_F_SEAL_SEAL = getattr(fcntl, "F_SEAL_SEAL", 1)
_F_SEAL_SHRINK = getattr(fcntl, "F_SEAL_SHRINK", 2)
_F_SEAL_GROW = getattr(fcntl, "F_SEAL_GROW", 4)


def is_sealed(fd: int) -> bool:
    """Whether ``fd`` is a file that cannot shrink any more."""
    try:
        return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK)
    except OSError:
        return False  # not a memfd


def allocate(size: int, name: str = "pyvhost-inflight") -> int:
    """A new file descriptor of ``size`` zeroed bytes of shared memory, sealed against changes of its size.

    :raises MemoryFault: the system has none
    """
    try:
        fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError as e:
        raise MemoryFault(f"no shared memory: {e}") from None
    try:
        os.ftruncate(fd, size)
        fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_SEAL)
    except OSError as e:
        os.close(fd)
        raise MemoryFault(f"no shared memory: {e}") from None
    return fd


class Mapper:
    """Maps regions for one frontend; ``require_sealed`` refuses memory that could shrink."""

    __slots__ = ("_require_sealed", "_warned")

    def __init__(self, require_sealed: bool = False) -> None:
        self._require_sealed = require_sealed
        self._warned = False

    def map(self, fd: int, size: int, offset: int) -> Mapping:
        """Map ``size`` bytes of the file ``fd`` from ``offset`` on, shared and writable. The fd stays the caller's.

        :raises MemoryFault: not a regular file, shorter than ``offset + size``, sealed too little, or refused by the
            kernel
        """
        try:
            status = os.fstat(fd)
        except OSError as e:
            raise MemoryFault(f"guest memory cannot be examined: {e.strerror}") from None
        if not stat.S_ISREG(status.st_mode):
            raise MemoryFault("guest memory that is not a file")
        if size <= 0 or offset < 0 or offset + size > status.st_size:
            raise MemoryFault(f"guest memory of {status.st_size} bytes, region at {offset}+{size}")
        if not is_sealed(fd):
            if self._require_sealed:
                raise MemoryFault("guest memory that is not sealed against shrinking")
            if not self._warned:
                self._warned = True
                log.warning(
                    "guest memory is not sealed: if the frontend truncates it, this process is killed by SIGBUS"
                )
        lead = offset % mmap.ALLOCATIONGRANULARITY
        try:
            mapped = mmap.mmap(fd, lead + size, mmap.MAP_SHARED, offset=offset - lead)
        except (OSError, ValueError, OverflowError) as e:
            raise MemoryFault(f"guest memory cannot be mapped: {e}") from None

        def close() -> None:
            # Slices may still be held (requests in flight): then it is unmapped when the last of them is dropped.
            with contextlib.suppress(BufferError):
                mapped.close()

        return Mapping(memoryview(mapped)[lead:], close)
