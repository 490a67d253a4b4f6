"""Outside of ``pyvhost/io``, nothing does I/O; and pyvhost knows nothing of what is built on it."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

import pyvhost

ROOT = Path(pyvhost.__file__).parent
FILES = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.rglob("*.py"))
DOES_IO = {"asyncio", "ctypes", "fcntl", "io", "mmap", "os", "select", "selectors"}
DOES_IO |= {"socket", "subprocess", "threading", "time", "trio"}
#: no I/O: one reads an environment variable, one asks where in memory a view is
ALLOWED = {"vring/choice.py": {"os"}, "vring/parts.py": {"ctypes"}}
THIRD_PARTY = {"construct", "trio"}


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("file", FILES)
def test_imports(file: str) -> None:
    names = imports(ROOT / file)
    tops = {n.partition(".")[0] for n in names}
    # the examples are whole programs on top of the library
    if not file.startswith(("io/", "examples/")):
        assert not tops & DOES_IO - ALLOWED.get(file, set())
        assert not {n for n in names if n.startswith("pyvhost.io")}
    assert tops <= set(sys.stdlib_module_names) | THIRD_PARTY | {"pyvhost"}
