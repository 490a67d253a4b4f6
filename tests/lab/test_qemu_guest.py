"""A real Debian guest under the lab's QEMU: its user-space driver on the PCI device, the backend outside."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lab.qemu.guest import Guest, GuestConfig
from lab.tas import TA_FOLDER
from tee import package
from tee.soft.examples import UUIDS, source
from tests.lab.kit import Backend, furnish

pytestmark = pytest.mark.lab

HELLO = str(UUIDS["hello_world"])
INVOKE = ["virtio-tee", "guest", "invoke", HELLO, "0", "inout:41", "--json"]


def run_script(guest: Guest, name: str, timeout: float = 90) -> dict[str, object]:
    """Run one of our scripts in the guest; what it prints is JSON."""
    found = json.loads(guest.run(["python3", f"/root/{name}.py"], timeout=timeout).stdout)
    assert isinstance(found, dict)
    return found


@pytest.mark.feature("Guests: user-space driver (uio_pci_generic) in a Debian guest under QEMU")
def test_the_device_is_found_and_tells_what_it_is(guest: Guest) -> None:
    facts = json.loads(guest.run(["virtio-tee", "guest", "info", "--json"]).stdout)
    assert facts["kind"] == 1
    assert facts["impl_id"] == 1


@pytest.mark.feature("TEE calls: TAs are loaded from the guest's supplicant over RPC")
def test_the_main_job(guest: Guest, backend: Backend) -> None:
    before = len(backend.ended("LOAD_TA"))
    report = json.loads(guest.run(["virtio-tee", "guest", "demo", "--json"], timeout=120).stdout)
    assert report["ok"], report["why"]
    assert len(report["steps"]) >= 9
    loads = backend.ended("LOAD_TA")[before:]
    assert len(loads) == 6  # twice for each of three TAs
    assert {e["args"]["answered_by"] for e in loads} == {"guest"}


CONTRACT = {"result", "path", "tee", "requests", "ta_loaded_over_rpc", "rpcs", "steps", "elapsed_s"}


@pytest.mark.feature("Commands: `virtio-tee demo --device`, the main job on a guest's real device")
def test_the_demo_on_the_device(guest: Guest, backend: Backend) -> None:
    """What the guest's driver counts is what the backend has seen."""
    requests, rpcs = (len(of_lane(backend, lane)) for lane in ("requests", "RPCs"))
    seen = json.loads(guest.run(["virtio-tee", "demo", "--device", "--json"], timeout=120).stdout)
    assert set(seen) == CONTRACT
    assert (seen["result"], seen["path"], seen["tee"], seen["ta_loaded_over_rpc"]) == ("ok", "virtio", "soft", True)
    assert len(seen["steps"]) >= 9
    assert all(step["ok"] for step in seen["steps"])
    commands = [rpc["command"] for rpc in seen["rpcs"]]
    assert commands.count("LOAD_TA") == 6
    assert {(rpc["answered_by"], rpc["result"]) for rpc in seen["rpcs"]} == {("guest", "SUCCESS")}
    assert seen["requests"] == len(of_lane(backend, "requests")) - requests
    assert sorted(commands) == sorted(event["name"] for event in of_lane(backend, "RPCs")[rpcs:])


def test_the_demo_on_the_device_without_a_ta(guest: Guest, backend: Backend) -> None:
    random = f"{TA_FOLDER}/{UUIDS['random']}.ta"
    guest.run(["rm", random])
    try:
        address = guest.run(["sh", "-c", "cd /sys/bus/pci/drivers/uio_pci_generic && ls -d 0*"]).stdout.strip()
        failed = guest.run(["virtio-tee", "demo", "--device", address, "--json"], timeout=120, check=False)
        assert failed.returncode == 1
        seen = json.loads(failed.stdout)
        assert set(seen) == CONTRACT | {"why"}
        assert "random" in seen["why"]
        assert "ITEM_NOT_FOUND" in seen["why"]
    finally:
        guest.put(random, backend.package("random"))


def test_the_demo_of_two_processes_in_a_guest(guest: Guest) -> None:
    seen = json.loads(guest.run(["virtio-tee", "demo", "--json"], timeout=120).stdout)
    assert set(seen) == CONTRACT
    assert seen["result"] == "ok"
    assert seen["ta_loaded_over_rpc"] is True


def test_the_guide_with_its_commands() -> None:
    """docs/qemu.md: TAs of a folder go into the guest as it boots."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        tas, backend = Path(folder) / "tas", Backend(Path(folder))
        tas.mkdir()
        backend.start()
        boot = [sys.executable, "-m", "lab.qemu", "boot", "--socket", str(backend.socket), "--ta-folder", str(tas)]
        none = subprocess.run(boot, capture_output=True, text=True, timeout=60, check=False)
        assert none.returncode == 1
        assert "no .ta file" in none.stderr
        for name in ("hello_world", "random", "probe"):
            (tas / f"{UUIDS[name]}.ta").write_bytes(backend.package(name))
        command = [*boot, "--", "virtio-tee", "demo", "--device", "--json"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["ta_loaded_over_rpc"] is True
        assert backend.stop() == 0


def of_lane(backend: Backend, lane: str) -> list[dict[str, object]]:
    """What has ended, of one lane of the backend's trace."""
    return [event for event in backend.trace() if event.get("cat") == lane and event["ph"] == "e"]


@pytest.mark.feature("TEE calls: values, temporary and registered memory up to 16 MiB")
def test_values_and_memory(guest: Guest) -> None:
    seen = run_script(guest, "memory")
    assert seen["add"] == [2**40 + 1, 2**50 + 2]
    assert seen["xor"] == {"0": True, "1": True, "4096": True, "65528": True, "1048576": True}
    assert seen["touched"] == [True, True]
    assert seen["part"] == "0000" + "80" * 6 + "81" + "80" * 5 + "0000"
    assert seen["short"] == ["SHORT_BUFFER", 11]
    # kinds (value OUT first is not counted): 6, 5, 1, 6, 3 at places 1 to 5; sizes 0 + 3 + 5
    assert seen["echo"] == [5, 6 * 1 + 5 * 2 + 1 * 3 + 6 * 4 + 3 * 5, 8]


@pytest.mark.parametrize("how", ["unsigned", "truncated", "other uuid", "other key"])
@pytest.mark.feature("TEE calls: a TA that is unsigned, cut short, of another UUID or key is refused")
def test_a_wrong_ta(guest: Guest, backend: Backend, how: str) -> None:
    good = backend.package("hello_world")
    stranger = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
    wrong = {
        "unsigned": source("hello_world"),
        "truncated": good[:-1],
        "other uuid": backend.package("random"),
        "other key": package.sign(source("hello_world"), UUIDS["hello_world"], 1, stranger.private),
    }[how]
    guest.put(f"{TA_FOLDER}/{HELLO}.ta", wrong)
    try:
        refused = guest.run(INVOKE, check=False)
        assert refused.returncode == 1
        expected = "BAD_FORMAT" if how in ("unsigned", "truncated") else "SECURITY"
        assert expected in refused.stderr
    finally:
        guest.put(f"{TA_FOLDER}/{HELLO}.ta", good)
    assert json.loads(guest.run(INVOKE).stdout) == [[42, 0, 0]]


@pytest.mark.requirement("DRV-RPC-2")
@pytest.mark.feature("Faults: a supplicant that is killed while the TEE waits for it")
@pytest.mark.fault("restarted-supplicant")
def test_a_killed_supplicant(guest: Guest) -> None:
    answers = run_script(guest, "killed_supplicant")
    assert answers["killed"] == "COMMUNICATION"
    assert answers["absent"] == "COMMUNICATION"
    assert answers["again"] == 2


@pytest.mark.feature("Faults: a guest that reboots in the middle of calls leaves nothing behind")
@pytest.mark.fault("guest-dies")
def test_a_reboot_in_the_middle_of_a_call(guest: Guest, backend: Backend) -> None:
    drained = len([e for e in backend.trace() if e["name"] == "drained"])
    holding = guest.spawn(["python3", "/root/hold.py"])
    holding.wait_for("holding", timeout=60)
    guest.reset()
    last = backend.wait_for("drained", drained + 1)[-1]
    assert {name: last["args"][name] for name in ("contexts", "sessions", "registrations", "calls", "rpcs")} == {
        "contexts": 0,
        "sessions": 0,
        "registrations": 0,
        "calls": 0,
        "rpcs": 0,
    }
    furnish(guest, backend)
    assert json.loads(guest.run(INVOKE).stdout) == [[42, 0, 0]]


@pytest.mark.feature("Faults: a paused guest goes on where it was")
@pytest.mark.fault("pause-in-call")
def test_a_pause_in_the_middle_of_a_call(guest: Guest, backend: Backend) -> None:
    """The call ends while the guest is paused; its answer comes when it goes on."""
    begun, ended, started = (len(backend.wait_for(n, 0, phase=p)) for n, p in _INVOKES)
    waiting = guest.spawn([*INVOKE[:3], str(UUIDS["probe"]), "4", "in:2000", "--json"])
    backend.wait_for("INVOKE", begun + 1, phase="b")
    guest.pause()
    assert len(backend.ended("INVOKE")) == ended
    backend.wait_for("INVOKE", ended + 1, phase="e")
    guest.resume()
    assert waiting.wait(60) == 0
    assert len(backend.wait_for("rings run", started)) > started


_INVOKES = (("INVOKE", "b"), ("INVOKE", "e"), ("rings run", "i"))


@pytest.mark.feature("Faults: a killed backend is started again under a running guest driver")
@pytest.mark.fault("backend-restart")
def test_the_backend_is_killed_and_started_again() -> None:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        backend = Backend(Path(folder))
        backend.start()
        with Guest(GuestConfig(sockets=[backend.socket])) as guest:
            furnish(guest, backend)
            running = guest.spawn(["python3", "/root/restarted_backend.py"])
            running.wait_for("waiting")
            backend.stop(signal.SIGKILL)
            backend.start()
            assert running.wait(60) == 0, running.stderr
            seen = json.loads(running.stdout.splitlines()[-1])
            assert seen["in flight"] in ("COMMUNICATION", "TARGET_DEAD")
            assert seen["old session"] in ("COMMUNICATION", "TARGET_DEAD")
            assert seen["epochs differ"]
            assert seen["fresh session"] == 2
        assert backend.stop() == 0
