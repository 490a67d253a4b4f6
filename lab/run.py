"""Running a tool of the host, with an error that shows what it said."""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lab.cache import LabError

TAIL = 25


def tail(text: str, lines: int = TAIL) -> str:
    return "\n".join(text.rstrip().splitlines()[-lines:])


def output(argv: Sequence[str | Path], *, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """The standard output of a command that must succeed."""
    try:
        done = subprocess.run(
            [str(a) for a in argv],
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
    except FileNotFoundError as error:
        raise LabError(f"{argv[0]}: not found ({error})") from error
    if done.returncode:
        said = tail(done.stderr + done.stdout)
        raise LabError(f"{' '.join(str(a) for a in argv)}\nended with {done.returncode}:\n{said}")
    return done.stdout


def logged(
    argv: Sequence[str | Path],
    log: Path,
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    each_line: Callable[[str], None] | None = None,
) -> None:
    """Run a long command: everything it says goes to `log`, and line by line to `each_line`."""
    with log.open("a") as file:
        process = subprocess.Popen(
            [str(a) for a in argv],
            cwd=cwd,
            env=None if env is None else dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        try:
            assert process.stdout is not None
            with process.stdout:
                for line in process.stdout:
                    file.write(line)
                    if each_line:
                        each_line(line)
            process.wait()
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    if process.returncode:
        raise LabError(f"{argv[0]} ended with {process.returncode}; the end of what it said:\n{tail(log.read_text())}")


def connect(path: Path) -> socket.socket:
    """Connect to a unix socket. OSError where nobody listens; nothing stays open then."""
    made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        made.connect(str(path))
    except OSError:
        made.close()
        raise
    return made
