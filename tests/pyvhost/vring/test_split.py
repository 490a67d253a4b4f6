"""What only the split ring has; see ``test_queues`` for what it shares."""

from __future__ import annotations

from typing import Any

import pytest

from pyvhost.errors import DeviceError, RingError
from pyvhost.memory import GuestMemory
from pyvhost.testing import RawRing, RingPair, plain_memory, ring_pair
from pyvhost.vring.api import Fences
from pyvhost.vring.choice import queue_class
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_driver import SplitDriverQueue
from tests.pyvhost.vring.kinds import each_queue


def test_layout() -> None:
    layout = SplitLayout(8)
    assert (layout.desc_bytes, layout.avail_bytes, layout.used_bytes) == (128, 22, 70)
    assert (layout.avail_offset, layout.used_offset, layout.total_bytes) == (128, 152, 222)


@each_queue
def test_sizes_are_powers_of_two(queue: str) -> None:
    view = memoryview(bytearray(1 << 20))
    with pytest.raises(RingError, match="3 entries"):
        queue_class(False, queue)(3, GuestMemory(), view, view, view, fences=Fences.none())
    with pytest.raises(ValueError, match="entries"):
        SplitDriverQueue(3, view, 0x1000, fences=Fences.none())
    with pytest.raises(RingError):
        RawRing(4, plain_memory((0, 4096)), queue=queue).device.rebind(GuestMemory(), view, view[:3], view)


def test_weak_memory_orders_are_fenced() -> None:
    """Where hardware reorders, the index is read before the entries and written after them."""
    fences: list[str] = []
    pair = ring_pair(4, queue="pure")
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
        "full",  # notify
        *("full", "order"),  # enable_notifications
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
