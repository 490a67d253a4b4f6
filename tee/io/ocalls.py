"""Serves OCALLs: calls of a TA to the client that called it, and the memory that it asks of that client."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply

log = logging.getLogger(__name__)

MAX_MEMORY = 64 << 20
"""Bytes that TAs may have asked for in one call."""

MAX_PIECES = 64
"""… in so many pieces."""


class OcallServer(Protocol):
    """A client, as its TAs' calls see it. Any thread calls it, several at a time."""

    @property
    def context(self) -> object:
        """The driver's context, in which it has made its call."""

    def call(self, function: int, rpc: Rpc) -> int:
        """Run ``function`` with ``rpc.params[1:]``, into which results go; its result code. TeeError is one, too."""

    def allocate(self, size: int) -> Memory:
        """Registered memory. Raises MemoryError or TeeError."""

    def release(self, memory: Memory) -> None:
        """Give it back. Never raises."""


class Ocalls:
    """Those of one call. Any thread."""

    def __init__(self, server: OcallServer) -> None:
        self.context = server.context
        self._server = server
        self._lent: dict[int, Memory] = {}
        self._bytes = 0
        self._ended = False

    def serve(self, rpc: Rpc) -> RpcReply:
        """The answer. Never raises."""
        serve = _SERVICES.get(rpc.command)
        if serve is None:
            return refusal(rpc)
        try:
            return serve(self, rpc)
        except TeeError as error:
            return RpcReply(error.code, origin=error.origin)
        except MemoryError:
            return RpcReply(Result.OUT_OF_MEMORY)
        except Exception:
            log.exception("serving an OCALL failed")
            return RpcReply(Result.GENERIC)

    @property
    def lends(self) -> bool:
        """TAs have memory of it."""
        return bool(self._lent)

    def forget(self, memory: Memory) -> None:
        """The TEE has not taken it."""
        if self._lent.pop(id(memory), None) is not None:
            self._bytes -= memory.size
            self._server.release(memory)

    def end(self) -> None:
        """The call has ended: what was not given back is."""
        self._ended = True
        for memory in list(self._lent.values()):
            self.forget(memory)

    def _call(self, rpc: Rpc) -> RpcReply:
        function = rpc.params[0] if rpc.params else None
        if not isinstance(function, Value) or not function.meta or not 0 <= function.a < 1 << 32:
            return RpcReply(Result.BAD_PARAMETERS)
        try:
            code = self._server.call(function.a, rpc)
        except TeeError as error:
            code = error.code
        except Exception:
            log.exception("a client's handler of OCALLs failed")
            code = Result.GENERIC
        return RpcReply(code, rpc.params, Origin.API)

    def _allocate(self, rpc: Rpc) -> RpcReply:
        asked = rpc.params[0] if len(rpc.params) == 1 else None
        if not isinstance(asked, Value):
            return RpcReply(Result.BAD_PARAMETERS)
        if not 0 < asked.b <= MAX_MEMORY - self._bytes or len(self._lent) >= MAX_PIECES or self._ended:
            return RpcReply(Result.OUT_OF_MEMORY)
        memory = self._server.allocate(asked.b)
        self._lent[id(memory)] = memory
        self._bytes += memory.size
        if self._ended:  # meanwhile
            self.forget(memory)
            return RpcReply(Result.OUT_OF_MEMORY)
        return RpcReply(Result.SUCCESS, [MemRef(Direction.INOUT, memory, 0, asked.b)])

    def _free(self, rpc: Rpc) -> RpcReply:
        reference = rpc.params[1] if len(rpc.params) == 2 else None
        if not isinstance(reference, MemRef) or reference.memory is None or id(reference.memory) not in self._lent:
            return RpcReply(Result.BAD_PARAMETERS)
        self.forget(reference.memory)
        return RpcReply()


_SERVICES: dict[int, Callable[[Ocalls, Rpc], RpcReply]] = {
    RpcCommand.OCALL: Ocalls._call,
    RpcCommand.SHM_ALLOC: Ocalls._allocate,
    RpcCommand.SHM_FREE: Ocalls._free,
}


def refusal(rpc: Rpc) -> RpcReply:
    """What a client without a handler answers."""
    return RpcReply(Result.SUCCESS if rpc.command == RpcCommand.SHM_FREE else Result.NOT_SUPPORTED)
