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
from tee.soft import SoftTee

TEXT = (Path(__file__).parents[2] / "docs" / "tas.md").read_text()


def test_the_ta_of_the_text() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
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
