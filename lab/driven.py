"""What the host can do in a guest in which the lab's agent runs (`lab/guest/agent.py`), whatever runs the guest."""

from __future__ import annotations

import base64
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence

from lab.agent import AgentClient, AgentError
from lab.run import tail

POLL = 0.03  # s between two looks at a command that runs
GRACE = 10.0  # what the agent may take beyond a command's own time limit


class GuestError(Exception):
    """The guest, or a command in it, failed; shows the command's output and the ends of both logs."""


def _text(data: object) -> str:
    return base64.b64decode(str(data)).decode(errors="replace")


class GuestProcess:
    """A command that runs in the guest while the host does other things."""

    def __init__(self, guest: DrivenGuest, pid: int, argv: Sequence[str]) -> None:
        self.guest = guest
        self.pid = pid
        self.argv = list(argv)
        self.returncode: int | None = None
        self.stdout = ""
        self.stderr = ""

    def poll(self) -> int | None:
        """The exit code, or None while it runs; also fetches what it has written so far."""
        answer = self.guest.call("poll", pid=self.pid)
        self.stdout, self.stderr = _text(answer["stdout"]), _text(answer["stderr"])
        code = answer["returncode"]
        self.returncode = None if code is None else int(str(code))
        return self.returncode

    def wait(self, timeout: float = 60) -> int:
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                raise GuestError(f"{' '.join(self.argv)} still runs after {timeout:g} s\n{self._said()}")
            time.sleep(POLL)
        return code

    def wait_for(self, text: str, timeout: float = 60) -> None:
        """Until it has written this text to either output."""
        end = time.monotonic() + timeout
        while True:
            ended = self.poll() is not None
            if text in self.stdout or text in self.stderr:
                return
            if ended or time.monotonic() > end:
                raise GuestError(f"{' '.join(self.argv)} did not say {text!r}\n{self._said()}")
            time.sleep(POLL)

    def kill(self, signal_number: int = signal.SIGKILL) -> None:
        """Signal it and what it started."""
        self.guest.call("kill", pid=self.pid, signal=int(signal_number))

    def _said(self) -> str:
        return f"stdout:\n{tail(self.stdout)}\nstderr:\n{tail(self.stderr)}"


class DrivenGuest(ABC):
    """Commands and files; who boots the guest sets `_agent`."""

    chunk = 256 * 1024  # bytes of a file that go to or from the guest at a time

    def __init__(self) -> None:
        self._agent: AgentClient | None = None

    @abstractmethod
    def _failed(self, message: str) -> GuestError:
        """An error that shows the ends of the guest's logs, too."""

    def call(self, op: str, *, wait: float = 60, **arguments: object) -> dict[str, object]:
        """One request to the agent, as it is."""
        if self._agent is None:
            raise GuestError("the guest is not running")
        try:
            return self._agent.call(op, wait, **arguments)
        except AgentError as error:
            raise self._failed(str(error)) from error

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout: float = 60,
        check: bool = True,
        env: Mapping[str, str] | None = None,
        stdin: bytes = b"",
        cwd: str = "/root",
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end. With `check`, any exit code but 0 is an error that shows what it said."""
        answer = self.call(
            "run",
            wait=timeout + GRACE,
            timeout=timeout,
            argv=list(argv),
            env=dict(env or {}),
            stdin=base64.b64encode(stdin).decode(),
            cwd=cwd,
        )
        done = subprocess.CompletedProcess(
            list(argv), int(str(answer["returncode"])), _text(answer["stdout"]), _text(answer["stderr"])
        )
        said = f"stdout:\n{tail(done.stdout)}\nstderr:\n{tail(done.stderr)}"
        if answer["timed_out"]:
            raise self._failed(f"in the guest, {' '.join(argv)} did not end within {timeout:g} s\n{said}")
        if check and done.returncode:
            raise self._failed(f"in the guest, {' '.join(argv)} ended with {done.returncode}\n{said}")
        return done

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: str = "/root") -> GuestProcess:
        """Start a command and return at once."""
        answer = self.call("spawn", argv=list(argv), env=dict(env or {}), cwd=cwd)
        return GuestProcess(self, int(str(answer["pid"])), argv)

    def put(self, path: str, data: bytes, mode: int | None = None) -> None:
        """Write a file in the guest; its folder is made."""
        for offset in range(0, max(len(data), 1), self.chunk):
            part = base64.b64encode(data[offset : offset + self.chunk]).decode()
            self.call("put", path=path, data=part, append=offset > 0)
        if mode is not None:
            self.call("put", path=path, data="", append=True, mode=mode)

    def get(self, path: str) -> bytes:
        """Read a file of the guest."""
        data = b""
        while True:
            answer = self.call("get", path=path, offset=len(data), size=self.chunk)
            part = base64.b64decode(str(answer["data"]))
            data += part
            if len(part) < self.chunk:
                return data
