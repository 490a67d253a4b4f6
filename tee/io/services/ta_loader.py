"""LOAD_TA: TA files by UUID."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from uuid import UUID

from tee.io.services.base import Allocator, Log, ReplyError, Result, bad, refuse
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import TeeError

#: The largest TA file in bytes.
MAX_TA_SIZE = 16 << 20


class TaLoader:
    """Finds ``<uuid>.ta`` directly in one of ``folders``, searched in order. A name is made from a UUID's 128 bits
    only; symbolic links are not followed."""

    def __init__(self, folders: Sequence[str | os.PathLike[str]], max_size: int, log: Log) -> None:
        self._folders = tuple(Path(folder) for folder in folders)
        self._max_size = max_size
        self._log = log

    def serve(self, params: list[Param], _: Allocator) -> list[Param]:
        """LOAD_TA, as the real supplicant does it: without memory it answers the size; where the memory is too small
        SHORT_BUFFER, with the size."""
        name, target = params if len(params) == 2 else (Nothing(), Nothing())
        if not isinstance(name, Value) or name.direction != Direction.IN:
            raise bad("LOAD_TA names its TA by a value")
        if not isinstance(target, MemRef) or target.direction != Direction.OUT:
            raise bad("LOAD_TA has a memory reference for its answer")
        try:
            uuid = UUID(bytes=name.a.to_bytes(8, "little") + name.b.to_bytes(8, "little"))
        except OverflowError:
            raise bad("LOAD_TA names its TA by two words of 64 bits") from None
        fd = self._open(uuid)
        try:
            size = self._size(fd, uuid)
            answer = MemRef(Direction.OUT, target.memory, target.offset, size)
            if target.memory is None:
                return [name, answer]
            if size > target.size:
                raise ReplyError(Result.SHORT_BUFFER, [name, answer])
            answer.size = _read_into(fd, target.memory, target.offset, size)
            return [name, answer]
        finally:
            os.close(fd)

    def read(self, uuid: UUID) -> bytes | None:
        """The whole TA, or None where there is none. Raises OSError, and TeeError OUT_OF_MEMORY."""
        try:
            fd = self._open(uuid)
        except TeeError:
            return None
        with open(fd, "rb") as file:
            return file.read(self._size(fd, uuid))

    def _size(self, fd: int, uuid: UUID) -> int:
        size = os.fstat(fd).st_size
        if size > self._max_size:
            raise refuse(
                Result.OUT_OF_MEMORY,
                f"{uuid}.ta has {size} bytes, and {self._max_size} are the limit: is it really a TA?",
            )
        return size

    def _open(self, uuid: UUID) -> int:
        """A file descriptor of the TA's file: a regular file, directly in one of the folders."""
        for folder in self._folders:
            try:
                # Not blocking: a FIFO of that name must not hold the supplicant.
                fd = os.open(folder / f"{uuid}.ta", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    self._log(f"{uuid}.ta cannot be opened, so it is looked for in the next folder: {error}")
                continue
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            self._log(f"{uuid}.ta in {folder} is not a regular file: put the TA itself there")
            os.close(fd)
        searched = ", ".join(map(str, self._folders)) or "no folder: name one with --ta-folder"
        raise refuse(Result.ITEM_NOT_FOUND, f"there is no {uuid}.ta (searched: {searched})")


def _read_into(fd: int, memory: Memory, offset: int, size: int) -> int:
    """Read up to ``size`` bytes of a file into ``memory``; returns how many there were."""
    with closing(os.fdopen(fd, "rb", buffering=0, closefd=False)) as file:
        view = None if memory.read_only else memory.view(offset, size)
        if view is None:
            data = file.read(size)
            memory.write(offset, data)
            return len(data)
        done = 0
        while done < size:
            got = file.readinto(view[done:])
            if not got:
                break
            done += got
        return done
