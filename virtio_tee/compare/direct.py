"""The path without a guest: client and TEE in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from tee.driver import TeeDriver
from virtio_tee.compare.meter import Meter, Party
from virtio_tee.compare.site import FIRST, Kit, Site, running
from virtio_tee.compare.tees import MeteredTee, soft_tee


@contextmanager
def direct(kit: Kit, place: str, guests: int, meter: Meter | None) -> Iterator[Site]:
    """See :data:`virtio_tee.compare.paths.Open`. What are guests elsewhere are programs here, and one runtime is
    theirs."""
    tee: TeeDriver = soft_tee(kit.key)
    if meter is not None:
        tee = MeteredTee(tee, meter, Party.GUEST, switches=True, in_guest=lambda memory: True)
        meter.looks[Party.GUEST] = meter.looks[Party.TEE]  # what is passed is the client's own
    with running(kit, place, [tee]) as (runtime,):
        yield Site([runtime] * guests, [FIRST, *(f"vm{number}" for number in range(1, guests))])
