"""Every vhost-user message: ids, feature bits, and layouts. Source: QEMU, docs/interop/vhost-user.rst.

Numbers are in the byte order of the host, on which both ends run; here little-endian, like the rings. The two tables
at the end, ``FRONTEND_PAYLOADS`` and ``BACKEND_PAYLOADS``, say what each request carries, implemented by this library
or not, so that any message can be shown by ``describe()``.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum, IntFlag
from typing import Any

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Codec, Ignored
from pyvhost.errors import MessageError

__all__ = [
    "BACKEND_PAYLOADS",
    "CONFIG",
    "FRONTEND_PAYLOADS",
    "HEADER",
    "INFLIGHT",
    "IOTLB",
    "LOG",
    "MAX_CONFIG",
    "MAX_FDS",
    "MAX_PAYLOAD",
    "MEM_REGION",
    "MEM_TABLE",
    "REGION",
    "SHARED_OBJECT",
    "TRANSFER_STATE",
    "U64",
    "VRING_ADDR",
    "VRING_AREA",
    "VRING_STATE",
    "BackendRequest",
    "DeviceStatus",
    "Feature",
    "Flag",
    "FrontendRequest",
    "ProtocolFeature",
    "TransferDirection",
    "TransferPhase",
    "describe",
    "encode",
]

# --- limits of this library

MAX_FDS = 32  #: file descriptors with one message
MAX_CONFIG = 256  #: bytes of config space (VHOST_USER_MAX_CONFIG_SIZE)
MAX_PAYLOAD = 4096  #: bytes; no message that is implemented comes near


# --- ids and bits


class FrontendRequest(IntEnum):
    """What the frontend sends; section "Front-end message types"."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43


class BackendRequest(IntEnum):
    """What the backend sends on the channel of SET_BACKEND_REQ_FD; section "Back-end message types"."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8


class Flag(IntFlag):
    """The header's flags."""

    VERSION = 0x1
    VERSION_MASK = 0x3
    REPLY = 0x4
    NEED_REPLY = 0x8


class Feature(IntFlag):
    """Virtio feature bits that concern rings and transport (virtio 1.2, section 6), and vhost's own two."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26  #: vhost: log dirty pages
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30  #: vhost-user: the messages about protocol features exist
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


class ProtocolFeature(IntFlag):
    """Bits of GET_PROTOCOL_FEATURES; section "Protocol features"."""

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19


class DeviceStatus(IntFlag):
    """The virtio device status byte (virtio 1.2, section 2.1), for GET_STATUS and SET_STATUS."""

    ACKNOWLEDGE = 1
    DRIVER = 2
    DRIVER_OK = 4
    FEATURES_OK = 8
    NEEDS_RESET = 64
    FAILED = 128


class TransferDirection(IntEnum):
    """Of SET_DEVICE_STATE_FD."""

    SAVE = 0  #: the backend writes its state
    LOAD = 1


class TransferPhase(IntEnum):
    """Of SET_DEVICE_STATE_FD: when the transfer happens."""

    STOPPED = 0  #: all rings are stopped


# --- layouts

HEADER = Codec("header", Struct("request" / Int32ul, "flags" / Int32ul, "size" / Int32ul))

U64 = Codec("u64", Struct("value" / Int64ul))

#: the low byte of a u64 that comes with a ring's eventfd: the ring; bit 8: no fd comes with it
VRING_INDEX_MASK = 0xFF
VRING_NOFD = 0x100

VRING_STATE = Codec("vring_state", Struct("index" / Int32ul, "num" / Int32ul))

#: addresses are the frontend's own ("user addresses"), except ``log``
VRING_ADDR = Codec(
    "vring_addr",
    Struct(
        "index" / Int32ul,
        "flags" / Int32ul,  # bit 0: log writes to the used ring
        "desc" / Int64ul,
        "used" / Int64ul,
        "avail" / Int64ul,
        "log" / Int64ul,
    ),
)
VRING_ADDR_F_LOG = 1

#: head of SET_MEM_TABLE; ``count`` regions follow
MEM_TABLE = Codec("mem_table", Struct("count" / Int32ul, Ignored(4)))

REGION = Codec(
    "region",
    Struct("guest_addr" / Int64ul, "size" / Int64ul, "user_addr" / Int64ul, "mmap_offset" / Int64ul),
)

#: ADD_MEM_REG, REM_MEM_REG
MEM_REGION = Codec("mem_region", Struct(Ignored(8), "region" / REGION.construct))

#: head of GET_CONFIG and SET_CONFIG; ``size`` bytes of config space follow
CONFIG = Codec("config", Struct("offset" / Int32ul, "size" / Int32ul, "flags" / Int32ul))
CONFIG_F_MIGRATION = 1  #: flags of SET_CONFIG: the destination of a live migration gets its config

LOG = Codec("log", Struct("size" / Int64ul, "offset" / Int64ul))

VRING_AREA = Codec("vring_area", Struct("value" / Int64ul, "size" / Int64ul, "offset" / Int64ul))

INFLIGHT = Codec(
    "inflight",
    Struct("mmap_size" / Int64ul, "mmap_offset" / Int64ul, "num_queues" / Int16ul, "queue_size" / Int16ul),
)

IOTLB = Codec(
    "iotlb",
    Struct(
        "iova" / Int64ul,
        "size" / Int64ul,
        "user_addr" / Int64ul,
        "permissions" / Int8ul,
        "type" / Int8ul,
        Ignored(6),
    ),
)

SHARED_OBJECT = Codec("shared_object", Struct("uuid" / Bytes(16)))

TRANSFER_STATE = Codec("transfer_state", Struct("direction" / Int32ul, "phase" / Int32ul))

_F = FrontendRequest
_B = BackendRequest

#: request → layout of its payload (of the head, where more follows); None: no payload. Replies have the same layout
#: where they have one, except as in ``_REPLIES``.
FRONTEND_PAYLOADS: Mapping[FrontendRequest, Codec | None] = {
    _F.GET_FEATURES: None,
    _F.SET_FEATURES: U64,
    _F.SET_OWNER: None,
    _F.RESET_OWNER: None,
    _F.SET_MEM_TABLE: MEM_TABLE,
    _F.SET_LOG_BASE: LOG,
    _F.SET_LOG_FD: None,
    _F.SET_VRING_NUM: VRING_STATE,
    _F.SET_VRING_ADDR: VRING_ADDR,
    _F.SET_VRING_BASE: VRING_STATE,
    _F.GET_VRING_BASE: VRING_STATE,
    _F.SET_VRING_KICK: U64,
    _F.SET_VRING_CALL: U64,
    _F.SET_VRING_ERR: U64,
    _F.GET_PROTOCOL_FEATURES: None,
    _F.SET_PROTOCOL_FEATURES: U64,
    _F.GET_QUEUE_NUM: None,
    _F.SET_VRING_ENABLE: VRING_STATE,
    _F.SEND_RARP: U64,
    _F.NET_SET_MTU: U64,
    _F.SET_BACKEND_REQ_FD: None,
    _F.IOTLB_MSG: IOTLB,
    _F.SET_VRING_ENDIAN: VRING_STATE,
    _F.GET_CONFIG: CONFIG,
    _F.SET_CONFIG: CONFIG,
    _F.CREATE_CRYPTO_SESSION: None,
    _F.CLOSE_CRYPTO_SESSION: U64,
    _F.POSTCOPY_ADVISE: None,
    _F.POSTCOPY_LISTEN: None,
    _F.POSTCOPY_END: None,
    _F.GET_INFLIGHT_FD: INFLIGHT,
    _F.SET_INFLIGHT_FD: INFLIGHT,
    _F.GPU_SET_SOCKET: None,
    _F.RESET_DEVICE: None,
    _F.VRING_KICK: VRING_STATE,
    _F.GET_MAX_MEM_SLOTS: None,
    _F.ADD_MEM_REG: MEM_REGION,
    _F.REM_MEM_REG: MEM_REGION,
    _F.SET_STATUS: U64,
    _F.GET_STATUS: None,
    _F.GET_SHARED_OBJECT: SHARED_OBJECT,
    _F.SET_DEVICE_STATE_FD: TRANSFER_STATE,
    _F.CHECK_DEVICE_STATE: None,
}

BACKEND_PAYLOADS: Mapping[BackendRequest, Codec | None] = {
    _B.IOTLB_MSG: IOTLB,
    _B.CONFIG_CHANGE_MSG: None,
    _B.VRING_HOST_NOTIFIER_MSG: VRING_AREA,
    _B.VRING_CALL: VRING_STATE,
    _B.VRING_ERR: VRING_STATE,
    _B.SHARED_OBJECT_ADD: SHARED_OBJECT,
    _B.SHARED_OBJECT_REMOVE: SHARED_OBJECT,
    _B.SHARED_OBJECT_LOOKUP: SHARED_OBJECT,
}

#: replies that are laid out by themselves; every other reply is the request's layout, or a u64
_REPLIES = frozenset({_F.GET_VRING_BASE, _F.GET_CONFIG, _F.GET_INFLIGHT_FD, _F.CREATE_CRYPTO_SESSION})


def encode(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """One whole message: the header, with version 1 and ``flags`` (``Flag.REPLY``, ``Flag.NEED_REPLY``), and its
    payload."""
    return HEADER.pack(request, Flag.VERSION | flags, len(payload)) + payload


def describe(message: bytes, *, from_backend: bool = False) -> dict[str, Any]:
    """One message as readable fields: ``request`` (name), ``flags`` (names), ``size``, and the payload's fields;
    bytes that no layout covers are under ``data``, in hex. ``from_backend``: it was seen on the backend's request
    channel.

    :raises MessageError: an unknown request
    :raises FormatError: too short for its own header or layout
    """
    header = HEADER.unpack(message)
    payload = message[HEADER.size : HEADER.size + header.size]
    try:
        request = BackendRequest(header.request) if from_backend else FrontendRequest(header.request)
    except ValueError:
        raise MessageError(f"unknown request {header.request}") from None
    flags = [f.name for f in (Flag.REPLY, Flag.NEED_REPLY) if header.flags & f]
    out: dict[str, Any] = {"request": request.name, "flags": flags, "size": header.size}
    if isinstance(request, BackendRequest):
        layout = U64 if header.flags & Flag.REPLY else BACKEND_PAYLOADS[request]
    else:
        layout = FRONTEND_PAYLOADS[request]
        if header.flags & Flag.REPLY and request not in _REPLIES:
            layout = U64
    if layout is not None and payload:
        fields = layout.as_dict(layout.unpack(payload))
        out |= {name: v.hex() if isinstance(v, bytes) else v for name, v in fields.items()}
        payload = payload[layout.size :]
    if request is FrontendRequest.SET_MEM_TABLE and "count" in out:
        count = min(out["count"], len(payload) // REGION.size)
        out["regions"] = [REGION.as_dict(REGION.unpack(payload, n * REGION.size)) for n in range(count)]
        payload = payload[count * REGION.size :]
    if payload:
        out["data"] = payload.hex()
    return out
