"""What the backend's state machine asks to be done; all that leaves it. ``Session`` does it.

File descriptors are plain numbers here. The machine says when each is to be closed (``CloseFd``), whatever happened
to it before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

__all__ = [
    "AddRegion",
    "CheckState",
    "CloseFd",
    "DisableQueue",
    "Effect",
    "EnableQueue",
    "Hangup",
    "MakeInflight",
    "MoveQueue",
    "Negotiated",
    "ReadConfig",
    "Refused",
    "RegionInfo",
    "RemoveRegion",
    "ReplaceMemory",
    "Reply",
    "ResetDevice",
    "RingSetup",
    "SetCall",
    "SetChannel",
    "SetErr",
    "SetInflight",
    "SetKick",
    "SetLog",
    "SetLogSignal",
    "StartQueue",
    "StopQueue",
    "TransferState",
    "WriteConfig",
]


@dataclass(frozen=True, slots=True)
class RegionInfo:
    """One memory region as the frontend describes it, in bytes; ``mmap_offset`` is where it starts in its file."""

    guest_addr: int
    size: int
    user_addr: int
    mmap_offset: int


@dataclass(frozen=True, slots=True)
class RingSetup:
    """How a ring is to be set up. ``desc``, ``avail``, ``used`` are addresses in the frontend; ``log`` is the guest
    address that stands for the used ring in the dirty log, None: its writes are not logged."""

    size: int
    base: int
    desc: int
    avail: int
    used: int
    log: int | None = None


@dataclass(frozen=True, slots=True)
class Effect:
    """Base. Unless a subclass names an answer, what is sent back to the machine is ignored."""


@dataclass(frozen=True, slots=True)
class Reply(Effect):
    """Send these bytes to the frontend, with these file descriptors, which are to be closed then."""

    data: bytes
    fds: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Hangup(Effect):
    """Close the connection: the frontend cannot be told what is wrong, or cannot go on."""

    why: str


@dataclass(frozen=True, slots=True)
class Refused(Effect):
    """The message was refused and the frontend was told; for a log."""

    why: str


@dataclass(frozen=True, slots=True)
class CloseFd(Effect):
    """Nobody uses this file descriptor any more."""

    fd: int


@dataclass(frozen=True, slots=True)
class Negotiated(Effect):
    """The driver has acknowledged these feature bits."""

    features: int


@dataclass(frozen=True, slots=True)
class ReplaceMemory(Effect):
    """Map these regions in place of all there were. All or nothing: throw ``MemoryFault`` in, and the old ones stay."""

    regions: tuple[tuple[RegionInfo, int], ...]


@dataclass(frozen=True, slots=True)
class AddRegion(Effect):
    """Map one region more. Throw ``MemoryFault`` in if it cannot be."""

    region: RegionInfo
    fd: int


@dataclass(frozen=True, slots=True)
class RemoveRegion(Effect):
    """Unmap a region that was mapped."""

    region: RegionInfo


@dataclass(frozen=True, slots=True)
class SetKick(Effect):
    """Poll this eventfd for kicks of queue ``index``; None: stop polling. Throw ``MessageError`` in if it cannot be
    polled."""

    index: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class SetCall(Effect):
    """Signal the driver of queue ``index`` by this eventfd; None: it polls."""

    index: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class SetErr(Effect):
    """Tell of errors of queue ``index`` by this eventfd."""

    index: int
    fd: int | None


@dataclass(frozen=True, slots=True)
class SetChannel(Effect):
    """Backend requests go to this socket. Throw ``MessageError`` in if it is none."""

    fd: int


@dataclass(frozen=True, slots=True)
class StartQueue(Effect):
    """Set up queue ``index`` and look at it, kicked or not. ``resumed``: this ends a pause, take over what is in
    flight. Throw ``ProtocolError`` in if the ring is not in memory or cannot be."""

    index: int
    setup: RingSetup
    resumed: bool


@dataclass(frozen=True, slots=True)
class MoveQueue(Effect):
    """The parts of a ring that is set up are elsewhere now. Throw ``ProtocolError`` in as for ``StartQueue``."""

    index: int
    setup: RingSetup


@dataclass(frozen=True, slots=True)
class EnableQueue(Effect):
    """Process a queue that is set up (again), and look at it, kicked or not."""

    index: int


@dataclass(frozen=True, slots=True)
class DisableQueue(Effect):
    """Take no more requests from this queue until it is enabled; what is in flight may be completed."""

    index: int


@dataclass(frozen=True, slots=True)
class StopQueue(Effect):
    """Touch the ring no more. Answer: the base to go on from (int)."""

    index: int


@dataclass(frozen=True, slots=True)
class ResetDevice(Effect):
    """Forget all driver state. All queues have been stopped. ``told``: by the message; else concluded from how rings
    start."""

    told: bool


@dataclass(frozen=True, slots=True)
class ReadConfig(Effect):
    """Answer: ``size`` bytes of config space; or throw ``ProtocolError`` in."""

    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class WriteConfig(Effect):
    """Write to config space; throw ``ProtocolError`` in to refuse. ``migration``: read-only fields are written too."""

    offset: int
    data: bytes
    migration: bool


@dataclass(frozen=True, slots=True)
class MakeInflight(Effect):
    """Answer: the file descriptor of ``size`` fresh zeroed bytes of shared memory that cannot shrink. Throw
    ``MemoryFault`` in if there are none."""

    size: int


@dataclass(frozen=True, slots=True)
class SetInflight(Effect):
    """Rings that start from now on record what they have in flight in this shared memory: ``queues`` parts of
    ``part_size`` bytes each. Throw ``MemoryFault`` in if it cannot be mapped."""

    fd: int
    offset: int
    queues: int
    part_size: int


@dataclass(frozen=True, slots=True)
class SetLog(Effect):
    """Log dirty pages in this shared memory from now on. Throw ``MemoryFault`` in if it cannot be mapped."""

    fd: int
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class SetLogSignal(Effect):
    """Signal this eventfd when pages were logged."""

    fd: int


@dataclass(frozen=True, slots=True)
class TransferState(Effect):
    """Begin to write the device's state to this file descriptor, or (``load``) to read one from it, and close it at
    the end, whatever comes of it. All rings are stopped. Throw ``ProtocolError`` in to refuse; then it stays the
    machine's."""

    fd: int
    load: bool


@dataclass(frozen=True, slots=True)
class CheckState(Effect):
    """The transfer is over: have the device take a state that was read. Throw ``ProtocolError`` in if that, or the
    transfer, failed, or is not over."""


#: what may be sent back for an effect
Answer = Any
