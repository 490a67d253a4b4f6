"""The device's side of a packed virtqueue. Source: virtio 1.2, section 2.8; methods as ``DeviceQueue`` documents
them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from struct import Struct

from pyvhost.dirtylog import RingLog
from pyvhost.errors import MemoryFault, RingError, StateError
from pyvhost.memory import GuestMemory
from pyvhost.vring.api import Chain, DeviceQueue, Fences, Inflight
from pyvhost.vring.packed import (
    DESC_F_AVAIL,
    DESC_F_INDIRECT,
    DESC_F_NEXT,
    DESC_F_USED,
    DESC_F_WRITE,
    EVENT_DESC,
    EVENT_DISABLE,
    EVENT_ENABLE,
    INITIAL_BASE,
    WRAP,
    PackedLayout,
    pack_base,
    unpack_base,
    valid_size,
)
from pyvhost.vring.packed_inflight import PackedInflight
from pyvhost.vring.parts import check_parts
from pyvhost.vring.patience import MAX_FINDS, Patience
from pyvhost.vring.tables import short_table

__all__ = ["PackedDeviceQueue"]

# Of a descriptor, without its flags: those are read by themselves, once.
_unpack_head = Struct("<QIH").unpack_from
_unpack_entry = Struct("<QIHH").unpack_from
_MAX_TOTAL = 1 << 32  # section 2.8.5: no chain is longer, in bytes
_BOTH = DESC_F_AVAIL | DESC_F_USED
_LIST = DESC_F_NEXT | DESC_F_INDIRECT
# In a table: flags, of which drivers set none but the direction; what is an id elsewhere means nothing there.
_short_table = short_table("QI2xH", "QI2xH", 0, 0, DESC_F_WRITE, DESC_F_WRITE)

#: of a descriptor: addr, len, flags
_Entry = tuple[int, int, int]


class PackedDeviceQueue:
    """See ``DeviceQueue``; the arguments are those of ``SplitDeviceQueue``, with ``avail`` and ``used`` the event
    suppression structures of the driver and of the device, and ``base`` as ``pack_base()`` makes it. A request's
    ``head`` is its buffer id, any 16-bit number the driver chose.

    A chain of direct descriptors is no longer than the ring, ``max_descriptors`` bounds indirect tables.

    :raises RingError: a size that is not 1 to 2^15, parts too small or misaligned, a base outside of the ring
    """

    __slots__ = (
        "_asking",
        "_avail",
        "_base",
        "_clock",
        "_desc",
        "_event_idx",
        "_flags",
        "_fresh",
        "_full",
        "_held",
        "_indirect",
        "_kept",
        "_lengths",
        "_log",
        "_max",
        "_memory",
        "_next",
        "_occupied",
        "_order",
        "_patience",
        "_readonly",
        "_signal",
        "_since",
        "_span",
        "_tables",
        "_taken",
        "_used",
        "_used_idx",
        "_used_wrap",
        "_view",
        "_wrap",
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
        base: int = INITIAL_BASE,
        indirect: bool = True,
        event_idx: bool = False,
        signal: Callable[[], object] | None = None,
        max_descriptors: int = 1024,
        spin_us: int = 0,
    ) -> None:
        if not valid_size(size):
            raise RingError(f"a packed ring cannot have {size} entries")
        self.size = size
        self.spin_us = spin_us
        self._patience = Patience()
        self.broken: RingError | None = None
        self.stopped = False
        self.inflight: PackedInflight | None = None
        self.recovered: deque[Chain] = deque()
        self._kept: bytes | None = None  # of a stopped queue: what its part of the inflight region said
        self._log: RingLog | None = None
        self._indirect = indirect
        self._event_idx = event_idx
        self._signal = signal
        self._full = fences.full
        self._order = fences.order
        self._clock = fences.clock
        self._max = max(size, max_descriptors)
        self._tables = indirect and self._max > 2  # short ones are fine
        # by id: room in the writable part, descriptors in the ring, and all that it consists of
        self._held: dict[int, tuple[int, int, Sequence[_Entry]]] = {}
        self._occupied = 0  # descriptors of all those
        self._go_to(base)
        self._since = 0  # descriptors given back since the driver's wish was looked at
        self._fresh = True  # no signal yet: give one for whatever comes first, as what the driver knows is unknown
        self._asking = True
        self.rebind(memory, desc, avail, used)

    def _go_to(self, base: int) -> None:
        position, self._wrap, used, self._used_wrap = unpack_base(base)
        if position >= self.size or used >= self.size:
            raise RingError(f"a base of {base:#x} for a ring of {self.size} entries")
        self._next, self._used_idx = position, used
        self._taken = DESC_F_AVAIL if self._wrap else DESC_F_USED  # how an available descriptor looks

    def rebind(self, memory: GuestMemory, desc: memoryview, avail: memoryview, used: memoryview) -> None:
        """The memory table has changed: the ring's parts where they are now. What is in flight is not touched.

        :raises RingError: parts too small or misaligned
        """
        layout = PackedLayout(self.size)
        check_parts(
            ((desc, layout.desc_bytes, 4), (avail, layout.avail_bytes, 2), (used, layout.used_bytes, 2)),
        )
        self._memory = memory
        self._desc = desc[: layout.desc_bytes]
        self._flags = self._desc.cast("H")  # those of descriptor n are word 8 n + 7
        self._lengths = self._desc.cast("I")  # that of descriptor n is word 4 n + 2
        self._avail = avail[: layout.avail_bytes].cast("H")
        self._used = used[: layout.used_bytes].cast("H")
        # The region that was hit last: most guests have one that matters.
        self._base = self._span = 0
        self._view = self._readonly = memoryview(b"")

    # --- taking requests

    def pop(self) -> Chain | None:
        if self.stopped or self.broken is not None:
            return None
        if self.recovered:
            return self.recovered.popleft()
        position = self._next
        flags = self._flags[(position << 3) + 7]
        if flags & _BOTH != self._taken:
            return None
        if self._order is not None:
            self._order()  # the chain's descriptors are not older than the flags of its first one
        if flags & DESC_F_NEXT:
            return self._pop_list(position, flags)
        addr, length, head = _unpack_head(self._desc, position << 4)
        held = self._held
        if head in held:
            self._break("an id that is already in flight")
            return None
        if self._occupied >= self.size:
            self._break("more descriptors are available than the ring is long")
            return None
        self._occupied += 1
        position += 1
        if position == self.size:
            position = 0
            self._turn()
        self._next = position
        if self.inflight is not None:
            self.inflight.taken(head, ((addr, length, flags),))
        offset = addr - self._base
        if not flags & DESC_F_INDIRECT and length and 0 <= offset <= self._span - length:
            end = offset + length
            if flags & DESC_F_WRITE:
                held[head] = (length, 1, ((addr, length, flags),))
                return Chain(head, [], [self._view[offset:end]], 0, length)
            held[head] = (0, 1, ())
            return Chain(head, [self._readonly[offset:end]], [], length, 0)
        return self._chain(head, [(addr, length, flags)], 1)

    def _turn(self) -> None:
        """The position to take from gets past the ring's end."""
        self._wrap ^= 1
        self._taken = DESC_F_AVAIL if self._wrap else DESC_F_USED

    def _pop_list(self, position: int, flags: int) -> Chain | None:
        """A request of more than one descriptor. All of it is read, even after a mistake was found: its id, with
        which a bad one is given back, is in the last descriptor."""
        size, desc = self.size, self._desc
        room = size - self._occupied
        count = readable_bytes = writable_bytes = 0
        entries: list[_Entry] = []
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        base, span, view, readonly = self._base, self._span, self._view, self._readonly
        usual = True
        while True:
            count += 1
            if count > room:
                self._break("a descriptor chain that is too long or a loop")
                return None
            addr, length, head, others = _unpack_entry(desc, position << 4)
            if count > 1:
                flags = others
            entries.append((addr, length, flags))
            offset = addr - base
            if not 0 <= offset <= span - length or not length or flags & DESC_F_INDIRECT:
                usual = False
            elif flags & DESC_F_WRITE:
                writable.append(view[offset : offset + length])
                writable_bytes += length
            elif writable:
                usual = False
            else:
                readable.append(readonly[offset : offset + length])
                readable_bytes += length
            position += 1
            if position == size:
                position = 0
            if not flags & DESC_F_NEXT:
                break
        held = self._held
        if head in held:
            self._break("an id that is already in flight")
            return None
        self._occupied += count
        if self._next + count >= size:
            self._turn()
        self._next = position
        if self.inflight is not None:
            self.inflight.taken(head, entries)
        if usual and readable_bytes + writable_bytes <= _MAX_TOTAL:
            held[head] = (writable_bytes, count, entries)
            return Chain(head, readable, writable, readable_bytes, writable_bytes)
        return self._chain(head, entries, count)

    def _chain(self, head: int, entries: list[_Entry], count: int) -> Chain | None:
        """Check and translate a request that takes ``count`` descriptors of the ring."""
        addr, length, flags = entries[0]
        base, span = self._base, self._span
        if flags & _LIST == DESC_F_INDIRECT and self._tables and 0 <= addr - base <= span - length:
            short = _short_table(head, self._view, addr - base, length, base, base + span)
            if short is not None:
                written = [(addr, length, DESC_F_WRITE) for addr, length in short.written()]
                self._held[head] = (short.writable_bytes, count, written)
                return short
        try:
            if entries[0][2] & DESC_F_INDIRECT:
                entries = self._table(entries)
            chain = self._walk(head, entries)
        except (RingError, MemoryFault) as e:
            self._held[head] = (0, count, ())
            self.push(head, 0)
            self._break(str(e))
            return None
        self._held[head] = (chain.writable_bytes, count, entries)
        return chain

    def _table(self, entries: list[_Entry]) -> list[_Entry]:
        """The entries of an indirect table (section 2.8.7), from a private copy, so that the guest cannot change it
        under the walk. They follow each other: flags other than for the direction mean nothing there."""
        addr, length, flags = entries[0]
        if not self._indirect:
            raise RingError("an indirect descriptor, which was not negotiated")
        if flags & DESC_F_NEXT:
            raise RingError("an indirect descriptor with a next one")
        if not length or length & 15 or length >> 4 > self._max:
            raise RingError("an indirect table of a bad length")
        table = b"".join(self._memory.translate(addr, length, False))
        result = []
        for at in range(0, length, 16):
            addr, size, _, flags = _unpack_entry(table, at)
            if flags & DESC_F_INDIRECT:
                raise RingError("an indirect descriptor within an indirect table")
            result.append((addr, size, flags))
        return result

    def _walk(self, head: int, entries: list[_Entry]) -> Chain:
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        readable_bytes = writable_bytes = 0
        base, span = self._base, self._span
        for addr, length, flags in entries:
            offset = addr - base
            if offset < 0 or offset + length > span:
                offset = self._locate(addr, length)  # may raise; negative: in several regions
                base, span = self._base, self._span
            if not length:
                raise RingError("a descriptor of no bytes")
            if flags & DESC_F_INDIRECT:
                raise RingError("an indirect descriptor within a chain")
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

    def _look(self) -> bool:
        """Whether there is something to pop."""
        if self.stopped or self.broken is not None:
            return False
        return self._flags[(self._next << 3) + 7] & _BOTH == self._taken

    def wait(self, timeout_us: int) -> bool:
        clock = self._clock
        until = None if clock is None else clock() + timeout_us / 1e6
        while not self._look():
            if self.stopped or self.broken is not None or clock is None or until is None or clock() >= until:
                return False
        return True

    # --- giving them back

    def push(self, head: int, written: int = 0) -> None:
        if self.stopped:
            raise StateError("push on a stopped queue")
        request = self._held.get(head)
        if request is None:
            raise StateError(f"head {head} is not in flight")
        room, count, entries = request
        if not 0 <= written <= room:
            raise ValueError(f"{written} bytes written where there is room for {room}")
        del self._held[head]
        self._occupied -= count
        inflight = self.inflight
        position = self._used_idx
        flags = _BOTH if self._used_wrap else 0
        words = self._flags
        word = position << 3
        self._since += count
        position += count
        if position >= self.size:
            position -= self.size
            self._used_wrap ^= 1
        self._used_idx = position
        self._lengths[(word >> 1) + 2] = written & 0xFFFF_FFFF
        words[word + 6] = head
        if inflight is not None:
            inflight.returning(head, position | self._used_wrap << 15)
        if written:
            flags |= DESC_F_WRITE
        if self._order is not None:
            self._order()  # the element, and what was written, are there before the flags say so
        words[word + 7] = flags
        if inflight is not None:
            inflight.returned(head)
        if self._log is not None:
            self._log_push(self._log, entries, word << 1)

    def notify(self) -> bool:
        if self.should_notify():
            if self._signal is not None:
                self._signal()
            return True
        return False

    def should_notify(self) -> bool:
        since = self._since
        if self.stopped or not since:
            return False
        self._full()  # the flags are visible before looking whether the driver sleeps
        self._since = 0
        wish = self._avail[1] & 3
        if wish == EVENT_DISABLE:
            return False
        if wish == EVENT_DESC and self._event_idx and not self._fresh and since < self.size:
            if self._order is not None:
                self._order()
            event = self._avail[0]
            position = event & (WRAP - 1)
            if event >> 15 != self._used_wrap:
                position -= self.size
            return self._used_idx - since <= position < self._used_idx
        self._fresh = False
        return True

    # --- being woken

    def disable_notifications(self) -> None:
        if self._asking and not self.stopped:
            self._asking = False
            self._used[1] = EVENT_DISABLE

    def enable_notifications(self) -> bool:
        if self.stopped or self.broken is not None:
            return False
        if self.recovered:
            return True
        self._asking = True
        if self._event_idx:
            self._used[0] = self._next | self._wrap << 15
            if self._order is not None:
                self._order()  # the position is there before the flags refer to it
            self._used[1] = EVENT_DESC
        else:
            self._used[1] = EVENT_ENABLE
        self._full()  # the driver sees the wish before the ring is looked at again
        return self._look()

    def drain(self, handler: Callable[[Chain], int | None], budget: int = 256, notify_every: int = 8) -> bool:
        pop, push, notify = self.pop, self.push, self.notify
        self.disable_notifications()
        unsignalled = finds = 0
        try:
            while budget > 0:
                chain = pop()
                if chain is None:
                    if unsignalled:  # first of all: a driver that sleeps takes time to wake up
                        unsignalled = 0
                        notify()
                    if self.spin_us and finds < MAX_FINDS and self._patience.is_worth_it():
                        notify()
                        found = self.wait(self.spin_us)
                        self._patience.learn(found)
                        if found:
                            finds += 1
                            continue
                    if not self.enable_notifications():
                        return False
                    self.disable_notifications()
                    continue
                budget -= 1
                written = handler(chain)
                if written is not None:
                    push(chain.head, written)
                    unsignalled += 1
                    if unsignalled >= notify_every:
                        unsignalled = 0
                        notify()
            return self.enable_notifications()
        finally:
            self.notify()

    # --- what outlives this host

    def track(self, inflight: Inflight) -> None:
        if not isinstance(inflight, PackedInflight):
            raise StateError("a packed queue, and a recorder of split ones")
        if self._held:
            if self._kept is None:
                raise RingError("requests are in flight that were not recorded")
            requests = inflight.resume(self.size, self._kept)
            if {r.head: len(r.descriptors) >> 4 for r in requests} != {n: held[1] for n, held in self._held.items()}:
                raise RingError("an inflight region with other requests than are in flight")
            self.inflight = inflight
            return
        found = inflight.recover(self.size, self.next_base, self._desc)
        self.inflight = inflight
        if found is None:
            return
        base, requests = found
        self._go_to(base)
        for request in requests:
            count = len(request.descriptors) >> 4
            entries = [_unpack_entry(request.descriptors, at) for at in range(0, 16 * count, 16)]
            self._occupied += count
            chain = self._chain(request.head, [(addr, length, flags) for addr, length, _, flags in entries], count)
            if chain is not None:
                self.recovered.append(chain)

    def log_to(self, log: RingLog | None) -> None:
        """Log what is written, from now on; None: do not."""
        self._log = log

    def _log_push(self, log: RingLog, entries: Sequence[_Entry], offset: int) -> None:
        """A request was completed: its writable part and a descriptor were written."""
        for addr, length, flags in entries:
            if flags & DESC_F_WRITE:
                log.mark(addr, length)
        if log.used is not None:
            log.mark(log.used + offset, 16)

    # --- state

    def _break(self, why: str) -> None:
        if self.broken is None:
            self.broken = RingError(why)
            self.notify()

    def give_up(self, why: str) -> None:
        """Break the queue and touch its memory no more: the ring has lost its place."""
        self._break(why)
        self.stop()

    def adopt(self, paused: DeviceQueue) -> None:
        if not isinstance(paused, PackedDeviceQueue) or paused.size != self.size or not paused.stopped:
            raise StateError("only a stopped queue of the same kind and size can be taken over")
        self._held, paused._held = paused._held, {}
        self._occupied, paused._occupied = paused._occupied, 0
        self._kept, paused._kept = paused._kept, None
        self.recovered, paused.recovered = paused.recovered, deque()

    @property
    def in_flight(self) -> int:
        return len(self._held)

    @property
    def next_base(self) -> int:
        return pack_base(self._next, self._wrap, self._used_idx, self._used_wrap)

    def stop(self) -> int:
        if not self.stopped:
            self.stopped = True
            if self.inflight is not None:
                self._kept = self.inflight.content()
                self.inflight = None
            empty = memoryview(b"")
            # The ring may be unmapped from now on.
            self._desc = self._flags = self._lengths = self._avail = self._used = self._view = self._readonly = empty
            self._base = self._span = 0
            self._memory = GuestMemory()
        return self.next_base
