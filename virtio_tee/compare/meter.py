"""What is counted while a call makes its way, where it happens; and who can read what when it has arrived.

A meter belongs to one run in one process. Counting takes time, so what is counted is not what is timed.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from unittest.mock import patch

from tee.memory import Memory


class Party(StrEnum):
    """Who takes part."""

    GUEST = "guest"
    HOST = "host"
    HYPERVISOR = "hypervisor"
    SPMC = "spmc"
    TEE = "tee"


class Phase(StrEnum):
    """Of a run. Only ``CALL`` is of the workload's unit."""

    ATTACH = "attach"
    SETUP = "setup"
    CALL = "call"
    END = "end"


class What(StrEnum):
    """What is counted; the names in the JSON."""

    REQUESTS = "requests"
    MESSAGES = "messages"
    NOTIFICATIONS = "notifications"
    VM_EXITS = "vm_exits"
    WORLD_SWITCHES = "world_switches"
    BYTES_COPIED = "bytes_copied"
    PAGES_SHARED = "pages_shared"
    RPCS = "rpcs"
    RPC_HOPS = "rpc_hops"
    POLLS = "polls"


@dataclass(frozen=True, slots=True)
class Message:
    """What went from one party to another. ``kind``: request, response, event, notification, or copy (then it says who
    copied what for itself)."""

    at_ns: int
    source: Party
    target: Party
    name: str
    kind: str = "request"
    size: int = 0  #: bytes
    rpc: bool = False


@dataclass(slots=True)
class Reach:
    """What one party can read: ``guest_memory``, bytes of the guest's memory that it has access to; ``payload``, bytes
    of what the client passes that are found in what it has."""

    guest_memory: int = 0
    payload: int = 0


@dataclass(frozen=True, slots=True)
class Readable:
    """Bytes that a party can read: in the guest's memory, or in what it has itself."""

    view: memoryview | bytes
    of_guest: bool


Look = Callable[[], Iterable[Readable]]
"""What a party can read now."""

PAGE = 4096

LOOKS = 8
"""How often in a call it is looked what parties can read."""


@dataclass
class Meter:
    """Counts by phase, bytes copied by who copied them, the messages of the call, and what parties can read."""

    phase: Phase = Phase.ATTACH
    counts: dict[Phase, Counter[What]] = field(default_factory=lambda: {phase: Counter() for phase in Phase})
    copied: Counter[Party] = field(default_factory=Counter)
    messages: list[Message] = field(default_factory=list)
    reach: dict[Party, Reach] = field(default_factory=dict)
    payload: Sequence[bytes] = ()
    """What the client passes: each piece is looked for by itself."""
    looks: dict[Party, list[Look]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lock = threading.RLock()  # parties run on threads of their own
        self._now = threading.local()
        self._looked = 0
        self._missing: dict[Party, list[bytes]] = {}  #: pieces of the payload that were not found yet

    # -- who is at work

    @property
    def party(self) -> Party | None:
        """Who is at work on this thread; None: a TA, whose work is the same on each path and is not counted."""
        return getattr(self._now, "party", Party.GUEST)

    @contextmanager
    def within(self, party: Party | None) -> Iterator[None]:
        """While this lasts, ``party`` is at work on this thread."""
        before = self.party
        self._now.party = party
        try:
            yield
        finally:
            self._now.party = before

    # -- what happens

    def add(self, what: What, count: int = 1) -> None:
        """``what`` has happened."""
        with self._lock:
            self.counts[self.phase][what] += count

    def message(
        self, source: Party, target: Party, name: str, *, kind: str = "request", size: int = 0, rpc: bool = False
    ) -> None:
        """A message of ``size`` bytes goes from one party to another; ``rpc``: because the TEE has asked for
        something."""
        with self._lock:
            counts = self.counts[self.phase]
            counts[What.MESSAGES] += 1
            counts[What.RPC_HOPS] += rpc
            counts[What.REQUESTS] += kind == "request" and source is Party.GUEST
            self._note(Message(time.monotonic_ns(), source, target, name, kind, size, rpc))

    def notification(self, source: Party, target: Party, name: str) -> None:
        """One party tells another that there is something to look at."""
        with self._lock:
            self.counts[self.phase][What.NOTIFICATIONS] += 1
            self._note(Message(time.monotonic_ns(), source, target, name, "notification"))

    def copies(self, size: int) -> None:
        """Whoever is at work copies ``size`` bytes out of, or into, memory that is passed on."""
        party = self.party
        if party is None or not size:
            return
        with self._lock:
            self.counts[self.phase][What.BYTES_COPIED] += size
            if self.phase is not Phase.CALL:
                return
            self.copied[party] += size
            last = self.messages[-1] if self.messages else None
            if last is not None and last.kind == "copy" and last.source is party:
                self.messages.pop()
                size += last.size
            self._note(Message(time.monotonic_ns(), party, party, "copies", "copy", size))

    def _note(self, message: Message) -> None:
        if self.phase is Phase.CALL:
            self.messages.append(message)

    # -- who can read what

    def look(self) -> None:
        """The TEE has got something of the call's: what can each party read now?"""
        if self.phase is not Phase.CALL or self._looked >= LOOKS:
            return
        self._looked += 1
        for party, looks in self.looks.items():
            found = [readable for look in looks for readable in look()]
            reach = self.reach.setdefault(party, Reach())
            reach.guest_memory = max(reach.guest_memory, sum(len(r.view) for r in found if r.of_guest))
            missing = self._missing.setdefault(party, list(self.payload))
            if missing:
                data = [bytes(readable.view) for readable in found]
                for one in data:
                    missing[:] = _not_in(one, missing)
                reach.payload = sum(map(len, self.payload)) - sum(map(len, missing))


def _not_in(data: bytes, pieces: Sequence[bytes]) -> list[bytes]:
    """Those of ``pieces`` that ``data`` has not. Each is looked for behind the one before, first."""
    missing, at = [], 0
    for piece in pieces:
        found = data.find(piece, at)
        if found < 0:
            found = data.find(piece, 0, at + len(piece))
        if found < 0:
            missing.append(piece)
        else:
            at = found + len(piece)
    return missing


@contextmanager
def counting_copies(meter: Meter) -> Iterator[None]:
    """While this lasts, ``meter`` is told of all that is read from and written to any :class:`~tee.memory.Memory`."""
    read, write = Memory.read, Memory.write

    def counted_read(self: Memory, offset: int, size: int) -> bytes:
        meter.copies(size)
        return read(self, offset, size)

    def counted_write(self: Memory, offset: int, data: bytes | bytearray | memoryview) -> None:
        meter.copies(len(data))
        write(self, offset, data)

    with patch.object(Memory, "read", counted_read), patch.object(Memory, "write", counted_write):
        yield
