"""A kernel with a TEE, for the system calls of <linux/tee.h>: sessions with one TA, shared memory that stays pinned."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tee.driver import GenCap
from tee.io.linux import LinuxTee
from tee.linux import ioctls
from tee.linux.ioctls import MEMREF_NULL, Ioctl, ParamType
from tee.results import Origin, Result

PAGE = mmap.PAGESIZE
CAPS = GenCap.GP | GenCap.REG_MEM | GenCap.MEMREF_NULL

_MAYMOVE, _FIXED = 1, 2
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = _libc.mremap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
_libc.mremap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p)


@dataclass
class Seen:
    """A parameter as a TA sees it: ``data`` for memory (None: NULL)."""

    kind: int
    a: int = 0
    b: int = 0
    c: int = 0
    data: memoryview | None = None
    size: int = 0


@dataclass
class Running:
    """A call that the TEE runs."""

    session: int
    cancel_id: int
    cancelled: threading.Event = field(default_factory=threading.Event)


FLIP, ADD, WAIT, SHORT, LOOK, FAIL, FILL = range(7)


class Ta:
    """Commands: FLIP all memory, ADD values, WAIT to be cancelled or ``go``, ask for more (SHORT), LOOK at the memory
    around, FAIL, FILL outputs with a byte."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.inside: deque[int] = deque()
        """a of the first value of each WAIT that has begun."""
        self.looked: list[bytes] = []
        self.deaf = False
        """It does not listen to cancels."""

    def __call__(self, running: Running, func: int, seen: list[Seen]) -> int:
        memory = [one for one in seen if one.kind >= 5]
        if func == FLIP:
            for one in memory:
                assert one.data is not None
                one.data[:] = bytes(byte ^ 0xFF for byte in bytes(one.data))
        elif func == ADD:
            seen[1].a, seen[1].b, seen[1].c = seen[0].a + 1, seen[0].b + 1, seen[0].c + 1
        elif func == WAIT:
            self.inside.append(seen[0].a)
            while not self.go.is_set():
                if running.cancelled.wait(0.002) and not self.deaf:
                    return Result.CANCEL
            for one in memory:
                assert one.data is not None
                one.data[:] = b"\x77" * len(one.data)
        elif func == SHORT:
            seen[0].size = 1000
            return Result.SHORT_BUFFER
        elif func == LOOK:
            assert memory[0].data is not None
            self.looked.append(bytes(memory[0].data))
        elif func == FAIL:
            return 0x1234
        elif func == FILL:
            assert memory[0].data is not None
            memory[0].data[: seen[1].a] = b"\x5a" * seen[1].a
            memory[0].size = seen[1].a
        return Result.SUCCESS


class FakeKernel:
    """``ta`` serves the calls, on the threads that make them."""

    def __init__(self, folder: Path, ta: Ta, *, caps: int = CAPS) -> None:
        self.path = folder / "tee0"
        self.path.touch()
        self.ta = ta
        self.caps = caps
        self.calls: Counter[str] = Counter()
        self.fail: dict[Ioctl, int] = {}
        """Which system calls fail, with which number."""
        self.sessions: dict[int, tuple[int, bytes]] = {}
        """Login and client by session."""
        self.running: list[Running] = []
        self.cancels: list[tuple[int, int, bool]] = []
        """cancel_id, session, and whether there was such a call."""
        self.uuids: list[bytes] = []
        self._lock = threading.Lock()
        self._shms: dict[int, memoryview] = {}
        self._next = 1

    def open(self) -> LinuxTee:
        return LinuxTee(self.path, self)

    def __call__(self, fd: int, number: int, data: bytearray) -> int:
        os.fstat(fd)
        which = Ioctl(number)
        with self._lock:
            self.calls[which.name] += 1
        if which in self.fail:
            raise OSError(self.fail[which], os.strerror(self.fail[which]))
        return getattr(self, f"_{which.name.lower()}")(data) or 0

    def _version(self, data: bytearray) -> None:
        data[:] = ioctls.Version.build({"impl_id": 1, "impl_caps": 1, "gen_caps": self.caps})

    def _shm_alloc(self, data: bytearray) -> int:
        asked = ioctls.ShmAlloc.parse(bytes(data))
        size = -(-asked.size // PAGE) * PAGE
        fd = os.memfd_create("shm")
        os.ftruncate(fd, size)
        ident = self._share(memoryview(mmap.mmap(fd, size)))
        data[:] = ioctls.ShmAlloc.build({"size": size, "flags": 0, "id": ident})
        return fd

    def _shm_register(self, data: bytearray) -> int:
        """The pages are kept, whatever becomes of the address: by a second mapping."""
        asked = ioctls.ShmRegister.parse(bytes(data))
        lead = asked.addr % PAGE
        length = -(-(lead + asked.length) // PAGE) * PAGE
        kept = _libc.mmap(None, length, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, -1, 0)
        for at in range(0, length, PAGE):
            if _libc.mremap(asked.addr - lead + at, 0, PAGE, _MAYMOVE | _FIXED, kept + at) != kept + at:
                kept = asked.addr - lead  # private memory: its owner keeps it
                break
        view = memoryview((ctypes.c_char * asked.length).from_address(kept + lead)).cast("B")
        told = {"addr": asked.addr, "length": asked.length, "flags": 0, "id": self._share(view)}
        data[:] = ioctls.ShmRegister.build(told)
        return os.memfd_create("registered")

    def _share(self, view: memoryview) -> int:
        with self._lock:
            self._next += 1
            self._shms[self._next] = view
            return self._next

    def _open_session(self, data: bytearray) -> None:
        self._with_argument(ioctls.OpenSession, data, self._opened)

    def _opened(self, argument: Any) -> None:
        self.uuids.append(argument.uuid)
        self._run(argument, 0, None)
        if not argument.ret:
            with self._lock:
                self._next += 1
                argument.session = self._next
                self.sessions[self._next] = argument.clnt_login, argument.clnt_uuid

    def _invoke(self, data: bytearray) -> None:
        self._with_argument(ioctls.Invoke, data, self._invoked)

    def _invoked(self, argument: Any) -> None:
        if argument.session not in self.sessions:
            raise OSError(errno.EINVAL, "no such session")
        self._run(argument, argument.session, argument.func)

    def _run(self, argument: Any, session: int, func: int | None) -> None:
        seen = [self._seen(param) for param in argument.params]
        running = Running(session, argument.cancel_id)
        with self._lock:
            self.running.append(running)
        try:
            argument.ret = self.ta(running, func, seen) if func is not None else Result.SUCCESS
        finally:
            with self._lock:
                self.running.remove(running)
        argument.ret_origin = Origin.TRUSTED_APP
        for param, one in zip(argument.params, seen, strict=True):
            if one.kind in (ParamType.VALUE_OUT, ParamType.VALUE_INOUT):
                param.a, param.b, param.c = one.a, one.b, one.c
            elif one.kind in (ParamType.MEMREF_OUT, ParamType.MEMREF_INOUT):
                param.b = one.size

    def _seen(self, param: Any) -> Seen:
        kind = param.attr & 0xFF
        if param.attr & ~0x1FF or kind not in (0, 1, 2, 3, 5, 6, 7):
            raise OSError(errno.EINVAL, "attributes")
        if kind < 4:
            return Seen(kind, param.a, param.b, param.c)
        if param.c == MEMREF_NULL:
            return Seen(kind, size=param.b)
        shm = self._shms.get(param.c)
        if shm is None or param.a + param.b > len(shm):
            raise OSError(errno.EINVAL, "memory")
        return Seen(kind, data=shm[param.a : param.a + param.b], size=param.b)

    def _cancel(self, data: bytearray) -> None:
        asked = ioctls.Cancel.parse(bytes(data))
        with self._lock:
            found = [r for r in self.running if (r.cancel_id, r.session) == (asked.cancel_id, asked.session)]
            self.cancels.append((asked.cancel_id, asked.session, bool(found)))
        for one in found:
            one.cancelled.set()
        if not found:
            raise OSError(errno.ENOENT, "no such call")

    def _close_session(self, data: bytearray) -> None:
        with self._lock:
            if self.sessions.pop(ioctls.CloseSession.parse(bytes(data)).session, None) is None:
                raise OSError(errno.EINVAL, "no such session")

    def _with_argument(self, layout: Any, data: bytearray, serve: Callable[[Any], None]) -> None:
        buffer = ioctls.Buffer.parse(bytes(data))
        room = (ctypes.c_char * buffer.buf_len).from_address(buffer.buf_ptr)
        argument = layout.parse(room.raw)
        serve(argument)
        ctypes.memmove(buffer.buf_ptr, layout.build(argument), buffer.buf_len)


def scattered(pages: int, *, skip: int = 0, cut: int = 0) -> tuple[memoryview, list[memoryview]]:
    """Memory of a guest, and views of its pages in reverse order; the first lacks ``skip`` bytes at its beginning, the
    last ``cut`` at its end."""
    fd = os.memfd_create("guest")
    os.ftruncate(fd, pages * PAGE)
    ram = memoryview(mmap.mmap(fd, pages * PAGE))
    os.close(fd)
    views = [ram[number * PAGE : (number + 1) * PAGE] for number in reversed(range(pages))]
    views[0] = views[0][skip:]
    views[-1] = views[-1][: PAGE - cut]
    return ram, views
