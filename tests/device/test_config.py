"""The config space, identifiers, and the tables of states."""

from __future__ import annotations

from dataclasses import asdict, replace
from enum import Enum
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device import machines, wire
from device.config import Config, Limits
from device.ids import IdTable, LimitReachedError
from device.machines import MACHINES, Machine
from pyvhost.errors import FormatError
from tee.driver import TeeInfo

requirement = pytest.mark.requirement
U32 = st.integers(0, (1 << 32) - 1)
CONFIG = Config(0x1122334455667788, TeeInfo(1, 2, 3, 4), 5)


class TestConfig:
    @given(st.integers(1, (1 << 64) - 1), st.tuples(U32, U32, U32, U32), st.integers(1, 64), st.integers(1, 1 << 63))
    def test_there_and_back(self, epoch: int, info: Any, queues: int, region_bytes: int) -> None:
        config = Config(epoch, TeeInfo(*info), queues, Limits(max_region_bytes=region_bytes))
        assert Config.unpack(config.pack()) == config
        assert Config.unpack(config.pack() + b"more") == config
        parsed = wire.Config.parse(config.pack())
        assert {name: parsed[name] for name in asdict(config.limits)} == asdict(config.limits)
        assert (parsed.epoch, parsed.num_request_queues, parsed.tee_kind) == (epoch, queues, info[0])

    @requirement("DRV-ID-1", "DRV-ID-2")
    @pytest.mark.parametrize(
        ("at", "data", "why"),
        [
            (0, b"ETEE", "magic"),
            (0, bytes(4), "magic"),
            (4, b"\1\0", "version 1.1"),
            (4, b"\xff\xff", "version 65535"),
            (8, bytes(8), "least"),
            (32, bytes(4), "least"),
            (36, bytes(4), "least"),
            (44, b"\3\0\0\0", "least"),
            (48, bytes(4), "least"),
            (72, bytes(4), "least"),
            (88, bytes(4), "least"),
        ],
    )
    def test_what_is_not_ours(self, at: int, data: bytes, why: str) -> None:
        raw = bytearray(CONFIG.pack())
        raw[at : at + len(data)] = data
        with pytest.raises(FormatError, match=why):
            Config.unpack(bytes(raw))

    @requirement("DRV-ID-1")
    @pytest.mark.parametrize("size", [0, 4, 92, 127])
    def test_too_small(self, size: int) -> None:
        with pytest.raises(FormatError):
            Config.unpack(CONFIG.pack()[:size])

    @requirement("DRV-ID-2")
    def test_a_later_minor_version(self) -> None:
        raw = bytearray(CONFIG.pack())
        raw[6:8], raw[92:128] = b"\xff\xff", b"\xff" * 36
        assert Config.unpack(bytes(raw)) == CONFIG

    @requirement("DEV-CFG-1", "DEV-CFG-2", "DEV-CFG-3")
    def test_limits_that_fit_each_other(self) -> None:
        Limits().check()
        for name in asdict(Limits()):
            with pytest.raises(ValueError, match="at least"):
                replace(Limits(), **{name: 0}).check()
        for name in ("max_params", "max_region_ranges"):
            with pytest.raises(ValueError, match="takes"):
                replace(Limits(), **{name: 100_000}).check()


class TestIds:
    @requirement("DEV-IDS-1")
    def test_up_and_around(self) -> None:
        table: IdTable[str] = IdTable(3)
        assert [table.add(x) for x in "ab"] == [1, 2]
        table.remove(1)
        assert table.add("c") == 3
        table._next = 0xFFFF_FFFF
        assert table.add("d") == 0xFFFF_FFFF
        table.remove(0xFFFF_FFFF)
        assert table.add("e") == 1  # never 0
        table.remove(3)
        assert table.add("f") == 3  # 2 is in use
        assert (len(table), sorted(table)) == (3, ["b", "e", "f"])
        with pytest.raises(LimitReachedError):
            table.add("g")
        assert (table.get(2), table.get(0), 2 in table, 0 in table) == ("b", None, True, False)
        with pytest.raises(KeyError):
            table.remove(77)
        table.clear()
        assert (len(table), table.add("h")) == (0, 4)

    @given(st.lists(st.one_of(st.none(), st.integers(0, 9))), st.integers(0xFFFF_FFF0, 0xFFFF_FFFF))
    def test_one_id_one_thing(self, steps: list[int | None], start: int) -> None:
        table: IdTable[int] = IdTable(6)
        table._next = start
        held: dict[int, int] = {}
        for number, step in enumerate(steps):
            if step is None:
                try:
                    ident = table.add(number)
                except LimitReachedError:
                    assert len(held) == 6
                    continue
                assert ident not in held
                assert 0 < ident < 1 << 32
                held[ident] = number
            elif held:
                ident = sorted(held)[step % len(held)]
                assert table.remove(ident) == held.pop(ident)
        assert {ident: table.get(ident) for ident in held} == held


TYPES: dict[str, tuple[type[Enum], type[Enum]]] = {
    "Request": (machines.CallState, machines.CallEvent),
    "RPC": (machines.RpcState, machines.RpcEvent),
    "Guest state": (machines.LifeState, machines.LifeEvent),
}

IMPOSSIBLE = {
    "Request": {
        ("HELD", "DONE"),
        ("HELD", "DONE_STOPPED"),
        *(("ABANDONED", event) for event in ("CANCEL", "RESUME", "RESET")),
    },
    "RPC": {
        ("SENT", "BUFFER"),
        ("WITHDRAWN", "BUFFER"),
        *((state, event) for state in ("WITHDRAWING", "WITHDRAWN") for event in ("WITHDRAW", "DEADLINE")),
    },
    "Guest state": {(state, "DRAINED") for state in ("FRESH", "RUNNING", "PAUSED")},
}
"""Pairs that the tables do not list, because what they stand for cannot happen."""


@pytest.mark.parametrize("machine", MACHINES.values(), ids=list(MACHINES))
class TestMachines:
    def test_every_pair_is_listed_or_impossible(self, machine: Machine[Any, Any, Any]) -> None:
        states, events = TYPES[machine.name]
        missing = {
            (s.name, e.name)
            for s in states
            for e in events
            if s not in machine.final and (s, e) not in machine.transitions
        }
        assert missing == IMPOSSIBLE[machine.name]
        for state, event in missing:
            with pytest.raises(LookupError, match=f"{machine.name}: {event} cannot happen in state {state}"):
                machine.step(states[state], events[event])

    def test_all_states_are_reached_and_final_ones_stay(self, machine: Machine[Any, Any, Any]) -> None:
        states, _ = TYPES[machine.name]
        reached, new = set(), {machine.initial}
        while new:
            reached |= new
            new = {to for (state, _), (to, _) in machine.transitions.items() if state in new} - reached
        assert reached == set(states)
        assert not [pair for pair in machine.transitions if pair[0] in machine.final]
        for final in machine.final:  # from everywhere there is a way to the end
            back = {final}
            while True:
                more = {state for (state, _), (to, _) in machine.transitions.items() if to in back} - back
                if not more:
                    break
                back |= more
            assert back == set(states)
