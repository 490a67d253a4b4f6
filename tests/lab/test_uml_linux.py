"""The kernel driver under Debian's user-mode-linux 6.1: its tests that ask nothing of a machine, and a lost device."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.driven import DrivenGuest
from tests.lab import test_linux_driver as driver
from tests.lab.kit import Backend
from tests.lab.linux import complaints, ended, step, supplicant, uml_guest
from tests.lab.tests_on_tee0 import (  # noqa: F401
    test_a_backend_on_tee0,
    test_invoke_on_tee0,
    test_many_guests_on_tee0,
    test_no_such_device,
    test_the_broker_on_teepriv0,
    test_the_demo_on_tee0,
    test_what_the_kernel_says_of_tee0,
)

pytestmark = pytest.mark.lab

test_a_client_in_c = driver.test_a_client_in_c
test_a_client_in_the_kernel = driver.test_a_client_in_the_kernel
test_a_killed_client = driver.test_a_killed_client
test_a_supplicant_that_answers_nonsense = driver.test_a_supplicant_that_answers_nonsense
test_a_supplicant_that_dies_while_the_tee_waits = driver.test_a_supplicant_that_dies_while_the_tee_waits
test_a_supplicant_without_meta_parameters = driver.test_a_supplicant_without_meta_parameters
test_a_ta_is_loaded_over_teepriv = driver.test_a_ta_is_loaded_over_teepriv
test_many_calls_at_a_time = driver.test_many_calls_at_a_time
test_more_clients_than_the_device_takes = driver.test_more_clients_than_the_device_takes
test_no_supplicant = driver.test_no_supplicant
test_suspend_and_resume = driver.test_suspend_and_resume
test_after_the_resume = driver.test_after_the_resume
test_system_calls_that_make_no_sense = driver.test_system_calls_that_make_no_sense
test_what_a_client_writes_meanwhile_stays = driver.test_what_a_client_writes_meanwhile_stays
test_the_device_is_removed = driver.test_the_device_is_removed


@pytest.fixture(scope="module")
def backend() -> Iterator[Backend]:
    """The last test kills it."""
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as folder:
        made = Backend(Path(folder))
        made.start()
        yield made
        made.end()


@pytest.fixture(scope="module")
def linux(backend: Backend) -> Iterator[DrivenGuest]:
    with uml_guest(backend) as guest:
        yield guest


@pytest.mark.feature("Faults: user-mode-linux loses the TEE device of a killed backend, and clients are told")
def test_the_backend_is_killed(unserved: DrivenGuest, backend: Backend) -> None:
    """user-mode-linux does not connect again: it removes the device. Calls end, nobody hangs, the driver can go."""
    serving = supplicant(unserved)
    lost = step(unserved, "lose")
    assert complaints(unserved) == []
    backend.stop(signal.SIGKILL)
    assert ended(lost) == {
        "in flight": driver.TARGET_DEAD,
        "old session": driver.TARGET_DEAD,
        "with memory": driver.TARGET_DEAD,
        "more memory": "No such device",
        "close": None,
    }
    assert serving.wait() == 0
    assert unserved.run(["sh", "-c", "ls /dev/tee*"], check=False).returncode != 0
    unserved.run(["rmmod", "virtio_tee"])
    # user-mode-linux complains that it cannot tell the backend to stop the queues
    theirs = [line for line in complaints(unserved) if "arch/um/drivers/virtio_uml.c" in line]
    assert [line for line in complaints(unserved) if line not in theirs and "Call Trace" not in line] == []
