"""The memory transactions of one partition manager: what was sent, who holds it, and the pages' states."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from ffa.abi import transactions as abi
from ffa.abi.ids import (
    ATTRIBUTE_NS,
    ATTRIBUTES_NORMAL,
    FLAG_CLEAR,
    FLAG_CLEAR_ON_RELINQUISH,
    FLAG_TYPE_SHIFT,
    HANDLE_HYPERVISOR_BIT,
    TRANSACTION_TYPES,
    VERSION_1_1,
    Call,
    Data,
    Error,
    FfaError,
    Instruction,
    is_secure,
)
from ffa.roles import checks
from ffa.roles.machine import Access, Machine, PageState, exclusive
from ffa.roles.machines import BORROWER, Borrower, BorrowerEvent
from ffa.roles.profile import Profile


@dataclass(slots=True)
class Lending:
    """One receiver's part in a region."""

    receiver: abi.Receiver  #: as the sender named it
    state: Borrower = Borrower.INVITED
    permissions: int = 0  #: as retrieved
    clear: bool = False  #: zero the memory when it is relinquished
    answer: bytes = b""  #: the retrieve response, while fragments of it are to be read
    read: int = 0  #: bytes of it that were

    @property
    def writable(self) -> bool:
        """Whether the receiver can write."""
        return self.permissions & 3 == Data.RW


@dataclass(slots=True)
class Region:
    """Memory that was, or is being, sent."""

    handle: int
    call: Call
    descriptor: abi.Transaction
    borrowers: dict[int, Lending]
    total: int  #: pages
    range_bytes: int  #: of all ranges together
    ranges_at: int  #: offset of the ranges in the sender's descriptor
    own: bool  #: this manager keeps the sender's pages
    data: bytearray = field(default_factory=bytearray)  #: ranges that have come
    ranges: list[abi.AddressRange] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    complete: bool = False
    below: bool = False  #: the SPMC below has it as well
    sent: int = 0  #: bytes of the whole descriptor that have come
    clear: bool = False  #: a borrower has asked that the memory be zeroed when the last of them has relinquished

    @property
    def both_worlds(self) -> bool:
        """Whether hypervisor and SPMC each know of a part of the borrowers alone. Then neither zeroes before the memory
        is reclaimed: somebody that the other knows of may be working on it."""
        secure = {is_secure(b) for b in self.borrowers}
        return not is_secure(self.descriptor.sender) and len(secure) == 2

    @property
    def held(self) -> bool:
        """Whether any receiver has it."""
        return any(b.state is not Borrower.INVITED for b in self.borrowers.values())


@dataclass(slots=True)
class Checks:
    """The decision tables of one manager; a test may change them."""

    send: tuple[checks.Check[checks.Sending], ...] = checks.SEND
    ranges: tuple[checks.Check[checks.Ranges], ...] = checks.RANGES
    retrieve: tuple[checks.Check[checks.Retrieving], ...] = checks.RETRIEVE
    relinquish: tuple[checks.Check[checks.Relinquishing], ...] = checks.RELINQUISH
    reclaim: tuple[checks.Check[checks.Reclaiming], ...] = checks.RECLAIM


class Handles:
    """Fresh memory handles, counted up from 1."""

    def __init__(self, hypervisor: bool) -> None:
        self._next = itertools.count(1)
        self._bit = HANDLE_HYPERVISOR_BIT if hypervisor else 0

    def __call__(self) -> int:
        """A handle that was never given before."""
        return next(self._next) | self._bit


_KEPT_BY_SENDER = {Call.MEM_SHARE: Access.RWX, Call.MEM_LEND: Access.NONE, Call.MEM_DONATE: Access.NONE}
"""What the sender may do with memory that it has sent."""

_ACCESS = {
    Data.NOT_SPECIFIED: Access.RW,
    Data.RO: Access.R,
    Data.RW: Access.RW,
}


class Transactions:
    """All regions of one manager, by handle.

    ``speaks_for(caller, sender)`` and ``may_receive(sender, receiver)`` are the manager's knowledge of endpoints.
    """

    machine: Machine
    profile: Profile
    speaks_for: Callable[[int, int], bool]
    may_receive: Callable[[int, int], bool]

    def __init__(
        self,
        machine: Machine,
        profile: Profile,
        handles: Callable[[], int],
        speaks_for: Callable[[int, int], bool],
        may_receive: Callable[[int, int], bool],
    ) -> None:
        self.machine = machine
        self.profile = profile
        self.new_handle = handles
        self.speaks_for = speaks_for
        self.may_receive = may_receive
        self.regions: dict[int, Region] = {}
        self.reserved: set[int] = set()  #: pages that nobody may send, though another manager keeps them
        self.read_only: dict[int, set[int]] = {}  #: endpoint → pages of its own that it cannot write
        self.checks = Checks()
        self._counts: dict[int, int] = {}

    def cannot_write(self, owner: int, pages: list[int]) -> bool:
        """Whether an owner has made any of these pages read-only for itself."""
        own = self.read_only.get(owner)
        return own is not None and not own.isdisjoint(pages)

    def count(self, sender: int) -> int:
        """Regions that ``sender`` has sent and not got back."""
        return self._counts.get(sender, 0)

    def find(self, handle: int) -> Region:
        """The region of a handle. Raises FfaError: there is none."""
        region = self.regions.get(handle)
        if region is None:
            raise FfaError(Error.INVALID_PARAMETERS, f"no region has handle {handle:#x}")
        return region

    # -- sending

    def look_at(self, call: Call, caller: int, version: int, total: int, buf: bytes, own: bool) -> Region:
        """A region of the descriptor's first fragment, checked but not entered; its handle is 0. Raises FfaError."""
        sending = checks.Sending(self, call, caller, version, total, buf, own)
        checks.run(self.checks.send, sending)
        descriptor, composite = sending.descriptor, sending.composite
        region = Region(
            handle=0,
            call=call,
            descriptor=descriptor,
            borrowers={r.endpoint: Lending(r) for r in descriptor.receivers},
            total=composite.pages,
            range_bytes=composite.count * abi.RANGE_SIZE,
            ranges_at=composite.ranges,
            own=own,
            data=bytearray(buf[composite.ranges :]),
            sent=len(buf),
        )
        if total == len(buf):
            self.finish(region)
        return region

    def add_fragment(self, region: Region, data: bytes) -> None:
        """More ranges of a region that is being sent; checks all of them when the last have come.

        Raises FfaError: INVALID_PARAMETERS, the fragment is empty, cut or too long; whatever the ranges' checks say.
        """
        if not data or len(data) % abi.RANGE_SIZE or len(region.data) + len(data) > region.range_bytes:
            raise FfaError(Error.INVALID_PARAMETERS, "a fragment that is empty, cut or too long")
        region.data += data
        region.sent += len(data)
        if len(region.data) == region.range_bytes:
            self.finish(region)

    def finish(self, region: Region) -> None:
        """All ranges have come: checks them and their pages. Raises FfaError."""
        ranges = checks.Ranges(self, region, bytes(region.data), region.own)
        checks.run(self.checks.ranges, ranges)
        region.ranges, region.pages = ranges.ranges, ranges.pages
        region.complete = True
        region.data = bytearray()

    def enter(self, region: Region, handle: int) -> None:
        """Keeps a region under its handle; the sender's pages change if it is complete."""
        region.handle = handle
        self.regions[handle] = region
        sender = region.descriptor.sender
        self._counts[sender] = self.count(sender) + 1
        if region.complete:
            self.take_from_sender(region)

    def take_from_sender(self, region: Region) -> None:
        """The sender's pages enter the transaction."""
        if not region.own:
            return
        sender = region.descriptor.sender
        if region.descriptor.flags & FLAG_CLEAR:
            self.machine.clear(region.ranges)
        kept = _KEPT_BY_SENDER[region.call]
        state = PageState(sender, ((sender, kept),) if kept else (), region.handle)
        self.machine.set_state(region.pages, state)

    def forget(self, region: Region) -> None:
        """Ends a region; its pages stay as they are."""
        del self.regions[region.handle]
        sender = region.descriptor.sender
        self._counts[sender] -= 1
        if not self._counts[sender]:
            del self._counts[sender]

    # -- retrieving

    def look_at_retrieve(self, caller: int, request: abi.Transaction) -> Region:
        """The region that ``caller``'s retrieve request is about, checked. Raises FfaError."""
        region = self.find(request.handle)
        if not region.complete:
            raise FfaError(Error.INVALID_PARAMETERS, "not sent to the end")
        checks.run(self.checks.retrieve, checks.Retrieving(self, caller, request, region))
        return region

    def retrieve(self, region: Region, caller: int, request: abi.Transaction, answer: bytes, size: int) -> bytes:
        """Gives a checked retriever access; returns the first fragment of ``answer``, of at most ``size`` bytes."""
        asked = next(r for r in request.receivers if r.endpoint == caller)
        self.lend(region, caller, asked.permissions, bool(request.flags & FLAG_CLEAR_ON_RELINQUISH), len(answer) > size)
        if len(answer) <= size:
            return answer
        lending = region.borrowers[caller]
        lending.answer, lending.read = answer, size - size % abi.RANGE_SIZE
        return answer[: lending.read]

    def describe(self, region: Region, asked: abi.Receiver, version: int, named: int = 0) -> bytes:
        """The retrieve response for one receiver, in the layout of its version; ``named`` are the attributes that it
        asked for, if any."""
        lending = region.borrowers[asked.endpoint]
        granted = _granted(region.call, lending.receiver.permissions, asked.permissions)
        descriptor = region.descriptor
        attributes = named & 0x3F or descriptor.attributes or ATTRIBUTES_NORMAL
        normal = any(g is not None and not g.secure for g in self.machine.regions_of(region.ranges[:1]))
        if version >= VERSION_1_1 and normal:
            attributes |= ATTRIBUTE_NS
        flags = TRANSACTION_TYPES[region.call] << FLAG_TYPE_SHIFT | descriptor.flags & FLAG_CLEAR
        receiver = replace(lending.receiver, permissions=granted)
        answer = abi.Transaction(descriptor.sender, (receiver,), attributes, flags, region.handle, descriptor.tag)
        return abi.build(version, answer, region.ranges)

    def lend(self, region: Region, caller: int, asked: int, clear: bool = False, in_parts: bool = False) -> None:
        """``caller``, a receiver that may retrieve, gets access; by a donation it becomes the owner.

        Raises FfaError: DENIED, it has it already.
        """
        lending = region.borrowers[caller]
        event = BorrowerEvent.RETRIEVE_PART if in_parts else BorrowerEvent.RETRIEVE
        after = BORROWER.get((lending.state, event))
        if after is None:
            raise FfaError(Error.DENIED, "retrieved already")
        lending.state = after
        lending.clear = clear
        lending.permissions = _granted(region.call, lending.receiver.permissions, asked)
        if region.call is Call.MEM_DONATE:
            self.machine.set_state(region.pages, exclusive(caller))
            if not in_parts:
                self.forget(region)
        else:
            self._grant(region, caller, _access(lending.permissions))

    def _grant(self, region: Region, endpoint: int, access: Access) -> None:
        """Changes one endpoint's access to a region's pages, which are all in one state: in this transaction, unless
        nobody keeps the sender's pages."""
        state = self.machine.state(region.pages[0])
        if state is None or state.handle != region.handle:
            return
        self.machine.set_state(region.pages, state.granting(endpoint, access))

    def next_part(self, region: Region, caller: int, offset: int, size: int) -> bytes:
        """The fragment of the retrieve response from ``offset`` on, of at most ``size`` bytes.

        Raises FfaError: INVALID_PARAMETERS, the caller is not reading one, or not from there.
        """
        lending = region.borrowers.get(caller)
        if lending is None or lending.state is not Borrower.RETRIEVING or offset != lending.read:
            raise FfaError(Error.INVALID_PARAMETERS, "no such fragment")
        part = lending.answer[offset : offset + size - size % abi.RANGE_SIZE]
        lending.read += len(part)
        if lending.read == len(lending.answer):
            lending.state = BORROWER[lending.state, BorrowerEvent.LAST_FRAGMENT]
            lending.answer = b""
            if region.call is Call.MEM_DONATE:
                self.forget(region)
        return part

    # -- relinquishing and reclaiming

    def relinquish(self, caller: int, request: abi.Relinquish) -> None:
        """``caller`` gives its access up. Raises FfaError."""
        region = self.find(request.handle)
        checks.run(self.checks.relinquish, checks.Relinquishing(caller, request, region))
        self.let_go(region, caller, clear=bool(request.flags & FLAG_CLEAR))

    def let_go(self, region: Region, caller: int, clear: bool = False) -> None:
        """Takes ``caller``'s access away, if it has any; clears the memory if it asked for that, now or before."""
        lending = region.borrowers[caller]
        after = BORROWER.get((lending.state, BorrowerEvent.RELINQUISH))
        if after is None:
            return
        lending.state = after
        region.clear |= (clear or lending.clear) and lending.writable
        if region.clear and not region.held and not region.both_worlds:
            self.machine.clear(region.ranges)
            region.clear = False
        lending.permissions = 0
        self._grant(region, caller, Access.NONE)

    def look_at_reclaim(self, caller: int, handle: int, flags: int) -> Region:
        """The region that ``caller`` may take back. Raises FfaError."""
        region = self.find(handle)
        checks.run(self.checks.reclaim, checks.Reclaiming(self, caller, flags, region))
        return region

    def reclaim(self, region: Region, flags: int) -> None:
        """Gives a region back to its sender."""
        self.forget(region)
        if region.clear:
            self.machine.clear(region.ranges)
        if region.own:
            if flags & FLAG_CLEAR:
                self.machine.clear(region.ranges)
            self.machine.set_state(region.pages, exclusive(region.descriptor.sender))


def _access(permissions: int) -> Access:
    """What a permission byte lets its holder do."""
    access = _ACCESS[Data(permissions & 3)]
    return access | Access.X if permissions >> 2 == Instruction.X else access


def _granted(call: Call, given: int, asked: int) -> int:
    """The permissions that a retriever gets: what it asked for, or all that it was given where it named none."""
    data = Data(asked & 3) or Data(given & 3) or Data.RW
    instruction = Instruction(asked >> 2 & 3)
    if call is Call.MEM_SHARE or instruction is Instruction.NOT_SPECIFIED:
        instruction = Instruction.NX
    return data | instruction << 2
