"""Signalling eventfds of a frontend's without being held up by one that is full.

A write to a blocking eventfd blocks when its counter is at its maximum, 2^64 - 2. No honest frontend gets there, but a
hostile one can put it there at any moment, also between a poll and the write, and whether the eventfd blocks is a flag
that it shares. So the write is just done, and a second thread looks a few times a second whether the first one is stuck
in the same write as last time. If so, it empties the eventfd, which lets the write through, and the caller is told, so
that it can end that connection. A signal costs two assignments more; a frontend that tries it holds up the others once,
for half a second at most.

user-mode-linux gives sockets instead: one in which a write is stuck is shut down. The write end of a pipe can be
neither emptied nor shut down by who writes to it, so ``prepare()`` opens that anew, non-blocking, with flags that the
frontend does not share. Nothing else is taken.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import stat
import threading

from pyvhost.errors import MessageError

__all__ = ["Signaller", "prepare"]

log = logging.getLogger("pyvhost")

_PERIOD = 0.25  # seconds between two looks
_RETRY = 0.001  # … at a write that is stuck, while the frontend goes on filling its eventfd


def prepare(fd: int) -> None:
    """Make sure that no ``Signaller.signal(fd)`` can be held up for good; what ``fd`` refers to may be replaced.

    :raises MessageError: it is neither an eventfd, nor a socket, nor a pipe that we may open
    """
    kind = stat.S_IFMT(os.fstat(fd).st_mode)
    if kind == stat.S_IFIFO:
        try:
            ours = os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as e:
            raise MessageError(f"a pipe to signal that cannot be opened: {e.strerror}") from None
        os.dup2(ours, fd, inheritable=False)
        os.close(ours)
    elif kind not in (0, stat.S_IFSOCK):  # an eventfd has none
        raise MessageError("something to signal that is neither an eventfd, nor a socket, nor a pipe")


def _shut_down(fd: int) -> None:
    """:raises OSError: ``fd`` is no socket"""
    sock = socket.socket(fileno=fd)
    try:
        sock.shutdown(socket.SHUT_RDWR)
    finally:
        sock.detach()


class Signaller:
    """``signal()`` and ``close()`` are for one thread; ``start()`` and ``stop()`` for whoever owns that."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._number = 0  # of the last write
        self._writing = -1  # the eventfd that is being written
        self._freed = 0  # number of the last write that had to be helped
        self._lock = threading.Lock()  # no eventfd is closed while it is emptied
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._thread = threading.Thread(target=self._watch, name=f"{self._name}-signals", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def signal(self, fd: int) -> bool:
        """Add 1 to an eventfd; False if it was full and the write had to be helped. Never raises."""
        number = self._number = self._number + 1
        self._writing = fd
        try:
            os.eventfd_write(fd, 1)
        except OSError:
            log.debug("an eventfd of the frontend's cannot be written", exc_info=True)
        self._writing = -1
        return self._freed != number

    def close(self, fd: int) -> None:
        """Close a file descriptor that may have been signalled."""
        with self._lock:
            os.close(fd)

    def _watch(self) -> None:
        last = 0
        while not self._stop.wait(_PERIOD):
            number = self._number
            if number == last and self._writing >= 0:
                while not self._free(number):
                    self._stop.wait(_RETRY)
            last = number

    def _free(self, number: int) -> bool:
        """Empty the eventfd, or shut down the socket, if that write is still stuck; whether it is not."""
        with self._lock:
            fd = self._writing
            if fd < 0 or self._number != number:
                return True
            self._freed = number
            with contextlib.suppress(OSError):  # the write went through meanwhile
                os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)
            with contextlib.suppress(OSError):
                _shut_down(fd)
            return False
