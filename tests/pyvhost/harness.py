"""A backend on a real socket, in a thread of its own, for tests that play the frontend."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any

import trio

from pyvhost.device import Device
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve
from pyvhost.io.sockets import Listener


class Server:
    """Serves ``device`` until ``close()``."""

    def __init__(
        self,
        device: Device | Callable[[], Device],
        listener: Listener,
        dataplane: DataPlane | None = None,
        **options: Any,
    ) -> None:
        self.path = listener.path or ""
        self.listener = listener
        self._own_dataplane = dataplane is None
        if dataplane is None:
            dataplane = DataPlane()
            dataplane.start()
        self.dataplane = dataplane
        self._device = device
        self._options = options
        self._started = threading.Event()
        self._error: BaseException | None = None
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._main, daemon=True)
        self._thread.start()
        assert self._started.wait(10)

    def _main(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as e:
            self._error = e
        self.ended.set()

    async def _serve(self) -> None:
        with trio.CancelScope() as self._scope:
            self._token = trio.lowlevel.current_trio_token()
            self._started.set()
            await serve(self._device, self.listener, self.dataplane, **self._options)

    def on_dataplane(self, call: Callable[[], Any]) -> Any:
        """Call on the data-plane thread and wait for the result."""
        done = threading.Event()
        box: list[Any] = []

        def run() -> None:
            try:
                box.append(call())
            finally:
                done.set()

        self.dataplane.post(run)
        assert done.wait(10)
        return box[0]

    def close(self) -> None:
        if not self.ended.is_set():
            with contextlib.suppress(trio.RunFinishedError):
                trio.from_thread.run_sync(self._scope.cancel, trio_token=self._token)
        self._thread.join(10)
        assert not self._thread.is_alive()
        if self._own_dataplane:
            self.dataplane.stop()
        self.listener.close()
        if self._error is not None:
            raise self._error
