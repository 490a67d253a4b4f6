"""The middle way: control over virtio, data over FF-A."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ffa.abi.ids import PAGE_SIZE, Error
from ffa.optee.client import share
from guest_driver.client import CallError, Context, TempIn, TempInOut, TempOut, ValueIn, ValueInOut, Words
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.ocalls import Ocall
from guest_driver.vhost_user import VhostUserTransport
from pyvhost.errors import FormatError
from tee import package
from tee.calls import OpenContext, RegisterMemory
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Services
from tee.memory import Memory
from tee.params import Direction
from tee.results import Result, TeeError
from tee.soft import SoftTee, examples
from tests.guest_driver.live import live
from virtio_tee import scenario
from virtio_tee.attach import supplicant_of
from virtio_tee.ffa_tee import PARTITION
from virtio_tee.middle import MiddleGuest

PROBE = examples.UUIDS["probe"]
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
MARK = b"only for the TEE"


def soft(**options: object) -> SoftTee:
    built_in = examples.built_in()
    return SoftTee(clock=time.monotonic, random=secrets.token_bytes, **{"built_in": built_in, **options})  # type: ignore[arg-type]


@pytest.fixture
def guest() -> Iterator[MiddleGuest]:
    """At its end all that the guest has shared was taken back."""
    with MiddleGuest(soft()) as guest:
        yield guest
    check_empty(guest)


def check_empty(guest: MiddleGuest) -> None:
    deadline = time.monotonic() + 10
    while any(guest.ffa.usage().values()) and time.monotonic() < deadline:
        time.sleep(0.005)
    assert not any(guest.ffa.usage().values())
    guest.memory._take_back()
    assert guest.memory.lost == 0
    left = [r for r in guest.ffa.hypervisor.transactions.regions.values() if r.descriptor.sender == guest.endpoint.id]
    assert left == []


def ram(guest: MiddleGuest) -> bytes:
    """All of the guest's memory that its device can read."""
    transport = guest.driver._transport
    assert isinstance(transport, VhostUserTransport)
    return bytes(transport._ram.at(transport._ram.guest_addr, transport._ram.size))


@pytest.mark.feature("FF-A: the middle way, control over virtio and no byte of data where the host could read it")
def test_no_byte_passes_through_the_device(guest: MiddleGuest) -> None:
    flipped = bytes(b ^ 0xFF for b in MARK)
    with TeeRuntime(guest.driver) as runtime, Context(runtime, register_from=1) as context:
        with context.open_session(PROBE) as session:
            for size in (1, 5000, 100_000):
                data = (MARK * (size // len(MARK) + 1))[:size]
                assert session.invoke(2, TempInOut(data), ValueIn(0xFF))[0] == bytes(b ^ 0xFF for b in data)
            assert session.invoke(2, TempInOut(b""), ValueIn(0))[0] == b""
            with pytest.raises(CallError) as caught:
                session.invoke(5, TempOut(4), ValueIn(9))
            assert (caught.value.code, caught.value.sizes[0]) == (Result.SHORT_BUFFER, 9)
            with context.allocate(10_000) as shared:
                shared.write(MARK * 100)
                session.invoke(2, shared.whole(Direction.INOUT), ValueIn(0xFF))
                assert shared.read(0, len(MARK)) == flipped
            assert session.invoke(11, TempIn(MARK * 5), TempOut(32))[1]
        seen = ram(guest)
    assert MARK not in seen
    assert flipped not in seen
    assert len(seen) >= 64 << 20


def test_a_ta_calls_its_client(guest: MiddleGuest) -> None:
    """Parameters that an OCALL names, and memory that it asks for, are shared by FF-A too."""

    def handler(ocall: Ocall) -> None:
        memory = ocall.memory(0)
        memory.write(bytes(b ^ 0xFF for b in memory.read()))

    with TeeRuntime(guest.driver) as runtime, Context(runtime, register_from=1) as context:
        with context.open_session(examples.UUIDS["ocall"]) as session, context.allocate(8192) as shared:
            shared.write(MARK * 10)
            session.invoke(0, ValueInOut(1), shared.part(Direction.INOUT, 0, 100), ocalls=handler)
            assert shared.read(0, 100) == bytes(b ^ 0xFF for b in (MARK * 10)[:100])
            (words,) = session.invoke(1, ValueInOut(1, 5000), ocalls=handler)
            assert words == Words(1, Result.SUCCESS, sum(~at & 0xFF for at in range(5000)))
        seen = ram(guest)
    assert MARK not in seen
    assert bytes(range(256)) not in seen


def test_what_travels_in_requests_is_seen(guest: MiddleGuest) -> None:
    """So the test above can see a byte that does pass."""
    with TeeRuntime(guest.driver) as runtime, Context(runtime) as context, context.open_session(PROBE) as session:
        session.invoke(2, TempInOut(MARK), ValueIn(0xFF))
        assert MARK in ram(guest)


def test_tas_are_loaded_into_shared_memory(tmp_path: Path) -> None:
    """The main job, with a supplicant: what it answers SHM_ALLOC with is shared by FF-A too."""
    for name in ("hello_world", "random", "probe"):
        uuid = examples.UUIDS[name]
        (tmp_path / f"{uuid}.ta").write_bytes(package.sign(examples.source(name), uuid, 1, KEYS.private))
    with MiddleGuest(soft(built_in={}, keys=[KEYS.public])) as guest:
        report = scenario.Report()
        supplicant = supplicant_of(Services(ta_folders=(str(tmp_path),)))
        with TeeRuntime(guest.driver, supplicant, report.observe) as runtime:
            scenario.run(scenario.main_job, runtime, report)
            assert b"TrustedApplication" not in ram(guest)  # of a TA's source
        supplicant.close()
        assert report.why == ""
        assert {e["what"] for e in report.events if e["kind"] == "rpc"} >= {"LOAD_TA", "SHM_ALLOC", "SHM_FREE"}
    check_empty(guest)


def test_memory_that_the_guest_has_shared_by_itself(guest: MiddleGuest) -> None:
    vm = guest.ffa.vms["guest"]
    pages = vm.arena().allocate(2 * PAGE_SIZE)  # not of guest.memory's: at the same place, but before it is used
    handle = share(guest.endpoint, PARTITION, pages.ranges, tag=99)
    with TeeRuntime(guest.driver) as runtime, Context(runtime) as context, context.open_session(PROBE) as session:
        for given, size, tag, code in (
            (handle + 1, 2 * PAGE_SIZE, 99, Result.ITEM_NOT_FOUND),
            (handle, 2 * PAGE_SIZE, 0, Result.ITEM_NOT_FOUND),
            (handle, PAGE_SIZE, 99, Result.BAD_PARAMETERS),
        ):
            with pytest.raises(TeeError) as caught:
                context.register_handle(given, size, tag=tag)
            assert caught.value.code == code
        with context.register_handle(handle, 2 * PAGE_SIZE, tag=99) as shared:
            with pytest.raises(TeeError) as caught:
                context.register_handle(handle, 2 * PAGE_SIZE, tag=99)
            assert caught.value.code == Result.BUSY
            session.invoke(2, shared.part(Direction.INOUT, 0, 100), ValueIn(0x11))
            assert pages.read(0, 101) == b"\x11" * 100 + b"\0"
            with pytest.raises(ValueError, match="no mapping"):
                shared.read()
            assert guest.endpoint.reclaim(handle).error is Error.DENIED
        assert guest.endpoint.reclaim(handle).ok


@pytest.mark.requirement("DRV-FFA-1")
def test_nothing_is_reclaimed_that_is_registered(guest: MiddleGuest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even asked for: the driver waits until UNREGISTER_MEMORY or CLOSE_CONTEXT was returned."""
    asked: list[tuple[int, bool]] = []
    reclaim = guest.endpoint.reclaim

    def watched(handle: int, flags: int = 0) -> object:
        answer = reclaim(handle, flags)
        asked.append((handle, answer.ok))
        return answer

    monkeypatch.setattr(guest.endpoint, "reclaim", watched)
    with TeeRuntime(guest.driver) as runtime:
        context = runtime.call(OpenContext()).value
        one = runtime.allocate_registered(context, 100)
        two = runtime.allocate(100)
        runtime.release(one)  # too early
        assert asked == []
        assert runtime.call(RegisterMemory(context=context, memory=two)).code == 0
        runtime.release_registered(context, two)
        assert len(asked) == 1
    assert len(asked) == 2
    assert all(ok for _, ok in asked)


@pytest.mark.fault("guest-dies")
def test_a_driver_that_is_closed_with_memory_registered() -> None:
    """What the TEE still has then is nobody else's until it has let go of it."""
    with MiddleGuest(soft()) as guest:
        runtime = TeeRuntime(guest.driver)
        context = runtime.call(OpenContext()).value
        memories: list[Memory] = [runtime.allocate_registered(context, 100) for _ in range(3)]
        runtime._run_on_owner(guest.driver.close)
        for memory in memories:
            runtime.release(memory)
        runtime.close()
    check_empty(guest)


def test_a_device_that_takes_no_handles(tmp_path: Path, guest: MiddleGuest) -> None:
    with live(tmp_path) as device:
        transport = VhostUserTransport(device.path, wanted=int(DRIVER_FEATURES))
        with pytest.raises(FormatError, match="--ffa-vm"):
            VirtioTeeDriver(transport, memory=guest.memory)
        transport.close()
        driver = device.driver()
        with TeeRuntime(driver) as runtime, Context(runtime) as context, pytest.raises(TeeError) as caught:
            context.register_handle(1, PAGE_SIZE)
        assert caught.value.code == Result.NOT_SUPPORTED
        driver.close()
