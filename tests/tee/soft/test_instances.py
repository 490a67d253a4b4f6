"""Instances, panics, cancellation, threads and the end of contexts."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tee.calls import Client, CloseContext, CloseSession, Invoke, OpenSession, UnregisterMemory
from tee.driver import Done
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import RpcReply
from tee.soft import states
from tee.soft.scheduler import MAX_REFUSALS, Scheduler
from tee.soft.ta import Parameters, TrustedApplication
from tests.tee.bench import HELLO, IDLE, PROBE, Bench, Courier

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT


class Diary(TrustedApplication):
    """Writes down what happens to it. Commands: 0 sleeps for a seconds, 1 panics, 2 asks RPC 99, 3 never ends."""

    uuid = UUID(int=100)
    lines: list[str] = []  # noqa: RUF012
    count = 0
    fail: dict[str, BaseException] = {}  # noqa: RUF012
    wait_in: set[str] = set()  # noqa: RUF012

    def __init__(self, env: Any) -> None:
        super().__init__(env)
        Diary.count += 1
        self.number = Diary.count
        self.sessions = 0

    async def note(self, what: str) -> None:
        Diary.lines.append(f"{self.number} {what}")
        if what in Diary.wait_in:
            await self.env.sleep(1)
        if what in Diary.fail:
            raise Diary.fail[what]

    async def create(self) -> None:
        await self.note("create")

    async def open_session(self, params: Parameters, client: Client) -> int:
        await self.note("open")
        self.sessions += 1
        return self.sessions

    async def invoke(self, session: int, command: int, params: Parameters) -> None:
        await self.note(f"invoke {session}")
        if command == 0:
            await self.env.sleep(params.value(0, IN).a)
        elif command == 1:
            raise RuntimeError
        elif command == 2:
            self.env.unmask_cancellation()
            reply = await self.env.rpc(99, [])
            Diary.lines.append(f"answered {reply.code}")
        elif command == 3:
            while True:
                try:
                    await self.env.sleep(5)
                except TeeError:
                    continue
        elif command == 4:
            await ForeignFuture()

    async def close_session(self, session: int) -> None:
        await self.note(f"close {session}")

    async def destroy(self) -> None:
        await self.note("destroy")


class ForeignFuture:
    """Something that another event loop would understand."""

    def __await__(self) -> Any:
        yield self


class Single(Diary):
    uuid = UUID(int=101)
    single_instance = True


class Shared(Single):
    uuid = UUID(int=102)
    multi_session = True


class Kept(Shared):
    uuid = UUID(int=103)
    keep_alive = True


@pytest.fixture
def diary() -> Bench:
    Diary.lines = []
    Diary.count = 0
    Diary.fail = {}
    Diary.wait_in = set()
    return Bench(built_in={ta.uuid: ta for ta in (Diary, Single, Shared, Kept)})


def open_(bench: Bench, context: object, ta: type[TrustedApplication]) -> Done:
    return bench.done(OpenSession(context=context, uuid=ta.uuid))


class TestFlags:
    def test_multi_instance(self, diary: Bench) -> None:
        context = diary.context()
        one, two = diary.session(context, Diary.uuid), diary.session(context, Diary.uuid)
        diary.done(CloseSession(session=one))
        diary.done(CloseSession(session=two))
        assert Diary.lines == [
            *("1 create", "1 open", "2 create", "2 open"),
            *("1 close 1", "1 destroy", "2 close 1", "2 destroy"),
        ]

    def test_single_instance_single_session(self, diary: Bench) -> None:
        context = diary.context()
        session = diary.session(context, Single.uuid)
        done = open_(diary, diary.context("other"), Single)
        assert (done.code, done.origin) == (Result.BUSY, Origin.TEE)
        diary.done(CloseSession(session=session))
        diary.session(context, Single.uuid)
        assert Diary.lines == ["1 create", "1 open", "1 close 1", "1 destroy", "2 create", "2 open"]

    def test_multi_session(self, diary: Bench) -> None:
        context = diary.context()
        one, two = diary.session(context, Shared.uuid), diary.session(diary.context(), Shared.uuid)
        diary.invoke(two, 9)
        diary.done(CloseSession(session=one))
        diary.done(CloseSession(session=two))
        assert Diary.lines == ["1 create", "1 open", "1 open", "1 invoke 2", "1 close 1", "1 close 2", "1 destroy"]
        assert diary.tee.usage()["instances"] == 0

    def test_keep_alive(self, diary: Bench) -> None:
        context = diary.context()
        diary.done(CloseSession(session=diary.session(context, Kept.uuid)))
        diary.session(context, Kept.uuid)
        assert Diary.lines == ["1 create", "1 open", "1 close 1", "1 open"]

    def test_create_fails(self, diary: Bench) -> None:
        Diary.fail["create"] = TeeError(Result.OUT_OF_MEMORY)
        done = open_(diary, diary.context(), Single)
        assert (done.code, done.origin) == (Result.OUT_OF_MEMORY, Origin.TRUSTED_APP)
        assert diary.tee.usage()["instances"] == 0
        Diary.fail.clear()
        assert open_(diary, diary.context(), Single).code == Result.SUCCESS
        assert Diary.lines == ["1 create", "2 create", "2 open"]

    def test_who_waits_for_a_create_that_fails_tries_again(self, diary: Bench) -> None:
        Diary.fail["create"] = TeeError(Result.OUT_OF_MEMORY)
        Diary.wait_in = {"create"}
        context = diary.context()
        calls = [diary.start(OpenSession(context=context, uuid=Shared.uuid)) for _ in range(3)]
        for _ in range(3):
            diary.run()
            diary.now += 1
        assert [diary.finish(call).code for call in calls] == [Result.OUT_OF_MEMORY] * 3
        assert Diary.lines == ["1 create", "2 create", "3 create"]

    def test_open_while_the_instance_is_destroyed(self, diary: Bench) -> None:
        Diary.wait_in = {"destroy"}
        context = diary.context()
        close = diary.start(CloseSession(session=diary.session(context, Shared.uuid)))
        diary.run()
        assert Diary.lines[-1] == "1 destroy"
        again = [diary.start(OpenSession(context=context, uuid=Shared.uuid)) for _ in range(2)]
        cancelled = diary.start(OpenSession(context=context, uuid=Shared.uuid))
        diary.run()
        diary.tee.cancel(cancelled)
        assert diary.finish(cancelled).code == Result.CANCEL
        assert [diary.ended(call) for call in again] == [None, None]
        diary.now += 1
        assert diary.finish(close).code == Result.SUCCESS
        assert [diary.finish(call).code for call in again] == [Result.SUCCESS] * 2
        assert Diary.lines[-3:] == ["2 create", "2 open", "2 open"]

    def test_close_and_destroy_cannot_fail(self, diary: Bench) -> None:
        Diary.fail = {"close 1": TeeError(Result.GENERIC), "destroy": TeeError(Result.GENERIC)}
        session = diary.session(diary.context(), Diary.uuid)
        assert diary.done(CloseSession(session=session)).code == Result.SUCCESS
        assert len(diary.logged) == 2
        assert diary.tee.usage()["instances"] == 0

    def test_open_refused_by_a_ta_ends_its_instance(self, diary: Bench) -> None:
        Diary.fail = {"open": TeeError(Result.ACCESS_DENIED)}
        assert open_(diary, diary.context(), Shared).code == Result.ACCESS_DENIED
        assert Diary.lines == ["1 create", "1 open", "1 destroy"]

    def test_last_session_cancelled_before_it_was_entered(self, diary: Bench) -> None:
        """The instance must end although nobody ever enters it again."""
        bench = Bench(threads=1, built_in={Shared.uuid: Shared, PROBE: Diary})
        context = bench.context()
        blocker, first = bench.session(context, PROBE), bench.session(context, Shared.uuid)
        Diary.wait_in = {"close 1"}
        closing = bench.start(CloseSession(session=first))
        second = bench.start(OpenSession(context=context, uuid=Shared.uuid))
        blocking = bench.start(Invoke(session=blocker, func=0, params=[Value(IN, 5)]))
        bench.run()
        bench.now += 1
        assert bench.finish(closing).code == Result.SUCCESS
        assert bench.ended(second) is None  # it has the instance, and waits for the thread
        bench.tee.cancel(second)
        assert bench.finish(second).code == Result.CANCEL
        assert Diary.lines[-1].endswith("destroy")
        bench.now += 5
        bench.finish(blocking)
        bench.done(CloseContext(context=context))
        assert bench.tee.usage() == IDLE


class TestPanic:
    def test_all_sessions_of_the_instance_are_dead(self, diary: Bench) -> None:
        context, other = diary.context(), diary.context()
        one, two, bystander = (
            diary.session(context, Shared.uuid),
            diary.session(other, Shared.uuid),
            diary.session(context, Diary.uuid),
        )
        Diary.wait_in = {"invoke 1"}
        running = diary.start(Invoke(session=one, func=1))
        queued = diary.start(Invoke(session=two, func=0, params=[Value(IN)]))
        opening = diary.start(OpenSession(context=context, uuid=Shared.uuid))
        diary.run()
        diary.now += 1
        Diary.wait_in = set()
        for call in (running, queued, opening):
            done = diary.finish(call)
            assert (done.code, done.origin) == (Result.TARGET_DEAD, Origin.TEE)
        for session in (one, two):
            assert diary.invoke(session, 0, Value(IN)).code == Result.TARGET_DEAD
        assert diary.invoke(bystander, 0, Value(IN)).code == Result.SUCCESS
        assert diary.done(CloseSession(session=one)).code == Result.SUCCESS
        assert diary.invoke(one, 0).code == Result.BAD_PARAMETERS
        assert diary.session(context, Shared.uuid) is not None  # a new instance
        assert diary.done(CloseContext(context=context)).code == Result.SUCCESS
        assert diary.done(CloseContext(context=other)).code == Result.SUCCESS
        assert diary.tee.usage() == IDLE
        assert any("panicked" in line for line in diary.logged)

    @pytest.mark.parametrize("where", ["create", "open", "close 1", "destroy"])
    @pytest.mark.parametrize("error", [ValueError("x"), SystemExit(1), GeneratorExit(), RecursionError()], ids=repr)
    def test_panic_anywhere(self, diary: Bench, where: str, error: BaseException) -> None:
        Diary.fail = {where: error}
        context = diary.context()
        done = open_(diary, context, Shared)
        if where in ("create", "open"):
            assert (done.code, done.origin, done.value) == (Result.TARGET_DEAD, Origin.TEE, None)
        else:
            assert diary.done(CloseSession(session=done.value)).code == Result.TARGET_DEAD
        assert diary.tee.usage() | {"contexts": 0} == IDLE

    def test_closing_a_context_whose_tas_panic(self, diary: Bench) -> None:
        Diary.fail = {"close 1": ValueError("x")}
        context = diary.context()
        diary.session(context, Diary.uuid)
        diary.session(context, Diary.uuid)
        assert diary.done(CloseContext(context=context)).code == Result.SUCCESS
        assert diary.tee.usage() == IDLE

    def test_awaiting_what_is_not_of_the_environment(self, diary: Bench) -> None:
        session = diary.session(diary.context(), Diary.uuid)
        assert diary.invoke(session, 4).code == Result.TARGET_DEAD

    def test_ctrl_c_is_for_whoever_runs_the_tee(self, diary: Bench) -> None:
        Diary.fail = {"open": KeyboardInterrupt()}
        diary.start(OpenSession(context=diary.context(), uuid=Diary.uuid))
        with pytest.raises(KeyboardInterrupt):
            diary.run()


class TestCancel:
    def test_waiting_is_ended(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        call = bench.start(Invoke(session=session, func=4, params=[Value(IN)]))
        assert bench.run() == 3600.0
        bench.tee.cancel(call)
        done = bench.finish(call)
        assert (done.code, done.origin) == (Result.CANCEL, Origin.TRUSTED_APP)

    def test_a_loop_is_reached(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        call = bench.start(Invoke(session=session, func=10, params=[Value(IN, 10**9)]))
        for _ in range(3):
            assert bench.tee.run() == 0
        bench.tee.cancel(call)
        assert bench.finish(call).code == Result.CANCEL

    def test_one_run_is_short_whatever_there_is_to_do(self) -> None:
        class Slow(TrustedApplication):
            uuid = UUID(int=103)

            async def invoke(self, session: None, command: int, params: Parameters) -> None:
                self.env.unmask_cancellation()
                while True:
                    bench.now += 0.001
                    await self.env.checkpoint()

        bench = Bench(built_in={Slow.uuid: Slow})
        session = bench.session(bench.context(), Slow.uuid)
        before = bench.now
        call = bench.start(Invoke(session=session, func=0))
        assert bench.tee.run() == 0
        assert bench.now - before < 0.005
        bench.tee.cancel(call)
        assert bench.finish(call).code == Result.CANCEL

    def test_masked_is_not_reached(self, diary: Bench) -> None:
        session = diary.session(diary.context(), Diary.uuid)
        call = diary.start(Invoke(session=session, func=0, params=[Value(IN, 2)]))
        diary.run()
        diary.tee.cancel(call)
        assert diary.run() == 2
        assert diary.ended(call) is None
        diary.now += 2
        assert diary.finish(call).code == Result.SUCCESS

    def test_flag_and_mask(self) -> None:
        seen: list[bool] = []

        class Looker(TrustedApplication):
            uuid = UUID(int=9)

            async def invoke(self, session: object, command: int, params: Parameters) -> None:
                env = self.env
                await env.sleep(1)
                seen.append(env.cancelled)
                seen.append(env.unmask_cancellation())
                seen.append(env.cancelled)
                try:
                    await env.checkpoint()
                except TeeError as error:
                    seen.append(error.code == Result.CANCEL)
                seen.append(env.mask_cancellation())
                seen.append(env.mask_cancellation())
                await env.checkpoint()

        bench = Bench(built_in={Looker.uuid: Looker})
        session = bench.session(bench.context(), Looker.uuid)
        call = bench.start(Invoke(session=session, func=0))
        bench.run()
        bench.tee.cancel(call)
        bench.now += 1
        assert bench.finish(call).code == Result.SUCCESS
        assert seen == [False, True, True, True, False, True]

    @pytest.mark.started
    def test_before_it_began(self, bench: Bench) -> None:
        context = bench.context()
        session = bench.session(context)
        for call in (Invoke(session=session, func=0), OpenSession(context=context, uuid=PROBE)):
            bench.start(call)
            bench.tee.cancel(call)
            bench.tee.cancel(call)
            done = bench.finish(call)
            assert (done.code, done.origin) == (Result.CANCEL, Origin.TEE)

    def test_in_the_queue_of_an_instance(self, diary: Bench) -> None:
        context = diary.context()
        session, memory = diary.session(context, Diary.uuid), diary.registered(context)
        first = diary.start(Invoke(session=session, func=0, params=[Value(IN, 1)]))
        queued = diary.start(Invoke(session=session, func=0, params=[Value(IN), MemRef(IN, memory, 0, 4)]))
        diary.run()
        diary.tee.cancel(queued)
        assert diary.finish(queued).code == Result.CANCEL
        assert diary.done(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS
        diary.now += 1
        assert diary.finish(first).code == Result.SUCCESS
        assert Diary.lines.count("1 invoke 1") == 1

    def test_in_an_rpc(self, diary: Bench) -> None:
        session = diary.session(diary.context(), Diary.uuid)
        call = diary.start(Invoke(session=session, func=2))
        rpc = diary.rpc()
        assert [rpc.call] == [call]
        diary.tee.cancel(call)
        assert diary.finish(call).code == Result.CANCEL
        assert diary.withdrawn() == [rpc]
        diary.answer(rpc)  # too late: ignored
        assert "answered 0" not in Diary.lines

    def test_ended_calls_and_strangers(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        call = Invoke(session=session, func=0)
        bench.done(call)
        bench.tee.cancel(call)
        bench.tee.cancel(Invoke(session=session, func=0))
        assert bench.run() is None


class TestRpc:
    def test_answer_once(self, diary: Bench) -> None:
        session = diary.session(diary.context(), Diary.uuid)
        call = diary.start(Invoke(session=session, func=2))
        rpc = diary.rpc()
        assert diary.run() is None
        diary.tee.answer(rpc, RpcReply(7))
        diary.tee.answer(rpc, RpcReply(8))
        assert diary.finish(call).code == Result.SUCCESS
        diary.answer(rpc, 9)
        assert [line for line in Diary.lines if "answered" in line] == ["answered 7"]

    def test_timeout(self) -> None:
        class Impatient(TrustedApplication):
            uuid = UUID(int=10)

            async def invoke(self, session: object, command: int, params: Parameters) -> None:
                await self.env.rpc(5, [], timeout=2)

        bench = Bench(built_in={Impatient.uuid: Impatient})
        call = bench.start(Invoke(session=bench.session(bench.context(), Impatient.uuid), func=0))
        assert bench.run() == 2
        rpc = bench.rpc()
        bench.now += 2
        assert bench.finish(call).code == Result.COMMUNICATION
        assert bench.withdrawn() == [rpc]
        answered = bench.start(Invoke(session=bench.session(bench.context(), Impatient.uuid), func=0))
        bench.answer(bench.rpc())
        assert bench.finish(answered).code == Result.SUCCESS
        bench.now += 9
        assert bench.run() is None


class TestThreads:
    def test_as_many_calls_as_threads(self, diary: Bench) -> None:
        bench = Bench(threads=2, built_in={Diary.uuid: Diary})
        context = bench.context()
        sessions = [bench.session(context, Diary.uuid) for _ in range(5)]
        calls = [bench.start(Invoke(session=s, func=0, params=[Value(IN, 1)])) for s in sessions]
        ended = []
        for _ in range(3):
            bench.run()
            assert bench.tee.usage()["threads_busy"] <= 2
            bench.now += 1
            bench.run()
            ended.append([bench.ended(call) is not None for call in calls])
        assert ended == [[True] * 2 + [False] * 3, [True] * 4 + [False], [True] * 5]
        assert bench.tee.usage()["threads_busy"] == 0

    def test_what_needs_no_thread(self, diary: Bench) -> None:
        """With one thread: a call suspended in an RPC, then a registration, a cancel, a context's end, the answer."""
        bench = Bench(threads=1, built_in={Diary.uuid: Diary})
        context, other = bench.context(), bench.context()
        session, theirs = bench.session(context, Diary.uuid), bench.session(other, Diary.uuid)
        call = bench.start(Invoke(session=session, func=2))
        rpc = bench.rpc()
        memory = bench.registered(context)
        waiting = bench.start(Invoke(session=theirs, func=0, params=[Value(IN)]))
        bench.run()
        assert bench.ended(waiting) is None
        assert bench.done(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS
        assert bench.done(CloseContext(context=other)).code == Result.SUCCESS
        assert bench.finish(waiting).code == Result.CANCEL
        bench.answer(rpc)
        assert bench.finish(call).code == Result.SUCCESS

    def test_a_queue_at_an_instance_holds_no_thread(self, diary: Bench) -> None:
        bench = Bench(threads=2, built_in={Shared.uuid: Shared, Diary.uuid: Diary})
        context = bench.context()
        shared, free = bench.session(context, Shared.uuid), bench.session(context, Diary.uuid)
        calls = [bench.start(Invoke(session=shared, func=0, params=[Value(IN, 1)])) for _ in range(4)]
        bench.run()
        assert bench.invoke(free, 0, Value(IN)).code == Result.SUCCESS
        for _ in calls:
            bench.now += 1
            bench.run()
        assert all(bench.ended(call) for call in calls)

    def test_one_at_a_time_in_order(self, diary: Bench) -> None:
        session = diary.session(diary.context(), Diary.uuid)
        calls = [diary.start(Invoke(session=session, func=0, params=[Value(IN, 1)])) for _ in range(3)]
        for call in calls:
            diary.run()
            assert diary.ended(call) is None
            diary.now += 1
        diary.run()
        assert [event.call for event in diary.events if isinstance(event, Done)][-3:] == calls

    def test_closing_a_session_cancels_its_calls(self, diary: Bench) -> None:
        """What is masked goes on, and closing waits for it; other sessions of the instance are not touched."""
        context = diary.context()
        session, other = diary.session(context, Shared.uuid), diary.session(context, Shared.uuid)
        masked = diary.start(Invoke(session=session, func=0, params=[Value(IN, 1)]))
        queued = diary.start(Invoke(session=session, func=0, params=[Value(IN, 1)]))
        theirs = diary.start(Invoke(session=other, func=0, params=[Value(IN)]))
        close = diary.start(CloseSession(session=session))
        late = diary.start(Invoke(session=session, func=0, params=[Value(IN, 1)]))
        again = diary.start(CloseSession(session=session))
        assert diary.finish(queued).code == Result.CANCEL
        assert [diary.finish(call).code for call in (late, again)] == [Result.BAD_PARAMETERS] * 2
        assert [diary.ended(call) for call in (masked, theirs, close)] == [None] * 3
        diary.now += 1
        assert [diary.finish(call).code for call in (masked, theirs, close)] == [Result.SUCCESS] * 3
        done = [event.call for event in diary.events if isinstance(event, Done)]
        assert done.index(close) > done.index(masked)

    def test_closing_a_session_ends_what_waits(self, diary: Bench) -> None:
        session = diary.session(diary.context(), Diary.uuid)
        call = diary.start(Invoke(session=session, func=2))
        rpc = diary.rpc()
        assert diary.done(CloseSession(session=session)).code == Result.SUCCESS
        assert diary.finish(call).code == Result.CANCEL
        assert diary.withdrawn() == [rpc]

    def test_many_waiting_calls(self, bench: Bench) -> None:
        """Neither stack nor time grow with the queue."""
        session = bench.session(bench.context())
        calls = [bench.start(Invoke(session=session, func=0)) for _ in range(5000)]
        bench.run()
        assert all(event.code == Result.SUCCESS for event in bench.events if isinstance(event, Done))
        assert len(bench.events) == len(calls) + 2

    @pytest.mark.started
    def test_run_is_bounded(self, bench: Bench) -> None:
        session = bench.session(bench.context())
        bench.events.clear()
        for _ in range(1000):
            bench.start(Invoke(session=session, func=0))
        assert bench.tee.run() == 0
        assert 0 < len(bench.events) <= 64

    def test_no_threads(self) -> None:
        with pytest.raises(ValueError, match="one thread"):
            Bench(threads=0)


class TestCloseContext:
    def test_ends_all_under_it(self, diary: Bench) -> None:
        context = diary.context()
        sessions = [diary.session(context, Diary.uuid) for _ in range(3)]
        memory = diary.registered(context)
        calls = [
            diary.start(Invoke(session=sessions[0], func=0, params=[Value(IN, 100), MemRef(IN, memory, 0, 4)])),
            diary.start(Invoke(session=sessions[0], func=0, params=[Value(IN, 100)])),
            diary.start(Invoke(session=sessions[1], func=2)),
        ]
        rpc = diary.rpc()
        unregister = diary.start(UnregisterMemory(context=context, memory=memory))
        closing = diary.start(CloseContext(context=context))
        after = diary.start(Invoke(session=sessions[2], func=0))
        assert diary.finish(closing).code == Result.SUCCESS
        assert [diary.finish(call).code for call in calls] == [Result.CANCEL] * 3
        assert diary.finish(unregister).code == Result.SUCCESS
        assert diary.finish(after).code == Result.BAD_PARAMETERS
        assert diary.withdrawn() == [rpc]
        assert memory.handle is None
        assert diary.tee.usage() == IDLE
        assert sorted(line for line in Diary.lines if "destroy" in line) == ["1 destroy", "2 destroy", "3 destroy"]
        done = [event.call for event in diary.events if isinstance(event, Done)]
        assert done.index(closing) > max(done.index(call) for call in [*calls, unregister])

    def test_a_ta_that_will_not_end_is_ended(self, diary: Bench) -> None:
        context = diary.context()
        session = diary.session(context, Diary.uuid)
        call = diary.start(Invoke(session=session, func=3))
        diary.run()
        diary.tee.cancel(call)
        diary.run()
        assert diary.ended(call) is None
        closing = diary.start(CloseContext(context=context))
        runs = 0
        while diary.tee.run() == 0:
            runs += 1
        assert runs <= MAX_REFUSALS
        assert diary.finish(call).code == Result.TARGET_DEAD
        assert diary.finish(closing).code == Result.SUCCESS
        assert diary.tee.usage() == IDLE

    def test_others_go_on(self, diary: Bench) -> None:
        context, other = diary.context(), diary.context()
        mine, theirs = diary.session(context, Shared.uuid), diary.session(other, Shared.uuid)
        running = diary.start(Invoke(session=theirs, func=0, params=[Value(IN, 1)]))
        waiting = diary.start(Invoke(session=mine, func=0, params=[Value(IN, 1)]))
        diary.run()
        closing = diary.start(CloseContext(context=context))
        assert diary.finish(waiting).code == Result.CANCEL
        assert diary.ended(closing) is None  # its session's end waits until the instance is free
        diary.now += 1
        assert diary.finish(running).code == Result.SUCCESS
        assert diary.finish(closing).code == Result.SUCCESS
        assert diary.invoke(theirs, 9).code == Result.SUCCESS

    def test_while_a_session_closes(self, diary: Bench) -> None:
        Diary.wait_in = {"close 1"}
        context = diary.context()
        closing = diary.start(CloseSession(session=diary.session(context, Diary.uuid)))
        diary.run()
        assert diary.ended(closing) is None
        assert diary.done(CloseContext(context=context)).code == Result.SUCCESS
        assert diary.finish(closing).code == Result.SUCCESS
        assert diary.tee.usage() == IDLE

    def test_while_a_session_opens(self, diary: Bench) -> None:
        Diary.wait_in = {"create", "open"}
        context = diary.context()
        opening = [diary.start(OpenSession(context=context, uuid=Shared.uuid)) for _ in range(2)]
        diary.run()
        assert diary.done(CloseContext(context=context)).code == Result.SUCCESS
        assert [diary.finish(call).code for call in opening] == [Result.CANCEL] * 2
        assert diary.tee.usage() == IDLE


class TestTables:
    def test_every_action_is_there(self) -> None:
        from tee.soft.driver import SoftTee

        for table, owner in (
            (states.CALL, Scheduler),
            (states.SESSION, SoftTee),
            (states.INSTANCE, SoftTee),
            (states.CONTEXT, SoftTee),
        ):
            for _, action in table.values():
                assert not action or action == "refuse_dead" or hasattr(owner, f"_{action}"), action

    def test_every_state_is_reached_and_left(self) -> None:
        tables: list[Any] = [states.CALL, states.SESSION, states.INSTANCE, states.CONTEXT]
        starts: list[Any] = [states.CallState.WAITING, states.SessionState.OPENING]
        starts += [states.InstanceState.CREATING, states.ContextState.OPEN]
        for table in tables:
            kind = type(next(iter(table))[0])
            reached = {state for state, _ in table.values()} | {s for s in starts if type(s) is kind}
            assert reached == set(kind.__members__.values())


def test_session_and_courier_are_independent_helpers(bench: Bench) -> None:
    """The hello world still works beside a supplicant that nobody asks."""
    courier = Courier(bench, b"")
    assert bench.session(bench.context(), HELLO)
    courier.serve()
    assert bench.rpcs() == []
