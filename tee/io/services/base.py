"""What all services share: how they are called, how they refuse, how they look at parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, TeeError
from tee.results import Result as Result  # for the services: they answer with it


class Allocator(Protocol):
    """Gives memory that the TEE can reach: for SHM_ALLOC and SHM_FREE."""

    def allocate(self, size: int) -> Memory:
        """Memory of at least ``size`` bytes, registered with the TEE. Raises MemoryError or TeeError."""

    def free(self, memory: Memory) -> None:
        """Give back what :meth:`allocate` gave."""


Log = Callable[[str], None]

Service = Callable[[list[Param], Allocator], list[Param]]
"""The parameters of a command → those of the answer. Raises TeeError, ReplyError, OSError, MemoryError, ValueError."""


class ReplyError(Exception):
    """An answer that is not SUCCESS but carries parameters."""

    def __init__(self, code: int, params: list[Param]) -> None:
        super().__init__(code)
        self.code = code
        self.params = params


def refuse(code: int, why: str) -> TeeError:
    """What to raise for an answer without parameters."""
    return TeeError(code, Origin.COMMS, why)


def bad(why: str) -> TeeError:
    """BAD_PARAMETERS."""
    return refuse(Result.BAD_PARAMETERS, why)


def count(params: list[Param], number: int) -> None:
    """Refuse unless there are ``number`` parameters."""
    if len(params) != number:
        raise bad(f"{len(params)} parameters where {number} belong")


def value(params: list[Param], index: int, direction: Direction) -> Value:
    """That parameter, which must be a value."""
    param = params[index] if index < len(params) else None
    if not isinstance(param, Value) or param.direction != direction:
        raise bad(f"parameter {index} is no {direction.name} value")
    return param


def memref(params: list[Param], index: int, direction: Direction) -> MemRef:
    """That parameter, which must be a memory reference; it may be NULL."""
    param = params[index] if index < len(params) else None
    if not isinstance(param, MemRef) or param.direction != direction:
        raise bad(f"parameter {index} is no {direction.name} memory reference")
    return param


def memory_of(reference: MemRef) -> Memory:
    """Its memory; refuses NULL."""
    if reference.memory is None:
        raise bad("a NULL memory reference")
    return reference.memory


def text(reference: MemRef, most: int) -> bytes:
    """The string that ends with NUL within ``reference``, of at most ``most`` bytes. Copied before it is looked at."""
    data = memory_of(reference).read(reference.offset, min(reference.size, most + 1))
    end = data.find(0)
    if end < 0:
        raise bad(f"a string of more than {most} bytes" if len(data) > most else "a string without an end")
    return data[:end]


def put(reference: MemRef, data: bytes) -> MemRef:
    """Copy ``data`` to the begin of ``reference``; the reference to answer with."""
    if len(data) > reference.size:
        raise bad(f"{len(data)} bytes for a memory reference of {reference.size}")
    memory_of(reference).write(reference.offset, data)
    return MemRef(reference.direction, reference.memory, reference.offset, len(data))


def resized(reference: MemRef, size: int) -> MemRef:
    """``reference`` with another size: what is or would be there."""
    return MemRef(reference.direction, reference.memory, reference.offset, size)
