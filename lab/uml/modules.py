"""Builds kernel modules for user-mode-linux: `build_module()` for any, `virtio_rng()` and `tee()` from the kernel's own
source, which Debian's package leaves out, `virtio_tee()` from ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import hostdeps
from lab.apt import Apt, unpack_deb
from lab.cache import LabError, build_once, digest, say, scratch
from lab.kernel_driver import NAME, SOURCES, WARNINGS
from lab.run import logged, output
from lab.uml.package import SUITE, Uml, ensure_uml

SOURCE = "linux-source-6.1"
#: what `modules_prepare` and modules need of the kernel's source, which is 1.4 GB
NEEDED = (
    *("Makefile", "Kbuild", "*/Kconfig*", "arch/um", "arch/x86", "include", "scripts", "tools/include"),
    *("kernel/bounds.c", "kernel/time/timeconst.bc", "lib/vdso", "security/selinux/include", "security/selinux/ss"),
    *("drivers/tee", "drivers/char/hw_random", "lib/genalloc.c"),
)
RECIPE = 1


@dataclass(frozen=True)
class Module:
    """A built module, and what it exports to others."""

    name: str
    folder: Path

    @property
    def ko(self) -> Path:
        return self.folder / f"{self.name}.ko"

    @property
    def symvers(self) -> Path:
        return self.folder / "Module.symvers"


@dataclass(frozen=True)
class KernelTree:
    """A configured kernel source, as far as modules need it."""

    root: Path
    uml: Uml


def ensure_tree() -> KernelTree:
    """The source that Debian's user-mode-linux was built from, configured as that was; from the cache or made now."""
    uml = ensure_uml()
    deb = Apt(SUITE).debs([SOURCE])[SOURCE]
    version = output(["dpkg-deb", "-f", deb, "Version"]).strip()
    if version != uml.built_from:
        raise LabError(
            f"user-mode-linux was built from linux {uml.built_from}, and modules of {SOURCE} {version} would not fit:"
            " remove both from lab/packages.lock, and the newest of both are taken"
        )

    def make(new: Path) -> None:
        hostdeps.require("lab")
        with scratch("linux") as folder:
            say(f"unpacking the source of linux {version}")
            unpack_deb(deb, folder)
            wanted = [f"{SOURCE}/{name}" if "*" not in name else name for name in NEEDED]
            tar: list[str | Path] = [
                "tar",
                "-C",
                new,
                "-x",
                "--strip-components=1",
                "--no-same-owner",
                "--wildcards",
                "-f",
            ]
            packed = folder / "usr" / "src" / f"{SOURCE}.tar.xz"
            output([*tar, packed, *wanted], env={**os.environ, "XZ_DEFAULTS": "-T0"})
        say("preparing it for modules")
        shutil.copy(uml.config, new / ".config")
        logged([*_make(new), "olddefconfig", "modules_prepare"], new / "build.log")
        release = (new / "include/config/kernel.release").read_text().strip()
        if release != uml.release:
            raise LabError(f"modules built from {deb.name} would be for {release}, but the kernel is {uml.release}")
        shutil.copy(uml.symvers, new / "Module.symvers")

    key = digest(str(RECIPE), uml.root.name, deb.parent.name, *NEEDED)
    return KernelTree(build_once("uml-tree", f"{version}-{key}", make), uml)


def _make(tree: Path) -> list[str | Path]:
    # LOCALVERSION, even empty, keeps a git repository around the cache out of the kernel's release
    return ["make", "-C", tree, f"-j{os.cpu_count() or 1}", "ARCH=um", "LOCALVERSION="]


def build_module(
    source: Path, name: str, *, needs: Sequence[Module] = (), make_arguments: Sequence[str] = ()
) -> Module:
    """Build the out-of-tree module `name`.ko for user-mode-linux, from the cache if nothing has changed.

    `source`: a folder with a Kbuild or Makefile that says `obj-m`; it is copied, and nothing is written to it. `needs`:
    modules whose exported symbols it uses. What neither they nor the kernel export is an error. `make_arguments`:
    more of them, such as `CONFIG_X=m`.

    :raises LabError: it does not build; shows the end of what make said
    """
    tree = ensure_tree()
    files = sorted(p for p in source.rglob("*") if p.is_file())
    key = digest(
        *(str(RECIPE), name, tree.root.name, *make_arguments),
        *(part for p in files for part in (str(p.relative_to(source)), p.read_bytes())),
        *(module.folder.name for module in needs),
    )

    def make(new: Path) -> None:
        say(f"building {name}.ko for user-mode-linux {tree.uml.release}")
        with scratch("module") as folder:
            work = folder / "m"
            shutil.copytree(source, work)
            symbols = " ".join(str(module.symvers) for module in needs)
            arguments = [f"M={work}", f"KBUILD_EXTRA_SYMBOLS={symbols}", *make_arguments, "modules"]
            logged([*_make(tree.root), *arguments], new / "build.log")
            for file in (f"{name}.ko", "Module.symvers"):
                if not (work / file).is_file():
                    raise LabError(
                        f"{source} did not build {file}; what it built: {[p.name for p in work.glob('*.ko')]}"
                    )
                shutil.move(work / file, new / file)

    return Module(name, build_once("uml-module", f"{name}-{key}", make))


def _from_kernel(name: str, kbuild: str, *patterns: str) -> Module:
    tree = ensure_tree().root
    with scratch("source") as folder:
        for pattern in patterns:
            for path in tree.glob(pattern):
                shutil.copy(path, folder / path.name)
        (folder / "Kbuild").write_text(kbuild)
        return build_module(folder, name)


def virtio_rng() -> Module:
    """Linux's driver for the entropy device."""
    return _from_kernel("virtio-rng", "obj-m := virtio-rng.o\n", "drivers/char/hw_random/virtio-rng.c")


def tee() -> Module:
    """The kernel's TEE core, for drivers to register with, and the allocator that it needs and this kernel lacks."""
    parts = "tee_core.o tee_shm.o tee_shm_pool.o genalloc.o"
    return _from_kernel("tee", f"obj-m := tee.o\ntee-y := {parts}\n", "drivers/tee/*.[ch]", "lib/genalloc.c")


def virtio_tee() -> Module:
    """The project's driver of the TEE device; it needs `tee()`. Any warning is an error."""
    flags = f"{WARNINGS} -Wno-type-limits"  # which arch/um's own headers do not stand
    return build_module(SOURCES, NAME, needs=[tee()], make_arguments=[f"KCFLAGS={flags}"])


#: the modules that are built here if a guest wants them
OWN: dict[str, Callable[[], Module]] = {"virtio_rng": virtio_rng, "tee": tee, NAME: virtio_tee}
