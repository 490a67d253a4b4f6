"""What only the packed ring has; see ``test_queues`` for what it shares."""

from __future__ import annotations

from typing import Any

import pytest

from pyvhost.errors import DeviceError, RingError
from pyvhost.memory import GuestMemory
from pyvhost.testing import RawPackedRing, RingPair, plain_memory, ring_pair
from pyvhost.vring.api import Fences
from pyvhost.vring.choice import queue_class
from pyvhost.vring.packed import (
    DESC,
    DESC_F_AVAIL,
    DESC_F_USED,
    DESC_F_WRITE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    INITIAL_BASE,
    WRAP,
    PackedLayout,
    pack_base,
    unpack_base,
)
from pyvhost.vring.packed_driver import PackedDriverQueue
from tests.pyvhost.vring.kinds import each_queue

BOTH = DESC_F_AVAIL | DESC_F_USED


def test_layout() -> None:
    layout = PackedLayout(5)
    assert (layout.desc_bytes, layout.avail_bytes, layout.used_bytes) == (80, 4, 4)
    assert (layout.avail_offset, layout.used_offset, layout.total_bytes) == (80, 84, 88)


def test_bases() -> None:
    assert INITIAL_BASE == pack_base(0, 1, 0, 1) == 0x8000_8000
    assert pack_base(0x1234, 0, 0x4321, 1) == 0xC321_1234
    assert unpack_base(0xC321_1234) == (0x1234, 0, 0x4321, 1)
    assert unpack_base(INITIAL_BASE) == (0, 1, 0, 1)


@each_queue
@pytest.mark.parametrize("base", [pack_base(8, 1, 0, 1), pack_base(0, 1, 8, 1), pack_base(0x7FFF, 0, 0x7FFF, 0)])
def test_bases_outside_of_the_ring(queue: str, base: int) -> None:
    view = memoryview(bytearray(0x1000))
    with pytest.raises(RingError, match="a base of 0x"):
        queue_class(True, queue)(8, GuestMemory(), view, view, view, fences=Fences.none(), base=base)
    with pytest.raises(ValueError, match="a base of"):
        PackedDriverQueue(8, view, 0x1000, fences=Fences.none(), base=base)


def test_the_driver_starts_with_nothing_in_flight() -> None:
    with pytest.raises(ValueError, match="a base of"):
        PackedDriverQueue(8, memoryview(bytearray(0x1000)), 0x1000, fences=Fences.none(), base=pack_base(1, 1, 0, 1))


@each_queue
def test_the_layout_in_memory(queue: str) -> None:
    """Against the text of the standard, bit by bit: a chain of two, completed."""
    pair = ring_pair(4, packed=True, queue=queue)
    pair.driver.add([(0x1111_2222_3333_4444, 0x5555_6666)], [(pair.data, 8)], "t")
    desc, avail, used = pair.parts
    _, _, head, _ = DESC.unpack(desc, 16)
    assert DESC.unpack(desc) == (0x1111_2222_3333_4444, 0x5555_6666, head, 0x80 | 1)
    assert DESC.unpack(desc, 16) == (pair.data, 8, head, 0x80 | 2)
    pair = ring_pair(4, packed=True, queue=queue, base=pack_base(3, 0, 3, 0))
    pair.driver.add([(pair.data, 1)], [(pair.data, 8)], "t")
    desc, avail, used = pair.parts
    assert DESC.unpack(desc, 48)[3] == 0x8000 | 1  # wrap counter 0
    assert DESC.unpack(desc, 0)[3] == 0x0080 | 2  # and 1
    chain = pair.device.pop()
    assert chain is not None
    pair.device.push(chain.head, 5)
    assert DESC.unpack(desc, 48)[1:] == (5, chain.head, DESC_F_WRITE)  # both bits as the counter: 0
    assert DESC.unpack(desc, 0)[3] == 0x0080 | 2  # skipped
    assert pair.device.next_base == pack_base(1, 1, 1, 1)
    pair.driver.disable_notifications()
    assert bytes(avail) == b"\0\0\1\0"
    assert pair.driver.poll() == [("t", 5)]
    pair.driver.enable_notifications()
    assert bytes(avail) == b"\0\0\0\0"
    pair.device.disable_notifications()
    assert bytes(used) == b"\0\0\1\0"
    pair.device.enable_notifications()
    assert bytes(used) == b"\0\0\0\0"
    pair = ring_pair(4, packed=True, queue=queue, base=pack_base(3, 1, 3, 1), event_idx=True)
    pair.driver.enable_notifications()
    pair.device.enable_notifications()
    assert bytes(pair.parts[1]) == bytes(pair.parts[2]) == b"\3\x80\2\0"


@each_queue
def test_an_id_may_be_any_number(queue: str) -> None:
    ring = RawPackedRing(4, plain_memory((0x1000, 0x1000)), queue=queue)
    ring.offer((0x1800, 4, 0xFFFF, DESC_F_WRITE), (0x1800, 4, 0, DESC_F_WRITE), (0x1800, 4, 0x8001, 0))
    chains = [ring.device.pop() for _ in range(3)]
    assert [chain.head for chain in chains if chain] == [0xFFFF, 0, 0x8001]
    ring.device.push(0x8001)
    ring.device.push(0xFFFF, 4)
    assert ring.used() == [(0x8001, 0), (0xFFFF, 4)]
    assert ring.device.in_flight == 1
    assert ring.device.next_base == pack_base(3, 1, 2, 1)


@each_queue
@pytest.mark.parametrize(
    ("since", "event", "flags", "wanted"),
    [
        (1, 0, EVENT_ENABLE, True),
        (1, 0, EVENT_DISABLE, False),
        (1, 0, 3, True),  # reserved: better one signal too many
        (2, 5 | WRAP, EVENT_DESC, True),  # positions 5 and 6 were given back, of lap 1
        (2, 6 | WRAP, EVENT_DESC, True),
        (2, 4 | WRAP, EVENT_DESC, False),
        (2, 7 | WRAP, EVENT_DESC, False),
        (2, 5, EVENT_DESC, False),  # of another lap
        (4, 7 | WRAP, EVENT_DESC, True),  # 5, 6, 7 and 0 of the next lap
        (4, 0, EVENT_DESC, True),
        (4, 1, EVENT_DESC, False),
        (4, 0 | WRAP, EVENT_DESC, False),
        (4, 0x7FFF, EVENT_DESC, False),
        (4, 0xFFFF, EVENT_DESC, False),
    ],
)
def test_when_the_driver_wants_a_signal(queue: str, since: int, event: int, flags: int, wanted: bool) -> None:
    ring = RawPackedRing(8, plain_memory((0x1000, 0x1000)), queue=queue, event_idx=True, base=pack_base(4, 1, 4, 1))

    def serve(count: int) -> None:
        for n in range(count):
            ring.offer((0x1800, 4, n, 0))
        for _ in range(count):
            chain = ring.device.pop()
            assert chain is not None
            ring.device.push(chain.head)

    serve(1)
    assert ring.device.notify()  # the first one always
    assert not ring.device.notify()
    serve(since)
    ring.event(event, flags)
    assert ring.device.should_notify() is wanted
    assert ring.device.should_notify() is False


def test_the_driver_kicks_where_it_is_asked_to() -> None:
    pair = ring_pair(4, packed=True, event_idx=True, base=pack_base(2, 1, 2, 1))
    used = pair.parts[2]

    def add() -> bool:
        pair.driver.add([(pair.data, 1)], [], 0)
        needed = pair.driver.kick_needed()
        chain = pair.device.pop()
        assert chain is not None
        pair.device.push(chain.head)
        pair.driver.poll()
        return needed

    used[:] = b"\3\x80\2\0"
    assert [add() for _ in range(6)] == [False, True, False, False, False, False]
    used[:] = b"\0\x80\2\0"
    assert add()
    used[:] = b"\0\0\1\0"
    assert not add()
    used[:] = b"\0\0\0\0"
    assert add()


def test_weak_memory_orders_are_fenced() -> None:
    fences: list[str] = []
    pair = ring_pair(4, packed=True, event_idx=True, queue="pure")
    device: Any = pair.device
    for queue in (device, pair.driver):
        queue._order = lambda: fences.append("order")
        queue._full = lambda: fences.append("full")
    pair.driver.add([], [(pair.data, 4)], 0)
    pair.driver.kick_needed()
    pair.device.drain(lambda chain: 0)
    pair.driver.poll()
    assert fences == [
        *("order", "full"),  # add, kick_needed
        *("order", "order"),  # pop, push
        "full",  # notify
        *("order", "full"),  # enable_notifications
        "order",  # poll
    ]


# --- a driver does not trust its device


def give_back(pair: RingPair, index: int, head: int, length: int, flags: int = BOTH) -> None:
    """Overwrite a descriptor as a device would that means no good."""
    pair.parts[0][16 * index : 16 * index + 16] = DESC.pack(0, length, head, flags)


@pytest.mark.parametrize(
    ("elements", "good"),
    [
        ([(0xFFFF, 0)], []),
        ([(2, 0)], []),
        ([(0, 5)], []),
        ([(0, 0xFFFF_FFFF)], []),
        ([(0, 4), (0, 4)], [("a", 4)]),
        ([(1, 0), (7, 0)], [("b", 0)]),
    ],
)
def test_the_driver_refuses_what_it_did_not_give(elements: Any, good: Any) -> None:
    pair = ring_pair(8, packed=True)
    pair.driver.add([], [(pair.data, 4)], "a")
    pair.driver.add([], [(pair.data, 4)], "b")
    for n, element in enumerate(elements):
        give_back(pair, n, *element)
    if good:
        assert pair.driver.poll() == good
    for _ in range(2):
        with pytest.raises(DeviceError):
            pair.driver.poll()


def test_the_driver_takes_no_more_than_it_gave() -> None:
    pair = ring_pair(4, packed=True)
    pair.driver.add([(pair.data, 1)], [], "a")
    pair.parts[0][:] = b"\xff" * 64
    give_back(pair, 0, pair.driver.size - 4, 0)
    assert pair.driver.poll() == [("a", 0)]
    assert pair.driver.poll() == []
    assert not pair.driver.enable_notifications()
    assert pair.driver.free_slots == 4
