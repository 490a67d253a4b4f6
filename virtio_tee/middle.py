"""The middle way in one process: a guest with a virtio-tee device for control, and FF-A for its data."""

from __future__ import annotations

import secrets
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType

import trio

from device.config import Limits
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.ffa_memory import FfaMemory
from guest_driver.vhost_user import VhostUserTransport
from host_backend.device import TeeDevice
from host_backend.router import Router
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve
from pyvhost.io.sockets import Listener
from tee.driver import TeeDriver
from virtio_tee.ffa_tee import FfaTee

GUEST, ENDPOINT = "guest", 1
STOP_S = 10
"""Seconds that threads have to end."""


class MiddleGuest:
    """A guest that shares its memory with the TEE by FF-A and names it to its device by handle. A context manager.

    ``tee`` is what stands behind OP-TEE's partition. ``driver`` is the guest's: give it to a
    :class:`~tee.io.runtime.TeeRuntime`; everything that it allocates is shared by FF-A. Temporary memory travels inside
    requests unless the client says ``Context(runtime, register_from=1)``: then no byte of data passes through the
    device. ``ffa`` has the machine with all its roles, ``endpoint`` is the guest's; ``device`` is what a backend has.

    Device and TEE run on threads of their own. Raises OSError, TeeError, or PyvhostError.
    """

    def __init__(self, tee: TeeDriver, *, limits: Limits | None = None) -> None:
        self.ffa = FfaTee(tee, {GUEST: ENDPOINT})
        self.endpoint = self.ffa.vms[GUEST].endpoint
        self.router = Router(self.ffa, time.monotonic)
        self.device = TeeDevice(
            self.router,
            vm=GUEST,
            limits=limits or Limits(),
            request_queues=1,
            clock=time.monotonic,
            new_epoch=lambda: secrets.randbits(64),
            ffa_vm=ENDPOINT,
        )
        self._scope = trio.CancelScope()
        self._token: trio.lowlevel.TrioToken | None = None
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="vtee-"))
            listener = stack.enter_context(Listener.at_path(Path(folder) / "tee.sock"))
            dataplane = stack.enter_context(DataPlane("virtio-tee"))
            dataplane.post(lambda: dataplane.add_runner(self.router))
            started = threading.Event()
            thread = threading.Thread(
                target=trio.run, args=(self._serve, listener, dataplane, started), name="vhost-user", daemon=True
            )
            thread.start()
            stack.callback(thread.join, STOP_S)
            started.wait()
            stack.callback(self._stop)
            transport = VhostUserTransport(str(Path(folder) / "tee.sock"), wanted=int(DRIVER_FEATURES))
            self.memory = FfaMemory(self.endpoint, self.ffa.vms[GUEST].arena())
            try:
                self.driver = VirtioTeeDriver(transport, memory=self.memory)
            except BaseException:
                transport.close()
                raise
            self._close = stack.pop_all()

    async def _serve(self, listener: Listener, dataplane: DataPlane, started: threading.Event) -> None:
        self._token = trio.lowlevel.current_trio_token()
        started.set()
        with self._scope:
            await serve(self.device, listener, dataplane)

    def _stop(self) -> None:
        assert self._token is not None
        self._token.run_sync_soon(self._scope.cancel)

    def close(self) -> None:
        """Ends driver, device and threads; after the driver's runtime was closed."""
        self.driver.close()
        self._close.close()

    def __enter__(self) -> MiddleGuest:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
