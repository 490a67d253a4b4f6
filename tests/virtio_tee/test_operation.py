"""A backend as an operator runs it: metrics and trace of real work, sockets that were passed, units, man page, logs."""

from __future__ import annotations

import ast
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner, Result

from tee.soft.examples import UUIDS
from virtio_tee import demo, systemd
from virtio_tee.__main__ import main

ROOT = Path(__file__).parents[2]
UNITS = ROOT / "docs/systemd"
OPERATION = (ROOT / "docs/operation.md").read_text(encoding="utf-8")


def get(path: Path) -> str:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(path))
        sock.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
        text = b"".join(iter(lambda: sock.recv(65536), b""))
    head, _, body = text.partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK")
    return body.decode()


def sample(text: str, name: str) -> float:
    return float(next(line for line in text.splitlines() if line.startswith(name)).split()[-1])


@contextmanager
def serving(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "virtio_tee", "serve", *arguments]
    backend = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **options)
    try:
        demo._wait_until_ready(backend)
        yield backend
    finally:
        backend.send_signal(signal.SIGTERM)
        assert backend.communicate(timeout=20)[1] == ""
        assert backend.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--ffa-vm", "1"], "--tee ffa"),
        (["--tee", "ffa", "--ffa-vm", "1", "--ffa-vm", "2"], "once for each socket"),
        (["--tee", "ffa", "-s", "/nowhere/y", "--ffa-vm", "5", "--ffa-vm", "5"], "same FF-A endpoint"),
        (["--tee", "ffa", "--ffa-vm", "0"], "0"),
        (["--tee", "ffa", "--ffa-vm", "0x4000"], "0x4000"),
    ],
)
def test_endpoints_that_make_no_sense(arguments: list[str], why: str) -> None:
    shown = CliRunner().invoke(main, ["serve", "-s", "/nowhere/x", *arguments])
    assert (shown.exit_code, why in shown.stderr) == (2, True), shown.output


@pytest.mark.parametrize("more", [[], ["--tee", "ffa"], ["--tee", "ffa", "--ffa-vm", "7"]], ids=" ".join)
def test_metrics_and_trace_of_real_work(tmp_path: Path, more: list[str]) -> None:
    tas = demo._prepare(tmp_path)
    where, trace, tee = tmp_path / "metrics", tmp_path / "trace.json", tmp_path / "tee.sock"
    arguments = ["-s", str(tee), "--vm", "web", "--ta-key", str(tmp_path / "vendor.pem"), "--trace", str(trace), *more]
    with serving([*arguments, "--metrics", f"unix:{where}"]):
        assert where.stat().st_mode & 0o777 == 0o660
        guest = [sys.executable, "-m", "virtio_tee", "guest", "demo", "--socket", str(tee), "--ta-folder", str(tas)]
        subprocess.run(guest, cwd=ROOT, check=True, capture_output=True, timeout=60)
        deadline = time.monotonic() + 10
        while sample(text := get(where), 'virtio_tee_connected{vm="web"}') and time.monotonic() < deadline:
            time.sleep(0.05)
    assert not where.exists()
    assert sample(text, 'virtio_tee_requests_total{status="OK",type="OPEN_SESSION",vm="web"}') >= 3
    loads = 'virtio_tee_rpcs_total{command="LOAD_TA",result="SUCCESS",route="guest",vm="web"}'
    assert sample(text, loads) >= 3
    assert sample(text, 'virtio_tee_requests_total{status="OK",type="RPC_REPLY",vm="web"}') >= sample(text, loads)
    assert sample(text, 'virtio_tee_request_seconds_count{type="INVOKE",vm="web"}') > 0
    assert sample(text, 'virtio_tee_objects{kind="sessions",vm="web"}') == 0
    assert sample(text, 'virtio_tee_connections_total{vm="web"}') == 1
    assert sample(text, 'virtio_tee_resets_total{vm="web"}') >= 1
    assert sample(text, 'virtio_tee_tee_objects{kind="contexts"}') == 0
    events = demo._read_trace(trace)
    loaded = [e for e in events if e["name"] == "LOAD_TA" and e["ph"] == "e"]
    assert {(e["args"]["route"], e["args"]["answered_by"]) for e in loaded} == {("guest", "guest")}
    assert {"connected", "disconnected", "epoch ended", "drained"} <= {e["name"] for e in events if e["ph"] == "i"}


@pytest.mark.feature("Supplicant: secure storage of a guest's TAs, in a folder of the guest's")
def test_secure_storage_in_a_guests_folder(tmp_path: Path) -> None:
    demo._prepare(tmp_path)
    tee, files = tmp_path / "tee.sock", tmp_path / "files"

    def invoke(*arguments: str) -> Result:
        options = ["--socket", str(tee), "--ta-folder", str(tmp_path / "guest/optee_armtz"), "--json"]
        command = ["guest", "invoke", str(UUIDS["secure_storage"]), *arguments, *options]
        return CliRunner().invoke(main, [*command, "--fs-folder", str(files)])

    with serving(["-s", str(tee), "--ta-key", str(tmp_path / "vendor.pem")]):
        assert invoke("1", "mem-in:name", "mem-in:content").exit_code == 0
        assert invoke("0", "mem-in:name", "mem-out:100").stdout.strip() == f'[null, "{b"content".hex()}"]'
        kept = [path for path in files.rglob("*") if path.is_file()]
        assert kept
        assert not any(b"content" in path.read_bytes() for path in kept)
        assert invoke("2", "mem-in:name").exit_code == 0
        assert "ITEM_NOT_FOUND" in invoke("0", "mem-in:name", "mem-out:100").stderr


def test_what_comes_back_is_readable(tmp_path: Path) -> None:
    tee, tas = tmp_path / "tee.sock", demo._prepare(tmp_path)

    def invoke(name: str, *arguments: str) -> Result:
        options = ["--socket", str(tee), "--ta-folder", str(tas)]
        return CliRunner().invoke(main, ["guest", "invoke", str(UUIDS[name]), *arguments, *options])

    with serving(["-s", str(tee), "--ta-key", str(tmp_path / "vendor.pem")]):
        assert invoke("hello_world", "0", "inout:41,0x10").stdout == "param 0: value a=42 b=16 c=0\n"
        assert invoke("probe", "0").stdout == "done; there were no parameters\n"
        assert invoke("probe", "2", "mem-inout:Tee", "in:0x20").stdout == (
            "param 0: memory, 3 bytes: 744545 ('tEE')\nparam 1: nothing comes back\n"
        )
        assert invoke("probe", "5", "mem-out:9", "in:0").stdout.startswith("param 0: memory, 0 bytes\n")
        assert invoke("probe", "2", "mem-inout:A", "in:0xff").stdout.startswith("param 0: memory, 1 bytes: be\n")
        assert invoke("probe", "0", *["none"] * 24).exit_code == 0
        refused = invoke("probe", "0", *["none"] * 25)
        assert refused.exit_code == 2
        assert "25 parameters; this device takes 24 at most" in refused.stderr


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        shown = CliRunner().invoke(main, ["serve", "-s", str(tmp_path / "s"), "--metrics", address])
    assert shown.exit_code == 1
    assert f"metrics at {address}: Address already in use" in shown.stderr


@pytest.mark.parametrize("wrong", ["nonsense", "unix:relative", "1.2.3.4:99999"])
def test_a_place_for_metrics_that_is_none(wrong: str) -> None:
    assert CliRunner().invoke(main, ["serve", "-s", "/x", "--metrics", wrong]).exit_code == 2


@pytest.mark.feature("Operation: systemd socket activation, in a hardened unit")
def test_sockets_that_are_passed_are_served(tmp_path: Path) -> None:
    """As systemd does it: the socket is fd 3, LISTEN_PID is who is executed; readiness goes to NOTIFY_SOCKET."""
    with (
        socket.socket(socket.AF_UNIX) as listener,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified,
    ):
        listener.bind(str(tmp_path / "tee.sock"))
        listener.listen()
        notified.bind(str(tmp_path / "notify"))
        notified.settimeout(10)
        text = (
            f"import os; os.dup2({listener.fileno()}, 3)\n"
            "os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='1')\n"
            "os.execv(os.sys.executable, [os.sys.executable, '-m', 'virtio_tee', 'serve', '--vm', 'web'])"
        )
        backend = subprocess.Popen(
            [sys.executable, "-c", text],
            cwd=ROOT,
            env={**os.environ, "NOTIFY_SOCKET": str(tmp_path / "notify")},
            pass_fds=[listener.fileno(), *([3] if listener.fileno() == 3 else [])],
            stderr=subprocess.PIPE,
            text=True,
        )
        assert notified.recv(100) == b"READY=1"
        shown = CliRunner().invoke(main, ["guest", "info", "--socket", str(tmp_path / "tee.sock"), "--json"])
        assert shown.exit_code == 0, shown.output
        backend.send_signal(signal.SIGTERM)
        assert notified.recv(100) == b"STOPPING=1"
        backend.communicate(timeout=20)
        assert backend.returncode == 0
        assert (tmp_path / "tee.sock").exists()  # it is the service manager's


@pytest.mark.parametrize(
    ("pid", "count", "fds"), [("me", "2", (3, 4)), ("1", "2", ()), ("me", "x", ()), ("", "", ()), ("me", "0", ())]
)
def test_listen_fds(monkeypatch: pytest.MonkeyPatch, pid: str, count: str, fds: tuple[int, ...]) -> None:
    monkeypatch.setenv("LISTEN_PID", str(os.getpid()) if pid == "me" else pid)
    monkeypatch.setenv("LISTEN_FDS", count)
    assert systemd.listen_fds() == fds
    assert systemd.listen_fds() == ()  # nobody else takes them


def test_notify(monkeypatch: pytest.MonkeyPatch) -> None:
    for nobody in ("", "relative", "/no/such/socket"):
        monkeypatch.setenv("NOTIFY_SOCKET", nobody)
        systemd.notify("READY=1")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notified:
        notified.bind("\0virtio-tee-test")
        monkeypatch.setenv("NOTIFY_SOCKET", "@virtio-tee-test")
        systemd.notify("READY=1")
        notified.settimeout(10)
        assert notified.recv(100) == b"READY=1"


WITH_SYSTEMD = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")


class TestUnits:
    def test_what_it_starts_is_right(self) -> None:
        line = re.search(r"^ExecStart=(.+)$", (UNITS / "virtio-tee@.service").read_text(), re.MULTILINE)
        assert line is not None
        program, *arguments = line[1].replace("%i", "web").split()
        assert program == "/usr/bin/virtio-tee"
        assert arguments.pop() == "$VIRTIO_TEE_OPTIONS"
        shown = CliRunner().invoke(main, [*arguments, "--print-capabilities"])
        assert shown.exit_code == 0
        line = re.search(r"^ExecStart=(.+)$", (UNITS / "virtio-tee-broker.service").read_text(), re.MULTILINE)
        assert line is not None
        program, command, option, _, more = line[1].split()
        assert (program, command, option) == ("/usr/bin/virtio-tee", "broker", "--fs-folder")
        assert more == "$VIRTIO_TEE_BROKER_OPTIONS"
        assert option in CliRunner().invoke(main, ["broker", "--help"]).output
        assert "[options.data_files]" in (setup := (ROOT / "setup.cfg").read_text())
        assert all(f"docs/systemd/{unit.name}" in setup for unit in UNITS.iterdir())

    @pytest.mark.lab
    @WITH_SYSTEMD
    def test_systemd_accepts_them(self, tmp_path: Path) -> None:
        for unit in UNITS.iterdir():
            # what need not be installed here: the program, and its man page
            text = unit.read_text().replace("/usr/bin/virtio-tee ", "/bin/true ")
            (tmp_path / unit.name).write_text(re.sub("(?m)^Documentation=.*$", "", text))
        for name in (
            *("virtio-tee@web.service", "virtio-tee@web.socket"),
            *("virtio-tee-broker.service", "virtio-tee-broker@web.socket"),
        ):
            template = tmp_path / re.sub("web", "", name)
            if template.name != name:
                (tmp_path / name).symlink_to(template.name)
            done = subprocess.run(
                ["systemd-analyze", "verify", str(tmp_path / name)],
                env={**os.environ, "SYSTEMD_UNIT_PATH": f"{tmp_path}:"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stderr, done.stdout) == (0, "", "")

    @pytest.mark.lab
    @WITH_SYSTEMD
    @pytest.mark.parametrize(("unit", "most"), [("virtio-tee@.service", 5), ("virtio-tee-broker.service", 15)])
    def test_it_is_hardened(self, unit: str, most: int) -> None:
        done = subprocess.run(
            ["systemd-analyze", "security", "--offline=true", f"--threshold={most}", str(UNITS / unit)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout  # the threshold is in tenths: 5 is an exposure of at most 0.5


class TestManPage:
    def test_it_is_what_the_parser_says(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: Any, tmp_path: Path
    ) -> None:
        manpage = _load()
        assert manpage.main(["--check"]) == 0, "run `make docs`"
        monkeypatch.setattr(manpage, "ROOT", tmp_path)
        monkeypatch.setattr(manpage, "PAGE", tmp_path / "man/x.1")
        assert manpage.main(["--check"]) == 1
        assert manpage.main([]) == manpage.main(["--check"]) == 0
        assert manpage.main(["--nonsense"]) == 2
        assert "make docs" in capsys.readouterr().err

    def test_it_has_all_commands_and_options(self) -> None:
        text = (ROOT / "docs/man/virtio-tee.1").read_text().replace("\\-", "-")
        for command in ("serve", "demo", "guest info", "guest invoke", "supplicant", "ta sign", "decode"):
            assert f".SS virtio-tee {command} " in text
        for option in ("--metrics", "--max-sessions", "--fs-folder", "--allow-socket"):
            assert option in text

    def test_man_shows_it(self) -> None:
        if shutil.which("groff") is None:
            pytest.skip("groff is not here")
        shown = subprocess.run(
            ["groff", "-man", "-Tutf8", "-ww", "-z", str(ROOT / "docs/man/virtio-tee.1")],
            capture_output=True,
            text=True,
            check=True,
        )
        assert shown.stderr == ""


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_manpage", ROOT / "docs/manpage.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _warnings() -> Iterator[tuple[str, str]]:
    """Where, and the text of each warning of the backend's."""
    for path in sorted((ROOT / "host_backend").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _LOUD:
                text = node.args[0]
                assert isinstance(text, ast.Constant)
                yield f"{path.name}:{node.lineno}", str(text.value)


_LOUD = ("warning", "error", "exception", "critical")


def test_every_warning_says_what_to_do() -> None:
    found = list(_warnings())
    assert found
    for where, text in found:
        assert re.search(r"[;:] .*\b(look|tell|update|report|raise|restart|name|add)\b", text), f"{where}: {text}"
        said = [part for part in re.split(r"%[sd]", text.partition(";")[0]) if len(part) > 12]
        assert any(part.strip(" :") in OPERATION for part in said), f"{where} is not in docs/operation.md: {said}"


def test_options_of_enclaves(tmp_path: Path) -> None:
    for rule in ("x", "x:y", "a:b:c:d"):
        refused = CliRunner().invoke(main, ["serve", "-s", str(tmp_path / "s"), "--share-enclaves", rule])
        assert refused.exit_code == 2
        assert "NAMES:SHARERS:USERS" in refused.stderr
    (tmp_path / "key").write_text("none")
    refused = CliRunner().invoke(main, ["serve", "-s", str(tmp_path / "s"), "--attestation-key", str(tmp_path / "key")])
    assert refused.exit_code == 2
