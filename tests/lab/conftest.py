"""A backend outside, a real guest under QEMU inside: booted once for a module, reset by tests that need it.

`served` is for modules that have a fixture `linux`: a guest whose kernel drives the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.driven import DrivenGuest
from lab.qemu.guest import Guest, GuestConfig
from tests.lab.kit import Backend, furnish
from tests.lab.linux import complaints, supplicant


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


@pytest.fixture
def served(linux: DrivenGuest) -> Iterator[DrivenGuest]:
    """With a supplicant; afterwards the kernel must have had nothing to complain of."""
    serving = supplicant(linux)
    yield linux
    if serving.poll() is None:
        serving.kill()
        serving.wait()
    assert complaints(linux) == []
