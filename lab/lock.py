"""`packages.lock`: the one file that names the version of everything the lab takes from an archive."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

from lab.cache import cache_root, locked

LOCK_FILE = Path(__file__).with_name("packages.lock")


@dataclass(frozen=True)
class File:
    name: str
    sha256: str
    size: int

    @property
    def stored(self) -> Path:
        """Where this very file is kept once it was downloaded."""
        return cache_root() / "downloads" / self.sha256 / self.name


@dataclass(frozen=True)
class Pin:
    version: str
    files: tuple[File, ...] = ()

    @property
    def is_stored(self) -> bool:
        return bool(self.files) and all(f.stored.is_file() for f in self.files)


class Lock:
    """Sections (`trixie/amd64`, `trixie/source`, `pypi/amd64`, …) of names with their pins."""

    def __init__(self, path: Path = LOCK_FILE) -> None:
        self.path = path

    def _load(self) -> dict[str, dict[str, dict[str, object]]]:
        if not self.path.exists():
            return {}
        loaded: dict[str, dict[str, dict[str, object]]] = json.loads(self.path.read_text())
        return loaded

    def get(self, section: str, name: str) -> Pin | None:
        entry = self._load().get(section, {}).get(name)
        if entry is None:
            return None
        files = entry.get("files", [])
        assert isinstance(files, list)
        return Pin(str(entry["version"]), tuple(File(f["name"], f["sha256"], int(f["size"])) for f in files))

    def put(self, section: str, pins: dict[str, Pin]) -> None:
        """Record these; what the file already says stays as it is, byte for byte, if nothing changes."""
        with locked("packages.lock"):
            content = self._load()
            part = content.setdefault(section, {})
            for name, pin in pins.items():
                entry: dict[str, object] = {"version": pin.version}
                if pin.files:
                    entry["files"] = [{"name": f.name, "sha256": f.sha256, "size": f.size} for f in pin.files]
                part[name] = entry
            text = json.dumps(content, indent=1, sort_keys=True) + "\n"
            if self.path.exists() and self.path.read_text() == text:
                return
            temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}")
            temporary.write_text(text)
            temporary.replace(self.path)
