"""What the driver needs of a virtio transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from pyvhost.errors import PyvhostError
from pyvhost.vring.api import DriverQueue
from tee.memory import Memory


class TransportError(PyvhostError):
    """The device is gone, or cannot be used; the text says why."""


class Transport(Protocol):
    """A virtio device that has been found, negotiated with and started: all its queues run."""

    features: int
    """Negotiated feature bits."""

    @property
    def queues(self) -> Sequence[DriverQueue]:
        """All queues, by index."""

    def read_config(self, size: int) -> bytes:
        """The first ``size`` bytes of the config space, of one generation. Raises TransportError."""

    def kick(self, index: int) -> None:
        """Tell the device that queue ``index`` has new requests."""

    def fileno(self) -> int:
        """Readable when the device has signalled."""

    def acknowledge(self) -> bool:
        """Consume the device's signals. True if the config space may have changed.

        Raises TransportError once the device has gone; what it completed before can still be polled.
        """

    def allocate(self, size: int) -> Memory:
        """Memory that the device can reach: page-aligned, zeroed, with its ``ranges``. Raises MemoryError."""

    def release(self, memory: Memory) -> None:
        """Give it back."""

    def close(self) -> None:
        """Reset the device and let go of it."""
