"""The paths that are compared: the table, and what each asks of whom."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial

from virtio_tee.compare.direct import direct
from virtio_tee.compare.meter import Meter, Party
from virtio_tee.compare.middle import middle
from virtio_tee.compare.over_ffa import over_ffa
from virtio_tee.compare.site import Kit, Site
from virtio_tee.compare.virtio import virtio

Open = Callable[[Kit, str, int, Meter | None], AbstractContextManager[Site]]
"""Opens a path: the kit, a name for its guests' files that was not used before, how many guests, and the meter; without
a meter, for timing."""

PARTIES = {
    Party.GUEST: ("guest", "the VM: client, driver and supplicant"),
    Party.HOST: ("host", "the host's user space: the vhost-user backend"),
    Party.HYPERVISOR: ("hypervisor", "what runs the VM, at EL2"),
    Party.SPMC: ("SPMC", "firmware: the manager of the secure world's partitions"),
    Party.TEE: ("TEE", "OP-TEE or another TEE; here the software TEE"),
}
"""Who takes part: how they are called, and what they are."""


@dataclass(frozen=True, slots=True)
class Trust:
    """What a path asks of one party: what it is ``trusted`` with, and what of it has to be ``changed``. "": nothing."""

    party: Party
    trusted: str
    changed: str


@dataclass(frozen=True, slots=True)
class Path:
    """One way from a client to the TEE. ``mode``: which variant of it."""

    name: str
    mode: str
    what: str
    parties: Sequence[Party]
    open: Open
    trust: Sequence[Trust]

    @property
    def label(self) -> str:
        """Name and variant."""
        return f"{self.name} ({self.mode})" if self.mode else self.name


_HYPERVISOR_AS_IS = Trust(
    Party.HYPERVISOR, "with what it always has: it runs the VM, and is told nothing of the TEE", ""
)
_DRIVER = Trust(Party.GUEST, "", "the virtio-tee driver (a module, or in user space)")
_TEE_AS_IS = Trust(Party.TEE, "with what each call passes; it sees one client, the host", "")


PATHS: Sequence[Path] = (
    Path(
        "direct",
        "",
        "no VM: the client calls the TEE of its own machine. What the others are measured against",
        (Party.GUEST, Party.TEE),
        direct,
        (Trust(Party.TEE, "with what each call passes", ""),),
    ),
    Path(
        "virtio",
        "zero-copy",
        "virtqueues to a backend in the host, which maps the guest's memory; the TEE reads registered memory there",
        (Party.GUEST, Party.HOST, Party.TEE),
        partial(virtio, bounce=False),
        (
            _DRIVER,
            Trust(
                Party.HOST,
                "with all requests and all memory passed, to keep them secret and unchanged; it has the guest's memory "
                "mapped",
                "a backend process that may open the TEE; a VMM with vhost-user",
            ),
            _HYPERVISOR_AS_IS,
            _TEE_AS_IS,
        ),
    ),
    Path(
        "virtio",
        "bounce",
        "the same, but the backend copies what a call passes, and the TEE reads the copies",
        (Party.GUEST, Party.HOST, Party.TEE),
        partial(virtio, bounce=True),
        (
            _DRIVER,
            Trust(
                Party.HOST,
                "as with zero-copy, and it does read what is passed",
                "a backend process that may open the TEE; a VMM with vhost-user",
            ),
            _HYPERVISOR_AS_IS,
            Trust(Party.TEE, "with what each call passes; it has no access to the guest's memory", ""),
        ),
    ),
    Path(
        "middle",
        "",
        "virtqueues for calls, FF-A for their data: the guest shares memory with the TEE, and the host cannot read it",
        (Party.GUEST, Party.HOST, Party.HYPERVISOR, Party.SPMC, Party.TEE),
        middle,
        (
            Trust(Party.GUEST, "", "the virtio-tee driver, with FF-A memory sharing"),
            Trust(
                Party.HOST,
                "with requests and the values in them, and to pass calls on; not with memory",
                "a backend that is told the guest's endpoint and may call the TEE by FF-A; a VMM with vhost-user that "
                "shares only what rings and requests lie in",
            ),
            Trust(
                Party.HYPERVISOR,
                "to keep who owns and who borrows each page; it sees registers and descriptors",
                "FF-A memory sharing for VMs; no messages of theirs",
            ),
            Trust(Party.SPMC, "to keep worlds and partitions apart", "an SPMC that knows VMs as owners of memory"),
            Trust(
                Party.TEE,
                "with what each call passes; it retrieves memory of the guest that the host speaks for, and no other's",
                "OP-TEE as an FF-A partition that takes such handles",
            ),
        ),
    ),
    Path(
        "ffa",
        "",
        "FF-A: the VM shares memory and sends messages, which the hypervisor relays to the SPMC, and that to OP-TEE",
        (Party.GUEST, Party.HYPERVISOR, Party.SPMC, Party.TEE),
        over_ffa,
        (
            Trust(Party.GUEST, "", "none: Linux has the FF-A and OP-TEE drivers"),
            Trust(
                Party.HYPERVISOR,
                "to keep who owns and who borrows each page, and to relay; it sees registers and descriptors, and is "
                "given none of the memory that is shared",
                "an FF-A relay with memory sharing and notifications for VMs",
            ),
            Trust(
                Party.SPMC,
                "to keep worlds and partitions apart",
                "an SPMC (Hafnium, or OP-TEE as its own) under an SPMD; it must know VMs as endpoints",
            ),
            Trust(
                Party.TEE,
                "with what each call passes; each VM is an endpoint of its own",
                "OP-TEE as an FF-A partition, built for several VMs",
            ),
        ),
    ),
)
"""All of them, in the order in which they are shown."""
