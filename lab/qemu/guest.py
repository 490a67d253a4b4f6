"""A real guest under the lab's QEMU, driven from the host.

Use it as `with Guest(GuestConfig(sockets=["/run/tee.sock"])) as guest: print(guest.run(["uname", "-r"]).stdout)`.
"""

from __future__ import annotations

import atexit
import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from lab.agent import AgentClient
from lab.cache import say
from lab.driven import DrivenGuest, GuestError, GuestProcess
from lab.qemu.build import QemuBuild, ensure_qemu
from lab.qemu.command import GuestConfig, command_line
from lab.qemu.image import GuestImage, ensure_image
from lab.qemu.qmp import Qmp, QmpError
from lab.run import connect, tail

PORT_NAME = "virtio-tee.agent"
T = TypeVar("T")

__all__ = ["Guest", "GuestConfig", "GuestError", "GuestProcess"]


class Guest(DrivenGuest):
    """Boots on entry, ends QEMU on exit; QEMU is ended by its own process id only."""

    def __init__(
        self,
        config: GuestConfig | None = None,
        *,
        image: GuestImage | None = None,
        qemu: QemuBuild | None = None,
    ) -> None:
        super().__init__()
        self.config = config or GuestConfig()
        self.image = image
        self.qemu = qemu
        self.boot_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._qmp: Qmp | None = None
        self._folder = Path()
        self._console_kept = ""
        self._stderr_kept = ""

    # -- life -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Boot, and return when the agent answers."""
        qemu = self.qemu or ensure_qemu(self.config.arch.target)
        image = self.image or ensure_image(arch=self.config.arch)
        # not in $TMPDIR, which may be too long for a unix socket's path
        self._folder = Path(tempfile.mkdtemp(prefix="vtee-", dir="/tmp"))
        atexit.register(self.close)
        try:
            self._start(qemu, image)
        except BaseException:
            self.close()
            raise

    def _start(self, qemu: QemuBuild, image: GuestImage) -> None:
        began = time.monotonic()
        initrd = self._folder / "initrd"
        with initrd.open("wb") as out:
            for part in image.initrds:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
        argv = [*command_line(self.config, qemu, image.kernel, initrd), *self._lines()]
        with (self._folder / "stderr").open("wb") as errors:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)
        self._qmp = self._connect(lambda: Qmp(self._folder / "qmp"), "its monitor")
        self._agent = self._connect(lambda: AgentClient(connect(self._folder / "agent")), "the agent's port")
        self._wait_ready(None)
        self.boot_seconds = time.monotonic() - began

    def _lines(self) -> list[str]:
        """Arguments for all that leads from the guest to here."""
        return [
            *("-serial", f"file:{self._folder / 'console'}"),
            *("-qmp", f"unix:{self._folder / 'qmp'},server=on,wait=off"),
            *("-device", "virtio-serial-pci,id=ports"),
            *("-chardev", f"socket,id=agent,path={self._folder / 'agent'},server=on,wait=off"),
            *("-device", f"virtserialport,bus=ports.0,chardev=agent,name={PORT_NAME}"),
        ]

    def _connect(self, make: Callable[[], T], what: str) -> T:
        end = time.monotonic() + self.config.boot_timeout
        while True:
            try:
                return make()
            except (OSError, QmpError) as error:
                if self._process is None or self._process.poll() is not None:
                    raise self._failed(f"QEMU ended before {what} could be reached") from error
                if time.monotonic() > end:
                    raise self._failed(f"QEMU does not offer {what}: {error}") from error
                time.sleep(0.02)

    def _wait_ready(self, not_boot: str | None) -> None:
        assert self._agent is not None
        end = time.monotonic() + self.config.boot_timeout
        while not self._agent.wait_ready(not_boot, 0.5):
            if not self.is_running:
                raise self._failed("QEMU ended while the guest was booting")
            if "Kernel panic" in self.console:
                raise self._failed("the guest's kernel panicked")
            if time.monotonic() > end:
                raise self._failed(f"the guest's agent did not come up within {self.config.boot_timeout:g} s")

    def close(self) -> None:
        """End QEMU and remove the temporary files. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            if self._qmp is not None and process.poll() is None:
                with contextlib.suppress(QmpError):
                    self._qmp.execute("quit")
            _end(process)
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        if self._folder != Path():
            self._console_kept, self._stderr_kept = self.console, self.stderr
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = Path()
        atexit.unregister(self.close)

    # -- what is there to see ---------------------------------------------------------------------------

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def console(self) -> str:
        """What the guest's kernel and /init have printed."""
        if self._folder == Path():
            return self._console_kept
        path = self._folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    @property
    def stderr(self) -> str:
        """What QEMU itself has printed."""
        if self._folder == Path():
            return self._stderr_kept
        path = self._folder / "stderr"
        return path.read_text(errors="replace") if path.exists() else ""

    def _failed(self, message: str) -> GuestError:
        return GuestError(
            f"{message}\n--- the end of the guest's console:\n{tail(self.console)}\n--- QEMU said:\n{tail(self.stderr)}"
        )

    # -- the machine ------------------------------------------------------------------------------------

    def qmp(self, command: str, **arguments: object) -> object:
        """Any command of QEMU's monitor; `_` in argument names stands for `-`."""
        if self._qmp is None:
            raise GuestError("the guest is not running")
        try:
            return self._qmp.execute(command, **arguments)
        except QmpError as error:
            raise self._failed(str(error)) from error

    def reset(self, *, wait: bool = True) -> None:
        """Press the reset button; returns when the agent of the next boot answers, unless `wait` is false."""
        assert self._agent is not None
        before = self._agent.boot
        self.qmp("system_reset")
        if wait:
            self._wait_ready(before)

    def wait_rebooted(self, not_boot: str) -> None:
        """Until the agent of a boot other than this one (see `boot_id`) answers."""
        self._wait_ready(not_boot)

    @property
    def boot_id(self) -> str:
        if self._agent is None or self._agent.boot is None:
            raise GuestError("the guest is not running")
        return self._agent.boot

    def wait_ended(self, timeout: float = 60) -> None:
        """Until the guest has powered its machine off, which ends QEMU. Raises GuestError."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            raise self._failed(f"the guest still runs after {timeout:g} s") from error
        if code:
            raise self._failed(f"QEMU ended with {code}")

    def pause(self) -> None:
        """Stop the virtual CPUs: QEMU stops the virtqueues, too."""
        self.qmp("stop")

    def resume(self) -> None:
        self.qmp("cont")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for it to go by itself, then help."""
    for signal_number in (None, signal.SIGTERM, signal.SIGKILL):
        if signal_number is not None:
            process.send_signal(signal_number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
            return


def boot_for_person(config: GuestConfig, image: GuestImage, more: Sequence[str] = ()) -> int:
    """A guest whose console is this terminal. `more`: arguments for QEMU that come after that."""
    qemu = ensure_qemu(config.arch.target)
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        initrd = Path(name) / "initrd"
        initrd.write_bytes(b"".join(part.read_bytes() for part in image.initrds))
        config.append += " lab.shell"
        argv = [*command_line(config, qemu, image.kernel, initrd), "-serial", "mon:stdio", *more]
        say("the guest starts; in it, `virtio-tee guest --help`; Ctrl-A X ends it, Ctrl-A C is QEMU's monitor")
        return subprocess.run(argv).returncode
