"""What a partition manager implements: real ones leave much out, and say so in FFA_FEATURES."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ffa.abi.ids import VERSION_1_2, Call, Feature

_INTERRUPTS = {Feature.NOTIFICATION_PENDING: 5, Feature.SCHEDULE_RECEIVER: 8, Feature.MANAGED_EXIT: 4}


@dataclass(frozen=True, slots=True)
class Profile:
    """The choices that FF-A leaves to an implementation. The defaults are the whole of FF-A 1.2."""

    version: int = VERSION_1_2
    missing: frozenset[Call] = frozenset()  #: functions answered with NOT_SUPPORTED
    unannounced: frozenset[Call] = frozenset()  #: functions that work, but that FFA_FEATURES does not tell of
    announced: frozenset[Call] = frozenset()  #: functions that FFA_FEATURES tells of, whoever may call them
    interrupts: Mapping[Feature, int] = field(default_factory=lambda: dict(_INTERRUPTS))
    any_interrupt: bool = False  #: FFA_FEATURES tells whoever asks of any of them
    version_change: bool = False  #: a caller may agree on another version later
    fragments: bool = True
    dynamic_buffers: bool = True  #: a descriptor may be in memory other than TX
    max_borrowers: int = 8
    max_regions: int = 4096  #: transactions of one sender at a time
    max_pages: int = 1 << 24  #: pages in one transaction
    max_buffer_pages: int = 63
    tells_buffer_limit: bool = True  #: FFA_FEATURES(RXTX_MAP) says max_buffer_pages
    per_vcpu: bool = True  #: notifications of single vCPUs
    info_once: bool = True  #: FFA_NOTIFICATION_INFO_GET lists what is pending once
    owner_checks: bool = True  #: the sender must own the pages exclusively
    no_partition_is_error: bool = True  #: FFA_PARTITION_INFO_GET of an unknown UUID is INVALID_PARAMETERS


FULL = Profile()

_NOT_IN_OPTEE = frozenset(
    {
        *(Call.MEM_LEND, Call.MEM_DONATE, Call.MEM_RETRIEVE_REQ, Call.MEM_RELINQUISH, Call.MEM_FRAG_RX),
        *(Call.MSG_SEND_DIRECT_REQ2, Call.MSG_SEND_DIRECT_RESP2, Call.PARTITION_INFO_GET_REGS),
        *(Call.RX_ACQUIRE, Call.MSG_SEND2, Call.MSG_SEND, Call.MSG_POLL, Call.MSG_WAIT, Call.YIELD),
        *(Call.MEM_PERM_GET, Call.MEM_PERM_SET, Call.CONSOLE_LOG, Call.MEM_RETRIEVE_RESP),
    }
)

OPTEE_4_10 = Profile(
    missing=_NOT_IN_OPTEE,
    unannounced=frozenset({Call.ID_GET, Call.RUN, Call.MSG_SEND_DIRECT_RESP}),
    announced=frozenset({Call.NOTIFICATION_SET}),
    interrupts={Feature.SCHEDULE_RECEIVER: 8, Feature.MANAGED_EXIT: 0},
    any_interrupt=True,
    version_change=True,
    tells_buffer_limit=False,
    max_regions=64,
    per_vcpu=False,
    info_once=False,
    owner_checks=False,
    no_partition_is_error=False,
)
"""OP-TEE 4.10 as SPMC at S-EL1 below TF-A's SPMD, as the normal world sees both together."""
