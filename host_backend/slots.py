"""What the bridge needs of the rings, whatever they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Slot(Protocol):
    """One request's place in a ring: where its response goes."""

    def respond(self, *parts: bytes | bytearray | memoryview) -> bool:
        """Write the response and give the request back. False if the ring is stopped: then nothing was done."""


class Port(Protocol):
    """One guest's rings and memory, as its epochs use them."""

    memory_version: int
    """Another number whenever the guest's memory may have changed its places."""

    def views(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[memoryview], Leased]:
        """The bytes of guest-physical (address, length) ranges, in place. Raises MemoryFault outside guest memory."""

    def send_event(self, data: bytes) -> bool:
        """Put an event into a posted buffer. False if there is none now."""

    def look_for_requests(self) -> None:
        """Take all requests that the request queues hold now, a bounded number at a time; then call ``searched()`` of
        the epoch."""

    def fail(self, why: str) -> None:
        """Serving this guest has failed: end its connection, and nothing else."""


class Leased(Protocol):
    """A hold on mapped guest memory."""

    def mark_dirty(self) -> None:
        """The memory was written."""

    def release(self) -> None:
        """Let go; the mapping may vanish."""
