"""Secure storage: what TAs see, what the supplicant sees, and what a lying one gets."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from typing import Any
from uuid import UUID

import pytest

from tee.calls import CloseContext, CloseSession, Invoke
from tee.memory import Memory
from tee.params import Direction, MemRef, Value
from tee.results import Result, TeeError
from tee.rpc import FsCommand, Rpc, RpcCommand, RpcReply
from tee.soft.limits import SoftLimits
from tee.soft.outside import FREE_TIMEOUT
from tee.soft.storage import BLOCK, FS_TIMEOUT, MAX_POSITION
from tee.soft.ta import DataFlag, Parameters, TrustedApplication
from tests.tee.bench import IDLE, PROBE, Bench
from tests.tee.soft.keeper import Change, Keeper, put

READ, WRITE, META = DataFlag.ACCESS_READ, DataFlag.ACCESS_WRITE, DataFlag.ACCESS_WRITE_META
SHARE_READ, SHARE_WRITE, OVERWRITE = DataFlag.SHARE_READ, DataFlag.SHARE_WRITE, DataFlag.OVERWRITE
ALL = READ | WRITE | META
KEY = bytes(range(32))

Act = Callable[["Writer"], Awaitable[Any]]


class Writer(TrustedApplication):
    """Does what a test says, inside a call."""

    uuid = UUID(int=200)
    act: list[Act] = []  # noqa: RUF012
    result: Any = None

    async def invoke(self, session: object, command: int, params: Parameters) -> None:
        Writer.result = await Writer.act.pop(0)(self)


class Other(Writer):
    uuid = UUID(int=201)


class World:
    """A TEE with a writing TA, and a keeper for each machine."""

    def __init__(self, *vms: str, **options: Any) -> None:
        Writer.act = []
        options.setdefault("storage_key", KEY)
        tas = {ta.uuid: ta for ta in (Writer, Other)}
        self.bench = Bench(built_in={**tas, PROBE: Writer}, **options)
        self.bench.tee._vault.random = secrets.token_bytes
        self.keepers = {vm: Keeper(self.bench, vm=vm) for vm in vms or ("",)}
        self.sessions: dict[tuple[str, UUID], Any] = {}
        self.contexts = {vm: self.bench.context(vm) for vm in self.keepers}

    @property
    def keeper(self) -> Keeper:
        return self.keepers[""]

    def session(self, vm: str = "", uuid: UUID = Writer.uuid) -> Any:
        if (vm, uuid) not in self.sessions:
            self.sessions[vm, uuid] = self.bench.session(self.contexts[vm], uuid)
        return self.sessions[vm, uuid]

    def code(self, act: Act, vm: str = "", uuid: UUID = Writer.uuid, change: Change | None = None) -> int:
        Writer.act.append(act)
        call = self.bench.start(Invoke(session=self.session(vm, uuid), func=0))
        self.keepers[vm].served = len(self.bench.rpcs())
        self.keepers[vm].serve(change)
        done = self.bench.finish(call)
        assert not self.keepers[vm].held, "memory was not given back"
        assert not self.keepers[vm].handles, "a file was left open"
        return done.code

    def do(self, act: Act, vm: str = "", uuid: UUID = Writer.uuid) -> Any:
        assert self.code(act, vm, uuid) == Result.SUCCESS
        return Writer.result

    def put(self, name: bytes, data: bytes, vm: str = "", uuid: UUID = Writer.uuid) -> None:
        self.do(put_(name, data), vm, uuid)

    def get(self, name: bytes, vm: str = "", uuid: UUID = Writer.uuid) -> bytes:
        return self.do(get_(name), vm, uuid)  # type: ignore[no-any-return]


def put_(name: bytes, data: bytes) -> Act:
    async def act(ta: Writer) -> None:
        (await ta.env.storage.create(name, data, ALL | OVERWRITE)).close()

    return act


def get_(name: bytes) -> Act:
    async def act(ta: Writer) -> bytes:
        with await ta.env.storage.open(name, READ | SHARE_READ) as stored:
            return await stored.read()

    return act


async def names(ta: Writer) -> list[tuple[bytes, int]]:
    return await ta.env.storage.enumerate()


async def nothing(ta: Writer) -> None:
    return


@pytest.fixture
def world() -> World:
    return World()


@pytest.mark.feature("TAs: secure storage, sealed, its bytes with the supplicant")
class TestObjects:
    @pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 4 * BLOCK, 5 * BLOCK, 9 * BLOCK + 7])
    def test_content_comes_back(self, world: World, size: int) -> None:
        data = secrets.token_bytes(size)
        world.put(b"a", data)
        assert world.get(b"a") == data
        assert world.do(names) == [(b"a", size)]
        assert world.bench.tee.usage()["rpcs"] == 0

    def test_position_read_write_truncate(self, world: World) -> None:
        async def act(ta: Writer) -> list[object]:
            stored = await ta.env.storage.create(b"a", b"0123456789")
            seen: list[object] = [await stored.read(3), await stored.read(0), stored.position]
            await stored.write(b"xyz")
            seen += [await stored.read(), stored.seek(-2, 2), await stored.read(100), await stored.read()]
            stored.seek(12)
            await stored.write(b"!")
            await stored.write(b"")
            await stored.truncate(14)
            stored.seek(0)
            seen += [await stored.read(), stored.size]
            await stored.truncate(2)
            seen += [stored.position, await stored.read(), stored.seek(-100, 1), await stored.read()]
            return seen

        assert world.do(act) == [
            *(b"012", b"", 3, b"6789", 8, b"89", b""),
            *(b"012xyz6789\0\0!\0", 14, 14, b"", 0, b"01"),
        ]

    def test_positions_have_an_end(self, world: World) -> None:
        async def act(ta: Writer) -> None:
            (await ta.env.storage.create(b"a")).seek(MAX_POSITION + 1)

        assert world.code(act) == Result.OVERFLOW

    def test_create_open_delete_rename(self, world: World) -> None:
        async def again(ta: Writer) -> None:
            await ta.env.storage.create(b"a", b"2")

        async def rename(ta: Writer) -> None:
            with await ta.env.storage.open(b"a", META) as stored:
                await stored.rename(b"b")
                assert stored.name == b"b"
            await ta.env.storage.rename(b"b", b"c" * 64)

        async def clash(ta: Writer) -> None:
            await ta.env.storage.create(b"x")
            await ta.env.storage.rename(b"c" * 64, b"x")

        async def delete(ta: Writer) -> None:
            await (await ta.env.storage.open(b"c" * 64, META)).delete()

        world.put(b"a", b"1")
        assert world.code(again) == Result.ACCESS_CONFLICT
        world.put(b"a", b"2")
        world.do(rename)
        assert world.get(b"c" * 64) == b"2"
        assert world.code(get_(b"a")) == Result.ITEM_NOT_FOUND
        assert world.code(clash) == Result.ACCESS_CONFLICT
        world.do(delete)
        assert world.code(get_(b"c" * 64)) == Result.ITEM_NOT_FOUND
        assert world.code(lambda ta: ta.env.storage.delete(b"none")) == Result.ITEM_NOT_FOUND
        assert world.code(lambda ta: ta.env.storage.create(b"c" * 65)) == Result.BAD_PARAMETERS

    @pytest.mark.parametrize(
        ("first", "second", "fits"),
        [
            (READ, READ, False),
            (READ | SHARE_READ, READ, False),
            (READ | SHARE_READ, READ | SHARE_READ, True),
            (WRITE | SHARE_WRITE, WRITE | SHARE_WRITE, True),
            (WRITE | SHARE_WRITE, WRITE, False),
            (READ | SHARE_READ, WRITE | SHARE_WRITE, False),
            (READ | SHARE_READ | SHARE_WRITE, WRITE | SHARE_READ | SHARE_WRITE, True),
            (META, READ | SHARE_READ, False),
            (READ | SHARE_READ, META | SHARE_READ, False),
        ],
    )
    def test_sharing(self, world: World, first: DataFlag, second: DataFlag, fits: bool) -> None:
        async def act(ta: Writer) -> None:
            with await ta.env.storage.open(b"a", first):
                (await ta.env.storage.open(b"a", second)).close()

        world.put(b"a", b"1")
        assert world.code(act) == (Result.SUCCESS if fits else Result.ACCESS_CONFLICT)
        world.put(b"a", b"2")  # both are closed again

    @pytest.mark.parametrize(
        "act",
        [
            lambda s: s.create(b"a", b"", ALL | OVERWRITE),
            lambda s: s.delete(b"a"),
            lambda s: s.rename(b"a", b"b"),
        ],
    )
    def test_what_is_open_is_not_replaced(self, world: World, act: Any) -> None:
        async def inside(ta: Writer) -> None:
            with await ta.env.storage.open(b"a"):
                await act(ta.env.storage)

        world.put(b"a", b"1")
        assert world.code(inside) == Result.ACCESS_CONFLICT
        assert world.get(b"a") == b"1"

    def test_rights(self, world: World) -> None:
        world.put(b"a", b"1")

        async def act(ta: Writer) -> list[int]:
            codes = []
            with await ta.env.storage.open(b"a", SHARE_READ) as stored:
                for work in (
                    stored.read(),
                    stored.write(b"1"),
                    stored.truncate(0),
                    stored.rename(b"b"),
                    stored.delete(),
                ):
                    try:
                        await work
                    except TeeError as error:
                        codes.append(error.code)
            with pytest.raises(TeeError) as closed:
                await stored.read()
            return [*codes, closed.value.code]

        assert world.do(act) == [Result.ACCESS_CONFLICT] * 5 + [Result.BAD_STATE]

    def test_handles_end_with_the_instance(self, world: World) -> None:
        async def keep(ta: Writer) -> None:
            await ta.env.storage.create(b"a")

        async def panic(ta: Writer) -> None:
            await ta.env.storage.open(b"a", META)
            raise RuntimeError

        world.do(keep)
        assert world.code(get_(b"a"), uuid=PROBE) == Result.ITEM_NOT_FOUND  # another TA
        world.bench.done(CloseSession(session=world.sessions.pop(("", Writer.uuid))))
        assert world.code(panic) == Result.TARGET_DEAD
        world.sessions.clear()
        assert world.get(b"a") == b""

    def test_limits(self) -> None:
        world = World(limits=SoftLimits(objects=2, object_size=100, open_objects=1))

        async def two(ta: Writer) -> None:
            await ta.env.storage.create(b"a", b"1", ALL | OVERWRITE)
            await ta.env.storage.create(b"b")

        assert world.code(two) == Result.OUT_OF_MEMORY
        world.bench.done(CloseSession(session=world.sessions.pop(("", Writer.uuid))))
        world.put(b"b", bytes(100))
        assert world.code(put_(b"c", b"")) == Result.STORAGE_NO_SPACE
        assert world.code(put_(b"b", bytes(101))) == Result.STORAGE_NO_SPACE
        assert len(world.get(b"b")) == 100
        for grow in (lambda s: s.truncate(101), lambda s: s.write(bytes(101))):

            async def act(ta: Writer, grow: Any = grow) -> None:
                with await ta.env.storage.open(b"a", ALL) as stored:
                    await grow(stored)

            assert world.code(act) == Result.STORAGE_NO_SPACE
        assert world.get(b"a") == b"1"


class TestIsolation:
    def test_between_tas_and_machines(self) -> None:
        world = World("a", "b")
        for vm, uuid in (("a", Writer.uuid), ("a", Other.uuid), ("b", Writer.uuid)):
            world.put(b"name", vm.encode() + uuid.bytes, vm, uuid)
        for vm, uuid in (("a", Writer.uuid), ("a", Other.uuid), ("b", Writer.uuid)):
            assert world.get(b"name", vm, uuid) == vm.encode() + uuid.bytes
        assert world.do(names, "b", Other.uuid) == []
        folders = {name.split("/")[0] for keeper in world.keepers.values() for name in keeper.files}
        assert len(folders) == 3

    def test_an_object_of_another_machine(self) -> None:
        class One(Writer):
            uuid = UUID(int=202)
            single_instance = multi_session = True
            held: list[Any] = []  # noqa: RUF012

        world = World("a", "b")
        world.bench.tee._built_in[One.uuid] = type(next(iter(world.bench.tee._built_in.values())))(One.uuid, One, 0)

        async def keep(ta: Writer) -> None:
            One.held.append(await ta.env.storage.create(b"a", b"1"))

        world.do(keep, "a", One.uuid)
        assert world.code(lambda ta: One.held[0].read(), "b", One.uuid) == Result.BAD_STATE
        assert world.do(lambda ta: One.held[0].read(), "a", One.uuid) == b"1"

    def test_the_supplicant_sees_nothing(self, world: World) -> None:
        world.put(b"credit-card", b"4242424242424242" * 10)
        seen = "".join(world.keeper.files) + repr(world.keeper.files)
        assert "credit" not in seen
        assert "4242" not in seen
        assert str(Writer.uuid) not in seen
        before = dict(world.keeper.files)
        world.put(b"credit-card", b"4242424242424242" * 10)
        assert not set(before.values()) & set(world.keeper.files.values())

    def test_one_key_one_storage(self) -> None:
        world = World()
        world.put(b"a", b"1")
        again, stranger = World(), World(storage_key=bytes(32))
        again.keeper.files = stranger.keeper.files = world.keeper.files
        assert again.get(b"a") == b"1"
        assert stranger.do(names) == []
        with pytest.raises(ValueError, match="16 bytes"):
            World(storage_key=b"short")

    def test_without_a_key_each_tee_has_its_own(self) -> None:
        world = World(storage_key=None)
        world.put(b"a", b"1")
        again = World(storage_key=None)
        again.keeper.files = world.keeper.files
        assert again.do(names) == []


def tampered(world: World, how: str) -> None:
    """The object "a" has been "first", is "second"; the same with "b"."""
    files = world.keeper.files
    (a,) = [name for name in files if name not in world.before_a and "index" not in name]  # type: ignore[attr-defined]
    if how == "flipped":
        files[a] = files[a][:-1] + bytes([files[a][-1] ^ 1])
    elif how == "truncated":
        files[a] = files[a][:-1]
    elif how == "empty":
        files[a] = b""
    elif how == "older":
        files[a] = world.older  # type: ignore[attr-defined]
    elif how == "another object's":
        files[a] = next(c for n, c in files.items() if n != a and "index" not in n)
    else:
        del files[a]


class TestLies:
    @pytest.mark.parametrize("how", ["flipped", "truncated", "empty", "older", "another object's", "gone"])
    def test_files_that_are_not_what_was_written(self, world: World, how: str) -> None:
        world.put(b"b", b"other")
        names_before = set(world.keeper.files)
        world.put(b"a", b"first")
        (older,) = [c for n, c in world.keeper.files.items() if n not in names_before]
        world.older = older  # type: ignore[attr-defined]
        world.before_a = names_before  # type: ignore[attr-defined]
        world.put(b"a", b"later")
        tampered(world, how)
        assert world.code(get_(b"a")) == Result.CORRUPT_OBJECT
        assert world.get(b"b") == b"other"
        world.do(lambda ta: ta.env.storage.delete(b"a"))
        world.put(b"a", b"anew")
        assert world.get(b"a") == b"anew"

    def test_all_of_an_older_state_in_one_life(self, world: World) -> None:
        world.put(b"a", b"first")
        older = dict(world.keeper.files)
        world.put(b"a", b"later")
        world.keeper.files = older
        assert world.code(get_(b"a")) == Result.CORRUPT_OBJECT

    @pytest.mark.parametrize("how", ["flipped", "short", "none", "magic", "endless", "another's"])
    def test_the_index_of_an_earlier_life(self, how: str) -> None:
        old = World()
        old.put(b"a", b"1")
        old.put(b"a", b"1", uuid=Other.uuid)
        world = World(limits=SoftLimits(objects=2))
        files = world.keeper.files = old.keeper.files
        indexes = [name for name in files if name.endswith("index")]
        for name in indexes:
            files[name] = {
                "flipped": files[name][:-1] + bytes([files[name][-1] ^ 1]),
                "short": files[name][:50],
                "none": b"",
                "magic": b"x" + files[name][1:],
                "endless": files[name] + bytes(1 << 20),
                "another's": files[indexes[indexes[0] == name]],
            }[how]
        assert world.code(names) == Result.CORRUPT_OBJECT
        assert world.code(put_(b"b", b"")) == Result.CORRUPT_OBJECT
        del files[indexes[0]]  # whoever runs the machine can begin anew
        assert world.do(names) == []

    @pytest.mark.parametrize("command", [c for c in FsCommand if c != FsCommand.TRUNCATE])
    @pytest.mark.parametrize(
        "lie",
        [
            "no parameters",
            "too many",
            "other kinds",
            "huge",
            "negative",
            *(Result.GENERIC, Result.NOT_SUPPORTED, Result.STORAGE_NO_SPACE, Result.ITEM_NOT_FOUND, 0x12345678),
        ],
    )
    def test_answers_that_make_no_sense(self, command: FsCommand, lie: str | int) -> None:
        old = World()
        old.put(b"a", bytes(100))
        world = World()
        world.keeper.files = old.keeper.files

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if rpc.command != RpcCommand.FS or rpc.params[0].a != command:  # type: ignore[union-attr]
                return reply
            if isinstance(lie, int):
                return RpcReply(lie)
            if lie in ("no parameters", "too many"):
                return RpcReply(params=[] if lie == "no parameters" else reply.params * 2)
            for param in reply.params[1:]:
                if isinstance(param, Value):
                    param.a = 1 << 64 if lie == "huge" else -1
                elif isinstance(param, MemRef):
                    param.size = 1 << 40 if lie == "huge" else -1
            return RpcReply(params=[Value(Direction.IN)] * len(reply.params)) if lie == "other kinds" else reply

        allowed = {Result.SUCCESS, Result.CORRUPT_OBJECT, Result.STORAGE_NOT_AVAILABLE, Result.STORAGE_NO_SPACE}
        for act in (names, put_(b"a", b"later"), get_(b"a")):
            Writer.act.append(act)
            call = world.bench.start(Invoke(session=world.session(), func=0))
            world.keeper.served = len(world.bench.rpcs())
            world.keeper.serve(change)
            assert world.bench.finish(call).code in allowed
            world.keeper.held.clear()
        world.keeper.handles.clear()
        # Whatever was said: what the supplicant has now is one of the two, or is found out.
        assert world.code(get_(b"a")) in (Result.SUCCESS, Result.CORRUPT_OBJECT)

    def test_readdir_that_never_ends(self, world: World) -> None:
        """What was left over in an earlier life is looked for, but not for ever."""
        old = World()
        old.put(b"a", b"1")
        world = World(limits=SoftLimits(objects=10))
        world.keeper.files = old.keeper.files

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if rpc.command == RpcCommand.FS and rpc.params[0].a == FsCommand.READDIR:  # type: ignore[union-attr]
                return RpcReply(params=[rpc.params[0], put(rpc.params[1], b"x" * 512)])
            return reply

        assert world.code(get_(b"a"), change=change) == Result.SUCCESS
        assert world.keeper.commands.count(FsCommand.READDIR) == 36

    def test_left_overs_of_an_earlier_life_are_swept(self) -> None:
        old = World()
        old.put(b"a", b"1")
        (folder,) = {name.split("/")[0] for name in old.keeper.files}
        old.keeper.files |= {f"{folder}/{'0' * 32}": b"x", f"{folder}/index.new": b"y", f"{folder}/readme": b"z"}
        world = World()
        world.keeper.files = old.keeper.files
        assert world.get(b"a") == b"1"
        assert len(world.keeper.files) == 3
        assert f"{folder}/readme" in world.keeper.files


class TestSupplicants:
    def test_absent(self, world: World) -> None:
        world.keeper.present = False
        for act in (names, put_(b"a", b""), get_(b"a")):
            assert world.code(act) == Result.STORAGE_NOT_AVAILABLE
        world.keeper.present = True
        world.put(b"a", b"1")
        world.keeper.present = False
        assert world.code(get_(b"a")) == Result.STORAGE_NOT_AVAILABLE
        world.keeper.present = True
        assert world.get(b"a") == b"1"

    @pytest.mark.parametrize("code", [Result.OUT_OF_MEMORY, Result.NOT_SUPPORTED])
    def test_no_memory(self, world: World, code: int) -> None:
        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            if rpc.command != RpcCommand.SHM_ALLOC:
                return reply
            world.keeper.held.clear()
            return RpcReply(code)

        expected = code if code == Result.OUT_OF_MEMORY else Result.STORAGE_NOT_AVAILABLE
        assert world.code(names, change=change) == expected

    def test_silent(self, world: World) -> None:
        """It is waited for, but not for ever; others of the same TA wait in turn, and go on."""
        Writer.act += [names, names]
        context = world.contexts[""]
        calls = [world.bench.start(Invoke(session=world.bench.session(context, Writer.uuid), func=0)) for _ in "12"]
        world.keeper.serve(lambda rpc, reply: reply if rpc.command != RpcCommand.FS else None)
        assert [world.bench.ended(call) for call in calls] == [None, None]
        world.bench.now += FS_TIMEOUT
        world.bench.run()
        world.keeper.serve()
        assert world.bench.finish(calls[0]).code == Result.STORAGE_NOT_AVAILABLE
        assert world.bench.finish(calls[1]).code == Result.SUCCESS

    def test_dies_at_each_step_of_a_change(self) -> None:
        """Crash consistency: after each of the RPCs of a change the supplicant, and then also the TEE, is lost."""
        count = 0
        while True:
            world = World()
            world.put(b"a", b"old")
            world.put(b"b", b"stays")
            Writer.act.append(put_(b"a", b"new"))
            call = world.bench.start(Invoke(session=world.session(), func=0))
            keeper = world.keeper
            keeper.served = len(world.bench.rpcs())
            before = dict(keeper.files)

            def dying(rpc: Rpc, count: list[int] = [count], keeper: Keeper = keeper) -> RpcReply:  # noqa: B006
                count[0] -= 1
                return Keeper.answer(keeper, rpc) if count[0] >= 0 else RpcReply(Result.COMMUNICATION)

            keeper.answer = dying  # type: ignore[method-assign]
            keeper.serve()
            code = world.bench.finish(call).code
            del keeper.answer
            keeper.held.clear()
            keeper.handles.clear()
            restarted = World()
            restarted.keeper.files = dict(keeper.files)
            assert restarted.get(b"a") == (b"new" if code == Result.SUCCESS else b"old"), count
            assert restarted.get(b"b") == b"stays"
            assert world.get(b"a") == (b"new" if code == Result.SUCCESS else b"old")
            world.put(b"a", b"newer")
            assert world.get(b"a") == b"newer"
            assert len(keeper.files) == len(before)
            if count > 20:
                break
            count += 1

    def test_rename_is_done_but_its_answer_is_lost(self, world: World) -> None:
        world.put(b"a", b"old")

        def change(rpc: Rpc, reply: RpcReply) -> RpcReply:
            renames = rpc.command == RpcCommand.FS and rpc.params[0].a == FsCommand.RENAME  # type: ignore[union-attr]
            return RpcReply(Result.COMMUNICATION) if renames else reply

        assert world.code(put_(b"a", b"new"), change=change) == Result.STORAGE_NOT_AVAILABLE
        assert world.get(b"a") == b"old"
        restarted = World()
        restarted.keeper.files = dict(world.keeper.files)
        assert restarted.get(b"a") == b"new"
        world.put(b"a", b"newer")
        assert world.get(b"a") == b"newer"
        assert len(world.keeper.files) == 2

    def test_cancel_does_not_reach_into_it_but_the_end_of_the_context_does(self, world: World) -> None:
        async def act(ta: Writer) -> None:
            ta.env.unmask_cancellation()
            await put_(b"a", b"1")(ta)
            await ta.env.checkpoint()

        Writer.act.append(act)
        call = world.bench.start(Invoke(session=world.session(), func=0))
        world.bench.run()
        world.bench.tee.cancel(call)
        world.keeper.serve()
        assert world.bench.finish(call).code == Result.CANCEL
        assert world.get(b"a") == b"1"

        Writer.act.append(put_(b"a", b"2"))
        call = world.bench.start(Invoke(session=world.session(), func=0))
        world.keeper.served = len(world.bench.rpcs())
        world.keeper.serve(lambda rpc, reply: reply if rpc.command != RpcCommand.FS else None)
        closing = world.bench.start(CloseContext(context=world.contexts[""]))
        world.keeper.serve()
        world.bench.now += FREE_TIMEOUT
        assert world.bench.finish(call).code == Result.CANCEL
        assert world.bench.finish(closing).code == Result.SUCCESS
        assert world.bench.tee.usage() | {"contexts": 0, "registrations": 0} == IDLE

    def test_a_ta_that_will_not_end_leaves_the_storage_free(self, world: World) -> None:
        async def act(ta: Writer) -> None:
            while True:
                try:
                    await ta.env.storage.enumerate()
                    await ta.env.sleep(1)
                except TeeError:
                    continue

        world.put(b"a", b"1")
        Writer.act.append(act)
        call = world.bench.start(Invoke(session=world.session(), func=0))
        world.bench.run()
        closing = world.bench.start(CloseContext(context=world.contexts[""]))
        world.bench.run(3000)
        assert world.bench.finish(call).code == Result.TARGET_DEAD
        assert world.bench.finish(closing).code == Result.SUCCESS
        world.contexts[""] = world.bench.context()
        world.sessions.clear()
        assert world.get(b"a") == b"1"

    def test_one_thread_a_registration_and_then_the_answer(self) -> None:
        """The named deadlock: a call waits in an RPC and has the only thread."""
        world = World(threads=1)
        Writer.act.append(put_(b"a", b"1"))
        call = world.bench.start(Invoke(session=world.session(), func=0))
        world.bench.run()
        assert world.bench.ended(call) is None
        memory = world.bench.registered(world.contexts[""], 64)
        assert memory.handle is not None
        world.keeper.serve()
        assert world.bench.finish(call).code == Result.SUCCESS


def test_memory_is_private_once_it_is_given() -> None:
    """A client that changes its buffer while it is stored changes nothing in the object."""
    from tee.soft import examples

    bench = Bench(storage_key=KEY)
    keeper = Keeper(bench)
    session = bench.session(bench.context(), examples.UUIDS["secure_storage"])
    data = bytearray(b"a" * 1000)
    name = MemRef(Direction.IN, Memory.of(bytearray(b"n")), 0, 1)
    call = bench.start(Invoke(session=session, func=1, params=[name, MemRef(Direction.IN, Memory.of(data), 0, 1000)]))
    bench.run()
    data[:] = b"b" * 1000
    keeper.serve()
    assert bench.finish(call).code == Result.SUCCESS
    out = bytearray(1000)
    call = bench.start(Invoke(session=session, func=0, params=[name, MemRef(Direction.OUT, Memory.of(out), 0, 1000)]))
    keeper.serve()
    assert bench.finish(call).code == Result.SUCCESS
    assert out == b"a" * 1000
