"""The notification bitmaps of one receiver, for senders on one side (partitions of the SPMC, or VMs)."""

from __future__ import annotations

from dataclasses import dataclass, field

from ffa.abi.ids import Error, FfaError

BITS = 64


@dataclass(slots=True)
class Bitmap:
    """Sixty-four notifications: who may send each, and which are pending."""

    senders: dict[int, int] = field(default_factory=dict)  #: bit → endpoint that it is bound to
    per_vcpu: int = 0  #: bits that are bound for single vCPUs
    pending: int = 0  #: global ones
    vcpus: dict[int, int] = field(default_factory=dict)  #: vCPU → its own pending ones
    listed: set[int | None] = field(default_factory=set)  #: vCPUs (None: the global ones) that INFO_GET has told of

    @property
    def any_pending(self) -> int:
        """All bits that are pending anywhere."""
        bits = self.pending
        for own in self.vcpus.values():
            bits |= own
        return bits

    @property
    def bound(self) -> int:
        """All bits that are bound."""
        return sum(1 << bit for bit in self.senders)

    def bind(self, sender: int, bits: int, per_vcpu: bool) -> None:
        """Binds ``bits`` to ``sender``. Raises FfaError: DENIED, one is bound or pending."""
        if bits & (self.bound | self.any_pending):
            raise FfaError(Error.DENIED, "a notification is bound already")
        self.senders.update(dict.fromkeys(_bits(bits), sender))
        if per_vcpu:
            self.per_vcpu |= bits

    def unbind(self, sender: int, bits: int) -> None:
        """Ends it. Raises FfaError: DENIED, one is pending, or not bound to ``sender``."""
        if bits & self.any_pending or any(self.senders.get(bit) != sender for bit in _bits(bits)):
            raise FfaError(Error.DENIED, "a notification is pending, or not the sender's")
        for bit in _bits(bits):
            del self.senders[bit]
        self.per_vcpu &= ~bits

    def set(self, sender: int, bits: int, vcpu: int | None) -> None:
        """Makes ``bits`` pending, for one vCPU or globally.

        Raises FfaError: DENIED, one is not bound to ``sender``; INVALID_PARAMETERS, one was bound the other way.
        """
        if any(self.senders.get(bit) != sender for bit in _bits(bits)):
            raise FfaError(Error.DENIED, "a notification is not bound to the sender")
        if (self.per_vcpu & bits) != (bits if vcpu is not None else 0):
            raise FfaError(
                Error.INVALID_PARAMETERS, "a notification was bound the other way (global, or for single vCPUs)"
            )
        if vcpu is None:
            self.pending |= bits
        else:
            self.vcpus[vcpu] = self.vcpus.get(vcpu, 0) | bits
        self.listed.discard(vcpu)

    def take(self, vcpu: int) -> int:
        """What is pending globally and for ``vcpu``; it is pending no more."""
        bits = self.pending | self.vcpus.pop(vcpu, 0)
        self.pending = 0
        self.listed -= {None, vcpu}
        return bits

    def to_list(self, once: bool) -> tuple[bool, list[int]]:
        """Whether global ones, and which vCPUs', are to be listed by INFO_GET."""
        told = self.listed if once else ()
        return bool(self.pending) and None not in told, sorted(v for v, b in self.vcpus.items() if b and v not in told)


def _bits(bits: int) -> list[int]:
    return [bit for bit in range(BITS) if bits >> bit & 1]
