"""Traces that were not recorded, but could be: other boots, other tests, two CPUs."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ffa.abi.frame import Frame
from ffa.abi.ids import Call, Error, fid, name
from ffa.replay import OPTEE_CONTEXTS, OPTEE_ID, OPTEE_PROPERTIES, OPTEE_UUID, Replay, Report, parse
from ffa.roles.endpoint import Endpoint
from ffa.roles.machine import Machine
from ffa.roles.profile import FULL
from ffa.roles.spmc import Spmc
from tests.ffa.optee.bench import Driven, soft_tee
from tests.ffa.test_replay import TRACES, H, Lines, Scribe, direct, load, reclaim, replay, response

MASK32 = 0xFFFF_FFFF
SHARES = ("FFA_MEM_SHARE_64", "FFA_MEM_FRAG_TX")
YIELDING, UNREGISTER = 0x8000_0000, 3


# -- the given traces, with everything changed that another boot changes


def moved(lines: Lines, handle: dict[int, int], page: int, tag: int) -> Lines:
    """Other handles, other pages (``page`` bytes higher), another tag, other times."""
    out = json.loads(json.dumps(lines))
    time = 100.0
    for line in out:
        time += random.Random(len(line["call"])).random()
        line["t"] = time
        x = [int(value, 16) for value in line["x"]]
        for at in _handle_registers(line["call"], x):
            new = handle.get(x[at] | x[at + 1] << 32)
            if new is not None:
                x[at], x[at + 1] = new & MASK32, new >> 32
        if line["call"] == "FFA_RXTX_MAP_64" and line["to"] != "NS":
            x[1], x[2] = x[1] + page, x[2] + page
        line["x"] = [hex(value) for value in x]
        for mem in line.get("mem", ()):
            mem["hex"] = _moved_bytes(mem["what"], bytearray.fromhex(mem["hex"]), handle, page, tag)
    return list(out)


def _handle_registers(call: str, x: list[int]) -> list[int]:
    if call in ("FFA_MEM_FRAG_RX", "FFA_MEM_FRAG_TX", "FFA_MEM_RECLAIM"):
        return [1]
    if call == "FFA_SUCCESS":
        return [2]
    return [4] if call == "FFA_MSG_SEND_DIRECT_REQ" and x[3] in (YIELDING, UNREGISTER) else []


def _moved_bytes(what: str, data: bytearray, handle: dict[int, int], page: int, tag: int) -> str:
    if what == "mem_op_desc(rxbuf)":
        struct.pack_into("<Q", data, 16, tag)
        for at in range(96, len(data) - 15, 16):
            struct.pack_into("<Q", data, at, struct.unpack_from("<Q", data, at)[0] + page)
    elif what.startswith("msg_arg"):
        for at in range(32, len(data) - 31, 32):
            attribute, _, _, named = struct.unpack_from("<4Q", data, at)
            if attribute & 0xFF in (5, 6, 7):
                struct.pack_into("<Q", data, at + 24, handle.get(named, named))
    return data.hex()


def handles(lines: Lines) -> list[int]:
    """All that were given."""
    asked = {line["cpu"]: "" for line in lines}
    found = set()
    for line in lines:
        x = [int(value, 16) for value in line["x"]]
        if line["from"] == "NS":
            asked[line["cpu"]] = line["call"]
        elif line["to"] == "NS" and line["call"] == "FFA_SUCCESS" and asked[line["cpu"]] in SHARES:
            found.add(x[2] | x[3] << 32)
    return sorted(found)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
@pytest.mark.parametrize("seed", range(3))
def test_another_boot(path: Path, seed: int) -> None:
    rng, lines = random.Random(seed), load(path)
    old = handles(lines)
    assert len(old) >= 2
    new = rng.sample(range(1, 1 << 40), len(old))
    changed = moved(lines, dict(zip(old, new, strict=True)), rng.randrange(1, 1 << 16) << 12, rng.getrandbits(64))
    assert changed != lines
    first, second = replay(lines), replay(changed)
    assert (second.differences, second.matched) == ([], first.calls)
    assert (second.computed, second.from_trace) == (first.computed, first.from_trace)


def test_another_handle_in_the_middle_shows() -> None:
    """A handle is from the trace when it is given; after that it is computed, wherever it is named."""
    lines = load(TRACES[1])
    told = 0
    for n, line in enumerate(lines):
        if line["call"] == "FFA_MEM_FRAG_RX" and n and lines[n - 1]["call"] == "FFA_MEM_FRAG_TX":
            told += 1
            x = [*line["x"]]
            x[1] = hex(int(x[1], 16) ^ 4)
            both = [{**line, "x": x}, {**lines[n + 1], "x": x}]
            report = replay([*lines[:n], *both, *lines[n + 2 :]])
            assert [d.call for d in report.differences][:2] == ["FFA_MEM_FRAG_TX"] * 2
    assert told == 3


def exchanges(lines: Lines) -> Iterator[Lines]:
    """The lines of each call, from the normal world's to its answer; what is between calls, each by itself."""
    current: Lines = []
    for line in lines:
        if line["from"] == "NS":
            current = [line]
        elif current:
            current.append(line)
            if line["to"] == "NS":
                yield current
                current = []
        else:
            yield [line]


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
@pytest.mark.parametrize("cpus", [2, 4])
def test_the_calls_come_from_several_cpus(path: Path, cpus: int) -> None:
    rng, lines = random.Random(cpus), load(path)
    out: Lines = []
    for exchange in exchanges(lines):
        cpu = rng.randrange(cpus) if exchange[0]["from"] == "NS" else 0
        out += [{**line, "cpu": cpu} for line in exchange]
    report, alone = replay(out), replay(lines)
    assert (report.differences, report.matched) == ([], alone.calls)
    assert (report.computed, report.from_trace) == (alone.computed, alone.from_trace)


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_a_second_cpu_asks_while_the_first_is_asking(path: Path) -> None:
    """Within each direct request of one CPU, another asks for the version, and is answered first, last, or between."""
    lines, rng, out = load(path), random.Random(1), []
    extra = 0
    words = (Frame.of(Call.MSG_SEND_DIRECT_REQ, OPTEE_ID), Frame.of(Call.MSG_SEND_DIRECT_RESP, OPTEE_ID << 16, 0, 1))
    legs = [("NS", "EL3", words[0]), ("EL3", "S", words[0]), ("S", "EL3", words[1]), ("EL3", "NS", words[1])]
    other = [
        {"t": 0, "cpu": 1, "from": a, "to": b, "call": name(f.fid), "x": [hex(v) for v in f[:8]]} for a, b, f in legs
    ]
    for exchange in exchanges(lines):
        if exchange[0]["call"] != "FFA_MSG_SEND_DIRECT_REQ":
            out += exchange
            continue
        extra += 1
        where = sorted(rng.randrange(len(exchange) + 1) for _ in other)
        for at, line in enumerate(exchange):
            out += [leg for leg, place in zip(other, where, strict=True) if place == at]
            out.append(line)
        out += [leg for leg, place in zip(other, where, strict=True) if place == len(exchange)]
    report = replay(out)
    assert extra > 10
    assert (report.differences, report.unanswered) == ([], 0)
    assert report.calls == report.matched == replay(lines).calls + extra


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_interrupts_and_other_services_in_between(path: Path) -> None:
    """An interrupt is taken to the normal world in the middle of a call; PSCI is called too, under any name."""
    out: Lines = []
    for exchange in exchanges(load(path)):
        if exchange[0]["from"] == "NS" and len(exchange) == 4:
            away = {**exchange[2], "call": "FFA_NORMAL_WORLD_RESUME", "x": [hex(fid(Call.NORMAL_WORLD_RESUME))]}
            back = {**exchange[1], "call": "FFA_INTERRUPT", "x": [hex(fid(Call.INTERRUPT))], "mem": []}
            exchange = [*exchange[:2], away, back, *exchange[2:]]
        out += exchange
        psci = {"t": 0, "cpu": 0, "from": "NS", "to": "EL3", "call": "PSCI_VERSION", "x": ["0x84000000"]}
        if exchange[0]["from"] == "NS":
            out += [psci, {**psci, "from": "EL3", "to": "NS", "call": "0x10001", "x": ["0x10001"]}]
    report, alone = replay(out), replay(load(path))
    assert report.differences == []
    assert (report.calls, report.from_trace) == (alone.calls, alone.from_trace)


# -- written by hand, from what OP-TEE 4.10 does


def test_no_more_than_64_regions() -> None:
    """OP-TEE's SPMC_CORE_SEL1_MAX_SHM_COUNT: the next is NO_MEMORY, until one is reclaimed."""
    scribe = Scribe()
    for n in range(64):
        scribe.share(n, H + n)
    shares = len(scribe.lines)
    scribe.share(64, H + 64)
    refused = Frame.failure(Error.NO_MEMORY)
    for line in scribe.lines[shares:]:
        if line["call"] == "FFA_SUCCESS":
            line |= {"call": "FFA_ERROR", "x": [hex(value) for value in refused[:8]]}
    scribe.exchange(reclaim(H + 7), Frame.success())
    scribe.share(65, H + 7)
    report = replay(scribe.lines)
    assert report.differences == []
    assert report.by_call["FFA_MEM_SHARE_64"] == {
        "calls": 66,
        "matched": 66,
        "computed": 66 * 8 - 130,
        "from_trace": 130,
    }
    for line in scribe.lines[shares : shares + 4]:
        if line["call"] == "FFA_ERROR":
            line["x"][2] = hex(Error.DENIED & MASK32)
    assert {d.call for d in replay(scribe.lines).differences} == {"FFA_MEM_SHARE_64"}


@pytest.mark.parametrize(
    ("what", "bits"),
    [("bound", 1 << 3), ("not bound", 1 << 4), ("one of two not bound", 0x18), ("bound twice", 3 << 3)],
)
def test_only_bound_notifications_are_raised(what: str, bits: int) -> None:
    scribe = Scribe()
    scribe.exchange(Frame.of(Call.NOTIFICATION_BIND, OPTEE_ID << 16, 0, 1 << 3), Frame.success())
    if what == "bound twice":
        scribe.exchange(Frame.of(Call.NOTIFICATION_BIND, OPTEE_ID << 16, 0, 1 << 4), Frame.success())
    scribe.exchange(Frame.of(Call.NOTIFICATION_INFO_GET, smc64=True), Frame.success(0x80, smc64=True))
    scribe.exchange(Frame.of(Call.NOTIFICATION_GET, 0, 5), Frame.success(bits))
    scribe.exchange(Frame.of(Call.NOTIFICATION_GET, 0, 5), Frame.success())
    report = replay(scribe.lines)
    assert bool(report.differences) is ("not bound" in what)
    if not report.differences:
        assert report.from_trace == 1  # that it was raised: listed, told once and cleared are computed
        assert report.by_call["FFA_NOTIFICATION_GET"]["from_trace"] == 0


@pytest.mark.parametrize("wrong", [0, 1, 2, 4, 6, 7])
def test_nothing_else_of_a_listing_is_taken_from_the_trace(wrong: int) -> None:
    scribe = Scribe()
    scribe.exchange(Frame.of(Call.NOTIFICATION_BIND, OPTEE_ID << 16, 0, 1), Frame.success())
    listed = list(Frame.success(0x80, smc64=True))
    listed[wrong] ^= 2
    scribe.exchange(Frame.of(Call.NOTIFICATION_INFO_GET, smc64=True), Frame(*listed))
    assert replay(scribe.lines).differences


# -- other tests: our own partition and driver, recorded as a firmware is


class Tap:
    """Stands where SPMD does, and writes down what goes by, as the given traces have it."""

    def __init__(self, spmc: Spmc, machine: Machine) -> None:
        self.spmc, self.machine = spmc, machine
        self.lines: Lines = []

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        relayed = frame.fid not in (fid(Call.VERSION), fid(Call.ID_GET))
        self._say("NS", "EL3", frame, vcpu)
        if relayed:
            self._say("EL3", "S", frame, vcpu, self._memory(frame))
        answer = self.spmc.call(caller, frame, vcpu)
        if relayed:
            self._say("S", "EL3", answer, vcpu)
        self._say("EL3", "NS", answer, vcpu)
        return answer

    def _say(self, source: str, target: str, frame: Frame, cpu: int, mem: Any = None) -> None:
        line = {"t": 0.0, "cpu": cpu, "from": source, "to": target, "call": name(frame.fid)}
        self.lines.append(line | {"x": [hex(value) for value in frame[:8]]} | ({"mem": mem} if mem else {}))

    def _memory(self, frame: Frame) -> list[dict[str, Any]]:
        """The descriptor in TX; the message that a yielding call names."""
        box = self.spmc.served[0].mailbox
        if frame.fid == fid(Call.MEM_SHARE, True) and box is not None:
            return [{"what": "mem_op_desc(rxbuf)", "hex": self.machine.fetch(box.tx, frame[2]).hex()}]
        if frame.fid == fid(Call.MEM_FRAG_TX) and box is not None:
            return [{"what": "mem_frag(rxbuf)", "hex": self.machine.fetch(box.tx, frame[3]).hex()}]
        if frame.fid == fid(Call.MSG_SEND_DIRECT_REQ) and frame[3] == YIELDING:
            region = self.spmc.transactions.regions[frame[4] | frame[5] << 32]
            at = region.ranges[0][0] + frame[6]
            (count,) = struct.unpack("<I", self.machine.fetch(at + 28, 4))
            return [{"what": "msg_arg_in", "hex": self.machine.fetch(at, 32 + 32 * count).hex()}]
        return []


def recorded() -> tuple[Lines, Report]:
    """A session of clients with all kinds of calls, on our partition below an operating system; and its replay."""
    from ffa.optee.client import FfaTeeDriver
    from ffa.optee.partition import OpteePartition
    from guest_driver.arena import Arena
    from guest_driver.client import Context, TempInOut, ValueIn, ValueInOut, ValueOut
    from tee.io.runtime import TeeRuntime
    from tee.memory import Range
    from tee.soft import examples

    machine = Machine()
    spmc = Spmc(machine)
    partition = OpteePartition(OPTEE_ID, machine, soft_tee())
    partition.uuid, partition.contexts, partition.properties = OPTEE_UUID, OPTEE_CONTEXTS, int(OPTEE_PROPERTIES)
    spmc.add(partition)
    machine.add(partition.id, 0x0E00_0000, 16, secure=True)
    partition.map_buffers(0x0E00_0000, 0x0E00_1000)
    system = Endpoint(0, machine, contexts=2)
    spmc.attach(system)
    memory = bytearray(8 << 20)
    machine.add(0, 0x4000_0000, len(memory) >> 12, backing=memory)
    tap = Tap(spmc, machine)
    system.relayer = tap
    tap.lines += Scribe().lines[:2]  # SPMC and SPMD, while they start
    system.call(Call.VERSION, 0x10002)
    system.map_buffers(0x4000_0000, 0x4000_1000)
    system.call(Call.NOTIFICATION_BITMAP_CREATE, 0, 2)
    arena = Arena(memoryview(memory)[0x2000:], [Range(0x4000_2000, len(memory) - 0x2000)])
    driver = Driven(FfaTeeDriver(system, arena, now=lambda: 12_000_000_034)).driver
    probe = examples.UUIDS["probe"]
    with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(probe) as session:
        session.invoke(1, ValueIn(2), ValueOut(), ValueInOut(4, 5))
        for size in (1, 5000, 100_000):
            session.invoke(2, TempInOut(bytes(size)), ValueIn(0xFF))
    driver.close()
    records = parse((json.dumps(line) for line in tap.lines), "recorded")
    return tap.lines, Replay(records, FULL).run()


def test_other_sessions() -> None:
    """What was recorded of our own roles, and of clients with memory of many sizes, is what the model computes."""
    lines, report = recorded()
    from_ns = sum(line["from"] == "NS" for line in lines)
    assert report.differences == []
    assert report.calls == report.matched == from_ns > 30
    calls = {line["call"] for line in lines if line["from"] == "NS"}
    assert calls >= {"FFA_MSG_SEND_DIRECT_REQ", "FFA_MEM_SHARE_64", "FFA_MEM_RECLAIM", "FFA_NOTIFICATION_BIND"}
    for call, counts in report.by_call.items():
        taken = {"FFA_MSG_SEND_DIRECT_REQ": 5, "FFA_MEM_SHARE_64": 2}.get(call, 0)
        assert counts["from_trace"] == taken * counts["calls"], call


def test_each_changed_answer_of_another_session_shows() -> None:
    lines, _ = recorded()
    silent = []
    for n, line in enumerate(lines):
        if line["to"] == "NS" or (line["from"] == "S" and n > 2):
            for register in range(8):
                x = [*line["x"]]
                x[register] = hex(int(x[register], 16) ^ 1 << n % 31)
                changed = {**line, "x": x, "call": name(int(x[0], 16) & MASK32)}
                last = next(k for k in range(n, len(lines)) if lines[k]["to"] == "NS")
                records = [*lines[:n], changed, *lines[n + 1 : last + 1]]
                if not Replay(parse((json.dumps(r) for r in records), "t"), FULL).run().differences:
                    silent.append((n, register, line["call"]))
    assert silent == []


def test_answers_that_belong_to_no_call_are_told_of() -> None:
    scribe = Scribe()
    scribe.ask(direct(0))
    scribe.ask(direct(1))  # the first was never answered
    scribe.tell(response(1))
    report = replay(scribe.lines)
    assert (report.unanswered, report.calls, report.differences) == (1, 4, [])
