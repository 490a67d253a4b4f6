"""TAs loaded over RPC, from honest and from other supplicants."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest

from tee import package
from tee.calls import CloseContext, Invoke, OpenSession, UnregisterMemory
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcCommand, RpcReply, ShmType
from tee.soft import examples
from tee.soft.loader import FREE_TIMEOUT
from tests.tee.bench import HELLO, IDLE, Bench, Courier

LOAD, ALLOC, FREE = RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE
OTHER = UUID(int=0xABCD)


@pytest.fixture
def hello(keys: package.KeyPair) -> bytes:
    return package.sign(examples.source("hello_world"), HELLO, 1, keys.private)


@pytest.fixture
def bench(keys: package.KeyPair) -> Bench:
    return Bench(built_in={}, keys=[keys.public])


class Load:
    """One OpenSession of hello world, and the courier that serves it."""

    def __init__(self, bench: Bench, data: bytes, uuid: UUID = HELLO) -> None:
        self.bench = bench
        self.courier = Courier(bench, data)
        self.context = bench.context()
        self.call = bench.start(OpenSession(context=self.context, uuid=uuid))

    def result(self, change: Callable[[Rpc, RpcReply], RpcReply | None] | None = None) -> tuple[int, int]:
        self.courier.serve(change)
        done = self.bench.finish(self.call)
        assert self.courier.held == [], "shared memory was not freed"
        return done.code, done.origin

    def commands(self) -> list[int]:
        return [rpc.command for rpc in self.bench.rpcs()]


def on(command: int, make: Callable[[Rpc, RpcReply], RpcReply | None]) -> Callable[[Rpc, RpcReply], RpcReply | None]:
    """Change the answers to one command."""
    return lambda rpc, reply: make(rpc, reply) if rpc.command == command else reply


def size_of(size: int, *, query: bool) -> Callable[[Rpc, RpcReply], RpcReply | None]:
    """Change the size that LOAD_TA answers, without memory or with it."""

    def change(rpc: Rpc, reply: RpcReply) -> RpcReply | None:
        if rpc.command == LOAD and (rpc.params[1].memory is None) == query:  # type: ignore[union-attr]
            reply.params[1].size = size  # type: ignore[union-attr]
        return reply

    return change


def test_conversation_is_optees(bench: Bench, hello: bytes) -> None:
    load = Load(bench, hello)
    assert load.result() == (Result.SUCCESS, Origin.TRUSTED_APP)
    query, alloc, fetch, free = bench.rpcs()
    low, high = (int.from_bytes(half, "little") for half in (HELLO.bytes[:8], HELLO.bytes[8:]))
    assert query.command == fetch.command == LOAD
    assert query.params == [Value(Direction.IN, low, high), MemRef(Direction.OUT, None)]
    assert low == 0xE4115024_00F2AA8A  # 8aaaf200-2450-11e4: octets 8a aa f2 00 24 50 11 e4
    assert alloc.params == [Value(Direction.IN, ShmType.APPLICATION, len(hello), 8)]
    assert fetch.params[0] == query.params[0]
    target = fetch.params[1]
    assert isinstance(target, MemRef)
    assert (target.direction, target.size) == (Direction.OUT, len(hello))
    assert free.params[0] == Value(Direction.IN, ShmType.APPLICATION)
    assert all(rpc.call is load.call for rpc in (query, alloc, fetch, free))
    value = Value(Direction.INOUT, 1)
    session = bench.ended(load.call)
    assert session is not None
    assert bench.invoke(session.value, 0, value).code == Result.SUCCESS
    assert value.a == 2
    for context in (load.context, load.courier.context):
        bench.done(CloseContext(context=context))
    assert bench.tee.usage() == IDLE


def test_each_session_of_a_multi_instance_ta_loads_it_again(bench: Bench, hello: bytes) -> None:
    load = Load(bench, hello)
    load.result()
    load.call = bench.start(OpenSession(context=load.context, uuid=HELLO))
    assert load.result()[0] == Result.SUCCESS
    assert load.commands() == [LOAD, ALLOC, LOAD, FREE] * 2


def test_single_instance_is_loaded_once_even_by_two_at_once(bench: Bench, keys: package.KeyPair) -> None:
    source = b"""
from tee.soft.ta import *
class Single(TrustedApplication):
    uuid = UUID(int=0xABCD)
    single_instance = multi_session = True
    made = []
    async def create(self):
        self.made.append(self.env.version)
        assert self.made == [9]
"""
    load = Load(bench, package.sign(source, OTHER, 9, keys.private), OTHER)
    second = bench.start(OpenSession(context=load.context, uuid=OTHER))
    assert load.result()[0] == Result.SUCCESS
    assert bench.finish(second).code == Result.SUCCESS
    assert bench.tee.usage()["instances"] == 1
    assert load.commands().count(ALLOC) == 2
    bench.session(load.context, OTHER)
    assert load.commands().count(ALLOC) == 2


@pytest.mark.parametrize("name", examples.UUIDS)
def test_all_examples_are_payloads(bench: Bench, keys: package.KeyPair, name: str) -> None:
    uuid = examples.UUIDS[name]
    assert Load(bench, package.sign(examples.source(name), uuid, 1, keys.private), uuid).result()[0] == Result.SUCCESS


class TestPackages:
    def test_unsigned(self, bench: Bench) -> None:
        assert Load(bench, examples.source("hello_world")).result() == (Result.BAD_FORMAT, Origin.TEE)

    def test_nothing_runs_before_it_is_verified(self, bench: Bench) -> None:
        mallory = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
        data = package.sign(b"raise SystemExit('it ran')", HELLO, 1, mallory.private)
        assert Load(bench, data).result() == (Result.SECURITY, Origin.TEE)
        assert "it ran" not in " ".join(bench.logged)
        assert "no trusted key" in bench.logged[-1]

    def test_another_ta_under_this_name(self, bench: Bench, keys: package.KeyPair) -> None:
        data = package.sign(examples.source("random"), examples.UUIDS["random"], 1, keys.private)
        assert Load(bench, data).result() == (Result.SECURITY, Origin.TEE)

    @pytest.mark.parametrize("cut", [1, 10, 19, 20, 52, 116, 136, -1])
    def test_truncated(self, bench: Bench, hello: bytes, cut: int) -> None:
        assert Load(bench, hello[:cut]).result() == (Result.BAD_FORMAT, Origin.TEE)

    def test_flipped_bit(self, bench: Bench, hello: bytes) -> None:
        assert Load(bench, hello[:-1] + bytes([hello[-1] ^ 1])).result() == (Result.SECURITY, Origin.TEE)

    def test_no_keys(self, hello: bytes) -> None:
        assert Load(Bench(built_in={}), hello).result() == (Result.SECURITY, Origin.TEE)

    @pytest.mark.parametrize(
        ("source", "code"),
        [
            (b"1 +", Result.BAD_FORMAT),
            (b"\xff\xfe", Result.BAD_FORMAT),
            (b"x = 1", Result.BAD_FORMAT),
            (b"raise ValueError", Result.BAD_FORMAT),
            (b"raise SystemExit", Result.BAD_FORMAT),
            (b"from tee.soft.ta import *", Result.BAD_FORMAT),
            (b"from tee.soft.ta import *\nclass A(TrustedApplication): pass", Result.SECURITY),
            (b"from tee.soft.ta import *\nclass A(TrustedApplication): uuid = UUID(int=4)", Result.SECURITY),
            (
                b"from tee.soft.ta import *\nclass A(TrustedApplication): uuid = UUID(int=0xabcd)\nclass B(A): pass",
                Result.BAD_FORMAT,
            ),
        ],
    )
    def test_payload_that_is_no_ta(self, bench: Bench, keys: package.KeyPair, source: bytes, code: int) -> None:
        data = package.sign(source, OTHER, 1, keys.private)
        assert Load(bench, data, OTHER).result() == (code, Origin.TEE)

    @pytest.mark.parametrize(
        "source",
        [
            "class A(TrustedApplication): uuid = UUID(int=0xabcd)\nclass B(A): uuid = UUID(int=3)\nTA = A",
            "from tee.soft.examples.probe import Probe\nclass A(TrustedApplication): uuid = UUID(int=0xabcd)",
            "from dataclasses import dataclass\n@dataclass\nclass D:\n    x: 'int' = 1\n"
            "class A(TrustedApplication): uuid = UUID(int=0xabcd)",
        ],
    )
    def test_payload_with_more_classes(self, bench: Bench, keys: package.KeyPair, source: str) -> None:
        data = package.sign(f"from tee.soft.ta import *\n{source}".encode(), OTHER, 1, keys.private)
        assert Load(bench, data, OTHER).result()[0] == Result.SUCCESS

    def test_modules_leave_nothing_behind(self, bench: Bench, hello: bytes) -> None:
        import sys

        before = set(sys.modules)
        Load(bench, hello).result()
        assert {name for name in set(sys.modules) - before if "virtio_tee_ta" in name} == set()


class TestSupplicant:
    """Supplicants that fail, lie, or die."""

    def test_has_no_such_ta(self, bench: Bench) -> None:
        load = Load(bench, b"")
        assert load.result(on(LOAD, lambda *_: RpcReply(Result.ITEM_NOT_FOUND))) == (Result.ITEM_NOT_FOUND, Origin.TEE)
        assert load.commands() == [LOAD]

    @pytest.mark.parametrize("command", [LOAD, ALLOC])
    @pytest.mark.parametrize(
        ("given", "seen"),
        [
            (Result.COMMUNICATION, Result.COMMUNICATION),
            (Result.OUT_OF_MEMORY, Result.OUT_OF_MEMORY),
            (Result.TARGET_DEAD, Result.GENERIC),
            (0x12345, Result.GENERIC),
            (-1, Result.GENERIC),
        ],
    )
    def test_fails(self, bench: Bench, hello: bytes, command: int, given: int, seen: int) -> None:
        load = Load(bench, hello)

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            load.courier.held.clear()
            return RpcReply(given)

        assert load.result(on(command, change)) == (seen, Origin.TEE)

    def test_dies_in_load_ta(self, bench: Bench, hello: bytes) -> None:
        """The second LOAD_TA is answered by the kernel, for a supplicant that is dead; so is SHM_FREE."""
        load = Load(bench, hello)

        def dead(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if rpc.command == LOAD and rpc.params[1].memory is None:  # type: ignore[union-attr]
                return reply
            return reply if rpc.command == ALLOC else RpcReply(Result.COMMUNICATION)

        assert load.result(dead) == (Result.COMMUNICATION, Origin.TEE)
        assert load.commands() == [LOAD, ALLOC, LOAD, FREE]
        assert bench.tee.usage()["threads_busy"] == 0

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            (size_of(0, query=True), Result.BAD_FORMAT),
            (size_of((16 << 20) + 1, query=True), Result.OUT_OF_MEMORY),
            (size_of(1 << 64, query=True), Result.OUT_OF_MEMORY),
            (size_of(-1, query=True), Result.COMMUNICATION),
            (size_of(100, query=False), Result.BAD_FORMAT),
            (size_of(0, query=False), Result.BAD_FORMAT),
            (size_of(1 << 63, query=False), Result.COMMUNICATION),
        ],
        ids=str,
    )
    def test_lies_about_sizes(self, bench: Bench, hello: bytes, change: Any, code: int) -> None:
        assert Load(bench, hello).result(change) == (code, Origin.TEE)

    def test_size_above_the_true_one(self, bench: Bench, hello: bytes) -> None:
        """More was said, and allocated, than there is: what counts is what LOAD_TA says in the end."""
        assert Load(bench, hello).result(size_of(len(hello) + 50, query=True))[0] == Result.SUCCESS

    def test_nothing_is_allocated_for_a_size_above_the_limit(self, keys: package.KeyPair, hello: bytes) -> None:
        load = Load(Bench(built_in={}, keys=[keys.public], max_ta_size=len(hello) - 1), hello)
        assert load.result()[0] == Result.OUT_OF_MEMORY
        assert load.commands() == [LOAD]
        load = Load(Bench(built_in={}, keys=[keys.public], max_ta_size=len(hello)), hello)
        assert load.result()[0] == Result.SUCCESS

    def test_ta_grows_between_the_two(self, bench: Bench, hello: bytes) -> None:
        load = Load(bench, hello)

        def grow(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if rpc.params[1].memory is not None:  # type: ignore[union-attr]
                reply.params[1].size += 1  # type: ignore[union-attr]
            return reply

        assert load.result(on(LOAD, grow)) == (Result.COMMUNICATION, Origin.TEE)

    @pytest.mark.parametrize(
        "params",
        [
            [],
            [Value(Direction.IN)],
            [Value(Direction.IN), Value(Direction.OUT)],
            [Value(Direction.IN), MemRef(Direction.IN, None, 0, 5)],
            [Value(Direction.IN), MemRef(Direction.OUT, None, 0, 5), Value(Direction.IN)],
            [Value(Direction.IN), MemRef(Direction.OUT, None, 0, "5")],  # type: ignore[arg-type]
        ],
    )
    def test_load_ta_answered_with_nonsense(self, bench: Bench, hello: bytes, params: Any) -> None:
        load = Load(bench, hello)
        assert load.result(on(LOAD, lambda *_: RpcReply(params=params))) == (Result.COMMUNICATION, Origin.TEE)

    @pytest.mark.parametrize(
        "params",
        [
            [],
            [Value(Direction.IN)],
            [MemRef(Direction.INOUT, None, 0, 5000)],
            [MemRef(Direction.INOUT, Memory(), 0, 0)],
        ],
    )
    def test_shm_alloc_answered_without_memory(self, bench: Bench, hello: bytes, params: Any) -> None:
        load = Load(bench, hello)

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            load.courier.held.clear()
            return RpcReply(params=params)

        assert load.result(on(ALLOC, change)) == (Result.COMMUNICATION, Origin.TEE)
        assert load.commands() == [LOAD, ALLOC]

    @pytest.mark.parametrize("what", ["too small", "outside", "negative", "read-only"])
    def test_memory_that_does_not_do(self, bench: Bench, hello: bytes, what: str) -> None:
        load = Load(bench, hello)

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            reference = reply.params[0]
            assert isinstance(reference, MemRef)
            assert reference.memory is not None
            if what == "too small":
                reference.size -= 1
            elif what == "outside":
                reference.offset = 1
            elif what == "negative":
                reference.offset = -1
                load.courier.held.clear()
            else:
                reference.memory.read_only = True
            return reply

        assert load.result(on(ALLOC, change)) == (Result.COMMUNICATION, Origin.TEE)

    @pytest.mark.parametrize("what", ["temporary", "another machine", "another TEE", "withdrawn"])
    def test_foreign_memory(self, bench: Bench, hello: bytes, what: str) -> None:
        """Memory that is not the caller's machine's is neither used nor given back."""
        load = Load(bench, hello)
        other = Bench()
        holder = bench.context()
        memory = {
            "temporary": lambda: Memory.of(bytearray(1 << 16)),
            "another machine": lambda: bench.registered(bench.context("vm2"), 1 << 16),
            "another TEE": lambda: other.registered(other.context(), 1 << 16),
            "withdrawn": lambda: bench.registered(holder, 1 << 16),
        }[what]()
        if what == "withdrawn":
            registration = memory.handle
            bench.done(UnregisterMemory(context=holder, memory=memory))
            memory.handle = registration

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            load.courier.held.clear()
            return RpcReply(params=[MemRef(Direction.INOUT, memory, 0, 1 << 16)])

        assert load.result(on(ALLOC, change)) == (Result.COMMUNICATION, Origin.TEE)
        assert load.commands() == [LOAD, ALLOC]
        assert memory.read(0, 100) == bytes(100)

    def test_answers_twice(self, bench: Bench, hello: bytes) -> None:
        load = Load(bench, hello)

        def twice(rpc: Rpc, reply: RpcReply) -> RpcReply:
            bench.tee.answer(rpc, reply)
            return RpcReply(Result.ITEM_NOT_FOUND)

        assert load.result(twice)[0] == Result.SUCCESS
        assert load.commands() == [LOAD, ALLOC, LOAD, FREE]

    def test_memory_offset(self, bench: Bench, hello: bytes) -> None:
        """The supplicant may hand out a part of its memory."""
        load = Load(bench, hello)

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            memory = bench.registered(load.courier.context, len(hello) + 100)
            load.courier.held[:] = [memory]
            return RpcReply(params=[MemRef(Direction.INOUT, memory, 60, len(hello))])

        assert load.result(on(ALLOC, change))[0] == Result.SUCCESS

    def test_memory_is_unregistered_while_it_is_loaded_into(self, bench: Bench, hello: bytes) -> None:
        load = Load(bench, hello)
        unregister: list[UnregisterMemory] = []

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if rpc.params[1].memory is not None:  # type: ignore[union-attr]
                call = UnregisterMemory(context=load.courier.context, memory=load.courier.held[0])
                unregister.append(bench.start(call))
                bench.run()
                assert bench.ended(call) is None
            return reply

        assert load.result(on(LOAD, change))[0] == Result.SUCCESS
        assert bench.finish(unregister[0]).code == Result.SUCCESS


class TestCancel:
    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_withdraws_the_rpc_and_frees_the_memory(self, bench: Bench, hello: bytes, at: int) -> None:
        load = Load(bench, hello)
        late: list[tuple[Rpc, RpcReply]] = []

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply | None:
            if bench.rpcs().index(rpc) != at:
                return reply
            bench.tee.cancel(load.call)
            late.append((rpc, reply))
            if rpc.command == ALLOC:
                load.courier.held.clear()  # the answer never counts: the supplicant's own side frees it
            return None

        assert load.result(change) == (Result.CANCEL, Origin.TEE)
        assert bench.withdrawn() == [late[0][0]]
        assert load.commands()[-1] == (FREE if at == 2 else load.commands()[at])
        events = len(bench.events)
        bench.tee.answer(*late[0])
        bench.run()
        assert len(bench.events) == events

    def test_in_shm_free_does_nothing(self, bench: Bench, hello: bytes) -> None:
        load = Load(bench, hello)

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            bench.tee.cancel(load.call)
            bench.run()
            return reply

        assert load.result(on(FREE, change)) == (Result.CANCEL, Origin.TEE)
        assert bench.withdrawn() == []
        assert bench.tee.usage()["sessions"] == 0

    def test_closing_the_context(self, bench: Bench, hello: bytes) -> None:
        load = Load(bench, hello)
        closing: list[CloseContext] = []

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply | None:
            if rpc.command != LOAD or rpc.params[1].memory is None:  # type: ignore[union-attr]
                return reply
            closing.append(bench.start(CloseContext(context=load.context)))
            return None

        assert load.result(change) == (Result.CANCEL, Origin.TEE)
        assert load.commands() == [LOAD, ALLOC, LOAD, FREE]
        assert bench.finish(closing[0]).code == Result.SUCCESS

    def test_shm_free_that_is_never_answered_holds_no_context(self, bench: Bench, hello: bytes) -> None:
        load = Load(bench, hello)
        load.courier.serve(on(FREE, lambda *_: None))
        closing = bench.start(CloseContext(context=load.context))
        assert bench.run() == FREE_TIMEOUT
        bench.now += FREE_TIMEOUT
        assert bench.finish(closing).code == Result.SUCCESS
        assert bench.tee.usage() | {"contexts": 0, "registrations": 0} == IDLE
        assert bench.withdrawn() == [bench.rpcs()[-1]]

    def test_loading_blocks_nobody_else(self, bench: Bench, hello: bytes) -> None:
        """One guest's supplicant is silent; another opens the same TA."""
        silent = Load(bench, hello)
        bench.run()
        second = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.run()
        silent.courier.served = 1  # the first RPC stays without an answer
        silent.courier.serve()
        assert bench.finish(second).code == Result.SUCCESS
        assert bench.ended(silent.call) is None
        assert bench.invoke(bench.ended(second).value, 0, Value(Direction.INOUT)).code == Result.SUCCESS  # type: ignore[union-attr]


def test_session_of_a_cancelled_load_is_not_invoked(bench: Bench, hello: bytes) -> None:
    load = Load(bench, hello)
    bench.tee.cancel(load.call)
    assert load.result()[0] == Result.CANCEL
    assert bench.done(Invoke(session=None, func=0)).code == Result.BAD_PARAMETERS
