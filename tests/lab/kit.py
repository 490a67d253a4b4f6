"""What the lab tests share: a backend process, and what a guest is furnished with."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from lab.driven import DrivenGuest
from lab.run import connect
from lab.tas import TA_FOLDER
from tee import package
from tee.soft.examples import UUIDS, source

SCRIPTS = Path(__file__).parent / "guest"
READY_S = 20
ACCESS_PLATFORM = """\
import sys
from pyvhost import backend
from pyvhost.messages import Feature
backend.RING_FEATURES |= Feature.ACCESS_PLATFORM
from virtio_tee.__main__ import main
sys.exit(main())
"""
SPLIT_ONLY = """\
import sys
from pyvhost import backend
from pyvhost.messages import Feature
backend.RING_FEATURES &= ~Feature.RING_PACKED
from pyvhost.examples.{name} import main
sys.exit(main())
"""


class Backend:
    """A `virtio-tee serve` process with a vendor's key of its own; ``options`` are more of its command line. With
    ``platform`` it offers VIRTIO_F_ACCESS_PLATFORM, which changes nothing for it where there is no IOMMU."""

    def __init__(self, folder: Path, *options: str, platform: bool = False) -> None:
        self._program = ["-c", ACCESS_PLATFORM] if platform else ["-m", "virtio_tee"]
        self.folder = folder
        self.options = options
        self.socket = folder / "tee.sock"
        self.trace_file = folder / "trace.json"
        self.vendor = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
        (folder / "vendor.pem").write_bytes(self.vendor.public)
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, *self._program, "serve", "--vm", "lab"),
                *("--socket-path", str(self.socket), "--trace", str(self.trace_file)),
                *("--ta-key", str(self.folder / "vendor.pem"), *self.options),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert self.process.stderr is not None
        assert "ready" in self.process.stderr.readline()

    def stop(self, number: int = signal.SIGTERM) -> int:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.communicate(timeout=READY_S)
        return self.process.returncode

    def end(self) -> None:
        """Stop it, if it runs."""
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def trace(self) -> list[dict[str, Any]]:
        lines = (line.strip().rstrip(",") for line in self.trace_file.read_text().splitlines())
        return [json.loads(line) for line in lines if line.startswith("{")]

    def ended(self, name: str) -> list[dict[str, Any]]:
        """Requests or RPCs of this name that have ended."""
        return [event for event in self.trace() if event["name"] == name and event["ph"] == "e"]

    def wait_for(self, name: str, count: int, timeout: float = 30, phase: str = "i") -> list[dict[str, Any]]:
        """Events of this name, once there are ``count``; ``phase``: "i" marks, "b" begun, "e" ended."""
        end = time.monotonic() + timeout
        while True:
            found = [event for event in self.trace() if event["name"] == name and event["ph"] == phase]
            if len(found) >= count:
                return found
            assert time.monotonic() < end, f"{len(found)} of {count} {name!r} in the trace"
            time.sleep(0.05)

    def objects(self) -> dict[str, float]:
        """What the guest has now at the device, by kind; with the option ``--metrics unix:FOLDER/metrics``."""
        with connect(self.folder / "metrics") as asking:
            asking.settimeout(READY_S)
            asking.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            text = b"".join(iter(lambda: asking.recv(1 << 16), b"")).decode()
        found = re.findall(r'^virtio_tee_objects\{kind="(\w+)",vm="lab"\} (\S+)$', text, re.MULTILINE)
        assert found, text
        return {kind: float(number) for kind, number in found}

    def package(self, name: str) -> bytes:
        """A signed example TA."""
        return package.sign(source(name), UUIDS[name], 1, self.vendor.private)


class Example:
    """A module that serves a device, and can be killed and started again; without ``packed``, one of pyvhost.examples
    with split rings only."""

    def __init__(self, folder: Path, module: str, *options: str, queue: str = "auto", packed: bool = True) -> None:
        name = module.rpartition(".")[2]
        self.socket = folder / f"{name}.sock"
        self.log = folder / f"{name}.log"
        program = ["-m", module] if packed else ["-c", SPLIT_ONLY.format(name=name)]
        self._argv = [sys.executable, *program, "--socket-path", str(self.socket), *options]
        self._env = {**os.environ, "PYVHOST_QUEUE": queue}
        self._said = 0  # bytes of the log, by its last life
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *, wait: bool = True) -> None:
        self._said = self.log.stat().st_size if self.log.exists() else 0
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._argv, stderr=log, env=self._env)
        if wait:
            self.wait()

    def wait(self) -> None:
        """Until it serves."""
        assert self.process is not None
        end = time.monotonic() + 20
        while b"ready" not in self.log.read_bytes()[self._said :]:
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < end, "the example does not start"
            time.sleep(0.01)

    def kill(self) -> None:
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(timeout=10)


def furnish(guest: DrivenGuest, backend: Backend) -> None:
    """Put the TAs into the guest's folder, and our scripts beside; a reset takes all of it away."""
    put_tas(guest, backend)
    for script in SCRIPTS.glob("*.py"):
        guest.put(f"/root/{script.name}", script.read_bytes())


def put_tas(guest: DrivenGuest, backend: Backend) -> None:
    """The TAs alone."""
    for name, uuid in UUIDS.items():
        guest.put(f"{TA_FOLDER}/{uuid}.ta", backend.package(name))
