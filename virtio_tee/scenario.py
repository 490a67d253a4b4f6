"""What the demo does, on whatever path: load TAs from the guest's supplicant, call them with values and memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from guest_driver.client import Context, TempInOut, TempOut, ValueIn, ValueInOut
from tee.io.runtime import TeeRuntime
from tee.params import Direction
from tee.results import TeeError
from tee.soft.examples import UUIDS
from virtio_tee.report import CheckError, Report, check
from virtio_tee.scenario_ocalls import grpc_job, ocall_job
from virtio_tee.scenario_services import Files, enclaves_job, files_in, services_job

REGISTERED_BYTES = 1 << 20
XOR, PAGE = 2, 4096


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


SCENARIOS: dict[str, Callable[[TeeRuntime, Report], None]] = {
    "main": main_job,
    "ocall": ocall_job,
    "grpc": grpc_job,
}
"""By name."""

WITH_FILES: dict[str, Callable[[TeeRuntime, Report, Files], None]] = {
    "services": services_job,
    "enclaves": enclaves_job,
}
"""Those that take packages from the guest's folder."""


def job_of(name: str, folders: Sequence[str | Path]) -> Callable[[TeeRuntime, Report], None]:
    """The scenario of this name, for a guest whose TAs lie in ``folders``."""
    if name in SCENARIOS:
        return SCENARIOS[name]
    return lambda runtime, report: WITH_FILES[name](runtime, report, files_in(folders))


def run(job: Callable[[TeeRuntime, Report], None], runtime: TeeRuntime, report: Report) -> None:
    """Run a scenario; what goes wrong stands in the report."""
    try:
        job(runtime, report)
    except (TeeError, CheckError) as e:
        report.why = report.why or str(e)  # mostly the step that failed has noted it
