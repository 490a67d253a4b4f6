"""The lab's helpers that need no QEMU, no archive and no root."""

from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from lab import apt, cache, cpio, hostdeps, kernel, mirror, pypi, run
from lab.agent import AgentClient, AgentError
from lab.arch import ARCHS, Arch
from lab.guest.agent import Agent
from lab.lock import File, Lock, Pin
from lab.qemu.build import TARGETS, QemuBuild
from lab.qemu.command import GuestConfig, command_line
from lab.uml import guest as uml
from lab.uml.__main__ import device
from lab.uml.exports import symvers


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VIRTIO_TEE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# -- cache ----------------------------------------------------------------------------------------------


def test_the_cache_folder_is_the_first_of_three(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_root() == tmp_path / "cache"
    monkeypatch.delenv("VIRTIO_TEE_CACHE")
    assert cache.cache_root() == tmp_path / "xdg" / "virtio-tee"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache.cache_root() == tmp_path / "home" / ".cache" / "virtio-tee"


def test_a_result_is_built_once_and_only_whole_ones_are_kept(own_cache: Path) -> None:
    made: list[Path] = []

    def half(path: Path) -> None:
        (path / "a").write_text("1")
        raise RuntimeError("power cut")

    def whole(path: Path) -> None:
        (path / "a").write_text("2")
        made.append(path)

    with pytest.raises(RuntimeError):
        cache.build_once("thing", "key", half)
    assert not (own_cache / "thing" / "key").exists()
    assert (cache.build_once("thing", "key", whole) / "a").read_text() == "2"
    cache.build_once("thing", "key", whole)
    assert len(made) == 1
    assert list((own_cache / "tmp").iterdir()) == []


def test_a_digest_knows_where_its_parts_end() -> None:
    assert cache.digest("ab", "c") != cache.digest("a", "bc")
    assert cache.digest("ab") == cache.digest(b"ab")


# -- archives -------------------------------------------------------------------------------------------

DEB822 = """\
Types: deb
# a comment
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main

Types: deb
Enabled: no
URIs: http://off.example/debian
Suites: bookworm
Components: main
"""


def test_the_mirror_is_found_in_both_formats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTIO_TEE_DEBIAN_MIRROR", raising=False)
    parts = tmp_path / "sources.list.d"
    parts.mkdir()
    (parts / "a.list").write_text("deb https://tools.example/apt bookworm main\n")
    (tmp_path / "sources.list").write_text(
        "deb http://m.example/debian-security bookworm-security main\n"
        "deb [signed-by=/x arch=amd64] http://one.example/debian/ bookworm main contrib # x\n"
    )
    assert mirror.debian_mirror(tmp_path) == "http://one.example/debian"
    (parts / "debian.sources").write_text(DEB822)
    assert mirror.debian_mirror(tmp_path) == "http://mirror.example/debian"
    monkeypatch.setenv("VIRTIO_TEE_DEBIAN_MIRROR", "http://mine.example/debian/")
    assert mirror.debian_mirror(tmp_path) == "http://mine.example/debian"


def test_no_mirror_says_what_to_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTIO_TEE_DEBIAN_MIRROR", raising=False)
    (tmp_path / "sources.list").write_text("deb https://tools.example/apt stable main\n")
    with pytest.raises(cache.LabError, match="VIRTIO_TEE_DEBIAN_MIRROR"):
        mirror.debian_mirror(tmp_path)


def test_what_apt_prints_is_understood() -> None:
    sha = "ab" * 32
    text = f"Reading package lists...\n'http://x/pool/a_1%3a2.deb' a_1%3a2_amd64.deb 12462 SHA256:{sha}\n"
    assert apt.parse_uris(text) == [File("a_1%3a2_amd64.deb", sha, 12462)]
    listed = (
        " seabios | 1.16.3-2 | http://m.example/debian trixie/main amd64 Packages\n"
        " seabios | 1.16.3-1 | http://m.example/debian trixie/main Sources\n"
    )
    assert apt.parse_madison(listed, "Packages") == {"seabios": ["1.16.3-2"]}
    assert apt.parse_madison(listed, "Sources") == {"seabios": ["1.16.3-1"]}


def test_the_newest_is_in_dpkgs_order() -> None:
    assert apt.newest(["1:10.0.2-1", "1:10.0.13-1", "2:1~rc1", "1:10.0.13-1~bpo12+1"]) == "2:1~rc1"
    assert apt.newest(["6.12.9+deb12", "6.12.95+deb12", "6.12.90+deb12.1"]) == "6.12.95+deb12"


class FakeApt(apt.Apt):
    """An archive with one package in one version."""

    def __init__(self, lock: Lock, version: str) -> None:
        super().__init__("trixie", lock=lock)
        self.version = version
        self.data = f"contents of {version}".encode()

    def _update(self) -> None:
        pass

    def _tool(self, tool: str, *argv: str, cwd: Path | None = None) -> str:
        if tool == "apt-cache":
            return f" hello | {self.version} | http://m.example/debian trixie/main amd64 Packages\n"
        name = f"hello_{self.version}_amd64.deb"
        if "--print-uris" in argv:
            sha = hashlib.sha256(self.data).hexdigest()
            return f"'http://m.example/{name}' {name} {len(self.data)} SHA256:{sha}\n"
        assert cwd is not None
        (cwd / name).write_bytes(self.data)
        return ""


def test_a_vanished_version_is_named_and_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = Lock(tmp_path / "packages.lock")
    first = FakeApt(lock, "1.0").debs(["hello"])["hello"]
    assert first.read_bytes() == b"contents of 1.0"
    # the archive moves on; what is stored is still used, without asking it
    second = FakeApt(lock, "1.1")
    assert second.debs(["hello"])["hello"] == first
    capsys.readouterr()
    first.unlink()
    assert second.debs(["hello"])["hello"].read_bytes() == b"contents of 1.1"
    assert "hello 1.0 has vanished" in capsys.readouterr().err
    pin = lock.get("trixie/amd64", "hello")
    assert pin is not None
    assert pin.version == "1.1"


def test_a_file_that_differs_from_the_lock_is_refused(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "packages.lock")
    lock.put("trixie/amd64", {"hello": Pin("1.0", (File("hello_1.0_amd64.deb", "00" * 32, 3),))})
    with pytest.raises(cache.LabError, match=r"hello 1\.0 is not the file"):
        FakeApt(lock, "1.0").debs(["hello"])


def test_the_lock_file_is_stable(tmp_path: Path) -> None:
    lock = Lock(tmp_path / "packages.lock")
    pin = Pin("1", (File("a.deb", "0" * 64, 7),))
    lock.put("s", {"b": Pin("2"), "a": pin})
    text = lock.path.read_text()
    lock.put("s", {"a": pin})
    assert lock.path.read_text() == text
    assert lock.get("s", "a") == pin
    assert lock.get("s", "missing") is None


def test_packages_are_unpacked_into_one_merged_usr(tmp_path: Path) -> None:
    debs = []
    for name, file in (("old", "lib/liba"), ("new", "usr/lib/libb")):
        tree = tmp_path / name
        (tree / file).parent.mkdir(parents=True)
        (tree / file).write_text(name)
        (tree / "DEBIAN").mkdir()
        control = f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: {name}\n"
        (tree / "DEBIAN" / "control").write_text(control)
        debs.append(tmp_path / f"{name}.deb")
        run.output(["dpkg-deb", "--root-owner-group", "--build", tree, debs[-1]])
    apt.unpack_debs(debs, tmp_path / "root")
    assert (tmp_path / "root" / "lib").readlink() == Path("usr/lib")
    assert {path.name for path in (tmp_path / "root" / "usr" / "lib").iterdir()} == {"liba", "libb"}


def test_a_tree_of_packages_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[list[str]] = []

    def unpack(debs: Iterable[Path], root: Path) -> None:
        made.append([deb.name for deb in debs])
        (root / "file").touch()

    monkeypatch.setattr(apt, "unpack_debs", unpack)
    fake = FakeApt(Lock(tmp_path / "packages.lock"), "1.0")
    first = fake.tree(["hello"])
    assert [path.name for path in first.iterdir()] == ["file"]
    assert fake.tree(["hello"]) == first
    assert FakeApt(Lock(tmp_path / "other.lock"), "2.0").tree(["hello"]) != first
    assert made == [["hello_1.0_amd64.deb"], ["hello_2.0_amd64.deb"]]


def test_wheel_names() -> None:
    assert pypi.split_wheel_name("markdown_it_py-4.3.0-py3-none-any.whl") == ("markdown-it-py", "4.3.0")


def test_installed_packages_count_with_what_they_provide() -> None:
    listed = "ii \tpkgconf-bin\tpkg-config (= 1), x\nrc \tgone\t\nii \tgcc\t\n"
    assert hostdeps._installed(listed) == {"pkgconf-bin", "pkg-config", "x", "gcc"}


def test_without_root_the_command_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(hostdeps.SETS, "base", ("no-such-package-1", "no-such-package-2"))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(sys, "argv", ["lab.hostdeps", "--for", "base"])
    assert hostdeps.main() == 2
    assert "sudo apt-get install no-such-package-1 no-such-package-2\n" in capsys.readouterr().err


# -- the guest's parts ----------------------------------------------------------------------------------


def test_an_archive_is_the_same_each_time_and_readable(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "sh").write_bytes(b"#!")
    (root / "bin" / "sh").chmod(0o755)
    (root / "link").symlink_to("bin/sh")
    out = io.BytesIO()
    cpio.write_tree(root, out)
    again = io.BytesIO()
    cpio.write_tree(root, again)
    assert out.getvalue() == again.getvalue()
    assert len(out.getvalue()) % cpio.BLOCK == 0
    names: list[str] = []
    data: dict[str, bytes] = {}
    at = 0
    raw = out.getvalue()
    while not names or names[-1] != "TRAILER!!!":
        head = raw[at : at + 110]
        assert head[:6] == b"070701"
        size, length = int(head[54:62], 16), int(head[94:102], 16)
        name = raw[at + 110 : at + 109 + length].decode()
        at += (110 + length + 3) // 4 * 4
        data[name] = raw[at : at + size]
        at += (size + 3) // 4 * 4
        names.append(name)
    assert names == ["bin", "bin/sh", "link", "TRAILER!!!"]
    assert data["bin/sh"] == b"#!"
    assert data["link"] == b"bin/sh"


def test_modules_are_loaded_after_those_they_need(tmp_path: Path) -> None:
    def module(name: str, depends: str) -> None:
        (tmp_path / name).write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0")

    module("uio.ko", "")
    module("uio-pci-generic.ko", "uio,built_in")
    (tmp_path / "modules.builtin").write_text("kernel/x/built-in.ko\n")
    assert [n for n, _ in kernel.load_order(tmp_path, ["uio_pci_generic"])] == ["uio", "uio_pci_generic"]
    with pytest.raises(cache.LabError, match="no module tee"):
        kernel.load_order(tmp_path, ["tee"])


def test_a_kernel_that_is_no_bzimage_stays_packed() -> None:
    assert kernel.unpacked_image(bytes(4096)) is None


def test_each_socket_becomes_a_device() -> None:
    qemu = QemuBuild(Path("/q"), "x86_64-softmmu", "10")
    config = GuestConfig(sockets=["/a", "/b"], accel="kvm", num_request_queues=3, device_options="packed=on")
    argv = command_line(config, qemu, Path("/k"), Path("/i"))
    devices = [a for a in argv if a.startswith("vhost-user-tee-pci")]
    assert [d.split(",")[1] for d in devices] == ["id=tee0", "id=tee1"]
    assert all("num-request-queues=3" in d and d.endswith(",packed=on") for d in devices)
    assert argv[0] == "/q/bin/qemu-system-x86_64"
    assert "host" in argv


@pytest.mark.parametrize("arch", ARCHS.values(), ids=lambda arch: arch.name)
def test_each_architecture_has_its_machine(arch: Arch) -> None:
    """The memory is shared, and the console is one that the kernel is told of."""
    qemu = QemuBuild(Path("/q"), arch.target, "10")
    argv = command_line(GuestConfig(arch=arch, accel="tcg"), qemu, Path("/k"), Path("/i"))
    after = dict(itertools.pairwise(argv))
    assert argv[0] == f"/q/bin/qemu-system-{arch.name}"
    assert after["-M"].endswith(",memory-backend=mem")
    assert after["-object"].startswith("memory-backend-memfd,id=mem,")
    assert after["-object"].endswith(",share=on")
    assert after["-append"].startswith("console=tty")
    assert after["-cpu"].startswith("max")
    assert arch.target in TARGETS


# -- the agent ------------------------------------------------------------------------------------------


class EndingAgent(Agent):
    def no_host(self) -> None:
        raise EOFError


@pytest.fixture
def client() -> Iterator[AgentClient]:
    ours, port = socket.socketpair()
    client = AgentClient(ours)

    def serve() -> None:
        # a guest that was reset leaves half a line
        port.sendall(b'{"id": 1, "stdo')
        with contextlib.suppress(EOFError, OSError):
            EndingAgent(port.fileno()).loop()

    thread = threading.Thread(target=serve)
    thread.start()
    yield client
    port.shutdown(socket.SHUT_RDWR)
    client.close()
    thread.join()
    port.close()


def test_a_request_that_a_guests_line_does_not_take_is_not_sent() -> None:
    ours, port = socket.socketpair()
    client = AgentClient(ours, longest=100)
    with pytest.raises(AgentError, match="more than the guest's line takes"):
        client.call("put", 5, data="x" * 100)
    client.close()
    assert port.recv(1) == b""
    port.close()


def test_the_agent_runs_commands_and_moves_files(client: AgentClient, tmp_path: Path) -> None:
    assert client.wait_ready(None, 5)
    assert client.boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    code = "import os, sys; sys.stdout.write(sys.stdin.read() + os.environ['X']); sys.exit(3)"
    answer = client.call(
        "run",
        20,
        argv=[sys.executable, "-c", code],
        env={"X": "x"},
        stdin=base64.b64encode(b"in").decode(),
        timeout=10,
        cwd=str(tmp_path),
    )
    assert answer["returncode"] == 3
    assert base64.b64decode(str(answer["stdout"])) == b"inx"
    answer = client.call("run", 20, argv=["sleep", "30"], timeout=0.1, cwd=str(tmp_path))
    assert answer["timed_out"] is True

    path = tmp_path / "deep" / "file"
    for append, part in ((False, b"ab"), (True, b"c")):
        client.call("put", 5, path=str(path), data=base64.b64encode(part).decode(), append=append, mode=0o600)
    assert path.read_bytes() == b"abc"
    assert os.stat(path).st_mode & 0o777 == 0o600
    answer = client.call("get", 5, path=str(path), offset=1, size=10)
    assert base64.b64decode(str(answer["data"])) == b"bc"
    with pytest.raises(AgentError, match="FileNotFoundError"):
        client.call("get", 5, path=str(tmp_path / "none"), size=1)


def test_the_lock_file_of_the_repository_names_versions_only() -> None:
    lock = Path(cache.__file__).with_name("packages.lock")
    content = json.loads(lock.read_text())
    assert "qemu" in content["trixie/source"]
    assert "http" not in lock.read_text()


# -- user-mode-linux ------------------------------------------------------------------------------------


def test_exports_are_read_from_a_kernel_without_symbols(tmp_path: Path) -> None:
    """One name is the end of another, as linkers make it; one symbol has a namespace."""
    strings = b"vfree\0put_x\0SPACE\0"
    address = 0x6000_0000

    def entry(name: int, namespace: int | None = None) -> bytes:
        return struct.pack("<QQQ", 0x1234, address + name, 0 if namespace is None else address + namespace)

    parts = [
        (b"", 0, b""),
        (b"__ksymtab", 0, entry(0) + entry(1)),
        (b"__ksymtab_gpl", 0, entry(6, 12)),
        (b"__ksymtab_strings", address, strings),
    ]
    names = b"\0".join(name for name, _, _ in parts) + b"\0.names\0"
    parts.append((b".names", 0, names))
    heads, body = b"", b""
    for name, at, data in parts:
        heads += struct.pack("<IIQQQQ24x", names.index(name + b"\0"), 1, 0, at, 64 + len(body), len(data))
        body += data
    ident = b"\x7fELF\x02\x01".ljust(16, b"\0")
    elf = ident + struct.pack("<24xQ10xHHH", 64 + len(body), 64, len(parts), len(parts) - 1) + body + heads
    assert list(symvers(elf)) == [
        "0x00000000\tvfree\tvmlinux\tEXPORT_SYMBOL\t\n",
        "0x00000000\tfree\tvmlinux\tEXPORT_SYMBOL\t\n",
        "0x00000000\tput_x\tvmlinux\tEXPORT_SYMBOL_GPL\tSPACE\n",
    ]
    with pytest.raises(cache.LabError, match="ELF"):
        list(symvers(b"MZ" + elf))


def test_each_device_of_user_mode_linux_is_a_socket_and_an_id() -> None:
    config = uml.UmlConfig(devices=[("/a", 4), (Path("/b"), 46)], append="lab.x y")
    argv = uml.command_line(config, Path("/linux"), Path("/i"), Path("/f"), "null,fd:1")
    assert argv[0] == "/linux"
    assert [a for a in argv if a.startswith("virtio_uml")] == ["virtio_uml.device=/a:4", "virtio_uml.device=/b:46"]
    assert argv[-2:] == ["lab.x", "y"]
    assert device("/tmp/a:b.sock:46") == ("/tmp/a:b.sock", 46)
    for wrong in ("/tmp/a", "/tmp/a:", ":4", "/tmp/a:x"):
        with pytest.raises(argparse.ArgumentTypeError, match="SOCKET:ID"):
            device(wrong)


def test_memory_needs_room_and_leave_to_execute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(uml, "MEMORY_FOLDERS", (str(tmp_path / "none"), str(tmp_path)))
    assert uml.memory_folder(1) == str(tmp_path)
    with pytest.raises(cache.LabError, match="TMPDIR"):
        uml.memory_folder(1 << 40)


def test_modules_of_ours_come_beside_the_kernels(tmp_path: Path) -> None:
    (tmp_path / "kernel").mkdir()
    (tmp_path / "kernel" / "a.ko").write_bytes(b"\0depends=\0")
    own = tmp_path / "own-one.ko"
    own.write_bytes(b"\0depends=a\0")
    assert [n for n, _ in kernel.load_order(tmp_path / "kernel", ["own_one"], [own])] == ["a", "own_one"]
