"""Runs cases against an implementation, and tells what came out."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from ffa.conformance import (
    hafnium,
    memory_retrieve,
    memory_send,
    memory_states,
    messaging,
    not_applicable,
    notifications,
    setup,
    tf_a_tests,
    xen,
)
from ffa.conformance.bench import Factory, Model
from ffa.conformance.registry import CASES, NO_SECTION, Case
from ffa.conformance.run import Checked, CheckFailedError, Made, Run

PASSED, FAILED, NOT_APPLICABLE = "passed", "failed", "not_applicable"
SUITES = (
    *(setup, messaging, memory_send, memory_retrieve, memory_states, notifications, not_applicable),
    *(hafnium, tf_a_tests, xen),
)
"""The modules that fill ``CASES``."""


@dataclass(frozen=True, slots=True)
class Result:
    """What came out of one case."""

    case: Case
    status: str
    why: str = ""
    calls: list[Made] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)

    def as_json(self) -> dict[str, object]:
        """As ``--json`` prints it."""
        c = self.case
        why = self.why or ("" if c.section else NO_SECTION)
        return {
            "id": c.id,
            "suite": c.suite,
            "section": c.section,
            "status": self.status,
            "why": why,
            "calls": [made.as_json() for made in self.calls],
            "checks": [check.as_json() for check in self.checks],
        }


def run(case: Case, factory: Factory = Model) -> Result:
    """Runs one case. Whatever the implementation raises is a failure of it."""
    if case.body is None:
        return Result(case, NOT_APPLICABLE, case.why)
    try:
        t = Run(factory)
    except Exception as e:
        return Result(case, FAILED, f"the bench does not come up: {e!r}")
    try:
        case.body(t)
    except CheckFailedError as e:
        return Result(case, FAILED, str(e), t.calls, t.checks)
    except Exception as e:
        return Result(case, FAILED, f"raised {e!r}", t.calls, t.checks)
    return Result(case, PASSED, "", t.calls, t.checks)


def select(glob: str = "*") -> list[Case]:
    """Cases whose id matches, in the order of the suites."""
    return [case for case in CASES.values() if fnmatchcase(case.id, glob)]


def counts(results: Iterable[Result]) -> dict[str, int]:
    """How many of each status."""
    found = dict.fromkeys((PASSED, FAILED, NOT_APPLICABLE), 0)
    for result in results:
        found[result.status] += 1
    return found


def load(name: str) -> Factory:
    """The factory that ``MODULE:FACTORY`` names; modules of the working directory are found too.

    Raises ValueError: the name has no colon, or there is nothing to call.
    """
    module, colon, attribute = name.partition(":")
    if not colon:
        raise ValueError(f"{name!r} is not MODULE:FACTORY")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as e:
        raise ValueError(f"cannot import {name!r}: {e}") from None
    if not callable(found):
        raise ValueError(f"{name!r} is not callable: give a function that takes a Bench and returns what answers calls")
    factory: Factory = found
    return factory
