"""The SPMC: serves secure partitions, and the operating system or hypervisor of the normal world as endpoint 0.

TF-A's SPMD, which stands between the worlds, is part of it: the normal world sees one answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from construct import Int16ul, Int32ul, Struct

from ffa.abi import messages
from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, Frame, pair
from ffa.abi.ids import (
    DIRECT_FRAMEWORK_BIT,
    FLAG_TYPE_SHIFT,
    HYPERVISOR_ID,
    PAGE_SIZE,
    RX_FULL,
    SPMC_ID,
    TRANSACTION_TYPES,
    Call,
    Error,
    FfaError,
    FrameworkMessage,
    Property,
    is_secure,
)
from ffa.roles.endpoint import Endpoint
from ffa.roles.machine import Machine
from ffa.roles.machines import Context, RxEvent
from ffa.roles.mailbox import Mailbox
from ffa.roles.manager import Kind, Manager, Served
from ffa.roles.profile import FULL, Profile
from ffa.roles.transactions import Handles
from pyvhost.codec import Codec, Reserved
from pyvhost.errors import FormatError

ForwardedMap = Codec(
    "ForwardedMap",
    Struct(
        "endpoint" / Int16ul * "VM whose buffers these are",
        Reserved(2),
        "rx" / Int32ul * "offset of the composite descriptor of RX",
        "tx" / Int32ul * "offset of that of TX",
        Reserved(4),
    ),
)
"""What a hypervisor puts into its TX buffer to map a VM's buffers for the SPMC (endpoint RX/TX descriptor)."""


_AVAILABILITY = {
    DIRECT_FRAMEWORK_BIT | FrameworkMessage.VM_CREATED: Property.VM_CREATED,
    DIRECT_FRAMEWORK_BIT | FrameworkMessage.VM_DESTROYED: Property.VM_DESTROYED,
}
"""w2 of a framework message of a hypervisor's → the property of partitions that get it."""


class Spmc(Manager):
    """An SPMC. ``attach()`` puts the normal world on top of it, ``add()`` takes secure partitions in."""

    kind = Kind.SP

    def __init__(
        self,
        machine: Machine,
        profile: Profile = FULL,
        *,
        id: int = SPMC_ID,
        handles: Callable[[], int] | None = None,
    ) -> None:
        super().__init__(id, machine, profile, handles or Handles(hypervisor=False))
        self.stacked = False  #: endpoint 0 is a hypervisor, and speaks for its VMs
        self.vms: dict[int, Served] = {}  #: normal-world endpoints whose notifications are kept here
        self.vm_buffers: dict[int, Mailbox] = {}
        self._described: tuple[int, bytes, int] | None = None  #: handle, description for a hypervisor, bytes read of it

    def attach(self, endpoint: Endpoint, *, hypervisor: bool = False) -> None:
        """Puts the operating system, or a hypervisor, on top. Raises ValueError: there is one, or its id is not 0."""
        if endpoint.id != HYPERVISOR_ID:
            raise ValueError("the normal world's endpoint at an SPMC has id 0")
        self._add(endpoint, Kind.OS)
        self.stacked = hypervisor

    def add(self, endpoint: Endpoint) -> Served:
        """Takes a secure partition in. Raises ValueError: its id is taken, or not one of the secure world."""
        if not is_secure(endpoint.id) or endpoint.id == self.id:
            raise ValueError("a secure partition's id has bit 15 set, and is not the SPMC's")
        return super().add(endpoint)

    def _relays(self, who: Served) -> bool:
        return self.stacked and who.kind is Kind.OS

    def speaks_for(self, caller: int, sender: int) -> bool:
        """A hypervisor speaks for every VM."""
        return caller == sender or (self.stacked and caller == HYPERVISOR_ID and not is_secure(sender))

    def may_receive(self, sender: int, receiver: int) -> bool:
        """Partitions may; VMs too, as the hypervisor says."""
        if is_secure(receiver):
            return receiver in self.served
        return self.stacked or receiver == HYPERVISOR_ID

    def keeps(self, who: Served) -> bool:
        """What VMs send, their hypervisor keeps."""
        return self.profile.owner_checks and not self._relays(who)

    def actor(self, who: Served, named: Sequence[int]) -> int:
        """For a hypervisor, the one VM among those named."""
        if not self._relays(who):
            return who.id
        vms = [id for id in named if not is_secure(id)]
        if len(vms) != 1:
            raise FfaError(Error.INVALID_PARAMETERS, "one VM at a time")
        return vms[0]

    def describe_all(self, who: Served, request: abi.Transaction, size: int) -> bytes | None:
        """A hypervisor that names no receiver asks what a VM of its own has sent, and takes nothing."""
        if not self._relays(who) or request.receivers:
            return None
        region = self.transactions.find(request.handle)
        sent = region.descriptor
        if not region.complete or is_secure(sent.sender):
            raise FfaError(Error.INVALID_PARAMETERS)
        flags = sent.flags | TRANSACTION_TYPES[region.call] << FLAG_TYPE_SHIFT
        answer = abi.build(who.version, replace(sent, handle=region.handle, flags=flags), region.ranges)
        self._described = (region.handle, answer, size) if len(answer) > size else None
        return answer

    def mem_frag_rx(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A hypervisor also reads the rest of a description."""
        handle = pair(x[1], x[2])
        if (
            not self._relays(who)
            or self._described is None
            or (handle, x[3]) != (self._described[0], self._described[2])
        ):
            return super().mem_frag_rx(who, x, vcpu)
        region = self.transactions.find(handle)
        if (x[4] >> 16) not in (0, region.descriptor.sender) or x[4] & 0xFFFF:
            raise FfaError(Error.INVALID_PARAMETERS)
        _, whole, read = self._described
        part = whole[read : read + who.buffers().size]
        self.deliver(who, part)
        self._described = (handle, whole, read + len(part)) if read + len(part) < len(whole) else None
        return Frame.of(Call.MEM_FRAG_TX, x[1], x[2], len(part))

    # -- buffers of VMs

    def rxtx_map(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A hypervisor maps a VM's buffers by a descriptor in its own TX."""
        if not self._relays(who) or any(x[1:4]):
            answer = super().rxtx_map(who, x, vcpu)
            self._reserve(who)
            return answer
        if who.mailbox is None:
            raise FfaError(Error.INVALID_PARAMETERS, "the hypervisor has no buffers of its own")
        box = who.mailbox
        buf = box.take(box.size)
        try:
            head = ForwardedMap.unpack(buf)
        except FormatError as e:
            raise FfaError(Error.INVALID_PARAMETERS, str(e)) from None
        tx, pages = _one_range(buf, head.tx)
        rx, same = _one_range(buf, head.rx)
        if is_secure(head.endpoint) or pages != same or pages > self.profile.max_buffer_pages:
            raise FfaError(Error.INVALID_PARAMETERS)
        if head.endpoint in self.vm_buffers:
            raise FfaError(Error.DENIED, "buffers are mapped already")
        regions = self.machine.regions_of([(tx, pages), (rx, pages)])
        if any(r is None or r.secure or r.device for r in regions):
            raise FfaError(Error.DENIED, "buffers outside the normal world's memory")
        mapped = Mailbox(self.machine, tx, rx, pages * PAGE_SIZE)
        if len(set(mapped.pages)) != 2 * pages:
            raise FfaError(Error.INVALID_PARAMETERS, "buffers that overlap")
        if not self.transactions.reserved.isdisjoint(mapped.pages):
            raise FfaError(Error.DENIED, "somebody's buffers already")
        self.vm_buffers[head.endpoint] = mapped
        self._reserve(who)
        box.poison_tx(box.size)
        return Frame.success()

    def rxtx_unmap(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A hypervisor names the VM in w1."""
        vm = x[1] >> 16 & 0xFFFF
        if not self._relays(who) or not vm:
            answer = super().rxtx_unmap(who, x, vcpu)
        elif self.vm_buffers.pop(vm, None) is None:
            raise FfaError(Error.INVALID_PARAMETERS)
        else:
            answer = Frame.success()
        self._reserve(who)
        return answer

    def _reserve(self, who: Served) -> None:
        """Of what a hypervisor sends, only buffers are known here not to be free."""
        if self._relays(who):
            boxes = [*self.vm_buffers.values(), *([who.mailbox] if who.mailbox is not None else [])]
            self.transactions.reserved = {page for box in boxes for page in box.pages}

    def _vm_box(self, who: Served, vm: int) -> Mailbox:
        box = self.vm_buffers.get(vm) if self._relays(who) else None
        if box is None:
            raise FfaError(Error.INVALID_PARAMETERS, f"no buffers of VM {vm:#x}")
        return box

    def rx_acquire(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_RX_ACQUIRE: a hypervisor is to write into a VM's RX."""
        if not self.stacked:
            raise FfaError(Error.NOT_SUPPORTED)
        if not self._vm_box(who, x[1] & 0xFFFF).step(RxEvent.ACQUIRE):
            raise FfaError(Error.DENIED, "the RX buffer is not released")
        return Frame.success()

    def rx_release(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A hypervisor names the VM in w1."""
        vm = x[1] & 0xFFFF
        if not self._relays(who) or not vm:
            return super().rx_release(who, x, vcpu)
        self._vm_box(who, vm).release()
        return Frame.success()

    # -- direct messages

    def framework_message(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A hypervisor may tell partitions of its VMs, if they want to know."""
        if not self._relays(who):
            return super().framework_message(who, x, vcpu)
        wanted = _AVAILABILITY.get(x[2] & MASK32)
        if wanted is None or x[1] >> 16 & 0xFFFF != HYPERVISOR_ID or any((*x[3:5], *x[6:8])):
            raise FfaError(Error.INVALID_PARAMETERS)
        if not 0 < x[5] < SPMC_ID:
            raise FfaError(Error.INVALID_PARAMETERS, "no VM's id")
        to = self.served.get(x[1] & 0xFFFF)
        if to is not None and not to.endpoint.properties & wanted:
            raise FfaError(Error.DENIED, "the partition does not want to know")
        return self.ask(who, x[1] & 0xFFFF, x, vcpu)

    # -- indirect messages

    def msg_send2(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A hypervisor names the sending VM in w1; the message is in the VM's TX if that is mapped here, else in the
        hypervisor's own; its layout is that of the hypervisor's version."""
        sender = x[1] >> 16 & 0xFFFF
        if not self._relays(who) or not sender:
            return super().msg_send2(who, x, vcpu)
        if x[1] & 0xFFFF or x[2]:
            raise FfaError(Error.INVALID_PARAMETERS)
        box = self.vm_buffers.get(sender) or who.buffers()
        message = messages.parse_message(box.take(box.size), who.version)
        if message.sender != sender or not is_secure(message.receiver):
            raise FfaError(Error.INVALID_PARAMETERS)
        self.pass_on(who, message)
        box.poison_tx(messages.header_size(who.version) + len(message.payload))
        return Frame.success()

    def pass_on(self, who: Served, message: messages.Message) -> None:
        """Messages of partitions to VMs go straight into the VM's RX."""
        to = self.vms.get(message.receiver)
        box = self.vm_buffers.get(message.receiver)
        if is_secure(message.receiver) or to is None or box is None:
            return super().pass_on(who, message)
        data = messages.build_message(message, to.version)
        if len(data) > box.size:
            raise FfaError(Error.NO_MEMORY)
        box.deliver(data)
        to.framework |= RX_FULL
        return None

    # -- notifications

    def bitmap_create(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_BITMAP_CREATE: VM in w1, its vCPUs in w2."""
        vm, count = x[1], x[2]
        if not self._names_vm(vm) or not 0 < count <= 0xFFFF:
            raise FfaError(Error.INVALID_PARAMETERS)
        if vm in self.vms:
            raise FfaError(Error.DENIED, "created already")
        endpoint = Endpoint(vm, self.machine, contexts=count, properties=Property.NOTIFICATIONS)
        self.vms[vm] = Served(endpoint, Kind.VM, who.version, contexts=[Context.WAITING] * count)
        return Frame.success()

    def bitmap_destroy(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_BITMAP_DESTROY: VM in w1."""
        vm = x[1]
        found = self.vms.get(vm)
        if not self._names_vm(vm) or x[2]:
            raise FfaError(Error.INVALID_PARAMETERS)
        if found is None:
            raise FfaError(Error.DENIED, "no bitmap was created")
        if found.from_sp.bound or found.from_sp.any_pending or found.framework:
            raise FfaError(Error.DENIED, "notifications are bound or pending")
        del self.vms[vm]
        return Frame.success()

    def _names_vm(self, vm: int) -> bool:
        return vm < SPMC_ID and (self.stacked or vm == HYPERVISOR_ID)

    def receiver(self, who: Served, id: int) -> Served:
        """A partition names itself; the normal world a VM that has a bitmap."""
        if who.kind is Kind.SP:
            return super().receiver(who, id)
        found = self.vms.get(id)
        if found is None or not self._names_vm(id):
            raise FfaError(Error.INVALID_PARAMETERS, "no notification bitmap was created")
        return found

    def is_sender(self, id: int) -> bool:
        """Partitions, and VMs as the hypervisor says."""
        return id in self.served if is_secure(id) else self.stacked or id == HYPERVISOR_ID

    def notify_receiver(self, sender: int, receiver: int, bits: int, vcpu: int | None) -> None:
        """Partitions signal VMs too; VMs signal partitions alone."""
        to = self.vms.get(receiver)
        if is_secure(receiver) or not is_secure(sender) or to is None:
            if not is_secure(receiver):
                raise FfaError(Error.INVALID_PARAMETERS)
            return super().notify_receiver(sender, receiver, bits, vcpu)
        if vcpu is not None and vcpu >= len(to.contexts):
            raise FfaError(Error.INVALID_PARAMETERS)
        to.from_sp.set(sender, bits, vcpu)
        return None

    def schedules(self, who: Served) -> list[Served]:
        """The normal world schedules VMs and partitions alike."""
        return [*self.vms.values(), *(s for s in self.served.values() if s.kind is Kind.SP)]

    def mark_listed(self, endpoint: int, vcpus: tuple[int, ...]) -> None:
        """INFO_GET has told of them."""
        s = self.served[endpoint] if is_secure(endpoint) else self.vms[endpoint]
        s.from_sp.listed |= {None, *vcpus}
        s.from_vm.listed |= {None, *vcpus}


def _one_range(buf: bytes, offset: int) -> abi.AddressRange:
    """The one range of a composite descriptor. Raises FfaError."""
    composite = abi.parse_composite(buf, offset)
    found = abi.parse_ranges(buf[composite.ranges : composite.ranges + abi.RANGE_SIZE])
    if composite.count != 1 or not found or found[0][1] != composite.pages:
        raise FfaError(Error.INVALID_PARAMETERS, "a buffer is one range")
    return found[0]
