"""Who is asked for what a TEE wants, over real sockets."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from uuid import UUID

import pytest

from host_backend.broker.routes import Sole
from tee.courier import Answer, Ask, Ends, WireParam
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand
from tests.host_backend.broker.bench import NO_MEMORY, TA, bench, has, lacks, size_of, stalls

pytestmark = pytest.mark.started  # no device is here that could begin calls in two ways

OTHER = UUID("99992222-3333-4444-5555-666677778888")


def test_the_guest_that_opens_it_gives_the_ta(tmp_path: Path) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    with bench(tmp_path) as it:
        busy, opening = it.peer("a", has(b"another's")), it.peer("b", has(b"the opener's"))
        busy.opens(uuid=OTHER)
        opening.opens()
        assert size_of(it.ta_size()) == 12
        reply, data = it.ta(12)
        assert (reply.code, data) == (Result.SUCCESS, b"the opener's")
        assert [ask.call for ask in opening.asked] == [1, 1]
        assert not busy.asked
        assert it.routes.told == [("b", "guest: it opens that TA"), ("b", "guest: it has told its size")]
        assert it.broker.usage["ta pairs"] == 0


def test_then_others_with_calls_then_the_host(tmp_path: Path) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    with bench(tmp_path) as it:
        first, second = it.peer("a", lacks), it.peer("b", lacks)
        second.opens()
        first.opens(uuid=OTHER)
        assert size_of(it.ta_size()) == 10
        reply, data = it.ta(10)
        assert (reply.code, data) == (Result.SUCCESS, b"the host's")
        assert it.routes.told == [
            ("b", "guest: it opens that TA"),
            ("a", "guest: it has calls under way"),
            ("host", "host: no guest has it"),
            ("host", "host: the host's folder has told its size"),
        ]


def test_without_calls_under_way_nobody_is_asked(tmp_path: Path) -> None:
    with bench(tmp_path) as it:
        peer = it.peer("a", has(b"x"))
        peer.opens()
        peer.send(Ends(1))
        assert it.ta_size().code == Result.ITEM_NOT_FOUND
        assert not peer.asked


def test_a_call_is_known_before_it_enters_the_tee(tmp_path: Path) -> None:
    """However soon after BEGINS the TEE asks."""
    with bench(tmp_path) as it:
        peer = it.peer("a", has(b"now"))
        for call in range(200):
            peer.opens(call)
            assert size_of(it.ta_size()) == 3
            peer.send(Ends(call))


def test_who_has_told_the_size_gives_the_bytes(tmp_path: Path) -> None:
    """Two guests open TAs of the same UUID with different content: no pair mixes them."""
    with bench(tmp_path) as it:
        a, b = it.peer("a", has(b"a's")), it.peer("b", has(b"b's, longer"))
        a.opens()
        assert size_of(it.ta_size()) == 3
        a.send(Ends(1))
        b.opens()
        assert size_of(it.ta_size()) == 11
        a.opens(2)
        assert it.ta(3)[1] == b"a's"
        assert it.ta(11)[1] == b"b's, longer"


def test_one_that_stalls_costs_no_more_than_its_time(tmp_path: Path) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    with bench(tmp_path, guest_s=0.1) as it:
        peer = it.peer("a", stalls)
        peer.opens()
        assert size_of(it.ta_size()) == 10
        assert it.routes.ended[0] == ("nobody: no answer in time", Result.COMMUNICATION)
        # Its answer comes late, when nobody waits: that is no lie.
        while not peer.withdrawn:
            time.sleep(0.001)
        peer.send(Answer(peer.withdrawn[0], Result.ITEM_NOT_FOUND))
        assert size_of(it.ta_size()) == 10
        assert not peer.gone.is_set()


def test_all_together_cost_no_more_than_the_deadline(tmp_path: Path) -> None:
    with bench(tmp_path, guest_s=30.0, deadline_s=1.0) as it:
        it.peer("a", stalls).opens()
        assert it.ta_size().code == Result.COMMUNICATION
        it.peer("b", has(b"later")).opens(uuid=OTHER)
        # ... and the broker goes on.
        it.peers[0].close()
        assert size_of(it.ta_size()) == 5


@pytest.mark.parametrize(
    "answer",
    [
        lambda ask: Answer(ask.ask + 1000, Result.SUCCESS),
        lambda ask: Answer(ask.ask, Result.SUCCESS),
        lambda ask: Answer(ask.ask, Result.SUCCESS, [WireParam(1), WireParam(5, 0, 4)]),
        lambda ask: Answer(ask.ask, Result.SUCCESS, [WireParam(1), WireParam(6, 0, 5, content=b"12345")]),
        lambda ask: Answer(ask.ask, Result.SUCCESS, [WireParam(1), WireParam(6, 0, 2, content=b"1234")]),
        lambda ask: Ask(1, 1, 0),
    ],
    ids=["unknown", "no-params", "other-kind", "too-large", "more-content", "a-question"],
)
def test_a_backend_that_lies_is_disconnected(tmp_path: Path, answer) -> None:  # type: ignore[no-untyped-def]
    """The TEE's memory stays as it was, and the host answers."""
    (tmp_path / f"{TA}.ta").write_bytes(b"host")
    with bench(tmp_path) as it:
        peer = it.peer("a", answer)
        peer.opens()
        memory = Memory.of(bytearray(b"...."))
        name, room = Value(Direction.IN, *_words(TA)), MemRef(Direction.OUT, memory, 0, 4)
        reply = it.broker.serve(Rpc(RpcCommand.LOAD_TA, [name, room]), NO_MEMORY)
        assert (reply.code, memory.read(0, 4)) == (Result.SUCCESS, b"host")
        assert peer.gone.wait(10)
        assert it.broker.usage["backends"] == 0
        assert it.broker.usage["calls"] == 0


def test_answering_twice_disconnects(tmp_path: Path) -> None:
    with bench(tmp_path) as it:
        peer = it.peer("a", has(b"x"))
        peer.opens()
        assert size_of(it.ta_size()) == 1
        peer.send(Answer(peer.asked[0].ask, Result.SUCCESS))
        assert peer.gone.wait(10)


def test_a_backend_that_dies_while_it_is_asked(tmp_path: Path) -> None:
    (tmp_path / f"{TA}.ta").write_bytes(b"the host's")
    with bench(tmp_path, guest_s=30.0) as it:
        peer = it.peer("a", stalls)
        peer.opens()
        threading.Thread(target=lambda: (_until(lambda: peer.asked), peer.socket.shutdown(2))).start()
        assert size_of(it.ta_size()) == 10
        assert it.broker.usage["calls"] == 0


def test_files_are_the_hosts(tmp_path: Path) -> None:
    """Also where a guest would answer."""
    with bench(tmp_path) as it:
        it.peer("a", lacks).opens()
        assert it.broker.serve(Rpc(RpcCommand.FS, [Value(Direction.IN, 0)]), NO_MEMORY).code != Result.ITEM_NOT_FOUND
        assert not it.peers[0].asked
    with bench(tmp_path, fs_vm="a") as it:
        it.peer("a", lacks).opens()
        assert it.broker.serve(Rpc(RpcCommand.FS, [Value(Direction.IN, 0)]), NO_MEMORY).code == Result.ITEM_NOT_FOUND


def socket_open(instance: int) -> Rpc:
    return Rpc(
        RpcCommand.SOCKET,
        [Value(Direction.IN, 0, instance), Value(Direction.IN, 80, 0x65), Value(Direction.OUT)],
    )


def gives(handle: int):  # type: ignore[no-untyped-def]
    def script(ask: Ask) -> Answer:
        params = [WireParam(p.kind, p.flags, p.a, p.b, p.c) for p in ask.params]
        if ask.params[0].a == 0:
            params[2].a = handle
        return Answer(ask.ask, Result.SUCCESS, params)

    return script


def test_handles_stay_with_who_gave_them(tmp_path: Path) -> None:
    with bench(tmp_path) as it:
        a, b = it.peer("a", gives(7)), it.peer("b", gives(7))
        numbers = []
        for peer in (a, b):
            peer.opens()
            reply = it.broker.serve(socket_open(5), NO_MEMORY)
            assert isinstance(reply.params[2], Value)
            numbers.append(reply.params[2].a)
            peer.send(Ends(1))
            _until(lambda: it.broker.usage["calls"] == 0)
        assert numbers[0] != numbers[1]
        a.opens(2)
        b.opens(2)
        for peer, number in ((b, numbers[1]), (a, numbers[0])):
            before = len(peer.asked)
            close = Rpc(RpcCommand.SOCKET, [Value(Direction.IN, 1, 5, number)])
            assert it.broker.serve(close, NO_MEMORY).code == Result.SUCCESS
            assert len(peer.asked) == before + 1
            assert peer.asked[-1].params[0].c == 7
            again = it.broker.serve(close, NO_MEMORY)
            assert again.code == Result.BAD_PARAMETERS
        assert it.broker.usage["handles"] == 0
        # With two guests at work nobody can tell whose a new one would be.
        assert it.broker.serve(socket_open(5), NO_MEMORY).code == Result.NOT_SUPPORTED


def test_another_instance_cannot_name_a_handle(tmp_path: Path) -> None:
    with bench(tmp_path) as it:
        it.peer("a", gives(7)).opens()
        reply = it.broker.serve(socket_open(5), NO_MEMORY)
        number = reply.params[2].a  # type: ignore[union-attr]
        foreign = Rpc(RpcCommand.SOCKET, [Value(Direction.IN, 1, 6, number)])
        assert it.broker.serve(foreign, NO_MEMORY).code == Result.BAD_PARAMETERS
        close_all = Rpc(RpcCommand.SOCKET, [Value(Direction.IN, 2, 5)])
        assert it.broker.serve(close_all, NO_MEMORY).code == Result.SUCCESS
        assert it.broker.usage["handles"] == 0


@pytest.mark.parametrize(("sole", "code"), [(Sole.NOBODY, Result.NOT_SUPPORTED), (Sole.HOST, Result.NOT_SUPPORTED)])
def test_plugins_as_configured(tmp_path: Path, sole: Sole, code: int) -> None:
    with bench(tmp_path, sole=sole) as it:
        it.peer("a", gives(1)).opens()
        assert it.broker.serve(Rpc(RpcCommand.PLUGIN, [Value(Direction.IN)]), NO_MEMORY).code == code
        assert not it.peers[0].asked
        assert ("host: as configured" in [route for _, route in it.routes.told]) == (sole is Sole.HOST)


def test_when_the_broker_ends_the_tee_is_answered(tmp_path: Path) -> None:
    with bench(tmp_path, guest_s=30.0, deadline_s=30.0) as it:
        peer = it.peer("a", stalls)
        peer.opens()
        replies: list[int] = []
        asking = threading.Thread(target=lambda: replies.append(it.ta_size().code))
        asking.start()
        _until(lambda: peer.asked)
        it.end()
        asking.join(10)
        assert replies == [Result.COMMUNICATION]
        assert it.ta_size().code == Result.COMMUNICATION


def _words(uuid: UUID) -> tuple[int, int]:
    return int.from_bytes(uuid.bytes[:8], "little"), int.from_bytes(uuid.bytes[8:], "little")


def _until(condition) -> None:  # type: ignore[no-untyped-def]
    for _ in range(5000):
        if condition():
            return
        time.sleep(0.002)
    raise AssertionError("it did not happen")
