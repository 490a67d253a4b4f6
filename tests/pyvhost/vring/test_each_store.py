"""A process that serves a compiled queue is followed instruction by instruction: after each of its stores to shared
memory it could be killed, and the next backend, of either implementation, loses nothing and completes nothing twice.

(``test_inflight.py`` does the same to the queues in Python, whose stores can be counted without that.)"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal

import pytest

from pyvhost.inflight import SplitInflight, region_size
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.testing import USER_OFFSET, RingPair, ring_pair
from pyvhost.vring.api import DeviceQueue, Fences, Inflight
from pyvhost.vring.packed_inflight import PackedInflight
from tests.pyvhost.vring.kinds import Kind, built

RING, ADDRESS, RAM = 8, 0x1000, 0x1000
PTRACE_TRACEME, PTRACE_SINGLESTEP = 0, 9
MOST_STEPS = 3_000_000

ptrace = ctypes.CDLL(None, use_errno=True).ptrace
ptrace.argtypes = (ctypes.c_long, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)
ptrace.restype = ctypes.c_long


def start(kind: Kind, chains: list[int]) -> RingPair:
    """A driver that has made requests of so many descriptors available, each with its number as its token."""
    pair = ring_pair(
        RING, packed=kind.packed, base=kind.base(RING, 6), regions=((ADDRESS, RAM),), queue="pure", event_idx=False
    )
    for token, count in enumerate(chains):
        pair.driver.add([(pair.data, 8)] * count, [], token)
    return pair


def ram_of(pair: RingPair) -> memoryview:
    return pair.memory.translate(ADDRESS, RAM)[0]


def device(kind: Kind, memory: memoryview, record: memoryview) -> DeviceQueue:
    pair = start(kind, [])
    addresses = (pair.driver.desc_addr, pair.driver.avail_addr, pair.driver.used_addr)
    parts = [memory[at - ADDRESS :][: len(part)] for at, part in zip(addresses, pair.parts, strict=True)]
    guest = GuestMemory([Region(ADDRESS, RAM, ADDRESS + USER_OFFSET, Mapping(memory))])
    queue = kind.factory(RING, guest, *parts, fences=Fences.none(), base=kind.base(RING, 6))
    recorder: Inflight = PackedInflight(record) if kind.packed else SplitInflight(record)
    queue.track(recorder)
    return queue


def serve(queue: DeviceQueue, order: list[int]) -> None:
    heads = [chain.head for _ in order if (chain := queue.pop()) is not None]
    for number in order:
        queue.push(heads[number])


def states(kind: Kind, chains: list[int], order: list[int]) -> list[bytes]:
    """The shared memory, ring and record, after each store of a process that serves these requests."""
    size = RAM + region_size(RING, packed=kind.packed)
    with mmap.mmap(-1, size) as shared:
        view = memoryview(shared)
        view[:RAM] = ram_of(start(kind, chains))
        queue = device(kind, view[:RAM], view[RAM:])
        found = [shared[:]]
        pid = os.fork()
        if pid == 0:
            try:
                if ptrace(PTRACE_TRACEME, 0, None, None) < 0:
                    os._exit(ctypes.get_errno())
                signal.raise_signal(signal.SIGSTOP)
                serve(queue, order)
                os._exit(0)
            finally:
                os._exit(255)
        del queue
        try:
            for _ in range(MOST_STEPS):
                _, status = os.waitpid(pid, 0)
                if not os.WIFSTOPPED(status):
                    if os.waitstatus_to_exitcode(status) in (errno.EPERM, errno.ENOSYS):
                        pytest.skip("a process may not be traced here")
                    assert status == 0
                    pid = 0
                    break
                now = shared[:]
                if now != found[-1]:
                    found.append(now)
                assert ptrace(PTRACE_SINGLESTEP, pid, None, None) == 0
        finally:
            if pid:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            view.release()
        assert not pid, "it does not end"
        return found


@pytest.mark.parametrize("kind", [built(Kind(packed, "compiled")) for packed in (False, True)])
@pytest.mark.parametrize(
    ("chains", "order"),
    [([1, 3, 1, 2], [1, 3, 0, 2]), ([1, 1, 1], [0, 1, 2]), ([8], [0]), ([2, 6], [1, 0])],
    ids=["out of order", "in order", "a whole ring", "a wrap"],
)
def test_killed_after_each_store(kind: Kind, chains: list[int], order: list[int]) -> None:
    found = states(kind, chains, order)
    assert len(found) > 4 * len(chains), "stores were missed"
    counts = set()
    for state in found:
        for queue in ("pure", "compiled"):
            pair = start(kind, chains)
            ram_of(pair)[:] = state[:RAM]
            before = [token for token, _ in pair.driver.poll()]
            following = device(Kind(kind.packed, queue), ram_of(pair), memoryview(bytearray(state[RAM:])))
            counts.add(len(following.recovered))
            while (chain := following.pop()) is not None:
                following.push(chain.head)
            assert following.broken is None
            after = [token for token, _ in pair.driver.poll()]  # raises for what is completed twice
            assert sorted(before + after) == list(range(len(chains)))
    assert counts == set(range(len(chains) + 1))
