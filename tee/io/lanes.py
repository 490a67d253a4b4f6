"""Threads on which a supplicant's services run: those that wait for others do not hold the rest up.

Services are not made for several threads, but for SOCKET, which mostly waits: up to :data:`SOCKET_THREADS` of its
operations run at a time. A plug-in may take as long as it likes, and has a thread of its own. All else, which is about
files and memory of this machine, is served in order on one thread.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from tee.rpc import RpcCommand

_log = logging.getLogger(__name__)

T = TypeVar("T")

#: How many operations on sockets run at once; further ones wait for one of them to end.
SOCKET_THREADS = 8

_THREADS = {RpcCommand.SOCKET: SOCKET_THREADS, RpcCommand.PLUGIN: 1}


class Lanes(Generic[T]):
    """Calls ``serve`` with what is put in, on threads of its own, which are started as they are needed."""

    def __init__(self, name: str, serve: Callable[[T], None]) -> None:
        """``serve`` does not raise. Threads are called ``name`` and what they are for."""
        self._rest: Lane[T] = Lane(name, 1, serve)
        self._lanes = {
            command: Lane(f"{name}-{command.name.lower()}", most, serve) for command, most in _THREADS.items()
        }

    def put(self, command: int, item: T) -> None:
        """Have ``item`` served, which is about ``command``. Nothing after :meth:`close`."""
        self._lane(command).put(item)

    def _lane(self, command: int) -> Lane[T]:
        return self._lanes[RpcCommand(command)] if command in self._lanes else self._rest

    def close(self, timeout: float) -> None:
        """Take nothing more, and wait up to ``timeout`` seconds for the end of what was put in."""
        lanes = (self._rest, *self._lanes.values())
        for lane in lanes:
            lane.end()
        until = time.monotonic() + timeout
        for lane in lanes:
            lane.join(until)


class Lane(Generic[T]):
    """Up to ``most`` threads that call ``serve`` with what is put in. Whatever it raises is logged."""

    def __init__(self, name: str, most: int, serve: Callable[[T], None]) -> None:
        self._name = name
        self._most = most
        self._serve = serve
        self._work: queue.SimpleQueue[T | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0
        self._threads: list[threading.Thread] = []
        self._ended = False

    def put(self, item: T) -> None:
        """Have ``item`` served, in its turn. Nothing after :meth:`end`."""
        with self._lock:
            if self._ended:
                return
            self._work.put(item)
            if self._idle:
                self._idle -= 1  # one that waits takes it
            elif len(self._threads) < self._most:
                thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._threads.append(thread)
                thread.start()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            try:
                self._serve(item)
            except Exception:
                _log.exception("a thread of the supplicant failed; it goes on")
            with self._lock:
                if self._work.empty():
                    self._idle += 1

    def end(self) -> None:
        """Take nothing more; what was put in is still served."""
        with self._lock:
            self._ended = True
            for _ in self._threads:
                self._work.put(None)

    def join(self, until: float) -> None:
        """Wait for that, until then on ``time.monotonic()``."""
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
