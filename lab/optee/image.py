"""What the host VM boots, and what the guest VM in it does: kernel and initramfs for each."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from lab.apt import Apt
from lab.arch import AARCH64
from lab.cache import build_once, digest
from lab.cpio import write_tree
from lab.kernel import ensure_kernel, load_order, module_name
from lab.optee.hosted import ensure_hosted_qemu
from lab.optee.stacks import LINUX_6_12, PLATFORM, Stack
from lab.qemu.image import GuestImage
from lab.qemu.module import ensure_module
from lab.rootfs import TRIXIE, ensure_base, ensure_checkout, ensure_modules
from lab.tas import TA_FOLDER

USER_SPACE = ("libckteec0t64", "libteec2", "optee-test-qemu", "tee-supplicant")
DEVELOPMENT = "optee-os-dev"  # has the TAs that come with OP-TEE
QEMU = "usr/local/bin/qemu-system-aarch64"
RECIPE = 1
SMALL = replace(TRIXIE, wheels=())  # for the agent; each page of a nested guest is dear


def ensure_user_space(stack: Stack) -> Path:
    """A cpio of OP-TEE's supplicant, libraries, test suite and TAs, all as Debian has them."""
    apt = Apt(stack.suite, AARCH64.debian)
    tree, development = apt.tree(USER_SPACE), apt.tree([DEVELOPMENT])

    def make(new: Path) -> None:
        root = new / "root"
        shutil.copytree(tree, root, symlinks=True, ignore=shutil.ignore_patterns("share"))
        for ta in sorted((development / "usr" / "lib" / DEVELOPMENT / PLATFORM / "ta").glob("*.ta")):
            shutil.copy(ta, root / f"usr{TA_FOLDER}")
        with (new / "user-space.cpio").open("wb") as out:
            write_tree(root, out)
        shutil.rmtree(root)

    key = digest(str(RECIPE), tree.name, development.name)
    return build_once("optee-user-space", key, make) / "user-space.cpio"


def host_image(stack: Stack, extra: Sequence[tuple[str, Path]] = ()) -> GuestImage:
    """For the VM that has the TEE. `extra`: files to add, each as (path in it, file here)."""
    source = stack.kernel
    kernel = ensure_kernel(Apt(source.suite, AARCH64.debian), source.pattern, source.more)
    modules = ("virtio_blk", "virtio_rng", *source.modules, "tee", "optee", "optee-rng")
    files = [(QEMU, ensure_hosted_qemu()), *extra]
    parts = (
        ensure_base(AARCH64, TRIXIE) / "base.cpio",
        ensure_user_space(stack),
        ensure_modules(load_order(kernel.modules, modules)),
        ensure_checkout(files, TRIXIE),
    )
    return GuestImage(kernel.image, parts, kernel.release, AARCH64)


def guest_image(stack: Stack, extra: Sequence[tuple[str, Path]] = ()) -> GuestImage:
    """For the VM in it, whose kernel drives our device; OP-TEE's user space is that of the stack."""
    source = LINUX_6_12
    kernel = ensure_kernel(Apt(source.suite, AARCH64.debian), source.pattern)
    driver = ensure_module(GuestImage(kernel.image, (), kernel.release, AARCH64))
    wanted = ("virtio_rng", "tee", module_name(driver.name))
    parts = (
        ensure_base(AARCH64, SMALL) / "base.cpio",
        ensure_user_space(stack),
        ensure_modules(load_order(kernel.modules, wanted, [driver])),
        ensure_checkout(extra, SMALL),
    )
    return GuestImage(kernel.image, parts, kernel.release, AARCH64)
