"""``virtio-tee demo``: backend and guest as two processes of this machine."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click

from tee.soft.examples import UUIDS, source

GUEST_TIMEOUT_S = 60
READY_TIMEOUT_S = 20


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of the timeline.")
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
def demo(as_json: bool, folder: Path | None, without: tuple[str, ...]) -> None:
    """Show the main job in a few seconds: a guest loads TAs over RPC and calls them through a virtio-tee device.

    Two processes: the backend (virtio-tee serve --tee soft) and a guest, which attaches to its vhost-user socket
    with memory of its own, as a VM does. The TAs are signed with a throw-away key and lie in the guest's folder;
    the backend has only the public key. Exit status 1: something failed.
    """
    with ExitStack() as stack:
        where = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="virtio-tee-")))
        outcome = _run(where, without)
    if as_json:
        click.echo(json.dumps(outcome.as_json()))
    else:
        _show(outcome)
    sys.exit(0 if outcome.result == "ok" else 1)


@dataclass(slots=True)
class Outcome:
    """What was seen, on both sides."""

    why: str = ""
    elapsed_s: float = 0.0
    guest: dict[str, Any] = field(default_factory=dict)
    trace: list[dict[str, Any]] = field(default_factory=list)
    """The backend's record of requests and RPCs."""

    @property
    def result(self) -> str:
        """ok or failed."""
        return "ok" if not self.why else "failed"

    def lane(self, name: str) -> list[dict[str, Any]]:
        """The backend's records of what has ended, of one kind."""
        return [event for event in self.trace if event.get("cat") == name and event["ph"] == "e"]

    def as_json(self) -> dict[str, Any]:
        """The contract of ``demo --json``. The backend counts requests and RPCs, where they arrive and leave."""
        rpcs = [
            {
                "command": event["name"],
                "answered_by": event["args"]["answered_by"],
                "result": event["args"]["ret"],
                "took_us": event["args"]["took_us"],
            }
            for event in self.lane("RPCs")
        ]
        loads = [r for r in rpcs if r["command"] == "LOAD_TA" and r["result"] == "SUCCESS"]
        opened = [e for e in self.lane("requests") if e["name"] == "OPEN_SESSION" and e["args"]["ret"] == "SUCCESS"]
        return {
            "result": self.result,
            **({"why": self.why} if self.why else {}),
            "path": "virtio",
            "tee": "soft",
            "requests": len(self.lane("requests")),
            "ta_loaded_over_rpc": bool(loads and opened),
            "rpcs": rpcs,
            "steps": self.guest.get("steps", []),
            "elapsed_s": round(self.elapsed_s, 3),
        }


def _run(folder: Path, without: tuple[str, ...]) -> Outcome:
    start = time.monotonic()
    outcome = Outcome()
    tas = _prepare(folder)
    for name in without:
        (tas / f"{UUIDS[name]}.ta").unlink(missing_ok=True)
    trace = folder / "trace.json"
    with tempfile.TemporaryDirectory(prefix="vtee-") as sockets:
        socket = Path(sockets) / "tee.sock"
        backend = subprocess.Popen(
            [
                *_SELF,
                "serve",
                "--socket-path",
                str(socket),
                "--ta-key",
                str(folder / "vendor.pem"),
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
                [*_SELF, "guest", "demo", "--socket", str(socket), "--ta-folder", str(tas), "--json"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=GUEST_TIMEOUT_S,
                check=False,
            )
            outcome.guest = json.loads(guest.stdout) if guest.stdout else {}
            if guest.returncode:
                outcome.why = outcome.guest.get("why") or guest.stderr.strip() or "the guest failed"
                outcome.why += "".join(f"; {line}" for line in guest.stderr.splitlines() if line not in outcome.why)
        except (subprocess.TimeoutExpired, NotReadyError) as e:
            outcome.why = str(e)
        finally:
            backend.terminate()
            _, errors = backend.communicate()
    if backend.returncode != 0 and not outcome.why:
        outcome.why = f"the backend ended with {backend.returncode}: {errors.strip()}"
    outcome.trace = _read_trace(trace)
    outcome.elapsed_s = time.monotonic() - start
    return outcome


_SERVE = ("--vm", "demo", "--trace")
_SELF = (sys.executable, "-m", "virtio_tee")


class NotReadyError(Exception):
    """The backend did not start."""


def _prepare(folder: Path) -> Path:
    """A vendor's key and the guest's folder with its signed TAs, unless they are there already."""
    from tee import package

    tas = folder / "guest" / "optee_armtz"
    key = folder / "vendor.key"
    if not key.exists():
        tas.mkdir(parents=True, exist_ok=True)
        pair = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
        key.touch(0o600)
        key.write_bytes(pair.private)
        (folder / "vendor.pem").write_bytes(pair.public)
        for name, uuid in UUIDS.items():
            (tas / f"{uuid}.ta").write_bytes(package.sign(source(name), uuid, 1, pair.private))
    return tas


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


def _show(outcome: Outcome) -> None:
    """The timeline, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="who sent what to whom", box=None, pad_edge=False, header_style="bold")
    for column, justify in (("ms", "right"), ("from", "left"), ("to", "left"), ("what", "left"), ("took ms", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = sorted(_rows(outcome), key=lambda row: row[0])
    first = rows[0][0] if rows else 0.0
    for at, source_, target, what, took in rows:
        table.add_row(f"{(at - first) * 1000:.2f}", source_, target, what, "" if took is None else f"{took * 1000:.2f}")
    console.print(table)
    facts = outcome.as_json()
    console.print(
        f"\n{facts['requests']} requests, {len(facts['rpcs'])} RPCs; path {facts['path']}, TEE {facts['tee']}; "
        f"TAs loaded over RPC: {'yes' if facts['ta_loaded_over_rpc'] else 'no'}; {facts['elapsed_s']} s"
    )
    console.print(f"result: {outcome.result}" + (f": {outcome.why}" if outcome.why else ""), markup=False)


def _rows(outcome: Outcome) -> list[tuple[float, str, str, str, float | None]]:
    """(time in s, from, to, what, took s), of both processes: they share the monotonic clock."""
    rows: list[tuple[float, str, str, str, float | None]] = []
    for step in outcome.guest.get("steps", []):
        mark = "" if step["ok"] else "  FAILED"
        rows.append((step["start"], "client", "", f"── {step['name']} {step['detail']}{mark}", step["took_s"]))
    for event in outcome.lane("requests"):
        what = f"{event['name']} → {event['args']['ret']}"
        rows.append((_start(event), "guest", "device", what, event["args"]["took_us"] / 1e6))
    for event in outcome.lane("RPCs"):
        what = f"RPC {event['name']} → {event['args']['ret']}"
        rows.append((_start(event), "TEE", "supplicant", what, event["args"]["took_us"] / 1e6))
    return rows


def _start(event: dict[str, Any]) -> float:
    return float(event["ts"] - event["args"]["took_us"]) / 1e6
