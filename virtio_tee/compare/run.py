"""Does each workload on each path: once to count, then again and again to time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median, quantiles

from guest_driver.client import PendingCall
from virtio_tee.compare.meter import Message, Meter, Party, Phase, Reach, What, counting_copies
from virtio_tee.compare.paths import Path
from virtio_tee.compare.site import Kit, Site
from virtio_tee.compare.workloads import DEPTH, Job, Workload, digest

SETTLE_S = 0.004
"""After which nothing that belongs to a call is still under way."""
WARM_UPS = 2
LEAST = 5
"""Calls that are timed, if they take long."""
BUDGET = 400.0
"""All of it takes about this many times the seconds that each workload is timed on each path, and no longer: on a busy
machine less is timed."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Microseconds of one unit; units in a second with ``depth`` under way at a time."""

    p50_us: float
    p90_us: float
    samples: int
    depth: int
    per_s: float


@dataclass(slots=True)
class Result:
    """What came of one workload on one path."""

    workload: Workload
    path: Path
    counts: dict[Phase, dict[What, int]]
    reach: dict[Party, Reach]
    copied: dict[Party, int]
    messages: list[Message]
    payload: int  #: bytes that were looked for
    answer: str  #: digest of what the TA answered
    timing: Timing | None = None


@dataclass(slots=True)
class Runner:
    """Runs ``workloads`` on ``paths``. ``seconds``: how long each is timed; 0: not at all. ``say`` is told of
    progress."""

    workloads: Sequence[Workload]
    paths: Sequence[Path]
    kit: Kit
    seconds: float
    say: Callable[[str], None]
    _places: Iterator[int] = field(default_factory=lambda: iter(range(1 << 30)))

    def run(self) -> list[Result]:
        """All of it. Raises TeeError, OSError: a path does not do the work."""
        end = time.monotonic() + BUDGET * self.seconds
        results = []
        for number, workload in enumerate(self.workloads, 1):
            self.say(f"counting {number} of {len(self.workloads)}: {workload.what}")
            results += [self._count(workload, path) for path in self.paths]
        if self.seconds:
            with ExitStack() as stack:
                guests = max(workload.guests for workload in self.workloads)
                self.say("starting backends")
                sites = {
                    path: stack.enter_context(path.open(self.kit, self._place(), guests, None)) for path in self.paths
                }
                for number, result in enumerate(results):
                    if not number % len(self.paths):
                        self.say(f"timing {number // len(self.paths) + 1} of {len(self.workloads)}: "
                                 f"{result.workload.what}")  # fmt: skip
                    left = max(0.0, end - time.monotonic()) / (len(results) - number)
                    result.timing = self._time(result.workload, sites[result.path], min(self.seconds, left / 2))
        return results

    def _place(self) -> str:
        return str(next(self._places))

    def _count(self, workload: Workload, path: Path) -> Result:
        meter = Meter(payload=workload.payload(workload, self.kit))
        with counting_copies(meter), path.open(self.kit, self._place(), workload.guests, meter) as site:
            time.sleep(SETTLE_S)
            meter.phase = Phase.SETUP
            with workload.prepare(workload, site) as job:
                time.sleep(SETTLE_S)
                meter.phase = Phase.CALL
                came = job.call()
                time.sleep(SETTLE_S)
                meter.phase = Phase.END
                answer = digest(job.answer(came))
        return Result(
            workload,
            path,
            {phase: {what: counts[what] for what in What} for phase, counts in meter.counts.items()},
            {party: meter.reach.get(party, Reach()) for party in path.parties},
            {party: meter.copied[party] for party in path.parties},
            meter.messages,
            sum(map(len, meter.payload)),
            answer,
        )

    @staticmethod
    def _time(workload: Workload, site: Site, seconds: float) -> Timing:
        with workload.prepare(workload, site) as job:
            for _ in range(WARM_UPS):
                job.call()
            samples: list[int] = []
            end = time.perf_counter() + seconds
            while len(samples) < LEAST or time.perf_counter() < end:
                start = time.perf_counter_ns()
                job.call()
                samples.append(time.perf_counter_ns() - start)
            depth, per_s = DEPTH, 0.0
            if job.begin is not None:
                per_s = _throughput(job.begin, seconds)
            else:
                depth, per_s = 1, 1e9 * len(samples) / sum(samples)
        return Timing(median(samples) / 1e3, quantiles(samples, n=10)[-1] / 1e3, len(samples), depth, per_s)


def _throughput(begin: Callable[[], PendingCall], seconds: float) -> float:
    """Units in a second with DEPTH under way."""
    under_way: deque[PendingCall] = deque(begin() for _ in range(DEPTH))
    start, done = time.perf_counter(), 0
    while done < LEAST or time.perf_counter() < start + seconds:
        under_way.popleft().wait()
        done += 1
        under_way.append(begin())
    took = time.perf_counter() - start
    for one in under_way:
        one.wait()
    return done / took


__all__ = ["Job", "Result", "Runner", "Timing"]
