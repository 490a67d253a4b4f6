"""An entropy device (virtio 1.2, section 5.4): fills the driver's buffers with the host's random bytes.

    python -m pyvhost.examples.entropy --socket-path /tmp/rng.sock
    qemu-system-x86_64 … -object memory-backend-memfd,id=mem,size=512M,share=on -M q35,memory-backend=mem \\
        -chardev socket,id=rng,path=/tmp/rng.sock -device vhost-user-rng-pci,chardev=rng
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from pyvhost.device import Device
from pyvhost.io import program
from pyvhost.vring.api import Chain

MOST = 64 * 1024  # bytes in one answer: the device may give fewer than there is room for


class Entropy(Device):
    """One queue, no features, no config space."""

    num_queues = 1

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        return queue is not None and queue.drain(self.fill, budget=32)

    def fill(self, chain: Chain) -> int:
        return chain.write(os.urandom(min(chain.writable_bytes, MOST)))


def main(argv: Sequence[str] | None = None) -> int:
    parser = program.options("Entropy as a vhost-user device.", "rng")
    return program.run(parser, lambda arguments: Entropy(), argv)


if __name__ == "__main__":
    sys.exit(main())
