"""One attached backend, as the broker sees it.

Sockets are read without trio's streams: before an RPC is routed, what all backends have sent is read at once, so that a
call that entered the TEE a moment ago is known.
"""

from __future__ import annotations

import itertools
import socket
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field

import trio

from host_backend.broker.flights import Flight, Flights
from host_backend.broker.params import to_wire
from tee.courier import MAX_FRAME, Answer, Ask, Begins, CourierError, Ends, Hello, Message, Reader, Withdraw, pack
from tee.params import Param

_CHUNK = 1 << 18
_AT_ONCE = MAX_FRAME // _CHUNK + 2
"""Chunks that are read before others have their turn."""

_REMEMBERED = 256
"""Withdrawn questions, whose answers may be on their way."""

_WITHDRAW_S = 1.0


@dataclass(slots=True, eq=False)
class _Pending:
    came: trio.Event = field(default_factory=trio.Event)
    answer: Answer | None = None


class Connection:
    """``vm`` is the name of the socket that it came by. It is greeted by :meth:`read` when it has said HELLO."""

    def __init__(self, vm: str, sock: socket.socket, flights: Flights) -> None:
        sock.setblocking(False)
        self.vm = vm
        self.greeted = trio.Event()
        self.why: Exception | None = None
        """What was wrong with it, where it was ended for that."""
        self._socket = sock
        self._flights = flights
        self._reader = Reader()
        self._sending = trio.Lock()
        self._pending: dict[int, _Pending] = {}
        self._withdrawn: deque[int] = deque(maxlen=_REMEMBERED)
        self._numbers = itertools.count(1)
        self._ended = False

    async def serve(self) -> None:
        """Read until it ends; it is gone then."""
        try:
            while self.read():
                await trio.lowlevel.wait_readable(self._socket)
        except trio.ClosedResourceError:
            pass
        finally:
            self._socket.close()
            self._gone()

    def read(self) -> bool:
        """Take what has come; False: it has ended. Never raises."""
        try:
            for _ in range(_AT_ONCE):
                data = self._socket.recv(_CHUNK)
                if not data:
                    self.end()
                    break
                for message in self._reader.feed(data):
                    self._take(message)
        except BlockingIOError:
            pass
        except (OSError, CourierError) as error:
            self.end(error)
        return not self._ended

    def end(self, why: Exception | None = None) -> None:
        """End the connection: :meth:`serve` returns."""
        self.why = self.why or why
        self._gone()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    async def greet(self) -> None:
        """Answer its HELLO."""
        await self._send(Hello())

    async def ask(self, flight: Flight, command: int, params: list[Param], seconds: float) -> Answer | None:
        """None: it has not answered in that time, or has gone. Raises ValueError for what cannot be asked."""
        if self._ended:
            return None
        number, pending = next(self._numbers), _Pending()
        question = Ask(number, flight.call, command, to_wire(params))
        self._pending[number] = pending
        try:
            with trio.move_on_after(seconds):
                await self._send(question)
                await pending.came.wait()
                return pending.answer
            return None
        finally:
            del self._pending[number]
            if not pending.came.is_set() and not self._ended:
                self._withdrawn.append(number)
                with trio.CancelScope(shield=True, deadline=trio.current_time() + _WITHDRAW_S):
                    await self._send(Withdraw(number))

    def _take(self, message: Message) -> None:
        if not self.greeted.is_set():
            if message != Hello():
                raise CourierError("its first message is no HELLO of this version")
            self.greeted.set()
        elif isinstance(message, Begins):
            self._flights.begins(self, message)
        elif isinstance(message, Ends):
            self._flights.ends(self, message.call)
        elif isinstance(message, Answer):
            self._answered(message)
        else:
            raise CourierError(f"{type(message).__name__} from a backend")

    def _answered(self, answer: Answer) -> None:
        pending = self._pending.get(answer.ask)
        if pending is not None and not pending.came.is_set():
            pending.answer = answer
            pending.came.set()
        elif answer.ask in self._withdrawn:
            self._withdrawn.remove(answer.ask)
        else:
            raise CourierError(f"an answer to question {answer.ask}, which was not asked or is answered")

    def _gone(self) -> None:
        """Nobody shall wait for it, and it has no calls any more."""
        self._ended = True
        self._flights.gone(self)
        for pending in self._pending.values():
            pending.came.set()

    async def _send(self, message: Message) -> None:
        """Nothing where it has ended. A message that is sent in part, as time is over, ends it."""
        async with self._sending:
            data = memoryview(pack(message))
            whole = False
            try:
                while data and not self._ended:
                    try:
                        data = data[self._socket.send(data) :]
                    except BlockingIOError:
                        await trio.lowlevel.wait_writable(self._socket)
                whole = True
            except (OSError, trio.ClosedResourceError) as error:
                self.end(error)
                whole = True
            finally:
                if not whole:
                    self.end(CourierError("it does not read"))
