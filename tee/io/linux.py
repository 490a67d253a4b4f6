"""The system calls of a Linux TEE device: one open ``/dev/teeN`` or ``/dev/teeprivN``, and shared memory of it.

All calls block until the kernel has answered; OSError says what it refused. :func:`advice` says what to do about it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Callable, Sequence
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
    ObjectInvoke,
    OpenSession,
    ShmAlloc,
    ShmRegister,
    ShmRegisterFd,
    SupplRecv,
    SupplSend,
    Version,
)

RawParam = tuple[int, int, int, int]
"""attr, a, b, c."""

SystemCall = Callable[[int, int, bytearray], int]
"""ioctl: file descriptor, number, and the argument, which is changed in place. Raises OSError."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a call ended with. ``session`` is 0 unless one was opened."""

    code: int
    origin: int
    params: list[RawParam]
    session: int = 0


class Shm:
    """Shared memory of an open TEE device. ``id`` names it in parameters; ``data`` are its bytes, where we have them
    in one piece."""

    def __init__(self, ident: int, fd: int, view: memoryview | None, size: int) -> None:
        self.id = ident
        self.size = size
        self._fd = fd
        self._view = view

    @property
    def data(self) -> memoryview:
        """The bytes. ValueError after :meth:`close`."""
        if self._view is None:
            raise ValueError("the shared memory is closed")
        return self._view

    def close(self) -> None:
        """End the registration, which may block; the bytes go when nobody has a view of them any more. May be called
        again."""
        fd, self._fd, self._view = self._fd, -1, None
        if fd >= 0:
            os.close(fd)


class LinuxTee:
    """An open TEE device. May be used by several threads. A context manager. Raises OSError."""

    def __init__(self, path: str | os.PathLike[str] = "/dev/tee0", system_call: SystemCall | None = None) -> None:
        """``system_call``: what to call instead of ioctl."""
        self.path = Path(path)
        self._call: SystemCall = system_call or _ioctl
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

    def has_object_invoke(self) -> bool:
        """Whether OBJECT_INVOKE is there (Linux 6.18, and a TEE with objects): without, the kernel does not get so far
        as to miss the argument."""
        return self._refusal(Ioctl.OBJECT_INVOKE, Buffer, buf_ptr=0, buf_len=_OBJECT_INVOKE_SIZE) == errno.EFAULT

    def has_register_fd(self) -> bool:
        """Whether SHM_REGISTER_FD is there (Linux 6.18): without, the kernel does not get so far as to miss the
        file."""
        return self._refusal(Ioctl.SHM_REGISTER_FD, ShmRegisterFd, fd=-1, size=0, flags=0, id=0) == errno.EBADF

    def allocate(self, size: int) -> Shm:
        """Memory that the kernel allocates: zeroed, ``size`` bytes rounded up to pages."""
        fd, found = self._simple(Ioctl.SHM_ALLOC, ShmAlloc, size=size, flags=0, id=0)
        try:
            data = mmap.mmap(fd, found.size)
        except BaseException:
            os.close(fd)
            raise
        return Shm(found.id, fd, memoryview(data), found.size)

    def register(self, data: mmap.mmap, offset: int = 0, size: int | None = None) -> Shm:
        """Share ``size`` bytes (default: all) of our own memory from ``offset`` on."""
        size = len(data) - offset if size is None else size
        address = ctypes.addressof(ctypes.c_char.from_buffer(data)) + offset
        return self._register(address, size, memoryview(data)[offset : offset + size])

    def register_at(self, address: int, size: int) -> Shm:
        """Share ``size`` bytes of this process from ``address`` on. The kernel takes hold of the pages themselves:
        afterwards the address is not needed any more."""
        return self._register(address, size, None)

    def register_fd(self, fd: int) -> Shm:
        """Share the memory of a dma-buf."""
        shm, found = self._simple(Ioctl.SHM_REGISTER_FD, ShmRegisterFd, fd=fd, size=0, flags=0, id=0)
        return Shm(found.id, shm, None, found.size)

    def _register(self, address: int, size: int, view: memoryview | None) -> Shm:
        fd, found = self._simple(Ioctl.SHM_REGISTER, ShmRegister, addr=address, length=size, flags=0, id=0)
        return Shm(found.id, fd, view, size)

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

    def object_invoke(self, ident: int, op: int, params: Sequence[RawParam] = ()) -> Answer:
        """Have the object ``ident`` do ``op``."""
        found = self._buffered(Ioctl.OBJECT_INVOKE, ObjectInvoke, params, id=ident, op=op, ret=0, pad=0)
        return Answer(found.ret, 0, _raw(found.params))

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
        returned = self._call(self._fd, number, data)
        return returned, layout.parse(bytes(data))

    def _buffered(self, number: Ioctl, layout: Struct[Any, Any], params: Sequence[RawParam], **fields: Any) -> Any:
        words = [{"attr": attr, "a": a, "b": b, "c": c} for attr, a, b, c in params]
        data = layout.build({**fields, "num_params": len(params), "params": words})
        room = ctypes.create_string_buffer(data, len(data))
        named = Buffer.build({"buf_ptr": ctypes.addressof(room), "buf_len": len(data)})
        self._call(self._fd, number, bytearray(named))
        return layout.parse(room.raw)

    def _refusal(self, number: Ioctl, layout: Struct[Any, Any], **fields: int) -> int:
        """The error number of a call that cannot succeed."""
        try:
            returned, _ = self._simple(number, layout, **fields)
        except OSError as error:
            return error.errno or 0
        if number == Ioctl.SHM_REGISTER_FD and returned > 2:
            os.close(returned)
        return 0


def advice(path: str | os.PathLike[str], error: OSError) -> str:
    """What is wrong with the TEE device at ``path``, and what to do, for whoever has started this program."""
    name = os.fspath(path)
    privileged = Path(name).name.startswith("teepriv")
    match error.errno:
        case errno.ENOENT:
            others = ", ".join(sorted(str(p) for p in Path("/dev").glob("teepriv*" if privileged else "tee[0-9]*")))
            there = f"there is {others}: name that one" if others else "load the TEE's driver (modprobe optee)"
            return f"{name}: there is no such TEE device; {there}, or see what the kernel says of it (dmesg)"
        case errno.EACCES | errno.EPERM:
            group = "teepriv" if privileged else "tee"
            return (
                f"{name}: this user may not open it; add the user to the group of the device (ls -l {name}), "
                f'or make a udev rule: KERNEL=="{group}[0-9]*", GROUP="…", MODE="0660"'
            )
        case errno.EBUSY if privileged:
            return (
                f"{name}: another supplicant has it, and the kernel takes only one; "
                f"stop that (systemctl stop tee-supplicant, or see fuser {name})"
            )
        case errno.ENODEV | errno.ENXIO:
            return f"{name}: the TEE behind it has gone; load its driver again, or see what the kernel says (dmesg)"
        case errno.ENOTTY:
            return f"{name}: this is no TEE device; name one (/dev/tee0)"
        case errno.ENOMEM:
            return (
                f"{name}: the TEE has no room for the memory that is copied by; take less (--copy-mib, --tee-threads)"
            )
        case errno.EMFILE | errno.ENFILE:
            return f"{name}: too many open files; raise the limit (LimitNOFILE=, ulimit -n)"
    return f"{name}: {error.strerror or error}"


def _ioctl(fd: int, number: int, data: bytearray) -> int:
    returned: int = fcntl.ioctl(fd, number, data, True)
    return returned


_OBJECT_INVOKE_SIZE = len(ObjectInvoke.build({"id": 0, "op": 0, "ret": 0, "num_params": 0, "pad": 0, "params": []}))


def _raw(params: Any) -> list[RawParam]:
    return [(p.attr, p.a, p.b, p.c) for p in params]
