"""A record of every request and RPC: who sent what to whom, and when.

:class:`Recorder` is what the backend tells; :class:`Trace` writes it down, :class:`host_backend.metrics.Metrics` counts
it. A trace is in the JSON array form of the Trace Event Format, one event a line, so that Perfetto and chrome://tracing
show it as a timeline; the closing bracket may be missing. Times are microseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import logging
import time
from typing import IO, Any

from device.wire import Request, Status
from tee.results import describe
from tee.rpc import describe_command

log = logging.getLogger(__name__)


class Recorder:
    """Is told what happens, on the data-plane thread: it must be quick. This one forgets."""

    def request(self, vm: str, kind: int, tag: int, began: int) -> None:
        """A request has gone from a guest to the TEE; ``began`` in nanoseconds of CLOCK_MONOTONIC."""

    def response(self, vm: str, kind: int, tag: int, status: int, ret: int) -> None:
        """The TEE has ended it, and it was answered."""

    def served(self, vm: str, kind: int, tag: int, began: int, ret: int) -> None:
        """A request has gone to the TEE, which has ended it at once, and it is answered with OK."""
        self.request(vm, kind, tag, began)
        self.response(vm, kind, tag, Status.OK, ret)

    def answered(self, vm: str, kind: int, status: int) -> None:
        """The device itself has answered a request at once. ``kind`` may be anything."""

    def rpc(self, vm: str, rpc: object, command: int, route: str) -> None:
        """The TEE has made an RPC, which goes to ``route``."""

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        """An RPC was answered, by the guest or for it, or withdrawn. ``answered_by`` says who and, after a colon,
        why."""

    def rpc_refused(self, vm: str, rpc: object, command: int, why: str, code: int) -> None:
        """The device itself has answered an RPC, which went to nobody. ``vm`` is "" where none is behind it."""
        self.rpc(vm, rpc, command, "nobody")
        self.rpc_ended(vm, rpc, command, f"device: {why}", code)

    def mark(self, vm: str, what: str, **details: Any) -> None:
        """Something happened that has no length: an epoch ended, a frontend came."""

    def placed(self, vm: str, size: int, why: str) -> None:
        """The TEE uses a region of ``size`` bytes in place; or by copies, and ``why``."""

    def broken(self, vm: str, index: int, error: Exception) -> None:
        """A driver has broken the rules of a queue, which is not served any more. May be told again."""


class Recorders(Recorder):
    """Tells several."""

    def __init__(self, *recorders: Recorder) -> None:
        self._all = recorders

    def request(self, vm: str, kind: int, tag: int, began: int) -> None:
        for one in self._all:
            one.request(vm, kind, tag, began)

    def served(self, vm: str, kind: int, tag: int, began: int, ret: int) -> None:
        for one in self._all:
            one.served(vm, kind, tag, began, ret)

    def response(self, vm: str, kind: int, tag: int, status: int, ret: int) -> None:
        for one in self._all:
            one.response(vm, kind, tag, status, ret)

    def answered(self, vm: str, kind: int, status: int) -> None:
        for one in self._all:
            one.answered(vm, kind, status)

    def rpc(self, vm: str, rpc: object, command: int, route: str) -> None:
        for one in self._all:
            one.rpc(vm, rpc, command, route)

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        for one in self._all:
            one.rpc_ended(vm, rpc, command, answered_by, code)

    def mark(self, vm: str, what: str, **details: Any) -> None:
        for one in self._all:
            one.mark(vm, what, **details)

    def placed(self, vm: str, size: int, why: str) -> None:
        for one in self._all:
            one.placed(vm, size, why)

    def broken(self, vm: str, index: int, error: Exception) -> None:
        for one in self._all:
            one.broken(vm, index, error)


class Trace(Recorder):
    """Writes events to ``out`` as they happen. Where that fails (a full disk), the trace ends and guests go on."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._out.write("[")
        self._lost = False
        self._separator = "\n"
        self._vms: dict[str, int] = {}
        self._open: dict[tuple[str, str, int], tuple[float, str]] = {}
        """When each began that has not ended, its route and name."""
        self._broken: dict[tuple[str, int], Exception] = {}

    def close(self) -> None:
        """End the file, which then is a whole JSON array."""
        try:
            self._out.write("\n]\n")
            self._out.close()
        except OSError as e:
            self._end_early(e)

    def request(self, vm: str, kind: int, tag: int, began: int) -> None:
        self._begin(vm, "requests", Request(kind).name, tag, at=began / 1000)

    def response(self, vm: str, kind: int, tag: int, status: int, ret: int) -> None:
        what = {"from": "guest", "to": "device", "status": Status(status).name, "ret": describe(ret)}
        self._end(vm, "requests", Request(kind).name, tag, what)

    def answered(self, vm: str, kind: int, status: int) -> None:
        what = {"from": "guest", "to": "device", "answered_by": "device", "status": Status(status).name}
        self._instant(vm, "requests", request_name(kind), what)

    def rpc(self, vm: str, rpc: object, command: int, route: str) -> None:
        self._begin(vm, "RPCs", describe_command(command), id(rpc), {"route": route}, route)

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        who, _, why = answered_by.partition(": ")
        what = {"from": "tee", "to": "guest", "answered_by": answered_by, "ret": describe(code)}
        if who != "guest":
            what["reason"] = why
        self._end(vm, "RPCs", describe_command(command), id(rpc), what)

    def mark(self, vm: str, what: str, **details: Any) -> None:
        self._instant(vm, "life", what, details)

    def placed(self, vm: str, size: int, why: str) -> None:
        name = "region copied" if why else "region in place"
        self._instant(vm, "life", name, {"bytes": size, **({"reason": why} if why else {})})

    def broken(self, vm: str, index: int, error: Exception) -> None:
        if self._broken.get((vm, index)) is not error:
            self._broken[vm, index] = error
            self._instant(vm, "life", "queue broken", {"queue": index, "because": str(error)})

    def _instant(self, vm: str, lane: str, name: str, args: dict[str, Any]) -> None:
        self._write(vm, {"name": name, "ph": "i", "s": "p", "ts": _now(), "cat": lane, "args": args})

    def _begin(
        self,
        vm: str,
        lane: str,
        name: str,
        key: int,
        args: dict[str, Any] | None = None,
        route: str = "",
        at: float = 0,
    ) -> None:
        now = at or _now()
        self._open[vm, lane, key] = (now, route)
        event = {"name": name, "ph": "b", "cat": lane, "id": key, "ts": now, "args": args or {}}
        self._write(vm, event)

    def _end(self, vm: str, lane: str, name: str, key: int, args: dict[str, Any]) -> None:
        now = _now()
        began, route = self._open.pop((vm, lane, key), (now, ""))
        if route:
            args["route"] = route
        args["took_us"] = round(now - began, 3)
        self._write(vm, {"name": name, "ph": "e", "cat": lane, "id": key, "ts": now, "args": args})

    def _write(self, vm: str, event: dict[str, Any]) -> None:
        if self._lost:
            return
        try:
            self._record(vm, event)
        except OSError as e:
            self._end_early(e)

    def _end_early(self, error: OSError) -> None:
        if not self._lost:
            self._lost = True
            log.error("the trace cannot be written and ends here: %s; make room, and restart to record again", error)

    def _record(self, vm: str, event: dict[str, Any]) -> None:
        pid = self._vms.get(vm)
        if pid is None:
            pid = self._vms[vm] = len(self._vms) + 1
            name = {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": f"VM {vm}" if vm else "no VM"}}
            self._put(name)
        self._put({"pid": pid, "tid": event.get("cat", ""), **event})
        self._out.flush()

    def _put(self, event: dict[str, Any]) -> None:
        self._out.write(self._separator + json.dumps(event))
        self._separator = ",\n"


def request_name(kind: int) -> str:
    """The name of a request type, or UNKNOWN: a guest can send any number."""
    try:
        return Request(kind).name
    except ValueError:
        return "UNKNOWN"


def _now() -> float:
    return time.monotonic_ns() / 1000
