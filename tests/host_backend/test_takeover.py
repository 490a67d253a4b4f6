"""A backend that is started behind a running driver: what its predecessor may have run is answered, not run."""

from __future__ import annotations

import itertools

import pytest

from device.config import Limits
from device.messages import EVENT_HEADER, REQUESTS, RESPONSE_HEADER
from device.requests import pack_request
from device.wire import Event, Queue, Request, ResponseFlag, Status
from host_backend.device import TeeDevice
from host_backend.router import Router
from pyvhost.errors import MessageError
from pyvhost.inflight import region_size
from pyvhost.messages import INFLIGHT, U64, BackendRequest, Feature, ProtocolFeature, encode
from tee.calls import Call
from tee.driver import Done, Sink, TeeInfo
from tee.memory import Memory
from tee.results import Result
from tee.rpc import Rpc, RpcReply
from tests.pyvhost.fakes import GUEST, F, Vmm

RESPONSE, EVENTS = 0x9000, 0xA000


EPOCHS = itertools.count(1000)  # no two backends have the same


class StuckTee:
    """A TEE in which every call waits until the test ends it."""

    info = TeeInfo(1, 1, 1, 1)

    def __init__(self) -> None:
        self.calls: list[Call] = []

    def attach(self, sink: Sink) -> None:
        self.sink = sink

    def start(self, call: Call) -> None:
        self.calls.append(call)

    def cancel(self, call: Call) -> None:
        pass

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        pass

    def run(self) -> float | None:
        return None

    def fileno(self) -> int | None:
        return None

    def allocate(self, size: int) -> Memory:
        return Memory.of(bytearray(size))

    def release(self, memory: Memory) -> None:
        pass

    def usage(self) -> dict[str, int]:
        return {}

    def end_all(self) -> None:
        while self.calls:
            self.sink(Done(self.calls.pop(0), Result.SUCCESS))


class Guest:
    """A driver whose memory outlives backends."""

    def __init__(self, *, tracked: bool, packed: bool = False, channel: bool = True, queues: int = 1) -> None:
        self.tracked = tracked
        self.packed = packed
        self.channel = channel
        self.queues = range(Queue.REQUEST + queues)
        self.region = bytearray(len(self.queues) * region_size(8, packed=packed))
        self.tags = 0
        self.attach()
        vmm = self.vmm
        vmm.set_memory()
        for index in self.queues:
            vmm.ring(index)
        self.enable()
        for n in range(2):
            vmm.drivers[Queue.EVENT].add([], [(GUEST + EVENTS + 0x800 * n, 1024)], ("event", n))
        self.kick(Queue.EVENT)

    def attach(self) -> None:
        self.tee = StuckTee()
        self.device = TeeDevice(
            Router(self.tee, lambda: 0.0),
            vm="one",
            limits=Limits(),
            request_queues=len(self.queues) - Queue.REQUEST,
            clock=lambda: 0.0,
            new_epoch=lambda: next(EPOCHS),
        )
        self.vmm = Vmm(self.device)
        if self.packed:
            self.vmm.features |= Feature.RING_PACKED
        self.vmm.negotiate()
        self.vmm.tell(F.SET_FEATURES, U64.pack(self.vmm.features))
        if self.channel:
            self.vmm.tell(F.SET_BACKEND_REQ_FD, b"", self.vmm.fd())
        if self.tracked:
            fd = self.vmm.fd()
            self.vmm.ports.files[fd] = self.region
            self.vmm.tell(F.SET_INFLIGHT_FD, INFLIGHT.pack(len(self.region), 0, len(self.queues), 8), fd)

    def enable(self) -> None:
        for index in self.queues:
            self.vmm.enable(index)
        self.turn()

    def turn(self) -> None:
        for _ in range(3):
            self.vmm.ports.turn()

    def kick(self, index: int) -> None:
        kick = self.vmm.backend.rings[index].kick
        assert kick is not None
        self.vmm.ports.watched[kick]()

    def request(self, epoch: int, room: int = 64, queue: int = Queue.REQUEST) -> None:
        self.tags += 1
        body = REQUESTS[Request.OPEN_CONTEXT].body.codec.pack(0)
        data = pack_request(Request.OPEN_CONTEXT, epoch=epoch, tag=self.tags, context=0, body=body)
        at = 0x8000 + 0x80 * self.tags
        self.vmm.ram[at : at + len(data)] = data
        answer = RESPONSE + 0x80 * self.tags
        self.vmm.drivers[queue].add([(GUEST + at, len(data))], [(GUEST + answer, room)], self.tags)
        self.kick(queue)

    def answers(self) -> dict[int, tuple[int, int, int]]:
        """Status, flags, result by tag."""
        found = {}
        for tag, written in (one for index in self.queues[Queue.REQUEST :] for one in self.vmm.drivers[index].poll()):
            if written:
                head = RESPONSE_HEADER.unpack(self.vmm.ram[RESPONSE + 0x80 * tag :][:written])
                found[tag] = (head.status, head.flags, head.ret)
            else:
                found[tag] = (-1, 0, 0)
        return found

    def events(self) -> list[tuple[int, int]]:
        """Type and epoch."""
        found = []
        for (_, n), written in self.vmm.drivers[Queue.EVENT].poll():
            head = EVENT_HEADER.unpack(self.vmm.ram[EVENTS + 0x800 * n :][:written])
            found.append((head.type, head.epoch))
        return found

    def restart(self) -> None:
        """The backend is killed; another one takes its place."""
        ram, drivers = self.vmm.ram, self.vmm.drivers
        self.attach()
        vmm = self.vmm
        vmm.ram, vmm.drivers = ram, drivers
        fd = vmm.fd()
        assert isinstance(ram.obj, bytearray)
        vmm.ports.files[fd] = ram.obj
        vmm.tell(F.SET_MEM_TABLE, vmm.table(fd), fd)
        for index in self.queues:
            used = drivers[index].used_addr - GUEST
            base = None if self.packed else int.from_bytes(ram[used + 2 : used + 4], "little")
            vmm.ring(index, base, fresh=False)
        self.enable()


LOST = (Status.ABANDONED, ResponseFlag.MAY_HAVE_RUN, Result.COMMUNICATION)


def complete_one(guest: Guest) -> None:
    """Something was completed, so that the ring shows it."""
    guest.request(guest.device.epoch.number)
    guest.tee.end_all()
    guest.device.flush()
    assert guest.answers() == {1: (Status.OK, 0, Result.SUCCESS)}


@pytest.mark.requirement("DEV-EPO-2", "DEV-EPO-5", "DEV-VHU-8")
@pytest.mark.parametrize(("tracked", "packed"), [(True, False), (False, False), (True, True)])
@pytest.mark.fault("backend-restart")
def test_what_was_taken_is_answered_and_not_run(tracked: bool, packed: bool) -> None:
    guest = Guest(tracked=tracked, packed=packed)
    assert guest.events() == []
    complete_one(guest)
    epoch = guest.device.epoch.number
    guest.request(epoch)
    guest.request(epoch)
    answered = {2: LOST, 3: LOST}
    if tracked:
        guest.request(epoch, room=8)  # returned at once, before the others: only a region tells
        answered[4] = (-1, 0, 0)
    assert len(guest.tee.calls) == 2
    old = guest.device
    guest.restart()
    assert guest.device is not old
    assert guest.answers() == answered
    assert guest.tee.calls == []
    assert guest.events() == [(Event.EPOCH, guest.device.epoch.number)]
    assert guest.vmm.ports.sent == [encode(BackendRequest.CONFIG_CHANGE_MSG)]
    guest.request(guest.device.epoch.number)
    assert len(guest.tee.calls) == 1
    guest.request(epoch)
    guest.device.flush()
    assert guest.answers()[guest.tags][0] == Status.STALE_EPOCH
    assert guest.events() == []
    guest.vmm.leave()


@pytest.mark.requirement("DEV-EPO-5", "DEV-VHU-8")
@pytest.mark.parametrize("queue", [Queue.REQUEST, Queue.REQUEST + 2])
def test_a_ring_of_which_nothing_was_returned(queue: int) -> None:
    """It looks like a new one; that another ring was used before tells what it is, whichever starts first."""
    guest = Guest(tracked=False, queues=3)
    epoch = guest.device.epoch.number
    guest.request(epoch, queue=Queue.REQUEST + 1)
    guest.tee.end_all()
    guest.device.flush()
    assert guest.answers() == {1: (Status.OK, 0, Result.SUCCESS)}
    guest.request(epoch, queue=queue)
    assert len(guest.tee.calls) == 1
    guest.restart()
    assert guest.answers() == {2: LOST}
    assert guest.tee.calls == []
    guest.vmm.leave()


@pytest.mark.requirement("DEV-VHU-10", "DEV-EPO-2", "DEV-EPO-7")
def test_without_a_channel_the_epoch_changes_nevertheless() -> None:
    """No state can be saved: whatever comes after is another epoch, and EPOCH and STALE_EPOCH tell."""
    guest = Guest(tracked=True, channel=False)
    assert not guest.vmm.backend.offered_protocol_features & ProtocolFeature.DEVICE_STATE
    with pytest.raises(MessageError):
        guest.device.save_state()
    complete_one(guest)
    epoch = guest.device.epoch.number
    guest.restart()
    assert guest.device.epoch.number != epoch
    assert guest.vmm.ports.sent == []
    assert guest.events() == [(Event.EPOCH, guest.device.epoch.number)]
    guest.request(epoch)
    guest.device.flush()
    assert guest.answers()[guest.tags][0] == Status.STALE_EPOCH
    guest.vmm.leave()


@pytest.mark.requirement("DEV-EPO-5")
@pytest.mark.parametrize("packed", [False, True])
def test_with_a_region_nothing_else_is_abandoned(packed: bool) -> None:
    """Not even before anything was completed, where the ring's base says nothing; and what came after is new."""
    guest = Guest(tracked=True, packed=packed)
    epoch = guest.device.epoch.number
    guest.request(epoch)
    assert len(guest.tee.calls) == 1
    kick = guest.vmm.backend.rings[Queue.REQUEST].kick
    assert kick is not None
    guest.vmm.ports.watched[kick] = lambda: None
    guest.request(epoch)  # dies before it looks
    guest.restart()
    answers = guest.answers()
    assert answers[1] == LOST
    assert answers[2][0] == Status.STALE_EPOCH
    assert guest.events() == [(Event.EPOCH, guest.device.epoch.number)]
    guest.vmm.leave()


@pytest.mark.requirement("DEV-EPO-2")
def test_the_epoch_waits_for_a_buffer_and_goes_first() -> None:
    guest = Guest(tracked=True)
    complete_one(guest)
    for _ in range(2):
        assert guest.device.send_event(EVENT_HEADER.pack(Event.NOTIFICATION, 0, 1))
    assert len(guest.events()) == 2
    guest.restart()
    assert guest.events() == []
    assert not guest.device.send_event(bytes(16))
    guest.vmm.drivers[Queue.EVENT].add([], [(GUEST + EVENTS, 1024)], ("event", 0))
    assert not guest.device.send_event(bytes(16))  # before the buffer was looked at
    assert guest.events() == [(Event.EPOCH, guest.device.epoch.number)]
    guest.vmm.leave()


def test_a_fresh_driver_is_told_nothing() -> None:
    guest = Guest(tracked=True)
    assert guest.vmm.ports.sent == []
    complete_one(guest)
    assert guest.events() == []
    assert not guest.vmm.backend.offered_features & Feature.LOG_ALL
    guest.vmm.leave()
