"""Threads for work of the software TEE that cannot be cut into steps (:class:`tee.soft.workers.Workers`)."""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from tee.soft.workers import Ended

#: How many pieces of work are done at once; further ones wait.
THREADS = 2


class WorkerThreads:
    """Up to ``threads`` threads, started as they are needed. They do not keep the process from ending: work cannot be
    interrupted.
    """

    def __init__(self, threads: int = THREADS) -> None:
        self._most = threads
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Ended] | None] = queue.SimpleQueue()
        self._over: deque[Callable[[], None]] = deque()
        self._threads: list[threading.Thread] = []

    def submit(self, function: Callable[[], Any], ended: Ended) -> None:
        """See :class:`~tee.soft.workers.Workers`."""
        self._work.put((function, ended))
        if len(self._threads) < self._most:
            self._threads.append(threading.Thread(target=self._run, name="tee-worker", daemon=True))
            self._threads[-1].start()

    def collect(self) -> None:
        """See :class:`~tee.soft.workers.Workers`."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        while self._over:
            self._over.popleft()()

    def fileno(self) -> int:
        """See :class:`~tee.soft.workers.Workers`."""
        return self._fd

    def close(self) -> None:
        """End the threads: waits for the work that they have. Nothing is submitted or collected any more."""
        for _ in self._threads:
            self._work.put(None)
        for thread in self._threads:
            thread.join()
        os.close(self._fd)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            self._over.append(_outcome(*work))
            del work  # nothing of a TA's is kept while this waits
            os.eventfd_write(self._fd, 1)


def _outcome(function: Callable[[], Any], ended: Ended) -> Callable[[], None]:
    try:
        value = function()
    except BaseException as error:  # whatever it is, it is the TA's, which gets it
        failed = error
        return lambda: ended(None, failed)
    return lambda: ended(value, None)
