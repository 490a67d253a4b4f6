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
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from pyvhost.dirtylog import PAGE
from pyvhost.effects import RegionInfo, RingSetup
from pyvhost.errors import Disconnected, MessageError, StateError
from pyvhost.frontend import KNOWN_PROTOCOL_FEATURES, FrontendMachine, Send
from pyvhost.io.fence import host_fences
from pyvhost.io.sockets import ANCILLARY_BYTES, fds_of, rights
from pyvhost.io.transfer import read_all, write_all
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.messages import HEADER, BackendRequest, Feature, ProtocolFeature
from pyvhost.vring.api import DriverQueue
from pyvhost.vring.packed import INITIAL_BASE
from pyvhost.vring.packed_driver import PackedDriverQueue
from pyvhost.vring.split_driver import SplitDriverQueue

__all__ = ["Frontend", "Inflight", "Queue", "Ram"]

_T = TypeVar("_T")

#: what ``negotiate()`` asks for unless told otherwise: all ring features that this library's driver side has
DEFAULT_FEATURES = int(Feature.VERSION_1 | Feature.INDIRECT_DESC | Feature.EVENT_IDX)

_PAGE = mmap.PAGESIZE

_MAX_STATE = 1 << 30  # bytes of device state


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
        self._freed: dict[int, list[int]] = {}  # addresses by size

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
        """The guest address of ``size`` zeroed bytes, until ``free()``.

        :raises MemoryError: there is not enough left
        """
        for start in self._freed.get(size, ()):
            if start % align == 0:
                self._freed[size].remove(start)
                self.at(start, size)[:] = bytes(size)
                return start
        start = -(-self._next // align) * align
        if start + size > self.guest_addr + self.size:
            raise MemoryError(f"{size} bytes of guest memory")
        self._next = start + size
        return start

    def free(self, addr: int, size: int) -> None:
        """Give back what ``alloc()`` gave: for the next one of that size."""
        self._freed.setdefault(size, []).append(addr)

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
    ring_memory: tuple[int, int]  #: its address and size in bytes, with the indirect tables
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


@dataclass(frozen=True, slots=True)
class Inflight:
    """An inflight region that a backend made, kept for it and for the next one. ``size`` and ``offset`` in bytes."""

    fd: int
    size: int
    offset: int
    queues: int
    queue_size: int

    def close(self) -> None:
        os.close(self.fd)


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
        self._reply_fds: list[int] = []
        self._log: mmap.mmap | None = None
        self.inflight: Inflight | None = None
        self.running = False

    @classmethod
    def connect(cls, path: str | os.PathLike[str], *, ram: Ram | None = None, timeout: float = 5.0) -> Frontend:
        """:raises OSError: nobody listens there"""
        return cls(_connect(path, timeout), ram=ram, timeout=timeout)

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
        if self.inflight is not None:
            self.inflight.close()
            self.inflight = None
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
                    for fd in self._reply_fds:
                        os.close(fd)
                    self._reply_fds = []
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
                part, ancillary, flags, _ = (sock or self._socket).recvmsg(
                    size - len(data), ANCILLARY_BYTES, socket.MSG_CMSG_CLOEXEC
                )
                fds_of(ancillary, flags, self._reply_fds)
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
        bytes_needed = self._driver.memory_size(size, tables)
        address = self.ram.alloc(bytes_needed, _PAGE)
        queue = Queue(
            index,
            *self._new_ring(size, address, tables),
            kick_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            call_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            err_fd=os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK),
            peer_fd=self._socket.fileno(),
            ring_memory=(address, bytes_needed),
        )
        self.queues[index] = queue
        return queue

    @property
    def _packed(self) -> bool:
        return bool(self.machine.features & Feature.RING_PACKED)

    @property
    def _driver(self) -> type[SplitDriverQueue] | type[PackedDriverQueue]:
        return PackedDriverQueue if self._packed else SplitDriverQueue

    def _new_ring(self, size: int, address: int, tables: int) -> tuple[DriverQueue, RingSetup]:
        features = self.machine.features
        view = self.ram.at(address, self._driver.memory_size(size, tables))
        event_idx = bool(features & Feature.EVENT_IDX)
        ring: SplitDriverQueue | PackedDriverQueue
        if self._packed:
            ring = PackedDriverQueue(size, view, address, fences=host_fences(), event_idx=event_idx, indirect=tables)
        else:
            ring = SplitDriverQueue(
                size,
                view,
                address,
                fences=host_fences(),
                event_idx=event_idx,
                indirect=tables,
                in_order=bool(features & Feature.IN_ORDER),
            )
        shift = self.ram.user_addr - self.ram.guest_addr
        base = INITIAL_BASE if self._packed else 0
        setup = RingSetup(size, base, ring.desc_addr + shift, ring.avail_addr + shift, ring.used_addr + shift)
        return ring, setup

    def start(self) -> None:
        """DRIVER_OK, or the end of a pause: features, memory, rings, in QEMU's order.

        :raises RequestFailed: the backend refused some of it
        """
        self._do(self.machine.acknowledge(log=self._log is not None))
        if self.inflight is not None:
            kept = self.inflight
            self._do(self.machine.set_inflight(kept.fd, kept.size, kept.offset, kept.queues, kept.queue_size))
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
            queue.setup = replace(setup, base=base)
            queue.started = False
        self.running = False
        return bases

    def reconnect(self, path: str | os.PathLike[str]) -> None:
        """Go on with another backend, as a VMM whose backend died: the same features, memory, rings and inflight
        region; each split ring's base is its used index, as nobody answered what it was. The place of a packed ring
        is in the inflight region.

        :raises OSError: nobody listens there
        :raises StateError: the new backend does not offer what was agreed on with the old one; or the rings are
            packed, and there is no inflight region (``track_inflight()``)
        """
        if self._packed and self.inflight is None:
            raise StateError("packed rings whose place only the old backend knew")
        before = self.machine
        timeout = self._socket.gettimeout()
        self._socket.close()
        if self._channel is not None:
            self._channel.close()
            self._channel = None
        self._socket = _connect(path, timeout or 5.0)
        self.machine = FrontendMachine()
        self._memory_sent = False
        self.negotiate(before.features, before.protocol_features)
        if self.machine.features != before.features:
            raise StateError("the new backend has other features")
        for queue in self.queues.values():
            queue.peer_fd = self._socket.fileno()
            if self._packed:
                continue
            used = queue.setup.used - self.ram.user_addr + self.ram.guest_addr
            base = int.from_bytes(self.ram.at(used + 2, 2), "little")
            queue.setup = replace(queue.setup, base=base)
        self.start()

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
            self.ram.free(*queue.ring_memory)
        self.queues = {}

    # --- what is in flight

    def track_inflight(self, queue_size: int = 256) -> bool:
        """Get an inflight region from the backend, for rings of up to ``queue_size`` entries; it is given back at each
        start. Before the first one, after ``negotiate()`` and ``add_queue()``. False if there is none to have."""
        if not self.machine.protocol_features & ProtocolFeature.INFLIGHT_SHMFD:
            return False
        queues = max(self.queues) + 1
        self._do(self.machine.acknowledge())  # they decide on the region's layout
        size, offset = self._do(self.machine.get_inflight(queues, queue_size))
        if not size or not self._reply_fds:
            return False
        if self.inflight is not None:
            self.inflight.close()
        self.inflight = Inflight(self._reply_fds.pop(0), size, offset, queues, queue_size)
        return True

    # --- live migration

    def start_log(self, signal_fd: int | None = None) -> None:
        """Have the backend log what it writes to memory, used rings included; ``signal_fd`` tells of it."""
        pages = -(-max(ram.guest_addr + ram.size for ram in self._slots) // PAGE)
        size = -(-pages // (8 * _PAGE)) * _PAGE
        fd = os.memfd_create("dirty-log", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
            self._log = mmap.mmap(fd, size, mmap.MAP_SHARED)
            self._do(self.machine.set_log(fd, size))
        finally:
            os.close(fd)
        if signal_fd is not None:
            self._do(self.machine.set_log_fd(signal_fd))
        self._log_rings(True)

    def stop_log(self) -> None:
        self._log_rings(False)
        self._log = None

    def _log_rings(self, on: bool) -> None:
        self._do(self.machine.acknowledge(log=on))
        for queue in self.queues.values():
            used = queue.setup.used - self.ram.user_addr + self.ram.guest_addr
            queue.setup = replace(queue.setup, log=used if on else None)
            self._do(self.machine.set_ring_addr(queue.index, queue.setup))

    def take_dirty(self) -> set[int]:
        """Numbers of the pages (guest address // 4096) that were written since the last call. For a test's use: marks
        that come in this very moment may be lost."""
        log = self._log
        if log is None:
            raise StateError("nothing is logged")
        data = log[:]
        log[:] = bytes(len(data))
        return {8 * n + bit for n, byte in enumerate(data) if byte for bit in range(8) if byte >> bit & 1}

    def save_state(self) -> bytes:
        """The device's state; all rings must be stopped.

        :raises RequestFailed: the backend refuses, or it failed
        """
        reader, writer = os.pipe()
        try:
            try:
                self._do(self.machine.set_device_state_fd(writer, load=False))
            finally:
                os.close(writer)
            data = read_all(reader, _MAX_STATE)
        finally:
            os.close(reader)
        self._do(self.machine.check_device_state())
        return data

    def load_state(self, data: bytes) -> None:
        """Give a device its state, before its rings are started.

        :raises RequestFailed: the backend refuses, or cannot use it
        """
        reader, writer = os.pipe()
        try:
            try:
                self._do(self.machine.set_device_state_fd(reader, load=True))
            finally:
                os.close(reader)
            with contextlib.suppress(BrokenPipeError):  # it has seen enough
                write_all(writer, data)
        finally:
            os.close(writer)
        self._do(self.machine.check_device_state())

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


def _connect(path: str | os.PathLike[str], timeout: float) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
    end = time.monotonic() + timeout
    try:
        sock.settimeout(timeout)
        while True:
            try:
                sock.connect(os.fspath(path))
                return sock
            except BlockingIOError:  # a Unix socket with a full backlog says so at once
                if time.monotonic() > end:
                    raise TimeoutError("too many wait for this backend already") from None
                time.sleep(0.005)
    except OSError:
        sock.close()
        raise
