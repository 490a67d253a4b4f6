"""The backend's state machine and the session on it: message by message, without a socket."""

from __future__ import annotations

import pytest

from pyvhost.backend import MEM_SLOTS, RULES, Backend, DeviceInfo, offered_protocol_features
from pyvhost.errors import Disconnected, MessageError
from pyvhost.messages import (
    HEADER,
    MEM_TABLE,
    REGION,
    U64,
    VRING_ADDR,
    VRING_STATE,
    Feature,
    Flag,
    FrontendRequest,
    ProtocolFeature,
    encode,
)
from pyvhost.ringstate import RING_TABLE, RingEvent, RingState
from pyvhost.vring.packed import INITIAL_BASE
from tests.pyvhost.fakes import GUEST, NOT_A_FILE, NOT_POLLABLE, RAM, USER, F, Vmm, config, mem_region
from tests.pyvhost.toys import Echo, Late

P = ProtocolFeature


@pytest.fixture
def vmm() -> Vmm:
    vmm = Vmm(Echo())
    vmm.negotiate()
    return vmm


def late() -> tuple[Late, Vmm]:
    device = Late()
    vmm = Vmm(device)
    vmm.negotiate()
    device.hooks.clear()
    return device, vmm


# --- the tables


def test_ring_table_is_complete() -> None:
    missing = {(s, e) for s in RingState for e in RingEvent} - set(RING_TABLE)
    assert missing == {(RingState.DISABLED, RingEvent.START), (RingState.RUNNING, RingEvent.START)}


def test_offered_is_implemented() -> None:
    info = DeviceInfo(1, config_size=4, has_state=True)
    offered = offered_protocol_features(info)
    always = P.MQ | P.REPLY_ACK | P.BACKEND_REQ | P.RESET_DEVICE | P.CONFIGURE_MEM_SLOTS | P.STATUS | P.INFLIGHT_SHMFD
    assert offered == always | P.CONFIG | P.LOG_SHMFD | P.DEVICE_STATE
    assert offered_protocol_features(DeviceInfo(1, logs_writes=False)) == always
    needed = P(0)
    for rule in RULES.values():
        needed |= rule.needs
    assert offered == needed | P.REPLY_ACK


@pytest.mark.parametrize("bad", [(0,), (257,), (1, 3), (1, 1 << 16), (1, 8, 0, 257)])
def test_impossible_devices(bad: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        DeviceInfo(*bad)


# --- negotiation


def test_answers_of_the_start(vmm: Vmm) -> None:
    assert U64.unpack(vmm.tell(F.GET_QUEUE_NUM)).value == 2
    assert U64.unpack(vmm.tell(F.GET_MAX_MEM_SLOTS)).value == MEM_SLOTS
    assert vmm.ack(F.RESET_OWNER) == 0
    assert vmm.tell(F.SET_OWNER) == b""
    vmm.leave()


def test_the_message_that_acknowledges_reply_ack_is_answered_as_user_mode_linux_wants_it() -> None:
    vmm = Vmm(Echo())
    assert vmm.tell(F.SET_PROTOCOL_FEATURES, U64.pack(P.MQ), flags=Flag.NEED_REPLY) == b""
    assert vmm.ack(F.SET_PROTOCOL_FEATURES, U64.pack(P.REPLY_ACK)) == 0
    vmm.leave()


@pytest.mark.parametrize("request_", [F.SET_FEATURES, F.SET_PROTOCOL_FEATURES])
def test_only_offered_features(vmm: Vmm, request_: FrontendRequest) -> None:
    assert vmm.ack(request_, U64.pack(1 << 63)) == 1
    with pytest.raises(Disconnected, match="not offered"):
        vmm.tell(request_, U64.pack(1 << 63))


def test_status(vmm: Vmm) -> None:
    assert vmm.ack(F.SET_STATUS, U64.pack(0xF)) == 0
    assert U64.unpack(vmm.tell(F.GET_STATUS)).value == 0xF
    assert vmm.ack(F.SET_STATUS, U64.pack(0x100)) == 1


@pytest.mark.parametrize("request_", [r for r, rule in RULES.items() if rule.needs])
def test_messages_need_their_protocol_feature(request_: FrontendRequest) -> None:
    vmm = Vmm(Echo(), protocol=P.REPLY_ACK)
    vmm.negotiate()
    if request_ in (F.GET_CONFIG, F.SET_DEVICE_STATE_FD, F.CHECK_DEVICE_STATE):  # they can say no
        assert vmm.tell(request_) in (b"", U64.pack(0x101), U64.pack(1))
    elif RULES[request_].replies:  # there is no way to say no but to leave
        with pytest.raises(Disconnected, match="protocol feature"):
            vmm.tell(request_)
    else:
        assert vmm.ack(request_) == 1
    vmm.leave()


# --- messages that are wrong


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(1, 0, 0),
        HEADER.pack(1, 2, 0),
        HEADER.pack(1, 5, 0),
        HEADER.pack(1, 1, 4097),
        HEADER.pack(1, 1, 0xFFFF_FFFF),
    ],
)
def test_headers_that_end_the_connection(header: bytes) -> None:
    with pytest.raises(MessageError):
        Backend.payload_size(header)
    vmm = Vmm(Echo())
    with pytest.raises(Disconnected):
        vmm.session.receive(header, b"", [vmm.fd()])
    vmm.leave()


@pytest.mark.parametrize("request_", [*sorted(set(FrontendRequest) - set(RULES)), 0, 99, 4294967295])
def test_what_is_not_implemented(vmm: Vmm, request_: int) -> None:
    assert vmm.ack(request_, bytes(16), vmm.fd()) == 1
    assert not vmm.ports.open_fds
    with pytest.raises(Disconnected, match="not implemented"):
        vmm.tell(request_, bytes(16))


@pytest.mark.parametrize("request_", sorted(RULES))
def test_wrong_sizes_and_counts_of_fds(vmm: Vmm, request_: FrontendRequest) -> None:
    for payload, fds in ((bytes(1), 0), (bytes(99), 0), (b"", 9), (bytes(8), 33)):
        vmm = Vmm(Echo())
        vmm.negotiate()
        given = [vmm.fd() for _ in range(fds)]
        try:
            reply = vmm.tell(request_, payload, *given, flags=Flag.NEED_REPLY)
        except Disconnected:
            pass
        else:
            assert reply == b"" if request_ is F.GET_CONFIG else U64.unpack(reply).value & 0xFF == 1
        assert not vmm.ports.open_fds
        vmm.leave()


def test_a_payload_shorter_than_announced(vmm: Vmm) -> None:
    with pytest.raises(Disconnected, match="not as long"):
        vmm.session.receive(HEADER.pack(F.SET_FEATURES, 1, 8), bytes(4), [])


def test_nothing_is_obeyed_after_the_end(vmm: Vmm) -> None:
    vmm.leave()
    fd = vmm.fd()
    with pytest.raises(Disconnected, match="after the end"):
        vmm.tell(F.SET_VRING_CALL, U64.pack(0), fd)
    assert not vmm.ports.open_fds


# --- memory


def test_mem_table_as_uml_sends_it(vmm: Vmm) -> None:
    fd = vmm.fd()
    payload = MEM_TABLE.pack(1) + REGION.pack(0x10_0000, 0x1000, 0x6000_0000, 0x3000) + bytes(32)
    assert len(payload) == 72
    assert vmm.ack(F.SET_MEM_TABLE, payload, fd) == 0
    (region,) = vmm.session.device.memory.regions
    assert (region.guest_addr, region.size) == (0x10_0000, 0x1000)
    assert not vmm.ports.open_fds  # mapped memory needs no descriptor
    vmm.leave()


@pytest.mark.parametrize("uml", [True, False])
def test_a_packed_ring_of_user_mode_linux_begins_at_its_beginning(uml: bool) -> None:
    """It says base 0, as for split rings; from others that is a ring that has turned once."""
    vmm = Vmm(Echo(), features=Feature.PROTOCOL_FEATURES | Feature.VERSION_1 | Feature.RING_PACKED)
    vmm.negotiate()
    vmm.set_memory()
    if uml:
        fd = vmm.fd()
        assert vmm.ack(F.SET_MEM_TABLE, vmm.table(fd) + bytes(32), fd) == 0
    for base, heard in ((0, INITIAL_BASE if uml else 0), (5, 5)):
        vmm.tell(F.SET_VRING_BASE, VRING_STATE.pack(0, base))
        assert vmm.base(0) == heard
    vmm.leave()


@pytest.mark.parametrize("count", [0, 2, 9, 0xFFFF_FFFF])
def test_mem_table_with_wrong_count(vmm: Vmm, count: int) -> None:
    fd = vmm.fd()
    assert vmm.ack(F.SET_MEM_TABLE, MEM_TABLE.pack(count) + REGION.pack(0x1000, 0x1000, 0, 0), fd) == 1
    assert not vmm.ports.open_fds
    vmm.leave()


@pytest.mark.parametrize("size", [40, 72, 104])
def test_mem_table_with_wrong_size(vmm: Vmm, size: int) -> None:
    payload = (MEM_TABLE.pack(2) + REGION.pack(GUEST, RAM, USER, 0) * 3)[:size]
    if size != 72:
        assert vmm.ack(F.SET_MEM_TABLE, payload, vmm.fd(), vmm.fd()) == 1
    else:  # the right size, but the regions overlap
        assert vmm.ack(F.SET_MEM_TABLE, payload, vmm.fd(), vmm.fd()) == 1
        assert vmm.ports.mapped == 0
    vmm.leave()


def test_a_bad_table_leaves_the_old_one(vmm: Vmm) -> None:
    vmm.set_memory()
    bad = vmm.ports.give(NOT_A_FILE)[0]
    good = vmm.fd()
    assert vmm.ack(F.SET_MEM_TABLE, vmm.table(good, bad), good, bad) == 1
    assert vmm.ports.mapped == 1
    assert len(vmm.session.device.memory) == 1
    assert vmm.ack(F.SET_MEM_TABLE, MEM_TABLE.pack(0)) == 0
    assert vmm.ports.mapped == 0
    vmm.leave()


def test_slots(vmm: Vmm) -> None:
    assert vmm.ack(F.ADD_MEM_REG, mem_region(0x1000, 0x1000, 0x1000), vmm.fd()) == 0
    assert vmm.ack(F.ADD_MEM_REG, mem_region(0x2000, 0x1000, 0x2000), vmm.fd()) == 0
    assert vmm.ack(F.ADD_MEM_REG, mem_region(0x2800, 0x1000, 0x9000), vmm.fd()) == 1  # overlaps
    assert vmm.ack(F.ADD_MEM_REG, mem_region(0x3000, 0x1000, 0x3000)) == 1  # no fd
    assert vmm.ack(F.ADD_MEM_REG, mem_region(0x3000, 1 << 40, 0x3000), vmm.fd()) == 1  # too large
    assert vmm.ack(F.REM_MEM_REG, mem_region(0x2000, 0x800, 0x2000)) == 1  # no such
    assert vmm.ack(F.REM_MEM_REG, mem_region(0x1000, 0x1000, 0x1000, 77), vmm.fd()) == 0
    assert [r.guest_addr for r in vmm.session.device.memory] == [0x2000]
    assert vmm.ports.mapped == 1
    vmm.leave()


@pytest.mark.requirement("DEV-VHU-6")
def test_a_lease_outlives_the_region(vmm: Vmm) -> None:
    vmm.set_memory()
    lease = vmm.session.device.memory.lease((GUEST, 16))
    vmm.set_memory()
    assert vmm.ports.mapped == 2
    lease.views[0][0][0] = 1
    lease.release()
    assert vmm.ports.mapped == 1
    lease = vmm.session.device.memory.lease()
    vmm.session.disconnect()
    assert vmm.ports.mapped == 1
    lease.release()
    assert vmm.ports.mapped == 0


# --- config space


def test_config(vmm: Vmm) -> None:
    assert vmm.tell(F.GET_CONFIG, config(0, 16))[12:] == b"echo device v1.."
    assert vmm.tell(F.GET_CONFIG, config(5, 6)) == config(5, 6, data=b"device")
    assert vmm.ack(F.SET_CONFIG, config(0, 4, data=b"ECHO")) == 0
    assert vmm.tell(F.GET_CONFIG, config(0, 4))[12:] == b"ECHO"
    vmm.leave()


@pytest.mark.parametrize(("offset", "size"), [(0, 17), (16, 1), (0xFFFF_FFFF, 1), (0, 256)])
def test_config_outside(vmm: Vmm, offset: int, size: int) -> None:
    assert vmm.tell(F.GET_CONFIG, config(offset, size)) == b""
    assert vmm.ack(F.SET_CONFIG, config(offset, size)) == 1
    assert vmm.tell(F.GET_CONFIG, config(0, 16)[:-1]) == b""
    assert vmm.ack(F.SET_CONFIG, config(0, 4, flags=2)) == 1


def test_read_only_config() -> None:
    class ReadOnly(Late):
        config_size = 4

    vmm = Vmm(ReadOnly())
    vmm.negotiate()
    assert vmm.tell(F.GET_CONFIG, config(0, 4)) == config(0, 4)
    assert vmm.ack(F.SET_CONFIG, config(0, 4)) == 1


def test_config_change_needs_a_channel(vmm: Vmm) -> None:
    link = vmm.session.device.link
    assert not link.config_changed()
    assert vmm.ack(F.SET_BACKEND_REQ_FD) == 1
    assert vmm.ack(F.SET_BACKEND_REQ_FD, b"", vmm.ports.give(NOT_A_FILE)[0]) == 1
    assert vmm.ack(F.SET_BACKEND_REQ_FD, b"", vmm.fd()) == 0
    assert link.config_changed()
    assert vmm.ports.sent == [encode(2)]
    assert vmm.ack(F.SET_BACKEND_REQ_FD, b"", vmm.fd()) == 0
    assert len(vmm.ports.open_fds) == 1
    assert link.config_changed()
    vmm.leave()
    assert not link.config_changed()


# --- rings


def test_requests_go_through(vmm: Vmm) -> None:
    vmm.start(0, 1)
    for index in (0, 1):
        vmm.add(index)
        vmm.ports.turn()
        assert vmm.drivers[index].poll() == [(b"hello", 5)]
        assert vmm.answer(index, 5) == b"hello"
    call = vmm.backend.rings[0].call
    assert call in vmm.ports.signals
    vmm.leave()


@pytest.mark.requirement("DEV-VHU-7")
def test_kick_before_enable_is_looked_at_on_enable(vmm: Vmm) -> None:
    vmm.set_memory()
    vmm.ring(0)
    vmm.add(0)
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == []
    vmm.enable(0)
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == [(b"hello", 5)]


@pytest.mark.requirement("DEV-VHU-7")
def test_enable_before_start(vmm: Vmm) -> None:
    vmm.set_memory()
    vmm.enable(0)
    vmm.ring(0, kick=False)
    vmm.add(0)
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == []
    vmm.tell(F.SET_VRING_KICK, U64.pack(0), vmm.fd())
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == [(b"hello", 5)]


def test_without_protocol_features_rings_start_enabled() -> None:
    vmm = Vmm(Echo(), features=int(Feature.VERSION_1))
    vmm.negotiate()
    vmm.set_memory()
    vmm.ring(0)
    vmm.add(0)
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == [(b"hello", 5)]
    with pytest.raises(Disconnected, match="without PROTOCOL_FEATURES"):
        vmm.enable(0)
    vmm.leave()


def test_a_disabled_ring_is_not_processed_but_completes() -> None:
    device, vmm = late()
    vmm.start(0)
    vmm.add(0, b"one")
    assert device.link.enabled(0)
    vmm.enable(0, 0)
    assert not device.link.enabled(0)
    vmm.add(0, b"two")
    vmm.ports.turn()
    assert [c.read() for _, c in device.held] == [b"one"]
    device.finish()
    assert vmm.drivers[0].poll() == [(b"one", 4)]
    vmm.enable(0)
    vmm.ports.turn()
    assert [c.readable_bytes for _, c in device.held] == [3]
    assert [h[0] for h in device.hooks] == ["negotiated", "started"]
    vmm.leave()


def test_every_order_of_a_rings_configuration(vmm: Vmm) -> None:
    vmm.set_memory()
    vmm.enable(0)
    vmm.tell(F.SET_VRING_KICK, U64.pack(0), vmm.fd())
    vmm.ring(0, kick=False)
    vmm.add(0)
    vmm.ports.turn()
    assert vmm.backend.rings[0].state is RingState.RUNNING
    assert vmm.drivers[0].poll() == [(b"hello", 5)]


@pytest.mark.parametrize(
    ("request_", "payload", "why"),
    [
        (F.SET_VRING_NUM, VRING_STATE.pack(2, 8), "ring 2 of 2"),
        (F.SET_VRING_NUM, VRING_STATE.pack(0, 0), "entries"),
        (F.SET_VRING_NUM, VRING_STATE.pack(0, 7), "entries"),
        (F.SET_VRING_NUM, VRING_STATE.pack(0, 512), "entries"),
        (F.SET_VRING_BASE, VRING_STATE.pack(0, 0x10000), "base"),
        (F.SET_VRING_BASE, VRING_STATE.pack(7, 0), "ring 7"),
        (F.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, 8, 0, 0, 0), "misaligned"),
        (F.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, 0, 2, 0, 0), "misaligned"),
        (F.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, 0, 0, 1, 0), "misaligned"),
        (F.SET_VRING_ADDR, VRING_ADDR.pack(9, 0, 0, 0, 0, 0), "ring 9"),
        (F.SET_VRING_ENABLE, VRING_STATE.pack(0, 2), "ENABLE 2"),
        (F.SET_VRING_ENABLE, VRING_STATE.pack(0xFFFF_FFFF, 1), "ring"),
        (F.GET_VRING_BASE, VRING_STATE.pack(2, 0), "ring 2"),
        (F.SET_VRING_KICK, U64.pack(0), "not there"),
        (F.SET_VRING_KICK, U64.pack(0x100), "polled"),
        (F.SET_VRING_CALL, U64.pack(0x200), "unknown bits"),
        (F.SET_VRING_ERR, U64.pack(5), "not there"),
    ],
)
def test_wrong_ring_messages(vmm: Vmm, request_: FrontendRequest, payload: bytes, why: str) -> None:
    vmm.start(0)
    if request_ is not F.GET_VRING_BASE:
        assert vmm.ack(request_, payload) == 1
    with pytest.raises(Disconnected, match=why):
        vmm.tell(request_, payload)
    vmm.leave()


@pytest.mark.parametrize("value", [0x100, 7])
def test_ring_fds_that_are_too_many_or_for_no_ring(vmm: Vmm, value: int) -> None:
    for request in (F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR):
        assert vmm.ack(request, U64.pack(value), vmm.fd()) == 1
    assert not vmm.ports.open_fds


def test_a_kick_fd_that_cannot_be_polled(vmm: Vmm) -> None:
    vmm.start(0)
    assert vmm.ack(F.SET_VRING_KICK, U64.pack(0), vmm.ports.give(NOT_POLLABLE)[0]) == 1
    vmm.add(0)  # the old one still works
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == [(b"hello", 5)]
    vmm.leave()


def test_a_queue_spins_only_where_nothing_else_waits(vmm: Vmm, monkeypatch: pytest.MonkeyPatch) -> None:
    vmm.start(0)
    seen = []
    for alone in (True, False, True):
        monkeypatch.setattr(vmm.ports, "alone", lambda alone=alone: alone)
        vmm.add(0)
        vmm.ports.turn()
        queue = vmm.session.device.queues[0]
        assert queue is not None
        seen.append(queue.spin_us)
    assert seen == [vmm.session.device.spin_us, 0, vmm.session.device.spin_us]
    assert vmm.session.device.spin_us > 0
    vmm.leave()


def test_fds_replaced_while_running(vmm: Vmm) -> None:
    vmm.start(0)
    before = len(vmm.ports.open_fds)
    for request in (F.SET_VRING_KICK, F.SET_VRING_CALL, F.SET_VRING_ERR):
        assert vmm.ack(request, U64.pack(0), vmm.fd()) == 0
    assert len(vmm.ports.open_fds) == before
    vmm.ports.turn()
    vmm.add(0)
    assert vmm.drivers[0].poll() == [(b"hello", 5)]
    assert vmm.ports.signals == [vmm.backend.rings[0].call]
    vmm.tell(F.SET_VRING_CALL, U64.pack(0x100))  # the driver polls
    vmm.add(0)
    assert len(vmm.ports.signals) == 1
    vmm.leave()


def test_rings_outside_of_memory_do_not_start(vmm: Vmm) -> None:
    vmm.set_memory()
    vmm.ring(0)
    assert vmm.ack(F.SET_VRING_ADDR, VRING_ADDR.pack(0, 0, USER + RAM - 16, USER, USER, 0)) == 0
    assert vmm.ack(F.SET_VRING_ENABLE, VRING_STATE.pack(0, 1)) == 1
    assert vmm.session.device.queues == [None, None]
    vmm.ring(0)
    vmm.enable(0)
    assert vmm.session.device.queues[0] is not None
    vmm.leave()


def test_moving_a_running_ring(vmm: Vmm) -> None:
    vmm.start(0)
    vmm.add(0)
    vmm.drivers[0].poll()
    vmm.ram[0x4000:0x5000] = vmm.ram[0:0x1000]
    old = vmm.backend.rings[0].addr
    moved = VRING_ADDR.pack(0, 0, old.desc + 0x4000, old.used + 0x4000, old.avail + 0x4000, 0)
    assert vmm.ack(F.SET_VRING_ADDR, moved) == 0
    driver = vmm.drivers[0]
    driver._view = vmm.ram[0x4000:0x5000]
    driver._avail = vmm.ram[0x4000 + 128 : 0x4000 + 150].cast("H")
    driver._used = vmm.ram[0x4000 + 152 : 0x4000 + 222].cast("H")
    driver._used32 = vmm.ram[0x4000 + 156 : 0x4000 + 220].cast("I")
    vmm.add(0, b"moved")
    vmm.ports.turn()
    assert driver.poll() == [(b"moved", 5)]
    bad = VRING_ADDR.pack(0, 0, 0x10, 0x10, 0x10, 0)
    assert vmm.ack(F.SET_VRING_ADDR, bad) == 1
    vmm.add(0, b"again")
    vmm.ports.turn()
    assert driver.poll() == [(b"again", 5)]
    vmm.leave()


def test_a_new_table_under_running_rings(vmm: Vmm) -> None:
    vmm.start(0)
    ram = vmm.ram
    vmm.set_memory()
    vmm.ram[:] = ram
    driver = vmm.drivers[0]
    driver._view = vmm.ram[0:0x1000]
    driver._avail = vmm.ram[128:150].cast("H")
    driver._used = vmm.ram[152:222].cast("H")
    driver._used32 = vmm.ram[156:220].cast("I")
    vmm.add(0)
    assert driver.poll() == [(b"hello", 5)]
    assert vmm.ack(F.SET_MEM_TABLE, MEM_TABLE.pack(0)) == 0
    queue = vmm.session.device.queues[0]
    assert queue is not None
    assert queue.broken is not None
    assert vmm.backend.rings[0].err in vmm.ports.signals
    assert vmm.ports.mapped == 0
    vmm.leave()


@pytest.mark.requirement("DEV-QUE-8")
@pytest.mark.fault("broken-ring")
def test_a_broken_ring_is_reported_once(vmm: Vmm) -> None:
    vmm.start(0)
    vmm.ram[130:132] = b"\xff\xff"  # available index
    look = vmm.ports.watched[vmm.backend.rings[0].kick or 0]
    for _ in range(3):
        look()
    assert vmm.ports.signals == [vmm.backend.rings[0].err]
    assert vmm.stop(0) == {0: 0}
    vmm.start(0)
    vmm.add(0)
    vmm.ports.turn()
    assert vmm.drivers[0].poll() == [(b"hello", 5)]
    vmm.leave()


# --- pause, reset, restart


def test_a_pause_keeps_what_is_in_flight() -> None:
    device, vmm = late()
    vmm.start(0, 1)
    vmm.add(0, b"slow")
    assert vmm.stop(0, 1) == {0: 1, 1: 0}
    assert device.hooks[-2:] == [("stopped", 0), ("stopped", 1)]
    assert len(device.held) == 1
    device.hooks.clear()
    vmm.start(0, 1, bases={0: 1}, fresh=False)
    assert device.hooks == [("negotiated",), ("started", 0, True), ("started", 1, True)]
    device.finish()
    assert vmm.drivers[0].poll() == [(b"slow", 4)]
    vmm.add(0, b"next")
    device.finish()
    assert vmm.drivers[0].poll() == [(b"next", 4)]
    vmm.leave()
    assert device.hooks[-1] == ("disconnected",)


def test_other_bases_mean_a_reset() -> None:
    device, vmm = late()
    vmm.start(0, 1)
    vmm.add(0)
    vmm.add(1)
    vmm.stop(0, 1)
    device.hooks.clear()
    vmm.start(0, 1)
    assert device.hooks == [("negotiated",), ("reset",), ("started", 0, False), ("started", 1, False)]
    assert device.queues[0] is not None
    assert device.queues[0].in_flight == 0
    vmm.leave()


def test_all_bases_initial_mean_a_reset_to_who_never_tells() -> None:
    device, vmm = late()
    vmm.start(0)
    assert vmm.stop(0) == {0: 0}
    device.hooks.clear()
    vmm.start(0)
    assert device.hooks == [("negotiated",), ("reset",), ("started", 0, False)]


def test_all_bases_initial_mean_a_pause_to_who_tells() -> None:
    device, vmm = late()
    vmm.start(0)
    vmm.stop(0)
    assert vmm.ack(F.RESET_DEVICE) == 0
    assert device.hooks[-1] == ("reset",)
    device.hooks.clear()
    vmm.start(0)
    assert device.hooks == [("negotiated",), ("started", 0, False)]
    vmm.stop(0)
    device.hooks.clear()
    vmm.start(0, fresh=False)
    assert device.hooks == [("negotiated",), ("started", 0, True)]


def test_a_reset_that_is_told_is_one_whatever_the_bases() -> None:
    device, vmm = late()
    vmm.start(0)
    vmm.add(0)
    bases = vmm.stop(0)
    vmm.tell(F.RESET_DEVICE)
    assert vmm.base(0) == 0  # QEMU may ask again
    device.hooks.clear()
    vmm.start(0, bases=bases)
    assert device.hooks == [("negotiated",), ("started", 0, False)]


def test_reset_of_a_running_device() -> None:
    device, vmm = late()
    vmm.start(0, 1)
    vmm.add(0)
    device.hooks.clear()
    vmm.tell(F.RESET_DEVICE)
    assert device.hooks == [("stopped", 0), ("stopped", 1), ("reset",)]
    assert device.queues == [None, None]
    assert not vmm.ports.watched
    vmm.enable(0)  # not configured: nothing happens
    assert vmm.backend.rings[0].state is RingState.ARMED
    vmm.leave()


def test_user_mode_linux_stops_by_disabling() -> None:
    device, vmm = late()
    vmm.start(0, 1)
    vmm.add(0)
    for index in (1, 0):
        vmm.enable(index, 0)
    device.hooks.clear()
    vmm.start(0, 1)
    assert device.hooks == [
        ("negotiated",),
        ("stopped", 0),
        ("stopped", 1),
        ("reset",),
        ("started", 0, False),
        ("started", 1, False),
    ]
    vmm.leave()


def test_a_late_contradiction_is_a_reset() -> None:
    """Without PROTOCOL_FEATURES each ring runs at once, so the first may look like the end of a pause."""
    device = Late()
    vmm = Vmm(device, features=int(Feature.VERSION_1))
    vmm.negotiate()
    vmm.set_memory()
    vmm.ring(0)
    vmm.ring(1)
    vmm.add(0)
    vmm.add(1)
    assert {vmm.base(0), vmm.base(1)} == {1}
    device.hooks.clear()
    vmm.ring(0, base=1, fresh=False)
    assert device.hooks == [("started", 0, True)]
    vmm.ring(1, base=0, fresh=False)
    assert device.hooks[1:] == [("stopped", 0), ("reset",), ("started", 1, False), ("started", 0, False)]
    vmm.leave()


def test_a_ring_that_was_not_there_before_is_no_pause() -> None:
    device, vmm = late()
    vmm.start(0)
    vmm.add(0)
    vmm.stop(0)
    device.hooks.clear()
    vmm.start(0, 1, bases={0: 1})
    assert ("reset",) in device.hooks


def test_another_size_is_no_pause() -> None:
    device, vmm = late()
    vmm.start(0)
    vmm.add(0)
    vmm.stop(0)
    device.hooks.clear()
    vmm.tell(F.SET_VRING_NUM, VRING_STATE.pack(0, 16))
    vmm.ring(0, base=1, fresh=False)
    vmm.enable(0)
    assert device.hooks == [("reset",), ("started", 0, False)]
    vmm.leave()


def test_stop_of_a_ring_that_never_ran(vmm: Vmm) -> None:
    assert vmm.base(1) == 0
    vmm.set_memory()
    vmm.ring(1, base=7)
    assert vmm.base(1) == 7
    assert not vmm.ports.watched
    vmm.leave()
