"""VMs' vCPUs on threads of their own."""

from __future__ import annotations

import sys
import threading

import pytest

from ffa.roles.locked import Locked
from guest_driver.client import Context, TempInOut, ValueIn
from tee.io.runtime import TeeRuntime
from tee.soft import examples
from tests.ffa.optee.bench import Path

PROBE = examples.UUIDS["probe"]
CALLS = 60


class Watched:
    """A lock that counts those who are inside, and how often somebody else was."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.entered = 0

    def __enter__(self) -> None:
        self.lock.acquire()
        self.entered += 1

    def __exit__(self, *error: object) -> None:
        self.lock.release()


@pytest.mark.feature("FF-A: VMs with threads of their own, whose calls enter one at a time")
def test_vms_on_threads() -> None:
    """Each VM's driver has a thread of its own; the interpreter changes threads as often as it can."""
    path, lock = Path(vms=3), Watched()
    inside: list[int] = []
    honest = path.hypervisor.call

    def call(*arguments: object) -> object:
        assert not inside, "two VMs are inside the model at once"
        inside.append(1)
        try:
            return honest(*arguments)  # type: ignore[arg-type]
        finally:
            inside.pop()

    path.hypervisor.call = call  # type: ignore[method-assign, assignment]
    for guest in path.guests:
        guest.endpoint.relayer = Locked(path.hypervisor, lock)
    drivers = [path.driver(n).driver for n in range(3)]
    wrong: list[str] = []

    def work(number: int) -> None:
        with TeeRuntime(drivers[number]) as runtime, Context(runtime) as context:
            for round in range(CALLS):
                with context.open_session(PROBE) as session:
                    data = bytes([number]) * 3000
                    if session.invoke(2, TempInOut(data), ValueIn(0xFF))[0] != bytes(b ^ 0xFF for b in data):
                        wrong.append(f"VM {number} in round {round}")

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)
    assert lock.entered > 3 * CALLS * 4
    for driver in drivers:
        driver.close()
    assert path.partition.usage() == {"threads": 0, "sessions": 0, "regions": 0, "lent": 0}
    assert not path.spmc.transactions.regions
    assert not path.hypervisor.transactions.regions
