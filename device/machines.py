"""The device's state machines, as tables: (state, event) → (next state, action).

An event that a table does not list in a state cannot happen there; :func:`step` raises, so that a hole shows at once.
The diagrams in ``docs/`` are generated from these tables.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Generic, TypeVar

S = TypeVar("S", bound=Enum)
E = TypeVar("E", bound=Enum)
A = TypeVar("A", bound=Enum)


@dataclass(frozen=True, slots=True)
class Machine(Generic[S, E, A]):
    """A named table with its initial and final states."""

    name: str
    initial: S
    final: frozenset[S]
    transitions: Mapping[tuple[S, E], tuple[S, A]]

    def step(self, state: S, event: E) -> tuple[S, A]:
        """The next state and what to do. Raises LookupError where the table has no such line."""
        try:
            return self.transitions[state, event]
        except KeyError:
            raise LookupError(f"{self.name}: {event.name} cannot happen in state {state.name}") from None


class Fast(Enum):
    """Members that are looked up in the tables for every request: hashed by identity, not by their names' text."""

    __hash__ = object.__hash__


class CallState(Fast):
    """A request in progress, as the device sees it."""

    RUNNING = "running in the TEE"
    CANCELLING = "running, cancel asked"
    HELD = "ended while its ring is stopped"
    ABANDONED = "running for nobody: the guest was reset"
    ENDED = "ended"


class CallEvent(Fast):
    """What can happen to a request in progress."""

    CANCEL = "the driver cancels it"
    DONE = "the TEE has ended it"
    DONE_STOPPED = "the TEE has ended it while the ring is stopped"
    RESUME = "the ring runs again"
    RESET = "the guest's state ends"


class CallAction(Enum):
    """What the device does about it."""

    NONE = "nothing"
    CANCEL = "cancel the TEE's call"
    RESPOND = "write the response"
    HOLD = "keep the response"
    DROP = "forget it, write nothing"


CALL: Machine[CallState, CallEvent, CallAction] = Machine(
    "Request",
    CallState.RUNNING,
    frozenset({CallState.ENDED}),
    {
        (CallState.RUNNING, CallEvent.CANCEL): (CallState.CANCELLING, CallAction.CANCEL),
        (CallState.RUNNING, CallEvent.DONE): (CallState.ENDED, CallAction.RESPOND),
        (CallState.RUNNING, CallEvent.DONE_STOPPED): (CallState.HELD, CallAction.HOLD),
        (CallState.RUNNING, CallEvent.RESUME): (CallState.RUNNING, CallAction.NONE),
        (CallState.RUNNING, CallEvent.RESET): (CallState.ABANDONED, CallAction.CANCEL),
        (CallState.CANCELLING, CallEvent.CANCEL): (CallState.CANCELLING, CallAction.NONE),
        (CallState.CANCELLING, CallEvent.DONE): (CallState.ENDED, CallAction.RESPOND),
        (CallState.CANCELLING, CallEvent.DONE_STOPPED): (CallState.HELD, CallAction.HOLD),
        (CallState.CANCELLING, CallEvent.RESUME): (CallState.CANCELLING, CallAction.NONE),
        (CallState.CANCELLING, CallEvent.RESET): (CallState.ABANDONED, CallAction.NONE),
        (CallState.HELD, CallEvent.CANCEL): (CallState.HELD, CallAction.NONE),
        (CallState.HELD, CallEvent.RESUME): (CallState.ENDED, CallAction.RESPOND),
        (CallState.HELD, CallEvent.RESET): (CallState.ENDED, CallAction.DROP),
        (CallState.ABANDONED, CallEvent.DONE): (CallState.ENDED, CallAction.DROP),
        (CallState.ABANDONED, CallEvent.DONE_STOPPED): (CallState.ENDED, CallAction.DROP),
    },
)


class RpcState(Fast):
    """An RPC on its way through the device."""

    QUEUED = "waits for an event buffer"
    SENT = "sent, not answered"
    WITHDRAWING = "withdrawn, the driver not told yet"
    WITHDRAWN = "withdrawn, the driver told"
    ENDED = "ended, its id free"


class RpcEvent(Fast):
    """What can happen to an RPC."""

    BUFFER = "an event buffer is there"
    REPLY = "the driver answers it"
    WITHDRAW = "the TEE withdraws it"
    DEADLINE = "its deadline has passed"
    ACK = "the driver acknowledges the withdrawal"
    RESET = "the guest's state ends"


class RpcAction(Enum):
    """What the device does about it."""

    NONE = "nothing"
    SEND = "send the RPC event"
    SEND_WITHDRAWN = "send the RPC_WITHDRAWN event"
    ANSWER = "give the TEE the driver's answer"
    FAIL = "give the TEE an error"
    QUEUE_WITHDRAWN = "queue an RPC_WITHDRAWN event"
    FAIL_AND_QUEUE_WITHDRAWN = "give the TEE an error, queue an RPC_WITHDRAWN event"
    REFUSE = "refuse the request with NOT_FOUND"
    FREE = "free the id"


RPC: Machine[RpcState, RpcEvent, RpcAction] = Machine(
    "RPC",
    RpcState.QUEUED,
    frozenset({RpcState.ENDED}),
    {
        (RpcState.QUEUED, RpcEvent.BUFFER): (RpcState.SENT, RpcAction.SEND),
        (RpcState.QUEUED, RpcEvent.REPLY): (RpcState.QUEUED, RpcAction.REFUSE),
        (RpcState.QUEUED, RpcEvent.WITHDRAW): (RpcState.ENDED, RpcAction.FREE),
        (RpcState.QUEUED, RpcEvent.DEADLINE): (RpcState.ENDED, RpcAction.FAIL),
        (RpcState.QUEUED, RpcEvent.ACK): (RpcState.QUEUED, RpcAction.REFUSE),
        (RpcState.QUEUED, RpcEvent.RESET): (RpcState.ENDED, RpcAction.FAIL),
        (RpcState.SENT, RpcEvent.REPLY): (RpcState.ENDED, RpcAction.ANSWER),
        (RpcState.SENT, RpcEvent.WITHDRAW): (RpcState.WITHDRAWING, RpcAction.QUEUE_WITHDRAWN),
        (RpcState.SENT, RpcEvent.DEADLINE): (RpcState.WITHDRAWING, RpcAction.FAIL_AND_QUEUE_WITHDRAWN),
        (RpcState.SENT, RpcEvent.ACK): (RpcState.SENT, RpcAction.REFUSE),
        (RpcState.SENT, RpcEvent.RESET): (RpcState.ENDED, RpcAction.FAIL),
        (RpcState.WITHDRAWING, RpcEvent.BUFFER): (RpcState.WITHDRAWN, RpcAction.SEND_WITHDRAWN),
        (RpcState.WITHDRAWING, RpcEvent.REPLY): (RpcState.WITHDRAWING, RpcAction.REFUSE),
        (RpcState.WITHDRAWING, RpcEvent.ACK): (RpcState.WITHDRAWING, RpcAction.REFUSE),
        (RpcState.WITHDRAWING, RpcEvent.RESET): (RpcState.ENDED, RpcAction.FREE),
        (RpcState.WITHDRAWN, RpcEvent.REPLY): (RpcState.WITHDRAWN, RpcAction.REFUSE),
        (RpcState.WITHDRAWN, RpcEvent.ACK): (RpcState.ENDED, RpcAction.FREE),
        (RpcState.WITHDRAWN, RpcEvent.RESET): (RpcState.ENDED, RpcAction.FREE),
    },
)


class LifeState(Fast):
    """The guest's state in the device, from one epoch to the next."""

    FRESH = "a new epoch; nothing opened"
    RUNNING = "rings run"
    PAUSED = "rings stopped, calls kept"
    DRAINING = "the epoch is over; the TEE still holds old memory"
    DRAINING_STARTED = "the same, and the rings run again"


class LifeEvent(Fast):
    """What ends, stops and starts it."""

    START = "a ring starts, as after a reset"
    RESUME = "a ring starts where it was stopped"
    STOP = "the last ring stops"
    RESET = "device reset, or the frontend has gone"
    DRAINED = "the TEE has let go of everything"


class LifeAction(Enum):
    """What the device does about it."""

    NONE = "nothing"
    SERVE = "look at the rings"
    END = "new epoch; end all contexts"


LIFE: Machine[LifeState, LifeEvent, LifeAction] = Machine(
    "Guest state",
    LifeState.FRESH,
    frozenset(),
    {
        (LifeState.FRESH, LifeEvent.START): (LifeState.RUNNING, LifeAction.SERVE),
        (LifeState.FRESH, LifeEvent.RESUME): (LifeState.RUNNING, LifeAction.SERVE),
        (LifeState.FRESH, LifeEvent.STOP): (LifeState.FRESH, LifeAction.NONE),
        (LifeState.FRESH, LifeEvent.RESET): (LifeState.FRESH, LifeAction.NONE),
        (LifeState.RUNNING, LifeEvent.START): (LifeState.RUNNING, LifeAction.SERVE),
        (LifeState.RUNNING, LifeEvent.RESUME): (LifeState.RUNNING, LifeAction.SERVE),
        (LifeState.RUNNING, LifeEvent.STOP): (LifeState.PAUSED, LifeAction.NONE),
        (LifeState.RUNNING, LifeEvent.RESET): (LifeState.DRAINING, LifeAction.END),
        (LifeState.PAUSED, LifeEvent.START): (LifeState.DRAINING_STARTED, LifeAction.END),
        (LifeState.PAUSED, LifeEvent.RESUME): (LifeState.RUNNING, LifeAction.SERVE),
        (LifeState.PAUSED, LifeEvent.STOP): (LifeState.PAUSED, LifeAction.NONE),
        (LifeState.PAUSED, LifeEvent.RESET): (LifeState.DRAINING, LifeAction.END),
        (LifeState.DRAINING, LifeEvent.START): (LifeState.DRAINING_STARTED, LifeAction.NONE),
        (LifeState.DRAINING, LifeEvent.RESUME): (LifeState.DRAINING_STARTED, LifeAction.NONE),
        (LifeState.DRAINING, LifeEvent.STOP): (LifeState.DRAINING, LifeAction.NONE),
        (LifeState.DRAINING, LifeEvent.RESET): (LifeState.DRAINING, LifeAction.NONE),
        (LifeState.DRAINING, LifeEvent.DRAINED): (LifeState.FRESH, LifeAction.NONE),
        (LifeState.DRAINING_STARTED, LifeEvent.START): (LifeState.DRAINING_STARTED, LifeAction.NONE),
        (LifeState.DRAINING_STARTED, LifeEvent.RESUME): (LifeState.DRAINING_STARTED, LifeAction.NONE),
        (LifeState.DRAINING_STARTED, LifeEvent.STOP): (LifeState.DRAINING, LifeAction.NONE),
        (LifeState.DRAINING_STARTED, LifeEvent.RESET): (LifeState.DRAINING, LifeAction.NONE),
        (LifeState.DRAINING_STARTED, LifeEvent.DRAINED): (LifeState.RUNNING, LifeAction.SERVE),
    },
)


MACHINES: dict[str, Machine[Enum, Enum, Enum]] = {m.name: m for m in (CALL, RPC, LIFE)}  # type: ignore[misc]
"""All tables by name, for the documentation and the tests."""
