"""The inflight region: a backend that is killed between any two of its stores loses nothing and does nothing twice."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhost.errors import RingError
from pyvhost.inflight import (
    DESC_STATE_PACKED,
    DESC_STATE_SPLIT,
    REGION_PACKED,
    REGION_SPLIT,
    SplitInflight,
    region_size,
)
from pyvhost.messages import INFLIGHT as LAYOUT
from pyvhost.messages import U64, VRING_STATE, Feature
from pyvhost.vring.api import Fences
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_device import SplitDeviceQueue
from pyvhost.vring.split_driver import SplitDriverQueue
from tests.pyvhost.fakes import Disconnected, F, Vmm
from tests.pyvhost.toys import Echo, Late


def test_layouts_are_those_of_the_document() -> None:
    assert (REGION_SPLIT.size, DESC_STATE_SPLIT.size) == (16, 16)
    assert (REGION_PACKED.size, DESC_STATE_PACKED.size) == (32, 32)
    offsets = {f.name: f.offset for f in DESC_STATE_SPLIT.fields}
    assert (offsets["inflight"], offsets["next"], offsets["counter"]) == (0, 6, 8)
    offsets = {f.name: f.offset for f in REGION_PACKED.fields}
    assert (offsets["old_used_idx"], offsets["used_wrap_counter"], offsets["padding"]) == (18, 20, 22)
    offsets = {f.name: f.offset for f in DESC_STATE_PACKED.fields}
    assert (offsets["counter"], offsets["id"], offsets["addr"]) == (8, 16, 24)
    assert region_size(128) == 64 * 33  # 16 + 128 * 16, to 64
    assert region_size(128, packed=True) == 64 * 65


class Killed(BaseException):
    """The backend's process is gone."""


class Power:
    """Lasts for so many stores."""

    def __init__(self, stores: int) -> None:
        self.left = stores

    def store(self) -> None:
        if not self.left:
            raise Killed
        self.left -= 1


class Words:
    """Shared memory that a backend stores into as long as it lives."""

    def __init__(self, view: memoryview, power: Power) -> None:
        self.view = view
        self.power = power

    def __getitem__(self, key: Any) -> Any:
        return self.view[key]

    def __setitem__(self, key: int, value: int) -> None:
        self.power.store()
        self.view[key] = value


SIZE = 8


class Machine:
    """A driver, the memory that outlives backends, and one backend after the other."""

    def __init__(self, base: int) -> None:
        self.layout = SplitLayout(SIZE)
        self.ram = memoryview(bytearray(1 << 12))
        self.region = memoryview(bytearray(region_size(SIZE)))
        for at in (self.layout.avail_offset, self.layout.used_offset):
            self.ram[at + 2 : at + 4] = base.to_bytes(2, "little")
        self.driver = SplitDriverQueue(SIZE, self.ram, 0, fences=Fences.none(), base=base)
        self.added = 0
        self.done: list[int] = []
        self.base = base

    def add(self) -> None:
        if self.driver.free_slots:
            self.driver.add([(0x800, 8)], [], self.added)
            self.added += 1

    def poll(self) -> None:
        self.done += [token for token, _ in self.driver.poll()]  # raises for what is completed twice

    def backend(self, power: Power) -> SplitDeviceQueue:
        """A new one; may be killed at once."""
        from pyvhost.testing import plain_memory

        layout, ram = self.layout, self.ram
        memory = plain_memory((0, 1 << 12))
        queue = SplitDeviceQueue(
            SIZE,
            memory,
            ram[: layout.desc_bytes],
            ram[layout.avail_offset :][: layout.avail_bytes],
            ram[layout.used_offset :][: layout.used_bytes],
            fences=Fences.none(),
            base=self.base,
        )
        queue._used = Words(queue._used, power)  # type: ignore[assignment]
        queue._ids = Words(queue._ids, power)  # type: ignore[assignment]
        queue._lengths = Words(queue._lengths, power)  # type: ignore[assignment]
        track = SplitInflight(self.region, SIZE)
        track.flags = Words(track.flags, power)  # type: ignore[assignment]
        track.words = Words(track.words, power)  # type: ignore[assignment]
        track.marks = Words(track.marks, power)  # type: ignore[assignment]
        track.counters = Words(track.counters, power)  # type: ignore[assignment]
        track.nexts = Words(track.nexts, power)  # type: ignore[assignment]
        queue.track(track)
        return queue


STEPS = st.lists(
    st.sampled_from(["add", "pop", "pop", "push first", "push last", "drain", "drain one", "poll"]), max_size=40
)


def live(machine: Machine, steps: list[str], power: Power) -> bool:
    """One backend's life; whether it survived."""
    try:
        queue = machine.backend(power)
        held = []
        for step in steps:
            if step == "add":
                machine.add()
            elif step == "poll":
                machine.poll()
            elif step == "pop":
                chain = queue.pop()
                if chain is not None:
                    held.append(chain.head)
            elif step.startswith("drain"):
                queue.drain(lambda chain: 0, 1 if step == "drain one" else 9, notify_every=2)
            elif held:
                queue.push(held.pop(0 if step == "push first" else -1))
    except Killed:
        return False
    return True


@settings(max_examples=600, deadline=None)
@given(
    st.lists(st.tuples(STEPS, st.integers(0, 60)), min_size=1, max_size=5),
    st.sampled_from([0, 5, 0xFFFD]),
)
def test_killed_between_any_two_stores(lives: list[tuple[list[str], int]], base: int) -> None:
    machine = Machine(base)
    # The first one sets the record up, before it has taken anything.
    machine.backend(Power(1 << 30))
    for steps, stores in lives:
        live(machine, steps, Power(stores))
        machine.base = int.from_bytes(machine.ram[machine.layout.used_offset + 2 :][:2], "little")  # as QEMU has it
    queue = machine.backend(Power(1 << 30))
    while (chain := queue.pop()) is not None:
        queue.push(chain.head)
    assert queue.broken is None
    machine.poll()
    assert sorted(machine.done) == list(range(machine.added))
    assert machine.driver.in_flight == 0


BUSY = ["add"] * 6 + ["pop"] * 4 + ["push last", "push first", "poll", "add", "pop", "pop", "push last", "push last"]
BUSY += [
    "poll",
    "add",
    "add",
    "pop",
    "push first",
    "drain one",
    "pop",
    "push last",
    "add",
    "drain",
    "poll",
    "add",
    "pop",
]


@pytest.mark.parametrize("second", [0, 1, 2, 3, 5, 8, 13, 1 << 30])
def test_killed_after_each_store(second: int) -> None:
    """Every moment of one busy life, and then soon, or late, in the next one."""
    stores = 0
    survived = False
    while not survived:
        machine = Machine(0xFFFC)
        machine.backend(Power(1 << 30))
        survived = live(machine, BUSY, Power(stores))
        live(machine, ["pop", "push last", "pop", "pop", "push first"], Power(second))
        queue = machine.backend(Power(1 << 30))
        while (chain := queue.pop()) is not None:
            queue.push(chain.head)
        machine.poll()
        assert sorted(machine.done) == list(range(machine.added))
        stores += 1
    assert stores > 40


def test_recovered_in_the_order_of_taking() -> None:
    machine = Machine(0)
    queue = machine.backend(Power(1 << 30))
    for _ in range(5):
        machine.add()
    heads = [chain.head for _ in range(4) if (chain := queue.pop()) is not None]
    queue.push(heads[1])
    machine.poll()
    machine.add()  # in the same place as the one that was returned
    heads += [chain.head for _ in range(2) if (chain := queue.pop()) is not None]
    assert heads[1] == heads[5]
    del heads[1]
    machine.add()
    machine.base = 1  # as from the used index
    new = machine.backend(Power(1 << 30))
    assert [c.head for c in new.recovered] == heads
    assert new.in_flight == 5
    assert new.enable_notifications()
    taken = [chain.head for _ in range(7) if (chain := new.pop()) is not None]
    assert taken[:5] == heads
    assert len(taken) == 6
    new.push(taken.pop(2))
    again = machine.backend(Power(1 << 30))  # the order outlives a second death
    assert [c.head for c in again.recovered] == taken


def test_a_region_that_is_too_small() -> None:
    track = SplitInflight(memoryview(bytearray(region_size(4))), 4)
    with pytest.raises(RingError, match="a ring of 8"):
        track.recover(8, 0)


@settings(max_examples=300)
@given(st.binary(min_size=region_size(4), max_size=region_size(4)), st.integers(0, 0xFFFF), st.booleans())
def test_any_region(data: bytes, used_idx: int, valid_head: bool) -> None:
    region = bytearray(data)
    if valid_head:
        region[8:12] = b"\1\0\4\0"
    track = SplitInflight(memoryview(region), 4)
    try:
        heads = track.recover(4, used_idx)
    except RingError:
        return
    if heads is not None:
        assert len(set(heads)) == len(heads)
        assert set(heads) <= set(range(4))
        assert track.words[7] == used_idx
        assert track.recover(4, used_idx) == heads


def test_resume_says_what_is_in_flight_and_nothing_else() -> None:
    track = SplitInflight(memoryview(bytearray(region_size(8))), 8)
    assert track.recover(8, 0) is None
    track.taken(1)
    track.taken(2)
    track.resume(8, 0, [2, 5])
    assert SplitInflight(track.flags, 8).recover(8, 0) == [2, 5]
    track.clear()
    assert SplitInflight(track.flags, 8).recover(8, 7) is None


# --- by messages


def with_region(device: Late, queues: int = 2) -> tuple[Vmm, int, bytes]:
    vmm = Vmm(device)
    vmm.negotiate()
    return vmm, *make_region(vmm, queues)


def make_region(vmm: Vmm, queues: int = 2, padding: bytes = bytes(4)) -> tuple[int, bytes]:
    answer = vmm.tell(F.GET_INFLIGHT_FD, LAYOUT.pack(0, 0, queues, 8) + padding)
    assert len(answer) == LAYOUT.size + len(padding)
    body = LAYOUT.unpack(answer)
    assert (body.mmap_size, body.mmap_offset) == (queues * region_size(8), 0)
    (made,) = vmm.reply_fds
    assert len(vmm.ports.made[made]) == body.mmap_size
    fd = vmm.fd()
    vmm.ports.files[fd] = vmm.ports.made[made]
    return fd, answer


def test_another_backend_takes_over() -> None:
    old = Late()
    vmm, fd, region = with_region(old)
    memory = vmm.ports.files[fd]
    assert vmm.ack(F.SET_INFLIGHT_FD, region, fd) == 0
    vmm.start(0, 1)
    for text in (b"one", b"two", b"three"):
        vmm.add(0, text)
    vmm.ports.turn()
    assert len(old.held) == 3
    index, chain = old.held.pop(1)
    queue = old.queues[index]
    assert queue is not None
    queue.push(chain.head, 0)
    assert [t for t, _ in vmm.drivers[0].poll()] == [b"two"]
    ram, drivers = vmm.ram, vmm.drivers
    vmm.session.ports = vmm.ports  # the old one is killed: none of its code runs any more

    new = Late()
    vmm2 = Vmm(new)
    vmm2.negotiate()
    fd = vmm2.fd()
    vmm2.ports.files[fd] = memory
    assert vmm2.ack(F.SET_INFLIGHT_FD, region, fd) == 0
    vmm2.ram, vmm2.drivers = ram, drivers
    vmm2.tell(F.SET_FEATURES, U64.pack(vmm2.features))
    fd = vmm2.fd()
    vmm2.ports.files[fd] = ram.obj
    vmm2.tell(F.SET_MEM_TABLE, vmm2.table(fd), fd)
    vmm2.ring(0, base=1, fresh=False)
    vmm2.enable(0)
    queue = new.queues[0]
    assert queue is not None
    assert len(queue.recovered) == 2
    assert new.link.tracked(0)
    vmm2.ports.turn()
    assert [bytes(c.read()) for _, c in new.held] == [b"one", b"three"]
    new.finish()
    assert sorted(t for t, _ in drivers[0].poll()) == [b"one", b"three"]
    assert vmm2.base(0) == 3
    vmm2.leave()


def test_a_pause_keeps_what_is_in_flight() -> None:
    device = Late()
    vmm, fd, region = with_region(device)
    memory = vmm.ports.files[fd]
    vmm.tell(F.SET_INFLIGHT_FD, region, fd)
    vmm.start(0, 1)
    vmm.add(0)
    vmm.ports.turn()
    bases = vmm.stop(0, 1)
    fd = vmm.fd()
    vmm.ports.files[fd] = memory
    vmm.tell(F.SET_INFLIGHT_FD, region, fd)
    vmm.start(0, 1, bases=bases, fresh=False)
    queue = device.queues[0]
    assert queue is not None
    assert not queue.recovered
    assert queue.in_flight == 1
    device.finish()
    assert [t for t, _ in vmm.drivers[0].poll()] == [b"hello"]
    vmm.leave()


def test_a_reset_clears_the_region() -> None:
    device = Late()
    vmm, fd, region = with_region(device)
    vmm.tell(F.SET_INFLIGHT_FD, region, fd)
    vmm.start(0)
    vmm.add(0)
    vmm.ports.turn()
    vmm.tell(F.RESET_DEVICE)
    device.held.clear()
    vmm.start(0)
    queue = device.queues[0]
    assert queue is not None
    assert queue.in_flight == 0
    vmm.leave()


@pytest.mark.parametrize(
    ("size", "offset", "queues", "entries"),
    [(0, 0, 1, 8), (1 << 40, 0, 1, 8), (192, 0, 0, 8), (192, 0, 3, 8), (192, 1 << 40, 1, 8), (192, 0, 1, 0)],
)
def test_wrong_regions(size: int, offset: int, queues: int, entries: int) -> None:
    vmm = Vmm(Echo())
    vmm.negotiate()
    body = LAYOUT.pack(size, offset, queues, entries)
    expected = 0 if size == 1 << 40 else 1  # more is announced than needed: no harm
    assert vmm.ack(F.SET_INFLIGHT_FD, body, vmm.fd()) == expected
    assert not vmm.ports.open_fds
    assert vmm.ack(F.SET_INFLIGHT_FD, body + bytes(3), vmm.fd()) == 1
    if not 1 <= queues <= 2 or not entries:
        with pytest.raises(Disconnected):
            vmm.tell(F.GET_INFLIGHT_FD, body)
    vmm.leave()


def test_a_ring_that_its_region_has_no_room_for() -> None:
    vmm = Vmm(Echo())
    vmm.negotiate()
    vmm.tell(F.SET_INFLIGHT_FD, LAYOUT.pack(region_size(4), 0, 1, 4), vmm.fd())
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    vmm.set_memory()
    vmm.ring(0)
    assert vmm.ack(F.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 1
    vmm.leave()


def test_packed_rings_have_none() -> None:
    vmm = Vmm(Echo())
    vmm.features |= Feature.RING_PACKED
    vmm.negotiate()
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    answer = LAYOUT.unpack(vmm.tell(F.GET_INFLIGHT_FD, LAYOUT.pack(0, 0, 2, 8)))
    assert answer.mmap_size == 0
    assert vmm.reply_fds == []
    assert vmm.ack(F.SET_INFLIGHT_FD, LAYOUT.pack(4096, 0, 2, 8), vmm.fd()) == 1
    vmm.leave()
