"""What a scenario has done: steps, events, and what went wrong."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from tee.calls import Call
from tee.io.runtime import Observation
from tee.results import TeeError, describe
from tee.rpc import Rpc, describe_command


@dataclass(slots=True)
class Step:
    """One thing that was done. Times are seconds of the monotonic clock."""

    name: str
    start: float
    ok: bool = False
    detail: str = ""
    took_s: float = 0.0


@dataclass(slots=True)
class Report:
    """What came of a scenario."""

    steps: list[Step] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    why: str = ""

    @property
    def ok(self) -> bool:
        """Whether all steps succeeded."""
        return not self.why and bool(self.steps) and all(step.ok for step in self.steps)

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        """Run the body as one step."""
        step = Step(name, time.monotonic())
        self.steps.append(step)
        try:
            yield step
            step.ok = True
        except (TeeError, CheckError) as e:
            self.why = f"{name}: {e}"
            raise
        finally:
            step.took_s = time.monotonic() - step.start

    def observe(self, seen: Observation) -> None:
        """For :class:`TeeRuntime`: what went to the device and came from it."""
        subject = seen.subject
        what = describe_command(subject.command) if isinstance(subject, Rpc) else _request_name(type(subject))
        code = getattr(seen.detail, "code", None)
        result = None if code is None else describe(code)
        event = {"time": seen.time, "kind": seen.kind, "what": what, "id": id(subject), "result": result}
        self.events.append(event)

    def as_json(self) -> dict[str, Any]:
        """For the process that started this one."""
        return {"ok": self.ok, "why": self.why, "steps": [asdict(s) for s in self.steps], "events": self.events}


def _request_name(call: type[Call]) -> str:
    """OpenSession → OPEN_SESSION, as the backend's trace and the specification say it."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", call.__name__).upper()


class CheckError(Exception):
    """A TA answered, but not what it should have."""


def check(condition: bool, why: str) -> None:
    """Raise CheckError unless ``condition`` holds."""
    if not condition:
        raise CheckError(why)
