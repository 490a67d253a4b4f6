"""A TEE that is given copies, with the software TEE behind them."""

from __future__ import annotations

import secrets
import time
from typing import Any

import pytest

from tee.bounce import BouncingTee
from tee.calls import Call, CloseContext, Invoke, OpenContext, OpenSession, RegisterMemory, UnregisterMemory
from tee.driver import Done, Event, RpcWithdrawn
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft import SoftTee, examples

PROBE, HELLO = examples.UUIDS["probe"], examples.UUIDS["hello_world"]
XOR, TOUCH, WAIT, SHORT, HOLD = 2, 3, 4, 5, 8
IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT


class Bench:
    """One context and session."""

    def __init__(self) -> None:
        self.soft = SoftTee(
            clock=time.monotonic, random=secrets.token_bytes, keys=[], built_in=examples.built_in("probe")
        )
        self.tee = BouncingTee(self.soft)
        self.events: list[Event] = []
        self.tee.attach(self.events.append)
        self.context = self.call(OpenContext()).value
        self.session = self.call(OpenSession(context=self.context, uuid=PROBE)).value

    def until(self, kind: type[Any]) -> Any:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            self.tee.run()
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
        raise AssertionError(f"no {kind.__name__}: {self.events}")

    def call(self, call: Call) -> Done:
        self.tee.start(call)
        done: Done = self.until(Done)
        assert done.call is call
        return done

    def invoke(self, func: int, *params: Param) -> Done:
        return self.call(Invoke(session=self.session, func=func, params=list(params)))

    def registered(self, size: int, **options: Any) -> Memory:
        memory = Memory((memoryview(bytearray(size)),), **options)
        assert self.call(RegisterMemory(context=self.context, memory=memory)).code == Result.SUCCESS
        return memory


@pytest.fixture
def bench() -> Bench:
    return Bench()


def test_what_is_passed_is_copied_there_and_back(bench: Bench) -> None:
    memory = bench.registered(64)
    memory.write(0, bytes(range(64)))
    assert bench.invoke(XOR, MemRef(INOUT, memory, 8, 16), Value(IN, 0xFF)).code == Result.SUCCESS
    wanted = bytes(range(8)) + bytes(b ^ 0xFF for b in range(8, 24)) + bytes(range(24, 64))
    assert memory.read(0, 64) == wanted
    temporary = Memory.of(bytearray(b"\x01\x02\x03"))
    assert bench.invoke(XOR, MemRef(INOUT, temporary, 1, 2), Value(IN, 0xF0)).code == Result.SUCCESS
    assert temporary.read(0, 3) == b"\x01\xf2\xf3"


@pytest.mark.parametrize("bounce", [True, False])
def test_neither_side_sees_what_the_other_writes_in_the_middle_of_a_call(bench: Bench, bounce: bool) -> None:
    """As it is seen where the TEE has the memory itself."""
    memory = bench.registered(16)
    inner = memory
    if not bounce:  # the same call to the TEE behind, about memory of the caller's
        inner = Memory.of(bytearray(16))
        bench.soft.start(RegisterMemory(context=bench.context, memory=inner))
        bench.soft._sink = bench.events.append
        bench.until(Done)
    value = Value(INOUT, 50)
    call = Invoke(session=bench.session, func=HOLD, params=[MemRef(INOUT, inner, 0, 16), value])
    (bench.tee if bounce else bench.soft).start(call)
    bench.tee.run()
    inner.write(0, b"\x07")
    assert bench.until(Done).code == Result.SUCCESS
    assert (value.a, value.b) == (0, 0 if bounce else 7)


def test_sizes(bench: Bench) -> None:
    memory = bench.registered(8)
    param = MemRef(OUT, memory, 0, 8)
    assert bench.invoke(SHORT, param, Value(IN, 20)).code == Result.SHORT_BUFFER
    assert (param.size, memory.read(0, 8)) == (20, bytes(8))
    param = MemRef(OUT, memory, 2, 6)
    assert bench.invoke(SHORT, param, Value(IN, 3)).code == Result.SUCCESS
    assert (param.size, memory.read(0, 8)) == (3, b"\0\0\x5a\x5a\x5a\0\0\0")
    assert bench.invoke(0, MemRef(INOUT, None, 0, 4)).code == Result.SUCCESS


def test_references_outside_of_their_memory(bench: Bench) -> None:
    memory = bench.registered(8)
    for offset, size in ((0, 9), (8, 1), (-1, 2), (1 << 64, 1)):
        assert bench.invoke(TOUCH, MemRef(INOUT, memory, offset, size)).code == Result.BAD_PARAMETERS
        temporary = Memory.of(bytearray(8))
        assert bench.invoke(TOUCH, MemRef(INOUT, temporary, offset, size)).code == Result.BAD_PARAMETERS
    assert bench.call(RegisterMemory(context=bench.context, memory=memory)).code != Result.SUCCESS
    assert bench.call(UnregisterMemory(context=bench.context, memory=Memory.of(bytearray(4)))).code != Result.SUCCESS
    assert bench.invoke(TOUCH, MemRef(INOUT, memory, 0, 8)).code == Result.SUCCESS


def test_nothing_is_written_to_memory_that_was_taken_back(bench: Bench) -> None:
    data = bytearray(8)
    memory = Memory.of(data)
    assert bench.call(RegisterMemory(context=bench.context, memory=memory)).code == Result.SUCCESS
    call = Invoke(session=bench.session, func=HOLD, params=[MemRef(INOUT, memory, 0, 8), Value(INOUT, 20)])
    bench.tee.start(call)
    bench.tee.run()
    memory.forget()
    data[:] = b"another!"
    assert bench.until(Done).call is call
    assert data == b"another!"


def test_a_cancel_reaches_the_call(bench: Bench) -> None:
    call = Invoke(session=bench.session, func=WAIT, params=[Value(IN)])
    bench.tee.start(call)
    bench.tee.run()
    bench.tee.cancel(call)
    assert bench.until(Done).code == Result.CANCEL
    bench.tee.cancel(call)  # and is ignored afterwards


def test_copies_go_with_their_registration(bench: Bench) -> None:
    first, second = bench.registered(8), bench.registered(8)
    assert bench.tee.usage()["copies"] == 2
    assert bench.call(UnregisterMemory(context=bench.context, memory=first)).code == Result.SUCCESS
    assert (bench.tee.usage()["copies"], first.handle) == (1, None)
    assert bench.call(CloseContext(context=bench.context)).code == Result.SUCCESS
    assert second.handle is None
    assert not any(bench.tee.usage().values())


class TestRpcs:
    """A TA is loaded: what the TEE asks for is asked for with the caller's memory, never with a copy."""

    def begin(self, bench: Bench) -> tuple[Call, Rpc]:
        call = OpenSession(context=bench.context, uuid=HELLO)
        bench.tee.start(call)
        rpc: Rpc = bench.until(Rpc)
        assert (rpc.command, rpc.call) == (RpcCommand.LOAD_TA, call)
        return call, rpc

    def lend(self, bench: Bench, rpc: Rpc) -> tuple[Memory, Rpc]:
        """The TA has 100 bytes, says the supplicant, and gives memory for them."""
        bench.tee.answer(rpc, RpcReply(Result.SUCCESS, [rpc.params[0], MemRef(OUT, None, 0, 100)]))
        rpc = bench.until(Rpc)
        assert rpc.command == RpcCommand.SHM_ALLOC
        memory = bench.registered(4096)
        bench.tee.answer(rpc, RpcReply(Result.SUCCESS, [MemRef(INOUT, memory, 0, 4096)]))
        return memory, bench.until(Rpc)

    def test_memory_is_the_callers(self, bench: Bench) -> None:
        call, rpc = self.begin(bench)
        memory, rpc = self.lend(bench, rpc)
        reference = rpc.params[1]
        assert isinstance(reference, MemRef)
        assert (reference.memory, reference.size) == (memory, 100)
        memory.write(0, b"\xee" * 100)
        bench.tee.answer(rpc, RpcReply(Result.SUCCESS, [rpc.params[0], MemRef(OUT, memory, 0, 100)]))
        rpc = bench.until(Rpc)
        assert rpc.command == RpcCommand.SHM_FREE
        assert isinstance(rpc.params[1], MemRef)
        assert rpc.params[1].memory is memory
        bench.tee.answer(rpc, RpcReply())
        done = bench.until(Done)
        assert done.call is call
        assert done.code not in (Result.SUCCESS, Result.COMMUNICATION)  # it was read, and is no TA

    def test_an_answer_whose_memory_has_gone(self, bench: Bench) -> None:
        call, rpc = self.begin(bench)
        memory, rpc = self.lend(bench, rpc)
        memory.forget()
        bench.tee.answer(rpc, RpcReply(Result.SUCCESS, [rpc.params[0], MemRef(OUT, memory, 0, 100)]))
        while True:
            event = bench.until(Rpc | Done)
            if isinstance(event, Done):
                break
            bench.tee.answer(event, RpcReply(Result.COMMUNICATION))
        assert (event.call, event.code) == (call, Result.COMMUNICATION)

    def test_a_withdrawn_one_is_the_one_that_was_asked(self, bench: Bench) -> None:
        call, rpc = self.begin(bench)
        bench.tee.cancel(call)
        bench.tee.start(CloseContext(context=bench.context))
        assert bench.until(RpcWithdrawn).rpc is rpc
        bench.tee.answer(rpc, RpcReply())  # too late: ignored
        bench.tee.answer(Rpc(RpcCommand.FS, []), RpcReply())  # nobody has asked
        assert {bench.until(Done).call for _ in range(2)} >= {call}
