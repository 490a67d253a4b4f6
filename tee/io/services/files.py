"""FS: OP-TEE's REE file system, all its operations, in a :class:`~tee.io.services.file_store.FileStore`.

The first parameter is an IN value whose ``a`` is the operation; names are strings that end with NUL, in IN memory.

===========  =========================================  ============================================================
operation    first value                                further parameters
===========  =========================================  ============================================================
0 OPEN       –                                          [IN name], [OUT a = handle]
1 CREATE     –                                          [IN name], [OUT a = handle]
2 CLOSE      b = handle                                 –
3 READ       b = handle, c = offset                     [OUT data; answered size = bytes read]
4 WRITE      b = handle, c = offset                     [IN data]
5 TRUNCATE   b = handle, c = length                     –
6 REMOVE     –                                          [IN name]
7 RENAME     b ≠ 0: replace what has the name           [IN old name], [IN new name]
8 OPENDIR    –                                          [IN name], [OUT a = handle]
9 CLOSEDIR   b = handle                                 –
10 READDIR   b = handle                                 [OUT name; answered size with its NUL]
===========  =========================================  ============================================================
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from tee.io.services.base import (
    Allocator,
    Log,
    ReplyError,
    Result,
    bad,
    count,
    memory_of,
    memref,
    put,
    refuse,
    resized,
    text,
    value,
)
from tee.io.services.file_store import MAX_NAME, FileStore
from tee.params import Direction, MemRef, Param, Value
from tee.results import TeeError
from tee.rpc import FsCommand

_CODES = {
    errno.ENOSPC: Result.STORAGE_NO_SPACE,
    errno.EDQUOT: Result.STORAGE_NO_SPACE,
    errno.ENOENT: Result.ITEM_NOT_FOUND,
    errno.EEXIST: Result.ACCESS_CONFLICT,
    errno.EMFILE: Result.OUT_OF_MEMORY,
    errno.ENFILE: Result.OUT_OF_MEMORY,
}

_USUAL = frozenset({Result.ITEM_NOT_FOUND, Result.ACCESS_CONFLICT})
"""Answers that are not worth a line in the log."""


class Files:
    """Serves FS on ``store``."""

    def __init__(self, store: FileStore, log: Log) -> None:
        self.store = store
        self._log = log

    def close(self) -> None:
        """Close all files."""
        self.store.close_all()

    def serve(self, params: list[Param], _: Allocator) -> list[Param]:
        """FS."""
        what = value(params, 0, Direction.IN)
        operation = _OPERATIONS.get(what.a)
        if operation is None:
            raise bad(f"file operation {what.a}")
        number, run = operation
        count(params, number)
        try:
            return run(self, what, params)
        except TeeError as error:
            if error.code in _USUAL:
                raise refuse(error.code, "") from None
            raise
        except OSError as error:
            code = _CODES.get(error.errno or 0, Result.GENERIC)
            if code is Result.STORAGE_NO_SPACE:
                self._log(f"the disk with the TEE's files is full, and TAs get STORAGE_NO_SPACE: make room ({error})")
            elif code is Result.GENERIC:
                self._log(f"{FsCommand(what.a).name} of a TEE's file failed: look at its folder and disk ({error})")
            raise refuse(code, "") from None

    def _open(self, what: Value, params: list[Param]) -> list[Param]:
        return self._handle(self.store.open, params)

    def _create(self, what: Value, params: list[Param]) -> list[Param]:
        return self._handle(self.store.create, params)

    def _opendir(self, what: Value, params: list[Param]) -> list[Param]:
        return self._handle(self.store.open_folder, params)

    def _handle(self, get: Callable[[bytes], int], params: list[Param]) -> list[Param]:
        name, answer = memref(params, 1, Direction.IN), value(params, 2, Direction.OUT)
        return [params[0], name, Value(Direction.OUT, get(_name(name)), answer.b, answer.c)]

    def _close(self, what: Value, params: list[Param]) -> list[Param]:
        self.store.close(what.b)
        return params

    def _read(self, what: Value, params: list[Param]) -> list[Param]:
        target = memref(params, 1, Direction.OUT)
        done = self.store.read(what.b, what.c, memory_of(target), target.offset, target.size)
        return [what, resized(target, done)]

    def _write(self, what: Value, params: list[Param]) -> list[Param]:
        source = memref(params, 1, Direction.IN)
        self.store.write(what.b, what.c, memory_of(source), source.offset, source.size)
        return params

    def _truncate(self, what: Value, params: list[Param]) -> list[Param]:
        self.store.truncate(what.b, what.c)
        return params

    def _remove(self, what: Value, params: list[Param]) -> list[Param]:
        self.store.remove(_name(memref(params, 1, Direction.IN)))
        return params

    def _rename(self, what: Value, params: list[Param]) -> list[Param]:
        old, new = _name(memref(params, 1, Direction.IN)), _name(memref(params, 2, Direction.IN))
        self.store.rename(old, new, bool(what.b))
        return params

    def _closedir(self, what: Value, params: list[Param]) -> list[Param]:
        self.store.close_folder(what.b)
        return params

    def _readdir(self, what: Value, params: list[Param]) -> list[Param]:
        target = memref(params, 1, Direction.OUT)
        memory_of(target).view(target.offset, target.size)  # raises where that is outside the memory
        name = self.store.next_name(what.b, target.size)
        if len(name) > target.size:
            raise ReplyError(Result.SHORT_BUFFER, [what, resized(target, len(name))])
        return [what, put(target, name)]


def _name(reference: MemRef) -> bytes:
    return text(reference, MAX_NAME)


_OPERATIONS: dict[int, tuple[int, Callable[[Files, Value, list[Param]], list[Param]]]] = {
    FsCommand.OPEN: (3, Files._open),
    FsCommand.CREATE: (3, Files._create),
    FsCommand.CLOSE: (1, Files._close),
    FsCommand.READ: (2, Files._read),
    FsCommand.WRITE: (2, Files._write),
    FsCommand.TRUNCATE: (1, Files._truncate),
    FsCommand.REMOVE: (2, Files._remove),
    FsCommand.RENAME: (3, Files._rename),
    FsCommand.OPENDIR: (3, Files._opendir),
    FsCommand.CLOSEDIR: (1, Files._closedir),
    FsCommand.READDIR: (2, Files._readdir),
}
"""Operation → how many parameters it has, and what serves it."""
