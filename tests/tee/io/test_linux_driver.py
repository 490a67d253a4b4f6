"""The TEE driver on a Linux TEE device, over a kernel that is a table of sessions, with a TA in Python."""

from __future__ import annotations

import errno
import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from uuid import UUID

import pytest

from guest_driver import client
from guest_driver.client import CallError, CancelToken, Null, TempIn, TempInOut, TempOut, ValueIn, ValueInOut, ValueOut
from tee.calls import (
    Call,
    Client,
    CloseContext,
    CloseSession,
    Invoke,
    Login,
    OpenContext,
    OpenSession,
    RegisterMemory,
    UnregisterMemory,
)
from tee.driver import Done, Event, GenCap, Placed, Sink
from tee.io.linux import advice
from tee.io.linux_driver import LinuxTeeDriver, Post
from tee.io.runtime import TeeRuntime
from tee.linux.errors import RESULTS
from tee.linux.ioctls import MOST_PARAMS, Ioctl
from tee.memory import FfaShare, Memory
from tee.params import Direction, MemRef, Param, Value
from tee.results import Origin, Result
from tee.rpc import Rpc, RpcReply
from tests.tee.io.fake_kernel import ADD, CAPS, FAIL, FILL, FLIP, LOOK, PAGE, SHORT, WAIT, FakeKernel, Ta, scattered

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
UUID_1 = UUID(int=1)
PATIENCE = 10


@pytest.fixture
def ta() -> Iterator[Ta]:
    one = Ta()
    yield one
    one.go.set()


@pytest.fixture
def kernel(tmp_path: Path, ta: Ta) -> FakeKernel:
    return FakeKernel(tmp_path, ta)


class Bench:
    """Owns a driver, and waits for what it says."""

    def __init__(self, kernel: FakeKernel, **options: object) -> None:
        self.driver = LinuxTeeDriver(kernel.open, **options)  # type: ignore[arg-type]
        self.driver.attach(self._take)
        self.done: dict[Call, Done] = {}
        self.order: list[Call] = []
        self.placed: list[Placed] = []
        self.others: list[Event] = []

    def _take(self, event: Event) -> None:
        if isinstance(event, Done):
            assert event.call not in self.done, "ended twice"
            self.done[event.call] = event
            self.order.append(event.call)
        elif isinstance(event, Placed):
            self.placed.append(event)
        else:
            self.others.append(event)

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < end, "it does not happen"
            if self.driver.run() is None:
                time.sleep(0.001)

    def wait(self, call: Call) -> Done:
        self.until(lambda: call in self.done)
        return self.done[call]

    def begin(self, call: Call) -> Call:
        before = len(self.done)
        self.driver.start(call)
        assert len(self.done) == before, "start called the sink"
        return call

    def call(self, call: Call) -> Done:
        return self.wait(self.begin(call))

    def context(self, vm: str = "") -> object:
        return self.call(OpenContext(vm=vm)).value

    def session(self, context: object) -> object:
        done = self.call(OpenSession(context=context, uuid=UUID_1))
        assert done.code == Result.SUCCESS
        return done.value

    def opened(self, vm: str = "") -> tuple[object, object]:
        context = self.context(vm)
        return context, self.session(context)

    def invoke(self, session: object, func: int, *params: Param) -> Done:
        return self.call(Invoke(session=session, func=func, params=list(params)))

    def waiting(self, session: object, ta: Ta, mark: int = 0, *params: Param) -> Invoke:
        """A WAIT that has begun."""
        call = Invoke(session=session, func=WAIT, params=[Value(IN, mark), *params])
        self.begin(call)
        self.until(lambda: mark in ta.inside)
        return call

    def registered(self, context: object, memory: Memory) -> Memory:
        assert self.call(RegisterMemory(context=context, memory=memory)).code == Result.SUCCESS
        return memory

    def end(self) -> None:
        """Close all; nothing is left."""
        for context in tuple(self.driver._contexts):
            if not context.closing:
                assert self.call(CloseContext(context=context)).code == Result.SUCCESS
        self.until(lambda: not any(self.driver.usage().values()))
        self.driver.close()


def open_files() -> int:
    """But for those behind the tests' own memory."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            links.append(os.readlink(f"/proc/self/fd/{name}"))
    return sum("memfd:guest" not in link for link in links)


@pytest.fixture
def bench(kernel: FakeKernel) -> Iterator[Bench]:
    before = open_files()
    one = Bench(kernel, bounce=64 << 10)
    yield one
    one.end()
    assert not kernel.sessions
    assert open_files() == before


class TestClientApi:
    """The same client programs as on the virtio driver."""

    @pytest.fixture
    def context(self, kernel: FakeKernel) -> Iterator[client.Context]:
        with closing(LinuxTeeDriver(kernel.open)) as driver, TeeRuntime(driver) as runtime:
            with client.Context(runtime) as context:
                yield context
            end = time.monotonic() + PATIENCE
            while any(driver.usage().values()) and time.monotonic() < end:
                time.sleep(0.001)
            assert not any(driver.usage().values())

    @pytest.mark.feature("Guest driver: the Python client API on any Linux TEE device (/dev/teeN)")
    def test_values_and_memory(self, context: client.Context) -> None:
        with context.open_session(UUID_1, ValueIn(1)) as session:
            words = session.invoke(ADD, ValueIn(1, 2**40, 2**63), ValueOut())[1]
            assert words == (2, 2**40 + 1, 2**63 + 1)
            assert session.invoke(FLIP, TempInOut(b"\x01\x02"), TempIn(b"in"))[0] == b"\xfe\xfd"
            assert session.invoke(FILL, TempOut(10), ValueIn(4))[0] == b"\x5a" * 4
            assert session.invoke(LOOK, TempIn(b"seen"), ValueInOut(3), client.Empty())[1] == (3, 0, 0)
            large = bytes(range(256)) * 256
            assert session.invoke(FLIP, TempInOut(large))[0] == bytes(255 - byte for byte in large)
            own = bytearray(b"\xf0" * 5000)
            with context.register(own) as shared, context.allocate(10000) as more:
                session.invoke(FLIP, shared.part(INOUT, 10, 20), more.whole(INOUT))
                assert bytes(own) == b"\xf0" * 10 + b"\x0f" * 20 + b"\xf0" * 4970
                assert more.read() == b"\xff" * 10000

    def test_what_a_ta_answers(self, context: client.Context) -> None:
        with context.open_session(UUID_1) as session:
            with pytest.raises(CallError) as failed:
                session.invoke(SHORT, TempOut(10))
            assert (failed.value.code, failed.value.sizes) == (Result.SHORT_BUFFER, [1000])
            with pytest.raises(CallError) as failed:
                session.invoke(FAIL)
            assert (failed.value.code, failed.value.origin) == (0x1234, Origin.TRUSTED_APP)

    def test_null(self, context: client.Context) -> None:
        with context.open_session(UUID_1) as session, pytest.raises(CallError) as failed:
            session.invoke(SHORT, Null(OUT))
        assert failed.value.sizes == [1000]

    def test_logins(self, context: client.Context, kernel: FakeKernel) -> None:
        with (
            context.open_session(UUID_1, login=Login.USER),
            context.open_session(UUID_1, login=Login.GROUP),
            context.open_session(UUID_1, login=Login.GROUP, client_uuid=UUID(bytes=b"\x05" + bytes(15))),
        ):
            assert list(kernel.sessions.values()) == [
                (Login.USER, bytes(16)),
                (Login.GROUP, os.getegid().to_bytes(16, "little")),
                (Login.GROUP, b"\x05" + bytes(15)),
            ]
        assert kernel.uuids == [UUID_1.bytes] * 3

    def test_cancel(self, context: client.Context, ta: Ta) -> None:
        token = CancelToken()
        with context.open_session(UUID_1) as session:
            pending = session.begin(WAIT, ValueIn(9), cancel=token)
            while not ta.inside:
                time.sleep(0.001)
            token.cancel()
            with pytest.raises(CallError) as failed:
                pending.wait(PATIENCE)
        assert failed.value.code == Result.CANCEL


class TestMemory:
    @pytest.mark.feature("Linux TEE: a guest's scattered pages are used in place, where that can be")
    @pytest.mark.parametrize(
        ("pages", "skip", "cut"), [(1, 0, 0), (7, 0, 0), (7, 100, 50), (2, 4095, 4095), (600, 3, 5)]
    )
    def test_in_place(self, bench: Bench, kernel: FakeKernel, pages: int, skip: int, cut: int) -> None:
        ram, views = scattered(pages, skip=skip, cut=cut)
        ram[:] = bytes(index // PAGE & 0xFF for index in range(len(ram)))
        before = b"".join(views)
        context, session = bench.opened()
        memory = bench.registered(context, Memory(views))
        maps = len(Path("/proc/self/maps").read_text().splitlines())
        assert bench.invoke(session, FLIP, MemRef(INOUT, memory, 0, memory.size)).code == Result.SUCCESS
        assert b"".join(views) == bytes(byte ^ 0xFF for byte in before)
        assert [(p.size, p.why) for p in bench.placed] == [(memory.size, "")]
        # what is seen elsewhere is seen by the TEE, without another registration
        views[0][0] = 0xAB
        bench.invoke(session, FLIP, MemRef(INOUT, memory, 0, 1))
        assert views[0][0] == 0x54
        assert kernel.calls["SHM_REGISTER"] == 2  # and the memory for copies
        # but for the fake kernel's own
        assert len(Path("/proc/self/maps").read_text().splitlines()) <= maps + pages + 3
        assert bench.driver.usage()["registrations_in_place"] == 1

    def test_registering_is_for_when_a_call_names_it(self, bench: Bench, kernel: FakeKernel) -> None:
        """What is used for answers to RPCs only never waits for the TEE."""
        before = kernel.calls.total()
        context = bench.context()
        memory = bench.registered(context, Memory(scattered(3)[1]))
        assert bench.call(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS
        assert memory.handle is None
        assert kernel.calls.total() == before

    @pytest.mark.feature("Linux TEE: memory that cannot be used in place is copied, and trace and metrics say why")
    @pytest.mark.parametrize(
        ("why", "options", "caps", "views", "read_only", "refused"),
        [
            ("zero copy is switched off", {"zero_copy": False}, CAPS, scattered(3)[1], False, 0),
            ("read-only", {}, CAPS, scattered(3)[1], True, 0),
            ("the TEE takes no registered memory", {}, CAPS & ~GenCap.REG_MEM, scattered(3)[1], False, 0),
            ("pieces not of whole pages", {}, CAPS, [v[:100] for v in scattered(3)[1]], False, 0),
            ("pieces not of whole pages", {}, CAPS, [v[1:] for v in scattered(3)[1]], False, 0),
            ("too many pieces", {"threads": 16000}, CAPS, scattered(3)[1], False, 0),
            ("mremap: Invalid argument", {}, CAPS, None, False, 0),
            ("not writable here", {}, CAPS, [memoryview(bytes(100))], False, 0),
            ("the kernel refuses it: ENOMEM", {}, CAPS, scattered(3)[1], False, errno.ENOMEM),
            ("the kernel refuses it: EFAULT", {}, CAPS, scattered(3)[1], False, errno.EFAULT),
            ("the kernel refuses it: EMFILE", {}, CAPS, scattered(3)[1], False, errno.EMFILE),
        ],
    )
    def test_copied(
        self,
        tmp_path: Path,
        ta: Ta,
        monkeypatch: pytest.MonkeyPatch,
        why: str,
        options: dict[str, object],
        caps: int,
        views: list[memoryview] | None,
        read_only: bool,
        refused: int,
    ) -> None:
        kernel = FakeKernel(tmp_path, ta, caps=caps)
        if "threads" in options:  # no such number of threads: the limit is what it is about
            options = {}
            monkeypatch.setattr("tee.io.linux_memory.map_count", lambda: 8)
        if views is None:
            private = memoryview(mmap.mmap(-1, 2 * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
            views = [private[:PAGE], private[PAGE:]]
        bench = Bench(kernel, **options)
        if refused:
            kernel.fail[Ioctl.SHM_REGISTER] = refused
        context, session = bench.opened()
        memory = bench.registered(context, Memory(views, read_only=read_only))
        before = memory.read(0, memory.size)
        if read_only or views[0].readonly:
            assert bench.invoke(session, LOOK, MemRef(IN, memory, 10, 20)).code == Result.SUCCESS
            assert ta.looked == [before[10:30]]
        else:
            assert bench.invoke(session, FLIP, MemRef(INOUT, memory, 10, 200)).code == Result.SUCCESS
            changed = bytes(byte ^ 0xFF for byte in before[10:210])
            assert memory.read(0, memory.size) == before[:10] + changed + before[210:]
        assert [p.why for p in bench.placed] == [why]
        assert bench.driver.usage()["registrations_copied"] == 1
        bench.invoke(session, LOOK, MemRef(IN, memory, 0, 1))
        assert len(bench.placed) == 1
        bench.end()

    def test_too_much_to_copy(self, bench: Bench, kernel: FakeKernel, ta: Ta) -> None:
        """It is refused before the kernel, or any byte, is touched; the pool serves the next."""
        _, session = bench.opened()
        half = Memory.of(bytearray(b"\x11" * (40 << 10)))
        before = kernel.calls["INVOKE"]
        done = bench.invoke(session, FLIP, MemRef(INOUT, half, 0, 40 << 10), MemRef(INOUT, half, 0, 40 << 10))
        assert (done.code, done.origin) == (Result.OUT_OF_MEMORY, Origin.COMMS)
        assert kernel.calls["INVOKE"] == before
        assert half.read(0, 40 << 10) == b"\x11" * (40 << 10)
        assert bench.invoke(session, FLIP, MemRef(INOUT, half, 0, 40 << 10)).code == Result.SUCCESS

    def test_nothing_is_left_of_another(self, bench: Bench, ta: Ta) -> None:
        """An output that is copied begins with zeros, whatever went that way before."""
        (_, one), (_, two) = bench.opened("one"), bench.opened("two")
        for _ in range(4):
            bench.invoke(one, FLIP, MemRef(INOUT, Memory.of(bytearray(b"secret" * 1000)), 0, 6000))
            bench.invoke(two, LOOK, MemRef(OUT, Memory.of(bytearray(b"\x99" * 6000)), 0, 6000))
        assert set(ta.looked) == {bytes(6000)}

    def test_only_what_was_answered_is_copied_back(self, bench: Bench) -> None:
        _, session = bench.opened()
        data = bytearray(b"\x22" * 100)
        assert bench.invoke(session, FILL, MemRef(OUT, Memory.of(data), 10, 50), Value(IN, 8)).code == Result.SUCCESS
        assert bytes(data) == b"\x22" * 10 + b"\x5a" * 8 + b"\x22" * 82
        param = MemRef(OUT, Memory.of(data), 0, 50)
        assert bench.invoke(session, SHORT, param).code == Result.SHORT_BUFFER
        assert (param.size, bytes(data[:18])) == (1000, b"\x22" * 10 + b"\x5a" * 8)

    @pytest.mark.parametrize(
        "param",
        [
            MemRef(INOUT, Memory.of(bytearray(10)), 5, 6),
            MemRef(INOUT, Memory.of(bytearray(10)), -1, 6),
            MemRef(INOUT, Memory.of(bytearray(10)), 0, -6),
            MemRef(INOUT, Memory.of(bytearray(10)), 2**64, 2**64),
            MemRef(OUT, Memory((memoryview(bytes(10)),), read_only=True), 0, 1),
            Value(IN, 1 << 64),
            Value(INOUT, 0, -1),
        ],
        ids=str,
    )
    def test_what_makes_no_sense(self, bench: Bench, kernel: FakeKernel, param: Param) -> None:
        _, session = bench.opened()
        before = kernel.calls["INVOKE"]
        assert (
            bench.invoke(session, FLIP, MemRef(IN, Memory.of(bytearray(9)), 0, 9), param).code == Result.BAD_PARAMETERS
        )
        assert kernel.calls["INVOKE"] == before
        assert bench.invoke(session, FLIP).code == Result.SUCCESS

    def test_a_handle_without_a_mapping(self, bench: Bench) -> None:
        context, session = bench.opened()
        memory = Memory(size=4096, ffa=FfaShare(5))
        assert bench.call(RegisterMemory(context=context, memory=memory)).code == Result.NOT_SUPPORTED
        assert bench.invoke(session, FLIP, MemRef(IN, memory, 0, 1)).code == Result.NOT_SUPPORTED

    def test_memory_of_another_context(self, bench: Bench) -> None:
        context, session = bench.opened()
        other = bench.context()
        memory = bench.registered(other, Memory.of(bytearray(10)))
        assert bench.invoke(session, FLIP, MemRef(IN, memory, 0, 1)).code == Result.BAD_PARAMETERS
        for call in (RegisterMemory(context=context, memory=memory), UnregisterMemory(context=context, memory=memory)):
            assert bench.call(call).code == Result.BAD_PARAMETERS
        memory.handle = "a handle of another driver"
        assert bench.invoke(session, FLIP, MemRef(IN, memory, 0, 1)).code == Result.BAD_PARAMETERS

    def test_unregister_waits_for_calls(self, bench: Bench, ta: Ta) -> None:
        context, session = bench.opened()
        memory = bench.registered(context, Memory(scattered(2)[1]))
        waiting = bench.waiting(session, ta, 1, MemRef(INOUT, memory, 0, 10))
        ending = bench.begin(UnregisterMemory(context=context, memory=memory))
        for _ in range(20):
            bench.driver.run()
        assert ending not in bench.done
        assert bench.invoke(session, LOOK, MemRef(IN, memory, 0, 1)).code == Result.BAD_PARAMETERS
        ta.go.set()
        assert bench.wait(ending).code == Result.SUCCESS
        assert bench.order.index(waiting) < bench.order.index(ending)
        assert memory.handle is None


class TestWaiting:
    """Calls that wait in the TEE."""

    @pytest.mark.feature("Linux TEE: a call that waits keeps no cancel, registration or end of another waiting")
    def test_with_one_thread(self, kernel: FakeKernel, ta: Ta) -> None:
        bench = Bench(kernel, threads=1)
        context, session = bench.opened("a")
        second = bench.session(context)
        waiting = bench.waiting(session, ta, 1)
        memory = bench.registered(context, Memory(scattered(2)[1]))
        assert bench.call(UnregisterMemory(context=context, memory=memory)).code == Result.SUCCESS
        assert bench.call(CloseSession(session=second)).code == Result.SUCCESS
        other = bench.context("b")
        assert bench.call(CloseContext(context=other)).code == Result.SUCCESS
        assert waiting not in bench.done
        bench.driver.cancel(waiting)
        assert bench.wait(waiting).code == Result.CANCEL
        bench.end()

    def test_a_call_that_has_not_begun_is_taken_back(self, kernel: FakeKernel, ta: Ta) -> None:
        bench = Bench(kernel, threads=1)
        _, session = bench.opened()
        first = bench.waiting(session, ta, 1)
        second = bench.begin(Invoke(session=session, func=FLIP))
        assert bench.driver.usage()["calls_waiting"] == 1
        bench.driver.cancel(second)
        assert bench.wait(second).code == Result.CANCEL
        assert first not in bench.done
        bench.driver.cancel(second)
        ta.go.set()
        assert bench.wait(first).code == Result.SUCCESS
        assert kernel.calls["INVOKE"] == 1
        bench.end()

    def test_a_cancel_before_the_call_has_arrived(self, bench: Bench, kernel: FakeKernel, ta: Ta) -> None:
        """The kernel knows nothing of it yet: it is tried again."""
        _, session = bench.opened()
        hold, real = threading.Event(), kernel._invoke

        def late(data: bytearray) -> None:
            hold.wait(PATIENCE)
            real(data)

        kernel._invoke = late  # type: ignore[method-assign]
        call = bench.begin(Invoke(session=session, func=WAIT, params=[Value(IN, 5)]))
        bench.until(lambda: kernel.calls["INVOKE"] == 1)
        bench.driver.cancel(call)
        bench.until(lambda: kernel.cancels)
        assert not kernel.cancels[0][2]
        hold.set()
        assert bench.wait(call).code == Result.CANCEL
        assert kernel.cancels[-1][2]

    def test_a_cancel_that_blocks_holds_up_nothing_but_cancels(self, bench: Bench, kernel: FakeKernel, ta: Ta) -> None:
        _, session = bench.opened()
        hold, real = threading.Event(), kernel._cancel

        def slow(data: bytearray) -> None:
            hold.wait(PATIENCE)
            real(data)

        kernel._cancel = slow  # type: ignore[method-assign]
        call = bench.waiting(session, ta, 3)
        bench.driver.cancel(call)
        assert bench.invoke(session, FLIP).code == Result.SUCCESS
        hold.set()
        assert bench.wait(call).code == Result.CANCEL

    @pytest.mark.feature("Linux TEE: calls of many guests have their turns, and none gets all threads")
    def test_turns(self, kernel: FakeKernel, ta: Ta) -> None:
        """One guest asks for much; the other two come as soon as it is their turn."""
        bench = Bench(kernel, threads=2)
        sessions = {vm: bench.opened(vm)[1] for vm in ("greedy", "b", "c")}
        calls = [
            bench.begin(Invoke(session=sessions["greedy"], func=WAIT, params=[Value(IN, 100 + number)]))
            for number in range(8)
        ]
        bench.until(lambda: ta.inside)
        assert bench.invoke(sessions["b"], ADD, Value(IN, 1), Value(OUT)).code == Result.SUCCESS
        assert bench.invoke(sessions["c"], ADD, Value(IN, 1), Value(OUT)).code == Result.SUCCESS
        assert list(ta.inside) == [100]
        ta.go.set()
        for call in calls:
            assert bench.wait(call).code == Result.SUCCESS
        bench.end()

    def test_round_robin(self, kernel: FakeKernel, ta: Ta) -> None:
        bench = Bench(kernel, threads=1)
        sessions = [bench.opened(vm)[1] for vm in "abc"]
        first = bench.waiting(sessions[0], ta, 1)
        calls = {}
        for vm, session in zip("abc", sessions, strict=True):
            for turn in range(3):
                calls[bench.begin(Invoke(session=session, func=FLIP))] = f"{vm}{turn}"
        ta.go.set()
        bench.until(lambda: len(bench.done) >= 6 + 10)
        order = [calls[call] for call in bench.order if call in calls]
        assert first in bench.done
        assert order == ["a0", "b0", "c0", "a1", "b1", "c1", "a2", "b2", "c2"]
        bench.end()

    def test_one_guest_alone_has_all_threads(self, kernel: FakeKernel, ta: Ta) -> None:
        bench = Bench(kernel, threads=2)
        _, session = bench.opened("a")
        bench.waiting(session, ta, 1)
        bench.waiting(session, ta, 2)
        assert bench.driver.usage()["threads_busy"] == 2
        bench.end()


class TestEnds:
    def test_a_context_that_closes(self, bench: Bench, kernel: FakeKernel, ta: Ta) -> None:
        """It ends all that is in it, in order."""
        context, session = bench.opened("a")
        bench.session(context)
        memory = bench.registered(context, Memory(scattered(2)[1]))
        calls = [bench.waiting(session, ta, 1, MemRef(INOUT, memory, 0, 9)), bench.waiting(session, ta, 2)]
        queued = bench.begin(Invoke(session=session, func=FLIP))
        opening = bench.begin(OpenSession(context=context, uuid=UUID_1))
        closing = bench.begin(CloseContext(context=context))
        assert bench.wait(closing).code == Result.SUCCESS
        assert [bench.done[call].code for call in (*calls, queued, opening)] == [Result.CANCEL] * 4
        assert bench.order[-1] is closing
        assert not kernel.sessions
        assert memory.handle is None
        for call in (
            CloseContext(context=context),
            CloseSession(session=session),
            Invoke(session=session, func=FLIP),
            OpenSession(context=context, uuid=UUID_1),
            RegisterMemory(context=context, memory=Memory.of(bytearray(1))),
        ):
            assert bench.call(call).code == Result.BAD_PARAMETERS

    def test_nothing_is_copied_to_a_guest_that_has_gone(self, bench: Bench, ta: Ta) -> None:
        """The call ends by itself, after its context was to close."""
        data = bytearray(b"\x33" * 100)
        context, session = bench.opened("a")
        ta.deaf = True
        call = bench.waiting(session, ta, 1, MemRef(INOUT, Memory.of(data), 0, 100))
        closing = bench.begin(CloseContext(context=context))
        ta.go.set()
        bench.wait(closing)
        assert bench.done[call].code == Result.SUCCESS
        assert bytes(data) == b"\x33" * 100

    def test_a_session_that_closes_cancels_its_calls(self, bench: Bench, kernel: FakeKernel, ta: Ta) -> None:
        context, session = bench.opened()
        other = bench.session(context)
        call, stays = bench.waiting(session, ta, 1), bench.waiting(other, ta, 2)
        closing = bench.begin(CloseSession(session=session))
        assert bench.call(CloseSession(session=session)).code == Result.BAD_PARAMETERS
        assert bench.wait(closing).code == Result.SUCCESS
        assert bench.done[call].code == Result.CANCEL
        assert stays not in bench.done
        assert len(kernel.sessions) == 1

    def test_a_session_that_the_kernel_does_not_close(self, bench: Bench, kernel: FakeKernel) -> None:
        _, session = bench.opened()
        kernel.fail[Ioctl.CLOSE_SESSION] = errno.EINVAL
        assert bench.call(CloseSession(session=session)).code == Result.SUCCESS
        kernel.fail.clear()
        kernel.sessions.clear()
        assert bench.invoke(session, FLIP).code == Result.BAD_PARAMETERS

    def test_unknown_calls_and_handles(self, bench: Bench) -> None:
        class Strange(Call):
            pass

        assert bench.call(Strange()).code == Result.NOT_SUPPORTED
        for nonsense in (None, 7, object()):
            assert bench.call(CloseContext(context=nonsense)).code == Result.BAD_PARAMETERS
            assert bench.call(Invoke(session=nonsense, func=1)).code == Result.BAD_PARAMETERS
        bench.driver.cancel(Invoke(session=None, func=1))
        bench.driver.answer(Rpc(0, []), RpcReply())

    def test_more_parameters_than_fit(self, bench: Bench, kernel: FakeKernel) -> None:
        _, session = bench.opened()
        assert bench.invoke(session, FLIP, *[Value(IN)] * MOST_PARAMS).code == Result.SUCCESS
        before = kernel.calls.total()
        assert bench.invoke(session, FLIP, *[Value(IN)] * (MOST_PARAMS + 1)).code == Result.BAD_PARAMETERS
        assert bench.invoke(session, 1 << 32).code == Result.BAD_PARAMETERS
        assert kernel.calls.total() == before


class TestErrors:
    @pytest.mark.parametrize(
        ("number", "code", "may_have_run"),
        [
            (errno.EBUSY, Result.BUSY, False),
            (errno.EINTR, Result.COMMUNICATION, True),
            (errno.ENOMEM, Result.OUT_OF_MEMORY, False),
            (errno.ENXIO, Result.TARGET_DEAD, False),
            (errno.EMFILE, Result.OUT_OF_MEMORY, False),
            (errno.EACCES, Result.ACCESS_DENIED, False),
            (errno.EPERM, Result.ACCESS_DENIED, False),
            (errno.ENOENT, Result.ITEM_NOT_FOUND, False),
            (errno.EINVAL, Result.BAD_PARAMETERS, False),
            (errno.EIO, Result.COMMUNICATION, True),
            (12345, Result.COMMUNICATION, True),
        ],
    )
    @pytest.mark.parametrize("which", [Ioctl.INVOKE, Ioctl.OPEN_SESSION])
    def test_what_the_kernel_refuses(
        self, bench: Bench, kernel: FakeKernel, which: Ioctl, number: int, code: Result, may_have_run: bool
    ) -> None:
        context, session = bench.opened()
        kernel.fail[which] = number
        call: Call = (
            Invoke(session=session, func=FLIP) if which == Ioctl.INVOKE else OpenSession(context=context, uuid=UUID_1)
        )
        done = bench.call(call)
        assert (done.code, done.origin, done.may_have_run, done.value) == (code, Origin.COMMS, may_have_run, None)
        kernel.fail.clear()

    def test_every_number_has_a_result(self) -> None:
        assert {errno.EBUSY, errno.ENOMEM, errno.ENXIO, errno.EMFILE, errno.EACCES, errno.ENOENT} <= RESULTS.keys()

    @pytest.mark.parametrize("number", [errno.ENODEV, errno.ESTALE, errno.ENXIO])
    def test_a_tee_that_was_lost_is_opened_anew(self, kernel: FakeKernel, number: int) -> None:
        """What was open is dead; who comes afterwards is served."""
        bench = Bench(kernel)
        context, session = bench.opened("old")
        kernel.fail[Ioctl.INVOKE] = number
        assert bench.invoke(session, FLIP).code == Result.TARGET_DEAD
        kernel.fail = {Ioctl.SHM_REGISTER: errno.ENODEV}
        assert bench.call(OpenContext(vm="new")).code == Result.TARGET_DEAD  # it has not come back yet
        kernel.fail.clear()
        _, again = bench.opened("new")
        assert bench.invoke(again, FLIP, MemRef(INOUT, Memory.of(bytearray(9)), 0, 9)).code == Result.SUCCESS
        files = open_files()
        assert bench.call(CloseContext(context=context)).code == Result.SUCCESS
        # the old device, and the memory for copies that it knew
        bench.until(lambda: open_files() == files - 2)
        bench.end()

    def test_no_device(self, tmp_path: Path, kernel: FakeKernel) -> None:
        before = os.listdir("/proc/self/fd")
        kernel.fail[Ioctl.VERSION] = errno.ENOTTY
        with pytest.raises(OSError, match="ioctl"):
            LinuxTeeDriver(kernel.open)
        kernel.fail = {Ioctl.SHM_REGISTER: errno.ENOMEM}
        with pytest.raises(OSError, match="memory"):
            LinuxTeeDriver(kernel.open)
        assert os.listdir("/proc/self/fd") == before

    def test_an_error_of_our_own(self, bench: Bench, kernel: FakeKernel, ta: Ta) -> None:
        _, session = bench.opened()

        def broken(data: bytearray) -> None:
            raise ZeroDivisionError

        real, kernel._invoke = kernel._invoke, broken  # type: ignore[method-assign]
        done = bench.invoke(session, FLIP)
        assert (done.code, done.may_have_run) == (Result.GENERIC, True)
        kernel._invoke = real  # type: ignore[method-assign]
        assert bench.invoke(session, FLIP).code == Result.SUCCESS


class TestLogins:
    def test_only_those_that_are_to_be(self, kernel: FakeKernel) -> None:
        """So the kernel makes no one identity of all guests' users, which are none of its own."""
        bench = Bench(kernel, logins=frozenset({Login.PUBLIC}))
        assert bench.driver.info.logins == {Login.PUBLIC}
        context = bench.context("a")
        for login in (Login.USER, Login.GROUP, Login.APPLICATION, Login.REE_KERNEL):
            call = OpenSession(context=context, uuid=UUID_1, client=Client(login, UUID(int=1000), "a"))
            assert bench.call(call).code == Result.ACCESS_DENIED
        assert not kernel.uuids
        bench.end()

    def test_a_guest_names_no_group_of_the_host(self, kernel: FakeKernel) -> None:
        bench = Bench(kernel)
        context = bench.context("a")
        call = OpenSession(context=context, uuid=UUID_1, client=Client(Login.GROUP, UUID(bytes=b"\x01" * 16), "a"))
        bench.call(call)
        assert list(kernel.sessions.values()) == [(Login.GROUP, os.getegid().to_bytes(16, "little"))]
        bench.end()


class TestRpcSource:
    def test_rpcs_come_and_are_answered(self, kernel: FakeKernel, ta: Ta) -> None:
        class Source:
            def __init__(self) -> None:
                self.calls: list[Call] = []
                self.entered: list[Call] = []
                self.answers: list[tuple[Rpc, RpcReply]] = []
                self.closed = False

            def attach(self, post: Post, sink: Sink) -> None:
                self.post, self.sink = post, sink

            def begun(self, call: OpenSession | Invoke, vm: str) -> None:
                self.calls.append(call)

            def enters(self, call: OpenSession | Invoke) -> None:
                self.entered.append(call)

            def ended(self, call: OpenSession | Invoke) -> None:
                self.calls.remove(call)

            def answer(self, rpc: Rpc, reply: RpcReply) -> None:
                self.answers.append((rpc, reply))

            def usage(self) -> dict[str, int]:
                return {"source": len(self.calls)}

            def close(self) -> None:
                self.closed = True

        source = Source()
        bench = Bench(kernel, rpcs=source)
        _, session = bench.opened()
        call = bench.waiting(session, ta, 1)
        assert source.calls == [call]
        assert source.entered[-1] is call
        assert bench.driver.usage()["source"] == 1
        rpc, reply = Rpc(0, [], call), RpcReply()
        threading.Thread(target=lambda: source.post(lambda: source.sink(rpc))).start()
        bench.until(lambda: bench.others)
        assert bench.others == [rpc]
        bench.driver.answer(rpc, reply)
        assert source.answers == [(rpc, reply)]
        bench.end()
        assert source.calls == []
        assert source.closed


def test_probing(kernel: FakeKernel) -> None:
    """By arguments that only a kernel with the call gets so far as to miss."""
    with kernel.open() as device:
        kernel.fail = {Ioctl.OBJECT_INVOKE: errno.EINVAL, Ioctl.SHM_REGISTER_FD: errno.EINVAL}
        assert (device.has_object_invoke(), device.has_register_fd()) == (False, False)
        kernel.fail = {Ioctl.OBJECT_INVOKE: errno.EFAULT, Ioctl.SHM_REGISTER_FD: errno.EBADF}
        assert (device.has_object_invoke(), device.has_register_fd()) == (True, True)


@pytest.mark.parametrize(
    ("path", "number", "what_to_do"),
    [
        ("/dev/no/tee9", errno.ENOENT, "modprobe"),
        ("/dev/tee0", errno.EACCES, "group"),
        ("/dev/teepriv0", errno.EPERM, 'KERNEL=="teepriv[0-9]*"'),
        ("/dev/teepriv0", errno.EBUSY, "systemctl stop tee-supplicant"),
        ("/dev/tee0", errno.ENXIO, "dmesg"),
        ("/dev/tee0", errno.ENODEV, "dmesg"),
        ("/dev/null", errno.ENOTTY, "/dev/tee0"),
        ("/dev/tee0", errno.EMFILE, "LimitNOFILE"),
        ("/dev/tee0", errno.ENOMEM, "--copy-mib"),
        ("/dev/tee0", errno.EBUSY, os.strerror(errno.EBUSY)),
        ("/dev/tee0", errno.EIO, os.strerror(errno.EIO)),
    ],
)
def test_advice(path: str, number: int, what_to_do: str) -> None:
    said = advice(path, OSError(number, os.strerror(number)))
    assert said.startswith(f"{path}: ")
    assert what_to_do in said
