"""The driver against a device that does whatever the test says."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from device.config import Config, Limits
from device.messages import EVENT_HEADER, EVENTS, REQUEST_HEADER, REQUESTS, RESPONSE_HEADER
from device.params import RawParam, pack_raw, unpack_raw
from device.wire import NULL_REGION, Event, Feature, ParamType, Queue, Request, Status
from guest_driver.arena import PAGE, Arena
from guest_driver.core import VirtioTeeDriver
from guest_driver.transport import TransportError
from pyvhost.errors import DeviceError, FormatError, QueueFull
from tee.calls import (
    Call,
    CloseContext,
    CloseSession,
    Invoke,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Notification, RpcWithdrawn, TeeInfo
from tee.memory import Memory, Range
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft.ta import UUID

requirement = pytest.mark.requirement
IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
BASE = 0x10_0000
PAGES = 256
LIMITS = Limits(max_rpcs=2, num_event_buffers=4)


class Ring:
    """A driver's queue whose device is the test."""

    def __init__(self, size: int = 16) -> None:
        self.size = size
        self.given: list[tuple[Any, Any, Any]] = []
        self.finished: list[tuple[Any, int]] = []
        self.error: Exception | None = None
        self.awake = False
        self.added: Callable[[Any], None] = lambda token: None

    def add(self, readable: Sequence[Any], writable: Sequence[Any], token: Any) -> None:
        if not self.free_slots:
            raise QueueFull("full")
        self.given.append((list(readable), list(writable), token))
        self.added(token)

    def kick_needed(self) -> bool:
        return True

    def poll(self) -> list[tuple[Any, int]]:
        done, self.finished = self.finished, []
        if self.error is not None and not done:
            raise self.error
        return done

    def disable_notifications(self) -> None:
        pass

    def enable_notifications(self) -> bool:
        return self.awake or bool(self.finished)

    @property
    def free_slots(self) -> int:
        return self.size - len(self.given)

    @property
    def in_flight(self) -> int:
        return len(self.given)


class Device:
    """The transport, and what its device does."""

    features = int(Feature.INLINE | Feature.RPC)

    def __init__(self, limits: Limits = LIMITS, *, queues: int = 1, size: int = 16) -> None:
        self.config = Config(0xE1, TeeInfo(1, 1, 1, 15), queues, limits)
        self.queues = [Ring(size) for _ in range(Queue.REQUEST + queues)]
        self.data = bytearray(PAGES * PAGE)
        self.arena = Arena(memoryview(self.data), [Range(BASE, len(self.data))])
        self.allocate, self.release = self.arena.allocate, self.arena.release
        self.changed = self.gone = self.closed = False
        self.events: list[Done | Rpc | RpcWithdrawn | Notification] = []
        self.as_added: dict[Any, bytes] = {}
        for index, ring in enumerate(self.queues):
            ring.added = lambda token, index=index: self.as_added.update({token: self.request_bytes(index)})  # type: ignore[misc]

    def request_bytes(self, index: int, at: int = -1) -> bytes:
        return self.bytes_of(self.queues[index].given[at][0])

    def check_untouched(self) -> None:
        """What the device has to read is as it was when it was made available."""
        for index, ring in enumerate(self.queues):
            for at, (_, _, token) in enumerate(ring.given):
                assert self.request_bytes(index, at) == self.as_added[token]

    def start(self) -> VirtioTeeDriver:
        self.driver = VirtioTeeDriver(self)
        self.driver.attach(self.events.append)
        return self.driver

    def read_config(self, size: int) -> bytes:
        if self.gone:
            raise TransportError("gone")
        return self.config.pack()[:size]

    def kick(self, index: int) -> None:
        pass

    def fileno(self) -> int:
        return -1

    def acknowledge(self) -> bool:
        assert not self.closed
        if self.gone:
            raise TransportError("gone")
        changed, self.changed = self.changed, False
        return changed

    def close(self) -> None:
        self.closed = True

    # -- the device's side

    def bytes_of(self, pieces: Sequence[tuple[int, int]]) -> bytes:
        return b"".join(bytes(self.data[a - BASE : a - BASE + n]) for a, n in pieces)

    def request(self, index: int = Queue.REQUEST, at: int = 0) -> tuple[Any, bytes]:
        data = self.bytes_of(self.queues[index].given[at][0])
        return REQUEST_HEADER.unpack(data), data

    def finish(self, data: bytes, index: int = Queue.REQUEST, at: int = 0, written: int | None = None) -> None:
        assert self.request_bytes(index, at) == self.as_added[self.queues[index].given[at][2]]
        _, writable, token = self.queues[index].given.pop(at)
        left = data
        for address, length in writable:
            self.data[address - BASE : address - BASE + min(length, len(left))] = left[:length]
            left = left[length:]
        assert not left
        self.queues[index].finished.append((token, len(data) if written is None else written))

    def ok(self, body: bytes = b"", ret: int = 0, index: int | None = None, at: int = 0) -> None:
        if index is None:
            index = next(i for i in range(Queue.REQUEST, len(self.queues)) if self.queues[i].given)
        self.finish(RESPONSE_HEADER.pack(0, 0, ret, 3) + body, index, at)

    def run(self) -> float | None:
        return self.driver.run()

    def send_event(self, kind: int, body: bytes, epoch: int | None = None) -> None:
        number = self.config.epoch if epoch is None else epoch
        self.finish(EVENT_HEADER.pack(kind, 0, number) + body, Queue.EVENT)

    def send_rpc(
        self,
        rpc: int,
        command: int = RpcCommand.FS,
        params: Sequence[RawParam] = (),
        call: int = 0,
        *,
        target: int = 0,
        context: int = 0,
    ) -> None:
        body = EVENTS[Event.RPC].codec.pack(
            rpc=rpc,
            command=command,
            target=target,
            deadline_ms=1,
            call=call,
            context=context,
            session=0,
            num_params=len(params),
        )
        self.send_event(Event.RPC, body + pack_raw(params))

    def withdraw(self, rpc: int) -> None:
        self.send_event(Event.RPC_WITHDRAWN, EVENTS[Event.RPC_WITHDRAWN].codec.pack(rpc=rpc))

    def take(self) -> list[Done | Rpc | RpcWithdrawn | Notification]:
        seen, self.events[:] = list(self.events), []
        return seen

    def done(self) -> Done:
        (done,) = self.take()
        assert isinstance(done, Done)
        return done

    # -- honest life

    def open_context(self) -> object:
        return self.open_context_with(5)

    def open_context_with(self, ident: int) -> object:
        self.driver.start(OpenContext())
        self.ok(word(ident))
        self.run()
        done = self.done()
        assert done.code == 0
        return done.value

    def open_session(self, context: object) -> object:
        self.driver.start(OpenSession(context=context, uuid=UUID(int=1)))
        self.ok(word(6))
        self.run()
        done = self.done()
        assert done.code == 0
        return done.value

    def register(self, context: object, region: int = 9, **more: Any) -> Memory:
        memory = self.driver.allocate(4096)
        memory.read_only = more.get("read_only", False)
        self.driver.start(RegisterMemory(context=context, memory=memory))
        self.ok(word(region))
        self.run()
        assert self.done().code == 0
        return memory

    def dead(self) -> bool:
        """All calls have ended with COMMUNICATION, and all that follow do."""
        seen = self.take()
        for one in seen:
            if isinstance(one, Done):
                assert (one.code, one.origin) == (Result.COMMUNICATION, Origin.COMMS)
        call = OpenContext()
        self.driver.start(call)
        assert self.run() is None
        done = self.done()
        assert (done.call, done.code) == (call, Result.COMMUNICATION)
        assert self.driver.usage() == {"calls": 0, "registrations": 0, "rpcs": 0}
        return True


def word(first: int, second: int = 0) -> bytes:
    return first.to_bytes(4, "little") + second.to_bytes(4, "little")


@pytest.fixture
def device() -> Device:
    device = Device()
    device.start()
    return device


@pytest.fixture
def context(device: Device) -> object:
    return device.open_context()


@pytest.fixture
def session(device: Device, context: object) -> object:
    return device.open_session(context)


class TestStart:
    @requirement("DRV-ID-1", "DRV-ID-2")
    @pytest.mark.parametrize(
        ("at", "data"),
        [(0, b"OTEE"), (4, b"\1"), (8, bytes(8)), (32, bytes(4)), (44, b"\3"), (48, bytes(4)), (72, bytes(4))],
    )
    def test_devices_that_are_not_used(self, at: int, data: bytes) -> None:
        device = Device()
        config = bytearray(device.config.pack())
        config[at : at + len(data)] = data
        device.read_config = lambda size: bytes(config)  # type: ignore[method-assign]
        with pytest.raises(FormatError):
            device.start()
        device.read_config = lambda size: device.config.pack()[:100]  # type: ignore[method-assign]
        with pytest.raises(FormatError, match="100 bytes"):
            device.start()
        assert not device.queues[2].given

    @requirement("DRV-ID-2")
    def test_a_newer_minor_version(self) -> None:
        device = Device()
        config = bytearray(device.config.pack())
        config[6:8] = b"\7\0"
        config[92:96] = b"news"
        device.read_config = lambda size: bytes(config)  # type: ignore[method-assign]
        device.start()
        assert device.open_context()

    @requirement("DRV-INI-3", "DRV-EVT-1")
    def test_event_buffers(self) -> None:
        device = Device()
        device.start()
        assert [sum(n for _, n in one[1]) for one in device.queues[Queue.EVENT].given] == [1024] * 4
        device = Device(replace(LIMITS, num_event_buffers=1 << 31))
        device.start()
        assert len(device.queues[Queue.EVENT].given) == 16
        with pytest.raises(FormatError, match="no memory"):
            Device(replace(LIMITS, event_buffer_size=1 << 31)).start()

    def test_too_few_queues(self) -> None:
        device = Device()
        del device.queues[2]
        with pytest.raises(FormatError, match="too small"):
            device.start()


class TestResponses:
    @requirement("DRV-QUE-4", "DRV-REQ-6")
    @pytest.mark.parametrize("data", [b"", bytes(4), bytes(15), bytes(16), bytes(23)])
    def test_too_short(self, device: Device, data: bytes) -> None:
        call = OpenContext()
        device.driver.start(call)
        device.finish(data)
        device.run()
        done = device.done()
        assert (done.call, done.code, done.may_have_run) == (call, Result.COMMUNICATION, True)
        assert device.dead()

    @pytest.mark.parametrize("body", [word(0), word(1, 1)])
    def test_nonsense_for_a_context(self, device: Device, body: bytes) -> None:
        device.driver.start(OpenContext())
        device.ok(body)
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert device.dead()

    def test_an_id_with_a_failure(self, device: Device, context: object) -> None:
        device.driver.start(OpenSession(context=context, uuid=UUID(int=1)))
        device.ok(word(3), ret=Result.BUSY)
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert device.dead()

    @requirement("DRV-REQ-6")
    @pytest.mark.parametrize("status", [*list(Status)[1:], 99])
    def test_nothing_but_the_header_of_a_refusal_counts(self, device: Device, session: object, status: int) -> None:
        room = bytearray(8)
        params: list[Param] = [MemRef(OUT, Memory.of(room), 0, 8), Value(OUT)]
        before = [repr(p) for p in params]
        device.driver.start(Invoke(session=session, func=1, params=params))
        raw = unpack_raw(device.request()[1], 48, 2)
        rest = word(2) + pack_raw([raw[0], (raw[1][0], 1, 2, 3)]) + b"anything"
        device.finish(RESPONSE_HEADER.pack(status, 0, Result.BUSY, 2) + rest)
        device.driver.start(OpenContext())
        device.finish(RESPONSE_HEADER.pack(status, 0, Result.BUSY, 2) + word(77))
        device.run()
        for done in device.take():
            assert isinstance(done, Done)
            assert (done.code, done.value) == (Result.BUSY, None)
        assert [repr(p) for p in params] == before
        assert not any(room)

    @requirement("DRV-REQ-6")
    def test_nothing_beyond_the_used_length_counts(self, device: Device, session: object) -> None:
        room = bytearray(8)
        device.driver.start(Invoke(session=session, func=1, params=[MemRef(OUT, Memory.of(room), 0, 8)]))
        raw = unpack_raw(device.request()[1], 48, 1)
        device.finish(RESPONSE_HEADER.pack(0, 0, 0, 3) + word(1) + pack_raw(raw) + b"anything", written=16 + 8 + 32)
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert not any(room)
        assert device.dead()

    @requirement("DRV-REQ-6", "DRV-REQ-7")
    @pytest.mark.parametrize("status", [*list(Status)[1:], 99, 0xFFFFFFFF])
    def test_refusals(self, device: Device, status: int) -> None:
        device.driver.start(OpenContext())
        device.finish(RESPONSE_HEADER.pack(status, 0, Result.BUSY, 2))
        device.driver.start(OpenContext())
        device.finish(RESPONSE_HEADER.pack(status, 1, 0, 2))
        device.run()
        one, two = device.take()
        assert isinstance(one, Done)
        assert isinstance(two, Done)
        assert (one.code, one.origin, one.value) == (Result.BUSY, 2, None)
        assert (two.code, two.may_have_run) == (Result.COMMUNICATION, True)

    def test_a_region_that_there_is(self, device: Device, context: object) -> None:
        device.register(context)
        memory = device.driver.allocate(10)
        device.driver.start(RegisterMemory(context=context, memory=memory))
        device.ok(word(9))
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert memory.handle is None
        assert device.dead()

    @requirement("DRV-PAR-1")
    @pytest.mark.parametrize(
        "change",
        [
            lambda p: [(p[0][0] ^ 1, *p[0][1:]), *p[1:]],
            lambda p: [(*p[0][:2], 9, p[0][3]), *p[1:]],
            lambda p: [*p[:1], (*p[1][:2], 65, p[1][3]), *p[2:]],
            lambda p: [*p[:1], (p[1][0], 1, *p[1][2:]), *p[2:]],
            lambda p: [*p[:1], (*p[1][:3], 10), *p[2:]],
            lambda p: [*p[:2], (*p[2][:2], 9, p[2][3]), *p[3:]],
            lambda p: [*p[:3], (*p[3][:2], 1 << 60, p[3][3])],
        ],
        ids=["attribute", "input", "size", "offset", "region", "memory-in", "inline-size"],
    )
    def test_parameters(
        self, device: Device, context: object, session: object, change: Callable[[list[RawParam]], list[RawParam]]
    ) -> None:
        memory = device.register(context)
        room = bytearray(8)
        params: list[Param] = [
            Value(IN, 1, 2, 3),
            MemRef(OUT, memory, 0, 64),
            MemRef(IN, memory, 64, 8),
            MemRef(OUT, Memory.of(room), 0, 8),
        ]
        before = [repr(p) for p in params]
        device.driver.start(Invoke(session=session, func=1, params=params))
        _, data = device.request()
        raw = unpack_raw(data, 48, 4)
        device.ok(word(4) + pack_raw(change(raw)) + b"overflow")
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert [repr(p) for p in params] == before
        assert not any(room)
        assert device.dead()

    def test_another_number_of_parameters(self, device: Device, session: object) -> None:
        device.driver.start(Invoke(session=session, func=1, params=[Value(OUT)]))
        device.ok(word(2) + bytes(32))
        device.run()
        assert device.done().code == Result.COMMUNICATION
        assert device.dead()

    def test_short_buffer_is_no_overflow(self, device: Device, session: object) -> None:
        room = bytearray(8)
        param = MemRef(OUT, Memory.of(room), 0, 8)
        device.driver.start(Invoke(session=session, func=1, params=[param]))
        raw = unpack_raw(device.request()[1], 48, 1)
        device.ok(word(1) + pack_raw([(*raw[0][:2], 1 << 40, 0)]) + b"overflow", ret=Result.SHORT_BUFFER)
        device.run()
        assert device.done().code == Result.SHORT_BUFFER
        assert (param.size, any(room)) == (1 << 40, False)

    @requirement("DRV-QUE-4")
    @pytest.mark.fault("hostile-device")
    def test_a_broken_ring(self, device: Device, session: object) -> None:
        call = Invoke(session=session, func=1)
        device.driver.start(call)
        device.queues[Queue.CONTROL].error = DeviceError("an id that is not in flight")
        device.run()
        done = device.done()
        assert (done.call, done.code, done.may_have_run) == (call, Result.COMMUNICATION, True)
        assert device.dead()

    def test_it_never_loops(self, device: Device) -> None:
        device.queues[Queue.EVENT].awake = True
        assert device.run() == 0
        device.queues[Queue.EVENT].awake = False
        assert device.run() is None


class TestEvents:
    @requirement("DRV-EVT-1", "DRV-EVT-2")
    def test_ignored(self, device: Device) -> None:
        device.send_event(0x9999, b"anything")
        device.send_event(Event.NOTIFICATION, word(1))
        device.send_event(Event.RPC, b"of another epoch", epoch=7)
        device.run()
        assert device.take() == []
        assert len(device.queues[Queue.EVENT].given) == 4
        assert device.open_context()

    @pytest.mark.parametrize(
        "params",
        [
            [(ParamType.MEMREF_OUT, 0, 1, 77)],
            [(ParamType.MEMREF_OUT, 0, 4097, 9)],
            [(ParamType.MEMREF_OUT, (1 << 64) - 1, 2, 9)],
            [(ParamType.MEMREF_OUT, 0, 1, 10)],
            [(ParamType.MEMREF_IN, 5, 0, NULL_REGION)],
            [(0x10000 | ParamType.MEMREF_IN, 0, 0, 0)],
            [(200, 0, 0, 0)],
        ],
        ids=["unknown", "size", "offset", "read-only", "null-offset", "inline", "kind"],
    )
    def test_memory_that_was_not_given(self, device: Device, context: object, params: list[RawParam]) -> None:
        device.register(context, 9)
        device.register(context, 10, read_only=True)
        device.send_rpc(1, params=params)
        device.run()
        assert device.take() == []
        assert device.dead()

    @pytest.mark.parametrize("ids", [[0], [1, 1], [1, 2, 3]], ids=["zero", "double", "more than it may"])
    def test_rpc_ids(self, device: Device, ids: list[int]) -> None:
        for rpc in ids:
            device.send_rpc(rpc)
        device.run()
        seen = device.take()
        assert sum(isinstance(e, RpcWithdrawn) for e in seen) == sum(isinstance(e, Rpc) for e in seen) == len(ids) - 1
        assert device.dead()

    @pytest.mark.parametrize("data", [b"", b"\1", EVENT_HEADER.pack(Event.RPC, 0, 0xE1), bytes(15)])
    def test_short_ones(self, device: Device, data: bytes) -> None:
        device.finish(data, Queue.EVENT)
        device.run()
        assert device.dead()

    @pytest.mark.fault("hostile-device")
    def test_notifications(self) -> None:
        """Taken where the feature was negotiated; a short one ends the use of the device."""
        device = Device()
        device.features = int(Feature.INLINE | Feature.RPC | Feature.NOTIFICATION)
        device.start()
        device.send_event(Event.NOTIFICATION, word((1 << 32) - 1))
        device.send_event(Event.NOTIFICATION, word(1), epoch=7)
        device.run()
        assert device.take() == [Notification((1 << 32) - 1)]
        device.send_event(Event.NOTIFICATION, b"\1")
        device.run()
        assert device.dead()

    def ocall_device(self, features: Feature = Feature.INLINE | Feature.RPC | Feature.OCALL) -> Device:
        device = Device()
        device.features = int(features)
        device.start()
        return device

    @requirement("DRV-OCA-1")
    def test_an_ocall_is_for_the_client_of_its_call(self) -> None:
        device = self.ocall_device()
        session = device.open_session(device.open_context())
        call = Invoke(session=session, func=0)
        device.driver.start(call)
        function: RawParam = (ParamType.VALUE_INOUT | 0x100, 7, 0, 0)
        device.send_rpc(1, RpcCommand.OCALL, [function], device.request()[0].tag, target=1, context=5)
        device.run()
        (rpc,) = device.take()
        assert isinstance(rpc, Rpc)
        assert (rpc.call, rpc.to_client, rpc.command) == (call, True, RpcCommand.OCALL)
        assert rpc.params == [Value(INOUT, 7, meta=True)]
        # One whose call has been returned meanwhile is nobody's.
        device.send_rpc(2, RpcCommand.OCALL, [function], 4711, target=1, context=5)
        device.run()
        (late,) = device.take()
        assert isinstance(late, Rpc)
        assert (late.call, late.to_client) == (None, True)

    @requirement("DRV-OCA-1")
    @pytest.mark.fault("hostile-device")
    @pytest.mark.parametrize(
        ("features", "command", "target", "context", "region"),
        [
            (Feature.RPC, RpcCommand.OCALL, 1, 5, 0),  # not negotiated
            (Feature.RPC | Feature.OCALL, RpcCommand.OCALL, 0, 5, 0),  # the supplicant's
            (Feature.RPC | Feature.OCALL, RpcCommand.FS, 1, 5, 0),
            (Feature.RPC | Feature.OCALL, RpcCommand.OCALL, 2, 5, 0),
            (Feature.RPC | Feature.OCALL, RpcCommand.OCALL, 1, 6, 0),  # another context
            (Feature.RPC | Feature.OCALL, RpcCommand.OCALL, 1, 5, 9),  # another client's memory
        ],
    )
    def test_ocalls_that_make_no_sense(
        self, features: Feature, command: int, target: int, context: int, region: int
    ) -> None:
        device = self.ocall_device(features)
        session = device.open_session(device.open_context())
        device.register(device.open_context_with(6))
        device.driver.start(Invoke(session=session, func=0))
        params: list[RawParam] = [(ParamType.VALUE_INOUT | 0x100, 7, 0, 0)]
        if region:
            params.append((ParamType.MEMREF_INOUT, 0, 16, region))
        device.send_rpc(1, command, params, device.request()[0].tag, target=target, context=context)
        device.run()
        assert not any(isinstance(one, Rpc) for one in device.events)
        assert device.dead()

    @requirement("DRV-RPC-7")
    def test_withdrawals_are_acknowledged(self, device: Device) -> None:
        device.send_rpc(1)
        device.run()
        (rpc,) = device.take()
        assert isinstance(rpc, Rpc)
        device.withdraw(1)
        device.withdraw(77)
        device.run()
        (withdrawn,) = device.take()
        assert isinstance(withdrawn, RpcWithdrawn)
        assert withdrawn.rpc is rpc
        kinds = [device.request(Queue.CONTROL, at)[0].type for at in (0, 1)]
        assert kinds == [Request.RPC_WITHDRAWN_ACK] * 2
        device.driver.answer(rpc, RpcReply())
        assert len(device.queues[Queue.CONTROL].given) == 2

    def test_a_flood_of_withdrawals(self, device: Device) -> None:
        for number in range(200):
            device.withdraw(number)
            device.run()
            if device.driver._dead:
                break
        assert len(device.driver._controls) < 50
        assert device.dead()

    def test_what_an_event_names_may_be_gone_with_a_response(self, device: Device, context: object) -> None:
        memory = device.register(context)
        device.driver.start(UnregisterMemory(context=context, memory=memory))
        device.send_rpc(1, RpcCommand.SHM_FREE, [(1, 0, 0, 0), (ParamType.MEMREF_INOUT, 0, 10, 9)])
        device.ok()
        device.run()
        rpc, done = device.take()
        assert isinstance(rpc, Rpc)
        assert isinstance(done, Done)
        assert done.code == 0


class TestRpcs:
    def lend(self, device: Device, context: object, session: object) -> tuple[Invoke, Rpc]:
        memory = device.register(context)
        call = Invoke(session=session, func=1)
        device.driver.start(call)
        device.send_rpc(3, RpcCommand.SHM_ALLOC, [(1, 0, 100, 8)], call=device.request()[0].tag)
        device.run()
        (rpc,) = device.take()
        assert isinstance(rpc, Rpc)
        assert rpc.call is call
        device.driver.answer(rpc, RpcReply(0, [MemRef(INOUT, memory, 0, 100)]))
        return call, rpc

    def replies(self, device: Device) -> list[tuple[int, int, list[RawParam]]]:
        """RPC, result and parameters of the answers that the device has not returned."""
        seen = []
        for at in range(len(device.queues[Queue.CONTROL].given)):
            header, data = device.request(Queue.CONTROL, at)
            assert header.type == Request.RPC_REPLY
            body = REQUESTS[Request.RPC_REPLY].body.codec.unpack(data, 32)
            assert len(data) == 48 + 32 * body.num_params
            seen.append((body.rpc, body.ret, unpack_raw(data, 48, body.num_params)))
        return seen

    @requirement("DRV-RPC-1")
    @pytest.mark.parametrize("code", [0, Result.ITEM_NOT_FOUND, Result.COMMUNICATION])
    def test_each_is_answered_once(self, device: Device, code: int) -> None:
        for rpc in (1, 2):
            device.send_rpc(rpc)
        device.run()
        rpcs = device.take()
        for rpc in reversed(rpcs):
            assert isinstance(rpc, Rpc)
            device.driver.answer(rpc, RpcReply(code))
            device.driver.answer(rpc, RpcReply(Result.BUSY))
        assert self.replies(device) == [(2, code, []), (1, code, [])]

    @requirement("DRV-RPC-5")
    def test_those_that_are_the_drivers(self) -> None:
        device = Device()
        device.driver = VirtioTeeDriver(device, now=lambda: 1_700_000_000_000_000_007)
        device.driver.attach(device.events.append)
        for command, params, answer in (
            (RpcCommand.GET_TIME, [(2, 5, 5, 5)], (0, [(2, 1_700_000_000, 7, 0)])),
            (RpcCommand.GET_TIME, [(1, 0, 0, 0)], (Result.BAD_PARAMETERS, [])),
            (RpcCommand.GET_TIME, [], (Result.BAD_PARAMETERS, [])),
            (RpcCommand.SUSPEND, [(1, 10, 0, 0)], (Result.NOT_SUPPORTED, [])),
            (RpcCommand.NOTIFICATION, [(1, 0, 1, 0)], (Result.NOT_SUPPORTED, [])),
        ):
            device.send_rpc(9, command, params)
            device.run()
            assert device.take() == []  # whoever serves the others does not see it
            assert self.replies(device) == [(9, *answer)]
            device.ok(index=Queue.CONTROL)
            device.run()

    @requirement("DRV-RPC-3", "DRV-RPC-6")
    @pytest.mark.parametrize(
        ("command", "params", "code", "sent"),
        [
            (RpcCommand.FS, [Value(IN, 1, 2, 3), Value(OUT, 7)], 0, (0, [(1, 1, 2, 3), (2, 7, 0, 0)])),
            (RpcCommand.FS, [Value(IN), Value(OUT, 7)], Result.SHORT_BUFFER, (Result.SHORT_BUFFER, None)),
            (RpcCommand.FS, [], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.FS, [], Result.SHORT_BUFFER, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.FS, [Value(IN), Value(INOUT)], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.FS, [Value(IN), Value(OUT), Value(OUT)], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.FS, [Value(OUT), Value(IN)], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.FS, [Value(IN), Value(OUT, meta=True)], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.FS, [], Result.BUSY, (Result.BUSY, [])),
            (RpcCommand.FS, [Value(OUT)], Result.BUSY, (Result.BUSY, [])),
            (RpcCommand.SHM_FREE, [], 0, (0, [])),
            (RpcCommand.SHM_FREE, [Value(IN), Value(OUT)], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.SHM_ALLOC, [], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.SHM_ALLOC, [Value(IN), Value(OUT)], 0, (Result.BAD_PARAMETERS, [])),
            (RpcCommand.SHM_ALLOC, [MemRef(INOUT, None), MemRef(INOUT, None)], 0, (Result.BAD_PARAMETERS, [])),
            # not registered
            (RpcCommand.SHM_ALLOC, [MemRef(INOUT, Memory.of(bytearray(9)))], 0, (Result.BAD_PARAMETERS, [])),
        ],
    )
    def test_answers_have_the_questions_form(
        self, device: Device, command: int, params: list[Param], code: int, sent: tuple[int, list[RawParam] | None]
    ) -> None:
        device.send_rpc(1, command, [(1, 0, 0, 0), (2, 0, 0, 0)])
        device.run()
        rpc = device.take()[0]
        assert isinstance(rpc, Rpc)
        device.driver.answer(rpc, RpcReply(code, params))
        ((ident, ret, raw),) = self.replies(device)
        assert (ident, ret) == (1, sent[0])
        assert sent[1] is None or raw == sent[1]

    @requirement("DRV-RPC-4")
    def test_an_answer_that_is_not_taken(self, device: Device, context: object, session: object) -> None:
        _, rpc = self.lend(device, context, session)
        device.finish(RESPONSE_HEADER.pack(Status.NOT_FOUND, 0, 0, 2), Queue.CONTROL)
        device.run()
        assert device.take() == [RpcWithdrawn(rpc)]

    @requirement("DRV-RPC-3", "DRV-RPC-4")
    def test_memory_is_free_when_the_call_has_ended(self, device: Device, context: object, session: object) -> None:
        call, rpc = self.lend(device, context, session)
        device.ok(index=Queue.CONTROL)
        device.run()
        assert device.take() == []
        device.ok(word(0))
        device.run()
        assert device.take() == [RpcWithdrawn(rpc), Done(call, 0, 3)]

    def test_memory_that_was_freed(self, device: Device, context: object, session: object) -> None:
        call, _ = self.lend(device, context, session)
        device.ok(index=Queue.CONTROL)
        device.send_rpc(4, RpcCommand.SHM_FREE, [(1, 0, 0, 0), (ParamType.MEMREF_INOUT, 0, 100, 9)])
        device.ok(word(0))
        device.run()
        freed, done = device.take()
        assert isinstance(freed, Rpc)
        assert done == Done(call, 0, 3)

    @pytest.mark.parametrize(
        "reply",
        [RpcReply(-1), RpcReply(0, [Value(OUT, 1 << 64)]), RpcReply(0, [MemRef(OUT, Memory.of(bytearray(4)), 0, 4)])],
    )
    def test_a_supplicants_nonsense(self, device: Device, reply: RpcReply) -> None:
        device.send_rpc(1)
        device.run()
        (rpc,) = device.take()
        assert isinstance(rpc, Rpc)
        device.driver.answer(rpc, reply)
        _, data = device.request(Queue.CONTROL)
        body = REQUESTS[Request.RPC_REPLY].body.codec.unpack(data, 32)
        assert (body.rpc, body.ret, body.num_params) == (1, Result.BAD_PARAMETERS, 0)


class TestFlowControl:
    @requirement("DRV-QUE-3", "DRV-QUE-2")
    def test_room_for_what_answers_an_rpc(self, device: Device, context: object, session: object) -> None:
        calls = [Invoke(session=session, func=n) for n in range(40)]
        for call in calls:
            device.driver.start(call)
        ring = device.queues[Queue.REQUEST]
        assert 0 < len(ring.given) < ring.size
        device.send_rpc(1, RpcCommand.SHM_ALLOC, [(1, 0, 100, 8)])
        device.run()
        (rpc,) = device.take()
        assert isinstance(rpc, Rpc)
        memory = device.driver.allocate(100)
        device.driver.start(RegisterMemory(context=context, memory=memory))
        assert device.request(at=-1)[0].type == Request.REGISTER_MEMORY
        device.ok(word(33), at=-1)
        device.run()
        device.driver.answer(rpc, RpcReply(0, [MemRef(INOUT, memory, 0, 100)]))
        assert device.request(Queue.CONTROL)[0].type == Request.RPC_REPLY
        device.take()
        for _ in calls:
            device.ok(word(0))
            device.run()
        assert [e.call for e in device.take() if isinstance(e, Done)] == calls

    @requirement("DRV-CFG-2")
    def test_max_calls(self) -> None:
        device = Device(replace(LIMITS, max_calls=2))
        device.start()
        session = device.open_session(device.open_context())
        calls = [Invoke(session=session, func=n) for n in range(5)]
        for call in calls:
            device.driver.start(call)
        assert len(device.queues[Queue.REQUEST].given) == 2
        for left in (2, 2, 2, 1, 0):
            device.ok(word(0))
            device.run()
            assert len(device.queues[Queue.REQUEST].given) == left
        assert [e.call for e in device.take() if isinstance(e, Done)] == calls

    @requirement("DRV-CFG-2")
    def test_what_is_open_and_registered(self) -> None:
        """Nothing is sent that would exceed a limit, also by what is under way."""
        device = Device(replace(LIMITS, max_contexts=2, max_sessions=2, max_regions=2, max_region_bytes=10_000))
        device.start()
        ring = device.queues[Queue.REQUEST]

        def full(call: Call) -> bool:
            before = len(ring.given)
            device.driver.start(call)
            device.run()
            done = device.done()
            assert (done.call, done.code) == (call, Result.OUT_OF_MEMORY)
            return len(ring.given) == before

        context = device.open_context()
        device.driver.start(OpenContext())
        assert full(OpenContext())
        device.ok(word(6))
        device.run()
        other = device.done().value
        assert full(OpenContext())
        session = device.open_session(context)
        device.driver.start(OpenSession(context=context, uuid=UUID(int=1)))
        assert full(OpenSession(context=other, uuid=UUID(int=1)))
        device.ok(bytes(8), ret=Result.BUSY)
        device.driver.start(CloseSession(session=session))
        device.ok()
        device.run()
        device.take()
        for _ in range(2):
            device.open_session(other)
        assert full(OpenSession(context=context, uuid=UUID(int=1)))
        memory = device.register(context)
        large = device.driver.allocate(8192)
        assert full(RegisterMemory(context=context, memory=large))
        device.register(other, 10)
        assert full(RegisterMemory(context=context, memory=device.driver.allocate(1)))
        device.driver.start(UnregisterMemory(context=context, memory=memory))
        device.ok()
        device.driver.start(CloseContext(context=other))
        device.ok()
        device.run()
        assert [done.code for done in device.take() if isinstance(done, Done)] == [0, 0]
        device.driver.start(RegisterMemory(context=context, memory=large))
        device.ok(word(11))
        device.run()
        assert device.done().code == 0
        assert device.open_session(device.open_context())

    @requirement("DRV-CFG-2")
    def test_what_one_request_may_hold(self) -> None:
        device = Device(replace(LIMITS, max_params=4, max_inline_bytes=64, max_region_ranges=2))
        device.start()
        context = device.open_context()
        session = device.open_session(context)
        pieces = Memory((memoryview(bytearray(3)),), ranges=[Range(BASE + n, 1) for n in range(3)])
        for call, code in (
            (Invoke(session=session, func=1, params=[Value(IN)] * 5), Result.BAD_PARAMETERS),
            (Invoke(session=session, func=1, params=[MemRef(IN, Memory.of(bytearray(65)), 0, 65)]), None),
            (Invoke(session=session, func=1, params=[MemRef(OUT, Memory.of(bytearray(33)), 0, 33)] * 2), None),
            (RegisterMemory(context=context, memory=pieces), None),
        ):
            device.driver.start(call)
            device.run()
            assert device.done().code == (code or Result.OUT_OF_MEMORY)
            assert not device.queues[Queue.REQUEST].given

    @requirement("DRV-CFG-2")
    def test_limit_is_no_surprise(self, device: Device) -> None:
        device.driver.start(OpenContext())
        device.finish(RESPONSE_HEADER.pack(Status.LIMIT, 0, Result.OUT_OF_MEMORY, 2))
        device.run()
        assert device.done().code == Result.OUT_OF_MEMORY
        assert device.open_context()

    def test_calls_that_wait(self) -> None:
        device = Device(replace(LIMITS, max_calls=1))
        device.start()
        context = device.open_context()
        one, two = device.open_session(context), device.open_session(context)
        calls: list[Call] = [Invoke(session=s, func=1) for s in (one, one, two, two)]
        calls.append(OpenSession(context=context, uuid=UUID(int=2)))
        for call in calls:
            device.driver.start(call)
        device.driver.cancel(calls[2])
        device.driver.cancel(calls[2])
        device.driver.start(CloseSession(session=one))
        device.run()
        assert device.take() == [Done(calls[n], Result.CANCEL, Origin.API) for n in (2, 1)]
        device.driver.start(CloseContext(context=context))
        device.run()
        assert device.take() == [Done(calls[n], Result.CANCEL, Origin.API) for n in (3, 4)]
        kinds = [device.request(at=n)[0].type for n in range(3)]
        assert kinds == [Request.INVOKE, Request.CLOSE_SESSION, Request.CLOSE_CONTEXT]

    def test_only_calls_are_cancelled(self, device: Device, context: object) -> None:
        closing = CloseContext(context=context)
        device.driver.start(closing)
        device.driver.cancel(closing)
        assert not device.queues[Queue.CONTROL].given

    @requirement("DRV-REQ-1", "DRV-REQ-2", "DRV-REQ-3", "DRV-REQ-4")
    def test_what_is_sent(self, device: Device, context: object, session: object) -> None:
        memory = device.register(context)
        for _ in range(3):
            device.driver.start(
                Invoke(
                    session=session,
                    func=7,
                    params=[Nothing(), MemRef(INOUT, Memory.of(bytearray(b"abc")), 1, 2), MemRef(IN, memory, 8, 8)],
                )
            )
        headers = [device.request(at=n)[0] for n in range(3)]
        assert len({h.tag for h in headers} - {0}) == 3
        assert {(h.flags, h.epoch, h.context) for h in headers} == {(0, 0xE1, 5)}
        _, data = device.request()
        assert len(data) == 32 + 16 + 3 * 32 + 8
        assert data[-8:] == b"bc" + bytes(6)
        assert sum(n for _, n in device.queues[2].given[0][1]) == 16 + 8 + 3 * 32 + 8


class TestMistakesOfClients:
    @pytest.mark.parametrize(
        "params",
        [
            [Value(IN, 1 << 64)],
            [Value(IN, -1)],
            [MemRef(IN, Memory.of(bytearray(4)), 2, 3)],
            [MemRef(OUT, Memory.of(bytearray(4)), 2, 3)],
            [MemRef(OUT, Memory.of(bytearray(4)), 4, -4)],
            [MemRef(OUT, Memory((memoryview(b"1234"),), read_only=True), 0, 4)],
            [Nothing()] * 25,
            [None],
        ],
    )
    def test_parameters(self, device: Device, session: object, params: list[Any]) -> None:
        device.driver.start(Invoke(session=session, func=1, params=params))
        device.run()
        assert device.done().code == Result.BAD_PARAMETERS
        assert not device.queues[2].given
        assert device.driver.usage()["calls"] == 0

    def test_calls(self, device: Device, session: object) -> None:
        for call in (
            Invoke(session=None, func=1),
            Invoke(session=session, func=1 << 32),
            OpenSession(context=session, uuid=UUID(int=1)),
            CloseContext(context=None),
            UnregisterMemory(context=None, memory=Memory()),
        ):
            device.driver.start(call)
            device.run()
            assert device.done().code == Result.BAD_PARAMETERS
        device.driver.start(Call())
        device.run()
        assert device.done().code == Result.NOT_SUPPORTED

    def test_memory_that_was_taken_away(self, device: Device, session: object) -> None:
        memory = Memory.of(bytearray(8))
        device.driver.start(Invoke(session=session, func=1, params=[MemRef(OUT, memory, 0, 8)]))
        raw = unpack_raw(device.request()[1], 48, 1)
        memory.forget()
        device.ok(word(1) + pack_raw(raw) + bytes(8))
        device.run()
        assert device.done().code == Result.BAD_PARAMETERS
        assert device.open_context()


class TestEpochs:
    @requirement("DRV-EPO-1", "DRV-INI-2", "DRV-REQ-4")
    @pytest.mark.parametrize("how", ["event", "config", "stale"])
    @pytest.mark.fault("backend-restart")
    def test_all_is_gone(self, device: Device, context: object, session: object, how: str) -> None:
        memory = device.register(context)
        call = Invoke(session=session, func=1)
        device.driver.start(call)
        device.send_rpc(1, call=device.request()[0].tag)
        device.run()
        (rpc,) = device.take()
        device.config = replace(device.config, epoch=0xE2)
        if how == "event":
            device.send_event(Event.EPOCH, b"")
        elif how == "config":
            device.changed = True
        else:
            device.driver.start(OpenContext())
            device.finish(RESPONSE_HEADER.pack(Status.STALE_EPOCH, 0, Result.TARGET_DEAD, 2), at=-1)
        device.run()
        seen = [event for event in device.take() if not (isinstance(event, Done) and event.code == Result.TARGET_DEAD)]
        assert seen == [Done(call, Result.COMMUNICATION, Origin.COMMS, may_have_run=True), RpcWithdrawn(rpc)]  # type: ignore[arg-type]
        assert memory.handle is None
        device.finish(RESPONSE_HEADER.pack(Status.ABANDONED, 1, 0, 2))
        device.run()
        assert device.take() == []
        device.driver.start(Invoke(session=session, func=1))
        assert device.request()[0].epoch == 0xE1  # the epoch in which the session was given
        device.finish(RESPONSE_HEADER.pack(Status.STALE_EPOCH, 0, Result.TARGET_DEAD, 2))
        device.run()
        assert device.done().code == Result.TARGET_DEAD
        assert device.open_context() is not None

    @requirement("DRV-REQ-5", "DRV-EPO-2")
    def test_requests_of_the_old_epoch_stay_as_they_are(self, device: Device, session: object) -> None:
        """The device has not returned them: it may read them yet."""
        for number in range(4):
            device.driver.start(Invoke(session=session, func=number))
        device.config = replace(device.config, epoch=0xE2)
        device.changed = True
        device.run()
        for _ in range(4):
            device.driver.start(OpenContext())
        device.run()
        assert [device.request(at=n)[0].epoch for n in range(8)] == [0xE1] * 4 + [0xE2] * 4
        device.check_untouched()

    @requirement("DRV-REQ-8")
    def test_what_may_have_run_is_not_repeated(self, device: Device, session: object) -> None:
        call = Invoke(session=session, func=1)
        device.driver.start(call)
        device.finish(RESPONSE_HEADER.pack(Status.ABANDONED, 1, Result.COMMUNICATION, 2))
        device.run()
        done = device.done()
        assert (done.call, done.code, done.may_have_run) == (call, Result.COMMUNICATION, True)
        device.config = replace(device.config, epoch=0xE2)
        device.changed = True
        for _ in range(3):
            device.run()
        assert not device.queues[Queue.REQUEST].given
        assert device.open_context() is not None
        assert not device.queues[Queue.REQUEST].given

    def test_a_device_that_becomes_another_one(self, device: Device) -> None:
        device.config = replace(device.config, epoch=0xE2, limits=replace(LIMITS, event_buffer_size=60_000))
        device.changed = True
        device.run()
        assert device.dead()

    def test_a_device_that_goes(self, device: Device, session: object) -> None:
        calls = [Invoke(session=session, func=n) for n in range(2)]
        for call in calls:
            device.driver.start(call)
        device.ok(word(0))
        device.gone = True
        device.run()
        one, two = device.take()  # what it completed before it went counts
        assert one == Done(calls[0], 0, 3)
        assert two == Done(calls[1], Result.COMMUNICATION, Origin.COMMS, may_have_run=True)
        assert device.dead()

    def test_it_goes_while_asked(self, device: Device) -> None:
        device.driver.start(OpenContext())
        device.finish(RESPONSE_HEADER.pack(Status.STALE_EPOCH, 0, Result.TARGET_DEAD, 2))
        device.read_config = Device.read_config.__get__(Gone())  # type: ignore[method-assign]
        device.run()
        assert device.done().code == Result.TARGET_DEAD
        assert device.dead()

    def test_close(self, device: Device, session: object) -> None:
        device.driver.start(Invoke(session=session, func=1))
        device.driver.close()
        device.driver.close()
        assert device.closed
        device.run()
        assert device.dead()
        device.driver.cancel(OpenContext())


class TestReserved:
    """Memory that the device may use is not used for anything else, whenever its user gives it up."""

    def reserved(self, device: Device, memory: Memory) -> bool:
        """What is released is given out again."""
        got = []
        with contextlib.suppress(MemoryError):
            while True:
                got.append(device.driver.allocate(4096))
        ranges = [piece for one in got for piece in one.ranges]
        for one in got:
            device.driver.release(one)
        (mine,) = memory.ranges
        return not any(piece.address == mine.address for piece in ranges)

    @requirement("DRV-MEM-1")
    @pytest.mark.parametrize("end", [UnregisterMemory, CloseContext])
    def test_until_its_registration_has_ended(self, device: Device, context: object, end: type[Any]) -> None:
        """Its client has died: nobody waits for the registration's end."""
        memory = device.register(context)
        device.driver.release(memory)
        assert self.reserved(device, memory)
        device.driver.start(end(context=context, **({"memory": memory} if end is UnregisterMemory else {})))
        device.run()
        assert self.reserved(device, memory)
        device.ok()
        device.run()
        assert not self.reserved(device, memory)

    @requirement("DRV-MEM-1")
    @pytest.mark.parametrize("status", [Status.OK, Status.LIMIT])
    def test_while_it_is_being_registered(self, device: Device, context: object, status: Status) -> None:
        memory = device.driver.allocate(4096)
        device.driver.start(RegisterMemory(context=context, memory=memory))
        device.driver.release(memory)
        assert self.reserved(device, memory)
        device.finish(RESPONSE_HEADER.pack(status, 0, 0, 2) + (b"" if status else word(9)))
        device.run()
        assert self.reserved(device, memory) is (status == Status.OK)

    @requirement("DRV-CTX-2", "DRV-MEM-1")
    def test_an_unregister_that_its_context_ends(self, device: Device, context: object) -> None:
        """It says CANCEL: the call that uses the memory may go on until CLOSE_CONTEXT is returned."""
        memory = device.register(context)
        device.driver.start(UnregisterMemory(context=context, memory=memory))
        device.driver.start(CloseContext(context=context))
        device.driver.release(memory)
        device.ok(ret=Result.CANCEL)
        device.run()
        assert self.reserved(device, memory)
        device.ok()
        device.run()
        assert not self.reserved(device, memory)

    @requirement("DRV-CTX-2")
    def test_only_the_closed_contexts(self, device: Device, context: object) -> None:
        other = device.open_context_with(6)
        memories = [device.register(context, 9), device.register(other, 10)]
        device.driver.start(CloseContext(context=other))
        for memory in memories:
            device.driver.release(memory)
        assert [self.reserved(device, memory) for memory in memories] == [True, True]
        device.ok()
        device.run()
        assert [self.reserved(device, memory) for memory in memories] == [True, False]

    @requirement("DRV-EPO-2")
    @pytest.mark.parametrize("losses", [1, 2])
    def test_until_the_old_epochs_requests_were_returned(self, device: Device, session: object, losses: int) -> None:
        context = session.context  # type: ignore[attr-defined]
        memory = device.register(context)
        early = device.driver.allocate(4096)
        calls = [
            Invoke(session=session, func=1, params=[MemRef(INOUT, memory, 0, 8)]),
            RegisterMemory(context=context, memory=early),
        ]
        for call in calls:
            device.driver.start(call)
        for loss in range(losses):
            device.config = replace(device.config, epoch=0xE2 + loss)
            device.changed = True
            device.run()
        assert {e.call for e in device.take() if isinstance(e, Done)} == set(calls)
        for one in (memory, early):
            device.driver.release(one)
        for left in (2, 1):
            assert len(device.queues[Queue.REQUEST].given) == left
            assert self.reserved(device, memory)
            assert self.reserved(device, early)
            fresh = device.driver.allocate(4096)  # the new epoch's memory is none of it
            device.driver.release(fresh)
            assert not self.reserved(device, fresh)
            device.finish(RESPONSE_HEADER.pack(Status.ABANDONED, 1, 0, 2))
            device.run()
        assert not self.reserved(device, memory)
        assert not self.reserved(device, early)

    @requirement("DRV-EPO-2")
    def test_a_device_that_never_returns_them(self, device: Device, session: object) -> None:
        memory = device.register(session.context)  # type: ignore[attr-defined]
        device.driver.start(Invoke(session=session, func=1, params=[MemRef(INOUT, memory, 0, 8)]))
        device.gone = True
        device.run()
        device.driver.release(memory)
        assert self.reserved(device, memory)
        assert device.dead()

    @requirement("DRV-MEM-1")
    def test_no_more_is_shared_than_was_asked_for(self, device: Device, context: object) -> None:
        """A device may look at all of its bytes: none of them holds what another client left there."""
        left = device.driver.allocate(8192)
        left.write(0, b"secret.." * 1024)
        device.driver.release(left)
        memory = device.driver.allocate(5000)
        device.driver.start(RegisterMemory(context=context, memory=memory))
        _, data = device.request()
        body = REQUESTS[Request.REGISTER_MEMORY].body.codec.unpack(data, 32)
        ranges = [int.from_bytes(data[at : at + 8], "little") for at in range(48, len(data), 8)]
        assert body.size == sum(ranges[1::2]) == 5000
        assert not any(device.bytes_of(list(zip(ranges[::2], ranges[1::2], strict=True))))


class Gone:
    gone = True


@requirement("DRV-REQ-5")
@pytest.mark.parametrize("seed", range(150))
@pytest.mark.fault("hostile-device")
def test_a_device_of_random_answers(seed: int) -> None:
    """Each call ends, nothing is raised, nothing outside the driver's own memory is written."""
    dice = random.Random(seed)
    device = Device(replace(LIMITS, max_calls=8), queues=2)
    driver = device.start()
    context = device.open_context()
    session = device.open_session(context)
    memory = device.register(context)
    guard = driver.allocate(4096)
    guard.write(0, b"\xaa" * 4096)
    outer = bytearray(b"\xbb" * 64)
    started: set[Call] = set()
    ended: list[Call] = []
    for _ in range(60):
        params: list[Param] = [
            Value(INOUT, 1, 2, 3),
            MemRef(INOUT, memory, 0, 100),
            MemRef(OUT, Memory.of(memoryview(outer)[16:48]), 0, 32),
        ]
        call: Call = dice.choice([Invoke(session=session, func=1, params=params), OpenContext()])
        started.add(call)
        driver.start(call)
        if dice.random() < 0.2:
            driver.cancel(call)
        index = dice.choice([0, 1, 2, 3])
        ring = device.queues[index]
        if ring.given:
            at = dice.randrange(len(ring.given))
            room = sum(n for _, n in ring.given[at][1])
            _, data = device.request(index, at) if index != Queue.EVENT else (None, b"")
            kind = dice.random()
            if index == Queue.EVENT:
                answer = EVENT_HEADER.pack(dice.choice(list(Event)), 0, dice.choice([0xE1, 0xE1, 2]))
                answer += dice.randbytes(dice.choice([0, 8, 40])) if kind < 0.3 else word(dice.randrange(4))
            elif kind < 0.75:
                answer = RESPONSE_HEADER.pack(0, 0, 0, 3) + word(dice.randrange(3))
                answer += data[48 : 48 + 96] if len(data) > 96 else b""
                answer = answer.ljust(room, b"x") if kind < 0.7 else answer
            else:
                answer = dice.randbytes(dice.randrange(room + 1))
            device.finish(answer[:room], index, at)
        driver.run()
        device.check_untouched()
        for event in device.take():
            if isinstance(event, Done):
                ended.append(event.call)
            elif isinstance(event, Rpc):
                driver.answer(event, RpcReply(dice.choice([0, Result.GENERIC]), event.params))
    driver.close()
    driver.run()
    ended += [event.call for event in device.take() if isinstance(event, Done)]
    assert len(ended) == len(set(ended))
    assert set(ended) == started
    assert outer[:16] + outer[48:] == b"\xbb" * 32
    assert guard.read(0, 4096) == b"\xaa" * 4096
