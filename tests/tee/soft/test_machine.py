"""Anything in any order: each call ends exactly once, and in the end nothing is left."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule

from tee import package
from tee.calls import (
    Call,
    Client,
    CloseContext,
    CloseSession,
    Invoke,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, RpcWithdrawn
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft.states import SessionState
from tee.soft.ta import Parameters, TrustedApplication
from tests.tee.bench import IDLE, Bench

LOADED = UUID(int=5)
SOURCE = b"""
from tee.soft.ta import *
class A(TrustedApplication):
    uuid = UUID(int=5)
    single_instance = multi_session = True
"""
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
PACKAGE = package.sign(SOURCE, LOADED, 1, KEYS.private)


class Anything(TrustedApplication):
    """Commands: 0 nothing, 1 sleeps, 2 sleeps unmasked, 3 an RPC, 4 panics, 5 fails, 6 yields, 7 ignores cancels, from
    8 on calls another TA: 8 + 8 × which + its command.
    """

    uuid = UUID(int=1)
    inside: dict[object, int] = {}  # noqa: RUF012

    async def create(self) -> None:
        await self.env.checkpoint()

    async def open_session(self, params: Parameters, client: Client) -> object:
        await self.act(params[0].a if params else 0)  # type: ignore[union-attr]
        return self

    async def invoke(self, session: Any, command: int, params: Parameters) -> None:
        assert session is self
        await self.act(command)

    async def act(self, command: int) -> None:
        assert not Anything.inside.get(self), "two calls are in one instance"
        Anything.inside[self] = 1
        try:
            await self.do(command)
        finally:
            Anything.inside[self] = 0

    async def do(self, command: int) -> None:
        env = self.env
        if command == 1:
            await env.sleep(3)
        elif command == 2:
            env.unmask_cancellation()
            await env.sleep(3)
        elif command == 3:
            env.unmask_cancellation()
            await env.rpc(99, [])
        elif command == 4:
            raise RuntimeError
        elif command == 5:
            raise TeeError(Result.BAD_STATE, Origin.TRUSTED_APP)
        elif command == 6:
            for _ in range(100):
                await env.checkpoint()
        elif command >= 8:
            env.unmask_cancellation()
            which, inner = divmod(command - 8, 8)
            session = await env.open_session(TARGETS[which])
            await session.invoke(inner)
            if inner % 2:
                await session.close()
        elif command == 7:
            for _ in range(5):
                try:
                    await env.sleep(1)
                except Exception:
                    continue

    async def close_session(self, session: Any) -> None:
        await self.env.checkpoint()

    async def destroy(self) -> None:
        await self.env.checkpoint()


class One(Anything):
    uuid = UUID(int=2)
    single_instance = True


class Many(One):
    uuid = UUID(int=3)
    multi_session = True


class Kept(Many):
    uuid = UUID(int=4)
    keep_alive = True


TAS = (Anything, One, Many, Kept)
TARGETS = (*(ta.uuid for ta in TAS), LOADED)


class Machine(RuleBasedStateMachine):
    contexts = Bundle("contexts")
    sessions = Bundle("sessions")
    memories = Bundle("memories")
    calls = Bundle("calls")

    @initialize(threads=st.integers(1, 3))
    def begin(self, threads: int) -> None:
        Anything.inside.clear()
        self.bench = Bench(threads=threads, built_in={ta.uuid: ta for ta in TAS}, keys=[KEYS.public])
        self.started: list[Call] = []
        self.answered: list[Rpc] = []

    def start(self, call: Call) -> Call:
        self.started.append(call)
        self.bench.start(call)
        return call

    @rule(target=contexts, vm=st.sampled_from(["", "b"]))
    def open_context(self, vm: str) -> object:
        return self.bench.finish(self.start(OpenContext(vm=vm))).value

    @rule(context=contexts)
    def close_context(self, context: object) -> None:
        self.start(CloseContext(context=context))

    @rule(
        target=calls,
        context=contexts,
        uuid=st.sampled_from([ta.uuid for ta in TAS] + [LOADED, UUID(int=99)]),
        what=st.sampled_from([0, 0, 1, 2, 3, 4, 5, 25, 32]),
    )
    def open_session(self, context: object, uuid: UUID, what: int) -> Call:
        params: Any = [Value(Direction.IN, what)]
        return self.start(OpenSession(context=context, uuid=uuid, params=params))

    @rule(target=sessions, call=calls)
    def opened(self, call: Call) -> Any:
        self.bench.tee.run()
        done = self.bench.ended(call)
        return done.value if done is not None and isinstance(call, OpenSession) and done.value else multiple()

    @rule(
        target=calls,
        session=sessions,
        memory=st.none() | memories,
        command=st.integers(0, 7) | st.integers(0, 47),
        at_once=st.booleans(),
    )
    def invoke(self, session: object, memory: Memory | None, command: int, at_once: bool) -> Call:
        self.bench.at_once = at_once
        size = 8 if memory is not None else 0
        params: Any = [MemRef(Direction.INOUT, memory, 0, size)]
        return self.start(Invoke(session=session, func=command, params=params))

    @rule(session=sessions)
    def close_session(self, session: object) -> None:
        self.start(CloseSession(session=session))

    @rule(target=memories, context=contexts)
    def register(self, context: object) -> Memory:
        memory = self.bench.tee.allocate(8)
        self.start(RegisterMemory(context=context, memory=memory))
        return memory

    @rule(context=contexts, memory=memories)
    def unregister(self, context: object, memory: Memory) -> None:
        self.start(UnregisterMemory(context=context, memory=memory))

    @rule(call=calls)
    def cancel(self, call: Call) -> None:
        self.bench.tee.cancel(call)

    @rule(index=st.integers(0, 10), how=st.sampled_from(["well", "well", "well", "fail", "nonsense"]), context=contexts)
    def answer(self, index: int, how: str, context: object) -> None:
        rpcs = self.bench.rpcs()
        if not rpcs:
            return
        rpc = rpcs[-1 - index % len(rpcs)]
        self.answered.append(rpc)
        self.bench.tee.answer(rpc, self.reply(rpc, how, context))

    def reply(self, rpc: Rpc, how: str, context: object) -> RpcReply:
        if how == "fail":
            return RpcReply(Result.COMMUNICATION)
        if how == "nonsense":
            return RpcReply(params=[MemRef(Direction.OUT, None, 5, 1 << 70)] * 2)
        if rpc.command == RpcCommand.LOAD_TA:
            target = rpc.params[1]
            assert isinstance(target, MemRef)
            if target.memory is not None and target.memory.segments:
                target.memory.write(target.offset, PACKAGE)
            return RpcReply(params=[rpc.params[0], MemRef(Direction.OUT, target.memory, 0, len(PACKAGE))])
        if rpc.command == RpcCommand.SHM_ALLOC:
            memory = self.bench.tee.allocate(len(PACKAGE))
            self.bench.finish(self.start(RegisterMemory(context=context, memory=memory)))
            return RpcReply(params=[MemRef(Direction.INOUT, memory, 0, len(PACKAGE))])
        return RpcReply()

    @rule(seconds=st.sampled_from([0.5, 1, 3, 20]))
    def wait(self, seconds: float) -> None:
        self.bench.now += seconds

    @rule(times=st.integers(1, 5))
    def run_some(self, times: int) -> None:
        for _ in range(times):
            self.bench.tee.run()

    @invariant()
    def each_call_ends_at_most_once(self) -> None:
        done = [event.call for event in self.bench.events if isinstance(event, Done)]
        assert len(done) == len(set(done))
        assert set(done) <= set(self.started)
        withdrawn = [event.rpc for event in self.bench.events if isinstance(event, RpcWithdrawn)]
        assert len(withdrawn) == len(set(withdrawn))

    def teardown(self) -> None:
        bench = self.bench
        bench.run()
        contexts = [
            event.value for event in bench.events if isinstance(event, Done) and isinstance(event.call, OpenContext)
        ]
        for context in contexts:
            self.start(CloseContext(context=context))
        for _ in range(200):
            bench.run()
            bench.now += 20  # whatever is masked, or waits for SHM_FREE, ends by itself
        ended = [event.call for event in bench.events if isinstance(event, Done)]
        assert len(ended) == len(self.started)
        assert set(ended) == set(self.started)
        kept = [instance for instance in bench.tee._instances if type(instance.ta) is Kept]
        assert len(kept) <= 1  # and what it has opened goes on with it
        reachable, count = list(kept), 0
        for instance in reachable:
            count += len(instance.opened.sessions)
            # a session whose TA panicked is there until it is closed; its instance is not
            alive = {s.instance for s in instance.opened.sessions if s.state is not SessionState.DEAD}
            reachable += alive - set(reachable)
        assert set(reachable) == bench.tee._instances
        assert bench.tee.usage() == IDLE | {"instances": len(reachable), "sessions": count}
        assert all(not i.visits and not i.queue and i.owner is None for i in reachable)
        self.each_call_ends_at_most_once()


TestMachine = pytest.mark.filterwarnings("error")(Machine.TestCase)
TestMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)
