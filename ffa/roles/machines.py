"""The roles' state machines as tables: (state, event) → next state. What a table does not list is refused."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class State(Enum):
    """One of a state machine's states or events. Tables are looked up for each call: members are hashed by identity,
    which is what they are compared by."""

    __hash__ = object.__hash__


class Rx(State):
    """Who may touch an RX buffer."""

    EMPTY = "the partition manager"
    FULL = "the endpoint: it has not released what it got"
    ACQUIRED = "the hypervisor, which acquired it from the SPMC"


class RxEvent(State):
    """What happens to an RX buffer."""

    DELIVER = "the partition manager puts something in"
    ACQUIRE = "the hypervisor calls FFA_RX_ACQUIRE"
    RELEASE = "the endpoint calls FFA_RX_RELEASE, or waits for the next message"


RX: Mapping[tuple[Rx, RxEvent], Rx] = {
    (Rx.EMPTY, RxEvent.DELIVER): Rx.FULL,
    (Rx.EMPTY, RxEvent.ACQUIRE): Rx.ACQUIRED,
    (Rx.FULL, RxEvent.RELEASE): Rx.EMPTY,
    (Rx.ACQUIRED, RxEvent.RELEASE): Rx.EMPTY,
}


class Context(State):
    """An execution context (vCPU) of an endpoint, as its partition manager sees it."""

    WAITING = "waits for a message"
    RUNNING = "works on a request"
    BLOCKED = "has sent a direct request and waits for the answer"
    PREEMPTED = "was interrupted, or yielded, in the middle of a request"


class ContextEvent(State):
    """What happens to an execution context."""

    REQUEST = "gets a direct request, or is run"
    SEND = "sends a direct request"
    ANSWERED = "gets the answer to its own request"
    RESPOND = "answers, or waits for the next message"
    PREEMPT = "is interrupted, or yields"
    RUN = "is resumed by FFA_RUN"


CONTEXT: Mapping[tuple[Context, ContextEvent], Context] = {
    (Context.WAITING, ContextEvent.REQUEST): Context.RUNNING,
    (Context.RUNNING, ContextEvent.SEND): Context.BLOCKED,
    (Context.WAITING, ContextEvent.SEND): Context.BLOCKED,
    (Context.BLOCKED, ContextEvent.ANSWERED): Context.RUNNING,
    (Context.RUNNING, ContextEvent.RESPOND): Context.WAITING,
    (Context.RUNNING, ContextEvent.PREEMPT): Context.PREEMPTED,
    (Context.PREEMPTED, ContextEvent.RUN): Context.RUNNING,
}


class Borrower(State):
    """A receiver of a memory transaction."""

    INVITED = "may retrieve"
    RETRIEVING = "has access, and has not yet read all fragments of the answer"
    HOLDING = "has access"


class BorrowerEvent(State):
    """What a receiver does."""

    RETRIEVE = "retrieves; the answer fits its RX buffer"
    RETRIEVE_PART = "retrieves; the answer comes in fragments"
    LAST_FRAGMENT = "reads the last fragment"
    RELINQUISH = "relinquishes"


BORROWER: Mapping[tuple[Borrower, BorrowerEvent], Borrower] = {
    (Borrower.INVITED, BorrowerEvent.RETRIEVE): Borrower.HOLDING,
    (Borrower.INVITED, BorrowerEvent.RETRIEVE_PART): Borrower.RETRIEVING,
    (Borrower.RETRIEVING, BorrowerEvent.LAST_FRAGMENT): Borrower.HOLDING,
    (Borrower.HOLDING, BorrowerEvent.RELINQUISH): Borrower.INVITED,
}
