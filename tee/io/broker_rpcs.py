"""RPCs of a Linux TEE that the host's supplicant broker has put to this backend: for
:class:`~tee.io.linux_driver.LinuxTeeDriver`, whose :class:`~tee.io.linux_driver.RpcSource` this is.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

from tee.calls import Call, Invoke, OpenSession
from tee.courier import MAX_NAME, NO_UUID, Answer, Ask, Begins, CallKind
from tee.driver import RpcWithdrawn, Sink
from tee.errands import Errand
from tee.io.broker_link import BrokerLink, Lost
from tee.results import Result
from tee.rpc import Rpc, RpcReply

log = logging.getLogger(__name__)


class BrokerRpcs:
    """``path`` is the socket at which the broker lets this backend attach."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._link: BrokerLink | None = None
        self._sink: Sink = lambda _: None
        self._numbers = itertools.count(1)
        self._begun: dict[Call, Begins] = {}
        self._calls: dict[int, Call] = {}
        self._errands: dict[Rpc, Errand] = {}

    @property
    def link(self) -> BrokerLink:
        """The connection. AssertionError before :meth:`attach`."""
        assert self._link is not None
        return self._link

    def close(self) -> None:
        """End the connection."""
        if self._link is not None:
            self._link.close()

    def attach(self, post: Callable[[Callable[[], None]], None], sink: Sink) -> None:
        """See :class:`~tee.io.linux_driver.RpcSource`."""
        self._sink = sink
        self._link = BrokerLink(self._path, lambda: post(self._take))

    def begun(self, call: OpenSession | Invoke, vm: str) -> None:
        """See :class:`~tee.io.linux_driver.RpcSource`."""
        number = next(self._numbers)
        kind, uuid = (CallKind.OPEN_SESSION, call.uuid) if isinstance(call, OpenSession) else (CallKind.INVOKE, NO_UUID)
        name = vm.encode()[:MAX_NAME].decode(errors="ignore")
        self._begun[call] = Begins(number, kind, uuid, name)
        self._calls[number] = call

    def enters(self, call: OpenSession | Invoke) -> None:
        """See :class:`~tee.io.linux_driver.RpcSource`."""
        self.link.begins(self._begun[call])

    def ended(self, call: OpenSession | Invoke) -> None:
        """See :class:`~tee.io.linux_driver.RpcSource`."""
        begins = self._begun.pop(call)
        del self._calls[begins.call]
        for errand in [errand for errand in self._errands.values() if errand.call is call]:
            self._withdraw(errand)
            self.link.answer(errand.withdrawn())
        self.link.ends(begins.call)

    def answer(self, rpc: Rpc, reply: RpcReply) -> None:
        """See :class:`~tee.io.linux_driver.RpcSource`."""
        errand = self._errands.pop(rpc, None)
        if errand is None:
            return
        answer = errand.answered(reply)
        if answer is None:
            self._put(errand)
        else:
            self.link.answer(answer)

    def usage(self) -> dict[str, int]:
        """What is under way."""
        return {"broker_calls": len(self._calls), "broker_rpcs": len(self._errands)}

    def _take(self) -> None:
        message = self.link.take()
        if isinstance(message, Ask):
            self._ask(message)
        elif isinstance(message, Lost):
            for errand in list(self._errands.values()):
                self._withdraw(errand)
        elif message is not None:
            for errand in [errand for errand in self._errands.values() if errand.ask.ask == message.ask]:
                self._withdraw(errand)

    def _ask(self, ask: Ask) -> None:
        call = self._calls.get(ask.call)
        if call is None:  # it has ended meanwhile
            self.link.answer(Answer(ask.ask, Result.COMMUNICATION))
            return
        try:
            errand = Errand(ask, call)
        except ValueError as error:
            log.warning("the broker asks what makes no sense: %s", error)
            self.link.answer(Answer(ask.ask, Result.BAD_PARAMETERS))
            return
        self._put(errand)

    def _put(self, errand: Errand) -> None:
        self._errands[errand.rpc] = errand
        self._sink(errand.rpc)

    def _withdraw(self, errand: Errand) -> None:
        """Nobody waits for it any more. Memory that its guest gave is free with the call's end, at the latest."""
        del self._errands[errand.rpc]
        self._sink(RpcWithdrawn(errand.rpc))
