"""Invokes that begin at once (``tee.driver.InvokesAtOnce``): when they do not, and what is left of those that wait.

That they do the same as started ones is shown by all other tests here, which run both ways.
"""

from __future__ import annotations

from typing import Any

import pytest

from tee.calls import CloseContext, CloseSession, Invoke, UnregisterMemory
from tee.driver import Begun, InvokesAtOnce
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result
from tee.soft.ta import UUID, Client, Parameters, TrustedApplication
from tests.tee.bench import IDLE, Bench

pytestmark = pytest.mark.started

WELL = (Result.SUCCESS, Origin.TRUSTED_APP)
NULL, ADD, WAIT, PANIC, FAIL = 0, 1, 4, 6, 9


class Asker(TrustedApplication):
    """Unmasks, asks the supplicant, and says what came back."""

    uuid = UUID(int=7)
    single_instance = multi_session = True

    async def open_session(self, params: Parameters, client: Client) -> None:
        pass

    async def invoke(self, session: Any, command: int, params: Parameters) -> None:
        if command == 0:
            self.env.unmask_cancellation()
        elif command == 1:
            params.value(0, Direction.OUT).a = int(self.env.mask_cancellation())
        else:
            params.value(0, Direction.OUT).a = (await self.env.rpc(command, [])).code


def begin(bench: Bench, session: Any, func: int, *params: Any) -> Any:
    return bench.tee.invoke_at_once(session, func, list(params))


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_it_is_offered(bench: Bench) -> None:
    assert isinstance(bench.tee, InvokesAtOnce)


def test_nothing_is_left(bench: Bench) -> None:
    context = bench.context()
    session = bench.session(context)
    before = bench.tee.usage()
    assert begin(bench, session, NULL) == WELL
    value = Value(Direction.IN, 0x10000001)
    assert begin(bench, session, FAIL, value) == (0x10000001, Origin.TRUSTED_APP)
    assert bench.tee.usage() == before
    assert bench.run() is None
    bench.done(CloseContext(context=context))
    assert bench.tee.usage() == IDLE


def test_what_is_refused_is_left_to_start(bench: Bench) -> None:
    other = Bench()
    context = bench.context()
    closed, dead = bench.session(context), bench.session(context)
    bench.done(CloseSession(session=closed))
    session = bench.session(context)
    assert begin(bench, dead, PANIC) == (Result.TARGET_DEAD, Origin.TEE)
    wild = MemRef(Direction.IN, bench.registered(context, 8), 4, 8)
    nonsense: list[tuple[Any, Any, list[Any]]] = [
        (None, NULL, []),
        (closed, NULL, []),
        (dead, NULL, []),
        (other.session(other.context()), NULL, []),
        (session, -1, []),
        (session, 1 << 32, []),
        (session, "a", []),
        (session, NULL, [wild]),
        (session, NULL, [None]),
        (session, NULL, [Value(Direction.IN)] * 128),
    ]
    for target, func, params in nonsense:
        assert begin(bench, target, func, *params) is None
    assert begin(bench, session, NULL) == WELL


def test_others_have_their_turn_first(bench: Bench) -> None:
    context = bench.context()
    session, another = bench.session(context), bench.session(context)
    call = bench.start(Invoke(session=another, func=NULL))
    assert begin(bench, session, NULL) is None  # it was started before
    assert bench.finish(call).code == Result.SUCCESS
    assert begin(bench, session, NULL) == WELL


def test_a_busy_instance_and_no_thread() -> None:
    bench = Bench(threads=1)
    context = bench.context()
    session, another = bench.session(context), bench.session(context)
    call = Invoke(session=session, func=WAIT, params=[Value(Direction.IN, 0)])
    begun = begin(bench, session, WAIT, *call.params)
    begun.becomes(call)
    bench.run()
    assert begin(bench, session, NULL) is None
    assert begin(bench, another, NULL) is None
    bench.tee.cancel(call)
    assert bench.finish(call).code == Result.CANCEL
    assert begin(bench, another, NULL) == WELL


def test_one_that_waits_is_a_call_like_others(bench: Bench) -> None:
    context = bench.context()
    session = bench.session(context)
    memory = bench.registered(context, 8)
    hold, reference = Value(Direction.INOUT, 50), MemRef(Direction.INOUT, memory, 0, 8)
    begun = begin(bench, session, 8, reference, hold)
    assert not isinstance(begun, tuple)
    call = Invoke(session=session, func=8, params=[reference, hold])
    becomes: Begun = begun
    becomes.becomes(call)
    assert bench.tee.usage()["calls"] == 1
    with pytest.raises(ValueError, match="started already"):
        bench.tee.start(call)
    end = bench.start(UnregisterMemory(context=context, memory=memory))
    bench.run()
    assert bench.ended(end) is None  # its memory is in use
    memory.write(0, b"\x07")
    bench.now += 0.05
    assert bench.finish(call).code == Result.SUCCESS
    assert (hold.a, hold.b) == (0, 7)
    assert bench.ended(end) is not None


def test_its_rpc_names_its_call() -> None:
    bench = Bench(built_in={Asker.uuid: Asker})
    session = bench.session(bench.context(), Asker.uuid)
    out = Value(Direction.OUT)
    call = Invoke(session=session, func=77, params=[out])
    begin(bench, session, 77, out).becomes(call)
    rpc = bench.rpc()
    assert (rpc.command, rpc.call) == (77, call)
    bench.answer(rpc, 5)
    assert bench.finish(call).code == Result.SUCCESS
    assert out.a == 5


def test_each_call_begins_masked() -> None:
    bench = Bench(built_in={Asker.uuid: Asker})
    session = bench.session(bench.context(), Asker.uuid)
    assert begin(bench, session, 0) == WELL  # unmasks, and ends so
    out = Value(Direction.OUT)
    assert begin(bench, session, 1, out) == WELL
    assert out.a == 1


def test_the_context_closes_while_it_waits(bench: Bench) -> None:
    context = bench.context()
    session = bench.session(context)
    call = Invoke(session=session, func=WAIT, params=[Value(Direction.IN, 0)])
    begin(bench, session, WAIT, *call.params).becomes(call)
    bench.done(CloseContext(context=context))
    done = bench.ended(call)
    assert done is not None
    assert done.code == Result.CANCEL
    assert bench.tee.usage() == IDLE
