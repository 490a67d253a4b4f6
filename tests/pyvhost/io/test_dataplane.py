"""The loop: round robin, timers, robust against what it calls."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator

import pytest

from pyvhost.errors import MessageError, StateError
from pyvhost.io.dataplane import DataPlane


@pytest.fixture
def plane() -> Iterator[DataPlane]:
    with DataPlane() as plane:
        yield plane


def settle(plane: DataPlane, turns: int = 1) -> None:
    for _ in range(turns):
        done = threading.Event()
        plane.post(done.set)
        assert done.wait(10)


def test_posted_calls_come_in_order(plane: DataPlane) -> None:
    seen: list[int] = []
    for n in range(1000):
        plane.post(lambda n=n: seen.append(n))  # type: ignore[misc]
    settle(plane)
    assert seen == list(range(1000))


def test_errors_are_logged_and_harm_nobody(plane: DataPlane, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    fd = os.eventfd(1)
    seen: list[str] = []
    plane.post(lambda: 1 / 0)
    plane.post(lambda: plane.wake(lambda: 1 / 0))
    plane.post(lambda: plane.wake(lambda: seen.append("woken")))
    plane.post(lambda: plane.watch(fd, lambda: 1 / 0, edge=True))
    settle(plane, 3)
    plane.post(lambda: plane.unwatch(fd))
    settle(plane)
    os.close(fd)
    assert seen == ["woken"]
    assert len(caplog.records) == 3


def test_edges_come_with_every_write_and_need_no_read(plane: DataPlane) -> None:
    fd = os.eventfd(0)
    edges = threading.Semaphore(0)
    plane.post(lambda: plane.watch(fd, edges.release, edge=True))
    settle(plane)
    for _ in range(50):
        os.eventfd_write(fd, 1)
        assert edges.acquire(timeout=10)
    settle(plane, 3)
    assert not edges.acquire(blocking=False)
    plane.post(lambda: plane.unwatch(fd))
    plane.post(lambda: plane.unwatch(fd))  # harmless
    settle(plane)
    os.set_blocking(fd, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fd)  # no old kick is left for whoever polls next
    os.close(fd)


def test_what_cannot_be_polled(plane: DataPlane) -> None:
    errors: list[Exception] = []

    def attempt(fd: int) -> None:
        try:
            plane.watch(fd, print)
        except MessageError as e:
            errors.append(e)

    with open("/proc/self/exe", "rb") as file:
        plane.post(lambda: attempt(file.fileno()))
        plane.post(lambda: attempt(-1))
        settle(plane)
    assert len(errors) == 2


class Work:
    def __init__(self, *waits: float | None) -> None:
        self.waits = list(waits)
        self.touched = False
        self.runs = 0
        self.done = threading.Event()

    def run(self) -> float | None:
        self.runs += 1
        if not self.waits:
            self.done.set()
            return None
        return self.waits.pop(0)


def test_runners_are_called_when_due_or_touched(plane: DataPlane) -> None:
    work = Work(0, 0, 0.001, 0.002)
    plane.post(lambda: plane.add_runner(work))
    assert work.done.wait(10)
    settle(plane, 2)
    assert work.runs == 5

    def touch() -> None:
        work.touched = True

    plane.post(touch)
    settle(plane, 2)
    assert work.runs == 6
    plane.post(lambda: plane.remove_runner(work))
    plane.post(touch)
    settle(plane, 2)
    assert work.runs == 6


def test_a_runner_that_fails_harms_nobody(plane: DataPlane, caplog: pytest.LogCaptureFixture) -> None:
    class Broken:
        touched, calls = False, 0

        def run(self) -> float | None:
            self.calls += 1
            raise ValueError("broken")

    broken, work = Broken(), Work(0)
    plane.post(lambda: plane.add_runner(broken))
    plane.post(lambda: plane.add_runner(work))
    assert work.done.wait(10)
    settle(plane, 5)
    assert work.runs == 2
    assert broken.calls == 1  # and again after a while, not at once
    assert "error in the data plane" in caplog.text


def test_busy_work_starves_nobody(plane: DataPlane) -> None:
    counts = [0, 0]
    stop = False

    def busy(n: int) -> None:
        counts[n] += 1
        if not stop:
            plane.wake(lambda: busy(n))

    plane.post(lambda: [busy(0), busy(1)])
    settle(plane, 200)
    stop = True
    settle(plane, 3)
    assert min(counts) > 100
    assert abs(counts[0] - counts[1]) <= 1


def test_start_and_stop(no_fd_leak: None) -> None:
    plane = DataPlane()
    plane.stop()
    plane.start()
    with pytest.raises(StateError):
        plane.start()
    seen: list[int] = []
    plane.post(lambda: seen.append(1))
    plane.stop()
    plane.stop()
    assert seen == [1]
    with pytest.raises(StateError):
        plane.post(print)
    with pytest.raises(StateError):
        plane.start()


def test_alone_is_whoever_holds_up_nobody(plane: DataPlane) -> None:
    first, second = os.eventfd(0), os.eventfd(0)
    seen: list[tuple[int, bool]] = []
    called = threading.Semaphore(0)

    def note(which: int) -> None:
        seen.append((which, plane.alone()))
        called.release()

    def both() -> None:
        os.eventfd_write(first, 1)
        os.eventfd_write(second, 1)

    def watch() -> None:
        plane.watch(first, lambda: note(1), edge=True)
        plane.watch(second, lambda: note(2), edge=True)

    plane.post(watch)
    settle(plane)
    os.eventfd_write(first, 1)
    assert called.acquire(timeout=10)
    plane.post(both)  # from the thread itself, so that one turn sees both
    for _ in range(2):
        assert called.acquire(timeout=10)
    assert seen[0] == (1, True)
    assert sorted(seen[1:]) == [(1, False), (2, False)]
    settle(plane)
    os.close(first)
    os.close(second)
