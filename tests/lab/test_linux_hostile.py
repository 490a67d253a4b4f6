"""The kernel driver and a device that breaks the rules: calls end with an error, the kernel goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.qemu.guest import Guest
from tee.results import Result
from tests.lab.linux import bare_guest, complaints, step, told

pytestmark = pytest.mark.lab
requirement = pytest.mark.requirement

DEVICE = Path(__file__).with_name("hostile_device.py")
BROKEN = [
    "used 0",
    "used too little",
    "used too much",
    "returned twice",
    "another request returned",
    "out of the ring",
    "fewer parameters",
    "another type",
    "more than there is room for",
    "another offset",
    "context 0",
    "session 0",
    "region twice",
    "rpc 0",
    "rpc cut short",
    "rpc with a strange parameter",
    "too many rpcs",
    "an event of 3 bytes",
]
ANSWERS_TO_CALLS = BROKEN[: BROKEN.index("context 0")]


@dataclass
class Hostile:
    """A guest, and the file that says how its device lies."""

    guest: Guest
    lie_file: Path

    def lie(self, how: str) -> None:
        self.lie_file.write_text(how)

    def load(self) -> bool:
        """Load the driver anew; whether it took the device."""
        self.guest.run(["rmmod", "virtio_tee"], check=False)
        self.guest.run(["insmod", "/root/virtio_tee.ko"])
        return self.guest.run(["sh", "-c", "ls /dev/tee0"], check=False).returncode == 0

    def replies(self, count: int) -> dict[int, list[int]]:
        """Answers to RPCs by their ids, once there are so many: result and words of the first parameter."""
        path = self.lie_file.with_suffix(".replies")
        end = time.monotonic() + 10
        while True:
            lines = path.read_text().splitlines() if path.exists() else []
            if len(lines) >= count:
                return {int(line.split()[0]): [int(n) for n in line.split()[1:]] for line in lines}
            assert time.monotonic() < end, lines
            time.sleep(0.05)

    def log(self) -> str:
        return self.guest.run(["dmesg"]).stdout


@pytest.fixture(scope="module")
def booted() -> Iterator[Hostile]:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        socket, lie = Path(name) / "tee.sock", Path(name) / "lie"
        lie.write_text("")
        argv = [sys.executable, "-m", "tests.lab.hostile_device", "--socket-path", str(socket), "--lie", str(lie)]
        env = {**os.environ, "PYVHOST_QUEUE": "pure"}
        device = subprocess.Popen(argv, stderr=subprocess.PIPE, text=True, cwd=DEVICE.parents[2], env=env)
        try:
            assert device.stderr is not None
            assert "ready" in device.stderr.readline()
            with bare_guest(socket) as guest:
                yield Hostile(guest, lie)
        finally:
            device.send_signal(signal.SIGTERM)
            device.communicate(timeout=20)


@pytest.fixture
def hostile(booted: Hostile) -> Iterator[Hostile]:
    booted.lie("")
    booted.lie_file.with_suffix(".replies").unlink(missing_ok=True)
    assert booted.load()
    booted.guest.run(["dmesg", "-c"])
    yield booted
    booted.lie("")
    assert booted.load()
    assert told(booted.guest, "once") == {"session": "SUCCESS", "call": "SUCCESS", "same": True}
    assert complaints(booted.guest) == []


@pytest.mark.feature("Guests: Linux kernel driver, a device that breaks the rules")
@pytest.mark.parametrize("how", BROKEN)
@requirement("DRV-QUE-4", "DRV-PAR-1")
def test_a_device_that_breaks_the_rules_is_not_used_any_more(hostile: Hostile, how: str) -> None:
    hostile.lie(how)
    found = told(hostile.guest, "once")
    end = time.monotonic() + 10
    while "the device is not used any more" not in hostile.log():
        assert time.monotonic() < end, found
        time.sleep(0.1)
    if how in ANSWERS_TO_CALLS:
        assert found["call"] == "TARGET_DEAD"
        assert found["error"] == "No such device"
    assert hostile.guest.run(["cat", "/dev/tee0"], check=False).stderr.strip().endswith("No such device")


@pytest.mark.parametrize("how", ["events", "unknown status"])
@requirement("DRV-EVT-2", "DRV-REQ-7")
def test_what_a_driver_puts_up_with(hostile: Hostile, how: str) -> None:
    hostile.lie(how)
    found = told(hostile.guest, "once")
    assert found["call"] == ("SUCCESS" if how == "events" else "COMMUNICATION")
    hostile.lie("")
    assert told(hostile.guest, "once")["call"] == "SUCCESS"
    assert "not used any more" not in hostile.log()


@requirement("DRV-RPC-1")
def test_rpcs_that_nobody_serves(hostile: Hostile) -> None:
    hostile.lie("events")
    told(hostile.guest, "once")
    assert hostile.replies(7) == {
        1: [Result.BAD_PARAMETERS],
        2: [Result.ITEM_NOT_FOUND],
        3: [Result.OUT_OF_MEMORY],
        4: [Result.SUCCESS],
        5: [Result.BAD_PARAMETERS],
        6: [Result.BAD_PARAMETERS],
        7: [Result.NOT_SUPPORTED],
    }


@requirement("DRV-RPC-5")
def test_rpcs_that_the_driver_serves(hostile: Hostile) -> None:
    hostile.lie("own rpcs")
    began = time.time()
    told(hostile.guest, "once")
    replies = hostile.replies(9)
    result, seconds, nanoseconds, _ = replies.pop(1)
    assert result == Result.SUCCESS
    assert abs(seconds - began) < 60
    assert nanoseconds < 10**9
    assert replies == {
        2: [Result.SUCCESS, 200, 0, 0],
        3: [Result.SUCCESS, 0, 5, 0],
        4: [Result.BAD_PARAMETERS],
        5: [Result.SUCCESS, 1, 5, 0],
        6: [Result.SUCCESS, 1, 5, 0],
        7: [Result.SUCCESS, 0, 5, 0],
        8: [0xFFFF3001],  # TEE_ERROR_TIMEOUT of OP-TEE
        9: [Result.BAD_PARAMETERS],
    }


@pytest.mark.parametrize("how", ["magic", "version", "huge events", "no limits"])
@requirement("DRV-ID-1", "DRV-ID-2")
def test_a_device_that_is_another_one(hostile: Hostile, how: str) -> None:
    hostile.lie(how)
    assert not hostile.load()


@pytest.mark.parametrize("how", ["no answer", "no answer to anything"])
def test_a_device_that_does_not_answer(hostile: Hostile, how: str) -> None:
    """A client can be killed, and the device be taken away."""
    hostile.lie("no answer")
    waiting = step(hostile.guest, "stay")
    time.sleep(0.5)
    hostile.lie(how)
    waiting.kill(signal.SIGKILL)
    assert waiting.wait(20) == -signal.SIGKILL
    hostile.guest.run(["rmmod", "virtio_tee"], timeout=20)
