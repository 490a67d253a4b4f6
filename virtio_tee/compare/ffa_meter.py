"""The meter on FF-A: between all who call each other, and in the machine."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence

from ffa.abi.frame import Frame
from ffa.abi.ids import BY_FID, HYPERVISOR_ID, PAGE_SIZE, Call
from ffa.abi.transactions import AddressRange
from ffa.optee.msg import Service, Yield
from ffa.optee.partition import OpteePartition
from ffa.roles.endpoint import Endpoint, Relayer
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import POISON, Access, Machine, PageState, Region
from virtio_tee.compare.meter import Meter, Party, Readable, What

_REQUESTS = frozenset({Call.MSG_SEND_DIRECT_REQ, Call.MSG_SEND_DIRECT_REQ2})
_FRAMES = 16
"""Last register frames of which it is looked what a party could read in them."""
_REGISTERS = struct.Struct("<18Q")


def watch(meter: Meter, hypervisor: Hypervisor, partition: OpteePartition, parties: Mapping[int, Party]) -> None:
    """Puts the meter between hypervisor, SPMC, partition and endpoints, of which ``parties`` says who they are."""
    port = hypervisor.port
    assert port.relayer is not None
    assert partition.relayer is not None
    port.relayer = Boundary(port.relayer, meter, Party.HYPERVISOR, Party.SPMC, What.WORLD_SWITCHES, 2)
    partition.relayer = Boundary(partition.relayer, meter, Party.TEE, Party.SPMC)
    _watch_partition(meter, partition)
    meter.looks.setdefault(Party.SPMC, [])
    for id, party in parties.items():
        endpoint = hypervisor.served[id].endpoint
        assert endpoint.relayer is not None
        cost = What.VM_EXITS if party is Party.GUEST else None
        endpoint.relayer = Boundary(endpoint.relayer, meter, party, Party.HYPERVISOR, cost)
        region = endpoint.machine.region(endpoint.tx // PAGE_SIZE)
        assert region is not None
        _look_at(meter, hypervisor, endpoint, region, partition.id, of_guest=party is Party.GUEST)


def _watch_partition(meter: Meter, partition: OpteePartition) -> None:
    """Where the SPMC gives it the processor."""
    crossing, receive = Crossing(meter, Party.SPMC, Party.TEE), partition.receive

    def counted(frame: Frame, vcpu: int) -> Frame:
        crossing.asks(frame)
        with meter.within(Party.TEE):
            answer = receive(frame, vcpu)
        crossing.answers(frame, answer)
        return answer

    partition.receive = counted  # type: ignore[method-assign]


def _look_at(
    meter: Meter, hypervisor: Hypervisor, endpoint: Endpoint, region: Region, partition: int, *, of_guest: bool
) -> None:
    """Who can read what of an endpoint's memory."""
    backing = region.backing
    assert backing is not None

    def granted(to: int) -> Iterator[Readable]:
        for page, state in list(endpoint.machine.states.items()):
            if region.first <= page < region.end and Access.R in state.of(to) and state.owner != to:
                at = (page - region.first) * PAGE_SIZE
                yield Readable(backing[at : at + PAGE_SIZE], of_guest)

    def buffers() -> Iterator[Readable]:
        """RX and TX: the hypervisor has them mapped."""
        mailbox = hypervisor.served[endpoint.id].mailbox
        for address in (mailbox.tx, mailbox.rx) if mailbox is not None else ():
            at = address - region.first * PAGE_SIZE
            yield Readable(backing[at : at + endpoint.buffer_size], of_guest)

    meter.looks.setdefault(Party.TEE, []).append(lambda: granted(partition))
    meter.looks.setdefault(Party.HYPERVISOR, []).extend([lambda: granted(HYPERVISOR_ID), buffers])
    if of_guest:
        meter.looks.setdefault(Party.GUEST, []).append(lambda: [Readable(backing, True)])


class CountedMachine(Machine):
    """Counts what is copied through buffers, and pages of ``guests`` (endpoints) to which another is given access."""

    def __init__(self, meter: Meter, guests: Iterable[int]) -> None:
        super().__init__()
        self._meter = meter
        self._guests = frozenset(guests)

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
        ours = state.owner in self._guests
        granted = [who for who, access in state.access if ours and who != state.owner and access]
        new = 0
        for page in pages:
            before = self.state(page)
            new += sum(before is None or not before.of(who) for who in granted)
        self._meter.add(What.PAGES_SHARED, new)
        super().set_state(pages, state)


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
