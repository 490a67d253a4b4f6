"""What OP-TEE's partition keeps of each VM: its memory, its sessions, and the calls that it is in."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from ffa.optee.msg import Message, MessageError, Wire
from tee.calls import Call, OpenContext, RegisterMemory, UnregisterMemory
from tee.memory import Memory
from tee.params import Param
from tee.results import Result
from tee.rpc import Rpc


@dataclass(frozen=True, slots=True)
class Limits:
    """How much a partition keeps; for one VM where nothing else is said."""

    threads: int = 64  #: yielding calls under way, of all VMs
    threads_per_vm: int = 16
    regions: int = 512  #: regions of memory that are retrieved
    sessions: int = 256
    notifications: int = 64  #: values that wait for DO_BOTTOM_HALF
    rpc_params: int = 4  #: of the RPC argument behind each message, as with OP-TEE; an OCALL's function is one of them


@dataclass(slots=True, eq=False)
class Shm:
    """A region that was retrieved. Its memory has all its pages."""

    handle: int
    owner: int  #: the VM that has shared it
    memory: Memory
    users: int = 0  #: calls and answers to RPCs that name it
    registering: RegisterMemory | None = None
    unregistering: UnregisterMemory | None = None

    @property
    def ready(self) -> bool:
        """Whether the TEE knows it."""
        return self.memory.handle is not None


@dataclass(slots=True, eq=False)
class Session:
    """A session that a VM has opened."""

    handle: object
    closing: bool = False


@dataclass(slots=True, eq=False)
class Ask:
    """An RPC on its way to the VM. One of the partition's own has no answer that anybody waits for."""

    rpc: Rpc
    own: list[Wire] | None = None  #: what an RPC of the partition says
    withdrawn: bool = False


@dataclass(slots=True, eq=False)
class Thread:
    """A yielding call: from CALL_WITH_ARG until it is answered with DONE."""

    ident: int  #: what the VM resumes it by
    guest: Guest
    shm: Shm  #: has the message, and the RPC argument behind it
    at: int  #: offset of the message
    rpc_at: int  #: offset of the RPC argument
    message: Message
    wires: list[Wire]  #: the TA's parameters as they came
    first: int = 0  #: number of the first of them
    params: list[Param] = field(default_factory=list)  #: what they mean
    call: Call | None = None
    held: list[Shm] = field(default_factory=list)  #: what it uses
    lent: list[Rpc] = field(default_factory=list)  #: its SHM_ALLOCs that were answered with memory
    then: Callable[[int], None] | None = None  #: goes on, or gives up with a code, when all that it uses is registered
    done: bool = False  #: the outcome stands in ``message``
    asks: deque[Ask] = field(default_factory=deque)  #: RPCs that wait
    asked: Ask | None = None  #: the RPC that the VM has
    taking: Ask | None = None  #: the RPC that it has answered with memory, which is being registered

    def end(self, code: int, origin: int, session: int = 0) -> None:
        """The outcome is there."""
        self.message.end(code, origin, session)
        self.call, self.done = None, True

    def hold(self, shm: Shm) -> None:
        """Until the thread's end, nobody may unregister it."""
        shm.users += 1
        self.held.append(shm)


@dataclass(slots=True, eq=False)
class Guest:
    """One VM."""

    vm: int
    limits: Limits
    name: str  #: as the TEE knows it
    context: object = None
    opening: OpenContext | None = None
    ended: bool = False
    shms: dict[int, Shm] = field(default_factory=dict)
    sessions: dict[int, Session] = field(default_factory=dict)
    opening_sessions: int = 0
    next_session: int = 1
    threads: dict[int, Thread] = field(default_factory=dict)
    lent: list[Shm] = field(default_factory=list)  #: in use by the TEE since they were the answer to a SHM_ALLOC
    notification: int | None = None  #: FF-A notification for DO_BOTTOM_HALF
    values: deque[int] = field(default_factory=deque)  #: that have been raised

    def session(self, ident: int) -> Session:
        """An open session. Raises MessageError(BAD_PARAMETERS)."""
        found = self.sessions.get(ident)
        if found is None or found.closing:
            raise MessageError(Result.BAD_PARAMETERS, f"no session {ident}")
        return found

    def new_session(self, handle: object) -> int:
        """The id of a session that was opened: 32 bits, not 0, not in use."""
        while self.next_session in self.sessions or not self.next_session:
            self.next_session = self.next_session + 1 & 0xFFFF_FFFF
        ident = self.next_session
        self.next_session = self.next_session + 1 & 0xFFFF_FFFF
        self.sessions[ident] = Session(handle)
        return ident

    def shm_of(self, memory: Memory) -> Shm:
        """The region of this memory. Raises MessageError(GENERIC): it is not the VM's."""
        found = self.shms.get(memory.ffa.handle) if memory.ffa is not None else None
        if found is None or found.memory is not memory:
            raise MessageError(Result.GENERIC, "the TEE names memory that is not the VM's")
        return found

    def ready(self, handle: int) -> Memory:
        """The memory of a region that the TEE knows. Raises MessageError: it does not, or soon will not."""
        found = self.shms.get(handle)
        if found is None or found.unregistering is not None or not found.ready:
            raise MessageError(Result.BAD_PARAMETERS, f"{handle:#x} is not registered")
        return found.memory

    def give_back(self, memory: Memory) -> None:
        """The TEE has no more use for memory that it was lent."""
        for shm in self.lent:
            if shm.memory is memory:
                self.lent.remove(shm)
                shm.users -= 1
                return
