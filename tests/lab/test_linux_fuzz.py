"""Programs of system calls that make little sense, played in a guest with two CPUs against the kernel driver.

The kernel has nothing to complain of, every process can be killed, another client notices nothing, and afterwards
neither the device nor the guest's kernel has anything left of them.
"""

from __future__ import annotations

import errno
import json
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.driven import DrivenGuest, GuestProcess
from tee.linux.ioctls import Ioctl
from tests.lab.kit import Backend
from tests.lab.linux import complaints, linux_guest, supplicant, told
from tests.lab.tee_programs import RIGHT_CLIENT, RIGHT_SUPPLICANT, clients, made, supplicants

pytestmark = pytest.mark.lab

NOBODY = 65534
PROGRAMS = "/run/programs"
PLAYER = ("/root/player", PROGRAMS)
COUNT = 100
REMOVALS, RESTARTS = 3, 2
OF_CLIENTS = (
    *(Ioctl.VERSION, Ioctl.SHM_ALLOC, Ioctl.SHM_REGISTER),
    *(Ioctl.OPEN_SESSION, Ioctl.INVOKE, Ioctl.CLOSE_SESSION, Ioctl.CANCEL),
)
Calls = dict[Ioctl, dict[int, int]]
LEAKED_KIB = 12 << 10  # less than the programs of one test have shared


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        made_one = Backend(Path(name), "--metrics", f"unix:{name}/metrics", "--built-in-tas")
        made_one.start()
        yield made_one
        assert made_one.stop() == 0


@pytest.fixture(scope="module")
def linux(backend: Backend) -> Iterator[DrivenGuest]:
    with linux_guest(backend) as guest:
        yield guest


def free_kib(guest: DrivenGuest) -> int:
    """What the guest's kernel has left once it has given back what it can."""
    guest.run(["sh", "-c", "sync; echo 3 > /proc/sys/vm/drop_caches"])
    lines = guest.run(["cat", "/proc/meminfo"]).stdout.splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


def nothing_left(backend: Backend) -> None:
    """The device has no object of this guest any more; what closes in the background may take a moment."""
    end = time.monotonic() + 15
    while any((found := backend.objects()).values()):
        assert time.monotonic() < end, found
        time.sleep(0.1)


def play(guest: DrivenGuest, programs: bytes, *arguments: str) -> Calls:
    """How often each ioctl ended how (errno; 0: well), by all programs together."""
    guest.put(PROGRAMS, programs)
    return played(guest.run([*PLAYER, *arguments], timeout=200).stdout)


def played(said: str) -> Calls:
    found = json.loads(said)
    assert found["killed"] < found["played"] == COUNT, said
    return {ioctl: {int(k): n for k, n in found["calls"][str(ioctl & 0xFF)].items()} for ioctl in Ioctl}


@contextmanager
def without_a_trace(guest: DrivenGuest, backend: Backend) -> Iterator[None]:
    """Whatever happens in it: memory, device and log are as before, nobody holds the driver, and it works."""
    guest.run(["chmod", "666", "/dev/tee0"])
    before = free_kib(guest)
    yield
    nothing_left(backend)
    assert before - free_kib(guest) < LEAKED_KIB
    guest.run(["rmmod", "virtio_tee"])
    guest.run(["insmod", "/root/virtio_tee.ko"])
    assert told(guest, "hello")["value"] == 42
    assert complaints(guest) == []


@pytest.mark.call("TEE_IOC_VERSION", "TEE_IOC_SHM_ALLOC", "TEE_IOC_SHM_REGISTER", "TEE_IOC_OPEN_SESSION")
@pytest.mark.call("TEE_IOC_INVOKE", "TEE_IOC_CANCEL", "TEE_IOC_CLOSE_SESSION")
@pytest.mark.parametrize("user", [0, NOBODY])
@pytest.mark.feature("Guests: Linux kernel driver, fuzzed system calls of clients, as root and as another user")
def test_programs_of_clients(linux: DrivenGuest, backend: Backend, user: int) -> None:
    with without_a_trace(linux, backend):
        serving = supplicant(linux)
        seen = play(linux, made(clients, RIGHT_CLIENT, COUNT), str(user), "bystander")
        end(serving)
    for ioctl in OF_CLIENTS:
        assert seen[ioctl].get(0), ioctl
    for error in (errno.EFAULT, errno.EINVAL, errno.EBADF, errno.ENOENT):
        assert any(error in ended for ended in seen.values())
    assert not seen[Ioctl.SUPPL_RECV].get(0)


@pytest.mark.feature("Guests: Linux kernel driver, fuzzed system calls of supplicants")
@pytest.mark.call("TEE_IOC_SUPPL_RECV", "TEE_IOC_SUPPL_SEND")
def test_programs_of_supplicants(linux: DrivenGuest, backend: Backend) -> None:
    with without_a_trace(linux, backend):
        seen = play(linux, made(supplicants, RIGHT_SUPPLICANT, COUNT), "0", "bystander")
    for ioctl in (Ioctl.SUPPL_RECV, Ioctl.SUPPL_SEND):
        assert seen[ioctl].get(0), ioctl
        assert len(seen[ioctl]) > 1


@pytest.mark.feature("Guests: Linux kernel driver, fuzzed system calls while the device comes and goes")
def test_programs_while_the_device_comes_and_goes(linux: DrivenGuest, backend: Backend) -> None:
    """The driver is unbound and bound; then its backend is killed and started again."""
    with without_a_trace(linux, backend):
        linux.put(PROGRAMS, made(clients, RIGHT_CLIENT, COUNT))
        playing = linux.spawn(["sh", "-c", f"until [ -e /run/stop ]; do {' '.join(PLAYER)} || exit; done"])
        name = linux.run(["sh", "-c", "basename /sys/bus/virtio/drivers/virtio_tee/virtio*"]).stdout.strip()
        for _ in range(REMOVALS):
            for what in ("unbind", "bind"):
                linux.run(["sh", "-c", f"echo {name} > /sys/bus/virtio/drivers/virtio_tee/{what}"])
                time.sleep(0.3)
        for _ in range(RESTARTS):
            backend.stop(signal.SIGKILL)
            backend.start()
            time.sleep(0.5)
        linux.run(["touch", "/run/stop"])
        assert playing.wait(100) == 0
    rounds = [played(line) for line in playing.stdout.splitlines()]
    assert any(seen[Ioctl.INVOKE].get(0) for seen in rounds)
    assert "the device has lost its state" in linux.run(["dmesg"]).stdout


def end(process: GuestProcess) -> None:
    process.kill()
    process.wait()
