"""Lines that are left out."""

from __future__ import annotations

from tee.io.supplicant import Supplicant
from tee.io.throttle import LINES, Throttle
from tee.params import Direction, Value
from tee.results import Result
from tee.rpc import Rpc, RpcCommand
from tests.tee.io.test_supplicant import Pool


def test_so_many_in_a_while() -> None:
    now = 0.0
    throttle = Throttle(2, 10, lambda: now)
    assert throttle.admit() == ""
    now = 4
    assert throttle.admit() == " [more such lines are left out for 6 s]"
    assert [throttle.admit() for _ in range(3)] == [None] * 3
    now = 10
    assert throttle.admit() == " [3 such lines were left out before]"
    now = 30
    assert throttle.admit() == ""


def test_a_tee_does_not_fill_the_log() -> None:
    logged: list[str] = []
    supplicant = Supplicant(log=logged.append)
    for _ in range(1000):
        assert supplicant.serve(Rpc(RpcCommand.LOAD_TA, [Value(Direction.IN)]), Pool()).code == Result.BAD_PARAMETERS
    assert len(logged) == LINES
    assert "left out" in logged[-1]
