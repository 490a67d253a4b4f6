"""The vhost-user frontend's half of the protocol, without I/O. Source: QEMU, docs/interop/vhost-user.rst.

Each method is a generator: it yields one ``Send`` after the other, and wants the reply's payload sent in where
``Send.answered`` is set (None otherwise). Its return value is what was asked for. ``pyvhost.io.frontend`` drives it
over a socket.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from typing import Any

from pyvhost.backend import DeviceInfo, offered_protocol_features
from pyvhost.codec import Codec
from pyvhost.effects import RegionInfo, RingSetup
from pyvhost.errors import FormatError, MessageError, RequestFailed
from pyvhost.messages import (
    BACKEND_PAYLOADS,
    CONFIG,
    HEADER,
    INFLIGHT,
    LOG,
    MAX_PAYLOAD,
    MEM_REGION,
    MEM_TABLE,
    REGION,
    TRANSFER_STATE,
    U64,
    VRING_ADDR,
    VRING_ADDR_F_LOG,
    VRING_STATE,
    BackendRequest,
    Feature,
    Flag,
    FrontendRequest,
    ProtocolFeature,
    TransferDirection,
    TransferPhase,
    encode,
)

__all__ = ["FrontendMachine", "Send"]

_F, _P = FrontendRequest, ProtocolFeature

#: what a frontend of this library understands: all that its backend can do
KNOWN_PROTOCOL_FEATURES = offered_protocol_features(DeviceInfo(1, config_size=1, has_state=True))


@dataclass(frozen=True, slots=True)
class Send:
    """One message to send, with its file descriptors, which stay the caller's."""

    request: FrontendRequest
    data: bytes
    fds: tuple[int, ...]
    answered: bool


Steps = Generator[Send, bytes | None, None]
Asks = Generator[Send, bytes | None, int]


@dataclass(slots=True)
class FrontendMachine:
    """One connection. ``features`` and ``protocol_features`` are what was agreed on, once ``negotiate()`` is
    through."""

    offered: int = 0  #: feature bits the backend offers
    features: int = 0
    protocol_features: ProtocolFeature = _P(0)  # noqa: RUF009 - immutable
    queue_num: int | None = None  #: as the backend says; None: it does not
    mem_slots: int | None = None

    # --- messages

    @staticmethod
    def reply_size(request: FrontendRequest, header: bytes) -> int:
        """Bytes of payload that follow the header of a reply.

        :raises MessageError: not a reply to ``request``
        """
        head = HEADER.unpack(header)
        wrong = head.flags & Flag.VERSION_MASK != Flag.VERSION or not head.flags & Flag.REPLY
        if wrong or head.request != request or head.size > MAX_PAYLOAD:
            raise MessageError(
                f"not a reply to {request.name}: {head.request}, flags {head.flags:#x}, {head.size} bytes"
            )
        size: int = head.size
        return size

    def _send(
        self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> Generator[Send, bytes | None, None]:
        """A message without an answer of its own; waits for the acknowledgement if there is one.

        :raises RequestFailed: the backend refused it
        """
        ack = bool(self.protocol_features & _P.REPLY_ACK)
        data = encode(request, payload, Flag.NEED_REPLY if ack else 0)
        reply = yield Send(request, data, tuple(fds), ack)
        if ack and _parse(U64, request, reply).value != 0:
            raise RequestFailed(f"{request.name} was refused")

    def _ask(
        self, request: FrontendRequest, payload: bytes = b"", fds: Sequence[int] = ()
    ) -> Generator[Send, bytes | None, bytes]:
        reply = yield Send(request, encode(request, payload), tuple(fds), True)
        return reply or b""

    def _ask_u64(self, request: FrontendRequest) -> Asks:
        reply = yield from self._ask(request)
        value: int = _parse(U64, request, reply).value
        return value

    # --- negotiation

    def negotiate(self, wanted: int, protocol: ProtocolFeature = KNOWN_PROTOCOL_FEATURES) -> Steps:
        """Agree on features: those both ``wanted`` and offered. They take effect with ``acknowledge()``, at the
        start."""
        self.offered = yield from self._ask_u64(_F.GET_FEATURES)
        if self.offered & Feature.PROTOCOL_FEATURES:
            offered = yield from self._ask_u64(_F.GET_PROTOCOL_FEATURES)
            agreed = _P(offered & protocol & KNOWN_PROTOCOL_FEATURES)
            yield from self._send(_F.SET_PROTOCOL_FEATURES, U64.pack(agreed))
            self.protocol_features = agreed
        if self.protocol_features & _P.MQ:
            self.queue_num = yield from self._ask_u64(_F.GET_QUEUE_NUM)
        if self.protocol_features & _P.CONFIGURE_MEM_SLOTS:
            self.mem_slots = yield from self._ask_u64(_F.GET_MAX_MEM_SLOTS)
        yield from self._send(_F.SET_OWNER)
        self.features = self.offered & (wanted & ~Feature.LOG_ALL | Feature.PROTOCOL_FEATURES)

    def acknowledge(self, *, log: bool = False) -> Steps:
        """SET_FEATURES with what was agreed on; ``log``: and LOG_ALL, for as long as dirty pages are to be logged."""
        yield from self._send(_F.SET_FEATURES, U64.pack(self.features | (Feature.LOG_ALL if log else 0)))

    def set_channel(self, fd: int) -> Steps:
        """Give the backend a socket for its own requests; only if BACKEND_REQ was agreed on."""
        yield from self._send(_F.SET_BACKEND_REQ_FD, fds=[fd])

    # --- memory

    def set_memory(self, regions: Sequence[tuple[RegionInfo, int]]) -> Steps:
        """Give the backend its memory table: region by region if CONFIGURE_MEM_SLOTS was agreed on, else as a whole."""
        if self.protocol_features & _P.CONFIGURE_MEM_SLOTS:
            for region, fd in regions:
                yield from self.add_region(region, fd)
            return
        body = MEM_TABLE.pack(len(regions)) + b"".join(REGION.pack(*_region(r)) for r, _ in regions)
        yield from self._send(_F.SET_MEM_TABLE, body, [fd for _, fd in regions])

    def add_region(self, region: RegionInfo, fd: int) -> Steps:
        yield from self._send(_F.ADD_MEM_REG, MEM_REGION.pack(_region(region)), [fd])

    def remove_region(self, region: RegionInfo) -> Steps:
        yield from self._send(_F.REM_MEM_REG, MEM_REGION.pack(_region(region)))

    # --- rings

    def set_up_ring(self, index: int, ring: RingSetup, kick: int, call: int | None, err: int | None = None) -> Steps:
        """Everything about a ring but enabling it, in QEMU's order."""
        yield from self._send(_F.SET_VRING_NUM, VRING_STATE.pack(index, ring.size))
        yield from self._send(_F.SET_VRING_BASE, VRING_STATE.pack(index, ring.base))
        yield from self.set_ring_addr(index, ring)
        if err is not None:
            yield from self._send(_F.SET_VRING_ERR, U64.pack(index), [err])
        if call is not None:
            yield from self._send(_F.SET_VRING_CALL, U64.pack(index), [call])
        yield from self._send(_F.SET_VRING_KICK, U64.pack(index), [kick])

    def set_ring_addr(self, index: int, ring: RingSetup) -> Steps:
        """Where a ring is, and whether and where its used ring is logged; also while it runs."""
        yield from self._send(
            _F.SET_VRING_ADDR,
            VRING_ADDR.pack(
                index=index,
                flags=0 if ring.log is None else VRING_ADDR_F_LOG,
                desc=ring.desc,
                used=ring.used,
                avail=ring.avail,
                log=ring.log or 0,
            ),
        )

    def enable(self, index: int, on: bool = True) -> Steps:
        """Nothing without PROTOCOL_FEATURES: rings are enabled then."""
        if self.features & Feature.PROTOCOL_FEATURES:
            yield from self._send(_F.SET_VRING_ENABLE, VRING_STATE.pack(index, int(on)))

    def stop_ring(self, index: int) -> Asks:
        """GET_VRING_BASE: the base to go on from."""
        reply = yield from self._ask(_F.GET_VRING_BASE, VRING_STATE.pack(index, 0))
        state = _parse(VRING_STATE, _F.GET_VRING_BASE, reply)
        if state.index != index:
            raise MessageError(f"GET_VRING_BASE of ring {index} was answered for ring {state.index}")
        base: int = state.num
        return base

    def reset_device(self) -> Steps:
        """Only if RESET_DEVICE was agreed on."""
        yield from self._send(_F.RESET_DEVICE)

    def set_status(self, status: int) -> Steps:
        """Only if STATUS was agreed on."""
        yield from self._send(_F.SET_STATUS, U64.pack(status))

    def get_status(self) -> Asks:
        return (yield from self._ask_u64(_F.GET_STATUS))

    # --- what is in flight, and what was written; each only if its protocol feature was agreed on

    def get_inflight(self, queues: int, queue_size: int) -> Generator[Send, bytes | None, tuple[int, int]]:
        """Size and offset of a fresh inflight region, whose file descriptor comes with the reply."""
        reply = yield from self._ask(_F.GET_INFLIGHT_FD, INFLIGHT.pack(0, 0, queues, queue_size))
        body = _parse(INFLIGHT, _F.GET_INFLIGHT_FD, reply)
        return body.mmap_size, body.mmap_offset

    def set_inflight(self, fd: int, size: int, offset: int, queues: int, queue_size: int) -> Steps:
        yield from self._send(_F.SET_INFLIGHT_FD, INFLIGHT.pack(size, offset, queues, queue_size), [fd])

    def set_log(self, fd: int, size: int, offset: int = 0) -> Steps:
        yield from self._ask(_F.SET_LOG_BASE, LOG.pack(size, offset), [fd])

    def set_log_fd(self, fd: int) -> Steps:
        yield from self._send(_F.SET_LOG_FD, fds=[fd])

    # --- the device's state, while all rings are stopped; only if DEVICE_STATE was agreed on

    def set_device_state_fd(self, fd: int, *, load: bool) -> Steps:
        """:raises RequestFailed: the backend refuses"""
        direction = TransferDirection.LOAD if load else TransferDirection.SAVE
        body = TRANSFER_STATE.pack(direction, TransferPhase.STOPPED)
        reply = yield from self._ask(_F.SET_DEVICE_STATE_FD, body, [fd])
        if _parse(U64, _F.SET_DEVICE_STATE_FD, reply).value & 0xFF:
            raise RequestFailed("SET_DEVICE_STATE_FD was refused")

    def check_device_state(self) -> Steps:
        """:raises RequestFailed: the transfer failed"""
        if (yield from self._ask_u64(_F.CHECK_DEVICE_STATE)):
            raise RequestFailed("the backend says that the transfer of its state failed")

    # --- config space

    def get_config(self, offset: int, length: int) -> Generator[Send, bytes | None, bytes]:
        """:raises RequestFailed: the backend refuses, the range is not in its config space"""
        request = CONFIG.pack(offset, length, 0) + bytes(length)
        reply = yield from self._ask(_F.GET_CONFIG, request)
        if not reply:
            raise RequestFailed("GET_CONFIG was refused")
        head = _parse_head(CONFIG, _F.GET_CONFIG, reply)
        if (head.offset, head.size, len(reply)) != (offset, length, len(request)):
            raise MessageError("GET_CONFIG was answered for another range")
        return reply[CONFIG.size :]

    def set_config(self, offset: int, data: bytes) -> Steps:
        yield from self._send(_F.SET_CONFIG, CONFIG.pack(offset, len(data), 0) + data)

    # --- the backend's requests

    @staticmethod
    def backend_request(header: bytes) -> tuple[BackendRequest, int]:
        """The request and its payload's size, from a header that came on the backend's channel.

        :raises MessageError: none that exists
        """
        head = HEADER.unpack(header)
        try:
            request = BackendRequest(head.request)
        except ValueError:
            raise MessageError(f"unknown backend request {head.request}") from None
        layout = BACKEND_PAYLOADS[request]
        if head.size != (layout.size if layout else 0):
            raise MessageError(f"{request.name} with a payload of {head.size} bytes")
        return request, head.size


def _region(r: RegionInfo) -> tuple[int, int, int, int]:
    return r.guest_addr, r.size, r.user_addr, r.mmap_offset


def _parse(layout: Codec, request: FrontendRequest, payload: bytes | None) -> Any:
    if payload is None or len(payload) != layout.size:
        raise MessageError(f"{request.name} was answered with {len(payload or b'')} bytes")
    return layout.unpack(payload)


def _parse_head(layout: Codec, request: FrontendRequest, payload: bytes) -> Any:
    try:
        return layout.unpack(payload)
    except FormatError as e:
        raise MessageError(f"{request.name}: {e}") from None
