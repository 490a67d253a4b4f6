"""OCALLs: a TA calls the client that called it. Nothing that comes back is trusted."""

from __future__ import annotations

from collections.abc import Sequence

from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft.outside import Borrowed, Outside
from tee.soft.scheduler import CallOut, Task, suspend
from tee.soft.ta import MemoryReference, TaParam

MAX_PARAMS = 15
"""Of the TA's own, in an OCALL."""

MAX_MEMORY = 16 << 20
"""Bytes of client memory in one piece."""

MAX_PIECES = 16
"""Pieces of client memory that a call may hold."""

_WORD = (1 << 64) - 1
_WITHOUT_HANDLER = frozenset({Result.NOT_SUPPORTED, Result.BUSY, Result.OUT_OF_MEMORY, Result.ACCESS_DENIED})
"""What is passed on where the client's handler was not reached; all else is COMMUNICATION."""


class Ocalls:
    """Makes them. ``outside`` asks for memory."""

    def __init__(self, outside: Outside) -> None:
        self._outside = outside

    async def call(self, task: Task, function: int, params: Sequence[TaParam], timeout: float | None) -> int:  # noqa: ASYNC109
        """See :meth:`tee.soft.ta.Environment.ocall`."""
        if not 0 <= function < 1 << 32 or len(params) > MAX_PARAMS:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"function {function}, {len(params)} parameters")
        asked: list[Param] = [Value(Direction.INOUT, function, meta=True)]
        asked += [_given(param, task) for param in params]
        rpc = Rpc(RpcCommand.OCALL, asked, to_client=True)
        reply: RpcReply = await suspend(CallOut(rpc, timeout=timeout))
        code = reply.code if 0 <= reply.code < 1 << 32 else Result.GENERIC
        if reply.origin != Origin.API:
            code = code if code in _WITHOUT_HANDLER else Result.COMMUNICATION
            raise TeeError(code, Origin.COMMS, "the client's handler was not reached")
        if reply.params or code == Result.SUCCESS:
            _take(params, reply)
        return code

    async def borrow(self, task: Task, size: int) -> Borrowed:
        """See :meth:`tee.soft.ta.Environment.client_memory`."""
        lent = task.more().lent
        if not 0 < size <= MAX_MEMORY or len(lent) >= MAX_PIECES:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, f"{size} bytes of the client's, beside {len(lent)} pieces")
        borrowed = await self._outside.borrow(task, size, to_client=True)
        lent.append(borrowed)
        return borrowed

    def end(self, task: Task) -> None:
        """The call has ended, and what it did not give back goes with it."""
        lent = task.more().lent
        while lent:
            self._outside.abandon(lent.pop())

    async def give_back(self, task: Task, borrowed: Borrowed, *, told: bool) -> None:
        """See :meth:`tee.soft.ta.Environment.client_memory`."""
        task.more().lent.remove(borrowed)
        if told:
            await self._outside.give_back(borrowed)
        else:
            self._outside.abandon(borrowed)


def _given(param: TaParam, task: Task) -> Param:
    if type(param) is Value:
        return Value(param.direction, param.a & _WORD, param.b & _WORD, param.c & _WORD)
    if type(param) is Nothing:
        return Nothing()
    if type(param) is not MemoryReference:
        raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"{type(param).__name__} is no parameter of an OCALL")
    memory = param.memory
    if memory is None:
        return MemRef(param.direction, None, 0, param.size)
    if not _is_clients(memory, task):
        raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "memory that is not the client's")
    if memory.handle is None:
        raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "memory that the client has not registered for this call")
    return MemRef(param.direction, memory, param.offset, param.capacity)


def _is_clients(memory: Memory, task: Task) -> bool:
    if any(type(inner) is MemoryReference and inner.memory is memory for _, inner in task.pairs):
        return True
    return task.rare is not None and any(one.registration.memory is memory for one in task.rare.lent)


def _take(params: Sequence[TaParam], reply: RpcReply) -> None:
    """What came back, into the TA's own parameters. Raises COMMUNICATION for what does not fit."""
    given = reply.params[1:]
    if len(given) != len(params):
        raise TeeError(Result.COMMUNICATION, Origin.COMMS, "an answer with other parameters")
    for param, answer in zip(params, given, strict=True):
        if type(param) is not type(answer) and not (type(param) is MemoryReference and type(answer) is MemRef):
            raise TeeError(Result.COMMUNICATION, Origin.COMMS, "an answer with other parameters")
        if type(param) is MemoryReference and type(answer) is MemRef and param.direction & Direction.OUT:
            fits = answer.size <= param.capacity or param.null or reply.code == Result.SHORT_BUFFER
            if answer.size < 0 or not fits:
                raise TeeError(Result.COMMUNICATION, Origin.COMMS, f"{answer.size} bytes answer {param.capacity}")
            param.told(answer.size)
        elif type(param) is Value and type(answer) is Value and param.direction & Direction.OUT:
            param.a, param.b, param.c = answer.a & _WORD, answer.b & _WORD, answer.c & _WORD
