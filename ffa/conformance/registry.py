"""The cases: what each is called, which suite it is of, and the function that runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ffa.conformance.acs import SECTIONS

if TYPE_CHECKING:
    from ffa.conformance.run import Run

SETUP, DIRECT, INDIRECT = "setup_discovery", "direct_messaging", "indirect_messaging"
MEMORY, NOTIFICATIONS, INTERRUPTS = "memory_management", "notifications", "interrupts"
HAFNIUM = "hafnium memory_sharing"
TFA_SETUP, TFA_SMCCC, TFA_MEMORY = "tf-a-tests setup", "tf-a-tests smccc", "tf-a-tests memory sharing"
XEN, OWN = "xen mem_share order", "virtio-tee"
NO_SECTION = "no section: the public scenario tables give none"

Body = Callable[["Run"], None]


@dataclass(frozen=True, slots=True)
class Case:
    """One case. Without a ``body`` it is not applicable, and ``why`` says why."""

    id: str
    suite: str
    body: Body | None
    why: str = ""

    @property
    def section(self) -> str:
        """Sections of the specification, as ACS's scenario tables give them; empty if they give none."""
        return SECTIONS.get(self.id, "")


CASES: dict[str, Case] = {}


def register(suite: str, id: str, body: Body | None, why: str = "") -> None:
    """Adds a case. Raises ValueError: there is one of that id."""
    if id in CASES:
        raise ValueError(f"two cases are called {id}")
    CASES[id] = Case(id, suite, body, why)


def case(suite: str, *ids: str) -> Callable[[Body], Body]:
    """Registers a function under its own name, or under ``ids``."""

    def add(body: Body) -> Body:
        for id in ids or (body.__name__,):
            register(suite, id, body)
        return body

    return add
