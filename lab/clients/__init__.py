"""Client applications in C on Debian's libteec, which a guest runs beside Debian's tee-supplicant.

libteec and tee-supplicant are binaries of Debian's arm64 packages, unchanged: there are none for other architectures.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt
from lab.arch import AARCH64, Arch
from lab.cache import build_once, digest, say
from lab.run import output

SUITE, ARCH = "trixie", AARCH64
RUNTIME = ("libteec2", "tee-supplicant")  # they need nothing of their C library that bookworm's has not
DEVELOPMENT = ("optee-client-dev",)
SOURCES = Path(__file__).parent
PROGRAMS = ("api", "examples")
COMPILE = (f"{ARCH.triplet}-gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-pthread")


@dataclass(frozen=True)
class Clients:
    examples: Path  # a subcommand for each example TA
    api: Path  # each function of the client API, with the TA for tests
    packages: Path  # the root folder of RUNTIME

    def in_guest(self) -> list[tuple[str, Path]]:
        """Path in the guest, file here: Debian's at their own places, ours on the PATH."""
        theirs = [path for path in sorted(self.packages.rglob("*")) if path.is_file() and "share" not in path.parts]
        ours = [(f"usr/local/bin/tee-{path.name}", path) for path in (self.examples, self.api)]
        return [*((str(path.relative_to(self.packages)), path) for path in theirs), *ours]


def for_guest(arch: Arch) -> list[tuple[str, Path]]:
    """Path in a guest, file here, of all of it; nothing for an architecture that Debian has it not for."""
    return ensure_clients().in_guest() if arch == ARCH else []


def ensure_clients() -> Clients:
    """From the cache, or compiled (seconds). Raises LabError."""
    hostdeps.require("lab")
    apt = Apt(SUITE, ARCH.debian)
    packages, development = apt.tree(RUNTIME), apt.tree((*RUNTIME, *DEVELOPMENT))
    library = development / "usr" / "lib" / ARCH.triplet
    texts = [path.read_bytes() for path in sorted(SOURCES.glob("*.[ch]"))]

    def make(new: Path) -> None:
        say("compiling the client applications")
        for name in PROGRAMS:
            source = ("-o", new / name, SOURCES / f"{name}.c")
            output([*COMPILE, f"-I{development / 'usr' / 'include'}", *source, f"-L{library}", "-lteec"])

    folder = build_once("clients", digest(*COMPILE, development.name, *texts), make)
    return Clients(folder / "examples", folder / "api", packages)
