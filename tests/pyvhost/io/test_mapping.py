"""What may be mapped as guest memory, and what may not."""

from __future__ import annotations

import gc
import logging
import os
from pathlib import Path

import pytest

from pyvhost.errors import MemoryFault
from pyvhost.io.frontend import Ram
from pyvhost.io.mapping import Mapper
from pyvhost.memory import GuestMemory, Region

PAGE = 4096


@pytest.fixture
def ram() -> Ram:
    return Ram(16 * PAGE)


def test_bytes_are_shared(ram: Ram, no_fd_leak: None) -> None:
    mapping = Mapper().map(ram.fd, 16 * PAGE, 0)
    mapping.view[5] = 9
    assert ram.view[5] == 9
    odd = Mapper().map(ram.fd, 100, 3 * PAGE + 10)  # an offset that is not a page's
    odd.view[0] = 7
    assert (len(odd.view), ram.view[3 * PAGE + 10]) == (100, 7)
    mapping.discard()
    odd.discard()


@pytest.mark.parametrize(
    ("size", "offset"),
    [
        (17 * PAGE, 0),
        (16 * PAGE, 1),
        (1, 16 * PAGE),
        (1 << 63, 0),
        ((1 << 64) - PAGE, PAGE),
        (1, (1 << 64) - 1),
        (0, 0),
        (1, -1),
    ],
)
def test_what_the_file_does_not_hold(ram: Ram, size: int, offset: int) -> None:
    with pytest.raises(MemoryFault):
        Mapper().map(ram.fd, size, offset)


def test_what_is_not_a_file(tmp_path: Path) -> None:
    fd = os.eventfd(0)
    with pytest.raises(MemoryFault, match="not a file"):
        Mapper().map(fd, 8, 0)
    os.close(fd)
    with pytest.raises(MemoryFault, match="examined"):
        Mapper().map(fd, 8, 0)
    path = tmp_path / "f"
    path.write_bytes(bytes(PAGE))
    fd = os.open(path, os.O_RDONLY)
    with pytest.raises(MemoryFault, match="mapped"):
        Mapper().map(fd, PAGE, 0)
    os.close(fd)


def test_unsealed_memory_is_reported_once_or_refused(caplog: pytest.LogCaptureFixture, ram: Ram) -> None:
    caplog.set_level(logging.WARNING)
    open_ram = Ram(PAGE, seal=False)
    mapper = Mapper()
    mapper.map(ram.fd, PAGE, 0).discard()
    assert not caplog.records
    mapper.map(open_ram.fd, PAGE, 0).discard()
    mapper.map(open_ram.fd, PAGE, 0).discard()
    assert [r.getMessage().startswith("guest memory is not sealed") for r in caplog.records] == [True]
    with pytest.raises(MemoryFault, match="not sealed"):
        Mapper(require_sealed=True).map(open_ram.fd, PAGE, 0)
    Mapper(require_sealed=True).map(ram.fd, PAGE, 0).discard()
    open_ram.close()


def maps_of(name: str) -> int:
    return Path("/proc/self/maps").read_text().count(name)


def test_unmapped_at_the_last_use(no_fd_leak: None) -> None:
    ram = Ram(4 * PAGE, name="leased-memory")
    mine = maps_of("leased-memory")
    memory = GuestMemory([Region(0, 4 * PAGE, 0, Mapper().map(ram.fd, 4 * PAGE, 0))])
    assert maps_of("leased-memory") == mine + 1
    lease = memory.lease()
    memory.close()
    assert maps_of("leased-memory") == mine + 1
    lease.release()
    assert maps_of("leased-memory") == mine
    memory = GuestMemory([Region(0, 4 * PAGE, 0, Mapper().map(ram.fd, 4 * PAGE, 0))])
    (piece,) = memory.translate(10, 10)
    memory.close()
    piece[0] = 1  # a slice keeps its bytes
    assert ram.view[10] == 1
    del piece
    gc.collect()
    assert maps_of("leased-memory") == mine
    ram.close()


def test_ram_addresses(ram: Ram) -> None:
    one, two = ram.alloc(10), ram.alloc(10)
    assert one == ram.guest_addr
    assert two == one + 16
    ram.at(two, 2)[:] = b"ok"
    assert bytes(ram.view[16:18]) == b"ok"
    with pytest.raises(ValueError, match="not in this memory"):
        ram.at(ram.guest_addr - 1, 1)
    with pytest.raises(MemoryError):
        ram.alloc(17 * PAGE)
