"""The split ring with an honest driver: everything that goes in comes out once, in any order, past every
wrap-around."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from pyvhost.errors import DeviceError, QueueFull, RingError, StateError
from pyvhost.memory import GuestMemory
from pyvhost.testing import RawRing, RingPair, plain_memory, ring_pair
from pyvhost.vring.api import Chain, DeviceQueue, DriverQueue, Fences
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_device import SplitDeviceQueue
from pyvhost.vring.split_driver import SplitDriverQueue


def test_both_sides_fulfil_their_protocols() -> None:
    pair = ring_pair()
    device: DeviceQueue = pair.device
    driver: DriverQueue = pair.driver
    assert device.size == driver.size == 8


def test_layout() -> None:
    layout = SplitLayout(8)
    assert (layout.desc_bytes, layout.avail_bytes, layout.used_bytes) == (128, 22, 70)
    assert (layout.avail_offset, layout.used_offset, layout.total_bytes) == (128, 152, 222)


class Traffic(RuleBasedStateMachine):
    """Random requests and completions; the model is a dictionary."""

    waiting = Bundle("waiting")  # popped by the device

    @initialize(
        size=st.sampled_from([1, 2, 4, 8]),
        base=st.sampled_from([0, 1, 65533, 65535]),
        event_idx=st.booleans(),
        indirect=st.sampled_from([0, 3, 12]),
    )
    def begin(self, size: int, base: int, event_idx: bool, indirect: int) -> None:
        self.pair: RingPair = ring_pair(
            size,
            base=base,
            event_idx=event_idx,
            indirect=indirect,
            # the data lies across the border of two adjoining regions
            regions=((0x1000, 0x3000), (0x4000, 0x10000)),
        )
        self.random = random.Random(size)
        self.serial = 0
        self.open: dict[int, tuple[bytes, int, int]] = {}  # token: what it says, room, address of the room
        self.expected: dict[int, int] = {}  # token: bytes written, not polled yet
        self.kicked = self.device_sleeps = True
        self.seen_signals = 0
        self.pair.driver.enable_notifications()
        self.pair.device.enable_notifications()

    @rule(readable=st.lists(st.integers(1, 40), max_size=4), writable=st.lists(st.integers(1, 40), max_size=4))
    def add(self, readable: list[int], writable: list[int]) -> None:
        pair, token = self.pair, self.serial
        addr = 0x3F80 + self.serial * 331 % 0x2000
        segments: list[list[tuple[int, int]]] = [[], []]
        data = bytes(self.random.randrange(256) for _ in range(sum(readable)))
        start = addr
        for out, lengths in zip(segments, (readable, writable), strict=True):
            for length in lengths:
                out.append((addr, length))
                addr += length
        free = pair.driver.free_slots
        try:
            pair.driver.add(*segments, token)
        except QueueFull:
            assert free < len(readable) + len(writable)
            return
        except ValueError:
            assert not readable + writable or len(readable + writable) > max(pair.driver.size, pair.driver._indirect)
            return
        pair.write(start, data)
        self.serial += 1
        self.open[token] = (data, sum(writable), start + sum(readable))
        if pair.driver.kick_needed():
            self.device_sleeps = False

    @rule(target=waiting)
    def pop(self) -> Any:
        chain = self.pair.device.pop()
        if chain is None:
            # Whoever sleeps must have been told of everything before.
            if not self.pair.device.enable_notifications():
                self.device_sleeps = True
            return None
        return chain

    @rule(chain=consumes(waiting), share=st.floats(0, 1))
    def push(self, chain: Chain | None, share: float) -> None:
        if chain is None:
            return
        device = self.pair.device
        token = next(t for t, (_, room, at) in self.open.items() if self._is(chain, t))
        data, room, _ = self.open.pop(token)
        assert (chain.readable_bytes, chain.writable_bytes) == (len(data), room)
        written = int(room * share)
        if written:
            chain.write(bytes(written))
        with pytest.raises(ValueError, match="room"):
            device.push(chain.head, room + 1)
        device.push(chain.head, written)
        with pytest.raises(StateError):
            device.push(chain.head, 0)
        self.expected[token] = written
        device.notify()

    def _is(self, chain: Chain, token: int) -> bool:
        """Whether ``chain`` is request ``token``, by the bookkeeping of the driver."""
        request = self.pair.driver._requests.get(chain.head)
        return request is not None and request[0] == token

    @rule()
    def poll(self) -> None:
        for token, written in self.pair.driver.poll():
            assert self.expected.pop(token) == written
        if self.pair.driver.enable_notifications():
            self.poll()
        self.seen_signals = len(self.pair.signals)

    @rule()
    def hush(self) -> None:
        self.pair.driver.disable_notifications()
        self.pair.driver.enable_notifications()
        self.pair.device.disable_notifications()
        self.pair.device.enable_notifications()

    @invariant()
    def sound(self) -> None:
        if not hasattr(self, "pair"):
            return
        assert self.pair.device.broken is None
        assert self.pair.driver.broken is None
        assert self.pair.driver.in_flight == len(self.open) + len(self.expected)
        # What was completed since the driver last looked was signalled, or some of it was.
        assert not self.expected or len(self.pair.signals) > self.seen_signals

    def teardown(self) -> None:
        if hasattr(self, "pair"):
            device = self.pair.device
            while (chain := device.pop()) is not None:
                device.push(chain.head)


TestTraffic = Traffic.TestCase
TestTraffic.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)


@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [0, 4])
def test_a_long_stream_wraps_the_index(event_idx: bool, indirect: int) -> None:
    pair = ring_pair(4, base=65500, event_idx=event_idx, indirect=indirect)
    for n in range(100):
        pair.write(pair.data, n.to_bytes(4, "little"))
        pair.driver.add([(pair.data, 4)], [(pair.data + 64, 8)], n)
        chain = pair.device.pop()
        assert chain is not None
        assert chain.read() == n.to_bytes(4, "little")
        pair.device.push(chain.head, chain.write(b"answered"))
        assert pair.driver.poll() == [(n, 8)]
        assert pair.read(pair.data + 64, 8) == b"answered"
    assert pair.device.next_base == (65500 + 100) & 0xFFFF


def test_chain_reads_and_writes_across_pieces() -> None:
    pair = ring_pair(8)
    pair.write(pair.data, bytes(range(30)))
    pair.driver.add([(pair.data, 10), (pair.data + 10, 20)], [(pair.data + 100, 3), (pair.data + 103, 5)], "t")
    chain = pair.device.pop()
    assert chain is not None
    assert chain.read() == bytes(range(30))
    assert chain.read(8, 4) == bytes(range(8, 12))
    assert chain.read(25, 100) == bytes(range(25, 30))
    assert chain.read(40) == b""
    assert chain.readable[0].readonly
    assert chain.write(b"abcdef", 1) == 7
    assert pair.read(pair.data + 100, 8) == b"\0abcdef\0"
    with pytest.raises(ValueError, match="do not fit"):
        chain.write(bytes(8), 1)
    assert "writable=8" in repr(chain)


def test_drain_in_order_with_signals_between() -> None:
    pair = ring_pair(16)
    for n in range(10):
        pair.driver.add([(pair.data, 1)], [], n)
    seen = []

    def handler(chain: Chain) -> int:
        seen.append(len(pair.signals))
        return 0

    assert pair.device.drain(handler, budget=9, notify_every=4) is True
    assert [t for t, _ in pair.driver.poll()] == list(range(9))
    assert seen == [0, 0, 0, 0, 1, 1, 1, 1, 2]
    assert len(pair.signals) == 3
    assert pair.device.drain(handler) is False
    assert pair.device.in_flight == 0


def test_drain_keeps_what_is_completed_later() -> None:
    pair = ring_pair(4)
    pair.driver.add([], [(pair.data, 4)], "a")
    pair.driver.add([], [(pair.data, 4)], "b")
    held: list[Chain] = []
    assert pair.device.drain(lambda chain: held.append(chain)) is False
    assert pair.device.in_flight == 2
    pair.device.push(held[1].head, 4)
    pair.device.push(held[0].head, 2)
    assert pair.driver.poll() == [("b", 4), ("a", 2)]


def test_drain_lets_errors_out_and_signals_what_is_done() -> None:
    pair = ring_pair(4)
    pair.driver.add([(pair.data, 1)], [], 1)
    pair.driver.add([(pair.data, 1)], [], 2)
    answers = iter([0])
    with pytest.raises(StopIteration):
        pair.device.drain(lambda chain: next(answers))
    assert len(pair.signals) == 1
    assert pair.driver.poll() == [(1, 0)]
    assert pair.device.in_flight == 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_signal_to_a_driver_that_polls(event_idx: bool) -> None:
    pair = ring_pair(8, event_idx=event_idx)
    pair.driver.add([(pair.data, 1)], [], 0)
    pair.device.drain(lambda chain: 0)
    assert pair.driver.poll()
    first = len(pair.signals)  # without EVENT_IDX none was asked away, with it the first is always given
    pair.driver.disable_notifications()
    for n in range(6):
        pair.driver.add([(pair.data, 1)], [], n)
        pair.device.drain(lambda chain: 0)
        pair.driver.poll()
    assert len(pair.signals) == first
    pair.driver.enable_notifications()
    pair.driver.add([(pair.data, 1)], [], 9)
    pair.device.drain(lambda chain: 0)
    assert len(pair.signals) == first + 1


@pytest.mark.parametrize("event_idx", [False, True])
def test_no_kick_to_a_device_that_polls(event_idx: bool) -> None:
    pair = ring_pair(8, event_idx=event_idx)
    pair.device.enable_notifications()
    pair.driver.add([(pair.data, 1)], [], 0)
    assert pair.driver.kick_needed()
    assert not pair.driver.kick_needed()
    pair.device.disable_notifications()
    pair.driver.add([(pair.data, 1)], [], 1)
    assert not pair.driver.kick_needed()
    assert pair.device.enable_notifications()  # says that there is something
    while (chain := pair.device.pop()) is not None:
        pair.device.push(chain.head)
    assert not pair.device.enable_notifications()
    pair.driver.add([(pair.data, 1)], [], 2)
    assert pair.driver.kick_needed()


def test_stop_and_adopt() -> None:
    pair = ring_pair(4)
    for n in range(3):
        pair.driver.add([], [(pair.data, 4)], n)
    one, two = pair.device.pop(), pair.device.pop()
    assert one is not None
    assert two is not None
    old = pair.device
    with pytest.raises(StateError, match="only a stopped"):
        pair.device.adopt(old)
    assert old.stop() == 2
    assert old.stop() == 2
    assert old.stopped
    assert old.pop() is None
    assert not old.enable_notifications()
    assert not old.notify()
    old.disable_notifications()
    with pytest.raises(StateError, match="stopped"):
        old.push(one.head)
    layout = SplitLayout(4)
    (view,) = pair.memory.translate(0x1000, layout.total_bytes)
    new = SplitDeviceQueue(
        4,
        pair.memory,
        view[: layout.desc_bytes],
        view[layout.avail_offset :],
        view[layout.used_offset :],
        fences=Fences.none(),
        base=2,
    )
    new.adopt(old)
    assert (new.in_flight, old.in_flight) == (2, 0)
    new.push(two.head, 1)
    three = new.pop()
    assert three is not None
    new.push(three.head, 2)
    new.push(one.head, 3)
    assert pair.driver.poll() == [(1, 1), (2, 2), (0, 3)]


def test_rebind_after_a_memory_change() -> None:
    pair = ring_pair(4)
    pair.driver.add([(pair.data, 4)], [], "x")
    layout = SplitLayout(4)
    (old,) = pair.memory.translate(0x1000, 1 << 16)
    moved = plain_memory((0x1000, 1 << 16), (0x50_0000, 0x1000))
    (new,) = moved.translate(0x1000, 1 << 16)
    new[:] = old
    new[pair.data - 0x1000 : pair.data - 0xFFC] = b"moved"[:4]
    parts = new[: layout.desc_bytes], new[layout.avail_offset :], new[layout.used_offset :]
    pair.device.rebind(moved, *parts)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.read() == b"move"
    with pytest.raises(RingError):
        pair.device.rebind(moved, parts[0][:-1], parts[1], parts[2])


@pytest.mark.parametrize("size", [0, 3, 1 << 16, -4])
def test_impossible_sizes(size: int) -> None:
    view = memoryview(bytearray(1 << 20))
    with pytest.raises(RingError):
        SplitDeviceQueue(size, GuestMemory(), view, view, view, fences=Fences.none())
    with pytest.raises(ValueError, match="entries"):
        SplitDriverQueue(size, view, 0x1000, fences=Fences.none())
    with pytest.raises(ValueError, match="too small or misaligned"):
        SplitDriverQueue(4, view, 0x1008, fences=Fences.none())
    with pytest.raises(RingError):
        RawRing(4, plain_memory((0, 4096))).device.rebind(GuestMemory(), view, view[:3], view)


def test_weak_memory_orders_are_fenced() -> None:
    """Where hardware reorders, the index is read before the entries and written after them."""
    fences: list[str] = []
    pair = ring_pair(4)
    for queue in (pair.device, pair.driver):
        queue._order = lambda: fences.append("order")
        queue._full = lambda: fences.append("full")
    pair.driver.add([], [(pair.data, 4)], 0)
    pair.driver.kick_needed()
    pair.device.drain(lambda chain: 0)
    pair.driver.poll()
    assert fences == [
        *("order", "full"),  # add, kick_needed
        *("order", "order", "order"),  # pop, push, pop
        *("full", "order", "full"),  # enable_notifications, notify
        "order",  # poll
    ]


# --- a driver does not trust its device


def hostile_used(pair: RingPair, index: int, *elements: tuple[int, int]) -> None:
    """Write the used ring as a device would that means no good."""
    layout = SplitLayout(pair.driver.size)
    (used,) = pair.memory.translate(0x1000 + layout.used_offset, layout.used_bytes)
    for n, (head, length) in enumerate(elements):
        used[4 + 8 * n : 12 + 8 * n] = head.to_bytes(4, "little") + length.to_bytes(4, "little")
    used[2:4] = index.to_bytes(2, "little")


@pytest.mark.parametrize(
    ("index", "elements", "good"),
    [
        (1, [(0xFFFF_FFFF, 0)], []),
        (1, [(3, 0)], []),
        (1, [(0, 5)], []),
        (1, [(0, 0xFFFF_FFFF)], []),
        (3, [], []),
        (0xFFFF, [], []),
        (2, [(0, 4), (0, 4)], [("a", 4)]),
        (2, [(1, 0), (7, 0)], [("b", 0)]),
    ],
)
def test_the_driver_refuses_what_it_did_not_give(index: int, elements: Any, good: Any) -> None:
    pair = ring_pair(8)
    pair.driver.add([], [(pair.data, 4)], "a")
    pair.driver.add([], [(pair.data, 4)], "b")
    hostile_used(pair, index, *elements)
    if good:
        assert pair.driver.poll() == good
    for _ in range(2):
        with pytest.raises(DeviceError):
            pair.driver.poll()


def test_the_driver_never_reads_descriptors_back() -> None:
    pair = ring_pair(4)
    pair.driver.add([(pair.data, 1)], [(pair.data, 1)], "a")
    (desc,) = pair.memory.translate(0x1000, 64)
    desc[:] = b"\xff" * 64
    hostile_used(pair, 1, (0, 1))
    assert pair.driver.poll() == [("a", 1)]
    assert pair.driver.free_slots == 4


@pytest.mark.parametrize(
    ("readable", "writable"), [([], []), ([(0x1000, 0)], []), ([(0x1000, -1)], []), ([(0x1000, 1)] * 9, [])]
)
def test_impossible_requests(readable: Any, writable: Any) -> None:
    pair = ring_pair(8)
    with pytest.raises(ValueError):
        pair.driver.add(readable, writable, None)
    assert pair.driver.free_slots == 8


def test_a_full_queue_says_so() -> None:
    pair = ring_pair(2, indirect=4)
    for n in range(2):
        pair.driver.add([(pair.data, 1)] * 4, [], n)
    assert pair.driver.free_slots == 0
    with pytest.raises(QueueFull):
        pair.driver.add([(pair.data, 1)], [], 2)
