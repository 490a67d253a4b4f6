"""The options of ``--tee linux``, and the driver that they choose."""

from __future__ import annotations

import errno
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from tee.calls import Login
from tee.results import describe
from tee.rpc import describe_command

if TYPE_CHECKING:
    from tee.io.linux_driver import LinuxTeeDriver
    from tee.io.supplicant import Allocator, RpcServer
    from tee.memory import Memory
    from tee.rpc import Rpc, RpcReply
    from virtio_tee.outcome import Exchange

DEVICE = "/dev/tee0"

_log = logging.getLogger(__name__)

_OPTIONS: tuple[Callable[[Callable[..., Any]], Callable[..., Any]], ...] = (
    click.option(
        "--tee-threads",
        type=click.IntRange(1, 256),
        default=2,
        show_default=True,
        metavar="N",
        help="With --tee linux: calls in the TEE at a time. Each holds a thread of the TEE, also while it waits; take "
        "fewer than that has (OP-TEE: CFG_NUM_THREADS, which cannot be asked for), so that some are left for cancels "
        "and for programs of the host. While several guests are there, none gets all of them.",
    ),
    click.option(
        "--no-zero-copy",
        is_flag=True,
        help="With --tee linux: copy all memory of guests to and from the TEE. Otherwise the TEE uses regions in "
        "place, and can write to one until the call that names it has ended: also after the guest was reset.",
    ),
    click.option(
        "--copy-mib",
        type=click.IntRange(1, 1024),
        default=4,
        show_default=True,
        metavar="N",
        help="With --tee linux: MiB of memory, for each of --tee-threads, by which is copied what cannot be used in "
        "place. A call that needs more is refused.",
    ),
    click.option(
        "--host-logins",
        is_flag=True,
        help="With --tee linux: take logins USER and GROUP of the guest's clients, which TAs then see as the user and "
        "group of this process, whoever it was in the guest. Only with one socket: two guests are not to be one "
        "identity. Otherwise logins other than PUBLIC are refused.",
    ),
    click.option(
        "--broker",
        metavar="PATH",
        help="With --tee linux: attach to the host's `virtio-tee broker` there, so that TAs are loaded from the guests "
        "that use them. Otherwise the host's supplicant serves the TEE's RPCs.",
    ),
)


def linux_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def device_of(kind: str) -> Path | None:
    """The device that ``--tee`` names, or None where it names none. Raises UsageError."""
    name, colon, path = kind.partition(":")
    if name == "linux" and (path or not colon):
        return Path(path or DEVICE)
    if kind in ("soft", "ffa"):
        return None
    raise click.UsageError(f"--tee {kind}: say soft, ffa, linux, or linux:/dev/teeN")


def open_linux(
    path: Path,
    *,
    threads: int = 2,
    copy_mib: int = 4,
    zero_copy: bool = True,
    logins: frozenset[int] | None = None,
    broker: str | None = None,
) -> LinuxTeeDriver:
    """The driver. Raises OSError that says what to do."""
    from tee.io.broker_rpcs import BrokerRpcs
    from tee.io.linux import LinuxTee, advice
    from tee.io.linux_driver import LinuxTeeDriver

    try:
        driver = LinuxTeeDriver(
            partial(LinuxTee, path),
            threads=threads,
            bounce=copy_mib << 20,
            zero_copy=zero_copy,
            logins=logins,
            rpcs=BrokerRpcs(broker) if broker is not None else None,
        )
    except OSError as error:
        raise OSError(advice(path, error)) from None
    info = driver.info
    _log.info("%s: implementation %d, capabilities %#x, %#x", path, info.impl_id, info.impl_caps, info.gen_caps)
    return driver


def guests_logins(host_logins: bool, sockets: int) -> frozenset[int]:
    """Those that guests may use. Raises UsageError."""
    if not host_logins:
        return frozenset({Login.PUBLIC})
    if sockets > 1:
        raise click.UsageError("--host-logins would make one identity of several guests: one process for each")
    return frozenset({Login.PUBLIC, Login.USER, Login.GROUP})


def serve_beside(path: Path, server: RpcServer, note: Callable[[Exchange], None]) -> None:
    """Have ``server`` answer the RPCs of the TEE behind ``path``, on a thread that ends with the process, and ``note``
    each. Nothing where another supplicant does so. Raises ClickException."""
    from tee.io.linux import advice
    from tee.io.linux_supplicant import LinuxSupplicant

    privileged = path.with_name(path.name.replace("tee", "teepriv", 1))
    try:
        supplicant = LinuxSupplicant(_Noted(server, note), str(privileged))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return
        raise click.ClickException(advice(privileged, error)) from None
    except ValueError as error:
        raise click.ClickException(str(error)) from None
    ready = threading.Event()
    threading.Thread(target=supplicant.run, args=(ready.set,), name="supplicant", daemon=True).start()
    ready.wait()


class _Noted:
    """A supplicant whose answers are noted."""

    def __init__(self, server: RpcServer, note: Callable[[Exchange], None]) -> None:
        self._server = server
        self._note = note

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        from virtio_tee.outcome import Exchange

        start = time.monotonic()
        reply = self._server.serve(rpc, allocator)
        took = time.monotonic() - start
        self._note(Exchange(describe_command(rpc.command), describe(reply.code), start, took, "guest"))
        return reply

    def forget(self, memory: Memory) -> None:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        self._server.forget(memory)

    def close(self) -> None:
        """See :class:`~tee.io.supplicant.RpcServer`."""
        self._server.close()
