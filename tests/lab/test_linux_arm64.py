"""Debian's own libteec and tee-supplicant, as they are, in an arm64 guest whose kernel drives the device.

Client applications in C (`lab/clients/`) call the example TAs; what they print is held against what others have
published. tee-supplicant reads the TAs from the guest's /lib/optee_armtz, and keeps what they store.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from lab.apt import Apt
from lab.arch import AARCH64
from lab.clients import RUNTIME, SUITE, ensure_clients
from lab.qemu.guest import Guest, GuestConfig, GuestProcess
from lab.qemu.image import MODULES, ensure_image
from lab.qemu.module import ensure_module
from tee.soft.examples import UUIDS
from tests.lab.kit import Backend, furnish
from tests.lab.linux import complaints
from tests.lab.test_example_tas import BACK, EXAMPLES_NONCE, GCM, KEY_256, NIST, PLAIN

pytestmark = pytest.mark.lab

SUPPLICANT = ["tee-supplicant", "/dev/teepriv0"]
FILES = "/var/lib/optee-client/data/tee"  # where Debian's tee-supplicant keeps them
SECRET = b"what nobody may read, " * 300
NAME = "the name of the object"
ITEM_NOT_FOUND, COMMUNICATION = "0xffff0008", "0xffff000e"


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
def linux(backend: Backend) -> Iterator[Guest]:
    """Two CPUs; the driver is loaded, no supplicant is started."""
    image = ensure_image((*MODULES, "tee"), ensure_clients().in_guest(), AARCH64)
    module = ensure_module(image)
    with Guest(GuestConfig(sockets=[backend.socket], arch=AARCH64, cpus=2, uio=False), image=image) as guest:
        furnish(guest, backend)
        guest.put("/root/virtio_tee.ko", module.read_bytes())
        guest.run(["insmod", "/root/virtio_tee.ko"])
        yield guest


def supplicant(guest: Guest) -> GuestProcess:
    """Debian's tee-supplicant, once it has the device open."""
    started = guest.spawn(SUPPLICANT)
    end = time.monotonic() + 30
    while "/dev/teepriv0" not in guest.run(["sh", "-c", f"ls -l /proc/{started.pid}/fd"], check=False).stdout:
        assert started.poll() is None, f"tee-supplicant has ended: {started.stderr}"
        assert time.monotonic() < end, "tee-supplicant does not open its device"
        time.sleep(0.05)
    return started


def end(process: GuestProcess) -> None:
    process.kill()
    process.wait()


@pytest.fixture
def served(linux: Guest) -> Iterator[Guest]:
    """With a supplicant; afterwards the kernel must have had nothing to complain of."""
    serving = supplicant(linux)
    yield linux
    assert serving.poll() is None, serving.stderr
    end(serving)
    assert complaints(linux) == []


def example(guest: Guest, *arguments: object) -> list[str]:
    """What a client application of an example TA prints."""
    return guest.run(["tee-examples", *(str(a) for a in arguments)], timeout=60).stdout.splitlines()


def refused(guest: Guest, *arguments: object) -> list[str]:
    """Of one that does not get what it wants: step, code, origin."""
    done = guest.run(["tee-examples", *(str(a) for a in arguments)], timeout=60, check=False)
    assert done.returncode == 1, done.stdout
    return done.stdout.split()


def files_of(guest: Guest) -> dict[str, bytes]:
    found = guest.run(["find", FILES, "-type", "f"]).stdout.split()
    return {path: guest.get(path) for path in found}


def test_the_binaries_are_debians(linux: Guest) -> None:
    """As the packages' own lists of checksums have them; the clients use that library."""
    listed: dict[str, str] = {}
    for deb in Apt(SUITE, AARCH64.debian).debs(RUNTIME).values():
        sums = subprocess.run(["dpkg-deb", "-I", deb, "md5sums"], capture_output=True, text=True, check=True).stdout
        listed |= {path: digest for digest, path in (line.split() for line in sums.splitlines())}
    for path in ("usr/sbin/tee-supplicant", "usr/lib/aarch64-linux-gnu/libteec.so.2.0.0"):
        assert hashlib.md5(linux.get(f"/{path}")).hexdigest() == listed[path]
    used = linux.run(["tee-api"], env={"LD_TRACE_LOADED_OBJECTS": "1"}).stdout
    assert re.search(r"libteec\.so\.2 => /lib/aarch64-linux-gnu/libteec\.so\.2 ", used)


@pytest.mark.feature("Guests: Debian's libteec on the kernel driver (arm64), each call and parameter of its API")
@pytest.mark.call("TEEC_InitializeContext", "TEEC_FinalizeContext", "TEEC_OpenSession", "TEEC_CloseSession")
@pytest.mark.call("TEEC_RegisterSharedMemory", "TEEC_AllocateSharedMemory", "TEEC_ReleaseSharedMemory")
@pytest.mark.call("TEEC_InvokeCommand", "TEEC_RequestCancellation")
def test_the_client_api(served: Guest) -> None:
    said = served.run(["tee-api"], timeout=120).stdout.splitlines()
    assert said == [
        "no_device 0xffff0008",
        "by_name 0",
        "nobody 0xffff0008/3",
        "refused 0x10000002/4",
        "user 0/4",
        "group 0/4",
        "echo 0/4",
        "echoed 3 16",  # kinds 3, 5, 1 at places 1 to 3
        "null 0/4",
        "nulls 3 20",  # kinds 6, 7, 0
        "xor 0/4",
        "xored tEE",
        "short 0xffff0010/4",
        "needs 11, has 0",
        "fits 0/4",
        "has 7 ZZZZZZZ",
        "fail 0x10000001/4",
        "no_command 0xffff000a/4",
        "large 0/4",
        "large_whole 1",
        *(line.format(kind) for kind in ("allocated", "registered") for line in SHARED),
        "bad_flags 0xffff0006",
        "cancelled 0xffff0002/4",
        "many 8 of 8",
        "panic 0xffff3024/3",
        "after_panic 0xffff3024/3",
    ]


SHARED = ("{} 0/4", "{}_whole 1", "{} 0/4", "{}_part 1", "outside 0xffff0006/1")


@pytest.mark.feature("Guests: Debian's tee-supplicant (arm64) loads the TAs; RFC 4226's and NIST's vectors")
@pytest.mark.call("TEEC_InitializeContext", "TEEC_OpenSession", "TEEC_InvokeCommand")
def test_all_examples(served: Guest, backend: Backend) -> None:
    loaded, opened = (len(backend.ended(name)) for name in ("LOAD_TA", "OPEN_SESSION"))
    assert example(served, "hello_world", 0, 41) == ["42"]
    assert example(served, "hello_world", 1, 41) == ["40"]
    one, two = (bytes.fromhex(example(served, "random", 8192)[0]) for _ in range(2))
    assert one != two
    assert len(set(one)) == len(set(two)) == 256  # a value is missing from 8192 bytes once in 10^11 times
    for asked, expected in NIST.values():
        assert example(served, "aes", *aes(asked)) == [expected]
    assert example(served, "aes", *aes(BACK)) == [PLAIN]
    sealed = bytes.fromhex("".join(example(served, "aes_sealed", GCM, KEY_256, PLAIN)))
    assert AESGCM(bytes.fromhex(KEY_256)).decrypt(EXAMPLES_NONCE, sealed, None).hex() == PLAIN
    # RFC 4226, appendix D
    passwords = ["755224", "287082", "359152", "969429", "338314", "254676", "287922", "162583", "399871", "520489"]
    assert example(served, "hotp", b"12345678901234567890".hex(), 10) == passwords
    for algorithm in ("0x60000130", "0x60210230", "0x60410230"):
        first, second, back = (bytes.fromhex(line) for line in example(served, "acipher", 2048, algorithm, PLAIN))
        assert first != second
        assert len(first) == len(second) == 256
        assert back.hex() == PLAIN
    assert example(served, "secure_storage", 1, "passing", SECRET.hex()) == []
    assert example(served, "secure_storage", 0, "passing") == [SECRET.hex()]
    assert example(served, "secure_storage", 2, "passing") == []
    assert refused(served, "secure_storage", 0, "passing") == ["invoke", ITEM_NOT_FOUND, "4"]
    loads = backend.ended("LOAD_TA")[loaded:]
    assert len(loads) == 2 * (len(backend.ended("OPEN_SESSION")) - opened)  # of its size, then of itself
    assert {(load["args"]["answered_by"], load["args"]["ret"]) for load in loads} == {("guest", "SUCCESS")}


def aes(asked: dict[str, object]) -> list[object]:
    return [asked[name] for name in ("algorithm", "key", "iv", "encrypt", "text")]


@pytest.mark.feature(
    "Guests: what TAs store is in the folder of Debian's tee-supplicant, and outlives it and the backend"
)
def test_what_is_stored(linux: Guest, backend: Backend) -> None:
    serving = supplicant(linux)
    assert example(linux, "secure_storage", 1, NAME, SECRET.hex()) == []
    files = files_of(linux)
    assert files
    for path, content in files.items():
        for plain in (SECRET[:20], NAME.encode()):
            assert plain not in content
            assert plain not in path.encode()
    end(serving)
    serving = supplicant(linux)
    assert example(linux, "secure_storage", 0, NAME) == [SECRET.hex()]
    assert backend.stop() == 0
    backend.start()
    assert example(linux, "secure_storage", 0, NAME) == [SECRET.hex()]
    # what was changed is found out
    for path, content in files.items():
        linux.put(path, content[:-1] + bytes([content[-1] ^ 1]))
    step, code, _ = refused(linux, "secure_storage", 0, NAME)
    assert step == "invoke"
    assert code in ("0xf0100001", "0xf0100003")  # CORRUPT_OBJECT(_2)
    for path, content in files.items():
        linux.put(path, content)
    assert example(linux, "secure_storage", 2, NAME) == []
    end(serving)
    assert complaints(linux) == []


def test_a_ta_that_is_not_there(served: Guest, backend: Backend) -> None:
    path = f"/lib/optee_armtz/{UUIDS['random']}.ta"
    served.run(["mv", path, "/root/random.ta"])
    try:
        assert refused(served, "random", 16) == ["open", ITEM_NOT_FOUND, "3"]
    finally:
        served.run(["mv", "/root/random.ta", path])
    assert len(example(served, "random", 16)[0]) == 32


@pytest.mark.feature("Faults: Debian's tee-supplicant is stopped, killed and started again under its clients")
def test_a_killed_supplicant(linux: Guest, backend: Backend) -> None:
    assert refused(linux, "hello_world", 0, 41) == ["open", ITEM_NOT_FOUND, "3"], "there is no supplicant"
    serving = supplicant(linux)
    linux.run(["kill", "-STOP", str(serving.pid)])
    asked = len(backend.wait_for("LOAD_TA", 0, phase="b"))
    waiting = linux.spawn(["tee-examples", "hello_world", "0", "41"])
    backend.wait_for("LOAD_TA", asked + 1, phase="b")
    assert waiting.poll() is None
    end(serving)
    assert waiting.wait(30) == 1
    assert waiting.stdout.split()[:2] == ["open", COMMUNICATION]
    serving = supplicant(linux)
    assert example(linux, "hello_world", 0, 41) == ["42"]
    end(serving)
    assert complaints(linux) == []


def test_a_second_supplicant(served: Guest) -> None:
    """One process has the device: the other gives up, the first goes on."""
    second = served.spawn(SUPPLICANT)
    assert second.wait(30) != 0
    assert example(served, "hello_world", 0, 41) == ["42"]


def test_the_guide_with_its_commands() -> None:
    """docs/linux-driver.md: a guest that has it all when it has booted."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        backend = Backend(Path(folder))
        backend.start()
        (Path(folder) / f"{UUIDS['hello_world']}.ta").write_bytes(backend.package("hello_world"))
        boot = [*(sys.executable, "-m", "lab.qemu", "boot", "--arch", "aarch64", "--kernel-driver")]
        boot += ["--socket", str(backend.socket), "--ta-folder", folder, "--"]
        script = "tee-supplicant -d && tee-examples hello_world 0 41"
        done = subprocess.run([*boot, "sh", "-c", script], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout == "42\n"
        assert backend.stop() == 0


def test_the_driver_goes(linux: Guest) -> None:
    """Not while the device is open; then without a trace, and back again."""
    serving = supplicant(linux)
    assert linux.run(["rmmod", "virtio_tee"], check=False).returncode == 1
    end(serving)
    linux.run(["rmmod", "virtio_tee"])
    assert linux.run(["sh", "-c", "ls /dev | grep tee"], check=False).stdout == ""
    linux.run(["insmod", "/root/virtio_tee.ko"])
    serving = supplicant(linux)
    assert example(linux, "hello_world", 0, 41) == ["42"]
    end(serving)
    assert complaints(linux) == []
