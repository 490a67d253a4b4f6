"""Sessions, invocations, parameters and memory of the software TEE."""

from __future__ import annotations

from uuid import UUID

import pytest

from tee.calls import (
    Call,
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
from tee.driver import GenCap, TeeKind
from tee.memory import FfaShare, Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.soft.entities import Registration
from tee.soft.ta import MemoryReference, Parameters, TrustedApplication
from tests.tee.bench import HELLO, IDLE, PROBE, RANDOM, Bench

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
ASYMMETRIC = 0x1111_2222_3333_4444
TOP = (1 << 64) - 1


class Spy(TrustedApplication):
    """Keeps what it sees, and does what ``act`` says."""

    uuid = UUID(int=77)
    seen: list[Parameters] = []  # noqa: RUF012
    clients: list[Client] = []  # noqa: RUF012
    act = staticmethod(lambda params: None)

    async def open_session(self, params: Parameters, client: Client) -> object:
        Spy.clients.append(client)
        return "mine"

    async def invoke(self, session: object, command: int, params: Parameters) -> None:
        assert session == "mine"
        Spy.seen.append(params)
        Spy.act(params)


@pytest.fixture
def spy() -> Bench:
    Spy.seen.clear()
    Spy.clients.clear()
    Spy.act = staticmethod(lambda params: None)
    return Bench(built_in={Spy.uuid: Spy})


def test_it_says_that_it_is_optee(bench: Bench) -> None:
    info = bench.tee.info
    assert (info.kind, info.impl_id, info.impl_caps) == (TeeKind.SOFT, 1, 1)
    assert info.gen_caps == GenCap.GP | GenCap.REG_MEM | GenCap.MEMREF_NULL
    assert bench.tee.fileno() is None


def test_hello_world(bench: Bench) -> None:
    context = bench.context()
    session = bench.session(context, HELLO)
    value = Value(INOUT, 41)
    done = bench.invoke(session, 0, value)
    assert (done.code, done.origin, value.a) == (Result.SUCCESS, Origin.TRUSTED_APP, 42)
    bench.invoke(session, 1, value, Nothing(), Nothing(), Nothing())
    assert value.a == 41
    for params in ([], [Value(IN, 1)], [Value(INOUT), Value(INOUT)], [MemRef(INOUT, None)]):
        done = bench.invoke(session, 0, *params)
        assert (done.code, done.origin) == (Result.BAD_PARAMETERS, Origin.TRUSTED_APP)
    done = bench.invoke(session, 2)
    assert (done.code, done.origin) == (Result.NOT_SUPPORTED, Origin.TRUSTED_APP)
    assert bench.done(CloseSession(session=session)).code == Result.SUCCESS
    assert bench.done(CloseContext(context=context)).code == Result.SUCCESS
    assert bench.tee.usage() == IDLE


def test_random_fills_all_of_the_buffer(bench: Bench) -> None:
    session = bench.session(bench.context(), RANDOM)
    data = bytearray(200_000)
    assert bench.invoke(session, 0, MemRef(OUT, Memory.of(data), 0, len(data))).code == Result.SUCCESS
    assert all(data)


class TestValues:
    def test_three_words_in_all_directions(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        given, result, both = Value(IN, ASYMMETRIC, 1), Value(OUT, 9, 9, 9), Value(INOUT, TOP, 3, 7)
        assert bench.invoke(session, 1, given, result, both).code == Result.SUCCESS
        assert given == Value(IN, ASYMMETRIC, 1)
        assert result == Value(OUT, 0, 0, ASYMMETRIC + 1)
        assert both == Value(INOUT, TOP, 3, 2)

    def test_a_ta_cannot_change_an_input_nor_see_an_output(self, spy: Bench) -> None:
        def act(params: Parameters) -> None:
            first, second = params
            assert isinstance(first, Value)
            assert second == Value(OUT)
            first.a = 99

        Spy.act = staticmethod(act)
        value = Value(IN, 5)
        session = spy.session(spy.context(), Spy.uuid)
        assert spy.invoke(session, 0, value, Value(OUT, 1, 2, 3)).code == Result.SUCCESS
        assert value.a == 5

    @pytest.mark.parametrize("value", [Value(IN, -1), Value(IN, 0, TOP + 1), Value(7)])  # type: ignore[arg-type]
    def test_bad(self, bench: Bench, value: Value) -> None:
        session = bench.session(bench.context())
        done = bench.invoke(session, 0, value)
        assert (done.code, done.origin) == (Result.BAD_PARAMETERS, Origin.TEE)

    def test_a_ta_that_answers_nonsense_has_panicked(self, spy: Bench) -> None:
        Spy.act = staticmethod(lambda params: setattr(params[0], "a", "many"))
        session = spy.session(spy.context(), Spy.uuid)
        done = spy.invoke(session, 0, Value(OUT))
        assert (done.code, done.origin) == (Result.TARGET_DEAD, Origin.TEE)

    def test_results_are_cut_to_64_bits(self, spy: Bench) -> None:
        Spy.act = staticmethod(lambda params: setattr(params[0], "a", TOP + 5))
        value = Value(OUT)
        spy.invoke(spy.session(spy.context(), Spy.uuid), 0, value)
        assert value.a == 4


class TestMemory:
    def test_temporary_and_registered_are_used_in_place(self, bench: Bench) -> None:
        context = bench.context()
        session = bench.session(context)
        temporary = Memory.of(bytearray(b"abcd"))
        registered = bench.registered(context, 8)
        registered.write(0, b"xxabcdxx")
        for memory, offset in ((temporary, 0), (registered, 2)):
            assert bench.invoke(session, 2, MemRef(INOUT, memory, offset, 4), Value(IN, 0x20)).code == Result.SUCCESS
            assert memory.read(offset, 4) == b"ABCD"
        assert registered.read(0, 8) == b"xxABCDxx"

    def test_memory_in_pieces(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        pieces = [bytearray(b"ab"), bytearray(b"c"), bytearray(b"defg")]
        memory = Memory([memoryview(piece) for piece in pieces])
        assert bench.invoke(session, 2, MemRef(INOUT, memory, 1, 5), Value(IN, 0x20)).code == Result.SUCCESS
        assert pieces == [b"aB", b"C", b"DEFg"]
        large = Memory([memoryview(bytearray(5000)), memoryview(bytearray(5000))])
        assert bench.invoke(session, 3, MemRef(INOUT, large, 0, 10000)).code == Result.SUCCESS
        assert [i for i, byte in enumerate(large.read(0, 10000)) if byte] == [0, 4096, 8192]

    def test_null_and_empty(self, spy: Bench) -> None:
        session = spy.session(spy.context(), Spy.uuid)
        empty = Memory.of(bytearray(4))
        assert spy.invoke(session, 0, MemRef(OUT, None, 0, 100), MemRef(INOUT, empty, 4, 0)).code == Result.SUCCESS
        null, none = Spy.seen[0]
        assert isinstance(null, MemoryReference)
        assert isinstance(none, MemoryReference)
        assert (null.null, null.size, null.capacity, null.view(), null.read()) == (True, 100, 0, None, b"")
        assert (none.null, none.size, none.capacity, none.read()) == (False, 0, 0, b"")

    @pytest.mark.parametrize(
        "make",
        [
            lambda m: MemRef(OUT, m, 0, 65),
            lambda m: MemRef(OUT, m, 65, 0),
            lambda m: MemRef(OUT, m, TOP, 2),
            lambda m: MemRef(OUT, m, -1, 1),
            lambda m: MemRef(OUT, m, 1, -1),
            lambda m: MemRef(OUT, None, 1, 0),
            lambda m: MemRef(OUT, None, 0, TOP + 1),
            lambda m: MemRef(0, m, 0, 1),  # type: ignore[arg-type]
            lambda m: MemRef(OUT, Memory(size=64), 0, 1),
            lambda m: "memory",
            lambda m: MemRef(OUT, m, None, 1),  # type: ignore[arg-type]
        ],
    )
    def test_bad(self, bench: Bench, make: object) -> None:
        context = bench.context()
        session = bench.session(context)
        memory = bench.registered(context, 64)
        done = bench.invoke(session, 0, Value(IN), make(memory))  # type: ignore[operator]
        assert (done.code, done.origin) == (Result.BAD_PARAMETERS, Origin.TEE)
        assert bench.tee.usage()["calls"] == 0
        assert bench.done(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS

    def test_read_only(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        memory = Memory([memoryview(bytearray(4))], read_only=True)
        assert bench.invoke(session, 0, MemRef(IN, memory, 0, 4)).code == Result.SUCCESS
        for direction in (OUT, INOUT):
            assert bench.invoke(session, 0, MemRef(direction, memory, 0, 4)).code == Result.BAD_PARAMETERS

    @pytest.mark.requirement("DEV-MEM-4")
    def test_an_input_cannot_be_written(self, spy: Bench) -> None:
        def act(params: Parameters) -> None:
            memory = params.memory(0, IN)
            view = memory.view()
            assert view is not None
            assert view.readonly
            memory.write(b"x")

        Spy.act = staticmethod(act)
        session = spy.session(spy.context(), Spy.uuid)
        data = bytearray(4)
        assert spy.invoke(session, 0, MemRef(IN, Memory.of(data), 0, 4)).code == Result.TARGET_DEAD
        assert data == bytes(4)

    def test_short_buffer_tells_the_size(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        data = bytearray(b"........")
        memory = Memory.of(data)
        fits, short, null = MemRef(OUT, memory, 1, 6), MemRef(OUT, memory, 1, 6), MemRef(OUT, None)
        assert bench.invoke(session, 5, fits, Value(IN, 5)).code == Result.SUCCESS
        assert (fits.size, data) == (5, bytearray(b".ZZZZZ.."))
        done = bench.invoke(session, 5, short, Value(IN, 7))
        assert (done.code, done.origin, short.size) == (Result.SHORT_BUFFER, Origin.TRUSTED_APP, 7)
        assert bench.invoke(session, 5, null, Value(IN, 3)).code == Result.SHORT_BUFFER
        assert null.size == 3

    def test_success_with_more_than_there_is_room_for_is_a_panic(self, spy: Bench) -> None:
        def act(params: Parameters) -> None:
            with pytest.raises(TeeError):
                params.memory(0, OUT).put(b"12345")

        Spy.act = staticmethod(act)
        session = spy.session(spy.context(), Spy.uuid)
        assert spy.invoke(session, 0, MemRef(OUT, Memory.of(bytearray(4)), 0, 4)).code == Result.TARGET_DEAD

    def test_size_of_an_input_stays(self, spy: Bench) -> None:
        Spy.act = staticmethod(lambda params: setattr(params[0], "size", 1))
        param = MemRef(IN, Memory.of(bytearray(4)), 0, 4)
        assert spy.invoke(spy.session(spy.context(), Spy.uuid), 0, param).code == Result.SUCCESS
        assert param.size == 4

    def test_views_end_with_the_call(self, spy: Bench) -> None:
        views: list[memoryview | None] = []
        Spy.act = staticmethod(lambda params: views.append(params[0].view()))
        data = bytearray(8)
        spy.invoke(spy.session(spy.context(), Spy.uuid), 0, MemRef(INOUT, Memory.of(data), 0, 8))
        assert views[0] is not None
        with pytest.raises(ValueError, match="released"):
            views[0][0] = 1

    def test_client_writes_are_seen_during_the_call(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        data = bytearray(b"1")
        value = Value(INOUT, 50)
        call = bench.start(Invoke(session=session, func=8, params=[MemRef(INOUT, Memory.of(data), 0, 1), value]))
        assert bench.run() == pytest.approx(0.05)
        data[0] = ord("2")
        bench.now += 0.05
        assert bench.finish(call).code == Result.SUCCESS
        assert (value.a, value.b) == (ord("1"), ord("2"))

    def test_memory_taken_away_is_the_clients_fault(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        memory = Memory.of(bytearray(1))
        call = bench.start(Invoke(session=session, func=8, params=[MemRef(INOUT, memory, 0, 1), Value(INOUT, 50)]))
        bench.run()
        memory.forget()
        bench.now += 1
        assert bench.finish(call).code == Result.COMMUNICATION
        assert bench.invoke(session, 0).code == Result.SUCCESS


class TestManyParameters:
    def test_order_and_sizes(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        memory = Memory.of(bytearray(100))
        answer = Value(OUT)
        params: list[Param] = [answer, Value(INOUT), Nothing(), MemRef(OUT, memory, 0, 30), MemRef(IN, None, 0, 5)]
        params += [Nothing()] * 10 + [Value(IN)]
        assert bench.invoke(session, 7, *params).code == Result.SUCCESS
        assert answer == Value(OUT, 15, 3 * 1 + 0 + 6 * 3 + 5 * 4 + 1 * 15, 35)

    def test_meta_is_not_seen_and_slots_stay(self, spy: Bench) -> None:
        def act(params: Parameters) -> None:
            assert [type(p) for p in params] == [Value, MemoryReference]
            params[0].a = 1  # type: ignore[union-attr]
            params[1].size = 2  # type: ignore[union-attr]
            params.clear()  # a TA may do that with its list

        Spy.act = staticmethod(act)
        meta = Value(INOUT, 5, meta=True)
        value, memory = Value(OUT), MemRef(OUT, Memory.of(bytearray(4)), 0, 4)
        params: list[Param] = [meta, Nothing(meta=True), value, MemRef(OUT, None, meta=True), memory]
        assert spy.invoke(spy.session(spy.context(), Spy.uuid), 0, *params).code == Result.SUCCESS
        assert (meta.a, value.a, memory.size, len(params)) == (5, 1, 2, 5)

    def test_limit(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        assert bench.invoke(session, 0, *[Nothing()] * 127).code == Result.SUCCESS
        assert bench.invoke(session, 0, *[Nothing()] * 128).code == Result.BAD_PARAMETERS


class TestSessions:
    def test_open_refused_by_the_ta(self, bench: Bench) -> None:
        context = bench.context()
        done = bench.done(OpenSession(context=context, uuid=PROBE, params=[Value(IN, 0x10000001)]))
        assert (done.code, done.origin, done.value) == (0x10000001, Origin.TRUSTED_APP, None)
        assert bench.tee.usage()["instances"] == bench.tee.usage()["sessions"] == 0

    def test_ta_error_codes(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        for given, code in ((0x10000001, 0x10000001), (0, Result.GENERIC), (1 << 40, Result.GENERIC)):
            done = bench.invoke(session, 9, Value(IN, given))
            assert (done.code, done.origin) == (code, Origin.TRUSTED_APP)

    def test_wrong_handles(self, bench: Bench) -> None:
        other = Bench()
        context, foreign = bench.context(), other.context()
        session, theirs = bench.session(context), other.session(foreign)
        bench.done(CloseSession(session=session))
        closed = bench.context()
        bench.done(CloseContext(context=closed))
        memory = Memory.of(bytearray(4))
        calls: list[Call] = [
            *(Invoke(session=s, func=0) for s in (None, 1, session, theirs)),
            *(CloseSession(session=s) for s in (None, "x", session, theirs)),
            *(CloseContext(context=c) for c in (None, foreign, closed)),
            *(OpenSession(context=c, uuid=PROBE) for c in (0, foreign, closed)),
            *(RegisterMemory(context=c, memory=memory) for c in (0, foreign, closed)),
            *(UnregisterMemory(context=c, memory=memory) for c in (0, context, foreign, closed)),
            OpenSession(context=context, uuid="probe"),  # type: ignore[arg-type]
            Invoke(session=bench.session(context), func=1 << 32),
            Invoke(session=bench.session(context), func="a"),  # type: ignore[arg-type]
        ]
        for call in calls:
            done = bench.done(call)
            assert (done.code, done.origin) == (Result.BAD_PARAMETERS, Origin.TEE), call

    def test_unknown_call(self, bench: Bench) -> None:
        assert bench.done(Call()).code == Result.NOT_SUPPORTED

    def test_client_reaches_the_ta(self, spy: Bench) -> None:
        client = Client(Login.USER, UUID(int=5), "vm1")
        spy.done(OpenSession(context=spy.context("vm1"), uuid=Spy.uuid, client=client))
        assert Spy.clients == [client]

    def test_a_call_is_started_once(self, bench: Bench) -> None:
        call = bench.start(OpenContext())
        with pytest.raises(ValueError, match="already"):
            bench.tee.start(call)
        bench.finish(call)
        with pytest.raises(RuntimeError, match="attached"):
            bench.tee.attach(print)

    def test_events_come_from_run_only(self, bench: Bench) -> None:
        call = bench.start(OpenContext())
        bench.tee.cancel(call)
        assert bench.events == []
        assert bench.finish(call).code == Result.SUCCESS


class TestRegistration:
    def test_memory_is_refused(self, bench: Bench) -> None:
        context = bench.context()
        memory = bench.registered(context)
        assert bench.done(RegisterMemory(context=context, memory=memory)).code == Result.BAD_PARAMETERS
        assert bench.done(RegisterMemory(context=context, memory=Memory())).code == Result.BAD_PARAMETERS
        handle = Memory(size=4096, ffa=FfaShare(5))
        assert bench.done(RegisterMemory(context=context, memory=handle)).code == Result.NOT_SUPPORTED

    def test_memory_of_another_context_or_tee(self, bench: Bench) -> None:
        one, two = bench.context(), bench.context()
        session = bench.session(one)
        for foreign in (bench.registered(two), (other := Bench()).registered(other.context())):
            done = bench.invoke(session, 0, MemRef(IN, foreign, 0, 4))
            assert done.code == Result.BAD_PARAMETERS
            assert bench.done(UnregisterMemory(context=one, memory=foreign)).code == Result.BAD_PARAMETERS
        memory = Memory.of(bytearray(4))
        memory.handle = object()
        assert bench.invoke(session, 0, MemRef(IN, memory, 0, 4)).code == Result.BAD_PARAMETERS

    def test_unregister_waits_for_the_calls_that_use_it(self, bench: Bench) -> None:
        context = bench.context()
        session, memory = bench.session(context), bench.registered(context)
        params: list[Param] = [MemRef(INOUT, memory, 0, 1), Value(INOUT, 1000)]
        call = bench.start(Invoke(session=session, func=8, params=params))
        bench.run()
        unregister = bench.start(UnregisterMemory(context=context, memory=memory))
        bench.run()
        assert bench.ended(unregister) is None
        assert type(memory.handle) is Registration
        assert bench.invoke(session, 0, MemRef(IN, memory, 0, 1)).code == Result.BAD_PARAMETERS
        assert bench.done(UnregisterMemory(context=context, memory=memory)).code == Result.BAD_PARAMETERS
        bench.now += 1
        assert bench.finish(call).code == Result.SUCCESS
        assert bench.finish(unregister).code == Result.SUCCESS
        assert memory.handle is None
        assert bench.done(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS

    def test_memory_used_twice_in_a_call(self, bench: Bench) -> None:
        context = bench.context()
        session, memory = bench.session(context), bench.registered(context)
        assert bench.invoke(session, 0, *[MemRef(INOUT, memory, 0, 8)] * 3).code == Result.SUCCESS
        assert bench.done(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS

    def test_allocate(self, bench: Bench) -> None:
        memory = bench.tee.allocate(10)
        assert memory.read(0, 10) == bytes(10)
        bench.tee.release(memory)
        assert memory.size == 0
        with pytest.raises(MemoryError):
            bench.tee.allocate(0)
