"""What the software TEE keeps: contexts, sessions, instances and registrations. Data only; the driver moves it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from uuid import UUID

from tee.calls import Call
from tee.memory import Memory
from tee.soft.scheduler import Task
from tee.soft.states import ContextState, InstanceState, SessionState
from tee.soft.ta import Environment, TrustedApplication


@dataclass(slots=True, eq=False)
class Program:
    """The code of a TA: its class, and the version from its package."""

    uuid: UUID
    ta: type[TrustedApplication]
    version: int
    loaded: bool = False  #: it came in a package, and is here as long as its instances are
    digest: bytes = b""  #: of its package
    installed: bool = False  #: as a service: it belongs to one machine, and stays without instances
    retired: bool = False  #: it was replaced or removed: no instance outlives its sessions


@dataclass(slots=True, eq=False)
class Context:
    """A client's connection to ``tee`` from the machine ``vm``, and all that hangs under it."""

    tee: object
    vm: str
    owner: object = None  #: of the call that opened it
    state: ContextState = ContextState.OPEN
    tasks: set[Task] = field(default_factory=set)
    sessions: set[Session] = field(default_factory=set)
    registrations: set[Registration] = field(default_factory=set)
    closer: Call | None = None
    desk: Session | None = None  #: with the services pseudo-TA, for calls that are not made in a session


@dataclass(slots=True, eq=False)
class Instance:
    """A running TA, made for a client of the machine ``vm``.

    ``owner`` is the task or the visit that is in it or about to be. The others wait: in ``visits`` those that are
    inside another instance already and hold a thread there (they go first), in ``queue`` those that have not begun.
    ``opened`` has under it the sessions that this TA has opened with others.
    """

    program: Program
    env: Environment
    vm: str
    opened: Context
    state: InstanceState = InstanceState.CREATING
    ta: TrustedApplication | None = None
    owner: Task | Visit | None = None
    visits: deque[Visit] = field(default_factory=deque)
    queue: deque[Task] = field(default_factory=deque)
    sessions: set[Session] = field(default_factory=set)
    concurrent: bool = False  #: calls do not wait for each other in it: a pseudo-TA of the TEE's own, or an enclave


@dataclass(slots=True, eq=False)
class Visit:
    """A call from TA to TA: ``task``, which is inside another instance, enters ``instance`` too."""

    task: Task
    instance: Instance
    session: Session | None = None
    entered: bool = False
    masked: bool = True  #: how the caller's mask was, to be put back


@dataclass(slots=True, eq=False)
class Session:
    """A session; the object itself is what a client is given. ``data`` is what the TA made of it.

    ``context`` is the client's; for a session that a TA has opened, what its instance has ``opened``.
    """

    context: Context
    instance: Instance
    state: SessionState = SessionState.OPENING
    data: object = None
    closer: Task | None = None  #: waits for the other calls in it, where calls do not wait for each other


@dataclass(slots=True, eq=False)
class Registration:
    """A registered memory; the ``handle`` of that memory. ``users`` counts the calls that may touch it."""

    context: Context
    memory: Memory
    users: int = 0
    ending: bool = False
    unregister: Call | None = None
