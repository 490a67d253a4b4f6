"""Requests in any number of descriptors, over real rings."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import pytest

from device.messages import REQUESTS, RESPONSE_HEADER
from device.params import RawParam, pack_raw
from device.requests import pack_request, response_size
from device.wire import ParamType, Queue, Request, Status
from guest_driver.vhost_user import VhostUserTransport
from pyvhost.messages import Feature
from pyvhost.vring.api import Segment
from tests.guest_driver.live import Live, live
from tests.host_backend.bench import INLINE, PROBE

INLINE_INOUT, V_IN = ParamType.MEMREF_INOUT | INLINE, ParamType.VALUE_IN
XOR = 2


class Driver:
    """Puts requests into ring 2, in whatever pieces."""

    def __init__(self, device: Live, features: int) -> None:
        self.transport = VhostUserTransport(device.path, wanted=3 | features)
        assert self.transport.features & features == features
        self.memory = self.transport.allocate(1 << 16)
        self.base = self.memory.ranges[0].address
        self.queue = self.transport.queues[Queue.REQUEST]
        self.epoch = int.from_bytes(self.transport.read_config(128)[8:16], "little")
        self.tags = 0

    def ask(self, request: Request, cuts: Sequence[int] = (), *, context: int = 0, params: Sequence[RawParam] = (),
            inline: bytes = b"", **fields: object) -> bytes:  # fmt: skip
        """The response. ``cuts`` are where request and room are cut, counted from the request's start."""
        self.tags += 1
        kind = REQUESTS[request]
        data = pack_request(
            request,
            epoch=self.epoch,
            tag=self.tags,
            context=context,
            body=kind.body.codec.pack(**fields),
            tail=pack_raw(params),
        )
        data += inline
        room = response_size(kind, len(params), len(inline))
        edges = sorted({0, len(data), len(data) + room, *cuts})
        assert edges[-1] == len(data) + room
        readable: list[Segment] = []
        writable: list[Segment] = []
        places = []
        at = 0
        for start, end in pairwise(edges):
            at += 3  # no piece follows another
            piece = (self.base + at, end - start)
            if start < len(data):
                self.memory.write(at, data[start:end])
                readable.append(piece)
            else:
                self.memory.write(at, b"\xee" * piece[1])
                writable.append(piece)
                places.append((at, piece[1]))
            at += piece[1]
        self.queue.add(readable, writable, self.tags)
        self.transport.kick(Queue.REQUEST)
        deadline = time.monotonic() + 20
        while not (done := self.queue.poll()):
            assert time.monotonic() < deadline
            time.sleep(0)
        assert done == [(self.tags, room)]
        return b"".join(self.memory.read(*place) for place in places)


@pytest.fixture(params=[0, Feature.RING_PACKED], ids=["split", "packed"])
def driver(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Driver]:
    with live(tmp_path) as device:
        driver = Driver(device, int(request.param))
        yield driver
        driver.transport.close()


@pytest.mark.requirement("DEV-QUE-5")
def test_any_split(driver: Driver) -> None:
    """Up to 16 pieces come in an indirect table, more as descriptors of the ring."""
    context = int.from_bytes(driver.ask(Request.OPEN_CONTEXT, range(1, 64), flags=0)[16:20], "little")
    opening = {"uuid": PROBE.bytes, "client_uuid": bytes(16), "client_login": 0, "num_params": 0}
    session = int.from_bytes(driver.ask(Request.OPEN_SESSION, context=context, **opening)[16:20], "little")
    params = [(INLINE_INOUT, 0, 5, 0), (V_IN, 0xFF, 0, 0)]
    size, room = 32 + 16 + 64 + 8, 16 + 8 + 64 + 8
    dice = random.Random(1)
    whole = range(1, size + room)
    cuts = [[], *([at] for at in whole), *([at, at + 1] for at in whole[:-1])]
    cuts += [sorted(dice.sample(whole, dice.randrange(1, 100))) for _ in range(60)]
    for one in cuts:
        data = os.urandom(5)
        answer = driver.ask(
            Request.INVOKE, one, context=context, params=params, inline=data + b"...",
            session=session, func=XOR, num_params=2,
        )  # fmt: skip
        header = RESPONSE_HEADER.unpack(answer)
        assert (header.status, header.ret) == (Status.OK, 0), one
        assert answer[24:88] == pack_raw(params), one
        assert answer[88:] == bytes(byte ^ 0xFF for byte in data) + bytes(3), one
