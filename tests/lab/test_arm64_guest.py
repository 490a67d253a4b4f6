"""A Debian guest of another architecture than the host's: the same user-space driver, on an arm64 CPU."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from device.wire import DEVICE_ID
from lab.arch import AARCH64
from lab.qemu.guest import Guest, GuestConfig
from tests.lab.kit import Backend, furnish

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def guest(backend: Backend) -> Iterator[Guest]:
    with Guest(GuestConfig(sockets=[backend.socket], arch=AARCH64)) as booted:
        furnish(booted, backend)
        yield booted


def test_the_device_is_there(guest: Guest) -> None:
    assert guest.run(["uname", "-m"]).stdout == "aarch64\n"
    ids = guest.run(["sh", "-c", "cat /sys/bus/pci/drivers/uio_pci_generic/0*/device"]).stdout.split()
    assert [int(found, 16) for found in ids] == [0x1040 + DEVICE_ID]
    facts = json.loads(guest.run(["virtio-tee", "guest", "info", "--json"]).stdout)
    assert (facts["kind"], facts["impl_id"]) == (1, 1)


@pytest.mark.feature("Guests: arm64, too, whose CPU reorders what a driver writes to a ring")
def test_the_demo_on_the_device(guest: Guest, backend: Backend) -> None:
    before = len(backend.ended("LOAD_TA"))
    seen = json.loads(guest.run(["virtio-tee", "demo", "--device", "--json"], timeout=120).stdout)
    assert (seen["result"], seen["path"], seen["ta_loaded_over_rpc"]) == ("ok", "virtio", True)
    loads = backend.ended("LOAD_TA")[before:]
    assert len(loads) == 6  # twice for each of three TAs
    assert {load["args"]["answered_by"] for load in loads} == {"guest"}


def test_a_reset_in_between(guest: Guest, backend: Backend) -> None:
    boot = guest.boot_id
    guest.reset()
    assert guest.boot_id != boot
    furnish(guest, backend)
    assert json.loads(guest.run(["virtio-tee", "demo", "--device", "--json"], timeout=120).stdout)["result"] == "ok"


def test_it_powers_off(backend: Backend) -> None:
    """The guest itself ends its machine; what is left of it in the backend is nothing."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        mine = Backend(Path(folder))
        mine.start()
        with Guest(GuestConfig(sockets=[mine.socket], arch=AARCH64)) as booted:
            booted.spawn(["poweroff", "-f"])
            booted.wait_ended(30)
        assert mine.stop() == 0
