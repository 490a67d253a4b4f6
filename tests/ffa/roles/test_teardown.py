"""VMs that come and go: partitions are told, and everything is taken back."""

from __future__ import annotations

import pytest

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.abi.ids import DIRECT_FRAMEWORK_BIT, Call, Error, FrameworkMessage, Property, fid
from ffa.roles.endpoint import DEFAULT_PROPERTIES, Endpoint, respond
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine, exclusive
from ffa.roles.spmc import Spmc
from tests.ffa.roles.conftest import RETRIEVED, Bench

SHARE, LEND = Call.MEM_SHARE, Call.MEM_LEND
CREATED, DESTROYED = FrameworkMessage.VM_CREATED, FrameworkMessage.VM_DESTROYED


class Listener(Endpoint):
    """A partition that wants to know of VMs; ``answers`` are the statuses that it gives, 0 where there is none."""

    def __init__(self, machine: Machine, wants: int) -> None:
        super().__init__(0x8001, machine, properties=sum(DEFAULT_PROPERTIES) | wants)
        self.heard: list[tuple[int, int]] = []
        self.answers: list[int | Frame] = []

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        if not frame[2] & DIRECT_FRAMEWORK_BIT:
            return super().receive(frame, vcpu)
        self.heard.append((frame[2] & 0xFF, frame[5]))
        answer = self.answers.pop(0) if self.answers else 0
        if isinstance(answer, Frame):
            return answer
        told = respond(frame, answer & 0xFFFF_FFFF)
        return Frame(*told[:2], frame[2] + 1, *told[3:])


def listening(wants: int = Property.VM_CREATED | Property.VM_DESTROYED) -> tuple[Listener, Hypervisor, Machine]:
    machine = Machine()
    spmc = Spmc(machine)
    listener = Listener(machine, wants)
    spmc.add(listener)
    machine.add(listener.id, 0x0E00_0000, 16, secure=True)
    listener.map_buffers(0x0E00_0000, 0x0E00_1000)
    return listener, Hypervisor(machine, spmc), machine


@pytest.mark.feature("FF-A: a VM that dies leaves nothing, whatever it had shared, borrowed, bound or begun")
def test_everything_is_taken_back(bench: Bench) -> None:
    sp, vm, other, machine = bench.sps[0x8001], bench.vms[1], bench.vms[2], bench.machine
    base = bench.memory(1)
    machine.write(1, base + 0x8000, b"secret")
    to_sp = bench.send(SHARE, 1, 0x8001)
    assert bench.retrieve(SHARE, to_sp, 1, 0x8001, by=0x8001).fid == RETRIEVED
    answer = vm.send_memory(LEND, abi.Transaction(1, (abi.Receiver(2, 2),)), bench.pages(1, first=10))
    to_other = answer[2] | answer[3] << 32
    assert bench.retrieve(LEND, to_other, 1, 2, by=2).fid == RETRIEVED
    never = abi.build(vm.version, abi.Transaction(1, (abi.Receiver(0x8001, 2),), 0x2F), bench.pages(1, 4, 20))
    vm.put(never[:-16])
    assert vm.call(SHARE, len(never), len(never) - 16, smc64=True).fid == fid(Call.MEM_FRAG_RX)
    from_other = bench.send(SHARE, 2, 1, count=2)
    assert bench.retrieve(SHARE, from_other, 2, 1, by=1).fid == RETRIEVED
    machine.add(0x8002, 0x3000_0000, 4)  # of the normal world: a VM can borrow nothing else
    t = abi.Transaction(0x8002, (abi.Receiver(1, 2),), 0x2F)
    from_sp = bench.sps[0x8002].send_memory(SHARE, t, [(0x3000_0000, 1)])[2]
    assert bench.retrieve(SHARE, from_sp, 0x8002, 1, by=1).fid == RETRIEVED
    assert vm.call(Call.NOTIFICATION_BIND, 0x8001 << 16 | 1, 0, 5).ok
    assert sp.call(Call.NOTIFICATION_SET, 0x8001 << 16 | 1, 0, 4).ok

    assert bench.hypervisor.remove(1) is False  # the partition has some of it, and VM 2
    for call in (Call.ID_GET, Call.RXTX_UNMAP, Call.NOTIFICATION_GET):
        assert vm.call(call).error is Error.NOT_SUPPORTED
    assert vm.reclaim(to_sp).error is Error.NOT_SUPPORTED
    with pytest.raises(ValueError, match="being removed"):
        bench.hypervisor.add(Endpoint(1, machine))
    assert other.reclaim(from_other).ok
    assert bench.sps[0x8002].reclaim(from_sp).ok
    assert sp.relinquish(to_sp).ok
    assert bench.hypervisor.remove(1) is False
    assert other.relinquish(to_other).ok
    assert bench.hypervisor.remove(1) is True

    for manager in (bench.hypervisor, bench.spmc):
        assert manager.transactions.regions == {}
    assert 1 not in bench.spmc.vms
    assert 1 not in bench.spmc.vm_buffers
    first = base // 0x1000
    assert machine.states_of(range(first, first + (1 << 16))) == {exclusive(0)}
    assert machine.fetch(base + 0x8000, 6) == bytes(6)
    with pytest.raises(ValueError, match="no VM"):
        bench.hypervisor.remove(1)
    again = Endpoint(1, machine)
    bench.hypervisor.add(again)
    assert again.call(Call.ID_GET)[2] == 1
    assert bench.retrieve(SHARE, to_sp, 1, 0x8001, by=0x8001).error is Error.INVALID_PARAMETERS


def test_what_a_vm_was_reading(bench: Bench) -> None:
    """Fragments of a retrieve response that the VM had not read."""
    ranges = [(bench.memory(2) + 0x10_0000 + 0x2000 * n, 1) for n in range(400)]
    t = abi.Transaction(2, (abi.Receiver(1, 2),), 0x2F)
    answer = bench.vms[2].send_memory(SHARE, t, ranges)
    handle = answer[2] | answer[3] << 32
    vm = bench.vms[1]
    vm.put(abi.build(vm.version, abi.Transaction(2, (abi.Receiver(1, 2),), handle=handle)))
    size = len(abi.build(vm.version, abi.Transaction(2, (abi.Receiver(1, 2),), handle=handle)))
    answer = vm.call(Call.MEM_RETRIEVE_REQ, size, size, smc64=True)
    assert answer.fid == RETRIEVED
    assert answer[2] < answer[1]
    assert bench.hypervisor.remove(1) is True
    assert bench.vms[2].reclaim(handle).ok


def test_partitions_are_told() -> None:
    listener, hypervisor, machine = listening()
    vm = Endpoint(7, machine)
    hypervisor.add(vm)
    assert listener.heard == [(CREATED, 7)]
    listener.answers = [Error.RETRY, Frame.of(Call.INTERRUPT), Error.INTERRUPTED, 0]
    assert [hypervisor.remove(7) for _ in range(2)] == [False, False]
    listener.call(Call.MSG_WAIT)
    hypervisor.port.call(Call.RUN, 0x8001 << 16)
    assert [hypervisor.remove(7) for _ in range(2)] == [False, True]
    assert set(listener.heard[1:]) == {(DESTROYED, 7)}


@pytest.mark.parametrize("answer", [Error.DENIED, Error.NO_MEMORY, 5, Frame.of(Call.MSG_WAIT)])
def test_a_partition_that_refuses(answer: int | Frame) -> None:
    listener, hypervisor, machine = listening()
    listener.answers = [answer]
    with pytest.raises(ValueError, match="partition 0x8001"):
        hypervisor.add(Endpoint(7, machine))
    assert 7 not in hypervisor.served
    hypervisor.add(Endpoint(7, machine))
    listener.answers = [answer]
    assert hypervisor.remove(7) is True  # it has had its chance


@pytest.mark.parametrize("wants", [0, Property.VM_CREATED, Property.VM_DESTROYED])
def test_who_does_not_want_to_know(wants: int) -> None:
    listener, hypervisor, machine = listening(wants)
    hypervisor.add(Endpoint(7, machine))
    assert hypervisor.remove(7) is True
    told = {Property.VM_CREATED: [(CREATED, 7)], Property.VM_DESTROYED: [(DESTROYED, 7)]}
    assert listener.heard == told.get(Property(wants) if wants else Property.AARCH64, [])
    for message, wanted in ((CREATED, Property.VM_CREATED), (DESTROYED, Property.VM_DESTROYED)):
        answer = hypervisor.port.call(Call.MSG_SEND_DIRECT_REQ, 0x8001, DIRECT_FRAMEWORK_BIT | message, 0, 0, 7)
        assert answer.error is (None if wants & wanted else Error.DENIED)


@pytest.mark.parametrize(
    ("caller", "words"),
    [
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 5, 0, 0, 7)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT, 0, 0, 7)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 0x100 | 6, 0, 0, 7)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 6, 1, 0, 7)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 0)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 0x8001)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 1 << 16 | 7)),
        ("hypervisor", (0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 7, 1)),
        ("hypervisor", (7 << 16 | 0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 7)),
        ("hypervisor", (0x8009, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 7)),
        ("vm", (7 << 16 | 0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 8)),
        ("vm", (0x8001, DIRECT_FRAMEWORK_BIT | 6, 0, 0, 8)),
    ],
)
def test_messages_that_make_no_sense(caller: str, words: tuple[int, ...]) -> None:
    """A VM tells nobody of another's end."""
    listener, hypervisor, machine = listening()
    vm = Endpoint(7, machine)
    hypervisor.add(vm)
    listener.heard.clear()
    who = vm if caller == "vm" else hypervisor.port
    assert who.call(Call.MSG_SEND_DIRECT_REQ, *words).error is Error.INVALID_PARAMETERS
    assert listener.heard == []
