"""The example devices under Debian's QEMU as it is packaged, with Linux's own drivers in the guest."""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lab.qemu.guest import Guest, GuestConfig, GuestProcess
from lab.qemu.image import MODULES, ensure_image
from lab.unpatched import ensure_unpatched_qemu
from tests.lab.kit import SCRIPTS, Example

pytestmark = pytest.mark.lab

CAPACITY = 64 << 20
BLOCK, BLOCKS = 4096, 512  # as in block_load.py
THREADS = 8
KILLS = 100 if os.environ.get("VIRTIO_TEE_LONG") else 50
QUEUES = ("pure", "compiled")
RING_OPTIONS = {"split": (), "packed": ("packed=on",)}
RECONNECT_MS = 100


@contextmanager
def booted(
    folder: Path, *options: str, queue: str, size: str = "", module: str = "pyvhost.examples.null_block"
) -> Iterator[tuple[Guest, Example]]:
    """A guest with an entropy and a block device, the latter of ``module``, with its data in a file and ``size`` as
    an option; both with ``options``."""
    rng = Example(folder, "pyvhost.examples.entropy", queue=queue)
    block = Example(folder, module, "--capacity", str(CAPACITY), "--memory", str(folder / "disk"), queue=queue)
    more = "".join(f",{option}" for option in options)
    arguments = [
        *("-chardev", f"socket,id=rng,path={rng.socket}", "-device", f"vhost-user-rng-pci,chardev=rng{more}"),
        *("-chardev", f"socket,id=blk,path={block.socket},reconnect-ms={RECONNECT_MS}"),
        *("-device", f"vhost-user-blk-pci,chardev=blk,num-queues=1{size}{more}"),
    ]
    config = GuestConfig(uio=False, hugepages=0, extra_args=arguments, boot_timeout=30)
    image = ensure_image(modules=(*MODULES, "virtio_blk"))
    with ExitStack() as stack:
        for example in (rng, block):
            example.start()
            stack.callback(example.end)
        guest = stack.enter_context(Guest(config, image=image, qemu=ensure_unpatched_qemu()))
        guest.put("/root/block_load.py", (SCRIPTS / "block_load.py").read_bytes())
        yield guest, block


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        yield Path(name)


def start_load(guest: Guest) -> GuestProcess:
    load = guest.spawn(["python3", "/root/block_load.py", "/dev/vda", str(THREADS)])
    load.wait_for("started")
    return load


def end_load(guest: Guest, load: GuestProcess) -> dict[str, object]:
    guest.run(["touch", "/run/stop"])
    assert load.wait(timeout=120) == 0, load.stderr
    outcome = json.loads(load.stdout.splitlines()[-1])
    assert isinstance(outcome, dict)
    return outcome


@pytest.mark.feature("pyvhost: entropy and block devices under Debian's unpatched QEMU, split and packed rings")
@pytest.mark.parametrize("ring", ["split", "packed"])
@pytest.mark.parametrize("queue", QUEUES)
def test_entropy_and_disk(folder: Path, ring: str, queue: str) -> None:
    store = folder / "disk"
    with booted(folder, *RING_OPTIONS[ring], queue=queue) as (guest, _):
        features = guest.run(["cat", "/sys/block/vda/device/features"]).stdout
        assert features[34] == ("1" if ring == "packed" else "0"), "the ring is not what was asked for"
        assert guest.run(["cat", "/sys/class/misc/hw_random/rng_current"]).stdout.startswith("virtio_rng")
        read = "import os; fd = os.open('/dev/hwrng', os.O_RDONLY); print(os.read(fd, 32).hex(), os.read(fd, 32).hex())"
        one, two = guest.run(["python3", "-c", read]).stdout.split()
        assert one != two
        assert {len(one), len(two)} == {64}
        assert guest.run(["cat", "/sys/block/vda/size"]).stdout.strip() == str(CAPACITY // 512)
        assert guest.run(["cat", "/sys/block/vda/serial"]).stdout.strip("\0\n") == "pyvhost null block"
        load = start_load(guest)
        time.sleep(3)
        outcome = end_load(guest, load)
        assert outcome["wrong"] == []
        assert int(str(outcome["writes"])) > 1000
        guest.run(["sync"])
    assert store.read_bytes()[8:16] == bytes(8)  # area 0, block 0
    assert int.from_bytes(store.read_bytes()[16:24], "little") >= 1


def writes(store: Path) -> int:
    """How many writes of the load are in the file; each block says how often it was written."""
    blocks = memoryview(store.read_bytes())[: THREADS * BLOCKS * BLOCK]
    return sum(blocks.cast("Q")[2 :: BLOCK // 8])


def wait_for_writes(store: Path, most: int) -> None:
    end = time.monotonic() + 60
    while writes(store) < most:
        assert time.monotonic() < end, "the disk stands still"
        time.sleep(0.01)


@pytest.mark.feature("pyvhost: a backend killed under load loses and corrupts nothing (Debian's QEMU)")
@pytest.mark.parametrize(
    ("ring", "queue", "size"),
    [
        ("split", "pure", ",queue-size=256"),
        ("split", "compiled", ""),
        ("packed", "pure", ""),
        ("packed", "compiled", ",queue-size=256"),
    ],
)
def test_a_killed_backend_loses_and_corrupts_nothing(folder: Path, ring: str, queue: str, size: str) -> None:
    """The backend holds several requests at each moment and completes them in any order. It is killed whenever it has
    done some work. Data and versions of all blocks are right at each read and at the end, and the guest's kernel has
    seen no error and no request that took too long.

    QEMU asks for an inflight region of ``queue-size`` entries; the guest's ring has 1024."""
    store = folder / "disk"
    options = RING_OPTIONS[ring]
    with booted(folder, *options, queue=queue, size=size, module="tests.lab.late_block") as (guest, block):
        load = start_load(guest)
        for number in range(KILLS):
            wait_for_writes(store, writes(store) + 50)
            time.sleep(number % 7 / 1000)
            block.kill()
            block.start()
        wait_for_writes(store, writes(store) + 50)
        outcome = end_load(guest, load)
        kernel_log = guest.run(["dmesg"]).stdout
    assert outcome["wrong"] == []
    assert int(str(outcome["writes"])) > 50 * KILLS
    assert "virtio_blk" in kernel_log
    assert not [line for line in kernel_log.splitlines() if "error" in line and "vda" in line]
    recovered = [int(line.split()[1]) for line in block.log.read_text().splitlines() if line.startswith("recovered")]
    assert sum(count > 1 for count in recovered) > KILLS // 2, "the record was not needed: nothing was shown"
