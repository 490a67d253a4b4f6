"""The fuzzer finds nothing in our roles, and does find what is broken."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ffa import fuzz
from ffa.abi.frame import Frame
from ffa.roles import checks, transactions
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc

CALLS = 12_500


@pytest.mark.feature("FF-A: whatever is called, every page has one owner, and nobody access without a grant")
@pytest.mark.parametrize("world", fuzz.WORLDS)
def test_nothing_breaks_an_invariant(world: Callable[[], fuzz.World]) -> None:
    fuzzer = fuzz.Fuzzer(20, world)
    fuzzer.run(CALLS)
    for call in ("MEM_SHARE", "MEM_LEND", "MEM_DONATE", "MEM_RETRIEVE_REQ", "MEM_RELINQUISH", "MEM_RECLAIM"):
        assert fuzzer.answers[f"{call}: ok"] > 50  # it gets through, not only to errors
        assert fuzzer.answers[f"{call}: INVALID_PARAMETERS"] > 50
    assert fuzzer.answers["MEM_FRAG_TX: ok"] > 5


def without(table: Any, name: str) -> Any:
    kept = tuple(check for check in table if check.name != name)
    assert len(kept) == len(table) - 1
    return kept


@pytest.mark.parametrize(
    ("table", "name"),
    [
        ("ranges", "a page that is not the sender's alone"),
        ("ranges", "a page named twice"),
        ("send", "the sender is not the caller"),
        ("retrieve", "more data access than was given"),
        ("retrieve", "another tag"),
        ("retrieve", "the sender is another"),
        ("reclaim", "a borrower has it"),
        ("reclaim", "the caller is not the sender"),
        ("relinquish", "not retrieved, or not to the end"),
    ],
)
def test_a_missing_check_is_found(table: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = {
        "send": checks.SEND,
        "ranges": checks.RANGES,
        "retrieve": checks.RETRIEVE,
        "relinquish": checks.RELINQUISH,
        "reclaim": checks.RECLAIM,
    }
    broken = transactions.Checks(**{table: without(tables[table], name)})
    monkeypatch.setattr(transactions, "Checks", lambda: broken)
    with pytest.raises(fuzz.InvariantError):
        fuzz.Fuzzer(1, fuzz.host_world).run(50_000)


def test_access_that_stays_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions.Transactions, "_grant", lambda *_: None)
    with pytest.raises(fuzz.InvariantError, match="page"):
        fuzz.Fuzzer(1).run(20_000)


def test_a_handle_given_twice_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transactions.Handles, "__call__", lambda self: 7)
    with pytest.raises(fuzz.InvariantError):
        fuzz.Fuzzer(1, fuzz.host_world).run(20_000)


def test_success_with_handle_0_is_found() -> None:
    """As in Xen's mediator: a fragment longer than TX was answered with success, and no handle."""

    class Broken(Spmc):
        def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
            if frame.fid & 0xFF == 0x73 and frame[2] & 0xFFFF_FFFF > 4096:
                return Frame.success()
            return super().call(caller, frame, vcpu)

    def world() -> fuzz.World:
        made = fuzz.host_world()
        broken = Broken.__new__(Broken)
        relayer = made.endpoints[0].relayer
        assert isinstance(relayer, Spmc)
        broken.__dict__.update(relayer.__dict__)
        for endpoint in made.endpoints.values():
            endpoint.relayer = broken
        return made

    with pytest.raises(fuzz.InvariantError):
        fuzz.Fuzzer(1, world).run(50_000)


def test_it_is_the_same_for_the_same_seed() -> None:
    one, other = fuzz.Fuzzer(3), fuzz.Fuzzer(3)
    one.run(2000)
    other.run(2000)
    assert one.answers == other.answers
    assert isinstance(one.world.machine, Machine)
