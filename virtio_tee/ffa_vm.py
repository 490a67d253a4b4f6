"""A VM whose TEE is OP-TEE over FF-A, all in this process: hypervisor, SPMC, partition, and the VM's driver."""

from __future__ import annotations

from ffa.abi.ids import PAGE_SIZE
from ffa.optee.client import CLIENT_S, FfaTeeDriver
from ffa.optee.guests import Limits
from ffa.optee.partition import OpteePartition
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc
from guest_driver.arena import Arena
from tee.driver import TeeDriver
from tee.memory import Range

VM, PARTITION = 1, 0x8001
VM_MEMORY, PARTITION_MEMORY = 0x4000_0000, 0x0E00_0000
RPC_PARAMS = 16
"""Of an RPC; OP-TEE has 4, of which an OCALL's function takes one."""
MEMORY_SIZE = 64 << 20
"""Bytes of the VM's memory that the driver has for buffers."""


def ffa_driver(tee: TeeDriver, *, client_s: float = CLIENT_S) -> FfaTeeDriver:
    """The driver of a new VM, with ``tee`` behind the partition; ``client_s`` as the driver says it. Raises TeeError:
    they refuse to work together."""
    machine = Machine()
    spmc = Spmc(machine)
    partition = OpteePartition(PARTITION, machine, tee, limits=Limits(rpc_params=RPC_PARAMS))
    spmc.add(partition)
    machine.add(partition.id, PARTITION_MEMORY, 2, secure=True)
    partition.map_buffers(PARTITION_MEMORY, PARTITION_MEMORY + PAGE_SIZE)
    hypervisor = Hypervisor(machine, spmc)
    vm = Endpoint(VM, machine)
    hypervisor.add(vm)
    memory = bytearray(2 * PAGE_SIZE + MEMORY_SIZE)
    machine.add(vm.id, VM_MEMORY, len(memory) // PAGE_SIZE, backing=memory)
    vm.map_buffers(VM_MEMORY, VM_MEMORY + PAGE_SIZE)
    pages = memoryview(memory)[2 * PAGE_SIZE :]
    return FfaTeeDriver(vm, Arena(pages, [Range(VM_MEMORY + 2 * PAGE_SIZE, len(pages))]), client_s=client_s)
