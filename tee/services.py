"""Services and server enclaves: the calls for them, what they answer, and the layouts of the services pseudo-TA
(docs/specification.md, "SERVICES", "ATTESTATION", "ENCLAVES", "The services pseudo-TA").
"""

from __future__ import annotations

import uuid as uuid_module
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, IntEnum, IntFlag

from construct import Bytes, Const, Int32ul, Int64ul, Struct

from tee.calls import Call, Client
from tee.params import Param
from tee.results import Origin, Result, TeeError

SERVICES_UUID = uuid_module.UUID("e8177e22-d43b-58a8-a970-88447d8f38c5")
"""The pseudo-TA that offers services and enclaves to clients that know only GlobalPlatform's API."""

MAX_CHAIN = 8
"""Calls from enclave to enclave that may be nested under one ENCLAVE_CALL."""

NAME_SIZE = 64
"""Most bytes of an enclave's name."""

REGS = 8
"""Register values of a call to an enclave."""

NONCE_SIZE = 32


class Command(IntEnum):
    """The pseudo-TA's commands; they have the numbers of the device's requests."""

    SERVICE_LIST = 0x40
    SERVICE_LOAD = 0x41
    SERVICE_REMOVE = 0x42
    SERVICE_TASK = 0x43
    SERVICE_ATTEST = 0x44
    ENCLAVE_CREATE = 0x60
    ENCLAVE_DESTROY = 0x61
    ENCLAVE_ACQUIRE = 0x62
    ENCLAVE_RELEASE = 0x63
    ENCLAVE_CALL = 0x64


class ServiceFlag(IntFlag):
    """Flags of a service in a list."""

    BUILT_IN = 1 << 0
    LOADED = 1 << 1
    IN_USE = 1 << 2


class EnclaveFlag(IntFlag):
    """Flags of a new enclave."""

    SHARED = 1 << 0


# -- layouts

ServiceEntry = Struct(
    "uuid" / Bytes(16) * "UUID of the service",
    "version" / Int32ul * "its version",
    "api_level"
    / Int32ul
    * "API that it offers: major version in the upper, minor in the lower 16 bits; 0x00010001 is GP 1.1",
    "flags" / Int32ul * "bit 0 built in, bit 1 loaded by this guest, bit 2 in use",
    Const(bytes(4)) * "must be zero",
    "name" / Bytes(32) * "name in UTF-8, padded with zeros; may be empty",
)
"""What a list of services consists of."""

TaskSelector = Struct(
    "uuid" / Bytes(16) * "UUID of the service",
    "func" / Int32ul * "command",
    Const(bytes(4)) * "must be zero",
)
"""First parameter of the pseudo-TA's SERVICE_TASK."""

AttestSelector = Struct(
    "uuid" / Bytes(16) * "UUID of the service to attest",
    "nonce" / Bytes(32) * "fresh bytes of the verifier's",
)
"""First parameter of its SERVICE_ATTEST."""

CallFrame = Struct(
    "regs"
    / Int64ul[8]
    * "in: register values given to the callee; out: 0 value, 1 offset, 2 size of the return, others 0",
)
"""Second parameter of its ENCLAVE_CALL."""

ENTRY_SIZE: int = ServiceEntry.sizeof()


# -- refusals


class Refusal(Enum):
    """Why nothing was done, and the result code that says so; the device has a status for each."""

    MALFORMED = Result.BAD_FORMAT
    NO_SESSION = Result.BAD_PARAMETERS
    LIMIT = Result.OUT_OF_MEMORY
    NOT_FOUND = Result.ITEM_NOT_FOUND
    DENIED = Result.ACCESS_DENIED
    IN_USE = Result.BUSY


class RefusedError(TeeError):
    """Nothing was done. ``refusal`` says why."""

    def __init__(self, refusal: Refusal, why: str) -> None:
        super().__init__(refusal.value, Origin.TEE, why)
        self.refusal = refusal


# -- what is answered


@dataclass(frozen=True, slots=True)
class Service:
    """One service in a list."""

    uuid: uuid_module.UUID
    version: int
    api_level: int  #: major version in the upper, minor in the lower 16 bits
    flags: ServiceFlag
    name: str

    def pack(self) -> bytes:
        """As a ``ServiceEntry``."""
        name = self.name.encode()[:32].decode(errors="ignore").encode()
        return bytes(
            ServiceEntry.build(
                {
                    "uuid": self.uuid.bytes,
                    "version": self.version,
                    "api_level": self.api_level,
                    "flags": self.flags,
                    "name": name.ljust(32, b"\0"),
                }
            )
        )

    @classmethod
    def unpack(cls, data: bytes) -> Service:
        """From a ``ServiceEntry``. Raises construct.ConstructError."""
        entry = ServiceEntry.parse(data)
        name = entry.name.rstrip(b"\0").decode(errors="replace")
        return cls(
            uuid_module.UUID(bytes=entry.uuid), entry.version, entry.api_level, ServiceFlag(entry.flags & 7), name
        )


@dataclass(frozen=True, slots=True)
class ServiceList:
    """Some of the services, and how many there are."""

    total: int
    entries: Sequence[Service]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A service that was installed."""

    uuid: uuid_module.UUID
    version: int


@dataclass(frozen=True, slots=True)
class CallReturn:
    """What an enclave returns: a value of 64 bits, and which bytes of the caller's memory are the answer."""

    value: int = 0
    offset: int = 0
    size: int = 0


def check_name(name: bytes) -> str:
    """An enclave's name from its bytes, padded with zeros or not. Raises RefusedError(MALFORMED)."""
    text = name.rstrip(b"\0")
    if not 0 < len(text) <= NAME_SIZE or len(name) > NAME_SIZE or b"\0" in text:
        raise RefusedError(Refusal.MALFORMED, f"a name has 1 to {NAME_SIZE} bytes without zeros")
    try:
        return text.decode()
    except UnicodeDecodeError:
        raise RefusedError(Refusal.MALFORMED, "a name is valid UTF-8") from None


# -- calls; a driver need not know them (NOT_SUPPORTED then)


@dataclass(slots=True, eq=False, kw_only=True)
class ServiceCall(Call):
    """What all of them have in common. A Done whose ``value`` is a :class:`Refusal` says that nothing was done."""

    context: object
    params: list[Param] = field(default_factory=list)


@dataclass(slots=True, eq=False, kw_only=True)
class ListServices(ServiceCall):
    """Done gives a :class:`ServiceList` of ``max_entries`` at most, from the entry ``first`` on."""

    first: int = 0
    max_entries: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class LoadService(ServiceCall):
    """``params``: the signed package (IN). Done gives what is :class:`Loaded`."""


@dataclass(slots=True, eq=False, kw_only=True)
class RemoveService(ServiceCall):
    """Removes a service that the machine has installed."""

    uuid: uuid_module.UUID


@dataclass(slots=True, eq=False, kw_only=True)
class RunTask(ServiceCall):
    """Opens a session, invokes and closes it."""

    uuid: uuid_module.UUID
    func: int
    client: Client = field(default_factory=Client)


@dataclass(slots=True, eq=False, kw_only=True)
class AttestService(ServiceCall):
    """``params``: memory (OUT) for the statement."""

    uuid: uuid_module.UUID
    nonce: bytes


@dataclass(slots=True, eq=False, kw_only=True)
class CreateEnclave(ServiceCall):
    """Done gives the enclave, for its creator."""

    uuid: uuid_module.UUID
    name: bytes
    flags: int = 0


@dataclass(slots=True, eq=False, kw_only=True)
class DestroyEnclave(ServiceCall):
    """Done when nobody is in it any more."""

    enclave: object


@dataclass(slots=True, eq=False, kw_only=True)
class AcquireEnclave(ServiceCall):
    """Done gives the server."""

    name: bytes


@dataclass(slots=True, eq=False, kw_only=True)
class ReleaseEnclave(ServiceCall):
    """Done when the calls by this server have ended."""

    server: object


@dataclass(slots=True, eq=False, kw_only=True)
class CallEnclave(ServiceCall):
    """``params``: none, or the memory (INOUT). Done gives a :class:`CallReturn`."""

    server: object
    regs: Sequence[int] = (0,) * REGS
