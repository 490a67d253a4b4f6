"""Serves a text over HTTP at ``/metrics``, on trio: for Prometheus, which asks every few seconds.

As much HTTP as that takes, and no more: one request a connection, bounded in size, number and time.
"""

from __future__ import annotations

import logging
import re
import socket
from collections.abc import Callable
from dataclasses import dataclass

import trio

from pyvhost.io.sockets import Listener

log = logging.getLogger(__name__)

MAX_REQUEST = 8192
MAX_CONNECTIONS = 16
TIMEOUT = 5.0

_ADDRESS = re.compile(r"(?:\[(?P<v6>[0-9a-fA-F:.%]+)\]|(?P<host>[^:\[\]]*)):(?P<port>\d{1,5})")
_REQUEST = re.compile(rb"(?P<method>[A-Z]+) (?P<path>[^ ?]+)(?:\?[^ ]*)? HTTP/1\.[01]\r?")


@dataclass(frozen=True, slots=True)
class Place:
    """Where to listen: a path, or an address and a port."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, text: str) -> Place:
        """``ADDRESS:PORT`` or ``unix:/PATH``. Raises ValueError."""
        kind, _, path = text.partition(":")
        if kind == "unix" and path.startswith("/"):
            return cls(path=path)
        found = _ADDRESS.fullmatch(text)
        if found is None or int(found["port"]) > 65535:
            raise ValueError(f"{text!r} is neither ADDRESS:PORT nor unix:/PATH")
        return cls(host=found["v6"] or found["host"], port=int(found["port"]))

    def __str__(self) -> str:
        return f"unix:{self.path}" if self.path else f"{self.host}:{self.port}"


def listen(place: Place) -> Listener:
    """A listening socket; close it. A path is for owner and group. Raises OSError that says where."""
    family = socket.AF_INET6 if ":" in place.host else socket.AF_INET
    try:
        if place.path:
            return Listener.at_path(place.path, mode=0o660)
        return Listener(socket.create_server((place.host, place.port), family=family), connected=False)
    except OSError as e:
        raise OSError(f"metrics at {place}: {e.strerror or e}") from None


async def export(listener: Listener, render: Callable[[], bytes]) -> None:
    """Serve what ``render`` gives, until cancelled."""
    limit = trio.CapacityLimiter(MAX_CONNECTIONS)

    async def answer(stream: trio.SocketStream) -> None:
        try:
            limit.acquire_on_behalf_of_nowait(stream)
        except trio.WouldBlock:
            return
        try:
            with trio.move_on_after(TIMEOUT):
                await stream.send_all(_response(await _request(stream), render))
        except trio.BrokenResourceError:
            pass
        except Exception:
            log.exception("metrics could not be told; requests of guests are served all the same: report this")
        finally:
            limit.release_on_behalf_of(stream)

    async with trio.open_nursery() as nursery:
        accepting = trio.SocketListener(trio.socket.from_stdlib_socket(listener.socket))
        await trio.serve_listeners(answer, [accepting], handler_nursery=nursery)


async def _request(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\r\n\r\n" not in data and len(data) < MAX_REQUEST:
        part = await stream.receive_some(MAX_REQUEST - len(data))
        if not part:
            break
        data += part
    return bytes(data)


def _response(request: bytes, render: Callable[[], bytes]) -> bytes:
    found = _REQUEST.fullmatch(request.partition(b"\n")[0])
    if found is None or b"\r\n\r\n" not in request:
        return _reply("400 Bad Request", b"this is no HTTP request\n")
    if found["method"] not in (b"GET", b"HEAD"):
        return _reply("405 Method Not Allowed", b"only GET\n", "Allow: GET, HEAD\r\n")
    if found["path"] != b"/metrics":
        return _reply("404 Not Found", b"metrics are at /metrics\n")
    reply = _reply("200 OK", render(), kind="text/plain; version=0.0.4; charset=utf-8")
    return reply if found["method"] == b"GET" else reply.partition(b"\r\n\r\n")[0] + b"\r\n\r\n"


def _reply(status: str, body: bytes, more: str = "", kind: str = "text/plain; charset=utf-8") -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + body
