"""The VM's driver: the contract's rules, and partitions that break every rule."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ffa.abi.frame import Frame
from ffa.abi.ids import Call as Ffa
from ffa.abi.ids import fid
from ffa.optee.client import FfaTeeDriver, share
from ffa.optee.guests import Limits
from ffa.roles.endpoint import Endpoint, respond
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from tee import package
from tee.calls import (
    Client,
    CloseContext,
    CloseSession,
    Invoke,
    Login,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Notification, RpcWithdrawn
from tee.memory import FfaShare, Memory, Range
from tee.params import Direction, MemRef, Value
from tee.results import Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft import examples
from tests.ffa.optee.bench import Driven, Path, soft_tee
from tests.ffa.optee.test_partition import NOTIFIER, Notifier

HELLO, PROBE = examples.UUIDS["hello_world"], examples.UUIDS["probe"]
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))


def temporary(data: bytes, direction: Direction = Direction.INOUT) -> MemRef:
    return MemRef(direction, Memory.of(bytearray(data)), 0, len(data))


def test_cancel() -> None:
    path = Path(limits=Limits(threads_per_vm=1))
    driven = path.driver()
    session = driven.session(driven.context(), PROBE)
    running, waiting = (Invoke(session=session, func=4, params=[Value(Direction.IN, 0)]) for _ in range(2))
    driven.driver.start(running)
    driven.run(5)
    driven.driver.start(waiting)
    driven.run(5)
    assert driven.events == []
    driven.driver.cancel(waiting)
    assert (driven.end_of(waiting).code, path.partition.usage()["threads"]) == (Result.CANCEL, 1)
    driven.driver.cancel(running)
    assert (driven.end_of(running).code, path.partition.usage()["threads"]) == (Result.CANCEL, 0)
    driven.driver.cancel(running)
    assert driven.call(Invoke(session=session, func=0)).code == Result.SUCCESS


def test_closing_a_context_ends_all_under_it() -> None:
    path = Path()
    driven = path.driver()
    context = driven.context()
    session, memory = driven.session(context, PROBE), driven.driver.allocate(5000)
    assert driven.call(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
    call = Invoke(
        session=session, func=8, params=[MemRef(Direction.INOUT, memory, 0, 10), Value(Direction.INOUT, 60_000)]
    )
    driven.driver.start(call)
    driven.run(5)
    close = CloseContext(context=context)
    driven.driver.start(close)
    assert driven.end_of(call).code == Result.CANCEL
    assert driven.end_of(close).code == Result.SUCCESS
    assert memory.handle is None
    assert driven.driver.usage() == dict.fromkeys(driven.driver.usage(), 0)
    assert path.partition.usage()["sessions"] == 0
    for late in (
        Invoke(session=session, func=0),
        CloseContext(context=context),
        OpenSession(context=context, uuid=HELLO),
    ):
        assert driven.call(late).code == Result.BAD_PARAMETERS
    driven.driver.close()
    assert not path.hypervisor.transactions.regions


def test_memory_is_unregistered_when_its_last_call_has_ended() -> None:
    driven = Path().driver()
    context = driven.context()
    session, memory = driven.session(context, PROBE), driven.driver.allocate(100)
    driven.call(RegisterMemory(context=context, memory=memory))
    assert driven.call(RegisterMemory(context=context, memory=memory)).code == Result.BAD_STATE
    call = Invoke(
        session=session, func=8, params=[MemRef(Direction.INOUT, memory, 0, 10), Value(Direction.INOUT, 60_000)]
    )
    unregister = UnregisterMemory(context=context, memory=memory)
    driven.driver.start(call)
    driven.run(5)
    driven.driver.start(unregister)
    driven.run(20)
    assert driven.events == []
    driven.driver.cancel(call)
    assert driven.end_of(unregister).code == Result.SUCCESS
    assert memory.handle is None
    assert driven.call(UnregisterMemory(context=context, memory=memory)).code == Result.BAD_PARAMETERS
    driven.driver.release(memory)


def test_closing_the_driver_ends_what_is_under_way() -> None:
    driven = Path().driver()
    context = driven.context()
    session, memory = driven.session(context, PROBE), driven.driver.allocate(100)
    driven.call(RegisterMemory(context=context, memory=memory))
    params = [MemRef(Direction.INOUT, memory, 0, 10), Value(Direction.INOUT, 60_000)]
    calls = [
        Invoke(session=session, func=8, params=list(params)),
        UnregisterMemory(context=context, memory=memory),
        CloseContext(context=context),
    ]
    for call in calls:
        driven.driver.start(call)
    driven.driver.close()
    late = OpenContext()
    driven.driver.start(late)
    driven.run(20)
    ended = {event.call: event.code for event in driven.events if isinstance(event, Done)}
    assert len(ended) == len(driven.events) == 4
    assert {ended[call] for call in (calls[2], late)} == {Result.COMMUNICATION}


def test_what_is_refused_before_it_is_sent() -> None:
    path = Path()
    driven = path.driver()
    context = driven.context()
    session = driven.session(context, PROBE)
    for params in (
        [Value(Direction.IN)] * 5,
        [Value(Direction.IN, 1 << 64)],
        [MemRef(Direction.IN, Memory.of(bytearray(5)), 3, 3)],
    ):
        assert driven.call(Invoke(session=session, func=0, params=params)).code == Result.BAD_PARAMETERS
    assert driven.call(Invoke(session=session, func=1 << 32)).code == Result.BAD_PARAMETERS
    assert driven.call(RegisterMemory(context=context, memory=Memory.of(bytearray(9)))).code == Result.BAD_PARAMETERS
    kernel = OpenSession(context=context, uuid=PROBE, client=Client(Login.REE_KERNEL))
    assert driven.call(kernel).code == Result.ACCESS_DENIED
    huge = temporary(bytes(9 << 20))
    assert driven.call(Invoke(session=session, func=3, params=[huge])).code == Result.OUT_OF_MEMORY
    assert driven.call(CloseSession(session=session)).code == Result.SUCCESS
    assert driven.call(CloseSession(session=session)).code == Result.BAD_PARAMETERS
    assert driven.call(CloseContext(context=context)).code == Result.SUCCESS
    driven.driver.close()
    assert not path.hypervisor.transactions.regions


def test_notifications_become_events() -> None:
    driven = Path(soft_tee(built_in={NOTIFIER: Notifier})).driver()
    session = driven.session(driven.context(), NOTIFIER)
    assert driven.call(Invoke(session=session, func=5)).code == Result.SUCCESS
    assert driven.take(Notification) == Notification(5)


def serve_until(driven: Driven, wanted: RpcCommand) -> Rpc:
    """Answers nothing until an RPC with this command has come."""
    rpc = driven.take(Rpc)
    assert isinstance(rpc, Rpc)
    assert rpc.command == wanted
    return rpc


def test_an_answer_without_memory_and_one_with_foreign_memory() -> None:
    path = Path(soft_tee(built_in={}, keys=[KEYS.public]))
    driven = path.driver()
    context = driven.context()
    for params in ([], [MemRef(Direction.INOUT, Memory.of(bytearray(99999)), 0, 99999)], [Value(Direction.IN)]):
        call = OpenSession(context=context, uuid=HELLO)
        driven.driver.start(call)
        rpc = serve_until(driven, RpcCommand.LOAD_TA)
        size = rpc.params[1]
        assert isinstance(size, MemRef)
        driven.driver.answer(rpc, RpcReply(0, [rpc.params[0], MemRef(Direction.OUT, None, 0, 5000)]))
        alloc = serve_until(driven, RpcCommand.SHM_ALLOC)
        driven.driver.answer(alloc, RpcReply(0, list(params)))
        assert driven.take(RpcWithdrawn).rpc is alloc
        driven.driver.answer(alloc, RpcReply(0, []))
        assert driven.end_of(call).code != Result.SUCCESS
    assert path.partition.usage()["threads"] == 0


def test_too_little_memory_and_a_cancel_while_memory_is_lent() -> None:
    path = Path(soft_tee(built_in={}, keys=[KEYS.public]))
    driven = path.driver()
    context = driven.context()
    memory = driven.driver.allocate(8192)
    assert driven.call(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
    for size in (100, 8192):
        call = OpenSession(context=context, uuid=HELLO)
        driven.driver.start(call)
        rpc = serve_until(driven, RpcCommand.LOAD_TA)
        driven.driver.answer(rpc, RpcReply(0, [rpc.params[0], MemRef(Direction.OUT, None, 0, 5000)]))
        alloc = serve_until(driven, RpcCommand.SHM_ALLOC)
        driven.driver.answer(alloc, RpcReply(0, [MemRef(Direction.INOUT, memory, 0, size)]))
        if size == 8192:
            load = serve_until(driven, RpcCommand.LOAD_TA)
            assert path.partition.usage()["lent"] == 1
            place = load.params[1]
            assert isinstance(place, MemRef)
            assert place.memory is memory
            driven.driver.cancel(call)
            driven.run(20)
            driven.driver.answer(load, RpcReply(Result.GENERIC))
        free = serve_until(driven, RpcCommand.SHM_FREE)
        freed = free.params[1]
        assert isinstance(freed, MemRef)
        assert freed.memory is memory
        driven.driver.answer(free, RpcReply())
        assert driven.end_of(call).code != Result.SUCCESS
        pages = 1 if size == 100 else 3  # the page of the message; then that of the CANCEL, and the memory
        assert path.partition.usage() == {"threads": 0, "sessions": 0, "regions": pages, "lent": 0}


def test_no_partition() -> None:
    machine = Machine()
    hypervisor, vm = Hypervisor(machine), Endpoint(1, machine)
    hypervisor.add(vm)
    machine.add(1, 0x4000_0000, 2)
    vm.map_buffers(0x4000_0000, 0x4000_1000)
    with pytest.raises(TeeError):
        FfaTeeDriver(vm, None)  # type: ignore[arg-type]


class Liar:
    """Changes what the partition answers, and the VM's shared memory with it."""

    def __init__(self, path: Path, rng: random.Random, often: float) -> None:
        self.path, self.rng, self.often = path, rng, often
        self.honest = path.partition.receive
        path.partition.receive = self.receive  # type: ignore[method-assign]

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        answer = self.honest(frame, vcpu)
        if answer.fid != fid(Ffa.MSG_SEND_DIRECT_RESP) or self.rng.random() > self.often:
            return answer
        memory, rng = self.path.guests[0].memory, self.rng
        words = list(answer[3:8])
        if rng.random() < 0.5:
            words[rng.randrange(5)] = rng.choice([0, 1, 2, 3, 0xFFFF_000D, rng.getrandbits(32)])
        for _ in range(rng.choice([0, 1, 3, 10])):
            memory[0x2000 + rng.randrange(0x3000) & ~7 | rng.randrange(2)] = rng.getrandbits(8)
        if rng.random() < 0.1:
            return rng.choice([Frame.of(Ffa.MSG_WAIT), Frame.failure(-2), Frame(0)])  # type: ignore[arg-type]
        return respond(frame, *words)


@pytest.mark.feature("FF-A: whatever OP-TEE's partition answers, the VM's driver ends every call")
@pytest.mark.parametrize("copies", [False, True])
@pytest.mark.parametrize("seed", range(30))
def test_a_partition_that_lies(seed: int, copies: bool) -> None:
    rng = random.Random(seed)
    path = Path(soft_tee(built_in=examples.built_in("probe"), keys=[KEYS.public]), vms=2)
    path.partition.proxies = {1: {2}}
    theirs = path.guests[1]
    handles = [share(theirs.endpoint, 0x8001, [Range(theirs.base + page * 4096, 4096)]) for page in range(2, 6)]
    driven = path.driver(copies=copies)
    driver = driven.driver
    liar = Liar(path, rng, 0.3)
    started: list[Any] = []
    ended: list[Done] = []
    contexts: list[object] = [driven.context()]
    sessions: list[object] = []
    memories: list[Memory] = []

    def run() -> None:
        for _ in range(20):
            driver.run()
        for event in driven.events:
            if isinstance(event, Done):
                ended.append(event)
                if isinstance(event.call, OpenSession) and event.value is not None:
                    sessions.append(event.value)
                if isinstance(event.call, OpenContext):
                    contexts.append(event.value)
            elif isinstance(event, Rpc):
                driver.answer(event, RpcReply(rng.choice([0, Result.GENERIC]), list(event.params)))
        driven.events.clear()

    for _ in range(80):
        context = rng.choice(contexts)
        named = Memory(size=4096, ffa=FfaShare(rng.choice(handles), owner=2))
        memories.append(rng.choice([named, Memory.of(bytearray(4096)) if copies else driver.allocate(4096)]))
        session = rng.choice(sessions) if sessions else None
        call: Any = rng.choice(
            [
                OpenContext(),
                OpenSession(context=context, uuid=rng.choice([PROBE, HELLO])),
                Invoke(session=session, func=2, params=[temporary(bytes(5000)), Value(Direction.IN, 1)]),
                Invoke(session=session, func=4, params=[Value(Direction.IN, 1)]),
                CloseSession(session=session),
                RegisterMemory(context=context, memory=memories[-1]),
                UnregisterMemory(context=context, memory=rng.choice(memories)),
                CloseContext(context=context),
            ]
        )
        started.append(call)
        driver.start(call)
        if rng.random() < 0.2:
            driver.cancel(call)
        run()
    assert len(ended) > 20
    driver.close()
    run()
    liar.often = 0
    assert [c for c in started if sum(d.call is c for d in ended) != 1] == []
    assert driver.usage()["calls"] == driver.usage()["rpcs"] == 0
