"""An endpoint's RX and TX buffers, as the partition manager that serves it keeps them."""

from __future__ import annotations

from dataclasses import dataclass

from ffa.abi.ids import PAGE_SIZE, Error, FfaError
from ffa.roles.machine import POISON, Machine
from ffa.roles.machines import RX, Rx, RxEvent


@dataclass(slots=True)
class Mailbox:
    """Two mapped buffers of ``size`` bytes each."""

    machine: Machine
    tx: int  #: address
    rx: int  #: address
    size: int
    state: Rx = Rx.EMPTY
    held: int = 0  #: bytes delivered to RX and not released

    @property
    def pages(self) -> list[int]:
        """The page numbers of both."""
        count = self.size // PAGE_SIZE
        return [first + n for first in (self.tx // PAGE_SIZE, self.rx // PAGE_SIZE) for n in range(count)]

    def take(self, size: int) -> bytes:
        """A private copy of TX's first ``size`` bytes. Raises FfaError: more than the buffer has."""
        if size > self.size:
            raise FfaError(Error.INVALID_PARAMETERS, f"{size} bytes are more than the TX buffer has")
        return self.machine.fetch(self.tx, size)

    def poison_tx(self, size: int) -> None:
        """Overwrites what a call has consumed."""
        self.machine.store(self.tx, bytes([POISON]) * min(size, self.size))

    def step(self, event: RxEvent) -> bool:
        """Whether RX's table has ``event`` in the present state; if so, takes the step."""
        after = RX.get((self.state, event))
        if after is None:
            return False
        self.state = after
        return True

    def deliver(self, data: bytes) -> None:
        """Puts ``data``, which fits, into RX. Raises FfaError: BUSY, the endpoint has not released RX."""
        if not self.step(RxEvent.DELIVER):
            raise FfaError(Error.BUSY, "the RX buffer is not released")
        self.fill(data)

    def fill(self, data: bytes) -> None:
        """Writes ``data`` into RX, which is the manager's to write."""
        self.machine.store(self.rx, data)
        self.held = len(data)

    def release(self) -> None:
        """The endpoint gives RX back. Raises FfaError: DENIED, it does not have it."""
        if not self.step(RxEvent.RELEASE):
            raise FfaError(Error.DENIED, "the RX buffer is not the caller's")
        self.machine.store(self.rx, bytes([POISON]) * self.held)
        self.held = 0
