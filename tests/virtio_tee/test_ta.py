"""``virtio-tee ta``: keys and packages as files."""

from __future__ import annotations

import json
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from virtio_tee.__main__ import main

UUID = "f81d4fae-7dec-11d0-a765-00a0c91e6bf6"


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["ta", *arguments])


@pytest.fixture
def key(tmp_path: Path) -> Path:
    assert run("keygen", str(tmp_path / "vendor"), "--algorithm", "ecdsa-p256-sha256").exit_code == 0
    return tmp_path / "vendor.key"


@pytest.fixture
def signed(key: Path) -> Path:
    payload = key.parent / "ta.py"
    payload.write_text("x = 1\n")
    assert run("sign", str(payload), "--uuid", UUID, "--key", str(key), "-o", str(key.parent)).exit_code == 0
    return key.parent / f"{UUID}.ta"


@pytest.mark.feature("Commands: `virtio-tee ta`, keys and signed TA packages")
def test_sign_and_show(signed: Path, key: Path) -> None:
    shown = run("show", str(signed), "--key", str(key.with_suffix(".pem")), "--json")
    assert shown.exit_code == 0
    facts = json.loads(shown.stdout)
    assert facts["uuid"] == UUID
    assert facts["payload_bytes"] == 6
    assert facts["signed_by"].endswith("vendor.pem")


def test_the_private_key_is_readable_by_its_owner_alone(key: Path) -> None:
    assert stat.S_IMODE(key.stat().st_mode) == 0o600


def test_keys_are_not_overwritten(key: Path) -> None:
    before = key.read_bytes()
    assert run("keygen", str(key.with_suffix(""))).exit_code == 2
    assert key.read_bytes() == before


def test_show_refuses_another_key(signed: Path) -> None:
    assert run("keygen", str(signed.parent / "other"), "--algorithm", "ecdsa-p256-sha256").exit_code == 0
    shown = run("show", str(signed), "--key", str(signed.parent / "other.pem"))
    assert shown.exit_code == 1
    assert "no trusted key" in shown.stderr


def test_show_of_something_else(tmp_path: Path) -> None:
    other = tmp_path / "x.ta"
    other.write_bytes(b"#!/bin/sh\n" * 10)
    shown = run("show", str(other))
    assert shown.exit_code == 1
    assert "not a TA package" in shown.stderr


class TestMistakes:
    def test_folders_that_are_not_there(self, key: Path) -> None:
        payload = key.parent / "ta.py"
        payload.write_text("x = 1\n")
        assert run("keygen", str(key.parent / "no" / "x"), "--algorithm", "ecdsa-p256-sha256").exit_code == 1
        assert run("keygen", "").exit_code == 2
        refused = run("sign", str(payload), "--uuid", UUID, "--key", str(key), "-o", str(key.parent / "tas"))
        assert refused.exit_code == 2
        assert "mkdir" in refused.stderr

    def test_a_payload_that_is_no_module(self, key: Path) -> None:
        payload = key.parent / "ta.py"
        payload.write_text("not py(\n")
        refused = run("sign", str(payload), "--uuid", UUID, "--key", str(key), "-o", str(key.parent))
        assert refused.exit_code == 2
        assert "ta.py" in refused.stderr

    def test_keys_that_are_none(self, signed: Path, key: Path) -> None:
        noise = signed.parent / "noise"
        noise.write_bytes(bytes(99))
        assert run("show", str(signed), "--key", str(noise)).exit_code == 2
        public = key.with_suffix(".pem")
        refused = run("sign", str(signed.parent / "ta.py"), "--uuid", UUID, "--key", str(public))
        assert refused.exit_code == 2
        assert "private" in refused.stderr

    def test_a_private_key_where_a_public_one_belongs(self, signed: Path, key: Path) -> None:
        refused = run("show", str(signed), "--key", str(key))
        assert refused.exit_code == 2
        assert f"{key} is a private key" in refused.stderr
        assert str(key.with_suffix(".pem")) in refused.stderr
        served = CliRunner().invoke(main, ["serve", "-s", str(key.parent / "no" / "s"), "--ta-key", str(key)])
        assert served.exit_code == 2
        assert f"{key} is a private key" in served.stderr
