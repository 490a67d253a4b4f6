"""OP-TEE's own tee-supplicant, the binary of Debian's arm64 package as it is: `ensure_tee_supplicant()`.

QEMU's user mode runs it on this machine. As there is no `/dev/teepriv0` here, a library of ours is preloaded that turns
the device's ioctls into packets on a socket (`teepriv.c`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt
from lab.cache import build_once, digest, say
from lab.run import output

SUITE, ARCH = "trixie", "arm64"
PACKAGES = ("libc6", "libgcc-s1", "libteec2", "tee-supplicant")
SHIM = Path(__file__).with_name("teepriv.c")
COMPILE = ("aarch64-linux-gnu-gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC")


@dataclass(frozen=True)
class TeeSupplicant:
    root: Path  # an arm64 system of PACKAGES
    shim: Path

    @property
    def command(self) -> list[str | Path]:
        """What runs it, up to its own arguments. Files that `root` has are taken from there, all others from here."""
        emulator: list[str | Path] = ["qemu-aarch64", "-L", self.root, "-E", f"LD_PRELOAD={self.shim}"]
        return [*emulator, self.root / "usr" / "sbin" / "tee-supplicant"]


def ensure_tee_supplicant() -> TeeSupplicant:
    """From the cache, or downloaded (3 MB). Raises LabError, also where the host lacks QEMU's user mode."""
    hostdeps.require("lab")
    root = Apt(SUITE, ARCH).tree(PACKAGES)

    def make(new: Path) -> None:
        say("compiling tee-supplicant's device")
        output([*COMPILE, "-o", new / "teepriv.so", SHIM, "-ldl"])

    return TeeSupplicant(root, build_once("teepriv", digest(*COMPILE, SHIM.read_bytes()), make) / "teepriv.so")
