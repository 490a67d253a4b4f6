"""Scenarios of services and server enclaves, with packages from the guest's folder."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from pathlib import Path

from guest_driver.client import Context, ValueInOut
from guest_driver.services import Services
from tee import attestation
from tee.io.runtime import TeeRuntime
from tee.package import parse
from tee.params import Direction
from tee.results import Result, TeeError, describe
from tee.services import NONCE_SIZE, CallReturn
from tee.soft.examples import UUIDS
from virtio_tee.report import CheckError, Report, check

REGISTERED_BYTES = 1 << 20
ADD, XOR_ALL, PASS_ON = range(3)  # of the stages
ATTESTER = "attester.pem"
"""The public key that attests services, in the guest's folder."""


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


def files_in(folders: Sequence[str | Path]) -> Files:
    """Reads from the first of ``folders`` that has the file."""

    def read(name: str) -> bytes:
        for folder in folders:
            if (path := Path(folder) / name).is_file():
                return path.read_bytes()
        raise CheckError(f"there is no {name} in {', '.join(map(str, folders))}")

    return read
