"""``virtio-tee bench scale``: what must not grow with what a backend holds, or with time."""

from __future__ import annotations

import gc
import json
import os
import sys
import tempfile
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from virtio_tee.bench.machine import BUSY, machine
from virtio_tee.bench.peers import BenchError
from virtio_tee.bench.scale_life import Hashing, connects, start
from virtio_tee.bench.scale_load import Sites, comparisons
from virtio_tee.bench.scale_plan import GOALS, Results
from virtio_tee.bench.served import Served


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. ``seconds`` is the length of each run."""

    rounds: int
    seconds: float
    sessions: int = 10_000
    regions: int = 10_000
    guests: int = 64
    connects: int = 10_000
    cancels: int = 5
    """In each round, alone and loaded."""


QUICK = Sizes(rounds=1, seconds=0.02, sessions=50, regions=50, guests=3, connects=20, cancels=1)


@click.command()
@click.option("--check", is_flag=True, help="Exit with 1 if a figure misses its bound, and name it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Interleaved rounds.")
@click.option("--seconds", type=float, default=0.25, show_default=True, help="Length of each run.")
@click.option("--quick", is_flag=True, help="A few of everything, once: shows that it runs, not how fast.")
def scale(check: bool, as_json: bool, rounds: int, seconds: float, quick: bool) -> None:
    """Measure what must not grow with what a backend holds: sessions, regions, guests, frontends that came and went.

    Guests on one CPU use backends on another (the software TEE) over vhost-user sockets. The cost of a request is its
    median latency with one guest busy, and the backend's CPU time with all of them busy; ratios are medians of each
    round's ratio to a backend that has one of each. Then frontends come and go, ten thousand times. Takes about three
    minutes; nothing else should run meanwhile.
    """
    sizes = QUICK if quick else Sizes(rounds, seconds)
    load = os.getloadavg()[0]
    if load > BUSY:
        _say(f"this machine is busy (load {load:.1f}): the figures will say little")
    cpus = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cpus[0]})
        with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
            results = _measure(Path(folder), cpus[-1], sizes)
    except (BenchError, OSError) as e:
        raise click.ClickException(str(e)) from None
    finally:
        os.sched_setaffinity(0, cpus)
    figures = [goal.judge(results) for goal in GOALS]
    if as_json:
        click.echo(json.dumps({"machine": machine(load), "sizes": asdict(sizes), "figures": figures}))
    else:
        _show(figures)
    missed = [figure["name"] for figure in figures if not figure["pass"]]
    if check and missed:
        _say(f"missed: {', '.join(missed)}")
        sys.exit(1)


def _measure(folder: Path, cpu: int, sizes: Sizes) -> Results:
    starts: list[tuple[float, float]] = []
    costs: dict[str, list[tuple[float, float]]] = defaultdict(list)
    results = Results(starts=starts, costs=costs)
    with ExitStack() as stack:
        _say("setting up")
        served = Served(folder, "hashing", "--built-in-tas", guests=2, cpu=cpu)
        stack.callback(served.end)
        hashing = Hashing(stack, served)
        sites = Sites(stack, folder, cpu)
        compared = comparisons(sites, guests=sizes.guests, sessions=sizes.sessions, regions=sizes.regions)
        gc.freeze()  # what was set up here shall not be walked through while others are measured
        for number in range(sizes.rounds):
            _say(f"round {number + 1} of {sizes.rounds}")
            starts.append(start(folder, number, cpu))
            for comparison in compared:
                for name, pair in comparison.measure(sizes.seconds).items():
                    costs[name].append(pair)
            results.whole_ms.append(hashing.whole_ms())
            results.cancels_alone.append(hashing.cancels(sizes.cancels, loaded=False))
            results.cancels_loaded.append(hashing.cancels(sizes.cancels, loaded=True))
    served = Served(folder, "connects", "--built-in-tas", cpu=cpu)
    try:
        results.holdings = connects(served.sockets[0], served, sizes.connects, _say)
    finally:
        served.end()
    return results


def _say(text: str) -> None:
    click.echo(f"bench scale: {text}", err=True)


def _show(figures: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    table = Table(box=None, header_style="bold")
    for column in ("name", "what"):
        table.add_column(column)
    for column in ("value", "bound"):
        table.add_column(column, justify="right")
    table.add_column("")
    for figure in figures:
        bound = f"{figure['sense']} {figure['floor']}"
        table.add_row(figure["name"], figure["what"], str(figure["value"]), bound, "ok" if figure["pass"] else "MISSED")
    console.print(table)
