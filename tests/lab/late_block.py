"""The null block device as a slow disk would be: it holds several requests, and completes them in any order. What a new
one recovers, it says on stderr.

    python -m tests.lab.late_block --socket-path … --memory FILE --capacity BYTES
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence

from pyvhost.examples.null_block import NullBlock, make_file
from pyvhost.io import program
from pyvhost.vring.api import Chain, DeviceQueue

PAUSE_S = 0.0005


class LateBlock(NullBlock):
    """One request queue."""

    def __init__(self, capacity: int, memory: int) -> None:
        super().__init__(capacity, memory)
        self.held: list[Chain] = []

    def queue_started(self, index: int, queue: DeviceQueue, resumed: bool) -> None:
        if not resumed:
            self.held.clear()
            print("recovered", len(queue.recovered), file=sys.stderr, flush=True)

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        assert queue is not None
        for _ in range(16):
            chain = queue.pop()
            if chain is None:
                return queue.enable_notifications()
            self.held.append(chain)
        return True

    def run(self) -> float | None:
        queue = self.queues[0] if self.queues else None
        if queue is None or queue.stopped or not self.held:
            return None
        chain = self.held.pop(random.randrange(len(self.held)))
        queue.push(chain.head, self.serve(chain))
        queue.notify()
        return PAUSE_S

    def disconnected(self) -> None:
        self.held.clear()


def main(argv: Sequence[str] | None = None) -> int:
    parser = program.options("A slow block device.", "block")
    parser.add_argument("--capacity", type=int, required=True, metavar="BYTES")
    parser.add_argument("--memory", required=True, metavar="FILE")
    return program.run(parser, lambda a: LateBlock(a.capacity, make_file(a.memory, a.capacity)), argv)


if __name__ == "__main__":
    sys.exit(main())
