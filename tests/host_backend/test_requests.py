"""Every request: what it does, every status that it can end with, and what it leaves behind."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from device.config import Config, Limits
from device.messages import REQUESTS
from device.requests import STATUS_RESULT
from device.wire import NULL_REGION, PARAM_META, Feature, ParamType, Queue, RegionFlag, Request, Status
from ffa.optee.client import FfaTeeDriver
from host_backend.epoch import features_of
from pyvhost.vring.api import Chain
from tee.calls import Call, Client, CloseContext, Invoke, Login, UnregisterMemory
from tee.driver import Done, GenCap, TeeInfo
from tee.params import Nothing, Param, Value
from tee.results import Origin, Result
from tee.rpc import RpcCommand
from tee.soft import SoftTee, examples
from tee.soft.ta import UUID, Direction, Parameters, TrustedApplication
from tests.host_backend.bench import ALL, INLINE, PROBE, RAM, RAM_SIZE, Bench, Guest, Sent

requirement = pytest.mark.requirement
IN, OUT, INOUT = ParamType.MEMREF_IN, ParamType.MEMREF_OUT, ParamType.MEMREF_INOUT
V_IN, V_OUT, V_INOUT = ParamType.VALUE_IN, ParamType.VALUE_OUT, ParamType.VALUE_INOUT
WORD = (1 << 64) - 1


def refused(sent: Sent, status: Status) -> bool:
    """A refusal is the header alone, with the code of the status table, from COMMS, and no flag."""
    assert sent.written == 16
    response = sent.response
    assert Status(response.status).name == status.name
    return (response.ret, response.origin, response.flags) == (STATUS_RESULT[status], Origin.COMMS, 0)


class TestConfig:
    @requirement("DEV-ID-1", "DEV-CFG-1", "DEV-CFG-3", "DEV-CFG-4")
    def test_what_a_driver_reads(self, guest: Guest) -> None:
        data = guest.device.read_config(0, 128)
        assert data[:4] == b"VTEE"
        config = Config.unpack(data)
        assert config.epoch == guest.epoch != 0
        assert config.limits == guest.limits
        config.limits.check()
        assert guest.device.read_config(8, 8) == data[8:16]
        with pytest.raises(Exception, match="read-only"):
            guest.device.write_config(8, bytes(8))

    @requirement("DEV-FEA-2")
    def test_it_offers_what_it_serves(self, guest: Guest) -> None:
        four = Feature.INLINE | Feature.RPC | Feature.OCALL | Feature.NOTIFICATION
        services = Feature.SERVICES | Feature.ATTESTATION | Feature.ENCLAVES
        assert guest.device.features == int(four | services if isinstance(guest.bench.tee, SoftTee) else four)

    @requirement("DEV-FEA-2")
    def test_a_tee_without_services(self, guest: Guest) -> None:
        without = FfaTeeDriver.__new__(FfaTeeDriver)
        assert not features_of(without) & (Feature.SERVICES | Feature.ATTESTATION | Feature.ENCLAVES)
        assert features_of(guest.bench.tee) & ~Feature.FFA_HANDLE == Feature(guest.device.features)


class TestFraming:
    @requirement("DEV-QUE-7")
    @pytest.mark.parametrize("room", [0, 15])
    @pytest.mark.fault("cut-request")
    def test_no_room_for_a_header(self, guest: Guest, room: int) -> None:
        for queue in (Queue.CONTROL, Queue.REQUEST):
            sent = guest.offer(queue, bytes(48), room)
            guest.bench.turn()
            assert sent.written == 0
            assert bytes(sent.writable) == b"\xee" * room

    @requirement("DEV-REQ-6")
    @pytest.mark.fault("cut-request")
    def test_order_of_checks(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_request_bytes=300_000, max_inline_bytes=1000))
        context = guest.open_context()

        def ask(data: bytes, queue: int = Queue.REQUEST, room: int = 64) -> Sent:
            sent = guest.offer(queue, data, room)
            bench.turn()
            return sent

        def header(kind: int, flags: int = 0, epoch: int | None = None, tag: int = 99, ctx: int = context) -> bytes:
            number = guest.epoch if epoch is None else epoch
            parts = ((kind, 4), (flags, 4), (number, 8), (tag, 8), (ctx, 4), (0, 4))
            return b"".join(value.to_bytes(size, "little") for value, size in parts)

        assert refused(ask(bytes(301_001)), Status.LIMIT)
        assert refused(ask(bytes(301_000)), Status.UNSUPPORTED)
        assert refused(ask(bytes(31)), Status.MALFORMED)
        assert refused(ask(b""), Status.MALFORMED)
        assert refused(ask(header(0x7777)[:28] + b"\1\0\0\0"), Status.MALFORMED)
        assert refused(ask(header(0x7777, 1, 0, 0, 0)), Status.UNSUPPORTED)
        assert refused(ask(header(Request.INVOKE, 1, 0, 0, 0), Queue.CONTROL), Status.UNSUPPORTED)
        assert refused(ask(header(Request.CANCEL, 1, 0, 0, 0)), Status.UNSUPPORTED)
        assert refused(ask(header(Request.INVOKE, 1, 0, 7, 0)), Status.MALFORMED)
        assert refused(ask(header(Request.INVOKE, 0, 0, 0, 0)), Status.MALFORMED)
        assert refused(ask(header(Request.INVOKE, 0, 5, 7, 0)), Status.STALE_EPOCH)
        assert refused(ask(header(Request.INVOKE, ctx=0)), Status.NO_CONTEXT)
        assert refused(ask(header(Request.OPEN_CONTEXT) + bytes(8)), Status.MALFORMED)
        assert refused(ask(header(Request.INVOKE, ctx=12345)), Status.MALFORMED)  # no body
        assert refused(ask(header(Request.CLOSE_SESSION, ctx=12345) + bytes(8)), Status.NO_CONTEXT)
        assert refused(ask(header(Request.CLOSE_SESSION) + bytes(8)), Status.NO_SESSION)
        assert refused(ask(header(Request.CLOSE_SESSION) + bytes(9)), Status.MALFORMED)
        assert refused(ask(header(Request.CLOSE_SESSION) + bytes(7) + b"\1"), Status.MALFORMED)

    @requirement("DEV-FEA-4")
    def test_features_that_are_not_negotiated(self, bench: Bench) -> None:
        guest = bench.guest(features=Feature(0))
        context = guest.open_context()
        for kind in (Request.RPC_REPLY, Request.RPC_WITHDRAWN_ACK):
            fields = dict.fromkeys(("ret", "origin"), 0) if kind == Request.RPC_REPLY else {}
            assert refused(guest.send(kind, rpc=1, **fields), Status.UNSUPPORTED)
        session = guest.open_session(context)
        sent = guest.invoke(context, session, 0, (IN | INLINE, 0, 8, 0), inline=bytes(8))
        assert refused(sent, Status.MALFORMED)

    @requirement("DEV-FEA-4")
    @pytest.mark.parametrize("kind", [k for k, r in REQUESTS.items() if r.feature & ~ALL])
    def test_requests_of_other_features(self, guest: Guest, kind: int) -> None:
        data = guest.send(Request.CLOSE_CONTEXT, context=1).data
        sent = guest.offer(Queue.REQUEST, kind.to_bytes(4, "little") + data[4:] + bytes(100), 4096)
        guest.bench.turn()
        assert refused(sent, Status.UNSUPPORTED)

    @requirement("DEV-QUE-2", "DEV-QUE-3")
    def test_any_request_queue_in_any_order(self, bench: Bench) -> None:
        guest = bench.guest(queues=3)
        context = guest.send(Request.OPEN_CONTEXT, flags=0, queue=4).response.ident()
        session = guest.open_session(context)
        waiting = guest.wait(context, session, queue=3)
        other = guest.open_session(context)
        assert guest.invoke(context, other, 0, queue=3).ret == 0
        assert not waiting.done
        guest.close_context(context)

    @requirement("DEV-REQ-1", "DEV-REQ-2", "DEV-REQ-4")
    def test_complete_responses(self, guest: Guest) -> None:
        context = guest.open_context()
        sent = guest.open(context, UUID(int=1))  # nobody has this TA, and nobody answers
        assert not sent.done
        guest.bench.pass_time(11)
        assert (sent.status, sent.written) == (Status.OK, 24)
        assert sent.ret != 0
        assert sent.response.rest == bytes(8)

    @requirement("DEV-QUE-6")
    def test_a_request_that_changes_while_it_is_served(self, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
        """The guest writes other numbers over it as soon as it was read; what was read counts, each byte once."""
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        seen: list[Chain] = []
        read = Chain.read

        def once(chain: Chain, *where: int) -> bytes:
            assert chain not in seen
            assert not where
            seen.append(chain)
            data = read(chain)
            chain.readable[:] = [memoryview(b"\xff" * len(data))]
            return data

        monkeypatch.setattr(Chain, "read", once)
        value, memory = (V_IN, 0xFF, 0, 0), (INOUT, 0, 4, region)
        guest.memory.translate(RAM, 4)[0][:] = b"\0\1\2\3"
        assert guest.invoke(context, session, 2, memory, value).params(2) == [memory, value]
        assert bytes(guest.memory.translate(RAM, 4)[0]) == b"\xff\xfe\xfd\xfc"
        inline = [(INOUT | INLINE, 0, 8, 0), (V_INOUT, 1000, 0, 0)]
        late = guest.invoke(context, session, 8, *inline, inline=b"\7" * 8, inline_out=8)  # looks at it a second later
        guest.bench.pass_time(2)
        assert late.params(2) == [inline[0], (V_INOUT, 7, 7, 0)]
        assert guest.register(context, (RAM, 4), (RAM + 8, 4)).ret == 0
        assert guest.cancel(context, 4711).status == Status.NOT_FOUND
        assert len(seen) == 4


class Hoarder(TrustedApplication):
    """Keeps the memory of a call, and writes to it in the next one if it can."""

    uuid = UUID(int=78)
    kept: list[Any] = []  # noqa: RUF012
    tried = 0

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        for memory in Hoarder.kept:
            Hoarder.tried += 1
            try:
                memory.write(b"late")
            except Exception:  # the TEE sees to it, too
                continue
        memory = params.memory(0, Direction.INOUT)
        Hoarder.kept.append(memory)
        memory.write(b"in time")


class Deaf(TrustedApplication):
    """Takes a second, whatever anybody asks."""

    uuid = UUID(int=79)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        await self.env.sleep(1)


class Reader(TrustedApplication):
    """Keeps what it was given."""

    uuid = UUID(int=80)
    seen: list[Any] = []  # noqa: RUF012

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        for param in params:
            Reader.seen.append(param.read() if hasattr(param, "read") else param)


class Careless:
    """Between device and TEE: says at once that a registration or context has ended, whoever uses it."""

    def __init__(self, bench: Bench) -> None:
        self.bench, self.start, self.ended = bench, bench.tee.start, list[Call]()
        bench.tee.start = self  # type: ignore[method-assign, assignment]

    def __call__(self, call: Call) -> None:
        if not isinstance(call, CloseContext | UnregisterMemory):
            self.start(call)
            return
        self.ended.append(replace(call, owner=None))
        self.bench.router._on_event(Done(call))

    def clean_up(self) -> None:
        """Let the TEE really end it all."""
        self.bench.tee.start = self.start  # type: ignore[method-assign]
        for call in self.ended:
            self.start(call)
        self.bench.turn()


def borrow(guest: Guest) -> tuple[int, int, int]:
    """An RPC of another context's call uses memory of this one: context, region, RPC."""
    context = guest.open_context()
    guest.open(guest.open_context(), UUID(int=0xBAD))
    seen = guest.event(RpcCommand.LOAD_TA)
    guest.reply(seen.rpc, 0, [seen.params[0], (OUT, 0, 100, NULL_REGION)])
    region = guest.region(context)
    guest.reply(guest.event(RpcCommand.SHM_ALLOC).rpc, 0, [(INOUT, 0, 100, region)])
    return context, region, guest.event(RpcCommand.LOAD_TA).rpc


class TestCarelessTee:
    """What the device sees to even if the TEE does not."""

    @requirement("DEV-CTX-4", "DEV-MEM-10")
    def test_a_context_with_memory_in_use(self, bench: Bench, guest: Guest) -> None:
        careless = Careless(bench)
        context, _, rpc = borrow(guest)
        closed = guest.close_context(context)
        assert not closed.done
        guest.reply(rpc, Result.ITEM_NOT_FOUND)
        assert closed.ret == 0
        careless.clean_up()

    @requirement("DEV-MEM-9", "DEV-MEM-10")
    def test_memory_that_answered_shm_alloc(self, bench: Bench, guest: Guest) -> None:
        careless = Careless(bench)
        context, region, rpc = borrow(guest)
        waits = guest.unregister(context, region)
        assert not waits.done
        guest.reply(rpc, Result.ITEM_NOT_FOUND)
        assert waits.ret == 0
        careless.clean_up()

    @requirement("DEV-MEM-9")
    def test_memory_of_a_call(self, bench: Bench, guest: Guest) -> None:
        careless = Careless(bench)
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        guest.invoke(context, session, 8, (INOUT, 0, 8, region), (V_INOUT, 1000, 0, 0))
        waits = guest.unregister(context, region)
        assert not waits.done
        bench.pass_time(2)
        assert waits.ret == 0
        careless.clean_up()

    @requirement("DEV-CTX-2")
    def test_requests_of_a_context_that_closes(
        self, bench: Bench, guest: Guest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The TEE takes its time."""
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        start, kept = bench.tee.start, list[Call]()
        monkeypatch.setattr(bench.tee, "start", kept.append)
        closed = guest.close_context(context)
        for sent in (
            guest.open(context),
            guest.invoke(context, session, 0),
            guest.register(context, (RAM, 8)),
            guest.unregister(context, region),
            guest.send(Request.CLOSE_SESSION, context=context, session=session),
            guest.cancel(context, closed.tag),
            guest.close_context(context),
        ):
            assert refused(sent, Status.NO_CONTEXT)
        monkeypatch.setattr(bench.tee, "start", start)
        start(kept.pop())
        bench.turn()
        assert closed.ret == 0
        assert not kept


class TestContexts:
    @requirement("DEV-IDS-1", "DEV-CTX-1", "DEV-LIM-1", "DEV-REQ-7")
    def test_limit(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_contexts=2))
        other = bench.guest(limits=Limits(max_contexts=2))
        assert [guest.open_context(), guest.open_context()] == [1, 2]
        assert refused(guest.send(Request.OPEN_CONTEXT, flags=0), Status.LIMIT)
        assert other.open_context() == 1
        assert guest.close_context(1).ret == 0
        assert guest.open_context() == 3

    def test_flags(self, guest: Guest) -> None:
        assert refused(guest.send(Request.OPEN_CONTEXT, flags=1), Status.MALFORMED)

    @requirement("DEV-CTX-2")
    @pytest.mark.fault("stale-ids")
    def test_a_closed_one(self, guest: Guest) -> None:
        context = guest.open_context()
        guest.close_context(context, run=False)
        late = guest.open(context, run=False)
        guest.bench.turn()
        assert refused(late, Status.NO_CONTEXT)
        assert refused(guest.close_context(context), Status.NO_CONTEXT)
        assert refused(guest.close_context(77), Status.NO_CONTEXT)

    @requirement("DEV-CTX-3", "DEV-CTX-4")
    def test_everything_under_it_ends(self, guest: Guest) -> None:
        context, other = guest.open_context(), guest.open_context()
        session, kept = guest.open_session(context), guest.open_session(other)
        guest.region(context)
        kept_region = guest.region(other)
        calls = [guest.wait(context, session) for _ in range(3)]
        opening = guest.open(context, UUID(int=9))
        assert guest.event(0).call == opening.tag
        ring = guest.ring(Queue.REQUEST)
        ring.returned.clear()
        closed = guest.close_context(context)
        assert [sent.ret for sent in calls] == [Result.CANCEL] * 3
        assert opening.ret == Result.CANCEL
        assert closed.ret == 0
        assert ring.returned[-1] is closed
        assert guest.invoke(other, kept, 0, (IN, 0, 4, kept_region)).ret == 0
        assert guest.bench.tee.usage()["contexts"] == 1

    @requirement("DEV-CTX-4", "DEV-MEM-9")
    def test_what_waits_to_unregister_ends_first(self, guest: Guest) -> None:
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        call = guest.invoke(context, session, 8, (INOUT, 0, 8, region), (V_INOUT, 10**9, 0, 0))
        waits = guest.unregister(context, region)
        assert not waits.done
        closed = guest.close_context(context)
        assert (call.ret, closed.ret) == (Result.CANCEL, 0)
        assert waits.ret == Result.CANCEL
        # until its call was returned, the memory is in use
        assert guest.ring(Queue.REQUEST).returned[-3:] == [call, waits, closed]
        assert guest.leases == 0

    @requirement("DEV-IDS-2", "DEV-IDS-3")
    @pytest.mark.fault("foreign-ids")
    def test_ids_of_others(self, bench: Bench) -> None:
        one, two = bench.guest(), bench.guest()
        contexts = [one.open_context(), one.open_context()]
        session, region = one.open_session(contexts[0]), one.region(contexts[0])
        theirs = two.open_context()
        assert refused(two.invoke(contexts[1], session, 0), Status.NO_CONTEXT)
        assert refused(two.invoke(theirs, session, 0), Status.NO_SESSION)
        assert refused(one.invoke(contexts[1], session, 0), Status.NO_SESSION)
        assert refused(one.send(Request.CLOSE_SESSION, context=contexts[1], session=session), Status.NO_SESSION)
        mine = one.open_session(contexts[1])
        assert refused(one.invoke(contexts[1], mine, 0, (IN, 0, 0, region)), Status.NO_REGION)
        assert refused(one.unregister(contexts[1], region), Status.NO_REGION)
        assert refused(two.unregister(theirs, region), Status.NO_REGION)


class Who(TrustedApplication):
    uuid = UUID(int=77)
    seen: list[Client] = []  # noqa: RUF012

    async def open_session(self, params: Parameters, client: Client) -> None:
        Who.seen.append(client)


class TestSessions:
    @requirement("DEV-SES-1")
    def test_the_tas_word(self, guest: Guest) -> None:
        context = guest.open_context()
        sent = guest.open(context, params=[(V_IN, 0x1000_0001, 0, 0)])
        assert (sent.ret, sent.response.origin, sent.response.ident()) == (0x1000_0001, Origin.TRUSTED_APP, 0)
        assert sent.response.ident(1) == 1
        assert guest.device.epoch.sessions.__len__() == 0

    @requirement("DEV-SES-2", "DEV-LIM-2")
    def test_limit(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_sessions=2))
        context = guest.open_context()
        one = guest.open_session(context)
        guest.open_session(context)
        assert refused(guest.open(context), Status.LIMIT)
        assert guest.send(Request.CLOSE_SESSION, context=context, session=one).ret == 0
        assert guest.open_session(context) == 3

    @requirement("DEV-SES-3", "DEV-SES-4")
    def test_identity(self) -> None:
        bench = Bench(built_in={Who.uuid: Who})
        guest, other = bench.guest(), bench.guest()
        Who.seen.clear()
        who = UUID(int=5).bytes
        for one in (guest, other):
            context = one.open_context()
            for login in (Login.PUBLIC, Login.USER):
                assert one.open(context, Who.uuid, client_login=login, client_uuid=who).ret == 0
            assert refused(one.open(context, Who.uuid, client_login=Login.REE_KERNEL), Status.DENIED)
        assert Who.seen == [
            Client(login, UUID(int=number), vm)
            for vm in ("vm0", "vm1")
            for login, number in ((Login.PUBLIC, 0), (Login.USER, 5))
        ]

    @requirement("DEV-SES-5", "DEV-SES-6")
    def test_closing(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        calls = [guest.wait(context, session) for _ in range(2)]
        ring = guest.ring(Queue.REQUEST)
        closed = guest.send(Request.CLOSE_SESSION, context=context, session=session, run=False)
        late = guest.invoke(context, session, 0)
        assert refused(late, Status.NO_SESSION)
        assert [sent.ret for sent in calls] == [Result.CANCEL] * 2
        assert closed.ret == 0
        assert ring.returned.index(closed) > max(ring.returned.index(sent) for sent in calls)
        assert refused(guest.send(Request.CLOSE_SESSION, context=context, session=session), Status.NO_SESSION)

    @requirement("DEV-SES-6", "DEV-SES-5")
    def test_while_it_closes(self) -> None:
        bench = Bench(built_in={Deaf.uuid: Deaf})
        guest = bench.guest()
        context = guest.open_context()
        session = guest.open_session(context, Deaf.uuid)
        call = guest.invoke(context, session, 0)
        closed = guest.send(Request.CLOSE_SESSION, context=context, session=session)
        assert not closed.done
        assert refused(guest.invoke(context, session, 0), Status.NO_SESSION)
        assert refused(guest.send(Request.CLOSE_SESSION, context=context, session=session), Status.NO_SESSION)
        bench.pass_time(2)
        assert (call.ret, closed.ret) == (0, 0)

    @pytest.mark.fault("dead-ta")
    def test_a_dead_ta(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        for _ in range(2):
            sent = guest.invoke(context, session, 6)
            assert (sent.ret, sent.response.origin) == (Result.TARGET_DEAD, Origin.TEE)
        assert guest.send(Request.CLOSE_SESSION, context=context, session=session).status == Status.OK


class TestInvoke:
    @requirement("DEV-INV-1", "DEV-PAR-5", "DEV-PAR-6", "DEV-PAR-7")
    def test_values(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        given = [(V_IN, WORD, 5, 6), (V_OUT, 1, 2, 3), (V_INOUT, 7, 8, 9)]
        sent = guest.invoke(context, session, 1, *given)
        assert sent.ret == 0
        assert sent.params(3) == [given[0], (V_OUT, 0, 0, 4), (V_INOUT, 7, 8, 15)]
        sent = guest.invoke(context, session, 9, (V_IN, 0x1000_BEEF, 0, 0))
        assert (sent.ret, sent.response.origin) == (0x1000_BEEF, Origin.TRUSTED_APP)
        sent = guest.invoke(context, session, 7, (V_OUT, 9, 9, 9), (0, 1, 2, 3), (V_IN, 0, 0, 0))
        assert sent.params(3) == [(V_OUT, 2, 2, 0), (0, 1, 2, 3), (V_IN, 0, 0, 0)]

    @requirement("DEV-PAR-5", "DEV-PAR-6")
    def test_what_the_tee_is_given(self, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
        given: list[Param] = []
        start = guest.bench.tee.start

        def watch(call: Call) -> None:
            if isinstance(call, Invoke):
                given.extend(replace(param) for param in call.params)
            start(call)

        monkeypatch.setattr(guest.bench.tee, "start", watch)
        epoch = guest.device.epoch
        at_once = epoch._at_once
        if at_once is not None:

            def watch_at_once(session: object, func: int, params: Sequence[Param]) -> Any:
                given.extend(replace(param) for param in params)
                return at_once(session, func, params)

            monkeypatch.setattr(epoch, "_at_once", watch_at_once)
        context = guest.open_context()
        session = guest.open_session(context)
        params = [(V_IN, WORD, 5, 6), (0, 1, 2, 3), (V_OUT, 7, 8, 9), (V_INOUT, 1, WORD, 4), (0, 0, 0, 0)]
        assert guest.invoke(context, session, 0, *params).ret == 0
        assert given == [
            Value(Direction.IN, WORD, 5, 6),
            Nothing(),
            Value(Direction.OUT, 0, 0, 0),
            Value(Direction.INOUT, 1, WORD, 4),
            Nothing(),
        ]

    @requirement("DEV-PAR-9")
    @pytest.mark.fault("impossible-attributes")
    def test_meta(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        given = [
            (V_OUT | PARAM_META, 1, 2, 3),
            (V_OUT, 0, 0, 0),
            (V_INOUT | PARAM_META, 7, 8, 9),
            (PARAM_META, 0, 1, 2),
        ]
        sent = guest.invoke(context, session, 7, *given)
        assert sent.params(4) == [given[0], (V_OUT, 0, 0, 0), *given[2:]]

    @requirement("DEV-PAR-1", "DEV-PAR-2")
    @pytest.mark.fault("impossible-attributes")
    def test_impossible_parameters(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        assert refused(guest.invoke(context, session, 0, *[(0, 0, 0, 0)] * 25), Status.LIMIT)
        assert guest.invoke(context, session, 0, *[(0, 0, 0, 0)] * 24).ret == 0
        for attr in (4, 8, 0xFF, 0x200, 1 << 63, INLINE, V_IN | INLINE):
            assert refused(guest.invoke(context, session, 0, (attr, 0, 0, 0)), Status.MALFORMED)
        assert refused(guest.invoke(context, session, 0, (IN, 1, 0, NULL_REGION)), Status.MALFORMED)

    @requirement("DEV-PAR-3", "DEV-PAR-4", "DEV-MEM-4")
    @pytest.mark.fault("huge-sizes")
    def test_references(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        region = guest.region(context)
        frozen = guest.region(context, flags=RegionFlag.READ_ONLY)
        for ident in (0, 99, 1 << 32, NULL_REGION - 1):
            assert refused(guest.invoke(context, session, 0, (IN, 0, 0, ident)), Status.NO_REGION)
        for offset, size in ((0, 4097), (4096, 1), (WORD, 1), (1, WORD), (WORD, WORD)):
            assert refused(guest.invoke(context, session, 0, (IN, offset, size, region)), Status.BAD_RANGE)
        for kind in (OUT, INOUT):
            assert refused(guest.invoke(context, session, 0, (kind, 0, 1, frozen)), Status.BAD_RANGE)
        assert guest.invoke(context, session, 0, (IN, 4096, 0, region), (IN, 0, 4096, frozen)).ret == 0
        sent = guest.invoke(context, session, 5, (OUT, 0, 3, NULL_REGION), (V_IN, 9, 0, 0))
        assert sent.ret == Result.SHORT_BUFFER
        assert sent.params(2)[0] == (OUT, 0, 9, NULL_REGION)

    @requirement("DEV-PAR-3")
    def test_null_references_that_the_tee_does_not_know(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        guest = bench.guest()
        context = guest.open_context()
        session = guest.open_session(context)
        info = TeeInfo(1, 1, 1, GenCap.GP | GenCap.REG_MEM)
        monkeypatch.setattr(type(bench.tee), "info", property(lambda tee: info))
        assert refused(guest.invoke(context, session, 0, (IN, 0, 0, NULL_REGION)), Status.NO_REGION)

    @requirement("DEV-PAR-8", "DEV-MEM-6")
    def test_sizes_and_memory_in_place(self, guest: Guest) -> None:
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        sent = guest.invoke(context, session, 5, (OUT, 16, 8, region), (V_IN, 5, 0, 0))
        assert sent.params(2)[0] == (OUT, 16, 5, region)
        assert bytes(guest.memory.translate(RAM, 32)[0]) == bytes(16) + b"\x5a" * 5 + bytes(11)
        sent = guest.invoke(context, session, 5, (OUT, 16, 8, region), (V_IN, 10**6, 0, 0))
        assert (sent.ret, sent.params(2)[0]) == (Result.SHORT_BUFFER, (OUT, 16, 10**6, region))

    @requirement("DEV-INL-1", "DEV-INL-3", "DEV-INL-4")
    def test_inline(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        params = [(INOUT | INLINE, 0, 5, 0), (V_IN, 0xFF, 0, 0)]
        sent = guest.invoke(context, session, 2, *params, inline=b"\0\1\2\3\4???", inline_out=8)
        assert sent.ret == 0
        assert sent.inline(2) == b"\xff\xfe\xfd\xfc\xfb\0\0\0"
        for attr, a, c in ((IN, 1, 0), (IN, 0, 1), (OUT, 8, 0)):
            sent = guest.invoke(context, session, 0, (attr | INLINE, a, 0, c))
            assert refused(sent, Status.MALFORMED)
        sent = guest.invoke(context, session, 5, (OUT | INLINE, 0, 20, 0), (V_IN, 3, 0, 0), inline_out=24)
        assert sent.inline(2) == b"ZZZ" + bytes(21)
        sent = guest.invoke(context, session, 5, (OUT | INLINE, 0, 20, 0), (V_IN, 21, 0, 0), inline_out=24)
        assert (sent.ret, sent.params(2)[0][2], sent.inline(2)) == (Result.SHORT_BUFFER, 21, bytes(24))
        assert guest.invoke(context, session, 0, (INOUT | INLINE, 0, 0, 0)).ret == 0

    @requirement("DEV-INL-3", "DEV-INL-4")
    def test_inline_in_its_order(self) -> None:
        bench = Bench(built_in={Reader.uuid: Reader})
        guest = bench.guest()
        context = guest.open_context()
        session = guest.open_session(context, Reader.uuid)
        Reader.seen = []
        params = [(kind | INLINE, 0, size, 0) for kind, size in ((IN, 5), (OUT, 3), (INOUT, 9), (IN, 0), (IN, 1))]
        data = b"first\xff\xff\xff" + b"the third\xff\xff\xff\xff\xff\xff\xff" + b"x\xff\xff\xff\xff\xff\xff\xff"
        sent = guest.invoke(context, session, 0, *params, inline=data, inline_out=8 + 16)
        assert sent.ret == 0
        assert Reader.seen[0::2] == [b"first", b"the third", b"x"]
        assert sent.inline(5) == bytes(8) + b"the third" + bytes(7)

    @requirement("DEV-INL-5")
    def test_inline_after_the_end(self) -> None:
        bench = Bench(built_in={Hoarder.uuid: Hoarder})
        guest = bench.guest()
        context = guest.open_context()
        session = guest.open_session(context, Hoarder.uuid)
        Hoarder.kept, Hoarder.tried = [], 0
        for _ in range(2):
            sent = guest.invoke(context, session, 0, (INOUT | INLINE, 0, 8, 0), inline=b"12345678", inline_out=8)
            assert sent.inline(1) == b"in time8"
            sent.writable[:] = sent.data = b"\xaa" * sent.room  # it is the driver's again
        assert Hoarder.tried == 1
        guest.close_context(context)
        for sent in guest.sent[2:4]:
            assert bytes(sent.writable) == sent.data

    @requirement("DEV-INL-2", "DEV-REQ-5")
    def test_inline_limits(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_inline_bytes=64))
        context = guest.open_context()
        session = guest.open_session(context)
        assert guest.invoke(context, session, 0, (IN | INLINE, 0, 64, 0), inline=bytes(64)).ret == 0
        for kind, size in ((IN, 65), (OUT, 65), (INOUT, WORD), (OUT, WORD)):
            assert refused(guest.invoke(context, session, 0, (kind | INLINE, 0, size, 0)), Status.LIMIT)
        two = [(OUT | INLINE, 0, 33, 0)] * 2
        assert refused(guest.invoke(context, session, 0, *two, inline_out=80), Status.LIMIT)
        assert refused(guest.invoke(context, session, 0, (IN | INLINE, 0, 8, 0)), Status.MALFORMED)
        assert refused(guest.invoke(context, session, 0, (OUT | INLINE, 0, 8, 0)), Status.MALFORMED)

    @requirement("DEV-INV-2", "DEV-INV-3", "DEV-LIM-1")
    @pytest.mark.fault("quota")
    def test_max_calls(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_calls=2))
        context = guest.open_context()
        sessions = [guest.open_session(context) for _ in range(2)]
        calls = [guest.wait(context, session) for session in sessions]
        assert refused(guest.invoke(context, sessions[0], 0), Status.LIMIT)
        assert refused(guest.open(context), Status.LIMIT)
        region = guest.region(context)  # is no call
        assert guest.unregister(context, region).ret == 0
        assert guest.open_context() == context + 1
        assert guest.send(Request.CLOSE_SESSION, context=context, session=sessions[0]).ret == 0
        assert calls[0].ret == Result.CANCEL
        assert guest.invoke(context, sessions[1], 0, run=False)
        guest.close_context(context)

    @requirement("DEV-LIM-2", "DEV-INV-3")
    def test_at_all_limits(self, bench: Bench) -> None:
        """What ends or releases something, and the control queue, is served."""
        guest = bench.guest(limits=Limits(max_calls=1, max_contexts=1, max_sessions=1, max_regions=1, max_rpcs=1))
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        call = guest.wait(context, session)
        assert refused(guest.invoke(context, session, 0), Status.LIMIT)
        assert guest.cancel(context, 4711).status == Status.NOT_FOUND
        assert guest.reply(4711).status == guest.ack(4711).status == Status.NOT_FOUND
        assert guest.unregister(context, region).ret == 0
        assert guest.send(Request.CLOSE_SESSION, context=context, session=session).ret == 0
        assert call.ret == Result.CANCEL
        call = guest.wait(context, guest.open_session(context))
        assert guest.cancel(context, call.tag).ret == 0
        assert call.ret == Result.CANCEL
        call = guest.wait(context, session + 1)
        assert guest.close_context(context).ret == 0
        assert call.ret == Result.CANCEL

    def test_duplicate_tag(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session, tag=500)
        assert refused(guest.invoke(context, session, 0, tag=500), Status.DUPLICATE_TAG)
        assert refused(guest.cancel(context, 500, own_tag=500), Status.DUPLICATE_TAG)
        assert not call.done
        guest.cancel(context, 500)
        assert call.ret == Result.CANCEL
        assert guest.invoke(context, session, 0, tag=500).ret == 0


class TestTurns:
    """However much one guest asks, another one is served."""

    @requirement("DEV-INV-4", "DEV-LIM-1")
    @pytest.mark.parametrize("threads", [1, 3])
    def test_calls_that_hold_all_threads(self, threads: int) -> None:
        bench = Bench(threads=threads)
        greedy, other, third = bench.guest(), bench.guest(), bench.guest()
        context = greedy.open_context()
        sessions = [greedy.open_session(context) for _ in range(threads + 5)]
        calls = [greedy.wait(context, session) for session in sessions]
        for guest in (other, third):
            theirs = guest.open_context()
            session = guest.open_session(theirs)
            for _ in range(3):
                assert guest.invoke(theirs, session, 0).ret == 0
        assert not any(call.done for call in calls)
        greedy.close_context(context)
        assert [call.ret for call in calls] == [Result.CANCEL] * len(calls)

    @requirement("DEV-INV-4")
    @pytest.mark.parametrize("threads", [1, 4])
    def test_calls_that_wait_for_a_thread(self, threads: int) -> None:
        """By turns, and not in the order in which they came."""
        bench = Bench(threads=threads)
        calls = []
        for guest, count in ((bench.guest(), 40), (bench.guest(), 4), (bench.guest(), 4)):
            context = guest.open_context()
            sessions = [guest.open_session(context) for _ in range(count)]
            calls.append([guest.wait(context, session, 1000) for session in sessions])
        for _ in range(4):
            bench.pass_time(1.1)
        assert all(call.done for few in calls[1:] for call in few)
        assert sum(call.done for call in calls[0]) <= 4 * threads
        for _ in range(40):
            bench.pass_time(1.1)
        assert [call.ret for call in calls[0]] == [0] * 40

    @requirement("DEV-INV-4")
    def test_a_ring_that_never_becomes_empty(self, bench: Bench) -> None:
        greedy, other = bench.guest(), bench.guest()
        context, theirs = greedy.open_context(), other.open_context()
        sessions = greedy.open_session(context), other.open_session(theirs)
        many = [greedy.invoke(context, sessions[0], 0, run=False) for _ in range(250)]
        one = other.invoke(theirs, sessions[1], 0, run=False)
        for _ in range(2):  # a turn of the loop for the greedy one, and one for the other
            greedy.look()
            other.look()
            bench.router.run()
        assert one.ret == 0
        assert not many[-1].done
        bench.turn()
        assert many[-1].ret == 0


class TestCancel:
    @requirement("DEV-CAN-2", "DEV-CAN-3", "DEV-CAN-4", "DEV-CAN-5", "DEV-QUE-4")
    def test_running(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session)
        both = [guest.cancel(context, call.tag, run=False) for _ in range(2)]
        guest.bench.turn()
        assert both[0].ret == 0
        assert both[1].status in (Status.OK, Status.NOT_FOUND)
        assert call.ret == Result.CANCEL
        assert refused(guest.cancel(context, call.tag), Status.NOT_FOUND)

    @requirement("DEV-CAN-3", "DEV-CAN-5")
    def test_twice_what_does_not_end(self, guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
        cancelled: list[Call] = []
        cancel = guest.bench.tee.cancel
        monkeypatch.setattr(guest.bench.tee, "cancel", lambda call: (cancelled.append(call), cancel(call)))
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        call = guest.invoke(context, session, 8, (INOUT, 0, 8, region), (V_INOUT, 10**9, 0, 0))
        waits = guest.unregister(context, region)
        for _ in range(2):  # is no call: goes on as if nothing had been asked
            assert guest.cancel(context, waits.tag).ret == 0
            assert not waits.done
        assert cancelled == []
        guest.cancel(context, call.tag)
        assert [type(one) for one in cancelled] == [Invoke]
        assert (call.ret, waits.ret) == (Result.CANCEL, 0)

    @requirement("DEV-QUE-4", "DEV-RPC-14")
    def test_the_control_queue_waits_for_nobody(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        """Neither for the TEE, nor for a request queue, nor for an event buffer."""
        guest = bench.guest(buffers=3)
        context = guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session)
        guest.open(context, UUID(int=1))
        (first,) = guest.events(post=False)
        guest.cancel(context, guest.open(context, UUID(int=2)).tag)
        guest.events(post=False)
        (withdrawn,) = guest.withdrawn
        guest.open(context, UUID(int=3))  # its RPC waits for a buffer
        tee = bench.tee
        for name in ("start", "cancel", "answer", "run"):
            monkeypatch.setattr(tee, name, lambda *_: None)
        guest.ring(Queue.REQUEST).stop()
        sent = [
            guest.cancel(context, call.tag, run=False),
            guest.cancel(context, 4711, run=False),
            guest.reply(first.rpc, Result.ITEM_NOT_FOUND, run=False),
            guest.ack(withdrawn, run=False),
        ]
        assert not guest.device.process(Queue.CONTROL)
        assert [one.status for one in sent] == [Status.OK, Status.NOT_FOUND, Status.OK, Status.OK]
        assert not call.done
        monkeypatch.undo()
        guest.disconnect()
        bench.turn()

    @requirement("DEV-CAN-2")
    def test_unknown_and_foreign(self, guest: Guest) -> None:
        context, other = guest.open_context(), guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session)
        assert refused(guest.cancel(other, call.tag), Status.NOT_FOUND)
        assert refused(guest.cancel(context, 4711), Status.NOT_FOUND)
        assert refused(guest.cancel(99, call.tag), Status.NO_CONTEXT)
        assert not call.done
        guest.close_context(context)

    @requirement("DEV-CAN-3")
    def test_what_has_not_begun_does_not_run(self, bench: Bench) -> None:
        guest = bench.guest(queues=2)
        guest.device.epoch._at_once = None  # there it would have ended before it is cancelled
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        params = [(INOUT, 0, 4096, region), (V_IN, 0xFF, 0, 0)]
        call = guest.invoke(context, session, 2, *params, queue=3, run=False)
        guest.link.woken.clear()
        assert guest.cancel(context, call.tag).ret == 0
        assert call.ret == Result.CANCEL
        assert not any(guest.memory.translate(RAM, 4096)[0])

    @requirement("DEV-CAN-1")
    @pytest.mark.fault("cancel-storm")
    def test_it_overtakes_its_request(self, bench: Bench) -> None:
        guest = bench.guest(queues=2)
        context = guest.open_context()
        session = guest.open_session(context)
        call = guest.wait(context, session, queue=3, run=False)
        guest.link.woken.clear()  # no kick was seen yet
        assert guest.cancel(context, call.tag).ret == 0
        assert call.ret == Result.CANCEL

    def test_it_waits_for_no_burst_of_requests_behind_long_work(self) -> None:
        class Slow(TrustedApplication):
            uuid = UUID(int=900)

            async def invoke(self, session: None, command: int, params: Parameters) -> None:
                self.env.unmask_cancellation()
                while command:
                    bench.clock.now += 0.001
                    await self.env.checkpoint()

        bench = Bench(built_in={Slow.uuid: Slow})
        guest, other = bench.guest(), bench.guest()
        context, others = guest.open_context(), other.open_context()
        session, idle = guest.open_session(context, Slow.uuid), other.open_session(others, Slow.uuid)
        call = guest.invoke(context, session, 1, run=False)
        burst = [other.invoke(others, idle, 0, run=False) for _ in range(50)]
        before = bench.clock.now
        guest.look()
        other.look()
        assert bench.clock.now - before < 0.01
        assert guest.cancel(context, call.tag).ret == 0
        assert call.ret == Result.CANCEL
        assert all(sent.ret == 0 for sent in burst)


class TestMemory:
    @requirement("DEV-MEM-1", "DEV-MEM-2")
    @pytest.mark.fault("huge-sizes")
    def test_bad_ranges(self, guest: Guest) -> None:
        context = guest.open_context()
        assert refused(guest.register(context), Status.MALFORMED)
        assert refused(guest.register(context, (RAM, 10), size=11), Status.MALFORMED)
        assert refused(guest.register(context, (RAM, 10), flags=2), Status.MALFORMED)
        assert refused(guest.register(context, (RAM, 10), num_ranges=2), Status.MALFORMED)
        for bad in ((RAM, 0), (0, 10), (RAM - 1, 10), (RAM, RAM_SIZE + 1), (WORD, 2), (RAM + RAM_SIZE, 1)):
            assert refused(guest.register(context, (RAM, 4), bad), Status.BAD_RANGE)
        assert refused(guest.register(context, (0, 1 << 63), (0, 1 << 63), size=0), Status.MALFORMED)
        assert guest.leases == 0
        assert guest.device.epoch.region_bytes == 0

    @requirement("DEV-MEM-2", "DEV-MEM-6")
    def test_pieces_in_their_order(self, guest: Guest) -> None:
        context = guest.open_context()
        session = guest.open_session(context)
        sent = guest.register(context, (RAM + 8, 3), (RAM, 2), (RAM + 2, 1), (RAM, 2))
        region = sent.response.ident()
        guest.memory.translate(RAM, 3)[0][:] = b"abc"
        guest.memory.translate(RAM + 8, 3)[0][:] = b"xyz"
        assert guest.device.epoch.region(region).memory.read(0, 8) == b"xyzabcab"
        sent = guest.invoke(context, session, 5, (OUT, 2, 3, region), (V_IN, 3, 0, 0))
        assert sent.ret == 0
        assert bytes(guest.memory.translate(RAM, 11)[0]) == b"ZZc\0\0\0\0\0xyZ"

    @requirement("DEV-MEM-3", "DEV-REQ-7", "DEV-LIM-1")
    def test_limits(self, bench: Bench) -> None:
        guest = bench.guest(limits=Limits(max_regions=2, max_region_bytes=100, max_region_ranges=3))
        context = guest.open_context()
        assert refused(guest.register(context, *[(RAM, 1)] * 4), Status.LIMIT)
        assert refused(guest.register(context, (RAM, 101)), Status.LIMIT)
        one = guest.region(context, size=60)
        assert refused(guest.register(context, (RAM, 41)), Status.LIMIT)
        guest.region(context, size=40)
        assert refused(guest.register(context, (RAM, 1)), Status.LIMIT)
        assert guest.unregister(context, one).ret == 0
        two = guest.region(context, size=10)
        assert refused(guest.register(context, (RAM, 1)), Status.LIMIT)
        assert guest.unregister(context, two).ret == 0

    @requirement("DEV-MEM-8", "DEV-MEM-9")
    @pytest.mark.fault("stale-ids")
    def test_unregister_while_in_use(self, guest: Guest) -> None:
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        call = guest.invoke(context, session, 8, (INOUT, 0, 8, region), (V_INOUT, 1000, 0, 0))
        waits = guest.unregister(context, region)
        assert not waits.done
        assert refused(guest.unregister(context, region), Status.NO_REGION)
        assert refused(guest.invoke(context, session, 0, (IN, 0, 0, region)), Status.NO_REGION)
        guest.bench.pass_time(2)
        assert (call.ret, waits.ret) == (0, 0)
        assert guest.ring(Queue.REQUEST).returned[-2:] == [call, waits]
        assert guest.leases == 0
        assert refused(guest.unregister(context, region), Status.NO_REGION)

    @requirement("DEV-MEM-7")
    @pytest.mark.fault("memory-removed")
    def test_memory_that_was_unplugged(self, guest: Guest) -> None:
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        call = guest.invoke(context, session, 8, (INOUT, 0, 8, region), (V_INOUT, 1000, 0, 0))
        guest.unplug()
        assert refused(guest.invoke(context, session, 0, (IN, 0, 0, region)), Status.BAD_RANGE)
        guest.bench.pass_time(2)
        assert call.ret == 0
        assert guest.unregister(context, region).ret == 0

    def test_memory_that_was_plugged(self, guest: Guest) -> None:
        context = guest.open_context()
        session, region = guest.open_session(context), guest.region(context)
        guest.device.memory_changed(guest.device.memory)
        for _ in range(2):
            assert guest.invoke(context, session, 0, (IN, 0, 8, region)).ret == 0
        assert guest.leases == 1
        assert guest.unregister(context, region).ret == 0


def test_examples_are_built_in() -> None:
    assert PROBE in examples.built_in()
