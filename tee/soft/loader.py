"""Loading a TA from the caller's supplicant: asked for over RPC, verified, and only then executed.

The conversation is OP-TEE's: LOAD_TA without memory asks for the size, SHM_ALLOC for memory of that size, LOAD_TA
with that memory for the content, SHM_FREE gives the memory back, whatever happened. The supplicant is not trusted:
its codes, sizes and memory are checked, the bytes are copied once and only the copy is looked at.
"""

from __future__ import annotations

import itertools
import sys
import types
from collections.abc import Awaitable, Callable, Sequence
from uuid import UUID

from tee import package
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import RpcCommand
from tee.soft.entities import Program
from tee.soft.outside import FREE_TIMEOUT, Outside, nonsense
from tee.soft.scheduler import Task
from tee.soft.ta import TrustedApplication

__all__ = ["FREE_TIMEOUT", "Loader", "execute"]

#: With these codes a supplicant has no such TA, or is none.
_NOT_THERE = frozenset({Result.ITEM_NOT_FOUND, Result.NOT_SUPPORTED, Result.COMMUNICATION})

_module_numbers = itertools.count(1)


class Loader:
    """Fetches and makes programs. ``keys`` are the public keys of those who may sign TAs, ``limit`` bytes the largest
    package.

    ``outside`` asks the supplicants, ``on_host`` the host, for what they have not.
    """

    def __init__(
        self,
        keys: Sequence[bytes | package.PublicKey],
        limit: int,
        outside: Outside,
        on_host: Callable[[Task, UUID], Awaitable[bytes | None]],
    ) -> None:
        self._keys = tuple(package.load_public_key(key) for key in keys)
        self._limit = limit
        self._outside = outside
        self._on_host = on_host

    async def load(self, task: Task, uuid: UUID) -> Program:
        """The program of ``uuid``, fetched for ``task`` from its caller's supplicant, or else from the host.

        :raises TeeError: ITEM_NOT_FOUND where neither has one; what it failed with; COMMUNICATION where its
            answers make no sense; SECURITY or BAD_FORMAT where the package is not one to be run
        """
        data = await self._fetch(task, uuid)
        return execute(package.verify(data, uuid, self._keys, limit=self._limit))

    async def _fetch(self, task: Task, uuid: UUID) -> bytes:
        try:
            size = await self._load_ta(task, uuid, MemRef(Direction.OUT, None))
        except TeeError as error:
            data = await self._on_host(task, uuid) if error.code in _NOT_THERE else None
            if data is None:
                raise
            return data
        if not size:
            raise TeeError(Result.BAD_FORMAT, Origin.TEE, "the supplicant's TA is empty")
        if size > self._limit:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, f"a TA of {size} bytes; {self._limit} is the limit")
        borrowed = await self._outside.borrow(task, size)
        try:
            given = await self._load_ta(task, uuid, borrowed.part(Direction.OUT, 0, size))
            if given > size:
                raise nonsense(f"the TA grew from {size} to {given} bytes")
            data = borrowed.read(0, given)
        except GeneratorExit:
            self._outside.abandon(borrowed)
            raise
        except BaseException:
            await self._outside.give_back(borrowed)
            raise
        await self._outside.give_back(borrowed)
        return data

    async def _load_ta(self, task: Task, uuid: UUID, reference: MemRef) -> int:
        low, high = (int.from_bytes(half, "little") for half in (uuid.bytes[:8], uuid.bytes[8:]))
        name = Value(Direction.IN, low, high)
        reply = await self._outside.ask(RpcCommand.LOAD_TA, [name, reference])
        answer = reply.params[1] if len(reply.params) == 2 else None
        if not isinstance(answer, MemRef) or answer.direction != Direction.OUT:
            raise nonsense("an answer to LOAD_TA without memory reference")
        if not isinstance(answer.size, int) or answer.size < 0:
            raise nonsense(f"a TA of {answer.size} bytes")
        return answer.size


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
    return Program(ta.uuid, found, ta.version, loaded=True, digest=ta.digest)


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
