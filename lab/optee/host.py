"""The host VM: an arm64 machine with a secure world, in which OP-TEE runs below Linux; and the guest VM within it.

`with OpteeHost(STACKS["smc45"]) as host: print(host.run(["xtest", "1001"]).stdout)`; and within that,
`with host.guest(["/run/tee.sock"]) as guest: …`. Both are driven from here (:class:`lab.driven.DrivenGuest`).
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.agent import AgentClient
from lab.arch import AARCH64
from lab.driven import DrivenGuest, GuestError, GuestProcess
from lab.optee.firmware import ensure_firmware
from lab.optee.image import QEMU, guest_image, host_image
from lab.optee.stacks import Stack
from lab.qemu.command import APPEND, GuestConfig
from lab.qemu.guest import PORT_NAME, Guest, boot_for_person
from lab.qemu.image import GuestImage
from lab.run import connect, tail

MACHINE = replace(AARCH64, machine=f"{AARCH64.machine},secure=on,virtualization=on")
NESTED_PORT = "virtio-tee.nested"
NESTED_TIMEOUT = 300.0


def host_config(stack: Stack, memory_mib: int) -> GuestConfig:
    """Of the host VM's machine."""
    config = GuestConfig(arch=MACHINE, memory_mib=memory_mib, hugepages=0, cpus=2, uio=False, boot_timeout=180)
    config.extra_args = ["-bios", str(ensure_firmware(stack).bios)]
    return config


class OpteeHost(Guest):
    """Boots on entry, ends on exit."""

    def __init__(
        self,
        stack: Stack,
        *,
        memory_mib: int = 2048,
        extra: Sequence[tuple[str, Path]] = (),
        guest_extra: Sequence[tuple[str, Path]] = (),
    ) -> None:
        """`extra`, `guest_extra`: files to add to the host VM, to the guest VM, each as (path in it, file here)."""
        super().__init__(host_config(stack, memory_mib), image=host_image(stack, extra))
        self.stack = stack
        self.nested = guest_image(stack, guest_extra)

    def _lines(self) -> list[str]:
        initrd = self._folder / "nested-initrd"
        with initrd.open("wb") as out:
            for part in self.nested.initrds:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, out, 1 << 20)
        disks = (f"if=virtio,format=raw,read-only=on,file={path}" for path in (self.nested.kernel, initrd))
        return [
            *super()._lines(),
            *("-serial", f"file:{self._folder / 'secure'}"),
            *("-chardev", f"socket,id=nested,path={self._folder / 'nested'},server=on,wait=off"),
            *("-device", f"virtserialport,bus=ports.0,chardev=nested,name={NESTED_PORT}"),
            *(argument for disk in disks for argument in ("-drive", disk)),
        ]

    @property
    def secure_console(self) -> str:
        """What firmware and OP-TEE have printed, as long as it runs."""
        path = self._folder / "secure"
        return path.read_text(errors="replace") if self.is_running else ""

    @contextmanager
    def served(self, socket: str, *options: str) -> Iterator[GuestProcess]:
        """A backend in here that listens on `socket`; `options` of `virtio-tee serve`."""
        backend = self.spawn(["virtio-tee", "serve", "--socket-path", socket, *options])
        try:
            backend.wait_for("ready")
            yield backend
        finally:
            if backend.poll() is None:
                backend.kill()
                backend.wait()

    def guest(self, sockets: Sequence[str] = (), *, memory_mib: int = 384, options: str = "") -> NestedGuest:
        """A guest VM in this one, to be entered. `sockets`: of backends in here; each becomes a device, which has more
        properties by `options`."""
        return NestedGuest(self, self.nested, sockets, memory_mib, options)

    def nested_agent(self) -> AgentClient:
        """What leads to the agent of the guest VM. OSError where it is in use."""
        return AgentClient(connect(self._folder / "nested"))


class NestedGuest(DrivenGuest):
    """Under KVM in the host VM: kernel and initramfs are its disks, the agent's port is one of its ports."""

    def __init__(
        self, host: OpteeHost, image: GuestImage, sockets: Sequence[str], memory_mib: int, options: str
    ) -> None:
        super().__init__()
        self.host = host
        self.image = image
        self.boot_seconds = 0.0
        self._sockets = list(sockets)
        self._memory_mib = memory_mib
        self._options = options
        self._qemu: GuestProcess | None = None

    def __enter__(self) -> Self:
        began = time.monotonic()
        try:
            port = self.host.run(["sh", "-c", FIND_PORT]).stdout.strip()
            self._agent = self.host.nested_agent()
            self._qemu = self.host.spawn(self._command_line(f"/dev/{port}"))
            self._wait_ready(began + NESTED_TIMEOUT)
        except BaseException:
            self.close()
            raise
        self.boot_seconds = time.monotonic() - began
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End its QEMU. May be called again."""
        if self._qemu is not None:
            if self._qemu.poll() is None:
                self.kill()
            self._qemu = None
        if self._agent is not None:
            self._agent.close()
            self._agent = None

    def kill(self) -> None:
        """Kill its QEMU, and wait until it has gone."""
        assert self._qemu is not None
        self._qemu.kill()
        self._qemu.wait()

    @property
    def console(self) -> str:
        """What its kernel and /init, and QEMU, have printed."""
        if self._qemu is None:
            return ""
        self._qemu.poll()
        return self._qemu.stdout + self._qemu.stderr

    def _failed(self, message: str) -> GuestError:
        return GuestError(f"{message}\n--- the end of the nested guest's console:\n{tail(self.console)}")

    def _wait_ready(self, end: float) -> None:
        assert self._agent is not None
        assert self._qemu is not None
        while not self._agent.wait_ready(None, 0.5):
            if self._qemu.poll() is not None:
                raise self._failed(f"the nested QEMU ended with {self._qemu.returncode} while its guest was booting")
            if time.monotonic() > end:
                raise self._failed(f"the nested guest's agent did not come up within {NESTED_TIMEOUT:g} s")

    def _command_line(self, port: str) -> list[str]:
        size = f"{self._memory_mib}M"
        argv = [
            *(f"/{QEMU}", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-M", f"{AARCH64.machine},memory-backend=mem", "-accel", "kvm", "-cpu", "host", "-smp", "1"),
            *("-m", size, "-object", f"memory-backend-memfd,id=mem,size={size},share=on"),
            *("-kernel", "/dev/vda", "-initrd", "/dev/vdb", "-append", f"{AARCH64.append} {APPEND}"),
            *("-serial", "stdio", "-device", "virtio-serial-pci,id=ports"),
            *("-chardev", f"pipe,id=agent,path={port}"),
            *("-device", f"virtserialport,bus=ports.0,chardev=agent,name={PORT_NAME}"),
        ]
        for number, path in enumerate(self._sockets):
            argv += ["-chardev", f"socket,id=tee-chr{number},path={path},reconnect-ms=200"]
            device = f"vhost-user-tee-pci,id=tee{number},chardev=tee-chr{number}"
            argv += ["-device", ",".join(filter(None, (device, self._options)))]
        return argv


FIND_PORT = f"cd /sys/class/virtio-ports && for p in *; do grep -q {NESTED_PORT} $p/name && echo $p; done; true"


def boot_host_for_person(stack: Stack, memory_mib: int) -> int:
    """The host VM with its console in this terminal."""
    return boot_for_person(host_config(stack, memory_mib), host_image(stack), ["-serial", "null"])
