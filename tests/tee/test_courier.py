"""What a backend and the broker say: every message survives the wire, and no bytes do harm."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tee.courier import (
    MAX_FRAME,
    NULL,
    Answer,
    Ask,
    Begins,
    CallKind,
    CourierError,
    Ends,
    Hello,
    Message,
    Reader,
    WireParam,
    Withdraw,
    pack,
    unpack,
)

U32, U64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
PARAMS = st.one_of(
    st.just(WireParam()),
    st.builds(WireParam, st.sampled_from([1, 2, 3]), st.just(0), U64, U64, U64),
    st.builds(WireParam, st.sampled_from([5, 6, 7]), st.sampled_from([0, NULL]), U64, U64, U64, st.binary(max_size=40)),
)
LISTS = st.lists(PARAMS, max_size=8)
MESSAGES: st.SearchStrategy[Message] = st.one_of(
    st.builds(Hello, U32),
    st.builds(Begins, U64, st.sampled_from(CallKind), st.uuids(), st.text("abcäß-9", max_size=30)),
    st.builds(Ends, U64),
    st.builds(Ask, U64, U64, U32, LISTS),
    st.builds(Answer, U64, U32, LISTS),
    st.builds(Withdraw, U64),
)


@given(st.lists(MESSAGES, max_size=5), st.data())
def test_a_stream_in_any_pieces(messages: list[Message], data: st.DataObject) -> None:
    stream = b"".join(map(pack, messages))
    reader, found = Reader(), []
    while stream:
        cut = data.draw(st.integers(1, len(stream)))
        found += reader.feed(stream[:cut])
        stream = stream[cut:]
    assert found == messages


def test_the_bytes() -> None:
    """By hand: they are what another implementation reads."""
    assert pack(Ends(0x0102)) == bytes.fromhex("0c000000 03000000 0201000000000000")
    assert pack(Hello()) == bytes.fromhex("10000000 01000000") + b"vtee-brk" + bytes.fromhex("01000000")
    begins = Begins(1, CallKind.OPEN_SESSION, UUID(int=0xFF), "vm")
    assert (
        pack(begins) == bytes.fromhex("26000000 02000000 0100000000000000 01000000" + "00" * 15 + "ff 02000000") + b"vm"
    )
    answer = Answer(5, 0xFFFF0008, [WireParam(6, 0, 3, content=b"abc")])
    assert pack(answer) == (
        bytes.fromhex("3b000000 05000000 0500000000000000 0800ffff 01000000 06000000 00000000 0300000000000000")
        + bytes(16)
        + bytes.fromhex("03000000")
        + b"abc"
    )


@given(st.binary(max_size=200))
def test_no_bytes_do_harm(body: bytes) -> None:
    try:
        message = unpack(body)
    except CourierError:
        return
    assert pack(message)[4:] == body


@given(MESSAGES, st.data())
def test_a_changed_message_is_read_as_it_stands_or_refused(message: Message, data: st.DataObject) -> None:
    body = bytearray(pack(message)[4:])
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    del body[data.draw(st.integers(0, len(body))) :]
    test_no_bytes_do_harm.hypothesis.inner_test(bytes(body))  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "stream",
    [
        bytes(4),
        bytes.fromhex("ffffffff"),
        (MAX_FRAME + 1).to_bytes(4, "little"),
        bytes.fromhex("04000000 09000000"),
        # An ASK with 2^32 - 1 parameters: nothing is made of that many.
        bytes.fromhex("1c000000 04000000") + bytes(20) + bytes.fromhex("ffffffff"),
        bytes.fromhex("10000000 01000000") + b"vtee-xxx" + bytes(4),
        pack(Begins(1, vm="x" * 65)),
        pack(Ask(1, 1, 1, [WireParam(4)])),
        pack(Ask(1, 1, 1, [WireParam(1, NULL)])),
        pack(Ask(1, 1, 1, [WireParam(1, content=b"x")])),
        pack(Ask(1, 1, 1, [WireParam()] * 9)),
        pack(Ends(1))[:4] + bytes.fromhex("02000000") + pack(Ends(1))[8:],
    ],
)
def test_refused(stream: bytes) -> None:
    with pytest.raises(CourierError):
        list(Reader().feed(stream))


def test_what_is_too_large_is_not_sent() -> None:
    with pytest.raises(CourierError, match="a frame of"):
        pack(Answer(1, 0, [WireParam(6, 0, MAX_FRAME, content=bytes(MAX_FRAME))]))
    with pytest.raises(CourierError, match="cannot be sent"):
        pack(Ends(-1))
