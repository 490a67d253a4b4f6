"""SOCKET: TCP and UDP client sockets for TAs (GlobalPlatform TEE Sockets API), to destinations on an allow-list.

The first parameter is an IN value: ``a`` = the operation, ``b`` = the TA instance, ``c`` = the handle.

===========  =====================================================================================================
operation    further parameters
===========  =====================================================================================================
0 OPEN       [IN a = port, b = protocol, c = IP version], [IN host, ends with NUL], [OUT a = handle]
1 CLOSE      –
2 CLOSE_ALL  – (all handles of the instance)
3 SEND       [IN data], [INOUT a = timeout in ms; answered b = bytes sent]
4 RECV       [OUT data; answered size], [IN a = timeout in ms]
5 IOCTL      [INOUT data], [IN a = command]
===========  =====================================================================================================

Several operations run at a time, each on a thread of the supplicant's (:mod:`tee.io.lanes`), of which there are not
many: no wait is longer than ``max_wait`` seconds, whatever the TA says, not for a name's address either; it gets a
timeout and asks again. A datagram that is larger than the memory is cut, and its rest is lost, as with OP-TEE's own
supplicant (optee_client, tee-supplicant/src/tee_socket.c: one ``read``). Other than there, RECV with size 0 answers
how much there is, and takes nothing.
"""

from __future__ import annotations

import errno
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import IntEnum

from tee.io.services.base import (
    Allocator,
    Log,
    Result,
    bad,
    count,
    memory_of,
    memref,
    put,
    refuse,
    resized,
    text,
    value,
)
from tee.io.services.destinations import AllowList, literal
from tee.io.services.lookup import Info, Lookups
from tee.params import Direction, Param, Value


class SocketOperation(IntEnum):
    """OPTEE_RPC_SOCKET_* (core/include/optee_rpc_cmd.h)."""

    OPEN = 0
    CLOSE = 1
    CLOSE_ALL = 2
    SEND = 3
    RECV = 4
    IOCTL = 5


class SocketResult(IntEnum):
    """TEE_ISOCKET_ERROR_* (GlobalPlatform TEE Sockets API)."""

    PROTOCOL = 0xF1007001
    REMOTE_CLOSED = 0xF1007002
    TIMEOUT = 0xF1007003
    OUT_OF_RESOURCES = 0xF1007004
    LARGE_BUFFER = 0xF1007005
    HOSTNAME = 0xF1007007


class Protocol(IntEnum):
    """TEE_ISOCKET_PROTOCOLID_*."""

    TCP = 0x65
    UDP = 0x66


class SocketCommand(IntEnum):
    """Commands of IOCTL: TEE_TCP_* (OP-TEE's extensions), TEE_UDP_*."""

    TCP_SET_RECVBUF = 0x65F00000
    TCP_SET_SENDBUF = 0x65F00001
    UDP_CHANGEADDR = 0x66000001
    UDP_CHANGEPORT = 0x66000002


#: TEE_IP_VERSION_*: none in particular, 4, 6.
FAMILIES = {0: socket.AF_UNSPEC, 1: socket.AF_INET, 2: socket.AF_INET6}

#: The timeout that means to wait for ever.
BLOCKING = 0xFFFF_FFFF

#: How many sockets a TEE may have here at once, and how many bytes go at a time.
MAX_SOCKETS = 64
MAX_BYTES = 1 << 20

#: How long any one operation waits at most, in seconds; well below the deadline that a device gives an RPC.
MAX_WAIT = 5.0

_MAX_HOST = 255
_MAX_PEEK = 4096
_MAX_HANDLE = (1 << 31) - 1
_MAX_BUFFER = 4 << 20
_KINDS = {Protocol.TCP: "tcp", Protocol.UDP: "udp"}
_TYPES = {Protocol.TCP: socket.SOCK_STREAM, Protocol.UDP: socket.SOCK_DGRAM}


@dataclass(slots=True)
class _Socket:
    """A socket of a TA. ``host`` is what the TA calls its peer."""

    instance: int
    protocol: Protocol
    sock: socket.socket
    host: str
    port: int

    def close(self) -> None:
        """Close it; who waits for it on another thread is woken."""
        with suppress(OSError):  # it is not connected any more
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Sockets:
    """Serves SOCKET to destinations that ``allowed`` has."""

    def __init__(self, allowed: AllowList, log: Log, *, max_wait: float = MAX_WAIT) -> None:
        self._allowed = allowed
        self._log = log
        self._max_wait = max_wait
        self._lookups = Lookups()
        self._lock = threading.Lock()  # guards what follows
        self._sockets: dict[int, _Socket] = {}
        self._opening = 0
        self._closed = False
        # At a random place: a handle of an earlier life does not name a socket of this one.
        self._next = secrets.randbelow(_MAX_HANDLE) + 1

    def __len__(self) -> int:
        return len(self._sockets)

    def close(self) -> None:
        """Close all sockets, and open no more. Who waits for one is woken."""
        with self._lock:
            self._closed = True
            gone = tuple(self._sockets.values())
            self._sockets.clear()
        for one in gone:
            one.close()

    def serve(self, params: list[Param], _: Allocator) -> list[Param]:
        """SOCKET. Thread-safe."""
        what = value(params, 0, Direction.IN)
        operation = _OPERATIONS.get(what.a)
        if operation is None:
            raise bad(f"socket operation {what.a}")
        number, run = operation
        count(params, number)
        return run(self, what, params)

    def _open(self, what: Value, params: list[Param]) -> list[Param]:
        where, host = value(params, 1, Direction.IN), memref(params, 2, Direction.IN)
        value(params, 3, Direction.OUT)
        if where.b not in _KINDS or where.c not in FAMILIES or not 0 <= where.a <= 65535:
            raise bad(f"a socket of protocol {where.b}, IP version {where.c}, port {where.a}")
        protocol = Protocol(where.b)
        name = _host(text(host, _MAX_HOST))
        with self._lock:
            if len(self._sockets) + self._opening >= MAX_SOCKETS:
                raise refuse(SocketResult.OUT_OF_RESOURCES, f"{MAX_SOCKETS} sockets are open")
            self._opening += 1
        sock = None
        try:
            sock = self._connect(protocol, name, where.a, FAMILIES[where.c])
        finally:
            with self._lock:
                self._opening -= 1
                handle = self._add(_Socket(what.b, protocol, sock, name, where.a)) if sock is not None else 0
        return [what, where, host, Value(Direction.OUT, handle)]

    def _add(self, one: _Socket) -> int:
        if self._closed:
            one.close()
            raise refuse(Result.COMMUNICATION, "the supplicant is closed")
        while self._next in self._sockets:
            self._next = self._next % _MAX_HANDLE + 1
        handle = self._next
        self._next = handle % _MAX_HANDLE + 1
        self._sockets[handle] = one
        return handle

    def _close(self, what: Value, params: list[Param]) -> list[Param]:
        with self._lock:
            one = self._socket(what)
            del self._sockets[what.c]
        one.close()
        return params

    def _close_all(self, what: Value, params: list[Param]) -> list[Param]:
        with self._lock:
            gone = {handle: one for handle, one in self._sockets.items() if one.instance == what.b}
            for handle in gone:
                del self._sockets[handle]
        for one in gone.values():
            one.close()
        return params

    def _send(self, what: Value, params: list[Param]) -> list[Param]:
        data, wait = memref(params, 1, Direction.IN), value(params, 2, Direction.INOUT)
        one = self._socket(what)
        memory = memory_of(data)
        if one.protocol is Protocol.UDP and data.size > MAX_BYTES:
            raise refuse(SocketResult.LARGE_BUFFER, f"a datagram of {data.size} bytes")
        content = memory.read(data.offset, min(data.size, MAX_BYTES))
        self._wait(one, select.POLLOUT, wait.a)
        with _results():
            sent = one.sock.send(content, socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)
        return [what, data, Value(Direction.INOUT, wait.a, sent, wait.c)]

    def _recv(self, what: Value, params: list[Param]) -> list[Param]:
        target, wait = memref(params, 1, Direction.OUT), value(params, 2, Direction.IN)
        one = self._socket(what)
        if not target.size:
            return [what, resized(target, self._queued(one)), wait]
        memory_of(target).view(target.offset, target.size)  # raises where that is outside the memory
        self._wait(one, select.POLLIN, wait.a)
        with _results():
            data = one.sock.recv(min(target.size, MAX_BYTES), socket.MSG_DONTWAIT)
        return [what, put(target, data), wait]

    def _queued(self, one: _Socket) -> int:
        """How many bytes can be read at once: those of the next datagram, or of the stream as far as is looked."""
        flags = socket.MSG_PEEK | socket.MSG_DONTWAIT
        with _results(), suppress(BlockingIOError):
            if one.protocol is Protocol.UDP:
                return one.sock.recv_into(bytearray(1), 1, flags | socket.MSG_TRUNC)
            return len(one.sock.recv(_MAX_PEEK, flags))
        return 0

    def _ioctl(self, what: Value, params: list[Param]) -> list[Param]:
        data, command = memref(params, 1, Direction.INOUT), value(params, 2, Direction.IN)
        one = self._socket(what)
        if command.a in (SocketCommand.TCP_SET_RECVBUF, SocketCommand.TCP_SET_SENDBUF) and one.protocol is Protocol.TCP:
            size = _number(memory_of(data).read(data.offset, data.size), 4)
            option = socket.SO_RCVBUF if command.a == SocketCommand.TCP_SET_RECVBUF else socket.SO_SNDBUF
            with _results():
                one.sock.setsockopt(socket.SOL_SOCKET, option, min(size, _MAX_BUFFER))
        elif command.a == SocketCommand.UDP_CHANGEADDR and one.protocol is Protocol.UDP:
            self._change(one, _host(text(data, _MAX_HOST)), one.port)
        elif command.a == SocketCommand.UDP_CHANGEPORT and one.protocol is Protocol.UDP:
            self._change(one, one.host, _number(memory_of(data).read(data.offset, data.size), 2))
        else:
            raise refuse(Result.NOT_SUPPORTED, f"command {command.a:#x} of a socket")
        return params

    def _change(self, one: _Socket, host: str, port: int) -> None:
        """Give a UDP socket another peer, of the same family."""
        for family, _, where in self._resolve(one.protocol, host, port, one.sock.family, self._max_wait):
            with _results():
                one.sock.connect(where)
            assert family == one.sock.family
            one.host, one.port = host, port
            return
        raise refuse(SocketResult.HOSTNAME, f"{host} has no address")

    def _connect(self, protocol: Protocol, host: str, port: int, family: int) -> socket.socket:
        last = refuse(SocketResult.HOSTNAME, f"{host} has no address")
        until = time.monotonic() + self._max_wait
        for found, kind, where in self._resolve(protocol, host, port, family, self._max_wait):
            sock = socket.socket(found, kind | socket.SOCK_CLOEXEC)
            try:
                sock.settimeout(max(0.001, until - time.monotonic()))
                sock.connect(where)
                sock.settimeout(0)
                return sock
            except TimeoutError:
                last = refuse(SocketResult.TIMEOUT, f"{host} port {port} does not answer")
            except OSError as error:
                last = refuse(Result.COMMUNICATION, f"{host} port {port}: {error}")
            sock.close()
        raise last

    def _resolve(
        self, protocol: Protocol, host: str, port: int, family: int, seconds: float
    ) -> list[tuple[int, int, tuple[str, int] | tuple[str, int, int, int]]]:
        """The addresses of a host that is allowed."""
        kind = _KINDS[protocol]
        if not self._allowed.allows(kind, host, port):
            self._log(
                f"a TA may not connect to {kind} {host!r} port {port}; if it is to, add --allow-socket {host}:{port}"
            )
            raise refuse(Result.ACCESS_DENIED, f"{host!r} port {port}")
        address = literal(host)
        found: list[Info] = []
        try:
            if address is None:
                found = self._lookups.resolve(host, port, family, _TYPES[protocol], seconds)
            else:  # is never asked of anybody, and is what was looked up in the list
                flags = socket.AI_NUMERICHOST
                found += socket.getaddrinfo(str(address), port, family, _TYPES[protocol], 0, flags)
        except TimeoutError as error:
            raise refuse(SocketResult.TIMEOUT, str(error)) from None
        except BlockingIOError as error:
            raise refuse(SocketResult.OUT_OF_RESOURCES, str(error)) from None
        except (OSError, UnicodeError):
            raise refuse(SocketResult.HOSTNAME, f"{host} has no address") from None
        return [(family_, type_, where) for family_, type_, _, _, where in found]

    def _socket(self, what: Value) -> _Socket:
        one = self._sockets.get(what.c)
        if one is None or one.instance != what.b:
            raise bad(f"no socket of instance {what.b} has the handle {what.c}")
        return one

    def _wait(self, one: _Socket, event: int, timeout: int) -> None:
        """Wait until the socket is ready, as long as the TA says, but not longer than ``max_wait``."""
        seconds = self._max_wait if timeout == BLOCKING else min(timeout / 1000, self._max_wait)
        poll = select.poll()
        poll.register(one.sock, event)
        if not poll.poll(max(0, int(seconds * 1000))):
            raise refuse(SocketResult.TIMEOUT, "")


@contextmanager
def _results() -> Iterator[None]:
    """Errors of a socket as the TA gets them. BlockingIOError: there was nothing after all."""
    try:
        yield
    except BlockingIOError:
        raise refuse(SocketResult.TIMEOUT, "") from None
    except (BrokenPipeError, ConnectionError) as error:
        raise refuse(SocketResult.REMOTE_CLOSED, str(error)) from None
    except OSError as error:
        if error.errno == errno.EMSGSIZE:
            raise refuse(SocketResult.LARGE_BUFFER, str(error)) from None
        raise refuse(Result.COMMUNICATION, str(error)) from None


def _host(name: bytes) -> str:
    try:
        return name.decode("ascii")
    except UnicodeDecodeError:
        raise refuse(SocketResult.HOSTNAME, "a host's name is ASCII") from None


def _number(data: bytes, size: int) -> int:
    if len(data) != size:
        raise bad(f"a number of {len(data)} bytes where {size} belong")
    return int.from_bytes(data, "little")


_OPERATIONS: dict[int, tuple[int, Callable[[Sockets, Value, list[Param]], list[Param]]]] = {
    SocketOperation.OPEN: (4, Sockets._open),
    SocketOperation.CLOSE: (1, Sockets._close),
    SocketOperation.CLOSE_ALL: (1, Sockets._close_all),
    SocketOperation.SEND: (3, Sockets._send),
    SocketOperation.RECV: (3, Sockets._recv),
    SocketOperation.IOCTL: (3, Sockets._ioctl),
}
"""Operation → how many parameters it has, and what serves it."""
