"""The rings with an honest driver, over every implementation: everything that goes in comes out once, in any order,
past every wrap-around."""

from __future__ import annotations

import functools
import gc
import random
import struct
import threading
import time
import weakref
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from pyvhost.dirtylog import RingLog
from pyvhost.errors import MemoryFault, QueueFull, RingError, StateError
from pyvhost.io.fence import host_fences
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.testing import RingPair, plain_memory
from pyvhost.vring.api import Chain, DeviceQueue, DriverQueue, Fences
from tests.pyvhost.vring.kinds import Kind, each_kind


@each_kind
def test_both_sides_fulfil_their_protocols(kind: Kind) -> None:
    pair = kind.pair()
    device: DeviceQueue = pair.device
    driver: DriverQueue = pair.driver
    assert device.size == driver.size == 8


class Traffic(RuleBasedStateMachine):
    """Random requests and completions; the model is a dictionary."""

    kind: Kind

    waiting = Bundle("waiting")  # popped by the device

    @initialize(
        size=st.sampled_from([1, 2, 3, 4, 5, 8]),
        base=st.sampled_from([0, 1, 65533, 65535]),
        event_idx=st.booleans(),
        indirect=st.sampled_from([0, 3, 12]),
    )
    def begin(self, size: int, base: int, event_idx: bool, indirect: int) -> None:
        if not self.kind.packed:
            size = {3: 4, 5: 8}.get(size, size)
        self.pair: RingPair = self.kind.pair(
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


@each_kind
def test_traffic(kind: Kind) -> None:
    machine = type("Traffic", (Traffic,), {"kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=100, stateful_step_count=60, deadline=None))


@each_kind
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize("indirect", [0, 4])
def test_a_long_stream_wraps_the_index(kind: Kind, event_idx: bool, indirect: int) -> None:
    pair = kind.pair(4, base=65500, event_idx=event_idx, indirect=indirect)
    for n in range(100):
        pair.write(pair.data, n.to_bytes(4, "little"))
        pair.driver.add([(pair.data, 4)], [(pair.data + 64, 8)], n)
        chain = pair.device.pop()
        assert chain is not None
        assert chain.read() == n.to_bytes(4, "little")
        pair.device.push(chain.head, chain.write(b"answered"))
        assert pair.driver.poll() == [(n, 8)]
        assert pair.read(pair.data + 64, 8) == b"answered"
    slots = 200 if kind.packed and not indirect else 100
    assert pair.device.next_base == kind.base(4, 65500 + slots)


@each_kind
def test_chain_reads_and_writes_across_pieces(kind: Kind) -> None:
    pair = kind.pair(8)
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


# Readable and writable parts: those that are read in one go, and others.
SHAPES = [
    ([6], [8]),
    ([6], [5, 3]),
    ([4, 2], [8]),
    ([], [8]),
    ([6], []),
    ([3, 2, 1], [4, 4]),
    ([6], [1, 2, 5]),
]


@each_kind
@pytest.mark.parametrize(("out", "room"), SHAPES)
@pytest.mark.parametrize("indirect", [0, 4])
def test_chains_of_every_shape(kind: Kind, out: list[int], room: list[int], indirect: int) -> None:
    pair = kind.pair(16, indirect=indirect)
    data = bytes(range(1, 7))
    for _ in range(2):  # the region is known the second time
        pair.write(pair.data, data + bytes(100))
        at, segments = pair.data, []
        for length in (*out, *room):
            segments.append((at, length))
            at += length
        pair.driver.add(segments[: len(out)], segments[len(out) :], "t")
        chain = pair.device.pop()
        assert chain is not None
        assert (chain.readable_bytes, chain.writable_bytes) == (sum(out), sum(room))
        assert [bytes(view) for view in chain.readable] == [pair.read(*s) for s in segments[: len(out)]]
        assert all(view.readonly for view in chain.readable)
        assert [len(view) for view in chain.writable] == room
        for offset in range(8):
            for length in (None, 0, 1, 3, 9):
                expected = data[: sum(out)][offset:][:length]
                assert chain.read(offset, length) == expected
            for layout in (struct.Struct("<H"), struct.Struct("<BI")):
                if offset + layout.size <= sum(out):
                    assert chain.unpack(layout, offset) == layout.unpack_from(data, offset)
                else:
                    with pytest.raises(ValueError, match="readable bytes"):
                        chain.unpack(layout, offset)
        with pytest.raises(ValueError, match="offset"):
            chain.read(-1)
        with pytest.raises(ValueError, match="offset"):
            chain.write(b"", -1)
        with pytest.raises(ValueError, match="from -1 on"):
            chain.unpack(struct.Struct("<B"), -1)
        start = segments[len(out)][0] if room else pair.data
        for offset in range(sum(room) + 1):
            for length in range(sum(room) - offset + 1):
                pair.write(start, bytes(8))
                assert chain.write(b"x" * length, offset) == offset + length
                assert pair.read(start, 8) == (bytes(offset) + b"x" * length).ljust(8, b"\0")
            with pytest.raises(ValueError, match="do not fit"):
                chain.write(bytes(sum(room) - offset + 1), offset)
        pair.device.push(chain.head, sum(room))
        assert pair.driver.poll() == [("t", sum(room))]


@each_kind
def test_a_handler_that_works_on_the_queue(kind: Kind) -> None:
    """What is done while ``drain()`` goes on is not undone by it."""
    pair = kind.pair(16)
    for n in range(8):
        pair.driver.add([(pair.data, 1)], [(pair.data, 4)], n)
    heads: list[int] = []

    def handler(chain: Chain) -> int | None:
        heads.append(chain.head)
        if len(heads) == 1:
            return None
        if len(heads) == 2:
            other = pair.device.pop()
            assert other is not None
            pair.device.push(heads[0], 1)
            pair.device.push(other.head, 3)
            return 2
        if len(heads) == 4:
            pair.device.stop()
            return None
        return 4

    assert pair.device.drain(handler) is False
    assert pair.device.stopped
    assert len(heads) == 4
    assert pair.device.in_flight == 1
    assert pair.driver.poll() == [(0, 1), (2, 3), (1, 2), (3, 4)]


@each_kind
def test_a_handler_that_stops_the_queue_cannot_complete(kind: Kind) -> None:
    pair = kind.pair(4)
    pair.driver.add([], [(pair.data, 4)], 1)

    def handler(chain: Chain) -> int:
        pair.device.stop()
        return 0

    with pytest.raises(StateError, match="stopped"):
        pair.device.drain(handler)
    assert pair.device.in_flight == 1
    assert pair.driver.poll() == []


@each_kind
def test_drain_in_order_with_signals_between(kind: Kind) -> None:
    pair = kind.pair(16)
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


@each_kind
def test_drain_keeps_what_is_completed_later(kind: Kind) -> None:
    pair = kind.pair(4)
    pair.driver.add([], [(pair.data, 4)], "a")
    pair.driver.add([], [(pair.data, 4)], "b")
    held: list[Chain] = []
    assert pair.device.drain(lambda chain: held.append(chain)) is False
    assert pair.device.in_flight == 2
    pair.device.push(held[1].head, 4)
    pair.device.push(held[0].head, 2)
    assert pair.driver.poll() == [("b", 4), ("a", 2)]


@each_kind
def test_drain_lets_errors_out_and_signals_what_is_done(kind: Kind) -> None:
    pair = kind.pair(4)
    pair.driver.add([(pair.data, 1)], [], 1)
    pair.driver.add([(pair.data, 1)], [], 2)
    answers = iter([0])
    with pytest.raises(StopIteration):
        pair.device.drain(lambda chain: next(answers))
    assert len(pair.signals) == 1
    assert pair.driver.poll() == [(1, 0)]
    assert pair.device.in_flight == 1


@each_kind
@pytest.mark.parametrize("event_idx", [False, True])
def test_no_signal_to_a_driver_that_polls(kind: Kind, event_idx: bool) -> None:
    pair = kind.pair(8, event_idx=event_idx)
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


@each_kind
@pytest.mark.parametrize("event_idx", [False, True])
def test_no_kick_to_a_device_that_polls(kind: Kind, event_idx: bool) -> None:
    pair = kind.pair(8, event_idx=event_idx)
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


def successor(kind: Kind, old: DeviceQueue, pair: RingPair, **options: Any) -> DeviceQueue:
    """The queue that goes on where ``old`` stopped."""
    return kind.factory(old.size, pair.memory, *pair.parts, fences=host_fences(), base=old.next_base, **options)


@each_kind
def test_stop_and_adopt(kind: Kind) -> None:
    pair = kind.pair(4)
    for n in range(3):
        pair.driver.add([], [(pair.data, 4)], n)
    one, two = pair.device.pop(), pair.device.pop()
    assert one is not None
    assert two is not None
    old = pair.device
    with pytest.raises(StateError, match="only a stopped"):
        pair.device.adopt(old)
    base = old.stop()
    assert base == old.stop() == old.next_base
    assert old.stopped
    assert old.pop() is None
    assert not old.enable_notifications()
    assert not old.notify()
    assert not old.wait(10)
    old.disable_notifications()
    with pytest.raises(StateError, match="stopped"):
        old.push(one.head)
    new = successor(kind, old, pair)
    assert new.next_base == base
    with pytest.raises(StateError, match="only a stopped"):
        new.adopt(kind.pair(8).device)
    new.adopt(old)
    assert (new.in_flight, old.in_flight) == (2, 0)
    new.push(two.head, 1)
    three = new.pop()
    assert three is not None
    new.push(three.head, 2)
    new.push(one.head, 3)
    assert pair.driver.poll() == [(1, 1), (2, 2), (0, 3)]


@each_kind
def test_rebind_after_a_memory_change(kind: Kind) -> None:
    pair = kind.pair(4)
    pair.driver.add([(pair.data, 4)], [], "x")
    (old,) = pair.memory.translate(0x1000, 1 << 16)
    moved = plain_memory((0x1000, 1 << 16), (0x50_0000, 0x1000))
    (new,) = moved.translate(0x1000, 1 << 16)
    new[:] = old
    new[pair.data - 0x1000 : pair.data - 0xFFC] = b"move"
    desc, avail, used = pair.parts
    at = len(desc)
    used_at = pair.driver.used_addr - 0x1000
    parts = new[:at], new[at : at + len(avail)], new[used_at : used_at + len(used)]
    pair.device.rebind(moved, *parts)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.read() == b"move"
    for bad in ((parts[0][:-1], *parts[1:]), (parts[0], parts[1][:-1], parts[2]), (*parts[:2], parts[2][:-1])):
        with pytest.raises(RingError, match="too small"):
            pair.device.rebind(moved, *bad)
    if kind.queue == "compiled":
        for bad in ((new[1:], *parts[1:]), (parts[0], new[1:], parts[2]), (*parts[:2], new[1:])):
            with pytest.raises(RingError, match="misaligned"):
                pair.device.rebind(moved, *bad)
    pair.device.push(chain.head)  # what failed has changed nothing
    assert new[used_at : used_at + 4].tobytes() != bytes(4) or kind.packed


@each_kind
def test_a_queue_that_gives_up(kind: Kind) -> None:
    pair = kind.pair(4)
    pair.driver.add([], [(pair.data, 4)], 0)
    pair.device.give_up("lost")
    assert str(pair.device.broken) == "lost"
    assert pair.device.stopped
    assert pair.device.pop() is None


@each_kind
@pytest.mark.parametrize("size", [0, 1 << 16, (1 << 15) + 1, -4])
def test_impossible_sizes(kind: Kind, size: int) -> None:
    view = memoryview(bytearray(1 << 21))
    with pytest.raises(RingError, match="entries"):
        kind.factory(size, GuestMemory(), view, view, view, fences=Fences.none())
    pair = kind.pair()
    with pytest.raises(ValueError, match="entries"):
        type(pair.driver)(size, view, 0x1000, fences=Fences.none())
    with pytest.raises(ValueError, match="too small or misaligned"):
        type(pair.driver)(4, view, 0x1008, fences=Fences.none())


@each_kind
def test_what_is_pushed_is_checked(kind: Kind) -> None:
    pair = kind.pair()
    pair.driver.add([], [(pair.data, 4)], 0)
    chain = pair.device.pop()
    assert chain is not None
    for head in (chain.head + 1, -1, 1 << 16, 1 << 80, -(1 << 80)):
        with pytest.raises(StateError, match="in flight"):
            pair.device.push(head)
    for written in (5, -1, 1 << 32, 1 << 80, -(1 << 80)):
        with pytest.raises(ValueError, match="room for 4"):
            pair.device.push(chain.head, written)
    assert pair.device.in_flight == 1
    pair.device.push(head=chain.head, written=4)
    assert pair.device.in_flight == 0


@each_kind
def test_chains_at_their_borders(kind: Kind) -> None:
    pair = kind.pair()
    pair.driver.add([(pair.data, 3)], [(pair.data + 8, 2), (pair.data + 16, 2)], 0)
    pair.write(pair.data, b"abc")
    chain = pair.device.pop()
    assert chain is not None
    assert chain.read(offset=1, length=1) == b"b"
    assert chain.read(3) == chain.read(length=0) == chain.read(1 << 40) == b""
    assert chain.write(data=b"", offset=4) == 4
    assert chain.write(memoryview(b"wxyz")) == 4
    assert chain.write(bytearray(b"Y"), 1) == 2
    assert [bytes(view) for view in chain.writable] == [b"wY", b"yz"]
    with pytest.raises(ValueError, match="do not fit"):
        chain.write(b"", 5)
    with pytest.raises(TypeError):
        chain.write("text")  # type: ignore[arg-type]
    chain.writable[0][:] = b"in"
    assert pair.read(pair.data + 8, 2) == b"in"


@each_kind
def test_a_big_chain_is_copied_whole(kind: Kind) -> None:
    size = 1 << 20
    pair = kind.pair(regions=((0x1000, 0x1000), (0x2000, 2 * size + 0x1000)))
    data = random.Random(1).randbytes(size)
    pair.write(0x1F00, data)
    pair.driver.add([(0x1F00, size)], [(0x2000 + size, size)], 0)
    chain = pair.device.pop()
    assert chain is not None
    assert chain.write(chain.read()) == size
    assert pair.read(0x2000 + size, size) == data


@each_kind
@pytest.mark.parametrize("event_idx", [False, True])
def test_a_driver_that_polled_for_long_is_signalled_when_it_sleeps(kind: Kind, event_idx: bool) -> None:
    """The distance since the last signal must not be lost when it outgrows an index."""
    pair = kind.pair(8, event_idx=event_idx)
    driver, device = pair.driver, pair.device

    def serve() -> None:
        driver.add([(pair.data, 1)], [], 0)
        device.drain(lambda chain: 0)
        assert driver.poll()

    serve()
    driver.disable_notifications()
    for _ in range(65535):
        serve()
    before = len(pair.signals)
    assert not driver.enable_notifications()
    serve()
    assert len(pair.signals) == before + 1


@each_kind
def test_a_handler_may_use_the_queue(kind: Kind) -> None:
    pair = kind.pair(8)
    for n in range(4):
        pair.driver.add([(pair.data, 1)], [], n)
    inner: list[bool] = []

    def handler(chain: Chain) -> int:
        if not inner:
            inner.append(True)
            inner[0] = pair.device.drain(lambda chain: 0)
        return 0

    assert pair.device.drain(handler) is False
    assert inner == [False]
    assert sorted(pair.driver.poll()) == [(n, 0) for n in range(4)]
    pair.driver.add([(pair.data, 1)], [], 9)

    def stopper(chain: Chain) -> int:
        pair.device.stop()
        return 0

    with pytest.raises(StateError, match="stopped"):
        pair.device.drain(stopper)
    assert pair.device.in_flight == 1


@each_kind
def test_what_a_handler_must_not_return(kind: Kind) -> None:
    pair = kind.pair(8)
    pair.driver.add([(pair.data, 1)], [], 0)
    with pytest.raises(ValueError, match="room"):
        pair.device.drain(lambda chain: 1)
    pair.driver.add([(pair.data, 1)], [], 0)
    with pytest.raises(TypeError):
        pair.device.drain(lambda chain: "1")  # type: ignore[arg-type,return-value]
    pair.driver.add([(pair.data, 1)], [], 0)
    with pytest.raises(ValueError, match="room"):
        pair.device.drain(lambda chain: -1)
    assert pair.device.in_flight == 3


@each_kind
def test_a_failing_signal_gets_out(kind: Kind) -> None:
    pair = kind.pair(8)

    def fail() -> None:
        raise OSError("no eventfd")

    device = successor(kind, pair.device, pair, signal=fail)
    pair.driver.add([(pair.data, 1)], [], 0)
    with pytest.raises(OSError, match="eventfd"):
        device.drain(lambda chain: 0)
    assert pair.driver.poll() == [(0, 0)]


@each_kind
def test_waiting_looks_at_the_ring(kind: Kind) -> None:
    pair = kind.pair(8)
    assert pair.device.wait(0) is False
    pair.device = successor(kind, pair.device, pair)
    start = time.monotonic()
    assert pair.device.wait(2000) is False
    assert time.monotonic() - start >= 0.0015
    adder = threading.Timer(0.02, pair.driver.add, ([(pair.data, 1)], [], 0))
    adder.start()
    until = time.monotonic() + 30
    while not pair.device.wait(200_000):
        assert time.monotonic() < until
    adder.join()
    assert pair.device.pop() is not None


@each_kind
def test_spinning_serves_what_comes_meanwhile(kind: Kind) -> None:
    pair = kind.pair(8)
    pair.device = successor(kind, pair.device, pair, spin_us=500_000, signal=lambda: pair.signals.append(1))
    pair.driver.add([(pair.data, 1)], [], 0)
    adder = threading.Timer(0.02, pair.driver.add, ([(pair.data, 1)], [], 1))
    served = []

    def handler(chain: Chain) -> int:
        if not served:
            adder.start()
        served.append(len(pair.signals))
        return 0

    assert pair.device.drain(handler, budget=2) is False
    adder.join()
    assert served == [0, 1]  # the driver was told before the wait
    pair.device.spin_us = 1
    for _ in range(200):  # in vain
        assert pair.device.drain(handler) is False


@each_kind
def test_spinning_ends_where_a_driver_adds_one_at_a_time(kind: Kind) -> None:
    pair = kind.pair(8)
    pair.device = successor(kind, pair.device, pair, spin_us=200_000)
    pair.driver.add([(pair.data, 1)], [], 0)
    adders: list[threading.Timer] = []

    def handler(chain: Chain) -> int:
        if len(adders) < 200:
            adders.append(threading.Timer(0.001, add))
            adders[-1].start()
        return 0

    def add() -> None:
        pair.driver.poll()
        pair.driver.add([(pair.data, 1)], [], 0)

    pair.device.drain(handler, budget=1000)
    assert 1 < len(adders) < 200
    for adder in adders:
        adder.join()


@each_kind
def test_what_is_written_is_logged(kind: Kind) -> None:
    pair = kind.pair(8, indirect=4, regions=((0x1000, 0x3000), (0x4000, 0x10000)))
    marks: list[tuple[int, int]] = []
    pair.driver.add([(0x3F00, 1)], [(0x3FF0, 0x20), (0x5000, 7)], 0)
    pair.driver.add([(0x3F00, 1)], [], 1)
    pair.driver.add([], [(0x6000, 3)], 2)
    one = pair.device.pop()
    assert one is not None
    ring = 0xAB000
    pair.device.log_to(RingLog(lambda addr, length: marks.append((addr, length)), ring))
    two, three = pair.device.pop(), pair.device.pop()
    assert two is not None
    assert three is not None
    element = (lambda n: [(ring + 16 * n, 16)]) if kind.packed else (lambda n: [(ring + 4 + 8 * n, 8), (ring + 2, 2)])
    pair.device.push(three.head)
    assert marks == [(0x6000, 3), *element(0)]
    marks.clear()
    pair.device.push(one.head, 1)
    assert pages(marks[: -len(element(1))]) == pages([(0x3FF0, 0x20), (0x5000, 7)])
    assert marks[-len(element(1)) :] == element(1)
    pair.device.log_to(RingLog(lambda addr, length: marks.append((addr, length)), None))
    marks.clear()
    pair.device.push(two.head)
    assert marks == []
    pair.device.log_to(None)


def pages(marks: list[tuple[int, int]]) -> set[int]:
    return {addr + n for addr, length in marks for n in range(length)}


@each_kind
def test_memory_lives_as_long_as_the_chains_in_it(kind: Kind) -> None:
    pair = kind.pair()
    pair.driver.add([(pair.data, 4)], [], 0)
    pair.write(pair.data, b"kept")
    chain = pair.device.pop()
    assert chain is not None
    closed = []

    class Bytes(bytearray):
        pass

    buffer = Bytes(1 << 16)
    gone = weakref.ref(buffer, closed.append)
    memory = GuestMemory([Region(0x1000, 1 << 16, 0, Mapping(memoryview(buffer)))])
    (view,) = memory.translate(0x1000, 1 << 16)
    desc, avail, used = (len(part) for part in pair.parts)
    used_at = pair.driver.used_addr - 0x1000
    del buffer
    pair.device.rebind(memory, view[:desc], view[desc : desc + avail], view[used_at : used_at + used])
    pair.memory.close()
    assert chain.read() == b"kept"
    pair.device.stop()
    del view, memory
    gc.collect()
    assert closed
    assert gone() is None


@each_kind
def test_a_queue_in_a_cycle_is_collected(kind: Kind) -> None:
    class Owner:
        def signal(self) -> None: ...

    pair = kind.pair()
    owner = Owner()
    owner.queue = successor(kind, pair.device, pair, signal=owner.signal)  # type: ignore[attr-defined]
    owner.queue.log_to(RingLog(functools.partial(print, owner), None))  # type: ignore[attr-defined]
    gone = weakref.ref(owner)
    del owner
    gc.collect()
    assert gone() is None


@each_kind
def test_regions_that_are_not_mapped_any_more(kind: Kind) -> None:
    pair = kind.pair()
    mapping = Mapping(memoryview(bytearray(0x1000)), lambda: None)
    memory = GuestMemory([Region(0x10_0000, 0x1000, 0, mapping)])
    memory.close()
    try:
        pair.device.rebind(memory, *pair.parts)
    except MemoryFault:
        return  # found out at once, or when it is used
    pair.driver.add([(0x10_0000, 4)], [], 0)
    chain = pair.device.pop()
    assert chain is None or not chain.read()


@each_kind
@pytest.mark.parametrize(
    ("readable", "writable"), [([], []), ([(0x1000, 0)], []), ([(0x1000, -1)], []), ([(0x1000, 1)] * 9, [])]
)
def test_impossible_requests(kind: Kind, readable: Any, writable: Any) -> None:
    pair = kind.pair(8)
    with pytest.raises(ValueError):
        pair.driver.add(readable, writable, None)
    assert pair.driver.free_slots == 8


@each_kind
def test_a_full_queue_says_so(kind: Kind) -> None:
    pair = kind.pair(2, indirect=4)
    for n in range(2):
        pair.driver.add([(pair.data, 1)] * 4, [], n)
    assert pair.driver.free_slots == 0
    with pytest.raises(QueueFull):
        pair.driver.add([(pair.data, 1)], [], 2)


@each_kind
@pytest.mark.parametrize("part", [0, 1, 2])
def test_misaligned_parts(kind: Kind, part: int) -> None:
    """By an odd number of bytes: a word of the ring could not be written by one access."""
    pair = kind.pair(8)
    spare = memoryview(bytearray(len(pair.parts[part]) + 1))
    parts = list(pair.parts)
    parts[part] = spare[1:]
    base = kind.base(8, 0)
    with pytest.raises(RingError, match="a part of the ring is misaligned"):
        kind.factory(8, pair.memory, *parts, fences=Fences.none(), base=base)
    with pytest.raises(RingError, match="a part of the ring is misaligned"):
        pair.device.rebind(pair.memory, *parts)
    pair.driver.add([(pair.data, 1)], [], "it goes on where it was")
    assert pair.device.pop() is not None
