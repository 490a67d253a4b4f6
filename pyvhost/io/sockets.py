"""Unix sockets for vhost-user: opening them, and messages with file descriptors on them."""

from __future__ import annotations

import array
import os
import socket
import stat
from collections.abc import Sequence
from typing import Any

from pyvhost.errors import MessageError
from pyvhost.messages import MAX_FDS

__all__ = ["Listener", "fds_of", "rights"]

#: room for as many file descriptors as a message may have; the kernel closes what does not fit and says so
ANCILLARY_BYTES = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)


_BACKLOG = 16  # frontends that wait for their turn


def rights(fds: Sequence[int]) -> list[tuple[int, int, bytes]]:
    """The ancillary data that passes ``fds`` on."""
    return [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []


def fds_of(ancillary: Sequence[tuple[int, int, bytes]], flags: int, fds: list[int]) -> None:
    """Add the file descriptors that ``recvmsg`` gave to ``fds``; they are the caller's to close even if this raises.

    :raises MessageError: more came than fit
    """
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
            fds += numbers
    if flags & socket.MSG_CTRUNC or len(fds) > MAX_FDS:
        raise MessageError(f"more than {MAX_FDS} file descriptors with one message")


class Listener:
    """Where frontends come from: a path that is listened on, or a socket that was inherited, listening or connected.

    Make one with ``at_path()`` or ``from_fd()``. ``socket`` is non-blocking. ``connected``: it is the one connection.
    """

    __slots__ = ("_inode", "connected", "path", "socket")

    def __init__(self, sock: socket.socket, *, connected: bool, path: str | None = None) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.connected = connected
        self.path = path
        self._inode = _inode(path) if path is not None else None

    @classmethod
    def at_path(cls, path: str | os.PathLike[str], *, mode: int | None = None) -> Listener:
        """Listen on ``path``. A socket that nobody answers on, left by a process that died, is replaced. ``mode``:
        permissions; by default as the umask has it.

        :raises OSError: it is not possible; in particular ``FileExistsError`` when the path is taken, by something
            that is no socket or by a server that answers
        """
        name = os.fspath(path)
        _remove_stale(name)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            if mode is None:
                sock.bind(name)
            else:
                before = os.umask(0o777 & ~mode)  # never more open than asked for, not even for a moment
                try:
                    sock.bind(name)
                finally:
                    os.umask(before)
            sock.listen(_BACKLOG)
        except OSError:
            sock.close()
            raise
        return cls(sock, connected=False, path=name)

    @classmethod
    def from_fd(cls, fd: int) -> Listener:
        """Take over an inherited Unix stream socket; whether it is listening or connected is found out. Its path is
        not removed at the end.

        :raises OSError: not a socket
        :raises ValueError: another kind of socket
        """
        sock = socket.socket(fileno=fd)
        if sock.family != socket.AF_UNIX or not sock.type & socket.SOCK_STREAM:
            sock.detach()
            raise ValueError(f"file descriptor {fd} is not a Unix stream socket")
        os.set_inheritable(fd, False)
        listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        return cls(sock, connected=not listening)

    def close(self) -> None:
        """Close, and remove the path if this listener made it and it is still the same."""
        self.socket.close()
        path, self.path = self.path, None
        if path is not None and self._inode is not None and _inode(path) == self._inode:
            os.unlink(path)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _inode(path: str) -> tuple[int, int] | None:
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _remove_stale(path: str) -> None:
    try:
        status = os.lstat(path)
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(status.st_mode):
        raise FileExistsError(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody is there
    raise FileExistsError(f"{path} is in use by another server")
