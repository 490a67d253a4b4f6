"""``virtio-tee decode``: bytes to readable fields."""

from __future__ import annotations

import json
import sys
from typing import BinaryIO

import click

from virtio_tee.decode import KINDS, HexError, parse_hex, render_json, render_text
from virtio_tee.decode import decode as decode_bytes
from virtio_tee.decode import request_type as parse_request_type

EXAMPLES = """\
virtio-tee decode event --hex '0480000000000000 2a00000000000000'
virtio-tee decode response --hex '08000000 00000000 0c00ffff 02000000' --request-type INVOKE
virtio-tee decode vhost-user --hex '01 00 00 00  05 00 00 00  08 00 00 00  01 00 00 70 01 00 00 00' --json
"""

_PIPES = """\
virtio-tee decode ta-package 8aaaf200-2450-11e4-abe2-0002a5d5c51b.ta
xxd -s 0x40 -l 128 ring.bin | virtio-tee decode descriptors
"""

_HELP = f"""Show bytes of a wire format as fields: offset, name, type, value, and what the value means.

KIND is one of {", ".join(KINDS)}; `--list` explains them. FILE holds the bytes, as they are or written in hex (plain
digits, C arrays, xxd, hexdump -C); without FILE they come from standard input.

Nothing in the bytes makes it fail: what can be read is shown, what is wrong is said in lines that start with "error:",
and the exit code is then 1.

\b
Examples:
{"".join(f"  {line}" for line in (EXAMPLES + _PIPES).splitlines(keepends=True))}
"""


def _list(context: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted and not context.resilient_parsing:
        width = max(map(len, KINDS))
        for name, kind in KINDS.items():
            click.echo(f"{name:<{width}}  {kind.doc}")
        context.exit()


@click.command("decode", help=_HELP, context_settings={"max_content_width": 120})
@click.argument("kind", type=click.Choice(list(KINDS)), metavar="KIND")
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--hex", "hex_text", metavar="TEXT", help="The bytes, in hex, instead of a file.")
@click.option("--raw", is_flag=True, help="FILE holds the bytes as they are, even if it looks like hex.")
@click.option("--request-type", metavar="NAME|NUMBER", help="For a response: which request it answers, e.g. INVOKE.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON: kind, size, fields, errors.")
@click.option("--list", is_flag=True, is_eager=True, expose_value=False, callback=_list, help="Explain each KIND.")
def decode(kind: str, file: BinaryIO, hex_text: str | None, raw: bool, request_type: str | None, as_json: bool) -> None:
    """The command; its help is _HELP."""
    number = None
    if request_type is not None:
        try:
            number = parse_request_type(request_type)
        except ValueError as e:
            raise click.BadParameter(str(e), param_hint="--request-type") from None
    try:
        data = parse_hex(hex_text) if hex_text is not None else _read(file, raw)
    except HexError as e:
        raise click.UsageError(str(e)) from None
    decoded = decode_bytes(kind, data, request_type=number)
    if as_json:
        click.echo(json.dumps(render_json(decoded), indent=2, ensure_ascii=False))
    else:
        click.echo(render_text(decoded))
    if decoded.errors:
        sys.exit(1)


def _read(file: BinaryIO, raw: bool) -> bytes:
    """The bytes of a file, read as hex where all of it is text that can be."""
    data = file.read()
    if raw or not data.strip():
        return data
    try:
        text = data.decode("ascii")
    except UnicodeDecodeError:
        return data
    if not all(character.isprintable() or character in "\t\r\n" for character in text):
        return data
    return parse_hex(text)
