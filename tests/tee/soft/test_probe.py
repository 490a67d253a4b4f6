"""The probe TA's HASH, against FIPS 180-4's examples, and its WORK."""

from __future__ import annotations

import pytest

from tee.calls import Invoke
from tee.memory import Memory
from tee.params import Direction, MemRef
from tee.results import Result
from tests.tee.bench import Bench

IN, OUT = Direction.IN, Direction.OUT


def pieces(data: bytes, size: int) -> Memory:
    return Memory([memoryview(bytearray(data[at : at + size])) for at in range(0, len(data), size)])


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
)
@pytest.mark.parametrize("size", [1_000_000, 7000])
def test_digest(message: bytes, digest: str, size: int) -> None:
    bench = Bench()
    session = bench.session(bench.context())
    answer = MemRef(OUT, Memory.of(bytearray(40)), 0, 40)
    done = bench.invoke(session, 11, MemRef(IN, pieces(message, size), 0, len(message)), answer)
    assert done.code == Result.SUCCESS
    assert answer.size == 32
    assert answer.memory is not None
    assert answer.memory.read(0, 32).hex() == digest


def test_no_room() -> None:
    bench = Bench()
    answer = MemRef(OUT, None, 0, 0)
    done = bench.invoke(bench.session(bench.context()), 11, MemRef(IN, None, 0, 0), answer)
    assert (done.code, answer.size) == (Result.SHORT_BUFFER, 32)


def test_a_cancel_reaches_it() -> None:
    bench = Bench()
    session, size = bench.session(bench.context()), 64 << 20
    params = [MemRef(IN, Memory.of(bytearray(size)), 0, size), MemRef(OUT, Memory.of(bytearray(32)), 0, 32)]
    call = bench.start(Invoke(session=session, func=11, params=params))
    assert bench.tee.run() == 0
    bench.tee.cancel(call)
    assert bench.finish(call).code == Result.CANCEL


@pytest.mark.parametrize(("size", "each"), [(4096, 4096 % 256), (8192, 2048 % 256), (16 << 20, 1)])
def test_work_is_the_same_for_each_size(size: int, each: int) -> None:
    """WORK: 4,096 changes, spread over the pages that are there."""
    bench = Bench()
    data = bytearray(size)
    memory = MemRef(Direction.INOUT, Memory.of(data), 0, size)
    assert bench.invoke(bench.session(bench.context()), 12, memory).code == Result.SUCCESS
    assert {data[at] for at in range(0, size, 4096)} == {each}
    assert sum(data) == each * (size // 4096)
    nothing = MemRef(Direction.INOUT, None, 0, 0)
    assert bench.invoke(bench.session(bench.context()), 12, nothing).code == Result.BAD_PARAMETERS
