"""vhost-user and virtio for Python: write a device in a page, or be the frontend.

The core has no I/O: ``messages``, ``backend`` and ``frontend`` (state machines), ``memory``, ``vring`` (virtqueues,
both sides), ``session`` (binds a device to a connection). ``pyvhost.io`` has sockets, threads and mappings:
``pyvhost.io.server.serve``, ``pyvhost.io.dataplane.DataPlane``, ``pyvhost.io.frontend.Frontend``.
"""

from pyvhost.codec import Codec, Ignored, Reserved
from pyvhost.device import Device, Link
from pyvhost.errors import PyvhostError
from pyvhost.memory import GuestMemory, Lease
from pyvhost.vring.api import Chain, DeviceQueue, DriverQueue

__all__ = [
    "Chain",
    "Codec",
    "Device",
    "DeviceQueue",
    "DriverQueue",
    "GuestMemory",
    "Ignored",
    "Lease",
    "Link",
    "PyvhostError",
    "Reserved",
]
