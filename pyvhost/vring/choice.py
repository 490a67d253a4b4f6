"""Which implementation of the device's side runs: in Python ("pure"), or compiled.

The compiled one is built when the package is installed, if there is a C compiler. The environment variable
``PYVHOST_QUEUE`` chooses: ``auto`` (the default) takes the compiled one if it is there, ``compiled`` demands it,
``pure`` does without.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Protocol

from pyvhost.memory import GuestMemory
from pyvhost.vring.api import DeviceQueue, Fences
from pyvhost.vring.packed import PackedLayout
from pyvhost.vring.packed_device import PackedDeviceQueue
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_device import SplitDeviceQueue

try:
    from pyvhost.vring import _fastqueue
except ImportError:
    _fastqueue = None  # type: ignore[assignment]

__all__ = ["QueueFactory", "has_compiled", "implementation", "part_sizes", "queue_class"]

VARIABLE = "PYVHOST_QUEUE"


class QueueFactory(Protocol):
    """The constructor that all device queues share; see ``SplitDeviceQueue``."""

    def __call__(
        self,
        size: int,
        memory: GuestMemory,
        desc: memoryview,
        avail: memoryview,
        used: memoryview,
        *,
        fences: Fences,
        base: int = ...,
        indirect: bool = True,
        event_idx: bool = False,
        signal: Callable[[], object] | None = None,
        max_descriptors: int = 1024,
        spin_us: int = 0,
    ) -> DeviceQueue: ...


def has_compiled() -> bool:
    """Whether the compiled implementation was built."""
    return _fastqueue is not None


def implementation() -> str:
    """The one that ``queue_class()`` gives: "pure" or "compiled".

    :raises RuntimeError: the environment demands what is not there, or something unknown
    """
    wanted = os.environ.get(VARIABLE) or "auto"
    if wanted == "auto":
        return "compiled" if has_compiled() else "pure"
    if wanted not in ("pure", "compiled"):
        raise RuntimeError(f"{VARIABLE}={wanted}: pure, compiled and auto are possible")
    if wanted == "compiled" and not has_compiled():
        raise RuntimeError(f"{VARIABLE}=compiled, but the compiled queue was not built: install with a C compiler")
    return wanted


def queue_class(packed: bool, which: str | None = None) -> QueueFactory:
    """What makes a device queue of this ring format; ``which``: "pure" or "compiled", by default
    ``implementation()``."""
    if (which or implementation()) == "compiled":
        return _fastqueue.PackedDeviceQueue if packed else _fastqueue.SplitDeviceQueue
    return PackedDeviceQueue if packed else SplitDeviceQueue


def part_sizes(packed: bool, size: int) -> tuple[int, int, int]:
    """Bytes of a ring's three parts, as a ``SET_VRING_ADDR`` names them: desc, avail, used."""
    layout = PackedLayout(size) if packed else SplitLayout(size)
    return layout.desc_bytes, layout.avail_bytes, layout.used_bytes
