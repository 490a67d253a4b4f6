"""A machine with everything on it: VMs of each version on a hypervisor, on an SPMC with two partitions."""

from __future__ import annotations

from dataclasses import dataclass, field
from uuid import UUID

import pytest

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.abi.ids import VERSION_1_0, VERSION_1_1, VERSION_1_2, Call, fid
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc

VM_MEMORY, SP_MEMORY, VM_STRIDE = 0x4000_0000, 0x0A00_0000, 0x1000_0000
DATA = 0x10_0000
"""Offset of memory that no buffer is in."""


class Partition(Endpoint):
    """Answers with what it is told to, and remembers what it was asked."""

    answers: list[Frame]
    asked: list[Frame]

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        self.asked.append(frame)
        return self.answers.pop(0) if self.answers else super().receive(frame, vcpu)


@dataclass(slots=True)
class Bench:
    """Everything, with buffers mapped."""

    machine: Machine = field(default_factory=Machine)
    spmc: Spmc = field(init=False)
    hypervisor: Hypervisor = field(init=False)
    vms: dict[int, Endpoint] = field(default_factory=dict)
    sps: dict[int, Partition] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.spmc = Spmc(self.machine)
        for id in (0x8001, 0x8002):
            sp = self.sps[id] = Partition(id, self.machine, uuid=UUID(int=id), contexts=2, el0=id == 0x8002)
            sp.answers, sp.asked = [], []
            self.machine.add(id, self.memory(id), 1024, secure=True)
            self.spmc.add(sp)
        self.hypervisor = Hypervisor(self.machine, self.spmc)
        for id, version in ((1, VERSION_1_2), (2, VERSION_1_1), (3, VERSION_1_0)):
            vm = self.vms[id] = Endpoint(id, self.machine, uuid=UUID(int=id), contexts=4, version=version)
            self.machine.add(id, self.memory(id), 1 << 16)
            self.hypervisor.add(vm)
        for endpoint in self.all.values():
            base = self.memory(endpoint.id)
            assert endpoint.map_buffers(base, base + 0x1000).ok

    @property
    def all(self) -> dict[int, Endpoint]:
        return {**self.vms, **self.sps}

    @staticmethod
    def memory(id: int) -> int:
        """The first address of an endpoint's memory; its buffers are there."""
        return VM_MEMORY + id * VM_STRIDE if id < 0x8000 else SP_MEMORY + (id & 0xFF) * 0x100_0000

    def pages(self, id: int, count: int = 1, first: int = 0) -> list[abi.AddressRange]:
        """Pages of an endpoint that no buffer is in, each a range of its own."""
        return [(self.memory(id) + DATA + (first + 2 * n) * 0x1000, 1) for n in range(count)]

    def send(self, call: Call, sender: int, *receivers: int, count: int = 1, data: int = 2, tag: int = 0) -> int:
        """Sends pages; the handle."""
        given = 0 if call is Call.MEM_DONATE else data
        attributes = 0x2F if call is Call.MEM_SHARE or len(receivers) > 1 else 0
        t = abi.Transaction(sender, tuple(abi.Receiver(r, given) for r in receivers), attributes, tag=tag)
        answer = self.all[sender].send_memory(call, t, self.pages(sender, count))
        assert answer.ok, answer
        return answer[2] | answer[3] << 32

    def retrieve(self, call: Call, handle: int, sender: int, *receivers: int, by: int, data: int = 2) -> Frame:
        """Retrieves; the first answer."""
        named = 1 if call is Call.MEM_DONATE or (call is Call.MEM_LEND and len(receivers) == 1) else 0
        asked = tuple(abi.Receiver(r, data | named << 2) for r in receivers)
        answer, _ = self.all[by].retrieve(abi.Transaction(sender, asked, handle=handle))
        return answer


@pytest.fixture
def bench() -> Bench:
    return Bench()


RETRIEVED = fid(Call.MEM_RETRIEVE_RESP)
