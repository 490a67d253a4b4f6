"""What the tests of the backend share. Each runs on a TEE that begins invokes at once, on one that cannot, and on one
behind OP-TEE's partition."""

from __future__ import annotations

import unittest
from collections.abc import Iterator

import pytest

from tee.soft import SoftTee
from tests.host_backend.bench import Bench, Guest, StartedOnly, over_ffa

FOUR = "OP-TEE gives a TA four parameters"
INSIDE = "looks into the software TEE"
NOT_OVER_FFA = {
    "test_what_the_tee_is_given": FOUR,
    "test_impossible_parameters": FOUR,
    "test_inline_in_its_order": FOUR,
    "test_more_parameters_than_an_event_holds": "an RPC of OP-TEE's has room for 16, fewer than an event",
    "test_it_reaches_the_guest_whose_call_waits": "OP-TEE's driver answers NOTIFICATION itself",
    "test_what_an_event_may_not_say": "the partition refuses that memory before",
    "test_no_pause_holds_a_thread_of_the_tee_for_ever": INSIDE,
    "test_one_thread": INSIDE,
    "test_the_next_start_waits_for_the_tee": INSIDE,
    "test_an_error_in_giving_up_rpcs_or_telling": INSIDE,
    "test_invokes_that_compute_long": "of several calls each has its slice in a turn",
}
"""Tests that are not for a TEE over FF-A, and why."""

MODULES_NOT_OVER_FFA = {"test_service_requests": "there the pseudo-TA is the only way to services"}


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
        kinds = {"at-once": SoftTee, "started": StartedOnly, "ffa": over_ffa}
        module = metafunc.module.__name__.rpartition(".")[2]
        if metafunc.definition.originalname in NOT_OVER_FFA or module in MODULES_NOT_OVER_FFA:
            del kinds["ffa"]
        metafunc.parametrize("tee_type", kinds.values(), ids=kinds, indirect=True)


@pytest.fixture(autouse=True)
def tee_type(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "tee_type", staticmethod(getattr(request, "param", SoftTee)))
