"""The TEE device as a vhost-user device: rings in, requests to the guest's epoch; responses and events back."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial

from device.config import Config, Limits
from device.machines import LIFE, LifeAction, LifeEvent, LifeState
from device.messages import CONFIG, EVENT_HEADER
from device.requests import RESPONSE_HEADER_SIZE, refusal
from device.wire import Event, Feature, Queue, ResponseFlag, Status, only_usable
from host_backend.epoch import Epoch, features_of
from host_backend.router import Router
from host_backend.slots import Leased
from host_backend.trace import Recorder
from pyvhost.device import Device, Link
from pyvhost.memory import GuestMemory
from pyvhost.messages import Feature as RingFeature
from pyvhost.vring.api import Chain, DeviceQueue
from pyvhost.vring.choice import implementation
from pyvhost.vring.packed import INITIAL_BASE
from tee.driver import TakesHandles

log = logging.getLogger(__name__)

_NOTIFY_EVERY = 4
"""Completions of calls that took their time after which the driver is signalled while the device goes on working."""

_SIGNAL_S = {"pure": 50e-6, "compiled": 30e-6}[implementation()]
"""Seconds after which it is signalled of requests that are answered one after the other: a signal is dear. As measured
for each kind of queue (`virtio-tee bench`, null invoke, 32 at a time)."""

_BUDGET = 64
"""Requests taken from one ring before others have their turn: the control queue, say, with a cancel."""

_RPC_RINGS = frozenset({Queue.CONTROL, Queue.EVENT})
"""While one of them is stopped no RPC can be answered."""


class TeeDevice(Device):
    """One guest's device. ``vm`` names the guest to the TEE; ``new_epoch`` gives fresh random 64-bit numbers.

    ``ffa_vm`` is the guest's FF-A endpoint. Raises ValueError: the TEE cannot take memory that this has shared.
    """

    max_queue_size = 1024
    config_size = CONFIG.size
    logs_writes = False  # the TEE writes to registered memory at any time, also during a pause

    def __init__(
        self,
        router: Router,
        *,
        vm: str,
        limits: Limits,
        request_queues: int,
        clock: Callable[[], float],
        new_epoch: Callable[[], int],
        trace: Recorder | None = None,
        ffa_vm: int | None = None,
    ) -> None:
        self.ffa_vm = ffa_vm
        tee = router.tee
        if ffa_vm is not None and not (isinstance(tee, TakesHandles) and tee.takes_handles_of(vm, ffa_vm)):
            raise ValueError(f"the TEE takes no memory that FF-A endpoint {ffa_vm:#x} shares for guest {vm}")
        self.offered = features_of(tee) if ffa_vm is not None else features_of(tee) & ~Feature.FFA_HANDLE
        self.features = int(self.offered)
        self.num_queues = Queue.REQUEST + request_queues
        self.router = router
        self.vm = vm
        self.limits = limits
        self.life = LifeState.FRESH
        self._request_queues = request_queues
        self._max_readable = limits.max_request_bytes + limits.max_inline_bytes
        self._slot_of = [partial(RingSlot, self, index) for index in range(self.num_queues)]
        self._clock = clock
        self._new_epoch = new_epoch
        self._trace = trace
        self._draining: set[Epoch] = set()
        self._running: set[int] = set()
        self._dirty: set[int] = set()
        self._lost: set[int] = set()
        """Rings with requests of which another backend may have run some."""
        self._search: dict[int, int] = {}
        """Rings in which a CANCEL's request may lie → how many of their requests are still to be looked at."""
        self._taken_over = False
        """The driver runs on from before this epoch."""
        self._announce = False
        """… and is still to be told that its state is gone."""
        self._completed = 0
        self._connected = False
        self.memory_version = 0
        self.epoch = self._begin(0)

    # -- config space

    def read_config(self, offset: int, length: int) -> bytes:
        config = Config(self.epoch.number, self.router.tee.info, self._request_queues, self.limits)
        return config.pack()[offset : offset + length]

    # -- life

    def _begin(self, not_this: int) -> Epoch:
        number = not_this
        while number in (0, not_this):
            number = self._new_epoch()
        return Epoch(
            number,
            self.router.tee,
            self,
            vm=self.vm,
            features=Feature(only_usable(self.acked_features)) & self.offered,
            limits=self.limits,
            clock=self._clock,
            on_drained=self._on_drained,
            trace=self._trace,
            ffa_vm=self.ffa_vm,
        )

    def _live(self, event: LifeEvent) -> LifeAction:
        before = self.life
        self.life, action = LIFE.step(self.life, event)
        if self.life is not before:
            if self._trace is not None:
                self._trace.mark(self.vm, self.life.value, because=event.value)
            log.debug("vm %s: %s (%s)", self.vm, self.life.value, event.value)
        if action is LifeAction.END:
            if self._trace is not None:
                self._trace.mark(self.vm, "epoch ended", because=event.value)
            old, self.epoch = self.epoch, self._begin(self.epoch.number)
            self._draining.add(old)
            self._search.clear()
            self.router.touched = True
            if self._connected:
                self.link.config_changed()
            try:
                old.end()
            except Exception:
                log.exception(
                    "vm %s: an error of the backend itself, in ending an epoch; its contexts are closed: report this",
                    self.vm,
                )
                old.ended = True
                old.give_up()
        elif action is LifeAction.SERVE:
            for index in self._running:
                self.link.wake(index)
        return action

    def _on_drained(self, epoch: Epoch) -> None:
        self._draining.discard(epoch)
        if not self._draining:
            if self._trace is not None:
                self._trace.mark(self.vm, "drained", **self.router.tee.usage())
            self._live(LifeEvent.DRAINED)

    def connected(self, link: Link) -> None:
        self._connected = True
        self.epoch.features = Feature(0)
        log.info("vm %s: a frontend has connected", self.vm)
        if self._trace is not None:
            self._trace.mark(self.vm, "connected")

    def negotiated(self, features: int) -> None:
        self.epoch.features = Feature(only_usable(features)) & self.offered

    def memory_changed(self, memory: GuestMemory) -> None:
        self.memory_version += 1

    def queue_started(self, index: int, queue: DeviceQueue, resumed: bool) -> None:
        self._running.add(index)
        if self._running.issuperset(_RPC_RINGS):
            self.epoch.rpcs.resume()
        if not resumed and (self._taken_over or self._is_under_way(queue)):
            self._take_over(index)
        self._live(LifeEvent.RESUME if resumed else LifeEvent.START)
        if resumed:
            self.epoch.resume()
            self.flush()

    def _is_under_way(self, queue: DeviceQueue) -> bool:
        """Whether the driver has used this ring before, with a backend that is gone."""
        packed = self.acked_features & RingFeature.RING_PACKED
        return bool(queue.recovered) or queue.next_base != (INITIAL_BASE if packed else 0)

    def _take_over(self, index: int) -> None:
        if index != Queue.EVENT:  # posted buffers are as good for this epoch's events
            self._lost.add(index)
        if not self._taken_over:
            log.info("vm %s: its driver runs on, with its state lost: epoch %#x", self.vm, self.epoch.number)
            self._taken_over = self._announce = True
            # a ring of which nothing was returned yet looks like a new one, until another one tells
            self._lost |= self._running - {Queue.EVENT}
            self.link.config_changed()

    def _abandon(self, index: int, queue: DeviceQueue) -> None:
        """Answer what the last backend had taken (all that is available, where nobody wrote that down), unrun."""
        self._lost.discard(index)
        known = self.link.tracked(index)
        for _ in range(len(queue.recovered) if known else queue.size):
            chain = queue.pop()
            if chain is None:
                break
            room = chain.writable_bytes >= RESPONSE_HEADER_SIZE
            RingSlot(self, index, chain).respond(
                *([refusal(Status.ABANDONED, ResponseFlag.MAY_HAVE_RUN)] if room else [])
            )

    def queue_stopped(self, index: int) -> None:
        self._running.discard(index)
        if index in _RPC_RINGS:
            self.epoch.rpcs.pause()
        if not self._running:
            self._live(LifeEvent.STOP)

    def _forget_driver(self) -> None:
        self._running.clear()
        self._lost.clear()
        self._taken_over = self._announce = False

    def reset(self) -> None:
        self._forget_driver()
        self._live(LifeEvent.RESET)

    def disconnected(self) -> None:
        self._connected = False
        self._forget_driver()
        log.info("vm %s: the frontend has gone", self.vm)
        if self._trace is not None:
            self._trace.mark(self.vm, "disconnected")
        self._live(LifeEvent.RESET)

    # -- rings

    def process(self, index: int) -> bool:
        queue = self.queues[index]
        if queue is None or self.life is not LifeState.RUNNING:
            return False  # when it runs again, link.wake() brings us back
        if index == Queue.EVENT:
            self._tell_epoch()
            self.epoch.rpcs.pump()
            more = False
        else:
            more = self._drain(index, queue, _BUDGET)
        if index == Queue.CONTROL and self._search:
            more |= self._go_on_searching()
        if queue.broken is not None and self._trace is not None:
            self._trace.broken(self.vm, index, queue.broken)
        self.flush()
        self.router.touched = True
        return more

    def _drain(self, index: int, queue: DeviceQueue, budget: int) -> bool:
        if index in self._lost:
            self._abandon(index, queue)
        kind = Queue.CONTROL if index == Queue.CONTROL else Queue.REQUEST

        limit, slot_of, clock, router = self._max_readable, self._slot_of[index], self._clock, self.router
        quick = kind is Queue.REQUEST
        signalled = clock()

        def take(chain: Chain) -> int | None:
            nonlocal signalled
            room = chain.writable_bytes
            if room < RESPONSE_HEADER_SIZE:
                return 0
            if chain.readable_bytes > limit:
                return self._too_large(chain)
            data = chain.read()
            epoch = self.epoch
            response: bytes | None
            outcome = epoch.invoke_at_once(data, room) if quick and not router.busy else None
            if isinstance(outcome, bytes):
                response = outcome
            else:
                response = epoch.submit(data, room, kind, chain, slot_of, outcome)
            now = clock()
            if now - signalled > _SIGNAL_S:  # of the ones before: this one is not there yet
                router.spend(now - signalled)
                signalled = now
                queue.notify()
            if response is not None:
                return chain.write(response)
            queue.spin_us = 0  # there is work
            router.serve()
            if self._completed >= _NOTIFY_EVERY:
                self.flush()
            return None

        return queue.drain(take, budget, budget)

    def look_for_requests(self) -> None:
        for index in range(Queue.REQUEST, self.num_queues):
            queue = self.queues[index]
            if queue is not None:
                # at most what a ring can hold: a driver that goes on adding does not keep us looking
                self._search[index] = queue.size
        self.link.wake(Queue.CONTROL)

    def _go_on_searching(self) -> bool:
        """Look at as many requests as one ring may have taken in a turn; whether that was not all."""
        budget = _BUDGET
        for index, left in list(self._search.items()):
            queue = self.queues[index]
            del self._search[index]
            if queue is None or queue.stopped or not self.link.enabled(index):
                continue  # it is not to be looked at
            count = min(left, budget)
            queue.spin_us = 0  # others wait to be looked at
            if self._drain(index, queue, count):
                self.link.wake(index)
                if left > count:
                    self._search[index] = left - count
            budget -= count
            if not budget:
                break
        if not self._search:
            self.epoch.searched()
        return bool(self._search)

    def _too_large(self, chain: Chain) -> int:
        """The request is not even looked at."""
        if self._trace is not None:
            self._trace.answered(self.vm, 0, Status.LIMIT)
        return chain.write(refusal(Status.LIMIT))

    def completed(self, index: int) -> None:
        """A request of ring ``index`` was completed; the driver is to be told soon."""
        self._dirty.add(index)
        self._completed += 1
        self.router.mark(self)

    def flush(self) -> None:
        """Tell the driver of what was completed."""
        if self._dirty:
            for index in self._dirty:
                queue = self.queues[index]
                if queue is not None:
                    queue.notify()
            self._dirty.clear()
            self._completed = 0

    def send_event(self, data: bytes) -> bool:
        return self._tell_epoch() and self._put_event(data)

    def _tell_epoch(self) -> bool:
        """The first event that a driver sees that runs on; False if it must wait for a buffer."""
        if self._announce:
            self._announce = not self._put_event(EVENT_HEADER.pack(Event.EPOCH, 0, self.epoch.number))
        return not self._announce

    def _put_event(self, data: bytes) -> bool:
        queue = self.queues[Queue.EVENT]
        if queue is None or queue.stopped or not self.link.enabled(Queue.EVENT):
            return False
        for _ in range(queue.size):
            chain = queue.pop()
            if chain is None:
                if not queue.enable_notifications():
                    return False
                continue
            fits = chain.writable_bytes >= self.limits.event_buffer_size and not chain.readable_bytes
            queue.push(chain.head, chain.write(data) if fits else 0)
            self.completed(Queue.EVENT)
            if fits:
                return True
            log.warning(
                "vm %s: an event buffer of %d bytes is not usable and given back unused; the guest's driver must post "
                "writable buffers of event_buffer_size (%d) bytes: update it",
                *(self.vm, chain.writable_bytes, self.limits.event_buffer_size),
            )
        return False

    def fail(self, why: str) -> None:
        self.link.close(why)

    def views(self, ranges: Sequence[tuple[int, int]]) -> tuple[list[memoryview], Leased]:
        lease = self.memory.lease(*ranges)
        return [view for pieces in lease.views for view in pieces], lease


class RingSlot:
    """A request's place in a ring."""

    __slots__ = ("_chain", "_device", "_index")

    def __init__(self, device: TeeDevice, index: int, chain: Chain) -> None:
        self._device = device
        self._index = index
        self._chain = chain

    def respond(self, *parts: bytes | bytearray | memoryview) -> bool:
        """See :class:`host_backend.slots.Slot`."""
        queue = self._device.queues[self._index]
        if queue is None or queue.stopped:
            return False
        queue.push(self._chain.head, self._chain.write(b"".join(parts)))
        self._device.completed(self._index)
        return True
