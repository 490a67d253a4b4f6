"""Loading a TA from the caller's supplicant: asked for over RPC, verified, and only then executed.

The conversation is OP-TEE's: LOAD_TA without memory asks for the size, SHM_ALLOC for memory of that size, LOAD_TA
with that memory for the content, SHM_FREE gives the memory back, whatever happened. The supplicant is not trusted:
its codes, sizes and memory are checked, the bytes are copied once and only the copy is looked at.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Callable, Sequence
from uuid import UUID

from tee import package
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType
from tee.soft.entities import Context, Program, Registration
from tee.soft.scheduler import CallOut, Task, suspend
from tee.soft.ta import TrustedApplication

#: What a supplicant's failure is passed on as; any other code becomes GENERIC.
_PASSED_ON = frozenset(
    {
        Result.ACCESS_DENIED,
        Result.BUSY,
        Result.COMMUNICATION,
        Result.ITEM_NOT_FOUND,
        Result.NOT_SUPPORTED,
        Result.OUT_OF_MEMORY,
    }
)

#: How long to wait for the answer to SHM_FREE, in seconds: a supplicant that never answers must not keep a call, nor
#: a context.
FREE_TIMEOUT = 10.0

_module_numbers = itertools.count(1)


class Loader:
    """Fetches and makes programs. ``keys`` are the public keys of those who may sign TAs, ``limit`` bytes the largest
    package.

    ``new_use`` and ``end_use`` count the uses of a registration, so that memory stays while it is read.
    """

    def __init__(
        self,
        keys: Sequence[bytes | package.PublicKey],
        limit: int,
        new_use: Callable[[Registration], None],
        end_use: Callable[[Registration], None],
    ) -> None:
        self._keys = tuple(package.load_public_key(key) for key in keys)
        self._limit = limit
        self._new_use = new_use
        self._end_use = end_use

    async def load(self, task: Task, uuid: UUID) -> Program:
        """The program of ``uuid``, fetched for ``task`` from its caller's supplicant.

        :raises TeeError: ITEM_NOT_FOUND where the supplicant has none; what it failed with; COMMUNICATION where its
            answers make no sense; SECURITY or BAD_FORMAT where the package is not one to be run
        """
        data = await self._fetch(task, uuid)
        return execute(package.verify(data, uuid, self._keys, limit=self._limit))

    async def _fetch(self, task: Task, uuid: UUID) -> bytes:
        size = await self._load_ta(task, uuid, MemRef(Direction.OUT, None))
        if not size:
            raise TeeError(Result.BAD_FORMAT, Origin.TEE, "the supplicant's TA is empty")
        if size > self._limit:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, f"a TA of {size} bytes; {self._limit} is the limit")
        reply = await self._ask(task, RpcCommand.SHM_ALLOC, [_shm_type(size, alignment=8)])
        reference, registration = _memory_of(reply, task.context)
        self._new_use(registration)
        try:
            if reference.size < size or reference.offset + reference.size > registration.memory.size:
                raise _nonsense(f"memory of {reference.size} bytes where {size} were asked for")
            if registration.memory.read_only or not registration.memory.segments:
                raise _nonsense("memory that cannot be used")
            target = MemRef(Direction.OUT, registration.memory, reference.offset, size)
            given = await self._load_ta(task, uuid, target)
            if given > size:
                raise _nonsense(f"the TA grew from {size} to {given} bytes")
            return registration.memory.read(reference.offset, given)
        finally:
            self._end_use(registration)
            await self._free(task, reference)

    async def _load_ta(self, task: Task, uuid: UUID, reference: MemRef) -> int:
        low, high = (int.from_bytes(half, "little") for half in (uuid.bytes[:8], uuid.bytes[8:]))
        name = Value(Direction.IN, low, high)
        reply = await self._ask(task, RpcCommand.LOAD_TA, [name, reference])
        answer = reply.params[1] if len(reply.params) == 2 else None
        if not isinstance(answer, MemRef) or answer.direction != Direction.OUT:
            raise _nonsense("an answer to LOAD_TA without memory reference")
        if not isinstance(answer.size, int) or answer.size < 0:
            raise _nonsense(f"a TA of {answer.size} bytes")
        return answer.size

    async def _ask(self, task: Task, command: RpcCommand, params: list[Param]) -> RpcReply:
        reply: RpcReply = await suspend(CallOut(Rpc(command, params, task.call)))
        if reply.code != Result.SUCCESS:
            code = reply.code if reply.code in _PASSED_ON else Result.GENERIC
            raise TeeError(code, Origin.TEE, f"{command.name} failed")
        return reply

    async def _free(self, task: Task, reference: MemRef) -> None:
        """SHM_FREE. What the supplicant answers does not matter; no cancel keeps it from being sent."""
        params: list[Param] = [
            Value(Direction.IN, ShmType.APPLICATION),
            MemRef(Direction.INOUT, reference.memory, reference.offset, reference.size),
        ]
        rpc = Rpc(RpcCommand.SHM_FREE, params, task.call)
        try:
            await suspend(CallOut(rpc, shielded=True, timeout=FREE_TIMEOUT))
        except TeeError:
            return


def execute(ta: package.VerifiedTa) -> Program:
    """Run the module of a verified package and find its TA.

    :raises TeeError: BAD_FORMAT where the module does not run or has not exactly one TA; SECURITY where that has
        another UUID
    """
    name = f"virtio_tee_ta_{ta.uuid.hex}_{next(_module_numbers)}"
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses and the like look their module up while it runs
    try:
        exec(compile(ta.payload, f"<TA {ta.uuid}>", "exec", dont_inherit=True), module.__dict__)
    except (Exception, SystemExit) as error:
        raise TeeError(Result.BAD_FORMAT, Origin.TEE, f"the TA's module fails: {error!r}") from error
    finally:
        del sys.modules[name]
    found = _find(module)
    if getattr(found, "uuid", None) != ta.uuid:
        raise TeeError(Result.SECURITY, Origin.TEE, f"the package of {ta.uuid} holds a TA of another UUID")
    return Program(ta.uuid, found, ta.version)


def _find(module: types.ModuleType) -> type[TrustedApplication]:
    named = module.__dict__.get("TA")
    if isinstance(named, type) and issubclass(named, TrustedApplication):
        return named
    own = [
        value
        for value in module.__dict__.values()
        if isinstance(value, type) and issubclass(value, TrustedApplication) and value.__module__ == module.__name__
    ]
    if len(own) != 1:
        raise TeeError(Result.BAD_FORMAT, Origin.TEE, f"the module has {len(own)} TAs; it must have one, or say TA = …")
    return own[0]


def _memory_of(reply: RpcReply, context: Context) -> tuple[MemRef, Registration]:
    """The memory that SHM_ALLOC answered, checked to be a registration of the caller's own machine."""
    reference = reply.params[0] if len(reply.params) == 1 else None
    if not isinstance(reference, MemRef) or reference.memory is None:
        raise _nonsense("an answer to SHM_ALLOC without memory")
    registration = reference.memory.handle
    if not isinstance(registration, Registration) or registration.memory is not reference.memory or registration.ending:
        raise _nonsense("memory that is not registered")
    if registration.context.tee is not context.tee or registration.context.vm != context.vm:
        raise _nonsense("memory of another machine")
    if reference.offset < 0 or reference.size < 0:
        raise _nonsense("memory with a negative place")
    return reference, registration


def _shm_type(size: int, alignment: int) -> Value:
    return Value(Direction.IN, ShmType.APPLICATION, size, alignment)


def _nonsense(why: str) -> TeeError:
    return TeeError(Result.COMMUNICATION, Origin.TEE, f"the supplicant gave {why}")
