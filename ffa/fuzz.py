"""A fuzzer of partition managers: random and mutated calls of several endpoints, and what must hold after each.

The model here keeps its own account of every page, from the calls that succeeded and nothing else, and holds the
machine against it after each call: one owner for each page; no access without a grant; nothing reclaimable while it is
borrowed; a failed call changed nothing; a success carries a fresh handle. ``python -m ffa.fuzz CALLS [SEED]``.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from uuid import UUID

from ffa.abi import messages
from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, MASK64, Frame, halves, pair
from ffa.abi.ids import (
    ATTRIBUTES_NORMAL,
    BY_FID,
    FLAG_CLEAR,
    HANDLE_HYPERVISOR_BIT,
    PAGE_SIZE,
    VERSION_1_0,
    VERSION_1_1,
    VERSION_1_2,
    Call,
    Data,
    Error,
    FfaError,
    fid,
    is_secure,
)
from ffa.roles.endpoint import Endpoint, Relayer
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Access, Machine
from ffa.roles.spmc import Spmc

SENDS = (Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE)
OWN_PAGES = 16
"""Pages of each endpoint: few, so that calls meet each other."""


class InvariantError(AssertionError):
    """What must hold does not."""


@dataclass(slots=True)
class World:
    """Endpoints, and whom each of them calls."""

    machine: Machine
    endpoints: dict[int, Endpoint]
    bases: dict[int, int]  #: endpoint → address of its pages


class Restless(Endpoint):
    """An endpoint that seldom does what it is asked: it is interrupted, yields, answers nonsense, or makes calls."""

    rng: random.Random

    def receive(self, frame: Frame, vcpu: int) -> Frame:
        """Anything an endpoint can do with the processor."""
        rng = self.rng
        dice = rng.random()
        if dice < 0.4:
            return super().receive(frame, vcpu)
        if dice < 0.6:
            return Frame.of(rng.choice((Call.INTERRUPT, Call.YIELD, Call.MSG_WAIT, Call.ERROR)))
        if dice < 0.7:
            return Frame(rng.choice(tuple(BY_FID)), *(rng.getrandbits(16) for _ in range(7)))
        call = rng.choice((Call.MSG_SEND_DIRECT_REQ, Call.RUN, Call.ID_GET, Call.MSG_WAIT, Call.MSG_SEND_DIRECT_RESP))
        target = rng.choice((1, 2, 3, 0x8001, 0x8002))
        self.call(call, self.id << 16 | target if call is not Call.RUN else target << 16, vcpu=vcpu)
        return super().receive(frame, vcpu)


def restless_world() -> World:
    """As stacked_world(), with endpoints that seldom do what they are asked, and a scheduler."""
    world = stacked_world()
    rng = random.Random(4)
    for endpoint in world.endpoints.values():
        endpoint.__class__ = Restless
        endpoint.rng = rng  # type: ignore[attr-defined]
    hypervisor = world.endpoints[1].relayer
    assert isinstance(hypervisor, Hypervisor)
    hypervisor.scheduler = 1
    return world


def lonely_world() -> World:
    """Three VMs on a hypervisor without an SPMC."""
    machine = Machine()
    hypervisor = Hypervisor(machine)
    endpoints: dict[int, Endpoint] = {}
    bases: dict[int, int] = {}
    for id in (1, 2, 3):
        endpoints[id] = Endpoint(id, machine, contexts=2, uuid=UUID(int=id))
        bases[id] = 0x4000_0000 + id * 0x10_0000
        machine.add(id, bases[id], OWN_PAGES)
        hypervisor.add(endpoints[id])
    return World(machine, endpoints, bases)


def stacked_world(versions: tuple[int, ...] = (VERSION_1_0, VERSION_1_1, VERSION_1_2)) -> World:
    """A VM of each version on a hypervisor, on an SPMC with two partitions, one with memory of the normal world."""
    machine = Machine()
    spmc = Spmc(machine)
    endpoints: dict[int, Endpoint] = {}
    bases: dict[int, int] = {}
    for n in range(2):
        id = 0x8001 + n
        endpoints[id] = Endpoint(id, machine, contexts=2, uuid=UUID(int=n + 1), el0=n == 1)
        bases[id] = 0x0E00_0000 + n * 0x10_0000
        machine.add(id, bases[id], OWN_PAGES, secure=n == 0)
        spmc.add(endpoints[id])
    hypervisor = Hypervisor(machine, spmc)
    for n, version in enumerate(versions):
        id = 1 + n
        endpoints[id] = Endpoint(id, machine, contexts=2, uuid=UUID(int=100 + n), version=version)
        bases[id] = 0x4000_0000 + n * 0x10_0000
        machine.add(id, bases[id], OWN_PAGES)
        hypervisor.add(endpoints[id])
    return World(machine, endpoints, bases)


def host_world() -> World:
    """The operating system directly on an SPMC with two partitions, one of which has memory of the normal world."""
    machine = Machine()
    spmc = Spmc(machine)
    endpoints: dict[int, Endpoint] = {0: Endpoint(0, machine, contexts=2)}
    bases = {0: 0x4000_0000}
    machine.add(0, bases[0], OWN_PAGES)
    spmc.attach(endpoints[0])
    for n in range(2):
        id = 0x8001 + n
        endpoints[id] = Endpoint(id, machine, contexts=1, uuid=UUID(int=n + 1), el0=n == 1)
        bases[id] = 0x0E00_0000 + n * 0x10_0000
        machine.add(id, bases[id], OWN_PAGES, secure=n == 0)
        spmc.add(endpoints[id])
    return World(machine, endpoints, bases)


WORLDS = (stacked_world, host_world, restless_world, lonely_world)


@dataclass(slots=True)
class Page:
    """A page in the model's account."""

    owner: int
    access: dict[int, Access]
    handle: int | None = None
    buffer: bool = False

    @property
    def alone(self) -> bool:
        """Only its owner has it, and it is free to be given away."""
        return self.handle is None and not self.buffer and self.access == {self.owner: Access.RWX}


@dataclass(slots=True)
class Sent:
    """A transaction in the model's account."""

    call: Call
    sender: int
    tag: int
    given: dict[int, int]  #: receiver → permission byte
    flags: int
    pages: list[int] = field(default_factory=list)
    data: bytes = b""
    size: int = 0
    complete: bool = False
    holders: set[int] = field(default_factory=set)


@dataclass(slots=True)
class Step:
    """One call: who makes it, the registers, and what is put into TX before."""

    caller: int
    frame: Frame
    tx: bytes = b""


class Fuzzer:
    """Makes calls and checks. Everything follows from ``seed``."""

    def __init__(self, seed: int, world: Callable[[], World] = stacked_world) -> None:
        self.rng = random.Random(seed)
        self.world = world()
        self.ids = sorted(self.world.endpoints)
        self.answers: Counter[str] = Counter()
        self.pages: dict[int, Page] = {}
        for id, base in self.world.bases.items():
            for n in range(OWN_PAGES):
                self.pages[base // PAGE_SIZE + n] = Page(id, {id: Access.RWX})
        self.buffers: dict[int, tuple[int, int, int]] = {}  #: endpoint → TX, RX, pages
        self.versions = {id: e.version for id, e in self.world.endpoints.items()}
        self.sent: dict[int, Sent] = {}
        self.handles: set[int] = set()
        for id in self.ids:
            self.do(self._map(id))

    # -- what to call

    def random_step(self) -> Step:
        """A call: mostly one that makes sense, often with something changed."""
        rng = self.rng
        caller = rng.choice(self.ids)
        make = rng.choices(tuple(_MAKERS), tuple(_MAKERS.values()))[0]
        step: Step = make(self, caller)
        dice = rng.random()
        if dice < 0.15:
            step = self._mutate_frame(step)
        elif dice < 0.30 and step.tx:
            step = self._mutate_tx(step)
        return step

    def _mutate_frame(self, step: Step) -> Step:
        rng, x = self.rng, list(step.frame)
        where = rng.randrange(18) if rng.random() < 0.2 else rng.randrange(8)
        x[where] = rng.choice((0, 1, x[where] ^ 1 << rng.randrange(64), rng.getrandbits(64), rng.getrandbits(16)))
        return Step(step.caller, Frame(*x), step.tx)

    def _mutate_tx(self, step: Step) -> Step:
        rng, data = self.rng, bytearray(step.tx)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(len(data))
            data[at] = rng.choice((0, 1, 0xFF, data[at] ^ 1 << rng.randrange(8), rng.randrange(256)))
        return Step(step.caller, step.frame, bytes(data))

    def _map(self, id: int) -> Step:
        base = self.world.bases[id]
        at = (
            base
            if id not in self.buffers or self.rng.random() < 0.8
            else base + self.rng.randrange(OWN_PAGES) * PAGE_SIZE
        )
        return Step(id, Frame.of(Call.RXTX_MAP, at, at + PAGE_SIZE, 1, smc64=True))

    def _unmap(self, id: int) -> Step:
        return Step(id, Frame.of(Call.RXTX_UNMAP))

    def _some_ranges(self, id: int) -> list[abi.AddressRange]:
        rng = self.rng
        if rng.random() < 0.1:
            mine = sorted(self.pages)
        else:
            mine = [p for p, page in self.pages.items() if page.owner == id and not page.buffer]
            if rng.random() < 0.7:
                mine = [p for p in mine if self.pages[p].alone] or mine
        if not mine:
            return [(self.world.bases[id], 1)]
        chosen = rng.sample(mine, min(len(mine), rng.choice((1, 1, 2, 3, 6))))
        twice = rng.random() < 0.03
        return abi.ranges_of(sorted(chosen)) * (1 + twice)

    def _send(self, id: int) -> Step:
        rng = self.rng
        call = rng.choice((Call.MEM_SHARE, Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_LEND, Call.MEM_DONATE))
        others = [o for o in self.ids if o != id] + ([0x8009] if rng.random() < 0.05 else [])
        count = 1 if call is Call.MEM_DONATE or rng.random() < 0.7 else 2
        to = rng.sample(others, min(count, len(others)))
        data = Data.NOT_SPECIFIED if call is Call.MEM_DONATE else rng.choice((Data.RO, Data.RW, Data.RW))
        attributes = ATTRIBUTES_NORMAL if call is Call.MEM_SHARE or len(to) > 1 else 0
        flags = FLAG_CLEAR if call is not Call.MEM_SHARE and rng.random() < 0.2 else 0
        receivers = tuple(abi.Receiver(o, data) for o in to)
        blob = abi.build(
            self.versions[id],
            abi.Transaction(id, receivers, attributes, flags, tag=rng.randrange(3)),
            self._some_ranges(id),
        )
        size = len(blob) - 16 * rng.randrange(1, 3) if rng.random() < 0.2 else len(blob)
        return Step(id, Frame.of(call, len(blob), size, smc64=rng.random() < 0.5), blob[:size])

    def _fragment(self, id: int) -> Step:
        waiting = [h for h, s in self.sent.items() if not s.complete and (s.sender == id or self.rng.random() < 0.1)]
        if not waiting:
            return self._send(id)
        handle = self.rng.choice(waiting)
        s = self.sent[handle]
        rest = s.size - len(s.data)
        pages = self._some_ranges(s.sender)
        data = abi.pack_ranges((pages * (rest // 16 + 1))[: rest // 16]) if self.rng.random() < 0.5 else bytes(rest)
        return Step(s.sender, Frame.of(Call.MEM_FRAG_TX, *halves(handle), len(data)), data)

    def _any_handle(self) -> int:
        rng = self.rng
        if self.sent and rng.random() < 0.95:
            return rng.choice(list(self.sent))
        return rng.choice((0, 1, HANDLE_HYPERVISOR_BIT | 1, MASK64, rng.getrandbits(64)))

    def _retrieve(self, id: int) -> Step:
        rng, handle = self.rng, self._any_handle()
        s = self.sent.get(handle)
        if s is None:
            return Step(id, Frame.of(Call.MEM_RETRIEVE_REQ, 64, 64), bytes(64))
        caller = rng.choice(list(s.given)) if rng.random() < 0.95 else id
        if caller not in self.versions:
            caller = id
        one = len(s.given) == 1 and s.call is not Call.MEM_SHARE
        instruction = rng.choice((1, 2)) if one else 0
        receivers = tuple(
            abi.Receiver(o, (given & 3 if rng.random() < 0.8 else rng.randrange(3)) | instruction << 2)
            for o, given in s.given.items()
        )
        flags = 4 if s.call is not Call.MEM_SHARE and rng.random() < 0.1 else 0
        request = abi.Transaction(s.sender, receivers, 0, flags, handle, s.tag)
        blob = abi.build(self.versions[caller], request)
        return Step(caller, Frame.of(Call.MEM_RETRIEVE_REQ, len(blob), len(blob)), blob)

    def _relinquish(self, id: int) -> Step:
        handle = self._any_handle()
        s = self.sent.get(handle)
        if s is not None and s.holders and self.rng.random() < 0.9:
            id = self.rng.choice(sorted(s.holders))
        flags = int(self.rng.random() < 0.1)
        return Step(id, Frame.of(Call.MEM_RELINQUISH), abi.build_relinquish(handle, id, flags=flags))

    def _reclaim(self, id: int) -> Step:
        handle = self._any_handle()
        s = self.sent.get(handle)
        if s is not None and self.rng.random() < 0.9:
            id = s.sender
        return Step(id, Frame.of(Call.MEM_RECLAIM, *halves(handle), int(self.rng.random() < 0.1)))

    def _release(self, id: int) -> Step:
        return Step(id, Frame.of(Call.RX_RELEASE))

    def _direct(self, id: int) -> Step:
        to = self.rng.choice(self.ids)
        call = self.rng.choice((Call.MSG_SEND_DIRECT_REQ, Call.MSG_SEND_DIRECT_REQ2))
        return Step(id, Frame.of(call, id << 16 | to, 0, 0, *(self.rng.getrandbits(32) for _ in range(4))))

    def _message(self, id: int) -> Step:
        to = self.rng.choice(self.ids)
        if self.versions[id] < VERSION_1_1:
            return Step(id, Frame.of(Call.MSG_SEND, id << 16 | to, 0, 32), bytes(range(32)))
        data = messages.build_message(messages.Message(id, to, b"to you"), self.versions[id])
        return Step(id, Frame.of(Call.MSG_SEND2), data)

    def _notification(self, id: int) -> Step:
        rng = self.rng
        other, bit = rng.choice(self.ids), 1 << rng.randrange(4)
        single = int(rng.random() < 0.2)
        frame = rng.choice(
            (
                Frame.of(Call.NOTIFICATION_BIND, other << 16 | id, single, bit),
                Frame.of(Call.NOTIFICATION_UNBIND, other << 16 | id, 0, bit),
                Frame.of(Call.NOTIFICATION_SET, id << 16 | other, single, bit),
                Frame.of(Call.NOTIFICATION_GET, rng.randrange(2) << 16 | id, rng.randrange(16)),
                Frame.of(Call.NOTIFICATION_INFO_GET, smc64=bool(rng.randrange(2))),
                Frame.of(Call.NOTIFICATION_BITMAP_CREATE, rng.choice(self.ids), 2),
            )
        )
        return Step(id, frame)

    def _simple(self, id: int) -> Step:
        rng = self.rng
        calls = (
            *(Call.ID_GET, Call.SPM_ID_GET, Call.MSG_WAIT, Call.MSG_POLL, Call.YIELD, Call.PARTITION_INFO_GET),
            *(Call.FEATURES, Call.RUN, Call.CONSOLE_LOG, Call.MEM_PERM_GET, Call.MEM_PERM_SET, Call.RX_ACQUIRE),
            *(
                Call.PARTITION_INFO_GET_REGS,
                Call.MEM_FRAG_RX,
                Call.MSG_SEND_DIRECT_RESP,
                Call.NOTIFICATION_BITMAP_DESTROY,
            ),
        )
        call = rng.choice(calls)
        arguments: tuple[int, ...] = ()
        if call is Call.FEATURES:
            arguments = (rng.choice((*BY_FID, 1, 2, 3)),)
        elif call is Call.RUN:
            arguments = (rng.choice(self.ids) << 16 | rng.randrange(2),)
        elif call in (Call.MEM_PERM_GET, Call.MEM_PERM_SET):
            arguments = (self.world.bases[id], 1, 5)
        elif call is Call.CONSOLE_LOG:
            arguments = (4, 0x61626364)
        elif call is Call.MEM_FRAG_RX:
            arguments = (*halves(self._any_handle()), rng.randrange(64) * 16)
        return Step(id, Frame.of(call, *arguments))

    def _noise(self, id: int) -> Step:
        rng = self.rng
        function = rng.choice((rng.choice(tuple(BY_FID)), rng.getrandbits(32)))
        registers = (rng.choice((0, 0, rng.getrandbits(64), rng.getrandbits(16))) for _ in range(17))
        return Step(id, Frame(function, *registers), rng.randbytes(64))

    # -- what must hold

    def do(self, step: Step) -> Frame:
        """Makes one call and checks. Raises InvariantError."""
        caller = self.world.endpoints[step.caller]
        buffers = self.buffers.get(step.caller)
        if step.tx and buffers is not None:
            self.world.machine.store(buffers[0], step.tx[: buffers[2] * PAGE_SIZE])
        seen = self._descriptor(step)
        answer = caller.send(step.frame, self.rng.randrange(2))
        self._well_formed(step, answer)
        try:
            self._account(step, answer, seen)
        except (FfaError, LookupError, StopIteration) as e:
            raise InvariantError(f"a success that makes no sense ({e!r}): {step} -> {answer!r}") from None
        self._compare(step, answer)
        return answer

    def run(self, calls: int) -> None:
        """Makes ``calls`` random calls. Raises InvariantError."""
        for _ in range(calls):
            self.do(self.random_step())

    def _descriptor(self, step: Step) -> bytes:
        """What the call will find in its buffer."""
        found = BY_FID.get(step.frame.fid)
        if found is None:
            return b""
        call = found[0].call
        x = step.frame if found[1] else step.frame.narrow
        size = {Call.MEM_RELINQUISH: PAGE_SIZE, Call.MEM_FRAG_TX: x[3]}.get(call, x[2] & MASK32)
        address = x[3] if call in (*SENDS, Call.MEM_RETRIEVE_REQ) else 0
        buffers = self.buffers.get(step.caller)
        at = address or (buffers[0] if buffers else 0)
        if not at or size > OWN_PAGES * PAGE_SIZE or self.world.machine.region(at // PAGE_SIZE) is None:
            return b""
        region = self.world.machine.region(at // PAGE_SIZE)
        if region is None or at + size > region.end * PAGE_SIZE:
            return b""
        return self.world.machine.fetch(at, size)

    def _well_formed(self, step: Step, answer: Frame) -> None:
        found = BY_FID.get(answer.fid)
        version = step.frame.fid == fid(Call.VERSION)
        if found is None:
            self._must(version, step, answer, "an answer that is no FF-A function")
            self.answers["VERSION"] += 1
            return
        call = found[0].call
        if call is Call.ERROR:
            self._must(answer.error is not None and not any(answer[3:8]), step, answer, "an error without a code")
            self._must(answer[8:] == step.frame[8:], step, answer, "an error does not preserve x8 to x17")
            self.answers[f"{_label(step)}: {answer.error.name if answer.error is not None else ''}"] += 1
            return
        self.answers[f"{_label(step)}: ok"] += 1

    def _must(self, holds: bool, step: Step, answer: Frame, what: str) -> None:
        if not holds:
            raise InvariantError(f"{what}: endpoint {step.caller:#x} {step.frame!r} -> {answer!r}, TX {step.tx.hex()}")

    def _account(self, step: Step, answer: Frame, seen: bytes) -> None:
        """Enters a successful call into the model's account, or finds that it must not have succeeded."""
        found, got = BY_FID.get(step.frame.fid), BY_FID.get(answer.fid)
        if found is None or got is None:
            if found is not None and found[0].call is Call.VERSION and answer[0] >> 31 == 0:
                self.versions[step.caller] = min(step.frame[1] & MASK32, answer[0])
                self.world.endpoints[step.caller].version = self.versions[step.caller]
            return
        call, failed = found[0].call, got[0].call is Call.ERROR
        x = step.frame if found[1] else step.frame.narrow
        id = step.caller
        if call is Call.MEM_FRAG_TX and failed:
            s = self.sent.get(pair(x[1], x[2]))
            if s is not None and s.sender == id and not s.complete:
                # A bad fragment ends the transaction, a bad register does not: it tells which by whether it goes on.
                self._forget_if_gone(pair(x[1], x[2]), s)
            return
        if call is Call.MEM_RECLAIM:
            self._reclaimed(step, x, answer, failed)
        if failed:
            return
        if call is Call.RXTX_MAP:
            self._mapped(step, x, answer)
        elif call is Call.RXTX_UNMAP:
            tx, rx, count = self.buffers.pop(id)
            for page in _buffer_pages(tx, rx, count):
                self.pages[page] = Page(id, {id: Access.RWX})
        elif call in SENDS:
            self._send_accepted(step, answer, call, x, seen)
        elif call is Call.MEM_FRAG_TX:
            s = self.sent[pair(x[1], x[2])]
            self._must(s.sender == id and not s.complete, step, answer, "a fragment of nothing")
            s.data += seen
            self._progress(step, answer, pair(x[1], x[2]), s)
        elif call is Call.MEM_RETRIEVE_REQ:
            self._retrieved(step, answer, seen)
        elif call is Call.MEM_RELINQUISH:
            self._relinquished(step, answer, seen)

    def _forget_if_gone(self, handle: int, s: Sent) -> None:
        # An incomplete transaction has no effect on pages: asking for its reclaim is harmless and tells nothing, so
        # the account keeps no incomplete transaction after an error.
        del self.sent[handle]
        empty = Frame.of(Call.MEM_FRAG_TX, *halves(handle), 0)
        self.world.endpoints[s.sender].send(empty)

    def _mapped(self, step: Step, x: Frame, answer: Frame) -> None:
        id, count = step.caller, x[3] & MASK32
        for page in _buffer_pages(x[1], x[2], count):
            state = self.pages.get(page)
            self._must(state is not None and state.owner == id and state.alone, step, answer, "buffers of another")
            self.pages[page] = Page(id, {id: Access.RW}, buffer=True)
        self.buffers[id] = (x[1], x[2], count)

    def _send_accepted(self, step: Step, answer: Frame, call: Call, x: Frame, seen: bytes) -> None:
        id = step.caller
        try:
            t = abi.parse(seen, self.versions[id])
            c = abi.parse_composite(seen, t.receivers[0].composite)
        except (FfaError, IndexError):
            raise InvariantError(f"an accepted descriptor that cannot be read: {step}") from None
        handle = pair(answer[2], answer[3]) if answer.ok else pair(answer[1], answer[2])
        secure = any(is_secure(r.endpoint) for r in t.receivers) or is_secure(id)
        fresh = handle not in self.handles and handle != MASK64
        self._must(fresh and bool(handle >> 63) is not (secure or 0 in self.ids), step, answer, "no fresh handle")
        self._must(t.sender == id, step, answer, "memory sent in another's name")
        self.handles.add(handle)
        given = {r.endpoint: r.permissions for r in t.receivers}
        s = Sent(call, id, t.tag, given, t.flags, data=seen[c.ranges :], size=16 * c.count)
        self.sent[handle] = s
        self._progress(step, answer, handle, s)

    def _progress(self, step: Step, answer: Frame, handle: int, s: Sent) -> None:
        if len(s.data) < s.size:
            self._must(answer.fid == fid(Call.MEM_FRAG_RX), step, answer, "success before all fragments have come")
            return
        self._must(answer.ok and pair(answer[2], answer[3]) == handle, step, answer, "no success for the last fragment")
        s.complete = True
        s.pages = abi.page_numbers(abi.parse_ranges(s.data))
        self._must(len(set(s.pages)) == len(s.pages), step, answer, "a page twice")
        kept = {s.sender: Access.RWX} if s.call is Call.MEM_SHARE else {}
        for number in s.pages:
            page = self.pages.get(number)
            self._must(page is not None and page.owner == s.sender and page.alone, step, answer, "a page of another")
            self.pages[number] = Page(s.sender, dict(kept), handle)

    def _retrieved(self, step: Step, answer: Frame, seen: bytes) -> None:
        t = abi.parse(seen, self.versions[step.caller])
        s, id = self.sent.get(t.handle), step.caller
        if s is None:
            raise InvariantError(f"nothing to retrieve: {step} -> {answer!r}")
        self._must(s.complete and id in s.given and id not in s.holders, step, answer, "retrieved without a right to")
        self._must(t.tag == s.tag and t.sender == s.sender, step, answer, "retrieved in another's name")
        asked = next(r.permissions for r in t.receivers if r.endpoint == id)
        given = s.given[id] & 3
        data = asked & 3 or given or Data.RW
        self._must(not (given == Data.RO and data == Data.RW), step, answer, "more access than was given")
        access = (Access.R if data == Data.RO else Access.RW) | (Access.X if asked >> 2 == 2 else Access.NONE)
        if s.call is Call.MEM_DONATE:
            for number in s.pages:
                self.pages[number] = Page(id, {id: Access.RWX})
            del self.sent[t.handle]
            return
        s.holders.add(id)
        for number in s.pages:
            self.pages[number].access[id] = access

    def _relinquished(self, step: Step, answer: Frame, seen: bytes) -> None:
        request = abi.parse_relinquish(seen)
        s = self.sent.get(request.handle)
        self._must(s is not None and step.caller in s.holders, step, answer, "relinquished what it did not have")
        assert s is not None
        s.holders.discard(step.caller)
        for number in s.pages:
            del self.pages[number].access[step.caller]

    def _reclaimed(self, step: Step, x: Frame, answer: Frame, failed: bool) -> None:
        handle = pair(x[1], x[2])
        s = self.sent.get(handle)
        right = s is not None and s.complete and s.sender == step.caller and x[3] < 4 and not any(x[4:8])
        if failed:
            if right and s is not None and not s.holders:
                raise InvariantError(f"a handle that RECLAIM does not accept: {step} -> {answer!r}")
            if right and answer.error is not Error.DENIED:
                raise InvariantError(f"borrowed memory, reclaimed, is not DENIED: {step} -> {answer!r}")
            return
        self._must(right and s is not None and not s.holders, step, answer, "reclaimed without a right to")
        assert s is not None
        del self.sent[handle]
        for number in s.pages:
            self.pages[number] = Page(s.sender, {s.sender: Access.RWX})

    def _compare(self, step: Step, answer: Frame) -> None:
        """Every page of the machine is as the account says."""
        state_of = self.world.machine.state
        for number, page in self.pages.items():
            state = state_of(number)
            if (
                state is None
                or state.owner != page.owner
                or dict(state.access) != page.access
                or state.handle != page.handle
                or state.buffer != page.buffer
            ):
                raise InvariantError(f"page {number:#x} is {state}, not {page}: after {step} -> {answer!r}")


_MAKERS: dict[Callable[[Fuzzer, int], Step], float] = {
    Fuzzer._send: 20,
    Fuzzer._fragment: 6,
    Fuzzer._retrieve: 20,
    Fuzzer._relinquish: 12,
    Fuzzer._reclaim: 14,
    Fuzzer._release: 16,
    Fuzzer._map: 3,
    Fuzzer._unmap: 0.5,
    Fuzzer._direct: 5,
    Fuzzer._message: 4,
    Fuzzer._notification: 8,
    Fuzzer._simple: 8,
    Fuzzer._noise: 6,
}


def _buffer_pages(tx: int, rx: int, count: int) -> list[int]:
    return [at // PAGE_SIZE + n for at in (tx, rx) for n in range(count)]


def _label(step: Step) -> str:
    found = BY_FID.get(step.frame.fid)
    return found[0].call.name if found else "no function"


def main() -> None:
    """Fuzzes all worlds, as many calls each, and prints what it took."""
    calls = int(sys.argv[1]) if len(sys.argv) > 1 else 50_000
    seed = int(sys.argv[2]) if len(sys.argv) > 2 else 1
    for world in WORLDS:
        begin = time.perf_counter()
        fuzzer = Fuzzer(seed, world)
        fuzzer.run(calls // len(WORLDS))
        took = time.perf_counter() - begin
        print(f"{world.__name__}: {calls // len(WORLDS)} calls in {took:.1f} s")
        for label, count in sorted(fuzzer.answers.items()):
            print(f"  {count:8} {label}")


__all__ = ["Fuzzer", "InvariantError", "Relayer", "Step", "World", "host_world", "stacked_world"]

if __name__ == "__main__":
    main()
