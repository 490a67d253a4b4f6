"""Sharing, lending and donating: what each gives to whom, and what is refused."""

from __future__ import annotations

import struct
from functools import partial

from ffa.abi import transactions as abi
from ffa.abi.frame import pair
from ffa.abi.ids import (
    ATTRIBUTE_NS,
    ATTRIBUTES_NORMAL,
    FLAG_CLEAR,
    FLAG_TYPE_MASK,
    PAGE_SIZE,
    TRANSACTION_TYPES,
    VERSION_1_1,
    Call,
    Error,
    Instruction,
    is_secure,
)
from ffa.conformance.bench import DEVICE, EL0, NOBODY, SPS, UNBACKED, memory_of
from ffa.conformance.registry import HAFNIUM, MEMORY, OWN, case, register
from ffa.conformance.run import NONE, PAIRS, RW, Run

SHARE, LEND, DONATE = Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE
SENDS = {"share": SHARE, "lend": LEND, "donate": DONATE}
HEADER = 48
ENTRY = 32
COMPOSITE = HEADER + ENTRY
RANGES = COMPOSITE + 16
"""Offsets in a 1.2 descriptor with one receiver."""
INVALID, DENIED = Error.INVALID_PARAMETERS, Error.DENIED
X = Instruction.X << 2


def _whole(t: Run, call: Call) -> None:
    """From the call to the end of it, in both conventions, with one page and with several."""
    for sender, receiver in (*PAIRS, (5, SPS[0]), (4, 2), (1, 5)):
        for smc64, count in ((False, 1), (True, 3)):
            sent = t.sent(call, sender, receiver, count=count, smc64=smc64, tag=0x1234)
            t.has(sender, sent, RW if call is SHARE else NONE, "when it has sent")
            t.has(receiver, sent, NONE, "before it retrieves")
            found = t.retrieved(sent, receiver, smc64)
            t.has(sender, sent, RW if call is SHARE else NONE, "when it is retrieved")
            t.has(receiver, sent, RW, "when it has retrieved")
            t.equal(found.flags & FLAG_TYPE_MASK, TRANSACTION_TYPES[call] << 3, "the type of transaction is told")
            normal = not is_secure(sender) and t.endpoint(receiver).version >= VERSION_1_1
            t.equal(bool(found.attributes & ATTRIBUTE_NS), normal, "the NS bit tells of the memory's world")
            t.equal(found.attributes & 0x3F, ATTRIBUTES_NORMAL, "normal, write-back, inner shareable memory")
            (entry,) = found.receivers
            t.equal(entry.permissions, 2 | Instruction.NX << 2, "read and write, never executed")
            if call is not DONATE:
                t.fails(t.reclaim(sent), DENIED, "the sender reclaims what is retrieved")
                for again in SENDS.values():
                    onward = t.transaction(again, receiver, SPS[2] if is_secure(receiver) else 3)
                    t.fails(t.send(again, onward, sent.ranges), DENIED, f"the borrower's FFA_{again.name}")
                t.end(sent, receiver)
                continue
            t.alone(sent, receiver)
            t.fails(t.reclaim(sent), INVALID, "the donor reclaims")
            back = t.transaction(DONATE, receiver, sender)
            returned = t.begun(t.send(DONATE, back, sent.ranges), DONATE, back, sent.ranges)
            t.retrieved(returned, sender)
            t.alone(returned, sender)


def _in_fragments(t: Run, call: Call) -> None:
    """A descriptor longer than TX, and the response longer than RX."""
    count = 600
    for sender, receiver in PAIRS[:2]:
        ranges = t.fresh(sender, count)
        transaction = t.transaction(call, sender, receiver)
        answer = t.endpoint(sender).send_memory(call, transaction, ranges)
        sent = t.begun(answer, call, transaction, ranges)
        first, blob = t.endpoint(receiver).retrieve(t.request(sent, receiver))
        t.is_call(first, Call.MEM_RETRIEVE_RESP, "retrieves")
        t.true(first[2] < first[1] == len(blob), "in fragments", first)
        found = abi.parse(blob, t.endpoint(receiver).version)
        at = abi.parse_composite(blob, found.receivers[0].composite).ranges
        t.equal(abi.parse_ranges(blob[at:]), ranges, "the ranges are those sent")
        if call is DONATE:
            t.alone(sent, receiver)
        else:
            t.end(sent, receiver)


def _sent_in_fragments(t: Run) -> None:
    """Share, its answers to fragments: handle and offset; what ends it."""
    for receiver in (SPS[0], 2):
        ranges, transaction = t.fresh(1, 4), t.transaction(SHARE, 1, receiver)
        answer = t.send(SHARE, transaction, ranges, fragment=-32)
        t.is_call(answer, Call.MEM_FRAG_RX, "asks for the rest")
        handle, total = pair(answer[1], answer[2]), RANGES + 64
        t.true(handle != 0, "there is a handle")
        t.equal(answer[3], total - 32, "from where the first fragment ended")
        vm, early = t.endpoint(1), abi.Transaction(1, (abi.Receiver(receiver, 2),), handle=handle)
        t.fails(t.retrieve(early, receiver), INVALID, "retrieved before it is sent")
        t.fails(vm.reclaim(handle), INVALID, "reclaimed before it is sent")
        other = t.call(3, Call.MEM_FRAG_TX, answer[1], answer[2], 16)
        t.fails(other, INVALID, "a fragment from another")
        vm.put(abi.pack_ranges(ranges[2:3]))
        answer = t.call(1, Call.MEM_FRAG_TX, answer[1], answer[2], 16)
        t.equal((answer.fid, answer[3]), (t.is_call(answer, Call.MEM_FRAG_RX, "one more").fid, total - 16), "and now")
        vm.put(abi.pack_ranges(ranges[3:]))
        sent = t.begun(t.call(1, Call.MEM_FRAG_TX, answer[1], answer[2], 16), SHARE, transaction, ranges)
        t.equal(sent.handle, handle, "the handle stays")
        t.retrieved(sent, receiver)
        t.end(sent, receiver)
        answer = t.send(SHARE, transaction, ranges, fragment=-32)
        vm.put(abi.pack_ranges([(memory_of(3) + 0x10_0000, 1), ranges[3]]))
        t.fails(t.call(1, Call.MEM_FRAG_TX, answer[1], answer[2], 32), DENIED, "a fragment with another's page")
        t.refused(t.call(1, Call.MEM_FRAG_TX, answer[1], answer[2], 32), "that ended it")
        t.unchanged(1, ranges, "a bad fragment")
        answer = t.send(SHARE, transaction, ranges, fragment=-32)
        for size in (8, 48):
            t.refused(t.call(1, Call.MEM_FRAG_TX, answer[1], answer[2], size), f"a fragment of {size} bytes")
        t.unchanged(1, ranges, "a bad fragment")
        t.fails(t.send(SHARE, transaction, ranges, fragment=-24), INVALID, "a fragment that ends within a range")


register(HAFNIUM, "fail_fragmented_if_retrieve_before_sent", _sent_in_fragments)
for _name, _call in SENDS.items():
    register(MEMORY, f"ffa_mem_{_name}", partial(_whole, call=_call))
    register(HAFNIUM if _call is LEND else OWN, f"{_name}_fragmented_relinquish", partial(_in_fragments, call=_call))


def _refuses(t: Run, call: Call, sender: int, receiver: int, code: Error, what: str, **changes: object) -> None:
    """A descriptor with one fault: its code, and nothing changes; without the fault it is sent."""
    ranges = t.fresh(sender, 2)
    for smc64 in (False, True):
        answer = t.send(call, t.transaction(call, sender, receiver, **changes), ranges, smc64=smc64)
        t.fails(answer, code, what)
    t.unchanged(sender, ranges, what)


def _input(t: Run, call: Call) -> None:
    """Receivers, flags, permissions and attributes that a sender must not name."""
    for sender, receiver in PAIRS:
        check = partial(_refuses, t, call, sender, receiver)
        for who in (0x8000 | NOBODY, 0xFFFF) if is_secure(sender) else (NOBODY, 0x8000 | NOBODY, 0xFFFF):
            _refuses(t, call, sender, who, INVALID, f"receiver {who:#x} is not there")
        _refuses(t, call, sender, sender, INVALID, "the receiver is the sender")
        if call is SHARE:
            check(INVALID, "shared memory is to be cleared", flags=FLAG_CLEAR)
        if call is DONATE:
            for data in (1, 2):
                check(INVALID, "data access is named", permissions=data)
        else:
            check(INVALID, "data access is not named", permissions=0)
        check(INVALID, "data access is reserved", permissions=3)
        for instruction in (1, 2, 3):
            good = 0 if call is DONATE else 2
            check(INVALID, "instruction access is named", permissions=good | instruction << 2)
        if call is not SHARE:
            check(INVALID, "memory attributes are named", attributes=ATTRIBUTES_NORMAL)
        check(INVALID, "reserved attributes", attributes=0x80 | (ATTRIBUTES_NORMAL if call is SHARE else 0))
        check(INVALID, "a handle is given", handle=1)
        t.end(t.sent(call, sender, receiver))


def _lengths(t: Run, call: Call) -> None:
    """Lengths, the sender, counts and ranges that do not fit."""
    for sender, receiver in PAIRS:
        ranges, right = t.fresh(sender, 2), t.transaction(call, sender, receiver)
        for what, more, fragment in (
            ("a fragment longer than the descriptor", -16, 0),
            ("a total length shorter than the ranges", -16, -16),
            ("a total length beyond the ranges", 16, 16),
            ("a total length beyond the ranges, in fragments", 16, 0),
            ("longer than TX", 8192, 8192),
        ):
            t.fails(t.send(call, right, ranges, more=more, fragment=fragment), INVALID, what)
        third = SPS[2] if is_secure(sender) else 3
        answer = t.send(call, t.transaction(call, third, receiver), t.fresh(third), by=sender)
        t.fails(answer, DENIED, "in another's name")
        for what, patch in (
            ("no receiver", {28: struct.pack("<I", 0)}),
            ("more receivers than the descriptor has", {28: struct.pack("<I", 200)}),
            ("entries of a size that there is not", {24: struct.pack("<I", 24)}),
            ("receivers beyond the descriptor", {32: struct.pack("<I", 0x10000)}),
            ("receivers in the header", {32: struct.pack("<I", 16)}),
            ("reserved bytes of the header", {44: b"\1"}),
            ("reserved bytes of the receiver", {HEADER + 24: b"\1"}),
            ("the receiver's flags", {HEADER + 3: b"\1"}),
            ("ranges at an odd offset", {HEADER + 4: struct.pack("<I", COMPOSITE + 8)}),
            ("ranges within the receivers", {HEADER + 4: struct.pack("<I", HEADER)}),
            ("ranges beyond the descriptor", {HEADER + 4: struct.pack("<I", 0x4000)}),
            ("reserved bytes before the ranges", {COMPOSITE + 8: b"\1"}),
            ("no pages", {COMPOSITE: struct.pack("<I", 0)}),
            ("more pages than the ranges have", {COMPOSITE: struct.pack("<I", 3)}),
            ("fewer pages than the ranges have", {COMPOSITE: struct.pack("<I", 1)}),
            ("no ranges", {COMPOSITE + 4: struct.pack("<I", 0)}),
            ("more ranges than there are", {COMPOSITE + 4: struct.pack("<I", 3)}),
            ("a range that is not page-aligned", {RANGES: struct.pack("<Q", ranges[0][0] + 0x800)}),
            ("a range without pages", {RANGES + 8: struct.pack("<I", 0)}),
            ("reserved bytes of a range", {RANGES + 12: b"\1"}),
            ("a range beyond the address space", {RANGES: struct.pack("<QI", (1 << 64) - PAGE_SIZE, 1)}),
        ):
            if "beyond the address space" in what:
                t.refused(t.send(call, right, ranges, patch=patch), what)
                continue
            t.fails(t.send(call, right, ranges, patch=patch), INVALID, what)
        t.fails(t.send(call, right, []), INVALID, "no ranges at all")
        t.fails(t.send(call, right, [ranges[0], ranges[0]]), INVALID, "ranges that overlap")
        t.fails(t.send(call, right, [(UNBACKED, 1)]), DENIED, "a page without memory")
        t.fails(t.send(call, right, [(memory_of(third) + 0x8000, 1)]), DENIED, "a page of another")
        t.unchanged(sender, ranges, "all of these")
        t.end(t.sent(call, sender, receiver))
    secure = t.fresh(SPS[0])
    t.fails(t.send(call, t.transaction(call, SPS[0], 1), secure), DENIED, "secure memory for a VM")
    t.fails(t.send(call, t.transaction(call, 1, 2), secure), DENIED, "a VM sends secure memory")


def _flags(t: Run, call: Call) -> None:
    """Flags that there are not, and memory to be cleared that its owner can only read."""
    for sender, receiver in PAIRS:
        for flags in (4, 8, 0x18, 0x20, 0x200, 0x400, 1 << 31):
            _refuses(t, call, sender, receiver, INVALID, f"flags {flags:#x}", flags=flags)
    ranges, named = t.fresh(EL0), {"permissions": 1} if call is LEND else {}
    t.ok(t.call(EL0, Call.MEM_PERM_SET, ranges[0][0], 1, 7), "a partition makes a page read-only for itself")
    wrong = t.transaction(call, EL0, SPS[0], flags=FLAG_CLEAR, **named)
    t.fails(t.send(call, wrong, ranges), DENIED, "its owner cannot write what is to be cleared")
    right = t.transaction(call, EL0, SPS[0], **named)
    sent = t.begun(t.send(call, right, ranges), call, right, ranges)
    t.fails(t.reclaim(sent, FLAG_CLEAR), DENIED, "nor what is to be cleared when it is reclaimed")
    t.ok(t.reclaim(sent), "reclaims")


def _second_receiver(t: Run, call: Call) -> None:
    """Lists of receivers of which one is wrong."""
    for sender, receiver in PAIRS:
        other = SPS[2] if is_secure(sender) else 3
        for what, second in (
            ("not there", NOBODY | sender & 0x8000),
            ("the sender", sender),
            ("named twice", receiver),
        ):
            answer = t.send(call, t.transaction(call, sender, receiver, second), t.fresh(sender))
            t.fails(answer, INVALID, f"a second receiver that is {what}")
        wrong = abi.Transaction(sender, (abi.Receiver(receiver, 2), abi.Receiver(other, 3)), ATTRIBUTES_NORMAL)
        t.fails(t.send(call, wrong, t.fresh(sender)), INVALID, "a second receiver's permissions are wrong")
        two = t.transaction(call, sender, receiver, other)
        moved = {HEADER + ENTRY + 4: struct.pack("<I", COMPOSITE + ENTRY + 32)}
        t.fails(t.send(call, two, t.fresh(sender, 4), patch=moved), INVALID, "receivers name different ranges")


def _many(t: Run) -> None:
    """A donation has one receiver."""
    for sender, receiver in PAIRS:
        other = SPS[2] if is_secure(sender) else 3
        ranges = t.fresh(sender)
        t.fails(t.send(DONATE, t.transaction(DONATE, sender, receiver, other), ranges), INVALID, "two new owners")
        t.unchanged(sender, ranges, "two new owners")


def _executable(t: Run) -> None:
    for sender, receiver in PAIRS:
        other = SPS[2] if is_secure(sender) else 3
        answer = t.send(LEND, t.transaction(LEND, sender, receiver, other, permissions=2 | X), t.fresh(sender))
        t.fails(answer, INVALID, "memory that two may execute")


@case(MEMORY)
def donate_input_error_checks1(t: Run) -> None:
    for sender, receiver in PAIRS:
        other = SPS[2] if is_secure(sender) else 3
        sent = t.sent(DONATE, sender, receiver, count=2)
        part, again = sent.ranges[1:], t.transaction(DONATE, sender, other)
        t.fails(t.send(DONATE, again, part), DENIED, "a part is donated again")
        t.retrieved(sent, receiver)
        t.fails(t.send(DONATE, again, part), DENIED, "and by who is the owner no more")
        t.alone(sent, receiver)


@case(MEMORY)
def donate_input_error_checks3(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(LEND, sender, receiver)
        answer = t.send(DONATE, t.transaction(DONATE, sender, receiver), sent.ranges)
        t.fails(answer, DENIED, "what is lent is donated")
        t.end(sent)


@case(MEMORY)
def share_input_error_checks2(t: Run) -> None:
    for sender, receiver in PAIRS:
        other = SPS[2] if is_secure(receiver) else 3
        sent = t.sent(LEND, sender, receiver, permissions=1)
        t.retrieved(sent, receiver)
        answer = t.send(SHARE, t.transaction(SHARE, receiver, other), sent.ranges)
        t.fails(answer, DENIED, "who may read memory shares it for writing")
        t.end(sent, receiver)


for _name, _call in SENDS.items():
    register(MEMORY, f"{_name}_input_error_checks", partial(_input, call=_call))
register(MEMORY, "share_input_error_checks1", partial(_lengths, call=SHARE))
register(MEMORY, "lend_input_error_checks1", partial(_lengths, call=LEND))
register(MEMORY, "donate_input_error_checks2", partial(_lengths, call=DONATE))
register(MEMORY, "donate_input_error_checks4", partial(_flags, call=DONATE))
register(MEMORY, "lend_input_error_checks2", partial(_second_receiver, call=LEND))
register(MEMORY, "lend_input_error_checks3", _executable)
register(MEMORY, "lend_input_error_checks4", partial(_flags, call=LEND))
register(HAFNIUM, "fail_if_repeated_borrower", partial(_second_receiver, call=SHARE))
register(HAFNIUM, "fail_if_multi_receiver_donate", _many)


def _ns_bit(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        named = ATTRIBUTES_NORMAL if call is SHARE else 0
        _refuses(t, call, sender, receiver, INVALID, "the NS bit is set", attributes=ATTRIBUTE_NS | named)


def _attributes(t: Run, call: Call, what: str, value: int) -> None:
    """Attributes of the sender of shared memory, and of who retrieves: a manager that maps memory in one way alone
    refuses all others."""
    for sender, receiver in PAIRS:
        if call is SHARE:
            _refuses(t, SHARE, sender, receiver, DENIED, f"sent as {what}", attributes=value)
        sent = t.sent(call, sender, receiver)
        answer = t.retrieve(t.request(sent, receiver, attributes=value), receiver)
        t.fails(answer, DENIED, f"retrieved as {what}")
        t.retrieved(sent, receiver, attributes=ATTRIBUTES_NORMAL)
        t.end(sent, receiver)


_DEVICES = (0x10, 0x14, 0x18, 0x1C)
"""Device memory, each more permissive than those before: nGnRnE, nGnRE, nGRE, GRE."""


def _device_types(t: Run, call: Call, more: bool) -> None:
    """Normal memory sent as device memory, which a manager may refuse but for the strictest type. It is retrieved as a
    type that is not more permissive, or refused as one that is."""
    for sender, receiver in PAIRS:
        receivers = (receiver, SPS[2] if is_secure(sender) else 3) if call is LEND else (receiver,)
        for at, value in enumerate(_DEVICES):
            transaction, ranges = t.transaction(call, sender, *receivers, attributes=value), t.fresh(sender)
            answer = t.send(call, transaction, ranges)
            if at and answer.error is DENIED:
                t.unchanged(sender, ranges, "a type that is not supported")
                continue
            sent = t.begun(answer, call, transaction, ranges)
            for other in (*_DEVICES[at + 1 :], ATTRIBUTES_NORMAL) if more else ():
                asked = t.retrieve(t.request(sent, receiver, attributes=other), receiver)
                t.fails(asked, DENIED, f"sent as {value:#x}, retrieved as {other:#x}")
            found = t.retrieved(sent, receiver, attributes=value)
            t.equal(found.attributes & 0x3C, value, "the type of memory is told")
            t.end(sent, receiver)


_ATTRIBUTES = (
    ("lend", "cache_attr", "non-cacheable memory", 0x27),
    ("lend", "cache_attr1", "memory with reserved cacheability", 0x23),
    ("lend", "shareability_attr", "memory that is not shareable", 0x2C),
    ("lend", "shareability_attr1", "outer shareable memory", 0x2E),
    ("lend", "shareability_attr2", "memory with reserved shareability", 0x2D),
    ("lend", "shareability_attr3", "non-cacheable, not shareable memory", 0x24),
    ("share", "cache_attr", "non-cacheable memory", 0x27),
    ("share", "shareability_attr", "memory that is not shareable", 0x2C),
    ("share", "shareability_attr1", "outer shareable memory", 0x2E),
)
for _name, _kind, _what, _value in _ATTRIBUTES:
    register(MEMORY, f"{_name}_{_kind}", partial(_attributes, call=SENDS[_name], what=_what, value=_value))
for _name in ("lend", "share"):
    register(MEMORY, f"{_name}_device_attr", partial(_device_types, call=SENDS[_name], more=False))
    register(MEMORY, f"{_name}_device_attr1", partial(_device_types, call=SENDS[_name], more=True))


def _device(t: Run, call: Call) -> None:
    for receiver in (SPS[0], 2):
        for address in (DEVICE, DEVICE + 8 * PAGE_SIZE):
            answer = t.send(call, t.transaction(call, 1, receiver), [(address, 1)])
            t.fails(answer, DENIED, "a device's registers")
        mixed = [*t.fresh(1), (DEVICE, 1)]
        t.fails(t.send(call, t.transaction(call, 1, receiver), mixed), DENIED, "memory, and a device's registers")
        t.unchanged(1, mixed, "a device's registers")


def _impdef(t: Run, call: Call) -> None:
    words = (0x1111_2222_3333_4444, 0x5555_6666_7777_8888)
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver, impdef=words)
        right = t.request(sent, receiver)
        for wrong in ((0, 0), (words[0], 0), (words[1], words[0])):
            entry = abi.Receiver(receiver, right.receivers[0].permissions, impdef=wrong)
            request = t.request(sent, receiver, receivers=(entry,))
            t.fails(t.retrieve(request, receiver), INVALID, "other implementation-defined words")
        found = t.retrieved(sent, receiver)
        t.equal(found.receivers[0].impdef, words, "they are told")
        if call is not DONATE:
            t.end(sent, receiver)


for _name, _call in SENDS.items():
    register(MEMORY, f"mem_security_state_ns_bit_{_name}_invalid", partial(_ns_bit, call=_call))
    register(MEMORY, f"mem_{_name}_mmio", partial(_device, call=_call))
    register(MEMORY, f"mem_{_name}_impdef", partial(_impdef, call=_call))


@case(MEMORY)
def ffa_mem_perm_get(t: Run) -> None:
    for smc64 in (False, True):
        answer = t.call(1, Call.MEM_PERM_GET, memory_of(1), smc64=smc64)
        t.fails(answer, Error.NOT_SUPPORTED, "a VM asks")
        answer = t.call(SPS[0], Call.MEM_PERM_GET, memory_of(SPS[0]), smc64=smc64)
        t.fails(answer, DENIED, "a partition that is not at S-EL0 asks")
        answer = t.ok(t.call(EL0, Call.MEM_PERM_GET, t.fresh(EL0)[0][0], smc64=smc64), "a partition at S-EL0 asks")
        t.equal(answer[2], 5, "read and write, never executed")
    for what, address in (("another's", memory_of(1)), ("not page-aligned", memory_of(EL0) + 8), ("none", UNBACKED)):
        t.fails(t.call(EL0, Call.MEM_PERM_GET, address), INVALID, f"memory that is {what}")


@case(MEMORY)
def ffa_mem_perm_set(t: Run) -> None:
    page = t.fresh(EL0, 2)[0][0]
    for smc64 in (False, True):
        for id, code in ((1, Error.NOT_SUPPORTED), (SPS[0], DENIED)):
            answer = t.call(id, Call.MEM_PERM_SET, memory_of(id), 1, 7, smc64=smc64)
            t.fails(answer, code, f"{id:#x} sets permissions")
        for value in (7, 3, 5):
            t.ok(t.call(EL0, Call.MEM_PERM_SET, page, 2, value, smc64=smc64), f"sets {value}")
            for at in (page, page + PAGE_SIZE):
                t.equal(t.call(EL0, Call.MEM_PERM_GET, at)[2], value, "it is set")
    for what, arguments in (
        ("no pages", (page, 0, 7)),
        ("not page-aligned", (page + 1, 1, 7)),
        ("reserved permissions", (page, 1, 1)),
        ("writable and executed", (page, 1, 2)),
        ("another's memory", (memory_of(1), 1, 7)),
        ("beyond its memory", (page, 1 << 20, 7)),
    ):
        t.fails(t.call(EL0, Call.MEM_PERM_SET, *arguments), INVALID, what)
    t.equal(t.call(EL0, Call.MEM_PERM_GET, page)[2], 5, "none of these changed anything")
