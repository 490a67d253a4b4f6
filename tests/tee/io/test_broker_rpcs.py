"""The source of RPCs, with a link that is two lists."""

from __future__ import annotations

from collections import deque
from uuid import UUID

import pytest

from tee.calls import Invoke, OpenSession
from tee.courier import Answer, Ask, Begins, CallKind, WireParam, Withdraw
from tee.driver import Event, RpcWithdrawn
from tee.io import broker_rpcs
from tee.io.broker_link import Lost
from tee.io.broker_rpcs import BrokerRpcs
from tee.memory import Memory
from tee.params import Direction, MemRef
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply

TA = UUID("11112222-3333-4444-5555-666677778888")


class FakeLink:
    def __init__(self, path: str, wake) -> None:  # type: ignore[no-untyped-def]
        self.came: deque[object] = deque()
        self.sent: list[object] = []
        self.wake = wake

    def bring(self, message: object) -> None:
        self.came.append(message)
        self.wake()

    def take(self) -> object:
        return self.came.popleft()

    def begins(self, begins: Begins) -> None:
        self.sent.append(begins)

    def ends(self, call: int) -> None:
        self.sent.append(("ends", call))

    def answer(self, answer: Answer) -> None:
        self.sent.append(answer)


class Bench:
    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rpcs = BrokerRpcs("nowhere")
        self.rpcs.attach(lambda action: action(), self.events.append)
        self.link: FakeLink = self.rpcs.link  # type: ignore[assignment]
        self.call = OpenSession(context=1, uuid=TA)
        self.rpcs.begun(self.call, "a")
        self.rpcs.enters(self.call)

    def ask(self, *params: WireParam, call: int = 1, number: int = 5) -> Rpc | None:
        before = len(self.events)
        self.link.bring(Ask(number, call, RpcCommand.LOAD_TA, list(params)))
        if len(self.events) == before:
            return None
        event = self.events[-1]
        assert isinstance(event, Rpc)
        return event


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Bench:
    monkeypatch.setattr(broker_rpcs, "BrokerLink", FakeLink)
    return Bench()


def test_calls_are_told(bench: Bench) -> None:
    invoke = Invoke(session=1, func=0)
    bench.rpcs.begun(invoke, "ä" * 40)
    bench.rpcs.enters(invoke)
    bench.rpcs.ended(bench.call)
    bench.rpcs.ended(invoke)
    assert bench.link.sent == [
        Begins(1, CallKind.OPEN_SESSION, TA, "a"),
        Begins(2, CallKind.INVOKE, vm="ä" * 32),
        ("ends", 1),
        ("ends", 2),
    ]
    assert bench.rpcs.usage() == {"broker_calls": 0, "broker_rpcs": 0}


def test_an_rpc_and_its_answer(bench: Bench) -> None:
    rpc = bench.ask(WireParam(6, 0, 4))
    assert rpc is not None
    assert (rpc.command, rpc.call) == (RpcCommand.SHM_ALLOC, bench.call)
    memory = Memory.of(bytearray(b"TA!!...."))
    bench.rpcs.answer(rpc, RpcReply(Result.SUCCESS, [MemRef(Direction.INOUT, memory, 0, 8)]))
    asked = bench.events[-1]
    assert isinstance(asked, Rpc)
    assert asked.command == RpcCommand.LOAD_TA
    bench.rpcs.answer(asked, RpcReply(Result.SUCCESS, [MemRef(Direction.OUT, memory, 0, 3)]))
    free = bench.events[-1]
    assert isinstance(free, Rpc)
    assert free.command == RpcCommand.SHM_FREE
    bench.rpcs.answer(free, RpcReply())
    assert bench.link.sent[1:] == [Answer(5, Result.SUCCESS, [WireParam(6, 0, 3, content=b"TA!")])]
    bench.rpcs.answer(free, RpcReply())  # twice: nothing
    assert len(bench.link.sent) == 2
    assert bench.rpcs.usage()["broker_rpcs"] == 0


@pytest.mark.parametrize("message", [Withdraw(5), Lost()])
def test_what_nobody_waits_for_is_withdrawn(bench: Bench, message: object) -> None:
    rpc = bench.ask(WireParam(6, 0, 4))
    bench.link.bring(Withdraw(4))
    assert bench.rpcs.usage()["broker_rpcs"] == 1
    bench.link.bring(message)
    assert isinstance(bench.events[-1], RpcWithdrawn)
    assert rpc is not None
    bench.rpcs.answer(rpc, RpcReply(Result.GENERIC))  # too late
    assert len(bench.link.sent) == 1


def test_the_call_ends_under_it(bench: Bench) -> None:
    rpc = bench.ask(WireParam(6, 0, 4))
    bench.rpcs.ended(bench.call)
    last = bench.events[-1]
    assert isinstance(last, RpcWithdrawn)
    assert last.rpc is rpc
    assert bench.link.sent[1:] == [Answer(5, Result.COMMUNICATION), ("ends", 1)]
    assert bench.ask(WireParam(6, 0, 4)) is None
    assert bench.link.sent[-1] == Answer(5, Result.COMMUNICATION)


def test_what_makes_no_sense(bench: Bench) -> None:
    assert bench.ask(WireParam(5, 0, 9, content=b"x")) is None
    assert bench.link.sent[-1] == Answer(5, Result.BAD_PARAMETERS)
