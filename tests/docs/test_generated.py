"""The documentation agrees with the definitions, and what it promises about itself holds."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from device import messages, wire
from device.machines import MACHINES
from device.requests import STATUS_RESULT
from pyvhost.codec import Codec
from tee.rpc import GRPC_UUID, RpcCommand

ROOT = Path(__file__).resolve().parents[2]
SPECIFICATION = (ROOT / "docs/specification.md").read_text(encoding="utf-8")
KEYWORD = re.compile(r"\b(MUST|SHOULD|MAY)\b")
LAYOUTS = sorted(name for name, value in vars(wire).items() if hasattr(value, "subcons"))


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs/generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["docs_generate"] = module
    spec.loader.exec_module(module)
    return module


generate = _load()
REQUIREMENTS = generate.requirement_list(SPECIFICATION)
HEADINGS = [found[2].strip() for found in generate.HEADING.finditer(SPECIFICATION)]
PROSE = generate.BLOCK.sub("", SPECIFICATION)


# -- the files as they are


def test_the_documents_are_what_the_definitions_say() -> None:
    stale = [str(path.relative_to(ROOT)) for path, _ in generate.drifted()]
    assert not stale, "run `make docs`"


@pytest.mark.parametrize("path", generate.files(), ids=lambda p: p.name)
def test_links_between_documents_resolve(path: Path) -> None:
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, fragment = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists():
            missing.append(target)
        elif fragment and file.suffix == ".md":
            there = [generate.anchor(h[2]) for h in generate.HEADING.finditer(file.read_text(encoding="utf-8"))]
            if there.count(fragment) != 1:
                missing.append(target)
    assert not missing


# -- requirements


def test_requirement_ids_are_unique_and_complete() -> None:
    ids = [requirement.id for requirement in REQUIREMENTS]
    assert len(ids) == len(set(ids))
    assert set(re.findall(r"\*\*\[([^\]]+)\]\*\*", SPECIFICATION)) == set(ids)
    assert len(ids) > 150


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.id)
def test_a_requirement_says_what_is_required(requirement: object) -> None:
    assert KEYWORD.search(requirement.text)  # type: ignore[attr-defined]


def test_nothing_is_required_outside_of_a_requirement() -> None:
    rest = generate.REQUIREMENT.sub("", PROSE)
    allowed = ("The key words MUST", "A **device** conforms", "A **driver** conforms")
    paragraphs = [" ".join(p.split()) for p in re.split(r"\n\n", rest)]
    assert [p for p in paragraphs if KEYWORD.search(p) and not p.startswith(allowed)] == []


def test_requirements_that_the_text_refers_to_exist() -> None:
    ids = {requirement.id for requirement in REQUIREMENTS}
    assert set(re.findall(r"\b(?:DEV|DRV)-[A-Z]+-\d+\b", SPECIFICATION)) <= ids


SHOWN = generate.shown_requirements()


@pytest.mark.parametrize("requirement", REQUIREMENTS, ids=lambda r: r.id)
def test_a_requirement_has_a_test_or_a_reason(requirement: Any) -> None:
    assert requirement.id in SHOWN or generate.reason(requirement.id)


def test_reasons_are_few_and_for_what_has_no_test() -> None:
    assert set(generate.REASONS) <= {requirement.id for requirement in REQUIREMENTS} - set(SHOWN)
    assert len(generate.REASONS) < 6


def test_features_have_the_requirements_that_the_specification_says() -> None:
    """Those of "Conformance", of both sides."""
    conformance = PROSE.partition("## Conformance")[2].partition("## Versions")[0]
    said = dict(re.findall(r"DEV-([A-Z]{3}) to ([A-Z_]+)\b", " ".join(conformance.split())))
    groups = {group: feature.name for group, feature in generate.OF_FEATURES.items() if "-" not in group}
    assert groups | {"INL": "INLINE", "RPC": "RPC"} == said
    assert set(said.values()) == set(wire.Feature.__members__)


@pytest.mark.requirement("DEV-VHU-2")
def test_the_documentation_says_what_a_pause_is() -> None:
    section = (ROOT / "docs/operation.md").read_text(encoding="utf-8").partition("## Pauses, snapshots")[2]
    said = " ".join(section.partition("\n## ")[0].split())
    assert "stops the device's rings, not the TEE" in said
    assert "writes to memory that the guest has shared for them while the guest is paused" in said


# -- completeness


@pytest.mark.parametrize("name", [*wire.Request.__members__, *wire.Event.__members__, *wire.Feature.__members__])
def test_every_request_event_and_feature_has_a_section(name: str) -> None:
    assert HEADINGS.count(name) == 1


@pytest.mark.parametrize("status", list(wire.Status), ids=lambda s: s.name)
def test_every_status_is_explained_and_used(status: wire.Status) -> None:
    assert wire.STATUS_DOCS[status]
    assert status in STATUS_RESULT
    assert re.search(rf"\b{status.name}\b", PROSE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_stands_in_the_specification_once_and_is_aligned(name: str) -> None:
    assert SPECIFICATION.count(f"<!-- generated: layout {name} -->") == 1
    codec = Codec(name, getattr(wire, name))
    assert codec.size % 8 == 0
    for field in codec.fields:
        if field.kind in {"le16", "le32", "le64"}:
            assert field.offset % field.size == 0
        assert field.docs, f"{name}.{field.name} is not described"


def test_every_number_is_described() -> None:
    assert set(wire.REQUEST_DOCS) == set(wire.Request) == set(messages.REQUESTS)
    assert set(wire.EVENT_DOCS) == set(wire.Event) == set(messages.EVENTS)
    assert set(wire.FEATURE_DOCS) == set(wire.Feature)
    assert set(wire.QUEUE_DOCS) == set(wire.Queue)
    assert set(wire.RPC_SERVERS) == set(RpcCommand)


def test_numbers_in_prose_are_those_of_the_code() -> None:
    largest = messages.EVENT_HEADER.size + messages.EVENTS[wire.Event.RPC].codec.size
    assert f"{largest} + {messages.PARAM.size} × `max_params`" in PROSE
    assert f"fewer than {messages.RESPONSE_HEADER.size} writable bytes" in PROSE
    assert f"fewer than {messages.REQUEST_HEADER.size} readable bytes" in PROSE
    assert f"`{wire.MAGIC:#x}`" in PROSE
    assert str(wire.SERVICES_UUID) in PROSE
    assert str(GRPC_UUID) in PROSE
    assert f"{wire.MAX_CHAIN} nested calls" in PROSE
    assert f"`command` {RpcCommand.OCALL:#x}" in PROSE
    assert "Version {}.{}.".format(*wire.SPEC_VERSION) in PROSE
    calls = re.search(r"\| call \| [^:]+: ([^|]+) \|", PROSE)
    assert calls is not None
    assert set(calls[1].split(", ")) == {request.name for request in messages.CALLS}


def test_the_commands_of_the_services_pseudo_ta_mirror_the_requests() -> None:
    rows = re.findall(r"^\| 0x([0-9a-f]+) ([A-Z_]+) \|", PROSE, re.MULTILINE)
    assert {name: int(number, 16) for number, name in rows} == {
        request.name: int(request) for request in wire.Request if request.name.startswith(("SERVICE_", "ENCLAVE_"))
    }


# -- the generator itself


def test_a_layout_table_shows_offsets_sizes_and_types() -> None:
    text = generate.layout("ResponseHeader")
    assert text.splitlines()[0] == "`ResponseHeader`, 16 bytes:"
    assert "| 8 | 4 | le32 | `ret` |" in text
    assert "| 28 | 4 | u8[4] | *reserved* | must be zero |" in generate.layout("RequestHeader")


@pytest.mark.parametrize("name", list(MACHINES))
def test_a_state_diagram_has_every_transition(name: str) -> None:
    text = generate.machine(name)
    for (state, event), (after, _) in MACHINES[name].transitions.items():
        assert re.search(rf"^    {state.name} --> {after.name} : [^/\n]*\b{event.name}\b", text, re.MULTILINE)


@pytest.mark.parametrize(
    "what", ["nonsense", "layout", "layout Nonsense", "layout Queue", "enum Config", "machine Nonsense", "queues x"]
)
def test_a_block_that_cannot_be_filled_is_an_error(what: str) -> None:
    with pytest.raises(generate.DocsError):
        generate.block(what, "")


def test_a_block_without_end_is_an_error() -> None:
    with pytest.raises(generate.DocsError, match="no end"):
        generate.fill("<!-- generated: queues -->\nx\n", "")


SAMPLE = """
import pytest
pytestmark = [pytest.mark.requirement("DEV-ID-1")]

@pytest.mark.feature("Memory: regions")
@pytest.mark.requirement("DEV-MEM-1", "DEV-MEM-2")
def test_one(): ...

@pytest.mark.lab
class TestTwo:
    @pytest.mark.feature("Memory: regions")
    async def test_three(self): ...
"""


def test_markers_are_found_in_functions_classes_and_modules(tmp_path: Path) -> None:
    (tmp_path / "tests/device").mkdir(parents=True)
    (tmp_path / "tests/device/test_x.py").write_text(SAMPLE, encoding="utf-8")
    found = {(m.node, m.marker, m.arguments) for m in generate.marked_tests(tmp_path)}
    file = "tests/device/test_x.py"
    assert found == {
        (file, "requirement", ("DEV-ID-1",)),
        (f"{file}::test_one", "feature", ("Memory: regions",)),
        (f"{file}::test_one", "requirement", ("DEV-MEM-1", "DEV-MEM-2")),
        (f"{file}::TestTwo::test_three", "feature", ("Memory: regions",)),
    }


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of two documents, one specification and one test."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests/test_x.py").write_text(SAMPLE, encoding="utf-8")
    (tmp_path / "docs/specification.md").write_text(
        "## Things\n\n- **[DEV-ID-1]** It MUST be.\n- **[DEV-MEM-1]** It MUST\n  last.\n- **[DEV-MEM-2]** It MAY go.\n"
        "\n<!-- generated: queues -->\nold\n<!-- end generated -->\n",
        encoding="utf-8",
    )
    (tmp_path / "README.md").write_text("<!-- generated: features -->\n<!-- end generated -->\n", encoding="utf-8")
    (tmp_path / "docs/requirements.md").write_text(
        "<!-- generated: requirements -->\n<!-- end generated -->\n", encoding="utf-8"
    )
    monkeypatch.setattr(generate, "ROOT", tmp_path)
    return tmp_path


def test_check_names_what_drifted_and_changes_nothing(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {path: path.read_text(encoding="utf-8") for path in generate.files()}
    assert generate.main(["--check"]) == 1
    assert "docs/specification.md differs from the definitions (queues)" in capsys.readouterr().err
    assert {path: path.read_text(encoding="utf-8") for path in generate.files()} == before
    assert generate.main([]) == 0
    assert generate.main(["--check"]) == 0


def test_features_and_requirements_name_their_tests(elsewhere: Path) -> None:
    assert generate.main([]) == 0
    readme = (elsewhere / "README.md").read_text(encoding="utf-8")
    one, three = "[`test_one`](tests/test_x.py)", "[`TestTwo::test_three`](tests/test_x.py)"
    assert f"| **Memory** |  |\n| regions | {one}, {three} |" in readme
    requirements = (elsewhere / "docs/requirements.md").read_text(encoding="utf-8")
    assert "| [DEV-MEM-1](specification.md#things) | It MUST last. | [`test_one`](../tests/test_x.py) |" in requirements
    assert "| [DEV-ID-1](specification.md#things) | It MUST be. | [`test_x.py`](../tests/test_x.py) |" in requirements


def test_a_test_of_an_unknown_requirement_is_an_error(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (elsewhere / "tests/test_y.py").write_text(
        'import pytest\n\n@pytest.mark.requirement("DEV-XYZ-9")\ndef test_y(): ...\n', encoding="utf-8"
    )
    assert generate.main(["--check"]) == 1
    assert "DEV-XYZ-9" in capsys.readouterr().err


def test_a_requirement_without_test_and_reason_is_an_error(
    elsewhere: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guest_driver.core.DRIVER_FEATURES", wire.Feature.INLINE)
    with (elsewhere / "docs/specification.md").open("a", encoding="utf-8") as file:
        file.write("\n- **[DEV-MEM-3]** It MUST be shown.\n- **[DRV-ENC-1]** It MUST wait.\n")
    assert generate.main([]) == 1
    assert capsys.readouterr().err.endswith("no reason why: DEV-MEM-3\n")
    monkeypatch.setitem(generate.REASONS, "DEV-MEM-3", "Nobody can see it.")
    assert generate.main([]) == 0
    requirements = (elsewhere / "docs/requirements.md").read_text(encoding="utf-8")
    assert "| It MUST be shown. | *Nobody can see it.* |" in requirements
    assert "| It MUST wait. | *This driver does not accept ENCLAVES.* |" in requirements
    assert "5 requirements: 3 with a test, 2 with a reason why not." in requirements


def test_it_runs_as_a_program() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/generate.py"), "--nonsense"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "usage" in done.stderr
