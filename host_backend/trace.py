"""A record of every request and RPC: who sent what to whom, and when.

Written in the JSON array form of the Trace Event Format, one event a line, so that Perfetto and chrome://tracing show
it as a timeline; the closing bracket may be missing. Times are microseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import json
import time
from typing import IO, Any

from device.wire import Request, Status
from tee.results import describe
from tee.rpc import describe_command


class Trace:
    """Writes events to ``out`` as they happen."""

    def __init__(self, out: IO[str]) -> None:
        self._out = out
        self._out.write("[\n")
        self._vms: dict[str, int] = {}
        self._open: dict[tuple[str, str, int], float] = {}

    def close(self) -> None:
        """End the file."""
        self._out.close()

    def request(self, vm: str, kind: int, tag: int) -> None:
        """A request has come from a guest."""
        self._begin(vm, "requests", Request(kind).name, tag)

    def response(self, vm: str, kind: int, tag: int, status: int, ret: int) -> None:
        """A request was answered."""
        what = {"from": "guest", "to": "device", "status": Status(status).name, "ret": describe(ret)}
        self._end(vm, "requests", Request(kind).name, tag, what)

    def rpc(self, vm: str, rpc: object, command: int, route: str) -> None:
        """The TEE has made an RPC, which goes to ``route``."""
        self._begin(vm, "RPCs", describe_command(command), id(rpc), {"route": route})

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        """An RPC was answered, by the guest or for it, or withdrawn."""
        what = {"from": "tee", "to": "guest", "answered_by": answered_by, "ret": describe(code)}
        self._end(vm, "RPCs", describe_command(command), id(rpc), what)

    def mark(self, vm: str, what: str, **details: Any) -> None:
        """Something happened that has no length: an epoch ended, a frontend came."""
        self._write(vm, {"name": what, "ph": "i", "s": "p", "ts": _now(), "cat": "life", "args": details})

    def _begin(self, vm: str, lane: str, name: str, key: int, args: dict[str, Any] | None = None) -> None:
        now = self._open[vm, lane, key] = _now()
        event = {"name": name, "ph": "b", "cat": lane, "id": key, "ts": now, "args": args or {}}
        self._write(vm, event)

    def _end(self, vm: str, lane: str, name: str, key: int, args: dict[str, Any]) -> None:
        now = _now()
        args["took_us"] = round(now - self._open.pop((vm, lane, key), now), 3)
        self._write(vm, {"name": name, "ph": "e", "cat": lane, "id": key, "ts": now, "args": args})

    def _write(self, vm: str, event: dict[str, Any]) -> None:
        pid = self._vms.get(vm)
        if pid is None:
            pid = self._vms[vm] = len(self._vms) + 1
            name = {"name": "process_name", "ph": "M", "pid": pid, "args": {"name": f"VM {vm}"}}
            self._out.write(json.dumps(name) + ",\n")
        self._out.write(json.dumps({"pid": pid, "tid": event.get("cat", ""), **event}) + ",\n")
        self._out.flush()


def _now() -> float:
    return time.monotonic_ns() / 1000
