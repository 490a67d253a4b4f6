"""Services and server enclaves for clients: the API on each path, the device's requests, and devices that lie."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from device.config import Limits
from device.wire import Feature, Queue, Request
from guest_driver.client import CancelToken, Context, TempIn, TempInOut, ValueInOut, Words
from guest_driver.services import Services
from tee import attestation, package
from tee.calls import OpenContext, OpenSession
from tee.driver import Done, TeeDriver
from tee.io.runtime import TeeRuntime
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Result, TeeError
from tee.services import (
    SERVICES_UUID,
    AcquireEnclave,
    AttestService,
    CallEnclave,
    CallReturn,
    CreateEnclave,
    DestroyEnclave,
    ListServices,
    Loaded,
    LoadService,
    ReleaseEnclave,
    RemoveService,
    RunTask,
    Service,
    ServiceCall,
    ServiceFlag,
    ServiceList,
)
from tee.soft import SoftTee
from tee.soft.enclaves import EnclavePolicy
from tests.guest_driver.live import live
from tests.guest_driver.test_hostile import Device, word
from tests.tee.soft.servers import LOADED, SERVERS, Plain, Server, packed, vendor
from tests.tee.soft.test_enclaves import ADD, DOUBLE, HOLD, ONWARD, acts
from virtio_tee.ffa_vm import ffa_driver

__all__ = ["acts"]

requirement = pytest.mark.requirement
VENDOR, ATTESTER = vendor(), vendor()
OPTIONS: dict[str, Any] = {
    "keys": [VENDOR.public],
    "attestation_key": ATTESTER.private,
    "enclaves": EnclavePolicy(),
}
INOUT = Direction.INOUT


class Machine:
    """A TEE, and a way to it: none, the virtio device, or FF-A."""

    def __init__(self, path: str, folder: Path) -> None:
        self._stack = ExitStack()
        self.path = path
        self.driver: TeeDriver
        if path == "virtio":
            device = self._stack.enter_context(live(folder, Limits(rpc_deadline_ms=5000), built_in=SERVERS, **OPTIONS))
            self.tee, driver = device.tee, device.driver()
            self._stack.callback(driver.close)
            self.driver = driver
        else:
            self.tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=SERVERS, **OPTIONS)
            self.driver = self.tee
        if path == "ffa":
            ffa = ffa_driver(self.tee)
            self._stack.callback(ffa.close)
            self.driver = ffa
        self.runtime = self._stack.enter_context(TeeRuntime(self.driver))
        self.context = Context(self.runtime)

    def do(self, call: ServiceCall) -> Done:
        call.context = self.context.handle
        return self.context.submit(call).wait(10)

    def close(self) -> None:
        """Nothing is left anywhere."""
        self.context.close()
        self.runtime.close()
        self._stack.close()
        left = {name: count for name, count in self.tee.usage().items() if count and name != "services"}
        if self.path == "ffa":  # there a VM has one context for as long as it runs
            left.pop("contexts", None)
        assert left == {}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[[str], Machine]]:
    made: list[Machine] = []

    def machine(path: str) -> Machine:
        made.append(Machine(path, tmp_path))
        return made[-1]

    yield machine
    for one in made:
        one.close()


@pytest.fixture(params=["direct", "virtio", "ffa"])
def machine(request: pytest.FixtureRequest, make: Callable[[str], Machine]) -> Machine:
    return make(request.param)


@pytest.fixture
def services(machine: Machine) -> Iterator[Services]:
    with Services(machine.context) as services:
        yield services


def code_of(act: Callable[[], object]) -> int:
    with pytest.raises(TeeError) as caught:
        act()
    return caught.value.code


class TestApi:
    @pytest.mark.feature("Services: listed, loaded at run time, removed; roll-back refused; on each path")
    def test_load_and_remove(self, services: Services) -> None:
        before = services.available()
        assert [service.uuid for service in before] == sorted([*SERVERS, SERVICES_UUID])
        assert services.load(packed(VENDOR, 3)) == Loaded(LOADED, 3)
        assert Service(LOADED, 3, 0x10001, ServiceFlag.LOADED, "loaded") in services.available()
        assert code_of(lambda: services.load(packed(VENDOR, 2))) == Result.SECURITY
        assert code_of(lambda: services.load(packed(VENDOR, 3)[:50])) == Result.BAD_FORMAT
        services.remove(LOADED)
        assert [service.uuid for service in services.available()] == [service.uuid for service in before]

    @pytest.mark.feature("Services: one-shot tasks (open, invoke and close in one call)")
    def test_task(self, services: Services) -> None:
        assert services.task(Plain.uuid, 0, ValueInOut(40, 2)) == [Words(42, 2, 0)]
        assert code_of(lambda: services.task(Plain.uuid, 1)) == 0x1234

    @pytest.mark.feature("Services: attestation, a signed statement over the measured package and a nonce")
    @requirement("DRV-ATT-1")
    def test_attest(self, services: Services) -> None:
        data, nonce = packed(VENDOR, 4), secrets.token_bytes(32)
        services.load(data)
        statement = services.attest(LOADED, nonce)
        said = attestation.check(statement, ATTESTER.public, nonce)
        assert said == attestation.Statement(LOADED, 4, 1, package.parse(data).digest)
        for bad in (
            (statement, ATTESTER.public, bytes(32)),
            (statement, VENDOR.public, nonce),
            (statement[:-1] + bytes([statement[-1] ^ 1]), ATTESTER.public, nonce),
        ):
            with pytest.raises(TeeError):
                attestation.check(*bad)

    @pytest.mark.feature("Server enclaves: called by name with registers and memory in place, in chains, on each path")
    def test_enclaves(self, machine: Machine, services: Services) -> None:
        enclaves = [services.create_enclave(Server.uuid, f"e{number}") for number in range(3)]
        server = services.acquire("e0")
        assert server.call(ADD, 40, 2) == CallReturn(42)
        with machine.context.allocate(4096) as shared:
            shared.write(b"\1" * 4096)
            assert server.call(DOUBLE, memory=shared.part(INOUT, 96, 4000)) == CallReturn(4000, 1, 3999)
            assert shared.read() == b"\1" * 96 + b"\2" * 4000
        assert server.call(ONWARD, 0, 2).value == 2
        enclaves[0].destroy()
        assert code_of(lambda: server.call(ADD)) == Result.TARGET_DEAD
        server.release()
        assert code_of(lambda: server.call(ADD)) == Result.BAD_PARAMETERS
        assert code_of(lambda: services.acquire("e0")) == Result.ITEM_NOT_FOUND

    @pytest.mark.feature("Server enclaves: concurrent calls to one; destroyed under its callers, who are told")
    def test_destroyed_under_calls(self, machine: Machine, services: Services) -> None:
        enclave = services.create_enclave(Server.uuid, "x")
        server = services.acquire("x")
        codes: list[int] = []
        threads = [
            threading.Thread(target=lambda: codes.append(code_of(lambda: server.call(HOLD, 1000)))) for _ in range(3)
        ]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + 10
        while machine.tee.usage()["threads_busy"] < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.call(ADD, 1, 1).value == 2
        enclave.destroy()
        for thread in threads:
            thread.join(10)
        assert codes == [Result.TARGET_DEAD] * 3

    def test_cancel(self, machine: Machine, services: Services) -> None:
        services.create_enclave(Server.uuid, "x")
        server, token = services.acquire("x"), CancelToken()
        threading.Timer(0.1, token.cancel).start()
        assert code_of(lambda: server.call(HOLD, 1000, 1, cancel=token)) == Result.CANCEL

    def test_arguments(self, services: Services) -> None:
        services.create_enclave(Server.uuid, "x")
        server = services.acquire("x")
        for regs in (range(9), (1 << 64,), (-1,)):
            assert code_of(lambda regs=regs: server.call(*regs)) == Result.BAD_PARAMETERS  # type: ignore[misc]
        for name in ("", "x" * 65, "a\0b", "é" * 33):
            assert code_of(lambda name=name: services.acquire(name)) == Result.BAD_FORMAT  # type: ignore[misc]
        assert code_of(lambda: server.call(DOUBLE, memory=TempIn(b"12"))) == Result.BAD_PARAMETERS
        data = bytearray(b"\1\2")
        server.call(DOUBLE, memory=TempInOut(data))
        assert data == b"\2\4"


@pytest.mark.parametrize("path", ["direct", "virtio"])
class TestCalls:
    """Without a session with the pseudo-TA: calls of the context, which the device has requests for."""

    def test_services(self, make: Callable[[str], Machine], path: str) -> None:
        machine = make(path)
        found = machine.do(ListServices(context=None, max_entries=100)).value
        assert isinstance(found, ServiceList)
        assert [service.uuid for service in found.entries] == sorted([*SERVERS, SERVICES_UUID])
        some = machine.do(ListServices(context=None, first=1, max_entries=2)).value
        assert some == ServiceList(found.total, found.entries[1:3])
        data = bytearray(packed(VENDOR, 7))
        loading = LoadService(context=None, params=[MemRef(Direction.IN, Memory.of(data), 0, len(data))])
        assert machine.do(loading).value == Loaded(LOADED, 7)
        value = Value(INOUT, 40, 2)
        assert machine.do(RunTask(context=None, uuid=Plain.uuid, func=0, params=[value])).code == Result.SUCCESS
        assert value.a == 42
        memory = MemRef(Direction.OUT, Memory.of(bytearray(300)), 0, 300)
        attesting = AttestService(context=None, uuid=LOADED, nonce=bytes(32), params=[memory])
        assert machine.do(attesting).code == Result.SUCCESS
        assert memory.memory is not None
        statement = memory.memory.read(0, memory.size)
        assert attestation.check(statement, ATTESTER.public, bytes(32)).version == 7
        assert machine.do(RemoveService(context=None, uuid=LOADED)).code == Result.SUCCESS
        assert machine.do(RemoveService(context=None, uuid=LOADED)).code == Result.ITEM_NOT_FOUND

    def test_enclaves(self, make: Callable[[str], Machine], path: str) -> None:
        machine = make(path)
        enclave = machine.do(CreateEnclave(context=None, uuid=Server.uuid, name=b"x")).value
        assert machine.do(CreateEnclave(context=None, uuid=Server.uuid, name=b"x")).code == Result.BUSY
        server = machine.do(AcquireEnclave(context=None, name=b"x")).value
        regs = (ADD, 40, 2, 0, 0, 0, 0, 0)
        assert machine.do(CallEnclave(context=None, server=server, regs=regs)).value == CallReturn(42)
        with machine.context.allocate(64) as shared:
            shared.write(b"\1" * 64)
            params = [MemRef(INOUT, shared.memory, 0, 64)]
            call = CallEnclave(context=None, server=server, regs=(DOUBLE, *[0] * 7), params=list(params))
            assert machine.do(call).value == CallReturn(64, 1, 63)
            assert shared.read() == b"\2" * 64
        for wrong in (enclave, object(), None):
            assert machine.do(CallEnclave(context=None, server=wrong, regs=regs)).code == Result.BAD_PARAMETERS
        assert machine.do(DestroyEnclave(context=None, enclave=server)).code == Result.BAD_PARAMETERS
        assert machine.do(DestroyEnclave(context=None, enclave=enclave)).code == Result.SUCCESS
        assert machine.do(CallEnclave(context=None, server=server, regs=regs)).code == Result.TARGET_DEAD
        assert machine.do(ReleaseEnclave(context=None, server=server)).code == Result.SUCCESS
        assert machine.do(AcquireEnclave(context=None, name=b"x")).code == Result.ITEM_NOT_FOUND


def test_calls_that_a_path_does_not_know(make: Callable[[str], Machine]) -> None:
    assert make("ffa").do(ListServices(context=None)).code == Result.NOT_SUPPORTED


class TestDevicesThatLie:
    @pytest.fixture
    def device(self) -> Device:
        device = Device()
        device.features = int(Feature.INLINE | Feature.RPC | Feature.SERVICES | Feature.ENCLAVES)
        device.start()
        return device

    @pytest.fixture
    def context(self, device: Device) -> object:
        device.driver.start(OpenContext())
        device.ok(word(1))
        device.run()
        return device.done().value

    def test_features_that_are_not_there(self, device: Device, context: object) -> None:
        device.driver.start(AttestService(context=context, uuid=LOADED, nonce=bytes(32)))
        device.run()
        assert device.done().code == Result.NOT_SUPPORTED
        assert not device.queues[Queue.REQUEST].given

    @pytest.mark.parametrize(
        "body",
        [
            word(3, 3),
            word(1, 2) + bytes(128),
            word(9, 1) + bytes(63),
            word(9, 1) + bytes(28) + b"\1" + bytes(35),
            b"",
        ],
    )
    def test_a_list_that_makes_no_sense(self, device: Device, context: object, body: bytes) -> None:
        device.driver.start(ListServices(context=context, max_entries=2))
        device.ok(body)
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert device.dead()

    def test_a_shorter_list(self, device: Device, context: object) -> None:
        device.driver.start(ListServices(context=context, max_entries=2))
        device.ok(word(9, 1) + bytes(64))
        device.run()
        value = device.done().value
        assert isinstance(value, ServiceList)
        assert (value.total, len(value.entries)) == (9, 1)

    @pytest.mark.parametrize("ident", [0, 7])
    def test_ids(self, device: Device, context: object, ident: int) -> None:
        device.driver.start(CreateEnclave(context=context, uuid=LOADED, name=b"x"))
        device.ok(word(ident, 0), ret=Result.BUSY if ident else Result.SUCCESS)
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert device.dead()

    def test_what_an_enclave_returns(self, device: Device, context: object) -> None:
        device.driver.start(AcquireEnclave(context=context, name=b"x"))
        device.ok(word(7, 0))
        device.run()
        server = device.done().value
        device.driver.start(CallEnclave(context=context, server=server))
        device.ok((5).to_bytes(8, "little") + (1).to_bytes(8, "little") + bytes(16))
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert device.dead()

    def test_a_server_is_no_session(self, device: Device, context: object) -> None:
        from tee.calls import CloseSession, Invoke

        device.driver.start(AcquireEnclave(context=context, name=b"x"))
        device.ok(word(7, 0))
        device.run()
        server = device.done().value
        for call in (
            Invoke(session=server, func=0),
            CloseSession(session=server),
            DestroyEnclave(context=context, enclave=server),
            CallEnclave(context=object(), server=server),
        ):
            device.driver.start(call)
            device.run()
            assert device.done().code == Result.BAD_PARAMETERS
        assert not device.queues[Queue.REQUEST].given

    def test_servers_count_as_sessions(self) -> None:
        device = Device(Limits(max_sessions=1))
        device.features = int(Feature.INLINE | Feature.SERVICES | Feature.ENCLAVES)
        device.start()
        device.driver.start(OpenContext())
        device.ok(word(1))
        device.run()
        context = device.done().value
        device.driver.start(AcquireEnclave(context=context, name=b"x"))
        device.ok(word(7, 0))
        device.run()
        server = device.done().value
        calls = (OpenSession(context=context, uuid=UUID(int=1)), RunTask(context=context, uuid=UUID(int=1), func=0))
        for call in calls:
            device.driver.start(call)
            device.run()
            assert device.done().code == Result.OUT_OF_MEMORY
        device.driver.start(ReleaseEnclave(context=context, server=server))
        device.ok(b"")
        device.run()
        device.driver.start(calls[0])
        assert device.queues[Queue.REQUEST].given


def test_every_request_has_a_call() -> None:
    from guest_driver.service_requests import SERVICE_REQUESTS
    from tee.services import Command

    assert {about.request for about in SERVICE_REQUESTS.values()} == {Request(command) for command in Command}
