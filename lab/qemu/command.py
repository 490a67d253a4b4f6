"""The command line of a guest, from a description of it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lab.arch import X86_64, Arch
from lab.qemu.build import QemuBuild

APPEND = "quiet panic=0 mitigations=off random.trust_cpu=on"


def default_accel() -> str:
    """`VIRTIO_TEE_ACCEL`, else tcg: it works everywhere."""
    return os.environ.get("VIRTIO_TEE_ACCEL") or "tcg"


@dataclass
class GuestConfig:
    """What a guest has; each socket is a backend's, and becomes one vhost-user-tee-pci device."""

    sockets: Sequence[Path | str] = ()
    arch: Arch = X86_64
    memory_mib: int = 384
    hugepages: int = 24  # of 2 MiB
    cpus: int = 1
    accel: str = field(default_factory=default_accel)
    num_request_queues: int = 1
    queue_size: int = 128
    device_options: str = ""  # more properties of each device, e.g. "packed=on"
    reconnect_ms: int = 200
    uio: bool = True  # /init gives the devices to uio_pci_generic; else virtio-pci has them, for a kernel driver
    append: str = ""  # more words for the kernel's command line
    extra_args: Sequence[str] = ()  # more arguments for QEMU
    boot_timeout: float = 90


def command_line(config: GuestConfig, qemu: QemuBuild, kernel: Path, initrd: Path) -> list[str]:
    """Everything but console, monitor and agent port."""
    words = [config.arch.append, APPEND, f"hugepages={config.hugepages}", config.append]
    append = " ".join([*words, "lab.uio"] if config.uio else words)
    argv = [
        *(str(qemu.binary), "-L", str(qemu.firmware_dir), "-nodefaults", "-no-user-config"),
        *("-display", "none", "-vga", "none"),
        *("-M", f"{config.arch.machine},memory-backend=mem", "-accel", config.accel, "-smp", str(config.cpus)),
        *("-cpu", "host" if config.accel.startswith("kvm") else config.arch.cpu),
        *("-m", f"{config.memory_mib}M"),
        *("-object", f"memory-backend-memfd,id=mem,size={config.memory_mib}M,share=on"),
        *("-kernel", str(kernel), "-initrd", str(initrd), "-append", append),
    ]
    for number, path in enumerate(config.sockets):
        device = (
            f"vhost-user-tee-pci,id=tee{number},chardev=tee-chr{number}"
            f",num-request-queues={config.num_request_queues},queue-size={config.queue_size}"
        )
        if config.device_options:
            device += f",{config.device_options}"
        chardev = f"socket,id=tee-chr{number},path={path},reconnect-ms={config.reconnect_ms}"
        argv += ["-chardev", chardev, "-device", device]
    return [*argv, *config.extra_args]
