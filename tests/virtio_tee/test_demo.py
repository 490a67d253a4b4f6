"""The demo: two real processes; what it prints is a contract."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from tee.soft.examples import UUIDS
from virtio_tee.__main__ import main


def demo(*arguments: str) -> tuple[int, dict[str, Any]]:
    done = subprocess.run(
        [sys.executable, "-m", "virtio_tee", "demo", "--json", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, json.loads(done.stdout)


@pytest.mark.feature("Commands: `virtio-tee demo`, the main job as two processes")
@pytest.mark.parametrize("tee", ["soft", "ffa"])
def test_the_main_job(tee: str) -> None:
    code, seen = demo("--tee", tee)
    assert code == 0
    assert (seen["result"], seen["path"], seen["tee"]) == ("ok", "virtio", tee)
    assert seen["ta_loaded_over_rpc"] is True
    commands = [rpc["command"] for rpc in seen["rpcs"]]
    # three TAs, each asked for twice (size, data), with memory for it
    assert commands.count("LOAD_TA") == 6
    assert commands.count("SHM_ALLOC") == commands.count("SHM_FREE") == 3
    assert {rpc["answered_by"] for rpc in seen["rpcs"]} == {"guest"}
    assert seen["requests"] >= 15
    assert seen["elapsed_s"] > 0


@pytest.mark.feature("Commands: `virtio-tee demo --path ffa`, the main job over OP-TEE's partition")
def test_the_main_job_over_ffa() -> None:
    code, seen = demo("--path", "ffa")
    assert code == 0
    assert (seen["result"], seen["path"], seen["tee"]) == ("ok", "ffa", "soft")
    assert seen["ta_loaded_over_rpc"] is True
    commands = [rpc["command"] for rpc in seen["rpcs"]]
    assert commands.count("LOAD_TA") == 6
    assert commands.count("SHM_ALLOC") == commands.count("SHM_FREE") == 3
    assert {rpc["answered_by"] for rpc in seen["rpcs"]} == {"guest"}
    assert seen["requests"] >= 15
    code, seen = demo("--path", "ffa", "--without-ta", "random")
    assert (code, seen["result"]) == (1, "failed")
    assert "ITEM_NOT_FOUND" in seen["why"]
    device = CliRunner().invoke(main, ["demo", "--path", "ffa", "--device"])
    assert (device.exit_code, "--device" in device.output) == (2, True)
    both = CliRunner().invoke(main, ["demo", "--path", "ffa", "--tee", "ffa"])
    assert (both.exit_code, "--tee" in both.output) == (2, True)


def test_a_ta_that_is_not_there(tmp_path: Path) -> None:
    code, seen = demo("--without-ta", "random")
    assert code == 1
    assert seen["result"] == "failed"
    assert "random" in seen["why"]
    assert "ITEM_NOT_FOUND" in seen["why"]


def test_a_ta_removed_by_hand(tmp_path: Path) -> None:
    assert demo("--folder", str(tmp_path))[0] == 0
    (tmp_path / "guest" / "optee_armtz" / f"{UUIDS['hello_world']}.ta").unlink()
    code, seen = demo("--folder", str(tmp_path))
    assert code == 1
    assert seen["ta_loaded_over_rpc"] is False
    assert "hello_world" in seen["why"]


@pytest.mark.parametrize("lost", ["vendor.key", "vendor.pem"])
def test_a_folder_that_lacks_a_key(tmp_path: Path, lost: str) -> None:
    """Nothing is made over what is left there."""
    assert demo("--folder", str(tmp_path))[0] == 0
    (tmp_path / lost).unlink()
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    refused = CliRunner().invoke(main, ["demo", "--folder", str(tmp_path), "--json"])
    assert refused.exit_code == 2
    assert f"no {lost}" in refused.stderr
    assert "an empty folder" in refused.stderr
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_folder_that_lacks_tas(tmp_path: Path) -> None:
    assert demo("--folder", str(tmp_path))[0] == 0
    assert demo("--folder", str(tmp_path), "--without-ta", "probe")[0] == 1
    code, seen = demo("--folder", str(tmp_path))
    assert code == 1
    assert "lacks probe: put back" in seen["why"]


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    for arguments in (["--device", "--folder", str(tmp_path)], ["--ta-folder", str(tmp_path)]):
        refused = CliRunner().invoke(main, ["demo", *arguments])
        assert refused.exit_code == 2
        assert "--device" in refused.stderr


def test_a_machine_without_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guest_driver.virtio_pci.PCI_DEVICES", tmp_path)
    for device in ("--device", "--device=0000:00:03.0"):
        refused = CliRunner().invoke(main, ["demo", "--ta-folder", str(tmp_path), device])
        assert refused.exit_code == 1
        assert "no TEE device" in refused.stderr


def test_a_ta_of_another_vendor(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    assert demo("--folder", str(one))[0] == 0
    assert demo("--folder", str(two))[0] == 0
    name = f"guest/optee_armtz/{UUIDS['hello_world']}.ta"
    (one / name).write_bytes((two / name).read_bytes())
    code, seen = demo("--folder", str(one))
    assert code == 1
    assert "SECURITY" in seen["why"]


def test_the_timeline_is_readable() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "virtio_tee", "demo"], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    for words in ("who sent what to whom", "RPC LOAD_TA", "supplicant", "result: ok"):
        assert words in shown


@pytest.mark.feature("Commands: `virtio-tee demo --scenario services|enclaves`, on both paths")
@pytest.mark.parametrize("path", ["virtio", "ffa"])
@pytest.mark.parametrize(
    ("scenario", "last"), [("services", "remove it again: refused"), ("enclaves", "its name is gone")]
)
def test_services_and_enclaves(scenario: str, last: str, path: str) -> None:
    code, seen = demo("--scenario", scenario, "--path", path)
    assert code == 0, seen
    assert (seen["result"], seen["path"]) == ("ok", path)
    assert (seen["steps"][-1]["name"], seen["steps"][-1]["detail"]) == (last, "ITEM_NOT_FOUND")
    assert all(step["ok"] for step in seen["steps"])
    assert seen["rpcs"] == []  # what is loaded as a service is asked of nobody


def test_a_scenario_that_fails() -> None:
    code, seen = demo("--scenario", "services", "--without-ta", "stage")
    assert (code, seen["result"]) == (1, "failed")
    assert str(UUIDS["stage"]) in seen["why"]


def test_scenarios_have_names() -> None:
    from virtio_tee import attach
    from virtio_tee.scenario import SCENARIOS, WITH_FILES

    assert (*SCENARIOS, *WITH_FILES) == attach.SCENARIOS
