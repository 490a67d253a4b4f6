"""Hafnium's memory-sharing tests (``test/vmapi/primary_with_secondaries/memory_sharing.c``), each under its own name.

Hafnium runs each between its primary VM and two services; here a pair is a VM and a partition, two VMs, two partitions.
"""

from __future__ import annotations

import struct
from functools import partial

from ffa.abi import messages
from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.abi.ids import (
    ATTRIBUTES_NORMAL,
    FLAG_BYPASS_BORROWERS,
    FLAG_CLEAR,
    FLAG_CLEAR_ON_RELINQUISH,
    FLAG_TYPE_SHIFT,
    PAGE_SIZE,
    TRANSACTION_TYPES,
    Call,
    Data,
    Error,
    Instruction,
    is_secure,
)
from ffa.abi.transactions import AddressRange
from ffa.conformance.bench import DEVICE, EL0, SPS
from ffa.conformance.memory_retrieve import bypass, read_only_page
from ffa.conformance.memory_send import DENIED, DONATE, ENTRY, HEADER, INVALID, LEND, RANGES, SENDS, SHARE
from ffa.conformance.memory_states import relinquish_state_machine_3, relinquish_state_machine_4, third
from ffa.conformance.registry import HAFNIUM, case, register
from ffa.conformance.run import NONE, PAIRS, RETRIEVED, RW, Run, Sent

NX, X = Instruction.NX << 2, Instruction.X << 2
DEVICE_TYPE = 0x13
"""Device memory, nGnRnE, inner shareable: the one device type that Hafnium maps."""
MMIO = "MMIO: a device's registers, which no model of calls has"


def _apart(t: Run, sender: int) -> list[AddressRange]:
    """Two pages and, one page further on, a third: what Hafnium sends."""
    first = t.fresh(sender, 4)[0][0]
    return [(first, 2), (first + 3 * PAGE_SIZE, 1)]


def _sent(t: Run, call: Call, sender: int, *receivers: int, ranges: list[AddressRange], **changes: object) -> Sent:
    transaction = t.transaction(call, sender, *receivers, **changes)
    return t.begun(t.send(call, transaction, ranges), call, transaction, ranges)


def _fill(t: Run, by: int, sent: Sent, byte: bytes) -> None:
    for page in sent.pages:
        t.machine.write(by, page, byte * 64)


def _count_up(t: Run, by: int, sent: Sent) -> None:
    """A service's work: it adds one to each byte."""
    for page in sent.pages:
        old = t.machine.read(by, page, 64)
        t.machine.write(by, page, bytes(value + 1 & 0xFF for value in old))


def _holds(t: Run, by: int, sent: Sent, byte: bytes, what: str) -> None:
    found = {t.machine.read(by, page, 64) for page in sent.pages}
    t.equal(found, {byte * 64}, what)


def _cannot_send(t: Run, sender: int, ranges: list[AddressRange], *calls: Call) -> None:
    """Whatever is asked for, and for whom, these pages are not sent: INVALID_PARAMETERS or DENIED."""
    for call in calls:
        named = ATTRIBUTES_NORMAL if call is SHARE else 0
        forms = [(p, named) for p in (*range(4), *(d | i << 2 for d in (1, 2) for i in (1, 2, 3)))]
        forms += [(0 if call is DONATE else 2, a) for a in (0x10, 0x13, 0x1F, 0x23, 0x27, 0x2C, 0x2E, 0x2F)]
        for to in {sender, third(sender), *(r for s, r in PAIRS if s == sender)}:
            for permissions, attributes in forms:
                wrong = t.transaction(call, sender, to, permissions=permissions, attributes=attributes)
                answer = t.send(call, wrong, ranges)
                if answer.error not in (INVALID, DENIED):
                    what = f"FFA_{call.name} to {to:#x}, permissions {permissions}, attributes {attributes:#x}"
                    t.fails(answer, DENIED, what, INVALID)
        t.true(True, f"FFA_{call.name} is refused in every form")


def _cannot_relinquish(t: Run, handle: int, *parties: int) -> None:
    for by in parties:
        t.fails(t.relinquish(by, handle), INVALID, f"{by:#x} relinquishes what it does not have")


# -- basic


def _reclaimed(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        ranges = _apart(t, sender)
        for address, _ in ranges:
            t.machine.write(sender, address, b"kept")
        sent = _sent(t, call, sender, receiver, ranges=ranges)
        t.ok(t.reclaim(sent), "reclaims what nobody has retrieved")
        t.alone(sent, sender)
        t.equal({t.machine.read(sender, a, 4) for a, _ in ranges}, {b"kept"}, "its bytes are as they were")
        t.fails(t.retrieve(t.request(sent, receiver), receiver), INVALID, "retrieved when it is reclaimed")


for _name, _call in SENDS.items():
    register(HAFNIUM, f"{_name}_reclaim", partial(_reclaimed, call=_call))


@case(HAFNIUM)
def share_retrieve_memory_type_not_specified(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(SHARE, sender, receiver)
        _fill(t, sender, sent, b"a")
        found = t.retrieved(sent, receiver, attributes=0)
        t.equal(found.attributes & 0x3F, ATTRIBUTES_NORMAL, "who names no type is told that of the sender")
        _count_up(t, receiver, sent)
        _holds(t, sender, sent, b"b", "the sender sees what the receiver wrote")
        t.end(sent, receiver)


@case(HAFNIUM)
def concurrent(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(SHARE, sender, receiver)
        _fill(t, sender, sent, b"a")
        t.retrieved(sent, receiver)
        for before, after in ((b"a", b"b"), (b"x", b"y")):
            _fill(t, sender, sent, before)
            _count_up(t, receiver, sent)
            _holds(t, sender, sent, after, "both read and write it, in turn")
        t.end(sent, receiver)


def _and_back(t: Run, call: Call) -> None:
    """The type is named; one receiver's work is seen when the memory is back."""
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        t.machine.write(sender, ranges[0][0], b"b" * 64)
        sent = _sent(t, call, sender, receiver, ranges=ranges)
        t.retrieved(sent, receiver, flags=TRANSACTION_TYPES[call] << FLAG_TYPE_SHIFT)
        _count_up(t, receiver, sent)
        t.end(sent, receiver)
        _holds(t, sender, sent, b"c", "the receiver's work is seen")


register(HAFNIUM, "share_concurrently_and_get_back", partial(_and_back, call=SHARE))
register(HAFNIUM, "lend_and_get_back", partial(_and_back, call=LEND))


@case(HAFNIUM)
def give_and_get_back(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(DONATE, sender, receiver)
        t.retrieved(sent, receiver, flags=3 << FLAG_TYPE_SHIFT)
        _fill(t, receiver, sent, b"b")
        if is_secure(receiver) and not is_secure(sender):
            returned = _sent(t, DONATE, receiver, SPS[1], ranges=sent.ranges)
            t.retrieved(returned, SPS[1], permissions=Data.RW | X)
            t.alone(returned, SPS[1])
            continue
        returned = _sent(t, DONATE, receiver, sender, ranges=sent.ranges)
        t.retrieved(returned, sender, permissions=Data.RW | X)
        t.alone(returned, sender)
        _holds(t, sender, returned, b"b", "its bytes came back with it")


@case(HAFNIUM)
def cannot_share_device_memory(t: Run) -> None:
    _cannot_send(t, 1, [(DEVICE, 1)], SHARE, LEND, DONATE)
    t.unchanged(1, [(DEVICE, 1)], "a device's registers")


@case(HAFNIUM)
def invalid_device_share_fails(t: Run) -> None:
    for receiver, other in ((SPS[0], SPS[1]), (2, 3)):
        for call in (SHARE, DONATE):
            answer = t.send(call, t.transaction(call, 1, receiver), [(DEVICE, 1)])
            t.fails(answer, DENIED, f"FFA_{call.name} of a device's registers")
        answer = t.send(LEND, t.transaction(LEND, 1, receiver, other, attributes=DEVICE_TYPE), [(DEVICE, 1)])
        t.fails(answer, DENIED, "a device's registers are lent to two")
    t.unchanged(1, [(DEVICE, 1)], "a device's registers")


@case(HAFNIUM)
def lend_device_memory_as_normal_fails(t: Run) -> None:
    for receiver in (SPS[0], 2):
        transaction = t.transaction(LEND, 1, receiver)
        answer = t.send(LEND, transaction, [(DEVICE, 1)])
        if answer.error is DENIED:
            t.unchanged(1, [(DEVICE, 1)], "a device's registers are not lent at all")
            continue
        sent = t.begun(answer, LEND, transaction, [(DEVICE, 1)])
        normal = t.request(sent, receiver, attributes=ATTRIBUTES_NORMAL)
        t.fails(t.retrieve(normal, receiver), DENIED, "a device's registers are retrieved as normal memory")
        t.ok(t.reclaim(sent), "reclaims")


for _id in (
    "lend_device_memory_and_lose_access",
    "lend_device_memory_between_sps_and_reclaim",
    "lend_device_memory_to_sp_and_reclaim",
):
    register(HAFNIUM, _id, None, MMIO)


# -- relinquishing


@case(HAFNIUM)
def lend_relinquish(t: Run) -> None:
    for sender, receiver in PAIRS:
        start = t.fresh(sender, 3)[0][0]
        ranges = [(start, 1), (start + PAGE_SIZE, 2)]
        for address, count in ranges:
            t.machine.write(sender, address, b"b" * count * PAGE_SIZE)
        sent = _sent(t, LEND, sender, receiver, ranges=ranges)
        t.retrieved(sent, receiver)
        _count_up(t, receiver, sent)
        t.end(sent, receiver)
        _holds(t, sender, sent, b"c", "the receiver's work is seen")


@case(HAFNIUM)
def lend_force_fragmented_relinquish(t: Run) -> None:
    for sender, receiver in PAIRS:
        start = t.fresh(sender, 3)[0][0]
        ranges, transaction = [(start, 1), (start + PAGE_SIZE, 2)], t.transaction(LEND, sender, receiver)
        answer = t.send(LEND, transaction, ranges, fragment=-16)
        t.is_call(answer, Call.MEM_FRAG_RX, "the last range is asked for, though all would fit")
        t.equal(answer[3], RANGES + 16, "from where the first fragment ended")
        t.endpoint(sender).put(abi.pack_ranges(ranges[1:]))
        last = t.call(sender, Call.MEM_FRAG_TX, answer[1], answer[2], 16)
        sent = t.begun(last, LEND, transaction, ranges)
        t.retrieved(sent, receiver)
        t.has(receiver, sent, RW, "when it has retrieved")
        t.end(sent, receiver)


@case(HAFNIUM)
def lend_fragmented_relinquish_multi_receiver(t: Run) -> None:
    count = 300
    for sender, receiver in PAIRS:
        other, ranges = third(sender), t.fresh(sender, count)
        transaction = t.transaction(LEND, sender, receiver, other)
        answer = t.endpoint(sender).send_memory(LEND, transaction, ranges)
        sent = t.begun(answer, LEND, transaction, ranges)
        for by in (receiver, other):
            first, blob = t.endpoint(by).retrieve(t.request(sent, by))
            t.is_call(first, Call.MEM_RETRIEVE_RESP, f"{by:#x} retrieves, in fragments")
            t.equal(len(blob), first[1], "all of them come")
            t.has(by, sent, RW, "when it has retrieved")
        t.end(sent, receiver, other)


@case(HAFNIUM)
def donate_relinquish(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(DONATE, sender, receiver)
        t.retrieved(sent, receiver)
        t.fails(t.relinquish(receiver, sent.handle), INVALID, "the new owner relinquishes")
        t.alone(sent, receiver)


def _again_after_return(t: Run, elsewhere: bool) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        for to in (receiver, third(sender) if elsewhere else receiver):
            sent = _sent(t, LEND, sender, to, ranges=ranges)
            t.retrieved(sent, to)
            t.has(to, sent, RW, "when it has retrieved")
            t.has(sender, sent, NONE, "while it is lent")
            t.end(sent, to)


register(HAFNIUM, "relend_after_return", partial(_again_after_return, elsewhere=False))
register(HAFNIUM, "lend_elsewhere_after_return", partial(_again_after_return, elsewhere=True))


# -- access


def _loses_access(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        t.machine.write(sender, ranges[0][0], b"secret")
        sent = _sent(t, call, sender, receiver, ranges=ranges, flags=FLAG_CLEAR)
        t.has(sender, sent, NONE, "when it has sent")
        t.retrieved(sent, receiver)
        t.equal(t.machine.read(receiver, sent.address, 6), bytes(6), "the receiver finds it cleared")
        t.has(sender, sent, NONE, "when the receiver has it")


register(HAFNIUM, "give_memory_and_lose_access", partial(_loses_access, call=DONATE))
register(HAFNIUM, "lend_memory_and_lose_access", partial(_loses_access, call=LEND))


def _beside(t: Run, call: Call, upper: bool) -> None:
    """The bytes just beyond each range are not the receiver's."""
    for sender, receiver in PAIRS:
        start = t.fresh(sender, 8)[0][0]
        ranges = [(start + PAGE_SIZE, 1), (start + 3 * PAGE_SIZE, 2)]
        sent = _sent(t, call, sender, receiver, ranges=ranges)
        t.retrieved(sent, receiver)
        for address, count in ranges:
            inside, beyond = (address + count * PAGE_SIZE - 1,) * 2 if upper else (address,) * 2
            beyond += 1 if upper else -1
            t.equal(t.access(receiver, inside), RW, "the receiver has the range to its end")
            t.equal(t.access(receiver, beyond), NONE, "and nothing beyond")
            t.equal(t.access(sender, beyond), RW, "which is the sender's still")


for _id, _call in (("donate_check", DONATE), ("ffa_lend_check", LEND)):
    register(HAFNIUM, f"{_id}_upper_bounds", partial(_beside, call=_call, upper=True))
    register(HAFNIUM, f"{_id}_lower_bounds", partial(_beside, call=_call, upper=False))


@case(HAFNIUM)
def donate_and_donate_elsewhere(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(DONATE, sender, receiver)
        t.retrieved(sent, receiver)
        other = third(receiver)
        onward = _sent(t, DONATE, receiver, other, ranges=sent.ranges)
        t.has(receiver, onward, NONE, "when it has donated it on")
        t.retrieved(onward, other)
        for by in (sender, receiver):
            t.has(by, onward, NONE, "when it is another's")
        t.alone(onward, other)


@case(HAFNIUM)
def donate_vms(t: Run) -> None:
    for sender, receiver in ((2, 3), (1, 2), (SPS[0], SPS[1])):
        ranges = t.fresh(sender)
        t.machine.write(sender, ranges[0][0], b"a" * 64)
        sent = _sent(t, DONATE, sender, receiver, ranges=ranges)
        t.retrieved(sent, receiver)
        t.has(sender, sent, NONE, "when it is another's")
        _holds(t, receiver, sent, b"a", "the bytes are as they were")
        t.alone(sent, receiver)


@case(HAFNIUM)
def lend_normal_memory_as_device_and_lose_access(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(LEND, sender, receiver)
        found = t.retrieved(sent, receiver, attributes=DEVICE_TYPE)
        t.equal(found.attributes & 0x3F, DEVICE_TYPE, "it is told the type that it asked for")
        t.has(receiver, sent, RW, "when it has retrieved")
        t.has(sender, sent, NONE, "while it is lent")
        t.end(sent, receiver)


@case(HAFNIUM)
def lend_normal_as_device_to_multiple(t: Run) -> None:
    for sender, receiver in PAIRS:
        other = third(sender)
        sent = t.sent(LEND, sender, receiver, other, attributes=DEVICE_TYPE)
        for by in (receiver, other):
            normal = t.request(sent, by, attributes=ATTRIBUTES_NORMAL)
            t.fails(t.retrieve(normal, by), DENIED, "sent as device memory, retrieved as normal memory")
            t.has(by, sent, NONE, "then")
        t.retrieved(sent, receiver, attributes=DEVICE_TYPE)
        t.end(sent, receiver)


@case(HAFNIUM)
def mem_lend_relinquish_reclaim_normal_memory_as_device(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        t.machine.write(sender, ranges[0][0], b"b" * 64)
        sent = _sent(t, LEND, sender, receiver, ranges=ranges)
        t.retrieved(sent, receiver, attributes=DEVICE_TYPE)
        _count_up(t, receiver, sent)
        t.end(sent, receiver)
        _holds(t, sender, sent, b"c", "the receiver's work is seen")


@case(HAFNIUM)
def mem_lend_zero_memory_after_relinquish_device_memory(t: Run) -> None:
    for sender, receiver in PAIRS:
        for clear in (True, False):
            sent = t.sent(LEND, sender, receiver)
            flags = FLAG_CLEAR_ON_RELINQUISH if clear else 0
            t.retrieved(sent, receiver, attributes=DEVICE_TYPE, flags=flags)
            _fill(t, receiver, sent, b"s")
            t.end(sent, receiver)
            _holds(t, sender, sent, bytes(1) if clear else b"s", "it is zeroed if the receiver asked for that")


# -- who has it, and who may send it


@case(HAFNIUM)
def donate_twice(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(DONATE, sender, receiver)
        t.retrieved(sent, receiver)
        _cannot_send(t, sender, sent.ranges, SHARE, LEND, DONATE)
        _cannot_relinquish(t, sent.handle, sender, receiver, third(sender))
        other = third(receiver)
        onward = _sent(t, DONATE, receiver, other, ranges=sent.ranges)
        t.retrieved(onward, other)
        again = t.send(DONATE, t.transaction(DONATE, receiver, sender), sent.ranges)
        t.fails(again, DENIED, "who has donated it donates it again")
        t.alone(onward, other)


def _to_self(t: Run, call: Call) -> None:
    for sender in (1, 4, 5, SPS[0]):
        ranges = t.fresh(sender)
        answer = t.send(call, t.transaction(call, sender, sender), ranges)
        t.fails(answer, INVALID, f"{sender:#x} sends to itself")
        t.unchanged(sender, ranges, "sent to itself")


for _name, _call in SENDS.items():
    register(HAFNIUM, f"{_name}_to_self", partial(_to_self, call=_call))


def _invalid_source(t: Run, call: Call) -> None:
    """In another's name: of who is the receiver, of a third, of nobody; and a receiver in the sender's name."""
    for sender, receiver in PAIRS:
        other, ranges = third(sender), t.fresh(sender)
        for named, to in ((receiver, sender), (receiver, other), (other, receiver)):
            if is_secure(named) is is_secure(sender):
                answer = t.send(call, t.transaction(call, named, to), ranges, by=sender)
                t.fails(answer, DENIED, f"{sender:#x} sends as {named:#x} to {to:#x}")
        t.unchanged(sender, ranges, "in another's name")
        sent = _sent(t, call, sender, receiver, ranges=ranges)
        t.retrieved(sent, receiver)
        if is_secure(receiver) is is_secure(sender):
            answer = t.send(call, t.transaction(call, sender, other), ranges, by=receiver)
            t.fails(answer, DENIED, "a receiver sends as the sender")
        if call is LEND:
            t.end(sent, receiver)
        else:
            t.alone(sent, receiver)


register(HAFNIUM, "donate_invalid_source", partial(_invalid_source, call=DONATE))
register(HAFNIUM, "lend_invalid_source", partial(_invalid_source, call=LEND))


@case(HAFNIUM)
def give_and_get_back_unaligned(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender, 2)
        for call in (DONATE, LEND):
            right = t.transaction(call, sender, receiver)
            for one, two in ((1, 0), (0, 1), (8, 0), (0, 0x800), (PAGE_SIZE - 1, PAGE_SIZE - 1)):
                moved = [(ranges[0][0] + one, 1), (ranges[1][0] + two, 1)]
                t.fails(t.send(call, right, moved), INVALID, f"{one} and {two} bytes off a page")
        t.unchanged(sender, ranges, "unaligned ranges")


@case(HAFNIUM)
def invalid_from_sp(t: Run) -> None:
    for sp in SPS[:2]:
        for vm in (1, 4, 5):
            for call in SENDS.values():
                ranges = t.fresh(sp)
                answer = t.send(call, t.transaction(call, sp, vm), ranges)
                t.fails(answer, DENIED, f"secure memory, FFA_{call.name} to a VM")
                t.unchanged(sp, ranges, "secure memory for a VM")


# -- permissions


def _executable(t: Run, pairs: tuple[tuple[int, int], ...]) -> None:
    """Lent memory is retrieved with each access and with and without execution."""
    for sender, receiver in PAIRS:
        for data, instruction in pairs:
            sent = t.sent(LEND, sender, receiver, permissions=data)
            found = t.retrieved(sent, receiver, permissions=data | instruction)
            t.equal(found.receivers[0].permissions, data | instruction, "the permissions are told")
            t.has(receiver, sent, RW if data == Data.RW else "r", "as it asked")
            t.executes(receiver, sent, instruction == X, "as it asked")
            t.end(sent, receiver)


for _id, _pairs in (
    ("lend_relinquish_X_RW", ((Data.RW, X), (Data.RO, X))),
    ("lend_relinquish_RW_X", ((Data.RW, X), (Data.RW, NX))),
    ("lend_relinquish_RO_X", ((Data.RO, X), (Data.RO, NX))),
):
    register(HAFNIUM, _id, partial(_executable, pairs=_pairs))


@case(HAFNIUM)
def share_X(t: Run) -> None:  # noqa: N802
    for sender, receiver in PAIRS:
        for data in (Data.RW, Data.RO):
            sent = t.sent(SHARE, sender, receiver, permissions=data)
            request = t.request(sent, receiver, permissions=data | X)
            t.fails(t.retrieve(request, receiver), INVALID, "shared memory is to be executed")
            t.has(sender, sent, RW, "still")
            t.end(sent)


@case(HAFNIUM)
def share_relinquish_NX_RW(t: Run) -> None:  # noqa: N802
    for sender, receiver in PAIRS:
        for data in (Data.RW, Data.RO):
            sent = t.sent(SHARE, sender, receiver, permissions=data)
            found = t.retrieved(sent, receiver)
            t.equal(found.receivers[0].permissions, data | NX, "it is told that it must not execute")
            t.has(receiver, sent, RW if data == Data.RW else "r", "as it was shared")
            t.executes(receiver, sent, False, "since it is shared")
            t.has(sender, sent, RW, "still")
            t.end(sent, receiver)


@case(HAFNIUM)
def share_relinquish_clear(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(SHARE, sender, receiver)
        _fill(t, sender, sent, b"b")
        t.retrieved(sent, receiver)
        t.fails(t.relinquish(receiver, sent.handle, FLAG_CLEAR), INVALID, "shared memory is to be cleared")
        t.has(receiver, sent, RW, "still")
        t.end(sent, receiver)
        _holds(t, sender, sent, b"b", "it was not cleared")


@case(HAFNIUM)
def retrieve_instruction_access_not_specified(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in (LEND, DONATE):
            sent = t.sent(call, sender, receiver)
            request = t.request(sent, receiver, permissions=Data.RW)
            t.fails(t.retrieve(request, receiver), INVALID, f"FFA_{call.name}: the only receiver does not name it")
            t.has(receiver, sent, NONE, "then")
            t.ok(t.reclaim(sent), "reclaims")


# -- state machine


def _no_part(t: Run, first: Call, then: tuple[Call, ...]) -> None:
    """Of memory that is sent, no page is sent once more: neither to another, nor to who has it."""
    for sender, receiver in PAIRS:
        start = t.fresh(sender, 3)[0][0]
        for data in (Data.RO, Data.RW):
            sent = _sent(t, first, sender, receiver, ranges=[(start, 3)], permissions=data)
            t.retrieved(sent, receiver)
            for page in range(3):
                part = [(start + page * PAGE_SIZE, 1)]
                for call in then:
                    for to in (third(sender), receiver):
                        answer = t.send(call, t.transaction(call, sender, to), part)
                        t.fails(answer, DENIED, f"page {page} of it, FFA_{call.name} to {to:#x}")
            _cannot_relinquish(t, sent.handle, sender, third(sender))
            t.has(receiver, sent, RW if data == Data.RW else "r", "still")
            t.end(sent, receiver)


register(HAFNIUM, "lend_donate", partial(_no_part, first=LEND, then=(DONATE,)))
register(HAFNIUM, "share_donate", partial(_no_part, first=SHARE, then=(SHARE, DONATE)))


def _twice(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        start = t.fresh(sender, 3)[0][0]
        sent = _sent(t, call, sender, receiver, ranges=[(start, 3)])
        t.retrieved(sent, receiver)
        _cannot_send(t, sender, sent.ranges, SHARE, LEND, DONATE)
        _cannot_relinquish(t, sent.handle, sender, third(sender))
        for page in range(3):
            again = t.transaction(call, sender, receiver, permissions=Data.RO)
            answer = t.send(call, again, [(start + page * PAGE_SIZE, 1)])
            t.fails(answer, DENIED, f"page {page} of it, with other permissions")
        t.end(sent, receiver)


register(HAFNIUM, "lend_twice", partial(_twice, call=LEND))
register(HAFNIUM, "share_twice", partial(_twice, call=SHARE))


# -- clearing


@case(HAFNIUM)
def lend_clear(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender, 2)
        for address, _ in ranges:
            t.machine.write(sender, address, b"b" * 64)
        sent = _sent(t, LEND, sender, receiver, ranges=ranges, flags=FLAG_CLEAR, permissions=Data.RO)
        t.retrieved(sent, receiver, permissions=Data.RO | X)
        _holds(t, receiver, sent, bytes(1), "the receiver finds it cleared")
        t.end(sent, receiver)
        _holds(t, sender, sent, bytes(1), "so does the sender, when it has it back")


@case(HAFNIUM)
def share_clear(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender, 2)
        for address, _ in ranges:
            t.machine.write(sender, address, b"b" * 64)
        answer = t.send(SHARE, t.transaction(SHARE, sender, receiver, flags=FLAG_CLEAR), ranges)
        t.fails(answer, INVALID, "shared memory is to be cleared")
        found = {t.machine.read(sender, address, 64) for address, _ in ranges}
        t.equal(found, {b"b" * 64}, "it was not cleared")
        t.unchanged(sender, ranges, "shared, to be cleared")


register(HAFNIUM, "lend_zero_memory_after_relinquish", relinquish_state_machine_3)
register(HAFNIUM, "lend_zero_memory_after_relinquish_multiple_borrowers", relinquish_state_machine_4)


@case(HAFNIUM)
def cannot_zero_ro_memory_on_lend_or_donate(t: Run) -> None:
    for call in (LEND, DONATE):
        for value in (7, 3):
            ranges = read_only_page(t, value)
            wrong = t.transaction(call, EL0, SPS[0], flags=FLAG_CLEAR)
            t.fails(t.send(call, wrong, ranges), DENIED, f"FFA_{call.name} that clears what its owner cannot write")
            t.unchanged(EL0, ranges, "read-only memory, to be cleared")
            t.ok(t.call(EL0, Call.MEM_PERM_SET, ranges[0][0], 1, 5), "it makes it writable again")
            sent = _sent(t, call, EL0, SPS[0], ranges=ranges, flags=FLAG_CLEAR)
            t.retrieved(sent, SPS[0])


@case(HAFNIUM)
def cannot_zero_ro_memory_on_retrieve(t: Run) -> None:
    for value in (7, 3):
        sent = _sent(t, LEND, EL0, SPS[0], ranges=read_only_page(t, value), permissions=Data.RO)
        for flags in (FLAG_CLEAR, FLAG_CLEAR_ON_RELINQUISH):
            request = t.request(sent, SPS[0], flags=flags)
            t.fails(t.retrieve(request, SPS[0]), DENIED, f"what its owner cannot write is to be cleared, flags {flags}")
        t.retrieved(sent, SPS[0])
        t.end(sent, SPS[0])


# -- descriptors


@case(HAFNIUM)
def ffa_validate_mbz(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        for call in SENDS.values():
            for flags in (0xFFFF_FFFF, 0xFFFF_FFFC, 0xFFFF_FFFB, 0xFFFF_FFF8, 0xFFFF_FFE0):
                answer = t.send(call, t.transaction(call, sender, receiver, flags=flags), ranges)
                t.fails(answer, INVALID, f"FFA_{call.name}, flags {flags:#x}")
        t.unchanged(sender, ranges, "flags that must be zero")


_ATTRIBUTES = {"device memory": 0x1F, "non-cacheable": 0x27, "not shareable": 0x2C, "outer shareable": 0x2E}


@case(HAFNIUM)
def ffa_validate_attributes(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        for what, value in _ATTRIBUTES.items():
            answer = t.send(SHARE, t.transaction(SHARE, sender, receiver, attributes=value), ranges)
            t.fails(answer, DENIED, what)
        t.unchanged(sender, ranges, "other attributes")


@case(HAFNIUM)
def ffa_validate_retrieve_req_attributes(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in (SHARE, LEND):
            sent = t.sent(call, sender, receiver)
            for what, value in _ATTRIBUTES.items():
                request = t.request(sent, receiver, attributes=value)
                t.fails(t.retrieve(request, receiver), DENIED, what)
            t.has(receiver, sent, NONE, "after these")
            t.ok(t.reclaim(sent), "reclaims")


def _reserved_of_entry(t: Run, sender: int, at: int) -> None:
    for receiver in (SPS[0], 2):
        ranges = t.fresh(sender)
        for call in SENDS.values():
            for byte in range(8):
                answer = t.send(call, t.transaction(call, sender, receiver), ranges, patch={at + byte: b"\1"})
                t.fails(answer, INVALID, f"FFA_{call.name}, reserved byte {byte} of a receiver")
            right = t.send(call, t.transaction(call, sender, receiver), t.fresh(sender), patch={at: bytes(8)})
            t.ok(right, "with zeros it is sent")
        t.unchanged(sender, ranges, "reserved bytes")


register(HAFNIUM, "ffa_validate_memory_access_reserved_mbz_v1_1", partial(_reserved_of_entry, sender=4, at=48 + 8))
register(HAFNIUM, "ffa_validate_memory_access_reserved_mbz_v1_0", partial(_reserved_of_entry, sender=5, at=32 + 8))


@case(HAFNIUM)
def ffa_memory_access_no_overflow(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges = t.fresh(sender)
        for call in SENDS.values():
            right = t.transaction(call, sender, receiver)
            for value in (0, 8, 48, 0x1000, 0x7FFF_FFF0, 0xFFFF_FFF0, 0xFFFF_FFFF):
                answer = t.send(call, right, ranges, patch={24: struct.pack("<I", value)})
                t.fails(answer, INVALID, f"FFA_{call.name}, entries of {value:#x} bytes")
            for value in (100, 0x1000, 0x0800_0001, 0x7FFF_FFFF, 0xFFFF_FFFF):
                answer = t.send(call, right, ranges, patch={28: struct.pack("<I", value)})
                t.fails(answer, INVALID, f"FFA_{call.name}, {value:#x} receivers")
        t.unchanged(sender, ranges, "sizes that overflow")


@case(HAFNIUM)
def ffa_validate_retrieve_req_mbz(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in SENDS.values():
            sent = t.sent(call, sender, receiver)
            for flags in (0xFFFF_FFFF, 0xFFFF_FFE0):
                t.fails(t.retrieve(t.request(sent, receiver, flags=flags), receiver), INVALID, f"flags {flags:#x}")
            t.has(receiver, sent, NONE, "after these")
            t.ok(t.reclaim(sent), "reclaims")


@case(HAFNIUM)
def ffa_validate_impdef_equal(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in SENDS.values():
            sent = t.sent(call, sender, receiver, impdef=(receiver, receiver + 1))
            entry = t.request(sent, receiver).receivers[0]
            for wrong in ((receiver + 1, receiver + 2), (receiver, 0)):
                asked = abi.Receiver(receiver, entry.permissions, impdef=wrong)
                request = t.request(sent, receiver, receivers=(asked,))
                t.fails(t.retrieve(request, receiver), INVALID, "other implementation-defined words")
            t.has(receiver, sent, NONE, "after these")
            t.ok(t.reclaim(sent), "reclaims")


@case(HAFNIUM)
def ffa_validate_retrieve_req_clear_flag_if_mem_share(t: Run) -> None:
    for sender, receiver in PAIRS:
        wrong = t.send(SHARE, t.transaction(SHARE, sender, receiver, flags=FLAG_CLEAR), t.fresh(sender))
        t.fails(wrong, INVALID, "the sender wants shared memory to be cleared")
        sent = t.sent(SHARE, sender, receiver)
        request = t.request(sent, receiver, flags=FLAG_CLEAR | FLAG_CLEAR_ON_RELINQUISH)
        t.fails(t.retrieve(request, receiver), INVALID, "the receiver wants it")
        t.end(sent)


@case(HAFNIUM)
def ffa_validate_retrieve_req_clear_flag_if_RO(t: Run) -> None:  # noqa: N802
    for sender, receiver in PAIRS:
        sent = t.sent(LEND, sender, receiver, permissions=Data.RO)
        for flags in (FLAG_CLEAR, FLAG_CLEAR_ON_RELINQUISH):
            request = t.request(sent, receiver, permissions=Data.RO | NX, flags=flags)
            t.fails(t.retrieve(request, receiver), DENIED, f"read-only memory is to be cleared, flags {flags}")
        t.end(sent)


@case(HAFNIUM)
def ffa_validate_retrieve_req_clear_flag_if_sender_not_clear(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in (LEND, DONATE):
            sent = t.sent(call, sender, receiver)
            request = t.request(sent, receiver, flags=FLAG_CLEAR)
            t.fails(t.retrieve(request, receiver), DENIED, f"FFA_{call.name}: the sender has not cleared it")
            t.ok(t.reclaim(sent), "reclaims")
            t.alone(sent, sender)


@case(HAFNIUM)
def ffa_validate_retrieve_transaction_type(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in SENDS.values():
            sent = t.sent(call, sender, receiver)
            for other in {1, 2, 3} - {TRANSACTION_TYPES[call]}:
                request = t.request(sent, receiver, flags=other << FLAG_TYPE_SHIFT)
                t.fails(t.retrieve(request, receiver), INVALID, f"FFA_{call.name}, retrieved as type {other}")
            t.ok(t.reclaim(sent), "reclaims")


@case(HAFNIUM)
def fail_inconsistent_page_count(t: Run) -> None:
    for sender, receiver in PAIRS:
        ranges, right = _apart(t, sender), t.transaction(SHARE, sender, receiver)
        for count in (1, 2, 4, 0xFFFF_FFFF):
            answer = t.send(SHARE, right, ranges, patch={HEADER + ENTRY: struct.pack("<I", count)})
            t.fails(answer, INVALID, f"{count} pages in all, of ranges with three", Error.NO_MEMORY)
        t.unchanged(sender, ranges, "a number of pages that is not that of the ranges")


@case(HAFNIUM)
def fail_page_overlap(t: Run) -> None:
    for sender, receiver in PAIRS:
        start = t.fresh(sender, 4)[0][0]
        for what, second in (
            ("the same range", (start, 2)),
            ("its first page", (start, 1)),
            ("its last page", (start + PAGE_SIZE, 2)),
            ("a range around it", (start - PAGE_SIZE, 4)),
        ):
            wrong = [(start, 2), second, (start + 5 * PAGE_SIZE, 1)]
            for ranges in (wrong, wrong[::-1]):
                answer = t.send(SHARE, t.transaction(SHARE, sender, receiver), ranges)
                t.fails(answer, INVALID, f"{what} is named again")
        t.unchanged(sender, [(start, 2)], "ranges that overlap")


# -- several receivers


def _shared_by_two(t: Run, bypass: bool) -> None:
    for sender, receiver in PAIRS:
        other = third(sender)
        sent = t.sent(SHARE, sender, receiver, other)
        _fill(t, sender, sent, b"a")
        for by in (receiver, other):
            if bypass:
                alone = (abi.Receiver(by, Data.RW),)
                answer = t.retrieve(t.request(sent, by, receivers=alone, flags=FLAG_BYPASS_BORROWERS), by)
                t.equal(answer.fid, RETRIEVED, f"{by:#x} names itself alone")
            else:
                t.retrieved(sent, by)
            _count_up(t, by, sent)
        _holds(t, sender, sent, b"c", "both have worked on it")
        t.end(sent, receiver, other)


register(HAFNIUM, "mem_share_multiple_borrowers", partial(_shared_by_two, bypass=False))
register(HAFNIUM, "mem_share_bypass_multiple_borrowers", partial(_shared_by_two, bypass=True))
register(HAFNIUM, "mem_share_bypass_multiple_borrowers_wrong_receiver_count", partial(bypass, call=SHARE))


@case(HAFNIUM)
def mem_share_bypass_multiple_borrowers_single_receiver_fails(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(SHARE, sender, receiver)
        request = t.request(sent, receiver, flags=FLAG_BYPASS_BORROWERS)
        t.fails(t.retrieve(request, receiver), INVALID, "there is one receiver to name anyway")
        t.end(sent)


@case(HAFNIUM)
def mem_lend_relinquish_reclaim_multiple_borrowers(t: Run) -> None:
    for sender, receiver in PAIRS:
        other, ranges = third(sender), t.fresh(sender)
        t.machine.write(sender, ranges[0][0], b"a" * 64)
        sent = _sent(t, LEND, sender, receiver, other, ranges=ranges)
        for _ in range(2):
            for by in (receiver, other):
                t.retrieved(sent, by)
                _count_up(t, by, sent)
            for by in (receiver, other):
                t.ok(t.relinquish(by, sent.handle), f"{by:#x} relinquishes")
        t.end(sent)
        _holds(t, sender, sent, b"e", "both have worked on it, twice")


def _one_wrong_receiver(t: Run, what: str) -> None:
    """A list of receivers, of which the last makes the whole a refusal."""
    for sender, receiver in PAIRS:
        other = third(sender)
        for call in (SHARE, LEND):
            wrong = {
                "executes": abi.Receiver(other, Data.RW | X),
                "is the sender": abi.Receiver(sender, Data.RW),
            }[what]
            ranges = t.fresh(sender)
            transaction = t.transaction(call, sender, receiver, other)
            answer = t.send(call, abi.Transaction(sender, (transaction.receivers[0], wrong), ATTRIBUTES_NORMAL), ranges)
            t.fails(answer, INVALID, f"FFA_{call.name}: the second receiver {what}")
            t.unchanged(sender, ranges, "one of two receivers is wrong")


register(HAFNIUM, "fail_if_one_receiver_wrong_permissions", partial(_one_wrong_receiver, what="executes"))
register(HAFNIUM, "fail_if_one_receiver_is_self", partial(_one_wrong_receiver, what="is the sender"))


# -- versions


def _between_versions(t: Run, sender: int, *receivers: int) -> None:
    """Each reads and writes the layouts of its own version; the memory is the same."""
    sent = t.sent(SHARE, sender, *receivers, count=2, tag=0x99)
    _fill(t, sender, sent, b"a")
    for n, by in enumerate(receivers):
        found = t.retrieved(sent, by)
        size = 16 if t.endpoint(by).version < 0x10002 else 32
        t.equal(found.entry_size, size, f"{by:#x} gets the layout of its version")
        _count_up(t, by, sent)
        _holds(t, sender, sent, bytes([ord("b") + n]), "the sender sees its work")
    t.end(sent, *receivers)


@case(HAFNIUM)
def share_ffa_v1_1_to_current_version(t: Run) -> None:
    for receiver in (SPS[0], 2):
        _between_versions(t, 4, receiver)


@case(HAFNIUM)
def share_ffa_current_version_to_v1_1(t: Run) -> None:
    _between_versions(t, 1, 4)
    smaller = t.transaction(SHARE, 1, SPS[0])
    ranges = t.fresh(1)
    blob = abi.build(0x10001, smaller, ranges)
    t.endpoint(1).put(blob)
    answer = t.call(1, SHARE, len(blob), len(blob), smc64=True)
    t.ok(answer, "a 1.2 sender may use entries of 16 bytes")


@case(HAFNIUM)
def v1_1_service_shares_memory(t: Run) -> None:
    _between_versions(t, 4, SPS[0], 2)
    _between_versions(t, 4, 5, 1)


# -- FFA_NS_RES_INFO_GET, which is of 1.3

NS_RES_INFO_GET = 0xC400_008F
_START, _CONTINUE, _OF_ONE = 0, 1, 1 << 6
_ASKED: dict[str, tuple[int, int]] = {
    "get_all_sp_info": (0, _START),
    "get_service1_info": (SPS[0], _START | _OF_ONE),
    "get_lent_info": (SPS[0], _START | _OF_ONE),
    "get_lent_reclaim": (SPS[0], _START | _OF_ONE),
    "get_multiple_calls": (0, _CONTINUE),
    "get_all_sp_info_sel0": (EL0, _START),
    "get_lent_info_sel0": (EL0, _START | _OF_ONE),
    "get_lent_info_multi_perm": (SPS[0], _START | _OF_ONE),
    "get_all_lent_info_multi_rec": (0, _START),
    "get_target_lent_info_multi_rec": (SPS[1], _START | _OF_ONE),
    "get_lent_info_diff_perm": (SPS[0], _START | _OF_ONE),
    "get_lent_info_diff_perm_multi_rec": (SPS[1], _START | _OF_ONE),
    "get_shared_info": (SPS[0], _START | _OF_ONE),
    "get_donated_info": (SPS[0], _START | _OF_ONE),
    "get_donated_info_sel0": (EL0, _START | _OF_ONE),
    "invalid_endpoint_id": (0xFFFF, _START | _OF_ONE),
    "invalid_resource_type": (0, _START | 0x0C),
    "no_data_generated": (0, _CONTINUE),
    "call_ffa_features": (0, _START),
}


def _of_1_3(t: Run, name: str) -> None:
    """A call of FF-A 1.3 in a system of 1.2: there is no such function, and nothing comes of it."""
    endpoint, flags = _ASKED[name]
    call = DONATE if "donated" in name else SHARE if "shared" in name else LEND
    to = endpoint if endpoint in SPS else SPS[0]
    sent = t.sent(call, 1, to)
    t.retrieved(sent, to)
    before = t.endpoint(1).got(PAGE_SIZE)
    for caller in (1, SPS[0]):
        told = t.call(caller, Call.FEATURES, NS_RES_INFO_GET)
        t.fails(told, Error.NOT_SUPPORTED, f"{caller:#x} is not told of FFA_NS_RES_INFO_GET")
        answer = t.endpoint(caller).send(Frame(NS_RES_INFO_GET, endpoint, flags))
        t.fails(answer, Error.NOT_SUPPORTED, f"{caller:#x} calls it")
    t.equal(t.endpoint(1).got(PAGE_SIZE), before, "RX is not written")
    t.ok(t.call(1, Call.PARTITION_INFO_GET, *messages.uuid_to_words(messages.NIL)), "nor is it taken")
    t.ok(t.call(1, Call.RX_RELEASE), "releases RX")
    if call is DONATE:
        t.alone(sent, to)
    else:
        t.end(sent, to)


for _id in _ASKED:
    register(HAFNIUM, f"ffa_ns_res_info_get_{_id}", partial(_of_1_3, name=_id))
