"""Fast codecs generated from construct definitions.

A wire format is written down once, as a ``construct.Struct``. ``Codec`` walks that definition into one precompiled
``struct.Struct`` and a little code that regroups its values, so that the data plane parses 20 to 100 times faster
than construct does, with the same checks; ``tests/pyvhost/test_codec.py`` proves both equal. The field list with
offsets is there for documentation tables.

What a definition may hold: integers (``Int8ul`` … ``Int64sl``, or all big-endian, or all native), ``Bytes(n)``,
``Const(value, subcon)``, ``Reserved(n)``, ``Ignored(n)``, a fixed ``Array`` of any of these, a nested ``Struct``.
Anything else is refused with ``TypeError`` when the codec is made; ``Padding`` too, because it does not say whether its
bytes are checked.

>>> from construct import Array, Bytes, Const, Int8ul, Int16ul, Int32ul, Struct
>>> point = Codec("point", Struct("x" / Int16ul, "y" / Int16ul, Reserved(4), "tags" / Array(2, Int8ul)))
>>> point.size
10
>>> p = point.unpack(b"\\1\\0\\2\\0\\0\\0\\0\\0\\7\\10")
>>> p.x, p.y, p.tags
(1, 2, (7, 8))
>>> point.pack(1, 2, (7, 8)) == point.pack(y=2, x=1, tags=[7, 8]) == point.pack(p)
True
"""

from __future__ import annotations

import itertools
import struct
from collections import namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import construct

from pyvhost.errors import FormatError

__all__ = ["Codec", "Field", "Ignored", "Reserved"]

_IGNORED = "ignored by the receiver"
_RESERVED = "must be zero"


def Reserved(size: int) -> Any:  # noqa: N802 - reads as a construct type
    """``size`` bytes that are written as zero and refused when they are not."""
    return construct.Const(bytes(size)) * _RESERVED


def Ignored(size: int) -> Any:  # noqa: N802 - reads as a construct type
    """``size`` bytes that are written as zero and not looked at."""
    return construct.Padding(size) * _IGNORED


@dataclass(frozen=True, slots=True)
class Field:
    """One line of a layout table. ``offset`` and ``size`` in bytes; ``offset`` counts from the start of the struct
    that the field is directly in."""

    name: str  #: "reserved" and "ignored" for fields without a name
    offset: int
    size: int
    kind: str  #: "le32", "be16", "u8[16]", "le64[4]", "struct", "struct[2]", …
    value: int | bytes | None = None  #: what a constant field must hold
    docs: str = ""  #: the construct definition's own words (``field * "words"``)
    fields: tuple[Field, ...] = ()  #: those of a nested struct (of one element, in an array)


@dataclass(slots=True)
class _Plan:
    """What walking one (sub)construct gave: its part of the struct format, and source text that regroups flat values.

    ``take(i)`` is an expression for the value whose flat values start at ``v[i]``; ``give(e)`` lists the flat values of
    the value that expression ``e`` yields. Both consist of indexes and the names in ``env``, which this module made up.
    """

    format: str  # struct codes without byte order
    values: int  # number of flat values
    size: int
    kind: str
    take: Callable[[int], str]
    give: Callable[[str], list[str]]
    env: dict[str, Any]
    orders: frozenset[str] = frozenset()
    tests: tuple[tuple[int, int | bytes, str], ...] = ()  # flat index, constant, name of the field
    fields: tuple[Field, ...] = ()
    value: int | bytes | None = None


class Codec:
    """Packs and unpacks one fixed-size format, as ``definition`` (a ``construct.Struct``) says.

    ``name`` names the record type and appears in errors. A codec holds no state: one instance serves all threads.
    """

    __slots__ = ("Record", "_fixed", "_flat", "_plan", "_take", "construct", "fields", "name", "raw", "size")

    def __init__(self, name: str, definition: Any) -> None:
        self.name = name
        self.construct = definition
        plan, self.Record, self._fixed = _struct(name, definition)
        self._plan = plan
        #: the fields in order, unnamed ones too
        self.fields: tuple[Field, ...] = plan.fields
        #: bytes
        self.size: int = plan.size
        if len(plan.orders) > 1:
            raise TypeError(f"{name}: mixed byte orders in one definition")
        packed = struct.Struct(next(iter(plan.orders), "<") + plan.format)
        if packed.size != plan.size or definition.sizeof() != plan.size:
            raise TypeError(f"{name}: its size is not constant")
        #: the flat values without records or checks, for inner loops
        self.raw: struct.Struct = packed
        self._take: Callable[[Any, int], Any] = _compile_take(name, plan, packed)
        flat = ", ".join(plan.give("r"))
        self._flat: Callable[[Any], bytes] = eval(f"lambda r: pack({flat})", {**plan.env, "pack": packed.pack})

    def __repr__(self) -> str:
        return f"<Codec {self.name}, {self.size} bytes>"

    def unpack(self, buf: Any, offset: int = 0) -> Any:
        """The record found at byte ``offset`` (>= 0) of ``buf``, any bytes-like: a named tuple of type ``Record``, in
        which nested structs are records too and arrays are tuples. Each byte is read once, so what was checked is what
        is returned. Bytes after the record are not looked at.

        :raises FormatError: fewer than ``size`` bytes, a wrong constant, a reserved field that is not zero
        """
        return self._take(buf, offset)

    def record(self, *values: Any, **named: Any) -> Any:
        """A record made from values in field order, or by name, or both. Constant fields are filled in and not counted
        among the positional values; by name they may be given if they are right.

        :raises ValueError: a field missing, unknown, given twice, or a constant with another value
        """
        out: list[Any] = []
        rest = iter(values)
        for field in self.Record._fields:
            if field in self._fixed:
                value = named.pop(field, self._fixed[field])
                if value != self._fixed[field]:
                    raise ValueError(f"{self.name}.{field} is always {self._fixed[field]!r}")
            elif field in named:
                value = named.pop(field)
            else:
                try:
                    value = next(rest)
                except StopIteration:
                    raise ValueError(f"{self.name}.{field} is missing") from None
            out.append(value)
        if named:
            raise ValueError(f"{self.name} has no field {min(named)!r}, or it was given twice")
        if next(rest, self) is not self:
            raise ValueError(f"{self.name}: too many values")
        return self.Record._make(out)

    def coerce(self, value: Any) -> Any:
        """``value`` as this codec's record: a record already, a mapping of names, or a sequence of values.

        :raises ValueError: as ``record()``
        """
        if type(value) is self.Record:
            return value
        if isinstance(value, Mapping):
            return self.record(**value)
        return self.record(*value)

    def pack(self, *values: Any, **named: Any) -> bytes:
        """The ``size`` bytes of one record: of one that ``unpack()`` or ``record()`` made, or of the values that
        ``record()`` takes. A nested struct may be given as a record, as a sequence of its values or as a mapping.

        :raises ValueError: a value missing, out of its field's range, of the wrong length or type
        """
        if len(values) == 1 and not named and type(values[0]) is self.Record:
            record = values[0]
        else:
            record = self.record(*values, **named)
        for name, value in self._fixed.items():
            if getattr(record, name) != value:
                raise ValueError(f"{self.name}.{name} is always {value!r}")
        try:
            return self._flat(record)
        except (struct.error, TypeError) as e:
            raise ValueError(f"{self.name}: {e}") from None

    def as_dict(self, record: Any) -> dict[str, Any]:
        """A record as plain dicts, lists and values, for reading and for JSON; bytes stay bytes."""
        return {name: _plain(value) for name, value in zip(record._fields, record, strict=True)}


def _plain(value: Any) -> Any:
    if hasattr(value, "_fields"):
        return {name: _plain(v) for name, v in zip(value._fields, value, strict=True)}
    return [_plain(v) for v in value] if isinstance(value, tuple) else value


def _compile_take(name: str, plan: _Plan, packed: struct.Struct) -> Callable[[Any, int], Any]:
    """The unpack function of one codec; constants are checked before anything is regrouped."""
    env = {**plan.env, "unpack": packed.unpack_from, "FormatError": FormatError, "StructError": struct.error}
    env["short"] = f"{name}: fewer than {plan.size} bytes"
    lines = [
        "def take(buf, offset):",
        "    try:",
        "        v = unpack(buf, offset)",
        "    except StructError:",
        "        raise FormatError(short) from None",
    ]
    for index, constant, what in plan.tests:
        env[f"c{index}"] = constant
        env[f"w{index}"] = f"{name}.{what} is not {_spell(constant)}"
        lines += [f"    if v[{index}] != c{index}:", f"        raise FormatError(w{index})"]
    exec("\n".join([*lines, f"    return {plan.take(0)}"]), env)
    take: Callable[[Any, int], Any] = env["take"]
    return take


def _spell(constant: int | bytes) -> str:
    if not (any(constant) if isinstance(constant, bytes) else constant):
        return "zero"
    return f"{constant:#x}" if isinstance(constant, int) else repr(constant)


def _sized(value: Any, count: int) -> Any:
    """``value`` if its length is ``count``: ``struct`` alone would cut or fill bytes, and shift elements, silently."""
    if len(value) != count:
        raise ValueError(f"expected {count} bytes or elements, got {len(value)}")
    return value


_serial = itertools.count()  # generated names are unique, so that nested environments can be merged


def _struct(name: str, sc: Any) -> tuple[_Plan, Any, dict[str, int | bytes]]:
    """The plan of a Struct, its record type, and its constants by name."""
    if not isinstance(sc, construct.Struct):
        raise TypeError(f"{name}: a construct Struct is needed, not {type(sc).__name__}")
    members: list[tuple[str | None, _Plan, int]] = []  # name, plan, flat index
    fields: list[Field] = []
    tests: list[tuple[int, int | bytes, str]] = []
    env: dict[str, Any] = {"new": tuple.__new__, "sized": _sized}
    offset = index = 0
    for sub in sc.subcons:
        docs = str(sub.docs or "")
        label = sub.name or ("ignored" if docs == _IGNORED else "reserved")
        plan = _member(f"{name}.{label}", sub)
        if not sub.name and plan.values and plan.value is None:
            raise TypeError(f"{name}: only constants, Reserved and Ignored may go without a name")
        fields.append(Field(label, offset, plan.size, plan.kind, plan.value, docs, plan.fields))
        members.append((sub.name, plan, index))
        tests += [(index + i, constant, f"{label}{what}") for i, constant, what in plan.tests]
        env |= plan.env
        offset += plan.size
        index += plan.values
    named = [(n, p, i) for n, p, i in members if n]
    record: Any = namedtuple(name.rpartition(".")[2], [n for n, _, _ in named])  # type: ignore[misc]
    key = f"t{next(_serial)}"
    env[key] = record

    def take(base: int) -> str:
        return f"new({key}, ({''.join(p.take(base + i) + ', ' for _, p, i in named)}))"

    def give(expr: str) -> list[str]:
        positions = {id(p): n for n, (_, p, _) in enumerate(named)}
        return [text for _, p, _ in members for text in p.give(f"{expr}[{positions.get(id(p), 0)}]")]

    plan = _Plan(
        format="".join(p.format for _, p, _ in members),
        values=index,
        size=offset,
        kind="struct",
        take=take,
        give=give,
        env=env,
        orders=frozenset().union(*(p.orders for _, p, _ in members)),
        tests=tuple(tests),
        fields=tuple(fields),
    )
    return plan, record, {n: p.value for n, p, _ in named if p.value is not None}


def _member(where: str, sc: Any) -> _Plan:
    """The plan of whatever may stand in a struct."""
    docs = sc.docs
    while isinstance(sc, construct.Renamed):
        sc = sc.subcon
    if isinstance(sc, construct.Padded) and docs != _IGNORED:
        raise TypeError(f"{where}: say Reserved(n) (checked to be zero) or Ignored(n) instead of padding")
    for kind, plan in _MEMBERS:
        if isinstance(sc, kind):
            return plan(where, sc)
    raise TypeError(f"{where}: {type(sc).__name__} cannot be part of a codec")


def _length(where: str, length: Any) -> int:
    if not isinstance(length, int):
        raise TypeError(f"{where}: its length is not constant")
    return length


def _integer(where: str, sc: Any) -> _Plan:
    order, code = sc.fmtstr
    if code not in "BHLQbhlq":
        raise TypeError(f"{where}: only integers, not struct code {code!r}")
    kind = f"{_KINDS[order] if sc.length > 1 else 'u'}{8 * sc.length}"
    return _Plan(
        format=code,
        values=1,
        size=sc.length,
        kind=f"signed {kind}" if code.islower() else kind,
        take=lambda i: f"v[{i}]",
        give=lambda e: [e],
        env={},
        orders=frozenset({order} if sc.length > 1 else ()),
    )


_KINDS = {"<": "le", ">": "be", "=": "u"}


def _bytes(where: str, sc: Any) -> _Plan:
    size = _length(where, sc.length)
    return _Plan(
        format=f"{size}s",
        values=1,
        size=size,
        kind=f"u8[{size}]",
        take=lambda i: f"v[{i}]",
        give=lambda e: [f"sized({e}, {size})"],
        env={},
    )


def _const(where: str, sc: Any) -> _Plan:
    plan = _member(where, sc.subcon)
    if plan.values != 1 or plan.fields:
        raise TypeError(f"{where}: a constant must be one integer or bytes")
    key = f"k{next(_serial)}"
    plan.env = {key: sc.value}
    plan.value = sc.value
    plan.tests = ((0, sc.value, ""),)
    plan.give = lambda e: [key]
    return plan


def _ignored(where: str, sc: Any) -> _Plan:
    size = _length(where, sc.length)
    return _Plan(f"{size}x", 0, size, f"u8[{size}]", lambda i: "()", lambda e: [], {})


def _nested(where: str, sc: Any) -> _Plan:
    codec = Codec(where, sc)
    plan = codec._plan
    key = f"n{next(_serial)}"
    spread = eval(f"lambda r: ({''.join(text + ', ' for text in plan.give('r'))})", dict(plan.env))
    plan.env[key] = lambda value: spread(codec.coerce(value))
    plan.give = lambda e: [f"*{key}({e})"]
    plan.tests = tuple((i, constant, f".{what}") for i, constant, what in plan.tests)
    return plan


def _array(where: str, sc: Any) -> _Plan:
    count = _length(where, sc.count)
    one = _member(where, sc.subcon)
    if not one.values or one.value is not None or count < 1:
        raise TypeError(f"{where}: an array needs elements that carry values")
    plain = one.give("e") == ["e"]

    def take(base: int) -> str:
        if one.values == 1 and not one.fields:
            return f"v[{base}:{base + count}]"
        return f"({''.join(one.take(base + k * one.values) + ', ' for k in range(count))})"

    def give(expr: str) -> list[str]:
        source = f"sized({expr}, {count})"
        if plain:
            return [f"*{source}"]
        return [f"*[x for e in {source} for x in ({', '.join(one.give('e'))},)]"]

    return _Plan(
        format=one.format * count,
        values=one.values * count,
        size=one.size * count,
        kind=f"{one.kind}[{count}]",
        take=take,
        give=give,
        env=one.env,
        orders=one.orders,
        tests=tuple((k * one.values + i, c, f"[{k}]{w}") for k in range(count) for i, c, w in one.tests),
        fields=one.fields,
    )


_MEMBERS: tuple[tuple[Any, Callable[[str, Any], _Plan]], ...] = (
    (construct.FormatField, _integer),
    (construct.Bytes, _bytes),
    (construct.Const, _const),
    (construct.Padded, _ignored),
    (construct.Struct, _nested),
    (construct.Array, _array),
)
