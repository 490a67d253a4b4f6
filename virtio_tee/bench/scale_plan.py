"""What must come out of ``bench scale``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from virtio_tee.bench.scale_life import IN_TIME_MS, Cancelled
from virtio_tee.bench.served import Holdings


@dataclass(slots=True)
class Results:
    """All that was measured."""

    starts: list[tuple[float, float]] = field(default_factory=list)
    """Each start: seconds until it answered, resident MB when idle."""
    costs: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Figure → in each round, µs of a request with one of each, and with many."""
    whole_ms: list[float] = field(default_factory=list)
    """Hashing 64 MiB to the end."""
    cancels_alone: list[list[Cancelled]] = field(default_factory=list)
    """By round."""
    cancels_loaded: list[list[Cancelled]] = field(default_factory=list)
    holdings: list[Holdings] = field(default_factory=list)
    """What the backend had while frontends came and went; the first is after the warm-up."""


@dataclass(frozen=True, slots=True)
class Goal:
    """A named figure and its bound, at most unless ``at_least``; ``details`` is what it was made of."""

    name: str
    what: str
    measure: Callable[[Results], float]
    bound: float
    details: Callable[[Results], dict[str, Any]]
    at_least: bool = False

    def judge(self, results: Results) -> dict[str, Any]:
        """The entry of the report's ``figures``."""
        value = self.measure(results)
        return {
            "name": self.name,
            "what": self.what,
            "value": round(value, 3),
            "floor": self.bound,
            "sense": ">=" if self.at_least else "<=",
            "pass": value >= self.bound if self.at_least else value <= self.bound,
            "details": self.details(results),
        }


COST = 1.2
"""What a request may cost with many, in terms of what it costs with one."""


def _cost(name: str, what: str) -> Goal:
    return Goal(
        name,
        what,
        lambda results: median(many / one for one, many in results.costs[name]),
        COST,
        lambda results: {
            "one_us": round(median(one for one, _ in results.costs[name]), 2),
            "many_us": round(median(many for _, many in results.costs[name]), 2),
        },
    )


def _cancel(name: str, what: str, taken: Callable[[Results], list[list[Cancelled]]]) -> Goal:
    def worst(results: Results) -> list[float]:
        return [max(cancelled.took_ms for cancelled in cancels) for cancels in taken(results)]

    return Goal(
        name,
        what,
        lambda results: median(worst(results)),
        IN_TIME_MS,
        lambda results: {
            "median_ms": round(median(c.took_ms for cancels in taken(results) for c in cancels), 2),
            "worst_ms": round(max(worst(results)), 2),
            "cancels": sum(map(len, taken(results))),
            "whole_ms": round(median(results.whole_ms), 1),
        },
    )


def _growth(name: str, what: str, of: Callable[[Holdings], int], bound: float) -> Goal:
    return Goal(
        name,
        what,
        lambda results: of(results.holdings[-1]) - of(results.holdings[0]),
        bound,
        lambda results: {"seen": [of(holdings) for holdings in results.holdings]},
    )


def _reached(results: Results) -> float:
    reached = [c.reached for cancels in results.cancels_alone + results.cancels_loaded for c in cancels]
    return sum(reached) / len(reached)


GOALS: Sequence[Goal] = (
    _cancel(
        "cancel/alone", "ms from a cancel to the end of hashing 64 MiB; each round's worst", lambda r: r.cancels_alone
    ),
    _cancel(
        "cancel/loaded",
        "the same, while three other TAs hash and behind a burst of other requests",
        lambda r: r.cancels_loaded,
    ),
    Goal("cancel/reached", "share of the calls that ended with CANCEL", _reached, 1.0, lambda _: {}, at_least=True),
    _cost("sessions/one-busy", "latency, many sessions open ÷ one"),
    _cost("sessions/all-busy/32", "CPU time per request, many sessions in turn ÷ one; 32 at a time"),
    _cost("regions/one-busy", "latency, many regions registered ÷ one"),
    _cost("regions/all-busy/32", "CPU time per request, many regions in turn ÷ one; 32 at a time"),
    _cost("guests/one-busy", "latency, many guests attached ÷ one"),
    _cost("guests/all-busy/1", "CPU time per request, many guests ÷ one; each 1 at a time"),
    _cost("guests/all-busy/32", "CPU time per request, many guests ÷ one; each 32 at a time"),
    _growth("connects/memory", "KiB by which the backend grew after the first tenth", lambda h: h.rss_kib, 1024),
    _growth("connects/fds", "… file descriptors", lambda h: h.fds, 0),
    _growth("connects/threads", "… threads", lambda h: h.threads, 0),
    _growth("connects/mappings", "… mappings", lambda h: h.mappings, 0),
    Goal(
        "serve/ready",
        "seconds from the start of `serve` to its first answer",
        lambda results: median(ready for ready, _ in results.starts),
        0.5,
        lambda results: {"worst_s": round(max(ready for ready, _ in results.starts), 3)},
    ),
    Goal(
        "serve/idle",
        "resident MB of an idle `serve`",
        lambda results: median(idle for _, idle in results.starts),
        60.0,
        lambda results: {"worst_mb": round(max(idle for _, idle in results.starts), 1)},
    ),
)
"""The bounds, all at most but one."""
