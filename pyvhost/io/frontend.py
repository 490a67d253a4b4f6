"""A vhost-user frontend over a real socket: the half of a VMM that a backend sees, with memory and eventfds of its own.

Blocking, with timeouts; a program that lives on an event loop runs the set-up calls in a thread and polls
``Queue.call_fd`` and ``Frontend.channel_fd`` itself. Good for tests, for tools, and for drivers that run on the host.

>>> with Frontend.connect("/run/echo.sock") as vmm:
...     vmm.negotiate()
...     queue = vmm.add_queue(0, size=64)
...     vmm.start()
...     buffer = vmm.ram.alloc(4096)
...     queue.ring.add([(buffer, 100)], [(buffer + 2048, 100)], token="hello")
...     queue.kick()
...     queue.wait()
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import select
import socket
import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from pyvhost.effects import RegionInfo, RingSetup
from pyvhost.errors import Disconnected, MessageError, StateError
from pyvhost.frontend import KNOWN_PROTOCOL_FEATURES, FrontendMachine, Send
from pyvhost.io.fence import host_fences
from pyvhost.io.sockets import rights
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.messages import HEADER, BackendRequest, Feature, ProtocolFeature
from pyvhost.vring.api import DriverQueue
from pyvhost.vring.split_driver import SplitDriverQueue

__all__ = ["Frontend", "Queue", "Ram"]

_T = TypeVar("_T")

#: what ``negotiate()`` asks for unless told otherwise: all ring features that this library's driver side has
DEFAULT_FEATURES = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX)

_PAGE = mmap.PAGESIZE


class Ram:
    """Guest memory of one region, in a memfd that cannot shrink. ``view`` is its bytes; addresses are guest addresses.

    ``size`` in bytes is rounded up to pages. ``seal=False`` leaves it open to truncation, for tests.
    """

    def __init__(self, size: int, guest_addr: int = 0x1_0000, *, seal: bool = True, name: str = "guest-ram") -> None:
        self.size = -(-size // _PAGE) * _PAGE
        self.guest_addr = guest_addr
        self.fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(self.fd, self.size)
            if seal:
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._mmap = mmap.mmap(self.fd, self.size, mmap.MAP_SHARED)
        except OSError:
            os.close(self.fd)
            raise
        self.view = memoryview(self._mmap)
        self._next = guest_addr

    #: where the frontend sees the region, as it tells the backend; any numbering would do that is not the guest's
    @property
    def user_addr(self) -> int:
        return self.guest_addr + 0x7F00_0000_0000

    @property
    def info(self) -> RegionInfo:
        return RegionInfo(self.guest_addr, self.size, self.user_addr, 0)

    def region(self) -> Region:
        """This memory as part of a ``GuestMemory``, for translating addresses."""
        return Region(self.guest_addr, self.size, self.user_addr, Mapping(self.view))

    def alloc(self, size: int, align: int = 16) -> int:
        """The guest address of ``size`` fresh zeroed bytes; they are never given back.

        :raises MemoryError: there is not enough left
        """
        start = -(-self._next // align) * align
        if start + size > self.guest_addr + self.size:
            raise MemoryError(f"{size} bytes of guest memory")
        self._next = start + size
        return start

    def at(self, addr: int, size: int) -> memoryview:
        """The ``size`` bytes at guest address ``addr``, writable."""
        offset = addr - self.guest_addr
        if not 0 <= offset <= offset + size <= self.size:
            raise ValueError(f"{addr:#x}+{size} is not in this memory")
        return self.view[offset : offset + size]

    def close(self) -> None:
        self.view = memoryview(b"")
        with contextlib.suppress(BufferError):  # somebody still holds slices: unmapped when they are dropped
            self._mmap.close()
        with contextlib.suppress(OSError):
            os.close(self.fd)
        self.fd = -1


@dataclass(slots=True)
class Queue:
    """One virtqueue of a frontend: its ring (driver side) and its eventfds."""

    index: int
    ring: DriverQueue
    setup: RingSetup
    kick_fd: int
    call_fd: int  #: readable when the device has signalled
    err_fd: int  #: readable when the device says that the ring is broken
    peer_fd: int  #: the connection's socket, readable between messages only when the backend has left
    started: bool = False

    def kick(self) -> bool:
        """Kick the device if it asked for it; whether it did."""
        needed = self.ring.kick_needed()
        if needed:
            os.eventfd_write(self.kick_fd, 1)
        return needed

    def wait(self, timeout: float | None = 5.0) -> list[tuple[Any, int]]:
        """Completions: those that are there, or else, after a signal of the device or ``timeout`` seconds, those that
        are there then.

        :raises DeviceError: as ``DriverQueue.poll()``
        :raises Disconnected: there are none, and there will be none, because the backend left
        """
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            done = self.ring.poll()
            if done:
                return done
            if self.ring.enable_notifications():
                continue
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0:
                return []
            readable = select.select([self.call_fd, self.peer_fd], [], [], left)[0]
            if self.call_fd in readable:
                os.eventfd_read(self.call_fd)
            elif readable:
                done = self.ring.poll()  # what it completed before it left
                if not done:
                    raise Disconnected("the backend left")
                return done

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)


class Frontend:
    """One connection to a backend. The order of calls: ``negotiate()``, ``add_queue()`` for each queue, ``start()``.

    ``sock`` is a connected Unix stream socket; ``ram`` the guest's memory (made, 16 MiB, if none is given);
    ``timeout`` in seconds is for each answer of the backend.
    """

    def __init__(self, sock: socket.socket, *, ram: Ram | None = None, timeout: float = 5.0) -> None:
        sock.settimeout(timeout)
        self._socket = sock
        self.machine = FrontendMachine()
        self.ram = ram if ram is not None else Ram(16 << 20)
        self._own_ram = ram is None
        self._slots: list[Ram] = [self.ram]
        self.queues: dict[int, Queue] = {}
        self._channel: socket.socket | None = None
        self._memory_sent = False
        self.running = False

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, ram: Ram | None = None, timeout: float = 5.0) -> Frontend:
        """:raises OSError: nobody listens there"""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        end = time.monotonic() + timeout
        try:
            sock.settimeout(timeout)
            while True:
                try:
                    sock.connect(os.fspath(path))
                    break
                except BlockingIOError:  # a Unix socket with a full backlog says so at once
                    if time.monotonic() > end:
                        raise TimeoutError("too many wait for this backend already") from None
                    time.sleep(0.005)
            return cls(sock, ram=ram, timeout=timeout)
        except OSError:
            sock.close()
            raise

    def __enter__(self) -> Frontend:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave, as a VMM that quits."""
        self._socket.close()
        if self._channel is not None:
            self._channel.close()
        for queue in self.queues.values():
            queue.close()
        self.queues = {}
        for ram in self._slots:
            if ram is not self.ram or self._own_ram:
                ram.close()
        self._slots = []

    # --- messages

    def _do(self, steps: Generator[Send, bytes | None, _T]) -> _T:
        reply: bytes | None = None
        try:
            while True:
                send = steps.send(reply)
                self.send(send.data, send.fds)
                reply = None
                if send.answered:
                    header = self._receive(HEADER.size)
                    reply = self._receive(self.machine.reply_size(send.request, header))
        except StopIteration as end:
            result: _T = end.value
            return result

    def send(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        """Send raw bytes to the backend; for tests of what a frontend should not do.

        :raises Disconnected: it is gone
        """
        try:
            sent = self._socket.sendmsg([data], rights(fds))
            if sent < len(data):
                self._socket.sendall(data[sent:])
        except OSError as e:
            raise Disconnected(f"the backend left: {e}") from None

    def _receive(self, size: int, sock: socket.socket | None = None) -> bytes:
        data = b""
        while len(data) < size:
            try:
                part = (sock or self._socket).recv(size - len(data))
            except TimeoutError:
                raise
            except OSError as e:
                raise Disconnected(f"the backend left: {e}") from None
            if not part:
                raise Disconnected("the backend left")
            data += part
        return data

    # --- set-up

    def negotiate(self, features: int = DEFAULT_FEATURES, protocol: ProtocolFeature = KNOWN_PROTOCOL_FEATURES) -> int:
        """Agree on features, those wanted here and offered there, and open the backend's request channel. Returns the
        features agreed on.

        :raises Disconnected: the backend hung up
        :raises ProtocolError: it answered nonsense
        :raises TimeoutError: it did not answer
        """
        self._do(self.machine.negotiate(features, protocol))
        if self.machine.protocol_features & ProtocolFeature.BACKEND_REQ:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            ours.settimeout(self._socket.gettimeout())
            self._channel = ours
            with theirs:
                self._do(self.machine.set_channel(theirs.fileno()))
        return self.machine.features

    def add_queue(self, index: int, size: int = 256, *, indirect: int = 16) -> Queue:
        """Make a ring in guest memory, with an indirect table of ``indirect`` entries for each descriptor if that was
        agreed on.
        """
        features = self.machine.features
        tables = indirect if features & Feature.INDIRECT_DESC else 0
        bytes_needed = SplitDriverQueue.memory_size(size, tables)
        address = self.ram.alloc(bytes_needed, _PAGE)
        queue = Queue(
            index,
            *self._new_ring(size, address, tables),
            kick_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            call_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            err_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            peer_fd=self._socket.fileno(),
        )
        self.queues[index] = queue
        return queue

    def _new_ring(self, size: int, address: int, tables: int) -> tuple[SplitDriverQueue, RingSetup]:
        view = self.ram.at(address, SplitDriverQueue.memory_size(size, tables))
        view[:] = bytes(len(view))
        ring = SplitDriverQueue(
            size,
            view,
            address,
            fences=host_fences(),
            event_idx=bool(self.machine.features & Feature.EVENT_IDX),
            indirect=tables,
        )
        shift = self.ram.user_addr - self.ram.guest_addr
        setup = RingSetup(size, 0, ring.desc_addr + shift, ring.avail_addr + shift, ring.used_addr + shift)
        return ring, setup

    def start(self) -> None:
        """DRIVER_OK, or the end of a pause: features, memory, rings, in QEMU's order.

        :raises RequestFailed: the backend refused some of it
        """
        self._do(self.machine.acknowledge())
        slots = bool(self.machine.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS)
        if not (slots and self._memory_sent):  # slots stay for the connection, a table is sent with each start
            self._do(self.machine.set_memory([(ram.info, ram.fd) for ram in self._slots]))
            self._memory_sent = True
        for queue in self.queues.values():
            self._do(self.machine.set_up_ring(queue.index, queue.setup, queue.kick_fd, queue.call_fd, queue.err_fd))
        for queue in self.queues.values():
            self._do(self.machine.enable(queue.index))
            queue.started = True
        self.running = True

    def stop(self) -> dict[int, int]:
        """Pause: disable and stop all rings; the bases by queue. ``start()`` goes on from them."""
        for queue in self.queues.values():
            self._do(self.machine.enable(queue.index, False))
        bases = {}
        for queue in self.queues.values():
            base = self._do(self.machine.stop_ring(queue.index))
            bases[queue.index] = base
            setup = queue.setup
            queue.setup = RingSetup(setup.size, base, setup.desc, setup.avail, setup.used)
            queue.started = False
        self.running = False
        return bases

    def reset(self, *, tell: bool = True) -> None:
        """A guest's reset: stop, and forget all rings and what was in flight. ``tell``: by RESET_DEVICE, if it was
        agreed on; without, as QEMU's base class does, it shows only in how the rings start. Then ``add_queue()`` and
        ``start()`` again.
        """
        if self.running:
            self.stop()
        if tell and self.machine.protocol_features & ProtocolFeature.RESET_DEVICE:
            self._do(self.machine.reset_device())
        for queue in self.queues.values():
            queue.close()
        self.queues = {}

    # --- memory

    @property
    def memory(self) -> GuestMemory:
        """All memory slots, for translating addresses."""
        return GuestMemory(ram.region() for ram in self._slots)

    def plug(self, ram: Ram) -> None:
        """Hot-plug one more memory slot; it is closed with the frontend."""
        self._slots.append(ram)
        if self._memory_sent:
            if self.machine.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
                self._do(self.machine.add_region(ram.info, ram.fd))
            else:
                self._do(self.machine.set_memory([(r.info, r.fd) for r in self._slots]))

    def unplug(self, ram: Ram) -> None:
        """Take a memory slot away again. It stays open here."""
        if ram is self.ram or ram not in self._slots:
            raise StateError("only a slot that was plugged can be unplugged")
        self._slots.remove(ram)
        if self._memory_sent:
            if self.machine.protocol_features & ProtocolFeature.CONFIGURE_MEM_SLOTS:
                self._do(self.machine.remove_region(ram.info))
            else:
                self._do(self.machine.set_memory([(r.info, r.fd) for r in self._slots]))

    # --- config space and the backend's requests

    def read_config(self, offset: int, length: int) -> bytes:
        """:raises RequestFailed: it is not there"""
        return self._do(self.machine.get_config(offset, length))

    def write_config(self, offset: int, data: bytes) -> None:
        """:raises RequestFailed: the device does not take it"""
        self._do(self.machine.set_config(offset, data))

    @property
    def channel_fd(self) -> int | None:
        """Readable when the backend has sent a request: see ``backend_request()``."""
        return self._channel.fileno() if self._channel is not None else None

    def backend_request(self, timeout: float | None = 5.0) -> BackendRequest:
        """The next request of the backend (``CONFIG_CHANGE_MSG``).

        :raises TimeoutError: none came within ``timeout`` seconds
        """
        if self._channel is None:
            raise StateError("BACKEND_REQ was not agreed on")
        self._channel.settimeout(timeout)
        request, size = self.machine.backend_request(self._receive(HEADER.size, self._channel))
        self._receive(size, self._channel)
        if request is not BackendRequest.CONFIG_CHANGE_MSG:
            raise MessageError(f"{request.name}, for which nothing was agreed on")
        return request
