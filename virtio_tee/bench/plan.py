"""What is measured, and what must come of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

KIB, MIB = 1 << 10, 1 << 20

PEER = "qemu-storage-daemon"
BLOCK = "pyvhost"
TEE = "virtio-tee"

NULL, TOUCH, WORK = 0, 3, 12
"""Commands of the probe TA: nothing; one byte in each page; 4,096 such changes, whatever the size."""

SAME_WORK = "invoke-same-work"
"""Registered memory and WORK. How long a TA runs changes what a request costs around it: meanwhile the driver's CPU
goes to sleep more deeply, and caches forget the path. So what the *size* costs shows between sizes on which the TA does
the same work."""


@dataclass(frozen=True, slots=True)
class Case:
    """One kind of run. ``bytes`` of payload in each request; ``memory`` as the driver's option says."""

    workload: str
    driver: str = "sleeping"
    depth: int = 1
    bytes: int = 0
    memory: str = "none"

    @property
    def backends(self) -> tuple[str, ...]:
        """Who can run it."""
        return (PEER, BLOCK) if self.workload == "null-block" else (TEE,)

    @property
    def arguments(self) -> list[str]:
        """For the driver."""
        words = ["--depth", str(self.depth), "--bytes", str(self.bytes)]
        if self.driver == "polling":
            words.append("--polling")
        if self.workload == "null-block":
            return [*words, "--workload", "block"]
        return [*words, "--workload", "invoke", "--memory", self.memory, "--func", str(self.func)]

    @property
    def func(self) -> int:
        """The probe TA's command of an invoke."""
        return {"null-invoke": NULL, SAME_WORK: WORK}.get(self.workload, TOUCH)

    @property
    def reference(self) -> Case | None:
        """What the peer is to do right before and right after, if the two are compared."""
        if self == Case(self.workload, self.driver, self.depth, 4 * KIB if self.workload == "null-block" else 0):
            return Case("null-block", self.driver, self.depth, 4 * KIB)
        return None

    @property
    def has_direct(self) -> bool:
        """Whether the software TEE alone is measured beside it."""
        in_place = self.workload in ("invoke-registered", SAME_WORK) and self.bytes in DIRECT_SIZES
        return in_place and (self.driver, self.depth) == ("sleeping", 1)

    @property
    def key(self) -> tuple[str, str, int, int]:
        """What identifies it."""
        return self.workload, self.driver, self.depth, self.bytes


MODES = [("sleeping", 1), ("sleeping", 32), ("polling", 1), ("polling", 32)]

DIRECT_SIZES = (4 * KIB, 16 * MIB)
"""Of registered memory, on which the software TEE alone is measured too."""

INLINE_LIMIT = 64 * KIB
"""The device's default limit; larger temporary memory is registered for the one call."""


def cases() -> Iterator[Case]:
    """All of them."""
    for driver, depth in MODES:
        for size in (4 * KIB, 64 * KIB):
            yield Case("null-block", driver, depth, size)
        yield Case("null-invoke", driver, depth)
        yield Case("invoke-registered", driver, depth, 4 * KIB, "registered")
        yield Case("invoke-temporary", driver, depth, 4 * KIB, "inline")
        if depth == 1:
            for size in (64 * KIB, 1 * MIB, 16 * MIB):
                yield Case("invoke-registered", driver, depth, size, "registered")
                yield Case("invoke-temporary", driver, depth, size, "inline" if size <= INLINE_LIMIT else "temporary")
    for size in DIRECT_SIZES:
        yield Case(SAME_WORK, "sleeping", 1, size, "registered")


Figures = Mapping[str, Any]
"""One run's: p50_us, p99_us, kreq_s …, as the driver tells them; ``waited``: the share of the time in which other
processes had the CPUs; ``peer``: the peer's, right before and right after; ``spread``: how far these two are apart."""

SPEEDS = ("p50_us", "p99_us", "kreq_s")


def beside(before: Figures, own: Figures, after: Figures, depth: int) -> Figures:
    """``own`` with the peer's figures, the means of those before and after.

    Whatever a machine does, it does for longer than a run: two virtual CPUs are on one core now and on two then, which
    is a factor of three between processes that share memory. What lies between two like runs is like them."""
    peer = {what: (float(before[what]) + float(after[what])) / 2 for what in SPEEDS}
    what = speed(depth)
    waited = max(float(f["waited"]) for f in (before, own, after))
    return {**own, "peer": peer, "waited": waited, "spread": abs(before[what] - after[what]) / peer[what]}


def speed(depth: int) -> str:
    """The figure that says how fast it is: one request's latency, or throughput."""
    return "p50_us" if depth == 1 else "kreq_s"


STEADY = 0.2
"""A run counts as steady with no more than this in ``spread``, and half of it in ``waited``."""


def unsteadiness(figures: Figures) -> float:
    """1 or less: steady."""
    return max(float(figures["spread"]) / STEADY, float(figures["waited"]) / (STEADY / 2))


@dataclass(slots=True)
class Results:
    """All figures: one for each round."""

    runs: dict[tuple[str, str | None, Case], list[Figures]]
    """By backend, queue (None for the peer) and case."""
    direct: dict[tuple[str, int], list[float]]
    """Median of the software TEE alone, in µs, by workload and bytes."""
    seen_in_place: dict[str, bool]
    """Whether the TA saw a byte written during its call, by queue."""
    ready_s: dict[str, float]
    idle_mb: dict[str, float]
    copied: dict[tuple[str, Case], int]
    """Counted bytes for each request of our backends, by name and case."""

    def of(self, backend: str, queue: str | None, key: tuple[str, str, int, int]) -> list[Figures]:
        """Those of each round."""
        for (name, ran, case), figures in self.runs.items():
            if (name, ran, case.key) == (backend, queue, key):
                return figures
        raise KeyError(key)


@dataclass(frozen=True, slots=True)
class Goal:
    """A named figure and its bound for each queue implementation; ``at_least`` or at most."""

    name: str
    what: str
    measure: Callable[[Results, str], float]
    pure: float
    compiled: float
    at_least: bool = True

    def judge(self, results: Results, queue: str) -> dict[str, Any]:
        """The entry of ``ratios``."""
        value = self.measure(results, queue)
        bound = self.compiled if queue == "compiled" else self.pure
        passed = value >= bound if self.at_least else value <= bound
        sense = ">=" if self.at_least else "<="
        return {
            "name": self.name,
            "queue": queue,
            "value": round(value, 3),
            "floor": bound,
            "sense": sense,
            "pass": passed,
            "what": self.what,
        }


def _against_peer(backend: str, workload: str, driver: str, depth: int) -> Callable[[Results, str], float]:
    """The median over the rounds of ours ÷ the peer's: speed at depth 1 (latency, inverted), else throughput."""
    key = (workload, driver, depth, 4 * KIB if workload == "null-block" else 0)

    def measure(results: Results, queue: str) -> float:
        return median(ratios(results.of(backend, queue, key), depth))

    return measure


def ratios(rounds: Sequence[Figures], depth: int) -> list[float]:
    """Our speed ÷ the peer's in each round."""
    what = speed(depth)
    found = [float(f[what]) / float(f["peer"][what]) for f in rounds]
    return [1 / ratio for ratio in found] if depth == 1 else found


def _zero_copy(workload: str) -> Callable[[Results, str], float]:
    """Path time (total − direct) of 16 MiB ÷ that of 4 KiB, from the medians over the rounds."""

    def measure(results: Results, queue: str) -> float:
        def path(size: int) -> float:
            total = results.of(TEE, queue, (workload, "sleeping", 1, size))
            return median(float(f["p50_us"]) - d for f, d in zip(total, results.direct[workload, size], strict=True))

        return path(16 * MIB) / path(4 * KIB)

    return measure


GOALS: Sequence[Goal] = (
    Goal(
        "null-block/sleeping/1",
        "null block of 4 KiB, sleeping driver, depth 1: the peer's median latency ÷ ours",
        _against_peer(BLOCK, "null-block", "sleeping", 1),
        0.95,
        0.95,
    ),
    Goal(
        "null-block/sleeping/32",
        "null block of 4 KiB, sleeping driver, depth 32: our requests/s ÷ the peer's",
        _against_peer(BLOCK, "null-block", "sleeping", 32),
        0.8,
        0.95,
    ),
    Goal(
        "null-block/polling/32",
        "null block of 4 KiB, polling driver, depth 32: our requests/s ÷ the peer's",
        _against_peer(BLOCK, "null-block", "polling", 32),
        0.15,
        0.6,
    ),
    Goal(
        "null-invoke/sleeping/1",
        "null invoke through device and software TEE, sleeping driver, depth 1: the peer's null block latency ÷ ours",
        _against_peer(TEE, "null-invoke", "sleeping", 1),
        0.8,
        0.9,
    ),
    Goal(
        "null-invoke/sleeping/32",
        "null invoke, sleeping driver, depth 32: our requests/s ÷ the peer's null block's",
        _against_peer(TEE, "null-invoke", "sleeping", 32),
        0.3,
        0.4,
    ),
    Goal(
        "zero-copy/path",
        "path time (total − the software TEE alone) of 16 MiB registered ÷ that of 4 KiB; the TA makes 4,096 changes "
        "on both, one in each page and round again",
        _zero_copy(SAME_WORK),
        1.1,
        1.1,
        at_least=False,
    ),
    Goal(
        "zero-copy/in-place",
        "a byte that the driver writes during a call is seen by the TA (1: yes)",
        lambda results, queue: float(results.seen_in_place[queue]),
        1.0,
        1.0,
    ),
    Goal(
        "serve/ready",
        "seconds from starting `virtio-tee serve` to a socket that can be connected to",
        lambda results, queue: results.ready_s[queue],
        0.5,
        0.5,
        at_least=False,
    ),
    Goal(
        "serve/idle",
        "resident MB of an idle `virtio-tee serve`",
        lambda results, queue: results.idle_mb[queue],
        60.0,
        60.0,
        at_least=False,
    ),
)
"""The floors. A figure that misses its bound fails ``bench --check``."""


def observed(results: Results, queue: str) -> list[dict[str, Any]]:
    """Figures without a bound, for who reads the bounds with doubt."""
    return [
        {
            "name": "zero-copy/path/unequal",
            "queue": queue,
            "value": round(_zero_copy("invoke-registered")(results, queue), 3),
            "what": "as zero-copy/path, but each page is changed once: the TA runs 40 times as long on 16 MiB, and "
            "the driver's CPU sleeps that much deeper",
        }
    ]


FEATURES = ("event_idx", "indirect", "inflight")
"""What was negotiated: as much of it as the backend offers."""


def _comparison(rounds: Sequence[Figures], depth: int) -> dict[str, Any]:
    if not all("peer" in figures for figures in rounds):
        return {}
    return {
        "ratios": [round(ratio, 3) for ratio in ratios(rounds, depth)],
        "steady_rounds": sum(unsteadiness(figures) <= 1 for figures in rounds),
    }


def as_runs(results: Results) -> list[dict[str, Any]]:
    """The entries of ``runs``: medians over the rounds."""
    return [
        {
            "backend": backend,
            "queue": queue,
            "workload": case.workload,
            "driver": case.driver,
            "bytes": case.bytes,
            "depth": case.depth,
            **{what: round(median(float(f[what]) for f in rounds), 2) for what in SPEEDS},
            **{what: round(median(float(f[what]) for f in rounds), 3) for what in ("kicks", "sleeps", "waited")},
            "bytes_copied": results.copied.get((backend, case)),
            **{feature: all(f[feature] for f in rounds) for feature in FEATURES},
            **_comparison(rounds, case.depth),
            "rounds": len(rounds),
        }
        for (backend, queue, case), rounds in results.runs.items()
    ]
