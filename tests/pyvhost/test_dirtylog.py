"""The dirty log: every page that was written is marked, whoever wrote it, and nothing outside of the log is touched."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyvhost.dirtylog import PAGE, DirtyLog, store_ones
from pyvhost.memory import GuestMemory, Mapping, Region
from pyvhost.messages import LOG, U64, VRING_ADDR, Feature
from pyvhost.vring.split import SplitLayout
from tests.pyvhost.fakes import GUEST, USER, Disconnected, F, Vmm
from tests.pyvhost.toys import Echo, Late

LOG_BYTES = 16


def marked(log: bytes | bytearray | memoryview) -> set[int]:
    return {8 * n + bit for n, byte in enumerate(log) for bit in range(8) if byte >> bit & 1}


def exact(view: memoryview, index: int, mask: int) -> None:
    view[index] |= mask


RANGES = st.tuples(st.integers(0, 140 * PAGE), st.integers(0, 40 * PAGE))


@given(st.lists(RANGES | st.tuples(st.just((1 << 64) - 1), st.integers(1, 8)), max_size=8), st.booleans())
def test_all_pages_of_a_range(ranges: list[tuple[int, int]], atomic: bool) -> None:
    memory = bytearray(LOG_BYTES + 8)  # the last 8 are not the log's
    view = memoryview(memory)[:LOG_BYTES]
    log = DirtyLog()
    log.mark(*((0, 5)))  # off: nothing happens
    log.enabled = True
    log.remap(Mapping(view), (lambda i, m: exact(view, i, m)) if atomic else None)
    assert log.active
    expected = set()
    for addr, length in ranges:
        log.mark(addr, length)
        if length:
            expected |= set(range(addr // PAGE, min(8 * LOG_BYTES, (addr + length - 1) // PAGE + 1)))
    found = marked(memory)
    if atomic:
        assert found == expected
    else:  # whole bytes
        assert found == {8 * (page // 8) + bit for page in expected for bit in range(8)}
    assert memory[LOG_BYTES:] == bytes(8)
    log.remap(None)
    log.mark(0, PAGE)
    assert not log.active


def test_without_atomic_operations() -> None:
    memory = bytearray(4)
    store_ones(memoryview(memory))(2, 1)
    assert memory == b"\0\0\xff\0"


def test_a_store_barrier_comes_before_the_mark() -> None:
    order: list[str] = []
    log = DirtyLog(lambda: order.append("barrier"))
    log.enabled = True
    log.remap(Mapping(memoryview(bytearray(8))), lambda i, m: order.append("mark"))
    log.mark(0, 1)
    assert order == ["barrier", "mark"]


def test_memory_and_leases_mark() -> None:
    pages: list[tuple[int, int]] = []
    memory = GuestMemory(
        [Region(0x1000, 0x2000, 0x9000, Mapping(memoryview(bytearray(0x2000))))],
        dirty=lambda addr, length: pages.append((addr, length)),
    )
    memory.mark_dirty(0x1000, 4)
    with memory.lease((0x1800, 8)) as lease:
        lease.mark_dirty()
    assert pages == [(0x1000, 4), (0x1800, 8)]
    more = memory.with_region(Region(0x8000, 0x1000, 0x1_0000, Mapping(memoryview(bytearray(0x1000)))))
    lease = more.lease((0x8000, 16), (0x1000, 8), writes=True)
    more.close()
    lease.release()
    lease.release()
    lease.mark_dirty()
    assert pages[2:] == [(0x8000, 16), (0x1000, 8)]
    memory.lease(writes=True).release()
    assert pages[4:] == [(0x1000, 0x2000)]


# --- by messages


def logging(device: Echo | Late) -> tuple[Vmm, int]:
    vmm = Vmm(device)
    vmm.negotiate()
    vmm.start(0)
    return vmm, set_log(vmm)


def set_log(vmm: Vmm, size: int = 4096) -> int:
    fd = vmm.fd()
    vmm.ports.files[fd] = bytearray(8192)
    assert U64.unpack(vmm.tell(F.SET_LOG_BASE, LOG.pack(size, 64), fd)).value == 0
    return fd


def log_all(vmm: Vmm, log: int | None = 0x7000_0000) -> None:
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features | Feature.LOG_ALL))
    layout = SplitLayout(8)
    flags = 0 if log is None else 1
    body = VRING_ADDR.pack(0, flags, USER, USER + layout.used_offset, USER + layout.avail_offset, log or 0)
    vmm.tell(F.SET_VRING_ADDR, body)


def test_answers_and_the_used_ring_are_logged() -> None:
    vmm, fd = logging(Echo())
    file = vmm.ports.files[fd]
    vmm.add(0)
    assert not any(file)  # not asked for yet
    log_all(vmm, 0x20_0000)
    vmm.add(0, b"again")
    answer = (GUEST + 0x8200) // PAGE
    assert marked(file[64 : 64 + 4096]) == {answer, 0x200}
    assert not any(file[:64])
    assert not any(file[64 + 4096 :])
    log_all(vmm, None)
    file[:] = bytes(8192)
    vmm.add(0, b"third")
    assert marked(file[64:]) == {answer}
    vmm.tell(F.SET_FEATURES, U64.pack(vmm.features))
    file[:] = bytes(8192)
    vmm.add(0, b"last")
    assert not any(file)
    vmm.leave()


def test_the_log_moves_while_requests_are_in_flight() -> None:
    device = Late()
    vmm, first = logging(device)
    vmm.add(0)
    vmm.ports.turn()
    log_all(vmm)
    file = vmm.ports.files[first]
    second = set_log(vmm)
    file[:] = bytes(8192)
    device.finish()
    assert not any(file)
    assert (GUEST + 0x8200) // PAGE in marked(vmm.ports.files[second][64:])
    device.memory.mark_dirty(GUEST + 3 * PAGE, 1)
    assert GUEST // PAGE + 3 in marked(vmm.ports.files[second][64:])
    vmm.leave()


def test_the_frontend_is_told() -> None:
    vmm, _ = logging(Echo())
    fd = vmm.fd()
    assert vmm.ack(F.SET_LOG_FD, b"", fd) == 0
    log_all(vmm)
    vmm.add(0)
    assert fd in vmm.ports.signals
    vmm.ports.signals.clear()
    other = vmm.fd()
    assert vmm.ack(F.SET_LOG_FD, b"", other) == 0
    assert fd not in vmm.ports.open_fds
    vmm.leave()


def test_a_log_that_is_too_small_or_not_there() -> None:
    vmm = Vmm(Echo())
    vmm.negotiate()
    vmm.start(0)
    log_all(vmm)
    vmm.add(0)  # enabled, and no log yet
    fd = set_log(vmm, 1)
    log_all(vmm, (1 << 64) - 8)
    vmm.add(0, b"more")
    assert marked(vmm.ports.files[fd]) <= set(range(64 * 8, 65 * 8))
    vmm.leave()


def test_a_log_that_cannot_be_mapped_ends_the_connection() -> None:
    vmm = Vmm(Echo())
    vmm.negotiate()
    with pytest.raises(Disconnected):
        vmm.tell(F.SET_LOG_BASE, LOG.pack(1 << 40, 0), vmm.fd())
    vmm.leave()


class Secretive(Echo):
    """Writes to memory without a word."""

    logs_writes = False


def test_a_device_that_does_not_log_does_not_say_so() -> None:
    vmm = Vmm(Secretive())
    assert not vmm.backend.offered_features & Feature.LOG_ALL
    vmm.negotiate()
    assert vmm.ack(F.SET_FEATURES, U64.pack(vmm.features | Feature.LOG_ALL)) == 1
    assert vmm.ack(F.SET_LOG_FD, b"", vmm.fd()) == 1
    vmm.leave()
