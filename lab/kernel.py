"""A Debian kernel for a guest: the image that boots fastest, and modules in the order to load them."""

from __future__ import annotations

import lzma
import re
import shutil
import struct
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt, unpack_deb
from lab.cache import LabError, build_once, digest, say, scratch

ZSTD = b"\x28\xb5\x2f\xfd"
XZ = b"\xfd7zXZ\0"
ELF = b"\x7fELF"
RECIPE = 1


@dataclass(frozen=True)
class Kernel:
    release: str
    image: Path
    modules: Path  # the folder of all of them


def ensure_kernel(apt: Apt, pattern: str, more: Sequence[str] = ()) -> Kernel:
    """A kernel, from the cache or unpacked now. `pattern`: the name of its package, whose third word begins the
    release; `more`: other packages of it, `{}` standing for the release."""
    package = apt.name_like(pattern)
    release = package.split("-", 2)[2]
    debs = apt.debs([package, *(name.format(release) for name in more)]).values()

    def make(new: Path) -> None:
        say(f"unpacking the kernel {release}")
        with scratch("kernel") as folder:
            for deb in debs:
                unpack_deb(deb, folder)
            lib = folder / "usr" / "lib" if (folder / "usr" / "lib" / "modules").is_dir() else folder / "lib"
            modules = lib / "modules" / release
            places = (folder / "boot" / f"vmlinuz-{release}", modules / "vmlinuz")
            image = next(path for path in places if path.is_file()).read_bytes()
            (new / "vmlinux").write_bytes(unpacked_image(image) or image)
            shutil.move(modules, new / "modules")

    key = digest(str(RECIPE), *(deb.parent.name for deb in debs))
    root = build_once("guest-kernel", f"{release}-{key}", make)
    return Kernel(release, root / "vmlinux", root / "modules")


def unpacked_image(bzimage: bytes) -> bytes | None:
    """The vmlinux within an x86 bzImage: an emulated CPU is slow at unpacking it. None if that cannot be done here."""
    if bzimage[0x202:0x206] != b"HdrS":
        return None
    sectors = bzimage[0x1F1] or 4
    offset, length = struct.unpack_from("<II", bzimage, 0x248)
    start = (sectors + 1) * 512 + offset
    payload = bzimage[start : start + length]
    if payload.startswith(ZSTD):
        try:
            # the kernel appends the unpacked size; zstd would take it for another frame
            done = subprocess.run(["zstd", "-dcq"], input=payload[:-4], capture_output=True)
        except FileNotFoundError:
            return None
        image = done.stdout
    elif payload.startswith(XZ):
        image = lzma.LZMADecompressor().decompress(payload)
    else:
        return None
    return image if image.startswith(ELF) else None


def module_name(path: str) -> str:
    """`drivers/uio/uio-x.ko.xz` → `uio_x`, as the kernel calls it."""
    return Path(path).name.split(".ko")[0].replace("-", "_")


def depends(module: bytes) -> list[str]:
    """The modules that this one (an unpacked .ko) says it needs."""
    found = re.search(rb"\0depends=([^\0]*)\0", module)
    return [n.replace("-", "_") for n in found[1].decode().split(",") if n] if found else []


def read_module(path: Path) -> bytes:
    data = path.read_bytes()
    return lzma.decompress(data) if path.suffix == ".xz" else data


def load_order(folder: Path, wanted: Sequence[str], more: Sequence[Path] = ()) -> list[tuple[str, bytes]]:
    """(name, unpacked module) of the wanted ones and of all they need, in an order that can be loaded. `more`: modules
    that are not in the kernel's folder."""
    paths = {module_name(p.name): p for p in (*folder.rglob("*.ko*"), *more)}
    builtin_list = folder / "modules.builtin"
    builtin = {module_name(line) for line in builtin_list.read_text().split()} if builtin_list.exists() else set()
    ordered: dict[str, bytes] = {}

    def visit(name: str, asker: str) -> None:
        if name in builtin or name in ordered:
            return
        if name not in paths:
            raise LabError(f"the kernel in {folder} has no module {name}, which {asker} needs")
        data = read_module(paths[name])
        for need in depends(data):
            visit(need, name)
        ordered[name] = data

    for name in wanted:
        visit(name.replace("-", "_"), "the guest")
    return list(ordered.items())
