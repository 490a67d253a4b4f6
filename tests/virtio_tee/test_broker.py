"""The command: what it refuses, and what it says then."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from click.testing import CliRunner

from virtio_tee.broker import broker


def said(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(broker, list(arguments))
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "say --vm NAME=PATH"),
        (["--vm", "a"], "say NAME=PATH or NAME=fd:N"),
        (["--vm", "a=x", "--vm", "a=y"], "the same --vm twice"),
        (["--vm", "a=x", "--fs-vm", "b"], "--fs-vm b is no --vm"),
        (["--vm", "a=x", "--socket-mode", "9"], "say it as 0660"),
    ],
)
def test_wrong_usage(arguments: list[str], text: str) -> None:
    code, output = said(*arguments)
    assert code == 2
    assert text in output


def test_no_device(tmp_path: Path) -> None:
    code, output = said("--vm", f"a={tmp_path / 's'}", "--device", str(tmp_path / "teepriv0"))
    assert code == 1
    assert "is the TEE's driver loaded" in output
    assert not (tmp_path / "s").exists()


def test_a_device_that_is_none(tmp_path: Path) -> None:
    code, output = said("--vm", f"a={tmp_path / 's'}", "--device", os.devnull)
    assert code == 1
    assert os.devnull in output


def test_sockets_of_systemd(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """They are the VMs that they are named after; here the device is missing only then."""
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "2")
    monkeypatch.setenv("LISTEN_FDNAMES", "web1:web1")
    assert "the same --vm twice" in said()[1]
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()))
    monkeypatch.setenv("LISTEN_FDS", "1")
    monkeypatch.setenv("LISTEN_FDNAMES", "web1")
    code, output = said("--fs-vm", "web2")
    assert (code, "--fs-vm web2 is no --vm" in output) == (2, True)


def test_a_socket_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("somebody's")
    code, output = said("--vm", f"a={tmp_path / 's'}")
    assert code == 1
    assert "is not a socket" in output
    assert (tmp_path / "s").read_text() == "somebody's"
