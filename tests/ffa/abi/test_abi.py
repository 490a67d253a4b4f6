"""Numbers, frames and layouts: against facts written down here by hand, and round trips of whatever can be said."""

from __future__ import annotations

from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffa.abi import ids, layouts, messages
from ffa.abi import transactions as abi
from ffa.abi.frame import Frame, halves, pair
from ffa.abi.ids import BY_FID, FUNCTIONS, VERSION_1_0, VERSION_1_1, VERSION_1_2, VERSIONS, Call, Error, FfaError

U16, U32, U64 = (st.integers(0, (1 << bits) - 1) for bits in (16, 32, 64))

# -- ids and frames


def test_function_ids_are_those_of_the_recorded_session() -> None:
    """As Linux 7.2 and OP-TEE 4.10 named them, from the trace's ``call`` and x0."""
    for number, name in {
        0x84000060: "FFA_ERROR",
        0x84000063: "FFA_VERSION",
        0xC4000066: "FFA_RXTX_MAP_64",
        0x8400006F: "FFA_MSG_SEND_DIRECT_REQ",
        0xC4000073: "FFA_MEM_SHARE_64",
        0x84000077: "FFA_MEM_RECLAIM",
        0x8400007A: "FFA_MEM_FRAG_RX",
        0xC4000083: "FFA_NOTIFICATION_INFO_GET_64",
        0xC4000087: "FFA_SECONDARY_EP_REGISTER_64",
        0xC400008B: "FFA_PARTITION_INFO_GET_REGS_64",
        0xC400008D: "FFA_MSG_SEND_DIRECT_REQ2_64",
    }.items():
        assert ids.name(number) == name
        function, smc64 = BY_FID[number]
        assert ids.fid(function.call, smc64) == number


def test_functions_come_and_go_with_versions() -> None:
    assert FUNCTIONS[Call.MSG_POLL].exists(VERSION_1_0, False)
    assert not FUNCTIONS[Call.MSG_POLL].exists(VERSION_1_1, False)
    assert not FUNCTIONS[Call.MSG_SEND2].exists(VERSION_1_0, False)
    assert FUNCTIONS[Call.MSG_SEND2].exists(VERSION_1_1, False)
    assert not FUNCTIONS[Call.CONSOLE_LOG].exists(VERSION_1_1, True)
    assert not FUNCTIONS[Call.MSG_SEND_DIRECT_REQ2].exists(VERSION_1_2, False)
    assert set(FUNCTIONS) == set(Call)


def test_error_frames() -> None:
    assert Frame.failure(Error.NOT_SUPPORTED)[:4] == (0x84000060, 0, 0xFFFFFFFF, 0)
    assert Frame.failure(Error.DENIED).error is Error.DENIED
    assert Frame.of(Call.ERROR, 0, 0xFFFFFF00).error is None  # no code that FF-A knows
    assert Frame.success(1).error is None
    assert repr(Frame.failure(Error.BUSY)) == "<FFA_ERROR 0 fffffffc (BUSY)>"


@given(st.lists(U64, max_size=18))
def test_frames_keep_what_they_are_given(values: list[int]) -> None:
    frame = Frame(*values)
    assert len(frame) == 18
    assert list(frame[: len(values)]) == values
    assert not any(frame[len(values) :])
    assert frame.narrow == tuple(value & 0xFFFFFFFF for value in frame)
    assert frame.narrow.narrow == frame.narrow
    assert frame == Frame(*frame)


@pytest.mark.parametrize("values", [(-1,), (1 << 64,), (0,) * 19])
def test_frames_have_18_registers_of_64_bits(values: tuple[int, ...]) -> None:
    with pytest.raises(ValueError):
        Frame(*values)


@given(U64)
def test_pairs(value: int) -> None:
    assert pair(*halves(value)) == value


# -- memory transactions

RECORDED = bytes.fromhex(
    "00002f00000000000000000000000000"
    "00000000000000002000000001000000"
    "30000000000000000000000000000000"
    "01800200500000000000000000000000"
    "00000000000000000000000000000000"
    "01000000010000000000000000000000"
    "0000b041000000000100000000000000"
)
"""What Linux 7.2 gave OP-TEE 4.10 (FF-A 1.2) to share one page."""


def test_a_recorded_descriptor() -> None:
    found = abi.parse(RECORDED, VERSION_1_2)
    assert (found.sender, found.attributes, found.flags, found.handle, found.tag) == (0, 0x2F, 0, 0, 0)
    assert found.receivers == (abi.Receiver(0x8001, permissions=2, composite=0x50),)
    composite = abi.parse_composite(RECORDED, 0x50)
    assert (composite.pages, composite.count) == (1, 1)
    assert abi.parse_ranges(RECORDED[composite.ranges :]) == [(0x41B00000, 1)]
    assert abi.build(VERSION_1_2, found, [(0x41B00000, 1)]) == RECORDED


def test_sizes_of_each_version() -> None:
    one = abi.Transaction(1, (abi.Receiver(2, 2),), 0x2F)
    sizes = {v: len(abi.build(v, one, [(0, 1)])) for v in VERSIONS}
    assert sizes == {VERSION_1_0: 32 + 16 + 16 + 16, VERSION_1_1: 48 + 16 + 16 + 16, VERSION_1_2: 48 + 32 + 16 + 16}
    assert [codec.size for codec in (layouts.message_11, layouts.message_12)] == [20, 40]
    assert [codec.size for codec in (layouts.partition_10, layouts.partition_11)] == [8, 24]


RECEIVERS = st.lists(
    st.builds(
        abi.Receiver,
        endpoint=U16,
        permissions=st.integers(0, 255),
        flags=st.integers(0, 255),
        impdef=st.tuples(U64, U64),
    ),
    max_size=5,
).map(tuple)
TRANSACTIONS = st.builds(
    abi.Transaction,
    sender=U16,
    receivers=RECEIVERS,
    attributes=st.integers(0, 255),
    flags=U32,
    handle=U64,
    tag=U64,
)
RANGES = st.lists(
    st.tuples(st.integers(0, (1 << 51) - 1).map(lambda page: page << 12), st.integers(1, 255)), max_size=20
)


@given(st.sampled_from(VERSIONS), TRANSACTIONS, RANGES)
def test_what_is_built_is_parsed(version: int, t: abi.Transaction, ranges: list[abi.AddressRange]) -> None:
    blob = abi.build(version, t, ranges)
    found = abi.parse(blob, version)
    assert (found.sender, found.attributes, found.flags) == (t.sender, t.attributes, t.flags)
    assert (found.handle, found.tag) == (t.handle, t.tag)
    assert len(found.receivers) == len(t.receivers)
    for one, other in zip(found.receivers, t.receivers, strict=True):
        assert (one.endpoint, one.permissions, one.flags) == (other.endpoint, other.permissions, other.flags)
        assert one.impdef == (other.impdef if version >= VERSION_1_2 else (0, 0))
        assert one.composite == found.end
    composite = abi.parse_composite(blob, found.end)
    assert (composite.pages, composite.count) == (sum(pages for _, pages in ranges), len(ranges))
    assert abi.parse_ranges(blob[composite.ranges :]) == ranges
    request = abi.parse(abi.build(version, t), version)
    assert all(r.composite == 0 for r in request.receivers)


@given(st.sampled_from(VERSIONS), st.binary(max_size=200), TRANSACTIONS, st.data())
def test_parsers_are_total(version: int, noise: bytes, t: abi.Transaction, data: st.DataObject) -> None:
    blob = bytearray(abi.build(version, t, [(0, 1)]))
    at = data.draw(st.integers(0, len(blob) - 1))
    blob[at] = data.draw(st.integers(0, 255))
    for buf in (noise, bytes(blob), bytes(blob[:at])):
        for parser in (
            lambda b: abi.parse(b, version),
            lambda b: abi.parse_composite(b, at),
            abi.parse_ranges,
            abi.parse_relinquish,
            lambda b: messages.parse_message(b, version),
            lambda b: messages.parse_infos(b, at, version),
        ):
            try:
                parser(buf)
            except FfaError as e:
                if e.code is not Error.INVALID_PARAMETERS:
                    raise


@pytest.mark.parametrize(
    "ranges",
    [
        (0x1001, 1),  # not page-aligned
        (0x1000, 0),  # no pages
        (0x1000, 1 << 32 | 1),  # reserved field set
        ((1 << 64) - 0x1000, 2),  # beyond 64 bits
    ],
)
def test_ranges_that_are_none(ranges: tuple[int, int]) -> None:
    with pytest.raises(FfaError):
        abi.parse_ranges(abi.pack_ranges([ranges]))


def test_the_last_page_of_the_address_space() -> None:
    ranges = [((1 << 64) - 0x1000, 1)]
    assert abi.parse_ranges(abi.pack_ranges(ranges)) == ranges


@pytest.mark.parametrize(
    ("version", "at", "value"),
    [
        (VERSION_1_0, 3, 1),  # reserved
        (VERSION_1_0, 24, 1),  # reserved
        (VERSION_1_1, 24, 32),  # an entry of 1.2
        (VERSION_1_1, 32, 47),  # offset of the entries: in the header
        (VERSION_1_1, 32, 56),  # not 16-aligned
        (VERSION_1_1, 36, 1),  # reserved
        (VERSION_1_1, 56, 1),  # reserved in an entry
        (VERSION_1_2, 24, 24),  # no version's entry
        (VERSION_1_2, 28, 200),  # entries that do not fit
        (VERSION_1_2, 72, 1),  # reserved in an entry
    ],
)
def test_descriptors_that_are_none(version: int, at: int, value: int) -> None:
    blob = bytearray(abi.build(version, abi.Transaction(1, (abi.Receiver(2),)), [(0, 1)]))
    abi.parse(blob, version)
    blob[at] = value
    with pytest.raises(FfaError):
        abi.parse(blob, version)


def test_a_1_2_caller_may_use_entries_of_1_1() -> None:
    blob = abi.build(VERSION_1_1, abi.Transaction(1, (abi.Receiver(2, 2),)))
    assert abi.parse(blob, VERSION_1_2).receivers == (abi.Receiver(2, 2),)


@given(st.lists(st.integers(0, 300), max_size=50))
def test_pages_and_ranges(pages: list[int]) -> None:
    assert abi.page_numbers(abi.ranges_of(pages)) == pages


@given(U64, U32, st.lists(U16, max_size=9))
def test_relinquish(handle: int, flags: int, endpoints: list[int]) -> None:
    found = abi.parse_relinquish(abi.build_relinquish(handle, *endpoints, flags=flags) + b"\xa5")
    assert found == abi.Relinquish(handle, flags, tuple(endpoints))


# -- messages, partitions, notifications


@given(st.sampled_from((VERSION_1_1, VERSION_1_2)), U16, U16, st.binary(max_size=60), st.uuids())
def test_messages(version: int, sender: int, receiver: int, payload: bytes, uuid: UUID) -> None:
    sent = messages.Message(sender, receiver, payload, uuid if version >= VERSION_1_2 else messages.NIL)
    assert messages.parse_message(messages.build_message(sent, version) + b"\xa5", version) == sent


INFOS = st.lists(
    st.builds(messages.PartitionInfo, U16, U16, st.integers(0, 0x7FF), st.uuids()), min_size=1, max_size=12
)


@given(INFOS)
def test_partition_information(infos: list[messages.PartitionInfo]) -> None:
    buf = messages.build_infos(infos, VERSION_1_2, True)
    assert len(buf) == 24 * len(infos)
    assert messages.parse_infos(buf, len(infos), VERSION_1_2) == infos
    old = messages.parse_infos(messages.build_infos(infos, VERSION_1_0, True), len(infos), VERSION_1_0)
    assert [(i.id, i.contexts, i.properties) for i in old] == [(i.id, i.contexts, i.properties & 7) for i in infos]


def test_partition_information_as_recorded() -> None:
    """What OP-TEE 4.10 wrote into Linux' RX."""
    optee = messages.PartitionInfo(0x8001, 4, 0x103, UUID("486178e0-e7f8-11e3-bc5e-0002a5d5c51b"))
    written = bytes.fromhex("0180040003010000486178e0e7f811e3bc5e0002a5d5c51b")
    assert messages.build_infos([optee], VERSION_1_2, True) == written


@given(INFOS)
def test_partition_information_in_registers(infos: list[messages.PartitionInfo]) -> None:
    found: list[messages.PartitionInfo] = []
    last = 0
    while len(found) < len(infos):
        answer = messages.infos_in_registers(infos, len(found), True)
        part, last = messages.infos_from_registers(answer, len(found))
        assert part
        found += part
    assert (found, last) == (infos, len(infos) - 1)


@given(st.uuids())
def test_uuids_in_registers(uuid: UUID) -> None:
    assert messages.uuid_from_words(messages.uuid_to_words(uuid)) == uuid
    assert messages.uuid_from_halves(*messages.uuid_to_halves(uuid)) == uuid


def test_a_uuid_in_registers_is_its_bytes_in_order() -> None:
    uuid = UUID("486178e0-e7f8-11e3-bc5e-0002a5d5c51b")
    assert messages.uuid_to_words(uuid) == (0xE0786148, 0xE311F8E7, 0x02005EBC, 0x1BC5D5A5)


@given(st.lists(st.tuples(U16, st.lists(U16, max_size=3).map(tuple)), max_size=24), st.booleans())
def test_pending_notifications(lists: list[messages.PendingList], smc64: bool) -> None:
    answer, shown = messages.build_pending(lists, smc64)
    found, more = messages.parse_pending(answer)
    assert found == lists[:shown]
    assert more is (shown < len(lists))
    ids_shown = sum(1 + len(vcpus) for _, vcpus in found)
    room = 20 if smc64 else 10
    assert ids_shown <= room
    assert not more or ids_shown + 1 + len(lists[shown][1]) > room


def test_pending_notifications_as_recorded() -> None:
    """A global notification of endpoint 0: OP-TEE 4.10's answer to Linux."""
    answer, _ = messages.build_pending([(0, ())], True)
    assert answer[:8] == (0xC4000061, 0, 0x80, 0, 0, 0, 0, 0)


@given(st.lists(U64, min_size=8, max_size=8), st.booleans())
def test_pending_lists_of_any_registers(values: list[int], smc64: bool) -> None:
    try:
        messages.parse_pending(Frame(ids.fid(Call.SUCCESS, smc64), *values[1:]))
    except FfaError as e:
        if e.code is not Error.INVALID_PARAMETERS:
            raise
