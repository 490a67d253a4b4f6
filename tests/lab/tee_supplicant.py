"""OP-TEE's tee-supplicant as a supplicant of ours: what Linux's OP-TEE driver is between a TEE and it, this is here."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import tempfile
from io import FileIO
from pathlib import Path

from lab.optee_client import TeeSupplicant
from tee.io.supplicant import Allocator
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType

# linux/tee.h: struct tee_iocl_supp_recv_arg and tee_iocl_supp_send_arg, struct tee_ioctl_param
HEAD, PARAM = struct.Struct("<II"), struct.Struct("<QQQQ")
VALUE, MEMREF, META = 0, 4, 0x100  # TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT is 1, …_MEMREF_INPUT 5
NULL = 2**64 - 1  # TEE_MEMREF_NULL
VALUE_INOUT = VALUE + Direction.INOUT
PATIENCE_S = 30
MOST = 4096


class RealSupplicant:
    """A running tee-supplicant; an :class:`~tee.io.supplicant.RpcServer`. A context manager."""

    def __init__(self, build: TeeSupplicant, tas: Path, files: Path) -> None:
        self._scratch = tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp")
        self._shared = Path(self._scratch.name)
        self._ids: dict[int, tuple[int, Memory, Allocator]] = {}  # by the identity of the memory
        self._number = 0
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(PATIENCE_S)
        self._channel = ours
        with theirs:
            self.process = subprocess.Popen(
                [*build.command, "-l", tas, "-f", files, "/dev/teepriv0"],
                env={"PATH": os.defpath, "TEEPRIV_FD": str(theirs.fileno()), "TEEPRIV_SHM": self._scratch.name},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )

    def __enter__(self) -> RealSupplicant:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        self._channel.close()
        self.process.kill()
        self.process.wait()
        for _, memory, allocator in self._ids.values():
            allocator.free(memory)
        self._ids.clear()
        self._scratch.cleanup()

    def forget(self, memory: Memory) -> None:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        self._free(memory)

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        if rpc.command == RpcCommand.SHM_ALLOC:
            (asked,) = rpc.params
            assert isinstance(asked, Value)
            code, ((_, _, _, number),) = self.ask(RpcCommand.SHM_ALLOC, [(VALUE_INOUT, asked.a, asked.b, 0)])
            if code != Result.SUCCESS:
                return RpcReply(code)
            memory = allocator.allocate(asked.b)
            self._ids[id(memory)] = (number, memory, allocator)
            return RpcReply(params=[MemRef(Direction.INOUT, memory, 0, asked.b)])
        if rpc.command == RpcCommand.SHM_FREE:
            reference = rpc.params[1]
            assert isinstance(reference, MemRef)
            assert reference.memory is not None
            return RpcReply(self._free(reference.memory))
        code, answers = self.ask(rpc.command, [self._there(param) for param in rpc.params])
        return RpcReply(code, [self._back(p, a) for p, a in zip(rpc.params, answers, strict=True)])

    def ask(self, command: int, params: list[tuple[int, int, int, int]]) -> tuple[int, list[tuple[int, ...]]]:
        """One request, after the meta parameter by which the driver knows it again: code, parameters of the answer."""
        self._number += 1
        packed = [PARAM.pack(VALUE_INOUT | META, self._number, 0, 0), *(PARAM.pack(*param) for param in params)]
        self._channel.sendall(HEAD.pack(command, len(packed)) + b"".join(packed))
        answer = self._channel.recv(MOST)
        assert answer, f"tee-supplicant has ended: {self.process.wait()}"
        code, count = HEAD.unpack_from(answer)
        (_, number, _, _), *rest = PARAM.iter_unpack(answer[HEAD.size :])
        assert number == self._number
        assert count == len(packed) == len(rest) + 1
        return code, rest

    def _there(self, param: Param) -> tuple[int, int, int, int]:
        if isinstance(param, Value):
            return VALUE + param.direction, param.a, param.b, param.c
        if isinstance(param, Nothing):
            return 0, 0, 0, 0
        kind = MEMREF + param.direction
        if param.memory is None:
            return kind, 0, param.size, NULL
        number, _, _ = self._ids[id(param.memory)]
        with self._file(number) as file:
            os.pwrite(file.fileno(), param.memory.read(param.offset, param.size), param.offset)
        return kind, param.offset, param.size, number

    def _back(self, param: Param, answer: tuple[int, ...]) -> Param:
        """As the driver does it: of values what comes out, of memory the size; its bytes are shared."""
        if isinstance(param, Nothing) or param.direction == Direction.IN:
            return param
        if isinstance(param, Value):
            return Value(param.direction, *answer[1:])
        size = answer[2]
        if param.memory is not None:
            number, _, _ = self._ids[id(param.memory)]
            with self._file(number) as file:
                data = os.pread(file.fileno(), param.size, param.offset)
            param.memory.write(param.offset, data)
        return MemRef(param.direction, param.memory, param.offset, size)

    def _file(self, number: int) -> FileIO:
        return FileIO(self._shared / str(number), "r+")

    def _free(self, memory: Memory) -> int:
        number, _, allocator = self._ids.pop(id(memory))
        code, _ = self.ask(RpcCommand.SHM_FREE, [(VALUE_INOUT, ShmType.APPLICATION, number, 0)])
        allocator.free(memory)
        (self._shared / str(number)).unlink()
        return code
