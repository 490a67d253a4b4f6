"""What the tests of the backend share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.host_backend.bench import Bench, Guest


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
