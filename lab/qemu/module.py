"""Builds our kernel module for the guest's kernel, with Debian's headers of that kernel."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt, unpack_deb
from lab.arch import HOST, Arch
from lab.cache import LabError, build_once, digest, say, scratch
from lab.kernel_driver import SOURCES, WARNINGS
from lab.qemu.image import KERNEL_SUITE, GuestImage
from lab.run import output

RECIPE = 1
KERNEL_SOURCE = "linux-source-6.12"
# The module is built for several kernels, which is nothing that the kernel's own tree would do.
CHECKPATCH = ("--no-tree", "--strict", "--terse", "--ignore", "LINUX_VERSION_CODE,CONSTANT_COMPARISON")


def headers(release: str, arch: Arch) -> Path:
    """The folder to build modules for the kernel `release` in."""
    base = re.sub(rf"(-cloud)?-{arch.debian}$", "", release)
    theirs = Apt(KERNEL_SUITE, arch.debian).debs([f"linux-headers-{release}"])
    tools = Apt(KERNEL_SUITE, HOST.debian).debs([f"linux-headers-{base}-common", f"linux-kbuild-{base}"])  # run here
    debs = [*theirs.values(), *tools.values()]
    key = digest(str(RECIPE), *(deb.parent.name for deb in debs))

    def make(new: Path) -> None:
        say(f"unpacking the headers of {release}")
        for deb in debs:
            unpack_deb(deb, new)

    root = build_once("guest-headers", f"{release}-{key}", make)
    folder = root / "usr" / "src" / f"linux-headers-{release}"
    # the one absolute path in it
    (folder / "Makefile").write_text(f"include {root}/usr/src/linux-headers-{base}-common/Makefile\n")
    return folder


def ensure_module(image: GuestImage, source: Path = SOURCES) -> Path:
    """The module of the folder `source`, built for the image's kernel; any warning is an error."""
    files = sorted(p for p in source.iterdir() if p.suffix in (".c", ".h") or p.name == "Kbuild")
    parts = [part for p in files for part in (p.name, p.read_bytes())]
    key = digest(str(RECIPE), image.kernel_release, WARNINGS, *parts)

    def make(new: Path) -> None:
        hostdeps.require("lab")
        kernel = headers(image.kernel_release, image.arch)
        say(f"building {source.name} for {image.kernel_release}")
        with scratch("module") as folder:
            for path in files:
                shutil.copy(path, folder)
            prefix = f"{image.arch.triplet}-"
            compiler = f"{prefix}gcc-12" if shutil.which(f"{prefix}gcc-12") else f"{prefix}gcc"
            said = output(
                [
                    *("make", "-s", "-C", kernel, f"M={folder}", f"CC={compiler}", f"KCFLAGS={WARNINGS}"),
                    *(f"-j{os.cpu_count() or 1}", "CONFIG_DEBUG_INFO_BTF_MODULES=", "modules"),
                ]
            )
            made = sorted(folder.glob("*.ko"))
            if len(made) != 1:
                raise LabError(f"{source} made {len(made)} modules\n{said}")
            output([f"{prefix}strip", "--strip-debug", "-o", new / made[0].name, made[0]])

    folder = build_once("guest-module", key, make)
    return next(folder.glob("*.ko"))


def _checkpatch() -> Path:
    """The kernel's scripts/checkpatch.pl, with the files that it reads."""
    deb = Apt(KERNEL_SUITE).debs([KERNEL_SOURCE])[KERNEL_SOURCE]

    def make(new: Path) -> None:
        with scratch("linux-source") as folder:
            say(f"taking checkpatch.pl out of {deb.name}")
            unpack_deb(deb, folder)
            tarball = next(folder.glob("usr/src/*.tar.xz"))
            names = ("checkpatch.pl", "spelling.txt", "const_structs.checkpatch")
            wanted = [f"{KERNEL_SOURCE}/scripts/{name}" for name in names]
            output(["tar", "-C", new, "-xJf", tarball, "--strip-components=2", *wanted])

    return build_once("kernel-checkpatch", deb.parent.name[:16], make) / "checkpatch.pl"


def checkpatch(source: Path = SOURCES) -> str:
    """What the kernel's checkpatch.pl says of the module; LabError if it has anything to say."""
    files = sorted(p for p in source.iterdir() if p.suffix in (".c", ".h") or p.name in ("Kbuild", "Makefile"))
    return "".join(output(["perl", _checkpatch(), *CHECKPATCH, "-f", path]) for path in files)
