"""What reports of all benches say of the machine."""

from __future__ import annotations

import platform
from typing import Any

BUSY = 0.7
"""A load average that something else than the bench makes."""


def machine(load: float) -> dict[str, Any]:
    """The entry ``machine`` of a report."""
    return {
        "arch": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load": load,
    }
