"""What ``bench ffa`` measures: null invokes over the model and without it, MEM_SHARE, and the fuzzer."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from statistics import median

from ffa.abi.ids import ATTRIBUTES_NORMAL, PAGE_SIZE, Call, Data, permissions
from ffa.abi.transactions import Receiver, Transaction
from ffa.fuzz import WORLDS, Fuzzer
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import Machine
from ffa.roles.spmc import Spmc
from guest_driver.client import Context
from tee.calls import Call as TeeCall
from tee.calls import Invoke, OpenContext, OpenSession
from tee.driver import Done, Event, InvokesAtOnce, TeeDriver
from tee.io.runtime import TeeRuntime
from tee.results import Origin, Result
from tee.soft.driver import SoftTee
from tee.soft.examples import UUIDS, built_in
from virtio_tee.bench.plan import NULL
from virtio_tee.ffa_vm import PARTITION, VM, VM_MEMORY, ffa_driver

PROBE = UUIDS["probe"]
_WELL = Result.SUCCESS, Origin.TRUSTED_APP


class WrongAnswerError(Exception):
    """What is measured does not do what it is to do."""


def soft_tee() -> SoftTee:
    """A software TEE with the probe TA."""
    return SoftTee(clock=time.monotonic, random=secrets.token_bytes, built_in=built_in("probe"))


DRIVERS: dict[str, Callable[[], TeeDriver]] = {"direct": soft_tee, "ffa": lambda: ffa_driver(soft_tee())}
"""The two ways: the software TEE itself, and the same behind driver, hypervisor, SPMC and OP-TEE's partition."""


def by_client_api(stack: ExitStack, driver: TeeDriver) -> Callable[[], None]:
    """A null invoke by ``Session.invoke`` of the client API, as applications and the demo do it."""
    runtime = stack.enter_context(TeeRuntime(driver))
    session = stack.enter_context(stack.enter_context(Context(runtime)).open_session(PROBE))
    return lambda: (session.invoke(NULL), None)[1]


class _Driven:
    """A driver with a session of the probe TA, run on this thread."""

    def __init__(self, driver: TeeDriver) -> None:
        self.driver = driver
        self.events: list[Event] = []
        driver.attach(self.events.append)
        self.session = self.call(OpenSession(context=self.call(OpenContext()), uuid=PROBE))

    def call(self, call: TeeCall) -> object:
        """Starts a call and runs the driver until its end. Raises WrongAnswerError."""
        self.driver.start(call)
        while not self.events:
            self.driver.run()
        done = self.events.pop()
        if not isinstance(done, Done) or done.code != Result.SUCCESS:
            raise WrongAnswerError(f"the TEE said {done}")
        return done.value


def by_driver(stack: ExitStack, driver: TeeDriver) -> Callable[[], None]:
    """A null invoke from ``start`` to its Done: the contract of every TeeDriver, without threads."""
    driven = _Driven(driver)

    def invoke() -> None:
        driven.call(Invoke(session=driven.session, func=NULL))

    return invoke


def at_once(stack: ExitStack, driver: TeeDriver) -> Callable[[], None]:
    """A null invoke by ``invoke_at_once``, which the device and OP-TEE's partition use."""
    driven = _Driven(driver)
    assert isinstance(driver, InvokesAtOnce)
    invoke_at_once, session = driver.invoke_at_once, driven.session

    def invoke() -> None:
        outcome = invoke_at_once(session, NULL, ())
        if outcome != _WELL:
            raise WrongAnswerError(f"the TEE said {outcome}")
        driver.run()

    return invoke


LEVELS = {"client-api": by_client_api, "driver": by_driver, "at-once": at_once}
"""Where the caller stands: the same for both ways."""


def latency_us(invoke: Callable[[], None], seconds: float) -> float:
    """The median, as the caller sees it."""
    samples: list[int] = []
    clock = time.perf_counter_ns
    before = clock()
    end = before + int(seconds * 1e9)
    while before < end:
        invoke()
        after = clock()
        samples.append(after - before)
        before = clock()
    return median(samples) / 1e3


def share_s(pages: int) -> float:
    """Seconds of CPU time of one MEM_SHARE of so many pages, no two of which touch, to a partition: the VM's driver,
    hypervisor and SPMC, in fragments of 64 KiB. Raises WrongAnswerError."""
    buffer_pages, first = 16, 64
    machine = Machine()
    spmc = Spmc(machine)
    spmc.add(Endpoint(PARTITION, machine))
    vm = Endpoint(VM, machine)
    Hypervisor(machine, spmc).add(vm)
    machine.add(VM, VM_MEMORY, first + 2 * pages)
    vm.map_buffers(VM_MEMORY, VM_MEMORY + buffer_pages * PAGE_SIZE, buffer_pages)
    ranges = [(VM_MEMORY + (first + 2 * n) * PAGE_SIZE, 1) for n in range(pages)]
    transaction = Transaction(VM, (Receiver(PARTITION, permissions(Data.RW)),), ATTRIBUTES_NORMAL)
    start = time.process_time()
    answer = vm.send_memory(Call.MEM_SHARE, transaction, ranges)
    took = time.process_time() - start
    if not answer.ok or len(machine.states) < pages:
        raise WrongAnswerError(f"FFA_MEM_SHARE is answered with {answer!r}")
    return took


def fuzz_s(calls: int, seed: int) -> float:
    """Seconds of CPU time of ``calls`` fuzz calls over all worlds, each call held against the account of every page.
    Raises InvariantError."""
    start = time.process_time()
    for world in WORLDS:
        Fuzzer(seed, world).run(max(calls // len(WORLDS), 1))
    return time.process_time() - start


def pairs(stack: ExitStack) -> Iterator[tuple[str, Callable[[], None], Callable[[], None]]]:
    """Each level with its null invoke, direct and over FF-A."""
    for name, level in LEVELS.items():
        direct, ffa = (level(stack, make()) for make in DRIVERS.values())
        yield name, direct, ffa
