"""Where a backend listens, and what it does with what was left there."""

from __future__ import annotations

import os
import socket
import stat
from pathlib import Path

import pytest

from pyvhost.errors import MessageError
from pyvhost.io.sockets import Listener, fds_of


def stream() -> socket.socket:
    return socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)


def test_path_is_made_and_removed(tmp_path: Path, no_fd_leak: None) -> None:
    path = tmp_path / "s"
    with Listener.at_path(path, mode=0o600) as listener:
        assert not listener.connected
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_stale_socket_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with stream() as dead:
        dead.bind(str(path))
    assert path.exists()
    with Listener.at_path(path):
        pass


def test_a_living_server_is_left_alone(tmp_path: Path, no_fd_leak: None) -> None:
    path = tmp_path / "s"
    with Listener.at_path(path), pytest.raises(FileExistsError, match="in use"):
        Listener.at_path(path)
    with stream() as full:
        full.bind(str(path))
        full.listen(0)
        clients = [stream() for _ in range(3)]
        for client in clients:
            client.setblocking(False)
            client.connect_ex(str(path))
        with pytest.raises(FileExistsError, match="in use"):
            Listener.at_path(path)
        for client in clients:
            client.close()


def test_what_is_no_socket_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s"
    path.write_text("precious")
    with pytest.raises(FileExistsError, match="not a socket"):
        Listener.at_path(path)
    assert path.read_text() == "precious"


def test_a_path_that_is_another_s_by_now_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "s"
    listener = Listener.at_path(path)
    path.unlink()
    path.write_text("other")
    listener.close()
    assert path.exists()


def test_impossible_path(tmp_path: Path, no_fd_leak: None) -> None:
    with pytest.raises(OSError):
        Listener.at_path(tmp_path / "none" / "s")


def test_inherited(tmp_path: Path) -> None:
    path = tmp_path / "s"
    ours = stream()
    ours.bind(str(path))
    ours.listen(1)
    listener = Listener.from_fd(ours.detach())
    assert not listener.connected
    assert not os.get_inheritable(listener.socket.fileno())
    listener.close()
    assert path.exists()  # not ours to remove
    one, two = socket.socketpair()
    with Listener.from_fd(one.detach()) as listener:
        assert listener.connected
    two.close()


def test_inherited_nonsense() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as sock:
        with pytest.raises(ValueError, match="not a Unix stream socket"):
            Listener.from_fd(sock.fileno())
        assert sock.getsockname()
    fd = os.eventfd(0)
    with pytest.raises(OSError):
        Listener.from_fd(fd)
    os.close(fd)


def test_fds_beyond_the_limit() -> None:
    fds: list[int] = []
    with pytest.raises(MessageError):
        fds_of([(socket.SOL_SOCKET, socket.SCM_RIGHTS, bytes(8)), (0, 0, b"")], socket.MSG_CTRUNC, fds)
    assert fds == [0, 0]  # still the caller's to close
