"""Direct and indirect messaging."""

from __future__ import annotations

from uuid import UUID

from ffa.abi import messages
from ffa.abi.frame import Frame
from ffa.abi.ids import DIRECT_FRAMEWORK_BIT, GET_FROM_HYP, GET_FROM_SPM, RX_FULL, Call, Error, fid, is_secure
from ffa.conformance.bench import MUTE, NOBODY, SPS, Server
from ffa.conformance.registry import DIRECT, INDIRECT, case
from ffa.conformance.run import PAIRS, Run
from ffa.roles.endpoint import respond

REQ, REQ2, RESP, RESP2 = (
    *(Call.MSG_SEND_DIRECT_REQ, Call.MSG_SEND_DIRECT_REQ2),
    *(Call.MSG_SEND_DIRECT_RESP, Call.MSG_SEND_DIRECT_RESP2),
)


def _does_not_wait(t: Run, server: Server, request: Frame) -> None:
    """Who works on a request cannot wait for the next before it has answered."""
    found: list[Frame] = []

    def waits(frame: Frame) -> Frame:
        found.append(server.call(Call.MSG_WAIT))
        return respond(frame, 8)

    server.answers.append(waits)
    answer = t.endpoint(request[1] >> 16).send(request)
    t.equal(answer, respond(request, 8), f"{server.id:#x} answers")
    t.fails(found[0], Error.DENIED, "before that, it waits for another message")


def _direct(t: Run, smc64: bool) -> None:
    for sender, receiver in (*PAIRS, (5, SPS[0]), (4, 2)):
        words = tuple((0xA5A5_0000_0000 if smc64 else 0) + n for n in range(1, 6))
        server = t.endpoint(receiver)
        request = Frame.of(REQ, sender << 16 | receiver, 0, *words, smc64=smc64)
        server.answers.append(respond(request, *reversed(words)))
        answer = t.is_call(t.endpoint(sender).send(request), RESP, f"{sender:#x} asks {receiver:#x}", smc64)
        t.equal(server.asked[-1][:8], request[:8], "the receiver gets the request as it is")
        t.equal(answer[1:3], (receiver << 16 | sender, 0), "the answer is from the receiver, for the sender")
        t.equal(answer[3:8], tuple(reversed(words)), "the sender gets the answer as it is")
        t.equal(answer[8:], (0,) * 10, "no other register is told")
        asked = len(server.asked)
        for what, w1, w2 in (
            ("in another's name", receiver << 16 | sender, 0),
            ("to itself", sender << 16 | sender, 0),
            ("to nobody", sender << 16 | (NOBODY | receiver & 0x8000), 0),
            ("a framework message", sender << 16 | receiver, DIRECT_FRAMEWORK_BIT),
            ("w2 is not zero", sender << 16 | receiver, 1),
        ):
            t.fails(t.call(sender, REQ, w1, w2, smc64=smc64), Error.INVALID_PARAMETERS, what)
        t.equal(len(server.asked), asked, "none of these reaches the receiver")
        _does_not_wait(t, server, request)


@case(DIRECT)
def ffa_direct_message_32(t: Run) -> None:
    _direct(t, smc64=False)


@case(DIRECT)
def ffa_direct_message_64(t: Run) -> None:
    _direct(t, smc64=True)


@case(DIRECT)
def ffa_direct_message2(t: Run) -> None:
    for sender, receiver in PAIRS:
        for call in (REQ2, RESP2):
            t.ok(t.call(sender, Call.FEATURES, fid(call)), f"{sender:#x} is told of FFA_{call.name}")
        uuid = messages.uuid_to_halves(UUID(int=receiver))
        words = tuple(1 << 63 | n for n in range(14))
        server = t.endpoint(receiver)
        reply = Frame.of(RESP2, receiver << 16 | sender, 0, 0, *reversed(words))
        for service in (uuid, (0, 0)):
            server.answers.append(reply)
            answer = t.call(sender, REQ2, sender << 16 | receiver, *service, *words)
            t.equal(server.asked[-1][4:], words, "x4 to x17 reach the receiver")
            t.equal(answer, reply, "and come back")
        _does_not_wait(t, server, Frame.of(REQ2, sender << 16 | receiver, *uuid, *words))
        other = messages.uuid_to_halves(UUID(int=0xBAD))
        t.fails(
            t.call(sender, REQ2, sender << 16 | receiver, *other), Error.INVALID_PARAMETERS, "no such service there"
        )
        for what, w1 in (
            ("in another's name", receiver << 16 | sender),
            ("to itself", sender << 16 | sender),
            ("to nobody", sender << 16 | (NOBODY | receiver & 0x8000)),
        ):
            t.fails(t.call(sender, REQ2, w1, *uuid), Error.INVALID_PARAMETERS, what)
    t.fails(t.call(4, REQ2, 4 << 16 | 1), Error.NOT_SUPPORTED, "a 1.1 caller has no DIRECT_REQ2")
    t.fails(t.call(1, REQ2, 1 << 16 | 4), Error.INVALID_PARAMETERS, "nor does a 1.1 receiver")


@case(DIRECT)
def ffa_direct_message_error(t: Run) -> None:
    for call in (REQ, REQ2):
        t.fails(t.call(1, call, 1 << 16 | MUTE), Error.DENIED, f"a receiver that takes no FFA_{call.name}")
    t.equal(t.endpoint(MUTE).asked, [], "it is not run")


@case(DIRECT)
def ffa_direct_message_error1(t: Run) -> None:
    for receiver in (1, SPS[0]):
        for call in (REQ, REQ2):
            t.fails(t.call(MUTE, call, MUTE << 16 | receiver), Error.DENIED, f"a sender that may not FFA_{call.name}")
        t.equal(t.endpoint(receiver).asked, [], "the receiver is not run")
    for id in (1, SPS[0]):
        t.refused(t.call(id, RESP, id << 16 | 2), "a response that nobody waits for")


@case(DIRECT)
def ffa_direct_message_error2(t: Run) -> None:
    for sp in SPS:
        t.fails(t.call(sp, REQ, sp << 16 | 1), Error.INVALID_PARAMETERS, f"partition {sp:#x} asks a VM")
    t.equal(t.endpoint(1).asked, [], "the VM is not run")
    first, second = t.endpoint(SPS[0]), t.endpoint(SPS[1])
    found: list[Frame] = []

    def asks_back(frame: Frame) -> Frame:
        found.append(second.call(REQ, SPS[1] << 16 | SPS[0], smc64=True))
        return respond(frame, 5)

    first.answers.append(lambda frame: respond(frame, first.call(REQ, SPS[0] << 16 | SPS[1])[3]))
    second.answers.append(asks_back)
    t.equal(t.call(1, REQ, 1 << 16 | SPS[0])[3], 5, "a chain of requests is answered")
    t.fails(found[0], Error.BUSY, "in it, a partition asks who waits for its answer")


@case(DIRECT)
def direct_msg_sp_to_vm(t: Run) -> None:
    sp, found = t.endpoint(SPS[0]), []

    def asks_back(frame: Frame) -> Frame:
        found.append(sp.call(REQ, SPS[0] << 16 | 1))
        return respond(frame, 1)

    sp.answers.append(asks_back)
    answer = t.call(1, REQ, 1 << 16 | SPS[0])
    t.is_call(answer, RESP, "the request of the VM is answered")
    t.fails(found[0], Error.INVALID_PARAMETERS, "in it, the partition asks the VM")
    t.refused(t.call(1, RESP, 1 << 16 | SPS[0]), "the VM answers a partition that has asked nothing")


@case(DIRECT)
def ffa_run_direct_req(t: Run) -> None:
    first, second = t.endpoint(SPS[0]), t.endpoint(SPS[1])
    found: list[Frame] = []

    def runs_another(frame: Frame) -> Frame:
        found.append(second.call(Call.RUN, SPS[2] << 16))
        found.append(second.call(REQ, SPS[1] << 16 | SPS[0]))
        return respond(frame, 2)

    def asks_second(frame: Frame) -> Frame:
        return respond(frame, first.call(REQ, SPS[0] << 16 | SPS[1])[3])

    first.answers.append(asks_second)
    second.answers.append(runs_another)
    answer = t.call(1, REQ, 1 << 16 | SPS[0])
    t.equal((answer.fid, answer[3]), (fid(RESP), 2), "a chain of requests is answered")
    t.fails(found[0], Error.DENIED, "in it, a partition runs another")
    t.fails(found[1], Error.BUSY, "in it, a partition asks back")


@case(INDIRECT)
def ffa_msg_send(t: Run) -> None:
    one, other = t.endpoint(5), t.endpoint(6)
    one.put(b"payload")
    t.fails(other.call(Call.MSG_POLL), Error.RETRY, "there is no message yet")
    t.ok(one.call(Call.MSG_SEND, 5 << 16 | 6, 0, 7), "a 1.0 VM sends")
    t.equal(other.call(Call.MSG_POLL), Frame.of(Call.MSG_SEND, 5 << 16 | 6, 0, 7), "the other polls")
    t.equal(other.got(7), b"payload", "the message is in RX")
    one.put(b"payload")
    t.fails(one.call(Call.MSG_SEND, 5 << 16 | 6, 0, 7), Error.BUSY, "RX is not released")
    t.ok(other.call(Call.RX_RELEASE), "releases RX")
    t.ok(one.call(Call.MSG_SEND, 5 << 16 | 6, 0, 7), "sends again")
    t.is_call(other.call(Call.MSG_WAIT), Call.MSG_SEND, "the other waits, and has it")
    t.ok(one.call(Call.YIELD), "yields")


@case(INDIRECT)
def ffa_msg_send_error(t: Run) -> None:
    vm = t.endpoint(5)
    for what, w1, size in (
        ("in another's name", 6 << 16 | 5, 4),
        ("to itself", 5 << 16 | 5, 4),
        ("to nobody", 5 << 16 | NOBODY, 4),
        ("longer than TX", 5 << 16 | 6, 4097),
    ):
        t.fails(vm.call(Call.MSG_SEND, w1, 0, size), Error.INVALID_PARAMETERS, what)
    t.fails(vm.call(Call.MSG_SEND, 5 << 16 | 1, 0, 4), Error.DENIED, "the receiver is of 1.2")
    t.fails(t.call(1, Call.MSG_SEND, 1 << 16 | 5, 0, 4), Error.NOT_SUPPORTED, "a 1.2 caller has no FFA_MSG_SEND")
    t.fails(t.call(1, Call.MSG_POLL), Error.NOT_SUPPORTED, "nor FFA_MSG_POLL")


@case(INDIRECT)
def ffa_run(t: Run) -> None:
    sp = t.endpoint(SPS[0])
    request = Frame.of(REQ, 1 << 16 | SPS[0], 0, 3)
    t.refused(t.call(1, Call.RUN, SPS[0] << 16), "nothing to resume")
    sp.answers[:] = [Frame.of(Call.YIELD), Frame.of(Call.YIELD), respond(request, 4)]
    t.equal(t.endpoint(1).send(request), Frame.of(Call.YIELD, SPS[0] << 16), "the partition yields")
    t.fails(t.endpoint(2).call(REQ, 2 << 16 | SPS[0]), Error.BUSY, "it is busy")
    t.refused(t.call(2, Call.RUN, SPS[0] << 16), "another resumes it")
    for what, target in (
        ("a context that it does not have", SPS[0] << 16 | 9),
        ("a partition that is not there", (0x8000 | NOBODY) << 16),
    ):
        t.fails(t.call(1, Call.RUN, target), Error.INVALID_PARAMETERS, what)
    t.is_call(t.call(1, Call.RUN, SPS[0] << 16), Call.YIELD, "resumed, it yields again")
    t.equal(t.call(1, Call.RUN, SPS[0] << 16), respond(request, 4), "resumed, it answers")
    t.refused(t.call(1, Call.RUN, SPS[0] << 16), "it has answered")
    t.fails(t.call(SPS[0], Call.RUN, SPS[1] << 16), Error.DENIED, "partitions run nobody")


def _message(t: Run, sender: int, receiver: int, payload: bytes = b"hello", **fields: UUID) -> Frame:
    found = messages.build_message(messages.Message(sender, receiver, payload, **fields), t.endpoint(sender).version)
    t.endpoint(sender).put(found[:4096])
    return t.call(sender, Call.MSG_SEND2)


def _send2(t: Run, *pairs: tuple[int, int]) -> None:
    for sender, receiver in pairs:
        to = t.endpoint(receiver)
        t.ok(_message(t, sender, receiver), f"{sender:#x} sends to {receiver:#x}")
        found = messages.parse_message(to.got(4096), to.version)
        t.equal((found.sender, found.receiver, found.payload), (sender, receiver, b"hello"), "it is in RX")
        framework = GET_FROM_SPM if is_secure(sender) or is_secure(receiver) else GET_FROM_HYP
        got = t.ok(to.call(Call.NOTIFICATION_GET, receiver, framework), "asks for framework notifications")
        t.equal(got[6 if framework == GET_FROM_SPM else 7], RX_FULL, "RX is full, the receiver is told")
        t.fails(_message(t, sender, receiver), Error.BUSY, "RX is not released")
        t.ok(to.call(Call.RX_RELEASE), "releases RX")
        for what, wrong in (
            ("in another's name", messages.Message(receiver, sender, b"")),
            ("to itself", messages.Message(sender, sender, b"")),
            ("to nobody", messages.Message(sender, NOBODY | receiver & 0x8000, b"")),
            ("longer than TX", messages.Message(sender, receiver, bytes(4090))),
        ):
            t.endpoint(sender).put(messages.build_message(wrong, t.endpoint(sender).version)[:4096])
            t.fails(t.call(sender, Call.MSG_SEND2), Error.INVALID_PARAMETERS, what)
        t.fails(t.call(sender, Call.MSG_SEND2, receiver), Error.INVALID_PARAMETERS, "w1 must be zero")
        t.fails(t.call(sender, Call.MSG_SEND2, 0, 4), Error.INVALID_PARAMETERS, "reserved flags")


@case(INDIRECT)
def ffa_msg_send2(t: Run) -> None:
    _send2(t, (1, SPS[0]), (1, 2), (MUTE, SPS[1]))
    t.fails(_message(t, 1, 5), Error.DENIED, "a 1.0 receiver has no FFA_MSG_SEND2")
    t.fails(t.call(1, Call.MSG_SEND2, 0, 2), Error.INVALID_PARAMETERS, "only partitions delay the interrupt")


@case(INDIRECT)
def ffa_msg_send2_sp(t: Run) -> None:
    _send2(t, (SPS[0], SPS[1]), (SPS[1], 1))
    t.endpoint(SPS[0]).put(messages.build_message(messages.Message(SPS[0], SPS[1], b"x"), t.endpoint(1).version))
    t.ok(t.call(SPS[0], Call.MSG_SEND2, 0, 2), "a partition delays the interrupt")


@case(INDIRECT)
def ffa_msg_send2_uuid_check(t: Run) -> None:
    for sender, receiver in PAIRS:
        wrong = UUID(int=0xBAD)
        t.fails(_message(t, sender, receiver, uuid=wrong), Error.INVALID_PARAMETERS, "no such service there")
        t.ok(_message(t, sender, receiver, uuid=UUID(int=receiver)), "its own service")
        found = messages.parse_message(t.endpoint(receiver).got(4096), t.endpoint(receiver).version)
        t.equal(found.uuid, UUID(int=receiver), "the receiver is told which")
        t.ok(t.call(receiver, Call.RX_RELEASE), "releases RX")
