"""IN_ORDER: whatever the device's order, the driver sees its own; and a driver takes one element for a whole batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.errors import DeviceError, StateError
from pyvhost.inflight import SplitInflight, region_size
from pyvhost.messages import U64, Feature
from pyvhost.testing import plain_memory
from pyvhost.vring.api import Chain, Fences
from pyvhost.vring.choice import part_sizes
from pyvhost.vring.in_order import InOrderPackedQueue, InOrderSplitQueue
from pyvhost.vring.packed import INITIAL_BASE
from pyvhost.vring.packed_driver import PackedDriverQueue
from pyvhost.vring.packed_inflight import PackedInflight
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_driver import SplitDriverQueue
from tests.pyvhost.fakes import F, Vmm
from tests.pyvhost.toys import Late

SIZE = 8


class Pair:
    def __init__(self, packed: bool = False) -> None:
        self.packed = packed
        self.memory = plain_memory((0, 1 << 14))
        (self.view,) = self.memory.translate(0, 1 << 12)
        self.driver = (
            PackedDriverQueue(SIZE, self.view, 0, fences=Fences.none())
            if packed
            else SplitDriverQueue(SIZE, self.view, 0, fences=Fences.none(), in_order=True)
        )
        self.device = self.queue(INITIAL_BASE if packed else 0)

    def queue(self, base: int = 0) -> InOrderSplitQueue | InOrderPackedQueue:
        sizes = part_sizes(self.packed, SIZE)
        addresses = (self.driver.desc_addr, self.driver.avail_addr, self.driver.used_addr)
        parts = [self.view[at:][:size] for at, size in zip(addresses, sizes, strict=True)]
        kind = InOrderPackedQueue if self.packed else InOrderSplitQueue
        return kind(SIZE, self.memory, *parts, fences=Fences.none(), base=base)

    def add(self, token: int, room: int = 16) -> None:
        self.driver.add([], [(0x2000, room)], token)

    def used(self, index: int, *elements: tuple[int, int, int]) -> None:
        """A device that writes the used ring by itself: (slot, id, length)."""
        at = SplitLayout(SIZE).used_offset
        for slot, head, written in elements:
            self.view[at + 4 + 8 * slot :][:8] = head.to_bytes(4, "little") + written.to_bytes(4, "little")
        self.view[at + 2 : at + 4] = index.to_bytes(2, "little")


@given(st.booleans(), st.lists(st.sampled_from(["add", "pop", "first", "last", "poll", "pause", "die"]), max_size=60))
def test_the_driver_sees_its_own_order(packed: bool, steps: list[str]) -> None:
    pair = Pair(packed)
    record = memoryview(bytearray(region_size(SIZE, packed=True)))
    recorder = PackedInflight if packed else SplitInflight
    initial = pair.device.next_base
    pair.device.track(recorder(record))
    added = 0
    held: list[Chain] = []
    done: list[int] = []
    for step in steps:
        if step == "add" and pair.driver.free_slots > added % 3:
            pair.driver.add([(0x2000, 8)] * (added % 3), [(0x2000, 16)], added)
            added += 1
        elif step == "pop":
            chain = pair.device.pop()
            held += [chain] if chain is not None else []
        elif step in ("first", "last") and held:
            chain = held.pop(0 if step == "first" else -1)
            pair.device.push(chain.head, 3)
            with pytest.raises(StateError):
                pair.device.push(chain.head, 3)
        elif step == "poll":
            done += [token for token, _ in pair.driver.poll()]
        elif step == "pause":
            old = pair.device
            pair.device = pair.queue(old.stop())
            pair.device.adopt(old)
            pair.device.track(recorder(record))
        elif step == "die":  # what was completed early is done again
            pair.device = pair.queue(initial)
            pair.device.track(recorder(record))
            held.clear()
            held += iter(pair.device.pop, None) if pair.device.recovered else ()
        assert pair.device.in_flight == len(held)
    pair.device.drain(lambda chain: 0)
    for chain in reversed(held):
        pair.device.push(chain.head)
    assert pair.device.broken is None
    assert pair.device.in_flight == 0
    done += [token for token, _ in pair.driver.poll()]
    assert done == list(range(added))


@pytest.mark.parametrize("packed", [False, True])
def test_drain_keeps_the_order_and_signals(packed: bool) -> None:
    pair = Pair(packed)
    later: list[Chain] = []

    def serve(chain: Chain) -> int | None:
        if not later:
            later.append(chain)
            return None
        return 1

    for token in range(3):
        pair.add(token)
    assert pair.device.drain(serve) is False
    assert pair.driver.poll() == []
    with pytest.raises(ValueError, match="room for 16"):
        pair.device.push(later[0].head, 17)
    pair.device.push(later[0].head, 2)
    assert pair.driver.poll() == [(0, 2), (1, 1), (2, 1)]


def test_descriptors_are_used_in_the_order_of_the_table() -> None:
    pair = Pair()
    heads = []
    for token in range(3 * SIZE):
        pair.add(token)
        chain = pair.device.pop()
        assert chain is not None
        heads.append(chain.head)
        pair.device.push(chain.head)
        pair.driver.poll()
    assert heads == [n % SIZE for n in range(3 * SIZE)]


def test_one_element_for_a_batch() -> None:
    pair = Pair()
    for token in range(5):
        pair.add(token)
    pair.used(3, (0, 2, 7))
    assert pair.driver.poll() == [(0, 16), (1, 16), (2, 7)]
    pair.used(5, (3, 3, 1), (4, 4, 2))
    assert pair.driver.poll() == [(3, 1), (4, 2)]


@pytest.mark.parametrize(
    ("index", "element"),
    [(2, (0, 7, 0)), (5, (0, 3, 0)), (1, (0, 7, 0))],
)
def test_a_device_that_lies(index: int, element: tuple[int, int, int]) -> None:
    pair = Pair()
    for token in range(4):
        pair.add(token)
    pair.used(index, element)
    try:
        pair.driver.poll()  # what was right before it
    except DeviceError:
        pass
    else:
        assert index == 5
    with pytest.raises(DeviceError):
        pair.driver.poll()


class Orderly(Late):
    in_order = True


def test_a_device_opts_in() -> None:
    assert not Vmm(Late()).backend.offered_features & Feature.IN_ORDER
    device = Orderly()
    vmm = Vmm(device)
    assert vmm.features & Feature.IN_ORDER
    vmm.negotiate()
    vmm.start(0)
    for text in (b"one", b"two"):
        vmm.add(0, text)
    vmm.ports.turn()
    device.finish()  # the newest first
    assert [t for t, _ in vmm.drivers[0].poll()] == [b"one", b"two"]
    vmm.features &= ~Feature.IN_ORDER
    vmm.tell(F.RESET_DEVICE)
    vmm.start(0)
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    assert not isinstance(device.queues[0], InOrderSplitQueue)
    vmm.leave()
