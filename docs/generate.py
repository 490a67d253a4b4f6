"""Fills the generated blocks of the documentation from the definitions in the code. ``make docs`` runs it.

    python docs/generate.py            rewrite docs/*.md and README.md
    python docs/generate.py --check    change nothing; name what differs and exit 1

A block stands between two marks, the first of which names what belongs there::

    <!-- generated: layout Config -->
    <!-- end generated -->

========================  ==================================================================================
layout NAME               the fields of the construct definition NAME in device/wire.py
enum NAME                 numbers and names of an enum in device/wire.py
queues, feature-bits      the device's queues and feature bits
requests, events          types, their layouts, and what they take
statuses                  status codes, when they come and which result goes with each
rpc-commands              RPC commands, who serves each, and the answer where nobody does
metrics                   what ``serve --metrics`` tells
machine NAME              the state diagram of ``device.machines.MACHINES[NAME]``
features                  what works, by tests with ``@pytest.mark.feature("Group: title")``
requirements              all requirements, and tests with ``@pytest.mark.requirement("DEV-CTX-3", …)``
faults                    what docs/faults.toml says, and tests with ``@pytest.mark.fault("quota", …)``
conformance               the public lists of FF-A tests, and the cases that cover them
calls                     what a guest's programs call, by tests with ``@pytest.mark.call("TEE_IOC_INVOKE", …)``
========================  ==================================================================================
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from device import messages, wire  # noqa: E402
from device.messages import Body, Tail  # noqa: E402
from device.requests import STATUS_RESULT  # noqa: E402
from ffa.conformance import runner  # noqa: E402, F401  (fills CASES)
from ffa.conformance.lists import LISTS  # noqa: E402
from ffa.conformance.registry import CASES  # noqa: E402
from pyvhost.codec import Codec, Field  # noqa: E402
from tee.results import describe  # noqa: E402
from tee.rpc import RpcCommand, describe_command  # noqa: E402

SPECIFICATION = "docs/specification.md"
FAULTS = "docs/faults.toml"
BLOCK = re.compile(r"<!-- generated: (?P<what>[^\n]+?) -->\n(?P<old>.*?)<!-- end generated -->", re.DOTALL)
REQUIREMENT = re.compile(
    r"^- \*\*\[(?P<id>(?:DEV|DRV)-[A-Z]{2,4}-\d+)\]\*\* (?P<text>.+?)(?=^- |^\n|\Z)", re.DOTALL | re.MULTILINE
)
HEADING = re.compile(r"^(#{1,6}) (.+)$", re.MULTILINE)


class DocsError(Exception):
    """A block that cannot be filled: its author's mistake."""


# -- small helpers for Markdown


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; bars within cells are escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |\n" for line in lines)


def anchor(heading: str) -> str:
    """The fragment by which a heading is linked, as GitHub makes it."""
    text = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip()).lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


def _heading_for(name: str) -> str:
    return f"[{name}](#{anchor(name)})"


# -- blocks made of the wire definitions


def _definition(name: str) -> Any:
    definition = getattr(wire, name, None)
    if not hasattr(definition, "subcons"):
        raise DocsError(f"device/wire.py defines no layout {name!r}")
    return definition


def layout(name: str) -> str:
    """The table of one layout."""
    codec = Codec(name, _definition(name))
    rows = [[str(f.offset), str(f.size), _kind(f), _name(f), f.docs] for f in codec.fields]
    return f"`{name}`, {codec.size} bytes:\n\n" + table(["offset", "size", "type", "field", "description"], rows)


def _kind(field: Field) -> str:
    return field.kind


def _name(field: Field) -> str:
    return f"*{field.name}*" if field.name in {"reserved", "ignored"} else f"`{field.name}`"


def enum(name: str) -> str:
    """Numbers and names of an enum."""
    cls = getattr(wire, name, None)
    if not (isinstance(cls, type) and issubclass(cls, Enum)):
        raise DocsError(f"device/wire.py defines no enum {name!r}")
    return table([f"`{name}`", "name"], [[str(member.value), member.name] for member in cls])


def queues() -> str:
    """The virtqueues."""
    rows = []
    for queue in wire.Queue:
        many = queue is wire.Queue.REQUEST
        name = "request queues" if many else f"{queue.name.lower()} queue"
        rows.append([f"{int(queue)}{' …' if many else ''}", name, wire.QUEUE_DOCS[queue]])
    return table(["number", "name", "for"], rows)


def feature_bits() -> str:
    """The device's own feature bits."""
    rows = [[str(f.value.bit_length() - 1), _heading_or_name(f), wire.FEATURE_DOCS[f]] for f in wire.Feature]
    return table(["bit", "name", "meaning"], rows)


def _heading_or_name(feature: wire.Feature) -> str:
    name = feature.name or "?"
    return _heading_for(name)


def _body(body: Body | None) -> str:
    if body is None or not (body.codec.size or body.tail is not Tail.NONE):
        return "–"
    return f"`{body.codec.name}`" + ("" if body.tail is Tail.NONE else f" + {body.tail.value}")


def requests() -> str:
    """The request types."""
    rows = []
    for number, kind in messages.REQUESTS.items():
        request = wire.Request(number)
        rows.append(
            [
                f"0x{number:04x}",
                _heading_for(request.name),
                wire.REQUEST_DOCS[request],
                kind.queue.name.lower(),
                kind.feature.name or "–",
                "yes" if kind.context else "0",
                _body(kind.body),
                _body(kind.response),
            ]
        )
    return table(["type", "name", "what it is for", "queue", "feature", "context", "body", "response"], rows)


def events() -> str:
    """The event types."""
    features = {
        wire.Event.RPC: wire.Feature.RPC,
        wire.Event.RPC_WITHDRAWN: wire.Feature.RPC,
        wire.Event.NOTIFICATION: wire.Feature.NOTIFICATION,
    }
    rows = []
    for number, body in messages.EVENTS.items():
        event = wire.Event(number)
        feature = features.get(event)
        rows.append(
            [
                f"0x{number:04x}",
                _heading_for(event.name),
                wire.EVENT_DOCS[event],
                (feature.name or "–") if feature else "–",
                _body(body),
            ]
        )
    return table(["type", "name", "what it says", "feature", "body"], rows)


def statuses() -> str:
    """The status codes."""
    rows = []
    for status in wire.Status:
        code = "the TEE's" if status is wire.Status.OK else describe(STATUS_RESULT[status])
        rows.append([str(int(status)), status.name, wire.STATUS_DOCS[status], code])
    return table(["status", "name", "when", "`ret`"], rows)


def rpc_commands() -> str:
    """The RPC commands."""
    rows = []
    for command, (server, code) in wire.RPC_SERVERS.items():
        ocall = command == RpcCommand.OCALL
        rows.append(
            [
                hex(command) if ocall else str(command),
                "OCALL" if ocall else describe_command(command),
                server.value,
                describe(code),
            ]
        )
    rows.append(["others", "", "supplicant, if the device lets them pass", "NOT_SUPPORTED"])
    return table(["command", "name", "served by the guest's", "otherwise the TEE gets"], rows)


def metrics() -> str:
    """What ``serve --metrics`` tells."""
    from host_backend.metrics import DEFINITIONS

    suffix = {"counter": "_total"}
    rows = [[f"`{d.name}{suffix.get(d.kind, '')}`", d.kind, ", ".join(d.labels), d.help] for d in DEFINITIONS]
    return table(["metric", "kind", "labels", "what"], rows)


# -- state machines


def machine(name: str) -> str:
    """A state diagram, and what its states and events mean."""
    from device.machines import MACHINES

    if name not in MACHINES:
        raise DocsError(f"device/machines.py has no machine {name!r}; it has {', '.join(MACHINES)}")
    it = MACHINES[name]
    arrows: dict[tuple[str, str, str], list[str]] = {}
    states: dict[Enum, None] = {it.initial: None}
    events: dict[Enum, None] = {}
    for (state, event), (after, action) in it.transitions.items():
        states[state] = states[after] = None
        events[event] = None
        does = "" if action.name == "NONE" else str(action.value)
        arrows.setdefault((state.name, after.name, does), []).append(event.name)
    lines = ["```mermaid", "stateDiagram-v2", f"    [*] --> {it.initial.name}"]
    for (before, after_name, does), names in arrows.items():
        label = ", ".join(names) + (f" / {does}" if does else "")
        lines.append(f"    {before} --> {after_name} : {re.sub('[:;]', ',', label)}")
    lines += [f"    {state.name} --> [*]" for state in states if state in it.final]
    lines.append("```")
    meaning = table(["state", "meaning"], [[s.name, str(s.value)] for s in states])
    happens = table(["event", "meaning"], [[e.name, str(e.value)] for e in events])
    return "\n".join(lines) + f"\n\n{meaning}\n{happens}"


# -- requirements and tests


@dataclass(frozen=True, slots=True)
class Requirement:
    """One numbered requirement: its id, its whole text on one line, and the heading that it stands under."""

    id: str
    text: str
    heading: str


def requirement_list(specification: str) -> list[Requirement]:
    """All requirements of a specification's text, in order."""
    headings = [(found.start(), found[2]) for found in HEADING.finditer(specification)]
    out = []
    for found in REQUIREMENT.finditer(specification):
        under = [heading for at, heading in headings if at < found.start()]
        out.append(Requirement(found["id"], " ".join(found["text"].split()), under[-1] if under else ""))
    return out


@dataclass(frozen=True, slots=True)
class Marked:
    """A test (or class, or module) with a marker: ``node`` as pytest names it, and the marker's arguments."""

    node: str
    marker: str
    arguments: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the fault table: what happens, and what each side sees of it."""

    id: str
    event: str
    guest: str
    device: str
    tee: str


def marked_tests(root: Path) -> list[Marked]:
    """What markers the tests under ``root`` carry, by reading their source."""
    out: list[Marked] = []
    for path in sorted((root / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        out += _marked(tree, path.relative_to(root).as_posix())
    return out


def _marked(tree: ast.Module | ast.ClassDef, node: str) -> Iterator[Marked]:
    for child in tree.body:
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{node}::{child.name}"
            for decorator in child.decorator_list:
                yield from _markers(decorator, name)
            if isinstance(child, ast.ClassDef):
                yield from _marked(child, name)
        elif isinstance(child, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "pytestmark" for target in child.targets
        ):
            values = child.value.elts if isinstance(child.value, ast.List | ast.Tuple) else [child.value]
            for value in values:
                yield from _markers(value, node)


def _markers(expression: ast.expr, node: str) -> Iterator[Marked]:
    marker = _marker_name(expression.func) if isinstance(expression, ast.Call) else ""
    if not isinstance(expression, ast.Call) or not marker:
        return
    arguments = tuple(
        argument.value
        for argument in expression.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    )
    yield Marked(node, marker, arguments)


def _marker_name(function: ast.expr) -> str:
    """Of ``pytest.mark.NAME``, or of the short names that modules give themselves: ``requirement = pytest.mark…``."""
    if isinstance(function, ast.Name):
        return function.id if function.id in ("requirement", "feature") else ""
    if isinstance(function, ast.Attribute) and isinstance(function.value, ast.Attribute):
        return function.attr if function.value.attr == "mark" else ""
    return ""


def _proof(nodes: list[str], prefix: str, most: int = 3) -> str:
    """Links to tests, the first few of them."""
    links = []
    for node in nodes[:most]:
        path, _, name = node.partition("::")
        links.append(f"[`{name or path.rpartition('/')[2]}`]({prefix}{path})")
    if len(nodes) > most:
        links.append(f"and {len(nodes) - most} more")
    return ", ".join(links) or "—"


OF_FEATURES = {
    "NOT": wire.Feature.NOTIFICATION,
    "FFA": wire.Feature.FFA_HANDLE,
    "OCA": wire.Feature.OCALL,
    "SVC": wire.Feature.SERVICES,
    "ATT": wire.Feature.ATTESTATION,
    "ENC": wire.Feature.ENCLAVES,
    "DEV-EVT-3": wire.Feature.NOTIFICATION,
}
"""Group of requirements, or one of them → the feature that they belong to (see "Conformance" in the specification)."""

REASONS: dict[str, str] = {}
"""Why there is no test of a requirement that belongs to no missing feature."""


def reason(ident: str) -> str:
    """Why no test shows a requirement: "" if there is no good reason for that."""
    from guest_driver.core import DRIVER_FEATURES
    from host_backend.epoch import IMPLEMENTED_FEATURES

    side, group, _ = ident.split("-")
    feature = OF_FEATURES.get(ident) or OF_FEATURES.get(group, wire.Feature(0))
    if feature & ~(IMPLEMENTED_FEATURES if side == "DEV" else DRIVER_FEATURES):
        does = "device does not offer" if side == "DEV" else "driver does not accept"
        return f"This {does} {feature.name}."
    return REASONS.get(ident, "")


def features(prefix: str) -> str:
    """What works, and the tests that prove it: there is no row without a test."""
    groups: dict[str, dict[str, list[str]]] = {}
    for test in marked_tests(ROOT):
        if test.marker == "feature":
            for title in test.arguments:
                group, _, name = title.rpartition(": ")
                groups.setdefault(group or "Other", {}).setdefault(name, []).append(test.node)
    rows = []
    for group, titles in groups.items():
        rows.append([f"**{group}**", ""])
        rows += [[title, _proof(nodes, prefix)] for title, nodes in titles.items()]
    return table(["feature", "what proves it"], rows or [["nothing yet", "—"]])


def shown_requirements() -> dict[str, list[str]]:
    """The tests that are marked with a requirement, by its id."""
    shown: dict[str, list[str]] = {}
    for test in marked_tests(ROOT):
        if test.marker == "requirement":
            for ident in test.arguments:
                shown.setdefault(ident, []).append(test.node)
    return shown


def requirements(prefix: str) -> str:
    """Every requirement with the tests that show it, or the reason why there is none."""
    shown = shown_requirements()
    known = requirement_list((ROOT / SPECIFICATION).read_text(encoding="utf-8"))
    unknown = sorted(set(shown) - {r.id for r in known})
    if unknown:
        raise DocsError(f"tests are marked with requirements that the specification has not: {', '.join(unknown)}")
    bare = [r.id for r in known if r.id not in shown and not reason(r.id)]
    if bare:
        raise DocsError(f"no test is marked with these requirements, and there is no reason why: {', '.join(bare)}")
    rows = [
        [
            f"[{r.id}](specification.md#{anchor(r.heading)})",
            _first_words(r.text),
            _proof(shown[r.id], prefix) if r.id in shown else f"*{reason(r.id)}*",
        ]
        for r in known
    ]
    tested = sum(r.id in shown for r in known)
    counts = f"{len(known)} requirements: {tested} with a test, {len(known) - tested} with a reason why not.\n\n"
    return counts + table(["requirement", "begins", "shown by"], rows)


def fault_list(text: str) -> dict[str, list[Fault]]:
    """The faults by group, from the text of docs/faults.toml. Raises DocsError."""
    groups: dict[str, list[Fault]] = {}
    for group in tomllib.loads(text)["group"]:
        try:
            groups[group["title"]] = [Fault(**row) for row in group["fault"]]
        except (KeyError, TypeError) as e:
            raise DocsError(f"{FAULTS}: a row that lacks a field, or has one too many: {e}") from None
    return groups


def faults(prefix: str) -> str:
    """Every fault, with the tests that show it: each has one that always runs."""
    groups = fault_list((ROOT / FAULTS).read_text(encoding="utf-8"))
    rows = [row.id for fault_rows in groups.values() for row in fault_rows]
    double = {ident for ident in rows if rows.count(ident) > 1}
    shown: dict[str, list[str]] = {ident: [] for ident in rows}
    marked = marked_tests(ROOT)
    unknown = {ident for test in marked if test.marker == "fault" for ident in test.arguments} - set(rows)
    if double or unknown:
        raise DocsError(f"faults that {FAULTS} has twice: {sorted(double)}, or not at all: {sorted(unknown)}")
    for test in marked:
        if test.marker == "fault":
            for ident in test.arguments:
                shown[ident].append(test.node)
    sometimes = {node for node in {n for nodes in shown.values() for n in nodes} if _runs_sometimes(node)}
    unshown = sorted(ident for ident, nodes in shown.items() if not set(nodes) - sometimes)
    if unshown:
        raise DocsError(f"no test that always runs shows these faults: {', '.join(unshown)}")
    out = []
    for title, fault_rows in groups.items():
        cells = [[r.event, r.guest, r.device, r.tee, _proof(shown[r.id], prefix)] for r in fault_rows]
        out.append(f"### {title}\n\n" + table(["what happens", "guest", "device", "TEE", "shown by"], cells))
    return "\n".join(out)


CALLS = {
    "System calls (`<linux/tee.h>`)": (
        *("TEE_IOC_VERSION", "TEE_IOC_SHM_ALLOC", "TEE_IOC_OPEN_SESSION", "TEE_IOC_INVOKE", "TEE_IOC_CANCEL"),
        *("TEE_IOC_CLOSE_SESSION", "TEE_IOC_SUPPL_RECV", "TEE_IOC_SUPPL_SEND", "TEE_IOC_SHM_REGISTER"),
    ),
    "TEE Client API (`libteec`)": (
        *("TEEC_InitializeContext", "TEEC_FinalizeContext", "TEEC_RegisterSharedMemory", "TEEC_AllocateSharedMemory"),
        *("TEEC_ReleaseSharedMemory", "TEEC_OpenSession", "TEEC_CloseSession", "TEEC_InvokeCommand"),
        "TEEC_RequestCancellation",
    ),
}
"""What a guest's programs call."""


def calls(prefix: str) -> str:
    """Every call of a guest's programs, with the tests that show it."""
    shown: dict[str, list[str]] = {name: [] for names in CALLS.values() for name in names}
    for test in marked_tests(ROOT):
        if test.marker == "call":
            for name in test.arguments:
                if name not in shown:
                    raise DocsError(f"{test.node} is marked with a call that nobody knows: {name}")
                shown[name].append(test.node)
    missing = [name for name, nodes in shown.items() if not nodes]
    if missing:
        raise DocsError(f"no test shows these calls: {', '.join(missing)}")
    rows = []
    for title, names in CALLS.items():
        rows.append([f"**{title}**", ""])
        rows += [[f"`{name}`", _proof(shown[name], prefix)] for name in names]
    return table(["call", "shown by"], rows)


def _runs_sometimes(node: str) -> bool:
    """Whether the test is skipped, expected to fail, or run in the lab only; or not there at all."""
    path, *names = node.split("::")
    scope: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    scope = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    rare = _mentions_rare([child for child in scope.body if isinstance(child, ast.Assign)], "pytestmark")
    for name in names:
        scope = next(c for c in scope.body if isinstance(c, _NAMED_NODES) and c.name == name)
        rare |= any(_mentions_rare([decorator]) for decorator in scope.decorator_list)
    return rare or _mentions_rare([scope], only=("skip", "importorskip", "xfail"))


_NAMED_NODES = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_RARE = ("skip", "skipif", "xfail", "lab")


def _mentions_rare(nodes: Sequence[ast.AST], needs: str = "", only: Sequence[str] = _RARE) -> bool:
    for node in nodes:
        inner = list(ast.walk(node))
        if needs and not any(isinstance(n, ast.Name) and n.id == needs for n in inner):
            continue
        if any(isinstance(n, ast.Attribute) and n.attr in only and _of_pytest(n) for n in inner):
            return True
    return False


def _of_pytest(node: ast.Attribute) -> bool:
    value = node.value
    while isinstance(value, ast.Attribute):
        value = value.value
    return isinstance(value, ast.Name) and value.id == "pytest"


def _first_words(text: str, most: int = 16) -> str:
    plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    words = plain.split()
    return " ".join(words) if len(words) <= most else " ".join(words[:most]).rstrip(",:;") + " …"


# -- files


def conformance() -> str:
    """Each public list: how many tests, how many of them are cases that run, what the others are."""
    rows = []
    for listed in LISTS:
        cases = {test: CASES[listed.case_of(test)] for test in listed.tests}
        left_out: dict[str, list[str]] = {}
        for test, found in cases.items():
            if found.body is None:
                left_out.setdefault(found.why, []).append(f"`{test}`")
        renamed = [f"`{test}`: `{found.id}`" for test, found in cases.items() if found.id != test]
        if all(found.id == f"{listed.name}_{test}" for test, found in cases.items()):
            renamed = [f"all: `{listed.name}_` and the test's name"]
        runs = sum(found.body is not None for found in cases.values())
        why = "; ".join(f"{why}: {', '.join(tests)}" for why, tests in left_out.items())
        rows.append([listed.suite, listed.name, str(len(cases)), str(runs), ", ".join(renamed), why])
    head = ["suite", "list", "tests", "cases that run", "test: our case, where the name differs", "not applicable"]
    covered = {listed.case_of(test) for listed in LISTS for test in listed.tests}
    own = "".join(f"- `{found.id}`\n" for found in CASES.values() if found.id not in covered)
    return table(head, rows) + f"\nCases that are in none of these lists:\n\n{own}"


NAMED: dict[str, Callable[[str], str]] = {"layout": layout, "enum": enum, "machine": machine}
PLAIN: dict[str, Callable[[], str]] = {
    "queues": queues,
    "feature-bits": feature_bits,
    "requests": requests,
    "events": events,
    "statuses": statuses,
    "rpc-commands": rpc_commands,
    "metrics": metrics,
    "conformance": conformance,
}
FROM_TESTS: dict[str, Callable[[str], str]] = {
    "features": features,
    "requirements": requirements,
    "faults": faults,
    "calls": calls,
}


def block(what: str, prefix: str) -> str:
    """The content of one block. ``prefix`` leads from the file to the top folder."""
    kind, _, name = what.partition(" ")
    if kind in NAMED and name:
        return NAMED[kind](name)
    if kind in PLAIN and not name:
        return PLAIN[kind]()
    if kind in FROM_TESTS and not name:
        return FROM_TESTS[kind](prefix)
    raise DocsError(f"unknown kind of block: {what!r}")


def fill(text: str, prefix: str) -> str:
    """``text`` with all its blocks made anew."""

    def put(found: re.Match[str]) -> str:
        content = block(found["what"], prefix)
        return f"<!-- generated: {found['what']} -->\n{content}<!-- end generated -->"

    filled = BLOCK.sub(put, text)
    if filled.count("<!-- generated: ") != len(BLOCK.findall(filled)):
        raise DocsError("a generated block has no end")
    return filled


def files() -> list[Path]:
    """The files that may hold blocks."""
    readme = ROOT / "README.md"
    return [*sorted((ROOT / "docs").glob("*.md")), *([readme] if readme.exists() else [])]


def drifted() -> list[tuple[Path, str]]:
    """The files that differ from what they should hold, with that."""
    out = []
    for path in files():
        text = path.read_text(encoding="utf-8")
        try:
            filled = fill(text, "../" if path.parent != ROOT else "")
        except DocsError as e:
            raise DocsError(f"{path.relative_to(ROOT)}: {e}") from None
        if filled != text:
            out.append((path, filled))
    return out


def _where(old: str, new: str) -> str:
    """Which blocks differ."""
    pairs = zip(BLOCK.finditer(old), BLOCK.finditer(new), strict=True)
    return ", ".join(a["what"] for a, b in pairs if a["old"] != b["old"])


def main(arguments: list[str]) -> int:
    """Run as a program: the exit code."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    try:
        changed = drifted()
    except DocsError as e:
        print(f"docs/generate.py: {e}", file=sys.stderr)
        return 1
    for path, text in changed:
        name = path.relative_to(ROOT)
        blocks = _where(path.read_text(encoding="utf-8"), text)
        if arguments:
            print(f"{name} differs from the definitions ({blocks}): run `make docs`", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8")
            print(f"{name}: {blocks}")
    return 1 if arguments and changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
