"""A guest that does next to nothing itself: its requests are packed and lie in its memory before they are measured."""

from __future__ import annotations

import os
import select
import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any
from uuid import UUID

from device.config import Config
from device.messages import CONFIG, REQUESTS
from device.params import RawParam, pack_raw
from device.requests import RESPONSE_HEADER_SIZE, pack_request, pack_response
from device.wire import ParamType, Queue, Request
from guest_driver.core import DRIVER_FEATURES
from guest_driver.vhost_user import VhostUserTransport
from tee.calls import Login
from tee.results import Origin
from virtio_tee.bench.peers import BenchError

DEPTH = 32
_ANSWER = 256
"""Bytes for one response."""
_TIMEOUT_MS = 20_000
_OK = {pack_response(origin=origin) for origin in (Origin.TEE, Origin.TRUSTED_APP)}

Packed = tuple[int, int]
"""A request in guest memory: address and size."""


class BareGuest:
    """Attaches to the backend at ``path``, with ``memory_bytes`` of guest memory. Raises OSError, PyvhostError."""

    def __init__(self, path: str, memory_bytes: int = 1 << 20) -> None:
        self.transport = VhostUserTransport(path, wanted=int(DRIVER_FEATURES), memory_bytes=memory_bytes)
        config = Config.unpack(self.transport.read_config(CONFIG.size))
        self._epoch = config.epoch
        queue = self.transport.frontend.queues[Queue.REQUEST]
        self._ring, self._kick, self._call = queue.ring, queue.kick_fd, queue.call_fd
        self._poll = select.poll()
        self._poll.register(self._call, select.POLLIN)
        answers = self.transport.allocate(_ANSWER * DEPTH)
        self._answers = answers.segments[0]
        self._answers_at = answers.ranges[0].address
        self._tag = 0

    def close(self) -> None:
        """Reset the device and leave."""
        self.transport.close()

    def vanish(self) -> None:
        """Leave as a VMM that was killed."""
        self.transport.frontend.close()
        self.transport.frontend.running = False
        self.transport.close()

    # -- setting up

    def open_context(self) -> int:
        """A new context."""
        return self._ident(self._do(self.request(Request.OPEN_CONTEXT, flags=0)))

    def open_session(self, context: int, uuid: UUID) -> int:
        """A new session."""
        client = {"client_uuid": bytes(16), "client_login": Login.PUBLIC}
        request = self.request(Request.OPEN_SESSION, context, b"", uuid=uuid.bytes, num_params=0, **client)
        return self._ident(self._do(request))

    def register(self, context: int, address: int, size: int) -> int:
        """A new region."""
        tail = address.to_bytes(8, "little") + size.to_bytes(8, "little")
        request = self.request(Request.REGISTER_MEMORY, context, tail, flags=0, num_ranges=1, size=size)
        return self._ident(self._do(request))

    def request(self, kind: Request, context: int = 0, tail: bytes = b"", **fields: Any) -> bytes:
        """A request with a tag of its own."""
        self._tag += 1
        body = REQUESTS[kind].body.codec.pack(**fields)
        return pack_request(kind, epoch=self._epoch, tag=self._tag, context=context, body=body, tail=tail)

    def invoke(self, context: int, session: int, func: int, *params: RawParam) -> bytes:
        """An Invoke request."""
        tail = pack_raw(params) if params else b""
        return self.request(Request.INVOKE, context, tail, session=session, func=func, num_params=len(params))

    def touching(self, context: int, session: int, func: int, region: int, size: int) -> bytes:
        """An Invoke request whose parameter is a region."""
        return self.invoke(context, session, func, (ParamType.MEMREF_INOUT, 0, size, region))

    def pack(self, requests: Sequence[bytes]) -> list[Packed]:
        """Put ``requests`` into guest memory."""
        memory = self.transport.allocate(sum(map(len, requests)))
        memory.write(0, b"".join(requests))
        packed: list[Packed] = []
        at = memory.ranges[0].address
        for request in requests:
            packed.append((at, len(request)))
            at += len(request)
        return packed

    def _do(self, request: bytes) -> bytes:
        memory = self.transport.allocate(len(request))
        memory.write(0, request)
        self.submit([(memory.ranges[0].address, len(request))])
        ((_, written),) = self._wait()
        self.transport.release(memory)
        return bytes(self._answers[:written])

    def _ident(self, response: bytes) -> int:
        self._check(response)
        return int.from_bytes(response[RESPONSE_HEADER_SIZE : RESPONSE_HEADER_SIZE + 4], "little")

    # -- measured

    def latencies(self, requests: Sequence[Packed], seconds: float) -> list[int]:
        """Nanoseconds of each request, one after the other, in turn, for ``seconds``."""
        samples: list[int] = []
        end = time.monotonic() + seconds
        for request in cycle(requests):
            start = time.perf_counter_ns()
            self.submit((request,))
            self._wait()
            samples.append(time.perf_counter_ns() - start)
            self._check(self._answers)
            if time.monotonic() > end:
                return samples
        raise BenchError("nothing to measure")

    def submit(self, requests: Sequence[Packed], first: int = 0) -> None:
        """Hand over requests, with one kick; their answers go to slot ``first`` of :data:`DEPTH`, and on."""
        for slot, request in enumerate(requests, first):
            self._ring.add([request], [(self._answers_at + slot * _ANSWER, _ANSWER)], slot)
        if self._ring.kick_needed():
            os.eventfd_write(self._kick, 1)

    def collect(self, count: int) -> None:
        """Wait until ``count`` requests have been answered well."""
        while count:
            done = self._wait()
            count -= len(done)
            for slot, _ in done:
                self._check(self._answers[slot * _ANSWER :])

    def _wait(self) -> list[tuple[int, int]]:
        while True:
            done = self._ring.poll()
            if done:
                return done
            if self._ring.enable_notifications():
                continue
            if not self._poll.poll(_TIMEOUT_MS):
                raise BenchError(f"no answer from the backend in {_TIMEOUT_MS / 1000} s")
            os.eventfd_read(self._call)

    def _check(self, response: bytes | memoryview) -> None:
        if bytes(response[:RESPONSE_HEADER_SIZE]) not in _OK:
            raise BenchError(f"the backend refused a request: {bytes(response[:RESPONSE_HEADER_SIZE]).hex()}")


def busy(guests: Sequence[tuple[BareGuest, Sequence[Packed]]], depth: int, seconds: float) -> int:
    """Have each guest keep ``depth`` of its requests under way for ``seconds``; how many were answered."""
    count = 0
    sources = [(guest, cycle(requests)) for guest, requests in guests]
    end = time.monotonic() + seconds
    while not count or time.monotonic() < end:
        for guest, requests in sources:
            guest.submit(tuple(islice(requests, depth)))
        for guest, _ in sources:
            guest.collect(depth)
        count += depth * len(sources)
    return count
