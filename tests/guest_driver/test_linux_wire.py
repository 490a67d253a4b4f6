"""The kernel driver's wire.h against the definitions: each structure, field, number, as the C compiler sees them."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from enum import IntEnum, IntFlag
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from construct import Struct

from device import wire
from device.messages import REQUESTS, Tail
from tee.rpc import RpcCommand, ShmType

HEADER = Path(__file__).parents[2] / "guest_driver" / "linux" / "wire.h"
TEXT = HEADER.read_text()

STRUCTS = re.findall(r"^struct vtee_(\w+) \{\n(.*?)^\};", TEXT, re.MULTILINE | re.DOTALL)
ENUMS: dict[str, type[IntEnum]] = {
    "queue": wire.Queue,
    "request": wire.Request,
    "status": wire.Status,
    "event": wire.Event,
    "rpc_target": wire.RpcTarget,
    "rpc_command": RpcCommand,
    "shm_type": ShmType,
}
PREFIXES = {"rpc_target": "TARGET", "rpc_command": "RPC", "shm_type": "SHM"}
NUMBERS = {
    "VTEE_DEVICE_ID": wire.DEVICE_ID,
    "VTEE_MAGIC": wire.MAGIC,
    "VTEE_VERSION_MAJOR": wire.SPEC_VERSION[0],
    "VTEE_PARAM_TYPE_MASK": wire.PARAM_TYPE_MASK,
    "VTEE_PARAM_META": wire.PARAM_META,
    "VTEE_NULL_REGION": wire.NULL_REGION,
}

pytestmark = pytest.mark.skipif(shutil.which("gcc") is None, reason="no C compiler: apt-get install gcc libc6-dev")


@cache
def compiled(expressions: tuple[str, ...]) -> list[int]:
    """What the compiler takes these expressions for."""
    prints = "".join(f'printf("%llu\\n", (unsigned long long)({e}));' for e in expressions)
    program = f'#include <stddef.h>\n#include <stdio.h>\n#include "{HEADER}"\nint main(void) {{ {prints} return 0; }}\n'
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "wire"
        build = ["gcc", "-x", "c", "-", "-Wall", "-Werror", "-o", str(binary)]
        subprocess.run(build, input=program, text=True, check=True, timeout=60)
        out = subprocess.run([str(binary)], capture_output=True, text=True, check=True, timeout=10).stdout
    return [int(line) for line in out.split()]


def definition(name: str) -> Struct[Any, Any]:
    found = getattr(wire, "".join(part.capitalize() for part in name.split("_")))
    assert isinstance(found, Struct)
    return found


def layout(struct: Struct[Any, Any]) -> dict[str, tuple[int, int]]:
    """Field → offset and size, of all that have a name."""
    fields, at = {}, 0
    for field in struct.subcons:
        size = field.sizeof()
        if field.name and not field.name.startswith("_") and "reserved" not in field.name:
            fields[field.name] = (at, size)
        at += size
    return fields


@pytest.mark.parametrize("name", [name for name, _ in STRUCTS])
def test_a_structure_is_as_defined(name: str) -> None:
    expected = layout(definition(name))
    fields = [f for f in re.findall(r"\b(\w+)(?:\[\d+\])?;", dict(STRUCTS)[name]) if f != "reserved"]
    assert fields == list(expected)
    type_name = f"struct vtee_{name}"
    asked = [f"sizeof({type_name})"]
    for field in fields:
        asked += [f"offsetof({type_name}, {field})", f"sizeof((({type_name} *)0)->{field})"]
    size, *numbers = compiled(tuple(asked))
    assert size == definition(name).sizeof()
    assert dict(zip(fields, zip(numbers[::2], numbers[1::2], strict=True), strict=True)) == expected


@pytest.mark.parametrize("name", ENUMS)
def test_numbers_are_as_defined(name: str) -> None:
    body = re.search(rf"^enum vtee_{name} \{{\n(.*?)^\}};", TEXT, re.MULTILINE | re.DOTALL)
    assert body is not None
    prefix = f"VTEE_{PREFIXES.get(name, name.upper())}_"
    names = re.findall(r"\b(VTEE_\w+) =", body[1])
    assert names
    assert dict(zip(names, compiled(tuple(names)), strict=True)) == {
        n: ENUMS[name][n.removeprefix(prefix)].value for n in names
    }


def test_features_are_as_defined() -> None:
    features: type[IntFlag] = wire.Feature
    names = tuple(f"VTEE_FEATURE_{feature.name}" for feature in features)
    assert [1 << number for number in compiled(names)] == [feature.value for feature in features]


def test_constants_are_as_defined() -> None:
    assert dict(zip(NUMBERS, compiled(tuple(NUMBERS)), strict=True)) == NUMBERS


def test_all_statuses_and_events_are_there() -> None:
    """A driver has to know what the device may say, if not what it may be asked."""
    assert {f"VTEE_STATUS_{status.name}" for status in wire.Status} <= set(re.findall(r"VTEE_STATUS_\w+", TEXT))
    assert {f"VTEE_EVENT_{event.name}" for event in wire.Event} <= set(re.findall(r"VTEE_EVENT_\w+", TEXT))


def test_the_tails_are_those_that_the_driver_writes() -> None:
    """Parameters follow OPEN_SESSION, INVOKE and RPC_REPLY, ranges REGISTER_MEMORY: what queue.c and shm.c append."""
    tails = {request: REQUESTS[request].body.tail for request in wire.Request}
    assert [tails[r] for r in (wire.Request.OPEN_SESSION, wire.Request.INVOKE, wire.Request.RPC_REPLY)] == [
        Tail.PARAMS
    ] * 3
    assert tails[wire.Request.REGISTER_MEMORY] is Tail.RANGES
