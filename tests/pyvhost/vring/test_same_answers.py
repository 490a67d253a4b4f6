"""The compiled queues do what those in Python do: the same steps on the same memory leave the same memory, and give
the same answers."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhost.errors import ProtocolError, StateError
from pyvhost.inflight import SplitInflight, region_size
from pyvhost.testing import plain_memory
from pyvhost.vring.api import Fences
from pyvhost.vring.choice import has_compiled, part_sizes, queue_class
from pyvhost.vring.packed_inflight import PackedInflight

pytestmark = pytest.mark.skipif(not has_compiled(), reason="the compiled queue was not built")

BASE, SIZE = 0x1000, 0x1000
ADDRESSES = [BASE, BASE + 0x800, BASE + 0x900, BASE + 0xFF8, BASE + SIZE, BASE + SIZE + 0xFFF, 0, (1 << 64) - 8]

steps = st.lists(
    st.one_of(
        st.just(("pop",)),
        st.just(("pop",)),
        st.tuples(st.just("push"), st.integers(0, 9) | st.integers(0, 0xFFFF), st.integers(0, 40)),
        st.tuples(st.just("push"), st.integers(-3, 3), st.integers(-1, 40)),
        st.just(("notify",)),
        st.just(("disable_notifications",)),
        st.just(("enable_notifications",)),
        # the driver's: a word of the ring
        st.tuples(st.just("poke"), st.integers(0, 127), st.integers(0, 9) | st.integers(0, 0xFFFF)),
        # the frontend's: a word of the inflight region
        st.tuples(st.just("scribble"), st.integers(0, 159), st.integers(0, 9) | st.integers(0, 0xFFFF)),
        st.just(("stop",)),
        st.just(("pause",)),
        st.just(("restart",)),
    ),
    max_size=40,
)


def run(
    which: str, packed: bool, size: int, base: int, options: dict[str, bool], content: bytes, program: list[Any]
) -> list[Any]:
    memory = plain_memory((BASE, SIZE), (BASE + SIZE, SIZE))
    (view,) = memory.translate(BASE, SIZE)
    view[: len(content)] = content
    view[0x800 : 0x800 + len(content)] = content  # for indirect tables
    desc, avail, used = part_sizes(packed, size)
    used_at = desc + avail + 3 & ~3
    trace: list[Any] = []
    record = memoryview(bytearray(region_size(8, packed=packed)))
    options = dict(options)
    inflight = options.pop("inflight", False)

    def begin(base: int, paused: Any = None) -> Any:
        queue: Any = queue_class(packed, which)(
            size,
            memory,
            view[:desc],
            view[desc : desc + avail],
            view[used_at : used_at + used],
            fences=Fences.none(),
            base=base,
            signal=lambda: trace.append("signal"),
            **options,
        )
        if paused is not None:
            queue.adopt(paused)
        if inflight:
            queue.track(PackedInflight(record) if packed else SplitInflight(record))
        return queue

    try:
        queue = begin(base)
    except ProtocolError as e:
        return [str(e)]
    popped: list[int] = []
    for name, *arguments in program:
        result: Any = None
        if name == "poke":
            at, value = arguments
            view[2 * at : 2 * at + 2] = value.to_bytes(2, "little")
        elif name == "restart":  # killed, and another one takes over
            try:
                queue = begin(base)
            except ProtocolError as e:
                result = str(e)
            popped.clear()
        elif name == "scribble":
            at, value = arguments
            record[2 * at % len(record) :][:2] = value.to_bytes(2, "little")
        elif name == "pause":
            try:
                queue = begin(queue.stop(), queue)
            except ProtocolError as e:
                result = str(e)
        elif name == "push":
            head, written = arguments
            if head < 0 or (head < 4 and popped):
                head = popped[head % len(popped)] if popped else 0
            try:
                queue.push(head, written)
            except (StateError, ValueError) as e:
                result = type(e), str(e)
        else:
            result = getattr(queue, name)()
            if name == "pop" and result is not None:
                popped.append(result.head)
                chain = result
                result = (chain.head, chain.readable_bytes, chain.writable_bytes, chain.read(length=64))
                result += ([len(v) for v in chain.readable], [len(v) for v in chain.writable])
        trace.append((name, result, queue.broken is None, queue.in_flight, queue.next_base, queue.stopped))
        trace.append((len(queue.recovered), bytes(record)))
    trace.append(bytes(view))
    return trace


descriptor = st.tuples(
    st.sampled_from(ADDRESSES),
    st.sampled_from([0, 1, 8, 16, 32, 64, 0x800, 0xFFFF_FFFF]),
    st.integers(0, 8) | st.integers(0, 0xFFFF),
    st.sampled_from([0x80, 0x81, 0x82, 0x83, 0x84, 0x8000, 0x8002]) | st.integers(0, 0xFFFF),
)


@settings(max_examples=500)
@given(
    size=st.sampled_from([1, 3, 4, 8]),
    base=st.sampled_from([0x8000_8000, 0, 0x0001_0001, 0x8002_0001]),
    indirect=st.booleans(),
    event_idx=st.booleans(),
    inflight=st.booleans(),
    descs=st.lists(descriptor, min_size=1, max_size=8),
    program=steps,
)
def test_packed(
    size: int, base: int, indirect: bool, event_idx: bool, inflight: bool, descs: list[Any], program: list[Any]
) -> None:
    content = b"".join(
        a.to_bytes(8, "little") + n.to_bytes(4, "little") + i.to_bytes(2, "little") + f.to_bytes(2, "little")
        for a, n, i, f in descs
    )
    options = {"indirect": indirect, "event_idx": event_idx, "inflight": inflight}
    arguments: Any = (True, size, base, options, content, program)
    assert run("pure", *arguments) == run("compiled", *arguments)


@settings(max_examples=500)
@given(
    size=st.sampled_from([1, 3, 4, 8]),
    base=st.sampled_from([0, 1, 0xFFFE, 0xFFFF]),
    ahead=st.integers(0, 9),
    indirect=st.booleans(),
    event_idx=st.booleans(),
    inflight=st.booleans(),
    descs=st.lists(descriptor, min_size=8, max_size=8),
    heads=st.lists(st.integers(0, 8), min_size=8, max_size=8),
    program=steps,
)
def test_split(
    size: int,
    base: int,
    ahead: int,
    indirect: bool,
    event_idx: bool,
    inflight: bool,
    descs: list[Any],
    heads: list[int],
    program: list[Any],
) -> None:
    content = b"".join(
        a.to_bytes(8, "little") + n.to_bytes(4, "little") + (f & 7).to_bytes(2, "little") + i.to_bytes(2, "little")
        for a, n, i, f in descs[:size]
    )
    content += bytes(2) + (base + ahead & 0xFFFF).to_bytes(2, "little")
    content += b"".join(head.to_bytes(2, "little") for head in heads[:size])
    options = {"indirect": indirect, "event_idx": event_idx, "inflight": inflight}
    arguments: Any = (False, size, base, options, content, program)
    assert run("pure", *arguments) == run("compiled", *arguments)
