"""The thread that owns a driver: calls, cancels, RPCs and the end of all of it."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tee import package
from tee.calls import (
    Call,
    CloseContext,
    Invoke,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Event, RpcWithdrawn, Sink, TeeInfo
from tee.io.runtime import Observation, TeeRuntime
from tee.io.supplicant import Allocator, Supplicant
from tee.io.supplicant_process import SupplicantProcess
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.soft import SoftTee, examples

HELLO, PROBE = examples.UUIDS["hello_world"], examples.UUIDS["probe"]


def soft(keys: package.KeyPair | None = None) -> SoftTee:
    built_in = examples.built_in() if keys is None else {}
    public = [keys.public] if keys is not None else []
    return SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=built_in, keys=public)


@pytest.fixture
def runtime() -> Iterator[TeeRuntime]:
    with TeeRuntime(soft()) as runtime:
        yield runtime


def session(runtime: TeeRuntime, uuid: object = PROBE) -> object:
    context = runtime.call(OpenContext()).value
    done = runtime.call(OpenSession(context=context, uuid=uuid))  # type: ignore[arg-type]
    assert done.code == Result.SUCCESS
    return done.value


def waits(runtime: TeeRuntime, milliseconds: int = 0) -> Invoke:
    return Invoke(session=session(runtime), func=4, params=[Value(Direction.IN, milliseconds)])


def test_calls(runtime: TeeRuntime) -> None:
    assert runtime.info.impl_id == 1
    value = Value(Direction.INOUT, 1)
    call = Invoke(session=session(runtime, HELLO), func=0, params=[value])
    done = runtime.call(call, timeout=10)
    assert (done.call, done.code, value.a) == (call, Result.SUCCESS, 2)
    assert runtime.call(Invoke(session=None, func=0)).code == Result.BAD_PARAMETERS


def test_calls_of_many_threads(runtime: TeeRuntime) -> None:
    codes: list[int] = []

    def work() -> None:
        mine = session(runtime)
        codes.extend(runtime.call(Invoke(session=mine, func=0)).code for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [Result.SUCCESS] * 400


def test_the_owner_wakes_for_time(runtime: TeeRuntime) -> None:
    assert runtime.call(waits(runtime, 5), timeout=30).code == Result.SUCCESS


def test_cancel(runtime: TeeRuntime) -> None:
    pending = runtime.submit(waits(runtime))
    assert pending.done is None
    with pytest.raises(TimeoutError):
        pending.wait(0.01)
    pending.cancel()
    assert pending.wait(10).code == Result.CANCEL
    assert pending.done is pending.wait()
    pending.cancel()  # nothing


def test_timeout_cancels(runtime: TeeRuntime) -> None:
    call = waits(runtime)
    with pytest.raises(TimeoutError):
        runtime.call(call, timeout=0.01)
    assert runtime.call(Invoke(session=call.session, func=0), timeout=10).code == Result.SUCCESS


def test_ctrl_c_cancels(runtime: TeeRuntime, monkeypatch: pytest.MonkeyPatch) -> None:
    from tee.io import runtime as module

    seen: list[module.Pending] = []
    wait = module.Pending.wait

    def interrupted(self: module.Pending, timeout: float | None = None) -> Done:
        if isinstance(self.call, Invoke) and self not in seen:
            seen.append(self)
            raise KeyboardInterrupt
        return wait(self, timeout)

    call = waits(runtime)
    monkeypatch.setattr(module.Pending, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        runtime.call(call)
    assert seen[0].done is not None
    assert seen[0].done.code == Result.CANCEL


def test_a_call_is_submitted_once(runtime: TeeRuntime) -> None:
    call = waits(runtime)
    pending = runtime.submit(call)
    with pytest.raises(ValueError, match="already"):
        runtime.submit(call)
    pending.cancel()
    pending.wait()


def test_memory(runtime: TeeRuntime) -> None:
    context = runtime.call(OpenContext()).value
    memory = runtime.allocate_registered(context, 100)
    assert memory.handle is not None
    runtime.release_registered(context, memory)
    assert (memory.handle, memory.size) == (None, 0)
    with pytest.raises(MemoryError):
        runtime.allocate(0)
    with pytest.raises(TeeError) as caught:
        runtime.allocate_registered(None, 10)
    assert caught.value.code == Result.BAD_PARAMETERS


class TestSupplicants:
    @pytest.fixture
    def folder(self, tmp_path: Path, keys: package.KeyPair) -> Path:
        (tmp_path / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 1, keys.private))
        return tmp_path

    def test_ta_is_loaded(self, folder: Path, keys: package.KeyPair) -> None:
        seen: list[Observation] = []
        supplicant = Supplicant([folder])
        tee = soft(keys)
        with TeeRuntime(tee, supplicant, seen.append) as runtime:
            assert session(runtime, HELLO)
            assert supplicant.shared_memory == (0, 0)
            (folder / f"{HELLO}.ta").unlink()
            context = runtime.call(OpenContext()).value
            done = runtime.call(OpenSession(context=context, uuid=HELLO))
            assert (done.code, done.origin) == (Result.ITEM_NOT_FOUND, Origin.TEE)
        commands = [one.subject.command for one in seen if one.kind == "rpc" and isinstance(one.subject, Rpc)]
        load, alloc, free = RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC, RpcCommand.SHM_FREE
        assert commands == [load, alloc, load, free, load]
        answers = [one.detail.code for one in seen if one.kind == "answer" and isinstance(one.detail, RpcReply)]
        assert answers == [0, 0, 0, 0, Result.ITEM_NOT_FOUND]
        started = [one.subject for one in seen if one.kind == "start"]
        ended = [one.subject for one in seen if one.kind == "done"]
        assert set(started) == set(ended)
        assert all(isinstance(one.detail, Done) for one in seen if one.kind == "done")
        assert [one.time for one in seen] == sorted(one.time for one in seen)
        assert not any(tee.usage().values())

    @pytest.mark.fault("no-supplicant")
    def test_none(self, keys: package.KeyPair) -> None:
        with TeeRuntime(soft(keys)) as runtime:
            context = runtime.call(OpenContext()).value
            assert runtime.call(OpenSession(context=context, uuid=HELLO)).code == Result.COMMUNICATION

    @pytest.mark.fault("restarted-supplicant")
    def test_killed_and_started_again(self, folder: Path, keys: package.KeyPair) -> None:
        process = SupplicantProcess([folder])
        with TeeRuntime(soft(keys), process) as runtime:
            context = runtime.call(OpenContext()).value
            assert runtime.call(OpenSession(context=context, uuid=HELLO)).code == Result.COMMUNICATION
            process.start()
            assert runtime.call(OpenSession(context=context, uuid=HELLO)).code == Result.SUCCESS
            process.kill()
            assert runtime.call(OpenSession(context=context, uuid=HELLO)).code == Result.COMMUNICATION
            process.start()
            assert runtime.call(OpenSession(context=context, uuid=HELLO)).code == Result.SUCCESS
            assert process.shared_memory == (0, 0)
        process.close()

    def test_another_machine(self, folder: Path, keys: package.KeyPair) -> None:
        """The supplicant's memory is its own machine's: a caller of another one cannot be served by it."""
        supplicant = Supplicant([folder])
        with TeeRuntime(soft(keys), supplicant, vm="a") as runtime:
            codes = [
                runtime.call(OpenSession(context=runtime.call(OpenContext(vm=vm)).value, uuid=HELLO)).code
                for vm in ("a", "b")
            ]
        assert codes == [Result.SUCCESS, Result.COMMUNICATION]


class Slow(Supplicant):
    """Serves nothing before it is let; ``entered`` says that it was asked."""

    def __init__(self, hold: int, *folders: Path) -> None:
        super().__init__(folders)
        self.hold = hold
        self.entered, self.go_on = threading.Event(), threading.Event()

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        if rpc.command == self.hold:
            reply = super().serve(rpc, allocator)
            self.entered.set()
            assert self.go_on.wait(10)
            return reply
        return super().serve(rpc, allocator)


class TestSlowService:
    @pytest.mark.parametrize("command", [RpcCommand.LOAD_TA, RpcCommand.SHM_ALLOC])
    @pytest.mark.fault("slow-supplicant")
    def test_holds_nobody_else_and_is_withdrawn(self, tmp_path: Path, keys: package.KeyPair, command: int) -> None:
        (tmp_path / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 1, keys.private))
        slow = Slow(command, tmp_path)
        seen: list[Observation] = []
        with TeeRuntime(soft(keys), slow, seen.append) as runtime:
            context = runtime.call(OpenContext()).value
            pending = runtime.submit(OpenSession(context=context, uuid=HELLO))
            assert slow.entered.wait(10)
            memory = runtime.allocate_registered(context, 10)
            assert runtime.call(UnregisterMemory(context=context, memory=memory), timeout=10).code == Result.SUCCESS
            pending.cancel()
            assert pending.wait(10).code == Result.CANCEL
            assert [one.kind for one in seen].count("withdrawn") == 1
            slow.go_on.set()
            assert runtime.call(OpenSession(context=context, uuid=HELLO)).code == Result.SUCCESS
            assert slow.shared_memory == (0, 0)  # what came too late was freed

    def test_close_does_not_wait_for_it(self, tmp_path: Path, keys: package.KeyPair) -> None:
        slow = Slow(RpcCommand.LOAD_TA, tmp_path)
        runtime = TeeRuntime(soft(keys), slow)
        context = runtime.call(OpenContext()).value
        pending = runtime.submit(OpenSession(context=context, uuid=HELLO))
        assert slow.entered.wait(10)
        threading.Timer(0.05, slow.go_on.set).start()
        runtime.close()
        assert pending.wait(0).code in (Result.CANCEL, Result.COMMUNICATION)

    def test_that_raises(self, keys: package.KeyPair, caplog: pytest.LogCaptureFixture) -> None:
        class Broken(Supplicant):
            def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
                raise ValueError("broken")

        with TeeRuntime(soft(keys), Broken()) as runtime:
            context = runtime.call(OpenContext()).value
            for _ in range(2):
                assert runtime.call(OpenSession(context=context, uuid=HELLO), timeout=10).code == Result.GENERIC
        assert "broken" in caplog.text


class TestClose:
    def test_ends_calls_and_contexts(self) -> None:
        tee = soft()
        runtime = TeeRuntime(tee)
        pending = runtime.submit(waits(runtime))
        runtime.close()
        assert pending.wait(0).code == Result.CANCEL
        assert not any(tee.usage().values())
        assert not any(thread.name.startswith("tee-") for thread in threading.enumerate())
        runtime.close()
        with pytest.raises(RuntimeError, match="closed"):
            runtime.submit(OpenContext())
        with pytest.raises(MemoryError):
            runtime.allocate(5)
        runtime.release(Memory())
        pending.cancel()

    def test_contexts_that_are_closed_already(self, runtime: TeeRuntime) -> None:
        context = runtime.call(OpenContext()).value
        assert runtime.call(CloseContext(context=context)).code == Result.SUCCESS


class Refusing:
    """A driver that asks for memory and then cannot take it."""

    info = TeeInfo(0, 0, 0, 0)

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.rpc = Rpc(RpcCommand.SHM_ALLOC, [Value(Direction.IN, 0, 8, 8)])

    def attach(self, sink: Sink) -> None:
        self.sink = sink

    def start(self, call: Call) -> None:
        self.events.append(Done(call, value=object()))
        if isinstance(call, OpenSession):
            self.events.append(self.rpc)

    def cancel(self, call: Call) -> None: ...

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        self.events.append(RpcWithdrawn(rpc))

    def run(self) -> float | None:
        while self.events:
            self.sink(self.events.pop(0))
        return None

    def fileno(self) -> int | None:
        return None

    def allocate(self, size: int) -> Memory:
        return Memory.of(bytearray(size))

    def release(self, memory: Memory) -> None:
        memory.forget()

    def usage(self) -> dict[str, int]:
        return {}


@pytest.mark.requirement("DRV-RPC-4")
def test_memory_that_the_tee_could_not_take_is_freed() -> None:
    supplicant = Supplicant()
    seen: list[str] = []
    with TeeRuntime(Refusing(), supplicant, lambda one: seen.append(one.kind)) as runtime:
        runtime.call(OpenSession(context=None, uuid=HELLO))
        until(lambda: "withdrawn" in seen and supplicant.shared_memory == (0, 0))
    assert "answer" in seen


class Withdrawing(Refusing):
    """It takes memory, and then no longer waits for it to be freed."""

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        if rpc is self.rpc:
            given = [param for param in reply.params if isinstance(param, MemRef)]
            free = Rpc(RpcCommand.SHM_FREE, [Value(Direction.IN), *given])
            self.events += [free, RpcWithdrawn(free)]


@pytest.mark.requirement("DRV-RPC-4")
def test_a_shm_free_that_is_withdrawn_is_carried_out() -> None:
    supplicant = Supplicant()
    seen: list[str] = []
    with TeeRuntime(Withdrawing(), supplicant, lambda one: seen.append(one.kind)) as runtime:
        runtime.call(OpenSession(context=None, uuid=HELLO))
        until(lambda: "withdrawn" in seen and supplicant.shared_memory == (0, 0))
    assert seen.count("rpc") == 2


class Broken:
    """A driver that fails, or never ends a call."""

    info = TeeInfo(0, 0, 0, 0)

    def __init__(self, fail: bool) -> None:
        self.fail = fail
        self.contexts = 0

    def attach(self, sink: Sink) -> None:
        self.sink = sink

    def start(self, call: Call) -> None:
        if self.fail:
            raise ValueError("broken driver")
        if isinstance(call, OpenContext):
            self.sink(Done(call, value=object()))

    def cancel(self, call: Call) -> None: ...

    def answer(self, rpc: Rpc, reply: RpcReply) -> None: ...

    def run(self) -> float | None:
        return None

    def fileno(self) -> int | None:
        return None

    def allocate(self, size: int) -> Memory:
        raise MemoryError

    def release(self, memory: Memory) -> None: ...

    def usage(self) -> dict[str, int]:
        return {}


class TestBrokenDriver:
    @pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
    def test_that_fails_leaves_nobody_waiting(self) -> None:
        runtime = TeeRuntime(Broken(fail=True))
        done = runtime.call(OpenContext(), timeout=10)
        assert (done.code, done.origin) == (Result.COMMUNICATION, Origin.API)
        with pytest.raises(RuntimeError):
            runtime.submit(OpenContext())
        runtime.close()

    def test_that_never_ends_a_call(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from tee.io import runtime as module

        monkeypatch.setattr(module, "CLOSE_TIMEOUT", 0.05)
        runtime = TeeRuntime(Broken(fail=False))
        assert runtime.call(OpenContext(), timeout=10).code == Result.SUCCESS
        pending = runtime.submit(RegisterMemory(context=None, memory=Memory()))
        runtime.close()
        done = pending.wait(0)
        assert (done.code, done.may_have_run) == (Result.COMMUNICATION, True)


def test_zero_copy(runtime: TeeRuntime) -> None:
    """What the client writes during a call is what the TA then reads."""
    context = runtime.call(OpenContext()).value
    mine = runtime.call(OpenSession(context=context, uuid=PROBE)).value
    memory = runtime.allocate_registered(context, 4096)
    value = Value(Direction.INOUT, 200)
    pending = runtime.submit(Invoke(session=mine, func=8, params=[MemRef(Direction.INOUT, memory, 0, 4096), value]))
    until(lambda: runtime.call(Invoke(session=None, func=0)).code != 0)
    view = memory.view(0, 1)
    assert view is not None
    time.sleep(0.05)
    view[0] = 77
    assert pending.wait(10).code == Result.SUCCESS
    assert value.b == 77


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end


class Forgetful(SoftTee):
    """Loses a context that was opened before, as a device does whose backend was started again."""

    def lose(self) -> None:
        self.lost = set(self._contexts)

    def start(self, call: Call) -> None:
        if isinstance(call, RegisterMemory) and call.context in getattr(self, "lost", ()):
            self._outbox.append(Done(call, Result.TARGET_DEAD, Origin.COMMS))
        else:
            super().start(call)


def test_the_supplicants_memory_after_the_tee_has_lost_its_state(tmp_path: Path) -> None:
    keys = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
    (tmp_path / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 0, keys.private))
    tee = Forgetful(clock=time.monotonic, random=secrets.token_bytes, keys=[keys.public])
    with TeeRuntime(tee, Supplicant([tmp_path])) as runtime:
        session(runtime, HELLO)
        tee.lose()
        session(runtime, HELLO)


def test_what_comes_too_late_wakes_nobody() -> None:
    """A thread that was about to wake the owner when the runtime was closed: the number is another file's by now."""
    runtime = TeeRuntime(SoftTee(clock=time.monotonic, random=secrets.token_bytes))
    runtime.close()
    others = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(64)]
    try:
        runtime._post(lambda: None)
        for other in others:
            with pytest.raises(BlockingIOError):
                os.eventfd_read(other)
    finally:
        for other in others:
            os.close(other)
