"""The control plane of a backend, on trio: accepts frontends, receives their messages, has them obeyed on the data
plane.

>>> async def main() -> None:
...     with DataPlane() as dataplane, Listener.at_path("/run/echo.sock") as listener:
...         await serve(Echo(), listener, dataplane)
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import socket
import stat
from collections.abc import Callable
from typing import TypeVar

import trio

from pyvhost.backend import Backend
from pyvhost.device import Device
from pyvhost.effects import Reply
from pyvhost.errors import Disconnected, MessageError, ProtocolError, StateError
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.fence import host_atomic_or, host_fences
from pyvhost.io.mapping import Mapper, allocate
from pyvhost.io.signals import prepare
from pyvhost.io.sockets import ANCILLARY_BYTES, Listener, fds_of, rights
from pyvhost.io.transfer import read_all, write_all
from pyvhost.memory import Mapping
from pyvhost.messages import HEADER, FrontendRequest
from pyvhost.session import Session
from pyvhost.vring.api import Fences

__all__ = ["serve"]

log = logging.getLogger("pyvhost")

_T = TypeVar("_T")

_ACCEPT_PAUSE = 0.1  # seconds, after a failure to accept

#: transfers of device state at a time, each in a thread, since what it reads or writes is the frontend's
_TRANSFERS = trio.CapacityLimiter(8)


async def serve(
    device: Device | Callable[[], Device],
    listener: Listener,
    dataplane: DataPlane,
    *,
    require_sealed: bool = False,
) -> None:
    """Serve one frontend after the other on ``listener``, until cancelled; of a connected socket, the one. ``device``
    may be a function that makes a new device for each. ``require_sealed`` refuses guest memory that could shrink.

    Errors of a frontend, and of the device, end its connection and are logged, and the next one is served.
    """
    if listener.connected:
        await _serve_one(device, trio.socket.from_stdlib_socket(listener.socket), dataplane, require_sealed)
        return
    sock = trio.socket.from_stdlib_socket(listener.socket)
    while True:
        try:
            connection, _ = await sock.accept()
        except OSError as e:  # too many files open, a frontend that left at once: the next one shall be served
            log.warning("accept: %s", e)
            await trio.sleep(_ACCEPT_PAUSE)
            continue
        await _serve_one(device, connection, dataplane, require_sealed)


async def _serve_one(
    device: Device | Callable[[], Device],
    sock: trio.socket.SocketType,
    dataplane: DataPlane,
    require_sealed: bool,
) -> None:
    with trio.CancelScope() as scope, sock:
        connection = _Connection(dataplane, Mapper(require_sealed), scope)
        try:
            made = device if isinstance(device, Device) else device()
            with trio.CancelScope(shield=True):  # what is opened will be closed
                session = await connection.call(functools.partial(connection.open, made))
        except Exception:
            log.exception("a device could not be connected")
            return
        try:
            await _converse(connection, session, sock)
        except Disconnected as e:
            log.info("connection ended: %s", e)
        except (ProtocolError, OSError) as e:
            log.warning("connection ended: %s", e)
        except Exception:
            log.exception("connection ended by an error of the device")
        finally:
            connection.end_transfers()
            with trio.CancelScope(shield=True):
                await connection.call(functools.partial(connection.close, session))


async def _converse(connection: _Connection, session: Session, sock: trio.socket.SocketType) -> None:
    """Messages in, replies out, until the end."""
    while True:
        fds: list[int] = []
        handed_over = False
        try:
            header = await _receive(sock, HEADER.size, fds)
            payload = await _receive(sock, Backend.payload_size(header), fds)
            if HEADER.unpack(header).request == FrontendRequest.CHECK_DEVICE_STATE:
                await connection.transferred()
            handed_over = True
            with trio.CancelScope(shield=True):  # file descriptors may come with the reply
                reply = await connection.call(functools.partial(session.receive, header, payload, fds))
        finally:
            if not handed_over:
                for fd in fds:
                    os.close(fd)
        if reply is not None:
            await _send(sock, reply)


async def _send(sock: trio.socket.SocketType, reply: Reply) -> None:
    try:
        sent = await sock.sendmsg([reply.data], rights(reply.fds))
    finally:
        for fd in reply.fds:
            os.close(fd)
    rest = reply.data[sent:]
    while rest:
        rest = rest[await sock.send(rest) :]


async def _receive(sock: trio.socket.SocketType, size: int, fds: list[int]) -> bytes:
    """Exactly ``size`` bytes; file descriptors that come with them are added to ``fds``.

    :raises Disconnected: the frontend closed the connection
    :raises MessageError: more file descriptors than a message may have
    """
    data = b""
    while len(data) < size:
        part, ancillary, flags, _ = await sock.recvmsg(size - len(data), ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC)
        fds_of(ancillary, flags, fds)
        if not part:
            raise Disconnected("the frontend left" if not data else "the frontend left within a message")
        data += part
    return data


class _Connection:
    """The ``Ports`` of one session, and the way from trio to the data plane and back."""

    def __init__(self, dataplane: DataPlane, mapper: Mapper, scope: trio.CancelScope) -> None:
        self._dataplane = dataplane
        self._token = trio.lowlevel.current_trio_token()
        self._scope = scope
        self._runner: _Runner | None = None
        self._wakeups: list[int] = []
        self._ended = False
        self._transfer_scope = trio.CancelScope()
        self._transferred = trio.Event()
        self._transferred.set()
        self.fences: Fences = host_fences()
        self.map: Callable[[int, int, int], Mapping] = mapper.map
        self.allocate = allocate
        self.atomic_or = host_atomic_or
        self.close_fd = dataplane.close_fd
        self.unwatch = dataplane.unwatch
        self.wake = dataplane.wake
        self.alone = dataplane.alone

    async def call(self, function: Callable[[], _T]) -> _T:
        """Call on the data-plane thread and wait for it. If this is cancelled, it is called nevertheless."""
        done = trio.Event()
        outcome: list[_T] = []
        error: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(function())
            except BaseException as e:
                error.append(e)
            self._soon(done.set)

        self._dataplane.post(run)
        await done.wait()
        if error:
            raise error.pop()  # not kept here: its traceback refers to this frame
        return outcome[0]

    async def transferred(self) -> None:
        """Wait until no transfer of device state is under way; it has a limit of time."""
        await self._transferred.wait()

    def end_transfers(self) -> None:
        self._ended = True
        self._transfer_scope.cancel()

    def _start_transfer(self, fd: int, data: bytes | None, limit: int, done: Callable[[bytes | None], object]) -> None:
        if self._ended:
            os.close(fd)
            return
        self._transferred = trio.Event()
        trio.lowlevel.spawn_system_task(self._transfer, _Work(fd, data, limit), done)

    async def _transfer(self, work: _Work, done: Callable[[bytes | None], object]) -> None:
        with contextlib.suppress(StateError), trio.CancelScope() as self._transfer_scope:
            try:
                if not self._ended:
                    result = await trio.to_thread.run_sync(work.run, abandon_on_cancel=True, limiter=_TRANSFERS)
                    await self.call(functools.partial(done, result))
            finally:
                work.never_started()
                self._transferred.set()

    def _soon(self, function: Callable[[], object]) -> None:
        with contextlib.suppress(trio.RunFinishedError):  # nobody waits any more
            self._token.run_sync_soon(function)

    # --- on the data-plane thread

    def open(self, device: Device) -> Session:
        session = Session(device, self)
        try:
            for fd in device.wakeups:
                self._dataplane.watch(fd, functools.partial(session.guarded, functools.partial(device.on_wakeup, fd)))
                self._wakeups.append(fd)
        except Exception:
            self.close(session)
            raise
        if type(device).run is not Device.run:
            self._runner = _Runner(session)
            self._dataplane.add_runner(self._runner)
        return session

    def close(self, session: Session) -> None:
        if self._runner is not None:
            self._dataplane.remove_runner(self._runner)
        for fd in self._wakeups:
            self._dataplane.unwatch(fd)
        session.disconnect()

    # --- Ports, on the data-plane thread

    def watch(self, fd: int, call: Callable[[], object]) -> None:
        self._dataplane.watch(fd, call, edge=True)

    def signal(self, fd: int) -> None:
        if not self._dataplane.signal(fd):
            self.hang_up("an eventfd of the frontend's was full")

    def transfer(self, fd: int, data: bytes | None, limit: int, done: Callable[[bytes | None], object]) -> None:
        self._soon(functools.partial(self._start_transfer, fd, data, limit, done))

    def check_channel(self, fd: int) -> None:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise MessageError("SET_BACKEND_REQ_FD with something that is no socket")

    def check_signal(self, fd: int) -> None:
        prepare(fd)

    def send(self, fd: int, message: bytes) -> bool:
        sock = socket.socket(fileno=fd)
        try:
            return sock.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(message)
        except OSError:
            return False
        finally:
            sock.detach()

    def post(self, call: Callable[[], object]) -> None:
        with contextlib.suppress(StateError):  # the data plane has ended, and the session with it
            self._dataplane.post(call)

    def hang_up(self, why: str) -> None:
        self._soon(self._scope.cancel)


class _Work:
    """What a transfer's thread does; the file descriptor is closed once, by whoever can."""

    def __init__(self, fd: int, data: bytes | None, limit: int) -> None:
        self._fd: list[int] = [fd]
        self._data = data
        self._limit = limit

    def run(self) -> bytes | None:
        """What was read, b"" after writing, None after a failure."""
        try:
            fd = self._fd.pop()
        except IndexError:
            return None
        try:
            if self._data is None:
                return read_all(fd, self._limit)
            write_all(fd, self._data)
            return b""
        except OSError as e:
            log.warning("the transfer of a device's state failed: %s", e)
            return None
        finally:
            os.close(fd)

    def never_started(self) -> None:
        while self._fd:
            os.close(self._fd.pop())


class _Runner:
    """A session's background work, for the loop."""

    __slots__ = ("_session",)

    def __init__(self, session: Session) -> None:
        self._session = session

    @property
    def touched(self) -> bool:
        return self._session.touched

    @touched.setter
    def touched(self, value: bool) -> None:
        self._session.touched = value

    def run(self) -> float | None:
        wait = self._session.guarded(self._session.device.run)
        self._session.touched = False  # by this call itself
        return wait
