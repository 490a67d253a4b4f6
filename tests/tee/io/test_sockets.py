"""Sockets for TAs, on loopback only; and the list of where they may go."""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tee.io.services import sockets
from tee.io.services.destinations import AllowList, Destination
from tee.io.services.sockets import BLOCKING, MAX_SOCKETS, Protocol, SocketCommand, SocketOperation, SocketResult
from tee.io.supplicant import Supplicant
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply
from tests.tee.io.test_supplicant import Pool

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
TCP, UDP = Protocol.TCP, Protocol.UDP
TA = 7  # an instance
OPENED: list[Supplicant] = []


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


class Net:
    """A TEE that uses sockets, by RPCs in OP-TEE's layouts."""

    def __init__(self, *allowed: str) -> None:
        self.logged: list[str] = []
        self.supplicant = Supplicant(sockets=AllowList.parse(allowed), log=self.logged.append)
        OPENED.append(self.supplicant)

    def ask(self, operation: int, *params: Param, handle: int = 0, ta: int = TA) -> RpcReply:
        what: list[Param] = [Value(IN, operation, ta, handle), *params]
        reply = self.supplicant.serve(Rpc(RpcCommand.SOCKET, what), Pool())
        assert reply.code != Result.SUCCESS or len(reply.params) == len(what)
        return reply

    def open(self, host: str, port: int, protocol: int = TCP, version: int = 0, ta: int = TA) -> tuple[int, int]:
        where = Value(IN, port, protocol, version)
        reply = self.ask(SocketOperation.OPEN, where, memory(host.encode() + b"\0"), Value(OUT), ta=ta)
        answer = reply.params[3] if reply.params else Value(OUT)
        assert isinstance(answer, Value)
        return reply.code, answer.a

    def opened(self, host: str, port: int, protocol: int = TCP) -> int:
        code, handle = self.open(host, port, protocol)
        assert code == Result.SUCCESS
        return handle

    def send(self, handle: int, data: bytes, timeout: int = 1000) -> tuple[int, int]:
        reply = self.ask(SocketOperation.SEND, memory(data), Value(INOUT, timeout), handle=handle)
        answer = reply.params[2] if reply.params else Value(INOUT)
        assert isinstance(answer, Value)
        return reply.code, answer.b

    def recv(self, handle: int, size: int, timeout: int = 1000) -> tuple[int, int, bytes]:
        """Code, size that was answered, content."""
        target = Memory.of(bytearray(size))
        reply = self.ask(SocketOperation.RECV, MemRef(OUT, target, 0, size), Value(IN, timeout), handle=handle)
        answer = reply.params[1] if reply.params else MemRef(OUT, None)
        assert isinstance(answer, MemRef)
        return reply.code, answer.size, target.read(0, min(size, answer.size))

    def ioctl(self, handle: int, command: int, data: bytes) -> int:
        reference = MemRef(INOUT, Memory.of(bytearray(data)), 0, len(data))
        return self.ask(SocketOperation.IOCTL, reference, Value(IN, command), handle=handle).code


def memory(data: bytes) -> MemRef:
    return MemRef(IN, Memory.of(bytearray(data)), 0, len(data))


@contextmanager
def tcp_echo(host: str = "127.0.0.1") -> Iterator[int]:
    """Gives back what it gets, to one client."""
    with socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as server:

        def serve() -> None:
            connection, _ = server.accept()
            with connection:
                while data := connection.recv(1000):
                    connection.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        thread.join(10)


@contextmanager
def udp_peer() -> Iterator[tuple[socket.socket, int]]:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(10)
        yield peer, peer.getsockname()[1]


@pytest.mark.feature("Supplicant: TCP and UDP sockets for TAs, where the operator allows")
class TestSockets:
    @pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
    def test_tcp(self, host: str) -> None:
        try:
            with tcp_echo(host if host != "localhost" else "127.0.0.1") as port:
                net = Net(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
                handle = net.opened(host, port)
                assert net.recv(handle, 10, 0) == (SocketResult.TIMEOUT, 0, b"")
                assert net.send(handle, b"content") == (Result.SUCCESS, 7)
                assert net.recv(handle, 4) == (Result.SUCCESS, 4, b"cont")
                assert net.recv(handle, 0) == (Result.SUCCESS, 3, b"")
                assert net.recv(handle, 100, BLOCKING) == (Result.SUCCESS, 3, b"ent")
                assert net.recv(handle, 0) == (Result.SUCCESS, 0, b"")
                assert net.ioctl(handle, SocketCommand.TCP_SET_RECVBUF, b"\0\x40\0\0") == Result.SUCCESS
                assert net.ioctl(handle, SocketCommand.TCP_SET_SENDBUF, b"\xff" * 4) == Result.SUCCESS
                assert net.ioctl(handle, SocketCommand.TCP_SET_SENDBUF, b"\xff") == Result.BAD_PARAMETERS
                assert net.ioctl(handle, SocketCommand.UDP_CHANGEPORT, b"\0\1") == Result.NOT_SUPPORTED
                assert net.ask(SocketOperation.CLOSE, handle=handle).code == Result.SUCCESS
                assert net.send(handle, b"x")[0] == Result.BAD_PARAMETERS
        except OSError as error:
            if host != "::1":
                raise
            pytest.skip(f"no IPv6: {error}")

    def test_udp(self) -> None:
        with udp_peer() as (peer, port), udp_peer() as (other, other_port):
            net = Net(f"127.0.0.1:{port}", f"udp://localhost:{port}", f"udp://127.0.0.0/8:{other_port}")
            handle = net.opened("127.0.0.1", port, UDP)
            assert net.send(handle, b"ping") == (Result.SUCCESS, 4)
            data, where = peer.recvfrom(100)
            peer.sendto(data + b"-pong", where)
            peer.sendto(b"longer than its room", where)
            assert net.recv(handle, 0) == (Result.SUCCESS, 9, b"")
            assert net.recv(handle, 20) == (Result.SUCCESS, 9, b"ping-pong")
            assert net.recv(handle, 9) == (Result.SUCCESS, 9, b"longer th")  # the rest is lost
            assert net.recv(handle, 20, 1) == (SocketResult.TIMEOUT, 0, b"")
            assert net.send(handle, bytes(70000))[0] == SocketResult.LARGE_BUFFER
            assert net.ioctl(handle, SocketCommand.UDP_CHANGEPORT, other_port.to_bytes(2, "little")) == Result.SUCCESS
            net.send(handle, b"hello")
            assert other.recv(100) == b"hello"
            for command, change in (
                (SocketCommand.UDP_CHANGEADDR, b"localhost\0"),  # not at this port
                (SocketCommand.UDP_CHANGEADDR, b"192.0.2.1\0"),
                (SocketCommand.UDP_CHANGEPORT, b"\1\0"),
            ):
                assert net.ioctl(handle, command, change) == Result.ACCESS_DENIED
            net.send(handle, b"still")
            assert other.recv(100) == b"still"
            assert net.ioctl(handle, SocketCommand.UDP_CHANGEADDR, b"127.0.0.1\0") == Result.SUCCESS
            assert net.ioctl(handle, SocketCommand.UDP_CHANGEADDR, b"127.0.0.1") == Result.BAD_PARAMETERS

    def test_handles_are_their_instances(self) -> None:
        with udp_peer() as (_, port):
            net = Net(f"127.0.0.1:{port}")
            mine = [net.opened("127.0.0.1", port, UDP) for _ in range(2)]
            code, theirs = net.open("127.0.0.1", port, UDP, ta=8)
            assert code == Result.SUCCESS
            assert net.send(theirs, b"x")[0] == Result.BAD_PARAMETERS
            assert net.ask(SocketOperation.CLOSE, handle=theirs).code == Result.BAD_PARAMETERS
            assert net.ask(SocketOperation.CLOSE_ALL).code == Result.SUCCESS
            assert [net.send(handle, b"x")[0] for handle in mine] == [Result.BAD_PARAMETERS] * 2
            assert net.ask(SocketOperation.CLOSE, handle=theirs, ta=8).code == Result.SUCCESS

    def test_limits(self) -> None:
        with udp_peer() as (_, port):
            net = Net(f"127.0.0.1:{port}")
            codes = [net.open("127.0.0.1", port, UDP)[0] for _ in range(MAX_SOCKETS + 1)]
            assert codes == [Result.SUCCESS] * MAX_SOCKETS + [SocketResult.OUT_OF_RESOURCES]
            net.supplicant.close()

    def test_nobody_waits_for_ever(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sockets.Sockets.__init__, "__kwdefaults__", {"max_wait": 0.1})
        with udp_peer() as (_, port):
            net = Net(f"127.0.0.1:{port}")
            handle, start = net.opened("127.0.0.1", port, UDP), time.monotonic()
            assert net.recv(handle, 10, BLOCKING)[0] == net.recv(handle, 10, 100_000)[0] == SocketResult.TIMEOUT
            assert time.monotonic() - start < 5

    def test_errors(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        net = Net(f"127.0.0.1:{port}", "no-such-host.invalid:1")
        assert net.open("127.0.0.1", port)[0] == Result.COMMUNICATION
        assert net.open("no-such-host.invalid", 1)[0] == SocketResult.HOSTNAME
        assert net.open("127.0.0.1", port, TCP, 2)[0] == SocketResult.HOSTNAME
        assert net.open("127.0.0.1", port, 0x67)[0] == net.open("127.0.0.1", 70000)[0] == Result.BAD_PARAMETERS
        assert net.open("127.0.0.1", port, TCP, 3)[0] == Result.BAD_PARAMETERS

    def test_the_other_end_leaves(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            net = Net(f"127.0.0.1:{port}")
            handle = net.opened("127.0.0.1", port)
            server.accept()[0].close()
        assert net.recv(handle, 10) == (Result.SUCCESS, 0, b"")
        deadline = time.monotonic() + 10
        while (code := net.send(handle, b"x")[0]) == Result.SUCCESS and time.monotonic() < deadline:
            time.sleep(0.01)
        assert code == SocketResult.REMOTE_CLOSED

    @pytest.mark.parametrize(
        "params",
        [
            [],
            [Value(OUT, 0)],
            [Value(IN, 6)],
            [Value(IN, -1)],
            [Value(IN, SocketOperation.OPEN)],
            [Value(IN, SocketOperation.OPEN), Value(IN, 1, TCP), MemRef(IN, None, 0, 4), Value(OUT)],
            [Value(IN, SocketOperation.OPEN), Value(IN, 1, TCP), memory(b"no end"), Value(OUT)],
            [Value(IN, SocketOperation.OPEN), Value(IN, 1, TCP), memory(b"x" * 300 + b"\0"), Value(OUT)],
            [Value(IN, SocketOperation.CLOSE, TA, 99)],
            [Value(IN, SocketOperation.SEND, TA, 1), memory(b""), Value(IN, 0)],
            [Value(IN, SocketOperation.SEND, TA, 1), MemRef(IN, None, 0, 9), Value(INOUT, 0)],
            [Value(IN, SocketOperation.RECV, TA, 1), MemRef(OUT, None, 0, 9), Value(IN, 0)],
            [Value(IN, SocketOperation.RECV, TA, 1), MemRef(OUT, Memory.of(bytearray(4)), 1, 4), Value(IN, 0)],
        ],
    )
    def test_bad_parameters(self, params: list[Param], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(secrets, "randbelow", lambda _: 0)
        with udp_peer() as (_, port):
            net = Net(f"127.0.0.1:{port}")
            assert net.opened("127.0.0.1", port, UDP) == 1
            assert net.supplicant.serve(Rpc(RpcCommand.SOCKET, params), Pool()).code == Result.BAD_PARAMETERS


@given(data=st.data())
def test_any_parameters_are_answered(data: st.DataObject) -> None:
    words = st.integers(-1, 10) | st.sampled_from([0x65, 0x66, 1 << 31, (1 << 64) - 1, *SocketCommand])
    directions = st.sampled_from(Direction)
    memories = st.none() | st.binary(max_size=40).map(lambda b: Memory.of(bytearray(b)))
    param: st.SearchStrategy[Param] = st.builds(Value, directions, words, words, words)
    param |= st.builds(MemRef, directions, memories, words, words)
    net = Net("a.invalid:1")
    for params in data.draw(st.lists(st.lists(param, max_size=5), max_size=5)):
        code = net.supplicant.serve(Rpc(RpcCommand.SOCKET, params), Pool()).code
        assert code in {*Result, *SocketResult}
        assert code != Result.SUCCESS or params[0] == Value(IN, SocketOperation.CLOSE_ALL, params[0].b, params[0].c)  # type: ignore[union-attr]


class TestAllowList:
    @pytest.mark.parametrize(
        ("entry", "yes", "no"),
        [
            ("a.example:80", [("tcp", "A.example.", 80), ("udp", "a.example", 80)], [("tcp", "a.example", 81)]),
            ("tcp://a.example:80", [("tcp", "a.example", 80)], [("udp", "a.example", 80), ("tcp", "b.a.example", 80)]),
            ("10.0.0.0/8:*", [("tcp", "10.1.2.3", 1), ("udp", "::ffff:10.1.2.3", 9)], [("tcp", "11.0.0.1", 1)]),
            ("[fd00::/8]:53", [("udp", "fd00::1", 53)], [("udp", "10.0.0.1", 53), ("udp", "fd00::1%lo", 53)]),
            ("[::/0]:*", [("tcp", "::1", 1)], [("tcp", "::ffff:127.0.0.1", 1), ("tcp", "a.example", 1)]),
            # forms that some resolvers take for addresses are neither names nor addresses here
            ("127.0.0.1:1", [("tcp", "127.0.0.1", 1)], [("tcp", h, 1) for h in ("127.1", "0x7f.1", "2130706433", "")]),
        ],
    )
    def test_allows(self, entry: str, yes: list[tuple[str, str, int]], no: list[tuple[str, str, int]]) -> None:
        allowed = AllowList.parse([entry])
        assert all(allowed.allows(*one) for one in yes)
        assert not any(allowed.allows(*one) for one in no)

    @pytest.mark.parametrize(
        "entry", ["", "host", "host:", ":1", "host:0", "host:65536", "::1:80", "127.1:1", "0x7f.1:1", "a b:1", "-x:1"]
    )
    def test_entries_that_are_none(self, entry: str) -> None:
        with pytest.raises(ValueError, match=r"port|HOST:PORT|neither"):
            Destination.parse(entry)

    def test_only_what_is_allowed_is_resolved(self, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[str] = []

        def resolve(host: str, *_: object) -> list[object]:
            asked.append(host)
            return []

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        net = Net("a.example:80", "10.0.0.0/8:80")
        for host in ("secret.attacker.example", "b.example", "127.0.0.1", "10.1", "a.example\r\n", "a.example "):
            assert net.open(host, 80)[0] == Result.ACCESS_DENIED
        assert net.open("a.example", 81)[0] == Result.ACCESS_DENIED
        assert asked == []
        assert "--allow-socket" in net.logged[0]
        net.open("a.example", 80)
        net.open("::ffff:10.0.0.1", 80)
        assert asked == ["a.example", "10.0.0.1"]

    @given(host=st.text(max_size=20), port=st.integers(0, 65535))
    def test_nothing_is_allowed_by_accident(self, host: str, port: int) -> None:
        assert not AllowList.parse(["a.example:1"]).allows("tcp", host, port) or (host.lower().rstrip("."), port) == (
            "a.example",
            1,
        )
