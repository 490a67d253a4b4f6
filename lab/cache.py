"""Where the lab keeps what it downloads and builds, so that the second run is short."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_START = time.monotonic()


class LabError(Exception):
    """Something that the reader can act on; shown without a traceback."""


def say(message: str) -> None:
    """One line of progress on stderr."""
    print(f"lab [{time.monotonic() - _START:6.1f} s] {message}", file=sys.stderr, flush=True)


def cache_root() -> Path:
    """The cache folder; made if it is not there."""
    chosen = os.environ.get("VIRTIO_TEE_CACHE")
    if chosen:
        root = Path(chosen)
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
        root = Path(base) / "virtio-tee"
    root = root.absolute()
    root.mkdir(parents=True, exist_ok=True)
    return root


def digest(*parts: str | bytes) -> str:
    """A short key for what a result was made from. Each part counts, and so does where it ends."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        whole.update(len(data).to_bytes(8, "little"))
        whole.update(data)
    return whole.hexdigest()[:16]


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time is in here for this name. Not to be nested for one name."""
    folder = cache_root() / "locks"
    folder.mkdir(exist_ok=True)
    with (folder / name.replace("/", "_")).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another run works on {name}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def scratch(prefix: str) -> Iterator[Path]:
    """A temporary folder on the cache's file system, so that its contents can be renamed into place."""
    folder = cache_root() / "tmp"
    folder.mkdir(exist_ok=True)
    path = Path(tempfile.mkdtemp(prefix=f"{prefix}-", dir=folder))
    path.chmod(0o755)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def build_once(name: str, key: str, make: Callable[[Path], None]) -> Path:
    """The folder `name/key` of the cache. `make` fills an empty folder, which takes that name when it is whole."""
    target = cache_root() / name / key
    if target.is_dir():
        return target
    with locked(f"{name}-{key}"):
        if target.is_dir():
            return target
        with scratch(name.replace("/", "_")) as temporary:
            inside = temporary / "new"
            inside.mkdir()
            make(inside)
            target.parent.mkdir(parents=True, exist_ok=True)
            inside.rename(target)
    return target
