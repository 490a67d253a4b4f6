"""Frontend and backend of this library on real sockets, memory and eventfds."""

from __future__ import annotations

import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from pyvhost.errors import Disconnected, RequestFailed, StateError
from pyvhost.io.frontend import Frontend, Queue, Ram
from pyvhost.io.sockets import Listener
from pyvhost.messages import HEADER, BackendRequest, DeviceStatus, Feature, ProtocolFeature, encode
from tests.pyvhost.harness import Server
from tests.pyvhost.toys import Background, Echo, Faulty, Late

Start = Callable[..., Server]
RAM = 1 << 20


def ready(server: Server, *, queues: int = 1, features: int | None = None, ram: Ram | None = None) -> Frontend:
    """A frontend with its rings started."""
    vmm = connect(server.path, ram=ram)
    try:
        vmm.negotiate(*([] if features is None else [features]))
        for index in range(queues):
            vmm.add_queue(index, 16)
        vmm.start()
    except BaseException:
        vmm.close()
        raise
    return vmm


def connect(path: str, *, ram: Ram | None = None, timeout: float = 5.0) -> Frontend:
    """A frontend with a small memory of its own."""
    vmm = Frontend.connect(path, ram=ram or Ram(RAM), timeout=timeout)
    vmm._own_ram = True
    return vmm


def ask(vmm: Frontend, text: bytes, index: int = 0) -> bytes:
    """One request to an echo device, and its answer."""
    queue = vmm.queues[index]
    addr = vmm.ram.alloc(512)
    send(vmm, queue, addr, text)
    ((token, written),) = queue.wait()
    assert token == text
    return bytes(vmm.ram.at(addr + 256, written))


def send(vmm: Frontend, queue: Queue, addr: int, text: bytes) -> None:
    vmm.ram.at(addr, len(text))[:] = text
    queue.ring.add([(addr, len(text))], [(addr + 256, 200), (addr + 456, 56)], text)
    queue.kick()


def eventually(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


FEATURES = {
    "all": None,
    "no event idx": int(Feature.VERSION_1 | Feature.INDIRECT_DESC),
    "no indirect": int(Feature.VERSION_1 | Feature.EVENT_IDX),
    "none": 0,
}


@pytest.mark.parametrize("features", FEATURES.values(), ids=FEATURES.keys())
def test_echo(start_server: Start, features: int | None) -> None:
    with ready(start_server(Echo()), queues=2, features=features) as vmm:
        for n in range(300):
            text = b"request %d" % n
            assert ask(vmm, text, n % 2) == text


def test_many_at_once(start_server: Start) -> None:
    with ready(start_server(Echo())) as vmm:
        queue = vmm.queues[0]
        addrs = [vmm.ram.alloc(512) for _ in range(16)]
        done: list[bytes] = []
        for round_ in range(100):
            for n, addr in enumerate(addrs):
                send(vmm, queue, addr, b"%d %d" % (round_, n))
            while len(done) < 16 * (round_ + 1):
                done += [token for token, _ in queue.wait()]
        assert len(set(done)) == 1600


def test_negotiation(start_server: Start) -> None:
    with Frontend.connect(start_server(Echo()).path) as vmm:
        vmm.negotiate()
        assert vmm.machine.queue_num == 2
        assert vmm.machine.mem_slots == 509
        assert vmm.machine.features & Feature.VERSION_1
        assert vmm.machine.protocol_features & ProtocolFeature.REPLY_ACK
        vmm._do(vmm.machine.set_status(DeviceStatus.DRIVER_OK))
        assert vmm._do(vmm.machine.get_status()) == DeviceStatus.DRIVER_OK


def test_without_protocol_features(start_server: Start) -> None:
    """As the oldest frontends do it: no acknowledgements, rings run as soon as they can."""
    with connect(start_server(Echo()).path) as vmm:
        vmm.machine.features = int(Feature.VERSION_1)
        vmm.add_queue(0, 16)
        vmm.start()
        assert ask(vmm, b"old") == b"old"
        assert vmm.stop() == {0: 1}
        vmm.start()
        assert ask(vmm, b"again") == b"again"


def test_without_reply_ack(start_server: Start) -> None:
    with connect(start_server(Echo()).path) as vmm:
        vmm.negotiate(protocol=ProtocolFeature.MQ | ProtocolFeature.CONFIG)
        vmm.add_queue(0, 16)
        vmm.start()
        assert ask(vmm, b"table") == b"table"
        assert vmm.channel_fd is None
        with pytest.raises(StateError):
            vmm.backend_request()


def test_config_space_and_its_changes(start_server: Start) -> None:
    server = start_server(Echo())
    with ready(server) as vmm:
        assert vmm.read_config(0, 16) == b"echo device v1.."
        vmm.write_config(12, b"v2")
        assert vmm.backend_request() is BackendRequest.CONFIG_CHANGE_MSG
        assert vmm.read_config(12, 2) == b"v2"
        with pytest.raises(RequestFailed):
            vmm.read_config(0, 17)
        with pytest.raises(RequestFailed):
            vmm.write_config(16, b"x")
        with pytest.raises(TimeoutError):
            vmm.backend_request(timeout=0.01)


def test_kick_before_enable(start_server: Start) -> None:
    with connect(start_server(Echo()).path) as vmm:
        vmm.negotiate()
        queue = vmm.add_queue(0, 16)
        send(vmm, queue, vmm.ram.alloc(512), b"early")
        os.eventfd_write(queue.kick_fd, 1)
        vmm.start()
        assert queue.wait() == [(b"early", 5)]


def test_pause_with_requests_in_flight(start_server: Start) -> None:
    device = Late()
    server = start_server(device)
    with ready(server) as vmm:
        send(vmm, vmm.queues[0], vmm.ram.alloc(512), b"slow")
        eventually(lambda: len(device.held) == 1)
        begin = time.monotonic()
        assert vmm.stop() == {0: 1}
        assert time.monotonic() - begin < 5  # a hang, not a slow machine
        vmm.start()
        assert ("started", 0, True) in device.hooks
        server.on_dataplane(device.finish)
        assert vmm.queues[0].wait() == [(b"slow", 4)]


@pytest.mark.parametrize("tell", [True, False])
def test_reset(start_server: Start, tell: bool) -> None:
    device = Late()
    with ready(start_server(device)) as vmm:
        send(vmm, vmm.queues[0], vmm.ram.alloc(512), b"lost")
        eventually(lambda: len(device.held) == 1)
        vmm.reset(tell=tell)
        vmm.add_queue(0, 16)
        vmm.start()
        assert device.held == []
        resets = [h for h in device.hooks if h[0] in ("reset", "started")]
        assert resets == [("started", 0, False), ("reset",), ("started", 0, False)]


def test_served_again_after_the_frontend_leaves(start_server: Start, no_fd_leak: None) -> None:
    device = Late()
    server = start_server(device)
    for _ in range(3):
        with ready(server) as vmm:
            send(vmm, vmm.queues[0], vmm.ram.alloc(512), b"x")
            eventually(lambda: len(device.held) == 1)
        eventually(lambda: device.hooks[-1] == ("disconnected",))
    assert [h[0] for h in device.hooks].count("connected") == 3
    server.close()


def test_one_frontend_at_a_time(start_server: Start) -> None:
    server = start_server(Echo())
    with ready(server) as first:
        second = connect(server.path, timeout=0.05)
        with pytest.raises(TimeoutError):
            second.negotiate()
        assert ask(first, b"still here") == b"still here"
    second.close()
    with ready(server) as third:
        assert ask(third, b"next") == b"next"


def test_many_connects_leave_nothing(start_server: Start, no_fd_leak: None) -> None:
    server = start_server(Echo())
    for n in range(200):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(server.path)
        if n % 3 == 1:
            sock.send(encode(1)[: n % 12])
        if n % 3 == 2:
            fds = [os.eventfd(0) for _ in range(n % 40 + 1)]
            socket.send_fds(sock, [encode(13, bytes(8)) * (n % 2) or b"\0" * 5], fds)
            for fd in fds:
                os.close(fd)
        sock.close()
    for _ in range(30):
        with ready(server) as vmm:
            assert ask(vmm, b"hello") == b"hello"
    server.close()


@pytest.mark.parametrize(
    "message",
    [
        b"\xff" * 12,
        HEADER.pack(1, 1, 0xFFFF_FFFF),
        HEADER.pack(1, 1, 4097),
        HEADER.pack(1, 5, 0),
        encode(99, b"unknown"),
        encode(8, bytes(7)),
    ],
)
def test_nonsense_ends_the_connection(start_server: Start, message: bytes) -> None:
    server = start_server(Echo())
    with connect(server.path) as vmm:
        vmm.send(message)
        with pytest.raises(Disconnected):
            vmm._receive(1)
    with ready(server) as vmm:
        assert ask(vmm, b"alive") == b"alive"


def test_a_message_in_pieces(start_server: Start) -> None:
    with Frontend.connect(start_server(Echo()).path) as vmm:
        for byte in encode(1):
            vmm.send(bytes([byte]))
        header = vmm._receive(12)
        assert vmm.machine.reply_size(1, header) == 8  # type: ignore[arg-type]


def test_two_messages_at_once(start_server: Start) -> None:
    with Frontend.connect(start_server(Echo()).path) as vmm:
        vmm.send(encode(1) + encode(15))
        assert len(vmm._receive(40)) == 40


def test_truncated_memory_is_refused(start_server: Start) -> None:
    server = start_server(Echo())
    with Frontend.connect(server.path, ram=Ram(RAM, seal=False)) as vmm:
        vmm._own_ram = True
        vmm.negotiate()
        vmm.add_queue(0, 16)
        os.ftruncate(vmm.ram.fd, RAM // 2)
        with pytest.raises(RequestFailed):
            vmm.start()
        os.ftruncate(vmm.ram.fd, RAM)
        vmm.start()


def test_unsealed_memory(start_server: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    with ready(start_server(Echo()), ram=Ram(RAM, seal=False)) as vmm:
        assert ask(vmm, b"warned") == b"warned"
    assert "not sealed" in caplog.text
    with pytest.raises(RequestFailed):
        ready(start_server(Echo(), require_sealed=True), ram=Ram(RAM, seal=False))
    with ready(start_server(Echo(), require_sealed=True)) as vmm:
        assert ask(vmm, b"sealed") == b"sealed"


@pytest.mark.parametrize("slots", [True, False])
def test_hot_plug(start_server: Start, slots: bool) -> None:
    device = Echo()
    with connect(start_server(device).path) as vmm:
        protocol = ProtocolFeature.REPLY_ACK | (ProtocolFeature.CONFIGURE_MEM_SLOTS if slots else ProtocolFeature(0))
        vmm.negotiate(protocol=protocol)
        queue = vmm.add_queue(0, 16)
        vmm.start()
        assert ask(vmm, b"before") == b"before"
        more = Ram(RAM, 0x4000_0000, name="plugged")
        vmm.plug(more)
        addr = more.alloc(64)
        more.at(addr, 7)[:] = b"plugged"
        queue.ring.add([(addr, 7)], [(addr + 16, 7)], "t")
        queue.kick()
        assert queue.wait() == [("t", 7)]
        assert more.at(addr + 16, 7) == b"plugged"
        assert len(vmm.memory) == 2
        vmm.unplug(more)
        assert ask(vmm, b"after") == b"after"
        assert len(device.memory) == 1
        queue.ring.add([(addr, 7)], [(addr + 16, 7)], "gone")
        queue.kick()
        assert queue.wait() == [("gone", 0)]  # returned, and the queue is broken
        assert select.select([queue.err_fd], [], [], 10)[0]
        more.close()
        with pytest.raises(StateError):
            vmm.unplug(more)


def test_inherited_sockets(start_server: Start, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    server = start_server(Echo(), Listener.from_fd(theirs.detach()))
    with Frontend(ours) as vmm:
        vmm.negotiate()
        vmm.add_queue(0, 16)
        vmm.start()
        assert ask(vmm, b"inherited") == b"inherited"
    assert server.ended.wait(10)  # of a connected socket, one frontend is served
    path = tmp_path / "listening"
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(str(path))
    listening.listen(1)
    server = start_server(Echo, Listener.from_fd(listening.detach()))
    server.path = str(path)
    for _ in range(2):
        with ready(server) as vmm:
            assert ask(vmm, b"twice") == b"twice"


def test_background_work_and_wakeups(start_server: Start) -> None:
    device = Background()
    server = start_server(device)
    with ready(server) as vmm:
        queue = vmm.queues[0]
        for n in range(10):
            send(vmm, queue, vmm.ram.alloc(512), b"%d" % n)
        done: list[tuple[bytes, int]] = []
        while len(done) < 10:
            done += queue.wait()
        assert done == [(b"%d" % n, 1) for n in range(10)]
        os.eventfd_write(device.fd, 7)
        eventually(lambda: device.woken == 7)
        runs = device.runs
        for _ in range(20):
            server.on_dataplane(lambda: None)
        assert device.runs - runs <= 2  # nothing to do, nothing is called
        posted = threading.Event()
        threading.Thread(target=device.link.post, args=(posted.set,)).start()
        assert posted.wait(10)
        assert device.link.notify(0) is False
        server.on_dataplane(lambda: device.link.wake(0))
    eventually(lambda: not device.queues[0])
    late = threading.Event()
    device.link.post(late.set)  # too late: dropped
    server.on_dataplane(lambda: None)
    assert not late.is_set()
    assert device.link.config_changed() is False
    os.close(device.fd)


def test_a_device_hangs_up(start_server: Start) -> None:
    device = Late()
    server = start_server(device)
    with ready(server) as vmm:
        server.on_dataplane(lambda: device.link.close("enough"))
        with pytest.raises(Disconnected):
            vmm._receive(1)
    assert device.hooks[-1] == ("disconnected",)
    device.link.close("again")


@pytest.mark.parametrize(
    "where", ["connected", "negotiated", "queue_started", "queue_stopped", "process", "run", "disconnected"]
)
def test_a_faulty_device_hurts_nobody_else(
    start_server: Start, where: str, caplog: pytest.LogCaptureFixture, no_fd_leak: None
) -> None:
    caplog.set_level(logging.ERROR)
    server = start_server(Faulty(where))

    def use() -> None:
        with ready(server) as vmm:
            ask(vmm, b"x")
            vmm.stop()

    if where == "disconnected":
        use()
    else:
        with pytest.raises(Disconnected):
            use()
    eventually(lambda: "planned failure" in caplog.text)
    with Frontend.connect(server.path) as vmm:
        if where != "connected":
            vmm.negotiate()  # it is served again
    server.close()
    caplog.clear()  # the records hold tracebacks, and those hold mappings


def test_two_devices_on_one_data_plane(start_server: Start) -> None:
    one = start_server(Echo())
    two = start_server(Faulty("process"), dataplane=one.dataplane)
    with ready(one) as good:
        assert ask(good, b"a") == b"a"
        with pytest.raises(Disconnected), ready(two) as bad:
            bad._receive(1)
        assert ask(good, b"b") == b"b"
        with Frontend.connect(two.path) as vmm:
            vmm.negotiate()


def test_storm_of_kicks(start_server: Start) -> None:
    """Kicks without requests cost looks, not answers, and other queues are served."""
    device = Echo()
    with ready(start_server(device), queues=2) as vmm:
        stop = threading.Event()

        def storm() -> None:
            while not stop.is_set():
                os.eventfd_write(vmm.queues[1].kick_fd, 1)

        thread = threading.Thread(target=storm)
        thread.start()
        try:
            for n in range(50):
                assert ask(vmm, b"%d" % n) == b"%d" % n
        finally:
            stop.set()
            thread.join()


@pytest.mark.requirement("DEV-QUE-8")
@pytest.mark.fault("broken-ring")
def test_broken_ring(start_server: Start, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    device = Echo()
    with ready(start_server(device)) as vmm:
        queue = vmm.queues[0]
        queue.ring.add([(0xDEAD_0000_0000, 4)], [], "wild")
        queue.kick()
        assert queue.wait() == [("wild", 0)]
        eventually(lambda: "queue 0 is broken" in caplog.text)
        vmm.reset()
        vmm.add_queue(0, 16)
        vmm.start()
        assert ask(vmm, b"well again") == b"well again"
