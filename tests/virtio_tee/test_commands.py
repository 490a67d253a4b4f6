"""Every command explains itself; wrong usage ends with 2; what README promises exists."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from virtio_tee.__main__ import COMMANDS, main

ROOT = Path(__file__).parents[2]


def walk(command: click.Command, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], click.Command]]:
    found = [(path, command)]
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            below = command.get_command(context, name)
            assert below is not None
            found += walk(below, (*path, name))
    return found


ALL = walk(main, ())


@pytest.mark.parametrize(("path", "command"), ALL, ids=[" ".join(path) or "virtio-tee" for path, _ in ALL])
def test_help_teaches(path: tuple[str, ...], command: click.Command) -> None:
    shown = CliRunner().invoke(main, [*path, "--help"])
    assert shown.exit_code == 0
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and not parameter.hidden:
            assert parameter.opts[-1] in shown.output


def test_there_is_no_help_without_words() -> None:
    silent = [
        f"{' '.join(path)} {parameter.name}"
        for path, command in ALL
        for parameter in command.params
        if isinstance(parameter, click.Option)
        and not parameter.help
        and parameter.name not in ("algorithm", "ta_version")
    ]
    assert silent == []


@pytest.mark.parametrize("name", COMMANDS)
def test_an_unknown_option_is_wrong_usage(name: str) -> None:
    assert CliRunner().invoke(main, [name, "--no-such-option"]).exit_code == 2


def test_serve_prints_its_capabilities_whatever_else_is_said() -> None:
    shown = CliRunner().invoke(main, ["serve", "--socket-path", "/nowhere/x", "--print-capabilities"])
    assert shown.exit_code == 0
    assert json.loads(shown.stdout)["type"] == "tee"


def test_serve_wants_something_to_serve() -> None:
    shown = CliRunner().invoke(main, ["serve"])
    assert shown.exit_code == 2
    assert "socket" in shown.stderr


def test_the_description_file_for_qemu() -> None:
    """QEMU's docs/interop/vhost-user.json: description, type and binary are needed, names start with two digits."""
    (path,) = (ROOT / "docs" / "vhost-user").glob("*.json")
    assert re.match(r"\d\d-", path.name)
    facts = json.loads(path.read_text())
    assert facts["type"] == "tee"
    assert facts["binary"].endswith("/vhost-user-tee")
    assert facts["description"]
    assert "vhost-user-tee = virtio_tee.serve:serve" in (ROOT / "setup.cfg").read_text()


def test_options_in_the_documents_exist() -> None:
    known = {name for _, command in ALL for p in command.params for name in (*p.opts, *p.secondary_opts)} | {"--help"}
    for document in (ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in ("qemu", "tas", "operation"))):
        for line in re.findall(r"virtio-tee ((?:serve|demo|guest|ta|decode|supplicant)[^`\n]*)", document.read_text()):
            for option in re.findall(r"(?<!\S)--[a-z-]+", line):
                assert option in known, f"{document.name}: {option}"


def test_a_storage_key_that_is_too_short(tmp_path: Path) -> None:
    key = tmp_path / "key"
    key.write_bytes(b"short")
    shown = CliRunner().invoke(main, ["serve", "-s", str(tmp_path / "s"), "--storage-key", str(key)])
    assert shown.exit_code == 2
    assert "16" in shown.stderr


@pytest.mark.parametrize("fd", range(3, 10))
def test_an_fd_that_was_not_inherited(fd: int) -> None:
    """It may become a socket of the process's own, and must not be taken for a frontend then."""
    done = subprocess.run(
        [sys.executable, "-m", "virtio_tee", "serve", "--fd", str(fd)],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 2
    assert f"--fd {fd}" in done.stderr


def test_errors_name_the_place(tmp_path: Path) -> None:
    nowhere = str(tmp_path / "no" / "x.sock")
    for argv in (["serve", "-s", nowhere], ["guest", "info", "--socket", nowhere]):
        shown = CliRunner().invoke(main, argv)
        assert shown.exit_code == 1
        assert nowhere in shown.stderr


def test_parameters_that_make_no_sense() -> None:
    uuid = "8aaaf200-2450-11e4-abe2-0002a5d5c51b"
    for word in ("inout:", "in:x", "mem-out:99999999999", "mem-out:-1", "what"):
        shown = CliRunner().invoke(main, ["guest", "invoke", uuid, "0", "--socket", "/nowhere", word])
        assert shown.exit_code == 2
        assert word in shown.stderr


def test_a_supplicant_without_a_socket() -> None:
    shown = CliRunner().invoke(main, ["supplicant", "--fd", "777"])
    assert shown.exit_code == 1
    assert not isinstance(shown.exception, OSError)


def test_a_key_that_is_none(tmp_path: Path) -> None:
    key = tmp_path / "random.pem"
    key.write_bytes(bytes(100))
    shown = CliRunner().invoke(main, ["serve", "-s", str(tmp_path / "s"), "--ta-key", str(key)])
    assert shown.exit_code == 2
    assert str(key) in shown.stderr


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--tee", "hard"], "say soft, ffa, linux"),
        (["--tee", "linux:"], "say soft, ffa, linux"),
        (["--tee", "soft:/dev/tee0"], "say soft, ffa, linux"),
        (["--tee", "linux", "--threads", "4"], "--threads does not go with --tee linux"),
        (["--tee", "linux", "--built-in-tas"], "--built-in-tas does not go with --tee linux"),
        (["--tee-threads", "4"], "--tee-threads does not go with --tee soft"),
        (["--tee", "ffa", "--tee-threads", "4"], "--tee-threads does not go with --tee ffa"),
        (["--tee", "linux", "--ffa-vm", "1"], "--ffa-vm goes with --tee ffa"),
        (["--no-zero-copy"], "--no-zero-copy does not go with --tee soft"),
        (["--tee", "linux", "--host-logins", "-s", "/nowhere/y"], "one identity of several guests"),
    ],
)
def test_options_of_the_tees(arguments: list[str], why: str) -> None:
    shown = CliRunner().invoke(main, ["serve", "-s", "/nowhere/x", *arguments])
    assert shown.exit_code == 2
    assert why in shown.stderr


@pytest.mark.parametrize(
    ("path", "why"), [("/dev/no-tee9", "there is no such TEE device"), ("/dev/null", "this is no TEE device")]
)
def test_a_tee_device_that_cannot_be_used(path: str, why: str) -> None:
    for command in (
        ["serve", "-s", "/nowhere/x", "--tee", f"linux:{path}"],
        ["guest", "info", "--tee", path],
        ["demo", "--device", path],
    ):
        shown = CliRunner().invoke(main, command)
        assert shown.exit_code == 1
        assert f"{path}: {why}" in shown.stderr


def test_one_device_only() -> None:
    shown = CliRunner().invoke(main, ["guest", "info", "--tee", "/dev/tee0", "--socket", "/x"])
    assert shown.exit_code == 2
