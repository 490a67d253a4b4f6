"""A backend outside, a real guest under QEMU inside: booted once for a module, reset by tests that need it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.qemu.guest import Guest, GuestConfig
from tests.lab.kit import Backend, furnish


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        made = Backend(Path(folder))
        made.start()
        yield made
        assert made.stop() == 0


@pytest.fixture(scope="module")
def guest(backend: Backend) -> Iterator[Guest]:
    with Guest(GuestConfig(sockets=[backend.socket])) as booted:
        furnish(booted, backend)
        yield booted
