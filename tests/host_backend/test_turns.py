"""How much is done for one guest before others have their turn."""

from __future__ import annotations

from typing import Any

import pytest

from device.config import Limits
from device.wire import Queue
from tee.soft.ta import UUID, Client, Parameters, TrustedApplication
from tests.host_backend.bench import Bench, Guest

STEP = 0.003


class Busy(TrustedApplication):
    """Computes for STEP seconds, and does not wait."""

    uuid = UUID(int=0xB)

    async def open_session(self, params: Parameters, client: Client) -> None:
        pass

    async def invoke(self, session: Any, command: int, params: Parameters) -> None:
        BENCH[-1].clock.now += STEP


BENCH: list[Bench] = []


@pytest.fixture
def bench() -> Bench:
    bench = Bench(built_in={Busy.uuid: Busy})
    BENCH[:] = [bench]
    return bench


@pytest.mark.fault("long-invokes")
def test_invokes_that_compute_long(bench: Bench) -> None:
    """A guest's rings full of them hold up others for a few, not for all."""
    hostile, other = bench.guest(queues=4, limits=Limits(max_calls=200)), bench.guest()
    mine, others = (furnish(guest) for guest in (hostile, other))
    calls = [hostile.invoke(*mine, 0, queue=Queue.REQUEST + n % 4, run=False) for n in range(160)]
    call = other.invoke(*others, 0, run=False)
    before = bench.clock.now
    while not call.done:
        for guest in bench.guests:
            guest.look()
            assert bench.clock.now - before < 2.5 * STEP
            before = bench.clock.now
        bench.router.run()
        assert bench.clock.now - before < 2.5 * STEP
        before = bench.clock.now
    assert sum(one.done for one in calls) <= 20
    bench.turn()
    assert all(one.ret == 0 for one in [*calls, call])
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


def furnish(guest: Guest) -> tuple[int, int]:
    context = guest.open_context()
    return context, guest.open_session(context, Busy.uuid)
