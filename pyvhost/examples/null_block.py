"""A block device (virtio 1.2, section 5.2) that forgets what is written, or keeps it in a file (``--memory``).

    python -m pyvhost.examples.null_block --socket-path /tmp/blk.sock
    qemu-system-x86_64 … -object memory-backend-memfd,id=mem,size=512M,share=on -M q35,memory-backend=mem \\
        -chardev socket,id=blk,path=/tmp/blk.sock,reconnect=1 -device vhost-user-blk-pci,chardev=blk

Without ``--memory`` a read leaves the driver's buffer as it is, as qemu-storage-daemon's null-co does.
"""

from __future__ import annotations

import mmap
import os
import struct
import sys
from collections.abc import Sequence

from pyvhost.device import Device
from pyvhost.io import program
from pyvhost.vring.api import Chain

SECTOR = 512
ID = b"pyvhost null block\0\0"
IN, OUT, FLUSH, GET_ID = 0, 1, 4, 8
OK, IOERR, UNSUPPORTED = b"\0", b"\1", b"\2"
SEG_MAX, BLK_SIZE, FLUSH_FEATURE, MQ = 1 << 2, 1 << 6, 1 << 9, 1 << 12
HEADER, HEADER_SIZE = struct.Struct("<IIQ"), 16  # type, reserved, sector


class NullBlock(Device):
    """``capacity`` in bytes; ``memory`` is a file that holds as many, or None."""

    max_queue_size = 1024
    config_size = 60
    features = SEG_MAX | BLK_SIZE | FLUSH_FEATURE | MQ

    def __init__(self, capacity: int, memory: int | None = None, queues: int = 1) -> None:
        self.num_queues = queues
        self.capacity = capacity
        self.store = mmap.mmap(memory, capacity) if memory is not None else None

    def read_config(self, offset: int, length: int) -> bytes:
        fields = struct.pack("<QII4xI10xH24x", self.capacity // SECTOR, 0, 126, SECTOR, self.num_queues)
        return fields[offset : offset + length]

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        return queue is not None and queue.drain(self.serve)

    def serve(self, chain: Chain) -> int:
        room = chain.writable_bytes - 1  # the last byte is the status
        if room < 0 or chain.readable_bytes < HEADER_SIZE:
            return 0
        kind, _, sector = chain.unpack(HEADER)
        start = sector * SECTOR
        if kind == IN:
            done = not room % SECTOR and start + room <= self.capacity
            if self.store is not None and done:
                chain.write(self.store[start : start + room])
        elif kind == OUT:
            size = chain.readable_bytes - HEADER_SIZE
            done = not size % SECTOR and start + size <= self.capacity
            if done and self.store is not None:
                self.store[start : start + size] = chain.read(HEADER_SIZE, size)
        elif kind == FLUSH:
            done = True
            if self.store is not None:
                self.store.flush()
        elif kind == GET_ID and room >= len(ID):
            done = True
            chain.write(ID)
        else:
            return chain.write(UNSUPPORTED, room)
        return chain.write(OK if done else IOERR, room)


def make_file(path: str, capacity: int) -> int:
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.ftruncate(fd, capacity)
    return fd


def main(argv: Sequence[str] | None = None) -> int:
    parser = program.options("A null block device as a vhost-user device.", "block")
    parser.add_argument("--capacity", type=int, default=1 << 30, metavar="BYTES", help="a multiple of 512; 1 GiB")
    parser.add_argument("--memory", metavar="FILE", help="keep the data here; the file is made, or taken as it is")
    parser.add_argument("--queues", type=int, default=1, metavar="N", help="request queues")
    return program.run(
        parser, lambda a: NullBlock(a.capacity, make_file(a.memory, a.capacity) if a.memory else None, a.queues), argv
    )


if __name__ == "__main__":
    sys.exit(main())
