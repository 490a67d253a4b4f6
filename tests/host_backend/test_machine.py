"""Random guests: whatever they do, each request gets one answer, and in the end nothing is left."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from device.config import Limits
from device.messages import REQUESTS
from device.requests import STATUS_RESULT
from device.wire import NULL_REGION, ParamType, Queue, Request, Status
from tee.results import Origin, Result
from tee.rpc import RpcCommand
from tee.soft.ta import UUID
from tests.host_backend.bench import INLINE, RAM, Bench, Guest, RpcSeen, Sent

LIMITS = Limits(max_contexts=3, max_sessions=4, max_regions=4, max_calls=4, max_rpcs=2, max_region_bytes=20_000)
IDS = st.integers(0, 12)
REFERENCES = st.tuples(
    st.sampled_from([5, 6, 7]), st.integers(0, 5000), st.integers(0, 5000), st.one_of(IDS, st.just(NULL_REGION))
)


class Guests(RuleBasedStateMachine):
    """Two guests on one TEE; rules are what their drivers and frontends do, sensible and not."""

    @initialize(threads=st.integers(1, 3))
    def begin(self, threads: int) -> None:
        self.bench = Bench(threads=threads)
        self.guests = [self.bench.guest(limits=LIMITS, buffers=2), self.bench.guest(limits=LIMITS, buffers=2)]
        self.rpcs: dict[Guest, list[RpcSeen]] = {guest: [] for guest in self.guests}
        self.paused: set[Guest] = set()

    def pick(self, number: int) -> Guest:
        return self.guests[number]

    @rule(g=st.integers(0, 1), run=st.booleans())
    def open_context(self, g: int, run: bool) -> None:
        self.pick(g).send(Request.OPEN_CONTEXT, flags=0, run=run)

    @rule(g=st.integers(0, 1), context=IDS, run=st.booleans())
    def close_context(self, g: int, context: int, run: bool) -> None:
        self.pick(g).close_context(context, run=run)

    @rule(g=st.integers(0, 1), context=IDS, loads=st.booleans(), run=st.booleans())
    def open_session(self, g: int, context: int, loads: bool, run: bool) -> None:
        more: dict[str, Any] = {"uuid": UUID(int=0xBAD)} if loads else {}
        self.pick(g).open(context, run=run, **more)

    @rule(g=st.integers(0, 1), context=IDS, session=IDS, run=st.booleans())
    def close_session(self, g: int, context: int, session: int, run: bool) -> None:
        self.pick(g).send(Request.CLOSE_SESSION, context=context, session=session, run=run)

    @rule(g=st.integers(0, 1), context=IDS, session=IDS, func=st.integers(0, 11), ref=REFERENCES, run=st.booleans())
    def invoke(self, g: int, context: int, session: int, func: int, ref: Any, run: bool) -> None:
        second = (ParamType.VALUE_INOUT if func == 8 else ParamType.VALUE_IN, 2000, 0, 0)
        params = [second] if func in (4, 9, 10) else [ref, second]
        self.pick(g).invoke(context, session, func, *params, run=run)

    @rule(g=st.integers(0, 1), context=IDS, session=IDS, data=st.binary(max_size=40), tag=IDS)
    def invoke_inline(self, g: int, context: int, session: int, data: bytes, tag: int) -> None:
        room = (len(data) + 7) // 8 * 8
        params = [(ParamType.MEMREF_INOUT | INLINE, 0, len(data), 0), (ParamType.VALUE_IN, 1, 0, 0)]
        inline = data.ljust(room, b"\0")
        self.pick(g).invoke(context, session, 2, *params, inline=inline, inline_out=room, tag=tag)

    @rule(g=st.integers(0, 1), context=IDS, size=st.integers(0, 9000), flags=st.integers(0, 1), run=st.booleans())
    def register(self, g: int, context: int, size: int, flags: int, run: bool) -> None:
        self.pick(g).register(context, (RAM, size), flags=flags, run=run)

    @rule(g=st.integers(0, 1), context=IDS, region=IDS, run=st.booleans())
    def unregister(self, g: int, context: int, region: int, run: bool) -> None:
        self.pick(g).unregister(context, region, run=run)

    @rule(g=st.integers(0, 1), context=IDS, tag=st.integers(1, 60))
    def cancel(self, g: int, context: int, tag: int) -> None:
        self.pick(g).cancel(context, tag)

    @rule(g=st.integers(0, 1))
    def look_at_events(self, g: int) -> None:
        guest = self.pick(g)
        self.rpcs[guest] += guest.events()
        self.bench.turn()

    @rule(g=st.integers(0, 1), which=st.integers(0, 3), region=IDS, code=st.sampled_from([0, 0, 0, 0xFFFF0008]))
    def reply(self, g: int, which: int, region: int, code: int) -> None:
        guest = self.pick(g)
        seen = self.rpcs[guest]
        if which >= len(seen):
            guest.reply(which)
            return
        rpc = seen[which]
        params = list(rpc.params)
        if rpc.command == RpcCommand.SHM_ALLOC:
            params = [(ParamType.MEMREF_INOUT, 0, 4000, region)]
        elif rpc.command == RpcCommand.SHM_FREE:
            params = []
        elif rpc.params[1][3] == NULL_REGION:
            params[1] = (*params[1][:2], 4000, params[1][3])
        guest.reply(rpc.rpc, code, params)

    @rule(g=st.integers(0, 1))
    def acknowledge(self, g: int) -> None:
        guest = self.pick(g)
        while guest.withdrawn:
            guest.ack(guest.withdrawn.pop())

    @rule(seconds=st.sampled_from([0.5, 3, 11]))
    def wait(self, seconds: float) -> None:
        self.bench.pass_time(seconds)

    @precondition(lambda self: len(self.paused) < 2)
    @rule(g=st.integers(0, 1))
    def pause(self, g: int) -> None:
        guest = self.pick(g)
        if guest not in self.paused:
            self.paused.add(guest)
            guest.pause()

    @precondition(lambda self: self.paused)
    @rule()
    def resume(self) -> None:
        self.paused.pop().resume() if len(self.paused) == 1 else [g.resume() for g in self.paused]
        self.paused.clear()

    @rule(g=st.integers(0, 1), gone=st.booleans())
    def reset(self, g: int, gone: bool) -> None:
        guest = self.pick(g)
        self.paused.discard(guest)
        guest.disconnect() if gone else guest.reset()
        if gone:
            guest.device.connected(guest.link)
        guest.withdrawn.clear()
        self.rpcs[guest].clear()
        guest.start(2)

    @rule(g=st.integers(0, 1))
    def unplug_and_plug(self, g: int) -> None:
        guest = self.pick(g)
        guest.device.memory_changed(guest.device.memory)

    @invariant()
    def books_are_in_order(self) -> None:
        for guest in getattr(self, "guests", ()):
            epoch = guest.device.epoch
            assert not guest.link.closed
            assert epoch.region_bytes == sum(region.memory.size for region in epoch.regions) <= 20_000
            assert epoch.running == sum(p.request.type in (0x10, 0x12) for p in epoch.calls.values()) <= 4
            uses = [r for p in epoch.calls.values() for r in (*p.regions, *p.held)]
            uses += [r for e in epoch.rpcs._entries.values() if e.rpc.command != RpcCommand.SHM_FREE for r in e.regions]
            for region in epoch.regions:
                assert region.users == uses.count(region)
            assert len(epoch.by_memory) == len(epoch.regions)
            assert len(epoch.rpcs._table) <= 2
            assert len(epoch.rpcs._outbox) <= 2

    def teardown(self) -> None:
        if not hasattr(self, "guests"):
            return
        for guest in self.guests:
            if guest in self.paused:
                guest.resume()
        self.paused.clear()
        self.bench.turn()
        for guest in self.guests:
            for context in [c.ident for c in guest.device.epoch.contexts]:
                guest.close_context(context)
            # nothing but time is needed for all to be answered
            self.bench.pass_time(30)
            assert all(sent.done for sent in guest.sent)
            for sent in guest.sent:
                assert sent.response.status in set(Status)
            guest.end()
        self.bench.check_empty()


Guests.TestCase.settings = settings(max_examples=60, stateful_step_count=40, suppress_health_check=list(HealthCheck))
TestGuests = pytest.mark.requirement("DEV-REQ-1", "DEV-REQ-7", "DEV-CTX-4", "DEV-EPO-3")(Guests.TestCase)


def stage() -> tuple[Bench, Guest]:
    """A guest with something of everything: ids 1 exist, and some more."""
    bench = Bench()
    guest = bench.guest(limits=LIMITS)
    for _ in range(2):
        context = guest.open_context()
        guest.open_session(context)
        guest.region(context)
    guest.wait(1, 1)
    guest.open(1, UUID(int=0xBAD))
    guest.events()
    return bench, guest


def finish(bench: Bench, guest: Guest, sent: list[Sent]) -> None:
    """A defined answer, nothing else."""
    bench.pass_time(60)
    for context in [c.ident for c in guest.device.epoch.contexts]:
        guest.close_context(context)
    for one in sent:
        assert one.done
        if one.room < 16:
            assert one.written == 0
            continue
        response = one.response
        if response.status:
            assert one.written == 16
            assert Status(response.status) not in (Status.OK, Status.ABANDONED)
            assert (response.ret, response.origin) == (STATUS_RESULT[Status(response.status)], Origin.COMMS)
            assert response.flags == 0
        assert bytes(one.writable[one.written :]) == b"\xee" * (one.room - one.written)  # type: ignore[operator]
    guest.end()
    bench.check_empty()


@pytest.mark.requirement("DEV-REQ-3", "DEV-REQ-4", "DEV-REQ-6", "DEV-QUE-7")
@settings(max_examples=150, suppress_health_check=list(HealthCheck))
@given(
    st.lists(
        st.tuples(st.sampled_from([Queue.CONTROL, Queue.REQUEST]), st.binary(max_size=300), st.integers(0, 300)),
        max_size=8,
    )
)
@pytest.mark.fault("random-bytes")
def test_random_bytes(requests: list[tuple[int, bytes, int]]) -> None:
    bench, guest = stage()
    sent = [guest.offer(*request) for request in requests]
    bench.turn()
    finish(bench, guest, sent)


def samples(guest: Guest) -> list[tuple[int, bytes, int]]:
    """One good request of each type that is served."""
    memory = (ParamType.MEMREF_INOUT, 0, 64, 1)
    inline = (ParamType.MEMREF_INOUT | INLINE, 0, 8, 0)
    makers: list[Callable[[], Sent]] = [
        lambda: guest.send(Request.OPEN_CONTEXT, flags=0, run=False),
        lambda: guest.open(1, params=[memory], run=False),
        lambda: guest.invoke(1, 1, 0, memory, inline, inline=bytes(8), inline_out=8, run=False),
        lambda: guest.invoke(2, 2, 2, memory, (ParamType.VALUE_IN, 7, 0, 0), run=False),
        lambda: guest.register(1, (RAM, 64), (RAM, 64), run=False),
        lambda: guest.unregister(1, 1, run=False),
        lambda: guest.send(Request.CLOSE_SESSION, context=1, session=1, run=False),
        lambda: guest.close_context(1, run=False),
        lambda: guest.cancel(1, 7, run=False),
        lambda: guest.reply(1, Result.ITEM_NOT_FOUND, [(ParamType.VALUE_IN, 0, 0, 0), memory], run=False),
        lambda: guest.ack(1, run=False),
    ]
    found = []
    for make in makers:
        one = make()
        found.append((int(REQUESTS[one.kind].queue), one.data, one.room))
    for index in (Queue.CONTROL, Queue.REQUEST):
        guest.ring(index).available.clear()
    guest.sent.clear()
    return found


INTERESTING = [0, 1, 2, 3, 7, 0x7F, 0x80, 0xFF, 0xFFFF, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1]


@pytest.mark.requirement("DEV-REQ-3", "DEV-REQ-4", "DEV-REQ-5", "DEV-REQ-6")
@pytest.mark.parametrize("seed", range(60))
@pytest.mark.fault("random-bytes")
def test_mutated_requests(seed: int) -> None:
    dice = random.Random(seed)
    bench, guest = stage()
    base = samples(guest)
    sent = []
    for _ in range(25):
        queue, data, room = dice.choice(base)
        mutated = bytearray(data)
        for _ in range(dice.choice([0, 1, 1, 2, 3])):
            width = dice.choice([1, 4, 8])
            at = dice.randrange(0, max(1, len(mutated) - width + 1))
            if dice.random() < 0.5:
                at = at // width * width
            mutated[at : at + width] = (dice.choice(INTERESTING) % (1 << 8 * width)).to_bytes(width, "little")
        if dice.random() < 0.2:
            del mutated[dice.randrange(len(mutated)) :]
        if dice.random() < 0.1:
            mutated += dice.randbytes(dice.randrange(40))
        sent.append(guest.offer(queue, bytes(mutated), max(0, room + dice.choice([0, 0, 0, -1, 8, -room]))))
        if dice.random() < 0.5:
            bench.turn()
    bench.turn()
    finish(bench, guest, sent)
