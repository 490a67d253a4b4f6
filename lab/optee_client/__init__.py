"""OP-TEE's own tee-supplicant, unmodified, built for this machine: `ensure_tee_supplicant()`.

The source is Debian's package, or the checkout of optee_client that `VIRTIO_TEE_OPTEE_CLIENT` names. As there is no
`/dev/teepriv0` here, a library of ours is preloaded that turns the device's ioctls into packets on a socket
(`teepriv.c`).
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt
from lab.cache import LabError, build_once, digest, say, scratch
from lab.run import output

SUITE = "trixie"
VARIABLE = "VIRTIO_TEE_OPTEE_CLIENT"
SHIM = Path(__file__).with_name("teepriv.c")
PARTS = ("tee-supplicant/src", "libteec/include", "libteec/src")
TRACE = "libteec/src/teec_trace.c"
# As tee-supplicant/Makefile has them, with everything on; paths that a command line has to replace
DEFINES = (
    "_GNU_SOURCE",
    "DEBUGLEVEL_1",
    'BINARY_PREFIX="TEES"',
    'TEE_FS_PARENT_PATH="/nowhere/tee"',
    'TEEC_LOAD_PATH="/nowhere/lib"',
    'TEE_PLUGIN_LOAD_PATH="/nowhere/plugins/"',
    "CFG_FTRACE_SUPPORT",
    "CFG_GP_SOCKETS=1",
    "CFG_TA_GPROF_SUPPORT",
    "RPMB_EMU=1",
    "TEE_SUPP_PLUGINS",
)
RECIPE = 1


@dataclass(frozen=True)
class TeeSupplicant:
    binary: Path
    shim: Path
    version: str


def ensure_tee_supplicant() -> TeeSupplicant:
    """From the cache, or built now (seconds). Raises LabError, also where the archive has no source of it."""
    chosen = os.environ.get(VARIABLE)
    version, files = ("checkout", _checkout(Path(chosen))) if chosen else Apt(SUITE).source("optee-client")
    key = digest(str(RECIPE), SHIM.read_bytes(), *DEFINES, *(part for f in files for part in (f.name, f.read_bytes())))

    def make(new: Path) -> None:
        hostdeps.require("lab")
        say(f"building tee-supplicant ({version})")
        with scratch("optee-client") as tree:
            _unpack(files, Path(chosen) if chosen else None, tree)
            flags = [*(f"-I{tree / part}" for part in PARTS), *(f"-D{define}" for define in DEFINES)]
            sources = [*sorted((tree / PARTS[0]).glob("*.c")), tree / TRACE]
            output(["gcc", "-O1", "-o", new / "tee-supplicant", *flags, *sources, "-lpthread", "-ldl"])
        output(
            ["gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-o", new / "teepriv.so", SHIM, "-ldl"]
        )

    folder = build_once("tee-supplicant", f"{version}-{key}", make)
    return TeeSupplicant(folder / "tee-supplicant", folder / "teepriv.so", version)


def _checkout(folder: Path) -> list[Path]:
    """The files of a checkout that are needed."""
    found = [path for part in PARTS for path in sorted((folder / part).rglob("*.[ch]"))]
    if not (folder / PARTS[0] / "tee_supplicant.c").is_file():
        raise LabError(f"{VARIABLE}={folder} is no checkout of OP-TEE's optee_client: it has no {PARTS[0]}")
    return found


def _unpack(files: list[Path], checkout: Path | None, into: Path) -> None:
    """The source as it was published, without any patch."""
    if checkout is not None:
        for file in files:
            target = into / file.relative_to(checkout)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        return
    tarballs = [f for f in files if ".orig.tar." in f.name]
    if len(tarballs) != 1:
        raise LabError(f"optee-client: expected one .orig tarball among {[f.name for f in files]}")
    output(["tar", "-C", into, "-x", "--strip-components=1", "--no-same-owner", "-f", tarballs[0]])
