"""The state machines of the software TEE, as tables: (state, event) → (new state, action).

An action is the name of the method that carries it out (empty: none). What is not in a table does not happen: the
owner of the machine ignores or refuses that event and the state stays.
"""

from __future__ import annotations

from enum import IntEnum


class CallState(IntEnum):
    """Where the coroutine that serves a call stands."""

    WAITING = 0  #: for its instance or for a thread
    READY = 1  #: will run at its turn
    RUNNING = 2
    SLEEPING = 3
    IN_RPC = 4  #: an RPC is out
    ENDED = 5
    PARKED = 6  #: for another call to leave the instance that it wants to enter, or a lock


class CallEvent(IntEnum):
    """What can happen to it. INTERRUPT is a cancel that may reach the call: not masked, or its context is closing."""

    ADMIT = 0
    RESUME = 1
    YIELD = 2
    SLEEP = 3
    CALL_OUT = 4
    TIMER = 5
    ANSWER = 6
    INTERRUPT = 7
    ABANDON = 8  #: its instance died before it could run
    RETURN = 9
    PARK = 10
    WAKE = 11


CALL: dict[tuple[CallState, CallEvent], tuple[CallState, str]] = {
    (CallState.WAITING, CallEvent.ADMIT): (CallState.READY, "queue"),
    (CallState.WAITING, CallEvent.INTERRUPT): (CallState.ENDED, "drop_cancelled"),
    (CallState.WAITING, CallEvent.ABANDON): (CallState.ENDED, "drop"),
    (CallState.READY, CallEvent.RESUME): (CallState.RUNNING, "step"),
    (CallState.RUNNING, CallEvent.YIELD): (CallState.READY, "queue"),
    (CallState.RUNNING, CallEvent.SLEEP): (CallState.SLEEPING, "arm_timer"),
    (CallState.RUNNING, CallEvent.CALL_OUT): (CallState.IN_RPC, "announce"),
    (CallState.RUNNING, CallEvent.RETURN): (CallState.ENDED, "end"),
    (CallState.SLEEPING, CallEvent.TIMER): (CallState.READY, "queue"),
    (CallState.SLEEPING, CallEvent.INTERRUPT): (CallState.READY, "queue"),
    (CallState.IN_RPC, CallEvent.ANSWER): (CallState.READY, "deliver"),
    (CallState.IN_RPC, CallEvent.INTERRUPT): (CallState.READY, "withdraw"),
    (CallState.IN_RPC, CallEvent.TIMER): (CallState.READY, "withdraw_late"),
    (CallState.RUNNING, CallEvent.PARK): (CallState.PARKED, "park"),
    (CallState.PARKED, CallEvent.WAKE): (CallState.READY, "deliver"),
    (CallState.PARKED, CallEvent.INTERRUPT): (CallState.READY, "queue"),
}


class SessionState(IntEnum):
    """Where a session stands."""

    OPENING = 0
    OPEN = 1
    CLOSING = 2
    CLOSED = 3
    DEAD = 4  #: its instance panicked; the client has still to close it


class SessionEvent(IntEnum):
    """What can happen to a session."""

    OPENED = 0
    FAILED = 1
    INVOKE = 2
    CLOSE = 3
    CLOSED = 4
    PANIC = 5


SESSION: dict[tuple[SessionState, SessionEvent], tuple[SessionState, str]] = {
    (SessionState.OPENING, SessionEvent.OPENED): (SessionState.OPEN, ""),
    (SessionState.OPENING, SessionEvent.FAILED): (SessionState.CLOSED, "forget_session"),
    (SessionState.OPEN, SessionEvent.INVOKE): (SessionState.OPEN, ""),
    (SessionState.OPEN, SessionEvent.CLOSE): (SessionState.CLOSING, "close_by_ta"),
    (SessionState.OPEN, SessionEvent.PANIC): (SessionState.DEAD, ""),
    (SessionState.CLOSING, SessionEvent.CLOSED): (SessionState.CLOSED, "forget_session"),
    (SessionState.DEAD, SessionEvent.INVOKE): (SessionState.DEAD, "refuse_dead"),
    (SessionState.DEAD, SessionEvent.CLOSE): (SessionState.CLOSED, "close_dead"),
}


class InstanceState(IntEnum):
    """Where an instance of a TA stands."""

    CREATING = 0  #: ``create`` has not ended well yet
    ALIVE = 1
    DESTROYING = 2  #: the last session is gone; ``destroy`` runs
    GONE = 3
    DEAD = 4  #: panicked


class InstanceEvent(IntEnum):
    """What can happen to an instance."""

    CREATED = 0
    FAILED = 1
    EMPTY = 2
    DESTROYED = 3
    PANIC = 4


INSTANCE: dict[tuple[InstanceState, InstanceEvent], tuple[InstanceState, str]] = {
    (InstanceState.CREATING, InstanceEvent.CREATED): (InstanceState.ALIVE, ""),
    (InstanceState.CREATING, InstanceEvent.FAILED): (InstanceState.GONE, "forget_instance"),
    (InstanceState.CREATING, InstanceEvent.PANIC): (InstanceState.DEAD, "bury_instance"),
    (InstanceState.ALIVE, InstanceEvent.EMPTY): (InstanceState.DESTROYING, ""),
    (InstanceState.ALIVE, InstanceEvent.PANIC): (InstanceState.DEAD, "bury_instance"),
    (InstanceState.DESTROYING, InstanceEvent.DESTROYED): (InstanceState.GONE, "forget_instance"),
    (InstanceState.DESTROYING, InstanceEvent.PANIC): (InstanceState.DEAD, "bury_instance"),
}


class ContextState(IntEnum):
    """Where a context stands."""

    OPEN = 0
    ENDING_CALLS = 1
    CLOSING_SESSIONS = 2
    FREEING_MEMORY = 3
    CLOSED = 4


class ContextEvent(IntEnum):
    """What can happen to a context."""

    CLOSE = 0
    NO_CALLS = 1
    NO_SESSIONS = 2
    NO_USERS = 3


CONTEXT: dict[tuple[ContextState, ContextEvent], tuple[ContextState, str]] = {
    (ContextState.OPEN, ContextEvent.CLOSE): (ContextState.ENDING_CALLS, "interrupt_calls"),
    (ContextState.ENDING_CALLS, ContextEvent.NO_CALLS): (ContextState.CLOSING_SESSIONS, "close_sessions"),
    (ContextState.CLOSING_SESSIONS, ContextEvent.NO_SESSIONS): (ContextState.FREEING_MEMORY, "end_registrations"),
    (ContextState.FREEING_MEMORY, ContextEvent.NO_USERS): (ContextState.CLOSED, "context_closed"),
}


class EnclaveState(IntEnum):
    """Where a server enclave stands."""

    CREATING = 0  #: its name is taken; nobody finds it yet
    OPEN = 1
    DEAD = 2  #: it panicked; its creator has still to destroy it
    ENDING = 3  #: its name is free; calls in it end
    GONE = 4


class EnclaveEvent(IntEnum):
    """What can happen to it."""

    CREATED = 0
    FAILED = 1
    PANIC = 2
    DESTROY = 3
    EMPTY = 4


ENCLAVE: dict[tuple[EnclaveState, EnclaveEvent], tuple[EnclaveState, str]] = {
    (EnclaveState.CREATING, EnclaveEvent.CREATED): (EnclaveState.OPEN, ""),
    (EnclaveState.CREATING, EnclaveEvent.FAILED): (EnclaveState.GONE, "free_name"),
    (EnclaveState.OPEN, EnclaveEvent.PANIC): (EnclaveState.DEAD, "end_calls"),
    (EnclaveState.OPEN, EnclaveEvent.DESTROY): (EnclaveState.ENDING, "free_name_and_end_calls"),
    (EnclaveState.DEAD, EnclaveEvent.DESTROY): (EnclaveState.ENDING, "free_name_and_end_calls"),
    (EnclaveState.ENDING, EnclaveEvent.EMPTY): (EnclaveState.GONE, ""),
}
