"""What `bench scale` says of what it measured, and that it measures. Its bounds are for `bench scale --check`."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from virtio_tee.__main__ import main
from virtio_tee.bench.scale_life import Cancelled
from virtio_tee.bench.scale_plan import GOALS, Results
from virtio_tee.bench.served import Holdings, Served

COSTS = [goal.name for goal in GOALS if "busy" in goal.name]


def results() -> Results:
    """Everything as it should be."""
    return Results(
        starts=[(0.2, 40.0)] * 3,
        costs={name: [(10.0, 11.0)] * 3 for name in COSTS},
        whole_ms=[60.0],
        cancels_alone=[[Cancelled(2.0, True), Cancelled(3.0, True)]] * 3,
        cancels_loaded=[[Cancelled(9.0, True), Cancelled(8.0, True)]] * 3,
        holdings=[Holdings(40_000, 20, 3, 180), Holdings(41_024, 20, 3, 180)],
    )


def missed(found: Results) -> list[str]:
    return [figure["name"] for figure in (goal.judge(found) for goal in GOALS) if not figure["pass"]]


def test_all_is_well() -> None:
    assert missed(results()) == []


@pytest.mark.parametrize("name", COSTS)
def test_a_request_that_costs_more(name: str) -> None:
    found = results()
    found.costs[name] = [(10.0, 11.0), (10.0, 12.5), (100.0, 130.0)]
    assert missed(found) == [name]


def test_cancels() -> None:
    found = results()
    found.cancels_loaded[1:] = [[Cancelled(9.0, True), Cancelled(51.0, True)]] * 2
    assert missed(found) == ["cancel/loaded"]
    found = results()
    found.cancels_alone[1] = [Cancelled(2.0, False)]
    assert missed(found) == ["cancel/reached"]


@pytest.mark.parametrize(
    ("last", "name"),
    [
        (Holdings(41_025, 20, 3, 180), "memory"),
        (Holdings(40_000, 21, 3, 180), "fds"),
        (Holdings(40_000, 20, 4, 180), "threads"),
        (Holdings(40_000, 20, 3, 181), "mappings"),
    ],
)
def test_growth(last: Holdings, name: str) -> None:
    found = results()
    found.holdings[-1] = last
    assert missed(found) == [f"connects/{name}"]


def test_starts() -> None:
    found = results()
    found.starts[:] = [(0.6, 61.0)] * 3
    assert missed(found) == ["serve/ready", "serve/idle"]


def test_it_is_a_command_of_bench() -> None:
    shown = CliRunner().invoke(main, ["bench", "scale", "--help"])
    assert shown.exit_code == 0
    assert "--quick" in shown.stdout
    assert CliRunner().invoke(main, ["bench", "scale", "--no-such-option"]).exit_code == 2
    assert CliRunner().invoke(main, ["bench", "no-such-command"]).exit_code == 2


def test_a_backend_seen_from_outside(tmp_path: Path) -> None:
    served = Served(tmp_path, "one", "--built-in-tas")
    try:
        assert served.ready_s > 0
        assert served.cpu_s > 0
        holdings = served.holdings
        assert min(holdings.rss_kib, holdings.fds, holdings.threads, holdings.mappings) > 0
    finally:
        served.end()


def test_guests_do_not_run_out_of_descriptors(tmp_path: Path) -> None:
    """Many guests need more than the soft limit that processes usually begin with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        served = Served(tmp_path, "limits")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        assert resource.prlimit(served.process.pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        served.end()


@pytest.mark.lab
def test_a_short_run() -> None:
    argv = [sys.executable, "-m", "virtio_tee", "bench", "scale", "--quick", "--json"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(done.stdout)
    assert {"machine", "sizes", "figures"} <= set(report)
    assert [figure["name"] for figure in report["figures"]] == [goal.name for goal in GOALS]
    for figure in report["figures"]:
        assert {"name", "what", "value", "floor", "sense", "pass", "details"} <= set(figure)
