"""Identifiers that name one thing for as long as anybody may mean it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T")

_LAST = 0xFFFF_FFFF


class LimitReachedError(Exception):
    """The table holds as many entries as it may."""


class IdTable(Generic[T]):
    """Entries by 32-bit id. Ids are never 0, go up, and come around only after 2^32 others; one in use is skipped."""

    __slots__ = ("_entries", "_next", "get", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._entries: dict[int, T] = {}
        self._next = 1
        #: the entry with this id, or None
        self.get: Callable[[int], T | None] = self._entries.get

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[T]:
        return iter(list(self._entries.values()))

    def __contains__(self, ident: int) -> bool:
        return ident in self._entries

    def add(self, entry: T) -> int:
        """Give ``entry`` an id. Raises LimitReachedError."""
        if len(self._entries) >= self.limit:
            raise LimitReachedError
        ident = self._next
        while ident in self._entries:
            ident = ident + 1 if ident < _LAST else 1
        self._entries[ident] = entry
        self._next = ident + 1 if ident < _LAST else 1
        return ident

    def remove(self, ident: int) -> T:
        """Take the entry out; its id is free. Raises KeyError."""
        return self._entries.pop(ident)

    def clear(self) -> None:
        """Forget all entries. Ids still go on from where they were."""
        self._entries.clear()
