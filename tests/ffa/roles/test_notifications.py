"""Notifications: between VMs, between worlds, for single vCPUs; and who hears of them."""

from __future__ import annotations

import pytest

from ffa.abi import messages
from ffa.abi.frame import Frame
from ffa.abi.ids import Call, Error
from ffa.roles.endpoint import Endpoint
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc

from .conftest import Bench

BIND, UNBIND = Call.NOTIFICATION_BIND, Call.NOTIFICATION_UNBIND
SET, GET, INFO = Call.NOTIFICATION_SET, Call.NOTIFICATION_GET, Call.NOTIFICATION_INFO_GET
EVERYONES = 0xF
PAIRS = [(0x8001, 1), (1, 0x8001), (1, 2), (0x8001, 0x8002)]


def words(sender: int) -> slice:
    """Where in an answer to GET the notifications of a sender are."""
    return slice(2, 4) if sender & 0x8000 else slice(4, 6)


@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
def test_bound_set_got_and_gone(bench: Bench, sender: int, receiver: int) -> None:
    a, b = bench.all[sender], bench.all[receiver]
    bits = (0x8000_0001, 0x4000_0000)
    assert a.call(SET, sender << 16 | receiver, 0, *bits).error is Error.DENIED  # not bound
    assert b.call(BIND, sender << 16 | receiver, 0, *bits).ok
    assert b.call(BIND, sender << 16 | receiver, 0, 1).error is Error.DENIED  # bound already
    assert a.call(SET, sender << 16 | receiver, 0, *bits).ok
    assert b.call(UNBIND, sender << 16 | receiver, 0, *bits).error is Error.DENIED  # pending
    assert b.call(GET, receiver, EVERYONES)[words(sender)] == bits
    assert b.call(GET, receiver, EVERYONES) == Frame.success()
    assert b.call(UNBIND, sender << 16 | receiver, 0, *bits).ok
    assert b.call(UNBIND, sender << 16 | receiver, 0, *bits).error is Error.DENIED  # not bound
    assert a.call(SET, sender << 16 | receiver, 0, *bits).error is Error.DENIED


@pytest.mark.parametrize(("sender", "receiver"), PAIRS)
def test_of_single_vcpus(bench: Bench, sender: int, receiver: int) -> None:
    a, b = bench.all[sender], bench.all[receiver]
    ids = sender << 16 | receiver
    assert b.call(BIND, ids, 1, 2).ok
    assert a.call(SET, ids, 0, 2).error is Error.INVALID_PARAMETERS  # not a global one
    assert a.call(SET, ids, 9 << 16 | 1, 2).error is Error.INVALID_PARAMETERS  # no such vCPU
    assert a.call(SET, ids, 1 << 16, 2).error is Error.INVALID_PARAMETERS  # a vCPU for a global one
    assert a.call(SET, ids, 1 << 16 | 1, 2).ok
    assert b.call(GET, receiver, EVERYONES) == Frame.success()  # vCPU 0 has none
    assert b.call(GET, 1 << 16 | receiver, EVERYONES)[words(sender)] == (2, 0)


def test_info_lists_what_is_pending_once(bench: Bench) -> None:
    vm, other, sp = bench.vms[1], bench.vms[2], bench.sps[0x8001]
    assert vm.call(INFO, smc64=True).error is Error.NO_DATA
    for receiver in (vm, other):
        assert receiver.call(BIND, 0x8001 << 16 | receiver.id, 0, 1).ok
        assert receiver.call(BIND, 0x8001 << 16 | receiver.id, 1, 2).ok
        assert sp.call(SET, 0x8001 << 16 | receiver.id, 0, 1).ok
    for vcpu in (3, 1):
        assert sp.call(SET, 0x8001 << 16 | 2, vcpu << 16 | 1, 2).ok
    assert messages.parse_pending(vm.call(INFO, smc64=True)) == ([(1, ())], False)
    assert vm.call(INFO, smc64=True).error is Error.NO_DATA  # told once
    assert messages.parse_pending(other.call(INFO)) == ([(2, (1, 3))], False)
    assert sp.call(SET, 0x8001 << 16 | 1, 0, 1).ok
    assert messages.parse_pending(vm.call(INFO, smc64=True)) == ([(1, ())], False)  # set again
    assert sp.call(INFO).error is Error.NOT_SUPPORTED


def test_the_scheduler_hears_of_all_vms(bench: Bench) -> None:
    bench.hypervisor.scheduler = 1
    for receiver in (1, 2):
        bench.vms[receiver].call(BIND, 0x8001 << 16 | receiver, 0, 1)
        bench.sps[0x8001].call(SET, 0x8001 << 16 | receiver, 0, 1)
    assert messages.parse_pending(bench.vms[1].call(INFO, smc64=True)) == ([(1, ()), (2, ())], False)


def test_lists_that_do_not_fit_come_the_next_time() -> None:
    machine = Machine()
    spmc, host = Spmc(machine), Endpoint(0, machine)
    spmc.attach(host, hypervisor=True)
    sp = Endpoint(0x8001, machine)
    spmc.add(sp)
    for vm in range(1, 26):
        assert host.call(Call.NOTIFICATION_BITMAP_CREATE, vm, 1).ok
        assert host.call(BIND, 0x8001 << 16 | vm, 0, 1).ok
        assert sp.call(SET, 0x8001 << 16 | vm, 0, 1).ok
    first, more = messages.parse_pending(host.call(INFO, smc64=True))
    assert (len(first), more) == (20, True)
    second, more = messages.parse_pending(host.call(INFO, smc64=True))
    assert ([vm for vm, _ in first + second], more) == (list(range(1, 26)), False)


@pytest.mark.parametrize(
    ("caller", "call", "arguments", "code"),
    [
        (1, BIND, (0x8001 << 16 | 2, 0, 1), Error.INVALID_PARAMETERS),  # for another
        (1, BIND, (0x8009 << 16 | 1, 0, 1), Error.INVALID_PARAMETERS),  # nobody
        (1, BIND, (1 << 16 | 1, 0, 1), Error.INVALID_PARAMETERS),  # of itself
        (1, BIND, (0x8001 << 16 | 1, 0, 0), Error.INVALID_PARAMETERS),  # nothing
        (1, BIND, (0x8001 << 16 | 1, 16, 1), Error.INVALID_PARAMETERS),
        (1, BIND, (0x8001 << 16 | 1, 0, 1, 0, 1), Error.INVALID_PARAMETERS),  # must be zero
        (1, UNBIND, (0x8001 << 16 | 1, 1, 1), Error.INVALID_PARAMETERS),
        (1, SET, (2 << 16 | 0x8001, 0, 1), Error.INVALID_PARAMETERS),  # in another's name
        (1, SET, (1 << 16 | 0x8001, 2, 1), Error.INVALID_PARAMETERS),  # only partitions delay
        (1, SET, (1 << 16 | 0x8001, 0, 0), Error.INVALID_PARAMETERS),
        (1, SET, (1 << 16 | 9, 0, 1), Error.INVALID_PARAMETERS),
        (1, GET, (2, 1), Error.INVALID_PARAMETERS),
        (1, GET, (1, 16), Error.INVALID_PARAMETERS),
        (1, GET, (9 << 16 | 1, 1), Error.INVALID_PARAMETERS),  # no such vCPU
        (1, INFO, (1,), Error.INVALID_PARAMETERS),
        (3, BIND, (0x8001 << 16 | 3, 0, 1), Error.NOT_SUPPORTED),  # FF-A 1.0
        (1, Call.NOTIFICATION_BITMAP_CREATE, (1, 1), Error.NOT_SUPPORTED),  # for hypervisors
        (0x8001, SET, (0x8001 << 16 | 9, 0, 1), Error.INVALID_PARAMETERS),
        (0x8001, GET, (1, 1), Error.INVALID_PARAMETERS),
    ],
)
def test_what_is_refused(bench: Bench, caller: int, call: Call, arguments: tuple[int, ...], code: Error) -> None:
    assert bench.all[caller].call(call, *arguments).error is code


def test_what_the_spmc_refuses_takes_nothing_from_what_is_here(bench: Bench) -> None:
    one, two = bench.vms[1], bench.vms[2]
    assert one.call(BIND, 2 << 16 | 1, 0, 1).ok
    assert two.call(SET, 2 << 16 | 1, 0, 1).ok
    assert bench.hypervisor.port.call(Call.NOTIFICATION_BITMAP_DESTROY, 1).ok
    assert one.call(GET, 1, EVERYONES).error is Error.INVALID_PARAMETERS
    assert one.call(GET, 1, 2)[4] == 1


def test_bitmaps_come_and_go() -> None:
    machine = Machine()
    spmc, host, sp = Spmc(machine), Endpoint(0, machine), Endpoint(0x8001, machine)
    spmc.attach(host)
    spmc.add(sp)
    create, destroy = Call.NOTIFICATION_BITMAP_CREATE, Call.NOTIFICATION_BITMAP_DESTROY
    assert host.call(destroy, 0).error is Error.DENIED
    assert host.call(BIND, 0x8001 << 16, 0, 1).error is Error.INVALID_PARAMETERS
    for arguments in ((1, 1), (0x8001, 1), (0, 0), (0, 1, 1)):
        assert host.call(create, *arguments).error is Error.INVALID_PARAMETERS
    assert host.call(create, 0, 1).ok
    assert host.call(create, 0, 1).error is Error.DENIED
    assert host.call(BIND, 0x8001 << 16, 0, 1).ok
    assert host.call(destroy, 0).error is Error.DENIED  # one is bound
    assert sp.call(SET, 0x8001 << 16, 0, 1).ok
    assert host.call(GET, 0, 1)[2] == 1
    assert host.call(UNBIND, 0x8001 << 16, 0, 1).ok
    assert host.call(destroy, 0).ok
    assert sp.call(create, 0, 1).error is Error.NOT_SUPPORTED


def test_who_takes_none_gets_none(bench: Bench) -> None:
    deaf = Endpoint(4, bench.machine, properties=0)
    bench.hypervisor.add(deaf)
    assert deaf.call(BIND, 1 << 16 | 4, 0, 1).error is Error.DENIED
    assert bench.vms[1].call(SET, 1 << 16 | 4, 0, 1).error is Error.DENIED
