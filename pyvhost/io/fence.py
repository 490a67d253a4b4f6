"""Memory barriers of this machine, for ``pyvhost.vring.api.Fences``.

libatomic's ``atomic_thread_fence`` through ctypes costs about 0.2 µs and is right on every architecture. Where
libatomic is missing, x86-64 can do with a lock, whose locked instruction is a full barrier there; elsewhere a lock is
not enough, so there is none.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import threading
from collections.abc import Callable

from pyvhost.vring.api import Fences

__all__ = ["host_fences"]

_SEQ_CST = 5  # memory_order_seq_cst of <stdatomic.h>
_ACQ_REL = 4  # memory_order_acq_rel

#: machines whose hardware keeps loads behind loads and stores behind stores
_TOTAL_STORE_ORDER = frozenset({"x86_64", "AMD64"})


def _libatomic() -> Callable[[int], None] | None:
    try:
        fence = ctypes.CDLL("libatomic.so.1").atomic_thread_fence
    except (OSError, AttributeError):
        return None
    fence.argtypes = (ctypes.c_int,)
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
        order = None if ordered else functools.partial(fence, _ACQ_REL)
        return Fences(full=functools.partial(fence, _SEQ_CST), order=order)
    if ordered:
        return Fences(full=_lock_fence())
    raise RuntimeError("libatomic.so.1 is needed on this architecture (Debian: apt install libatomic1)")
