"""Guests cause lines in the backend's log; none of them shall fill the disk with it."""

from __future__ import annotations

import logging

from tee.io.throttle import Throttle


class ThrottleFilter(logging.Filter):
    """Lets so many lines of each kind pass in a while (see :mod:`tee.io.throttle`). A kind is a line of the program."""

    def __init__(self) -> None:
        super().__init__()
        self._kinds: dict[tuple[str, int], Throttle] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:  # was asked for: -v
            return True
        said = self._kinds.setdefault((record.pathname, record.lineno), Throttle()).admit()
        if said is None:
            return False
        if said:
            record.msg, record.args = record.getMessage() + said, None
        return True


def throttle_logs() -> None:
    """For all that is logged from here on."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(ThrottleFilter())
