"""Completing in order (VIRTIO_F_IN_ORDER; virtio 1.2, sections 2.7.9 and 2.8.21.1): requests go back to the driver in
the order in which it made them available, in whatever order the device completes them.

A mixin for the queue of any ring format: what is completed early waits here for its turn.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pyvhost.errors import StateError
from pyvhost.vring.api import Chain, DeviceQueue, Inflight
from pyvhost.vring.packed_device import PackedDeviceQueue
from pyvhost.vring.split_device import SplitDeviceQueue

__all__ = ["InOrder", "InOrderPackedQueue", "InOrderSplitQueue"]

if TYPE_CHECKING:

    class _Base(SplitDeviceQueue):
        __slots__ = ("_early", "_rooms", "_turns")

else:
    _Base = object


class InOrder(_Base):
    """To be listed before the queue's class: its ``pop()`` and ``push()`` do the work, these keep the order."""

    __slots__ = ()

    _turns: deque[int]  # heads in the order of taking
    _rooms: dict[int, int]  # their writable bytes
    _early: dict[int, int]  # completed, but not yet given back: bytes written, by head

    def __init__(self, *args: Any, **options: Any) -> None:
        self._forget()
        super().__init__(*args, **options)

    def _forget(self) -> None:
        self._turns, self._rooms, self._early = deque(), {}, {}

    def _take(self, chain: Chain) -> None:
        if chain.head not in self._rooms:
            self._rooms[chain.head] = chain.writable_bytes
            self._turns.append(chain.head)

    def pop(self) -> Chain | None:
        chain = super().pop()
        if chain is not None:
            self._take(chain)
        return chain

    def push(self, head: int, written: int = 0) -> None:
        room = self._rooms.get(head)
        if room is None or self.stopped:
            super().push(head, written)  # a bad chain, which the queue gives back by itself; or it raises
            return
        turns, early = self._turns, self._early
        if head in early:
            raise StateError(f"head {head} is not in flight")
        if not 0 <= written <= room:
            raise ValueError(f"{written} bytes written where there is room for {room}")
        early[head] = written
        while turns and turns[0] in early:
            first = turns.popleft()
            del self._rooms[first]
            super().push(first, early.pop(first))

    def drain(self, handler: Callable[[Chain], int | None], budget: int = 256, notify_every: int = 8) -> bool:
        unsignalled = 0

        def serve(chain: Chain) -> None:
            nonlocal unsignalled
            self._take(chain)
            written = handler(chain)
            if written is not None:
                self.push(chain.head, written)
                unsignalled += 1
                if unsignalled >= notify_every:
                    unsignalled = 0
                    self.notify()

        return super().drain(serve, budget, notify_every)

    def _stretch(self, handler: Callable[[Chain], int | None], budget: int, notify_every: int) -> int:
        return 0  # every request is one that ``pop()`` and ``push()`` have to see

    def track(self, inflight: Inflight) -> None:
        super().track(inflight)
        for chain in self.recovered:
            self._take(chain)

    def adopt(self, paused: DeviceQueue) -> None:
        super().adopt(paused)
        if isinstance(paused, InOrder):
            self._turns, self._rooms, self._early = paused._turns, paused._rooms, paused._early
            paused._forget()

    @property
    def in_flight(self) -> int:
        return super().in_flight - len(self._early)


class InOrderSplitQueue(InOrder, SplitDeviceQueue):
    """A ``SplitDeviceQueue`` that completes in order."""

    __slots__ = ("_early", "_rooms", "_turns")


class InOrderPackedQueue(InOrder, PackedDeviceQueue):  # type: ignore[misc]
    """A ``PackedDeviceQueue`` that completes in order."""

    __slots__ = ("_early", "_rooms", "_turns")
