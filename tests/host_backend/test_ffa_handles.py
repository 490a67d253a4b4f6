"""Memory that a guest shares with the TEE by FF-A, and names to its device by handle."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest

from device.config import Limits
from device.messages import REQUESTS
from device.requests import pack_request
from device.wire import Feature, ParamType, RegionFlag, Request, Status
from ffa.abi import transactions as abi
from ffa.abi.ids import ATTRIBUTES_NORMAL, PAGE_SIZE, Call, Data, Error, permissions
from ffa.optee.client import share
from ffa.roles.endpoint import Endpoint
from ffa.roles.machine import Access, AccessFaultError, exclusive
from tee.memory import Range
from tee.results import Result
from tee.rpc import RpcCommand
from tee.soft import SoftTee, examples
from tests.host_backend.bench import ALL, Bench, Guest, Sent
from tests.host_backend.test_requests import refused
from virtio_tee.ffa_tee import BUFFERS, DEVICES, PARTITION, FfaTee, FfaVm

pytestmark = pytest.mark.started  # there is one TEE here
requirement = pytest.mark.requirement
INOUT, V_IN, V_INOUT = ParamType.MEMREF_INOUT, ParamType.VALUE_IN, ParamType.VALUE_INOUT
XOR = 2
"""The probe's: each byte of a memory with a value."""
HOLD = 8
"""Byte 0 now, and byte 0 after a milliseconds."""
WITH_HANDLES = ALL | Feature.OCALL | Feature.FFA_HANDLE


def over_ffa(**options: Any) -> FfaTee:
    return FfaTee(SoftTee(**options), {"vm0": 1, "vm1": 2, "vm2": None})


class FfaBench(Bench):
    """vm0 and vm1 have FF-A endpoints 1 and 2."""

    tee_type = staticmethod(over_ffa)


@dataclass
class Shared:
    """What a VM has shared."""

    handle: int
    address: int
    pages: int


@dataclass
class Vm:
    """A guest with both its device and its FF-A endpoint."""

    guest: Guest
    vm: FfaVm
    ffa: FfaTee
    context: int = 0
    next_page: int = 0
    shared: list[Shared] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.context = self.guest.open_context()

    def share(self, pages: int = 1, **options: Any) -> Shared:
        address = self.vm.address + BUFFERS + self.next_page * PAGE_SIZE
        self.next_page += pages
        handle = share(self.vm.endpoint, PARTITION, [Range(address, pages * PAGE_SIZE)], **options)
        found = Shared(handle, address, pages)
        self.shared.append(found)
        return found

    def bytes(self, shared: Shared) -> memoryview:
        at = shared.address - self.vm.address
        return self.vm.memory[at : at + shared.pages * PAGE_SIZE]

    def register(self, handle: int, size: int = PAGE_SIZE, *, tag: int = 0, flags: int = 0, **more: Any) -> Sent:
        fields = {"handle": handle, "size": size, "flags": flags, **more}
        context = fields.pop("context", self.context)
        request = fields.pop("request_tag", None)
        fields["tag"] = tag
        return send_ffa(self.guest, context, request, **fields)

    def region(self, shared: Shared, **more: Any) -> int:
        sent = self.register(shared.handle, shared.pages * PAGE_SIZE, **more)
        assert sent.ret == 0
        return sent.response.ident()

    def reclaim(self, shared: Shared) -> Error | None:
        answer = self.vm.endpoint.reclaim(shared.handle)
        if answer.ok:
            self.shared.remove(shared)
        return None if answer.ok else answer.error

    def end(self) -> None:
        """All can be taken back, and is the VM's alone then."""
        for shared in list(self.shared):
            assert self.reclaim(shared) is None
        states = {state for page, state in self.ffa.machine.states.items() if state.owner == self.vm.endpoint.id}
        assert all(state.buffer or state == exclusive(self.vm.endpoint.id) for state in states)


def send_ffa(guest: Guest, context: int, request_tag: int | None, **fields: Any) -> Sent:
    """A REGISTER_FFA: its body has a field ``tag``, as the header has."""
    tag = next(guest._tags) if request_tag is None else request_tag
    body = REQUESTS[Request.REGISTER_FFA].body.codec.pack(**fields)
    data = pack_request(Request.REGISTER_FFA, epoch=guest.epoch, tag=tag, context=context, body=body, tail=b"")
    sent = guest.offer(2, data, 24, tag, Request.REGISTER_FFA)
    guest.bench.turn()
    return sent


@pytest.fixture
def machine() -> Iterator[FfaBench]:
    bench = FfaBench()
    yield bench
    for guest in bench.guests:
        guest.end()
    bench.check_empty()
    assert bench.tee.partition.usage()["lent"] == bench.tee.partition.usage()["sessions"] == 0


@pytest.fixture
def vms(machine: FfaBench) -> Iterator[list[Vm]]:
    guests = [machine.guest(ffa_vm=n, features=WITH_HANDLES) for n in (1, 2)]
    vms = [Vm(guest, machine.tee.vms[f"vm{n}"], machine.tee) for n, guest in enumerate(guests)]
    yield vms
    for vm in vms:
        vm.guest.disconnect()
    machine.turn()
    for vm in vms:
        vm.end()


@pytest.fixture
def vm(vms: list[Vm]) -> Vm:
    return vms[0]


def held(ffa: FfaTee, shared: Shared) -> bool:
    """Whether the TEE has the memory, by the state of its pages."""
    state = ffa.machine.state(shared.address // PAGE_SIZE)
    assert state is not None
    return state.of(PARTITION) is not Access.NONE


class TestOffer:
    @requirement("DEV-FFA-5", "DEV-FEA-2")
    def test_only_to_guests_whose_endpoint_is_named(self, machine: FfaBench) -> None:
        bound, other = machine.guest(ffa_vm=1, features=WITH_HANDLES), machine.guest(features=WITH_HANDLES)
        assert bound.device.features == int(WITH_HANDLES)
        assert other.device.features == int(ALL | Feature.OCALL)
        context = other.open_context()
        assert refused(send_ffa(other, context, None, handle=1, tag=0, size=4096, flags=0), Status.UNSUPPORTED)

    @requirement("DEV-FFA-5")
    def test_an_endpoint_that_the_tee_does_not_know_as_the_guests(self, machine: FfaBench) -> None:
        with pytest.raises(ValueError, match="0x2"):
            machine.guest(ffa_vm=2)  # it is vm1's
        bench = Bench()
        with pytest.raises(ValueError, match="takes no memory"):
            bench.guest(ffa_vm=1)  # a TEE that is not reached over FF-A

    @pytest.mark.parametrize("guests", [{"a": 1, "b": 1}, {"a": 0}, {"a": DEVICES}, {"a": -1}])
    def test_endpoints_that_cannot_be(self, guests: dict[str, int]) -> None:
        tee = SoftTee(clock=lambda: 0.0, random=bytes, built_in=examples.built_in())
        with pytest.raises(ValueError, match="FF-A endpoint"):
            FfaTee(tee, guests)


class TestRegister:
    @pytest.mark.feature("FF-A: the TEE works on memory that the virtio device knows by its FF-A handle alone")
    @requirement("DEV-FFA-1", "DEV-FFA-4")
    def test_the_tee_works_in_place_and_the_device_sees_nothing(self, vm: Vm) -> None:
        shared = vm.share(3)
        vm.bytes(shared)[:] = b"\x5a" * (3 * PAGE_SIZE)
        region = vm.region(shared)
        session = vm.guest.open_session(vm.context)
        assert vm.guest.invoke(vm.context, session, XOR, (INOUT, 100, 8000, region), (V_IN, 0xFF, 0, 0)).ret == 0
        assert bytes(vm.bytes(shared)) == b"\x5a" * 100 + b"\xa5" * 8000 + b"\x5a" * (3 * PAGE_SIZE - 8100)
        entry = vm.guest.device.epoch.regions.get(region)
        assert entry is not None
        assert (entry.memory.segments, entry.memory.ranges, entry.lease) == ((), (), None)
        for page in range(3):
            with pytest.raises(AccessFaultError):
                vm.ffa.machine.read(DEVICES, shared.address + page * PAGE_SIZE, 1)

    @requirement("DEV-FFA-4", "DEV-PAR-4")
    def test_bounds(self, vm: Vm) -> None:
        region = vm.region(vm.share())
        session = vm.guest.open_session(vm.context)
        for offset, size in ((1, PAGE_SIZE), (PAGE_SIZE, 1), (1 << 63, 1 << 63)):
            sent = vm.guest.invoke(vm.context, session, XOR, (INOUT, offset, size, region), (V_IN, 0, 0, 0))
            assert refused(sent, Status.BAD_RANGE)
        assert vm.guest.invoke(vm.context, session, XOR, (INOUT, PAGE_SIZE, 0, region), (V_IN, 0, 0, 0)).ret == 0

    @requirement("DEV-FFA-2", "DEV-FFA-6", "DEV-REQ-7")
    def test_what_is_refused(self, vms: list[Vm]) -> None:
        vm, other = vms
        mine, theirs, tagged, gone = vm.share(2), other.share(), vm.share(tag=7), vm.share()
        assert vm.reclaim(gone) is None
        used = other.region(theirs)
        for handle, tag in (
            (theirs.handle, 0),  # another VM's, which is even registered
            (gone.handle, 0),
            (0, 0),
            (12345, 0),
            ((1 << 64) - 1, (1 << 64) - 1),
            (tagged.handle, 0),
            (tagged.handle, 6),
            (mine.handle, 1),
        ):
            assert refused(vm.register(handle, tag=tag), Status.NOT_FOUND), (handle, tag)
        for size in (0, 1, PAGE_SIZE, 2 * PAGE_SIZE - 1, 2 * PAGE_SIZE + 1, 3 * PAGE_SIZE, (1 << 64) - 1):
            assert refused(vm.register(mine.handle, size), Status.BAD_RANGE), size
        assert refused(vm.register(mine.handle, 2 * PAGE_SIZE, flags=2), Status.MALFORMED)
        assert refused(vm.register(mine.handle, 2 * PAGE_SIZE, context=999), Status.NO_CONTEXT)
        assert not any(held(vm.ffa, shared) for shared in (mine, tagged))
        assert not len(vm.guest.device.epoch.regions)
        assert vm.region(tagged, tag=7)
        assert vm.region(mine)
        assert other.guest.unregister(other.context, used).ret == 0

    @requirement("DEV-FFA-2", "DEV-FFA-6")
    def test_memory_of_its_devices_own(self, vm: Vm) -> None:
        """The device's endpoint has shared memory itself: messages, which are nothing that a guest could name."""
        vm.guest.open_session(vm.context)
        own = [h for h, r in vm.ffa.spmc.transactions.regions.items() if r.descriptor.sender >= DEVICES]
        assert own
        assert all(refused(vm.register(handle), Status.NOT_FOUND) for handle in own)

    @requirement("DEV-FFA-2")
    def test_twice(self, vm: Vm) -> None:
        shared, other = vm.share(), vm.guest.open_context()
        region = vm.region(shared)
        for context in (vm.context, other):
            assert refused(vm.register(shared.handle, context=context), Status.IN_USE)
        assert held(vm.ffa, shared)
        assert vm.guest.unregister(vm.context, region).ret == 0
        assert vm.region(shared, context=other) != 0

    @pytest.mark.parametrize("call", [Call.MEM_LEND, Call.MEM_DONATE])
    @requirement("DEV-FFA-2")
    def test_what_was_not_shared(self, vm: Vm, call: Call) -> None:
        address = vm.vm.address + BUFFERS + PAGE_SIZE * 100
        given = permissions(Data.RW) if call is Call.MEM_LEND else 0
        transaction = abi.Transaction(1, (abi.Receiver(PARTITION, given),), 0)
        answer = vm.vm.endpoint.send_memory(call, transaction, [(address, 1)])
        assert answer.ok
        shared = Shared(answer[2], address, 1)
        vm.shared.append(shared)
        assert refused(vm.register(shared.handle), Status.NOT_FOUND)

    @requirement("DEV-FFA-2")
    def test_shared_with_another(self, vm: Vm) -> None:
        """With another VM, that is: the TEE is no receiver."""
        address = vm.vm.address + BUFFERS + PAGE_SIZE * 100
        transaction = abi.Transaction(1, (abi.Receiver(2, permissions(Data.RW)),), ATTRIBUTES_NORMAL)
        answer = vm.vm.endpoint.send_memory(Call.MEM_SHARE, transaction, [(address, 1)])
        assert answer.ok
        vm.shared.append(Shared(answer[2] | answer[3] << 32, address, 1))
        assert refused(vm.register(vm.shared[0].handle), Status.NOT_FOUND)

    @requirement("DEV-FFA-7")
    def test_read_only(self, vm: Vm) -> None:
        session = vm.guest.open_session(vm.context)
        weak, strong = vm.share(read_only=True), vm.share()
        assert refused(vm.register(weak.handle), Status.DENIED)
        assert not held(vm.ffa, weak)
        for shared in (weak, strong):
            region = vm.region(shared, flags=RegionFlag.READ_ONLY)
            state = vm.ffa.machine.state(shared.address // PAGE_SIZE)
            assert state is not None
            assert state.of(PARTITION) is Access.R
            sent = vm.guest.invoke(vm.context, session, XOR, (INOUT, 0, 8, region), (V_IN, 0, 0, 0))
            assert refused(sent, Status.BAD_RANGE)

    @requirement("DEV-FFA-3", "DEV-MEM-3")
    def test_limits(self, machine: FfaBench) -> None:
        guest = machine.guest(ffa_vm=1, features=WITH_HANDLES, limits=Limits(max_regions=3, max_region_bytes=PAGE_SIZE))
        vm = Vm(guest, machine.tee.vms["vm0"], machine.tee)
        regions = [vm.region(vm.share(4)) for _ in range(2)]
        by_address = guest.region(vm.context, size=PAGE_SIZE)  # as many bytes as there may be
        assert guest.device.epoch.region_bytes == PAGE_SIZE
        assert refused(vm.register(vm.share().handle), Status.LIMIT)
        assert not held(vm.ffa, vm.shared[-1])
        for region in (*regions, by_address):
            assert guest.unregister(vm.context, region).ret == 0
        assert guest.device.epoch.region_bytes == 0
        vm.end()

    def test_memory_for_an_rpc(self, vm: Vm) -> None:
        """A guest can answer SHM_ALLOC with it: the host's supplicant path sees no byte of a TA either."""
        package = b"no package, but bytes enough"
        vm.guest.open(vm.context, UUID(int=77))
        seen = vm.guest.event(RpcCommand.LOAD_TA)
        vm.guest.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], len(package), seen.params[1][3])])
        asked = vm.guest.event(RpcCommand.SHM_ALLOC)
        shared = vm.share()
        region = vm.region(shared)
        size = asked.params[0][2]
        assert vm.guest.reply(asked.rpc, 0, [(INOUT, 0, size, region)]).status == Status.OK
        seen = vm.guest.event(RpcCommand.LOAD_TA)
        assert seen.params[1][3] == region
        waits = vm.guest.unregister(vm.context, region)
        assert not waits.done
        assert vm.reclaim(shared) is Error.DENIED
        vm.bytes(shared)[: len(package)] = package
        vm.guest.reply(seen.rpc, 0, [seen.params[0], (*seen.params[1][:2], len(package), region)])
        assert waits.ret == 0
        assert vm.reclaim(shared) is None


class TestEnd:
    @requirement("DEV-FFA-8")
    def test_reclaim_while_it_is_registered(self, vm: Vm) -> None:
        shared = vm.share()
        region = vm.region(shared)
        assert vm.reclaim(shared) is Error.DENIED
        session = vm.guest.open_session(vm.context)
        assert vm.guest.invoke(vm.context, session, XOR, (INOUT, 0, 8, region), (V_IN, 1, 0, 0)).ret == 0
        assert vm.guest.unregister(vm.context, region).ret == 0
        assert not held(vm.ffa, shared)
        assert vm.reclaim(shared) is None

    @requirement("DEV-FFA-8", "DEV-MEM-9")
    def test_unregister_while_a_call_uses_it(self, vm: Vm) -> None:
        shared = vm.share()
        region = vm.region(shared)
        session = vm.guest.open_session(vm.context)
        vm.bytes(shared)[0] = 7
        call = vm.guest.invoke(vm.context, session, HOLD, (INOUT, 0, 8, region), (V_INOUT, 500, 0, 0))
        waits = vm.guest.unregister(vm.context, region)
        assert held(vm.ffa, shared)
        assert not call.done
        assert not waits.done
        vm.bytes(shared)[0] = 9  # the TEE sees it: this is no copy
        vm.guest.bench.pass_time(1)
        assert call.ret == 0
        assert call.params(2)[1][1:3] == (7, 9)
        assert waits.ret == 0
        assert not held(vm.ffa, shared)

    @requirement("DEV-FFA-8")
    @pytest.mark.parametrize("how", ["context", "reset", "disconnect"])
    def test_all_is_relinquished(self, vm: Vm, how: str) -> None:
        regions = [vm.share(), vm.share(5), vm.share(read_only=True)]
        for shared in regions[:2]:
            vm.region(shared)
        vm.region(regions[2], flags=RegionFlag.READ_ONLY)
        session = vm.guest.open_session(vm.context)
        call = vm.guest.wait(vm.context, session)
        assert not call.done
        if how == "context":
            assert vm.guest.close_context(vm.context).ret == 0
        elif how == "reset":
            vm.guest.reset()
            vm.guest.bench.turn()
            vm.guest.start(4)
        else:
            vm.guest.disconnect()
            vm.guest.bench.turn()
        assert not any(held(vm.ffa, shared) for shared in regions)
        for shared in regions:
            assert vm.reclaim(shared) is None

    @requirement("DEV-FFA-8", "DEV-INI-1")
    def test_the_next_life_can_register_it_again(self, vm: Vm) -> None:
        shared = vm.share()
        old = vm.region(shared)
        vm.guest.reset()
        vm.guest.start(4)
        vm.guest.bench.turn()
        vm.context = vm.guest.open_context()
        session = vm.guest.open_session(vm.context)
        sent = vm.guest.invoke(vm.context, session, XOR, (INOUT, 0, 8, old), (V_IN, 0, 0, 0))
        assert refused(sent, Status.NO_REGION)
        region = vm.region(shared)
        assert vm.guest.invoke(vm.context, session, XOR, (INOUT, 0, 8, region), (V_IN, 0, 0, 0)).ret == 0

    @pytest.mark.fault("guest-dies")
    def test_a_guest_that_leaves_while_it_is_being_registered(self, vm: Vm) -> None:
        shared = vm.share()
        tee = vm.ffa
        kept, start = [], tee.start
        tee.start = kept.append  # type: ignore[method-assign]
        vm.register(shared.handle)
        tee.start = start  # type: ignore[method-assign]
        vm.guest.disconnect()
        for call in kept:
            tee.start(call)
        vm.guest.bench.turn()
        assert not held(tee, shared)
        assert vm.reclaim(shared) is None


class TestProxy:
    """What a VM could do to the partition by itself."""

    def test_a_vm_that_speaks_for_nobody(self, machine: FfaBench) -> None:
        """vm2's device has no endpoint to speak for; a guest's own endpoint neither."""
        partition = machine.tee.partition
        assert set(partition.proxies) == {DEVICES, DEVICES + 1}
        assert partition.proxies[DEVICES] == {1}

    def test_a_guest_that_also_talks_to_optee(self, vm: Vm) -> None:
        """What its device has registered it cannot take away, nor use twice."""
        shared = vm.share()
        vm.region(shared)
        endpoint: Endpoint = vm.vm.endpoint
        ids, handle = 1 << 16 | PARTITION, (shared.handle & 0xFFFF_FFFF, shared.handle >> 32)
        answer = endpoint.call(Call.MSG_SEND_DIRECT_REQ, ids, 0, 3, *handle)
        assert answer[3] == Result.ITEM_NOT_FOUND
        answer = endpoint.call(Call.MSG_SEND_DIRECT_REQ, ids, 0, 0x8000_0000, *handle)
        assert answer[3] == Result.BAD_PARAMETERS
        assert held(vm.ffa, shared)


@pytest.mark.fault("quota")
@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_things(vms: list[Vm], seed: int) -> None:
    """Two guests share, register, use, end and reclaim, with handles of each other's and of nobody's: each has what it
    should, by an account of its own."""
    rng = random.Random(seed)
    ffa = vms[0].ffa
    registered: dict[int, tuple[Vm, int]] = {}  #: handle → who, region
    by_handle: dict[int, tuple[Vm, Shared]] = {}
    sessions = {vm.vm.endpoint.id: vm.guest.open_session(vm.context) for vm in vms}
    for _ in range(150):
        vm = rng.choice(vms)
        action = rng.choice(("share", "register", "register", "unregister", "reclaim", "use", "reset"))
        handles = [*by_handle, rng.getrandbits(8)]
        handle = rng.choice(handles)
        owner, shared = by_handle.get(handle, (None, None))
        if action == "share":
            new = vm.share(rng.randrange(1, 4))
            by_handle[new.handle] = vm, new
        elif action == "register":
            size = shared.pages * PAGE_SIZE if shared is not None else PAGE_SIZE
            wrong = rng.random() < 0.2
            sent = vm.register(handle, size + wrong * PAGE_SIZE)
            if owner is not vm:
                assert refused(sent, Status.NOT_FOUND)
            elif handle in registered:
                assert refused(sent, Status.IN_USE)
            elif wrong:
                assert refused(sent, Status.BAD_RANGE)
            else:
                registered[handle] = vm, sent.response.ident()
                assert sent.ret == 0
        elif action == "unregister" and registered:
            handle = rng.choice(list(registered))
            vm, region = registered.pop(handle)
            assert vm.guest.unregister(vm.context, region).ret == 0
        elif action == "reclaim" and shared is not None:
            assert owner is not None
            error = owner.reclaim(shared)
            assert error is (Error.DENIED if handle in registered else None)
            if error is None:
                del by_handle[handle]
        elif action == "use" and registered:
            handle = rng.choice(list(registered))
            vm, region = registered[handle]
            shared = by_handle[handle][1]
            before = bytes(vm.bytes(shared))
            session = sessions[vm.vm.endpoint.id]
            sent = vm.guest.invoke(vm.context, session, XOR, (INOUT, 0, len(before), region), (V_IN, seed + 1, 0, 0))
            assert sent.ret == 0
            assert bytes(vm.bytes(shared)) == bytes(b ^ seed + 1 for b in before)
        elif action == "reset" and rng.random() < 0.2:
            vm.guest.reset()
            vm.guest.start(4)
            vm.guest.bench.turn()
            vm.context = vm.guest.open_context()
            sessions[vm.vm.endpoint.id] = vm.guest.open_session(vm.context)
            registered = {h: entry for h, entry in registered.items() if entry[0] is not vm}
        for handle, (one, piece) in by_handle.items():
            for page in range(piece.address // PAGE_SIZE, piece.address // PAGE_SIZE + piece.pages):
                state = ffa.machine.state(page)
                assert state is not None
                own = one.vm.endpoint.id
                assert (state.owner, state.handle) == (own, handle)
                allowed = {own: Access.RWX} | ({PARTITION: Access.RW} if handle in registered else {})
                assert dict(state.access) == allowed
