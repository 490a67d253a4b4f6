"""Guests do not fill the backend's log."""

from __future__ import annotations

import logging

from tee.io.throttle import LINES
from virtio_tee.throttle import ThrottleFilter


def record(level: int, line: int, text: str = "vm %s", *args: object) -> logging.LogRecord:
    return logging.LogRecord("x", level, "file.py", line, text, args or ("a",), None)


def test_so_many_of_each_kind() -> None:
    limited = ThrottleFilter()
    passed = [record(logging.WARNING, 1) for _ in range(100)]
    passed = [one for one in passed if limited.filter(one)]
    assert len(passed) == LINES
    assert passed[0].getMessage() == "vm a"
    assert passed[-1].getMessage().startswith("vm a [more such lines are left out")
    assert limited.filter(record(logging.WARNING, 2))
    assert all(limited.filter(record(logging.INFO, 1)) for _ in range(100))
