"""The TA of docs/tas.md works as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from uuid import UUID

from tee import package
from tee.calls import Invoke, OpenContext, OpenSession, RegisterMemory
from tee.driver import Done, Event
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.rpc import Rpc, RpcCommand, RpcReply
from tee.services import AcquireEnclave, CallEnclave, CallReturn, CreateEnclave, LoadService
from tee.soft import SoftTee
from tests.tee.bench import Bench

TEXT = (Path(__file__).parents[2] / "docs" / "tas.md").read_text()
CODE = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_ta_of_the_text() -> None:
    code, _ = CODE
    uuid = UUID(re.findall(r'UUID\("(.*?)"\)', code)[0])
    keys = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
    signed = package.sign(code.encode(), uuid, 0, keys.private)
    done: list[Done] = []
    tee = SoftTee(clock=lambda: 0.0, random=bytes, keys=[keys.public])

    memory = Memory.of(bytearray(len(signed)))

    def sink(event: Event) -> None:
        if isinstance(event, Done):
            done.append(event)
        elif isinstance(event, Rpc):
            tee.answer(event, serve(event))

    def serve(rpc: Rpc) -> RpcReply:
        if rpc.command == RpcCommand.SHM_ALLOC:
            return RpcReply(params=[MemRef(Direction.INOUT, memory, 0, memory.size)])
        if rpc.command == RpcCommand.LOAD_TA:
            where = rpc.params[1]
            assert isinstance(where, MemRef)
            if where.memory is not None:
                where.memory.write(where.offset, signed)
            return RpcReply(params=[rpc.params[0], MemRef(Direction.OUT, where.memory, where.offset, len(signed))])
        return RpcReply()

    def run() -> Done:
        while tee.run() == 0:
            pass
        return done.pop()

    tee.attach(sink)
    tee.start(OpenContext())
    context = run().value
    tee.start(RegisterMemory(context=context, memory=memory))
    run()
    tee.start(OpenSession(context=context, uuid=uuid))
    session = run().value
    total = Value(Direction.OUT)
    tee.start(Invoke(session=session, func=0, params=[Value(Direction.IN, 2, 3), total]))
    assert run().code == 0
    assert total.a == 5


def test_the_enclave_of_the_text() -> None:
    _, code = CODE
    uuid = UUID(re.findall(r'UUID\("(.*?)"\)', code)[0])
    keys = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
    bench = Bench(keys=[keys.public])
    signed = bytearray(package.sign(code.encode(), uuid, 0, keys.private))
    context = bench.context()
    given = MemRef(Direction.IN, Memory.of(signed), 0, len(signed))
    assert bench.done(LoadService(context=context, params=[given])).code == 0
    assert bench.done(CreateEnclave(context=context, uuid=uuid, name=b"tally")).code == 0
    server = bench.done(AcquireEnclave(context=context, name=b"tally")).value
    calls = [CallEnclave(context=context, server=server, regs=(number, *[0] * 7)) for number in (40, 2)]
    assert [bench.done(call).value for call in calls] == [CallReturn(40), CallReturn(42)]
