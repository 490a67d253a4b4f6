"""What is counted, how it is told, and what a trace says."""

from __future__ import annotations

import io
import json
import re
import socket
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from device.config import Limits
from device.machines import LifeState
from device.wire import Request, Status
from host_backend import exporter
from host_backend.exporter import Place, export, listen
from host_backend.metrics import BOUNDS, DEFINITIONS, NAMES, Histogram, Metrics
from host_backend.trace import Recorder, Recorders, Trace
from tee.results import Result
from tee.rpc import RpcCommand

INVOKE = int(Request.INVOKE)


def told(metrics: Metrics) -> dict[str, dict[tuple[str, ...], float]]:
    """Name of a sample → its label values → its number."""
    out: dict[str, dict[tuple[str, ...], float]] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            labels = [name for name in NAMES[family.name].labels if name in sample.labels]
            out.setdefault(sample.name, {})[tuple(sample.labels[name] for name in labels)] = sample.value
    return out


def something_happens(recorder: Recorder) -> None:
    recorder.mark("a", "connected")
    recorder.request("a", INVOKE, 1, time.monotonic_ns())
    recorder.request("a", INVOKE, 2, time.monotonic_ns())
    recorder.response("a", INVOKE, 1, Status.OK, Result.SUCCESS)
    recorder.response("a", INVOKE, 2, Status.OK, 0x1234)
    recorder.served("a", INVOKE, 3, time.monotonic_ns(), Result.SUCCESS)
    recorder.answered("a", INVOKE, Status.NO_SESSION)
    recorder.answered("a", 0xDEAD, Status.UNSUPPORTED)
    one, two = object(), object()
    recorder.rpc("a", one, RpcCommand.LOAD_TA, "guest")
    recorder.rpc_ended("a", one, RpcCommand.LOAD_TA, "guest", Result.SUCCESS)
    recorder.rpc("a", two, RpcCommand.FS, "guest")
    recorder.rpc_ended("a", two, RpcCommand.FS, "nobody: its deadline has passed", Result.COMMUNICATION)
    recorder.rpc_refused("", object(), 9999, "refused to guests", Result.NOT_SUPPORTED)
    error = ValueError("bad")
    recorder.broken("a", 2, error)
    recorder.broken("a", 2, error)
    recorder.placed("a", 4096, "")
    recorder.placed("a", 4096, "read-only")
    recorder.placed("a", 8192, "read-only")
    recorder.mark("a", "disconnected")
    recorder.mark("a", "epoch ended", because="left")


@pytest.mark.feature("Operation: metrics for Prometheus")
class TestMetrics:
    def test_what_is_counted(self) -> None:
        metrics = Metrics()
        something_happens(metrics)
        seen = told(metrics)
        assert seen["virtio_tee_requests_total"] == {
            ("a", "INVOKE", "OK"): 3,
            ("a", "INVOKE", "NO_SESSION"): 1,
            ("a", "UNKNOWN", "UNSUPPORTED"): 1,
        }
        assert seen["virtio_tee_results_total"] == {("a", "INVOKE", "SUCCESS"): 2, ("a", "INVOKE", "UNKNOWN"): 1}
        assert seen["virtio_tee_request_seconds_count"] == {("a", "INVOKE"): 3}
        assert seen["virtio_tee_rpcs_total"] == {
            ("a", "LOAD_TA", "guest", "SUCCESS"): 1,
            ("a", "FS", "nobody", "COMMUNICATION"): 1,
            ("", "UNKNOWN", "device", "NOT_SUPPORTED"): 1,
        }
        assert seen["virtio_tee_regions_total"] == {("a", "in_place", ""): 1, ("a", "copied", "read-only"): 2}
        assert seen["virtio_tee_queue_breaks_total"] == {("a", "2"): 1}
        assert seen["virtio_tee_connections_total"] == seen["virtio_tee_resets_total"] == {("a",): 1}
        assert seen["virtio_tee_connected"] == {("a",): 0}

    def test_requests_that_nobody_is_told_of_are_forgotten(self) -> None:
        metrics = Metrics()
        for tag in range(100):
            metrics.request("a", INVOKE, tag, time.monotonic_ns())
        metrics.mark("a", "epoch ended", because="reset")
        assert metrics._started == {}

    def test_what_guests_have(self) -> None:
        tables: dict[str, Any] = {"contexts": [1], "sessions": [1, 2], "regions": [], "calls": {}, "rpcs": []}
        epoch = SimpleNamespace(**tables, region_bytes=4096, running=3)
        device: Any = SimpleNamespace(vm="a", epoch=epoch, life=LifeState.PAUSED, limits=Limits(max_sessions=7))
        tee: Any = SimpleNamespace(usage=lambda: {"threads_busy": 1})
        metrics = Metrics()
        metrics.watch(tee, [device])
        seen = told(metrics)
        assert seen["virtio_tee_objects"]["a", "sessions"] == 2
        assert seen["virtio_tee_objects"]["a", "region_bytes"] == 4096
        assert seen["virtio_tee_limit"]["a", "sessions"] == 7
        assert seen["virtio_tee_state"] == {("a", s.name.lower()): float(s is LifeState.PAUSED) for s in LifeState}
        assert seen["virtio_tee_tee_objects"] == {("threads_busy",): 1}

    def test_a_tee_that_changes_meanwhile(self) -> None:
        def usage() -> dict[str, int]:
            raise RuntimeError("Set changed size during iteration")

        metrics = Metrics()
        tee: Any = SimpleNamespace(usage=usage)
        metrics.watch(tee, [])
        assert "virtio_tee_tee_objects" not in told(metrics)

    def test_every_metric_is_told_and_described(self) -> None:
        told_of = set(re.findall(r"^# TYPE (\w+) (\w+)", Metrics().render().decode(), re.MULTILINE))
        expected = {(d.name + ("_total" if d.kind == "counter" else ""), d.kind) for d in DEFINITIONS}
        assert told_of == expected

    @given(kind=st.integers(0, 2**32 - 1), code=st.integers(0, 2**32 - 1), command=st.integers(0, 2**32 - 1))
    def test_no_guest_makes_labels(self, kind: int, code: int, command: int) -> None:
        metrics = Metrics()
        metrics.answered("a", kind, Status.UNSUPPORTED)
        metrics.response("a", kind, 1, Status.OK, code)
        metrics.rpc_refused("a", object(), command, "why", code)
        for keys in (metrics._requests, metrics._results, metrics._rpcs):
            for key in keys:
                assert all(re.fullmatch("[A-Z0-9_a-z]+", label) for label in key)


class TestHistogram:
    @given(st.lists(st.integers(0, 10**12), max_size=50))
    def test_counts(self, times: list[int]) -> None:
        histogram = Histogram()
        for one in times:
            histogram.observe(one)
        buckets, total = histogram.buckets()
        assert total == sum(times) / 1e9
        for (text, count), bound in zip(buckets, (*BOUNDS, float("inf")), strict=True):
            assert float(text) == bound
            # to the microsecond, rounded up
            assert count == sum(-(-one // 1000) <= round(bound * 1e6) if bound < 99 else True for one in times)


@pytest.mark.feature("Operation: a trace of every request and RPC, with its route and reason")
def test_trace() -> None:
    out = io.StringIO()
    metrics = Metrics()
    something_happens(Recorders(Trace(out), metrics))
    assert told(metrics)["virtio_tee_connections_total"] == {("a",): 1}
    lines = out.getvalue() + "]"
    events = json.loads(lines)
    ended = [e for e in events if e["ph"] == "e" and e["cat"] == "RPCs"]
    assert [(e["args"]["route"], e["args"]["answered_by"], e["args"].get("reason")) for e in ended] == [
        ("guest", "guest", None),
        ("guest", "nobody: its deadline has passed", "its deadline has passed"),
        ("nobody", "device: refused to guests", "refused to guests"),
    ]
    begun = {(e["cat"], e["id"]) for e in events if e["ph"] == "b"}
    assert begun == {(e["cat"], e["id"]) for e in events if e["ph"] == "e"}
    marks = [e["name"] for e in events if e["ph"] == "i" and e["cat"] == "life"]
    regions = ["region in place", "region copied", "region copied"]
    assert marks == ["connected", "queue broken", *regions, "disconnected", "epoch ended"]
    assert [e["args"].get("reason") for e in events if e["name"] in regions] == [None, "read-only", "read-only"]
    refused = [(e["name"], e["args"]["status"]) for e in events if e["ph"] == "i" and e["cat"] == "requests"]
    assert refused == [("INVOKE", "NO_SESSION"), ("UNKNOWN", "UNSUPPORTED")]
    assert {e["args"]["name"] for e in events if e["ph"] == "M"} == {"VM a", "no VM"}


class TestExporter:
    @pytest.mark.parametrize(
        ("text", "place"),
        [
            ("127.0.0.1:9846", Place(host="127.0.0.1", port=9846)),
            ("[::1]:1", Place(host="::1", port=1)),
            (":80", Place(port=80)),
            ("unix:/run/x", Place(path="/run/x")),
        ],
    )
    def test_places(self, text: str, place: Place) -> None:
        assert Place.parse(text) == place

    @pytest.mark.parametrize("text", ["", "x", "::1:80", "1.2.3.4:70000", "unix:x", "unix:", "a:b"])
    def test_places_that_are_none(self, text: str) -> None:
        with pytest.raises(ValueError, match="neither"):
            Place.parse(text)

    @pytest.mark.parametrize(
        ("request_", "status"),
        [
            (b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n", b"200 OK"),
            (b"GET /metrics?x=y HTTP/1.0\r\n\r\n", b"200 OK"),
            (b"HEAD /metrics HTTP/1.1\r\n\r\n", b"200 OK"),
            (b"GET / HTTP/1.1\r\n\r\n", b"404 Not Found"),
            (b"POST /metrics HTTP/1.1\r\n\r\n", b"405 Method Not Allowed"),
            (b"nonsense\r\n\r\n", b"400 Bad Request"),
            (b"GET /metrics HTTP/1.1\r\n" + b"x" * 10000, b"400 Bad Request"),
            (b"\xff" * 20, b"400 Bad Request"),
        ],
    )
    def test_requests(self, tmp_path: Path, request_: bytes, status: bytes) -> None:
        def ask(path: str) -> bytes:
            with socket.socket(socket.AF_UNIX) as sock:
                sock.connect(path)
                sock.sendall(request_)
                sock.shutdown(socket.SHUT_WR)
                answer = b""
                try:
                    while part := sock.recv(1000):
                        answer += part
                except ConnectionResetError:  # more was sent than anybody read
                    pass
                return answer

        answer = served(str(tmp_path / "m"), lambda: b"BODY\n", ask)
        assert answer.startswith(b"HTTP/1.1 " + status + b"\r\n")
        assert (b"BODY" in answer) == (status == b"200 OK" and not request_.startswith(b"HEAD"))

    def test_what_fails_and_who_dawdles(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(exporter, "MAX_CONNECTIONS", 2)
        monkeypatch.setattr(exporter, "TIMEOUT", 0.2)

        def fail() -> bytes:
            raise ZeroDivisionError

        def ask(path: str) -> list[bytes]:
            socks = [socket.socket(socket.AF_UNIX) for _ in range(4)]
            for sock in socks:
                sock.connect(path)
            socks[0].sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            answers = [sock.recv(10) for sock in socks]
            for sock in socks:
                sock.close()
            return answers

        assert served(str(tmp_path / "m"), fail, ask) == [b""] * 4


def served(path: str, render: Callable[[], bytes], ask: Callable[[str], Any]) -> Any:
    """What ``ask`` gets, which runs in a thread, from an exporter at ``path``."""

    async def run() -> Any:
        with closing(listen(Place(path=path))) as listener:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(export, listener, render)
                with trio.fail_after(20):
                    answer = await trio.to_thread.run_sync(ask, path)
                nursery.cancel_scope.cancel()
        return answer

    return trio.run(run)
