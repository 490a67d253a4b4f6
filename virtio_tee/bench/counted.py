"""A backend that counts the bytes it copies, for the bench: ``python -m virtio_tee.bench.counted FILE MODULE …`` runs a
module as ``python -m MODULE …`` would, with queues whose requests add what is copied out of and into the guest's memory
by ``read()``, ``unpack()`` and ``write()`` to a 64-bit word in FILE.

Counting takes time, so what is counted here is not what is measured.
"""

from __future__ import annotations

import mmap
import os
import runpy
import struct
import sys
from collections.abc import Callable
from typing import Any

from pyvhost import session
from pyvhost.vring.choice import queue_class


class Counter:
    """The word in the file."""

    def __init__(self, path: str) -> None:
        fd = os.open(path, os.O_RDWR)
        self.word = memoryview(mmap.mmap(fd, 8)).cast("Q")
        os.close(fd)

    def add(self, size: int) -> None:
        self.word[0] += size


class CountedChain:
    """A chain whose copies are counted. What is done with its views is not: that is use in place."""

    def __init__(self, chain: Any, counter: Counter) -> None:
        self._chain = chain
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._chain, name)

    def read(self, *args: Any, **options: Any) -> bytes:
        data: bytes = self._chain.read(*args, **options)
        self._counter.add(len(data))
        return data

    def unpack(self, layout: struct.Struct, offset: int = 0) -> Any:
        self._counter.add(layout.size)
        return self._chain.unpack(layout, offset)

    def write(self, data: bytes, offset: int = 0) -> int:
        self._counter.add(len(data))
        end: int = self._chain.write(data, offset)
        return end


class CountedQueue:
    """A queue whose chains are counted ones."""

    def __init__(self, queue: Any, counter: Counter) -> None:
        self._queue = queue
        self._counter = counter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._queue, name)

    def pop(self) -> CountedChain | None:
        chain = self._queue.pop()
        return None if chain is None else CountedChain(chain, self._counter)

    def drain(self, handler: Callable[[Any], int | None], *args: int, **options: int) -> bool:
        more: bool = self._queue.drain(lambda chain: handler(CountedChain(chain, self._counter)), *args, **options)
        return more


def install(counter: Counter) -> None:
    """Have sessions start counted queues."""

    def counted(packed: bool) -> Callable[..., Any]:
        kind = queue_class(packed)
        return lambda *args, **options: CountedQueue(kind(*args, **options), counter)

    session.queue_class = counted  # type: ignore[assignment,attr-defined]


def main() -> None:
    path, module, *arguments = sys.argv[1:]
    install(Counter(path))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
