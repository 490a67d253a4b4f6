"""One TEE, many guests: events of the TEE go to the guest whose call caused them, RPCs to whoever is to answer them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import Protocol

from device.wire import RPC_SERVERS, RpcServer
from host_backend.epoch import Epoch, deliver
from host_backend.tables import Pending
from host_backend.trace import Recorder
from tee.driver import Done, Event, Notification, Placed, RpcWithdrawn, TeeDriver
from tee.results import Result
from tee.rpc import Rpc, RpcReply, describe_command

log = logging.getLogger(__name__)

_TURN_S = 0.002
"""Seconds in one turn of the loop in which requests are served while they are taken; then others have their turn."""


class Route(Enum):
    """Who answers an RPC."""

    GUEST = "the calling guest"
    REFUSED = "nobody: refused to guests"


_IN_THE_GUEST = frozenset({RpcServer.SUPPLICANT, RpcServer.CLIENT_OR_SUPPLICANT, RpcServer.DRIVER, RpcServer.CLIENT})

ROUTES: dict[int, Route] = {
    command: Route.GUEST if server in _IN_THE_GUEST else Route.REFUSED for command, (server, _) in RPC_SERVERS.items()
}
"""Command → route, for a TEE that names the call behind an RPC. Commands that are not here are refused."""


class Flushed(Protocol):
    """A guest, as the router sees it."""

    def flush(self) -> None:
        """Tell the guest's driver of what was completed."""

    def fail(self, why: str) -> None:
        """End the guest's connection."""


class Router:
    """Sits between a TEE driver and the guests; all on the data-plane thread."""

    def __init__(self, tee: TeeDriver, clock: Callable[[], float]) -> None:
        self.tee = tee
        self.touched = False
        """Set by whoever starts something on the TEE outside of :meth:`run`, so that the loop calls it."""
        self.trace: Recorder | None = None
        self.busy = False
        """The TEE has more to do than is done in this turn of the loop: what is started now is for :meth:`run`."""
        self._left = _TURN_S
        self._clock = clock
        self._dirty: dict[Flushed, None] = {}
        self._asking: dict[Epoch, None] = {}
        """Epochs with RPCs under way."""
        tee.attach(self._on_event)

    def mark(self, guest: Flushed) -> None:
        """``guest`` has completed something that its driver must be told of."""
        self._dirty[guest] = None

    def serve(self) -> None:
        """Let the TEE begin what was just started; later, in :meth:`run`, where long work would hold up the caller."""
        if not self.busy:
            self.busy = self.tee.run() == 0

    def spend(self, seconds: float) -> None:
        """So long requests were served while they were taken."""
        self._left -= seconds
        if self._left < 0:
            self.busy = True

    def touch(self) -> None:
        """The TEE's file descriptor is readable: have :meth:`run` called."""
        self.touched = True

    def run(self) -> float | None:
        """Let the TEE work, give up late RPCs; the seconds until it is to be called again (see ``TeeDriver``)."""
        due = self.tee.run()
        self.busy = due == 0
        self._left = _TURN_S
        for epoch in list(self._asking):
            try:
                left = epoch.rpcs.expire()
            except Exception as e:
                left = None
                self._fail(epoch, _own_error("giving up late RPCs", e))
            if left is None:
                del self._asking[epoch]
                continue
            due = left if due is None else min(due, left)
        while self._dirty:
            guest = self._dirty.popitem()[0]
            try:
                guest.flush()
            except Exception as e:
                guest.fail(_own_error("telling a driver of what was completed", e))
        return due

    def _on_event(self, event: Event) -> None:
        try:
            if isinstance(event, Done):
                deliver(event)
            elif isinstance(event, Rpc):
                self._route(event)
            elif isinstance(event, Notification):
                self._notify(event)
            elif isinstance(event, Placed):
                self._placed(event)
            else:
                self._withdraw(event)
        except Exception as e:
            # We run inside the TEE, perhaps on another guest's turn: only the guest that it is about shall suffer.
            why = _own_error(f"serving {type(event).__name__}", e)
            if isinstance(event, Rpc):
                self.tee.answer(event, RpcReply(Result.COMMUNICATION))
            epoch = _epoch_of(event)
            if epoch is not None:
                self._fail(epoch, why, event if isinstance(event, Done) else None)

    def _fail(self, epoch: Epoch, why: str, done: Done | None = None) -> None:
        try:
            epoch.give_up(done)
        finally:
            if not epoch.ended:
                epoch.port.fail(why)

    def _notify(self, event: Notification) -> None:
        owner = event.owner
        if isinstance(owner, Pending) and not owner.epoch.ended:
            owner.epoch.rpcs.notify(event.value)

    def _placed(self, event: Placed) -> None:
        if self.trace is not None and isinstance(event.owner, Pending):
            self.trace.placed(event.owner.epoch.vm, event.size, event.why)

    def _route(self, rpc: Rpc) -> None:
        owner = rpc.call.owner if rpc.call is not None else None
        if ROUTES.get(rpc.command, Route.REFUSED) is Route.REFUSED:
            log.info("%s is refused to guests", describe_command(rpc.command))
            self._refuse(rpc, "refused to guests", Result.NOT_SUPPORTED)
        elif isinstance(owner, Pending) and not owner.epoch.ended:
            self._asking[owner.epoch] = None
            owner.epoch.rpcs.send(rpc, owner)
        else:
            self._refuse(rpc, "nobody is left who could answer", Result.COMMUNICATION)

    def _refuse(self, rpc: Rpc, why: str, code: int) -> None:
        owner = rpc.call.owner if rpc.call is not None else None
        if self.trace is not None:
            vm = owner.epoch.vm if isinstance(owner, Pending) else ""
            self.trace.rpc_refused(vm, rpc, rpc.command, why, code)
        self.tee.answer(rpc, RpcReply(code))

    def _withdraw(self, event: RpcWithdrawn) -> None:
        owner = event.rpc.call.owner if event.rpc.call is not None else None
        if isinstance(owner, Pending):
            owner.epoch.rpcs.withdraw(event.rpc)


def _epoch_of(event: Event) -> Epoch | None:
    """Whose call the event is about."""
    if isinstance(event, Notification | Placed):
        return getattr(event.owner, "epoch", None)
    call = event.rpc.call if isinstance(event, RpcWithdrawn) else event.call
    return getattr(call.owner, "epoch", None) if call is not None else None


def _own_error(what: str, error: Exception) -> str:
    """Log an error of ours, while it is being handled; the reason to disconnect the guest that it is about."""
    log.exception("an error of the backend itself, in %s; its guest is disconnected: report this", what)
    return repr(error)
