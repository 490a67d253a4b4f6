"""The ``virtio-tee`` command. Subcommands are imported only when they are used: each starts fast."""

from __future__ import annotations

import click

from virtio_tee import __version__
from virtio_tee.lazy import LazyGroup

COMMANDS = {
    "serve": "virtio_tee.serve:serve",
    "demo": "virtio_tee.demo:demo",
    "guest": "virtio_tee.guest:guest",
    "supplicant": "virtio_tee.supplicant:supplicant",
    "broker": "virtio_tee.broker:broker",
    "ta": "virtio_tee.ta:ta",
    "decode": "virtio_tee.cli_decode:decode",
    "ffa": "virtio_tee.ffa:ffa",
    "compare": "virtio_tee.compare.command:compare",
    "bench": "virtio_tee.bench.command:bench",
}
"""Name → where the click command is."""


@click.group(
    cls=LazyGroup, where=COMMANDS, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.version_option(__version__, prog_name="virtio-tee")
def main() -> None:
    """Give a guest VM the host's TEE through a virtio device (ID 46), without touching the hypervisor.

    On the host, `serve` is the backend that QEMU and other VMMs attach to. In the guest, `guest` drives the device
    from user space. `demo` shows all of it on this machine in a few seconds.

    Results go to stdout (JSON with --json), logs and progress to stderr. Exit status: 0 done, 1 a check failed,
    2 wrong usage.
    """


if __name__ == "__main__":
    main(prog_name="virtio-tee")
