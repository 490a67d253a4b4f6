"""Who may send what when, and what comes of relinquishing and reclaiming."""

from __future__ import annotations

from functools import partial

from ffa.abi.ids import FLAG_CLEAR, FLAG_CLEAR_ON_RELINQUISH, HANDLE_INVALID, PAGE_SIZE, Call, is_secure
from ffa.abi.transactions import build_relinquish
from ffa.conformance.bench import SPS
from ffa.conformance.memory_send import DENIED, DONATE, INVALID, LEND, SENDS, SHARE
from ffa.conformance.registry import MEMORY, case, register
from ffa.conformance.run import NONE, PAIRS, RETRIEVED, RW, Run


def third(id: int) -> int:
    """Another endpoint of the same world."""
    return SPS[2] if is_secure(id) else 3


def _two(t: Run, call: Call) -> None:
    """Two borrowers retrieve and relinquish, in either order."""
    for sender, receiver in PAIRS:
        other = third(sender)
        for leave in ((receiver, other), (other, receiver)):
            sent = t.sent(call, sender, receiver, other, count=2)
            for by in (receiver, other):
                t.has(by, sent, NONE, "before it retrieves")
                t.retrieved(sent, by)
                t.has(by, sent, RW, "when it has retrieved")
            t.has(sender, sent, RW if call is SHARE else NONE, "while others have it")
            t.fails(t.reclaim(sent), DENIED, "two have it")
            t.ok(t.relinquish(leave[0], sent.handle), "one relinquishes")
            t.has(leave[1], sent, RW, "when the other has relinquished")
            t.fails(t.reclaim(sent), DENIED, "one has it")
            t.end(sent, leave[1])


def _again(t: Run, first: Call, second: Call, *, two: bool, retrieve: bool, part: bool = False) -> None:
    """What is in one transaction is refused for another, to anybody; then the first ends as if nothing was."""
    for sender, receiver in PAIRS:
        other = third(sender)
        borrowers = (receiver, other) if two else (receiver,)
        sent = t.sent(first, sender, *borrowers, count=2)
        for by in borrowers if retrieve else ():
            t.retrieved(sent, by)
        for to in (receiver, other):
            ranges = sent.ranges[1:] if part else sent.ranges
            answer = t.send(second, t.transaction(second, sender, to), ranges)
            t.fails(answer, DENIED, f"FFA_{second.name} of what is in FFA_{first.name}, to {to:#x}")
        t.end(sent, *(borrowers if retrieve else ()))


def _there_and_back(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(DONATE, sender, receiver)
        t.retrieved(sent, receiver)
        t.alone(sent, receiver)
        t.refused(t.send(DONATE, t.transaction(DONATE, sender, third(sender)), sent.ranges), "donated twice")
        back = t.transaction(DONATE, receiver, sender)
        returned = t.begun(t.send(DONATE, back, sent.ranges), DONATE, back, sent.ranges)
        t.retrieved(returned, sender)
        t.alone(returned, sender)


for _name, _call in (("share", SHARE), ("lend", LEND)):
    register(MEMORY, f"{_name}_state_machine_1", partial(_two, call=_call))
for _id, _first, _second, _both, _taken in (
    ("share_state_machine_2", LEND, SHARE, False, False),
    ("share_state_machine_3", LEND, SHARE, False, True),
    ("share_state_machine_4", LEND, SHARE, True, True),
    ("share_state_machine_5", SHARE, SHARE, False, True),
    ("share_state_machine_6", SHARE, SHARE, True, True),
    ("lend_state_machine_2", LEND, LEND, False, False),
    ("lend_state_machine_3", LEND, LEND, False, True),
    ("lend_state_machine_4", LEND, LEND, True, True),
    ("lend_state_machine_5", SHARE, LEND, False, True),
    ("lend_state_machine_6", SHARE, LEND, True, True),
    ("donate_state_machine_2", LEND, DONATE, False, True),
    ("donate_state_machine_3", LEND, DONATE, True, True),
    ("donate_state_machine_4", SHARE, DONATE, False, True),
    ("donate_state_machine_5", SHARE, DONATE, True, True),
):
    _part = _id == "share_state_machine_4"
    register(MEMORY, _id, partial(_again, first=_first, second=_second, two=_both, retrieve=_taken, part=_part))
register(MEMORY, "donate_state_machine_1", _there_and_back)


def _sent_on(t: Run, *, two: bool) -> None:
    """Borrowers do not send what they have borrowed."""
    for sender, receiver in PAIRS:
        borrowers = (receiver, third(sender)) if two else (receiver,)
        sent = t.sent(LEND, sender, *borrowers)
        for by in borrowers:
            t.retrieved(sent, by)
        for call in SENDS.values():
            answer = t.send(call, t.transaction(call, receiver, third(receiver)), sent.ranges)
            t.fails(answer, DENIED, f"a borrower's FFA_{call.name}")
        t.end(sent, *borrowers)


register(MEMORY, "lend_retrieve_input_checks9", partial(_sent_on, two=False))
register(MEMORY, "lend_retrieve_input_checks10", partial(_sent_on, two=True))


@case(MEMORY)
def donate_retrieve_input_checks6(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(DONATE, sender, receiver)
        t.retrieved(sent, receiver)
        lend = t.transaction(LEND, receiver, third(receiver))
        lent = t.begun(t.send(LEND, lend, sent.ranges), LEND, lend, sent.ranges)
        t.retrieved(lent, third(receiver))
        t.end(lent, third(receiver))


# -- relinquishing


def _stranger(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        t.fails(t.relinquish(receiver, sent.handle), INVALID, "a receiver that has not retrieved")
        t.retrieved(sent, receiver)
        for who in (third(sender), third(receiver), sender):
            t.fails(t.relinquish(who, sent.handle), INVALID, f"{who:#x}, who is no borrower")
        t.has(receiver, sent, RW, "still")
        t.end(sent, receiver)
        t.fails(t.relinquish(receiver, sent.handle), INVALID, "when it is reclaimed")


register(MEMORY, "relinquish_state_machine_2", partial(_stranger, call=LEND))
register(MEMORY, "relinquish_state_machine_5", partial(_stranger, call=SHARE))


@case(MEMORY)
def relinquish_state_machine_3(t: Run) -> None:
    for sender, receiver in PAIRS:
        for asked, flags in ((FLAG_CLEAR_ON_RELINQUISH, 0), (0, FLAG_CLEAR), (0, 0)):
            sent = t.sent(LEND, sender, receiver)
            t.retrieved(sent, receiver, flags=asked)
            t.machine.write(receiver, sent.address, b"secret")
            t.ok(t.relinquish(receiver, sent.handle, flags), f"relinquishes with flags {asked | flags}")
            t.fails(t.relinquish(receiver, sent.handle), INVALID, "relinquishes twice")
            t.end(sent)
            found = t.machine.read(sender, sent.address, 6)
            t.equal(found, bytes(6) if asked or flags else b"secret", "it is cleared if that was asked")


@case(MEMORY)
def relinquish_state_machine_4(t: Run) -> None:
    for sender, receiver in PAIRS:
        other = third(receiver)
        for clears, flags in ((receiver, 0), (other, 0), (None, FLAG_CLEAR)):
            sent = t.sent(LEND, sender, receiver, other)
            for by in (receiver, other):
                t.retrieved(sent, by, flags=FLAG_CLEAR_ON_RELINQUISH if by == clears else 0)
            t.machine.write(receiver, sent.address, b"secret")
            t.ok(t.relinquish(receiver, sent.handle), "one relinquishes")
            t.equal(t.machine.read(other, sent.address, 6), b"secret", "not cleared while another has it")
            t.ok(t.relinquish(other, sent.handle, flags), "the other relinquishes")
            t.end(sent)
            t.equal(t.machine.read(sender, sent.address, 6), bytes(6), "cleared when all have relinquished")


@case(MEMORY)
def share_relinquish_input_checks(t: Run) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(SHARE, sender, receiver)
        t.retrieved(sent, receiver)
        t.machine.write(sender, sent.address, b"shared")
        t.equal(t.machine.read(receiver, sent.address, 6), b"shared", "the receiver reads what the sender wrote")
        endpoint = t.endpoint(receiver)
        for what, blob in (
            ("shared memory is to be cleared", build_relinquish(sent.handle, receiver, flags=FLAG_CLEAR)),
            ("reserved flags", build_relinquish(sent.handle, receiver, flags=4)),
            ("reserved flags above", build_relinquish(sent.handle, receiver, flags=1 << 31)),
            ("no such handle", build_relinquish(HANDLE_INVALID, receiver)),
            ("a handle that was never given", build_relinquish(sent.handle ^ 0xF000, receiver)),
            ("no endpoint", build_relinquish(sent.handle)),
            ("another endpoint", build_relinquish(sent.handle, sender)),
            ("two endpoints", build_relinquish(sent.handle, receiver, third(receiver))),
            ("more endpoints than TX holds", build_relinquish(sent.handle, receiver)[:12] + b"\xff\xff\0\0"),
        ):
            endpoint.put(blob)
            t.fails(endpoint.call(Call.MEM_RELINQUISH), INVALID, what)
        t.has(receiver, sent, RW, "after these")
        t.end(sent, receiver)
        t.equal(t.machine.read(sender, sent.address, 6), b"shared", "its bytes stay")


def _unmapped(t: Run, pair: tuple[int, int]) -> None:
    sender, receiver = pair
    for call in (SHARE, LEND):
        sent = t.sent(call, sender, receiver, count=2)
        t.retrieved(sent, receiver)
        t.has(receiver, sent, RW, "when it has retrieved")
        t.end(sent, receiver)


_WORLDS = {"vmsp": PAIRS[0], "vmvm": PAIRS[1], "spsp": PAIRS[2]}
for _world, _pair in _WORLDS.items():
    register(MEMORY, f"relinquish_mem_unmap_check_{_world}", partial(_unmapped, pair=_pair))


# -- reclaiming


@case(MEMORY)
def reclaim_input_error_checks(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in (SHARE, LEND):
            sent = t.sent(call, sender, receiver)
            for who in (receiver, third(sender), third(receiver)):
                t.fails(t.endpoint(who).reclaim(sent.handle), INVALID, f"{who:#x}, which is not the sender")
            for handle in (0, sent.handle ^ 0xF000, HANDLE_INVALID):
                t.fails(t.endpoint(sender).reclaim(handle), INVALID, f"handle {handle:#x} is of nothing")
            for flags in (4, 1 << 31):
                t.fails(t.reclaim(sent, flags), INVALID, f"reserved flags {flags:#x}")
            t.retrieved(sent, receiver)
            t.fails(t.reclaim(sent), DENIED, "a receiver has it")
            t.has(receiver, sent, RW, "still")
            t.end(sent, receiver)
            t.fails(t.reclaim(sent), INVALID, "reclaimed twice")


@case(MEMORY)
def reclaim_zero_flag(t: Run) -> None:
    for sender, receiver in PAIRS:
        for flags in (FLAG_CLEAR, 0):
            sent = t.sent(LEND, sender, receiver, count=2)
            t.retrieved(sent, receiver)
            for page in sent.pages:
                t.machine.write(receiver, page + 8, b"secret")
            t.ok(t.relinquish(receiver, sent.handle), "relinquishes")
            t.ok(t.reclaim(sent, flags), f"reclaims with flags {flags}")
            found = {t.machine.read(sender, page + 8, 6) for page in sent.pages}
            t.equal(found, {bytes(6) if flags else b"secret"}, "it is cleared if that was asked")


# -- access


def _lost(t: Run, call: Call, sender: int, smc64: bool) -> None:
    """What is lent or donated, the sender has no more, retrieved or not."""
    receivers = [r for s, r in PAIRS if is_secure(s) == is_secure(sender)]
    for receiver in receivers:
        sent = t.sent(call, sender, receiver, count=3, smc64=smc64)
        t.has(sender, sent, NONE, "when it has sent")
        t.retrieved(sent, receiver, smc64)
        t.has(sender, sent, NONE, "when the receiver has it")
        t.has(receiver, sent, RW, "when it has retrieved")


def _bounds(t: Run, call: Call, pair: tuple[int, int], smc64: bool) -> None:
    """The pages beside those sent stay the sender's alone."""
    sender, receiver = pair
    start = t.fresh(sender, 8)[0][0] + PAGE_SIZE
    for ranges in ([(start, 2)], [(start + 4 * PAGE_SIZE, 2), (start + 8 * PAGE_SIZE, 1)]):
        transaction = t.transaction(call, sender, receiver)
        sent = t.begun(t.send(call, transaction, ranges, smc64=smc64), call, transaction, ranges)
        t.retrieved(sent, receiver, smc64)
        t.has(receiver, sent, RW, "when it has retrieved")
        for address, count in ranges:
            for beside in (address - 1, address + count * PAGE_SIZE):
                found = (t.access(sender, beside), t.access(receiver, beside))
                t.equal(found, (RW, NONE), "the bytes beside are still the sender's alone")


def _permitted(t: Run, pair: tuple[int, int], smc64: bool) -> None:
    sender, receiver = pair
    for permissions, wanted in ((1, "r"), (2, RW)):
        sent = t.sent(LEND, sender, receiver, permissions=permissions, smc64=smc64)
        t.retrieved(sent, receiver, smc64)
        t.has(receiver, sent, wanted, "as it was lent")
        t.has(sender, sent, NONE, "while it is lent")
        t.end(sent, receiver)


def _raised(t: Run, call: Call, pair: tuple[int, int], smc64: bool) -> None:
    sender, receiver = pair
    named = 4 if call is LEND else 0
    sent = t.sent(call, sender, receiver, permissions=1, smc64=smc64)
    answer = t.retrieve(t.request(sent, receiver, permissions=2 | named), receiver, smc64=smc64)
    t.fails(answer, DENIED, "read-only memory is retrieved for writing")
    t.has(receiver, sent, NONE, "then")
    t.retrieved(sent, receiver, smc64)
    t.has(receiver, sent, "r", "as it was sent")
    t.end(sent, receiver)


for _bits in (32, 64):
    _form = _bits == 64
    for _world, _pair in _WORLDS.items():
        for _name, _call in SENDS.items():
            if _call is DONATE and _world == "vmsp":
                continue  # not one of ACS's
            _id = f"{_name}_lower_upper_boundary_{_bits}_{_world}"
            register(MEMORY, _id, partial(_bounds, call=_call, pair=_pair, smc64=_form))
        register(MEMORY, f"lend_retrieve_mem_access_{_bits}_{_world}", partial(_permitted, pair=_pair, smc64=_form))
        _id = f"share_ro_retrieve_rw_{_bits}_{_world}"
        register(MEMORY, _id, partial(_raised, call=SHARE, pair=_pair, smc64=_form))
    for _who, _sender in (("vm", 1), ("sp", SPS[0])):
        for _name in ("lend", "donate"):
            _id = f"{_name}_mem_access_after_{_name}_{_bits}_{_who}"
            register(MEMORY, _id, partial(_lost, call=SENDS[_name], sender=_sender, smc64=_form))


@case(MEMORY)
def lend_ro_retrieve_rw(t: Run) -> None:
    for pair in PAIRS:
        _raised(t, LEND, pair, smc64=True)


def _lowered(t: Run, call: Call) -> None:
    for sender, receiver in PAIRS:
        sent = t.sent(call, sender, receiver)
        named = 4 if call is LEND else 0
        found = t.retrieved(sent, receiver, permissions=1 | named)
        t.equal(found.receivers[0].permissions, 1 | 4, "read-only, never executed")
        t.has(receiver, sent, "r", "as it asked")
        t.end(sent, receiver)


register(MEMORY, "share_rw_retrieve_ro", partial(_lowered, call=SHARE))
register(MEMORY, "lend_rw_retrieve_ro", partial(_lowered, call=LEND))


def _retrieved_twice(t: Run, call: Call) -> None:
    """The number of retrievals that FFA_FEATURES tells of, and one more."""
    for sender, receiver in PAIRS:
        answer = t.ok(t.call(receiver, Call.FEATURES, 0x8400_0074, 2), "how often a borrower may retrieve")
        times = (1 << (answer[3] & 0xFF) + 1) - 1
        sent = t.sent(call, sender, receiver)
        for _ in range(times):
            t.retrieved(sent, receiver)
        again = t.request(sent, receiver)
        t.fails(t.retrieve(again, receiver), DENIED, "once more")
        if call is LEND:
            t.refused(t.retrieve(t.request(sent, receiver, flags=FLAG_CLEAR), receiver), "once more, and cleared")
        for _ in range(times):
            t.has(receiver, sent, RW, "still")
            t.ok(t.relinquish(receiver, sent.handle), "relinquishes")
        t.equal(t.retrieve(again, receiver).fid, RETRIEVED, "relinquished, it may be retrieved again")
        t.end(sent, receiver)


register(MEMORY, "share_multiple_retrievals", partial(_retrieved_twice, call=SHARE))
register(MEMORY, "lend_multiple_retrievals", partial(_retrieved_twice, call=LEND))
