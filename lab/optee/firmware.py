"""Firmware with a TEE in it: TF-A, OP-TEE and U-Boot in one file for QEMU's `-bios`: `ensure_firmware()`."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt
from lab.arch import AARCH64
from lab.cache import build_once, digest, say, scratch
from lab.optee.source import Edit, Source, debian_source, edit_files, edited
from lab.optee.stacks import PLATFORM, Stack
from lab.run import logged

RECIPE = 1
SUITE = "trixie"  # of TF-A and U-Boot
CROSS = f"{AARCH64.triplet}-"
CORE_FILES = ("tee-header_v2.bin", "tee-pager_v2.bin", "tee-pageable_v2.bin")

U_BOOT = "usr/lib/u-boot/qemu_arm64/u-boot.bin"
# The environment that is compiled in, at the same length: OP-TEE's shared memory is at 0x42000000, where the kernel
# would be unpacked to, and nobody is there to press a key.
U_BOOT_EDITS = (
    Edit(U_BOOT, "kernel_addr_r=0x40400000", "kernel_addr_r=0x50000000"),
    Edit(U_BOOT, "ramdisk_addr_r=0x44000000", "ramdisk_addr_r=0x58000000"),
    Edit(U_BOOT, "bootdelay=2", "bootdelay=0"),
)
# OP-TEE as SPMC hands total and fragment length over in the wrong order: any FFA_MEM_SHARE in fragments failed.
OPTEE_EDITS = (
    Edit(
        "core/arch/arm/kernel/thread_spmc.c",
        "frag_len, tot_len, &mem_trans",
        "tot_len, frag_len, &mem_trans",
        times=2,
    ),
)
# TF-A has a manifest of OP-TEE as SPMC for another board, which loads it elsewhere.
MANIFEST = "plat/arm/board/fvp/fdts/fvp_spmc_el1_optee_manifest.dts"
LOAD_ADDRESS = Edit(MANIFEST, "0x6000000", "0x0e100000", times=2)
TFA = (
    "PLAT=qemu",
    "BL32_RAM_LOCATION=tdram",
    "QEMU_USE_GIC_DRIVER=QEMU_GICV3",
    "DEBUG=0",
    "LOG_LEVEL=20",
)


@dataclass(frozen=True)
class Firmware:
    bios: Path
    core: Path  # the folder of OP-TEE's binaries
    versions: dict[str, str]


def ensure_firmware(stack: Stack) -> Firmware:
    """From the cache, or built now (half a minute, two where OP-TEE is built). Raises LabError."""
    core, core_key, core_version = _core(stack)
    tfa = debian_source(SUITE, "arm-trusted-firmware")
    apt = Apt(SUITE, AARCH64.debian)
    u_boot = apt.debs(["u-boot-qemu"])["u-boot-qemu"]
    edits = (*U_BOOT_EDITS, LOAD_ADDRESS)
    key = digest(
        *(str(RECIPE), core_key, tfa.key, u_boot.parent.name),
        *(*TFA, *stack.dispatcher, *(edit.key for edit in edits)),
    )

    def make(new: Path) -> None:
        say(f"building TF-A {tfa.version} for {stack.name}")
        _build_tfa(stack, tfa, core, apt.tree(["u-boot-qemu"]) / U_BOOT, new)

    root = build_once("optee-firmware", f"{stack.name}-{key}", make)
    versions = {"TF-A": tfa.version, "OP-TEE": core_version, "U-Boot": u_boot.name.split("_")[1]}
    return Firmware(root / "fw.bios", core, versions)


def _core(stack: Stack) -> tuple[Path, str, str]:
    """Folder, key and version of OP-TEE's core."""
    apt = Apt(stack.suite, AARCH64.debian)
    if stack.core is None:
        deb = apt.debs(["optee-os"])["optee-os"]
        return apt.tree(["optee-os"]) / "usr" / "lib" / "optee" / PLATFORM, deb.parent.name, deb.name.split("_")[1]
    source, options = debian_source(stack.suite, "optee-os"), stack.core
    key = digest(str(RECIPE), source.key, *options, *(edit.key for edit in OPTEE_EDITS))

    def make(new: Path) -> None:
        say(f"building OP-TEE {source.version}: {' '.join(options)}")
        with scratch("optee-os") as work:
            source.unpack(work / "src")
            edit_files(work / "src", OPTEE_EDITS)
            prefixes = (f"CROSS_COMPILE={CROSS}", f"CROSS_COMPILE64={CROSS}")
            _make(work / "src", new / "build.log", "-s", f"O={work / 'out'}", *prefixes, "DEBUG=0", *options)
            for name in CORE_FILES:
                shutil.copy(work / "out" / "core" / name, new)

    return build_once("optee-core", f"{source.version}-{key}", make), key, source.version


def _build_tfa(stack: Stack, tfa: Source, core: Path, u_boot: Path, new: Path) -> None:
    with scratch("tf-a") as work:
        tfa.unpack(work / "src")
        data = u_boot.read_bytes()
        for edit in U_BOOT_EDITS:
            data = edited(data, edit, u_boot)
        (work / "u-boot.bin").write_bytes(data)
        edit_files(work / "src", (LOAD_ADDRESS,))
        names = zip(("BL32", "BL32_EXTRA1", "BL32_EXTRA2"), CORE_FILES, strict=True)
        parts = [f"{part}={core / name}" for part, name in names]
        parts += [f"BL33={work / 'u-boot.bin'}", f"QEMU_TOS_FW_CONFIG_DTS={work / 'src' / MANIFEST}"]
        options = (f"CROSS_COMPILE={CROSS}", f"BUILD_BASE={work / 'out'}", *parts, *TFA, *stack.dispatcher)
        _make(work / "src", new / "build.log", *options, "all", "fip")
        shutil.copy(work / "out" / "qemu" / "release" / "qemu_fw.bios", new / "fw.bios")


def _make(tree: Path, log: Path, *arguments: str) -> None:
    """With Debian's Python and its modules, whatever else this machine has."""
    hostdeps.require("optee")
    env = {name: value for name, value in os.environ.items() if not re.match(r"PYTHON|VIRTUAL_ENV|MAKE|MFLAGS", name)}
    env["PATH"] = "/usr/bin:/bin:/usr/sbin:/sbin"
    logged(["make", "-C", tree, f"-j{os.cpu_count() or 1}", *arguments], log, env=env)
