"""The TEE Client API, over the software TEE directly."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guest_driver.client import (
    REGISTER_FROM,
    CallError,
    CancelToken,
    Context,
    Empty,
    Null,
    Session,
    TempIn,
    TempInOut,
    TempOut,
    ValueIn,
    ValueInOut,
    ValueOut,
    Words,
)
from tee import package
from tee.calls import Client, Invoke, Login, RegisterMemory
from tee.io.runtime import Observation, TeeRuntime
from tee.io.supplicant import Supplicant
from tee.params import Direction, MemRef
from tee.results import Origin, Result, TeeError
from tee.soft import SoftTee, examples
from tee.soft.ta import UUID, Parameters, TrustedApplication

HELLO, PROBE, RANDOM = (examples.UUIDS[name] for name in ("hello_world", "probe", "random"))
IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT


class Who(TrustedApplication):
    """Tells its client."""

    uuid = UUID(int=42)
    clients: list[Client] = []  # noqa: RUF012

    async def open_session(self, params: Parameters, client: Client) -> None:
        Who.clients.append(client)
        if params:
            params.value(0, OUT).a = 7


@pytest.fixture
def seen() -> list[Observation]:
    return []


@pytest.fixture
def runtime(seen: list[Observation]) -> Iterator[TeeRuntime]:
    built_in = {**examples.built_in(), Who.uuid: Who}
    tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=built_in)
    with TeeRuntime(tee, None, seen.append) as runtime:
        yield runtime
    assert not any(tee.usage().values())


@pytest.fixture
def context(runtime: TeeRuntime) -> Iterator[Context]:
    with Context(runtime) as context:
        yield context


@pytest.fixture
def probe(context: Context) -> Iterator[Session]:
    with context.open_session(PROBE) as session:
        yield session


def test_hello_world(context: Context) -> None:
    with context.open_session(str(HELLO)) as session:
        assert session.answers == []
        assert session.invoke(0, ValueInOut(41), Empty(), Empty()) == [Words(42), None, None]
        with pytest.raises(CallError) as caught:
            session.invoke(0, ValueIn(1))
        assert (caught.value.code, caught.value.origin) == (Result.BAD_PARAMETERS, Origin.TRUSTED_APP)


def test_values(probe: Session) -> None:
    assert probe.invoke(1, ValueIn(2, 3), ValueOut(), ValueInOut(4, 5, 6)) == [None, Words(0, 0, 5), Words(4, 5, 9)]
    with pytest.raises(ValueError, match="64 bits"):
        ValueIn(1 << 64)


class TestTemporaryMemory:
    @pytest.mark.parametrize("size", [1, 100, REGISTER_FROM - 1, REGISTER_FROM, 100_000])
    def test_in_and_out(self, probe: Session, seen: list[Observation], size: int) -> None:
        data = bytearray(secrets.token_bytes(size))
        expected = bytes(byte ^ 0xFF for byte in data)
        assert probe.invoke(2, TempInOut(bytes(data)), ValueIn(0xFF)) == [expected, None]
        assert probe.invoke(2, TempInOut(data), ValueIn(0xFF)) == [expected, None]
        assert data == expected
        registered = [one for one in seen if one.kind == "done" and isinstance(one.subject, RegisterMemory)]
        assert len(registered) == (2 if size >= REGISTER_FROM else 0)
        call = next(one.subject for one in seen if isinstance(one.subject, Invoke))
        assert isinstance(call.params[0], MemRef)

    def test_out_in_place(self, context: Context) -> None:
        room = bytearray(50)
        with context.open_session(RANDOM) as session:
            assert session.invoke(0, TempOut(room)) == [bytes(room)]
            assert any(room)
            (answer,) = session.invoke(0, TempOut(0))
            assert answer == b""

    def test_an_input_is_not_an_answer(self, probe: Session) -> None:
        assert probe.invoke(0, TempIn(b"abc"), TempIn(b"")) == [None, None]

    @pytest.mark.parametrize("room", [10, REGISTER_FROM + 10])
    def test_sizes(self, probe: Session, room: int) -> None:
        assert probe.invoke(5, TempOut(room), ValueIn(4)) == [b"ZZZZ", None]
        with pytest.raises(CallError) as caught:
            probe.invoke(5, TempOut(room), ValueIn(room + 1))
        assert caught.value.code == Result.SHORT_BUFFER
        assert caught.value.sizes == [room + 1, None]
        assert caught.value.answers == [b"", None]

    def test_null(self, probe: Session) -> None:
        with pytest.raises(CallError) as caught:
            probe.invoke(5, Null(), ValueIn(9))
        assert (caught.value.sizes, caught.value.answers) == ([9, None], [9, None])


class TestSharedMemory:
    def test_allocated(self, context: Context, probe: Session) -> None:
        with context.allocate(10) as shared:
            shared.write(b"abcdefghij")
            assert probe.invoke(2, shared.part(INOUT, 2, 3), ValueIn(0x20)) == [3, None]
            assert shared.read() == b"abCDEfghij"
            assert probe.invoke(2, shared.whole(INOUT), ValueIn(0x20)) == [10, None]
            assert shared.read(2, 3) == b"cde"
            assert bytes(shared.view()[:2]) == b"AB"
            assert probe.invoke(0, shared.whole(IN)) == [None]
            with pytest.raises(CallError) as caught:
                probe.invoke(0, shared.part(IN, 5, 6))
            assert caught.value.code == Result.BAD_PARAMETERS
        with pytest.raises(TeeError) as closed:
            shared.whole(IN)
        assert (closed.value.code, closed.value.origin) == (Result.BAD_STATE, Origin.API)
        shared.close()

    def test_registered_in_place(self, context: Context, probe: Session) -> None:
        data = bytearray(b"abc")
        with context.register(data) as shared:
            probe.invoke(2, shared.whole(INOUT), ValueIn(0x20))
            assert data == b"ABC"
        data.extend(b"free again")  # a buffer that is in use cannot change its size

    def test_errors(self, runtime: TeeRuntime, context: Context, probe: Session) -> None:
        with pytest.raises(TeeError) as caught:
            context.allocate(0)
        assert (caught.value.code, caught.value.origin) == (Result.OUT_OF_MEMORY, Origin.API)
        with pytest.raises(TeeError) as caught:
            context.register(bytearray())
        assert caught.value.code == Result.BAD_PARAMETERS
        with Context(runtime) as other, other.allocate(5) as foreign, pytest.raises(TeeError) as caught:
            probe.invoke(0, foreign.whole(IN))
        assert (caught.value.code, caught.value.origin) == (Result.BAD_PARAMETERS, Origin.API)

    def test_seen_by_both_sides_during_a_call(self, context: Context, probe: Session) -> None:
        with context.allocate(4096) as shared:
            pending = probe.begin(8, shared.whole(INOUT), ValueInOut(150))
            time.sleep(0.03)
            shared.write(b"\x4d")
            assert pending.wait(10)[1] == Words(0, 0x4D, 0)


class TestCancel:
    def test_token(self, probe: Session) -> None:
        token = CancelToken()
        threading.Timer(0.02, token.cancel).start()
        with pytest.raises(CallError) as caught:
            probe.invoke(4, ValueIn(), cancel=token)
        assert (caught.value.code, caught.value.origin) == (Result.CANCEL, Origin.TRUSTED_APP)
        assert token.cancelled
        with pytest.raises(CallError) as caught:  # also what comes after
            probe.invoke(4, ValueIn(), cancel=token)
        assert caught.value.code == Result.CANCEL

    def test_pending(self, probe: Session) -> None:
        pending = probe.begin(4, ValueIn())
        with pytest.raises(TimeoutError):
            pending.wait(0.01)
        pending.cancel()
        for _ in range(2):
            with pytest.raises(CallError) as caught:
                pending.wait(10)
            assert caught.value.code == Result.CANCEL

    def test_unused_token(self, probe: Session) -> None:
        token = CancelToken()
        probe.invoke(0, cancel=token)
        token.cancel()


class TestSessions:
    def test_login_and_parameters(self, context: Context) -> None:
        Who.clients.clear()
        with context.open_session(Who.uuid, ValueOut(), login=Login.USER, client_uuid=UUID(int=5)) as session:
            assert session.answers == [Words(7)]
        assert Who.clients == [Client(Login.USER, UUID(int=5))]

    def test_refused(self, context: Context) -> None:
        with pytest.raises(CallError) as caught:
            context.open_session(PROBE, ValueIn(0x10000001))
        assert (caught.value.code, caught.value.origin) == (0x10000001, Origin.TRUSTED_APP)
        with pytest.raises(CallError) as caught:
            context.open_session(UUID(int=1))
        assert caught.value.code == Result.COMMUNICATION  # there is no supplicant to ask

    def test_panic(self, context: Context) -> None:
        with context.open_session(PROBE) as session:
            for command in (6, 0):
                with pytest.raises(CallError) as caught:
                    session.invoke(command)
                assert (caught.value.code, caught.value.origin) == (Result.TARGET_DEAD, Origin.TEE)

    def test_closed(self, context: Context) -> None:
        session = context.open_session(PROBE)
        session.close()
        session.close()
        with pytest.raises(TeeError) as caught:
            session.invoke(0)
        assert (caught.value.code, caught.value.origin) == (Result.BAD_STATE, Origin.API)

    def test_bad_command(self, probe: Session) -> None:
        with pytest.raises(TeeError) as caught:
            probe.invoke(1 << 32)
        assert caught.value.origin == Origin.API

    def test_closed_context(self, runtime: TeeRuntime) -> None:
        context = Context(runtime)
        session, shared = context.open_session(PROBE), context.allocate(5)
        context.close()
        context.close()
        session.close()
        shared.close()
        for act in (lambda: context.open_session(PROBE), lambda: context.allocate(5)):
            with pytest.raises(TeeError) as caught:
                act()
            assert (caught.value.code, caught.value.origin) == (Result.BAD_STATE, Origin.API)

    def test_closed_runtime(self) -> None:
        runtime = TeeRuntime(SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=examples.built_in()))
        context = Context(runtime)
        session, shared = context.open_session(PROBE), context.allocate(5)
        runtime.close()
        with pytest.raises(TeeError) as caught:
            session.invoke(0)
        assert (caught.value.code, caught.value.origin) == (Result.COMMUNICATION, Origin.API)
        shared.close()
        session.close()
        context.close()
        with pytest.raises(TeeError):
            Context(runtime)


def test_ta_from_the_supplicant(tmp_path: Path) -> None:
    keys = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
    (tmp_path / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 1, keys.private))
    tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes, keys=[keys.public])
    with TeeRuntime(tee, Supplicant([tmp_path])) as runtime, Context(runtime) as context:
        with context.open_session(HELLO) as session:
            assert session.invoke(1, ValueInOut(1)) == [Words(0)]
        with pytest.raises(CallError) as caught:
            context.open_session(PROBE)
        assert (caught.value.code, caught.value.origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)
