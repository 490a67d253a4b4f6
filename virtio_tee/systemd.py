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
    pid, count = os.environ.pop("LISTEN_PID", ""), os.environ.pop("LISTEN_FDS", "")
    os.environ.pop("LISTEN_FDNAMES", None)
    if pid != str(os.getpid()) or not count.isdecimal():
        return ()
    return tuple(range(FIRST, FIRST + int(count)))


def notify(state: str) -> None:
    """Tell the service manager, if there is one that wants to know; never fails."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
        sock.settimeout(1)
        sock.sendto(state.encode(), address.replace("@", "\0", 1) if address[0] == "@" else address)
