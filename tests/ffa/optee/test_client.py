"""The VM's driver: the contract's rules, and partitions that break every rule."""

from __future__ import annotations

import random
from typing import Any

import pytest

from ffa.abi.frame import Frame
from ffa.abi.ids import Call as Ffa
from ffa.abi.ids import fid
from ffa.optee.client import LOOK_S, POLL_S, FfaTeeDriver, share
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
from tee.results import Origin, Result, TeeError
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


WELL = (Result.SUCCESS, Origin.TRUSTED_APP)


def test_at_once() -> None:
    path = Path()
    driven = path.driver()
    driver, context = driven.driver, driven.context()
    session, memory = driven.session(context, PROBE), driver.allocate(5000)
    assert driven.call(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
    before = path.tee.usage()
    assert driver.invoke_at_once(session, 0, ()) == WELL
    values = [Value(Direction.IN, 2), Value(Direction.OUT), Value(Direction.INOUT, 4, 5)]
    assert driver.invoke_at_once(session, 1, values) == WELL
    assert [(v.a, v.b, v.c) for v in values[1:]] == [(0, 0, 2), (4, 5, 9)]
    for _ in range(2):  # the partition registers it with the TEE, and then knows it
        assert driver.invoke_at_once(session, 3, [MemRef(Direction.INOUT, memory, 0, 5000)]) == WELL
    assert (memory.read(0, 1), memory.read(4096, 1)) == (b"\2", b"\2")
    data = temporary(b"abc")
    assert driver.invoke_at_once(session, 2, [data, Value(Direction.IN, 1)]) == WELL
    assert data.memory is not None
    assert data.memory.read(0, 3) == b"`cb"
    room = temporary(bytes(4), Direction.OUT)
    outcome = driver.invoke_at_once(session, 5, [room, Value(Direction.IN, 9)])
    assert (outcome, room.size) == ((Result.SHORT_BUFFER, Origin.TRUSTED_APP), 9)
    driven.run()
    assert driven.events == []
    assert path.partition.usage()["threads"] == driver.usage()["calls"] == 0
    assert path.tee.usage() == {**before, "registrations": 1}
    assert path.partition.usage()["regions"] == len(path.hypervisor.transactions.regions)


def test_what_is_begun_at_once_and_waits() -> None:
    path = Path()
    driven = path.driver()
    driver, session = driven.driver, driven.session(driven.context(), PROBE)
    params = [Value(Direction.IN, 0)]
    begun = driver.invoke_at_once(session, 4, params)
    assert begun is not None
    assert not isinstance(begun, tuple)
    call = Invoke(session=session, func=4, params=params)
    begun.becomes(call)
    driven.run(5)
    assert driver.usage()["calls"] == path.partition.usage()["threads"] == 1
    assert driver.invoke_at_once(session, 0, ()) is None  # others have their turn
    driver.cancel(call)
    assert driven.end_of(call).code == Result.CANCEL
    assert driver.usage()["calls"] == path.partition.usage()["threads"] == 0
    assert driver.invoke_at_once(session, 0, ()) == WELL


def test_what_does_not_begin_at_once() -> None:
    path = Path(vms=2, limits=Limits(threads_per_vm=1))
    driven, other = path.driver(), path.driver(1)
    driver, context = driven.driver, driven.context()
    session, theirs = (d.session(c, PROBE) for d, c in ((driven, context), (other, other.context())))
    for handle, func, params in (
        (theirs, 0, []),
        (None, 0, []),
        (context, 0, []),
        (session, 1 << 32, []),
        (session, -1, []),
        (session, 1, [Value(Direction.IN)] * 5),
        (session, 1, [Value(Direction.IN, 1 << 64)]),
        (session, 3, [temporary(bytes(9 << 20))]),
        (session, 3, [MemRef(Direction.IN, Memory.of(bytearray(5)), 3, 3)]),
    ):
        assert driver.invoke_at_once(handle, func, params) is None
    busy = driven.session(context, PROBE)
    waits = Invoke(session=busy, func=4, params=[Value(Direction.IN, 0)])
    begun = driver.invoke_at_once(busy, 4, waits.params)
    assert begun is not None
    assert not isinstance(begun, tuple)
    begun.becomes(waits)
    driver._runnable.clear()  # as if nothing waited in this VM: the partition has no thread left all the same
    assert driver.invoke_at_once(session, 0, ()) is None
    driver._runnable.append(driver._flights[waits])
    driver.cancel(waits)
    assert driven.end_of(waits).code == Result.CANCEL
    assert driven.call(CloseSession(session=session)).code == Result.SUCCESS
    assert driver.invoke_at_once(session, 0, ()) is None
    driver.close()
    assert driver.invoke_at_once(busy, 0, ()) is None


def begin(driver: FfaTeeDriver, call: Invoke) -> None:
    """Begins a call at once that waits."""
    begun = driver.invoke_at_once(call.session, call.func, call.params)
    assert begun is not None
    assert not isinstance(begun, tuple)
    begun.becomes(call)


def test_at_once_on_a_copy_of_memory_that_is_not_the_vms() -> None:
    """It is brought up to date before an invoke and after it, be it over at once or not."""
    path = Path()
    driven = path.driver(copies=True)
    driver, context = driven.driver, driven.context()
    session, memory = driven.session(context, PROBE), Memory.of(bytearray(b"before" * 1000))
    assert driven.call(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
    flip = [MemRef(Direction.INOUT, memory, 2, 3), Value(Direction.IN, 0xFF)]
    for expected in (bytes(b ^ 0xFF for b in b"for"), b"for"):
        assert driver.invoke_at_once(session, 2, flip) == WELL
        assert memory.read(0, 6) == b"be" + expected + b"e"
    memory.write(2, b"\1")
    read_only = MemRef(Direction.IN, memory, 0, 6)
    assert driver.invoke_at_once(session, 11, [read_only, temporary(bytes(32), Direction.OUT)]) == WELL
    held = Value(Direction.INOUT, 1)
    call = Invoke(session=session, func=8, params=[MemRef(Direction.INOUT, memory, 2, 3), held])
    begin(driver, call)
    assert driven.end_of(call).code == Result.SUCCESS
    assert held.a == 1
    assert memory.read(0, 6) == b"be\1ore"
    assert driver.invoke_at_once(session, 2, flip) == WELL
    assert driven.call(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS
    driver.close()
    assert not path.hypervisor.transactions.regions


def test_what_waits_brings_its_outputs_and_ends_with_its_context() -> None:
    path = Path()
    driven = path.driver()
    driver, context = driven.driver, driven.context()
    session, memory = driven.session(context, PROBE), driver.allocate(100)
    assert driven.call(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
    assert driver.invoke_at_once(session, 3, [MemRef(Direction.INOUT, memory, 0, 10)]) == WELL
    memory.write(0, b"\1")
    held = Value(Direction.INOUT, 1)
    call = Invoke(session=session, func=8, params=[MemRef(Direction.INOUT, memory, 0, 10), held])
    begin(driver, call)
    memory.write(0, b"\2")
    assert driven.end_of(call).code == Result.SUCCESS
    assert (held.a, held.b) == (1, 2)  # what it saw before it waited, and after
    begin(driver, Invoke(session=session, func=4, params=[Value(Direction.IN, 0)]))
    assert driven.call(CloseContext(context=context)).code == Result.SUCCESS
    assert [e.code for e in driven.events if isinstance(e, Done)] == [Result.CANCEL]
    driver.close()
    assert not path.hypervisor.transactions.regions


def test_nonsense_in_answer_to_what_begins_at_once() -> None:
    path = Path()
    driven = path.driver()
    driver, session = driven.driver, driven.session(driven.context(), PROBE)
    regions, honest = path.hypervisor.transactions.regions, path.partition.receive
    assert driver.invoke_at_once(session, 0, ()) == WELL
    before = len(regions)
    refused = [temporary(b"abc"), Value(Direction.IN, 1 << 64)]
    assert driver.invoke_at_once(session, 2, refused) is None
    driven.run()
    assert len(regions) == before  # the first one's copy is shared no more

    def answer(*words: int) -> None:
        path.partition.receive = lambda frame, vcpu: respond(frame, *words)  # type: ignore[method-assign]

    answer(0, 7)
    call = Invoke(session=session, func=0)
    begin(driver, call)
    done = driven.end_of(call)
    assert (done.code, done.may_have_run) == (Result.COMMUNICATION, True)
    for words in ((Result.GENERIC,), (0xFFFF_0000, 0, 0, 0, 0)):
        answer(*words)
        assert driver.invoke_at_once(session, 0, ()) == (Result.COMMUNICATION, Origin.COMMS)
    path.partition.receive = lambda frame, vcpu: Frame.of(Ffa.MSG_WAIT)  # type: ignore[method-assign]
    assert driver.invoke_at_once(session, 0, ()) == (Result.COMMUNICATION, Origin.COMMS)

    def other_types(frame: Frame, vcpu: int) -> Frame:
        found = honest(frame, vcpu)
        for at in range(0x2000, 0x6000, 0x1000):  # a message's first parameter: of no type now
            path.guests[0].memory[at + 32] = 0
        return found

    path.partition.receive = other_types  # type: ignore[method-assign]
    value = Value(Direction.OUT)
    params = [Value(Direction.IN, 2), value, Value(Direction.INOUT, 4, 5)]
    call = Invoke(session=session, func=1, params=params)
    begin(driver, call)
    done = driven.end_of(call)
    assert (done.code, done.may_have_run) == (Result.COMMUNICATION, True)
    assert value == Value(Direction.OUT)
    path.partition.receive = honest  # type: ignore[method-assign]
    driven.run()
    assert len(regions) == 0  # no page of a call that may still run is used again
    assert driver.invoke_at_once(session, 0, ()) == WELL


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_how_often_it_looks_for_notifications() -> None:
    """Not more than once a millisecond, however many calls there are; once more soon after the last of them."""
    path, clock = Path(), Clock()
    guest = path.guests[0]
    driver = FfaTeeDriver(guest.endpoint, guest.arena(), clock=clock)
    driven = Driven(driver)
    session = driven.session(driven.context(), PROBE)
    looks: list[float] = []
    honest = path.hypervisor.notification_get

    def look(*arguments: Any) -> Frame:
        looks.append(clock.now)
        return honest(*arguments)

    path.hypervisor.notification_get = look  # type: ignore[method-assign]
    for _ in range(100):
        clock.now += LOOK_S / 10
        assert driven.call(Invoke(session=session, func=0)).code == Result.SUCCESS
    assert 9 <= len(looks) <= 11
    left = driver.run()
    while left == 0:
        left = driver.run()
    assert left is not None
    assert left <= LOOK_S * 1.001
    clock.now += LOOK_S
    del looks[:]
    assert driver.run() == POLL_S
    assert len(looks) == 1


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
        begun = None
        if isinstance(call, Invoke) and rng.random() < 0.5:
            begun = driver.invoke_at_once(call.session, call.func, call.params)
            if isinstance(begun, tuple):
                continue  # it has ended, and that was all
        started.append(call)
        if begun is None:
            driver.start(call)
        else:
            begun.becomes(call)
        if rng.random() < 0.2:
            driver.cancel(call)
        run()
    assert len(ended) > 20
    driver.close()
    run()
    liar.often = 0
    assert [c for c in started if sum(d.call is c for d in ended) != 1] == []
    assert driver.usage()["calls"] == driver.usage()["rpcs"] == 0
