"""What OP-TEE's two sides say to each other over FF-A: function numbers, and the messages in shared memory.

Numbers and layouts are those of OP-TEE's ``optee_msg.h``, ``optee_rpc_cmd.h`` and ``optee_ffa.h``. Parsing reads
private copies and nothing beyond them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from uuid import UUID

from construct import Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Codec, Ignored
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result
from tee.rpc import RpcCommand

OPTEE_UUID = UUID("486178e0-e7f8-11e3-bc5e-0002a5d5c51b")
"""The partition's UUID, by which FFA_PARTITION_INFO_GET finds it."""

API_VERSION = (1, 0)


class Service(IntEnum):
    """OPTEE_FFA_*: w3 of a direct request. The answer's w3 is a result code but for the two versions."""

    GET_API_VERSION = 0  #: w3 major, w4 minor
    GET_OS_VERSION = 1  #: w3 major, w4 minor, w5 build
    EXCHANGE_CAPABILITIES = 2  #: w4 parameters of the RPC argument, w5 capabilities, w6 highest notification
    UNREGISTER_SHM = 3  #: handle in w4 and w5
    ENABLE_ASYNC_NOTIF = 5  #: number of the notification in w4
    CALL_WITH_ARG = 0x8000_0000  #: handle in w4 and w5, offset in w6
    RESUME = 0x8000_0001  #: what w7 was, in w7


class Yield(IntEnum):
    """How a yielding call came back: w4."""

    DONE = 0
    RPC_CMD = 1
    INTERRUPT = 2


class Capability(IntEnum):
    """What the partition can do: w5 of EXCHANGE_CAPABILITIES."""

    ARG_OFFSET = 1 << 0
    ASYNC_NOTIF = 1 << 1
    RPMB_PROBE = 1 << 2
    PROTMEM = 1 << 3


class Command(IntEnum):
    """OPTEE_MSG_CMD_*: ``cmd`` of a message."""

    OPEN_SESSION = 0
    INVOKE_COMMAND = 1
    CLOSE_SESSION = 2
    CANCEL = 3
    REGISTER_SHM = 4  #: memory that another VM has shared; OP-TEE has this command, but not over FF-A
    DO_BOTTOM_HALF = 6
    STOP_ASYNC_NOTIF = 7


class ClientCommand(IntEnum):
    """RPC commands of ours, for the client whose call the message is; OP-TEE's numbers are below them."""

    OCALL = 0x1000
    SHM_ALLOC = 0x1001
    SHM_FREE = 0x1002


CANCEL_RESUME = 1
"""``func`` of an answered CANCEL, of ours: the call waits for an answer that OP-TEE wants no more; resume it."""

CLIENT_COMMANDS: dict[int, ClientCommand] = {
    RpcCommand.OCALL: ClientCommand.OCALL,
    RpcCommand.SHM_ALLOC: ClientCommand.SHM_ALLOC,
    RpcCommand.SHM_FREE: ClientCommand.SHM_FREE,
}
"""How an RPC to the client is called in a message."""


class Attr(IntEnum):
    """What is in a parameter's ``attr`` beside its type."""

    TYPE_MASK = 0xFF
    META = 1 << 8


FMEM = 4
"""Type of a value parameter: its Direction. Of a memory parameter over FF-A: this and its Direction."""

NULL_HANDLE = 0xFFFF_FFFF_FFFF_FFFF
PAGE_SIZE = 4096
MAX_NOTIFICATION = 63
NOTIFY_WAIT, NOTIFY_SEND = 0, 1
"""``a`` of an RPC NOTIFICATION; ``b`` is the value."""

TEE_PARAMS = 4
"""Parameters that a TA can be given."""
META_PARAMS = 2
REGISTER_READ_ONLY = 1 << 0
"""Flag of REGISTER_SHM, whose two meta values are: handle, tag, VM that has shared it; bytes, flags."""
"""Parameters before them in OPEN_SESSION: the TA's UUID; the client's, with its login."""

MessageArg = Struct(
    "cmd" / Int32ul * "command",
    "func" / Int32ul * "the TA's function",
    "session" / Int32ul * "session; given by OPEN_SESSION",
    "cancel_id" / Int32ul * "what CANCEL names the call by",
    Ignored(4),
    "ret" / Int32ul * "result",
    "ret_origin" / Int32ul * "origin of the result",
    "num_params" / Int32ul * "parameters, which follow",
)
ValueParam = Struct(
    "attr" / Int64ul * "type 0 to 3 in bits 0-7, META in bit 8",
    "a" / Int64ul * "first word",
    "b" / Int64ul * "second word",
    "c" / Int64ul * "third word",
)
FmemParam = Struct(
    "attr" / Int64ul * "type 5 to 7 in bits 0-7, META in bit 8",
    "offs_low" / Int32ul * "offset into the memory, low 32 bits",
    "offs_high" / Int16ul * "high 16 bits",
    "internal_offs" / Int16ul * "where the memory starts in its first page",
    "size" / Int64ul * "bytes",
    "global_id" / Int64ul * "the FF-A handle; all ones for the null reference",
)
message_arg = Codec("MessageArg", MessageArg)
value_param = Codec("ValueParam", ValueParam)
fmem_param = Codec("FmemParam", FmemParam)
CODECS = (message_arg, value_param, fmem_param)
_pack_message = message_arg.raw.pack
_pack_value, _unpack_value = value_param.raw.pack, value_param.raw.unpack_from
_pack_fmem, _unpack_fmem = fmem_param.raw.pack, fmem_param.raw.unpack_from

PARAM_SIZE = value_param.size


class MessageError(Exception):
    """A message that makes no sense: ``code`` is the result that goes with it, the text says why, for logs."""

    def __init__(self, code: int, why: str) -> None:
        super().__init__(why)
        self.code = code


@dataclass(slots=True)
class Message:
    """One ``optee_msg_arg`` without its parameters."""

    cmd: int
    func: int = 0
    session: int = 0
    cancel_id: int = 0
    ret: int = 0
    ret_origin: int = 0
    num_params: int = 0

    @classmethod
    def unpack(cls, data: bytes) -> Message:
        """From exactly the bytes of a header."""
        return cls(*message_arg.raw.unpack(data))

    def pack(self) -> bytes:
        """Its bytes."""
        return _pack_message(
            self.cmd, self.func, self.session, self.cancel_id, self.ret, self.ret_origin, self.num_params
        )

    def end(self, code: int, origin: int, session: int = 0) -> None:
        """Puts the outcome in; ``session`` is one that was opened."""
        self.ret, self.ret_origin = code & 0xFFFF_FFFF, origin & 0xFFFF_FFFF
        self.session = session or self.session


HEADER_SIZE = message_arg.size


def message_size(params: int) -> int:
    """Bytes of a message with so many parameters."""
    return HEADER_SIZE + params * PARAM_SIZE


@dataclass(frozen=True, slots=True)
class Fmem:
    """A memory parameter as it stands in a message. ``offset`` counts from the start of the handle's first page."""

    direction: Direction
    offset: int
    size: int
    handle: int
    meta: bool = False

    @property
    def null(self) -> bool:
        """Whether it is the null reference."""
        return self.handle == NULL_HANDLE


Wire = Value | Fmem | Nothing
"""A parameter as it stands in a message."""


def unpack_params(data: bytes) -> list[Wire]:
    """All parameters in ``data``. Raises MessageError(BAD_PARAMETERS): a type that FF-A does not have, unknown bits."""
    return [_unpack(data, at) for at in range(0, len(data), PARAM_SIZE)]


def _unpack(data: bytes, at: int) -> Wire:
    attr, a, b, c = _unpack_value(data, at)
    kind, meta = attr & _TYPE_MASK, bool(attr & _META)
    if attr & ~(_TYPE_MASK | _META):
        raise MessageError(Result.BAD_PARAMETERS, f"a parameter with attribute {attr:#x}")
    if not kind:
        return Nothing(meta)
    if kind in _DIRECTIONS:
        return Value(_DIRECTIONS[kind], a, b, c, meta)
    if kind - FMEM in _DIRECTIONS:
        _, low, high, internal, size, handle = _unpack_fmem(data, at)
        if handle == NULL_HANDLE:
            return Fmem(_DIRECTIONS[kind - FMEM], 0, size, NULL_HANDLE, meta)
        if internal >= PAGE_SIZE:
            raise MessageError(Result.BAD_PARAMETERS, "memory that starts beyond its first page")
        return Fmem(_DIRECTIONS[kind - FMEM], (low | high << 32) + internal, size, handle, meta)
    raise MessageError(Result.BAD_PARAMETERS, f"a parameter of type {kind}")


_DIRECTIONS = {int(direction): direction for direction in Direction}
_TYPE_MASK, _META = int(Attr.TYPE_MASK), int(Attr.META)


def pack_params(params: Sequence[Wire]) -> bytes:
    """Their bytes. Raises MessageError(BAD_PARAMETERS): a number does not fit its field."""
    return b"".join(_pack(param) for param in params)


def _pack(param: Wire) -> bytes:
    attr = _META if param.meta else 0
    match param:
        case Value():
            _check_fits(64, param.a, param.b, param.c)
            return _pack_value(attr | param.direction, param.a, param.b, param.c)
        case Fmem():
            _check_fits(48, param.offset)
            _check_fits(64, param.size, param.handle)
            kind, low, high = attr | FMEM | param.direction, param.offset & 0xFFFF_FFFF, param.offset >> 32
            return _pack_fmem(kind, low, high, 0, param.size, param.handle)
        case Nothing():
            return _pack_value(attr, 0, 0, 0)


def _check_fits(bits: int, *numbers: int) -> None:
    if any(not 0 <= number < 1 << bits for number in numbers):
        raise MessageError(Result.BAD_PARAMETERS, f"a parameter that does not fit {bits} bits")


# -- to and from the parameters of tee.params


def to_param(wire: Wire, memory_of: Callable[[int], Memory]) -> Param:
    """What a parameter of a message means. ``memory_of`` finds a handle's memory, or raises MessageError.

    Raises MessageError: BAD_PARAMETERS, the reference is not inside the memory, or would write what is read-only.
    """
    if not isinstance(wire, Fmem):
        return wire
    if wire.null:
        return MemRef(wire.direction, None, 0, wire.size, wire.meta)
    memory = memory_of(wire.handle)
    if wire.offset + wire.size > memory.size:
        raise MessageError(Result.BAD_PARAMETERS, f"{wire.size} bytes at {wire.offset} of {memory.size}")
    if memory.read_only and wire.direction.is_output:
        raise MessageError(Result.BAD_PARAMETERS, "output into read-only memory")
    return MemRef(wire.direction, memory, wire.offset, wire.size, wire.meta)


def to_wire(param: Param, handle_of: Callable[[Memory], int]) -> Wire:
    """How a parameter stands in a message. ``handle_of`` gives a memory's handle, or raises MessageError."""
    if not isinstance(param, MemRef):
        return param
    if param.memory is None:
        return Fmem(param.direction, 0, param.size, NULL_HANDLE, param.meta)
    return Fmem(param.direction, param.offset, param.size, handle_of(param.memory), param.meta)


def take_outputs(asked: Sequence[Param], answer: Sequence[Wire], code: int) -> list[Param]:
    """The parameters of a question with the outputs of its answer in them; what is no output is not looked at.

    Raises MessageError(COMMUNICATION): the answer has other types, or says that more was written than there is room.
    """
    if len(asked) != len(answer):
        raise MessageError(Result.COMMUNICATION, f"{len(answer)} parameters in answer to {len(asked)}")
    return [_take(param, given, code) for param, given in zip(asked, answer, strict=True)]


def _take(asked: Param, given: Wire, code: int) -> Param:
    match asked, given:
        case Value(), Value() if asked.direction is given.direction:
            if asked.direction.is_output:
                return Value(asked.direction, given.a, given.b, given.c, asked.meta)
            return asked
        case MemRef(), Fmem() if asked.direction is given.direction:
            if not asked.direction.is_output:
                return asked
            if given.size > asked.size and asked.memory is not None and code != Result.SHORT_BUFFER:
                raise MessageError(Result.COMMUNICATION, f"{given.size} bytes in answer to {asked.size}")
            return MemRef(asked.direction, asked.memory, asked.offset, given.size, asked.meta)
        case Nothing(), Nothing():
            return asked
    raise MessageError(Result.COMMUNICATION, "an answer changes a parameter's type")


def uuid_words(uuid: UUID) -> tuple[int, int]:
    """A UUID's octets as the words a and b of a value."""
    return int.from_bytes(uuid.bytes[:8], "little"), int.from_bytes(uuid.bytes[8:], "little")


def uuid_of(value: Value) -> UUID:
    """The UUID whose octets are the words a and b."""
    return UUID(bytes=value.a.to_bytes(8, "little") + value.b.to_bytes(8, "little"))
