"""Notifications. Interrupts that announce them are left out: what is pending is read by FFA_NOTIFICATION_INFO_GET."""

from __future__ import annotations

from ffa.abi import messages
from ffa.abi.frame import Frame, halves
from ffa.abi.ids import NOTIFY_PER_VCPU, Call, Error, fid, is_secure
from ffa.conformance.bench import EL0, NOBODY, SPS
from ffa.conformance.registry import NOTIFICATIONS, case
from ffa.conformance.run import Run

BIND, UNBIND = Call.NOTIFICATION_BIND, Call.NOTIFICATION_UNBIND
SET, GET, INFO = Call.NOTIFICATION_SET, Call.NOTIFICATION_GET, Call.NOTIFICATION_INFO_GET
CREATE, DESTROY = Call.NOTIFICATION_BITMAP_CREATE, Call.NOTIFICATION_BITMAP_DESTROY
FROM_ALL = 0xF
BITS = 1 << 63 | 1 << 32 | 1
"""In both registers of a bitmap."""


def _ids(sender: int, receiver: int) -> int:
    return sender << 16 | receiver


def _where(sender: int) -> slice:
    return slice(2, 4) if is_secure(sender) else slice(4, 6)


def _binding(t: Run, call: Call) -> None:
    """What both FFA_NOTIFICATION_BIND and _UNBIND refuse."""
    for receiver, sender in ((1, SPS[0]), (1, 2), (SPS[0], 1), (SPS[0], SPS[1])):
        for what, ids, bits in (
            ("an unknown sender", _ids(NOBODY | ((sender | receiver) & 0x8000), receiver), 1),
            ("for another", _ids(sender, SPS[2] if is_secure(receiver) else 2 if sender != 2 else 4), 1),
            ("an unknown receiver", _ids(sender, NOBODY | receiver & 0x8000), 1),
            ("of itself", _ids(receiver, receiver), 1),
            ("no notifications", _ids(sender, receiver), 0),
        ):
            t.fails(t.call(receiver, call, ids, 0, bits), Error.INVALID_PARAMETERS, what)
        reserved = t.call(receiver, call, _ids(sender, receiver), 0x10, 1)
        t.fails(reserved, Error.INVALID_PARAMETERS, "reserved flags")
        beyond = t.call(receiver, call, _ids(sender, receiver), 0, 1, 0, 1)
        t.fails(beyond, Error.INVALID_PARAMETERS, "w5 must be zero")


@case(NOTIFICATIONS)
def notification_bind(t: Run) -> None:
    _binding(t, BIND)
    for receiver, sender in ((1, SPS[0]), (SPS[0], 1), (SPS[0], SPS[1]), (2, 1)):
        ids = _ids(sender, receiver)
        t.ok(t.call(receiver, BIND, ids, 0, *halves(BITS)), f"{receiver:#x} binds some to {sender:#x}")
        t.fails(t.call(receiver, BIND, ids, 0, 1), Error.DENIED, "one is bound already")
        t.ok(t.call(receiver, BIND, ids, NOTIFY_PER_VCPU, 2), "binds another for single vCPUs")
    third = t.call(1, BIND, _ids(SPS[1], 1), 0, 1)
    t.fails(third, Error.DENIED, "it is bound to another partition")


@case(NOTIFICATIONS)
def notification_unbind(t: Run) -> None:
    _binding(t, UNBIND)
    for receiver, sender in ((1, SPS[0]), (SPS[0], 1), (SPS[0], SPS[1]), (2, 1)):
        ids = _ids(sender, receiver)
        t.fails(t.call(receiver, UNBIND, ids, 0, 1), Error.DENIED, "none is bound")
        t.ok(t.call(receiver, BIND, ids, 0, 1), f"{receiver:#x} binds one to {sender:#x}")
        t.fails(t.call(receiver, UNBIND, ids, 0, 3), Error.DENIED, "one of two is not bound")
        t.ok(t.call(sender, SET, _ids(sender, receiver), 0, 1), "it is set")
        t.fails(t.call(receiver, UNBIND, ids, 0, 1), Error.DENIED, "it is pending")
        t.equal(t.ok(t.call(receiver, GET, receiver, FROM_ALL), "gets it")[_where(sender)], (1, 0), "it was kept")
        t.ok(t.call(receiver, UNBIND, ids, 0, 1), "unbinds it")
        t.fails(t.call(sender, SET, _ids(sender, receiver), 0, 1), Error.DENIED, "it is bound no more")
        t.ok(t.call(receiver, BIND, ids, NOTIFY_PER_VCPU, 1), "it can be bound again")


@case(NOTIFICATIONS)
def notification_get(t: Run) -> None:
    for id in (1, SPS[0]):
        for what, w1, w2 in (
            ("an unknown receiver", NOBODY | id & 0x8000, 2),
            ("another's", 2 if id == 1 else SPS[1], 2),
            ("a vCPU that it does not have", 9 << 16 | id, 2),
            ("reserved flags", id, 0x10),
        ):
            t.fails(t.call(id, GET, w1, w2), Error.INVALID_PARAMETERS, what)
        t.equal(t.call(id, GET, id, FROM_ALL), Frame.success(), f"{id:#x} has none")
    for sender, receiver in ((SPS[0], 1), (2, 1), (SPS[0], SPS[1]), (1, SPS[1])):
        t.ok(t.call(receiver, BIND, _ids(sender, receiver), 0, *halves(BITS)), "binds some")
        t.ok(t.call(sender, SET, _ids(sender, receiver), 0, *halves(BITS)), "they are set")
        other = 2 if is_secure(sender) else 1
        t.equal(t.call(receiver, GET, receiver, other), Frame.success(), "they are not those of the other world")
        mine = 1 if is_secure(sender) else 2
        t.equal(t.call(receiver, GET, receiver, mine)[_where(sender)], halves(BITS), "they are told")
        t.equal(t.call(receiver, GET, receiver, FROM_ALL), Frame.success(), "once")


@case(NOTIFICATIONS)
def notification_set(t: Run) -> None:
    for sender, receiver in ((1, SPS[0]), (SPS[0], 1), (1, 2), (SPS[1], SPS[0])):
        t.restart()
        ids = _ids(sender, receiver)
        t.fails(t.call(sender, SET, ids, 0, 1), Error.DENIED, "none is bound")
        t.ok(t.call(receiver, BIND, ids, 0, 1), f"{receiver:#x} binds one to {sender:#x}")
        t.ok(t.call(receiver, BIND, ids, NOTIFY_PER_VCPU, 2), "and one for single vCPUs")
        for what, w1, w2, bits in (
            ("an unknown receiver", _ids(sender, NOBODY | receiver & 0x8000), 0, 1),
            ("an unknown sender", _ids(NOBODY | sender & 0x8000, receiver), 0, 1),
            ("in another's name", _ids(SPS[2] if is_secure(sender) else 3, receiver), 0, 1),
            ("to itself", _ids(sender, sender), 0, 1),
            ("no notifications", ids, 0, 0),
            ("a vCPU for a global one", ids, 1 << 16, 1),
            ("that of a vCPU as a global one", ids, 0, 2),
            ("a global one as that of a vCPU", ids, NOTIFY_PER_VCPU, 1),
            ("a vCPU that it does not have", ids, 9 << 16 | NOTIFY_PER_VCPU, 2),
            ("reserved flags", ids, 0x10, 1),
        ):
            t.fails(t.call(sender, SET, w1, w2, bits), Error.INVALID_PARAMETERS, what)
        t.fails(t.call(sender, SET, ids, 0, 5), Error.DENIED, "one of two is not bound")
        third = SPS[2] if is_secure(sender) else 4
        t.fails(t.call(third, SET, _ids(third, receiver), 0, 1), Error.DENIED, "bound to another")
        t.equal(t.call(receiver, GET, receiver, FROM_ALL), Frame.success(), "none of these set anything")
        delayed = t.call(sender, SET, ids, 2, 1)
        if is_secure(sender):
            t.ok(delayed, "a partition delays the interrupt")
        else:
            t.fails(delayed, Error.INVALID_PARAMETERS, "only partitions delay the interrupt")


@case(NOTIFICATIONS)
def notification_info_get(t: Run) -> None:
    for id in (1, 2):
        for smc64 in (False, True):
            t.fails(t.call(id, INFO, smc64=smc64), Error.NO_DATA, f"{id:#x} asks, nothing is pending")
            t.fails(t.call(id, INFO, 1, smc64=smc64), Error.INVALID_PARAMETERS, "registers must be zero")
    t.fails(t.call(SPS[0], INFO), Error.NOT_SUPPORTED, "partitions schedule nobody")
    t.ok(t.call(1, BIND, _ids(SPS[0], 1), 0, 1), "binds")
    t.ok(t.call(SPS[0], SET, _ids(SPS[0], 1), 0, 1), "it is set")
    lists = messages.parse_pending(t.ok(t.call(1, INFO, smc64=True), "asks"))
    t.equal(lists, ([(1, ())], False), "the VM is told of itself")
    t.fails(t.call(1, INFO, smc64=True), Error.NO_DATA, "once")


@case(NOTIFICATIONS)
def notification_comp(t: Run) -> None:
    for id in (1, SPS[0]):
        told = {call: t.call(id, Call.FEATURES, fid(call)).ok for call in (BIND, UNBIND, SET, GET)}
        t.equal(set(told.values()), {True}, f"{id:#x} is told of all that it needs")
    t.fails(t.call(1, Call.FEATURES, fid(CREATE)), Error.NOT_SUPPORTED, "VMs create no bitmaps")
    t.fails(t.call(SPS[0], Call.FEATURES, fid(INFO)), Error.NOT_SUPPORTED, "partitions schedule nobody")
    t.fails(t.call(5, Call.FEATURES, fid(BIND)), Error.NOT_SUPPORTED, "1.0 has no notifications")


@case(NOTIFICATIONS)
def notification_bitmap_create(t: Run) -> None:
    t.restart(host=True)
    for what, vm, count in (("a partition's id", SPS[0], 1), ("no VM is there", 5, 1), ("no vCPUs", 0, 0)):
        t.fails(t.call(0, CREATE, vm, count), Error.INVALID_PARAMETERS, what)
    t.fails(t.call(0, BIND, _ids(SPS[0], 0), 0, 1), Error.INVALID_PARAMETERS, "there is no bitmap yet")
    t.ok(t.call(0, CREATE, 0, 2), "creates")
    t.fails(t.call(0, CREATE, 0, 2), Error.DENIED, "creates twice")
    t.ok(t.call(0, BIND, _ids(SPS[0], 0), 0, 1), "binds")
    t.fails(t.call(SPS[0], CREATE, 0, 1), Error.NOT_SUPPORTED, "a partition creates one")
    t.restart()
    t.fails(t.call(1, CREATE, 1, 1), Error.NOT_SUPPORTED, "a VM creates one")


@case(NOTIFICATIONS)
def notification_bitmap_destroy(t: Run) -> None:
    t.restart(host=True)
    t.fails(t.call(0, DESTROY, 0), Error.DENIED, "there is none")
    t.ok(t.call(0, CREATE, 0, 1), "creates")
    for vm in (SPS[0], 5):
        t.fails(t.call(0, DESTROY, vm), Error.INVALID_PARAMETERS, f"{vm:#x} has none")
    t.fails(t.call(0, DESTROY, 0, 1), Error.INVALID_PARAMETERS, "w2 must be zero")
    t.ok(t.call(0, BIND, _ids(SPS[0], 0), 0, 1), "binds one")
    t.fails(t.call(0, DESTROY, 0), Error.DENIED, "one is bound")
    t.ok(t.call(0, UNBIND, _ids(SPS[0], 0), 0, 1), "unbinds it")
    t.ok(t.call(0, DESTROY, 0), "destroys")
    t.fails(t.call(0, DESTROY, 0), Error.DENIED, "destroys twice")
    t.restart()
    for id in (1, SPS[0]):
        t.fails(t.call(id, DESTROY, id), Error.NOT_SUPPORTED, f"{id:#x} destroys one")


def _vm_to_sp(t: Run, sp: int, per_vcpu: bool) -> None:
    """A VM signals a partition: bound, listed to the scheduler, delivered once, unbound."""
    t.restart(host=True)
    t.ok(t.call(0, Call.FEATURES, 2), "there is a schedule receiver interrupt")
    t.ok(t.call(0, CREATE, 0, 2), "the normal world has a bitmap")
    vcpu = t.endpoint(sp).contexts - 1 if per_vcpu else 0
    flags, ids = (NOTIFY_PER_VCPU if per_vcpu else 0), _ids(0, sp)
    t.ok(t.call(sp, BIND, ids, flags, *halves(BITS)), "the partition binds")
    t.ok(t.call(0, SET, ids, vcpu << 16 | flags, *halves(BITS)), "the normal world signals")
    found = messages.parse_pending(t.ok(t.call(0, INFO, smc64=True), "asks what is pending"))
    t.equal(found, ([(sp, (vcpu,) if per_vcpu else ())], False), "the partition is listed")
    t.fails(t.call(0, INFO, smc64=True), Error.NO_DATA, "once")
    if vcpu:
        t.equal(t.call(sp, GET, sp, FROM_ALL), Frame.success(), "another vCPU has none")
    got = t.ok(t.call(sp, GET, vcpu << 16 | sp, FROM_ALL), "the partition gets")
    t.equal(got[2:8], (0, 0, *halves(BITS), 0, 0), "what was signalled")
    t.equal(t.call(sp, GET, vcpu << 16 | sp, FROM_ALL), Frame.success(), "once")
    t.ok(t.call(sp, UNBIND, ids, 0, *halves(BITS)), "it unbinds")
    t.ok(t.call(0, DESTROY, 0), "the bitmap is destroyed")
    t.restart()
    ids = _ids(1, sp)
    t.ok(t.call(sp, BIND, ids, flags, *halves(BITS)), "the same with a VM")
    t.ok(t.call(1, SET, ids, vcpu << 16 | flags, *halves(BITS)), "the VM signals")
    got = t.ok(t.call(sp, GET, vcpu << 16 | sp, FROM_ALL), "the partition gets")
    t.equal(got[2:8], (0, 0, *halves(BITS), 0, 0), "what was signalled")


@case(NOTIFICATIONS)
def vm_to_sp_notification(t: Run) -> None:
    _vm_to_sp(t, SPS[0], per_vcpu=False)


@case(NOTIFICATIONS)
def vm_to_sp_notification_pcpu(t: Run) -> None:
    _vm_to_sp(t, SPS[0], per_vcpu=True)


@case(NOTIFICATIONS)
def vm_to_sp_notification_el0(t: Run) -> None:
    _vm_to_sp(t, EL0, per_vcpu=False)


@case(NOTIFICATIONS)
def vm_to_sp_notification_pcpu_el0(t: Run) -> None:
    _vm_to_sp(t, EL0, per_vcpu=True)


def _sp_signals(t: Run, sp: int, receivers: tuple[int, ...]) -> None:
    bits = (0x5555_0000_0000_AAAA, 1 << 20)
    for receiver in receivers:
        t.ok(t.call(receiver, BIND, _ids(sp, receiver), 0, *halves(bits[0])), f"{receiver:#x} binds some")
        t.ok(t.call(receiver, BIND, _ids(sp, receiver), NOTIFY_PER_VCPU, *halves(bits[1])), "one for single vCPUs")
        t.ok(t.call(sp, SET, _ids(sp, receiver), 0, *halves(bits[0])), "the partition signals all vCPUs")
        t.ok(t.call(sp, SET, _ids(sp, receiver), 1 << 16 | NOTIFY_PER_VCPU, *halves(bits[1])), "and vCPU 1")
    for receiver in receivers:
        if not is_secure(receiver):
            found = messages.parse_pending(t.ok(t.call(receiver, INFO, smc64=True), "asks what is pending"))
            t.equal(found, ([(receiver, (1,))], False), "the VM is listed, and its vCPU")
        got = t.ok(t.call(receiver, GET, 1 << 16 | receiver, 1), "gets")
        t.equal(got[2:8], (*halves(bits[0] | bits[1]), 0, 0, 0, 0), "what was signalled")
        t.equal(t.call(receiver, GET, 1 << 16 | receiver, FROM_ALL), Frame.success(), "once")
        t.ok(t.call(receiver, UNBIND, _ids(sp, receiver), 0, *halves(bits[0] | bits[1])), "unbinds")


@case(NOTIFICATIONS)
def sp_signals_vm(t: Run) -> None:
    _sp_signals(t, SPS[0], (1, 2))


@case(NOTIFICATIONS)
def sp_signals_vm_sp(t: Run) -> None:
    _sp_signals(t, SPS[0], (1, SPS[1]))
