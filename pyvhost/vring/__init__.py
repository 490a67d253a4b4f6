"""Virtqueues: both sides of the shared-memory rings, over memory that is passed in."""

from pyvhost.vring.api import Chain, DeviceQueue, DriverQueue, Fences
from pyvhost.vring.split_device import SplitDeviceQueue
from pyvhost.vring.split_driver import SplitDriverQueue

__all__ = ["Chain", "DeviceQueue", "DriverQueue", "Fences", "SplitDeviceQueue", "SplitDriverQueue"]
