"""A backend's connection to the host's supplicant broker (:mod:`tee.courier`): it is made again whenever it is lost.

Two threads: one that connects and reads, one that sends answers, which may be large. That a call begins is sent by
whoever makes it, so that the broker can have read it before the TEE sees the call.
"""

from __future__ import annotations

import logging
import queue
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from tee.courier import Answer, Ask, Begins, CourierError, Ends, Hello, Message, Reader, Withdraw, pack

log = logging.getLogger(__name__)

SEND_TIMEOUT_S = 2
"""A broker that does not read for so long is given up, and connected to again."""

FIRST_RETRY_S, LAST_RETRY_S = 0.05, 2.0

MAX_WAITING = 64
"""Questions that wait to be taken; a broker that asks more makes no sense."""

_CHUNK = 1 << 18


class Lost:
    """The connection has ended: nobody waits for answers to what came by it."""


class BrokerLink:
    """``wake`` is called, on any thread, when :meth:`take` has something. Thread-safe."""

    def __init__(self, path: str, wake: Callable[[], object]) -> None:
        self.path = path
        self._wake = wake
        self._lock = threading.Lock()
        """Guards the calls, and sending."""
        self._calls: dict[int, Begins] = {}
        self._socket: socket.socket | None = None
        self._came: deque[Ask | Withdraw | Lost] = deque()
        self._later: queue.SimpleQueue[Answer | Ends | None] = queue.SimpleQueue()
        self._closed = threading.Event()
        self._ready = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"broker-{name}", daemon=True)
            for name, target in (("link", self._keep), ("writer", self._send_later))
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """End the connection, for good."""
        self._closed.set()
        self._later.put(None)
        with self._lock:
            self._drop()

    def connected(self, timeout: float) -> bool:
        """Wait until the broker has answered for the first time; False where it has not."""
        return self._ready.wait(timeout)

    def begins(self, begins: Begins) -> None:
        """The call is about to enter the TEE. Blocks until that is sent; no longer than SEND_TIMEOUT_S, or as long as
        a large answer takes."""
        with self._lock:
            self._calls[begins.call] = begins
            self._send(begins)

    def ends(self, call: int) -> None:
        """It has come back. Does not block."""
        self._later.put(Ends(call))

    def answer(self, answer: Answer) -> None:
        """Answer what was taken. Goes nowhere where the connection was lost since."""
        self._later.put(answer)

    def take(self) -> Ask | Withdraw | Lost | None:
        """What has come next, or None."""
        return self._came.popleft() if self._came else None

    # -- sending

    def _send(self, message: Message) -> None:
        """With the lock."""
        if self._socket is None:
            return
        try:
            self._socket.sendall(pack(message))
        except (OSError, CourierError) as error:
            log.warning("the broker at %s is not reached any more: %s", self.path, error)
            self._drop()

    def _send_later(self) -> None:
        while (message := self._later.get()) is not None:
            with self._lock:
                if not isinstance(message, Ends) or self._calls.pop(message.call, None) is not None:
                    self._send(message)

    def _drop(self) -> None:
        """With the lock. The reader sees it."""
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket = None

    # -- connecting and reading

    def _keep(self) -> None:
        pause = FIRST_RETRY_S
        told = False
        while not self._closed.is_set():
            try:
                connection = self._connect()
            except OSError as error:
                if not told:
                    log.warning("no broker at %s (%s): RPCs of guests go to the host's supplicant", self.path, error)
                    told = True
                self._closed.wait(pause)
                pause = min(2 * pause, LAST_RETRY_S)
                continue
            with connection:
                if self._serve(connection):
                    pause, told = FIRST_RETRY_S, False
                with self._lock:
                    self._drop()
            self._came.append(Lost())
            self._wake()
            self._closed.wait(pause)
            pause = min(2 * pause, LAST_RETRY_S)

    def _connect(self) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            connection.connect(self.path)
            timeout = struct.pack("ll", SEND_TIMEOUT_S, 0)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, timeout)
            connection.sendall(pack(Hello()))
        except OSError:
            connection.close()
            raise
        return connection

    def _serve(self, connection: socket.socket) -> bool:
        """Read until the connection ends; whether the broker has answered at all."""
        reader, greeted = Reader(), False
        try:
            while data := connection.recv(_CHUNK):
                for message in reader.feed(data):
                    if not greeted:
                        self._greet(connection, message)
                        greeted = True
                    elif isinstance(message, Ask | Withdraw) and len(self._came) < MAX_WAITING:
                        self._came.append(message)
                        self._wake()
                    else:
                        raise CourierError(f"{type(message).__name__} from a broker")
        except CourierError as error:
            log.warning("the broker at %s says what makes no sense: %s", self.path, error)
        except OSError as error:
            log.info("the broker at %s: %s", self.path, error)
        return greeted

    def _greet(self, connection: socket.socket, message: Message) -> None:
        if message != Hello():
            raise CourierError("its first message is no HELLO of this version")
        with self._lock:
            self._socket = connection
            for begins in self._calls.values():
                self._send(begins)
        log.info("attached to the broker at %s", self.path)
        self._ready.set()
