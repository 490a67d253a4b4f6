"""Tests of programs on a real /dev/tee0: that of a guest, whose kernel driver has a TEE outside. Modules that have such
a guest import them.

In the guest run a backend (`serve --tee linux`) and guests of that, over vhost-user.
"""

from __future__ import annotations

import json

import pytest

from lab.driven import DrivenGuest
from tests.lab.linux import supplicant


def step(guest: DrivenGuest, what: str) -> list[dict[str, object]]:
    """All lines that a step of `linux_tee.py` says."""
    out = guest.run(["python3", "/root/linux_tee.py", what], timeout=120).stdout
    return [json.loads(line) for line in out.splitlines()]


@pytest.mark.feature("Commands: `virtio-tee demo --device /dev/tee0`, the main job on a Linux TEE device")
def test_the_demo_on_tee0(unserved: DrivenGuest) -> None:
    said = unserved.run(["virtio-tee", "demo", "--device", "/dev/tee0", "--json"], timeout=120, check=False)
    found = json.loads(said.stdout)
    assert found["result"] == "ok", found
    assert found["tee"] == "linux"
    assert found["ta_loaded_over_rpc"] is True
    assert {rpc["command"] for rpc in found["rpcs"]} == {"LOAD_TA", "SHM_ALLOC", "SHM_FREE"}
    assert [step["ok"] for step in found["steps"]] == [True] * len(found["steps"])


def test_what_the_kernel_says_of_tee0(linux: DrivenGuest) -> None:
    found = json.loads(linux.run(["virtio-tee", "guest", "info", "--tee", "/dev/tee0", "--json"]).stdout)
    assert found["impl_id"] == 1
    assert found["gen_caps"] == 0xD
    assert not found["object_invoke"]  # of kernels newer than this one
    assert not found["shm_register_fd"]


def test_invoke_on_tee0(served: DrivenGuest) -> None:
    hello = "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
    said = served.run(["virtio-tee", "guest", "invoke", hello, "0", "inout:41", "--tee", "/dev/tee0", "--json"])
    assert json.loads(said.stdout) == [[42, 0, 0]]


@pytest.mark.feature("Linux TEE: `serve --tee linux` on a real /dev/tee0, with all kinds of calls and memory")
def test_a_backend_on_tee0(served: DrivenGuest) -> None:
    with_zero_copy, without = step(served, "nested")
    same = {
        "values": [2**40 + 1, 2**50 + 2],
        "temporary": "fefdfc",
        "large": True,
        "hash": True,
        "part": True,
        "scattered": True,
        "unregistered": "SUCCESS",
        "read only": True,
        "short": ["SHORT_BUFFER", 11],
        "null": "SUCCESS",
        "fail": ["0x10000001", 4],
        "no ta": ["ITEM_NOT_FOUND", 3],
        "user": ["ACCESS_DENIED", 2],
        "cancel": ["CANCEL", 4],
        "cancelled soon": True,
        "panic": ["TARGET_DEAD", 3],
        "after": ["TARGET_DEAD", 3],
    }
    # two temporary ones that were large enough to be registered, 1 MiB, and the same 1 MiB scattered
    assert with_zero_copy == {
        "options": [],
        **same,
        "placed": [["region copied read-only", 1], ["region in place", 4]],
    }
    assert without == {
        "options": ["--no-zero-copy"],
        **same,
        "placed": [["region copied zero copy is switched off", 5]],
    }


@pytest.mark.feature("Linux TEE: many guests share a real /dev/tee0; one with calls that never end keeps none from it")
def test_many_guests_on_tee0(served: DrivenGuest) -> None:
    (found,) = step(served, "many")
    assert found == {
        "others": [1, 1, 2, 2, 3, 3],
        "cancelled": [["CANCEL", 4]] + [["CANCEL", 2]] * 5,  # one has had a thread, of two
        "left": {"calls": 0, "contexts": 0, "sessions": 0, "registrations": 0},
    }, found


@pytest.mark.feature("Broker: on a real /dev/teepriv0, TAs come from the guest that opens them")
def test_the_broker_on_teepriv0(unserved: DrivenGuest) -> None:
    (found,) = step(unserved, "broker")
    told = found.pop("told")
    assert found == {
        "without": ["ITEM_NOT_FOUND", 3],
        "hello": 42,
        "kept": "what is to be kept",
        "stored": True,
    }, found
    assert told == [
        "FS host: one TEE has one store",
        "LOAD_TA guest: it has told its size",
        "LOAD_TA guest: it opens that TA",
        "LOAD_TA host: no guest has it",
    ]


def test_no_such_device(unserved: DrivenGuest) -> None:
    said = unserved.run(["virtio-tee", "serve", "-s", "/tmp/x", "--tee", "linux:/dev/tee7"], check=False)
    assert said.returncode == 1
    assert "there is /dev/tee0: name that one" in said.stderr
    serving = supplicant(unserved)
    said = unserved.run(["virtio-tee", "supplicant", "--device", "/dev/teepriv0"], check=False)
    assert said.returncode == 1
    assert "another supplicant has it" in said.stderr
    serving.kill()
    serving.wait()
