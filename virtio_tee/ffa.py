"""``virtio-tee ffa``: FF-A without a device."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ffa.replay import Record, Replay, Report, TraceError, parse
from virtio_tee.ffa_conformance import conformance


@click.group()
def ffa() -> None:
    """FF-A, the other way to a TEE: the hypervisor shares memory and forwards messages."""


ffa.add_command(conformance)


@ffa.command()
@click.argument(
    "traces", metavar="TRACE...", nargs=-1, required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path)
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: counts, differences, and what each answer took.")
def replay(traces: tuple[Path, ...], as_json: bool) -> None:
    """Hold recorded calls of a real normal world against our SPMC.

    TRACE is a file of JSON lines that begins at boot; several files are one session, in order. Every call that came
    from the normal world is made to the model, and each difference from what the firmware answered is told. Exit
    status: 1 if there is one.
    """
    records: list[Record] = []
    for path in traces:
        try:
            records += parse(path.read_text(encoding="utf-8").splitlines(), str(path))
        except (OSError, UnicodeDecodeError, TraceError) as e:
            raise click.UsageError(f"cannot read {path}: {e}") from None
    report = Replay(records).run()
    click.echo(json.dumps(report.as_json(), indent=2) if as_json else _text(report))
    raise SystemExit(1 if report.differences else 0)


def _text(report: Report) -> str:
    lines = [f"{'call':<32} calls matched computed from trace"]
    for call, n in sorted(report.by_call.items()):
        lines.append(f"{call:<32} {n['calls']:5} {n['matched']:7} {n['computed']:8} {n['from_trace']:10}")
    lines.append(
        f"{report.calls} calls, {report.matched} as the firmware answered; of their registers {report.computed} were "
        f"computed and {report.from_trace} taken from the trace"
    )
    for d in report.differences:
        lines += [f"{d.where}: {d.call}, {d.what}", f"  recorded {d.recorded}", f"  computed {d.computed}"]
    return "\n".join(lines)
