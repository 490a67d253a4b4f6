"""Errors of the backend itself: the guest that they are about is lost, the device and other guests are not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from device.machines import LifeState
from device.wire import ParamType, Request
from host_backend.epoch import Epoch
from host_backend.rpcs import GuestRpcs
from host_backend.trace import Trace
from tee.rpc import RpcCommand
from tee.soft.ta import UUID
from tests.host_backend.bench import RAM, Bench, Guest

NOBODY = UUID(int=0xBAD)
INOUT, V_INOUT = ParamType.MEMREF_INOUT, ParamType.VALUE_INOUT
Act = Callable[[Guest, int], Any]


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Without the other tests' word that no connection was closed."""
    bench = Bench()
    yield bench
    for guest in bench.guests:
        guest.end()
        guest.link.closed.clear()
    bench.check_empty()


def boom(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("ours")


def hold(guest: Guest, context: int) -> Any:
    region = guest.region(context)
    return guest.invoke(context, guest.open_session(context), 8, (INOUT, 0, 8, region), (V_INOUT, 100, 0, 0))


def close_beside_a_lender(guest: Guest, context: int) -> None:
    """A context that closes while a call of another one uses its memory."""
    region = guest.region(context)
    call = guest.open(guest.open_context(), NOBODY)
    seen = guest.event(RpcCommand.LOAD_TA)
    guest.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], 100, seen.params[1][3])])
    guest.reply(guest.event(RpcCommand.SHM_ALLOC).rpc, 0, [(INOUT, 0, 100, region)])
    guest.close_context(context)
    assert not call.done


BROKEN: dict[str, tuple[str, Act]] = {
    "open context": ("_context_opened", lambda guest, _: guest.send(Request.OPEN_CONTEXT, flags=0)),
    "close context": ("_forget_context", lambda guest, context: guest.close_context(context)),
    "open session": ("_session_opened", lambda guest, context: guest.open(context)),
    "register": ("_registered", lambda guest, context: guest.register(context, (RAM, 64))),
    "unregister": ("_unregistered", lambda guest, context: guest.unregister(context, guest.region(context))),
    "respond": ("_respond", lambda guest, context: guest.open(context)),
    "unuse": ("unuse", lambda guest, context: guest.unregister(context, guest.region(context))),
    "lender": ("_forget_context", close_beside_a_lender),
}


def next_guest_is_served(guest: Guest) -> None:
    guest.disconnect()
    guest.bench.turn()
    assert guest.device.life is LifeState.FRESH
    assert guest.leases == 0
    guest.device.connected(guest.link)
    guest.start(buffers=4)
    context = guest.open_context()
    assert guest.invoke(context, guest.open_session(context), 0).ret == 0


@pytest.mark.fault("internal-error")
@pytest.mark.parametrize("name", BROKEN)
def test_an_epoch_drains_after_an_error_of_ours(bench: Bench, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    guest, other = bench.guest(), bench.guest()
    theirs = other.open_context()
    session = other.open_session(theirs)
    context = guest.open_context()
    hold(guest, guest.open_context())
    method, act = BROKEN[name]
    with monkeypatch.context() as patch:
        patch.setattr(Epoch, method, boom)
        act(guest, context)
        bench.pass_time(1)
        if method != "_respond":  # which is broken for the other one as well
            assert other.invoke(theirs, session, 0).ret == 0
    if name != "lender":
        assert guest.link.closed
    next_guest_is_served(guest)


@pytest.mark.fault("internal-error")
@pytest.mark.parametrize("method", ["end", "_give_up_unregister", "_close_for_good"])
def test_an_error_while_an_epoch_ends(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, method: str
) -> None:
    guest = bench.guest()
    hold(guest, guest.open_context())
    original, failed = getattr(Epoch, method), []

    def once(*args: Any, **more: Any) -> Any:
        if not failed:
            failed.append(True)
            boom()
        return original(*args, **more)

    monkeypatch.setattr(Epoch, method, once)
    next_guest_is_served(guest)
    assert "in ending an epoch" in caplog.text


@pytest.mark.fault("internal-error")
def test_an_error_in_giving_up_rpcs_or_telling(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    guest, other = bench.guest(), bench.guest()
    theirs = other.open_context()
    guest.open(guest.open_context(), NOBODY)
    with monkeypatch.context() as patch:
        patch.setattr(GuestRpcs, "expire", boom)
        bench.pass_time(20)
    assert guest.link.closed == ["ZeroDivisionError('ours')"]
    assert "in giving up late RPCs" in caplog.text
    with monkeypatch.context() as patch:
        patch.setattr(guest.device, "flush", boom)
        bench.router.mark(guest.device)
        bench.router.mark(other.device)
        assert bench.router.run() is None
    assert len(guest.link.closed) == 2
    assert other.open_session(theirs)
    assert not other.link.closed
    next_guest_is_served(guest)


@pytest.mark.fault("trace-full")
def test_a_trace_on_a_full_disk_ends_alone(caplog: pytest.LogCaptureFixture) -> None:
    trace = Trace(open("/dev/full", "w"))  # noqa: SIM115 - the trace closes it
    bench = Bench(trace=trace)
    guest = bench.guest()
    context = guest.open_context()
    session = guest.open_session(context)
    assert guest.invoke(context, session, 0).ret == 0
    assert guest.wait(context, session, 1).done is False
    guest.end()
    assert not guest.link.closed
    bench.check_empty()
    trace.close()
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    assert "No space left" in caplog.text
