"""OP-TEE's own tee-supplicant, unmodified, as the supplicant of a guest; and ours, held against it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from guest_driver.client import Context, Session, TempIn, TempOut, ValueInOut
from lab.optee_client import TeeSupplicant, ensure_tee_supplicant
from tee import package
from tee.io.runtime import Observation, TeeRuntime
from tee.io.supplicant import Allocator, RpcServer, Services
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result, TeeError
from tee.rpc import FsCommand, Rpc, RpcCommand
from tee.soft.examples import UUIDS
from tests.lab.kit import Backend
from tests.lab.tee_supplicant import RealSupplicant
from virtio_tee.attach import open_driver

pytestmark = pytest.mark.lab

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
READ, WRITE, DELETE = range(3)
SECRET = b"what nobody may read, " * 3000  # more than one FS WRITE
KEEPER = UUID("5f9f7b2e-5d5c-4f3a-9a1e-0d7b3c1f2a44")
KEEPER_TA = b"""
from tee.soft.ta import UUID, DataFlag, Direction, TrustedApplication

ALL = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE | DataFlag.ACCESS_WRITE_META


class Keeper(TrustedApplication):
    uuid = UUID("5f9f7b2e-5d5c-4f3a-9a1e-0d7b3c1f2a44")

    async def invoke(self, session, command, params):
        storage = self.env.storage
        if command == 0:
            with await storage.create(b"one", b"first", ALL) as stored:
                await stored.write(b"F")
                await stored.rename(b"two")
            (await storage.create(b"three", b"3", ALL)).close()
        else:
            found = [name + b":%d" % size for name, size in await storage.enumerate()]
            params.memory(0, Direction.OUT).put(b" ".join(sorted(found)))


TA = Keeper
"""


@pytest.fixture(scope="module")
def build() -> TeeSupplicant:
    return ensure_tee_supplicant()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        yield Path(name)


@pytest.fixture
def backend(folder: Path) -> Iterator[Backend]:
    key = folder / "storage.key"
    key.write_bytes(bytes(range(32)))
    made = Backend(folder, "--storage-key", str(key))
    tas = folder / "tas"
    tas.mkdir()
    for name in UUIDS:
        (tas / f"{UUIDS[name]}.ta").write_bytes(made.package(name))
    (tas / f"{KEEPER}.ta").write_bytes(package.sign(KEEPER_TA, KEEPER, 1, made.vendor.private))
    made.start()
    yield made
    assert made.stop() == 0


@contextmanager
def client(
    backend: Backend, supplicant: RpcServer, seen: Callable[[Observation], None] | None = None
) -> Iterator[Context]:
    with (
        closing(open_driver(str(backend.socket), None)) as driver,
        closing(supplicant),
        TeeRuntime(driver, supplicant, seen) as runtime,
        Context(runtime) as context,
    ):
        yield context


def code_of(session: Session, command: int, *params: Any) -> int:
    try:
        session.invoke(command, *params)
    except TeeError as error:
        return error.code
    return Result.SUCCESS


def real(build: TeeSupplicant, backend: Backend) -> RealSupplicant:
    return RealSupplicant(build, backend.folder / "tas", backend.folder / "files")


def ours(backend: Backend) -> RpcServer:
    return Services(ta_folders=(str(backend.folder / "tas"),), fs_folder=str(backend.folder / "files")).supplicant()


@pytest.mark.feature("Supplicant: OP-TEE's own tee-supplicant, unmodified, serves a guest's TAs and files")
def test_a_guest_with_the_real_one(build: TeeSupplicant, backend: Backend) -> None:
    """TAs are loaded, objects written, read, renamed, listed and deleted: all operations but TRUNCATE are sent."""
    operations: set[int] = set()

    def observe(event: Observation) -> None:
        if event.kind == "rpc" and isinstance(event.subject, Rpc) and event.subject.command == RpcCommand.FS:
            first = event.subject.params[0]
            assert isinstance(first, Value)
            operations.add(first.a)

    with client(backend, real(build, backend), observe) as context:
        with context.open_session(UUIDS["hello_world"]) as session:
            assert session.invoke(0, ValueInOut(41))[0].a == 42
        with context.open_session(UUIDS["secure_storage"]) as session:
            assert code_of(session, READ, TempIn(b"object"), TempOut(9)) == Result.ITEM_NOT_FOUND
            session.invoke(WRITE, TempIn(b"object"), TempIn(SECRET))
            session.invoke(WRITE, TempIn(b"object"), TempIn(SECRET[::-1]))
            session.invoke(WRITE, TempIn(b"other"), TempIn(b"gone"))
            session.invoke(DELETE, TempIn(b"other"))
            assert code_of(session, READ, TempIn(b"other"), TempOut(9)) == Result.ITEM_NOT_FOUND
        with context.open_session(KEEPER) as session:
            session.invoke(0)
            assert session.invoke(1, TempOut(100))[0] == b"three:1 two:5"
    files = [path for path in (backend.folder / "files").rglob("*") if path.is_file()]
    assert files
    assert not any(SECRET[:22] in path.read_bytes() or SECRET[:-23:-1] in path.read_bytes() for path in files)
    # another life of backend and tee-supplicant
    assert backend.stop() == 0
    backend.start()
    with client(backend, real(build, backend), observe) as context:
        with context.open_session(UUIDS["secure_storage"]) as session:
            assert session.invoke(READ, TempIn(b"object"), TempOut(len(SECRET)))[1] == SECRET[::-1]
        with context.open_session(KEEPER) as session:
            assert session.invoke(1, TempOut(100))[0] == b"three:1 two:5"
    assert operations == set(FsCommand) - {FsCommand.TRUNCATE}


def test_a_folder_of_either_is_the_others(build: TeeSupplicant, backend: Backend) -> None:
    sides = [lambda: real(build, backend), lambda: ours(backend)]
    for number, side in enumerate([*sides, *sides]):
        with client(backend, side()) as context, context.open_session(UUIDS["secure_storage"]) as session:
            if number:
                assert session.invoke(READ, TempIn(b"a"), TempOut(9))[1] == b"%d" % (number - 1)
            session.invoke(WRITE, TempIn(b"a"), TempIn(b"%d" % number))


class Plain(Allocator):
    def allocate(self, size: int) -> Memory:
        return Memory.of(bytearray(size))

    def free(self, memory: Memory) -> None:
        """Nothing to do."""


class Asker:
    """File operations of one supplicant, by their parameters."""

    def __init__(self, supplicant: RpcServer) -> None:
        self.supplicant = supplicant
        self.plain = Plain()
        (reference,) = self.ask(RpcCommand.SHM_ALLOC, Value(IN, 0, 8192, 8))[1]
        assert isinstance(reference, MemRef)
        assert reference.memory is not None
        self.memory = reference.memory

    def ask(self, command: int, *params: Param) -> tuple[int, list[Param]]:
        reply = self.supplicant.serve(Rpc(command, list(params)), self.plain)
        return reply.code, reply.params

    def text(self, data: bytes, at: int = 0) -> MemRef:
        self.memory.write(at, data)
        return MemRef(IN, self.memory, at, len(data))

    def opened(self, command: FsCommand, name: bytes) -> tuple[int, int]:
        """(code, handle)."""
        code, params = self.ask(RpcCommand.FS, Value(IN, command), self.text(name + b"\0"), Value(OUT))
        answer = params[2] if code == Result.SUCCESS else Value(OUT)
        assert isinstance(answer, Value)
        return code, answer.a

    def plainly(self, command: FsCommand, b: int, c: int = 0) -> int:
        return self.ask(RpcCommand.FS, Value(IN, command, b, c))[0]

    def named(self, command: FsCommand, b: int, *names: bytes) -> int:
        texts = [self.text(name + b"\0", 2048 * place) for place, name in enumerate(names)]
        return self.ask(RpcCommand.FS, Value(IN, command, b), *texts)[0]

    def write(self, handle: int, offset: int, data: bytes) -> int:
        return self.ask(RpcCommand.FS, Value(IN, FsCommand.WRITE, handle, offset), self.text(data))[0]

    def read(self, command: FsCommand, handle: int, offset: int, room: int) -> tuple[int, int, bytes]:
        """(code, answered size, bytes)."""
        code, params = self.ask(RpcCommand.FS, Value(IN, command, handle, offset), MemRef(OUT, self.memory, 4096, room))
        answer = params[1] if len(params) == 2 else None
        size = answer.size if isinstance(answer, MemRef) and code in (Result.SUCCESS, Result.SHORT_BUFFER) else 0
        return code, size, self.memory.read(4096, min(size, room)) if code == Result.SUCCESS else b""


def story(asker: Asker) -> list[Any]:
    """Every operation, as it should be used; what is answered, but for the handles.

    At most two folders deep: tee-supplicant 4.5.0 makes no more (and later ones, as of 44289ee, no more than one).
    """
    told: list[Any] = [asker.opened(FsCommand.OPEN, b"ta/one")[0], asker.opened(FsCommand.OPENDIR, b"ta")[0]]
    code, file = asker.opened(FsCommand.CREATE, b"/ta/one")
    told += [code, asker.write(file, 0, b"content"), asker.write(file, 10, b"after a hole")]
    told += [asker.read(FsCommand.READ, file, offset, room) for offset, room in ((0, 100), (5, 3), (22, 9), (99, 9))]
    told += [asker.plainly(FsCommand.TRUNCATE, file, 4), asker.read(FsCommand.READ, file, 0, 100)]
    told += [asker.plainly(FsCommand.CLOSE, file)]
    code, file = asker.opened(FsCommand.OPEN, b"ta/one")
    told += [code, asker.read(FsCommand.READ, file, 0, 100), asker.plainly(FsCommand.CLOSE, file)]
    code, file = asker.opened(FsCommand.CREATE, b"ta/one")  # empties it
    told += [code, asker.read(FsCommand.READ, file, 0, 100), asker.write(file, 0, b"1"), asker.plainly(2, file)]
    code, file = asker.opened(FsCommand.CREATE, b"ta/two")
    told += [code, asker.plainly(FsCommand.CLOSE, file)]
    told += [asker.named(FsCommand.RENAME, 0, b"ta/one", b"ta/two")]
    told += [asker.named(FsCommand.RENAME, 0, b"ta/none", b"ta/x")]
    told += [asker.named(FsCommand.RENAME, 1, b"ta/one", b"ta/two")]
    told += [asker.named(FsCommand.RENAME, 0, b"ta/two", b"ta/three")]
    told += [asker.opened(FsCommand.OPEN, b"ta/two")[0]]
    code, listing = asker.opened(FsCommand.OPENDIR, b"/ta")
    told += [code, asker.read(FsCommand.READDIR, listing, 0, 6), asker.plainly(FsCommand.CLOSEDIR, listing)]
    code, listing = asker.opened(FsCommand.OPENDIR, b"ta")
    told += [code, asker.read(FsCommand.READDIR, listing, 0, 5)[:2], asker.plainly(FsCommand.CLOSEDIR, listing)]
    code, listing = asker.opened(FsCommand.OPENDIR, b"ta")
    told += [code, *(asker.read(FsCommand.READDIR, listing, 0, 99) for _ in range(2)), asker.plainly(9, listing)]
    told += [asker.plainly(FsCommand.CLOSEDIR, listing), asker.read(FsCommand.READDIR, listing, 0, 99)[0]]
    code, file = asker.opened(FsCommand.CREATE, b"two/deep/four")
    told += [code, asker.plainly(FsCommand.CLOSE, file), asker.opened(FsCommand.OPENDIR, b"two/deep")[0]]
    told += [asker.named(FsCommand.REMOVE, 0, b"two/deep/four"), asker.opened(FsCommand.OPENDIR, b"two")[0]]
    told += [asker.named(FsCommand.REMOVE, 0, b"ta/three"), asker.named(FsCommand.REMOVE, 0, b"ta/three")]
    return told


EXPECTED_OF_READS = [
    (Result.SUCCESS, 22, b"content\0\0\0after a hole"),
    (Result.SUCCESS, 3, b"nt\0"),
    (Result.SUCCESS, 0, b""),
    (Result.SUCCESS, 0, b""),
]


@pytest.mark.feature("Supplicant: answers file operations as OP-TEE's tee-supplicant does")
def test_the_same_answers(build: TeeSupplicant, folder: Path) -> None:
    with RealSupplicant(build, folder, folder / "theirs") as supplicant:
        theirs = story(Asker(supplicant))
    assert theirs[5:9] == EXPECTED_OF_READS
    assert {told[0] if isinstance(told, tuple) else told for told in theirs} == {
        Result.SUCCESS,
        Result.ITEM_NOT_FOUND,
        Result.ACCESS_CONFLICT,
        Result.SHORT_BUFFER,
        Result.BAD_PARAMETERS,
    }
    with closing(Services(fs_folder=str(folder / "ours")).supplicant()) as supplicant_of_ours:
        assert story(Asker(supplicant_of_ours)) == theirs
    assert os.listdir(folder / "ours") == []
    assert not any((folder / "theirs").rglob("*"))  # 4.5.0 takes away even the folder itself


def test_the_same_layouts(build: TeeSupplicant, folder: Path) -> None:
    """With a parameter too few, too many, or in another direction each operation is refused, by both."""
    from tests.tee.soft.keeper import LAYOUTS

    def of(asker: Asker, layout: list[tuple[type, Direction]], command: int) -> list[Param]:
        asker.memory.write(0, b"name\0")
        make = {Value: lambda d: Value(d, 0), MemRef: lambda d: MemRef(d, asker.memory, 0, 5)}
        return [Value(IN, command, 99), *(make[kind](direction) for kind, direction in layout[1:])]

    assert set(LAYOUTS) == set(FsCommand)
    with (
        RealSupplicant(build, folder, folder / "theirs") as theirs,
        closing(Services(fs_folder=str(folder / "ours")).supplicant()) as supplicant,
    ):
        for asker in (Asker(theirs), Asker(supplicant)):
            for command, layout in LAYOUTS.items():
                turned = [(kind, INOUT) for kind, _ in layout]
                other = [(MemRef if kind is Value else Value, direction) for kind, direction in layout]
                wrong = [[*layout, (Value, IN)], *([layout[:-1], turned, other] if len(layout) > 1 else [])]
                for one in wrong:
                    code, _ = asker.ask(RpcCommand.FS, *of(asker, one, command))
                    assert code == Result.BAD_PARAMETERS, (command, one)
            assert asker.ask(RpcCommand.FS, Value(IN, len(FsCommand)))[0] == Result.BAD_PARAMETERS
