"""The conformance cases: which there are, that our roles pass, and that a wrong implementation does not."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from ffa.abi.frame import Frame
from ffa.abi.ids import Call, Error, fid
from ffa.conformance import runner
from ffa.conformance.acs import SECTIONS, XEN_LINUX
from ffa.conformance.bench import Bench, Model
from ffa.conformance.lists import LISTS
from ffa.conformance.registry import CASES, INTERRUPTS, MEMORY, Case
from virtio_tee.__main__ import main

WITH_BODY = [case for case in CASES.values() if case.body is not None]


def command(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["ffa", "conformance", *arguments])


@pytest.mark.feature(
    "FF-A: all 35 tests of Arm's ACS list for Xen and Linux pass, its other lists, Hafnium's memory sharing, "
    "tf-a-tests' setup and memory sharing (`ffa conformance`)"
)
@pytest.mark.parametrize("case", WITH_BODY, ids=lambda case: case.id)
def test_no_case_fails(case: Case) -> None:
    result = runner.run(case)
    assert (result.status, result.why) == (runner.PASSED, "")
    setup = sum("maps its buffers" in check.what for check in result.checks)
    assert len(result.calls) > setup, "it called nothing"
    assert len(result.checks) > setup, "it checked nothing"
    assert all(check.passed for check in result.checks)


def test_every_test_of_the_acs_lists_is_a_case() -> None:
    """Sizes of the v1.2 lists: 17 setup, 8 direct, 4 indirect, 13 notifications, 25 interrupts; ACS's 143 of memory and
    the names that only earlier lists have."""
    assert len(XEN_LINUX) == 35
    assert not set(XEN_LINUX) - {case.id for case in WITH_BODY}
    found = Counter(case.suite for case in CASES.values())
    assert found["setup_discovery"] >= 17
    assert found["direct_messaging"] >= 8
    assert found["indirect_messaging"] >= 4
    assert found["notifications"] >= 13
    assert found[INTERRUPTS] == 25
    assert found[MEMORY] == 143
    assert not set(SECTIONS) - set(CASES)


def sizes() -> dict[tuple[str, str], int]:
    """Tests of each list, as counted in the public suites."""
    return {
        ("Arm ACS", "v1.2, Xen and Linux"): 35,
        ("Arm ACS", "v1.0: setup"): 9,
        ("Arm ACS", "v1.0: direct messaging"): 4,
        ("Arm ACS", "v1.0: indirect messaging"): 3,
        ("Arm ACS", "v1.0: memory"): 128,
        ("Arm ACS", "v1.1, new: setup"): 3,
        ("Arm ACS", "v1.1, new: direct messaging"): 2,
        ("Arm ACS", "v1.1, new: indirect messaging"): 2,
        ("Arm ACS", "v1.1, new: memory"): 10,
        ("Arm ACS", "v1.1, new: notifications"): 13,
        ("Arm ACS", "v1.1, new: interrupts"): 23,
        ("Arm ACS", "v1.2, new: setup"): 5,
        ("Arm ACS", "v1.2, new: direct messaging"): 2,
        ("Arm ACS", "v1.2, new: indirect messaging"): 1,
        ("Arm ACS", "v1.2, new: memory"): 5,
        ("Arm ACS", "v1.2, new: interrupts"): 2,
        ("Hafnium", "memory_sharing"): 82,
        ("Hafnium", "memory_sharing_v1_1"): 2,
        ("Hafnium", "memory_sharing_v1_0"): 1,
        ("Hafnium", "ffa_ns_res_info_get"): 19,
        ("tf-a-tests", "setup and discovery"): 23,
        ("tf-a-tests", "SMCCC"): 2,
        ("tf-a-tests", "memory sharing"): 20,
    }


def test_every_test_of_the_public_lists_is_a_case() -> None:
    assert {(listed.suite, listed.name): len(set(listed.tests)) for listed in LISTS} == sizes()
    for listed in LISTS:
        cases = [listed.case_of(test) for test in listed.tests]
        assert not set(cases) - set(CASES), listed.name
        assert len(set(cases)) == len(cases), f"{listed.name}: two tests, one case"


def test_only_interrupts_and_devices_are_not_applicable() -> None:
    for case in CASES.values():
        if case.body is None:
            assert any(word in case.why for word in ("interrupts", "DMA", "MMIO"))
            assert runner.run(case).status == runner.NOT_APPLICABLE
    assert Counter(case.why.split(":")[0] for case in CASES.values() if case.body is None)["MMIO"] == 3


def test_json_has_every_case_and_counts() -> None:
    result = command("--json")
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert [case["id"] for case in found["cases"]] == list(CASES)
    assert (found["passed"], found["failed"]) == (len(WITH_BODY), 0)
    assert found["not_applicable"] == len(CASES) - len(WITH_BODY)
    for case in found["cases"]:
        assert set(case) == {"id", "suite", "section", "status", "why", "calls", "checks"}
        assert case["section"] or case["why"]
        if case["status"] == "passed":
            assert case["calls"]
            assert case["checks"]
            assert set(case["calls"][0]) == {"caller", "call", "answer"}


def test_only_and_list() -> None:
    found = json.loads(command("--only", "ffa_version*", "--json").stdout)
    assert [case["id"] for case in found["cases"]] == ["ffa_version", "ffa_version_negotiation"]
    assert len(command("--list").stdout.splitlines()) == len(CASES)
    assert command("--only", "no such").exit_code == 2


def broken(bench: Bench) -> Model:
    """Our roles, but every VM is told that it is VM 1."""
    model = Model(bench)
    call = model.call
    model.call = lambda c, f, v=0: Frame.success(1) if f.fid == fid(Call.ID_GET) else call(c, f, v)  # type: ignore[method-assign]
    return model


def raising(bench: Bench) -> Model:
    """No implementation at all."""
    raise OSError("no board")


def test_against_somebody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    name = Path(__file__).stem
    result = command("--against", f"{name}:broken", "--only", "ffa_id_get")
    assert result.exit_code == 1
    assert "it is told its own: (1, 0, 0, 0, 0, 0), not (2, 0, 0, 0, 0, 0)" in result.stdout
    assert "1 failed" in result.stdout
    assert command("--against", f"{name}:broken", "--only", "ffa_version").exit_code == 0
    found = json.loads(command("--against", f"{name}:raising", "--only", "ffa_id_get", "--json").stdout)
    assert "no board" in found["cases"][0]["why"]


@pytest.mark.parametrize("name", ["nothing", "no_such_module:x", "json:nothing", "json:__name__"])
def test_what_is_no_factory_is_refused(name: str) -> None:
    result = command("--against", name)
    assert result.exit_code == 2
    assert name.partition(":")[0] in result.stderr


def test_a_refusal_with_another_code_fails() -> None:
    case = CASES["ffa_rx_release"]

    def other_code(bench: Bench) -> Model:
        model = Model(bench)
        call = model.call

        def wrong(caller: int, frame: Frame, vcpu: int = 0) -> Frame:
            answer = call(caller, frame, vcpu)
            return Frame.failure(Error.BUSY) if answer.error is Error.DENIED else answer

        model.call = wrong  # type: ignore[method-assign]
        return model

    result = runner.run(case, other_code)
    assert (result.status, result.checks[-1].passed) == (runner.FAILED, False)
    assert "DENIED" in result.why
