"""Options that say which device a guest command drives, and the driver for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from guest_driver.core import VirtioTeeDriver


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --socket and --pci."""
    command = click.option(
        "--pci", metavar="ADDRESS", help="PCI device to drive, e.g. 0000:00:03.0. Default: the only one."
    )(command)
    return click.option(
        "--socket", metavar="PATH", help="Play the VM: attach to a backend's vhost-user socket instead of a PCI device."
    )(command)


def open_driver(socket: str | None, pci: str | None) -> VirtioTeeDriver:
    """The driver of the chosen device. Raises click.ClickException that says what to do."""
    from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
    from guest_driver.transport import Transport
    from pyvhost.errors import PyvhostError

    if socket and pci:
        raise click.UsageError("--socket or --pci, not both")
    wanted = int(DRIVER_FEATURES)
    transport: Transport | None = None
    try:
        transport = _vhost_user(socket, wanted) if socket else _pci(pci, wanted)
        return VirtioTeeDriver(transport)
    except (PyvhostError, OSError, TimeoutError) as e:
        if transport is not None:
            transport.close()
        raise click.ClickException(f"the TEE device cannot be used: {e}") from None


def _vhost_user(path: str, wanted: int) -> Any:
    from guest_driver.vhost_user import VhostUserTransport

    return VhostUserTransport(path, wanted=wanted)


def _pci(address: str | None, wanted: int) -> Any:
    from guest_driver.virtio_pci import PCI_DEVICES, PciError, PciTransport, find

    try:
        if address is None:
            found = find()
            if len(found) != 1:
                names = ", ".join(path.name for path in found)
                raise PciError(
                    f"several TEE devices ({names}): say --pci" if found else "this machine has no TEE device"
                )
            path = found[0]
        else:
            path = PCI_DEVICES / address
            if path not in find():
                raise PciError(f"{address} is no TEE device (1af4:106e)")
        return PciTransport(path, wanted=wanted)
    except PciError as e:
        raise click.ClickException(str(e)) from None


FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


def ta_folder_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --ta-folder."""
    return click.option(
        "--ta-folder",
        "folders",
        multiple=True,
        type=FOLDER,
        metavar="DIR",
        help="Where <uuid>.ta files lie; may be given again. Default: /lib/optee_armtz if it is there.",
    )(command)


def ta_folders(given: tuple[Path, ...]) -> list[Path]:
    """The folders to use."""
    usual = Path("/lib/optee_armtz")
    return list(given) or ([usual] if usual.is_dir() else [])
