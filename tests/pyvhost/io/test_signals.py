"""What a frontend gives to be signalled must not hold up the data plane."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from pyvhost.errors import MessageError
from pyvhost.io.signals import Signaller, prepare


@pytest.fixture
def signaller() -> Iterator[Signaller]:
    made = Signaller("test")
    made.start()
    yield made
    made.stop()


def fill(fd: int) -> None:
    os.set_blocking(fd, False)
    try:
        while True:
            os.write(fd, bytes(4096))
    except BlockingIOError:
        os.set_blocking(fd, True)


def test_a_full_pipe(signaller: Signaller) -> None:
    """Blocking, full, and never read: what the frontend does with its own descriptor changes nothing for ours."""
    reader, theirs = os.pipe()
    ours = os.dup(theirs)
    prepare(ours)
    fill(theirs)
    done = threading.Thread(target=signaller.signal, args=(ours,), daemon=True)
    done.start()
    done.join(20)
    assert not done.is_alive()
    assert os.get_blocking(theirs)
    assert not os.get_inheritable(ours)
    assert set(os.read(reader, 1 << 20)) == {0}  # empty now
    signaller.signal(ours)
    assert os.read(reader, 1 << 20) == (1).to_bytes(8, "little")
    for fd in (reader, theirs, ours):
        os.close(fd)


def test_a_full_socket(signaller: Signaller) -> None:
    """It is shut down, and who signals is told, to end the connection."""
    theirs, ours = socket.socketpair()
    with theirs, ours:
        prepare(ours.fileno())
        assert signaller.signal(ours.fileno())
        assert theirs.recv(64) == (1).to_bytes(8, "little")
        fill(ours.fileno())
        told: list[bool] = []
        done = threading.Thread(target=lambda: told.append(signaller.signal(ours.fileno())), daemon=True)
        done.start()
        done.join(20)
        assert told == [False]


def test_an_eventfd_stays_what_it_is(signaller: Signaller) -> None:
    fd = os.eventfd(0)
    prepare(fd)
    signaller.signal(fd)
    assert os.eventfd_read(fd) == 1
    os.close(fd)


def test_what_is_not_taken(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file, pytest.raises(MessageError, match="neither"):
        prepare(file.fileno())
