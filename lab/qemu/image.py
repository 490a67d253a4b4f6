"""What a guest under QEMU boots: Debian's kernel, and an initramfs with Python in it: `ensure_image()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt
from lab.arch import X86_64, Arch
from lab.kernel import ensure_kernel, load_order, module_name
from lab.rootfs import ensure_base, ensure_checkout, ensure_modules

KERNEL_SUITE = "bookworm-backports"
MODULES = ("uio", "uio_pci_generic", "virtio_rng")


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
    kernel = ensure_kernel(Apt(KERNEL_SUITE, arch.debian), arch.kernel)
    wanted = (*modules, *(module_name(path.name) for path in built))
    loaded = ensure_modules(load_order(kernel.modules, wanted, built))
    initrds = (ensure_base(arch) / "base.cpio", loaded, ensure_checkout(extra))
    return GuestImage(kernel.image, initrds, kernel.release, arch)
