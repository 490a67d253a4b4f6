"""A TEE device without vhost: rings of plain lists, memory of plain bytes, a clock that the test moves."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from uuid import UUID

from device.config import Limits
from device.machines import LifeState
from device.messages import EVENT_HEADER, EVENTS, REQUESTS, RESPONSE_HEADER
from device.params import PARAM_SIZE, RawParam, pack_raw, padded, unpack_raw
from device.requests import pack_request, response_size
from device.wire import Event, Feature, ParamType, Queue, Request, RpcTarget, Status
from host_backend.device import TeeDevice
from host_backend.router import Router
from host_backend.trace import Trace
from pyvhost.memory import GuestMemory
from pyvhost.testing import plain_memory
from pyvhost.vring.api import Chain
from tee.results import Result
from tee.rpc import RpcCommand
from tee.soft import SoftTee, examples
from tee.soft.ta import TrustedApplication
from virtio_tee.ffa_tee import FfaTee

PROBE = examples.UUIDS["probe"]
RAM = 0x10000
RAM_SIZE = 1 << 20
ALL = Feature.INLINE | Feature.RPC | Feature.NOTIFICATION
INLINE = 0x10000


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Response(NamedTuple):
    status: int
    flags: int
    ret: int
    origin: int
    rest: bytes

    def ident(self, at: int = 0) -> int:
        """A 32-bit word of the body."""
        return int.from_bytes(self.rest[4 * at : 4 * at + 4], "little")


@dataclass(eq=False)
class Sent:
    """A request that a test has sent."""

    data: bytes
    room: int
    tag: int
    kind: int
    writable: bytearray = field(default_factory=bytearray)
    written: int | None = None

    @property
    def done(self) -> bool:
        return self.written is not None

    @property
    def response(self) -> Response:
        assert self.written is not None, "not returned yet"
        assert self.written >= 16, f"returned with {self.written} bytes"
        status, flags, ret, origin = RESPONSE_HEADER.unpack(bytes(self.writable))
        return Response(status, flags, ret, origin, bytes(self.writable[16 : self.written]))

    @property
    def status(self) -> int:
        return self.response.status

    @property
    def ret(self) -> int:
        response = self.response
        assert response.status == Status.OK, Status(response.status).name
        return response.ret

    def params(self, count: int) -> list[RawParam]:
        """Those of an OPEN_SESSION's or INVOKE's response."""
        return unpack_raw(self.response.rest, 8, count)

    def inline(self, params: int) -> bytes:
        return self.response.rest[8 + params * PARAM_SIZE :]


class FakeQueue:
    """The device's side of a ring, without a ring."""

    size = 256
    broken = None
    next_base = 0
    spin_us = 20

    def __init__(self, heads: Callable[[], int]) -> None:
        self._heads = heads
        self.available: deque[tuple[int, Any]] = deque()
        self.held: dict[int, Any] = {}
        self.recovered: deque[Chain] = deque()
        self.stopped = False
        self.returned: list[Any] = []
        self.signals = 0

    def offer(self, sent: Any) -> None:
        self.available.append((self._heads(), sent))

    def pop(self) -> Chain | None:
        if self.stopped or not self.available:
            return None
        head, sent = self.available.popleft()
        self.held[head] = sent
        readable = [memoryview(sent.data).toreadonly()] if sent.data else []
        sent.writable = bytearray(b"\xee" * sent.room)
        writable = [memoryview(sent.writable)] if sent.room else []
        return Chain(head, readable, writable, len(sent.data), sent.room)

    def push(self, head: int, written: int = 0) -> None:
        assert not self.stopped, "touched a stopped ring"
        sent = self.held.pop(head)
        assert sent.written is None, "returned twice"
        assert written <= sent.room
        sent.written = written
        self.returned.append(sent)

    def drain(self, handler: Callable[[Chain], int | None], budget: int = 256, notify_every: int = 4) -> bool:
        while budget:
            chain = self.pop()
            if chain is None:
                return False
            budget -= 1
            written = handler(chain)
            if written is not None:
                self.push(chain.head, written)
        return bool(self.available)

    def notify(self) -> bool:
        self.signals += 1
        return True

    should_notify = notify

    def disable_notifications(self) -> None:
        pass

    def enable_notifications(self) -> bool:
        return bool(self.available) and not self.stopped

    def adopt(self, paused: Any) -> None:
        self.held, paused.held = paused.held, {}
        self.available, paused.available = paused.available, deque()

    @property
    def in_flight(self) -> int:
        return len(self.held)

    def stop(self) -> int:
        self.stopped = True
        return 0


class FakeLink:
    def __init__(self) -> None:
        self.woken: dict[int, None] = {}
        self.config_changes = 0
        self.disabled: set[int] = set()
        self.closed: list[str] = []

    def config_changed(self) -> bool:
        self.config_changes += 1
        return True

    def notify(self, index: int) -> bool:
        return True

    def wake(self, index: int) -> None:
        self.woken[index] = None

    def enabled(self, index: int) -> bool:
        return index not in self.disabled

    def post(self, call: Callable[[], object]) -> None:
        call()

    def close(self, why: str) -> None:
        self.closed.append(why)


class RpcSeen(NamedTuple):
    """An RPC event, as the guest has read it."""

    rpc: int
    command: int
    deadline_ms: int
    call: int
    context: int
    session: int
    params: list[RawParam]


class StartedOnly(SoftTee):
    """A TEE that cannot begin invokes at once."""

    invoke_at_once = None  # type: ignore[assignment]


def over_ffa(**options: Any) -> FfaTee:
    """The software TEE behind OP-TEE's partition."""
    tee = SoftTee(**options)
    return FfaTee(tee, {f"vm{n}": None for n in range(8)})


class Bench:
    """One TEE and its router; :meth:`guest` makes devices."""

    tee_type: Callable[..., Any] = SoftTee

    def __init__(
        self,
        *,
        threads: int = 4,
        built_in: Mapping[UUID, type[TrustedApplication]] | None = None,
        keys: Sequence[bytes] = (),
        trace: Trace | None = None,
        **options: Any,
    ) -> None:
        self.clock = Clock()
        self.logs: list[str] = []
        self.tee = self.tee_type(
            clock=self.clock,
            random=lambda n: bytes(n),
            keys=keys,
            built_in=examples.built_in() if built_in is None else built_in,
            threads=threads,
            log=self.logs.append,
            **options,
        )
        self.router = Router(self.tee, self.clock)
        self.trace = trace
        self.guests: list[Guest] = []
        self._epochs = itertools.count(0xE000_0000_0000_0001)

    def guest(self, **options: Any) -> Guest:
        guest = Guest(self, f"vm{len(self.guests)}", lambda: next(self._epochs), **options)
        self.guests.append(guest)
        return guest

    def turn(self) -> None:
        """Let the data plane go round until nothing is left to do."""
        for _ in range(10_000):
            busy = False
            for guest in self.guests:
                busy |= guest.look()
            due = self.router.run()
            self.router.touched = False
            if not busy and due != 0:
                return
        raise AssertionError("it never comes to rest")

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.turn()

    def check_empty(self) -> None:
        """Nothing is left of anybody, anywhere."""
        assert not any(self.tee.usage().values()), self.tee.usage()
        for guest in self.guests:
            epoch = guest.device.epoch
            for table in (epoch.contexts, epoch.sessions, epoch.regions, epoch.calls, epoch.by_memory, epoch.held):
                assert not len(table)
            assert (epoch.region_bytes, epoch.running, len(epoch.rpcs)) == (0, 0, 0)
            assert not guest.device._draining
            assert guest.leases == 0
            assert not guest.link.closed


class Guest:
    """One guest: its memory, its device, and the driver's side of its rings."""

    def __init__(
        self,
        bench: Bench,
        vm: str,
        new_epoch: Callable[[], int],
        *,
        limits: Limits | None = None,
        features: Feature = ALL,
        queues: int = 1,
        buffers: int = 16,
        ffa_vm: int | None = None,
    ) -> None:
        self.bench = bench
        self.limits = limits or Limits()
        self.features = features
        self.device = TeeDevice(
            bench.router,
            vm=vm,
            limits=self.limits,
            request_queues=queues,
            clock=bench.clock,
            new_epoch=new_epoch,
            trace=bench.trace,
            ffa_vm=ffa_vm,
        )
        self.device.queues = [None] * self.device.num_queues
        self.memory = self.device.memory = plain_memory((RAM, RAM_SIZE))
        self._mapping = self.memory.regions[0].mapping
        self._heads = itertools.count()
        self._tags = itertools.count(1)
        self.link = FakeLink()
        self.sent: list[Sent] = []
        self.withdrawn: list[int] = []
        self.notified: list[int] = []
        self.for_clients: set[int] = set()
        self.device.link = self.link
        self.device.connected(self.link)
        self.start(buffers)

    # -- the frontend's part

    def start(self, buffers: int = 0) -> None:
        """A fresh start of all rings."""
        self.device.acked_features = int(self.features)
        self.device.negotiated(int(self.features))
        for index in range(self.device.num_queues):
            queue = FakeQueue(lambda: next(self._heads))
            self.device.queues[index] = queue
            self.device.queue_started(index, queue, False)
            self.link.wake(index)
        self.post(buffers)

    def pause(self) -> None:
        for index, queue in enumerate(self.device.queues):
            assert queue is not None
            queue.stop()
            self.device.queue_stopped(index)

    def resume(self, *indexes: int) -> None:
        for index in indexes or range(self.device.num_queues):
            queue = FakeQueue(lambda: next(self._heads))
            queue.adopt(self.device.queues[index])
            self.device.queues[index] = queue
            self.device.queue_started(index, queue, True)
            self.link.wake(index)

    def reset(self) -> None:
        for queue in self.device.queues:
            if queue is not None:
                queue.stop()
        self.device.queues = [None] * self.device.num_queues
        self.sent.clear()
        self.device.reset()

    def disconnect(self) -> None:
        self.device.queues = [None] * self.device.num_queues
        self.sent.clear()
        self.device.disconnected()

    def unplug(self) -> None:
        """All memory goes away."""
        old, self.device.memory = self.device.memory, GuestMemory()
        self.device.memory_changed(self.device.memory)
        old.close()

    def look(self) -> bool:
        """What the loop does with queues that were woken."""
        woken = list(self.link.woken)
        self.link.woken.clear()
        for index in woken:
            queue = self.device.queues[index]
            if queue is None or queue.stopped or not self.link.enabled(index):
                continue
            if self.device.process(index):
                self.link.wake(index)
        return bool(woken)

    def take(self, chain: Chain) -> None:
        """What the device does with a request that it has popped, but for letting the TEE run."""
        slot_of = self.device._slot_of[Queue.REQUEST]
        data = chain.read()
        assert self.device.epoch.submit(data, chain.writable_bytes, Queue.REQUEST, chain, slot_of) is None

    @property
    def leases(self) -> int:
        """Holds on the guest's memory besides the memory table's own."""
        return self._mapping._references - (1 if len(self.device.memory) else 0)

    @property
    def epoch(self) -> int:
        return self.device.epoch.number

    # -- the driver's part

    def ring(self, index: int) -> FakeQueue:
        queue = self.device.queues[index]
        assert isinstance(queue, FakeQueue)
        return queue

    def offer(self, queue: int, data: bytes, room: int, tag: int = 0, kind: int = 0) -> Sent:
        """Put any bytes into a ring."""
        sent = Sent(data, room, tag, kind)
        self.sent.append(sent)
        self.ring(queue).offer(sent)
        self.link.wake(queue)
        return sent

    def send(
        self,
        request: int,
        *,
        context: int = 0,
        params: Sequence[RawParam] = (),
        tail: bytes = b"",
        inline: bytes = b"",
        inline_out: int = 0,
        tag: int | None = None,
        epoch: int | None = None,
        queue: int | None = None,
        run: bool = True,
        **fields: Any,
    ) -> Sent:
        kind = REQUESTS[request]
        tag = next(self._tags) if tag is None else tag
        if kind.body.tail.name == "PARAMS":
            fields.setdefault("num_params", len(params))
        body = kind.body.codec.pack(**fields)
        data = pack_request(
            Request(request),
            epoch=self.epoch if epoch is None else epoch,
            tag=tag,
            context=context,
            body=body,
            tail=tail or pack_raw(params),
        )
        room = response_size(kind, len(params), inline_out, fields.get("max_entries", 0))
        sent = self.offer(int(kind.queue) if queue is None else queue, data + inline, room, tag, request)
        if run:
            self.bench.turn()
        return sent

    def open_context(self) -> int:
        return self.send(Request.OPEN_CONTEXT, flags=0).response.ident()

    def close_context(self, context: int, **more: Any) -> Sent:
        return self.send(Request.CLOSE_CONTEXT, context=context, **more)

    def open(self, context: int, uuid: UUID = PROBE, **more: Any) -> Sent:
        fields = {"client_uuid": bytes(16), "client_login": 0, **more}
        return self.send(Request.OPEN_SESSION, context=context, uuid=uuid.bytes, **fields)

    def open_session(self, context: int, uuid: UUID = PROBE) -> int:
        sent = self.open(context, uuid)
        assert sent.ret == Result.SUCCESS
        return sent.response.ident()

    def invoke(self, context: int, session: int, func: int, *params: RawParam, **more: Any) -> Sent:
        return self.send(Request.INVOKE, context=context, session=session, func=func, params=params, **more)

    def wait(self, context: int, session: int, milliseconds: int = 0, **more: Any) -> Sent:
        """The probe's WAIT."""
        return self.invoke(context, session, 4, (ParamType.VALUE_IN, milliseconds, 0, 0), **more)

    def register(self, context: int, *ranges: tuple[int, int], size: int | None = None, **more: Any) -> Sent:
        tail = b"".join(a.to_bytes(8, "little") + n.to_bytes(8, "little") for a, n in ranges)
        fields = {
            "flags": 0,
            "num_ranges": len(ranges),
            "size": sum(n for _, n in ranges) if size is None else size,
            **more,
        }
        return self.send(Request.REGISTER_MEMORY, context=context, tail=tail, **fields)

    def region(self, context: int, address: int = RAM, size: int = 4096, **more: Any) -> int:
        sent = self.register(context, (address, size), **more)
        assert sent.ret == Result.SUCCESS
        return sent.response.ident()

    def unregister(self, context: int, region: int, **more: Any) -> Sent:
        return self.send(Request.UNREGISTER_MEMORY, context=context, region=region, **more)

    def cancel(self, context: int, tag: int, **more: Any) -> Sent:
        fields = {"tag": tag}
        data = pack_request(
            Request.CANCEL,
            epoch=self.epoch,
            tag=more.pop("own_tag", None) or next(self._tags),
            context=context,
            body=REQUESTS[Request.CANCEL].body.codec.pack(**fields),
        )
        sent = self.offer(Queue.CONTROL, data, 16, tag, Request.CANCEL)
        if more.pop("run", True):
            self.bench.turn()
        assert not more
        return sent

    def reply(self, rpc: int, ret: int = 0, params: Sequence[RawParam] = (), origin: int = 2, **more: Any) -> Sent:
        return self.send(Request.RPC_REPLY, rpc=rpc, ret=ret, origin=origin, params=params, **more)

    def ack(self, rpc: int, **more: Any) -> Sent:
        return self.send(Request.RPC_WITHDRAWN_ACK, rpc=rpc, **more)

    def post(self, count: int, size: int | None = None, data: bytes = b"") -> None:
        """Post event buffers."""
        for _ in range(count):
            self.ring(Queue.EVENT).offer(Sent(data, self.limits.event_buffer_size if size is None else size, 0, 0))
        self.link.wake(Queue.EVENT)

    def events(self, post: bool = True) -> list[RpcSeen]:
        """The RPCs that came since the last look; the rest goes into ``withdrawn`` and ``notified``."""
        queue = self.ring(Queue.EVENT)
        seen: list[RpcSeen] = []
        returned, queue.returned = queue.returned, []
        for sent in returned:
            if not sent.written:
                continue
            data = bytes(sent.writable[: sent.written])
            header = EVENT_HEADER.unpack(data)
            assert header.flags == 0
            assert header.epoch == self.epoch
            body = EVENTS[header.type].codec.unpack(data, EVENT_HEADER.size)
            if header.type == Event.RPC_WITHDRAWN:
                self.withdrawn.append(body.rpc)
                continue
            if header.type == Event.NOTIFICATION:
                self.notified.append(body.value)
                continue
            assert header.type == Event.RPC
            at = EVENT_HEADER.size + EVENTS[Event.RPC].codec.size
            params = unpack_raw(data, at, body.num_params)
            assert len(data) == at + PARAM_SIZE * body.num_params
            assert body.target in (RpcTarget.SUPPLICANT, RpcTarget.CLIENT)
            if body.target == RpcTarget.CLIENT:
                self.for_clients.add(body.rpc)
            seen.append(
                RpcSeen(body.rpc, body.command, body.deadline_ms, body.call, body.context, body.session, params)
            )
        if post:
            self.post(len(returned))
        return seen

    def event(self, command: int) -> RpcSeen:
        (seen,) = self.events()
        assert seen.command == command, RpcCommand(seen.command).name
        return seen

    def serve_load(self, package: bytes, context: int, address: int = RAM) -> Sent:
        """Be the supplicant for one load; returns the answer to its last reply."""
        seen = self.event(RpcCommand.LOAD_TA)
        self.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], len(package), seen.params[1][3])])
        asked = self.event(RpcCommand.SHM_ALLOC)
        size = asked.params[0][1 + 1]
        region = self.region(context, address, padded(size))
        self.reply(asked.rpc, 0, [(ParamType.MEMREF_INOUT, 0, size, region)])
        seen = self.event(RpcCommand.LOAD_TA)
        (view,) = self.memory.translate(address, len(package))
        view[:] = package
        self.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], len(package), region)])
        freed = self.event(RpcCommand.SHM_FREE)
        assert freed.params[1] == (ParamType.MEMREF_INOUT, 0, size, region)
        assert self.unregister(context, region).ret == 0
        return self.reply(freed.rpc)

    def end(self) -> None:
        """Leave; everything must go."""
        self.disconnect()
        self.bench.turn()
        assert self.device.life is LifeState.FRESH
