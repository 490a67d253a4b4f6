"""Limits of instances, memory and time; properties; clients' identities."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from tee import package
from tee.calls import Client, CloseContext, CloseSession, Invoke, Login, OpenSession
from tee.params import Direction, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import RpcReply
from tee.soft import examples
from tee.soft.limits import SoftLimits
from tee.soft.scheduler import MAX_REFUSALS
from tee.soft.ta import Parameters, TrustedApplication
from tests.tee.bench import HELLO, IDLE, PROBE, Bench, Courier

IN = Direction.IN


class Hungry(TrustedApplication):
    """Command 0 allocates a bytes, 1 frees all, 2 sleeps for a seconds, 3 never ends, 4 the same with an RPC."""

    uuid = UUID(int=400)
    data_size = 1000
    description = "wants memory"
    properties = {"vendor.colour": "green", "gpd.ta.appID": "forged"}  # noqa: RUF012
    seen: list[Any] = []  # noqa: RUF012

    async def create(self) -> None:
        self.buffers: list[bytearray] = []

    async def open_session(self, params: Parameters, client: Client) -> None:
        Hungry.seen.append(client)
        Hungry.seen.append(self.env.properties)

    async def invoke(self, session: object, command: int, params: Parameters) -> None:
        if command == 0:
            self.buffers.append(self.env.allocate(params.value(0, IN).a))
        elif command == 1:
            while self.buffers:
                self.env.free(self.buffers.pop())
        elif command == 2:
            await self.env.sleep(params.value(0, IN).a)
        elif command == 4:
            await self.env.rpc(99, [])
        while command == 3:
            try:
                await self.env.sleep(1)
            except TeeError:
                continue


class Kept(Hungry):
    uuid = UUID(int=401)
    single_instance = multi_session = keep_alive = True


def world(**options: Any) -> Bench:
    Hungry.seen = []
    return Bench(built_in={**examples.built_in(), Hungry.uuid: Hungry, Kept.uuid: Kept}, **options)


def opened(bench: Bench, vm: str, uuid: UUID = Hungry.uuid) -> Any:
    return bench.done(OpenSession(context=bench.context(vm), uuid=uuid))


@pytest.mark.parametrize(
    ("limits", "what"),
    [
        ({"instances": 2}, "too many instances"),
        ({"instances_per_vm": 2}, "too many instances"),
        ({"memory": 2999}, "wants 1000 bytes"),
    ],
)
def test_instances_and_their_memory(limits: dict[str, int], what: str) -> None:
    """The third is refused, nobody else notices, and there is room again when one has gone."""
    bench = world(limits=SoftLimits(**limits))
    first, second = opened(bench, "a"), opened(bench, "a")
    third = opened(bench, "a")
    assert (third.code, third.origin) == (Result.OUT_OF_MEMORY, Origin.TEE)
    assert what in bench.logged[-1]
    assert bench.invoke(first.value, 0, Value(IN, 1)).code == Result.SUCCESS
    elsewhere = opened(bench, "b")
    assert elsewhere.code == (Result.SUCCESS if "instances_per_vm" in limits else Result.OUT_OF_MEMORY)
    bench.done(CloseSession(session=second.value))
    assert opened(bench, "a").code == Result.SUCCESS


def test_a_ta_that_declares_too_much() -> None:
    bench = world(limits=SoftLimits(instance_memory=999))
    assert opened(bench, "a").code == Result.OUT_OF_MEMORY
    assert opened(bench, "a", PROBE).code == Result.OUT_OF_MEMORY
    with pytest.raises(ValueError, match="negative"):
        SoftLimits(memory=-1)


def test_a_panic_gives_back_all() -> None:
    bench = world(limits=SoftLimits(instances=1))
    for _ in range(3):
        context = bench.context()
        assert bench.invoke(bench.session(context, PROBE), 6).code == Result.TARGET_DEAD
    assert opened(bench, "a").code == Result.SUCCESS


def test_a_session_more_of_an_instance_needs_no_room() -> None:
    bench = world(limits=SoftLimits(instances=1))
    assert [opened(bench, vm, Kept.uuid).code for vm in "abc"] == [Result.SUCCESS] * 3
    assert opened(bench, "a").code == Result.OUT_OF_MEMORY


def test_loaded_tas(keys: package.KeyPair) -> None:
    bench = Bench(built_in={PROBE: Hungry}, keys=[keys.public], limits=SoftLimits(loaded=1))
    courier = Courier(bench, package.sign(examples.source("hello_world"), HELLO, 1, keys.private))
    context = bench.context()
    call = bench.start(OpenSession(context=context, uuid=HELLO))
    courier.serve()
    session = bench.finish(call).value
    asked = len(bench.rpcs())
    assert bench.done(OpenSession(context=context, uuid=HELLO)).code == Result.OUT_OF_MEMORY
    assert len(bench.rpcs()) == asked, "it is refused before it is fetched"
    assert opened(bench, "", PROBE).code == Result.SUCCESS
    bench.done(CloseSession(session=session))
    call = bench.start(OpenSession(context=context, uuid=HELLO))
    courier.serve()
    assert bench.finish(call).code == Result.SUCCESS


def test_allocations() -> None:
    bench = world()
    session = opened(bench, "a").value
    for size, code in (
        (600, Result.SUCCESS),
        (401, Result.OUT_OF_MEMORY),
        (400, Result.SUCCESS),
        (1, Result.OUT_OF_MEMORY),
    ):
        assert bench.invoke(session, 0, Value(IN, size)).code == code
    bench.invoke(session, 1)
    assert bench.invoke(session, 0, Value(IN, 1000)).code == Result.SUCCESS


class TestTime:
    @pytest.mark.parametrize("command", [2, 4])
    def test_a_call_that_takes_too_long(self, command: int) -> None:
        """It is interrupted although it masks cancels, and its thread is free."""
        bench = world(longest_call=10.0, threads=1)
        session, other = opened(bench, "a").value, opened(bench, "b").value
        call = bench.start(Invoke(session=session, func=command, params=[Value(IN, 100)]))
        waiting = bench.start(Invoke(session=other, func=0, params=[Value(IN, 1)]))
        assert bench.run() == 10.0
        bench.now += 9
        bench.run()
        assert bench.ended(call) is None
        bench.now += 1
        done = bench.finish(call)
        assert (done.code, done.origin) == (Result.CANCEL, Origin.TRUSTED_APP)
        assert bench.finish(waiting).code == Result.SUCCESS
        assert len(bench.withdrawn()) == (command == 4)
        assert bench.invoke(session, 2, Value(IN, 0)).code == Result.SUCCESS

    def test_short_waits_add_up(self) -> None:
        bench = world(longest_call=10.0)
        session = bench.session(bench.context(), PROBE)
        call = bench.start(Invoke(session=session, func=10, params=[Value(IN, 10**9)]))
        bench.tee.run()
        bench.now += 11
        assert bench.finish(call).code == Result.CANCEL

    def test_a_ta_that_goes_on_nevertheless_is_ended(self) -> None:
        bench = world(longest_call=10.0)
        session = opened(bench, "a").value
        call = bench.start(Invoke(session=session, func=3))
        bench.run()
        for _ in range(10):
            bench.now += 1
            bench.run(MAX_REFUSALS)
        assert bench.finish(call).code == Result.TARGET_DEAD
        assert "taken too long" in bench.logged[-1]

    def test_what_ends_in_time_leaves_nothing(self) -> None:
        bench = world(longest_call=10.0)
        session = opened(bench, "a").value
        for _ in range(1000):
            call = bench.start(Invoke(session=session, func=2, params=[Value(IN, 1)]))
            bench.run()
            bench.now += 1
            assert bench.finish(call).code == Result.SUCCESS
        assert len(bench.tee._scheduler._timers) < 600

    def test_an_answer_in_time_and_the_deadline_of_a_later_call(self) -> None:
        bench = world(longest_call=10.0)
        session = opened(bench, "a").value
        call = bench.start(Invoke(session=session, func=4))
        rpc = bench.rpc()
        bench.now += 9
        bench.answer(rpc, Result.SUCCESS)
        assert bench.finish(call).code == Result.SUCCESS
        bench.answer(rpc, Result.GENERIC)  # double, and late
        call = bench.start(Invoke(session=session, func=2, params=[Value(IN, 5)]))
        bench.run()
        bench.now += 5
        assert bench.finish(call).code == Result.SUCCESS


def test_a_late_answer_after_the_context_is_closed() -> None:
    bench = world()
    context = bench.context()
    session = bench.session(context, Hungry.uuid)
    bench.start(Invoke(session=session, func=4))
    rpc = bench.rpc()
    bench.done(CloseContext(context=context))
    events = len(bench.events)
    bench.tee.answer(rpc, RpcReply())
    bench.run()
    assert len(bench.events) == events
    assert bench.tee.usage() == IDLE


def test_properties() -> None:
    bench = world()
    opened(bench, "a")
    opened(bench, "a", Kept.uuid)
    first, second = Hungry.seen[1], Hungry.seen[3]
    assert dict(first) == {
        "vendor.colour": "green",
        "gpd.ta.appID": str(Hungry.uuid),
        "gpd.ta.singleInstance": False,
        "gpd.ta.multiSession": False,
        "gpd.ta.instanceKeepAlive": False,
        "gpd.ta.dataSize": 1000,
        "gpd.ta.version": "0",
        "gpd.ta.description": "wants memory",
    }
    assert [second[f"gpd.ta.{name}"] for name in ("singleInstance", "multiSession", "instanceKeepAlive")] == [True] * 3
    with pytest.raises(TypeError):
        first["gpd.ta.version"] = "1"


def test_client_identity() -> None:
    bench = world()
    client = Client(Login.USER, UUID(int=5), "a")
    assert bench.done(OpenSession(context=bench.context("a"), uuid=Hungry.uuid, client=client)).code == Result.SUCCESS
    assert Hungry.seen[0] == client
