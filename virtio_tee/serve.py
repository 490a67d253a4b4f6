"""``virtio-tee serve``: the backend."""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import stat
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from device.config import Limits
from pyvhost.device import SPIN_US
from virtio_tee import systemd
from virtio_tee.keys import public_key
from virtio_tee.linux_tee import device_of, guests_logins, linux_options, open_linux
from virtio_tee.logs import verbose_option
from virtio_tee.throttle import throttle_logs

if TYPE_CHECKING:
    from tee.driver import TeeDriver


CAPABILITIES = {"type": "tee", "features": [], "tee": ["soft", "ffa", "linux"]}
"""What ``--print-capabilities`` prints: QEMU's docs/interop/vhost-user.rst, "Backend program conventions"."""

_LIMIT_HELP = {
    "num_event_buffers": "event buffers that the driver keeps posted",
    "event_buffer_size": "bytes of an event buffer",
    "max_params": "parameters of one request",
    "max_contexts": "contexts open at a time",
    "max_sessions": "sessions open at a time",
    "max_regions": "memory regions registered at a time",
    "max_region_ranges": "address ranges of one region",
    "max_region_bytes": "bytes in all regions together",
    "max_calls": "requests in progress at a time",
    "max_rpcs": "RPCs outstanding at a time",
    "max_inline_bytes": "bytes of memory inside one request",
    "max_request_bytes": "bytes of one request without that",
    "rpc_deadline_ms": "milliseconds that the guest has to answer an RPC",
}


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """One option for each limit of a guest."""
    for field in reversed(dataclasses.fields(Limits)):
        command = click.option(
            "--" + field.name.replace("_", "-"),
            type=click.IntRange(1, 2**63 - 1 if field.name == "max_region_bytes" else 2**31 - 1),
            default=field.default,
            show_default=True,
            metavar="N",
            help=f"For each guest: {_LIMIT_HELP[field.name]}.",
        )(command)
    return command


def _print_capabilities(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        click.echo(json.dumps(CAPABILITIES))
        ctx.exit()


@click.command()
@click.option(
    "--socket-path", "-s", "paths", multiple=True, metavar="PATH", help="Listen here; give it again for more guests."
)
@click.option("--fd", "fds", multiple=True, type=click.IntRange(0), metavar="N", help="An inherited socket instead.")
@click.option("--vm", "vms", multiple=True, metavar="NAME", help="Name of each socket's guest, in order.")
@click.option(
    "--tee",
    "kind",
    default="soft",
    show_default=True,
    metavar="soft|ffa|linux[:DEVICE]",
    help="Which TEE: the software TEE, that behind OP-TEE's partition of a model of FF-A, or that of this host behind "
    "a Linux TEE device (default: /dev/tee0).",
)
@click.option(
    "--ffa-vm",
    "ffa_vms",
    multiple=True,
    type=click.IntRange(1, 0x3FFF),
    metavar="ID",
    help="With --tee ffa: each guest's FF-A endpoint, in order. It may register memory that this endpoint has shared "
    "with the TEE, and no other's.",
)
@click.option(
    "--ta-key",
    "keys",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Public key (PEM) of a TA signer. Who holds its private key runs code in this process.",
)
@click.option(
    "--ta-folder",
    "ta_folders",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    metavar="DIR",
    help="Where <uuid>.ta files lie on this host, for guests whose supplicant lacks the TA or is absent. Give it again "
    "for more. They are verified like a guest's.",
)
@click.option(
    "--built-in-tas",
    is_flag=True,
    help="Have the example TAs without loading them; for tests and benchmarks: a guest can panic and stall them.",
)
@click.option("--threads", type=click.IntRange(1, 256), default=4, show_default=True, help="Threads of the soft TEE.")
@click.option(
    "--storage-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="At least 16 secret bytes under which the soft TEE seals what TAs store. Without it, a random key: what they "
    "store is lost when this process ends.",
)
@click.option(
    "--attestation-key",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    metavar="FILE",
    help="Private key (PEM) with which the soft TEE signs statements about its services. Without it, a random key that "
    "nobody can know: statements then prove nothing.",
)
@click.option(
    "--share-enclaves",
    "shared",
    multiple=True,
    metavar="NAMES:SHARERS:USERS",
    help="Server enclaves of these names may be shared by these guests (--vm) for those; each a pattern like clock-*. "
    "Give it again for more. Default: no guest sees another's.",
)
@click.option(
    "--longest-call",
    type=click.FloatRange(0, min_open=True),
    metavar="SECONDS",
    help="End a TA's call that takes longer than this. Default: no end.",
)
@click.option("--request-queues", type=click.IntRange(1, 64), default=1, show_default=True, help="Request queues.")
@click.option(
    "--spin-us",
    type=click.IntRange(0, 1000),
    default=SPIN_US,
    show_default=True,
    metavar="MICROSECONDS",
    help="After its last request a guest's queue is looked at for this long before the backend sleeps, if nothing else "
    "is to be done: quicker answers, for a busier CPU. 0: not at all.",
)
@click.option("--require-sealed", is_flag=True, help="Refuse guest memory that could shrink (and so kill the process).")
@click.option(
    "--trace", type=click.Path(dir_okay=False, path_type=Path), metavar="FILE", help="Record requests and RPCs here."
)
@click.option(
    "--metrics",
    is_flag=False,
    flag_value="127.0.0.1:9846",
    metavar="ADDRESS:PORT|unix:/PATH",
    help="Tell Prometheus metrics there, at /metrics. Without a value: 127.0.0.1:9846. Nobody is asked for a password: "
    "choose an address that only those reach who may know.",
)
@click.option(
    "--print-capabilities",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_capabilities,
    help="Print what this backend can do, as JSON, and exit.",
)
@linux_options
@limit_options
@verbose_option
def serve(
    paths: tuple[str, ...],
    fds: tuple[int, ...],
    vms: tuple[str, ...],
    kind: str,
    ffa_vms: tuple[int, ...],
    keys: tuple[Path, ...],
    ta_folders: tuple[Path, ...],
    built_in_tas: bool,
    threads: int,
    storage_key: Path | None,
    attestation_key: Path | None,
    shared: tuple[str, ...],
    longest_call: float | None,
    request_queues: int,
    spin_us: int,
    require_sealed: bool,
    trace: Path | None,
    metrics: str | None,
    tee_threads: int,
    no_zero_copy: bool,
    copy_mib: int,
    host_logins: bool,
    broker: str | None,
    **limits: int,
) -> None:
    """Serve the TEE device to guests over vhost-user sockets. Runs in the foreground, ends on SIGTERM.

    After its frontend has left, a socket is served again. All guests of one process share one TEE.

    \b
    One guest:   virtio-tee serve --socket-path /run/tee.sock --ta-key vendor.pem
    Then, QEMU:  -chardev socket,id=tee,path=/run/tee.sock -device vhost-user-tee-pci,chardev=tee
                 (guest memory must be shared: -object memory-backend-memfd,…,share=on)
    Real TEE:    virtio-tee serve --socket-path /run/tee.sock --tee linux
    Two guests:  virtio-tee serve -s /run/a.sock --vm a -s /run/b.sock --vm b --ta-key vendor.pem
    systemd:     docs/systemd; sockets that systemd passes (LISTEN_FDS) are served if no other is named
    """
    import trio

    from host_backend.exporter import Place
    from host_backend.serve import Endpoint, ServeConfig
    from host_backend.serve import serve as run
    from host_backend.trace import Trace

    device = device_of(kind)
    _check_options(kind, device is None)
    throttle_logs()
    _allow_descriptors()
    passed = systemd.listen_fds()
    if not paths and not fds:
        fds = passed
    _check_fds(fds)
    count = len(paths) + len(fds)
    if vms and len(vms) != count:
        raise click.UsageError(f"{len(vms)} names (--vm) for {count} sockets")
    if ffa_vms and (kind != "ffa" or len(ffa_vms) != count):
        raise click.UsageError("--ffa-vm goes with --tee ffa, and is given once for each socket")
    names = vms or tuple(f"vm{i}" for i in range(count))
    owners = ffa_vms or (None,) * count
    places = [{"path": path} for path in paths] + [{"fd": fd} for fd in fds]
    try:
        config = ServeConfig(
            [Endpoint(name, **place, ffa_vm=owner) for name, place, owner in zip(names, places, owners, strict=True)],
            Limits(**limits),
            request_queues,
            require_sealed,
            Place.parse(metrics) if metrics is not None else None,
            spin_us,
        )
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    recorder = None
    try:
        recorder = Trace(trace.open("w")) if trace is not None else None
        if device is None:
            tee = _soft(keys, ta_folders, threads, built_in_tas, storage_key, attestation_key, shared, longest_call)
            if kind == "ffa":
                tee = _over_ffa(tee, dict(zip(names, owners, strict=True)))
        else:
            logins = guests_logins(host_logins, count)
            tee = open_linux(
                device,
                threads=tee_threads,
                copy_mib=copy_mib,
                zero_copy=not no_zero_copy,
                logins=logins,
                broker=broker,
            )
        trio.run(lambda: run(tee, config, trace=recorder, ready=_ready))
    except* OSError as group:
        for error in group.exceptions:
            click.echo(f"virtio-tee serve: {error}", err=True)
        sys.exit(1)
    finally:
        systemd.notify("STOPPING=1")
        if recorder is not None:
            recorder.close()


_ONLY = {
    True: ("tee_threads", "no_zero_copy", "copy_mib", "host_logins", "broker"),
    False: (
        "keys",
        "ta_folders",
        "built_in_tas",
        "threads",
        "storage_key",
        "attestation_key",
        "shared",
        "longest_call",
    ),
}
"""Options that are wrong with the software TEE, however it is reached, and with others: these are what it is itself set
up for."""


def _check_options(kind: str, soft: bool) -> None:
    ctx = click.get_current_context()
    for parameter in ctx.command.params:
        given = ctx.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if given and parameter.name in _ONLY[soft]:
            raise click.UsageError(f"{parameter.opts[0]} does not go with --tee {kind if soft else 'linux'}")


def _allow_descriptors() -> None:
    """All that the system allows this process: each guest takes more than a dozen."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _check_fds(fds: tuple[int, ...]) -> None:
    """Before this process opens anything: later such a number could be a socket of its own. Raises UsageError."""
    for fd in fds:
        try:
            inherited = stat.S_ISSOCK(os.fstat(fd).st_mode)
        except OSError:
            inherited = False
        if not inherited:
            raise click.UsageError(f"--fd {fd}: no socket was inherited under that number")
    if len(set(fds)) != len(fds):
        raise click.UsageError("the same --fd twice")


def _ready() -> None:
    click.echo("virtio-tee: ready", err=True)
    systemd.notify("READY=1")


def _soft(
    keys: tuple[Path, ...],
    ta_folders: tuple[Path, ...],
    threads: int,
    built_in_tas: bool,
    storage_key: Path | None,
    attestation_key: Path | None,
    shared: tuple[str, ...],
    longest_call: float | None,
) -> TeeDriver:
    import logging
    import secrets
    import time

    from tee.io.services.ta_loader import MAX_TA_SIZE, TaLoader
    from tee.io.workers import WorkerThreads
    from tee.soft.driver import SoftTee
    from tee.soft.enclaves import EnclavePolicy, SharedNames

    rules = [rule.split(":") for rule in shared]
    if any(len(rule) != 3 for rule in rules):
        raise click.UsageError("--share-enclaves takes three patterns, NAMES:SHARERS:USERS")
    log = logging.getLogger("tee.soft").warning
    built_in = None
    if built_in_tas:
        from tee.soft import examples

        built_in = examples.built_in()
    try:
        return SoftTee(
            clock=time.monotonic,
            random=secrets.token_bytes,
            keys=[public_key(key) for key in keys],
            built_in=built_in,
            threads=threads,
            storage_key=storage_key.read_bytes() if storage_key is not None else None,
            longest_call=longest_call,
            host_tas=TaLoader(ta_folders, MAX_TA_SIZE, log).read if ta_folders else None,
            workers=WorkerThreads(),
            attestation_key=attestation_key.read_bytes() if attestation_key is not None else None,
            enclaves=EnclavePolicy(shared=[SharedNames(*rule) for rule in rules]),
            log=log,
        )
    except ValueError as e:  # a key that is none
        raise click.UsageError(str(e)) from None


def _over_ffa(soft: TeeDriver, guests: Mapping[str, int | None]) -> TeeDriver:
    from virtio_tee.ffa_tee import FfaTee

    try:
        return FfaTee(soft, guests)
    except ValueError as e:
        raise click.UsageError(f"--ffa-vm: {e}") from None
