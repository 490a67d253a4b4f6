"""A supplicant's threads: what waits does not hold up the rest."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from pathlib import Path

import pytest

from tee.calls import Invoke, OpenContext, OpenSession
from tee.io.lanes import SOCKET_THREADS, Lanes
from tee.io.runtime import TeeRuntime
from tee.io.services import lookup, sockets
from tee.io.services.destinations import AllowList
from tee.io.services.lookup import MAX_LOOKUPS, Lookups
from tee.io.services.sockets import Protocol, SocketOperation, Sockets
from tee.io.supplicant import Services, Supplicant
from tee.io.supplicant_process import SupplicantProcess
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result, TeeError
from tee.rpc import Rpc, RpcCommand
from tee.soft import SoftTee
from tee.soft.ta import UUID, Parameters, TrustedApplication
from tests.tee.bench import HELLO
from tests.tee.io.test_sockets import UDP, Net, udp_peer
from tests.tee.io.test_supplicant import Pool

SOCKET, PLUGIN, LOAD, FS = RpcCommand.SOCKET, RpcCommand.PLUGIN, RpcCommand.LOAD_TA, RpcCommand.FS


class Work:
    """Items that wait until they are let; who runs is counted."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.begun: list[int] = []
        self.ended: list[int] = []
        self.changed = threading.Condition(self.lock)
        self.go_on: dict[int, threading.Event] = {}
        self.lanes: Lanes[int] = Lanes("test", self.serve)

    def put(self, command: int, item: int) -> None:
        self.go_on[item] = threading.Event()
        self.lanes.put(command, item)

    def serve(self, item: int) -> None:
        with self.changed:
            self.begun.append(item)
            self.changed.notify_all()
        assert self.go_on[item].wait(20)
        with self.changed:
            self.ended.append(item)
            self.changed.notify_all()
        if item < 0:
            raise ValueError("broken")

    def wait_for(self, what: list[int], count: int) -> None:
        with self.changed:
            assert self.changed.wait_for(lambda: len(what) >= count, 10)

    def let(self, *items: int) -> None:
        for item in items:
            self.go_on[item].set()

    def close(self) -> None:
        self.let(*self.go_on)
        self.lanes.close(10)


@pytest.mark.fault("slow-service")
def test_sockets_are_served_at_once_and_bounded() -> None:
    work = Work()
    for item in range(SOCKET_THREADS + 3):
        work.put(SOCKET, item)
    work.wait_for(work.begun, SOCKET_THREADS)
    work.put(LOAD, 100)
    work.put(PLUGIN, 101)
    work.wait_for(work.begun, SOCKET_THREADS + 2)
    assert sorted(work.begun) == [*range(SOCKET_THREADS), 100, 101]  # no more than those
    work.let(3)
    work.wait_for(work.begun, SOCKET_THREADS + 3)
    assert work.begun[-1] == SOCKET_THREADS
    work.close()


def test_all_else_is_served_in_order(caplog: pytest.LogCaptureFixture) -> None:
    work = Work()
    for item in (1, -2, 3):
        work.put((LOAD, FS, 999)[abs(item) - 1], item)
    for count, item in enumerate((1, -2, 3), 1):
        work.wait_for(work.begun, count)
        assert work.begun[-1] == item
        work.let(item)
    work.wait_for(work.ended, 3)
    for item in (4, 5):
        work.put(LOAD, item)
    work.close()
    assert work.ended == [1, -2, 3, 4, 5]  # what was put in before the end
    assert "it goes on" in caplog.text


def test_threads_are_used_again() -> None:
    work = Work()
    before = threading.active_count()
    for item in range(20):
        work.put(SOCKET, item)
        work.let(item)
        work.wait_for(work.ended, item + 1)
    assert threading.active_count() - before <= SOCKET_THREADS
    work.close()
    work.lanes.put(LOAD, 1)  # nothing
    assert len(work.ended) == 20


def waiting(handle: int) -> Rpc:
    """A RECV for which nothing comes."""
    params: list[Param] = [
        Value(Direction.IN, SocketOperation.RECV, 7, handle),
        MemRef(Direction.OUT, Memory.of(bytearray(8)), 0, 8),
        Value(Direction.IN, 60_000),
    ]
    return Rpc(SOCKET, params)


def open_params(port: int, host: bytes = b"127.0.0.1") -> list[Param]:
    name = host + b"\0"
    return [
        Value(Direction.IN, SocketOperation.OPEN, 7),
        Value(Direction.IN, port, Protocol.UDP),
        MemRef(Direction.IN, Memory.of(bytearray(name)), 0, len(name)),
        Value(Direction.OUT),
    ]


@pytest.mark.fault("slow-service")
def test_a_socket_that_waits_holds_nothing_else_up_in_the_process(tmp_path: Path) -> None:
    """In the child, which serves the sockets of all TAs."""
    (tmp_path / f"{HELLO}.ta").write_bytes(b"content")
    with udp_peer() as (_, port):
        process = SupplicantProcess([tmp_path], services=Services(allow_sockets=(f"127.0.0.1:{port}",)))
        process.start()
        opened = process.serve(Rpc(SOCKET, open_params(port)), Pool()).params[3]
        assert isinstance(opened, Value)
        ended: list[int] = []
        thread = threading.Thread(target=lambda: ended.append(process.serve(waiting(opened.a), Pool()).code))
        thread.start()
        low, high = (int.from_bytes(HELLO.bytes[i : i + 8], "little") for i in (0, 8))
        for _ in range(3):
            load = Rpc(LOAD, [Value(Direction.IN, low, high), MemRef(Direction.OUT, None)])
            assert process.serve(load, Pool()).code == Result.SUCCESS
        assert ended == []
        process.close()
        thread.join(10)
        assert ended == [Result.COMMUNICATION]


@pytest.mark.fault("slow-service")
def test_a_socket_that_waits_holds_nothing_else_up_in_the_runtime() -> None:
    class Asker(TrustedApplication):
        """Its command is an RPC's."""

        uuid = UUID(int=0xA5)

        async def invoke(self, session: None, command: int, params: Parameters) -> None:
            raise TeeError((await self.env.rpc(command, [])).code)

    entered, go_on = threading.Event(), threading.Event()

    def wait(params: list[Param], _: object) -> list[Param]:
        entered.set()
        assert go_on.wait(10)
        raise TeeError(Result.BUSY)

    supplicant = Supplicant()
    supplicant.services[SOCKET] = wait
    tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in={Asker.uuid: Asker})
    with TeeRuntime(tee, supplicant) as runtime:
        context = runtime.call(OpenContext()).value
        one, two = (runtime.call(OpenSession(context=context, uuid=Asker.uuid)).value for _ in range(2))
        pending = runtime.submit(Invoke(session=one, func=SOCKET))
        assert entered.wait(10)
        assert runtime.call(Invoke(session=two, func=FS), 10).code == Result.NOT_SUPPORTED
        assert pending.done is None
        go_on.set()
        assert pending.wait(10).code == Result.BUSY


class TestLookups:
    @pytest.fixture
    def stuck(self, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
        """The resolver answers when it is let."""
        go_on = threading.Event()

        def getaddrinfo(*_: object) -> list[object]:
            assert go_on.wait(20)
            return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", ("127.0.0.1", 9))]

        monkeypatch.setattr(lookup.socket, "getaddrinfo", getaddrinfo)
        return go_on

    @pytest.mark.fault("slow-service")
    def test_a_resolver_that_is_stuck(self, stuck: threading.Event) -> None:
        service = Sockets(AllowList.parse(["slow.example:9"]), lambda _: None, max_wait=0.05)
        with pytest.raises(TeeError) as caught:
            service.serve(open_params(9, b"slow.example"), Pool())
        assert caught.value.code == sockets.SocketResult.TIMEOUT
        assert len(service) == 0
        stuck.set()

    def test_so_many_at_a_time(self, stuck: threading.Event) -> None:
        lookups = Lookups()
        for _ in range(MAX_LOOKUPS):
            with pytest.raises(TimeoutError):
                lookups.resolve("slow.example", 9, 0, 0, 0.0)
        with pytest.raises(BlockingIOError):
            lookups.resolve("slow.example", 9, 0, 0, 0.0)
        stuck.set()
        deadline = time.monotonic() + 10
        while time.monotonic() < deadline:
            try:
                assert lookups.resolve("slow.example", 9, 0, 0, 10)[0][4] == ("127.0.0.1", 9)
                return
            except BlockingIOError:
                time.sleep(0.001)
        raise AssertionError("a lookup that has ended still counts")

    def test_what_it_raises(self) -> None:
        with pytest.raises((OSError, UnicodeError)):
            Lookups().resolve("a" * 70 + ".invalid", 9, 0, 0, 10)


@pytest.mark.fault("slow-service")
def test_closing_wakes_who_waits() -> None:
    with udp_peer() as (_, port):
        net = Net(f"127.0.0.1:{port}")
        handle = net.opened("127.0.0.1", port, UDP)
        codes: list[int] = []
        thread = threading.Thread(target=lambda: codes.append(net.supplicant.serve(waiting(handle), Pool()).code))
        start = time.monotonic()
        thread.start()
        time.sleep(0.05)
        net.supplicant.close()
        thread.join(20)
        assert codes != [Result.SUCCESS]
        assert time.monotonic() - start < sockets.MAX_WAIT
        assert net.open("127.0.0.1", port, UDP)[0] == Result.COMMUNICATION
