"""tf-a-tests' cases of setup and discovery, SMCCC and memory sharing (``tftf/tests/tests-spm.xml``).

Each is named after its function.

TFTF is the normal world's only endpoint and calls the SPMC as a hypervisor does. Where it speaks for VMs, endpoint 0 is
a hypervisor here; else it is an operating system.
"""

from __future__ import annotations

from functools import partial
from uuid import UUID

from ffa.abi import messages
from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.abi.ids import (
    FLAG_CLEAR,
    FLAG_TYPE_SHIFT,
    PAGE_SIZE,
    SPMC_ID,
    TRANSACTION_TYPES,
    VERSION_1_2,
    Call,
    Error,
    Feature,
    Property,
    fid,
)
from ffa.abi.layouts import address_range, composite
from ffa.conformance.bench import SPS, UNBACKED, memory_of
from ffa.conformance.memory_send import DENIED, DONATE, INVALID, LEND, SENDS, SHARE
from ffa.conformance.registry import TFA_MEMORY, TFA_SETUP, TFA_SMCCC, case, register
from ffa.conformance.run import NONE, RW, Run, Sent
from ffa.roles.endpoint import respond
from ffa.roles.spmc import ForwardedMap

OS = 0
NOT_SUPPORTED = Error.NOT_SUPPORTED & 0xFFFF_FFFF


# -- setup and discovery


@case(TFA_SETUP)
def test_ffa_features(t: Run) -> None:
    t.restart(host=True)
    for call in (
        *(Call.ERROR, Call.SUCCESS, Call.INTERRUPT, Call.VERSION, Call.FEATURES, Call.RX_RELEASE, Call.RXTX_UNMAP),
        *(Call.PARTITION_INFO_GET, Call.ID_GET, Call.SPM_ID_GET, Call.RUN, *SENDS.values(), Call.MEM_RETRIEVE_REQ),
        *(Call.MEM_RETRIEVE_RESP, Call.MEM_RELINQUISH, Call.MEM_RECLAIM, Call.NOTIFICATION_BITMAP_CREATE),
        *(Call.NOTIFICATION_BITMAP_DESTROY, Call.NOTIFICATION_BIND, Call.NOTIFICATION_SET),
    ):
        t.ok(t.call(OS, Call.FEATURES, fid(call)), f"there is FFA_{call.name}")
    for call in (Call.RXTX_MAP, Call.NOTIFICATION_INFO_GET, *SENDS.values()):
        t.ok(t.call(OS, Call.FEATURES, fid(call, True)), f"there is FFA_{call.name}, SMC64")
    for what, asked in (
        ("a function that there is not", 0xFFFF),
        ("FFA_YIELD, which is not the normal world's", fid(Call.YIELD)),
        ("FFA_ABORT, which is of 1.3", 0x8400_0090),
        ("FFA_ABORT, SMC64", 0xC400_0090),
        ("a managed exit interrupt", Feature.MANAGED_EXIT),
        ("a notification pending interrupt", Feature.NOTIFICATION_PENDING),
    ):
        t.fails(t.call(OS, Call.FEATURES, asked), Error.NOT_SUPPORTED, what)
    t.ok(t.call(OS, Call.FEATURES, Feature.SCHEDULE_RECEIVER), "there is a schedule receiver interrupt")


@case(TFA_SETUP)
def test_ffa_features_rxtx_map(t: Run) -> None:
    t.restart(host=True)
    answer = t.ok(t.call(OS, Call.FEATURES, fid(Call.RXTX_MAP, True)), "asks for the sizes of buffers")
    t.equal(answer[2] & 0xFFFF, 0, "one page of 4 KiB at least")
    t.true(answer[2] >> 16 >= 1, "at most as many pages as it tells", answer)
    t.equal(answer[3:8], (0,) * 5, "nothing more is told")


def _version(t: Run, asked: int, told: int) -> None:
    t.restart(host=True, map_buffers=False)
    for id in (OS, SPS[0]):
        t.equal(t.call(id, Call.VERSION, asked), Frame(told), f"{id:#x} asks for {asked:#x}")
        t.equal(t.call(id, Call.VERSION, VERSION_1_2), Frame(VERSION_1_2), "then for 1.2")


for _name, _asked, _told in (
    ("equal", VERSION_1_2, VERSION_1_2),
    ("bit31", 1 << 31 | VERSION_1_2, NOT_SUPPORTED),
    ("bigger", 0x2_0000, NOT_SUPPORTED),
    ("smaller", 0x9, NOT_SUPPORTED),
):
    register(TFA_SETUP, f"test_ffa_version_{_name}", partial(_version, asked=_asked, told=_told))


def _map(t: Run, tx: int, rx: int | None = None) -> Frame:
    return t.call(OS, Call.RXTX_MAP, tx, tx + PAGE_SIZE if rx is None else rx, 1, smc64=True)


@case(TFA_SETUP)
def test_ffa_rxtx_map_success(t: Run) -> None:
    t.restart(host=True, map_buffers=False)
    t.ok(_map(t, memory_of(OS)), "maps")
    answer = t.ok(t.call(OS, Call.PARTITION_INFO_GET), "RX is used")
    t.equal(messages.parse_infos(t.machine.read(OS, memory_of(OS) + PAGE_SIZE, 24), 1, VERSION_1_2)[0].id, SPS[0], "it")
    t.equal(answer[2], len(SPS), "all partitions are in it")


@case(TFA_SETUP)
def test_ffa_rxtx_map_fail(t: Run) -> None:
    t.restart(host=True)
    for tx in (memory_of(OS), memory_of(OS) + 0x8000):
        t.fails(_map(t, tx), DENIED, "maps twice")


@case(TFA_SETUP)
def test_ffa_rxtx_map_secure_memory_fail(t: Run) -> None:
    t.restart(host=True, map_buffers=False)
    mine, secure = memory_of(OS), memory_of(SPS[0]) + 0x8000
    for tx, rx in ((secure, secure + PAGE_SIZE), (mine, secure), (secure, mine)):
        t.fails(_map(t, tx, rx), DENIED, "secure memory")
    t.ok(_map(t, mine), "its own memory is mapped then")


@case(TFA_SETUP)
def test_ffa_rxtx_map_nonsecure_memory_fail(t: Run) -> None:
    t.restart(host=True, map_buffers=False)
    mine = memory_of(OS)
    for tx, rx in ((UNBACKED, UNBACKED + PAGE_SIZE), (mine, UNBACKED), (0x8800_8000_1000, 0x8800_8000_2000)):
        t.fails(_map(t, tx, rx), DENIED, "an address that is not memory of the normal world")
    t.ok(_map(t, mine), "its own memory is mapped then")


def _not_sent(t: Run, address: int) -> None:
    """Buffers are in no memory transaction."""
    for call in SENDS.values():
        answer = t.send(call, t.transaction(call, OS, SPS[0]), [(address, 1)])
        t.fails(answer, DENIED, f"FFA_{call.name} of a buffer")
        mixed = [*t.fresh(OS), (address, 1)]
        t.fails(t.send(call, t.transaction(call, OS, SPS[0]), mixed), DENIED, "with another page")


@case(TFA_SETUP)
def test_ffa_rxtx_map_memory_share_fail(t: Run) -> None:
    for hypervisor in (False, True):
        t.restart(host=True, hypervisor=hypervisor)
        for address in (memory_of(OS), memory_of(OS) + PAGE_SIZE):
            _not_sent(t, address)
        t.ok(t.call(OS, Call.RXTX_UNMAP), "unmaps")
        t.ok(t.endpoint(OS).map_buffers(memory_of(OS) + 0x8000, memory_of(OS) + 0x9000), "maps others")
        answer = t.send(SHARE, t.transaction(SHARE, OS, SPS[0]), [(memory_of(OS), 1)])
        t.ok(answer, "what was a buffer is shared")


@case(TFA_SETUP)
def test_ffa_rxtx_unmap_nonexistent_vm_id_fail(t: Run) -> None:
    t.restart(hypervisor=True)
    t.fails(t.call(OS, Call.RXTX_UNMAP, 1 << 16), INVALID, "a VM whose buffers were never mapped")
    t.ok(t.call(OS, Call.RXTX_UNMAP), "its own are mapped still")


@case(TFA_SETUP)
def test_ffa_rxtx_unmap_success(t: Run) -> None:
    t.restart(host=True)
    t.ok(t.call(OS, Call.RXTX_UNMAP), "unmaps")
    t.refused(t.call(OS, Call.PARTITION_INFO_GET), "there is no RX any more")


@case(TFA_SETUP)
def test_ffa_rxtx_unmap_fail(t: Run) -> None:
    t.restart(host=True)
    t.ok(t.call(OS, Call.RXTX_UNMAP), "unmaps")
    t.fails(t.call(OS, Call.RXTX_UNMAP), INVALID, "unmaps twice")


@case(TFA_SETUP)
def test_ffa_rxtx_map_unmapped_success(t: Run) -> None:
    t.restart(host=True)
    for _ in range(2):
        t.ok(t.call(OS, Call.RXTX_UNMAP), "unmaps")
        t.ok(_map(t, memory_of(OS)), "maps the same again")


def _forward(t: Run, vm: int, tx: int, rx: int) -> Frame:
    """A hypervisor maps a VM's buffers, by a descriptor in its own TX."""
    parts = [composite.pack(1, 1) + address_range.pack(at, 1) for at in (rx, tx)]
    start = ForwardedMap.size
    head = ForwardedMap.pack(endpoint=vm, rx=start, tx=start + len(parts[0]))
    t.machine.write(OS, memory_of(OS), head + b"".join(parts))
    return t.call(OS, Call.RXTX_MAP, 0, 0, 0, smc64=True)


@case(TFA_SETUP)
def test_ffa_rxtx_map_forward_success(t: Run) -> None:
    t.restart(hypervisor=True)
    base = memory_of(1)
    t.ok(_forward(t, 1, base, base + PAGE_SIZE), "maps a VM's buffers")
    t.ok(t.call(OS, Call.RX_ACQUIRE, 1), "its RX is there")
    t.ok(t.call(OS, Call.RX_RELEASE, 1), "and is given back")
    t.ok(t.call(OS, Call.RXTX_UNMAP, 1 << 16), "unmaps them")
    t.refused(t.call(OS, Call.RX_ACQUIRE, 1), "its RX is there no more")
    t.ok(t.call(OS, Call.RXTX_UNMAP), "unmaps its own")


@case(TFA_SETUP)
def test_ffa_rxtx_map_forward_consecutive_success(t: Run) -> None:
    t.restart(hypervisor=True)
    for vm in (1, 2):
        t.ok(_forward(t, vm, memory_of(vm), memory_of(vm) + PAGE_SIZE), f"maps the buffers of VM {vm}")
    for vm in (1, 2):
        t.ok(t.call(OS, Call.RXTX_UNMAP, vm << 16), f"unmaps those of VM {vm}")
    t.ok(t.call(OS, Call.RXTX_UNMAP), "unmaps its own")


@case(TFA_SETUP)
def test_ffa_rxtx_map_forward_unmapped_buffers_fail(t: Run) -> None:
    t.restart(hypervisor=True, map_buffers=False)
    answer = _forward(t, 1, memory_of(1), memory_of(1) + PAGE_SIZE)
    t.fails(answer, INVALID, "there is no TX to read the descriptor from")


@case(TFA_SETUP)
def test_ffa_rxtx_map_forward_different_ids_fail(t: Run) -> None:
    t.restart(hypervisor=True)
    one, two = memory_of(1), memory_of(2)
    t.ok(_forward(t, 1, one, one + PAGE_SIZE), "maps a VM's buffers")
    for tx, rx in ((one, one + PAGE_SIZE), (two, one), (one + PAGE_SIZE, two)):
        t.fails(_forward(t, 2, tx, rx), DENIED, "another VM's are the same, or one of them is")
    t.fails(_forward(t, 1, two, two + PAGE_SIZE), DENIED, "a VM's buffers are mapped twice")
    t.ok(t.call(OS, Call.RXTX_UNMAP, 1 << 16), "unmaps them")
    t.ok(_forward(t, 2, one, one + PAGE_SIZE), "then they may be another's")


@case(TFA_SETUP)
def test_ffa_rxtx_map_forward_memory_share_fail(t: Run) -> None:
    t.restart(hypervisor=True)
    base = memory_of(1)
    t.ok(_forward(t, 1, base, base + PAGE_SIZE), "maps a VM's buffers")
    for address in (base, base + PAGE_SIZE):
        _not_sent(t, address)
    t.ok(t.call(OS, Call.RXTX_UNMAP, 1 << 16), "unmaps them")
    t.ok(t.send(SHARE, t.transaction(SHARE, OS, SPS[0]), [(base, 1)]), "what was a buffer is shared")


@case(TFA_SETUP)
def test_ffa_rxtx_unmap_fail_if_sp(t: Run) -> None:
    for hypervisor in (False, True):
        t.restart(host=True, hypervisor=hypervisor)
        for sp in SPS:
            t.fails(t.call(OS, Call.RXTX_UNMAP, sp << 16), INVALID, f"the buffers of partition {sp:#x}")
        t.ok(t.call(SPS[0], Call.PARTITION_INFO_GET), "they are mapped still")


@case(TFA_SETUP)
def test_ffa_spm_id_get(t: Run) -> None:
    t.restart(host=True)
    answer = t.ok(t.call(OS, Call.SPM_ID_GET), "asks")
    t.equal(answer[2:8], (SPMC_ID, 0, 0, 0, 0, 0), "the SPMC's id")


@case(TFA_SETUP)
def test_ffa_partition_info(t: Run) -> None:
    t.restart(host=True)
    for uuid, expected in (*((UUID(int=sp), (sp,)) for sp in SPS), (messages.NIL, SPS)):
        answer = t.ok(t.call(OS, Call.PARTITION_INFO_GET, *messages.uuid_to_words(uuid)), f"asks for {uuid}")
        t.equal(answer[2:4], (len(expected), 24), "how many there are, and the bytes of each")
        found = messages.parse_infos(t.endpoint(OS).got(24 * answer[2]), answer[2], VERSION_1_2)
        for info, sp in zip(found, expected, strict=True):
            told = (info.id, info.contexts, info.properties)
            endpoint = t.endpoint(sp)
            t.equal(told, (sp, endpoint.contexts, endpoint.properties), f"partition {sp:#x} as it is")
            t.true(bool(info.properties & Property.AARCH64), "which runs in AArch64")
            t.equal(info.uuid, endpoint.uuid if uuid == messages.NIL else messages.NIL, "its UUID, if it was not named")
        t.ok(t.call(OS, Call.RX_RELEASE), "releases RX")


# -- SMCCC

_KEPT = tuple(0xFEED_0000_0000_0000 | n for n in range(10))
"""What a caller has in x8 to x17."""


def _full(call: Call, *arguments: int, smc64: bool | None = None) -> Frame:
    frame = Frame.of(call, *arguments, smc64=smc64)
    return Frame(*frame[:8], *_KEPT)


@case(TFA_SMCCC)
def test_smccc_callee_preserved(t: Run) -> None:
    for id in (1, 5, SPS[0]):
        for what, frame in (
            ("FFA_ID_GET", _full(Call.ID_GET)),
            ("FFA_VERSION", _full(Call.VERSION, t.endpoint(id).version)),
            ("FFA_FEATURES", _full(Call.FEATURES, fid(Call.RXTX_MAP, True))),
            ("FFA_RX_RELEASE, refused", _full(Call.RX_RELEASE)),
            ("FFA_MEM_SHARE, refused", _full(Call.MEM_SHARE, smc64=True)),
            ("no function at all", Frame(0x8400_00EE, *_full(Call.ID_GET)[1:])),
        ):
            t.equal(t.endpoint(id).send(frame)[8:], _KEPT, f"{what}: {id:#x} has x8 to x17 as they were")
    for sender, receiver in ((1, SPS[0]), (1, 2), (SPS[0], SPS[1])):
        server = t.endpoint(receiver)
        for smc64 in (False, True):
            request = _full(Call.MSG_SEND_DIRECT_REQ, sender << 16 | receiver, 0, 1, 2, 3, 4, 5, smc64=smc64)
            server.answers.append(Frame(*respond(request, 6)[:8], *([0xBAD] * 10)))
            answer = t.endpoint(sender).send(request)
            t.equal(answer[8:], _KEPT, "a direct request: the sender has x8 to x17 as they were")
            t.equal(server.asked[-1][8:], (0,) * 10, "the receiver sees none of them")
            t.equal(answer[3:8], (6, 0, 0, 0, 0), "the answer is there")


@case(TFA_SMCCC)
def test_smccc_ext_callee_preserved(t: Run) -> None:
    for id in (1, SPS[0]):
        endpoint = t.endpoint(id)
        answer = endpoint.send(_full(Call.PARTITION_INFO_GET_REGS))
        t.is_call(answer, Call.SUCCESS, "FFA_PARTITION_INFO_GET_REGS", smc64=True)
        t.equal((answer[1], answer[2] >> 48), (0, 24), "entries of 24 bytes")
        t.true(answer[8:] != _KEPT, "it tells in x8 to x17 too", answer)
        refused = endpoint.send(_full(Call.PARTITION_INFO_GET_REGS, 1, 1))
        t.fails(refused, INVALID, "refused")
        t.equal(refused[8:], _KEPT, "x8 to x17 are as they were")
        text = endpoint.send(Frame.of(Call.CONSOLE_LOG, 128, *[0x4141_4141_4141_4141] * 16, smc64=True))
        t.ok(text, "FFA_CONSOLE_LOG, of x2 to x17")
        t.equal(text[8:], (0x4141_4141_4141_4141,) * 10, "x8 to x17 are as they were")


# -- memory sharing


def _to_partition(t: Run, call: Call) -> None:
    """The operating system sends, the partition works on it and, but for a donation, gives it back."""
    t.restart(host=True)
    for count in (1, 5):
        ranges, right = t.fresh(OS, count), t.transaction(call, OS, SPS[0])
        for address, _ in ranges:
            t.machine.write(OS, address, b"seen")
        sent = t.begun(t.send(call, right, ranges), call, right, ranges)
        t.has(OS, sent, RW if call is SHARE else NONE, "when it has sent")
        t.retrieved(sent, SPS[0])
        for page in sent.pages:
            t.equal(t.machine.read(SPS[0], page, 4), b"seen", "the partition reads it")
            t.machine.write(SPS[0], page, b"done")
        if call is DONATE:
            t.fails(t.reclaim(sent), INVALID, "what is donated is reclaimed")
            t.alone(sent, SPS[0])
            continue
        t.end(sent, SPS[0])
        t.equal({t.machine.read(OS, page, 4) for page in sent.pages}, {b"done"}, "the partition's work is seen")


register(TFA_MEMORY, "test_mem_share_sp", partial(_to_partition, call=SHARE))
register(TFA_MEMORY, "test_mem_lend_sp", partial(_to_partition, call=LEND))
register(TFA_MEMORY, "test_mem_donate_sp", partial(_to_partition, call=DONATE))


@case(TFA_MEMORY)
def test_mem_share_to_sp_clear_memory(t: Run) -> None:
    t.restart(host=True)
    start = t.fresh(OS, 4)[0][0]
    ranges = [(start, 4), (start + 6 * PAGE_SIZE, 1)]
    for address, count in ranges:
        t.machine.write(OS, address, b"s" * count * PAGE_SIZE)
    right = t.transaction(LEND, OS, SPS[0], flags=FLAG_CLEAR)
    sent = t.begun(t.send(LEND, right, ranges), LEND, right, ranges)
    found = t.retrieved(sent, SPS[0], flags=FLAG_CLEAR)
    t.true(bool(found.flags & FLAG_CLEAR), "the partition is told that it was cleared")
    t.equal({t.machine.read(SPS[0], page, PAGE_SIZE) for page in sent.pages}, {bytes(PAGE_SIZE)}, "it was, all of it")
    t.end(sent, SPS[0])


def _between_partitions(t: Run, call: Call, normal: bool = False) -> None:
    """A partition sends to another; ``normal``: normal-world memory that it owns, at a high address."""
    t.restart(host=True)
    sender, receiver = SPS[0], SPS[1]
    ranges = t.fresh(sender, 2)
    if normal:
        t.machine.add(sender, 0x0880_8000_0000, 16)
        ranges = [(0x0880_8000_1000, 2)]
    right = t.transaction(call, sender, receiver)
    sent = t.begun(t.send(call, right, ranges), call, right, ranges)
    found = t.retrieved(sent, receiver)
    t.equal(bool(found.attributes & 0x40), normal, "the NS bit tells of the memory's world")
    t.has(receiver, sent, RW, "when it has retrieved")
    t.has(sender, sent, RW if call is SHARE else NONE, "when it has sent")
    if call is DONATE:
        t.alone(sent, receiver)
    else:
        t.end(sent, receiver)


for _name, _call in SENDS.items():
    register(TFA_MEMORY, f"test_req_mem_{_name}_sp_to_sp", partial(_between_partitions, call=_call))
register(TFA_MEMORY, "test_req_ns_mem_share_sp_to_sp", partial(_between_partitions, call=SHARE, normal=True))


def _to_normal_world(t: Run, call: Call) -> None:
    t.restart(host=True)
    for sp in SPS[:2]:
        ranges = t.fresh(sp)
        t.fails(t.send(call, t.transaction(call, sp, OS), ranges), DENIED, "secure memory for the normal world")
        t.unchanged(sp, ranges, "secure memory for the normal world")


register(TFA_MEMORY, "test_req_mem_share_sp_to_vm", partial(_to_normal_world, call=SHARE))
register(TFA_MEMORY, "test_req_mem_lend_sp_to_vm", partial(_to_normal_world, call=LEND))


@case(TFA_MEMORY)
def test_share_forbidden_ranges(t: Run) -> None:
    t.restart(host=True)
    right = t.transaction(SHARE, OS, SPS[0])
    for what, address in (
        ("of the receiver", memory_of(SPS[0]) + 0x8000),
        ("of another partition", memory_of(SPS[1]) + 0x8000),
        ("that there is not", UNBACKED),
        ("beyond what the machine has", 0x8800_8000_1000),
    ):
        t.fails(t.send(SHARE, right, [(address, 1)]), DENIED, f"memory {what}")
        t.fails(t.send(SHARE, right, [*t.fresh(OS), (address, 1)]), DENIED, f"a page, and memory {what}")


@case(TFA_MEMORY)
def test_consecutive_donate(t: Run) -> None:
    t.restart(host=True)
    sent = t.sent(DONATE, OS, SPS[0])
    t.retrieved(sent, SPS[0])
    for to in SPS[:2]:
        t.fails(t.send(DONATE, t.transaction(DONATE, OS, to), sent.ranges), DENIED, f"donated again, to {to:#x}")
    t.alone(sent, SPS[0])


def _described(t: Run, sent: Sent) -> None:
    """A hypervisor asks what it has sent, naming no receiver: all that was said, and nothing is changed by it."""
    request = abi.Transaction(OS, (), handle=sent.handle)
    for _ in range(2):
        first, blob = t.endpoint(OS).retrieve(request)
        t.is_call(first, Call.MEM_RETRIEVE_RESP, "a hypervisor asks what was sent")
        t.equal(len(blob), first[1], "all fragments come")
        found = abi.parse(blob, VERSION_1_2)
        told = (found.sender, found.attributes, found.flags, found.handle, found.tag, found.entry_size)
        right = sent.transaction
        flags = TRANSACTION_TYPES[sent.call] << FLAG_TYPE_SHIFT
        t.equal(told, (OS, right.attributes, flags, sent.handle, right.tag, 32), "the transaction as it was sent")
        at = 48 + 32 * len(right.receivers)
        expected = [(r.endpoint, r.permissions, r.flags, r.impdef, at) for r in right.receivers]
        receivers = [(r.endpoint, r.permissions, r.flags, r.impdef, r.composite) for r in found.receivers]
        t.equal(receivers, expected, "the receivers as they were named")
        whole = abi.parse_composite(blob, at)
        t.equal((whole.pages, whole.count), (len(sent.pages), len(sent.ranges)), "how many pages and ranges")
        t.equal(abi.parse_ranges(blob[whole.ranges :]), sent.ranges, "the ranges")


def _hypervisor_retrieves(t: Run, call: Call, receivers: int = 1, count: int = 1) -> None:
    t.restart(hypervisor=True)
    ranges, right = t.fresh(OS, count), t.transaction(call, OS, *SPS[:receivers], tag=0x77)
    sent = t.begun(t.endpoint(OS).send_memory(call, right, ranges), call, right, ranges)
    _described(t, sent)
    t.retrieved(sent, SPS[0])
    if call is DONATE:
        gone = abi.Transaction(OS, (), handle=sent.handle)
        t.fails(t.endpoint(OS).retrieve(gone)[0], INVALID, "what is donated is nobody's transaction")
        return
    t.fails(t.reclaim(sent), DENIED, "a partition has it")
    t.ok(t.relinquish(SPS[0], sent.handle), "the partition relinquishes")
    t.ok(t.reclaim(sent), "reclaims")
    t.fails(t.endpoint(OS).retrieve(abi.Transaction(OS, (), handle=sent.handle))[0], INVALID, "it is reclaimed")


_LONG = 200
"""Ranges of a description that does not fit RX in one piece, together with those of a second page of it."""
for _name, _call in SENDS.items():
    register(TFA_MEMORY, f"test_hypervisor_{_name}_retrieve", partial(_hypervisor_retrieves, call=_call))
for _name, _call in (("share", SHARE), ("lend", LEND)):
    _id = f"test_hypervisor_{_name}_retrieve"
    register(TFA_MEMORY, f"{_id}_multiple_receivers", partial(_hypervisor_retrieves, call=_call, receivers=2))


def _hypervisor_retrieves_in_fragments(t: Run, call: Call) -> None:
    """As many ranges as two TX buffers hold: sent in fragments, and described in fragments."""
    t.restart(hypervisor=True)
    ranges, right = t.fresh(OS, 2 * _LONG), t.transaction(call, OS, SPS[0])
    sent = t.begun(t.endpoint(OS).send_memory(call, right, ranges), call, right, ranges)
    _described(t, sent)
    t.ok(t.reclaim(sent), "reclaims")


for _name, _call in (("share", SHARE), ("lend", LEND)):
    _id = f"test_hypervisor_{_name}_retrieve_fragmented"
    register(TFA_MEMORY, _id, partial(_hypervisor_retrieves_in_fragments, call=_call))


@case(TFA_MEMORY)
def test_ffa_memory_retrieve_request_from_vm(t: Run) -> None:
    t.restart(hypervisor=True)
    right, start = t.transaction(SHARE, OS, 1, SPS[1]), t.fresh(OS, 4)[0][0]
    ranges = [(start, 4), (start + 6 * PAGE_SIZE, 1)]
    sent = t.begun(t.send(SHARE, right, ranges), SHARE, right, ranges)
    answer = t.retrieve(t.request(sent, 1), OS)
    t.is_call(answer, Call.MEM_RETRIEVE_RESP, "a hypervisor retrieves for a VM")
    found = abi.parse(t.response, VERSION_1_2)
    t.equal([r.endpoint for r in found.receivers], [1], "the response is for the VM")
    t.fails(t.reclaim(sent), DENIED, "the VM has it")
    twice = t.endpoint(OS)
    for code in (None, INVALID):
        twice.put(abi.build_relinquish(sent.handle, 1))
        gone = twice.call(Call.MEM_RELINQUISH)
        if code is None:
            t.ok(gone, "it relinquishes for the VM")
        else:
            t.fails(gone, code, "twice")
    t.retrieved(sent, SPS[1])
    t.fails(t.reclaim(sent), DENIED, "the partition has it")
    t.ok(t.relinquish(SPS[1], sent.handle), "the partition relinquishes")
    t.ok(t.reclaim(sent), "reclaims")
