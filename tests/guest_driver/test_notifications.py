"""Notifications as a client gets them: from a software TEE in this process, and through the device's rings."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from device.wire import Feature
from guest_driver.client import Context, Notifications, TempOut, ValueIn
from tee.io.notifications import MAX_WAITING
from tee.io.runtime import TeeRuntime
from tee.soft import SoftTee, examples
from tee.soft.ta import UUID, Direction, Parameters, TrustedApplication
from tests.guest_driver.live import live

PROBE = examples.UUIDS["probe"]


class Bell(TrustedApplication):
    """Rings value IN a, b times, c milliseconds after the other."""

    uuid = UUID(int=0xBE11)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        self.env.unmask_cancellation()
        asked = params.value(0, Direction.IN)
        for _ in range(asked.b):
            self.env.notify(asked.a)
            await self.env.sleep(asked.c / 1000)


BUILT_IN = {Bell.uuid: Bell, PROBE: examples.built_in("probe")[PROBE]}


@contextmanager
def direct(_: Path) -> Iterator[TeeRuntime]:
    with TeeRuntime(SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=BUILT_IN)) as runtime:
        yield runtime


@contextmanager
def over_rings(folder: Path) -> Iterator[TeeRuntime]:
    with live(folder, built_in=BUILT_IN) as device:
        driver = device.driver()
        assert Feature(driver._transport.features & 0xFF) & Feature.NOTIFICATION
        with TeeRuntime(driver) as runtime:
            yield runtime
        driver.close()


Way = Callable[[Path], AbstractContextManager[TeeRuntime]]
WAYS: list[Way] = [direct, over_rings]


@pytest.mark.feature("Notifications: the client API, over the device's rings and on a TEE of its own")
@pytest.mark.parametrize("way", WAYS)
def test_they_come_during_the_call(tmp_path: Path, way: Way) -> None:
    with way(tmp_path) as runtime, Context(runtime) as context, context.open_session(Bell.uuid) as session:
        with context.notifications() as all_, context.notifications(3, 4) as some:
            pending = session.begin(0, ValueIn(7, 1, 60_000))
            assert all_.wait(20) == 7
            pending.cancel()
            session.invoke(0, ValueIn(3, 2))
            assert some.wait(20) == 3
            assert all_.wait(20) == 3
            with pytest.raises(TimeoutError):
                some.wait(0)
            session.invoke(0, ValueIn(9, 1))
            assert all_.wait(20) == 9
        session.invoke(0, ValueIn(3, 1))  # nobody listens any more
        with pytest.raises(RuntimeError):
            all_.wait(1)


@pytest.mark.parametrize("way", WAYS)
def test_each_machine_hears_its_own(tmp_path: Path, way: Way) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with way(tmp_path / "a") as one, way(tmp_path / "b") as two:
        mine, theirs = one.notifications(), two.notifications()
        with Context(one) as context, context.open_session(Bell.uuid) as session:
            session.invoke(0, ValueIn(1, 1))
        assert mine.wait(20) == 1
        with pytest.raises(TimeoutError):
            theirs.wait(0)


@pytest.mark.fault("notification-storm")
def test_a_storm(tmp_path: Path) -> None:
    """A TA that raises all values again and again: each waits once, and calls and their memory get through."""
    with over_rings(tmp_path) as runtime, Context(runtime) as context:
        heard = context.notifications()
        with context.open_session(Bell.uuid) as bell, context.open_session(PROBE) as probe:
            storm = [bell.begin(0, ValueIn(value, 200)) for value in range(256)]
            for _ in range(20):
                assert probe.invoke(5, TempOut(16), ValueIn(3))[0] == b"ZZZ"
            for one in storm:
                one.wait(60)
        values = {heard.wait(20) for _ in range(256)}
        assert values == set(range(256))


def test_a_listener_is_bounded() -> None:
    listener = Notifications(frozenset(), lambda _: None)
    for value in range(10 * MAX_WAITING):
        listener.take(value)
        listener.take(0)
    assert len(listener._waiting) == MAX_WAITING
    assert [listener.wait(0) for _ in range(3)] == [0, 1, 2]


def test_closing_wakes_who_waits(tmp_path: Path) -> None:
    with direct(tmp_path) as runtime:
        listener = runtime.notifications()
        ended: list[str] = []

        def wait() -> None:
            try:
                listener.wait(20)
            except RuntimeError as error:
                ended.append(str(error))

        thread = threading.Thread(target=wait)
        thread.start()
        runtime.close()
        thread.join(10)
        assert len(ended) == 1
        with pytest.raises(RuntimeError):
            runtime.notifications()
