"""When it is worth looking at an empty ring for a while: less and less often as long as that is in vain."""

from __future__ import annotations

__all__ = ["MAX_FINDS", "Patience"]

_MAX_MISSES = 6

MAX_FINDS = 32
"""Looks in one ``drain()`` that bring something: a driver that adds a request each time shall not hold up others."""


class Patience:
    """What the last looks at empty rings have brought. The compiled queue does the same."""

    __slots__ = ("_misses", "_skip")

    def __init__(self) -> None:
        self._misses = 0
        self._skip = 0

    def is_worth_it(self) -> bool:
        """Whether to look this time."""
        if self._skip:
            self._skip -= 1
            return False
        return True

    def learn(self, found: bool) -> None:
        """Whether there was something."""
        if found:
            self._misses = 0
        else:
            self._misses = min(self._misses + 1, _MAX_MISSES)
            self._skip = (1 << self._misses) - 2
