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
    capacity,
    region_size,
)
from pyvhost.messages import INFLIGHT as LAYOUT
from pyvhost.messages import U64, VRING_STATE, Feature
from pyvhost.testing import ring_pair
from pyvhost.vring.api import Fences
from pyvhost.vring.choice import VARIABLE, queue_class
from pyvhost.vring.packed import INITIAL_BASE, pack_base, unpack_base
from pyvhost.vring.packed_device import PackedDeviceQueue
from pyvhost.vring.packed_inflight import PackedInflight
from pyvhost.vring.split_device import SplitDeviceQueue
from tests.pyvhost.fakes import Disconnected, F, Vmm
from tests.pyvhost.toys import Echo, Late
from tests.pyvhost.vring.kinds import QUEUES, Kind


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

    def __len__(self) -> int:
        return len(self.view)

    def __getitem__(self, key: Any) -> Any:
        return self.view[key]

    def __setitem__(self, key: int, value: int) -> None:
        self.power.store()
        self.view[key] = value


SIZE = 8


class Machine:
    """A driver, the memory that outlives backends, and one backend after the other."""

    def __init__(self, packed: bool, requests: int, chain: int = 1) -> None:
        """``requests`` of one descriptor have been served before; those that come are of up to ``chain``."""
        self.kind = Kind(packed, "pure")
        self.pair = ring_pair(SIZE, packed=packed, base=self.kind.base(SIZE, requests), queue="pure")
        self.driver = self.pair.driver
        self.region = memoryview(bytearray(region_size(SIZE, packed=packed)))
        self.chain = chain
        self.added = 0
        self.done: list[int] = []
        self.base = self.kind.base(SIZE, requests)

    def add(self) -> None:
        count = SIZE if self.chain == SIZE and not self.added % 3 else 1 + self.added % self.chain
        if self.driver.free_slots >= count:
            self.driver.add([(self.pair.data, 8)] * count, [], self.added)
            self.added += 1

    def poll(self) -> None:
        self.done += [token for token, _ in self.driver.poll()]  # raises for what is completed twice

    def backend(self, power: Power) -> SplitDeviceQueue | PackedDeviceQueue:
        """A new one; may be killed at once."""
        queue: Any = self.kind.factory(SIZE, self.pair.memory, *self.pair.parts, fences=Fences.none(), base=self.base)
        track: Any = (PackedInflight if self.kind.packed else SplitInflight)(self.region)
        for owner, names in (
            (queue, ("_flags", "_lengths") if self.kind.packed else ("_used", "_ids", "_lengths")),
            (
                track,
                ("words", "ints", "longs") if self.kind.packed else ("flags", "words", "marks", "counters", "nexts"),
            ),
        ):
            for name in names:
                setattr(owner, name, Words(getattr(owner, name), power))
        queue.track(track)
        assert isinstance(queue, SplitDeviceQueue | PackedDeviceQueue)
        return queue

    def killed(self) -> None:
        """As QEMU has it: it takes the split ring's used index for where to go on, and knows nothing of a packed
        one."""
        if not self.kind.packed:
            self.base = int.from_bytes(self.pair.parts[2][2:4], "little")

    def end(self) -> None:
        """One more backend, which serves all there is. What was lost, or is completed twice, is found here."""
        queue = self.backend(Power(1 << 30))
        while (chain := queue.pop()) is not None:
            assert chain.readable_bytes == 8 * len(chain.readable)
            queue.push(chain.head)
        assert queue.broken is None
        assert queue.in_flight == 0
        self.poll()
        assert sorted(self.done) == list(range(self.added))
        assert self.driver.in_flight == 0


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
    st.booleans(),
    st.lists(st.tuples(STEPS, st.integers(0, 60)), min_size=1, max_size=5),
    st.sampled_from([0, 5, 0xFFFD]),
    st.sampled_from([1, 3, SIZE]),
)
def test_killed_between_any_two_stores(
    packed: bool, lives: list[tuple[list[str], int]], requests: int, chain: int
) -> None:
    machine = Machine(packed, requests, chain)
    # The first one sets the record up, before it has taken anything.
    machine.backend(Power(1 << 30))
    for steps, stores in lives:
        live(machine, steps, Power(stores))
        machine.killed()
    machine.end()


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
@pytest.mark.parametrize("chain", [1, 2, SIZE])
@pytest.mark.parametrize("packed", [False, True])
def test_killed_after_each_store(packed: bool, chain: int, second: int) -> None:
    """Every moment of one busy life, and then soon, or late, in the next one."""
    stores = 0
    survived = False
    while not survived:
        machine = Machine(packed, 0xFFFC, chain)
        machine.backend(Power(1 << 30))
        survived = live(machine, BUSY, Power(stores))
        machine.killed()
        live(machine, ["pop", "push last", "pop", "pop", "push first"], Power(second))
        machine.killed()
        machine.end()
        stores += 1
    assert stores > 25


@pytest.mark.parametrize("packed", [False, True])
def test_killed_while_it_recovers(packed: bool) -> None:
    """The same record, however often the next one dies over it."""
    for stores in range(60):
        for soon in range(8):
            machine = Machine(packed, 6, 3)
            machine.backend(Power(1 << 30))
            live(machine, BUSY, Power(stores))
            for _ in range(3):
                machine.killed()
                live(machine, [], Power(soon))
            machine.end()


@pytest.mark.parametrize("packed", [False, True])
def test_recovered_in_the_order_of_taking(packed: bool) -> None:
    machine = Machine(packed, 0)
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
    machine.killed()
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


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("entries", [1, 4, 7, 8, 1024, 1 << 15])
def test_capacity(packed: bool, entries: int) -> None:
    size = region_size(entries, packed=packed)
    assert entries <= capacity(size, packed=packed) <= min(entries + 3, 1 << 15)
    assert capacity(16, packed=packed) == 0


def test_a_region_that_is_too_small() -> None:
    track = SplitInflight(memoryview(bytearray(region_size(4))))
    with pytest.raises(RingError, match="a ring of 8"):
        track.recover(8, 0)
    with pytest.raises(RingError, match="a ring of 8"):
        PackedInflight(memoryview(bytearray(region_size(4, packed=True)))).recover(8, 0, memoryview(bytes(128)))


@settings(max_examples=300)
@given(st.binary(min_size=region_size(4), max_size=region_size(4)), st.integers(0, 0xFFFF), st.booleans())
def test_any_region(data: bytes, used_idx: int, valid_head: bool) -> None:
    region = bytearray(data)
    if valid_head:
        region[8:12] = b"\1\0\4\0"
    track = SplitInflight(memoryview(region))
    try:
        heads = track.recover(4, used_idx)
    except RingError:
        return
    if heads is not None:
        assert len(set(heads)) == len(heads)
        assert set(heads) <= set(range(4))
        assert track.words[7] == used_idx
        assert track.recover(4, used_idx) == heads


WILD = st.sampled_from([0, 1, 2, 3, 4, 5, 0xFF, 0x7FFF, 0xFFFF])


@settings(max_examples=600)
@given(
    heads=st.lists(WILD, min_size=2, max_size=2),
    positions=st.lists(WILD, min_size=2, max_size=2),
    wraps=st.lists(st.sampled_from([0, 1, 2, 0xFF]), min_size=2, max_size=2),
    entries=st.lists(st.tuples(st.booleans(), WILD, WILD, WILD, st.integers(0, 3), WILD), min_size=4, max_size=4),
    ring=st.binary(min_size=64, max_size=64),
)
def test_any_packed_region(
    heads: list[int], positions: list[int], wraps: list[int], entries: list[tuple[Any, ...]], ring: bytes
) -> None:
    region = bytearray(REGION_PACKED.pack(0, 1, 4, *heads, *positions, *wraps, [0] * 7))
    for inflight, following, last, num, counter, head in entries:
        region += DESC_STATE_PACKED.pack(inflight, following, last, num, counter, head, 0, 8, 0)
    region += bytes(region_size(4, packed=True) - len(region))
    before = bytes(region)
    track = PackedInflight(memoryview(region))
    try:
        found = track.recover(4, INITIAL_BASE, memoryview(ring))
    except RingError:
        assert region == before
        return
    assert found is not None
    base, requests = found
    position, _, used, _ = unpack_base(base)
    taken = sum(len(request.descriptors) // 16 for request in requests)
    assert position < 4
    assert used < 4
    assert (used + taken) % 4 == position
    assert len({request.head for request in requests}) == len(requests)
    assert len({request.first for request in requests} | {request.last for request in requests}) <= taken
    # It can be worked with: what is free is free, each entry once.
    free = []
    index = track.free
    while index != 4:
        free.append(index)
        index = track.links[index]
    assert len(free) == 4 - taken
    assert track.recover(4, INITIAL_BASE, memoryview(ring)) == found


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("free_head", {"free_head": 4, "old_free_head": 5}),
        ("a loop among the free ones", {"next": {2: 3, 3: 2}}),
        ("a loop in a request", {"next": {0: 0}}),
        ("a request that goes on outside", {"next": {0: 9}}),
        ("a request that goes on among the free ones", {"next": {0: 2}}),
        ("more descriptors than the ring", {"num": 5}),
        ("none", {"num": 0}),
        ("another end", {"last": 0}),
        ("a position outside", {"used_idx": 4, "old_used_idx": 4}),
        ("a wrap counter", {"used_wrap_counter": 2, "old_used_wrap_counter": 2}),
        ("an entry that is nowhere", {"next": {2: 4}}),
        ("fewer entries than the ring", {"desc_num": 3}),
        ("more entries than the region", {"desc_num": 0xFFFF}),
        ("the version", {"version": 2}),
    ],
)
@pytest.mark.parametrize("queue", QUEUES)
def test_a_packed_region_that_lies(queue: str, name: str, values: dict[str, Any]) -> None:
    """One request of two descriptors is in flight, in a region that is right but for one thing: refused, unchanged."""
    pair = ring_pair(4, packed=True, queue=queue)
    region = bytearray(region_size(4, packed=True))
    pair.device.track(PackedInflight(memoryview(region)))
    pair.driver.add([(pair.data, 8)] * 2, [], 1)
    assert pair.device.pop() is not None
    head = REGION_PACKED.unpack(region)._asdict()
    region[: REGION_PACKED.size] = REGION_PACKED.pack(**head | {k: v for k, v in values.items() if k in head})
    entries = [DESC_STATE_PACKED.unpack(region, 32 + 32 * n)._asdict() for n in range(4)]
    for n, following in values.get("next", {}).items():
        entries[n]["next"] = following
    entries[0] |= {k: v for k, v in values.items() if k in ("num", "last")}
    for n, entry in enumerate(entries):
        region[32 + 32 * n : 64 + 32 * n] = DESC_STATE_PACKED.pack(**entry)
    before = bytes(region)
    new = queue_class(True, queue)(4, pair.memory, *pair.parts, fences=Fences.none(), base=INITIAL_BASE)
    with pytest.raises(RingError):
        new.track(PackedInflight(memoryview(region)))
    assert region == before
    assert new.in_flight == 0
    assert not new.recovered


def test_resume_says_what_is_in_flight_and_nothing_else() -> None:
    track = SplitInflight(memoryview(bytearray(region_size(8))))
    assert track.recover(8, 0) is None
    track.taken(1)
    track.taken(2)
    track.resume(8, 0, [2, 5])
    assert SplitInflight(track.flags).recover(8, 0) == [2, 5]
    track.clear()
    assert SplitInflight(track.flags).recover(8, 7) is None


# --- by messages


def with_region(device: Late, queues: int = 2, packed: bool = False) -> tuple[Vmm, int, bytes]:
    vmm = Vmm(device)
    if packed:
        vmm.features |= Feature.RING_PACKED
    vmm.negotiate()
    return vmm, *make_region(vmm, queues)


def make_region(vmm: Vmm, queues: int = 2, padding: bytes = bytes(4)) -> tuple[int, bytes]:
    answer = vmm.tell(F.GET_INFLIGHT_FD, LAYOUT.pack(0, 0, queues, 8) + padding)
    assert len(answer) == LAYOUT.size + len(padding)
    body = LAYOUT.unpack(answer)
    # for the largest ring that there can be, whatever was asked for
    assert (body.mmap_size, body.mmap_offset) == (queues * region_size(1024, packed=vmm.packed), 0)
    assert (body.num_queues, body.queue_size) == (queues, 1024)
    (made,) = vmm.reply_fds
    assert len(vmm.ports.made[made]) == body.mmap_size
    fd = vmm.fd()
    vmm.ports.files[fd] = vmm.ports.made[made]
    return fd, answer


@pytest.mark.parametrize("packed", [False, True])
def test_another_backend_takes_over(packed: bool) -> None:
    old = Late()
    vmm, fd, region = with_region(old, packed=packed)
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
    vmm2.features = vmm.features
    vmm2.negotiate()
    fd = vmm2.fd()
    vmm2.ports.files[fd] = memory
    assert vmm2.ack(F.SET_INFLIGHT_FD, region, fd) == 0
    vmm2.ram, vmm2.drivers = ram, drivers
    vmm2.tell(F.SET_FEATURES, U64.pack(vmm2.features))
    fd = vmm2.fd()
    vmm2.ports.files[fd] = ram.obj
    vmm2.tell(F.SET_MEM_TABLE, vmm2.table(fd), fd)
    vmm2.ring(0, base=None if packed else 1, fresh=False)
    vmm2.enable(0)
    queue = new.queues[0]
    assert queue is not None
    assert len(queue.recovered) == 2
    assert new.link.tracked(0)
    vmm2.ports.turn()
    assert [bytes(c.read()) for _, c in new.held] == [b"one", b"three"]
    new.finish()
    assert sorted(t for t, _ in drivers[0].poll()) == [b"one", b"three"]
    assert vmm2.base(0) == (pack_base(6, 1, 6, 1) if packed else 3)
    vmm2.leave()


@pytest.mark.parametrize("packed", [False, True])
def test_a_pause_keeps_what_is_in_flight(packed: bool) -> None:
    device = Late()
    vmm, fd, region = with_region(device, packed=packed)
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


@pytest.mark.parametrize("queue", QUEUES)
@pytest.mark.parametrize("packed", [False, True])
def test_a_pause_that_cannot_end_goes_on(packed: bool, queue: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The region that comes with its end is refused; what is in flight is not lost, and the next region will do."""
    monkeypatch.setenv(VARIABLE, queue)
    device = Late()
    vmm, fd, region = with_region(device, packed=packed)
    memory = vmm.ports.files[fd]
    vmm.tell(F.SET_INFLIGHT_FD, region, fd)
    vmm.start(0)
    vmm.add(0)
    vmm.ports.turn()
    bases = vmm.stop(0)
    wrong, right = vmm.fd(), vmm.fd()
    vmm.ports.files[wrong] = bytearray(region_size(4, packed=packed))
    vmm.ports.files[right] = memory
    vmm.tell(F.SET_INFLIGHT_FD, LAYOUT.pack(region_size(4, packed=packed), 0, 1, 4), wrong)
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    vmm.ring(0, bases[0], fresh=False)
    assert vmm.ack(F.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 1
    paused = device.queues[0]
    assert paused is not None
    assert (paused.stopped, paused.in_flight) == (True, 1)
    vmm.tell(F.SET_INFLIGHT_FD, region, right)
    assert vmm.ack(F.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 0
    device.finish()
    assert [t for t, _ in vmm.drivers[0].poll()] == [b"hello"]
    vmm.leave()


@pytest.mark.parametrize("packed", [False, True])
def test_a_reset_clears_the_region(packed: bool) -> None:
    device = Late()
    vmm, fd, region = with_region(device, packed=packed)
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
    ("size", "offset", "queues", "entries", "refused"),
    [
        (192, 0, 1, 8, False),
        (4096, 64, 2, 8, False),  # larger than it had to be
        (0, 0, 1, 8, True),
        (1 << 40, 0, 1, 8, True),  # not in this file
        (192, 0, 0, 8, True),
        (192, 0, 3, 8, True),
        (192, 1 << 40, 1, 8, True),
        (192, 4, 1, 8, True),  # misaligned
        (192, 0, 1, 0, True),
        (192, 0, 1, 1 << 15, True),
    ],
)
def test_regions(size: int, offset: int, queues: int, entries: int, refused: bool) -> None:
    vmm = Vmm(Echo())
    vmm.negotiate()
    body = LAYOUT.pack(size, offset, queues, entries)
    assert vmm.ack(F.SET_INFLIGHT_FD, body, vmm.fd()) == refused
    assert bool(vmm.ports.open_fds) is False
    assert vmm.ack(F.SET_INFLIGHT_FD, body + bytes(3), vmm.fd()) == 1
    if not 1 <= queues <= 2 or not entries:
        with pytest.raises(Disconnected):
            vmm.tell(F.GET_INFLIGHT_FD, body)
    vmm.leave()


def test_queue_size_may_be_what_was_asked_for() -> None:
    """QEMU 10.0 asks for, and announces, its option ``queue-size``; its driver's ring has 1024 entries anyhow."""
    device = Late()
    vmm, fd, answer = with_region(device, 1)
    made = LAYOUT.unpack(answer)
    assert vmm.ack(F.SET_INFLIGHT_FD, LAYOUT.pack(made.mmap_size, 0, 1, 4), fd) == 0
    vmm.start(0)  # of 8
    vmm.add(0)
    vmm.ports.turn()
    assert device.link.tracked(0)
    assert SplitInflight(memoryview(vmm.ports.files[fd])).recover(8, 0) == [0]
    vmm.leave()


def test_a_ring_that_its_region_has_no_room_for() -> None:
    vmm = Vmm(Echo())
    vmm.negotiate()
    vmm.tell(F.SET_INFLIGHT_FD, LAYOUT.pack(region_size(7), 0, 1, 4), vmm.fd())
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    vmm.set_memory()
    vmm.ring(0)
    assert vmm.ack(F.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 1
    vmm.leave()
