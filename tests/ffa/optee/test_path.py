"""What a VM's clients do, over hypervisor, SPMC and OP-TEE's partition."""

from __future__ import annotations

import os
from pathlib import Path as Folder

import pytest

from ffa.optee.client import share
from guest_driver.client import CallError, Context, TempInOut, TempOut, ValueIn, ValueInOut, ValueOut
from tee import package
from tee.calls import CloseContext, Invoke, RegisterMemory, UnregisterMemory
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Services, Supplicant
from tee.memory import FfaShare, Memory, Range
from tee.params import Direction, MemRef, Value
from tee.results import Result, TeeError
from tee.soft import SoftTee, examples
from tests.ffa.optee.bench import Path, soft_tee
from virtio_tee import scenario
from virtio_tee.attach import supplicant_of
from virtio_tee.report import Report

HELLO, PROBE = examples.UUIDS["hello_world"], examples.UUIDS["probe"]
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))


def nothing_left(path: Path) -> None:
    """No call, session or region in the partition; nothing in the TEE but the VM's one context."""
    assert path.partition.usage() == {"threads": 0, "sessions": 0, "regions": 0, "lent": 0}
    assert not path.spmc.transactions.regions
    assert not path.hypervisor.transactions.regions
    assert isinstance(path.tee, SoftTee)
    usage = path.tee.usage()
    assert {name: usage[name] for name in ("calls", "sessions", "registrations")} == {
        "calls": 0,
        "sessions": 0,
        "registrations": 0,
    }


@pytest.mark.feature("FF-A: OP-TEE over hypervisor, SPMC and partition, with TAs loaded over RPC")
def test_the_demo(tmp_path: Folder) -> None:
    for name in ("hello_world", "random", "probe"):
        uuid = examples.UUIDS[name]
        (tmp_path / f"{uuid}.ta").write_bytes(package.sign(examples.source(name), uuid, 1, KEYS.private))
    path = Path(soft_tee(built_in={}, keys=[KEYS.public]))
    driver = path.driver().driver
    report = Report()
    supplicant = supplicant_of(Services(ta_folders=(str(tmp_path),)))
    with TeeRuntime(driver, supplicant, report.observe) as runtime:
        scenario.run(scenario.main_job, runtime, report)
    supplicant.close()
    assert report.why == ""
    assert report.ok
    assert len(report.steps) == 9
    assert {e["what"] for e in report.events if e["kind"] == "rpc"} >= {"LOAD_TA", "SHM_ALLOC", "SHM_FREE"}
    assert driver.usage() == dict.fromkeys(driver.usage(), 0)
    driver.close()
    nothing_left(path)


@pytest.mark.feature("FF-A: OP-TEE over FF-A takes all kinds of parameters, and many calls at once")
def test_parameters() -> None:
    path = Path()
    driver = path.driver().driver
    with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(PROBE) as session:
        assert session.invoke(1, ValueIn(2), ValueOut(), ValueInOut(4, 5))[1:] == [(0, 0, 2), (4, 5, 9)]
        for size in (0, 1, 5000, 100_000):
            data = os.urandom(size)
            assert session.invoke(2, TempInOut(data), ValueIn(0xFF))[0] == bytes(b ^ 0xFF for b in data)
        with pytest.raises(CallError) as caught:
            session.invoke(5, TempOut(4), ValueIn(9))
        assert (caught.value.code, caught.value.sizes[0]) == (Result.SHORT_BUFFER, 9)
        with context.allocate(10_000) as shared:
            session.invoke(3, shared.whole(Direction.INOUT))
            assert shared.read(4096, 1) == b"\1"
        pending = [
            runtime.submit(Invoke(session=session._session, func=10, params=[Value(Direction.IN, 3)]))
            for _ in range(60)
        ]
        assert {one.wait(20).code for one in pending} == {Result.SUCCESS}
    driver.close()
    nothing_left(path)


def test_a_missing_ta(tmp_path: Folder) -> None:
    path = Path(soft_tee(built_in={}, keys=[KEYS.public], threads=1))
    driver = path.driver().driver
    with TeeRuntime(driver, Supplicant([tmp_path])) as runtime, Context(runtime) as context:
        with pytest.raises(TeeError) as caught:
            context.open_session(PROBE)
        assert caught.value.code == Result.ITEM_NOT_FOUND
    driver.close()
    nothing_left(path)


def test_two_vms() -> None:
    path = Path(vms=2)
    drivers = [path.driver(n).driver for n in range(2)]
    for driver in drivers:
        with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(HELLO) as session:
            assert session.invoke(0, ValueInOut(41))[0] == (42, 0, 0)
    for driver in drivers:
        driver.close()
    nothing_left(path)


def test_a_vm_that_dies() -> None:
    """In mid-call, with sessions and memory: the TEE lets go of it all, and the other VM goes on."""
    path = Path(vms=2)
    dying, other = path.driver(0), path.driver(1)
    context = dying.context()
    session = dying.session(context, PROBE)
    memory = dying.driver.allocate(5000)
    assert dying.call(RegisterMemory(context=context, memory=memory)).code == 0
    touch = Invoke(session=session, func=3, params=[MemRef(Direction.INOUT, memory, 0, 5000)])
    assert dying.call(touch).code == 0
    dying.driver.start(Invoke(session=session, func=4, params=[Value(Direction.IN)]))
    dying.run()
    theirs = other.session(other.context(), PROBE)
    for _ in range(10):
        if path.hypervisor.remove(1):
            break
    else:
        raise AssertionError("it is never gone")
    assert 1 not in path.partition.guests
    assert not path.partition._leaving
    assert {r.descriptor.sender for r in path.spmc.transactions.regions.values()} == {2}
    assert isinstance(path.tee, SoftTee)
    assert (path.tee.usage()["contexts"], path.tee.usage()["sessions"], path.tee.usage()["calls"]) == (1, 1, 0)
    assert other.call(Invoke(session=theirs, func=0)).code == 0
    for event in (dying.driver.run(), dying.driver.close()):  # its driver, too, comes to an end
        assert event is None or event >= 0


def test_a_vm_whose_memory_another_has_registered() -> None:
    """A host's device, say, for a guest: the guest dies first."""
    path = Path(vms=2)
    path.partition.proxies = {1: {2}}
    host, guest = path.driver(0), path.guests[1]
    handle = share(guest.endpoint, 0x8001, [Range(guest.base + 0x8000, 4096)])
    memory = Memory(size=4096, ffa=FfaShare(handle, owner=2))
    context = host.context()
    session = host.session(context, PROBE)
    assert host.call(RegisterMemory(context=context, memory=memory)).code == 0
    hold = Invoke(
        session=session, func=8, params=[MemRef(Direction.INOUT, memory, 0, 8), Value(Direction.INOUT, 10**9)]
    )
    host.driver.start(hold)
    host.run()
    assert not path.hypervisor.remove(2)  # a call uses it
    host.driver.cancel(hold)
    assert host.end_of(hold).code == Result.CANCEL
    assert any(path.hypervisor.remove(2) for _ in range(5))
    again = Invoke(session=session, func=8, params=[MemRef(Direction.INOUT, memory, 0, 8), Value(Direction.INOUT, 1)])
    assert host.call(again).code == Result.BAD_PARAMETERS
    assert host.call(UnregisterMemory(context=context, memory=memory)).code == 0
    assert host.call(CloseContext(context=context)).code == 0
