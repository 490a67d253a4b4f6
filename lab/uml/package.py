"""Debian's user-mode-linux, unpacked privately, not installed: `ensure_uml()`."""

from __future__ import annotations

import gzip
import re
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt, unpack_deb
from lab.cache import LabError, build_once, digest, say, scratch
from lab.run import output
from lab.uml.exports import symvers

SUITE = "bookworm"
RECIPE = 2


@dataclass(frozen=True)
class Uml:
    """The kernel as a program, and what modules for it are built from."""

    root: Path

    @property
    def binary(self) -> Path:
        return self.root / "linux.uml"

    @property
    def modules(self) -> Path:
        """The package's own modules."""
        return self.root / "modules"

    @property
    def config(self) -> Path:
        return self.root / "config"

    @property
    def symvers(self) -> Path:
        """The kernel's Module.symvers: the package has none, so this is made from the program itself."""
        return self.root / "Module.symvers"

    @property
    def release(self) -> str:
        """As `uname -r` says it."""
        return (self.root / "release").read_text()

    @property
    def built_from(self) -> str:
        """The version of Debian's linux source package."""
        return (self.root / "built-from").read_text()


def ensure_uml() -> Uml:
    """From the cache, or downloaded and unpacked now."""
    deb = Apt(SUITE).debs(["user-mode-linux"])["user-mode-linux"]

    def make(new: Path) -> None:
        say(f"unpacking {deb.name}")
        using = output(["dpkg-deb", "-f", deb, "Built-Using"])
        source = re.search(r"\blinux \(= ([^)]+)\)", using)
        if source is None:
            raise LabError(f"{deb.name} does not say which linux it was built from: {using}")
        (new / "built-from").write_text(source[1])
        with scratch("uml") as folder:
            unpack_deb(deb, folder)
            (folder / "usr/bin/linux.uml").rename(new / "linux.uml")
            (modules,) = (folder / "usr/lib/uml/modules").iterdir()
            modules.rename(new / "modules")
            (new / "release").write_text(modules.name)
            (new / "config").write_bytes(
                gzip.decompress((folder / "usr/share/doc/user-mode-linux/config.gz").read_bytes())
            )
        (new / "Module.symvers").write_text("".join(symvers((new / "linux.uml").read_bytes())))

    return Uml(build_once("uml", digest(str(RECIPE), deb.parent.name), make))
