"""Services by the pseudo-TA: what any client can ask for in an ordinary session."""

from __future__ import annotations

import random
from typing import Any
from uuid import UUID

import pytest

from tee import attestation, package
from tee.calls import CloseContext, CloseSession, Invoke, OpenSession
from tee.driver import Done
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import GRPC_UUID
from tee.services import (
    ENTRY_SIZE,
    SERVICES_UUID,
    AttestSelector,
    AttestService,
    Command,
    ListServices,
    Service,
    ServiceFlag,
    TaskSelector,
)
from tee.soft.limits import SoftLimits
from tests.tee.bench import IDLE, Bench
from tests.tee.soft.servers import LOADED, SERVERS, Plain, packed, vendor

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
VENDOR, STRANGER = vendor(), vendor()
ATTESTER = vendor()


def given(data: bytes, direction: Direction = IN) -> MemRef:
    return MemRef(direction, Memory.of(bytearray(data)), 0, len(data))


def room(size: int) -> MemRef:
    return given(bytes(size), OUT)


def content(param: MemRef) -> bytes:
    assert param.memory is not None
    return param.memory.read(param.offset, param.size)


class Client:
    """A client with a session with the pseudo-TA."""

    def __init__(self, bench: Bench, vm: str = "") -> None:
        self.bench = bench
        self.context = bench.context(vm)
        self.session = bench.session(self.context, SERVICES_UUID)

    def ask(self, command: int, *params: Param) -> Done:
        return self.bench.invoke(self.session, command, *params)

    def begin(self, command: int, *params: Param) -> Any:
        return self.bench.start(Invoke(session=self.session, func=command, params=list(params)))

    def load(self, data: bytes) -> Done:
        return self.ask(Command.SERVICE_LOAD, given(data), room(16), Value(OUT))

    def remove(self, uuid: UUID = LOADED) -> Done:
        return self.ask(Command.SERVICE_REMOVE, given(uuid.bytes))

    def services(self, entries: int = 50, first: int = 0) -> tuple[int, list[Service]]:
        value, memory = Value(INOUT, first), room(entries * ENTRY_SIZE)
        assert self.ask(Command.SERVICE_LIST, value, memory).code == Result.SUCCESS
        data = content(memory)
        found = [Service.unpack(data[at : at + ENTRY_SIZE]) for at in range(0, len(data), ENTRY_SIZE)]
        assert len(found) == value.b
        return value.a, found

    def task(self, uuid: UUID, func: int, *params: Param) -> Done:
        selector = TaskSelector.build({"uuid": uuid.bytes, "func": func})
        return self.ask(Command.SERVICE_TASK, given(selector), *params)

    def attest(self, uuid: UUID, nonce: bytes = bytes(range(32)), size: int = 500) -> tuple[Done, MemRef]:
        memory = room(size)
        selector = AttestSelector.build({"uuid": uuid.bytes, "nonce": nonce})
        return self.ask(Command.SERVICE_ATTEST, given(selector), memory), memory

    def version_of(self, session: object) -> int:
        value = Value(INOUT)
        assert self.bench.invoke(session, 0, value).code == Result.SUCCESS
        return value.a

    def close(self) -> None:
        assert self.bench.done(CloseContext(context=self.context)).code == Result.SUCCESS


def bench_of(**options: Any) -> Bench:
    Plain.seen.clear()
    return Bench(built_in=SERVERS, keys=[VENDOR.public], attestation_key=ATTESTER.private, **options)


@pytest.fixture
def bench() -> Bench:
    return bench_of()


@pytest.fixture
def client(bench: Bench) -> Client:
    return Client(bench)


class TestList:
    def test_what_is_built_in(self, client: Client) -> None:
        total, found = client.services()
        assert [service.uuid for service in found] == sorted([*SERVERS, SERVICES_UUID])
        assert total == len(found)
        plain = next(service for service in found if service.uuid == Plain.uuid)
        assert plain == Service(Plain.uuid, 7, 0x10001, ServiceFlag.BUILT_IN, "plain")
        assert GRPC_UUID not in [service.uuid for service in found]

    def test_pages_of_it(self, client: Client) -> None:
        total, found = client.services()
        assert [client.services(1, at)[1][0] for at in range(total)] == found
        assert client.services(5, total) == (total, [])
        assert client.services(5, (1 << 64) - 1) == (total, [])
        assert client.services(0) == (total, [])

    def test_a_null_reference_asks_for_the_number(self, client: Client) -> None:
        value = Value(INOUT)
        assert client.ask(Command.SERVICE_LIST, value, MemRef(OUT, None, 0, 0)).code == Result.SUCCESS
        assert (value.a, value.b) == (len(SERVERS) + 1, 0)

    def test_in_use(self, client: Client) -> None:
        client.bench.session(client.context, Plain.uuid)
        used = {service.uuid for service in client.services()[1] if service.flags & ServiceFlag.IN_USE}
        assert used == {Plain.uuid, SERVICES_UUID}


class TestLoad:
    def test_load_and_use(self, client: Client) -> None:
        uuid, version = room(16), Value(OUT)
        done = client.ask(Command.SERVICE_LOAD, given(packed(VENDOR, 3)), uuid, version)
        assert done.code == Result.SUCCESS
        assert (content(uuid), version.a) == (LOADED.bytes, 3)
        entry = next(service for service in client.services()[1] if service.uuid == LOADED)
        assert entry == Service(LOADED, 3, 0x10001, ServiceFlag.LOADED, "loaded")
        session = client.bench.session(client.context, LOADED)
        assert client.version_of(session) == 3
        assert client.bench.rpcs() == []

    @pytest.mark.parametrize("size", [0, 1, 19, 20, 60, 150, -1])
    def test_what_is_no_complete_package(self, client: Client, size: int) -> None:
        done = client.load(packed(VENDOR)[:size])
        assert (done.code, done.origin) == (Result.BAD_FORMAT, Origin.TEE)
        assert client.services()[0] == len(SERVERS) + 1

    def test_what_does_not_verify(self, client: Client) -> None:
        good = packed(VENDOR)
        changed = good[:-1] + bytes([good[-1] ^ 1])
        forged = good[:60] + bytes([good[60] ^ 1]) + good[61:]
        unsigned = good[:18] + bytes(2) + good[20:52] + good[116:]
        for bad in (changed, forged, unsigned, packed(STRANGER)):
            assert client.load(bad).code == Result.SECURITY
        assert client.services()[0] == len(SERVERS) + 1

    def test_nothing_of_it_runs_before(self, client: Client) -> None:
        client.load(packed(STRANGER, more=b"\nraise SystemExit\n"))
        client.load(packed(VENDOR)[:-1] + b"?")
        assert client.load(package.sign(b"syntax error", LOADED, 1, VENDOR.private)).code == Result.BAD_FORMAT
        assert client.load(package.sign(b"x = 1", LOADED, 1, VENDOR.private)).code == Result.BAD_FORMAT

    def test_a_private_copy(self, client: Client) -> None:
        """The client changes its memory after it was taken; what was verified is what runs."""
        worker = _Later()
        bench = bench_of(workers=worker)
        client = Client(bench)
        memory = given(packed(VENDOR, 2))
        version = Value(OUT)
        call = client.begin(Command.SERVICE_LOAD, memory, room(16), version)
        bench.run()
        assert bench.ended(call) is None
        assert memory.memory is not None
        memory.memory.write(0, bytes(memory.size))
        worker.work()
        assert bench.finish(call).code == Result.SUCCESS
        assert version.a == 2

    def test_roll_back(self, client: Client) -> None:
        assert client.load(packed(VENDOR, 5)).code == Result.SUCCESS
        assert client.load(packed(VENDOR, 4)).code == Result.SECURITY
        assert client.remove().code == Result.SUCCESS
        assert client.load(packed(VENDOR, 4)).code == Result.SECURITY
        assert client.load(packed(VENDOR, 5)).code == Result.SUCCESS

    def test_the_same_again(self, client: Client) -> None:
        assert client.load(packed(VENDOR, 5)).code == Result.SUCCESS
        assert client.load(packed(VENDOR, 5)).code == Result.SUCCESS
        assert client.load(packed(VENDOR, 5, more=b"#")).code == Result.ACCESS_CONFLICT
        assert client.services()[0] == len(SERVERS) + 2

    @pytest.mark.parametrize("kept", [False, True])
    def test_a_newer_version(self, client: Client, kept: bool) -> None:
        client.load(packed(VENDOR, 1, kept=kept))
        old = client.bench.session(client.context, LOADED)
        assert client.load(packed(VENDOR, 2, kept=kept)).code == Result.SUCCESS
        new = client.bench.session(client.context, LOADED)
        assert (client.version_of(old), client.version_of(new)) == (1, 2)
        client.bench.done(CloseSession(session=old))
        client.bench.done(CloseSession(session=new))
        client.bench.run()
        assert client.bench.tee.usage()["instances"] == 1 + kept  # the pseudo-TA's, and the newer one where it is kept
        assert client.remove().code == Result.SUCCESS
        client.bench.run()
        assert client.bench.tee.usage()["instances"] == 1

    def test_built_in_services_are_not_replaced(self, client: Client) -> None:
        for uuid in (Plain.uuid, GRPC_UUID, SERVICES_UUID):
            data = package.sign(b"x = 1", uuid, 9, VENDOR.private)
            done = client.load(data)
            assert (done.code, done.origin) == (Result.ACCESS_DENIED, Origin.TEE)

    def test_limits(self) -> None:
        data = packed(VENDOR)
        client = Client(bench_of(limits=SoftLimits(services=0)))
        assert client.load(data).code == Result.OUT_OF_MEMORY
        client = Client(bench_of(limits=SoftLimits(service_bytes=len(data))))
        assert client.load(data).code == Result.SUCCESS
        assert client.load(packed(VENDOR, 2, more=b"#")).code == Result.OUT_OF_MEMORY
        assert client.services()[1][-2].version == 1 or client.services()[1][-1].version == 1
        client = Client(bench_of(max_ta_size=100))
        assert client.load(data).code == Result.OUT_OF_MEMORY

    def test_each_machine_has_its_own(self, bench: Bench) -> None:
        one, two = Client(bench, "one"), Client(bench, "two")
        assert one.load(packed(VENDOR, 9, kept=True)).code == Result.SUCCESS
        session = bench.session(one.context, LOADED)
        assert LOADED not in [service.uuid for service in two.services()[1]]
        assert two.remove().code == Result.ITEM_NOT_FOUND
        assert two.attest(LOADED)[0].code == Result.ITEM_NOT_FOUND
        assert two.load(packed(VENDOR, 1, kept=True)).code == Result.SUCCESS  # the floor is one's own, too
        assert two.version_of(bench.session(two.context, LOADED)) == 1
        assert one.version_of(session) == 9

    def test_a_single_instance_is_the_machines_own(self, bench: Bench) -> None:
        one, two = Client(bench, "one"), Client(bench, "two")
        assert one.load(packed(VENDOR, 9, kept=True)).code == Result.SUCCESS
        before = bench.tee.usage()["instances"]
        for _ in range(2):
            bench.session(one.context, LOADED)
        assert bench.tee.usage()["instances"] == before + 1
        call = bench.start(OpenSession(context=two.context, uuid=LOADED))
        bench.run()
        assert bench.ended(call) is None  # its supplicant is asked
        assert bench.rpc().call is call

    def test_the_machines_end(self, bench: Bench) -> None:
        one, two = Client(bench, "one"), Client(bench, "two")
        for client in (one, two):
            assert client.load(packed(VENDOR, 2, kept=True)).code == Result.SUCCESS
            client.bench.done(CloseSession(session=bench.session(client.context, LOADED)))
        one.close()
        assert bench.tee.usage()["services"] == 2  # others of its clients may use it
        bench.tee.forget_machine("one")
        bench.tee.forget_machine("nobody")
        again = Client(bench, "one")
        assert again.remove().code == Result.ITEM_NOT_FOUND
        assert again.load(packed(VENDOR, 1)).code == Result.SECURITY
        assert two.remove().code == Result.SUCCESS
        for client in (again, two):
            client.close()
        bench.run()
        assert bench.tee.usage() == IDLE


class _Later:
    """Workers that work when they are told to."""

    def __init__(self) -> None:
        self.waiting: list[Any] = []
        self.done: list[Any] = []

    def submit(self, function: Any, ended: Any) -> None:
        self.waiting.append((function, ended))

    def work(self) -> None:
        while self.waiting:
            function, ended = self.waiting.pop(0)
            try:
                self.done.append((ended, function(), None))
            except BaseException as error:
                self.done.append((ended, None, error))

    def collect(self) -> None:
        while self.done:
            ended, value, error = self.done.pop(0)
            ended(value, error)

    def fileno(self) -> int:
        return -1


class TestRemove:
    def test_remove(self, client: Client) -> None:
        client.load(packed(VENDOR))
        assert client.remove().code == Result.SUCCESS
        done = client.remove()
        assert (done.code, done.origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)
        assert client.remove(Plain.uuid).code == Result.ACCESS_DENIED

    @pytest.mark.parametrize("newer", [False, True])
    def test_in_use(self, client: Client, newer: bool) -> None:
        client.load(packed(VENDOR))
        session = client.bench.session(client.context, LOADED)
        if newer:
            client.load(packed(VENDOR, 2))
        assert client.remove().code == Result.BUSY
        assert client.version_of(session) == 1
        client.bench.done(CloseSession(session=session))
        assert client.remove().code == Result.SUCCESS


class TestTask:
    def test_one_shot(self, client: Client) -> None:
        value = Value(INOUT, 40, 2)
        done = client.task(Plain.uuid, 0, value)
        assert (done.code, done.origin, value.a) == (Result.SUCCESS, Origin.TRUSTED_APP, 42)
        assert len(Plain.seen) == 2
        assert Plain.seen[1] == "closed"

    def test_what_fails(self, client: Client) -> None:
        done = client.task(Plain.uuid, 1)
        assert (done.code, done.origin) == (0x1234, Origin.TRUSTED_APP)
        assert Plain.seen[1:] == ["closed"]
        call = client.begin(Command.SERVICE_TASK, given(TaskSelector.build({"uuid": UUID(int=9).bytes, "func": 0})))
        client.bench.answer(client.bench.rpc(), Result.ITEM_NOT_FOUND)
        done = client.bench.finish(call)
        assert (done.code, done.origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)

    def test_cancelled(self, client: Client) -> None:
        selector = given(TaskSelector.build({"uuid": Plain.uuid.bytes, "func": 2}))
        call = client.begin(Command.SERVICE_TASK, selector)
        client.bench.run()
        client.bench.tee.cancel(call)
        assert client.bench.finish(call).code == Result.CANCEL
        assert Plain.seen[1:] == ["closed"]
        assert client.bench.tee.usage()["sessions"] == 1

    def test_the_context_closes_in_it(self, client: Client) -> None:
        selector = given(TaskSelector.build({"uuid": Plain.uuid.bytes, "func": 2}))
        call = client.begin(Command.SERVICE_TASK, selector)
        client.bench.run()
        client.close()
        assert client.bench.ended(call) is not None
        assert client.bench.tee.usage() == IDLE

    def test_the_session_closes_in_it(self, client: Client) -> None:
        selector = given(TaskSelector.build({"uuid": Plain.uuid.bytes, "func": 2}))
        call = client.begin(Command.SERVICE_TASK, selector)
        client.bench.run()
        closing = client.bench.done(CloseSession(session=client.session))
        ended = [event.call for event in client.bench.events if isinstance(event, Done)]
        assert ended.index(call) < ended.index(closing.call)
        assert client.bench.tee.usage()["sessions"] == 0

    def test_the_session_closes_in_one_that_masks_that(self, client: Client) -> None:
        selector = given(TaskSelector.build({"uuid": Plain.uuid.bytes, "func": 3}))
        call = client.begin(Command.SERVICE_TASK, selector)
        client.bench.run()
        closing = client.bench.start(CloseSession(session=client.session))
        client.bench.run()
        assert client.bench.ended(closing) is None
        client.bench.now = 5
        assert client.bench.finish(call).code == Result.SUCCESS
        assert client.bench.finish(closing).code == Result.SUCCESS
        ended = [event.call for event in client.bench.events if isinstance(event, Done)]
        assert ended.index(call) < ended.index(closing)

    def test_tas_cannot_be_reached_that_are_for_tas(self, client: Client) -> None:
        assert client.task(GRPC_UUID, 0).code == Result.ACCESS_DENIED
        assert client.task(SERVICES_UUID, 0).code == Result.ACCESS_DENIED


class TestAttest:
    NONCE = bytes(range(32))

    def test_a_loaded_service(self, client: Client) -> None:
        data = packed(VENDOR, 6)
        client.load(data)
        done, memory = client.attest(LOADED)
        assert done.code == Result.SUCCESS
        said = attestation.check(content(memory), ATTESTER.public, self.NONCE)
        assert said == attestation.Statement(LOADED, 6, client.bench.tee.info.kind, package.parse(data).digest)

    def test_a_built_in_one(self, client: Client) -> None:
        done, memory = client.attest(Plain.uuid)
        assert done.code == Result.SUCCESS
        assert attestation.check(content(memory), ATTESTER.public, self.NONCE).version == 7

    def test_what_does_not_check(self, client: Client) -> None:
        _, memory = client.attest(Plain.uuid)
        good = content(memory)
        with pytest.raises(TeeError, match="nonce"):
            attestation.check(good, ATTESTER.public, bytes(32))
        with pytest.raises(TeeError, match="another key"):
            attestation.check(good, STRANGER.public, self.NONCE)
        for at in range(len(good)):
            with pytest.raises(TeeError):
                attestation.check(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :], ATTESTER.public, self.NONCE)
            with pytest.raises(TeeError):
                attestation.check(good[:at], ATTESTER.public, self.NONCE)

    def test_too_small(self, client: Client) -> None:
        for size in (0, 1, 199):
            done, memory = client.attest(Plain.uuid, size=size)
            assert (done.code, memory.size) == (Result.SHORT_BUFFER, 136 + 64)

    def test_unknown(self, client: Client) -> None:
        assert client.attest(UUID(int=9))[0].code == Result.ITEM_NOT_FOUND
        assert client.attest(GRPC_UUID)[0].code == Result.ITEM_NOT_FOUND

    def test_an_rsa_key(self) -> None:
        key = package.keygen(rsa_bits=2048)
        client = Client(Bench(built_in=SERVERS, attestation_key=key.private))
        _, memory = client.attest(Plain.uuid)
        assert attestation.check(content(memory), key.public, self.NONCE).uuid == Plain.uuid

    def test_a_key_is_made_where_there_is_none(self) -> None:
        client = Client(Bench(built_in=SERVERS))
        one, two = content(client.attest(Plain.uuid)[1]), content(client.attest(Plain.uuid)[1])
        assert one[:136] == two[:136]
        assert client.attest(Plain.uuid)[0].code == Result.SUCCESS


class TestBadInput:
    @pytest.mark.parametrize("command", list(Command))
    def test_other_types_of_parameters(self, client: Client, command: Command) -> None:
        for params in (
            [],
            [Nothing()] * 4,
            [Value(IN)] * 5,
            [MemRef(INOUT, None, 0, 0)] * 3,
            [given(b""), given(b""), given(b"")],
            [given(bytes(16)), given(bytes(3)), Value(OUT), Value(IN)],
        ):
            assert client.ask(command, *params).code == Result.BAD_PARAMETERS
        assert client.bench.tee.usage()["enclaves"] == 0

    @pytest.mark.parametrize("command", [0, 0x3F, 0x45, 0x65, 0xFFFFFFFF])
    def test_unknown_commands(self, client: Client, command: int) -> None:
        assert client.ask(command).code == Result.NOT_SUPPORTED

    def test_reserved_bytes(self, client: Client) -> None:
        selector = TaskSelector.build({"uuid": Plain.uuid.bytes, "func": 0})[:-1] + b"\1"
        assert client.ask(Command.SERVICE_TASK, given(selector)).code == Result.BAD_PARAMETERS

    def test_an_id_that_is_too_large_for_an_enum(self, client: Client) -> None:
        assert client.ask(Command.ENCLAVE_DESTROY, Value(IN, 1 << 63)).code == Result.BAD_PARAMETERS
        assert client.ask(Command.ENCLAVE_RELEASE, Value(IN, 1)).code == Result.BAD_PARAMETERS


class TestCalls:
    """The same without a session: what the device's requests become."""

    def test_a_context_of_its_own(self, bench: Bench) -> None:
        context = bench.context()
        done = bench.done(ListServices(context=context, max_entries=2))
        assert (done.value.total, len(done.value.entries)) == (len(SERVERS) + 1, 2)  # type: ignore[attr-defined]
        memory = room(300)
        done = bench.done(AttestService(context=context, uuid=Plain.uuid, nonce=bytes(32), params=[memory]))
        assert done.code == Result.SUCCESS
        assert attestation.check(content(memory), ATTESTER.public, bytes(32)).uuid == Plain.uuid
        assert bench.done(OpenSession(context=context, uuid=Plain.uuid)).code == Result.SUCCESS
        bench.done(CloseContext(context=context))
        assert bench.tee.usage() == IDLE


@pytest.mark.parametrize("seed", range(10))
def test_anything_at_all(seed: int) -> None:
    """Whatever commands and parameters come, each call ends, nothing breaks, and nothing is left."""
    bench = bench_of(threads=2)
    draw = random.Random(seed)
    clients = [Client(bench, vm) for vm in ("one", "two")]
    package = packed(VENDOR)
    pieces = [Plain.uuid.bytes, LOADED.bytes, bytes(16), b"name", b"\xff", b"", bytes(64), package, package[:70]]
    pieces += [TaskSelector.build({"uuid": Plain.uuid.bytes, "func": func}) for func in range(4)]
    pieces += [AttestSelector.build({"uuid": LOADED.bytes, "nonce": bytes(32)}), UUID(int=400).bytes]

    def parameter() -> Param:
        kind, direction = draw.randrange(5), draw.choice([IN, OUT, INOUT])
        if kind == 0:
            return Nothing()
        if kind == 1:
            return MemRef(direction, None, 0, draw.choice([0, 16, 1 << 40]))
        if kind == 2:
            return Value(direction, draw.choice([0, 1, 2, 3, 1 << 32, (1 << 64) - 1]), draw.randrange(3))
        return given(draw.choice(pieces), direction)

    calls = []
    for _ in range(400):
        client = draw.choice(clients)
        calls.append(client.begin(draw.choice(list(Command)), *(parameter() for _ in range(draw.randrange(6)))))
        for _ in range(draw.randrange(3)):
            bench.tee.run()
        bench.now += draw.random()
    for client in clients:
        bench.start(CloseContext(context=client.context))
    bench.run(100_000)
    assert all(bench.ended(call) is not None for call in calls)
    assert not [line for line in bench.logged if "was ended" in line]
    for vm in ("one", "two"):
        bench.tee.forget_machine(vm)
    bench.run()
    assert bench.tee.usage() == IDLE
