"""Requests and responses as bytes: parsing with every check that needs no state, and packing. Used by both sides."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from device.config import Limits
from device.messages import (
    NO_FEATURE,
    RANGE,
    REQUEST_HEADER,
    REQUESTS,
    RESPONSE_HEADER,
    SERVICE_ENTRY,
    RequestType,
    Tail,
)
from device.params import PARAM_SIZE, RawParam, RequestError, check_raw, unpack_raw
from device.wire import Feature, Queue, Request, Status
from pyvhost.errors import FormatError
from tee.results import Origin, Result

HEADER_SIZE = REQUEST_HEADER.size
RESPONSE_HEADER_SIZE = RESPONSE_HEADER.size
RANGE_SIZE = RANGE.size

STATUS_RESULT: dict[int, int] = {
    Status.OK: Result.SUCCESS,
    Status.UNSUPPORTED: Result.NOT_SUPPORTED,
    Status.MALFORMED: Result.BAD_FORMAT,
    Status.STALE_EPOCH: Result.TARGET_DEAD,
    Status.NO_CONTEXT: Result.BAD_PARAMETERS,
    Status.NO_SESSION: Result.BAD_PARAMETERS,
    Status.NO_REGION: Result.BAD_PARAMETERS,
    Status.BAD_RANGE: Result.BAD_PARAMETERS,
    Status.LIMIT: Result.OUT_OF_MEMORY,
    Status.DUPLICATE_TAG: Result.BAD_PARAMETERS,
    Status.NOT_FOUND: Result.ITEM_NOT_FOUND,
    Status.ABANDONED: Result.COMMUNICATION,
    Status.DENIED: Result.ACCESS_DENIED,
    Status.IN_USE: Result.BUSY,
}
"""Status → the result code that a response carries with it."""


@dataclass(slots=True)
class ParsedRequest:
    """A request whose form is right: ``params`` or ``ranges`` are its tail, inline data begins at ``inline_at``."""

    kind: RequestType
    type: int
    tag: int
    context: int
    body: Any
    data: bytes
    params: list[RawParam]
    ranges: list[tuple[int, int]]
    inline_at: int
    inline_out: int


_NO_PARAMS: list[RawParam] = []
_NO_RANGES: list[tuple[int, int]] = []


def response_size(kind: RequestType, params: int, inline_out: int, entries: int = 0) -> int:
    """Bytes of the complete response to a request of this kind, with as many of SERVICE_LIST's entries."""
    size = RESPONSE_HEADER_SIZE + inline_out + entries * SERVICE_ENTRY.size
    if kind.response is not None:
        size += kind.response.codec.size
        if kind.response.tail is Tail.PARAMS:
            size += params * PARAM_SIZE
    return size


def parse_request(
    data: bytes, room: int, queue: Queue, *, epoch: int, features: Feature, limits: Limits
) -> ParsedRequest:
    """Parse the copied bytes of a request; ``room`` is the size in bytes of its writable part (at least a header).

    Raises RequestError with the status that the specification names.
    """
    if len(data) < HEADER_SIZE:
        raise RequestError(Status.MALFORMED, f"{len(data)} bytes are too few for a request header")
    try:
        header = REQUEST_HEADER.unpack(data)
    except FormatError as e:
        raise RequestError(Status.MALFORMED, str(e)) from None
    kind = REQUESTS.get(header.type)
    if (
        kind is None
        or kind.queue is not queue
        or (kind.feature is not NO_FEATURE and kind.feature & features != kind.feature)
    ):
        raise RequestError(Status.UNSUPPORTED, f"request type {header.type:#x} is not served on this queue")
    if header.flags or not header.tag:
        raise RequestError(Status.MALFORMED, "request header has unknown flags or tag 0")
    if header.epoch != epoch:
        raise RequestError(Status.STALE_EPOCH, "the request is of another epoch")
    if kind.context is not bool(header.context):
        raise RequestError(
            *((Status.NO_CONTEXT, "context 0") if kind.context else (Status.MALFORMED, "a context where none belongs"))
        )
    try:
        body = kind.body.codec.unpack(data, HEADER_SIZE)
    except FormatError as e:
        raise RequestError(Status.MALFORMED, str(e)) from None
    at = HEADER_SIZE + kind.body.codec.size
    params, ranges, inline_out = _NO_PARAMS, _NO_RANGES, 0
    if kind.body.tail is Tail.PARAMS:
        count = body.num_params
        if count > limits.max_params:
            raise RequestError(Status.LIMIT, f"{count} parameters; the limit is {limits.max_params}")
        end = at + count * PARAM_SIZE
        if end > len(data):
            raise RequestError(Status.MALFORMED, "the parameters are cut short")
        params = unpack_raw(data, at, count)
        inline = bool(features & Feature.INLINE) and header.type != Request.RPC_REPLY
        inline_in, inline_out = check_raw(params, inline=inline)
        if inline_in > limits.max_inline_bytes or inline_out > limits.max_inline_bytes:
            raise RequestError(Status.LIMIT, f"more than {limits.max_inline_bytes} bytes of inline memory")
        at, end = end, end + inline_in
    elif kind.body.tail is Tail.RANGES:
        count = body.num_ranges
        if count > limits.max_region_ranges:
            raise RequestError(Status.LIMIT, f"{count} ranges; the limit is {limits.max_region_ranges}")
        end = at + count * RANGE_SIZE
        if end <= len(data):
            ranges = _ranges(data, at, count)
    else:
        end = at
    if end != len(data):
        raise RequestError(Status.MALFORMED, f"the request has {len(data)} bytes where {end} are right")
    entries = body.max_entries if header.type == Request.SERVICE_LIST else 0
    if room < response_size(kind, len(params), inline_out, entries):
        raise RequestError(Status.MALFORMED, f"no room for the response in {room} bytes")
    return ParsedRequest(kind, header.type, header.tag, header.context, body, data, params, ranges, at, inline_out)


def _ranges(data: bytes, at: int, count: int) -> list[tuple[int, int]]:
    words = struct.unpack_from(f"<{2 * count}Q", data, at)
    return list(zip(words[::2], words[1::2], strict=True))


def pack_request(request: Request, *, epoch: int, tag: int, context: int, body: bytes, tail: bytes = b"") -> bytes:
    """The device-readable bytes of a request, without inline memory."""
    return REQUEST_HEADER.pack(type=request, flags=0, epoch=epoch, tag=tag, context=context) + body + tail


@lru_cache(maxsize=256)
def pack_response(
    status: int = Status.OK, ret: int = Result.SUCCESS, origin: int = Origin.TEE, flags: int = 0
) -> bytes:
    """A response's header."""
    return RESPONSE_HEADER.pack(status, flags, ret & 0xFFFF_FFFF, origin & 0xFFFF_FFFF)


def refusal(status: Status, flags: int = 0) -> bytes:
    """The whole response to a request that the device refused."""
    return RESPONSE_HEADER.pack(status, flags, STATUS_RESULT[status], Origin.COMMS)
