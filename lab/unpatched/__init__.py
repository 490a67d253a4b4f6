"""Debian's own QEMU, as it is packaged, for what must work without our patches; unpacked privately, not installed."""

from __future__ import annotations

from pathlib import Path

from lab.apt import Apt, unpack_deb
from lab.cache import build_once, digest, say
from lab.qemu.build import TARGETS, QemuBuild, copy_firmware

SUITE = "trixie"  # the emulated CPU of bookworm's QEMU 7.2 corrupts a 6.12 kernel, with no device of ours in sight
PACKAGES = ("qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios", "ipxe-qemu")
LIBRARIES = tuple(
    """
    libaio1t64 libasound2t64 libatomic1 libblkid1 libbpf1 libbrlapi0.8 libbsd0 libbz2-1.0 libc6 libcacard0
    libcap-ng0 libcap2 libcapstone5 libcrypt1 libdaxctl1 libdb5.3t64 libelf1t64 libfdt1 libffi8 libfuse3-4
    libgcc-s1 libglib2.0-0t64 libgmp10 libgnutls30t64 libhogweed6t64 libibverbs1 libidn2-0 libjpeg62-turbo
    libkmod2 libmd0 libmount1 libncursesw6 libndctl6 libnettle8t64 libnl-3-200 libnl-route-3-200 libnspr4 libnss3
    libnuma1 libp11-kit0 libpcre2-8-0 libpcsclite1 libpixman-1-0 libpmem1 libpng16-16t64 librdmacm1t64 libsasl2-2
    libseccomp2 libselinux1 libslirp0 libsqlite3-0 libssl3t64 libsystemd0 libtasn1-6 libtinfo6 libudev1
    libunistring5 liburing2 libusb-1.0-0 libusbredirparser1t64 libuuid1 libvdeplug2t64 libzstd1 zlib1g
    """.split()  # noqa: SIM905
)
FIRMWARE = ("seabios", "qemu-system-data", "ipxe-qemu")
RECIPE = 1

WRAPPER = """\
#!/bin/sh
here=$(cd "$(dirname "$0")/.." && pwd)/root
libs=$here/usr/lib/x86_64-linux-gnu
export QEMU_MODULE_DIR="$libs/qemu"
exec "$libs/ld-linux-x86-64.so.2" --library-path "$libs" "$here/usr/bin/qemu-system-x86_64" "$@"
"""


def ensure_unpatched_qemu() -> QemuBuild:
    """From the cache, or downloaded and unpacked now. It runs with the libraries of its own suite, on any host."""
    apt = Apt(SUITE)
    debs = apt.debs((*PACKAGES, *LIBRARIES))
    version = debs["qemu-system-x86"].name.split("_")[1].replace("%3a", ":")
    key = digest(str(RECIPE), WRAPPER, *(deb.parent.name for deb in debs.values()))

    def make(new: Path) -> None:
        say(f"unpacking Debian's QEMU {version}: {len(debs)} packages")
        for deb in debs.values():
            unpack_deb(deb, new / "root")
        wrapper = new / "bin" / "qemu-system-x86_64"
        wrapper.parent.mkdir()
        wrapper.write_text(WRAPPER)
        wrapper.chmod(0o755)
        (new / "share" / "qemu").mkdir(parents=True)
        copy_firmware([debs[name] for name in FIRMWARE], new / "share" / "qemu")

    return QemuBuild(build_once("unpatched-qemu", f"{SUITE}-{key}", make), TARGETS[0], version)
