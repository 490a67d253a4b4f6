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
    """Up to ``threads`` threads, started as they are needed. They end with the process: work cannot be interrupted."""

    def __init__(self, threads: int = THREADS) -> None:
        self._most = threads
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._work: queue.SimpleQueue[tuple[Callable[[], Any], Ended]] = queue.SimpleQueue()
        self._over: deque[Callable[[], None]] = deque()
        self._threads = 0

    def submit(self, function: Callable[[], Any], ended: Ended) -> None:
        """See :class:`~tee.soft.workers.Workers`."""
        self._work.put((function, ended))
        if self._threads < self._most:
            self._threads += 1
            threading.Thread(target=self._run, name="tee-worker", daemon=True).start()

    def collect(self) -> None:
        """See :class:`~tee.soft.workers.Workers`."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._fd)
        while self._over:
            self._over.popleft()()

    def fileno(self) -> int:
        """See :class:`~tee.soft.workers.Workers`."""
        return self._fd

    def _run(self) -> None:
        while True:
            function, ended = self._work.get()
            self._over.append(_outcome(function, ended))
            del function, ended  # nothing of a TA's is kept while this waits
            os.eventfd_write(self._fd, 1)


def _outcome(function: Callable[[], Any], ended: Ended) -> Callable[[], None]:
    try:
        value = function()
    except BaseException as error:  # whatever it is, it is the TA's, which gets it
        failed = error
        return lambda: ended(None, failed)
    return lambda: ended(value, None)
