"""One folder with the files of a TEE, which is never left.

Names are taken apart here and opened one component after the other, each relative to the folder above it and without
following links: there is no moment in which a link that somebody puts in could lead out. Files stand under their own
names, as OP-TEE's supplicant keeps them, so that a folder of either can be used by the other.

What a TEE can fill is bounded: bytes, entries (files and folders), open files. A file that was removed but is still
open counts until it is closed. Sizes are those that files seem to have, so that holes count too. One process uses the
folder at a time (``flock``): otherwise nobody could say how full it is.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from tee.io.services.base import Result, bad, refuse
from tee.memory import Memory

#: The longest name in bytes, and how many folders deep it may lead.
MAX_NAME = 1023
MAX_DEPTH = 8

#: The longest component in bytes: what the usual file systems can.
MAX_COMPONENT = 255

#: The largest part of a file that is copied at a time.
CHUNK = 1 << 20

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_MAX_OFFSET = (1 << 63) - 1
_MAX_HANDLE = (1 << 31) - 1
_RENAME_NOREPLACE = 1


@dataclass(frozen=True, slots=True)
class FileLimits:
    """How much a TEE may keep."""

    max_bytes: int = 64 << 20
    max_files: int = 4096
    max_open: int = 64


@dataclass(slots=True)
class _Inode:
    """A file that is open."""

    handles: int = 0
    removed: bool = False


@dataclass(slots=True)
class _Open:
    fd: int
    key: tuple[int, int]


def components(name: bytes) -> list[bytes]:
    """The parts of a file's name. A slash at the begin is no part: all names begin in the folder. Raises TeeError."""
    if len(name) > MAX_NAME:
        raise bad(f"a name of {len(name)} bytes")
    parts = name.lstrip(b"/").split(b"/")
    if len(parts) > MAX_DEPTH:
        raise bad(f"a name that leads {len(parts)} levels deep")
    for part in parts:
        if part in (b"", b".", b"..") or b"\0" in part or len(part) > MAX_COMPONENT:
            raise bad(f"a name with the part {part[:32]!r}")
    return parts


class FileStore:
    """The files in ``folder``, which is made if it is not there. ``sync``: what was written is on the disk before the
    answer says so. Raises OSError where the folder cannot be used. Not thread-safe."""

    def __init__(self, folder: str | os.PathLike[str], limits: FileLimits | None = None, *, sync: bool = True) -> None:
        self.limits = limits if limits is not None else FileLimits()
        self._sync = sync
        self._flags = _FILE | (os.O_DSYNC if sync else 0)
        os.makedirs(folder, 0o700, exist_ok=True)
        # The folder itself may be a link: its name is the operator's, not the TEE's.
        self._root = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._files: dict[int, _Open] = {}
        self._listings: dict[int, list[bytes]] = {}
        self._inodes: dict[tuple[int, int], _Inode] = {}
        # At a random place: a handle of an earlier life does not name a file of this one.
        self._next = secrets.randbelow(_MAX_HANDLE) + 1
        try:
            fcntl.flock(self._root, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.used_bytes, self.used_files = self._measure()
        except BlockingIOError:
            os.close(self._root)
            raise BlockingIOError(
                errno.EAGAIN, "another supplicant uses this folder: end it, or name another folder", os.fspath(folder)
            ) from None
        except BaseException:
            os.close(self._root)
            raise

    @property
    def open_files(self) -> int:
        """How many handles there are, of files and of folders."""
        return len(self._files) + len(self._listings)

    def close_all(self) -> None:
        """Close all files, and the folder."""
        for handle in list(self._files):
            self.close(handle)
        self._listings.clear()
        if self._root >= 0:
            os.close(self._root)
            self._root = -1

    # Files by name.

    def open(self, name: bytes) -> int:
        """A handle of a file that is there; where it cannot be written it can still be read. Raises TeeError."""
        parts = components(name)
        self._has_room_for_a_handle()
        try:
            with self._above(parts) as above:
                try:
                    fd = os.open(parts[-1], os.O_RDWR | self._flags, dir_fd=above)
                except OSError as error:
                    if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                        raise
                    fd = os.open(parts[-1], os.O_RDONLY | self._flags, dir_fd=above)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
                raise refuse(Result.OUT_OF_MEMORY, str(error)) from None
            raise refuse(Result.ITEM_NOT_FOUND, f"{name!r}: {error.strerror}") from None
        return self._opened(fd)

    def create(self, name: bytes) -> int:
        """A handle of a file that is new, or empty now; the folders above it are made. Raises TeeError, OSError."""
        parts = components(name)
        self._has_room_for_a_handle()
        with self._above(parts, make=True) as above:
            try:
                fd, new = os.open(parts[-1], os.O_RDWR | self._flags, dir_fd=above), False
            except FileNotFoundError:
                self._has_room(0, 1)
                fd = os.open(parts[-1], os.O_RDWR | os.O_CREAT | os.O_EXCL | self._flags, 0o600, dir_fd=above)
                new = True
                self.used_files += 1
                self._persist(above)
        handle = self._opened(fd)
        if not new:
            try:
                self.truncate(handle, 0)
            except BaseException:
                self.close(handle)
                raise
        return handle

    def remove(self, name: bytes) -> None:
        """Remove a file, and folders above it that are empty then. Raises TeeError, OSError."""
        parts = components(name)
        with self._above(parts) as above:
            status = os.stat(parts[-1], dir_fd=above, follow_symlinks=False)
            os.unlink(parts[-1], dir_fd=above)
            self._gone(status)
            self._persist(above)
        self._prune(parts)

    def rename(self, old: bytes, new: bytes, overwrite: bool) -> None:
        """Give a file another name, at once or not at all; one that has it already is replaced, or FileExistsError
        raised. Raises TeeError, OSError."""
        source, target = components(old), components(new)
        with self._above(source) as below, self._above(target) as above:
            status = os.stat(source[-1], dir_fd=below, follow_symlinks=False)
            if not stat.S_ISREG(status.st_mode):
                raise bad(f"{old!r} is no file")
            replaced = _stat(target[-1], above)
            if not overwrite:
                _rename_to_nothing(source[-1], below, target[-1], above)
            else:
                os.rename(source[-1], target[-1], src_dir_fd=below, dst_dir_fd=above)
                if replaced is not None and (replaced.st_dev, replaced.st_ino) != (status.st_dev, status.st_ino):
                    self._gone(replaced)
            self._persist(above)
            self._persist(below)

    # Open files.

    def close(self, handle: int) -> None:
        """Close a file. Raises TeeError."""
        file = self._file(handle)
        del self._files[handle]
        inode = self._inodes[file.key]
        inode.handles -= 1
        if not inode.handles:
            del self._inodes[file.key]
            if inode.removed:
                self.used_bytes -= os.fstat(file.fd).st_size
                self.used_files -= 1
        os.close(file.fd)

    def read(self, handle: int, offset: int, memory: Memory, at: int, size: int) -> int:
        """Read into ``memory``; returns how many bytes there were. Raises TeeError, OSError, ValueError."""
        file = self._file(handle)
        _offset(offset)
        memory.view(at, size)  # raises where that is outside the memory
        size = min(size, max(0, os.fstat(file.fd).st_size - offset))
        done = 0
        while done < size:
            data = os.pread(file.fd, min(CHUNK, size - done), offset + done)
            if not data:
                break
            memory.write(at + done, data)
            done += len(data)
        return done

    def write(self, handle: int, offset: int, memory: Memory, at: int, size: int) -> None:
        """Write from ``memory``: all of it, unless the disk is full. Raises TeeError, OSError, ValueError."""
        file = self._file(handle)
        _offset(offset)
        memory.view(at, size)
        before = os.fstat(file.fd).st_size
        if size:
            self._has_room(max(0, offset + size - before), 0)
        try:
            done = 0
            while done < size:
                data = memory.read(at + done, min(CHUNK, size - done))
                while data:
                    count = os.pwrite(file.fd, data, offset + done)
                    done += count
                    data = data[count:]
        finally:
            self.used_bytes += os.fstat(file.fd).st_size - before

    def truncate(self, handle: int, size: int) -> None:
        """Give a file another size. Raises TeeError, OSError."""
        file = self._file(handle)
        _offset(size)
        before = os.fstat(file.fd).st_size
        self._has_room(max(0, size - before), 0)
        os.ftruncate(file.fd, size)
        self.used_bytes += size - before
        if self._sync:
            os.fsync(file.fd)

    # Folders.

    def open_folder(self, name: bytes) -> int:
        """A handle of the names in a folder as they are now. Those that begin with a dot are not seen. A folder
        without names is not there: ITEM_NOT_FOUND. Raises TeeError."""
        parts = components(name) if name.strip(b"/") else []
        self._has_room_for_a_handle()
        try:
            with self._folder(parts) as folder:
                names = [os.fsencode(entry) for entry in os.listdir(folder)]
        except OSError as error:
            raise refuse(Result.ITEM_NOT_FOUND, f"{name!r}: {error.strerror}") from None
        names = sorted((n for n in names if not n.startswith(b".")), reverse=True)
        if not names:
            raise refuse(Result.ITEM_NOT_FOUND, f"{name!r} is empty")
        handle = self._new_handle()
        self._listings[handle] = names
        return handle

    def next_name(self, handle: int, room: int) -> bytes:
        """The next name with its NUL. Where that has more than ``room`` bytes it is the next one again. Raises
        TeeError; ITEM_NOT_FOUND at the end."""
        names = self._listings.get(handle)
        if names is None:
            raise bad(f"no folder has the handle {handle}")
        if not names:
            raise refuse(Result.ITEM_NOT_FOUND, "no more names")
        name = names[-1] + b"\0"
        if len(name) <= room:
            names.pop()
        return name

    def close_folder(self, handle: int) -> None:
        """Close a folder. Raises TeeError."""
        if self._listings.pop(handle, None) is None:
            raise bad(f"no folder has the handle {handle}")

    # How it is done.

    @contextmanager
    def _folder(self, parts: list[bytes], make: bool = False) -> Iterator[int]:
        """A folder's file descriptor, step by step from the root."""
        fd = os.dup(self._root)
        try:
            for part in parts:
                below = self._step(fd, part, make)
                os.close(fd)
                fd = below
            yield fd
        finally:
            os.close(fd)

    @contextmanager
    def _above(self, parts: list[bytes], make: bool = False) -> Iterator[int]:
        """The folder that holds the last of ``parts``. Folders that are made go again if what follows fails."""
        try:
            with self._folder(parts[:-1], make) as fd:
                yield fd
        except BaseException:
            if make:
                self._prune(parts)
            raise

    def _step(self, fd: int, part: bytes, make: bool) -> int:
        try:
            return os.open(part, _FOLDER, dir_fd=fd)
        except FileNotFoundError:
            if not make:
                raise
        self._has_room(0, 1)
        os.mkdir(part, 0o700, dir_fd=fd)
        self.used_files += 1
        self._persist(fd)
        return os.open(part, _FOLDER, dir_fd=fd)

    def _prune(self, parts: list[bytes]) -> None:
        """Remove the folders above a name, from the innermost on, as long as they are empty."""
        for depth in range(len(parts) - 1, 0, -1):
            with suppress(OSError), self._folder(parts[: depth - 1]) as above:
                os.rmdir(parts[depth - 1], dir_fd=above)
                self.used_files -= 1
                continue
            return

    def _opened(self, fd: int) -> int:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise refuse(Result.ITEM_NOT_FOUND, "no regular file")
        key = (status.st_dev, status.st_ino)
        self._inodes.setdefault(key, _Inode()).handles += 1
        handle = self._new_handle()
        self._files[handle] = _Open(fd, key)
        return handle

    def _gone(self, status: os.stat_result) -> None:
        """A name has gone; with it the file, unless it is open or has other names."""
        inode = self._inodes.get((status.st_dev, status.st_ino))
        if not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            self.used_files -= 1
        elif inode is not None:
            inode.removed = True
        else:
            self.used_files -= 1
            self.used_bytes -= status.st_size

    def _file(self, handle: int) -> _Open:
        file = self._files.get(handle)
        if file is None:
            raise bad(f"no file has the handle {handle}")
        return file

    def _new_handle(self) -> int:
        while self._next in self._files or self._next in self._listings:
            self._next = self._next % _MAX_HANDLE + 1
        handle = self._next
        self._next = handle % _MAX_HANDLE + 1
        return handle

    def _has_room_for_a_handle(self) -> None:
        if self.open_files >= self.limits.max_open:
            raise refuse(Result.OUT_OF_MEMORY, f"{self.open_files} files are open")

    def _has_room(self, more_bytes: int, more_files: int) -> None:
        limits = self.limits
        if more_bytes and self.used_bytes + more_bytes > limits.max_bytes:
            raise refuse(
                Result.STORAGE_NO_SPACE,
                f"{more_bytes} bytes on top of {self.used_bytes}: --fs-max-bytes says {limits.max_bytes}",
            )
        if more_files and self.used_files + more_files > limits.max_files:
            raise refuse(
                Result.STORAGE_NO_SPACE, f"there are {self.used_files} files and folders: the most by --fs-max-files"
            )

    def _persist(self, folder: int) -> None:
        if self._sync:
            os.fsync(folder)

    def _measure(self) -> tuple[int, int]:
        """How many bytes and entries there are."""
        size = entries = 0
        for _, folders, files, fd in os.fwalk(b".", dir_fd=self._root, follow_symlinks=False):
            entries += len(folders) + len(files)
            for name in files:
                status = _stat(name, fd)
                if status is not None and stat.S_ISREG(status.st_mode):
                    size += status.st_size
        return size, entries


def _offset(number: int) -> None:
    if not 0 <= number <= _MAX_OFFSET:
        raise bad(f"an offset of {number}")


def _stat(name: bytes, folder: int) -> os.stat_result | None:
    try:
        return os.stat(name, dir_fd=folder, follow_symlinks=False)
    except FileNotFoundError:
        return None


def _rename_to_nothing(source: bytes, below: int, target: bytes, above: int) -> None:
    """Rename where nothing has the new name. Raises FileExistsError."""
    if _RENAMEAT2 is not None:
        if not _RENAMEAT2(below, source, above, target, _RENAME_NOREPLACE):
            return
        number = ctypes.get_errno()
        if number not in (errno.EINVAL, errno.ENOSYS):  # what a file system says that cannot do it
            raise OSError(number, os.strerror(number))
    # Nobody else writes here: the folder is locked.
    if _stat(target, above) is not None:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
    os.rename(source, target, src_dir_fd=below, dst_dir_fd=above)


_RENAMEAT2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
if _RENAMEAT2 is not None:
    _RENAMEAT2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
