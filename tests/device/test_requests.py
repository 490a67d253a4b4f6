"""Requests, responses and parameters as bytes."""

from __future__ import annotations

import random
from typing import Any

import construct
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device import wire
from device.config import Limits
from device.messages import CONFIG, EVENTS, PARAM, RANGE, REQUEST_HEADER, REQUESTS, RESPONSE_HEADER, Tail
from device.params import (
    MEMREF_TYPES,
    VALUE_TYPES,
    RequestError,
    attribute,
    check_raw,
    pack_raw,
    padded,
    results,
    take_results,
    unpack_raw,
)
from device.requests import (
    HEADER_SIZE,
    STATUS_RESULT,
    pack_request,
    pack_response,
    parse_request,
    refusal,
    response_size,
)
from device.wire import NULL_REGION, PARAM_INLINE, PARAM_META, Feature, Queue, Request, Status
from pyvhost.errors import FormatError, ProtocolError
from tee.memory import Memory
from tee.params import MemRef, Nothing, Param, Value
from tee.results import Origin, Result

requirement = pytest.mark.requirement
EVERY = Feature(0xFF)
LIMITS = Limits(max_params=6, max_region_ranges=5, max_inline_bytes=100)
WORDS = st.integers(0, (1 << 64) - 1)
KINDS = st.sampled_from([0, *VALUE_TYPES, *MEMREF_TYPES])
CODECS = [CONFIG, REQUEST_HEADER, RESPONSE_HEADER, PARAM, RANGE]
CODECS += [r.body.codec for r in REQUESTS.values()] + [r.response.codec for r in REQUESTS.values() if r.response]
CODECS += [e.codec for e in EVENTS.values()]


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.name)
def test_codecs_and_construct_agree(codec: Any) -> None:
    layout = getattr(wire, codec.name, None) or getattr(wire, codec.name + "Event", None)
    if layout is None:  # empty ones
        assert codec.size == 0
        return
    assert layout.sizeof() == codec.size
    dice = random.Random(codec.name)
    accepted = 0
    for _ in range(200):
        data = bytearray(dice.randbytes(codec.size))
        for name, value in getattr(codec, "_fixed", {}).items():
            assert name
            data[0:4] = int(value).to_bytes(4, "little")
        if dice.random() < 0.7:
            blank = layout.parse(bytes(layout.build(_zero(layout, codec))))
            fields = {key: value for key, value in blank.items() if not key.startswith("_")}
            data = bytearray(layout.build({**fields, **_some(fields, dice)}))
        try:
            record = codec.unpack(bytes(data))
        except FormatError:
            continue
        accepted += 1
        parsed = layout.parse(bytes(data))
        for name, value in codec.as_dict(record).items():
            assert parsed[name] == value
        assert codec.pack(record) == data
    assert accepted


def _zero(layout: Any, codec: Any) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for sub in layout.subcons:
        if sub.name is None:
            continue
        size = sub.sizeof()
        inner = sub
        while isinstance(inner, construct.Renamed):
            inner = inner.subcon
        listed = isinstance(inner, construct.Array)
        values[sub.name] = [0] * (size // 8) if listed else 0 if size in (1, 2, 4, 8) else bytes(size)
    values.update(getattr(codec, "_fixed", {}))
    return values


def _some(fields: dict[str, Any], dice: random.Random) -> dict[str, Any]:
    return {
        name: dice.randrange(1 << 16)
        for name, value in fields.items()
        if isinstance(value, int) and name != "magic" and dice.random() < 0.5
    }


def sample(kind: Request) -> tuple[bytes, int, int]:
    """A good request, with the room that its response needs, and its inline bytes out."""
    request = REQUESTS[kind]
    codec = request.body.codec
    fields: dict[str, Any] = {}
    for sub in getattr(wire, codec.name, wire.Cancel).subcons if codec.size else ():
        if sub.name:
            size = sub.sizeof()
            fields[sub.name] = bytes(size) if size in (16, 32, 64) and sub.name != "regs" else 0
            if sub.name == "regs":
                fields[sub.name] = [0] * 8
    tail = inline = b""
    inline_out = params = 0
    if request.body.tail is Tail.PARAMS:
        plain = [(1, 1, 2, 3), (6, 0, 10, 1), (0, 0, 0, 0)]
        if kind != Request.RPC_REPLY:
            plain += [(5 | PARAM_INLINE, 0, 5, 0), (7 | PARAM_INLINE, 0, 9, 0)]
            inline, inline_out = bytes(8 + 16), 16
        tail, params = pack_raw(plain), len(plain)
        fields["num_params"] = params
    elif request.body.tail is Tail.RANGES:
        tail = b"".join(n.to_bytes(8, "little") for n in (0, 10, 64, 5))
        fields["num_ranges"], fields["size"] = 2, 15
    body = codec.pack(**fields)
    data = pack_request(kind, epoch=7, tag=3, context=1 if request.context else 0, body=body, tail=tail)
    return data + inline, response_size(request, params, inline_out), inline_out


def parse(data: bytes, room: int, queue: Queue, features: Feature = EVERY) -> Any:
    return parse_request(data, room, queue, epoch=7, features=features, limits=LIMITS)


def status_of(data: bytes, room: int, queue: Queue, features: Feature = EVERY) -> Status:
    with pytest.raises(RequestError) as caught:
        parse(data, room, queue, features)
    return caught.value.status


@pytest.mark.parametrize("kind", list(Request))
class TestEachRequest:
    def test_good(self, kind: Request) -> None:
        data, room, inline_out = sample(kind)
        request = parse(data, room, REQUESTS[kind].queue)
        assert (request.type, request.tag, request.data, request.inline_out) == (kind, 3, data, inline_out)
        assert request.ranges == ([(0, 10), (64, 5)] if kind == Request.REGISTER_MEMORY else [])
        assert parse(data, room + 1000, REQUESTS[kind].queue).params == request.params

    @requirement("DEV-REQ-6")
    @pytest.mark.fault("cut-request")
    def test_every_length(self, kind: Request) -> None:
        data, room, _ = sample(kind)
        queue = REQUESTS[kind].queue
        for size in range(len(data)):
            assert status_of(data[:size], room, queue) is Status.MALFORMED
        for more in (1, 8, 32):
            assert status_of(data + bytes(more), room, queue) is Status.MALFORMED
        for short in range(16, room):
            assert status_of(data, short, queue) is Status.MALFORMED

    @requirement("DEV-REQ-6", "DEV-FEA-4", "DEV-QUE-2")
    def test_header(self, kind: Request) -> None:
        data, room, _ = sample(kind)
        queue = REQUESTS[kind].queue
        other = Queue.REQUEST if queue is Queue.CONTROL else Queue.CONTROL

        def patched(at: int, new: bytes) -> bytes:
            return data[:at] + new + data[at + len(new) :]

        assert status_of(data, room, other) is Status.UNSUPPORTED
        assert status_of(patched(0, b"\xff\x7f"), room, queue) is Status.UNSUPPORTED
        assert status_of(patched(28, b"\1"), room, queue) is Status.MALFORMED
        for bit in range(32):
            assert status_of(patched(4, (1 << bit).to_bytes(4, "little")), room, queue) is Status.MALFORMED
        assert status_of(patched(16, bytes(8)), room, queue) is Status.MALFORMED
        assert status_of(patched(8, b"\6"), room, queue) is Status.STALE_EPOCH
        flipped = bytes(4) if REQUESTS[kind].context else b"\1\0\0\0"
        expected = Status.NO_CONTEXT if REQUESTS[kind].context else Status.MALFORMED
        assert status_of(patched(24, flipped), room, queue) is expected
        if REQUESTS[kind].feature:
            assert status_of(data, room, queue, EVERY & ~REQUESTS[kind].feature) is Status.UNSUPPORTED

    @requirement("DEV-PAR-1", "DEV-MEM-3", "DEV-REQ-5")
    @pytest.mark.fault("cut-request")
    def test_counts(self, kind: Request) -> None:
        request = REQUESTS[kind]
        if request.body.tail is Tail.NONE:
            return
        data, room, _ = sample(kind)
        names = [sub.name for sub in getattr(wire, request.body.codec.name).subcons]
        sizes = [sub.sizeof() for sub in getattr(wire, request.body.codec.name).subcons]
        at = HEADER_SIZE + sum(sizes[: names.index(request.body.count)])
        for count in (7, 1 << 20, (1 << 32) - 1):
            patched = data[:at] + count.to_bytes(4, "little") + data[at + 4 :]
            assert status_of(patched, room, request.queue) is Status.LIMIT


def test_packing() -> None:
    assert pack_response(ret=-1 & 0xFFFFFFFF) == RESPONSE_HEADER.pack(0, 0, 0xFFFFFFFF, Origin.TEE)
    assert set(STATUS_RESULT) == set(Status)
    for status in Status:
        header = RESPONSE_HEADER.unpack(refusal(status))
        assert (header.status, header.ret, header.origin) == (status, STATUS_RESULT[status], Origin.COMMS)
        assert (header.ret == 0) is (status == Status.OK)


SOME = Memory(size=1 << 64)
RAW = st.tuples(st.tuples(KINDS, st.sampled_from([0, PARAM_META])).map(sum), WORDS, WORDS, WORDS)


def as_param(raw: tuple[int, int, int, int]) -> Param:
    """As the device gives it to the TEE, or the driver got it from its client."""
    attr, a, b, c = raw
    kind, meta = attr & 0xFF, bool(attr & PARAM_META)
    if kind in VALUE_TYPES:
        return Value(VALUE_TYPES[kind], a, b, c, meta)
    if kind in MEMREF_TYPES:
        return MemRef(MEMREF_TYPES[kind], None if c == NULL_REGION else SOME, a, b, meta)
    return Nothing(meta)


class TestParams:
    @given(st.lists(RAW, max_size=24))
    def test_bytes(self, raw: list[Any]) -> None:
        data = pack_raw(raw)
        assert unpack_raw(b"xx" + data, 2, len(raw)) == raw
        assert b"".join(PARAM.pack(*one) for one in raw) == data
        for one in raw:
            assert attribute(as_param(one)) == one[0]

    @requirement("DEV-PAR-7", "DEV-PAR-8", "DEV-PAR-9", "DRV-PAR-1")
    @given(st.lists(st.tuples(RAW, WORDS, WORDS, WORDS), max_size=24), st.sampled_from([0, Result.SHORT_BUFFER, 5]))
    def test_both_sides_agree(self, given_: list[Any], code: int) -> None:
        """Whatever a TEE does to its parameters, the driver takes the device's response, and gets the outputs."""
        raw = [one for one, *_ in given_]
        inside, outside = [as_param(one) for one in raw], [as_param(one) for one in raw]
        for param, (_, a, b, c) in zip(inside, given_, strict=True):
            if isinstance(param, Value):
                param.a, param.b, param.c = a, b, c
            elif isinstance(param, MemRef):
                param.size = b
        answer = results(raw, inside, code)
        take_results(raw, answer, outside, code)
        for before, told, got, (_, a, b, c) in zip(raw, answer, outside, given_, strict=True):
            kind = before[0] & 0xFF
            output = kind & 3 in (2, 3) and not before[0] & PARAM_META
            if not output:
                assert told == before
                assert got == as_param(before)
            elif isinstance(got, Value):
                assert (got.a, got.b, got.c) == (a, b, c)
            elif isinstance(got, MemRef):
                assert (told[0], told[1], told[3]) == (before[0], before[1], before[3])
                assert got.size == told[2] == (b if code == Result.SHORT_BUFFER else min(b, before[2]))

    @requirement("DRV-PAR-1")
    @given(st.lists(RAW, min_size=1, max_size=6), st.integers(0, 5), st.integers(0, 3), WORDS)
    def test_a_changed_word(self, raw: list[Any], which: int, word: int, value: int) -> None:
        which %= len(raw)
        before = raw[which]
        changed = [*raw]
        changed[which] = (*before[:word], value, *before[word + 1 :])
        params = [as_param(one) for one in raw]
        kind = before[0] & 0xFF
        free = (kind in (2, 3) and word > 0) or (kind in (6, 7) and word == 2 and value <= before[2])
        if value == before[word] or (free and not before[0] & PARAM_META):
            take_results(raw, changed, params, 0)
            return
        with pytest.raises(ProtocolError):
            take_results(raw, changed, params, 0)
        assert params == [as_param(one) for one in raw]

    @requirement("DEV-PAR-2", "DEV-INL-1")
    @given(st.lists(st.tuples(WORDS | st.integers(0, 0x20000), WORDS, WORDS, WORDS), max_size=4), st.booleans())
    @pytest.mark.fault("impossible-attributes")
    def test_checks(self, raw: list[Any], inline: bool) -> None:
        def good(one: tuple[int, int, int, int]) -> bool:
            attr, a, _, c = one
            kind = attr & 0xFF
            if attr >> 8 & ~0x101 or kind not in (0, 1, 2, 3, 5, 6, 7):
                return False
            if attr & PARAM_INLINE:
                return inline and kind > 3 and not a and not c
            return not (kind > 3 and c == NULL_REGION and a)

        if all(map(good, raw)):
            carried = [one for one in raw if one[0] & PARAM_INLINE]
            data_in = sum(padded(one[2]) for one in carried if one[0] & 1)
            data_out = sum(padded(one[2]) for one in carried if one[0] & 2)
            assert check_raw(raw, inline=inline) == (data_in, data_out)
        else:
            with pytest.raises(RequestError) as caught:
                check_raw(raw, inline=inline)
            assert caught.value.status is Status.MALFORMED

    def test_padding(self) -> None:
        assert [padded(n) for n in (0, 1, 7, 8, 9)] == [0, 8, 8, 8, 16]
