"""The machine's memory: regions, states, bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffa.roles.machine import CHUNK, Access, AccessFaultError, Machine, exclusive

BASE = 0x4000_0000


def test_regions_do_not_overlap() -> None:
    machine = Machine()
    machine.add(1, BASE, 4)
    for address, pages in ((BASE, 1), (BASE + 0x3000, 1), (BASE - 0x1000, 2), (BASE + 1, 1), (0, 0), (-0x1000, 1)):
        with pytest.raises(ValueError):
            machine.add(2, address, pages)
    machine.add(2, BASE + 0x4000, 1)
    machine.add(2, BASE - 0x1000, 1)
    assert [machine.state(BASE // 0x1000 + n) for n in (-2, -1, 0, 3, 4, 5)] == [
        None,
        exclusive(2),
        exclusive(1),
        exclusive(1),
        exclusive(2),
        None,
    ]


@given(
    st.integers(-0x1000, 2 * CHUNK + 0x1000).map(lambda at: BASE + CHUNK - 0x800 + at // 2),
    st.binary(max_size=3000),
    st.booleans(),
)
def test_bytes_are_kept_wherever_they_are(address: int, data: bytes, backed: bool) -> None:
    size = 4 * CHUNK
    machine = Machine()
    machine.add(1, BASE, size // 0x1000, backing=bytearray(size) if backed else None)
    machine.write(1, address, data)
    assert machine.read(1, address, len(data)) == data
    assert machine.read(1, address - 1, 1) == machine.read(1, address + len(data), 1) == b"\0"
    first = address // 0x1000 * 0x1000
    machine.clear([(first, 2)])
    assert machine.read(1, first, 0x2000) == bytes(0x2000)


def test_access_is_checked_for_every_page() -> None:
    machine = Machine()
    machine.add(1, BASE, 2)
    machine.add(2, BASE + 0x2000, 1)
    for address, size in ((BASE + 0x1FFF, 2), (BASE - 1, 2), (BASE + 0x2000, 0), (0, 1), (BASE, 1 << 40)):
        with pytest.raises(AccessFaultError):
            machine.read(1, address, size)
    page = BASE // 0x1000
    machine.set_state([page], exclusive(1).granting(2, Access.R).granting(1, Access.NONE))
    assert machine.read(2, BASE, 1) == b"\0"
    with pytest.raises(AccessFaultError, match="no W access"):
        machine.write(2, BASE, b"x")
    with pytest.raises(AccessFaultError):
        machine.read(1, BASE, 1)


def test_views_of_backed_memory() -> None:
    machine, buffer = Machine(), bytearray(0x2000)
    machine.add(1, BASE, 2, backing=buffer)
    view = machine.view(1, BASE + 0xFFF, 2)
    view[:] = b"ab"
    assert bytes(buffer[0xFFF:0x1001]) == machine.read(1, BASE + 0xFFF, 2) == b"ab"
    assert machine.view(1, BASE, 4, Access.R).readonly
    with pytest.raises(AccessFaultError):
        machine.view(2, BASE, 1)
    with pytest.raises(AccessFaultError):
        machine.view(1, BASE + 0x1FFF, 2)
    machine.add(1, BASE + 0x2000, 1)
    with pytest.raises(ValueError, match="backing"):
        machine.view(1, BASE + 0x2000, 1)
    for wrong in (bytearray(1), memoryview(bytes(0x1000))):
        with pytest.raises(ValueError, match="as long as"):
            machine.add(1, BASE + 0x4000, 1, backing=wrong)
