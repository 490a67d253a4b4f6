"""Every example TA in a real guest, loaded over RPC; its answers held against what others have published."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lab.qemu.guest import Guest, GuestConfig
from lab.qemu.image import MODULES, ensure_image
from tee.soft.examples import UUIDS
from tests.lab.kit import Backend, furnish

pytestmark = pytest.mark.lab

FILES = "/mnt/tee"
DISK_BYTES = 32 << 20
SECRET = b"what nobody may read"
NAME = b"the name of the object"

# NIST SP 800-38A, appendix F; the text is that of all of its examples
PLAIN = (
    "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
    "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
)
KEY_128 = "2b7e151628aed2a6abf7158809cf4f3c"
KEY_256 = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
ECB, CBC, CTR, GCM = 0, 1, 2, 4
NIST = {
    "F.1.5": (
        {"algorithm": ECB, "key": KEY_256, "iv": "", "text": PLAIN, "encrypt": 1},
        "f3eed1bdb5d2a03c064b5a7e3db181f8591ccb10d410ed26dc5ba74a31362870"
        "b6ed21b99ca6f4f9f153e7b1beafed1d23304b7a39f9f3ff067d8d8f9e24ecc7",
    ),
    "F.2.1": (
        {"algorithm": CBC, "key": KEY_128, "iv": "000102030405060708090a0b0c0d0e0f", "text": PLAIN, "encrypt": 1},
        "7649abac8119b246cee98e9b12e9197d5086cb9b507219ee95db113a917678b2"
        "73bed6b8e3c1743b7116e69e222295163ff1caa1681fac09120eca307586e1a7",
    ),
    "F.5.1": (
        {"algorithm": CTR, "key": KEY_128, "iv": "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff", "text": PLAIN, "encrypt": 1},
        "874d6191b620e3261bef6864990db6ce9806f66b7970fdff8617187bb9fffdff"
        "5ae4df3edbd5d35e5b4f09020db03eab1e031dda2fbe03d1792170a0f3009cee",
    ),
}
BACK = {"algorithm": CBC, "key": KEY_128, "iv": NIST["F.2.1"][0]["iv"], "text": NIST["F.2.1"][1], "encrypt": 0}
SEALED = {"algorithm": GCM, "key": KEY_256, "text": PLAIN, "encrypt": 1}
EXAMPLES_NONCE = bytes(range(12))


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        key = Path(folder) / "storage.key"
        key.write_bytes(bytes(range(32)))
        made = Backend(Path(folder), "--storage-key", str(key))
        made.start()
        yield made
        assert made.stop() == 0


@pytest.fixture(scope="module")
def guest(backend: Backend) -> Iterator[Guest]:
    """With a disk, which outlives a reboot."""
    disk = backend.folder / "disk"
    with disk.open("wb") as file:
        file.truncate(DISK_BYTES)
    subprocess.run(["/usr/sbin/mkfs.ext4", "-q", str(disk)], check=True)
    drive = ("-drive", f"file={disk},if=none,id=disk,format=raw", "-device", "virtio-blk-pci,drive=disk")
    image = ensure_image(modules=(*MODULES, "virtio_blk", "ext4"))
    with Guest(GuestConfig(sockets=[backend.socket], extra_args=drive), image=image) as booted:
        ready(booted, backend)
        yield booted


def ready(guest: Guest, backend: Backend) -> None:
    furnish(guest, backend)
    guest.run(["mount", "-t", "ext4", "/dev/vda", "/mnt"])


def run(guest: Guest, what: str, stdin: object = None) -> dict[str, Any]:
    argv = ["python3", "/root/example_tas.py", what, FILES]
    found = json.loads(guest.run(argv, timeout=120, stdin=json.dumps(stdin).encode()).stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.feature("TAs: all examples in a Debian guest, with RFC 4226's and NIST's vectors")
def test_all_examples(guest: Guest, backend: Backend) -> None:
    before = len(backend.ended("LOAD_TA"))
    seen = run(guest, "call", [*(asked for asked, _ in NIST.values()), BACK, SEALED])
    assert set(seen) == set(UUIDS)
    assert seen["hello_world"] == [42, 40, 0]
    one, two = (bytes.fromhex(text) for text in seen["random"])
    assert one != two
    assert len(set(one)) == len(set(two)) == 256  # a value is missing from 8192 bytes once in 10^11 times
    assert seen["probe"] == [2**40 + 1, 2**50 + 2, "tEE"]
    *nist, back, sealed = seen["aes"]
    assert nist == [expected for _, expected in NIST.values()]
    assert back == PLAIN
    gcm = AESGCM(bytes.fromhex(KEY_256))
    assert gcm.decrypt(EXAMPLES_NONCE, bytes.fromhex(sealed), None).hex() == PLAIN
    # RFC 4226, appendix D
    assert seen["hotp"] == [755224, 287082, 359152, 969429, 338314, 254676, 287922, 162583, 399871, 520489]
    assert seen["acipher"].pop("another key") == "BAD_PARAMETERS"
    assert len(seen["acipher"]) == 3
    for first, second, text in seen["acipher"].values():
        assert text == "teststring"
        assert first != second
        assert len(bytes.fromhex(first)) == len(bytes.fromhex(second)) == 256
        assert text.encode().hex() not in first
    assert seen["secure_storage"] == [True, "ITEM_NOT_FOUND"]
    assert seen["ocall"] == [42, 5000, 34, "NOT_SUPPORTED"]
    assert seen["stage"] == "NOT_SUPPORTED"
    loads = backend.ended("LOAD_TA")[before:]
    assert len(loads) == 2 * len(UUIDS)
    assert {(load["args"]["answered_by"], load["args"]["ret"]) for load in loads} == {("guest", "SUCCESS")}


@pytest.mark.feature("TAs: a guest's stored object outlives the TA, a reboot of the guest and the backend")
def test_what_is_stored_stays(guest: Guest, backend: Backend) -> None:
    before = len(backend.ended("LOAD_TA"))
    assert run(guest, "store") == {"same": True}
    assert len(backend.ended("LOAD_TA")) - before == 4, "the TA was not loaded again for the second session"
    files = files_of(guest)
    assert files
    for path, content in files.items():
        for plain in (SECRET, NAME):
            assert plain not in content
            assert plain not in path.encode()
    boot = guest.boot_id
    guest.run(["umount", "/mnt"])
    guest.reset()
    assert guest.boot_id != boot
    ready(guest, backend)
    assert files_of(guest) == files
    assert run(guest, "read") == {"same": True}
    assert backend.stop() == 0
    backend.start()
    assert run(guest, "read") == {"same": True}


def files_of(guest: Guest) -> dict[str, bytes]:
    found = guest.run(["find", FILES, "-type", "f"]).stdout.split()
    return {path: guest.get(path) for path in found}
