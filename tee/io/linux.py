"""The system calls of a Linux TEE device: one open ``/dev/teeN`` or ``/dev/teeprivN``, and shared memory of it.

All calls block until the kernel has answered; OSError says what it refused.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from construct import Struct

from tee.linux.ioctls import (
    Buffer,
    Cancel,
    CloseSession,
    Invoke,
    Ioctl,
    OpenSession,
    ShmAlloc,
    ShmRegister,
    SupplRecv,
    SupplSend,
    Version,
)

RawParam = tuple[int, int, int, int]
"""attr, a, b, c."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call ended with. ``session`` is 0 unless one was opened."""

    code: int
    origin: int
    params: list[RawParam]
    session: int = 0


class Shm:
    """Shared memory of an open TEE device. ``id`` names it in parameters; ``data`` are its bytes."""

    def __init__(self, ident: int, fd: int, view: memoryview) -> None:
        self.id = ident
        self.size = len(view)
        self._fd = fd
        self._view: memoryview | None = view

    @property
    def data(self) -> memoryview:
        """The bytes. ValueError after :meth:`close`."""
        if self._view is None:
            raise ValueError("the shared memory is closed")
        return self._view

    def close(self) -> None:
        """End the registration; the bytes go when nobody has a view of them any more. May be called again."""
        if self._view is not None:
            self._view = None
            os.close(self._fd)


class LinuxTee:
    """An open TEE device. May be used by several threads. A context manager. Raises OSError."""

    def __init__(self, path: str | os.PathLike[str] = "/dev/tee0") -> None:
        self.path = Path(path)
        self._fd = os.open(self.path, os.O_RDWR | os.O_CLOEXEC)

    def __enter__(self) -> LinuxTee:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close it: sessions end. May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def version(self) -> tuple[int, int, int]:
        """Implementation id, implementation capabilities, generic capabilities."""
        found = self._simple(Ioctl.VERSION, Version, impl_id=0, impl_caps=0, gen_caps=0)[1]
        return found.impl_id, found.impl_caps, found.gen_caps

    def allocate(self, size: int) -> Shm:
        """Memory that the kernel allocates: zeroed, ``size`` bytes rounded up to pages."""
        fd, found = self._simple(Ioctl.SHM_ALLOC, ShmAlloc, size=size, flags=0, id=0)
        try:
            data = mmap.mmap(fd, found.size)
        except BaseException:
            os.close(fd)
            raise
        return Shm(found.id, fd, memoryview(data))

    def register(self, data: mmap.mmap, offset: int = 0, size: int | None = None) -> Shm:
        """Share ``size`` bytes (default: all) of our own memory from ``offset`` on."""
        size = len(data) - offset if size is None else size
        address = ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset
        fd, found = self._simple(Ioctl.SHM_REGISTER, ShmRegister, addr=address, length=size, flags=0, id=0)
        return Shm(found.id, fd, memoryview(data)[offset : offset + size])

    def open_session(
        self,
        uuid: bytes,
        params: Sequence[RawParam] = (),
        *,
        login: int = 0,
        client: bytes = bytes(16),
        cancel_id: int = 0,
    ) -> Answer:
        """Open a session with the TA ``uuid`` (16 octets)."""
        found = self._buffered(
            Ioctl.OPEN_SESSION,
            OpenSession,
            params,
            uuid=uuid,
            clnt_uuid=client,
            clnt_login=login,
            cancel_id=cancel_id,
            session=0,
            ret=0,
            ret_origin=0,
        )
        return Answer(found.ret, found.ret_origin, _raw(found.params), found.session if not found.ret else 0)

    def invoke(self, session: int, func: int, params: Sequence[RawParam] = (), *, cancel_id: int = 0) -> Answer:
        """Have the session's TA do ``func``."""
        found = self._buffered(
            Ioctl.INVOKE, Invoke, params, func=func, session=session, cancel_id=cancel_id, ret=0, ret_origin=0
        )
        return Answer(found.ret, found.ret_origin, _raw(found.params))

    def cancel(self, cancel_id: int, session: int) -> None:
        """Ask a call of this session (0: an OPEN_SESSION) to end early. OSError ENOENT where there is none."""
        self._simple(Ioctl.CANCEL, Cancel, cancel_id=cancel_id, session=session)

    def close_session(self, session: int) -> None:
        """End a session."""
        self._simple(Ioctl.CLOSE_SESSION, CloseSession, session=session)

    def receive(self, params: Sequence[RawParam]) -> tuple[int, list[RawParam]]:
        """For a supplicant: wait for a request. ``params`` is the room for its parameters, all empty; with META set in
        the first one, requests can be answered in any order. Returns command and parameters.
        """
        found = self._buffered(Ioctl.SUPPL_RECV, SupplRecv, params, func=0)
        return found.func, _raw(found.params)

    def send(self, code: int, params: Sequence[RawParam]) -> None:
        """For a supplicant: answer a request."""
        self._buffered(Ioctl.SUPPL_SEND, SupplSend, params, ret=code)

    def _simple(self, number: Ioctl, layout: Struct[Any, Any], **fields: int) -> tuple[int, Any]:
        data = bytearray(layout.build(fields))
        returned = fcntl.ioctl(self._fd, number, data, True)
        return returned, layout.parse(bytes(data))

    def _buffered(self, number: Ioctl, layout: Struct[Any, Any], params: Sequence[RawParam], **fields: Any) -> Any:
        words = [{"attr": attr, "a": a, "b": b, "c": c} for attr, a, b, c in params]
        data = layout.build({**fields, "num_params": len(params), "params": words})
        room = ctypes.create_string_buffer(data, len(data))
        fcntl.ioctl(self._fd, number, Buffer.build({"buf_ptr": ctypes.addressof(room), "buf_len": len(data)}))
        return layout.parse(room.raw)


def _raw(params: Any) -> list[RawParam]:
    return [(p.attr, p.a, p.b, p.c) for p in params]
