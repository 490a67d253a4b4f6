"""The bench beside its peer, shortly: all of it runs and reports. Its bounds are for `virtio-tee bench --check`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from virtio_tee.bench.plan import BLOCK, GOALS, PEER, TEE


@pytest.mark.lab
def test_a_short_bench() -> None:
    argv = [sys.executable, "-m", "virtio_tee", "bench", "--json", "--rounds", "1", "--seconds", "0.1"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=True)
    report = json.loads(done.stdout)
    assert {run["backend"] for run in report["runs"]} == {PEER, BLOCK, TEE}
    assert {goal.name for goal in GOALS} == {ratio["name"] for ratio in report["ratios"]}
    copied = {(run["workload"], run["depth"], run["bytes"]): run["bytes_copied"] for run in report["runs"]}
    assert copied["invoke-temporary", 1, 64 << 10] > 2 * 64 << 10  # there and back, and the request itself
    assert copied["invoke-registered", 1, 16 << 20] < 1 << 10  # the request itself
    assert all(ratio["pass"] for ratio in report["ratios"] if ratio["name"] == "zero-copy/in-place")
