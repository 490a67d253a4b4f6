"""Messages: layouts as OP-TEE's headers have them, and what is refused."""

from __future__ import annotations

import struct
from uuid import UUID

import pytest

from ffa.optee import msg
from ffa.optee.msg import Fmem, Message, MessageError
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Value
from tee.results import Result


def test_layouts() -> None:
    assert [codec.size for codec in msg.CODECS] == [32, 32, 32]
    packed = Message(1, func=2, session=3, cancel_id=4, ret=5, ret_origin=6, num_params=7).pack()
    assert packed == struct.pack("<8I", 1, 2, 3, 4, 0, 5, 6, 7)
    assert Message.unpack(packed) == Message(1, 2, 3, 4, 5, 6, 7)
    # attr; offs_low, offs_high, internal_offs; size; global_id
    fmem = struct.pack("<QIHHQQ", 0x7, 0x1000, 2, 0x10, 99, 0xABC)
    assert msg.unpack_params(fmem) == [Fmem(Direction.INOUT, 0x2_0000_1010, 99, 0xABC)]
    assert msg.pack_params([Fmem(Direction.IN, 0x2_0000_1010, 99, 0xABC)]) == struct.pack(
        "<QIHHQQ", 0x5, 0x1010, 2, 0, 99, 0xABC
    )
    value = struct.pack("<QQQQ", 0x103, 1, 2, 3)
    assert msg.unpack_params(value + bytes(32)) == [Value(Direction.INOUT, 1, 2, 3, meta=True), Nothing()]
    assert msg.pack_params([Value(Direction.INOUT, 1, 2, 3, meta=True), Nothing()]) == value + bytes(32)
    null = struct.pack("<QIHHQQ", 0x6, 5, 5, 5, 7, 2**64 - 1)
    assert msg.unpack_params(null) == [Fmem(Direction.OUT, 0, 7, msg.NULL_HANDLE)]


def test_a_uuid_is_its_octets() -> None:
    uuid = UUID("01020304-0506-0708-090a-0b0c0d0e0f10")
    a, b = msg.uuid_words(uuid)
    assert struct.pack("<QQ", a, b) == bytes(range(1, 17))
    assert msg.uuid_of(Value(Direction.IN, a, b)) == uuid


@pytest.mark.parametrize("attr", [4, 8, 9, 0xA, 0xB, 0xFF, 0x201, 1 << 16 | 1, 1 << 63])
def test_attributes_that_ffa_does_not_have(attr: int) -> None:
    with pytest.raises(MessageError) as caught:
        msg.unpack_params(struct.pack("<QQQQ", attr, 0, 0, 0))
    assert caught.value.code == Result.BAD_PARAMETERS


@pytest.mark.parametrize(
    "param", [Value(Direction.IN, 1 << 64), Fmem(Direction.IN, 1 << 48, 0, 0), Value(Direction.IN, -1)]
)
def test_numbers_that_do_not_fit(param: msg.Wire) -> None:
    with pytest.raises(MessageError):
        msg.pack_params([param])


def test_references_stay_inside_their_memory() -> None:
    memory = Memory((memoryview(bytearray(100)),))
    assert msg.to_param(Fmem(Direction.OUT, 90, 10, 1), lambda _: memory) == MemRef(Direction.OUT, memory, 90, 10)
    for offset, size in ((91, 10), (101, 0), (0, 1 << 63)):
        with pytest.raises(MessageError):
            msg.to_param(Fmem(Direction.OUT, offset, size, 1), lambda _: memory)
    memory.read_only = True
    with pytest.raises(MessageError):
        msg.to_param(Fmem(Direction.INOUT, 0, 1, 1), lambda _: memory)


def test_answers_are_held_against_the_question() -> None:
    memory = Memory((memoryview(bytearray(100)),))
    asked = [Value(Direction.OUT), MemRef(Direction.OUT, memory, 10, 20), Value(Direction.IN, 7), Nothing()]
    answer = [Value(Direction.OUT, 1, 2, 3), Fmem(Direction.OUT, 99, 15, 99), Value(Direction.IN, 8), Nothing()]
    assert msg.take_outputs(asked, answer, 0) == [
        Value(Direction.OUT, 1, 2, 3),
        MemRef(Direction.OUT, memory, 10, 15),
        Value(Direction.IN, 7),
        Nothing(),
    ]
    longer = [answer[0], Fmem(Direction.OUT, 0, 21, 0), *answer[2:]]
    assert msg.take_outputs(asked, longer, Result.SHORT_BUFFER)[1] == MemRef(Direction.OUT, memory, 10, 21)
    for wrong in (
        answer[:3],
        longer,
        [answer[0], Value(Direction.OUT), *answer[2:]],
        [Value(Direction.IN), *answer[1:]],
    ):
        with pytest.raises(MessageError) as caught:
            msg.take_outputs(asked, wrong, 0)
        assert caught.value.code == Result.COMMUNICATION
