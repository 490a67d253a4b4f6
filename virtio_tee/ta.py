"""``virtio-tee ta``: TA packages for the software TEE."""

from __future__ import annotations

import json
import os
import sys
import uuid as uuid_module
from pathlib import Path

import click

from tee import package
from tee.results import TeeError
from virtio_tee.keys import public_key

_NAMES = [a.name for a in package.ALGORITHMS.values()]
FILE = click.Path(exists=True, dir_okay=False, path_type=Path)
NEW = click.Path(dir_okay=False, path_type=Path)


@click.group()
def ta() -> None:
    """Make keys for, sign, and look at TA packages.

    A package has OP-TEE's signed-header layout; its payload is a Python module that defines one TA.
    Whoever holds a private key whose public half a backend trusts (serve --ta-key) runs code in that
    backend, as a TA vendor does in a secure world. There is no default key.

    \b
      virtio-tee ta keygen vendor                      makes vendor.key and vendor.pem
      virtio-tee ta sign my_ta.py --uuid U --key vendor.key -o /lib/optee_armtz
      virtio-tee ta show U.ta --key vendor.pem
    """


@ta.command()
@click.argument("name")
@click.option("--algorithm", type=click.Choice(_NAMES), default=package.DEFAULT_ALGORITHM.name, show_default=True)
@click.option("--bits", type=int, default=3072, show_default=True, help="Size of an RSA key.")
def keygen(name: str, algorithm: str, bits: int) -> None:
    """Make a key pair: NAME.key (private, readable by you alone) and NAME.pem (public)."""
    if not Path(name).name or name.endswith("/"):
        raise click.UsageError("NAME is the start of two file names")
    try:
        pair = package.keygen(package.algorithm_named(algorithm), rsa_bits=bits)
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
        with os.fdopen(os.open(f"{name}.key", flags, 0o600), "wb") as private:
            private.write(pair.private)
        with os.fdopen(os.open(f"{name}.pem", flags, 0o644), "wb") as public:
            public.write(pair.public)
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    except FileExistsError as e:
        raise click.UsageError(f"{e.filename} is there already; keys are not overwritten") from None
    except OSError as e:
        raise click.ClickException(f"{e.filename}: {e.strerror}") from None
    click.echo(f"{name}.key (keep it secret)\n{name}.pem")


@ta.command()
@click.argument("payload", type=FILE)
@click.option("--uuid", "uuid", required=True, type=click.UUID, help="UUID of the TA.")
@click.option("--key", required=True, type=FILE, help="Private key (PEM).")
@click.option("--ta-version", type=click.IntRange(0, 2**32 - 1), default=0, show_default=True)
@click.option("--algorithm", type=click.Choice(_NAMES), help="Default: the usual one for the kind of key.")
@click.option("--out", "-o", type=click.Path(path_type=Path), default=Path(), help="Folder, or .ta file, to write.")
def sign(payload: Path, uuid: uuid_module.UUID, key: Path, ta_version: int, algorithm: str | None, out: Path) -> None:
    """Package the Python module PAYLOAD as <uuid>.ta."""
    if not out.is_dir() and out.suffix != ".ta":
        raise click.UsageError(f"{out} is no folder: mkdir -p {out}")
    target = out / f"{uuid}.ta" if out.is_dir() else out
    source = payload.read_bytes()
    try:
        compile(source, str(payload), "exec")  # looked at, not run
    except (SyntaxError, ValueError) as e:
        raise click.UsageError(f"{payload} is no Python module: {e}") from None
    try:
        private = package.load_private_key(key.read_bytes())
    except ValueError as e:
        why = str(e).partition(".")[0]
        raise click.UsageError(f"{key} is no private key in PEM that may sign TAs: {why}") from None
    try:
        chosen = package.algorithm_named(algorithm) if algorithm else None
        target.write_bytes(package.sign(source, uuid, ta_version, private, chosen))
    except ValueError as e:
        raise click.UsageError(str(e)) from None
    except OSError as e:
        raise click.ClickException(f"{target}: {e.strerror}") from None
    click.echo(target)


@ta.command()
@click.argument("file", type=FILE)
@click.option("--key", "keys", multiple=True, type=FILE, help="Check the signature with this public key (PEM).")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout.")
def show(file: Path, keys: tuple[Path, ...], as_json: bool) -> None:
    """Show what a package says about itself; with --key also whether the signature is that key's.

    Exit status 1: the file is no package, or no given key has signed it.
    """
    data = file.read_bytes()
    try:
        found = package.parse(data)
        facts = {
            "uuid": str(found.uuid),
            "version": found.version,
            "algorithm": found.algorithm.name,
            "payload_bytes": len(found.payload),
            "sha256": found.digest.hex(),
        }
        if keys:
            number = package.verify(data, found.uuid, [public_key(key) for key in keys]).key_number
            facts["signed_by"] = str(keys[number])
    except TeeError as e:
        click.echo(f"{file}: {e.why}", err=True)
        sys.exit(1)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        for name, value in facts.items():
            click.echo(f"{name:14} {value}")
