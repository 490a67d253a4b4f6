"""The software TEE alone, for the bench: ``python -m virtio_tee.bench.direct`` reads lines of a size in
bytes, a command and seconds, and answers each with the median time in µs of that command of the probe TA on registered
memory of that size.

The process rests before each call, as a backend does whose driver sleeps, so that caches are in the same state.
"""

from __future__ import annotations

import mmap
import os
import secrets
import sys
import time
from statistics import median

from tee.calls import Call, OpenContext, OpenSession, RegisterMemory
from tee.driver import Done, Event
from tee.memory import Memory
from tee.params import Direction, MemRef
from tee.results import Origin, Result
from tee.soft.driver import SoftTee
from tee.soft.examples import UUIDS, built_in

REST_S = 20e-6


class Direct:
    """A software TEE with a session of the probe TA."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=built_in("probe"))
        self.tee.attach(self.events.append)
        self.context = self.call(OpenContext())
        self.session = self.call(OpenSession(context=self.context, uuid=UUIDS["probe"]))

    def call(self, call: Call) -> object:
        """Run one call to its end."""
        self.tee.start(call)
        while not self.events:
            self.tee.run()
        done = self.events.pop()
        if not isinstance(done, Done) or done.code != Result.SUCCESS:
            raise RuntimeError(f"the software TEE said {done}")
        return done.value

    def measure(self, size: int, command: int, seconds: float) -> float:
        """The median in µs."""
        fd = os.memfd_create("bench-direct")
        os.ftruncate(fd, size)
        memory = Memory.of(memoryview(mmap.mmap(fd, size)))
        os.close(fd)
        self.call(RegisterMemory(context=self.context, memory=memory))
        samples: list[int] = []
        end = time.monotonic() + seconds
        while not samples or time.monotonic() < end:
            time.sleep(REST_S)
            start = time.perf_counter_ns()
            param = MemRef(Direction.INOUT, memory, 0, size)
            outcome = self.tee.invoke_at_once(self.session, command, [param])  # as the device does
            if outcome != (Result.SUCCESS, Origin.TRUSTED_APP):
                raise RuntimeError(f"the software TEE said {outcome}")
            samples.append(time.perf_counter_ns() - start)
        return median(samples) / 1e3


def main() -> None:
    """Until stdin ends."""
    direct = Direct()
    for line in sys.stdin:
        size, command, seconds = line.split()
        print(direct.measure(int(size), int(command), float(seconds)), flush=True)


if __name__ == "__main__":
    main()
