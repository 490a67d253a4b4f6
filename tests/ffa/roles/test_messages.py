"""Direct and indirect messages, and running, yielding and waiting."""

from __future__ import annotations

from uuid import UUID

import pytest

from ffa.abi import messages
from ffa.abi.frame import Frame
from ffa.abi.ids import VERSION_1_1, VERSION_1_2, Call, Error, fid
from ffa.roles.endpoint import Endpoint, respond
from ffa.roles.machines import Context

from .conftest import Bench

REQ, REQ2 = Call.MSG_SEND_DIRECT_REQ, Call.MSG_SEND_DIRECT_REQ2


@pytest.mark.parametrize("smc64", [False, True])
@pytest.mark.parametrize(("sender", "receiver"), [(1, 0x8001), (3, 0x8001), (1, 2), (0x8001, 0x8002)])
def test_direct_requests(bench: Bench, sender: int, receiver: int, smc64: bool) -> None:
    words = tuple(0x1_0000_0000 * smc64 + n for n in range(5))
    answer = bench.all[sender].call(REQ, sender << 16 | receiver, 0, *words, smc64=smc64)
    assert answer.fid == fid(Call.MSG_SEND_DIRECT_RESP, smc64)
    assert answer[1:8] == (receiver << 16 | sender, 0, *words)
    assert answer[8:] == (0,) * 10


def test_direct_requests_2_carry_x4_to_x17(bench: Bench) -> None:
    vm = bench.vms[1]
    uuid = messages.uuid_to_halves(UUID(int=0x8001))
    words = tuple(range(100, 114))
    bench.sps[0x8001].answers.append(Frame.of(Call.MSG_SEND_DIRECT_RESP2, 0x8001 << 16 | 1, 0, 0, *reversed(words)))
    answer = vm.call(REQ2, 1 << 16 | 0x8001, *uuid, *words)
    assert answer == Frame.of(Call.MSG_SEND_DIRECT_RESP2, 0x8001 << 16 | 1, 0, 0, *reversed(words))
    assert bench.sps[0x8001].asked[-1][4:] == words
    other = messages.uuid_to_halves(UUID(int=5))
    assert vm.call(REQ2, 1 << 16 | 0x8001, *other).error is Error.INVALID_PARAMETERS
    assert bench.vms[2].call(REQ2, 2 << 16 | 0x8001, *uuid).error is Error.NOT_SUPPORTED  # FF-A 1.1


@pytest.mark.parametrize(
    ("caller", "w1", "w2", "code"),
    [
        (1, 2 << 16 | 0x8001, 0, Error.INVALID_PARAMETERS),  # in another's name
        (1, 1 << 16 | 1, 0, Error.INVALID_PARAMETERS),  # to itself
        (1, 1 << 16 | 0x8009, 0, Error.INVALID_PARAMETERS),  # nobody
        (1, 1 << 16 | 9, 0, Error.INVALID_PARAMETERS),
        (1, 1 << 16 | 0x8001, 1, Error.INVALID_PARAMETERS),  # reserved
        (1, 1 << 16 | 0x8001, 1 << 31, Error.INVALID_PARAMETERS),  # a framework message
        (0x8001, 0x8001 << 16 | 1, 0, Error.INVALID_PARAMETERS),  # partitions do not ask VMs
        (0x8001, 0x8002 << 16 | 0x8001, 0, Error.INVALID_PARAMETERS),
    ],
)
def test_direct_requests_that_are_refused(bench: Bench, caller: int, w1: int, w2: int, code: Error) -> None:
    assert bench.all[caller].call(REQ, w1, w2).error is code
    assert bench.sps[0x8001].asked == bench.sps[0x8002].asked == []


def test_who_takes_no_requests_gets_none(bench: Bench) -> None:
    deaf = Endpoint(4, bench.machine, properties=0)
    bench.hypervisor.add(deaf)
    assert bench.vms[1].call(REQ, 1 << 16 | 4).error is Error.DENIED
    assert deaf.call(REQ, 4 << 16 | 1).error is Error.DENIED
    assert deaf.call(REQ, 4 << 16 | 0x8001).error is Error.DENIED


@pytest.mark.parametrize(
    "answer",
    [
        Frame.of(Call.MSG_SEND_DIRECT_RESP, 1 << 16 | 0x8001),  # ids not swapped
        Frame.of(Call.MSG_SEND_DIRECT_RESP, 0x8001 << 16 | 2),  # to another
        Frame.of(Call.MSG_SEND_DIRECT_RESP, 0x8001 << 16 | 1, smc64=True),  # the other convention
        Frame.of(Call.MSG_WAIT),
        Frame(0),
    ],
)
def test_an_answer_that_is_none_aborts_the_request(bench: Bench, answer: Frame) -> None:
    bench.sps[0x8001].answers.append(answer)
    assert bench.vms[1].call(REQ, 1 << 16 | 0x8001).error is Error.ABORTED
    assert bench.vms[1].call(REQ, 1 << 16 | 0x8001).error is None  # it can be asked again


def test_an_interrupted_request_is_resumed_by_who_made_it(bench: Bench) -> None:
    vm, other, sp = bench.vms[1], bench.vms[2], bench.sps[0x8001]
    request = Frame.of(REQ, 1 << 16 | 0x8001, 0, 7)
    sp.answers[:] = [Frame.of(Call.INTERRUPT), Frame.of(Call.YIELD), respond(request, 9)]
    assert vm.send(request) == Frame.of(Call.INTERRUPT, 0x8001 << 16)
    assert bench.spmc.served[0x8001].contexts[0] is Context.PREEMPTED
    assert other.call(REQ, 2 << 16 | 0x8001).error is Error.BUSY
    assert other.call(Call.RUN, 0x8001 << 16).error is Error.DENIED
    assert vm.call(Call.RUN, 0x8001 << 16) == Frame.of(Call.YIELD, 0x8001 << 16)
    assert vm.call(Call.RUN, 0x8001 << 16) == respond(request, 9)
    assert vm.call(Call.RUN, 0x8001 << 16).error is Error.DENIED  # nothing is interrupted
    assert bench.spmc.served[0x8001].contexts[0] is Context.WAITING


def test_vcpus_use_their_own_contexts(bench: Bench) -> None:
    vm, sp = bench.vms[1], bench.sps[0x8001]
    request = Frame.of(REQ, 1 << 16 | 0x8001)
    sp.answers[:] = [Frame.of(Call.INTERRUPT)]
    assert vm.send(request, vcpu=0).fid == fid(Call.INTERRUPT)
    assert vm.send(request, vcpu=1).fid == fid(Call.MSG_SEND_DIRECT_RESP)
    assert vm.send(request, vcpu=2).error is Error.BUSY  # two contexts: vCPU 2 shares the first
    assert vm.send(request, vcpu=77).error is Error.BUSY  # no such vCPU: as vCPU 0


def test_partitions_do_not_ask_in_circles(bench: Bench) -> None:
    seen: list[Frame] = []

    class Asks(Endpoint):
        def receive(self, frame: Frame, vcpu: int) -> Frame:
            seen.append(self.call(REQ, 0x8003 << 16 | 0x8001, vcpu=vcpu))
            seen.append(self.call(REQ, 0x8003 << 16 | 0x8002, vcpu=vcpu))
            return respond(frame)

    asks = Asks(0x8003, bench.machine)
    bench.spmc.add(asks)
    sp = bench.sps[0x8001]

    class First(type(sp)):  # type: ignore[misc]
        def receive(self, frame: Frame, vcpu: int) -> Frame:
            self.call(REQ, 0x8001 << 16 | 0x8003, vcpu=vcpu)
            return respond(frame)

    sp.__class__ = First
    assert bench.vms[1].call(REQ, 1 << 16 | 0x8001).fid == fid(Call.MSG_SEND_DIRECT_RESP)
    assert seen[0].error is Error.BUSY
    assert seen[1].fid == fid(Call.MSG_SEND_DIRECT_RESP)


def test_only_the_scheduler_runs_vms(bench: Bench) -> None:
    assert bench.vms[1].call(Call.RUN, 2 << 16).error is Error.DENIED
    bench.hypervisor.scheduler = 1
    assert bench.vms[1].call(Call.RUN, 2 << 16 | 3) == Frame.of(Call.MSG_WAIT, 2 << 16 | 3)
    assert bench.vms[1].call(Call.RUN, 2 << 16 | 4).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].call(Call.RUN, 1 << 16).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].call(Call.RUN, 0x8001 << 16) == Frame.of(Call.MSG_WAIT, 0x8001 << 16)


# -- indirect


@pytest.mark.parametrize(
    ("sender", "receiver"), [(1, 2), (2, 1), (1, 0x8001), (2, 0x8001), (0x8001, 1), (0x8001, 0x8002)]
)
def test_messages_arrive_in_the_receivers_layout(bench: Bench, sender: int, receiver: int) -> None:
    a, b = bench.all[sender], bench.all[receiver]
    a.put(messages.build_message(messages.Message(sender, receiver, b"hello"), a.version))
    assert a.call(Call.MSG_SEND2).ok
    version = VERSION_1_2 if receiver == 1 or receiver & 0x8000 or sender & 0x8000 else VERSION_1_1
    found = messages.parse_message(b.got(4096), version)
    assert (found.sender, found.receiver, found.payload) == (sender, receiver, b"hello")
    a.put(messages.build_message(messages.Message(sender, receiver, b"again"), a.version))
    assert a.call(Call.MSG_SEND2).error is Error.BUSY
    framework = 4 if sender & 0x8000 or receiver & 0x8000 else 8
    got = b.call(Call.NOTIFICATION_GET, receiver, framework)
    assert got[6 if framework == 4 else 7] == 1  # the RX buffer is full
    assert b.call(Call.RX_RELEASE).ok
    a.put(messages.build_message(messages.Message(sender, receiver, b"again"), a.version))
    assert a.call(Call.MSG_SEND2).ok


@pytest.mark.parametrize(
    ("message", "code"),
    [
        (messages.Message(2, 0x8001, b""), Error.INVALID_PARAMETERS),  # in another's name
        (messages.Message(1, 1, b""), Error.INVALID_PARAMETERS),
        (messages.Message(1, 9, b""), Error.INVALID_PARAMETERS),
        (messages.Message(1, 3, b""), Error.DENIED),  # FF-A 1.0 has none
        (messages.Message(1, 2, b"", UUID(int=9)), Error.INVALID_PARAMETERS),  # it has no such service
        (messages.Message(1, 0x8001, b"", UUID(int=9)), Error.INVALID_PARAMETERS),
        (messages.Message(1, 0x8001, bytes(4090)), Error.INVALID_PARAMETERS),
    ],
)
def test_messages_that_are_refused(bench: Bench, message: messages.Message, code: Error) -> None:
    vm = bench.vms[1]
    vm.put(messages.build_message(message, VERSION_1_2)[:4096])
    before = vm.machine.read(1, vm.tx, 4096)
    assert vm.call(Call.MSG_SEND2).error is code
    assert vm.machine.read(1, vm.tx, 4096) == before
    assert vm.call(Call.MSG_SEND2, 1 << 16).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.MSG_SEND2, 0, 2).error is Error.INVALID_PARAMETERS  # only partitions delay the interrupt


def test_messages_of_1_0(bench: Bench) -> None:
    other = Endpoint(4, bench.machine, version=0x10000)
    bench.hypervisor.add(other)
    bench.machine.add(4, 0x9000_0000, 16)
    other.map_buffers(0x9000_0000, 0x9000_1000)
    vm = bench.vms[3]
    vm.put(b"old")
    assert vm.call(Call.MSG_SEND, 3 << 16 | 4, 0, 3).ok
    assert vm.call(Call.MSG_SEND, 3 << 16 | 4, 0, 3).error is Error.BUSY
    assert other.call(Call.MSG_POLL) == Frame.of(Call.MSG_SEND, 3 << 16 | 4, 0, 3)
    assert other.got(3) == b"old"
    assert other.call(Call.MSG_POLL).error is Error.RETRY
    assert other.call(Call.RX_RELEASE).ok
    assert vm.call(Call.MSG_SEND, 3 << 16 | 1, 0, 3).error is Error.DENIED  # it has no FFA_MSG_POLL
    for w1, size in ((4 << 16 | 3, 3), (3 << 16 | 3, 3), (3 << 16 | 9, 3), (3 << 16 | 4, 5000)):
        assert vm.call(Call.MSG_SEND, w1, 0, size).error is Error.INVALID_PARAMETERS
    vm.put(b"new")
    assert vm.call(Call.MSG_SEND, 3 << 16 | 4, 0, 3).ok
    assert other.call(Call.MSG_WAIT).fid == fid(Call.MSG_SEND)


def test_waiting_releases_rx_unless_it_is_kept(bench: Bench) -> None:
    vm = bench.vms[1]
    for keep in (0, 1):
        assert vm.call(Call.PARTITION_INFO_GET).ok
        assert vm.call(Call.MSG_WAIT, 0, keep) == Frame.of(Call.INTERRUPT, 1 << 16)
        assert vm.call(Call.RX_RELEASE).ok is bool(keep)
    assert vm.call(Call.MSG_WAIT, 1).error is Error.INVALID_PARAMETERS
    assert bench.vms[2].call(Call.MSG_WAIT, 0, 1).error is Error.INVALID_PARAMETERS  # not in 1.1
