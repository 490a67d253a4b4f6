"""Calls from TA to TA."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from tee import package
from tee.calls import Client, CloseContext, CloseSession, Invoke, Login, OpenSession
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import RpcReply
from tee.soft import examples
from tee.soft.limits import SoftLimits
from tee.soft.ta import MemoryReference, Nothing, Parameters, TaSession, TrustedApplication
from tests.tee.bench import HELLO, IDLE, PROBE, RANDOM, Bench, Courier

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT

Act = Callable[["Outer", Parameters], Awaitable[Any]]


class Outer(TrustedApplication):
    """Does what a test says: the act of the command."""

    uuid = UUID(int=300)
    acts: list[Act] = []  # noqa: RUF012
    seen: list[Any] = []  # noqa: RUF012

    async def open_session(self, params: Parameters, client: Client) -> None:
        Outer.seen.append((type(self).__name__, "open", client))

    async def invoke(self, session: object, command: int, params: Parameters) -> None:
        await Outer.acts[command](self, params)

    async def close_session(self, session: object) -> None:
        Outer.seen.append((type(self).__name__, "close"))

    async def destroy(self) -> None:
        Outer.seen.append((type(self).__name__, "destroy"))


class Single(Outer):
    uuid = UUID(int=301)
    single_instance = multi_session = True


class Alone(Outer):
    uuid = UUID(int=302)
    single_instance = True


class Broken(Outer):
    uuid = UUID(int=303)
    single_instance = multi_session = True

    async def create(self) -> None:
        await self.env.sleep(1)
        raise TeeError(Result.BAD_STATE, Origin.TRUSTED_APP)


TAS = (Outer, Single, Alone, Broken)


@pytest.fixture
def bench() -> Bench:
    return world()


def world(**options: Any) -> Bench:
    Outer.acts, Outer.seen = [], []
    return Bench(built_in={**{ta.uuid: ta for ta in TAS}, **examples.built_in()}, **options)


def start(bench: Bench, act: Act, *params: Any, ta: type[Outer] = Outer, context: object = None) -> Invoke:
    """An invocation of ``act`` in a TA."""
    session = bench.session(context or bench.context("vm"), ta.uuid)
    Outer.acts.append(act)
    call: Invoke = bench.start(Invoke(session=session, func=len(Outer.acts) - 1, params=list(params)))
    bench.run()
    return call


def ends(bench: Bench, act: Act, *params: Any) -> tuple[int, int]:
    done = bench.finish(start(bench, act, *params))
    return done.code, done.origin


async def code_of(work: Awaitable[Any]) -> tuple[int, int]:
    try:
        await work
    except TeeError as error:
        return error.code, error.origin
    return Result.SUCCESS, Origin.TRUSTED_APP


class TestParameters:
    def test_values_go_there_and_back(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            value = params.value(0, INOUT)
            async with await ta.env.open_session(HELLO) as hello:
                await hello.invoke(0, [value])
                await hello.invoke(0, [value, Nothing()])
            async with await ta.env.open_session(PROBE) as probe:
                given, result, both = Value(IN, 1 << 63, 5), Value(OUT, 9), Value(INOUT, 2, 3)
                await probe.invoke(1, [given, result, both])
                assert (result.c, both.c, result.a) == ((1 << 63) + 5, 5, 0)

        value = Value(INOUT, 40)
        assert ends(bench, act, value) == (Result.SUCCESS, Origin.TRUSTED_APP)
        assert value.a == 42

    def test_memory_of_ones_own_and_of_the_client(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            own = bytearray(b"abcd")
            async with await ta.env.open_session(PROBE) as probe:
                await probe.invoke(2, [MemoryReference.over(INOUT, own), Value(IN, 0x20)])
                await probe.invoke(2, [params.memory(0, INOUT), Value(IN, 0x20)])
                await probe.invoke(5, [params.memory(1, OUT), Value(IN, 3)])
            assert own == b"ABCD"
            await (await ta.env.open_session(RANDOM)).invoke(0, [MemoryReference.over(OUT, own)])
            assert 0 not in own

        first, second = bytearray(b"xyz"), bytearray(8)
        out = MemRef(OUT, Memory.of(second), 0, 8)
        assert ends(bench, act, MemRef(INOUT, Memory.of(first), 0, 3), out)[0] == Result.SUCCESS
        assert (bytes(first), out.size, bytes(second)) == (b"XYZ", 3, b"ZZZ" + bytes(5))

    def test_short_buffer(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            async with await ta.env.open_session(PROBE) as probe:
                await probe.invoke(5, [params.memory(0, OUT), Value(IN, 100)])

        out = MemRef(OUT, Memory.of(bytearray(8)), 0, 8)
        assert ends(bench, act, out) == (Result.SHORT_BUFFER, Origin.TRUSTED_APP)
        assert out.size == 100

    @pytest.mark.parametrize(
        "make",
        [
            lambda ref: [ref.passed_on(OUT)],
            lambda ref: [Value(IN, -1)],
            lambda ref: [Value(IN, 1 << 64)],
            lambda ref: ["text"],
            lambda ref: [Nothing()] * 128,
        ],
    )
    def test_bad(self, bench: Bench, make: Any) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            async with await ta.env.open_session(PROBE) as probe:
                await probe.invoke(0, make(params.memory(0, IN)))

        memory = MemRef(IN, Memory.of(bytearray(8)), 0, 8)
        assert ends(bench, act, memory)[0] == Result.BAD_PARAMETERS

    def test_the_other_ta_cannot_write_to_an_input_nor_keep_it(self, bench: Bench) -> None:
        views: list[memoryview] = []

        async def inner(ta: Outer, params: Parameters) -> None:
            view = params.memory(0, IN).view()
            assert view is not None
            assert view.readonly
            views.append(view)

        async def act(ta: Outer, params: Parameters) -> None:
            async with await ta.env.open_session(Single.uuid) as other:
                await other.invoke(0, [params.memory(0, IN)])
            with pytest.raises(ValueError, match="released"):
                bytes(views[0])

        Outer.acts.append(inner)
        session = bench.session(bench.context(), Outer.uuid)
        Outer.acts.append(act)
        assert bench.invoke(session, 1, MemRef(IN, Memory.of(bytearray(8)), 0, 8)).code == Result.SUCCESS


@pytest.mark.feature("TAs: sessions from TA to TA")
class TestSessions:
    def test_identity(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            await ta.env.open_session(Single.uuid)

        ends(bench, act)
        assert Outer.seen[1] == ("Single", "open", Client(Login.TRUSTED_APP, Outer.uuid, "vm"))

    @pytest.mark.parametrize("login", [0xF0000000, 0xFFFFFFFF])
    def test_a_client_cannot_say_that_it_is_a_ta(self, bench: Bench, login: int) -> None:
        call = OpenSession(context=bench.context(), uuid=Outer.uuid, client=Client(login, Single.uuid))
        assert bench.done(call).code == Result.ACCESS_DENIED
        assert Outer.seen == []

    @pytest.mark.parametrize("how", ["session", "context", "panic"])
    def test_the_outers_end_ends_the_inner(self, bench: Bench, how: str) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            await ta.env.open_session(Single.uuid)
            await ta.env.open_session(Alone.uuid)
            if how == "panic":
                raise RuntimeError

        context = bench.context()
        call = start(bench, act, context=context)
        assert bench.finish(call).code == (Result.TARGET_DEAD if how == "panic" else Result.SUCCESS)
        if how == "session":
            assert bench.tee.usage()["sessions"] == 3
            assert bench.done(CloseSession(session=call.session)).code == Result.SUCCESS
            assert bench.tee.usage() | {"contexts": 0} == IDLE
        if how == "panic":
            assert bench.tee.usage() | {"contexts": 0, "sessions": 0} == IDLE
        assert bench.done(CloseContext(context=context)).code == Result.SUCCESS
        assert bench.tee.usage() == IDLE
        assert {entry for entry in Outer.seen if entry[1] == "destroy"} >= {("Single", "destroy"), ("Alone", "destroy")}

    def test_a_session_is_its_openers_and_ends_once(self, bench: Bench) -> None:
        held: list[TaSession] = []

        async def act(ta: Outer, params: Parameters) -> None:
            held.append(await ta.env.open_session(HELLO))
            await held[0].close()
            await held[0].close()
            assert (await code_of(held[0].invoke(0)))[0] == Result.BAD_STATE
            held.append(await ta.env.open_session(HELLO))
            assert (await code_of(held[1].invoke(1 << 32)))[0] == Result.BAD_PARAMETERS

        async def thief(ta: Outer, params: Parameters) -> None:
            held[1]._env = ta.env
            await held[1].invoke(0)

        assert ends(bench, act)[0] == Result.SUCCESS
        assert ends(bench, thief)[0] == Result.BAD_STATE

    def test_errors_of_opening(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            env = ta.env
            assert (await code_of(env.open_session(PROBE, [Value(IN, 0x1234)]))) == (0x1234, Origin.TRUSTED_APP)
            assert (await code_of(env.open_session("text")))[0] == Result.BAD_PARAMETERS  # type: ignore[arg-type]
            await env.open_session(Alone.uuid)
            assert (await code_of(env.open_session(Alone.uuid))) == (Result.BUSY, Origin.TEE)

        assert ends(bench, act)[0] == Result.SUCCESS
        assert bench.tee.usage()["instances"] == 2

    def test_who_waits_for_a_create_that_fails_tries_again(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            await ta.env.open_session(Broken.uuid)

        calls = [
            start(bench, act),
            start(bench, act),
            bench.start(OpenSession(context=bench.context(), uuid=Broken.uuid)),
        ]
        for _ in range(3):
            bench.run()
            bench.now += 1
        assert [bench.finish(call).code for call in calls] == [Result.BAD_STATE] * 3
        assert bench.tee.usage()["instances"] == 2

    def test_the_other_ta_is_loaded(self, keys: package.KeyPair) -> None:
        bench = world(keys=[keys.public])
        other = UUID(int=0xABCD)
        source = examples.source("hello_world").replace(str(HELLO).encode(), str(other).encode())
        courier = Courier(bench, package.sign(source, other, 1, keys.private), vm="vm")

        async def act(ta: Outer, params: Parameters) -> None:
            async with await ta.env.open_session(other) as hello:
                await hello.invoke(0, [params.value(0, INOUT)])

        value = Value(INOUT, 1)
        call = start(bench, act, value)
        courier.serve()
        assert bench.finish(call).code == Result.SUCCESS
        assert value.a == 2
        assert all(rpc.call is call for rpc in bench.rpcs())
        call = start(bench, act, Value(INOUT, 1))
        courier.serve(lambda *_: RpcReply(Result.ITEM_NOT_FOUND))
        assert bench.finish(call).code == Result.ITEM_NOT_FOUND


class TestPanic:
    @pytest.mark.parametrize("error", [RuntimeError(), SystemExit(1), GeneratorExit()], ids=repr)
    def test_of_the_callee(self, bench: Bench, error: BaseException) -> None:
        async def inner(ta: Outer, params: Parameters) -> None:
            raise error

        async def act(ta: Outer, params: Parameters) -> None:
            other = await ta.env.open_session(Single.uuid)
            bystander = await ta.env.open_session(HELLO)
            assert await code_of(other.invoke(0)) == (Result.TARGET_DEAD, Origin.TEE)
            assert await code_of(other.invoke(0)) == (Result.TARGET_DEAD, Origin.TEE)
            await bystander.invoke(0, [Value(INOUT)])
            await other.close()
            await ta.env.open_session(Single.uuid)

        Outer.acts.append(inner)
        victim = bench.session(bench.context(), Single.uuid)
        expected = Result.TARGET_DEAD if isinstance(error, GeneratorExit) else Result.SUCCESS
        assert ends(bench, act)[0] == expected
        assert bench.invoke(victim, 0).code == Result.TARGET_DEAD

    def test_nonsense_is_one(self, bench: Bench) -> None:
        async def inner(ta: Outer, params: Parameters) -> None:
            params[0].a = "many"  # type: ignore[union-attr, assignment]

        async def act(ta: Outer, params: Parameters) -> None:
            other = await ta.env.open_session(Single.uuid)
            assert (await code_of(other.invoke(0, [Value(OUT)])))[0] == Result.TARGET_DEAD

        Outer.acts.append(inner)
        assert ends(bench, act)[0] == Result.SUCCESS

    def test_a_chain_that_will_not_end_is_ended(self, bench: Bench) -> None:
        async def inner(ta: Outer, params: Parameters) -> None:
            while True:
                try:
                    await ta.env.sleep(1)
                except TeeError:
                    continue

        async def stubborn(ta: Outer, params: Parameters) -> None:
            try:
                await inner(ta, params)
            except GeneratorExit:
                await ta.env.sleep(1)

        async def act(ta: Outer, params: Parameters) -> None:
            await (await ta.env.open_session(Single.uuid)).invoke(params.value(0, IN).a)

        for kind in (0, 1):
            Outer.acts[:] = [inner, stubborn]
            context, other = bench.context(), bench.context()
            call = start(bench, act, Value(IN, kind), context=context)
            waiting = bench.start(Invoke(session=bench.session(other, HELLO), func=0, params=[Value(INOUT)]))
            closing = bench.start(CloseContext(context=context))
            bench.run(3000)
            assert bench.finish(call).code == Result.TARGET_DEAD
            assert bench.finish(closing).code == Result.SUCCESS
            assert bench.finish(waiting).code == Result.SUCCESS
            assert bench.session(other, Single.uuid) is not None
            bench.done(CloseContext(context=other))
            assert bench.tee.usage() == IDLE


class TestWaiting:
    @pytest.mark.parametrize("threads", [1, 2])
    def test_no_deadlock_on_one_thread(self, threads: int) -> None:
        """The callee's instance is promised to another call, which waits for the only thread."""
        bench = world(threads=threads)

        async def inner(ta: Outer, params: Parameters) -> None:
            await ta.env.sleep(1)

        async def act(ta: Outer, params: Parameters) -> None:
            await ta.env.sleep(1)
            await (await ta.env.open_session(Single.uuid)).invoke(0)

        Outer.acts.append(inner)
        single = bench.session(bench.context(), Single.uuid)
        outer = start(bench, act)
        others = [bench.start(Invoke(session=single, func=0)) for _ in range(3)]
        for _ in range(6):
            bench.run()
            bench.now += 1
        assert [bench.finish(call).code for call in (outer, *others)] == [Result.SUCCESS] * 4
        assert bench.tee.usage()["threads_busy"] == 0

    def test_one_call_at_a_time(self, bench: Bench) -> None:
        inside: list[int] = []

        async def inner(ta: Outer, params: Parameters) -> None:
            inside.append(1)
            assert len(inside) == 1
            await ta.env.sleep(1)
            inside.pop()

        async def act(ta: Outer, params: Parameters) -> None:
            await (await ta.env.open_session(Single.uuid)).invoke(0)

        Outer.acts.append(inner)
        single = bench.session(bench.context(), Single.uuid)
        calls = [start(bench, act) for _ in range(3)]
        calls.append(bench.start(Invoke(session=single, func=0)))
        for _ in range(6):
            bench.run()
            bench.now += 1
        assert [bench.finish(call).code for call in calls] == [Result.SUCCESS] * 4

    def test_a_ta_that_calls_itself(self, bench: Bench) -> None:
        async def act(ta: Outer, params: Parameters) -> None:
            assert await code_of(ta.env.open_session(Single.uuid)) == (Result.BUSY, Origin.TEE)
            async with await ta.env.open_session(Outer.uuid):
                pass  # another instance

        call = start(bench, act, ta=Single)
        assert bench.finish(call).code == Result.SUCCESS

    def test_a_circle(self, bench: Bench) -> None:
        """Outer → Single → Alone → Single."""

        async def alone(ta: Outer, params: Parameters) -> None:
            assert (await code_of(ta.env.open_session(Single.uuid)))[0] == Result.BUSY

        async def single(ta: Outer, params: Parameters) -> None:
            await (await ta.env.open_session(Alone.uuid)).invoke(0)

        async def act(ta: Outer, params: Parameters) -> None:
            await (await ta.env.open_session(Single.uuid)).invoke(1)

        Outer.acts += [alone, single]
        assert ends(bench, act)[0] == Result.SUCCESS

    def test_two_calls_that_would_wait_for_each_other(self, bench: Bench) -> None:
        """One is refused, which ends it, and the other goes on."""

        class Second(Single):
            uuid = UUID(int=304)

        bench.tee._built_in[Second.uuid] = type(bench.tee._built_in[HELLO])(Second.uuid, Second, 0)
        codes: list[int] = []

        async def cross(ta: Outer, params: Parameters) -> None:
            await ta.env.sleep(1)
            codes.append((await code_of(ta.env.open_session(UUID(int=params.value(0, IN).a))))[0])

        one = start(bench, cross, Value(IN, Second.uuid.int), ta=Single)
        two = start(bench, cross, Value(IN, Single.uuid.int), ta=Second)
        bench.now += 1
        assert [bench.finish(call).code for call in (one, two)] == [Result.SUCCESS] * 2
        assert sorted(codes) == [Result.SUCCESS, Result.BUSY]

    def test_depth(self) -> None:
        bench = world(limits=SoftLimits(depth=3))
        codes: list[int] = []

        async def act(ta: Outer, params: Parameters) -> None:
            try:
                await (await ta.env.open_session(Outer.uuid)).invoke(0)
            except TeeError as error:
                codes.append(error.code)

        assert ends(bench, act)[0] == Result.SUCCESS
        assert codes == [Result.OUT_OF_MEMORY]


class TestCancel:
    @pytest.mark.parametrize(("outer", "reached"), [(True, True), (False, False)])
    def test_passes_through_where_the_caller_lets_it(self, bench: Bench, outer: bool, reached: bool) -> None:
        masks: list[bool] = []

        async def inner(ta: Outer, params: Parameters) -> None:
            masks.append(ta.env.unmask_cancellation())
            masks.append(ta.env.mask_cancellation())
            masks.append(ta.env.unmask_cancellation())
            await ta.env.sleep(5)

        async def act(ta: Outer, params: Parameters) -> None:
            if outer:
                ta.env.unmask_cancellation()
            other = await ta.env.open_session(Single.uuid)
            code = (await code_of(other.invoke(0)))[0]
            assert code == (Result.CANCEL if reached else Result.SUCCESS)
            assert ta.env.cancelled is outer
            raise TeeError(code or 0x77)

        Outer.acts.append(inner)
        call = start(bench, act)
        bench.tee.cancel(call)
        bench.run()
        bench.now += 5
        assert bench.finish(call).code == (Result.CANCEL if reached else 0x77)
        assert masks == [True, False, True]

    def test_while_it_waits_for_the_callee(self, bench: Bench) -> None:
        async def inner(ta: Outer, params: Parameters) -> None:
            await ta.env.sleep(5)

        async def act(ta: Outer, params: Parameters) -> None:
            ta.env.unmask_cancellation()
            await ta.env.open_session(Single.uuid)

        Outer.acts.append(inner)
        holder = bench.start(Invoke(session=bench.session(bench.context(), Single.uuid), func=0))
        call = start(bench, act)
        assert bench.ended(call) is None
        bench.tee.cancel(call)
        assert bench.finish(call).code == Result.CANCEL
        bench.now += 5
        assert bench.finish(holder).code == Result.SUCCESS
        assert bench.tee.usage()["sessions"] == 2

    def test_closing_the_context_goes_through_all_masks(self, bench: Bench) -> None:
        async def inner(ta: Outer, params: Parameters) -> None:
            await ta.env.sleep(100)

        async def act(ta: Outer, params: Parameters) -> None:
            await (await ta.env.open_session(Single.uuid)).invoke(0)

        Outer.acts.append(inner)
        context = bench.context()
        call = start(bench, act, context=context)
        assert bench.done(CloseContext(context=context)).code == Result.SUCCESS
        assert bench.finish(call).code == Result.CANCEL
        assert bench.tee.usage() == IDLE
