"""Debian's user-mode-linux as the frontend, as it is packaged: Linux's own drivers on the example devices, the TEE
device with no driver yet, and modules that are built for it."""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.cache import LabError
from lab.uml import modules
from lab.uml.guest import GuestError, UmlConfig, UmlGuest
from lab.uml.image import MODULES, ensure_image
from tests.lab.kit import SCRIPTS, Backend, Example

pytestmark = pytest.mark.lab

BLOCK, ENTROPY, TEE = 2, 4, 46  # virtio IDs
CAPACITY = 4 << 20
THREADS, BLOCKS = 4, 128  # of 4 KiB each
RING_PACKED = 34
DEVICES = "/sys/bus/virtio/devices"

READ_ENTROPY = """
import os
for _ in range(2):
    fd = os.open("/dev/hwrng", os.O_RDONLY)
    data = b""
    while len(data) < 8192:
        data += os.read(fd, 4096)
    os.close(fd)
    print(data.hex())
"""
WHOLE_DISK = """
import hashlib, os, random, sys
data = random.Random(1).randbytes(int(sys.argv[2]))
with open(sys.argv[1], "r+b", buffering=0) as disk:
    view = memoryview(data)
    while view:
        view = view[disk.write(view):]
    os.fsync(disk.fileno())
with open("/proc/sys/vm/drop_caches", "w") as file:
    file.write("3")
with open(sys.argv[1], "rb") as disk:
    print(hashlib.file_digest(disk, "sha256").hexdigest())
"""
DRIVER = """
#include <linux/module.h>
#include <linux/tee_drv.h>
#include <linux/virtio.h>
#include <linux/virtio_config.h>

static int probe(struct virtio_device *vdev)
{
	u8 config[8];

	vdev->config->get(vdev, 0, config, sizeof(config));
	pr_info("labprobe: config %*phN bus %s\\n", 8, config, tee_bus_type.name);
	return 0;
}

static void remove(struct virtio_device *vdev)
{
}

static const struct virtio_device_id ids[] = { { 46, VIRTIO_DEV_ANY_ID }, { 0 } };
static struct virtio_driver probe_driver = {
	.driver.name = "labprobe",
	.driver.owner = THIS_MODULE,
	.id_table = ids,
	.probe = probe,
	.remove = remove,
};
module_virtio_driver(probe_driver);
MODULE_LICENSE("GPL");
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        yield Path(name)


def devices(guest: UmlGuest) -> dict[str, str]:
    """Virtio device → its ID, as sysfs says it."""
    names = guest.run(["ls", DEVICES]).stdout.split()
    return {name: guest.run(["cat", f"{DEVICES}/{name}/device"]).stdout.strip() for name in names}


def read_entropy(guest: UmlGuest, number: int) -> None:
    """The kernel has an entropy source of its own, which would do as well: this one is to be the device."""
    guest.run(["sh", "-c", f"echo virtio_rng.{number} > /sys/class/misc/hw_random/rng_current"])
    assert guest.run(["cat", "/sys/class/misc/hw_random/rng_current"]).stdout.strip() == f"virtio_rng.{number}"
    one, two = (bytes.fromhex(line) for line in guest.run(["python3", "-c", READ_ENTROPY]).stdout.splitlines())
    assert len(one) == len(two) == 8192
    assert one != two
    assert set(one) == set(two) == set(range(256))


def write_and_read(guest: UmlGuest, disk: str, store: Path) -> None:
    """The whole disk; then four threads beside each other."""
    assert guest.run(["cat", f"/sys/block/{disk}/size"]).stdout.strip() == str(CAPACITY // 512)
    assert guest.run(["cat", f"/sys/block/{disk}/serial"]).stdout.strip("\0\n") == "pyvhost null block"
    read = guest.run(["python3", "-c", WHOLE_DISK, f"/dev/{disk}", str(CAPACITY)], timeout=120).stdout.strip()
    written = random.Random(1).randbytes(CAPACITY)
    assert read == hashlib.sha256(written).hexdigest()
    assert store.read_bytes() == written

    guest.run(["rm", "-f", "/run/stop"])
    load = guest.spawn(["python3", "/root/block_load.py", f"/dev/{disk}", str(THREADS), str(BLOCKS)])
    load.wait_for("started")
    time.sleep(0.3)
    guest.run(["touch", "/run/stop"])
    assert load.wait(timeout=120) == 0, load.stderr
    outcome = json.loads(load.stdout.splitlines()[-1])
    assert outcome["wrong"] == []
    assert outcome["writes"] >= THREADS * BLOCKS  # each thread writes its area, then at random


@pytest.mark.feature("pyvhost: entropy and block devices under Debian's user-mode-linux, packed and split rings")
@pytest.mark.parametrize("queue", ["pure", "compiled"])
def test_entropy_and_disk(folder: Path, queue: str) -> None:
    """user-mode-linux takes packed rings whenever they are offered."""
    examples: list[Example] = []
    for packed in (False, True):
        mine = folder / str(packed)
        mine.mkdir()
        options = ("--capacity", str(CAPACITY), "--memory", str(mine / "disk"))
        examples.append(Example(mine, "pyvhost.examples.entropy", queue=queue, packed=packed))
        examples.append(Example(mine, "pyvhost.examples.null_block", *options, queue=queue, packed=packed))
    try:
        for example in examples:
            example.start(wait=False)
        for example in examples:
            example.wait()
        sockets = zip((example.socket for example in examples), (ENTROPY, BLOCK) * 2, strict=True)
        script = ("root/block_load.py", SCRIPTS / "block_load.py")
        with UmlGuest(UmlConfig(devices=list(sockets)), image=ensure_image(extra=[script])) as guest:
            assert list(devices(guest).values()) == ["0x0004", "0x0002"] * 2
            for number, device in enumerate(devices(guest)):
                features = guest.run(["cat", f"{DEVICES}/{device}/features"]).stdout
                assert features[RING_PACKED] == str(number // 2)
            for number, (disk, packed) in enumerate((("vda", False), ("vdb", True))):
                read_entropy(guest, number)
                write_and_read(guest, disk, folder / str(packed) / "disk")
    finally:
        for example in examples:
            example.end()


@pytest.fixture(scope="module")
def rng() -> Iterator[Example]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        made = Example(Path(name), "pyvhost.examples.entropy")
        made.start()
        yield made
        made.end()


@pytest.fixture(scope="module")
def first(rng: Example, backend: Backend) -> Iterator[UmlGuest]:
    """An entropy device and a TEE."""
    with UmlGuest(UmlConfig(devices=[(rng.socket, ENTROPY), (backend.socket, TEE)])) as guest:
        yield guest


@pytest.fixture(scope="module")
def second(first: UmlGuest, rng: Example, backend: Backend) -> Iterator[UmlGuest]:
    """The next guest with the same devices, and a module of ours: the first one was killed."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        (Path(name) / "labprobe.c").write_text(DRIVER)
        (Path(name) / "Kbuild").write_text("obj-m := labprobe.o\n")
        probe = modules.build_module(Path(name), "labprobe", needs=[modules.tee()])
    image = ensure_image(modules=(*MODULES, "tee"), built=[probe])
    first.close()
    with UmlGuest(UmlConfig(devices=[(rng.socket, ENTROPY), (backend.socket, TEE)]), image=image) as guest:
        yield guest


@pytest.mark.feature("Guests: the TEE device (ID 46) under Debian's unpatched user-mode-linux")
def test_the_tee_device_appears(first: UmlGuest) -> None:
    assert list(devices(first).values()) == ["0x0004", "0x002e"]
    assert not first.run(["ls", f"{DEVICES}/virtio1"]).stdout.split().count("driver")


def test_files_of_any_size_go_in_and_out(first: UmlGuest) -> None:
    """A serial line of user-mode-linux stops for good when the guest's buffer for it has been full."""
    data = random.Random(2).randbytes(100_001)
    first.put("/root/data", data)
    assert first.get("/root/data") == data
    with pytest.raises(GuestError, match="more than the guest's line takes"):
        first.run(["cat"], stdin=data)
    assert first.run(["wc", "-c", "/root/data"]).stdout.split()[0] == str(len(data))


@pytest.mark.feature("Faults: user-mode-linux loses the device of a killed backend, and the next boot finds it again")
def test_a_killed_backend(first: UmlGuest, rng: Example) -> None:
    """user-mode-linux does not connect again: it removes the device, and goes on."""
    rng.kill()
    end = time.monotonic() + 20
    while list(devices(first).values()) != ["0x002e"]:
        assert time.monotonic() < end, "the device is still there"
        time.sleep(0.1)
    assert "virtio_rng" not in first.run(["cat", "/sys/class/misc/hw_random/rng_available"]).stdout
    rng.start()
    assert list(devices(first).values()) == ["0x002e"]


@pytest.mark.feature("Faults: user-mode-linux loses the device of a killed backend, and the next boot finds it again")
def test_the_next_guest(second: UmlGuest, backend: Backend) -> None:
    """A guest that is killed leaves the backend of its TEE as it was."""
    assert backend.process is not None
    assert backend.process.poll() is None
    assert list(devices(second).values()) == ["0x0004", "0x002e"]
    read_entropy(second, 0)


def test_a_module_of_ours_finds_device_and_tee_core(second: UmlGuest) -> None:
    """One call builds a driver for ID 46 that uses the TEE core; the guest loads both and binds it."""
    assert second.run(["readlink", f"{DEVICES}/virtio1/driver"]).stdout.strip().endswith("/labprobe")
    said = second.run(["dmesg"]).stdout.split("labprobe: config ")[1].split("\n")[0]
    assert said.startswith(b"VTEE".hex())  # the magic, DEV-ID-1
    assert said.endswith(" bus tee")
    assert second.run(["ls", "/sys/class"]).stdout.split().count("tee") == 1


def test_a_module_that_needs_what_nobody_exports_is_not_built(folder: Path) -> None:
    (folder / "bad.c").write_text(
        "#include <linux/module.h>\nint nobody_has_this(void);\n"
        'static int start(void) { return nobody_has_this(); }\nmodule_init(start);\nMODULE_LICENSE("GPL");\n'
    )
    (folder / "Kbuild").write_text("obj-m := bad.o\n")
    with pytest.raises(LabError, match="nobody_has_this"):
        modules.build_module(folder, "bad")
