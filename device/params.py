"""Parameter arrays between the wire and :mod:`tee.params`, for both sides, with every rule of the wire checked."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

from device.wire import NULL_REGION, PARAM_INLINE, PARAM_META, PARAM_TYPE_MASK, ParamType, Status
from pyvhost.errors import ProtocolError
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result

RawParam = tuple[int, int, int, int]
"""attr, a, b, c."""

PARAM_SIZE = 32
INLINE_ALIGN = 8

VALUE_TYPES = {1: Direction.IN, 2: Direction.OUT, 3: Direction.INOUT}
MEMREF_TYPES = {5: Direction.IN, 6: Direction.OUT, 7: Direction.INOUT}
_VALUE_OUTPUTS = frozenset({int(ParamType.VALUE_OUT), int(ParamType.VALUE_INOUT)})
_MEMREF_OUTPUTS = frozenset({int(ParamType.MEMREF_OUT), int(ParamType.MEMREF_INOUT)})
_MEMREF_IN, _MEMREF_OUT = int(ParamType.MEMREF_IN), int(ParamType.MEMREF_OUT)
_TYPE_AND_META = PARAM_TYPE_MASK | PARAM_META
_KNOWN_BITS = _TYPE_AND_META | PARAM_INLINE


class RequestError(ProtocolError):
    """A request that the device refuses: ``status`` says how."""

    def __init__(self, status: Status, why: str) -> None:
        super().__init__(why)
        self.status = status
        self.why = why


@lru_cache(maxsize=256)
def params_struct(count: int) -> struct.Struct:
    """The packed form of ``count`` parameters."""
    return struct.Struct(f"<{4 * count}Q")


def unpack_raw(data: bytes, offset: int, count: int) -> list[RawParam]:
    """``count`` parameters at ``offset``; the caller has checked that they are there."""
    words = params_struct(count).unpack_from(data, offset)
    return [words[i : i + 4] for i in range(0, 4 * count, 4)]


def pack_raw(params: Sequence[RawParam]) -> bytes:
    """The inverse of :func:`unpack_raw`."""
    return params_struct(len(params)).pack(*[word for param in params for word in param])


def padded(size: int) -> int:
    """Bytes that ``size`` bytes of inline memory take."""
    return (size + INLINE_ALIGN - 1) & ~(INLINE_ALIGN - 1)


def check_raw(params: Sequence[RawParam], *, inline: bool) -> tuple[int, int]:
    """Check what can be checked without knowing regions; the bytes of inline data in and out (with padding).

    Raises RequestError(MALFORMED).
    """
    data_in = data_out = 0
    for attr, a, b, c in params:
        if attr & ~_KNOWN_BITS:
            raise RequestError(Status.MALFORMED, f"parameter attribute {attr:#x} has unknown bits")
        kind = attr & PARAM_TYPE_MASK
        if kind in MEMREF_TYPES:
            if attr & PARAM_INLINE:
                if not inline:
                    raise RequestError(Status.MALFORMED, "inline memory was not negotiated, or is not allowed here")
                if a or c:
                    raise RequestError(Status.MALFORMED, "an inline memory reference has an offset or a region")
                if kind != _MEMREF_OUT:
                    data_in += padded(b)
                if kind != _MEMREF_IN:
                    data_out += padded(b)
            elif c == NULL_REGION and a:
                raise RequestError(Status.MALFORMED, "a NULL memory reference has an offset")
        elif attr & PARAM_INLINE or (kind and kind not in VALUE_TYPES):
            raise RequestError(Status.MALFORMED, f"parameter attribute {attr:#x} is impossible")
    return data_in, data_out


def results(given: Sequence[RawParam], params: Sequence[Param], code: int) -> list[RawParam]:
    """The parameters of a response: those of the request with the outputs of ``params`` in them.

    Only SHORT_BUFFER may tell a size beyond the request's. META parameters go back as they came.
    """
    out: list[RawParam] = []
    for raw, param in zip(given, params, strict=True):
        attr, a, b, c = raw
        kind = attr & _TYPE_AND_META
        if kind in _VALUE_OUTPUTS and type(param) is Value:
            out.append((attr, param.a, param.b, param.c))
        elif kind in _MEMREF_OUTPUTS and type(param) is MemRef:
            size = param.size
            out.append((attr, a, size if size <= b or code == Result.SHORT_BUFFER else b, c))
        else:
            out.append(raw)
    return out


def take_results(sent: Sequence[RawParam], got: Sequence[RawParam], params: Sequence[Param], code: int) -> None:
    """On the driver's side: put a response's outputs into the call's ``params``.

    Raises ProtocolError where the device changed what it may not; then nothing was put anywhere.
    """
    for before, after in zip(sent, got, strict=True):
        _check_result(before, after, code)
    for after, param in zip(got, params, strict=True):
        if param.meta:
            continue
        if isinstance(param, Value) and param.direction.is_output:
            _, param.a, param.b, param.c = after
        elif isinstance(param, MemRef) and param.direction.is_output:
            param.size = after[2]


def _check_result(before: RawParam, after: RawParam, code: int) -> None:
    """Of a value the device may change all words of an output, of a memory reference the size of one."""
    if after == before:
        return
    kind = before[0] & PARAM_TYPE_MASK
    if after[0] == before[0] and not before[0] & PARAM_META:
        if kind in _VALUE_OUTPUTS:
            return
        if kind in _MEMREF_OUTPUTS and (after[1], after[3]) == (before[1], before[3]):
            if after[2] <= before[2] or code == Result.SHORT_BUFFER:
                return
            raise ProtocolError("the device says that more was written than there is room for")
    raise ProtocolError("the device changed what it may not in a parameter")


def attribute(param: Param) -> int:
    """The attribute of a parameter that is not inline memory."""
    meta = PARAM_META if param.meta else 0
    if isinstance(param, Nothing):
        return meta
    base = ParamType.NONE if isinstance(param, Value) else ParamType.MEMREF_IN - Direction.IN
    return meta | (base + param.direction)
