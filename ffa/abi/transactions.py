"""Memory transaction descriptors, composite ranges and the relinquish descriptor, of all versions.

Parsing reads a private copy of the buffer and nothing beyond it; its cost is linear in the bytes given.
"""

from __future__ import annotations

import itertools
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ffa.abi import layouts
from ffa.abi.ids import PAGE_SIZE, VERSION_1_0, VERSION_1_1, VERSION_1_2, Error, FfaError
from pyvhost.errors import FormatError

RANGE_SIZE = layouts.address_range.size
HEADER_SIZE = {VERSION_1_0: 32, VERSION_1_1: 48, VERSION_1_2: 48}
ENTRY_SIZES = {VERSION_1_0: (16,), VERSION_1_1: (16,), VERSION_1_2: (32, 16)}
"""Version → sizes of a receiver's entry that a caller of that version may use; the first is its own."""

AddressRange = tuple[int, int]
"""Address of the first byte, number of pages."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """One borrower (or new owner) in a descriptor."""

    endpoint: int
    permissions: int = 0
    flags: int = 0
    impdef: tuple[int, int] = (0, 0)  #: zero before 1.2
    composite: int = 0  #: offset of the ranges; filled in by build()


@dataclass(frozen=True, slots=True)
class Transaction:
    """A descriptor without its ranges."""

    sender: int
    receivers: tuple[Receiver, ...]
    attributes: int = 0
    flags: int = 0
    handle: int = 0
    tag: int = 0
    entry_size: int = 0  #: bytes; as found by parse(), ignored by build()
    end: int = 0  #: offset of the first byte after the receivers; as found by parse()


@dataclass(frozen=True, slots=True)
class Composite:
    """What stands before the ranges."""

    pages: int
    count: int
    ranges: int  #: offset of the first range in the descriptor


def _invalid(why: str) -> FfaError:
    return FfaError(Error.INVALID_PARAMETERS, why)


def parse(buf: bytes | memoryview, version: int) -> Transaction:
    """The descriptor at the start of ``buf``, in the layout of a caller of ``version``.

    :raises FfaError: INVALID_PARAMETERS: it does not fit in ``buf``, a reserved field is set, sizes or offsets that the
        version does not have
    """
    try:
        if version < VERSION_1_1:
            fixed = layouts.transaction_10.unpack(buf)
            size, offset = 16, 32
        else:
            fixed = layouts.transaction_11.unpack(buf)
            size, offset = fixed.entry_size, fixed.entry_offset
            if size not in ENTRY_SIZES[version]:
                raise _invalid(f"a receiver's entry of {size} bytes")
            if offset < 48 or offset % 16:
                raise _invalid(f"receivers at offset {offset}")
        end = offset + size * fixed.count
        if end > len(buf):
            raise _invalid(f"{fixed.count} receivers do not fit")
        codec = layouts.access_12 if size == 32 else layouts.access_10
        entries = [codec.unpack(buf, at) for at in range(offset, end, size)]
    except FormatError as e:
        raise _invalid(str(e)) from None
    receivers = tuple(
        Receiver(e.endpoint, e.permissions, e.flags, e.impdef if size == 32 else (0, 0), e.composite) for e in entries
    )
    return Transaction(
        fixed.sender, receivers, fixed.attributes, fixed.flags, fixed.handle, fixed.tag, entry_size=size, end=end
    )


def parse_composite(buf: bytes | memoryview, offset: int) -> Composite:
    """What stands before the ranges, at ``offset`` (>= 0) of the descriptor. :raises FfaError: as parse()"""
    try:
        found = layouts.composite.unpack(buf, offset)
    except FormatError as e:
        raise _invalid(str(e)) from None
    return Composite(found.pages, found.count, offset + layouts.composite.size)


def parse_ranges(buf: bytes | memoryview) -> list[AddressRange]:
    """All ranges in ``buf``, which holds nothing else.

    :raises FfaError: INVALID_PARAMETERS: a part of a range at the end, a reserved field set, an address that is not
        page-aligned or a range without pages, or one beyond 64 bits
    """
    if len(buf) % RANGE_SIZE:
        raise _invalid("a range is cut")
    words = struct.unpack(f"<{len(buf) // 8}Q", buf)
    addresses, counts = words[::2], words[1::2]
    if counts and not 0 < min(counts) <= max(counts) < 1 << 32:
        raise _invalid("a range without pages, or with a reserved field set")
    if any(address % PAGE_SIZE for address in addresses):
        raise _invalid("a range that is not page-aligned")
    if any(map((1 << 64).__lt__, map(_end, addresses, counts))):
        raise _invalid("a range beyond the address space")
    return list(zip(addresses, counts, strict=True))


def _end(address: int, pages: int) -> int:
    return address + pages * PAGE_SIZE


def page_numbers(ranges: Iterable[AddressRange]) -> list[int]:
    """The page numbers (address / 4096) of ``ranges``, in order. The caller has bounded their number."""
    spans = (range(address // PAGE_SIZE, address // PAGE_SIZE + count) for address, count in ranges)
    return list(itertools.chain.from_iterable(spans))


def ranges_of(pages: Iterable[int]) -> list[AddressRange]:
    """Page numbers as ranges: neighbours in the given order are joined."""
    out: list[AddressRange] = []
    start = count = 0
    for page in pages:
        if count and page == start + count:
            count += 1
            continue
        if count:
            out.append((start * PAGE_SIZE, count))
        start, count = page, 1
    if count:
        out.append((start * PAGE_SIZE, count))
    return out


def pack_ranges(ranges: Sequence[AddressRange]) -> bytes:
    """``ranges`` as they stand in a descriptor."""
    return struct.pack(f"<{2 * len(ranges)}Q", *itertools.chain.from_iterable(ranges))


def build(version: int, transaction: Transaction, ranges: Sequence[AddressRange] | None = None) -> bytes:
    """The descriptor's bytes in the layout of ``version``; without ``ranges``, as in a retrieve request."""
    size = ENTRY_SIZES[version][0]
    header = HEADER_SIZE[version]
    end = header + size * len(transaction.receivers)
    t = transaction
    if version < VERSION_1_1:
        fixed = layouts.transaction_10.pack(t.sender, t.attributes, t.flags, t.handle, t.tag, len(t.receivers))
    else:
        fixed = layouts.transaction_11.pack(
            t.sender, t.attributes, t.flags, t.handle, t.tag, size, len(t.receivers), header
        )
    where = 0 if ranges is None else end
    entries = b"".join(
        layouts.access_12.pack(r.endpoint, r.permissions, r.flags, where, r.impdef)
        if size == 32
        else layouts.access_10.pack(r.endpoint, r.permissions, r.flags, where)
        for r in t.receivers
    )
    if ranges is None:
        return fixed + entries
    pages = sum(count for _, count in ranges)
    return fixed + entries + layouts.composite.pack(pages, len(ranges)) + pack_ranges(ranges)


@dataclass(frozen=True, slots=True)
class Relinquish:
    """What FFA_MEM_RELINQUISH takes from the TX buffer."""

    handle: int
    flags: int
    endpoints: tuple[int, ...]


def parse_relinquish(buf: bytes | memoryview) -> Relinquish:
    """The descriptor at the start of ``buf``. :raises FfaError: INVALID_PARAMETERS: it does not fit"""
    try:
        fixed = layouts.relinquish.unpack(buf)
    except FormatError as e:
        raise _invalid(str(e)) from None
    if 16 + 2 * fixed.count > len(buf):
        raise _invalid(f"{fixed.count} endpoints do not fit")
    return Relinquish(fixed.handle, fixed.flags, struct.unpack_from(f"<{fixed.count}H", buf, 16))


def build_relinquish(handle: int, *endpoints: int, flags: int = 0) -> bytes:
    """The relinquish descriptor's bytes."""
    return layouts.relinquish.pack(handle, flags, len(endpoints)) + struct.pack(f"<{len(endpoints)}H", *endpoints)
