"""The frontend's machine: what it sends, and what it thinks of a backend that answers nonsense."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.effects import RegionInfo, RingSetup
from pyvhost.errors import MessageError, ProtocolError, RequestFailed
from pyvhost.frontend import FrontendMachine, Send
from pyvhost.messages import (
    CONFIG,
    HEADER,
    U64,
    VRING_STATE,
    BackendRequest,
    Feature,
    Flag,
    FrontendRequest,
    ProtocolFeature,
    encode,
)

F = FrontendRequest
REGION = RegionInfo(0x1000, 0x1000, 0x7000, 0)


def run(steps: Generator[Send, bytes | None, Any], *replies: bytes) -> tuple[Any, list[Send]]:
    """Drive through one exchange; the result, and what was sent."""
    sent: list[Send] = []
    answers = iter(replies)
    reply: bytes | None = None
    try:
        while True:
            send = steps.send(reply)
            sent.append(send)
            reply = next(answers) if send.answered else None
    except StopIteration as end:
        assert next(answers, None) is None
        return end.value, sent


def negotiated(protocol: ProtocolFeature) -> FrontendMachine:
    machine = FrontendMachine()
    replies = [U64.pack(int(Feature.PROTOCOL_FEATURES | Feature.VERSION_1)), U64.pack(int(protocol))]
    if protocol & ProtocolFeature.REPLY_ACK:
        # SET_PROTOCOL_FEATURES goes out before REPLY_ACK is agreed on, SET_OWNER after
        replies.append(U64.pack(0))
    run(machine.negotiate(int(Feature.VERSION_1 | Feature.EVENT_IDX)), *replies)
    return machine


def test_negotiation_asks_for_no_more_than_is_offered() -> None:
    machine = negotiated(ProtocolFeature.REPLY_ACK | ProtocolFeature.RARP)
    assert machine.features == Feature.PROTOCOL_FEATURES | Feature.VERSION_1
    assert machine.protocol_features == ProtocolFeature.REPLY_ACK
    assert machine.queue_num is None


def test_a_backend_without_protocol_features() -> None:
    machine = FrontendMachine()
    _, sent = run(machine.negotiate(int(Feature.VERSION_1)), U64.pack(int(Feature.VERSION_1)))
    assert [s.request for s in sent] == [F.GET_FEATURES, F.SET_OWNER]
    assert run(machine.enable(0)) == (None, [])


def test_order_of_a_rings_set_up() -> None:
    machine = negotiated(ProtocolFeature(0))
    _, sent = run(machine.set_up_ring(1, RingSetup(8, 5, 0x10, 0x20, 0x30), kick=7, call=8, err=9))
    assert [(s.request, s.fds) for s in sent] == [
        (F.SET_VRING_NUM, ()),
        (F.SET_VRING_BASE, ()),
        (F.SET_VRING_ADDR, ()),
        (F.SET_VRING_ERR, (9,)),
        (F.SET_VRING_CALL, (8,)),
        (F.SET_VRING_KICK, (7,)),
    ]
    _, sent = run(machine.set_memory([(REGION, 3)]))
    assert [(s.request, s.fds, len(s.data)) for s in sent] == [(F.SET_MEM_TABLE, (3,), 52)]


def test_refusals() -> None:
    machine = negotiated(ProtocolFeature.REPLY_ACK)
    with pytest.raises(RequestFailed, match="SET_MEM_TABLE was refused"):
        run(machine.set_memory([(REGION, 3)]), U64.pack(1))
    with pytest.raises(RequestFailed, match="GET_CONFIG"):
        run(machine.get_config(0, 4), b"")


@pytest.mark.parametrize(
    ("steps", "reply"),
    [
        (lambda m: m.acknowledge(), b""),
        (lambda m: m.acknowledge(), bytes(9)),
        (lambda m: m.stop_ring(1), VRING_STATE.pack(2, 0)),
        (lambda m: m.stop_ring(1), bytes(4)),
        (lambda m: m.get_config(0, 4), CONFIG.pack(0, 4, 0)),
        (lambda m: m.get_config(0, 4), CONFIG.pack(1, 4, 0) + bytes(4)),
        (lambda m: m.get_config(0, 4), bytes(3)),
        (lambda m: m.get_status(), bytes(7)),
    ],
)
def test_nonsense_is_an_error(steps: Any, reply: bytes) -> None:
    machine = negotiated(ProtocolFeature.REPLY_ACK)
    with pytest.raises(MessageError):
        run(steps(machine), reply)


@given(st.binary(min_size=12, max_size=12))
def test_any_header(header: bytes) -> None:
    for parse in (lambda: FrontendMachine.reply_size(F.GET_FEATURES, header), lambda: backend_request(header)):
        with contextlib.suppress(ProtocolError):
            assert parse() <= 4096


def backend_request(header: bytes) -> int:
    return FrontendMachine.backend_request(header)[1]


def test_headers() -> None:
    reply = encode(F.GET_FEATURES, bytes(8), Flag.REPLY)
    assert FrontendMachine.reply_size(F.GET_FEATURES, reply[:12]) == 8
    for wrong in (encode(1, bytes(8)), encode(2, b"", Flag.REPLY), HEADER.pack(1, 5, 4097), HEADER.pack(1, 4, 8)):
        with pytest.raises(MessageError):
            FrontendMachine.reply_size(F.GET_FEATURES, wrong)
    assert FrontendMachine.backend_request(encode(2)) == (BackendRequest.CONFIG_CHANGE_MSG, 0)
    for wrong in (encode(99), encode(2, b"x")):
        with pytest.raises(MessageError):
            FrontendMachine.backend_request(wrong)
