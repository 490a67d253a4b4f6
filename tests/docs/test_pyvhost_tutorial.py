"""The tutorial in docs/pyvhost.md does what it says: its code blocks are executed, in order, in one namespace."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

TEXT = (Path(__file__).resolve().parents[2] / "docs" / "pyvhost.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


def test_tutorial(capsys: pytest.CaptureFixture[str]) -> None:
    assert len(BLOCKS) == 4
    space: dict[str, Any] = {"__name__": "tutorial"}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"docs/pyvhost.md, block {number}", "exec"), space)
    assert space["answer"] == 3
    with pytest.raises(SystemExit):
        space["main"](["--print-capabilities"])
    assert json.loads(capsys.readouterr().out) == {"type": "misc", "features": []}


def test_the_modules_it_names_are_there() -> None:
    for name in re.findall(r"^\| `(pyvhost[.\w]*)` \|", TEXT, re.MULTILINE):
        __import__(name)
