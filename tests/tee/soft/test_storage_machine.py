"""Secure storage against a model, with a supplicant that may do anything in between."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from tee.calls import Invoke
from tee.results import Result
from tee.rpc import FsCommand, Rpc, RpcCommand, RpcReply
from tee.soft.storage import BLOCK
from tests.tee.soft.test_storage import ALL, Act, World, Writer, get_, names, put_

NAMES = st.sampled_from([b"", b"a", b"b", bytes(64)])
SIZES = st.sampled_from([0, 1, 100, BLOCK, 5 * BLOCK + 3])
FAULTS = frozenset({Result.CORRUPT_OBJECT, Result.STORAGE_NOT_AVAILABLE, Result.STORAGE_NO_SPACE})


class Machine(RuleBasedStateMachine):
    """``model`` is what there must be. A failed change has changed nothing; a read gives the truth or fails."""

    @initialize()
    def begin(self) -> None:
        self.world = World()
        self.model: dict[bytes, bytes] = {}
        self.older: list[dict[str, bytes]] = []
        self.hurt = False  # the supplicant's files may not be what was written
        self.lie: tuple[FsCommand, str] | None = None
        self.known = True  # the model says what a new life of the TEE would find

    def act(self, act: Act) -> int:
        lie, self.lie = self.lie, None
        keeper = self.world.keeper
        Writer.act.append(act)
        call = self.world.bench.start(Invoke(session=self.world.session(), func=0))
        keeper.served = len(self.world.bench.rpcs())

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if lie is None or rpc.command != RpcCommand.FS or rpc.params[0].a != lie[0]:  # type: ignore[union-attr]
                return reply
            self.hurt = True
            if lie[1] == "fails":
                return RpcReply(Result.GENERIC)
            if lie[1] == "is not there":
                return RpcReply(Result.ITEM_NOT_FOUND)
            return RpcReply(params=reply.params[:1])

        keeper.serve(change)
        done = self.world.bench.finish(call)
        assert not keeper.held
        keeper.handles.clear()
        if lie is not None and done.code != Result.SUCCESS:
            self.known = False
        return done.code

    def changes(self, act: Act, after: dict[bytes, bytes], expected: int = Result.SUCCESS) -> None:
        code = self.act(act)
        if code == Result.SUCCESS == expected:
            self.model = after
        else:
            assert code == expected or (self.hurt and code in FAULTS), code

    @rule(name=NAMES, size=SIZES, fill=st.integers(0, 255))
    def put(self, name: bytes, size: int, fill: int) -> None:
        data = bytes([fill]) * size
        self.changes(put_(name, data), {**self.model, name: data})

    @rule(name=NAMES, position=SIZES, size=SIZES)
    def write(self, name: bytes, position: int, size: int) -> None:
        data = b"\x77" * size

        async def act(ta: Writer) -> None:
            with await ta.env.storage.open(name, ALL) as stored:
                stored.seek(position)
                await stored.write(data)

        old = self.model.get(name, b"")
        new = (old[:position].ljust(position, b"\0") + data + old[position + size :]) if size else old
        self.changes(
            act,
            {**self.model, name: new},
            Result.SUCCESS if name in self.model else Result.ITEM_NOT_FOUND,
        )

    @rule(name=NAMES, size=SIZES)
    def truncate(self, name: bytes, size: int) -> None:
        async def act(ta: Writer) -> None:
            with await ta.env.storage.open(name, ALL) as stored:
                await stored.truncate(size)

        expected = Result.SUCCESS if name in self.model else Result.ITEM_NOT_FOUND
        self.changes(act, {**self.model, name: self.model.get(name, b"")[:size].ljust(size, b"\0")}, expected)

    @rule(old=NAMES, new=NAMES)
    def rename(self, old: bytes, new: bytes) -> None:
        after = dict(self.model)
        expected = Result.ITEM_NOT_FOUND
        if old in after:
            expected = Result.ACCESS_CONFLICT if new in after else Result.SUCCESS
            after[new] = after.pop(old)
        self.changes(lambda ta: ta.env.storage.rename(old, new), after, expected)

    @rule(name=NAMES)
    def delete(self, name: bytes) -> None:
        after = {n: d for n, d in self.model.items() if n != name}
        expected = Result.SUCCESS if name in self.model else Result.ITEM_NOT_FOUND
        self.changes(lambda ta: ta.env.storage.delete(name), after, expected)

    @rule(name=NAMES)
    def get(self, name: bytes) -> None:
        code = self.act(get_(name))
        if code == Result.SUCCESS:
            assert Writer.result == self.model[name]
        else:
            absent = name not in self.model and code == Result.ITEM_NOT_FOUND
            assert absent or (self.hurt and code in FAULTS), code

    @rule()
    def enumerate(self) -> None:
        if self.act(names) == Result.SUCCESS:
            assert Writer.result == sorted((name, len(data)) for name, data in self.model.items())
        else:
            assert self.hurt

    @rule()
    def remember(self) -> None:
        self.older.append(dict(self.world.keeper.files))

    @rule(which=st.integers(0, 100), all_of_it=st.booleans())
    def roll_back(self, which: int, all_of_it: bool) -> None:
        if self.older:
            older = self.older[which % len(self.older)]
            files = self.world.keeper.files
            self.world.keeper.files = dict(older) if all_of_it else {**files, **older}
            self.hurt, self.known = True, False

    @rule(which=st.integers(0, 100), other=st.integers(0, 100), how=st.sampled_from(["flip", "cut", "swap", "remove"]))
    def tamper(self, which: int, other: int, how: str) -> None:
        files = self.world.keeper.files
        if not files:
            return
        name = sorted(files)[which % len(files)]
        if how == "flip" and files[name]:
            place = other % len(files[name])
            files[name] = files[name][:place] + bytes([files[name][place] ^ 0x80]) + files[name][place + 1 :]
        elif how == "cut":
            files[name] = files[name][: other % (len(files[name]) + 1)]
        elif how == "swap":
            files[name] = files[sorted(files)[other % len(files)]]
        elif how == "remove":
            del files[name]
        self.hurt, self.known = True, False

    @rule(command=st.sampled_from(FsCommand), how=st.sampled_from(["fails", "is not there", "makes no sense"]))
    def lie_next(self, command: FsCommand, how: str) -> None:
        self.lie = (command, how)

    @rule()
    def restart(self) -> None:
        """Another life of the TEE: what was undisturbed is all there."""
        if self.known:
            files = self.world.keeper.files
            hurt = self.hurt
            self.world = World()
            self.world.keeper.files = files
            self.hurt = hurt
            self.lie = None
            for name, data in self.model.items():
                assert self.world.get(name) == data
            assert self.world.do(names) == sorted((n, len(d)) for n, d in self.model.items())

    @invariant()
    def nothing_is_left(self) -> None:
        usage: dict[str, Any] = self.world.bench.tee.usage()
        assert (usage["calls"], usage["rpcs"], usage["threads_busy"]) == (0, 0, 0)


TestMachine = pytest.mark.filterwarnings("error")(Machine.TestCase)
TestMachine.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
