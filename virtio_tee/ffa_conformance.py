"""``virtio-tee ffa conformance``: the cases against our roles, or against somebody's implementation."""

from __future__ import annotations

import json
from typing import NoReturn

import click

from ffa.conformance import runner
from ffa.conformance.bench import Model
from ffa.conformance.mutants import MUTANTS
from ffa.conformance.registry import Case
from ffa.conformance.runner import Result


@click.command()
@click.option(
    "--against",
    metavar="mutants|MODULE:FACTORY",
    help="What to call: FACTORY(bench) returns an object with call(caller, frame, vcpu). Default: our roles. "
    "'mutants': our roles with one defect after the other (takes two minutes).",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON: each case with its calls and checks, and counts.")
@click.option("--list", "only_list", is_flag=True, help="Print the cases and run none.")
@click.option("--only", metavar="GLOB", default="*", help="Only cases whose id matches.")
def conformance(against: str | None, as_json: bool, only_list: bool, only: str) -> None:
    """Run cases named after the public conformance suites.

    Their ids are those of Arm's ACS, Hafnium and tf-a-tests, so that results can be laid side by side. Exit status: 1
    if a case fails, or if a mutant is found by none.
    """
    cases = runner.select(only)
    if not cases:
        raise click.UsageError(f"no case matches {only!r}: --list prints them")
    if only_list:
        click.echo(_listed(cases, as_json))
        return
    if against == "mutants":
        _mutants(cases, as_json)
    try:
        factory = Model if against is None else runner.load(against)
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    results = [runner.run(case, factory) for case in cases]
    counts = runner.counts(results)
    if as_json:
        click.echo(json.dumps({"cases": [r.as_json() for r in results], **counts}, indent=2))
    else:
        click.echo(_text(results, counts))
    raise SystemExit(1 if counts[runner.FAILED] else 0)


def _mutants(cases: list[Case], as_json: bool) -> NoReturn:
    found = [(mutant, mutant.caught_by(cases)) for mutant in MUTANTS]
    if as_json:
        shown = [{"name": m.name, "defect": m.defect, "caught_by": caught} for m, caught in found]
        click.echo(json.dumps({"mutants": shown}, indent=2))
    else:
        for mutant, caught in found:
            more = f" and {len(caught) - 3} more" if len(caught) > 3 else ""
            by = ", ".join(caught[:3]) + more if caught else "nothing"
            click.echo(f"{mutant.name}: {mutant.defect}\n  caught by {by}")
        click.echo(f"{sum(bool(caught) for _, caught in found)} of {len(found)} mutants caught")
    raise SystemExit(0 if all(caught for _, caught in found) else 1)


def _listed(cases: list[Case], as_json: bool) -> str:
    if as_json:
        return json.dumps([{"id": c.id, "suite": c.suite, "section": c.section} for c in cases], indent=2)
    return "\n".join(f"{c.id:<48} {c.suite:<24} {c.section}".rstrip() for c in cases)


def _text(results: list[Result], counts: dict[str, int]) -> str:
    lines = []
    for r in results:
        size = f"{len(r.calls)} calls, {len(r.checks)} checks" if r.calls else r.why
        lines.append(f"{r.case.id:<48} {r.status:<15} {size}")
        if r.status == runner.FAILED:
            lines.append(f"  {r.why}")
            lines += [f"  {made.caller:#06x} {made.frame!r} -> {made.answer!r}" for made in r.calls[-1:]]
    lines.append(", ".join(f"{n} {status.replace('_', ' ')}" for status, n in counts.items()))
    return "\n".join(lines)
