"""Backends that die and are replaced, over the implementations that keep a record in the inflight region: no request
is lost, and none that was completed is given out again."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from pyvhost.inflight import SplitInflight, region_size
from pyvhost.testing import RingPair, ring_pair
from pyvhost.vring.api import Chain, DeviceQueue, Fences
from pyvhost.vring.choice import queue_class
from tests.pyvhost.vring.kinds import each_queue

SIZE = 8


def backend(queue: str, pair: RingPair, record: memoryview, base: int, **options: Any) -> DeviceQueue:
    device = queue_class(False, queue)(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=base, **options)
    device.track(SplitInflight(record))
    return device


@each_queue
@given(
    base=st.sampled_from([0, 65533]),
    program=st.lists(st.sampled_from(["add", "add", "pop", "push", "push last", "drain", "poll", "die"]), max_size=60),
)
def test_nothing_is_lost_or_done_twice(queue: str, base: int, program: list[str]) -> None:
    pair = ring_pair(SIZE, base=base, queue=queue)
    record = memoryview(bytearray(region_size(SIZE)))
    device = backend(queue, pair, record, base)
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
        if step == "add" and pair.driver.free_slots:
            pair.driver.add([(pair.data, 1)], [], added)
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
        elif step == "die":
            device = backend(queue, pair, record, base)
            assert [chain.head for chain in device.recovered] == taken
            held.clear()
    for head in held:
        device.push(head)
    while (chain := device.pop()) is not None:
        device.push(chain.head)
    poll()
    assert sorted(done) == list(range(added))
    assert device.in_flight == 0


@each_queue
def test_what_is_recovered_goes_on_after_a_pause(queue: str) -> None:
    pair = ring_pair(SIZE, queue=queue)
    record = memoryview(bytearray(region_size(SIZE)))
    device = backend(queue, pair, record, 0)
    for n in range(4):
        pair.driver.add([(pair.data, 1)], [], n)
    for _ in range(3):
        assert device.pop() is not None
    device = backend(queue, pair, record, 0)
    assert device.enable_notifications()
    taken = device.recovered.popleft()
    assert device.in_flight == 3
    base = device.stop()
    following = queue_class(False, queue)(SIZE, pair.memory, *pair.parts, fences=Fences.none(), base=base)
    following.adopt(device)
    following.track(SplitInflight(record))
    assert len(following.recovered) == 2
    following.push(taken.head)
    assert following.drain(lambda chain: 0) is False
    assert sorted(pair.driver.poll()) == [(n, 0) for n in range(4)]
    assert not any(record[16::16])
