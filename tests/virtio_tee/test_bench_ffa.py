"""What `bench ffa` says of what it measured, and that it measures. Its bounds are for `bench ffa --check`."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from typing import Any

import pytest
from click.testing import CliRunner

from tee.driver import TeeDriver
from tee.results import Origin, Result
from virtio_tee.__main__ import main
from virtio_tee.bench import ffa, ffa_load


def results(**changes: Any) -> ffa.Results:
    """Everything as it should be."""
    invokes = {level: [(10.0, 20.0)] * 3 for level in ffa_load.LEVELS}
    found = ffa.Results(ffa.Sizes(3, 0.1), invokes, shares=[(0.01, 0.16)] * 3, fuzz_s=[2.0] * 3)
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def missed(found: ffa.Results) -> list[str]:
    return [figure["name"] for figure in (goal.judge(found) for goal in ffa.GOALS) if not figure["pass"]]


def test_all_is_well() -> None:
    assert missed(results()) == []


@pytest.mark.parametrize(
    ("changes", "names"),
    [
        ({"shares": [(0.07, 1.1)] * 3}, ["mem-share/seconds"]),
        ({"shares": [(0.01, 0.5)] * 3}, ["mem-share/linear"]),
        ({"fuzz_s": [1.0, 13.0, 13.0]}, ["fuzz/million"]),
    ],
)
def test_a_bound_that_is_missed(changes: dict[str, Any], names: list[str]) -> None:
    assert missed(results(**changes)) == names


@pytest.mark.parametrize("level", ["client-api", "driver"])
def test_an_invoke_over_three_times_direct(level: str) -> None:
    found = results()
    found.invokes[level] = [(10.0, 20.0), (10.0, 31.0), (100.0, 301.0)]
    assert missed(found) == [f"null-invoke/{level}"]


def test_at_once_has_no_bound() -> None:
    found = results()
    found.invokes["at-once"] = [(1.0, 9.0)]
    assert missed(found) == []
    (figure,) = [f for f in (goal.judge(found) for goal in ffa.GOALS) if f["name"] == "null-invoke/at-once"]
    assert (figure["value"], figure["floor"]) == (9.0, None)


@pytest.mark.parametrize("level", ffa_load.LEVELS)
def test_both_ways_end_in_the_ta(level: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is a call that the TA serves; one that fails ends the bench."""
    served: list[int] = []
    probe = ffa_load.built_in("probe")[ffa_load.PROBE]
    original = probe.invoke

    async def invoke(self: Any, session: None, command: int, params: Any) -> None:
        served.append(command)
        await original(self, session, command, params)

    monkeypatch.setattr(probe, "invoke", invoke)
    for make in ffa_load.DRIVERS.values():
        with ExitStack() as stack:
            driver: TeeDriver = make()
            once = ffa_load.LEVELS[level](stack, driver)
            served.clear()
            once()
            once()
            assert served == [0, 0]


def test_an_outcome_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    tee = ffa_load.soft_tee()
    monkeypatch.setattr(tee, "invoke_at_once", lambda *_: (Result.GENERIC, Origin.TEE))
    with pytest.raises(ffa_load.WrongAnswerError):
        ffa_load.at_once(ExitStack(), tee)()


def test_latency_is_a_median_in_microseconds() -> None:
    assert ffa_load.latency_us(lambda: time.sleep(0.002), 0.02) >= 2000


def test_a_short_run() -> None:
    ran = CliRunner().invoke(main, ["bench", "ffa", "--quick", "--json"])
    assert ran.exit_code == 0, ran.output
    report = json.loads(ran.stdout)
    assert set(report) == {"machine", "sizes", "figures"}
    assert [figure["name"] for figure in report["figures"]] == [goal.name for goal in ffa.GOALS]
    for figure in report["figures"]:
        assert set(figure) == {"name", "what", "value", "floor", "sense", "pass", "details"}
        assert isinstance(figure["value"], float)


def test_a_missed_bound_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ffa, "measure", lambda sizes: results(fuzz_s=[99.0]))
    assert CliRunner().invoke(main, ["bench", "ffa"]).exit_code == 0
    ran = CliRunner().invoke(main, ["bench", "ffa", "--check"])
    assert ran.exit_code == 1
    assert "missed: fuzz/million" in ran.stderr
