"""Reset, pause and the frontend's end, in each state of a request."""

from __future__ import annotations

import io
import json
from collections.abc import Callable

import pytest

from device.machines import LifeState
from device.wire import Feature, ParamType, Queue, Request, Status
from host_backend.trace import Trace
from tee.calls import CloseContext
from tee.driver import Done
from tee.results import Result
from tee.rpc import RpcCommand
from tee.soft.ta import UUID
from tests.host_backend.bench import RAM, Bench, Guest, Sent

requirement = pytest.mark.requirement
NOBODY = UUID(int=0xBAD)
IN, INOUT, V_IN, V_INOUT = ParamType.MEMREF_IN, ParamType.MEMREF_INOUT, ParamType.VALUE_IN, ParamType.VALUE_INOUT


def hold(guest: Guest, context: int, region: int) -> Sent:
    return guest.invoke(context, guest.open_session(context), 8, (INOUT, 0, 8, region), (V_INOUT, 10**9, 0, 0))


def running(guest: Guest) -> None:
    context = guest.open_context()
    hold(guest, context, guest.region(context))


def unregistering(guest: Guest) -> None:
    context = guest.open_context()
    region = guest.region(context)
    hold(guest, context, region)
    assert not guest.unregister(context, region).done


def not_begun(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context)
    for request in (
        lambda: guest.send(Request.OPEN_CONTEXT, flags=0, run=False),
        lambda: guest.register(context, (RAM, 64), run=False),
        lambda: guest.wait(context, session, run=False),
        lambda: guest.open(context, NOBODY, run=False),
    ):
        request()


def taken(guest: Guest) -> None:
    """Taken from the ring, started on the TEE, which has not run since."""
    context = guest.open_context()
    epoch, slot = guest.device.epoch, guest.ring(Queue.REQUEST)
    before = len(epoch.calls)
    for sent in (
        guest.send(Request.OPEN_CONTEXT, flags=0, run=False),
        guest.register(context, (RAM, 64), run=False),
        guest.open(context, NOBODY, run=False),
    ):
        chain = slot.pop()
        assert chain is not None
        guest.take(chain)
        assert not sent.done
    assert len(epoch.calls) == before + 3


def rpc_queued(guest: Guest) -> None:
    guest.ring(Queue.EVENT).available.clear()
    guest.open(guest.open_context(), NOBODY)


def rpc_sent(guest: Guest) -> None:
    guest.open(guest.open_context(), NOBODY)
    guest.event(RpcCommand.LOAD_TA)


def rpc_withdrawn(guest: Guest) -> None:
    context = guest.open_context()
    guest.cancel(context, guest.open(context, NOBODY).tag)
    assert len(guest.device.epoch.rpcs) == 1


def memory_lent(guest: Guest) -> None:
    context, supplicant = guest.open_context(), guest.open_context()
    region = guest.region(supplicant)
    guest.open(context, NOBODY)
    seen = guest.event(RpcCommand.LOAD_TA)
    guest.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], 100, seen.params[1][3])])
    guest.reply(guest.event(RpcCommand.SHM_ALLOC).rpc, 0, [(INOUT, 0, 100, region)])
    guest.unregister(supplicant, region)
    guest.close_context(supplicant)


def closing(guest: Guest) -> None:
    context = guest.open_context()
    guest.open_session(context)
    guest.close_context(context, run=False)
    chain = guest.ring(Queue.REQUEST).pop()
    assert chain is not None
    guest.take(chain)


STATES = [running, unregistering, not_begun, taken, rpc_queued, rpc_sent, rpc_withdrawn, memory_lent, closing]


@requirement("DEV-EPO-1", "DEV-EPO-3", "DEV-EPO-4", "DEV-VHU-3", "DEV-VHU-4", "DEV-INI-1")
@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("how", ["reset", "disconnect", "pause, reset"])
@pytest.mark.fault("guest-dies", "stale-ids")
def test_the_end_of_an_epoch(bench: Bench, guest: Guest, state: Callable[[Guest], None], how: str) -> None:
    other = bench.guest()
    theirs = other.open_context()
    session = other.open_session(theirs)
    state(guest)
    before = guest.epoch
    old = list(guest.sent)
    written = [sent.written for sent in old]
    if how == "pause, reset":
        guest.pause()
    guest.disconnect() if how == "disconnect" else guest.reset()
    assert guest.epoch not in (0, before)
    bench.turn()
    assert guest.device.life is LifeState.FRESH
    assert [sent.written for sent in old] == written
    assert guest.leases == 0
    assert bench.tee.usage()["contexts"] == 1
    assert other.invoke(theirs, session, 0).ret == 0
    # and the next one
    if how == "disconnect":
        guest.device.connected(guest.link)
    guest.start(buffers=4)
    assert guest.open(guest.send(Request.OPEN_CONTEXT, flags=0).response.ident()).ret == 0
    stale = guest.send(Request.OPEN_CONTEXT, flags=0, epoch=before)
    assert stale.status == Status.STALE_EPOCH


class Stubborn:
    """Keeps the Done of each CloseContext back."""

    def __init__(self, bench: Bench) -> None:
        self.kept: list[Done] = []
        self._deliver = bench.tee._sink
        bench.tee._sink = self

    def __call__(self, event: object) -> None:
        if isinstance(event, Done) and isinstance(event.call, CloseContext):
            self.kept.append(event)
        else:
            assert self._deliver is not None
            self._deliver(event)  # type: ignore[arg-type]

    def let_go(self) -> None:
        for event in self.kept:
            assert self._deliver is not None
            self._deliver(event)
        self.kept.clear()


@requirement("DEV-EPO-4", "DEV-INI-1", "DEV-VHU-5")
@pytest.mark.fault("guest-dies")
def test_the_next_start_waits_for_the_tee(bench: Bench, guest: Guest) -> None:
    tee = Stubborn(bench)
    running(guest)
    guest.reset()
    guest.start(buffers=4)
    first = guest.send(Request.OPEN_CONTEXT, flags=0)
    assert not first.done
    assert guest.device.life is LifeState.DRAINING_STARTED
    assert len(guest.device.read_config(0, 128)) == 128
    guest.reset()  # and again, while it waits
    assert guest.device.life is LifeState.DRAINING
    guest.start(buffers=4)
    second = guest.send(Request.OPEN_CONTEXT, flags=0)
    assert not second.done
    tee.let_go()
    bench.turn()
    assert guest.device.life is LifeState.RUNNING
    assert second.ret == 0
    tee._deliver = None if tee.kept else tee._deliver
    bench.tee._sink = tee._deliver


class TestPause:
    @requirement("DEV-VHU-3")
    @pytest.mark.fault("pause-in-call")
    def test_results_are_kept(self, bench: Bench, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session, 1000)
        epoch = guest.epoch
        guest.pause()
        bench.pass_time(2)
        assert not call.done
        assert guest.device.epoch.held
        guest.resume()
        bench.turn()
        assert call.ret == 0
        assert guest.epoch == epoch
        assert guest.invoke(context, session, 0).ret == 0

    @requirement("DEV-CAN-2")
    def test_a_kept_result_is_in_progress(self, bench: Bench, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session, 1000, tag=900)
        guest.pause()
        bench.pass_time(2)
        guest.resume(Queue.CONTROL)
        assert guest.cancel(context, call.tag).ret == 0
        assert guest.cancel(context, 5, own_tag=900).status == Status.DUPLICATE_TAG
        assert not call.done
        guest.resume(Queue.EVENT, Queue.REQUEST)
        assert call.ret == 0
        assert guest.cancel(context, call.tag).status == Status.NOT_FOUND

    @pytest.mark.fault("pause-in-call")
    def test_rpcs_and_their_answers(self, bench: Bench, guest: Guest) -> None:
        context = guest.open_context()
        guest.pause()
        call = guest.open(context, NOBODY)
        assert not guest.device.epoch.calls
        guest.resume()
        bench.turn()
        rpc = guest.event(RpcCommand.LOAD_TA).rpc
        guest.pause()
        reply = guest.reply(rpc, Result.ITEM_NOT_FOUND)
        assert not reply.done
        guest.resume()
        bench.turn()
        assert (reply.ret, call.ret) == (0, Result.ITEM_NOT_FOUND)

    def test_more_pauses_than_one(self, bench: Bench, guest: Guest) -> None:
        context = guest.open_context()
        calls = [guest.wait(context, guest.open_session(context), 100) for _ in range(4)]
        for _ in range(3):
            guest.pause()
            bench.pass_time(1)
            guest.resume()
            guest.pause()
            guest.resume()
        bench.turn()
        assert [call.ret for call in calls] == [0] * 4


@requirement("DEV-EPO-6")
@pytest.mark.fault("tee-lost")
def test_a_tee_that_was_lost() -> None:
    bench = Bench()
    guest = bench.guest()
    context = guest.open_context()
    call = guest.wait(context, guest.open_session(context))
    (pending,) = guest.device.epoch.calls.values()
    assert pending.call is not None
    bench.router._on_event(Done(pending.call, Result.COMMUNICATION, may_have_run=True))
    response = call.response
    assert (response.status, response.flags, response.ret) == (Status.ABANDONED, 1, Result.COMMUNICATION)
    assert call.written == 16
    assert guest.open_session(context)  # the guest's state is kept


@requirement("DEV-EPO-1", "DEV-CFG-3")
def test_numbers_of_epochs() -> None:
    """Neither 0 nor the last one's, whatever the dice say."""
    bench = Bench()
    dice = iter([0, 0, 5, 5, 0, 5, 7, 5])
    guest = Guest(bench, "dice", lambda: next(dice))
    bench.guests.append(guest)
    seen = [guest.epoch]
    for _ in range(2):
        guest.reset()
        seen.append(guest.epoch)
        guest.start()
    assert seen == [5, 7, 5]
    guest.device._new_epoch = lambda: 9
    guest.end()


@pytest.mark.fault("internal-error")
def test_an_error_of_ours_ends_one_guest(caplog: pytest.LogCaptureFixture) -> None:
    bench = Bench()
    guest, other = bench.guest(), bench.guest()
    context = guest.open_context()
    call = guest.wait(context, guest.open_session(context), 100)
    theirs = other.open_context()
    session = other.open_session(theirs)
    (pending,) = guest.device.epoch.calls.values()
    pending.finish = lambda *_: 1 / 0  # type: ignore[return-value, assignment]
    bench.clock.now += 1
    assert other.invoke(theirs, session, 0).ret == 0
    assert not call.done
    assert guest.link.closed == ["ZeroDivisionError('division by zero')"]
    assert not other.link.closed
    assert "an error of the backend itself, in serving Done" in caplog.text


def test_the_change_is_told(guest: Guest) -> None:
    running(guest)
    guest.reset()
    assert guest.link.config_changes == 1


@requirement("DEV-FEA-4")
def test_features_of_the_last_frontend(bench: Bench, guest: Guest) -> None:
    assert guest.device.epoch.features
    guest.disconnect()
    guest.device.connected(guest.link)
    assert guest.device.epoch.features == Feature(0)


def test_a_trace_of_everything() -> None:
    out = io.StringIO()
    trace = Trace(out)
    bench = Bench(trace=trace)
    guest = bench.guest()
    for state in STATES:
        state(guest)
        guest.reset()
        bench.turn()
        guest.start(buffers=8)
    guest.end()
    assert trace._open == {}
    events = json.loads(out.getvalue() + "]")
    begun = sorted((e["cat"], e["name"]) for e in events if e["ph"] == "b")
    assert begun == sorted((e["cat"], e["name"]) for e in events if e["ph"] == "e")
    assert ("requests", "UNREGISTER_MEMORY") in begun
    bench.check_empty()
