"""Parameters on their way into a TA and back: everything checked first, memory counted as used, outputs written at
the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.soft.entities import Context, Registration
from tee.soft.ta import MemoryReference, Parameters, TaParam

#: How many parameters a call can have: as many as fit OP-TEE's one page.
MAX_PARAMS = 127

_WORD = 1 << 64
_MASK = _WORD - 1
_DIRECTIONS = (Direction.IN, Direction.OUT, Direction.INOUT)
_OUT = Direction.OUT


#: What the client gave, beside what the TA sees of it.
Pairs = list[tuple[Param, TaParam]]


def admit(params: Sequence[Param], context: Context) -> tuple[Parameters, Pairs, list[Registration]]:
    """Check a client's parameters; returns what the TA sees of them, both as pairs, and the registrations that they
    use.

    Nothing is changed: the caller counts the uses.

    :raises TeeError: BAD_PARAMETERS
    """
    seen = Parameters()
    pairs: Pairs = []
    leases: list[Registration] = []
    if not params:
        return seen, pairs, leases
    if len(params) > MAX_PARAMS:
        raise _bad(f"{len(params)} parameters; {MAX_PARAMS} is the limit")
    for param in params:
        inner: TaParam
        if type(param) is Value:
            inner = _see_value(param)
        elif type(param) is MemRef:
            inner = _see_reference(param, context, leases)
        elif type(param) is Nothing:
            inner = Nothing()
        else:
            raise _bad(f"{type(param).__name__} is no parameter")
        if not param.meta:
            seen.append(inner)
            pairs.append((param, inner))
    return seen, pairs, leases


def pass_on(params: Sequence[TaParam]) -> tuple[Parameters, list[tuple[TaParam, TaParam]]]:
    """Check the parameters that a TA gives to another one; returns what that one sees of them, and both as pairs.

    Memory needs no new lease: the outer call, which has it, lasts longer. Raises BAD_PARAMETERS.
    """
    seen = Parameters()
    pairs: list[tuple[TaParam, TaParam]] = []
    if len(params) > MAX_PARAMS:
        raise _bad(f"{len(params)} parameters; {MAX_PARAMS} is the limit")
    for param in params:
        inner: TaParam
        if type(param) is Value:
            inner = _see_value(param)
        elif type(param) is MemoryReference:
            inner = param.passed_on()
        elif type(param) is Nothing:
            inner = Nothing()
        else:
            raise _bad(f"{type(param).__name__} is no parameter")
        seen.append(inner)
        pairs.append((param, inner))
    return seen, pairs


def bring_back(pairs: Sequence[tuple[TaParam, TaParam]], *, succeeded: bool) -> None:
    """Write what a TA made of another one's parameters back. Raises what its nonsense raises: that is then a panic."""
    for param, inner in pairs:
        if type(param) is Value and type(inner) is Value and param.direction & _OUT:
            param.a, param.b, param.c = inner.a & _MASK, inner.b & _MASK, inner.c & _MASK
        elif type(param) is MemoryReference and type(inner) is MemoryReference and param.direction & _OUT:
            if succeeded and inner.size > inner.capacity and not inner.null:
                raise ValueError("the TA succeeded with an output that it said it had no room for")
            param.told(inner.size)


def write_back(pairs: Pairs) -> None:
    """Write a TA's results into the client's parameters. Raises what a TA's nonsense raises: that is then a panic."""
    for param, inner in pairs:
        if not isinstance(param, Nothing) and param.direction & _OUT:
            if type(param) is Value and type(inner) is Value:
                param.a, param.b, param.c = inner.a & _MASK, inner.b & _MASK, inner.c & _MASK
            elif type(param) is MemRef and type(inner) is MemoryReference:
                param.size = inner.size


def check_sizes(pairs: Pairs) -> None:
    """After a success no output may be larger than its memory. Raises ValueError."""
    for _, inner in pairs:
        if type(inner) is MemoryReference and inner.size > inner.capacity and not inner.null:
            raise ValueError("the TA succeeded with an output that it said it had no room for")


def let_go(pairs: Sequence[tuple[object, TaParam]]) -> None:
    """Take away the views that the TA got: its call has ended."""
    for _, inner in pairs:
        if type(inner) is MemoryReference:
            inner.end()


def registration_of(memory: Memory, context: Context) -> Registration:
    """The registration of ``memory`` in ``context``. Raises BAD_PARAMETERS where it has none that is in force."""
    handle = memory.handle
    if type(handle) is not Registration or handle.memory is not memory or handle.ending:
        raise _bad("the memory is not registered here")
    if handle.context is not context:
        raise _bad("the memory is registered in another context")
    return handle


def _see_value(value: Value) -> Value:
    direction = value.direction
    if direction not in _DIRECTIONS:
        raise _bad(f"direction {direction}")
    if not (0 <= value.a < _WORD and 0 <= value.b < _WORD and 0 <= value.c < _WORD):
        raise _bad("a value is not of 64 bits")
    if direction == _OUT:
        return Value(direction)
    return Value(direction, value.a, value.b, value.c)


def _see_reference(reference: MemRef, context: Context, leases: list[Registration]) -> MemoryReference:
    direction, memory, offset, size = reference.direction, reference.memory, reference.offset, reference.size
    if direction not in _DIRECTIONS:
        raise _bad(f"direction {direction}")
    if memory is None:
        if offset or not 0 <= size < _WORD:
            raise _bad("a NULL reference has no offset, and a size of 64 bits")
        return MemoryReference(direction, None, 0, size)
    if offset < 0 or size < 0 or offset + size > memory.size:
        raise _bad(f"{size} bytes at {offset} are outside a memory of {memory.size} bytes")
    if memory.read_only and direction & _OUT:
        raise _bad("read-only memory cannot be an output")
    if memory.handle is not None:
        leases.append(registration_of(memory, context))
    elif size and not memory.segments:
        raise _bad("the memory is neither registered nor within reach")
    return MemoryReference(direction, memory, offset, size)


def _bad(why: str) -> TeeError:
    return TeeError(Result.BAD_PARAMETERS, Origin.TEE, why)
