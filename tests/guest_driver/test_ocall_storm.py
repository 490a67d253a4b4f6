"""All abnormal ends of OCALLs, in random order, on one machine: nothing stays behind, and the next call is served."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from guest_driver.client import CallError, CancelToken, Context, ValueInOut, Words
from guest_driver.ocalls import Ocall
from tee.results import Result, TeeError
from tests.guest_driver.test_ocalls import CALL, CANCEL, INOUT, LEND, MANY, OCALL, PATHS, PROBE, TIMED, Machine, add

ENDED = (Result.COMMUNICATION, Result.CANCEL, Result.TARGET_DEAD)


class Storm:
    """One client after the other, each with its own bad end."""

    def __init__(self, machine: Machine, seed: int) -> None:
        self.machine = machine
        self.random = random.Random(seed)
        self.late: list[threading.Event] = []

    def context(self) -> Context:
        return Context(self.machine.runtime)

    def waits(self) -> tuple[Callable[[Ocall], None], threading.Event]:
        """A handler that does not come back before the round's end."""
        entered, release = threading.Event(), threading.Event()
        self.late.append(release)

        def handler(ocall: Ocall) -> None:
            entered.set()
            release.wait(30)

        return handler, entered

    def closes_the_context_elsewhere(self) -> None:
        context, (handler, entered) = self.context(), self.waits()
        pending = context.open_session(OCALL).begin(CALL, ValueInOut(1), ocalls=handler)
        assert entered.wait(10)
        context.close()
        self.ended(pending.wait)

    def closes_the_session_elsewhere(self) -> None:
        with self.context() as context:
            handler, entered = self.waits()
            session = context.open_session(OCALL)
            pending = session.begin(CALL, ValueInOut(1), ocalls=handler)
            assert entered.wait(10)
            session.close()
            self.ended(pending.wait)

    def closes_in_the_handler(self) -> None:
        context = self.context()
        session = context.open_session(OCALL)
        close, closed = self.random.choice([session.close, context.close]), threading.Event()

        def handler(ocall: Ocall) -> None:
            close()
            closed.set()

        pending = session.begin(CALL, ValueInOut(1), ocalls=handler)
        self.ended(pending.wait)
        assert closed.wait(10)
        context.close()

    def closes_while_memory_is_lent(self) -> None:
        context, (handler, entered) = self.context(), self.waits()
        pending = context.open_session(OCALL).begin(LEND, ValueInOut(1, 5000), ocalls=handler)
        assert entered.wait(10)
        context.close()
        self.ended(pending.wait)

    def never_answers(self) -> None:
        with self.context() as context, context.open_session(OCALL) as session:
            handler, _ = self.waits()
            self.ended(lambda: session.invoke(TIMED, ValueInOut(1, 5), ocalls=handler))

    def is_cancelled(self) -> None:
        with self.context() as context, context.open_session(OCALL) as session:
            handler, entered = self.waits()
            token = CancelToken()
            pending = session.begin(CANCEL, ValueInOut(1), cancel=token, ocalls=handler)
            assert entered.wait(10)
            token.cancel()
            self.ended(pending.wait)

    def is_cancelled_before(self) -> None:
        with self.context() as context, context.open_session(OCALL) as session:
            token = CancelToken()
            token.cancel()
            with suppress(CallError):  # it may have been quicker
                session.invoke(CANCEL, ValueInOut(7), ValueInOut(1, 1), cancel=token, ocalls=add)

    def fails(self) -> None:
        def handler(ocall: Ocall) -> None:
            raise self.random.choice([TeeError(Result.BUSY), ZeroDivisionError(), MemoryError()])

        with self.context() as context, context.open_session(OCALL) as session:
            (words,) = session.invoke(CALL, ValueInOut(1), ocalls=handler)
            assert isinstance(words, Words)
            assert words.b in (Result.BUSY, Result.GENERIC)

    def frees_memory_in_use(self) -> None:
        with self.context() as context, context.open_session(OCALL) as session:
            shared = context.allocate(4096)
            session.invoke(CALL, ValueInOut(1), shared.whole(INOUT), ocalls=lambda _: shared.close())

    def has_no_handler(self) -> None:
        with self.context() as context, context.open_session(OCALL) as session:
            self.ended(lambda: session.invoke(LEND, ValueInOut(1, 64)), Result.NOT_SUPPORTED)

    def calls_itself(self) -> None:
        with self.context() as context, context.open_session(OCALL) as session:
            session.invoke(
                CALL,
                ValueInOut(1),
                ocalls=lambda _: self.ended(lambda: session.invoke(CALL, ValueInOut(1)), Result.BUSY),
            )

    def opens_badly(self) -> None:
        context, (handler, entered) = self.context(), self.waits()
        results: list[object] = []

        def opens() -> None:
            try:
                results.append(context.open_session(OCALL, ValueInOut(1), ocalls=handler))
            except TeeError as error:
                results.append(error.code)

        opening = threading.Thread(target=opens)
        opening.start()
        assert entered.wait(10)
        context.close()
        opening.join(10)
        assert results[0] in ENDED

    def several_at_once(self) -> None:
        with self.context() as context:
            sessions = [context.open_session(OCALL) for _ in range(3)]
            pending = [s.begin(MANY, ValueInOut(1, 5), ocalls=lambda _: 1) for s in sessions]
            for one in pending:
                with suppress(CallError):  # BUSY, where all threads wait for clients
                    assert one.wait(10) == [Words(1, 5, 5)]

    def ended(self, call: Callable[[], object], *codes: int) -> None:
        with pytest.raises(CallError) as error:
            call()
        assert error.value.code in (codes or ENDED), error.value

    def round(self) -> None:
        """One bad end; then all is well."""
        name = self.random.choice(EVENTS)
        getattr(self, name)()
        if self.random.random() < 0.5:
            self.release()
        with self.context() as context:
            with context.open_session(PROBE) as probe:
                probe.invoke(0)
            with context.open_session(OCALL) as session:
                assert session.invoke(CALL, ValueInOut(7), ValueInOut(1, 2), ocalls=add)[1] == Words(1, 2, 3)

    def release(self) -> None:
        for event in self.late:
            event.set()
        self.late.clear()


EVENTS = [name for name, member in vars(Storm).items() if callable(member) and not name.startswith("_")]
for helper in ("context", "waits", "ended", "round", "release"):
    EVENTS.remove(helper)


def storm(path: str, folder: Path, threads: int, rounds: int, seed: int) -> None:
    machine = Machine(path, folder, threads)
    one = Storm(machine, seed)
    try:
        for _ in range(rounds):
            one.round()
    finally:
        one.release()
        machine.close()


@pytest.mark.fault("ocall-client-goes")
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_rounds_of_bad_ends(tmp_path: Path, path: str, threads: int) -> None:
    storm(path, tmp_path, threads, 50, seed=threads)


@pytest.mark.long
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("path", PATHS)
def test_a_thousand_rounds_of_bad_ends(tmp_path: Path, path: str, threads: int) -> None:
    storm(path, tmp_path, threads, 1000, seed=1000 + threads)
