"""Calls under way on the TEE, as backends tell them. An RPC does not say whose it is: this is all that is known."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from uuid import UUID

from tee.courier import Begins, CallKind, CourierError

MAX_CALLS = 4096
"""Under way at once, of one backend."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A call of a guest's. ``backend`` is who told of it, ``vm`` what it calls the guest."""

    backend: Hashable
    call: int
    kind: int
    uuid: UUID
    vm: str

    @property
    def guest(self) -> tuple[Hashable, str]:
        """Whose it is."""
        return self.backend, self.vm


class Flights:
    """All of them, in the order in which they began."""

    def __init__(self) -> None:
        self._flights: dict[tuple[Hashable, int], Flight] = {}
        self._counts: dict[Hashable, int] = {}

    def __len__(self) -> int:
        return len(self._flights)

    def begins(self, backend: Hashable, begins: Begins) -> None:
        """Raises CourierError where that call is under way already, or too many are."""
        key = backend, begins.call
        if key in self._flights:
            raise CourierError(f"call {begins.call} begins again")
        if self._counts.get(backend, 0) >= MAX_CALLS:
            raise CourierError(f"more than {MAX_CALLS} calls under way")
        self._flights[key] = Flight(backend, begins.call, begins.kind, begins.uuid, begins.vm)
        self._counts[backend] = self._counts.get(backend, 0) + 1

    def ends(self, backend: Hashable, call: int) -> None:
        """Raises CourierError where it is not under way."""
        if self._flights.pop((backend, call), None) is None:
            raise CourierError(f"call {call} ends, and never began")
        self._counts[backend] -= 1

    def gone(self, backend: Hashable) -> None:
        """All of that backend's."""
        for key in [key for key in self._flights if key[0] == backend]:
            del self._flights[key]
        self._counts.pop(backend, None)

    def opening(self, uuid: UUID) -> Iterator[Flight]:
        """One for each guest that opens a session with that TA."""
        return _of_each(f for f in self._flights.values() if f.kind == CallKind.OPEN_SESSION and f.uuid == uuid)

    def of_each_guest(self) -> Iterator[Flight]:
        """One for each guest that has any."""
        return _of_each(iter(self._flights.values()))

    def sole(self) -> Flight | None:
        """One of the guest whose all are; None where there are several guests, or none."""
        found = list(self.of_each_guest())
        return found[0] if len(found) == 1 else None


def _of_each(flights: Iterator[Flight]) -> Iterator[Flight]:
    seen: set[tuple[Hashable, str]] = set()
    for flight in list(flights):
        if flight.guest not in seen:
            seen.add(flight.guest)
            yield flight
