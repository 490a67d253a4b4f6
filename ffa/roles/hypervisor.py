"""The hypervisor: serves VMs, keeps the ownership of their pages, and relays to the SPMC below, if there is one."""

from __future__ import annotations

from collections.abc import Callable

from ffa.abi import messages
from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, Frame, halves, pair
from ffa.abi.ids import (
    BY_FID,
    DIRECT_FRAMEWORK_BIT,
    FLAG_TYPE_MASK,
    FLAG_TYPE_SHIFT,
    GET_FROM_HYP,
    GET_FROM_SP,
    GET_FROM_SPM,
    GET_FROM_VM,
    HANDLE_HYPERVISOR_BIT,
    HYPERVISOR_ID,
    PAGE_SIZE,
    SECURE_BIT,
    TRANSACTION_TYPES,
    Call,
    Error,
    FfaError,
    FrameworkMessage,
    Property,
    fid,
    is_secure,
)
from ffa.abi.layouts import address_range, composite
from ffa.roles.endpoint import Endpoint, Relayer
from ffa.roles.machine import Machine
from ffa.roles.machines import Context
from ffa.roles.manager import Kind, Manager, Served
from ffa.roles.profile import FULL, Profile
from ffa.roles.spmc import ForwardedMap, Spmc
from ffa.roles.teardown import Leaving, listeners, tear_down, tell
from ffa.roles.transactions import Handles, Region

_INVALID = Error.INVALID_PARAMETERS
_DIRECT_REQ2 = fid(Call.MSG_SEND_DIRECT_REQ2)
_PREEMPTIONS = fid(Call.INTERRUPT), fid(Call.YIELD)
_SENDS_FIRST, _SENDS_SECOND = Property.DIRECT_REQ_SEND, Property.DIRECT_REQ2_SEND
_PREEMPTED, _BLOCKED = Context.PREEMPTED, Context.BLOCKED  # members of an enum are slow to find
_CPUS = 256
"""Calls below that may be open at once."""


class Hypervisor(Manager):
    """A hypervisor on ``below``, or alone. Its own buffers with the SPMC are ``buffer_pages`` each, at ``buffers``.

    ``below`` is anything that answers calls of endpoint 0: our SPMC, or a vendor's.
    """

    kind = Kind.VM

    def __init__(
        self,
        machine: Machine,
        below: Relayer | None = None,
        profile: Profile = FULL,
        *,
        buffers: int = 0x1000_0000,
        buffer_pages: int = 4,
        handles: Callable[[], int] | None = None,
    ) -> None:
        """Raises RuntimeError if ``below`` refuses to work with it."""
        super().__init__(HYPERVISOR_ID, machine, profile, handles or Handles(hypervisor=True))
        self.below = below
        self.port = Endpoint(HYPERVISOR_ID, machine, version=profile.version, contexts=_CPUS)
        self.partitions_below: list[messages.PartitionInfo] = []
        self.scheduler: int | None = None  #: the VM that may run others, and hears of their notifications
        self._preempted: dict[tuple[int, int], int] = {}  #: partition and context → VM whose request was interrupted
        self.maps_below = False  #: VMs' buffers are mapped below too, which then owns their RX
        self._answers: dict[tuple[int, int], tuple[bytes, int]] = {}  #: (handle, VM) → retrieve response, bytes read
        self.borrowed: dict[int, set[int]] = {}  #: VM → handles of partitions' memory that it has
        self._leaving: dict[int, Leaving] = {}
        self._heard: dict[int, set[int | None]] = {}  #: VM → what INFO_GET below has told of, not yet passed on
        if below is not None:
            self._connect(below, buffers, buffer_pages)

    def _connect(self, below: Relayer, buffers: int, pages: int) -> None:
        if isinstance(below, Spmc):
            below.attach(self.port, hypervisor=True)
        self.port.relayer = below
        version = self.port.call(Call.VERSION, self.profile.version)[0]
        if version >> 31 or version < self.profile.version:
            raise RuntimeError(f"the SPMC answers FFA_VERSION with {version:#x}: use a profile of its version")
        self.machine.add(HYPERVISOR_ID, buffers, 2 * pages)
        answer = self.port.map_buffers(buffers, buffers + pages * PAGE_SIZE, pages)
        if not answer.ok:
            raise RuntimeError(f"the SPMC answers FFA_RXTX_MAP with {answer!r}")
        self.maps_below = self.port.call(Call.FEATURES, fid(Call.RX_ACQUIRE)).ok
        found = self.port.call(Call.PARTITION_INFO_GET)
        if found.ok:
            data = self.port.got(found[2] * found[3])
            self.partitions_below = messages.parse_infos(data, found[2], self.port.version)
            self.port.call(Call.RX_RELEASE)

    def add(self, endpoint: Endpoint) -> Served:
        """Takes a VM in. Raises ValueError: its id is taken, 0, or one of the secure world; a partition refuses it."""
        if is_secure(endpoint.id) or endpoint.id == HYPERVISOR_ID:
            raise ValueError("a VM's id is from 1 to 0x7fff")
        if endpoint.id in self._leaving:
            raise ValueError(f"endpoint {endpoint.id:#x} is being removed")
        served = super().add(endpoint)
        told: list[int] = []
        for partition in listeners(self, FrameworkMessage.VM_CREATED):
            error = tell(self, partition, FrameworkMessage.VM_CREATED, endpoint.id)
            if error is not None:
                del self.served[endpoint.id]
                for other in told:
                    tell(self, other, FrameworkMessage.VM_DESTROYED, endpoint.id)
                raise ValueError(f"partition {partition:#x} answers a VM {endpoint.id:#x} with {error.name}")
            told.append(partition)
        if self.below is not None and endpoint.properties & Property.NOTIFICATIONS:
            self.port.call(Call.NOTIFICATION_BITMAP_CREATE, endpoint.id, endpoint.contexts)
        return served

    def remove(self, vm: int) -> bool:
        """The VM ``vm`` is gone: it makes no calls any more, partitions are told, and its memory is taken back, zeroed
        and the hypervisor's. False: somebody still has some of it; call again. Raises ValueError: there is no such VM.
        """
        if vm in self.served:
            self._leaving[vm] = Leaving(self.served.pop(vm), listeners(self, FrameworkMessage.VM_DESTROYED))
        leaving = self._leaving.get(vm)
        if leaving is None:
            raise ValueError(f"there is no VM {vm:#x}")
        if not tear_down(self, leaving):
            return False
        del self._leaving[vm]
        for of in [of for of, who in self._preempted.items() if who == vm]:
            del self._preempted[of]
        return True

    def drop_answers(self, vm: int) -> None:
        """The VM reads no further fragment of what it has retrieved from below."""
        for key in [key for key in self._answers if key[1] == vm]:
            del self._answers[key]

    def take_back(self, region: Region) -> None:
        """Ends a region that nobody holds any more; nothing where somebody does."""
        if region.held or (region.below and not self.port.call(Call.MEM_RECLAIM, *halves(region.handle), 0).ok):
            return
        self.transactions.reclaim(region, 0)

    def _ask_below(self, call: Call, *arguments: int, smc64: bool | None = None) -> Frame:
        """A call that must succeed. Raises FfaError: with the SPMC's code."""
        answer = self.port.call(call, *arguments, smc64=smc64)
        return _checked(answer)

    def _is_below(self, id: int) -> bool:
        return any(p.id == id for p in self.partitions_below)

    def may_receive(self, sender: int, receiver: int) -> bool:
        """VMs, and partitions of the SPMC."""
        return receiver in self.served or self._is_below(receiver)

    def is_sender(self, id: int) -> bool:
        """VMs, and partitions of the SPMC."""
        return self.may_receive(HYPERVISOR_ID, id)

    def partitions(self, who: Served) -> list[messages.PartitionInfo]:
        """VMs, and partitions of the SPMC."""
        return super().partitions(who) + self.partitions_below

    def spm_id_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """The SPMC's id; without one there is nothing to tell."""
        if self.below is None:
            raise FfaError(Error.NOT_SUPPORTED)
        return self._ask_below(Call.SPM_ID_GET)

    # -- buffers

    def rxtx_map(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Maps a VM's buffers here, and then below."""
        answer = super().rxtx_map(who, x, vcpu)
        if self.maps_below:
            box = who.buffers()
            pages = box.size // PAGE_SIZE
            parts = [composite.pack(pages, 1) + address_range.pack(at, pages) for at in (box.rx, box.tx)]
            start = ForwardedMap.size
            head = ForwardedMap.pack(endpoint=who.id, rx=start, tx=start + len(parts[0]))
            self.port.put(head + b"".join(parts))
            mapped = self.port.call(Call.RXTX_MAP, 0, 0, 0, smc64=True)
            if not mapped.ok:
                super().rxtx_unmap(who, Frame(x[0]), vcpu)
                raise FfaError(mapped.error or Error.NOT_SUPPORTED)
        return answer

    def rxtx_unmap(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Unmaps a VM's buffers here and below."""
        answer = super().rxtx_unmap(who, x, vcpu)
        if self.maps_below:
            self.port.call(Call.RXTX_UNMAP, who.id << 16)
        return answer

    def rx_release(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """RX belongs to the SPMC where it has mapped it, and goes back there."""
        if not self.maps_below or who.mailbox is None or x[1] & 0xFFFF:
            return super().rx_release(who, x, vcpu)
        self._ask_below(Call.RX_RELEASE, who.id)
        if who.mailbox.state is not who.mailbox.state.EMPTY:
            who.mailbox.release()
        who.message = None
        return Frame.success()

    def msg_wait(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Waiting releases RX, below too."""
        answer = super().msg_wait(who, x, vcpu)
        if self.maps_below and answer.fid == fid(Call.INTERRUPT) and not x[2]:
            self.port.call(Call.RX_RELEASE, who.id)
        return answer

    def claim_rx(self, who: Served) -> None:
        """Acquires a VM's RX from the SPMC."""
        if self.maps_below and not self.port.call(Call.RX_ACQUIRE, who.id).ok:
            raise FfaError(Error.BUSY, "the RX buffer is not released")

    # -- messages

    def direct_request(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Requests to partitions go below as they are."""
        sender, receiver = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        second = x[0] & MASK32 == _DIRECT_REQ2
        framework = not second and x[2] & DIRECT_FRAMEWORK_BIT
        if not receiver & SECURE_BIT or framework or sender != who.id or self.below is None:
            return super().direct_request(who, x, vcpu)
        if not who.endpoint.properties & (_SENDS_SECOND if second else _SENDS_FIRST):
            raise FfaError(Error.DENIED, "the caller may not send direct requests")
        before = who.contexts[vcpu]
        if before is _PREEMPTED:
            raise FfaError(Error.BUSY)
        who.contexts[vcpu] = _BLOCKED
        try:
            answer = self.port.send(x, vcpu)
            return self._preemptible(who, answer) if answer[0] & MASK32 in _PREEMPTIONS else answer
        finally:
            who.contexts[vcpu] = before

    def _preemptible(self, who: Served, answer: Frame) -> Frame:
        """Notes whose request a partition was interrupted in, if it was: nobody else may resume it."""
        if answer[0] & MASK32 in _PREEMPTIONS:
            self._preempted[answer[1] >> 16 & 0xFFFF, answer[1] & 0xFFFF] = who.id
        return answer

    def run(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Partitions are run below, by the VM whose request was interrupted; VMs by the scheduler alone."""
        target = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        if not is_secure(target[0]) or self.below is None:
            if who.id != self.scheduler:
                raise FfaError(Error.DENIED, "for the scheduler only")
            return super().run(who, x, vcpu)
        if not any(p.id == target[0] and target[1] < p.contexts for p in self.partitions_below):
            raise FfaError(_INVALID, "no such partition, or context of it")
        if self._preempted.get(target) != who.id and (target in self._preempted or who.id != self.scheduler):
            raise FfaError(Error.DENIED, "not interrupted in a request of the caller's")
        self._preempted.pop(target, None)
        return self._preemptible(who, self.port.send(x, vcpu))

    def pass_on(self, who: Served, message: messages.Message) -> None:
        """Messages to partitions go below: in the VM's TX, which the SPMC reads, or else in the hypervisor's own."""
        if not is_secure(message.receiver) or self.below is None:
            return super().pass_on(who, message)
        data = messages.build_message(message, self.port.version)
        box = who.buffers()
        if len(data) > (box.size if self.maps_below else self.port.buffer_size):
            raise FfaError(Error.NO_MEMORY)
        where = box.tx if self.maps_below else self.port.tx
        before = self.machine.fetch(where, len(data))
        self.machine.store(where, data)
        try:
            self._ask_below(Call.MSG_SEND2, who.id << 16)
        except FfaError:
            self.machine.store(where, before)
            raise
        return None

    # -- notifications

    def bind(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """What partitions may send is kept below."""
        return self._forward_binding(who, x) or super().bind(who, x, vcpu)

    def unbind(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """What partitions may send is kept below."""
        return self._forward_binding(who, x) or super().unbind(who, x, vcpu)

    def _forward_binding(self, who: Served, x: Frame) -> Frame | None:
        sender, receiver = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        if not is_secure(sender) or self.below is None:
            return None
        if receiver != who.id:
            raise FfaError(_INVALID)
        self.takes_notifications(who)
        return self.port.send(x)

    def notify(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Partitions are signalled below."""
        sender, receiver = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        if is_secure(receiver) and self.below is not None and sender == who.id:
            return self.port.send(x)
        return super().notify(who, x, vcpu)

    def take(self, to: Served, vcpu: int, flags: int) -> tuple[int, ...]:
        """Partitions' and the SPMC's notifications come from below."""
        theirs: tuple[int, ...] = (0,) * 6
        if flags & (GET_FROM_SP | GET_FROM_SPM) and self.below is not None:
            asked = flags & (GET_FROM_SP | GET_FROM_SPM)
            theirs = self._ask_below(Call.NOTIFICATION_GET, vcpu << 16 | to.id, asked)[2:8]
            self._heard.pop(to.id, None)
        mine = super().take(to, vcpu, flags & (GET_FROM_VM | GET_FROM_HYP))
        return tuple(a | b for a, b in zip(mine, theirs, strict=True))

    def pending(self, who: Served) -> list[messages.PendingList]:
        """A VM hears of itself alone, the scheduler of all; of what is here, and of what the SPMC has."""
        self._hear()
        found: dict[int, set[int | None]] = {}
        for id, vcpus in super().pending(who):
            found.setdefault(id, set()).update(vcpus or (None,))
        for s in self.schedules(who):
            if s.id in self._heard:
                found.setdefault(s.id, set()).update(self._heard[s.id])
        out: list[messages.PendingList] = []
        for id, told in found.items():
            single = sorted(v for v in told if v is not None)
            out += [(id, tuple(single[n : n + 3])) for n in range(0, len(single), 3)] or [(id, ())]
        return out

    def _hear(self) -> None:
        """Asks the SPMC what is pending, as often as it takes; an SPMC that never ends is asked no more."""
        for _ in range(_CPUS if self.below is not None else 0):
            answer = self.port.call(Call.NOTIFICATION_INFO_GET, smc64=True)
            if not answer.ok:
                return
            lists, more = messages.parse_pending(answer)
            for vm, vcpus in lists:
                if vm in self.served:
                    self._heard.setdefault(vm, set()).update(vcpus or (None,))
            if not more:
                return

    def schedules(self, who: Served) -> list[Served]:
        """The scheduler hears of all VMs."""
        return list(self.served.values()) if who.id == self.scheduler else [who]

    def mark_listed(self, endpoint: int, vcpus: tuple[int, ...]) -> None:
        """INFO_GET has told of them, whoever had them."""
        super().mark_listed(endpoint, vcpus)
        heard = self._heard.get(endpoint, set())
        heard -= {None, *vcpus}
        if not heard:
            self._heard.pop(endpoint, None)

    # -- memory

    def send(self, region: Region, total: int, buf: bytes) -> int:
        """What partitions borrow, the SPMC gets too, and gives the handle."""
        if self.below is None or not any(is_secure(b) for b in region.borrowers):
            return super().send(region, total, buf)
        region.below = True
        ranges = abi.parse_ranges(buf[region.ranges_at :])
        head = abi.build(self.port.version, region.descriptor, ())[: -composite.size]
        head += composite.pack(region.total, region.range_bytes // abi.RANGE_SIZE)
        blob = head + abi.pack_ranges(ranges)
        whole = len(head) + region.range_bytes
        first = blob[: self.port.buffer_size]
        self.port.put(first)
        answer = _checked(self.port.call(region.call, whole, len(first), smc64=True))
        handle = pair(answer[2], answer[3]) if answer.ok else pair(answer[1], answer[2])
        region.handle = handle
        try:
            self._feed(region, blob[len(first) :])
        except FfaError:
            self._abort_below(handle)
            raise
        self.transactions.enter(region, handle)
        return handle

    def send_more(self, region: Region, data: bytes) -> None:
        """Further fragments go below as they come."""
        if region.below:
            self._feed(region, data)

    def _feed(self, region: Region, data: bytes) -> None:
        """Sends bytes of a descriptor below, in fragments that fit the hypervisor's TX. Raises FfaError."""
        for at in range(0, len(data), self.port.buffer_size):
            part = data[at : at + self.port.buffer_size]
            self.port.put(part)
            owner = region.descriptor.sender << 16
            _checked(self.port.call(Call.MEM_FRAG_TX, *halves(region.handle), len(part), owner))

    def _abort_below(self, handle: int) -> None:
        """An empty fragment ends a transaction that the SPMC waits for."""
        self.port.call(Call.MEM_FRAG_TX, *halves(handle), 0)

    def abandon(self, region: Region) -> None:
        """Ends it below too."""
        super().abandon(region)
        if region.below:
            self._abort_below(region.handle)

    def mem_retrieve(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Memory that a partition has sent to a VM is retrieved below."""
        total, size, address, pages = x[1] & MASK32, x[2] & MASK32, x[3], x[4] & MASK32
        if self.below is None or total != size or who.mailbox is None or (address and not self.profile.dynamic_buffers):
            return super().mem_retrieve(who, x, vcpu)
        buf = self.descriptor(who, size, address, pages)
        request = abi.parse(buf, who.version)
        if request.handle in self.transactions.regions or request.handle & HANDLE_HYPERVISOR_BIT:
            return super().mem_retrieve(who, x, vcpu)
        if not self._rx_free(who):
            raise FfaError(Error.BUSY, "the RX buffer is not released")
        if [r.endpoint for r in request.receivers if not is_secure(r.endpoint)] != [who.id]:
            raise FfaError(_INVALID, "the request is to name the caller, and no other VM")
        self.claim_rx(who)
        answer, blob = self.port.retrieve(request)
        if answer.fid != fid(Call.MEM_RETRIEVE_RESP):
            self._unclaim_rx(who)
            raise FfaError(answer.error or Error.ABORTED)
        found = abi.parse(blob, self.port.version)
        if not found.receivers:
            raise FfaError(Error.ABORTED, "the SPMC's answer names nobody")
        ranges = abi.parse_ranges(blob[abi.parse_composite(blob, found.receivers[0].composite).ranges :])
        blob = abi.build(who.version, found, ranges)
        cut = who.mailbox.size
        if len(blob) > cut:
            self._answers[request.handle, who.id] = (blob, cut)
        if found.flags & FLAG_TYPE_MASK != TRANSACTION_TYPES[Call.MEM_DONATE] << FLAG_TYPE_SHIFT:
            self.borrowed.setdefault(who.id, set()).add(request.handle)
        who.mailbox.deliver(blob[:cut])
        self.consumed(who, size, address)
        return Frame.of(Call.MEM_RETRIEVE_RESP, len(blob), min(cut, len(blob)))

    def _unclaim_rx(self, who: Served) -> None:
        if self.maps_below:
            self.port.call(Call.RX_RELEASE, who.id)

    def mem_frag_rx(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """Of responses that came from below, the hypervisor has the whole."""
        key = (pair(x[1], x[2]), who.id)
        if key not in self._answers or who.mailbox is None:
            return super().mem_frag_rx(who, x, vcpu)
        blob, read = self._answers[key]
        if x[3] != read or x[4]:
            raise FfaError(_INVALID)
        part = blob[read : read + who.mailbox.size]
        self.deliver(who, part)
        if read + len(part) == len(blob):
            del self._answers[key]
        else:
            self._answers[key] = (blob, read + len(part))
        return Frame.of(Call.MEM_FRAG_TX, x[1], x[2], len(part))

    def relinquish(self, who: Served, request: abi.Relinquish) -> None:
        """Of memory that a partition has sent, the SPMC is told."""
        handle = request.handle
        if self.below is None or handle in self.transactions.regions or handle & HANDLE_HYPERVISOR_BIT:
            return super().relinquish(who, request)
        if request.endpoints != (who.id,) or (handle, who.id) in self._answers:
            raise FfaError(_INVALID)
        self.port.put(abi.build_relinquish(handle, who.id, flags=request.flags))
        self._ask_below(Call.MEM_RELINQUISH)
        self.borrowed.get(who.id, set()).discard(handle)
        return None

    def mem_reclaim(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """The SPMC is asked first: its partitions may still have the memory."""
        handle = pair(x[1], x[2])
        region = self.transactions.look_at_reclaim(who.id, handle, x[3])
        if region.below:
            answer = self.port.call(Call.MEM_RECLAIM, x[1], x[2], x[3])
            if answer.error is Error.INVALID_PARAMETERS and region.call is Call.MEM_DONATE:
                self.transactions.forget(region)  # it has its new owner
            _checked(answer)
        self.transactions.reclaim(region, x[3])
        return Frame.success()


def _checked(answer: Frame) -> Frame:
    """``answer``, if it is no error. Raises FfaError: with its code."""
    function = BY_FID.get(answer.fid)
    if function is None or function[0].call is Call.ERROR:
        raise FfaError(answer.error or Error.ABORTED)
    return answer
