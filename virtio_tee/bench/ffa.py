"""``virtio-tee bench ffa``: what the FF-A model costs."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import click

from virtio_tee.bench import ffa_load
from virtio_tee.bench.machine import BUSY, machine

MANY, FEW = 1 << 16, 1 << 12
"""Pages of a MEM_SHARE."""
MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much of everything. ``seconds`` is the length of each run of null invokes."""

    rounds: int
    seconds: float
    many: int = MANY
    few: int = FEW
    fuzz_calls: int = 20_000


QUICK = Sizes(rounds=1, seconds=0.01, many=1024, few=256, fuzz_calls=400)


@dataclass(slots=True)
class Results:
    """All that was measured, by round."""

    sizes: Sizes
    invokes: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Level → µs of a null invoke, direct and over FF-A."""
    shares: list[tuple[float, float]] = field(default_factory=list)
    """Seconds of a MEM_SHARE of few pages, and of many."""
    fuzz_s: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Goal:
    """A named figure, and what it is at most; None where it is only told."""

    name: str
    what: str
    measure: Callable[[Results], float]
    bound: float | None
    details: Callable[[Results], dict[str, Any]]

    def judge(self, results: Results) -> dict[str, Any]:
        """The entry of the report's ``figures``."""
        value = self.measure(results)
        return {
            "name": self.name,
            "what": self.what,
            "value": round(value, 3),
            "floor": self.bound,
            "sense": "<=",
            "pass": self.bound is None or value <= self.bound,
            "details": self.details(results),
        }


def _invoke(level: str, what: str, bound: float | None) -> Goal:
    return Goal(
        f"null-invoke/{level}",
        f"null invoke over FF-A ÷ without it, {what}",
        lambda results: median(ffa / direct for direct, ffa in results.invokes[level]),
        bound,
        lambda results: {
            "direct_us": round(median(direct for direct, _ in results.invokes[level]), 2),
            "ffa_us": round(median(ffa for _, ffa in results.invokes[level]), 2),
        },
    )


def _per_page(results: Results) -> float:
    sizes = results.sizes
    return median((many / sizes.many) / (few / sizes.few) for few, many in results.shares)


GOALS: Sequence[Goal] = (
    _invoke("client-api", "by the client API", 3.0),
    _invoke("driver", "by the TEE driver's start and run", 3.0),
    _invoke("at-once", "by the TEE driver's invoke_at_once and run", None),
    Goal(
        "mem-share/seconds",
        "seconds of a MEM_SHARE of 64 Ki scattered pages, by hypervisor and SPMC",
        lambda results: median(many for _, many in results.shares),
        1.0,
        lambda results: {"pages": results.sizes.many},
    ),
    Goal(
        "mem-share/linear",
        "its time for each page ÷ that of 4 Ki pages",
        _per_page,
        1.5,
        lambda results: {
            "few": results.sizes.few,
            "few_ms": round(1e3 * median(few for few, _ in results.shares), 2),
        },
    ),
    Goal(
        "fuzz/million",
        "seconds for a million fuzz calls, extrapolated from fewer",
        lambda results: median(results.fuzz_s) * MILLION / results.sizes.fuzz_calls,
        600.0,
        lambda results: {"calls": results.sizes.fuzz_calls * len(results.fuzz_s)},
    ),
)
"""The bounds, all at most. ``at-once`` has none: the software TEE alone does that in less time than the model's four
parties need to look at a call."""


@click.command()
@click.option("--check", is_flag=True, help="Exit with 1 if a figure misses its bound, and name it.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object on stdout instead of a table.")
@click.option("--rounds", type=click.IntRange(1), default=7, show_default=True, help="Interleaved rounds.")
@click.option("--seconds", type=float, default=0.25, show_default=True, help="Length of each run.")
@click.option("--quick", is_flag=True, help="A little of everything, once: shows that it runs, not how fast.")
def ffa(check: bool, as_json: bool, rounds: int, seconds: float, quick: bool) -> None:
    """Measure what OP-TEE over FF-A costs beside the same TEE without it, and the model's own speed.

    A null invoke goes from the VM's driver through hypervisor, SPMC and OP-TEE's partition to the software TEE, or to
    the software TEE at once. The caller is the same for both: the client API, or whoever runs a TEE driver. Latencies
    are medians of each run, ratios medians of each round's ratio. All is in this process. Takes about half a minute.
    """
    sizes = QUICK if quick else Sizes(rounds, seconds)
    load = os.getloadavg()[0]
    if load > BUSY:
        _say(f"this machine is busy (load {load:.1f}): the figures will say little")
    results = measure(sizes)
    figures = [goal.judge(results) for goal in GOALS]
    if as_json:
        click.echo(json.dumps({"machine": machine(load), "sizes": asdict(sizes), "figures": figures}))
    else:
        show(figures)
    missed = [figure["name"] for figure in figures if not figure["pass"]]
    if check and missed:
        _say(f"missed: {', '.join(missed)}")
        sys.exit(1)


def measure(sizes: Sizes) -> Results:
    """All rounds. Raises WrongAnswerError, InvariantError: what is measured is broken."""
    invokes: dict[str, list[tuple[float, float]]] = defaultdict(list)
    results = Results(sizes, invokes)
    with ExitStack() as stack:
        pairs = list(ffa_load.pairs(stack))
        gc.freeze()  # what was set up here shall not be walked through while others are measured
        for number in range(sizes.rounds):
            _say(f"round {number + 1} of {sizes.rounds}")
            for name, direct, over_ffa in pairs:
                took = ffa_load.latency_us(direct, sizes.seconds), ffa_load.latency_us(over_ffa, sizes.seconds)
                invokes[name].append(took)
            results.shares.append((ffa_load.share_s(sizes.few), ffa_load.share_s(sizes.many)))
            results.fuzz_s.append(ffa_load.fuzz_s(sizes.fuzz_calls, seed=number))
    return results


def _say(text: str) -> None:
    click.echo(f"bench ffa: {text}", err=True)


def show(figures: list[dict[str, Any]]) -> None:
    """As a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 120
    table = Table(box=None, header_style="bold")
    for column in ("name", "what"):
        table.add_column(column)
    for column in ("value", "bound", "of"):
        table.add_column(column, justify="right")
    table.add_column("")
    for figure in figures:
        bound = "" if figure["floor"] is None else f"{figure['sense']} {figure['floor']}"
        verdict = "" if figure["floor"] is None else "ok" if figure["pass"] else "MISSED"
        of = ", ".join(f"{name} {value}" for name, value in figure["details"].items())
        table.add_row(figure["name"], figure["what"], str(figure["value"]), bound, of, verdict)
    console.print(table)
