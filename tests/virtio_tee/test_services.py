"""What the commands say that a supplicant is to serve."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from tee.io import supplicant_process
from tee.io.supplicant import Services
from virtio_tee import demo
from virtio_tee.__main__ import main
from virtio_tee.attach import supplicant_of

UUID = "96bcf744-4f72-4866-bf1d-8634fd9c65e5"


def test_the_supplicant_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the very options that a parent gives to its child."""
    given: list[list[str]] = []

    def child(arguments: list[str]) -> int:
        given.append(arguments)
        return 0

    monkeypatch.setattr(supplicant_process, "main", child)
    services = Services(
        (str(tmp_path),),
        *(str(tmp_path / "fs"), 5, 6, False, ("h:1", "[::1]:*"), (f"{UUID}=os:getcwd",), True),
    )
    arguments = ["--fd", "7", *services.arguments()]
    shown = CliRunner().invoke(main, ["supplicant", *arguments])
    assert shown.exit_code == 0, shown.output
    assert given == [arguments]


@pytest.mark.parametrize("command", [["supplicant", "--fd", "7"], ["guest", "demo"], ["guest", "invoke", UUID, "0"]])
@pytest.mark.parametrize(
    ("option", "why"), [(["--allow-socket", "h"], "HOST:PORT"), (["--plugin", "x=y:z"], "plug-in")], ids=lambda o: o[0]
)
def test_wrong_usage(command: list[str], option: list[str], why: str) -> None:
    shown = CliRunner().invoke(main, [*command, *option])
    assert shown.exit_code == 2
    assert why in shown.stderr


def test_a_folder_that_cannot_be_used(tmp_path: Path) -> None:
    first = supplicant_of(Services(fs_folder=str(tmp_path / "fs")))
    shown = CliRunner().invoke(main, ["guest", "demo", "--socket", "/nowhere", "--fs-folder", str(tmp_path / "fs")])
    first.close()
    assert shown.exit_code == 1
    assert "another supplicant uses this folder" in shown.stderr


def test_a_guest_makes_its_folder(tmp_path: Path) -> None:
    tas = demo._prepare(tmp_path)
    shown = CliRunner().invoke(
        main,
        ["guest", "demo", "--socket", "/nowhere", "--ta-folder", str(tas), "--fs-folder", str(tmp_path / "fs")],
    )
    assert shown.exit_code == 1
    assert "the TEE device cannot be used" in shown.stderr
    assert (tmp_path / "fs").is_dir()
