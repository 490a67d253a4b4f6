"""A ``virtio-tee serve`` that is measured from outside: when it answers, and what the kernel says of its process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from pyvhost.messages import HEADER, FrontendRequest
from virtio_tee.bench.peers import BenchError

READY_S = 20.0
_LOOK_S = 0.001
_VERSION = 1


@dataclass(frozen=True, slots=True)
class Holdings:
    """What a process has. Memory in KiB."""

    rss_kib: int
    fds: int
    threads: int
    mappings: int


class Served:
    """A backend for ``guests`` guests, on the CPU ``cpu``. ``ready_s``: seconds from its start to its first answer.

    Raises BenchError if it does not come that far.
    """

    def __init__(self, folder: Path, name: str, *options: str, guests: int = 1, cpu: int | None = None) -> None:
        self.sockets = [str(folder / f"{name}-{number}") for number in range(guests)]
        self._log = folder / f"{name}.log"
        places = [word for path in self.sockets for word in ("--socket-path", path)]
        started = time.monotonic()
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "virtio_tee", "serve", *places, *options],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        if cpu is not None:
            os.sched_setaffinity(self.process.pid, {cpu})
        try:
            while not _answers(self.sockets[0]):
                if self.process.poll() is not None or time.monotonic() > started + READY_S:
                    raise BenchError(f"serve did not start: {self.said}")
                time.sleep(_LOOK_S)
        except BaseException:
            self.end()
            raise
        self.ready_s = time.monotonic() - started

    @property
    def said(self) -> str:
        """The end of its log."""
        return self._log.read_text().strip()[-2000:]

    @property
    def cpu_s(self) -> float:
        """The CPU time of all its threads so far."""
        return time.clock_gettime(~self.process.pid << 3 | 2)  # the process's clock, as clock_getcpuclockid(3) makes it

    @property
    def holdings(self) -> Holdings:
        """What it has now. Raises BenchError if it has ended."""
        proc = Path("/proc", str(self.process.pid))
        try:
            status = dict(line.split(":", 1) for line in (proc / "status").read_text().splitlines())
            return Holdings(
                int(status["VmRSS"].split()[0]),
                len(os.listdir(proc / "fd")),
                int(status["Threads"]),
                len((proc / "maps").read_text().splitlines()),
            )
        except (OSError, KeyError):
            raise BenchError(f"serve has ended: {self.said}") from None

    def end(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _answers(path: str) -> bool:
    """Whether a backend at ``path`` answers its first question."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as frontend, suppress(OSError):
        frontend.settimeout(READY_S)
        frontend.connect(path)
        frontend.sendall(HEADER.pack(request=FrontendRequest.GET_FEATURES, flags=_VERSION, size=0))
        return len(frontend.recv(HEADER.size)) == HEADER.size
    return False
