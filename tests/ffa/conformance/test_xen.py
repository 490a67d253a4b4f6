"""Xen's decisions as an oracle: our roles, restricted as Xen's mediator is, answer with its codes in its order."""

from __future__ import annotations

from dataclasses import replace

import pytest

from ffa.abi.ids import Call, Error
from ffa.conformance import xen
from ffa.conformance.bench import Bench, Model
from ffa.conformance.run import Run
from ffa.conformance.xen import DECISIONS, Decision
from ffa.roles.checks import SEND
from ffa.roles.profile import FULL
from ffa.roles.transactions import Checks

CODES = {
    "attributes other than normal, write-back, inner shareable memory, or device-nGnRnE": Error.NOT_SUPPORTED,
    "no receiver": Error.NOT_SUPPORTED,
    "the sender is not the caller": Error.INVALID_PARAMETERS,
    "a receiver is unknown, named twice, or the sender": Error.NOT_SUPPORTED,
    "permissions that this transaction cannot give": Error.NOT_SUPPORTED,
    "the composite descriptor does not fit, or receivers name different ones": Error.NOT_SUPPORTED,
}
"""Where Xen's code is not that of the suites."""


def as_xen(bench: Bench) -> Model:
    """Our hypervisor with Xen's limits and codes."""
    model = Model(bench)
    assert model.hypervisor is not None
    profile = replace(FULL, dynamic_buffers=False, fragments=False, max_borrowers=1, max_pages=256, max_regions=32)
    model.hypervisor.profile = model.hypervisor.transactions.profile = profile
    rows = tuple(replace(check, code=CODES.get(check.name, check.code)) for check in SEND)
    assert sum(check.name in CODES for check in SEND) == len(CODES)
    model.hypervisor.transactions.checks = Checks(send=rows)
    return model


PARSED = {"composite_does_not_fit"}
"""What our parser finds, with the one code that it has."""


@pytest.mark.parametrize("first", DECISIONS, ids=lambda d: f"{d.step}-{d.name}")
def test_the_first_decision_decides(first: Decision) -> None:
    t = Run(as_xen)
    wanted = Error.INVALID_PARAMETERS if first.name in PARSED else first.xen
    assert xen.attempt(t, first).error is wanted
    for other in DECISIONS[DECISIONS.index(first) + 1 :]:
        if other.step > first.step and xen.composes(first, other):
            assert xen.attempt(t, first, other).error is wanted, other.name


def test_limits_come_before_what_is_in_the_descriptor() -> None:
    """Steps 2 to 5: a buffer that is not TX, a fragment beyond the whole, fragments, TX."""
    t = Run(as_xen)
    vm = t.endpoint(1)
    assert vm.call(Call.MEM_SHARE, 16, 32, 0x4000_0000, 1, smc64=True).error is Error.NOT_SUPPORTED
    assert vm.call(Call.MEM_SHARE, 16, 32, smc64=True).error is Error.INVALID_PARAMETERS
    t.ok(vm.call(Call.RXTX_UNMAP), "unmaps")
    assert vm.call(Call.MEM_SHARE, 48, 32, smc64=True).error is Error.NOT_SUPPORTED
    assert vm.call(Call.MEM_SHARE, 32, 32, smc64=True).error is Error.DENIED


def test_quotas_are_xens() -> None:
    t = Run(as_xen)
    handles = [t.sent(Call.MEM_SHARE, 1, 0x8001) for _ in range(32)]
    more = t.send(Call.MEM_SHARE, t.transaction(Call.MEM_SHARE, 1, 0x8001), t.fresh(1))
    assert more.error is Error.NO_MEMORY
    assert t.reclaim(handles[0]).ok
    for pages, code in ((257, Error.NO_MEMORY), (256, None)):
        start = t.fresh(1, 200)[0][0]
        answer = t.send(Call.MEM_SHARE, t.transaction(Call.MEM_SHARE, 1, 0x8001), [(start, pages)])
        assert answer.error is code


def test_there_are_pairs_enough() -> None:
    both = [(a, b) for a in DECISIONS for b in DECISIONS if b.step > a.step and xen.composes(a, b)]
    assert len(both) > 150
