"""What the tests of the backend share. Each runs twice: on a TEE that begins invokes at once, and one that cannot."""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import pytest

from tests.host_backend.bench import Bench, Guest, StartedOnly


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


@pytest.fixture
def guest(bench: Bench) -> Guest:
    return bench.guest()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("started"):
        return  # it sees to both itself
    if metafunc.cls is None or not issubclass(metafunc.cls, unittest.TestCase):
        metafunc.parametrize("at_once", [True, False], ids=["at-once", "started"], indirect=True)


@pytest.fixture(autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if not getattr(request, "param", True):
        monkeypatch.setattr(Bench, "tee_type", StartedOnly)
