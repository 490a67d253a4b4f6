"""A TEE that backends reach over FF-A: hypervisor, SPMC and OP-TEE's partition of a machine in this process."""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from ffa.abi.ids import PAGE_SIZE
from ffa.optee.client import INFO, FfaContext, FfaSession, FfaTeeDriver
from ffa.optee.guests import Limits
from ffa.optee.partition import OpteePartition
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.locked import Locked
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc
from guest_driver.arena import Arena
from tee.calls import Call, CloseSession, Invoke, OpenContext
from tee.driver import Done, Sink, TeeDriver, TeeInfo
from tee.memory import Memory, Range
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcReply
from virtio_tee.ffa_vm import RPC_PARAMS

PARTITION, PARTITION_MEMORY = 0x8001, 0x0E00_0000
DEVICES = 0x4000
"""Endpoint of the first guest's device; the others' follow. A guest's own endpoint is below."""
FIRST_MEMORY = 1 << 32
BUFFERS = 2 * PAGE_SIZE
"""Bytes at the start of an endpoint's memory that are its TX and RX."""
DEVICE_BYTES = 256 << 20
"""Memory of a guest's device: messages, and copies of what the guest registers by address."""
GUEST_BYTES = 64 << 20
"""Memory that a guest has on the machine, to share by FF-A."""
LIMITS = Limits(threads=4096, threads_per_vm=1024, regions=8192, sessions=1024, rpc_params=RPC_PARAMS)
"""Of the partition: no less than a device lets its guest have."""


@dataclass(frozen=True, slots=True)
class FfaVm:
    """An endpoint of the normal world, with its memory."""

    endpoint: Endpoint
    memory: memoryview
    address: int

    def arena(self) -> Arena:
        """Its pages, but for those of its buffers."""
        pages = self.memory[BUFFERS:]
        return Arena(pages, [Range(self.address + BUFFERS, len(pages))])


class FfaTee:
    """A :class:`~tee.driver.TeeDriver` for the devices of ``guests``: each device is an FF-A endpoint of its own, and
    works on copies of the memory that its guest registers by address.

    ``guests`` names each guest, with the FF-A endpoint that it has itself (1 to 0x3fff), if it has one: its device may
    then name memory that this endpoint has shared with the TEE (:class:`~tee.driver.TakesHandles`). ``vms`` has those
    endpoints, by name of the guest; they may be used on other threads.

    ``machine`` is a new one, if it is given. Raises ValueError: an endpoint that cannot be a guest's, or is two
    guests'; TeeError: the TEE cannot be used.
    """

    def __init__(
        self,
        tee: TeeDriver,
        guests: Mapping[str, int | None],
        *,
        limits: Limits = LIMITS,
        machine: Machine | None = None,
    ) -> None:
        owners = [owner for owner in guests.values() if owner is not None]
        if len(set(owners)) != len(owners):
            raise ValueError("two guests have the same FF-A endpoint")
        if not all(0 < owner < DEVICES for owner in owners):
            raise ValueError(f"a guest's FF-A endpoint is from 1 to {DEVICES - 1:#x}")
        devices = {name: DEVICES + number for number, name in enumerate(guests)}
        self._lock = threading.RLock()
        self._owners = dict(guests)
        self._sink: Sink | None = None
        self._unknown: list[Done] = []
        self.machine = machine or Machine()
        self.spmc = Spmc(self.machine)
        self.partition = OpteePartition(
            PARTITION,
            self.machine,
            tee,
            limits=limits,
            names={id: name for name, id in devices.items()},
            proxies={devices[name]: {owner} for name, owner in guests.items() if owner is not None},
            runs=1,  # between two runs others have their turn
        )
        self.spmc.add(self.partition)
        self.machine.add(PARTITION, PARTITION_MEMORY, 2, secure=True)
        self.partition.map_buffers(PARTITION_MEMORY, PARTITION_MEMORY + PAGE_SIZE)
        self.hypervisor = Hypervisor(self.machine, self.spmc)
        self._next_memory = FIRST_MEMORY
        self.vms = {name: self._vm(owner, GUEST_BYTES) for name, owner in guests.items() if owner is not None}
        own = {name: self._vm(id, DEVICE_BYTES) for name, id in devices.items()}
        self._drivers = {
            # the device sees to deadlines, and its guest is to be told of notifications at once
            name: FfaTeeDriver(vm.endpoint, vm.arena(), copies=True, look_s=0, client_s=None)
            for name, vm in own.items()
        }

    def _vm(self, id: int, size: int) -> FfaVm:
        # mapped, so that only what is used costs memory
        endpoint, memory, address = Endpoint(id, self.machine), memoryview(mmap.mmap(-1, size)), self._next_memory
        self.hypervisor.add(endpoint)
        endpoint.relayer = Locked(self.hypervisor, self._lock)
        self.machine.add(id, address, size // PAGE_SIZE, backing=memory)
        endpoint.map_buffers(address, address + PAGE_SIZE)
        self._next_memory += size
        return FfaVm(endpoint, memory, address)

    def takes_handles_of(self, vm: str, owner: int) -> bool:
        """See :class:`~tee.driver.TakesHandles`."""
        return self._owners.get(vm) == owner

    # -- the contract

    @property
    def info(self) -> TeeInfo:
        """OP-TEE."""
        return INFO

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink
        for driver in self._drivers.values():
            driver.attach(sink)

    def fileno(self) -> int | None:
        """See :class:`~tee.driver.TeeDriver`."""
        return None

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        driver = self._driver(call)
        if driver is None:
            self._unknown.append(Done(call, Result.BAD_PARAMETERS, Origin.API))
        else:
            driver.start(call)

    def _driver(self, call: Call) -> FfaTeeDriver | None:
        if isinstance(call, OpenContext):
            return self._drivers.get(call.vm)
        handle = call.session if isinstance(call, Invoke | CloseSession) else getattr(call, "context", None)
        context = handle.context if isinstance(handle, FfaSession) else handle
        return context.driver if isinstance(context, FfaContext) else None

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        driver = self._driver(call)
        if driver is not None:
            driver.cancel(call)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        for driver in self._drivers.values():  # those that have not asked ignore it
            driver.answer(rpc, reply)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        sink, unknown = self._sink, self._unknown
        assert sink is not None
        while unknown:
            sink(unknown.pop(0))
        dues = [driver.run() for driver in self._drivers.values()]
        with self._lock:
            self.partition.work()
        return min((due for due in (*dues, self.partition.due) if due is not None), default=None)

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`. Every device works on copies: any memory is as good."""
        if size < 1:
            raise MemoryError(f"{size} bytes cannot be allocated")
        return Memory.of(bytearray(size))

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        memory.forget()

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`: all devices' together."""
        total: dict[str, int] = {}
        for driver in self._drivers.values():
            for name, count in driver.usage().items():
                total[name] = total.get(name, 0) + count
        return total
