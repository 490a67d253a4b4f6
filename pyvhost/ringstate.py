"""The states of one ring, as a table. Source: QEMU, docs/interop/vhost-user.rst, section "Ring states".

The document has three states; "stopped" is two here, because SET_VRING_ENABLE may come before a ring starts and is
remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum

__all__ = ["RING_TABLE", "RingAction", "RingEvent", "RingState"]


class RingState(Enum):
    """``started`` rings have a kick fd, a size and addresses. Only a RUNNING ring is processed."""

    STOPPED = "stopped"
    ARMED = "stopped, will run when started"
    DISABLED = "started, disabled"
    RUNNING = "started, enabled"

    @property
    def started(self) -> bool:
        return self in (RingState.DISABLED, RingState.RUNNING)


class RingEvent(Enum):
    START = "kick fd, size and addresses are known"
    ENABLE = "SET_VRING_ENABLE 1, or SET_FEATURES without PROTOCOL_FEATURES"
    DISABLE = "SET_VRING_ENABLE 0"
    STOP = "GET_VRING_BASE, RESET_DEVICE, or a change of what a started ring cannot change"


class RingAction(Enum):
    NONE = "-"
    RUN = "set the queue up if it is not, and look at it even if no kick came"
    PAUSE = "take no more requests"
    STOP = "let go of the ring"


_S, _E, _A = RingState, RingEvent, RingAction

#: START happens to rings that are not started only
RING_TABLE: Mapping[tuple[RingState, RingEvent], tuple[RingState, RingAction]] = {
    (_S.STOPPED, _E.START): (_S.DISABLED, _A.NONE),
    (_S.STOPPED, _E.ENABLE): (_S.ARMED, _A.NONE),
    (_S.STOPPED, _E.DISABLE): (_S.STOPPED, _A.NONE),
    (_S.STOPPED, _E.STOP): (_S.STOPPED, _A.NONE),
    (_S.ARMED, _E.START): (_S.RUNNING, _A.RUN),
    (_S.ARMED, _E.ENABLE): (_S.ARMED, _A.NONE),
    (_S.ARMED, _E.DISABLE): (_S.STOPPED, _A.NONE),
    (_S.ARMED, _E.STOP): (_S.ARMED, _A.NONE),
    (_S.DISABLED, _E.ENABLE): (_S.RUNNING, _A.RUN),
    (_S.DISABLED, _E.DISABLE): (_S.DISABLED, _A.NONE),
    (_S.DISABLED, _E.STOP): (_S.STOPPED, _A.STOP),
    (_S.RUNNING, _E.ENABLE): (_S.RUNNING, _A.RUN),
    (_S.RUNNING, _E.DISABLE): (_S.DISABLED, _A.PAUSE),
    (_S.RUNNING, _E.STOP): (_S.ARMED, _A.STOP),
}
