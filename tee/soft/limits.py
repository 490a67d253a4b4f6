"""How much of everything there is in a software TEE."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SoftLimits:
    """Who goes beyond one of these is refused with OUT_OF_MEMORY, and nobody else notices."""

    instances: int = 32768  #: instances of TAs, of all machines together
    instances_per_vm: int = 16384  #: of which one machine's clients can have caused so many
    loaded: int = 16384  #: instances whose TA came in a package
    memory: int = 1 << 30  #: bytes that TAs have declared (``data_size``), of all instances together
    instance_memory: int = 16 << 20  #: the largest ``data_size`` of a TA
    objects: int = 1024  #: objects in the storage of one TA and machine
    object_size: int = 1 << 20  #: bytes of one object
    open_objects: int = 64  #: object handles of one instance
    services: int = 64  #: services that a machine has installed
    service_bytes: int = 16 << 20  #: bytes of their packages
    enclaves: int = 1024  #: server enclaves that a machine has created
    servers: int = 4096  #: times that a machine's clients have acquired one, and not released it
    depth: int = 8  #: TAs that call one another, beside the outermost

    def __post_init__(self) -> None:
        if min(getattr(self, name) for name in self.__slots__) < 0:
            raise ValueError("a limit is not negative")
