"""``virtio-tee supplicant``: the supplicant's services as a process of their own."""

from __future__ import annotations

import sys
from contextlib import closing
from typing import TYPE_CHECKING

import click

from virtio_tee.attach import service_options, supplicant_of

if TYPE_CHECKING:
    from tee.io.supplicant import Services


@click.command()
@click.option("--fd", type=click.IntRange(0), metavar="N", help="Connected stream socket, inherited.")
@click.option("--device", metavar="PATH", help="Serve this device of Linux's TEE subsystem: /dev/teepriv0.")
@service_options
def supplicant(fd: int | None, device: str | None, services: Services) -> None:
    """Serve the TEE's RPCs, for a driver that has started this process (--fd, see tee.io.supplicant_process) or for the
    kernel's (--device).

    As a process of its own a supplicant can be killed, confined and started again without the driver's clients noticing
    more than errors of the calls that needed it.

    TAs are always served. Files, sockets and plug-ins only if they are asked for; RPMB, I2C and profiles never.
    """
    if (fd is None) is (device is None):
        raise click.UsageError("say --fd or --device")
    if device is not None:
        _serve_device(device, services)
        return
    from tee.io.supplicant_process import main

    sys.exit(main(["--fd", str(fd), *services.arguments()]))


def _serve_device(path: str, services: Services) -> None:
    from tee.io.linux import advice
    from tee.io.linux_supplicant import LinuxSupplicant

    server = supplicant_of(services)
    with closing(server):
        try:
            serving = LinuxSupplicant(server, path)
        except OSError as e:
            raise click.ClickException(advice(path, e)) from None
        except ValueError as e:
            raise click.ClickException(f"{path} cannot be served: {e}") from None
        with closing(serving):
            serving.run(lambda: click.echo("supplicant: ready", err=True))
