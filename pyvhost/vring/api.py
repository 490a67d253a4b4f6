"""What every virtqueue implementation offers, whatever its ring format: the two protocols, and the types they use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any, Protocol

from pyvhost.dirtylog import RingLog
from pyvhost.errors import RingError
from pyvhost.inflight import SplitInflight
from pyvhost.memory import GuestMemory
from pyvhost.vring.packed_inflight import PackedInflight

__all__ = ["Chain", "DeviceQueue", "DriverQueue", "Fences", "Inflight", "RegionChain", "Segment"]

#: what records the requests in flight of one queue, of either ring format
Inflight = SplitInflight | PackedInflight

#: guest address, length in bytes (> 0)
Segment = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Fences:
    """What a ring needs of the machine, memory barriers and a clock, as callables; ``pyvhost.io.fence.host_fences()``
    has those of this one."""

    #: no later load may pass an earlier store: before looking whether the other side went to sleep
    full: Callable[[], object]
    #: loads stay behind loads and stores behind stores; None where the hardware always sees to it (x86-64)
    order: Callable[[], object] | None = None
    #: seconds on a clock that never goes back, for ``DeviceQueue.wait()``; None: it looks once
    clock: Callable[[], float] | None = None

    @staticmethod
    def none() -> Fences:
        """For two sides that live on one thread (tests, simulations): nothing to order."""
        return Fences(full=int)


class Chain:
    """One request as the driver made it available: readable bytes first, then room to answer in.

    ``readable`` and ``writable`` are views of guest memory, which the guest can go on changing: copy once
    (``read()``), then parse the copy. They stay valid after the memory table has changed. Sizes are in bytes.
    """

    __slots__ = ("head", "readable", "readable_bytes", "writable", "writable_bytes")

    def __init__(
        self,
        head: int,
        readable: list[memoryview],
        writable: list[memoryview],
        readable_bytes: int,
        writable_bytes: int,
    ) -> None:
        self.head = head  #: what ``push()`` wants
        self.readable = readable  #: read-only views
        self.writable = writable
        self.readable_bytes = readable_bytes
        self.writable_bytes = writable_bytes

    def __repr__(self) -> str:
        return f"<Chain head={self.head} readable={self.readable_bytes} writable={self.writable_bytes}>"

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        """A private copy of up to ``length`` readable bytes from ``offset`` on; fewer if the driver gave fewer. The
        guest chooses ``readable_bytes`` (up to 4 GiB): give a ``length`` or check first.

        :raises ValueError: a negative offset
        """
        if offset < 0:
            raise ValueError("a negative offset")
        readable = self.readable
        if len(readable) == 1:  # the common case, without a loop
            return bytes(readable[0][offset : None if length is None else offset + length])
        want = self.readable_bytes if length is None else length
        parts: list[memoryview] = []
        for view in readable:
            if want <= 0:
                break
            if offset >= len(view):
                offset -= len(view)
                continue
            part = view[offset : offset + want]
            offset = 0
            want -= len(part)
            parts.append(part)
        return b"".join(parts)

    def unpack(self, layout: Struct, offset: int = 0) -> tuple[Any, ...]:
        """The fields of ``layout`` at ``offset`` of the readable part, copied once: ``read()`` and unpacking in one.

        :raises ValueError: the driver gave fewer bytes
        """
        size = layout.size
        if not 0 <= offset <= self.readable_bytes - size:
            raise ValueError(f"{size} bytes from {offset} on are not in {self.readable_bytes} readable bytes")
        return layout.unpack(self.read(offset, size))

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy ``data`` into the writable part from ``offset`` on; returns the end, ``offset + len(data)``: what to
        give to ``push()`` if all before it was written too.

        :raises ValueError: it does not fit, or a negative offset; nothing was written then
        """
        if offset < 0:
            raise ValueError("a negative offset")
        size = len(data)
        end = offset + size
        if end > self.writable_bytes:
            raise ValueError(f"{end} bytes do not fit in {self.writable_bytes} writable bytes")
        writable = self.writable
        if len(writable) == 1:
            writable[0][offset:end] = data
            return end
        source = memoryview(data)
        for view in writable:
            if not size:
                break
            if offset >= len(view):
                offset -= len(view)
                continue
            count = min(size, len(view) - offset)
            view[offset : offset + count] = source[:count]
            source = source[count:]
            size -= count
            offset = 0
        return end


class RegionChain(Chain):
    """A ``Chain`` of a few entries of an indirect table, all in one memory region, as most are: views are made when
    they are asked for. ``pyvhost.vring.tables`` makes these, and has checked the entries; each has its own slots
    assigned there, as a call of the class would take longer than all the rest."""

    __slots__ = ("_base", "_before_last", "_entries", "_origin", "_readables", "_view")

    _view: memoryview  #: of the region
    _base: int  #: the region's guest address
    _entries: Sequence[int]  #: guest address, length in bytes and something else of each part, as they were read
    _readables: int  #: so many of them are readable; they come first
    _before_last: int  #: writable bytes before the last part
    _origin: int  #: where in ``_view`` the writable part would begin if all of it were in one piece with the last

    def ranges(self, first: int, end: int) -> list[Segment]:
        """The parts from number ``first`` on, up to ``end``."""
        entries = self._entries
        return [(entries[n], entries[n + 1]) for n in range(3 * first, 3 * end, 3)]

    def written(self) -> list[Segment]:
        """The writable parts."""
        return self.ranges(self._readables, len(self._entries) // 3)

    @property
    def readable(self) -> list[memoryview]:  # type: ignore[override]
        view, base = self._view.toreadonly(), self._base
        return [view[addr - base : addr - base + length] for addr, length in self.ranges(0, self._readables)]

    @property
    def writable(self) -> list[memoryview]:  # type: ignore[override]
        view, base = self._view, self._base
        return [view[addr - base : addr - base + length] for addr, length in self.written()]

    def read(self, offset: int = 0, length: int | None = None) -> bytes:
        if self._readables != 1 or offset < 0:
            return super().read(offset, length)
        entries = self._entries
        start = entries[0] - self._base
        end = start + entries[1]
        start += offset
        if length is not None and length < end - start:
            end = start + length
        return self._view[start:end].tobytes()  # quicker than bytes()

    def unpack(self, layout: Struct, offset: int = 0) -> tuple[Any, ...]:
        entries = self._entries
        if 0 <= offset <= entries[1] - layout.size:  # of the first part
            return layout.unpack_from(self._view, entries[0] - self._base + offset)
        return super().unpack(layout, offset)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        size = len(data)
        end = offset + size
        if self._before_last <= offset and end <= self.writable_bytes:  # in the last part, or the only one
            at = self._origin + offset
            if size == 1 and type(data) is bytes:  # a status
                self._view[at] = data[0]
            else:
                self._view[at : at + size] = data
            return end
        return super().write(data, offset)


class DeviceQueue(Protocol):
    """The device's side of a virtqueue. All calls on one thread.

    A driver that breaks the ring's rules breaks the queue: ``broken`` says how, ``pop()`` returns None from then on,
    requests popped before can still be completed, and the offending chain goes back to the driver with length 0 where
    its head is known.
    """

    size: int  #: ring entries
    broken: RingError | None
    #: requests that the last backend had taken and not returned, in the order of taking; in flight here. ``pop()``
    #: gives them out first; ``popleft()`` takes one as well
    recovered: deque[Chain]
    #: how long ``drain()`` goes on looking at an empty ring, in microseconds, before it asks for kicks; less often
    #: while that is in vain. The compiled queue does so without the interpreter's lock, the pure one holds up all other
    #: threads. Either holds up all other queues of the data plane; may be changed at any time
    spin_us: int

    def pop(self) -> Chain | None:
        """The next available request, or None: there is none now, or the queue is stopped or broken. Never raises for
        what the driver did; costs at most work proportional to the longest legal chain."""
        ...

    def push(self, head: int, written: int = 0) -> None:
        """Complete a popped request, in any order: ``written`` bytes from the start of its writable part are valid.
        The driver can see it at once; ``notify()`` wakes a driver that sleeps, and may follow several pushes.

        :raises StateError: the queue is stopped, or ``head`` is not in flight (pushed twice)
        :raises ValueError: ``written`` exceeds the request's writable part; it stays in flight
        """
        ...

    def notify(self) -> bool:
        """Signal the driver if it asked to be told of what was pushed since the last signal; returns whether it was
        signalled."""
        ...

    def should_notify(self) -> bool:
        """Whether the driver wants a signal now; asking counts as giving it."""
        ...

    def disable_notifications(self) -> None:
        """Tell the driver that it need not kick: the ring is being looked at anyway. A hint."""
        ...

    def enable_notifications(self) -> bool:
        """Ask the driver for kicks; returns True if requests came in the meantime, for which there will be no kick:
        pop again."""
        ...

    def wait(self, timeout_us: int) -> bool:
        """Look at the ring, up to ``timeout_us`` microseconds long, until there is something to pop; whether there
        is."""
        ...

    def drain(self, handler: Callable[[Chain], int | None], budget: int = 256, notify_every: int = 8) -> bool:
        """Serve up to ``budget`` requests: ``handler`` returns the bytes written, or None to complete the request
        later with ``push()``. Signals the driver after every ``notify_every`` requests completed by returning, and
        before it leaves the ring; for what was completed by ``push()``, maybe at the end only. A queue may let some
        microseconds pass between two signals while there are requests. Returns True if requests are
        left (the budget was used up), False if the ring is empty and the driver will kick.

        What the handler raises goes to the caller; its request stays in flight. The handler may work on the queue.
        """
        ...

    def rebind(self, memory: GuestMemory, desc: memoryview, avail: memoryview, used: memoryview) -> None:
        """The memory table has changed: the ring's parts where they are now. What is in flight is not touched.

        :raises RingError: parts too small, or, compiled, misaligned
        """
        ...

    def track(self, inflight: Inflight) -> None:
        """Record in ``inflight`` from now on. Before the first ``pop()``; after ``adopt()``, where that is called.

        What is in flight on this queue stays so. On a queue with nothing in flight, what the last backend had taken
        and not returned is taken again, into ``recovered``, and the ring goes on behind it, whatever ``base`` said.

        :raises RingError: the record makes no sense, or is too small for the ring
        :raises StateError: a recorder of the other ring format
        """
        ...

    def log_to(self, log: RingLog | None) -> None:
        """Log what is written, from now on; None: do not."""
        ...

    def give_up(self, why: str) -> None:
        """Break the queue and touch its memory no more: the ring has lost its place."""
        ...

    def adopt(self, paused: DeviceQueue) -> None:
        """Take over what is in flight on a queue that was stopped by a pause, so that it can be pushed here."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests popped and not pushed."""
        ...

    @property
    def next_base(self) -> int:
        """Where the ring goes on: what ``GET_VRING_BASE`` answers."""
        ...

    @property
    def stopped(self) -> bool: ...

    def stop(self) -> int:
        """Touch the ring no more; returns ``next_base``. Requests in flight stay so: see ``adopt()``."""
        ...


class DriverQueue(Protocol):
    """The driver's side of a virtqueue. All calls on one thread. The device is not trusted."""

    size: int  #: ring entries

    def add(self, readable: Sequence[Segment], writable: Sequence[Segment], token: Any) -> None:
        """Make a request available: the device reads ``readable`` and may write ``writable``. ``token`` comes back
        from ``poll()``.

        :raises QueueFull: no room now
        :raises ValueError: no segments at all, one of no bytes, or more than the queue could ever take
        """
        ...

    def kick_needed(self) -> bool:
        """Whether the device asked to be kicked for what was added since the last call."""
        ...

    def poll(self) -> list[tuple[Any, int]]:
        """All requests that the device has completed since the last call: (token, bytes written).

        :raises DeviceError: the device completed what it was not given, or wrote more than there is room for. What
            was completed correctly before that is returned first, the error comes with the next call, and with every
            one after it.
        """
        ...

    def disable_notifications(self) -> None:
        """Tell the device that it need not signal. A hint."""
        ...

    def enable_notifications(self) -> bool:
        """Ask for signals; returns True if completions came in the meantime, for which there will be none: poll
        again."""
        ...

    @property
    def free_slots(self) -> int:
        """Descriptors that are free: a request takes one if it goes into an indirect table, else one for each
        segment."""
        ...

    @property
    def in_flight(self) -> int:
        """Requests added and not returned by ``poll()``."""
        ...
