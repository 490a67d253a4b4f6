"""Replays of recorded sessions: what real firmware answered is what the model computes, and any change shows."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.abi.ids import VERSION_1_2, Call, Error, fid, name
from ffa.replay import Replay, Report, TraceError, parse

DATA = Path(__file__).resolve().parents[1] / "data" / "ffa"
TRACES = sorted(DATA.glob("*.jsonl"))
CALLS = {"boot-probe-xtest1001": 58, "fragmented-share": 70}

Lines = list[dict[str, Any]]


def load(path: Path) -> Lines:
    return [json.loads(line) for line in path.read_text().splitlines()]


def replay(lines: Lines) -> Report:
    return Replay(parse((json.dumps(line) for line in lines), "trace")).run()


@pytest.mark.feature("FF-A: the SPMC answers as OP-TEE 4.10 did when Linux 7.2 was recorded (`ffa replay`)")
@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_the_model_answers_as_the_firmware(path: Path) -> None:
    report = replay(load(path))
    from_ns = sum(line["from"] == "NS" for line in load(path))
    assert report.differences == []
    assert report.calls == report.matched == from_ns == next(n for key, n in CALLS.items() if key in path.stem)
    assert report.unanswered == 0
    # w3 to w7 of each direct response, two words of each new handle, each notification raised, fragments not recorded
    counts = {call: sum(line["from"] == "NS" and line["call"] == call for line in load(path)) for call in names(path)}
    assert report.from_trace == (
        5 * counts["FFA_MSG_SEND_DIRECT_REQ"]
        + 2 * counts["FFA_MEM_SHARE_64"]
        + counts["FFA_NOTIFICATION_INFO_GET_64"]
        + counts.get("FFA_MEM_FRAG_TX", 0)
    )
    assert report.computed + report.from_trace == 8 * from_ns


def names(path: Path) -> set[str]:
    return {line["call"] for line in load(path)}


def test_there_are_two_traces() -> None:
    assert len(TRACES) == 2


BACK = {"FFA_SUCCESS", "FFA_SUCCESS_64", "FFA_ERROR", "FFA_MSG_SEND_DIRECT_RESP", "FFA_MEM_FRAG_RX"}


def answers(lines: Lines) -> list[int]:
    """The lines that answer a call: of firmware to the normal world, of the SPMC to SPMD, of SPMD to the SPMC."""
    out = []
    for n, line in enumerate(lines):
        way = line["from"], line["to"]
        back = line["call"] in (
            "FFA_SUCCESS",
            "FFA_SUCCESS_64",
            "FFA_ERROR",
            "FFA_MSG_SEND_DIRECT_RESP",
            "FFA_MEM_FRAG_RX",
        )
        if way == ("EL3", "NS") or (back and way in (("S", "EL3"), ("EL3", "S"))):
            out.append(n)
    return out


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_each_changed_answer_shows(path: Path) -> None:
    lines = load(path)
    changed = answers(lines)
    assert len(changed) > 2 * CALLS["boot-probe-xtest1001"]
    records = parse((json.dumps(line) for line in lines), "trace")
    silent = []
    for n in changed:
        end = next(k for k in range(n, len(lines)) if lines[k]["to"] == "NS")  # what comes later need not tell
        for register in range(8):
            x = list(records[n].x)
            x[register] ^= 1 << ((n + 7 * register) % 64)
            wrong = replace(records[n], x=tuple(x), call=name(x[0] & 0xFFFF_FFFF))
            if not Replay([*records[:n], wrong, *records[n + 1 : end + 1]]).run().differences:
                silent.append((n, register))
    assert silent == []


def test_changed_partition_information_shows() -> None:
    lines = load(TRACES[0])
    (n,) = [n for n, line in enumerate(lines) for m in line.get("mem", ()) if m["what"] == "partition_info(rx)"]
    for at in (0, 2, 4, 8, 23):
        data = bytearray.fromhex(lines[n]["mem"][0]["hex"])
        data[at] ^= 1
        changed = {**lines[n], "mem": [{**lines[n]["mem"][0], "hex": data.hex()}]}
        report = replay([*lines[:n], changed, *lines[n + 1 :]])
        assert [d.what for d in report.differences] == ["bytes"]


def test_a_changed_name_shows() -> None:
    lines = load(TRACES[0])
    lines[20] = {**lines[20], "call": "FFA_RUN"}
    assert [d.what for d in replay(lines).differences] == ["name"]


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_the_way_to_the_normal_world_alone_is_enough(path: Path) -> None:
    lines = [line for line in load(path) if "NS" in (line["from"], line["to"])]
    mem = {n: line["mem"] for n, line in enumerate(load(path)) if "mem" in line}
    assert mem  # which are gone with the lines that had them
    report = replay(lines)
    assert (report.differences, report.matched) == ([], report.calls)


def test_boots_one_after_the_other_are_told_apart() -> None:
    report = replay([*load(TRACES[0]), *load(TRACES[1])])
    assert (report.differences, report.calls) == ([], sum(CALLS.values()))


def test_firmware_with_the_fragment_fault() -> None:
    """OP-TEE 4.10 as released refuses every fragmented share: that, and nothing else, is a difference."""
    out: Lines = []
    shares = 0
    refused = False
    for line in load(TRACES[1]):
        from_ns = line["from"] == "NS"
        if line["call"] == "FFA_MEM_SHARE_64" and from_ns:
            refused = line["x"][1] != line["x"][2]
            shares += refused
        if not refused:
            out.append(line)
        elif line["call"] == "FFA_MEM_SHARE_64":
            out.append(line)
            if not from_ns:
                refusal = [hex(v) for v in Frame.failure(Error.INVALID_PARAMETERS)[:8]]
                for way in (("S", "EL3"), ("EL3", "NS")):
                    out.append({"t": 0, "cpu": 0, "from": way[0], "to": way[1], "call": "FFA_ERROR", "x": refusal})
        elif line["call"] == "FFA_NORMAL_WORLD_RESUME":
            refused = False  # its fragments, UNREGISTER_SHM and RECLAIM are over, which did not happen
    report = replay(out)
    assert shares == 2
    assert {d.call for d in report.differences} == {"FFA_MEM_SHARE_64"}
    assert report.calls - report.matched == shares


# -- made-up traces, to which the answers are written down by hand from what OP-TEE 4.10 does


class Scribe:
    """Writes a trace."""

    def __init__(self) -> None:
        self.lines: Lines = []
        self.say("S", "EL3", Frame.of(Call.SPM_ID_GET))
        self.say("EL3", "S", Frame.success(0xFFFF))
        self.exchange(Frame.of(Call.VERSION, VERSION_1_2), Frame(VERSION_1_2))
        self.exchange(Frame.of(Call.RXTX_MAP, 0x4000_0000, 0x4000_1000, 1, smc64=True), Frame.success())
        self.exchange(Frame.of(Call.NOTIFICATION_BITMAP_CREATE, 0, 2), Frame.success())

    def say(self, source: str, target: str, frame: Frame, cpu: int = 0, mem: Any = None) -> None:
        line = {"t": len(self.lines), "cpu": cpu, "from": source, "to": target, "call": name(frame.fid)}
        line["x"] = [hex(value) for value in frame[:8]]
        self.lines.append(line | ({"mem": mem} if mem else {}))

    def ask(self, request: Frame, cpu: int = 0, mem: Any = None) -> None:
        self.say("NS", "EL3", request, cpu)
        self.say("EL3", "S", request, cpu, mem)

    def tell(self, answer: Frame, cpu: int = 0) -> None:
        self.say("S", "EL3", answer, cpu)
        self.say("EL3", "NS", answer, cpu)

    def exchange(self, request: Frame, answer: Frame, cpu: int = 0, mem: Any = None) -> None:
        if request.fid == fid(Call.VERSION):
            self.say("NS", "EL3", request, cpu)
            self.say("EL3", "NS", answer, cpu)
            return
        self.ask(request, cpu, mem)
        self.tell(answer, cpu)

    def share(self, page: int, handle: int, cpu: int = 0) -> None:
        descriptor = abi.Transaction(0, (abi.Receiver(0x8001, 2),), 0x2F)
        blob = abi.build(VERSION_1_2, descriptor, [(0x5000_0000 + page * 4096, 1)])
        mem = [{"what": "mem_op_desc(rxbuf)", "len": len(blob), "hex": blob.hex()}]
        self.exchange(
            Frame.of(Call.MEM_SHARE, len(blob), len(blob), smc64=True),
            Frame.success(handle & 0xFFFF_FFFF, handle >> 32),
            cpu,
            mem,
        )

    def with_arg(self, handle: int) -> Frame:
        return direct(0x8000_0000, handle & 0xFFFF_FFFF, handle >> 32)


def direct(*words: int) -> Frame:
    return Frame.of(Call.MSG_SEND_DIRECT_REQ, 0x8001, 0, *words)


def response(*words: int) -> Frame:
    return Frame.of(Call.MSG_SEND_DIRECT_RESP, 0x8001 << 16, 0, *words)


def reclaim(handle: int) -> Frame:
    return Frame.of(Call.MEM_RECLAIM, handle & 0xFFFF_FFFF, handle >> 32)


H = 0x1000_0000_0000


def differences(write: Callable[[Scribe], None]) -> list[str]:
    scribe = Scribe()
    write(scribe)
    return [f"{d.call}: {d.what}" for d in replay(scribe.lines).differences]


def test_memory_in_use_is_not_reclaimed() -> None:
    def right(s: Scribe) -> None:
        s.share(0, H)
        s.exchange(s.with_arg(H), response())
        s.exchange(reclaim(H), Frame.failure(Error.DENIED))
        s.exchange(direct(3, 0, H >> 32), response())
        s.exchange(reclaim(H), Frame.success())
        s.exchange(reclaim(H), Frame.failure(Error.INVALID_PARAMETERS))

    def wrong(s: Scribe) -> None:
        s.share(0, H)
        s.exchange(s.with_arg(H), response())
        s.exchange(reclaim(H), Frame.success())

    assert differences(right) == []
    assert differences(wrong) == ["FFA_MEM_RECLAIM: answer", "FFA_MEM_RECLAIM: relayed answer"]


def test_a_handle_that_is_in_use_is_not_given_again() -> None:
    def write(s: Scribe) -> None:
        s.share(0, H)
        s.share(1, H)

    assert differences(write) == ["FFA_MEM_SHARE_64: answer", "FFA_MEM_SHARE_64: relayed answer"]


def test_a_reclaimed_handle_may_be_given_again() -> None:
    def write(s: Scribe) -> None:
        for _ in range(2):
            s.share(0, H)
            s.exchange(reclaim(H), Frame.success())

    assert differences(write) == []


def test_a_handle_of_the_hypervisor_is_none_of_an_spmc() -> None:
    assert "FFA_MEM_SHARE_64: answer" in differences(lambda s: s.share(0, 1 << 63 | 1))


def test_a_notification_that_is_not_bound_is_not_delivered() -> None:
    bind = Frame.of(Call.NOTIFICATION_BIND, 0x8001 << 16, 0, 1)
    get = Frame.of(Call.NOTIFICATION_GET, 0, 5)

    def right(s: Scribe) -> None:
        s.exchange(bind, Frame.success())
        s.exchange(get, Frame.success(1))  # raised just before
        s.exchange(get, Frame.success())

    def wrong(s: Scribe) -> None:
        s.exchange(get, Frame.success(1))

    assert differences(right) == []
    assert differences(wrong) == ["FFA_NOTIFICATION_GET: answer", "FFA_NOTIFICATION_GET: relayed answer"]


def test_a_trace_may_end_before_a_notification_is_got() -> None:
    bind = Frame.of(Call.NOTIFICATION_BIND, 0x8001 << 16, 0, 2)
    info = Frame.of(Call.NOTIFICATION_INFO_GET, smc64=True)
    listed = Frame.success(0x80, smc64=True)

    def right(s: Scribe) -> None:
        s.exchange(bind, Frame.success())
        s.exchange(info, listed)

    assert differences(right) == []
    assert differences(lambda s: s.exchange(info, listed)) != []  # none is bound


def test_nothing_pending_is_no_data() -> None:
    info = Frame.of(Call.NOTIFICATION_INFO_GET, smc64=True)
    assert differences(lambda s: s.exchange(info, Frame.failure(Error.NO_DATA))) == []


def test_two_cpus_at_once() -> None:
    def write(s: Scribe) -> None:
        s.share(0, H)
        s.share(1, H + 1, cpu=1)
        s.ask(s.with_arg(H), cpu=0)
        s.ask(s.with_arg(H + 1), cpu=1)
        s.tell(response(0, 2), cpu=1)
        s.exchange(reclaim(H), Frame.failure(Error.DENIED), cpu=1)
        s.tell(response(0, 1), cpu=0)
        s.exchange(direct(3, 1, H >> 32), response(), cpu=0)
        s.exchange(reclaim(H + 1), Frame.success(), cpu=0)

    assert differences(write) == []


def test_the_driver_goes_and_comes_again() -> None:
    def write(s: Scribe) -> None:
        s.exchange(Frame.of(Call.NOTIFICATION_BITMAP_DESTROY, 0), Frame.success())
        s.exchange(Frame.of(Call.RXTX_UNMAP), Frame.success())
        s.exchange(Frame.of(Call.RXTX_UNMAP), Frame.failure(Error.INVALID_PARAMETERS))
        s.exchange(Frame.of(Call.VERSION, 0x10001), Frame(VERSION_1_2))
        s.exchange(Frame.of(Call.RXTX_MAP, 0x4000_2000, 0x4000_3000, 1, smc64=True), Frame.success())
        s.exchange(Frame.of(Call.RXTX_MAP, 0x4000_2000, 0x4000_3000, 1, smc64=True), Frame.failure(Error.DENIED))

    assert differences(write) == []


def test_after_a_difference_the_model_follows_the_firmware() -> None:
    def write(s: Scribe) -> None:
        s.share(0, H)
        s.exchange(reclaim(H), Frame.failure(Error.INVALID_PARAMETERS))  # wrong: it was there
        s.exchange(reclaim(H), Frame.success())

    assert differences(write) == ["FFA_MEM_RECLAIM: answer", "FFA_MEM_RECLAIM: relayed answer"]


def test_a_call_without_an_answer_is_told() -> None:
    scribe = Scribe()
    scribe.ask(direct(0))
    report = replay(scribe.lines)
    assert (report.unanswered, report.calls, report.differences) == (1, 3, [])


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "1", "{}", '{"t": 0}', "[" * 100_000),
        '{"t":0,"cpu":0,"from":"NS","to":"EL3","call":"","x":["q"]}',
        '{"t":0,"cpu":0,"from":"NS","to":"EL3","call":"","x":["0x1ffffffffffffffff"]}',
        '{"t":0,"cpu":0,"from":"NS","to":"EL3","call":"","x":[]}',
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(TraceError, match=r"^file:2: "):
        parse(["", line], "file")
