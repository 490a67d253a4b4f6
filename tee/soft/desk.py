"""The services pseudo-TA: what clients ask about services and server enclaves, by commands of a session, or by calls
of a context.

Each session has one of its own, with the enclaves that were created and acquired in it. Calls are concurrent.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from construct import ConstructError

from tee.calls import NIL_UUID, Client, Login
from tee.params import Direction
from tee.results import Origin, Result, TeeError
from tee.services import (
    ENTRY_SIZE,
    REGS,
    SERVICES_UUID,
    AcquireEnclave,
    AttestSelector,
    AttestService,
    CallEnclave,
    CallFrame,
    CallReturn,
    Command,
    CreateEnclave,
    DestroyEnclave,
    ListServices,
    Loaded,
    LoadService,
    Refusal,
    RefusedError,
    ReleaseEnclave,
    RemoveService,
    RunTask,
    ServiceCall,
    ServiceList,
    TaskSelector,
)
from tee.soft.enclaves import Enclave, Server
from tee.soft.scheduler import Task
from tee.soft.ta import UUID, Environment, MemoryReference, Nothing, Parameters, TrustedApplication, bad_command

if TYPE_CHECKING:
    from tee.soft.driver import SoftTee

T = TypeVar("T", Enclave, Server)
_IN, _OUT, _INOUT = Direction.IN, Direction.OUT, Direction.INOUT
_LAST = 0xFFFF_FFFF


class Desk(TrustedApplication):
    """See the module. ``tee`` is set by the TEE itself."""

    uuid = SERVICES_UUID
    description = "services and enclaves"
    data_size = 0
    tee: ClassVar[SoftTee]

    def __init__(self, env: Environment) -> None:
        super().__init__(env)
        self.enclaves: dict[int, Enclave] = {}
        self.servers: dict[int, Server] = {}
        self._next = 1

    async def open_session(self, params: Parameters, client: Client) -> Client:
        """Open to all but TAs, which have an interface of their own."""
        return client

    async def close_session(self, session: Client) -> None:
        """Release all servers, destroy all enclaves."""
        task = self.env.current()
        for server in tuple(self.servers.values()):
            await self._release(task, server)
        for enclave in tuple(self.enclaves.values()):
            await self._destroy(task, enclave)

    async def invoke(self, session: Client, command: int, params: Parameters) -> None:
        """One of the commands of the specification's table."""
        handler = _COMMANDS.get(command)
        if handler is None:
            raise bad_command(command)
        await handler(self, self.env.current(), session, params)

    def serve(self, task: Task, call: ServiceCall, params: Parameters) -> Coroutine[Any, Any, object]:
        """The answer to a call."""
        return _CALLS[type(call)](self, task, call, params)

    # What both ways do.

    def _client(self, task: Task) -> Client:
        return Client(Login.PUBLIC, NIL_UUID, task.context.vm)

    async def _load(self, task: Task, package: MemoryReference) -> Loaded:
        return await self.tee.load_service(task, package)

    async def _create(self, task: Task, uuid: UUID, name: bytes, flags: int) -> Enclave:
        enclave = await self.tee.create_enclave(task, uuid, name, flags)
        enclave.ident = self._add(self.enclaves, enclave)
        return enclave

    async def _destroy(self, task: Task, enclave: Enclave) -> None:
        if self.enclaves.pop(enclave.ident, None) is None:
            raise RefusedError(Refusal.NO_SESSION, "no such enclave")
        await self.tee.enclaves.destroy(task, enclave)

    def _acquire(self, task: Task, name: bytes) -> Server:
        vm, acquired = task.context.vm, self.tee.enclaves.acquired
        if acquired[vm] >= self.tee.limits.servers:
            raise RefusedError(Refusal.LIMIT, f"machine {vm!r} has acquired {acquired[vm]} enclaves")
        server = self.tee.enclaves.acquire(vm, name)
        server.ident = self._add(self.servers, server)
        acquired[vm] += 1
        return server

    async def _release(self, task: Task, server: Server) -> None:
        if self.servers.pop(server.ident, None) is None:
            raise RefusedError(Refusal.NO_SESSION, "no such server")
        acquired = self.tee.enclaves.acquired
        acquired[task.context.vm] -= 1
        if not acquired[task.context.vm]:
            del acquired[task.context.vm]
        await self.tee.enclaves.release(task, server)

    async def _call(
        self, task: Task, client: Client, server: Server, regs: Sequence[int], memory: MemoryReference | None
    ) -> CallReturn:
        task.masked = False  # what is cancelled is the enclave's call, which has a mask of its own
        return await self.tee.enclaves.call(task, server, client, regs, memory)

    def _add(self, table: dict[int, T], entry: T) -> int:
        while self._next in self.enclaves or self._next in self.servers:
            self._next = self._next % _LAST + 1
        ident = self._next
        table[ident] = entry
        self._next = ident % _LAST + 1
        return ident

    def _enclave(self, ident: int) -> Enclave:
        return _known(self.enclaves, ident)

    def _server(self, ident: int) -> Server:
        return _known(self.servers, ident)

    # Commands.

    async def list_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(2)
        value, room = params.value(0, _INOUT), params.memory(1, _OUT)
        found = self.tee.list_services(task.context.vm, value.a, room.capacity // ENTRY_SIZE)
        entries = b"".join(entry.pack() for entry in found.entries)
        value.a, value.b, value.c = found.total, len(found.entries), 0
        if not room.null:
            room.put(entries)

    async def load_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(3)
        package, uuid, version = params.memory(0, _IN), params.memory(1, _OUT), params.value(2, _OUT)
        if uuid.capacity < len(NIL_UUID.bytes):
            uuid.need(len(NIL_UUID.bytes))
        loaded = await self._load(task, package)
        uuid.put(loaded.uuid.bytes)
        version.a = loaded.version

    async def remove_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(1)
        await self.tee.remove_service(task, _uuid(params.memory(0, _IN)))

    async def task_command(self, task: Task, client: Client, params: Parameters) -> None:
        selector = _parse(TaskSelector, params.memory(0, _IN))
        await self.tee.run_service(task, UUID(bytes=selector.uuid), client, selector.func, params[1:])

    async def attest_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(2)
        selector, room = _parse(AttestSelector, params.memory(0, _IN)), params.memory(1, _OUT)
        await self.tee.attest_service(task, UUID(bytes=selector.uuid), selector.nonce, room)

    async def create_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(3)
        uuid, name, value = params.memory(0, _IN), params.memory(1, _IN), params.value(2, _INOUT)
        enclave = await self._create(task, _uuid(uuid), _name(name), value.a)
        value.a, value.b, value.c = enclave.ident, 0, 0

    async def destroy_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(1)
        await self._destroy(task, self._enclave(params.value(0, _IN).a))

    async def acquire_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(2)
        name, value = params.memory(0, _IN), params.value(1, _OUT)
        value.a = self._acquire(task, _name(name)).ident

    async def release_command(self, task: Task, client: Client, params: Parameters) -> None:
        params.expect(1)
        await self._release(task, self._server(params.value(0, _IN).a))

    async def call_command(self, task: Task, client: Client, params: Parameters) -> None:
        has_memory = len(params) > 2 and type(params[2]) is not Nothing
        params.expect(3 if has_memory else 2)
        value, frame = params.value(0, _IN), params.memory(1, _INOUT)
        memory = params.memory(2, _INOUT) if has_memory else None
        regs = tuple(_parse(CallFrame, frame).regs)
        given = await self._call(task, client, self._server(value.a), regs, memory)
        frame.put(CallFrame.build({"regs": [given.value, given.offset, given.size, *(0,) * (REGS - 3)]}))

    # Calls.

    async def on_list(self, task: Task, call: ListServices, params: Parameters) -> ServiceList:
        return self.tee.list_services(task.context.vm, call.first, call.max_entries)

    async def on_load(self, task: Task, call: LoadService, params: Parameters) -> Loaded:
        params.expect(1)
        return await self._load(task, params.memory(0, _IN))

    async def on_remove(self, task: Task, call: RemoveService, params: Parameters) -> None:
        await self.tee.remove_service(task, call.uuid)

    async def on_task(self, task: Task, call: RunTask, params: Parameters) -> None:
        await self.tee.run_service(task, call.uuid, call.client, call.func, params)

    async def on_attest(self, task: Task, call: AttestService, params: Parameters) -> None:
        params.expect(1)
        await self.tee.attest_service(task, call.uuid, call.nonce, params.memory(0, _OUT))

    async def on_create(self, task: Task, call: CreateEnclave, params: Parameters) -> Enclave:
        return await self._create(task, call.uuid, call.name, call.flags)

    async def on_destroy(self, task: Task, call: DestroyEnclave, params: Parameters) -> None:
        await self._destroy(task, _given(self.enclaves, call.enclave, Enclave))

    async def on_acquire(self, task: Task, call: AcquireEnclave, params: Parameters) -> Server:
        return self._acquire(task, call.name)

    async def on_release(self, task: Task, call: ReleaseEnclave, params: Parameters) -> None:
        await self._release(task, _given(self.servers, call.server, Server))

    async def on_call(self, task: Task, call: CallEnclave, params: Parameters) -> CallReturn:
        params.expect(min(len(params), 1))
        memory = params.memory(0, _INOUT) if params else None
        server = _given(self.servers, call.server, Server)
        return await self._call(task, self._client(task), server, call.regs, memory)


_COMMANDS: dict[int, Callable[[Desk, Task, Client, Parameters], Awaitable[None]]] = {
    Command.SERVICE_LIST: Desk.list_command,
    Command.SERVICE_LOAD: Desk.load_command,
    Command.SERVICE_REMOVE: Desk.remove_command,
    Command.SERVICE_TASK: Desk.task_command,
    Command.SERVICE_ATTEST: Desk.attest_command,
    Command.ENCLAVE_CREATE: Desk.create_command,
    Command.ENCLAVE_DESTROY: Desk.destroy_command,
    Command.ENCLAVE_ACQUIRE: Desk.acquire_command,
    Command.ENCLAVE_RELEASE: Desk.release_command,
    Command.ENCLAVE_CALL: Desk.call_command,
}

_CALLS: dict[type[ServiceCall], Callable[[Desk, Task, Any, Parameters], Coroutine[Any, Any, object]]] = {
    ListServices: Desk.on_list,
    LoadService: Desk.on_load,
    RemoveService: Desk.on_remove,
    RunTask: Desk.on_task,
    AttestService: Desk.on_attest,
    CreateEnclave: Desk.on_create,
    DestroyEnclave: Desk.on_destroy,
    AcquireEnclave: Desk.on_acquire,
    ReleaseEnclave: Desk.on_release,
    CallEnclave: Desk.on_call,
}

SERVED = tuple(_CALLS)
"""The calls that are served."""

CANCELLABLE = frozenset({LoadService, RunTask, AttestService, CreateEnclave, CallEnclave})
"""Calls that run code, and so can be cancelled."""


def _known(table: dict[int, T], ident: int) -> T:
    found = table.get(ident)
    if found is None:
        raise RefusedError(Refusal.NO_SESSION, f"no enclave or server {ident}")
    return found


def _given(table: dict[int, T], handle: object, kind: type[T]) -> T:
    if type(handle) is not kind or table.get(handle.ident) is not handle:
        raise RefusedError(Refusal.NO_SESSION, "no such enclave or server")
    return handle


def _uuid(reference: MemoryReference) -> UUID:
    octets = _read(reference, len(NIL_UUID.bytes))
    return UUID(bytes=octets)


def _name(reference: MemoryReference) -> bytes:
    """An enclave's name; the one byte that may be too many makes it malformed."""
    return reference.read(0, min(reference.capacity, 65))


def _parse(layout: Any, reference: MemoryReference) -> Any:
    data = _read(reference, layout.sizeof())
    try:
        return layout.parse(data)
    except ConstructError as e:
        raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, str(e)) from None


def _read(reference: MemoryReference, size: int) -> bytes:
    if reference.capacity != size:
        raise TeeError(Result.BAD_PARAMETERS, Origin.TEE, f"{reference.capacity} bytes where {size} belong")
    return reference.read()
