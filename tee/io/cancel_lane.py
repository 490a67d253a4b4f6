"""A thread for cancels alone: they wait for no call. A cancel that comes before its call has arrived is tried again."""

from __future__ import annotations

import heapq
import itertools
import logging
import threading
import time
from collections.abc import Callable

from tee.io.fair_pool import block_signals

_log = logging.getLogger(__name__)

FIRST_S, LAST_S = 0.005, 1.0
"""Seconds between two attempts: twice as many each time."""

Attempt = Callable[[], bool]
"""Try to cancel; True: to be tried again. Does not raise."""


class CancelLane:
    """Makes attempts on a thread of its own."""

    def __init__(self, name: str) -> None:
        self._changed = threading.Condition()
        self._due: list[tuple[float, int, float, Attempt]] = []
        self._numbers = itertools.count()
        self._ended = False
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def put(self, attempt: Attempt) -> None:
        """Have it made now, and again as long as it asks for that."""
        self._put(0.0, FIRST_S, attempt)

    def close(self, timeout: float) -> bool:
        """Begin nothing more, and wait up to ``timeout`` seconds for what has begun; whether that has ended."""
        with self._changed:
            self._ended = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _put(self, after: float, pause: float, attempt: Attempt) -> None:
        with self._changed:
            heapq.heappush(self._due, (time.monotonic() + after, next(self._numbers), pause, attempt))
            self._changed.notify()

    def _run(self) -> None:
        block_signals()
        while (found := self._next()) is not None:
            pause, attempt = found
            try:
                again = attempt()
            except Exception:
                _log.exception("a cancel failed; others are made all the same")
                again = False
            if again:
                self._put(pause, min(2 * pause, LAST_S), attempt)
            del attempt, found

    def _next(self) -> tuple[float, Attempt] | None:
        with self._changed:
            while not self._ended:
                left = self._due[0][0] - time.monotonic() if self._due else None
                if left is not None and left <= 0:
                    _, _, pause, attempt = heapq.heappop(self._due)
                    return pause, attempt
                self._changed.wait(left)
        return None
