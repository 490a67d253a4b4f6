"""The supplicant's services, on files and with an allocator of the test."""

from __future__ import annotations

import os
import re
from pathlib import Path
from uuid import UUID

import pytest

from tee.io.supplicant import MAX_ALLOCATIONS, MAX_TA_SIZE, Supplicant
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType

NAME = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")


class Pool:
    """An allocator that counts."""

    def __init__(self) -> None:
        self.held: list[Memory] = []

    def allocate(self, size: int) -> Memory:
        self.held.append(Memory.of(bytearray(size)))
        return self.held[-1]

    def free(self, memory: Memory) -> None:
        self.held.remove(memory)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def name(uuid: UUID = NAME) -> Value:
    low, high = (int.from_bytes(half, "little") for half in (uuid.bytes[:8], uuid.bytes[8:]))
    return Value(Direction.IN, low, high)


def load(supplicant: Supplicant, pool: Pool, memory: Memory | None = None, offset: int = 0, size: int = 0) -> RpcReply:
    params: list[Param] = [name(), MemRef(Direction.OUT, memory, offset, size)]
    return supplicant.serve(Rpc(RpcCommand.LOAD_TA, params), pool)


def size_in(reply: RpcReply) -> int:
    answer = reply.params[1]
    assert isinstance(answer, MemRef)
    return answer.size


class TestLoadTa:
    def test_size_then_content(self, tmp_path: Path, pool: Pool) -> None:
        (tmp_path / f"{NAME}.ta").write_bytes(b"content")
        supplicant = Supplicant([tmp_path / "none", tmp_path])
        query = load(supplicant, pool)
        assert (query.code, size_in(query)) == (Result.SUCCESS, 7)
        memory = Memory.of(bytearray(20))
        fetched = load(supplicant, pool, memory, 3, 10)
        assert (fetched.code, size_in(fetched)) == (Result.SUCCESS, 7)
        assert memory.read(0, 20) == b"\0\0\0content" + bytes(10)

    def test_memory_in_pieces(self, tmp_path: Path, pool: Pool) -> None:
        (tmp_path / f"{NAME}.ta").write_bytes(b"content")
        memory = Memory([memoryview(bytearray(4)), memoryview(bytearray(4))])
        assert load(Supplicant([tmp_path]), pool, memory, 0, 8).code == Result.SUCCESS
        assert memory.read(0, 7) == b"content"

    def test_too_small(self, tmp_path: Path, pool: Pool) -> None:
        (tmp_path / f"{NAME}.ta").write_bytes(b"content")
        memory = Memory.of(bytearray(10))
        reply = load(Supplicant([tmp_path]), pool, memory, 0, 6)
        assert (reply.code, size_in(reply)) == (Result.SHORT_BUFFER, 7)
        assert memory.read(0, 10) == bytes(10)

    def test_first_folder_wins(self, tmp_path: Path, pool: Pool) -> None:
        for folder, content in (("a", b"1"), ("b", b"22")):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / f"{NAME}.ta").write_bytes(content)
        assert size_in(load(Supplicant([tmp_path / "a", tmp_path / "b"]), pool)) == 1

    def test_not_there(self, tmp_path: Path, pool: Pool) -> None:
        assert load(Supplicant([tmp_path]), pool).code == Result.ITEM_NOT_FOUND
        assert load(Supplicant(), pool).code == Result.ITEM_NOT_FOUND

    @pytest.mark.parametrize("kind", ["link", "fifo", "folder", "unreadable"])
    def test_only_regular_files_of_the_folder(self, tmp_path: Path, pool: Pool, kind: str) -> None:
        outside, inside = tmp_path / "secret", tmp_path / "tas"
        outside.write_bytes(b"secret")
        inside.mkdir()
        path = inside / f"{NAME}.ta"
        if kind == "link":
            path.symlink_to(outside)
        elif kind == "fifo":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        else:
            path.symlink_to(path)
        logged: list[str] = []
        assert load(Supplicant([inside], log=logged.append), pool).code == Result.ITEM_NOT_FOUND
        assert logged

    def test_too_large(self, tmp_path: Path, pool: Pool) -> None:
        with (tmp_path / f"{NAME}.ta").open("wb") as file:
            file.truncate(MAX_TA_SIZE + 1)
        assert load(Supplicant([tmp_path]), pool).code == Result.OUT_OF_MEMORY

    @pytest.mark.parametrize(
        "params",
        [
            [],
            [name()],
            [name(), Value(Direction.OUT)],
            [name(), MemRef(Direction.IN, None)],
            [Value(Direction.OUT), MemRef(Direction.OUT, None)],
            [Value(Direction.IN, 1 << 64), MemRef(Direction.OUT, None)],
            [Value(Direction.IN, -1), MemRef(Direction.OUT, None)],
            [name(), MemRef(Direction.OUT, Memory.of(bytearray(4)), 2, 10)],
            [name(), MemRef(Direction.OUT, Memory(size=100), 0, 100)],
        ],
    )
    def test_bad_parameters(self, tmp_path: Path, pool: Pool, params: list[Param]) -> None:
        (tmp_path / f"{NAME}.ta").write_bytes(b"content")
        assert Supplicant([tmp_path]).serve(Rpc(RpcCommand.LOAD_TA, params), pool).code == Result.BAD_PARAMETERS


def alloc(
    supplicant: Supplicant, pool: Pool, size: int, alignment: int = 8, kind: int = ShmType.APPLICATION
) -> RpcReply:
    return supplicant.serve(Rpc(RpcCommand.SHM_ALLOC, [Value(Direction.IN, kind, size, alignment)]), pool)


def free(supplicant: Supplicant, pool: Pool, memory: Memory | None) -> int:
    params: list[Param] = [Value(Direction.IN, ShmType.APPLICATION), MemRef(Direction.INOUT, memory)]
    return supplicant.serve(Rpc(RpcCommand.SHM_FREE, params), pool).code


def memory_in(reply: RpcReply) -> Memory:
    reference = reply.params[0]
    assert isinstance(reference, MemRef)
    assert reference.memory is not None
    return reference.memory


class TestSharedMemory:
    def test_alloc_and_free(self, pool: Pool) -> None:
        supplicant = Supplicant()
        reply = alloc(supplicant, pool, 100)
        assert reply.params == [MemRef(Direction.INOUT, memory_in(reply), 0, 100)]
        assert supplicant.shared_memory == (1, 100)
        assert free(supplicant, pool, memory_in(reply)) == Result.SUCCESS
        assert free(supplicant, pool, memory_in(reply)) == Result.BAD_PARAMETERS
        assert (pool.held, supplicant.shared_memory) == ([], (0, 0))

    def test_free_of_what_is_not_its_own(self, pool: Pool) -> None:
        supplicant = Supplicant()
        assert free(supplicant, pool, Memory.of(bytearray(4))) == Result.BAD_PARAMETERS
        assert free(supplicant, pool, None) == Result.BAD_PARAMETERS
        assert supplicant.serve(Rpc(RpcCommand.SHM_FREE, []), pool).code == Result.BAD_PARAMETERS

    @pytest.mark.parametrize(
        ("size", "alignment", "kind", "code"),
        [
            (0, 8, 0, Result.OUT_OF_MEMORY),
            (1 << 63, 8, 0, Result.OUT_OF_MEMORY),
            (-5, 8, 0, Result.OUT_OF_MEMORY),
            (8, 3, 0, Result.BAD_PARAMETERS),
            (8, 8192, 0, Result.BAD_PARAMETERS),
            (8, 8, ShmType.KERNEL, Result.BAD_PARAMETERS),
            (8, 8, 77, Result.BAD_PARAMETERS),
            (8, 4096, ShmType.GLOBAL, Result.SUCCESS),
            (8, 0, 0, Result.SUCCESS),
        ],
    )
    def test_what_is_asked_for(self, pool: Pool, size: int, alignment: int, kind: int, code: int) -> None:
        assert alloc(Supplicant(), pool, size, alignment, kind).code == code

    def test_limits(self, pool: Pool) -> None:
        supplicant = Supplicant(max_shared_memory=100)
        first = alloc(supplicant, pool, 60)
        assert alloc(supplicant, pool, 41).code == Result.OUT_OF_MEMORY
        assert alloc(supplicant, pool, 40).code == Result.SUCCESS
        free(supplicant, pool, memory_in(first))
        assert alloc(supplicant, pool, 60).code == Result.SUCCESS
        many = Supplicant()
        codes = [alloc(many, pool, 1).code for _ in range(MAX_ALLOCATIONS + 1)]
        assert codes == [Result.SUCCESS] * MAX_ALLOCATIONS + [Result.OUT_OF_MEMORY]

    def test_close_and_forget(self, pool: Pool) -> None:
        supplicant = Supplicant()
        first = memory_in(alloc(supplicant, pool, 10))
        alloc(supplicant, pool, 10)
        supplicant.forget(first)
        supplicant.forget(first)
        assert len(pool.held) == 1
        supplicant.close()
        assert (pool.held, supplicant.shared_memory) == ([], (0, 0))

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (MemoryError(), Result.OUT_OF_MEMORY),
            (TeeError(Result.BUSY, Origin.TEE), Result.BUSY),
            (OSError("disk"), Result.GENERIC),
        ],
    )
    def test_allocator_fails(self, error: Exception, code: int) -> None:
        class Empty(Pool):
            def allocate(self, size: int) -> Memory:
                raise error

        supplicant = Supplicant()
        assert alloc(supplicant, Empty(), 10).code == code
        assert supplicant.shared_memory == (0, 0)

    def test_a_tee_that_is_gone_takes_its_memory_along(self) -> None:
        class Gone(Pool):
            def free(self, memory: Memory) -> None:
                raise TeeError(Result.COMMUNICATION)

        supplicant = Supplicant()
        memory = memory_in(alloc(supplicant, Gone(), 10))
        assert free(supplicant, Pool(), memory) == Result.SUCCESS


SERVED = {RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE}


@pytest.mark.parametrize("command", [*(set(RpcCommand) - SERVED), 8, 1000, -1])
def test_everything_else_is_not_supported(pool: Pool, command: int) -> None:
    assert Supplicant().serve(Rpc(command, [Value(Direction.IN)]), pool).code == Result.NOT_SUPPORTED


@pytest.mark.feature("Supplicant: RPMB, I2C and profiles are refused, and the log says what to do")
@pytest.mark.parametrize(
    "command",
    [
        *(RpcCommand.FS, RpcCommand.SOCKET, RpcCommand.PLUGIN, RpcCommand.GPROF, RpcCommand.FTRACE, RpcCommand.RPMB),
        *(RpcCommand.RPMB_PROBE_RESET, RpcCommand.RPMB_PROBE_NEXT, RpcCommand.RPMB_FRAMES, RpcCommand.I2C_TRANSFER),
    ],
)
def test_what_is_refused_is_said_once(pool: Pool, command: RpcCommand) -> None:
    logged: list[str] = []
    supplicant = Supplicant(log=logged.append)
    for _ in range(3):
        assert supplicant.serve(Rpc(command, []), pool) == RpcReply(Result.NOT_SUPPORTED)
    assert len(logged) == 1
    assert re.match(f"{command.name} is refused: .+: (name|allow|register|build|use|drive) ", logged[0])
