"""Any messages in any order: a reply, a refusal or the end of the connection, nothing else; and every descriptor is
closed."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from pyvhost.backend import RULES
from pyvhost.errors import Disconnected
from pyvhost.inflight import region_size
from pyvhost.messages import (
    FRONTEND_PAYLOADS,
    HEADER,
    INFLIGHT,
    LOG,
    TRANSFER_STATE,
    U64,
    Feature,
    FrontendRequest,
)
from tests.pyvhost.fakes import GUEST, NOT_A_FILE, NOT_POLLABLE, RAM, USER, F, Vmm, config
from tests.pyvhost.test_device_state import Movable
from tests.pyvhost.toys import Echo, Late

# values that mean something where they may land, and the extremes
WORDS = st.sampled_from([0, 1, 2, 8, 16, 0x100, 0xFFFF, 0xFFFF_FFFF])
LONGS = st.sampled_from([0, 1, 0x100, GUEST, USER, RAM, USER + 0x80, USER + 0x98, 1 << 63, (1 << 64) - 1])


@st.composite
def payload(draw: st.DrawFn, request: int) -> bytes:
    codec = FRONTEND_PAYLOADS.get(request) if request in FRONTEND_PAYLOADS else None  # type: ignore[call-overload]
    if codec is None or draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=80))
    out = b""
    for field in codec.fields:
        if field.kind == "le32":
            out += draw(WORDS).to_bytes(4, "little")
        else:
            while field.size > len(out) % field.size or len(out) < field.offset + field.size:
                out += draw(LONGS).to_bytes(8, "little")
                if len(out) >= field.offset + field.size:
                    break
    if RULES.get(request) and RULES[request].tail:  # type: ignore[call-overload]
        out += b"".join(draw(st.lists(LONGS.map(lambda v: v.to_bytes(8, "little")), max_size=8)))
    return out


@st.composite
def message(draw: st.DrawFn) -> tuple[int, int, bytes, int, int]:
    request = draw(st.sampled_from(sorted(RULES)) | st.sampled_from(list(FrontendRequest)) | WORDS)
    flags = draw(st.sampled_from([1, 1, 1, 9, 9, 0, 2, 5, 0xFFFF_FFF9]))
    body = draw(payload(request))
    kind = draw(st.sampled_from([0, 0, 0, NOT_A_FILE, NOT_POLLABLE]))
    return request, flags, body, draw(st.sampled_from([0, 0, 1, 1, 2, 8, 33])), kind


#: what a frontend does that means well, so that the fuzz gets somewhere
STEPS = ("negotiate", "start 0", "start both", "stop", "add", "turn", "reset", "config", "memory")
STEPS += ("inflight", "log", "state")


def obey(vmm: Vmm, step: str) -> None:
    match step:
        case "negotiate":
            vmm.negotiate()
        case "start 0":
            vmm.start(0)
        case "start both":
            vmm.start(0, 1)
        case "stop":
            vmm.stop(0, 1)
        case "add":
            for index in vmm.drivers:
                if vmm.drivers[index].free_slots >= 2:
                    vmm.add(index)
        case "turn":
            vmm.ports.turn()
        case "reset":
            vmm.tell(F.RESET_DEVICE)
        case "config":
            vmm.tell(F.GET_CONFIG, config(0, 16))
        case "memory":
            vmm.set_memory()
        case "inflight":
            vmm.tell(F.SET_INFLIGHT_FD, INFLIGHT.pack(2 * region_size(8), 0, 2, 8), vmm.fd())
        case "log":
            vmm.tell(F.SET_LOG_BASE, LOG.pack(4096, 0), vmm.fd())
            vmm.tell(F.SET_FEATURES, U64.pack(vmm.features | Feature.LOG_ALL))
        case "state":
            vmm.tell(F.SET_DEVICE_STATE_FD, TRANSFER_STATE.pack(len(vmm.drivers) & 1, 0), vmm.fd())


def end_transfers(vmm: Vmm) -> None:
    while vmm.ports.transfers:
        fd, data, _, done = vmm.ports.transfers.pop()
        vmm.ports.close_fd(fd)
        done(b"movable" if data is None else None)


@settings(max_examples=400, deadline=None)
@given(
    st.lists(message() | st.sampled_from(STEPS), max_size=24),
    st.sampled_from([Echo, Late, Movable]),
    st.booleans(),
)
def test_any_conversation(script: list[tuple[int, int, bytes, int, int] | str], device: type, prepared: bool) -> None:
    vmm = Vmm(device())
    special = NOT_A_FILE
    try:
        if prepared:
            vmm.negotiate()
            vmm.start(0)
        for item in script:
            if isinstance(item, str):
                obey(vmm, item)
                end_transfers(vmm)
                continue
            request, flags, body, count, kind = item
            if kind:
                special += 1
                fds = vmm.ports.give(*range(kind + 100 * special, kind + 100 * special + count))
            else:
                fds = [vmm.fd() for _ in range(count)]
            reply = vmm.session.receive(HEADER.pack(request, flags, len(body)), body, fds)
            if reply is not None:
                head = HEADER.unpack(reply.data)
                assert (head.request, head.flags, head.size) == (request, 5, len(reply.data) - 12)
            end_transfers(vmm)
            # Nothing is kept that is not in its place: at most three for each ring, the channel, the log's signal.
            assert len(vmm.ports.open_fds) <= 8
    except Disconnected:
        pass
    assert vmm.ports.hung_up is None
    vmm.leave()
