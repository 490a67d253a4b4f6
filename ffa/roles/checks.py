"""What a partition manager checks of a memory transaction, in the order in which it decides: tables of named checks.

The first check that finds fault gives the answer. Where implementations differ, the code is that of Hafnium and of
Arm's conformance suite; the order is Xen's (``xen/arch/arm/tee/ffa_shm.c``), with what Xen does not check added behind
what it belongs to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ffa.abi import transactions as abi
from ffa.abi.ids import (
    ATTRIBUTE_NS,
    ATTRIBUTES_CACHE_MASK,
    ATTRIBUTES_DEVICE,
    ATTRIBUTES_NORMAL,
    ATTRIBUTES_TYPE_MASK,
    FLAG_BYPASS_BORROWERS,
    FLAG_CLEAR,
    FLAG_CLEAR_ON_RELINQUISH,
    FLAG_HINT_MASK,
    FLAG_HINT_VALID,
    FLAG_TIME_SLICE,
    FLAG_TYPE_MASK,
    FLAG_TYPE_SHIFT,
    TRANSACTION_TYPES,
    Call,
    Data,
    Error,
    FfaError,
    Instruction,
    is_secure,
)
from ffa.roles.machine import exclusive
from ffa.roles.machines import Borrower

if TYPE_CHECKING:
    from ffa.roles.transactions import Region, Transactions

C = TypeVar("C")


@dataclass(frozen=True, slots=True)
class Check(Generic[C]):
    """One line of a decision table."""

    name: str  #: what is wrong when it finds fault
    code: Error
    fault: Callable[[C], bool]  #: may also raise FfaError, with a code of its own


def run(checks: Sequence[Check[C]], context: C) -> None:
    """Raises FfaError for the first check that finds fault."""
    for check in checks:
        if check.fault(context):
            raise FfaError(check.code, check.name)


# -- sending: FFA_MEM_SHARE, FFA_MEM_LEND, FFA_MEM_DONATE


@dataclass(slots=True)
class Sending:
    """A transaction descriptor that is being looked at."""

    transactions: Transactions
    call: Call
    caller: int  #: who must be the sender; the hypervisor speaks for all VMs
    version: int
    total: int  #: bytes of the whole descriptor
    buf: bytes  #: its first fragment
    own: bool  #: this manager keeps the sender's pages, and so checks them
    _descriptor: abi.Transaction | None = None
    _composite: abi.Composite | None = None

    @property
    def descriptor(self) -> abi.Transaction:
        """The descriptor without its ranges. Raises FfaError."""
        if self._descriptor is None:
            self._descriptor = abi.parse(self.buf, self.version)
        return self._descriptor

    @property
    def composite(self) -> abi.Composite:
        """What stands before the ranges, where the first receiver says. Raises FfaError."""
        if self._composite is None:
            receivers = self.descriptor.receivers
            self._composite = abi.parse_composite(self.buf, receivers[0].composite if receivers else 0)
        return self._composite

    @property
    def shared_attributes(self) -> bool:
        """Whether the sender names the memory's attributes, rather than the one receiver."""
        return self.call is Call.MEM_SHARE or (self.call is Call.MEM_LEND and len(self.descriptor.receivers) > 1)


def _attributes_denied(attributes: int) -> bool:
    """As in Hafnium: normal, write-back, inner shareable memory; of device types the strictest, nGnRnE, alone."""
    if attributes & ATTRIBUTES_TYPE_MASK == ATTRIBUTES_DEVICE:
        return attributes & ATTRIBUTES_CACHE_MASK != 0
    return attributes & 0x3F != ATTRIBUTES_NORMAL


def _sender(s: Sending) -> bool:
    return not s.transactions.speaks_for(s.caller, s.descriptor.sender)


def _receivers(s: Sending) -> bool:
    ids = [r.endpoint for r in s.descriptor.receivers]
    known = all(s.transactions.may_receive(s.descriptor.sender, r) for r in ids)
    return not known or len(set(ids)) < len(ids) or s.descriptor.sender in ids


def _permissions(s: Sending) -> bool:
    return any(not _may_send(s.call, r) for r in s.descriptor.receivers)


def _may_send(call: Call, receiver: abi.Receiver) -> bool:
    if receiver.flags or receiver.permissions >> 2 != Instruction.NOT_SPECIFIED:
        return False
    data = receiver.permissions & 3
    return data == Data.NOT_SPECIFIED if call is Call.MEM_DONATE else data in (Data.RO, Data.RW)


def _composite(s: Sending) -> bool:
    offsets = {r.composite for r in s.descriptor.receivers}
    offset = next(iter(offsets), 0)
    return len(offsets) != 1 or offset < s.descriptor.end or offset % 16 != 0 or s.composite is None


def _length(s: Sending) -> bool:
    return s.total != s.composite.ranges + abi.RANGE_SIZE * s.composite.count


def _cut(s: Sending) -> bool:
    return (len(s.buf) - s.composite.ranges) % abi.RANGE_SIZE != 0


_INVALID, _DENIED = Error.INVALID_PARAMETERS, Error.DENIED

SEND: tuple[Check[Sending], ...] = (
    Check("the descriptor does not fit or has reserved fields set", _INVALID, lambda s: s.descriptor is None),
    Check("the NS attribute is set", _INVALID, lambda s: bool(s.descriptor.attributes & ATTRIBUTE_NS)),
    Check("reserved attributes are set", _INVALID, lambda s: s.descriptor.attributes > 0x7F),
    Check(
        "attributes are named that the receiver is to name",
        _INVALID,
        lambda s: not s.shared_attributes and s.descriptor.attributes != 0,
    ),
    Check(
        "attributes other than normal, write-back, inner shareable memory, or device-nGnRnE",
        _DENIED,
        lambda s: s.shared_attributes and _attributes_denied(s.descriptor.attributes),
    ),
    Check("no receiver", _INVALID, lambda s: not s.descriptor.receivers),
    Check(
        "more than one receiver of a donation",
        _INVALID,
        lambda s: s.call is Call.MEM_DONATE and len(s.descriptor.receivers) > 1,
    ),
    Check(
        "more receivers than are supported",
        Error.NOT_SUPPORTED,
        lambda s: len(s.descriptor.receivers) > s.transactions.profile.max_borrowers,
    ),
    Check("the sender is not the caller", _DENIED, _sender),
    Check("a receiver is unknown, named twice, or the sender", _INVALID, _receivers),
    Check("a handle is given", _INVALID, lambda s: s.descriptor.handle != 0),
    Check(
        "shared memory is to be cleared",
        _INVALID,
        lambda s: s.call is Call.MEM_SHARE and bool(s.descriptor.flags & FLAG_CLEAR),
    ),
    Check(
        "flags that a sender must not set",
        _INVALID,
        lambda s: bool(s.descriptor.flags & ~(FLAG_CLEAR | FLAG_TIME_SLICE)),
    ),
    Check("permissions that this transaction cannot give", _INVALID, _permissions),
    Check("the composite descriptor does not fit, or receivers name different ones", _INVALID, _composite),
    Check("no pages, or no ranges", _INVALID, lambda s: not s.composite.pages or not s.composite.count),
    Check(
        "over quota",
        Error.NO_MEMORY,
        lambda s: (
            s.composite.pages > s.transactions.profile.max_pages
            or s.transactions.count(s.descriptor.sender) >= s.transactions.profile.max_regions
        ),
    ),
    Check("more pages than ranges can hold, or fewer", _INVALID, lambda s: s.composite.pages < s.composite.count),
    Check("the total length is not that of the ranges", _INVALID, _length),
    Check("a fragment ends within a range", _INVALID, _cut),
)
"""The descriptor itself, when its first fragment is there."""


@dataclass(slots=True)
class Ranges:
    """The address ranges of a descriptor, all there."""

    transactions: Transactions
    region: Region
    data: bytes
    own: bool
    _ranges: list[abi.AddressRange] | None = None
    _pages: list[int] | None = None

    @property
    def ranges(self) -> list[abi.AddressRange]:
        """The ranges. Raises FfaError."""
        if self._ranges is None:
            self._ranges = abi.parse_ranges(self.data)
        return self._ranges

    @property
    def pages(self) -> list[int]:
        """All page numbers: bounded, since all of them exist, and their number is under quota."""
        if self._pages is None:
            self._pages = abi.page_numbers(self.ranges)
        return self._pages


def _missing(r: Ranges) -> bool:
    return None in r.transactions.machine.regions_of(r.ranges)


def _overlap(r: Ranges) -> bool:
    return r.transactions.profile.owner_checks and len(set(r.pages)) < len(r.pages)


def _world(r: Ranges) -> bool:
    sender = r.region.descriptor.sender
    secure = any(g.secure for g in r.transactions.machine.regions_of(r.ranges) if g is not None)
    return secure and (not is_secure(sender) or any(not is_secure(b) for b in r.region.borrowers))


def _not_owned(r: Ranges) -> bool:
    states = r.transactions.machine.states_of(r.pages)
    return states != {exclusive(r.region.descriptor.sender)}


def _clears_read_only(r: Ranges) -> bool:
    descriptor = r.region.descriptor
    return bool(descriptor.flags & FLAG_CLEAR) and r.transactions.cannot_write(descriptor.sender, r.pages)


RANGES: tuple[Check[Ranges], ...] = (
    Check("a range is cut, unaligned, empty or beyond the address space", _INVALID, lambda r: r.ranges is None),
    Check("the ranges' pages are not the total", _INVALID, lambda r: r.region.total != sum(n for _, n in r.ranges)),
    Check("a range without memory", _DENIED, _missing),
    Check("a page named twice", _INVALID, _overlap),
    Check(
        "device memory",
        _DENIED,
        lambda r: any(g is not None and g.device for g in r.transactions.machine.regions_of(r.ranges)),
    ),
    Check("secure memory of, or for, the normal world", _DENIED, _world),
    Check("a page that is a buffer", _DENIED, lambda r: not r.transactions.reserved.isdisjoint(r.pages)),
    Check("a page that is not the sender's alone", _DENIED, lambda r: r.own and _not_owned(r)),
    Check("memory is to be cleared that its owner cannot write", _DENIED, _clears_read_only),
)
"""The ranges and their pages, when all fragments are there."""


# -- retrieving: FFA_MEM_RETRIEVE_REQ


@dataclass(slots=True)
class Retrieving:
    """A retrieve request that is being looked at."""

    transactions: Transactions
    caller: int
    request: abi.Transaction
    region: Region

    @property
    def bypass(self) -> bool:
        """Whether the caller names itself alone, of several borrowers."""
        return bool(self.request.flags & FLAG_BYPASS_BORROWERS)

    def mine(self) -> abi.Receiver:
        """The caller's entry in the request. Raises FfaError: it has none."""
        for receiver in self.request.receivers:
            if receiver.endpoint == self.caller:
                return receiver
        raise FfaError(Error.INVALID_PARAMETERS, "the request does not name the caller")


def _type(r: Retrieving) -> bool:
    wanted = r.request.flags & FLAG_TYPE_MASK
    return wanted != 0 and wanted >> FLAG_TYPE_SHIFT != TRANSACTION_TYPES[r.region.call]


def _attributes(r: Retrieving) -> bool:
    """Device memory is less permissive than normal memory, so it is never retrieved as that."""
    asked, sent = r.request.attributes, r.region.descriptor.attributes
    if asked & ATTRIBUTES_TYPE_MASK == 0:
        return False
    device = sent & ATTRIBUTES_TYPE_MASK == ATTRIBUTES_DEVICE
    return _attributes_denied(asked) or (device and asked & ATTRIBUTES_TYPE_MASK != ATTRIBUTES_DEVICE)


def _borrower_list(r: Retrieving) -> bool:
    wanted = 1 if r.bypass else len(r.region.borrowers)
    if len(r.request.receivers) != wanted or len({x.endpoint for x in r.request.receivers}) != wanted:
        return True
    return r.bypass and len(r.region.borrowers) == 1


def _data(r: Retrieving) -> bool:
    for asked in r.request.receivers:
        given = r.region.borrowers[asked.endpoint].receiver.permissions & 3
        wanted = asked.permissions & 3
        if wanted == Data.RESERVED or (given == Data.RO and wanted == Data.RW):
            return True
    return False


def _instruction(r: Retrieving) -> bool:
    named = r.region.call is Call.MEM_DONATE or (r.region.call is Call.MEM_LEND and len(r.region.borrowers) == 1)
    for asked in r.request.receivers:
        wanted = asked.permissions >> 2
        if wanted >= Instruction.RESERVED or (wanted != Instruction.NOT_SPECIFIED) != named:
            return True
    return False


def _device_executed(r: Retrieving) -> bool:
    device = (r.request.attributes or r.region.descriptor.attributes) & ATTRIBUTES_TYPE_MASK == ATTRIBUTES_DEVICE
    return device and any(asked.permissions >> 2 == Instruction.X for asked in r.request.receivers)


def _clears(r: Retrieving) -> bool:
    return bool(r.request.flags & (FLAG_CLEAR | FLAG_CLEAR_ON_RELINQUISH))


def _read_only(r: Retrieving) -> bool:
    given, wanted = r.region.borrowers[r.caller].receiver.permissions & 3, r.mine().permissions & 3
    owner = r.region.descriptor.sender
    return given == Data.RO or wanted == Data.RO or r.transactions.cannot_write(owner, r.region.pages)


def _impdef(r: Retrieving) -> bool:
    if r.request.entry_size < 32 or r.region.descriptor.entry_size < 32:
        return False
    return any(x.impdef != r.region.borrowers[x.endpoint].receiver.impdef for x in r.request.receivers)


_ALLOWED = (
    *(FLAG_CLEAR, FLAG_TIME_SLICE, FLAG_CLEAR_ON_RELINQUISH, FLAG_TYPE_MASK),
    *(FLAG_HINT_MASK, FLAG_HINT_VALID, FLAG_BYPASS_BORROWERS),
)
_RETRIEVE_FLAGS = sum(_ALLOWED)

RETRIEVE: tuple[Check[Retrieving], ...] = (
    Check("the sender is another", _DENIED, lambda r: r.request.sender != r.region.descriptor.sender),
    Check("another type of transaction", _INVALID, _type),
    Check("another tag", _INVALID, lambda r: r.request.tag != r.region.descriptor.tag),
    Check("the caller is no receiver", _INVALID, lambda r: r.caller not in r.region.borrowers),
    Check(
        "an alignment hint",
        _INVALID,
        lambda r: bool(r.request.flags & (FLAG_HINT_VALID | FLAG_HINT_MASK)),
    ),
    Check("reserved flags are set", _INVALID, lambda r: bool(r.request.flags & ~_RETRIEVE_FLAGS)),
    Check("shared memory is to be cleared", _INVALID, lambda r: r.region.call is Call.MEM_SHARE and _clears(r)),
    Check(
        "memory is to have been cleared that was not",
        _DENIED,
        lambda r: bool(r.request.flags & FLAG_CLEAR) and not r.region.descriptor.flags & FLAG_CLEAR,
    ),
    Check("the NS attribute is set", _INVALID, lambda r: bool(r.request.attributes & ATTRIBUTE_NS)),
    Check("reserved attributes are set", _INVALID, lambda r: r.request.attributes > 0x7F),
    Check("attributes that are more permissive than the sender's, or not supported", _DENIED, _attributes),
    Check("a list of borrowers that is not the sender's", _INVALID, _borrower_list),
    Check(
        "address ranges, which the manager chooses", _INVALID, lambda r: any(x.composite for x in r.request.receivers)
    ),
    Check(
        "a borrower whom the sender did not name",
        _DENIED,
        lambda r: any(x.endpoint not in r.region.borrowers for x in r.request.receivers),
    ),
    Check("the request does not name the caller", _INVALID, lambda r: r.mine() is None),
    Check("more data access than was given", _DENIED, _data),
    Check("device memory is to be executed", _DENIED, _device_executed),
    Check("instruction access that is not the receiver's to name, or is missing", _INVALID, _instruction),
    Check("read-only memory is to be cleared", _DENIED, lambda r: _clears(r) and _read_only(r)),
    Check("other implementation-defined words", _INVALID, _impdef),
    Check(
        "retrieved already",
        _DENIED,
        lambda r: r.region.borrowers[r.caller].state is not Borrower.INVITED,
    ),
)
"""A retrieve request, when its handle is that of a region that has been sent whole."""


# -- relinquishing: FFA_MEM_RELINQUISH


@dataclass(slots=True)
class Relinquishing:
    """A relinquish descriptor that is being looked at."""

    caller: int
    request: abi.Relinquish
    region: Region


RELINQUISH: tuple[Check[Relinquishing], ...] = (
    Check("other than one endpoint, the caller", _INVALID, lambda r: r.request.endpoints != (r.caller,)),
    Check("reserved flags are set", _INVALID, lambda r: bool(r.request.flags & ~(FLAG_CLEAR | FLAG_TIME_SLICE))),
    Check("the caller is no borrower", _INVALID, lambda r: r.caller not in r.region.borrowers),
    Check(
        "not retrieved, or not to the end",
        _INVALID,
        lambda r: r.region.borrowers[r.caller].state is not Borrower.HOLDING,
    ),
    Check(
        "shared memory is to be cleared",
        _INVALID,
        lambda r: r.region.call is Call.MEM_SHARE and bool(r.request.flags & FLAG_CLEAR),
    ),
    Check(
        "read-only memory is to be cleared",
        _DENIED,
        lambda r: bool(r.request.flags & FLAG_CLEAR) and not r.region.borrowers[r.caller].writable,
    ),
)
"""A relinquish descriptor whose handle is that of a region."""


# -- reclaiming: FFA_MEM_RECLAIM


@dataclass(slots=True)
class Reclaiming:
    """A reclaim that is being looked at."""

    transactions: Transactions
    caller: int
    flags: int
    region: Region


def _reclaims_read_only(r: Reclaiming) -> bool:
    return bool(r.flags & FLAG_CLEAR) and r.transactions.cannot_write(r.region.descriptor.sender, r.region.pages)


RECLAIM: tuple[Check[Reclaiming], ...] = (
    Check(
        "the caller is not the sender",
        _INVALID,
        lambda r: not r.transactions.speaks_for(r.caller, r.region.descriptor.sender),
    ),
    Check("reserved flags are set", _INVALID, lambda r: bool(r.flags & ~(FLAG_CLEAR | FLAG_TIME_SLICE))),
    Check("not sent to the end", _INVALID, lambda r: not r.region.complete),
    Check("memory is to be cleared that its owner cannot write", _DENIED, _reclaims_read_only),
    Check(
        "a borrower has it",
        _DENIED,
        lambda r: any(b.state is not Borrower.INVITED for b in r.region.borrowers.values()),
    ),
)
"""A reclaim whose handle is that of a region."""
