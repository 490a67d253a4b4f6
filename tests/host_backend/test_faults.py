"""Faults that cross the whole device: quotas, deaths and hung neighbours, with another guest that must not notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from device.config import Limits
from device.wire import ParamType, Queue, Request, Status
from tee.results import Result
from tee.rpc import RpcCommand
from tee.soft import examples
from tee.soft.ta import UUID, Parameters, TrustedApplication
from tests.host_backend.bench import INLINE, RAM, Bench, Guest, Sent
from tests.host_backend.test_life import STATES

NOBODY = UUID(int=0xBAD)
IN, INOUT, V_IN, V_INOUT = ParamType.MEMREF_IN, ParamType.MEMREF_INOUT, ParamType.VALUE_IN, ParamType.VALUE_INOUT


class Shared(TrustedApplication):
    """One instance for all guests. Command 0 returns, command 1 waits for the caller's supplicant."""

    uuid = UUID(int=0x51)
    single_instance = multi_session = True

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        if command:
            await self.env.rpc(RpcCommand.FS, [])


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench(built_in={**examples.built_in("probe"), Shared.uuid: Shared})
    yield bench
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


class Neighbour:
    """Another guest, which goes on as if nothing were."""

    def __init__(self, bench: Bench) -> None:
        self.guest = bench.guest()
        self.context = self.guest.open_context()
        self.session = self.guest.open_session(self.context)

    def works(self) -> bool:
        """A whole life of a client: everything that has a quota, and an RPC."""
        guest, context = self.guest, self.guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        assert guest.invoke(context, session, 2, (INOUT, 0, 64, region), (V_IN, 1, 0, 0)).ret == 0
        load = guest.open(context, NOBODY)
        guest.reply(guest.event(RpcCommand.LOAD_TA).rpc, Result.ITEM_NOT_FOUND)
        assert load.ret == Result.ITEM_NOT_FOUND
        assert guest.close_context(context).ret == 0
        return guest.invoke(self.context, self.session, 0).ret == 0


# -- quotas

SMALL = Limits(
    max_contexts=3,
    max_sessions=4,
    max_regions=3,
    max_region_bytes=1 << 16,
    max_calls=3,
    max_rpcs=2,
    max_inline_bytes=64,
)
More = Callable[[], Sent]


def contexts(guest: Guest, context: int) -> More:
    return lambda: guest.send(Request.OPEN_CONTEXT, flags=0)


def sessions(guest: Guest, context: int) -> More:
    return lambda: guest.open(context)


def regions(guest: Guest, context: int) -> More:
    return lambda: guest.register(context, (RAM, 64))


def region_bytes(guest: Guest, context: int) -> More:
    return lambda: guest.register(context, (RAM, 40000))


def region_ranges(guest: Guest, context: int) -> More:
    return lambda: guest.register(context, *[(RAM, 1)] * (guest.limits.max_region_ranges + 1))


def calls(guest: Guest, context: int) -> More:
    session = guest.open_session(context)
    return lambda: guest.wait(context, session)


def inline_bytes(guest: Guest, context: int) -> More:
    session = guest.open_session(context)
    return lambda: guest.invoke(context, session, 0, (IN | INLINE, 0, 65, 0), inline=bytes(72))


def parameters(guest: Guest, context: int) -> More:
    session = guest.open_session(context)
    return lambda: guest.invoke(context, session, 0, *[(0, 0, 0, 0)] * (guest.limits.max_params + 1))


def request_bytes(guest: Guest, context: int) -> More:
    size = guest.limits.max_request_bytes + guest.limits.max_inline_bytes + 1

    def more() -> Sent:
        sent = guest.offer(Queue.REQUEST, bytes(size), 16)
        guest.bench.turn()
        return sent

    return more


QUOTAS = [
    contexts, sessions, regions, region_bytes, region_ranges, calls, inline_bytes, parameters, request_bytes
]  # fmt: skip


@pytest.mark.requirement("DEV-LIM-1", "DEV-LIM-2")
@pytest.mark.fault("quota")
@pytest.mark.parametrize("quota", QUOTAS)
def test_a_guest_at_a_quota(bench: Bench, quota: Callable[[Guest, int], More]) -> None:
    neighbour, guest = Neighbour(bench), bench.guest(limits=SMALL)
    context = guest.open_context()
    more = quota(guest, context)
    for _ in range(10):
        sent = more()
        if sent.done and sent.status:
            break
    assert sent.status == Status.LIMIT
    before = bench.tee.usage()
    for _ in range(5):
        assert more().status == Status.LIMIT  # and takes nothing
    assert bench.tee.usage() == before
    assert neighbour.works()
    assert guest.close_context(context).ret == 0  # ends also at the limit, and all of it is free again
    assert guest.open(guest.send(Request.OPEN_CONTEXT, flags=0).response.ident()).ret == 0


@pytest.mark.requirement("DEV-RPC-2", "DEV-LIM-1")
@pytest.mark.fault("quota")
def test_a_guest_at_its_rpcs(bench: Bench) -> None:
    """It answers none of them, acknowledges nothing and goes on asking; there is a thread for the neighbour."""
    neighbour, guest = Neighbour(bench), bench.guest(limits=SMALL)
    context = guest.open_context()
    loads = [guest.open(context, UUID(int=0xBAD0 + n)) for n in range(3)]
    assert len(guest.events()) == 2  # of three
    assert neighbour.works()
    bench.pass_time(11)
    assert {load.ret for load in loads} == {Result.COMMUNICATION}
    again = guest.open(context, NOBODY)
    assert guest.events() == []  # both ids wait for their acknowledgement
    assert neighbour.works()
    bench.pass_time(11)
    assert again.ret == Result.COMMUNICATION
    assert guest.close_context(context).ret == 0


@pytest.mark.fault("event-buffers")
def test_no_event_buffer_is_ever_posted(bench: Bench) -> None:
    neighbour, guest = Neighbour(bench), bench.guest(buffers=0)
    context = guest.open_context()
    loads = [guest.open(context, UUID(int=0xBAD0 + n)) for n in range(3)]
    assert neighbour.works()
    bench.pass_time(11)
    assert {load.ret for load in loads} == {Result.COMMUNICATION}
    assert len(guest.device.epoch.rpcs) == 0


# -- deaths


@pytest.mark.requirement("DEV-CTX-3", "DEV-CTX-4", "DEV-CTX-5")
@pytest.mark.fault("client-killed")
@pytest.mark.parametrize("state", STATES)
def test_a_client_that_is_killed(bench: Bench, state: Callable[[Guest], None]) -> None:
    """Its driver closes its contexts; another client of the same guest goes on, nobody answers RPCs any more."""
    guest = bench.guest()
    mine = guest.open_context()
    session = guest.open_session(mine)
    call = guest.wait(mine, session, 1000)
    state(guest)
    bench.turn()
    theirs = [entry.ident for entry in guest.device.epoch.contexts if entry.ident != mine]
    closed = [guest.close_context(ident) for ident in theirs]
    bench.turn()
    bench.pass_time(0.5)
    assert all(sent.status in (Status.OK, Status.NO_CONTEXT) for sent in closed)
    assert [entry.ident for entry in guest.device.epoch.contexts] == [mine]
    assert [entry.context.ident for entry in guest.device.epoch.sessions] == [mine]
    assert guest.leases == 0
    assert list(guest.device.epoch.calls) == [call.tag]
    bench.pass_time(1)
    assert call.ret == 0
    assert guest.invoke(mine, session, 0).ret == 0


@pytest.mark.fault("guest-dies")
@pytest.mark.parametrize("state", STATES)
def test_a_guest_that_dies(bench: Bench, state: Callable[[Guest], None]) -> None:
    neighbour, guest = Neighbour(bench), bench.guest()
    state(guest)
    guest.disconnect()
    assert neighbour.works()
    assert guest.leases == 0
    assert bench.tee.usage()["calls"] == 0


# -- what changes under the device's hands


@pytest.mark.requirement("DEV-QUE-6")
@pytest.mark.fault("changed-request")
def test_a_request_that_is_changed_after_submission(bench: Bench) -> None:
    guest = bench.guest()
    context = guest.open_context()
    session = guest.open_session(context)
    region = guest.region(context)
    given = [(INOUT, 0, 8, region), (V_INOUT, 1000, 0, 0)]
    call = guest.invoke(context, session, 8, *given, run=False)
    call.data = memoryview(bytearray(call.data))  # type: ignore[assignment]
    tag = call.tag
    bench.turn()
    call.data[:] = b"\xff" * len(call.data)  # type: ignore[index]
    assert guest.cancel(context, (1 << 64) - 1).status == Status.NOT_FOUND
    bench.pass_time(2)
    assert call.ret == 0
    assert call.params(2)[0] == given[0]
    assert guest.cancel(context, tag).status == Status.NOT_FOUND


@pytest.mark.fault("memory-removed")
def test_memory_that_is_removed_under_an_rpc(bench: Bench) -> None:
    """The load goes on with the mapping that it has; the guest gets nothing new there."""
    guest = bench.guest()
    context = guest.open_context()
    region = guest.region(context)
    load = guest.open(context, NOBODY)
    seen = guest.event(RpcCommand.LOAD_TA)
    guest.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], 100, seen.params[1][3])])
    guest.reply(guest.event(RpcCommand.SHM_ALLOC).rpc, 0, [(INOUT, 0, 100, region)])
    seen = guest.event(RpcCommand.LOAD_TA)
    guest.unplug()
    guest.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], 100, region)])
    guest.reply(guest.event(RpcCommand.SHM_FREE).rpc)
    assert load.ret == Result.BAD_FORMAT  # zeros are no TA
    assert guest.unregister(context, region).ret == 0
    assert guest.leases == 0


# -- a TA that is shared


@pytest.mark.fault("hung-instance")
def test_a_single_instance_that_hangs_in_a_guests_rpc(bench: Bench) -> None:
    """Others wait for it up to the RPC's deadline, can be cancelled meanwhile, and other TAs are not concerned."""
    guest, neighbour = bench.guest(), Neighbour(bench)
    context = guest.open_context()
    hung = guest.invoke(context, guest.open_session(context, Shared.uuid), 1)
    theirs = neighbour.guest.open(neighbour.context, Shared.uuid)
    given_up = neighbour.guest.open(neighbour.context, Shared.uuid)
    assert not theirs.done
    assert neighbour.works()
    neighbour.guest.cancel(neighbour.context, given_up.tag)
    assert given_up.ret == Result.CANCEL
    bench.pass_time(guest.limits.rpc_deadline_ms / 1000 - 0.1)
    assert not theirs.done
    bench.pass_time(0.2)
    assert (hung.done, theirs.ret) == (True, 0)
    assert neighbour.guest.invoke(neighbour.context, theirs.response.ident(), 0).ret == 0


@pytest.mark.fault("hung-instance")
def test_a_guest_that_is_reset_while_a_single_instance_hangs(bench: Bench) -> None:
    """Its session there ends after the hung call, and its next start waits for that."""
    guest, other = bench.guest(), bench.guest()
    other.open_session(other.open_context(), Shared.uuid)
    context = guest.open_context()
    hung = guest.invoke(context, guest.open_session(context, Shared.uuid), 1)
    other.reset()
    other.start(buffers=4)
    first = other.send(Request.OPEN_CONTEXT, flags=0)
    bench.pass_time(guest.limits.rpc_deadline_ms / 1000 - 0.1)
    assert not first.done
    bench.pass_time(0.2)
    bench.turn()
    assert (hung.done, first.ret) == (True, 0)


def test_the_quotas_are_those_of_the_config_space() -> None:
    """Whoever adds a limit adds its quota above."""
    mine = {quota.__name__ for quota in QUOTAS} | {"rpcs"}
    renamed = {"params": "parameters"}
    told = {name[4:] for name in Limits.__slots__ if name.startswith("max_")}
    assert {renamed.get(name, name) for name in told} == mine
