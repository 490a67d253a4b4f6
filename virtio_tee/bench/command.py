"""The command itself: rounds, and the report."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any

import click

from virtio_tee.bench import peers
from virtio_tee.bench.machine import BUSY, machine
from virtio_tee.bench.peers import Backend, BenchError, DirectTee
from virtio_tee.bench.plan import (
    BLOCK,
    FEATURES,
    GOALS,
    KIB,
    MODES,
    PEER,
    SPEEDS,
    TEE,
    TOUCH,
    Case,
    Figures,
    Results,
    as_runs,
    beside,
    cases,
    observed,
    unsteadiness,
)
from virtio_tee.lazy import LazyGroup

TRIES = 3
"""… for a steady run, after which the steadiest counts."""


MORE = {"scale": "virtio_tee.bench.scale:scale", "ffa": "virtio_tee.bench.ffa:ffa"}
"""Other benches: name → where the click command is."""


@click.group(cls=LazyGroup, where=MORE, invoke_without_command=True)
@click.option("--check", is_flag=True, help="Exit with 1 if a figure misses its bound.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of tables.")
@click.option("--rounds", type=click.IntRange(1), default=5, show_default=True, help="Interleaved rounds.")
@click.option("--seconds", type=float, default=0.25, show_default=True, help="Length of each run.")
@click.option(
    "--queue",
    type=click.Choice(["pure", "compiled", "all"]),
    default="all",
    show_default=True,
    help="Which implementation of the queues; all: those that are there.",
)
@click.pass_context
def bench(ctx: click.Context, check: bool, as_json: bool, rounds: int, seconds: float, queue: str) -> None:
    """Measure latency and throughput of the backends beside a peer in C, qemu-storage-daemon's null block device.

    A driver in C (compiled first) on CPU 0 drives one backend after the other on CPU 1, over vhost-user sockets:
    sleeping or polling, with 1 or 32 requests at a time. Figures are medians over the rounds, ratios medians of each
    round's ratio; what is compared with the peer has it right before and right after. Installs
    what it needs as root (Debian), or says what to type. Nothing else should run meanwhile.
    """
    if ctx.invoked_subcommand is not None:
        return
    try:
        peers.require_tools()
        peers.require_cpus()
        there = peers.queues()
        busy = os.getloadavg()[0]
        if busy > BUSY:
            _say(f"this machine is busy (load {busy:.1f}): the figures will say little")
        wanted = there if queue == "all" else [queue]
        if queue not in ("all", *there):
            raise BenchError(f"the {queue} queue is not there; there is: {', '.join(there)}")
        with ExitStack() as stack:
            report = _measure(stack, wanted, rounds, seconds)
    except BenchError as e:
        raise click.ClickException(str(e)) from None
    if as_json:
        click.echo(json.dumps(report))
    else:
        _show(report)
    if check and not all(ratio["pass"] for ratio in report["ratios"]):
        sys.exit(1)


def _measure(stack: ExitStack, queues: list[str], rounds: int, seconds: float) -> dict[str, Any]:
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp")))
    program = peers.build_driver(folder)
    backends: list[Backend] = []
    for name, queue in [(PEER, None), *((name, queue) for queue in queues for name in (BLOCK, TEE))]:
        backends.append(Backend(name, queue, folder))
        stack.callback(backends[-1].end)
    tees = {backend.queue or "": backend for backend in backends if backend.name == TEE}
    idle = {queue: backend.resident_mb for queue, backend in tees.items()}
    direct = DirectTee()
    stack.callback(direct.end)
    direct.measure(4 * KIB, TOUCH, 0.0)  # it has started when it answers

    runs: dict[tuple[str, str | None, Case], list[Figures]] = defaultdict(list)
    ceilings: dict[tuple[str, int], list[Figures]] = defaultdict(list)
    alone: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(rounds):
        _say(f"round {number + 1} of {rounds}")
        for driver, depth in MODES:
            ceilings[driver, depth].append(_ceiling(program, driver, depth, seconds))
        for case in cases():
            for backend in backends:
                if backend.name in case.backends:
                    run = _run(program, backends[0], backend, case, seconds)
                    runs[backend.name, backend.queue, case].append(run)
            if case.has_direct:
                alone[case.workload, case.bytes].append(direct.measure(case.bytes, case.func, seconds))
    results = Results(
        runs=dict(runs),
        direct=dict(alone),
        seen_in_place={queue: _seen_in_place(program, backend) for queue, backend in tees.items()},
        ready_s={queue: backend.ready_s for queue, backend in tees.items()},
        idle_mb=idle,
        copied=_copied(program, queues[0], folder, seconds),
    )
    return {
        "machine": machine(os.getloadavg()[0]),
        "rounds": rounds,
        "queues": queues,
        "runs": as_runs(results),
        "ratios": [goal.judge(results, queue) for queue in queues for goal in GOALS],
        "ceiling": [
            {
                "driver": driver,
                "depth": depth,
                **{what: round(median(f[what] for f in got), 2) for what in SPEEDS},
            }
            for (driver, depth), got in ceilings.items()
        ],
        "observed": [figure for queue in queues for figure in observed(results, queue)],
        "direct_us": {
            workload: {str(size): round(median(got), 2) for (what, size), got in alone.items() if what == workload}
            for workload in dict.fromkeys(what for what, _ in alone)
        },
    }


def _run(program: Path, peer: Backend, backend: Backend, case: Case, seconds: float) -> Figures:
    """One run, beside the peer's where that is compared."""
    reference = case.reference
    if reference is None or backend is peer:
        return backend.run(program, case, seconds)
    tries: list[Figures] = []
    for _ in range(TRIES):
        before = peer.run(program, reference, seconds)
        own = backend.run(program, case, seconds)
        after = peer.run(program, reference, seconds)
        tries.append(beside(before, own, after, case.depth))
        if unsteadiness(tries[-1]) <= 1:
            break
    return min(tries, key=unsteadiness)


def _copied(program: Path, queue: str, folder: Path, seconds: float) -> dict[tuple[str, Case], int]:
    """Bytes that our backends copy for each request. The queues do not differ in that."""
    copied: dict[tuple[str, Case], int] = {}
    for name in (BLOCK, TEE):
        backend = Backend(name, queue, folder, counted=True)
        try:
            for case in cases():
                if name in case.backends:
                    copied[name, case] = backend.copied(program, case, seconds)
        finally:
            backend.end()
    return copied


def _ceiling(program: Path, driver: str, depth: int, seconds: float) -> Figures:
    """The driver with a device that does nothing, in C, on the backends' CPU."""
    case = Case("null-block", driver, depth, 4 * KIB)
    return peers.run_driver(program, "--echo", str(peers.BACKEND_CPU), "--seconds", str(seconds), *case.arguments)


def _seen_in_place(program: Path, backend: Backend) -> bool:
    arguments = ("--workload", "hold", "--memory", "registered", "--bytes", "4096")
    return peers.run_driver(program, "--socket", str(backend.socket), *arguments) == {"before": 1, "after": 2}


def _say(text: str) -> None:
    click.echo(f"bench: {text}", err=True)


def _show(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    runs = Table(title=f"medians of {report['rounds']} rounds", box=None, header_style="bold")
    for column in ("workload", "driver", "backend", "queue"):
        runs.add_column(column)
    for column in ("depth", "bytes", "copied", "p50 µs", "p99 µs", "kreq/s"):
        runs.add_column(column, justify="right")
    for run in report["runs"]:
        words = [run["workload"], run["driver"], run["backend"], run["queue"] or "C"]
        copied = "" if run["bytes_copied"] is None else run["bytes_copied"]
        numbers = [run["depth"], run["bytes"], copied, run["p50_us"], run["p99_us"], run["kreq_s"]]
        runs.add_row(*words, *map(str, numbers))
    for ceiling in report["ceiling"]:
        numbers = [ceiling["depth"], 4 * KIB, "", ceiling["p50_us"], ceiling["p99_us"], ceiling["kreq_s"]]
        runs.add_row("null-block", ceiling["driver"], "(driver's ceiling)", "C", *map(str, numbers))
    console.print(runs)
    features = {run["backend"]: [feature for feature in FEATURES if run[feature]] for run in report["runs"]}
    for backend, names in features.items():
        console.print(f"{backend} has {', '.join(names)}")
    ratios = Table(title="\nbounds", box=None, header_style="bold")
    for column, justify in (("name", "left"), ("queue", "left"), ("value", "right"), ("bound", "right"), ("", "left")):
        ratios.add_column(column, justify=justify)  # type: ignore[arg-type]
    for ratio in report["ratios"]:
        verdict = "ok" if ratio["pass"] else "MISSED"
        bound = f"{ratio['sense']} {ratio['floor']}"
        ratios.add_row(ratio["name"], ratio["queue"], str(ratio["value"]), bound, verdict)
    console.print(ratios)
    for figure in report["observed"]:
        console.print(f"{figure['name']}, {figure['queue']}: {figure['value']} ({figure['what']})")
