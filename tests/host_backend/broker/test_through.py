"""From a Linux TEE that loads a TA, by way of the broker and a backend, to a guest's supplicant, and back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from device.config import Limits
from guest_driver.client import CallError, Context
from tee.io.broker_rpcs import BrokerRpcs
from tee.io.linux_driver import LinuxTeeDriver
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Supplicant
from tee.results import Result, TeeError
from tests.guest_driver.live import Live, live
from tests.host_backend.broker.bench import TA, Bench, bench, size_of
from tests.tee.io.fake_kernel import FakeKernel, Ta

pytestmark = pytest.mark.started


class LoadingKernel(FakeKernel):
    """Its TEE loads the TA of each session by RPC, as OP-TEE does: its size, then its bytes."""

    broker: Bench
    loaded: dict[UUID, bytes]
    codes: list[int]

    def _opened(self, argument: Any) -> None:
        uuid = UUID(bytes=bytes(argument.uuid))
        reply = self.broker.ta_size(uuid)
        if reply.code == Result.SUCCESS:
            reply, data = self.broker.ta(size_of(reply), uuid)
            self.loaded[uuid] = data
        self.codes.append(reply.code)
        if reply.code != Result.SUCCESS:
            argument.ret, argument.ret_origin = reply.code, 3
            return
        super()._opened(argument)


class Host:
    """A broker, the TEE, and a backend of its own for each VM."""

    def __init__(self, stack: ExitStack, folder: Path, it: Bench, limits: Limits | None = None) -> None:
        self.it = it
        self.kernel = LoadingKernel(folder, Ta())
        self.kernel.broker, self.kernel.loaded, self.kernel.codes = it, {}, []
        self.tees: dict[str, LinuxTeeDriver] = {}
        self.devices: dict[str, Live] = {}
        for vm, path in it.paths.items():
            rpcs = BrokerRpcs(str(path))
            tee = stack.enter_context(closing(LinuxTeeDriver(self.kernel.open, rpcs=rpcs)))
            assert rpcs.link.connected(10)
            where = folder / f"{vm}-device"
            where.mkdir()
            self.tees[vm] = tee
            self.devices[vm] = stack.enter_context(live(where, limits, tee=tee))


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    with bench(tmp_path, guest_s=2.0) as it, ExitStack() as stack:
        yield Host(stack, tmp_path, it)


def until(condition: Callable[[], object]) -> None:
    for _ in range(5000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it did not happen")


def folder_of(tmp_path: Path, vm: str, content: bytes) -> Path:
    folder = tmp_path / f"{vm}-tas"
    folder.mkdir()
    (folder / f"{TA}.ta").write_bytes(content)
    return folder


@pytest.mark.feature("Broker: a host's TEE loads a guest's TA from that guest")
def test_each_guest_gives_its_own_ta(tmp_path: Path, host: Host) -> None:
    """The host's folder has none; one guest after the other, with another TA of the same UUID."""
    for vm in ("a", "b"):
        content = vm.encode() * 70_000
        driver = host.devices[vm].driver()
        with TeeRuntime(driver, Supplicant([folder_of(tmp_path, vm, content)])) as runtime, Context(runtime) as context:
            context.open_session(TA).close()
        driver.close()
        assert host.kernel.loaded.pop(TA) == content
    assert host.kernel.codes == [Result.SUCCESS] * 2
    assert host.it.routes.told == [
        ("a/guest", "guest: it opens that TA"),
        ("a/guest", "guest: it has told its size"),
        ("b/guest", "guest: it opens that TA"),
        ("b/guest", "guest: it has told its size"),
    ]
    until(lambda: host.it.broker.usage["calls"] == 0)
    for tee in host.tees.values():
        until(lambda tee=tee: not any(tee.usage().values()))  # type: ignore[misc]


def test_a_guest_without_the_ta(host: Host) -> None:
    driver = host.devices["a"].driver()
    with TeeRuntime(driver, Supplicant([])) as runtime, Context(runtime) as context:
        with pytest.raises(CallError) as missing:
            context.open_session(TA)
        assert missing.value.code == Result.ITEM_NOT_FOUND
    driver.close()


def test_a_guest_without_a_supplicant_gets_the_hosts(tmp_path: Path, host: Host) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    driver = host.devices["a"].driver()
    with TeeRuntime(driver) as runtime, Context(runtime) as context:
        context.open_session(TA).close()
    driver.close()
    assert host.kernel.loaded == {TA: b"the host's"}


class Stalls(Supplicant):
    """Takes longer than it may."""

    def serve(self, *args: Any) -> Any:
        time.sleep(2.5)
        return super().serve(*args)


def test_a_guest_that_stalls(tmp_path: Path, host: Host) -> None:
    """Costs its own call no more than its time, and others nothing."""
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    slow, quick = host.devices["a"].driver(), host.devices["b"].driver()
    tas = folder_of(tmp_path, "b", b"b's")
    with (
        TeeRuntime(slow, Stalls([])) as one,
        TeeRuntime(quick, Supplicant([tas])) as other,
        Context(one) as first,
        Context(other) as second,
    ):
        first.open_session(TA).close()
        assert host.kernel.loaded.pop(TA) == b"the host's"
        second.open_session(TA).close()
        assert host.kernel.loaded.pop(TA) == b"b's"
    slow.close()
    quick.close()
    assert ("nobody: no answer in time", Result.COMMUNICATION) in host.it.routes.ended


def test_a_guest_that_goes_in_the_middle(tmp_path: Path, host: Host) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    driver = host.devices["a"].driver()
    runtime = TeeRuntime(driver, Stalls([]))
    context = Context(runtime)

    def opens() -> None:
        with suppress(TeeError):
            context.open_session(TA)

    opening = threading.Thread(target=opens, daemon=True)
    opening.start()
    until(lambda: host.it.routes.told)
    driver.close()
    until(lambda: host.kernel.codes)
    runtime.close()
    opening.join(10)
    until(lambda: not any(host.tees["a"].usage().values()))
    again = host.devices["a"].driver()
    with TeeRuntime(again) as fresh, Context(fresh) as one:
        one.open_session(TA).close()
    again.close()
