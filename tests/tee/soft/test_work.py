"""Work that cannot be cut into steps: on other threads, while the TEE goes on."""

from __future__ import annotations

import secrets
import select
import threading
import time
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from tee import package
from tee.calls import CloseContext, Invoke, OpenContext, OpenSession
from tee.io.runtime import TeeRuntime
from tee.io.services.ta_loader import MAX_TA_SIZE, TaLoader
from tee.io.workers import WorkerThreads
from tee.params import Direction, Value
from tee.results import Result, TeeError
from tee.rpc import RpcCommand, RpcReply
from tee.soft import SoftTee, examples
from tee.soft.ta import UUID, Parameters, TrustedApplication
from tests.tee.bench import HELLO, IDLE, PROBE, Bench


class Digger(TrustedApplication):
    """Command 0 works, command 1 works again after work that was cancelled."""

    uuid = UUID(int=0xD1)
    work: ClassVar[Callable[[], Any]] = lambda: None
    got: ClassVar[list[object]] = []

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        self.env.unmask_cancellation()
        try:
            self.got.append(await self.env.work(type(self).work))
        except TeeError as error:
            self.got.append(error.code)
            if not command:
                raise
            self.env.mask_cancellation()
            self.got.append(await self.env.work(lambda: "again"))


class Waiting:
    """Workers that work when a test says so."""

    def __init__(self) -> None:
        self.work: list[tuple[Callable[[], Any], Any]] = []
        self.over: list[Callable[[], None]] = []

    def submit(self, function: Callable[[], Any], ended: Any) -> None:
        self.work.append((function, ended))

    def do(self) -> None:
        function, ended = self.work.pop(0)
        try:
            value = function()
        except Exception as error:
            failed = error
            self.over.append(lambda: ended(None, failed))
        else:
            self.over.append(lambda: ended(value, None))

    def collect(self) -> None:
        while self.over:
            self.over.pop(0)()

    def fileno(self) -> int:
        return 12345


@pytest.fixture
def bench() -> Bench:
    Digger.got.clear()
    Digger.work = staticmethod(lambda: 42)
    return Bench(built_in={**examples.built_in(), Digger.uuid: Digger}, workers=Waiting(), threads=2)


def workers_of(bench: Bench) -> Waiting:
    assert isinstance(bench.tee._workers, Waiting)
    return bench.tee._workers


def dig(bench: Bench, command: int = 0) -> Invoke:
    session = bench.session(bench.context(), Digger.uuid)
    call = bench.start(Invoke(session=session, func=command))
    bench.run()
    assert isinstance(call, Invoke)
    return call


def test_others_run_meanwhile(bench: Bench) -> None:
    call = dig(bench)
    assert bench.invoke(bench.session(bench.context()), 0).code == 0
    assert bench.ended(call) is None
    workers_of(bench).do()
    assert bench.finish(call).code == 0
    assert Digger.got == [42]
    assert bench.tee.fileno() == 12345


def test_what_it_raises_is_the_tas(bench: Bench) -> None:
    def fails() -> None:
        raise TeeError(Result.BAD_STATE)

    Digger.work = staticmethod(fails)
    call = dig(bench)
    workers_of(bench).do()
    assert bench.finish(call).code == Result.BAD_STATE
    Digger.work = staticmethod(lambda: 1 // 0)
    call = dig(bench)
    workers_of(bench).do()
    assert bench.finish(call).code == Result.TARGET_DEAD


@pytest.mark.parametrize("how", ["cancel", "close"])
def test_nobody_waits_for_work_in_vain(bench: Bench, how: str) -> None:
    call = dig(bench)
    if how == "cancel":
        bench.tee.cancel(call)
    else:
        bench.start(CloseContext(context=call.session.context))  # type: ignore[attr-defined]
    assert bench.finish(call).code == Result.CANCEL
    workers_of(bench).do()
    bench.run()
    assert Digger.got == [Result.CANCEL]


def test_what_comes_too_late_wakes_nobody(bench: Bench) -> None:
    """The TA waits for something else by then."""
    call = dig(bench, 1)
    bench.tee.cancel(call)
    bench.run()
    workers_of(bench).do()
    bench.run()
    assert bench.ended(call) is None
    workers_of(bench).do()
    assert bench.finish(call).code == 0
    assert Digger.got == [Result.CANCEL, "again"]


def test_without_workers(bench: Bench) -> None:
    alone = Bench(built_in={Digger.uuid: Digger})
    assert alone.invoke(alone.session(alone.context(), Digger.uuid), 0).code == 0
    assert alone.tee.fileno() is None
    assert Digger.got == [42]


@pytest.mark.feature("TAs: long steps run beside the TEE (a 4096-bit key holds nobody up)")
def test_threads() -> None:
    """The acipher's key is made on a thread, and the runtime hears of it. Another call gets through meanwhile."""
    begun, go_on = threading.Event(), threading.Event()

    def work() -> int:
        begun.set()
        assert go_on.wait(20)
        return threading.get_ident()

    Digger.got.clear()
    Digger.work = staticmethod(work)
    workers = WorkerThreads()
    tee = SoftTee(
        clock=time.monotonic,
        random=secrets.token_bytes,
        built_in={**examples.built_in(), Digger.uuid: Digger},
        workers=workers,
    )
    with TeeRuntime(tee) as runtime:
        context = runtime.call(OpenContext()).value
        digger, probe, acipher = (
            runtime.call(OpenSession(context=context, uuid=uuid)).value
            for uuid in (Digger.uuid, PROBE, examples.UUIDS["acipher"])
        )
        pending = runtime.submit(Invoke(session=digger, func=0))
        assert begun.wait(10)
        assert runtime.call(Invoke(session=probe, func=0), 10).code == 0
        made = runtime.call(Invoke(session=acipher, func=0, params=[Value(Direction.IN, 1024)]), 60)
        assert made.code == 0
        go_on.set()
        assert pending.wait(10).code == 0
    workers.close()
    assert Digger.got != [threading.get_ident()]
    assert tee.usage() == IDLE


def test_worker_threads_are_bounded() -> None:
    workers = WorkerThreads(2)
    running, most, lock, go_on = [0], [0], threading.Lock(), threading.Event()
    ended: list[object] = []

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(running[0], most[0])
        assert go_on.wait(20)
        with lock:
            running[0] -= 1

    for _ in range(6):
        workers.submit(work, lambda value, error: ended.append(error))
    workers.submit(lambda: 1 // 0, lambda value, error: ended.append(type(error)))
    assert ended == []
    go_on.set()
    while len(ended) < 7:
        assert select.select([workers.fileno()], [], [], 20)[0]
        workers.collect()
    assert ended.count(None) == 6
    assert ZeroDivisionError in ended
    assert most[0] <= 2
    workers.close()


# -- TAs of the host


class TestHostTas:
    @pytest.fixture
    def folder(self, tmp_path: Any, keys: package.KeyPair) -> Any:
        (tmp_path / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 1, keys.private))
        return tmp_path

    def bench(self, folder: Any, keys: package.KeyPair, **more: Any) -> Bench:
        host = TaLoader([folder], MAX_TA_SIZE, lambda _: None).read
        return Bench(built_in={}, keys=[keys.public], host_tas=host, **more)

    @pytest.mark.feature("TAs: from a folder of the host, where a guest has none")
    @pytest.mark.fault("no-supplicant")
    @pytest.mark.parametrize("code", [Result.ITEM_NOT_FOUND, Result.COMMUNICATION, Result.NOT_SUPPORTED])
    def test_where_the_guest_has_none(self, folder: Any, keys: package.KeyPair, code: int) -> None:
        bench = self.bench(folder, keys)
        call = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.answer(bench.rpc(), code)
        assert bench.finish(call).code == 0
        assert [rpc.command for rpc in bench.rpcs()] == [RpcCommand.LOAD_TA]

    @pytest.mark.parametrize("code", [Result.ACCESS_DENIED, Result.BUSY, Result.OUT_OF_MEMORY, Result.GENERIC])
    def test_other_errors_are_the_guests(self, folder: Any, keys: package.KeyPair, code: int) -> None:
        bench = self.bench(folder, keys)
        call = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.answer(bench.rpc(), code)
        assert bench.finish(call).code == code

    def test_a_cancelled_load_is_not_begun_again(self, folder: Any, keys: package.KeyPair) -> None:
        bench = self.bench(folder, keys)
        call = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.run()
        bench.tee.cancel(call)
        assert bench.finish(call).code == Result.CANCEL

    def test_nowhere(self, folder: Any, keys: package.KeyPair) -> None:
        bench = self.bench(folder, keys)
        call = bench.start(OpenSession(context=bench.context(), uuid=UUID(int=5)))
        bench.answer(bench.rpc(), Result.ITEM_NOT_FOUND)
        assert bench.finish(call).code == Result.ITEM_NOT_FOUND

    @pytest.mark.parametrize(
        ("data", "code"), [(b"", Result.BAD_FORMAT), (b"no package", Result.BAD_FORMAT), (None, Result.SECURITY)]
    )
    def test_it_is_verified_too(self, folder: Any, keys: package.KeyPair, data: bytes | None, code: int) -> None:
        if data is None:
            other = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
            data = package.sign(examples.source("hello_world"), HELLO, 1, other.private)
        (folder / f"{HELLO}.ta").write_bytes(data)
        bench = self.bench(folder, keys)
        call = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.answer(bench.rpc(), Result.ITEM_NOT_FOUND)
        assert bench.finish(call).code == code

    def test_errors_of_the_disk_end_the_load_alone(self, keys: package.KeyPair) -> None:
        def broken(_: UUID) -> bytes:
            raise OSError("no disk")

        bench = Bench(built_in={}, keys=[keys.public], host_tas=broken)
        call = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.tee.run()
        bench.tee.answer(bench.rpc(), RpcReply(Result.ITEM_NOT_FOUND))
        assert bench.finish(call).code == Result.GENERIC
        assert any("no disk" in line for line in bench.logged)

    def test_the_folder_is_read_by_workers(self, folder: Any, keys: package.KeyPair) -> None:
        workers = Waiting()
        bench = self.bench(folder, keys, workers=workers)
        call = bench.start(OpenSession(context=bench.context(), uuid=HELLO))
        bench.answer(bench.rpc(), Result.ITEM_NOT_FOUND)
        assert bench.ended(call) is None
        workers.do()
        assert bench.finish(call).code == 0
        assert bench.tee.usage()["calls"] == 0
