"""A device's state goes to another backend, by the frontend's pipe; and what stands in the way is said."""

from __future__ import annotations

import pytest

from pyvhost.errors import MessageError
from pyvhost.messages import TRANSFER_STATE, U64, ProtocolFeature
from tests.pyvhost.fakes import Disconnected, F, Vmm
from tests.pyvhost.toys import Echo, Late

SAVE, LOAD, STOPPED = 0, 1, 0


class Movable(Echo):
    max_state_size = 64

    def __init__(self, name: bytes = b"") -> None:
        super().__init__()
        self.name = name

    def save_state(self) -> bytes:
        return b"movable" + self.name

    def load_state(self, data: bytes) -> None:
        if not data.startswith(b"movable"):
            raise MessageError("not a state of this device")
        self.name = data[7:]


def begin(vmm: Vmm, direction: int, phase: int = STOPPED) -> int:
    answer = vmm.tell(F.SET_DEVICE_STATE_FD, TRANSFER_STATE.pack(direction, phase), vmm.fd())
    value: int = U64.unpack(answer).value
    assert value & 0x100  # never a descriptor of ours
    return value & 0xFF


def end(vmm: Vmm, result: bytes | None = b"") -> bytes | None:
    """The transfer is over."""
    fd, data, limit, done = vmm.ports.transfers.pop()
    vmm.ports.close_fd(fd)
    assert limit == 64
    done(result)
    return data


def check(vmm: Vmm) -> int:
    value: int = U64.unpack(vmm.tell(F.CHECK_DEVICE_STATE)).value
    return value


def test_from_one_device_to_another() -> None:
    one, two = Vmm(Movable(b"-x")), Vmm(Movable())
    for vmm in (one, two):
        vmm.negotiate()
    one.start(0)
    one.stop(0)
    assert begin(one, SAVE) == 0
    state = end(one)
    assert check(one) == 0
    assert begin(two, LOAD) == 0
    assert end(two, state) is None
    assert check(two) == 0
    assert isinstance(two.session.device, Movable)
    assert two.session.device.name == b"-x"
    one.leave()
    two.leave()


def test_failures_are_told() -> None:
    vmm = Vmm(Movable())
    vmm.negotiate()
    assert check(vmm) == 1  # of what
    assert begin(vmm, LOAD) == 0
    assert check(vmm) == 1  # not over
    end(vmm, b"nonsense")
    assert check(vmm) == 1
    assert begin(vmm, LOAD) == 0
    end(vmm, b"nonsense")
    assert check(vmm) == 1
    assert begin(vmm, SAVE) == 0
    end(vmm, None)
    assert check(vmm) == 1
    assert check(vmm) == 1
    vmm.leave()


def test_what_cannot_be() -> None:
    vmm = Vmm(Movable())
    vmm.negotiate()
    assert begin(vmm, 2) == 1
    assert begin(vmm, SAVE, 1) == 1
    assert begin(vmm, SAVE) == 0
    assert begin(vmm, SAVE) == 1  # one at a time
    end(vmm)
    vmm.start(0)
    assert begin(vmm, SAVE) == 1  # a ring is started
    vmm.stop(0)
    assert begin(vmm, SAVE) == 0
    end(vmm)
    vmm.leave()


def test_a_state_that_is_larger_than_promised() -> None:
    vmm = Vmm(Movable(bytes(64)))
    vmm.negotiate()
    assert begin(vmm, SAVE) == 1
    vmm.leave()


def test_requests_in_flight_are_not_left_behind() -> None:
    device = Late()
    device.max_state_size = 64
    device.save_state = lambda: b""  # type: ignore[method-assign]
    vmm = Vmm(device)
    vmm.negotiate()
    vmm.start(0)
    vmm.add(0)
    vmm.ports.turn()
    vmm.stop(0)
    assert begin(vmm, SAVE) == 1
    vmm.leave()


def test_most_devices_have_none() -> None:
    vmm = Vmm(Echo())
    assert not vmm.backend.offered_protocol_features & ProtocolFeature.DEVICE_STATE
    vmm.negotiate()
    assert begin(vmm, SAVE) == 1
    for hook in (vmm.session.device.save_state, lambda: vmm.session.device.load_state(b"")):
        with pytest.raises(MessageError, match="cannot be"):
            hook()
    vmm.leave()


def test_after_the_connection_nothing_is_loaded() -> None:
    device = Movable()
    vmm = Vmm(device)
    vmm.negotiate()
    assert begin(vmm, LOAD) == 0
    fd, _, _, done = vmm.ports.transfers.pop()
    vmm.ports.close_fd(fd)
    vmm.leave()
    done(b"movable-late")
    assert device.name == b""
    with pytest.raises(Disconnected):
        vmm.tell(F.CHECK_DEVICE_STATE)
