"""Notifications of TAs, on their way to the guest's event queue."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device.messages import EVENT_HEADER
from device.wire import Event, Feature, ParamType, Queue
from tee.driver import Notification
from tee.results import Result
from tee.rpc import RpcCommand
from tee.soft import examples
from tee.soft.ta import UUID, Direction, Parameters, TrustedApplication
from tests.host_backend.bench import Bench, Guest, Sent

requirement = pytest.mark.requirement
V_IN = ParamType.VALUE_IN


class Bell(TrustedApplication):
    """Command 0 rings: value IN a, b times. Command 1 makes an RPC."""

    uuid = UUID(int=0xBE11)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        if command == 1:
            self.env.unmask_cancellation()
            await self.env.rpc(RpcCommand.FS, [])
            return
        asked = params.value(0, Direction.IN)
        for _ in range(asked.b):
            self.env.notify(asked.a)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(built_in={**examples.built_in("probe"), Bell.uuid: Bell})
    yield bench
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


class Ringer:
    """A session with the bell."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.context = guest.open_context()
        self.session = guest.open_session(self.context, Bell.uuid)

    def ring(self, value: int, times: int = 1) -> int:
        return self.guest.invoke(self.context, self.session, 0, (V_IN, value, times, 0)).ret

    def ask(self) -> Sent:
        return self.guest.invoke(self.context, self.guest.open_session(self.context, Bell.uuid), 1)


def told(guest: Guest) -> list[int]:
    """The values that came since the last look."""
    assert guest.events() == []
    seen, guest.notified[:] = list(guest.notified), []
    return seen


def one_more(guest: Guest) -> int:
    """Post one buffer: the type of the event that comes in it."""
    guest.post(1)
    guest.bench.turn()
    (sent,) = guest.ring(Queue.EVENT).returned
    guest.ring(Queue.EVENT).returned.clear()
    return int(EVENT_HEADER.unpack(bytes(sent.writable)).type)


@requirement("DEV-NOT-1")
@pytest.mark.feature("Notifications: from a TA to the machine whose client called it")
def test_only_the_guest_that_called_is_told(bench: Bench) -> None:
    guest, other = bench.guest(), bench.guest()
    one, two = Ringer(guest), Ringer(other)
    assert one.ring(7) == 0
    assert (told(guest), told(other)) == ([7], [])
    assert two.ring(255) == 0
    assert (told(guest), told(other)) == ([], [255])


@requirement("DEV-NOT-2", "DEV-EVT-2")
def test_a_value_is_told_once_and_again(bench: Bench) -> None:
    guest = bench.guest(buffers=0)
    ringer = Ringer(guest)
    for value in (3, 1, 3, 2, 1):
        ringer.ring(value, 50)
    assert len(guest.device.epoch.rpcs._notifications) == 3
    guest.post(3)
    bench.turn()
    assert told(guest) == [3, 1, 2]
    ringer.ring(3)
    assert told(guest) == [3]
    ringer.ring(3)
    assert told(guest) == [3]


@requirement("DEV-EVT-3")
@pytest.mark.parametrize("first_alone", [True, False])
def test_neither_starves_the_other(bench: Bench, first_alone: bool) -> None:
    guest = bench.guest(buffers=0)
    ringer = Ringer(guest)
    asked = [ringer.ask() for _ in range(3)]
    seen = [one_more(guest)] if first_alone else []
    for value in range(4):
        ringer.ring(value)
    if not first_alone:
        seen.append(one_more(guest))
    seen += [one_more(guest) for _ in range(6)]
    rpc, note = Event.RPC, Event.NOTIFICATION
    assert seen == [rpc, note, rpc, note, rpc, note, note]
    guest.close_context(ringer.context)
    assert {call.ret for call in asked} == {Result.CANCEL}


@requirement("DEV-FEA-4")
def test_without_the_feature(bench: Bench) -> None:
    guest = bench.guest(features=Feature.INLINE | Feature.RPC)
    assert Ringer(guest).ring(1) == 0
    assert told(guest) == []


def test_values_that_are_none(bench: Bench) -> None:
    guest = bench.guest()
    ringer = Ringer(guest)
    for value in (256, 1 << 32, (1 << 64) - 1):
        assert ringer.ring(value) == Result.BAD_PARAMETERS
    assert told(guest) == []


def test_a_pause_keeps_them_and_a_reset_does_not(bench: Bench) -> None:
    guest = bench.guest()
    ringer = Ringer(guest)
    guest.ring(Queue.EVENT).stop()
    guest.device.queue_stopped(Queue.EVENT)
    ringer.ring(9)
    guest.resume(Queue.EVENT)
    bench.turn()
    assert told(guest) == [9]
    guest.ring(Queue.EVENT).stop()
    guest.device.queue_stopped(Queue.EVENT)
    ringer.ring(9)
    guest.reset()
    guest.start(buffers=4)
    bench.turn()
    assert told(guest) == []


def test_one_that_is_nobodys(bench: Bench, guest: Guest) -> None:
    """Its call's epoch is over, or the TEE does not say whose it is."""
    bench.router._on_event(Notification(1))
    context = guest.open_context()
    guest.wait(context, guest.open_session(context))
    (pending,) = guest.device.epoch.calls.values()
    guest.reset()
    bench.router._on_event(Notification(1, pending))
    guest.start(buffers=4)
    bench.turn()
    assert told(guest) == []
