"""The host's end of the guest's agent (`lab/guest/agent.py`)."""

from __future__ import annotations

import contextlib
import itertools
import json
import queue
import socket
import sys
import threading
import time


class AgentError(Exception):
    """The agent said no, or did not answer."""


class AgentClient:
    """Requests from any thread; one thread of its own reads the answers. `port` leads to the agent, and is closed by
    `close()`. `longest`: bytes that a request may have on it."""

    def __init__(self, port: socket.socket, longest: int = sys.maxsize) -> None:
        self._socket = port
        self._longest = longest
        self._ids = itertools.count(1)
        self._writing = threading.Lock()
        self._waiting: dict[int, queue.SimpleQueue[dict[str, object] | None]] = {}
        self._state = threading.Condition()
        self._boot: str | None = None
        self._closed = False
        self.uptime_at_ready = 0.0
        self._reader = threading.Thread(target=self._read, name="guest agent", daemon=True)
        self._reader.start()

    @property
    def boot(self) -> str | None:
        """The kernel's id of the boot that the agent last spoke of."""
        return self._boot

    def _read(self) -> None:
        pending = b""
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            if not data:
                break
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                self._take(line)
        with self._state:
            self._closed = True
            self._state.notify_all()
            self._drop_waiting()

    def _take(self, line: bytes) -> None:
        # a guest that is reset leaves half a line, onto which the next agent's first line is glued
        start = line.rfind(b'{"event": "ready"')
        try:
            message = json.loads(line[start:] if start > 0 else line)
        except ValueError:
            return
        with self._state:
            if message.get("event") == "ready":
                self._drop_waiting()
                self._boot = str(message["boot"])
                self.uptime_at_ready = float(message["uptime"])
                self._state.notify_all()
            elif (box := self._waiting.pop(int(message.get("id") or 0), None)) is not None:
                box.put(message)

    def _drop_waiting(self) -> None:
        for box in self._waiting.values():
            box.put(None)
        self._waiting.clear()

    def wait_ready(self, not_boot: str | None, timeout: float) -> bool:
        """Until an agent of a boot other than `not_boot` has spoken."""
        end = time.monotonic() + timeout
        with self._state:
            while self._boot is None or self._boot == not_boot:
                left = end - time.monotonic()
                if left <= 0 or self._closed:
                    return False
                self._state.wait(left)
        return True

    def call(self, op: str, wait: float, **arguments: object) -> dict[str, object]:
        number = next(self._ids)
        line = json.dumps({"id": number, "op": op, **arguments}).encode() + b"\n"
        if len(line) > self._longest:
            raise AgentError(f"{op}: {len(line)} bytes are more than the guest's line takes ({self._longest})")
        box: queue.SimpleQueue[dict[str, object] | None] = queue.SimpleQueue()
        with self._state:
            if self._closed:
                raise AgentError(f"{op}: the guest is gone")
            self._waiting[number] = box
        try:
            with self._writing:
                self._socket.sendall(line)
            answer = box.get(timeout=wait)
        except queue.Empty:
            with self._state:
                self._waiting.pop(number, None)
            raise AgentError(f"{op}: no answer from the guest within {wait:g} s") from None
        except OSError as error:
            raise AgentError(f"{op}: {error}") from error
        if answer is None:
            raise AgentError(f"{op}: the guest was reset or ended before it answered")
        if "error" in answer:
            raise AgentError(f"{op}: {answer['error']}")
        return answer

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._reader.join(timeout=5)
