"""The path over FF-A: each guest calls the hypervisor, which calls the SPMC, which calls OP-TEE's partition."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager

from ffa.abi.frame import Frame
from ffa.abi.ids import PAGE_SIZE
from ffa.optee.client import FfaTeeDriver
from ffa.optee.partition import OpteePartition
from ffa.roles.endpoint import Endpoint, Relayer
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc
from guest_driver.arena import Arena
from tee.driver import TeeDriver
from tee.memory import Range
from virtio_tee.compare.ffa_meter import CountedMachine, watch
from virtio_tee.compare.meter import Meter, Party
from virtio_tee.compare.site import GUEST_BYTES, Kit, Site, running
from virtio_tee.compare.tees import MeteredTee, soft_tee
from virtio_tee.ffa_vm import PARTITION, PARTITION_MEMORY, VM_MEMORY

_STRIDE = 0x1000_0000
"""Bytes from one guest's memory to the next one's."""


@contextmanager
def over_ffa(kit: Kit, place: str, guests: int, meter: Meter | None) -> Iterator[Site]:
    """See :data:`virtio_tee.compare.paths.Open`."""
    tee: TeeDriver = soft_tee(kit.key)
    if meter is None:
        world = World(tee, Machine(), guests)
    else:
        tee = MeteredTee(tee, meter, Party.TEE, switches=False, in_guest=lambda memory: False)
        world = World(tee, CountedMachine(meter, range(1, guests + 1)), guests)
        watch(meter, world.hypervisor, world.partition, dict.fromkeys(range(1, guests + 1), Party.GUEST))
    with ExitStack() as stack:
        drivers: list[TeeDriver] = [stack.enter_context(closing(world.driver(vm))) for vm in range(guests)]
        yield Site(stack.enter_context(running(kit, place, drivers)), [""] * guests)


class World:
    """The machine and all who are on it."""

    def __init__(self, tee: TeeDriver, machine: Machine, guests: int) -> None:
        spmc = Spmc(machine)
        self.partition = OpteePartition(PARTITION, machine, tee)
        spmc.add(self.partition)
        machine.add(PARTITION, PARTITION_MEMORY, 2, secure=True)
        self.partition.map_buffers(PARTITION_MEMORY, PARTITION_MEMORY + PAGE_SIZE)
        self.hypervisor = Hypervisor(machine, spmc)
        self.vms = [Endpoint(number + 1, machine) for number in range(guests)]
        self._arenas: list[Arena] = []
        one_cpu = threading.RLock()
        for number, vm in enumerate(self.vms):
            memory, base = memoryview(bytearray(GUEST_BYTES)), VM_MEMORY + number * _STRIDE
            self.hypervisor.add(vm)
            vm.relayer = OneAtATime(self.hypervisor, one_cpu)
            machine.add(vm.id, base, len(memory) // PAGE_SIZE, backing=memory)
            vm.map_buffers(base, base + PAGE_SIZE)
            pages = memory[2 * PAGE_SIZE :]
            self._arenas.append(Arena(pages, [Range(base + 2 * PAGE_SIZE, len(pages))]))

    def driver(self, number: int) -> FfaTeeDriver:
        """A guest's driver; its memory is all but the buffers."""
        return FfaTeeDriver(self.vms[number], self._arenas[number])


class OneAtATime:
    """Guests' drivers run on threads of their own; the roles are not made for that."""

    def __init__(self, relayer: Relayer, lock: threading.RLock) -> None:
        self._relayer = relayer
        self._lock = lock

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """As one CPU does it: a call ends before the next one begins."""
        with self._lock:
            return self._relayer.call(caller, frame, vcpu)
