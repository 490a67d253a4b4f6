"""TAs that call their client, on each path; and all the ways in which that ends badly."""

from __future__ import annotations

import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from device.config import Limits
from ffa.optee.client import FfaTeeDriver
from guest_driver.client import (
    CallError,
    CancelToken,
    Context,
    Session,
    TempInOut,
    ValueIn,
    ValueInOut,
    ValueOut,
    Words,
)
from guest_driver.ocalls import Ocall
from tee.driver import TeeDriver
from tee.io.runtime import TeeRuntime
from tee.params import Direction
from tee.results import Origin, Result, TeeError
from tee.rpc import GRPC_UUID
from tee.soft import SoftTee, examples
from tests.guest_driver.live import live, over_ffa
from virtio_tee.ffa_vm import ffa_driver

OCALL, PROBE = examples.UUIDS["ocall"], examples.UUIDS["probe"]
CALL, LEND, GRPC, MANY, CANCEL, TIMED = range(6)
INOUT = Direction.INOUT
BACKENDS = {"virtio": None, "virtio-ffa": over_ffa}  # how theirs reaches the software TEE
PATHS = ["direct", "ffa", *BACKENDS]


class Machine:
    """A TEE of so many threads, and the way to it: none, the virtio device, OP-TEE's partition, or both of these."""

    def __init__(self, path: str, folder: Path, threads: int = 4) -> None:
        self._stack = ExitStack()
        driver: TeeDriver
        if path in BACKENDS:
            limits = Limits(rpc_deadline_ms=5000)
            device = self._stack.enter_context(live(folder, limits, threads=threads, reached=BACKENDS[path]))
            self.tee = device.tee
            driver = device.driver()
            self._stack.callback(driver.close)
        elif path == "ffa":
            self.tee = SoftTee(
                clock=time.monotonic, random=secrets.token_bytes, built_in=examples.built_in(), threads=threads
            )
            driver = ffa_driver(self.tee, client_s=1.0)
            self._stack.callback(driver.close)
        else:
            self.tee = driver = SoftTee(
                clock=time.monotonic, random=secrets.token_bytes, built_in=examples.built_in(), threads=threads
            )
        self.driver = driver
        self.runtime = self._stack.enter_context(TeeRuntime(driver))

    def close(self) -> None:
        """Nothing is left anywhere. What a handler's thread has asked for may still be on its way."""
        for _ in range(600):
            if not any(self.driver.usage().values()):
                break
            time.sleep(0.005)
        self.runtime.close()
        assert not any(self.driver.usage().values()), self.driver.usage()
        self._stack.close()
        usage = self.tee.usage()
        if isinstance(self.driver, FfaTeeDriver):  # the VM's own context stays as long as the VM
            assert usage.pop("contexts") == 1
        assert not any(usage.values()), usage


@pytest.fixture(params=PATHS)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[..., Machine]]:
    made: list[Machine] = []

    def machine(threads: int = 4) -> Machine:
        made.append(Machine(request.param, tmp_path, threads))
        return made[-1]

    yield machine
    for one in made:
        one.close()


@pytest.fixture
def context(make: Callable[..., Machine]) -> Iterator[Context]:
    with Context(make().runtime) as context:
        yield context


@pytest.fixture
def session(context: Context) -> Iterator[Session]:
    with context.open_session(OCALL) as session:
        yield session


def add(ocall: Ocall) -> None:
    """Function 7: c = a + b of parameter 0."""
    if ocall.function != 7:
        raise TeeError(Result.NOT_SUPPORTED)
    value = ocall.value(0)
    value.c = value.a + value.b


@pytest.mark.feature("OCALL: a TA calls its client, during invoke and open session")
def test_values(session: Session) -> None:
    answers = session.invoke(CALL, ValueInOut(7), ValueInOut(20, 22), ocalls=add)
    assert answers == [Words(7, Result.SUCCESS, 0), Words(20, 22, 42)]
    answers = session.invoke(CALL, ValueInOut(8), ValueInOut(20, 22), ocalls=add)
    assert answers == [Words(8, Result.NOT_SUPPORTED, 0), Words(20, 22, 0)]


def test_directions(session: Session) -> None:
    """What the client may only read it cannot change, whatever it does."""

    def handler(ocall: Ocall) -> None:
        ocall.value(0).a, ocall.value(1).a = 99, 98

    answers = session.invoke(CALL, ValueInOut(1), ValueIn(5), ValueOut(), ocalls=handler)
    assert answers == [Words(1), None, Words(98)]


def test_during_open_session(context: Context) -> None:
    with context.open_session(OCALL, ValueInOut(7), ValueInOut(1, 2), ocalls=add) as session:
        assert session.answers == [Words(7, Result.SUCCESS), Words(1, 2, 3)]
    with pytest.raises(CallError) as refused:
        context.open_session(OCALL, ValueInOut(7), ValueInOut(1, 2))
    assert refused.value.code == Result.NOT_SUPPORTED


def test_memory_that_the_client_gives(session: Session) -> None:
    def handler(ocall: Ocall) -> None:
        memory = ocall.memory(0)
        assert memory.read() == bytes(at & 0xFF for at in range(5000))
        memory.write(b"\1" * 5000)

    (words,) = session.invoke(LEND, ValueInOut(1, 5000), ocalls=handler)
    assert words == Words(1, Result.SUCCESS, 5000)


def test_memory_that_is_registered(context: Context, session: Session) -> None:
    """In place: what the handler writes is in the client's own memory, and the TA has it at once."""
    with context.allocate(8192) as shared:
        shared.write(b"from the client")

        def handler(ocall: Ocall) -> None:
            assert ocall.memory(0).read(0, 15) == b"from the client"
            ocall.memory(0).write(b"by the handler!")
            assert shared.read(0, 15) == b"by the handler!"

        session.invoke(CALL, ValueInOut(1), shared.whole(INOUT), ocalls=handler)
        assert shared.read(0, 15) == b"by the handler!"
        # A part of it is a part.
        seen: list[int] = []
        part = shared.part(INOUT, 100, 50)
        session.invoke(CALL, ValueInOut(1), part, ocalls=lambda o: seen.append(o.memory(0).capacity))
        assert seen == [50]


def test_temporary_memory(session: Session) -> None:
    """Is registered for the call, so that the TA can name it."""
    data = bytearray(b"hello")
    answers = session.invoke(CALL, ValueInOut(1), TempInOut(data), ocalls=lambda o: o.memory(0).write(b"J"))
    assert answers[1] == b"Jello"
    assert data == b"Jello"


@pytest.mark.requirement("DRV-OCA-2")
@pytest.mark.fault("ocall-no-handler")
def test_without_a_handler(session: Session) -> None:
    for command in (CALL, LEND, GRPC):
        with pytest.raises(CallError) as refused:
            session.invoke(command, ValueInOut(1, 16))
        assert refused.value.code == Result.NOT_SUPPORTED


@pytest.mark.feature("generic RPC: the pseudo-TA by which TAs reach their client")
def test_generic_rpc(context: Context, session: Session) -> None:
    answers = session.invoke(GRPC, ValueInOut(7), ValueInOut(40, 2), ocalls=add)
    assert answers == [Words(7), Words(40, 2, 42)]
    with pytest.raises(CallError) as failed:
        session.invoke(GRPC, ValueInOut(8), ocalls=lambda _: 0x1234)
    assert (failed.value.code, failed.value.origin) == (0x1234, Origin.TRUSTED_APP)
    with context.allocate(4096) as shared:
        session.invoke(GRPC, ValueInOut(1), shared.whole(INOUT), ocalls=lambda o: o.memory(0).write(b"here"))
        assert shared.read(0, 4) == b"here"
    with pytest.raises(CallError) as refused:
        context.open_session(GRPC_UUID)
    assert refused.value.code == Result.ACCESS_DENIED


def test_what_a_handler_ends_with(session: Session) -> None:
    def fails(ocall: Ocall) -> None:
        raise TeeError(Result.ACCESS_CONFLICT)

    def breaks(ocall: Ocall) -> None:
        raise ZeroDivisionError

    for handler, code in (
        (fails, Result.ACCESS_CONFLICT),
        (breaks, Result.GENERIC),
        (lambda _: 0x12345678, 0x12345678),
    ):
        assert session.invoke(CALL, ValueInOut(1), ocalls=handler) == [Words(1, code)]


def test_a_short_buffer(context: Context, session: Session) -> None:
    with context.allocate(16) as shared:
        with pytest.raises(CallError) as short:
            session.invoke(CALL, ValueInOut(1), shared.whole(INOUT), ocalls=lambda o: o.memory(0).put(bytes(17)))
        assert (short.value.code, short.value.sizes) == (Result.SHORT_BUFFER, [None, 17])


def test_many(session: Session) -> None:
    numbers: list[int] = []

    def handler(ocall: Ocall) -> int:
        numbers.append(ocall.value(0).a)
        return 2

    assert session.invoke(MANY, ValueInOut(1, 100), ocalls=handler) == [Words(1, 100, 200)]
    assert numbers == list(range(100))


def test_several_at_once(context: Context) -> None:
    """Four calls wait in their handlers together, and are answered in another order."""
    entered = threading.Barrier(4)
    order: list[int] = []
    turns = [threading.Event() for _ in range(5)]
    turns[4].set()

    def handler(ocall: Ocall) -> None:
        entered.wait(10)
        assert turns[ocall.function + 1].wait(10)
        order.append(ocall.function)
        turns[ocall.function].set()

    sessions = [context.open_session(OCALL) for _ in range(4)]
    pending = [s.begin(CALL, ValueInOut(i), ocalls=handler) for i, s in enumerate(sessions)]
    for one in pending:
        one.wait(10)
    assert order == [3, 2, 1, 0]


def test_the_handler_calls_the_tee(context: Context, session: Session) -> None:
    results: list[object] = []

    def handler(ocall: Ocall) -> None:
        with context.open_session(PROBE) as probe:
            results.append(probe.invoke(1, ValueIn(1), ValueOut(), ValueInOut(2, 3))[2])
        with context.open_session(OCALL) as other:
            results.append(other.invoke(CALL, ValueInOut(7), ValueInOut(1, 1), ocalls=add)[1])

    session.invoke(CALL, ValueInOut(1), ocalls=handler)
    assert results == [Words(2, 3, 5), Words(1, 1, 2)]


@pytest.mark.fault("ocall-no-thread")
def test_a_call_to_the_same_session_is_busy_at_once(session: Session) -> None:
    codes: list[int] = []

    def handler(ocall: Ocall) -> None:
        try:
            session.invoke(CALL, ValueInOut(1))
        except CallError as error:
            codes.append(error.code)

    session.invoke(CALL, ValueInOut(1), ocalls=handler)
    assert codes == [Result.BUSY]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.requirement("DEV-OCA-4")
@pytest.mark.fault("ocall-no-thread")
def test_when_all_threads_wait_for_clients(make: Callable[..., Machine], threads: int) -> None:
    """BUSY at once; those that wait for a thread already, too; and afterwards all is well."""
    machine = make(threads)
    with Context(machine.runtime) as context:
        sessions = [context.open_session(OCALL) for _ in range(threads)]
        probe = context.open_session(PROBE)
        entered, release = threading.Barrier(threads + 1), threading.Event()
        codes: list[int] = []

        def handler(ocall: Ocall) -> None:
            entered.wait(10)
            release.wait(10)

        pending = [s.begin(CALL, ValueInOut(1), ocalls=handler) for s in sessions]
        entered.wait(10)
        for _ in range(3):
            with pytest.raises(CallError) as busy:
                probe.invoke(0)
            codes.append(busy.value.code)
        assert codes == [Result.BUSY] * 3
        probe.close()  # what cannot fail is done all the same
        release.set()
        for one in pending:
            one.wait(10)
        with context.open_session(PROBE) as probe:
            probe.invoke(0)


def waits(entered: threading.Event, release: threading.Event) -> Callable[[Ocall], None]:
    def handler(ocall: Ocall) -> None:
        entered.set()
        release.wait(10)

    return handler


@pytest.fixture
def entered() -> threading.Event:
    return threading.Event()


@pytest.fixture
def release() -> Iterator[threading.Event]:
    release = threading.Event()
    yield release
    release.set()


@pytest.mark.fault("ocall-cancelled")
def test_cancelling_the_outer_call(session: Session, entered: threading.Event, release: threading.Event) -> None:
    token = CancelToken()
    pending = session.begin(CANCEL, ValueInOut(1), cancel=token, ocalls=waits(entered, release))
    assert entered.wait(10)
    token.cancel()
    with pytest.raises(CallError) as cancelled:
        pending.wait(10)
    assert cancelled.value.code == Result.CANCEL
    release.set()
    assert session.invoke(CALL, ValueInOut(7), ValueInOut(1, 2), ocalls=add)[1] == Words(1, 2, 3)


@pytest.mark.fault("ocall-silence")
def test_a_handler_that_never_answers(session: Session, entered: threading.Event, release: threading.Event) -> None:
    with pytest.raises(CallError) as late:
        session.invoke(TIMED, ValueInOut(1, 500), ocalls=waits(entered, release))
    assert late.value.code == Result.COMMUNICATION
    assert entered.is_set()
    assert session.invoke(CALL, ValueInOut(7), ValueInOut(1, 2), ocalls=add)[1] == Words(1, 2, 3)


@pytest.mark.parametrize("what", ["session", "context"])
@pytest.mark.fault("ocall-client-goes")
def test_closing_it_in_the_handler(make: Callable[..., Machine], what: str) -> None:
    """The TA gets an error at once, and the closing does not wait for the handler that does it."""
    context = Context(make().runtime)
    session = context.open_session(OCALL)
    closes = {"session": session.close, "context": context.close}

    closed = threading.Event()

    def handler(ocall: Ocall) -> None:
        closes[what]()
        closed.set()

    pending = session.begin(CALL, ValueInOut(1), ocalls=handler)
    with pytest.raises(CallError) as ended:
        pending.wait(10)
    assert closed.wait(10)
    assert ended.value.code in (Result.COMMUNICATION, Result.CANCEL)
    context.close()


@pytest.mark.requirement("DRV-OCA-3")
@pytest.mark.parametrize("what", ["session", "context"])
@pytest.mark.fault("ocall-client-goes")
def test_closing_it_elsewhere(
    make: Callable[..., Machine], what: str, entered: threading.Event, release: threading.Event
) -> None:
    context = Context(make().runtime)
    session = context.open_session(OCALL)
    pending = session.begin(CALL, ValueInOut(1), ocalls=waits(entered, release))
    assert entered.wait(10)
    {"session": session.close, "context": context.close}[what]()
    with pytest.raises(CallError) as ended:
        pending.wait(10)
    assert ended.value.code in (Result.COMMUNICATION, Result.CANCEL)
    context.close()


@pytest.mark.requirement("DRV-OCA-4")
@pytest.mark.fault("ocall-memory-freed")
def test_memory_is_freed_while_the_call_holds_it(context: Context, session: Session) -> None:
    """In the handler: it goes when the call has ended, and the TA sees it until then."""
    shared = context.allocate(4096)

    def handler(ocall: Ocall) -> None:
        shared.close()
        ocall.memory(0).write(b"still there")

    session.invoke(CALL, ValueInOut(1), shared.whole(INOUT), ocalls=handler)


@pytest.mark.fault("ocall-client-goes")
def test_the_client_dies_while_memory_is_lent(make: Callable[..., Machine]) -> None:
    machine = make()
    entered, release = threading.Event(), threading.Event()
    context = Context(machine.runtime)
    session = context.open_session(OCALL)
    pending = session.begin(LEND, ValueInOut(1, 65536), ocalls=waits(entered, release))
    assert entered.wait(10)
    machine.runtime.close()
    with pytest.raises(CallError):
        pending.wait(10)
    release.set()


@pytest.mark.parametrize("size", [0, (16 << 20) + 1])
@pytest.mark.fault("ocall-bad-memory")
def test_too_much_memory(session: Session, size: int) -> None:
    with pytest.raises(CallError) as refused:
        session.invoke(LEND, ValueInOut(1, size), ocalls=add)
    assert refused.value.code == Result.OUT_OF_MEMORY
