"""OP-TEE's partition as a VM's own code meets it: registers and messages, right and wrong."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from uuid import UUID

import pytest

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, halves
from ffa.abi.ids import GET_FROM_SP, Call, Error, fid
from ffa.abi.messages import parse_infos, uuid_to_words
from ffa.optee.guests import Limits
from ffa.optee.msg import (
    OPTEE_UUID,
    Command,
    Fmem,
    Message,
    Service,
    Wire,
    Yield,
    message_size,
    pack_params,
    unpack_params,
    uuid_words,
)
from ffa.optee.partition import _write_outcome
from ffa.roles.endpoint import Endpoint
from tee import package
from tee.memory import Memory
from tee.params import Direction, Value
from tee.results import Origin, Result
from tee.rpc import RpcCommand
from tee.soft import examples
from tee.soft.ta import Client, Parameters, TrustedApplication
from tests.ffa.optee.bench import Path, Vm, soft_tee

HELLO, PROBE = examples.UUIDS["hello_world"], examples.UUIDS["probe"]
NOTIFIER = UUID(int=77)
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
PAGE = 4096
WAIT = 4


class Notifier(TrustedApplication):
    """Raises its command as a notification."""

    uuid = NOTIFIER

    async def open_session(self, params: Parameters, client: Client) -> None:
        """Open."""

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """Raise."""
        self.env.notify(command)


@dataclass
class Kernel:
    """A VM's kernel that speaks to the partition by itself; messages are in its own pages."""

    path: Path
    vm: Vm
    handles: dict[int, int] = field(default_factory=dict)  #: handle → offset of its bytes in the VM's memory

    def ask(self, *words: int) -> tuple[int, ...]:
        """w3 to w7 of the answer."""
        ids = self.vm.endpoint.id << 16 | self.path.partition.id
        answer = self.vm.endpoint.call(Call.MSG_SEND_DIRECT_REQ, ids, 0, *words)
        assert answer.fid == fid(Call.MSG_SEND_DIRECT_RESP), answer
        assert answer[1] == self.path.partition.id << 16 | self.vm.endpoint.id
        return tuple(answer[3:8])

    def share(self, page: int, pages: int = 1, data: int = 2) -> int:
        """Pages of the VM's, counted from its first; the handle."""
        transaction = abi.Transaction(self.vm.endpoint.id, (abi.Receiver(self.path.partition.id, data),), 0x2F)
        answer = self.vm.endpoint.send_memory(Call.MEM_SHARE, transaction, [(self.vm.base + page * PAGE, pages)])
        assert answer.ok, answer
        handle = answer[2] | answer[3] << 32
        self.handles[handle] = page * PAGE
        return handle

    def put(self, handle: int, message: Message, wires: list[Wire]) -> None:
        message.num_params = len(wires)
        data = message.pack() + pack_params(wires) + Message(0, num_params=4).pack()
        at = self.handles[handle]
        self.vm.memory[at : at + len(data)] = data

    def message(self, handle: int, at: int = 0) -> tuple[Message, list[Wire]]:
        start = self.handles[handle] + at
        found = Message.unpack(bytes(self.vm.memory[start : start + 32]))
        return found, unpack_params(bytes(self.vm.memory[start + 32 : start + message_size(found.num_params)]))

    def call(self, handle: int) -> tuple[int, ...]:
        return self.ask(Service.CALL_WITH_ARG, *halves(handle), 0)

    def do(self, handle: int, message: Message, *wires: Wire) -> Message:
        """A message that ends without an RPC; its outcome."""
        self.put(handle, message, list(wires))
        answer = self.call(handle)
        for _ in range(1000):
            if answer[1] != Yield.INTERRUPT:
                break
            answer = self.ask(Service.RESUME, 0, 0, 0, answer[4])
        assert answer[:2] == (0, Yield.DONE), answer
        return self.message(handle)[0]

    def open(self, handle: int, uuid: UUID, login: int = 0, *wires: Wire) -> Message:
        meta = [Value(Direction.IN, *uuid_words(uuid), 0, meta=True), Value(Direction.IN, 0, 0, login, meta=True)]
        return self.do(handle, Message(Command.OPEN_SESSION), *meta, *wires)


@pytest.fixture
def path() -> Path:
    return Path(soft_tee(built_in={**examples.built_in(), NOTIFIER: Notifier}), vms=2)


@pytest.fixture
def kernel(path: Path) -> Kernel:
    return Kernel(path, path.guests[0])


def test_discovery_and_blocking_calls(path: Path, kernel: Kernel) -> None:
    vm: Endpoint = kernel.vm.endpoint
    answer = vm.call(Call.PARTITION_INFO_GET, *uuid_to_words(OPTEE_UUID))
    (info,) = parse_infos(vm.got(answer[2] * answer[3]), answer[2], vm.version)
    assert info.id == path.partition.id
    assert kernel.ask(Service.GET_API_VERSION) == (1, 0, 0, 0, 0)
    # w4 is what real firmware answers; it has RPMB_PROBE (bit 2) besides
    assert kernel.ask(Service.EXCHANGE_CAPABILITIES) == (0, 4, 3, 63, 0)
    assert kernel.ask(Service.GET_OS_VERSION)[:2] == (4, 10)


@pytest.mark.feature("FF-A: OP-TEE's partition gives any registers and any message a defined answer")
@pytest.mark.parametrize(
    ("words", "code"),
    [
        ((4,), Result.NOT_SUPPORTED),
        ((8,), Result.NOT_SUPPORTED),
        ((0x8000_0002,), Result.NOT_SUPPORTED),
        ((0xFFFF_FFFF,) * 5, Result.NOT_SUPPORTED),
        ((Service.UNREGISTER_SHM, 99, 0), Result.ITEM_NOT_FOUND),
        ((Service.ENABLE_ASYNC_NOTIF, 64), Result.BAD_PARAMETERS),
        ((Service.RESUME, 0, 0, 0, 1), Result.BAD_PARAMETERS),
        ((Service.CALL_WITH_ARG, 99, 0, 0), Result.BAD_PARAMETERS),
        ((Service.CALL_WITH_ARG, 0xFFFF_FFFF, 0xFFFF_FFFF, 0), Result.BAD_PARAMETERS),
    ],
)
def test_registers_that_make_no_sense(kernel: Kernel, words: tuple[int, ...], code: Result) -> None:
    assert kernel.ask(*words)[0] == code
    assert kernel.path.partition.usage() == {"threads": 0, "sessions": 0, "regions": 0, "lent": 0}


def test_messages_that_make_no_sense(kernel: Kernel) -> None:
    handle = kernel.share(4)
    kernel.put(handle, Message(0), [])
    for at in (4, 4096, 4096 - 32, 0xFFFF_FFF8):
        assert kernel.ask(Service.CALL_WITH_ARG, *halves(handle), at)[0] == Result.BAD_PARAMETERS
    for cmd in (4, 5, 8, 99):
        assert kernel.do(handle, Message(cmd)).ret == Result.NOT_IMPLEMENTED
    assert kernel.do(handle, Message(Command.OPEN_SESSION)).ret == Result.BAD_PARAMETERS
    assert kernel.do(handle, Message(Command.INVOKE_COMMAND, session=1)).ret == Result.BAD_PARAMETERS
    assert kernel.do(handle, Message(Command.CLOSE_SESSION, session=1)).ret == Result.BAD_PARAMETERS
    assert kernel.do(handle, Message(Command.CANCEL, session=1)).ret == Result.ITEM_NOT_FOUND
    for login in (0x8000_0000, 0xF000_0000, 3, 1 << 40):
        assert kernel.open(handle, HELLO, login).ret == Result.ACCESS_DENIED
    kernel.put(handle, Message(Command.OPEN_SESSION), [])
    at = kernel.handles[handle]
    for count in (7, 127, 0xFFFF_FFFF):
        kernel.vm.memory[at + 28 : at + 32] = count.to_bytes(4, "little")
        assert kernel.call(handle)[0] == Result.BAD_PARAMETERS
    session = kernel.open(handle, PROBE).session
    for wire in (
        Fmem(Direction.IN, 0, 1, 0xDEAD),
        Fmem(Direction.IN, 4090, 7, handle),
        Fmem(Direction.IN, 1 << 40, 0, handle),
        Value(Direction.IN, meta=True),
    ):
        assert kernel.do(handle, Message(Command.INVOKE_COMMAND, session=session), wire).ret == Result.BAD_PARAMETERS
    kernel.put(handle, Message(Command.INVOKE_COMMAND, session=session), [Value(Direction.IN)])
    kernel.vm.memory[at + 32] = 9  # a physical address
    assert kernel.call(handle)[:2] == (0, Yield.DONE)
    assert Message.unpack(bytes(kernel.vm.memory[at : at + 32])).ret == Result.BAD_PARAMETERS
    assert kernel.path.partition.usage() == {"threads": 0, "sessions": 1, "regions": 1, "lent": 0}


def test_memory_is_held_while_it_is_used_and_given_back(kernel: Kernel) -> None:
    handle, data = kernel.share(4), kernel.share(8, 4)
    session = kernel.open(handle, PROBE).session
    kernel.vm.memory[8 * PAGE : 8 * PAGE + 4] = b"\1\2\3\4"
    message = Message(Command.INVOKE_COMMAND, 2, session)
    xored = kernel.do(handle, message, Fmem(Direction.INOUT, 0, 4, data), Value(Direction.IN, 0xFF))
    assert xored.ret == Result.SUCCESS
    assert kernel.vm.memory[8 * PAGE : 8 * PAGE + 4] == b"\xfe\xfd\xfc\xfb"
    assert kernel.vm.endpoint.reclaim(data).error is Error.DENIED
    kernel.put(
        handle,
        Message(Command.INVOKE_COMMAND, 8, session, 5),
        [Fmem(Direction.INOUT, 0, 4, data), Value(Direction.INOUT, 60_000)],
    )
    waits = kernel.call(handle)
    assert waits[:2] == (0, Yield.INTERRUPT)
    for busy in (handle, data):
        assert kernel.ask(Service.UNREGISTER_SHM, *halves(busy))[0] == Result.BUSY
    other = kernel.share(16)
    assert kernel.do(other, Message(Command.CANCEL, session=session, cancel_id=5)).ret == Result.SUCCESS
    assert kernel.ask(Service.RESUME, 0, 0, 0, waits[4])[:2] == (0, Yield.DONE)
    assert kernel.message(handle)[0].ret == Result.CANCEL
    assert kernel.ask(Service.UNREGISTER_SHM, *halves(data))[0] == 0
    assert kernel.vm.endpoint.reclaim(data).ok
    assert kernel.ask(Service.UNREGISTER_SHM, *halves(data))[0] == Result.ITEM_NOT_FOUND


def test_read_only_memory(kernel: Kernel) -> None:
    handle, data = kernel.share(4), kernel.share(8, data=1)
    session = kernel.open(handle, PROBE).session
    digest = Fmem(Direction.OUT, 2048, 32, handle)
    message = Message(Command.INVOKE_COMMAND, 11, session)
    assert kernel.do(handle, message, Fmem(Direction.IN, 0, 4, data), digest).ret == Result.SUCCESS
    assert kernel.do(handle, message, Fmem(Direction.INOUT, 0, 4, data), digest).ret == Result.BAD_PARAMETERS
    assert kernel.ask(Service.CALL_WITH_ARG, *halves(data), 0)[0] == Result.BAD_PARAMETERS


def test_vms_do_not_reach_each_other(path: Path) -> None:
    mine, other = (Kernel(path, vm) for vm in path.guests)
    handle = mine.share(4)
    session = mine.open(handle, PROBE).session
    mine.put(handle, Message(Command.INVOKE_COMMAND, WAIT, session, 1), [Value(Direction.IN, 60_000)])
    waits = mine.call(handle)
    assert other.ask(Service.CALL_WITH_ARG, *halves(handle), 0)[0] == Result.BAD_PARAMETERS
    assert other.ask(Service.UNREGISTER_SHM, *halves(handle))[0] == Result.ITEM_NOT_FOUND
    assert other.ask(Service.RESUME, 0, 0, 0, waits[4])[0] == Result.BAD_PARAMETERS
    theirs = other.share(4)
    assert other.do(theirs, Message(Command.INVOKE_COMMAND, 0, session)).ret == Result.BAD_PARAMETERS
    assert other.do(theirs, Message(Command.CLOSE_SESSION, session=session)).ret == Result.BAD_PARAMETERS
    assert other.do(theirs, Message(Command.CANCEL, session=session, cancel_id=1)).ret == Result.ITEM_NOT_FOUND
    path.partition.end(mine.vm.endpoint.id)
    assert path.partition.usage() == {"threads": 0, "sessions": 0, "regions": 1, "lent": 0}
    assert mine.vm.endpoint.reclaim(handle).ok
    assert other.open(theirs, HELLO).ret == Result.SUCCESS


def test_limits() -> None:
    path = Path(limits=Limits(threads_per_vm=1, regions=2, sessions=1))
    kernel = Kernel(path, path.guests[0])
    handle, second, third = (kernel.share(page) for page in (4, 8, 12))
    session = kernel.open(handle, PROBE).session
    assert kernel.open(handle, PROBE).ret == Result.OUT_OF_MEMORY
    kernel.put(handle, Message(Command.INVOKE_COMMAND, WAIT, session, 1), [Value(Direction.IN, 60_000)])
    assert kernel.call(handle)[1] == Yield.INTERRUPT
    kernel.put(second, Message(Command.INVOKE_COMMAND, 0, session), [])
    assert kernel.call(second)[0] == Result.BUSY
    kernel.put(third, Message(Command.INVOKE_COMMAND, 0, session), [])
    assert kernel.call(third)[0] == Result.OUT_OF_MEMORY
    assert kernel.do(second, Message(Command.CANCEL, session=session, cancel_id=1)).ret == Result.SUCCESS


@pytest.mark.feature("FF-A: OP-TEE's notifications reach the VM that they are for")
def test_notifications(path: Path, kernel: Kernel) -> None:
    vm, partition = kernel.vm.endpoint, path.partition
    assert vm.call(Call.NOTIFICATION_BIND, partition.id << 16 | vm.id, 0, *halves(1 << 40)).ok
    assert kernel.ask(Service.ENABLE_ASYNC_NOTIF, 40)[0] == 0
    handle = kernel.share(4)
    session = kernel.open(handle, NOTIFIER).session
    for value in (7, 255, 7):
        assert kernel.do(handle, Message(Command.INVOKE_COMMAND, value, session)).ret == 0
    answer = vm.call(Call.NOTIFICATION_GET, vm.id, GET_FROM_SP)
    assert answer[2] | answer[3] << 32 == 1 << 40
    kernel.put(handle, Message(Command.DO_BOTTOM_HALF), [])
    answer_words, values = kernel.call(handle), []
    while answer_words[1] == Yield.RPC_CMD:
        asked, (value,) = kernel.message(handle, 32)
        assert asked.cmd == RpcCommand.NOTIFICATION
        assert isinstance(value, Value)
        values.append((value.a, value.b))
        answer_words = kernel.ask(Service.RESUME, 0, 0, 0, answer_words[4])
    assert values == [(1, 7), (1, 255)]
    other = Kernel(path, path.guests[1])
    theirs = other.share(4)
    assert other.do(theirs, Message(Command.DO_BOTTOM_HALF)).ret == 0
    assert kernel.do(handle, Message(Command.STOP_ASYNC_NOTIF)).ret == 0
    assert kernel.do(handle, Message(Command.INVOKE_COMMAND, 1, session)).ret == 0
    assert vm.call(Call.NOTIFICATION_GET, vm.id, GET_FROM_SP)[2:4] == (0, 0)


@pytest.mark.parametrize("seed", range(20))
def test_random_calls(seed: int) -> None:
    """Whatever a VM says, it gets an answer, and another VM can work."""
    rng = random.Random(seed)
    path = Path(soft_tee(built_in=examples.built_in("probe", "hello_world"), keys=[KEYS.public]), vms=2)
    kernel = Kernel(path, path.guests[0])
    handles = [kernel.share(page, 2) for page in (4, 8, 12, 16)]
    idents = [0, 1, 2]
    codes = {0, *Result}
    for _ in range(400):
        handle = rng.choice(handles)
        wires: list[Wire] = [
            rng.choice(
                [
                    Value(rng.choice(list(Direction)), rng.choice([0, 1, 5, 1 << 63]), rng.getrandbits(8)),
                    Fmem(
                        rng.choice(list(Direction)),
                        rng.choice([0, 4096, 8190]),
                        rng.choice([0, 1, 4096]),
                        rng.choice(handles),
                    ),
                ]
            )
            for _ in range(rng.randrange(5))
        ]
        if rng.random() < 0.3:
            uuid = rng.choice([PROBE, HELLO, UUID(int=rng.getrandbits(128))])
            wires = [
                Value(Direction.IN, *uuid_words(uuid), 0, meta=True),
                Value(Direction.IN, 0, 0, 0, meta=True),
                *wires,
            ]
        kernel.put(
            handle,
            Message(rng.choice([0, 1, 1, 2, 3, 6, 7, 9]), rng.randrange(13), rng.randrange(4), rng.randrange(3)),
            wires,
        )
        at = kernel.handles[handle]
        for _ in range(rng.choice([0, 0, 1, 8])):
            kernel.vm.memory[at + rng.randrange(400)] = rng.getrandbits(8)
        words = rng.choice(
            [
                (Service.CALL_WITH_ARG, *halves(handle), rng.choice([0, 0, 0, 8, 4096, 8184])),
                (Service.RESUME, 0, 0, 0, rng.choice(idents)),
                (Service.UNREGISTER_SHM, *halves(handle)),
                tuple(rng.getrandbits(32) for _ in range(5)),
            ]
        )
        answer = kernel.ask(*words)
        if words[0] in set(Service) - {Service.GET_API_VERSION, Service.GET_OS_VERSION}:
            assert answer[0] in codes
        idents.append(answer[4])
        if rng.random() < 0.1:
            kernel.vm.endpoint.reclaim(handle)
            if handle not in path.spmc.transactions.regions:
                handles.remove(handle)
                handles.append(kernel.share(kernel.handles.pop(handle) // PAGE, 2))
    path.partition.end(kernel.vm.endpoint.id)
    vm = kernel.vm.endpoint
    for _ in range(50):
        vm.call(Call.MSG_SEND_DIRECT_REQ, vm.id << 16 | path.partition.id, 0, Service.GET_API_VERSION)
        path.partition.work()
    assert all(vm.reclaim(handle).ok for handle in handles)
    other = Kernel(path, path.guests[1])
    theirs = other.share(4)
    opened = other.open(theirs, HELLO)
    assert (opened.ret, opened.ret_origin) in [(0, Origin.TRUSTED_APP), (0, Origin.TEE)]


def test_other_frames(path: Path) -> None:
    for frame in (Frame.of(Call.RUN), Frame.of(Call.INTERRUPT), Frame(0)):
        assert path.partition.receive(frame, 0).fid == fid(Call.MSG_WAIT)


def test_an_output_that_no_message_can_hold() -> None:
    memory, message = Memory.of(bytearray(128)), Message(Command.INVOKE_COMMAND, num_params=1)
    message.end(Result.SUCCESS, Origin.TRUSTED_APP)
    _write_outcome(memory, 0, message, [Value(Direction.OUT)], [Value(Direction.OUT, 1 << 64)])
    written = Message.unpack(memory.read(0, 32))
    assert (written.ret, written.ret_origin) == (Result.GENERIC, Origin.TEE)
    assert memory.read(32, 96) == bytes(96)


class TestAnothersMemory:
    """REGISTER_SHM: VM 1 speaks for VM 2."""

    @pytest.fixture
    def handle(self, kernel: Kernel) -> int:
        """Where VM 1's messages are."""
        kernel.path.partition.proxies = {1: {2}}
        return kernel.share(4)

    @staticmethod
    def register(kernel: Kernel, handle: int, of: int, *, owner: int = 2, tag: int = 0, size: int = PAGE, flags: int = 0
                 ) -> int:  # fmt: skip
        meta = [Value(Direction.IN, of, tag, owner, meta=True), Value(Direction.IN, size, flags, 0, meta=True)]
        return kernel.do(handle, Message(Command.REGISTER_SHM), *meta).ret

    def test_what_is_refused(self, kernel: Kernel, handle: int) -> None:
        theirs = Kernel(kernel.path, kernel.path.guests[1]).share(4, 2)
        for owner in (0, 1, 3, 0x8001, 1 << 16 | 2, (1 << 64) - 1):
            assert self.register(kernel, handle, theirs, owner=owner) == Result.ACCESS_DENIED
        for of, tag in ((theirs, 1), (handle, 0), (0, 0), ((1 << 64) - 1, 0)):
            assert self.register(kernel, handle, of, tag=tag) == Result.ITEM_NOT_FOUND
        for size in (0, PAGE, 3 * PAGE, (1 << 64) - 1):
            assert self.register(kernel, handle, theirs, size=size) == Result.BAD_PARAMETERS
        assert self.register(kernel, handle, theirs, size=2 * PAGE, flags=2) == Result.BAD_PARAMETERS
        one, two = Value(Direction.IN, theirs, 0, 2, meta=True), Value(Direction.IN, 2 * PAGE, 0, meta=True)
        wrong: list[list[Wire]] = [
            [],
            [one],
            [one, two, two],
            [one, Value(Direction.IN, 2 * PAGE, 0)],
            [Value(Direction.INOUT, theirs, 0, 2, meta=True), two],
            [Fmem(Direction.IN, 0, 8, handle), two],
        ]
        for wires in wrong:
            assert kernel.do(handle, Message(Command.REGISTER_SHM), *wires).ret == Result.BAD_PARAMETERS
        assert kernel.path.partition.usage()["regions"] == 1  # the messages'
        assert self.register(kernel, handle, theirs, size=2 * PAGE) == 0
        assert self.register(kernel, handle, theirs, size=2 * PAGE) == Result.BUSY

    def test_vms_that_speak_for_nobody(self, kernel: Kernel, handle: int) -> None:
        other = Kernel(kernel.path, kernel.path.guests[1])
        assert self.register(other, other.share(4), handle, owner=1) == Result.NOT_IMPLEMENTED

    def test_it_is_the_callers_to_end_and_to_use(self, kernel: Kernel, handle: int) -> None:
        other = Kernel(kernel.path, kernel.path.guests[1])
        theirs = other.share(5)
        messages = other.share(4)
        assert self.register(kernel, handle, theirs) == 0
        assert other.ask(Service.UNREGISTER_SHM, *halves(theirs))[0] == Result.ITEM_NOT_FOUND
        session = kernel.open(handle, PROBE).session
        theirs_too = other.open(messages, PROBE).session
        wires = [Fmem(Direction.INOUT, 10, 100, theirs), Value(Direction.IN, 0x7F)]
        refused = other.do(messages, Message(Command.INVOKE_COMMAND, 2, theirs_too), *wires)
        assert refused.ret == Result.BAD_PARAMETERS
        assert kernel.do(handle, Message(Command.INVOKE_COMMAND, 2, session), *wires).ret == 0
        assert bytes(other.vm.memory[5 * PAGE : 5 * PAGE + 111]) == bytes(10) + b"\x7f" * 100 + b"\0"
        assert other.vm.endpoint.reclaim(theirs).error is Error.DENIED
        assert kernel.vm.endpoint.reclaim(theirs).error is Error.INVALID_PARAMETERS
        assert kernel.ask(Service.UNREGISTER_SHM, *halves(theirs))[0] == 0
        assert other.vm.endpoint.reclaim(theirs).ok

    @pytest.mark.fault("quota")
    def test_limits(self) -> None:
        path = Path(soft_tee(), vms=2, limits=Limits(regions=2, threads_per_vm=1))
        path.partition.proxies = {1: {2}}
        kernel, other = Kernel(path, path.guests[0]), Kernel(path, path.guests[1])
        handle, waiting = kernel.share(4), kernel.share(5)
        session = kernel.open(handle, PROBE).session
        kernel.put(waiting, Message(Command.INVOKE_COMMAND, WAIT, session), [Value(Direction.IN, 0)])
        assert kernel.call(waiting)[1] == Yield.INTERRUPT  # the one thread
        assert self.register(kernel, handle, other.share(4)) == Result.OUT_OF_MEMORY  # the answer, but no BUSY
        assert path.partition.usage()["regions"] == 2
