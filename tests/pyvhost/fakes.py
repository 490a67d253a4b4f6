"""A system for sessions to run on that is all bookkeeping: no descriptor, thread or mapping is real."""

from __future__ import annotations

from collections.abc import Callable

from pyvhost.device import Device
from pyvhost.dirtylog import AtomicOr
from pyvhost.errors import Disconnected, MemoryFault, MessageError
from pyvhost.memory import Mapping
from pyvhost.messages import (
    CONFIG,
    HEADER,
    MEM_REGION,
    MEM_TABLE,
    REGION,
    U64,
    VRING_ADDR,
    VRING_STATE,
    Feature,
    Flag,
    FrontendRequest,
    ProtocolFeature,
    encode,
)
from pyvhost.session import Session
from pyvhost.vring.api import Fences
from pyvhost.vring.packed import INITIAL_BASE, PackedLayout
from pyvhost.vring.packed_driver import PackedDriverQueue
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_driver import SplitDriverQueue

F = FrontendRequest
NOT_A_FILE = 900  # fds from here on cannot be mapped
NOT_POLLABLE = 950  # … and from here on not polled either


class FakePorts:
    """``Ports`` in memory. Every fd that is mapped shares one bytearray per number, as a file would be."""

    def __init__(self) -> None:
        self.fences = Fences.none()
        self.files: dict[int, bytearray] = {}
        self.open_fds: set[int] = set()
        self.watched: dict[int, Callable[[], object]] = {}
        self.signals: list[int] = []
        self.sent: list[bytes] = []
        self.ready: list[Callable[[], object]] = []
        self.hung_up: str | None = None
        self.mapped = 0
        self.made: dict[int, bytearray] = {}
        self.transfers: list[tuple[int, bytes | None, int, Callable[[bytes | None], object]]] = []

    def give(self, *fds: int) -> list[int]:
        """The kernel made these numbers ours."""
        assert not self.open_fds & set(fds)
        self.open_fds.update(fds)
        return list(fds)

    def map(self, fd: int, size: int, offset: int) -> Mapping:
        assert fd in self.open_fds
        file = self.files.setdefault(fd, bytearray(1 << 17))
        if fd >= NOT_A_FILE or not 0 < size <= len(file) - offset:
            raise MemoryFault("too short")
        self.mapped += 1
        return Mapping(memoryview(file)[offset : offset + size], self._unmap)

    def _unmap(self) -> None:
        self.mapped -= 1

    def allocate(self, size: int) -> int:
        fd = -2 - len(self.made)  # goes away with the reply
        self.made[fd] = bytearray(size)
        return fd

    def atomic_or(self, view: memoryview) -> AtomicOr | None:
        def set_bits(index: int, mask: int) -> None:
            view[index] |= mask

        return set_bits

    def transfer(self, fd: int, data: bytes | None, limit: int, done: Callable[[bytes | None], object]) -> None:
        assert fd in self.open_fds
        self.transfers.append((fd, data, limit, done))

    def close_fd(self, fd: int) -> None:
        assert fd not in self.watched
        self.open_fds.remove(fd)

    def watch(self, fd: int, call: Callable[[], object]) -> None:
        assert fd in self.open_fds
        if fd >= NOT_POLLABLE or fd in self.watched:
            raise MessageError("cannot be polled")
        self.watched[fd] = call

    def unwatch(self, fd: int) -> None:
        del self.watched[fd]

    def signal(self, fd: int) -> None:
        assert fd in self.open_fds
        self.signals.append(fd)

    def check_channel(self, fd: int) -> None:
        assert fd in self.open_fds
        if fd >= NOT_A_FILE:
            raise MessageError("no socket")

    def check_signal(self, fd: int) -> None:
        assert fd in self.open_fds
        if fd >= NOT_A_FILE:
            raise MessageError("no eventfd")

    def send(self, fd: int, message: bytes) -> bool:
        assert fd in self.open_fds
        self.sent.append(message)
        return True

    def wake(self, call: Callable[[], object]) -> None:
        self.ready.append(call)

    def alone(self) -> bool:
        return False

    def post(self, call: Callable[[], object]) -> None:
        self.ready.append(call)

    def hang_up(self, why: str) -> None:
        self.hung_up = why

    def turn(self) -> None:
        """One turn of the loop."""
        ready, self.ready = self.ready, []
        for call in ready:
            call()


GUEST, USER, RAM = 0x4000, 0x7000_0000, 1 << 16


class Vmm:
    """A frontend that speaks bytes to a session directly."""

    def __init__(self, device: Device, *, protocol: int | None = None, features: int | None = None) -> None:
        self.ports = FakePorts()
        self.session = Session(device, self.ports)
        self.backend = self.session.backend
        self.next_fd = 10
        self.reply_fds: list[int] = []
        self.drivers: dict[int, SplitDriverQueue | PackedDriverQueue] = {}
        usual = self.backend.offered_features & ~(Feature.RING_PACKED | Feature.LOG_ALL)
        self.features = usual if features is None else features
        if protocol is None:
            protocol = self.backend.offered_protocol_features
        self.protocol = ProtocolFeature(protocol)

    @property
    def packed(self) -> bool:
        return bool(self.features & Feature.RING_PACKED)

    @property
    def initial_base(self) -> int:
        return INITIAL_BASE if self.packed else 0

    def fd(self) -> int:
        self.next_fd += 1
        return self.ports.give(self.next_fd)[0]

    def tell(self, request: int, payload: bytes = b"", *fds: int, flags: int = 0) -> bytes:
        """Send; the reply's payload, b"" if there is none."""
        message = encode(request, payload, flags)
        reply = self.session.receive(message[: HEADER.size], message[HEADER.size :], list(fds))
        if reply is None:
            return b""
        self.reply_fds = list(reply.fds)
        head = HEADER.unpack(reply.data)
        assert head.request == request
        assert head.flags == Flag.VERSION | Flag.REPLY
        assert head.size == len(reply.data) - HEADER.size
        return reply.data[HEADER.size :]

    def ack(self, request: int, payload: bytes = b"", *fds: int) -> int:
        """Send with NEED_REPLY; the acknowledgement, 0 for success."""
        value: int = U64.unpack(self.tell(request, payload, *fds, flags=Flag.NEED_REPLY)).value
        return value

    def negotiate(self) -> None:
        assert U64.unpack(self.tell(F.GET_FEATURES)).value == self.backend.offered_features
        if self.features & Feature.PROTOCOL_FEATURES:
            self.tell(F.GET_PROTOCOL_FEATURES)
            self.tell(F.SET_PROTOCOL_FEATURES, U64.pack(self.protocol))
        self.tell(F.SET_OWNER)
        self.tell(F.SET_FEATURES, U64.pack(self.features))

    def table(self, *fds: int) -> bytes:
        """SET_MEM_TABLE's payload: one region of RAM for each fd."""
        regions = [REGION.pack(GUEST + n * RAM, RAM, USER + n * RAM, 0) for n in range(len(fds))]
        return MEM_TABLE.pack(len(fds)) + b"".join(regions)

    def set_memory(self) -> int:
        fd = self.fd()
        self.ports.files[fd] = bytearray(1 << 17)
        self.ram = memoryview(self.ports.files[fd])[:RAM]
        self.tell(F.SET_MEM_TABLE, self.table(fd), fd)
        return fd

    def ring(self, index: int, base: int | None = None, *, fresh: bool = True, kick: bool = True) -> None:
        """Configure ring ``index``; ``fresh``: with a new driver."""
        size, at = 8, index * 0x1000
        layout = PackedLayout(size) if self.packed else SplitLayout(size)
        view = self.ram[at : at + 0x1000]
        if fresh:
            view[:] = bytes(0x1000)
            kind = PackedDriverQueue if self.packed else SplitDriverQueue
            event_idx = bool(self.features & Feature.EVENT_IDX)
            self.drivers[index] = kind(size, view, GUEST + at, fences=Fences.none(), event_idx=event_idx)
        self.tell(F.SET_VRING_NUM, VRING_STATE.pack(index, size))
        self.tell(F.SET_VRING_BASE, VRING_STATE.pack(index, self.initial_base if base is None else base))
        user = USER + at
        self.tell(
            F.SET_VRING_ADDR,
            VRING_ADDR.pack(index, 0, user, user + layout.used_offset, user + layout.avail_offset, 0),
        )
        self.tell(F.SET_VRING_CALL, U64.pack(index), self.fd())
        self.tell(F.SET_VRING_ERR, U64.pack(index), self.fd())
        if kick:
            self.tell(F.SET_VRING_KICK, U64.pack(index), self.fd())

    def enable(self, index: int, on: int = 1) -> None:
        self.tell(F.SET_VRING_ENABLE, VRING_STATE.pack(index, on))

    def start(self, *indexes: int, bases: dict[int, int] | None = None, fresh: bool = True) -> None:
        """All of DRIVER_OK in QEMU's order."""
        self.tell(F.SET_FEATURES, U64.pack(self.features))
        if fresh or not hasattr(self, "ram"):
            self.set_memory()
        for index in indexes:
            self.ring(index, (bases or {}).get(index, self.initial_base), fresh=fresh)
        for index in indexes:
            self.enable(index)
        self.ports.turn()

    def stop(self, *indexes: int) -> dict[int, int]:
        for index in indexes:
            self.enable(index, 0)
        return {index: self.base(index) for index in indexes}

    def base(self, index: int) -> int:
        state = VRING_STATE.unpack(self.tell(F.GET_VRING_BASE, VRING_STATE.pack(index, 0)))
        assert state.index == index
        num: int = state.num
        return num

    def add(self, index: int, text: bytes = b"hello", room: int = 64) -> None:
        """Make a request available, and kick if the device asked for it."""
        at = 0x8000 + 0x400 * index
        text_at = at + sum(text) % 16 * 16  # so that two texts do not meet
        self.ram[text_at : text_at + len(text)] = text
        driver = self.drivers[index]
        driver.add([(GUEST + text_at, len(text))], [(GUEST + at + 0x200, room)], text)
        if driver.kick_needed():
            kick = self.backend.rings[index].kick
            if kick in self.ports.watched:
                self.ports.watched[kick]()

    def answer(self, index: int, length: int) -> bytes:
        at = 0x8000 + 0x400 * index + 0x200
        return bytes(self.ram[at : at + length])

    def leave(self) -> None:
        """Disconnect, and hold the machine to what it promised."""
        self.session.disconnect()
        assert not self.ports.open_fds
        assert not self.ports.watched
        assert self.ports.mapped == 0


def config(offset: int, size: int, flags: int = 0, data: bytes | None = None) -> bytes:
    return CONFIG.pack(offset, size, flags) + (bytes(size) if data is None else data)


def mem_region(guest: int, size: int, user: int, offset: int = 0) -> bytes:
    return MEM_REGION.pack((guest, size, user, offset))


__all__ = ["Disconnected", "F", "FakePorts", "Vmm", "config", "mem_region"]
