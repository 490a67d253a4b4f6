"""Parameters of calls and RPCs: values and memory references.

The model is the one of Linux's ``struct tee_param`` (include/linux/tee_core.h): any number of parameters, each none, a
value of three 64-bit words, or a memory reference; a *meta* parameter belongs to the protocol and is never seen by a
TA. A parameter object belongs to its call; the side that serves the call writes results into it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

from tee.memory import Memory


class Direction(IntEnum):
    """Who writes a parameter; the same numbers as the low two bits of a Linux TEE parameter attribute."""

    IN = 1
    OUT = 2
    INOUT = 3

    @property
    def is_input(self) -> bool:
        """The caller's content is given to the callee."""
        return self is not Direction.OUT

    @property
    def is_output(self) -> bool:
        """The callee's content is given back to the caller."""
        return self is not Direction.IN


@dataclass(slots=True)
class Value:
    """Three unsigned 64-bit words, in any direction."""

    direction: Direction
    a: int = 0
    b: int = 0
    c: int = 0
    meta: bool = False


@dataclass(slots=True)
class MemRef:
    """``size`` bytes at ``offset`` of a memory; ``memory`` None is the NULL reference (then ``offset`` is 0).

    For an output the callee sets ``size``: the bytes it wrote, or with ``SHORT_BUFFER`` the bytes it would need.
    """

    direction: Direction
    memory: Memory | None
    offset: int = 0
    size: int = 0
    meta: bool = False


@dataclass(slots=True)
class Nothing:
    """An empty parameter slot. Slots keep their numbers, so an empty one is still sent."""

    meta: bool = False


Param = Value | MemRef | Nothing
