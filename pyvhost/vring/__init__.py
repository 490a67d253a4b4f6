"""Virtqueues: both sides of the shared-memory rings, over memory that is passed in."""

from pyvhost.vring.api import Chain, DeviceQueue, DriverQueue, Fences
from pyvhost.vring.choice import implementation, queue_class
from pyvhost.vring.packed_device import PackedDeviceQueue
from pyvhost.vring.packed_driver import PackedDriverQueue
from pyvhost.vring.split_device import SplitDeviceQueue
from pyvhost.vring.split_driver import SplitDriverQueue

__all__ = [
    "Chain",
    "DeviceQueue",
    "DriverQueue",
    "Fences",
    "PackedDeviceQueue",
    "PackedDriverQueue",
    "SplitDeviceQueue",
    "SplitDriverQueue",
    "implementation",
    "queue_class",
]
