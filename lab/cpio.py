"""Writes a Linux initramfs archive (cpio, format newc) with the same bytes each time."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BLOCK = 512


def _entry(name: str, mode: int, data: bytes, number: int) -> bytes:
    raw = name.encode() + b"\0"
    fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + raw
    head += b"\0" * (-len(head) % 4)
    return head + data + b"\0" * (-len(data) % 4)


def _walk(root: Path) -> Iterator[Path]:
    """Everything below `root`, folders before what is in them; links are not followed."""
    for path in sorted(root.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)


def write_tree(root: Path, out: BinaryIO) -> None:
    """Archive a folder; all belongs to root, with the permissions that the files have."""
    size = 0
    number = 1
    for path in _walk(root):
        info = path.lstat()
        if stat.S_ISLNK(info.st_mode):
            data = str(path.readlink()).encode()
        elif stat.S_ISREG(info.st_mode):
            data = path.read_bytes()
        elif stat.S_ISDIR(info.st_mode):
            data = b""
        else:
            raise ValueError(f"{path} is neither a file, nor a folder, nor a link")
        size += out.write(_entry(str(path.relative_to(root)), info.st_mode, data, number))
        number += 1
    size += out.write(_entry("TRAILER!!!", 0, b"", 0))
    out.write(b"\0" * (-size % BLOCK))
