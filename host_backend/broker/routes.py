"""Who is asked, in which order, and why."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from enum import Enum
from uuid import UUID

from host_backend.broker.flights import Flight, Flights
from tee.params import MemRef, Param, Value
from tee.rpc import RpcCommand

MAX_PAIRS = 1024
"""LOAD_TA requests for a size whose request for the data may still come."""

PAIR_S = 60.0
"""Seconds until it is not expected any more."""


class Route(Enum):
    """How the answerer of an RPC is found."""

    COURIERS = "guests that open the TA, then guests with calls under way, then the host"
    SOLE = "the guest whose calls alone are under way, or as configured"
    STORE = "the host's store, or the one guest that is configured"
    HOST = "the host"


ROUTES: dict[int, Route] = {
    RpcCommand.LOAD_TA: Route.COURIERS,
    RpcCommand.FS: Route.STORE,
    RpcCommand.SOCKET: Route.SOLE,
    RpcCommand.PLUGIN: Route.SOLE,
}
"""By command; what is not here is the host's: SHM_ALLOC and SHM_FREE, as only memory of ``/dev/teepriv0`` will do, and
RPMB, of which a machine has one."""


class Sole(Enum):
    """Who serves sockets and plug-ins."""

    GUEST = "guest"
    HOST = "host"
    NOBODY = "nobody"


@dataclass(frozen=True, slots=True)
class Choice:
    """Somebody to ask, and why. ``flight`` None: the host's own supplicant."""

    flight: Flight | None
    reason: str


HOST_FOLDER = Choice(None, "no guest has it")


class TaPairs:
    """The TEE asks for a TA twice, for its size and for the bytes: who has told the one is asked for the other."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._given: OrderedDict[UUID, deque[tuple[Hashable, float]]] = OrderedDict()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def said(self, uuid: UUID, guest: Hashable) -> None:
        """``guest`` (None: the host) has told the size."""
        self._given.setdefault(uuid, deque()).append((guest, self._clock() + PAIR_S))
        self._given.move_to_end(uuid)
        self._count += 1
        while self._count > MAX_PAIRS:
            self._pop(next(iter(self._given)))

    def take(self, uuid: UUID) -> tuple[bool, Hashable]:
        """Whether somebody has told it, and who: then for the next time the one after."""
        while uuid in self._given:
            guest, until = self._pop(uuid)
            if until >= self._clock():
                return True, guest
        return False, None

    def _pop(self, uuid: UUID) -> tuple[Hashable, float]:
        waiting = self._given[uuid]
        self._count -= 1
        found = waiting.popleft()
        if not waiting:
            del self._given[uuid]
        return found


def couriers(flights: Flights, uuid: UUID, told: tuple[bool, Hashable]) -> Iterator[Choice]:
    """Who may have the TA, each once; at last the host. ``told`` as :meth:`TaPairs.take` says it."""
    known, teller = told
    asked: set[Hashable] = set()
    if known and teller is None:
        yield Choice(None, "the host's folder has told its size")
        return
    if known:
        for flight in flights.of_each_guest():
            if flight.guest == teller:
                asked.add(flight.guest)
                yield Choice(flight, "it has told its size")
    for why, found in (
        ("it opens that TA", flights.opening(uuid)),
        ("it has calls under way", flights.of_each_guest()),
    ):
        for flight in found:
            if flight.guest not in asked:
                asked.add(flight.guest)
                yield Choice(flight, why)
    yield HOST_FOLDER


def ta_asked_for(params: list[Param]) -> tuple[UUID, bool] | None:
    """The TA of a LOAD_TA, and whether its bytes are asked for, not their number only; None: it makes no sense."""
    if len(params) != 2:
        return None
    name, room = params
    if not isinstance(name, Value) or not isinstance(room, MemRef):
        return None
    octets = name.a.to_bytes(8, "little") + name.b.to_bytes(8, "little")
    return UUID(bytes=octets), room.memory is not None and room.size > 0
