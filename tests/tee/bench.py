"""A software TEE that a test steps by hand, with a clock of its own, and a supplicant that a test plays."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from tee.calls import (
    Call,
    Invoke,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Event, RpcWithdrawn
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft import SoftTee, examples

PROBE = examples.UUIDS["probe"]
HELLO = examples.UUIDS["hello_world"]
RANDOM = examples.UUIDS["random"]

IDLE = dict.fromkeys(
    [
        *("calls", "contexts", "sessions", "instances", "registrations", "rpcs", "services", "enclaves"),
        "threads_busy",
    ],
    0,
)


class Bench:
    """A SoftTee and what a test does with it.

    With ``at_once``, invokes are begun by ``invoke_at_once`` where that does it; their Done is then made here.
    """

    at_once = False

    def __init__(self, **options: Any) -> None:
        self.now = 0.0
        self.logged: list[str] = []
        counter = itertools.count(1)
        options.setdefault("built_in", examples.built_in())
        self.tee = SoftTee(
            clock=lambda: self.now,
            random=lambda n: bytes(next(counter) & 0xFF | 1 for _ in range(n)),
            log=self.logged.append,
            **options,
        )
        self.events: list[Event] = []
        self.tee.attach(self.events.append)

    def run(self, limit: int = 1000) -> float | None:
        """Until there is nothing to do but wait; returns what the last run said."""
        for _ in range(limit):
            left = self.tee.run()
            if left != 0:
                return left
        raise AssertionError("it never rests")

    def start(self, call: Call) -> Any:
        if self.at_once and type(call) is Invoke:
            outcome = self.tee.invoke_at_once(call.session, call.func, call.params)
            if isinstance(outcome, tuple):
                self.events.append(Done(call, *outcome))
                return call
            if outcome is not None:
                outcome.becomes(call)
                return call
        self.tee.start(call)
        return call

    def ended(self, call: Call) -> Done | None:
        """The one Done of ``call``, if it came."""
        done = [event for event in self.events if isinstance(event, Done) and event.call is call]
        assert len(done) <= 1
        return done[0] if done else None

    def done(self, call: Call) -> Done:
        """Start ``call`` and run until its Done, which must come without anybody else's help."""
        self.start(call)
        self.run()
        done = self.ended(call)
        assert done is not None, "no Done"
        return done

    def finish(self, call: Call) -> Done:
        """The Done of a call that was started before."""
        self.run()
        done = self.ended(call)
        assert done is not None, "no Done"
        return done

    def context(self, vm: str = "") -> object:
        return self.done(OpenContext(vm=vm)).value

    def session(self, context: object, uuid: Any = PROBE, params: list[Param] | None = None) -> Any:
        done = self.done(OpenSession(context=context, uuid=uuid, params=params or []))
        assert done.code == Result.SUCCESS, done
        return done.value

    def invoke(self, session: object, func: int, *params: Param) -> Done:
        return self.done(Invoke(session=session, func=func, params=list(params)))

    def registered(self, context: object, size: int = 64) -> Memory:
        memory = self.tee.allocate(size)
        assert self.done(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
        return memory

    def rpcs(self) -> list[Rpc]:
        """The RPCs that came out so far, in order."""
        return [event for event in self.events if isinstance(event, Rpc)]

    def rpc(self) -> Rpc:
        """The last RPC that came out, which nobody has withdrawn."""
        self.run()
        rpc = self.rpcs()[-1]
        assert rpc not in self.withdrawn()
        return rpc

    def withdrawn(self) -> list[Rpc]:
        return [event.rpc for event in self.events if isinstance(event, RpcWithdrawn)]

    def answer(self, rpc: Rpc, code: int = Result.SUCCESS, params: list[Param] | None = None) -> None:
        self.tee.answer(rpc, RpcReply(code, params or []))
        self.run()


class Courier:
    """A supplicant that a test plays: serves LOAD_TA from ``data`` and counts its shared memory."""

    def __init__(self, bench: Bench, data: bytes, *, vm: str = "") -> None:
        self.bench = bench
        self.data = data
        self.context = bench.context(vm)
        self.held: list[Memory] = []
        self.served = 0

    def answer(self, rpc: Rpc) -> RpcReply:
        """The honest answer."""
        if rpc.command == RpcCommand.LOAD_TA:
            target = rpc.params[1]
            assert isinstance(target, MemRef)
            if target.memory is not None:
                target.memory.write(target.offset, self.data)
            return RpcReply(params=[rpc.params[0], MemRef(Direction.OUT, target.memory, target.offset, len(self.data))])
        if rpc.command == RpcCommand.SHM_ALLOC:
            wanted = rpc.params[0]
            assert isinstance(wanted, Value)
            memory = self.bench.registered(self.context, wanted.b)
            self.held.append(memory)
            return RpcReply(params=[MemRef(Direction.INOUT, memory, 0, wanted.b)])
        assert rpc.command == RpcCommand.SHM_FREE
        given = rpc.params[1]
        assert isinstance(given, MemRef)
        assert given.memory is not None
        self.held.remove(given.memory)
        self.bench.done(UnregisterMemory(context=self.context, memory=given.memory))
        return RpcReply()

    def serve(self, change: Callable[[Rpc, RpcReply], RpcReply | None] | None = None) -> None:
        """Answer all RPCs until there are none; ``change`` may turn an answer into another, or None (no answer)."""
        self.bench.run()
        while self.served < len(rpcs := self.bench.rpcs()):
            rpc = rpcs[self.served]
            self.served += 1
            reply: RpcReply | None = self.answer(rpc)
            assert reply is not None
            if change is not None:
                reply = change(rpc, reply)
            if reply is not None:
                self.bench.tee.answer(rpc, reply)
            self.bench.run()
