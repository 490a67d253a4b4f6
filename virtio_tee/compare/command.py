"""``virtio-tee compare``."""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from fnmatch import fnmatch
from pathlib import Path

import click

from pyvhost.errors import PyvhostError
from tee.results import TeeError
from virtio_tee.compare.paths import PATHS
from virtio_tee.compare.report import as_json, show
from virtio_tee.compare.run import Runner
from virtio_tee.compare.site import Kit
from virtio_tee.compare.workloads import WORKLOADS

BUSY = 0.7
"""A load average that something else makes."""
NAMES = list(dict.fromkeys(path.name for path in PATHS))


@click.command()
@click.option("--json", "as_text", is_flag=True, help="One JSON object on stdout instead of tables.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    metavar="FILE",
    help="Write a page with plots and sequence diagrams here; it needs nothing but itself.",
)
@click.option("--path", "names", multiple=True, type=click.Choice(NAMES), help="Only this path; may be given again.")
@click.option("--bounce", is_flag=True, help="Of virtio, only the variant in which the TEE is given copies.")
@click.option(
    "--workload",
    "globs",
    multiple=True,
    metavar="GLOB",
    help=f"Only workloads whose name matches; may be given again. Names: {', '.join(w.name for w in WORKLOADS)}.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(0, 60),
    default=0.2,
    show_default=True,
    help="How long each workload is timed on each path; 0: count only.",
)
def compare(
    as_text: bool, html: Path | None, names: tuple[str, ...], bounce: bool, globs: tuple[str, ...], seconds: float
) -> None:
    """Do the same work over each path to a TEE, and say what it takes, what it costs, and who can read what.

    The paths: direct, virtio (zero-copy and bounce), and FF-A, with the software TEE behind each. Messages, copies,
    switches and shared pages are counted where they happen; who can read what is found out by looking for the
    client's bytes in all that each party has. Timing follows, without counting: nothing else should run meanwhile.
    Takes less than a minute. docs/compare.md explains how to read the figures, and what they do not show.

    Exit status 1: the TA's answers differ between paths, or a path did not do its work.
    """
    began = time.monotonic()
    paths = [p for p in PATHS if (not names or p.name in names) and not (bounce and p.mode == "zero-copy")]
    workloads = [w for w in WORKLOADS if not globs or any(fnmatch(w.name, glob) for glob in globs)]
    if not workloads:
        raise click.UsageError("no workload matches: --help names them")
    if html is not None and not (html.absolute().parent.is_dir() and os.access(html.absolute().parent, os.W_OK)):
        raise click.UsageError(f"--html {html}: there is no such folder, or nothing can be written to it")
    if seconds and os.getloadavg()[0] > BUSY:
        _say(f"this machine is busy (load {os.getloadavg()[0]:.1f}): the times will say little, the counts all")
    try:
        with tempfile.TemporaryDirectory(prefix="vtee-") as folder:
            results = Runner(workloads, paths, Kit.new(Path(folder)), seconds, _say).run()
    except (TeeError, PyvhostError, OSError, RuntimeError) as e:
        raise click.ClickException(f"a path did not do its work: {e}") from None
    report = as_json(workloads, paths, results, time.monotonic() - began)
    if html is not None:
        from virtio_tee.compare.page import page

        try:
            html.write_text(page(report), encoding="utf-8")
        except OSError as e:
            raise click.ClickException(f"--html {html}: {e}") from None
        _say(f"wrote {html}")
    if as_text:
        click.echo(json.dumps(report))
    else:
        show(report)
    if not report["same_answers"]:
        _say("the TA's answers differ between paths: see `answer` in --json")
        sys.exit(1)


def _say(text: str) -> None:
    click.echo(text, err=True)
