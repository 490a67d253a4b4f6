"""How both transports start a device: features, queues, and the config space. The PCI device is a model of one."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device.config import Config, Limits
from device.wire import Feature, Queue
from guest_driver import virtio_pci
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.transport import TransportError
from guest_driver.vhost_user import VhostUserTransport
from guest_driver.virtio_pci import PciError, PciTransport
from pyvhost.errors import FormatError
from pyvhost.messages import Feature as RingFeature
from tee.driver import TeeInfo
from tee.memory import Range
from tests.guest_driver.live import live

requirement = pytest.mark.requirement
FEATURES_OK, DRIVER_OK = 8, 4
VERSION_1 = 1 << 32
COMMON, NOTIFY, ISR, DEVICE = 0x0000, 0x3000, 0x1000, 0x2000
LIMITS = Limits(num_event_buffers=4)
EVERYTHING = 0xFF
NEEDS = [
    (EVERYTHING, EVERYTHING),
    (Feature.OCALL | Feature.INLINE, Feature.INLINE),
    (Feature.ATTESTATION | Feature.ENCLAVES | Feature.RPC, Feature.RPC),
    (Feature.ENCLAVES | Feature.SERVICES | Feature.OCALL, Feature.ENCLAVES | Feature.SERVICES),
]
"""What a device offers, and what of that may be accepted."""


class Registers:
    """One structure of the model."""

    def __init__(self, read: Callable[[int], int], write: Callable[[int, int], None], size: int) -> None:
        self._read, self._write = read, write
        self.view = memoryview(bytes(size))

    def read(self, offset: int, width: int) -> int:
        return self._read(offset)

    def write(self, offset: int, width: int, value: int) -> None:
        self._write(offset, value)

    def write64(self, offset: int, value: int) -> None:
        self._write(offset, value)


class Model:
    """A virtio PCI device as its driver sees it (virtio 1.2, section 4.1); what the driver does is in ``did``."""

    def __init__(self) -> None:
        self.config = Config(0x1111_1111_2222_2222, TeeInfo(1, 1, 1, 15), 2, LIMITS)
        self.features = VERSION_1 | int(DRIVER_FEATURES)
        self.num_queues = 4
        self.did: list[tuple[str, int]] = []
        self.accepted = 0
        self.on_driver_ok: Callable[[], None] = lambda: None
        self.on_config_read: Callable[[int], None] = lambda at: None
        self.common: dict[int, int] = {virtio_pci._STATUS: 0, virtio_pci._GENERATION: 0}

    def window(self, offset: int) -> Registers:
        return {
            COMMON: Registers(self._read_common, self._write_common, 64),
            NOTIFY: Registers(lambda at: 0, lambda at, value: self.did.append(("kick", value)), 64),
            ISR: Registers(lambda at: 0, lambda at, value: None, 4),
            DEVICE: Registers(self._read_config, lambda at, value: None, 128),
        }[offset]

    def _read_common(self, at: int) -> int:
        if at == virtio_pci._DEVICE_FEATURE:
            return self.features >> 32 * self.common[virtio_pci._DEVICE_FEATURE_SELECT] & 0xFFFF_FFFF
        if at == virtio_pci._NUM_QUEUES:
            return self.num_queues
        if at == virtio_pci._QUEUE_SIZE:
            return 64
        return self.common.get(at, 0)

    def _write_common(self, at: int, value: int) -> None:
        self.common[at] = value
        if at == virtio_pci._DRIVER_FEATURE:
            self.accepted |= value << 32 * self.common[virtio_pci._DRIVER_FEATURE_SELECT]
        elif at == virtio_pci._QUEUE_ENABLE:
            self.did.append(("enable", self.common[virtio_pci._QUEUE_SELECT]))
        elif at == virtio_pci._STATUS:
            self.did.append(("status", value))
            if value & DRIVER_OK:
                self.on_driver_ok()

    def _read_config(self, at: int) -> int:
        word: int = struct.unpack_from("<I", self.config.pack(), at)[0]
        self.did.append(("config", at))
        self.on_config_read(at)
        return word

    @property
    def status(self) -> int:
        return max(value for what, value in self.did if what == "status")


class Pages:
    def __init__(self, size: int) -> None:
        self.view = memoryview(bytearray(1 << 20))
        self.ranges = [Range(0x10_0000, 1 << 20)]


Start = Callable[..., PciTransport]


@pytest.fixture
def model() -> Model:
    return Model()


@pytest.fixture
def start(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Start the model's driver."""
    space = bytearray(256)
    space[0x34] = at = 0x40
    for kind, offset in ((1, COMMON), (2, NOTIFY), (3, ISR), (4, DEVICE)):
        capability = struct.pack("<BBBBBxxxIII", 9, at + 32, 20, kind, 0, offset, 64, 4)
        space[at : at + len(capability)] = capability
        at += 32
    space[at - 32 + 1] = 0
    (tmp_path / "config").write_bytes(space)
    monkeypatch.setattr(virtio_pci, "bind", lambda path: Path("/dev/null"))
    monkeypatch.setattr(virtio_pci, "_HugePages", Pages)
    monkeypatch.setattr(PciTransport, "_window", lambda self, capability: model.window(capability.offset))

    def started(wanted: int = int(DRIVER_FEATURES)) -> PciTransport:
        return PciTransport(tmp_path, wanted=wanted)

    return started


class TestPci:
    @requirement("DRV-QUE-1")
    def test_queues_before_driver_ok(self, model: Model, start: Start) -> None:
        transport = start()
        assert model.status & DRIVER_OK
        before = model.did[: model.did.index(("status", model.status))]
        assert {index for what, index in before if what == "enable"} >= {Queue.CONTROL, Queue.EVENT, Queue.REQUEST}
        assert ("status", model.status) not in before
        transport.close()

    @requirement("DRV-QUE-1")
    @pytest.mark.parametrize("queues", [0, 1, 2])
    def test_too_few_queues(self, model: Model, start: Start, queues: int) -> None:
        model.num_queues = queues
        with pytest.raises(PciError, match="no request queue"):
            start()
        assert not model.status & DRIVER_OK

    @requirement("DRV-ID-1")
    def test_another_device(self, model: Model, start: Start) -> None:
        model.config = replace(model.config, epoch=0)
        with pytest.raises(FormatError):
            start()
        assert not model.status & DRIVER_OK

    @requirement("DRV-FEA-1")
    def test_version_1(self, model: Model, start: Start) -> None:
        start().close()
        assert model.accepted & VERSION_1
        model.did.clear()
        model.features &= ~VERSION_1
        with pytest.raises(PciError, match="virtio 1"):
            start()
        assert not model.status & FEATURES_OK

    @requirement("DRV-FEA-2")
    @pytest.mark.parametrize(("offered", "accepted"), NEEDS)
    def test_features_that_lack_what_they_require(
        self, model: Model, start: Start, offered: int, accepted: int
    ) -> None:
        model.features = VERSION_1 | int(offered)
        start(wanted=EVERYTHING).close()
        assert model.accepted == VERSION_1 | accepted

    @requirement("DRV-CFG-1")
    def test_an_epoch_that_changes_while_it_is_read(self, model: Model, start: Start) -> None:
        transport = start()

        def change(at: int) -> None:
            if at == 8:  # between the epoch's halves
                model.on_config_read = lambda at: None
                model.config = replace(model.config, epoch=0x3333_3333_4444_4444)
                model.common[virtio_pci._GENERATION] += 1

        model.on_config_read = change
        assert Config.unpack(transport.read_config(128)).epoch == 0x3333_3333_4444_4444

        def never_rest(at: int) -> None:
            model.common[virtio_pci._GENERATION] ^= at == 8

        model.on_config_read = never_rest
        with pytest.raises(PciError, match="rest"):
            transport.read_config(128)
        transport.close()

    @requirement("DRV-INI-1")
    def test_the_epoch_is_read_after_driver_ok(self, model: Model, start: Start) -> None:
        def reset_is_known_as_late_as_that() -> None:
            model.config = replace(model.config, epoch=0x55)

        model.on_driver_ok = reset_is_known_as_late_as_that
        driver = VirtioTeeDriver(start())
        assert driver.config.epoch == 0x55
        assert ("kick", Queue.REQUEST) not in model.did
        driver.close()


class TestVhostUser:
    @requirement("DRV-QUE-1", "DRV-FEA-1")
    def test_queues_and_version_1(self, tmp_path: Path) -> None:
        with live(tmp_path, queues=2) as device:
            driver = device.driver()
            assert device.device._running == {0, 1, 2, 3}
            assert device.device.acked_features & RingFeature.VERSION_1
            driver.close()

    @requirement("DRV-FEA-2")
    @pytest.mark.parametrize(("offered", "accepted"), NEEDS)
    def test_features_that_lack_what_they_require(self, tmp_path: Path, offered: int, accepted: int) -> None:
        with live(tmp_path) as device:
            device.device.features = int(offered)
            transport = VhostUserTransport(device.path, wanted=EVERYTHING)
            assert device.device.acked_features & EVERYTHING == transport.features & EVERYTHING == accepted
            transport.close()

    @requirement("DRV-CFG-1")
    def test_an_epoch_that_changes_while_it_is_read(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with live(tmp_path) as device:
            transport = VhostUserTransport(device.path, wanted=0)
            answers = [b"old old ", b"old new ", b"new new ", b"new new ", b"more"]
            monkeypatch.setattr(transport.frontend, "read_config", lambda offset, size: answers.pop(0))
            assert transport.read_config(8) == b"new new "
            assert answers == [b"more"]
            numbers = iter(range(1 << 20))
            monkeypatch.setattr(transport.frontend, "read_config", lambda offset, size: next(numbers))
            with pytest.raises(TransportError, match="rest"):
                transport.read_config(8)
            transport.close()

    @requirement("DRV-INI-1")
    def test_the_epoch_is_read_after_the_start(self, tmp_path: Path) -> None:
        with live(tmp_path) as device:
            started = device.device.queue_started
            all_run = threading.Event()

            def reset_is_known_as_late_as_that(index: int, *more: Any) -> None:
                started(index, *more)
                if index == Queue.REQUEST:
                    device.device.epoch.number = 0x55
                    all_run.set()

            device.device.queue_started = reset_is_known_as_late_as_that  # type: ignore[method-assign]
            driver = device.driver()
            assert all_run.is_set()
            assert driver.config.epoch == 0x55
            driver.close()
