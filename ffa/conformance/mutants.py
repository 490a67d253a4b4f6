"""Defects that a partition manager could have: our roles, each with one thing wrong. The cases must find every one."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from ffa.abi.frame import Frame
from ffa.abi.ids import ATTRIBUTE_NS, SPMD_ID, VERSION_1_1, VERSION_1_2, Call, Error, fid, is_secure
from ffa.abi.messages import NIL
from ffa.conformance import runner
from ffa.conformance.bench import Bench, Model
from ffa.conformance.registry import Case
from ffa.roles import checks
from ffa.roles.endpoint import DEFAULT_PROPERTIES, respond
from ffa.roles.machine import Access
from ffa.roles.transactions import Checks, Transactions

Change = Callable[[Model], None]

_WRONG = {Error.INVALID_PARAMETERS: Error.DENIED, Error.DENIED: Error.INVALID_PARAMETERS}


@dataclass(frozen=True, slots=True)
class Mutant:
    """A defect, and how to give it to our roles."""

    name: str
    defect: str  #: what a reader is told
    change: Change

    def __call__(self, bench: Bench) -> Model:
        """Our roles with the defect."""
        model = Model(bench)
        self.change(model)
        return model

    def caught_by(self, cases: Iterable[Case]) -> list[str]:
        """The cases that fail."""
        return [case.id for case in cases if runner.run(case, self).status == runner.FAILED]


def _managers(model: Model) -> Iterator[Any]:
    yield model.spmc
    if model.hypervisor is not None:
        yield model.hypervisor


# -- the decision tables: each check left out, and each code swapped


def _table(table: str, change: Callable[[tuple[Any, ...]], tuple[Any, ...]]) -> Change:
    def apply(model: Model) -> None:
        for manager in _managers(model):
            own: Checks = manager.transactions.checks
            manager.transactions.checks = replace(own, **{table: change(getattr(own, table))})

    return apply


def _without(table: str, at: int) -> Change:
    return _table(table, lambda rows: rows[:at] + rows[at + 1 :])


def _with_code(table: str, at: int, code: Error) -> Change:
    return _table(table, lambda rows: (*rows[:at], replace(rows[at], code=code), *rows[at + 1 :]))


_TABLES: dict[str, tuple[checks.Check[Any], ...]] = {
    "send": checks.SEND,
    "ranges": checks.RANGES,
    "retrieve": checks.RETRIEVE,
    "relinquish": checks.RELINQUISH,
    "reclaim": checks.RECLAIM,
}


def _last(table: str, at: int) -> Change:
    return _table(table, lambda rows: (*rows[:at], *rows[at + 1 :], rows[at]))


def _of_order() -> Iterator[Mutant]:
    """Of sending, each check that is done last, if one behind it has another code: the order is Xen's."""
    for table in ("send", "ranges"):
        rows = _TABLES[table]
        for at, check in enumerate(rows):
            if {check.code} != {later.code for later in rows[at:]} and (table, check.name) not in NO_ORDER:
                what = f"{check.name!r} is looked at last of the table of {table}"
                yield Mutant(f"{table}-{at}-last", what, _last(table, at))


def _of_tables() -> Iterator[Mutant]:
    for table, rows in _TABLES.items():
        for at, check in enumerate(rows):
            if (table, check.name) not in NOT_SEEN:
                what = f"the check {check.name!r} is left out of the table of {table}"
                yield Mutant(f"{table}-{at}-left-out", what, _without(table, at))
            wrong = _WRONG.get(check.code)
            if wrong is not None and (table, check.name) not in NO_OWN_CODE:
                what = f"{check.name!r} in the table of {table} is answered with {wrong.name}, not {check.code.name}"
                yield Mutant(f"{table}-{at}-other-code", what, _with_code(table, at, wrong))


_PARSED = (
    ("send", "the descriptor does not fit or has reserved fields set"),
    ("ranges", "a range is cut, unaligned, empty or beyond the address space"),
)
NOT_SEEN = {
    *_PARSED,
    ("send", "no receiver"),
    ("send", "more pages than ranges can hold, or fewer"),
    ("ranges", "a range without memory"),
    ("send", "more receivers than are supported"),
    ("send", "over quota"),
}
"""Checks that are left out without a trace: a later one finds the same fault and has the same code. The last two are
limits of our own, which FF-A leaves to each implementation."""
NO_OWN_CODE = {*_PARSED, ("retrieve", "the request does not name the caller")}
"""Checks whose code is never used: what they look at raises one."""


NO_ORDER = {
    *_PARSED,
    ("send", "reserved attributes are set"),
    ("send", "attributes are named that the receiver is to name"),
    ("send", "more than one receiver of a donation"),
    ("send", "more receivers than are supported"),
    ("send", "a handle is given"),
    ("send", "shared memory is to be cleared"),
    ("send", "flags that a sender must not set"),
    ("send", "the composite descriptor does not fit, or receivers name different ones"),
    ("send", "no pages, or no ranges"),
    ("ranges", "a range without memory"),
    ("ranges", "a page named twice"),
}
"""Checks of sending that Xen does not have, or that no fault with another code can come with: FF-A leaves the order of
these to each implementation."""


# -- named ones


def _wrap(name: str, around: Callable[..., Any]) -> Change:
    """Replaces a method of both managers: ``around(original, manager, *arguments)``."""

    def apply(model: Model) -> None:
        for manager in _managers(model):
            original = getattr(manager, name)
            setattr(manager, name, lambda *a, o=original, m=manager: around(o, m, *a))

    return apply


def _wrap_transactions(name: str, around: Callable[..., Any]) -> Change:
    def apply(model: Model) -> None:
        for manager in _managers(model):
            found: Transactions = manager.transactions
            original = getattr(found, name)
            setattr(found, name, lambda *a, o=original, t=found, **k: around(o, t, *a, **k))

    return apply


def _outside(around: Callable[[Model, int, Frame, Frame], Frame]) -> Change:
    """Changes what callers are answered: ``around(model, caller, frame, answer)``."""

    def apply(model: Model) -> None:
        original = model.call

        def call(caller: int, frame: Frame, vcpu: int = 0) -> Frame:
            return around(model, caller, frame, original(caller, frame, vcpu))

        model.call = call  # type: ignore[method-assign]

    return apply


def _relayed(calls: tuple[Call, ...], change: Callable[[Frame], Frame]) -> Change:
    """Changes calls before they are answered."""
    ids = {fid(call, form) for call in calls for form in (False, True)}

    def apply(model: Model) -> None:
        original = model.call

        def call(caller: int, frame: Frame, vcpu: int = 0) -> Frame:
            return original(caller, change(frame) if frame.fid in ids else frame, vcpu)

        model.call = call  # type: ignore[method-assign]

    return apply


def _sent_handle(change: Callable[[Frame], Frame]) -> Change:
    ids = {fid(call, form) for call in (Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE) for form in (False, True)}
    return _outside(lambda m, c, f, a: change(a) if f.fid in ids and a.ok else a)


def _direct(change: Callable[[Frame], Frame]) -> Change:
    ids = {fid(Call.MSG_SEND_DIRECT_REQ, form) for form in (False, True)}
    return _outside(lambda m, c, f, a: change(a) if f.fid in ids and a.error is None else a)


def _succeeds(call: Call, instead_of: Error) -> Change:
    return _outside(lambda m, c, f, a: Frame.success() if f.fid == fid(call) and a.error is instead_of else a)


def _not_kept(frame: Frame, answer: Frame) -> Frame:
    """Without the caller's x8 to x17, where these are what the answer has there."""
    return Frame(*answer[:8]) if answer[8:] == frame[8:] else answer


def _target_of_success(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    return _set(answer, x1=caller) if answer.ok else answer


def _version_echoed(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    return Frame(frame[1]) if frame.fid == fid(Call.VERSION) and answer[0] >> 31 == 0 else answer


def _answers(call: Call, change: Callable[[Frame], Frame]) -> Change:
    """Changes the answers that are not errors to one function."""
    ids = {fid(call, False), fid(call, True)}
    return _outside(lambda m, c, f, a: change(a) if f.fid in ids and a.error is None else a)


def _set(frame: Frame, **registers: int) -> Frame:
    values = list(frame)
    for name, value in registers.items():
        values[int(name[1:])] = value
    return Frame(*values)


def _instead(calls: tuple[Call, ...], wrong: Error, right: Error) -> Change:
    ids = {fid(call, form) for call in calls for form in (False, True)}
    return _outside(
        lambda m, c, f, a: Frame.failure(wrong) if f.fid in ids and a.error is right else a,
    )


def _handle_zero(model: Model) -> None:
    for manager in _managers(model):
        manager.transactions.new_handle = lambda: 0


def _same_handle(model: Model) -> None:
    for manager in _managers(model):
        bit = 1 << 63 if manager is model.hypervisor else 0
        manager.transactions.new_handle = lambda b=bit: b | 1


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _keeps_access(original: Any, transactions: Transactions, region: Any) -> None:
    original(region)
    if region.own and region.complete:
        state = transactions.machine.state(region.pages[0])
        if state is not None:
            sender = region.descriptor.sender
            transactions.machine.set_state(region.pages, state.granting(sender, Access.RWX))


def _never_unmaps(original: Any, transactions: Transactions, region: Any, caller: int, clear: bool = False) -> None:
    before = {page: transactions.machine.state(page) for page in region.pages}
    original(region, caller, clear)
    for page, state in before.items():
        if state is not None:
            transactions.machine.set_state([page], state)


def _one_page_more(original: Any, transactions: Transactions, region: Any, endpoint: int, access: Access) -> None:
    original(region, endpoint, access)
    state = transactions.machine.state(region.pages[-1])
    if access and state is not None and state.handle == region.handle:
        transactions.machine.set_state([region.pages[-1] + 1], state)


def _always_writable(original: Any, transactions: Transactions, region: Any, endpoint: int, access: Access) -> None:
    original(region, endpoint, access | Access.RW if access else access)


def _ns_bit(on: bool) -> Callable[..., Any]:
    def around(original: Any, transactions: Transactions, region: Any, asked: Any, version: int) -> bytes:
        blob = bytearray(original(region, asked, version))
        blob[2] = blob[2] | ATTRIBUTE_NS if on else blob[2] & ~ATTRIBUTE_NS
        return bytes(blob)

    return around


def _blob(change: Callable[[bytearray], None]) -> Callable[..., Any]:
    def around(original: Any, transactions: Transactions, *arguments: Any) -> bytes:
        blob = bytearray(original(*arguments))
        change(blob)
        return bytes(blob)

    return around


def _without_tag(blob: bytearray) -> None:
    blob[16:24] = bytes(8)


def _without_type(blob: bytearray) -> None:
    blob[4] &= ~0x18


def _last_range(blob: bytearray) -> None:
    blob[-16:-8] = (int.from_bytes(blob[-16:-8], "little") + 4096).to_bytes(8, "little")


def _not_cleared(model: Model) -> None:
    for manager in _managers(model):
        manager.machine.clear = _nothing


def _bitmap(name: str, around: Callable[..., Any]) -> Change:
    """Changes a method of every notification bitmap, which are in ``Served`` of each manager."""

    def apply(model: Model) -> None:
        for manager in _managers(model):
            for served in [*manager.served.values(), *getattr(manager, "vms", {}).values()]:
                for side in ("from_sp", "from_vm"):
                    setattr(served, side, _Faulty(getattr(served, side), name, around))

    return apply


class _Faulty:
    """A bitmap of which one method is wrong."""

    def __init__(self, bitmap: Any, name: str, around: Callable[..., Any]) -> None:
        self._bitmap, self._name, self._around = bitmap, name, around

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._bitmap, name)
        if name != self._name:
            return found
        return lambda *a: self._around(found, self._bitmap, *a)


def _bind_over(original: Any, bitmap: Any, sender: int, bits: int, per_vcpu: bool) -> None:
    for bit in range(64):
        if bits >> bit & 1:
            bitmap.senders.pop(bit, None)
    original(sender, bits, per_vcpu)


def _set_by_anybody(original: Any, bitmap: Any, sender: int, bits: int, vcpu: int | None) -> None:
    owners = {bitmap.senders.get(bit, sender) for bit in range(64) if bits >> bit & 1}
    original(owners.pop() if len(owners) == 1 else sender, bits, vcpu)


def _set_global(original: Any, bitmap: Any, sender: int, bits: int, vcpu: int | None) -> None:
    original(sender, bits, vcpu)
    if vcpu is not None:
        bitmap.vcpus.pop(vcpu, None)
        bitmap.pending |= bits


def _keeps_pending(original: Any, bitmap: Any, vcpu: int) -> int:
    found: int = original(vcpu)
    bitmap.pending |= found
    return found


def _no_zero_registers(model: Model) -> None:
    for manager in _managers(model):
        manager.handlers = {call: replace(h, zero_from=8) for call, h in manager.handlers.items()}


def _open_to_all(call: Call) -> Change:
    def apply(model: Model) -> None:
        for manager in _managers(model):
            everybody = manager.handlers[Call.ERROR].callers
            manager.handlers = {**manager.handlers, call: replace(manager.handlers[call], callers=everybody)}

    return apply


def _profile(**choices: Any) -> Change:
    def apply(model: Model) -> None:
        for manager in _managers(model):
            manager.profile = manager.transactions.profile = replace(manager.profile, **choices)

    return apply


_SENDS = (Call.MEM_SHARE, Call.MEM_LEND, Call.MEM_DONATE)
_INVALID, _DENIED = Error.INVALID_PARAMETERS, Error.DENIED


def _forgets_first(original: Any, transactions: Transactions, region: Any, flags: int) -> None:
    """Reclaims without giving the pages back."""
    transactions.forget(region)


def _early(original: Any, transactions: Transactions, region: Any, handle: int) -> None:
    """The receivers have access as soon as the sender has sent."""
    original(region, handle)
    state = transactions.machine.state(region.pages[0]) if region.own and region.complete else None
    if state is not None:
        for borrower in region.borrowers:
            state = state.granting(borrower, Access.RW)
        transactions.machine.set_state(region.pages, state)


def _cleared_at_once(original: Any, transactions: Transactions, region: Any, caller: int, clear: bool = False) -> None:
    """Zeroes although another borrower still has the memory."""
    if clear or region.borrowers[caller].clear:
        transactions.machine.clear(region.ranges)
    original(region, caller, clear)


def _clear_is_forgotten(
    original: Any, transactions: Transactions, region: Any, caller: int, clear: bool = False
) -> None:
    """Only the last borrower's wish counts."""
    if any(id != caller and b.state is not b.state.INVITED for id, b in region.borrowers.items()):
        region.borrowers[caller].clear = clear = False
    original(region, caller, clear)


def _ids_not_swapped(answer: Frame) -> Frame:
    return _set(answer, x1=(answer[1] & 0xFFFF) << 16 | answer[1] >> 16 & 0xFFFF)


def _anybody_maps(original: Any, manager: Any, who: Any, tx: int, rx: int, count: int) -> Any:
    page = manager.machine.state(tx // 4096)
    found = None if page is None else manager.served.get(page.owner)
    return original(found or who, tx, rx, count)


def _never_busy(original: Any, manager: Any, who: Any) -> bool:
    if who.mailbox is not None and who.mailbox.state is who.mailbox.state.FULL:
        who.mailbox.state = who.mailbox.state.EMPTY
    return True


def _speaks_for_all(model: Model) -> None:
    for manager in _managers(model):
        manager.speaks_for = manager.transactions.speaks_for = lambda caller, sender: True


_NEW_IN_1_3 = (0xC400_008F, 0x8400_008F)


def _of_1_3(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    """FFA_NS_RES_INFO_GET, called or asked for."""
    return Frame.success() if frame.fid in _NEW_IN_1_3 or frame[1] in _NEW_IN_1_3 else answer


def _read_as(change: Callable[[bytearray, int], None]) -> Change:
    """Descriptors are read differently from how they are written: ``change(descriptor, its version)``."""

    def around(original: Any, manager: Any, who: Any, *where: int) -> bytes:
        blob = bytearray(original(who, *where))
        if len(blob) >= 80:
            change(blob, who.version)
        return bytes(blob)

    return _wrap("descriptor", around)


def _entry_zeroed(blob: bytearray, version: int) -> None:
    at = 32 if version < VERSION_1_1 else 48
    blob[at + 8 : at + 16] = bytes(8)


def _count_cut(blob: bytearray, version: int) -> None:
    blob[29:32] = bytes(3)


def _address_rounded(blob: bytearray, version: int) -> None:
    for at in range(96, len(blob) - 15, 16):
        blob[at : at + 8] = (int.from_bytes(blob[at : at + 8], "little") & ~0xFFF).to_bytes(8, "little")


def _everybody_talks(model: Model) -> None:
    for manager in _managers(model):
        for served in manager.served.values():
            served.endpoint.properties = sum(DEFAULT_PROPERTIES)


def _partitions_ask_vms(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    asks = frame.fid in _REQUESTS and is_secure(caller) and not is_secure(frame[1] & 0xFFFF)
    return respond(frame) if asks and answer.error is not None else answer


def _one_cpu(model: Model) -> None:
    original = model.call
    model.call = lambda caller, frame, vcpu=0: original(caller, frame, 0)  # type: ignore[method-assign]


def _largest_granule(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    asked = frame.fid == fid(Call.FEATURES) and frame[1] == fid(Call.RXTX_MAP, True)
    return _set(answer, x2=answer[2] | 1) if asked and answer.ok else answer


def _any_version(version: int | None) -> Change:
    """FFA_VERSION's answer is this one; None: 1.2, whatever was asked for."""
    return _outside(
        lambda m, c, f, a: (
            Frame(version or VERSION_1_2) if f.fid == fid(Call.VERSION) and (version is None or not a[0] >> 31) else a
        )
    )


def _one_forwarded(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    forwards = frame.fid == fid(Call.RXTX_MAP, True) and not any(frame[1:4])
    return Frame.failure(Error.NO_MEMORY) if forwards and len(model.spmc.vm_buffers) > 1 else answer


def _waits_anyway(original: Any, manager: Any, who: Any, x: Frame, vcpu: int) -> Any:
    asked, who.requests = who.requests, {}
    try:
        return original(who, x, vcpu)
    finally:
        who.requests = asked


def _longer_than_tx(model: Model, caller: int, frame: Frame, answer: Frame) -> Frame:
    """As Xen's mediator: the jump to the exit sets no code."""
    sends = frame.fid in {fid(call, form) for call in _SENDS for form in (False, True)}
    return Frame.success() if sends and not frame[3] and frame[1] == frame[2] > 4096 else answer


def _never_executable(original: Any, transactions: Transactions, region: Any, endpoint: int, access: Access) -> None:
    original(region, endpoint, access & ~Access.X)


def _rest_dropped(model: Model) -> None:
    """A description for a hypervisor has one fragment."""
    original = model.spmc.describe_all

    def cut(who: Any, request: Any, size: int) -> bytes | None:
        found = original(who, request, size)
        return None if found is None else found[:size]

    model.spmc.describe_all = cut  # type: ignore[method-assign]


def _described_without_type(model: Model) -> None:
    original = model.spmc.describe_all

    def untyped(who: Any, request: Any, size: int) -> bytes | None:
        found = original(who, request, size)
        return None if found is None else found[:4] + bytes([found[4] & ~0x18]) + found[5:]

    model.spmc.describe_all = untyped  # type: ignore[method-assign]


def _registers_reach_receivers(model: Model) -> None:
    """A direct request brings the sender's x8 to x17 along."""
    caller_has: list[int] = [0] * 10
    original = model.call

    def call(caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        if frame.fid in _REQUESTS:
            caller_has[:] = frame[8:]
        return original(caller, frame, vcpu)

    model.call = call  # type: ignore[method-assign]
    for manager in _managers(model):
        for served in manager.served.values():
            receive = served.endpoint.receive

            def received(frame: Frame, vcpu: int, receive: Any = receive) -> Any:
                return receive(Frame(*frame[:8], *caller_has) if frame.fid in _REQUESTS else frame, vcpu)

            served.endpoint.receive = received


_REQUESTS = {fid(Call.MSG_SEND_DIRECT_REQ, form) for form in (False, True)}


NAMED = tuple(
    Mutant(name, defect, change)
    for name, defect, change in (
        (
            "retrieve-lengths-swapped",
            "FFA_MEM_RETRIEVE_RESP has total and fragment length swapped, which shows once there are fragments",
            _answers(Call.MEM_RETRIEVE_REQ, lambda a: _set(a, x1=a[2], x2=a[1])),
        ),
        (
            "send-lengths-swapped",
            "the first of several fragments is relayed with total and fragment length swapped",
            _relayed(_SENDS, lambda f: _set(f, x1=f[2], x2=f[1])),
        ),
        ("handle-0", "a success with handle 0", _handle_zero),
        ("handle-again", "every transaction has the same handle", _same_handle),
        ("handle-cut", "the handle's upper half is lost", _sent_handle(lambda a: _set(a, x3=0))),
        ("handle-swapped", "the handle's halves are swapped", _sent_handle(lambda a: _set(a, x2=a[3], x3=a[2]))),
        (
            "sender-keeps",
            "who lends or donates keeps its access",
            _wrap_transactions("take_from_sender", _keeps_access),
        ),
        ("receivers-early", "receivers have access before they retrieve", _wrap_transactions("enter", _early)),
        ("no-unmap", "who relinquishes keeps its access", _wrap_transactions("let_go", _never_unmaps)),
        ("page-beside", "a borrower gets the page beside as well", _wrap_transactions("_grant", _one_page_more)),
        ("read-only-written", "read-only memory is mapped writable", _wrap_transactions("_grant", _always_writable)),
        ("reclaim-empty", "reclaiming gives no access back", _wrap_transactions("reclaim", _forgets_first)),
        ("ns-bit-lost", "the NS bit of normal memory is not set", _wrap_transactions("describe", _ns_bit(False))),
        ("ns-bit-always", "the NS bit of secure memory is set", _wrap_transactions("describe", _ns_bit(True))),
        ("tag-lost", "the response has no tag", _wrap_transactions("describe", _blob(_without_tag))),
        ("type-lost", "the response has no transaction type", _wrap_transactions("describe", _blob(_without_type))),
        (
            "range-off",
            "the response's last range is a page too high",
            _wrap_transactions("describe", _blob(_last_range)),
        ),
        ("never-clears", "no memory is zeroed", _not_cleared),
        ("clears-early", "memory is zeroed while another has it", _wrap_transactions("let_go", _cleared_at_once)),
        ("clear-forgotten", "only the last may ask for zeroing", _wrap_transactions("let_go", _clear_is_forgotten)),
        (
            "retrieved-denied",
            "reclaiming what is retrieved is BUSY",
            _instead((Call.MEM_RECLAIM,), Error.BUSY, _DENIED),
        ),
        ("no-fragments", "descriptors in fragments are refused", _profile(fragments=False)),
        ("one-borrower", "one borrower alone is supported", _profile(max_borrowers=1)),
        ("owner-unchecked", "memory that is not the sender's is accepted", _profile(owner_checks=False)),
        ("any-sender", "anybody speaks in the name of anybody", _speaks_for_all),
        ("any-buffer", "RX and TX may be another's memory", _wrap("check_buffers", _anybody_maps)),
        ("rx-overwritten", "RX is written to before it is released", _wrap("_rx_free", _never_busy)),
        ("unmapped-denied", "unmapping nothing is DENIED", _instead((Call.RXTX_UNMAP,), _DENIED, _INVALID)),
        ("release-nothing", "releasing RX twice succeeds", _succeeds(Call.RX_RELEASE, _DENIED)),
        ("map-twice", "mapping twice is INVALID_PARAMETERS", _instead((Call.RXTX_MAP,), _INVALID, _DENIED)),
        ("w1-of-success", "FFA_SUCCESS has the caller's id in w1", _outside(_target_of_success)),
        ("no-uuid-error", "an unknown UUID is no error", _profile(no_partition_is_error=False)),
        ("version-changes", "a version may change at any time", _profile(version_change=True)),
        ("version-echoed", "FFA_VERSION answers what it was asked", _outside(_version_echoed)),
        ("id-of-manager", "FFA_ID_GET tells the manager's id", _answers(Call.ID_GET, lambda a: Frame.success(0))),
        ("no-interrupts", "FFA_FEATURES tells of no interrupt", _profile(interrupts={})),
        ("features-of-all", "FFA_FEATURES tells of everything", _succeeds(Call.FEATURES, Error.NOT_SUPPORTED)),
        ("reserved-ignored", "registers that must be zero are not looked at", _no_zero_registers),
        ("permissions-by-vms", "VMs may call FFA_MEM_PERM_GET", _open_to_all(Call.MEM_PERM_GET)),
        (
            "bitmaps-by-vms",
            "VMs may call FFA_NOTIFICATION_BITMAP_CREATE",
            _open_to_all(Call.NOTIFICATION_BITMAP_CREATE),
        ),
        ("ids-not-swapped", "a direct response has sender and receiver as the request", _direct(_ids_not_swapped)),
        ("x3-lost", "a direct response loses x3", _direct(lambda a: _set(a, x3=0))),
        ("x7-lost", "a direct response loses x7", _direct(lambda a: _set(a, x7=0))),
        ("upper-halves-lost", "SMC64 responses lose their upper halves", _direct(lambda a: a.narrow)),
        (
            "x17-lost",
            "FFA_MSG_SEND_DIRECT_RESP2 loses x17",
            _answers(Call.MSG_SEND_DIRECT_REQ2, lambda a: _set(a, x17=0)),
        ),
        (
            "resp2-ends-at-x7",
            "FFA_MSG_SEND_DIRECT_RESP2 has eight registers",
            _answers(Call.MSG_SEND_DIRECT_REQ2, lambda a: Frame(*a[:8])),
        ),
        ("bound-over", "binding takes a notification from whom it is bound to", _bitmap("bind", _bind_over)),
        ("set-by-anybody", "anybody sets a bound notification", _bitmap("set", _set_by_anybody)),
        ("vcpu-lost", "a vCPU's notification is a global one", _bitmap("set", _set_global)),
        ("pending-for-ever", "what was got is still pending", _bitmap("take", _keeps_pending)),
        ("listed-for-ever", "FFA_NOTIFICATION_INFO_GET lists again what it has listed", _profile(info_once=False)),
        ("no-vcpus", "notifications of single vCPUs are refused", _profile(per_vcpu=False)),
        (
            "no-data-denied",
            "FFA_NOTIFICATION_INFO_GET without anything pending is DENIED",
            _instead((Call.NOTIFICATION_INFO_GET,), _DENIED, Error.NO_DATA),
        ),
        (
            "poll-no-data",
            "FFA_MSG_POLL without a message is NO_DATA",
            _instead((Call.MSG_POLL,), Error.NO_DATA, Error.RETRY),
        ),
        (
            "success-longer-than-tx",
            "a descriptor longer than TX is a success with handle 0, as in Xen's mediator",
            _outside(_longer_than_tx),
        ),
        (
            "destroys-nothing",
            "destroying a bitmap that is not there is INVALID_PARAMETERS",
            _instead((Call.NOTIFICATION_BITMAP_DESTROY,), _INVALID, _DENIED),
        ),
        ("interrupts-for-all", "FFA_FEATURES tells whoever asks of every interrupt", _profile(any_interrupt=True)),
        ("waits-in-request", "who is asked may wait for another message", _wrap("msg_wait", _waits_anyway)),
        (
            "permissions-unset",
            "FFA_MEM_PERM_SET succeeds and sets nothing",
            _wrap("mem_perm_set", lambda o, m, *a: Frame.success()),
        ),
        ("reserved-of-receivers", "reserved bytes of a receiver are not looked at", _read_as(_entry_zeroed)),
        ("count-cut", "the number of receivers is cut to eight bits", _read_as(_count_cut)),
        ("addresses-rounded", "addresses are rounded down to pages", _read_as(_address_rounded)),
        ("everybody-talks", "direct messages need no property of sender or receiver", _everybody_talks),
        ("partitions-ask-vms", "a partition's direct request to a VM succeeds", _outside(_partitions_ask_vms)),
        ("msg-send-denied", "bad FFA_MSG_SEND are DENIED", _instead((Call.MSG_SEND,), _DENIED, _INVALID)),
        (
            "any-service",
            "an indirect message reaches whatever service the receiver has",
            _wrap("pass_on", lambda o, m, who, message: o(who, replace(message, uuid=NIL))),
        ),
        (
            "id-of-spmd",
            "FFA_SPM_ID_GET tells SPMD's id",
            _answers(Call.SPM_ID_GET, lambda a: Frame.success(SPMD_ID)),
        ),
        (
            "registers-without-uuid",
            "FFA_PARTITION_INFO_GET_REGS tells no UUID",
            _answers(Call.PARTITION_INFO_GET_REGS, lambda a: _set(a, x4=0, x5=0)),
        ),
        (
            "registers-without-contexts",
            "FFA_PARTITION_INFO_GET_REGS tells no number of contexts",
            _answers(Call.PARTITION_INFO_GET_REGS, lambda a: _set(a, x3=a[3] & ~0xFFFF_0000)),
        ),
        ("console-any-length", "FFA_CONSOLE_LOG of any length succeeds", _succeeds(Call.CONSOLE_LOG, _INVALID)),
        ("one-context", "every request is for the first context", _one_cpu),
        ("buffers-of-64k", "FFA_FEATURES tells of buffers of 64 KiB", _outside(_largest_granule)),
        ("version-always-1.2", "FFA_VERSION answers 1.2 whatever it is asked for", _any_version(None)),
        ("version-1.1", "FFA_VERSION answers 1.1", _any_version(VERSION_1_1)),
        (
            "unmaps-nothing",
            "FFA_RXTX_UNMAP succeeds and unmaps nothing",
            _wrap("rxtx_unmap", lambda o, m, *a: Frame.success()),
        ),
        (
            "info-empty",
            "what is put into RX is zeros",
            _wrap("deliver", lambda o, m, who, data: o(who, bytes(len(data)))),
        ),
        (
            "never-acquired",
            "FFA_RX_ACQUIRE is DENIED",
            _outside(lambda m, c, f, a: Frame.failure(_DENIED) if f.fid == fid(Call.RX_ACQUIRE) and a.ok else a),
        ),
        ("one-vm-forwarded", "the buffers of one VM alone can be forwarded", _outside(_one_forwarded)),
        ("map-denied", "what cannot be mapped is DENIED", _instead((Call.RXTX_MAP,), _DENIED, _INVALID)),
        ("x8-lost", "answers do not preserve x8 to x17", _outside(lambda m, c, f, a: _not_kept(f, a))),
        ("x8-leaks", "the receiver of a direct request sees the sender's x8 to x17", _registers_reach_receivers),
        ("never-executable", "memory is never mapped executable", _wrap_transactions("_grant", _never_executable)),
        ("description-cut", "a hypervisor is told the first fragment alone of what was sent", _rest_dropped),
        ("description-untyped", "a hypervisor is not told the type of what was sent", _described_without_type),
        ("functions-of-1.3", "FFA_NS_RES_INFO_GET, of 1.3, is answered in a system of 1.2", _outside(_of_1_3)),
        (
            "message-busy-lost",
            "an indirect message for a full RX is DENIED",
            _instead((Call.MSG_SEND, Call.MSG_SEND2), _DENIED, Error.BUSY),
        ),
    )
)
"""Defects that real implementations had, or could have."""

MUTANTS = (*_of_tables(), *_of_order(), *NAMED)
