"""SHM_ALLOC and SHM_FREE: memory that the TEE asks for, within limits."""

from __future__ import annotations

from tee.io.services.base import Allocator, Log, Result, bad, refuse
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import TeeError
from tee.rpc import ShmType

#: How many bytes a TEE may have allocated here at once.
MAX_SHARED_MEMORY = 64 << 20

#: How many allocations it may have at once.
MAX_ALLOCATIONS = 1024

#: Alignments above this (bytes) are refused; memory that a driver allocates is aligned to pages where that matters to
#: it.
MAX_ALIGNMENT = 4096


class SharedMemory:
    """What one TEE has allocated."""

    def __init__(self, max_bytes: int, log: Log) -> None:
        self._max_bytes = max_bytes
        self._log = log
        self._held: dict[int, tuple[Memory, Allocator]] = {}  # by the identity of the memory
        self._bytes = 0

    @property
    def usage(self) -> tuple[int, int]:
        """How many allocations there are, and of how many bytes together."""
        return len(self._held), self._bytes

    def allocate(self, params: list[Param], allocator: Allocator) -> list[Param]:
        """SHM_ALLOC."""
        if len(params) != 1 or not isinstance(request := params[0], Value):
            raise bad("SHM_ALLOC has one value")
        kind, size, alignment = request.a, request.b, request.c
        if kind not in (ShmType.APPLICATION, ShmType.GLOBAL):
            raise bad(f"memory of type {kind} is not a supplicant's")
        if alignment > MAX_ALIGNMENT or alignment & (alignment - 1):
            raise bad(f"an alignment of {alignment}")
        if not 0 < size <= self._max_bytes - self._bytes or len(self._held) >= MAX_ALLOCATIONS:
            raise refuse(Result.OUT_OF_MEMORY, f"{size} bytes on top of {self._bytes}")
        memory = allocator.allocate(size)
        self._held[id(memory)] = (memory, allocator)
        self._bytes += memory.size
        return [MemRef(Direction.INOUT, memory, 0, size)]

    def free(self, params: list[Param], _: Allocator) -> list[Param]:
        """SHM_FREE."""
        kind, reference = params if len(params) == 2 else (None, None)
        if not isinstance(kind, Value) or not isinstance(reference, MemRef) or reference.memory is None:
            raise bad("SHM_FREE has a value and a memory reference")
        if not self.forget(reference.memory):
            raise bad("SHM_FREE of memory that is not allocated here")
        return []

    def forget(self, memory: Memory) -> bool:
        """Free an allocation; False where it is not one."""
        held = self._held.pop(id(memory), None)
        if held is None:
            return False
        self._bytes -= memory.size
        try:
            held[1].free(memory)
        except TeeError as error:  # the TEE is gone; so is its hold on the memory
            self._log(f"shared memory is not freed: {error}")
        return True

    def close(self) -> None:
        """Free all that the TEE has not."""
        for memory, _ in tuple(self._held.values()):
            self.forget(memory)
