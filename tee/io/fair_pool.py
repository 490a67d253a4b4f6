"""Threads for what blocks, shared fairly among those for whom it is done.

Each owner (a guest) has a queue of its own; the owners have their turns round robin. While there are several owners,
none of them has all the threads, so that calls of one that never end do not keep the others from theirs.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable

_log = logging.getLogger(__name__)

Job = Callable[[int], None]
"""Is called with the number of its thread, from 0 on. Does not raise."""


_FAULTS = {signal.SIGBUS, signal.SIGFPE, signal.SIGILL, signal.SIGSEGV}


def block_signals() -> None:
    """For a thread whose system calls cannot be begun again: no signal shall interrupt them."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals() - _FAULTS)


class FairPool:
    """``threads`` threads called ``name``. :meth:`put` and the rest may be called from any thread."""

    def __init__(self, name: str, threads: int) -> None:
        self._size = threads
        self._changed = threading.Condition()
        self._owners: dict[Hashable, int] = {}
        self._waiting: dict[Hashable, deque[Job]] = {}
        """Owners with jobs that have not begun; the first has its turn next."""
        self._held: dict[Hashable, int] = {}
        """Threads by owner."""
        self._ended = False
        self._threads = [
            threading.Thread(target=self._run, args=(number,), name=f"{name}-{number}", daemon=True)
            for number in range(threads)
        ]
        for thread in self._threads:
            thread.start()

    def enter(self, owner: Hashable) -> None:
        """From now on ``owner`` counts as one that wants threads; until as many :meth:`leave`."""
        with self._changed:
            self._owners[owner] = self._owners.get(owner, 0) + 1

    def leave(self, owner: Hashable) -> None:
        """The opposite of :meth:`enter`."""
        with self._changed:
            self._owners[owner] -= 1
            if not self._owners[owner]:
                del self._owners[owner]
                self._changed.notify_all()  # fewer to share with

    def put(self, owner: Hashable, job: Job) -> None:
        """Have ``job`` done when it is its turn. Nothing after :meth:`close`."""
        with self._changed:
            if not self._ended:
                self._waiting.setdefault(owner, deque()).append(job)
                self._changed.notify()

    def take_back(self, owner: Hashable, job: Job) -> bool:
        """Whether ``job`` had not begun; then it never does."""
        with self._changed:
            queue = self._waiting.get(owner)
            if queue is None or job not in queue:
                return False
            queue.remove(job)
            if not queue:
                del self._waiting[owner]
            return True

    @property
    def busy(self) -> int:
        """How many threads have a job."""
        return sum(tuple(self._held.values()))

    @property
    def waiting(self) -> int:
        """How many jobs have not begun."""
        with self._changed:
            return sum(map(len, self._waiting.values()))

    def close(self, timeout: float) -> bool:
        """Begin nothing more, and wait up to ``timeout`` seconds for what has begun; whether that has ended."""
        with self._changed:
            self._ended = True
            self._waiting.clear()
            self._changed.notify_all()
        until = time.monotonic() + timeout
        for thread in self._threads:
            thread.join(max(0.0, until - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _run(self, number: int) -> None:
        block_signals()
        while (found := self._next()) is not None:
            owner, job = found
            try:
                job(number)
            except Exception:
                _log.exception("a thread for the TEE failed; it goes on")
            del job, found
            with self._changed:
                self._held[owner] -= 1
                if not self._held[owner]:
                    del self._held[owner]
                self._changed.notify()

    def _next(self) -> tuple[Hashable, Job] | None:
        """Wait for a job; None at the end."""
        with self._changed:
            while not self._ended:
                most = self._size if len(self._owners) <= 1 else max(1, self._size - 1)
                owner = next((one for one in self._waiting if self._held.get(one, 0) < most), None)
                if owner is None:
                    self._changed.wait()
                    continue
                queue = self._waiting.pop(owner)
                job = queue.popleft()
                if queue:
                    self._waiting[owner] = queue  # at the end: the others have their turn first
                self._held[owner] = self._held.get(owner, 0) + 1
                return owner, job
        return None
