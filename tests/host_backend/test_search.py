"""A CANCEL that comes before its request was looked at: the device looks for it, a bounded piece at a time."""

from __future__ import annotations

import pytest

from device.wire import Queue, Request, Status
from host_backend import device as backend_device
from tee.results import Origin, Result
from tee.soft.ta import UUID
from tests.host_backend.bench import Bench, Guest, Sent

requirement = pytest.mark.requirement
BUDGET = backend_device._BUDGET
QUEUES = 4
NOBODY = UUID(int=0xBAD)


@pytest.fixture
def guest(bench: Bench) -> Guest:
    return bench.guest(queues=QUEUES)


def crowd(guest: Guest, each: int = 200) -> list[Sent]:
    """So many requests in each request ring, of which the device does not know."""
    sent = [
        guest.send(Request.OPEN_CONTEXT, flags=0, epoch=1, queue=Queue.REQUEST + index, run=False)
        for index in range(QUEUES)
        for _ in range(each)
    ]
    guest.link.woken.clear()
    return sent


def count(sent: list[Sent]) -> int:
    return sum(one.done for one in sent)


def turn(guest: Guest, only: int = Queue.CONTROL) -> int:
    """One look at the control ring; how many requests of others that took."""
    guest.link.woken = {only: None} if only in guest.link.woken else {}
    before = count(guest.sent)
    guest.look()
    return count(guest.sent) - before


@requirement("DEV-CAN-1", "DEV-QUE-4", "DEV-INV-4")
@pytest.mark.fault("cancel-storm")
def test_it_takes_no_more_of_a_turn_than_a_ring(guest: Guest) -> None:
    context = guest.open_context()
    sent = crowd(guest)
    cancel = guest.cancel(context, 4711, run=False)
    turns = 0
    while not cancel.done:
        assert turn(guest) <= BUDGET + 1
        turns += 1
    assert count(sent) == len(sent)  # all that was there before it
    assert turns >= len(sent) // BUDGET
    assert cancel.status == Status.NOT_FOUND


@pytest.mark.fault("cancel-storm")
def test_it_waits_at_no_empty_ring(guest: Guest) -> None:
    assert guest.cancel(guest.open_context(), 4711).status == Status.NOT_FOUND
    assert {guest.ring(index).spin_us for index in range(Queue.REQUEST, Queue.REQUEST + QUEUES)} == {0}


@requirement("DEV-CAN-1")
@pytest.mark.fault("cancel-storm")
def test_a_driver_that_goes_on_adding_is_answered(guest: Guest) -> None:
    context = guest.open_context()
    crowd(guest)
    cancels = [guest.cancel(context, 4711, run=False) for _ in range(3)]
    for _ in range(100):
        guest.link.woken[Queue.CONTROL] = None
        turn(guest)
        crowd(guest, 20)
        if all(cancel.done for cancel in cancels):
            break
        if len(cancels) < 9:
            cancels.append(guest.cancel(context, 4712, run=False))
    assert {cancel.status for cancel in cancels} == {Status.NOT_FOUND}
    guest.bench.turn()


@requirement("DEV-CAN-1", "DEV-CAN-3")
def test_what_is_found_has_not_run(guest: Guest) -> None:
    context, other = guest.open_context(), guest.open_context()
    session = guest.open_session(context)
    crowd(guest)
    call = guest.wait(context, session, queue=3, run=False)
    calls = guest.send(Request.OPEN_CONTEXT, flags=0, tag=888, queue=4, run=False)
    guest.link.woken.clear()
    cancel, again = (guest.cancel(context, call.tag, run=False) for _ in range(2))
    foreign = guest.cancel(other, call.tag, run=False)
    no_call = guest.cancel(context, 888, run=False)  # is in no context
    guest.bench.turn()
    response = call.response
    assert (response.status, response.ret, response.origin) == (Status.OK, Result.CANCEL, Origin.COMMS)
    assert (cancel.status, again.status, foreign.status) == (Status.OK, Status.OK, Status.NOT_FOUND)
    assert (calls.ret, no_call.status) == (0, Status.NOT_FOUND)
    assert guest.invoke(context, session, 0).ret == 0


def test_a_register_that_is_found_goes_on(guest: Guest) -> None:
    context = guest.open_context()
    register = guest.register(context, (0x10000, 64), run=False)
    guest.link.woken.clear()
    assert guest.cancel(context, register.tag).ret == 0
    assert register.ret == 0


@requirement("DEV-CAN-2")
def test_its_own_tag_is_in_progress(guest: Guest) -> None:
    context = guest.open_context()
    crowd(guest)
    search = guest.cancel(context, 4711, own_tag=77, run=False)
    turn(guest)
    assert not search.done
    assert guest.cancel(context, 1, own_tag=77, run=False) is not None
    of_a_cancel = guest.cancel(context, 77, own_tag=78, run=False)
    guest.bench.turn()
    assert (search.status, of_a_cancel.status) == (Status.NOT_FOUND, Status.NOT_FOUND)
    assert [sent.status for sent in guest.sent if sent.tag == 1][-1] == Status.DUPLICATE_TAG
    assert not guest.device.epoch.calls


@pytest.mark.fault("disabled-ring")
def test_a_ring_that_is_disabled_is_not_looked_at(guest: Guest) -> None:
    """vhost-user.rst, "Ring states": a disabled ring has no side effects."""
    context = guest.open_context()
    session = guest.open_session(context)
    guest.link.disabled.add(4)
    call = guest.invoke(context, session, 0, queue=4, run=False)
    guest.link.woken.clear()
    assert guest.cancel(context, call.tag).status == Status.NOT_FOUND
    assert not call.done
    guest.link.disabled.clear()
    guest.link.wake(4)
    guest.bench.turn()
    assert call.ret == 0


@pytest.mark.fault("disabled-ring")
def test_buffers_of_a_disabled_event_ring_stay(guest: Guest) -> None:
    guest.link.disabled.add(Queue.EVENT)
    context = guest.open_context()
    call = guest.open(context, NOBODY)
    assert guest.ring(Queue.EVENT).returned == []
    guest.link.disabled.clear()
    guest.link.wake(Queue.EVENT)
    guest.bench.turn()
    guest.reply(guest.events()[0].rpc, Result.ITEM_NOT_FOUND)
    assert call.ret == Result.ITEM_NOT_FOUND


def test_a_ring_that_is_disabled_meanwhile(guest: Guest) -> None:
    context = guest.open_context()
    crowd(guest)
    cancel = guest.cancel(context, 4711, run=False)
    turn(guest)
    guest.link.disabled.update({2, 3, 4, 5})
    turn(guest)
    assert cancel.status == Status.NOT_FOUND
    guest.link.disabled.clear()
    for index in (2, 3, 4, 5):
        guest.link.wake(index)
    guest.bench.turn()


@pytest.mark.parametrize("how", ["pause", "reset"])
def test_the_end_of_a_search(guest: Guest, how: str) -> None:
    context = guest.open_context()
    sent = crowd(guest)
    cancel = guest.cancel(context, 4711, run=False)
    turn(guest)
    if how == "pause":
        guest.pause()
        guest.resume()
        guest.bench.turn()
        assert cancel.status == Status.NOT_FOUND
        assert count(sent) == len(sent)
    else:
        guest.reset()
        guest.bench.turn()
        assert not cancel.done
        assert not guest.device.epoch.calls


def test_found_while_the_control_ring_rests(guest: Guest) -> None:
    """What it looks for comes by the ordinary way, and the answer waits."""
    context = guest.open_context()
    session = guest.open_session(context)
    crowd(guest)
    call = guest.wait(context, session, queue=5, run=False)
    cancel = guest.cancel(context, call.tag, run=False)
    turn(guest)
    guest.ring(Queue.CONTROL).stop()
    guest.device.queue_stopped(Queue.CONTROL)
    for index in range(2, 6):
        guest.link.wake(index)
    guest.bench.turn()
    assert (call.ret, cancel.done) == (Result.CANCEL, False)
    guest.resume(Queue.CONTROL)
    guest.bench.turn()
    assert cancel.ret == 0
