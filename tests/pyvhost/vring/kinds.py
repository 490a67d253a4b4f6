"""The implementations of the device's side that tests run over."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from pyvhost.testing import RingPair, ring_pair
from pyvhost.vring.choice import QueueFactory, has_compiled, queue_class
from pyvhost.vring.packed import pack_base


@dataclass(frozen=True)
class Kind:
    """A ring format and who serves it."""

    packed: bool
    queue: str

    def __str__(self) -> str:
        return f"{'packed' if self.packed else 'split'}-{self.queue}"

    @property
    def factory(self) -> QueueFactory:
        return queue_class(self.packed, self.queue)

    def base(self, size: int, requests: int) -> int:
        """Where an idle ring is after so many requests of one descriptor."""
        if not self.packed:
            return requests & 0xFFFF
        position, wrap = requests % size, 1 - requests // size % 2
        return pack_base(position, wrap, position, wrap)

    def pair(self, size: int = 8, *, base: int = 0, **options: Any) -> RingPair:
        """``base``: requests so far."""
        return ring_pair(size, base=self.base(size, base), packed=self.packed, queue=self.queue, **options)


def built(kind: Kind | str) -> Any:
    """A parameter that is skipped where the compiled queue was not built."""
    queue = kind.queue if isinstance(kind, Kind) else kind
    skip = queue == "compiled" and not has_compiled()
    return pytest.param(
        kind, id=str(kind), marks=[pytest.mark.skip(reason="the compiled queue was not built")] if skip else []
    )


QUEUES = [built(queue) for queue in ("pure", "compiled")]
KINDS = [built(Kind(packed, queue)) for packed in (False, True) for queue in ("pure", "compiled")]

each_queue = pytest.mark.parametrize("queue", QUEUES)
each_kind = pytest.mark.parametrize("kind", KINDS)
