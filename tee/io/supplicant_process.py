"""The supplicant's services in a process of their own, as on a real system: it may be killed, and started again.

:class:`SupplicantProcess` is the parent's side and has the interface of :class:`~tee.io.supplicant.Supplicant`.
    Memory does not
cross: its content does, by value, in the direction that a parameter has. While no child lives, and when one dies in
the middle of an RPC, the answer is COMMUNICATION, as from a kernel without supplicant.

The two speak over a stream socket, in frames; all integers are little-endian::

    frame        u32 length of what follows (at most MAX_FRAME), u32 id, u32 code, u32 number of params, params
    param        u32 kind (0 none, 1 to 3 value, 5 to 7 memory reference), u32 flags (1: NULL), u64 a, u64 b, u64 c,
    content value        a, b, c reference    a = size, b = token of the memory (0: none of SHM_ALLOC's), c = bytes of
    content that follow

In a request ``code`` is the command, in an answer the result. The child is not trusted: the parent checks ids, kinds,
sizes and tokens of each answer; one that makes no sense ends the child.

``python -m tee.io.supplicant_process --fd N --ta-folder D …`` is the child; further options say what it serves
(:class:`~tee.io.supplicant.Services`).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from tee.io.lanes import Lanes
from tee.io.supplicant import MAX_SHARED_MEMORY, MAX_TA_SIZE, Allocator, Services, Supplicant
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply

#: The largest frame in bytes: a TA of the largest size, and what goes around it.
MAX_FRAME = MAX_TA_SIZE + (64 << 10)

#: The largest memory of a parameter: a little less.
MAX_CONTENT = MAX_TA_SIZE + (32 << 10)

#: How long the child waits at its end for what it serves, in seconds.
CLOSE_TIMEOUT = 1.0

#: How many parameters a frame may have.
MAX_PARAMS = 16

_HEAD = struct.Struct("<III")
_LENGTH = struct.Struct("<I")
_PARAM = struct.Struct("<IIQQQ")
_NULL = 1
_DIRECTIONS = (Direction.IN, Direction.OUT, Direction.INOUT)


class ProtocolError(Exception):
    """The other side sent what makes no sense."""


@dataclass(slots=True)
class WireParam:
    """One parameter as it crosses."""

    kind: int = 0
    flags: int = 0
    a: int = 0
    b: int = 0
    c: int = 0
    content: bytes = b""


@dataclass(slots=True)
class Frame:
    """One message."""

    id: int
    code: int
    params: list[WireParam] = field(default_factory=list)

    def pack(self) -> bytes:
        """The bytes, with their length in front."""
        parts = [_HEAD.pack(self.id, self.code, len(self.params))]
        for param in self.params:
            parts += (_PARAM.pack(param.kind, param.flags, param.a, param.b, param.c), param.content)
        body = b"".join(parts)
        if len(body) > MAX_FRAME:
            raise ProtocolError(f"a frame of {len(body)} bytes")
        return _LENGTH.pack(len(body)) + body

    @classmethod
    def unpack(cls, body: bytes) -> Frame:
        """A frame from its bytes without the length. Raises ProtocolError."""
        if len(body) < _HEAD.size:
            raise ProtocolError(f"a frame of {len(body)} bytes")
        number, code, count = _HEAD.unpack_from(body)
        if count > MAX_PARAMS:
            raise ProtocolError(f"{count} parameters")
        frame, at = cls(number, code), _HEAD.size
        for _ in range(count):
            if len(body) - at < _PARAM.size:
                raise ProtocolError("a frame that ends in a parameter")
            kind, flags, a, b, c = _PARAM.unpack_from(body, at)
            at += _PARAM.size
            if kind not in (0, 1, 2, 3, 5, 6, 7) or flags & ~_NULL:
                raise ProtocolError(f"a parameter of kind {kind} with flags {flags:#x}")
            size = c if kind >= 5 else 0
            if size > len(body) - at:
                raise ProtocolError("content that is longer than its frame")
            frame.params.append(WireParam(kind, flags, a, b, c, body[at : at + size]))
            at += size
        if at != len(body):
            raise ProtocolError(f"{len(body) - at} bytes too many in a frame")
        return frame


def receive(connection: socket.socket) -> Frame | None:
    """The next frame, or None at the end of the stream. Raises ProtocolError."""
    head = _receive_exactly(connection, _LENGTH.size)
    if not head:
        return None
    (length,) = _LENGTH.unpack(head)
    if not _HEAD.size <= length <= MAX_FRAME:
        raise ProtocolError(f"a frame of {length} bytes")
    body = _receive_exactly(connection, length)
    return Frame.unpack(bytes(body)) if body else None


def _receive_exactly(connection: socket.socket, size: int) -> bytearray:
    """``size`` bytes; none where the stream ends before."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        try:
            count = connection.recv_into(view[done:])
        except (ConnectionError, OSError):
            count = 0
        if not count:
            return bytearray()
        done += count
    return data


@dataclass(slots=True, eq=False)
class _Pending:
    """A request that waits for its answer; ``answer`` None when it is woken: the child is gone."""

    woken: threading.Event = field(default_factory=threading.Event)
    answer: Frame | None = None


@dataclass(slots=True, eq=False)
class _Child:
    """One life of the child: its process, its socket, what waits for it."""

    process: subprocess.Popen[bytes]
    connection: socket.socket
    reader: threading.Thread | None = None
    pending: dict[int, _Pending] = field(default_factory=dict)
    sending: threading.Lock = field(default_factory=threading.Lock)
    gone: bool = False


class SupplicantProcess:
    """A supplicant in a child process. :meth:`start` starts it, after a death also again. Thread-safe."""

    def __init__(
        self,
        ta_folders: Sequence[str | os.PathLike[str]] = (),
        *,
        services: Services | None = None,
        max_shared_memory: int = MAX_SHARED_MEMORY,
        command: Sequence[str] | None = None,
        log: Callable[[str], None] | None = None,
    ) -> None:
        """``services`` says what is served besides the TAs of ``ta_folders``. ``command`` starts the child (``--fd N``
        and what :meth:`Services.arguments` gives are added); by default this module."""
        served = services if services is not None else Services()
        folders = tuple(os.fspath(Path(folder)) for folder in ta_folders)
        self._services = dataclasses.replace(served, ta_folders=(*folders, *served.ta_folders))
        self._command = tuple(command) if command is not None else (sys.executable, "-m", "tee.io.supplicant_process")
        self._max_shared_memory = max_shared_memory
        self._log = log if log is not None else _no_log
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._ids = itertools.count(1)
        self._tokens: dict[int, tuple[Memory, Allocator]] = {}

    @property
    def pid(self) -> int | None:
        """The child's process id, or None while there is none."""
        child = self._child
        return child.process.pid if child is not None and not child.gone else None

    @property
    def shared_memory(self) -> tuple[int, int]:
        """How many allocations the TEE has here, and of how many bytes together."""
        with self._lock:
            return len(self._tokens), sum(memory.size for memory, _ in self._tokens.values())

    def start(self) -> None:
        """Start the child; nothing where one lives."""
        with self._lock:
            if self._child is not None and not self._child.gone:
                return
            mine, other = socket.socketpair()
            try:
                arguments = [*self._command, "--fd", str(other.fileno()), *self._services.arguments()]
                process = subprocess.Popen(
                    arguments, pass_fds=[other.fileno()], stdin=subprocess.DEVNULL, env=_child_environment()
                )
            except BaseException:
                mine.close()
                raise
            finally:
                other.close()
            child = _Child(process, mine)
            child.reader = threading.Thread(target=self._read, args=(child,), name="supplicant-reader", daemon=True)
            self._child = child
            child.reader.start()

    def stop(self) -> None:
        """End the child, and wait for it. What waits for its answer gets COMMUNICATION."""
        with self._lock:
            child = self._child
            self._child = None
        if child is not None:
            self._end(child)

    def kill(self) -> None:
        """kill -9, as tests and demos do it."""
        pid = self.pid
        if pid is not None:
            os.kill(pid, signal.SIGKILL)
            child = self._child
            if child is not None and child.reader is not None:
                child.reader.join(10)

    def close(self) -> None:
        """End the child and free all that the TEE has not."""
        self.stop()
        with self._lock:
            tokens = tuple(self._tokens)
        for token in tokens:
            self._drop(token)

    def forget(self, memory: Memory) -> None:
        """Free an allocation whose answer never reached the TEE. Nothing where it is not one."""
        token = self._token_of(memory)
        if token:
            self._drop(token)

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        try:
            known = rpc.command == RpcCommand.SHM_FREE  # memory as such, not its content
            request = Frame(next(self._ids) & 0xFFFFFFFF, rpc.command, [self._to_wire(p, known) for p in rpc.params])
        except (ValueError, TypeError):
            return RpcReply(Result.BAD_PARAMETERS)
        answer = self._exchange(request)
        if rpc.command == RpcCommand.SHM_FREE:
            # The memory is the parent's: it is freed also where no child lives to be told so.
            return self._freed(rpc, answer)
        if answer is None:
            return RpcReply(Result.COMMUNICATION)
        try:
            return RpcReply(answer.code, self._from_wire(rpc, answer, allocator))
        except ProtocolError as error:
            self._accuse(error)
            return RpcReply(Result.COMMUNICATION)
        except MemoryError:
            return RpcReply(Result.OUT_OF_MEMORY)

    # The way to the child.

    def _exchange(self, request: Frame) -> Frame | None:
        pending = _Pending()
        try:
            data = request.pack()
        except (ProtocolError, struct.error):
            return Frame(request.id, Result.BAD_PARAMETERS)
        with self._lock:
            child = self._child
            if child is None or child.gone:
                return None
            child.pending[request.id] = pending
        # Outside the lock: a child that does not read must not hold those who want to end it.
        with child.sending, suppress(OSError):  # the reader sees the end too, and wakes us
            child.connection.sendall(data)
        pending.woken.wait()
        return pending.answer

    def _read(self, child: _Child) -> None:
        """The reader thread: hands answers out until the stream ends."""
        try:
            while (frame := receive(child.connection)) is not None:
                with self._lock:
                    pending = child.pending.pop(frame.id, None)
                if pending is None:
                    raise ProtocolError(f"an answer to request {frame.id}, which nobody made or which was answered")
                pending.answer = frame
                pending.woken.set()
        except ProtocolError as error:
            self._log(f"supplicant process: {error}")
        with self._lock:
            child.gone = True
            waiting = tuple(child.pending.values())
            child.pending.clear()
        child.connection.close()
        child.process.kill()
        child.process.wait()
        for pending in waiting:
            pending.woken.set()

    def _end(self, child: _Child) -> None:
        child.process.terminate()
        try:
            child.process.wait(2)
        except subprocess.TimeoutExpired:
            child.process.kill()
        if child.reader is not None:
            child.reader.join(10)

    def _accuse(self, error: ProtocolError) -> None:
        self._log(f"supplicant process: {error}")
        self.stop()

    # Parameters to and from frames.

    def _to_wire(self, param: Param, only_token: bool) -> WireParam:
        if isinstance(param, Value):
            return WireParam(param.direction, 0, param.a, param.b, param.c)
        if isinstance(param, MemRef):
            kind = 4 + param.direction
            if param.memory is None:
                return WireParam(kind, _NULL, param.size)
            token = self._token_of(param.memory)
            content = b""
            if not only_token:
                param.memory.view(param.offset, param.size)  # raises where that is outside the memory
                if param.size > MAX_CONTENT:
                    raise ValueError(f"{param.size} bytes, which no frame can hold")
            if param.direction != Direction.OUT and not only_token:
                content = param.memory.read(param.offset, param.size)
            return WireParam(kind, 0, param.size, token, len(content), content)
        return WireParam()

    def _from_wire(self, rpc: Rpc, answer: Frame, allocator: Allocator) -> list[Param]:
        if rpc.command == RpcCommand.SHM_ALLOC:
            return self._allocated(rpc, answer, allocator)
        if answer.code != Result.SUCCESS and not answer.params:
            return []
        if len(answer.params) != len(rpc.params):
            raise ProtocolError(f"{len(answer.params)} parameters answer {len(rpc.params)}")
        return [self._answered(wire, param) for wire, param in zip(answer.params, rpc.params, strict=True)]

    def _answered(self, wire: WireParam, param: Param) -> Param:
        """``param`` with what the child made of it."""
        if wire.kind != self._kind(param):
            raise ProtocolError(f"a parameter of kind {wire.kind} answers one of kind {self._kind(param)}")
        if isinstance(param, Value):
            if param.direction == Direction.IN:
                return param
            return Value(param.direction, wire.a, wire.b, wire.c)
        if isinstance(param, MemRef):
            answered = MemRef(param.direction, param.memory, param.offset, param.size)
            if param.direction == Direction.IN:
                return answered
            answered.size = wire.a
            if wire.content:
                if param.memory is None or len(wire.content) > param.size or len(wire.content) > wire.a:
                    raise ProtocolError(f"{len(wire.content)} bytes for a memory of {param.size}")
                try:
                    param.memory.write(param.offset, wire.content)
                except ValueError as error:
                    raise ProtocolError(str(error)) from None
            return answered
        return Nothing()

    def _kind(self, param: Param) -> int:
        if isinstance(param, Value):
            return param.direction
        return 4 + param.direction if isinstance(param, MemRef) else 0

    # Shared memory: the child decides whether and how much, the memory itself is the parent's.

    def _allocated(self, rpc: Rpc, answer: Frame, allocator: Allocator) -> list[Param]:
        if answer.code != Result.SUCCESS:
            return []
        request = rpc.params[0] if rpc.params else None
        wire = answer.params[0] if len(answer.params) == 1 else None
        if not isinstance(request, Value) or wire is None or wire.kind != 7 or wire.flags or wire.content:
            raise ProtocolError("an answer to SHM_ALLOC without memory")
        if not request.b <= wire.a <= self._max_shared_memory:
            raise ProtocolError(f"memory of {wire.a} bytes where {request.b} were asked for")
        with self._lock:
            if not wire.b or wire.b in self._tokens:
                raise ProtocolError(f"memory with token {wire.b}, which is in use or none")
            if sum(memory.size for memory, _ in self._tokens.values()) + wire.a > self._max_shared_memory:
                raise MemoryError
        memory = allocator.allocate(wire.a)
        with self._lock:
            self._tokens[wire.b] = (memory, allocator)
        return [MemRef(Direction.INOUT, memory, 0, wire.a)]

    def _freed(self, rpc: Rpc, answer: Frame | None) -> RpcReply:
        reference = rpc.params[1] if len(rpc.params) == 2 else None
        token = self._token_of(reference.memory) if isinstance(reference, MemRef) else 0
        if not token:
            return RpcReply(Result.BAD_PARAMETERS if answer is not None else Result.COMMUNICATION)
        self._drop(token)
        return RpcReply(answer.code if answer is not None else Result.COMMUNICATION)

    def _drop(self, token: int) -> None:
        with self._lock:
            memory, allocator = self._tokens.pop(token, (None, None))
        if memory is not None and allocator is not None:
            allocator.free(memory)

    def _token_of(self, memory: Memory | None) -> int:
        with self._lock:
            return next((token for token, (held, _) in self._tokens.items() if held is memory), 0)


def _child_environment() -> dict[str, str]:
    """This environment, with the place of this package on the child's path: it may not be installed."""
    here = str(Path(__file__).resolve().parents[2])
    path = os.environ.get("PYTHONPATH")
    return {**os.environ, "PYTHONPATH": f"{here}{os.pathsep}{path}" if path else here}


class ChildAllocator:
    """The child's own memory, which only stands for the parent's. Tokens begin at a random place, so that those of a
    child
    that has died are not given again."""

    def __init__(self) -> None:
        self.tokens: dict[int, Memory] = {}
        self._next = itertools.count(int.from_bytes(os.urandom(6), "little") + 1)

    def allocate(self, size: int) -> Memory:
        """Nothing is allocated: the parent has the memory; this one only has its size and token."""
        memory = Memory(size=size)
        self.tokens[next(self._next)] = memory
        return memory

    def free(self, memory: Memory) -> None:
        """Forget it."""
        token = self.token_of(memory)
        self.tokens.pop(token, None)

    def token_of(self, memory: Memory | None) -> int:
        """Its token, 0 where it has none."""
        return next((token for token, held in self.tokens.items() if held is memory), 0)


def serve_connection(connection: socket.socket, supplicant: Supplicant) -> None:
    """The child's loop: serves until the parent closes the stream. Raises ProtocolError."""
    allocator = ChildAllocator()
    sending = threading.Lock()

    def serve(request: Frame) -> None:
        params = [_child_param(wire, allocator, request.code) for wire in request.params]
        reply = supplicant.serve(Rpc(request.code, params), allocator)
        answer = Frame(request.id, reply.code, [_child_wire(param, allocator) for param in reply.params])
        with sending, suppress(OSError):  # then the loop sees the end, too
            try:
                connection.sendall(answer.pack())
            except ProtocolError:  # an answer that no frame can hold: the parent shall not wait for it
                connection.shutdown(socket.SHUT_RDWR)

    lanes: Lanes[Frame] = Lanes("supplicant", serve)
    try:
        while (request := receive(connection)) is not None:
            if request.code != RpcCommand.SHM_FREE:  # which is about memory as such
                _check_sizes(request)
            lanes.put(request.code, request)
    finally:
        lanes.close(CLOSE_TIMEOUT)


def _check_sizes(request: Frame) -> None:
    """Raise ProtocolError for memory that would be too large."""
    for wire in request.params:
        if wire.kind >= 5 and not wire.flags & _NULL and wire.a > MAX_FRAME:
            raise ProtocolError(f"a memory reference to {wire.a} bytes")


def _child_param(wire: WireParam, allocator: ChildAllocator, command: int) -> Param:
    if wire.kind == 0:
        return Nothing()
    if wire.kind < 4:
        return Value(_DIRECTIONS[wire.kind - 1], wire.a, wire.b, wire.c)
    direction = _DIRECTIONS[wire.kind - 5]
    if wire.flags & _NULL:
        return MemRef(direction, None, 0, wire.a)
    if command == RpcCommand.SHM_FREE:
        return MemRef(direction, allocator.tokens.get(wire.b), 0, wire.a)
    content = bytearray(wire.a)
    content[: len(wire.content)] = wire.content
    return MemRef(direction, Memory.of(content), 0, wire.a)


def _child_wire(param: Param, allocator: ChildAllocator) -> WireParam:
    if isinstance(param, Value):
        return WireParam(param.direction, 0, param.a, param.b, param.c)
    if isinstance(param, MemRef):
        kind = 4 + param.direction
        if param.memory is None:
            return WireParam(kind, _NULL, param.size)
        token = allocator.token_of(param.memory)
        content = b""
        if not token and param.direction != Direction.IN and param.size <= param.memory.size:
            content = param.memory.read(0, param.size)
        return WireParam(kind, 0, param.size, token, len(content), content)
    return WireParam()


def main(arguments: Sequence[str] | None = None) -> int:
    """The child: serves the supplicant's services on an inherited stream socket until its other end is closed."""
    parser = argparse.ArgumentParser(prog="tee.io.supplicant_process", description=main.__doc__)
    parser.add_argument("--fd", type=int, required=True, help="the connected stream socket, inherited")
    Services.add_to(parser)
    options = parser.parse_args(arguments)
    try:
        supplicant = Services.parsed(options).supplicant(log=lambda text: print(text, file=sys.stderr))
    except (OSError, ValueError) as error:
        print(f"the supplicant cannot start: {error}", file=sys.stderr)
        return 1
    try:
        inherited = socket.socket(fileno=options.fd)
    except OSError as error:
        print(f"the supplicant cannot start: fd {options.fd} is no socket: {error.strerror}", file=sys.stderr)
        supplicant.close()
        return 1
    with inherited as connection:
        try:
            serve_connection(connection, supplicant)
        except ProtocolError as error:
            print(error, file=sys.stderr)
            return 1
        finally:
            supplicant.close()
    return 0


def _no_log(_: str) -> None:
    return


if __name__ == "__main__":
    sys.exit(main())
