"""Memory transactions: what each does to pages, and which check answers first."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import pytest

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, halves
from ffa.abi.ids import VERSION_1_2, Call, Error, fid
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Access, AccessFaultError, Machine
from ffa.roles.profile import OPTEE_4_10, Profile
from ffa.roles.spmc import Spmc

from .conftest import RETRIEVED, Bench

SENDS = (Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE)
PAIRS = [(1, 0x8001), (1, 2), (3, 2), (2, 3), (3, 0x8002), (0x8001, 0x8002)]
"""Sender and receiver: VM to partition, VM to VM of other versions, partition to partition."""


def page_of(bench: Bench, id: int) -> int:
    return bench.pages(id)[0][0] // 0x1000


@pytest.mark.feature("FF-A: memory is shared, lent and donated between VMs and partitions of FF-A 1.0, 1.1 and 1.2")
@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
@pytest.mark.parametrize("call", SENDS, ids=lambda c: c.name)
def test_who_may_access_what_when(bench: Bench, call: Call, sender: int, receiver: int) -> None:
    page = page_of(bench, sender)
    state = bench.machine.state
    handle = bench.send(call, sender, receiver, count=5)
    assert bool(handle >> 63) is (sender < 0x8000 and receiver < 0x8000)
    assert state(page).owner == sender
    assert state(page).of(sender) == (Access.RWX if call is Call.MEM_SHARE else Access.NONE)
    assert state(page).of(receiver) == Access.NONE
    assert bench.retrieve(call, handle, sender, receiver, by=receiver).fid == RETRIEVED
    if call is Call.MEM_DONATE:
        assert (state(page).owner, state(page).access) == (receiver, ((receiver, Access.RWX),))
        assert bench.all[sender].reclaim(handle).error is Error.INVALID_PARAMETERS
        return
    assert state(page).owner == sender
    assert state(page).of(receiver) == Access.RW
    assert bench.all[sender].reclaim(handle).error is Error.DENIED
    assert bench.all[receiver].relinquish(handle).ok
    assert state(page).of(receiver) == Access.NONE
    assert bench.all[sender].reclaim(handle).ok
    assert state(page).access == ((sender, Access.RWX),)
    assert bench.all[sender].reclaim(handle).error is Error.INVALID_PARAMETERS


def test_bytes_are_shared_and_lent(bench: Bench) -> None:
    address = bench.pages(1)[0][0]
    bench.machine.write(1, address, b"seen")
    handle = bench.send(Call.MEM_SHARE, 1, 0x8001)
    with pytest.raises(AccessFaultError):
        bench.machine.read(0x8001, address, 4)
    bench.retrieve(Call.MEM_SHARE, handle, 1, 0x8001, by=0x8001)
    assert bench.machine.read(0x8001, address, 4) == b"seen"
    bench.machine.write(0x8001, address, b"back")
    assert bench.machine.read(1, address, 4) == b"back"
    bench.sps[0x8001].relinquish(handle)
    bench.vms[1].reclaim(handle)
    bench.send(Call.MEM_LEND, 1, 0x8001)
    with pytest.raises(AccessFaultError):
        bench.machine.read(1, address, 4)


def test_read_only_is_read_only(bench: Bench) -> None:
    address = bench.pages(1)[0][0]
    handle = bench.send(Call.MEM_LEND, 1, 0x8001, data=1)
    assert bench.retrieve(Call.MEM_LEND, handle, 1, 0x8001, by=0x8001, data=2).error is Error.DENIED
    assert bench.retrieve(Call.MEM_LEND, handle, 1, 0x8001, by=0x8001, data=1).fid == RETRIEVED
    assert bench.machine.read(0x8001, address, 1) == b"\0"
    with pytest.raises(AccessFaultError):
        bench.machine.write(0x8001, address, b"x")


def test_several_borrowers(bench: Bench) -> None:
    """Of both worlds: the SPMC gives the handle, and each manager serves its own."""
    receivers = (0x8001, 2, 0x8002)
    handle = bench.send(Call.MEM_SHARE, 1, *receivers, count=2)
    for by in receivers:
        assert bench.retrieve(Call.MEM_SHARE, handle, 1, *receivers, by=by).fid == RETRIEVED
        assert bench.retrieve(Call.MEM_SHARE, handle, 1, *receivers, by=by).error is Error.DENIED  # once
    assert {who for who, _ in bench.machine.state(page_of(bench, 1)).access} == {1, *receivers}
    for left in receivers:
        assert bench.vms[1].reclaim(handle).error is Error.DENIED
        assert bench.all[left].relinquish(handle).ok
    assert bench.vms[1].reclaim(handle).ok


def test_bypassing_the_list_of_borrowers(bench: Bench) -> None:
    handle = bench.send(Call.MEM_SHARE, 1, 0x8001, 0x8002)
    sp = bench.sps[0x8001]
    alone = abi.Transaction(1, (abi.Receiver(0x8001, 2),), handle=handle)
    assert sp.retrieve(alone)[0].error is Error.INVALID_PARAMETERS
    assert sp.retrieve(replace(alone, flags=1 << 10))[0].fid == RETRIEVED
    single = bench.send(Call.MEM_LEND, 2, 0x8001)
    bypass = abi.Transaction(2, (abi.Receiver(0x8001, 6),), handle=single, flags=1 << 10)
    assert sp.retrieve(bypass)[0].error is Error.INVALID_PARAMETERS


def test_what_a_receiver_is_told(bench: Bench) -> None:
    handle = bench.send(Call.MEM_SHARE, 3, 0x8001, count=3, tag=77)
    request = abi.Transaction(3, (abi.Receiver(0x8001, 2),), handle=handle, tag=77)
    answer, blob = bench.sps[0x8001].retrieve(request)
    assert answer[1] == answer[2] == len(blob)
    found = abi.parse(blob, VERSION_1_2)
    assert (found.sender, found.handle, found.tag, found.flags >> 3 & 3) == (3, handle, 77, 1)
    assert found.attributes == 0x2F | 1 << 6  # memory of the normal world: NS is set for a partition
    assert [(r.endpoint, r.permissions) for r in found.receivers] == [(0x8001, 2 | 1 << 2)]
    composite = abi.parse_composite(blob, found.receivers[0].composite)
    assert abi.parse_ranges(blob[composite.ranges :]) == bench.pages(3, 3)


@pytest.mark.parametrize(("sender", "receiver"), [(1, 0x8001), (3, 2), (1, 3)])
def test_in_fragments_both_ways(bench: Bench, sender: int, receiver: int) -> None:
    count = 1500
    handle = bench.send(Call.MEM_LEND, sender, receiver, count=count)
    request = abi.Transaction(sender, (abi.Receiver(receiver, 2 | 1 << 2),), handle=handle)
    first, blob = bench.all[receiver].retrieve(request)
    assert first[2] < first[1] == len(blob)
    version = bench.all[receiver].version
    found = abi.parse(blob, version)
    ranges = blob[abi.parse_composite(blob, found.receivers[0].composite).ranges :]
    assert abi.parse_ranges(ranges) == bench.pages(sender, count)
    assert bench.all[receiver].relinquish(handle).ok
    assert bench.all[sender].reclaim(handle).ok


def test_an_answer_is_read_to_its_end_before_it_is_relinquished(bench: Bench) -> None:
    handle = bench.send(Call.MEM_LEND, 1, 0x8001, count=1000)
    sp = bench.sps[0x8001]
    blob = abi.build(VERSION_1_2, abi.Transaction(1, (abi.Receiver(0x8001, 6),), handle=handle))
    sp.put(blob)
    answer = sp.call(Call.MEM_RETRIEVE_REQ, len(blob), len(blob))
    assert answer[2] == 4096
    assert sp.relinquish(handle).error is Error.INVALID_PARAMETERS
    assert sp.call(Call.MEM_FRAG_RX, *halves(handle), 4096).error is Error.BUSY  # RX is not released
    sp.call(Call.RX_RELEASE)
    assert sp.call(Call.MEM_FRAG_RX, *halves(handle), 0).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].reclaim(handle).error is Error.DENIED


def test_a_bad_fragment_ends_the_transaction(bench: Bench) -> None:
    vm = bench.vms[1]
    for to in (0x8001, 2):
        t = abi.Transaction(1, (abi.Receiver(to, 2),), 0x2F)
        blob = abi.build(VERSION_1_2, t, bench.pages(1, 4))
        vm.put(blob[:-32])
        answer = vm.call(Call.MEM_SHARE, len(blob), len(blob) - 32)
        assert (answer.fid, answer[3]) == (fid(Call.MEM_FRAG_RX), len(blob) - 32)
        handle = answer[1] | answer[2] << 32
        assert vm.reclaim(handle).error is Error.INVALID_PARAMETERS  # not sent to the end
        assert bench.retrieve(Call.MEM_SHARE, handle, 1, to, by=to).error is Error.INVALID_PARAMETERS
        assert bench.vms[2].call(Call.MEM_FRAG_TX, *halves(handle), 32).error is Error.INVALID_PARAMETERS  # of another
        vm.put(abi.pack_ranges([(bench.memory(2), 1), (bench.memory(2) + 0x1000, 1)]))
        assert vm.call(Call.MEM_FRAG_TX, *halves(handle), 32).error is Error.DENIED
        assert vm.call(Call.MEM_FRAG_TX, *halves(handle), 32).error is Error.INVALID_PARAMETERS
        assert bench.spmc.transactions.regions == bench.hypervisor.transactions.regions == {}
        assert bench.machine.state(page_of(bench, 1)).handle is None


def test_memory_is_cleared_when_asked(bench: Bench) -> None:
    address = bench.pages(1)[0][0]
    machine, vm, sp = bench.machine, bench.vms[1], bench.sps[0x8001]
    machine.write(1, address, b"secret")
    t = abi.Transaction(1, (abi.Receiver(0x8001, 2),), flags=1)
    handle = vm.send_memory(Call.MEM_LEND, t, bench.pages(1))[2]
    request = abi.Transaction(1, (abi.Receiver(0x8001, 6),), handle=handle, flags=1 | 4)
    assert sp.retrieve(request)[0].fid == RETRIEVED
    assert machine.read(0x8001, address, 6) == bytes(6)
    machine.write(0x8001, address, b"mine!!")
    assert sp.relinquish(handle).ok  # the request had asked for it to be cleared then
    assert vm.reclaim(handle).ok
    assert machine.read(1, address, 6) == bytes(6)
    machine.write(1, address, b"secret")
    handle = bench.send(Call.MEM_LEND, 1, 0x8001)
    assert vm.reclaim(handle, flags=1).ok
    assert machine.read(1, address, 6) == bytes(6)


@pytest.mark.parametrize("asks", [2, 0x8001])
@pytest.mark.parametrize("order", [(2, 0x8001), (0x8001, 2)])
def test_memory_of_both_worlds_is_cleared_under_nobody(bench: Bench, asks: int, order: tuple[int, int]) -> None:
    """Lent to a VM and a partition: whoever relinquishes first, with the ZERO flag, does not zero what the other works
    on; and the owner never sees what was written."""
    address, machine, both = bench.pages(1)[0][0], bench.machine, (2, 0x8001)
    handle = bench.send(Call.MEM_LEND, 1, *both)
    for borrower in both:
        assert bench.retrieve(Call.MEM_LEND, handle, 1, *both, by=borrower).fid == RETRIEVED
    machine.write(0x8001, address, b"secret")
    for borrower in order:
        assert machine.read(borrower, address, 6) == b"secret"
        assert bench.vms[1].reclaim(handle).error is Error.DENIED
        assert bench.all[borrower].relinquish(handle, flags=int(borrower == asks)).ok
    assert bench.vms[1].reclaim(handle).ok
    assert machine.read(1, address, 6) == bytes(6)


def test_memory_of_both_worlds_is_not_cleared_unasked(bench: Bench) -> None:
    address, machine, both = bench.pages(1)[0][0], bench.machine, (2, 0x8001)
    handle = bench.send(Call.MEM_LEND, 1, *both)
    for borrower in both:
        assert bench.retrieve(Call.MEM_LEND, handle, 1, *both, by=borrower).fid == RETRIEVED
    machine.write(2, address, b"for you")
    for borrower in both:
        assert bench.all[borrower].relinquish(handle).ok
    assert bench.vms[1].reclaim(handle).ok
    assert machine.read(1, address, 7) == b"for you"


def test_buffers_are_not_sent(bench: Bench) -> None:
    t = abi.Transaction(1, (abi.Receiver(0x8001, 2),), 0x2F)
    assert bench.vms[1].send_memory(Call.MEM_SHARE, t, [(bench.memory(1), 1)]).error is Error.DENIED


def test_what_is_sent_is_not_sent_again_nor_mapped(bench: Bench) -> None:
    for first, second in itertools.product(SENDS, SENDS):
        page = bench.pages(1, first=100)
        receivers = {c: (abi.Receiver(0x8001, 0 if c is Call.MEM_DONATE else 2),) for c in SENDS}
        attributes = {c: 0x2F if c is Call.MEM_SHARE else 0 for c in SENDS}
        vm = bench.vms[1]
        answer = vm.send_memory(first, abi.Transaction(1, receivers[first], attributes[first]), page)
        assert answer.ok
        again = vm.send_memory(second, abi.Transaction(1, receivers[second], attributes[second]), page)
        assert again.error is Error.DENIED
        assert vm.reclaim(answer[2]).ok


def test_a_descriptor_in_memory_other_than_tx(bench: Bench) -> None:
    vm, address = bench.vms[1], bench.memory(1) + 0x80_0000
    blob = abi.build(VERSION_1_2, abi.Transaction(1, (abi.Receiver(0x8001, 2),), 0x2F), bench.pages(1))
    bench.machine.write(1, address, blob)
    size = len(blob)
    assert vm.call(Call.MEM_SHARE, size, size, address + 8, 1).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.MEM_SHARE, size, size, address, 0).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.MEM_SHARE, size, size, bench.memory(2), 1).error is Error.INVALID_PARAMETERS  # another's
    assert vm.call(Call.MEM_SHARE, size, size, 0, 1).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.MEM_SHARE, size, size, address, 1).ok


# -- which check answers first


def alone(**choices: object) -> Endpoint:
    """A VM on a hypervisor alone, with another VM and device memory."""
    machine = Machine()
    hypervisor = Hypervisor(machine, profile=Profile(**choices))  # type: ignore[arg-type]
    vm, other = Endpoint(1, machine), Endpoint(2, machine)
    for endpoint in (vm, other):
        hypervisor.add(endpoint)
        machine.add(endpoint.id, endpoint.id * 0x1000_0000, 256)
    machine.add(1, 0x5000_0000, 16, device=True)
    machine.add(1, 0x6000_0000, 16, secure=True)
    assert vm.map_buffers(0x1000_0000, 0x1000_1000).ok
    return vm


class Faulty:
    """An FFA_MEM_SHARE, made wrong in one place or in several."""

    def __init__(self) -> None:
        self.transaction = abi.Transaction(1, (abi.Receiver(2, 2),), 0x2F)
        self.ranges: list[abi.AddressRange] = [(0x1001_0000, 2), (0x1002_0000, 1)]
        self.more = 0  #: added to the total length
        self.fragment = 0  #: added to the fragment's length
        self.address = 0
        self.bytes: dict[int, int] = {}

    def set(self, **fields: object) -> None:
        self.transaction = replace(self.transaction, **fields)  # type: ignore[arg-type]

    def receiver(self, **fields: object) -> None:
        self.set(receivers=(replace(self.transaction.receivers[0], **fields),))  # type: ignore[arg-type]

    def call(self, vm: Endpoint) -> Frame:
        blob = bytearray(abi.build(VERSION_1_2, self.transaction, self.ranges))
        for at, value in self.bytes.items():
            blob[at] = value
        vm.put(bytes(blob[:4096]))
        size = len(blob)
        return vm.call(Call.MEM_SHARE, size + self.more, size + self.fragment, self.address, smc64=True)


COMPOSITE = 48 + 32
INVALID, DENIED = Error.INVALID_PARAMETERS, Error.DENIED

ORDER: list[tuple[str, Error, Callable[[Faulty], None]]] = [
    ("a buffer's address", Error.NOT_SUPPORTED, lambda f: setattr(f, "address", 0x1003_0000)),
    ("fragment longer than the total", INVALID, lambda f: setattr(f, "more", -16)),
    ("descriptor longer than TX", INVALID, lambda f: f.ranges.extend([(0x1002_0000, 1)] * 300)),
    ("reserved bytes in the header", INVALID, lambda f: f.bytes.update({40: 1})),
    ("entry size", INVALID, lambda f: f.bytes.update({24: 8})),
    ("NS attribute", INVALID, lambda f: f.set(attributes=0x6F)),
    ("attributes", DENIED, lambda f: f.set(attributes=0x2B)),
    ("no receiver", INVALID, lambda f: f.set(receivers=())),
    ("sender", DENIED, lambda f: f.set(sender=2)),
    ("receiver", INVALID, lambda f: f.receiver(endpoint=9)),
    ("handle", INVALID, lambda f: f.set(handle=5)),
    ("clear flag", INVALID, lambda f: f.set(flags=1)),
    ("permissions", INVALID, lambda f: f.receiver(permissions=3)),
    ("composite offset", INVALID, lambda f: f.bytes.update({52: 0x58})),
    ("page count 0", INVALID, lambda f: f.bytes.update({COMPOSITE: 0})),
    ("quota", Error.NO_MEMORY, lambda f: f.bytes.update({COMPOSITE + 1: 0x10})),
    ("unaligned range", INVALID, lambda f: f.ranges.__setitem__(0, (0x1001_0800, 2))),
    ("sum of pages", INVALID, lambda f: f.bytes.update({COMPOSITE: 4})),
    ("no memory there", DENIED, lambda f: f.ranges.__setitem__(1, (0x4000_0000, 1))),
]
"""Faults in the order in which they are found: Xen's, with what Xen does not check where it belongs."""


def profile() -> Endpoint:
    return alone(dynamic_buffers=False, max_pages=1000)


def test_without_a_fault_it_is_shared() -> None:
    assert Faulty().call(profile()).ok


@pytest.mark.parametrize(("name", "code", "break_it"), ORDER, ids=[name for name, *_ in ORDER])
def test_each_fault_has_its_code_and_changes_nothing(
    name: str, code: Error, break_it: Callable[[Faulty], None]
) -> None:
    vm, faulty = profile(), Faulty()
    break_it(faulty)
    before = dict(vm.machine.states)
    assert faulty.call(vm).error is code
    assert vm.machine.states == before
    assert Faulty().call(vm).ok


NOT_TOGETHER = {("NS attribute", "attributes"), ("page count 0", "quota")}
"""Faults that are two values of one field."""
NEED_A_RECEIVER = {"receiver", "permissions"}
DIFFERENT = [
    (first, second)
    for first, second in itertools.combinations(ORDER, 2)
    if first[1] is not second[1]
    and (first[0], second[0]) not in NOT_TOGETHER
    and not (first[0] == "no receiver" and second[0] in NEED_A_RECEIVER)
]


@pytest.mark.parametrize(("first", "second"), DIFFERENT, ids=[f"{a[0]}, {b[0]}" for a, b in DIFFERENT])
def test_the_first_of_two_faults_answers(
    first: tuple[str, Error, Callable[[Faulty], None]], second: tuple[str, Error, Callable[[Faulty], None]]
) -> None:
    faulty = Faulty()
    first[2](faulty)
    second[2](faulty)
    assert faulty.call(profile()).error is first[1]


def test_no_buffers_is_denied() -> None:
    machine = Machine()
    vm = Endpoint(1, machine)
    Hypervisor(machine).add(vm)
    assert vm.call(Call.MEM_SHARE, 112, 112).error is Error.DENIED


def test_a_fragment_longer_than_tx_does_not_succeed() -> None:
    """In Xen it did, with handle 0."""
    vm = alone()
    vm.put(abi.build(VERSION_1_2, abi.Transaction(1, (abi.Receiver(2, 2),), 0x2F), [(0x1001_0000, 1)]))
    assert vm.call(Call.MEM_SHARE, 8192, 8192).error is Error.INVALID_PARAMETERS


@pytest.mark.parametrize(
    ("ranges", "code"),
    [
        ([(0x1001_0000, 2), (0x1001_1000, 1)], INVALID),  # a page twice
        ([(0x1001_0000, 1), (0x1001_0000, 1)], INVALID),
        ([(0x100F_F000, 2)], DENIED),  # beyond the end
        ([(0x2000_0000, 1)], DENIED),  # another's
        ([(0x5000_0000, 1)], DENIED),  # a device
        ([(0x6000_0000, 1)], DENIED),  # secure memory
        ([(0xFFFF_FFFF_FFFF_F000, 1)], DENIED),
    ],
)
def test_ranges_that_cannot_be_sent(ranges: list[abi.AddressRange], code: Error) -> None:
    faulty = Faulty()
    faulty.ranges = ranges
    assert faulty.call(alone()).error is code


def test_a_huge_page_count_costs_nothing() -> None:
    faulty = Faulty()
    faulty.ranges = [(0x1000_0000, 0xFFFF_FFFF)]
    assert faulty.call(alone()).error is Error.NO_MEMORY  # over quota
    assert faulty.call(alone(max_pages=1 << 40)).error is Error.DENIED


def test_quota_of_regions() -> None:
    vm = alone(max_regions=2)
    handles = []
    for n in range(2):
        faulty = Faulty()
        faulty.ranges = [(0x1001_0000 + n * 0x1000, 1)]
        handles.append(faulty.call(vm)[2:4])
    faulty.ranges = [(0x1002_0000, 1)]
    assert faulty.call(vm).error is Error.NO_MEMORY
    assert vm.call(Call.MEM_RECLAIM, *handles[0]).ok
    assert faulty.call(vm).ok


RETRIEVE_FAULTS: list[tuple[str, Error, dict[str, object]]] = [
    ("handle", INVALID, {"handle": 0x99}),
    ("sender", DENIED, {"sender": 2}),
    ("type", INVALID, {"flags": 1 << 3}),
    ("tag", INVALID, {"tag": 4}),
    ("hint valid", INVALID, {"flags": 1 << 9}),
    ("hint", INVALID, {"flags": 1 << 5}),
    ("reserved flag", INVALID, {"flags": 1 << 11}),
    ("clear that the sender did not ask for", DENIED, {"flags": 1}),
    ("NS", INVALID, {"attributes": 0x6F}),
    ("attributes", DENIED, {"attributes": 0x2B}),
    ("nobody", INVALID, {"receivers": ()}),
    ("another", DENIED, {"receivers": (abi.Receiver(0x8002, 6),)}),
    ("two", INVALID, {"receivers": (abi.Receiver(0x8001, 6), abi.Receiver(0x8002, 6))}),
    ("reserved data access", DENIED, {"receivers": (abi.Receiver(0x8001, 7),)}),
    ("no instruction access", INVALID, {"receivers": (abi.Receiver(0x8001, 2),)}),
    ("impdef", INVALID, {"receivers": (abi.Receiver(0x8001, 6, impdef=(1, 0)),)}),
]


@pytest.mark.parametrize(("name", "code", "fields"), RETRIEVE_FAULTS, ids=[name for name, *_ in RETRIEVE_FAULTS])
def test_retrieve_faults(bench: Bench, name: str, code: Error, fields: dict[str, object]) -> None:
    handle = bench.send(Call.MEM_LEND, 1, 0x8001)
    right = abi.Transaction(1, (abi.Receiver(0x8001, 6),), handle=handle)
    sp = bench.sps[0x8001]
    assert sp.retrieve(replace(right, **fields))[0].error is code  # type: ignore[arg-type]
    assert bench.machine.state(page_of(bench, 1)).of(0x8001) is Access.NONE
    assert sp.retrieve(right)[0].fid == RETRIEVED


def test_implementation_defined_words_are_to_be_equal(bench: Bench) -> None:
    t = abi.Transaction(1, (abi.Receiver(0x8001, 2, impdef=(5, 6)),))
    handle = bench.vms[1].send_memory(Call.MEM_LEND, t, bench.pages(1))[2]
    for impdef, ok in (((5, 7), False), ((5, 6), True)):
        request = abi.Transaction(1, (abi.Receiver(0x8001, 6, impdef=impdef),), handle=handle)
        assert (bench.sps[0x8001].retrieve(request)[0].fid == RETRIEVED) is ok


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (abi.build_relinquish(0x99, 0x8001), INVALID),
        (abi.build_relinquish(1, 0x8002), INVALID),
        (abi.build_relinquish(1, 0x8001, 0x8002), INVALID),
        (abi.build_relinquish(1), INVALID),
        (abi.build_relinquish(1, 0x8001, flags=1), INVALID),  # shared memory is not cleared
        (abi.build_relinquish(1, 0x8001, flags=4), INVALID),
        (abi.build_relinquish(1)[:12] + b"\xff\xff\xff\xff", INVALID),
    ],
)
def test_relinquish_faults(bench: Bench, data: bytes, code: Error) -> None:
    handle = bench.send(Call.MEM_SHARE, 1, 0x8001)
    assert handle == 1
    bench.retrieve(Call.MEM_SHARE, handle, 1, 0x8001, by=0x8001)
    sp = bench.sps[0x8001]
    sp.put(data)
    assert sp.call(Call.MEM_RELINQUISH).error is code
    assert sp.relinquish(handle).ok
    assert sp.relinquish(handle).error is Error.INVALID_PARAMETERS


def test_reclaim_faults(bench: Bench) -> None:
    handle = bench.send(Call.MEM_SHARE, 1, 0x8001)
    assert bench.vms[2].reclaim(handle).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].reclaim(handle, flags=4).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].call(Call.MEM_RECLAIM, handle, 0, 0, 1).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].reclaim(1 << 63 | handle).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].reclaim(handle).ok


def test_the_hypervisor_looks_at_what_a_vm_sent(bench: Bench) -> None:
    handle = bench.send(Call.MEM_SHARE, 1, 0x8001, count=2)
    answer, blob = bench.hypervisor.port.retrieve(abi.Transaction(1, (), handle=handle))
    assert answer.fid == RETRIEVED
    assert abi.parse_ranges(blob[-32:]) == bench.pages(1, 2)
    assert bench.vms[1].reclaim(handle).ok  # it has taken nothing


def test_a_partition_shares_normal_memory_with_a_vm(bench: Bench) -> None:
    bench.machine.add(0x8001, 0x9000_0000, 4)
    sp, vm = bench.sps[0x8001], bench.vms[2]
    t = abi.Transaction(0x8001, (abi.Receiver(2, 2),), 0x2F)
    handle = sp.send_memory(Call.MEM_SHARE, t, [(0x9000_0000, 2)])[2]
    answer, blob = vm.retrieve(abi.Transaction(0x8001, (abi.Receiver(2, 2),), handle=handle))
    assert answer.fid == RETRIEVED
    assert abi.parse_ranges(blob[-16:]) == [(0x9000_0000, 2)]
    assert sp.reclaim(handle).error is Error.DENIED
    assert vm.relinquish(handle).ok
    assert sp.reclaim(handle).ok
    secure = sp.send_memory(Call.MEM_SHARE, t, bench.pages(0x8001))
    assert secure.error is Error.DENIED


def test_65536_scattered_pages(bench: Bench) -> None:
    machine = Machine()
    spmc = Spmc(machine)
    spmc.add(Endpoint(0x8001, machine))
    vm = Endpoint(1, machine)
    Hypervisor(machine, spmc).add(vm)
    machine.add(1, 0x4000_0000, 1 << 18)
    vm.map_buffers(0x4000_0000, 0x4010_0000, 16)
    ranges = [(0x4100_0000 + n * 0x2000, 1) for n in range(1 << 16)]
    answer = vm.send_memory(Call.MEM_SHARE, abi.Transaction(1, (abi.Receiver(0x8001, 2),), 0x2F), ranges)
    assert answer.ok
    assert len(machine.states) >= 1 << 16
    assert vm.reclaim(answer[2]).ok


def test_a_hypervisor_on_op_tee() -> None:
    """Which knows nothing of VMs' pages, has no FFA_RX_ACQUIRE, and takes memory without FFA_MEM_RETRIEVE_REQ."""
    machine = Machine()
    spmc = Spmc(machine, OPTEE_4_10)
    spmc.add(Endpoint(0x8001, machine))
    hypervisor, vm = Hypervisor(machine, spmc), Endpoint(1, machine)
    hypervisor.add(vm)
    machine.add(1, 0x4000_0000, 4096)
    assert not hypervisor.maps_below
    assert vm.map_buffers(0x4000_0000, 0x4000_1000).ok
    t = abi.Transaction(1, (abi.Receiver(0x8001, 2),), 0x2F)
    ranges = [(0x4010_0000 + n * 0x2000, 1) for n in range(1000)]
    handle = vm.send_memory(Call.MEM_SHARE, t, ranges)[2]
    assert vm.send_memory(Call.MEM_SHARE, t, ranges[:1]).error is Error.DENIED  # the hypervisor does know
    region = spmc.transactions.find(handle)
    spmc.transactions.lend(region, 0x8001, 0)
    assert machine.state(0x40100).of(0x8001) is Access.RW
    assert vm.reclaim(handle).error is Error.DENIED
    spmc.transactions.let_go(region, 0x8001)
    assert machine.state(0x40100).of(0x8001) is Access.NONE
    assert vm.reclaim(handle).ok
    assert vm.call(Call.MEM_LEND, 112, 112).error is Error.INVALID_PARAMETERS  # the hypervisor has it, and TX is empty
    lend = abi.Transaction(1, (abi.Receiver(0x8001, 2),))
    assert vm.send_memory(Call.MEM_LEND, lend, ranges[:1]).error is Error.NOT_SUPPORTED  # what OP-TEE says
    assert machine.state(0x40100).handle is None


def test_a_relayer_that_asks_for_ever_is_not_answered_for_ever() -> None:
    class Stuck:
        calls = 0

        def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
            self.calls += 1
            if frame.fid & 0xFF == Call.RXTX_MAP:
                return Frame.success()
            if frame.fid & 0xFF == Call.MEM_RETRIEVE_REQ:
                return Frame.of(Call.MEM_RETRIEVE_RESP, 0xFFFF_FFFF, 0xFFFF_FFFF)
            return Frame.of(Call.MEM_FRAG_TX if frame.fid & 0xFF == Call.MEM_FRAG_RX else Call.MEM_FRAG_RX, 1, 0, 0)

    machine, stuck = Machine(), Stuck()
    vm = Endpoint(1, machine)
    vm.relayer = stuck
    machine.add(1, 0x4000_0000, 4096)
    vm.map_buffers(0x4000_0000, 0x4000_1000)
    t = abi.Transaction(1, (abi.Receiver(2, 2),), 0x2F)
    ranges = [(0x4010_0000 + n * 0x2000, 1) for n in range(1000)]
    assert vm.send_memory(Call.MEM_SHARE, t, ranges).fid == fid(Call.MEM_FRAG_RX)
    assert len(vm.retrieve(t)[1]) == 4096
    assert stuck.calls < 10


def test_a_vm_whose_rx_is_full_below_retrieves_nothing(bench: Bench) -> None:
    bench.machine.add(0x8001, 0x9000_0000, 4)
    t = abi.Transaction(0x8001, (abi.Receiver(2, 2),), 0x2F)
    handle = bench.sps[0x8001].send_memory(Call.MEM_SHARE, t, [(0x9000_0000, 1)])[2]
    assert bench.hypervisor.port.call(Call.RX_ACQUIRE, 2).ok
    request = abi.Transaction(0x8001, (abi.Receiver(2, 2),), handle=handle)
    assert bench.vms[2].retrieve(request)[0].error is Error.BUSY
    assert bench.machine.state(0x90000).of(2) is Access.NONE
    assert bench.vms[2].call(Call.RX_RELEASE).ok
    assert bench.vms[2].retrieve(request)[0].fid == RETRIEVED
