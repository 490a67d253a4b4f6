"""What the cases run on: six VMs and three secure partitions, with whoever answers their calls behind a recorder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from uuid import UUID

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.abi.ids import HYPERVISOR_ID, PAGE_SIZE, VERSION_1_0, VERSION_1_1, VERSION_1_2, Property, is_secure
from ffa.roles.endpoint import DEFAULT_PROPERTIES, Endpoint, Relayer
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc

VMS = {1: VERSION_1_2, 2: VERSION_1_2, 3: VERSION_1_2, 4: VERSION_1_1, 5: VERSION_1_0, 6: VERSION_1_0}
"""VM → the version that it is of."""
MUTE = 3
"""The VM that neither sends nor takes direct messages."""
SPS = (0x8001, 0x8002, 0x8003)
"""Secure partitions, all of 1.2. The last is at S-EL0, with one execution context."""
EL0 = 0x8003
INDIRECT_ONLY = Property.INDIRECT_MSG | Property.NOTIFICATIONS | Property.AARCH64
NOBODY = 0x7F
"""An id that no VM has."""

VM_PAGES, SP_PAGES = 4096, 1024
BUFFER_PAGES = 1
DATA_PAGE = 16
"""The first page of an endpoint's memory that is neither a buffer nor kept for special cases."""
DEVICE = 0x3000_0000
"""Device memory of VM 1, 16 pages."""
UNBACKED = 0x3800_0000
"""An address without memory."""


def memory_of(id: int) -> int:
    """The first address of an endpoint's memory: TX, then RX."""
    return 0x0A00_0000 + (id & 0xFF) * 0x100_0000 if is_secure(id) else 0x4000_0000 + id * 0x1000_0000


class Server(Endpoint):
    """An endpoint that answers with what it is told to, or with what it was asked; it remembers what that was."""

    answers: list[Frame | Callable[[Frame], Frame]]  #: a function makes calls of its own before it answers
    asked: list[Frame]

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        """The next answer; without one, the request's own registers."""
        self.asked.append(frame)
        if not self.answers:
            return super().receive(frame, vcpu)
        answer = self.answers.pop(0)
        return answer if isinstance(answer, Frame) else answer(frame)


@dataclass(slots=True)
class Bench:
    """The machine and its endpoints, which nobody serves yet."""

    machine: Machine
    endpoints: dict[int, Server]
    hypervisor: bool = False  #: endpoint 0, if it is there, is a hypervisor and speaks for VMs


Factory = Callable[[Bench], Relayer]
"""Makes an implementation that serves the endpoints. What it maps and unmaps, it tells the machine (``set_state``); it
reads and writes buffers there (``fetch``, ``store``), and runs an endpoint by its ``receive(frame, vcpu)``."""


def build(host: bool = False, hypervisor: bool = False) -> Bench:
    """A new bench, without buffers mapped. With ``host`` the normal world is one operating system, endpoint 0, instead
    of VMs; with ``hypervisor`` it is a hypervisor's own calls, endpoint 0, whose memory all VMs' is."""
    machine = Machine()
    host |= hypervisor
    endpoints: dict[int, Server] = {}
    for id in ((HYPERVISOR_ID,) if host else tuple(VMS)) + SPS:
        endpoint = endpoints[id] = Server(
            id,
            machine,
            uuid=UUID(int=id),
            contexts=1 if id == EL0 else 2,
            properties=INDIRECT_ONLY if id == MUTE else sum(DEFAULT_PROPERTIES),
            version=VMS.get(id, VERSION_1_2),
            el0=id == EL0,
        )
        endpoint.answers, endpoint.asked = [], []
        machine.add(id, memory_of(id), SP_PAGES if is_secure(id) else VM_PAGES, secure=is_secure(id))
    if not host:
        machine.add(1, DEVICE, 16, device=True)
    if hypervisor:
        for id in VMS:
            machine.add(HYPERVISOR_ID, memory_of(id), VM_PAGES)
    return Bench(machine, endpoints, hypervisor)


def data_of(id: int, first: int, count: int) -> list[abi.AddressRange]:
    """``count`` pages, each a range of its own, from the ``first`` of an endpoint's data pages on."""
    start = memory_of(id) + DATA_PAGE * PAGE_SIZE
    return [(start + (first + 2 * n) * PAGE_SIZE, 1) for n in range(count)]


class Model:
    """Our hypervisor on our SPMC, as one implementation; or our SPMC alone, below an operating system."""

    def __init__(self, bench: Bench) -> None:
        self.spmc = Spmc(bench.machine)
        for id in SPS:
            self.spmc.add(bench.endpoints[id])
        self.hypervisor: Hypervisor | None = None
        if HYPERVISOR_ID in bench.endpoints:
            self.spmc.attach(bench.endpoints[HYPERVISOR_ID], hypervisor=bench.hypervisor)
            return
        self.hypervisor = Hypervisor(bench.machine, self.spmc)
        for id in VMS:
            self.hypervisor.add(bench.endpoints[id])

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """VMs call the hypervisor, partitions and an operating system the SPMC."""
        if self.hypervisor is None or is_secure(caller):
            return self.spmc.call(caller, frame, vcpu)
        return self.hypervisor.call(caller, frame, vcpu)
