"""OCALLs: what the device tells the driver of them, and what it answers in the client's place."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from device.config import Limits
from device.params import RawParam
from device.wire import Feature, ParamType, Status
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import GRPC_UUID, RpcCommand
from tee.soft import examples
from tee.soft.ta import UUID, MemoryReference, Parameters, TrustedApplication
from tests.host_backend.bench import ALL, RAM, Bench, Guest

requirement = pytest.mark.requirement
OCALL, PROBE = examples.UUIDS["ocall"], examples.UUIDS["probe"]
V_IN, V_INOUT, INOUT, META = ParamType.VALUE_IN, ParamType.VALUE_INOUT, ParamType.MEMREF_INOUT, 0x100
FEATURES = ALL | Feature.OCALL
CALL, LEND, GRPC, MANY, CANCEL, TIMED = range(6)


class Farewell(TrustedApplication):
    """Calls its client when its session closes."""

    uuid = UUID(int=0xFA)
    codes: list[int] = []  # noqa: RUF012

    async def close_session(self, session: None) -> None:
        try:
            await self.env.ocall(1)
        except TeeError as error:
            self.codes.append(error.code)


class Thief(TrustedApplication):
    """Calls its client with memory that is not the call's."""

    uuid = UUID(int=0x1F)
    kept: list[Memory] = []  # noqa: RUF012
    codes: list[int] = []  # noqa: RUF012

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        if command == 0:
            memory = params.memory(0, Direction.INOUT).memory
            assert memory is not None
            self.kept.append(memory)
            return
        mine = MemoryReference(Direction.INOUT, self.kept[0], 0, 16)
        own = MemoryReference.over(Direction.INOUT, bytearray(b"secret"))
        for reference in (mine, own):
            try:
                await self.env.ocall(1, [reference])
            except TeeError as error:
                self.codes.append(error.code)
        # Past the software TEE's own check:
        asked = [Value(Direction.INOUT, 1, meta=True), MemRef(Direction.INOUT, self.kept[0], 0, 16)]
        reply = await self.env.rpc(RpcCommand.OCALL, list(asked), to_client=True)
        self.codes.append(reply.code)


@pytest.fixture
def bench() -> Iterator[Bench]:
    for ta in (Farewell, Thief):
        ta.codes.clear()
    Thief.kept.clear()
    built_in = {**examples.built_in("probe", "ocall"), Farewell.uuid: Farewell, Thief.uuid: Thief}
    bench = Bench(built_in=built_in, threads=2)
    yield bench
    Thief.kept.clear()
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


@pytest.fixture
def guest(bench: Bench) -> Guest:
    return bench.guest(features=FEATURES, limits=Limits(rpc_deadline_ms=3000))


def function(number: int, result: int = 0) -> RawParam:
    return (V_INOUT, number, result, 0)


def asked(number: int) -> RawParam:
    return (V_INOUT | META, number, 0, 0)


@requirement("DEV-OCA-1", "DEV-RPC-5")
def test_an_ocall_of_an_invoke(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, CALL, function(7), (V_INOUT, 1, 2, 3))
    seen = guest.event(RpcCommand.OCALL)
    assert guest.for_clients == {seen.rpc}
    assert seen[3:] == (call.tag, context, session, [asked(7), (V_INOUT, 1, 2, 3)])
    assert guest.reply(seen.rpc, 0, [asked(7), (V_INOUT, 4, 5, 6)], origin=Origin.API).status == Status.OK
    assert call.ret == 0
    assert call.params(2) == [function(7), (V_INOUT, 4, 5, 6)]


@requirement("DEV-OCA-1")
def test_an_ocall_of_opening(guest: Guest) -> None:
    context = guest.open_context()
    opening = guest.open(context, OCALL, params=[function(7)])
    seen = guest.event(RpcCommand.OCALL)
    assert seen[3:] == (opening.tag, context, 0, [asked(7)])
    guest.reply(seen.rpc, 0x77, [asked(7)], origin=Origin.API)
    assert opening.ret == 0
    assert opening.params(1) == [function(7, 0x77)]


@requirement("DEV-OCA-2")
@pytest.mark.fault("ocall-no-handler")
def test_without_the_feature(bench: Bench) -> None:
    guest = bench.guest(features=ALL)
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    for command in (CALL, LEND):
        assert guest.invoke(context, session, command, function(1, 64)).ret == Result.NOT_SUPPORTED
    assert guest.events() == []


@requirement("DEV-OCA-2")
@pytest.mark.fault("ocall-no-handler")
def test_during_other_requests(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, Farewell.uuid)
    from device.wire import Request

    assert guest.send(Request.CLOSE_SESSION, context=context, session=session).ret == 0
    assert Farewell.codes == [Result.NOT_SUPPORTED]
    assert guest.events() == []


@requirement("DEV-OCA-3", "DEV-OCA-5")
def test_other_calls_meanwhile_and_any_order(guest: Guest) -> None:
    context = guest.open_context()
    sessions = [guest.open_session(context, OCALL) for _ in range(2)]
    probe = guest.open_session(context, PROBE)
    first = guest.invoke(context, sessions[0], CALL, function(1))
    (one,) = guest.events()
    assert guest.invoke(context, probe, 0).ret == 0  # the handler's, say
    second = guest.invoke(context, sessions[1], CALL, function(2))
    (two,) = guest.events()
    guest.reply(two.rpc, 0, [asked(2)], origin=Origin.API)
    assert second.ret == 0
    assert not first.done
    guest.reply(one.rpc, 0, [asked(1)], origin=Origin.API)
    assert first.ret == 0


@requirement("DEV-OCA-4")
@pytest.mark.fault("ocall-no-thread")
def test_busy_at_once(guest: Guest) -> None:
    """Two threads, and both wait for clients."""
    context = guest.open_context()
    sessions = [guest.open_session(context, OCALL) for _ in range(2)]
    probe = guest.open_session(context, PROBE)
    calls = [guest.invoke(context, session, CALL, function(1)) for session in sessions]
    waiting = guest.invoke(context, sessions[0], CALL, function(1))
    busy = guest.invoke(context, probe, 0)
    for one in (waiting, busy):
        assert (one.response.status, one.ret, one.response.origin) == (Status.OK, Result.BUSY, Origin.TEE)
    for seen in guest.events():
        guest.reply(seen.rpc, 0, [asked(1)], origin=Origin.API)
    assert [call.ret for call in calls] == [0, 0]
    assert guest.invoke(context, probe, 0).ret == 0


def test_a_call_that_waits_already_becomes_busy(guest: Guest) -> None:
    """It waits for a thread when the last one goes to a client."""
    context = guest.open_context()
    probes = [guest.open_session(context, PROBE) for _ in range(2)]
    ocalls = [guest.open_session(context, OCALL) for _ in range(2)]
    sleeping = guest.wait(context, probes[0], 1000)
    first = guest.invoke(context, ocalls[0], CALL, function(1))
    waiting = guest.invoke(context, probes[1], 0)
    second = guest.invoke(context, ocalls[1], CALL, function(2))
    assert not waiting.done
    guest.bench.pass_time(1.0)
    assert sleeping.ret == 0
    assert waiting.ret == 0  # its turn came first
    assert not second.done
    for seen in guest.events():
        guest.reply(seen.rpc, 0, [asked(seen.params[0][1])], origin=Origin.API)
    assert (first.ret, second.ret) == (0, 0)


def test_another_machine_gets_a_thread(bench: Bench, guest: Guest) -> None:
    """However many of one machine's calls wait for clients."""
    context = guest.open_context()
    for session in [guest.open_session(context, OCALL) for _ in range(2)]:
        guest.invoke(context, session, CALL, function(1))
    other = bench.guest(features=FEATURES)
    theirs = other.open_context()
    assert other.invoke(theirs, other.open_session(theirs, PROBE), 0).ret == 0


@requirement("DEV-RPC-6", "DEV-MEM-10")
def test_memory_of_the_clients(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, LEND, function(3, 300))
    wanted = guest.event(RpcCommand.SHM_ALLOC)
    assert guest.for_clients == {wanted.rpc}
    assert wanted[3:] == (call.tag, context, session, [(V_IN, 0, 300, 8)])
    region = guest.region(context, RAM, 4096)
    assert guest.reply(wanted.rpc, 0, [(INOUT, 8, 300, region)]).status == Status.OK
    seen = guest.event(RpcCommand.OCALL)
    assert seen.params == [asked(3), (INOUT, 8, 300, region)]
    (view,) = guest.memory.translate(RAM + 8, 300)
    assert bytes(view) == bytes(at & 0xFF for at in range(300))
    view[:] = b"\2" * 300
    guest.reply(seen.rpc, 0, [asked(3), (INOUT, 8, 300, region)], origin=Origin.API)
    freed = guest.event(RpcCommand.SHM_FREE)
    assert freed.params == [(V_IN, 0, 0, 0), (INOUT, 8, 300, region)]
    assert len(guest.for_clients) == 3
    guest.reply(freed.rpc)
    assert call.ret == 0
    assert call.params(1) == [(V_INOUT, 3, 0, 600)]
    assert guest.unregister(context, region).ret == 0


@pytest.mark.parametrize(
    "answer",
    [
        [(INOUT, 0, 299, 0)],  # too little
        [(INOUT, 4000, 300, 0)],  # outside
        [],
        [(INOUT, 0, 300, 77)],  # no region
        [(V_INOUT, 0, 300, 0)],
    ],
)
@pytest.mark.fault("ocall-bad-memory")
def test_bad_memory_of_the_clients(guest: Guest, answer: list[RawParam]) -> None:
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, LEND, function(3, 300))
    region = guest.region(context, RAM, 4096)
    answer = [(kind, a, b, c or region) for kind, a, b, c in answer]
    assert guest.reply(guest.event(RpcCommand.SHM_ALLOC).rpc, 0, answer).status != Status.OK
    assert call.ret == Result.COMMUNICATION
    assert guest.unregister(context, region).ret == 0


@pytest.mark.fault("ocall-memory-freed")
def test_memory_that_the_call_was_given(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    region = guest.region(context)
    call = guest.invoke(context, session, CALL, function(1), (INOUT, 16, 32, region))
    seen = guest.event(RpcCommand.OCALL)
    assert seen.params == [asked(1), (INOUT, 16, 32, region)]
    # It cannot be taken away while the call has it.
    ending = guest.unregister(context, region)
    assert not ending.done
    guest.reply(seen.rpc, 0, [asked(1), (INOUT, 16, 32, region)], origin=Origin.API)
    assert (call.ret, ending.ret) == (0, 0)


@pytest.mark.fault("ocall-bad-memory")
def test_memory_that_the_call_was_not_given(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, Thief.uuid)
    region = guest.region(context)
    assert guest.invoke(context, session, 0, (INOUT, 0, 4096, region)).ret == 0
    assert guest.invoke(context, session, 1).ret == 0
    assert Thief.codes == [Result.BAD_PARAMETERS, Result.BAD_PARAMETERS, Result.NOT_SUPPORTED]
    assert guest.events() == []
    Thief.kept.clear()


@pytest.mark.fault("ocall-silence")
def test_a_client_that_never_answers(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, CALL, function(1))
    seen = guest.event(RpcCommand.OCALL)
    guest.bench.pass_time(2.9)
    assert not call.done
    guest.bench.pass_time(0.2)
    assert call.ret == Result.COMMUNICATION
    assert guest.events() == []
    assert guest.withdrawn == [seen.rpc]
    # Late, and twice: nothing.
    for _ in range(2):
        assert guest.reply(seen.rpc, 0, [asked(1)], origin=Origin.API).status == Status.NOT_FOUND
    assert guest.ack(seen.rpc).status == Status.OK


@pytest.mark.fault("ocall-client-goes", "ocall-cancelled", "ocall-guest-reset")
@pytest.mark.parametrize("what", ["context", "session", "reset", "cancel"])
def test_it_ends_in_the_ocall(guest: Guest, what: str) -> None:
    from device.wire import Request

    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, CANCEL, function(1))
    seen = guest.event(RpcCommand.OCALL)
    if what == "context":
        ending = guest.close_context(context)
    elif what == "session":
        ending = guest.send(Request.CLOSE_SESSION, context=context, session=session)
    elif what == "reset":
        guest.reset()
        guest.bench.turn()
        return  # the fixture sees that nothing is left
    else:
        guest.cancel(context, call.tag)
        assert call.ret == Result.CANCEL
        ending = call
    assert ending.response.status == Status.OK
    assert call.response.ret in (Result.CANCEL, Result.COMMUNICATION)
    guest.events()
    assert guest.withdrawn == [seen.rpc]
    assert guest.ack(seen.rpc).status == Status.OK


@pytest.mark.fault("ocall-cancelled")
def test_a_cancel_that_the_ta_masks_waits(guest: Guest) -> None:
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, CALL, function(1))
    seen = guest.event(RpcCommand.OCALL)
    guest.cancel(context, call.tag)
    assert not call.done
    guest.reply(seen.rpc, 0, [asked(1)], origin=Origin.API)
    assert call.ret == 0


@requirement("DEV-OCA-6")
def test_generic_rpc(guest: Guest) -> None:
    context = guest.open_context()
    assert guest.open(context, GRPC_UUID).ret == Result.ACCESS_DENIED
    session = guest.open_session(context, OCALL)
    call = guest.invoke(context, session, GRPC, function(5), (V_INOUT, 1, 2, 3))
    seen = guest.event(RpcCommand.OCALL)
    assert seen.params == [asked(5), (V_INOUT, 1, 2, 3)]
    guest.reply(seen.rpc, 0, [asked(5), (V_INOUT, 7, 8, 9)], origin=Origin.API)
    assert call.params(2) == [function(5), (V_INOUT, 7, 8, 9)]


def test_an_answer_that_was_not_the_handlers(guest: Guest) -> None:
    """Origin COMMS: the driver says that the client was not reached."""
    context = guest.open_context()
    session = guest.open_session(context, OCALL)
    for code, expected in ((Result.NOT_SUPPORTED, Result.NOT_SUPPORTED), (0, Result.COMMUNICATION)):
        call = guest.invoke(context, session, CALL, function(1))
        params = [] if code else [asked(1)]
        guest.reply(guest.event(RpcCommand.OCALL).rpc, code, params, origin=Origin.COMMS)
        assert call.ret == expected
