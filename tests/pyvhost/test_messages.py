"""Message layouts: sizes as the document has them, and readable descriptions."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost import messages as m
from pyvhost.errors import ProtocolError


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (m.HEADER, 12),
        (m.U64, 8),
        (m.VRING_STATE, 8),
        (m.VRING_ADDR, 40),
        (m.MEM_TABLE, 8),
        (m.REGION, 32),
        (m.MEM_REGION, 40),
        (m.CONFIG, 12),
        (m.LOG, 16),
        (m.VRING_AREA, 24),
        (m.INFLIGHT, 20),
        (m.IOTLB, 32),
    ],
    ids=lambda v: getattr(v, "name", str(v)),
)
def test_sizes(codec: m.Codec, size: int) -> None:
    assert codec.size == size


def test_every_request_has_a_layout() -> None:
    assert set(m.FRONTEND_PAYLOADS) == set(m.FrontendRequest)
    assert set(m.BACKEND_PAYLOADS) == set(m.BackendRequest)


def test_describe() -> None:
    message = m.encode(m.FrontendRequest.SET_VRING_BASE, m.VRING_STATE.pack(3, 0x1111), m.Flag.NEED_REPLY)
    assert m.describe(message) == {
        "request": "SET_VRING_BASE",
        "flags": ["NEED_REPLY"],
        "size": 8,
        "index": 3,
        "num": 0x1111,
    }
    table = m.encode(5, m.MEM_TABLE.pack(1) + m.REGION.pack(1, 2, 3, 4))
    assert m.describe(table)["regions"] == [{"guest_addr": 1, "size": 2, "user_addr": 3, "mmap_offset": 4}]
    config = m.encode(24, m.CONFIG.pack(0, 2, 0) + b"\xab\xcd", m.Flag.REPLY)
    assert m.describe(config)["data"] == "abcd"
    assert m.describe(m.encode(1, m.U64.pack(5), m.Flag.REPLY))["value"] == 5
    assert m.describe(m.encode(2), from_backend=True)["request"] == "CONFIG_CHANGE_MSG"
    assert m.describe(m.encode(2, m.U64.pack(1), m.Flag.REPLY), from_backend=True)["value"] == 1


@given(st.binary(max_size=80), st.booleans())
def test_describe_anything(data: bytes, from_backend: bool) -> None:
    try:
        described = m.describe(data, from_backend=from_backend)
    except ProtocolError:
        return
    json.dumps(described)


@given(st.sampled_from(list(m.FrontendRequest)), st.binary(max_size=100), st.sampled_from([0, 4, 8, 12]))
def test_describe_any_request(request: m.FrontendRequest, payload: bytes, flags: int) -> None:
    try:
        described = m.describe(m.encode(request, payload, flags))
    except ProtocolError:
        return
    json.dumps(described)
