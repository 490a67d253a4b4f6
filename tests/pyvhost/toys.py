"""Devices that tests serve: written as a user of the library would write them."""

from __future__ import annotations

import os

from pyvhost.device import Device, Link
from pyvhost.vring.api import Chain, DeviceQueue


class Echo(Device):
    """Answers each request with its own bytes, as far as there is room, in order and at once."""

    num_queues = 2
    max_queue_size = 256
    config_size = 16

    def __init__(self) -> None:
        self.config = bytearray(b"echo device v1..")

    def read_config(self, offset: int, length: int) -> bytes:
        return bytes(self.config[offset : offset + length])

    def write_config(self, offset: int, data: bytes) -> None:
        self.config[offset : offset + len(data)] = data
        self.link.config_changed()

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        return queue is not None and queue.drain(self.echo, budget=64)

    def echo(self, chain: Chain) -> int:
        return chain.write(chain.read(length=chain.writable_bytes))


class Late(Device):
    """Takes requests, and completes them only when it is told to; writes down every hook."""

    num_queues = 2

    def __init__(self) -> None:
        self.held: list[tuple[int, Chain]] = []
        self.hooks: list[tuple[object, ...]] = []

    def connected(self, link: Link) -> None:
        self.hooks.append(("connected",))

    def negotiated(self, features: int) -> None:
        self.hooks.append(("negotiated",))

    def queue_started(self, index: int, queue: DeviceQueue, resumed: bool) -> None:
        self.hooks.append(("started", index, resumed))

    def queue_stopped(self, index: int) -> None:
        self.hooks.append(("stopped", index))

    def reset(self) -> None:
        self.held.clear()
        self.hooks.append(("reset",))

    def disconnected(self) -> None:
        self.held.clear()
        self.hooks.append(("disconnected",))

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        assert queue is not None
        for _ in range(16):
            chain = queue.pop()
            if chain is None:
                return queue.enable_notifications()
            self.held.append((index, chain))
        return True

    def finish(self, text: bytes = b"late") -> None:
        """Complete what is held, the newest first."""
        while self.held:
            index, chain = self.held.pop()
            queue = self.queues[index]
            assert queue is not None
            queue.push(chain.head, chain.write(text))
            queue.notify()


class Background(Echo):
    """Does its work in ``run()``, some of it woken by an eventfd of its own."""

    num_queues = 1

    def __init__(self) -> None:
        super().__init__()
        self.fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.wakeups = (self.fd,)
        self.woken = 0
        self.runs = 0
        self.todo: list[Chain] = []

    def on_wakeup(self, fd: int) -> None:
        self.woken += os.eventfd_read(fd)

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        assert queue is not None
        while (chain := queue.pop()) is not None:
            self.todo.append(chain)
        return queue.enable_notifications()

    def run(self) -> float | None:
        self.runs += 1
        queue = self.queues[0] if self.queues else None
        if queue is None or not self.todo:
            return None
        chain = self.todo.pop(0)
        queue.push(chain.head, self.echo(chain))
        queue.notify()
        return 0 if self.todo else 0.001


class Faulty(Echo):
    """Raises in the hook whose name it is given."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def _maybe(self, where: str) -> None:
        if where == self.where:
            raise RuntimeError(f"planned failure in {where}")

    def connected(self, link: Link) -> None:
        self._maybe("connected")

    def negotiated(self, features: int) -> None:
        self._maybe("negotiated")

    def queue_started(self, index: int, queue: DeviceQueue, resumed: bool) -> None:
        self._maybe("queue_started")

    def queue_stopped(self, index: int) -> None:
        self._maybe("queue_stopped")

    def process(self, index: int) -> bool:
        self._maybe("process")
        return super().process(index)

    def run(self) -> float | None:
        if any(self.queues):
            self._maybe("run")
        return None

    def disconnected(self) -> None:
        self._maybe("disconnected")
