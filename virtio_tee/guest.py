"""``virtio-tee guest``: the guest's side, from user space."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING
from uuid import UUID

import click

from virtio_tee.attach import device_options, open_any, scenario_option, service_options, supplicant_of
from virtio_tee.logs import verbose_option

if TYPE_CHECKING:
    from guest_driver.client import Answer, Parameter
    from guest_driver.core import VirtioTeeDriver
    from tee.io.linux_driver import LinuxTeeDriver
    from tee.io.supplicant import Services

MAX_OUTPUT = 32 << 20
"""Most bytes of a `mem-out` parameter."""

_KINDS = {1: "software TEE", 2: "Linux TEE device", 3: "OP-TEE over FF-A"}


@click.group()
def guest() -> None:
    """Drive the TEE device from user space, inside a guest (or, with --socket, without any VM).

    In a guest the device is bound to uio_pci_generic; that takes root and huge pages:

    \b
      modprobe uio_pci_generic
      echo 24 > /proc/sys/vm/nr_hugepages
      virtio-tee guest info

    \b
    With the kernel's driver, or any TEE that Linux knows:
      virtio-tee guest info --tee /dev/tee0
    """


@guest.command()
@device_options
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@verbose_option
def info(socket: str | None, pci: str | None, tee: str | None, as_json: bool) -> None:
    """Show which TEE is behind the device, its epoch and its limits; with --tee, what the kernel says of it."""
    with closing(open_any(socket, pci, tee)) as driver:
        facts = _facts(driver)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:20} {value}")


@guest.command()
@device_options
@service_options
@scenario_option
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@verbose_option
def demo(socket: str | None, pci: str | None, tee: str | None, services: Services, name: str, as_json: bool) -> None:
    """Run the demo's guest side: load TAs over RPC, call them with values and memory.

    Exit status 1: a step failed.
    """
    from tee.io.runtime import TeeRuntime
    from virtio_tee import scenario
    from virtio_tee.report import Report

    report = Report()
    supplicant = supplicant_of(services)
    driver = open_any(socket, pci, tee)
    with closing(supplicant), TeeRuntime(driver, supplicant, report.observe) as runtime:
        scenario.run(scenario.job_of(name, services.ta_folders), runtime, report)
    driver.close()
    if as_json:
        click.echo(json.dumps(report.as_json()))
    else:
        for step in report.steps:
            click.echo(f"{'ok' if step.ok else 'FAILED':7} {step.took_s * 1000:8.2f} ms  {step.name}  {step.detail}")
        if report.why:
            click.echo(report.why, err=True)
    sys.exit(0 if report.ok else 1)


@guest.command()
@click.argument("uuid", type=click.UUID)
@click.argument("command", type=click.IntRange(0, 2**32 - 1))
@click.argument("params", nargs=-1)
@device_options
@service_options
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
@verbose_option
def invoke(
    uuid: UUID,
    command: int,
    params: tuple[str, ...],
    socket: str | None,
    pci: str | None,
    tee: str | None,
    services: Services,
    as_json: bool,
) -> None:
    """Open a session with the TA UUID, invoke COMMAND, print what comes back.

    \b
    Each of PARAMS is one parameter. There may be none; `guest info` tells how many the device takes at most
    (max_params, 24 unless the backend says otherwise; a TA of OP-TEE's takes 4).
      none  in:A[,B[,C]]  out  inout:A[,B[,C]]   values (decimal or 0x…)
      mem-in:TEXT  mem-out:SIZE  mem-inout:TEXT  temporary memory (SIZE up to 32 MiB)
    For example: virtio-tee guest invoke 8aaaf200-2450-11e4-abe2-0002a5d5c51b 0 inout:41

    Shown is what the TA may have changed, a line for each parameter. With --json: a list with [a, b, c] for a value,
    hex digits for memory, null for what only goes in.
    """
    from guest_driver.client import Context
    from tee.io.runtime import TeeRuntime
    from tee.results import TeeError

    parameters = [_parameter(text) for text in params]
    supplicant = supplicant_of(services)
    driver = open_any(socket, pci, tee)
    try:
        if len(parameters) > (most := driver.max_params):
            raise click.UsageError(f"{len(parameters)} parameters; this device takes {most} at most")
        with (
            closing(supplicant),
            TeeRuntime(driver, supplicant) as runtime,
            Context(runtime) as context,
            context.open_session(uuid) as session,
        ):
            answers = session.invoke(command, *parameters)
    except TeeError as e:
        click.echo(f"virtio-tee guest invoke: {e}", err=True)
        sys.exit(1)
    finally:
        driver.close()
    if as_json:
        click.echo(json.dumps([a.hex() if isinstance(a, bytes) else a for a in answers]))
        return
    for place, answer in enumerate(answers):
        click.echo(f"param {place}: {_readable(answer)}")
    if not answers:
        click.echo("done; there were no parameters")


def _facts(driver: VirtioTeeDriver | LinuxTeeDriver) -> dict[str, object]:
    from guest_driver.core import VirtioTeeDriver

    told = driver.info
    facts = {
        "tee": _KINDS.get(told.kind, f"kind {told.kind}"),
        "kind": told.kind,
        "impl_id": told.impl_id,
        "impl_caps": told.impl_caps,
        "gen_caps": told.gen_caps,
    }
    if isinstance(driver, VirtioTeeDriver):
        config = driver.config
        limits = asdict(config.limits)
        return {**facts, "epoch": f"{config.epoch:#x}", "request_queues": config.num_request_queues, **limits}
    return {**facts, "max_params": driver.max_params, **driver.system_calls()}


def _readable(answer: Answer) -> str:
    """One parameter that came back, for people."""
    from guest_driver.client import Words

    match answer:
        case Words(a, b, c):
            return f"value a={a} b={b} c={c}"
        case bytes():
            text = answer.decode("ascii", "replace")
            said = f" ({text!r})" if answer and text.isprintable() and text.isascii() else ""
            return f"memory, {len(answer)} bytes{': ' if answer else ''}{answer.hex()}{said}"
        case int():
            return f"memory, {answer} bytes"
    return "nothing comes back"


def _parameter(text: str) -> Parameter:
    from guest_driver import client

    kind, _, rest = text.partition(":")
    try:
        match kind:
            case "none":
                return client.Empty()
            case "in":
                return client.ValueIn(*_words(rest))
            case "inout":
                return client.ValueInOut(*_words(rest))
            case "out":
                return client.ValueOut()
            case "mem-in":
                return client.TempIn(rest.encode())
            case "mem-inout":
                return client.TempInOut(rest.encode())
            case "mem-out":
                return client.TempOut(_size(rest))
    except (ValueError, TypeError, MemoryError, OverflowError) as e:
        raise click.UsageError(f"parameter {text!r}: {e or 'too large'} (numbers: 41 or 0x29)") from None
    raise click.UsageError(f"parameter {text!r}: see --help for the kinds there are")


def _size(text: str) -> int:
    size = int(text, 0)
    if not 0 <= size <= MAX_OUTPUT:
        raise ValueError(f"0 to {MAX_OUTPUT} bytes")
    return size


def _words(text: str) -> list[int]:
    return [int(word, 0) for word in text.split(",")]
