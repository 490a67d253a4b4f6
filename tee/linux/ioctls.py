"""The system calls of a Linux TEE device (``/dev/teeN``, ``/dev/teeprivN``): numbers and layouts.

Source: Linux include/uapi/linux/tee.h. All integers are in the machine's byte order, which is little-endian wherever
this runs. Nothing here makes a system call: that is ``tee.io.linux``.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from construct import Array, Bytes, Int32sl, Int32ul, Int64sl, Int64ul, Struct, this

MAGIC = 0xA4
"""The type of all ioctl numbers."""

MAX_ARG_SIZE = 1024
"""Most bytes of an argument with its parameters (TEE_MAX_ARG_SIZE)."""

MEMREF_NULL = 0xFFFF_FFFF_FFFF_FFFF
"""``c`` of a memory reference that refers to no memory."""

ATTR_META = 0x100
ATTR_TYPE_MASK = 0xFF
"""Parts of a parameter's attribute."""

IMPL_OPTEE = 1
"""The implementation id that OP-TEE's client library and supplicant look for."""

GEN_CAP_OBJREF = 1 << 4
"""The TEE has objects (OBJECT_INVOKE)."""


class ParamType(IntEnum):
    """Types of parameters. Those from UBUF_IN on are for OBJECT_INVOKE: memory of the caller, and objects."""

    NONE = 0
    VALUE_IN = 1
    VALUE_OUT = 2
    VALUE_INOUT = 3
    MEMREF_IN = 5
    MEMREF_OUT = 6
    MEMREF_INOUT = 7
    UBUF_IN = 8
    UBUF_OUT = 9
    UBUF_INOUT = 10
    OBJREF_IN = 11
    OBJREF_OUT = 12
    OBJREF_INOUT = 13


Version = Struct("impl_id" / Int32ul, "impl_caps" / Int32ul, "gen_caps" / Int32ul)
ShmAlloc = Struct("size" / Int64ul, "flags" / Int32ul, "id" / Int32sl)
ShmRegister = Struct("addr" / Int64ul, "length" / Int64ul, "flags" / Int32ul, "id" / Int32sl)
ShmRegisterFd = Struct("fd" / Int64sl, "size" / Int64ul, "flags" / Int32ul, "id" / Int32sl)
Buffer = Struct("buf_ptr" / Int64ul, "buf_len" / Int64ul)
Param = Struct("attr" / Int64ul, "a" / Int64ul, "b" / Int64ul, "c" / Int64ul)
OpenSession = Struct(
    "uuid" / Bytes(16),
    "clnt_uuid" / Bytes(16),
    "clnt_login" / Int32ul,
    "cancel_id" / Int32ul,
    "session" / Int32ul,
    "ret" / Int32ul,
    "ret_origin" / Int32ul,
    "num_params" / Int32ul,
    "params" / Array(this.num_params, Param),
)
Invoke = Struct(
    "func" / Int32ul,
    "session" / Int32ul,
    "cancel_id" / Int32ul,
    "ret" / Int32ul,
    "ret_origin" / Int32ul,
    "num_params" / Int32ul,
    "params" / Array(this.num_params, Param),
)
Cancel = Struct("cancel_id" / Int32ul, "session" / Int32ul)
CloseSession = Struct("session" / Int32ul)
ObjectInvoke = Struct(
    "id" / Int64ul,
    "op" / Int32ul,
    "ret" / Int32ul,
    "num_params" / Int32ul,
    "pad" / Int32ul,
    "params" / Array(this.num_params, Param),
)
SupplRecv = Struct("func" / Int32ul, "num_params" / Int32ul, "params" / Array(this.num_params, Param))
SupplSend = Struct("ret" / Int32ul, "num_params" / Int32ul, "params" / Array(this.num_params, Param))

_READ, _WRITE = 2, 1


def _number(direction: int, nr: int, layout: Struct[Any, Any]) -> int:
    return direction << 30 | int(layout.sizeof()) << 16 | MAGIC << 8 | nr


class Ioctl(IntEnum):
    """Ioctl numbers. Those from OPEN_SESSION to INVOKE, OBJECT_INVOKE and the supplicant's take a :data:`Buffer` that
    names the argument."""

    VERSION = _number(_READ, 0, Version)
    SHM_ALLOC = _number(_READ | _WRITE, 1, ShmAlloc)
    OPEN_SESSION = _number(_READ, 2, Buffer)
    INVOKE = _number(_READ, 3, Buffer)
    CANCEL = _number(_READ, 4, Cancel)
    CLOSE_SESSION = _number(_READ, 5, CloseSession)
    SUPPL_RECV = _number(_READ, 6, Buffer)
    SUPPL_SEND = _number(_READ, 7, Buffer)
    SHM_REGISTER_FD = _number(_READ | _WRITE, 8, ShmRegisterFd)
    SHM_REGISTER = _number(_READ | _WRITE, 9, ShmRegister)
    OBJECT_INVOKE = _number(_READ, 10, Buffer)


_HEAD = sum(int(field.sizeof()) for field in OpenSession.subcons if field.name != "params")

MOST_PARAMS = (MAX_ARG_SIZE - _HEAD) // int(Param.sizeof())
"""Parameters that any call can have: an OPEN_SESSION has the least room for them."""
