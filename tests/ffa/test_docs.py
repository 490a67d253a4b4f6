"""The examples of docs/ffa.md run."""

from __future__ import annotations

import re
import secrets
import threading
import time
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
from guest_driver import client
from tee.io.runtime import TeeRuntime
from tee.soft import SoftTee, examples


def snippets() -> list[str]:
    text = (Path(__file__).resolve().parents[2] / "docs" / "ffa.md").read_text()
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_the_examples_of_setup_and_lock_run() -> None:
    setup, lock = (code for code in snippets() if "Machine()" in code or "RLock" in code)
    names: dict[str, Any] = {"Machine": Machine, "Spmc": Spmc, "Endpoint": Endpoint, "Hypervisor": Hypervisor}
    names |= {name: getattr(abi, name) for name in ("Transaction", "Receiver")}
    names |= {name: getattr(ids, name) for name in ("Call", "Data", "permissions", "ATTRIBUTES_NORMAL")}
    names |= {"threading": threading, "Locked": Locked}
    exec(setup, names)
    assert names["answer"].ok
    assert names["machine"].state(0x40100).handle == names["answer"][2]
    exec(lock, names)
    assert names["vm"].call(ids.Call.ID_GET) == Frame.success(1)


def test_the_middle_way_runs() -> None:
    (code,) = (code for code in snippets() if "MiddleGuest" in code)
    tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=examples.built_in())
    names: dict[str, Any] = {"tee": tee, "PROBE": examples.UUIDS["probe"]}
    names |= {name: getattr(client, name) for name in ("Context", "TempInOut", "ValueIn")} | {"TeeRuntime": TeeRuntime}
    exec(code.replace("session.invoke", "answers = session.invoke"), names)
    assert names["answers"][0] == bytes(b ^ 0xFF for b in b"no byte of this is in memory that the device can read")
