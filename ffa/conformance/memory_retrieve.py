"""Retrieving: what a receiver must name, and what it must not."""

from __future__ import annotations

import struct
from functools import partial

from ffa.abi import transactions as abi
from ffa.abi.ids import (
    ATTRIBUTE_NS,
    FLAG_BYPASS_BORROWERS,
    FLAG_CLEAR,
    FLAG_CLEAR_ON_RELINQUISH,
    HANDLE_INVALID,
    Call,
    is_secure,
)
from ffa.conformance.bench import EL0, SPS
from ffa.conformance.memory_send import DENIED, DONATE, ENTRY, HEADER, INVALID, LEND, SENDS, SHARE
from ffa.conformance.memory_states import third
from ffa.conformance.registry import MEMORY, Body, case, register
from ffa.conformance.run import NONE, PAIRS, RETRIEVED, RW, Run, Sent


def _finish(t: Run, sent: Sent, receiver: int) -> None:
    """After refusals: the receiver has nothing; the right request works."""
    t.has(receiver, sent, NONE, "after these")
    t.retrieved(sent, receiver)
    if sent.call is not DONATE:
        t.end(sent, receiver)


def _handle_and_tag(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver, tag=0xABCD_EF01_2345_6789)
        for handle in (sent.handle ^ 0xF000, 0, HANDLE_INVALID):
            request = t.request(sent, receiver, handle=handle)
            t.fails(t.retrieve(request, receiver), INVALID, f"handle {handle:#x}")
        for tag in (0, sent.transaction.tag + 1, sent.transaction.tag & 0xFFFF_FFFF):
            request = t.request(sent, receiver, tag=tag)
            t.fails(t.retrieve(request, receiver), INVALID, f"tag {tag:#x}")
        _finish(t, sent, receiver)


def _hints(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        for flags in (0x8 << 5, 0x1F << 5, 1 << 9, 1 << 5):
            request = t.request(sent, receiver, flags=flags)
            t.fails(t.retrieve(request, receiver), INVALID, f"an alignment hint, flags {flags:#x}")
        _finish(t, sent, receiver)


def _ranges(t: Run, call: Call) -> None:
    """Address ranges in a request: it is the manager that chooses them."""
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        patch = {HEADER + 4: struct.pack("<I", HEADER + ENTRY)}
        t.fails(t.retrieve(t.request(sent, receiver), receiver, patch=patch), INVALID, "the receiver names ranges")
        _finish(t, sent, receiver)


def _parties(t: Run, call: Call) -> None:
    """Sender, caller, lengths and counts."""
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        right = t.request(sent, receiver)
        request = t.request(sent, receiver, sender=third(sender))
        t.fails(t.retrieve(request, receiver), DENIED, "another sender is named")
        for who in {third(receiver), third(sender), sender}:
            permissions = right.receivers[0].permissions
            own = t.request(sent, who, receivers=(abi.Receiver(who, permissions),))
            t.fails(t.retrieve(own, who), INVALID, f"{who:#x}, which is no receiver, names itself")
            t.fails(t.retrieve(right, who), INVALID, f"{who:#x} names the receiver")
        for what, more in (("a length beyond TX", 8192), ("too long", 16), ("cut", -16)):
            t.fails(t.retrieve(right, receiver, more=more), INVALID, what)
        for what, patch in (
            ("no receiver", {28: struct.pack("<I", 0)}),
            ("more receivers than there are", {28: struct.pack("<I", 2)}),
            ("entries of a size that there is not", {24: struct.pack("<I", 8)}),
            ("receivers beyond the descriptor", {32: struct.pack("<I", 0x1000)}),
            ("reserved bytes of the header", {44: b"\1"}),
            ("reserved bytes of the receiver", {HEADER + 24: b"\1"}),
        ):
            t.fails(t.retrieve(right, receiver, patch=patch), INVALID, what)
        t.ok(t.call(receiver, Call.PARTITION_INFO_GET), "RX is full")
        t.refused(t.retrieve(right, receiver), "nobody writes to it")
        t.ok(t.call(receiver, Call.RX_RELEASE), "releases RX")
        _finish(t, sent, receiver)


def _type(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        own = {SHARE: 1, LEND: 2, DONATE: 3}[call]
        for other in {1, 2, 3} - {own}:
            request = t.request(sent, receiver, flags=other << 3)
            t.fails(t.retrieve(request, receiver), INVALID, f"type {other}")
        for flags in (1 << 11, 1 << 31):
            t.fails(t.retrieve(t.request(sent, receiver, flags=flags), receiver), INVALID, f"flags {flags:#x}")
        t.has(receiver, sent, NONE, "after these")
        t.retrieved(sent, receiver, flags=own << 3)


def _executes(t: Run, call: Call) -> None:
    """Instruction access: named by the receiver where it is alone, never of shared memory."""
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        for instruction in (1, 2, 3) if call is SHARE else (0, 3):
            request = t.request(sent, receiver, permissions=2 | instruction << 2)
            t.fails(t.retrieve(request, receiver), INVALID, f"instruction access {instruction}")
        reserved = t.request(sent, receiver, permissions=3 | (0 if call is SHARE else 4))
        t.fails(t.retrieve(reserved, receiver), DENIED, "data access is reserved")
        if call is not SHARE:
            t.has(receiver, sent, NONE, "after these")
            found = t.retrieved(sent, receiver, permissions=2 | 8)
            t.equal(found.receivers[0].permissions, 2 | 8, "it may execute, having asked")
            continue
        _finish(t, sent, receiver)


def _several_execute(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(LEND, sender, receiver, third(sender))
        for instruction in (1, 2, 3):
            request = t.request(sent, receiver, permissions=2 | instruction << 2)
            t.fails(t.retrieve(request, receiver), INVALID, f"instruction access {instruction}")
        t.equal(t.retrieved(sent, receiver).receivers[0].permissions & 0xC, 4, "it is never executed")
        t.end(sent, receiver)


def _clear_unsent(t: Run, call: Call) -> None:
    """A receiver that wants cleared memory, of a sender that did not clear it."""
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        request = t.request(sent, receiver, flags=FLAG_CLEAR)
        t.fails(t.retrieve(request, receiver), DENIED, "it was not cleared")
        _finish(t, sent, receiver)


def _clear_sent(t: Run, call: Call) -> None:
    """A sender that clears."""
    for sender, receiver in PAIRS:
        for asked in (0, FLAG_CLEAR):
            ranges = t.fresh(sender, 2)
            for address, _ in ranges:
                t.machine.write(sender, address, b"secret")
            transaction = t.transaction(call, sender, receiver, flags=FLAG_CLEAR)
            sent = t.begun(t.send(call, transaction, ranges), call, transaction, ranges)
            found = t.retrieved(sent, receiver, flags=asked)
            t.equal(found.flags & FLAG_CLEAR, FLAG_CLEAR, "the receiver is told that it was cleared")
            t.equal({t.machine.read(receiver, p, 6) for p in sent.pages}, {bytes(6)}, "it was")


def _clear_read_only(t: Run) -> None:
    for sender, receiver in PAIRS:
        for given, asked in ((1, 1), (2, 1)):
            sent = t.sent(LEND, sender, receiver, permissions=given)
            request = t.request(sent, receiver, permissions=asked | 4, flags=FLAG_CLEAR_ON_RELINQUISH)
            t.fails(t.retrieve(request, receiver), DENIED, "read-only memory is to be cleared when relinquished")
            t.retrieved(sent, receiver, permissions=asked | 4)
            t.fails(t.relinquish(receiver, sent.handle, FLAG_CLEAR), DENIED, "relinquished, to be cleared")
            t.has(receiver, sent, "r", "after these")
            t.end(sent, receiver)


def _cleared_read_only(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(LEND, sender, receiver, permissions=1, flags=FLAG_CLEAR)
        request = t.request(sent, receiver, flags=FLAG_CLEAR)
        t.fails(t.retrieve(request, receiver), DENIED, "who may read asks for cleared memory")
        t.retrieved(sent, receiver)
        t.end(sent, receiver)


def _device_executed(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        request = t.request(sent, receiver, permissions=2 | 8, attributes=0x13)
        t.fails(t.retrieve(request, receiver), DENIED, "retrieved as device memory, and executable")
        t.has(receiver, sent, NONE, "then")
        t.ok(t.reclaim(sent), "reclaims")


def read_only_page(t: Run, value: int) -> list[abi.AddressRange]:
    """A page that a partition at S-EL0 has made read-only (7), or read-only and executable (3), for itself."""
    ranges = t.fresh(EL0)
    t.ok(t.call(EL0, Call.MEM_PERM_SET, ranges[0][0], 1, value), "a partition makes a page read-only")
    return ranges


def _of_read_only(t: Run, call: Call) -> None:
    """A receiver wants memory to be cleared that its owner can only read."""
    for value in (7, 3):
        named = {"permissions": 1} if call is LEND else {}
        transaction, ranges = t.transaction(call, EL0, SPS[0], **named), read_only_page(t, value)
        sent = t.begun(t.send(call, transaction, ranges), call, transaction, ranges)
        for flags in (FLAG_CLEAR, FLAG_CLEAR_ON_RELINQUISH):
            request = t.request(sent, SPS[0], flags=flags)
            t.fails(t.retrieve(request, SPS[0]), DENIED, f"its owner cannot write it, flags {flags}")
        found = t.retrieved(sent, SPS[0])
        t.equal(found.flags & FLAG_CLEAR, 0, "it is told that it was not cleared")


def _all(t: Run, bodies: tuple[Body, ...]) -> None:
    for body in bodies:
        body(t)


for _name, _call in SENDS.items():
    register(MEMORY, f"{_name}_invalid_handle_tag", partial(_handle_and_tag, call=_call))
    register(MEMORY, f"{_name}_retrieve_align_hint_check", partial(_hints, call=_call))
    register(MEMORY, f"{_name}_retrieve_with_address_range", partial(_ranges, call=_call))
_BODIES: dict[str, Body] = {
    "lend_retrieve_input_checks": _clear_read_only,
    "lend_retrieve_input_checks1": partial(_clear_sent, call=LEND),
    "lend_retrieve_input_checks2": partial(_all, bodies=(partial(_clear_unsent, call=LEND), partial(_type, call=LEND))),
    "lend_retrieve_input_checks3": partial(_all, bodies=(partial(_clear_sent, call=LEND), _cleared_read_only)),
    "lend_retrieve_input_checks4": partial(
        _all, bodies=(partial(_executes, call=LEND), partial(_device_executed, call=LEND))
    ),
    "lend_retrieve_input_checks5": _several_execute,
    "lend_retrieve_input_checks6": partial(_parties, call=LEND),
    "lend_retrieve_input_checks8": partial(_of_read_only, call=LEND),
    "donate_retrieve_input_checks1": partial(
        _all, bodies=(partial(_type, call=DONATE), partial(_clear_sent, call=DONATE))
    ),
    "donate_retrieve_input_checks2": partial(_clear_unsent, call=DONATE),
    "donate_retrieve_input_checks3": partial(
        _all, bodies=(partial(_executes, call=DONATE), partial(_device_executed, call=DONATE))
    ),
    "donate_retrieve_input_checks4": partial(_parties, call=DONATE),
    "donate_retrieve_input_checks5": partial(_of_read_only, call=DONATE),
}
for _id, _body in _BODIES.items():
    register(MEMORY, _id, _body)


@case(MEMORY)
def share_retrieve_input_checks(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(SHARE, sender, receiver)
        for flags in (FLAG_CLEAR, FLAG_CLEAR_ON_RELINQUISH, FLAG_CLEAR | FLAG_CLEAR_ON_RELINQUISH):
            request = t.request(sent, receiver, flags=flags)
            t.fails(t.retrieve(request, receiver), INVALID, f"shared memory is to be cleared, flags {flags}")
        other = t.request(sent, receiver, attributes=0x27)
        t.fails(t.retrieve(other, receiver), DENIED, "retrieved as non-cacheable memory")
        _finish(t, sent, receiver)
    _executes(t, SHARE)
    _parties(t, SHARE)
    _type(t, SHARE)


@case(MEMORY)
def lend_retrieve_input_checks7(t: Run) -> None:
    for sender, receiver in PAIRS:
        other, outsider = third(sender), SPS_ELSEWHERE[is_secure(sender)]
        sent = t.sent(LEND, sender, receiver, other)
        for what, ids in (
            ("one of two", (receiver,)),
            ("three of two", (receiver, other, outsider)),
            ("itself twice", (receiver, receiver)),
        ):
            request = t.request(sent, receiver, receivers=tuple(abi.Receiver(i, 2) for i in ids))
            t.fails(t.retrieve(request, receiver), INVALID, f"it names {what}")
        request = t.request(sent, receiver, receivers=(abi.Receiver(receiver, 2), abi.Receiver(outsider, 2)))
        t.fails(t.retrieve(request, receiver), DENIED, "it names a borrower whom the sender did not")
        both = t.request(sent, receiver)
        t.is_call(t.retrieve(both, receiver), Call.MEM_RETRIEVE_RESP, "it names both")
        t.end(sent, receiver)


SPS_ELSEWHERE = {False: 4, True: 0x8005}
"""By the sender's world: somebody who is no borrower."""


def bypass(t: Run, call: Call) -> None:
    """One of several borrowers names itself alone, and says that it does."""
    for sender, receiver in PAIRS:
        other = third(sender)
        sent = t.sent(call, sender, receiver, other)
        for by in (receiver, other):
            alone = (abi.Receiver(by, 2),)
            t.fails(t.retrieve(t.request(sent, by, receivers=alone), by), INVALID, "alone, without the flag")
            not_it = (abi.Receiver(other if by == receiver else receiver, 2),)
            request = t.request(sent, by, receivers=not_it, flags=FLAG_BYPASS_BORROWERS)
            t.fails(t.retrieve(request, by), INVALID, "the other alone, with the flag")
            both = t.request(sent, by, flags=FLAG_BYPASS_BORROWERS)
            t.fails(t.retrieve(both, by), INVALID, "both, with the flag")
            request = t.request(sent, by, receivers=alone, flags=FLAG_BYPASS_BORROWERS)
            t.equal(t.retrieve(request, by).fid, RETRIEVED, "alone, with the flag")
            t.has(by, sent, RW, "then")
        t.end(sent, receiver, other)
        single = t.sent(call, sender, receiver)
        request = t.request(single, receiver, flags=FLAG_BYPASS_BORROWERS)
        t.fails(t.retrieve(request, receiver), INVALID, "of one borrower")
        _finish(t, single, receiver)


register(MEMORY, "share_multi_borrower_flag_check", partial(bypass, call=SHARE))
register(MEMORY, "lend_multi_borrower_flag_check", partial(bypass, call=LEND))


@case(MEMORY)
def mem_security_state_ns_bit_retrieve_check(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in SENDS.values():
            sent = t.sent(call, sender, receiver)
            for attributes in (ATTRIBUTE_NS, ATTRIBUTE_NS | 0x2F):
                request = t.request(sent, receiver, attributes=attributes)
                t.fails(t.retrieve(request, receiver), INVALID, "the NS bit is set")
            reserved = t.request(sent, receiver, attributes=0x80)
            t.fails(t.retrieve(reserved, receiver), INVALID, "reserved attributes")
            t.has(receiver, sent, NONE, "after these")
            found = t.retrieved(sent, receiver)
            normal = not is_secure(sender)
            t.equal(bool(found.attributes & ATTRIBUTE_NS), normal, "the NS bit tells of the memory's world")
