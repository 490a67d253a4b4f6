"""Where backends attach to the broker: a Unix socket for each VM; whoever may connect to it speaks for that VM."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import trio

from host_backend.broker.broker import Broker
from host_backend.broker.connection import Connection
from pyvhost.io.sockets import Listener
from tee.courier import CourierError

log = logging.getLogger(__name__)

MAX_BACKENDS = 16
"""Attached at once by one socket."""

HELLO_S = 5.0
"""Seconds in which a new connection must say what it is."""

_RETRY_S = 0.5


async def serve(
    broker: Broker,
    listeners: Sequence[tuple[str, Listener]],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve backends, until cancelled; ``listeners`` each with the name of the VM whose backends come by it."""
    broker.begin()
    try:
        async with trio.open_nursery() as nursery:
            for vm, listener in listeners:
                nursery.start_soon(_listen, broker, vm, listener, nursery)
            task_status.started()
    finally:
        broker.end()


async def _listen(broker: Broker, vm: str, listener: Listener, nursery: trio.Nursery) -> None:
    attached: set[Connection] = set()
    while True:
        await trio.lowlevel.wait_readable(listener.socket)
        try:
            sock, _ = listener.socket.accept()
        except BlockingIOError:
            continue
        except OSError as error:  # no file descriptors
            log.warning("vm %s: a backend cannot attach: %s", vm, error)
            await trio.sleep(_RETRY_S)
            continue
        if len(attached) >= MAX_BACKENDS:
            log.warning("vm %s: more than %d backends; one is turned away", vm, MAX_BACKENDS)
            sock.close()
            continue
        connection = broker.attach(vm, sock)
        attached.add(connection)
        nursery.start_soon(_serve, broker, connection, attached)


async def _serve(broker: Broker, connection: Connection, attached: set[Connection]) -> None:
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_greet, connection)
            try:
                await connection.serve()
            except trio.Cancelled:
                broker.end()  # before whoever waits for this guest asks the next
                raise
            nursery.cancel_scope.cancel()
    finally:
        attached.discard(connection)
        broker.detach(connection)
        if isinstance(connection.why, CourierError):
            log.warning("vm %s: its backend is disconnected: %s", connection.vm, connection.why)


async def _greet(connection: Connection) -> None:
    with trio.move_on_after(HELLO_S):
        await connection.greeted.wait()
        await connection.greet()
        return
    connection.end(CourierError("it does not say what it is"))
