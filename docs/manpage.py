"""Makes docs/man/virtio-tee.1 from the command's own parser. ``make docs`` runs it.

python docs/manpage.py             write it
python docs/manpage.py --check     change nothing; exit 1 if it differs
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from virtio_tee import __version__  # noqa: E402
from virtio_tee.__main__ import main as command  # noqa: E402

PAGE = ROOT / "docs/man/virtio-tee.1"

SIGNS = {
    "\\": "\\e",
    "-": "\\-",
    "–": "\\[en]",
    "→": "\\[->]",
    "≥": "\\[>=]",
    "…": "...",
    "×": "\\[mu]",
    "·": "\\[pc]",
    "“": "\\[lq]",
    "”": "\\[rq]",
    "~": "\\[ti]",
    "^": "\\[ha]",
    "`": "\\[ga]",
    "'": "\\[aq]",
}

TAIL = """\
.SH EXIT STATUS
.TP
0
done
.TP
1
a check, or what was asked for, failed
.TP
2
wrong usage
.SH ENVIRONMENT
.TP
.B LISTEN_PID, LISTEN_FDS
Sockets that a service manager passes: \\fBserve\\fR serves them if neither \\fB\\-\\-socket\\-path\\fR nor
\\fB\\-\\-fd\\fR is given.
.TP
.B NOTIFY_SOCKET
Where \\fBserve\\fR says that it is ready, and that it ends.
.SH SIGNALS
.TP
.B SIGTERM, SIGINT
End \\fBserve\\fR: what its guests have open ends with it.
.SH SEE ALSO
.BR qemu (1),
.BR systemd.socket (5)
"""


def escape(text: str) -> str:
    """Text as roff takes it."""
    out = "".join(SIGNS.get(sign, sign) for sign in text)
    return "\n".join("\\&" + line if line.startswith((".", "\\[aq]")) else line for line in out.split("\n"))


def commands(one: click.Command, context: click.Context) -> Iterator[tuple[click.Command, click.Context]]:
    """A command and all below it, in order."""
    yield one, context
    if isinstance(one, click.Group):
        for name in one.list_commands(context):
            below = one.get_command(context, name)
            assert below is not None
            yield from commands(below, click.Context(below, info_name=name, parent=context))


def description(text: str) -> str:
    """A help text: its paragraphs; those after \\b as they stand."""
    out = []
    for paragraph in re.split(r"\n\s*\n", text.strip()):
        lines = [line.rstrip() for line in paragraph.split("\n")]
        if lines[0].strip() == "\b":
            indent = min(len(line) - len(line.lstrip()) for line in lines[1:] if line)
            body = "\n".join(escape(line[indent:]) for line in lines[1:])
            out.append(f".PP\n.nf\n.RS 2\n{body}\n.RE\n.fi\n")
        else:
            out.append(".PP\n" + escape(" ".join(line.strip() for line in lines)) + "\n")
    return "".join(out)


def option(parameter: click.Option, context: click.Context) -> str:
    """One option's entry, as --help has it."""
    record = parameter.get_help_record(context)
    if record is None:
        return ""
    names, text = record
    return f".TP\n.B {escape(names)}\n{escape(' '.join(text.split()))}\n"


def page() -> str:
    """The whole page."""
    top = click.Context(command, info_name="virtio-tee")
    out = [
        '.\\" Made by docs/manpage.py from the parser: change the options there, and run `make docs`.\n',
        f'.TH VIRTIO\\-TEE 1 "" "virtio\\-tee {__version__}" "User Commands"\n',
        ".SH NAME\nvirtio\\-tee \\- give a guest VM the host's TEE through a virtio device\n",
        ".SH SYNOPSIS\n.B virtio\\-tee\n.I COMMAND\n[\\fIOPTIONS\\fR] [\\fIARGUMENTS\\fR]\n",
        ".SH DESCRIPTION\n" + description(command.help or "").removeprefix(".PP\n"),
        ".SH COMMANDS\n",
    ]
    for one, context in commands(command, top):
        if one is command:
            continue
        usage = " ".join([context.command_path, *one.collect_usage_pieces(context)])
        out.append(f".SS {escape(usage)}\n" + description(one.help or "").removeprefix(".PP\n"))
        out += [option(p, context) for p in one.params if isinstance(p, click.Option)]
    return "".join(out) + TAIL


def words(text: str) -> list[str]:
    """What a page says, without how it is set."""
    return re.findall(r"\w+", text)


def main(arguments: list[str]) -> int:
    """Run as a program: the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/manpage.py [--check]", file=sys.stderr)
        return 2
    text = page()
    # words only: how options are bracketed and wrapped is the click version's business
    if PAGE.exists() and words(PAGE.read_text(encoding="utf-8")) == words(text):
        return 0
    name = PAGE.relative_to(ROOT)
    if arguments:
        print(f"{name} differs from the parser: run `make docs`", file=sys.stderr)
        return 1
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(text, encoding="utf-8")
    print(name)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
