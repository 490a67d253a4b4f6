"""Builds QEMU with the vhost-user-tee device: `ensure_qemu()`."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt, unpack_deb
from lab.arch import ARCHS
from lab.cache import build_once, digest, say, scratch
from lab.pypi import tool_python
from lab.qemu.source import FIRMWARE_RULE, SUITE, QemuSource, apply_patches, patches, qemu_source, unpack
from lab.run import logged, output

TARGETS = tuple(arch.target for arch in ARCHS.values())
TOOLS = ("meson<1.9", "tomli", "setuptools", "wheel", "pycotap", "qemu.qmp", "distlib", "packaging")
FIRMWARE_PACKAGES = ("seabios", "qemu-system-data", "ipxe-qemu")
CONFIGURE = (
    "--without-default-features",
    "--enable-tcg",
    "--enable-kvm",
    "--enable-vhost-user",
    "--enable-vhost-net",  # only for the tests that share an emulated backend with ours
    "--enable-system",
    "--disable-docs",
    "--enable-fdt=system",
    "--enable-pixman",
    "--disable-install-blobs",
)
RECIPE = 1  # counts changes of the steps below that the other parts of the key do not show


@dataclass(frozen=True)
class QemuBuild:
    root: Path
    target: str
    version: str

    @property
    def binary(self) -> Path:
        return self.root / "bin" / f"qemu-system-{self.target.removesuffix('-softmmu')}"

    @property
    def firmware_dir(self) -> Path:
        """For `-L`; the binary finds it without that, too."""
        return self.root / "share" / "qemu"

    @property
    def qos_test(self) -> Path:
        return self.root / "bin" / "qos-test"


def ensure_qemu(target: str = TARGETS[0]) -> QemuBuild:
    """QEMU with our patches, from the cache or built now (some minutes)."""
    if target not in TARGETS:
        raise ValueError(f"target {target}: one of {TARGETS}")
    source = qemu_source()
    firmware = Apt(SUITE).debs(FIRMWARE_PACKAGES)
    key = digest(
        str(RECIPE),
        target,
        source.version,
        *CONFIGURE,
        *FIRMWARE_RULE,
        *(p.read_bytes() for p in patches()),
        *(deb.name for deb in firmware.values()),
    )

    def make(new: Path) -> None:
        hostdeps.require("lab")
        (new / "share" / "qemu").mkdir(parents=True)
        (new / "bin").mkdir()
        copy_firmware(list(firmware.values()), new / "share" / "qemu")
        _compile(source, target, new)

    root = build_once("qemu", f"{source.version.split(':')[-1].split('+')[0]}-{target}-{key}", make)
    return QemuBuild(root, target, source.version)


def copy_firmware(debs: list[Path], into: Path) -> None:
    """What QEMU looks for with `-L`, from packages."""
    with scratch("firmware") as folder:
        for deb in debs:
            unpack_deb(deb, folder)
        for part in ("seabios", "qemu"):
            for path in sorted((folder / "usr" / "share" / part).iterdir()):
                if path.is_file() and not path.is_symlink():
                    shutil.copy(path, into / path.name)


class Progress:
    """Says every tenth part of a ninja run."""

    def __init__(self) -> None:
        self.next = 0

    def __call__(self, line: str) -> None:
        step = re.match(r"\[(\d+)/(\d+)\]", line)
        if step and int(step[1]) * 10 >= self.next * int(step[2]):
            say(f"building QEMU: {step[1]} of {step[2]} steps")
            self.next = int(step[1]) * 10 // int(step[2]) + 1


def _compile(source: QemuSource, target: str, new: Path) -> None:
    python = tool_python(TOOLS)
    with scratch("qemu") as work:
        tree, build, log = work / "src", work / "src" / "build", new / "build.log"
        say(f"unpacking QEMU {source.version}, applying {len(patches())} patches")
        unpack(source, tree)
        apply_patches(tree)
        build.mkdir(exist_ok=True)
        say("configuring QEMU")
        logged([tree / "configure", f"--python={python}", f"--target-list={target}", *CONFIGURE], log, cwd=build)
        binary = f"qemu-system-{target.removesuffix('-softmmu')}"
        jobs = str(os.cpu_count() or 1)
        logged(["ninja", "-j", jobs, binary, "tests/qtest/qos-test"], log, cwd=build, each_line=Progress())
        for name in (binary, "tests/qtest/qos-test"):
            output(["strip", "-o", new / "bin" / Path(name).name, build / name])
