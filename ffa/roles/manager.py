"""A partition manager: what hypervisor and SPMC have in common, which is nearly all."""

from __future__ import annotations

import struct
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import ClassVar

from ffa.abi import messages
from ffa.abi import transactions as abi
from ffa.abi.frame import MASK32, Frame, halves, pair
from ffa.abi.ids import (
    BY_FID,
    DIRECT_FRAMEWORK_BIT,
    GET_FROM_HYP,
    GET_FROM_SP,
    GET_FROM_SPM,
    GET_FROM_VM,
    NOTIFY_DELAY_SRI,
    NOTIFY_PER_VCPU,
    PAGE_SIZE,
    PARTITION_INFO_COUNT,
    RX_FULL,
    SMC64_BIT,
    VERSION_1_1,
    VERSION_1_2,
    WAIT_RETAIN_RX,
    Call,
    Error,
    Feature,
    FfaError,
    Function,
    Property,
    fid,
    is_secure,
)
from ffa.roles.endpoint import Endpoint, response_to
from ffa.roles.machine import AccessFaultError, Machine, buffer_of, exclusive
from ffa.roles.machines import CONTEXT, Context, ContextEvent, Rx, State
from ffa.roles.mailbox import Mailbox
from ffa.roles.notifications import Bitmap
from ffa.roles.profile import Profile
from ffa.roles.transactions import Region, Transactions

_INVALID, _DENIED, _BUSY = Error.INVALID_PARAMETERS, Error.DENIED, Error.BUSY


class Kind(State):
    """Who calls, as a manager sees it."""

    VM = "a VM, at its hypervisor"
    OS = "the operating system or hypervisor, at the SPMC"
    SP = "a secure partition, at its SPMC"


_ALL = frozenset(Kind)
_VM, _OS, _SP = frozenset({Kind.VM}), frozenset({Kind.OS}), frozenset({Kind.SP})


@dataclass(slots=True)
class Served:
    """An endpoint as its manager keeps it."""

    endpoint: Endpoint
    kind: Kind
    version: int  #: agreed with it
    settled: bool = False  #: it has made other calls: the version stays
    mailbox: Mailbox | None = None
    contexts: list[Context] = field(default_factory=list)
    requests: dict[int, tuple[int, Frame]] = field(default_factory=dict)  #: vCPU → who asked, what
    from_sp: Bitmap = field(default_factory=Bitmap)
    from_vm: Bitmap = field(default_factory=Bitmap)
    framework: int = 0  #: pending framework notifications
    pages: dict[int, int] = field(default_factory=dict)  #: permissions that an S-EL0 partition has set
    message: tuple[int, int, int] | None = None  #: FFA_MSG_SEND's w1, w3, w4 for who polls or waits
    ways: dict[int, tuple[str | None, bool, int]] = field(default_factory=dict)
    """Functions that it has called → the method that answers, whether this is the SMC64 form, the first register that
    must be zero: what the manager's table, profile and the agreed version come to."""
    id: int = field(init=False)  #: the endpoint's

    def __post_init__(self) -> None:
        self.id = self.endpoint.id

    def buffers(self) -> Mailbox:
        """Its mailbox. Raises FfaError: DENIED, it has mapped none."""
        if self.mailbox is None:
            raise FfaError(_DENIED, "no buffers are mapped")
        return self.mailbox

    def step(self, vcpu: int, event: ContextEvent) -> bool:
        """Whether the table has ``event`` for a context; if so, takes the step."""
        after = CONTEXT.get((self.contexts[vcpu], event))
        if after is None:
            return False
        self.contexts[vcpu] = after
        return True


@dataclass(frozen=True, slots=True)
class Handler:
    """How a manager answers one function."""

    callers: frozenset[Kind]  #: who may call it
    method: str | None = None  #: None: only ever an answer, but announced
    zero_from: int = 8  #: the first of x1 to x7 that must be zero, with all after it


HANDLERS: dict[Call, Handler] = {
    Call.ERROR: Handler(_ALL),
    Call.SUCCESS: Handler(_ALL),
    Call.INTERRUPT: Handler(_ALL),
    Call.MEM_RETRIEVE_RESP: Handler(_ALL),
    Call.VERSION: Handler(_ALL, "version"),
    Call.FEATURES: Handler(_ALL, "features"),
    Call.ID_GET: Handler(_ALL, "id_get"),
    Call.SPM_ID_GET: Handler(_ALL, "spm_id_get"),
    Call.PARTITION_INFO_GET: Handler(_ALL, "partition_info_get"),
    Call.PARTITION_INFO_GET_REGS: Handler(_ALL, "partition_info_get_regs"),
    Call.RXTX_MAP: Handler(_ALL, "rxtx_map"),
    Call.RXTX_UNMAP: Handler(_ALL, "rxtx_unmap"),
    Call.RX_ACQUIRE: Handler(_OS, "rx_acquire"),
    Call.RX_RELEASE: Handler(_ALL, "rx_release"),
    Call.MSG_SEND_DIRECT_REQ: Handler(_ALL, "direct_request"),
    Call.MSG_SEND_DIRECT_REQ2: Handler(_ALL, "direct_request"),
    Call.MSG_SEND_DIRECT_RESP: Handler(_VM | _SP, "direct_response"),
    Call.MSG_SEND_DIRECT_RESP2: Handler(_VM | _SP, "direct_response"),
    Call.MSG_SEND: Handler(_VM | _SP, "msg_send"),
    Call.MSG_POLL: Handler(_VM | _SP, "msg_poll"),
    Call.MSG_SEND2: Handler(_ALL, "msg_send2"),
    Call.MSG_WAIT: Handler(_VM | _SP, "msg_wait"),
    Call.YIELD: Handler(_VM | _SP, "yielded"),
    Call.RUN: Handler(_ALL, "run"),
    Call.NOTIFICATION_BITMAP_CREATE: Handler(_OS, "bitmap_create", 3),
    Call.NOTIFICATION_BITMAP_DESTROY: Handler(_OS, "bitmap_destroy", 3),
    Call.NOTIFICATION_BIND: Handler(_ALL, "bind", 5),
    Call.NOTIFICATION_UNBIND: Handler(_ALL, "unbind", 5),
    Call.NOTIFICATION_SET: Handler(_ALL, "notify", 5),
    Call.NOTIFICATION_GET: Handler(_ALL, "notification_get", 5),
    Call.NOTIFICATION_INFO_GET: Handler(_VM | _OS, "notification_info_get", 1),
    Call.MEM_SHARE: Handler(_ALL, "mem_send", 5),
    Call.MEM_LEND: Handler(_ALL, "mem_send", 5),
    Call.MEM_DONATE: Handler(_ALL, "mem_send", 5),
    Call.MEM_RETRIEVE_REQ: Handler(_ALL, "mem_retrieve", 5),
    Call.MEM_RELINQUISH: Handler(_ALL, "mem_relinquish"),
    Call.MEM_RECLAIM: Handler(_ALL, "mem_reclaim", 4),
    Call.MEM_FRAG_TX: Handler(_ALL, "mem_frag_tx", 5),
    Call.MEM_FRAG_RX: Handler(_ALL, "mem_frag_rx", 5),
    Call.MEM_PERM_GET: Handler(_SP, "mem_perm_get", 3),
    Call.MEM_PERM_SET: Handler(_SP, "mem_perm_set", 4),
    Call.CONSOLE_LOG: Handler(_ALL, "console_log"),
    Call.SECONDARY_EP_REGISTER: Handler(_SP, "secondary_ep_register", 2),
}
"""Function → how it is answered. FFA_FEATURES reads this table too."""

_PERM_RW = 5  #: read-write, never executed; what memory has that an S-EL0 partition never changed
_PERMS = frozenset({3, 5, 7})  #: read-execute, read-write, read-only

CONSOLE_LINES = 1024
"""Last texts of FFA_CONSOLE_LOG that are kept."""


class Manager:
    """Serves endpoints: answers their calls from ``HANDLERS``, within its profile. Any call gets an answer."""

    kind: Kind  #: of the endpoints that are taken in by add()

    def __init__(self, id: int, machine: Machine, profile: Profile, handles: Callable[[], int]) -> None:
        self.id = id
        self.machine = machine
        self.served: dict[int, Served] = {}
        self.profile = profile
        self.handlers = HANDLERS
        self.transactions = Transactions(machine, profile, handles, self.speaks_for, self.may_receive)
        self.console: deque[tuple[int, str]] = deque(maxlen=CONSOLE_LINES)

    def add(self, endpoint: Endpoint) -> Served:
        """Takes an endpoint in. Raises ValueError: its id is taken."""
        return self._add(endpoint, self.kind)

    def _add(self, endpoint: Endpoint, kind: Kind) -> Served:
        if endpoint.id in self.served:
            raise ValueError(f"endpoint {endpoint.id:#x} is there already")
        endpoint.relayer = self
        contexts = [Context.WAITING] * endpoint.contexts
        found = self.served[endpoint.id] = Served(
            endpoint, kind, min(self.profile.version, endpoint.version), contexts=contexts
        )
        return found

    # -- what hypervisor and SPMC know of endpoints; overridden

    def speaks_for(self, caller: int, sender: int) -> bool:
        """Whether ``caller`` may name ``sender`` as itself."""
        return caller == sender

    def may_receive(self, sender: int, receiver: int) -> bool:
        """Whether memory of ``sender`` may be sent to ``receiver``."""
        return receiver in self.served

    # -- the interface

    def call(self, caller: int, frame: Frame, vcpu: int = 0) -> Frame:
        """The answer to a call that endpoint ``caller`` makes from its vCPU ``vcpu``. Whatever they say, it answers.

        The answer is what x0 to x17 hold then: x8 and on are the caller's own (SMCCC), but for functions that use them.
        """
        kept = frame[8:]
        if kept == _NOTHING:
            return self._answer(caller, frame, vcpu)
        answer = self._answer(caller, frame if frame.fid in _WIDE else Frame(*frame[:8]), vcpu)
        wide = answer.fid == _RESP2 or (answer.ok and frame.fid == _REGS)
        return answer if wide else Frame(*answer[:8], *kept)

    def _answer(self, caller: int, frame: Frame, vcpu: int) -> Frame:
        who = self.served.get(caller)
        if who is None:
            return Frame.failure(Error.NOT_SUPPORTED)
        method, smc64, zero_from = who.ways.get(frame[0] & MASK32) or self._way(who, frame.fid)
        if method is None:
            return Frame.failure(Error.NOT_SUPPORTED)
        arguments = frame if smc64 else frame.narrow
        if zero_from < 8 and any(arguments[zero_from:8]):
            return Frame.failure(_INVALID)
        try:
            answer: Frame = getattr(self, method)(who, arguments, vcpu if 0 <= vcpu < len(who.contexts) else 0)
        except FfaError as e:
            return Frame.failure(e.code)
        return answer

    def _way(self, who: Served, function_id: int) -> tuple[str | None, bool, int]:
        """How a call is answered, found out once for each function but FFA_VERSION, which may change it."""
        found = BY_FID.get(function_id)
        if found is None:
            return _NO_WAY
        function, smc64 = found
        handler = self._handler(who, function, smc64)
        way = _NO_WAY if handler is None else (handler.method, smc64, handler.zero_from)
        if function.call is not Call.VERSION:
            who.settled = True
            who.ways[function_id] = way
        return way

    @property
    def handlers(self) -> Mapping[Call, Handler]:
        """Function → how this manager answers it. Set another table to change it."""
        return self._handlers

    @handlers.setter
    def handlers(self, table: Mapping[Call, Handler]) -> None:
        self._handlers = MappingProxyType(dict(table))
        self._forget_ways()

    @property
    def profile(self) -> Profile:
        """What this manager implements."""
        return self._profile

    @profile.setter
    def profile(self, profile: Profile) -> None:
        self._profile = profile
        self._forget_ways()

    def _forget_ways(self) -> None:
        for who in self.served.values():
            who.ways.clear()

    def _handler(self, who: Served, function: Function, smc64: bool) -> Handler | None:
        call, profile = function.call, self.profile
        handler = self.handlers.get(call)
        missing = call in profile.missing or function.since > profile.version
        if handler is None or missing or who.kind not in handler.callers or not function.exists(who.version, smc64):
            return None
        return handler

    # -- setup and discovery

    def version(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_VERSION: the answer is in w0 alone. A caller whose minor version is newer is to come down to ours."""
        asked = x[1]
        ours = self.profile.version
        if asked >> 31 or asked >> 16 != ours >> 16:
            return Frame(Error.NOT_SUPPORTED & MASK32)
        agreed = min(asked, ours)
        if who.settled and not self.profile.version_change and agreed != who.version:
            return Frame(Error.NOT_SUPPORTED & MASK32)
        who.version = agreed
        who.ways.clear()
        return Frame(ours)

    def features(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_FEATURES: of a function (bit 31 set in w1) or of an interrupt."""
        asked = x[1]
        if not asked >> 31:
            interrupt = self._interrupt(who, asked)
            if interrupt is None or x[2]:
                raise FfaError(Error.NOT_SUPPORTED)
            return Frame.success(interrupt)
        found = BY_FID.get(asked)
        if found is None or not self._announces(who, *found):
            raise FfaError(Error.NOT_SUPPORTED)
        properties = self._PROPERTIES.get(found[0].call)
        return Frame.success(*(properties(self, who, x[2]) if properties else ()))

    def _announces(self, who: Served, function: Function, smc64: bool) -> bool:
        if function.call in self.profile.unannounced:
            return False
        if function.call in self.profile.announced:
            return function.exists(who.version, smc64)
        if function.call in (Call.MEM_PERM_GET, Call.MEM_PERM_SET) and not who.endpoint.el0:
            return False
        if function.call is Call.SECONDARY_EP_REGISTER and len(who.contexts) == 1:
            return False
        return self._handler(who, function, smc64) is not None

    def _interrupt(self, who: Served, feature: int) -> int | None:
        known = {int(f): number for f, number in self.profile.interrupts.items()}
        told = self.profile.any_interrupt or feature in _INTERRUPTS_OF[who.kind]
        if who.endpoint.el0 or not told:
            return None
        return known.get(feature)

    def _features_rxtx(self, who: Served, asked: int) -> tuple[int, ...]:
        limit = self.profile.max_buffer_pages if self.profile.tells_buffer_limit and who.version >= VERSION_1_2 else 0
        return (limit << 16,)

    def _features_send(self, who: Served, asked: int) -> tuple[int, ...]:
        return (int(self.profile.dynamic_buffers),)

    def _features_retrieve(self, who: Served, asked: int) -> tuple[int, ...]:
        if who.version >= VERSION_1_1 and is_secure(who.id) and not asked & 2:
            raise FfaError(Error.NOT_SUPPORTED, "the caller must use the NS bit")
        hypervisor = 4 if who.kind is Kind.OS else 0
        return (int(self.profile.dynamic_buffers) | (2 if who.version >= VERSION_1_1 else 0) | hypervisor, 0)

    _PROPERTIES: ClassVar[dict[Call, Callable[[Manager, Served, int], tuple[int, ...]]]] = {
        Call.RXTX_MAP: _features_rxtx,
        Call.MEM_SHARE: _features_send,
        Call.MEM_LEND: _features_send,
        Call.MEM_DONATE: _features_send,
        Call.MEM_RETRIEVE_REQ: _features_retrieve,
    }

    def id_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_ID_GET."""
        return Frame.success(who.id)

    def spm_id_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_SPM_ID_GET."""
        return Frame.success(self.id)

    def partitions(self, who: Served) -> list[messages.PartitionInfo]:
        """What ``who`` is told of partitions."""
        return [
            messages.PartitionInfo(s.id, s.endpoint.contexts, s.endpoint.properties, s.endpoint.uuid)
            for s in self.served.values()
            if s.kind is self.kind
        ]

    def _chosen(self, who: Served, uuid: object) -> list[messages.PartitionInfo]:
        found = [p for p in self.partitions(who) if uuid in (messages.NIL, p.uuid)]
        if not found and self.profile.no_partition_is_error:
            raise FfaError(_INVALID, "no such partition")
        return found

    def partition_info_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_PARTITION_INFO_GET: the number in w2; the entries in RX, and their size in w3, unless only counted."""
        flags = x[5]
        if flags & ~PARTITION_INFO_COUNT or (flags and who.version < VERSION_1_1):
            raise FfaError(_INVALID)
        uuid = messages.uuid_from_words(x[1:5])
        if flags:
            return Frame.success(len(self._chosen(who, uuid)))
        if who.mailbox is None:
            raise FfaError(_BUSY, "no buffers are mapped")
        found = self._chosen(who, uuid)
        data = messages.build_infos(found, who.version, uuid == messages.NIL)
        if len(data) > who.mailbox.size:
            raise FfaError(Error.NO_MEMORY)
        self.deliver(who, data)
        return Frame.success(len(found), messages.info_size(who.version) if who.version >= VERSION_1_1 else 0)

    def partition_info_get_regs(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_PARTITION_INFO_GET_REGS: UUID in x1 and x2, first index and tag in x3."""
        first, tag = x[3] & 0xFFFF, x[3] >> 16 & 0xFFFF
        if tag:
            raise FfaError(Error.RETRY, "the information never changes: there is only tag 0")
        uuid = messages.uuid_from_halves(x[1], x[2])
        found = self._chosen(who, uuid)
        if first >= len(found):
            raise FfaError(_INVALID)
        return messages.infos_in_registers(found, first, uuid == messages.NIL)

    # -- buffers

    def rxtx_map(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_RXTX_MAP: TX in x1, RX in x2, pages of each in w3."""
        count = x[3] & MASK32
        if not 0 < count <= self.profile.max_buffer_pages:
            raise FfaError(_INVALID)
        if who.mailbox is not None:
            raise FfaError(_DENIED, "buffers are mapped already")
        box = self.check_buffers(who, x[1], x[2], count)
        who.mailbox = box
        self.machine.set_state(box.pages, buffer_of(who.id))
        return Frame.success()

    def check_buffers(self, who: Served, tx: int, rx: int, count: int) -> Mailbox:
        """A mailbox in memory that is ``who``'s alone.

        Raises FfaError: INVALID_PARAMETERS; for memory that is not its own DENIED, on hardware (tf-a-tests), and
        INVALID_PARAMETERS at a virtual instance (ACS).
        """
        not_its_own = _DENIED if who.kind is Kind.OS else _INVALID
        if (tx | rx) % PAGE_SIZE or (tx < rx + count * PAGE_SIZE and rx < tx + count * PAGE_SIZE):
            raise FfaError(_INVALID, "buffers that overlap or are not page-aligned")
        regions = self.machine.regions_of([(tx, count), (rx, count)])
        if None in regions or any(r is not None and r.device for r in regions):
            raise FfaError(not_its_own, "buffers outside memory")
        box = Mailbox(self.machine, tx, rx, count * PAGE_SIZE)
        if self.machine.states_of(box.pages) != {exclusive(who.id)}:
            raise FfaError(not_its_own, "buffers that are not the caller's alone")
        return box

    def rxtx_unmap(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_RXTX_UNMAP: the id in w1 is zero where endpoints themselves call."""
        if x[1] >> 16:
            raise FfaError(_INVALID)
        box = who.mailbox
        if box is None:
            raise FfaError(_INVALID, "no buffers are mapped")
        who.mailbox = None
        who.message = None
        self.machine.set_state(box.pages, exclusive(who.id))
        return Frame.success()

    def rx_release(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_RX_RELEASE."""
        if x[1] & 0xFFFF:
            raise FfaError(_INVALID)
        who.buffers().release()
        who.message = None
        return Frame.success()

    def deliver(self, who: Served, data: bytes) -> None:
        """Puts ``data``, which fits, into an endpoint's RX. Raises FfaError."""
        box = who.buffers()
        if not self._rx_free(who):
            raise FfaError(_BUSY, "the RX buffer is not released")
        self.claim_rx(who)
        box.deliver(data)

    def copy_tx(self, who: Served, size: int) -> bytes:
        """A private copy of an endpoint's TX. Raises FfaError."""
        return who.buffers().take(size)

    # -- direct messages

    def direct_request(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MSG_SEND_DIRECT_REQ and _REQ2."""
        sender, receiver = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        if x[2] and not _is_second(x):
            if x[2] & DIRECT_FRAMEWORK_BIT:
                return self.framework_message(who, x, vcpu)
            if x[2] & MASK32:
                raise FfaError(_INVALID)
        if not self.speaks_for(who.id, sender) or sender == receiver:
            raise FfaError(_INVALID)
        return self.ask(who, receiver, x, vcpu)

    def framework_message(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MSG_SEND_DIRECT_REQ with a framework message. Raises FfaError: INVALID_PARAMETERS"""
        raise FfaError(_INVALID, "framework messages are for partition managers")

    def ask(self, who: Served, receiver: int, x: Frame, vcpu: int) -> Frame:
        """Runs an endpoint of this manager's own with a direct request. Raises FfaError."""
        to, second = self.served.get(receiver), _is_second(x)
        if to is None or to.kind is not self.kind or (second and to.version < VERSION_1_2):
            raise FfaError(_INVALID, f"no endpoint {receiver:#x}")
        if second and messages.uuid_from_halves(x[2], x[3]) not in (messages.NIL, to.endpoint.uuid):
            raise FfaError(_INVALID, "the endpoint has no such service")
        takes, sends = _PROPERTIES_OF_SECOND if second else _PROPERTIES_OF_FIRST
        if not to.endpoint.properties & takes:
            raise FfaError(_DENIED, "the endpoint takes no direct requests")
        if who.kind is self.kind and not who.endpoint.properties & sends:
            raise FfaError(_DENIED, "the caller may not send direct requests")
        target = vcpu % len(to.contexts)
        before = who.contexts[vcpu]
        if before is _PREEMPTED or not to.step(target, _REQUEST):
            raise FfaError(_BUSY)
        who.contexts[vcpu] = _BLOCKED
        to.requests[target] = (x[1] >> 16 & 0xFFFF, x)
        try:
            return self._run(to, target, x)
        finally:
            who.contexts[vcpu] = before

    def _run(self, to: Served, vcpu: int, x: Frame) -> Frame:
        """Gives an endpoint's context, now RUNNING, the processor; what its caller gets back."""
        answer = to.endpoint.receive(x, vcpu)
        function = answer[0] & MASK32
        asked = to.requests.get(vcpu)
        if function in (_INTERRUPT, _YIELD):
            to.step(vcpu, ContextEvent.PREEMPT)
            return Frame(function, to.id << 16 | vcpu)
        if asked is not None and function == response_to(asked[1][0] & MASK32):
            request = asked[1]
            if answer[1] & MASK32 == (request[1] & 0xFFFF) << 16 | request[1] >> 16 & 0xFFFF:
                del to.requests[vcpu]
                to.step(vcpu, _RESPOND)
                if function == _RESP2:
                    return answer
                answer = answer if answer[8:] == _NOTHING else Frame(*answer[:8])
                return answer if function & SMC64_BIT else answer.narrow
        to.requests.pop(vcpu, None)
        to.step(vcpu, _RESPOND)
        if function == _WAIT and asked is None:
            return Frame(function, to.id << 16 | vcpu)
        return Frame.failure(Error.ABORTED)  # the endpoint did what ends no request

    def direct_response(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """A direct response that nobody waits for: in this model, an endpoint answers by returning from receive()."""
        raise FfaError(_DENIED)

    def run(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_RUN: resumes a preempted context, or lets a waiting one look for work. Target in w1: id, vCPU."""
        target, index = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        if who.kind is Kind.SP:
            raise FfaError(_DENIED, "the normal world schedules partitions")
        to = self.served.get(target)
        if to is None or to.kind is not self.kind or target == who.id or index >= len(to.contexts):
            raise FfaError(_INVALID)
        if to.contexts[index] is Context.PREEMPTED:
            to.step(index, ContextEvent.RUN)
        elif not to.step(index, ContextEvent.REQUEST):
            raise FfaError(_BUSY if to.contexts[index] is Context.RUNNING else _DENIED)
        return self._run(to, index, Frame(fid(Call.RUN), x[1] & MASK32))

    def yielded(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_YIELD of an endpoint that nobody is waiting for: it goes on at once."""
        return Frame.success()

    # -- indirect messages

    def msg_send(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MSG_SEND (1.0): ids in w1, bytes of the message in TX in w3."""
        sender, receiver = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        to = self.served.get(receiver)
        if sender != who.id or receiver == sender or to is None or to.kind is not who.kind or x[2] or x[4] > 1:
            raise FfaError(_INVALID)
        if to.version >= VERSION_1_1:
            raise FfaError(_DENIED, "the receiver has no FFA_MSG_POLL")
        data = self.copy_tx(who, x[3])
        if to.mailbox is None or len(data) > to.mailbox.size:
            raise FfaError(_INVALID)
        self.deliver(to, data)
        to.message = (x[1], x[3], x[4])
        who.buffers().poison_tx(len(data))
        return Frame.success()

    def msg_poll(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MSG_POLL (1.0): the message in RX, as FFA_MSG_SEND."""
        if who.message is None:
            raise FfaError(Error.RETRY)
        (ids, size, flags), who.message = who.message, None
        return Frame(fid(Call.MSG_SEND), ids, 0, size, flags)

    def msg_send2(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MSG_SEND2: header and payload in TX; the receiver gets them in RX, and a framework notification."""
        sender = x[1] >> 16 & 0xFFFF
        if x[1] & 0xFFFF or sender or x[2] & ~NOTIFY_DELAY_SRI or (x[2] and not is_secure(who.id)):
            raise FfaError(_INVALID)
        box = who.buffers()
        message = messages.parse_message(box.take(box.size), who.version)
        if message.sender != who.id or message.receiver == who.id:
            raise FfaError(_INVALID)
        self.pass_on(who, message)
        box.poison_tx(messages.header_size(who.version) + len(message.payload))
        return Frame.success()

    def pass_on(self, who: Served, message: messages.Message) -> None:
        """Delivers an indirect message to an endpoint of this manager's. Raises FfaError."""
        to = self.served.get(message.receiver)
        if to is None or to.mailbox is None:
            raise FfaError(_INVALID, "no such endpoint, or it has no buffers")
        if not to.endpoint.properties & Property.INDIRECT_MSG:
            raise FfaError(_DENIED, "the receiver takes no indirect messages")
        if who.kind is self.kind and not who.endpoint.properties & Property.INDIRECT_MSG:
            raise FfaError(_DENIED, "the caller may not send indirect messages")
        if message.uuid not in (messages.NIL, to.endpoint.uuid):
            raise FfaError(_INVALID, "the receiver has no such service")
        if to.version < VERSION_1_1:
            raise FfaError(_DENIED, "the receiver has no FFA_MSG_SEND2")
        data = messages.build_message(message, to.version)
        if len(data) > to.mailbox.size:
            raise FfaError(Error.NO_MEMORY)
        self.deliver(to, data)
        to.framework |= RX_FULL

    def msg_wait(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MSG_WAIT of an endpoint that is not being run: its RX is released unless it keeps it (1.2); a 1.0 message
        that is there is the answer; else only an interrupt ends the wait."""
        if any(x[1:2] + x[3:8]) or x[2] & ~WAIT_RETAIN_RX or (x[2] and who.version < VERSION_1_2):
            raise FfaError(_INVALID)
        if vcpu in who.requests:
            raise FfaError(_DENIED, "a direct request is not answered yet")
        if who.message is not None:
            return self.msg_poll(who, x, vcpu)
        if not x[2] and who.mailbox is not None and who.mailbox.state is not Rx.EMPTY:
            who.mailbox.release()
        return Frame(_INTERRUPT, who.id << 16 | vcpu)

    # -- notifications

    def receiver(self, who: Served, id: int) -> Served:
        """The endpoint whose notifications ``who`` may bind and get: itself. Raises FfaError."""
        if id != who.id:
            raise FfaError(_INVALID)
        return self.takes_notifications(who)

    def takes_notifications(self, who: Served) -> Served:
        """``who``, if it may receive notifications. Raises FfaError: DENIED"""
        if not who.endpoint.properties & Property.NOTIFICATIONS:
            raise FfaError(_DENIED, "the endpoint takes no notifications")
        return who

    def is_sender(self, id: int) -> bool:
        """Whether there is an endpoint that could send notifications."""
        return id in self.served

    def _binding(self, who: Served, x: Frame) -> tuple[int, Served, int]:
        sender, receiver, bits = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF, pair(x[3], x[4])
        if sender == receiver or not self.is_sender(sender) or not bits:
            raise FfaError(_INVALID)
        return sender, self.receiver(who, receiver), bits

    def bind(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_BIND: sender and receiver in w1, flags in w2, bitmap in w3 and w4."""
        if x[2] & ~NOTIFY_PER_VCPU:
            raise FfaError(_INVALID)
        if x[2] and not self.profile.per_vcpu:
            raise FfaError(_DENIED, "global notifications only")
        sender, to, bits = self._binding(who, x)
        _bitmap(to, sender).bind(sender, bits, bool(x[2]))
        return Frame.success()

    def unbind(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_UNBIND."""
        if x[2]:
            raise FfaError(_INVALID)
        sender, to, bits = self._binding(who, x)
        _bitmap(to, sender).unbind(sender, bits)
        return Frame.success()

    def notify(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_SET: sender and receiver in w1; flags and vCPU in w2; bitmap in w3 and w4."""
        sender, receiver, bits = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF, pair(x[3], x[4])
        single, target = x[2] & NOTIFY_PER_VCPU, x[2] >> 16
        if x[2] & 0xFFFF & ~(NOTIFY_PER_VCPU | NOTIFY_DELAY_SRI) or (target and not single):
            raise FfaError(_INVALID)
        if x[2] & NOTIFY_DELAY_SRI and not is_secure(who.id):
            raise FfaError(_INVALID, "only secure partitions may delay the interrupt")
        if not self.speaks_for(who.id, sender) or sender == receiver or not bits:
            raise FfaError(_INVALID)
        self.notify_receiver(sender, receiver, bits, target if single else None)
        return Frame.success()

    def notify_receiver(self, sender: int, receiver: int, bits: int, vcpu: int | None) -> None:
        """Makes notifications of a receiver pending. Raises FfaError."""
        to = self.served.get(receiver)
        if to is None or (vcpu is not None and vcpu >= len(to.contexts)):
            raise FfaError(_INVALID)
        _bitmap(self.takes_notifications(to), sender).set(sender, bits, vcpu)

    def notification_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_GET: vCPU and receiver in w1, whose bitmaps in w2."""
        target, receiver = x[1] >> 16 & 0xFFFF, x[1] & 0xFFFF
        if x[2] & ~(GET_FROM_SP | GET_FROM_VM | GET_FROM_SPM | GET_FROM_HYP):
            raise FfaError(_INVALID)
        to = self.receiver(who, receiver)
        if target >= len(to.contexts):
            raise FfaError(_INVALID)
        return Frame.success(*self.take(to, target, x[2]))

    def take(self, to: Served, vcpu: int, flags: int) -> tuple[int, ...]:
        """w2 to w7 of the answer to FFA_NOTIFICATION_GET; what is in them is pending no more."""
        sp = to.from_sp.take(vcpu) if flags & GET_FROM_SP else 0
        vm = to.from_vm.take(vcpu) if flags & GET_FROM_VM else 0
        mine = 0
        if flags & self._FRAMEWORK[self.kind]:
            mine, to.framework = to.framework, 0
        return (*halves(sp), *halves(vm), *((mine, 0) if self.kind is Kind.SP else (0, mine)))

    _FRAMEWORK: ClassVar[dict[Kind, int]] = {Kind.SP: GET_FROM_SPM, Kind.VM: GET_FROM_HYP}

    def notification_info_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_NOTIFICATION_INFO_GET: who has something pending. Lists that do not fit are told the next time."""
        lists = self.pending(who)
        if not lists:
            raise FfaError(Error.NO_DATA)
        answer, shown = messages.build_pending(lists, bool(x.fid & SMC64_BIT))
        for endpoint, vcpus in lists[:shown]:
            self.mark_listed(endpoint, vcpus)
        return answer

    def pending(self, who: Served) -> list[messages.PendingList]:
        """What INFO_GET has to tell ``who``: endpoints, each with at most three vCPUs in one list."""
        out: list[messages.PendingList] = []
        for s in self.schedules(who):
            everywhere, vcpus = False, set[int]()
            for bitmap in (s.from_sp, s.from_vm):
                own, single = bitmap.to_list(self.profile.info_once)
                everywhere |= own
                vcpus |= set(single)
            several = sorted(vcpus)
            lists = [(s.id, tuple(several[n : n + 3])) for n in range(0, len(several), 3)]
            out += lists or ([(s.id, ())] if everywhere else [])
        return out

    def schedules(self, who: Served) -> list[Served]:
        """The endpoints that ``who`` schedules, and so hears of."""
        return [who]

    def mark_listed(self, endpoint: int, vcpus: tuple[int, ...]) -> None:
        """INFO_GET has told of them."""
        s = self.served[endpoint]
        s.from_sp.listed |= {None, *vcpus}
        s.from_vm.listed |= {None, *vcpus}

    # -- memory

    def descriptor(self, who: Served, size: int, address: int, pages: int) -> bytes:
        """A private copy of a descriptor, from TX or from memory of the caller's own. Raises FfaError."""
        if not address:
            if pages:
                raise FfaError(_INVALID)
            return self.copy_tx(who, size)
        if not self.profile.dynamic_buffers:
            raise FfaError(Error.NOT_SUPPORTED)
        pages_bytes = pages * PAGE_SIZE
        if address % PAGE_SIZE or size > pages_bytes or pages > self.profile.max_pages:
            raise FfaError(_INVALID)
        numbers = range(address // PAGE_SIZE, address // PAGE_SIZE + (size + PAGE_SIZE - 1) // PAGE_SIZE)
        if self.machine.states_of(numbers) != {exclusive(who.id)}:
            raise FfaError(_INVALID, "a buffer that is not the caller's alone")
        try:
            return self.machine.read(who.id, address, size)
        except AccessFaultError:
            raise FfaError(_INVALID) from None

    def consumed(self, who: Served, size: int, address: int) -> None:
        """The call has used the descriptor: nobody may rely on it any more."""
        if not address and who.mailbox is not None:
            who.mailbox.poison_tx(size)

    def mem_send(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_SHARE, _LEND, _DONATE: total and fragment length in w1 and w2, buffer in x3, its pages in w4."""
        call = BY_FID[x.fid][0].call
        total, size, address, pages = x[1] & MASK32, x[2] & MASK32, x[3], x[4] & MASK32
        if address and not self.profile.dynamic_buffers:
            raise FfaError(Error.NOT_SUPPORTED)
        if size > total:
            raise FfaError(_INVALID)
        if size < total and (not self.profile.fragments or address):
            raise FfaError(Error.NOT_SUPPORTED)
        buf = self.descriptor(who, size, address, pages)
        region = self.transactions.look_at(call, who.id, who.version, total, buf, self.keeps(who))
        handle = self.send(region, total, buf)
        self.consumed(who, size, address)
        return self._sent(region, handle)

    def keeps(self, who: Served) -> bool:
        """Whether this manager keeps the pages of what ``who`` sends."""
        return self.profile.owner_checks

    def send(self, region: Region, total: int, buf: bytes) -> int:
        """Enters a new region; its handle. Raises FfaError."""
        handle = self.transactions.new_handle()
        self.transactions.enter(region, handle)
        return handle

    def _sent(self, region: Region, handle: int) -> Frame:
        low, high = halves(handle)
        if region.complete:
            return Frame.success(low, high)
        return Frame.of(Call.MEM_FRAG_RX, low, high, region.sent)

    def mem_frag_tx(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_FRAG_TX: handle in w1 and w2, bytes in TX in w3. A bad fragment ends the transaction."""
        handle, size = pair(x[1], x[2]), x[3]
        region = self.transactions.find(handle)
        if not self.speaks_for(who.id, region.descriptor.sender) or region.complete:
            raise FfaError(_INVALID)
        if (x[4] >> 16) not in (0, region.descriptor.sender) or x[4] & 0xFFFF:
            raise FfaError(_INVALID)
        data = self.copy_tx(who, size)
        try:
            self.transactions.add_fragment(region, data)
            self.send_more(region, data)
        except FfaError:
            self.abandon(region)
            raise
        self.consumed(who, size, 0)
        if region.complete:
            self.transactions.take_from_sender(region)
        return self._sent(region, handle)

    def send_more(self, region: Region, data: bytes) -> None:
        """A fragment has come and is right. Raises FfaError."""

    def abandon(self, region: Region) -> None:
        """Ends a region that was never sent to the end: its pages never left the sender."""
        self.transactions.forget(region)

    def mem_retrieve(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_RETRIEVE_REQ: as mem_send; the answer's length is in w1, the part of it that is in RX in w2."""
        total, size, address, pages = x[1] & MASK32, x[2] & MASK32, x[3], x[4] & MASK32
        if address and not self.profile.dynamic_buffers:
            raise FfaError(Error.NOT_SUPPORTED)
        if size != total:
            raise FfaError(_INVALID)
        buf = self.descriptor(who, size, address, pages)
        box = who.buffers()
        if not self._rx_free(who):
            raise FfaError(_BUSY, "the RX buffer is not released")
        request = abi.parse(buf, who.version)
        if request.end != size:
            raise FfaError(_INVALID, "the request's length is not that of its receivers")
        described = self.describe_all(who, request, box.size)
        if described is not None:
            self.deliver(who, described[: box.size])
            self.consumed(who, size, address)
            return Frame.of(Call.MEM_RETRIEVE_RESP, len(described), min(box.size, len(described)))
        actor = self.actor(who, [r.endpoint for r in request.receivers])
        region = self.transactions.look_at_retrieve(actor, request)
        answer = self.transactions.describe(region, _asked(request, actor), who.version, request.attributes)
        self.claim_rx(who)
        part = self.transactions.retrieve(region, actor, request, answer, box.size)
        box.deliver(part)
        self.consumed(who, size, address)
        return Frame.of(Call.MEM_RETRIEVE_RESP, len(answer), len(part))

    def describe_all(self, who: Served, request: abi.Transaction, size: int) -> bytes | None:
        """The answer to who may look at a transaction without taking part in it; None for others. Raises FfaError."""
        return None

    def actor(self, who: Served, named: Sequence[int]) -> int:
        """The borrower that a call is about: the caller. Raises FfaError."""
        return who.id

    def _rx_free(self, who: Served) -> bool:
        box = who.mailbox
        return box is not None and box.state is Rx.EMPTY

    def claim_rx(self, who: Served) -> None:
        """Makes sure that this manager may write an endpoint's RX. Raises FfaError: BUSY"""

    def mem_frag_rx(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_FRAG_RX: handle in w1 and w2, offset in w3; the next part of a retrieve response."""
        handle, offset = pair(x[1], x[2]), x[3]
        region = self.transactions.find(handle)
        if (x[4] >> 16) not in (0, region.descriptor.sender) or x[4] & 0xFFFF:
            raise FfaError(_INVALID)
        box = who.buffers()
        if not self._rx_free(who):
            raise FfaError(_BUSY, "the RX buffer is not released")
        actor = self.actor(who, [id for id, lending in region.borrowers.items() if lending.answer])
        lending = region.borrowers.get(actor)
        if lending is None or not lending.answer or offset != lending.read:
            raise FfaError(_INVALID, "no such fragment")
        self.claim_rx(who)
        part = self.transactions.next_part(region, actor, offset, box.size)
        box.deliver(part)
        return Frame.of(Call.MEM_FRAG_TX, *halves(handle), len(part))

    def mem_relinquish(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_RELINQUISH: the descriptor is in TX."""
        box = who.buffers()
        request = abi.parse_relinquish(box.take(box.size))
        self.relinquish(who, request)
        box.poison_tx(16 + 2 * len(request.endpoints))
        return Frame.success()

    def relinquish(self, who: Served, request: abi.Relinquish) -> None:
        """Takes an endpoint's access away, as it asks. Raises FfaError."""
        self.transactions.relinquish(self.actor(who, request.endpoints), request)

    def mem_reclaim(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_RECLAIM: handle in w1 and w2, flags in w3."""
        region = self.transactions.look_at_reclaim(who.id, pair(x[1], x[2]), x[3])
        self.transactions.reclaim(region, x[3])
        return Frame.success()

    def _own_pages(self, who: Served, address: int, count: int) -> range:
        if not who.endpoint.el0:
            raise FfaError(_DENIED, "for S-EL0 partitions only")
        if address % PAGE_SIZE or not 0 < count <= self.profile.max_pages:
            raise FfaError(_INVALID)
        pages = range(address // PAGE_SIZE, address // PAGE_SIZE + count)
        if None in self.machine.regions_of([(address, count)]):
            raise FfaError(_INVALID)
        states = self.machine.states_of(pages)
        if any(state is None or state.owner != who.id for state in states):
            raise FfaError(_INVALID)
        return pages

    def mem_perm_get(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_PERM_GET: address in x1; permissions in w2."""
        page = self._own_pages(who, x[1], 1)[0]
        return Frame.success(who.pages.get(page, _PERM_RW))

    def mem_perm_set(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_MEM_PERM_SET: address in x1, pages in w2, permissions in w3."""
        pages = self._own_pages(who, x[1], x[2] & MASK32)
        if x[3] & MASK32 not in _PERMS:
            raise FfaError(_INVALID)
        who.pages.update(dict.fromkeys(pages, x[3] & MASK32))
        read_only = self.transactions.read_only.setdefault(who.id, set())
        if x[3] & MASK32 == _PERM_RW:
            read_only.difference_update(pages)
        else:
            read_only.update(pages)
        return Frame.success()

    # -- others

    def secondary_ep_register(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_SECONDARY_EP_REGISTER: where the other contexts of a partition begin. There is nothing to begin here."""
        if len(who.contexts) == 1:
            raise FfaError(Error.NOT_SUPPORTED, "the partition has one context")
        return Frame.success(smc64=bool(x.fid & SMC64_BIT))

    def console_log(self, who: Served, x: Frame, vcpu: int) -> Frame:
        """FFA_CONSOLE_LOG: number of characters in w1; four are in each of w2 to w7, or eight in x2 to x17 (SMC64)."""
        smc64 = bool(x.fid & SMC64_BIT)
        text = struct.pack("<16Q", *x[2:18]) if smc64 else struct.pack("<6I", *x[2:8])
        count = x[1] & MASK32
        if not 0 < count <= len(text):
            raise FfaError(_INVALID)
        self.console.append((who.id, text[:count].decode("ascii", "backslashreplace")))
        return Frame.success()


_INTERRUPTS_OF: dict[Kind, frozenset[int]] = {
    Kind.VM: frozenset({Feature.NOTIFICATION_PENDING, Feature.SCHEDULE_RECEIVER}),
    Kind.OS: frozenset({Feature.SCHEDULE_RECEIVER}),
    Kind.SP: frozenset({Feature.NOTIFICATION_PENDING, Feature.MANAGED_EXIT}),
}
"""Interrupts that FFA_FEATURES tells of. Partitions at S-EL0 take none."""
_NOTHING = (0,) * 10
_RESP2, _REGS = fid(Call.MSG_SEND_DIRECT_RESP2), fid(Call.PARTITION_INFO_GET_REGS)
_WIDE = frozenset({fid(Call.MSG_SEND_DIRECT_REQ2), _RESP2, _REGS, fid(Call.CONSOLE_LOG, True)})
"""Functions whose x8 to x17 are arguments."""
_INTERRUPT, _YIELD, _WAIT = fid(Call.INTERRUPT), fid(Call.YIELD), fid(Call.MSG_WAIT)
_PROPERTIES_OF_FIRST = Property.DIRECT_REQ_RECV, Property.DIRECT_REQ_SEND
_PROPERTIES_OF_SECOND = Property.DIRECT_REQ2_RECV, Property.DIRECT_REQ2_SEND
_PREEMPTED, _BLOCKED = Context.PREEMPTED, Context.BLOCKED  # members of an enum are slow to find
_REQUEST, _RESPOND = ContextEvent.REQUEST, ContextEvent.RESPOND
_NO_WAY = (None, False, 8)
_DIRECT_REQ2 = fid(Call.MSG_SEND_DIRECT_REQ2)


def _is_second(x: Frame) -> bool:
    return x[0] & MASK32 == _DIRECT_REQ2


def _bitmap(to: Served, sender: int) -> Bitmap:
    return to.from_sp if is_secure(sender) else to.from_vm


def _asked(request: abi.Transaction, id: int) -> abi.Receiver:
    return next(r for r in request.receivers if r.endpoint == id)
