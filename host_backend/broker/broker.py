"""The broker: RPCs of a TEE that does not say whose they are go to guests, or to the host's own supplicant.

The TEE's device is served by threads (:class:`~tee.io.linux_supplicant.LinuxSupplicant`), which call
:meth:`Broker.serve` and wait there; guests are asked in trio's loop. A guest costs an RPC no more than ``guest_s``, all
guests together no more than ``deadline_s``.
"""

from __future__ import annotations

import logging
import socket
import threading
from collections.abc import Awaitable, Callable, Hashable, Mapping
from contextlib import suppress
from dataclasses import dataclass

import trio

from host_backend.broker.connection import Connection
from host_backend.broker.flights import Flight, Flights
from host_backend.broker.handles import Handles, Holder, SocketOperation, opened, operation, with_handle
from host_backend.broker.params import from_wire
from host_backend.broker.routes import ROUTES, Choice, Route, Sole, TaPairs, couriers, ta_asked_for
from host_backend.trace import Recorder
from tee.courier import CourierError
from tee.io.services.base import Allocator
from tee.io.supplicant import RpcServer
from tee.memory import Memory
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply, describe_command

log = logging.getLogger(__name__)

HOST = "host"


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator has chosen. Times in seconds. ``fs_vm`` "": the host's store."""

    guest_s: float = 3.0
    deadline_s: float = 10.0
    sole: Sole = Sole.GUEST
    fs_vm: str = ""


class _EndedError(Exception):
    """The broker ends."""


class Broker:
    """See the module. ``host`` answers what no guest does."""

    def __init__(self, host: RpcServer, policy: Policy, *, recorder: Recorder | None = None) -> None:
        self._host = host
        self._policy = policy
        self._recorder = recorder if recorder is not None else Recorder()
        self._flights = Flights()
        self._pairs = TaPairs()
        self._handles = Handles()
        self._connections: dict[Hashable, Connection] = {}
        self._token: trio.lowlevel.TrioToken | None = None
        self._locks: dict[int, threading.Lock] = {command: threading.Lock() for command in RpcCommand}
        """The supplicant serves one of each at a time; sockets look after themselves."""
        self._other = threading.Lock()

    # -- the TEE's side, on threads

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        if rpc.command not in ROUTES:
            return self._by_host(rpc, allocator)
        token = self._token
        if token is None:
            return RpcReply(Result.COMMUNICATION)
        try:
            reply = trio.from_thread.run(self._route, rpc, trio_token=token)
            if reply is not None:
                return reply
            reply = self._by_host(rpc, allocator)
            return trio.from_thread.run(self._from_host, rpc, reply, trio_token=token)
        except (trio.RunFinishedError, trio.Cancelled):
            return RpcReply(Result.COMMUNICATION)

    def forget(self, memory: Memory) -> None:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        with self._locks[RpcCommand.SHM_ALLOC]:
            self._host.forget(memory)

    def close(self) -> None:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        self._host.close()

    def _by_host(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        if rpc.command == RpcCommand.SOCKET:
            return self._host.serve(rpc, allocator)
        shared = rpc.command in (RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE)
        lock = self._locks[RpcCommand.SHM_ALLOC] if shared else self._locks.get(rpc.command, self._other)
        with lock:
            return self._host.serve(rpc, allocator)

    # -- routing

    async def _route(self, rpc: Rpc) -> RpcReply | None:
        """The answer of a guest, or None: the host is to answer."""
        routes: Mapping[Route, Callable[[Rpc], Awaitable[RpcReply | None]]] = {
            Route.COURIERS: self._load_ta,
            Route.SOLE: self._sole,
            Route.STORE: self._store,
        }
        for connection in list(self._connections.values()):
            connection.read()  # they tell of a call before it enters the TEE
        with trio.move_on_after(self._policy.deadline_s), suppress(_EndedError):
            return await routes[ROUTES[rpc.command]](rpc)
        why = "no guest has answered in time" if self._token is not None else "the broker ends"
        self._refused(rpc, why, Result.COMMUNICATION)
        return RpcReply(Result.COMMUNICATION)

    async def _from_host(self, rpc: Rpc, reply: RpcReply) -> RpcReply:
        """The host has answered: what is to be remembered of it."""
        await trio.lowlevel.checkpoint()
        self._recorder.rpc_ended(HOST, rpc, rpc.command, "host", reply.code)
        if rpc.command == RpcCommand.LOAD_TA:
            asked = ta_asked_for(rpc.params)
            if asked is not None and not asked[1] and reply.code in (Result.SUCCESS, Result.SHORT_BUFFER):
                self._pairs.said(asked[0], None)
        if rpc.command == RpcCommand.SOCKET and reply.code == Result.SUCCESS:
            return self._numbered(None, rpc, reply)
        return reply

    async def _load_ta(self, rpc: Rpc) -> RpcReply | None:
        asked = ta_asked_for(rpc.params)
        if asked is None:
            self._refused(rpc, "it makes no sense", Result.BAD_PARAMETERS)
            return RpcReply(Result.BAD_PARAMETERS)
        uuid, wants_bytes = asked
        told = self._pairs.take(uuid) if wants_bytes else (False, None)
        for choice in list(couriers(self._flights, uuid, told)):
            if choice.flight is None:
                self._recorder.rpc(HOST, rpc, rpc.command, f"host: {choice.reason}")
                return None
            reply = await self._ask(choice, rpc)
            if reply is not None and reply.code in (Result.SUCCESS, Result.SHORT_BUFFER):
                if not wants_bytes:
                    self._pairs.said(uuid, choice.flight.guest)
                return reply
        return None

    async def _store(self, rpc: Rpc) -> RpcReply | None:
        vm = self._policy.fs_vm
        if not vm:
            self._recorder.rpc(HOST, rpc, rpc.command, "host: one TEE has one store")
            return None
        for flight in self._flights.of_each_guest():
            if self._connections[flight.backend].vm == vm:
                reply = await self._ask(Choice(flight, "it has the TEE's store, as configured"), rpc)
                return reply if reply is not None else RpcReply(Result.COMMUNICATION)
        self._refused(rpc, f"VM {vm}, which has the TEE's store, has no call under way", Result.COMMUNICATION)
        return RpcReply(Result.COMMUNICATION)

    async def _sole(self, rpc: Rpc) -> RpcReply | None:
        if rpc.command == RpcCommand.SOCKET:
            asked = operation(rpc.params)
            if asked is None:
                self._refused(rpc, "it makes no sense", Result.BAD_PARAMETERS)
                return RpcReply(Result.BAD_PARAMETERS)
            if asked[0] != SocketOperation.OPEN:
                return await self._by_holder(rpc, *asked)
        if self._policy.sole is Sole.HOST:
            self._recorder.rpc(HOST, rpc, rpc.command, "host: as configured")
            return None
        flight = self._flights.sole()
        if self._policy.sole is Sole.NOBODY or flight is None:
            self._refused(rpc, "it cannot be told whose it is", Result.NOT_SUPPORTED)
            return RpcReply(Result.NOT_SUPPORTED)
        reply = await self._ask(Choice(flight, "all calls under way are its"), rpc)
        if reply is None:
            return RpcReply(Result.COMMUNICATION)
        if rpc.command == RpcCommand.SOCKET and reply.code == Result.SUCCESS:
            return self._numbered(flight.guest, rpc, reply)
        return reply

    async def _by_holder(self, rpc: Rpc, what: int, instance: int, number: int) -> RpcReply | None:
        """A SOCKET request other than OPEN: whoever has given the handle."""
        if what == SocketOperation.CLOSE_ALL:
            guests = self._handles.of_instance(instance)
            for guest in guests - {None}:
                await self._of_guest(guest, rpc, "it has given sockets to that TA")
            if None in guests:
                self._recorder.rpc(HOST, rpc, rpc.command, "host: it has given sockets to that TA")
                return None
            if not guests:
                self._refused(rpc, "there are none", Result.SUCCESS)
            return RpcReply(Result.SUCCESS, list(rpc.params))
        holder = self._handles.find(number, instance)
        if holder is None:
            self._refused(rpc, "no such handle", Result.BAD_PARAMETERS)
            return RpcReply(Result.BAD_PARAMETERS)
        if what == SocketOperation.CLOSE:
            self._handles.remove(number)
        asked = Rpc(rpc.command, with_handle(rpc.params, holder.handle), rpc.call)
        if holder.guest is None:
            rpc.params = asked.params
            self._recorder.rpc(HOST, rpc, rpc.command, "host: it has given the handle")
            return None
        reply = await self._of_guest(holder.guest, asked, "it has given the handle")
        return reply if reply is not None else RpcReply(Result.COMMUNICATION)

    async def _of_guest(self, guest: Hashable, rpc: Rpc, why: str) -> RpcReply | None:
        """None: it has no call under way in which it could be asked, or does not answer."""
        for flight in self._flights.of_each_guest():
            if flight.guest == guest:
                return await self._ask(Choice(flight, why), rpc)
        self._refused(rpc, "the guest that has given the handle has no call under way", Result.COMMUNICATION)
        return None

    def _numbered(self, guest: tuple[Hashable, str] | None, rpc: Rpc, reply: RpcReply) -> RpcReply:
        """An answered SOCKET request: an OPEN's handle gets a number of ours."""
        asked = operation(rpc.params)
        if asked is None or asked[0] != SocketOperation.OPEN:
            return reply
        given = opened(reply.params)
        number = self._handles.add(Holder(guest, asked[1], given.a)) if given is not None else None
        if given is None or number is None:
            return RpcReply(Result.OUT_OF_MEMORY)
        given.a = number
        return reply

    async def _ask(self, choice: Choice, rpc: Rpc) -> RpcReply | None:
        """A guest's answer; None: it has none in time, or one that makes no sense."""
        flight = choice.flight
        assert flight is not None
        connection = self._connections[flight.backend]
        vm = _name(connection, flight)
        self._recorder.rpc(vm, rpc, rpc.command, f"guest: {choice.reason}")
        try:
            answer = await connection.ask(flight, rpc.command, rpc.params, self._policy.guest_s)
            if self._token is None:
                raise _EndedError
            if answer is None:
                self._recorder.rpc_ended(vm, rpc, rpc.command, "nobody: no answer in time", Result.COMMUNICATION)
                return None
            reply = RpcReply(answer.code, from_wire(rpc.params, answer))
        except (CourierError, ValueError) as error:
            self._recorder.rpc_ended(vm, rpc, rpc.command, f"nobody: {error}", Result.COMMUNICATION)
            connection.end(error)
            return None
        except BaseException:
            self._recorder.rpc_ended(vm, rpc, rpc.command, "nobody: no answer in time", Result.COMMUNICATION)
            raise
        self._recorder.rpc_ended(vm, rpc, rpc.command, "guest", reply.code)
        return reply

    def _refused(self, rpc: Rpc, why: str, code: int) -> None:
        log.info("%s is refused: %s", describe_command(rpc.command), why)
        self._recorder.rpc_refused("", rpc, rpc.command, why, code)

    # -- backends

    def begin(self) -> None:
        """Called in trio's loop, in which guests are asked from now on."""
        self._token = trio.lowlevel.current_trio_token()

    def end(self) -> None:
        """That loop ends: nobody is asked any more."""
        self._token = None

    def attach(self, vm: str, sock: socket.socket) -> Connection:
        """A new connection, by the socket of ``vm``."""
        connection = Connection(vm, sock, self._flights)
        self._connections[connection] = connection
        self._recorder.mark(vm, "backend attached")
        return connection

    def detach(self, connection: Connection) -> None:
        """It has ended."""
        if self._connections.pop(connection, None) is not None:
            self._handles.gone(connection)
            self._recorder.mark(connection.vm, "backend gone")

    @property
    def usage(self) -> dict[str, int]:
        """How many there are now: to see that nothing is left."""
        return {
            "backends": len(self._connections),
            "calls": len(self._flights),
            "ta pairs": len(self._pairs),
            "handles": len(self._handles),
        }


def _name(connection: Connection, flight: Flight) -> str:
    return f"{connection.vm}/{flight.vm}" if flight.vm and flight.vm != connection.vm else connection.vm
