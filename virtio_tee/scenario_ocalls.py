"""Scenarios of TAs that call their client: OCALLs, and the same by generic RPC."""

from __future__ import annotations

from guest_driver.client import CallError, Context, Session, ValueInOut, Words
from guest_driver.ocalls import Ocall
from tee.io.runtime import TeeRuntime
from tee.params import Direction
from tee.results import Result, TeeError
from tee.rpc import GRPC_UUID
from tee.soft.examples import UUIDS
from virtio_tee.report import Report, check

CALL, LEND, GRPC = 0, 1, 2
ADD, FILL, NESTED = 1, 2, 3
LENT_BYTES = 5000


class Handler:
    """The client's functions; counts what it was called for."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.called: list[int] = []

    def __call__(self, ocall: Ocall) -> None:
        """One call from a TA."""
        self.called.append(ocall.function)
        match ocall.function:
            case 1:
                value = ocall.value(0)
                value.c = value.a + value.b
            case 2:
                memory = ocall.memory(0)
                memory.write(b"\1" * memory.capacity)
            case 3:
                with self._context.open_session(UUIDS["hello_world"]) as other:
                    (words,) = other.invoke(0, ValueInOut(ocall.value(0).a))
                    ocall.value(0).c = words.a if isinstance(words, Words) else 0
            case _:
                raise TeeError(Result.NOT_SUPPORTED)


def ocall_job(runtime: TeeRuntime, report: Report) -> None:
    """OCALLs of every kind. Raises TeeError or CheckError after noting the step that failed."""
    with report.step("open a context"):
        context = Context(runtime)
    with context:
        handler = Handler(context)
        with report.step("open a session; the TA calls its client while it opens") as step:
            session = context.open_session(UUIDS["ocall"], ValueInOut(ADD), ValueInOut(40, 2), ocalls=handler)
            check(session.answers[1:] == [Words(40, 2, 42)], f"the TA got {session.answers}")
            step.detail = "40 + 2 = 42, added by the client"
        with session:
            with report.step("an OCALL with values") as step:
                answers = session.invoke(CALL, ValueInOut(ADD), ValueInOut(20, 3), ocalls=handler)
                check(answers == [Words(ADD), Words(20, 3, 23)], f"the TA got {answers}")
                step.detail = "23"
            with report.step("an OCALL with memory that the client allocates for it") as step:
                (words,) = session.invoke(LEND, ValueInOut(FILL, LENT_BYTES), ocalls=handler)
                check(words == Words(FILL, 0, LENT_BYTES), f"the TA saw {words!r}")
                step.detail = f"{LENT_BYTES} bytes"
            with report.step("an OCALL with memory that is registered, in place"), context.allocate(4096) as shared:
                session.invoke(CALL, ValueInOut(FILL), shared.whole(Direction.INOUT), ocalls=handler)
                check(shared.read() == b"\1" * 4096, "the client's own memory is not what its handler wrote")
            with report.step("a nested call: the handler calls another TA") as step:
                answers = session.invoke(CALL, ValueInOut(NESTED), ValueInOut(41), ocalls=handler)
                check(answers[1] == Words(41, 0, 42), f"the TA got {answers}")
                step.detail = "hello_world: 42"
            with report.step("a client without a handler is told so"):
                _refused(session, CALL)
        check(handler.called == [ADD, ADD, FILL, FILL, NESTED], f"the handler was called for {handler.called}")


def grpc_job(runtime: TeeRuntime, report: Report) -> None:
    """Generic RPC. Raises TeeError or CheckError after noting the step that failed."""
    with report.step("open a context"):
        context = Context(runtime)
    with context:
        handler = Handler(context)
        with report.step("open a session"):
            session = context.open_session(UUIDS["ocall"])
        with session:
            with report.step("the TA invokes the generic RPC pseudo-TA: values") as step:
                answers = session.invoke(GRPC, ValueInOut(ADD), ValueInOut(30, 4), ocalls=handler)
                check(answers[1] == Words(30, 4, 34), f"the TA got {answers}")
                step.detail = "34"
            with report.step("… memory, in place"), context.allocate(4096) as shared:
                session.invoke(GRPC, ValueInOut(FILL), shared.whole(Direction.INOUT), ocalls=handler)
                check(shared.read() == b"\1" * 4096, "the client's own memory is not what its handler wrote")
            with report.step("a client without a handler is told so"):
                _refused(session, GRPC)
        with report.step("the pseudo-TA is for TAs only"):
            try:
                context.open_session(GRPC_UUID).close()
            except CallError as e:
                check(e.code == Result.ACCESS_DENIED, f"it is refused with {e}")
            else:
                check(False, "a client may open it")


def _refused(session: Session, command: int) -> None:
    try:
        session.invoke(command, ValueInOut(ADD), ValueInOut(1, 1))
    except CallError as e:
        check(e.code == Result.NOT_SUPPORTED, f"it is refused with {e}")
    else:
        check(False, "it is not refused")
