"""The device's side of a split virtqueue. Source: virtio 1.2, section 2.7; methods as ``DeviceQueue`` documents
them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator

from pyvhost.dirtylog import RingLog
from pyvhost.errors import MemoryFault, ProtocolError, RingError, StateError
from pyvhost.inflight import COUNTER_MASK, LAST_HEAD, USED_IDX, SplitInflight
from pyvhost.memory import GuestMemory
from pyvhost.vring.api import Chain, DeviceQueue, Fences, Inflight
from pyvhost.vring.parts import check_parts
from pyvhost.vring.patience import MAX_FINDS, Patience
from pyvhost.vring.split import (
    DESC,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_WRITE,
    NO_SIGNAL,
    SplitLayout,
    valid_size,
)
from pyvhost.vring.tables import short_table

__all__ = ["SplitDeviceQueue"]

_unpack_desc = DESC.raw.unpack_from
# In a table: flags, and above them the next entry; the last one has none.
_short_table = short_table(
    "QII", "QIH2x", DESC_F_NEXT | 1 << 16, DESC_F_NEXT | 2 << 16, DESC_F_NEXT | DESC_F_WRITE | 2 << 16, DESC_F_WRITE
)
_SIGNAL_S = 25e-6  # between two signals, in seconds, while there is work
_MAX_TOTAL = 1 << 32  # section 2.7.5: no chain is longer, in bytes
_MASK = 0xFFFF


class SplitDeviceQueue:
    """See ``DeviceQueue``. ``desc``, ``avail``, ``used`` are the ring's parts as writable views of bytes, of at least
    the sizes that ``SplitLayout`` gives; ``base`` is the index to go on from (``SET_VRING_BASE``); ``signal`` wakes
    the driver.

    ``max_descriptors`` bounds one chain, indirect table included. It is more than ``size`` by default, because
    drivers do make indirect tables that are longer than the ring.

    :raises RingError: a size that is no power of two up to 2^15, parts too small or misaligned
    """

    __slots__ = (
        "_avail",
        "_base",
        "_clock",
        "_desc",
        "_event_idx",
        "_fresh",
        "_full",
        "_held",
        "_ids",
        "_indirect",
        "_lengths",
        "_log",
        "_max",
        "_memory",
        "_next",
        "_order",
        "_patience",
        "_readonly",
        "_seen",
        "_signal",
        "_signalled",
        "_span",
        "_steady",
        "_tables",
        "_told",
        "_used",
        "_used_idx",
        "_view",
        "broken",
        "inflight",
        "recovered",
        "size",
        "spin_us",
        "stopped",
    )

    def __init__(
        self,
        size: int,
        memory: GuestMemory,
        desc: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        fences: Fences,
        base: int = 0,
        indirect: bool = True,
        event_idx: bool = False,
        signal: Callable[[], object] | None = None,
        max_descriptors: int = 1024,
        spin_us: int = 0,
    ) -> None:
        if not valid_size(size):
            raise RingError(f"a split ring cannot have {size} entries")
        self.size = size
        self.spin_us = spin_us
        self._patience = Patience()
        self.broken: RingError | None = None
        self.stopped = False
        self.inflight: SplitInflight | None = None
        self.recovered: deque[Chain] = deque()
        self._log: RingLog | None = None
        self._indirect = indirect
        self._event_idx = event_idx
        self._signal = signal
        self._full = fences.full
        self._order = fences.order
        self._clock = fences.clock
        self._max = max(size, max_descriptors)
        self._tables = indirect and self._max > 2  # short ones are fine
        self._steady = False  # nobody but a drain() under way has worked on the queue since it looked
        self._held = [-1] * size  # room in the writable part of each head in flight, -1: not in flight
        self._next = base & _MASK  # of the available ring: the next one to pop
        self._seen = self._next  # the driver's index when last looked at
        self.rebind(memory, desc, avail, used)
        self._used_idx: int = self._used[1]  # the ring remembers it across a stop
        self._signalled = self._used_idx  # used index at the last signal
        self._told = 0.0  # when that was, on the clock
        self._fresh = True  # no signal yet: give one for whatever comes first, as what the driver knows is unknown

    def rebind(self, memory: GuestMemory, desc: memoryview, avail: memoryview, used: memoryview) -> None:
        """The memory table has changed: the ring's parts where they are now. What is in flight is not touched.

        :raises RingError: parts too small or misaligned
        """
        self._steady = False
        layout = SplitLayout(self.size)
        check_parts(
            ((desc, layout.desc_bytes, 4), (avail, layout.avail_bytes, 2), (used, layout.used_bytes, 4)),
        )
        self._memory = memory
        self._desc = desc[: layout.desc_bytes]
        self._avail = avail[: layout.avail_bytes].cast("H")
        self._used = used[: layout.used_bytes].cast("H")
        used32 = used[4 : 4 + 8 * self.size].cast("I")
        self._ids, self._lengths = used32[::2], used32[1::2]
        # The region that was hit last: most guests have one that matters.
        self._base = self._span = 0
        self._view = self._readonly = memoryview(b"")

    # --- taking requests

    def pop(self) -> Chain | None:
        self._steady = False
        position = self._next
        if position == self._seen:
            if self.recovered and not (self.stopped or self.broken):
                return self.recovered.popleft()
            if not self._look():
                return None
        if self.stopped or self.broken:
            return None
        head = self._avail[2 + (position & (self.size - 1))]
        self._next = (position + 1) & _MASK
        if head >= self.size or self._held[head] >= 0:
            # Its owner is unknown, or will get it back from whoever works on it: nothing to return.
            self._break("an available head that is outside of the ring or already in flight")
            return None
        if self.inflight is not None:
            self.inflight.taken(head)
        return self._chain(head)

    def _chain(self, head: int) -> Chain | None:
        """The chain of a head that is in flight from now on; None: it is bad, was given back and broke the queue."""
        try:
            chain = self._walk(head)
        except (RingError, MemoryFault) as e:
            self._reject(head, e)
            return None
        self._held[head] = chain.writable_bytes
        return chain

    def _reject(self, head: int, error: ProtocolError) -> None:
        """A bad chain: give it back and break the queue."""
        self._held[head] = 0
        self.push(head, 0)
        self._break(str(error))

    def _look(self) -> bool:
        """Read the driver's index; whether there is something to pop."""
        if self.stopped or self.broken:
            return False
        seen = self._avail[1]
        waiting = (seen - self._next) & _MASK
        if waiting > self.size:
            self._break("the available index is further ahead than the ring is long")
            return False
        self._seen = seen
        if self._order is not None:
            self._order()  # the ring's entries are not older than the index
        return waiting > 0

    def _walk(self, head: int) -> Chain:
        """Follow one chain; raises for whatever is wrong with it.

        A short table in the region that was hit last is done with at once. ``_follow()`` uses nothing of what is read
        here, so each descriptor is still read once."""
        addr, length, flags, _ = _unpack_desc(self._desc, head << 4)
        base, top = self._base, self._base + self._span
        if flags == DESC_F_INDIRECT and self._tables and base <= addr and addr + length <= top:
            chain = _short_table(head, self._view, addr - base, length, base, top)
            if chain is not None:
                return chain
        return self._follow(head)

    def _follow(self, head: int) -> Chain:
        """As ``_walk()``, whatever the chain looks like. Each descriptor is read once."""
        table: memoryview | bytes = self._desc
        entries = self.size
        index = head
        left = self._max
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_bytes = writable_bytes = 0
        base, span = self._base, self._span
        while True:
            addr, length, flags, following = _unpack_desc(table, index << 4)
            if flags & DESC_F_INDIRECT:
                table = self._indirect_table(table, addr, length, flags, left)
                entries = len(table) >> 4
                index = 0
                continue
            left -= 1
            if left < 0:
                raise RingError("a descriptor chain that is too long or a loop")
            offset = addr - base
            if offset < 0 or offset + length > span:
                offset = self._locate(addr, length)  # may raise; negative: in several regions
                base, span = self._base, self._span
            if not length:
                raise RingError("a descriptor of no bytes")
            if flags & DESC_F_WRITE:
                if offset >= 0:
                    writable.append(self._view[offset : offset + length])
                else:
                    writable += self._memory.translate(addr, length)
                writable_bytes += length
            elif writable:
                raise RingError("a readable descriptor after a writable one")
            else:
                if offset >= 0:
                    readable.append(self._readonly[offset : offset + length])
                else:
                    readable += self._memory.translate(addr, length, False)
                readable_bytes += length
            if not flags & DESC_F_NEXT:
                break
            index = following
            if index >= entries:
                raise RingError("a descriptor's next is outside of its table")
        if readable_bytes + writable_bytes > _MAX_TOTAL:
            raise RingError("a descriptor chain of more than 2^32 bytes")
        return Chain(head, readable, writable, readable_bytes, writable_bytes)

    def _locate(self, addr: int, length: int) -> int:
        """Make the region of ``addr`` the one at hand; the offset in it, or -1 if the range goes on in the next
        region."""
        region = self._memory.find(addr)
        self._base, self._span = region.guest_addr, region.size
        self._view, self._readonly = region.view, region.readonly
        offset = addr - region.guest_addr
        return offset if offset + length <= region.size else -1

    def _indirect_table(self, table: memoryview | bytes, addr: int, length: int, flags: int, left: int) -> bytes:
        """A private copy of an indirect table (section 2.7.5.3), so that the guest cannot change it under the walk."""
        if not self._indirect:
            raise RingError("an indirect descriptor, which was not negotiated")
        if isinstance(table, bytes):
            raise RingError("an indirect descriptor within an indirect table")
        if flags & DESC_F_NEXT:
            raise RingError("an indirect descriptor with a next one")
        if not length or length & 15 or length >> 4 > left:
            raise RingError("an indirect table of a bad length")
        return b"".join(self._memory.translate(addr, length, False))

    def wait(self, timeout_us: int) -> bool:
        clock = self._clock
        until = None if clock is None else clock() + timeout_us / 1e6
        while not self._look():
            if self.stopped or self.broken is not None or clock is None or until is None or clock() >= until:
                return False
        return True

    # --- giving them back

    def push(self, head: int, written: int = 0) -> None:
        self._steady = False
        if self.stopped:
            raise StateError("push on a stopped queue")
        held = self._held
        room = held[head] if 0 <= head < self.size else -1
        if room < 0:
            raise StateError(f"head {head} is not in flight")
        if not 0 <= written <= room:
            raise ValueError(f"{written} bytes written where there is room for {room}")
        held[head] = -1
        inflight = self.inflight
        position = self._used_idx
        slot = position & (self.size - 1)
        self._ids[slot] = head
        self._lengths[slot] = written
        if inflight is not None:
            inflight.returning(head)
        if self._order is not None:
            self._order()  # the element, and what was written, are there before the index says so
        self._used_idx = self._used[1] = (position + 1) & _MASK
        if inflight is not None:
            inflight.returned(head, self._used_idx)
        if self._log is not None:
            self._log_push(self._log, head, position)

    def _notify_sometimes(self) -> None:
        """``notify()``, but for a driver that was signalled a moment ago: to wake a processor costs the one that does
        it more than some requests, and while there are requests the driver is not idle for want of them."""
        if self._clock is None or self._clock() - self._told >= _SIGNAL_S:
            self.notify()

    def notify(self) -> bool:
        if self.should_notify():
            if self._clock is not None:
                self._told = self._clock()
            if self._signal is not None:
                self._signal()
            return True
        return False

    def should_notify(self) -> bool:
        if self.stopped:
            return False
        used = self._used_idx
        since = self._signalled
        if since == used:
            return False
        self._full()  # the used index is visible before looking whether the driver sleeps
        # A driver that did not want to know looks by itself before it sleeps. So the next wish is compared with what
        # comes from here on; else the distance would outgrow 16 bits.
        self._signalled = used
        if self._event_idx:
            event = self._avail[2 + self.size]
            if (used - event - 1) & _MASK >= (used - since) & _MASK and not self._fresh:
                return False
        elif self._avail[0] & NO_SIGNAL:
            return False
        self._fresh = False
        return True

    # --- being woken

    def disable_notifications(self) -> None:
        # With EVENT_IDX the driver stays silent until its index passes avail_event, so there is nothing to say.
        if not (self._event_idx or self.stopped):
            self._used[0] = NO_SIGNAL
            if self._log is not None:
                self._log_used(0, 2)

    def enable_notifications(self) -> bool:
        if self.stopped or self.broken:
            return False
        if self.recovered:
            return True
        if self._event_idx:
            self._used[2 + 4 * self.size] = self._next
        else:
            self._used[0] = 0
        if self._log is not None:
            self._log_used(0 if not self._event_idx else 4 + 8 * self.size, 2)
        self._full()  # the driver sees the wish before its index is looked at again
        return self._look()

    def drain(self, handler: Callable[[Chain], int | None], budget: int = 256, notify_every: int = 8) -> bool:
        finds = 0
        self.disable_notifications()
        try:
            while budget > 0:
                if self._next != self._seen or self.recovered or self._look():
                    served = self._stretch(handler, budget, notify_every)
                    if served:
                        budget -= served
                        continue
                    chain = self.pop()
                    if chain is not None:
                        budget -= 1
                        written = handler(chain)
                        if written is not None:
                            self.push(chain.head, written)
                            if (self._used_idx - self._signalled) & _MASK >= notify_every:
                                self._notify_sometimes()
                        continue
                self.notify()  # first of all: a driver that sleeps takes time to wake up
                if self.spin_us and finds < MAX_FINDS and self._patience.is_worth_it():
                    found = self.wait(self.spin_us)
                    self._patience.learn(found)
                    if found:
                        finds += 1
                        continue
                if not self.enable_notifications():
                    return False
                self.disable_notifications()
            return self.enable_notifications()
        finally:
            self._steady = False
            self.notify()

    def _stretch(self, handler: Callable[[Chain], int | None], budget: int, notify_every: int) -> int:
        """Serve what was there at the last look, and how much that was; 0: the next request is for ``pop()``.

        ``pop()``, ``push()`` and what they call are here once more, with what they look up kept, for what is usual:
        calling them for each request takes twice the time. It ends where the ring does, where an index wraps around,
        and when the handler has worked on the queue."""
        position = self._next
        size, mask = self.size, self.size - 1
        inflight, used_idx = self.inflight, self._used_idx
        slot = position & mask
        count = min((self._seen - position) & _MASK, budget, size - slot, _MASK - position, _MASK - used_idx)
        heads: list[int] = self._avail[2 + slot : 2 + slot + count].tolist()
        if not heads or max(heads) >= size or self._log is not None:
            return 0
        if inflight is not None:
            counters, marks, nexts, words = inflight.counters, inflight.marks, inflight.nexts, inflight.words
            counter, last = inflight._counter, words[LAST_HEAD]
            if counter > COUNTER_MASK - size:
                return 0
        desc, order, indirect = self._desc, self._order, DESC_F_INDIRECT if self._tables else -1
        used, ids, lengths, held = self._used, self._ids, self._lengths, self._held
        view, base, top = self._view, self._base, self._base + self._span
        tell = used_idx + max(1, notify_every - ((used_idx - self._signalled) & _MASK))
        begin = position
        self._steady = True
        chain: Chain | None
        for head in heads:
            if held[head] >= 0:
                break
            position += 1
            self._next = position
            if inflight is not None:
                counters[head] = counter
                inflight._counter = counter = counter + 1
                marks[head] = 1
            addr, length, flags, _ = _unpack_desc(desc, head << 4)
            if (
                flags == indirect
                and base <= addr
                and addr + length <= top
                and (chain := _short_table(head, view, addr - base, length, base, top)) is not None
            ):
                room = held[head] = chain.writable_bytes
            else:
                chain = self._chain(head)
                if chain is None:
                    break
                room = chain.writable_bytes
                view, base, top = self._view, self._base, self._base + self._span
            written = handler(chain)
            if not self._steady:
                if written is not None:
                    self.push(head, written)
                break
            if written is None:
                continue
            if written < 0 or written > room:
                self.push(head, written)  # raises
            slot = used_idx & mask
            ids[slot] = head
            lengths[slot] = written
            held[head] = -1
            used_idx += 1
            if inflight is not None:
                nexts[head] = last
                words[LAST_HEAD] = last = head
                if order is not None:
                    order()
                self._used_idx = used[1] = used_idx
                marks[head] = 0
                words[USED_IDX] = used_idx
            else:
                if order is not None:
                    order()
                self._used_idx = used[1] = used_idx
            if used_idx >= tell:
                tell += notify_every
                self._notify_sometimes()
                if not self._steady:  # whoever signals may also have stopped it
                    break
        return position - begin

    # --- what outlives this backend, and this host

    def track(self, inflight: Inflight) -> None:
        self._steady = False
        if not isinstance(inflight, SplitInflight):
            raise StateError("a split queue, and a recorder of packed ones")
        used = self._used_idx
        mine = [head for head, room in enumerate(self._held) if room >= 0]
        if mine:
            inflight.resume(self.size, used, mine)
            self.inflight = inflight
            return
        heads = inflight.recover(self.size, used)
        if heads is not None:
            if len(heads) > (self._avail[1] - used) & _MASK:
                raise RingError("more requests in flight than were made available")
            self._next = self._seen = (used + len(heads)) & _MASK
        self.inflight = inflight
        for head in heads or ():
            chain = self._chain(head)
            if chain is not None:
                self.recovered.append(chain)

    def log_to(self, log: RingLog | None) -> None:
        self._steady = False
        self._log = log

    def _log_push(self, log: RingLog, head: int, position: int) -> None:
        """A request was completed: its writable part, the element and the index were written."""
        try:
            for addr, length in self._writable(head):
                log.mark(addr, length)
        except (RingError, MemoryFault):
            pass  # the driver has changed a request in flight: its own loss
        self._log_used(4 + 8 * (position & (self.size - 1)), 8)
        self._log_used(2, 2)

    def _log_used(self, offset: int, length: int) -> None:
        """Bytes of the used ring were written."""
        log = self._log
        if log is not None and log.used is not None:
            log.mark(log.used + offset, length)

    def _writable(self, head: int) -> Iterator[tuple[int, int]]:
        """Addresses and lengths of a chain's writable part, read again: only migration needs them."""
        table: memoryview | bytes = self._desc
        index = head
        for left in range(self._max, -1, -1):
            addr, length, flags, following = _unpack_desc(table, index << 4)
            if flags & DESC_F_INDIRECT:
                table = self._indirect_table(table, addr, length, flags, left)
                index = 0
                continue
            if flags & DESC_F_WRITE:
                yield addr, length
            if not flags & DESC_F_NEXT or following >= len(table) >> 4:
                return
            index = following

    # --- state

    def _break(self, why: str) -> None:
        if self.broken is None:
            self.broken = RingError(why)
            self._seen = self._next  # nothing is there to pop
            self.notify()

    def give_up(self, why: str) -> None:
        """Break the queue and touch its memory no more: the ring has lost its place."""
        self._break(why)
        self.stop()

    def adopt(self, paused: DeviceQueue) -> None:
        if not isinstance(paused, SplitDeviceQueue) or paused.size != self.size or not paused.stopped:
            raise StateError("only a stopped queue of the same kind and size can be taken over")
        self._steady = False
        self._held = paused._held
        paused._held = [-1] * paused.size
        self.recovered, paused.recovered = paused.recovered, deque()

    @property
    def in_flight(self) -> int:
        return sum(room >= 0 for room in self._held)

    @property
    def next_base(self) -> int:
        return self._next

    def stop(self) -> int:
        self._steady = False
        if not self.stopped:
            self.stopped = True
            self._seen = self._next  # nothing is there to pop
            empty = memoryview(b"")
            # The ring may be unmapped from now on.
            self._desc = self._avail = self._used = self._ids = self._lengths = self._view = self._readonly = empty
            self._base = self._span = 0
            self._memory = GuestMemory()
        return self._next
