"""The backend's process: sockets on trio, all guests' rings and the TEE on one data-plane thread."""

from __future__ import annotations

import logging
import secrets
import signal
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import trio

from device.config import Limits
from host_backend.device import TeeDevice
from host_backend.exporter import Place, export, listen
from host_backend.metrics import Metrics
from host_backend.router import Router
from host_backend.trace import Recorder, Recorders
from pyvhost.device import SPIN_US
from pyvhost.io.dataplane import DataPlane
from pyvhost.io.server import serve as serve_socket
from pyvhost.io.sockets import Listener
from tee.driver import TeeDriver

log = logging.getLogger(__name__)

MAX_REQUEST_QUEUES = 64

SWITCH_INTERVAL = 0.0001
"""Seconds after which the control plane lets the data plane run, where metrics are asked for."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where one guest's frontend attaches: a path to listen at, or an inherited fd (listening or connected)."""

    vm: str
    path: str | None = None
    fd: int | None = None
    ffa_vm: int | None = None
    """The guest's FF-A endpoint, if the TEE takes memory that it shares."""


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """What to serve. Raises ValueError for what makes no sense."""

    endpoints: Sequence[Endpoint]
    limits: Limits = field(default_factory=Limits)
    request_queues: int = 1
    require_sealed: bool = False
    metrics: Place | None = None
    """Where to tell metrics."""
    spin_us: int = SPIN_US
    """See ``pyvhost.Device.spin_us``."""

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("nothing to serve: give a socket path or a file descriptor")
        if not 1 <= self.request_queues <= MAX_REQUEST_QUEUES:
            raise ValueError(f"request queues: 1 to {MAX_REQUEST_QUEUES}")
        self.limits.check()
        names = [e.vm for e in self.endpoints]
        if len(set(names)) != len(names):
            raise ValueError("two sockets have the same VM name")


async def serve(
    tee: TeeDriver, config: ServeConfig, *, trace: Recorder | None = None, ready: Callable[[], None] = lambda: None
) -> None:
    """Serve until SIGTERM or SIGINT; ``ready`` is called when all sockets can be connected to. Raises OSError."""
    router = Router(tee, time.monotonic)
    metrics = Metrics() if config.metrics is not None else None
    if metrics is not None:
        trace = Recorders(trace, metrics) if trace is not None else metrics
    router.trace = trace
    devices: list[TeeDevice] = []
    with ExitStack() as stack:
        listeners = [stack.enter_context(_listen(endpoint)) for endpoint in config.endpoints]
        exporter = stack.enter_context(listen(config.metrics)) if config.metrics is not None else None
        dataplane = stack.enter_context(DataPlane("virtio-tee"))
        dataplane.post(lambda: attach(dataplane, router))
        async with trio.open_nursery() as nursery:
            await nursery.start(_until_signal, nursery.cancel_scope)
            async with trio.open_nursery() as guests:
                for endpoint, listener in zip(config.endpoints, listeners, strict=True):
                    device = TeeDevice(
                        router,
                        vm=endpoint.vm,
                        limits=config.limits,
                        request_queues=config.request_queues,
                        clock=time.monotonic,
                        new_epoch=lambda: secrets.randbits(64),
                        trace=trace,
                        ffa_vm=endpoint.ffa_vm,
                    )
                    device.spin_us = config.spin_us
                    devices.append(device)
                    guests.start_soon(_serve_one, device, listener, dataplane, config.require_sealed)
                if metrics is not None and exporter is not None:
                    metrics.watch(tee, devices)
                    # while metrics are made into text the data plane shall not wait for its turn
                    sys.setswitchinterval(SWITCH_INTERVAL)
                    nursery.start_soon(export, exporter, metrics.render)
                ready()
            # only connected sockets come to an end: all their frontends have gone
            nursery.cancel_scope.cancel()


def _listen(endpoint: Endpoint) -> Listener:
    try:
        if endpoint.path is not None:
            return Listener.at_path(endpoint.path)
        assert endpoint.fd is not None
        return Listener.from_fd(endpoint.fd)
    except (ValueError, OSError) as e:
        where = endpoint.path if endpoint.path is not None else f"fd {endpoint.fd}"
        why = e.strerror if isinstance(e, OSError) and e.strerror else str(e)
        raise OSError(why if where in why else f"{where}: {why}") from None


def attach(dataplane: DataPlane, router: Router) -> None:
    """Have the router's TEE run on the data-plane thread, which is to be the caller's."""
    dataplane.add_runner(router)
    fd = router.tee.fileno()
    if fd is not None:
        dataplane.watch(fd, router.touch)


async def _serve_one(device: TeeDevice, listener: Listener, dataplane: DataPlane, require_sealed: bool) -> None:
    log.info("vm %s: waiting for a frontend", device.vm)
    await serve_socket(device, listener, dataplane, require_sealed=require_sealed)


async def _until_signal(
    everything: trio.CancelScope, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        task_status.started()
        async for number in signals:
            log.info("ending on %s", signal.Signals(number).name)
            everything.cancel()
            return
