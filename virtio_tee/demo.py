"""``virtio-tee demo``: backend and guest as two processes of this machine, or a guest on its real device."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tee.soft.examples import UUIDS, source
from virtio_tee.attach import FOLDER, open_driver, scenario_option, supplicant_of, ta_folders
from virtio_tee.outcome import Exchange, Outcome, from_events, from_trace, show

if TYPE_CHECKING:
    from tee.io.supplicant import Services

GUEST_TIMEOUT_S = 60
READY_TIMEOUT_S = 20
THE_ONLY_ONE = "auto"


@click.command()
@click.option(
    "--path",
    type=click.Choice(["virtio", "ffa"]),
    default="virtio",
    show_default=True,
    help="How the guest reaches the TEE: its virtio-tee device, or OP-TEE over FF-A.",
)
@click.option(
    "--tee",
    "kind",
    type=click.Choice(["soft", "ffa"]),
    default="soft",
    show_default=True,
    help="With --path virtio: the backend's TEE (serve --tee).",
)
@scenario_option
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the timeline.")
@click.option(
    "--device",
    is_flag=False,
    flag_value=THE_ONLY_ONE,
    metavar="[ADDRESS|PATH]",
    help="In a guest: use its TEE device, by PCI address (0000:00:03.0) or the only one, and the backend behind it. On "
    "any machine: a TEE device of Linux, by its path (/dev/tee0).",
)
@click.option(
    "--ta-folder",
    "ta_places",
    multiple=True,
    type=FOLDER,
    metavar="DIR",
    help="With --device: where the guest's signed TAs lie; may be given again. Default: /lib/optee_armtz.",
)
@click.option(
    "--folder",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Keep keys, TAs and traces here; what is there already is used as it is. Default: a temporary folder.",
)
@click.option(
    "--without-ta",
    "without",
    multiple=True,
    type=click.Choice(sorted(UUIDS)),
    help="Remove this TA from the guest's folder first: the demo then fails and says why.",
)
def demo(
    path: str,
    kind: str,
    name: str,
    as_json: bool,
    device: str | None,
    ta_places: tuple[Path, ...],
    folder: Path | None,
    without: tuple[str, ...],
) -> None:
    """Show the main job in a few seconds: a guest loads TAs over RPC and calls them through a virtio-tee device.

    Two processes: the backend (virtio-tee serve) and a guest, which attaches to its vhost-user socket
    with memory of its own, as a VM does. The TAs are signed with a throw-away key and lie in the guest's folder;
    the backend has only the public key.

    With --path ffa the same over the model of FF-A, in one process: hypervisor, SPMC, and OP-TEE's partition with the
    software TEE behind it.

    Scenarios: main, as above; ocall, a TA calls the client that called it; grpc, the same by way of the generic RPC
    pseudo-TA.

    Inside a guest, --device runs the same on the real device: the TAs hello_world, random and probe, signed by a key
    that the backend trusts, have to lie in the guest's folder. --device /dev/tee0 does it by way of the kernel's
    driver: the demo serves the TEE's RPCs on /dev/teepriv0, unless a supplicant runs that does.

    Exit status 1: something failed.
    """
    if kind != "soft" and (path != "virtio" or device is not None):
        raise click.UsageError("--tee is of the backend that the demo starts: not with --path ffa, nor with --device")
    if device is not None:
        if path != "virtio":
            raise click.UsageError("--device is on the virtio path")
        if folder or without:
            raise click.UsageError("--folder and --without-ta do not go with --device: the TAs are the guest's")
        if device.startswith("/"):
            outcome = _on_linux(name, Path(device), ta_places)
        else:
            outcome = _on_device(name, None if device == THE_ONLY_ONE else device, ta_places)
    else:
        if ta_places:
            raise click.UsageError("--ta-folder goes with --device; otherwise the demo signs its own (--folder)")
        with ExitStack() as stack:
            where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virtio-tee-")))
            outcome = _over_ffa(name, where, without) if path == "ffa" else _two_processes(name, where, without, kind)
    if as_json:
        click.echo(json.dumps(outcome.as_json()))
    else:
        show(outcome)
    sys.exit(0 if outcome.result == "ok" else 1)


def _on_device(name: str, address: str | None, folders: tuple[Path, ...]) -> Outcome:
    """In this process, on the PCI device; the driver counts requests and RPCs, where they leave and arrive."""
    from tee.driver import TeeKind
    from tee.io.runtime import TeeRuntime
    from virtio_tee import scenario
    from virtio_tee.report import Report

    start = time.monotonic()
    report = Report()
    supplicant = supplicant_of(_services(folders))
    with closing(supplicant), closing(open_driver(None, address)) as driver:
        with TeeRuntime(driver, supplicant, report.observe) as runtime:
            scenario.run(scenario.job_of(name, ta_folders(folders)), runtime, report)
        kind = driver.info.kind
    seen = report.as_json()
    return Outcome(
        why=report.why,
        elapsed_s=time.monotonic() - start,
        tee=TeeKind(kind).name.lower() if kind in list(TeeKind) else f"kind {kind}",
        steps=seen["steps"],
        requests=from_events(report.events, "start", "done"),
        rpcs=from_events(report.events, "rpc", "answer", answered_by="guest"),
    )


def _on_linux(name: str, path: Path, folders: tuple[Path, ...]) -> Outcome:
    """In this process, on the kernel's driver; its RPCs are served, and noted, beside it, where nobody else does."""
    from tee.io.runtime import TeeRuntime
    from virtio_tee import linux_tee, scenario
    from virtio_tee.report import Report

    start = time.monotonic()
    report = Report()
    rpcs: list[Exchange] = []
    try:
        driver = linux_tee.open_linux(path)
    except OSError as e:
        raise click.ClickException(str(e)) from None
    with closing(driver), closing(supplicant_of(_services(folders))) as supplicant:
        linux_tee.serve_beside(path, supplicant, rpcs.append)
        with TeeRuntime(driver, None, report.observe) as runtime:
            scenario.run(scenario.job_of(name, ta_folders(folders)), runtime, report)
    return Outcome(
        why=report.why,
        elapsed_s=time.monotonic() - start,
        tee="linux",
        path="linux",
        steps=report.as_json()["steps"],
        requests=from_events(report.events, "start", "done"),
        rpcs=rpcs,
    )


def _services(folders: tuple[Path, ...]) -> Services:
    from tee.io.supplicant import Services

    found = ta_folders(folders)
    if not found:
        raise click.UsageError("no TAs: put those that the TEE trusts into /lib/optee_armtz, or say --ta-folder")
    return Services(ta_folders=tuple(str(folder) for folder in found))


def _over_ffa(name: str, folder: Path, without: tuple[str, ...]) -> Outcome:
    """In this process; the driver counts requests and RPCs, where they leave and arrive."""
    import secrets

    from tee.io.runtime import TeeRuntime
    from tee.io.supplicant import Services
    from tee.results import TeeError
    from tee.soft.driver import SoftTee
    from virtio_tee import scenario
    from virtio_tee.ffa_vm import ffa_driver
    from virtio_tee.keys import public_key
    from virtio_tee.report import Report

    start = time.monotonic()
    tas = _prepare(folder)
    for ta in without:
        (tas / f"{UUIDS[ta]}.ta").unlink(missing_ok=True)
    outcome, report = Outcome(path="ffa"), Report()
    tee = SoftTee(
        clock=time.monotonic,
        random=secrets.token_bytes,
        keys=[public_key(folder / "vendor.pem")],
        attestation_key=(folder / "attester.key").read_bytes(),
    )
    try:
        driver = ffa_driver(tee)
    except TeeError as e:
        outcome.why = str(e)
        return outcome
    with (
        closing(supplicant_of(Services(ta_folders=(str(tas),)))) as supplicant,
        closing(driver),
        TeeRuntime(driver, supplicant, report.observe) as runtime,
    ):
        scenario.run(scenario.job_of(name, [tas]), runtime, report)
    outcome.why = report.why and report.why + _missing_tas(tas, without)
    outcome.steps = report.as_json()["steps"]
    outcome.requests = from_events(report.events, "start", "done")
    outcome.rpcs = from_events(report.events, "rpc", "answer", answered_by="guest")
    outcome.elapsed_s = time.monotonic() - start
    return outcome


def _two_processes(name: str, folder: Path, without: tuple[str, ...], kind: str) -> Outcome:
    """The backend counts requests and RPCs, where they arrive and leave."""
    start = time.monotonic()
    outcome = Outcome(tee=kind)
    tas = _prepare(folder)
    for ta in without:
        (tas / f"{UUIDS[ta]}.ta").unlink(missing_ok=True)
    trace = folder / "trace.json"
    with tempfile.TemporaryDirectory(prefix="vtee-") as sockets:
        socket = Path(sockets) / "tee.sock"
        backend = subprocess.Popen(
            [
                *_SELF,
                "serve",
                "--tee",
                kind,
                "--socket-path",
                str(socket),
                "--ta-key",
                str(folder / "vendor.pem"),
                *(("--attestation-key", str(folder / "attester.key")) if kind == "soft" else ()),
                *_SERVE,
                str(trace),
            ],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            _wait_until_ready(backend)
            guest = subprocess.run(
                [
                    *_SELF,
                    "guest",
                    "demo",
                    "--scenario",
                    name,
                    "--socket",
                    str(socket),
                    "--ta-folder",
                    str(tas),
                    "--json",
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=GUEST_TIMEOUT_S,
                check=False,
            )
            said = json.loads(guest.stdout) if guest.stdout else {}
            outcome.steps = said.get("steps", [])
            if guest.returncode:
                outcome.why = said.get("why") or guest.stderr.strip() or "the guest failed"
                outcome.why += "".join(f"; {line}" for line in guest.stderr.splitlines() if line not in outcome.why)
        except (subprocess.TimeoutExpired, NotReadyError) as e:
            outcome.why = str(e)
        finally:
            backend.terminate()
            _, errors = backend.communicate()
    if backend.returncode != 0 and not outcome.why:
        outcome.why = f"the backend ended with {backend.returncode}: {errors.strip()}"
    if outcome.why:
        outcome.why += _missing_tas(tas, without)
    seen = _read_trace(trace)
    outcome.requests, outcome.rpcs = from_trace(seen, "requests"), from_trace(seen, "RPCs")
    outcome.elapsed_s = time.monotonic() - start
    return outcome


_SERVE = ("--vm", "demo", "--trace")
_SELF = (sys.executable, "-m", "virtio_tee")


class NotReadyError(Exception):
    """The backend did not start."""


KEYS = ("vendor.key", "vendor.pem")


def _prepare(folder: Path) -> Path:
    """A vendor's key and the guest's folder with its signed TAs, unless they are there already.

    Raises click.UsageError where only a part of the keys is there: what is left was somebody's, and stays.
    """
    from tee import package

    tas = folder / "guest" / "optee_armtz"
    private, public = (folder / name for name in KEYS)
    attester, trusted = folder / "attester.key", tas / "attester.pem"
    kept = [path for path in (private, public, *sorted(tas.glob("*.ta"))) if path.exists()]
    missing = [path.name for path in (private, public) if not path.exists()]
    if not kept:
        tas.mkdir(parents=True, exist_ok=True)
        pair = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
        private.touch(0o600)
        private.write_bytes(pair.private)
        public.write_bytes(pair.public)
        for name, uuid in UUIDS.items():
            (tas / f"{uuid}.ta").write_bytes(package.sign(source(name), uuid, 1, pair.private))
    elif missing:
        raise click.UsageError(
            f"--folder {folder} has {kept[0].relative_to(folder)}, but no {' and no '.join(missing)}: "
            "put back what is missing, or name an empty folder to have all made anew"
        )
    if not (attester.exists() and trusted.exists()):
        pair = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
        attester.touch(0o600)
        attester.write_bytes(pair.private)
        trusted.write_bytes(pair.public)
    return tas


def _missing_tas(tas: Path, meant: tuple[str, ...]) -> str:
    """What to do about example TAs that are not in the folder, other than those ``meant``; "" where all are."""
    missing = [name for name, uuid in UUIDS.items() if name not in meant and not (tas / f"{uuid}.ta").exists()]
    if not missing:
        return ""
    return f"; {tas} lacks {', '.join(missing)}: put back <uuid>.ta, or name an empty folder to have all made anew"


def _wait_until_ready(backend: subprocess.Popen[str]) -> None:
    assert backend.stderr is not None
    deadline = time.monotonic() + READY_TIMEOUT_S
    said: list[str] = []
    while time.monotonic() < deadline:
        line = backend.stderr.readline()
        if "ready" in line:
            return
        if not line:
            break
        said.append(line)
    raise NotReadyError("the backend did not start: " + "".join(said).strip())


def _read_trace(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    lines = (line.strip().rstrip(",") for line in path.read_text().splitlines())
    return [json.loads(line) for line in lines if line.startswith("{")]
