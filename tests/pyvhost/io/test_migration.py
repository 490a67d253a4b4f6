"""What outlives a backend, on real sockets and memory: requests in flight, dirty pages, device state; and a frontend
that tries to hold the data plane up."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import DEVNULL, Popen

import pytest

from pyvhost.dirtylog import PAGE
from pyvhost.errors import Disconnected, RequestFailed, StateError
from pyvhost.io import transfer
from pyvhost.io.fence import host_atomic_or
from pyvhost.io.frontend import DEFAULT_FEATURES, Frontend, Ram
from pyvhost.io.signals import Signaller
from pyvhost.messages import HEADER, TRANSFER_STATE, Feature, FrontendRequest, ProtocolFeature, encode
from tests.pyvhost.harness import Server
from tests.pyvhost.test_device_state import Movable
from tests.pyvhost.toys import Echo, Late

Start = Callable[..., Server]

BACKEND = """
import sys, trio
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve
from pyvhost.io.sockets import Listener
from tests.pyvhost.toys import Echo

async def main():
    with DataPlane() as dataplane, Listener.at_path(sys.argv[1]) as listener:
        await serve(Echo(), listener, dataplane)

trio.run(main)
"""


def connect(path: str, size: int = 1 << 20, more: int = 0) -> Frontend:
    """``more``: features beside the usual ones."""
    vmm = Frontend.connect(path, ram=Ram(size))
    vmm._own_ram = True
    vmm.negotiate(DEFAULT_FEATURES | more)
    return vmm


def add(vmm: Frontend, token: int, addr: int) -> None:
    text = b"%08d" % token
    vmm.ram.at(addr, 8)[:] = text
    vmm.queues[0].ring.add([(addr, 8)], [(addr + 16, 8)], (token, addr))


@pytest.mark.parametrize("features", [0, Feature.RING_PACKED], ids=["split", "packed"])
def test_killed_again_and_again_under_load(tmp_path: Path, features: int) -> None:
    """SIGKILL at any moment: each request is answered once, and rightly."""

    def start(number: int) -> tuple[Popen[bytes], str]:
        path = str(tmp_path / f"b{number}.sock")
        process = Popen([sys.executable, "-c", BACKEND, path], stderr=DEVNULL)
        while True:  # the path is there a moment before anybody listens
            assert process.poll() is None
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe, contextlib.suppress(OSError):
                probe.connect(path)
                return process, path
            time.sleep(0.01)

    process, path = start(0)
    vmm = connect(path, more=features)
    queue = vmm.add_queue(0, 16)
    assert vmm.track_inflight(16)
    vmm.start()
    buffers = [vmm.ram.alloc(32) for _ in range(16)]
    sent = 0
    answered: list[int] = []
    try:
        for number in range(1, 6):
            end = time.monotonic() + 0.05 + 0.013 * number
            killed = False
            while True:
                while buffers and not killed:
                    add(vmm, sent, buffers.pop())
                    sent += 1
                if not killed and time.monotonic() > end:
                    queue.kick()
                    process.send_signal(signal.SIGKILL)
                    killed = True
                queue.kick()
                try:
                    done = queue.wait(0.2)
                except Disconnected:
                    break
                for (token, addr), written in done:
                    assert written == 8
                    assert bytes(vmm.ram.at(addr + 16, 8)) == b"%08d" % token
                    answered.append(token)
                    buffers.append(addr)
                if killed and not done:
                    break
            process.wait()
            process, path = start(number)
            vmm.reconnect(path)
        while len(answered) < sent:
            done = queue.wait(5)
            assert done
            answered += [token for (token, _), _ in done]
        assert sorted(answered) == list(range(sent))
        assert sent > 100
    finally:
        process.kill()
        process.wait()
        vmm.close()


@pytest.mark.usefixtures("no_fd_leak")
@pytest.mark.parametrize("features", [0, Feature.RING_PACKED], ids=["split", "packed"])
def test_a_frontend_comes_back(start_server: Start, features: int) -> None:
    device = Late()
    server = start_server(device)
    vmm = connect(server.path, more=features)
    assert vmm.machine.protocol_features & ProtocolFeature.INFLIGHT_SHMFD
    vmm.add_queue(0, 16)
    assert vmm.track_inflight()
    vmm.start()
    add(vmm, 1, vmm.ram.alloc(32))
    vmm.queues[0].kick()
    while not device.held:
        time.sleep(0.01)
    server.on_dataplane(device.held.clear)
    vmm.reconnect(server.path)
    while not device.held:
        time.sleep(0.01)
    server.on_dataplane(device.finish)
    (((token, _), _),) = vmm.queues[0].wait()
    assert token == 1
    vmm.close()
    server.close()


def test_packed_rings_without_a_region_are_lost(start_server: Start) -> None:
    server = start_server(Echo())
    vmm = connect(server.path, more=Feature.RING_PACKED)
    vmm.add_queue(0, 16)
    vmm.start()
    with pytest.raises(StateError, match="only the old backend knew"):
        vmm.reconnect(server.path)
    vmm.close()


def test_rings_of_a_reset_are_given_back(start_server: Start) -> None:
    """A guest that is reset again and again does not use its memory up."""
    server = start_server(Echo())
    vmm = connect(server.path)
    places = set()
    for number in range(300):  # of 4096 bytes or more, in 1 MiB
        queue = vmm.add_queue(0, 64)
        places.add(queue.ring_memory)
        vmm.start()
        if number % 100 == 0:
            buffer = vmm.ram.alloc(32)
            add(vmm, number, buffer)
            queue.kick()
            assert queue.wait() == [((number, buffer), 8)]
            vmm.ram.free(buffer, 32)
            assert bytes(vmm.ram.at(buffer, 8)) != bytes(8)
            assert vmm.ram.alloc(32) == buffer
            assert bytes(vmm.ram.at(buffer, 32)) == bytes(32)
            vmm.ram.free(buffer, 32)
        vmm.reset()
    assert len(places) == 1
    vmm.close()


@pytest.mark.usefixtures("no_fd_leak")
def test_dirty_pages(start_server: Start) -> None:
    server = start_server(Echo())
    vmm = connect(server.path)
    queue = vmm.add_queue(0, 16)
    vmm.start()
    told = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    vmm.start_log(told)
    assert vmm.take_dirty() == set()
    addr = vmm.ram.alloc(3 * PAGE, PAGE)
    vmm.ram.at(addr, 5)[:] = b"hello"
    queue.ring.add([(addr, 5)], [(addr + PAGE, 64)], None)
    queue.kick()
    assert queue.wait()
    used = (queue.setup.used - vmm.ram.user_addr + vmm.ram.guest_addr) // PAGE
    server.on_dataplane(lambda: None)  # what marks may come after the answer
    assert vmm.take_dirty() == {addr // PAGE + 1, used}
    assert os.eventfd_read(told) >= 1
    vmm.stop_log()
    os.close(told)
    vmm.close()
    server.close()


def test_marking_atomically() -> None:
    """Two that set bits in the same bytes lose none."""
    ram = Ram(PAGE)
    one = host_atomic_or(ram.view)
    if one is None:
        pytest.skip("no libatomic here")
    with pytest.raises(IndexError):
        one(PAGE, 1)

    def mark(set_bits: Callable[[int, int], object], mask: int) -> None:
        for n in range(PAGE):
            set_bits(n, mask)

    threads = [threading.Thread(target=mark, args=(one, 1 << bit)) for bit in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bytes(ram.view) == b"\xff" * PAGE
    del one, threads, thread
    ram.close()


@pytest.mark.usefixtures("no_fd_leak")
def test_state_from_one_process_to_another(start_server: Start) -> None:
    one, two = Movable(b"/1"), Movable()
    one.max_state_size = two.max_state_size = 1 << 20
    one.name = bytes(range(256)) * 1024  # more than a pipe holds
    servers = start_server(one), start_server(two)
    source, target = (connect(server.path) for server in servers)
    source.add_queue(0, 16)
    source.start()
    with pytest.raises(RequestFailed):
        source.save_state()
    source.stop()
    state = source.save_state()
    target.load_state(state)
    assert two.name == one.name
    with pytest.raises(RequestFailed):
        target.load_state(b"nonsense")
    with pytest.raises(RequestFailed):
        target.load_state(bytes((1 << 20) + 1))
    assert two.name == one.name
    for vmm in (source, target):
        vmm.close()
    for server in servers:
        server.close()


@pytest.mark.usefixtures("no_fd_leak")
def test_a_frontend_that_leaves_its_pipe_open(start_server: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "TIMEOUT", 0.2)
    server = start_server(Movable())
    vmm = connect(server.path)
    reader, writer = os.pipe()
    vmm._do(vmm.machine.set_device_state_fd(reader, load=True))
    with pytest.raises(RequestFailed):
        vmm._do(vmm.machine.check_device_state())
    # … and one that leaves in the middle
    vmm.send(encode(FrontendRequest.SET_DEVICE_STATE_FD, TRANSFER_STATE.pack(1, 0)), (reader,))
    assert len(vmm._receive(HEADER.size + 8)) == 20
    vmm.close()
    os.close(reader)
    os.close(writer)
    connect(server.path).close()
    time.sleep(0.4)
    server.close()


# --- eventfds that are full

FULL = (1 << 64) - 2


def test_a_full_eventfd_is_emptied() -> None:
    signaller = Signaller("test")
    signaller.start()
    fd = os.eventfd(FULL >> 33, os.EFD_CLOEXEC)
    os.eventfd_read(fd)
    assert signaller.signal(fd)
    assert os.eventfd_read(fd) == 1
    os.eventfd_write(fd, FULL)
    start = time.monotonic()
    assert not signaller.signal(fd)
    assert time.monotonic() - start < 2
    assert signaller.signal(fd)
    signaller.close(fd)
    assert signaller.signal(fd)  # an error is no reason to hang up
    signaller.stop()


def test_a_frontend_that_fills_its_eventfd_loses_its_connection(start_server: Start) -> None:
    server = start_server(Echo())
    other = start_server(Echo(), dataplane=server.dataplane)
    vmm, bystander = connect(server.path), connect(other.path)
    for frontend in (vmm, bystander):
        frontend.add_queue(0, 16)
    call = vmm.queues[0].call_fd
    os.set_blocking(call, True)
    for frontend in (vmm, bystander):
        frontend.start()
    while not vmm.running:
        time.sleep(0.01)
    time.sleep(0.05)
    os.eventfd_write(call, FULL - 8)
    os.set_blocking(call, False)
    with pytest.raises(BlockingIOError):
        os.eventfd_write(call, 16)
    for _ in range(9):  # now it is full
        try:
            os.eventfd_write(call, 1)
        except BlockingIOError:
            break
    os.set_blocking(call, True)
    add(vmm, 1, vmm.ram.alloc(32))
    vmm.queues[0].kick()
    time.sleep(0.1)
    add(bystander, 1, bystander.ram.alloc(32))
    bystander.queues[0].kick()
    assert len(bystander.queues[0].wait(5)) == 1
    time.sleep(0.5)
    with pytest.raises(Disconnected):
        vmm.read_config(0, 4)
    vmm.close()
    bystander.close()
