"""What the backend tells its recorder: also of RPCs and requests that it answers itself, with the reason."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from device.config import Limits
from device.wire import Feature, Queue, Request, Status
from host_backend.epoch import Epoch
from host_backend.router import ROUTES, Route, Router
from host_backend.tables import Pending
from host_backend.trace import Recorder
from tee.calls import Invoke
from tee.driver import TeeInfo
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand, RpcReply


class Told(Recorder):
    """Remembers."""

    def __init__(self) -> None:
        self.rpcs: list[tuple[str, int, str, int]] = []
        self.requests: list[tuple[int, int]] = []

    def rpc_ended(self, vm: str, rpc: object, command: int, answered_by: str, code: int) -> None:
        self.rpcs.append((vm, command, answered_by, code))

    def answered(self, vm: str, kind: int, status: int) -> None:
        self.requests.append((kind, status))


class Tee:
    """Only makes RPCs."""

    info = TeeInfo(1, 1, 0, 0)

    def __init__(self) -> None:
        self.answers: list[RpcReply] = []

    def attach(self, sink: Any) -> None:
        self.ask = sink

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        self.answers.append(reply)

    def run(self) -> float | None:
        return None


class Stage:
    """A guest with one call in progress."""

    def __init__(self, features: Feature = Feature.RPC) -> None:
        self.tee, self.told, self.now = Tee(), Told(), 0.0
        self.router = Router(self.tee, lambda: self.now)  # type: ignore[arg-type]
        self.router.trace = self.told
        port: Any = SimpleNamespace(send_event=lambda data: True)
        self.epoch = Epoch(
            *(5, self.tee, port),  # type: ignore[arg-type]
            vm="web",
            features=features,
            limits=Limits(),
            clock=lambda: self.now,
            on_drained=lambda epoch: None,
            trace=self.told,
        )
        context: Any = SimpleNamespace(ident=1, closing=False)
        request: Any = SimpleNamespace(tag=9, type=Request.INVOKE)
        pending = Pending(self.epoch, None, request, context, lambda *_: ())
        self.call = Invoke(owner=pending, session=None, func=0, params=[])

    def ask(self, command: int, *params: Any, anybody: bool = True) -> None:
        self.tee.ask(Rpc(command, list(params), self.call if anybody else None))

    @property
    def ends(self) -> tuple[str, int, str, int]:
        (one,) = self.told.rpcs
        assert self.tee.answers[0].code == one[3]
        return one


@pytest.mark.parametrize("command", [c for c, route in ROUTES.items() if route is Route.REFUSED] + [0x7777])
def test_refused_to_guests(command: int) -> None:
    stage = Stage()
    stage.ask(command)
    assert stage.ends == ("web", command, "device: refused to guests", Result.NOT_SUPPORTED)


def test_nobody_is_behind_it() -> None:
    stage = Stage()
    stage.ask(RpcCommand.FS, anybody=False)
    assert stage.ends == ("", RpcCommand.FS, "device: nobody is left who could answer", Result.COMMUNICATION)


def test_a_guest_without_supplicant() -> None:
    stage = Stage(Feature(0))
    stage.ask(RpcCommand.LOAD_TA)
    assert stage.ends == ("web", 0, "device: the driver has not negotiated RPC", Result.ITEM_NOT_FOUND)


def test_memory_of_nobodys() -> None:
    stage = Stage()
    stage.ask(RpcCommand.FS, MemRef(Direction.IN, Memory.of(bytearray(4)), 0, 4))
    assert stage.ends == ("web", RpcCommand.FS, "device: memory that is not the guest's", Result.NOT_SUPPORTED)


def test_a_deadline() -> None:
    stage = Stage()
    stage.ask(RpcCommand.FS, Value(Direction.IN))
    assert stage.told.rpcs == []
    stage.now = 1000.0
    stage.router.run()
    assert stage.ends == ("web", RpcCommand.FS, "nobody: its deadline has passed", Result.COMMUNICATION)


def test_the_guest_ends() -> None:
    stage = Stage()
    stage.ask(RpcCommand.FS, Value(Direction.IN))
    stage.epoch.rpcs.reset()
    assert stage.ends == ("web", RpcCommand.FS, "nobody: the guest's state ends", Result.COMMUNICATION)


def test_requests_that_are_refused() -> None:
    stage = Stage()
    slot: Any = SimpleNamespace(respond=lambda *parts: True)
    for data in (b"", b"\1", (0xDEAD).to_bytes(4, "little") + bytes(60)):
        assert stage.epoch.submit(data, 64, Queue.REQUEST, slot, lambda slot: slot) is not None
    assert [kind for kind, _ in stage.told.requests] == [0, 1, 0xDEAD]
    assert all(status != Status.OK for _, status in stage.told.requests)
