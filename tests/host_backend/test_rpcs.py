"""RPCs: what the guest answers, does not answer, answers twice, or should not have answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar

import pytest

from device.config import Limits
from device.params import RawParam
from device.requests import STATUS_RESULT
from device.wire import NULL_REGION, Feature, ParamType, Queue, RegionFlag, Request, Status
from host_backend.router import ROUTES, Route
from host_backend.rpcs import MAX_PAUSE
from tee import package
from tee.calls import Call
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import RpcCommand, RpcReply
from tee.soft import examples
from tee.soft.ta import UUID, Parameters, TrustedApplication
from tests.host_backend.bench import INLINE, PROBE, RAM, Bench, Guest, Sent

requirement = pytest.mark.requirement
IN, OUT, INOUT = ParamType.MEMREF_IN, ParamType.MEMREF_OUT, ParamType.MEMREF_INOUT
V_IN, V_OUT, V_INOUT = ParamType.VALUE_IN, ParamType.VALUE_OUT, ParamType.VALUE_INOUT
NOBODY = UUID(int=0xBAD)


class Asker(TrustedApplication):
    """Its command is an RPC's; params are what ``ask`` says. Returns code and first value of the answer."""

    uuid = UUID(int=0xA5)
    ask: ClassVar[list[Param]] = []
    answers: ClassVar[list[RpcReply | TeeError]] = []
    unmasked: ClassVar[bool] = True

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        if self.unmasked:
            self.env.unmask_cancellation()
        try:
            reply = await self.env.rpc(command, list(self.ask))
        except TeeError as error:
            self.answers.append(error)
            raise
        self.answers.append(reply)
        if reply.code:
            raise TeeError(reply.code)


class Borrower(TrustedApplication):
    """Asks for memory, and has it for a second: command 1 frees it then, and goes on for another one."""

    uuid = UUID(int=0xB0)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        reply = await self.env.rpc(RpcCommand.SHM_ALLOC, [Value(Direction.IN, 0, 100, 8)])
        await self.env.sleep(1)
        if command:
            await self.env.rpc(RpcCommand.SHM_FREE, [Value(Direction.IN), *reply.params])
            await self.env.sleep(1)


@pytest.fixture
def bench() -> Iterator[Bench]:
    Asker.ask, Asker.unmasked = [Value(Direction.IN, 1, 2, 3), Value(Direction.INOUT, 4, 5, 6)], True
    Asker.answers.clear()
    bench = Bench(built_in={**examples.built_in("probe"), Asker.uuid: Asker, Borrower.uuid: Borrower})
    yield bench
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


@pytest.fixture
def context(guest: Guest) -> int:
    return guest.open_context()


@pytest.fixture
def session(guest: Guest, context: int) -> int:
    return guest.open_session(context, Asker.uuid)


def status(sent: Sent) -> Status:
    response = sent.response
    if response.status:
        assert sent.written == 16
        assert (response.ret, response.origin) == (STATUS_RESULT[Status(response.status)], Origin.COMMS)
    return Status(response.status)


QUESTION: list[RawParam] = [(V_IN, 1, 2, 3), (V_INOUT, 4, 5, 6)]
FS = RpcCommand.FS


class TestAnswers:
    @requirement("DEV-RPC-1", "DEV-RPC-9", "DEV-RPC-14")
    def test_ordinary(self, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        seen = guest.event(FS)
        assert seen[2:] == (10_000, call.tag, context, session, QUESTION)
        answer = [(V_IN, 9, 9, 9), (V_INOUT, 7, 8, 9)]  # of an input all but the attribute is ignored
        assert status(guest.reply(seen.rpc, 0, answer, origin=3)) is Status.OK
        assert call.ret == 0
        (reply,) = Asker.answers
        assert isinstance(reply, RpcReply)
        assert reply.params == [Value(Direction.IN, 1, 2, 3), Value(Direction.INOUT, 7, 8, 9)]
        assert reply.origin == 3

    def test_an_error_has_no_parameters(self, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        assert status(guest.reply(guest.event(FS).rpc, Result.ITEM_NOT_FOUND)) is Status.OK
        assert call.ret == Result.ITEM_NOT_FOUND

    @requirement("DEV-RPC-13")
    @pytest.mark.fault("late-answer")
    def test_late_double_unknown(self, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        assert status(guest.reply(rpc + 1, 0, QUESTION)) is Status.NOT_FOUND
        assert status(guest.reply(0, 0, QUESTION)) is Status.NOT_FOUND
        assert not call.done
        assert status(guest.reply(rpc, 0, QUESTION)) is Status.OK
        assert status(guest.reply(rpc, 0, QUESTION)) is Status.NOT_FOUND
        assert len(Asker.answers) == 1

    @requirement("DEV-RPC-13", "DEV-IDS-2")
    @pytest.mark.fault("late-answer")
    def test_another_guests(self, bench: Bench, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        assert status(bench.guest().reply(rpc, 0, QUESTION)) is Status.NOT_FOUND
        assert not call.done
        guest.reply(rpc, 0, QUESTION)

    @requirement("DEV-RPC-11", "DEV-RPC-12")
    @pytest.mark.parametrize(
        "answer", [[], QUESTION[:1], [*QUESTION, (0, 0, 0, 0)], QUESTION[::-1], [(V_OUT, 0, 0, 0), QUESTION[1]]]
    )
    @pytest.mark.fault("wrong-answer")
    def test_malformed(self, guest: Guest, context: int, session: int, answer: list[RawParam]) -> None:
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        assert status(guest.reply(rpc, 0, answer)) is Status.MALFORMED
        assert call.ret == Result.COMMUNICATION
        assert status(guest.reply(rpc, 0, QUESTION)) is Status.NOT_FOUND

    @requirement("DEV-RPC-12", "DEV-INL-1")
    def test_refused_early(self, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        for answer in ([(IN | INLINE, 0, 0, 0)], [(99, 0, 0, 0)]):
            assert status(guest.reply(rpc, 0, answer)) is Status.MALFORMED
        assert status(guest.reply(rpc, 0, [(0, 0, 0, 0)] * 25)) is Status.LIMIT
        assert status(guest.reply(rpc, 0, QUESTION, epoch=guest.epoch + 1)) is Status.STALE_EPOCH
        assert status(guest.reply(rpc, 0, QUESTION, context=context)) is Status.MALFORMED
        assert not call.done
        assert status(guest.reply(rpc, 0, QUESTION)) is Status.OK

    @requirement("DEV-RPC-11")
    def test_more_than_was_asked_for(self, guest: Guest, context: int, session: int) -> None:
        Asker.ask = [MemRef(Direction.OUT, None, 0, 10)]
        call = guest.invoke(context, session, FS)
        seen = guest.event(FS)
        assert seen.params == [(OUT, 0, 10, NULL_REGION)]
        assert status(guest.reply(seen.rpc, 0, [(OUT, 0, 1 << 40, NULL_REGION)])) is Status.OK
        assert call.ret == 0

    @requirement("DEV-RPC-7")
    @pytest.mark.fault("no-supplicant")
    def test_without_the_feature(self, bench: Bench) -> None:
        guest = bench.guest(features=Feature.INLINE)
        context = guest.open_context()
        session = guest.open_session(context, Asker.uuid)
        assert guest.invoke(context, session, FS).ret == Result.NOT_SUPPORTED
        assert guest.open(context, NOBODY).ret == Result.ITEM_NOT_FOUND
        assert guest.events() == []

    @requirement("DEV-RPC-5")
    @pytest.mark.parametrize("what", ["another guest's", "the TEE's own", "meta", "meta memory"])
    def test_what_an_event_may_not_say(self, bench: Bench, guest: Guest, what: str) -> None:
        other = bench.guest()
        theirs = other.open_context()
        region = other.device.epoch.region(other.region(theirs))
        Asker.ask = {
            "another guest's": [MemRef(Direction.IN, region.memory, 0, 8)],
            "the TEE's own": [MemRef(Direction.IN, Memory.of(bytearray(8)), 0, 8)],
            "meta": [Value(Direction.IN, 1, 2, 3, meta=True)],
            "meta memory": [MemRef(Direction.OUT, None, 0, 0, meta=True)],
        }[what]
        context = guest.open_context()
        assert guest.invoke(context, guest.open_session(context, Asker.uuid), FS).ret == Result.NOT_SUPPORTED
        assert guest.events() == other.events() == []
        assert region.users == 0

    @requirement("DEV-RPC-1", "DEV-RPC-8")
    @pytest.mark.parametrize("command", [RpcCommand.NOTIFICATION, FS])
    def test_it_reaches_the_guest_whose_call_waits(self, bench: Bench, command: int) -> None:
        guests = [bench.guest() for _ in range(3)]
        calls = []
        for guest in guests:
            context = guest.open_context()
            calls.append(guest.invoke(context, guest.open_session(context, Asker.uuid), command, run=False))
        for guest, call in reversed(list(zip(guests, calls, strict=True))):
            bench.turn()
            assert guest.event(command).call == call.tag
            assert not call.done
        for guest in guests:
            assert guest.events() == []

    @requirement("DEV-RPC-7", "DEV-OCA-2")
    def test_never_sent(self, guest: Guest, context: int, session: int) -> None:
        refused = {c for c, route in ROUTES.items() if route is Route.REFUSED}
        for command in (*refused, RpcCommand.BENCH_REG, RpcCommand.OCALL, 999):
            assert guest.invoke(context, session, command).ret == Result.NOT_SUPPORTED
        assert guest.events() == []

    @requirement("DEV-RPC-7")
    def test_more_parameters_than_an_event_holds(self, guest: Guest, context: int, session: int) -> None:
        Asker.ask = [Value(Direction.IN)] * 25
        assert guest.invoke(context, session, FS).ret == Result.NOT_SUPPORTED
        assert guest.events() == []
        Asker.ask = [Value(Direction.IN)] * 24
        guest.invoke(context, session, FS)
        assert len(guest.event(FS).params) == 24


class TestMemory:
    """SHM_ALLOC and what comes of it, in the load of a TA."""

    def alloc(self, guest: Guest, context: int, size: int = 1000) -> tuple[Sent, int]:
        call = guest.open(context, NOBODY)
        seen = guest.event(RpcCommand.LOAD_TA)
        assert seen.params[1] == (OUT, 0, 0, NULL_REGION)
        guest.reply(seen.rpc, 0, [seen.params[0], (OUT, 0, size, NULL_REGION)])
        asked = guest.event(RpcCommand.SHM_ALLOC)
        assert asked.params == [(V_IN, 0, size, 8)]
        return call, asked.rpc

    @requirement("DEV-RPC-10", "DEV-RPC-12")
    @pytest.mark.parametrize(
        ("answer", "expected"),
        [
            ([], Status.MALFORMED),
            ([(OUT, 0, 1000, 1)], Status.MALFORMED),
            ([(INOUT, 0, 1000, 1)] * 2, Status.MALFORMED),
            ([(V_INOUT, 0, 1000, 1)], Status.MALFORMED),
            ([(INOUT, 0, 1000, NULL_REGION)], Status.NO_REGION),
            ([(INOUT, 0, 1000, 77)], Status.NO_REGION),
            ([(INOUT, 0, 999, 1)], Status.BAD_RANGE),
            ([(INOUT, 4000, 1000, 1)], Status.BAD_RANGE),
            ([(INOUT, (1 << 64) - 1, 1000, 1)], Status.BAD_RANGE),
            ([(INOUT, 0, (1 << 64) - 1, 1)], Status.BAD_RANGE),
            ([(INOUT, 0, 1000, 2)], Status.BAD_RANGE),
        ],
    )
    @pytest.mark.fault("lying-supplicant", "wrong-answer")
    def test_bad_memory(self, guest: Guest, context: int, answer: list[RawParam], expected: Status) -> None:
        assert guest.region(context) == 1
        assert guest.region(context, flags=RegionFlag.READ_ONLY) == 2
        call, rpc = self.alloc(guest, context)
        assert status(guest.reply(rpc, 0, answer)) is expected
        assert call.ret == Result.COMMUNICATION
        assert guest.events() == []
        assert [guest.unregister(context, n).ret for n in (1, 2)] == [0, 0]

    @requirement("DEV-RPC-10", "DEV-IDS-2")
    @pytest.mark.fault("foreign-ids")
    def test_foreign_memory(self, bench: Bench, guest: Guest, context: int) -> None:
        other = bench.guest()
        assert other.region(other.open_context()) == 1
        call, rpc = self.alloc(guest, context)
        assert status(guest.reply(rpc, 0, [(INOUT, 0, 1000, 1)])) is Status.NO_REGION
        assert call.ret == Result.COMMUNICATION

    @requirement("DEV-RPC-10")
    def test_memory_of_another_context(self, guest: Guest, context: int) -> None:
        region = guest.region(guest.open_context())
        call, rpc = self.alloc(guest, context)
        assert status(guest.reply(rpc, 0, [(INOUT, 8, 1000, region)])) is Status.OK
        assert guest.event(RpcCommand.LOAD_TA).params[1] == (OUT, 8, 1000, region)
        guest.close_context(context)
        assert call.ret == Result.CANCEL

    def loading(self, guest: Guest, context: int, owner: int) -> tuple[Sent, int, int]:
        """A load that has memory and waits for the TA's bytes."""
        region = guest.region(owner)
        call, rpc = self.alloc(guest, context)
        assert status(guest.reply(rpc, 0, [(INOUT, 0, 1000, region)])) is Status.OK
        return call, region, guest.event(RpcCommand.LOAD_TA).rpc

    @requirement("DEV-MEM-9", "DEV-MEM-10", "DEV-RPC-6")
    def test_it_is_used_until_it_is_freed(self, guest: Guest, context: int) -> None:
        supplicant = guest.open_context()
        call, region, rpc = self.loading(guest, context, supplicant)
        waits = guest.unregister(supplicant, region)
        assert not waits.done
        assert status(guest.reply(rpc, Result.ITEM_NOT_FOUND)) is Status.OK
        assert waits.ret == 0
        # The guest has ended the registration: there is nothing left that SHM_FREE could name.
        assert guest.events() == []
        assert call.ret == Result.ITEM_NOT_FOUND

    @requirement("DEV-MEM-10")
    @pytest.mark.parametrize("frees", [0, 1])
    def test_it_is_used_while_nothing_names_it(self, guest: Guest, context: int, frees: int) -> None:
        """Until SHM_FREE, or until the call has ended that asked for it."""
        supplicant = guest.open_context()
        region = guest.region(supplicant)
        call = guest.invoke(context, guest.open_session(context, Borrower.uuid), frees)
        asked = guest.event(RpcCommand.SHM_ALLOC)
        assert status(guest.reply(asked.rpc, 0, [(INOUT, 0, 100, region)])) is Status.OK
        waits = guest.unregister(supplicant, region)
        guest.bench.pass_time(0.5)
        assert not waits.done
        assert guest.device.epoch.regions.get(region).users == 1  # type: ignore[union-attr]
        guest.bench.pass_time(1)
        assert waits.ret == 0
        assert call.done is not bool(frees)
        guest.bench.pass_time(1)
        assert call.ret == 0

    @requirement("DEV-MEM-10")
    def test_freed_without_an_event_buffer(self, bench: Bench) -> None:
        guest = bench.guest(buffers=3)
        context = guest.open_context()
        region = guest.region(context)
        call = guest.open(context, NOBODY)
        (seen,) = guest.events(post=False)
        guest.reply(seen.rpc, 0, [seen.params[0], (OUT, 0, 1000, NULL_REGION)])
        (asked,) = guest.events(post=False)
        guest.reply(asked.rpc, 0, [(INOUT, 0, 1000, region)])
        (seen,) = guest.events(post=False)
        guest.reply(seen.rpc, Result.ITEM_NOT_FOUND)
        assert not call.done
        assert guest.unregister(context, region).ret == 0  # freed as soon as the TEE says so
        guest.post(1)
        bench.turn()
        assert guest.events() == []
        assert call.ret == Result.ITEM_NOT_FOUND

    @requirement("DEV-CTX-4", "DEV-CTX-5", "DEV-MEM-9")
    def test_the_supplicants_context_closes(self, guest: Guest, context: int) -> None:
        supplicant = guest.open_context()
        call, _, rpc = self.loading(guest, context, supplicant)
        closed = guest.close_context(supplicant)
        assert not closed.done
        guest.reply(rpc, Result.ITEM_NOT_FOUND)
        assert closed.ret == 0
        assert guest.events() == []
        assert call.ret == Result.ITEM_NOT_FOUND

    def test_memory_of_a_context_that_closes(self, guest: Guest, context: int) -> None:
        supplicant = guest.open_context()
        call, region, rpc = self.loading(guest, context, supplicant)
        closed = guest.close_context(supplicant)
        other = guest.open(guest.open_context(), UUID(int=0xBAD2))
        seen = guest.event(RpcCommand.LOAD_TA)
        guest.reply(seen.rpc, 0, [seen.params[0], (OUT, 0, 10, NULL_REGION)])
        asked = guest.event(RpcCommand.SHM_ALLOC)
        assert status(guest.reply(asked.rpc, 0, [(INOUT, 0, 10, region)])) is Status.NO_REGION
        assert other.ret == Result.COMMUNICATION
        guest.reply(rpc, Result.ITEM_NOT_FOUND)
        assert (call.ret, closed.ret) == (Result.ITEM_NOT_FOUND, 0)

    @requirement("DEV-CTX-5", "DEV-RPC-15")
    def test_closing_does_not_wait_for_shm_free(self, guest: Guest, context: int) -> None:
        supplicant = guest.open_context()
        call, region, rpc = self.loading(guest, context, supplicant)
        closed = guest.close_context(context)
        assert (call.ret, closed.ret) == (Result.CANCEL, 0)
        freed = guest.event(RpcCommand.SHM_FREE)  # told nevertheless, and withdrawn
        assert guest.withdrawn == [rpc, freed.rpc]
        assert status(guest.reply(freed.rpc)) is Status.NOT_FOUND
        assert [status(guest.ack(n)) for n in guest.withdrawn] == [Status.OK] * 2
        assert guest.unregister(supplicant, region).ret == 0

    @requirement("DEV-RPC-11")
    def test_shm_free_is_answered_without_parameters(self, guest: Guest, context: int) -> None:
        call, _, rpc = self.loading(guest, context, context)
        guest.reply(rpc, Result.ITEM_NOT_FOUND)
        freed = guest.event(RpcCommand.SHM_FREE)
        assert status(guest.reply(freed.rpc, 0, freed.params)) is Status.MALFORMED
        assert call.ret == Result.ITEM_NOT_FOUND

    @requirement("DEV-RPC-11")
    def test_short_buffer_says_how_much_is_needed(self, guest: Guest, context: int) -> None:
        call, region, rpc = self.loading(guest, context, context)
        name = [(V_IN, *(int.from_bytes(NOBODY.bytes[i : i + 8], "little") for i in (0, 8)), 0)]
        assert status(guest.reply(rpc, Result.SHORT_BUFFER, [*name, (OUT, 0, 5000, region)])) is Status.OK
        guest.bench.pass_time(11)
        guest.events()
        assert call.ret != 0

    @requirement("DEV-RPC-11", "DEV-RPC-12")
    @pytest.mark.fault("wrong-answer")
    def test_a_size_that_changes(self, guest: Guest, context: int) -> None:
        call, region, rpc = self.loading(guest, context, context)
        question = guest.bench.tee  # the memory is 1000 bytes for it, whatever the region has
        assert question.usage()["rpcs"] == 1
        name = [(V_IN, *(int.from_bytes(NOBODY.bytes[i : i + 8], "little") for i in (0, 8)), 0)]
        assert status(guest.reply(rpc, 0, [*name, (OUT, 0, 1001, region)])) is Status.BAD_RANGE
        assert guest.event(RpcCommand.SHM_FREE)
        assert not call.done
        guest.bench.pass_time(11)
        assert call.ret == Result.COMMUNICATION


class TestDeadlines:
    @requirement("DEV-RPC-3", "DEV-RPC-4", "DEV-RPC-13", "DEV-RPC-16", "DEV-RPC-17")
    @pytest.mark.fault("slow-supplicant")
    def test_sent_and_not_answered(self, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        assert status(guest.ack(rpc)) is Status.NOT_FOUND
        guest.bench.pass_time(9.9)
        assert not call.done
        guest.bench.pass_time(0.2)
        assert call.ret == Result.COMMUNICATION
        assert guest.events() == []
        assert guest.withdrawn == [rpc]
        assert len(guest.device.epoch.rpcs) == 1
        assert status(guest.reply(rpc, 0, QUESTION)) is Status.NOT_FOUND
        assert status(guest.ack(rpc)) is Status.OK
        assert status(guest.ack(rpc)) is Status.NOT_FOUND
        assert len(guest.device.epoch.rpcs) == 0

    @requirement("DEV-RPC-3", "DEV-RPC-4")
    @pytest.mark.fault("event-buffers")
    def test_no_event_buffer(self, bench: Bench) -> None:
        guest = bench.guest(buffers=0)
        context = guest.open_context()
        session = guest.open_session(context, Asker.uuid)
        call = guest.invoke(context, session, FS)
        bench.pass_time(5)
        guest.post(1)
        bench.turn()
        (seen,) = guest.events(post=False)
        assert seen.deadline_ms == 5000
        bench.pass_time(6)
        assert call.ret == Result.COMMUNICATION
        never = guest.invoke(context, session, FS)
        bench.pass_time(11)
        assert never.ret == Result.COMMUNICATION
        guest.post(3)
        bench.turn()
        assert guest.events() == []
        assert guest.withdrawn == [seen.rpc]

    @requirement("DEV-RPC-3")
    @pytest.mark.fault("pause-in-call")
    @pytest.mark.parametrize("ring", [Queue.CONTROL, Queue.EVENT])
    def test_it_does_not_run_during_a_pause(self, guest: Guest, context: int, session: int, ring: Queue) -> None:
        call = guest.invoke(context, session, FS)
        guest.event(FS)
        guest.bench.pass_time(4)
        guest.pause()
        guest.bench.pass_time(100)
        assert not call.done
        guest.resume(*[index for index in range(3) if index != ring])
        guest.bench.pass_time(100)  # one of the two still rests
        assert not call.done
        guest.resume(ring)
        guest.bench.pass_time(5.9)
        assert not call.done
        guest.bench.pass_time(0.2)
        assert call.ret == Result.COMMUNICATION

    @requirement("DEV-RPC-3")
    def test_what_is_left_of_it_after_a_pause(self, bench: Bench) -> None:
        guest = bench.guest(buffers=0)
        context = guest.open_context()
        session = guest.open_session(context, Asker.uuid)
        call = guest.invoke(context, session, FS)
        bench.pass_time(3)
        guest.pause()
        bench.pass_time(50)
        guest.resume()
        guest.post(1)
        bench.turn()
        seen = guest.event(FS)
        assert seen.deadline_ms == 7000
        guest.reply(seen.rpc, 0, QUESTION)
        assert call.ret == 0

    @pytest.mark.fault("pause-in-call")
    def test_no_pause_holds_a_thread_of_the_tee_for_ever(self, guest: Guest, context: int, session: int) -> None:
        guest.invoke(context, session, FS)
        guest.event(FS)
        guest.pause()
        guest.bench.pass_time(MAX_PAUSE + 9)
        assert guest.bench.tee.usage()["threads_busy"] == 1
        assert guest.bench.router.run() == 1  # the loop comes back by itself
        guest.bench.pass_time(1.1)
        assert guest.bench.tee.usage()["threads_busy"] == 0
        guest.resume()

    @requirement("DEV-CTX-5")
    def test_closing_does_not_wait_for_a_pause(self, guest: Guest, context: int) -> None:
        call = guest.open(context, NOBODY)
        guest.event(RpcCommand.LOAD_TA)
        guest.ring(Queue.EVENT).stop()
        guest.device.queue_stopped(Queue.EVENT)
        assert guest.close_context(context).ret == 0
        assert call.ret == Result.CANCEL
        guest.resume(Queue.EVENT)

    def test_what_is_never_sent_leaves_nothing(self, bench: Bench) -> None:
        """A withdrawal at the head of the queue, no buffers, and RPCs that come and go behind it."""
        guest = bench.guest(buffers=1)
        context = guest.open_context()
        session = guest.open_session(context, Asker.uuid)
        guest.invoke(context, session, FS)
        assert len(guest.events(post=False)) == 1
        bench.pass_time(11)
        for _ in range(100):
            call = guest.invoke(context, session, FS)
            guest.cancel(context, call.tag)
            assert call.ret == Result.CANCEL
        rpcs = guest.device.epoch.rpcs
        assert (len(rpcs), len(rpcs._outbox), len(rpcs._entries)) == (1, 1, 0)

    @requirement("DEV-RPC-2", "DEV-RPC-16", "DEV-EVT-4")
    @pytest.mark.fault("quota")
    def test_max_rpcs(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_rpcs=2))
        context = guest.open_context()
        sessions = [guest.open_session(context, Asker.uuid) for _ in range(4)]
        calls = [guest.invoke(context, session, FS) for session in sessions]
        first = guest.events()
        assert [seen.call for seen in first] == [call.tag for call in calls[:2]]
        guest.cancel(context, calls[0].tag)
        assert guest.events() == []  # the withdrawn one counts until it is acknowledged
        assert guest.withdrawn == [first[0].rpc]
        assert status(guest.ack(first[0].rpc)) is Status.OK
        (third,) = guest.events()
        assert third.call == calls[2].tag
        guest.cancel(context, calls[3].tag)  # never sent: it vanishes
        assert calls[3].ret == Result.CANCEL
        for seen in (first[1], third):
            guest.reply(seen.rpc, 0, QUESTION)
        assert guest.events() == []
        assert guest.withdrawn == [first[0].rpc]

    @requirement("DEV-EVT-2", "DEV-RPC-2", "DEV-RPC-16")
    def test_what_waits_without_a_buffer(self, bench: Bench) -> None:
        """Never more than max_rpcs events, however many RPCs come and go."""
        guest = bench.guest(limits=Limits(max_rpcs=2), buffers=0)
        context = guest.open_context()
        calls = [guest.invoke(context, guest.open_session(context, Asker.uuid), FS) for _ in range(4)]
        guest.post(50)
        bench.turn()
        first = guest.events(post=False)
        assert [seen.call for seen in first] == [call.tag for call in calls[:2]]
        queue = guest.ring(Queue.EVENT)
        queue.available.clear()
        for _ in range(10):
            for call in calls:
                guest.cancel(context, call.tag)
            calls = [guest.invoke(context, guest.open_session(context, Asker.uuid), FS) for _ in range(4)]
            assert len(guest.device.epoch.rpcs._outbox) <= 2
        guest.post(50)
        bench.turn()
        assert guest.events(post=False) == []
        assert guest.withdrawn == [seen.rpc for seen in first]
        assert [status(guest.ack(rpc)) for rpc in guest.withdrawn] == [Status.OK] * 2
        assert [seen.call for seen in guest.events()] == [call.tag for call in calls[:2]]

    @requirement("DEV-EVT-1", "DEV-QUE-7")
    @pytest.mark.fault("event-buffers")
    def test_buffers_that_are_no_good(self, bench: Bench) -> None:
        guest = bench.guest(buffers=0)
        guest.post(1, size=100)
        guest.post(1, size=0, data=b"x")
        guest.post(1, data=b"readable")
        guest.post(1)
        context = guest.open_context()
        session = guest.open_session(context, Asker.uuid)
        guest.invoke(context, session, FS)
        queue = guest.ring(1)
        assert [bool(sent.written) for sent in queue.returned] == [False, False, False, True]
        guest.event(FS)


class TestClosing:
    @requirement("DEV-SES-5", "DEV-RPC-15")
    @pytest.mark.parametrize("unmasked", [True, False])
    def test_the_session(self, guest: Guest, context: int, session: int, unmasked: bool) -> None:
        Asker.unmasked = unmasked
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        closed = guest.send(Request.CLOSE_SESSION, context=context, session=session)
        assert call.ret == (Result.CANCEL if unmasked else Result.COMMUNICATION)
        assert closed.ret == 0
        assert guest.events() == []
        assert guest.withdrawn == [rpc]

    @requirement("DEV-CTX-3", "DEV-RPC-15")
    def test_the_context(self, guest: Guest, context: int, session: int) -> None:
        call = guest.invoke(context, session, FS)
        guest.event(FS)
        assert guest.close_context(context).ret == 0
        assert call.ret == Result.CANCEL
        assert guest.events() == []
        assert len(guest.withdrawn) == 1

    @requirement("DEV-CTX-5", "DEV-CTX-3")
    def test_the_context_of_a_tee_that_waits(
        self, bench: Bench, guest: Guest, context: int, session: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A TEE may close a context only when its calls have ended: they get their answers at once nevertheless."""
        guest.device.epoch._at_once = None
        start = bench.tee.start
        kept: list[Call] = []
        monkeypatch.setattr(bench.tee, "start", kept.append)
        Asker.unmasked = False
        call = guest.invoke(context, session, FS, run=False)
        guest.close_context(context, run=False)
        bench.turn()
        monkeypatch.setattr(bench.tee, "start", start)
        for one in kept[:1]:
            start(one)
        bench.turn()
        assert call.ret == Result.COMMUNICATION
        (closing,) = kept[1:]
        start(closing)
        bench.turn()
        assert guest.sent[-1].ret == 0

    @requirement("DEV-CTX-5", "DEV-CTX-3")
    def test_what_was_asked_before(
        self, bench: Bench, guest: Guest, context: int, session: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Asker.unmasked = False
        call = guest.invoke(context, session, FS)
        rpc = guest.event(FS).rpc
        start, kept = bench.tee.start, list[Call]()
        monkeypatch.setattr(bench.tee, "start", kept.append)
        closed = guest.close_context(context)
        assert (call.ret, closed.done) == (Result.COMMUNICATION, False)
        guest.events()
        assert guest.withdrawn == [rpc]
        start(kept[0])
        bench.turn()
        assert closed.ret == 0
        monkeypatch.setattr(bench.tee, "start", start)


KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
OTHER_KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
HELLO = examples.UUIDS["hello_world"]
GOOD = package.sign(examples.source("hello_world"), HELLO, 1, KEYS.private)


class TestTaPackages:
    @pytest.mark.feature("TAs: loaded over RPC, verified before they run")
    @pytest.mark.parametrize(
        ("data", "code"),
        [
            (GOOD, Result.SUCCESS),
            (examples.source("hello_world"), Result.BAD_FORMAT),
            (GOOD[:-1], None),
            (GOOD[:30], None),
            (package.sign(examples.source("probe"), PROBE, 1, KEYS.private), Result.SECURITY),
            (package.sign(examples.source("hello_world"), HELLO, 1, OTHER_KEYS.private), Result.SECURITY),
            (package.sign(b"raise SystemExit", HELLO, 1, KEYS.private), Result.BAD_FORMAT),
        ],
        ids=["good", "unsigned", "truncated", "cut", "another-uuid", "another-key", "raises"],
    )
    @pytest.mark.fault("lying-supplicant")
    def test_load(self, data: bytes, code: int | None) -> None:
        bench = Bench(built_in={}, keys=[KEYS.public])
        guest = bench.guest()
        context = guest.open_context()
        for address in (RAM, RAM + 0x10000):  # the device goes on
            call = guest.open(context, HELLO)
            assert status(guest.serve_load(data, context, address)) is Status.OK
            if code is None:
                assert call.ret in (Result.BAD_FORMAT, Result.SECURITY)
            else:
                assert call.ret == code
            assert (call.response.ident() == 0) is (call.ret != 0)
        guest.end()
        bench.check_empty()

    @requirement("DEV-MEM-5")
    @pytest.mark.feature("RPC: with one TEE thread, a suspended call, a registration and the RPC's answer get through")
    @pytest.mark.fault("one-thread")
    def test_one_thread(self) -> None:
        """A call holds the only thread and waits for an RPC, whose answer needs a registration."""
        bench = Bench(built_in=examples.built_in("probe"), keys=[KEYS.public], threads=1)
        guest = bench.guest()
        context = guest.open_context()
        session = guest.open_session(context)
        load = guest.open(context, HELLO)
        behind = guest.invoke(context, session, 0)
        assert not behind.done
        assert bench.tee.usage()["threads_busy"] == 1
        guest.serve_load(GOOD, context)
        assert (load.ret, behind.ret) == (0, 0)
        guest.end()
        bench.check_empty()
