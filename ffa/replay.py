"""Holds a recorded session of a normal world with real firmware against our SPMC.

The calls that came from the normal world (NS) drive the model; each answer is compared, register by register, on both
legs of its way back (S to EL3, EL3 to NS). What the model cannot know is taken from the trace, and counted: w3 to w7 of
the partition's direct responses, new memory handles, ranges that were not recorded, and that the partition raised a
notification that is bound. A record is a line of JSON: ``t``, ``cpu``, ``from``, ``to``, ``call``, ``x`` (8 or 18
registers in hex), and perhaps ``mem`` (bytes that were in a buffer then) and ``note``.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, halves, pair
from ffa.abi.ids import (
    ATTRIBUTES_NORMAL,
    BY_FID,
    HANDLE_HYPERVISOR_BIT,
    PAGE_SIZE,
    SMC32_BASE,
    SMC64_BASE,
    SPMC_ID,
    SPMD_ID,
    Call,
    FfaError,
    Property,
    fid,
    name,
)
from ffa.roles.endpoint import Endpoint, respond, response_to
from ffa.roles.machine import Machine
from ffa.roles.mailbox import Mailbox
from ffa.roles.profile import OPTEE_4_10, Profile
from ffa.roles.spmc import Spmc
from ffa.roles.transactions import Lending, Region

OPTEE_UUID = UUID("486178e0-e7f8-11e3-bc5e-0002a5d5c51b")
OPTEE_ID = 0x8001
OPTEE_CONTEXTS = 4
OPTEE_PROPERTIES = Property.DIRECT_REQ_RECV | Property.DIRECT_REQ_SEND | Property.AARCH64

NORMAL_MEMORY = 1 << 40
"""Bytes from address 0 that the normal world may name."""
UNRECORDED = 1 << 39
"""Where ranges are put whose addresses were not recorded."""

_SENDS = (Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE)
_SPMD_VERSION_RESP = 0x8000_0009


class TraceError(ValueError):
    """A trace cannot be read; the text says where and why."""


@dataclass(frozen=True, slots=True)
class Record:
    """One line of a trace."""

    where: str  #: file and line
    time: float
    cpu: int
    source: str
    target: str
    call: str
    x: tuple[int, ...]
    memory: tuple[tuple[str, bytes], ...] = ()

    @property
    def way(self) -> tuple[str, str]:
        """From whom to whom."""
        return self.source, self.target

    @property
    def frame(self) -> Frame:
        """The registers."""
        return Frame(*self.x)

    def bytes_of(self, what: str) -> bytes:
        """Recorded bytes of a kind, the first; empty if there are none."""
        return next((data for kind, data in self.memory if kind == what), b"")


def parse(lines: Iterable[str], file: str) -> list[Record]:
    """The records of one file. Raises TraceError."""
    out = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            out.append(_record(line, f"{file}:{number}"))
    return out


def _record(line: str, where: str) -> Record:
    try:
        d = json.loads(line)
        x = tuple(int(value, 16) if isinstance(value, str) else int(value) for value in d["x"])
        if not 1 <= len(x) <= 18 or any(not 0 <= value < 1 << 64 for value in x):
            raise ValueError("x has 1 to 18 registers of 64 bits")
        memory = tuple((str(m["what"]), bytes.fromhex(m["hex"])) for m in d.get("mem", ()))
        return Record(where, float(d["t"]), int(d["cpu"]), str(d["from"]), str(d["to"]), str(d["call"]), x, memory)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as e:
        raise TraceError(f"{where}: no record of a call: {type(e).__name__} {e}") from None


@dataclass(slots=True)
class Exchange:
    """A call from the normal world, and what came of it on its CPU until it was answered."""

    request: Record
    inner: list[Record] = field(default_factory=list)
    answer: Record | None = None
    done: int = 0  #: position in the trace of when the secure world had answered

    def relayed(self, way: tuple[str, str]) -> Record | None:
        """The first record between that went this way and is part of the call: interrupts come and go within one."""
        return next((r for r in self.inner if r.way == way and r.x[0] not in _INTERRUPTED), None)

    def bytes_of(self, what: str) -> bytes:
        """Bytes recorded with the call."""
        return next((data for r in (self.request, *self.inner) if (data := r.bytes_of(what))), b"")


@dataclass(frozen=True, slots=True)
class Difference:
    """Where firmware and model disagree."""

    where: str  #: file and line of the record
    call: str
    what: str  #: "answer", "relayed answer", "relayed call", "bytes", "name", "boot"
    recorded: str
    computed: str


@dataclass(slots=True)
class Report:
    """What came of a replay."""

    calls: int = 0  #: from the normal world, answered
    matched: int = 0
    unanswered: int = 0  #: the trace ends before their answer
    computed: int = 0  #: values of answers that the model gave
    from_trace: int = 0  #: values that it took from the trace
    differences: list[Difference] = field(default_factory=list)
    by_call: dict[str, Counter[str]] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """The contract of ``ffa replay --json``."""
        return {
            "calls": self.calls,
            "matched": self.matched,
            "unanswered": self.unanswered,
            "computed": self.computed,
            "from_trace": self.from_trace,
            "differences": [
                {"where": d.where, "call": d.call, "what": d.what, "recorded": d.recorded, "computed": d.computed}
                for d in self.differences
            ],
            "by_call": {call: dict(counts) for call, counts in sorted(self.by_call.items())},
            "answers": self.answers,
        }


class _Partition(Endpoint):
    """OP-TEE, which says what it said; it holds the memory that requests name until it is told to let go."""

    words: tuple[int, ...] = ()

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        if response_to(frame.fid) is None:
            return Frame.of(Call.MSG_WAIT)
        return respond(frame, *self.words)


class _Model:
    """Our SPMC with OP-TEE's partition, from boot on."""

    def __init__(self, profile: Profile, cpus: int) -> None:
        self.machine = Machine()
        self.machine.add(0, 0, NORMAL_MEMORY // PAGE_SIZE)
        self.spmc = Spmc(self.machine, profile, handles=self._handle)
        self.os = Endpoint(0, self.machine, contexts=cpus, version=profile.version)
        self.spmc.attach(self.os)
        self.partition = _Partition(
            OPTEE_ID, self.machine, uuid=OPTEE_UUID, contexts=OPTEE_CONTEXTS, properties=OPTEE_PROPERTIES
        )
        self.spmc.add(self.partition)
        self.offered: int | None = None  #: a handle that the firmware gave
        self.taken = False  #: it was needed
        self._own = 0
        self.missing: dict[int, tuple[int, int]] = {}  #: handle → ranges, pages whose fragments were not recorded

    @property
    def regions(self) -> dict[int, Region]:
        """What is shared."""
        return self.spmc.transactions.regions

    def _handle(self) -> int:
        offered = self.offered
        if offered is not None and offered not in self.regions and offered < HANDLE_HYPERVISOR_BIT:
            self.taken = True
            return offered
        self._own += 1
        return 1 << 62 | self._own

    def fill_tx(self, data: bytes) -> None:
        """Puts what the normal world had in its TX there."""
        box = self.spmc.served[0].mailbox
        if box is not None:
            self.machine.store(box.tx, data[: box.size])

    def hold(self, handle: int) -> None:
        """The partition uses a region that it has been sent."""
        region = self.regions.get(handle)
        if region is not None and region.complete and OPTEE_ID in region.borrowers:
            try:
                self.spmc.transactions.lend(region, OPTEE_ID, 0)
            except FfaError:
                return  # it has it already

    def let_go(self, handle: int) -> None:
        """The partition was told to let go of it, and did."""
        region = self.regions.get(handle)
        if region is not None and OPTEE_ID in region.borrowers:
            self.spmc.transactions.let_go(region, OPTEE_ID)


class Replay:
    """One session: :meth:`run` it, then read :attr:`report`."""

    def __init__(self, records: Sequence[Record], profile: Profile = OPTEE_4_10) -> None:
        self.records = records
        self.profile = profile
        self.report = Report()
        self.cpus = min(1 + max((r.cpu for r in records if r.cpu >= 0), default=0), 1024)
        self.model = _Model(profile, self.cpus)
        self._from_trace = 0

    def run(self) -> Report:
        """Replays every call in the order in which the secure world answered. Never raises for what a trace holds."""
        events = self._events()
        gets = [e for e, done in events if e is not None and done and e.request.frame.fid == _GET]
        for exchange, done in events:
            if exchange is None:
                self.model = _Model(self.profile, self.cpus)
            elif not done:
                self._use(exchange)
            else:
                while gets and gets[0].done < exchange.done:
                    del gets[0]
                self._judge(exchange, gets[0] if gets else None)
        return self.report

    def _events(self) -> list[tuple[Exchange | None, bool]]:
        """Calls, paired with their answers on each CPU for itself: when they were made (False), and when the secure
        world had answered (True); None where the machine was started anew."""
        open_calls: dict[int, Exchange] = {}
        boot: dict[int, Record] = {}
        out: list[tuple[float, Exchange | None, bool]] = []
        seen = False
        for position, record in enumerate(self.records):
            self._named(record)
            if record.way == ("S", "EL3") and record.x[0] == fid(Call.SPM_ID_GET) and record.cpu not in open_calls:
                if seen:
                    out.append((position - 0.5, None, True))
                    open_calls.clear()
                seen = False
            current = open_calls.get(record.cpu)
            if record.way == ("NS", "EL3"):
                seen = True
                if current is not None:
                    self.report.unanswered += 1
                open_calls[record.cpu] = Exchange(record, done=position)
                out.append((position, open_calls[record.cpu], False))
            elif current is None:
                self._boot(record, boot)
            elif record.way == ("EL3", "NS"):
                current.answer = record
                if current.relayed(("S", "EL3")) is None:
                    current.done = position
                out.append((current.done, current, True))
                del open_calls[record.cpu]
            else:
                current.inner.append(record)
                if record.way == ("S", "EL3"):
                    current.done = position
        self.report.unanswered += len(open_calls)
        out.sort(key=lambda item: item[0])
        return [(exchange, done) for _, exchange, done in out]

    # -- what is compared

    def _differ(self, record: Record, call: str, what: str, recorded: object, computed: object) -> None:
        self.report.differences.append(Difference(record.where, call, what, str(recorded), str(computed)))

    def _named(self, record: Record) -> None:
        """A record's name is that of its function. Calls that are not FF-A's (PSCI's, …) may have any other."""
        right = name(record.x[0] & 0xFFFF_FFFF)
        if record.call != right and (_is_ffa(record.x[0] & 0xFFFF_FFFF) or record.call.startswith("FFA_")):
            self._differ(record, record.call, "name", record.call, right)

    def _boot(self, record: Record, asked: dict[int, Record]) -> None:
        """What firmware's parts say to each other when no call from the normal world is open: SPMD's answers."""
        if record.way == ("S", "EL3"):
            asked[record.cpu] = record
        elif record.way == ("EL3", "S") and record.cpu in asked:
            computed = _BOOT.get(asked.pop(record.cpu).x[0])
            if computed is not None and record.x != computed[: len(record.x)]:
                self._differ(record, record.call, "boot", record.frame, computed)

    def _judge(self, exchange: Exchange, next_get: Exchange | None) -> None:
        request, recorded = exchange.request, exchange.answer
        frame = request.frame
        if recorded is None or not _is_ffa(frame.fid):
            return
        found = BY_FID.get(frame.fid)
        call = found[0].call if found else None
        secure = exchange.relayed(("S", "EL3")) or recorded
        self._from_trace = 0
        self._prepare(exchange, call, secure.frame, next_get)
        computed = self.model.spmc.call(0, frame, max(request.cpu, 0))
        if self.model.taken:
            self._from_trace += 2
        before = len(self.report.differences)
        self._compare_answers(exchange, call, secure, computed)
        if call is Call.PARTITION_INFO_GET:
            self._compare_bytes(exchange, computed)
        matched = len(self.report.differences) == before
        self._follow(call, frame, secure.frame, computed, matched)
        self._count(request, recorded, call, matched)

    def _compare_answers(self, exchange: Exchange, call: Call | None, secure: Record, computed: Frame) -> None:
        assert exchange.answer is not None
        legs = [("answer", exchange.answer, computed)]
        if secure is not exchange.answer:
            inner = computed
            if call is Call.VERSION:  # SPMD asks the SPMC by a framework message of its own
                version = computed[0]
                inner = Frame.of(Call.MSG_SEND_DIRECT_RESP, SPMC_ID << 16 | SPMD_ID, _SPMD_VERSION_RESP, version)
            legs.append(("relayed answer", secure, inner))
        forwarded = exchange.relayed(("EL3", "S"))
        if forwarded is not None and call is not Call.VERSION:
            legs.append(("relayed call", forwarded, exchange.request.frame))
        for what, record, expected in legs:
            if record.x != expected[: len(record.x)]:
                self._differ(record, name(exchange.request.frame.fid), what, record.frame, expected)

    def _compare_bytes(self, exchange: Exchange, computed: Frame) -> None:
        recorded = exchange.bytes_of("partition_info(rx)")
        box = self.model.spmc.served[0].mailbox
        if not recorded or box is None or not computed.ok:
            return
        data = self.model.machine.fetch(box.rx, min(len(recorded), box.size))
        if data != recorded:
            self._differ(exchange.request, exchange.request.call, "bytes", recorded.hex(), data.hex())

    def _count(self, request: Record, recorded: Record, call: Call | None, matched: bool) -> None:
        report = self.report
        taken = min(self._from_trace, len(recorded.x))
        computed = len(recorded.x) - taken
        report.calls += 1
        report.matched += matched
        report.computed += computed
        report.from_trace += taken
        label = name(request.frame.fid)
        counts = report.by_call.setdefault(label, Counter())
        counts.update(calls=1, matched=int(matched), computed=computed, from_trace=taken)
        report.answers.append(
            {"where": request.where, "call": label, "matched": matched, "computed": computed, "from_trace": taken}
        )

    # -- what comes from the trace

    def _prepare(self, exchange: Exchange, call: Call | None, secure: Frame, next_get: Exchange | None) -> None:
        """Gives the model what only the trace knows of this call."""
        model, frame = self.model, exchange.request.frame
        model.offered, model.taken, model.partition.words = None, False, ()
        if call in _SENDS:
            model.offered = _handle_in(secure)
            model.fill_tx(self._descriptor(exchange, frame))
        elif call is Call.MEM_FRAG_TX:
            model.fill_tx(self._fragment(exchange, frame))
        elif call is Call.MSG_SEND_DIRECT_REQ:
            if secure.fid == response_to(frame.fid):
                model.partition.words = tuple(secure[3:8])
                self._from_trace += 5
            self._let_go(frame, secure)
        elif call in (Call.NOTIFICATION_INFO_GET, Call.NOTIFICATION_GET) and secure.ok:
            self._raise(call, secure, next_get)

    def _descriptor(self, exchange: Exchange, frame: Frame) -> bytes:
        """The first fragment of a memory transaction: as recorded; what was not recorded of it is made up."""
        total, size = frame[1] & 0xFFFF_FFFF, min(frame[2] & 0xFFFF_FFFF, 1 << 20)
        data = exchange.bytes_of("mem_op_desc(rxbuf)")[:size]
        version = self.model.spmc.served[0].version
        if not data:
            head = abi.Transaction(0, (abi.Receiver(OPTEE_ID, 2),), ATTRIBUTES_NORMAL)
            count = max(total - len(abi.build(version, head, ())), 0) // abi.RANGE_SIZE
            ranges = [(UNRECORDED + 2 * n * PAGE_SIZE, 1) for n in range(min(count, 1 << 16))]
            blob = abi.build(version, head, ranges)
            left = max(len(blob) - size, 0) // abi.RANGE_SIZE
            self.model.missing[-1] = (left, left)
            self._from_trace += 1
            return blob[:size]
        try:
            head = abi.parse(data, version)
            composite = abi.parse_composite(data, head.receivers[0].composite)
            whole = (len(data) - composite.ranges) // abi.RANGE_SIZE
            known = abi.parse_ranges(data[composite.ranges : composite.ranges + whole * abi.RANGE_SIZE])
        except (FfaError, IndexError):
            return data
        missing = (composite.count - len(known), composite.pages - sum(pages for _, pages in known))
        here = max(size - composite.ranges, 0) // abi.RANGE_SIZE - len(known)
        made, missing = _make_up(here, missing)
        self.model.missing[-1] = missing
        self._from_trace += bool(made)
        return data[: composite.ranges + len(known) * abi.RANGE_SIZE] + made

    def _fragment(self, exchange: Exchange, frame: Frame) -> bytes:
        """A further fragment; traces do not hold them."""
        size, handle = min(frame[3] & 0xFFFF_FFFF, 1 << 20), pair(frame[1], frame[2])
        recorded = exchange.bytes_of("mem_frag(rxbuf)")
        if recorded:
            return recorded[:size]
        made, missing = _make_up(size // abi.RANGE_SIZE, self.model.missing.get(handle, (0, 0)))
        self.model.missing[handle] = missing
        self._from_trace += 1
        return made + bytes(size - len(made))

    def _use(self, exchange: Exchange) -> None:
        """A call is being made: OP-TEE holds the memory that it names, until UNREGISTER_SHM."""
        frame = exchange.request.frame
        if _service(frame) == _CALL_WITH_ARG:
            for used in (pair(frame[4], frame[5]), *_handles_in_arg(exchange.bytes_of("msg_arg_in"))):
                self.model.hold(used)

    def _let_go(self, frame: Frame, secure: Frame) -> None:
        """OP-TEE has answered UNREGISTER_SHM, with 0 if it let go."""
        if _service(frame) == _UNREGISTER_SHM and secure.fid == response_to(frame.fid) and not secure[3] & 0xFFFF_FFFF:
            self.model.let_go(pair(frame[4], frame[5]))

    def _raise(self, call: Call, secure: Frame, next_get: Exchange | None) -> None:
        """The partition has raised notifications, as the answers tell: those of them that are bound become pending."""
        receiver = self.model.spmc.vms.get(0)
        if receiver is None:
            return
        if call is Call.NOTIFICATION_GET:
            bits = pair(secure[2], secure[3])
        else:  # what is listed is told by the next FFA_NOTIFICATION_GET; without one, any that is bound will do
            bits = receiver.from_sp.bound if next_get is None else _bits(next_get)
        new = bits & ~receiver.from_sp.any_pending
        if not new or (call is Call.NOTIFICATION_INFO_GET and receiver.from_sp.pending):
            return
        raised = Frame.of(Call.NOTIFICATION_SET, OPTEE_ID << 16, 0, *halves(new & receiver.from_sp.bound))
        if self.model.spmc.call(OPTEE_ID, raised).ok:
            self._from_trace += 1

    # -- staying in step after a difference

    def _follow(self, call: Call | None, frame: Frame, secure: Frame, computed: Frame, matched: bool) -> None:
        """Makes the model's state the firmware's, as far as it matters for what comes."""
        model = self.model
        if call in _SENDS and -1 in model.missing:
            missing = model.missing.pop(-1)
            if _handle_in(computed) is not None:
                model.missing[_handle_in(computed) or 0] = missing
        if matched or call is None:
            return
        failed, worked = secure.error is not None, computed.error is None
        if call in _SENDS or call is Call.MEM_FRAG_TX:
            ours = _handle_in(computed) if call in _SENDS else pair(frame[1], frame[2])
            theirs = _handle_in(secure)
            if ours is not None and ours in model.regions and (failed or ours != theirs):
                model.spmc.transactions.forget(model.regions[ours])
            if not failed and theirs is not None and theirs not in model.regions:
                model.spmc.transactions.enter(_bare_region(call, secure), theirs)
        elif call is Call.MEM_RECLAIM:
            region = model.regions.get(pair(frame[1], frame[2]))
            if region is not None and not failed:
                model.spmc.transactions.forget(region)
            elif failed and worked:
                model.spmc.transactions.enter(_bare_region(call, secure), pair(frame[1], frame[2]))
        elif call is Call.RXTX_MAP:
            served = model.spmc.served[0]
            size = (frame[3] & 0x3F) * PAGE_SIZE
            served.mailbox = None if failed else Mailbox(model.machine, frame[1], frame[2], size)
        elif call is Call.RXTX_UNMAP and not failed:
            model.spmc.served[0].mailbox = None


_INTERRUPTED = (fid(Call.NORMAL_WORLD_RESUME), fid(Call.INTERRUPT))
_CALL_WITH_ARG, _UNREGISTER_SHM = 0x8000_0000, 3
_GET = fid(Call.NOTIFICATION_GET)

_BOOT = {
    fid(Call.SPM_ID_GET): Frame.success(SPMD_ID),
    fid(Call.ID_GET): Frame.success(SPMC_ID),
    fid(Call.SECONDARY_EP_REGISTER): Frame.success(),
    fid(Call.SECONDARY_EP_REGISTER, True): Frame.success(smc64=True),
}
"""What SPMD answers the SPMC while it starts."""


def _is_ffa(function: int) -> bool:
    return any(base | 0x60 <= function <= base | 0xEF for base in (SMC32_BASE, SMC64_BASE))


def _handle_in(answer: Frame) -> int | None:
    """The handle of an answer to a memory transaction."""
    if answer.ok:
        return pair(answer[2], answer[3])
    return pair(answer[1], answer[2]) if answer.fid == fid(Call.MEM_FRAG_RX) else None


def _make_up(count: int, missing: tuple[int, int]) -> tuple[bytes, tuple[int, int]]:
    """``count`` of the missing ranges, of one page each, the last of all with all pages that are left; and what is then
    missing."""
    ranges, pages = missing
    made = []
    for _ in range(max(min(count, ranges), 0)):
        ranges -= 1
        size = 1 if ranges else max(pages, 1)
        pages -= size
        made.append((UNRECORDED + ranges * (PAGE_SIZE << 8), size))
    return abi.pack_ranges(made), (ranges, pages)


def _bare_region(call: Call, answer: Frame) -> Region:
    """A region of which nothing is known but that the firmware has it."""
    descriptor = abi.Transaction(0, (abi.Receiver(OPTEE_ID, 2),))
    region = Region(0, Call.MEM_SHARE, descriptor, {OPTEE_ID: Lending(descriptor.receivers[0])}, 1, 16, 0, own=False)
    region.complete = True
    region.pages = [UNRECORDED // PAGE_SIZE]
    return region


def _bits(get: Exchange | None) -> int:
    """The notifications that an FFA_NOTIFICATION_GET gave."""
    if get is None or get.answer is None:
        return 0
    found = (get.relayed(("S", "EL3")) or get.answer).frame
    return pair(found[2], found[3]) if found.ok else 0


def _service(frame: Frame) -> int | None:
    """Which of OP-TEE's services a direct request asks for."""
    asks = frame.fid == fid(Call.MSG_SEND_DIRECT_REQ) and frame[1] & 0xFFFF == OPTEE_ID and not frame[2] & 0xFFFF_FFFF
    return frame[3] & 0xFFFF_FFFF if asks else None


_FMEM = range(5, 8)


def _handles_in_arg(data: bytes) -> list[int]:
    """The memory handles that an ``optee_msg_arg`` names in its parameters (optee_msg.h)."""
    if len(data) < 32:
        return []
    (count,) = struct.unpack_from("<I", data, 28)
    out = []
    for at in range(32, min(32 + 32 * count, len(data) - 31), 32):
        attr, _, _, handle = struct.unpack_from("<4Q", data, at)
        if attr & 0xFF in _FMEM:
            out.append(handle)
    return out
