"""Device state to and from a frontend's file descriptor: a pipe, or something like it. For a thread of its own.

Whether the descriptor blocks is the frontend's to set, so each step waits with a limit first, and writes no more than
a pipe that is ready takes at once. A frontend that fills the pipe in between can still hold up this thread, and
nothing else.
"""

from __future__ import annotations

import os
import select

__all__ = ["read_all", "write_all"]

TIMEOUT = 10.0  #: seconds without progress
_PIPE_BUF = 4096  # what a pipe takes at once when it is ready for writing
_PART = 1 << 16


def _wait(fd: int, event: int) -> None:
    poll = select.poll()
    poll.register(fd, event)
    if not poll.poll(TIMEOUT * 1000):
        raise TimeoutError("the frontend does not go on with it")


def write_all(fd: int, data: bytes) -> None:
    """:raises OSError: it cannot be written, or nobody reads"""
    rest = memoryview(data)
    while rest:
        _wait(fd, select.POLLOUT)
        rest = rest[os.write(fd, rest[:_PIPE_BUF]) :]


def read_all(fd: int, limit: int) -> bytes:
    """All bytes up to the end.

    :raises OSError: it cannot be read, nobody writes and nobody closes it, or it is longer than ``limit``
    """
    data = bytearray()
    while True:
        _wait(fd, select.POLLIN)
        part = os.read(fd, _PART)
        if not part:
            return bytes(data)
        data += part
        if len(data) > limit:
            raise OSError(f"a state of more than {limit} bytes")
