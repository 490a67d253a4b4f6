"""A broker with backends that attach over real sockets and answer as a script says; the TEE is a function call."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import UUID

import trio

from host_backend.broker.broker import Broker, Policy
from host_backend.broker.routes import Sole
from host_backend.broker.server import serve
from host_backend.trace import Recorder
from pyvhost.io.sockets import Listener
from tee.courier import Answer, Ask, Begins, CallKind, Ends, Hello, Message, Reader, WireParam, Withdraw, pack
from tee.io.supplicant import Supplicant
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply

Script = Callable[[Ask], Answer | None]

TA = UUID("11112222-3333-4444-5555-666677778888")


class Routes(Recorder):
    """Keeps who was asked, and why."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []
        self.ended: list[tuple[str, int]] = []

    def rpc(self, vm: str, rpc: object, command: int, route: str) -> None:
        self.told.append((vm, route))

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        self.ended.append((answered_by, code))


class Peer:
    """A backend of a script's."""

    def __init__(self, path: Path, script: Script) -> None:
        self.asked: list[Ask] = []
        self.withdrawn: list[int] = []
        self.script = script
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.connect(str(path))
        self.send(Hello())
        self._reader = Reader()
        self.greeted = threading.Event()
        self.gone = threading.Event()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        assert self.greeted.wait(10)

    def send(self, *messages: Message) -> None:
        self.socket.sendall(b"".join(map(pack, messages)))

    def opens(self, call: int = 1, uuid: UUID = TA, vm: str = "") -> None:
        self.send(Begins(call, CallKind.OPEN_SESSION, uuid, vm))

    def close(self) -> None:
        with suppress(OSError):  # it may have been disconnected
            self.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join(10)
        self.socket.close()

    def _read(self) -> None:
        try:
            while data := self.socket.recv(1 << 20):
                for message in self._reader.feed(data):
                    self._take(message)
        except OSError:
            pass
        self.gone.set()

    def _take(self, message: Message) -> None:
        if isinstance(message, Hello):
            self.greeted.set()
        elif isinstance(message, Withdraw):
            self.withdrawn.append(message.ask)
        else:
            assert isinstance(message, Ask)
            self.asked.append(message)
            answer = self.script(message)
            if answer is not None:
                self.send(answer)


class Bench:
    """``vms`` each have a socket; TAs of the host lie in ``folder``."""

    def __init__(self, folder: Path, policy: Policy, vms: tuple[str, ...], host: Supplicant | None = None) -> None:
        self.routes = Routes()
        self.broker = Broker(host or Supplicant([folder]), policy, recorder=self.routes)
        self.paths = {vm: folder / f"{vm}.sock" for vm in vms}
        self.peers: list[Peer] = []
        self._scope = trio.CancelScope()
        started = threading.Event()
        self._thread = threading.Thread(target=trio.run, args=(self._run, started), daemon=True)
        self._thread.start()
        assert started.wait(10)

    async def _run(self, started: threading.Event) -> None:
        listeners = [(vm, Listener.at_path(path, mode=0o600)) for vm, path in self.paths.items()]
        with self._scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, self.broker, listeners)
                self._token = trio.lowlevel.current_trio_token()
                started.set()
        for _, listener in listeners:
            listener.close()

    def peer(self, vm: str, script: Script) -> Peer:
        self.peers.append(Peer(self.paths[vm], script))
        return self.peers[-1]

    def close(self) -> None:
        for peer in self.peers:
            peer.close()
        self.end()
        self.broker.close()

    def end(self) -> None:
        if self._thread.is_alive():
            self._token.run_sync_soon(self._scope.cancel)
            self._thread.join(10)
            assert not self._thread.is_alive()

    def ta_size(self, uuid: UUID = TA) -> RpcReply:
        return self.broker.serve(Rpc(RpcCommand.LOAD_TA, [name(uuid), MemRef(Direction.OUT, None)]), NO_MEMORY)

    def ta(self, room: int, uuid: UUID = TA) -> tuple[RpcReply, bytes]:
        memory = Memory.of(bytearray(room))
        reply = self.broker.serve(
            Rpc(RpcCommand.LOAD_TA, [name(uuid), MemRef(Direction.OUT, memory, 0, room)]), NO_MEMORY
        )
        return reply, memory.read(0, room)


class NoMemory:
    """Nobody gets any."""

    def allocate(self, size: int) -> Memory:
        raise MemoryError

    def free(self, memory: Memory) -> None:
        raise AssertionError("nothing was allocated")


NO_MEMORY = NoMemory()


@contextmanager
def bench(folder: Path, *vms: str, host: Supplicant | None = None, **policy: float | str | Sole) -> Iterator[Bench]:
    made = Bench(folder, Policy(**policy), vms or ("a", "b"), host)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        made.close()


def name(uuid: UUID) -> Value:
    return Value(Direction.IN, int.from_bytes(uuid.bytes[:8], "little"), int.from_bytes(uuid.bytes[8:], "little"))


def has(content: bytes) -> Script:
    """A guest whose supplicant has that TA."""

    def script(ask: Ask) -> Answer:
        assert ask.command == RpcCommand.LOAD_TA
        first, room = ask.params
        if room.a < len(content):
            return Answer(ask.ask, Result.SUCCESS, [first, WireParam(6, room.flags, len(content))])
        return Answer(ask.ask, Result.SUCCESS, [first, WireParam(6, 0, len(content), content=content)])

    return script


def lacks(ask: Ask) -> Answer:
    """A guest whose supplicant has nothing."""
    return Answer(ask.ask, Result.ITEM_NOT_FOUND)


def stalls(ask: Ask) -> None:
    """A guest that never answers."""


def size_of(reply: RpcReply) -> int:
    param: Param = reply.params[1]
    assert isinstance(param, MemRef)
    return param.size


__all__ = ["TA", "Bench", "Ends", "Peer", "bench", "has", "lacks", "name", "size_of", "stalls"]
