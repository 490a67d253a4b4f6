"""Runs in a guest: writes and reads a disk past the page cache until /run/stop is there, and never believes the disk.

    python3 block_load.py /dev/vda 4 [BLOCKS]

Each thread has an area of its own, in which it knows what it wrote last. One JSON line at the end: how many writes and
reads there were, and what was wrong.
"""

import json
import mmap
import os
import random
import struct
import sys
import threading

BLOCK = 4096
BLOCKS = int(sys.argv[3]) if sys.argv[3:] else 512  # of one thread's area


class Worker(threading.Thread):
    def __init__(self, path: str, number: int) -> None:
        super().__init__()
        self.fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self.number = number
        self.version = [0] * BLOCKS
        self.writes = self.reads = 0
        self.wrong: list[str] = []

    def content(self, block: int) -> bytes:
        return struct.pack("<QQQ", self.number, block, self.version[block]) * (BLOCK // 24 + 1)

    def offset(self, block: int) -> int:
        return (self.number * BLOCKS + block) * BLOCK

    def write(self, buffer: mmap.mmap, block: int) -> None:
        self.version[block] += 1
        buffer[:] = self.content(block)[:BLOCK]
        if os.pwritev(self.fd, [buffer], self.offset(block)) != BLOCK:
            self.wrong.append(f"a short write of block {block}")
        self.writes += 1

    def check(self, buffer: mmap.mmap, block: int) -> None:
        buffer[:] = b"\xee" * BLOCK
        os.preadv(self.fd, [buffer], self.offset(block))
        self.reads += 1
        if buffer[:] != self.content(block)[:BLOCK]:
            found = struct.unpack_from("<QQQ", buffer)
            self.wrong.append(f"area {self.number} block {block} version {self.version[block]}: found {found}")

    def run(self) -> None:
        buffer = mmap.mmap(-1, BLOCK)
        rand = random.Random(self.number)
        try:
            for block in range(BLOCKS):
                self.write(buffer, block)
            while not os.path.exists("/run/stop"):
                block = rand.randrange(BLOCKS)
                if rand.random() < 0.6:
                    self.write(buffer, block)
                else:
                    self.check(buffer, block)
            for block in range(BLOCKS):
                self.check(buffer, block)
        except OSError as error:
            self.wrong.append(f"area {self.number}: {error}")


def main() -> None:
    workers = [Worker(sys.argv[1], number) for number in range(int(sys.argv[2]))]
    for worker in workers:
        worker.start()
    print("started", flush=True)
    for worker in workers:
        worker.join()
    wrong = [text for worker in workers for text in worker.wrong]
    print(
        json.dumps(
            {
                "writes": sum(worker.writes for worker in workers),
                "reads": sum(worker.reads for worker in workers),
                "wrong": wrong[:20],
            }
        )
    )


main()
