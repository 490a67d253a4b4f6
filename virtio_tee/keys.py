"""Public keys that are named on a command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from tee.package import PublicKey


def public_key(path: Path) -> PublicKey:
    """The key in the file. Raises click.UsageError for what is none, and for a private key: only who signs needs it."""
    from tee import package

    data = path.read_bytes()
    if b"PRIVATE KEY-----" in data:
        raise click.UsageError(
            f"{path} is a private key, which is for `ta sign` alone: name its public half, "
            f"{path.with_suffix('.pem')} if `ta keygen` made it (or: openssl pkey -in {path} -pubout -out FILE.pem)"
        )
    try:
        return package.load_public_key(data)
    except ValueError as e:
        why = str(e).partition(".")[0]
        raise click.UsageError(f"{path} is no public key in PEM that may sign TAs: {why}") from None
