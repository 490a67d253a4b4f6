"""Each workload on each path, counted: what the counts have to be follows from the specification, the client's bytes
and the roles, and is worked out here."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from device.messages import PARAM, REQUEST_HEADER, REQUESTS, RESPONSE_HEADER
from device.wire import Request
from guest_driver.client import TempInOut
from tee.soft.examples import UUIDS
from virtio_tee.__main__ import main
from virtio_tee.compare import report as report_module
from virtio_tee.compare.meter import Meter, Party, Phase, Readable, What
from virtio_tee.compare.middle import WINDOW_BYTES
from virtio_tee.compare.page import MOST_ROWS, page
from virtio_tee.compare.paths import PATHS
from virtio_tee.compare.run import Runner
from virtio_tee.compare.site import GUEST_BYTES, Kit, Site
from virtio_tee.compare.workloads import PIECES, SESSIONS, TOUCH, WORKLOADS, Job, Workload, data_of, word_of

PAGE, KIB = 4096, 1024
DIRECT, ZERO_COPY, BOUNCE = ("direct", ""), ("virtio", "zero-copy"), ("virtio", "bounce")
MIDDLE, FFA = ("middle", ""), ("ffa", "")
VIRTIO = (ZERO_COPY, BOUNCE)
LABELS = {p.label for p in PATHS}

Report = dict[str, Any]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, str]:
    """Of everything, counted and not timed."""
    html = tmp_path_factory.mktemp("compare") / "report.html"
    done = CliRunner().invoke(main, ["compare", "--json", "--html", str(html), "--seconds", "0"])
    assert done.exit_code == 0, done.stderr
    assert "counting 1 of" in done.stderr
    found: Report = json.loads(done.stdout)
    return found, html.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def report(made: tuple[Report, str]) -> Report:
    return made[0]


@pytest.fixture(scope="module")
def root(made: tuple[Report, str]) -> ET.Element:
    """The page, which is well-formed XML too."""
    return ET.fromstring(made[1])


def of(report: Report, workload: str, path: tuple[str, str]) -> dict[str, Any]:
    (found,) = (r for r in report["results"] if (r["workload"], r["path"], r["mode"]) == (workload, *path))
    return dict(found)


def counts(report: Report, workload: str, path: tuple[str, str], *names: str) -> tuple[int, ...]:
    found = of(report, workload, path)
    return tuple(found[name] for name in names)


def size_of(request: Request) -> tuple[int, int]:
    """Bytes of a request and its response without parameters."""
    kind = REQUESTS[request]
    response = kind.response.codec.size if kind.response is not None else 0
    return REQUEST_HEADER.size + kind.body.codec.size, RESPONSE_HEADER.size + response


@pytest.mark.feature("Commands: `virtio-tee compare`, the same work over each path, counted where it happens")
def test_everything_was_run(report: Report) -> None:
    assert {(r["workload"], r["path"], r["mode"]) for r in report["results"]} == {
        (w.name, p.name, p.mode) for w in WORKLOADS for p in PATHS
    }
    assert {DIRECT, ZERO_COPY, BOUNCE, MIDDLE, FFA} == {(p["path"], p["mode"]) for p in report["paths"]}


def test_the_answers_are_the_same_on_all_paths_and_right(report: Report) -> None:
    assert report["same_answers"] is True
    answers: dict[str, set[str]] = {}
    for result in report["results"]:
        answers.setdefault(result["workload"], set()).add(result["answer"])
    assert {name for name, found in answers.items() if len(found) != 1} == set()
    for workload in WORKLOADS:
        touched = bytearray(data_of(workload))
        for at in range(0, len(touched), PAGE):
            touched[at] = (touched[at] + 1) & 0xFF
        given = {"registered": bytes(touched) or b"\0", "temporary": b"[" + touched + b"]", "scattered": bytes(touched)}
        kind = workload.name.partition("-")[0]
        if kind in given:
            assert answers[workload.name] == {sha256(given[kind]).hexdigest()}, workload.name
    words = f"[None,[0,0,{word_of(named('values')) + 1}],[4,5,9]]"
    assert answers["values"] == {sha256(words.encode()).hexdigest()}
    assert answers["load"] == {sha256(b"[[42,0,0]]").hexdigest()}
    assert answers["storage"] == {sha256(b"[None," + data_of(named("storage")) + b"]").hexdigest()}


def named(name: str) -> Workload:
    (found,) = (w for w in WORKLOADS if w.name == name)
    return found


class TestCounts:
    def test_a_null_invoke(self, report: Report) -> None:
        names = ("requests", "messages", "notifications", "vm_exits", "world_switches", "pages_shared", "rpcs")
        assert counts(report, "null", DIRECT, *names) == (1, 2, 0, 0, 2, 0, 0)
        for path in VIRTIO:  # request and response in the ring, and at the TEE's door; a kick, an interrupt
            assert counts(report, "null", path, *names) == (1, 4, 2, 1, 2, 0, 0)
            assert of(report, "null", path)["bytes_copied"] == 2 * sum(size_of(Request.INVOKE))
        # over three boundaries there and back; the page that messages are in is shared at the first one
        assert counts(report, "null", FFA, *names) == (1, 6, 0, 1, 2, 1, 0)
        assert of(report, "null", FFA)["setup"]["pages_shared"] == 1
        assert of(report, "null", DIRECT)["bytes_copied"] == 0
        # the ring, and from the host on as over FF-A
        assert counts(report, "null", MIDDLE, *names) == (1, 8, 2, 1, 2, 0, 0)

    @pytest.mark.parametrize("pages", [1, 16, 256, 4096])
    def test_registered_memory(self, report: Report, pages: int) -> None:
        size = pages * PAGE
        name = f"registered-{size // KIB}KiB" if size < KIB * KIB else f"registered-{size // KIB // KIB}MiB"
        assert counts(report, name, DIRECT, "messages", "pages_shared", "bytes_copied") == (2, pages, 0)
        one = 2 * (sum(size_of(Request.INVOKE)) + 2 * PARAM.size)
        assert counts(report, name, ZERO_COPY, "messages", "pages_shared", "bytes_copied") == (4, pages, one)
        # once into the bounce buffer and once back
        assert counts(report, name, BOUNCE, "messages", "pages_shared", "bytes_copied") == (4, 0, one + 2 * size)
        assert counts(report, name, FFA, "messages", "pages_shared") == (6, pages + 1)
        assert of(report, name, FFA)["bytes_copied"] < KIB
        assert counts(report, name, MIDDLE, "messages", "pages_shared") == (8, pages)
        assert of(report, name, MIDDLE)["bytes_copied"] < 2 * KIB  # with what is left for RPCs behind each message

    def test_temporary_memory_is_registered_for_the_call_if_it_is_large(self, report: Report) -> None:
        for path in VIRTIO:
            assert counts(report, "temporary-4KiB", path, "requests", "pages_shared") == (1, 0)
            assert counts(report, "temporary-64KiB", path, "requests", "rpcs") == (3, 0)
        assert of(report, "temporary-64KiB", ZERO_COPY)["pages_shared"] == 16
        # on FF-A it is always: MEM_SHARE, the call, UNREGISTER_SHM, MEM_RECLAIM
        for name in ("temporary-0B", "temporary-4KiB", "temporary-64KiB", "temporary-16MiB"):
            assert counts(report, name, FFA, "requests", "vm_exits") == (4, 4)

    def test_scattered_memory(self, report: Report) -> None:
        assert of(report, "scattered", ZERO_COPY)["pages_shared"] == PIECES
        assert of(report, "scattered", FFA)["pages_shared"] == PIECES + 1
        assert of(report, "scattered", MIDDLE)["pages_shared"] == PIECES
        # a descriptor of 16 bytes for each page: three buffers full, so two fragments follow
        assert of(report, "scattered", FFA)["requests"] == of(report, "temporary-64KiB", FFA)["requests"] + 2

    def test_what_an_rpc_takes(self, report: Report) -> None:
        # LOAD_TA for the size, SHM_ALLOC, LOAD_TA, SHM_FREE
        assert counts(report, "load", DIRECT, "rpcs", "rpc_hops") == (4, 4 * 2)
        for path in VIRTIO:  # to the host, to the guest; its answer, which is returned; to the TEE
            assert counts(report, "load", path, "rpcs", "rpc_hops") == (4, 4 * 5)
        assert counts(report, "load", FFA, "rpcs", "rpc_hops") == (4, 4 * 6)
        # three to the host and three from it, the event, its answer, which is returned
        assert counts(report, "load", MIDDLE, "rpcs", "rpc_hops") == (4, 4 * 9)

    def test_many(self, report: Report) -> None:
        for path in VIRTIO:
            assert of(report, "sessions", path)["requests"] == SESSIONS
            assert of(report, "guests", path)["messages"] == 4 * of(report, "null", path)["messages"]
        assert of(report, "guests", FFA)["messages"] == 4 * of(report, "null", FFA)["messages"]

    def test_attaching_shows_a_backend_all_memory_at_once(self, report: Report) -> None:
        assert of(report, "null", ZERO_COPY)["attach"]["pages_shared"] == GUEST_BYTES // PAGE
        assert of(report, "guests", BOUNCE)["attach"]["pages_shared"] == 4 * GUEST_BYTES // PAGE
        assert of(report, "null", MIDDLE)["attach"]["pages_shared"] == WINDOW_BYTES // PAGE
        assert of(report, "null", FFA)["attach"]["pages_shared"] == 0


def readers(report: Report, workload: str, path: tuple[str, str], what: str) -> dict[str, int]:
    return {party: reach[what] for party, reach in of(report, workload, path)["readers"].items()}


class TestReaders:
    @pytest.mark.parametrize("name", ["registered-64KiB", "temporary-64KiB"])
    def test_of_memory(self, report: Report, name: str) -> None:
        size = 64 * KIB
        for path in VIRTIO:
            assert readers(report, name, path, "payload") == {"guest": size, "host": size, "tee": size}
            assert readers(report, name, path, "guest_memory")["host"] == GUEST_BYTES
        assert readers(report, name, FFA, "payload") == {"guest": size, "hypervisor": 0, "spmc": 0, "tee": size}
        # the VM's RX and TX; of the TEE the pages that it was given, and that of messages
        assert readers(report, name, FFA, "guest_memory")["hypervisor"] == 2 * PAGE
        assert readers(report, name, FFA, "guest_memory")["tee"] == size + PAGE

    @pytest.mark.parametrize("name", ["registered-64KiB", "temporary-4KiB", "temporary-64KiB", "scattered", "storage"])
    def test_the_middle_way_keeps_memory_from_the_host(self, report: Report, name: str) -> None:
        found, size = readers(report, name, MIDDLE, "payload"), named(name).size
        assert found == {"guest": size, "host": 0, "hypervisor": 0, "spmc": 0, "tee": size}
        assert readers(report, name, MIDDLE, "guest_memory")["host"] == WINDOW_BYTES
        assert readers(report, name, MIDDLE, "guest_memory")["tee"] >= size

    @pytest.mark.parametrize("name", ["registered-64KiB", "temporary-64KiB", "scattered"])
    def test_bounce_buffers_change_who_reads_what(self, report: Report, name: str) -> None:
        size = named(name).size
        zero, bounce = (readers(report, name, path, "guest_memory")["tee"] for path in VIRTIO)
        assert (zero, bounce) == (size, 0)
        zero, bounce = (readers(report, name, path, "copied")["host"] for path in VIRTIO)
        assert bounce - zero >= 2 * size

    def test_memory_inside_a_request_is_the_hosts_to_read(self, report: Report) -> None:
        size = 4 * KIB
        assert readers(report, "temporary-4KiB", ZERO_COPY, "payload")["host"] == size
        assert readers(report, "temporary-4KiB", ZERO_COPY, "guest_memory")["tee"] == 0

    def test_of_values(self, report: Report) -> None:
        """The host sees a request; hypervisor and SPMC see registers, and those say where the message is."""
        for path in VIRTIO:
            assert readers(report, "values", path, "payload") == {"guest": 8, "host": 8, "tee": 8}
        # on the middle way they are in the request
        assert readers(report, "values", MIDDLE, "payload")["host"] == 8
        assert readers(report, "values", FFA, "payload") == {"guest": 8, "hypervisor": 0, "spmc": 0, "tee": 8}

    def test_of_a_tas_package(self, report: Report) -> None:
        size = of(report, "load", DIRECT)["payload"]
        assert size > 500
        assert readers(report, "load", ZERO_COPY, "payload") == {"guest": size, "host": size, "tee": size}
        assert readers(report, "load", FFA, "payload") == {"guest": size, "hypervisor": 0, "spmc": 0, "tee": size}

    def test_pieces_are_found_in_any_order(self) -> None:
        for data, found in ((b"..cc..aabb", 6), (b"aabbcc", 6), (b"ab", 0), (b"bbaa", 4), (b"", 0)):
            meter = Meter(phase=Phase.CALL, payload=[b"aa", b"bb", b"cc"])
            meter.looks[Party.HOST] = [lambda data=data: [Readable(data, True)]]  # type: ignore[misc]
            meter.look()
            assert (meter.reach[Party.HOST].payload, meter.reach[Party.HOST].guest_memory) == (found, len(data))

    def test_what_is_read_by_nobody_is_found_with_nobody(self, tmp_path: Path) -> None:
        """A path whose client passes other bytes than those that are looked for."""

        @contextmanager
        def other(workload: Workload, site: Site) -> Iterator[Job]:
            with site.context() as context, context.open_session(UUIDS["probe"]) as session:
                yield Job(lambda: session.invoke(TOUCH, TempInOut(bytes(64 * KIB))), lambda _: b"")

        workload = replace(named("temporary-64KiB"), prepare=other)
        results = Runner([workload], PATHS, Kit.new(tmp_path), 0, lambda _: None).run()
        assert {(r.path.label, reach.payload) for r in results for reach in r.reach.values()} == {
            (label, 0) for label in LABELS
        }


class TestDiagrams:
    def test_a_null_invoke_over_ffa(self, report: Report) -> None:
        drawn = self.of(report, "null", FFA)
        steps = [(m["from"], m["to"]) for m in drawn["messages"] if m["kind"] != "copy"]
        there = [("guest", "hypervisor"), ("hypervisor", "spmc"), ("spmc", "tee")]
        assert steps == there + [(b, a) for a, b in reversed(there)]

    def test_a_null_invoke_over_virtio(self, report: Report) -> None:
        drawn = self.of(report, "null", ZERO_COPY)
        sent = [(m["kind"], m["from"], m["to"]) for m in drawn["messages"] if m["kind"] not in ("copy", "notification")]
        assert sent == [
            ("request", "guest", "host"),
            ("request", "host", "tee"),
            ("response", "tee", "host"),
            ("response", "host", "guest"),
        ]

    def test_they_hold_what_was_counted(self, report: Report) -> None:
        assert {(d["workload"], d["path"], d["mode"]) for d in report["diagrams"]} == {
            (name, p.name, p.mode) for name in ("null", "temporary-64KiB", "load") for p in PATHS
        }
        for drawn in report["diagrams"]:
            result = of(report, drawn["workload"], (drawn["path"], drawn["mode"]))
            kinds = [m["kind"] for m in drawn["messages"]]
            assert len(kinds) - kinds.count("copy") - kinds.count("notification") == result["messages"]
            assert kinds.count("notification") == result["notifications"]
            assert sum(m["bytes"] for m in drawn["messages"] if m["kind"] == "copy") == result["bytes_copied"]
            assert sum(m["rpc"] for m in drawn["messages"]) == result["rpc_hops"]
            assert [m["at_us"] for m in drawn["messages"]] == sorted(m["at_us"] for m in drawn["messages"])

    @staticmethod
    def of(report: Report, workload: str, path: tuple[str, str]) -> dict[str, Any]:
        (found,) = (d for d in report["diagrams"] if (d["workload"], d["path"], d["mode"]) == (workload, *path))
        return dict(found)


def test_the_json(report: Report) -> None:
    assert {"version", "machine", "parties", "paths", "workloads", "results", "diagrams", "same_answers"} <= set(report)
    assert set(report["meaning"]) == {str(what) for what in What}
    parties = {p["party"] for p in report["parties"]}
    for path in report["paths"]:
        assert set(path["parties"]) <= parties
        assert path["trust"]
        assert all(t["party"] in parties and (t["trusted"] or t["changed"]) for t in path["trust"])
    for result in report["results"]:
        for counted in (result, result["setup"], result["attach"]):
            assert all(isinstance(counted[what], int) and counted[what] >= 0 for what in report["meaning"])
        (path,) = (p for p in report["paths"] if (p["path"], p["mode"]) == (result["path"], result["mode"]))
        assert set(result["readers"]) == set(path["parties"])
        for reach in result["readers"].values():
            assert 0 <= reach["payload"] <= result["payload"]
        copied = sum(reach["copied"] for reach in result["readers"].values())
        assert copied == result["bytes_copied"]
        assert (result["latency_us"], result["throughput"]) == (None, None)


class TestPage:
    def test_it_needs_nothing_else(self, made: tuple[Report, str], root: ET.Element) -> None:
        for element in root.iter():
            assert element.tag.rpartition("}")[2] not in ("link", "img", "iframe", "object", "embed", "base")
            for name, value in element.attrib.items():
                assert name.rpartition("}")[2] not in ("src", "srcset", "action"), (element.tag, name)
                assert not name.startswith("on")
                if name.rpartition("}")[2] == "href":
                    assert value.startswith("#")
        assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/)", made[1])
        (style,) = root.iter("style")
        assert "prefers-color-scheme: dark" in (style.text or "")

    def test_every_figure_is_the_jsons(self, made: tuple[Report, str], root: ET.Element) -> None:
        report = made[0]
        figures = [(e.attrib["data-at"], e.attrib["value"]) for e in root.iter("data")]
        figures += [(e.attrib["data-at"], e.attrib["data-value"]) for e in root.iter() if "data-value" in e.attrib]
        assert len(figures) > 15 * len(report["results"])
        for at, shown in figures:
            value: Any = report
            for key in at.split("."):
                value = value[int(key) if isinstance(value, list) else key]
            assert float(shown) == value, at

    def test_the_json_stands_in_it(self, made: tuple[Report, str], root: ET.Element) -> None:
        (script,) = root.iter("script")
        assert script.attrib["type"] == "application/json"
        assert json.loads(script.text or "") == made[0]

    def test_diagrams_are_drawn_of_the_recorded_messages(self, made: tuple[Report, str], root: ET.Element) -> None:
        drawings = [e for e in root.iter() if e.attrib.get("class") == "sequence"]
        assert len(drawings) == len(made[0]["diagrams"])
        wanted = [
            [f"{m['at_us']} µs: {m['from']} to {m['to']}: {m['name']}" for m in d["messages"][:MOST_ROWS]]
            for d in made[0]["diagrams"]
        ]
        drawn = [
            [
                (next(iter(group)).text or "").partition(" · ")[0]
                for group in drawing
                if group.attrib.get("class", "").startswith("message")
            ]
            for drawing in drawings
        ]
        assert sorted(drawn) == sorted(wanted)

    def test_it_can_be_used_without_seeing_it(self, root: ET.Element) -> None:
        assert root.attrib["lang"] == "en"
        ids = [e.attrib["id"] for e in root.iter() if "id" in e.attrib]
        assert len(ids) == len(set(ids))
        assert {e.attrib["href"].removeprefix("#") for e in root.iter() if "href" in e.attrib} <= set(ids)
        for element in root.iter():
            if element.tag.rpartition("}")[2] == "svg":
                assert element.attrib.get("aria-hidden") == "true" or element.attrib.get("aria-label")
            if element.attrib.get("class") == "scroll":
                assert element.attrib["tabindex"] == "0"
                assert element.attrib["aria-label"]
            if element.tag == "th":
                assert element.attrib["scope"]

    def test_names_are_text(self, made: tuple[Report, str]) -> None:
        """Whatever stands in a report, it is shown and not run."""
        report = json.loads(json.dumps(made[0]))
        report["paths"][0]["what"] = "</p><script>alert(1)</script>"
        report["diagrams"][0]["messages"][0]["name"] = "<script>&"
        root = ET.fromstring(page(report))
        assert [e.attrib.get("type") for e in root.iter("script")] == ["application/json"]


def test_it_is_timed() -> None:
    done = CliRunner().invoke(main, ["compare", "--json", "--seconds", "0.01", "--workload", "nul*", "--bounce"])
    assert done.exit_code == 0, done.stderr
    report = json.loads(done.stdout)
    assert {(r["path"], r["mode"]) for r in report["results"]} >= {DIRECT, BOUNCE, FFA}
    assert ZERO_COPY not in {(r["path"], r["mode"]) for r in report["results"]}
    for result in report["results"]:
        assert result["latency_us"]["samples"] >= 5
        assert 0 < result["latency_us"]["p50"] <= result["latency_us"]["p90"]
        assert result["throughput"]["per_s"] > 0
    ET.fromstring(page(report))


def test_the_tables() -> None:
    done = CliRunner().invoke(main, ["compare", "--seconds", "0", "--workload", "values", "--path", "ffa"])
    assert done.exit_code == 0, done.stderr
    (row,) = (line for line in done.stdout.splitlines() if line.strip().startswith("values"))
    assert row.split()[:2] == ["values", "ffa"]
    assert "hypervisor 8 KiB" in row
    assert "SPMC" in done.stdout
    assert "same answers on all paths: yes" in done.stdout


def test_answers_that_differ_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    run = Runner.run

    def tampered(self: Runner) -> Any:
        results = run(self)
        results[0].answer = "another"
        return results

    monkeypatch.setattr(Runner, "run", tampered)
    done = CliRunner().invoke(main, ["compare", "--json", "--seconds", "0", "--workload", "null"])
    assert done.exit_code == 1
    assert json.loads(done.stdout)["same_answers"] is False
    assert "differ" in done.stderr


def test_wrong_usage(tmp_path: Path) -> None:
    wrong = (["--html", str(tmp_path)], ["--html", str(tmp_path / "none" / "report.html")])
    for arguments in (["--workload", "nothing"], ["--path", "carrier pigeon"], ["--seconds", "-1"], *wrong):
        assert CliRunner().invoke(main, ["compare", *arguments]).exit_code == 2


def test_a_backend_that_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/bin/false")
    done = CliRunner().invoke(main, ["compare", "--seconds", "0.01", "--workload", "null", "--path", "virtio"])
    assert done.exit_code == 1
    assert "did not start" in done.stderr


def test_a_backend_ends_with_whoever_has_started_it(tmp_path: Path) -> None:
    kit, socket = Kit.new(tmp_path), tmp_path / "tee.sock"
    words = [sys.executable, "-m", "virtio_tee.compare.backend", str(kit.key_file), str(socket)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as backend:
        assert backend.stdout is not None
        assert backend.stdin is not None
        assert backend.stdout.readline() == b"ready\n"
        backend.stdin.close()
        assert backend.wait(60) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("value", "shown"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (1 << 20, "1 MiB"), (50 << 20, "50 MiB")]
)
def test_sizes_for_people(value: int, shown: str) -> None:
    assert report_module.size(value) == shown
