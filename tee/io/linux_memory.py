"""Memory of calls as a Linux TEE device takes it: in place where that can be, else by copies."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tee.driver import GenCap
from tee.io.bounce import Part, Taken
from tee.io.gather import CannotGatherError, gathered, map_count
from tee.io.linux import Answer, LinuxTee, RawParam, Shm
from tee.linux.ioctls import ATTR_META, MEMREF_NULL, ParamType
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError

PIECE = 1 << 18
"""Bytes that are copied before others have their turn."""

_WORD = 1 << 64
_VALUES = {Direction.IN: ParamType.VALUE_IN, Direction.OUT: ParamType.VALUE_OUT, Direction.INOUT: ParamType.VALUE_INOUT}
_MEMREFS = {
    Direction.IN: ParamType.MEMREF_IN,
    Direction.OUT: ParamType.MEMREF_OUT,
    Direction.INOUT: ParamType.MEMREF_INOUT,
}


@dataclass(frozen=True, slots=True)
class Placing:
    """What there is for using memory in place. ``most_pieces``: of one region, so that all ``threads`` together use no
    more than half of the mappings that the process may have."""

    zero_copy: bool
    can_register: bool
    most_pieces: int

    @classmethod
    def of(cls, gen_caps: int, *, zero_copy: bool, threads: int) -> Placing:
        """For a TEE with these capabilities."""
        return cls(zero_copy, bool(gen_caps & GenCap.REG_MEM), map_count() // 2 // threads)


class Region:
    """A registered memory; its ``handle``. The TEE gets to know it when a call names it first: what is only ever used
    for answers to RPCs costs nothing, and its registration waits for no thread of the TEE."""

    def __init__(self, memory: Memory, context: object, owner: object) -> None:
        self.memory = memory
        self.context = context
        self.owner = owner
        self.users = 0
        self._lock = threading.Lock()
        self._shm: Shm | None = None
        self._why: str | None = None

    @property
    def in_place(self) -> bool:
        """Whether the TEE has it."""
        return self._shm is not None

    @property
    def copied(self) -> bool:
        """Whether it was found to be of no use to the TEE."""
        return bool(self._why)

    def shm(self, device: LinuxTee, placing: Placing, placed: Callable[[str], None]) -> Shm | None:
        """What the TEE knows it as; None where it has to be copied. ``placed`` is told, once, why ("" if in place).
        May block."""
        with self._lock:
            if self._why is None:
                self._shm, self._why = _share(self.memory, device, placing)
                placed(self._why)
            return self._shm

    def close(self) -> None:
        """The TEE shall forget it. May block."""
        shm, self._shm = self._shm, None
        if shm is not None:
            shm.close()


def _share(memory: Memory, device: LinuxTee, placing: Placing) -> tuple[Shm | None, str]:
    """Share it in place, or say why not."""
    if not placing.zero_copy:
        return None, "zero copy is switched off"
    if memory.read_only:
        return None, "read-only"
    if not placing.can_register:
        return None, "the TEE takes no registered memory"
    if not memory.size:
        return None, "empty"
    try:
        with gathered(memory.segments, placing.most_pieces) as address:
            return device.register_at(address, memory.size), ""
    except CannotGatherError as error:
        return None, str(error)
    except (TypeError, ValueError):
        return None, "not writable here"
    except OSError as error:
        return None, f"the kernel refuses it: {errno.errorcode.get(error.errno or 0, 'an unknown error')}"


@dataclass(slots=True)
class _Copy:
    """Bytes of a memory, and where they stand for the TEE."""

    param: MemRef
    pieces: list[memoryview]
    taken: Taken

    def copy_in(self) -> None:
        at = 0
        for piece in self.pieces:
            for start in range(0, len(piece), PIECE):
                part = piece[start : start + PIECE]
                self.taken.view[at : at + len(part)] = part
                at += len(part)

    def copy_out(self, size: int, store: Callable[[memoryview, memoryview], bool]) -> None:
        at = 0
        for piece in self.pieces:
            for start in range(0, min(len(piece), size - at), PIECE):
                part = piece[start : min(start + PIECE, start + size - at)]
                if not store(part, self.taken.view[at : at + len(part)]):
                    return
                at += len(part)


class Marshalled:
    """The parameters of one call, as the kernel takes them."""

    def __init__(
        self, params: Sequence[Param], part: Part, shm_of: Callable[[Region], Shm | None], *, nulls: bool
    ) -> None:
        """``part`` has room for what must be copied. ``nulls``: the TEE knows NULL references.

        :raises TeeError: something makes no sense, or is more than there is room for; nothing was copied
        """
        self._params = params
        self._part = part
        self._copies: dict[int, _Copy] = {}
        shms = [_shm(param, shm_of, nulls) if isinstance(param, MemRef) else None for param in params]
        copied = [
            param
            for param, shm in zip(params, shms, strict=True)
            if isinstance(param, MemRef) and param.memory is not None and shm is None
        ]
        needed = sum(Part.needed(param.size) for param in copied)
        if needed > part.size:
            raise TeeError(
                Result.OUT_OF_MEMORY, Origin.COMMS, f"{needed} bytes to be copied, where {part.size} are the most"
            )
        try:
            self.raw = [self._raw(*one) for one in zip(range(len(params)), params, shms, strict=True)]
        except BaseException:
            part.clear()
            raise

    def _raw(self, number: int, param: Param, shm: Shm | None) -> RawParam:
        meta = ATTR_META if param.meta else 0
        if isinstance(param, Value):
            words = (param.a, param.b, param.c) if param.direction.is_input else (0, 0, 0)
            if any(not 0 <= word < _WORD for word in words):
                raise TeeError(Result.BAD_PARAMETERS, Origin.API, "a word has 64 bits")
            return _VALUES[param.direction] | meta, *words
        if not isinstance(param, MemRef):
            return ParamType.NONE | meta, 0, 0, 0
        attr = _MEMREFS[param.direction] | meta
        if param.memory is None:
            return attr, 0, param.size, MEMREF_NULL
        if shm is not None:
            return attr, param.offset, param.size, shm.id
        taken = self._part.take(param.size)
        self._copies[number] = copy = _Copy(param, param.memory.pieces(param.offset, param.size), taken)
        if param.direction.is_input:
            copy.copy_in()
        return attr, taken.offset, param.size, taken.ident

    def finish(self, answer: Answer, store: Callable[[memoryview, memoryview], bool]) -> None:
        """Write what came back into the parameters. ``store`` copies bytes to a client's memory (to, from), and says
        whether to go on."""
        for number, (param, (_, a, b, c)) in enumerate(zip(self._params, answer.params, strict=True)):
            if isinstance(param, Value) and param.direction.is_output:
                param.a, param.b, param.c = a, b, c
            elif isinstance(param, MemRef) and param.direction.is_output:
                copy = self._copies.get(number)
                if copy is not None and b <= param.size:
                    copy.copy_out(b, store)
                param.size = b

    def close(self) -> None:
        """Nothing of it is used any more."""
        self._copies.clear()
        self._part.clear()


def _shm(param: MemRef, shm_of: Callable[[Region], Shm | None], nulls: bool) -> Shm | None:
    """The shared memory of a reference, which is checked; None where it has to be copied, or is NULL."""
    memory = param.memory
    if not 0 <= param.size < _WORD:
        raise TeeError(Result.BAD_PARAMETERS, Origin.API, "an impossible size")
    if memory is None:
        if not nulls:
            raise TeeError(Result.NOT_SUPPORTED, Origin.API, "this TEE knows no NULL references")
        return None
    if param.offset < 0 or param.offset + param.size > memory.size:
        raise TeeError(Result.BAD_PARAMETERS, Origin.API, "outside of its memory")
    if memory.read_only and param.direction.is_output:
        raise TeeError(Result.BAD_PARAMETERS, Origin.API, "read-only memory for an output")
    if memory.size and not memory.segments:
        raise TeeError(Result.NOT_SUPPORTED, Origin.API, "memory that this side has no mapping of")
    return shm_of(memory.handle) if isinstance(memory.handle, Region) else None
