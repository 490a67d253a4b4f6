"""A real device on a real vhost-user socket, served by threads of this process."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import trio

from device.config import Limits
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.vhost_user import VhostUserTransport
from host_backend.device import TeeDevice
from host_backend.router import Router
from host_backend.serve import attach
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve
from pyvhost.io.sockets import Listener
from tee.driver import TeeDriver
from tee.soft import SoftTee, examples
from tee.soft.ta import TrustedApplication
from virtio_tee.ffa_tee import FfaTee


def over_ffa(tee: SoftTee) -> TeeDriver:
    """The software TEE behind OP-TEE's partition."""
    return FfaTee(tee, {"guest": None})


class Live:
    """The device behind ``path``; ``tee`` is the one that it serves."""

    reached: Callable[[SoftTee], TeeDriver] = staticmethod(lambda tee: tee)
    """How the software TEE is reached, where nothing else is said."""

    def __init__(self, path: Path, limits: Limits, queues: int, tee: TeeDriver) -> None:
        self.path = str(path)
        self.tee = tee
        self.router = Router(self.tee, time.monotonic)
        self.device = TeeDevice(
            self.router,
            vm="guest",
            limits=limits,
            request_queues=queues,
            clock=time.monotonic,
            new_epoch=lambda: secrets.randbits(64),
        )
        self.dataplane = DataPlane()

    def driver(self, wanted: int = int(DRIVER_FEATURES), **options: Any) -> VirtioTeeDriver:
        """A driver of its own, connected and started."""
        return VirtioTeeDriver(VhostUserTransport(self.path, wanted=wanted, **options))


@contextmanager
def live(
    folder: Path,
    limits: Limits | None = None,
    *,
    queues: int = 1,
    built_in: Mapping[UUID, type[TrustedApplication]] | None = None,
    tee: TeeDriver | None = None,
    reached: Callable[[SoftTee], TeeDriver] | None = None,
    **options: Any,
) -> Iterator[Live]:
    """Serve a device until the end; then nothing of the guest's may be left in the TEE. ``tee``: another one than a
    software TEE with these TAs and ``options``, which is ``reached`` directly or behind OP-TEE's partition."""
    if tee is None:
        built_in = built_in or examples.built_in()
        soft = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=built_in, **options)
        tee = (reached or Live.reached)(soft)
    one = Live(folder / "tee.sock", limits or Limits(), queues, tee)
    started = threading.Event()
    scope = trio.CancelScope()
    tokens: list[trio.lowlevel.TrioToken] = []
    with Listener.at_path(one.path) as listener, one.dataplane as dataplane:
        dataplane.post(lambda: attach(dataplane, one.router))

        async def main() -> None:
            tokens.append(trio.lowlevel.current_trio_token())
            started.set()
            with scope:
                await serve(one.device, listener, dataplane)

        thread = threading.Thread(target=lambda: trio.run(main), daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield one
        finally:
            tokens[0].run_sync_soon(scope.cancel)
            thread.join(10)
            assert not thread.is_alive()
        drained = threading.Event()
        deadline = time.monotonic() + 10
        while any(one.tee.usage().values()) and time.monotonic() < deadline:
            drained.wait(0.005)
        assert not any(one.tee.usage().values()), one.tee.usage()
