"""An endpoint: a VM, the operating system where there is no hypervisor, or a secure partition."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Protocol
from uuid import UUID

from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, Frame
from ffa.abi.ids import PAGE_SIZE, VERSION_1_2, Call, Property, fid
from ffa.abi.messages import NIL
from ffa.roles.machine import Machine


class Relayer(Protocol):
    """Whoever an endpoint calls: its hypervisor, its SPMC, or somebody's real implementation."""

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """The answer to a call that endpoint ``caller`` makes from its vCPU ``vcpu``. Never raises."""


DEFAULT_PROPERTIES = (
    *(Property.DIRECT_REQ_RECV, Property.DIRECT_REQ_SEND, Property.INDIRECT_MSG, Property.NOTIFICATIONS),
    *(Property.AARCH64, Property.DIRECT_REQ2_RECV, Property.DIRECT_REQ2_SEND),
)


class Endpoint:
    """One endpoint: makes calls, keeps a cursor in its own memory for buffers, and answers what it is asked.

    Subclasses override :meth:`receive`. ``el0`` says that it is an S-EL0 partition, which may change its mappings.
    """

    def __init__(
        self,
        id: int,
        machine: Machine,
        *,
        uuid: UUID = NIL,
        contexts: int = 1,
        properties: int = sum(DEFAULT_PROPERTIES),
        version: int = VERSION_1_2,
        el0: bool = False,
    ) -> None:
        self.id = id
        self.machine = machine
        self.uuid = uuid
        self.contexts = contexts
        self.properties = properties
        self.version = version  #: what its layouts are, once it has agreed on it
        self.el0 = el0
        self.relayer: Relayer | None = None  #: set when a partition manager takes it in
        self.tx = self.rx = self.buffer_size = 0

    def call(self, call: Call, *arguments: int, smc64: bool | None = None, vcpu: int = 0) -> Frame:
        """The answer to one call."""
        return self.send(Frame.of(call, *arguments, smc64=smc64), vcpu)

    def send(self, frame: Frame, vcpu: int = 0) -> Frame:
        """The answer to one call, given as a frame. Raises RuntimeError without a partition manager."""
        if self.relayer is None:
            raise RuntimeError("give the endpoint to a hypervisor or an SPMC first: manager.add(endpoint)")
        return self.relayer.call(self.id, frame, vcpu)

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        """What the endpoint does when it is asked or run: answers direct requests with its own registers given back,
        and has nothing to do otherwise. Returns a call, as on hardware: a direct response, FFA_MSG_WAIT, FFA_YIELD, or
        FFA_INTERRUPT where a model is preempted."""
        if frame.fid == fid(Call.RUN):
            return Frame.of(Call.MSG_WAIT)
        return respond(frame, *frame[3:8])

    # -- conveniences of every client

    def map_buffers(self, tx: int, rx: int, pages: int = 1) -> Frame:
        """FFA_RXTX_MAP of ``pages`` pages each at addresses ``tx`` and ``rx``."""
        answer = self.call(Call.RXTX_MAP, tx, rx, pages, smc64=True)
        if answer.ok:
            self.tx, self.rx, self.buffer_size = tx, rx, pages * PAGE_SIZE
        return answer

    def put(self, data: bytes) -> None:
        """Writes to the start of the TX buffer."""
        self.machine.write(self.id, self.tx, data)

    def got(self, size: int) -> bytes:
        """The first bytes of the RX buffer."""
        return self.machine.read(self.id, self.rx, size)

    def send_memory(self, call: Call, transaction: abi.Transaction, ranges: Sequence[abi.AddressRange]) -> Frame:
        """FFA_MEM_SHARE, _LEND or _DONATE, in as many fragments as TX asks for; the last answer: FFA_MEM_FRAG_RX if the
        relayer asks for what is not the next fragment."""
        blob = abi.build(self.version, transaction, ranges)
        cut = self.buffer_size
        self.put(blob[:cut])
        sent = min(cut, len(blob))
        answer = self.call(call, len(blob), sent, smc64=True)
        while answer.fid == fid(Call.MEM_FRAG_RX) and answer[3] == sent < len(blob):
            part = blob[sent : sent + cut]
            self.put(part)
            sent += len(part)
            answer = self.call(Call.MEM_FRAG_TX, answer[1], answer[2], len(part))
        return answer

    def retrieve(self, request: abi.Transaction) -> tuple[Frame, bytes]:
        """FFA_MEM_RETRIEVE_REQ, all fragments read and RX released: the first answer, or the one that is no fragment;
        and what there is of the descriptor."""
        blob = abi.build(self.version, request)
        self.put(blob)
        first = answer = self.call(Call.MEM_RETRIEVE_REQ, len(blob), len(blob), smc64=True)
        if answer.fid != fid(Call.MEM_RETRIEVE_RESP):
            return answer, b""
        found = self.got(min(answer[2], self.buffer_size))
        self.call(Call.RX_RELEASE)
        while len(found) < first[1]:
            handle = request.handle
            answer = self.call(Call.MEM_FRAG_RX, handle & 0xFFFF_FFFF, handle >> 32, len(found))
            if answer.fid != fid(Call.MEM_FRAG_TX) or not 0 < answer[3] <= self.buffer_size:
                return answer, found
            found += self.got(answer[3])
            self.call(Call.RX_RELEASE)
        return first, found

    def relinquish(self, handle: int, flags: int = 0) -> Frame:
        """FFA_MEM_RELINQUISH of the endpoint's own access."""
        self.put(abi.build_relinquish(handle, self.id, flags=flags))
        return self.call(Call.MEM_RELINQUISH)

    def reclaim(self, handle: int, flags: int = 0) -> Frame:
        """FFA_MEM_RECLAIM."""
        return self.call(Call.MEM_RECLAIM, handle & 0xFFFF_FFFF, handle >> 32, flags)


_DIRECT_RESP2 = fid(Call.MSG_SEND_DIRECT_RESP2)
_RESPONSES = {
    fid(Call.MSG_SEND_DIRECT_REQ): fid(Call.MSG_SEND_DIRECT_RESP),
    fid(Call.MSG_SEND_DIRECT_REQ, True): fid(Call.MSG_SEND_DIRECT_RESP, True),
    fid(Call.MSG_SEND_DIRECT_REQ2): fid(Call.MSG_SEND_DIRECT_RESP2),
}
"""Direct request → the response that answers it."""


def response_to(request: int) -> int | None:
    """The function id of the response to a direct request; None for anything else."""
    return _RESPONSES.get(request)


def respond(request: Frame, *values: int) -> Frame:
    """The direct response to ``request`` with ``values`` from x3 on (x4 on in a DIRECT_REQ2's, whose x3 is zero)."""
    return _response(_RESPONSES[request[0] & MASK32], request[1] & MASK32, values)


@lru_cache(maxsize=256)
def _response(function: int, ids: int, values: tuple[int, ...]) -> Frame:
    swapped = (ids & 0xFFFF) << 16 | ids >> 16
    if function == _DIRECT_RESP2:
        return Frame(function, swapped, 0, 0, *values)
    return Frame(function, swapped, 0, *values)
