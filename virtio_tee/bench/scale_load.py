"""What a request costs a backend that holds much: many sessions, many regions, many guests."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from tee.soft.examples import UUIDS
from virtio_tee.bench.bare_guest import DEPTH, BareGuest, Packed, busy
from virtio_tee.bench.plan import MIB, NULL, TOUCH
from virtio_tee.bench.served import Served

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Site:
    """A backend and its guests, each with the requests that it sends in turn."""

    served: Served
    guests: Sequence[tuple[BareGuest, Sequence[Packed]]]

    def latency_us(self, seconds: float) -> float:
        """The median of one request after the other, always the same one of the first guest."""
        guest, requests = self.guests[0]
        return median(guest.latencies(requests[:1], seconds)) / 1e3

    def cpu_us(self, depth: int, seconds: float) -> float:
        """The backend's CPU time per request, all threads, while all guests send all of theirs."""
        before = self.served.cpu_s
        count = busy(self.guests, depth, seconds)
        return (self.served.cpu_s - before) / count * 1e6


@dataclass(frozen=True, slots=True)
class Comparison:
    """A loaded backend beside one that has one of each; ``depths``: requests of each guest under way, all busy."""

    name: str
    base: Site
    load: Site
    depths: Sequence[int]

    def measure(self, seconds: float) -> dict[str, tuple[float, float]]:
        """One round: figure → (with one, with many), in µs."""
        figures = {f"{self.name}/one-busy": (self.base.latency_us(seconds), self.load.latency_us(seconds))}
        for depth in self.depths:
            figures[f"{self.name}/all-busy/{depth}"] = (
                self.base.cpu_us(depth, seconds),
                self.load.cpu_us(depth, seconds),
            )
        return figures


class Sites:
    """Makes backends in ``folder`` on the CPU ``cpu``; ``stack`` ends them and their guests."""

    def __init__(self, stack: ExitStack, folder: Path, cpu: int) -> None:
        self._stack = stack
        self._folder = folder
        self._cpu = cpu

    def make(self, name: str, *, guests: int = 1, sessions: int = 1, regions: int = 0, requests: int = 0) -> Site:
        """A backend with ``guests`` guests that have so much each, and at least ``requests`` requests packed: a null
        invoke in each session in turn, or with regions one that changes a byte of each region in turn.
        """
        limits = ("--max-sessions", str(sessions), "--max-regions", str(max(1, regions)))
        served = Served(self._folder, name, "--built-in-tas", *limits, guests=guests, cpu=self._cpu)
        self._stack.callback(served.end)
        return Site(served, [self._guest(path, sessions, regions, requests) for path in served.sockets])

    def _guest(self, path: str, sessions: int, regions: int, requests: int) -> tuple[BareGuest, Sequence[Packed]]:
        count = max(sessions, regions, requests, DEPTH)
        guest = BareGuest(path, MIB + regions * PAGE + count * 128)
        self._stack.callback(guest.close)
        context = guest.open_context()
        opened = [guest.open_session(context, UUIDS["probe"]) for _ in range(sessions)]
        if not regions:
            return guest, guest.pack([guest.invoke(context, opened[n % sessions], NULL) for n in range(count)])
        at = guest.transport.allocate(regions * PAGE).ranges[0].address
        shared = [guest.register(context, at + n * PAGE, PAGE) for n in range(regions)]
        touching = [
            guest.touching(context, opened[n % sessions], TOUCH, shared[n % regions], PAGE) for n in range(count)
        ]
        return guest, guest.pack(touching)


def comparisons(sites: Sites, *, guests: int, sessions: int, regions: int) -> list[Comparison]:
    """The backends, side by side. Those with one session or region have as many requests packed as the others."""
    one = sites.make("one", requests=sessions)
    return [
        Comparison("sessions", one, sites.make("sessions", sessions=sessions), (DEPTH,)),
        Comparison(
            "regions",
            sites.make("one-region", regions=1, requests=regions),
            sites.make("regions", regions=regions),
            (DEPTH,),
        ),
        Comparison("guests", sites.make("one-guest"), sites.make("guests", guests=guests), (1, DEPTH)),
    ]
