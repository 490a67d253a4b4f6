"""What has ended leaves nothing for the garbage collector: it would keep guest memory mapped, and cost every guest."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from device.wire import ParamType, Status
from host_backend.device import RingSlot
from host_backend.tables import Pending
from tests.host_backend.bench import Bench, Guest


@pytest.fixture
def uncollected() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def left() -> int:
    return sum(isinstance(thing, Pending | RingSlot) for thing in gc.get_objects())


@pytest.mark.usefixtures("uncollected")
def test_requests(bench: Bench) -> None:
    guest = bench.guest()
    before = left()
    work(guest)
    assert left() == before


@pytest.mark.usefixtures("uncollected")
def test_a_guest_that_has_gone(bench: Bench) -> None:
    guest = bench.guest()
    before = left()
    context = guest.open_context()
    session = guest.open_session(context)
    guest.region(context)
    guest.wait(context, session, 10**9)
    guest.disconnect()
    bench.turn()
    assert left() == before


def work(guest: Guest) -> None:
    context = guest.open_context()
    session, region = guest.open_session(context), guest.region(context)
    assert guest.invoke(context, session, 3, (ParamType.MEMREF_INOUT, 0, 4096, region)).ret == 0
    assert guest.invoke(context, session, 0).ret == 0
    call = guest.wait(context, session)
    guest.cancel(context, call.tag)
    assert guest.invoke(context, 99, 0).status == Status.NO_SESSION
    assert guest.unregister(context, region).ret == 0
    guest.close_context(context)
