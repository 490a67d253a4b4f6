"""What a guest under user-mode-linux boots: `ensure_image()`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.kernel import load_order
from lab.rootfs import ensure_base, ensure_checkout, ensure_modules
from lab.uml.modules import OWN, Module
from lab.uml.package import ensure_uml

MODULES = ("virtio_blk", "virtio_rng")
KERNEL_DRIVER = ("tee", "virtio_tee")  # more, for the TEE device


@dataclass(frozen=True)
class UmlImage:
    binary: Path
    initrds: tuple[Path, ...]  # to be concatenated, in this order
    kernel_release: str


def ensure_image(
    modules: Sequence[str] = MODULES, built: Sequence[Module] = (), extra: Sequence[tuple[str, Path]] = ()
) -> UmlImage:
    """Kernel and initramfs, from the cache or made now.

    `modules`: the package's, or the lab's own (`OWN`), that /init loads, by name. `built`: modules of `build_module()`
    that it loads after them. `extra`: files to add, each as (path in the guest, file here).
    """
    uml = ensure_uml()
    names = [name.replace("-", "_") for name in modules]
    ours = [*(OWN[name]() for name in names if name in OWN), *built]
    wanted = [*names, *(module.name for module in built)]
    loaded = ensure_modules(load_order(uml.modules, wanted, [module.ko for module in ours]))
    return UmlImage(uml.binary, (ensure_base() / "base.cpio", loaded, ensure_checkout(extra)), uml.release)
