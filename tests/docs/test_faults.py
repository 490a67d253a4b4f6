"""docs/faults.md: its rows are kept true by their tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.test_generated import ROOT, generate

ROW = '[[group.fault]]\nid = "{0}"\nevent = "e {0}"\nguest = "g"\ndevice = "d"\ntee = "t"\n'
GOOD = "import pytest\n\n@pytest.mark.fault({0})\ndef test_it(): ...\n"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "docs/faults.toml").write_text('[[group]]\ntitle = "All"\n' + ROW.format("one"))
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    return tmp_path


def test_the_table(elsewhere: Path) -> None:
    (elsewhere / "tests/test_x.py").write_text(GOOD.format('"one"'))
    assert generate.faults("../") == (
        "### All\n\n| what happens | guest | device | TEE | shown by |\n| --- | --- | --- | --- | --- |\n"
        "| e one | g | d | t | [`test_it`](../tests/test_x.py) |\n"
    )


@pytest.mark.parametrize(
    ("test", "why"),
    [
        ("", "no test that always runs"),
        (GOOD.format('"two"'), "not at all"),
        (GOOD.format('"one", "two"'), "not at all"),
        ("import pytest\n@pytest.mark.skip\n@pytest.mark.fault('one')\ndef test_it(): ...\n", "no test"),
        (
            "import pytest\n@pytest.mark.skipif(True, reason='')\n@pytest.mark.fault('one')\ndef test_it(): ...\n",
            "no test",
        ),
        ("import pytest\n@pytest.mark.lab\n@pytest.mark.fault('one')\ndef test_it(): ...\n", "no test"),
        ("import pytest\n@pytest.mark.fault('one')\n@pytest.mark.xfail\ndef test_it(): ...\n", "no test"),
        ("import pytest\npytestmark = pytest.mark.lab\n" + GOOD.format('"one"'), "no test"),
        ("import pytest\n@pytest.mark.fault('one')\ndef test_it():\n    pytest.skip('today')\n", "no test"),
        (
            "import pytest\n@pytest.mark.lab\nclass TestX:\n    @pytest.mark.fault('one')\n    def test_it(s): ...\n",
            "no test",
        ),
    ],
)
def test_a_row_that_nothing_shows(elsewhere: Path, test: str, why: str) -> None:
    (elsewhere / "tests/test_x.py").write_text(test)
    with pytest.raises(generate.DocsError, match=why):
        generate.faults("")


@pytest.mark.parametrize(
    "rows", [ROW.format("one") * 2, ROW.format("one") + 'more = "x"\n', '[[group.fault]]\nid = "x"\n']
)
def test_rows_that_are_no_good(elsewhere: Path, rows: str) -> None:
    (elsewhere / "tests/test_x.py").write_text(GOOD.format('"one"'))
    (elsewhere / "docs/faults.toml").write_text('[[group]]\ntitle = "All"\n' + rows)
    with pytest.raises(generate.DocsError):
        generate.faults("")


def test_the_rows_that_must_be_there() -> None:
    """Whoever takes one of these away takes a promise back."""
    text = (ROOT / "docs/faults.toml").read_text(encoding="utf-8")
    ids = {row.id for rows in generate.fault_list(text).values() for row in rows}
    asked = """
        cut-request impossible-attributes huge-sizes foreign-ids stale-ids changed-request late-answer wrong-answer
        guest-dies client-killed no-supplicant slow-supplicant restarted-supplicant lying-supplicant one-thread
        event-buffers quota pause-in-call backend-restart memory-removed"""
    assert set(asked.split()) <= ids
