"""What has ended leaves nothing for the garbage collector: it would keep guest memory mapped, and cost every guest."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest

from device.wire import ParamType, Status
from host_backend.device import RingSlot
from host_backend.tables import Pending
from tee.results import Result
from tests.host_backend.bench import INLINE, Bench, Guest


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


@pytest.mark.usefixtures("uncollected")
@pytest.mark.parametrize("func", [9, 99], ids=["an error of the TA's", "no such command"])
def test_invokes_that_fail(guest: Guest, func: int) -> None:
    """A guest can make as many as it likes, each with as much inline memory as fits."""
    context = guest.open_context()
    session = guest.open_session(context)
    params = (ParamType.VALUE_IN, 0x1000_0001, 0, 0), (ParamType.MEMREF_INOUT | INLINE, 0, 4096, 0)
    gc.collect()
    for _ in range(10):
        assert guest.invoke(context, session, func, *params, inline=bytes(4096), inline_out=4096).ret
    assert gc.collect() == 0


@pytest.mark.usefixtures("uncollected")
def test_invokes_that_panic(guest: Guest) -> None:
    context = guest.open_context()
    sessions = [guest.open_session(context) for _ in range(10)]
    gc.collect()
    for session in sessions:
        assert guest.invoke(context, session, 6).ret == Result.TARGET_DEAD
    assert gc.collect() == 0


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
