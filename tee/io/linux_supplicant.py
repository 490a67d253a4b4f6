"""A supplicant for a Linux TEE device: takes requests from ``/dev/teeprivN`` and has a :class:`RpcServer` answer them.

The kernel names memory by the id of shared memory that this supplicant has allocated; everything else is as in
:mod:`tee.rpc`. Like OP-TEE's supplicant, this one says that it answers requests in any order, by a META parameter in
front of the others, which names the request: so several threads can each serve one.
"""

from __future__ import annotations

import errno
import logging
import threading
from collections.abc import Callable

from tee.io.linux import LinuxTee, RawParam, Shm
from tee.io.supplicant import RpcServer
from tee.linux.ioctls import ATTR_META, ATTR_TYPE_MASK, IMPL_OPTEE, MEMREF_NULL, ParamType
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply

log = logging.getLogger(__name__)

#: Parameters of the largest request that is taken.
ROOM = 8

_GONE = (errno.ENODEV, errno.EBADF)
_VALUES = {ParamType.VALUE_IN: Direction.IN, ParamType.VALUE_OUT: Direction.OUT, ParamType.VALUE_INOUT: Direction.INOUT}
_MEMREFS = {
    ParamType.MEMREF_IN: Direction.IN,
    ParamType.MEMREF_OUT: Direction.OUT,
    ParamType.MEMREF_INOUT: Direction.INOUT,
}


class DeviceMemory:
    """Gives memory of the device: for SHM_ALLOC and SHM_FREE."""

    def __init__(self, device: LinuxTee) -> None:
        self._device = device
        self._shms: dict[int, tuple[Shm, Memory]] = {}

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.io.services.base.Allocator`."""
        try:
            shm = self._device.allocate(size)
        except OSError as error:
            raise MemoryError(str(error)) from None
        memory = Memory((shm.data,))
        memory.handle = shm
        self._shms[shm.id] = shm, memory
        return memory

    def free(self, memory: Memory) -> None:
        """See :class:`~tee.io.services.base.Allocator`."""
        shm = memory.handle
        assert isinstance(shm, Shm)
        del self._shms[shm.id]
        memory.forget()
        shm.close()

    def find(self, ident: int) -> Memory | None:
        """The memory with this id, or None."""
        found = self._shms.get(ident)
        return found[1] if found is not None else None


class LinuxSupplicant:
    """Serves one device until it is closed or goes. Raises OSError where it cannot be opened, ValueError where it is no
    TEE that has a supplicant."""

    def __init__(self, server: RpcServer, path: str = "/dev/teepriv0", *, meta: bool = True) -> None:
        """``meta`` False: without that parameter, as the oldest supplicants."""
        self._server = server
        self._meta = int(meta)
        self._device = LinuxTee(path)
        impl_id = self._device.version()[0]
        if impl_id != IMPL_OPTEE:
            self._device.close()
            raise ValueError(f"{path} is the device of another kind of TEE (implementation id {impl_id})")
        self._memory = DeviceMemory(self._device)

    def close(self) -> None:
        """Give up the device."""
        self._device.close()

    def run(self, ready: Callable[[], None] = lambda: None, *, threads: int = 1) -> None:
        """Serve until the device has gone. ``ready`` is called before the first request is waited for.

        With several ``threads`` (which needs META) as many requests are served at a time; the server is called by all
        of them. It takes one for each RPC that may wait, or others wait behind it.
        """
        if threads > 1 and not self._meta:
            raise ValueError("without META, requests are answered one after the other")
        ready()
        others = [threading.Thread(target=self._run, name=f"supplicant-{i}", daemon=True) for i in range(1, threads)]
        for thread in others:
            thread.start()
        self._run()
        for thread in others:
            thread.join()

    def _run(self) -> None:
        room: list[RawParam] = [(ATTR_META, 0, 0, 0)] * self._meta + [(ParamType.NONE, 0, 0, 0)] * ROOM
        while True:
            try:
                command, params = self._device.receive(room)
            except OSError as error:
                if error.errno in _GONE:
                    return
                raise
            code, answer = self._serve(command, params[self._meta :])
            try:
                self._device.send(code, [*params[: self._meta], *answer])
            except OSError as error:
                if error.errno == errno.ENODEV:
                    return
                # its caller was killed: Linux says EBADF or ENOENT (drivers/tee/optee/supp.c)
                log.info("nobody waits for an answer any more: %s", error)
                if command == RpcCommand.SHM_ALLOC and code == Result.SUCCESS:
                    self._take_back(answer[0][3])

    def _take_back(self, ident: int) -> None:
        """Free memory that nobody will, as the TEE never heard of it."""
        memory = self._memory.find(ident)
        if memory is not None:
            self._server.forget(memory)

    def _serve(self, command: int, raw: list[RawParam]) -> tuple[int, list[RawParam]]:
        """The code and the parameters to answer with."""
        if command == RpcCommand.SHM_ALLOC and len(raw) == 1:
            return self._allocate(raw[0])
        if command == RpcCommand.SHM_FREE and len(raw) == 1:
            return self._free(raw[0])
        try:
            params = [self._param(one) for one in raw]
        except ValueError:
            return Result.BAD_PARAMETERS, raw
        reply = self._server.serve(Rpc(command, params), self._memory)
        return reply.code, [_answered(one, param) for one, param in zip(raw, _padded(reply, raw), strict=True)]

    def _allocate(self, raw: RawParam) -> tuple[int, list[RawParam]]:
        attr, kind, size, _ = raw
        reply = self._server.serve(Rpc(RpcCommand.SHM_ALLOC, [Value(Direction.IN, kind, size, 0)]), self._memory)
        if reply.code != Result.SUCCESS:
            return reply.code, [raw]
        reference = reply.params[0]
        assert isinstance(reference, MemRef)
        assert reference.memory is not None
        shm = reference.memory.handle
        assert isinstance(shm, Shm)
        return Result.SUCCESS, [(attr, kind, size, shm.id)]

    def _free(self, raw: RawParam) -> tuple[int, list[RawParam]]:
        _, kind, ident, _ = raw
        reference = MemRef(Direction.INOUT, self._memory.find(ident))
        reply = self._server.serve(Rpc(RpcCommand.SHM_FREE, [Value(Direction.IN, kind), reference]), self._memory)
        return reply.code, [raw]

    def _param(self, raw: RawParam) -> Param:
        attr, a, b, c = raw
        kind, meta = ParamType(attr & ATTR_TYPE_MASK), bool(attr & ATTR_META)
        if kind in _VALUES:
            return Value(_VALUES[kind], a, b, c, meta)
        if kind not in _MEMREFS:
            return Nothing(meta)
        if c == MEMREF_NULL:
            return MemRef(_MEMREFS[kind], None, 0, b, meta)
        memory = self._memory.find(c)
        if memory is None or a + b > memory.size:
            raise ValueError("memory that this supplicant has not")
        return MemRef(_MEMREFS[kind], memory, a, b, meta)


def _padded(reply: RpcReply, raw: list[RawParam]) -> list[Param | None]:
    return [*reply.params, *[None] * len(raw)][: len(raw)]


def _answered(raw: RawParam, param: Param | None) -> RawParam:
    attr, a, b, c = raw
    if isinstance(param, Value):
        return attr, param.a, param.b, param.c
    if isinstance(param, MemRef):
        return attr, a, param.size, c
    return attr, a, b, c
