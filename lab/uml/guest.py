"""A guest under user-mode-linux: the kernel is a program, needs no root, no KVM and no emulated CPU, and attaches to
vhost-user backends itself.

Use it as `with UmlGuest(UmlConfig(devices=[("/run/tee.sock", 46)])) as guest: print(guest.run(["lsmod"]).stdout)`.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.agent import AgentClient
from lab.cache import LabError, say
from lab.driven import DrivenGuest, GuestError, GuestProcess
from lab.run import tail
from lab.uml.image import UmlImage, ensure_image

__all__ = ["GuestError", "GuestProcess", "UmlConfig", "UmlGuest"]

# A serial line of user-mode-linux 6.1 stops for good when the guest's buffer for it, of 4096 bytes, is nearly full.
LONGEST_REQUEST = 3800
MEMORY_FOLDERS = ("/dev/shm", tempfile.gettempdir())


@dataclass
class UmlConfig:
    """What a guest has; each device is a backend's socket and a virtio device ID."""

    devices: Sequence[tuple[Path | str, int]] = ()
    memory_mib: int = 256
    append: str = ""  # more words for the kernel's command line
    boot_timeout: float = 60


def memory_folder(memory_mib: int) -> str:
    """Where the file that is the guest's memory can lie: it is executed from, and takes up to its whole size.

    :raises LabError: nowhere
    """
    for name in MEMORY_FOLDERS:
        if Path(name).is_dir():
            about = os.statvfs(name)
            if not about.f_flag & os.ST_NOEXEC and about.f_bavail * about.f_frsize >= memory_mib << 20:
                return name
    raise LabError(
        f"user-mode-linux needs {memory_mib} MiB in a folder that is not mounted noexec, and none of"
        f" {', '.join(MEMORY_FOLDERS)} is one: set TMPDIR to such a folder, best on a tmpfs"
    )


def command_line(config: UmlConfig, binary: Path, initrd: Path, folder: Path, console: str) -> list[str]:
    """All but the agent's serial line."""
    return [
        *(str(binary), f"mem={config.memory_mib}M", f"initrd={initrd}", "root=/dev/ram0"),
        *("con=null", f"con0={console}", "console=tty0", "quiet", "panic=-1", f"uml_dir={folder}"),
        *(f"virtio_uml.device={path}:{number}" for path, number in config.devices),
        *config.append.split(),
    ]


class UmlGuest(DrivenGuest):
    """Boots on entry, is killed on exit, by its own process group only."""

    chunk = 2 << 10

    def __init__(self, config: UmlConfig | None = None, *, image: UmlImage | None = None) -> None:
        super().__init__()
        self.config = config or UmlConfig()
        self.image = image
        self.boot_seconds = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()
        self._console_kept = ""

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Boot, and return when the agent answers."""
        image = self.image or ensure_image()
        # not in $TMPDIR, which may be too long for a unix socket's path
        self._folder = Path(tempfile.mkdtemp(prefix="vtee-", dir="/tmp"))
        atexit.register(self.close)
        try:
            self._start(image)
        except BaseException:
            self.close()
            raise

    def _start(self, image: UmlImage) -> None:
        began = time.monotonic()
        initrd = join_initrds(image, self._folder)
        ours, line = socket.socketpair()
        self._agent = AgentClient(ours, LONGEST_REQUEST)
        argv = command_line(self.config, image.binary, initrd, self._folder, "null,fd:1")
        argv += [f"ssl0=fd:{line.fileno()}", "lab.port=/dev/ttyS0"]
        with line, (self._folder / "console").open("wb") as console:
            self._process = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                pass_fds=[line.fileno()],
                env=environment(self.config),
                start_new_session=True,
            )
        end = time.monotonic() + self.config.boot_timeout
        while not self._agent.wait_ready(None, 0.2):
            if not self.is_running:
                raise self._failed("user-mode-linux ended while the guest was booting")
            if time.monotonic() > end:
                raise self._failed(f"the guest's agent did not come up within {self.config.boot_timeout:g} s")
        initrd.unlink()
        self.boot_seconds = time.monotonic() - began

    def close(self) -> None:
        """Kill it and remove the temporary files. May be called again."""
        process, self._process = self._process, None
        if process is not None:
            # the guest's processes are processes of the host, of the same group; the kernel takes SIGTERM for its own
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if self._agent is not None:
            self._agent.close()
            self._agent = None
        if self._folder != Path():
            self._console_kept = self.console
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = Path()
        atexit.unregister(self.close)

    @property
    def is_running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def console(self) -> str:
        """What the kernel and /init have printed."""
        if self._folder == Path():
            return self._console_kept
        path = self._folder / "console"
        return path.read_text(errors="replace") if path.exists() else ""

    def _failed(self, message: str) -> GuestError:
        return GuestError(f"{message}\n--- the end of the guest's console:\n{tail(self.console)}")


def environment(config: UmlConfig) -> dict[str, str]:
    return {**os.environ, "TMPDIR": memory_folder(config.memory_mib)}


def join_initrds(image: UmlImage, folder: Path) -> Path:
    initrd = folder / "initrd"
    with initrd.open("wb") as out:
        for part in image.initrds:
            with part.open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
    return initrd


def boot_for_person(config: UmlConfig, image: UmlImage) -> int:
    """A guest whose console is this terminal."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        config.append += " lab.shell"
        argv = command_line(config, image.binary, join_initrds(image, Path(name)), Path(name), "fd:0,fd:1")
        say("the guest starts; in it, `poweroff -f` ends it")
        return subprocess.run(argv, env=environment(config)).returncode
