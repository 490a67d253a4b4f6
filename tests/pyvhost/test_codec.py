"""Generated codecs are equal to the construct definitions they come from."""

from __future__ import annotations

import doctest
from typing import Any

import construct
import pytest
from construct import (
    Array,
    Bytes,
    Const,
    Int8sl,
    Int8ul,
    Int16ub,
    Int16ul,
    Int32sl,
    Int32ul,
    Int64ul,
    Padding,
    Struct,
    this,
)
from hypothesis import given
from hypothesis import strategies as st

from pyvhost import codec as codec_module
from pyvhost.codec import Codec, Ignored, Reserved
from pyvhost.errors import FormatError, ProtocolError

PLAIN = Codec("plain", Struct("a" / Int8ul, "b" / Int16ul, "c" / Int32ul, "d" / Int64ul, "e" / Int32sl))
RICH = Codec(
    "rich",
    Struct(
        "magic" / Const(0x1234, Int32ul) * "says what it is",
        "uuid" / Bytes(16),
        Reserved(3),
        "count" / Int8ul,
        "pairs" / Array(3, Struct("x" / Int16ul, Ignored(2), "y" / Array(2, Int8sl), "mark" / Const(b"ok"))),
        "inner" / Struct("deep" / Struct("value" / Int64ul), Const(7, Int8ul), "name" / Bytes(2)),
        "names" / Array(2, Bytes(3)),
        "index" / Int8ul,
    ),
)
CODECS = {"plain": PLAIN, "rich": RICH}


def plain(value: Any) -> Any:
    """What construct parsed, as ``Codec.as_dict`` would show it."""
    if isinstance(value, construct.Container):
        return {k: plain(v) for k, v in value.items() if k != "_io"}
    if isinstance(value, construct.ListContainer):
        return [plain(v) for v in value]
    return value


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_unpack_agrees_with_construct_on_any_bytes(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    raw = data.draw(st.binary(min_size=0, max_size=codec.size + 4))
    try:
        expected = plain(codec.construct.parse(raw))
    except construct.ConstructError:
        with pytest.raises(FormatError):
            codec.unpack(raw)
    else:
        assert codec.as_dict(codec.unpack(raw)) == expected


def values_of(fields: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Values for a codec's fields, as construct and ``Codec.pack`` take them."""
    out = {}
    for f in fields:
        if f.value is not None or f.name in ("reserved", "ignored"):
            continue
        out[f.name] = value_of(f, f.kind)
    return st.fixed_dictionaries(out)


def value_of(field: Any, kind: str) -> st.SearchStrategy[Any]:
    base, bracket, count = kind.rpartition("[")
    if bracket and base != "u8":
        n = int(count[:-1])
        return st.lists(value_of(field, base), min_size=n, max_size=n)
    if base == "u8":
        n = int(count[:-1])
        return st.binary(min_size=n, max_size=n)
    if kind == "struct":
        return values_of(field.fields)
    bits = int(kind.lstrip("signedlbu "))
    if kind.startswith("signed"):
        return st.integers(-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
    return st.integers(0, (1 << bits) - 1)


@pytest.mark.parametrize("name", CODECS)
@given(data=st.data())
def test_pack_agrees_with_construct(name: str, data: st.DataObject) -> None:
    codec = CODECS[name]
    values = data.draw(values_of(codec.fields))
    raw = codec.construct.build(values)
    assert codec.pack(**values) == raw
    assert codec.pack(*[values[name] for name in codec.Record._fields if name in values]) == raw
    record = codec.unpack(raw)
    assert codec.pack(record) == raw
    assert codec.unpack(b"--" + raw, 2) == record


def test_records_are_named_and_nested() -> None:
    raw = RICH.pack(b"u" * 16, 3, [(1, (2, -2))] * 3, {"deep": (9,), "name": b"nn"}, [b"abc", b"def"], 5)
    record = RICH.unpack(raw)
    assert record.magic == 0x1234
    assert record.pairs[2].y == (2, -2)
    assert record.inner.deep.value == 9
    assert record.names == (b"abc", b"def")
    assert record.index == 5
    assert type(record).__name__ == "rich"


def test_field_table() -> None:
    assert [(f.name, f.offset, f.size, f.kind) for f in RICH.fields] == [
        ("magic", 0, 4, "le32"),
        ("uuid", 4, 16, "u8[16]"),
        ("reserved", 20, 3, "u8[3]"),
        ("count", 23, 1, "u8"),
        ("pairs", 24, 24, "struct[3]"),
        ("inner", 48, 11, "struct"),
        ("names", 59, 6, "u8[3][2]"),
        ("index", 65, 1, "u8"),
    ]
    assert RICH.size == 66
    assert RICH.fields[0].value == 0x1234
    assert RICH.fields[0].docs == "says what it is"
    assert RICH.fields[2].docs == "must be zero"
    assert [f.name for f in RICH.fields[4].fields] == ["x", "ignored", "y", "mark"]


def test_reserved_and_constants_are_checked_and_ignored_is_not() -> None:
    good = bytearray(RICH.pack(bytes(16), 0, [(0, (0, 0))] * 3, ((0,), b"  "), [b"   "] * 2, 0))
    assert RICH.unpack(good)
    good[26] = 0xEE  # ignored
    assert RICH.unpack(good)
    for position, message in ((0, "rich.magic is not 0x1234"), (21, "rich.reserved is not zero")):
        bad = bytearray(good)
        bad[position] ^= 1
        with pytest.raises(FormatError, match=message):
            RICH.unpack(bad)
    bad = bytearray(good)
    bad[31] ^= 1
    with pytest.raises(ProtocolError, match=r"rich.pairs\[0\].mark is not b'ok'"):
        RICH.unpack(bad)


def test_the_documentation_is_true() -> None:
    assert doctest.testmod(codec_module).failed == 0


def test_other_byte_order() -> None:
    codec = Codec("net", Struct("port" / Int16ub, "ttl" / Int8ul))
    assert codec.pack(0x1122, 3) == b"\x11\x22\x03"
    assert codec.fields[0].kind == "be16"


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ((), {}),
        ((1, 2, 3, 4), {}),
        ((1, 2, 3, 4, 5, 6), {}),
        ((1, 2, 3, 4, 5), {"a": 1}),
        ((1, 2, 3, 4, 5), {"z": 1}),
        ((256, 2, 3, 4, 5), {}),
        ((-1, 2, 3, 4, 5), {}),
        (("x", 2, 3, 4, 5), {}),
    ],
)
def test_wrong_values_are_refused(values: Any, named: Any) -> None:
    with pytest.raises(ValueError, match="plain"):
        PLAIN.pack(*values, **named)


@pytest.mark.parametrize(
    "change",
    [
        {"uuid": b"short"},
        {"pairs": [(0, (0, 0))] * 2},
        {"names": [b"abc", b"de"]},
        {"magic": 5},
        {"inner": {"deep": (1,)}},
    ],
)
def test_wrong_lengths_are_refused(change: dict[str, Any]) -> None:
    good = {
        "uuid": bytes(16),
        "count": 0,
        "pairs": [(0, (0, 0))] * 3,
        "inner": ((0,), b"  "),
        "names": [b"   "] * 2,
        "index": 0,
    }
    RICH.pack(**good)
    with pytest.raises(ValueError):
        RICH.pack(**{**good, **change})


def test_a_record_with_a_wrong_constant_is_refused() -> None:
    record = RICH.unpack(RICH.pack(bytes(16), 0, [(0, (0, 0))] * 3, ((0,), b"  "), [b"   "] * 2, 0))
    with pytest.raises(ValueError, match="always"):
        RICH.pack(record._replace(magic=1))


@pytest.mark.parametrize(
    "definition",
    [
        Struct("a" / Int8ul, Padding(3)),
        Struct("n" / Int8ul, "a" / Bytes(this.n)),
        Struct("n" / Int8ul, "a" / Array(this.n, Int8ul)),
        Struct("a" / Int16ul, "b" / Int16ub),
        Struct("a" / construct.Float32l),
        Struct("a" / construct.Flag),
        Struct(Int8ul),
        Struct("a" / Array(2, Const(1, Int8ul))),
        Struct("a" / Const([1, 2], Array(2, Int8ul))),
        Int8ul,
    ],
    ids=str,
)
def test_what_has_no_fixed_layout_is_refused(definition: Any) -> None:
    with pytest.raises(TypeError):
        Codec("bad", definition)
