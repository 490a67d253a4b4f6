"""Server enclaves by the pseudo-TA, and by TAs."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest

from tee.calls import Client as Caller
from tee.calls import CloseContext, CloseSession, Invoke, Login
from tee.driver import Done
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.services import MAX_CHAIN, SERVICES_UUID, CallFrame, CallReturn, Command, EnclaveFlag
from tee.soft.enclaves import EnclavePolicy, SharedNames
from tee.soft.limits import SoftLimits
from tee.soft.ta import MemoryReference, Parameters, TrustedApplication
from tests.tee.bench import IDLE, Bench
from tests.tee.soft.servers import LOADED, SERVERS, Faulty, Plain, Server, Wrong, packed, vendor
from tests.tee.soft.test_services import Client as Services
from tests.tee.soft.test_services import content, given

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
VENDOR = vendor()


class Front(TrustedApplication):
    """A TA that calls an enclave for its client, by the name in its parameter."""

    uuid = UUID(int=410)
    single_instance = multi_session = True

    async def invoke(self, session: object, command: int, params: Parameters) -> None:
        server = self.env.acquire(params.memory(0, IN).read().decode())
        value = params.value(1, INOUT)
        value.a = (await server.call(command, value.a)).value
        await server.release()


class Back(Front):
    uuid = UUID(int=411)


class Client(Services):
    """A client that creates, acquires and calls."""

    def create(self, name: bytes, uuid: UUID = Server.uuid, flags: int = 0) -> Done:
        self.value = Value(INOUT, flags)
        return self.ask(Command.ENCLAVE_CREATE, given(uuid.bytes), given(name), self.value)

    def created(self, name: bytes, uuid: UUID = Server.uuid, flags: int = 0) -> int:
        assert self.create(name, uuid, flags).code == Result.SUCCESS
        return self.value.a

    def destroy(self, enclave: int) -> Done:
        return self.ask(Command.ENCLAVE_DESTROY, Value(IN, enclave))

    def acquire(self, name: bytes) -> Done:
        self.value = Value(OUT)
        return self.ask(Command.ENCLAVE_ACQUIRE, given(name), self.value)

    def acquired(self, name: bytes) -> int:
        assert self.acquire(name).code == Result.SUCCESS
        return self.value.a

    def release(self, server: int) -> Done:
        return self.ask(Command.ENCLAVE_RELEASE, Value(IN, server))

    def start(self, server: int, *regs: int, memory: Param | None = None) -> tuple[Any, MemRef]:
        frame = given(CallFrame.build({"regs": [*regs, *(0,) * (8 - len(regs))]}), INOUT)
        params: list[Param] = [Value(IN, server), frame]
        return self.begin(Command.ENCLAVE_CALL, *params, *([] if memory is None else [memory])), frame

    def call(self, server: int, *regs: int, memory: Param | None = None) -> tuple[Done, Sequence[int]]:
        call, frame = self.start(server, *regs, memory=memory)
        done = self.bench.finish(call)
        return done, list(CallFrame.parse(content(frame)).regs)


async def add(server: Server, client: Caller, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
    return CallReturn(regs[1] + regs[2])


async def hold(server: Server, client: Caller, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
    """Waits, for regs[1] seconds; with regs[2] a cancel reaches it."""
    if regs[2]:
        server.env.unmask_cancellation()
    await server.env.sleep(regs[1])
    return CallReturn(99)


async def double(server: Server, client: Caller, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
    assert memory is not None
    data = memory.read()
    memory.write(bytes(2 * byte for byte in data))
    return CallReturn(len(data), 1, len(data) - 1)


async def onward(server: Server, client: Caller, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
    """Calls the enclave named by the number regs[1], which does the same until regs[2] are called."""
    if regs[1] >= regs[2]:
        return CallReturn(regs[1])
    found = server.env.acquire(f"e{regs[1] + 1}")
    return await found.call(regs[0], regs[1] + 1, regs[2], memory=memory)


async def fail(server: Server, client: Caller, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
    raise TeeError(regs[1])


async def panic(server: Server, client: Caller, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
    raise ZeroDivisionError


ADD, HOLD, DOUBLE, ONWARD, FAIL, PANIC, OTHER = range(7)


@pytest.fixture(autouse=True)
def acts() -> None:
    Server.acts = {ADD: add, HOLD: hold, DOUBLE: double, ONWARD: onward, FAIL: fail, PANIC: panic}
    Server.ended = []


def bench_of(**options: Any) -> Bench:
    return Bench(built_in={**SERVERS, Front.uuid: Front, Back.uuid: Back}, keys=[VENDOR.public], **options)


@pytest.fixture
def bench() -> Bench:
    return bench_of()


@pytest.fixture
def client(bench: Bench) -> Client:
    return Client(bench)


class TestNames:
    @pytest.mark.parametrize("name", [b"", b"\0", bytes(64), b"a\0b", b"\xff", b"x" * 65, b"x" * 64 + b"\0", b"\xc3"])
    def test_what_is_no_name(self, client: Client, name: bytes) -> None:
        for done in (client.create(name), client.acquire(name)):
            assert (done.code, done.origin) == (Result.BAD_FORMAT, Origin.TEE)
        assert client.bench.tee.usage()["enclaves"] == 0

    @pytest.mark.parametrize("name", [b"x", b"x" * 64, "é".encode(), b"x\0\0", b"x".ljust(64, b"\0")])
    def test_names(self, client: Client, name: bytes) -> None:
        client.created(name)
        assert client.create(name).code == Result.BUSY
        assert client.call(client.acquired(name.rstrip(b"\0")), ADD, 1, 2)[1][0] == 3

    def test_flags(self, client: Client) -> None:
        for flags in (2, 1 << 32, 3):
            assert client.create(b"x", flags=flags).code == Result.BAD_FORMAT

    def test_a_name_is_free_again(self, client: Client) -> None:
        first = client.created(b"x")
        assert client.destroy(first).code == Result.SUCCESS
        assert client.acquire(b"x").code == Result.ITEM_NOT_FOUND
        assert client.created(b"x") > first
        assert client.destroy(first).code == Result.BAD_PARAMETERS


class TestCreate:
    def test_services_that_are_none(self, client: Client) -> None:
        done = client.create(b"x", UUID(int=9))
        assert (done.code, done.origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)
        assert client.create(b"x", Plain.uuid).code == Result.NOT_SUPPORTED
        assert client.create(b"x", SERVICES_UUID).code == Result.NOT_SUPPORTED
        assert client.create(b"x", Faulty.uuid).code == Result.STORAGE_NO_SPACE
        assert client.create(b"x", Wrong.uuid).code == Result.TARGET_DEAD
        client.created(b"x")

    def test_a_loaded_service(self, client: Client) -> None:
        client.load(packed(VENDOR, 3))
        enclave = client.created(b"x", LOADED)
        assert client.remove().code == Result.BUSY
        assert client.load(packed(VENDOR, 4)).code == Result.SUCCESS
        assert client.call(client.acquired(b"x"))[1][0] == 3
        client.destroy(enclave)
        assert client.remove().code == Result.SUCCESS

    def test_limits(self) -> None:
        client = Client(bench_of(limits=SoftLimits(enclaves=1, servers=1)))
        client.created(b"x")
        assert client.create(b"y").code == Result.OUT_OF_MEMORY
        server = client.acquired(b"x")
        assert client.acquire(b"x").code == Result.OUT_OF_MEMORY
        other = Client(client.bench)  # of the same machine
        assert other.acquire(b"x").code == Result.OUT_OF_MEMORY
        client.release(server)
        other.acquired(b"x")
        other.close()
        client.acquired(b"x")

    @pytest.mark.parametrize("how", ["session", "context"])
    def test_it_ends_with_its_creator(self, bench: Bench, how: str) -> None:
        creator, other = Client(bench), Client(bench)
        creator.created(b"x")
        server = other.acquired(b"x")
        if how == "session":
            bench.done(CloseSession(session=creator.session))
        else:
            creator.close()
        assert Server.ended == ["destroy"]
        done, _ = other.call(server, ADD)
        assert (done.code, done.origin) == (Result.TARGET_DEAD, Origin.TEE)
        assert other.acquire(b"x").code == Result.ITEM_NOT_FOUND
        assert other.release(server).code == Result.SUCCESS
        bench.done(CloseContext(context=other.context))
        if how == "session":
            creator.close()
        assert bench.tee.usage() == IDLE


class TestCall:
    def test_registers(self, client: Client) -> None:
        client.created(b"x")
        done, regs = client.call(client.acquired(b"x"), ADD, (1 << 64) - 5, 4)
        assert (done.code, regs) == (Result.SUCCESS, [(1 << 64) - 1, 0, 0, 0, 0, 0, 0, 0])

    def test_who_calls(self, client: Client) -> None:
        seen: list[Caller] = []

        async def note(server: Server, caller: Caller, regs: object, memory: object) -> CallReturn:
            seen.append(caller)
            return CallReturn()

        Server.acts[OTHER] = note  # type: ignore[assignment]
        client.created(b"x")
        client.call(client.acquired(b"x"), OTHER)
        front = client.bench.session(client.context, Front.uuid)
        client.bench.invoke(front, OTHER, given(b"x"), Value(INOUT))
        assert seen == [Caller(), Caller(Login.TRUSTED_APP, Front.uuid)]

    def test_memory_in_place(self, client: Client) -> None:
        client.created(b"x")
        server = client.acquired(b"x")
        memory = client.bench.registered(client.context, 64)
        memory.write(0, bytes(range(64)))
        done, regs = client.call(server, DOUBLE, memory=MemRef(INOUT, memory, 8, 16))
        assert done.code == Result.SUCCESS
        assert regs[:3] == [16, 1, 15]
        after = memory.read(0, 64)
        assert after == bytes([*range(8), *(2 * byte for byte in range(8, 24)), *range(24, 64)])

    def test_memory_that_is_not_granted(self, client: Client) -> None:
        client.created(b"x")
        server = client.acquired(b"x")
        other = client.bench.registered(client.bench.context(), 64)
        for param in (MemRef(INOUT, other, 0, 8), given(b"12", IN), given(b"12", OUT), Value(INOUT)):
            assert client.call(server, DOUBLE, memory=param)[0].code == Result.BAD_PARAMETERS
        assert other.read(0, 64) == bytes(64)

    def test_the_memory_is_gone_after_the_call(self, client: Client) -> None:
        kept: list[MemoryReference] = []
        views: list[memoryview] = []

        async def keep(server: Server, caller: Caller, regs: object, memory: MemoryReference | None) -> CallReturn:
            assert memory is not None
            view = memory.view()
            assert view is not None
            kept.append(memory)
            views.append(view)
            return CallReturn()

        Server.acts[OTHER] = keep  # type: ignore[assignment]
        client.created(b"x")
        memory = client.bench.registered(client.context, 64)
        memory.write(0, b"secret")
        client.call(client.acquired(b"x"), OTHER, memory=MemRef(INOUT, memory, 0, 64))
        assert kept[0].read() == b""
        with pytest.raises(ValueError, match="bytes at"):
            kept[0].read(0, 6)
        with pytest.raises(ValueError, match="bytes at"):
            kept[0].write(b"x")
        with pytest.raises(ValueError, match="released"):
            bytes(views[0])

    @pytest.mark.parametrize(
        "answer",
        [
            CallReturn(0, 1, 16),
            CallReturn(0, 17, 0),
            CallReturn(0, (1 << 64) - 1, 1),
            CallReturn(-1),
            CallReturn(1 << 64),
        ],
    )
    def test_an_answer_that_cannot_be(self, client: Client, answer: CallReturn) -> None:
        async def lie(server: Server, caller: Caller, regs: object, memory: object) -> CallReturn:
            return answer

        Server.acts[OTHER] = lie  # type: ignore[assignment]
        client.created(b"x")
        memory = client.bench.registered(client.context, 16)
        done, _ = client.call(client.acquired(b"x"), OTHER, memory=MemRef(INOUT, memory, 0, 16))
        assert (done.code, done.origin) == (Result.TARGET_DEAD, Origin.TEE)

    def test_what_the_enclave_says(self, client: Client) -> None:
        client.created(b"x")
        done, regs = client.call(client.acquired(b"x"), FAIL, 0x1234)
        assert (done.code, done.origin, regs[1]) == (0x1234, Origin.TRUSTED_APP, 0x1234)

    def test_a_panic(self, client: Client) -> None:
        enclave = client.created(b"x")
        server = client.acquired(b"x")
        waiting, _ = client.start(server, HOLD, 1000)
        client.bench.run()
        assert client.call(server, PANIC)[0].code == Result.TARGET_DEAD
        assert client.bench.finish(waiting).code == Result.TARGET_DEAD
        assert client.call(server, ADD)[0].code == Result.TARGET_DEAD
        assert client.create(b"x").code == Result.BUSY  # until its creator has destroyed it
        assert client.destroy(enclave).code == Result.SUCCESS
        client.created(b"x")

    def test_at_the_same_time(self, client: Client) -> None:
        client.created(b"x")
        server = client.acquired(b"x")
        slow = [client.start(server, HOLD, seconds)[0] for seconds in (30, 20, 10)]
        client.bench.run()
        assert client.call(server, ADD, 1, 1)[1][0] == 2
        for seconds, call in zip((10, 20, 30), reversed(slow), strict=True):
            assert client.bench.ended(call) is None
            client.bench.now = seconds
            assert client.bench.finish(call).code == Result.SUCCESS

    def test_servers_that_are_none(self, client: Client) -> None:
        client.created(b"x")
        server = client.acquired(b"x")
        other = Client(client.bench)
        for caller, ident in ((other, server), (client, server + 1), (client, 0), (client, server - 1)):
            assert caller.call(ident, ADD)[0].code == Result.BAD_PARAMETERS


class TestEnds:
    def test_destroy_in_the_middle(self, bench: Bench) -> None:
        creator, other = Client(bench), Client(bench)
        enclave = creator.created(b"x")
        calls = [other.start(other.acquired(b"x"), HOLD, 1000, masked)[0] for masked in (0, 1)]
        bench.run()
        done = creator.destroy(enclave)
        assert done.code == Result.SUCCESS
        order = [event.call for event in bench.events if isinstance(event, Done)]
        for call in calls:
            ended = bench.ended(call)
            assert ended is not None
            assert (ended.code, ended.origin) == (Result.TARGET_DEAD, Origin.TEE)
            assert order.index(call) < order.index(done.call)

    def test_an_enclave_that_will_not_end(self, client: Client) -> None:
        async def stubborn(server: Server, caller: Caller, regs: object, memory: object) -> CallReturn:
            while True:
                try:
                    await server.env.sleep(1000)
                except TeeError:
                    continue

        Server.acts[OTHER] = stubborn  # type: ignore[assignment]
        enclave = client.created(b"x")
        call, _ = client.start(client.acquired(b"x"), OTHER)
        client.bench.run()
        client.begin(Command.ENCLAVE_DESTROY, Value(IN, enclave))
        client.bench.run(10000)
        assert client.bench.finish(call).code == Result.TARGET_DEAD
        client.close()
        assert client.bench.tee.usage() == IDLE

    def test_cancel(self, client: Client) -> None:
        client.created(b"x")
        server = client.acquired(b"x")
        masked, _ = client.start(server, HOLD, 5, 0)
        reached, _ = client.start(server, HOLD, 5, 1)
        client.bench.run()
        for call in (masked, reached):
            client.bench.tee.cancel(call)
        assert client.bench.finish(reached).code == Result.CANCEL
        assert client.bench.ended(masked) is None
        client.bench.now = 5
        assert client.bench.finish(masked).code == Result.SUCCESS

    def test_release_in_the_middle(self, client: Client) -> None:
        client.created(b"x")
        one, two = client.acquired(b"x"), client.acquired(b"x")
        ended, stays = client.start(one, HOLD, 5, 1)[0], client.start(two, HOLD, 5, 1)[0]
        client.bench.run()
        done = client.release(one)
        order = [event.call for event in client.bench.events if isinstance(event, Done)]
        assert order.index(ended) < order.index(done.call)
        assert client.bench.finish(ended).code == Result.CANCEL
        assert client.bench.ended(stays) is None
        assert client.call(one, ADD)[0].code == Result.BAD_PARAMETERS

    @pytest.mark.parametrize("unmasked", [0, 1])
    @pytest.mark.parametrize("how", ["session", "context"])
    def test_the_caller_goes(self, bench: Bench, how: str, unmasked: int) -> None:
        creator, caller = Client(bench), Client(bench)
        creator.created(b"x")
        call, _ = caller.start(caller.acquired(b"x"), HOLD, 7, unmasked)
        bench.run()
        if how == "context":
            caller.close()
            assert bench.finish(call).code in (Result.CANCEL, Result.TARGET_DEAD)
        else:
            closing = bench.start(CloseSession(session=caller.session))
            bench.run()
            bench.now = 7
            assert bench.finish(call).code == (Result.CANCEL if unmasked else Result.SUCCESS)
            assert bench.finish(closing).code == Result.SUCCESS
        assert creator.call(creator.acquired(b"x"), ADD, 1, 1)[1][0] == 2

    def test_a_call_takes_too_long(self) -> None:
        bench = bench_of(longest_call=10)
        client = Client(bench)
        client.created(b"x")
        call, _ = client.start(client.acquired(b"x"), HOLD, 1000)
        bench.run()
        bench.now = 11
        assert bench.finish(call).code == Result.CANCEL
        client.close()
        assert bench.tee.usage() == IDLE

    @pytest.mark.parametrize("seed", range(20))
    def test_any_order(self, seed: int) -> None:
        """Creating, calling, destroying, releasing, cancelling and closing at odd moments leaves nothing behind."""
        import random

        bench = bench_of(threads=1 + seed % 2)
        draw = random.Random(seed)
        clients = [Client(bench) for _ in range(3)]
        calls: list[Any] = []
        for _ in range(150):
            client = draw.choice(clients)
            ident = draw.randrange(1, 20)
            what = draw.randrange(8)
            if what == 0:
                calls.append(
                    client.begin(
                        Command.ENCLAVE_CREATE,
                        given(Server.uuid.bytes),
                        given(b"e%d" % draw.randrange(4)),
                        Value(INOUT),
                    )
                )
            elif what == 1:
                calls.append(client.begin(Command.ENCLAVE_ACQUIRE, given(b"e%d" % draw.randrange(4)), Value(OUT)))
            elif what < 5:
                act = draw.choice([ADD, HOLD, ONWARD, ONWARD, PANIC, FAIL])
                calls.append(client.start(ident, act, draw.randrange(3), draw.randrange(6))[0])
            elif what == 5:
                calls.append(
                    client.begin(draw.choice([Command.ENCLAVE_DESTROY, Command.ENCLAVE_RELEASE]), Value(IN, ident))
                )
            elif what == 6 and calls:
                bench.tee.cancel(draw.choice(calls))
            elif draw.randrange(5) == 0:
                bench.start(CloseContext(context=client.context))
                clients[clients.index(client)] = Client(bench)
            for _ in range(draw.randrange(3)):
                bench.tee.run()
            bench.now += draw.random()
        for client in clients:
            bench.start(CloseContext(context=client.context))
        bench.run(100_000)
        ended = [event.call for event in bench.events if isinstance(event, Done)]
        assert all(ended.count(call) == 1 for call in calls)
        assert bench.tee.usage() == IDLE


class TestChains:
    def chain(self, client: Client, length: int) -> int:
        for number in range(length):
            client.created(b"e%d" % number)
        return client.acquired(b"e0")

    def test_as_long_as_allowed(self, client: Client) -> None:
        server = self.chain(client, MAX_CHAIN + 2)
        done, regs = client.call(server, ONWARD, 0, MAX_CHAIN)
        assert (done.code, regs[0]) == (Result.SUCCESS, MAX_CHAIN)
        done, _ = client.call(server, ONWARD, 0, MAX_CHAIN + 1)
        assert done.code == Result.OVERFLOW

    def test_origins(self, client: Client) -> None:
        seen: list[TeeError] = []

        async def again(server: Server, caller: Caller, regs: Sequence[int], memory: object) -> CallReturn:
            try:
                await server.env.acquire(f"e{regs[1]}").call(OTHER, 0)
            except TeeError as error:
                seen.append(error)
                raise
            return CallReturn()

        Server.acts[OTHER] = again  # type: ignore[assignment]
        server = self.chain(client, 2)
        assert client.call(server, OTHER, 1)[0].code == Result.ACCESS_CONFLICT
        assert (seen[0].code, seen[0].origin) == (Result.ACCESS_CONFLICT, Origin.TEE)
        assert client.call(server, OTHER, 0)[0].code == Result.ACCESS_CONFLICT

    def test_memory_all_along(self, client: Client) -> None:
        server = self.chain(client, 3)

        async def last(
            server: Server, caller: Caller, regs: Sequence[int], memory: MemoryReference | None
        ) -> CallReturn:
            if regs[1] < 2:
                return await onward(server, caller, (OTHER, regs[1], 2), memory)
            return await double(server, caller, (0, 0), memory)

        Server.acts[OTHER] = last  # type: ignore[assignment]
        memory = client.bench.registered(client.context, 4)
        memory.write(0, b"\1\2\3\4")
        assert client.call(server, OTHER, 0, memory=MemRef(INOUT, memory, 0, 4))[0].code == Result.SUCCESS
        assert memory.read(0, 4) == b"\2\4\6\x08"

    def test_one_in_the_middle_is_destroyed(self, client: Client) -> None:
        enclaves = [client.created(b"e%d" % number) for number in range(3)]
        caught: list[int] = []

        async def link(server: Server, caller: Caller, regs: Sequence[int], memory: object) -> CallReturn:
            if regs[1] == 2:
                await server.env.sleep(1000)
            try:
                return await server.env.acquire(f"e{regs[1] + 1}").call(OTHER, regs[1] + 1)
            except TeeError as error:
                caught.append(error.code)
                return CallReturn(7)

        Server.acts[OTHER] = link  # type: ignore[assignment]
        call, frame = client.start(client.acquired(b"e0"), OTHER, 0)
        client.bench.run()
        assert client.destroy(enclaves[1]).code == Result.SUCCESS
        assert client.bench.finish(call).code == Result.SUCCESS
        assert CallFrame.parse(content(frame)).regs[0] == 7
        assert caught[-1] == Result.TARGET_DEAD
        assert client.destroy(enclaves[2]).code == Result.SUCCESS

    def test_a_ta_in_between(self, client: Client) -> None:
        """Enclave, TA, enclave: the chain is known through TAs, and a TA that waits is not waited for."""
        found: list[Any] = []

        async def by_ta(server: Server, caller: Caller, regs: Sequence[int], memory: object) -> CallReturn:
            async with await server.env.open_session(Front.uuid) as front:
                name = MemoryReference.over(IN, bytearray(b"e%d" % regs[1]))
                try:
                    await front.invoke(ADD, [name, Value(INOUT, 5)])
                except TeeError as error:
                    found.append(error.code)
            return CallReturn()

        Server.acts[OTHER] = by_ta  # type: ignore[assignment]
        server = self.chain(client, 2)
        assert client.call(server, OTHER, 1)[0].code == Result.SUCCESS
        assert client.call(server, OTHER, 0)[0].code == Result.SUCCESS
        assert found == [Result.ACCESS_CONFLICT]
        front = client.bench.session(client.context, Front.uuid)
        done = client.bench.invoke(front, OTHER, given(b"e0"), Value(INOUT, 1))
        assert done.code == Result.BUSY  # the TA waits for the enclave, which wants to open a session with it

    def test_a_circle_of_two_calls(self, client: Client) -> None:
        """Each is in a TA, whose enclave wants to enter the TA that the other one is in: one of them is told."""
        codes: list[int] = []

        async def cross(server: Server, caller: Caller, regs: Sequence[int], memory: object) -> CallReturn:
            await server.env.sleep(1)
            other = Back.uuid if caller.uuid == Front.uuid else Front.uuid
            try:
                async with await server.env.open_session(other):
                    pass
            except TeeError as error:
                codes.append(error.code)
            return CallReturn()

        Server.acts[OTHER] = cross  # type: ignore[assignment]
        client.created(b"x")
        calls = []
        for uuid in (Front.uuid, Back.uuid):
            session = client.bench.session(client.context, uuid)
            calls.append(Invoke(session=session, func=OTHER, params=[given(b"x"), Value(INOUT)]))
        for call in calls:
            client.bench.start(call)
        client.bench.run()
        client.bench.now = 2
        assert [client.bench.finish(call).code for call in calls] == [Result.SUCCESS] * 2
        assert codes == [Result.BUSY]


class TestWhat:
    """What an enclave may not ask of its callers."""

    def test_no_ocall(self, client: Client) -> None:
        async def ask(server: Server, caller: Caller, regs: object, memory: object) -> CallReturn:
            await server.env.ocall(1)
            return CallReturn()

        Server.acts[OTHER] = ask  # type: ignore[assignment]
        client.created(b"x")
        assert client.call(client.acquired(b"x"), OTHER)[0].code == Result.NOT_SUPPORTED
        assert client.bench.rpcs() == []

    def test_no_rpc_to_another_machine(self) -> None:
        async def ask(server: Server, caller: Caller, regs: object, memory: object) -> CallReturn:
            await server.env.rpc(3, [])
            return CallReturn()

        Server.acts[OTHER] = ask  # type: ignore[assignment]
        bench = bench_of(enclaves=EnclavePolicy(shared=[SharedNames("x", "one", "*")]))
        one, two = Client(bench, "one"), Client(bench, "two")
        one.created(b"x", flags=EnclaveFlag.SHARED)
        assert two.call(two.acquired(b"x"), OTHER)[0].code == Result.NOT_SUPPORTED
        assert bench.rpcs() == []
        call, _ = one.start(one.acquired(b"x"), OTHER)
        assert bench.rpc().call is call


class TestMachines:
    def test_isolated(self, bench: Bench) -> None:
        one, two = Client(bench, "one"), Client(bench, "two")
        enclave = one.created(b"x")
        assert two.acquire(b"x").code == Result.ITEM_NOT_FOUND
        assert two.destroy(enclave).code == Result.BAD_PARAMETERS
        two.created(b"x")  # the same name tells nothing
        assert one.create(b"x", flags=EnclaveFlag.SHARED).code == Result.ACCESS_DENIED

    def test_shared_on_purpose(self) -> None:
        rules = [SharedNames("clock-*", "one", "two"), SharedNames("both", "*", "*")]
        bench = bench_of(enclaves=EnclavePolicy(shared=rules))
        one, two, three = (Client(bench, name) for name in ("one", "two", "three"))
        one.created(b"clock-1", flags=EnclaveFlag.SHARED)
        assert two.call(two.acquired(b"clock-1"), ADD, 2, 2)[1][0] == 4
        assert three.acquire(b"clock-1").code == Result.ITEM_NOT_FOUND
        assert two.create(b"clock-1").code == Result.BUSY
        assert two.create(b"clock-2", flags=EnclaveFlag.SHARED).code == Result.ACCESS_DENIED
        assert one.create(b"watch", flags=EnclaveFlag.SHARED).code == Result.ACCESS_DENIED
        two.created(b"both", flags=EnclaveFlag.SHARED)
        assert one.create(b"both").code == Result.BUSY
        assert three.call(three.acquired(b"both"), ADD, 2, 2)[1][0] == 4
        one.created(b"private")
        assert two.acquire(b"private").code == Result.ITEM_NOT_FOUND

    def test_visible_but_not_to_be_used(self) -> None:
        rules = [SharedNames("x", "[ot]*", "three")]
        bench = bench_of(enclaves=EnclavePolicy(shared=rules))
        one, two = Client(bench, "one"), Client(bench, "two")
        one.created(b"x", flags=EnclaveFlag.SHARED)
        assert two.acquire(b"x").code == Result.ACCESS_DENIED
        assert one.acquire(b"x").code == Result.SUCCESS

    def test_the_own_one_is_meant(self) -> None:
        rules = [SharedNames("x", "one", "two")]
        bench = bench_of(enclaves=EnclavePolicy(shared=rules))
        one, two = Client(bench, "one"), Client(bench, "two")
        two.created(b"x")
        one.created(b"x", flags=EnclaveFlag.SHARED)
        one.close()
        assert two.call(two.acquired(b"x"), ADD, 2, 2)[1][0] == 4

    def test_who_may_create(self) -> None:
        bench = bench_of(enclaves=EnclavePolicy(creators="one"))
        assert Client(bench, "one").create(b"x").code == Result.SUCCESS
        assert Client(bench, "two").create(b"x").code == Result.ACCESS_DENIED

    def test_a_machine_goes_while_another_calls(self) -> None:
        bench = bench_of(enclaves=EnclavePolicy(shared=[SharedNames("x", "one", "*")]))
        one, two = Client(bench, "one"), Client(bench, "two")
        one.created(b"x", flags=EnclaveFlag.SHARED)
        call, _ = two.start(two.acquired(b"x"), HOLD, 1000)
        bench.run()
        one.close()
        assert bench.finish(call).code == Result.TARGET_DEAD
        two.close()
        assert bench.tee.usage() == IDLE


def test_many_by_turns() -> None:
    """More calls than threads, to several enclaves, by TAs and clients: all end."""
    bench = bench_of(threads=2)
    client = Client(bench)
    for number in range(3):
        client.created(b"e%d" % number)
    servers = [client.acquired(b"e%d" % number) for number in range(3)]
    front = bench.session(client.context, Front.uuid)
    calls = [client.start(server, ONWARD, number, 2)[0] for number, server in enumerate(servers * 5)]
    turns = itertools.cycle((b"e0", b"e1"))
    calls += [
        bench.start(Invoke(session=front, func=ADD, params=[given(next(turns)), Value(INOUT, 1)])) for _ in range(6)
    ]
    assert {bench.finish(call).code for call in calls} == {Result.SUCCESS}
