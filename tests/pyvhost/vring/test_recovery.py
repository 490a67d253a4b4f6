"""Backends that die and are replaced, over the implementations that keep a record in the inflight region: no request
is lost, and none that was completed is given out again."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.errors import RingError, StateError
from pyvhost.inflight import SplitInflight, region_size
from pyvhost.memory import GuestMemory
from pyvhost.testing import RingPair
from pyvhost.vring.api import Chain, DeviceQueue, Fences, Inflight
from pyvhost.vring.packed_inflight import PackedInflight
from tests.pyvhost.vring.kinds import Kind, each_kind

SIZE = 8


def recorder(kind: Kind, record: memoryview) -> Inflight:
    return PackedInflight(record) if kind.packed else SplitInflight(record)


def backend(kind: Kind, pair: RingPair, record: memoryview, base: int, **options: Any) -> DeviceQueue:
    device = kind.factory(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=base, **options)
    device.track(recorder(kind, record))
    return device


def new_record(kind: Kind) -> memoryview:
    return memoryview(bytearray(region_size(SIZE, packed=kind.packed)))


@each_kind
@given(
    requests=st.sampled_from([0, 5, 65533]),
    most=st.sampled_from([1, 3, SIZE]),
    program=st.lists(
        st.sampled_from(["add", "add", "pop", "push", "push last", "drain", "poll", "pause", "die"]), max_size=60
    ),
)
def test_nothing_is_lost_or_done_twice(kind: Kind, requests: int, most: int, program: list[str]) -> None:
    pair = kind.pair(SIZE, base=requests)
    base = kind.base(SIZE, requests)
    record = new_record(kind)
    device = backend(kind, pair, record, base)
    held: list[int] = []
    taken: list[int] = []  # by this backend or one before it, and not returned; in the order of taking
    added, done = 0, []

    def take(head: int) -> None:
        if head not in taken:
            taken.append(head)

    def push(head: int) -> None:
        device.push(head)
        taken.remove(head)

    def handler(chain: Chain) -> int | None:
        take(chain.head)
        if chain.head % 2:
            taken.remove(chain.head)
            return 0
        held.append(chain.head)
        return None

    def poll() -> None:
        done.extend(token for token, _ in pair.driver.poll())  # raises for what is completed twice

    for step in program:
        if step == "add" and pair.driver.free_slots > added % most:
            pair.driver.add([(pair.data, 1)] * (1 + added % most), [], added)
            added += 1
        elif step == "pop" and (chain := device.pop()) is not None:
            take(chain.head)
            held.append(chain.head)
        elif step == "push" and held:
            push(held.pop(0))
        elif step == "push last" and held:
            push(held.pop())
        elif step == "drain":
            device.drain(handler, budget=3)
        elif step == "poll":
            poll()
        elif step == "pause":
            paused = device
            device = kind.factory(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=paused.stop())
            device.adopt(paused)
            if not added % 2:  # the frontend gives another region
                record = new_record(kind)
            device.track(recorder(kind, record))
        elif step == "die":
            device = backend(kind, pair, record, base)
            assert [chain.head for chain in device.recovered] == taken
            held.clear()
    for head in held:
        device.push(head)
    while (chain := device.pop()) is not None:
        device.push(chain.head)
    poll()
    assert sorted(done) == list(range(added))
    assert device.in_flight == 0


@each_kind
def test_what_is_recovered_goes_on_after_a_pause(kind: Kind) -> None:
    pair = kind.pair(SIZE)
    record = new_record(kind)
    initial = kind.base(SIZE, 0)
    device = backend(kind, pair, record, initial)
    for n in range(4):
        pair.driver.add([(pair.data, 1)], [], n)
    for _ in range(3):
        assert device.pop() is not None
    device = backend(kind, pair, record, initial)
    assert device.enable_notifications()
    taken = device.recovered.popleft()
    assert device.in_flight == 3
    base = device.stop()
    following = kind.factory(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=base)
    following.adopt(device)
    following.track(recorder(kind, record))
    assert len(following.recovered) == 2
    following.push(taken.head)
    assert following.drain(lambda chain: 0) is False
    assert sorted(pair.driver.poll()) == [(n, 0) for n in range(4)]
    last = backend(kind, pair, record, initial)
    assert not last.recovered
    assert last.next_base == following.next_base


@each_kind
def test_a_bad_request_is_given_back_once(kind: Kind) -> None:
    """What was taken and is bad when it is taken again breaks the queue, and is not in flight."""
    pair = kind.pair(SIZE)
    record = new_record(kind)
    device = backend(kind, pair, record, kind.base(SIZE, 0))
    for n in range(2):
        pair.driver.add([(pair.data, 1)], [], n)
        assert device.pop() is not None
    pair.memory = GuestMemory()  # their buffers have gone
    device = backend(kind, pair, record, kind.base(SIZE, 0))
    assert device.broken is not None
    assert device.in_flight == 0
    assert len(pair.driver.poll()) == 2
    assert not backend(kind, pair, record, kind.base(SIZE, 0)).recovered


@each_kind
def test_recorders_of_the_other_format(kind: Kind) -> None:
    pair = kind.pair(SIZE)
    view = memoryview(bytearray(4096))
    with pytest.raises(StateError, match="a recorder of"):
        pair.device.track(SplitInflight(view) if kind.packed else PackedInflight(view))
    assert bytes(view) == bytes(4096)


@each_kind
def test_a_region_that_comes_late(kind: Kind) -> None:
    """Requests are in flight that were never recorded, when the frontend gives a region at the end of a pause. What a
    packed ring said of them may be overwritten by now."""
    pair = kind.pair(SIZE)
    pair.driver.add([(pair.data, 1)], [], 1)
    chain = pair.device.pop()
    assert chain is not None
    following = kind.factory(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=pair.device.stop())
    following.adopt(pair.device)
    record = new_record(kind)
    if kind.packed:
        with pytest.raises(RingError, match="not recorded"):
            following.track(recorder(kind, record))
        return
    following.track(recorder(kind, record))
    assert SplitInflight(record).recover(SIZE, 0) == [chain.head]


@each_kind
def test_a_record_that_changed_during_a_pause(kind: Kind) -> None:
    pair = kind.pair(SIZE)
    record = new_record(kind)
    device = backend(kind, pair, record, kind.base(SIZE, 0))
    pair.driver.add([(pair.data, 1)], [], 1)
    chain = device.pop()
    assert chain is not None
    base = device.stop()
    kept = bytes(record)
    record[16:] = bytes(len(record) - 16)
    following = kind.factory(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=base)
    following.adopt(device)
    following.track(recorder(kind, record))
    assert bytes(record) == kept
    following.push(chain.head)
    assert pair.driver.poll() == [(1, 0)]
