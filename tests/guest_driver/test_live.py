"""The driver against a real device, over a real vhost-user socket."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from device.config import Limits
from device.wire import Feature
from guest_driver.client import CallError, Context, TempInOut, TempOut, ValueIn, ValueInOut, ValueOut
from guest_driver.core import VirtioTeeDriver
from guest_driver.vhost_user import VhostUserTransport
from tee import package
from tee.calls import CloseContext, Invoke, OpenContext, OpenSession, RegisterMemory
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Supplicant
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.soft import examples
from tests.guest_driver.live import Live, live, over_ffa

HELLO, PROBE = examples.UUIDS["hello_world"], examples.UUIDS["probe"]
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))


@pytest.fixture(autouse=True, params=["soft", "ffa"])
def tee(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What ``--tee`` is, of the device and of a backend."""
    if request.param == "ffa":
        monkeypatch.setattr(Live, "reached", staticmethod(over_ffa))
    return str(request.param)


@pytest.mark.feature("Guest driver: all kinds of parameters over vhost-user")
@pytest.mark.parametrize(("queues", "queue_size"), [(1, 128), (3, 8)])
def test_parameters(tmp_path: Path, queues: int, queue_size: int) -> None:
    with live(tmp_path, queues=queues) as device:
        driver = device.driver(queue_size=queue_size)
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
            pending = [runtime.submit(Invoke(session=session._session, func=10, params=[Value(Direction.IN, 3)]))
                       for _ in range(60)]  # fmt: skip
            assert {one.wait(20).code for one in pending} == {Result.SUCCESS}
        assert driver.usage() == {"calls": 0, "registrations": 0, "rpcs": 0}
        driver.close()


def test_a_ta_over_rpc_and_a_missing_one(tmp_path: Path) -> None:
    (tmp_path / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 1, KEYS.private))
    with live(tmp_path, built_in=examples.built_in("random"), keys=[KEYS.public], threads=1) as device:
        driver = device.driver(queue_size=4)
        with TeeRuntime(driver, Supplicant([tmp_path])) as runtime, Context(runtime) as context:
            for _ in range(3):
                with context.open_session(HELLO) as session:
                    assert session.invoke(0, ValueInOut(41))[0] == (42, 0, 0)
            with pytest.raises(TeeError) as caught:
                context.open_session(PROBE)
            assert caught.value.code == Result.ITEM_NOT_FOUND
        driver.close()


def test_small_limits(tmp_path: Path) -> None:
    with live(tmp_path, Limits(max_calls=2, max_inline_bytes=64, max_contexts=1)) as device:
        driver = device.driver()
        with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(PROBE) as session:
            calls = [runtime.submit(Invoke(session=session._session, func=0)) for _ in range(50)]
            assert {one.wait(20).code for one in calls} == {Result.SUCCESS}
            with pytest.raises(TeeError) as caught:
                session.invoke(2, TempInOut(bytes(65)), ValueIn(0))
            assert caught.value.code == Result.OUT_OF_MEMORY
            assert runtime.call(OpenContext()).code == Result.OUT_OF_MEMORY
        driver.close()


def test_without_features(tmp_path: Path) -> None:
    with live(tmp_path) as device:
        driver = device.driver(wanted=0)
        with TeeRuntime(driver) as runtime, Context(runtime) as context, context.open_session(PROBE) as session:
            with pytest.raises(TeeError) as caught:
                session.invoke(2, TempInOut(bytes(65)), ValueIn(0))
            assert caught.value.code == Result.NOT_SUPPORTED
        driver.close()
        assert Feature(driver._transport.features & 0xFF) == Feature(0)


@pytest.mark.fault("guest-dies")
def test_a_guest_that_leaves_in_mid_call(tmp_path: Path) -> None:
    """``live`` sees to it that nothing of it stays."""
    with live(tmp_path) as device:
        for _ in range(2):
            driver = device.driver()
            runtime = TeeRuntime(driver)
            context = runtime.call(OpenContext()).value
            session = runtime.call(OpenSession(context=context, uuid=PROBE)).value
            memory = runtime.allocate(1 << 20)
            assert runtime.call(RegisterMemory(context=context, memory=memory)).code == 0
            params = [MemRef(Direction.INOUT, memory, 0, 8), Value(Direction.INOUT, 10**9)]
            pending = runtime.submit(Invoke(session=session, func=8, params=params))
            assert runtime.call(Invoke(session=runtime.call(OpenSession(context=context, uuid=PROBE)).value, func=0))
            runtime._run_on_owner(driver.close)
            done = pending.wait(10)
            assert (done.code, done.may_have_run) == (Result.COMMUNICATION, True)
            runtime.close()


@pytest.mark.requirement("DRV-CTX-1")
@pytest.mark.parametrize("how", ["ends", "fails", "forgets"])
def test_a_context_for_each_client(tmp_path: Path, how: str) -> None:
    """Neither reaches what is the other's, and each context is closed, however its client goes."""
    with live(tmp_path) as device:
        driver = device.driver()
        runtime = TeeRuntime(driver)
        one, other = Context(runtime), Context(runtime)
        sessions = [client.open_session(PROBE) for client in (one, other)]
        assert device.tee.usage()["contexts"] == 2
        with one.allocate(100) as shared, pytest.raises(TeeError) as caught:
            sessions[1].invoke(3, shared.whole(Direction.INOUT))
        assert caught.value.code == Result.BAD_PARAMETERS
        if how == "ends":
            one.close()
        elif how == "fails":
            with pytest.raises(ZeroDivisionError), one:
                raise ZeroDivisionError
        if how != "forgets":
            assert device.tee.usage()["contexts"] == 1
            assert sessions[1].invoke(1, ValueIn(2), ValueOut(), ValueInOut(4, 5))[1] == (0, 0, 2)
        runtime.close()
        assert device.tee.usage()["contexts"] == 0  # while the device goes on
        driver.close()


def test_it_leaks_no_descriptor(tmp_path: Path) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with live(tmp_path) as device:
        device.driver().close()
        before = count()
        for _ in range(3):
            device.driver().close()
        with pytest.raises(OSError):
            VhostUserTransport(str(tmp_path / "nobody"), wanted=0)
        deadline = time.monotonic() + 10  # the server's side closes some time later
        while count() > before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert count() <= before


@pytest.mark.feature("Guest driver: a backend that dies in mid-call ends all calls, nothing hangs")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
@pytest.mark.fault("backend-restart")
def test_a_backend_that_dies_in_mid_call(tmp_path: Path, how: int, tee: str) -> None:
    path = tmp_path / "s"
    (tmp_path / "key.pem").write_bytes(KEYS.public)
    (tmp_path / f"{PROBE}.ta").write_bytes(package.sign(examples.source("probe"), PROBE, 1, KEYS.private))
    command = [sys.executable, "-m", "virtio_tee", "serve", "--tee", tee, "-s", str(path)]
    command += ["--ta-key", str(tmp_path / "key.pem")]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        assert process.stderr.readline() == "virtio-tee: ready\n"
        driver = VirtioTeeDriver(VhostUserTransport(str(path), wanted=3))
        with TeeRuntime(driver, Supplicant([tmp_path])) as runtime:
            context = runtime.call(OpenContext()).value
            session = runtime.call(OpenSession(context=context, uuid=PROBE)).value
            calls = [runtime.submit(Invoke(session=session, func=4, params=[Value(Direction.IN)])) for _ in range(3)]
            assert runtime.call(OpenContext()).code == Result.SUCCESS
            process.send_signal(how)
            for call in calls:
                done = call.wait(10)
                assert (done.code, done.origin, done.may_have_run) == (Result.COMMUNICATION, Origin.COMMS, True)
            assert runtime.call(CloseContext(context=context), 10).code == Result.COMMUNICATION
            assert runtime.call(OpenContext(), 10).code == Result.COMMUNICATION
        driver.close()
        process.communicate(timeout=20)


def test_no_virtio_tee_device(tmp_path: Path) -> None:
    """Another backend at the socket: said at once."""
    from pyvhost.device import Device
    from pyvhost.errors import PyvhostError
    from pyvhost.io.sockets import Listener
    from tests.pyvhost.harness import Server

    class Other(Device):
        config_size = 128

    listener = Listener.at_path(tmp_path / "other")
    server = Server(Other(), listener)
    try:
        with pytest.raises(PyvhostError):
            VhostUserTransport(str(tmp_path / "other"), wanted=0)
    finally:
        server.close()
        listener.close()
