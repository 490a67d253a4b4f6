"""The supplicant in a process of its own, which dies, hangs and lies."""

from __future__ import annotations

import argparse
import socket
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from tee.io import supplicant_process
from tee.io.supplicant import Services, Supplicant
from tee.io.supplicant_process import MAX_CONTENT, Frame, ProtocolError, SupplicantProcess, WireParam, receive
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType
from tests.tee.io.test_supplicant import NAME, Pool, memory_in, name

LOAD, ALLOC, FREE, FS = RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE, RpcCommand.FS
IN, OUT = Direction.IN, Direction.OUT


def ask(process: SupplicantProcess, pool: Pool, command: int, *params: Param) -> RpcReply:
    return process.serve(Rpc(command, list(params)), pool)


def alloc(process: SupplicantProcess, pool: Pool, size: int) -> RpcReply:
    return ask(process, pool, ALLOC, Value(Direction.IN, ShmType.APPLICATION, size, 8))


def free(process: SupplicantProcess, pool: Pool, memory: Memory) -> int:
    return ask(process, pool, FREE, Value(Direction.IN), MemRef(Direction.INOUT, memory)).code


def test_all_services_and_a_death(tmp_path: Path) -> None:
    pool = Pool()
    (tmp_path / f"{NAME}.ta").write_bytes(b"content")
    process = SupplicantProcess([tmp_path])
    assert ask(process, pool, LOAD, name(), MemRef(Direction.OUT, None)).code == Result.COMMUNICATION
    process.start()
    process.start()
    try:
        query = ask(process, pool, LOAD, name(), MemRef(Direction.OUT, None))
        assert (query.code, query.params) == (Result.SUCCESS, [name(), MemRef(Direction.OUT, None, 0, 7)])
        memory = memory_in(alloc(process, pool, 10))
        assert process.shared_memory == (1, 10)
        fetched = ask(process, pool, LOAD, name(), MemRef(Direction.OUT, memory, 2, 8))
        assert (fetched.code, fetched.params[1]) == (Result.SUCCESS, MemRef(Direction.OUT, memory, 2, 7))
        assert memory.read(0, 10) == b"\0\0content\0"
        short = ask(process, pool, LOAD, name(), MemRef(Direction.OUT, memory, 0, 3))
        assert (short.code, short.params[1]) == (Result.SHORT_BUFFER, MemRef(Direction.OUT, memory, 0, 7))
        assert ask(process, pool, RpcCommand.RPMB).code == Result.NOT_SUPPORTED
        assert ask(process, pool, 1 << 40).code == Result.BAD_PARAMETERS
        assert free(process, pool, Memory()) == Result.BAD_PARAMETERS
        first = process.pid
        process.kill()
        assert process.pid is None
        assert ask(process, pool, LOAD, name(), MemRef(Direction.OUT, None)).code == Result.COMMUNICATION
        process.start()
        assert process.pid not in (None, first)
        assert ask(process, pool, LOAD, name(), MemRef(Direction.OUT, None)).code == Result.SUCCESS
        second = memory_in(alloc(process, pool, 4))
        assert free(process, pool, memory) == Result.BAD_PARAMETERS  # the new child does not know it
        assert pool.held == [second]  # but it is free
        process.forget(second)
        assert pool.held == []
        alloc(process, pool, 4)
    finally:
        process.close()
    assert (pool.held, process.pid) == ([], None)


@contextmanager
def child(behave: str, **options: Any) -> Iterator[SupplicantProcess]:
    """A child that does what the Python text says; ``s`` is its socket, ``p`` the module, ``f`` the first request."""
    text = (
        "import os, socket, struct, sys, time; from tee.io import supplicant_process as p\n"
        "s = socket.socket(fileno=int(sys.argv[2]))\n"
        "f = p.receive(s)\n"
    )
    process = SupplicantProcess(command=[sys.executable, "-c", text + behave], **options)
    process.start()
    try:
        yield process
    finally:
        process.close()


@pytest.mark.requirement("DRV-RPC-2")
@pytest.mark.fault("restarted-supplicant")
def test_dies_in_an_rpc() -> None:
    with child("os.kill(os.getpid(), 9)") as process:
        pool = Pool()
        assert ask(process, pool, LOAD, name(), MemRef(Direction.OUT, None)).code == Result.COMMUNICATION
        assert alloc(process, pool, 5).code == Result.COMMUNICATION
        assert pool.held == []


@pytest.mark.requirement("DRV-RPC-2")
def test_all_outstanding_rpcs_are_answered_when_it_dies() -> None:
    with child("print('x', end='', flush=True); time.sleep(100)") as process:
        codes: list[int] = []

        def one() -> None:
            codes.append(ask(process, Pool(), LOAD, name(), MemRef(Direction.OUT, None)).code)

        threads = [threading.Thread(target=one) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(process._child.pending) < 3:  # type: ignore[union-attr]
            pass
        process.kill()
        for thread in threads:
            thread.join(10)
        assert codes == [Result.COMMUNICATION] * 3


@pytest.mark.parametrize(
    "answer",
    [
        "s.sendall(p.Frame(f.id + 1, 0).pack()); time.sleep(100)",
        "s.sendall(struct.pack('<I', 1 << 31)); time.sleep(100)",
        "s.sendall(struct.pack('<I', 4) + bytes(4)); time.sleep(100)",
        "s.sendall(struct.pack('<IIII', 12, f.id, 0, 1000)); time.sleep(100)",
        "s.sendall(struct.pack('<IIII', 12, f.id, 0, 2)); time.sleep(100)",
        "s.sendall(struct.pack('<IIII', 13, f.id, 0, 0) + b'x'); time.sleep(100)",
        "s.sendall(p.Frame(f.id, 0).pack()); time.sleep(100)",
        "s.sendall(p.Frame(f.id, 0, [p.WireParam(1), p.WireParam(1)]).pack()); time.sleep(100)",
        "s.sendall(p.Frame(f.id, 0, [p.WireParam(9), p.WireParam(6)]).pack()); time.sleep(100)",
        "s.sendall(p.Frame(f.id, 0, [p.WireParam(1), p.WireParam(6, 0, 5, 0, 5, b'12345')]).pack()); time.sleep(100)",
        "s.sendall(p.Frame(f.id, 0, [p.WireParam(1), p.WireParam(6, 0, 1, 0, 2, b'12')]).pack()); time.sleep(100)",
        "s.sendall(p.Frame(f.id, 0, [p.WireParam(1), p.WireParam(6, 2, 1)]).pack()); time.sleep(100)",
    ],
)
@pytest.mark.fault("lying-supplicant")
def test_nonsense_ends_it(answer: str) -> None:
    with child(answer) as process:
        target = MemRef(Direction.OUT, Memory.of(bytearray(4)), 0, 4)
        assert ask(process, Pool(), LOAD, name(), target).code == Result.COMMUNICATION
        process.start()  # it is gone, so this starts a new one


@pytest.mark.parametrize(
    "param",
    [
        "p.WireParam(7, 0, 9, 5)",  # too small
        "p.WireParam(7, 0, 1 << 40, 5)",  # larger than all that there may be
        "p.WireParam(7, 0, 10, 0)",  # no token
        "p.WireParam(7, 1, 10, 5)",  # NULL
        "p.WireParam(6, 0, 10, 5)",
        "p.WireParam(1, 0, 10, 5)",
    ],
)
@pytest.mark.fault("lying-supplicant")
def test_lies_in_shm_alloc(param: str) -> None:
    with child(f"s.sendall(p.Frame(f.id, 0, [{param}]).pack()); time.sleep(100)") as process:
        pool = Pool()
        assert alloc(process, pool, 10).code == Result.COMMUNICATION
        assert pool.held == []


def test_allocations_are_limited_by_the_parent() -> None:
    """A child that gives one memory after the other, and one twice."""
    text = "n = 1\nwhile f:\n s.sendall(p.Frame(f.id, 0, [p.WireParam(7, 0, 10, n)]).pack()); n += 1; f = p.receive(s)"
    with child(text, max_shared_memory=25) as process:
        pool = Pool()
        assert [alloc(process, pool, 10).code for _ in range(3)] == [0, 0, Result.OUT_OF_MEMORY]
        assert len(pool.held) == 2
    assert pool.held == []
    with child(text.replace("n += 1", "n += 0")) as process:
        assert [alloc(process, Pool(), 10).code for _ in range(2)] == [0, Result.COMMUNICATION]


class TestFrames:
    def test_layout(self) -> None:
        frame = Frame(1, 2, [WireParam(3, 0, 4, 5, 6), WireParam(5, 0, 2, 0, 2, b"ab")])
        expected = struct.pack("<IIII", 12 + 32 + 34, 1, 2, 2) + struct.pack("<IIQQQ", 3, 0, 4, 5, 6)
        expected += struct.pack("<IIQQQ", 5, 0, 2, 0, 2) + b"ab"
        assert frame.pack() == expected
        assert Frame.unpack(expected[4:]) == frame

    def test_cut_at_every_length(self) -> None:
        body = Frame(1, 2, [WireParam(), WireParam(7, 0, 2, 0, 2, b"ab")]).pack()[4:]
        for length in range(len(body)):
            with pytest.raises(ProtocolError):
                Frame.unpack(body[:length])

    def test_too_large(self) -> None:
        content = bytes(supplicant_process.MAX_FRAME)
        with pytest.raises(ProtocolError):
            Frame(1, 2, [WireParam(5, 0, 1, 0, len(content), content)]).pack()

    def test_end_of_the_stream(self) -> None:
        for sent in (b"", b"\x0c\0", b"\x0c\0\0\0\0"):
            mine, other = socket.socketpair()
            with mine:
                with other:
                    other.sendall(sent)
                assert receive(mine) is None


def in_thread(run: Callable[[], None]) -> threading.Thread:
    thread = threading.Thread(target=run)
    thread.start()
    return thread


def test_the_childs_side(tmp_path: Path) -> None:
    """The loop of the child, in this process: it answers hostile requests, or ends."""
    (tmp_path / f"{NAME}.ta").write_bytes(b"content")
    mine, other = socket.socketpair()
    supplicant = Supplicant([tmp_path])
    ended: list[str] = []

    def serve() -> None:
        try:
            supplicant_process.serve_connection(other, supplicant)
        except ProtocolError as error:
            ended.append(str(error))

    with mine, other:
        thread = in_thread(serve)

        def exchange(frame: Frame) -> Frame:
            mine.sendall(frame.pack())
            answer = receive(mine)
            assert answer is not None
            return answer

        low, high = name().a, name().b
        names = WireParam(1, 0, low, high)
        assert exchange(Frame(1, LOAD, [names, WireParam(6, 1)])).params[1] == WireParam(6, 1, 7)
        assert exchange(Frame(2, LOAD, [names, WireParam(6, 0, 9)])).params[1] == WireParam(6, 0, 7, 0, 7, b"content")
        assert exchange(Frame(3, LOAD, [WireParam()])).code == Result.BAD_PARAMETERS
        allocated = exchange(Frame(4, ALLOC, [WireParam(1, 0, 0, 100, 8)]))
        token = allocated.params[0].b
        assert (allocated.params[0].a, token > 0) == (100, True)
        assert exchange(Frame(5, FREE, [WireParam(1), WireParam(7, 0, 0, token + 1)])).code == Result.BAD_PARAMETERS
        assert exchange(Frame(6, FREE, [WireParam(1), WireParam(7, 0, 0, token)])).code == Result.SUCCESS
        assert supplicant.shared_memory == (0, 0)
        mine.sendall(Frame(7, LOAD, [names, WireParam(6, 0, 1 << 40)]).pack())
        thread.join(10)
    assert ended == [f"a memory reference to {1 << 40} bytes"]


def test_params_that_are_not_memory_nor_values(tmp_path: Path) -> None:
    with child("s.sendall(p.Frame(f.id, 5, [p.WireParam()]).pack()); time.sleep(100)") as process:
        reply = ask(process, Pool(), RpcCommand.FTRACE, Nothing())
        assert (reply.code, reply.params) == (5, [Nothing()])


PLUGIN_UUID = UUID("96bcf744-4f72-4866-bf1d-8634fd9c65e5")


def test_files_sockets_and_plugins_in_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content crosses for memory of either kind: the test's own, and such as the TEE has allocated."""
    (tmp_path / "reversing.py").write_text("def reverse(command, sub_command, data):\n    return data[::-1]\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    services = Services(
        fs_folder=str(tmp_path / "files"),
        fs_max_bytes=100,
        fs_sync=False,
        allow_sockets=("127.0.0.1:9",),
        plugins=(f"{PLUGIN_UUID}=reversing:reverse",),
    )
    pool = Pool()
    process = SupplicantProcess(services=services)
    process.start()
    try:
        for memory in (memory_in(alloc(process, pool, 64)), Memory.of(bytearray(64))):
            memory.write(8, b"/name\0")
            made = ask(process, pool, FS, Value(IN, 1), MemRef(IN, memory, 8, 50), Value(OUT))
            assert made.code == Result.SUCCESS
            handle = made.params[2].a  # type: ignore[union-attr]
            memory.write(0, b"content")
            assert ask(process, pool, FS, Value(IN, 4, handle, 0), MemRef(IN, memory, 0, 7)).code == Result.SUCCESS
            read = ask(process, pool, FS, Value(IN, 3, handle, 3), MemRef(OUT, memory, 20, 10))
            assert read.params[1] == MemRef(OUT, memory, 20, 4)
            assert memory.read(20, 5) == b"tent\0"
            full = ask(process, pool, FS, Value(IN, 4, handle, 60), MemRef(IN, memory, 0, 64))
            assert full.code == Result.STORAGE_NO_SPACE
            words = [int.from_bytes(PLUGIN_UUID.bytes[i : i + 4], "little") for i in range(0, 16, 4)]
            where = (Value(IN, 0, words[0], words[1]), Value(IN, words[2], words[3]), Value(Direction.INOUT))
            called = ask(process, pool, RpcCommand.PLUGIN, *where, MemRef(Direction.INOUT, memory, 0, 7))
            assert (called.code, memory.read(0, 7)) == (Result.SUCCESS, b"tnetnoc")
            memory.write(0, b"127.0.0.2\0")
            there = (Value(IN, 9, 0x66), MemRef(IN, memory, 0, 10), Value(OUT))
            assert ask(process, pool, RpcCommand.SOCKET, Value(IN, 0), *there).code == Result.ACCESS_DENIED
            memory.write(0, b"127.0.0.1\0")
            assert ask(process, pool, RpcCommand.SOCKET, Value(IN, 0), *there).code == Result.SUCCESS
        process.kill()
        process.start()  # the folder is free again
        assert ask(process, pool, FS, Value(IN, 2, handle)).code == Result.BAD_PARAMETERS
    finally:
        process.close()


@pytest.mark.parametrize(
    "reference",
    [
        MemRef(Direction.OUT, Memory.of(bytearray(4)), 2, 4),
        MemRef(Direction.OUT, Memory.of(bytearray(4)), 0, 1 << 63),
        MemRef(Direction.OUT, Memory.of(bytearray(MAX_CONTENT + 1)), 0, MAX_CONTENT + 1),
        MemRef(Direction.IN, Memory(size=9), 0, 9),
    ],
)
def test_memory_that_no_frame_can_hold_does_not_end_it(tmp_path: Path, reference: MemRef) -> None:
    process = SupplicantProcess([tmp_path])
    process.start()
    try:
        before = process.pid
        assert ask(process, Pool(), LOAD, name(), reference).code == Result.BAD_PARAMETERS
        assert ask(process, Pool(), LOAD, name(), MemRef(OUT, None)).code == Result.ITEM_NOT_FOUND
        assert process.pid == before
    finally:
        process.close()


def test_services_cross_as_a_command_line() -> None:
    services = Services(
        ("/a", "b"), "/files", 5, 6, False, ("h:1", "[::1]:*"), (f"{PLUGIN_UUID}=os:getcwd",), installed_plugins=True
    )
    parser = argparse.ArgumentParser()
    Services.add_to(parser)
    assert Services.parsed(parser.parse_args(services.arguments())) == services
    assert Services.parsed(parser.parse_args(Services().arguments())) == Services()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--allow-socket", "x"], "HOST:PORT"),
        (["--plugin", "x=y:z"], "plug-in"),
        (["--fs-folder", "/dev/null/x"], "cannot start"),
    ],
)
def test_a_child_that_cannot_start_says_why(arguments: list[str], why: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert supplicant_process.main(["--fd", "0", *arguments]) == 1
    assert why in capsys.readouterr().err
