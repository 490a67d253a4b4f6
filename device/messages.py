"""The tables of requests, responses and events: which layout, which queue, which feature; and their fast codecs.

The specification's tables, ``virtio-tee decode``, the backend and the guest driver all read these tables.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

import construct

from device import wire
from device.wire import Event, Feature, Queue, Request
from pyvhost.codec import Codec

NO_FEATURE = Feature(0)


class Tail(Enum):
    """What follows a fixed body, as often as a field of the body says."""

    NONE = "nothing"
    PARAMS = "parameters"
    RANGES = "ranges"
    ENTRIES = "service entries"


@dataclass(frozen=True, slots=True)
class Body:
    """A fixed part and its tail. ``count`` names the field of the fixed part that counts the tail's elements."""

    codec: Codec
    tail: Tail = Tail.NONE
    count: str = ""


@dataclass(frozen=True, slots=True)
class RequestType:
    """One kind of request: its body, its response's body (None: the header alone), and what it takes to be allowed."""

    body: Body
    response: Body | None
    queue: Queue = Queue.REQUEST
    feature: Feature = NO_FEATURE
    context: bool = True
    """Whether the header must name an open context (otherwise it must be 0)."""


def _codec(definition: Any, name: str) -> Codec:
    return Codec(name, definition)


CONFIG = _codec(wire.Config, "Config")
REQUEST_HEADER = _codec(wire.RequestHeader, "RequestHeader")
RESPONSE_HEADER = _codec(wire.ResponseHeader, "ResponseHeader")
EVENT_HEADER = _codec(wire.EventHeader, "EventHeader")
PARAM = _codec(wire.Param, "Param")
RANGE = _codec(wire.MemoryRange, "MemoryRange")
SERVICE_ENTRY = _codec(wire.ServiceEntry, "ServiceEntry")

TAIL_ELEMENT = {Tail.PARAMS: PARAM, Tail.RANGES: RANGE, Tail.ENTRIES: SERVICE_ENTRY}


def _plain(definition: Any, name: str) -> Body:
    return Body(_codec(definition, name))


def _params(definition: Any, name: str) -> Body:
    return Body(_codec(definition, name), Tail.PARAMS, "num_params")


REQUESTS: dict[int, RequestType] = {
    Request.OPEN_CONTEXT: RequestType(
        _plain(wire.OpenContext, "OpenContext"),
        _plain(wire.OpenContextResponse, "OpenContextResponse"),
        context=False,
    ),
    Request.CLOSE_CONTEXT: RequestType(Body(Codec("CloseContext", construct.Struct())), None),
    Request.OPEN_SESSION: RequestType(
        _params(wire.OpenSession, "OpenSession"), _params(wire.OpenSessionResponse, "OpenSessionResponse")
    ),
    Request.CLOSE_SESSION: RequestType(_plain(wire.CloseSession, "CloseSession"), None),
    Request.INVOKE: RequestType(_params(wire.Invoke, "Invoke"), _params(wire.InvokeResponse, "InvokeResponse")),
    Request.REGISTER_MEMORY: RequestType(
        Body(_codec(wire.RegisterMemory, "RegisterMemory"), Tail.RANGES, "num_ranges"),
        _plain(wire.RegisterResponse, "RegisterResponse"),
    ),
    Request.REGISTER_FFA: RequestType(
        _plain(wire.RegisterFfa, "RegisterFfa"),
        _plain(wire.RegisterResponse, "RegisterResponse"),
        feature=Feature.FFA_HANDLE,
    ),
    Request.UNREGISTER_MEMORY: RequestType(_plain(wire.UnregisterMemory, "UnregisterMemory"), None),
    Request.SERVICE_LIST: RequestType(
        _plain(wire.ServiceList, "ServiceList"),
        Body(_codec(wire.ServiceListResponse, "ServiceListResponse"), Tail.ENTRIES, "count"),
        feature=Feature.SERVICES,
    ),
    Request.SERVICE_LOAD: RequestType(
        _params(wire.ServiceLoad, "ServiceLoad"),
        _params(wire.ServiceLoadResponse, "ServiceLoadResponse"),
        feature=Feature.SERVICES,
    ),
    Request.SERVICE_REMOVE: RequestType(_plain(wire.ServiceRemove, "ServiceRemove"), None, feature=Feature.SERVICES),
    Request.SERVICE_TASK: RequestType(
        _params(wire.ServiceTask, "ServiceTask"),
        _params(wire.InvokeResponse, "InvokeResponse"),
        feature=Feature.SERVICES,
    ),
    Request.SERVICE_ATTEST: RequestType(
        _params(wire.ServiceAttest, "ServiceAttest"),
        _params(wire.InvokeResponse, "InvokeResponse"),
        feature=Feature.ATTESTATION,
    ),
    Request.ENCLAVE_CREATE: RequestType(
        _plain(wire.EnclaveCreate, "EnclaveCreate"),
        _plain(wire.EnclaveCreateResponse, "EnclaveCreateResponse"),
        feature=Feature.ENCLAVES,
    ),
    Request.ENCLAVE_DESTROY: RequestType(_plain(wire.EnclaveDestroy, "EnclaveDestroy"), None, feature=Feature.ENCLAVES),
    Request.ENCLAVE_ACQUIRE: RequestType(
        _plain(wire.EnclaveAcquire, "EnclaveAcquire"),
        _plain(wire.EnclaveAcquireResponse, "EnclaveAcquireResponse"),
        feature=Feature.ENCLAVES,
    ),
    Request.ENCLAVE_RELEASE: RequestType(_plain(wire.EnclaveRelease, "EnclaveRelease"), None, feature=Feature.ENCLAVES),
    Request.ENCLAVE_CALL: RequestType(
        _params(wire.EnclaveCall, "EnclaveCall"),
        _params(wire.EnclaveCallResponse, "EnclaveCallResponse"),
        feature=Feature.ENCLAVES,
    ),
    Request.CANCEL: RequestType(_plain(wire.Cancel, "Cancel"), None, queue=Queue.CONTROL),
    Request.RPC_REPLY: RequestType(
        _params(wire.RpcReply, "RpcReply"), None, queue=Queue.CONTROL, feature=Feature.RPC, context=False
    ),
    Request.RPC_WITHDRAWN_ACK: RequestType(
        _plain(wire.RpcWithdrawnAck, "RpcWithdrawnAck"),
        None,
        queue=Queue.CONTROL,
        feature=Feature.RPC,
        context=False,
    ),
}
"""Request type number → its layout."""

CALLS = frozenset(
    {
        Request.OPEN_SESSION,
        Request.INVOKE,
        Request.SERVICE_LOAD,
        Request.SERVICE_TASK,
        Request.SERVICE_ATTEST,
        Request.ENCLAVE_CREATE,
        Request.ENCLAVE_CALL,
    }
)
"""Requests that run code in the TEE: they count against ``max_calls`` and can be cancelled. Those that only end or
register something do not, so that a guest at its limit can still clean up and answer an RPC that asks for memory."""

EVENTS: dict[int, Body] = {
    Event.RPC: _params(wire.RpcEvent, "RpcEvent"),
    Event.RPC_WITHDRAWN: _plain(wire.RpcWithdrawnEvent, "RpcWithdrawnEvent"),
    Event.NOTIFICATION: _plain(wire.NotificationEvent, "NotificationEvent"),
    Event.EPOCH: Body(Codec("EpochEvent", construct.Struct())),
}
"""Event type number → its layout."""
