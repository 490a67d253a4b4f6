"""The path over FF-A: each guest calls the hypervisor, which calls the SPMC, which calls OP-TEE's partition."""

from __future__ import annotations

import struct
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager

from ffa.abi.frame import Frame
from ffa.abi.ids import BY_FID, HYPERVISOR_ID, PAGE_SIZE, Call
from ffa.abi.transactions import AddressRange
from ffa.optee.client import FfaTeeDriver
from ffa.optee.msg import Service, Yield
from ffa.optee.partition import OpteePartition
from ffa.roles.endpoint import Endpoint, Relayer
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import POISON, Access, Machine, PageState
from ffa.roles.spmc import Spmc
from guest_driver.arena import Arena
from tee.driver import TeeDriver
from tee.memory import Range
from virtio_tee.compare.meter import Meter, Party, Readable, What
from virtio_tee.compare.site import GUEST_BYTES, Kit, Site, running
from virtio_tee.compare.tees import MeteredTee, soft_tee
from virtio_tee.ffa_vm import PARTITION, PARTITION_MEMORY, VM_MEMORY

_STRIDE = 0x1000_0000
"""Bytes from one guest's memory to the next one's."""
_REQUESTS = frozenset({Call.MSG_SEND_DIRECT_REQ, Call.MSG_SEND_DIRECT_REQ2})
_FRAMES = 16
"""Last register frames of which it is looked what a party could read in them."""
_REGISTERS = struct.Struct("<18Q")


@contextmanager
def over_ffa(kit: Kit, place: str, guests: int, meter: Meter | None) -> Iterator[Site]:
    """See :data:`virtio_tee.compare.paths.Open`."""
    tee: TeeDriver = soft_tee(kit.key)
    if meter is None:
        world = World(tee, Machine(), guests)
    else:
        tee = MeteredTee(tee, meter, Party.TEE, switches=False, in_guest=lambda memory: False)
        world = CountedWorld(tee, CountedMachine(meter), guests, meter)
    with ExitStack() as stack:
        drivers: list[TeeDriver] = [stack.enter_context(closing(world.driver(vm))) for vm in range(guests)]
        yield Site(stack.enter_context(running(kit, place, drivers)), [""] * guests)


class World:
    """The machine and all who are on it."""

    def __init__(self, tee: TeeDriver, machine: Machine, guests: int) -> None:
        self.machine = machine
        self.spmc = Spmc(machine)
        self.partition = self._partition(tee)
        self.spmc.add(self.partition)
        machine.add(PARTITION, PARTITION_MEMORY, 2, secure=True)
        self.hypervisor = Hypervisor(machine, self.spmc)
        self.vms = [Endpoint(number + 1, machine) for number in range(guests)]
        self.memories = [bytearray(GUEST_BYTES) for _ in self.vms]
        one_cpu = threading.RLock()
        for number, (vm, memory) in enumerate(zip(self.vms, self.memories, strict=True)):
            self.hypervisor.add(vm)
            machine.add(vm.id, self.base(number), len(memory) // PAGE_SIZE, backing=memory)
            assert vm.relayer is not None
            vm.relayer = OneAtATime(vm.relayer, one_cpu)
        self._between()
        self.partition.map_buffers(PARTITION_MEMORY, PARTITION_MEMORY + PAGE_SIZE)
        for number, vm in enumerate(self.vms):
            vm.map_buffers(self.base(number), self.base(number) + PAGE_SIZE)

    def _partition(self, tee: TeeDriver) -> OpteePartition:
        return OpteePartition(PARTITION, self.machine, tee)

    def _between(self) -> None:
        """All know each other, and nothing has been said."""

    @staticmethod
    def base(number: int) -> int:
        """Where a guest's memory begins."""
        return VM_MEMORY + number * _STRIDE

    def driver(self, number: int) -> FfaTeeDriver:
        """A guest's driver; its memory is all but the buffers."""
        pages = memoryview(self.memories[number])[2 * PAGE_SIZE :]
        arena = Arena(pages, [Range(self.base(number) + 2 * PAGE_SIZE, len(pages))])
        return FfaTeeDriver(self.vms[number], arena)


class OneAtATime:
    """Guests' drivers run on threads of their own; the roles are not made for that."""

    def __init__(self, relayer: Relayer, lock: threading.RLock) -> None:
        self._relayer = relayer
        self._lock = lock

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """As one CPU does it: a call ends before the next one begins."""
        with self._lock:
            return self._relayer.call(caller, frame, vcpu)


# -- counted


class CountedMachine(Machine):
    """Counts what is copied through buffers, and the pages to which somebody is given access."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self._meter = meter

    def fetch(self, address: int, size: int) -> bytes:
        self._meter.copies(size)
        return super().fetch(address, size)

    def store(self, address: int, data: bytes) -> None:
        if any(byte != POISON for byte in data[:8]):  # the model overwrites what nobody may rely on; hardware does not
            self._meter.copies(len(data))
        super().store(address, data)

    def clear(self, ranges: Sequence[AddressRange]) -> None:
        with self._meter.within(None):  # no copy
            super().clear(ranges)

    def set_state(self, pages: Iterable[int], state: PageState) -> None:
        pages = list(pages)
        granted = [who for who, access in state.access if who != state.owner and access]
        new = 0
        for page in pages:
            before = self.state(page)
            new += sum(before is None or not before.of(who) for who in granted)
        self._meter.add(What.PAGES_SHARED, new)
        super().set_state(pages, state)

    def readable(self, endpoint: int, first: int, pages: int) -> Iterator[Readable]:
        """What ``endpoint`` has been given of the region at page ``first``."""
        region = self.region(first)
        assert region is not None
        assert region.backing is not None
        for page, state in list(self.states.items()):
            if first <= page < first + pages and Access.R in state.of(endpoint) and state.owner != endpoint:
                at = (page - first) * PAGE_SIZE
                yield Readable(region.backing[at : at + PAGE_SIZE], True)


class CountedWorld(World):
    """Counts each call where it crosses a boundary."""

    def __init__(self, tee: TeeDriver, machine: CountedMachine, guests: int, meter: Meter) -> None:
        self._meter = meter
        self._counted_machine = machine
        super().__init__(tee, machine, guests)
        for number, memory in enumerate(self.memories):
            meter.looks.setdefault(Party.GUEST, []).append(lambda memory=memory: [Readable(memoryview(memory), True)])  # type: ignore[misc]
            for party, endpoint in ((Party.HYPERVISOR, HYPERVISOR_ID), (Party.TEE, PARTITION)):
                self._looks(party, endpoint, number)

    def _looks(self, party: Party, endpoint: int, number: int) -> None:
        first, pages = self.base(number) // PAGE_SIZE, GUEST_BYTES // PAGE_SIZE
        self._meter.looks.setdefault(party, []).append(
            lambda: self._counted_machine.readable(endpoint, first, pages),
        )
        if party is Party.HYPERVISOR:
            self._meter.looks[party].append(lambda: self._buffers(number))

    def _buffers(self, number: int) -> Iterator[Readable]:
        """RX and TX of a guest: the hypervisor has them mapped."""
        served = self.hypervisor.served[self.vms[number].id]
        if served.mailbox is not None:
            for address in (served.mailbox.tx, served.mailbox.rx):
                at = address - self.base(number)
                yield Readable(memoryview(self.memories[number])[at : at + served.mailbox.size], True)

    def _partition(self, tee: TeeDriver) -> OpteePartition:
        return CountedPartition(PARTITION, self.machine, tee, self._meter)

    def _between(self) -> None:
        meter = self._meter
        hypervisor = Boundary(self.hypervisor, meter, Party.GUEST, Party.HYPERVISOR, What.VM_EXITS, 1)
        for vm in self.vms:
            assert isinstance(vm.relayer, OneAtATime)
            vm.relayer._relayer = hypervisor
        port = self.hypervisor.port
        assert port.relayer is not None
        port.relayer = Boundary(port.relayer, meter, Party.HYPERVISOR, Party.SPMC, What.WORLD_SWITCHES, 2)
        assert self.partition.relayer is not None
        self.partition.relayer = Boundary(self.partition.relayer, meter, Party.TEE, Party.SPMC)


class CountedPartition(OpteePartition):
    """Counts where the SPMC gives it the processor."""

    def __init__(self, id: int, machine: Machine, tee: TeeDriver, meter: Meter) -> None:
        self._crossing = Crossing(meter, Party.SPMC, Party.TEE)
        super().__init__(id, machine, tee)

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        self._crossing.asks(frame)
        with self._crossing.meter.within(Party.TEE):
            answer = super().receive(frame, vcpu)
        self._crossing.answers(frame, answer)
        return answer


class Crossing:
    """Between a caller and whom it calls; each can read the registers."""

    def __init__(self, meter: Meter, source: Party, target: Party) -> None:
        self.meter = meter
        self._source, self._target = source, target
        self._frames: deque[bytes] = deque(maxlen=_FRAMES)
        self._asked: set[int] = set()  #: by what calls are resumed in which OP-TEE has asked for something
        for party in (source, target):
            meter.looks.setdefault(party, []).append(lambda: [Readable(frame, False) for frame in self._frames])

    def asks(self, frame: Frame) -> None:
        """A call."""
        self._frames.append(_bytes(frame))
        name, rpc = self._describe(frame)
        if _polls(frame):
            self.meter.add(What.POLLS)
        elif _notifies(frame):
            self.meter.notification(self._source, self._target, name)
        else:
            self.meter.message(self._source, self._target, name, size=_size(frame), rpc=rpc)

    def answers(self, frame: Frame, answer: Frame) -> None:
        """What came of it."""
        self._frames.append(_bytes(answer))
        if not _polls(frame) and not _notifies(frame):
            name, rpc = self._describe(answer)
            self.meter.message(self._target, self._source, name, kind="response", size=_size(answer), rpc=rpc)

    def _describe(self, frame: Frame) -> tuple[str, bool]:
        """The call's name, for OP-TEE's direct messages what they say; and whether it is because of an RPC."""
        call, words = _call_of(frame), frame.narrow
        name = f"{frame.fid:#x}" if call is None else f"FFA_{call.name}"
        if call in _REQUESTS and words[3] in set(Service):
            asked = words[3] == Service.RESUME and words[7] in self._asked
            self._asked.discard(words[7])
            return f"{name} {Service(words[3]).name}", asked
        if call is Call.MSG_SEND_DIRECT_RESP and words[3] == 0 and words[4] == Yield.RPC_CMD:
            self._asked.add(words[7])
            return f"{name} RPC", True
        return name, False


class Boundary(Crossing):
    """Someone who is called. ``cost`` is what each call is, ``times`` over."""

    def __init__(
        self,
        relayer: Relayer,
        meter: Meter,
        source: Party,
        target: Party,
        cost: What | None = None,
        times: int = 1,
    ) -> None:
        super().__init__(meter, source, target)
        self._relayer = relayer
        self._cost, self._times = cost, times

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """See :class:`~ffa.roles.endpoint.Relayer`."""
        self.asks(frame)
        if self._cost is not None and not _polls(frame):
            self.meter.add(self._cost, self._times)
        with self.meter.within(self._target):
            answer = self._relayer.call(caller, frame, vcpu)
        self.answers(frame, answer)
        return answer


def _call_of(frame: Frame) -> Call | None:
    found = BY_FID.get(frame.fid)
    return None if found is None else found[0].call


def _polls(frame: Frame) -> bool:
    """The model has no interrupts: its driver looks for notifications all the time, where a real one is told."""
    return _call_of(frame) is Call.NOTIFICATION_GET


def _notifies(frame: Frame) -> bool:
    return _call_of(frame) is Call.NOTIFICATION_SET


def _size(frame: Frame) -> int:
    """Bytes of the registers that say something: up to the last that is not zero."""
    return 8 * max((n + 1 for n, word in enumerate(frame) if word), default=1)


def _bytes(frame: Frame) -> bytes:
    return _REGISTERS.pack(*frame)
