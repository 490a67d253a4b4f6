"""Server enclaves and services that tests and demos of services use."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from uuid import UUID

from tee import package
from tee.calls import Client
from tee.results import Result, TeeError
from tee.soft.ta import CallReturn, MemoryReference, Parameters, TrustedApplication, bad_command

Act = Callable[["Server", Client, tuple[int, ...], MemoryReference | None], Awaitable[CallReturn]]


class Server(TrustedApplication):
    """Does what a test says: the act of register 0."""

    uuid = UUID(int=400)
    acts: dict[int, Act] = {}  # noqa: RUF012
    ended: list[str] = []  # noqa: RUF012

    async def enclave_call(self, client: Client, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
        return await Server.acts[regs[0]](self, client, regs, memory)

    async def destroy(self) -> None:
        Server.ended.append("destroy")


class Plain(TrustedApplication):
    """A service that is no server; its task adds, fails or waits."""

    uuid = UUID(int=401)
    description = "plain"
    version = 7
    seen: list[object] = []  # noqa: RUF012

    async def open_session(self, params: Parameters, client: Client) -> None:
        Plain.seen.append(client)

    async def invoke(self, session: object, command: int, params: Parameters) -> None:
        if command == 1:
            raise TeeError(0x1234)
        if command == 2:
            self.env.unmask_cancellation()
            await self.env.sleep(1000)
        elif command == 3:
            await self.env.sleep(5)
        elif command == 0:
            value = params[0]
            value.a += value.b  # type: ignore[union-attr]
        else:
            raise bad_command(command)

    async def close_session(self, session: object) -> None:
        Plain.seen.append("closed")


class Faulty(TrustedApplication):
    """An enclave that cannot be created."""

    uuid = UUID(int=402)

    async def create(self) -> None:
        raise TeeError(Result.STORAGE_NO_SPACE)

    async def enclave_call(self, client: Client, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
        return CallReturn()


class Wrong(Faulty):
    """One that panics when it is."""

    uuid = UUID(int=403)

    async def create(self) -> None:
        raise ZeroDivisionError


SERVERS: dict[UUID, type[TrustedApplication]] = {ta.uuid: ta for ta in (Server, Plain, Faulty, Wrong)}

SOURCE = b"""
from tee.soft.ta import CallReturn, Direction, TrustedApplication, UUID

class Loaded(TrustedApplication):
    uuid = UUID(int=500)
    description = "loaded"
    single_instance = multi_session = keep_alive = %(kept)s

    async def invoke(self, session, command, params):
        value = params.value(0, Direction.INOUT)
        value.a, value.b = self.env.version, value.b + 1

    async def enclave_call(self, client, regs, memory):
        return CallReturn(self.env.version)
"""
LOADED = UUID(int=500)


def vendor() -> package.KeyPair:
    """A signer of TAs."""
    return package.keygen(package.algorithm_named("ecdsa-p256-sha256"))


def packed(key: package.KeyPair, version: int = 1, *, kept: bool = False, more: bytes = b"") -> bytes:
    """A package of the service ``LOADED``."""
    return package.sign(SOURCE % {b"kept": str(kept).encode()} + more, LOADED, version, key.private)
