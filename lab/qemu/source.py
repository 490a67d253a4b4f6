"""QEMU's source from Debian, and our patches to it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt
from lab.cache import LabError, scratch
from lab.run import output

SUITE = "trixie"
PATCH_FOLDER = Path(__file__).with_name("patches")
# Debian's tarball comes without firmware, but this file of it wants to unpack some
FIRMWARE_RULE = ("pc-bios/meson.build", "if unpack_edk2_blobs\n", "if false\n")


@dataclass(frozen=True)
class QemuSource:
    version: str
    tarball: Path


def patches() -> list[Path]:
    return sorted(PATCH_FOLDER.glob("*.patch"))


def qemu_source() -> QemuSource:
    """QEMU 10.0.x as trixie has it; the tarball without Debian's own patches."""
    version, files = Apt(SUITE).source("qemu")
    if not re.match(r"1:10\.0\.", version):
        raise LabError(f"{SUITE} has QEMU {version}; the patches in {PATCH_FOLDER} are for 10.0")
    tarballs = [f for f in files if ".orig.tar." in f.name]
    if len(tarballs) != 1:
        raise LabError(f"qemu {version}: expected one .orig tarball among {[f.name for f in files]}")
    return QemuSource(version, tarballs[0])


def unpack(source: QemuSource, into: Path) -> None:
    into.mkdir(parents=True, exist_ok=True)
    output(["tar", "-C", into, "-x", "--strip-components=1", "--no-same-owner", "-f", source.tarball])


def apply_patches(tree: Path) -> None:
    name, before, after = FIRMWARE_RULE
    text = (tree / name).read_text()
    if before not in text:
        raise LabError(f"{name} of QEMU has changed: no line {before.strip()!r}")
    (tree / name).write_text(text.replace(before, after))
    for patch in patches():
        output(["patch", "-d", tree, "-p1", "--fuzz=0", "-N", "-i", patch])


def checkpatch() -> str:
    """What QEMU's own scripts/checkpatch.pl says of our patches; an error if it has anything to say."""
    with scratch("checkpatch") as tree:
        source = qemu_source()
        # the script looks for these to know that it is in QEMU's tree
        unpack(source, tree)
        said = ""
        for patch in patches():
            said += f"{patch.name}\n" + output(["perl", "scripts/checkpatch.pl", "--strict", patch], cwd=tree)
    return said
