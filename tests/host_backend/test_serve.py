"""``virtio-tee serve`` as a process."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from device.config import Limits
from device.wire import Feature
from guest_driver.client import Context, ValueInOut
from guest_driver.core import DRIVER_FEATURES, VirtioTeeDriver
from guest_driver.vhost_user import VhostUserTransport
from host_backend.serve import Endpoint, ServeConfig
from pyvhost.io.frontend import Frontend
from tee import package
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Supplicant
from tee.results import TeeError
from tee.soft import examples

HELLO = examples.UUIDS["hello_world"]
KEYS = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signer's public key and a folder of TAs."""
    folder = tmp_path_factory.mktemp("serve")
    (folder / "key.pem").write_bytes(KEYS.public)
    (folder / f"{HELLO}.ta").write_bytes(package.sign(examples.source("hello_world"), HELLO, 1, KEYS.private))
    return folder


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, "-m", "virtio_tee", "serve", *map(str, arguments)]


@contextmanager
def serving(*arguments: str | Path, fds: Sequence[int] = ()) -> Iterator[subprocess.Popen[str]]:
    """A backend that is ready."""
    with subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, pass_fds=fds) as process:
        try:
            assert process.stderr is not None
            assert process.stderr.readline() == "virtio-tee: ready\n"
            yield process
        finally:
            if process.poll() is None:
                process.kill()
            process.communicate(timeout=20)


def hello(path: str | Path, folder: Path) -> None:
    """A whole guest's life at ``path``."""
    driver = VirtioTeeDriver(VhostUserTransport(str(path), wanted=int(DRIVER_FEATURES)))
    try:
        with (
            TeeRuntime(driver, Supplicant([folder])) as runtime,
            Context(runtime) as context,
            context.open_session(HELLO) as session,
        ):
            assert session.invoke(0, ValueInOut(41))[0] == (42, 0, 0)
    finally:
        driver.close()


@pytest.mark.feature("Backend: several sockets, served again after the frontend leaves, ends on SIGTERM")
@pytest.mark.requirement("DEV-VHU-4")
def test_two_sockets_again_and_again(tmp_path: Path, folder: Path) -> None:
    paths = [tmp_path / name for name in ("a", "b")]
    with serving("-s", paths[0], "-s", paths[1], "--vm", "a", "--vm", "b", "--ta-key", folder / "key.pem") as process:
        for path in (*paths, paths[0]):
            hello(path, folder)
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    assert not any(path.exists() for path in paths)


def test_sigterm_with_a_guest(tmp_path: Path) -> None:
    with serving("--socket-path", tmp_path / "s") as process, Frontend.connect(tmp_path / "s") as frontend:
        frontend.negotiate()
        process.terminate()
        assert process.wait(20) == 0


def test_an_inherited_listening_socket(tmp_path: Path, folder: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "s"))
        listening.listen()
        with serving("--fd", str(listening.fileno()), "--ta-key", folder / "key.pem", fds=[listening.fileno()]):
            for _ in range(2):
                hello(tmp_path / "s", folder)


def test_inherited_connections(tmp_path: Path) -> None:
    """The backend ends when all of its frontends have left, and not before."""
    pairs = [socket.socketpair() for _ in range(2)]
    arguments = [word for _, theirs in pairs for word in ("--fd", str(theirs.fileno()))]
    with serving(*arguments, fds=[theirs.fileno() for _, theirs in pairs]) as process:
        for _, theirs in pairs:
            theirs.close()
        one, two = (Frontend(ours) for ours, _ in pairs)
        one.negotiate()
        one.close()
        two.negotiate()
        assert two.read_config(0, 4) == b"VTEE"
        assert process.poll() is None
        two.close()
        assert process.wait(20) == 0


def run(*arguments: str | Path, fds: Sequence[int] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=30, check=False, pass_fds=fds)


@pytest.mark.fault("no-supplicant")
@pytest.mark.feature("Backend: TAs from the host's own folder (serve --ta-folder)")
@pytest.mark.parametrize("features", [int(DRIVER_FEATURES), int(Feature.INLINE)], ids=["no supplicant", "no RPC"])
def test_tas_of_the_host(tmp_path: Path, folder: Path, features: int) -> None:
    path = tmp_path / "s"
    with serving("-s", path, "--ta-key", folder / "key.pem", "--ta-folder", folder):
        driver = VirtioTeeDriver(VhostUserTransport(str(path), wanted=features))
        with TeeRuntime(driver) as runtime, Context(runtime) as context:
            with context.open_session(HELLO) as session:
                assert session.invoke(0, ValueInOut(41))[0] == (42, 0, 0)
            with pytest.raises(TeeError):
                context.open_session(examples.UUIDS["probe"])
        driver.close()


def test_print_capabilities() -> None:
    shown = run("--socket-path", "/nowhere/at/all", "--threads", "3", "--print-capabilities", "--fd", "77")
    assert shown.returncode == 0
    assert json.loads(shown.stdout)["type"] == "tee"


def test_a_path_in_use(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with serving("-s", path):
        second = run("-s", path)
        assert (second.returncode, "in use" in second.stderr) == (1, True)
        third = run("-s", tmp_path / "no" / "such" / "folder")
        assert (third.returncode, "Traceback" in third.stderr) == (1, False)
    left_behind = run("-s", path, "--print-capabilities")
    assert left_behind.returncode == 0


def test_a_descriptor_that_is_no_socket() -> None:
    read, write = os.pipe()
    try:
        for fd, fds in ((read, [read]), (99, [])):
            shown = run("--fd", str(fd), fds=fds)
            assert (shown.returncode, "Traceback" in shown.stderr) == (2, False)
    finally:
        os.close(read)
        os.close(write)


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--no-such-option"],
        ["-s", "x", "--max-params", "0"],
        ["-s", "x", "--max-params", "3"],
        ["-s", "x", "--max-params", "100"],
        ["-s", "x", "--max-region-ranges", "100000"],
        ["-s", "x", "-s", "y", "--vm", "a", "--vm", "a"],
        ["-s", "x", "--vm", "a", "--vm", "b"],
        ["-s", "x", "--ta-key", "/no/such/file"],
    ],
)
def test_wrong_usage(arguments: list[str]) -> None:
    from click.testing import CliRunner

    from virtio_tee.serve import serve

    shown = CliRunner().invoke(serve, arguments)
    assert shown.exit_code == 2
    assert "Usage" in shown.stderr


@pytest.mark.requirement("DEV-CFG-1", "DEV-CFG-2", "DEV-CFG-3")
def test_limits_must_fit_each_other() -> None:
    Limits().check()
    for limits in (
        Limits(max_params=31),
        Limits(max_region_ranges=20_500),
        Limits(rpc_deadline_ms=0),
        Limits(max_params=3),
        Limits(event_buffer_size=823),
    ):
        with pytest.raises(ValueError, match=r"must|takes"):
            ServeConfig([Endpoint("vm", path="x")], limits)
    ServeConfig([Endpoint("vm", path="x")], Limits(max_params=4, event_buffer_size=56 + 32 * 4))
    with pytest.raises(ValueError, match="queues"):
        ServeConfig([Endpoint("vm", path="x")], request_queues=65)


@pytest.mark.started
def test_a_signal_that_comes_at_once(tmp_path: Path) -> None:
    """Whoever is told that it is ready may end it."""
    code = (
        "import os, signal, sys, time, secrets, trio\n"
        "from host_backend.serve import Endpoint, ServeConfig, serve\n"
        "from tee.soft import SoftTee\n"
        "tee = SoftTee(clock=time.monotonic, random=secrets.token_bytes)\n"
        "config = ServeConfig([Endpoint('a', path=sys.argv[1])])\n"
        "trio.run(lambda: serve(tee, config, ready=lambda: os.kill(os.getpid(), signal.SIGTERM)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "s")], timeout=60, check=False)
    assert done.returncode == 0
