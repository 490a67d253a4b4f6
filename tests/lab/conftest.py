"""A backend outside, a real guest under QEMU inside: booted once for a module, reset by tests that need it.

`served` and `unserved` are for modules that have a fixture `linux`: a guest whose kernel drives the device.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.driven import DrivenGuest, GuestProcess
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


class Serving:
    """The supplicant of a module's guest: it serves from test to test, except those that want none or another one."""

    def __init__(self, guest: DrivenGuest) -> None:
        self._guest = guest
        self._process: GuestProcess | None = None

    def begin(self) -> None:
        """Have one, if none runs."""
        if self._process is None or self._process.poll() is not None:
            self._process = supplicant(self._guest)

    def end(self) -> None:
        process, self._process = self._process, None
        if process is not None and process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def serving(linux: DrivenGuest) -> Iterator[Serving]:
    made = Serving(linux)
    yield made
    made.end()


@pytest.fixture
def served(linux: DrivenGuest, serving: Serving) -> Iterator[DrivenGuest]:
    """With a supplicant; afterwards the kernel must have had nothing to complain of."""
    serving.begin()
    yield linux
    assert complaints(linux) == []


@pytest.fixture
def unserved(linux: DrivenGuest, serving: Serving) -> DrivenGuest:
    """Without one."""
    serving.end()
    return linux
