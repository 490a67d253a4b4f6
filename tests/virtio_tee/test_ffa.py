"""``virtio-tee ffa``: what it prints and how it exits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from virtio_tee.__main__ import main

TRACES = sorted((Path(__file__).resolve().parents[1] / "data" / "ffa").glob("*.jsonl"))


@pytest.mark.parametrize("path", TRACES, ids=lambda p: p.stem)
def test_replay_prints_what_it_promises(path: Path) -> None:
    result = CliRunner().invoke(main, ["ffa", "replay", str(path), "--json"])
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert found["differences"] == []
    assert found["calls"] == found["matched"] == len(found["answers"]) > 50
    assert found["computed"] > found["from_trace"] > 0
    assert found["computed"] == sum(a["computed"] for a in found["answers"])
    assert found["from_trace"] == sum(a["from_trace"] for a in found["answers"])


def test_replay_of_several_files_is_one_session(tmp_path: Path) -> None:
    lines = TRACES[0].read_text().splitlines(keepends=True)
    first, second = tmp_path / "1.jsonl", tmp_path / "2.jsonl"
    first.write_text("".join(lines[:100]))
    second.write_text("".join(lines[100:]))
    result = CliRunner().invoke(main, ["ffa", "replay", str(first), str(second), "--json"])
    assert (result.exit_code, json.loads(result.stdout)["calls"]) == (0, 58)


def test_replay_exits_1_for_a_difference_and_shows_it(tmp_path: Path) -> None:
    trace = tmp_path / "changed.jsonl"
    text = TRACES[0].read_text()
    trace.write_text(text.replace('"0x84000061", "0x0", "0x1", "0x18"', '"0x84000061", "0x0", "0x2", "0x18"'))
    result = CliRunner().invoke(main, ["ffa", "replay", str(trace)])
    assert result.exit_code == 1
    assert "FFA_PARTITION_INFO_GET, answer" in result.stdout
    assert "recorded <FFA_SUCCESS 0 2 18>" in result.stdout
    assert "computed <FFA_SUCCESS 0 1 18>" in result.stdout


def test_replay_refuses_what_is_no_trace(tmp_path: Path) -> None:
    trace = tmp_path / "no.jsonl"
    trace.write_bytes(b"\xff\xfe")
    assert CliRunner().invoke(main, ["ffa", "replay", str(trace)]).exit_code == 2
    trace.write_text("{}\n")
    result = CliRunner().invoke(main, ["ffa", "replay", str(trace)])
    assert result.exit_code == 2
    assert "no.jsonl:1" in result.stderr
