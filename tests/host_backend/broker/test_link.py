"""A backend's link, against the broker itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tee.courier import Answer, Ask, Begins, CallKind, WireParam, Withdraw
from tee.io.broker_link import BrokerLink, Lost
from tee.results import Result
from tests.host_backend.broker.bench import TA, Bench, bench, size_of

pytestmark = pytest.mark.started


def until(condition: Callable[[], object]) -> None:
    for _ in range(5000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it did not happen")


class Backend:
    """Answers what its link brings, on a thread of its own."""

    def __init__(self, it: Bench, content: bytes | None) -> None:
        self.came: list[Ask | Withdraw | Lost] = []
        self._content = content
        self._woken = threading.Semaphore(0)
        self.link = BrokerLink(str(it.paths["a"]), self._woken.release)
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            self._woken.acquire()
            message = self.link.take()
            assert message is not None
            self.came.append(message)
            if isinstance(message, Ask) and self._content is not None:
                params = [message.params[0], WireParam(6, message.params[1].flags, len(self._content))]
                if message.params[1].a >= len(self._content):
                    params[1].content = self._content
                self.link.answer(Answer(message.ask, Result.SUCCESS, params))


def test_a_ta_of_many_bytes(tmp_path: Path) -> None:
    content = bytes(range(256)) * 16384  # 4 MiB
    with bench(tmp_path) as it:
        backend = Backend(it, content)
        assert backend.link.connected(10)
        backend.link.begins(Begins(1, CallKind.OPEN_SESSION, TA))
        assert size_of(it.ta_size()) == len(content)
        assert it.ta(len(content))[1] == content
        backend.link.ends(1)
        until(lambda: it.broker.usage["calls"] == 0)
        backend.link.close()
        until(lambda: it.broker.usage["backends"] == 0)


def test_a_broker_that_comes_later_and_again(tmp_path: Path) -> None:
    """Calls that are under way are told of to each."""
    with bench(tmp_path) as it:
        path = it.paths["a"]
        aside = path.with_suffix(".aside")
        path.rename(aside)
        backend = Backend(it, b"TA")
        backend.link.begins(Begins(7, CallKind.OPEN_SESSION, TA))
        assert not backend.link.connected(0.2)
        aside.rename(path)
        assert backend.link.connected(10)
        until(lambda: it.broker.usage["calls"] == 1)
        # The connection is lost, as when a broker dies.
        for connection in list(it.broker._connections.values()):
            it._token.run_sync_soon(connection.end)  # type: ignore[attr-defined]
        until(lambda: any(isinstance(message, Lost) for message in backend.came))
        until(lambda: it.broker.usage["calls"] == 1)
        assert size_of(it.ta_size()) == 2
        backend.link.close()


def test_what_is_no_longer_wanted_is_withdrawn(tmp_path: Path) -> None:
    with bench(tmp_path, guest_s=0.05) as it:
        backend = Backend(it, None)
        assert backend.link.connected(10)
        backend.link.begins(Begins(1, CallKind.OPEN_SESSION, TA))
        assert it.ta_size().code == Result.ITEM_NOT_FOUND
        until(lambda: len(backend.came) == 2)
        ask, withdraw = backend.came
        assert isinstance(ask, Ask)
        assert withdraw == Withdraw(ask.ask)
        backend.link.close()


def test_a_broker_that_makes_no_sense(tmp_path: Path) -> None:
    """It is left, and tried again."""
    import socket

    path = tmp_path / "nonsense.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        listener.settimeout(10)
        link = BrokerLink(str(path), lambda: None)
        for _ in range(2):
            connection, _ = listener.accept()
            with connection:
                connection.sendall(b"\xff" * 64)
                connection.settimeout(10)
                while connection.recv(4096):
                    pass
        assert not link.connected(0)
        link.close()
