"""What differs between the guests' architectures: a table, `ARCHS`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Arch:
    name: str  # QEMU's: qemu-system-NAME
    debian: str
    triplet: str  # GNU's: names the folders of libraries, and the compilers
    kernel: str  # Debian's package of it: a pattern
    packages: tuple[str, ...]  # that only guests of this architecture need
    wheels: tuple[str, ...]  # PyPI's platforms
    machine: str
    cpu: str  # where none is there to be used, but emulated
    append: str  # the first words of the kernel's command line

    @property
    def target(self) -> str:
        return f"{self.name}-softmmu"


def _manylinux(machine: str) -> tuple[str, ...]:
    return tuple(f"manylinux{level}_{machine}" for level in ("2014", "_2_17", "_2_28", "_2_34"))


X86_64 = Arch(
    name="x86_64",
    debian="amd64",
    triplet="x86_64-linux-gnu",
    kernel=r"linux-image-6\.12\.[0-9.]+\+deb12-cloud-amd64",
    packages=(),
    wheels=_manylinux("x86_64"),
    machine="q35",
    cpu="max",
    append="console=ttyS0 no_timer_check",
)
AARCH64 = Arch(
    name="aarch64",
    debian="arm64",
    triplet="aarch64-linux-gnu",
    kernel=r"linux-image-6\.12\.[0-9.]+\+deb12-cloud-arm64",
    packages=("libatomic1",),  # pyvhost's fences, on a CPU that reorders
    wheels=_manylinux("aarch64"),
    machine="virt,gic-version=3,acpi=off",  # ACPI tables would need EFI firmware, which takes long to start
    cpu="max,pauth-impdef=on,sve=off,sme=off",  # the architecture's own way to sign pointers is slow to emulate
    append="console=ttyAMA0",
)
HOST = X86_64  # what the lab itself runs on
ARCHS = {arch.name: arch for arch in (X86_64, AARCH64)}
