"""The example devices: through their sockets as a VMM would, as programs, with what a driver may get wrong."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pyvhost.examples import entropy, null_block
from pyvhost.examples.null_block import FLUSH, GET_ID, IN, OUT, NullBlock, make_file
from pyvhost.io.frontend import Frontend, Queue
from tests.pyvhost.harness import Server

Start = Callable[..., Server]
SECTOR = 512
CAPACITY = 1 << 20
OK, IOERR, UNSUPPORTED = 0, 1, 2


class Driver:
    """A driver of one queue."""

    def __init__(self, path: str, index: int = 0) -> None:
        self.vmm = Frontend.connect(path)
        self.vmm.negotiate()
        self.queue: Queue = self.vmm.add_queue(index, size=64)
        self.vmm.start()

    def request(self, readable: bytes, writable: int, pieces: int = 1) -> tuple[int, bytes]:
        """What the device wrote: how many bytes, and all the room there was."""
        ram = self.vmm.ram
        source = ram.alloc(len(readable) + 16)
        ram.at(source, len(readable))[:] = readable
        room = ram.alloc(writable + 16)
        step = -(-len(readable) // pieces)
        segments = [(source + at, min(step, len(readable) - at)) for at in range(0, len(readable), step or 1)]
        self.queue.ring.add(segments, [(room, writable)] if writable else [], token=None)
        self.queue.kick()
        [(_, written)] = self.queue.wait()
        return written, bytes(ram.at(room, writable))

    def block(self, kind: int, sector: int = 0, data: bytes = b"", room: int = 0, pieces: int = 1) -> tuple[int, bytes]:
        """Status and data of a block request."""
        _, answer = self.request(struct.pack("<IIQ", kind, 0, sector) + data, room + 1, pieces)
        return answer[room], answer[:room]


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def connect(path: str, index: int = 0) -> Driver:
        drivers.append(Driver(path, index))
        return drivers[-1]

    yield connect
    for driver in drivers:
        driver.vmm.close()


def test_entropy(start_server: Start, drive: Callable[..., Driver]) -> None:
    driver = drive(start_server(entropy.Entropy()).path)
    answers = {driver.request(b"", 64)[1] for _ in range(20)}
    assert len(answers) == 20
    written, data = driver.request(b"", 3 * entropy.MOST)
    assert written == entropy.MOST
    assert data[entropy.MOST :] == bytes(2 * entropy.MOST)
    assert driver.request(b"no room", 0) == (0, b"")


def test_null_block(start_server: Start, drive: Callable[..., Driver]) -> None:
    driver = drive(start_server(NullBlock(CAPACITY)).path)
    assert driver.block(OUT, 3, bytes(SECTOR)) == (OK, b"")
    assert driver.block(IN, 3, room=2 * SECTOR)[0] == OK
    assert driver.block(FLUSH) == (OK, b"")
    assert driver.block(GET_ID, room=20) == (OK, null_block.ID)


def test_config(start_server: Start, drive: Callable[..., Driver]) -> None:
    driver = drive(start_server(NullBlock(CAPACITY, queues=3)).path, 2)
    config = driver.vmm.read_config(0, 60)
    assert struct.unpack_from("<Q", config)[0] == CAPACITY // SECTOR
    assert struct.unpack_from("<I", config, 20)[0] == SECTOR
    assert struct.unpack_from("<H", config, 34)[0] == 3
    assert driver.block(FLUSH)[0] == OK


def test_memory(start_server: Start, drive: Callable[..., Driver], tmp_path: Path) -> None:
    file = tmp_path / "disk"
    fd = make_file(str(file), CAPACITY)
    driver = drive(start_server(NullBlock(CAPACITY, fd)).path)
    os.close(fd)
    data = os.urandom(5 * SECTOR)
    for pieces in (1, 2, 7):
        assert driver.block(OUT, 2 + pieces, data, pieces=pieces) == (OK, b"")
        assert driver.block(IN, 2 + pieces, room=len(data)) == (OK, data)
    assert driver.block(FLUSH)[0] == OK
    assert file.read_bytes()[9 * SECTOR : 14 * SECTOR] == data
    last = CAPACITY // SECTOR - 1
    assert driver.block(OUT, last, data[:SECTOR])[0] == OK
    assert driver.block(IN, last, room=SECTOR) == (OK, data[:SECTOR])


def test_bad_requests(start_server: Start, drive: Callable[..., Driver]) -> None:
    driver = drive(start_server(NullBlock(CAPACITY)).path)
    last = CAPACITY // SECTOR - 1
    assert driver.block(IN, last, room=2 * SECTOR)[0] == IOERR
    assert driver.block(IN, 2**64 - 1, room=SECTOR)[0] == IOERR
    assert driver.block(OUT, last, bytes(2 * SECTOR))[0] == IOERR
    assert driver.block(IN, 0, room=100)[0] == IOERR
    assert driver.block(OUT, 0, bytes(100))[0] == IOERR
    assert driver.block(77)[0] == UNSUPPORTED
    assert driver.block(GET_ID, room=10)[0] == UNSUPPORTED
    assert driver.request(bytes(15), 1)[0] == 0
    assert driver.request(bytes(16), 0)[0] == 0
    assert driver.block(FLUSH)[0] == OK  # it goes on


@pytest.mark.parametrize("name", ["entropy", "null_block"])
def test_programs(name: str, tmp_path: Path, drive: Callable[..., Driver]) -> None:
    path = tmp_path / "s"
    argv = [sys.executable, "-m", f"pyvhost.examples.{name}", "--socket-path", str(path)]
    program = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True)
    assert program.stderr is not None
    assert program.stderr.readline() == "ready\n"
    assert drive(str(path)).request(bytes(16), 1 + SECTOR)[0] > 0
    program.send_signal(signal.SIGTERM)
    assert program.communicate(timeout=10)[1] == ""
    assert program.returncode == 0
    assert not path.exists()


def test_data_outlives_the_program(tmp_path: Path, drive: Callable[..., Driver]) -> None:
    data = os.urandom(SECTOR)
    for number in range(2):
        path, file = tmp_path / f"s{number}", tmp_path / "disk"
        argv = [sys.executable, "-m", "pyvhost.examples.null_block", "--socket-path", str(path)]
        program = subprocess.Popen([*argv, "--memory", str(file), "--capacity", str(CAPACITY)])
        end = time.monotonic() + 10
        while not path.is_socket():
            assert time.monotonic() < end
            time.sleep(0.01)
        driver = drive(str(path))
        if number == 0:
            assert driver.block(OUT, 5, data)[0] == OK
        else:
            assert driver.block(IN, 5, room=SECTOR) == (OK, data)
        program.kill()
        program.wait()


@pytest.mark.parametrize(("main", "kind"), [(entropy.main, "rng"), (null_block.main, "block")])
def test_capabilities(main: Callable[[list[str]], int], kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--print-capabilities", "--what-else"])
    assert ended.value.code == 0
    assert json.loads(capsys.readouterr().out) == {"type": kind, "features": []}


def test_a_program_that_cannot_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entropy.main(["--socket-path", str(tmp_path / "no" / "s")]) == 1
    assert "No such file" in capsys.readouterr().err
