"""Services and server enclaves for clients, by the services pseudo-TA: on every path, whatever the driver is.

>>> with Services(context) as services:      # doctest: +SKIP
...     loaded = services.load(package)
...     services.create_enclave(loaded.uuid, "clock")
...     clock = services.acquire("clock")
...     print(clock.call(1, 2).value)
"""

from __future__ import annotations

from types import TracebackType
from uuid import UUID

from guest_driver.client import (
    Answer,
    CancelToken,
    Context,
    Parameter,
    TempIn,
    TempInOut,
    TempOut,
    ValueIn,
    ValueInOut,
    ValueOut,
    Words,
)
from tee.calls import NIL_UUID, Login
from tee.results import Origin, Result, TeeError
from tee.services import (
    ENTRY_SIZE,
    NAME_SIZE,
    REGS,
    SERVICES_UUID,
    AttestSelector,
    CallFrame,
    CallReturn,
    Command,
    EnclaveFlag,
    Loaded,
    Service,
    TaskSelector,
)

#: Entries that are asked for at a time.
PAGE = 32

#: A statement with the largest signature that there is (RSA of 8192 bits).
STATEMENT_ROOM = 136 + 1024

__all__ = ["Enclave", "EnclaveServer", "Services"]


class Services:
    """A session with the pseudo-TA: what is created and acquired by it ends with it, at the latest. A context manager.

    All methods raise TeeError: what docs/specification.md says of the request, by the result of its status.
    """

    def __init__(self, context: Context, *, login: int = Login.PUBLIC, client_uuid: UUID = NIL_UUID) -> None:
        self._session = context.open_session(SERVICES_UUID, login=login, client_uuid=client_uuid)

    def __enter__(self) -> Services:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the session, with all that was created and acquired in it."""
        self._session.close()

    def available(self) -> list[Service]:
        """The services that this guest can use."""
        found: list[Service] = []
        while True:
            words, data = self._ask(Command.SERVICE_LIST, ValueInOut(len(found)), TempOut(PAGE * ENTRY_SIZE))
            assert isinstance(words, Words)
            assert isinstance(data, bytes)
            found += [Service.unpack(data[at : at + ENTRY_SIZE]) for at in range(0, len(data), ENTRY_SIZE)]
            if not data or len(found) >= words.a:
                return found

    def load(self, package: bytes) -> Loaded:
        """Install a service from its signed package, for this guest."""
        _, uuid, version = self._ask(Command.SERVICE_LOAD, TempIn(package), TempOut(16), ValueOut())
        assert isinstance(uuid, bytes)
        assert isinstance(version, Words)
        return Loaded(UUID(bytes=uuid), version.a)

    def remove(self, uuid: UUID) -> None:
        """Remove a service that this guest has installed."""
        self._ask(Command.SERVICE_REMOVE, TempIn(uuid.bytes))

    def task(self, uuid: UUID, func: int, *parameters: Parameter, cancel: CancelToken | None = None) -> list[Answer]:
        """Open a session with a service, invoke and close it, in one call. Up to three parameters."""
        selector = TaskSelector.build({"uuid": uuid.bytes, "func": func})
        return self._ask(Command.SERVICE_TASK, TempIn(selector), *parameters, cancel=cancel)[1:]

    def attest(self, uuid: UUID, nonce: bytes) -> bytes:
        """A signed statement about a service, for :func:`tee.attestation.check`."""
        selector = AttestSelector.build({"uuid": uuid.bytes, "nonce": nonce})
        _, statement = self._ask(Command.SERVICE_ATTEST, TempIn(selector), TempOut(STATEMENT_ROOM))
        assert isinstance(statement, bytes)
        return statement

    def create_enclave(self, uuid: UUID, name: str, *, shared: bool = False) -> Enclave:
        """A server enclave of a service. ``shared``: other guests may acquire it, too, where policy lets them."""
        flags = EnclaveFlag.SHARED if shared else 0
        words = self._ask(Command.ENCLAVE_CREATE, TempIn(uuid.bytes), _name(name), ValueInOut(flags))[2]
        assert isinstance(words, Words)
        return Enclave(self, words.a)

    def acquire(self, name: str) -> EnclaveServer:
        """The enclave of this name, to call it."""
        words = self._ask(Command.ENCLAVE_ACQUIRE, _name(name), ValueOut())[1]
        assert isinstance(words, Words)
        return EnclaveServer(self, words.a)

    def _ask(self, command: Command, *parameters: Parameter, cancel: CancelToken | None = None) -> list[Answer]:
        return self._session.invoke(command, *parameters, cancel=cancel)

    # For the other classes of this module.

    def destroy(self, ident: int) -> None:
        """ENCLAVE_DESTROY."""
        self._ask(Command.ENCLAVE_DESTROY, ValueIn(ident))

    def release(self, ident: int) -> None:
        """ENCLAVE_RELEASE."""
        self._ask(Command.ENCLAVE_RELEASE, ValueIn(ident))

    def call(
        self, ident: int, regs: tuple[int, ...], memory: Parameter | None, cancel: CancelToken | None
    ) -> CallReturn:
        """ENCLAVE_CALL."""
        frame = CallFrame.build({"regs": [*regs, *(0,) * (REGS - len(regs))]})
        parameters = [ValueIn(ident), TempInOut(frame), *([] if memory is None else [memory])]
        answer = self._ask(Command.ENCLAVE_CALL, *parameters, cancel=cancel)[1]
        assert isinstance(answer, bytes)
        return CallReturn(*CallFrame.parse(answer).regs[:3])


class Enclave:
    """A server enclave, for whoever created it."""

    def __init__(self, services: Services, ident: int) -> None:
        self._services = services
        self._ident = ident

    def destroy(self) -> None:
        """End it: its name is free, and calls in it end with TARGET_DEAD."""
        self._services.destroy(self._ident)


class EnclaveServer:
    """A server enclave that was acquired. Several threads may call it at once."""

    def __init__(self, services: Services, ident: int) -> None:
        self._services = services
        self._ident = ident

    def call(self, *regs: int, memory: Parameter | None = None, cancel: CancelToken | None = None) -> CallReturn:
        """Call it with up to 8 values of 64 bits, and memory (INOUT) that it reads and writes in place."""
        if len(regs) > REGS or not all(0 <= reg < 1 << 64 for reg in regs):
            raise TeeError(Result.BAD_PARAMETERS, Origin.API, f"a call has up to {REGS} values of 64 bits")
        return self._services.call(self._ident, regs, memory, cancel)

    def release(self) -> None:
        """Give it back; calls by it are cancelled."""
        self._services.release(self._ident)


def _name(name: str) -> TempIn:
    octets = name.encode()
    if not 0 < len(octets) <= NAME_SIZE or b"\0" in octets:
        raise TeeError(Result.BAD_FORMAT, Origin.API, f"a name has 1 to {NAME_SIZE} bytes without zeros")
    return TempIn(octets)
