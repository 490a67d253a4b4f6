"""Calls about services and server enclaves as the device's requests: which request, and the fields of its body."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from device.wire import Request
from tee.services import (
    NAME_SIZE,
    AcquireEnclave,
    AttestService,
    CallEnclave,
    CreateEnclave,
    DestroyEnclave,
    ListServices,
    LoadService,
    ReleaseEnclave,
    RemoveService,
    RunTask,
    ServiceCall,
)

MAX_LISTED = 1024
"""Most services that are asked for in one request."""


@dataclass(frozen=True, slots=True)
class ServiceRequest:
    """What a call becomes. ``handle`` names the field of the call that holds an enclave or server, and that of the body
    for its id."""

    request: Request
    fields: Callable[[Any], dict[str, object]]
    handle: str = ""
    params: bool = True


SERVICE_REQUESTS: dict[type[ServiceCall], ServiceRequest] = {
    ListServices: ServiceRequest(
        Request.SERVICE_LIST,
        lambda call: {"first": call.first, "max_entries": min(call.max_entries, MAX_LISTED)},
        params=False,
    ),
    LoadService: ServiceRequest(Request.SERVICE_LOAD, lambda call: {}),
    RemoveService: ServiceRequest(Request.SERVICE_REMOVE, lambda call: {"uuid": call.uuid.bytes}, params=False),
    RunTask: ServiceRequest(
        Request.SERVICE_TASK,
        lambda call: {
            "uuid": call.uuid.bytes,
            "client_uuid": call.client.uuid.bytes,
            "client_login": call.client.login,
            "func": call.func,
        },
    ),
    AttestService: ServiceRequest(Request.SERVICE_ATTEST, lambda call: {"uuid": call.uuid.bytes, "nonce": call.nonce}),
    CreateEnclave: ServiceRequest(
        Request.ENCLAVE_CREATE,
        lambda call: {"uuid": call.uuid.bytes, "name": call.name.ljust(NAME_SIZE, b"\0"), "flags": call.flags},
        params=False,
    ),
    DestroyEnclave: ServiceRequest(Request.ENCLAVE_DESTROY, lambda call: {}, "enclave", params=False),
    AcquireEnclave: ServiceRequest(
        Request.ENCLAVE_ACQUIRE, lambda call: {"name": call.name.ljust(NAME_SIZE, b"\0")}, params=False
    ),
    ReleaseEnclave: ServiceRequest(Request.ENCLAVE_RELEASE, lambda call: {}, "server", params=False),
    CallEnclave: ServiceRequest(Request.ENCLAVE_CALL, lambda call: {"regs": tuple(call.regs)}, "server"),
}
"""Type of call → its request."""

TAKES = {
    Request.OPEN_SESSION: Request.OPEN_SESSION,
    Request.SERVICE_TASK: Request.OPEN_SESSION,
    Request.ENCLAVE_CREATE: Request.OPEN_SESSION,
    Request.ENCLAVE_ACQUIRE: Request.OPEN_SESSION,
    Request.OPEN_CONTEXT: Request.OPEN_CONTEXT,
}
"""Requests that take one of what a limit is for → the one that stands for that limit."""

GIVES_BACK = frozenset({Request.CLOSE_SESSION, Request.ENCLAVE_DESTROY, Request.ENCLAVE_RELEASE})
"""Requests that end a session, an enclave or a server."""
