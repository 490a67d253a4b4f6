"""Secure storage: objects of a TA whose bytes lie with the caller's supplicant, which can neither read nor change them.

What a TA sees is :class:`Storage` and :class:`StoredObject`. Each TA has, for each machine that its callers come from,
a :class:`Store` of its own. In the supplicant's file system that is one folder::

    <folder>/index        which objects there are: name, key and size of each; sealed as a whole
    <folder>/<object>     the content of one version of one object, in sealed blocks

Keys come from the device key that the TEE was given: HKDF-SHA256 over the TA's UUID and the machine's name gives the
store's key, and that with a random salt the key of one index or of one version of one object, used for nothing else.
All is AES-256-GCM; the names of folders and files are HMACs. So the supplicant learns how many objects there are, their
sizes to 16 KiB, and when they are used.

A change writes a new file, then a new index beside the old one, and renames it over the old one: after a crash all of
the change is there or nothing. What is left over goes with the next change, or is swept when the index is read.

**The index that the TEE has read or written once is kept in its memory as long as the TEE lives.** So nothing that the
supplicant gives back later passes but the last version: else CORRUPT_OBJECT. After a restart of the TEE the supplicant
can give back an older state of a whole store, or none; only hardware that counts could detect that.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from hashlib import sha256
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, TypeVar
from uuid import UUID

from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import FsCommand, Rpc, RpcCommand, RpcReply
from tee.soft.limits import SoftLimits
from tee.soft.outside import FREE_TIMEOUT, Borrowed, Outside
from tee.soft.scheduler import CallOut, Lock, Scheduler, Task, suspend
from tee.soft.ta import DataFlag, Environment

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["MAX_NAME", "DataFlag", "Storage", "StoredObject", "Vault"]

#: The longest name of an object, in bytes (GlobalPlatform's TEE_OBJECT_ID_MAX_LEN).
MAX_NAME = 64

#: The highest position in an object (GlobalPlatform's TEE_DATA_MAX_POSITION).
MAX_POSITION = 0xFFFFFFFF

#: How long to wait for each answer of the supplicant, in seconds.
FS_TIMEOUT = 30.0

#: Bytes of content in one sealed block, and how many of these are read or written at once.
BLOCK = 16 << 10
BLOCKS_AT_ONCE = 4

_TAG = 16
_SEALED = BLOCK + _TAG
_NAMES = 1024  # bytes of borrowed memory for file names; data follows
_NAME_ROOM = 512
_DATA = BLOCKS_AT_ONCE * _SEALED
_SALT = 32
_MAGIC = b"VTEESTO1"
_ENTRY = struct.Struct("<B32sQ")
_MAX_GARBAGE = 16
_INDEX, _NEW_INDEX = "index", "index.new"
_ALL = DataFlag.ACCESS_READ | DataFlag.ACCESS_WRITE | DataFlag.ACCESS_WRITE_META
_READ_SHARED = DataFlag.ACCESS_READ | DataFlag.SHARE_READ

#: What a supplicant's failure means for a TA; anything else: the storage is not available.
_FAILURES = {
    Result.STORAGE_NO_SPACE: Result.STORAGE_NO_SPACE,
    Result.OUT_OF_MEMORY: Result.OUT_OF_MEMORY,
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Entry:
    """One version of one object."""

    salt: bytes
    size: int


_Index = dict[bytes, _Entry]


class StoredObject:
    """An open object, with a position. It belongs to the instance that opened it and ends with it, if not before."""

    __slots__ = ("_flags", "_open", "_store", "env", "name", "position")

    def __init__(self, store: Store, env: Environment, name: bytes, flags: DataFlag) -> None:
        self.name = name
        self.position = 0
        self._store = store
        self.env = env
        self._flags = flags
        self._open = True

    @property
    def size(self) -> int:
        """Bytes of content."""
        self._check(DataFlag(0))
        return self._store.size(self.name)

    @property
    def flags(self) -> DataFlag:
        """How it was opened."""
        return self._flags

    async def read(self, size: int | None = None) -> bytes:
        """Up to ``size`` bytes from the position on (default: all that are left); the position moves on."""
        task = self._check(DataFlag.ACCESS_READ)
        left = max(0, self._store.size(self.name) - self.position)
        size = left if size is None else min(max(size, 0), left)
        if not size:
            return b""
        data = await self._or_close(self._store.read(task, self.name, self.position, size))
        self.position += len(data)
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Write ``data`` at the position, which moves on; zeros fill what lies between the end and the position.

        All of ``data`` is written, or (STORAGE_NO_SPACE, STORAGE_NOT_AVAILABLE, CORRUPT_OBJECT) nothing.
        """
        task = self._check(DataFlag.ACCESS_WRITE)
        given, position = bytes(data), self.position
        if not given:
            return

        def change(content: bytearray) -> None:
            if len(content) < position:
                content.extend(bytes(position - len(content)))
            content[position : position + len(given)] = given

        await self._or_close(self._store.change(task, self.name, change, position + len(given)))
        self.position += len(given)

    async def truncate(self, size: int) -> None:
        """Cut the object, or let it grow by zeros, to ``size`` bytes; the position stays."""
        task = self._check(DataFlag.ACCESS_WRITE)
        if size < 0:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"a size of {size}")

        def change(content: bytearray) -> None:
            del content[size:]
            content.extend(bytes(size - len(content)))

        await self._or_close(self._store.change(task, self.name, change, size))

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move the position: from the start (``whence`` 0), from where it is (1) or from the end (2). OVERFLOW beyond
        what an object can have; a position before the start becomes the start.
        """
        self._check(DataFlag(0))
        base = {0: 0, 1: self.position, 2: self._store.size(self.name)}.get(whence)
        if base is None:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"whence {whence}")
        if base + offset > MAX_POSITION:
            raise TeeError(Result.OVERFLOW, Origin.TEE, f"position {base + offset}")
        self.position = max(0, base + offset)
        return self.position

    async def rename(self, name: bytes) -> None:
        """Give it another name. ACCESS_CONFLICT where there is an object of that name."""
        task = self._check(DataFlag.ACCESS_WRITE_META)
        await self._or_close(self._store.rename(task, self, _name(name)))

    async def delete(self) -> None:
        """Close and delete it."""
        task = self._check(DataFlag.ACCESS_WRITE_META)
        self.close()
        await self._store.delete(task, self.name)

    def close(self) -> None:
        """It cannot be used any more. Nothing where it is closed already."""
        if self._open:
            self._open = False
            self._store.closed(self)
            self.env.storage.closed(self)

    def __enter__(self) -> StoredObject:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _check(self, right: DataFlag) -> Task:
        """The current call, if the object is open, with ``right``, and of the machine that the call comes from."""
        task = self.env.current()
        if not self._open:
            raise TeeError(Result.BAD_STATE, Origin.TEE, "the object is closed")
        if right & ~self._flags:
            raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, f"the object is not open for {right!r}")
        if task.context.vm != self._store.vm:
            raise TeeError(Result.BAD_STATE, Origin.TEE, "the object is another machine's")
        return task

    async def _or_close(self, work: Awaitable[T]) -> T:
        """As GlobalPlatform has it, an object that turns out to be corrupt is closed."""
        try:
            return await work
        except TeeError as error:
            if error.code == Result.CORRUPT_OBJECT:
                self.close()
            raise


class Storage:
    """``env.storage``: the objects of a TA, for the machine that the current call comes from.

    Names have up to 64 bytes. All can end with STORAGE_NOT_AVAILABLE where the caller's supplicant has no file system
    or does not answer, and with CORRUPT_OBJECT where it gives back anything else than what it was given last. No cancel
    reaches into these operations.
    """

    def __init__(self, vault: Vault, env: Environment) -> None:
        self._vault = vault
        self._env = env
        self._open: set[StoredObject] = set()

    async def create(self, name: bytes, data: bytes = b"", flags: DataFlag = _ALL) -> StoredObject:
        """A new object with ``data``, open. ACCESS_CONFLICT where there is one, unless ``flags`` have OVERWRITE; where
        that one is open, in any case.
        """
        store, task = self._store()
        handle = StoredObject(store, self._env, _name(name), flags & ~DataFlag.OVERWRITE)
        self._check_room()
        await store.create(task, handle, bytes(data), replace=bool(flags & DataFlag.OVERWRITE))
        return handle

    async def open(self, name: bytes, flags: DataFlag = _READ_SHARED) -> StoredObject:
        """An object that is there: ITEM_NOT_FOUND; ACCESS_CONFLICT where it is open already, unless all who have it
        open share what they do with it.
        """
        store, task = self._store()
        handle = StoredObject(store, self._env, _name(name), flags & ~DataFlag.OVERWRITE)
        self._check_room()
        await store.open(task, handle)
        return handle

    async def delete(self, name: bytes) -> None:
        """Delete an object, also a corrupt one. ITEM_NOT_FOUND; ACCESS_CONFLICT where it is open."""
        store, task = self._store()
        await store.delete(task, _name(name))

    async def rename(self, old: bytes, new: bytes) -> None:
        """Give an object another name. As :meth:`delete`; ACCESS_CONFLICT where there is one of the new name."""
        store, task = self._store()
        await store.rename(task, _name(old), _name(new))

    async def enumerate(self) -> list[tuple[bytes, int]]:
        """Names and sizes of all objects, sorted."""
        store, task = self._store()
        return await store.enumerate(task)

    def opened(self, handle: StoredObject) -> None:
        """For the store: it is open."""
        self._open.add(handle)

    def closed(self, handle: StoredObject) -> None:
        """For the object: it is closed."""
        self._open.discard(handle)

    def end(self) -> None:
        """The instance has ended: what it has open is closed (for the TEE)."""
        for handle in tuple(self._open):
            handle.close()

    def _store(self) -> tuple[Store, Task]:
        task = self._env.current()
        return self._vault.store(self._env.uuid, task.context.vm), task

    def _check_room(self) -> None:
        if len(self._open) >= self._vault.limits.open_objects:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, f"{len(self._open)} objects are open")


class Vault:
    """All stores of one TEE, under its device key."""

    def __init__(
        self,
        key: bytes,
        *,
        random: Callable[[int], bytes],
        limits: SoftLimits,
        outside: Outside,
        scheduler: Scheduler,
    ) -> None:
        if len(key) < 16:
            raise ValueError("a storage key has at least 16 bytes")
        self.limits = limits
        self.random = random
        self.outside = outside
        self.scheduler = scheduler
        self._key = key
        self._stores: dict[tuple[UUID, str], Store] = {}

    def store(self, uuid: UUID, vm: str) -> Store:
        """The store of the TA ``uuid`` for callers of the machine ``vm``."""
        found = self._stores.get((uuid, vm))
        if found is None:
            key = _derive(self._key, b"", b"virtio-tee storage of a TA\0" + uuid.bytes + vm.encode())
            found = self._stores[uuid, vm] = Store(self, key, vm)
        return found


class Store:
    """The objects of one TA for one machine."""

    def __init__(self, vault: Vault, key: bytes, vm: str) -> None:
        self.vm = vm
        self._vault = vault
        self._key = key
        self._folder = self._hidden(b"folder")
        self._lock = Lock(vault.scheduler)
        self._index: _Index | None = None
        self._handles: dict[bytes, list[StoredObject]] = {}
        self._garbage: list[str] = []

    # What objects and Storage ask for.

    def size(self, name: bytes) -> int:
        """Bytes of an object that is open."""
        assert self._index is not None
        return self._index[name].size

    async def create(self, task: Task, handle: StoredObject, data: bytes, *, replace: bool) -> None:
        """See :meth:`Storage.create`."""

        async def work(files: _Files, index: _Index) -> None:
            name = handle.name
            if name in self._handles or (name in index and not replace):
                raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, "there is such an object")
            if name not in index and len(index) >= self._vault.limits.objects:
                raise TeeError(Result.STORAGE_NO_SPACE, Origin.TEE, f"there are {len(index)} objects")
            await self._put(files, index, name, data)
            self._handles[name] = [handle]
            handle.env.storage.opened(handle)

        await self._run(task, work)

    async def open(self, task: Task, handle: StoredObject) -> None:
        """See :meth:`Storage.open`. The first block is read to see whether the object is what it should be."""

        async def work(files: _Files, index: _Index) -> None:
            entry = _entry(index, handle.name)
            for other in self._handles.get(handle.name, ()):
                if not _go_together(handle.flags, other.flags):
                    raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, "the object is open")
            await self._get(files, handle.name, entry, 0, 0)
            self._handles.setdefault(handle.name, []).append(handle)
            handle.env.storage.opened(handle)

        await self._run(task, work)

    async def read(self, task: Task, name: bytes, position: int, size: int) -> bytes:
        """A part of an object that is open, and lies within it."""

        async def work(files: _Files, index: _Index) -> bytes:
            return await self._get(files, name, _entry(index, name), position, size)

        return await self._run(task, work)

    async def change(self, task: Task, name: bytes, change: Callable[[bytearray], None], reach: int) -> None:
        """Replace the content of an object that is open by what ``change`` makes of it, up to ``reach`` bytes."""
        if reach > self._vault.limits.object_size:
            raise TeeError(Result.STORAGE_NO_SPACE, Origin.TEE, f"an object of {reach} bytes")

        async def work(files: _Files, index: _Index) -> None:
            entry = _entry(index, name)
            content = bytearray(await self._get(files, name, entry, 0, entry.size))
            change(content)
            await self._put(files, index, name, bytes(content))

        await self._run(task, work)

    async def rename(self, task: Task, old: bytes | StoredObject, new: bytes) -> None:
        """See :meth:`Storage.rename`, and for an object that is open :meth:`StoredObject.rename`."""

        async def work(files: _Files, index: _Index) -> None:
            name = old if isinstance(old, bytes) else old.name
            entry = _entry(index, name)
            if (isinstance(old, bytes) and name in self._handles) or new in index or new in self._handles:
                raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, "the object is open, or there is one of that name")
            # The name of its file, and what its blocks are sealed with, do not depend on the object's name.
            await self._commit(files, {**{n: e for n, e in index.items() if n != name}, new: entry})
            if isinstance(old, StoredObject):
                self._handles[new] = self._handles.pop(name)
                old.name = new

        await self._run(task, work)

    async def delete(self, task: Task, name: bytes) -> None:
        """See :meth:`Storage.delete`."""

        async def work(files: _Files, index: _Index) -> None:
            entry = _entry(index, name)
            if name in self._handles:
                raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, "the object is open")
            await self._commit(files, {n: e for n, e in index.items() if n != name}, self._file(entry))

        await self._run(task, work)

    async def enumerate(self, task: Task) -> list[tuple[bytes, int]]:
        """See :meth:`Storage.enumerate`."""

        async def work(_: _Files, index: _Index) -> list[tuple[bytes, int]]:
            return sorted((name, entry.size) for name, entry in index.items())

        return await self._run(task, work)

    def closed(self, handle: StoredObject) -> None:
        """For the object: it is closed."""
        handles = self._handles.get(handle.name, [])
        if handle in handles:
            handles.remove(handle)
            if not handles:
                del self._handles[handle.name]

    # One operation: alone in this store, out of the reach of cancels, with the index known.

    async def _run(self, task: Task, work: Callable[[_Files, _Index], Awaitable[T]]) -> T:
        masked, task.masked = task.masked, True
        try:
            await self._lock.acquire(task)
            try:
                files = _Files(self._vault.outside, task, self._folder)
                try:
                    if self._index is None:
                        self._index = await self._load(files)
                    result = await work(files, self._index)
                except GeneratorExit:
                    files.abandon()
                    raise
                except _FsError as error:
                    await files.end()
                    code = _FAILURES.get(Result(error.code), Result.STORAGE_NOT_AVAILABLE)
                    raise TeeError(code, Origin.TEE, str(error)) from None
                except BaseException:
                    await files.end()
                    raise
                await files.end()
                return result
            finally:
                self._lock.release()
        finally:
            task.masked = masked

    # The index.

    async def _load(self, files: _Files) -> _Index:
        """The index as the supplicant has it; none is an empty one."""
        try:
            file = await files.open(_INDEX)
        except _FsError as error:
            if error.code == Result.ITEM_NOT_FOUND:
                return {}
            raise
        most = len(_MAGIC) + _SALT + _TAG + 12 + self._vault.limits.objects * (_ENTRY.size + MAX_NAME)
        sealed = bytearray()
        while len(sealed) <= most:
            piece = await files.read(file, len(sealed), _DATA)
            sealed += piece
            if len(piece) < _DATA:
                break
        await files.close(file)
        if len(sealed) > most:
            _corrupt("the index is larger than any can be")
        index = self._unseal_index(bytes(sealed))
        await self._sweep(files, {self._file(entry) for entry in index.values()} | {_INDEX})
        return index

    async def _commit(self, files: _Files, index: _Index, *old: str) -> None:
        """Make ``index`` the index; then the files ``old`` go."""
        file = await files.create(_NEW_INDEX)
        await files.write_all(file, [self._seal_index(index)])
        await files.close(file)
        await files.rename(_NEW_INDEX, _INDEX)
        self._index = index
        garbage, self._garbage = [*self._garbage, *old], []
        for name in garbage:
            if not await files.try_to_remove(name):
                self._leave(name)

    def _leave(self, name: str) -> None:
        """The file is removed with a later change; where there are too many, when the index is read next."""
        if len(self._garbage) < _MAX_GARBAGE:
            self._garbage.append(name)

    def _seal_index(self, index: _Index) -> bytes:
        salt = self._vault.random(_SALT)
        plain = bytearray(struct.pack("<I", len(index)))
        for name, entry in index.items():
            plain += _ENTRY.pack(len(name), entry.salt, entry.size) + name
        return _MAGIC + salt + self._cipher(salt, b"index").encrypt(bytes(12), bytes(plain), _MAGIC)

    def _unseal_index(self, sealed: bytes) -> _Index:
        start = len(_MAGIC) + _SALT
        if not sealed.startswith(_MAGIC) or len(sealed) < start + _TAG:
            _corrupt("the index is none")
        plain = _unseal(self._cipher(sealed[len(_MAGIC) : start], b"index"), 0, sealed[start:], _MAGIC)
        index: _Index = {}
        place = 4
        for _ in range(struct.unpack_from("<I", plain)[0]):
            length, salt, size = _ENTRY.unpack_from(plain, place)
            place += _ENTRY.size
            index[plain[place : place + length]] = _Entry(salt, size)
            place += length
        return index

    async def _sweep(self, files: _Files, wanted: set[str]) -> None:
        """Remove what changes that were cut short have left over. Whatever fails is left for the next time."""
        try:
            folder = await files.opendir()
        except _FsError:
            return
        left_over = []
        for _ in range(2 * self._vault.limits.objects + 16):
            try:
                name = await files.readdir(folder)
            except _FsError:
                break
            if name not in wanted and (name == _NEW_INDEX or _is_file(name)):
                left_over.append(name)
        await files.close(folder)
        for name in left_over:
            await files.try_to_remove(name)

    # The content of objects.

    async def _put(self, files: _Files, index: _Index, name: bytes, data: bytes) -> None:
        """Give the object ``name`` the content ``data``."""
        if len(data) > self._vault.limits.object_size:
            raise TeeError(Result.STORAGE_NO_SPACE, Origin.TEE, f"an object of {len(data)} bytes")
        entry = _Entry(self._vault.random(_SALT), len(data))
        cipher = self._cipher(entry.salt, b"object")
        blocks = [
            cipher.encrypt(_nonce(place), data[place * BLOCK : (place + 1) * BLOCK], b"")
            for place in range(_blocks(len(data)))
        ]
        new = self._file(entry)
        old = index.get(name)
        try:
            file = await files.create(new)
            await files.write_all(file, blocks)
            await files.close(file)
            await self._commit(files, {**index, name: entry}, *([self._file(old)] if old is not None else ()))
        except (_FsError, TeeError):
            self._leave(new)
            raise

    async def _get(self, files: _Files, name: bytes, entry: _Entry, position: int, size: int) -> bytes:
        """``size`` bytes of an object; at least its first block is looked at."""
        first, last = position // BLOCK, max(position + size - 1, position) // BLOCK
        cipher = self._cipher(entry.salt, b"object")
        try:
            file = await files.open(self._file(entry))
        except _FsError as error:
            if error.code == Result.ITEM_NOT_FOUND:
                _corrupt("the object's file is gone")
            raise
        content = bytearray()
        for place in range(first, last + 1, BLOCKS_AT_ONCE):
            count = min(BLOCKS_AT_ONCE, last + 1 - place)
            lengths = [min(BLOCK, entry.size - at * BLOCK) + _TAG for at in range(place, place + count)]
            sealed = await files.read(file, place * _SEALED, sum(lengths))
            if len(sealed) != sum(lengths):
                _corrupt("the object is cut short")
            for at, length in enumerate(lengths):
                content += _unseal(cipher, place + at, sealed[at * _SEALED : at * _SEALED + length], b"")
        await files.close(file)
        start = position - first * BLOCK
        return bytes(content[start : start + size])

    # Keys and names.

    def _cipher(self, salt: bytes, what: bytes) -> AESGCM:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        return AESGCM(_derive(self._key, salt, what))

    def _file(self, entry: _Entry) -> str:
        return self._hidden(b"file" + entry.salt)

    def _hidden(self, what: bytes) -> str:
        return hmac.new(self._key, what, sha256).hexdigest()[:32]


class _FsError(Exception):
    """The supplicant has failed, with this code."""

    def __init__(self, code: int, what: str) -> None:
        self.code = code if code in Result.__members__.values() else Result.GENERIC
        super().__init__(f"{what}: {code:#x}")


class _Files:
    """A store's folder with the supplicant of one call, and the memory that is borrowed for one operation."""

    def __init__(self, outside: Outside, task: Task, folder: str) -> None:
        self._outside = outside
        self._task = task
        self._folder = folder
        self._memory: Borrowed | None = None
        self._open: dict[int, FsCommand] = {}  # what is open, and how it is closed

    async def end(self) -> None:
        """Close what an error has left open, and give the memory back."""
        for handle in tuple(self._open):
            if not await self.close(handle):
                break
        if self._memory is not None:
            memory, self._memory = self._memory, None
            await self._outside.give_back(memory)

    def abandon(self) -> None:
        """The same, without telling the supplicant."""
        if self._memory is not None:
            self._outside.abandon(self._memory)

    async def open(self, name: str) -> int:
        """A file that is there."""
        return await self._handle(FsCommand.OPEN, f"{self._folder}/{name}", FsCommand.CLOSE)

    async def create(self, name: str) -> int:
        """A file that is empty now."""
        return await self._handle(FsCommand.CREATE, f"{self._folder}/{name}", FsCommand.CLOSE)

    async def opendir(self) -> int:
        """The folder."""
        return await self._handle(FsCommand.OPENDIR, self._folder, FsCommand.CLOSEDIR)

    async def close(self, handle: int) -> bool:
        """Close a file or the folder; no cancel keeps that from being sent. What comes of it does not matter, since
        what was written is looked at when it is read; False where the supplicant does not answer.
        """
        try:
            await self._ask(self._open.pop(handle), handle, shielded=True)
        except _FsError as error:
            return error.code != Result.COMMUNICATION
        except TeeError:
            return True
        return True

    async def read(self, file: int, offset: int, size: int) -> bytes:
        """Up to ``size`` bytes of a file."""
        memory = await self._borrowed()
        reply = await self._ask(FsCommand.READ, file, offset, memory.part(Direction.OUT, _NAMES, size))
        return self._given(reply, memory, size)

    async def readdir(self, folder: int) -> str:
        """The next name."""
        memory = await self._borrowed()
        reply = await self._ask(FsCommand.READDIR, folder, 0, memory.part(Direction.OUT, _NAMES, _NAME_ROOM))
        return self._given(reply, memory, _NAME_ROOM).split(b"\0")[0].decode("ascii", "replace")

    async def write_all(self, file: int, pieces: list[bytes]) -> None:
        """Write ``pieces`` one after the other into an empty file."""
        memory = await self._borrowed()
        data = b"".join(pieces)
        for offset in range(0, len(data), _DATA):
            piece = data[offset : offset + _DATA]
            self._fill(memory, _NAMES, piece)
            await self._ask(FsCommand.WRITE, file, offset, memory.part(Direction.IN, _NAMES, len(piece)))

    async def rename(self, old: str, new: str) -> None:
        """Rename a file over another one."""
        memory = await self._borrowed()
        first = self._named(memory, 0, f"{self._folder}/{old}")
        second = self._named(memory, _NAME_ROOM, f"{self._folder}/{new}")
        await self._ask(FsCommand.RENAME, 1, 0, first, second)

    async def try_to_remove(self, name: str) -> bool:
        """Remove a file; False where that fails, for whatever reason."""
        try:
            memory = await self._borrowed()
            await self._ask(FsCommand.REMOVE, 0, 0, self._named(memory, 0, f"{self._folder}/{name}"))
        except _FsError as error:
            return error.code == Result.ITEM_NOT_FOUND
        except TeeError:
            return False
        return True

    async def _handle(self, command: FsCommand, name: str, closed_by: FsCommand) -> int:
        memory = await self._borrowed()
        reply = await self._ask(command, 0, 0, self._named(memory, 0, name), Value(Direction.OUT))
        answer = reply.params[2]
        if not isinstance(answer, Value) or not isinstance(answer.a, int) or not 0 <= answer.a < 1 << 64:
            _corrupt(f"the answer to {command.name} has no handle")
        self._open[answer.a] = closed_by
        return answer.a

    async def _ask(self, command: FsCommand, b: int, c: int = 0, *more: Param, shielded: bool = False) -> RpcReply:
        params = [Value(Direction.IN, command, b, c), *more]
        rpc = Rpc(RpcCommand.FS, list(params))
        try:
            timeout = FREE_TIMEOUT if shielded else FS_TIMEOUT
            reply: RpcReply = await suspend(CallOut(rpc, shielded=shielded, timeout=timeout))
        except TeeError as error:
            if error.code == Result.COMMUNICATION:
                raise _FsError(error.code, error.why) from None
            raise
        if reply.code != Result.SUCCESS:
            raise _FsError(reply.code, f"FS {command.name}")
        if len(reply.params) != len(params):
            _corrupt(f"the answer to {command.name} has {len(reply.params)} parameters")
        return reply

    async def _borrowed(self) -> Borrowed:
        if self._memory is None:
            try:
                self._memory = await self._outside.borrow(self._task, _NAMES + _DATA, FS_TIMEOUT)
            except TeeError as error:
                if error.code == Result.CANCEL:
                    raise
                raise _FsError(error.code, f"SHM_ALLOC: {error.why}") from None
        return self._memory

    def _given(self, reply: RpcReply, memory: Borrowed, size: int) -> bytes:
        """What the supplicant has put into the memory, copied once."""
        answer = reply.params[1]
        if not isinstance(answer, MemRef) or not isinstance(answer.size, int) or not 0 <= answer.size <= size:
            _corrupt("the answer has more than was asked for")
        try:
            return memory.read(_NAMES, answer.size)
        except ValueError as error:
            raise _FsError(Result.COMMUNICATION, str(error)) from None

    def _named(self, memory: Borrowed, offset: int, name: str) -> MemRef:
        text = name.encode() + b"\0"
        self._fill(memory, offset, text)
        return memory.part(Direction.IN, offset, len(text))

    def _fill(self, memory: Borrowed, offset: int, data: bytes) -> None:
        try:
            memory.write(offset, data)
        except ValueError as error:
            raise _FsError(Result.COMMUNICATION, str(error)) from None


def _name(name: bytes) -> bytes:
    if not isinstance(name, bytes | bytearray | memoryview) or len(name) > MAX_NAME:
        raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"a name has up to {MAX_NAME} bytes")
    return bytes(name)


def _entry(index: _Index, name: bytes) -> _Entry:
    entry = index.get(name)
    if entry is None:
        raise TeeError(Result.ITEM_NOT_FOUND, Origin.TEE, "there is no such object")
    return entry


def _go_together(one: DataFlag, other: DataFlag) -> bool:
    """Two handles on one object: what either of them does, both must share."""
    either, both = one | other, one & other
    if either & DataFlag.ACCESS_WRITE_META:
        return False
    if either & DataFlag.ACCESS_READ and not both & DataFlag.SHARE_READ:
        return False
    return not either & DataFlag.ACCESS_WRITE or bool(both & DataFlag.SHARE_WRITE)


def _blocks(size: int) -> int:
    """How many blocks there are; also an empty object has one, which proves it."""
    return max(1, -(-size // BLOCK))


def _nonce(place: int) -> bytes:
    return place.to_bytes(12, "big")


def _unseal(cipher: AESGCM, place: int, sealed: bytes, more: bytes) -> bytes:
    from cryptography.exceptions import InvalidTag

    try:
        return cipher.decrypt(_nonce(place), sealed, more)
    except InvalidTag:
        _corrupt("it is not what was stored")


def _derive(key: bytes, salt: bytes, what: bytes) -> bytes:
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, what).derive(key)


def _is_file(name: str) -> bool:
    return len(name) == 32 and not set(name) - set("0123456789abcdef")


def _corrupt(why: str) -> NoReturn:
    raise TeeError(Result.CORRUPT_OBJECT, Origin.TEE, why)
