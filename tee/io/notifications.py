"""Asynchronous notifications of a TEE, as a program waits for them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType

#: How many different values wait at most in one :class:`Notifications`; further ones are dropped, for no TEE has more.
MAX_WAITING = 256


class Notifications:
    """The values that a TEE raises, each once however often it was raised before it was taken. Thread-safe, and a
    context manager. Made by ``TeeRuntime.notifications()``.
    """

    def __init__(self, values: frozenset[int], close: Callable[[Notifications], None]) -> None:
        """``values`` are those that are wanted; none: all. ``close`` is told when it ends."""
        self._values = values
        self._close = close
        self._waiting: dict[int, None] = {}
        self._changed = threading.Condition()
        self._closed = False

    def __enter__(self) -> Notifications:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait(self, timeout: float | None = None) -> int:
        """The value that waits longest; waits for one. TimeoutError after ``timeout`` seconds, RuntimeError when this
        or the runtime is closed.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._waiting or self._closed, timeout):
                raise TimeoutError(f"no notification in {timeout} s")
            if not self._waiting:
                raise RuntimeError("no notification comes any more: the runtime is closed")
            value = next(iter(self._waiting))
            del self._waiting[value]
            return value

    def close(self) -> None:
        """No more of them: who waits is woken. Nothing where that has happened."""
        self._close(self)
        self.end()

    # -- for the runtime

    def take(self, value: int) -> None:
        """The TEE has raised ``value``."""
        with self._changed:
            if (not self._values or value in self._values) and len(self._waiting) < MAX_WAITING:
                self._waiting[value] = None
                self._changed.notify()

    def end(self) -> None:
        """The runtime is closed."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
