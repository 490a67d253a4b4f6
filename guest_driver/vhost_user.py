"""A transport that is a vhost-user frontend: a small VMM of our own, whose "guest" is this process.

It needs no VM and no privilege: for tests, demos, benchmarks, and programs on the host that want to use the TEE as a
guest does.
"""

from __future__ import annotations

import contextlib
import os
import select

from device.config import Config
from device.messages import CONFIG
from device.wire import Queue, only_usable
from guest_driver.arena import PAGE, Arena
from guest_driver.transport import TransportError
from pyvhost.errors import Disconnected, PyvhostError
from pyvhost.io.frontend import DEFAULT_FEATURES, Frontend, Ram
from pyvhost.vring.api import DriverQueue
from tee.memory import Memory, Range

_READINGS = 100
"""After which a config space that is another one each time is given up."""


class VhostUserTransport:
    """Connects to the backend at ``path`` and starts the device, with ``memory_bytes`` of guest memory.

    Raises OSError where nobody listens, PyvhostError where the backend does not behave or is none of ours.
    """

    def __init__(self, path: str, *, wanted: int, memory_bytes: int = 64 << 20, queue_size: int = 128) -> None:
        self._ram = Ram(memory_bytes)
        try:
            self.frontend = Frontend.connect(path, ram=self._ram)
        except OSError:
            self._ram.close()
            raise
        self._poll = select.epoll()
        self._peer_fd = -1
        try:
            agreed = self.frontend.negotiate(DEFAULT_FEATURES | wanted)
            self.features = self.frontend.machine.features = only_usable(agreed)
            config = Config.unpack(self.read_config(CONFIG.size))
            for index in range(Queue.REQUEST + config.num_request_queues):
                queue = self.frontend.add_queue(index, queue_size)
                self._poll.register(queue.call_fd, select.EPOLLIN)
                self._peer_fd = queue.peer_fd
            if self.frontend.channel_fd is not None:
                self._poll.register(self.frontend.channel_fd, select.EPOLLIN)
            self._arena = self._make_arena(memory_bytes)
            self.frontend.start()
            # between messages this one says nothing but that the backend has left
            self._poll.register(self._peer_fd, select.EPOLLIN)
        except BaseException:
            self.close()
            raise

    def _make_arena(self, memory_bytes: int) -> Arena:
        """All that the rings have left."""
        ram = self.frontend.ram
        start = ram.alloc(0, PAGE)
        size = (ram.guest_addr + ram.size - start) // PAGE * PAGE
        ram.alloc(size, PAGE)
        return Arena(ram.at(start, size), [Range(start, size)])

    @property
    def queues(self) -> list[DriverQueue]:
        """See :class:`~guest_driver.transport.Transport`."""
        return [queue.ring for queue in self.frontend.queues.values()]

    def read_config(self, size: int) -> bytes:
        """See :class:`~guest_driver.transport.Transport`."""
        try:
            before = self.frontend.read_config(0, size)
            for _ in range(_READINGS):  # vhost-user has no configuration generation
                again = self.frontend.read_config(0, size)
                if again == before:
                    return again
                before = again
        except (PyvhostError, OSError) as e:
            raise TransportError(f"the config space cannot be read: {e}") from None
        raise TransportError("the device's config space does not come to rest")

    def kick(self, index: int) -> None:
        """See :class:`~guest_driver.transport.Transport`."""
        os.eventfd_write(self.frontend.queues[index].kick_fd, 1)

    def fileno(self) -> int:
        """See :class:`~guest_driver.transport.Transport`."""
        return self._poll.fileno()

    def acknowledge(self) -> bool:
        """See :class:`~guest_driver.transport.Transport`."""
        changed = gone = False
        for fd, _ in self._poll.poll(0):
            if fd == self._peer_fd:
                gone = True
                self._poll.unregister(fd)
            elif fd == self.frontend.channel_fd:
                self._take_backend_request(fd)
                changed = True
            else:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(fd)
        if gone:
            raise TransportError("the backend has left")
        return changed

    def _take_backend_request(self, fd: int) -> None:
        try:
            self.frontend.backend_request()
        except (PyvhostError, OSError):
            self._poll.unregister(fd)  # the backend has gone, or talks nonsense

    def allocate(self, size: int) -> Memory:
        """See :class:`~guest_driver.transport.Transport`."""
        return self._arena.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~guest_driver.transport.Transport`."""
        self._arena.release(memory)

    def close(self) -> None:
        """See :class:`~guest_driver.transport.Transport`."""
        with contextlib.suppress(Disconnected, PyvhostError, OSError):
            if self.frontend.running:
                self.frontend.reset()
        self._poll.close()
        self.frontend.close()
        self._ram.close()
