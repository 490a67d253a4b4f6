"""What a service of systemd's does: take over sockets that were opened for it, and say when it is ready.

As sd_listen_fds(3) and sd_notify(3) describe it; nothing of systemd's is needed for it.
"""

from __future__ import annotations

import os
import socket
from contextlib import suppress

#: The first file descriptor that is passed.
FIRST = 3


def listen_fds() -> tuple[int, ...]:
    """The sockets that were passed to this very process. Children are not told of them."""
    return tuple(fd for _, fd in listen_named())


def listen_named() -> tuple[tuple[str, int], ...]:
    """The same, each with its name (``FileDescriptorName=``); "" where it has none."""
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    names = os.environ.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return ()
    fds = range(FIRST, FIRST + int(count))
    return tuple(zip(names if len(names) == len(fds) else [""] * len(fds), fds, strict=True))


def notify(state: str) -> None:
    """Tell the service manager, if there is one that wants to know; never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(1)
        sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
