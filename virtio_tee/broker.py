"""``virtio-tee broker``: the host's one supplicant, for many backends."""

from __future__ import annotations

import errno
import os
import stat
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from virtio_tee import systemd
from virtio_tee.attach import service_options, supplicant_of
from virtio_tee.logs import verbose_option
from virtio_tee.throttle import throttle_logs

if TYPE_CHECKING:
    import trio

    from host_backend.broker.broker import Broker
    from pyvhost.io.sockets import Listener
    from tee.io.linux_supplicant import LinuxSupplicant
    from tee.io.supplicant import Services


@click.command()
@click.option(
    "--vm",
    "vms",
    multiple=True,
    metavar="NAME=PATH|NAME=fd:N",
    help="A VM, and where its backend attaches: a socket to listen on, or one that was inherited. Whoever may connect "
    "there speaks for that VM. Give it again for more. Without it: sockets that systemd passes, by their names.",
)
@click.option("--device", default="/dev/teepriv0", show_default=True, metavar="PATH", help="The TEE's supplicant side.")
@click.option(
    "--socket-mode", default="0660", show_default=True, metavar="OCTAL", help="Permissions of the sockets it makes."
)
@click.option(
    "--threads",
    type=click.IntRange(1, 256),
    default=32,
    show_default=True,
    help="RPCs that are served at a time. No fewer than the TEE has threads, or one guest's wait holds up another's.",
)
@click.option(
    "--guest-ms",
    type=click.IntRange(1),
    default=3000,
    show_default=True,
    help="Milliseconds that one guest may take for an RPC; then the next one, or the host, is asked.",
)
@click.option(
    "--deadline-ms",
    type=click.IntRange(1),
    default=10000,
    show_default=True,
    help="Milliseconds that all guests together may take for an RPC; then it fails.",
)
@click.option(
    "--sockets-and-plugins",
    "sole",
    type=click.Choice(["guest", "host", "nobody"]),
    default="guest",
    show_default=True,
    help="Who serves SOCKET and PLUGIN. guest: the one whose calls alone are under way, nobody else; applications of "
    "the host's are not seen: say host where there are some.",
)
@click.option("--fs-vm", default="", metavar="NAME", help="Keep the TEE's files in that VM: only if no other uses it.")
@click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Record RPCs and who served them."
)
@service_options
@verbose_option
def broker(
    vms: tuple[str, ...],
    device: str,
    socket_mode: str,
    threads: int,
    guest_ms: int,
    deadline_ms: int,
    sole: str,
    fs_vm: str,
    trace: Path | None,
    services: Services,
) -> None:
    """Be the supplicant of the host's TEE, and put its RPCs to the guests that cause them.

    A TEE of Linux's has one supplicant, and its RPCs do not say which call they are for. Backends (`virtio-tee serve
    --tee linux --broker PATH`) tell the broker what their guests have under way; a TA is asked of guests that open it,
    then of others with calls, then of this host's --ta-folder. Files are kept on this host (--fs-folder).

    \b
    One VM:    virtio-tee broker --vm a=/run/virtio-tee/a-broker.sock --fs-folder /var/lib/tee
    systemd:   docs/systemd/virtio-tee-broker.service
    Then:      virtio-tee serve -s /run/virtio-tee/a.sock --vm a --tee linux --broker /run/virtio-tee/a-broker.sock
    """
    from host_backend.broker.broker import Broker, Policy
    from host_backend.broker.routes import Sole
    from host_backend.trace import Trace

    throttle_logs()
    passed = systemd.listen_named()
    places = [_place(text) for text in vms] or [(name, f"fd:{fd}") for name, fd in passed if name]
    if not places:
        raise click.UsageError("say --vm NAME=PATH, once for each VM")
    names = [name for name, _ in places]
    if len(set(names)) != len(names):
        raise click.UsageError("the same --vm twice")
    if fs_vm and fs_vm not in names:
        raise click.UsageError(f"--fs-vm {fs_vm} is no --vm")
    mode = _mode(socket_mode)
    with ExitStack() as stack:
        recorder = Trace(trace.open("w")) if trace is not None else None
        if recorder is not None:
            stack.callback(recorder.close)
        host = supplicant_of(services)
        policy = Policy(guest_ms / 1000, deadline_ms / 1000, Sole(sole), fs_vm)
        served = Broker(host, policy, recorder=recorder)
        stack.callback(served.close)
        listeners = [(name, stack.enter_context(_listener(place, mode))) for name, place in places]
        supplicant = _supplicant(served, device)
        stack.callback(supplicant.close)
        _run(served, listeners, supplicant, threads)
        systemd.notify("STOPPING=1")


def _run(served: Broker, listeners: list[tuple[str, Listener]], supplicant: LinuxSupplicant, threads: int) -> None:
    import signal

    import trio

    from host_backend.broker.server import serve

    async def main() -> None:
        token = trio.lowlevel.current_trio_token()
        ended = trio.Event()

        def receive() -> None:
            try:
                supplicant.run(threads=threads)
            finally:
                token.run_sync_soon(ended.set)

        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                await nursery.start(serve, served, listeners)
                threading.Thread(target=receive, name="supplicant-0", daemon=True).start()
                click.echo("virtio-tee: ready", err=True)
                systemd.notify("READY=1")
                nursery.start_soon(_until_gone, ended, nursery.cancel_scope)
                async for _ in signals:
                    break
                nursery.cancel_scope.cancel()
        if ended.is_set():
            raise click.ClickException("the TEE's device has gone; its driver was removed")

    trio.run(main)


async def _until_gone(ended: trio.Event, scope: trio.CancelScope) -> None:
    await ended.wait()
    scope.cancel()


def _place(text: str) -> tuple[str, str]:
    name, _, place = text.partition("=")
    if not name or not place or len(name) > 64:
        raise click.UsageError(f"--vm {text}: say NAME=PATH or NAME=fd:N")
    return name, place


def _mode(text: str) -> int:
    try:
        mode = int(text, 8)
    except ValueError:
        mode = -1
    if not 0 <= mode <= 0o777:
        raise click.UsageError(f"--socket-mode {text}: say it as 0660")
    return mode


def _listener(place: str, mode: int) -> Listener:
    from pyvhost.io.sockets import Listener

    try:
        if not place.startswith("fd:"):
            return Listener.at_path(place, mode=mode)
        listener = Listener.from_fd(int(place[3:]))
    except (OSError, ValueError) as e:
        raise click.ClickException(f"{place} cannot be listened on: {e}") from None
    if listener.connected:
        raise click.UsageError(f"{place} is a connection, not a listening socket")
    return listener


def _supplicant(served: Broker, device: str) -> LinuxSupplicant:
    """Raises ClickException that says what to do."""
    from tee.io.linux_supplicant import LinuxSupplicant

    try:
        return LinuxSupplicant(served, device)
    except FileNotFoundError:
        what = "there is no such device: is the TEE's driver loaded (optee), or virtio-tee's in a guest?"
    except PermissionError:
        what = f"not permitted: run as its owner or group ({_owner(device)}), or as root"
    except OSError as error:
        if error.errno == errno.EBUSY:
            what = "another supplicant has it: end it first (systemctl stop tee-supplicant)"
        else:
            what = str(error)
    except ValueError as error:
        what = str(error)
    raise click.ClickException(f"{device}: {what}")


def _owner(path: str) -> str:
    found = os.stat(path)
    return f"uid {found.st_uid}, gid {found.st_gid}, mode {stat.S_IMODE(found.st_mode):04o}"
