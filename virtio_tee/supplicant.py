"""``virtio-tee supplicant``: the supplicant's services as a process of their own."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from virtio_tee.attach import ta_folder_option, ta_folders


@click.command()
@click.option("--fd", required=True, type=click.IntRange(0), metavar="N", help="Connected stream socket, inherited.")
@ta_folder_option
def supplicant(fd: int, folders: tuple[Path, ...]) -> None:
    """Serve the TEE's RPCs for a driver that has started this process (see tee.io.supplicant_process).

    As a process of its own a supplicant can be killed, confined and started again without the driver's clients noticing
    more than errors of the calls that needed it.
    """
    from tee.io.supplicant_process import main

    arguments = ["--fd", str(fd)]
    for folder in ta_folders(folders):
        arguments += ["--ta-folder", str(folder)]
    sys.exit(main(arguments))
