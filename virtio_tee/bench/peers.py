"""The processes of the bench: the C driver, the backends, and the C peer, which is installed or asked for."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import resources
from pathlib import Path
from typing import Any

from virtio_tee.bench.plan import BLOCK, PEER, TEE, Case

DRIVER_CPU, BACKEND_CPU = 0, 1

TOOLS = {"qemu-storage-daemon": ("qemu-system-common",), "gcc": ("gcc", "libc6-dev")}
"""Program → Debian packages that have it."""

READY_S = 20
TIMEOUT_S = 120


class BenchError(Exception):
    """Something that the bench needs is missing or failed."""


def require_tools() -> None:
    """Have the peer and a C compiler installed. Raises BenchError with the command to type."""
    missing = [package for tool, packages in TOOLS.items() if not shutil.which(tool) for package in packages]
    if not missing:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BenchError(f"Debian packages are missing. Type:\n  sudo {' '.join(install)}")
    print(f"bench: installing {' '.join(missing)}", file=sys.stderr, flush=True)
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    for argv in (["apt-get", "update"], install):
        done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
        if done.returncode and argv is install:
            raise BenchError(f"{' '.join(argv)} ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
    for tool, packages in TOOLS.items():
        if not shutil.which(tool):
            raise BenchError(f"{tool} is not there, though {', '.join(packages)} is installed")


def require_cpus() -> None:
    """Driver and backend each need a CPU of their own."""
    if not {DRIVER_CPU, BACKEND_CPU} <= os.sched_getaffinity(0):
        raise BenchError(f"the bench needs CPU {DRIVER_CPU} and CPU {BACKEND_CPU}")


def build_driver(folder: Path) -> Path:
    """Compile ``driver.c``. Raises BenchError."""
    program = folder / "driver"
    with resources.as_file(resources.files("virtio_tee.bench").joinpath("driver.c")) as source:
        argv = ["gcc", "-O2", "-fno-strict-aliasing", "-pthread", "-Wall", "-Werror", "-o", str(program), str(source)]
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchError(f"the driver does not compile:\n{done.stderr}")
    return program


def run_driver(program: Path, *arguments: str) -> dict[str, Any]:
    """One run's figures. Raises BenchError."""
    argv = [str(program), "--cpu", str(DRIVER_CPU), *arguments]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise BenchError(f"{' '.join(argv)} does not end") from None
    if done.returncode:
        raise BenchError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()}")
    figures = json.loads(done.stdout)
    assert isinstance(figures, dict)
    return figures


def queues() -> list[str]:
    """The queue implementations that are there."""
    found: list[str] = []
    code = "import pyvhost.vring as v; print(getattr(v, 'implementation', lambda: 'pure')())"
    for queue in ("pure", "compiled"):
        done = subprocess.run(
            [sys.executable, "-c", code], env=_env(queue), capture_output=True, text=True, check=False
        )
        if done.returncode == 0 and done.stdout.strip() == queue:
            found.append(queue)
    return found


def _env(queue: str | None) -> dict[str, str]:
    return {**os.environ, **({"PYVHOST_QUEUE": queue} if queue else {})}


class Process:
    """A process on the backends' CPU, ended by its id."""

    def __init__(self, argv: Sequence[str], queue: str | None = None, **pipes: Any) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            ["taskset", "-c", str(BACKEND_CPU), *argv],
            env=_env(queue),
            stdin=pipes.get("stdin", subprocess.DEVNULL),
            stdout=pipes.get("stdout", subprocess.DEVNULL),
            stderr=pipes.get("stderr"),
            text=True,
        )

    def end(self) -> None:
        """Ask it to end, and wait."""
        self.process.terminate()
        try:
            self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class Backend(Process):
    """A vhost-user backend: the peer, our null block, or our TEE device; ``counted``: one of ours, by
    ``virtio_tee.bench.counted``."""

    def __init__(self, name: str, queue: str | None, folder: Path, *, counted: bool = False) -> None:
        self.name = name
        self.queue = queue
        stem = f"{name}-{queue}{'-counted' if counted else ''}"
        self.socket = folder / f"{stem}.sock"
        self.log = folder / f"{stem}.log"
        self.counter = folder / f"{stem}.count"
        argv = _command(name, self.socket)
        if counted:
            self.counter.write_bytes(bytes(8))
            python, _, *module = argv
            argv = [python, "-m", "virtio_tee.bench.counted", str(self.counter), *module]
        with self.log.open("w") as log:
            super().__init__(argv, queue, stderr=log)
        while not self.socket.is_socket():
            if self.process.poll() is not None or time.monotonic() > self.started + READY_S:
                self.end()
                raise BenchError(f"{name} did not start: {self.log.read_text().strip()}")
            time.sleep(0.002)
        self.ready_s = time.monotonic() - self.started

    def run(self, program: Path, case: Case, seconds: float) -> dict[str, Any]:
        """One run; ``waited`` is then of both sides: the share of the time in which another process had their CPU."""
        before = self._waited_s()
        try:
            figures = run_driver(program, "--socket", str(self.socket), "--seconds", str(seconds), *case.arguments)
            figures["waited"] += (self._waited_s() - before) / seconds
            return figures
        except BenchError as e:
            state = "has ended" if self.process.poll() is not None else "still runs"
            said = self.log.read_text().strip()[-2000:]
            raise BenchError(f"{e}\n{self.name} ({self.queue or 'C'}) {state}; it said: {said}") from None

    def copied(self, program: Path, case: Case, seconds: float) -> int:
        """Bytes that a counted one copies for each request of a run."""
        before = int.from_bytes(self.counter.read_bytes(), "little")
        requests = int(self.run(program, case, seconds)["all_requests"])
        return round((int.from_bytes(self.counter.read_bytes(), "little") - before) / requests)

    def _waited_s(self) -> float:
        """How long its threads have been ready to run and did not."""
        waited = 0
        for thread in Path(f"/proc/{self.process.pid}/task").glob("*/schedstat"):
            with suppress(OSError):  # it has ended
                waited += int(thread.read_text().split()[1])
        return waited / 1e9

    @property
    def resident_mb(self) -> float:
        """Its memory now."""
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024 / 1e6
        raise BenchError(f"{self.name} has ended")


def _command(name: str, socket: Path) -> list[str]:
    if name == PEER:
        return [
            "qemu-storage-daemon",
            *("--blockdev", "null-co,node-name=null,size=1073741824,read-zeroes=off"),
            "--export",
            f"type=vhost-user-blk,id=export,node-name=null,writable=on,addr.type=unix,addr.path={socket}",
        ]
    if name == BLOCK:
        return [sys.executable, "-m", "pyvhost.examples.null_block", "--socket-path", str(socket)]
    assert name == TEE
    return [sys.executable, "-m", "virtio_tee", "serve", "--built-in-tas", "--socket-path", str(socket)]


class DirectTee(Process):
    """``virtio_tee.bench.direct``."""

    def __init__(self) -> None:
        argv = [sys.executable, "-m", "virtio_tee.bench.direct"]
        super().__init__(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def measure(self, size: int, command: int, seconds: float) -> float:
        """The median in µs."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(size, command, seconds, file=self.process.stdin, flush=True)
        line = self.process.stdout.readline()
        if not line:
            raise BenchError("the software TEE could not be measured directly")
        return float(line)
