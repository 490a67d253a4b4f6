"""Where calls do not wait for each other in an instance, its environment has to be told whose turn it is."""

from __future__ import annotations

import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any

from tee.results import Origin, Result, TeeError
from tee.soft.scheduler import CallOut, Task, Wait
from tee.soft.ta import Environment


@types.coroutine
def inside(
    env: Environment,
    task: Task,
    coroutine: Coroutine[Wait, Any, Any],
    may_call_out: Callable[[CallOut], bool] | None = None,
) -> Generator[Wait, Any, Any]:
    """Run ``coroutine`` with ``task`` as the current call of ``env``, whenever it runs. RPCs that it may not make are
    refused with NOT_SUPPORTED."""
    value: Any = None
    error: BaseException | None = None
    try:
        while True:
            env.task = task
            try:
                wait = coroutine.send(value) if error is None else coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
            finally:
                env.task = None
            value = error = None
            if may_call_out is not None and type(wait) is CallOut and not may_call_out(wait):
                error = TeeError(Result.NOT_SUPPORTED, Origin.TEE, "an enclave cannot ask this of its caller")
                continue
            try:
                value = yield wait
            except GeneratorExit:
                raise
            except BaseException as thrown:
                error = thrown
    finally:
        env.task = task  # it ends inside, too, where it is ended from outside
        coroutine.close()
        env.task = None
