"""Real OP-TEE in a virtual machine: as Debian's programs find it, and as ours do; and a guest VM in that machine.

`VIRTIO_TEE_STACKS` names the stacks (see `lab.optee.stacks`; `+stats` behind a name: with OP-TEE's statistics).
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from lab.driven import DrivenGuest, GuestProcess
from lab.optee.host import OpteeHost
from lab.optee.stacks import DEFAULT, STACKS, Stack, with_stats
from lab.optee.xtest import run_xtest
from tests.lab.kit import SCRIPTS
from tests.lab.linux import complaints

pytestmark = pytest.mark.lab

CHOSEN = (os.environ.get("VIRTIO_TEE_STACKS") or DEFAULT).split()
DEBIANS = ["tee-supplicant"]
FILES = "/var/lib/tee-files"
OURS = ["virtio-tee", "supplicant", "--device", "/dev/teepriv0", "--fs-folder", FILES]
NATIVE = ("1001", "1002", "1004", "4001")
SIZES = {"registered": (1 << 20, 0), "allocated": (1 << 16, 0), "unaligned": (100_003, 1234)}


def stack_named(text: str) -> Stack:
    name, _, stats = text.partition("+")
    return with_stats(STACKS[name]) if stats else STACKS[name]


@pytest.fixture(scope="module", params=CHOSEN)
def host(request: pytest.FixtureRequest) -> Iterator[OpteeHost]:
    with OpteeHost(stack_named(request.param)) as booted:
        booted.put("/root/optee_steps.py", (SCRIPTS / "optee_steps.py").read_bytes())
        yield booted


@contextmanager
def supplicant(where: DrivenGuest, command: list[str]) -> Iterator[GuestProcess]:
    started = where.spawn(command)
    if command is OURS:
        started.wait_for("ready")
    try:
        yield started
        assert started.poll() is None, started.stderr
    finally:
        if started.poll() is None:
            started.kill()
            started.wait()


def told(where: DrivenGuest, *arguments: object) -> dict[str, object]:
    """What the last line of a step says."""
    out = where.run(["python3", "/root/optee_steps.py", *(str(a) for a in arguments)]).stdout
    found = json.loads(out.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def pattern(size: int) -> bytes:
    return (bytes(i * 131 & 0xFF for i in range(256)) * -(-size // 256))[:size]


@pytest.mark.feature("OP-TEE: a real one in a virtual machine, its own test suite with Debian's supplicant (arm64)")
def test_as_debian_has_it(host: OpteeHost) -> None:
    with supplicant(host, DEBIANS):
        result = run_xtest(host, NATIVE)
    assert sorted(result.cases) == [f"regression_{case}" for case in NATIVE]
    assert result.failed == []
    assert result.subtests > len(NATIVE)
    assert result.failed_subtests == 0
    assert complaints(host) == []


@pytest.mark.feature("OP-TEE: our supplicant serves a real one: TAs, storage, its own test suite")
def test_our_supplicant(host: OpteeHost) -> None:
    cases = ("1001", "1004", "4001", "6001")
    with supplicant(host, OURS):
        result = run_xtest(host, cases)
    assert sorted(result.cases) == [f"regression_{case}" for case in cases]
    assert result.failed == []
    assert complaints(host) == []


@pytest.mark.feature("OP-TEE: our client on a real one, with registered and allocated memory")
def test_our_client(host: OpteeHost) -> None:
    out = host.run(["python3", "/root/optee_steps.py", "versions"]).stdout
    found = {line["device"]: line["version"] for line in map(json.loads, out.splitlines())}
    assert found == {"tee0": [1, 1, 0xD], "teepriv0": [1, 1, 0xF]}
    with supplicant(host, OURS):
        for kind, (size, offset) in SIZES.items():
            expected = {"invoke": "SUCCESS", "size": 32, "digest": hashlib.sha256(pattern(size)).hexdigest()}
            assert told(host, "digest", kind if kind == "registered" else "allocated", size, offset) == expected
        assert told(host, "short") == {"invoke": "SHORT_BUFFER", "origin": 4, "size": 32}
        assert told(host, "missing") == {"open": "ITEM_NOT_FOUND", "origin": 3}
    assert complaints(host) == []


def test_what_it_stores(host: OpteeHost) -> None:
    """The files are our supplicant's; what is in them only OP-TEE can read, and it notices changes."""
    secret = bytes(range(256)) * 5
    with supplicant(host, OURS):
        assert told(host, "store", "passing", secret.hex()) == {"stored": "passing"}
    files = host.run(["find", FILES, "-type", "f"]).stdout.split()
    assert files
    for path in files:
        assert secret[:64] not in host.get(path)
    with supplicant(host, OURS):
        assert told(host, "load", "passing", 2000) == {"text": secret.hex()}
        assert told(host, "remove", "passing") == {"removed": "passing"}
        assert told(host, "load", "passing", 2000)["code"] == "ITEM_NOT_FOUND"
    assert complaints(host) == []


@pytest.mark.feature("Faults: a client of OP-TEE is killed while our supplicant works for it")
def test_a_killed_client(host: OpteeHost) -> None:
    """The kernel refuses the answer (EBADF): the next client is served."""
    with supplicant(host, OURS) as serving:
        serving.kill(signal.SIGSTOP)
        client = host.spawn(["python3", "-u", "/root/optee_steps.py", "digest", "allocated", "3", "0"])
        client.wait_for("opening")
        time.sleep(1)  # until it waits for its TA, which nothing tells
        client.kill()
        client.wait()
        serving.kill(signal.SIGCONT)
        assert told(host, "digest", "allocated", 3, 0)["invoke"] == "SUCCESS"
    assert complaints(host) == []


def test_a_ta_of_another_signer(host: OpteeHost) -> None:
    """OP-TEE looks at who signed what our supplicant gives it."""
    folder, ta = "/root/changed", "cb3e5ba0-adf1-11e0-998b-0002a5d5c51b.ta"
    package = host.get(f"/lib/optee_armtz/{ta}")
    host.put(f"{folder}/{ta}", package[:-1] + bytes([package[-1] ^ 1]))
    with supplicant(host, [*OURS, "--ta-folder", folder]) as serving:
        serving.wait_for("ready")
        assert told(host, "digest", "allocated", 3, 0) == {"open": "SECURITY", "origin": 3}
    assert complaints(host) == []
