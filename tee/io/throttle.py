"""Keeps what others cause from filling a log: so many lines in a while, then how many were left out."""

from __future__ import annotations

import time
from collections.abc import Callable

#: So many lines …
LINES = 20

#: … in so many seconds.
PERIOD = 60.0


class Throttle:
    """Decides about lines of one kind."""

    __slots__ = ("_clock", "_left", "_left_out", "_lines", "_period", "_until")

    def __init__(self, lines: int = LINES, period: float = PERIOD, clock: Callable[[], float] = time.monotonic) -> None:
        self._lines = lines
        self._period = period
        self._clock = clock
        self._left = lines
        self._left_out = 0
        self._until = clock() + period

    def admit(self) -> str | None:
        """What to add to the line (mostly nothing), or None: leave it out."""
        now = self._clock()
        if now >= self._until:
            self._until = now + self._period
            self._left = self._lines
        if not self._left:
            self._left_out += 1
            return None
        self._left -= 1
        left_out, self._left_out = self._left_out, 0
        if left_out:
            return f" [{left_out} such lines were left out before]"
        return "" if self._left else f" [more such lines are left out for {max(0.0, self._until - now):.0f} s]"
