"""The backend whose guests are timed: ``python -m virtio_tee.compare.backend KEY SOCKET… [--bounce]``.

It is ``virtio-tee serve`` with the TEE of all paths; ``--bounce`` gives that copies. Says one line when it serves, and
ends on SIGTERM, or when its stdin ends: whoever has started it may be killed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

import trio

from host_backend.serve import Endpoint, ServeConfig, serve
from tee.bounce import BouncingTee
from tee.driver import TeeDriver
from virtio_tee.compare.tees import soft_tee


def main(arguments: list[str]) -> None:
    """Serve until SIGTERM, or the end of stdin."""
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    bounce = "--bounce" in arguments
    key, *sockets = [word for word in arguments if word != "--bounce"]
    tee: TeeDriver = soft_tee(Path(key).read_bytes())
    if bounce:
        tee = BouncingTee(tee)
    endpoints = [Endpoint(f"vm{number}", path=path) for number, path in enumerate(sockets)]
    trio.run(lambda: serve(tee, ServeConfig(endpoints), ready=lambda: print("ready", flush=True)))


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main(sys.argv[1:])
