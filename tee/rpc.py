"""Calls out of the TEE: the commands of OP-TEE's RPC and what carries them.

Numbers are OP-TEE's (core/include/optee_rpc_cmd.h), so that unmodified supplicants serve them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from uuid import UUID

from tee.calls import Call
from tee.params import Param
from tee.results import Origin, Result


class RpcCommand(IntEnum):
    """What a TEE asks of the normal world."""

    LOAD_TA = 0
    RPMB = 1
    FS = 2
    GET_TIME = 3
    NOTIFICATION = 4
    SUSPEND = 5
    SHM_ALLOC = 6
    SHM_FREE = 7
    GPROF = 9
    SOCKET = 10
    FTRACE = 11
    PLUGIN = 12
    BENCH_REG = 20
    I2C_TRANSFER = 21
    RPMB_PROBE_RESET = 22
    RPMB_PROBE_NEXT = 23
    RPMB_FRAMES = 24
    OCALL = 0x1000
    """Ours: a call to the client that made the call; OP-TEE's numbers are below it."""


GRPC_UUID = UUID("ad0fd0ae-09e1-464b-98ed-0607ec9ebd8b")
"""The generic RPC pseudo-TA; TAs open a session with it and invoke it, and their client gets an OCALL."""

GRPC_EXECUTE = 0x1
"""Its one command, in the upper 4 bits of the command id; the lower 28 bits are the function for the client."""


class ShmType(IntEnum):
    """Whose memory SHM_ALLOC asks for."""

    APPLICATION = 0
    KERNEL = 1
    GLOBAL = 2


class FsCommand(IntEnum):
    """What FS asks for: ``a`` of its parameter 0, a value IN. File names are C strings, with their final zero.

    =========  =====================================  ===================================  =============================
    command    parameter 0                            parameter 1                          parameter 2
    =========  =====================================  ===================================  =============================
    OPEN       a                                      memory IN: name                      value OUT: a = file
    CREATE     a (an existing file is emptied)        memory IN: name                      value OUT: a = file
    CLOSE      a, b = file                            –                                    –
    READ       a, b = file, c = offset                memory OUT: content, less at its end –
    WRITE      a, b = file, c = offset                memory IN: content                   –
    TRUNCATE   a, b = file, c = length                –                                    –
    REMOVE     a                                      memory IN: name                      –
    RENAME     a, b ≠ 0: an existing one is replaced  memory IN: old name                  memory IN: new name
    OPENDIR    a                                      memory IN: name of a folder          value OUT: a = handle
    CLOSEDIR   a, b = handle                          –                                    –
    READDIR    a, b = handle                          memory OUT: a name                   –
    =========  =====================================  ===================================  =============================

    READDIR ends with ITEM_NOT_FOUND; so does OPENDIR of an empty folder.
    """

    OPEN = 0
    CREATE = 1
    CLOSE = 2
    READ = 3
    WRITE = 4
    TRUNCATE = 5
    REMOVE = 6
    RENAME = 7
    OPENDIR = 8
    CLOSEDIR = 9
    READDIR = 10


def describe_command(command: int) -> str:
    """The name of an RPC command, or its number."""
    try:
        return RpcCommand(command).name
    except ValueError:
        return f"RPC {command}"


@dataclass(slots=True, eq=False)
class Rpc:
    """One call out of the TEE; itself the event that announces it.

    ``call`` is the call that caused it, or None where the TEE does not say. ``params`` are as OP-TEE defines them for
    the command, with one difference: where OP-TEE passes memory by a cookie (SHM_ALLOC's answer, SHM_FREE's
    argument), a :class:`~tee.params.MemRef` stands. ``to_client``: it is for the client whose call ``call`` is, not for
    the supplicant (OCALL; SHM_ALLOC and SHM_FREE of memory for one).

    ====================  ============================================================  ================================
    command               params of the request                                         params of the reply
    ====================  ============================================================  ================================
    LOAD_TA               [Value IN: UUID's octets as little-endian a, b]               [same,
                          [MemRef OUT: memory, or NULL to ask for the size]              MemRef OUT: size of the TA]
    SHM_ALLOC             [Value IN: a = ShmType, b = bytes, c = alignment]             [MemRef INOUT: the memory]
    SHM_FREE              [Value IN: a = ShmType], [MemRef INOUT: the memory]           []
    FS                    see :class:`FsCommand`                                        the same, OUT ones filled in
    OCALL                 [META Value INOUT: a = function, 32 bits], then the TA's      the same, outputs filled in
    ====================  ============================================================  ================================
    """

    command: int
    params: list[Param]
    call: Call | None = None
    to_client: bool = False


@dataclass(slots=True)
class RpcReply:
    """The answer: ``code`` is a :class:`~tee.results.Result`; ``params`` as the command defines them. ``origin`` of an
    OCALL's is API where the client's handler ran and ``code`` is its own, else COMMS."""

    code: int = Result.SUCCESS
    params: list[Param] = field(default_factory=list)
    origin: int = Origin.COMMS
