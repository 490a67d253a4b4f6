"""How often an empty ring is looked at for a while."""

from __future__ import annotations

from itertools import pairwise

from pyvhost.vring.patience import Patience


def looks(patience: Patience, times: int) -> list[int]:
    """At which of so many occasions there was a look, all of them in vain."""
    seen = []
    for n in range(times):
        if patience.is_worth_it():
            seen.append(n)
            patience.learn(False)
    return seen


def test_less_and_less_often_while_it_is_in_vain() -> None:
    seen = looks(Patience(), 400)
    gaps = [later - earlier for earlier, later in pairwise(seen)]
    assert gaps == sorted(gaps)
    assert gaps[:3] == [1, 3, 7]
    assert max(gaps) == 63  # it never gives up


def test_a_find_makes_it_patient_again() -> None:
    patience = Patience()
    looks(patience, 400)
    while not patience.is_worth_it():
        pass
    patience.learn(True)
    assert looks(patience, 3)[0] == 0
