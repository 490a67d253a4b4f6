"""What the TEE itself asks of a caller's supplicant, which is not trusted: shared memory that is surely given back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType
from tee.soft.entities import Context, Registration
from tee.soft.scheduler import CallOut, Task, suspend

#: How long to wait for the answer to SHM_FREE, in seconds: a supplicant that never answers must not keep a call, nor
#: a context.
FREE_TIMEOUT = 10.0

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


@dataclass(slots=True, eq=False)
class Borrowed:
    """Memory of a supplicant, or of the client, ``size`` bytes at ``offset`` of a registered one; it stays while it is
    borrowed."""

    registration: Registration
    reference: MemRef
    offset: int
    size: int
    of_client: bool = False

    def part(self, direction: Direction, offset: int, size: int) -> MemRef:
        """A reference to a part of it."""
        return MemRef(direction, self.registration.memory, self.offset + offset, size)

    def read(self, offset: int, size: int) -> bytes:
        """A private copy. Raises ValueError where the memory is gone."""
        return self.registration.memory.read(self.offset + offset, size)

    def write(self, offset: int, data: bytes) -> None:
        """Copy in. Raises ValueError where the memory is gone."""
        self.registration.memory.write(self.offset + offset, data)


class Outside:
    """Asks supplicants. ``new_use`` and ``end_use`` count the uses of a registration, so that memory stays while it is
    used.
    """

    def __init__(self, new_use: Callable[[Registration], None], end_use: Callable[[Registration], None]) -> None:
        self._new_use = new_use
        self._end_use = end_use

    async def ask(
        self,
        command: RpcCommand,
        params: list[Param],
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        to_client: bool = False,
    ) -> RpcReply:
        """The answer to ``command``. Raises TeeError where it is not SUCCESS."""
        reply: RpcReply = await suspend(CallOut(Rpc(command, params, to_client=to_client), timeout=timeout))
        if reply.code != Result.SUCCESS:
            code = reply.code if reply.code in _PASSED_ON else Result.GENERIC
            raise TeeError(code, Origin.TEE, f"{command.name} failed")
        return reply

    async def borrow(
        self,
        task: Task,
        size: int,
        timeout: float | None = None,  # noqa: ASYNC109
        *,
        to_client: bool = False,
    ) -> Borrowed:
        """SHM_ALLOC. Raises TeeError; COMMUNICATION for memory that cannot be used, which is given back first."""
        request = Value(Direction.IN, ShmType.APPLICATION, size, 8)
        reply = await self.ask(RpcCommand.SHM_ALLOC, [request], timeout, to_client=to_client)
        reference, registration = _memory_of(reply, task.context)
        borrowed = Borrowed(registration, reference, reference.offset, size, to_client)
        self._new_use(registration)
        memory = registration.memory
        try:
            if reference.size < size or reference.offset + reference.size > memory.size:
                raise nonsense(f"memory of {reference.size} bytes where {size} were asked for")
            if memory.read_only or not memory.segments:
                raise nonsense("memory that cannot be used")
        except TeeError:
            await self.give_back(borrowed)
            raise
        return borrowed

    async def give_back(self, borrowed: Borrowed) -> None:
        """SHM_FREE. What the supplicant answers does not matter; no cancel keeps it from being sent."""
        self.abandon(borrowed)
        reference = borrowed.reference
        params: list[Param] = [
            Value(Direction.IN, ShmType.APPLICATION),
            MemRef(Direction.INOUT, reference.memory, reference.offset, reference.size),
        ]
        rpc = Rpc(RpcCommand.SHM_FREE, params, to_client=borrowed.of_client)
        try:
            await suspend(CallOut(rpc, shielded=True, timeout=FREE_TIMEOUT))
        except TeeError:
            return

    def abandon(self, borrowed: Borrowed) -> None:
        """The memory is no longer used, and nobody is told: for what is ended from outside and cannot wait."""
        self._end_use(borrowed.registration)


def nonsense(why: str) -> TeeError:
    """What a supplicant's answer is that cannot be."""
    return TeeError(Result.COMMUNICATION, Origin.TEE, f"the supplicant gave {why}")


def _memory_of(reply: RpcReply, context: Context) -> tuple[MemRef, Registration]:
    """The memory that SHM_ALLOC answered, checked to be a registration of the caller's own machine."""
    reference = reply.params[0] if len(reply.params) == 1 else None
    if not isinstance(reference, MemRef) or reference.memory is None:
        raise nonsense("an answer to SHM_ALLOC without memory")
    registration = reference.memory.handle
    if not isinstance(registration, Registration) or registration.memory is not reference.memory or registration.ending:
        raise nonsense("memory that is not registered")
    if registration.context.tee is not context.tee or registration.context.vm != context.vm:
        raise nonsense("memory of another machine")
    if reference.offset < 0 or reference.size < 0:
        raise nonsense("memory with a negative place")
    return reference, registration
