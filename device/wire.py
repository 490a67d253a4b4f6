"""Every wire layout of the virtio-tee device, as construct definitions: the single definition of each.

The tables of ``docs/specification.md`` are generated from here (``make docs``), the data plane's codecs too
(:mod:`device.messages`). All integers are little-endian. Sections named below are those of that document.
"""

from enum import Enum, IntEnum, IntFlag

from construct import Bytes, Const, Int16ul, Int32ul, Int64ul, Struct

from pyvhost.codec import Reserved
from tee import attestation, services
from tee.results import Result
from tee.rpc import RpcCommand

DEVICE_ID = 46
"""The virtio device ID ("TEE device"; reserved in virtio 1.4)."""

SPEC_VERSION = (0, 1)
"""Major and minor version of the specification that these layouts follow."""

MAGIC = 0x45455456
"""``VTEE`` in the first four bytes of the config space: another vendor's device may use ID 46 too."""


class Queue(IntEnum):
    """Virtqueue numbers; request queues are REQUEST and all after it."""

    CONTROL = 0
    EVENT = 1
    REQUEST = 2


QUEUE_DOCS = {
    Queue.CONTROL: "what must never wait for the TEE: cancelling a request, answering an RPC",
    Queue.EVENT: "buffers that the driver posts and the device fills with events",
    Queue.REQUEST: "every other request; this queue and all after it, `num_request_queues` in all",
}


class Feature(IntFlag):
    """Device-specific feature bits."""

    INLINE = 1 << 0
    RPC = 1 << 1
    NOTIFICATION = 1 << 2
    FFA_HANDLE = 1 << 3
    OCALL = 1 << 4
    SERVICES = 1 << 5
    ATTESTATION = 1 << 6
    ENCLAVES = 1 << 7


FEATURE_DOCS = {
    Feature.INLINE: "Memory references may carry their bytes inside the request.",
    Feature.RPC: "The device sends RPCs to the driver, which hands them to the guest's supplicant.",
    Feature.NOTIFICATION: "The device forwards the TEE's asynchronous notifications.",
    Feature.FFA_HANDLE: "Memory can be registered by a 64-bit FF-A handle.",
    Feature.OCALL: "A TA can call the client that called it. Requires RPC.",
    Feature.SERVICES: "Services can be listed, loaded, removed, and called in one shot.",
    Feature.ATTESTATION: "Attestation of services. Requires SERVICES.",
    Feature.ENCLAVES: "Server enclaves. Requires SERVICES.",
}

FEATURE_NEEDS = {
    Feature.OCALL: Feature.RPC,
    Feature.ATTESTATION: Feature.SERVICES,
    Feature.ENCLAVES: Feature.SERVICES,
}
"""Feature → the feature without which it is nothing (DEV-FEA-3, DRV-FEA-2)."""


def only_usable(features: int) -> int:
    """``features`` (any feature bits) without those of this device that lack what they need."""
    for feature, needed in FEATURE_NEEDS.items():
        if not features & needed:
            features &= ~int(feature)
    return features


Config = Struct(
    "magic" / Const(MAGIC, Int32ul) * "0x45455456, the bytes `VTEE`",
    "version_major"
    / Int16ul
    * "major version of the specification; a driver that does not know it does not use the device",
    "version_minor" / Int16ul * "minor version",
    "epoch" / Int64ul * "names one life of the guest's state in the device; never 0",
    "tee_kind" / Int32ul * "what stands behind the device: 1 software TEE, 2 Linux TEE device, 3 OP-TEE over FF-A",
    "tee_impl_id" / Int32ul * "implementation id of the TEE, as TEE_IOC_VERSION reports it",
    "tee_impl_caps" / Int32ul * "implementation capabilities, likewise",
    "tee_gen_caps" / Int32ul * "generic capabilities, likewise",
    "num_request_queues" / Int32ul * "request queues that the device has: queues 2 to this number + 1; at least 1",
    "num_event_buffers" / Int32ul * "event buffers that the driver keeps posted",
    "event_buffer_size" / Int32ul * "least bytes of an event buffer",
    "max_params" / Int32ul * "most parameters of one request or RPC",
    "max_contexts" / Int32ul * "most contexts open at a time",
    "max_sessions" / Int32ul * "most sessions open at a time",
    "max_regions" / Int32ul * "most memory regions registered at a time",
    "max_region_ranges" / Int32ul * "most address ranges of one region",
    "max_region_bytes" / Int64ul * "most bytes in all regions together",
    "max_calls" / Int32ul * "most calls (requests that run code in the TEE) in progress at a time",
    "max_rpcs" / Int32ul * "most RPCs outstanding at a time",
    "max_inline_bytes" / Int32ul * "most bytes of inline memory in one request, and in its response",
    "max_request_bytes" / Int32ul * "most device-readable bytes of one request without its inline memory",
    "rpc_deadline_ms"
    / Int32ul
    * "milliseconds within which an RPC is to be answered, unless its event says otherwise; not 0",
    Reserved(36),
)

# -- requests (request queues and control queue)


class Request(IntEnum):
    """Request types."""

    OPEN_CONTEXT = 0x0001
    CLOSE_CONTEXT = 0x0002
    OPEN_SESSION = 0x0010
    CLOSE_SESSION = 0x0011
    INVOKE = 0x0012
    REGISTER_MEMORY = 0x0020
    REGISTER_FFA = 0x0021
    UNREGISTER_MEMORY = 0x0022
    SERVICE_LIST = 0x0040
    SERVICE_LOAD = 0x0041
    SERVICE_REMOVE = 0x0042
    SERVICE_TASK = 0x0043
    SERVICE_ATTEST = 0x0044
    ENCLAVE_CREATE = 0x0060
    ENCLAVE_DESTROY = 0x0061
    ENCLAVE_ACQUIRE = 0x0062
    ENCLAVE_RELEASE = 0x0063
    ENCLAVE_CALL = 0x0064
    CANCEL = 0x0100
    RPC_REPLY = 0x0101
    RPC_WITHDRAWN_ACK = 0x0102


REQUEST_DOCS = {
    Request.OPEN_CONTEXT: "connect a client to the TEE",
    Request.CLOSE_CONTEXT: "end a context and everything under it",
    Request.OPEN_SESSION: "open a session with a TA",
    Request.CLOSE_SESSION: "end a session",
    Request.INVOKE: "have a TA run a command",
    Request.REGISTER_MEMORY: "share guest memory by its addresses",
    Request.REGISTER_FFA: "name memory that the guest has shared with the TEE by FF-A",
    Request.UNREGISTER_MEMORY: "end a registration",
    Request.SERVICE_LIST: "list the services that this guest can use",
    Request.SERVICE_LOAD: "install a service from a signed package",
    Request.SERVICE_REMOVE: "remove a service that this guest installed",
    Request.SERVICE_TASK: "open a session, invoke and close it, in one request",
    Request.SERVICE_ATTEST: "get a signed statement about a service",
    Request.ENCLAVE_CREATE: "create a server enclave with a unique name",
    Request.ENCLAVE_DESTROY: "destroy a server enclave",
    Request.ENCLAVE_ACQUIRE: "find a server enclave by its name",
    Request.ENCLAVE_RELEASE: "give an acquired server enclave back",
    Request.ENCLAVE_CALL: "call an acquired server enclave",
    Request.CANCEL: "ask a request in progress to end early",
    Request.RPC_REPLY: "answer an RPC",
    Request.RPC_WITHDRAWN_ACK: "let go of the id of a withdrawn RPC",
}
"""What each request is for."""


class Status(IntEnum):
    """What became of a request, in a response's header."""

    OK = 0
    UNSUPPORTED = 1
    MALFORMED = 2
    STALE_EPOCH = 3
    NO_CONTEXT = 4
    NO_SESSION = 5
    NO_REGION = 6
    BAD_RANGE = 7
    LIMIT = 8
    DUPLICATE_TAG = 9
    NOT_FOUND = 10
    ABANDONED = 11
    DENIED = 12
    IN_USE = 13


STATUS_DOCS = {
    Status.OK: "The request was carried out; `ret` and `origin` are the TEE's, where it had a say.",
    Status.UNSUPPORTED: "The type is unknown, belongs to a feature that was not negotiated, or to another queue.",
    Status.MALFORMED: "The bytes do not have the form that the type requires, or the response would not fit.",
    Status.STALE_EPOCH: "The request was made in another epoch; what it names is gone.",
    Status.NO_CONTEXT: "No open context has this id, or it is closing.",
    Status.NO_SESSION: "The context has no open session, enclave or acquired server of this id, or it is closing.",
    Status.NO_REGION: "No memory region that may be named here has this id, or it is being unregistered.",
    Status.BAD_RANGE: (
        "Memory lies outside its region or outside the guest's memory, or read-only memory is to be written."
    ),
    Status.LIMIT: "A limit of the config space, or one of the device's own, would be exceeded.",
    Status.DUPLICATE_TAG: "Another request in progress has this tag.",
    Status.NOT_FOUND: "The request, RPC, service, name or handle that is meant does not exist (any more).",
    Status.ABANDONED: (
        "The device lost sight of the request before it ended. MAY_HAVE_RUN says that the TEE may have run it."
    ),
    Status.DENIED: "Policy forbids it: this identity, name, service or memory is not for this guest.",
    Status.IN_USE: "The name or handle is taken, or the service to remove is in use.",
}
"""When a request ends with which status. The result code that goes with each: ``device.requests.STATUS_RESULT``."""


class ResponseFlag(IntFlag):
    """Flags of a response's header."""

    MAY_HAVE_RUN = 1 << 0


class ParamType(IntEnum):
    """Bits 0 to 7 of a parameter's attribute; Linux's numbers."""

    NONE = 0
    VALUE_IN = 1
    VALUE_OUT = 2
    VALUE_INOUT = 3
    MEMREF_IN = 5
    MEMREF_OUT = 6
    MEMREF_INOUT = 7


PARAM_TYPE_MASK = 0xFF
PARAM_META = 0x100
PARAM_INLINE = 0x10000
NULL_REGION = 0xFFFF_FFFF_FFFF_FFFF
"""``c`` of a memory reference that refers to no memory."""


class RegionFlag(IntFlag):
    """Flags of a registration."""

    READ_ONLY = 1 << 0


SERVICES_UUID = services.SERVICES_UUID
MAX_CHAIN = services.MAX_CHAIN
ServiceFlag = services.ServiceFlag
EnclaveFlag = services.EnclaveFlag
STATEMENT_MAGIC = attestation.STATEMENT_MAGIC
ServiceEntry = services.ServiceEntry
TaskSelector = services.TaskSelector
AttestSelector = services.AttestSelector
CallFrame = services.CallFrame
AttestationStatement = attestation.AttestationStatement
"""What the TEE, too, writes and reads is defined there."""

RequestHeader = Struct(
    "type" / Int32ul * "what is asked for",
    "flags" / Int32ul * "must be 0",
    "epoch"
    / Int64ul
    * "the epoch in which the request's ids were given (`context`'s, the RPC's); for OPEN_CONTEXT the current one",
    "tag" / Int64ul * "chosen by the driver; not 0; unique among its requests in progress",
    "context" / Int32ul * "the context on whose behalf the request is made; 0 where there is none",
    Reserved(4),
)

ResponseHeader = Struct(
    "status" / Int32ul * "what became of the request",
    "flags" / Int32ul * "bit 0 MAY_HAVE_RUN",
    "ret" / Int32ul * "result code (GlobalPlatform TEEC_*); meaningful with every status",
    "origin" / Int32ul * "origin of `ret` (GlobalPlatform): 1 API, 2 COMMS, 3 TEE, 4 TRUSTED_APP",
)

Param = Struct(
    "attr" / Int64ul * "bits 0–7 type, bit 8 META, bit 16 INLINE; all others 0",
    "a" / Int64ul * "value, or a memory reference's offset into its region",
    "b" / Int64ul * "value, or a memory reference's size in bytes",
    "c" / Int64ul * "value, or a memory reference's region id (2^64 − 1: NULL)",
)

MemoryRange = Struct(
    "address" / Int64ul * "guest-physical address",
    "length" / Int64ul * "bytes; not 0",
)

OpenContext = Struct(
    "flags" / Int32ul * "must be 0",
    Reserved(4),
)
OpenContextResponse = Struct(
    "context" / Int32ul * "id of the new context; not 0",
    Reserved(4),
)

OpenSession = Struct(
    "uuid" / Bytes(16) * "the TA, as the 16 octets of RFC 9562",
    "client_uuid" / Bytes(16) * "the client's UUID, likewise; zero for PUBLIC",
    "client_login" / Int32ul * "GlobalPlatform login method",
    "num_params" / Int32ul * "parameters that follow",
)
OpenSessionResponse = Struct(
    "session" / Int32ul * "id of the new session; 0 if none was opened",
    "num_params" / Int32ul * "parameters that follow: as many as in the request",
)

CloseSession = Struct(
    "session" / Int32ul * "id of the session",
    Reserved(4),
)

Invoke = Struct(
    "session" / Int32ul * "id of the session",
    "func" / Int32ul * "command of the TA",
    "num_params" / Int32ul * "parameters that follow",
    Reserved(4),
)
InvokeResponse = Struct(
    "num_params" / Int32ul * "parameters that follow: as many as in the request",
    Reserved(4),
)

RegisterMemory = Struct(
    "flags" / Int32ul * "bit 0 READ_ONLY",
    "num_ranges" / Int32ul * "ranges that follow; at least 1",
    "size" / Int64ul * "bytes of the region: the sum of the ranges' lengths",
)
RegisterFfa = Struct(
    "handle" / Int64ul * "FF-A memory handle that the guest got from its share with the TEE",
    "tag" / Int64ul * "FF-A tag of that transaction",
    "size" / Int64ul * "bytes of the region",
    "flags" / Int32ul * "bit 0 READ_ONLY",
    Reserved(4),
)
RegisterResponse = Struct(
    "region" / Int32ul * "id of the new region; not 0",
    Reserved(4),
)
UnregisterMemory = Struct(
    "region" / Int32ul * "id of the region",
    Reserved(4),
)

Cancel = Struct(
    "tag" / Int64ul * "tag of the request to cancel",
)

RpcReply = Struct(
    "rpc" / Int32ul * "id of the RPC",
    "ret" / Int32ul * "result code",
    "origin" / Int32ul * "origin of `ret`",
    "num_params" / Int32ul * "parameters that follow",
)
RpcWithdrawnAck = Struct(
    "rpc" / Int32ul * "id of the RPC",
    Reserved(4),
)

# -- services

ServiceList = Struct(
    "first" / Int32ul * "index of the first entry wanted, from 0",
    "max_entries" / Int32ul * "most entries wanted; 0 asks for `total` alone; the writable part has room for them",
)
ServiceListResponse = Struct(
    "total" / Int32ul * "entries that there are",
    "count" / Int32ul * "entries that follow",
)
ServiceLoad = Struct(
    "num_params" / Int32ul * "1: a memory reference (IN) to the signed package",
    Reserved(4),
)
ServiceLoadResponse = Struct(
    "uuid" / Bytes(16) * "UUID of the service that was installed",
    "version" / Int32ul * "its version",
    "num_params" / Int32ul * "1: the parameter as it was",
)
ServiceRemove = Struct(
    "uuid" / Bytes(16) * "UUID of the service to remove",
)
ServiceTask = Struct(
    "uuid" / Bytes(16) * "UUID of the service",
    "client_uuid" / Bytes(16) * "as in OPEN_SESSION",
    "client_login" / Int32ul * "as in OPEN_SESSION",
    "func" / Int32ul * "command",
    "num_params" / Int32ul * "parameters that follow",
    Reserved(4),
)
ServiceAttest = Struct(
    "uuid" / Bytes(16) * "UUID of the service to attest",
    "nonce" / Bytes(32) * "fresh bytes of the verifier's",
    "num_params" / Int32ul * "1: a memory reference (OUT) for the statement",
    Reserved(4),
)

# -- server enclaves

EnclaveCreate = Struct(
    "uuid" / Bytes(16) * "UUID of the service that runs in the enclave",
    "name" / Bytes(64) * "unique name: 1 to 64 bytes of UTF-8 without zeros, padded with zeros",
    "flags" / Int32ul * "bit 0 SHARED: other guests may acquire it",
    Reserved(4),
)
EnclaveCreateResponse = Struct(
    "enclave" / Int32ul * "id of the new enclave, for its creator; not 0",
    Reserved(4),
)
EnclaveDestroy = Struct(
    "enclave" / Int32ul * "id of the enclave",
    Reserved(4),
)
EnclaveAcquire = Struct(
    "name" / Bytes(64) * "name of the enclave, as in ENCLAVE_CREATE",
)
EnclaveAcquireResponse = Struct(
    "server" / Int32ul * "id by which this context calls the enclave; not 0",
    Reserved(4),
)
EnclaveRelease = Struct(
    "server" / Int32ul * "id from ENCLAVE_ACQUIRE",
    Reserved(4),
)
EnclaveCall = Struct(
    "server" / Int32ul * "id from ENCLAVE_ACQUIRE",
    "num_params" / Int32ul * "0, or 1: a memory reference (INOUT) that the callee reads and writes in place",
    "regs" / Int64ul[8] * "register values given to the callee",
)
EnclaveCallResponse = Struct(
    "value" / Int64ul * "value that the callee returned",
    "offset" / Int64ul * "start of the bytes it returned, from the start of the memory reference",
    "size" / Int64ul * "length of those bytes; 0 for none",
    "num_params" / Int32ul * "as in the request",
    Reserved(4),
)

# -- events (event queue)


class Event(IntEnum):
    """Event types."""

    RPC = 0x8001
    RPC_WITHDRAWN = 0x8002
    NOTIFICATION = 0x8003
    EPOCH = 0x8004


EVENT_DOCS = {
    Event.RPC: "the TEE calls the guest",
    Event.RPC_WITHDRAWN: "nobody waits for the answer to an RPC any more",
    Event.NOTIFICATION: "the TEE notifies the guest",
    Event.EPOCH: "the guest's state in the device was lost behind a running driver",
}
"""What each event says."""


class RpcTarget(IntEnum):
    """Who is to serve an RPC in the guest."""

    SUPPLICANT = 0
    CLIENT = 1


class RpcServer(Enum):
    """Who in the guest answers an RPC."""

    SUPPLICANT = "supplicant"
    CLIENT_OR_SUPPLICANT = "supplicant, or client (`target`)"
    CLIENT = "client"
    DRIVER = "driver"
    NOBODY = "never sent to a guest"


RPC_SERVERS: dict[int, tuple[RpcServer, int]] = {
    RpcCommand.LOAD_TA: (RpcServer.SUPPLICANT, Result.ITEM_NOT_FOUND),
    RpcCommand.RPMB: (RpcServer.NOBODY, Result.NOT_SUPPORTED),
    RpcCommand.FS: (RpcServer.SUPPLICANT, Result.NOT_SUPPORTED),
    RpcCommand.GET_TIME: (RpcServer.DRIVER, Result.NOT_SUPPORTED),
    RpcCommand.NOTIFICATION: (RpcServer.DRIVER, Result.NOT_SUPPORTED),
    RpcCommand.SUSPEND: (RpcServer.DRIVER, Result.NOT_SUPPORTED),
    RpcCommand.SHM_ALLOC: (RpcServer.CLIENT_OR_SUPPLICANT, Result.OUT_OF_MEMORY),
    RpcCommand.SHM_FREE: (RpcServer.CLIENT_OR_SUPPLICANT, Result.SUCCESS),
    RpcCommand.GPROF: (RpcServer.SUPPLICANT, Result.NOT_SUPPORTED),
    RpcCommand.SOCKET: (RpcServer.SUPPLICANT, Result.NOT_SUPPORTED),
    RpcCommand.FTRACE: (RpcServer.SUPPLICANT, Result.NOT_SUPPORTED),
    RpcCommand.PLUGIN: (RpcServer.SUPPLICANT, Result.NOT_SUPPORTED),
    RpcCommand.BENCH_REG: (RpcServer.NOBODY, Result.NOT_SUPPORTED),
    RpcCommand.I2C_TRANSFER: (RpcServer.NOBODY, Result.NOT_SUPPORTED),
    RpcCommand.RPMB_PROBE_RESET: (RpcServer.NOBODY, Result.NOT_SUPPORTED),
    RpcCommand.RPMB_PROBE_NEXT: (RpcServer.NOBODY, Result.NOT_SUPPORTED),
    RpcCommand.RPMB_FRAMES: (RpcServer.NOBODY, Result.NOT_SUPPORTED),
    RpcCommand.OCALL: (RpcServer.CLIENT, Result.NOT_SUPPORTED),
}
"""RPC command → who in the guest serves it, and what the TEE gets where that one is missing. Commands that are not
listed may go to the supplicant, and get NOT_SUPPORTED otherwise."""

EventHeader = Struct(
    "type" / Int32ul * "what happened",
    "flags" / Int32ul * "0",
    "epoch" / Int64ul * "the current epoch",
)

RpcEvent = Struct(
    "rpc" / Int32ul * "id of the RPC; not 0",
    "command" / Int32ul * "OP-TEE's RPC command, or 0x1000 OCALL",
    "target"
    / Int32ul
    * "who is to serve it: 0 the supplicant (or the driver itself), 1 the client whose request is `call`",
    "deadline_ms" / Int32ul * "milliseconds left until the device gives up, from when it wrote the event; not 0",
    "call" / Int64ul * "tag of the request that caused it; 0 if the TEE does not say",
    "context" / Int32ul * "context of that request, or 0",
    "session" / Int32ul * "session of that request, or 0",
    "num_params" / Int32ul * "parameters that follow",
    Reserved(4),
)
RpcWithdrawnEvent = Struct(
    "rpc" / Int32ul * "id of the RPC",
    Reserved(4),
)
NotificationEvent = Struct(
    "value" / Int32ul * "notification value",
    Reserved(4),
)
