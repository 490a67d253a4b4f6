"""What a hypervisor does when a VM comes or goes: partitions that want to know are told, and what it had is taken back.

Framework messages are FF-A's "VM availability" messages; a partition asks for them by its properties.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, halves
from ffa.abi.ids import (
    DIRECT_FRAMEWORK_BIT,
    GET_FROM_HYP,
    GET_FROM_SP,
    GET_FROM_SPM,
    GET_FROM_VM,
    HYPERVISOR_ID,
    PAGE_SIZE,
    Call,
    Error,
    FrameworkMessage,
    Property,
    fid,
)
from ffa.roles.machine import exclusive
from ffa.roles.machines import Borrower
from ffa.roles.manager import Served

if TYPE_CHECKING:
    from ffa.roles.hypervisor import Hypervisor

log = logging.getLogger(__name__)

_WANTS = {FrameworkMessage.VM_CREATED: Property.VM_CREATED, FrameworkMessage.VM_DESTROYED: Property.VM_DESTROYED}
_AGAIN = frozenset({Error.RETRY, Error.INTERRUPTED, Error.BUSY})
"""Answers after which a message is sent again."""
_ALL_BITMAPS = GET_FROM_SP | GET_FROM_VM | GET_FROM_SPM | GET_FROM_HYP


@dataclass(slots=True, eq=False)
class Leaving:
    """A VM that makes no calls any more, and of which not all is taken back yet."""

    served: Served
    untold: list[int] = field(default_factory=list)  #: partitions that have not said that they are done with it


def listeners(hypervisor: Hypervisor, message: FrameworkMessage) -> list[int]:
    """Partitions of the SPMC that want to hear of it."""
    return [p.id for p in hypervisor.partitions_below if p.properties & _WANTS[message]]


def tell(hypervisor: Hypervisor, partition: int, message: FrameworkMessage, vm: int) -> Error | None:
    """Sends one framework message; None: the partition has taken it."""
    words = partition, DIRECT_FRAMEWORK_BIT | message, 0, 0, vm
    answer = hypervisor.port.call(Call.MSG_SEND_DIRECT_REQ, *words)
    if answer.fid != fid(Call.MSG_SEND_DIRECT_RESP):
        return answer.error or Error.BUSY  # interrupted, or refused
    answer = answer.narrow
    if answer[2] != DIRECT_FRAMEWORK_BIT | message + 1:
        return Error.ABORTED
    return (Frame(fid(Call.ERROR), 0, answer[3]).error or Error.ABORTED) if answer[3] else None


def tear_down(hypervisor: Hypervisor, leaving: Leaving) -> bool:
    """Takes back what can be now; whether that was all. Its pages are zeroed then, and the hypervisor's."""
    vm, transactions = leaving.served, hypervisor.transactions
    if vm.mailbox is not None:
        hypervisor.rxtx_unmap(vm, Frame.of(Call.RXTX_UNMAP), 0)
    for handle in hypervisor.borrowed.pop(vm.id, set()):  # from partitions
        hypervisor.port.put(abi.build_relinquish(handle, vm.id))
        hypervisor.port.call(Call.MEM_RELINQUISH)
    hypervisor.drop_answers(vm.id)
    for region in list(transactions.regions.values()):
        borrower = region.borrowers.get(vm.id)
        if borrower is not None and borrower.state is not Borrower.INVITED:
            borrower.state = Borrower.HOLDING  # it reads no further fragment
            transactions.let_go(region, vm.id)
        if region.descriptor.sender == vm.id and not region.complete:
            hypervisor.abandon(region)
    for partition in list(leaving.untold):
        error = tell(hypervisor, partition, FrameworkMessage.VM_DESTROYED, vm.id)
        if error not in _AGAIN:
            leaving.untold.remove(partition)
            if error is not None:
                log.warning("partition %#x answers the end of VM %#x with %s", partition, vm.id, error.name)
    for region in [r for r in transactions.regions.values() if r.descriptor.sender == vm.id]:
        hypervisor.take_back(region)
    if leaving.untold or transactions.count(vm.id):
        return False
    _end_notifications(hypervisor, vm)
    machine = hypervisor.machine
    pages = [page for page, state in machine.states.items() if state == exclusive(vm.id)]
    for own in [region for region in machine.regions if region.owner == vm.id]:
        pages += [page for page in range(own.first, own.end) if page not in machine.states]
    machine.clear([(page * PAGE_SIZE, 1) for page in pages])
    machine.set_state(pages, exclusive(HYPERVISOR_ID))
    return True


def _end_notifications(hypervisor: Hypervisor, vm: Served) -> None:
    """Its bitmap below goes, with all that is bound or pending in it."""
    for vcpu in range(len(vm.contexts)):
        hypervisor.port.call(Call.NOTIFICATION_GET, vcpu << 16 | vm.id, _ALL_BITMAPS)
    for partition in hypervisor.partitions_below:
        for bit in range(64):
            hypervisor.port.call(Call.NOTIFICATION_UNBIND, partition.id << 16 | vm.id, 0, *halves(1 << bit))
    hypervisor.port.call(Call.NOTIFICATION_BITMAP_DESTROY, vm.id)
