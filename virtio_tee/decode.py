"""Bytes of any of our wire formats as readable fields.

:func:`decode` takes bytes and the name of a format (:data:`KINDS`) and gives a tree of :class:`Node`; it never raises
for what the bytes hold: what can be decoded is, and every oddity is a line in ``errors``. :func:`render_text` and
:func:`render_json` show the tree, :func:`parse_hex` reads what people paste.

Offsets, sizes and types come from the formats' own definitions (``Codec.fields``); this module adds names for numbers.

>>> print(render_text(decode("descriptors", parse_hex("00 10 00 00 00 00 00 00  40 00 00 00  01 00  05 00"))))
descriptors, 16 bytes
  descriptor 0: device reads, 64 bytes, then 5
    0x0000  addr              le64      0x1000
    0x0008  len               le32      64
    0x000c  flags             le16      1  NEXT
    0x000e  next              le16      5
"""

from __future__ import annotations

import json
import re
import uuid as uuid_module
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum, IntFlag
from hashlib import sha256
from typing import Any

from device import messages as device_messages
from device import wire
from device.messages import Body, Tail
from pyvhost import messages as vhost
from pyvhost.codec import Codec, Field
from pyvhost.vring import split
from tee import package
from tee.calls import Login
from tee.driver import GenCap, TeeKind
from tee.results import describe, describe_origin
from tee.rpc import describe_command

__all__ = [
    "KINDS",
    "Decoded",
    "HexError",
    "Kind",
    "Node",
    "decode",
    "parse_hex",
    "render_json",
    "render_text",
    "request_type",
]

Value = int | bytes | tuple[int, ...] | None
Meaning = Callable[[Any], str]


class HexError(ValueError):
    """Text that is no hex dump."""


@dataclass(slots=True)
class Node:
    """One field, or a group of fields."""

    name: str
    offset: int
    size: int
    type: str = ""  #: "le32", "u8[16]", …; empty for a group
    value: Value = None
    meaning: str = ""  #: what the value says, where it is more than a number
    fields: list[Node] = field(default_factory=list)


@dataclass(slots=True)
class Decoded:
    """What decoding gave. ``errors`` is empty if the bytes are as the format requires."""

    kind: str
    size: int
    fields: list[Node] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


# -- names for numbers


def _enum(cls: type[IntEnum], docs: Mapping[Any, str] | None = None) -> Meaning:
    def say(value: int) -> str:
        try:
            member = cls(value)
        except ValueError:
            return "unknown"
        return f"{member.name}: {docs[member]}" if docs else member.name

    return say


def _flags(cls: type[IntFlag] | type[IntEnum]) -> Meaning:
    """``cls``: single bits."""

    def say(value: int) -> str:
        names, rest = [], value
        for member in cls:
            if value & member:
                names.append(member.name or "?")
                rest &= ~int(member)
        if rest:
            names.append(f"unknown {rest:#x}")
        return " | ".join(names)

    return say


def _uuid(value: bytes) -> str:
    return str(uuid_module.UUID(bytes=value))


def _name(value: bytes) -> str:
    return json.dumps(value.rstrip(b"\0").decode("utf-8", "replace"), ensure_ascii=False)


def _api_level(value: int) -> str:
    return f"{value >> 16}.{value & 0xFFFF}"


def _attribute(value: int) -> str:
    names = [_enum(wire.ParamType)(value & wire.PARAM_TYPE_MASK)]
    if value & wire.PARAM_META:
        names.append("META")
    if value & wire.PARAM_INLINE:
        names.append("INLINE")
    rest = value & ~(wire.PARAM_TYPE_MASK | wire.PARAM_META | wire.PARAM_INLINE)
    if rest:
        names.append(f"unknown {rest:#x}")
    return " | ".join(names)


def _algorithm(value: int) -> str:
    algorithm = package.ALGORITHMS.get(value)
    return algorithm.name if algorithm else "unknown"


def _vhost_flags(value: int) -> str:
    version = value & vhost.Flag.VERSION_MASK
    names = [f"version {version}", *(f.name or "?" for f in (vhost.Flag.REPLY, vhost.Flag.NEED_REPLY) if value & f)]
    rest = value & ~(vhost.Flag.VERSION_MASK | vhost.Flag.REPLY | vhost.Flag.NEED_REPLY)
    return " | ".join([*names, *([f"unknown {rest:#x}"] if rest else [])])


def _ring_and_fd(value: int) -> str:
    return f"ring {value & vhost.VRING_INDEX_MASK}" + (", no fd" if value & vhost.VRING_NOFD else "")


def _features(value: int) -> str:
    """Virtio feature bits: the device's own and the common ones."""
    own = value & 0xFFFFFF
    common = value & ~0xFFFFFF
    return " | ".join(
        text
        for text in (_flags(wire.Feature)(own) if own else "", _flags(vhost.Feature)(common) if common else "")
        if text
    )


def _descriptor_flags(value: int) -> str:
    known = {split.DESC_F_NEXT: "NEXT", split.DESC_F_WRITE: "WRITE", split.DESC_F_INDIRECT: "INDIRECT"}
    names = [name for bit, name in known.items() if value & bit]
    rest = value & ~sum(known)
    return " | ".join([*names, *([f"unknown {rest:#x}"] if rest else [])])


def _epoch_or_tag(value: int) -> str:
    return "none" if value == 0 else ""


_MEANINGS: dict[tuple[str, str], Meaning] = {
    ("RequestHeader", "type"): _enum(wire.Request, wire.REQUEST_DOCS),
    ("ResponseHeader", "status"): _enum(wire.Status),
    ("ResponseHeader", "flags"): _flags(wire.ResponseFlag),
    ("ResponseHeader", "ret"): describe,
    ("ResponseHeader", "origin"): describe_origin,
    ("EventHeader", "type"): _enum(wire.Event, wire.EVENT_DOCS),
    ("Param", "attr"): _attribute,
    ("OpenSession", "client_login"): _enum(Login),
    ("ServiceTask", "client_login"): _enum(Login),
    ("RegisterMemory", "flags"): _flags(wire.RegionFlag),
    ("RegisterFfa", "flags"): _flags(wire.RegionFlag),
    ("EnclaveCreate", "flags"): _flags(wire.EnclaveFlag),
    ("ServiceEntry", "flags"): _flags(wire.ServiceFlag),
    ("ServiceEntry", "api_level"): _api_level,
    ("RpcReply", "ret"): describe,
    ("RpcReply", "origin"): describe_origin,
    ("RpcEvent", "command"): describe_command,
    ("RpcEvent", "target"): _enum(wire.RpcTarget),
    ("RpcEvent", "call"): _epoch_or_tag,
    ("Config", "tee_kind"): _enum(TeeKind),
    ("Config", "tee_gen_caps"): _flags(GenCap),
    ("AttestationStatement", "tee_kind"): _enum(TeeKind),
    ("AttestationStatement", "algorithm"): _algorithm,
    ("TaHeader", "algo"): _algorithm,
    ("TaHeader", "img_type"): lambda value: (
        "TA with UUID and version" if value == package.IMAGE_BOOTSTRAP_TA else "other"
    ),
    ("header", "flags"): _vhost_flags,
    ("virtq_desc", "flags"): _descriptor_flags,
}


_BYTES_MEANINGS: dict[str, Meaning] = {"uuid": _uuid, "client_uuid": _uuid, "name": _name}

#: integers that are shown as plain numbers; all others are shown in hex when they are large
_DECIMAL = re.compile(
    r"^(num_|max_|count$|total$|size$|length$|version|first$|deadline_ms|rpc_deadline|index$|num$|len$)"
)

_F = vhost.FrontendRequest
_U64_MEANINGS: dict[int, Meaning] = {
    _F.GET_FEATURES: _features,
    _F.SET_FEATURES: _features,
    _F.GET_PROTOCOL_FEATURES: _flags(vhost.ProtocolFeature),
    _F.SET_PROTOCOL_FEATURES: _flags(vhost.ProtocolFeature),
    _F.SET_VRING_KICK: _ring_and_fd,
    _F.SET_VRING_CALL: _ring_and_fd,
    _F.SET_VRING_ERR: _ring_and_fd,
    _F.GET_STATUS: _flags(vhost.DeviceStatus),
    _F.SET_STATUS: _flags(vhost.DeviceStatus),
}


# -- walking through bytes


class _Walk:
    """A position in the bytes, and what was found up to it."""

    def __init__(self, kind: str, data: bytes) -> None:
        self.data = data
        self.at = 0
        self.out = Decoded(kind, len(data))

    @property
    def left(self) -> int:
        return len(self.data) - self.at

    def error(self, text: str) -> None:
        self.out.errors.append(text)

    def struct(self, codec: Codec, label: str = "", meanings: Mapping[str, Meaning] | None = None) -> dict[str, Any]:
        """Decode one fixed layout, as much of it as there is; the values by name."""
        node = Node(label or codec.name, self.at, min(codec.size, self.left))
        self.out.fields.append(node)
        values = self._fields(codec.fields, codec.name, self.at, node, meanings or {})
        if self.left < codec.size:
            self.error(f"offset {self.at:#x}: {node.name} is cut short: {self.left} of {codec.size} bytes")
        self.at = min(self.at + codec.size, len(self.data))
        return values

    def _fields(
        self, fields: tuple[Field, ...], owner: str, base: int, node: Node, meanings: Mapping[str, Meaning]
    ) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for one in fields:
            at = base + one.offset
            raw = self.data[at : at + one.size]
            if len(raw) < one.size:
                if raw:
                    node.fields.append(Node(one.name, at, len(raw), f"u8[{len(raw)}]", raw, f"of {one.size} bytes"))
                break
            if one.kind == "struct":
                group = Node(one.name, at, one.size)
                node.fields.append(group)
                values |= self._fields(one.fields, f"{owner}.{one.name}", at, group, meanings)
                continue
            value = _value(one, raw)
            meaning = self._check(owner, one, at, value)
            if not meaning:
                meaning = _meaning(owner, one.name, value, meanings)
            values[one.name] = value
            if one.name not in {"reserved", "ignored"} or any(raw):
                node.fields.append(Node(one.name, at, one.size, one.kind, value, meaning))
        return values

    def _check(self, owner: str, one: Field, at: int, value: Value) -> str:
        if one.value is None or value == one.value:
            return ""
        if one.name == "reserved":
            self.error(f"offset {at:#x}: a reserved field of {owner} is not zero")
            return "should be zero"
        should = f"{one.value:#x}" if isinstance(one.value, int) else one.value.hex()
        self.error(f"offset {at:#x}: {owner}.{one.name} is not {should}")
        return f"should be {should}"

    def bytes(self, label: str, size: int, meaning: str = "") -> bytes:
        """Take ``size`` bytes as they are, or what is left of them."""
        raw = self.data[self.at : self.at + size]
        if raw or not size:
            self.out.fields.append(Node(label, self.at, len(raw), f"u8[{len(raw)}]", raw, meaning))
        if len(raw) < size:
            self.error(f"offset {self.at:#x}: {label} is cut short: {len(raw)} of {size} bytes")
        self.at += len(raw)
        return raw

    def array(self, codec: Codec, count: int, label: str) -> list[dict[str, Any]]:
        """Decode ``count`` elements, or as many as there are."""
        there = min(count, -(-self.left // codec.size))
        values = [self.struct(codec, f"{label} {i}") for i in range(there)]
        if there < count:
            self.error(f"{count} × {codec.name} announced, {there} there")
        return values

    def end(self, *, exact: bool = True) -> Decoded:
        """What is left over, and the result."""
        if self.left:
            if exact:
                self.error(f"offset {self.at:#x}: {self.left} bytes more than the format has")
            self.bytes("trailing bytes", self.left)
        return self.out


def _value(one: Field, raw: bytes) -> Value:
    found = re.fullmatch(r"(?:signed )?(?:[lb]e|u)(\d+)(?:\[(\d+)\])?", one.kind)
    if found is None or (found[2] and found[1] == "8"):
        return raw
    signed, order = one.kind.startswith("signed"), "big" if "be" in one.kind else "little"
    width = int(found[1]) // 8
    numbers = tuple(
        int.from_bytes(raw[i : i + width], order, signed=signed)  # type: ignore[arg-type]
        for i in range(0, len(raw), width)
    )
    return numbers if found[2] else numbers[0]


def _meaning(owner: str, name: str, value: Value, meanings: Mapping[str, Meaning]) -> str:
    say = meanings.get(name) or _MEANINGS.get((owner, name))
    if say is None and isinstance(value, bytes):
        say = _BYTES_MEANINGS.get(name)
    return say(value) if say is not None else ""


# -- the device's messages


def _request(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("request", data)
    header = walk.struct(device_messages.REQUEST_HEADER)
    number = header.get("type")
    if number is None:
        return walk.end()
    if header.get("flags"):
        walk.error(f"unknown flags {header['flags']:#x} in the header")
    if header.get("tag") == 0:
        walk.error("the tag is 0")
    kind = device_messages.REQUESTS.get(number)
    if kind is None:
        walk.error(f"unknown request type {number:#x}; its body is shown as bytes")
        walk.bytes("body", walk.left)
        return walk.out
    if "context" in header and kind.context is not bool(header["context"]):
        walk.error("the context is 0" if kind.context else "a context is named where none belongs")
    params = _body(walk, kind.body)
    for i, attr, size in params:
        if attr & wire.PARAM_INLINE and attr & wire.PARAM_TYPE_MASK in (
            wire.ParamType.MEMREF_IN,
            wire.ParamType.MEMREF_INOUT,
        ):
            _inline(walk, i, size)
    return walk.end()


def _inline(walk: _Walk, index: int, size: int) -> None:
    raw = walk.bytes(f"inline data of param {index}", size)
    padding = min(-len(raw) % 8, walk.left)
    if padding and len(raw) == size:
        walk.at += padding


def _body(walk: _Walk, body: Body) -> list[tuple[int, int, int]]:
    """Decode a body and its tail; index, attribute and size of each whole parameter."""
    if not body.codec.size:
        return []
    values = walk.struct(body.codec)
    if body.tail is Tail.NONE or body.count not in values:
        return []
    label = {Tail.PARAMS: "param", Tail.RANGES: "range", Tail.ENTRIES: "entry"}[body.tail]
    first = len(walk.out.fields)
    elements = walk.array(device_messages.TAIL_ELEMENT[body.tail], values[body.count], label)
    if body.tail is not Tail.PARAMS:
        return []
    for node, element in zip(walk.out.fields[first:], elements, strict=False):
        _describe_param(node, element)
    return [(i, element["attr"], element["b"]) for i, element in enumerate(elements) if len(element) == 4]


def _describe_param(node: Node, element: Mapping[str, int]) -> None:
    if len(element) < 4:
        return
    attr, a, b, c = (element[name] for name in ("attr", "a", "b", "c"))
    kind = attr & wire.PARAM_TYPE_MASK
    if kind in (wire.ParamType.MEMREF_IN, wire.ParamType.MEMREF_OUT, wire.ParamType.MEMREF_INOUT):
        if attr & wire.PARAM_INLINE:
            where = "in the request"
        elif c == wire.NULL_REGION:
            where = "NULL"
        else:
            where = f"offset {a} of region {c}"
        node.meaning = f"{_attribute(attr)}, {b} bytes, {where}"
    else:
        node.meaning = _attribute(attr)


def _response(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("response", data)
    header = walk.struct(device_messages.RESPONSE_HEADER)
    number = options.get("request_type")
    if number is None:
        if walk.left:
            walk.error("which request it answers is not known (--request-type), so the rest is shown as bytes")
            walk.bytes("body", walk.left)
        return walk.out
    kind = device_messages.REQUESTS.get(number)
    if kind is None:
        walk.error(f"unknown request type {number:#x}; the body is shown as bytes")
        return walk.end(exact=False)
    if kind.response is None or header.get("status") != wire.Status.OK:
        return walk.end(exact=header.get("status") == wire.Status.OK)
    params = _body(walk, kind.response)
    _inline_out(walk, params)
    return walk.end()


def _inline_out(walk: _Walk, params: list[tuple[int, int, int]]) -> None:
    """Inline output: the request's sizes rule how much there is, the response's how much is meant."""
    outputs = [
        (i, size)
        for i, attr, size in params
        if attr & wire.PARAM_INLINE
        and attr & wire.PARAM_TYPE_MASK in (wire.ParamType.MEMREF_OUT, wire.ParamType.MEMREF_INOUT)
    ]
    if len(outputs) == 1 or sum(-(-size // 8) * 8 for _, size in outputs) == walk.left:
        for i, size in outputs:
            _inline(walk, i, min(size, walk.left))
        if len(outputs) == 1 and walk.left:
            walk.bytes("room that was not used", walk.left)
    elif outputs:
        walk.bytes("inline data of params " + ", ".join(str(i) for i, _ in outputs), walk.left)


def _event(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("event", data)
    header = walk.struct(device_messages.EVENT_HEADER)
    number = header.get("type")
    if number is None:
        return walk.end()
    body = device_messages.EVENTS.get(number)
    if body is None:
        walk.error(f"unknown event type {number:#x}; its body is shown as bytes")
        walk.bytes("body", walk.left)
        return walk.out
    _body(walk, body)
    return walk.end()


def _config(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("config", data)
    values = walk.struct(device_messages.CONFIG)
    version = values.get("version_major"), values.get("version_minor")
    if values.get("magic") == wire.MAGIC and version[0] is not None and version[0] != wire.SPEC_VERSION[0]:
        walk.error(f"version {version[0]} of the specification is not known here")
    if values.get("epoch") == 0:
        walk.error("the epoch is 0")
    return walk.end(exact=False)


def _statement(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("statement", data)
    values = walk.struct(_STATEMENT)
    if "signature_size" in values:
        walk.bytes("signature", values["signature_size"])
    return walk.end()


_STATEMENT = Codec("AttestationStatement", wire.AttestationStatement)


# -- other formats


def _vhost_user(data: bytes, options: Mapping[str, Any]) -> Decoded:
    return _vhost(_Walk("vhost-user", data), vhost.FrontendRequest, vhost.FRONTEND_PAYLOADS)


def _vhost_backend(data: bytes, options: Mapping[str, Any]) -> Decoded:
    return _vhost(_Walk("vhost-user-backend", data), vhost.BackendRequest, vhost.BACKEND_PAYLOADS)


def _vhost(walk: _Walk, requests: type[IntEnum], payloads: Mapping[Any, Codec | None]) -> Decoded:
    """One message after another."""
    while walk.left:
        header = walk.struct(vhost.HEADER, meanings={"request": _enum(requests)})
        if "size" not in header:
            break
        number, flags, size = header["request"], header["flags"], header["size"]
        if flags & vhost.Flag.VERSION_MASK != vhost.Flag.VERSION:
            walk.error(f"version {flags & vhost.Flag.VERSION_MASK} in the header's flags; it is always 1")
        if walk.left < size:
            walk.error(f"offset {walk.at:#x}: the payload is cut short: {walk.left} of {size} bytes")
        end = min(walk.at + size, len(walk.data))
        layout = payloads.get(number)
        if number not in payloads:
            walk.error(f"unknown vhost-user request {number}; its payload is shown as bytes")
        elif flags & vhost.Flag.REPLY and number not in _OWN_REPLIES:
            layout = vhost.U64
        _vhost_payload(walk, number, layout, end)
        if walk.at < end:
            walk.bytes("data", end - walk.at)
    return walk.out


_OWN_REPLIES = {_F.GET_VRING_BASE, _F.GET_CONFIG, _F.GET_INFLIGHT_FD, _F.CREATE_CRYPTO_SESSION}


def _vhost_payload(walk: _Walk, number: int, layout: Codec | None, end: int) -> None:
    size = end - walk.at
    if layout is None or not size:
        return
    if size < layout.size:
        walk.error(f"offset {walk.at:#x}: a payload of {size} bytes where {layout.name} has {layout.size}")
        return
    meanings = {"value": _U64_MEANINGS[number]} if layout is vhost.U64 and number in _U64_MEANINGS else {}
    values = walk.struct(layout, meanings=meanings)
    if layout is vhost.MEM_TABLE:
        there = (end - walk.at) // vhost.REGION.size
        walk.array(vhost.REGION, min(values["count"], there), "region")
        if values["count"] > there:
            walk.error(f"{values['count']} regions announced, {there} there")


def _ta_package(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("ta-package", data)
    head = walk.struct(_TA_HEADER)
    if "sig_size" not in head:
        return walk.end()
    if head["magic"] != package.MAGIC:
        walk.error(f"offset 0x0: the magic is not {package.MAGIC:#x}: no TA package, or not signed")
    digest = walk.bytes("hash", head["hash_size"])
    walk.bytes("signature", head["sig_size"])
    start = walk.at
    walk.struct(_TA_BOOTSTRAP)
    subheader = walk.data[start : walk.at]
    payload = walk.bytes("payload", head["img_size"])
    if digest and len(payload) == head["img_size"]:
        good = sha256(data[: _TA_HEADER.size] + subheader + payload).digest() == digest
        if good:
            next(
                node for node in walk.out.fields if node.name == "hash"
            ).meaning = "fits (the signature is not checked)"
        else:
            walk.error("the hash is not the SHA-256 of header, UUID, version and payload")
    return walk.end()


_TA_HEADER = Codec("TaHeader", package.HEADER)
_TA_BOOTSTRAP = Codec("TaIdentity", package.BOOTSTRAP)


def _descriptors(data: bytes, options: Mapping[str, Any]) -> Decoded:
    walk = _Walk("descriptors", data)
    values = walk.array(split.DESC, -(-walk.left // split.DESC.size), "descriptor")
    for node, one in zip(walk.out.fields, values, strict=True):
        if "next" in one:
            does = "device writes" if one["flags"] & split.DESC_F_WRITE else "device reads"
            if one["flags"] & split.DESC_F_INDIRECT:
                does = "table of descriptors"
            then = f", then {one['next']}" if one["flags"] & split.DESC_F_NEXT else ""
            node.meaning = f"{does}, {one['len']} bytes{then}"
    return walk.end()


@dataclass(frozen=True, slots=True)
class Kind:
    """A format that can be decoded."""

    doc: str
    run: Callable[[bytes, Mapping[str, Any]], Decoded]


KINDS: dict[str, Kind] = {
    "request": Kind("device-readable bytes of a request: header, body, parameters or ranges, inline data", _request),
    "response": Kind("device-writable bytes of a request (with --request-type: its body too)", _response),
    "event": Kind("a buffer of the event queue", _event),
    "config": Kind("the device's configuration space", _config),
    "statement": Kind("an attestation statement (SERVICE_ATTEST)", _statement),
    "vhost-user": Kind("messages on a vhost-user socket, either direction", _vhost_user),
    "vhost-user-backend": Kind("messages on the backend's own channel (SET_BACKEND_REQ_FD)", _vhost_backend),
    "ta-package": Kind("a signed TA", _ta_package),
    "descriptors": Kind("a descriptor table of a split virtqueue, direct or indirect", _descriptors),
}
"""Name of a format → how it is decoded."""


def decode(kind: str, data: bytes, *, request_type: int | None = None) -> Decoded:
    """Decode ``data``, whatever it holds.

    :param kind: one of :data:`KINDS`; KeyError otherwise
    :param request_type: for a response: the type of the request that it answers
    """
    decoded = KINDS[kind].run(bytes(data), {"request_type": request_type})
    if not data and not decoded.errors:  # formats that are a row of things: none of them is not what was meant
        decoded.errors.append("there are no bytes to decode: is the input empty?")
    return decoded


def request_type(text: str) -> int:
    """A request type by name or number. Raises ValueError."""
    try:
        return wire.Request[text.upper().replace("-", "_")]
    except KeyError:
        pass
    try:
        return int(text, 0)
    except ValueError:
        raise ValueError(f"no request type {text!r}; there are {', '.join(wire.Request.__members__)}") from None


# -- input


_XXD = re.compile(r"^\s*[0-9a-fA-F]{4,16}:\s(?P<hex>.*)$")
_HEXDUMP = re.compile(r"^[0-9a-fA-F]{7,16}  (?P<hex>(?:[0-9a-fA-F]{2} {0,2}){1,16})\s*(?:\|.*)?$")


def parse_hex(text: str) -> bytes:
    """The bytes that ``text`` writes in hex: plain digits, with spaces, commas, line ends, ``0x`` or ``\\x`` before
    each byte, C arrays, the output of xxd or of ``hexdump -C``; ``#`` starts a comment. Digits stand in the order of
    the bytes (``0x1234`` is 12 34).

    :raises HexError: with the line that is no such thing
    """
    digits: list[str] = []
    dump = False
    for number, line in enumerate(text.splitlines(), 1):
        found = _XXD.match(line)
        if found:
            line = found["hex"].split("  ")[0]
        else:
            found = _HEXDUMP.match(line)
            if found:
                dump, line = True, found["hex"]
            elif dump and re.fullmatch(r"\s*[0-9a-fA-F]{7,16}\s*", line):
                continue  # hexdump's last line: the size
        if line.strip() == "*":
            raise HexError(f"line {number}: lines were left out of this dump; make it with -v")
        for token in re.split(r"[\s,;:\"'{}\[\]()]+", line.partition("#")[0].replace("\\x", " ")):
            prefixed = token[:2] in ("0x", "0X")
            part = token[2:] if prefixed else token
            if not token:
                continue
            if not re.fullmatch(r"[0-9a-fA-F]+", part):
                raise HexError(f"line {number}: {token[:20]!r} is not hex")
            digits.append("0" + part if prefixed and len(part) % 2 else part)
    joined = "".join(digits)
    if len(joined) % 2:
        raise HexError(f"{len(joined)} hex digits; two make a byte, so one is missing or too many")
    return bytes.fromhex(joined)


# -- output

_SHOWN_BYTES = 32


def _show(value: Value, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, bytes):
        text = value[:_SHOWN_BYTES].hex(" ", 4)
        more = f" … ({len(value)} bytes)" if len(value) > _SHOWN_BYTES else ""
        return text + more
    if isinstance(value, tuple):
        return "[" + ", ".join(hex(number) if number > 9 else str(number) for number in value) + "]"
    if 0 <= value < 10 or _DECIMAL.match(name):
        return str(value)
    return f"{value:#010x}" if name in {"type", "attr", "ret"} else hex(value)


def _lines(node: Node, depth: int) -> list[str]:
    indent = "  " * depth
    if node.type:
        shown = _show(node.value, node.name)
        preview = _preview(node)
        meaning = "  ".join(text for text in (node.meaning, preview) if text)
        line = f"{indent}{node.offset:#06x}  {node.name:<17} {node.type:<9} {shown}" + (
            f"  {meaning}" if meaning else ""
        )
        return [line.rstrip()]
    lines = [f"{indent}{node.name}" + (f": {node.meaning}" if node.meaning else "")]
    for child in node.fields:
        lines += _lines(child, depth + 1)
    return lines


def _preview(node: Node) -> str:
    """Text in bytes that have no better meaning."""
    value = node.value
    if not isinstance(value, bytes) or node.meaning or len(value) < 4:
        return ""
    head = value[:_SHOWN_BYTES].rstrip(b"\0")
    if not head or not all(32 <= byte < 127 or byte in b"\t\r\n" for byte in head):
        return ""
    return json.dumps(head.decode("ascii"))


def render_text(decoded: Decoded) -> str:
    """For people: one line for each field, errors at the end."""
    lines = [f"{decoded.kind}, {decoded.size} bytes"]
    for node in decoded.fields:
        lines += _lines(node, 1)
    lines += [f"  error: {error}" for error in decoded.errors]
    return "\n".join(lines)


def render_json(decoded: Decoded) -> dict[str, Any]:
    """For programs: plain values; bytes as hex."""
    return {
        "kind": decoded.kind,
        "size": decoded.size,
        "fields": [_json(node) for node in decoded.fields],
        "errors": list(decoded.errors),
    }


def _json(node: Node) -> dict[str, Any]:
    out: dict[str, Any] = {"name": node.name, "offset": node.offset, "size": node.size}
    if node.type:
        value = node.value
        out["type"] = node.type
        out["value"] = value.hex() if isinstance(value, bytes) else list(value) if isinstance(value, tuple) else value
    if node.meaning:
        out["meaning"] = node.meaning
    if node.fields:
        out["fields"] = [_json(child) for child in node.fields]
    return out
