"""Packed rings through the whole backend: negotiated, served, paused and gone on with."""

from __future__ import annotations

import pytest

from pyvhost.messages import U64, VRING_ADDR, VRING_STATE, Feature
from pyvhost.vring.api import Fences
from pyvhost.vring.choice import VARIABLE
from pyvhost.vring.packed import INITIAL_BASE, PackedLayout, pack_base
from pyvhost.vring.packed_driver import PackedDriverQueue
from tests.pyvhost.fakes import GUEST, USER, F, Vmm
from tests.pyvhost.toys import Echo
from tests.pyvhost.vring.kinds import each_queue


def set_up(vmm: Vmm, size: int, base: int) -> None:
    layout = PackedLayout(size)
    vmm.tell(F.SET_VRING_NUM, VRING_STATE.pack(0, size))
    vmm.tell(F.SET_VRING_BASE, VRING_STATE.pack(0, base))
    vmm.tell(F.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, USER, USER + layout.used_offset, USER + layout.avail_offset, 0))
    vmm.tell(F.SET_VRING_CALL, U64.pack(0), vmm.fd())
    vmm.tell(F.SET_VRING_KICK, U64.pack(0), vmm.fd())
    vmm.enable(0)
    vmm.ports.turn()


@each_queue
@pytest.mark.parametrize("event_idx", [False, True])
def test_served_and_paused(queue: str, event_idx: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, queue)
    size = 6
    vmm = Vmm(Echo())
    assert vmm.backend.offered_features & Feature.RING_PACKED
    vmm.features |= Feature.RING_PACKED
    if not event_idx:
        vmm.features &= ~int(Feature.EVENT_IDX)
    vmm.features &= ~int(Feature.IN_ORDER)
    vmm.negotiate()
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    vmm.set_memory()
    driver = PackedDriverQueue(size, vmm.ram, GUEST, fences=Fences.none(), event_idx=event_idx)
    base = INITIAL_BASE
    for lap in range(5):
        set_up(vmm, size, base)
        for n in range(2):
            text = b"lap %d %d" % (lap, n)
            vmm.ram[0x8000 : 0x8000 + len(text)] = text
            driver.add([(GUEST + 0x8000, len(text))], [(GUEST + 0x8200, 64)], text)
            if driver.kick_needed():
                vmm.ports.watched[vmm.backend.rings[0].kick]()
                vmm.ports.turn()
            assert driver.poll() == [(text, len(text))]
            assert vmm.ram[0x8200 : 0x8200 + len(text)] == text
            driver.enable_notifications()
        done = 4 * (lap + 1)
        position, wrap = done % size, 1 - done // size % 2
        base = vmm.base(0)
        assert base == pack_base(position, wrap, position, wrap)
    vmm.leave()
