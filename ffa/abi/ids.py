"""Numbers of FF-A: functions, error codes, versions, endpoint ids, memory handles, flags."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

PAGE_SIZE = 4096
"""Bytes of an FF-A page, whatever the translation granule is."""

VERSION_1_0, VERSION_1_1, VERSION_1_2 = 0x10000, 0x10001, 0x10002
VERSIONS = (VERSION_1_0, VERSION_1_1, VERSION_1_2)


class Call(IntEnum):
    """Functions by the low byte of their ids; the ids of both calling conventions are in ``BY_FID``."""

    ERROR = 0x60
    SUCCESS = 0x61
    INTERRUPT = 0x62
    VERSION = 0x63
    FEATURES = 0x64
    RX_RELEASE = 0x65
    RXTX_MAP = 0x66
    RXTX_UNMAP = 0x67
    PARTITION_INFO_GET = 0x68
    ID_GET = 0x69
    MSG_POLL = 0x6A
    MSG_WAIT = 0x6B
    YIELD = 0x6C
    RUN = 0x6D
    MSG_SEND = 0x6E
    MSG_SEND_DIRECT_REQ = 0x6F
    MSG_SEND_DIRECT_RESP = 0x70
    MEM_DONATE = 0x71
    MEM_LEND = 0x72
    MEM_SHARE = 0x73
    MEM_RETRIEVE_REQ = 0x74
    MEM_RETRIEVE_RESP = 0x75
    MEM_RELINQUISH = 0x76
    MEM_RECLAIM = 0x77
    MEM_OP_PAUSE = 0x78
    MEM_OP_RESUME = 0x79
    MEM_FRAG_RX = 0x7A
    MEM_FRAG_TX = 0x7B
    NORMAL_WORLD_RESUME = 0x7C
    NOTIFICATION_BITMAP_CREATE = 0x7D
    NOTIFICATION_BITMAP_DESTROY = 0x7E
    NOTIFICATION_BIND = 0x7F
    NOTIFICATION_UNBIND = 0x80
    NOTIFICATION_SET = 0x81
    NOTIFICATION_GET = 0x82
    NOTIFICATION_INFO_GET = 0x83
    RX_ACQUIRE = 0x84
    SPM_ID_GET = 0x85
    MSG_SEND2 = 0x86
    SECONDARY_EP_REGISTER = 0x87
    MEM_PERM_GET = 0x88
    MEM_PERM_SET = 0x89
    CONSOLE_LOG = 0x8A
    PARTITION_INFO_GET_REGS = 0x8B
    EL3_INTR_HANDLE = 0x8C
    MSG_SEND_DIRECT_REQ2 = 0x8D
    MSG_SEND_DIRECT_RESP2 = 0x8E


@dataclass(frozen=True, slots=True)
class Function:
    """One function: its forms, and the versions that have it."""

    call: Call
    smc32: bool = True
    smc64: bool = False
    since: int = VERSION_1_0
    until: int | None = None  #: first version without it

    def exists(self, version: int, smc64: bool) -> bool:
        """Whether a caller of ``version`` may use it in this calling convention."""
        form = self.smc64 if smc64 else self.smc32
        return form and self.since <= version and (self.until is None or version < self.until)


_C, _V10, _V11, _V12 = Call, VERSION_1_0, VERSION_1_1, VERSION_1_2

FUNCTIONS: dict[Call, Function] = {
    call: Function(call, form != "64", form != "32", since, until)
    for call, form, since, until in (
        (_C.ERROR, "32", _V10, None),
        (_C.SUCCESS, "both", _V10, None),
        (_C.INTERRUPT, "32", _V10, None),
        (_C.VERSION, "32", _V10, None),
        (_C.FEATURES, "32", _V10, None),
        (_C.RX_RELEASE, "32", _V10, None),
        (_C.RXTX_MAP, "both", _V10, None),
        (_C.RXTX_UNMAP, "32", _V10, None),
        (_C.PARTITION_INFO_GET, "32", _V10, None),
        (_C.ID_GET, "32", _V10, None),
        (_C.MSG_POLL, "32", _V10, _V11),
        (_C.MSG_WAIT, "32", _V10, None),
        (_C.YIELD, "32", _V10, None),
        (_C.RUN, "32", _V10, None),
        (_C.MSG_SEND, "32", _V10, _V11),
        (_C.MSG_SEND_DIRECT_REQ, "both", _V10, None),
        (_C.MSG_SEND_DIRECT_RESP, "both", _V10, None),
        (_C.MEM_DONATE, "both", _V10, None),
        (_C.MEM_LEND, "both", _V10, None),
        (_C.MEM_SHARE, "both", _V10, None),
        (_C.MEM_RETRIEVE_REQ, "both", _V10, None),
        (_C.MEM_RETRIEVE_RESP, "32", _V10, None),
        (_C.MEM_RELINQUISH, "32", _V10, None),
        (_C.MEM_RECLAIM, "32", _V10, None),
        (_C.MEM_OP_PAUSE, "32", _V10, _V11),
        (_C.MEM_OP_RESUME, "32", _V10, _V11),
        (_C.MEM_FRAG_RX, "32", _V10, None),
        (_C.MEM_FRAG_TX, "32", _V10, None),
        (_C.NORMAL_WORLD_RESUME, "32", _V10, None),
        (_C.NOTIFICATION_BITMAP_CREATE, "32", _V11, None),
        (_C.NOTIFICATION_BITMAP_DESTROY, "32", _V11, None),
        (_C.NOTIFICATION_BIND, "32", _V11, None),
        (_C.NOTIFICATION_UNBIND, "32", _V11, None),
        (_C.NOTIFICATION_SET, "32", _V11, None),
        (_C.NOTIFICATION_GET, "32", _V11, None),
        (_C.NOTIFICATION_INFO_GET, "both", _V11, None),
        (_C.RX_ACQUIRE, "32", _V11, None),
        (_C.SPM_ID_GET, "32", _V11, None),
        (_C.MSG_SEND2, "32", _V11, None),
        (_C.SECONDARY_EP_REGISTER, "both", _V11, None),
        (_C.MEM_PERM_GET, "both", _V11, None),
        (_C.MEM_PERM_SET, "both", _V11, None),
        (_C.CONSOLE_LOG, "both", _V12, None),
        (_C.PARTITION_INFO_GET_REGS, "64", _V12, None),
        (_C.EL3_INTR_HANDLE, "32", _V12, None),
        (_C.MSG_SEND_DIRECT_REQ2, "64", _V12, None),
        (_C.MSG_SEND_DIRECT_RESP2, "64", _V12, None),
    )
}

SMC32_BASE, SMC64_BASE = 0x8400_0000, 0xC400_0000
SMC64_BIT = 0x4000_0000

BY_FID: dict[int, tuple[Function, bool]] = {
    **{SMC32_BASE | f.call: (f, False) for f in FUNCTIONS.values() if f.smc32},
    **{SMC64_BASE | f.call: (f, True) for f in FUNCTIONS.values() if f.smc64},
}
"""Function id (32 bits) → the function, and whether this is its SMC64 form."""


def fid(call: Call, smc64: bool | None = None) -> int:
    """The 32-bit function id of ``call``: of its SMC32 form, of its SMC64 form if asked or if it has no other."""
    return (SMC64_BASE if (smc64 or not FUNCTIONS[call].smc32) else SMC32_BASE) | call


def name(function_id: int) -> str:
    """``FFA_MEM_SHARE_64`` for 0xc4000073; the number in hex for what is no FF-A function."""
    found = BY_FID.get(function_id)
    if found is None:
        return f"{function_id:#x}"
    return f"FFA_{found[0].call.name}{'_64' if found[1] else ''}"


class Error(IntEnum):
    """Status codes of FFA_ERROR (w2), as signed numbers."""

    NOT_SUPPORTED = -1
    INVALID_PARAMETERS = -2
    NO_MEMORY = -3
    BUSY = -4
    INTERRUPTED = -5
    DENIED = -6
    RETRY = -7
    ABORTED = -8
    NO_DATA = -9
    NOT_READY = -10


class FfaError(Exception):
    """A call is to be answered with FFA_ERROR and ``code``; the text says why, for logs."""

    def __init__(self, code: Error, why: str = "") -> None:
        super().__init__(f"{code.name}: {why}" if why else code.name)
        self.code = code


class Feature(IntEnum):
    """Feature ids of FFA_FEATURES: interrupts whose numbers the answer gives in w2."""

    NOTIFICATION_PENDING = 1
    SCHEDULE_RECEIVER = 2
    MANAGED_EXIT = 3


# -- endpoints

HYPERVISOR_ID = 0
"""The hypervisor, or the operating system where there is none."""
SPMC_ID = 0x8000
SPMD_ID = 0xFFFF
SECURE_BIT = 0x8000


def is_secure(endpoint: int) -> bool:
    """Whether a 16-bit endpoint id is one of the secure world."""
    return bool(endpoint & SECURE_BIT)


# -- memory handles

HANDLE_INVALID = 0xFFFF_FFFF_FFFF_FFFF
HANDLE_HYPERVISOR_BIT = 1 << 63
"""Set in handles that the hypervisor gave, clear in those of the SPMC."""


# -- memory transactions

ATTRIBUTES_NORMAL = 0x2F
"""Normal memory, write-back cacheable, inner shareable."""
ATTRIBUTES_DEVICE = 0x10
"""Device memory, of the type nGnRnE: the least permissive."""
ATTRIBUTES_TYPE_MASK, ATTRIBUTES_CACHE_MASK = 0x30, 0x0C
"""Of memory attributes: the type (none, device, normal), and its cacheability or kind of device."""
ATTRIBUTE_NS = 1 << 6

FLAG_CLEAR = 1 << 0
FLAG_TIME_SLICE = 1 << 1
FLAG_CLEAR_ON_RELINQUISH = 1 << 2
FLAG_TYPE_SHIFT = 3
FLAG_TYPE_MASK = 3 << 3
FLAG_HINT_MASK = 0xF << 5
FLAG_HINT_VALID = 1 << 9
FLAG_BYPASS_BORROWERS = 1 << 10

TRANSACTION_TYPES = {Call.MEM_SHARE: 1, Call.MEM_LEND: 2, Call.MEM_DONATE: 3}
"""Function → its number in the transaction type field of the flags (bits 3 and 4)."""


class Data(IntEnum):
    """Data access, bits 0 and 1 of an access permission."""

    NOT_SPECIFIED = 0
    RO = 1
    RW = 2
    RESERVED = 3


class Instruction(IntEnum):
    """Instruction access, bits 2 and 3 of an access permission."""

    NOT_SPECIFIED = 0
    NX = 1
    X = 2
    RESERVED = 3


def permissions(data: Data, instruction: Instruction = Instruction.NOT_SPECIFIED) -> int:
    """The access permission byte of a receiver."""
    return data | instruction << 2


# -- messages

DIRECT_FRAMEWORK_BIT = 1 << 31
"""In w2 of a direct message: a framework message, which only partition managers exchange."""


class FrameworkMessage(IntEnum):
    """Types of framework messages (w2, bits 0-7); the response's is one more. The VM's id is in w5, a status in w3."""

    VM_CREATED = 4
    VM_DESTROYED = 6


NOTIFY_PER_VCPU = 1 << 0
NOTIFY_DELAY_SRI = 1 << 1
GET_FROM_SP, GET_FROM_VM, GET_FROM_SPM, GET_FROM_HYP = 1, 2, 4, 8
RX_FULL = 1 << 0
"""Framework notification of a partition manager: there is a message in the receiver's RX buffer."""

WAIT_RETAIN_RX = 1 << 0
"""Flag of FFA_MSG_WAIT (w2, 1.2): keep the RX buffer."""


class Property(IntEnum):
    """Bits of a partition's properties in partition information."""

    DIRECT_REQ_RECV = 1 << 0
    DIRECT_REQ_SEND = 1 << 1
    INDIRECT_MSG = 1 << 2
    NOTIFICATIONS = 1 << 3
    VM_CREATED = 1 << 6
    VM_DESTROYED = 1 << 7
    AARCH64 = 1 << 8
    DIRECT_REQ2_RECV = 1 << 9
    DIRECT_REQ2_SEND = 1 << 10


PROPERTIES_OF = {VERSION_1_0: 0x7, VERSION_1_1: 0x1FF, VERSION_1_2: 0x7FF}
"""The property bits that a caller of each version is shown."""

PARTITION_INFO_COUNT = 1 << 0
"""Flag of FFA_PARTITION_INFO_GET (w5): only the number of partitions."""
