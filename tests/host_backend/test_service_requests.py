"""Requests about services and server enclaves, and what each requirement of theirs says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any
from uuid import UUID

import pytest

from device.config import Limits
from device.params import RawParam
from device.requests import STATUS_RESULT
from device.wire import NULL_REGION, SERVICES_UUID, Feature, ParamType, RegionFlag, Request, Status
from tee import attestation, package
from tee.calls import Client, Login
from tee.params import Direction
from tee.results import Origin, Result
from tee.rpc import GRPC_UUID
from tee.services import ENTRY_SIZE, Refusal, Service, ServiceFlag
from tee.soft.enclaves import EnclavePolicy, SharedNames
from tee.soft.limits import SoftLimits
from tests.host_backend.bench import ALL, INLINE, RAM, Bench, Guest, Sent
from tests.tee.soft.servers import LOADED, SERVERS, Faulty, Plain, Server, packed, vendor
from tests.tee.soft.test_enclaves import ADD, DOUBLE, FAIL, HOLD, ONWARD, PANIC, acts

__all__ = ["acts"]

requirement = pytest.mark.requirement
FEATURES = ALL | Feature.SERVICES | Feature.ATTESTATION | Feature.ENCLAVES
MEM_IN, MEM_OUT, MEM_INOUT = ParamType.MEMREF_IN, ParamType.MEMREF_OUT, ParamType.MEMREF_INOUT
VENDOR, STRANGER, ATTESTER = vendor(), vendor(), vendor()
POLICY = EnclavePolicy(
    creators="vm[0-3]",
    shared=[SharedNames("clock-*", "vm0", "vm1"), SharedNames("seen", "vm[01]", "vm2")],
)
COMMAND = {
    "list": Request.SERVICE_LIST,
    "load": Request.SERVICE_LOAD,
    "remove": Request.SERVICE_REMOVE,
}


class Caller:
    """A context of a guest's, and what it asks."""

    def __init__(self, guest: Guest) -> None:
        self.guest = guest
        self.context = guest.open_context()

    def send(self, request: int, **fields: Any) -> Sent:
        return self.guest.send(request, context=self.context, **fields)

    def services(self, first: int = 0, most: int = 20) -> tuple[int, list[Service]]:
        sent = self.send(Request.SERVICE_LIST, first=first, max_entries=most)
        assert sent.ret == Result.SUCCESS
        data = sent.response.rest[8:]
        found = [Service.unpack(data[at : at + ENTRY_SIZE]) for at in range(0, len(data), ENTRY_SIZE)]
        assert sent.response.ident(1) == len(found)
        return sent.response.ident(), found

    def load(self, data: bytes) -> Sent:
        """Inline."""
        padding = bytes(-len(data) % 8)
        return self.send(Request.SERVICE_LOAD, params=[(MEM_IN | INLINE, 0, len(data), 0)], inline=data + padding)

    def remove(self, uuid: UUID = LOADED) -> Sent:
        return self.send(Request.SERVICE_REMOVE, uuid=uuid.bytes)

    def task(self, uuid: UUID, func: int, *params: RawParam, **more: Any) -> Sent:
        fields = {"client_uuid": bytes(16), "client_login": 0, **more}
        return self.send(Request.SERVICE_TASK, uuid=uuid.bytes, func=func, params=params, **fields)

    def attest(self, uuid: UUID, nonce: bytes = bytes(range(32)), size: int = 256) -> Sent:
        param = (MEM_OUT | INLINE, 0, size, 0)
        room = (size + 7) & ~7
        return self.send(Request.SERVICE_ATTEST, uuid=uuid.bytes, nonce=nonce, params=[param], inline_out=room)

    def create(self, name: bytes, uuid: UUID = Server.uuid, flags: int = 0, **more: Any) -> Sent:
        return self.send(Request.ENCLAVE_CREATE, uuid=uuid.bytes, name=name.ljust(64, b"\0"), flags=flags, **more)

    def created(self, name: bytes, uuid: UUID = Server.uuid, flags: int = 0) -> int:
        sent = self.create(name, uuid, flags)
        assert sent.ret == Result.SUCCESS
        return sent.response.ident()

    def destroy(self, enclave: int, **more: Any) -> Sent:
        return self.send(Request.ENCLAVE_DESTROY, enclave=enclave, **more)

    def acquire(self, name: bytes) -> Sent:
        return self.send(Request.ENCLAVE_ACQUIRE, name=name.ljust(64, b"\0"))

    def acquired(self, name: bytes) -> int:
        sent = self.acquire(name)
        assert sent.ret == Result.SUCCESS
        return sent.response.ident()

    def release(self, server: int, **more: Any) -> Sent:
        return self.send(Request.ENCLAVE_RELEASE, server=server, **more)

    def call(self, server: int, *regs: int, params: Sequence[RawParam] = (), **more: Any) -> Sent:
        return self.send(
            Request.ENCLAVE_CALL, server=server, regs=(*regs, *(0,) * (8 - len(regs))), params=params, **more
        )


def returned(sent: Sent) -> tuple[int, int, int]:
    assert sent.ret == Result.SUCCESS
    value, offset, size = (int.from_bytes(sent.response.rest[at : at + 8], "little") for at in (0, 8, 16))
    return value, offset, size


def ended(sent: Sent, code: int, origin: int = Origin.TEE) -> bool:
    response = sent.response
    return (response.status, response.ret, response.origin) == (Status.OK, code, origin)


def refused(sent: Sent, status: Status) -> bool:
    return sent.written == 16 and sent.response == (status, 0, STATUS_RESULT[status], Origin.COMMS, b"")


def bench_of(**options: Any) -> Bench:
    Plain.seen.clear()
    return Bench(built_in=SERVERS, keys=[VENDOR.public], attestation_key=ATTESTER.private, enclaves=POLICY, **options)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = bench_of()
    yield bench
    for guest in bench.guests:
        guest.end()
    bench.check_empty()


@pytest.fixture
def guest(bench: Bench) -> Guest:
    return bench.guest(features=FEATURES)


@pytest.fixture
def caller(guest: Guest) -> Caller:
    return Caller(guest)


def ram(guest: Guest, size: int) -> memoryview:
    """The first bytes of the guest's memory."""
    return guest.memory.translate(RAM, size)[0]


def restart(guest: Guest) -> None:
    """The guest is reset, and its driver starts again."""
    guest.reset()
    guest.bench.turn()
    guest.start()
    guest.bench.turn()


class TestServices:
    @requirement("DEV-SVC-1")
    def test_list(self, caller: Caller) -> None:
        total, found = caller.services()
        assert total == len(found) == len(SERVERS) + 1
        assert [service.uuid for service in found] == sorted([*SERVERS, SERVICES_UUID])
        assert caller.services() == (total, found)
        assert [caller.services(at, 1)[1][0] for at in range(total)] == found
        assert caller.services(2, 2) == (total, found[2:4])
        assert caller.services(total, 5) == caller.services(0, 0) == (total, [])

    @requirement("DEV-SVC-2")
    @pytest.mark.parametrize("most", [1, 3, 0xFFFF_FFFF])
    def test_no_room_for_the_list(self, caller: Caller, most: int) -> None:
        good = caller.send(Request.SERVICE_LIST, first=0, max_entries=1)
        data = bytearray(good.data)
        data[-4:] = most.to_bytes(4, "little")
        data[16:24] = (777).to_bytes(8, "little")
        room = 16 + 8 + min(most, 1000) * ENTRY_SIZE - 1
        sent = caller.guest.offer(2, bytes(data), room)
        caller.guest.bench.turn()
        assert refused(sent, Status.MALFORMED)

    @requirement("DEV-SVC-3", "DEV-SVC-8")
    def test_a_guests_own(self, bench: Bench) -> None:
        one, two = (Caller(bench.guest(features=FEATURES)) for _ in range(2))
        assert one.load(packed(VENDOR)).ret == Result.SUCCESS
        assert [s.flags for s in one.services()[1] if s.uuid == LOADED] == [ServiceFlag.LOADED]
        assert LOADED not in [service.uuid for service in two.services()[1]]
        assert refused(two.remove(), Status.NOT_FOUND)
        value = (ParamType.VALUE_INOUT, 0, 4, 0)
        assert one.task(LOADED, 0, value).params(1)[0][2] == 5
        opening = two.task(LOADED, 0, value)
        assert not opening.done  # its supplicant is asked
        restart(one.guest)
        assert bench.tee.usage()["services"] == 0
        again = Caller(one.guest)
        assert refused(again.remove(), Status.NOT_FOUND)

    @requirement("DEV-SVC-8")
    def test_before_what_the_supplicant_has(self, caller: Caller) -> None:
        caller.load(packed(VENDOR))
        caller.guest.open_session(caller.context, LOADED)  # no RPC
        for uuid in (Plain.uuid, GRPC_UUID, SERVICES_UUID):
            assert refused(caller.load(package.sign(b"x = 1", uuid, 9, VENDOR.private)), Status.DENIED)

    @requirement("DEV-SVC-4", "DEV-SVC-5")
    def test_packages(self, caller: Caller) -> None:
        good = packed(VENDOR, 5)
        for size in (0, 19, 100, len(good) - 1):
            assert ended(caller.load(good[:size]), Result.BAD_FORMAT)
        poisoned = packed(STRANGER, 5, more=b"\nraise SystemExit\n")
        for bad in (good[:-1] + b"?", good[:60] + bytes([good[60] ^ 1]) + good[61:], poisoned):
            sent = caller.load(bad)
            assert ended(sent, Result.SECURITY)
            assert sent.response.rest[:20] == bytes(20)
        sent = caller.load(good)
        assert sent.response.rest[:20] == LOADED.bytes + (5).to_bytes(4, "little")
        assert caller.load(good).ret == Result.SUCCESS
        assert ended(caller.load(packed(VENDOR, 5, more=b"#")), Result.ACCESS_CONFLICT)
        assert ended(caller.load(packed(VENDOR, 4)), Result.SECURITY)
        assert caller.services()[0] == len(SERVERS) + 2

    @requirement("DEV-SVC-4")
    def test_from_registered_memory(self, caller: Caller) -> None:
        data = packed(VENDOR, 5)
        region = caller.guest.region(caller.context, flags=RegionFlag.READ_ONLY)
        ram(caller.guest, len(data))[:] = data
        sent = caller.send(Request.SERVICE_LOAD, params=[(MEM_IN, 0, len(data), region)])
        assert sent.ret == Result.SUCCESS
        ram(caller.guest, len(data))[:] = bytes(len(data))
        assert caller.task(LOADED, 0, (ParamType.VALUE_INOUT, 0, 0, 0)).params(1)[0][1] == 5

    @requirement("DEV-SVC-6")
    def test_a_newer_version(self, caller: Caller) -> None:
        guest, value = caller.guest, (ParamType.VALUE_INOUT, 0, 0, 0)
        caller.load(packed(VENDOR, 1))
        old = guest.open_session(caller.context, LOADED)
        caller.load(packed(VENDOR, 2))
        new = guest.open_session(caller.context, LOADED)
        versions = [guest.invoke(caller.context, session, 0, value).params(1)[0][1] for session in (old, new)]
        assert versions == [1, 2]

    @requirement("DEV-SVC-7")
    def test_limits(self) -> None:
        data = packed(VENDOR)
        for limits in (SoftLimits(services=0), SoftLimits(service_bytes=len(data) - 1)):
            caller = Caller(bench_of(limits=limits).guest(features=FEATURES))
            assert refused(caller.load(data), Status.LIMIT)
            assert caller.services()[0] == len(SERVERS) + 1

    @requirement("DEV-SVC-9", "DEV-LIM-2")
    def test_remove(self, caller: Caller) -> None:
        assert refused(caller.remove(), Status.NOT_FOUND)
        assert refused(caller.remove(Plain.uuid), Status.DENIED)
        caller.load(packed(VENDOR, 3))
        session = caller.guest.open_session(caller.context, LOADED)
        assert refused(caller.remove(), Status.IN_USE)
        caller.guest.send(Request.CLOSE_SESSION, context=caller.context, session=session)
        enclave = caller.created(b"x", LOADED)
        assert refused(caller.remove(), Status.IN_USE)
        caller.destroy(enclave)
        assert caller.remove().ret == Result.SUCCESS
        assert ended(caller.load(packed(VENDOR, 2)), Result.SECURITY)

    @requirement("DEV-SVC-10")
    def test_task(self, caller: Caller) -> None:
        value = (ParamType.VALUE_INOUT, 40, 2, 0)
        sent = caller.task(Plain.uuid, 0, value, client_login=Login.USER, client_uuid=UUID(int=5).bytes)
        assert ended(sent, Result.SUCCESS, Origin.TRUSTED_APP)
        assert sent.params(1)[0][1] == 42
        assert Plain.seen == [Client(Login.USER, UUID(int=5), "vm0"), "closed"]
        assert ended(caller.task(Plain.uuid, 1), 0x1234, Origin.TRUSTED_APP)
        caller.task(Plain.uuid, 0, value, client_uuid=UUID(int=5).bytes)
        assert Plain.seen[4] == Client(Login.PUBLIC, UUID(int=0), "vm0")
        assert refused(caller.task(Plain.uuid, 0, client_login=Login.REE_KERNEL), Status.DENIED)
        assert ended(caller.task(Plain.uuid, 0, client_login=Login.TRUSTED_APP), Result.ACCESS_DENIED)
        assert len(caller.guest.device.epoch.sessions) == 0

    @requirement("DEV-SVC-10")
    def test_its_session_counts(self, bench: Bench) -> None:
        caller = Caller(bench.guest(features=FEATURES, limits=Limits(max_sessions=1)))
        waiting = caller.task(Plain.uuid, 2)
        assert refused(caller.task(Plain.uuid, 1), Status.LIMIT)
        assert refused(caller.guest.open(caller.context, Plain.uuid), Status.LIMIT)
        assert refused(caller.acquire(b"x"), Status.LIMIT)
        assert caller.guest.cancel(caller.context, waiting.tag).status == Status.OK
        assert ended(caller.task(Plain.uuid, 1), 0x1234, Origin.TRUSTED_APP)

    @requirement("DEV-SVC-11")
    def test_its_session_is_closed(self, caller: Caller) -> None:
        caller.task(Plain.uuid, 1)
        assert Plain.seen[-1] == "closed"
        waiting = caller.task(Plain.uuid, 2)
        caller.guest.cancel(caller.context, waiting.tag)
        assert ended(waiting, Result.CANCEL, Origin.TRUSTED_APP)
        assert Plain.seen[2:] == [Plain.seen[2], "closed"]

    @pytest.mark.parametrize(
        "params",
        [[], [(MEM_OUT, 0, 0, NULL_REGION)], [(1, 0, 0, 0)], [(MEM_IN, 0, 0, NULL_REGION)] * 2, [(0, 0, 0, 0)]],
    )
    def test_parameters_that_do_not_belong(self, caller: Caller, params: list[RawParam]) -> None:
        assert refused(caller.send(Request.SERVICE_LOAD, params=params), Status.MALFORMED)
        if params != [(MEM_OUT, 0, 0, NULL_REGION)]:
            sent = caller.send(Request.SERVICE_ATTEST, params=params, uuid=bytes(16), nonce=bytes(32))
            assert refused(sent, Status.MALFORMED)
        if params:
            assert refused(caller.call(1, params=params), Status.MALFORMED)

    def test_memory_that_is_not_the_contexts(self, caller: Caller) -> None:
        other = Caller(caller.guest)
        region = caller.guest.region(other.context)
        for param in ((MEM_IN, 0, 8, region), (MEM_IN, 0, 8, 99)):
            assert refused(caller.send(Request.SERVICE_LOAD, params=[param]), Status.NO_REGION)
        own = caller.guest.region(caller.context, RAM + 4096)
        assert refused(caller.send(Request.SERVICE_LOAD, params=[(MEM_IN, 4000, 97, own)]), Status.BAD_RANGE)


class TestAttestation:
    @requirement("DEV-ATT-1")
    def test_a_statement(self, caller: Caller) -> None:
        data = packed(VENDOR, 4)
        caller.load(packed(VENDOR, 3))
        caller.load(data)
        sent = caller.attest(LOADED)
        assert sent.ret == Result.SUCCESS
        size = sent.params(1)[0][2]
        said = attestation.check(sent.inline(1)[:size], ATTESTER.public, bytes(range(32)))
        assert said == attestation.Statement(LOADED, 4, 1, package.parse(data).digest)

    @requirement("DEV-ATT-2")
    def test_without(self, caller: Caller, monkeypatch: pytest.MonkeyPatch) -> None:
        assert refused(caller.attest(UUID(int=9)), Status.NOT_FOUND)
        sent = caller.attest(Plain.uuid, size=8)
        assert ended(sent, Result.SHORT_BUFFER, Origin.TRUSTED_APP)
        assert sent.params(1)[0][2] == 136 + 64

        def no_cryptography(*_: object) -> None:
            raise ImportError

        monkeypatch.setattr(package, "keygen", no_cryptography)
        other = Caller(Bench(built_in=SERVERS).guest(features=FEATURES))
        assert ended(other.attest(Plain.uuid), Result.NOT_SUPPORTED)


class TestEnclaves:
    @requirement("DEV-ENC-1")
    @pytest.mark.parametrize("name", [b"", b"\xff", b"a\0b", b"\0a", b"x" * 63 + b"\xc3"])
    def test_what_is_no_name(self, caller: Caller, name: bytes) -> None:
        for sent in (caller.create(name), caller.acquire(name)):
            assert refused(sent, Status.MALFORMED)
        for flags in (2, 0x8000_0000, 3):
            assert refused(caller.create(b"x", flags=flags), Status.MALFORMED)
        assert len(caller.guest.device.epoch.sessions) == 0

    @requirement("DEV-ENC-2", "DEV-ENC-3", "DEV-ENC-7")
    def test_who_sees_what(self, bench: Bench) -> None:
        one, two, three, _, five = (Caller(bench.guest(features=FEATURES)) for _ in range(5))
        one.created(b"x")
        assert refused(one.create(b"x"), Status.IN_USE)
        assert refused(two.acquire(b"x"), Status.NOT_FOUND)
        two.created(b"x")
        assert refused(one.create(b"y", flags=1), Status.DENIED)
        assert refused(five.create(b"y"), Status.DENIED)
        one.created(b"clock-1", flags=1)
        assert refused(two.create(b"clock-1"), Status.IN_USE)
        assert refused(three.acquire(b"clock-1"), Status.NOT_FOUND)
        three.created(b"clock-1")
        assert returned(two.call(two.acquired(b"clock-1"), ADD, 3, 4))[0] == 7
        one.created(b"seen", flags=1)
        assert refused(two.acquire(b"seen"), Status.DENIED)
        assert three.acquire(b"seen").ret == Result.SUCCESS

    @requirement("DEV-ENC-2")
    def test_the_own_one_is_meant(self, bench: Bench) -> None:
        one, two = (Caller(bench.guest(features=FEATURES)) for _ in range(2))
        two.created(b"clock-1")
        one.created(b"clock-1", flags=1)
        server = two.acquired(b"clock-1")
        one.guest.close_context(one.context)
        assert returned(two.call(server, ADD, 3, 4))[0] == 7

    @requirement("DEV-ENC-3")
    def test_what_the_service_says(self, caller: Caller) -> None:
        assert refused(caller.create(b"x", UUID(int=9)), Status.NOT_FOUND)
        sent = caller.create(b"x", Faulty.uuid)
        assert ended(sent, Result.STORAGE_NO_SPACE, Origin.TRUSTED_APP)
        assert sent.response.ident() == 0
        assert ended(caller.create(b"x", Plain.uuid), Result.NOT_SUPPORTED)
        caller.created(b"x")

    @requirement("DEV-ENC-4")
    def test_it_ends_with_its_context(self, bench: Bench) -> None:
        guest = bench.guest(features=FEATURES, limits=Limits(max_sessions=2))
        creator, other = Caller(guest), Caller(guest)
        creator.created(b"x")
        server = other.acquired(b"x")
        assert refused(creator.create(b"y"), Status.LIMIT)
        waiting = other.call(server, HOLD, 1000)
        guest.close_context(creator.context)
        assert ended(waiting, Result.TARGET_DEAD)
        assert Server.ended == ["destroy"]
        assert refused(other.acquire(b"x"), Status.NOT_FOUND)

    @requirement("DEV-ENC-5")
    def test_whose_it_is(self, bench: Bench) -> None:
        guest = bench.guest(features=FEATURES)
        creator, other, elsewhere = Caller(guest), Caller(guest), Caller(bench.guest(features=FEATURES))
        enclave = creator.created(b"x")
        server = creator.acquired(b"x")
        session = guest.open_session(creator.context, Plain.uuid)
        for who, ident in ((other, enclave), (elsewhere, enclave), (creator, server), (creator, session), (creator, 0)):
            assert refused(who.destroy(ident), Status.NO_SESSION)
        assert refused(guest.invoke(creator.context, enclave, 0), Status.NO_SESSION)
        assert refused(guest.invoke(creator.context, server, 0), Status.NO_SESSION)
        for ident in (enclave, session):
            assert refused(creator.call(ident, ADD), Status.NO_SESSION)
            assert refused(creator.release(ident), Status.NO_SESSION)
        assert creator.destroy(enclave).status == Status.OK
        assert refused(creator.destroy(enclave), Status.NO_SESSION)

    @requirement("DEV-ENC-6")
    def test_destroy_in_the_middle(self, bench: Bench) -> None:
        guest = bench.guest(features=FEATURES)
        creator, other = Caller(guest), Caller(guest)
        enclave, server = creator.created(b"x"), other.acquired(b"x")
        region = guest.region(other.context)
        waiting = [other.call(server, HOLD, 1000, mask, params=[(MEM_INOUT, 0, 64, region)]) for mask in (0, 1)]
        assert not any(sent.done for sent in waiting)
        assert creator.destroy(enclave).status == Status.OK
        assert all(ended(sent, Result.TARGET_DEAD) for sent in waiting)
        assert ended(other.call(server, ADD), Result.TARGET_DEAD)
        assert refused(other.acquire(b"x"), Status.NOT_FOUND)
        assert creator.created(b"x") > enclave
        assert ended(other.call(server, ADD), Result.TARGET_DEAD)
        assert other.release(server).status == Status.OK

    @requirement("DEV-ENC-7")
    def test_servers_count(self, bench: Bench) -> None:
        caller = Caller(bench.guest(features=FEATURES, limits=Limits(max_sessions=2)))
        caller.created(b"x")
        server = caller.acquired(b"x")
        assert refused(caller.acquire(b"x"), Status.LIMIT)
        assert caller.release(server).status == Status.OK
        caller.acquired(b"x")
        assert refused(caller.release(server), Status.NO_SESSION)

    @requirement("DEV-ENC-8")
    def test_release_in_the_middle(self, caller: Caller) -> None:
        caller.created(b"x")
        one, two = caller.acquired(b"x"), caller.acquired(b"x")
        ends, stays = caller.call(one, HOLD, 1000, 1), caller.call(two, HOLD, 5)
        masked = caller.call(one, HOLD, 3)
        release = caller.release(one)
        assert ended(ends, Result.CANCEL, Origin.TRUSTED_APP)
        assert [sent.done for sent in (release, masked, stays)] == [False] * 3
        assert refused(caller.call(one, ADD), Status.NO_SESSION)
        caller.guest.bench.pass_time(4)
        assert returned(masked)[0] == 99
        assert release.status == Status.OK
        assert not stays.done

    @requirement("DEV-ENC-9")
    def test_concurrent_calls(self, caller: Caller) -> None:
        caller.created(b"x")
        server = caller.acquired(b"x")
        waiting = [caller.call(server, HOLD, 5) for _ in range(3)]
        assert returned(caller.call(server, ADD, 1, 2)) == (3, 0, 0)
        assert not any(sent.done for sent in waiting)
        caller.guest.bench.pass_time(6)
        assert [returned(sent)[0] for sent in waiting] == [99] * 3

    @requirement("DEV-ENC-10")
    def test_memory_in_place(self, caller: Caller) -> None:
        guest = caller.guest
        caller.created(b"x")
        server, region = caller.acquired(b"x"), guest.region(caller.context)
        ram(guest, 64)[:] = bytes(range(64))
        sent = caller.call(server, DOUBLE, params=[(MEM_INOUT, 8, 16, region)])
        assert returned(sent) == (16, 1, 15)
        after = bytes(ram(guest, 64))
        assert after == bytes([*range(8), *(2 * byte for byte in range(8, 24)), *range(24, 64)])
        inline = caller.call(server, DOUBLE, params=[(MEM_INOUT | INLINE, 0, 8, 0)], inline=b"\1" * 8, inline_out=8)
        assert inline.response.rest[32 + 32 :] == b"\2" * 8
        read_only = guest.region(caller.context, RAM + 8192, flags=RegionFlag.READ_ONLY)
        assert refused(caller.call(server, DOUBLE, params=[(MEM_INOUT, 0, 8, read_only)]), Status.BAD_RANGE)
        assert refused(caller.call(server, DOUBLE, params=[(MEM_INOUT, 4090, 8, region)]), Status.BAD_RANGE)
        foreign = guest.region(Caller(guest).context)
        assert refused(caller.call(server, DOUBLE, params=[(MEM_INOUT, 0, 8, foreign)]), Status.NO_REGION)

    @requirement("DEV-ENC-10")
    def test_it_keeps_nothing(self, caller: Caller) -> None:
        """Memory is gone from the enclave when its call ends, and no answer lies outside of it."""
        kept: list[Any] = []

        async def keep(server: Any, client: Any, regs: Any, memory: Any) -> Any:
            kept.append(memory)
            return await answers.pop()(server, client, regs, memory)

        async def beyond(server: Any, client: Any, regs: Any, memory: Any) -> Any:
            from tee.services import CallReturn

            return CallReturn(0, memory.capacity, 1)

        from tests.tee.soft.test_enclaves import double

        answers = [beyond, double]
        Server.acts[77] = keep
        caller.created(b"x")
        server, region = caller.acquired(b"x"), caller.guest.region(caller.context)
        params = [(MEM_INOUT, 0, 16, region)]
        assert returned(caller.call(server, 77, params=params))[0] == 16
        assert kept[0].read() == b""
        assert kept[0].direction == Direction.INOUT
        assert ended(caller.call(server, 77, params=params), Result.TARGET_DEAD)

    @requirement("DEV-ENC-11")
    def test_chains(self, caller: Caller) -> None:
        for number in range(10):
            caller.created(b"e%d" % number)
        server = caller.acquired(b"e0")
        assert returned(caller.call(server, ONWARD, 0, 8))[0] == 8
        seen: list[tuple[int, int]] = []

        async def note(server: Any, client: Any, regs: Any, memory: Any) -> Any:
            from tee.results import TeeError
            from tee.services import CallReturn

            target = "e0" if regs[1] == 50 else f"e{regs[1] + 1}"
            try:
                return await server.env.acquire(target).call(88, min(regs[1] + 1, 9))
            except TeeError as error:
                if not seen:
                    seen.append((error.code, error.origin))
                return CallReturn()

        Server.acts[88] = note
        assert caller.call(server, 88, 0).ret == Result.SUCCESS
        assert seen == [(Result.OVERFLOW, Origin.TEE)]
        seen.clear()
        assert caller.call(server, 88, 50).ret == Result.SUCCESS
        assert seen == [(Result.ACCESS_CONFLICT, Origin.TEE)]

    def test_results(self, caller: Caller) -> None:
        caller.created(b"x")
        server = caller.acquired(b"x")
        assert ended(caller.call(server, FAIL, 0x1234), 0x1234, Origin.TRUSTED_APP)
        waiting = caller.call(server, HOLD, 1000)
        assert ended(caller.call(server, PANIC), Result.TARGET_DEAD)
        assert ended(waiting, Result.TARGET_DEAD)

    def test_a_reset_in_the_middle(self, bench: Bench) -> None:
        one, two = (Caller(bench.guest(features=FEATURES)) for _ in range(2))
        one.created(b"clock-1", flags=1)
        server = two.acquired(b"clock-1")
        region = two.guest.region(two.context)
        waiting = [two.call(server, HOLD, 1000, params=[(MEM_INOUT, 0, 8, region)]) for _ in range(2)]
        restart(two.guest)
        assert not any(sent.done for sent in waiting)
        again = Caller(two.guest)
        server = again.acquired(b"clock-1")
        waiting = [again.call(server, HOLD, 1000) for _ in range(2)]
        restart(one.guest)
        assert all(ended(sent, Result.TARGET_DEAD) for sent in waiting)


class TestPseudoTa:
    @requirement("DEV-SVC-12")
    def test_without_the_feature(self, bench: Bench) -> None:
        guest = bench.guest(features=ALL)
        context = guest.open_context()
        session = guest.open_session(context, SERVICES_UUID)
        value = (ParamType.VALUE_INOUT, 0, 0, 0)
        sent = guest.invoke(context, session, Request.SERVICE_LIST, value, (MEM_OUT, 0, 0, NULL_REGION))
        assert sent.params(2)[0][1] == len(SERVERS) + 1
        sent = guest.send(Request.SERVICE_LIST, context=context, first=0, max_entries=0)
        assert refused(sent, Status.UNSUPPORTED)

    @requirement("DEV-SVC-13")
    def test_refusals(self, bench: Bench) -> None:
        guest = bench.guest(features=ALL)
        context = guest.open_context()
        session = guest.open_session(context, SERVICES_UUID)

        def ask(command: int, *params: RawParam, inline: bytes = b"") -> Sent:
            return guest.invoke(context, session, command, *params, inline=inline)

        uuid = (MEM_IN | INLINE, 0, 16, 0)
        gone = ask(Request.SERVICE_REMOVE, uuid, inline=bytes(16))
        assert ended(gone, STATUS_RESULT[Status.NOT_FOUND])
        denied = ask(Request.SERVICE_REMOVE, uuid, inline=Plain.uuid.bytes)
        assert ended(denied, STATUS_RESULT[Status.DENIED])
        name = (MEM_IN | INLINE, 0, 8, 0)
        value = (ParamType.VALUE_OUT, 0, 0, 0)
        assert ended(ask(Request.ENCLAVE_ACQUIRE, name, value, inline=b"\xff" * 8), STATUS_RESULT[Status.MALFORMED])
        assert ended(ask(Request.ENCLAVE_RELEASE, (1, 5, 0, 0)), STATUS_RESULT[Status.NO_SESSION])
        assert ask(Request.ENCLAVE_RELEASE, value).ret == Result.BAD_PARAMETERS

    def test_codes(self) -> None:
        """One table says what a command answers where a request has a status."""
        from host_backend.services import STATUSES

        assert {refusal: STATUS_RESULT[STATUSES[refusal]] for refusal in Refusal} == {
            refusal: refusal.value for refusal in Refusal
        }
