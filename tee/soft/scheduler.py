"""Runs the coroutines of the software TEE: who may run, who waits for what, and how a waiting one is woken.

It knows calls, threads, timers and RPCs, but neither sessions nor TAs. Coroutines talk to it by what they ``await``: a
:class:`Yield`, a :class:`Sleep`, a :class:`CallOut` or a :class:`Park`. "Threads" are no threads of an operating
system, but how many calls can be inside TAs at once, as on a real TEE; all of it runs on the one thread that calls
:meth:`Scheduler.step`.
"""

from __future__ import annotations

import heapq
import types
from collections import deque
from collections.abc import Callable, Coroutine, Generator
from contextlib import suppress
from typing import Any

from tee.calls import Call
from tee.results import Origin, Result, TeeError
from tee.rpc import Rpc, RpcReply
from tee.soft.states import CALL, CallEvent, CallState

#: How often a coroutine may go on waiting after its context began to close or its time was up, before it is ended as if
#: it had panicked.
MAX_REFUSALS = 1000

_ADMIT, _RESUME, _RETURN = CallEvent.ADMIT, CallEvent.RESUME, CallEvent.RETURN
_INTERRUPT, _ABANDON, _TIMER, _ANSWER = CallEvent.INTERRUPT, CallEvent.ABANDON, CallEvent.TIMER, CallEvent.ANSWER
_WAITING, _ENDED, _WAKE = CallState.WAITING, CallState.ENDED, CallEvent.WAKE

_DEADLINE = -1  # in place of a turn: this timer is for all of a call


class Yield:
    """Let others run."""

    __slots__ = ()
    event = CallEvent.YIELD
    shielded = False


class Sleep:
    """Wait for ``seconds``."""

    __slots__ = ("seconds",)
    event = CallEvent.SLEEP
    shielded = False

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds


class CallOut:
    """Announce ``rpc`` and wait for its answer, for ``timeout`` seconds at most. A *shielded* one no cancel
    interrupts.
    """

    __slots__ = ("rpc", "shielded", "timeout")
    event = CallEvent.CALL_OUT

    def __init__(self, rpc: Rpc, *, shielded: bool = False, timeout: float | None = None) -> None:
        self.rpc = rpc
        self.shielded = shielded
        self.timeout = timeout


class Park:
    """Wait for :meth:`Scheduler.wake`, whose value is what comes back."""

    __slots__ = ("shielded",)
    event = CallEvent.PARK

    def __init__(self, *, shielded: bool = False) -> None:
        self.shielded = shielded


Wait = Yield | Sleep | CallOut | Park
_WAITS = (Yield, Sleep, CallOut, Park)


@types.coroutine
def suspend(wait: Wait) -> Generator[Wait, Any, Any]:
    """Give ``wait`` to the scheduler; returns its outcome (an RpcReply for a CallOut)."""
    return (yield wait)


class Panic(Exception):  # noqa: N818 - a panic is what it is
    """A coroutine that has to be ended from outside."""


class Rare:
    """What few tasks have."""

    __slots__ = ("callee", "caller", "chain", "deadline", "lent", "parked_at", "visits", "why")

    def __init__(self) -> None:
        self.deadline = 0.0  # 0: it has not waited yet, or may take as long as it likes
        self.why = "the client's context is closing"  # it is forced
        # for the owner of the scheduler
        self.lent: list[Any] = []  # memory that its client has given it
        self.visits: list[Any] = []  # in other instances, by calls from TA to TA, outermost first
        self.parked_at: Any = None  # the instance that it waits for inside another one
        self.caller: Task | None = None  # waits for this one, which is a call to an enclave
        self.callee: Task | None = None  # the call to an enclave that it waits for
        self.chain: tuple[Any, ...] = ()  # the enclaves that it is in, outermost first


class Task:
    """One call being served.

    ``main`` makes the coroutine when the task first runs; ``ended`` is told its value or its exception, exactly once.
    A task with ``needs_thread`` False runs beside the threads: the TEE's own work.
    """

    __slots__ = (
        "call",
        "cancellable",
        "cancelled",
        "context",
        "coroutine",
        "ended",
        "entered",
        "forced",
        "instance",
        "leases",
        "main",
        "masked",
        "needs_thread",
        "pairs",
        "params",
        "program",
        "rare",
        "refusals",
        "session",
        "state",
        "threaded",
        "turn",
        "value",
        "wait",
    )

    def __init__(self, call: Call | None, context: Any) -> None:
        self.call = call
        self.context = context
        self.state = _WAITING
        self.coroutine: Coroutine[Wait, Any, Any] | None = None
        self.cancelled = False  # the client asked it to end
        self.forced = False  # its context is closing, or its time is up
        self.masked = True
        self.cancellable = True
        self.needs_thread = True
        self.threaded = False
        self.entered = False
        self.refusals = 0
        self.turn = 0  # counts the waits, so that an old timer is told from the current one
        self.value: Any = None  # what the coroutine is resumed with
        self.wait: Wait | None = None
        self.main: Callable[[Task], Coroutine[Wait, Any, Any]]
        self.ended: Callable[[Task, Any, BaseException | None], None]
        # for the owner of the scheduler
        self.session: Any = None
        self.instance: Any = None
        self.program: Any = None
        self.params: Any = None
        self.pairs: Any = ()
        self.leases: Any = ()
        self.rare: Rare | None = None

    def more(self) -> Rare:
        """What most calls never need, made when it is asked for."""
        if self.rare is None:
            self.rare = Rare()
        return self.rare

    @property
    def asks_client(self) -> bool:
        """It waits for its own client."""
        return self.state == CallState.IN_RPC and isinstance(self.wait, CallOut) and self.wait.rpc.to_client

    @property
    def interrupted(self) -> bool:
        """A cancel reaches this task now."""
        return self.forced or (self.cancelled and not self.masked)


class _Turns:
    """Tasks that wait for a thread: those of one machine in their order, and the machines by turns, so that none waits
    for more than one task of each other one.
    """

    __slots__ = ("_lines",)

    def __init__(self) -> None:
        self._lines: dict[str, deque[Task]] = {}

    def append(self, task: Task) -> None:
        """``task`` waits, too."""
        self._lines.setdefault(task.context.vm, deque()).append(task)

    def remove(self, task: Task) -> None:
        """``task`` does not wait any more."""
        self._lines[task.context.vm].remove(task)

    def pop(self, machine: str) -> Task | None:
        """The next one of ``machine``, whose next turn comes after all others'."""
        line = self._lines.pop(machine, None)
        while line:
            task = line.popleft()
            if task.state == _WAITING:
                if line:
                    self._lines[machine] = line
                return task
        return None

    def pop_all(self) -> list[Task]:
        """All that wait."""
        tasks: list[Task] = []
        while (task := self.pop_any()) is not None:
            tasks.append(task)
        return tasks

    def pop_any(self) -> Task | None:
        """The next one of the machine whose turn it is."""
        while self._lines:
            task = self.pop(next(iter(self._lines)))
            if task is not None:
                return task
        return None


class Scheduler:
    """See the module's text. ``emit_rpc`` and ``emit_withdrawn`` receive RPCs that go out and that are given up.

    ``longest`` is how many seconds a call may take from the first time that it waits, None: any. After them it is
    interrupted as if its context were closing.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], float],
        threads: int,
        emit_rpc: Callable[[Rpc], None],
        emit_withdrawn: Callable[[Rpc], None],
        longest: float | None = None,
    ) -> None:
        if threads < 1:
            raise ValueError("a TEE needs at least one thread")
        self.ready: deque[Task] = deque()
        self.threads = threads
        self.free = threads
        self.rpcs: dict[Rpc, Task] = {}
        self._at_clients = 0
        """Tasks that have a thread and wait for their own clients."""
        self._clock = clock
        self._longest = longest
        self._emit_rpc = emit_rpc
        self._emit_withdrawn = emit_withdrawn
        self._waiting = _Turns()
        self._held: dict[str, int] = {}
        """Threads that each machine's tasks have: one that has none gets one, also if no other is free."""
        self._timers: list[tuple[float, int, Task, int]] = []
        self._timer_number = 0
        self._prune_at = 256
        self._table = {pair: (state, getattr(self, f"_{action}")) for pair, (state, action) in CALL.items()}

    def submit(self, task: Task) -> None:
        """Let ``task`` run as soon as a thread is free (at once where it needs none)."""
        if task.needs_thread:
            if self.free <= 0 and self._held.get(task.context.vm):
                if self._at_clients and self._at_clients >= self.threads - self.free:
                    self._refuse_or_admit(task)
                else:
                    self._waiting.append(task)
                return
            task.threaded = True
            self.take_thread(task.context.vm)
        self._fire(task, _ADMIT)

    def _refuse_or_admit(self, task: Task) -> None:
        """All threads wait for clients, which may wait for this very task: BUSY. What cannot fail gets a thread."""
        if task.cancellable:
            self.abandon(task, TeeError(Result.BUSY, Origin.TEE, "all threads wait for clients"))
        else:
            task.threaded = True
            self.take_thread(task.context.vm)
            self._fire(task, _ADMIT)

    def take_thread(self, machine: str) -> None:
        """A task of ``machine`` has a thread from here on."""
        self.free -= 1
        self._held[machine] = self._held.get(machine, 0) + 1

    def withdraw(self, task: Task) -> None:
        """Take back a task that was submitted and waits for a thread; it can be submitted again."""
        self._waiting.remove(task)

    def wake(self, task: Task, value: object) -> None:
        """End the :class:`Park` of ``task``, with ``value``; nothing where it is not parked any more."""
        self._fire(task, _WAKE, value)

    def step(self) -> None:
        """Run the task whose turn it is, until it waits or ends. There must be one in ``ready``."""
        self._fire(self.ready.popleft(), _RESUME)

    def go_on(self, task: Task, coroutine: Coroutine[Wait, Any, Any], wait: Any) -> None:
        """Take over ``task``, which ran outside until its coroutine awaited ``wait``, and has one of the threads."""
        task.state = CallState.RUNNING
        task.threaded = True
        task.coroutine = coroutine
        self._wait_for(task, wait)

    def cancel(self, task: Task) -> None:
        """The client asks ``task`` to end."""
        if not task.cancellable:
            return
        task.cancelled = True
        self._interrupt(task)

    def force(self, task: Task) -> None:
        """The context of ``task`` is closing: no mask counts, and what it waits for is refused from here on."""
        task.forced = True
        self._interrupt(task)

    def abandon(self, task: Task, error: TeeError) -> None:
        """End a task that has not begun."""
        self._fire(task, _ABANDON, error)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """Wake whoever waits for ``rpc``; nothing where nobody does."""
        task = self._answered(rpc)
        if task is not None:
            self._fire(task, _ANSWER, reply)

    def give_up_client(self, task: Task) -> None:
        """What ``task`` asks its client is not answered any more: the client closes what it has the call in."""
        if task.asks_client:
            assert isinstance(task.wait, CallOut)
            rpc = task.wait.rpc
            self._emit_withdrawn(rpc)
            self.answer(rpc, RpcReply(Result.COMMUNICATION))

    def _answered(self, rpc: Rpc) -> Task | None:
        task = self.rpcs.pop(rpc, None)
        if task is not None and rpc.to_client and task.threaded:
            self._at_clients -= 1
        return task

    def expire(self) -> float | None:
        """Wake those whose time has come; returns the seconds to the next, or None."""
        while self._timers:
            when, _, task, turn = self._timers[0]
            if turn == _DEADLINE:
                if task.more().deadline != when or task.state == _ENDED:
                    heapq.heappop(self._timers)
                    continue
            elif task.turn != turn or task.state == _ENDED:
                heapq.heappop(self._timers)
                continue
            left = when - self._clock()
            if left > 0:
                return left
            heapq.heappop(self._timers)
            if turn == _DEADLINE:
                task.more().why = "the call has taken too long"
                self.force(task)
            else:
                self._fire(task, _TIMER)
        return None

    # What follows are the table's actions and what they need.

    def _fire(self, task: Task, event: CallEvent, argument: Any = None) -> None:
        row = self._table.get((task.state, event))
        if row is not None:
            task.state = row[0]
            row[1](task, argument)

    def _interrupt(self, task: Task) -> None:
        if task.state == _WAITING:
            if task.cancellable:
                self._fire(task, _INTERRUPT)
        elif task.interrupted and not (task.wait is not None and task.wait.shielded):
            self._fire(task, _INTERRUPT)

    def _queue(self, task: Task, _: Any) -> None:
        task.turn += 1
        self.ready.append(task)

    def _deliver(self, task: Task, value: object) -> None:
        task.value = value
        self._queue(task, None)

    def _park(self, task: Task, _: Any) -> None:
        pass  # until somebody wakes it

    def _withdraw(self, task: Task, _: Any) -> None:
        assert isinstance(task.wait, CallOut)
        rpc = task.wait.rpc
        self._answered(rpc)
        self._emit_withdrawn(rpc)
        self._queue(task, None)

    def _withdraw_late(self, task: Task, _: Any) -> None:
        task.value = TeeError(Result.COMMUNICATION, Origin.TEE, "the RPC was not answered in time")
        self._withdraw(task, None)

    def _arm_timer(self, task: Task, wait: Sleep) -> None:
        self._set_timer(task, wait.seconds)

    def _announce(self, task: Task, wait: CallOut) -> None:
        wait.rpc.call = task.call
        self.rpcs[wait.rpc] = task
        if wait.timeout is not None:
            self._set_timer(task, wait.timeout)
        self._emit_rpc(wait.rpc)
        if wait.rpc.to_client and task.threaded:
            self._at_clients += 1
            if self.free <= 0 and self._at_clients >= self.threads - self.free:
                for other in self._waiting.pop_all():
                    self._refuse_or_admit(other)

    def _set_timer(self, task: Task, seconds: float) -> None:
        self._push_timer(self._clock() + seconds, task, task.turn)

    def _set_deadline(self, task: Task, seconds: float) -> None:
        task.more().deadline = self._clock() + seconds
        self._push_timer(task.more().deadline, task, _DEADLINE)

    def _push_timer(self, when: float, task: Task, turn: int) -> None:
        if len(self._timers) > self._prune_at:
            # Timers of waits that ended early would else stay, with their tasks, until their time comes.
            self._timers = [entry for entry in self._timers if _counts(entry)]
            heapq.heapify(self._timers)
            self._prune_at = 2 * len(self._timers) + 256
        self._timer_number += 1
        heapq.heappush(self._timers, (when, self._timer_number, task, turn))

    def _drop_cancelled(self, task: Task, _: Any) -> None:
        self._drop(task, TeeError(Result.CANCEL, Origin.TEE, "cancelled before it began"))

    def _drop(self, task: Task, error: TeeError) -> None:
        # Its place in a queue stays until that queue comes to it; whoever takes it out sees that it has ended.
        task.ended(task, None, error)

    def _step(self, task: Task, _: Any) -> None:
        wait, value = task.wait, task.value
        task.wait = task.value = None
        try:
            coroutine = task.coroutine
            if coroutine is None:
                if task.cancellable and (task.cancelled or task.forced):
                    raise TeeError(Result.CANCEL, Origin.TEE, "cancelled before it began")
                task.coroutine = coroutine = task.main(task)
                wait = coroutine.send(None)
            elif isinstance(value, TeeError):
                wait = coroutine.throw(value)
            elif wait is not None and value is None and not wait.shielded and task.interrupted:
                wait = coroutine.throw(self._refusal(task))
            else:
                wait = coroutine.send(value)
        except StopIteration as stop:
            self._fire(task, _RETURN, (stop.value, None))
            return
        except KeyboardInterrupt:
            raise  # it is for whoever runs the TEE
        except BaseException as error:
            self._fire(task, _RETURN, (None, error))
            return
        self._wait_for(task, wait)

    def _wait_for(self, task: Task, wait: Any) -> None:
        """The coroutine of ``task``, which was running, awaits ``wait``: whatever a TA may give."""
        if not isinstance(wait, _WAITS):
            self._kill(task, f"awaits {type(wait).__name__}, which is nothing of its environment")
        elif task.forced and task.refusals > MAX_REFUSALS:
            self._kill(task, f"does not end although {task.more().why}")
        else:
            task.wait = wait
            if self._longest is not None and not task.more().deadline and not task.forced:
                self._set_deadline(task, self._longest)
            # Whoever is interrupted already does not begin to wait, but gives way once before it is told.
            refused = task.interrupted and not wait.shielded
            self._fire(task, CallEvent.YIELD if refused else wait.event, wait)

    def _refusal(self, task: Task) -> TeeError:
        task.refusals += 1
        if task.forced:
            return TeeError(Result.CANCEL, Origin.TEE, task.more().why)
        return TeeError(Result.CANCEL, Origin.TEE, "cancelled")

    def _kill(self, task: Task, why: str) -> None:
        assert task.coroutine is not None
        with suppress(BaseException):  # whatever it does at its end, it is dropped here
            task.coroutine.close()
        self._fire(task, _RETURN, (None, Panic(why)))

    def _end(self, task: Task, outcome: tuple[Any, BaseException | None]) -> None:
        if task.threaded:
            task.threaded = False
            self.pass_thread_on(task.context.vm)
        task.coroutine = None
        task.ended(task, *outcome)

    def pass_thread_on(self, machine: str) -> None:
        """A task of ``machine`` has a thread no more: the next that waits has it."""
        self.free += 1
        self._held[machine] -= 1
        if not self._held[machine]:
            del self._held[machine]
        task = self._waiting.pop(machine) if machine not in self._held else None
        if task is None and self.free > 0:
            task = self._waiting.pop_any()
        if task is not None:
            task.threaded = True
            self.take_thread(task.context.vm)
            self._fire(task, _ADMIT)

    def rearm(self, task: Task) -> None:
        """Make an ended task ready to be submitted again, with another ``main``: a call that is served in two steps."""
        task.state = _WAITING
        task.wait = task.value = None
        task.turn += 1


class Lock:
    """Lets one task at a time pass, in the order in which they came."""

    __slots__ = ("_owner", "_queue", "_scheduler")

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._owner: Task | None = None
        self._queue: deque[Task] = deque()

    async def acquire(self, task: Task) -> None:
        """Wait for the lock; raises CANCEL where ``task`` is interrupted before it has it."""
        if self._owner is None:
            self._owner = task
            return
        self._queue.append(task)
        try:
            await suspend(Park())
        except BaseException:
            if self._owner is task:
                self.release()
            else:
                self._queue.remove(task)
            raise

    def release(self) -> None:
        """Let the next one pass."""
        self._owner = self._queue.popleft() if self._queue else None
        if self._owner is not None:
            self._scheduler.wake(self._owner, self)


def _counts(timer: tuple[float, int, Task, int]) -> bool:
    """``timer`` still wakes somebody."""
    when, _, task, turn = timer
    return task.more().deadline == when and task.state != _ENDED if turn == _DEADLINE else task.turn == turn
