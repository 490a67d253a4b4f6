"""The kernel driver under Debian's user-mode-linux 6.1: the tests of it that ask nothing of a machine, and a lost device."""

from __future__ import annotations

import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.driven import DrivenGuest
from tests.lab.kit import Backend
from tests.lab.linux import complaints, ended, step, supplicant, told, uml_guest
from tests.lab.test_linux_driver import (
    TARGET_DEAD,
    test_a_client_in_c,
    test_a_client_in_the_kernel,
    test_a_killed_client,
    test_a_supplicant_that_answers_nonsense,
    test_a_supplicant_that_dies_while_the_tee_waits,
    test_a_supplicant_without_meta_parameters,
    test_a_ta_is_loaded_over_teepriv,
    test_after_the_resume,
    test_killed_clients_leave_no_memory_behind,
    test_many_calls_at_a_time,
    test_more_clients_than_the_device_takes,
    test_no_supplicant,
    test_suspend_and_resume,
    test_system_calls_that_make_no_sense,
    test_the_device_is_removed,
)

pytestmark = pytest.mark.lab


@pytest.fixture(scope="module")
def linux(backend: Backend) -> Iterator[DrivenGuest]:
    with tempfile.TemporaryDirectory(prefix="vtee-") as folder, uml_guest(backend, Path(folder)) as guest:
        yield guest


@pytest.mark.feature("Guests: Linux kernel driver, user-mode-linux loses the device of a killed backend")
def test_the_backend_is_killed() -> None:
    with tempfile.TemporaryDirectory(prefix="vtee-", dir="/tmp") as name:
        backend = Backend(Path(name))
        backend.start()
        with uml_guest(backend, Path(name)) as guest:
            serving = supplicant(guest)
            lost = step(guest, "lose")
            backend.stop(signal.SIGKILL)
            print(ended(lost))
            print(serving.wait())
            print(guest.run(["sh", "-c", "ls /dev/tee*"], check=False))
            print(guest.run(["dmesg"]).stdout[-2000:])
            assert complaints(guest) == []
            assert 0
