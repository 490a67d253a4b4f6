"""Xen's decisions on FFA_MEM_SHARE (``xen/arch/arm/tee/ffa_shm.c``), in its order, as an oracle of order.

FF-A does not say which fault of a call decides. Xen's order goes from the registers to the pages, so that a caller can
tell from a code how far its call has come. A case makes a call with one fault, notes the code, and then adds each fault
that comes later: the code is to stay that of the first. Codes are Xen's, or those that the suites want instead.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, pair
from ffa.abi.ids import PAGE_SIZE, Call, Error, fid
from ffa.conformance.bench import SPS, UNBACKED, memory_of
from ffa.conformance.memory_send import COMPOSITE, HEADER, RANGES
from ffa.conformance.registry import XEN, register
from ffa.conformance.run import Run

INVALID, DENIED, NOT_SUPPORTED = Error.INVALID_PARAMETERS, Error.DENIED, Error.NOT_SUPPORTED
WHOLE = RANGES + 2 * abi.RANGE_SIZE
"""Bytes of the descriptor: one receiver, two ranges of a page each."""


@dataclass(slots=True)
class Attempt:
    """An FFA_MEM_SHARE of VM 1 to a partition, as it should be; faults change it."""

    total: int = WHOLE
    fragment: int = WHOLE
    address: int = 0
    pages: int = 0
    mapped: bool = True
    patches: dict[int, bytes] = field(default_factory=dict)
    attributes: int = 0x2F


@dataclass(frozen=True, slots=True)
class Decision:
    """One decision: the fault that it finds, and what is answered."""

    step: int  #: Xen's order
    name: str
    fault: Callable[[Attempt], None]
    xen: Error  #: Xen's code
    others: tuple[Error, ...] = ()  #: what suites or the specification name instead
    touches: str = ""  #: a part of the call that another fault changes as well


def _registers(**values: int | bool) -> Callable[[Attempt], None]:
    def fault(a: Attempt) -> None:
        for name, value in values.items():
            setattr(a, name, value)

    return fault


def _bytes(at: int, form: str, *values: int) -> Callable[[Attempt], None]:
    def fault(a: Attempt) -> None:
        a.patches[at] = struct.pack(form, *values)

    return fault


def _attributes(on: int, off: int = 0) -> Callable[[Attempt], None]:
    def fault(a: Attempt) -> None:
        a.attributes = a.attributes & ~off | on

    return fault


DECISIONS = (
    Decision(3, "fragment_beyond_total", _registers(total=WHOLE - 16), INVALID, touches="length"),
    Decision(5, "tx_not_mapped", _registers(mapped=False), DENIED, (Error.BUSY, INVALID)),
    Decision(5, "longer_than_tx", _registers(total=8192, fragment=8192), INVALID, (Error.NO_MEMORY,), "length"),
    Decision(6, "descriptor_short", _registers(total=HEADER - 8, fragment=HEADER - 8), INVALID, touches="length"),
    Decision(6, "field_out_of_range", _bytes(28, "<I", 0xFFFF_FFFF), INVALID, touches="count"),
    Decision(6, "array_does_not_fit", _bytes(28, "<I", 200), INVALID, touches="count"),
    Decision(6, "entry_size", _bytes(24, "<I", 8), INVALID),
    Decision(6, "array_offset", _bytes(32, "<I", HEADER + 8), INVALID),
    Decision(7, "ns_attribute", _attributes(0x40), INVALID),
    Decision(8, "attributes", _attributes(0x04, 0x08), NOT_SUPPORTED, (DENIED,)),
    Decision(9, "receivers", _bytes(28, "<I", 0), NOT_SUPPORTED, (INVALID,), "count"),
    Decision(10, "sender", _bytes(0, "<H", 3), INVALID, (DENIED,)),
    Decision(11, "receiver", _bytes(HEADER, "<H", 0x7D), NOT_SUPPORTED, (INVALID, DENIED)),
    Decision(12, "permissions", _bytes(HEADER + 2, "<B", 3), NOT_SUPPORTED, (INVALID, DENIED)),
    Decision(13, "composite_does_not_fit", _bytes(HEADER + 4, "<I", 0x4000), NOT_SUPPORTED, (INVALID,), "offset"),
    Decision(14, "no_pages", _bytes(COMPOSITE, "<I", 0), INVALID, touches="pages"),
    Decision(15, "over_quota", _bytes(COMPOSITE, "<I", 0xFFFF_FFFF), Error.NO_MEMORY, (INVALID,), "pages"),
    Decision(16, "ranges_do_not_fit", _bytes(COMPOSITE + 4, "<I", 3), INVALID),
    Decision(16, "range_not_aligned", _bytes(RANGES, "<Q", memory_of(1) + 0x10_0800), INVALID, touches="address"),
    Decision(16, "range_without_pages", _bytes(RANGES + 8, "<I", 0), INVALID, touches="range"),
    Decision(16, "sum_is_not_total", _bytes(COMPOSITE, "<I", 3), INVALID, touches="pages"),
    Decision(17, "page_without_memory", _bytes(RANGES, "<Q", UNBACKED), DENIED, touches="address"),
)


def attempt(t: Run, *decisions: Decision, receiver: int = SPS[0]) -> Frame:
    """The answer to the call with these faults, made in the order given: the first has the last word."""
    a = Attempt()
    for decision in reversed(decisions):
        decision.fault(a)
    vm = t.endpoint(1)
    ranges = [(memory_of(1) + 0x10_0000, 1), (memory_of(1) + 0x10_2000, 1)]
    blob = bytearray(abi.build(vm.version, t.transaction(Call.MEM_SHARE, 1, receiver), ranges))
    blob[2] = a.attributes
    for at, data in a.patches.items():
        blob[at : at + len(data)] = data
    vm.put(bytes(blob))
    if not a.mapped:
        t.ok(vm.call(Call.RXTX_UNMAP), "unmaps")
    answer = vm.call(Call.MEM_SHARE, a.total, a.fragment, a.address, a.pages, smc64=True)
    if not a.mapped:
        t.ok(vm.map_buffers(memory_of(1), memory_of(1) + PAGE_SIZE), "maps again")
    return answer


def composes(first: Decision, second: Decision) -> bool:
    """Whether both faults can be in one call: they change different parts of it."""
    return not first.touches or first.touches != second.touches


def _decides(t: Run, decision: Decision) -> None:
    alone = attempt(t, decision)
    t.fails(alone, decision.xen, f"{decision.name}, alone", *decision.others)
    code = alone.error or decision.xen
    later = [d for d in DECISIONS[DECISIONS.index(decision) + 1 :] if d.step > decision.step and composes(decision, d)]
    for other in later:
        t.fails(attempt(t, decision, other), code, f"{decision.name}, and {other.name}: the first decides")
    t.unchanged(1, [(memory_of(1) + 0x10_0000, 1), (memory_of(1) + 0x10_2000, 1)], "after these")
    right = attempt(t)
    t.ok(right, "without a fault it is shared")
    t.ok(t.endpoint(1).reclaim(pair(right[2], right[3])), "and the handle is one that FFA_MEM_RECLAIM takes")


def _elsewhere(t: Run) -> None:
    """A descriptor in other memory than TX: supported and told so, or NOT_SUPPORTED before anything is looked at."""
    where = memory_of(1) + 0x20_0000
    ranges = t.fresh(1)
    blob = abi.build(t.endpoint(1).version, t.transaction(Call.MEM_SHARE, 1, SPS[0]), ranges)
    t.machine.write(1, where, blob)
    dynamic = t.ok(t.call(1, Call.FEATURES, fid(Call.MEM_SHARE, True)), "what is supported")[2] & 1
    if not dynamic:
        for total in (len(blob), 16):
            answer = t.call(1, Call.MEM_SHARE, total, len(blob), where, 1, smc64=True)
            t.fails(answer, NOT_SUPPORTED, "a buffer other than TX")
        return
    for what, address, pages in (
        ("not page-aligned", where + 16, 1),
        ("too few pages", where, 0),
        ("another's", memory_of(2) + 0x20_0000, 1),
        ("no memory", UNBACKED, 1),
        ("beyond the address space", (1 << 64) - PAGE_SIZE, 2),
    ):
        answer = t.call(1, Call.MEM_SHARE, len(blob), len(blob), address, pages, smc64=True)
        t.fails(answer, INVALID, f"a buffer that is {what}", DENIED)
    t.unchanged(1, ranges, "bad buffers")
    good = t.ok(t.call(1, Call.MEM_SHARE, len(blob), len(blob), where, 1, smc64=True), "a buffer other than TX")
    t.ok(t.endpoint(1).reclaim(pair(good[2], good[3])), "reclaims")


def _fragments(t: Run) -> None:
    """A first fragment: the rest is asked for, or it is NOT_SUPPORTED."""
    ranges, right = t.fresh(1, 2), t.transaction(Call.MEM_SHARE, 1, SPS[0])
    answer = t.send(Call.MEM_SHARE, right, ranges, fragment=-16)
    if answer.error is not None:
        t.fails(answer, NOT_SUPPORTED, "fragments")
        t.unchanged(1, ranges, "fragments")
        return
    t.is_call(answer, Call.MEM_FRAG_RX, "the rest is asked for")
    handle = pair(answer[1], answer[2])
    t.true(handle != 0, "there is a handle")
    t.unchanged(1, ranges, "before the last fragment")
    t.endpoint(1).put(abi.pack_ranges(ranges[1:]))
    t.begun(t.call(1, Call.MEM_FRAG_TX, answer[1], answer[2], 16), Call.MEM_SHARE, right, ranges)
    t.ok(t.endpoint(1).reclaim(handle), "reclaims")


register(XEN, "xen_mem_share_02_buffer_is_not_tx", _elsewhere)
register(XEN, "xen_mem_share_04_fragments", _fragments)
for _decision in DECISIONS:
    register(XEN, f"xen_mem_share_{_decision.step:02}_{_decision.name}", partial(_decides, decision=_decision))
