"""A VM with OP-TEE over FF-A: driver, hypervisor, SPMC, partition, and the software TEE behind it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from ffa.optee.client import FfaTeeDriver
from ffa.optee.guests import Limits
from ffa.optee.partition import OpteePartition
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc
from guest_driver.arena import Arena
from tee.calls import Call, OpenContext, OpenSession
from tee.driver import Done, Event, TeeDriver
from tee.memory import Range
from tee.soft import SoftTee, examples

VM_MEMORY, STRIDE, SP_MEMORY = 0x4000_0000, 0x1000_0000, 0x0E00_0000
BUFFERS = 0x2000
"""Bytes at a VM's start that are its RX and TX buffers."""


def soft_tee(**options: Any) -> SoftTee:
    built_in = examples.built_in()
    return SoftTee(clock=time.monotonic, random=secrets.token_bytes, **{"built_in": built_in, **options})


@dataclass
class Vm:
    """One VM, with the bytes of its memory."""

    endpoint: Endpoint
    memory: bytearray
    base: int

    def arena(self) -> Arena:
        size = len(self.memory) - BUFFERS
        return Arena(memoryview(self.memory)[BUFFERS:], [Range(self.base + BUFFERS, size)])


@dataclass
class Path:
    """All of it."""

    tee: TeeDriver = field(default_factory=soft_tee)
    vms: int = 1
    limits: Limits | None = None

    def __post_init__(self) -> None:
        self.machine = Machine()
        self.spmc = Spmc(self.machine)
        self.partition = OpteePartition(0x8001, self.machine, self.tee, limits=self.limits)
        self.spmc.add(self.partition)
        self.machine.add(self.partition.id, SP_MEMORY, 16, secure=True)
        assert self.partition.map_buffers(SP_MEMORY, SP_MEMORY + 0x1000).ok
        self.hypervisor = Hypervisor(self.machine, self.spmc)
        self.guests = [self._vm(number) for number in range(1, self.vms + 1)]

    def _vm(self, id: int) -> Vm:
        memory, base = bytearray(8 << 20), VM_MEMORY + id * STRIDE
        endpoint = Endpoint(id, self.machine)
        self.hypervisor.add(endpoint)
        self.machine.add(id, base, len(memory) >> 12, backing=memory)
        assert endpoint.map_buffers(base, base + 0x1000).ok
        return Vm(endpoint, memory, base)

    def driver(self, vm: int = 0, **options: Any) -> Driven:
        guest = self.guests[vm]
        return Driven(FfaTeeDriver(guest.endpoint, guest.arena(), now=lambda: 12_000_000_034, **options))


class Driven:
    """A driver that is run by hand."""

    def __init__(self, driver: FfaTeeDriver) -> None:
        self.driver = driver
        self.events: list[Event] = []
        driver.attach(self.events.append)

    def run(self, times: int = 200) -> None:
        for _ in range(times):
            if self.driver.run() != 0:
                return

    def call(self, call: Call) -> Done:
        """Starts a call; its end."""
        self.driver.start(call)
        return self.end_of(call)

    def end_of(self, call: Call) -> Done:
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            self.driver.run()
            for event in self.events:
                if isinstance(event, Done) and event.call is call:
                    self.events.remove(event)
                    return event
        raise AssertionError(f"{call} does not end: {self.events}")

    def take(self, kind: type[Any]) -> Any:
        """The next event of a kind."""
        deadline = time.monotonic() + 5
        while time.monotonic() < deadline:
            self.driver.run()
            for event in self.events:
                if isinstance(event, kind):
                    self.events.remove(event)
                    return event
        raise AssertionError(f"no {kind.__name__}")

    def context(self) -> object:
        done = self.call(OpenContext())
        assert done.code == 0
        return done.value

    def session(self, context: object, uuid: UUID, *params: Any) -> object:
        done = self.call(OpenSession(context=context, uuid=uuid, params=list(params)))
        assert done.code == 0, hex(done.code)
        return done.value
