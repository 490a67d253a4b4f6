"""Sockets that guests opened for TAs: their handles stay with who gave them, and are one set of numbers for the TEE."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from tee.io.services.sockets import SocketOperation
from tee.params import Direction, Param, Value

MAX_HANDLES = 1024

_LAST = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class Holder:
    """Who has given a handle (None: the host's own supplicant), for which TA instance, and his number of it."""

    guest: tuple[Hashable, str] | None
    instance: int
    handle: int


class Handles:
    """The TEE's number of each handle."""

    def __init__(self) -> None:
        self._holders: dict[int, Holder] = {}
        self._next = 1

    def __len__(self) -> int:
        return len(self._holders)

    def add(self, holder: Holder) -> int | None:
        """The TEE's number; None: there are too many."""
        if len(self._holders) >= MAX_HANDLES:
            return None
        while self._next in self._holders:
            self._next = self._next % _LAST + 1
        number, self._next = self._next, self._next % _LAST + 1
        self._holders[number] = holder
        return number

    def find(self, number: int, instance: int) -> Holder | None:
        """Who has it, if that instance may name it."""
        holder = self._holders.get(number)
        return holder if holder is not None and holder.instance == instance else None

    def remove(self, number: int) -> None:
        """It is closed."""
        self._holders.pop(number, None)

    def of_instance(self, instance: int) -> set[tuple[Hashable, str] | None]:
        """Everybody who has some of that instance's; they are forgotten."""
        mine = {number: holder for number, holder in self._holders.items() if holder.instance == instance}
        for number in mine:
            del self._holders[number]
        return {holder.guest for holder in mine.values()}

    def gone(self, backend: Hashable) -> None:
        """That backend is not there any more, and sockets of its guests cannot be reached."""
        for number, holder in list(self._holders.items()):
            if holder.guest is not None and holder.guest[0] == backend:
                del self._holders[number]


def operation(params: list[Param]) -> tuple[int, int, int] | None:
    """Operation, instance and handle of a SOCKET request; None: it makes no sense."""
    if not params or not isinstance(params[0], Value) or params[0].direction is not Direction.IN:
        return None
    return params[0].a, params[0].b, params[0].c


def with_handle(params: list[Param], handle: int) -> list[Param]:
    """The request with another number in it."""
    first = params[0]
    assert isinstance(first, Value)
    return [Value(first.direction, first.a, first.b, handle), *params[1:]]


def opened(params: list[Param]) -> Value | None:
    """The value in an answered OPEN that holds the handle."""
    found = [param for param in params if isinstance(param, Value) and param.direction is Direction.OUT]
    return found[0] if len(found) == 1 else None


__all__ = ["Handles", "Holder", "SocketOperation", "opened", "operation", "with_handle"]
