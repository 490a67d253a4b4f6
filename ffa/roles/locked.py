"""Several vCPUs that run at once: one call at a time enters the model."""

from __future__ import annotations

from contextlib import AbstractContextManager

from ffa.abi.frame import Frame
from ffa.roles.endpoint import Relayer


class Locked:
    """A relayer that is entered under ``lock``: what an endpoint of each thread has as its ``relayer``.

    A machine's roles are not thread-safe, and what they do below a call happens inside it: so one lock for each machine
    is enough, around the calls of VMs. Give a lock that its holder can take again (``threading.RLock()``) if a VM makes
    calls while it is asked something itself.
    """

    def __init__(self, below: Relayer, lock: AbstractContextManager[object]) -> None:
        self._below = below
        self._lock = lock

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """The answer of the relayer below."""
        with self._lock:
            return self._below.call(caller, frame, vcpu)
