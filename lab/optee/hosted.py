"""Our QEMU for arm64 machines to run on: it starts the guest VM within the host VM. `ensure_hosted_qemu()`."""

from __future__ import annotations

import os
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt
from lab.arch import AARCH64
from lab.cache import build_once, digest, say, scratch
from lab.pypi import tool_python
from lab.qemu.build import TOOLS, Progress
from lab.qemu.source import FIRMWARE_RULE, apply_patches, patches, qemu_source, unpack
from lab.run import logged, output

# Of the suite whose cross-compiler and C library the host has: what is linked here must be no newer.
SUITE = "bookworm"
LIBRARIES = (
    *("libblkid-dev", "libfdt-dev", "libffi-dev", "libglib2.0-dev", "libmount-dev", "libpcre2-dev"),
    *("libpixman-1-dev", "libselinux1-dev", "zlib1g-dev"),
)
CONFIGURE = (
    "--without-default-features",
    "--static",  # needs nothing of the machine that it runs on
    "--disable-tcg",
    "--enable-kvm",
    "--enable-vhost-user",
    "--enable-system",
    "--disable-docs",
    "--disable-tools",
    "--enable-fdt=system",
    "--enable-pixman",
    "--disable-install-blobs",
)
RECIPE = 1


def ensure_hosted_qemu() -> Path:
    """The binary, from the cache or built now (3 minutes). Raises LabError."""
    source = qemu_source()
    libraries = Apt(SUITE, AARCH64.debian).tree(LIBRARIES)
    patched = [patch.read_bytes() for patch in patches()]
    key = digest(str(RECIPE), source.version, libraries.name, *CONFIGURE, *FIRMWARE_RULE, *patched)
    binary = f"qemu-system-{AARCH64.name}"

    def make(new: Path) -> None:
        hostdeps.require("lab")
        usr = libraries / "usr"
        there = usr / "lib" / AARCH64.triplet
        cross = f"{AARCH64.triplet}-"
        with scratch("qemu") as work:
            tree, build, log = work / "src", work / "src" / "build", new / "build.log"
            unpack(source, tree)
            apply_patches(tree)
            build.mkdir(exist_ok=True)
            say(f"configuring QEMU {source.version} for {AARCH64.name} to run on")
            env = {
                **os.environ,
                "PKG_CONFIG": "pkg-config",
                "PKG_CONFIG_LIBDIR": f"{there / 'pkgconfig'}:{usr / 'share' / 'pkgconfig'}",
                "PKG_CONFIG_SYSROOT_DIR": str(libraries),
            }
            configure: list[str | Path] = [
                *(tree / "configure", f"--python={tool_python(TOOLS)}", f"--target-list={AARCH64.target}"),
                *(f"--cross-prefix={cross}", f"--cc={cross}gcc -B{there}", f"--extra-cflags=-I{usr / 'include'}"),
                *(f"--extra-ldflags=-L{there}", *CONFIGURE),
            ]
            logged(configure, log, cwd=build, env=env)
            jobs = str(os.cpu_count() or 1)
            logged(["ninja", "-j", jobs, binary], log, cwd=build, env=env, each_line=Progress())
            output([f"{cross}strip", "-o", new / binary, build / binary])

    return build_once("qemu-hosted", f"{source.version.split(':')[-1].split('+')[0]}-{key}", make) / binary
