"""``virtio-tee supplicant``: the supplicant's services as a process of their own."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from virtio_tee.attach import service_options

if TYPE_CHECKING:
    from tee.io.supplicant import Services


@click.command()
@click.option("--fd", required=True, type=click.IntRange(0), metavar="N", help="Connected stream socket, inherited.")
@service_options
def supplicant(fd: int, services: Services) -> None:
    """Serve the TEE's RPCs for a driver that has started this process (see tee.io.supplicant_process).

    As a process of its own a supplicant can be killed, confined and started again without the driver's clients noticing
    more than errors of the calls that needed it.

    TAs are always served. Files, sockets and plug-ins only if they are asked for; RPMB, I2C and profiles never.
    """
    from tee.io.supplicant_process import main

    sys.exit(main(["--fd", str(fd), *services.arguments()]))
