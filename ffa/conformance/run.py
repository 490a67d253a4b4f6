"""One run of one case: calls, what they are expected to answer, and the account of both."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, pair
from ffa.abi.ids import ATTRIBUTES_NORMAL, PAGE_SIZE, Call, Data, Error, FfaError, Instruction, fid
from ffa.conformance.bench import Bench, Factory, Server, build, data_of, memory_of
from ffa.roles.endpoint import Relayer
from ffa.roles.machine import Access, AccessFaultError, Machine

PAIRS = ((1, 0x8001), (1, 2), (0x8001, 0x8002))
"""Client and server: a VM and a partition, two VMs, two partitions."""
RW, RO, NONE = "rw", "r", ""
RETRIEVED = fid(Call.MEM_RETRIEVE_RESP)


class CheckFailedError(Exception):
    """The implementation did not do what the case expects."""


@dataclass(frozen=True, slots=True)
class Made:
    """A call that was made."""

    caller: int
    frame: Frame
    answer: Frame

    def as_json(self) -> dict[str, object]:
        """For reports: both frames as text."""
        return {"caller": self.caller, "call": repr(self.frame), "answer": repr(self.answer)}


@dataclass(frozen=True, slots=True)
class Checked:
    """A check that was done."""

    what: str
    passed: bool
    found: str = ""

    def as_json(self) -> dict[str, object]:
        """For reports."""
        return {"what": self.what, "passed": self.passed, "found": self.found}


class Recorder:
    """Stands between endpoints and the implementation, and keeps what was called."""

    def __init__(self, behind: Relayer, made: list[Made]) -> None:
        self.behind = behind
        self.made = made

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """The implementation's answer."""
        answer = self.behind.call(caller, frame, vcpu)
        self.made.append(Made(caller, frame, answer))
        return answer


@dataclass(frozen=True, slots=True)
class Sent:
    """A memory transaction that was begun."""

    call: Call
    transaction: abi.Transaction
    ranges: list[abi.AddressRange]
    handle: int

    @property
    def sender(self) -> int:
        """Who sent it."""
        return self.transaction.sender

    @property
    def address(self) -> int:
        """The first byte."""
        return self.ranges[0][0]

    @property
    def pages(self) -> list[int]:
        """The address of each page."""
        return [page * PAGE_SIZE for page in abi.page_numbers(self.ranges)]


@dataclass(slots=True)
class Run:
    """A fresh bench with an implementation on it. All buffers are mapped."""

    factory: Factory
    calls: list[Made] = field(default_factory=list)
    checks: list[Checked] = field(default_factory=list)
    bench: Bench = field(init=False)
    response: bytes = b""  #: the last retrieve response's descriptor
    _used: dict[int, int] = field(default_factory=dict)
    _handles: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.restart()

    def restart(self, *, map_buffers: bool = True, host: bool = False, hypervisor: bool = False) -> None:
        """A fresh bench; the account goes on."""
        self.bench = build(host, hypervisor)
        implementation = self.factory(self.bench)
        self._used, self._handles = {}, set()
        for endpoint in self.bench.endpoints.values():
            endpoint.relayer = Recorder(implementation, self.calls)
            if map_buffers:
                base = memory_of(endpoint.id)
                self.ok(endpoint.map_buffers(base, base + PAGE_SIZE), f"endpoint {endpoint.id:#x} maps its buffers")

    @property
    def machine(self) -> Machine:
        """The bench's."""
        return self.bench.machine

    def endpoint(self, id: int) -> Server:
        """An endpoint."""
        return self.bench.endpoints[id]

    def call(self, id: int, call: Call, *arguments: int, smc64: bool | None = None, vcpu: int = 0) -> Frame:
        """The answer to a call of an endpoint."""
        return self.endpoint(id).call(call, *arguments, smc64=smc64, vcpu=vcpu)

    # -- checks. Each raises CheckFailedError, which ends the case.

    def true(self, found: bool, what: str, shown: object = "") -> None:
        """``found`` is to be true."""
        self.checks.append(Checked(what, found, "" if found and not shown else str(shown)))
        if not found:
            raise CheckFailedError(f"{what}: {shown}" if shown != "" else what)

    def equal(self, found: object, wanted: object, what: str) -> None:
        """``found`` is to be ``wanted``."""
        same = found == wanted
        self.true(same, what, "" if same else f"{found!r}, not {wanted!r}")

    def ok(self, answer: Frame, what: str) -> Frame:
        """The call is to succeed, and FFA_SUCCESS to have nothing in w1."""
        self.true(answer.ok and not answer[1], what, "" if answer.ok and not answer[1] else repr(answer))
        return answer

    def fails(self, answer: Frame, code: Error, what: str, *others: Error) -> None:
        """The call is to fail with ``code``, or one of ``others`` where the suites or the versions differ."""
        right = answer.error in (code, *others)
        names = " or ".join(c.name for c in (code, *others))
        self.true(right, f"{what}: {names}", "" if right else repr(answer))

    def refused(self, answer: Frame, what: str) -> None:
        """The call is to fail, whatever the code."""
        self.true(answer.error is not None, f"{what}: refused", "" if answer.error is not None else repr(answer))

    def is_call(self, answer: Frame, call: Call, what: str, smc64: bool = False) -> Frame:
        """The answer is to be ``call``."""
        right = answer.fid == fid(call, smc64)
        self.true(right, what, "" if right else repr(answer))
        return answer

    # -- memory

    def fresh(self, id: int, count: int = 1) -> list[abi.AddressRange]:
        """Pages of an endpoint that no transaction has been about, none beside another."""
        first = self._used.get(id, 0)
        self._used[id] = first + 2 * count + 1
        return data_of(id, first, count)

    def access(self, id: int, address: int) -> str:
        """What an endpoint can do there, by trying it: RW, RO or NONE."""
        try:
            old = self.machine.read(id, address, 1)
        except AccessFaultError:
            return NONE
        try:
            self.machine.write(id, address, old)
        except AccessFaultError:
            return RO
        return RW

    def executes(self, id: int, sent: Sent, wanted: bool, when: str) -> None:
        """An endpoint is to be able, or not, to execute each page."""
        states = [self.machine.state(page // PAGE_SIZE) for page in sent.pages]
        found = {state is not None and Access.X in state.of(id) for state in states}
        self.equal(found, {wanted}, f"{id:#x} may {'' if wanted else 'not '}execute it {when}")

    def has(self, id: int, sent: Sent, wanted: str, when: str) -> None:
        """An endpoint is to have this access to each page."""
        found = {self.access(id, page) for page in sent.pages}
        self.equal(found, {wanted}, f"{id:#x} has access {wanted or 'none'!r} {when}")

    def transaction(self, call: Call, sender: int, *receivers: int, **changes: object) -> abi.Transaction:
        """A descriptor as it should be, and then with ``changes``; ``permissions`` is every receiver's."""
        data = Data.NOT_SPECIFIED if call is Call.MEM_DONATE else Data.RW
        permissions = int(changes.pop("permissions", data))  # type: ignore[call-overload]
        impdef = changes.pop("impdef", (0, 0))
        named = call is Call.MEM_SHARE or (call is Call.MEM_LEND and len(receivers) > 1)
        entries = tuple(abi.Receiver(r, permissions, impdef=impdef) for r in receivers)  # type: ignore[arg-type]
        right = abi.Transaction(sender, entries, ATTRIBUTES_NORMAL if named else 0)
        return replace(right, **changes)  # type: ignore[arg-type]

    def send(
        self,
        call: Call,
        transaction: abi.Transaction,
        ranges: list[abi.AddressRange],
        *,
        by: int | None = None,
        smc64: bool = True,
        patch: dict[int, bytes] | None = None,
        more: int = 0,
        fragment: int = 0,
    ) -> Frame:
        """Sends a descriptor: ``patch`` overwrites bytes of it, ``more`` is added to the total length, ``fragment`` to
        the length of the first fragment."""
        endpoint = self.endpoint(transaction.sender if by is None else by)
        blob = bytearray(abi.build(endpoint.version, transaction, ranges))
        for at, data in (patch or {}).items():
            blob[at : at + len(data)] = data
        endpoint.put(bytes(blob[: endpoint.buffer_size]))
        return endpoint.call(call, len(blob) + more, len(blob) + fragment, smc64=smc64)

    def sent(
        self, call: Call, sender: int, *receivers: int, count: int = 1, smc64: bool = True, **changes: object
    ) -> Sent:
        """Fresh pages, sent: the answer is checked, and the handle is."""
        transaction, ranges = self.transaction(call, sender, *receivers, **changes), self.fresh(sender, count)
        answer = self.send(call, transaction, ranges, smc64=smc64)
        return self.begun(answer, call, transaction, ranges)

    def begun(self, answer: Frame, call: Call, transaction: abi.Transaction, ranges: list[abi.AddressRange]) -> Sent:
        """Checks the answer to the last fragment."""
        self.ok(answer, f"FFA_{call.name}")
        self.equal(answer[4:8], (0,) * 4, "reserved registers are zero")
        handle = pair(answer[2], answer[3])
        self.true(handle != 0 and handle not in self._handles, "a success has a fresh handle", f"{handle:#x}")
        self._handles.add(handle)
        return Sent(call, transaction, ranges, handle)

    def request(self, sent: Sent, by: int, **changes: object) -> abi.Transaction:
        """A retrieve request as it should be, and then with ``changes``; ``permissions`` is every receiver's."""
        one = sent.call is Call.MEM_DONATE or (sent.call is Call.MEM_LEND and len(sent.transaction.receivers) == 1)
        instruction = Instruction.NX if one else Instruction.NOT_SPECIFIED
        permissions: Any = changes.pop("permissions", None)
        receivers = tuple(
            replace(
                r, permissions=(r.permissions & 3 or Data.RW) | instruction << 2 if permissions is None else permissions
            )
            for r in sent.transaction.receivers
        )
        right = abi.Transaction(sent.sender, receivers, handle=sent.handle, tag=sent.transaction.tag)
        return replace(right, **changes)  # type: ignore[arg-type]

    def retrieve(
        self,
        request: abi.Transaction,
        by: int,
        *,
        smc64: bool = True,
        patch: dict[int, bytes] | None = None,
        more: int = 0,
    ) -> Frame:
        """Asks, and releases RX if there is something in it."""
        endpoint = self.endpoint(by)
        blob = bytearray(abi.build(endpoint.version, request))
        for at, data in (patch or {}).items():
            blob[at : at + len(data)] = data
        endpoint.put(bytes(blob))
        answer = endpoint.call(Call.MEM_RETRIEVE_REQ, len(blob) + more, len(blob) + more, smc64=smc64)
        if answer.fid == RETRIEVED:
            self.response = endpoint.got(min(answer[2], endpoint.buffer_size))
            self.ok(endpoint.call(Call.RX_RELEASE), f"{by:#x} releases RX")
        return answer

    def retrieved(self, sent: Sent, by: int, smc64: bool = True, **changes: object) -> abi.Transaction:
        """Retrieves: the answer is checked, and what it says."""
        request = self.request(sent, by, **changes)
        answer = self.retrieve(request, by, smc64=smc64)
        self.is_call(answer, Call.MEM_RETRIEVE_RESP, f"{by:#x} retrieves")
        self.equal(answer[1], answer[2], "the whole response is in RX")
        self.equal(len(self.response), answer[2], "the response has the length that is told")
        try:
            found = abi.parse(self.response, self.endpoint(by).version)
            composite = abi.parse_composite(self.response, found.receivers[0].composite)
            ranges = abi.parse_ranges(self.response[composite.ranges :])
        except (FfaError, IndexError) as e:
            self.true(False, "the response is well-formed", e)
            raise
        told = (found.sender, found.handle, found.tag)
        self.equal(told, (sent.sender, sent.handle, sent.transaction.tag), "sender, handle and tag are those sent")
        self.true(by in {r.endpoint for r in found.receivers}, "the response is for the receiver")
        self.equal(ranges, sent.ranges, "the ranges are those sent")
        self.equal(composite.pages, len(sent.pages), "so is their number of pages")
        return found

    def relinquish(self, by: int, handle: int, flags: int = 0) -> Frame:
        """FFA_MEM_RELINQUISH."""
        return self.endpoint(by).relinquish(handle, flags)

    def reclaim(self, sent: Sent, flags: int = 0) -> Frame:
        """FFA_MEM_RECLAIM by the sender."""
        return self.endpoint(sent.sender).reclaim(sent.handle, flags)

    def end(self, sent: Sent, *holders: int) -> None:
        """Holders relinquish, the sender reclaims; it alone has access then."""
        for by in holders:
            self.ok(self.relinquish(by, sent.handle), f"{by:#x} relinquishes")
            self.has(by, sent, NONE, "after it relinquished")
        self.ok(self.reclaim(sent), f"{sent.sender:#x} reclaims")
        self.alone(sent, sent.sender)

    def alone(self, sent: Sent, owner: int) -> None:
        """Only ``owner`` has access."""
        for id in {owner, sent.sender, *(r.endpoint for r in sent.transaction.receivers)}:
            self.has(id, sent, RW if id == owner else NONE, "when it is the owner's alone")

    def unchanged(self, id: int, ranges: Iterable[abi.AddressRange], what: str) -> None:
        """After a refusal: the sender still has the pages."""
        found = {self.access(id, page * PAGE_SIZE) for page in abi.page_numbers(ranges)}
        self.equal(found, {RW}, f"{what}: the sender's pages are still its own")
