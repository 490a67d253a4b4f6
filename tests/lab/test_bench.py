"""The bench beside its peer, shortly: all of it runs and reports. Its bounds are for `virtio-tee bench --check`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from virtio_tee.bench.plan import BLOCK, GOALS, PEER, TEE


@pytest.mark.lab
def test_a_short_bench() -> None:
    argv = [sys.executable, "-m", "virtio_tee", "bench", "--json", "--rounds", "1", "--seconds", "0.02"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(done.stdout)
    assert {run["backend"] for run in report["runs"]} == {PEER, BLOCK, TEE}
    assert {goal.name for goal in GOALS} == {ratio["name"] for ratio in report["ratios"]}
    assert all(ratio["pass"] for ratio in report["ratios"] if ratio["name"] == "zero-copy/in-place")
