"""A hypervisor that says anything: the SPMC answers whatever it is called with, and never raises."""

from __future__ import annotations

import random
from uuid import UUID

import pytest

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, halves
from ffa.abi.ids import BY_FID, PAGE_SIZE, Call, fid
from ffa.abi.layouts import address_range, composite
from ffa.roles.endpoint import Endpoint
from ffa.roles.machine import Machine
from ffa.roles.profile import FULL, OPTEE_4_10, Profile
from ffa.roles.spmc import ForwardedMap, Spmc

MEMORY, SP_MEMORY, PAGES = 0x4000_0000, 0x0E00_0000, 32
SENDS = (Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE)


class Hostile:
    """Endpoint 0 as a hypervisor, two partitions, and what has been given so far."""

    def __init__(self, seed: int, profile: Profile) -> None:
        self.rng = random.Random(seed)
        self.machine = Machine()
        self.spmc = Spmc(self.machine, profile)
        self.os = Endpoint(0, self.machine, contexts=4)
        self.spmc.attach(self.os, hypervisor=True)
        self.machine.add(0, MEMORY, PAGES)
        self.sps = [Endpoint(0x8001 + n, self.machine, uuid=UUID(int=n + 1), el0=n == 1) for n in range(2)]
        for n, sp in enumerate(self.sps):
            self.spmc.add(sp)
            self.machine.add(sp.id, SP_MEMORY + n * 0x10_0000, PAGES, secure=True)
        for endpoint, base in ((self.os, MEMORY), *((s, SP_MEMORY + n * 0x10_0000) for n, s in enumerate(self.sps))):
            assert endpoint.map_buffers(base, base + PAGE_SIZE).ok
        self.handles: list[int] = []

    def _receivers(self) -> tuple[abi.Receiver, ...]:
        rng = self.rng
        ids = rng.choice(((0x8001,), (0x8001,), (0x8001, 0x8002), (1, 0x8001), (1, 1), (2,), ()))
        return tuple(abi.Receiver(id, rng.choice((2, 2, 2, 1, rng.randrange(16)))) for id in ids)

    def said(self) -> tuple[bytes, Frame]:
        """What is put into TX, and the call that is made with it: nearly right, or not at all."""
        rng = self.rng
        page = MEMORY + rng.randrange(2, PAGES + 2) * PAGE_SIZE
        handle = rng.choice(self.handles or [0])
        sender, vm, receivers = rng.choice((0, 0, 1)), rng.choice((1, 2, 0, 0x8001)), self._receivers()
        share = abi.build(0x10002, abi.Transaction(sender, receivers, 0x2F), [(page, 1), (page + 2 * PAGE_SIZE, 1)])
        request = abi.build(0x10002, abi.Transaction(sender, receivers, handle=handle))
        cut = len(share) - rng.choice((0, 0, 16))
        buffers = (page, page + rng.choice((0, PAGE_SIZE)))
        parts = [composite.pack(1, 1) + address_range.pack(at, 1) for at in buffers]
        return rng.choice(
            (
                lambda: (share[:cut], Frame.of(rng.choice(SENDS), len(share), cut)),
                lambda: (share[-16:], Frame.of(Call.MEM_FRAG_TX, *halves(handle), rng.choice((0, 8, 16)))),
                lambda: (request, Frame.of(Call.MEM_RETRIEVE_REQ, len(request), len(request))),
                lambda: (b"", Frame.of(Call.MEM_FRAG_RX, *halves(handle), rng.randrange(256) * 16)),
                lambda: (abi.build_relinquish(handle, *(r.endpoint for r in receivers)), Frame.of(Call.MEM_RELINQUISH)),
                lambda: (b"", Frame.of(Call.MEM_RECLAIM, *halves(handle))),
                lambda: (ForwardedMap.pack(endpoint=vm, rx=16, tx=48) + b"".join(parts), Frame.of(Call.RXTX_MAP)),
                lambda: (b"", Frame.of(rng.choice((Call.RXTX_UNMAP, Call.MSG_SEND2)), vm << 16)),
                lambda: (b"", Frame.of(rng.choice((Call.RX_ACQUIRE, Call.RX_RELEASE)), rng.choice((0, vm)))),
                lambda: (b"", Frame.of(Call.NOTIFICATION_BITMAP_CREATE, vm, rng.choice((0, 1, 2)))),
                lambda: (rng.randbytes(99), Frame(rng.choice(tuple(BY_FID)), *(self._number() for _ in range(17)))),
            )
        )()

    def _number(self) -> int:
        return self.rng.getrandbits(self.rng.choice((1, 16, 64)))

    def step(self) -> Frame:
        rng = self.rng
        caller, base = rng.choice(((self.os, MEMORY), (self.os, MEMORY), (self.sps[0], SP_MEMORY)))
        if self.spmc.served[caller.id].mailbox is None and rng.random() < 0.5:
            caller.map_buffers(base, base + PAGE_SIZE)
        blob, frame = self.said()
        data, x = bytearray(blob), list(frame)
        if data and rng.random() < 0.3:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        if rng.random() < 0.1:
            x[rng.randrange(18)] ^= 1 << rng.randrange(64)
        self.machine.store(base, bytes(data))
        answer = caller.send(Frame(*x), rng.randrange(-1, 9))
        if caller is self.os and (answer.ok or answer.fid == fid(Call.MEM_FRAG_RX)) and frame.fid in SENT:
            at = 2 if answer.ok else 1
            self.handles.append(answer[at] | answer[at + 1] << 32)
        return answer


SENT = {fid(call) for call in SENDS}


@pytest.mark.parametrize("profile", [FULL, OPTEE_4_10], ids=["full", "optee"])
def test_a_hypervisor_says_anything(profile: Profile) -> None:
    seen: set[int] = set()
    for seed in range(4):
        world = Hostile(seed, profile)
        for _ in range(1500):
            answer = world.step()
            seen.add(answer.fid)
            assert answer.fid in BY_FID or answer[0] in (0x10002, 0xFFFF_FFFF)  # FFA_VERSION's are no function
        assert len(world.handles) == len(set(world.handles))
        mapped = [box for served in world.spmc.served.values() if (box := served.mailbox) is not None]
        for box in (*mapped, *world.spmc.vm_buffers.values()):
            assert None not in world.machine.states_of(box.pages)
    assert seen >= {fid(Call.SUCCESS), fid(Call.ERROR)}
    if profile is FULL:
        assert seen >= {fid(Call.MEM_RETRIEVE_RESP), fid(Call.MEM_FRAG_RX)}


def test_a_long_description_is_dropped_when_it_is_reclaimed() -> None:
    """The rest of a description that nobody may see any more is not told."""
    world = Hostile(0, FULL)
    world.machine.add(0, 0x5000_0000, 2000)
    share = abi.Transaction(0, (abi.Receiver(0x8001, 2),), 0x2F)
    ranges = [(0x5000_0000 + 2 * n * PAGE_SIZE, 1) for n in range(600)]
    answer = world.os.send_memory(Call.MEM_SHARE, share, ranges)
    handle = answer[2] | answer[3] << 32
    asked = abi.build(0x10002, abi.Transaction(0, (), handle=handle))
    world.os.put(asked)
    first = world.os.call(Call.MEM_RETRIEVE_REQ, len(asked), len(asked))
    assert first[1] > first[2] == PAGE_SIZE
    assert world.os.call(Call.MEM_FRAG_RX, *halves(handle), PAGE_SIZE).error is not None  # RX is not released
    assert world.os.call(Call.RX_RELEASE).ok
    assert world.os.call(Call.MEM_FRAG_RX, *halves(handle), 16).error is not None  # not from there
    assert world.os.call(Call.MEM_FRAG_RX, *halves(handle), PAGE_SIZE, 5).error is not None
    assert world.os.reclaim(handle).ok
    assert world.os.call(Call.MEM_FRAG_RX, *halves(handle), PAGE_SIZE).error is not None
