"""The software TEE, and the meter at its door."""

from __future__ import annotations

import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from tee.calls import Call, CloseContext, Invoke, OpenSession, RegisterMemory, UnregisterMemory
from tee.driver import Done, Event, Notification, RpcWithdrawn, Sink, TeeDriver, TeeInfo
from tee.io.workers import WorkerThreads
from tee.memory import Memory
from tee.params import MemRef, Param, Value
from tee.rpc import Rpc, RpcReply, describe_command
from tee.soft.driver import SoftTee
from tee.soft.examples import built_in
from virtio_tee.compare.meter import PAGE, Meter, Party, Readable, What

BUILT_IN = ("probe", "secure_storage")
"""TAs that need not be loaded."""
_STORAGE_KEY = bytes(range(32))
_WORDS = struct.Struct("<QQQ")


def soft_tee(key: bytes) -> SoftTee:
    """The TEE of every path; ``key`` (PEM) verifies what is loaded."""
    return SoftTee(
        clock=time.monotonic,
        random=secrets.token_bytes,
        keys=[key],
        built_in=built_in(*BUILT_IN),
        storage_key=_STORAGE_KEY,
        workers=WorkerThreads(),
    )


class MeteredTee:
    """``tee`` with a meter at its door, where ``caller`` comes in. It offers no invokes that begin at once: all calls
    come in by one door.

    ``switches``: each way in and out is one between the worlds. ``in_guest`` says whether memory that is handed over
    is the guest's own, in place.
    """

    def __init__(
        self,
        tee: TeeDriver,
        meter: Meter,
        caller: Party,
        *,
        switches: bool,
        in_guest: Callable[[Memory], bool],
    ) -> None:
        self._tee = tee
        self._meter = meter
        self._caller = caller
        self._switches = switches
        self._in_guest = in_guest
        self._sink: Sink | None = None
        self._registered: set[Memory] = set()
        self._params: Sequence[Param] = ()
        meter.looks.setdefault(Party.TEE, []).append(self._look)

    # -- the contract

    @property
    def info(self) -> TeeInfo:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.info

    def attach(self, sink: Sink) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._sink = sink
        self._tee.attach(self._take)

    def fileno(self) -> int | None:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.fileno()

    def allocate(self, size: int) -> Memory:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.allocate(size)

    def release(self, memory: Memory) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._registered.discard(memory)
        self._tee.release(memory)

    def usage(self) -> dict[str, int]:
        """See :class:`~tee.driver.TeeDriver`."""
        return self._tee.usage()

    def start(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        if isinstance(call, RegisterMemory):
            self._registered.add(call.memory)
            if self._switches:
                self._meter.add(What.PAGES_SHARED, -(-call.memory.size // PAGE) if self._in_guest(call.memory) else 0)
        self._enters(type(call).__name__, call.params if isinstance(call, OpenSession | Invoke) else None)
        with self._meter.within(None):
            self._tee.start(call)

    def cancel(self, call: Call) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._enters("cancel")
        self._tee.cancel(call)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.driver.TeeDriver`."""
        self._enters(f"answer {describe_command(rpc.command)}", reply.params, rpc=True)
        with self._meter.within(None):
            self._tee.answer(rpc, reply)

    def run(self) -> float | None:
        """See :class:`~tee.driver.TeeDriver`."""
        with self._meter.within(None):
            return self._tee.run()

    # -- what is seen

    def _enters(self, name: str, params: Sequence[Param] | None = None, *, rpc: bool = False) -> None:
        if self._switches:
            self._meter.add(What.WORLD_SWITCHES)
            kind = "response" if rpc else "request"
            self._meter.message(self._caller, Party.TEE, name, kind=kind, rpc=rpc)
        if params is not None:  # otherwise nothing of the client's comes in
            self._params = params
            self._meter.look()

    def _leaves(self, event: Event) -> None:
        match event:
            case Done():
                name, kind, rpc = "done", "response", False
            case Rpc():
                name, kind, rpc = f"RPC {describe_command(event.command)}", "event", True
                self._meter.add(What.RPCS)
            case RpcWithdrawn():
                name, kind, rpc = "RPC withdrawn", "event", True
            case Notification():
                name, kind, rpc = "notification", "event", False
        if self._switches:
            self._meter.add(What.WORLD_SWITCHES)
            self._meter.message(Party.TEE, self._caller, name, kind=kind, rpc=rpc)

    def _take(self, event: Event) -> None:
        if isinstance(event, Done):
            if isinstance(event.call, UnregisterMemory):
                self._registered.discard(event.call.memory)
            elif isinstance(event.call, CloseContext):
                self._registered = {memory for memory in self._registered if memory.handle is not None}
        self._leaves(event)
        assert self._sink is not None
        with self._meter.within(self._caller):
            self._sink(event)

    def _look(self) -> Iterable[Readable]:
        yield from _of_params(self._params, self._in_guest)
        for memory in self._registered:
            yield from (Readable(view, self._in_guest(memory)) for view in memory.segments)


def _of_params(params: Sequence[Param], in_guest: Callable[[Memory], bool]) -> Iterator[Readable]:
    for param in params:
        if isinstance(param, Value):
            yield Readable(_WORDS.pack(param.a, param.b, param.c), False)
        elif isinstance(param, MemRef) and param.memory is not None and param.memory.handle is None:
            yield from (Readable(view, in_guest(param.memory)) for view in param.memory.segments)
