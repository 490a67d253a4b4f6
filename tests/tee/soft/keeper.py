"""A supplicant that a test plays: files as the real tee-supplicant keeps them, held to its parameter layouts.

It serves from memory, and a test can look into it, change what it has, or have it lie (``change``).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

from tee.params import Direction, MemRef, Param, Value
from tee.results import Result
from tee.rpc import FsCommand, Rpc, RpcCommand, RpcReply
from tests.tee.bench import Bench, Courier

_IN = (Value, Direction.IN)
_OPENS = [_IN, (MemRef, Direction.IN), (Value, Direction.OUT)]
_READS = [_IN, (MemRef, Direction.OUT)]
_NAMES = [_IN, (MemRef, Direction.IN)]
LAYOUTS: dict[int, list[tuple[type, Direction]]] = {
    FsCommand.OPEN: _OPENS,
    FsCommand.CREATE: _OPENS,
    FsCommand.CLOSE: [_IN],
    FsCommand.READ: _READS,
    FsCommand.WRITE: _NAMES,
    FsCommand.TRUNCATE: [_IN],
    FsCommand.REMOVE: _NAMES,
    FsCommand.RENAME: [*_NAMES, (MemRef, Direction.IN)],
    FsCommand.OPENDIR: _OPENS,
    FsCommand.CLOSEDIR: [_IN],
    FsCommand.READDIR: _READS,
}
"""What tee_supp_fs.c insists on, by command."""

Change = Callable[[Rpc, RpcReply], RpcReply | None]


class Refused(Exception):  # noqa: N818
    """With a code."""


class Keeper(Courier):
    """See the module's text. ``files`` has the content of files by name."""

    def __init__(self, bench: Bench, data: bytes = b"", *, vm: str = "") -> None:
        super().__init__(bench, data, vm=vm)
        self.files: dict[str, bytes] = {}
        self.handles: dict[int, str | list[str]] = {}
        self.commands: list[FsCommand] = []
        self.present = True
        self._numbers = itertools.count(3)

    def answer(self, rpc: Rpc) -> RpcReply:
        if rpc.command != RpcCommand.FS:
            return super().answer(rpc)
        if not self.present:
            return RpcReply(Result.NOT_SUPPORTED)
        first = rpc.params[0]
        assert isinstance(first, Value)
        assert [(type(p), p.direction) for p in rpc.params] == LAYOUTS[first.a]  # type: ignore[union-attr]
        command = FsCommand(first.a)
        self.commands.append(command)
        try:
            return RpcReply(params=self._serve(command, first, rpc.params))
        except Refused as refused:
            return RpcReply(refused.args[0])

    def _serve(self, command: FsCommand, first: Value, params: list[Param]) -> list[Param]:
        if command in (FsCommand.OPEN, FsCommand.CREATE):
            name = text(params[1])
            if command == FsCommand.CREATE:
                self.files[name] = b""
            return [*params[:2], Value(Direction.OUT, self._open(name))]
        if command == FsCommand.OPENDIR:
            folder = text(params[1]) + "/"
            names = [name.removeprefix(folder) for name in self.files if name.startswith(folder)]
            return [*params[:2], Value(Direction.OUT, self._open(names))]
        if first.b not in self.handles and command not in (FsCommand.REMOVE, FsCommand.RENAME):
            raise Refused(Result.BAD_PARAMETERS)
        if command in (FsCommand.CLOSE, FsCommand.CLOSEDIR):
            del self.handles[first.b]
        elif command == FsCommand.READ:
            content = self.files[self._name(first)][first.c :]
            return [params[0], put(params[1], content)]
        elif command == FsCommand.WRITE:
            name, data = self._name(first), get(params[1])
            old = self.files[name].ljust(first.c, b"\0")
            self.files[name] = old[: first.c] + data + old[first.c + len(data) :]
        elif command == FsCommand.REMOVE:
            if self.files.pop(text(params[1]), None) is None:
                raise Refused(Result.ITEM_NOT_FOUND)
        elif command == FsCommand.RENAME:
            assert first.b
            self.files[text(params[2])] = self.files.pop(text(params[1]))
        elif command == FsCommand.READDIR:
            names = self.handles[first.b]
            assert isinstance(names, list)
            if not names:
                raise Refused(Result.ITEM_NOT_FOUND)
            return [params[0], put(params[1], names.pop(0).encode() + b"\0")]
        return params

    def _open(self, what: str | list[str]) -> int:
        if not what or (isinstance(what, str) and what not in self.files):
            raise Refused(Result.ITEM_NOT_FOUND)
        handle = next(self._numbers)
        self.handles[handle] = what
        return handle

    def _name(self, first: Value) -> str:
        name = self.handles[first.b]
        assert isinstance(name, str)
        return name


def get(param: Param) -> bytes:
    assert isinstance(param, MemRef)
    assert param.memory is not None
    return param.memory.read(param.offset, param.size)


def text(param: Param) -> str:
    """A file name, as C sees it."""
    name = get(param)
    assert name.endswith(b"\0")
    name = name.removesuffix(b"\0")
    assert set(name) <= set(b"abcdefghijklmnopqrstuvwxyz0123456789./"), name
    assert len(name) < 150
    assert name.count(b"/") <= 1
    assert not name.startswith(b".")
    return name.decode()


def put(param: Param, data: bytes) -> MemRef:
    """An answer in memory."""
    assert isinstance(param, MemRef)
    assert param.memory is not None
    data = data[: param.size]
    param.memory.write(param.offset, data)
    return MemRef(Direction.OUT, param.memory, param.offset, len(data))
