"""The data-plane thread: one loop that polls the kicks of all devices of the process and calls what is due.

Everything a device does happens here. The control plane (any thread) sends work by ``post()``. Each turn of the loop
polls once, then calls, for each readable file descriptor and each waiting piece of work, one bounded piece; work that
is not done waits for the next turn, so that devices are served round robin and a storm of kicks costs one look a turn.

Eventfds that a frontend gave are polled edge-triggered and are never read: an edge comes with every write, so reading
would tell nothing and cost a system call; and a read could block for ever, since whether it blocks is the frontend's
to set.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Protocol

from pyvhost.errors import MessageError, StateError
from pyvhost.io.signals import Signaller

__all__ = ["DataPlane", "Runner"]

log = logging.getLogger("pyvhost")

_RETRY_S = 1.0  # until a runner that failed is called again
_MAX_EVENTS = 64  # taken from the kernel in one turn


class Runner(Protocol):
    """Something with background work: ``run()`` is called when it is due and in each turn after which ``touched`` is
    set."""

    touched: bool

    def run(self) -> float | None:
        """Do a bounded piece; seconds until the next call, 0 for the next turn, None for when touched."""
        ...


class DataPlane:
    """Start it with ``start()`` or as a context manager; share it among all devices of the process."""

    def __init__(self, name: str = "pyvhost") -> None:
        self._name = name
        self._epoll = select.epoll()
        self._command = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._commands: deque[Callable[[], object]] = deque()
        self._ready: deque[Callable[[], object]] = deque()
        self._calls: dict[int, Callable[[], object]] = {self._command: self._do_commands}
        self._edges: set[int] = set()
        self._alone = False
        self._runners: dict[Runner, float | None] = {}  # when each is due, on the monotonic clock
        self._epoll.register(self._command, select.EPOLLIN)
        self._thread: threading.Thread | None = None
        self._signaller = Signaller(name)
        self.signal = self._signaller.signal  #: on the thread only: signal a frontend's eventfd
        self.close_fd = self._signaller.close  #: on the thread only: close a frontend's file descriptor
        self._lock = threading.Lock()
        self._stopping = False
        self._ended = False

    # --- from any thread

    def start(self) -> None:
        """Start the thread.

        :raises StateError: it was started before
        """
        if self._thread is not None or self._ended:
            raise StateError("a data plane is started once")
        self._thread = threading.Thread(target=self._main, name=self._name, daemon=True)
        self._thread.start()
        self._signaller.start()

    def stop(self) -> None:
        """Do what was posted so far, end the thread and wait for it. A second call does nothing."""
        if self._thread is None or self._ended:
            return
        self.post(self._stop)
        self._thread.join()

    def __enter__(self) -> DataPlane:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def post(self, call: Callable[[], object]) -> None:
        """Have ``call`` called on the thread, in the order of posting. What it raises is logged.

        :raises StateError: the data plane has been stopped
        """
        with self._lock:
            if self._ended:
                raise StateError("the data plane has been stopped")
            self._commands.append(call)
            os.eventfd_write(self._command, 1)

    # --- on the thread only

    def alone(self) -> bool:
        """Whether what is called now is all that there was to call in this turn."""
        return self._alone and not self._ready and not self._commands

    def wake(self, call: Callable[[], object]) -> None:
        """Have ``call`` called in the next turn."""
        self._ready.append(call)

    def watch(self, fd: int, call: Callable[[], object], *, edge: bool = False) -> None:
        """Have ``call`` called when ``fd`` is readable; ``edge``: when it becomes so (again).

        :raises MessageError: ``fd`` cannot be polled, or is polled already
        """
        try:
            self._epoll.register(fd, select.EPOLLIN | (select.EPOLLET if edge else 0))
        except (OSError, ValueError) as e:
            raise MessageError(f"a file descriptor that cannot be polled: {e}") from None
        self._calls[fd] = call
        if edge:
            self._edges.add(fd)

    def unwatch(self, fd: int) -> None:
        """Undo ``watch()``, before ``fd`` is closed."""
        if self._calls.pop(fd, None) is not None:
            self._epoll.unregister(fd)
        if fd in self._edges:
            self._edges.discard(fd)
            with contextlib.suppress(OSError):  # empty, or no eventfd
                os.preadv(fd, [bytearray(8)], -1, os.RWF_NOWAIT)

    def add_runner(self, runner: Runner) -> None:
        """Call ``runner.run()`` in the next turn, and then as it says."""
        self._runners[runner] = 0.0

    def remove_runner(self, runner: Runner) -> None:
        self._runners.pop(runner, None)

    # --- the loop

    def _main(self) -> None:
        try:
            self._turns()
        finally:
            with self._lock:
                self._ended = True
            while self._commands:  # somebody may wait for them
                self._guarded(self._commands.popleft())
            self._epoll.close()
            os.close(self._command)
            self._signaller.stop()

    def _turns(self) -> None:
        poll, calls, ready, runners = self._epoll.poll, self._calls, self._ready, self._runners
        timeout: float | None = 0
        while not self._stopping:
            events = poll(timeout, _MAX_EVENTS)
            self._alone = len(events) + len(ready) == 1
            for fd, _ in events:
                call = calls.get(fd)
                if call is not None:
                    try:
                        call()
                    except Exception:
                        # Sessions guard what they call, so this is our own mistake: others shall not lose their edge
                        # by it.
                        log.exception("error in the data plane")
            for _ in range(len(ready)):
                self._guarded(ready.popleft())
            timeout = None
            if runners:
                timeout = self._run_due()
            if ready:
                timeout = 0

    def _run_due(self) -> float | None:
        """Call the runners that are due or touched; seconds until the next is, None: none is."""
        now = time.monotonic()
        first: float | None = None
        for runner, due in list(self._runners.items()):
            if runner.touched or (due is not None and due <= now):
                runner.touched = False
                try:
                    wait = runner.run()
                except Exception:
                    log.exception("error in the data plane")
                    wait = _RETRY_S
                due = None if wait is None else now + wait
                if runner not in self._runners:
                    continue
                self._runners[runner] = due
            if due is not None and (first is None or due < first):
                first = due
        return None if first is None else max(0.0, first - now)

    def _do_commands(self) -> None:
        os.eventfd_read(self._command)
        for _ in range(len(self._commands)):
            self._guarded(self._commands.popleft())

    def _guarded(self, call: Callable[[], object]) -> None:
        try:
            call()
        except Exception:
            log.exception("error in the data plane")

    def _stop(self) -> None:
        self._stopping = True
