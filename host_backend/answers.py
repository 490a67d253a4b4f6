"""What responses are made of, and ids for them."""

from __future__ import annotations

from typing import TypeVar

from device.ids import IdTable, LimitReachedError
from device.params import RawParam, RequestError, pack_raw, padded, results
from device.wire import PARAM_INLINE, Status
from tee.params import Direction, MemRef, Param
from tee.results import Result

T = TypeVar("T")


def add(table: IdTable[T], entry: T, what: str) -> int:
    """An id for ``entry``. Raises RequestError(LIMIT)."""
    try:
        return table.add(entry)
    except LimitReachedError:
        raise RequestError(Status.LIMIT, f"more than {table.limit} {what}") from None


def ids(first: int, second: int = 0) -> bytes:
    """Two 32-bit words."""
    return first.to_bytes(4, "little") + second.to_bytes(4, "little")


def outputs(given: list[RawParam], params: list[Param], code: int) -> list[bytes]:
    """The tail of a response: the parameters with their outputs, then inline memory."""
    parts = [pack_raw(results(given, params, code))]
    for (attr, _, capacity, _), param in zip(given, params, strict=True):
        if attr & PARAM_INLINE and type(param) is MemRef and param.direction is not Direction.IN:
            assert param.memory is not None
            short = code == Result.SHORT_BUFFER and param.size > capacity
            parts.append(bytes(capacity) if short else bytes(param.memory.segments[0]))
            parts.append(bytes(padded(capacity) - capacity))
    return parts
