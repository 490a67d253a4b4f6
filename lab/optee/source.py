"""Source packages of Debian, and changes to what is in them that fail loudly where the text is another one."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt
from lab.cache import LabError, scratch
from lab.run import output


@dataclass(frozen=True)
class Edit:
    path: str
    before: str
    after: str
    times: int = 1  # how often `before` is there

    @property
    def key(self) -> str:
        return repr(self)


def edited(data: bytes, edit: Edit, name: object) -> bytes:
    """The data after the edit.

    :raises LabError: it is not what the edit was made for
    """
    before = edit.before.encode()
    if (found := data.count(before)) != edit.times:
        raise LabError(f"{name}: {edit.before!r} is there {found} times, not {edit.times}: look at what has changed")
    return data.replace(before, edit.after.encode())


def edit_files(tree: Path, edits: Sequence[Edit]) -> None:
    """Change files below `tree` in place. Raises LabError."""
    for edit in edits:
        path = tree / edit.path
        if not path.is_file():
            raise LabError(f"{path} is not there: look at what has changed")
        path.write_bytes(edited(path.read_bytes(), edit, path))


@dataclass(frozen=True)
class Source:
    """A source package."""

    name: str
    version: str
    files: tuple[Path, ...]

    @property
    def key(self) -> str:
        return " ".join(path.parent.name for path in self.files)

    def unpack(self, into: Path) -> None:
        """With Debian's patches applied; `into` is made."""
        with scratch("source") as folder:
            for path in self.files:
                shutil.copy(path, folder)
            (control,) = folder.glob("*.dsc")
            output(["dpkg-source", "--no-check", "-x", control, into])


def debian_source(suite: str, name: str) -> Source:
    """Downloaded, or from the cache. Raises LabError."""
    version, files = Apt(suite, "arm64").source(name)
    return Source(name, version, tuple(files))
