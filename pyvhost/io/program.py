"""A backend as a program, by QEMU's conventions (docs/interop/vhost-user.rst, "Backend program conventions"):
``--socket-path`` or ``--fd``, ``--print-capabilities``, in the foreground until SIGTERM.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import sys
from collections.abc import Callable, Sequence

import trio

from pyvhost.device import SPIN_US, Device
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve
from pyvhost.io.sockets import Listener

__all__ = ["options", "run"]


def options(description: str, kind: str) -> argparse.ArgumentParser:
    """A parser with the options that every backend program has; add the device's own. ``kind`` is the device's type
    in QEMU's schema, for ``--print-capabilities``."""
    parser = argparse.ArgumentParser(description=description)
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument("--socket-path", metavar="PATH", help="listen here")
    place.add_argument("--fd", type=int, metavar="N", help="an inherited socket instead, listening or connected")
    parser.add_argument(
        "--print-capabilities", action=_Print, nargs=0, const=kind, help="print what this backend can do, and exit"
    )
    parser.add_argument(
        "--spin-us",
        type=int,
        default=SPIN_US,
        metavar="N",
        help=f"look at an empty queue for N microseconds before sleeping, 0: not at all; {SPIN_US}",
    )
    parser.add_argument("--verbose", action="store_true", help="log more, on stderr")
    return parser


class _Print(argparse.Action):
    """Prints and exits, whatever other options there are."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        print(json.dumps({"type": self.const, "features": []}))
        parser.exit()


def run(
    parser: argparse.ArgumentParser,
    make: Callable[[argparse.Namespace], Device],
    argv: Sequence[str] | None = None,
) -> int:
    """Parse the command line, make the device, serve it until SIGTERM or SIGINT; the program's exit status. Says
    ``ready`` on stderr when a frontend can connect. ``make`` may raise OSError or ValueError."""
    arguments = parser.parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if arguments.verbose else logging.WARNING, format=f"{parser.prog}: %(message)s"
    )
    try:
        device = make(arguments)
        device.spin_us = max(0, arguments.spin_us)
        where = arguments.socket_path
        listener = Listener.at_path(where) if where is not None else Listener.from_fd(arguments.fd)
    except (OSError, ValueError) as e:
        print(f"{parser.prog}: {e}", file=sys.stderr)
        return 1
    with listener, DataPlane(parser.prog[:15]) as dataplane:
        trio.run(_serve, device, listener, dataplane)
    return 0


async def _serve(device: Device, listener: Listener, dataplane: DataPlane) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(stop)
            print("ready", file=sys.stderr, flush=True)
            await serve(device, listener, dataplane)
            nursery.cancel_scope.cancel()  # a connected socket's one frontend has gone
