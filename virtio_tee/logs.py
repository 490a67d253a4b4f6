"""Logging options that commands share."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import click

LEVELS = {0: logging.WARNING, 1: logging.INFO, 2: logging.DEBUG}


def verbose_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds -v; logs go to stderr."""

    def set_up(ctx: click.Context, param: click.Parameter, value: int) -> int:
        logging.basicConfig(
            stream=sys.stderr,
            level=LEVELS.get(value, logging.DEBUG),
            format="%(asctime)s %(levelname)s %(name)s: %(message)s",
            force=True,
        )
        return value

    return click.option(
        "-v", "--verbose", count=True, expose_value=False, callback=set_up, help="Log more: -v what happens, -vv all."
    )(command)
