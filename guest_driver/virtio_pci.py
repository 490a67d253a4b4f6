"""A transport in a real guest: the virtio PCI device, driven from user space through ``uio_pci_generic``.

Layouts are those of the virtio 1.2 specification, section 4.1 ("Virtio Over PCI Bus"). Interrupts are INTx, which is
all that uio_pci_generic offers. Memory for the device is huge pages, whose physical addresses ``/proc/self/pagemap``
tells: that takes root, and Debian kernels have no VFIO without an IOMMU that would do it better.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import select
import struct
import time
from dataclasses import dataclass
from pathlib import Path

from device.config import Config
from device.messages import CONFIG
from device.wire import DEVICE_ID, Queue, only_usable
from guest_driver.arena import Arena
from guest_driver.transport import TransportError
from pyvhost.io.fence import host_fences
from pyvhost.vring.split_driver import SplitDriverQueue
from tee.memory import Memory, Range

VENDOR = 0x1AF4
DEVICE = 0x1040 + DEVICE_ID
PCI_DEVICES = Path("/sys/bus/pci/devices")
UIO_DRIVER = Path("/sys/bus/pci/drivers/uio_pci_generic")

_COMMAND, _COMMAND_MEMORY, _COMMAND_MASTER, _COMMAND_INTX_OFF = 4, 0x2, 0x4, 0x400
_CAPABILITIES, _CAP_VENDOR = 0x34, 9
_CFG_COMMON, _CFG_NOTIFY, _CFG_ISR, _CFG_DEVICE = 1, 2, 3, 4
_ACKNOWLEDGE, _DRIVER, _DRIVER_OK, _FEATURES_OK = 1, 2, 4, 8
_F_INDIRECT_DESC, _F_EVENT_IDX, _F_VERSION_1 = 1 << 28, 1 << 29, 1 << 32
_INDIRECT_ENTRIES = 8
_ISR_CONFIG = 2
_HUGE_PAGE = 2 << 20
_MAP_HUGETLB, _MAP_LOCKED = 0x40000, 0x2000
_PAGE = 4096
_RESET_SECONDS = 10


class PciError(TransportError):
    """The device cannot be used; the text says what to do."""


def find() -> list[Path]:
    """The TEE devices of this machine, as PCI device folders in sysfs."""
    return [
        path
        for path in sorted(PCI_DEVICES.iterdir())
        if (_hex(path / "vendor"), _hex(path / "device")) == (VENDOR, DEVICE)
    ]


def _hex(path: Path) -> int:
    return int(path.read_text(), 16)


def bind(path: Path) -> Path:
    """Give the device to uio_pci_generic, unless a real driver has it; its node in /dev. Raises PciError."""
    driver = path / "driver"
    holder = driver.resolve().name if driver.exists() else ""
    if holder == "virtio-pci" and not any(path.glob("virtio*/driver")):
        # the transport driver claims every virtio device; behind it nobody drives this one
        (driver / "unbind").write_text(path.name)
        holder = ""
    if holder and holder != UIO_DRIVER.name:
        raise PciError(f"{path.name} is driven by {holder}: unbind it first, or use that driver")
    if not holder:
        if not UIO_DRIVER.exists():
            raise PciError("the kernel module uio_pci_generic is not loaded: modprobe uio_pci_generic")
        (path / "driver_override").write_text(UIO_DRIVER.name)
        (UIO_DRIVER / "bind").write_text(path.name)
    nodes = sorted((path / "uio").glob("uio*"))
    if not nodes:
        raise PciError(f"{path.name} has no UIO node")
    return Path("/dev") / nodes[0].name


@dataclass(frozen=True, slots=True)
class _Capability:
    bar: int
    offset: int
    length: int
    multiplier: int = 0


class _Registers:
    """A window of a BAR. Each access is one load or store of the field's width, as the specification wants."""

    def __init__(self, view: memoryview) -> None:
        self.view = view
        self._as = {1: view, 2: view[: len(view) & ~1].cast("H"), 4: view[: len(view) & ~3].cast("I")}

    def read(self, offset: int, width: int) -> int:
        return int(self._as[width][offset // width])

    def write(self, offset: int, width: int, value: int) -> None:
        self._as[width][offset // width] = value

    def write64(self, offset: int, value: int) -> None:
        self.write(offset, 4, value & 0xFFFF_FFFF)
        self.write(offset + 4, 4, value >> 32)


# struct virtio_pci_common_cfg
_DEVICE_FEATURE_SELECT, _DEVICE_FEATURE, _DRIVER_FEATURE_SELECT, _DRIVER_FEATURE = 0, 4, 8, 12
_NUM_QUEUES, _STATUS, _GENERATION = 18, 20, 21
_QUEUE_SELECT, _QUEUE_SIZE, _QUEUE_ENABLE, _QUEUE_NOTIFY_OFF = 22, 24, 28, 30
_QUEUE_DESC, _QUEUE_DRIVER, _QUEUE_DEVICE = 32, 40, 48


class PciTransport:
    """The device at ``path``, reset, negotiated and started. Raises PciError, and FormatError where it is none of ours.

    ``memory_bytes`` of huge pages are taken for buffers; ``wanted`` are the device-specific feature bits to
    negotiate if offered.
    """

    def __init__(self, path: Path, *, wanted: int, memory_bytes: int = 32 << 20, queue_size: int = 128) -> None:
        self.path = path
        node = bind(path)
        self._config_fd = os.open(path / "config", os.O_RDWR)
        self._maps: dict[int, mmap.mmap] = {}
        self._uio = os.open(node, os.O_RDWR)
        try:
            self._open(wanted, memory_bytes, queue_size)
        except BaseException:
            os.close(self._uio)
            os.close(self._config_fd)
            raise

    def _open(self, wanted: int, memory_bytes: int, queue_size: int) -> None:
        capabilities = self._capabilities()
        self._set_command()
        try:
            self._common = self._window(capabilities[_CFG_COMMON])
            self._isr = self._window(capabilities[_CFG_ISR])
            self._device = self._window(capabilities[_CFG_DEVICE])
            self._notify = self._window(capabilities[_CFG_NOTIFY])
        except KeyError as e:
            raise PciError(f"{self.path.name} has no virtio structure {e}: not a modern virtio device") from None
        self._multiplier = capabilities[_CFG_NOTIFY].multiplier
        self._memory = _HugePages(memory_bytes)
        self._arena = Arena(self._memory.view, self._memory.ranges)
        self._reset()
        self._common.write(_STATUS, 1, _ACKNOWLEDGE)
        self._common.write(_STATUS, 1, _ACKNOWLEDGE | _DRIVER)
        self.features = self._negotiate(wanted)
        self._common.write(_STATUS, 1, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK)
        if not self._common.read(_STATUS, 1) & _FEATURES_OK:
            raise PciError("the device refused the features that it had offered")
        Config.unpack(self.read_config(CONFIG.size))  # is it ours at all
        if self._common.read(_NUM_QUEUES, 2) <= Queue.REQUEST:
            raise PciError(f"{self.path.name} has no request queue")
        self._fences = host_fences()
        self.queues: list[SplitDriverQueue] = []
        self._notify_at: list[int] = []
        for index in range(self._common.read(_NUM_QUEUES, 2)):
            self._set_up_queue(index, queue_size)
        self._common.write(_STATUS, 1, _ACKNOWLEDGE | _DRIVER | _FEATURES_OK | _DRIVER_OK)

    # -- PCI

    def _capabilities(self) -> dict[int, _Capability]:
        """The first virtio structure of each type (struct virtio_pci_cap)."""
        found: dict[int, _Capability] = {}
        at = os.pread(self._config_fd, 1, _CAPABILITIES)[0] & ~3
        for _ in range(48):  # no more fit into the space; a loop in the list ends here
            if not at:
                break
            kind, after, size, cfg_type, bar = os.pread(self._config_fd, 5, at)
            if kind == _CAP_VENDOR and size >= 16:
                offset, length = struct.unpack("<II", os.pread(self._config_fd, 8, at + 8))
                multiplier = 0
                if cfg_type == _CFG_NOTIFY and size >= 20:
                    (multiplier,) = struct.unpack("<I", os.pread(self._config_fd, 4, at + 16))
                found.setdefault(cfg_type, _Capability(bar, offset, length, multiplier))
            at = after & ~3
        return found

    def _set_command(self) -> None:
        """Memory accesses and bus mastering on, INTx not masked."""
        (command,) = struct.unpack("<H", os.pread(self._config_fd, 2, _COMMAND))
        command = (command | _COMMAND_MEMORY | _COMMAND_MASTER) & ~_COMMAND_INTX_OFF
        os.pwrite(self._config_fd, struct.pack("<H", command), _COMMAND)

    def _window(self, capability: _Capability) -> _Registers:
        bar = self._maps.get(capability.bar)
        if bar is None:
            resource = os.open(self.path / f"resource{capability.bar}", os.O_RDWR)
            try:
                bar = self._maps[capability.bar] = mmap.mmap(resource, os.fstat(resource).st_size)
            finally:
                os.close(resource)
        if capability.offset + capability.length > len(bar):
            raise PciError(f"{self.path.name} describes a structure outside its BAR {capability.bar}")
        return _Registers(memoryview(bar)[capability.offset : capability.offset + capability.length])

    # -- virtio

    def _reset(self) -> None:
        self._common.write(_STATUS, 1, 0)
        deadline = time.monotonic() + _RESET_SECONDS
        while self._common.read(_STATUS, 1):
            if time.monotonic() > deadline:
                raise PciError(f"{self.path.name} has not done a reset within {_RESET_SECONDS} seconds")

    def _negotiate(self, wanted: int) -> int:
        offered = 0
        for half in (0, 1):
            self._common.write(_DEVICE_FEATURE_SELECT, 4, half)
            offered |= self._common.read(_DEVICE_FEATURE, 4) << 32 * half
        if not offered & _F_VERSION_1:
            raise PciError(f"{self.path.name} is not a virtio 1 device")
        features = only_usable(offered & (wanted | _F_INDIRECT_DESC | _F_EVENT_IDX) | _F_VERSION_1)
        for half in (0, 1):
            self._common.write(_DRIVER_FEATURE_SELECT, 4, half)
            self._common.write(_DRIVER_FEATURE, 4, features >> 32 * half & 0xFFFF_FFFF)
        return features

    def _set_up_queue(self, index: int, queue_size: int) -> None:
        common = self._common
        common.write(_QUEUE_SELECT, 2, index)
        size = min(queue_size, common.read(_QUEUE_SIZE, 2))
        if not size:
            raise PciError(f"{self.path.name} has no queue {index}")
        common.write(_QUEUE_SIZE, 2, size)
        indirect = _INDIRECT_ENTRIES if self.features & _F_INDIRECT_DESC else 0
        memory = self._arena.allocate(SplitDriverQueue.memory_size(size, indirect))
        if len(memory.ranges) != 1:
            raise PciError("no physically contiguous memory for a ring")
        queue = SplitDriverQueue(
            size,
            memory.segments[0],
            memory.ranges[0].address,
            fences=self._fences,
            event_idx=bool(self.features & _F_EVENT_IDX),
            indirect=indirect,
        )
        common.write64(_QUEUE_DESC, queue.desc_addr)
        common.write64(_QUEUE_DRIVER, queue.avail_addr)
        common.write64(_QUEUE_DEVICE, queue.used_addr)
        offset = common.read(_QUEUE_NOTIFY_OFF, 2) * self._multiplier
        if offset + 2 > len(self._notify.view):
            raise PciError(f"{self.path.name}: the doorbell of queue {index} is outside its structure")
        self._notify_at.append(offset)
        common.write(_QUEUE_ENABLE, 2, 1)
        self.queues.append(queue)

    def read_config(self, size: int) -> bytes:
        """See :class:`~guest_driver.transport.Transport`."""
        for _ in range(100):
            generation = self._common.read(_GENERATION, 1)
            words = [self._device.read(at, 4) for at in range(0, size, 4)]
            if self._common.read(_GENERATION, 1) == generation:
                return struct.pack(f"<{len(words)}I", *words)
        raise PciError("the device's config space does not come to rest")

    def kick(self, index: int) -> None:
        """See :class:`~guest_driver.transport.Transport`."""
        self._notify.write(self._notify_at[index], 2, index)

    def fileno(self) -> int:
        """See :class:`~guest_driver.transport.Transport`."""
        return self._uio

    def acknowledge(self) -> bool:
        """See :class:`~guest_driver.transport.Transport`."""
        if not select.select([self._uio], [], [], 0)[0]:
            return False
        os.read(self._uio, 4)
        isr = self._isr.read(0, 1)  # reading lowers the line
        self._set_command()  # the kernel masked it
        return bool(isr & _ISR_CONFIG)

    def allocate(self, size: int) -> Memory:
        """See :class:`~guest_driver.transport.Transport`."""
        return self._arena.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~guest_driver.transport.Transport`."""
        self._arena.release(memory)

    def close(self) -> None:
        """See :class:`~guest_driver.transport.Transport`."""
        try:
            self._reset()
        finally:
            os.close(self._uio)
            os.close(self._config_fd)


class _HugePages:
    """``size`` bytes of huge pages (rounded up), locked, with their physical addresses. Raises PciError."""

    def __init__(self, size: int) -> None:
        size = (size + _HUGE_PAGE - 1) // _HUGE_PAGE * _HUGE_PAGE
        try:
            # shared, so that a child process does not make the kernel copy a page away from its physical address
            flags = mmap.MAP_SHARED | mmap.MAP_ANONYMOUS | _MAP_HUGETLB | _MAP_LOCKED | mmap.MAP_POPULATE
            self._map = mmap.mmap(-1, size, flags=flags)
        except OSError as e:
            pages = size // _HUGE_PAGE
            raise PciError(
                f"no {pages} huge pages of 2 MiB ({e.strerror}): echo {pages} > /proc/sys/vm/nr_hugepages"
            ) from None
        self.view = memoryview(self._map)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self.ranges = [Range(_physical(start + at), _HUGE_PAGE) for at in range(0, size, _HUGE_PAGE)]


def _physical(address: int) -> int:
    """The physical address of a mapped page of this process (Documentation/admin-guide/mm/pagemap.rst)."""
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        pagemap.seek(address // _PAGE * 8)
        (entry,) = struct.unpack("<Q", pagemap.read(8))
    frame = entry & ((1 << 55) - 1)
    if not entry >> 63 or not frame:
        raise PciError("the kernel does not tell physical addresses: run as root (CAP_SYS_ADMIN)")
    return int(frame * _PAGE)
