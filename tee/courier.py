"""What a backend and the host's supplicant broker say to each other, over a stream socket.

The backend tells which calls it has under way on the TEE (BEGINS before the call enters it, ENDS afterwards), so that
the broker can tell whose an RPC may be. The broker asks (ASK), naming a call of that backend's; the backend answers
(ANSWER), unless the broker has stopped waiting (WITHDRAW). Neither trusts the other: whatever does not fit is a
:class:`CourierError`, and ends the connection.

A frame is a u32 length of what follows (at most :data:`MAX_FRAME`), a u32 kind, and that kind's fields; integers are
little-endian. Memory crosses by its content: an ASK has that of IN and INOUT references, an ANSWER that of OUT and
INOUT ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from enum import IntEnum
from typing import Any
from uuid import UUID

from construct import (
    Array,
    Bytes,
    Const,
    ConstructError,
    Int32ul,
    Int64ul,
    PascalString,
    Struct,
    Terminated,
    this,
)

VERSION = 1

#: Bytes of content in all parameters of a message: a TA of the largest size that a supplicant gives.
MAX_CONTENT = 16 << 20

#: Bytes of a frame, without its length: content and what goes around it.
MAX_FRAME = MAX_CONTENT + (4 << 10)

#: Parameters of a message.
MAX_PARAMS = 8

#: Bytes of a VM's name.
MAX_NAME = 64

NULL = 1
"""Flag of a reference to no memory."""


NO_UUID = UUID(int=0)


class CourierError(Exception):
    """The other side sent what makes no sense."""


class CallKind(IntEnum):
    """What a call under way does."""

    OTHER = 0
    OPEN_SESSION = 1
    INVOKE = 2


@dataclass(slots=True)
class WireParam:
    """A parameter. ``kind`` as in Linux's uapi: 0 none, 1 to 3 value IN, OUT, INOUT with ``a``, ``b``, ``c``; 5 to 7
    memory reference IN, OUT, INOUT of ``a`` bytes, with ``flags`` NULL or 0, and its ``content``."""

    kind: int = 0
    flags: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    content: bytes = b""


@dataclass(slots=True)
class Hello:
    """The first message of either side."""

    version: int = VERSION


@dataclass(slots=True)
class Begins:
    """The backend starts a call. ``call`` names it until its ENDS; ``uuid`` is that of the TA, nil where there is
    none; ``vm`` says to people whose it is."""

    call: int
    kind: int = CallKind.OTHER
    uuid: UUID = NO_UUID
    vm: str = ""


@dataclass(slots=True)
class Ends:
    """The call has ended."""

    call: int


@dataclass(slots=True)
class Ask:
    """An RPC that may be of ``call``. ``ask`` names it until its answer."""

    ask: int
    call: int
    command: int
    params: list[WireParam] = field(default_factory=list)


@dataclass(slots=True)
class Answer:
    """Parameters are as many and of the same kinds as asked, or none where ``code`` is an error."""

    ask: int
    code: int
    params: list[WireParam] = field(default_factory=list)


@dataclass(slots=True)
class Withdraw:
    """Nobody waits for that answer any more."""

    ask: int


Message = Hello | Begins | Ends | Ask | Answer | Withdraw

_PARAM = Struct(
    "kind" / Int32ul,
    "flags" / Int32ul,
    "a" / Int64ul,
    "b" / Int64ul,
    "c" / Int64ul,
    "length" / Int32ul,
    "content" / Bytes(this.length),
)
_PARAMS = ("count" / Int32ul, "params" / Array(this.count, _PARAM))

LAYOUTS: dict[type[Message], tuple[int, Struct[Any, Any]]] = {
    Hello: (1, Struct("magic" / Const(b"vtee-brk"), "version" / Int32ul, Terminated)),
    Begins: (
        2,
        Struct(
            "call" / Int64ul, "kind" / Int32ul, "uuid" / Bytes(16), "vm" / PascalString(Int32ul, "utf8"), Terminated
        ),
    ),
    Ends: (3, Struct("call" / Int64ul, Terminated)),
    Ask: (4, Struct("ask" / Int64ul, "call" / Int64ul, "command" / Int32ul, *_PARAMS, Terminated)),
    Answer: (5, Struct("ask" / Int64ul, "code" / Int32ul, *_PARAMS, Terminated)),
    Withdraw: (6, Struct("ask" / Int64ul, Terminated)),
}
"""Message → its kind and layout."""

_KINDS = {kind: (message, layout) for message, (kind, layout) in LAYOUTS.items()}
_PARAM_KINDS = frozenset({0, 1, 2, 3, 5, 6, 7})
_LENGTH = Int32ul.sizeof()


def pack(message: Message) -> bytes:
    """The frame of a message. Raises CourierError for one that is too large."""
    kind, layout = LAYOUTS[type(message)]
    values = {name.name: getattr(message, name.name) for name in fields(message)}
    if isinstance(message, Begins):
        values["uuid"] = message.uuid.bytes
    elif isinstance(message, Ask | Answer):
        values["count"] = len(message.params)
        values["params"] = [
            {**{name.name: getattr(param, name.name) for name in fields(param)}, "length": len(param.content)}
            for param in message.params
        ]
    try:
        body = Int32ul.build(kind) + layout.build(values)
    except ConstructError as error:
        raise CourierError(f"a {type(message).__name__} that cannot be sent: {error}") from None
    if len(body) > MAX_FRAME:
        raise CourierError(f"a frame of {len(body)} bytes")
    return bytes(Int32ul.build(len(body)) + body)


def unpack(body: bytes) -> Message:
    """The message of a frame without its length. Raises CourierError."""
    if len(body) < _LENGTH:
        raise CourierError(f"a frame of {len(body)} bytes")
    found = _KINDS.get(Int32ul.parse(body[:_LENGTH]))
    if found is None:
        raise CourierError(f"a message of kind {Int32ul.parse(body[:_LENGTH])}")
    message, layout = found
    _check_count(message, body)
    try:
        values = layout.parse(body[_LENGTH:])
    except (ConstructError, UnicodeDecodeError) as error:
        raise CourierError(f"a {message.__name__} that makes no sense: {type(error).__name__}") from None
    return _message(message, values)


def _check_count(message: type[Message], body: bytes) -> None:
    """Before anything is made of as many parameters as a frame says it has."""
    if message is Ask or message is Answer:
        at = _LENGTH + (20 if message is Ask else 12)
        count = Int32ul.parse(body[at : at + 4]) if len(body) >= at + 4 else 0
        if count > MAX_PARAMS:
            raise CourierError(f"{count} parameters")


def _message(message: type[Message], values: Any) -> Message:
    if message is Begins:
        if len(values.vm.encode()) > MAX_NAME or values.kind not in list(CallKind):
            raise CourierError(f"a call of kind {values.kind} of a VM with a name of {len(values.vm)} characters")
        return Begins(values.call, values.kind, UUID(bytes=bytes(values.uuid)), values.vm)
    if message is Ask:
        return Ask(values.ask, values.call, values.command, [_param(one) for one in values.params])
    if message is Answer:
        return Answer(values.ask, values.code, [_param(one) for one in values.params])
    return message(*(values[name.name] for name in fields(message)))


def _param(values: Any) -> WireParam:
    memory = values.kind >= 5
    if values.kind not in _PARAM_KINDS or values.flags & ~NULL or (values.flags and not memory):
        raise CourierError(f"a parameter of kind {values.kind} with flags {values.flags:#x}")
    if values.length and not memory:
        raise CourierError("a value with content")
    return WireParam(values.kind, values.flags, values.a, values.b, values.c, bytes(values.content))


class Reader:
    """Makes messages of a stream."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes | bytearray) -> Iterator[Message]:
        """The messages that are whole with ``data``. Raises CourierError; nothing comes after that."""
        self._data += data
        while len(self._data) >= _LENGTH:
            length = Int32ul.parse(bytes(self._data[:_LENGTH]))
            if not _LENGTH <= length <= MAX_FRAME:
                raise CourierError(f"a frame of {length} bytes")
            if len(self._data) < _LENGTH + length:
                return
            body = bytes(self._data[_LENGTH : _LENGTH + length])
            del self._data[: _LENGTH + length]
            yield unpack(body)
