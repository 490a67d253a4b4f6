"""Real OP-TEE in a virtual machine: as Debian's programs find it, and as ours do; and a guest VM in that machine.

`VIRTIO_TEE_STACKS` names the stacks (see `lab.optee.stacks`; `+stats` behind a name: with OP-TEE's statistics).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator

import pytest

from lab.clients import ensure_clients
from lab.driven import DrivenGuest, GuestProcess
from lab.optee.host import NestedGuest, OpteeHost
from lab.optee.stacks import DEFAULT, STACKS, Stack, with_stats
from lab.optee.xtest import run_xtest, supplicant
from lab.tas import TA_FOLDER
from tee import package
from tee.soft.examples import UUIDS, source
from tests.lab.kit import SCRIPTS
from tests.lab.linux import complaints
from tests.lab.test_example_tas import NIST

pytestmark = pytest.mark.lab

CHOSEN = (os.environ.get("VIRTIO_TEE_STACKS") or DEFAULT).split()
STEP = ["/root/optee_steps.py"]
FILES = "/var/lib/tee-files"
OURS = ["virtio-tee", "supplicant", "--device", "/dev/teepriv0", "--fs-folder", FILES]
CASES = ("1001", "1002", "1004")
FILED = ("1001", "1004", "4001", "6001")
VENDOR = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
MEMORY = (("registered", 1 << 20, 0), ("allocated", 1 << 16, 0), ("allocated", 100_003, 1234), ("registered", 5, 4090))


def stack_named(text: str) -> Stack:
    name, _, stats = text.partition("+")
    return with_stats(STACKS[name]) if stats else STACKS[name]


@pytest.fixture(scope="module", params=CHOSEN)
def host(request: pytest.FixtureRequest) -> Iterator[OpteeHost]:
    with OpteeHost(stack_named(request.param)) as booted:
        booted.put("/root/optee_steps.py", (SCRIPTS / "optee_steps.py").read_bytes())
        yield booted


def told(where: DrivenGuest, *steps: str) -> list[dict[str, object]]:
    """What each step says."""
    out = where.run(["python3", *STEP, *" -- ".join(steps).split()]).stdout
    return [json.loads(line) for line in out.splitlines()]


def pattern(size: int) -> bytes:
    return (bytes(i * 131 & 0xFF for i in range(256)) * -(-size // 256))[:size]


@pytest.mark.feature("OP-TEE: its own test suite in a guest VM through virtio-tee, as natively (arm64)")
def test_xtest_natively_and_in_a_guest(host: OpteeHost) -> None:
    """Both with Debian's supplicant and libraries; the cases have the same numbers of subtests."""
    socket = "/run/linux.sock"
    with supplicant(host):
        native = run_xtest(host, CASES)
        assert sorted(native.cases) == [f"regression_{case}" for case in CASES]
        assert (native.failed, native.failed_subtests) == ([], 0)
        with host.served(socket, "--tee", "linux"), host.guest([socket]) as guest, supplicant(guest):
            assert run_xtest(guest, CASES) == native
            assert complaints(guest) == []
    assert complaints(host) == []


def test_statistics(host: OpteeHost) -> None:
    """OP-TEE's pseudo-TA for them needs no supplicant."""
    assert "Size of pool:" in host.run(["xtest", "--stats", "--alloc"]).stdout


def test_devices(host: OpteeHost) -> None:
    found = told(host, "version /dev/tee0", "version /dev/teepriv0")
    assert found == [{"version": [1, 1, 0xD]}, {"version": [1, 1, 0xF]}]


@pytest.mark.feature("Faults: a client of OP-TEE is killed while our supplicant works for it")
def test_a_killed_client(host: OpteeHost) -> None:
    """The kernel refuses the answer (EBADF): the next client is served."""
    with supplicant(host, ["python3", "-u", *STEP, "held_supplicant", "/run/go"]) as serving:
        client = host.spawn(["python3", *STEP, "digest", "allocated", "3", "0"])
        serving.wait_for("asked")
        client.kill()
        client.wait()
        host.put("/run/go", b"")
        assert told(host, "digest allocated 3 0")[0]["invoke"] == "SUCCESS"
    assert complaints(host) == []


@pytest.fixture(scope="module")
def serving(host: OpteeHost) -> Iterator[GuestProcess]:
    """Our supplicant, for all tests from here on."""
    with supplicant(host, OURS) as started:
        yield started
    assert complaints(host) == []


@pytest.fixture
def served(host: OpteeHost, serving: GuestProcess) -> OpteeHost:
    return host


@pytest.mark.feature("OP-TEE: our supplicant serves a real one: TAs, storage, its own test suite")
def test_our_supplicant(served: OpteeHost) -> None:
    result = run_xtest(served, FILED)
    assert sorted(result.cases) == [f"regression_{case}" for case in FILED]
    assert result.failed == []
    assert result.failed_subtests == 0


@pytest.mark.feature("OP-TEE: our client on a real one, with registered and allocated memory")
def test_our_client(served: OpteeHost) -> None:
    found = told(served, *(f"digest {kind} {size} {offset}" for kind, size, offset in MEMORY), "missing")
    digests = [hashlib.sha256(pattern(size)).hexdigest() for _, size, _ in MEMORY]
    assert found == [
        *({"invoke": "SUCCESS", "size": 32, "digest": digest} for digest in digests),
        {"open": "ITEM_NOT_FOUND", "origin": 3},
    ]


def test_what_it_stores(served: OpteeHost) -> None:
    """The files are our supplicant's; what is in them only OP-TEE can read, and it notices changes."""
    secret = bytes(range(256)) * 5
    assert told(served, f"store passing {secret.hex()}") == [{"stored": "passing"}]
    files = served.run(["find", FILES, "-type", "f"]).stdout.split()
    contents = {path: served.get(path) for path in files}
    assert any(len(content) > len(secret) for content in contents.values())
    assert not any(secret[:64] in content or b"passing" in content for content in contents.values())
    for path, content in contents.items():
        served.put(path, content[:-1] + bytes([content[-1] ^ 1]))
    (refused,) = told(served, "load passing 2000")  # not even a session: OP-TEE looks up the TA's version in its files
    assert refused == {"open": "CORRUPT_OBJECT", "origin": 3}
    for path, content in contents.items():
        served.put(path, content)
    loaded, removed, missing = told(served, "load passing 2000", "remove passing", "load passing 2000")
    assert loaded == {"text": secret.hex()}
    assert removed == {"removed": "passing"}
    assert missing["code"] == "ITEM_NOT_FOUND"


def test_a_changed_ta(served: OpteeHost) -> None:
    """OP-TEE looks at what our supplicant gives it."""
    ta = "/lib/optee_armtz/cb3e5ba0-adf1-11e0-998b-0002a5d5c51b.ta"
    package = served.get(ta)
    served.put(ta, package[:-1] + bytes([package[-1] ^ 1]))
    try:
        assert told(served, "digest allocated 3 0") == [{"open": "SECURITY", "origin": 3}]
    finally:
        served.put(ta, package)


# -- a guest VM in it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def backend(host: OpteeHost) -> Iterator[GuestProcess]:
    """The software TEE, in the host VM."""
    host.put("/root/vendor.pem", VENDOR.public)
    with host.served("/run/tee.sock", "--ta-key", "/root/vendor.pem", "--trace", "/run/trace.json") as started:
        yield started
    assert complaints(host) == []


@pytest.fixture(scope="module")
def guest(host: OpteeHost, backend: GuestProcess) -> Iterator[NestedGuest]:
    examples = ensure_clients().examples
    with host.guest(["/run/tee.sock"]) as booted:
        booted.put("/usr/local/bin/tee-examples", examples.read_bytes(), 0o755)
        for name in ("hello_world", "aes"):
            booted.put(f"{TA_FOLDER}/{UUIDS[name]}.ta", package.sign(source(name), UUIDS[name], 1, VENDOR.private))
        yield booted


@pytest.mark.feature("Guests: under KVM in an arm64 host; Debian's libteec and tee-supplicant on the kernel driver")
def test_a_guest_in_the_host(guest: NestedGuest, host: OpteeHost) -> None:
    """A host with a KVM, our QEMU and backend in it, a guest in that one."""
    assert "virtio_tee" in guest.run(["lsmod"]).stdout
    with supplicant(guest):
        assert guest.run(["tee-examples", "hello_world", "0", "41"]).stdout == "42\n"
        asked, expected = NIST["F.5.1"]
        arguments = [str(asked[name]) for name in ("algorithm", "key", "iv", "encrypt", "text")]
        assert guest.run(["tee-examples", "aes", *arguments]).stdout == f"{expected}\n"
    assert complaints(guest) == []
    lines = (line.strip().rstrip(",") for line in host.get("/run/trace.json").decode().splitlines())
    events = [json.loads(line) for line in lines if line.startswith("{")]
    loads = [event["args"] for event in events if event["name"] == "LOAD_TA" and event["ph"] == "e"]
    assert [(load["answered_by"], load["ret"]) for load in loads] == [("guest", "SUCCESS")] * 4  # each TA in two steps


def test_a_killed_guest(guest: NestedGuest, host: OpteeHost, backend: GuestProcess) -> None:
    """The backend, and what is beside it, go on."""
    guest.kill()
    assert host.run(["ls", "-l", f"/proc/{backend.pid}/exe"]).stdout
    assert backend.poll() is None
