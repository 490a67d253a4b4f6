"""What a client is called with: the handler of OCALLs that it gives to ``invoke`` and ``open_session``.

>>> def handler(ocall):                                                                   # doctest: +SKIP
...     if ocall.function != 7:
...         raise TeeError(Result.NOT_SUPPORTED)
...     ocall.memory(0).put(b"what the TA wanted to know")

A handler returns a result code, or None for SUCCESS; :class:`~tee.results.TeeError` is its code, any other exception
is logged and GENERIC. It runs on a thread of its own, several may run at a time, and it may call the TEE itself: in
another session, as the one that it is called from is busy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError

__all__ = ["Handler", "Ocall", "OcallMemory"]


class OcallMemory:
    """Memory in an OCALL, in place: ``direction`` says whether the handler reads it, writes it, or both.

    The TA sees what is written at once. ``capacity`` is how many bytes there are; ``size`` is what the handler tells
    the TA: the bytes that it wrote.
    """

    def __init__(self, reference: MemRef) -> None:
        self._reference = reference
        self.direction = reference.direction
        self.capacity = reference.size if reference.memory is not None else 0

    @property
    def null(self) -> bool:
        """It is the NULL reference."""
        return self._reference.memory is None

    @property
    def size(self) -> int:
        """See the class."""
        return self._reference.size

    @size.setter
    def size(self, size: int) -> None:
        if not 0 <= size <= self.capacity:
            raise ValueError(f"a size of {size} in a reference to {self.capacity} bytes")
        self._reference.size = size

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """A copy of ``size`` bytes (default: all from ``offset`` on). ValueError outside of it."""
        size = self.capacity - offset if size is None else size
        memory = self._within(offset, size)
        return memory.read(self._reference.offset + offset, size) if memory is not None else b""

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Copy ``data`` in. ValueError outside of it, and where the TA only wants it read."""
        if self.direction is Direction.IN:
            raise ValueError("an input is not written to")
        memory = self._within(offset, len(data))
        if memory is not None:
            memory.write(self._reference.offset + offset, data)

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Make ``data`` the answer; SHORT_BUFFER, with the size that is needed, where it does not fit."""
        if len(data) > self.capacity:
            self._reference.size = len(data)
            raise TeeError(Result.SHORT_BUFFER, Origin.API, f"{len(data)} bytes do not fit {self.capacity}")
        self.write(data)
        self._reference.size = len(data)

    def _within(self, offset: int, size: int) -> Memory | None:
        if offset < 0 or size < 0 or offset + size > self.capacity:
            raise ValueError(f"{size} bytes at {offset} of {self.capacity} bytes")
        return self._reference.memory


OcallParam = Value | OcallMemory | Nothing


@dataclass(frozen=True, slots=True)
class Ocall:
    """One call from a TA: ``function`` is its number (32 bits). Values in ``params`` are changed in place."""

    function: int
    params: tuple[OcallParam, ...]

    def value(self, index: int) -> Value:
        """The value at ``index``. TeeError BAD_PARAMETERS where it is none."""
        param = self.params[index] if 0 <= index < len(self.params) else None
        if not isinstance(param, Value):
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, f"parameter {index} of the OCALL must be a value")
        return param

    def memory(self, index: int) -> OcallMemory:
        """The memory at ``index``. TeeError BAD_PARAMETERS where it is none."""
        param = self.params[index] if 0 <= index < len(self.params) else None
        if not isinstance(param, OcallMemory):
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, f"parameter {index} of the OCALL must be memory")
        return param


Handler = Callable[[Ocall], int | None]


def run(handler: Handler, function: int, params: list[Param]) -> int:
    """Call ``handler``; results are in ``params`` then. Raises what it raises."""
    seen = tuple(OcallMemory(param) if isinstance(param, MemRef) else param for param in params)
    code = handler(Ocall(function, seen))
    return Result.SUCCESS if code is None else code & 0xFFFF_FFFF
