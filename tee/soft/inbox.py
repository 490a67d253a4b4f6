"""Calls that were started and have not begun: those of one machine in their order, the machines by turns."""

from __future__ import annotations

from collections import deque

from tee.calls import Call


class Inbox:
    """However many one machine has started, each other one waits for one of them at a time."""

    __slots__ = ("lines",)

    def __init__(self) -> None:
        #: by machine; none is empty
        self.lines: dict[str, deque[Call]] = {}

    def append(self, call: Call) -> None:
        """``call`` comes, too."""
        machine = machine_of(call)
        line = self.lines.get(machine)
        if line is None:
            line = self.lines[machine] = deque()
        line.append(call)

    def popleft(self) -> Call:
        """The next one of the machine whose turn it is. There must be one."""
        machine = next(iter(self.lines))
        line = self.lines.pop(machine)
        call = line.popleft()
        if line:
            self.lines[machine] = line
        return call


def machine_of(call: Call) -> str:
    """The machine that a call comes from; "" where it names nothing that has one."""
    session = getattr(call, "session", None)
    context = getattr(call, "context", None) if session is None else getattr(session, "context", None)
    machine = getattr(call, "vm", None) if context is None else getattr(context, "vm", None)
    return machine if isinstance(machine, str) else ""
