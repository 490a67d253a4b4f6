"""Every error that pyvhost raises, in one hierarchy.

``ProtocolError`` is what a *peer* did wrong (the other end of the socket, or of a ring): its message is fit for a
log and names no host pointer. The others are the caller's own mistakes or the plain state of things.
"""

from __future__ import annotations


class PyvhostError(Exception):
    """Base of all errors of this library."""


class ProtocolError(PyvhostError):
    """A peer broke a protocol. Subclasses say which."""


class FormatError(ProtocolError):
    """Bytes that do not have the layout they should have: too short, a wrong constant, a reserved field set."""


class MessageError(ProtocolError):
    """A vhost-user message that must not be obeyed: wrong size, count, fds, order, or an unknown request."""


class MemoryFault(ProtocolError):  # noqa: N818 - a fault is what hardware calls it, too
    """An address range that no memory region holds, or a region that cannot be mapped as described."""


class RingError(ProtocolError):
    """A virtqueue whose shared memory makes no sense. The queue is broken from then on (see ``queue.broken``)."""


class DeviceError(ProtocolError):
    """Driver side: the device returned an id or a length that it was not given. The queue is broken from then on."""


class QueueFull(PyvhostError):  # noqa: N818 - flow control rather than a fault
    """Driver side: not enough free descriptors for this chain; try again after ``poll()`` has freed some."""


class StateError(PyvhostError):
    """The caller used an object in a state that does not allow it (push after stop, double push, …)."""


class Disconnected(PyvhostError):  # noqa: N818 - the normal end of a connection
    """The peer is gone, or went while an answer was awaited."""


class RequestFailed(PyvhostError):  # noqa: N818 - reads as what happened
    """Frontend side: the backend answered a request with a failure (REPLY_ACK not zero, empty config, …)."""
