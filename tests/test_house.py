"""The house rules that a reader cannot check by eye: who imports whom, and who does I/O."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

FLOORS = {"virtio_tee": 4, "host_backend": 3, "guest_driver": 3, "device": 2, "ffa": 2, "pyvhost": 1, "tee": 1}

#: Folders whose code does no I/O, and those parts of them that do.
SANS_IO = {"tee": ("tee/io",), "pyvhost": ("pyvhost/io", "pyvhost/examples"), "device": (), "ffa": ()}

IO_MODULES = {
    *("asyncio", "concurrent", "fcntl", "mmap", "multiprocessing", "queue", "select", "selectors", "signal", "socket"),
    *("socketserver", "ssl", "subprocess", "threading", "_thread", "trio"),
}


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file imports anywhere in it, with its line."""
    package = path.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *([node.module] if node.module else [])))
            yield node.lineno, base
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("folder", SANS_IO)
def test_sans_io(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(folder)
        if not any(path.is_relative_to(ROOT / part) for part in SANS_IO[folder])
        for line, name in imports(path)
        if name.split(".")[0] in IO_MODULES or any(f"{name}.".startswith(f"{p}.io.") for p in ("tee", "pyvhost"))
    ]
    assert found == []


@pytest.mark.parametrize("folder", FLOORS)
def test_floors(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{line} imports {name}"
        for path in files(folder)
        for line, name in imports(path)
        if (room := name.split(".")[0]) in FLOORS and room != folder and FLOORS[room] >= FLOORS[folder]
    ]
    assert found == []


def test_the_check_sees_what_it_looks_for() -> None:
    seen = {name for path in files("tee/io") for _, name in imports(path)}
    assert {"select", "threading", "tee.driver"} <= seen
