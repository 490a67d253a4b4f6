"""The REE file system: OP-TEE's operations on a folder that is never left, against a model and against attacks."""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import tempfile
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from tee.io.services import file_store
from tee.io.services.file_store import MAX_DEPTH, MAX_NAME, FileLimits, FileStore, components
from tee.io.supplicant import Supplicant
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result, TeeError
from tee.rpc import FsCommand, Rpc, RpcCommand, RpcReply
from tests.tee.io.test_supplicant import Pool

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT


class Fs:
    """A TEE that uses its file system, by RPCs in OP-TEE's layouts."""

    def __init__(self, folder: Path, limits: FileLimits | None = None, sync: bool = False) -> None:
        self.logged: list[str] = []
        self.store = FileStore(folder, limits, sync=sync)
        self.supplicant = Supplicant(files=self.store, log=self.logged.append)
        self.pool = Pool()

    def ask(self, operation: int, *params: Param, b: int = 0, c: int = 0) -> RpcReply:
        what: list[Param] = [Value(IN, operation, b, c), *params]
        reply = self.supplicant.serve(Rpc(RpcCommand.FS, what), self.pool)
        if reply.code == Result.SUCCESS:
            assert len(reply.params) == len(what)
            assert [type(p) for p in reply.params] == [type(p) for p in what]
        return reply

    def _handle(self, operation: int, name: bytes) -> tuple[int, int]:
        reply = self.ask(operation, text(name), Value(OUT))
        answer = reply.params[2] if reply.params else Value(OUT)
        assert isinstance(answer, Value)
        return reply.code, answer.a

    def open(self, name: bytes) -> tuple[int, int]:
        return self._handle(FsCommand.OPEN, name)

    def create(self, name: bytes) -> tuple[int, int]:
        return self._handle(FsCommand.CREATE, name)

    def opendir(self, name: bytes) -> tuple[int, int]:
        return self._handle(FsCommand.OPENDIR, name)

    def made(self, name: bytes, content: bytes = b"") -> int:
        code, handle = self.create(name)
        assert code == Result.SUCCESS
        assert self.write(handle, 0, content) == Result.SUCCESS
        return handle

    def close(self, handle: int) -> int:
        return self.ask(FsCommand.CLOSE, b=handle).code

    def read(self, handle: int, offset: int, size: int) -> tuple[int, bytes]:
        memory = Memory.of(bytearray(size + 2))
        reply = self.ask(FsCommand.READ, MemRef(OUT, memory, 1, size), b=handle, c=offset)
        if reply.code != Result.SUCCESS:
            return reply.code, b""
        answer = reply.params[1]
        assert isinstance(answer, MemRef)
        assert (memory.read(0, 1), memory.read(1 + answer.size, 1)) == (b"\0", b"\0")
        return reply.code, memory.read(1, answer.size)

    def write(self, handle: int, offset: int, content: bytes) -> int:
        source = MemRef(IN, Memory.of(bytearray(b"<" + content + b">")), 1, len(content))
        return self.ask(FsCommand.WRITE, source, b=handle, c=offset).code

    def truncate(self, handle: int, size: int) -> int:
        return self.ask(FsCommand.TRUNCATE, b=handle, c=size).code

    def remove(self, name: bytes) -> int:
        return self.ask(FsCommand.REMOVE, text(name)).code

    def rename(self, old: bytes, new: bytes, overwrite: bool) -> int:
        return self.ask(FsCommand.RENAME, text(old), text(new), b=overwrite).code

    def names(self, name: bytes) -> list[bytes]:
        code, handle = self.opendir(name)
        found: list[bytes] = []
        while code == Result.SUCCESS:
            target = MemRef(OUT, Memory.of(bytearray(300)), 0, 300)
            reply = self.ask(FsCommand.READDIR, target, b=handle)
            code = reply.code
            if code == Result.SUCCESS:
                answer = reply.params[1]
                assert isinstance(answer, MemRef)
                assert answer.memory is not None
                found.append(answer.memory.read(0, answer.size)[:-1])
        assert code == Result.ITEM_NOT_FOUND
        if found:
            assert self.ask(FsCommand.CLOSEDIR, b=handle).code == Result.SUCCESS
        return found


def text(name: bytes, room: int = 350) -> MemRef:
    """A name as OP-TEE passes it: in memory of a fixed size, with rubbish after its NUL."""
    data = (name + b"\0").ljust(room, b"\xa5")
    return MemRef(IN, Memory.of(bytearray(data)), 0, len(data))


@pytest.fixture
def fs(tmp_path: Path) -> Fs:
    return Fs(tmp_path / "outer" / "files")


@pytest.mark.feature("Supplicant: OP-TEE's REE file system, in one folder that it never leaves")
class TestOperations:
    def test_a_files_life(self, fs: Fs, tmp_path: Path) -> None:
        handle = fs.made(b"/dirf.db", b"content")
        assert (tmp_path / "outer/files/dirf.db").read_bytes() == b"content"
        assert stat.S_IMODE((tmp_path / "outer/files/dirf.db").stat().st_mode) == 0o600
        assert fs.read(handle, 3, 100) == (Result.SUCCESS, b"tent")
        assert fs.read(handle, 7, 1) == fs.read(handle, (1 << 63) - 1, 1) == (Result.SUCCESS, b"")
        assert fs.write(handle, 9, b"end") == Result.SUCCESS
        assert fs.read(handle, 0, 100) == (Result.SUCCESS, b"content\0\0end")
        assert fs.truncate(handle, 3) == Result.SUCCESS
        assert fs.close(handle) == Result.SUCCESS
        assert fs.close(handle) == Result.BAD_PARAMETERS
        code, again = fs.open(b"dirf.db")
        assert (code, fs.read(again, 0, 9)) == (Result.SUCCESS, (Result.SUCCESS, b"con"))
        assert again != handle
        fs.made(b"/dirf.db")
        assert fs.read(again, 0, 9) == (Result.SUCCESS, b"")
        assert fs.remove(b"/dirf.db") == Result.SUCCESS
        assert fs.open(b"/dirf.db")[0] == fs.remove(b"/dirf.db") == Result.ITEM_NOT_FOUND

    def test_folders_come_and_go(self, fs: Fs, tmp_path: Path) -> None:
        for name in (b"/ta/one", b"/ta/two", b"/ta/x/three", b"/.hidden"):
            fs.made(name)
        assert fs.names(b"/ta") == [b"one", b"two", b"x"]
        assert fs.names(b"/") == fs.names(b"") == [b"ta"]
        for name in (b"/ta/one", b"/ta/x/three", b"/ta/two"):
            assert fs.remove(name) == Result.SUCCESS
        assert fs.opendir(b"/ta")[0] == Result.ITEM_NOT_FOUND
        assert fs.opendir(b"/")[0] == Result.ITEM_NOT_FOUND  # nothing that is seen
        assert os.listdir(tmp_path / "outer/files") == [".hidden"]

    def test_rename(self, fs: Fs) -> None:
        fs.made(b"/a", b"1")
        kept = fs.made(b"/b", b"22")
        assert fs.rename(b"/a", b"/b", False) == Result.ACCESS_CONFLICT
        assert fs.rename(b"/none", b"/c", False) == Result.ITEM_NOT_FOUND
        assert fs.rename(b"/a", b"/none/c", True) == Result.ITEM_NOT_FOUND
        assert fs.rename(b"/a", b"/a", False) == Result.ACCESS_CONFLICT
        assert fs.rename(b"/a", b"/a", True) == Result.SUCCESS
        assert fs.rename(b"/a", b"/b", True) == Result.SUCCESS
        assert fs.rename(b"/b", b"/c", False) == Result.SUCCESS
        assert fs.read(fs.open(b"/c")[1], 0, 9) == (Result.SUCCESS, b"1")
        assert fs.read(kept, 0, 9) == (Result.SUCCESS, b"22")  # replaced, but open
        fs.made(b"/d/x")
        assert fs.rename(b"/d", b"/e", False) == Result.BAD_PARAMETERS

    @pytest.mark.parametrize("number", [errno.ENOSYS, errno.EINVAL])
    def test_rename_where_the_file_system_cannot_refuse(
        self, fs: Fs, monkeypatch: pytest.MonkeyPatch, number: int
    ) -> None:
        monkeypatch.setattr(file_store, "_RENAMEAT2", lambda *_: -1)
        monkeypatch.setattr(ctypes, "get_errno", lambda: number)
        fs.made(b"/a", b"1")
        fs.made(b"/b", b"2")
        assert fs.rename(b"/a", b"/b", False) == Result.ACCESS_CONFLICT
        assert fs.rename(b"/a", b"/c", False) == Result.SUCCESS

    def test_what_is_usual_is_not_logged(self, fs: Fs) -> None:
        fs.open(b"/none")
        fs.remove(b"/none")
        fs.opendir(b"/")
        fs.made(b"/a")
        fs.rename(b"/a", b"/a", False)
        fs.names(b"/")
        assert fs.logged == []
        fs.open(b"/..")
        assert len(fs.logged) == 1

    def test_names_into_small_memory(self, fs: Fs) -> None:
        fs.made(b"/long-name")
        handle = fs.opendir(b"/")[1]
        small, large = Memory.of(bytearray(9)), Memory.of(bytearray(10))
        reply = fs.ask(FsCommand.READDIR, MemRef(OUT, small, 0, 9), b=handle)
        assert (reply.code, reply.params[1]) == (Result.SHORT_BUFFER, MemRef(OUT, small, 0, 10))
        assert small.read(0, 9) == bytes(9)
        assert fs.ask(FsCommand.READDIR, MemRef(OUT, large, 0, 10), b=handle).code == Result.SUCCESS
        assert large.read(0, 10) == b"long-name\0"
        assert fs.ask(FsCommand.READDIR, MemRef(OUT, large, 0, 10), b=handle).code == Result.ITEM_NOT_FOUND

    def test_memory_in_pieces(self, fs: Fs) -> None:
        handle = fs.made(b"/a")
        memory = Memory([memoryview(bytearray(b"con")), memoryview(bytearray(b"tent"))])
        assert fs.ask(FsCommand.WRITE, MemRef(IN, memory, 0, 7), b=handle).code == Result.SUCCESS
        target = Memory([memoryview(bytearray(2)), memoryview(bytearray(5))])
        assert fs.ask(FsCommand.READ, MemRef(OUT, target, 0, 7), b=handle).code == Result.SUCCESS
        assert target.read(0, 7) == b"content"

    def test_more_than_is_copied_at_a_time(self, fs: Fs, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(file_store, "CHUNK", 5)
        handle = fs.made(b"/a", bytes(range(23)))
        assert fs.read(handle, 1, 30) == (Result.SUCCESS, bytes(range(1, 23)))

    def test_read_only_files_can_be_read(self, fs: Fs, monkeypatch: pytest.MonkeyPatch) -> None:
        fs.made(b"/a", b"content")
        real = os.open

        def read_only(path: bytes, flags: int, *args: int, **kw: int) -> int:
            if flags & os.O_RDWR:
                raise OSError(errno.EROFS, "read-only")
            return real(path, flags, *args, **kw)

        monkeypatch.setattr(os, "open", read_only)
        code, handle = fs.open(b"/a")
        assert (code, fs.read(handle, 0, 9)) == (Result.SUCCESS, (Result.SUCCESS, b"content"))
        assert fs.write(handle, 0, b"x") == Result.GENERIC

    @pytest.mark.parametrize("sync", [True, False])
    def test_what_was_answered_is_on_the_disk(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sync: bool
    ) -> None:
        synced: list[int] = []
        monkeypatch.setattr(os, "fsync", lambda fd: synced.append(stat.S_IFMT(os.fstat(fd).st_mode)))
        fs = Fs(tmp_path, sync=sync)
        handle = fs.made(b"/d/a", b"1")
        assert synced == ([stat.S_IFDIR] * 2 if sync else [])
        assert bool(fs.store._flags & os.O_DSYNC) is sync
        fs.truncate(handle, 0)
        fs.rename(b"/d/a", b"/d/b", True)
        fs.remove(b"/d/b")
        assert len(synced) == (6 if sync else 0)


HOSTILE = [
    b"..",
    b"../x",
    b"/../x",
    b"a/../../x",
    b"d/../x",
    b".",
    b"./x",
    b"d/./x",
    b"",
    b"/",
    b"//",
    b"d//x",
    b"d/",
    b"x" * 256,
    b"x" * 4096,
    b"x/" * 2048,
    b"/".join([b"x"] * (MAX_DEPTH + 1)),
]


class TestAttacks:
    @pytest.mark.parametrize("name", HOSTILE, ids=lambda n: n[:16].decode() + f"[{len(n)}]")
    def test_names(self, fs: Fs, tmp_path: Path, name: bytes) -> None:
        (tmp_path / "outer/x").write_bytes(b"secret")
        fs.made(b"/d/y")
        memory = text(name, 5000)
        for operation in (FsCommand.OPEN, FsCommand.CREATE):
            assert fs.ask(operation, memory, Value(OUT)).code == Result.BAD_PARAMETERS
        assert fs.ask(FsCommand.REMOVE, memory).code == Result.BAD_PARAMETERS
        assert fs.ask(FsCommand.RENAME, memory, text(b"/z")).code == Result.BAD_PARAMETERS
        assert fs.ask(FsCommand.RENAME, text(b"/d/y"), memory, b=1).code == Result.BAD_PARAMETERS
        if name.strip(b"/"):
            assert fs.ask(FsCommand.OPENDIR, memory, Value(OUT)).code == Result.BAD_PARAMETERS
        assert sorted(os.listdir(tmp_path / "outer")) == ["files", "x"]
        assert (tmp_path / "outer/x").read_bytes() == b"secret"
        assert fs.names(b"/") == [b"d"]

    def test_a_name_ends_at_its_nul(self, fs: Fs) -> None:
        fs.made(b"/a\0/../b")
        assert fs.names(b"/") == [b"a"]

    @pytest.mark.parametrize(
        "reference",
        [
            MemRef(IN, Memory.of(bytearray(b"abc")), 0, 3),  # no NUL
            MemRef(IN, Memory.of(bytearray(b"x" * 5000)), 0, 5000),
            MemRef(IN, Memory.of(bytearray()), 0, 0),
            MemRef(IN, Memory.of(bytearray(b"a\0")), 1, 2),
            MemRef(IN, Memory.of(bytearray(b"a\0")), -1, 2),
            MemRef(IN, Memory(size=100), 0, 100),
            MemRef(IN, None, 0, 100),
            MemRef(OUT, Memory.of(bytearray(b"a\0")), 0, 2),
        ],
    )
    def test_memory_of_names(self, fs: Fs, reference: MemRef) -> None:
        assert fs.ask(FsCommand.CREATE, reference, Value(OUT)).code == Result.BAD_PARAMETERS
        assert fs.names(b"/") == []

    @pytest.mark.parametrize("where", ["inside", "outside", "folder", "nowhere", "itself"])
    def test_links_are_not_followed(self, fs: Fs, tmp_path: Path, where: str) -> None:
        (tmp_path / "outer/secrets").mkdir()
        (tmp_path / "outer/secrets/f").write_bytes(b"secret")
        fs.made(b"/mine", b"mine")
        link = tmp_path / "outer/files/link"
        target = {"inside": "mine", "outside": "../secrets/f", "folder": "../secrets", "nowhere": "n", "itself": "link"}
        link.symlink_to(target[where])
        assert fs.open(b"/link")[0] == fs.open(b"/link/f")[0] == Result.ITEM_NOT_FOUND
        assert fs.create(b"/link")[0] == fs.create(b"/link/f")[0] == fs.create(b"/link/n")[0] == Result.GENERIC
        assert fs.opendir(b"/link")[0] == Result.ITEM_NOT_FOUND
        assert fs.remove(b"/link/f") == fs.rename(b"/link/f", b"/f", True) == Result.GENERIC
        assert fs.rename(b"/mine", b"/link/f", True) == Result.GENERIC
        assert fs.rename(b"/link", b"/f", True) == Result.BAD_PARAMETERS
        assert (tmp_path / "outer/secrets/f").read_bytes() == b"secret"
        assert os.listdir(tmp_path / "outer/secrets") == ["f"]
        # a name that is a link can be taken back: the link goes, not what it points to
        assert fs.rename(b"/mine", b"/link", True) == Result.SUCCESS
        assert (link.is_symlink(), link.read_bytes()) == (False, b"mine")

    @pytest.mark.parametrize("kind", ["fifo", "socket"])
    def test_what_is_no_file(self, fs: Fs, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "outer/files/thing"
        if kind == "fifo":
            os.mkfifo(path)
        else:
            os.mknod(path, 0o600 | stat.S_IFSOCK)
        assert fs.open(b"/thing")[0] == Result.ITEM_NOT_FOUND
        assert fs.create(b"/thing")[0] != Result.SUCCESS
        assert fs.store.open_files == 0

    def test_a_folder_that_is_moved_away_stays_the_folder(self, fs: Fs, tmp_path: Path) -> None:
        (tmp_path / "outer/files").rename(tmp_path / "elsewhere")
        (tmp_path / "outer/files").symlink_to("/")
        fs.made(b"/a", b"1")
        assert (tmp_path / "elsewhere/a").read_bytes() == b"1"

    @pytest.mark.parametrize("handle", [0, 1, -1, 3, 1 << 31, 1 << 63, (1 << 64) - 1])
    def test_handles_that_are_none(self, fs: Fs, handle: int) -> None:
        fs.made(b"/a")
        assert fs.close(handle) == fs.truncate(handle, 0) == fs.write(handle, 0, b"x") == Result.BAD_PARAMETERS
        assert fs.read(handle, 0, 1)[0] == fs.ask(FsCommand.CLOSEDIR, b=handle).code == Result.BAD_PARAMETERS
        target = MemRef(OUT, Memory.of(bytearray(9)), 0, 9)
        assert fs.ask(FsCommand.READDIR, target, b=handle).code == Result.BAD_PARAMETERS

    def test_handles_of_the_other_kind(self, fs: Fs) -> None:
        file, folder = fs.made(b"/a"), fs.opendir(b"/")[1]
        assert fs.close(folder) == fs.ask(FsCommand.CLOSEDIR, b=file).code == Result.BAD_PARAMETERS

    @pytest.mark.parametrize("number", [-1, 1 << 63, (1 << 64) - 1])
    def test_offsets(self, fs: Fs, number: int) -> None:
        handle = fs.made(b"/a", b"1")
        assert fs.read(handle, number, 1)[0] == fs.write(handle, number, b"x") == Result.BAD_PARAMETERS
        assert fs.truncate(handle, number) == Result.BAD_PARAMETERS
        assert fs.write(handle, (1 << 63) - 1, b"xy") == Result.STORAGE_NO_SPACE
        assert fs.truncate(handle, (1 << 63) - 1) == Result.STORAGE_NO_SPACE

    @pytest.mark.parametrize(
        "reference",
        [
            MemRef(OUT, None, 0, 10),
            MemRef(OUT, Memory.of(bytearray(4)), 2, 3),
            MemRef(OUT, Memory.of(bytearray(4)), 0, 1 << 63),
            MemRef(OUT, Memory(size=10), 0, 10),
            MemRef(OUT, Memory((memoryview(bytearray(4)),), read_only=True), 0, 4),
            MemRef(IN, Memory.of(bytearray(4)), 0, 4),
            Value(OUT),
        ],
    )
    def test_memory_to_read_into(self, fs: Fs, reference: Param) -> None:
        handle = fs.made(b"/a", b"content")
        assert fs.ask(FsCommand.READ, reference, b=handle).code == Result.BAD_PARAMETERS

    def test_operations_that_are_none(self, fs: Fs) -> None:
        for operation in (11, 255, 1 << 40, -1):
            assert fs.ask(operation).code == Result.BAD_PARAMETERS
        assert fs.supplicant.serve(Rpc(RpcCommand.FS, []), fs.pool).code == Result.BAD_PARAMETERS
        assert fs.supplicant.serve(Rpc(RpcCommand.FS, [Value(OUT)]), fs.pool).code == Result.BAD_PARAMETERS
        for operation in FsCommand:
            assert fs.ask(operation, *[Value(IN)] * 5).code == Result.BAD_PARAMETERS

    def test_handles_of_an_earlier_life(self, tmp_path: Path) -> None:
        seen = set()
        for _ in range(5):
            fs = Fs(tmp_path)
            seen.add(fs.made(b"/a"))
            fs.supplicant.close()
        assert len(seen) == 5

    def test_errors_of_the_disk(self, fs: Fs, monkeypatch: pytest.MonkeyPatch) -> None:
        handle = fs.made(b"/a")
        for number, code, said in (
            (errno.ENOSPC, Result.STORAGE_NO_SPACE, "make room"),
            (errno.EIO, Result.GENERIC, "look at its folder and disk"),
        ):

            def fail(*_: object, number: int = number) -> int:
                raise OSError(number, os.strerror(number))

            monkeypatch.setattr(os, "pwrite", fail)
            assert fs.write(handle, 0, b"x") == code
            assert any(said in line for line in fs.logged)
        assert fs.store.used_bytes == 0


class TestLimits:
    def test_bytes(self, tmp_path: Path) -> None:
        fs = Fs(tmp_path, FileLimits(max_bytes=100))
        one, two = fs.made(b"/1", bytes(60)), fs.made(b"/2", bytes(40))
        assert fs.write(one, 60, b"x") == fs.write(two, 1 << 40, b"x") == Result.STORAGE_NO_SPACE
        assert fs.truncate(two, 41) == Result.STORAGE_NO_SPACE
        assert fs.write(one, 0, b"x") == Result.SUCCESS
        assert fs.write(two, 1000, b"") == Result.SUCCESS  # nothing to write makes nothing longer
        assert fs.truncate(one, 10) == Result.SUCCESS
        assert fs.write(two, 40, bytes(50)) == Result.SUCCESS
        assert fs.store.used_bytes == 100

    def test_files_that_are_removed_but_open_count(self, tmp_path: Path) -> None:
        fs = Fs(tmp_path, FileLimits(max_bytes=100, max_files=2))
        first, second = fs.made(b"/1", bytes(60)), fs.open(b"/1")[1]
        fs.remove(b"/1")
        other = fs.made(b"/2")
        assert fs.write(other, 0, bytes(41)) == fs.create(b"/3")[0] == Result.STORAGE_NO_SPACE
        fs.close(first)
        assert fs.write(other, 0, bytes(41)) == Result.STORAGE_NO_SPACE
        fs.close(second)
        assert fs.write(other, 0, bytes(41)) == fs.create(b"/3")[0] == Result.SUCCESS
        fs.rename(b"/2", b"/3", True)
        assert (fs.store.used_files, fs.store.used_bytes) == (2, 41)  # /3 is open, and replaced

    def test_files_and_folders(self, tmp_path: Path) -> None:
        fs = Fs(tmp_path, FileLimits(max_files=4))
        fs.made(b"/a/b/1")
        assert fs.create(b"/x/y")[0] == Result.STORAGE_NO_SPACE
        assert fs.names(b"/") == [b"a"]  # and no folder is left behind
        assert fs.create(b"/a/2")[0] == Result.SUCCESS
        assert fs.create(b"/a/3")[0] == Result.STORAGE_NO_SPACE
        assert "--fs-max-files" in fs.logged[-1]
        fs.remove(b"/a/b/1")
        assert fs.create(b"/a/3")[0] == Result.SUCCESS

    def test_open_files(self, tmp_path: Path) -> None:
        fs = Fs(tmp_path, FileLimits(max_open=3))
        handles = [fs.made(b"/a") for _ in range(2)]
        folder = fs.opendir(b"/")[1]
        codes = {fs.open(b"/a")[0], fs.create(b"/b")[0], fs.opendir(b"/")[0]}
        assert codes == {Result.OUT_OF_MEMORY}
        assert os.listdir(tmp_path) == ["a"]
        fs.ask(FsCommand.CLOSEDIR, b=folder)
        assert fs.open(b"/a")[0] == Result.SUCCESS
        assert len(set(handles)) == 2

    def test_no_file_descriptor_is_lost(self, tmp_path: Path) -> None:
        before = len(os.listdir("/proc/self/fd"))
        fs = Fs(tmp_path)
        for name in (b"/a", b"/d/e/f", b"../x", b"/a/b", b"/d", b""):
            fs.create(name)
            fs.open(name)
            fs.opendir(name)
            fs.rename(name, b"/d/e/f", False)
            fs.rename(b"/none/x", name, True)
            fs.remove(name)
        fs.supplicant.close()
        assert len(os.listdir("/proc/self/fd")) == before

    def test_what_is_there_already_counts(self, tmp_path: Path) -> None:
        (tmp_path / "d").mkdir()
        (tmp_path / "d/a").write_bytes(bytes(70))
        (tmp_path / "link").symlink_to("d/a")
        fs = Fs(tmp_path, FileLimits(max_bytes=60))
        assert (fs.store.used_bytes, fs.store.used_files) == (70, 3)
        handle = fs.open(b"/d/a")[1]
        assert fs.write(handle, 0, b"x") == Result.SUCCESS
        assert fs.write(handle, 70, b"x") == Result.STORAGE_NO_SPACE

    def test_one_supplicant_a_folder(self, tmp_path: Path) -> None:
        fs = Fs(tmp_path)
        with pytest.raises(BlockingIOError, match="another supplicant uses this folder"):
            FileStore(tmp_path)
        fs.supplicant.close()
        FileStore(tmp_path).close_all()


@dataclass(eq=False)
class Inode:
    data: bytearray = field(default_factory=bytearray)
    removed: bool = False


NAMES = st.sampled_from([b"/a", b"b", b"/d/a", b"/d/b", b"/d/e/a", b"/a/x", b"/d", b"/d/e", b"/.z"])


class Model(RuleBasedStateMachine):
    """What a POSIX folder does, told in a dictionary."""

    handles = Bundle("handles")

    def __init__(self) -> None:
        super().__init__()
        self.place = tempfile.TemporaryDirectory()
        self.outer = Path(self.place.name)
        self.fs = Fs(self.outer / "files", FileLimits(max_bytes=1000, max_open=10))
        self.files: dict[tuple[bytes, ...], Inode] = {}
        self.folders: set[tuple[bytes, ...]] = {()}
        self.opened: dict[int, Inode] = {}

    def teardown(self) -> None:
        self.fs.supplicant.close()
        self.place.cleanup()

    def lead_to(self, parts: tuple[bytes, ...]) -> int:
        """What comes of going to the folder above a name."""
        for depth in range(1, len(parts)):
            if parts[:depth] in self.files:
                return Result.GENERIC
            if parts[:depth] not in self.folders:
                return Result.ITEM_NOT_FOUND
        return Result.SUCCESS

    def prune(self, parts: tuple[bytes, ...]) -> None:
        for depth in range(len(parts) - 1, 0, -1):
            folder = parts[:depth]
            if any(other[:depth] == folder and other != folder for other in (*self.files, *self.folders)):
                return
            self.folders.discard(folder)

    @rule(target=handles, name=NAMES)
    def create(self, name: bytes) -> int:
        parts = tuple(components(name))
        code, handle = self.fs.create(name)
        if len(self.opened) >= 10:
            assert code == Result.OUT_OF_MEMORY
        elif parts in self.folders or self.lead_to(parts) == Result.GENERIC:
            assert code == Result.GENERIC
        else:
            assert code == Result.SUCCESS
            self.folders |= {parts[:depth] for depth in range(len(parts))}
            inode = self.files.setdefault(parts, Inode())
            inode.data.clear()
            self.opened[handle] = inode
        return handle

    @rule(target=handles, name=NAMES)
    def open(self, name: bytes) -> int:
        inode = self.files.get(tuple(components(name)))
        code, handle = self.fs.open(name)
        if len(self.opened) >= 10:
            assert code == Result.OUT_OF_MEMORY
        elif inode is None:
            assert code == Result.ITEM_NOT_FOUND
        else:
            assert code == Result.SUCCESS
            self.opened[handle] = inode
        return handle

    @rule(handle=consumes(handles))
    def close(self, handle: int) -> None:
        assert self.fs.close(handle) == (Result.SUCCESS if handle in self.opened else Result.BAD_PARAMETERS)
        self.opened.pop(handle, None)

    @rule(handle=handles, offset=st.integers(0, 300), size=st.integers(0, 300))
    def read(self, handle: int, offset: int, size: int) -> None:
        inode = self.opened.get(handle)
        expected = (
            (Result.SUCCESS, bytes(inode.data[offset : offset + size])) if inode else (Result.BAD_PARAMETERS, b"")
        )
        assert self.fs.read(handle, offset, size) == expected

    def room(self, inode: Inode, end: int) -> bool:
        return self.used() + max(0, end - len(inode.data)) <= 1000

    def used(self) -> int:
        return sum(len(inode.data) for inode in {*self.files.values(), *self.opened.values()})

    @rule(handle=handles, offset=st.integers(0, 300), data=st.binary(max_size=300))
    def write(self, handle: int, offset: int, data: bytes) -> None:
        code = self.fs.write(handle, offset, data)
        inode = self.opened.get(handle)
        if inode is None:
            assert code == Result.BAD_PARAMETERS
        elif data and not self.room(inode, offset + len(data)):
            assert code == Result.STORAGE_NO_SPACE
        else:
            assert code == Result.SUCCESS
            if data:
                inode.data.extend(bytes(max(0, offset - len(inode.data))))
                inode.data[offset : offset + len(data)] = data

    @rule(handle=handles, size=st.integers(0, 600))
    def truncate(self, handle: int, size: int) -> None:
        code = self.fs.truncate(handle, size)
        inode = self.opened.get(handle)
        if inode is None:
            assert code == Result.BAD_PARAMETERS
        elif not self.room(inode, size):
            assert code == Result.STORAGE_NO_SPACE
        else:
            assert code == Result.SUCCESS
            del inode.data[size:]
            inode.data.extend(bytes(size - len(inode.data)))

    @rule(name=NAMES)
    def remove(self, name: bytes) -> None:
        parts = tuple(components(name))
        expected = self.lead_to(parts)
        if expected == Result.SUCCESS and parts not in self.files:
            expected = Result.GENERIC if parts in self.folders else Result.ITEM_NOT_FOUND
        assert self.fs.remove(name) == expected
        if expected == Result.SUCCESS:
            del self.files[parts]
            self.prune(parts)

    @rule(old=NAMES, new=NAMES, overwrite=st.booleans())
    def rename(self, old: bytes, new: bytes, overwrite: bool) -> None:
        source, target = tuple(components(old)), tuple(components(new))
        expected = self.lead_to(source) or self.lead_to(target)
        if not expected and source not in self.files:
            expected = Result.BAD_PARAMETERS if source in self.folders else Result.ITEM_NOT_FOUND
        if not expected and not overwrite and (target in self.files or target in self.folders):
            expected = Result.ACCESS_CONFLICT
        if not expected and target in self.folders:
            expected = Result.GENERIC
        assert self.fs.rename(old, new, overwrite) == expected
        if not expected:
            self.files[target] = self.files.pop(source)

    @rule(name=NAMES | st.just(b"/"))
    def names(self, name: bytes) -> None:
        if len(self.opened) < 10:
            parts = tuple(components(name)) if name != b"/" else ()
            there = {
                other[len(parts)]
                for other in (*self.files, *self.folders)
                if len(other) > len(parts) and other[: len(parts)] == parts
            }
            assert self.fs.names(name) == sorted(n for n in there if not n.startswith(b"."))

    @rule(name=st.sampled_from(HOSTILE[:14]) | st.binary(max_size=MAX_NAME + 10).filter(lambda n: b"/../" in n))
    def escape(self, name: bytes) -> None:
        assert self.fs.create(name)[0] in (Result.BAD_PARAMETERS, Result.OUT_OF_MEMORY)

    @invariant()
    def it_knows_how_full_it_is(self) -> None:
        inodes = {*self.files.values(), *self.opened.values()}
        assert self.fs.store.used_bytes == self.used()
        assert self.fs.store.used_files == len(inodes) + len(self.folders) - 1
        assert self.fs.store.open_files == len(self.opened)

    @invariant()
    def nothing_is_outside(self) -> None:
        assert os.listdir(self.outer) == ["files"]


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=60, stateful_step_count=40)


@given(name=st.binary(max_size=1100))
def test_any_name_is_refused_or_leads_down(name: bytes) -> None:
    with suppress(TeeError):
        parts = components(name)
        path = os.path.normpath(b"/root/" + b"/".join(parts))
        assert path.startswith(b"/root/")
        assert path == b"/root/" + name.lstrip(b"/")


@given(data=st.data())
def test_any_parameters_are_answered(data: st.DataObject) -> None:
    words = st.integers(-1, 12) | st.sampled_from([1 << 31, 1 << 63, (1 << 64) - 1])
    directions = st.sampled_from(Direction)
    memories = st.none() | st.binary(max_size=40).map(lambda b: Memory.of(bytearray(b)))
    param: st.SearchStrategy[Param] = st.builds(Value, directions, words, words, words) | st.builds(
        MemRef, directions, memories, words, words
    )
    with tempfile.TemporaryDirectory() as place:
        fs = Fs(Path(place) / "files")
        for params in data.draw(st.lists(st.lists(param, max_size=5), max_size=5)):
            reply = fs.supplicant.serve(Rpc(RpcCommand.FS, params), fs.pool)
            assert reply.code in set(Result)
        fs.supplicant.close()
        assert os.listdir(place) == ["files"]
