"""How a trusted application for the software TEE is written.

A TA is one class. Its methods are coroutines: they run until they end or until they ``await`` something of
``self.env``; in between nothing else of the TEE runs, so **work that takes more than a millisecond or so has to**
``await self.env.checkpoint()`` now and then. A call ends well by returning; :class:`~tee.results.TeeError` ends it
with that code; any other exception is a *panic*: the instance and all its sessions are dead (TARGET_DEAD), the TEE is
not.

>>> from tee.soft.ta import Direction, Parameters, TrustedApplication, bad_command
>>> class Adder(TrustedApplication):
...     uuid = UUID("00000000-0000-4000-8000-000000000001")
...     async def invoke(self, session, command, params):
...         if command != 0:
...             raise bad_command(command)
...         params.expect(1)
...         value = params.value(0, Direction.INOUT)
...         value.a += value.b
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import IntFlag
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Protocol, TypeVar
from uuid import UUID

from tee.calls import Client, Login
from tee.memory import Memory
from tee.params import Direction, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcReply
from tee.services import REGS, CallReturn
from tee.soft.scheduler import CallOut, Sleep, Task, Yield, suspend

if TYPE_CHECKING:
    from tee.soft.storage import Storage

__all__ = [
    "UUID",
    "CallReturn",
    "Client",
    "ClientMemory",
    "DataFlag",
    "Direction",
    "Environment",
    "Login",
    "MemoryReference",
    "Nothing",
    "Origin",
    "Parameters",
    "Result",
    "TaServer",
    "TaSession",
    "TeeError",
    "TrustedApplication",
    "Value",
    "bad_command",
]


T = TypeVar("T")

#: The largest value of a notification; smaller than what fits the wire, so that what waits for a guest is bounded.
MAX_NOTIFICATION = 255


class DataFlag(IntFlag):
    """How an object of the storage is opened (GlobalPlatform's numbers)."""

    ACCESS_READ = 1
    ACCESS_WRITE = 2
    ACCESS_WRITE_META = 4  #: rename and delete; never shared
    SHARE_READ = 0x10
    SHARE_WRITE = 0x20
    OVERWRITE = 0x400  #: ``create`` replaces an object of that name


class MemoryReference:
    """A memory reference as a TA sees it: the client's bytes in place, never a copy.

    The client can change them at any time: read once what must not change in between. ``capacity`` is how many bytes
    there are; ``size`` is the same at first and is what the TA sets for an output: the bytes that it wrote.
    """

    __slots__ = ("_memory", "_offset", "_size", "_views", "capacity", "direction")

    def __init__(self, direction: Direction, memory: Memory | None, offset: int, size: int) -> None:
        self.direction = direction
        self._memory = memory
        self._offset = offset
        self._size = size
        self._views: list[memoryview] | None = None
        self.capacity = 0 if memory is None else size  #: bytes that can be read or written here

    @classmethod
    def over(cls, direction: Direction, buffer: bytearray) -> MemoryReference:
        """A reference to memory of the TA's own, to be given to another TA."""
        return cls(direction, Memory.of(buffer), 0, len(buffer))

    def passed_on(self, direction: Direction | None = None) -> MemoryReference:
        """The same bytes for another TA, in another ``direction`` too. BAD_PARAMETERS where the TA itself has not the
        right to them.
        """
        direction = self.direction if direction is None else direction
        if direction & ~self.direction:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, "an input cannot be passed on as an output, nor back")
        return MemoryReference(direction, self._memory, self._offset, self.capacity if self._memory else self._size)

    @property
    def memory(self) -> Memory | None:
        """The client's memory itself (for the TEE, not for TAs)."""
        return self._memory

    @property
    def offset(self) -> int:
        """Where it begins there (for the TEE)."""
        return self._offset

    def told(self, size: int) -> None:
        """What another TA says of its output: the bytes that it wrote, or that it would need (for the TEE)."""
        self._size = size

    @property
    def null(self) -> bool:
        """This is the NULL reference: there are no bytes, and ``size`` is only what the client said."""
        return self._memory is None

    @property
    def size(self) -> int:
        """Bytes of content; setting it (0 to ``capacity``) is how a TA reports what it wrote."""
        return self._size

    @size.setter
    def size(self, size: int) -> None:
        if not 0 <= size <= self.capacity:
            raise ValueError(f"a size of {size} in a reference to {self.capacity} bytes")
        self._size = size

    def view(self) -> memoryview | None:
        """All bytes in place (read-only for an input), or None where they lie in several pieces or there are none.

        The view ends with the call.
        """
        if self._memory is None:
            return None
        try:
            view = self._memory.view(self._offset, self.capacity)
        except ValueError:
            self._blame()
        if view is None:
            return None
        if self.direction == Direction.IN:
            view = view.toreadonly()
        if self._views is None:
            self._views = []
        self._views.append(view)
        return view

    def read(self, offset: int = 0, size: int | None = None) -> bytes:
        """A private copy of ``size`` bytes (default: all from ``offset`` on)."""
        size = self.capacity - offset if size is None else size
        if offset < 0 or size < 0 or offset + size > self.capacity:
            raise ValueError(f"{size} bytes at {offset} of a reference to {self.capacity} bytes")
        if self._memory is None:
            return b""
        try:
            return self._memory.read(self._offset + offset, size)
        except ValueError:
            self._blame()

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> None:
        """Write ``data`` in place; ``size`` stays as it is."""
        if self.direction == Direction.IN:
            raise ValueError("an input is not written to")
        if offset < 0 or offset + len(data) > self.capacity:
            raise ValueError(f"{len(data)} bytes at {offset} of a reference to {self.capacity} bytes")
        if self._memory is None:
            return
        try:
            self._memory.write(self._offset + offset, data)
        except ValueError:
            self._blame()

    def put(self, data: bytes | bytearray | memoryview) -> None:
        """Make ``data`` the whole output; SHORT_BUFFER with the size that is needed where it does not fit."""
        if len(data) > self.capacity:
            self.need(len(data))
        self.write(data)
        self._size = len(data)

    def need(self, size: int) -> NoReturn:
        """End the call with SHORT_BUFFER and tell the client that ``size`` bytes are needed."""
        self._size = size
        raise TeeError(Result.SHORT_BUFFER, Origin.TRUSTED_APP, f"{size} bytes are needed, {self.capacity} are there")

    def end(self) -> None:
        """The call has ended: views that the TA still holds are taken away (for the TEE, not for TAs)."""
        for view in self._views or ():
            try:
                view.release()
            except BufferError:  # a copy of the view is in use somewhere; it lives until the TA lets it go
                continue

    def revoke(self) -> None:
        """Take away the bytes, too: nothing of them can be read or written through this object (for the TEE)."""
        self.end()
        self._memory, self.capacity = None, 0

    def _blame(self) -> NoReturn:
        """Whose fault was a ValueError of the memory: the client's, where it took the memory away, else the TA's."""
        if self._memory is not None and not self._memory.segments:
            raise TeeError(Result.COMMUNICATION, Origin.COMMS, "the client's memory is gone") from None
        raise


TaParam = Value | MemoryReference | Nothing


class Parameters(list[TaParam]):
    """A call's parameters as a TA sees them (META parameters are not among them)."""

    __slots__ = ()

    def expect(self, count: int) -> None:
        """There are ``count`` parameters, not counting empty ones at the end (C clients always send four)."""
        if len(self) < count or any(type(p) is not Nothing for p in self[count:]):
            raise TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, f"{count} parameters were expected")

    def value(self, index: int, direction: Direction) -> Value:
        """The value at ``index``; BAD_PARAMETERS where it is none, or of another direction."""
        param = self[index] if index < len(self) else None
        if type(param) is not Value or param.direction != direction:
            raise TeeError(
                Result.BAD_PARAMETERS, Origin.TRUSTED_APP, f"parameter {index} must be a value {direction.name}"
            )
        return param

    def memory(self, index: int, direction: Direction) -> MemoryReference:
        """The memory reference at ``index``; BAD_PARAMETERS where it is none, or of another direction."""
        param = self[index] if index < len(self) else None
        if type(param) is not MemoryReference or param.direction != direction:
            raise TeeError(
                Result.BAD_PARAMETERS,
                Origin.TRUSTED_APP,
                f"parameter {index} must be a memory reference {direction.name}",
            )
        return param


class Services(Protocol):
    """What an environment needs of its TEE for calls from TA to TA."""

    async def open_inner(self, env: Environment, uuid: UUID, params: Sequence[TaParam]) -> Any:
        """Open a session with another TA."""

    async def invoke_inner(self, env: Environment, session: Any, command: int, params: Sequence[TaParam]) -> None:
        """Ask it for a command."""

    async def close_inner(self, env: Environment, session: Any) -> None:
        """Close the session."""

    def notify(self, env: Environment, value: int) -> None:
        """Tell the machine of the current call."""

    async def work(self, env: Environment, function: Callable[[], Any]) -> Any:
        """Run what takes long beside the TEE."""

    def acquire_enclave(self, env: Environment, name: str) -> Any:
        """Find an enclave by its name."""

    async def call_enclave(
        self, env: Environment, server: Any, regs: Sequence[int], memory: MemoryReference | None
    ) -> CallReturn:
        """Call it."""

    async def release_enclave(self, env: Environment, server: Any) -> None:
        """Give it back."""

    async def ocall(self, env: Environment, function: int, params: Sequence[TaParam], timeout: float | None) -> int:  # noqa: ASYNC109
        """Ask the client for a function of its."""

    async def borrow(self, env: Environment, size: int) -> Any:
        """Have memory of the client's."""

    async def give_back(self, env: Environment, borrowed: Any, *, told: bool) -> None:
        """Give it back; ``told``: the client is told."""


class TaSession:
    """A session that a TA has with another one. It ends with the instance that opened it, if not before."""

    __slots__ = ("_env", "_services", "_session")

    def __init__(self, env: Environment, services: Services, session: Any) -> None:
        self._env = env
        self._services = services
        self._session = session

    async def invoke(self, command: int, params: Sequence[TaParam] = ()) -> None:
        """Ask for ``command`` and wait until it has ended; it runs in the current call, on its thread.

        Values are copied there and back; memory, also a client's that the current call was given, is passed on in
        place.

        :raises TeeError: what the other TA ended with (origin TRUSTED_APP); TARGET_DEAD where it has panicked; BUSY
            where it waits, directly or through others, for this very TA; CANCEL as :meth:`Environment.checkpoint`
        """
        await self._services.invoke_inner(self._env, self._session, command, params)

    async def close(self) -> None:
        """End the session. Never fails."""
        await self._services.close_inner(self._env, self._session)

    async def __aenter__(self) -> TaSession:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not GeneratorExit:  # whoever is ended from outside cannot wait; the TEE closes it
            await self.close()


class TaServer:
    """A server enclave that a TA, or another enclave, has acquired."""

    __slots__ = ("_env", "_server", "_services")

    def __init__(self, env: Environment, services: Services, server: Any) -> None:
        self._env = env
        self._services = services
        self._server = server

    async def call(self, *regs: int, memory: MemoryReference | None = None) -> CallReturn:
        """Call it with up to 8 register values of 64 bits (the others are 0), and memory (INOUT) that it reads and
        writes in place while the call lasts.

        :raises TeeError: what it ended with (origin TRUSTED_APP); TARGET_DEAD where it was destroyed or has panicked;
            ACCESS_CONFLICT where it waits for this very call; OVERFLOW for more than 8 enclaves that call one another;
            BAD_PARAMETERS; CANCEL as :meth:`Environment.checkpoint`
        """
        return await self._services.call_enclave(self._env, self._server, (*regs, *(0,) * (REGS - len(regs))), memory)

    async def release(self) -> None:
        """Give it back: calls by it are cancelled."""
        await self._services.release_enclave(self._env, self._server)


class ClientMemory:
    """Memory that the client has allocated for the TA, while it is held: ``async with env.client_memory(size)``."""

    __slots__ = ("_borrowed", "_env", "_services", "size")

    def __init__(self, env: Environment, services: Services, size: int) -> None:
        self._env = env
        self._services = services
        self._borrowed: Any = None
        self.size = size  #: bytes

    async def __aenter__(self) -> ClientMemory:
        self._borrowed = await self._services.borrow(self._env, self.size)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        borrowed, self._borrowed = self._borrowed, None
        # Whoever is ended from outside cannot wait; what it had is then free with the call.
        await self._services.give_back(self._env, borrowed, told=kind is not GeneratorExit)

    def reference(self, direction: Direction, offset: int = 0, size: int | None = None) -> MemoryReference:
        """Some of it (default: all from ``offset`` on), as a parameter of an OCALL, and to read and write. ValueError
        outside of it, or when it is not held."""
        size = self.size - offset if size is None else size
        if self._borrowed is None or offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(f"{size} bytes at {offset} of {self.size} bytes of the client's")
        part = self._borrowed.part(direction, offset, size)
        return MemoryReference(direction, part.memory, part.offset, size)


class Environment:
    """What the TEE offers to one instance of a TA. Everything that waits is a coroutine and belongs to the current
    call.

    ``storage`` keeps objects beyond the life of the instance (:class:`~tee.soft.storage.Storage`). ``properties`` are
    the TA's: GlobalPlatform's ``gpd.ta.*`` and those that its class names.
    """

    __slots__ = (
        "_clock",
        "_floor",
        "_log",
        "_memory_left",
        "_own_mask",
        "_random",
        "_services",
        "properties",
        "storage",
        "task",
        "uuid",
        "version",
    )

    def __init__(
        self,
        uuid: UUID,
        version: int,
        *,
        clock: Callable[[], float],
        random: Callable[[int], bytes],
        log: Callable[[str], None],
        services: Services,
        properties: Mapping[str, str | int | bool],
        memory: int,
    ) -> None:
        self.uuid = uuid
        self.version = version
        self.properties = MappingProxyType(dict(properties))
        self.storage: Storage
        self._clock = clock
        self._random = random
        self._log = log
        self._services = services
        self._memory_left = memory
        self.task: Task | None = None  # the current call (for the TEE, not for TAs)
        self._floor = False  # a caller of this TA, itself a TA, has masked cancellation
        self._own_mask = True  # what this TA has said itself, while there is a floor

    async def checkpoint(self) -> None:
        """Let others run. Raises CANCEL where the call was cancelled and cancellation is not masked."""
        await suspend(Yield())

    async def sleep(self, seconds: float) -> None:
        """Wait for ``seconds``. Raises CANCEL as :meth:`checkpoint` does, at once when the cancel comes."""
        await suspend(Sleep(seconds))

    async def rpc(
        self,
        command: int,
        params: list[Param],
        *,
        timeout: float | None = None,  # noqa: ASYNC109
        to_client: bool = False,
    ) -> RpcReply:
        """Ask the normal world for ``command`` and wait for its answer, of which nothing can be trusted.

        :param to_client: ask the client that made the call, not its supplicant; :meth:`ocall` is easier
        :param timeout: seconds after which the RPC is withdrawn and COMMUNICATION raised
        :raises TeeError: CANCEL as :meth:`checkpoint` does; the RPC is then withdrawn
        """
        self.current()
        rpc = Rpc(command, params, to_client=to_client)
        return await suspend(CallOut(rpc, timeout=timeout))  # type: ignore[no-any-return]

    async def ocall(self, function: int, params: Sequence[TaParam] = (), *, timeout: float | None = None) -> int:  # noqa: ASYNC109
        """Have the client that made the current call run ``function`` (32 bits), and wait for what its handler returns:
        a result code, of which, as of all else that comes back, nothing can be trusted. Outputs are in ``params``.

        Memory in ``params`` is the client's: references of the current call that are registered there, or parts of a
        :meth:`client_memory`. A direction says what the client does: IN, it reads.

        :param timeout: seconds after which COMMUNICATION is raised
        :raises TeeError: BAD_PARAMETERS; the handler was not reached: NOT_SUPPORTED where the client has none,
            COMMUNICATION where it is gone, or closes the session; CANCEL as :meth:`checkpoint`
        """
        return await self._services.ocall(self, function, params, timeout)

    def client_memory(self, size: int) -> ClientMemory:
        """``size`` bytes that the client allocates, in an ``async with``. Entering raises TeeError: OUT_OF_MEMORY, and
        what :meth:`ocall` raises."""
        return ClientMemory(self, self._services, size)

    async def open_session(self, uuid: UUID, params: Sequence[TaParam] = ()) -> TaSession:
        """A session with another TA, which sees this one as its client: login TRUSTED_APP with this TA's UUID.

        :raises TeeError: as :meth:`TaSession.invoke`, and what opening a session can end with: ITEM_NOT_FOUND, BUSY
            where the TA is a single instance with a session already or calls this one, OUT_OF_MEMORY
        """
        return TaSession(self, self._services, await self._services.open_inner(self, uuid, params))

    def acquire(self, name: str) -> TaServer:
        """The server enclave of this name that the machine of the current call (of an enclave: its own) sees. Raises
        TeeError ITEM_NOT_FOUND, ACCESS_DENIED, BAD_FORMAT.
        """
        return TaServer(self, self._services, self._services.acquire_enclave(self, name))

    def notify(self, value: int) -> None:
        """Send the asynchronous notification ``value`` (0 to 255) to the machine whose client made the current call.
        Nobody answers, and nothing waits; raised again before that machine has seen it, it comes once. BAD_PARAMETERS
        for other values. While a session closes on behalf of a client that has gone, it goes to nobody.
        """
        if not 0 <= value <= MAX_NOTIFICATION:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"a notification has the value 0 to {MAX_NOTIFICATION}")
        self._services.notify(self, value)

    async def work(self, function: Callable[[], T]) -> T:
        """Run ``function``, which cannot be cut into steps, beside the TEE, and wait for what it returns or raises. It
        runs on another thread: it must use nothing but what it was given. Where the TEE has no other threads, it runs
        at once, and all else waits. Raises CANCEL as :meth:`checkpoint` does; the function then goes on in vain.
        """
        return await self._services.work(self, function)  # type: ignore[no-any-return]

    def allocate(self, size: int) -> bytearray:
        """``size`` bytes, zeroed, of the ``data_size`` that the TA has declared; OUT_OF_MEMORY beyond it. What Python
        needs for a TA's other objects is not counted.
        """
        if not 0 <= size <= self._memory_left:
            raise TeeError(Result.OUT_OF_MEMORY, Origin.TEE, f"{size} bytes; {self._memory_left} are left")
        self._memory_left -= size
        return bytearray(size)

    def free(self, buffer: bytearray) -> None:
        """Give back what :meth:`allocate` gave: it is emptied."""
        self._memory_left += len(buffer)
        buffer.clear()

    @property
    def cancelled(self) -> bool:
        """The client asked the current call to end (False while cancellation is masked)."""
        return self.current().interrupted

    def mask_cancellation(self) -> bool:
        """Let no cancel reach the current call; returns whether that was so. Each call starts masked."""
        return self._mask(True)

    def unmask_cancellation(self) -> bool:
        """Let a cancel, also one that came before, reach the current call; returns whether it was masked."""
        return self._mask(False)

    def random(self, size: int) -> bytes:
        """``size`` bytes of cryptographic quality."""
        return self._random(size)

    def now(self) -> float:
        """Seconds of a clock that never goes back; its zero means nothing."""
        return self._clock()

    def log(self, text: str) -> None:
        """A line for the log of the TEE."""
        self._log(f"TA {self.uuid}: {text}")

    def enter_from(self, task: Task, floor: bool) -> None:
        """A call from another TA begins, which lets no cancel through where ``floor`` (for the TEE)."""
        self.task = task
        self._floor = floor
        self._own_mask = True
        task.masked = True

    def leave_from(self) -> None:
        """The call from another TA has ended (for the TEE)."""
        self.task = None
        self._floor = False

    def _mask(self, masked: bool) -> bool:
        task = self.current()
        if self._floor:
            before, self._own_mask = self._own_mask, masked
        else:
            before, task.masked = task.masked, masked
        return before

    def current(self) -> Task:
        """The current call (for the TEE)."""
        if self.task is None:
            raise RuntimeError("a TA can wait or ask for cancellation only inside a call")
        return self.task


class TrustedApplication:
    """The base of every TA. Subclasses set ``uuid``, and override what they need.

    The flags are GlobalPlatform's: a TA that is not ``single_instance`` gets a new instance for each session; a single
    instance takes a second session only with ``multi_session`` (else: BUSY); with ``keep_alive`` it outlives its last
    session. Calls to one instance run one at a time.
    """

    uuid: ClassVar[UUID]
    version: ClassVar[int] = 0  #: of a built-in TA; that of a loaded one stands in its package
    single_instance: ClassVar[bool] = False
    multi_session: ClassVar[bool] = False
    keep_alive: ClassVar[bool] = False
    data_size: ClassVar[int] = 32 << 10  #: bytes that an instance can have of ``env.allocate``
    description: ClassVar[str] = ""
    api_level: ClassVar[int] = 0x0001_0001  #: the API that clients see: major version, and minor in the lower 16 bits
    properties: ClassVar[Mapping[str, str | int | bool]] = MappingProxyType({})  #: more of them, by name

    def __init__(self, env: Environment) -> None:
        self.env = env

    async def create(self) -> None:
        """The instance begins."""

    async def open_session(self, params: Parameters, client: Client) -> object:
        """A client opens a session; what is returned is given to the session's later calls."""
        return None

    async def invoke(self, session: Any, command: int, params: Parameters) -> None:
        """A client asks for ``command`` (32 bits)."""
        raise bad_command(command)

    async def enclave_call(self, client: Client, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
        """A client, or another TA, calls the server enclave that this instance is: with 8 register values, and memory
        to be used in place while the call lasts. A service that does not override this is no server.

        Calls are concurrent: while one awaits something, others run. No RPC reaches the caller's client from here, and
        its supplicant only where the enclave is of the same machine.
        """
        raise TeeError(Result.NOT_SUPPORTED, Origin.TRUSTED_APP, "this service is no server")

    async def close_session(self, session: Any) -> None:
        """A session ends. Its client may be gone already: RPCs and long waits are then refused."""

    async def destroy(self) -> None:
        """The instance ends: its last session is gone."""


def bad_command(command: int) -> TeeError:
    """What a TA raises for a command that it does not have."""
    return TeeError(Result.NOT_SUPPORTED, Origin.TRUSTED_APP, f"no command {command}")


def properties_of(ta: type[TrustedApplication], version: int) -> dict[str, str | int | bool]:
    """The properties of a TA, by name: its own first, so that GlobalPlatform's cannot be replaced (for the TEE)."""
    return {
        **ta.properties,
        "gpd.ta.appID": str(ta.uuid),
        "gpd.ta.singleInstance": ta.single_instance,
        "gpd.ta.multiSession": ta.single_instance and ta.multi_session,
        "gpd.ta.instanceKeepAlive": ta.single_instance and ta.keep_alive,
        "gpd.ta.dataSize": ta.data_size,
        "gpd.ta.version": str(version),
        "gpd.ta.description": ta.description,
    }
