"""``virtio-tee decode``: bytes made by hand (from the specification, never from our own output) become fields."""

from __future__ import annotations

import contextlib
import doctest
import json
import shlex
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from device import messages
from device.wire import Request
from virtio_tee import decode as module
from virtio_tee.cli_decode import EXAMPLES
from virtio_tee.cli_decode import decode as command
from virtio_tee.decode import (
    KINDS,
    Decoded,
    HexError,
    Node,
    decode,
    parse_hex,
    render_json,
    render_text,
    request_type,
)

INVOKE = """
    12 00 00 00  00 00 00 00                            # type INVOKE, flags
    88 77 66 55 44 33 22 11                             # epoch
    07 00 00 00 00 00 00 00  02 00 00 00  00 00 00 00   # tag 7, context 2
    03 00 00 00  2a 00 00 00  04 00 00 00  00 00 00 00  # session 3, func 42, 4 parameters
    03 00 00 00 00 00 00 00  01 00 00 00 00 00 00 00    # VALUE_INOUT 1
    02 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00    #   2, 3
    06 00 00 00 00 00 00 00  10 00 00 00 00 00 00 00    # MEMREF_OUT offset 16
    00 01 00 00 00 00 00 00  09 00 00 00 00 00 00 00    #   256 bytes of region 9
    05 01 00 00 00 00 00 00  00 00 00 00 00 00 00 00    # MEMREF_IN | META
    00 00 00 00 00 00 00 00  ff ff ff ff ff ff ff ff    #   NULL
    05 00 01 00 00 00 00 00  00 00 00 00 00 00 00 00    # MEMREF_IN | INLINE
    05 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00    #   5 bytes
    68 65 6c 6c 6f 00 00 00                             # "hello", padded
"""


def leaves(nodes: list[Node]) -> Iterator[Node]:
    for node in nodes:
        if node.type:
            yield node
        yield from leaves(node.fields)


def values(decoded: Decoded) -> dict[str, object]:
    """The last value of each name."""
    return {node.name: node.value for node in leaves(decoded.fields)}


def meanings(decoded: Decoded) -> dict[str, str]:
    return {node.name: node.meaning for node in leaves(decoded.fields)}


# -- the device's messages


@pytest.mark.feature("Commands: `virtio-tee decode`, any wire format to readable fields")
def test_a_request_with_every_sort_of_parameter() -> None:
    it = decode("request", parse_hex(INVOKE))
    assert it.errors == []
    assert [node.name for node in it.fields] == [
        "RequestHeader",
        "Invoke",
        "param 0",
        "param 1",
        "param 2",
        "param 3",
        "inline data of param 3",
    ]
    header, body, *params, inline = it.fields
    assert {node.name: node.value for node in header.fields} == {
        "type": 0x12,
        "flags": 0,
        "epoch": 0x1122334455667788,
        "tag": 7,
        "context": 2,
    }
    assert header.fields[0].meaning == "INVOKE: have a TA run a command"
    assert {node.name: node.value for node in body.fields} == {"session": 3, "func": 42, "num_params": 4}
    assert [node.value for node in params[0].fields] == [3, 1, 2, 3]
    assert [param.meaning for param in params] == [
        "VALUE_INOUT",
        "MEMREF_OUT, 256 bytes, offset 16 of region 9",
        "MEMREF_IN | META, 0 bytes, NULL",
        "MEMREF_IN | INLINE, 5 bytes, in the request",
    ]
    assert (inline.offset, inline.value) == (0xB0, b"hello")
    assert params[1].fields[3].offset == 0x68


def test_text_shows_offset_name_type_value_and_meaning() -> None:
    lines = render_text(decode("request", parse_hex(INVOKE))).splitlines()
    assert lines[0] == "request, 184 bytes"
    assert "    0x0000  type              le32      0x00000012  INVOKE: have a TA run a command" in lines
    assert "    0x0008  epoch             le64      0x1122334455667788" in lines
    assert "  param 1: MEMREF_OUT, 256 bytes, offset 16 of region 9" in lines
    assert '  0x00b0  inline data of param 3 u8[5]     68 656c6c6f  "hello"' in lines


def test_a_request_that_is_cut_short_is_shown_as_far_as_it_goes() -> None:
    it = decode("request", parse_hex(INVOKE)[:0x45])
    assert values(it)["func"] == 42
    assert it.fields[-1].fields[-1].value == bytes.fromhex("0200000000")
    assert it.errors == [
        "offset 0x30: param 0 is cut short: 21 of 32 bytes",
        "4 × Param announced, 1 there",
    ]


def test_wrong_headers_and_trailing_bytes_are_errors_with_their_place() -> None:
    text = "12 00 00 00  01 00 00 00 " + "00" * 8 + "00" * 8 + "00 00 00 00  00 00 00 05" + "00" * 16 + "ab cd"
    it = decode("request", parse_hex(text))
    assert it.errors == [
        "offset 0x1c: a reserved field of RequestHeader is not zero",
        "unknown flags 0x1 in the header",
        "the tag is 0",
        "the context is 0",
        "offset 0x30: 2 bytes more than the format has",
    ]
    assert it.fields[-1].value == b"\xab\xcd"


def test_a_huge_count_costs_nothing() -> None:
    text = "12000000 00000000" + "01" * 8 + "01" * 8 + "01000000 00000000" + "01000000 01000000 ffffffff 00000000"
    assert decode("request", parse_hex(text)).errors == ["4294967295 × Param announced, 0 there"]


def test_ranges_of_a_registration() -> None:
    it = decode(
        "request",
        parse_hex("""
            20 00 00 00  00 00 00 00  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00  03 00 00 00  00 00 00 00
            01 00 00 00  02 00 00 00  00 30 00 00 00 00 00 00     # READ_ONLY, 2 ranges, 0x3000 bytes
            00 00 00 80 01 00 00 00   00 10 00 00 00 00 00 00
            00 00 34 12 00 00 00 00   00 20 00 00 00 00 00 00
        """),
    )
    assert it.errors == []
    assert meanings(it)["flags"] == "READ_ONLY"
    assert [tuple(node.value for node in one.fields) for one in it.fields[-2:]] == [
        (0x1_8000_0000, 0x1000),
        (0x1234_0000, 0x2000),
    ]


def test_uuids_and_logins_have_their_usual_form() -> None:
    it = decode(
        "request",
        parse_hex("""
            10 00 00 00  00 00 00 00  01 00 00 00 00 00 00 00  02 00 00 00 00 00 00 00  03 00 00 00  00 00 00 00
            8a aa f2 00  24 50 11 e4  ab e2 00 02  a5 d5 c5 1b
            00 00 00 00  00 00 00 00  00 00 00 00  00 00 00 00   00 00 00 80   00 00 00 00
        """),
    )
    assert it.errors == []
    assert meanings(it)["uuid"] == "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
    assert meanings(it)["client_login"] == "REE_KERNEL"


def test_a_response_needs_to_know_its_request() -> None:
    data = parse_hex("00000000 00000000  10 00 ff ff  04 00 00 00   05 00 00 00  00 00 00 00")
    opened = decode("response", data, request_type=Request.OPEN_SESSION)
    assert opened.errors == []
    assert values(opened)["session"] == 5
    assert meanings(opened)["ret"] == "SHORT_BUFFER"
    assert meanings(opened)["origin"] == "TRUSTED_APP"
    unknown = decode("response", data)
    assert len(unknown.errors) == 1
    assert "--request-type" in unknown.errors[0]
    assert unknown.fields[-1].value == bytes.fromhex("0500000000000000")


def test_a_refusal_is_a_header_alone() -> None:
    it = decode("response", parse_hex("0b000000 01000000 0e00ffff 02000000"), request_type=Request.INVOKE)
    assert it.errors == []
    assert meanings(it) == {"status": "ABANDONED", "flags": "MAY_HAVE_RUN", "ret": "COMMUNICATION", "origin": "COMMS"}


def test_inline_output_in_a_response() -> None:
    it = decode(
        "response",
        parse_hex("""
            00000000 00000000 00000000 04000000   02000000 00000000
            06 00 01 00 00 00 00 00  00 00 00 00 00 00 00 00  03 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
            07 00 01 00 00 00 00 00  00 00 00 00 00 00 00 00  08 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
            61 62 63 00 00 00 00 00   31 32 33 34 35 36 37 38
        """),
        request_type=Request.INVOKE,
    )
    assert it.errors == []
    assert [node.value for node in it.fields[-2:]] == [b"abc", b"12345678"]


def test_services_in_a_response() -> None:
    it = decode(
        "response",
        parse_hex("""
            00000000 00000000 00000000 03000000   05000000 01000000
            8aaaf200 245011e4 abe20002 a5d5c51b   07000000 01000100 05000000 00000000
            68656c6c 6f000000 00000000 00000000   00000000 00000000 00000000 00000000
        """),
        request_type=Request.SERVICE_LIST,
    )
    assert it.errors == []
    assert meanings(it)["api_level"] == "1.1"
    assert meanings(it)["name"] == '"hello"'
    assert it.fields[-1].fields[3].meaning == "BUILT_IN | IN_USE"


def test_an_rpc_event() -> None:
    it = decode(
        "event",
        parse_hex("""
            01 80 00 00  00 00 00 00  2a 00 00 00 00 00 00 00
            09 00 00 00  00 10 00 00  01 00 00 00  e8 03 00 00
            07 00 00 00 00 00 00 00   02 00 00 00  03 00 00 00   01 00 00 00  00 00 00 00
            03 01 00 00 00 00 00 00   11 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00  00 00 00 00 00 00 00 00
        """),
    )
    assert it.errors == []
    assert meanings(it)["command"] == "OCALL"
    assert meanings(it)["target"] == "CLIENT"
    assert values(it)["deadline_ms"] == 1000
    assert values(it)["call"] == 7
    assert it.fields[-1].meaning == "VALUE_INOUT | META"


@pytest.mark.parametrize("kind", ["request", "event"])
def test_an_unknown_type_is_shown_as_bytes(kind: str) -> None:
    it = decode(kind, b"\x99\x99\x00\x00" + bytes(28) + b"rest")
    assert any("unknown" in error and "0x9999" in error for error in it.errors)
    assert it.fields[-1].value is not None


def test_the_configuration_space() -> None:
    text = """
        56 54 45 45  00 00  01 00  08 07 06 05 04 03 02 01
        01 00 00 00  01 00 00 00  00 00 00 00  0d 00 00 00
        02 00 00 00  20 00 00 00  00 04 00 00  18 00 00 00
    """
    it = decode("config", parse_hex(text) + bytes(128 - 48))
    assert it.errors == []
    assert values(it)["epoch"] == 0x0102030405060708
    assert values(it)["num_event_buffers"] == 32
    assert values(it)["event_buffer_size"] == 1024
    assert meanings(it)["tee_kind"] == "SOFT"
    assert meanings(it)["tee_gen_caps"] == "GP | REG_MEM | MEMREF_NULL"


def test_another_vendors_configuration_space() -> None:
    it = decode("config", b"\0" * 128)
    assert it.errors[0] == "offset 0x0: Config.magic is not 0x45455456"


def test_an_attestation_statement() -> None:
    it = decode(
        "statement",
        parse_hex("56 54 41 54  01 00 00 00" + "11" * 16 + "05000000 02000000" + "22" * 32 + "33" * 32 + "44" * 32)
        + parse_hex("42 30 00 70  04 00 00 00  de ad be ef"),
    )
    assert it.errors == []
    assert meanings(it)["algorithm"] == "ecdsa-p256-sha256"
    assert meanings(it)["tee_kind"] == "LINUX"
    assert values(it)["signature"] == b"\xde\xad\xbe\xef"


# -- vhost-user, TA packages, descriptors


def test_vhost_user_messages_one_after_another() -> None:
    it = decode(
        "vhost-user",
        parse_hex("""
            01 00 00 00  01 00 00 00  00 00 00 00
            01 00 00 00  05 00 00 00  08 00 00 00   03 00 00 70 01 00 00 00
            0c 00 00 00  09 00 00 00  08 00 00 00   02 01 00 00 00 00 00 00
            05 00 00 00  01 00 00 00  48 00 00 00   01 00 00 00  00 00 00 00
            00 00 00 40 00 00 00 00  00 00 10 00 00 00 00 00  00 00 00 00 ff 7f 00 00  00 10 00 00 00 00 00 00
        """)
        + bytes(32),
    )
    assert it.errors == []
    said = [node.meaning for node in leaves(it.fields) if node.name == "request"]
    assert said == ["GET_FEATURES", "GET_FEATURES", "SET_VRING_KICK", "SET_MEM_TABLE"]
    shown = [node.meaning for node in leaves(it.fields) if node.name == "value"]
    assert shown == [
        "INLINE | RPC | INDIRECT_DESC | EVENT_IDX | PROTOCOL_FEATURES | VERSION_1",
        "ring 2, no fd",
    ]
    assert values(it)["guest_addr"] == 0x4000_0000
    assert values(it)["user_addr"] == 0x7FFF_0000_0000
    assert it.fields[-1].value == bytes(32)


def test_vhost_user_backend_channel() -> None:
    it = decode("vhost-user-backend", parse_hex("02000000 09000000 00000000"))
    assert it.errors == []
    assert meanings(it)["request"] == "CONFIG_CHANGE_MSG"
    assert meanings(it)["flags"] == "version 1 | NEED_REPLY"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("63000000 01000000 00000000", "unknown vhost-user request 99"),
        ("01000000 02000000 00000000", "version 2 in the header's flags"),
        ("02000000 01000000 08000000 0102", "the payload is cut short: 2 of 8 bytes"),
        ("02000000 01000000 02000000 0102", "a payload of 2 bytes where u64 has 8"),
        ("02000000 0100", "header is cut short"),
        ("05000000 01000000 08000000 ffffffff 00000000", "4294967295 regions announced, 0 there"),
    ],
)
def test_vhost_user_messages_that_are_wrong(text: str, error: str) -> None:
    assert any(error in line for line in decode("vhost-user", parse_hex(text)).errors)


def test_a_ta_package() -> None:
    head = parse_hex("48 53 54 4f  01 00 00 00  05 00 00 00  42 30 00 70  20 00  40 00")
    identity = parse_hex("8aaaf200 245011e4 abe20002 a5d5c51b  03 00 00 00")
    digest = sha256(head + identity + b"pass\n").digest()
    data = head + digest + b"\x77" * 64 + identity + b"pass\n"
    it = decode("ta-package", data)
    assert it.errors == []
    assert meanings(it)["algo"] == "ecdsa-p256-sha256"
    assert meanings(it)["uuid"] == "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
    assert meanings(it)["hash"].startswith("fits")
    assert (values(it)["ta_version"], values(it)["payload"]) == (3, b"pass\n")
    assert decode("ta-package", data[:-1] + b"\r").errors == [
        "the hash is not the SHA-256 of header, UUID, version and payload"
    ]
    assert "payload is cut short" in decode("ta-package", data[:-2]).errors[0]
    assert "more than the format has" in decode("ta-package", data + b"\0").errors[0]


def test_descriptors() -> None:
    it = decode(
        "descriptors",
        parse_hex("""
            00 10 00 00 00 00 00 00  40 00 00 00  01 00  01 00
            00 20 00 00 00 00 00 00  00 02 00 00  02 00  00 00
            00 30 00 00 00 00 00 00  20 00 00 00  04 00  00 00
        """),
    )
    assert it.errors == []
    assert [node.meaning for node in it.fields] == [
        "device reads, 64 bytes, then 1",
        "device writes, 512 bytes",
        "table of descriptors, 32 bytes",
    ]


# -- anything at all


def check(it: Decoded, data: bytes) -> None:
    """What holds for every result."""
    assert it.size == len(data)
    for node in leaves(it.fields):
        assert node.size >= 0
        assert node.offset + node.size <= len(data)
    json.dumps(render_json(it))
    lines = render_text(it).splitlines()
    assert sum(line.startswith("  error: ") for line in lines) == len(it.errors)


@given(data=st.binary(max_size=400), kind=st.sampled_from(sorted(KINDS)), number=st.integers(0, 2**32 - 1) | st.none())
def test_any_bytes_decode(data: bytes, kind: str, number: int | None) -> None:
    check(decode(kind, data, request_type=number), data)


@given(request=st.sampled_from(sorted(Request)), head=st.binary(min_size=28, max_size=28), rest=st.binary(max_size=300))
def test_any_body_of_a_known_request_decodes(request: Request, head: bytes, rest: bytes) -> None:
    data = request.to_bytes(4, "little") + head + rest
    check(decode("request", data), data)
    answer = bytes(16) + rest
    check(decode("response", answer, request_type=request), answer)


@given(st.sampled_from(sorted(messages.EVENTS)), st.binary(max_size=200))
def test_any_body_of_a_known_event_decodes(event: int, rest: bytes) -> None:
    data = event.to_bytes(4, "little") + rest
    check(decode("event", data), data)


@given(st.integers(0, 60), st.integers(0, 15), st.binary(max_size=200), st.sampled_from(["", "-backend"]))
def test_any_payload_of_a_vhost_user_message_decodes(number: int, flags: int, rest: bytes, end: str) -> None:
    data = b"".join(n.to_bytes(4, "little") for n in (number, flags, len(rest))) + rest
    check(decode(f"vhost-user{end}", data), data)


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"vhost-user", "vhost-user-backend", "descriptors"}))
def test_no_bytes_are_too_few(kind: str) -> None:
    assert "cut short: 0 of" in decode(kind, b"").errors[0]


@given(st.text(max_size=200) | st.text(alphabet="0123456789abcdefx: \n|*#", max_size=200))
def test_any_text_is_hex_or_a_hex_error(text: str) -> None:
    with contextlib.suppress(HexError):
        parse_hex(text)


# -- hex as people paste it


@pytest.mark.parametrize(
    "text",
    [
        "12ab00ff",
        "12 AB 00 ff",
        "12ab 00ff\n",
        "0x12, 0xab, 0x0, 0xff",
        "{ 0x12, 0xab,\n  0x00, 0xff };",
        '"\\x12\\xab\\x00\\xff"',
        "0x12ab00ff",
        "12:ab:00:ff",
        "12 ab  # a comment: 99\n00 ff",
        "00000000: 12ab 00ff                                ....",
        "00000000: 12 ab 00 ff  ....",
        "00000000  12 ab 00 ff                                       |....|\n00000004\n",
    ],
)
def test_ways_to_write_bytes(text: str) -> None:
    assert parse_hex(text) == b"\x12\xab\x00\xff"


def test_dumps_of_several_lines() -> None:
    xxd = "00000000: 4142 4344 4546 4748 494a 4b4c 4d4e 4f50  ABCDEFGHIJKLMNOP\n00000010: 51                        Q\n"
    hexdump = (
        "00000000  41 42 43 44 45 46 47 48  49 4a 4b 4c 4d 4e 4f 50  |ABCDEFGHIJKLMNOP|\n"
        "00000010  51                                                |Q|\n00000011\n"
    )
    assert parse_hex(xxd) == parse_hex(hexdump) == b"ABCDEFGHIJKLMNOPQ"


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("12 3", "3 hex digits"),
        ("12\nzz", "line 2: 'zz' is not hex"),
        ("12 34\n*\n", "line 2: lines were left out"),
        ("0x", "line 1: '0x' is not hex"),
    ],
)
def test_text_that_is_no_hex(text: str, error: str) -> None:
    with pytest.raises(HexError, match=error):
        parse_hex(text)


@pytest.mark.parametrize(("text", "number"), [("INVOKE", 0x12), ("open-session", 0x10), ("0x101", 0x101), ("16", 16)])
def test_request_types_by_name_or_number(text: str, number: int) -> None:
    assert request_type(text) == number


# -- the command


@pytest.mark.parametrize("line", EXAMPLES.splitlines())
def test_the_examples_in_the_help_work(line: str) -> None:
    arguments = shlex.split(line)
    assert arguments[:2] == ["virtio-tee", "decode"]
    done = CliRunner().invoke(command, arguments[2:])
    assert done.exit_code == 0, done.output
    assert line in CliRunner().invoke(command, ["--help"], terminal_width=200).output


def test_the_documented_example_of_the_module_holds() -> None:
    assert doctest.testmod(module).failed == 0


def test_a_file_may_be_binary_or_hex(tmp_path: Path) -> None:
    data = parse_hex(INVOKE)
    (tmp_path / "binary").write_bytes(data)
    (tmp_path / "text").write_text(INVOKE, encoding="ascii")
    runner = CliRunner()
    answers = [runner.invoke(command, ["request", str(tmp_path / name), "--json"]) for name in ("binary", "text")]
    answers.append(runner.invoke(command, ["request", "--json"], input=data))
    answers.append(runner.invoke(command, ["request", "--json", "--hex", INVOKE]))
    assert [answer.exit_code for answer in answers] == [0] * 4
    assert len({answer.stdout for answer in answers}) == 1
    it = json.loads(answers[0].stdout)
    assert (it["kind"], it["size"], it["errors"]) == ("request", 184, [])
    assert it["fields"][6] == {
        "name": "inline data of param 3",
        "offset": 0xB0,
        "size": 5,
        "type": "u8[5]",
        "value": "68656c6c6f",
    }


def test_raw_takes_hex_digits_as_bytes(tmp_path: Path) -> None:
    (tmp_path / "digits").write_bytes(b"0102030405060708")
    done = CliRunner().invoke(command, ["descriptors", "--raw", "--json", str(tmp_path / "digits")])
    assert json.loads(done.stdout)["size"] == 16


def test_exit_codes() -> None:
    runner = CliRunner()
    assert runner.invoke(command, ["event", "--hex", "0480"]).exit_code == 1
    assert runner.invoke(command, ["event", "--hex", "048"]).exit_code == 2
    assert runner.invoke(command, ["event"], input="what is this").exit_code == 2
    assert runner.invoke(command, ["nonsense", "--hex", "00"]).exit_code == 2
    assert runner.invoke(command, ["response", "--hex", "00", "--request-type", "X"]).exit_code == 2
    assert runner.invoke(command, ["event", "/nonexistent"]).exit_code == 2


def test_list_explains_every_kind() -> None:
    done = CliRunner().invoke(command, ["--list"])
    assert done.exit_code == 0
    assert [line.split()[0] for line in done.output.splitlines()] == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_file_is_an_error(kind: str, tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    for arguments in ([str(tmp_path / "empty")], ["--hex", ""], ["--hex", "# nothing", "--json"]):
        shown = CliRunner().invoke(command, [kind, *arguments])
        assert shown.exit_code == 1
        assert "no bytes to decode" in shown.stdout or "cut short: 0 of" in shown.stdout
