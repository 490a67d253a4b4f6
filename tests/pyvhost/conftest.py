"""Fixtures for pyvhost's tests."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pyvhost.device import Device
from pyvhost.io.sockets import Listener
from tests.pyvhost.harness import Server


@pytest.fixture
def start_server(tmp_path: Path) -> Iterator[Callable[..., Server]]:
    servers: list[Server] = []

    def start(device: Device | Callable[[], Device], listener: Listener | None = None, **options: Any) -> Server:
        if listener is None:
            listener = Listener.at_path(tmp_path / f"s{len(servers)}.sock")
        servers.append(Server(device, listener, **options))
        return servers[-1]

    yield start
    for server in reversed(servers):
        server.close()


@pytest.fixture
def no_fd_leak() -> Iterator[None]:
    """The test leaves as many file descriptors open as there were."""

    def count() -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    before = count()
    yield
    assert count() <= before
