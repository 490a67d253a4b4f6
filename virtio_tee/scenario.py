"""What the demo does, on whatever path: load TAs from the guest's supplicant, call them with values and memory."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from guest_driver.client import Context, TempInOut, TempOut, ValueIn, ValueInOut
from tee.calls import Call
from tee.io.runtime import Observation, TeeRuntime
from tee.params import Direction
from tee.results import TeeError, describe
from tee.rpc import Rpc, describe_command
from tee.soft.examples import UUIDS

REGISTERED_BYTES = 1 << 20
XOR, PAGE = 2, 4096


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


def main_job(runtime: TeeRuntime, report: Report) -> None:
    """The main job. Raises TeeError or CheckError after noting the step that failed."""
    with report.step("open a context"):
        context = Context(runtime)
    with context:
        with report.step("open a session with hello_world"):
            session = context.open_session(UUIDS["hello_world"])
        with session, report.step("invoke: increment 41") as step:
            (value,) = session.invoke(0, ValueInOut(41))
            check(getattr(value, "a", None) == 42, f"hello_world answered {value!r} instead of 42")
            step.detail = "42"
        with report.step("open a session with random"):
            session = context.open_session(UUIDS["random"])
        with session, report.step("invoke: 32 random bytes into temporary memory") as step:
            (one,), (two,) = session.invoke(0, TempOut(32)), session.invoke(0, TempOut(32))
            check(isinstance(one, bytes) and len(one) == 32 and one != two, "the bytes are not random")
            step.detail = f"{one[:8].hex()}…" if isinstance(one, bytes) else ""
        with report.step("open a session with probe"):
            session = context.open_session(UUIDS["probe"])
        with session:
            with report.step("invoke: xor 4 KiB of temporary memory"):
                answer = session.invoke(XOR, TempInOut(bytes(PAGE)), ValueIn(0x5A))[0]
                check(answer == b"\x5a" * PAGE, "the bytes are not what they should be")
            with report.step("register 1 MiB"):
                shared = context.allocate(REGISTERED_BYTES)
            with shared, report.step("invoke: xor 1 MiB of registered memory in place"):
                shared.write(b"\xff" * REGISTERED_BYTES)
                session.invoke(XOR, shared.whole(Direction.INOUT), ValueIn(0x0F))
                check(shared.read() == b"\xf0" * REGISTERED_BYTES, "the bytes are not what they should be")


def run(job: Callable[[TeeRuntime, Report], None], runtime: TeeRuntime, report: Report) -> None:
    """Run a scenario; what goes wrong stands in the report."""
    with suppress(TeeError, CheckError):  # the step that failed has noted it
        job(runtime, report)
