"""What the demo does, on whatever path: load TAs from the guest's supplicant, call them with values and memory."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from guest_driver.client import Context, TempInOut, TempOut, ValueIn, ValueInOut
from guest_driver.services import Services
from tee import attestation
from tee.calls import Call
from tee.io.runtime import Observation, TeeRuntime
from tee.package import parse
from tee.params import Direction
from tee.results import Result, TeeError, describe
from tee.rpc import Rpc, describe_command
from tee.services import NONCE_SIZE, CallReturn
from tee.soft.examples import UUIDS

REGISTERED_BYTES = 1 << 20
XOR, PAGE = 2, 4096
ADD, XOR_ALL, PASS_ON = range(3)  # of the stages
ATTESTER = "attester.pem"
"""The public key that attests services, in the guest's folder."""


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


def services_job(runtime: TeeRuntime, report: Report, files: Files) -> None:
    """Services: list, load, one-shot task, attest, remove; and what is refused."""
    stage, package = UUIDS["stage"], files(f"{UUIDS['stage']}.ta")
    with Context(runtime) as context, Services(context) as services:
        with report.step("list the services") as step:
            before = {service.uuid for service in services.available()}
            check(stage not in before, "the service is there already")
            step.detail = f"{len(before)}"
        with report.step("load a service, verified before it is installed") as step:
            loaded = services.load(package)
            check(loaded.uuid == stage, f"service {loaded.uuid} was loaded")
            check({service.uuid for service in services.available()} == before | {stage}, "it is not listed")
            step.detail = f"version {loaded.version}"
        with report.step("load it with one bit changed: refused") as step:
            step.detail = expect(Result.SECURITY, lambda: services.load(package[:-1] + bytes([package[-1] ^ 1])))
        with report.step("load the one half of it: refused") as step:
            step.detail = expect(Result.BAD_FORMAT, lambda: services.load(package[: len(package) // 2]))
        with report.step("attest it: a statement about it, signed for this nonce") as step:
            nonce = secrets.token_bytes(NONCE_SIZE)
            said = attestation.check(services.attest(stage, nonce), files(ATTESTER), nonce)
            measured = parse(package).digest
            check((said.uuid, said.digest) == (stage, measured), "the statement is about something else")
            step.detail = f"SHA-256 {measured.hex()[:16]}…"
        with report.step("a one-shot task: open, invoke and close in one call") as step:
            services.load(files(f"{UUIDS['hello_world']}.ta"))
            (value,) = services.task(UUIDS["hello_world"], 0, ValueInOut(41))
            check(getattr(value, "a", None) == 42, f"the task answered {value!r} instead of 42")
            step.detail = "42"
        with report.step("remove it"):
            services.remove(stage)
            check(stage not in {service.uuid for service in services.available()}, "it is still listed")
        with report.step("remove it again: refused") as step:
            step.detail = expect(Result.ITEM_NOT_FOUND, lambda: services.remove(stage))


def enclaves_job(runtime: TeeRuntime, report: Report, files: Files) -> None:
    """Server enclaves: create, acquire, call with memory in place, chains, cycles, destroy."""
    stage = UUIDS["stage"]
    with Context(runtime) as context, Services(context) as services:
        with report.step("load a service, and create three enclaves of it"):
            services.load(files(f"{stage}.ta"))
            enclaves = [services.create_enclave(stage, f"stage-{number}") for number in range(3)]
        with report.step("create one of the same name: refused") as step:
            step.detail = expect(Result.BUSY, lambda: services.create_enclave(stage, "stage-0"))
        with report.step("acquire the first by its name"):
            server = services.acquire("stage-0")
        with report.step("call it with register values") as step:
            values = [server.call(ADD, number).value for number in (40, 2)]
            check(values == [40, 42], f"it returned {values}")
            step.detail = "42"
        with context.allocate(REGISTERED_BYTES) as shared:
            with report.step("call it with 1 MiB that it changes in place"):
                given = server.call(XOR_ALL, 0x0F, memory=shared.whole(Direction.INOUT))
                check(given == CallReturn(shared.size, 0, shared.size), f"it returned {given}")
                check(shared.read() == b"\x0f" * shared.size, "the bytes are not what they should be")
            with report.step("a chain of three, the memory handed on without a copy"):
                server.call(PASS_ON, 1, PASS_ON, 2, XOR_ALL, 0xF0, memory=shared.whole(Direction.INOUT))
                check(shared.read() == b"\xff" * shared.size, "the bytes are not what they should be")
        with report.step("a chain that comes back: refused") as step:
            step.detail = expect(Result.ACCESS_CONFLICT, lambda: server.call(PASS_ON, 1, PASS_ON, 0, ADD, 1))
        with report.step("destroy one; a call to it says so") as step:
            enclaves[0].destroy()
            step.detail = expect(Result.TARGET_DEAD, lambda: server.call(ADD, 1))
        with report.step("its name is gone") as step:
            step.detail = expect(Result.ITEM_NOT_FOUND, lambda: services.acquire("stage-0"))


def expect(code: Result, act: Callable[[], object]) -> str:
    """That ``act`` is refused with ``code``, whose name is returned. Raises CheckError."""
    try:
        act()
    except TeeError as e:
        check(e.code == code, f"{describe(e.code)} instead of {code.name}")
        return code.name
    raise CheckError(f"it was not refused with {code.name}")


Files = Callable[[str], bytes]
"""A file of the guest's folder of TAs, by its name."""

SCENARIOS: dict[str, Callable[[TeeRuntime, Report, Files], None]] = {
    "main": lambda runtime, report, _: main_job(runtime, report),
    "services": services_job,
    "enclaves": enclaves_job,
}
"""What can be shown, by name."""


def files_in(folders: Sequence[str | Path]) -> Files:
    """Reads from the first of ``folders`` that has the file."""

    def read(name: str) -> bytes:
        for folder in folders:
            if (path := Path(folder) / name).is_file():
                return path.read_bytes()
        raise CheckError(f"there is no {name} in {', '.join(map(str, folders))}")

    return read


def named(name: str, files: Files) -> Callable[[TeeRuntime, Report], None]:
    """The scenario of this name, which has these ``files``."""
    return lambda runtime, report: SCENARIOS[name](runtime, report, files)


def run(job: Callable[[TeeRuntime, Report], None], runtime: TeeRuntime, report: Report) -> None:
    """Run a scenario; what goes wrong stands in the report."""
    try:
        job(runtime, report)
    except (TeeError, CheckError) as e:
        report.why = report.why or str(e)  # mostly the step that failed has noted it
