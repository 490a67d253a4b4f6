"""Plug-ins: callables that TAs call by UUID."""

from __future__ import annotations

from importlib.metadata import EntryPoint
from uuid import UUID

import pytest

from tee.io.services import plugins
from tee.io.services.plugins import MAX_DATA, Plugin
from tee.io.supplicant import Supplicant
from tee.memory import Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply
from tests.tee.io.test_supplicant import Pool

IN, INOUT = Direction.IN, Direction.INOUT
NAME = UUID("96bcf744-4f72-4866-bf1d-8634fd9c65e5")


def params(data: bytes = b"data", uuid: UUID = NAME, command: int = 3, sub: int = 4) -> list[Param]:
    """As OP-TEE lays them out: the UUID's octets in four little-endian words."""
    words = [int.from_bytes(uuid.bytes[i : i + 4], "little") for i in range(0, 16, 4)]
    return [
        Value(IN, 0, words[0], words[1]),
        Value(IN, words[2], words[3], command),
        Value(INOUT, sub),
        MemRef(INOUT, Memory.of(bytearray(data)), 0, len(data)),
    ]


def call(plugin: Plugin, given: list[Param], log: list[str] | None = None) -> RpcReply:
    supplicant = Supplicant(plugins={NAME: plugin}, log=(log if log is not None else []).append)
    return supplicant.serve(Rpc(RpcCommand.PLUGIN, given), Pool())


def echo(command: int, sub_command: int, data: bytes) -> bytes:
    return bytes([command, sub_command]) + data[2:]


@pytest.mark.feature("Supplicant: plug-ins, Python callables that TAs call by UUID")
def test_a_call() -> None:
    given = params()
    reply = call(echo, given)
    assert reply.code == Result.SUCCESS
    assert reply.params[2] == Value(INOUT, 4, 4)
    answer = reply.params[3]
    assert isinstance(answer, MemRef)
    assert answer.memory is not None
    assert answer.memory.read(0, 4) == b"\3\4ta"


def test_no_data() -> None:
    given = params()
    given[3] = MemRef(INOUT, None)
    assert call(lambda *_: b"", given).code == Result.SUCCESS
    assert call(lambda *_: b"x", given).code == Result.SHORT_BUFFER


def test_an_answer_that_does_not_fit() -> None:
    reply = call(lambda *_: bytes(9), params())
    assert (reply.code, reply.params[2]) == (Result.SHORT_BUFFER, Value(INOUT, 4, 9))
    assert isinstance(reply.params[3], MemRef)
    assert reply.params[3].memory is not None
    assert reply.params[3].memory.read(0, 4) == b"data"


def test_what_a_plugin_raises() -> None:
    def fail(*_: object) -> bytes:
        raise ZeroDivisionError

    def refuse(*_: object) -> bytes:
        raise TeeError(Result.BUSY)

    log: list[str] = []
    assert call(fail, params(), log).code == Result.GENERIC
    assert "tell its author" in log[0]
    assert call(refuse, params()).code == Result.BUSY
    assert call(lambda *_: None, params()).code == Result.GENERIC  # type: ignore[arg-type]


def test_another_uuid() -> None:
    assert call(echo, params(uuid=UUID(int=1))).code == Result.ITEM_NOT_FOUND


@pytest.mark.parametrize(
    ("index", "instead", "code"),
    [
        (0, Value(IN, 1), Result.NOT_SUPPORTED),
        (0, Value(INOUT, 0), Result.BAD_PARAMETERS),
        (0, Value(IN, 0, 1 << 32), Result.BAD_PARAMETERS),
        (1, Value(IN, -1), Result.BAD_PARAMETERS),
        (2, Value(IN), Result.BAD_PARAMETERS),
        (3, MemRef(IN, None), Result.BAD_PARAMETERS),
        (3, MemRef(INOUT, None, 0, 4), Result.BAD_PARAMETERS),
        (3, MemRef(INOUT, Memory.of(bytearray(4)), 2, 4), Result.BAD_PARAMETERS),
        (3, MemRef(INOUT, Memory.of(bytearray(4)), 0, MAX_DATA + 1), Result.BAD_PARAMETERS),
    ],
)
def test_bad_parameters(index: int, instead: Param, code: int) -> None:
    given = params()
    given[index] = instead
    assert call(echo, given).code == code
    assert call(echo, given[:3]).code == Result.BAD_PARAMETERS


def test_loading() -> None:
    assert list(plugins.load([f"{NAME}=os:getcwd"])) == [NAME]
    for spec, why in (
        ("x=os:getcwd", "badly formed"),
        (f"{NAME}=no_such_module:x", "No module"),
        (f"{NAME}=os:no_such", "no attribute"),
        (f"{NAME}=os:sep", "cannot be called"),
        (f"{NAME}", "Empty module name"),
    ):
        with pytest.raises(ValueError, match=why):
            plugins.load([spec])
    with pytest.raises(ValueError, match="twice"):
        plugins.load([f"{NAME}=os:getcwd"] * 2)


def test_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = EntryPoint(str(NAME), "os:getcwd", plugins.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [entry] if group == "virtio_tee.plugins" else [])
    assert plugins.installed() == [f"{NAME}=os:getcwd"]
