"""Requests about services and server enclaves: each becomes a call of :mod:`tee.services`, and its end a response."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING
from uuid import UUID

from device.messages import REQUESTS
from device.params import RequestError
from device.requests import ParsedRequest
from device.wire import PARAM_META, PARAM_TYPE_MASK, Feature, ParamType, Request, Status
from host_backend.answers import add, ids, outputs
from host_backend.slots import Slot
from host_backend.tables import EnclaveEntry, Pending, ServerEntry, SessionEntry
from tee.calls import Client, Login
from tee.driver import Done
from tee.results import Result
from tee.services import (
    AcquireEnclave,
    AttestService,
    CallEnclave,
    CallReturn,
    CreateEnclave,
    DestroyEnclave,
    ListServices,
    Loaded,
    LoadService,
    Refusal,
    ReleaseEnclave,
    RemoveService,
    RunTask,
    ServiceCall,
    ServiceList,
)

if TYPE_CHECKING:
    from host_backend.epoch import Epoch

FEATURES = Feature.SERVICES | Feature.ATTESTATION | Feature.ENCLAVES

STATUSES: dict[Refusal, Status] = {
    Refusal.MALFORMED: Status.MALFORMED,
    Refusal.NO_SESSION: Status.NO_SESSION,
    Refusal.LIMIT: Status.LIMIT,
    Refusal.NOT_FOUND: Status.NOT_FOUND,
    Refusal.DENIED: Status.DENIED,
    Refusal.IN_USE: Status.IN_USE,
}
"""What the TEE refuses, as a status."""

_SHAPES: dict[int, tuple[tuple[int, ...], ...]] = {
    Request.SERVICE_LOAD: ((ParamType.MEMREF_IN,),),
    Request.SERVICE_ATTEST: ((ParamType.MEMREF_OUT,),),
    Request.ENCLAVE_CALL: ((), (ParamType.MEMREF_INOUT,)),
}
"""Which parameters a request may have, where not any."""


def _check_shape(request: ParsedRequest) -> None:
    kinds = tuple(attr & (PARAM_TYPE_MASK | PARAM_META) for attr, *_ in request.params)
    if kinds not in _SHAPES[request.type]:
        raise RequestError(Status.MALFORMED, f"{len(kinds)} parameters, or of types that do not belong here")


def service_list(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """SERVICE_LIST."""
    context, body = epoch.context_of(request), request.body
    epoch.admit(request)
    pending = Pending(epoch, slot, request, context, _listed)
    call = ListServices(owner=pending, context=context.handle, first=body.first, max_entries=body.max_entries)
    epoch.begin(pending, call)


def _listed(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    if not isinstance(done.value, ServiceList):
        return (ids(0),)
    found = done.value
    return (ids(found.total, len(found.entries)), *(entry.pack() for entry in found.entries))


def service_load(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """SERVICE_LOAD."""
    _check_shape(request)
    context = epoch.context_of(request)
    params, regions = epoch.params_of(request.params, request.data, request.inline_at, context)
    epoch.admit(request)
    pending = Pending(epoch, slot, request, context, _loaded, regions=regions)
    epoch.begin(pending, LoadService(owner=pending, context=context.handle, params=params))


def _loaded(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    loaded = done.value if isinstance(done.value, Loaded) else Loaded(UUID(int=0), 0)
    head = loaded.uuid.bytes + ids(loaded.version, len(pending.request.params))
    return (head, *_outputs(pending, done))


def service_remove(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """SERVICE_REMOVE."""
    context = epoch.context_of(request)
    epoch.admit(request)
    pending = Pending(epoch, slot, request, context, _nothing)
    call = RemoveService(owner=pending, context=context.handle, uuid=UUID(bytes=request.body.uuid))
    epoch.begin(pending, call)


def service_task(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """SERVICE_TASK."""
    context, body = epoch.context_of(request), request.body
    epoch.check_login(body.client_login)
    params, regions = epoch.params_of(request.params, request.data, request.inline_at, context)
    epoch.admit(request)
    session = SessionEntry(context)
    session.ident = add(epoch.sessions, session, "sessions")
    pending = Pending(epoch, slot, request, context, _task_done, session=session, regions=regions)
    octets = bytes(16) if body.client_login == Login.PUBLIC else body.client_uuid
    call = RunTask(
        owner=pending,
        context=context.handle,
        uuid=UUID(bytes=body.uuid),
        func=body.func,
        client=Client(body.client_login, UUID(bytes=octets), epoch.vm),
        params=params,
    )
    epoch.begin(pending, call)


def _task_done(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    _forget(epoch, pending)
    return _with_params(epoch, pending, done)


def service_attest(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """SERVICE_ATTEST."""
    _check_shape(request)
    context, body = epoch.context_of(request), request.body
    params, regions = epoch.params_of(request.params, request.data, request.inline_at, context)
    epoch.admit(request)
    pending = Pending(epoch, slot, request, context, _with_params, regions=regions)
    uuid = UUID(bytes=body.uuid)
    call = AttestService(owner=pending, context=context.handle, uuid=uuid, nonce=body.nonce, params=params)
    epoch.begin(pending, call)


def _with_params(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    return (ids(len(pending.request.params)), *_outputs(pending, done))


def enclave_create(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """ENCLAVE_CREATE."""
    context, body = epoch.context_of(request), request.body
    epoch.admit(request)
    pending = _opening(epoch, slot, request, EnclaveEntry(context))
    uuid = UUID(bytes=body.uuid)
    call = CreateEnclave(owner=pending, context=context.handle, uuid=uuid, name=body.name, flags=body.flags)
    epoch.begin(pending, call)


def enclave_acquire(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """ENCLAVE_ACQUIRE."""
    context = epoch.context_of(request)
    epoch.admit(request)
    pending = _opening(epoch, slot, request, ServerEntry(context))
    epoch.begin(pending, AcquireEnclave(owner=pending, context=context.handle, name=request.body.name))


def _opening(epoch: Epoch, slot: Slot, request: ParsedRequest, entry: SessionEntry) -> Pending:
    entry.ident = add(epoch.sessions, entry, "sessions, enclaves and servers")
    return Pending(epoch, slot, request, entry.context, _opened, session=entry)


def _opened(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    entry = pending.session
    assert entry is not None
    if done.code != Result.SUCCESS:
        _forget(epoch, pending)
        return (ids(0),)
    entry.handle = done.value
    return (ids(entry.ident),)


def enclave_destroy(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """ENCLAVE_DESTROY."""
    context = epoch.context_of(request)
    entry = epoch.session_of(context, request.body.enclave, EnclaveEntry)
    pending = _closing(epoch, slot, request, entry)
    epoch.begin(pending, DestroyEnclave(owner=pending, context=context.handle, enclave=entry.handle))


def enclave_release(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """ENCLAVE_RELEASE."""
    context = epoch.context_of(request)
    entry = epoch.session_of(context, request.body.server, ServerEntry)
    pending = _closing(epoch, slot, request, entry)
    epoch.begin(pending, ReleaseEnclave(owner=pending, context=context.handle, server=entry.handle))


def _closing(epoch: Epoch, slot: Slot, request: ParsedRequest, entry: SessionEntry) -> Pending:
    epoch.admit(request)
    entry.closing = True
    epoch.rpcs.hurry(session=entry)
    return Pending(epoch, slot, request, entry.context, _closed, session=entry)


def _closed(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    _forget(epoch, pending)
    return ()


def enclave_call(epoch: Epoch, slot: Slot, request: ParsedRequest) -> None:
    """ENCLAVE_CALL."""
    _check_shape(request)
    context, body = epoch.context_of(request), request.body
    server = epoch.session_of(context, body.server, ServerEntry)
    params, regions = epoch.params_of(request.params, request.data, request.inline_at, context)
    epoch.admit(request)
    pending = Pending(epoch, slot, request, context, _called, session=server, regions=regions)
    call = CallEnclave(
        owner=pending, context=context.handle, server=server.handle, regs=tuple(body.regs), params=params
    )
    epoch.begin(pending, call)


def _called(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    given = done.value if isinstance(done.value, CallReturn) else CallReturn()
    head = _CALL_RESPONSE.pack(
        value=given.value, offset=given.offset, size=given.size, num_params=len(pending.request.params)
    )
    return (head, *_outputs(pending, done))


def _nothing(epoch: Epoch, pending: Pending, done: Done) -> tuple[bytes, ...]:
    return ()


def _forget(epoch: Epoch, pending: Pending) -> None:
    assert pending.session is not None
    if pending.session.ident in epoch.sessions:
        epoch.sessions.remove(pending.session.ident)


def _outputs(pending: Pending, done: Done) -> list[bytes]:
    assert isinstance(pending.call, ServiceCall)
    return outputs(pending.request.params, pending.call.params, done.code)


_response = REQUESTS[Request.ENCLAVE_CALL].response
assert _response is not None
_CALL_RESPONSE = _response.codec

HANDLERS: dict[int, Callable[[Epoch, Slot, ParsedRequest], None]] = {
    Request.SERVICE_LIST: service_list,
    Request.SERVICE_LOAD: service_load,
    Request.SERVICE_REMOVE: service_remove,
    Request.SERVICE_TASK: service_task,
    Request.SERVICE_ATTEST: service_attest,
    Request.ENCLAVE_CREATE: enclave_create,
    Request.ENCLAVE_DESTROY: enclave_destroy,
    Request.ENCLAVE_ACQUIRE: enclave_acquire,
    Request.ENCLAVE_RELEASE: enclave_release,
    Request.ENCLAVE_CALL: enclave_call,
}
"""Request type → what serves it."""
