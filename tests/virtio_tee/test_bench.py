"""What the bench measures and how it judges; the measuring itself needs the peer and is a lab test."""

from __future__ import annotations

import shutil
from pathlib import Path
from struct import Struct

import pytest

from pyvhost.testing import ring_pair
from pyvhost.vring.choice import has_compiled
from virtio_tee.bench import peers
from virtio_tee.bench.counted import CountedQueue, Counter
from virtio_tee.bench.direct import Direct
from virtio_tee.bench.plan import (
    BLOCK,
    GOALS,
    KIB,
    MIB,
    PEER,
    SAME_WORK,
    TEE,
    WORK,
    Results,
    as_runs,
    beside,
    cases,
    observed,
    ratios,
    unsteadiness,
)


def results(factor: float = 1.0, *, in_place: bool = True) -> Results:
    """Ours are ``factor`` times as fast as the peer; the TEE alone takes half of the time."""
    runs = {}
    direct: dict[tuple[str, int], list[float]] = {}
    for case in cases():
        for backend in case.backends:
            speed = 1.0 if backend == PEER else factor
            figures = {"p50_us": 50 / speed, "p99_us": 90 / speed, "kreq_s": 1000 * speed}
            figures |= {"event_idx": True, "indirect": True, "inflight": backend != PEER}
            figures |= {"kicks": 0.1, "sleeps": 0.2, "waited": 0.0}
            if case.reference is not None and backend != PEER:
                figures |= {"peer": {"p50_us": 50, "p99_us": 90, "kreq_s": 1000}, "spread": 0.1}
            runs[backend, None if backend == PEER else "pure", case] = [figures] * 5
        direct[case.workload, case.bytes] = [25 / factor] * 5
    return Results(runs, direct, {"pure": in_place}, {"pure": 0.2}, {"pure": 40.0}, {})


def test_ratios() -> None:
    values = {goal.name: goal.judge(results(0.5), "pure") for goal in GOALS}
    assert values["null-block/sleeping/1"]["value"] == 0.5
    assert values["null-block/sleeping/32"]["value"] == 0.5
    assert not values["null-block/sleeping/32"]["pass"]
    assert values["null-block/polling/32"]["pass"]
    assert values["zero-copy/path"]["value"] == 1.0
    assert all(goal.judge(results(1.0), "pure")["pass"] for goal in GOALS)


def test_a_byte_that_is_not_seen_fails() -> None:
    judged = [goal.judge(results(in_place=False), "pure") for goal in GOALS]
    assert [ratio["name"] for ratio in judged if not ratio["pass"]] == ["zero-copy/in-place"]


def test_the_compiled_queue_has_floors_of_its_own() -> None:
    floors = {goal.name: (goal.pure, goal.compiled) for goal in GOALS}
    assert floors["null-block/sleeping/32"] == (0.8, 0.95)
    assert floors["null-invoke/sleeping/32"] == (0.3, 0.4)


def test_runs() -> None:
    entries = as_runs(results())
    assert {entry["backend"] for entry in entries} == {PEER, BLOCK, TEE}
    assert {(entry["workload"], entry["bytes"]) for entry in entries} >= {
        ("null-block", 4 * KIB),
        ("invoke-registered", 16 * MIB),
        ("invoke-temporary", 1 * MIB),
    }
    assert all(entry["queue"] is None for entry in entries if entry["backend"] == PEER)
    keys = [(e["backend"], e["queue"], e["workload"], e["driver"], e["bytes"], e["depth"]) for e in entries]
    assert len(set(keys)) == len(keys)


def test_a_run_beside_its_peer() -> None:
    figures = {"p50_us": 10.0, "p99_us": 20.0, "kreq_s": 100.0, "waited": 0.01}
    own = beside(figures, figures | {"kreq_s": 90.0, "waited": 0.05}, figures | {"kreq_s": 80.0}, 32)
    assert own["kreq_s"] == 90.0
    assert own["peer"] == {"p50_us": 10.0, "p99_us": 20.0, "kreq_s": 90.0}
    assert own["spread"] == pytest.approx(20 / 90)
    assert own["waited"] == 0.05
    assert unsteadiness(own) > 1  # the peer's two are too far apart
    assert unsteadiness(beside(figures, figures, figures, 32)) <= 1
    assert unsteadiness(beside(figures | {"waited": 0.5}, figures, figures, 32)) > 1
    assert ratios([own, own | {"kreq_s": 45.0}], 32) == [1.0, 0.5]
    assert ratios([own | {"p50_us": 20.0}], 1) == [0.5]


def test_what_is_compared_with_the_peer() -> None:
    compared = {case.key for case in cases() if case.reference is not None}
    assert compared == {
        (workload, *mode, size)
        for workload, size in (("null-block", 4 * KIB), ("null-invoke", 0))
        for mode in (("sleeping", 1), ("sleeping", 32), ("polling", 1), ("polling", 32))
    }


def test_copies_are_counted(tmp_path: Path) -> None:
    """By a chain that reads and writes, of either queue."""
    path = tmp_path / "count"
    path.write_bytes(bytes(8))
    counter = Counter(str(path))
    for queue in ["pure", *(["compiled"] if has_compiled() else [])]:
        pair = ring_pair(8, queue=queue)
        pair.driver.add([(pair.data, 20)], [(pair.data, 100)], 1)
        pair.driver.add([(pair.data, 20)], [(pair.data, 100)], 2)
        before = counter.word[0]
        counted = CountedQueue(pair.device, counter)
        chain = counted.pop()
        assert chain is not None
        assert chain.read(2, 5) == bytes(5)
        assert counter.word[0] == before + 5
        counted.push(chain.head, chain.write(b"abc"))
        assert counter.word[0] == before + 8
        counted.drain(lambda chain: chain.write(b"x" * len(chain.unpack(Struct("<I")))))
        assert counter.word[0] == before + 8 + 4 + 1
        assert pair.driver.poll() == [(1, 3), (2, 1)]


def test_direct() -> None:
    assert Direct().measure(4 * KIB, WORK, 0.0) > 0


def test_zero_copy_is_judged_on_the_same_work() -> None:
    """A path that grows with the size fails, and the figure of unequal work is told without a bound."""
    given = results()
    (case,) = (case for case in cases() if case.workload == SAME_WORK and case.bytes == 16 * MIB)
    slow = [figures | {"p50_us": 75} for figures in given.runs[TEE, "pure", case]]
    given.runs[TEE, "pure", case] = slow
    assert case.has_direct
    assert case.arguments[-2:] == ["--func", str(WORK)]
    judged = {goal.name: goal.judge(given, "pure") for goal in GOALS}["zero-copy/path"]
    assert (judged["value"], judged["pass"]) == (2.0, False)
    assert [(figure["name"], figure["value"]) for figure in observed(given, "pure")] == [
        ("zero-copy/path/unequal", 1.0)
    ]


def test_without_the_peer_there_is_no_bench(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(peers.os, "geteuid", lambda: 1000)
    with pytest.raises(peers.BenchError, match=r"sudo apt-get install --yes .*qemu-system-common gcc libc6-dev"):
        peers.require_tools()


@pytest.mark.skipif(not shutil.which("gcc"), reason="no gcc")
def test_the_driver_compiles_and_says_what_is_wrong(tmp_path: Path) -> None:
    program = peers.build_driver(tmp_path)
    with pytest.raises(peers.BenchError, match="No such file"):
        peers.run_driver(program, "--socket", str(tmp_path / "nobody"))
    with pytest.raises(peers.BenchError, match="unknown word"):
        peers.run_driver(program, "--workload", "nonsense")
