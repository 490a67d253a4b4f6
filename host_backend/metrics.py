"""What the backend counts, in the terms of Prometheus.

The data plane adds to plain dictionaries and lists, without a lock; the control plane copies them when it is asked
(each copy is one step of the interpreter), makes the text and sends it. Nothing that a guest sends becomes a label:
names that are not known are counted as UNKNOWN, so that no guest makes the number of series grow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any

from device.machines import LifeState
from device.wire import Status
from host_backend.trace import Recorder, request_name
from tee.results import Result
from tee.rpc import RpcCommand

if TYPE_CHECKING:
    from prometheus_client.core import Metric

    from host_backend.device import TeeDevice
    from tee.driver import TeeDriver


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. ``kind`` is counter, gauge or histogram."""

    name: str
    kind: str
    labels: tuple[str, ...]
    help: str


DEFINITIONS = (
    Definition("virtio_tee_requests", "counter", ("vm", "type", "status"), "Requests that were answered"),
    Definition(
        "virtio_tee_results", "counter", ("vm", "type", "result"), "Requests that the TEE has ended, by its result"
    ),
    Definition(
        "virtio_tee_request_seconds",
        "histogram",
        ("vm", "type"),
        "From when the TEE was given a request until the answer was there",
    ),
    Definition(
        "virtio_tee_rpcs", "counter", ("vm", "command", "route", "result"), "RPCs of the TEE, by who answered them"
    ),
    Definition("virtio_tee_rpc_seconds", "histogram", ("vm", "command"), "From an RPC to its answer"),
    Definition("virtio_tee_connections", "counter", ("vm",), "Frontends that have connected"),
    Definition("virtio_tee_connected", "gauge", ("vm",), "1 while a frontend is connected"),
    Definition(
        "virtio_tee_resets", "counter", ("vm",), "Times that a guest's state was given up: reset, or frontend gone"
    ),
    Definition("virtio_tee_queue_breaks", "counter", ("vm", "queue"), "Queues whose driver broke the ring's rules"),
    Definition(
        "virtio_tee_regions",
        "counter",
        ("vm", "use", "reason"),
        "Regions that a TEE device of Linux has taken, by how it uses them: in_place, copied",
    ),
    Definition(
        "virtio_tee_state",
        "gauge",
        ("vm", "state"),
        "1 for the state that the guest's device is in: fresh, running, paused, draining, draining_started",
    ),
    Definition(
        "virtio_tee_objects",
        "gauge",
        ("vm", "kind"),
        "What a guest has now: contexts, sessions, regions, region_bytes, requests, calls, rpcs",
    ),
    Definition("virtio_tee_limit", "gauge", ("vm", "limit"), "What a guest may have (options of serve)"),
    Definition("virtio_tee_tee_objects", "gauge", ("kind",), "What the TEE has now, for all guests together"),
)

NAMES = {definition.name: definition for definition in DEFINITIONS}

#: Bounds of the histograms in seconds: powers of two from 2 µs to 33 s.
BOUNDS = tuple(2**power / 1e6 for power in range(1, 26))

_LAST = len(BOUNDS)


class Histogram:
    """Counts by the power of two of their microseconds: one shift for each observation."""

    __slots__ = ("counts", "sum")

    def __init__(self) -> None:
        self.counts = [0] * (_LAST + 1)
        self.sum = 0

    def observe(self, nanoseconds: int) -> None:
        """Count one."""
        # a whole power of two belongs to the bucket that it bounds
        index = ((nanoseconds + 999) // 1000 - 1).bit_length() - 1
        self.counts[max(0, min(index, _LAST))] += 1
        self.sum += nanoseconds

    def buckets(self) -> tuple[list[tuple[str, float]], float]:
        """Cumulated counts by upper bound, and the sum in seconds."""
        total, out = 0, []
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), list(self.counts), strict=True):
            total += count
            out.append((bound, float(total)))
        return out, self.sum / 1e9


class Metrics(Recorder):
    """Counts what it is told."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, str], int] = {}
        self._results: dict[tuple[str, str, str], int] = {}
        self._request_times: dict[tuple[str, str], Histogram] = {}
        self._rpcs: dict[tuple[str, str, str, str], int] = {}
        self._rpc_times: dict[tuple[str, str], Histogram] = {}
        self._connections: dict[tuple[str], int] = {}
        self._connected: dict[tuple[str], int] = {}
        self._resets: dict[tuple[str], int] = {}
        self._breaks: dict[tuple[str, str], int] = {}
        self._placed: dict[tuple[str, str, str], int] = {}
        self._broken: dict[tuple[str, int], Exception] = {}
        self._started: dict[str, dict[int, int]] = {}
        self._rpc_started: dict[int, int] = {}
        self._devices: list[TeeDevice] = []
        self._tee: TeeDriver | None = None

    def watch(self, tee: TeeDriver, devices: Sequence[TeeDevice]) -> None:
        """Say whose contents are to be told."""
        self._tee = tee
        self._devices = list(devices)

    # On the data-plane thread.

    def request(self, vm: str, kind: int, tag: int, began: int) -> None:
        self._started.setdefault(vm, {})[tag] = began

    def response(self, vm: str, kind: int, tag: int, status: int, ret: int) -> None:
        name = request_name(kind)
        _count(self._requests, (vm, name, _STATUS.get(status, "UNKNOWN")))
        _count(self._results, (vm, name, _RESULT.get(ret, "UNKNOWN")))
        began = self._started.get(vm, _NONE).pop(tag, None)
        if began is not None:
            _observe(self._request_times, (vm, name), began)

    def served(self, vm: str, kind: int, tag: int, began: int, ret: int) -> None:
        name = request_name(kind)
        _count(self._requests, (vm, name, _OK))
        _count(self._results, (vm, name, _RESULT.get(ret, "UNKNOWN")))
        _observe(self._request_times, (vm, name), began)

    def answered(self, vm: str, kind: int, status: int) -> None:
        _count(self._requests, (vm, request_name(kind), _STATUS.get(status, "UNKNOWN")))

    def rpc(self, vm: str, rpc: object, command: int, route: str) -> None:
        self._rpc_started[id(rpc)] = time.monotonic_ns()

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        name = _COMMAND.get(command, "UNKNOWN")
        _count(self._rpcs, (vm, name, answered_by.partition(":")[0], _RESULT.get(code, "UNKNOWN")))
        began = self._rpc_started.pop(id(rpc), None)
        if began is not None:
            _observe(self._rpc_times, (vm, name), began)

    def mark(self, vm: str, what: str, **details: Any) -> None:
        if what == "connected":
            _count(self._connections, (vm,))
            self._connected[vm,] = 1
        elif what == "disconnected":
            self._connected[vm,] = 0
        elif what == "epoch ended":
            _count(self._resets, (vm,))
            self._started.pop(vm, None)  # nobody is told how these end

    def placed(self, vm: str, size: int, why: str) -> None:
        _count(self._placed, (vm, "copied" if why else "in_place", why))

    def broken(self, vm: str, index: int, error: Exception) -> None:
        if self._broken.get((vm, index)) is not error:
            self._broken[vm, index] = error
            _count(self._breaks, (vm, str(index)))

    # On the control plane.

    def render(self) -> bytes:
        """All metrics as text, as Prometheus reads it."""
        from prometheus_client import CollectorRegistry, generate_latest

        registry = CollectorRegistry(auto_describe=False)
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        """For prometheus_client."""
        yield _family("virtio_tee_requests", self._requests)
        yield _family("virtio_tee_results", self._results)
        yield _family("virtio_tee_request_seconds", self._request_times)
        yield _family("virtio_tee_rpcs", self._rpcs)
        yield _family("virtio_tee_rpc_seconds", self._rpc_times)
        yield _family("virtio_tee_connections", self._connections)
        yield _family("virtio_tee_connected", self._connected)
        yield _family("virtio_tee_resets", self._resets)
        yield _family("virtio_tee_queue_breaks", self._breaks)
        yield _family("virtio_tee_regions", self._placed)
        states: dict[tuple[str, str], int] = {}
        objects: dict[tuple[str, str], int] = {}
        limits: dict[tuple[str, str], int] = {}
        for device in self._devices:
            epoch, life = device.epoch, device.life
            for state in LifeState:
                states[device.vm, state.name.lower()] = int(state is life)
            for kind, number in (
                ("contexts", len(epoch.contexts)),
                ("sessions", len(epoch.sessions)),
                ("regions", len(epoch.regions)),
                ("region_bytes", epoch.region_bytes),
                ("requests", len(epoch.calls)),
                ("calls", epoch.running),
                ("rpcs", len(epoch.rpcs)),
            ):
                objects[device.vm, kind] = number
            for name in ("contexts", "sessions", "regions", "region_bytes", "calls", "rpcs"):
                limits[device.vm, name] = getattr(device.limits, f"max_{name}")
        yield _family("virtio_tee_state", states)
        yield _family("virtio_tee_objects", objects)
        yield _family("virtio_tee_limit", limits)
        yield _family("virtio_tee_tee_objects", {(kind,): number for kind, number in self._usage().items()})

    def _usage(self) -> dict[str, int]:
        for _ in range(3):
            try:
                return self._tee.usage() if self._tee is not None else {}
            except RuntimeError:  # the TEE is adding something at this very moment
                continue
        return {}


_NONE: dict[int, int] = {}


def _names(enum: type[IntEnum]) -> dict[int, str]:
    return {int(member): member.name for member in enum}


_STATUS, _RESULT, _COMMAND = _names(Status), _names(Result), _names(RpcCommand)
_OK = Status.OK.name


def _count(counts: dict[Any, int], key: tuple[str, ...]) -> None:
    counts[key] = counts.get(key, 0) + 1


def _observe(times: dict[tuple[str, str], Histogram], key: tuple[str, str], began: int) -> None:
    histogram = times.get(key)
    if histogram is None:
        histogram = times[key] = Histogram()
    histogram.observe(time.monotonic_ns() - began)


def _family(name: str, values: dict[Any, Any]) -> Metric:
    """One metric with all its label values. ``values`` is copied at once: the data plane goes on adding."""
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

    definition = NAMES[name]
    copied = values.copy()
    if definition.kind == "histogram":
        histogram = HistogramMetricFamily(name, definition.help, labels=definition.labels)
        for key, value in copied.items():
            histogram.add_metric(key, *value.buckets())
        return histogram
    family = CounterMetricFamily if definition.kind == "counter" else GaugeMetricFamily
    plain = family(name, definition.help, labels=definition.labels)
    for key, value in copied.items():
        plain.add_metric(key, value)
    return plain
