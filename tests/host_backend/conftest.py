"""What the tests of the backend share. Each runs twice: on a TEE that begins invokes at once, and one that cannot."""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import pytest

from tee.soft import SoftTee
from tests.host_backend.bench import Bench, Guest, StartedOnly, over_ffa


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
        kinds = [SoftTee, StartedOnly, over_ffa]
        metafunc.parametrize("tee_type", kinds, ids=["at-once", "started", "ffa"], indirect=True)


@pytest.fixture(autouse=True)
def tee_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "tee_type", staticmethod(getattr(request, "param", SoftTee)))
