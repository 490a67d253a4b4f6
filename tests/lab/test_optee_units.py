"""The parts of the lab's OP-TEE that need no machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.cache import LabError
from lab.optee.source import Edit, edit_files, edited
from lab.optee.stacks import STACKS, STATS, with_stats
from lab.optee.xtest import XtestResult, parse
from lab.rootfs import BOOKWORM, TRIXIE


def test_an_edit_that_fits() -> None:
    assert edited(b"a=1; b=2; a=1", Edit("x", "a=1", "a=3", times=2), "x") == b"a=3; b=2; a=3"


@pytest.mark.parametrize("times", [0, 1, 3])
def test_an_edit_of_another_text(times: int) -> None:
    """What upstream has changed is not guessed at."""
    with pytest.raises(LabError, match=r"x: 'a=1' is there 2 times, not \d"):
        edited(b"a=1; b=2; a=1", Edit("x", "a=1", "a=3", times=times), "x")


def test_an_edit_of_a_file_that_is_gone(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="is not there"):
        edit_files(tmp_path, [Edit("x", "a", "b")])
    (tmp_path / "x").write_text("a")
    edit_files(tmp_path, [Edit("x", "a", "b")])
    assert (tmp_path / "x").read_text() == "b"


def test_statistics() -> None:
    assert with_stats(STACKS["smc45"]) == STACKS["smc45"]
    ffa = STACKS["ffa410"]
    assert ffa.core is not None
    assert not ffa.has_stats
    assert with_stats(ffa).core == (*ffa.core, STATS)
    assert with_stats(with_stats(ffa)) == with_stats(ffa)


SAID = """\
regression_1001 OK
+-----------------------------------------------------
Result of testsuite regression filtered by "1001":
regression_1001 OK
regression_1002 {}
+-----------------------------------------------------
586 subtests of which {} failed
2 test case{} of which {} failed
106 test cases were skipped
TEE test application done!
"""


def test_what_xtest_says() -> None:
    good = parse(SAID.format("OK", 0, "s", 0))
    assert good == XtestResult({"regression_1001": "OK", "regression_1002": "OK"}, 586, 0, 106)
    assert str(good) == "2 cases, 586 subtests, 0 failed"
    bad = parse(SAID.format("FAILED first error at regression_1000.c:11", 3, "s", 1))
    assert bad.failed == ["regression_1002"]
    assert str(bad) == "2 cases, 586 subtests, 3 failed: regression_1002"


@pytest.mark.parametrize("text", ["", SAID[:150], SAID.format("OK", 0, "s", 1), SAID.format("", 0, "s", 0)])
def test_what_xtest_does_not_say(text: str) -> None:
    with pytest.raises(ValueError, match="xtest"):
        parse(text)


def test_systems() -> None:
    for system in (BOOKWORM, TRIXIE):
        assert f"python{system.python}-minimal" in system.packages
        assert system.local == f"usr/local/lib/python{system.python}/dist-packages"
