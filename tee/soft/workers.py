"""What the software TEE needs of the world for work that cannot be cut into steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

Ended = Callable[[Any, BaseException | None], None]
"""Is told what the work has returned, or what it has raised."""


class Workers(Protocol):
    """Does work beside the TEE's own thread, a bounded number of pieces at a time."""

    def submit(self, function: Callable[[], Any], ended: Ended) -> None:
        """Have ``function`` called elsewhere; :meth:`collect` tells ``ended``."""

    def collect(self) -> None:
        """Tell of all work that has ended since the last time."""

    def fileno(self) -> int:
        """Readable when there is something to collect."""
