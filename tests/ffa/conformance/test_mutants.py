"""Every shipped defect is found by a case."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from click.testing import CliRunner

from ffa.conformance import mutants, runner
from ffa.conformance.mutants import MUTANTS, NAMED, Mutant
from ffa.conformance.registry import CASES
from ffa.conformance.run import CheckFailedError, Run
from virtio_tee.__main__ import main

FIRST_AT = ("xen_", "test_", "ffa_", "share", "lend", "donate", "mem_", "notification", "r")
"""Beginnings of ids in an order that finds most defects early."""
CASES_IN_ORDER = sorted(
    (case for case in CASES.values() if case.body is not None),
    key=lambda case: next((n for n, start in enumerate(FIRST_AT) if case.id.startswith(start)), len(FIRST_AT)),
)


@pytest.mark.feature("FF-A: each of 204 defects in a hypervisor or SPMC is found (`ffa conformance --against mutants`)")
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_each_defect_is_found(mutant: Mutant) -> None:
    assert any(mutant.caught_by([case]) for case in CASES_IN_ORDER), mutant.defect


def test_every_case_finds_one() -> None:
    """A mutant on which no bench comes up proves nothing of a case."""
    gentle = [mutant for mutant in MUTANTS if comes_up(mutant)]
    assert len(gentle) > len(MUTANTS) - 5
    found = Counter[str]()
    for case in CASES_IN_ORDER:
        gentle.sort(key=lambda mutant: -found[mutant.name])  # those that most cases find are tried first
        one = next((mutant.name for mutant in gentle if mutant.caught_by([case])), "")
        assert one, f"{case.id} finds no defect at all"
        found[one] += 1
    assert len(found) > 40


def comes_up(mutant: Mutant) -> bool:
    try:
        Run(mutant)
    except CheckFailedError:
        return False
    return True


def test_there_are_enough_and_each_has_its_name() -> None:
    assert len(NAMED) >= 40
    assert len(MUTANTS) == 204  # as the README says
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)
    assert len({mutant.defect for mutant in MUTANTS}) == len(MUTANTS)


def test_what_is_left_out_of_the_mutants_is_in_the_tables() -> None:
    checks = {(table, check.name) for table, rows in mutants._TABLES.items() for check in rows}
    assert checks > mutants.NOT_SEEN | mutants.NO_OWN_CODE | mutants.NO_ORDER


def test_a_mutant_changes_nobody_elses_roles() -> None:
    case = CASES["share_input_error_checks"]
    assert any(mutant.caught_by([case]) for mutant in MUTANTS)
    assert runner.run(case).status == runner.PASSED


def test_the_command_prints_what_it_promises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("virtio_tee.ffa_conformance.MUTANTS", NAMED[:3])
    command = ["ffa", "conformance", "--against", "mutants"]
    result = CliRunner().invoke(main, [*command, "--json", "--only", "*share*"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)["mutants"]
    assert [set(m) for m in found] == [{"name", "defect", "caught_by"}] * 3
    assert all(m["caught_by"] for m in found)
    none = CliRunner().invoke(main, [*command, "--only", "ffa_id_get"])
    assert (none.exit_code, "0 of 3 mutants caught" in none.stdout) == (1, True)
