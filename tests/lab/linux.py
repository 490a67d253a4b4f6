"""What the tests of the kernel driver share: a guest whose kernel drives the device.

`VIRTIO_TEE_ARCH=aarch64` makes it an arm64 guest for all of them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lab.arch import ARCHS, X86_64
from lab.cache import build_once, digest
from lab.driven import DrivenGuest, GuestProcess
from lab.qemu.guest import Guest, GuestConfig
from lab.qemu.image import MODULES, ensure_image
from lab.qemu.module import ensure_module
from lab.uml import image as uml
from lab.uml import modules
from lab.uml.guest import UmlConfig, UmlGuest
from tests.lab.kit import SCRIPTS, Backend, furnish, put_tas

ARCH = ARCHS[os.environ.get("VIRTIO_TEE_ARCH") or X86_64.name]
SUPPLICANT = ["virtio-tee", "supplicant", "--device", "/dev/teepriv0", "--ta-folder", "/lib/optee_armtz"]
PROGRAMS = ("client", "player")  # tests/lab/guest/NAME.c
BAD_WORDS = ("BUG:", "WARNING:", "Oops", "general protection", "refcount_t", "INFO: task", "Call Trace")


@contextmanager
def bare_guest(socket: Path, options: str = "", queues: int = 1, append: str = "") -> Iterator[Guest]:
    """A guest with two CPUs; the driver is there, but not loaded. `options`: more properties of the device; `append`:
    more words for the kernel."""
    image = ensure_image((*MODULES, "tee"), arch=ARCH)
    module = ensure_module(image)
    config = GuestConfig(
        sockets=[socket],
        arch=ARCH,
        cpus=2,
        uio=False,
        device_options=options,
        num_request_queues=queues,
        append=append,
    )
    with Guest(config, image=image) as guest:
        guest.put("/root/virtio_tee.ko", module.read_bytes())
        guest.put("/root/vtee_test.ko", ensure_module(image, SCRIPTS / "kernel").read_bytes())
        guest.put("/root/linux_steps.py", (SCRIPTS / "linux_steps.py").read_bytes())
        yield guest


@contextmanager
def linux_guest(backend: Backend, options: str = "", queues: int = 1, append: str = "") -> Iterator[Guest]:
    """The driver is loaded, a supplicant is not started."""
    with bare_guest(backend.socket, options, queues, append) as guest:
        furnish(guest, backend)
        for name in PROGRAMS:
            guest.put(f"/root/{name}", program(name).read_bytes(), 0o755)
        guest.run(["insmod", "/root/virtio_tee.ko"])
        yield guest


@contextmanager
def uml_guest(backend: Backend) -> Iterator[UmlGuest]:
    """The same under user-mode-linux, whose line is too slow for all of these files."""
    built = [modules.virtio_tee(), modules.build_module(SCRIPTS / "kernel", "vtee_test", needs=[modules.tee()])]
    extra = [(f"root/{module.name}.ko", module.ko) for module in built]
    extra += [(f"root/{name}", program(name)) for name in PROGRAMS]
    extra += [(f"root/{script.name}", script) for script in sorted(SCRIPTS.glob("*.py"))]
    image = uml.ensure_image(("tee",), extra=extra)
    with UmlGuest(UmlConfig(devices=[(backend.socket, 46)]), image=image) as guest:
        put_tas(guest, backend)
        guest.run(["insmod", "/root/virtio_tee.ko"])
        yield guest


def program(name: str) -> Path:
    """A program in C, which needs nothing of the guest; from the cache or compiled now."""
    source = SCRIPTS / f"{name}.c"
    compiler = [f"{ARCH.triplet}-gcc", "-O1", "-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-static", "-s"]

    def make(new: Path) -> None:
        subprocess.run([*compiler, "-pthread", "-o", new / name, source], check=True, timeout=60)

    return build_once("lab-program", digest(*compiler, source.read_bytes()), make) / name


def supplicant(guest: DrivenGuest) -> GuestProcess:
    """A supplicant that serves already."""
    started = guest.spawn(SUPPLICANT)
    started.wait_for("ready")
    return started


def told(guest: DrivenGuest, *arguments: str, timeout: float = 60) -> dict[str, object]:
    """What the last line of a step of `linux_steps.py` says."""
    out = guest.run(["python3", "/root/linux_steps.py", *arguments], timeout=timeout).stdout
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def step(guest: DrivenGuest, *arguments: str) -> GuestProcess:
    """Start a step and wait until it holds what it is to hold."""
    started = guest.spawn(["python3", "-u", "/root/linux_steps.py", *arguments])
    started.wait_for("holding")
    return started


def ended(started: GuestProcess, timeout: float = 60) -> dict[str, object]:
    """How a step ended."""
    assert started.wait(timeout) == 0, started.stderr
    found = json.loads(started.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def complaints(guest: DrivenGuest) -> list[str]:
    """Lines of the kernel's log that no driver may cause."""
    log = guest.run(["dmesg"]).stdout
    return [line for line in log.splitlines() if any(word in line for word in BAD_WORDS)]
