"""The path over the virtio-tee device: guests are vhost-user frontends, with memory of their own.

What is timed has the backend in a process of its own, as in earnest; what is counted has it on threads of this one.
"""

from __future__ import annotations

import secrets
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import trio

from device.config import Limits
from device.wire import Event, Queue, Request
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.vhost_user import VhostUserTransport
from host_backend.device import TeeDevice
from host_backend.router import Router
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve
from pyvhost.io.sockets import Listener
from pyvhost.memory import GuestMemory
from pyvhost.vring.api import Chain, DeviceQueue
from tee.bounce import BouncingTee
from tee.driver import TeeDriver
from virtio_tee.compare.meter import PAGE, Meter, Party, Readable, What
from virtio_tee.compare.site import GUEST_BYTES, Kit, Site, running
from virtio_tee.compare.tees import MeteredTee, soft_tee

READY_S = 20.0
_RPC_REQUESTS = frozenset({Request.RPC_REPLY, Request.RPC_WITHDRAWN_ACK})
_RPC_EVENTS = frozenset({Event.RPC, Event.RPC_WITHDRAWN})


@contextmanager
def virtio(kit: Kit, place: str, guests: int, meter: Meter | None, *, bounce: bool) -> Iterator[Site]:
    """See :data:`virtio_tee.compare.paths.Open`. ``bounce``: the TEE is given copies."""
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtee-")))
        sockets = [str(folder / f"{number}.sock") for number in range(guests)]
        stack.enter_context(_counted(kit, sockets, meter, bounce) if meter else _process(kit, sockets, bounce))
        drivers: list[TeeDriver] = [
            stack.enter_context(closing(VirtioTeeDriver(transport(path, meter)))) for path in sockets
        ]
        yield Site(stack.enter_context(running(kit, place, drivers)), [""] * guests)


# -- timed


@contextmanager
def _process(kit: Kit, sockets: Sequence[str], bounce: bool) -> Iterator[None]:
    words = [sys.executable, "-m", "virtio_tee.compare.backend", str(kit.key_file), *sockets]
    backend = subprocess.Popen([*words, "--bounce"] if bounce else words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert backend.stdout is not None
        if not backend.stdout.readline():
            raise RuntimeError("the backend did not start; what it said stands above")
        yield
    finally:
        backend.terminate()
        try:
            backend.wait(READY_S)
        except subprocess.TimeoutExpired:
            backend.kill()
            backend.wait()
        for stream in (backend.stdin, backend.stdout):
            if stream is not None:
                stream.close()


# -- in this process


@contextmanager
def _counted(kit: Kit, sockets: Sequence[str], meter: Meter, bounce: bool) -> Iterator[None]:
    door = MeteredTee(soft_tee(kit.key), meter, Party.HOST, switches=True, in_guest=lambda memory: bool(memory.ranges))
    with in_process(BouncingTee(door) if bounce else door, sockets, meter):
        yield


@contextmanager
def in_process(
    tee: TeeDriver, sockets: Sequence[str], meter: Meter | None, ffa_vms: Sequence[int | None] | None = None
) -> Iterator[None]:
    """A backend on threads of this process; ``ffa_vms`` are its guests' FF-A endpoints."""
    router = Router(tee, time.monotonic) if meter is None else _CountedRouter(tee, meter)
    devices = [_device(router, meter, number, ffa_vm) for number, ffa_vm in enumerate(ffa_vms or [None] * len(sockets))]
    started, tokens, scope = threading.Event(), [], trio.CancelScope()
    with ExitStack() as stack:
        listeners = [stack.enter_context(Listener.at_path(path)) for path in sockets]
        dataplane = stack.enter_context(DataPlane("virtio-tee"))
        if meter is not None:
            _count_signals(dataplane, meter)
        dataplane.post(lambda: dataplane.add_runner(router))

        async def main() -> None:
            tokens.append(trio.lowlevel.current_trio_token())
            started.set()
            with scope:
                async with trio.open_nursery() as nursery:
                    for device, listener in zip(devices, listeners, strict=True):
                        nursery.start_soon(serve, device, listener, dataplane)

        thread = threading.Thread(target=lambda: trio.run(main), daemon=True)
        thread.start()
        started.wait()
        try:
            yield
        finally:
            tokens[0].run_sync_soon(scope.cancel)
            thread.join(READY_S)


def _device(router: Router, meter: Meter | None, number: int, ffa_vm: int | None) -> TeeDevice:
    device = TeeDevice if meter is None else partial(_CountedDevice, meter)
    return device(
        router,
        vm=f"vm{number}",
        limits=Limits(),
        request_queues=1,
        clock=time.monotonic,
        new_epoch=lambda: secrets.randbits(64),
        ffa_vm=ffa_vm,
    )


def _count_signals(dataplane: DataPlane, meter: Meter) -> None:
    signal = dataplane.signal

    def counted(fd: int) -> bool:
        meter.notification(Party.HOST, Party.GUEST, "interrupt")
        return signal(fd)

    dataplane.signal = counted


def transport(path: str, meter: Meter | None, memory_bytes: int = GUEST_BYTES) -> VhostUserTransport:
    """A guest's, whose memory is ``memory_bytes``, all of it shared with the backend."""
    kind = VhostUserTransport if meter is None else partial(_CountedTransport, meter)
    return kind(path, wanted=int(DRIVER_FEATURES), memory_bytes=memory_bytes)


class _CountedTransport(VhostUserTransport):
    """Counts kicks: each is an exit of the VM."""

    def __init__(self, meter: Meter, path: str, **options: int) -> None:
        self._meter = meter
        super().__init__(path, **options)
        meter.looks.setdefault(Party.GUEST, []).append(lambda: [Readable(self._ram.view, True)])

    def kick(self, index: int) -> None:
        self._meter.add(What.VM_EXITS)
        self._meter.notification(Party.GUEST, Party.HOST, "kick")
        super().kick(index)


class _CountedRouter(Router):
    """Works as the host."""

    def __init__(self, tee: TeeDriver, meter: Meter) -> None:
        super().__init__(tee, time.monotonic)
        self._meter = meter

    def run(self) -> float | None:
        with self._meter.within(Party.HOST):
            return super().run()


class _CountedDevice(TeeDevice):
    """Works as the host, which can read all memory that the frontend gives it."""

    spin_us = 0  # so that each kick and each interrupt has its reason

    def __init__(self, meter: Meter, router: Router, **options: Any) -> None:
        super().__init__(router, **options)
        self._meter = meter
        meter.looks.setdefault(Party.HOST, []).append(self._look)

    def _look(self) -> Iterable[Readable]:
        return [Readable(region.view, True) for region in self.memory]

    def memory_changed(self, memory: GuestMemory) -> None:
        self._meter.add(What.PAGES_SHARED, sum(region.size // PAGE for region in memory))
        super().memory_changed(memory)

    def queue_started(self, index: int, queue: DeviceQueue, resumed: bool) -> None:
        counted: Any = CountedQueue(queue, index, self._meter)
        self.queues[index] = counted
        super().queue_started(index, counted, resumed)

    def process(self, index: int) -> bool:
        with self._meter.within(Party.HOST):
            return super().process(index)


class CountedQueue:
    """A device's queue, whose requests are messages."""

    def __init__(self, queue: Any, index: int, meter: Meter) -> None:
        self._queue = queue
        self._index = index
        self._meter = meter
        self._taken: dict[int, CountedChain] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    @property
    def spin_us(self) -> int:
        return 0

    @spin_us.setter
    def spin_us(self, value: int) -> None:
        self._queue.spin_us = 0

    def pop(self) -> CountedChain | None:
        chain = self._queue.pop()
        return None if chain is None else self._take(chain)

    def drain(self, handler: Callable[[Any], int | None], *args: int, **options: int) -> bool:
        def handle(chain: Chain) -> int | None:
            counted = self._take(chain)
            written = handler(counted)
            if written is not None:
                self._returned(chain.head, written)
            return written

        more: bool = self._queue.drain(handle, *args, **options)
        return more

    def push(self, head: int, written: int = 0) -> None:
        self._returned(head, written)
        self._queue.push(head, written)

    def _take(self, chain: Any) -> CountedChain:
        counted = self._taken[chain.head] = CountedChain(chain, self._meter)
        if self._index != Queue.EVENT:  # there it is a buffer that waits for an event
            counted.kind = int.from_bytes(chain.read(0, 4), "little")
            name, rpc = _request_name(counted.kind), counted.kind in _RPC_REQUESTS
            self._meter.message(Party.GUEST, Party.HOST, name, size=chain.readable_bytes, rpc=rpc)
        return counted

    def _returned(self, head: int, written: int) -> None:
        counted = self._taken.pop(head)
        if self._index != Queue.EVENT:
            rpc = counted.kind in _RPC_REQUESTS
            self._meter.message(Party.HOST, Party.GUEST, "response", kind="response", size=written, rpc=rpc)
        elif written:
            kind = int.from_bytes(counted.head_written, "little")
            name, rpc = f"event {Event(kind).name}", kind in _RPC_EVENTS
            self._meter.message(Party.HOST, Party.GUEST, name, kind="event", size=written, rpc=rpc)


def _request_name(kind: int) -> str:
    return Request(kind).name if kind in set(Request) else f"request {kind:#x}"


class CountedChain:
    """A chain whose copies are counted. What is done with its views is not: that is use in place."""

    def __init__(self, chain: Any, meter: Meter) -> None:
        self._chain = chain
        self._meter = meter
        self.kind = 0
        self.head_written = b""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    def read(self, *args: Any, **options: Any) -> bytes:
        data: bytes = self._chain.read(*args, **options)
        self._meter.copies(len(data))
        return data

    def write(self, data: bytes, offset: int = 0) -> int:
        self._meter.copies(len(data))
        if not offset:
            self.head_written = bytes(data[:4])
        end: int = self._chain.write(data, offset)
        return end
