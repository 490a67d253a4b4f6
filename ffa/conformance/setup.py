"""Setup and discovery."""

from __future__ import annotations

from uuid import UUID

from ffa.abi import messages
from ffa.abi.frame import Frame
from ffa.abi.ids import PAGE_SIZE, SPMC_ID, VERSION_1_0, VERSION_1_1, VERSION_1_2, Call, Error, Feature, fid, is_secure
from ffa.conformance.bench import EL0, SPS, UNBACKED, VMS, memory_of
from ffa.conformance.registry import SETUP, case
from ffa.conformance.run import Run
from ffa.roles.endpoint import respond

NOT_SUPPORTED = Error.NOT_SUPPORTED & 0xFFFF_FFFF
MANDATORY = (
    *(Call.ERROR, Call.SUCCESS, Call.VERSION, Call.FEATURES, Call.ID_GET, Call.RXTX_MAP, Call.RXTX_UNMAP),
    *(Call.RX_RELEASE, Call.PARTITION_INFO_GET, Call.MSG_SEND_DIRECT_REQ, Call.MEM_SHARE, Call.MEM_RETRIEVE_REQ),
    *(Call.MEM_RELINQUISH, Call.MEM_RECLAIM, Call.MSG_SEND_DIRECT_REQ2),
)
"""What VMs and partitions of a 1.2 system are told that there is."""
ONE_WORLD = {Call.MEM_PERM_GET: EL0, Call.MEM_PERM_SET: EL0, Call.NOTIFICATION_INFO_GET: 1}
"""Functions for one kind of caller → a caller of that kind."""


@case(SETUP)
def ffa_features(t: Run) -> None:
    for id in (1, SPS[0]):
        for call in MANDATORY:
            answer = t.call(id, Call.FEATURES, fid(call), 2)
            t.ok(answer, f"{id:#x} is told of FFA_{call.name}")
        for reserved in (0x8400_005F, 0x8400_00FF, 0xC400_0000 | Call.ID_GET):
            t.fails(t.call(id, Call.FEATURES, reserved), Error.NOT_SUPPORTED, f"no function {reserved:#x}")
        t.fails(t.call(id, Call.FEATURES, 0x7FFF), Error.NOT_SUPPORTED, "no such feature")
        for absent in (Call.RX_ACQUIRE, Call.NORMAL_WORLD_RESUME):
            t.fails(
                t.call(id, Call.FEATURES, fid(absent)), Error.NOT_SUPPORTED, f"FFA_{absent.name} is not for {id:#x}"
            )
        t.equal(t.call(id, Call.FEATURES, fid(Call.RXTX_MAP, True))[2] & 3, 0, "buffers are of 4 KiB pages")
    for call, caller in ONE_WORLD.items():
        other = SPS[0] if caller == 1 else 1
        t.ok(t.call(caller, Call.FEATURES, fid(call)), f"{caller:#x} is told of FFA_{call.name}")
        t.fails(t.call(other, Call.FEATURES, fid(call)), Error.NOT_SUPPORTED, f"{other:#x} is not told")
    t.fails(t.call(5, Call.FEATURES, fid(Call.MSG_SEND2)), Error.NOT_SUPPORTED, "a 1.0 caller has no FFA_MSG_SEND2")


@case(SETUP)
def ffa_features_intr(t: Run) -> None:
    for id, features, others in (
        (1, (Feature.SCHEDULE_RECEIVER,), (Feature.MANAGED_EXIT,)),
        (SPS[0], (Feature.NOTIFICATION_PENDING, Feature.MANAGED_EXIT), (Feature.SCHEDULE_RECEIVER,)),
        (EL0, (), tuple(Feature)),
    ):
        for feature in others:
            t.fails(t.call(id, Call.FEATURES, feature), Error.NOT_SUPPORTED, f"{id:#x} is not told of {feature.name}")
        for feature in features:
            answer = t.ok(t.call(id, Call.FEATURES, feature), f"{id:#x} is told of {feature.name}")
            t.true(0 <= answer[2] < 1020, "and which interrupt it is", answer)
            t.fails(t.call(id, Call.FEATURES, feature, 1), Error.NOT_SUPPORTED, "w2 must be zero")


@case(SETUP)
def ffa_features_nsbit(t: Run) -> None:
    function = fid(Call.MEM_RETRIEVE_REQ)
    for id in SPS:
        answer = t.ok(t.call(id, Call.FEATURES, function, 2), f"{id:#x} uses the NS bit")
        t.true(bool(answer[2] & 2), "the partition manager sets the NS bit", answer)
        t.fails(t.call(id, Call.FEATURES, function), Error.NOT_SUPPORTED, "a 1.1 partition must use it")
    t.ok(t.call(1, Call.FEATURES, function), "VMs need not use it")


@case(SETUP)
def ffa_version(t: Run) -> None:
    for id in (1, SPS[0]):
        for asked in (VERSION_1_0, VERSION_1_1, VERSION_1_2, 0x1_FFFF):
            t.restart(map_buffers=False)
            answer = t.call(id, Call.VERSION, asked)
            t.equal(answer, Frame(VERSION_1_2), f"{id:#x} asks for {asked:#x}")
        for asked in (0, 0x9, 0x2_0000, 0x7FFF_FFFF):
            answer = t.call(id, Call.VERSION, asked)
            t.true(answer in (Frame(VERSION_1_2), Frame(NOT_SUPPORTED)), f"{asked:#x} is not compatible", answer)
        for asked in (1 << 31, 1 << 31 | VERSION_1_2):
            t.equal(t.call(id, Call.VERSION, asked), Frame(NOT_SUPPORTED), "bit 31 must be zero")


@case(SETUP)
def ffa_version_negotiation(t: Run) -> None:
    t.restart(map_buffers=False)
    for id in (1, SPS[0]):
        t.equal(t.call(id, Call.VERSION, VERSION_1_0)[0], VERSION_1_2, "1.0 at first")
        t.equal(t.call(id, Call.VERSION, VERSION_1_1)[0], VERSION_1_2, "then 1.1, before any other call")
        t.fails(
            t.call(id, Call.MSG_SEND_DIRECT_REQ2, id << 16 | 2), Error.NOT_SUPPORTED, "a 1.1 caller has no DIRECT_REQ2"
        )
        t.equal(t.call(id, Call.VERSION, VERSION_1_2)[0], NOT_SUPPORTED, "after another call the version stays")
        t.equal(t.call(id, Call.VERSION, VERSION_1_1)[0], VERSION_1_2, "and may be asked for again")


@case(SETUP)
def ffa_id_get(t: Run) -> None:
    for id in t.bench.endpoints:
        answer = t.ok(t.call(id, Call.ID_GET), f"{id:#x} asks for its id")
        t.equal(answer[2:8], (id, 0, 0, 0, 0, 0), "it is told its own")


@case(SETUP)
def ffa_spm_id_get(t: Run) -> None:
    for id in (1, *SPS):
        t.equal(t.ok(t.call(id, Call.SPM_ID_GET), f"{id:#x} asks")[2], SPMC_ID, "the SPMC's id")
    t.fails(t.call(5, Call.SPM_ID_GET), Error.NOT_SUPPORTED, "a 1.0 caller has no FFA_SPM_ID_GET")


def _infos(t: Run, id: int, uuid: UUID = messages.NIL) -> list[messages.PartitionInfo]:
    answer = t.ok(t.call(id, Call.PARTITION_INFO_GET, *messages.uuid_to_words(uuid)), f"{id:#x} asks for {uuid}")
    version = t.endpoint(id).version
    size = messages.info_size(version)
    t.equal(answer[3], size if version >= VERSION_1_1 else 0, "the size of an entry")
    found = messages.parse_infos(t.endpoint(id).got(answer[2] * size), answer[2], version)
    t.ok(t.call(id, Call.RX_RELEASE), "releases RX")
    return found


@case(SETUP)
def ffa_partition_info_get(t: Run) -> None:
    get = Call.PARTITION_INFO_GET
    for id in (1, 4, 5):
        found = _infos(t, id)
        t.equal({p.id for p in found}, {*VMS, *SPS}, "VMs are told of VMs and partitions")
        if id != 5:
            t.equal({p.id: p.uuid for p in found}, {n: UUID(int=n) for n in (*VMS, *SPS)}, "and of their UUIDs")
        t.equal([p.id for p in _infos(t, id, UUID(int=SPS[1]))], [SPS[1]], "who asks for one is told of that")
        t.equal([p.id for p in _infos(t, id, UUID(int=2))], [2], "be it a partition or a VM")
    t.equal({p.id for p in _infos(t, SPS[0])}, set(SPS), "partitions are told of partitions")
    contexts = {p.id: p.contexts for p in _infos(t, 1)}
    t.equal((contexts[1], contexts[EL0]), (2, 1), "the number of execution contexts")
    for id, count in ((1, len(VMS) + len(SPS)), (SPS[0], len(SPS))):
        t.equal(t.ok(t.call(id, get, 0, 0, 0, 0, 1), "counts them")[2], count, "the number of partitions")
        t.fails(t.call(id, get, 1, 2, 3, 4), Error.INVALID_PARAMETERS, "an unknown UUID")
        t.fails(t.call(id, get, 0, 0, 0, 0, 2), Error.INVALID_PARAMETERS, "reserved flags")
        t.ok(t.call(id, get), "fills RX")
        t.fails(t.call(id, get), Error.BUSY, "RX is not released")
        t.ok(t.call(id, Call.RX_RELEASE), "releases RX")
    t.fails(t.call(5, get, 0, 0, 0, 0, 1), Error.INVALID_PARAMETERS, "a 1.0 caller has no flags")
    t.ok(t.call(1, Call.RXTX_UNMAP), "unmaps its buffers")
    t.refused(t.call(1, get), "without RX")


@case(SETUP)
def ffa_partition_info_get_regs(t: Run) -> None:
    get = Call.PARTITION_INFO_GET_REGS
    for id, expected in ((1, {*VMS, *SPS}), (SPS[0], set(SPS))):
        found: list[messages.PartitionInfo] = []
        last = 0
        while len(found) <= last:
            answer = t.is_call(t.call(id, get, 0, 0, len(found)), Call.SUCCESS, f"{id:#x} asks for more", smc64=True)
            more, last = messages.infos_from_registers(answer, len(found))
            t.true(bool(more), "an answer has entries")
            found += more
        t.equal({p.id: p.uuid for p in found}, {n: UUID(int=n) for n in expected}, "all are told, with UUIDs")
        one = t.call(id, get, *messages.uuid_to_halves(UUID(int=SPS[0])))
        (only,), last = messages.infos_from_registers(one, 0)
        t.equal((only.id, only.uuid, last), (SPS[0], messages.NIL, 0), "one, by its UUID")
        t.fails(t.call(id, get, 0, 0, 99), Error.INVALID_PARAMETERS, "an index beyond the last")
        t.fails(t.call(id, get, 1, 1), Error.INVALID_PARAMETERS, "an unknown UUID")
        t.fails(t.call(id, get, 0, 0, 1 << 16), Error.RETRY, "a tag that was never given")
    t.fails(t.call(4, get), Error.NOT_SUPPORTED, "a 1.1 caller has no FFA_PARTITION_INFO_GET_REGS")


@case(SETUP)
def ffa_partition_info_get_lsp(t: Run) -> None:
    t.restart(map_buffers=False)
    for id in (1, SPS[0]):
        answer = t.call(id, Call.PARTITION_INFO_GET_REGS, *messages.uuid_to_halves(UUID(int=EL0)))
        t.is_call(answer, Call.SUCCESS, "who has no buffers asks for a partition that has none", smc64=True)
        (found,), _ = messages.infos_from_registers(answer, 0)
        t.equal((found.id, found.contexts), (EL0, 1), "its id and contexts")
        t.equal(found.properties, t.endpoint(EL0).properties, "its properties")


@case(SETUP)
def ffa_rx_release(t: Run) -> None:
    for id in (1, 4, 5, SPS[0]):
        t.fails(t.call(id, Call.RX_RELEASE), Error.DENIED, f"{id:#x} does not have RX")
        t.ok(t.call(id, Call.PARTITION_INFO_GET), "fills RX")
        t.ok(t.call(id, Call.RX_RELEASE), "releases it")
        t.fails(t.call(id, Call.RX_RELEASE), Error.DENIED, "releases it twice")
    t.refused(t.call(1, Call.RX_RELEASE, 2), "VM 1 releases the RX of VM 2")


@case(SETUP)
def ffa_rxtx_map_and_unmap(t: Run) -> None:
    t.restart(map_buffers=False)
    for id in (1, 5, SPS[0]):
        base = memory_of(id)
        t.fails(t.call(id, Call.RXTX_UNMAP), Error.INVALID_PARAMETERS, f"{id:#x} has none to unmap")
        for what, tx, rx, pages in (
            ("TX is not page-aligned", base + 0x800, base + 0x1000, 1),
            ("RX is not page-aligned", base, base + 0x1010, 1),
            ("one buffer for both", base, base, 1),
            ("buffers that overlap", base, base + 0x1000, 2),
            ("no pages", base, base + 0x1000, 0),
        ):
            answer = t.call(id, Call.RXTX_MAP, tx, rx, pages, smc64=True)
            t.fails(answer, Error.INVALID_PARAMETERS, what)
        nowhere = t.call(id, Call.RXTX_MAP, UNBACKED, UNBACKED + 0x1000, 1, smc64=True)
        t.fails(nowhere, Error.INVALID_PARAMETERS, "no memory", Error.DENIED)
        t.ok(t.call(id, Call.RXTX_MAP, base, base + PAGE_SIZE, 1, smc64=False), "maps by SMC32")
        again = t.call(id, Call.RXTX_MAP, base + 0x2000, base + 0x3000, 1, smc64=True)
        t.fails(again, Error.DENIED, "maps twice")
        t.refused(t.call(id, Call.RXTX_UNMAP, 2 << 16), "unmaps another's")
        t.ok(t.call(id, Call.RXTX_UNMAP), "unmaps")
        t.fails(t.call(id, Call.RXTX_UNMAP), Error.INVALID_PARAMETERS, "unmaps twice")
        t.ok(t.endpoint(id).map_buffers(base + 0x2000, base + 0x4000, 2), "maps others, by SMC64")
        t.ok(t.call(id, Call.PARTITION_INFO_GET), "they are used")


@case(SETUP)
def rxtx_exclusive_access(t: Run) -> None:
    for id, to in ((1, SPS[0]), (1, 2), (SPS[0], SPS[1])):
        t.restart()
        base = memory_of(id)
        for what, address in (("TX", base), ("RX", base + PAGE_SIZE)):
            answer = t.send(Call.MEM_SHARE, t.transaction(Call.MEM_SHARE, id, to), [(address, 1)])
            t.fails(answer, Error.DENIED, f"{id:#x} shares its {what}")
        sent = t.sent(Call.MEM_SHARE, id, to)
        lent = t.sent(Call.MEM_LEND, id, to)
        t.ok(t.call(id, Call.RXTX_UNMAP), "unmaps")
        for what, address in (
            ("that is shared", sent.address),
            ("that is lent", lent.address),
            ("of another", memory_of(to) + 0x8000),
            ("of the other world", memory_of(1 if is_secure(id) else SPS[2]) + 0x8000),
        ):
            for tx, rx in ((address, base), (base, address), (address, address + PAGE_SIZE)):
                answer = t.call(id, Call.RXTX_MAP, tx, rx, 1, smc64=True)
                t.fails(answer, Error.INVALID_PARAMETERS, f"a buffer in memory {what}")
        t.ok(t.endpoint(id).map_buffers(base, base + PAGE_SIZE), "maps its own")
    t.restart()
    t.ok(t.call(1, Call.PARTITION_INFO_GET), "RX is full")
    before = t.endpoint(1).got(24)
    t.refused(t.call(1, Call.PARTITION_INFO_GET), "nobody writes to it")
    t.equal(t.endpoint(1).got(24), before, "its bytes stay")


@case(SETUP)
def ffa_msg_wait_rx_buff_rel(t: Run) -> None:
    for id in (1, SPS[0]):
        t.ok(t.call(id, Call.PARTITION_INFO_GET), "RX is full")
        t.is_call(t.call(id, Call.MSG_WAIT, 0, 1), Call.INTERRUPT, f"{id:#x} waits and keeps RX")
        t.ok(t.call(id, Call.RX_RELEASE), "it still had RX")
        t.ok(t.call(id, Call.PARTITION_INFO_GET), "RX is full")
        t.is_call(t.call(id, Call.MSG_WAIT), Call.INTERRUPT, "waits")
        t.fails(t.call(id, Call.RX_RELEASE), Error.DENIED, "that released RX")
        t.refused(t.call(id, Call.MSG_WAIT, 1), "reserved registers")


@case(SETUP)
def ffa_console_log(t: Run) -> None:
    for id in (1, SPS[0]):
        t.ok(t.call(id, Call.FEATURES, fid(Call.CONSOLE_LOG)), "there is FFA_CONSOLE_LOG")
        t.ok(t.call(id, Call.CONSOLE_LOG, 5, 0x6C6C6568, 0x6F), "five characters")
        t.ok(t.call(id, Call.CONSOLE_LOG, 24, *[0x41414141] * 6), "as many as SMC32 has")
        t.ok(t.call(id, Call.CONSOLE_LOG, 128, *[0x41] * 16, smc64=True), "as many as SMC64 has")
        for count, smc64 in ((0, False), (25, False), (0, True), (129, True)):
            answer = t.call(id, Call.CONSOLE_LOG, count, smc64=smc64)
            t.fails(answer, Error.INVALID_PARAMETERS, f"{count} characters")
    t.fails(t.call(4, Call.CONSOLE_LOG, 1, 0x41), Error.NOT_SUPPORTED, "a 1.1 caller has no FFA_CONSOLE_LOG")


@case(SETUP)
def mp_execution_contexts(t: Run) -> None:
    sp = t.endpoint(SPS[0])
    request = Frame.of(Call.MSG_SEND_DIRECT_REQ, 1 << 16 | SPS[0], 0, 7)
    sp.answers.append(Frame.of(Call.YIELD))
    t.is_call(t.endpoint(1).send(request, 0), Call.YIELD, "vCPU 0's request is not finished")
    t.is_call(t.endpoint(1).send(request, 1), Call.MSG_SEND_DIRECT_RESP, "vCPU 1 has another context")
    t.fails(t.endpoint(2).send(request, 0), Error.INVALID_PARAMETERS, "in another's name")
    other = t.call(2, Call.MSG_SEND_DIRECT_REQ, 2 << 16 | SPS[0])
    t.fails(other, Error.BUSY, "the first context is not free")
    sp.answers.append(respond(request, 9))
    t.equal(t.call(1, Call.RUN, SPS[0] << 16), respond(request, 9), "run again, it answers")


@case(SETUP)
def up_migrate_capable(t: Run) -> None:
    for vcpu in (0, 1, 0):
        answer = t.call(1, Call.MSG_SEND_DIRECT_REQ, 1 << 16 | EL0, 0, vcpu, vcpu=vcpu)
        t.is_call(answer, Call.MSG_SEND_DIRECT_RESP, f"a partition with one context is asked from vCPU {vcpu}")
        t.equal(answer[3], vcpu, "it answers")
