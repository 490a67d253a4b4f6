"""The examples of docs/ffa.md run."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

from ffa.abi import ids
from ffa.abi import transactions as abi
from ffa.abi.frame import Frame
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.locked import Locked
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc


def test_the_examples_run() -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "ffa.md").read_text()
    setup, lock = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    names: dict[str, Any] = {"Machine": Machine, "Spmc": Spmc, "Endpoint": Endpoint, "Hypervisor": Hypervisor}
    names |= {name: getattr(abi, name) for name in ("Transaction", "Receiver")}
    names |= {name: getattr(ids, name) for name in ("Call", "Data", "permissions", "ATTRIBUTES_NORMAL")}
    names |= {"threading": threading, "Locked": Locked}
    exec(setup, names)
    assert names["answer"].ok
    assert names["machine"].state(0x40100).handle == names["answer"][2]
    exec(lock, names)
    assert names["vm"].call(ids.Call.ID_GET) == Frame.success(1)
