"""The config space and the limits that it announces."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

from device.messages import CONFIG, EVENT_HEADER, EVENTS, PARAM, RANGE, REQUEST_HEADER, REQUESTS, Tail
from device.wire import SPEC_VERSION, Event
from pyvhost.errors import FormatError
from tee.driver import TeeInfo


@dataclass(frozen=True, slots=True)
class Limits:
    """What one guest may have at a time; each is announced in the config space and enforced."""

    num_event_buffers: int = 32
    event_buffer_size: int = 1024
    max_params: int = 24
    max_contexts: int = 256
    max_sessions: int = 1024
    max_regions: int = 4096
    max_region_ranges: int = 16384
    max_region_bytes: int = 1 << 30
    max_calls: int = 1024
    max_rpcs: int = 16
    max_inline_bytes: int = 64 * 1024
    max_request_bytes: int = 320 * 1024
    rpc_deadline_ms: int = 10_000

    def check(self) -> None:
        """Raise ValueError where the limits do not fit each other, or are less than any device may have."""
        zeros = [name for name in LIMIT_NAMES if getattr(self, name) < 1]
        if zeros:
            raise ValueError(f"{zeros[0]} must be at least 1")
        if self.max_params < 4:
            raise ValueError("max_params must be at least 4")
        event = EVENT_HEADER.size + EVENTS[Event.RPC].codec.size + self.max_params * PARAM.size
        if self.event_buffer_size < event:
            raise ValueError(f"an event with {self.max_params} parameters takes an event_buffer_size of {event}")
        tails = {Tail.PARAMS: self.max_params * PARAM.size, Tail.RANGES: self.max_region_ranges * RANGE.size}
        request = REQUEST_HEADER.size + max(r.body.codec.size + tails.get(r.body.tail, 0) for r in REQUESTS.values())
        if self.max_request_bytes < request:
            raise ValueError(f"the largest request that the other limits allow takes {request} max_request_bytes")


LIMIT_NAMES = tuple(f.name for f in fields(Limits))

_DEFINED = 92
"""Bytes of the config space that version 0.1 gives a meaning; the rest is reserved."""


@dataclass(frozen=True, slots=True)
class Config:
    """The config space: who the device is, its epoch, and its limits."""

    epoch: int
    info: TeeInfo
    num_request_queues: int = 1
    limits: Limits = Limits()

    def pack(self) -> bytes:
        """The bytes of the config space (``device.wire.Config``)."""
        return CONFIG.pack(
            version_major=SPEC_VERSION[0],
            version_minor=SPEC_VERSION[1],
            epoch=self.epoch,
            tee_kind=self.info.kind,
            tee_impl_id=self.info.impl_id,
            tee_impl_caps=self.info.impl_caps,
            tee_gen_caps=self.info.gen_caps,
            num_request_queues=self.num_request_queues,
            **asdict(self.limits),
        )

    @classmethod
    def unpack(cls, data: bytes) -> Config:
        """What a driver reads. Raises FormatError for another vendor's device, an unknown version, or nonsense."""
        if len(data) < CONFIG.size:
            raise FormatError(f"a config space of {len(data)} bytes; this driver needs {CONFIG.size}")
        # What is reserved here may be in use by features that this driver does not know.
        record = CONFIG.unpack(data[:_DEFINED] + bytes(CONFIG.size - _DEFINED))
        if record.version_major != SPEC_VERSION[0]:
            raise FormatError(
                f"the device follows version {record.version_major}.{record.version_minor} of the specification; "
                f"this driver knows {SPEC_VERSION[0]}.{SPEC_VERSION[1]}"
            )
        limits = Limits(**{name: getattr(record, name) for name in LIMIT_NAMES})
        never_zero = (limits.num_event_buffers, limits.max_calls, limits.max_contexts, limits.rpc_deadline_ms)
        if 0 in (record.epoch, record.num_request_queues, *never_zero) or limits.max_params < 4:
            raise FormatError("the device's config space has less than the least it may have")
        info = TeeInfo(record.tee_kind, record.tee_impl_id, record.tee_impl_caps, record.tee_gen_caps)
        return cls(record.epoch, info, record.num_request_queues, limits)
