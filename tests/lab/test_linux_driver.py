"""The kernel driver in a real Debian guest (x86-64, two CPUs): clients, supplicant, and all that can go wrong."""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.driven import DrivenGuest
from tests.lab.kit import Backend
from tests.lab.linux import complaints, ended, linux_guest, step, supplicant, told
from tests.lab.tests_on_tee0 import test_a_backend_on_tee0, test_the_demo_on_tee0  # noqa: F401

pytestmark = pytest.mark.lab
requirement = pytest.mark.requirement

TARGET_DEAD = "TARGET_DEAD"
ACCESS_PLATFORM, RING_PACKED = 33, 34
#: what tests/lab/guest/client.c says
C_CLIENT = [
    "version 1 0xd",
    "open 0",
    "hello 0 42",
    "close_session 0",
    "no_ta 0xffff0008",
    "login_user 0",
    "close_session 0",
    "open_probe 0",
    f"add 0 4 {2**40 + 1} {2**50 + 2}",
    "fail 0x10000001 4",
    "close_session 0",
    "close_session 22",
    "shm_alloc 12288 1",
    "xor_allocated 0 1 5000",
    "short_buffer 0xffff0010 11",
    "outside -22",
    "echo 0 3 25 33",
    f"shm_register {(8 << 20) - 456}",
    f"xor_registered 0 1 {5 << 20}",
    "beside 1",
    "closed -22",
    "bad_address 14",
    "empty 1",
    "close_session 0",
    "cancel_nothing 2",
    "cancel 0xffff0002",
    "close_session 0",
    "panic 0xffff3024 3",
    "after_panic 0xffff3024",
]


@pytest.fixture(scope="module")
def linux(backend: Backend) -> Iterator[DrivenGuest]:
    with linux_guest(backend) as guest:
        yield guest


def device(guest: DrivenGuest) -> str:
    """The virtio device's name."""
    return guest.run(["sh", "-c", "basename /sys/bus/virtio/drivers/virtio_tee/virtio*"]).stdout.strip()


def usage(backend: Backend) -> int:
    """Contexts that clients have opened and not closed."""
    return len(backend.ended("OPEN_CONTEXT")) - len(backend.ended("CLOSE_CONTEXT"))


@pytest.mark.feature("Guests: Linux kernel driver, clients on the ioctls of /dev/tee0")
@requirement("DRV-REQ-1")
@pytest.mark.call("TEE_IOC_VERSION", "TEE_IOC_OPEN_SESSION", "TEE_IOC_INVOKE", "TEE_IOC_CLOSE_SESSION")
@pytest.mark.call("TEE_IOC_CANCEL", "TEE_IOC_SHM_ALLOC", "TEE_IOC_SHM_REGISTER")
def test_a_client_in_c(served: DrivenGuest) -> None:
    said = served.run(["/root/client"]).stdout.splitlines()
    assert said == C_CLIENT


@pytest.mark.feature("Guests: Linux kernel driver, TAs are loaded over RPC from the supplicant on /dev/teepriv0")
@requirement("DRV-RPC-3", "DRV-RPC-6")
@pytest.mark.call("TEE_IOC_SUPPL_RECV", "TEE_IOC_SUPPL_SEND", "TEE_IOC_OPEN_SESSION", "TEE_IOC_INVOKE")
def test_a_ta_is_loaded_over_teepriv(served: DrivenGuest, backend: Backend) -> None:
    before = len(backend.ended("LOAD_TA"))
    assert told(served, "hello") == {"open": "SUCCESS", "value": 42}
    loads = backend.ended("LOAD_TA")[before:]
    assert len(loads) == 2
    assert {load["args"]["answered_by"] for load in loads} == {"guest"}


def test_many_calls_at_a_time(served: DrivenGuest) -> None:
    assert told(served, "many", timeout=120) == {"wrong": []}


UNTOUCHED = {"codes": [0, 0], "beside": True, "hashed": True, "afterwards": True}


def test_what_a_client_writes_meanwhile_stays(served: DrivenGuest) -> None:
    assert told(served, "untouched") == UNTOUCHED


@requirement("DRV-SES-1")
@pytest.mark.call("TEE_IOC_OPEN_SESSION", "TEE_IOC_CLOSE_SESSION", "TEE_IOC_INVOKE", "TEE_IOC_SHM_ALLOC")
def test_system_calls_that_make_no_sense(served: DrivenGuest) -> None:
    assert told(served, "abuse") == {
        "no session": "BAD_PARAMETERS",
        "close": "Invalid argument",
        "close none": "Invalid argument",
        "unknown type": "Invalid argument",
        "unknown bits": "Invalid argument",
        "no memory": "Invalid argument",
        "kernel login": "Operation not permitted",
        "strange login": "Invalid argument",
        "nothing": "Invalid argument",
        "too much": "Cannot allocate memory",
        "far too much": "Invalid argument",
        "null": "SUCCESS",
        "meta": "SUCCESS",
        "another's memory": "Invalid argument",
        "another's session": "BAD_PARAMETERS",
    }
    assert told(served, "hello")["value"] == 42


def test_more_clients_than_the_device_takes(served: DrivenGuest) -> None:
    found = told(served, "contexts")
    assert found == {"count": 255, "refused": "Device or resource busy"}  # one of 256 is the supplicant's


@pytest.mark.feature("Guests: Linux kernel driver, the kernel's own TEE clients")
def test_a_client_in_the_kernel(served: DrivenGuest) -> None:
    served.run(["insmod", "/root/vtee_test.ko"])
    try:
        said = served.run(["cat", "/sys/module/vtee_test/parameters/result"]).stdout
    finally:
        served.run(["rmmod", "vtee_test"])
    assert said.strip().split(";")[:-1] == [
        "hello 0 0x0",
        "add 0 0x0 42",
        "close 0",
        "kernel 0 0xffff0001",  # the device refuses a guest's REE_KERNEL
        "probe 0 0x0",
        "allocated 0 0x0 0",
        "outside -22",
        "registered 0 0x0 0",
        "outside -22",
    ]


@pytest.mark.feature("Guests: Linux kernel driver, a client that is killed in a call")
@requirement("DRV-CTX-1", "DRV-CTX-2")
def test_a_killed_client(served: DrivenGuest, backend: Backend) -> None:
    """The call is cancelled, the context closed; the memory is given back after that and not before."""
    open_before, cancelled = usage(backend), len(backend.wait_for("CANCEL", 0))
    holding = step(served, "hold")
    backend.wait_for("INVOKE", 1, phase="b")
    time.sleep(0.5)
    holding.kill(signal.SIGKILL)
    assert holding.wait(10) == -signal.SIGKILL
    backend.wait_for("CANCEL", cancelled + 1)
    end = time.monotonic() + 20
    while usage(backend) > open_before:
        assert time.monotonic() < end, "the context is not closed"
        time.sleep(0.1)
    assert backend.ended("INVOKE")[-1]["args"]["ret"] == "CANCEL"
    assert told(served, "hello")["value"] == 42


@requirement("DRV-MEM-1")
def test_killed_clients_leave_no_memory_behind(served: DrivenGuest) -> None:
    found = told(served, "killed_clients", timeout=120)
    lost = found["lost_mib"]
    assert isinstance(lost, int)
    assert lost < 40  # of 135 that were shared


def test_a_supplicant_without_meta_parameters(unserved: DrivenGuest) -> None:
    plain = step(unserved, "plain_supplicant")
    assert told(unserved, "hello")["value"] == 42
    plain.kill()
    plain.wait()
    assert complaints(unserved) == []


@pytest.mark.feature("Guests: Linux kernel driver, a supplicant that is missing, dies, or answers nonsense")
@requirement("DRV-RPC-1")
def test_no_supplicant(unserved: DrivenGuest) -> None:
    found = told(unserved, "hello")
    assert found["open"] == "ITEM_NOT_FOUND"
    serving = supplicant(unserved)
    assert told(unserved, "second_supplicant") == {"error": "Device or resource busy"}
    assert told(unserved, "hello")["value"] == 42
    serving.kill()
    serving.wait()
    assert complaints(unserved) == []


@requirement("DRV-RPC-2")
def test_a_supplicant_that_dies_while_the_tee_waits(unserved: DrivenGuest, backend: Backend) -> None:
    stuck = step(unserved, "stuck_supplicant")
    client = unserved.spawn(["python3", "-u", "/root/linux_steps.py", "hello"])
    stuck.wait_for("stuck")
    stuck.kill(signal.SIGKILL)
    stuck.wait()
    assert ended(client)["open"] == "COMMUNICATION"
    serving = supplicant(unserved)
    assert told(unserved, "hello")["value"] == 42
    serving.kill()
    serving.wait()
    assert complaints(unserved) == []


@requirement("DRV-RPC-7")
def test_a_supplicant_that_answers_too_late(unserved: DrivenGuest, backend: Backend) -> None:
    """The device withdraws the RPC after its deadline; the late answer changes nothing."""
    before = len(backend.wait_for("RPC_WITHDRAWN_ACK", 0))
    late = step(unserved, "late_supplicant")
    assert told(unserved, "hello")["open"] == "COMMUNICATION"
    late.wait_for("late", 30)
    assert len(backend.wait_for("RPC_WITHDRAWN_ACK", before + 1)) == before + 1
    assert told(unserved, "hello")["value"] == 42
    late.kill()
    late.wait()
    assert complaints(unserved) == []


def test_a_supplicant_that_answers_nonsense(unserved: DrivenGuest) -> None:
    bad = step(unserved, "bad_supplicant")
    assert told(unserved, "hello")["open"] in ("OUT_OF_MEMORY", "COMMUNICATION")
    assert ended(bad) == {
        "nothing asked": "No such file or directory",
        "first": 0,
        "other request": "No such file or directory",
        "too few": "Invalid argument",
        "second": 6,
        "twice": "No such file or directory",
    }
    assert complaints(unserved) == []


@pytest.mark.feature("Guests: Linux kernel driver, suspend and resume")
def test_suspend_and_resume(served: DrivenGuest) -> None:
    """Calls under way end, sessions are gone; whoever comes afterwards is served."""
    lost = step(served, "lose")
    served.run(["insmod", "/root/vtee_test.ko", "what=suspend"])
    served.run(["rmmod", "vtee_test"])
    found = ended(lost)
    # whether the client, which is not frozen here, runs again before the device does
    assert found.pop("more memory") in ("Stale file handle", "No such device")
    assert found == {
        "in flight": TARGET_DEAD,
        "old session": TARGET_DEAD,
        "with memory": TARGET_DEAD,
        "close": None,
    }


def test_after_the_resume(served: DrivenGuest) -> None:
    assert told(served, "hello")["value"] == 42


@pytest.mark.feature("Guests: Linux kernel driver, the device is removed with calls in flight")
def test_the_device_is_removed(unserved: DrivenGuest) -> None:
    serving = supplicant(unserved)
    lost = step(unserved, "lose")
    name = device(unserved)
    removing = unserved.spawn(["sh", "-c", f"echo {name} > /sys/bus/virtio/drivers/virtio_tee/unbind"])
    assert ended(lost) == {
        "in flight": TARGET_DEAD,
        "old session": TARGET_DEAD,
        "with memory": TARGET_DEAD,
        "more memory": "No such device",
        "close": None,
    }
    assert serving.wait() == 0  # it sees that the device has gone
    assert removing.wait() == 0
    assert unserved.run(["sh", "-c", "ls /dev/tee*"], check=False).returncode != 0
    unserved.run(["sh", "-c", f"echo {name} > /sys/bus/virtio/drivers/virtio_tee/bind"])
    serving = supplicant(unserved)
    assert told(unserved, "hello")["value"] == 42
    assert unserved.run(["rmmod", "virtio_tee"], check=False).returncode != 0  # in use
    serving.kill()
    serving.wait()
    unserved.run(["rmmod", "virtio_tee"])
    unserved.run(["insmod", "/root/virtio_tee.ko"])
    assert complaints(unserved) == []


@pytest.mark.feature("Guests: Linux kernel driver, the backend is killed and started again")
@requirement("DRV-EPO-1", "DRV-INI-1")
def test_the_backend_is_killed_and_started_again() -> None:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        backend = Backend(Path(name))
        backend.start()
        with linux_guest(backend) as guest:
            serving = supplicant(guest)
            lost = step(guest, "lose")
            backend.stop(signal.SIGKILL)
            backend.start()
            found = ended(lost)
            assert found["in flight"] in ("COMMUNICATION", TARGET_DEAD)
            assert found["old session"] == TARGET_DEAD
            assert found["with memory"] == TARGET_DEAD
            assert found["more memory"] == "Stale file handle"
            # the supplicant was not started again
            assert told(guest, "hello")["value"] == 42
            assert serving.poll() is None
            assert complaints(guest) == []
        assert backend.stop() == 0


@pytest.mark.feature("Guests: Linux kernel driver, packed rings, two request queues, VIRTIO_F_ACCESS_PLATFORM")
def test_packed_rings_two_request_queues_and_bounced_memory() -> None:
    """Without indirect descriptors; the kernel is told to let devices reach its bounce buffers only."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        backend = Backend(Path(name), "--request-queues", "2", platform=True)
        backend.start()
        options = "packed=on,indirect_desc=off,iommu_platform=on"
        with linux_guest(backend, options, queues=2, append="swiotlb=force") as guest:
            features = guest.run(["cat", f"/sys/bus/virtio/devices/{device(guest)}/features"]).stdout
            assert features[ACCESS_PLATFORM : RING_PACKED + 1] == "11"
            assert guest.run(["grep", "-c", f"{device(guest)}-request", "/proc/interrupts"]).stdout.strip() == "2"
            supplicant(guest)
            assert told(guest, "many", timeout=120) == {"wrong": []}
            assert told(guest, "untouched") == UNTOUCHED
            assert guest.run(["/root/client"]).stdout.splitlines() == C_CLIENT
            assert complaints(guest) == []
        assert backend.stop() == 0
