"""A backend's way through time: from its start, through cancelled work, to the ten-thousandth frontend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from hashlib import sha256
from itertools import count
from pathlib import Path
from typing import NamedTuple

from device.wire import ParamType
from guest_driver.client import CallError, Context, PendingCall, TempOut
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.vhost_user import VhostUserTransport
from tee.io.runtime import TeeRuntime
from tee.params import Direction
from tee.results import Result
from tee.soft.examples import UUIDS
from virtio_tee.bench.bare_guest import DEPTH, BareGuest, Packed
from virtio_tee.bench.peers import BenchError
from virtio_tee.bench.plan import MIB, NULL
from virtio_tee.bench.scale_load import PAGE
from virtio_tee.bench.served import Holdings, Served

PROBE = UUIDS["probe"]
HASH = 11
"""The probe TA's command."""
HASHED = 64 * MIB
RIVALS = 3
"""Other TAs that hash as much in the loaded case: with the cancelled one, all threads of the TEE."""
IN_TIME_MS = 50.0
"""What a cancel may take."""
SETTLE_S = 0.5
_TRIES = 20


class Cancelled(NamedTuple):
    """What came of a cancel: milliseconds until its call had ended, and whether it ended with CANCEL."""

    took_ms: float
    reached: bool


class Hashing:
    """A TA that hashes 64 MiB for one guest, and another guest that can keep the backend busy; ``stack`` ends both."""

    def __init__(self, stack: ExitStack, served: Served) -> None:
        mine, other = served.sockets
        transport = VhostUserTransport(mine, wanted=int(DRIVER_FEATURES), memory_bytes=HASHED + MIB)
        runtime = stack.enter_context(TeeRuntime(VirtioTeeDriver(transport)))
        context = stack.enter_context(Context(runtime))
        self._session = stack.enter_context(context.open_session(PROBE))
        self._memory = context.allocate(HASHED)
        self._memory.write(bytes(range(256)) * (HASHED // 256))
        self._digest = sha256(self._memory.view()).digest()
        self._quickest_ms = math.inf
        self._rival = BareGuest(other, HASHED + MIB)
        stack.callback(self._rival.close)
        self._hashes, self._burst = _rival_requests(self._rival)
        self.whole_ms()  # the first time, the backend has all pages to map

    def whole_ms(self) -> float:
        """All of it, not cancelled, alone. Raises BenchError if the digest is wrong."""
        start = time.perf_counter()
        _, digest = self._session.invoke(HASH, self._memory.whole(Direction.IN), TempOut(32))
        took = (time.perf_counter() - start) * 1e3
        if digest != self._digest:
            raise BenchError("the TA's digest is wrong")
        self._quickest_ms = min(took, self._quickest_ms)
        return took

    def cancels(self, count: int, *, loaded: bool) -> list[Cancelled]:
        """Cancel so many calls, at moments spread over the first half of the time that they would take."""
        return [self._cancel(self._quickest_ms * (n + 1) / (2 * count), loaded) for n in range(count)]

    def _cancel(self, after_ms: float, loaded: bool) -> Cancelled:
        """Cancel a call so long after it began; ``loaded``: while rivals hash, and behind a burst of null invokes."""
        for _ in range(_TRIES):
            if loaded:
                self._rival.submit(self._hashes)
            call = self._session.begin(HASH, self._memory.whole(Direction.IN), TempOut(32))
            time.sleep(after_ms / 1e3)
            if loaded:
                self._rival.submit(self._burst, len(self._hashes))
            start = time.perf_counter()
            call.cancel()
            code = _code(call)
            took_ms = (time.perf_counter() - start) * 1e3
            if loaded:
                self._rival.collect(len(self._hashes) + len(self._burst))
            if code == Result.CANCEL or took_ms > IN_TIME_MS:
                return Cancelled(took_ms, code == Result.CANCEL)
            # it has ended by itself, perhaps before the cancel was on its way: that says nothing
        raise BenchError("calls end before their cancels: this machine is too busy")


def _code(call: PendingCall) -> int:
    try:
        call.wait()
    except CallError as e:
        return e.code
    return Result.SUCCESS


def _rival_requests(guest: BareGuest) -> tuple[list[Packed], list[Packed]]:
    context = guest.open_context()
    memory = guest.transport.allocate(HASHED)
    # the digests go to the end of what is hashed
    region = guest.register(context, memory.ranges[0].address, HASHED)
    params = [(ParamType.MEMREF_IN, 0, HASHED - PAGE, region), (ParamType.MEMREF_OUT, HASHED - PAGE, 32, region)]
    sessions = [guest.open_session(context, PROBE) for _ in range(RIVALS)]
    hashes = guest.pack([guest.invoke(context, session, HASH, *params) for session in sessions])
    idle = guest.open_session(context, PROBE)
    return hashes, guest.pack([guest.invoke(context, idle, NULL) for _ in range(DEPTH - RIVALS)])


def connects(path: str, served: Served, total: int, say: Callable[[str], None]) -> list[Holdings]:
    """Have ``total`` frontends connect to ``path``, use the device and leave, every other one without a word. What
    the backend has with a frontend there: after a tenth of them, after two, … after all.
    """
    marks = [max(1, total * tenth // 10) for tenth in range(1, 11)]
    seen: list[Holdings] = []
    for number in count(1):
        guest = BareGuest(path)
        context = guest.open_context()
        guest.open_session(context, PROBE)
        guest.register(context, guest.transport.allocate(PAGE).ranges[0].address, PAGE)
        while len(seen) < len(marks) and number >= marks[len(seen)]:
            seen.append(served.holdings)
            say(f"{number} of {total} frontends")
        (guest.close if number % 2 else guest.vanish)()
        if len(seen) == len(marks):
            break
    return seen


def start(folder: Path, number: int, cpu: int) -> tuple[float, float]:
    """Start ``serve`` once: seconds until it answers, and its resident MB when it has been idle a while."""
    served = Served(folder, f"idle-{number}", cpu=cpu)
    try:
        time.sleep(SETTLE_S)
        return served.ready_s, served.holdings.rss_kib * 1024 / 1e6
    finally:
        served.end()
