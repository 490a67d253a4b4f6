"""Driver and device as two processes that share nothing but the ring and two eventfds: nothing is lost, whoever
sleeps is woken."""

from __future__ import annotations

import mmap
import os
import select
import sys
import traceback

import pytest

from pyvhost.io.fence import host_fences
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.vring.api import Chain, DriverQueue
from pyvhost.vring.choice import part_sizes
from pyvhost.vring.packed import PackedLayout
from pyvhost.vring.packed_driver import PackedDriverQueue
from pyvhost.vring.split import SplitLayout
from pyvhost.vring.split_driver import SplitDriverQueue
from tests.pyvhost.vring.kinds import Kind, each_kind

SIZE, DATA, REQUESTS = 16, 0x8000, 4000
TIMEOUT = 10.0


def sleep(fd: int) -> None:
    if not select.select([fd], [], [], TIMEOUT)[0]:
        raise TimeoutError("nobody woke this side")
    os.eventfd_read(fd)


def drive(driver: DriverQueue, kick: int, call: int, view: memoryview, depth: int) -> None:
    """Keep ``depth`` requests under way, each a number to be answered with its double."""
    added = done = 0
    free = list(range(SIZE))
    while done < REQUESTS:
        while added < REQUESTS and added - done < depth:
            slot = free.pop()
            at = DATA + 64 * slot
            view[at : at + 4] = added.to_bytes(4, "little")
            driver.add([(at, 4)], [(at + 16, 4), (at + 32, 4)], (slot, added))
            added += 1
        if driver.kick_needed():
            os.eventfd_write(kick, 1)
        finished = driver.poll()
        if not finished:
            if not driver.enable_notifications():
                sleep(call)
            driver.disable_notifications()
            continue
        for (slot, number), written in finished:
            at = DATA + 64 * slot
            assert written == 8
            answer = bytes(view[at + 16 : at + 20]) + bytes(view[at + 32 : at + 36])
            assert answer == (2 * number).to_bytes(8, "little")
            free.append(slot)
            done += 1


@each_kind
@pytest.mark.parametrize("event_idx", [False, True])
@pytest.mark.parametrize(("depth", "spin_us"), [(1, 0), (5, 0), (5, 50)])
def test_a_stream(kind: Kind, event_idx: bool, depth: int, spin_us: int) -> None:
    shared = mmap.mmap(-1, 1 << 16)
    view = memoryview(shared)
    kick, call = os.eventfd(0), os.eventfd(0)
    child = os.fork()
    if not child:
        try:
            driver = (PackedDriverQueue if kind.packed else SplitDriverQueue)(
                SIZE, view, 0, fences=host_fences(), event_idx=event_idx
            )
            drive(driver, kick, call, view, depth)
            os._exit(0)
        except BaseException:
            traceback.print_exc(file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)
    try:
        layout = PackedLayout(SIZE) if kind.packed else SplitLayout(SIZE)
        desc, avail, used = part_sizes(kind.packed, SIZE)
        memory = GuestMemory([Region(0, 1 << 16, 0, Mapping(view))])
        queue = kind.factory(
            SIZE,
            memory,
            view[:desc],
            view[layout.avail_offset :][:avail],
            view[layout.used_offset :][:used],
            fences=host_fences(),
            event_idx=event_idx,
            signal=lambda: os.eventfd_write(call, 1),
            spin_us=spin_us,
        )
        served = 0

        def handler(chain: Chain) -> int:
            nonlocal served
            served += 1
            return chain.write((2 * int.from_bytes(chain.read(), "little")).to_bytes(8, "little"))

        while served < REQUESTS:
            if not queue.drain(handler, budget=64):
                assert queue.broken is None
                if served < REQUESTS:
                    sleep(kick)
        assert served == REQUESTS
    finally:
        _, status = os.waitpid(child, 0)
        os.close(kick)
        os.close(call)
    assert os.waitstatus_to_exitcode(status) == 0
