"""What came of it, as JSON and as a table for the terminal. The page (:mod:`virtio_tee.compare.page`) is made of the
JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from typing import Any

from pyvhost.vring.choice import has_compiled
from virtio_tee.compare.meter import Message, Party, Phase, What
from virtio_tee.compare.paths import PARTIES, Path
from virtio_tee.compare.run import Result
from virtio_tee.compare.workloads import DIAGRAMS, KIB, MIB, Workload

VERSION = 1
"""Of the JSON."""

MEANING = {
    What.REQUESTS: "messages by which the guest asks for something",
    What.MESSAGES: "messages between parties, both ways",
    What.NOTIFICATIONS: "one party wakes another: kicks, interrupts, FF-A notifications",
    What.VM_EXITS: "the guest leaves for the hypervisor: kicks, HVCs",
    What.WORLD_SWITCHES: "between normal and secure world, each way counted",
    What.BYTES_COPIED: "bytes read from and written to memory that is passed on, TAs' own work left out",
    What.PAGES_SHARED: "pages of the guest to which a party got access for this work, the set-up included",
    What.RPCS: "questions of the TEE to the guest",
    What.RPC_HOPS: "messages that these questions took",
    What.POLLS: "looks for notifications, which the model makes instead of being interrupted; counted nowhere else",
}
"""What is counted → what it means."""


def as_json(
    workloads: Sequence[Workload], paths: Sequence[Path], results: Sequence[Result], elapsed_s: float
) -> dict[str, Any]:
    """The contract of ``compare --json``."""
    return {
        "version": VERSION,
        "machine": {
            "system": f"{platform.system()} {platform.machine()}",
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "queue": "compiled" if has_compiled() else "pure",
        },
        "elapsed_s": round(elapsed_s, 1),
        "same_answers": same_answers(results),
        "meaning": {str(what): text for what, text in MEANING.items()},
        "parties": [{"party": str(p), "title": title, "what": what} for p, (title, what) in PARTIES.items()],
        "paths": [
            {
                "path": path.name,
                "mode": path.mode,
                "label": path.label,
                "what": path.what,
                "parties": [str(party) for party in path.parties],
                "trust": [{"party": str(t.party), "trusted": t.trusted, "changed": t.changed} for t in path.trust],
            }
            for path in paths
        ],
        "workloads": [
            {
                "workload": w.name,
                "group": w.group,
                "what": w.what,
                "bytes": w.size,
                "sessions": w.sessions,
                "guests": w.guests,
            }
            for w in workloads
        ],
        "results": [_result(result) for result in results],
        "diagrams": [_diagram(result) for result in results if result.workload.name in DIAGRAMS],
    }


def same_answers(results: Sequence[Result]) -> bool:
    """Whether TAs answered the same on all paths."""
    answers: dict[str, set[str]] = {}
    for result in results:
        answers.setdefault(result.workload.name, set()).add(result.answer)
    return all(len(found) == 1 for found in answers.values())


def _result(result: Result) -> dict[str, Any]:
    call, setup = result.counts[Phase.CALL], result.counts[Phase.SETUP]
    counts = {str(what): count for what, count in call.items()}
    counts[What.PAGES_SHARED] += setup[What.PAGES_SHARED]
    return {
        "workload": result.workload.name,
        "path": result.path.name,
        "mode": result.path.mode,
        **counts,
        "attach": {str(what): count for what, count in result.counts[Phase.ATTACH].items()},
        "setup": {str(what): count for what, count in setup.items()},
        "readers": {
            str(party): {
                "guest_memory": reach.guest_memory,
                "payload": reach.payload,
                "copied": result.copied[party],
            }
            for party, reach in result.reach.items()
        },
        "payload": result.payload,
        **_timing(result),
        "answer": result.answer,
    }


def _timing(result: Result) -> dict[str, Any]:
    timing = result.timing
    if timing is None:
        return {"latency_us": None, "throughput": None}
    return {
        "latency_us": {"p50": round(timing.p50_us, 1), "p90": round(timing.p90_us, 1), "samples": timing.samples},
        "throughput": {
            "depth": timing.depth,
            "per_s": round(timing.per_s, 1),
            "mib_per_s": round(timing.per_s * result.workload.size / MIB, 1),
        },
    }


def _diagram(result: Result) -> dict[str, Any]:
    start = result.messages[0].at_ns if result.messages else 0
    return {
        "workload": result.workload.name,
        "path": result.path.name,
        "mode": result.path.mode,
        "parties": [str(party) for party in result.path.parties],
        "messages": [_message(message, start) for message in result.messages],
    }


def _message(message: Message, start: int) -> dict[str, Any]:
    return {
        "at_us": round((message.at_ns - start) / 1000, 1),
        "from": str(message.source),
        "to": str(message.target),
        "name": message.name,
        "kind": message.kind,
        "bytes": message.size,
        "rpc": message.rpc,
    }


# -- for people


def size(count: float) -> str:
    """Bytes."""
    for unit, name in ((MIB, "MiB"), (KIB, "KiB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if count < 1000 * unit else f"{count / unit:.0f} {name}"
    return f"{count:.0f} B"


def duration(us: float) -> str:
    """Microseconds."""
    return f"{us:.0f} µs" if us < 1000 else f"{us / 1000:.3g} ms"


def rate(per_s: float) -> str:
    """Times in a second."""
    return f"{per_s / 1000:.3g} k/s" if per_s >= 1000 else f"{per_s:.3g}/s"


COUNTS = (
    (What.MESSAGES, "msgs"),
    (What.NOTIFICATIONS, "notif."),
    (What.VM_EXITS, "exits"),
    (What.WORLD_SWITCHES, "switches"),
    (What.PAGES_SHARED, "pages"),
    (What.RPC_HOPS, "RPC hops"),
)
"""Columns of the table, with their heads."""


WIDTH = 160
"""Of tables that go into a file."""


def show(report: dict[str, Any]) -> None:
    """The tables."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=WIDTH)
    labels = {(p["path"], p["mode"]): p["label"] for p in report["paths"]}
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title="one unit of each workload")
    for head in ("workload", "path"):
        table.add_column(head, no_wrap=True)
    for head in [head for _, head in COUNTS] + ["copied", "p50", "rate"]:
        table.add_column(head, justify="right", no_wrap=True)
    for head in ("payload readable by", "guest memory given to"):
        table.add_column(head)
    last = ""
    for result in report["results"]:
        first = result["workload"] != last
        if first and last:
            table.add_section()
        last = result["workload"]
        latency, throughput = result["latency_us"], result["throughput"]
        table.add_row(
            last if first else "",
            labels[result["path"], result["mode"]],
            *(str(result[what]) for what, _ in COUNTS),
            size(result["bytes_copied"]),
            duration(latency["p50"]) if latency else "–",
            rate(throughput["per_s"]) if throughput else "–",
            ", ".join(party for party, reach in result["readers"].items() if reach["payload"] and party != Party.GUEST)
            or "–",
            ", ".join(
                f"{party} {size(reach['guest_memory'])}"
                for party, reach in result["readers"].items()
                if reach["guest_memory"] and party != Party.GUEST
            )
            or "–",
        )
    console.print(table)
    trust = Table(box=box.SIMPLE_HEAD, pad_edge=False, header_style="bold", title="what is trusted, what changes")
    for head in ("path", "party", "is trusted", "has to have, or be"):
        trust.add_column(head)
    for path in report["paths"]:
        for number, one in enumerate(path["trust"]):
            trust.add_row(
                path["label"] if not number else "", one["party"], one["trusted"] or "–", one["changed"] or "–"
            )
        trust.add_section()
    console.print(trust)
    same = "yes" if report["same_answers"] else "NO"
    console.print(f"same answers on all paths: {same}; {report['elapsed_s']} s. docs/compare.md says how to read this.")
