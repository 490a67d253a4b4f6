"""How an ASK becomes RPCs, held against what OP-TEE's own driver does with a guest: memory, the RPC, memory back."""

from __future__ import annotations

import pytest

from tee.calls import Invoke
from tee.courier import NULL, Answer, Ask, WireParam
from tee.errands import Errand, Stage
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Value
from tee.results import Result
from tee.rpc import RpcCommand, RpcReply

CALL = Invoke(session=1, func=0)


def errand(*params: WireParam, command: int = RpcCommand.LOAD_TA) -> Errand:
    return Errand(Ask(9, 1, command, list(params)), CALL)


def given(size: int, offset: int = 0) -> tuple[RpcReply, Memory]:
    memory = Memory.of(bytearray(offset + size))
    return RpcReply(Result.SUCCESS, [MemRef(Direction.INOUT, memory, offset, size)]), memory


def test_without_memory_it_is_one_rpc() -> None:
    it = errand(WireParam(1, 0, 1, 2, 3), WireParam(), WireParam(6, NULL, 0))
    assert (it.rpc.command, it.rpc.call) == (RpcCommand.LOAD_TA, CALL)
    value = Value(Direction.IN, 1, 2, 3)
    assert it.rpc.params == [value, Nothing(), MemRef(Direction.OUT, None)]
    reply = RpcReply(Result.SUCCESS, [value, Nothing(), MemRef(Direction.OUT, None, 0, 4000)])
    expected = [WireParam(1, 0, 1, 2, 3), WireParam(), WireParam(6, NULL, 4000)]
    assert it.answered(reply) == Answer(9, Result.SUCCESS, expected)


def test_with_memory_it_is_three() -> None:
    it = errand(WireParam(5, 0, 3, content=b"abc"), WireParam(6, 0, 5), WireParam(7, 0, 2, content=b"xy"))
    assert it.rpc.command == RpcCommand.SHM_ALLOC
    assert it.rpc.params == [Value(Direction.IN, 0, 24, 8)]
    reply, memory = given(24, 100)
    assert it.answered(reply) is None
    assert it.rpc.command == RpcCommand.LOAD_TA
    first, second, third = it.rpc.params
    assert isinstance(first, MemRef)
    assert isinstance(second, MemRef)
    assert isinstance(third, MemRef)
    assert [(p.offset, p.size) for p in (first, second, third)] == [(100, 3), (108, 5), (116, 2)]
    assert memory.read(100, 3) == b"abc"
    assert memory.read(108, 5) == bytes(5)
    assert memory.read(116, 2) == b"xy"
    memory.write(100, b"ABC")  # a guest may; it is not asked for
    memory.write(108, b"12345")
    memory.write(116, b"XY")
    second, third = MemRef(Direction.OUT, memory, 108, 4), MemRef(Direction.INOUT, memory, 116, 1)
    assert it.answered(RpcReply(Result.SUCCESS, [first, second, third])) is None
    assert (it.rpc.command, it.stage) == (RpcCommand.SHM_FREE, Stage.FREE)
    assert it.rpc.params[1] == MemRef(Direction.INOUT, memory, 100, 24)
    expected = [WireParam(5, 0, 3), WireParam(6, 0, 4, content=b"1234"), WireParam(7, 0, 1, content=b"X")]
    # Whatever becomes of the memory, the answer stands.
    for code in (Result.SUCCESS, Result.COMMUNICATION):
        assert it.answered(RpcReply(code)) == Answer(9, Result.SUCCESS, expected)


@pytest.mark.parametrize(
    "reply",
    [
        RpcReply(Result.OUT_OF_MEMORY),
        RpcReply(Result.SUCCESS),
        RpcReply(Result.SUCCESS, [Value(Direction.IN)]),
        RpcReply(Result.SUCCESS, [MemRef(Direction.INOUT, None)]),
    ],
)
def test_no_memory(reply: RpcReply) -> None:
    it = errand(WireParam(6, 0, 5))
    answer = it.answered(reply)
    assert answer is not None
    assert answer.code == (Result.OUT_OF_MEMORY if reply.code else Result.COMMUNICATION)


def test_too_little_memory_is_given_back() -> None:
    it = errand(WireParam(6, 0, 5))
    reply, _ = given(7)
    assert it.answered(reply) is None
    assert it.rpc.command == RpcCommand.SHM_FREE
    assert it.answered(RpcReply()) == Answer(9, Result.OUT_OF_MEMORY)


def test_memory_that_goes_away() -> None:
    it = errand(WireParam(6, 0, 5))
    reply, memory = given(8)
    it.answered(reply)
    params = it.rpc.params
    memory.forget()
    assert it.answered(RpcReply(Result.SUCCESS, params)) == Answer(9, Result.COMMUNICATION)
    it = errand(WireParam(5, 0, 3, content=b"abc"))
    reply, memory = given(8)
    memory.forget()
    assert it.answered(reply) == Answer(9, Result.COMMUNICATION)


def test_a_short_buffer_has_its_size_and_no_content() -> None:
    it = errand(WireParam(6, 0, 5))
    it.answered(given(8)[0])
    (room,) = it.rpc.params
    assert isinstance(room, MemRef)
    room.size = 4000
    assert it.answered(RpcReply(Result.SHORT_BUFFER, [room])) is None
    assert it.answered(RpcReply()) == Answer(9, Result.SHORT_BUFFER, [WireParam(6, 0, 4000)])


def test_an_answer_of_other_parameters() -> None:
    for params in ([], [Value(Direction.IN)], [Nothing(), Nothing()]):
        it = errand(WireParam(6, NULL, 0))
        assert it.answered(RpcReply(Result.SUCCESS, list(params))) == Answer(9, Result.COMMUNICATION)


def test_when_the_call_ends_under_it() -> None:
    it = errand(WireParam(6, 0, 5))
    assert it.withdrawn() == Answer(9, Result.COMMUNICATION)
    it.answered(given(8)[0])
    it.answered(RpcReply(Result.ITEM_NOT_FOUND))
    assert it.stage is Stage.FREE
    assert it.withdrawn() == Answer(9, Result.ITEM_NOT_FOUND)


@pytest.mark.parametrize(
    "params", [[WireParam(5, 0, 4, content=b"abc")], [WireParam(7, 0, 1)], [WireParam(6, 0, 1 << 40)]]
)
def test_what_makes_no_sense(params: list[WireParam]) -> None:
    with pytest.raises(ValueError, match=r"bytes in one RPC|not as long"):
        errand(*params)
