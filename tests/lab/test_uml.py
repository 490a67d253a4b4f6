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
CAPACITY = 16 << 20
RING_PACKED = 34
DEVICES = "/sys/bus/virtio/devices"

READ_ENTROPY = """
import os, sys
fd = os.open("/dev/hwrng", os.O_RDONLY)
data = b""
while len(data) < 8192:
    data += os.read(fd, 4096)
sys.stdout.write(data.hex())
"""
WHOLE_DISK = """
import hashlib, os, random, sys
data = random.Random(1).randbytes(int(sys.argv[1]))
with open("/dev/vda", "r+b", buffering=0) as disk:
    view = memoryview(data)
    while view:
        view = view[disk.write(view):]
    os.fsync(disk.fileno())
with open("/proc/sys/vm/drop_caches", "w") as file:
    file.write("3")
with open("/dev/vda", "rb") as disk:
    print(hashlib.file_digest(disk, "sha256").hexdigest())
"""


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        yield Path(name)


def devices(guest: UmlGuest) -> dict[str, str]:
    """Virtio device → its ID, as sysfs says it."""
    names = guest.run(["ls", DEVICES]).stdout.split()
    return {name: guest.run(["cat", f"{DEVICES}/{name}/device"]).stdout.strip() for name in names}


@pytest.mark.feature("pyvhost: entropy and block devices under Debian's user-mode-linux, packed and split rings")
@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("queue", ["pure", "compiled"])
def test_entropy_and_disk(folder: Path, ring: str, queue: str) -> None:
    """user-mode-linux takes packed rings whenever they are offered."""
    store = folder / "disk"
    packed = ring == "packed"
    rng = Example(folder, "pyvhost.examples.entropy", queue=queue, packed=packed)
    options = ("--capacity", str(CAPACITY), "--memory", str(store))
    block = Example(folder, "pyvhost.examples.null_block", *options, queue=queue, packed=packed)
    try:
        rng.start()
        block.start()
        config = UmlConfig(devices=[(rng.socket, ENTROPY), (block.socket, BLOCK)])
        with UmlGuest(config) as guest:
            assert sorted(devices(guest).values()) == ["0x0002", "0x0004"]
            for device in devices(guest):
                features = guest.run(["cat", f"{DEVICES}/{device}/features"]).stdout
                assert features[RING_PACKED] == str(int(packed))

            # the kernel has an entropy source of its own, which would do as well
            guest.run(["sh", "-c", "echo virtio_rng.0 > /sys/class/misc/hw_random/rng_current"])
            assert guest.run(["cat", "/sys/class/misc/hw_random/rng_current"]).stdout.strip() == "virtio_rng.0"
            one, two = (bytes.fromhex(guest.run(["python3", "-c", READ_ENTROPY]).stdout) for _ in range(2))
            assert len(one) == len(two) == 8192
            assert one != two
            assert set(one) == set(two) == set(range(256))

            assert guest.run(["cat", "/sys/block/vda/size"]).stdout.strip() == str(CAPACITY // 512)
            assert guest.run(["cat", "/sys/block/vda/serial"]).stdout.strip("\0\n") == "pyvhost null block"
            read = guest.run(["python3", "-c", WHOLE_DISK, str(CAPACITY)], timeout=120).stdout.strip()
            written = random.Random(1).randbytes(CAPACITY)
            assert read == hashlib.sha256(written).hexdigest()
            assert store.read_bytes() == written

            guest.put("/root/block_load.py", (SCRIPTS / "block_load.py").read_bytes())
            load = guest.spawn(["python3", "/root/block_load.py", "/dev/vda", "4"])
            load.wait_for("started")
            time.sleep(1)
            guest.run(["touch", "/run/stop"])
            assert load.wait(timeout=120) == 0, load.stderr
            outcome = json.loads(load.stdout.splitlines()[-1])
            assert outcome["wrong"] == []
            assert outcome["writes"] > 4 * 512  # each thread writes its area, then at random
    finally:
        rng.end()
        block.end()


@pytest.mark.feature("Faults: user-mode-linux loses the device of a killed backend, and the next boot finds it again")
def test_a_killed_backend(folder: Path) -> None:
    """user-mode-linux does not connect again: it removes the device, and goes on."""
    rng = Example(folder, "pyvhost.examples.entropy")
    rng.start()
    config = UmlConfig(devices=[(rng.socket, ENTROPY)])
    try:
        with UmlGuest(config) as guest:
            assert list(devices(guest).values()) == ["0x0004"]
            rng.kill()
            end = time.monotonic() + 20
            while devices(guest):
                assert time.monotonic() < end, "the device is still there"
                time.sleep(0.1)
            assert "virtio_rng" not in guest.run(["cat", "/sys/class/misc/hw_random/rng_available"]).stdout
            rng.start()
            assert devices(guest) == {}
        with UmlGuest(config) as guest:
            guest.run(["sh", "-c", "echo virtio_rng.0 > /sys/class/misc/hw_random/rng_current"])
            assert len(guest.run(["python3", "-c", READ_ENTROPY]).stdout) == 2 * 8192
    finally:
        rng.end()


@pytest.mark.feature("Guests: the TEE device (ID 46) under Debian's unpatched user-mode-linux")
def test_the_tee_device_appears(backend: Backend) -> None:
    assert backend.process is not None
    for _ in range(2):  # a guest that is killed leaves the backend as it was
        with UmlGuest(UmlConfig(devices=[(backend.socket, TEE)])) as guest:
            assert list(devices(guest).values()) == ["0x002e"]
            assert not guest.run(["ls", f"{DEVICES}/virtio0"]).stdout.split().count("driver")
            assert backend.process.poll() is None


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


def test_a_module_of_ours_finds_device_and_tee_core(folder: Path, backend: Backend) -> None:
    """One call builds a driver for ID 46 that uses the TEE core; the guest loads both and binds it."""
    (folder / "labprobe.c").write_text(DRIVER)
    (folder / "Kbuild").write_text("obj-m := labprobe.o\n")
    probe = modules.build_module(folder, "labprobe", needs=[modules.tee()])
    image = ensure_image(modules=(*MODULES, "tee"), built=[probe])
    with UmlGuest(UmlConfig(devices=[(backend.socket, TEE)]), image=image) as guest:
        assert guest.run(["readlink", f"{DEVICES}/virtio0/driver"]).stdout.strip().endswith("/labprobe")
        said = guest.run(["dmesg"]).stdout.split("labprobe: config ")[1].split("\n")[0]
        assert said.startswith(b"VTEE".hex())  # the magic, DEV-ID-1
        assert said.endswith(" bus tee")
        assert guest.run(["ls", "/sys/class"]).stdout.split().count("tee") == 1


def test_a_module_that_needs_what_nobody_exports_is_not_built(folder: Path) -> None:
    (folder / "bad.c").write_text(
        "#include <linux/module.h>\nint nobody_has_this(void);\n"
        'static int start(void) { return nobody_has_this(); }\nmodule_init(start);\nMODULE_LICENSE("GPL");\n'
    )
    (folder / "Kbuild").write_text("obj-m := bad.o\n")
    with pytest.raises(LabError, match="nobody_has_this"):
        modules.build_module(folder, "bad")


def test_files_of_any_size_go_in_and_out() -> None:
    """A serial line of user-mode-linux stops for good when the guest's buffer for it has been full."""
    image = ensure_image()
    data = random.Random(2).randbytes(100_001)
    with UmlGuest(UmlConfig(), image=image) as guest:
        guest.put("/root/data", data)
        assert guest.get("/root/data") == data
        with pytest.raises(GuestError, match="more than the guest's line takes"):
            guest.run(["cat"], stdin=data)
        assert guest.run(["wc", "-c", "/root/data"]).stdout.split()[0] == str(len(data))
