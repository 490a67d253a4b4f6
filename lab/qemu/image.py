"""What a guest under QEMU boots: Debian's kernel, and an initramfs with Python in it: `ensure_image()`."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt, unpack_deb
from lab.arch import X86_64, Arch
from lab.cache import build_once, digest, say, scratch
from lab.kernel import load_order, module_name, unpacked_image
from lab.rootfs import ensure_base, ensure_checkout, ensure_modules

KERNEL_SUITE = "bookworm-backports"
MODULES = ("uio", "uio_pci_generic", "virtio_rng")
RECIPE = 1


@dataclass(frozen=True)
class GuestImage:
    kernel: Path
    initrds: tuple[Path, ...]  # to be concatenated, in this order
    kernel_release: str
    arch: Arch


def ensure_image(
    modules: Sequence[str] = MODULES,
    extra: Sequence[tuple[str, Path]] = (),
    arch: Arch = X86_64,
    built: Sequence[Path] = (),
) -> GuestImage:
    """Kernel and initramfs, from the cache or built now.

    `modules`: kernel modules that /init loads, by name; what they need is found. `built`: modules of
    `lab.qemu.module` that it loads after them. `extra`: files to add, each as (path in the guest, file here).
    """
    apt = Apt(KERNEL_SUITE, arch.debian)
    kernel_package = apt.name_like(arch.kernel)
    kernel_deb = apt.debs([kernel_package])[kernel_package]
    release = kernel_package.removeprefix("linux-image-")
    kernel = _kernel(kernel_deb, release)
    wanted = (*modules, *(module_name(path.name) for path in built))
    loaded = ensure_modules(load_order(kernel / "modules", wanted, built))
    initrds = (ensure_base(arch) / "base.cpio", loaded, ensure_checkout(extra))
    return GuestImage(kernel / "vmlinux", initrds, release, arch)


def _kernel(deb: Path, release: str) -> Path:
    """The kernel image and all its modules."""

    def make(new: Path) -> None:
        say(f"unpacking the kernel {release}")
        with scratch("kernel") as folder:
            unpack_deb(deb, folder)
            boot = folder / "boot" / f"vmlinuz-{release}"
            (new / "vmlinux").write_bytes(unpacked_image(boot.read_bytes()) or boot.read_bytes())
            lib = folder / "usr" / "lib" if (folder / "usr" / "lib" / "modules").is_dir() else folder / "lib"
            shutil.move(lib / "modules" / release, new / "modules")

    return build_once("guest-kernel", f"{release}-{digest(str(RECIPE), deb.parent.name)}", make)
