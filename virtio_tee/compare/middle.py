"""The middle way: control over the virtio-tee device, data in memory that the guest shares with the TEE by FF-A.

Guests, backend, and the model of FF-A are in one process also where they are timed: a guest's own endpoint has to be on
the machine that the backend's TEE is on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from ffa.optee.client import find_optee, share
from ffa.roles.endpoint import Endpoint
from guest_driver.core import VirtioTeeDriver
from guest_driver.ffa_memory import FfaMemory
from tee.driver import TeeDriver
from tee.memory import FfaShare, Memory
from virtio_tee.compare.ffa_meter import CountedMachine, watch
from virtio_tee.compare.meter import Meter, Party
from virtio_tee.compare.site import Kit, Shared, Site, running
from virtio_tee.compare.tees import MeteredTee, soft_tee
from virtio_tee.compare.virtio import in_process, transport
from virtio_tee.ffa_tee import DEVICES, FfaTee

WINDOW_BYTES = 4 << 20
"""Bytes of a guest's memory that its backend can see: for rings and requests."""


@contextmanager
def middle(kit: Kit, place: str, guests: int, meter: Meter | None) -> Iterator[Site]:
    """See :data:`virtio_tee.compare.paths.Open`."""
    tee: TeeDriver = soft_tee(kit.key)
    endpoints = {f"vm{number}": number + 1 for number in range(guests)}
    if meter is None:
        ffa = FfaTee(tee, endpoints)
    else:
        tee = MeteredTee(tee, meter, Party.TEE, switches=False, in_guest=lambda memory: False)
        ffa = FfaTee(tee, endpoints, machine=CountedMachine(meter, endpoints.values()))
        parties = dict.fromkeys(endpoints.values(), Party.GUEST)
        parties |= dict.fromkeys(range(DEVICES, DEVICES + guests), Party.HOST)
        watch(meter, ffa.hypervisor, ffa.partition, parties)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vtee-")))
        sockets = [str(folder / f"{number}.sock") for number in range(guests)]
        stack.enter_context(in_process(ffa, sockets, meter, list(endpoints.values())))
        arenas = [vm.arena() for vm in ffa.vms.values()]
        drivers: list[TeeDriver] = []
        for path, vm, arena in zip(sockets, ffa.vms.values(), arenas, strict=True):
            memory = FfaMemory(vm.endpoint, arena)
            driver = VirtioTeeDriver(transport(path, meter, WINDOW_BYTES), memory=memory)
            drivers.append(stack.enter_context(closing(driver)))
        runtimes = stack.enter_context(running(kit, place, drivers))
        yield Site(runtimes, [""] * guests, 1, arenas[0], _sharing(ffa.vms["vm0"].endpoint))


def _sharing(endpoint: Endpoint) -> Shared:
    """Shares what the guest has put together, in one transaction."""
    partition = find_optee(endpoint)

    @contextmanager
    def shared(pieces: Memory) -> Iterator[Memory]:
        handle = share(endpoint, partition, pieces.ranges)
        try:
            yield Memory(pieces.segments, ranges=pieces.ranges, ffa=FfaShare(handle))
        finally:
            endpoint.reclaim(handle)

    return shared
