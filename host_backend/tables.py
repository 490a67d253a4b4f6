"""What one epoch of a guest holds: contexts, sessions, regions and requests in progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from device.machines import CallState
from device.requests import ParsedRequest
from device.wire import Status
from host_backend.slots import Leased, Slot
from tee.calls import Call
from tee.driver import Done
from tee.memory import Memory

if TYPE_CHECKING:
    from host_backend.epoch import Epoch


@dataclass(slots=True, eq=False)
class ContextEntry:
    """A context. ``handle`` is the TEE's, None while it is being opened; ``closing`` once its end was asked for."""

    ident: int = 0
    handle: object = None
    closing: bool = False
    then: Callable[[], None] | None = None
    """What to do when its memory is no longer used, if that is waited for."""


@dataclass(slots=True, eq=False)
class SessionEntry:
    """A session. ``handle`` is the TEE's, None while it is being opened."""

    what: ClassVar[str] = "session"
    context: ContextEntry
    ident: int = 0
    handle: object = None
    closing: bool = False


@dataclass(slots=True, eq=False)
class EnclaveEntry(SessionEntry):
    """A server enclave, for the context that created it."""

    what: ClassVar[str] = "enclave"


@dataclass(slots=True, eq=False)
class ServerEntry(SessionEntry):
    """A server enclave, for a context that acquired it."""

    what: ClassVar[str] = "server"


@dataclass(slots=True, eq=False)
class RegionEntry:
    """A registered region. ``users`` counts requests and RPCs that use it; the registration outlives them."""

    context: ContextEntry
    memory: Memory
    lease: Leased | None
    ident: int = 0
    version: int = 0
    """Of the guest's memory, when the region was last seen to lie in it."""
    ready: bool = False
    users: int = 0
    unregister: Pending | None = None
    """The request to end the registration, once it has come."""

    @property
    def bytes(self) -> int:
        """Those that the host holds: none of memory that is named by an FF-A handle."""
        return self.memory.size if self.memory.ffa is None else 0

    def release(self) -> None:
        """Let go of the guest's memory."""
        self.memory.forget()
        if self.lease is not None:
            self.lease.release()
            self.lease = None


Finish = Callable[["Epoch", "Pending", Done], tuple[bytes, ...]]
"""What to do when the TEE is done: the parts of the response after its header."""


@dataclass(slots=True, eq=False)
class Pending:
    """A request in progress: the owner of its TEE call."""

    epoch: Epoch
    slot: Slot | None
    request: ParsedRequest
    context: ContextEntry
    finish: Finish
    call: Call | None = None
    at_tee: bool = False
    """The call was given to the TEE, whose Done is to come."""
    session: SessionEntry | None = None
    regions: list[RegionEntry] = field(default_factory=list)
    """Regions that its parameters use."""
    held: list[RegionEntry] = field(default_factory=list)
    """Regions that the guest gave for its RPCs and that the TEE has not given back."""
    state: CallState = CallState.RUNNING
    status: Status = Status.OK
    """Another one where what the TEE says means that the request is refused."""
    response: tuple[bytes, ...] = ()
    """Kept while the ring is stopped."""
