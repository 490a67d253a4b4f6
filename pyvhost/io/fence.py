"""Memory barriers of this machine, for ``pyvhost.vring.api.Fences``, and the atomic OR of the dirty log.

libatomic's ``atomic_thread_fence`` through ctypes costs about 0.06 µs if the call converts no arguments and keeps the
interpreter's lock (with both, 0.18), and is right on every architecture. Where
libatomic is missing, x86-64 can do with a lock, whose locked instruction is a full barrier there; elsewhere a lock is
not enough, so there is none.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
import time
from collections.abc import Callable

from pyvhost.dirtylog import AtomicOr
from pyvhost.vring.api import Fences

__all__ = ["host_atomic_or", "host_fences"]

_SEQ_CST = 5  # memory_order_seq_cst of <stdatomic.h>
_ACQ_REL = 4  # memory_order_acq_rel

#: machines whose hardware keeps loads behind loads and stores behind stores
_TOTAL_STORE_ORDER = frozenset({"x86_64", "AMD64"})


def _libatomic() -> Callable[[ctypes.c_int], None] | None:
    try:
        fence = ctypes.PyDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    fence.restype = None
    return fence


def _lock_fence() -> Callable[[], object]:
    lock = threading.Lock()

    def fence() -> None:
        with lock:
            pass

    return fence


@functools.cache
def host_fences() -> Fences:
    """The fences for rings that are shared with another thread or process.

    :raises RuntimeError: not an x86-64 machine, and libatomic.so.1 is missing (Debian: package libatomic1)
    """
    ordered = platform.machine() in _TOTAL_STORE_ORDER
    fence = _libatomic()
    if fence is not None:
        order = None if ordered else functools.partial(fence, ctypes.c_int(_ACQ_REL))
        return Fences(full=functools.partial(fence, ctypes.c_int(_SEQ_CST)), order=order, clock=time.monotonic)
    if ordered:
        return Fences(full=_lock_fence(), clock=time.monotonic)
    raise RuntimeError("libatomic.so.1 is needed on this architecture (Debian: apt install libatomic1)")


@functools.cache
def _fetch_or() -> Callable[[int, int, int], int] | None:
    try:
        fetch_or = ctypes.CDLL("libatomic.so.1")["__atomic_fetch_or_1"]
    except (OSError, AttributeError):
        return None
    fetch_or.argtypes = (ctypes.c_void_p, ctypes.c_ubyte, ctypes.c_int)
    fetch_or.restype = ctypes.c_ubyte
    return fetch_or


def host_atomic_or(view: memoryview) -> AtomicOr | None:
    """What sets bits in one byte of ``view``, by its index, atomically; None without libatomic. Holds the buffer."""
    fetch_or = _fetch_or()
    if fetch_or is None or not len(view):
        return None
    size = len(view)
    held = (ctypes.c_ubyte * size).from_buffer(view)
    start = ctypes.addressof(held)

    def set_bits(index: int, mask: int) -> None:
        if not 0 <= index < len(held):  # also keeps the buffer
            raise IndexError(index)
        fetch_or(start + index, mask, _SEQ_CST)

    return set_bits
