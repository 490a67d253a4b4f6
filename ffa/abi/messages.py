"""Indirect messages, partition information, and the lists of FFA_NOTIFICATION_INFO_GET."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from ffa.abi import layouts
from ffa.abi.frame import MASK32, Frame
from ffa.abi.ids import PROPERTIES_OF, VERSION_1_1, VERSION_1_2, Call, Error, FfaError, fid
from pyvhost.errors import FormatError

NIL = UUID(int=0)


@dataclass(frozen=True, slots=True)
class Message:
    """An indirect message (FFA_MSG_SEND2)."""

    sender: int
    receiver: int
    payload: bytes
    uuid: UUID = NIL  #: service that is meant; nil before 1.2


def header_size(version: int) -> int:
    """Bytes of the message header that a partition of ``version`` writes and reads."""
    return layouts.message_12.size if version >= VERSION_1_2 else layouts.message_11.size


def parse_message(buf: bytes | memoryview, version: int) -> Message:
    """The message at the start of a TX or RX buffer.

    :raises FfaError: INVALID_PARAMETERS: it does not fit, or a field that must be zero is not
    """
    codec = layouts.message_12 if version >= VERSION_1_2 else layouts.message_11
    try:
        head = codec.unpack(buf)
    except FormatError as e:
        raise FfaError(Error.INVALID_PARAMETERS, str(e)) from None
    if head.flags or head.offset < codec.size or head.offset + head.size > len(buf):
        raise FfaError(Error.INVALID_PARAMETERS, "the message does not fit its buffer")
    uuid = UUID(bytes=head.uuid) if version >= VERSION_1_2 else NIL
    return Message(head.sender, head.receiver, bytes(buf[head.offset : head.offset + head.size]), uuid)


def build_message(message: Message, version: int) -> bytes:
    """Header and payload as a partition of ``version`` reads them."""
    size = header_size(version)
    fields = (0, size, message.receiver, message.sender, len(message.payload))
    if version >= VERSION_1_2:
        return layouts.message_12.pack(*fields, message.uuid.bytes) + message.payload
    return layouts.message_11.pack(*fields) + message.payload


@dataclass(frozen=True, slots=True)
class PartitionInfo:
    """What a partition manager says of a partition."""

    id: int
    contexts: int
    properties: int
    uuid: UUID = NIL


def info_size(version: int) -> int:
    """Bytes of one entry of partition information for a caller of ``version``."""
    return layouts.partition_11.size if version >= VERSION_1_1 else layouts.partition_10.size


def build_infos(infos: Sequence[PartitionInfo], version: int, with_uuid: bool) -> bytes:
    """The entries as FFA_PARTITION_INFO_GET puts them into RX. UUIDs are told only to who asked for all partitions."""
    mask = PROPERTIES_OF[version]
    if version < VERSION_1_1:
        return b"".join(layouts.partition_10.pack(i.id, i.contexts, i.properties & mask) for i in infos)
    return b"".join(
        layouts.partition_11.pack(i.id, i.contexts, i.properties & mask, i.uuid.bytes if with_uuid else bytes(16))
        for i in infos
    )


def parse_infos(buf: bytes | memoryview, count: int, version: int) -> list[PartitionInfo]:
    """``count`` (>= 0) entries from the start of RX. :raises FfaError: INVALID_PARAMETERS: they do not fit"""
    size = info_size(version)
    if count * size > len(buf):
        raise FfaError(Error.INVALID_PARAMETERS, "the entries do not fit")
    if version < VERSION_1_1:
        return [PartitionInfo(*layouts.partition_10.unpack(buf, n * size)) for n in range(count)]
    found = [layouts.partition_11.unpack(buf, n * size) for n in range(count)]
    return [PartitionInfo(i.id, i.contexts, i.properties, UUID(bytes=i.uuid)) for i in found]


def uuid_from_words(words: Sequence[int]) -> UUID:
    """The UUID that four 32-bit register values hold: its bytes in order, the first in bits 7:0 of the first."""
    return UUID(bytes=struct.pack("<4I", *(w & MASK32 for w in words)))


def uuid_to_words(uuid: UUID) -> tuple[int, int, int, int]:
    """The four 32-bit register values of a UUID."""
    a, b, c, d = struct.unpack("<4I", uuid.bytes)
    return a, b, c, d


def uuid_from_halves(low: int, high: int) -> UUID:
    """The UUID that two 64-bit register values hold."""
    return UUID(bytes=struct.pack("<2Q", low, high))


def uuid_to_halves(uuid: UUID) -> tuple[int, int]:
    """The two 64-bit register values of a UUID."""
    low, high = struct.unpack("<2Q", uuid.bytes)
    return low, high


INFOS_IN_REGISTERS = 5
"""Entries that fit x3 to x17 of an answer to FFA_PARTITION_INFO_GET_REGS."""


def infos_in_registers(infos: Sequence[PartitionInfo], first: int, with_uuid: bool) -> Frame:
    """The answer to FFA_PARTITION_INFO_GET_REGS: entries from index ``first`` on (valid, as the caller checked).

    x2: last index overall in bits 15:0, last index here in 31:16, tag (0) in 47:32, bytes of an entry in 63:48.
    """
    shown = infos[first : first + INFOS_IN_REGISTERS]
    words = [24 << 48 | (first + len(shown) - 1) << 16 | (len(infos) - 1)]
    for info in shown:
        words.append(info.properties << 32 | info.contexts << 16 | info.id)
        words.extend(uuid_to_halves(info.uuid) if with_uuid else (0, 0))
    return Frame(fid(Call.SUCCESS, True), 0, *words)


def infos_from_registers(answer: Frame, first: int) -> tuple[list[PartitionInfo], int]:
    """Entries of the answer to a call that asked for those from index ``first`` on, and the last index overall."""
    current, last = answer[2] >> 16 & 0xFFFF, answer[2] & 0xFFFF
    found = []
    for x in range(3, 3 + 3 * min(max(current - first + 1, 0), INFOS_IN_REGISTERS), 3):
        head = answer[x]
        uuid = uuid_from_halves(answer[x + 1], answer[x + 2])
        found.append(PartitionInfo(head & 0xFFFF, head >> 16 & 0xFFFF, head >> 32, uuid))
    return found, last


# -- FFA_NOTIFICATION_INFO_GET

PendingList = tuple[int, tuple[int, ...]]
"""An endpoint with pending notifications, and its vCPUs that have some of their own (none: global ones alone)."""

LIST_IDS = 4
"""Ids of one list: the endpoint and up to three of its vCPUs."""
_LISTS = {False: 10, True: 20}  # ids that x3 to x7 hold, by calling convention


def build_pending(lists: Sequence[PendingList], smc64: bool) -> tuple[Frame, int]:
    """The answer to FFA_NOTIFICATION_INFO_GET, and how many of ``lists`` are in it (the rest: "more pending").

    Each list has at most three vCPUs. w2: bit 0 more pending, bits 11:7 number of lists, from bit 12 on two bits for
    each list: its ids less one.
    """
    ids: list[int] = []
    sizes = shown = 0
    for endpoint, vcpus in lists:
        if len(ids) + 1 + len(vcpus) > _LISTS[smc64]:
            break
        sizes |= len(vcpus) << (2 * shown)
        ids += (endpoint, *vcpus)
        shown += 1
    more = int(shown < len(lists))
    width = 4 if smc64 else 2
    registers = [
        sum(value << (16 * n) for n, value in enumerate(ids[at : at + width])) for at in range(0, len(ids), width)
    ]
    return Frame(fid(Call.SUCCESS, smc64), 0, more | shown << 7 | sizes << 12, *registers), shown


def parse_pending(answer: Frame) -> tuple[list[PendingList], bool]:
    """The lists of such an answer, and whether more are pending.

    :raises FfaError: INVALID_PARAMETERS: it says more ids than there are registers
    """
    smc64 = answer.fid == fid(Call.SUCCESS, True)
    width = 4 if smc64 else 2
    count, sizes = answer[2] >> 7 & 0x1F, answer[2] >> 12
    ids = [value >> (16 * n) & 0xFFFF for value in answer[3:8] for n in range(width)]
    out: list[PendingList] = []
    at = 0
    for n in range(count):
        size = 1 + (sizes >> (2 * n) & 3)
        if at + size > _LISTS[smc64]:
            raise FfaError(Error.INVALID_PARAMETERS, "more ids than registers")
        out.append((ids[at], tuple(ids[at + 1 : at + size])))
        at += size
    return out, bool(answer[2] & 1)
