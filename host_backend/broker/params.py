"""Parameters of an RPC between the TEE's memory here and a backend: content crosses, memory does not."""

from __future__ import annotations

from tee.courier import MAX_CONTENT, MAX_PARAMS, NULL, Answer, CourierError, WireParam
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result

_WITH_PARAMS = frozenset({Result.SUCCESS, Result.SHORT_BUFFER})


def to_wire(params: list[Param]) -> list[WireParam]:
    """What is asked. Raises ValueError where it cannot be sent."""
    size = sum(param.size for param in params if isinstance(param, MemRef) and param.memory is not None)
    if len(params) > MAX_PARAMS or size > MAX_CONTENT:
        raise ValueError(f"{len(params)} parameters, {size} bytes")
    return [_wire(param) for param in params]


def _wire(param: Param) -> WireParam:
    if isinstance(param, Value):
        return WireParam(param.direction, 0, param.a, param.b, param.c)
    if isinstance(param, Nothing):
        return WireParam()
    if param.memory is None:
        return WireParam(4 + param.direction, NULL, param.size)
    content = param.memory.read(param.offset, param.size) if param.direction.is_input else b""
    return WireParam(4 + param.direction, 0, param.size, content=content)


def from_wire(asked: list[Param], answer: Answer) -> list[Param]:
    """The answer's parameters; content is written to the TEE's memory. Raises CourierError before anything is
    written where they do not fit to what was asked."""
    if not answer.params and answer.code not in _WITH_PARAMS:
        return list(asked)
    if len(answer.params) != len(asked):
        raise CourierError(f"{len(answer.params)} parameters answer {len(asked)}")
    for param, given in zip(asked, answer.params, strict=True):
        _check(param, given, answer.code)
    return [_answered(param, given, answer.code) for param, given in zip(asked, answer.params, strict=True)]


def _check(asked: Param, given: WireParam, code: int) -> None:
    if given.kind != _kind(asked):
        raise CourierError(f"a parameter of kind {given.kind} answers one of kind {_kind(asked)}")
    if not isinstance(asked, MemRef) or asked.direction is Direction.IN:
        return
    if given.a > asked.size and asked.memory is not None and code != Result.SHORT_BUFFER:
        raise CourierError(f"{given.a} bytes answer {asked.size}")
    if len(given.content) > min(given.a, asked.size if asked.memory is not None else 0):
        raise CourierError("more content than there is room")


def _kind(param: Param) -> int:
    if isinstance(param, Value):
        return param.direction
    return 4 + param.direction if isinstance(param, MemRef) else 0


def _answered(asked: Param, given: WireParam, code: int) -> Param:
    if isinstance(asked, Nothing) or asked.direction is Direction.IN:
        return asked
    if isinstance(asked, Value):
        return Value(asked.direction, given.a, given.b, given.c)
    if asked.memory is not None and given.content and code == Result.SUCCESS:
        asked.memory.write(asked.offset, given.content)
    return MemRef(asked.direction, asked.memory, asked.offset, given.a)
