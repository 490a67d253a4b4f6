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
THREADS = 4
KILLS = 100 if os.environ.get("VIRTIO_TEE_LONG") else 5
QUEUES = ("pure", "compiled")


@contextmanager
def booted(
    folder: Path, *options: str, queue: str = "auto", store: Path | None = None
) -> Iterator[tuple[Guest, Example]]:
    """A guest with an entropy and a block device, the latter with these QEMU options."""
    memory = ("--memory", str(store)) if store else ()
    rng = Example(folder, "entropy", queue=queue)
    block = Example(folder, "null_block", "--capacity", str(CAPACITY), *memory, queue=queue)
    more = "".join(f",{option}" for option in options)
    arguments = [
        *("-chardev", f"socket,id=rng,path={rng.socket}", "-device", f"vhost-user-rng-pci,chardev=rng{more}"),
        *("-chardev", f"socket,id=blk,path={block.socket},reconnect=1"),
        *("-device", f"vhost-user-blk-pci,chardev=blk,num-queues=1,queue-size=1024{more}"),
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
    with booted(folder, *(["packed=on"] if ring == "packed" else []), queue=queue, store=store) as (guest, _):
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


@pytest.mark.feature("pyvhost: a backend killed under load loses and corrupts nothing (split rings, Debian's QEMU)")
@pytest.mark.parametrize("queue", QUEUES)
def test_a_killed_backend_loses_and_corrupts_nothing(folder: Path, queue: str) -> None:
    """Split rings: what is in flight on packed rings is not recorded yet."""
    with booted(folder, queue=queue, store=folder / "disk") as (guest, block):
        load = start_load(guest)
        for _ in range(KILLS):
            time.sleep(0.5)
            block.kill()
            time.sleep(0.05)
            block.start()
            time.sleep(1.2)  # QEMU tries again after a second
        outcome = end_load(guest, load)
    assert outcome["wrong"] == []
    assert int(str(outcome["writes"])) > 100 * KILLS
