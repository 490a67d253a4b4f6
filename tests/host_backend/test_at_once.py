"""Beginning invokes at once changes nothing that anybody sees: answers, events, traces, metrics and books."""

from __future__ import annotations

import io
import json
from collections.abc import Generator
from types import coroutine
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device.config import Limits
from device.wire import ParamType, Queue, Request
from host_backend.metrics import Metrics
from host_backend.trace import Recorders, Trace
from tee.results import Origin, TeeError
from tee.rpc import RpcCommand
from tee.soft import SoftTee
from tee.soft.entities import Context, Instance
from tee.soft.ta import UUID, Client, MemoryReference, Parameters, TrustedApplication, Value
from tests.host_backend.bench import INLINE, RAM, Bench, Guest, RpcSeen, Sent, StartedOnly

pytestmark = pytest.mark.started

LIMITS = Limits(max_contexts=3, max_sessions=4, max_regions=4, max_calls=4, max_rpcs=2)
_STEPS = b"ysrvouenwmMysrvouenwmMysrvouenwmMpfNW"


@coroutine
def _nonsense() -> Generator[Any, Any, None]:
    yield 7


class Doer(TrustedApplication):
    """Does what the letters of its first parameter say, one after the other."""

    uuid = UUID(int=0xD0)
    other = UUID(int=0xD1)

    async def open_session(self, params: Parameters, client: Client) -> dict[str, Any]:
        return {}

    async def invoke(self, session: dict[str, Any], command: int, params: Parameters) -> None:
        await self.do(session, params[0].read() if type(params[0]) is MemoryReference else b"", params)

    async def do(self, session: dict[str, Any], steps: bytes, params: Parameters) -> None:
        env = self.env
        for place, step in enumerate(steps):
            match chr(step):
                case "y":
                    await env.checkpoint()
                case "s":
                    await env.sleep(1.0)
                case "r":
                    session["rpc"] = (await env.rpc(RpcCommand.SHM_ALLOC, [Value(1, 0, 100, 8)])).code
                case "v":  # the rest is done by another TA
                    async with await env.open_session(self.other) as inner:
                        await inner.invoke(0, list(params))
                case "o":
                    session["kept"] = await env.open_session(self.other)
                case "u" if "kept" in session:
                    await session["kept"].invoke(0, [])
                case "p":
                    raise RuntimeError("as asked")
                case "e":
                    raise TeeError(0x1000_0001, Origin.TRUSTED_APP, "as asked")
                case "f":
                    raise SystemExit(3)
                case "n":
                    env.notify(place)
                case "N":
                    await _nonsense()
                case "w" if len(params) > 1 and type(params[1]) is MemoryReference:
                    params[1].put(steps)
                case "W" if len(params) > 1 and type(params[1]) is MemoryReference:
                    params[1].size = params[1].capacity + 1
                case "m":
                    env.mask_cancellation()
                case "M":
                    env.unmask_cancellation()


class Single(Doer):
    """One instance for all."""

    uuid = UUID(int=0xD1)
    other = UUID(int=0xD0)
    single_instance = multi_session = True


class Kept(Doer):
    """One instance for all, kept."""

    uuid = UUID(int=0xD2)
    other = UUID(int=0xD1)
    single_instance = multi_session = keep_alive = True


TAS: dict[UUID, type[TrustedApplication]] = {ta.uuid: ta for ta in (Doer, Single, Kept)}


class Ordered(dict[Any, None]):
    """A set in which order does not depend on addresses."""

    add = dict.setdefault

    def discard(self, thing: Any) -> None:
        self.pop(thing, None)


@pytest.fixture(autouse=True)
def in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind, names in ((Context, ("tasks", "sessions", "registrations")), (Instance, ("sessions",))):

        def init(self: Any, *args: Any, make: Any = kind.__init__, names: tuple[str, ...] = names) -> None:
            make(self, *args)
            for name in names:
                setattr(self, name, Ordered())

        monkeypatch.setattr(kind, "__init__", init)


class Side:
    """Two guests on one TEE, and all that anybody can see of them."""

    def __init__(self, tee: type[SoftTee], threads: int) -> None:
        self.out = io.StringIO()
        self.metrics = Metrics()
        recorder: Any = Recorders(Trace(self.out), self.metrics)
        self.bench: Bench = type("", (Bench,), {"tee_type": tee})(threads=threads, built_in=TAS, trace=recorder)
        self.bench.router.trace = recorder
        self.guests = [self.bench.guest(limits=LIMITS, queues=2, buffers=4) for _ in range(2)]
        self.sent: list[Sent] = []
        self.rpcs: list[tuple[Guest, RpcSeen]] = []
        for guest in self.guests:
            self.furnish(guest)

    def furnish(self, guest: Guest) -> None:
        """Context 1 with sessions 1 to 3 and region 1, context 2 with session 4."""
        context, other = guest.open_context(), guest.open_context()
        for uuid in TAS:
            self.sent.append(guest.open(context, uuid))
        self.sent.append(guest.open(other, Single.uuid))
        self.sent.append(guest.register(context, (RAM, 4096)))

    def invoke(self, g: int, session: int, steps: bytes, tag: int, inline: bool, queue: int, run: bool) -> None:
        guest = self.guests[g]
        room = (len(steps) + 7) // 8 * 8
        params = [(ParamType.MEMREF_IN | INLINE, 0, len(steps), 0)]
        inline |= session == 4  # region 1 is of another context
        params += [(ParamType.MEMREF_OUT | INLINE, 0, 8, 0) if inline else (ParamType.MEMREF_INOUT, 0, 8, 1)]
        sent = guest.invoke(
            2 if session == 4 else 1,
            *(session, 0, *params),
            inline=steps.ljust(room, b"\0"),
            inline_out=8 * inline,
            tag=tag,
            queue=Queue.REQUEST + queue,
            run=run,
        )
        self.sent.append(sent)

    def close(self, g: int, what: int) -> None:
        guest = self.guests[g]
        kind = {"context": 1, "session": what, "run": False}
        self.sent.append(guest.close_context(2, run=False) if not what else guest.send(0x11, **kind))

    def cancel(self, g: int, back: int, run: bool) -> None:
        sent = [one for one in self.guests[g].sent if one.kind == Request.INVOKE]
        tag = sent[-1 - back].tag if back < len(sent) else 9999
        self.sent.append(self.guests[g].cancel(1, tag, run=run))

    def unregister(self, g: int) -> None:
        self.sent.append(self.guests[g].unregister(1, 1, run=False))

    def reply(self, g: int) -> None:
        guest = self.guests[g]
        self.rpcs += [(guest, seen) for seen in guest.events()]
        for guest, seen in self.rpcs:
            self.sent.append(guest.reply(seen.rpc, 0, [(ParamType.MEMREF_INOUT, 0, 100, 1)]))
        self.rpcs.clear()
        while guest.withdrawn:
            guest.ack(guest.withdrawn.pop())

    def wait(self, seconds: float) -> None:
        self.bench.pass_time(seconds)

    def pause(self, g: int) -> None:
        self.guests[g].pause()
        self.bench.turn()
        self.guests[g].resume()

    def reset(self, g: int) -> None:
        guest = self.guests[g]
        self.rpcs = [(other, seen) for other, seen in self.rpcs if other is not guest]
        guest.reset()
        guest.start(4)
        for _ in range(50):  # its sessions with single instances end after all others' calls there
            self.wait(30.0)
        self.furnish(guest)

    def seen(self) -> Any:
        """What can be seen now."""
        self.bench.turn()
        answers = [(one.kind, one.tag, one.written, bytes(one.writable)) for one in self.sent]
        events = [guest.notified for guest in self.guests]
        books = [(len(g.device.epoch.calls), g.device.epoch.running, g.leases) for g in self.guests]
        return answers, events, books, self.bench.tee.usage(), self.bench.logs, self.trace(), self.counts()

    def trace(self) -> Any:
        """What was written of each request and of everything else, in order."""
        lanes: dict[tuple[Any, ...], list[Any]] = {}
        for event in json.loads(self.out.getvalue() + "]"):
            told = {key: what for key, what in event["args"].items() if key != "took_us"}
            which = event.get("id") if event.get("cat") == "requests" else event["name"]
            lanes.setdefault((event["pid"], event.get("cat"), which), []).append((event["ph"], event["name"], told))
        return lanes

    def counts(self) -> Any:
        m = self.metrics
        times = [{key: sum(h.counts) for key, h in one.items()} for one in (m._request_times, m._rpc_times)]
        return m._requests, m._results, m._rpcs, times, {vm: sorted(tags) for vm, tags in m._started.items()}

    def end(self) -> None:
        for guest in self.guests:
            guest.disconnect()
        self.bench.turn()
        for guest in self.guests:
            guest.end()
        usage = self.bench.tee.usage()
        assert not any(usage[name] for name in ("calls", "contexts", "registrations", "rpcs", "threads_busy")), usage


G = st.integers(0, 1)
STEPS = st.lists(st.sampled_from(_STEPS), max_size=5).map(bytes)
INVOKE = st.tuples(
    *(st.just("invoke"), G, st.integers(1, 4), STEPS, st.integers(100, 999)),
    *(st.booleans(), st.integers(0, 1), st.booleans()),
)
ACTIONS = st.one_of(
    *6 * [INVOKE],
    st.tuples(st.just("cancel"), G, st.integers(0, 3), st.booleans()),
    st.tuples(st.just("close"), G, st.integers(0, 3)),
    st.tuples(st.just("unregister"), G),
    st.tuples(st.just("reply"), G),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 1.0, 30.0])),
    st.tuples(st.just("pause"), G),
    st.tuples(st.just("reset"), G),
)


@settings(max_examples=150, report_multiple_bugs=False, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3), st.lists(ACTIONS, min_size=20, max_size=40))
def test_nobody_sees_a_difference(threads: int, actions: list[tuple[Any, ...]]) -> None:
    sides = [Side(SoftTee, threads), Side(StartedOnly, threads)]
    for name, *arguments in actions:
        for side in sides:
            getattr(side, name)(*arguments)
        if name != "invoke" or arguments[-1]:
            at_once, started = (side.seen() for side in sides)
            assert at_once == started
    for side in sides:
        side.end()
    at_once, started = (side.seen() for side in sides)
    assert at_once == started
