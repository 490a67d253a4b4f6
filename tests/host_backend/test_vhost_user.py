"""The whole device behind vhost-user messages and real rings, with nothing real under them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import pytest

from device.config import Config, Limits
from device.messages import REQUESTS, RESPONSE_HEADER
from device.params import RawParam, pack_raw
from device.requests import pack_request, response_size
from device.wire import Feature, ParamType, Queue, Request, Status
from host_backend.device import TeeDevice
from host_backend.router import Router
from pyvhost.messages import U64, ProtocolFeature
from pyvhost.messages import Feature as RingFeature
from tee.soft import SoftTee, examples
from tee.soft.ta import Direction, Parameters, TrustedApplication
from tests.host_backend.bench import PROBE, Clock
from tests.pyvhost.fakes import GUEST, RAM, USER, F, Vmm, mem_region

requirement = pytest.mark.requirement
REQUESTS_AT, ANSWERS_AT, DATA_AT = 0x8000, 0xC000, 0x5000
RINGS = slice(0, DATA_AT)
INOUT, V_IN = ParamType.MEMREF_INOUT, ParamType.VALUE_IN


class Writer(TrustedApplication):
    """Sleeps for a milliseconds, then writes into the memory it was given."""

    uuid = UUID(int=0x3713)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        memory = params.memory(0, Direction.INOUT)
        self.env.unmask_cancellation()
        await self.env.sleep(params.value(1, Direction.IN).a / 1000)
        memory.write(b"written")


class Host:
    """A TEE and its router; :meth:`machine` makes guests."""

    def __init__(self) -> None:
        self.clock = Clock()
        self.tee = SoftTee(
            clock=self.clock,
            random=lambda n: bytes(n),
            built_in={**examples.built_in("probe"), Writer.uuid: Writer},
            threads=2,
        )
        self.router = Router(self.tee, self.clock)
        self.epochs = itertools.count(0xE001)
        self.machines: list[Machine] = []

    def machine(self, **options: Any) -> Machine:
        one = Machine(self, f"vm{len(self.machines)}", **options)
        self.machines.append(one)
        return one

    def turn(self) -> None:
        for _ in range(20):
            for one in self.machines:
                one.vmm.ports.turn()
            self.router.run()

    def pass_time(self, seconds: float) -> None:
        self.clock.now += seconds
        self.turn()


class Machine:
    """One guest: what its driver and its VMM do."""

    def __init__(self, host: Host, vm: str, *, queues: int = 1, start: bool = True) -> None:
        self.host = host
        self.queues = range(Queue.REQUEST + queues)
        self.device = TeeDevice(
            host.router,
            vm=vm,
            limits=Limits(),
            request_queues=queues,
            clock=host.clock,
            new_epoch=lambda: next(host.epochs),
        )
        self.vmm = Vmm(self.device)
        self.vmm.negotiate()
        self.numbers = itertools.count(1)
        self.rooms: dict[int, int] = {}
        self.done: dict[int, bytes] = {}
        if start:
            self.vmm.start(*self.queues)
            host.turn()

    def kick(self, index: int) -> None:
        kick = self.vmm.backend.rings[index].kick
        if kick in self.vmm.ports.watched:
            self.vmm.ports.watched[kick]()

    def put(
        self,
        request: Request,
        *,
        index: int = Queue.REQUEST,
        context: int = 0,
        params: Sequence[RawParam] = (),
        tail: bytes = b"",
        **fields: Any,
    ) -> int:
        """Make a request available, without a kick; its tag."""
        tag = next(self.numbers)
        kind = REQUESTS[request]
        if kind.body.tail.name == "PARAMS":
            fields["num_params"] = len(params)
        data = pack_request(
            request,
            epoch=self.device.epoch.number,
            tag=tag,
            context=context,
            body=kind.body.codec.pack(**fields),
            tail=tail or pack_raw(params),
        )
        self.rooms[tag] = response_size(kind, len(params), 0)
        at, answer = REQUESTS_AT + 0x100 * tag, ANSWERS_AT + 0x100 * tag
        self.vmm.ram[at : at + len(data)] = data
        self.vmm.drivers[index].add([(GUEST + at, len(data))], [(GUEST + answer, self.rooms[tag])], tag)
        return tag

    def send(self, request: Request, **more: Any) -> int:
        tag = self.put(request, **more)
        self.kick(more.get("index", Queue.REQUEST))
        self.host.turn()
        return tag

    def answer(self, tag: int) -> bytes | None:
        """The response, None while there is none."""
        for driver in self.vmm.drivers.values():
            for token, written in driver.poll():
                at = ANSWERS_AT + 0x100 * token
                self.done[token] = bytes(self.vmm.ram[at : at + written])
        return self.done.get(tag)

    def status(self, tag: int) -> int:
        answer = self.answer(tag)
        assert answer is not None
        status: int = RESPONSE_HEADER.unpack(answer).status
        return status

    def ask(self, request: Request, **more: Any) -> int:
        """Have a request done; the first word of its response's body."""
        answer = self.answer(self.send(request, **more))
        assert answer is not None
        header = RESPONSE_HEADER.unpack(answer)
        assert (header.status, header.ret) == (Status.OK, 0)
        return int.from_bytes(answer[16:20], "little")

    def open(self, **more: Any) -> int:
        return self.ask(Request.OPEN_CONTEXT, flags=0, **more)

    def session(self, context: int, uuid: UUID = PROBE) -> int:
        body = {"uuid": uuid.bytes, "client_uuid": bytes(16), "client_login": 0}
        return self.ask(Request.OPEN_SESSION, context=context, **body)

    def region(self, context: int, address: int = GUEST + DATA_AT, size: int = 64) -> int:
        tail = address.to_bytes(8, "little") + size.to_bytes(8, "little")
        return self.ask(Request.REGISTER_MEMORY, context=context, flags=0, num_ranges=1, size=size, tail=tail)

    def write_later(self, context: int, region: int, milliseconds: int = 1000) -> int:
        """A call that will write to a region; its tag."""
        session = self.session(context, Writer.uuid)
        params = [(INOUT, 0, 64, region), (V_IN, milliseconds, 0, 0)]
        tag = self.send(Request.INVOKE, context=context, session=session, func=0, params=params)
        assert self.answer(tag) is None
        return tag

    def pause(self) -> dict[int, int]:
        """As QEMU does it; each GET_VRING_BASE is answered at once."""
        return self.vmm.stop(*self.queues)

    def resume(self, bases: dict[int, int]) -> None:
        self.vmm.start(*self.queues, bases=bases, fresh=False)
        self.host.turn()


@pytest.fixture
def host() -> Host:
    return Host()


class TestOffers:
    @requirement("DEV-FEA-1")
    def test_features(self, host: Host) -> None:
        offered = U64.unpack(host.machine().vmm.tell(F.GET_FEATURES)).value
        assert offered & RingFeature.VERSION_1
        assert not offered & RingFeature.IN_ORDER
        assert not offered & 1 << 40  # VIRTIO_F_RING_RESET

    @requirement("DEV-VHU-9")
    def test_protocol_features(self, host: Host) -> None:
        machine = host.machine(queues=3)
        vmm = machine.vmm
        offered = ProtocolFeature(U64.unpack(vmm.tell(F.GET_PROTOCOL_FEATURES)).value)
        for name in ("MQ", "CONFIG", "RESET_DEVICE", "REPLY_ACK", "BACKEND_REQ", "INFLIGHT_SHMFD"):
            assert ProtocolFeature[name] in offered
        assert ProtocolFeature.CONFIGURE_MEM_SLOTS in offered
        assert U64.unpack(vmm.tell(F.GET_QUEUE_NUM)).value == 5
        epoch = machine.device.epoch.number
        assert vmm.ack(F.RESET_DEVICE) == 0
        assert machine.device.epoch.number != epoch

    @requirement("DEV-FEA-3")
    def test_a_feature_without_the_one_it_requires(self, host: Host) -> None:
        """What lacks what it requires was not accepted."""
        machine = host.machine()
        for accepted, left in (
            (Feature.OCALL | Feature.INLINE, Feature.INLINE),
            (Feature.ATTESTATION | Feature.ENCLAVES, Feature(0)),
            (Feature.OCALL | Feature.RPC, Feature.OCALL | Feature.RPC),
            (Feature.ENCLAVES | Feature.SERVICES, Feature.ENCLAVES | Feature.SERVICES),
        ):
            machine.device.negotiated(int(accepted))
            assert machine.device.epoch.features == left
            machine.device.acked_features = int(accepted)
            machine.device.reset()
            assert machine.device.epoch.features == left

    @requirement("DEV-FEA-3", "DEV-FEA-2")
    def test_a_feature_that_is_not_offered(self, host: Host) -> None:
        machine = host.machine(start=False)
        assert machine.vmm.ack(F.SET_FEATURES, U64.pack(machine.vmm.features | Feature.FFA_HANDLE)) == 1

    @requirement("DEV-QUE-1")
    @pytest.mark.parametrize("queues", [1, 2, 3])
    def test_request_queues(self, host: Host, queues: int) -> None:
        """There are as many as the config space says, and each works."""
        machine = host.machine(queues=queues)
        assert Config.unpack(machine.device.read_config(0, 128)).num_request_queues == queues
        assert U64.unpack(machine.vmm.tell(F.GET_QUEUE_NUM)).value == Queue.REQUEST + queues
        assert [machine.open(index=2 + n) for n in range(queues)] == list(range(1, queues + 1))


def wild_index(vmm: Vmm, at: int) -> None:
    vmm.ram[at + 130 : at + 132] = b"\xff\x7f"


def wild_head(vmm: Vmm, at: int) -> None:
    vmm.ram[at + 132 : at + 148] = b"\xff\x7f" * 8


def loop(vmm: Vmm, at: int) -> None:
    for n in range(8):
        vmm.ram[at + 16 * n : at + 16 * n + 16] = (GUEST + DATA_AT).to_bytes(8, "little") + bytes(
            [1, 0, 0, 0, 1, 0, n ^ 1, 0]
        )


def wild_next(vmm: Vmm, at: int) -> None:
    for n in range(8):
        vmm.ram[at + 16 * n + 12 : at + 16 * n + 16] = b"\1\0\xff\0"


@requirement("DEV-QUE-8")
@pytest.mark.parametrize("harm", [wild_index, wild_head, loop, wild_next])
def test_a_ring_that_cannot_be_walked(host: Host, harm: Any) -> None:
    machine, other = host.machine(queues=2), host.machine()
    context = machine.open(index=3)
    machine.put(Request.OPEN_CONTEXT, flags=0)
    harm(machine.vmm, 0x2000)
    for _ in range(3):
        machine.kick(Queue.REQUEST)
        host.turn()
    queue = machine.device.queues[Queue.REQUEST]
    assert queue is not None
    assert queue.broken
    assert not machine.device.process(Queue.REQUEST)  # nothing is left to do there
    assert machine.vmm.ports.signals.count(machine.vmm.backend.rings[Queue.REQUEST].err or -1) == 1
    assert machine.vmm.ports.hung_up is None
    assert machine.ask(Request.CLOSE_CONTEXT, index=3, context=context) == 0
    assert (
        machine.status(machine.send(Request.CANCEL, index=Queue.CONTROL, context=context, tag=1)) == Status.NO_CONTEXT
    )
    assert other.open() == 1


class TestPause:
    @requirement("DEV-VHU-1", "DEV-CAN-4")
    def test_it_waits_for_nothing_and_touches_nothing(self, host: Host) -> None:
        machine = host.machine()
        context = machine.open()
        tag = machine.write_later(context, machine.region(context))
        late = machine.put(Request.OPEN_CONTEXT, flags=0)
        bases = machine.pause()  # the call is in the TEE all the while
        assert host.tee.usage()["calls"] == 1
        before = bytes(machine.vmm.ram[RINGS]), bytes(machine.vmm.ram[ANSWERS_AT:RAM])
        signals = list(machine.vmm.ports.signals)
        host.pass_time(2)
        machine.kick(Queue.REQUEST)
        assert host.tee.usage()["calls"] == 0
        assert (bytes(machine.vmm.ram[RINGS]), bytes(machine.vmm.ram[ANSWERS_AT:RAM])) == before
        assert machine.vmm.ports.signals == signals
        machine.resume(bases)
        assert [machine.status(tag), machine.status(late)] == [Status.OK, Status.OK]

    @requirement("DEV-VHU-2")
    def test_it_stops_rings_and_not_the_tee(self, host: Host) -> None:
        """What docs/operation.md tells those who take snapshots."""
        machine = host.machine()
        context = machine.open()
        machine.write_later(context, machine.region(context))
        machine.pause()
        assert bytes(machine.vmm.ram[DATA_AT : DATA_AT + 7]) == bytes(7)
        host.pass_time(2)
        assert bytes(machine.vmm.ram[DATA_AT : DATA_AT + 7]) == b"written"

    @requirement("DEV-VHU-7")
    def test_a_ring_is_looked_at_when_it_starts_again(self, host: Host) -> None:
        machine = host.machine()
        machine.open()
        bases = machine.pause()
        tag = machine.put(Request.OPEN_CONTEXT, flags=0)
        machine.resume(bases)
        assert machine.status(tag) == Status.OK


@requirement("DEV-VHU-7")
@pytest.mark.parametrize("how", ["start", "enable"])
def test_a_ring_is_looked_at_without_a_kick(host: Host, how: str) -> None:
    machine = host.machine(start=False)
    vmm = machine.vmm
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    vmm.set_memory()
    for index in machine.queues:
        vmm.ring(index, kick=how == "enable")
    tag = machine.put(Request.OPEN_CONTEXT, flags=0)
    for index in machine.queues:
        vmm.enable(index)
    if how == "start":
        host.turn()
        assert machine.answer(tag) is None
        for index in machine.queues:
            vmm.tell(F.SET_VRING_KICK, U64.pack(index), vmm.fd())
    host.turn()
    assert machine.status(tag) == Status.OK


@requirement("DEV-VHU-6", "DEV-MEM-7")
@pytest.mark.parametrize("how", ["remove", "replace"])
def test_memory_that_is_taken_away_under_a_call(host: Host, how: str) -> None:
    machine = host.machine()
    vmm, second = machine.vmm, GUEST + RAM
    fd = vmm.fd()
    vmm.ports.files[fd] = bytearray(RAM)
    region = mem_region(second, RAM, USER + RAM)
    assert vmm.ack(F.ADD_MEM_REG, region, fd) == 0
    context = machine.open()
    ident = machine.region(context, second)
    tag = machine.write_later(context, ident)
    assert vmm.ports.mapped == 2
    # answered at once, while the call is in the TEE
    if how == "remove":
        assert vmm.ack(F.REM_MEM_REG, region) == 0
    else:
        again = vmm.fd()
        assert isinstance(vmm.ram.obj, bytearray)
        vmm.ports.files[again] = vmm.ram.obj
        assert vmm.ack(F.SET_MEM_TABLE, vmm.table(again), again) == 0
    assert machine.answer(tag) is None
    assert vmm.ports.mapped == 2
    assert not any(vmm.ports.files[fd])
    host.pass_time(2)
    assert vmm.ports.files[fd][:7] == b"written"
    assert machine.status(tag) == Status.OK
    machine.ask(Request.UNREGISTER_MEMORY, context=context, region=ident)
    assert vmm.ports.mapped == 1
