"""Memory that a VM shares with the TEE by FF-A."""

from __future__ import annotations

import pytest

from ffa.abi import transactions as abi
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from guest_driver.arena import Arena
from guest_driver.ffa_memory import FfaMemory, shared_size
from tee.memory import Range
from tee.results import TeeError
from tests.ffa.optee.bench import Path


@pytest.mark.requirement("DRV-FFA-1")
@pytest.mark.fault("tee-lost")
def test_what_the_tee_does_not_let_go_of() -> None:
    """It is used for nothing else before it has been reclaimed."""
    path = Path()
    vm, partition = path.guests[0], path.partition
    pages = memoryview(vm.memory)[0x2000:0x4000]
    arena = Arena(pages, [Range(vm.base + 0x2000, 0x2000)])
    memory = FfaMemory(vm.endpoint, arena)
    one, two = memory.allocate(100), memory.allocate(4096)
    assert one.ffa is not None
    assert two.ffa is not None
    assert (shared_size(one), shared_size(two)) == (4096, 4096)
    request = abi.Transaction(1, (abi.Receiver(partition.id, 2),), handle=one.ffa.handle)
    assert partition.retrieve(request)[1]
    memory.release(one)
    assert (memory.lost, arena.in_use) == (1, 8192)
    with pytest.raises(MemoryError):
        memory.allocate(1)
    memory.release(two)
    assert (memory.lost, arena.in_use) == (1, 4096)
    assert partition.relinquish(one.ffa.handle).ok
    three = memory.allocate(8192)
    assert memory.lost == 0
    assert three.read(0, 8192) == bytes(8192)
    memory.release(three)
    assert arena.in_use == 0
    assert not path.hypervisor.transactions.regions


def test_no_memory_is_kept_that_cannot_be_shared() -> None:
    path = Path()
    vm = path.guests[0]
    arena = Arena(memoryview(bytearray(8192)), [Range(vm.base + len(vm.memory), 8192)])  # not the VM's
    memory = FfaMemory(vm.endpoint, arena)
    with pytest.raises(MemoryError, match="FFA_MEM_SHARE"):
        memory.allocate(1)
    assert arena.in_use == 0


def test_without_optee() -> None:
    machine = Machine()
    hypervisor, vm = Hypervisor(machine), Endpoint(1, machine)
    hypervisor.add(vm)
    machine.add(1, 0x4000_0000, 16)
    vm.map_buffers(0x4000_0000, 0x4000_1000)
    with pytest.raises(TeeError):
        FfaMemory(vm, Arena(memoryview(bytearray(4096)), [Range(0x4000_2000, 4096)]))
