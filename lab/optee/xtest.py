"""OP-TEE's own test suite: running it, and what it said."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from lab.driven import DrivenGuest, GuestError
from lab.run import tail

SMOKE = ("1001", "1002", "1004", "1006", "1013", "1022", "2001", "4001", "6001")
_TOTALS = re.compile(
    r"^(\d+) subtests? of which (\d+) failed\n"
    r"(\d+) test cases? of which (\d+) failed\n"
    r"(\d+) test cases? w(?:ere|as) skipped$",
    re.MULTILINE,
)


@dataclass(frozen=True)
class XtestResult:
    cases: dict[str, str]  # name → OK or FAILED
    subtests: int
    failed_subtests: int
    skipped: int

    @property
    def failed(self) -> list[str]:
        return [name for name, verdict in self.cases.items() if verdict != "OK"]

    def __str__(self) -> str:
        said = f"{len(self.cases)} cases, {self.subtests} subtests, {self.failed_subtests} failed"
        return f"{said}: {' '.join(self.failed)}" if self.failed else said


def parse(text: str) -> XtestResult:
    """What xtest has written.

    :raises ValueError: it did not end as it does, or its totals are not those of its list
    """
    totals = list(_TOTALS.finditer(text))
    if not totals:
        raise ValueError("xtest did not come to its totals")
    subtests, failed_subtests, cases, failed, skipped = (int(number) for number in totals[-1].groups())
    listed = text[: totals[-1].start()].rpartition("Result of testsuite ")[2]
    verdicts = dict(re.findall(r"^(\w+_\d+) (OK|FAILED.*)$", listed, re.MULTILINE))
    result = XtestResult(verdicts, subtests, failed_subtests, skipped)
    if len(verdicts) != cases or len(result.failed) != failed:
        raise ValueError(f"xtest counts {cases} cases, {failed} failed, and lists {result}")
    return result


def run_xtest(where: DrivenGuest, cases: Sequence[str] = SMOKE, timeout: float = 600) -> XtestResult:
    """Run cases of the regression suite, or all. GuestError where it does not come to its end."""
    done = where.run(["xtest", "-t", "regression", "-l", "0", *cases], timeout=timeout, check=False)
    try:
        return parse(done.stdout)
    except ValueError as error:
        raise GuestError(f"{error}; the end of what it said:\n{tail(done.stdout + done.stderr)}") from error
