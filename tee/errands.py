"""RPCs that a broker asks on behalf of a TEE which does not say whose they are: how a driver puts them to its sink.

The broker sends content (:mod:`tee.courier`); a guest is asked as any TEE asks: for memory first (SHM_ALLOC), then
the RPC itself with references to that memory, then SHM_FREE. An :class:`Errand` is one such RPC, from its ASK to its
ANSWER.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from tee.calls import Call
from tee.courier import MAX_CONTENT, NULL, Answer, Ask, WireParam
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType

ALIGNMENT = 8
"""Bytes, of each reference in the memory that is asked for: as OP-TEE aligns them."""

_OUT = 6
"""The kind of a reference whose content does not come with the question."""

_WITH_PARAMS = frozenset({Result.SUCCESS, Result.SHORT_BUFFER})


class Stage(Enum):
    """What an errand waits for."""

    MEMORY = "memory of the guest's"
    ANSWER = "the answer"
    FREE = "the memory to be free again"


@dataclass(slots=True, eq=False)
class Errand:
    """One ASK. ``rpc`` is what the sink has; it is answered by :meth:`answered`. ValueError for one that makes no
    sense."""

    ask: Ask
    call: Call
    stage: Stage = Stage.ANSWER
    rpc: Rpc = field(init=False)
    _memory: MemRef | None = None
    _answer: Answer | None = None

    def __post_init__(self) -> None:
        size = sum(_room(param) for param in self.ask.params)
        if size > MAX_CONTENT:
            raise ValueError(f"{size} bytes in one RPC")
        if any(_room(param) and param.kind != _OUT and len(param.content) != param.a for param in self.ask.params):
            raise ValueError("content that is not as long as its reference")
        if size:
            self.stage = Stage.MEMORY
            self.rpc = self._rpc(RpcCommand.SHM_ALLOC, [Value(Direction.IN, ShmType.APPLICATION, size, ALIGNMENT)])
        else:
            self.rpc = self._main()

    def answered(self, reply: RpcReply) -> Answer | None:
        """The sink's answer to ``rpc``. None: ``rpc`` is another one from here on; else it has ended."""
        try:
            return self._next(reply)
        except ValueError:  # the guest's memory has gone
            return Answer(self.ask.ask, Result.COMMUNICATION)

    def _next(self, reply: RpcReply) -> Answer | None:
        if self.stage is Stage.MEMORY:
            reference = reply.params[0] if reply.params else None
            if reply.code != Result.SUCCESS or not isinstance(reference, MemRef) or reference.memory is None:
                code = reply.code if reply.code != Result.SUCCESS else Result.COMMUNICATION
                return Answer(self.ask.ask, code)
            self._memory = reference
            if reference.size < self.rpc.params[0].b:  # type: ignore[union-attr]
                return self._free(Answer(self.ask.ask, Result.OUT_OF_MEMORY))
            self.rpc = self._main()
            self.stage = Stage.ANSWER
            return None
        if self.stage is Stage.ANSWER:
            return self._free(self._result(reply))
        assert self._answer is not None
        return self._answer

    def withdrawn(self) -> Answer:
        """What to answer where the call has ended under it."""
        return self._answer if self._answer is not None else Answer(self.ask.ask, Result.COMMUNICATION)

    def _rpc(self, command: int, params: list[Param]) -> Rpc:
        return Rpc(command, params, self.call)

    def _free(self, answer: Answer) -> Answer | None:
        if self._memory is None:
            return answer
        self._answer, self.stage = answer, Stage.FREE
        self.rpc = self._rpc(RpcCommand.SHM_FREE, [Value(Direction.IN, ShmType.APPLICATION), self._memory])
        return None

    def _main(self) -> Rpc:
        params: list[Param] = []
        at = 0
        for param in self.ask.params:
            if param.kind in (1, 2, 3):
                params.append(Value(Direction(param.kind), param.a, param.b, param.c))
            elif param.kind >= 5:
                params.append(self._reference(param, at))
                at += _room(param)
            else:
                params.append(Nothing())
        return self._rpc(self.ask.command, params)

    def _reference(self, param: WireParam, at: int) -> MemRef:
        direction = Direction(param.kind - 4)
        if not _room(param):
            return MemRef(direction, None, 0, param.a)
        assert self._memory is not None
        memory, offset = _bytes(self._memory)
        if direction.is_input:
            memory.write(offset + at, param.content)
        return MemRef(direction, memory, offset + at, param.a)

    def _result(self, reply: RpcReply) -> Answer:
        if reply.code not in _WITH_PARAMS and not reply.params:
            return Answer(self.ask.ask, reply.code)
        if len(reply.params) != len(self.ask.params):
            return Answer(self.ask.ask, Result.COMMUNICATION)
        params: list[WireParam] = []
        for wire, asked, given in zip(self.ask.params, self.rpc.params, reply.params, strict=True):
            if isinstance(asked, Value) and isinstance(given, Value):
                params.append(WireParam(asked.direction, 0, given.a, given.b, given.c))
            elif isinstance(asked, MemRef) and isinstance(given, MemRef):
                params.append(_content(asked, wire.a, given.size))
            elif isinstance(asked, Nothing) and isinstance(given, Nothing):
                params.append(WireParam())
            else:
                return Answer(self.ask.ask, Result.COMMUNICATION)
        return Answer(self.ask.ask, reply.code, params)


def _content(asked: MemRef, room: int, size: int) -> WireParam:
    """The answer's reference: its size, and what the guest has written into the ``room`` bytes it was asked with."""
    kind = 4 + asked.direction
    if asked.memory is None:
        return WireParam(kind, NULL, size)
    content = b""
    if asked.direction.is_output and size <= room:
        content = asked.memory.read(asked.offset, size)
    return WireParam(kind, 0, size, content=content)


def _bytes(reference: MemRef) -> tuple[Memory, int]:
    assert reference.memory is not None
    return reference.memory, reference.offset


def _room(param: WireParam) -> int:
    """Bytes of guest memory that a parameter needs."""
    if param.kind < 5 or param.flags & NULL:
        return 0
    return -(-param.a // ALIGNMENT) * ALIGNMENT
