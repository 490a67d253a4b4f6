"""A TEE that is given copies: for one that cannot reach its callers' memory, or is not to."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from tee.calls import Call, CloseContext, Invoke, OpenSession, RegisterMemory, UnregisterMemory
from tee.driver import Done, Event, RpcWithdrawn, Sink, TeeDriver, TeeInfo
from tee.memory import Memory
from tee.params import MemRef, Param, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcCommand, RpcReply


class BouncingTee:
    """A :class:`~tee.driver.TeeDriver` over ``tee``, which sees bounce buffers only.

    A registered region has a copy of its size, allocated by ``tee``. What a call refers to is copied there when the
    call starts, and outputs back when it has ended; the same for RPCs, the other way round. So neither side sees what
    the other one writes in the middle of a call, and nothing is written to memory that its owner has taken back.
    """

    def __init__(self, tee: TeeDriver) -> None:
        self._tee = tee
        self._sink: Sink | None = None
        self._ready: deque[Event] = deque()
        self._inner: dict[Call, Call] = {}  #: as it was started → as the TEE has it
        self._outer: dict[Call, Call] = {}
        self._copies: dict[Memory, Memory] = {}  #: registered memory → its copy
        self._originals: dict[Memory, Memory] = {}
        self._contexts: dict[Memory, object] = {}  #: registered memory → the context that it is registered in
        self._asked: dict[Rpc, Rpc] = {}  #: RPC of the TEE, until its call ends → as its owner has it
        self._asking: dict[Rpc, Rpc] = {}  #: the other way round, until it is answered
        tee.attach(self._take)

    # -- the contract

    @property
    def info(self) -> TeeInfo:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.info

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink

    def fileno(self) -> int | None:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.fileno()

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._tee.release(memory)

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`; ``copies`` are bounce buffers of registered memory."""
        return {**self._tee.usage(), "copies": len(self._copies)}

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        try:
            inner = self._translated(call)
        except MemoryError:
            self._ready.append(Done(call, Result.OUT_OF_MEMORY, Origin.API))
        except ValueError:  # a reference outside its memory, or memory that is gone
            self._ready.append(Done(call, Result.BAD_PARAMETERS, Origin.API))
        else:
            self._inner[call], self._outer[inner] = inner, call
            self._tee.start(inner)

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        inner = self._inner.get(call)
        if inner is not None:
            self._tee.cancel(inner)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        inner = self._asking.pop(rpc, None)
        if inner is None:
            return
        if rpc.call is None:
            del self._asked[inner]
        try:
            params = [self._into_tee(param, fill=rpc.command != RpcCommand.SHM_ALLOC) for param in reply.params]
        except ValueError:  # memory that is gone
            reply, params = RpcReply(Result.COMMUNICATION), []
        self._tee.answer(inner, RpcReply(reply.code, params, reply.origin))

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        due = self._tee.run()
        assert self._sink is not None
        while self._ready:
            self._sink(self._ready.popleft())
        return due

    # -- into the TEE

    def _translated(self, call: Call) -> Call:
        """The call for the TEE. Raises MemoryError, ValueError."""
        match call:
            case RegisterMemory(memory=memory) if memory.handle is None and memory not in self._copies:
                copy = self._tee.allocate(max(memory.size, 1))
                self._copies[memory], self._originals[copy], self._contexts[memory] = copy, memory, call.context
                return replace(call, memory=copy)
            case UnregisterMemory(memory=memory) if memory in self._copies:
                return replace(call, memory=self._copies[memory])
            case OpenSession() | Invoke():
                return replace(call, params=[self._given(param) for param in call.params])
        return replace(call)

    def _given(self, param: Param) -> Param:
        """A call's parameter. Raises ValueError."""
        if not isinstance(param, MemRef) or param.memory is None:
            return replace(param)
        memory = param.memory
        copy = self._copies.get(memory)
        if copy is not None:
            if param.direction.is_input:
                _copy(memory, param.offset, copy, param.offset, param.size)
            return replace(param, memory=copy)
        copy = Memory.of(bytearray(param.size))
        if param.direction.is_input:
            _copy(memory, param.offset, copy, 0, param.size)
        copy.read_only = memory.read_only
        return replace(param, memory=copy, offset=0)

    def _into_tee(self, param: Param, *, fill: bool) -> Param:
        """A parameter of an answer. Raises ValueError."""
        if not isinstance(param, MemRef) or param.memory is None:
            return param
        copy = self._copies.get(param.memory)
        if copy is None:
            return param
        if fill and param.direction.is_output and param.size <= copy.size - param.offset:
            _copy(param.memory, param.offset, copy, param.offset, param.size)
        return replace(param, memory=copy)

    # -- out of it

    def _take(self, event: Event) -> None:
        match event:
            case Done():
                event = self._done(event)
            case Rpc():
                event = self._rpc(event)
            case RpcWithdrawn(rpc=rpc) if rpc in self._asked:
                outer = self._asked.pop(rpc)
                self._asking.pop(outer, None)
                event = RpcWithdrawn(outer)
        assert self._sink is not None
        self._sink(event)

    def _done(self, done: Done) -> Done:
        inner, call = done.call, self._outer.pop(done.call)
        del self._inner[call]
        for rpc in [rpc for rpc, outer in self._asked.items() if outer.call is call]:
            self._asking.pop(self._asked.pop(rpc), None)
        match call, inner:
            case RegisterMemory(memory=memory), RegisterMemory(memory=copy):
                if done.code == Result.SUCCESS:
                    memory.handle = copy
                else:
                    self._forget(memory)
            case UnregisterMemory(memory=memory), _ if done.code == Result.SUCCESS:
                self._forget(memory)
            case CloseContext(context=context), _:
                for memory in [m for m, c in self._contexts.items() if c is context]:
                    self._forget(memory)
            case (OpenSession(params=params), OpenSession(params=given)) | (
                Invoke(params=params),
                Invoke(params=given),
            ):
                _give_outputs(params, given)
        return replace(done, call=call)

    def _forget(self, memory: Memory) -> None:
        copy = self._copies.pop(memory, None)
        if copy is not None:
            del self._originals[copy], self._contexts[memory]
            memory.handle = None
            self._tee.release(copy)

    def _rpc(self, rpc: Rpc) -> Rpc:
        call = self._outer.get(rpc.call) if rpc.call is not None else None
        params = [self._asked_for(param, fill=rpc.command != RpcCommand.SHM_FREE) for param in rpc.params]
        outer = Rpc(rpc.command, params, call)
        self._asked[rpc], self._asking[outer] = outer, rpc
        return outer

    def _asked_for(self, param: Param, *, fill: bool) -> Param:
        if not isinstance(param, MemRef) or param.memory is None:
            return param
        memory = self._originals.get(param.memory)
        if memory is None:
            return param
        if fill and param.direction.is_input and memory.segments and not memory.read_only:
            _copy(param.memory, param.offset, memory, param.offset, param.size)
        return replace(param, memory=memory)


def _give_outputs(params: Sequence[Param], inner: Sequence[Param]) -> None:
    """What the TEE has left in its parameters, and in copies."""
    for param, given in zip(params, inner, strict=True):
        match param, given:
            case Value(), Value():
                param.a, param.b, param.c = given.a, given.b, given.c
            case MemRef(), MemRef():
                size, memory, copy = given.size, param.memory, given.memory
                written = param.direction.is_output and 0 <= size <= param.size
                if written and memory is not None and copy is not None and memory.segments:
                    _copy(copy, given.offset, memory, param.offset, size)
                param.size = size


def _copy(source: Memory, at: int, target: Memory, to: int, size: int) -> None:
    """Once, where the bytes lie in one piece. Raises ValueError outside of either."""
    view = source.view(at, size)
    target.write(to, source.read(at, size) if view is None else view)
