"""Each test of the software TEE runs twice: with invokes that are started, and with invokes that begin at once."""

from __future__ import annotations

import unittest

import pytest

from tests.tee.bench import Bench


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    is_machine = metafunc.cls is not None and issubclass(metafunc.cls, unittest.TestCase)  # it draws that itself
    if not is_machine and metafunc.definition.get_closest_marker("started") is None:
        metafunc.parametrize("at_once", [False, True], ids=["started", "at-once"], indirect=True)


@pytest.fixture(autouse=True)
def at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "at_once", getattr(request, "param", False))
