"""The supplicant: what a TEE asks of the normal world (LOAD_TA, shared memory), over any driver.

One :class:`Supplicant` serves one TEE; :meth:`Supplicant.serve` takes an RPC and gives its answer, blocking where it
reads files. It is used by guests, by the host's broker and by tests.

What it serves is the table :data:`SERVICES`; anything else is answered NOT_SUPPORTED. It never names a path to the
TEE, never opens a file outside its folders (a file name is made from a UUID's 128 bits only; symbolic links are not
followed), and bounds what it reads and what it allocates.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Protocol
from uuid import UUID

from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType

#: The largest TA file in bytes.
MAX_TA_SIZE = 16 << 20

#: How many bytes a TEE may have allocated here at once.
MAX_SHARED_MEMORY = 64 << 20

#: How many allocations it may have at once.
MAX_ALLOCATIONS = 1024

#: Alignments above this (bytes) are refused; memory that a driver allocates is aligned to pages where that matters to
#: it.
MAX_ALIGNMENT = 4096


class Allocator(Protocol):
    """Gives memory that the TEE can reach: for SHM_ALLOC and SHM_FREE."""

    def allocate(self, size: int) -> Memory:
        """Memory of at least ``size`` bytes, registered with the TEE. Raises MemoryError or TeeError."""

    def free(self, memory: Memory) -> None:
        """Give back what :meth:`allocate` gave."""


class RpcServer(Protocol):
    """Whatever answers RPCs: a :class:`Supplicant`, or one in another process."""

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """The answer to ``rpc``. Never raises."""

    def forget(self, memory: Memory) -> None:
        """Free an allocation whose answer never reached the TEE. Nothing where it is not one."""

    def close(self) -> None:
        """Give back all that is held for the TEE."""


Log = Callable[[str], None]


class Supplicant:
    """The services over ``ta_folders``, which are searched in order for ``<uuid>.ta``.

    Not thread-safe: one thread calls :meth:`serve`.
    """

    def __init__(
        self,
        ta_folders: Sequence[str | os.PathLike[str]] = (),
        *,
        max_ta_size: int = MAX_TA_SIZE,
        max_shared_memory: int = MAX_SHARED_MEMORY,
        log: Log | None = None,
    ) -> None:
        self._folders = tuple(Path(folder) for folder in ta_folders)
        self._max_ta_size = max_ta_size
        self._max_shared_memory = max_shared_memory
        self._log = log if log is not None else _no_log
        self._shared: dict[int, tuple[Memory, Allocator]] = {}  # by the identity of the memory
        self._shared_bytes = 0

    @property
    def shared_memory(self) -> tuple[int, int]:
        """How many allocations the TEE has here, and of how many bytes together."""
        return len(self._shared), self._shared_bytes

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """The answer to ``rpc``; ``allocator`` gives and takes the memory of SHM_ALLOC and SHM_FREE. Never raises."""
        service = SERVICES.get(rpc.command)
        if service is None:
            return RpcReply(Result.NOT_SUPPORTED)
        try:
            return RpcReply(Result.SUCCESS, service(self, rpc.params, allocator))
        except _ReplyError as error:
            return RpcReply(error.code, error.params)
        except TeeError as error:
            self._log(f"RPC {rpc.command}: {error}")
            return RpcReply(error.code)
        except MemoryError:
            return RpcReply(Result.OUT_OF_MEMORY)
        except OSError as error:
            self._log(f"RPC {rpc.command}: {error}")
            return RpcReply(Result.GENERIC)

    def close(self) -> None:
        """Free all that the TEE has not."""
        for memory, allocator in tuple(self._shared.values()):
            self._drop(memory, allocator)

    def forget(self, memory: Memory) -> None:
        """Free an allocation whose answer never reached the TEE. Nothing where it is not one."""
        held = self._shared.get(id(memory))
        if held is not None:
            self._drop(*held)

    # The services. Each takes the parameters of its command and gives those of the answer.

    def load_ta(self, params: list[Param], _: Allocator) -> list[Param]:
        """LOAD_TA, as the real supplicant does it: without memory it answers the size; where the memory is too small
        SHORT_BUFFER, with the size."""
        name, target = _two(params)
        if not isinstance(name, Value) or name.direction != Direction.IN:
            raise _bad("LOAD_TA names its TA by a value")
        if not isinstance(target, MemRef) or target.direction != Direction.OUT:
            raise _bad("LOAD_TA has a memory reference for its answer")
        try:
            uuid = UUID(bytes=name.a.to_bytes(8, "little") + name.b.to_bytes(8, "little"))
        except OverflowError:
            raise _bad("LOAD_TA names its TA by two words of 64 bits") from None
        fd = self._open(uuid)
        try:
            size = os.fstat(fd).st_size
            if size > self._max_ta_size:
                raise TeeError(Result.OUT_OF_MEMORY, Origin.COMMS, f"{uuid}.ta has {size} bytes")
            answer = MemRef(Direction.OUT, target.memory, target.offset, size)
            if target.memory is None:
                return [name, answer]
            if size > target.size:
                raise _ReplyError(Result.SHORT_BUFFER, [name, answer])
            answer.size = _read_into(fd, target.memory, target.offset, size)
            return [name, answer]
        finally:
            os.close(fd)

    def allocate(self, params: list[Param], allocator: Allocator) -> list[Param]:
        """SHM_ALLOC."""
        if len(params) != 1 or not isinstance(request := params[0], Value):
            raise _bad("SHM_ALLOC has one value")
        kind, size, alignment = request.a, request.b, request.c
        if kind not in (ShmType.APPLICATION, ShmType.GLOBAL):
            raise _bad(f"memory of type {kind} is not a supplicant's")
        if alignment > MAX_ALIGNMENT or alignment & (alignment - 1):
            raise _bad(f"an alignment of {alignment}")
        if not 0 < size <= self._max_shared_memory - self._shared_bytes or len(self._shared) >= MAX_ALLOCATIONS:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.COMMS, f"{size} bytes on top of {self._shared_bytes}")
        memory = allocator.allocate(size)
        self._shared[id(memory)] = (memory, allocator)
        self._shared_bytes += memory.size
        return [MemRef(Direction.INOUT, memory, 0, size)]

    def free(self, params: list[Param], _: Allocator) -> list[Param]:
        """SHM_FREE."""
        kind, reference = _two(params)
        if not isinstance(kind, Value) or not isinstance(reference, MemRef) or reference.memory is None:
            raise _bad("SHM_FREE has a value and a memory reference")
        held = self._shared.get(id(reference.memory))
        if held is None:
            raise _bad("SHM_FREE of memory that is not allocated here")
        self._drop(*held)
        return []

    def _drop(self, memory: Memory, allocator: Allocator) -> None:
        del self._shared[id(memory)]
        self._shared_bytes -= memory.size
        try:
            allocator.free(memory)
        except TeeError as error:  # the TEE is gone; so is its hold on the memory
            self._log(f"shared memory is not freed: {error}")

    def _open(self, uuid: UUID) -> int:
        """A file descriptor of the TA's file: a regular file, directly in one of the folders."""
        for folder in self._folders:
            try:
                # Not blocking: a FIFO of that name must not hold the supplicant.
                fd = os.open(folder / f"{uuid}.ta", os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
            except OSError as error:
                if not isinstance(error, FileNotFoundError):
                    self._log(f"{uuid}.ta: {error}")
                continue
            if stat.S_ISREG(os.fstat(fd).st_mode):
                return fd
            self._log(f"{uuid}.ta is not a regular file")
            os.close(fd)
        raise TeeError(Result.ITEM_NOT_FOUND, Origin.COMMS, f"there is no {uuid}.ta")


Service = Callable[[Supplicant, list[Param], Allocator], list[Param]]

#: What is served, by command.
SERVICES: dict[int, Service] = {
    RpcCommand.LOAD_TA: Supplicant.load_ta,
    RpcCommand.SHM_ALLOC: Supplicant.allocate,
    RpcCommand.SHM_FREE: Supplicant.free,
}


class _ReplyError(Exception):
    """An answer that is not SUCCESS but carries parameters."""

    def __init__(self, code: int, params: list[Param]) -> None:
        super().__init__(code)
        self.code = code
        self.params = params


def _two(params: list[Param]) -> tuple[Param, Param]:
    return (params[0], params[1]) if len(params) == 2 else (Nothing(), Nothing())


def _read_into(fd: int, memory: Memory, offset: int, size: int) -> int:
    """Read up to ``size`` bytes of a file into ``memory``; returns how many there were."""
    with closing(os.fdopen(fd, "rb", buffering=0, closefd=False)) as file:
        try:
            view = memory.view(offset, size)
            if view is None:
                data = file.read(size)
                memory.write(offset, data)
                return len(data)
        except ValueError as error:
            raise _bad(str(error)) from None
        done = 0
        while done < size:
            count = file.readinto(view[done:])
            if not count:
                break
            done += count
        return done


def _bad(why: str) -> TeeError:
    return TeeError(Result.BAD_PARAMETERS, Origin.COMMS, why)


def _no_log(_: str) -> None:
    return
