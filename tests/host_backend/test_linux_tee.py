"""Guests of a TEE device of Linux, over real sockets; the kernel with its TEE is a table."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from device.machines import LifeState
from device.wire import ParamType, Status
from guest_driver.client import CallError, Context, TempInOut, ValueIn
from guest_driver.core import VirtioTeeDriver
from guest_driver.vhost_user import VhostUserTransport
from host_backend.trace import Recorder
from pyvhost.memory import GuestMemory
from tee.calls import Login
from tee.driver import TeeInfo
from tee.io.linux_driver import LinuxTeeDriver
from tee.io.runtime import TeeRuntime
from tee.params import Direction
from tee.results import Origin, Result, TeeError
from tests.guest_driver.live import live
from tests.host_backend.bench import PROBE, RAM, Bench, StartedOnly
from tests.tee.io.fake_kernel import FLIP, WAIT, FakeKernel, Ta

PATIENCE = 10
TA = "00000000-0000-0000-0000-000000000001"

pytestmark = pytest.mark.started


@pytest.fixture
def ta() -> Iterator[Ta]:
    one = Ta()
    yield one
    one.go.set()


@pytest.fixture
def kernel(tmp_path: Path, ta: Ta) -> FakeKernel:
    return FakeKernel(tmp_path, ta)


class Regions(Recorder):
    """Notes how regions are used."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, int, str]] = []

    def placed(self, vm: str, size: int, why: str) -> None:
        self.seen.append((vm, size, why))


def hang_up(driver: VirtioTeeDriver) -> None:
    """The frontend's end of the connection, as the backend sees it."""
    transport = driver._transport
    assert isinstance(transport, VhostUserTransport)
    with socket.socket(fileno=os.dup(transport._peer_fd)) as connection:
        connection.shutdown(socket.SHUT_RDWR)


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it does not happen"
        time.sleep(0.005)


@pytest.mark.parametrize("zero_copy", [True, False])
def test_calls_and_memory(tmp_path: Path, kernel: FakeKernel, zero_copy: bool) -> None:
    with closing(LinuxTeeDriver(kernel.open, zero_copy=zero_copy)) as tee, live(tmp_path, tee=tee) as device:
        device.router.trace = regions = Regions()
        driver = device.driver()
        assert driver.info.kind == 2
        with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(TA) as session:
            assert session.invoke(FLIP, TempInOut(b"\x01"))[0] == b"\xfe"
            with context.allocate(10_000) as shared:
                shared.write(b"\x0f" * 10_000)
                session.invoke(FLIP, shared.part(Direction.INOUT, 1, 9_998))
                assert shared.read() == b"\x0f" + b"\xf0" * 9_998 + b"\x0f"
        driver.close()
        assert regions.seen == [("guest", 10_000, "" if zero_copy else "zero copy is switched off")]


class PublicOnly(StartedOnly):
    """A TEE that cannot be told of other logins."""

    @property
    def info(self) -> TeeInfo:
        return replace(super().info, logins=frozenset({Login.PUBLIC}))


@pytest.mark.requirement("DEV-SES-4")
def test_logins_that_the_tee_cannot_be_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bench, "tee_type", PublicOnly)
    guest = Bench().guest()
    context = guest.open_context()
    for login in (Login.USER, Login.GROUP, Login.APPLICATION, 77):
        assert guest.open(context, PROBE, client_login=login).status == Status.DENIED
    assert guest.open(context, PROBE, client_login=Login.PUBLIC).ret == 0


def test_logins_are_refused(tmp_path: Path, kernel: FakeKernel) -> None:
    tee = LinuxTeeDriver(kernel.open, logins=frozenset({Login.PUBLIC}))
    with closing(tee), live(tmp_path, tee=tee) as device:
        driver = device.driver()
        with TeeRuntime(driver) as runtime, Context(runtime) as context:
            for login in (Login.USER, Login.GROUP, Login.APPLICATION):
                with pytest.raises(TeeError) as refused:
                    context.open_session(TA, login=login)
                assert (refused.value.code, refused.value.origin) == (Result.ACCESS_DENIED, Origin.COMMS)
            with context.open_session(TA):
                assert [login for login, _ in kernel.sessions.values()] == [Login.PUBLIC]
        driver.close()


@pytest.mark.parametrize("zero_copy", [True, False])
def test_a_guest_that_goes_in_mid_call(tmp_path: Path, kernel: FakeKernel, ta: Ta, zero_copy: bool) -> None:
    """The TEE does not listen, and writes when it likes: in place it does so to the guest's memory, and the next guest
    waits for that; with copies nothing is written any more."""
    ta.deaf = True
    with closing(LinuxTeeDriver(kernel.open, zero_copy=zero_copy)) as tee, live(tmp_path, tee=tee) as device:
        driver = device.driver()
        with TeeRuntime(driver) as runtime:
            context = Context(runtime)
            session = context.open_session(TA)
            shared = context.allocate(5000)
            view = shared.view()
            session.begin(WAIT, ValueIn(7), shared.whole(Direction.INOUT))
            until(lambda: 7 in ta.inside)
            hang_up(driver)
            until(lambda: device.device.life is LifeState.DRAINING)
            assert bytes(view) == bytes(5000)
            ta.go.set()
            until(lambda: not any(tee.usage().values()))
            until(lambda: device.device.life is LifeState.FRESH)
            assert set(view) == ({0x77} if zero_copy else {0})
        del view, shared
        driver.close()
        again = device.driver()
        with TeeRuntime(again) as other, Context(other) as fresh, fresh.open_session(TA) as one:
            assert one.invoke(FLIP, TempInOut(b"\x01"))[0] == b"\xfe"
        again.close()
    assert not kernel.sessions


def test_what_may_have_run(tmp_path: Path, kernel: FakeKernel) -> None:
    """A call that was interrupted: the guest is told that it may have run."""
    with closing(LinuxTeeDriver(kernel.open)) as tee, live(tmp_path, tee=tee) as device:
        driver = device.driver()
        with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(TA) as session:
            real, kernel._invoke = kernel._invoke, _interrupted  # type: ignore[method-assign]
            with pytest.raises(CallError, match="it may have run"):
                session.invoke(FLIP)
            kernel._invoke = real  # type: ignore[method-assign]
            session.invoke(FLIP)
        driver.close()


def test_pages_that_a_call_has_written_are_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it has ended, before its answer is there; those that it could only read are not."""
    monkeypatch.setattr(Bench, "tee_type", StartedOnly)
    bench = Bench()
    guest = bench.guest()
    written: list[tuple[int, int]] = []
    regions = guest.memory.regions
    guest.device.memory = GuestMemory(regions, dirty=lambda address, length: written.append((address, length)))
    context = guest.open_context()
    session = guest.open_session(context)
    region = guest.register(context, (RAM, 64), (RAM + 0x3000, 64)).response.ident()
    assert guest.invoke(context, session, 0, (ParamType.MEMREF_IN, 0, 9, region)).ret == 0
    assert written == []
    params = (ParamType.MEMREF_INOUT, 0, 9, region), (ParamType.VALUE_IN, 1, 0, 0)
    assert guest.invoke(context, session, 2, *params).ret == 0
    assert written == [(RAM, 64), (RAM + 0x3000, 64)]


def _interrupted(data: bytearray) -> None:
    raise InterruptedError(4, "interrupted")
