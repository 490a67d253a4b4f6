"""What was seen of a scenario's run, whoever watched it, as JSON and as a timeline."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Exchange:
    """A request or an RPC that has ended; ``start`` in seconds of the monotonic clock."""

    name: str
    result: str
    start: float
    took_s: float
    answered_by: str = ""

    @property
    def ok(self) -> bool:
        """Whether it ended with SUCCESS."""
        return self.result == "SUCCESS"


@dataclass(slots=True)
class Outcome:
    """What came of a run."""

    why: str = ""
    elapsed_s: float = 0.0
    tee: str = "soft"
    path: str = "virtio"
    steps: list[dict[str, Any]] = field(default_factory=list)
    requests: list[Exchange] = field(default_factory=list)
    rpcs: list[Exchange] = field(default_factory=list)

    @property
    def result(self) -> str:
        """ok or failed."""
        return "ok" if not self.why else "failed"

    def as_json(self) -> dict[str, Any]:
        """The contract of ``demo --json``."""
        loaded = any(rpc.name == "LOAD_TA" and rpc.ok for rpc in self.rpcs)
        opened = any(request.name == "OPEN_SESSION" and request.ok for request in self.requests)
        return {
            "result": self.result,
            **({"why": self.why} if self.why else {}),
            "path": self.path,
            "tee": self.tee,
            "requests": len(self.requests),
            "ta_loaded_over_rpc": loaded and opened,
            "rpcs": [
                {
                    "command": rpc.name,
                    "answered_by": rpc.answered_by,
                    "result": rpc.result,
                    "took_us": round(rpc.took_s * 1e6, 1),
                }
                for rpc in self.rpcs
            ],
            "steps": self.steps,
            "elapsed_s": round(self.elapsed_s, 3),
        }


def from_trace(trace: Sequence[dict[str, Any]], lane: str) -> list[Exchange]:
    """Of a backend's trace (``serve --trace``), one lane: "requests" or "RPCs"."""
    return [
        Exchange(
            event["name"],
            event["args"]["ret"],
            (event["ts"] - event["args"]["took_us"]) / 1e6,
            event["args"]["took_us"] / 1e6,
            event["args"].get("answered_by", ""),
        )
        for event in trace
        if event.get("cat") == lane and event["ph"] == "e"
    ]


def from_events(events: Sequence[dict[str, Any]], begin: str, end: str, answered_by: str = "") -> list[Exchange]:
    """Of what a driver's observer has noted (:class:`virtio_tee.report.Report`), what begins and ends so."""
    begun: dict[int, float] = {}
    found: list[Exchange] = []
    for event in events:
        if event["kind"] == begin:
            begun[event["id"]] = event["time"]
        elif event["kind"] == end and event["id"] in begun:
            start = begun.pop(event["id"])
            found.append(Exchange(event["what"], event["result"], start, event["time"] - start, answered_by))
    return found


def show(outcome: Outcome) -> None:
    """The timeline, for people."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    table = Table(title="who sent what to whom", box=None, pad_edge=False, header_style="bold")
    for column, justify in (("ms", "right"), ("from", "left"), ("to", "left"), ("what", "left"), ("took ms", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    rows = sorted(_rows(outcome), key=lambda row: row[0])
    first = rows[0][0] if rows else 0.0
    for at, source, target, what, took in rows:
        table.add_row(f"{(at - first) * 1000:.2f}", source, target, what, f"{took * 1000:.2f}")
    console.print(table)
    facts = outcome.as_json()
    console.print(
        f"\n{facts['requests']} requests, {len(facts['rpcs'])} RPCs; path {facts['path']}, TEE {facts['tee']}; "
        f"TAs loaded over RPC: {'yes' if facts['ta_loaded_over_rpc'] else 'no'}; {facts['elapsed_s']} s"
    )
    console.print(f"result: {outcome.result}" + (f": {outcome.why}" if outcome.why else ""), markup=False)


_REQUESTS_TO = {"virtio": "device", "ffa": "OP-TEE", "linux": "kernel"}


def _rows(outcome: Outcome) -> list[tuple[float, str, str, str, float]]:
    """(time in s, from, to, what, took s), of both processes: they share the monotonic clock."""
    rows: list[tuple[float, str, str, str, float]] = []
    for step in outcome.steps:
        mark = "" if step["ok"] else "  FAILED"
        rows.append((step["start"], "client", "", f"── {step['name']} {step['detail']}{mark}", step["took_s"]))
    for source, target, mark, exchanges in (
        ("guest", _REQUESTS_TO[outcome.path], "", outcome.requests),
        ("TEE", "supplicant", "RPC ", outcome.rpcs),
    ):
        rows += [(e.start, source, target, f"{mark}{e.name} → {e.result}", e.took_s) for e in exchanges]
    return rows
