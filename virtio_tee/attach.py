"""Options that say which device a guest command drives, and the driver for it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from guest_driver.core import VirtioTeeDriver
    from tee.io.linux_driver import LinuxTeeDriver
    from tee.io.supplicant import Services, Supplicant


def device_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --socket, --pci and --tee."""
    command = click.option(
        "--tee",
        metavar="PATH",
        help="Use a TEE device of Linux instead: /dev/tee0. RPCs then are its supplicant's, and the options about "
        "what the supplicant serves are of no use.",
    )(command)
    command = click.option(
        "--pci", metavar="ADDRESS", help="PCI device to drive, e.g. 0000:00:03.0. Default: the only one."
    )(command)
    return click.option(
        "--socket", metavar="PATH", help="Play the VM: attach to a backend's vhost-user socket instead of a PCI device."
    )(command)


SCENARIOS = ("main", "ocall", "grpc", "services", "enclaves")


def scenario_option(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds --scenario; the command gets ``name``."""
    return click.option(
        "--scenario", "name", type=click.Choice(SCENARIOS), default="main", show_default=True, help="What is done."
    )(command)


def open_any(socket: str | None, pci: str | None, tee: str | None) -> VirtioTeeDriver | LinuxTeeDriver:
    """The driver of the chosen device, or of the kernel's. Raises click.ClickException that says what to do."""
    if tee is None:
        return open_driver(socket, pci)
    if socket or pci:
        raise click.UsageError("--tee goes with neither --socket nor --pci")
    from virtio_tee.linux_tee import open_linux

    try:
        return open_linux(Path(tee))
    except OSError as e:
        raise click.ClickException(str(e)) from None


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
        where = f" at {socket}; does `virtio-tee serve --socket-path {socket}` run?" if socket else ""
        raise click.ClickException(f"the TEE device cannot be used: {e}{where}") from None


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


def service_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options of what the supplicant serves; the command gets ``services``."""

    @functools.wraps(command)
    def with_services(
        *args: Any,
        folders: tuple[Path, ...],
        fs_folder: Path | None,
        fs_max_bytes: int,
        fs_max_files: int,
        fs_no_sync: bool,
        allow_socket: tuple[str, ...],
        plugin: tuple[str, ...],
        installed_plugins: bool,
        **kwargs: Any,
    ) -> Any:
        from tee.io.supplicant import Services

        services = Services(
            ta_folders=tuple(str(folder) for folder in ta_folders(folders)),
            fs_folder=str(fs_folder) if fs_folder is not None else "",
            fs_max_bytes=fs_max_bytes,
            fs_max_files=fs_max_files,
            fs_sync=not fs_no_sync,
            allow_sockets=allow_socket,
            plugins=plugin,
            installed_plugins=installed_plugins,
        )
        try:
            services.check()
        except ValueError as e:
            raise click.UsageError(str(e)) from None
        return command(*args, services=services, **kwargs)

    for option in reversed(_SERVICE_OPTIONS):
        option(with_services)
    return with_services


def supplicant_of(services: Services) -> Supplicant:
    """Its supplicant, which logs to stderr. Raises click.ClickException."""
    try:
        return services.supplicant(log=lambda text: click.echo(f"supplicant: {text}", err=True))
    except OSError as e:
        raise click.ClickException(f"the supplicant cannot use its folder: {e}") from None


_SERVICE_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--ta-folder",
        "folders",
        multiple=True,
        type=FOLDER,
        metavar="DIR",
        help="Where <uuid>.ta files lie; may be given again. Default: /lib/optee_armtz if it is there.",
    ),
    click.option(
        "--fs-folder",
        type=click.Path(file_okay=False, path_type=Path),
        metavar="DIR",
        help="Keep the TEE's files (secure storage) here; made if it is not there. Default: no files.",
    ),
    click.option(
        "--fs-max-bytes",
        type=click.IntRange(0),
        default=64 << 20,
        show_default=True,
        metavar="N",
        help="Bytes in all of the TEE's files together.",
    ),
    click.option(
        "--fs-max-files",
        type=click.IntRange(0),
        default=4096,
        show_default=True,
        metavar="N",
        help="Files and folders that the TEE may have.",
    ),
    click.option("--fs-no-sync", is_flag=True, help="Answer before files are on the disk: faster, for tests."),
    click.option(
        "--allow-socket",
        multiple=True,
        metavar="HOST:PORT",
        help="Let TAs connect there. HOST: name, address or network, IPv6 in brackets; PORT may be *; tcp:// or "
        "udp:// in front for one of them. May be given again. Default: no sockets.",
    ),
    click.option(
        "--plugin",
        multiple=True,
        metavar="UUID=MODULE:NAME",
        help="Let TAs call this Python callable (command, sub-command, bytes) → bytes. May be given again.",
    ),
    click.option(
        "--installed-plugins", is_flag=True, help="And the plug-ins of installed packages (virtio_tee.plugins)."
    ),
)


def ta_folders(given: tuple[Path, ...]) -> list[Path]:
    """The folders to use."""
    usual = Path("/lib/optee_armtz")
    return list(given) or ([usual] if usual.is_dir() else [])
