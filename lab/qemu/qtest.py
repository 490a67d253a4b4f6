"""Runs QEMU's own device tests for vhost-user-tee, and those whose emulated backend our patch touches."""

from __future__ import annotations

import os
import subprocess

from lab.cache import LabError, say, scratch
from lab.qemu.build import QemuBuild
from lab.run import tail

OURS = "/vhost-user-tee"
TOUCHED = ("/vhost-user/", "vhost-user-gpio-tests/")
TIMEOUT = 120


def qtest_names(qemu: QemuBuild) -> list[str]:
    listed = _run(qemu, ["-l"])[1]
    names = [line.strip() for line in listed.splitlines() if line.startswith("/")]
    return [n for n in names if OURS in n] + [n for n in names if OURS not in n and any(t in n for t in TOUCHED)]


def run_qtests(qemu: QemuBuild) -> int:
    """The number of tests, all of which passed."""
    names = qtest_names(qemu)
    if not any(OURS in name for name in names):
        raise LabError("the built qos-test has no test for vhost-user-tee")
    for name in names:
        status, said = _run(qemu, ["-p", name])
        short = "/".join(name.split("/")[-5:])
        if status or f"ok 1 {name}" not in said:
            raise LabError(f"qtest {name} ended with {status}:\n{tail(said)}")
        say(f"ok {short}")
    return len(names)


def _run(qemu: QemuBuild, argv: list[str]) -> tuple[int, str]:
    with scratch("qtest") as folder:
        done = subprocess.run(
            [str(qemu.qos_test), *argv],
            cwd=folder,
            env={**os.environ, "QTEST_QEMU_BINARY": str(qemu.binary)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=TIMEOUT,
        )
    return done.returncode, done.stdout
