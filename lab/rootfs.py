"""Builds what all guests of the lab have in their initramfs, whatever boots them.

It has three parts. The big one holds Debian's and PyPI's packages; the second one holds what this checkout contains
(our packages, the agent, /init), so that a change of the code costs a second; the third one a kernel's modules.
"""

from __future__ import annotations

import configparser
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt, unpack_debs
from lab.arch import HOST, Arch
from lab.cache import LabError, build_once, cache_root, digest, say
from lab.cpio import write_tree
from lab.pypi import wheels
from lab.run import output, tail

REPO = Path(__file__).resolve().parents[1]
OUR_PACKAGES = ("pyvhost", "tee", "device", "guest_driver", "host_backend", "ffa", "virtio_tee")
KERNEL_DRIVER = ("guest_driver", "linux")  # in C: nothing for Python
GUEST_FILES = REPO / "lab" / "guest"


WHEELS = (
    "attrs",
    "cffi",
    "click",
    "construct",
    "cryptography",
    "idna",
    "markdown-it-py",
    "mdurl",
    "outcome",
    "pycparser",
    "pygments",
    "rich",
    "sniffio",
    "sortedcontainers",
    "trio",
)


@dataclass(frozen=True)
class System:
    """A Debian release that guests have, with its Python."""

    suite: str
    python: str
    packages: tuple[str, ...]  # Python's, with all that they need
    wheels: tuple[str, ...] = WHEELS  # of PyPI, what our packages need

    @property
    def stdlib(self) -> str:
        return f"usr/lib/python{self.python}"

    @property
    def local(self) -> str:
        """Where this checkout's packages go."""
        return f"usr/local/lib/python{self.python}/dist-packages"

    @property
    def not_needed(self) -> tuple[str, ...]:
        folders = ("ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tkinter", "turtledemo")
        return ("usr/include", "usr/share", *(f"{self.stdlib}/{name}" for name in folders))


BOOKWORM = System(
    "bookworm",
    "3.11",
    (
        "libbz2-1.0",
        "libc6",
        "libcrypt1",
        "libexpat1",
        "libffi8",
        "libgcc-s1",
        "liblzma5",
        "libpython3.11-minimal",
        "libpython3.11-stdlib",
        "libsqlite3-0",
        "libssl3",
        "libuuid1",
        "python3.11",
        "python3.11-minimal",
        "zlib1g",
    ),
)
TRIXIE = System(
    "trixie",
    "3.13",
    (
        "libbz2-1.0",
        "libc6",
        "libexpat1",
        "libffi8",
        "libgcc-s1",
        "liblzma5",
        "libpython3.13-minimal",
        "libpython3.13-stdlib",
        "libsqlite3-0",
        "libssl3t64",
        "libuuid1",
        "libzstd1",
        "python3.13",
        "python3.13-minimal",
        "zlib1g",
    ),
)
BUSYBOX = "busybox-static"
APPLETS = tuple(
    """
    [ awk basename cat chmod chown cp cttyhack cut date dd df dirname dmesg du echo env expr false find free grep
    head hexdump hostname id ifconfig insmod ip kill killall ln ls lsmod mkdir mknod mktemp mount mv ping
    poweroff printf ps pwd readlink reboot rm rmdir rmmod sed seq setsid sh sha256sum sleep sort stat stty sync
    tail tee test time timeout top touch tr true umount uname uniq vi wc which xargs yes
    """.split()  # noqa: SIM905
)
SITE = "usr/lib/python3/dist-packages"  # where Debian's Python looks, without any variable set
PROGRAMS = (b"#!", b"\x7fELF")  # how their files begin
RECIPE = 3


def ensure_base(arch: Arch = HOST, system: System = BOOKWORM) -> Path:
    """The folder with `base.cpio`, and `root/`, what is in it: Python, busybox, PyPI's packages; no kernel modules."""
    debs = Apt(system.suite, arch.debian).debs((BUSYBOX, *system.packages, *arch.packages))
    packages = wheels(system.wheels, arch.debian, arch.wheels, system.python)
    key = digest(
        str(RECIPE),
        *APPLETS,
        *system.not_needed,
        *(p.parent.name for p in (*debs.values(), *packages.values())),
    )

    def make(new: Path) -> None:
        say(f"building the guest's file system of {len(debs)} Debian packages and {len(packages)} wheels")
        root = new / "root"
        unpack_debs(debs.values(), root)
        _finish_root(root, arch, system)
        site = root / SITE
        site.mkdir(parents=True, exist_ok=True)
        for wheel in packages.values():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        _compile_python(root, system, [system.stdlib, SITE])
        _drop_sources(root, system)
        with (new / "base.cpio").open("wb") as out:
            write_tree(root, out)
        say(f"the guest's file system has {(new / 'base.cpio').stat().st_size / 1e6:.0f} MB")

    return build_once("guest-base", key, make)


def _finish_root(root: Path, arch: Arch, system: System) -> None:
    libraries = root / "usr" / "lib" / arch.triplet
    for path in (*(root / name for name in system.not_needed), libraries / "audit", libraries / "gconv"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in ("dev", "proc", "sys", "tmp", "run", "root", "mnt", "etc", "var", "usr/local/bin"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in APPLETS:
        applet = root / "usr" / "bin" / name
        if not applet.exists() and not applet.is_symlink():
            applet.symlink_to("busybox")
    python = root / "usr" / "bin" / "python3"
    if not python.is_symlink():
        python.symlink_to(f"python{system.python}")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    (root / "etc" / "group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")


def _compile_python(root: Path, system: System, folders: Sequence[str]) -> None:
    """Compile with the guest's Python, of this machine's architecture, so that the guest need not, on its slow CPU."""
    home = Apt(system.suite, HOST.debian).tree(system.packages) / "usr"
    libraries = home / "lib" / HOST.triplet
    command: list[str | Path] = [
        *(libraries / "ld-linux-x86-64.so.2", "--library-path", libraries, home / "bin" / f"python{system.python}"),
        *("-m", "compileall", "-q", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/"),
    ]
    env = {"PYTHONHOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    output([*command, *(root / f for f in folders)], env=env)


def _drop_sources(root: Path, system: System) -> None:
    """Keep only the compiled standard library: the initramfs is unpacked at each boot."""
    stdlib, suffix = root / system.stdlib, f".cpython-{system.python.replace('.', '')}.pyc"
    for cache in sorted(stdlib.rglob("__pycache__")):
        for compiled in cache.glob(f"*{suffix}"):
            source = cache.parent / f"{compiled.name.removesuffix(suffix)}.py"
            if source.exists() and not source.is_symlink():
                compiled.replace(source.with_suffix(".pyc"))
                source.unlink()
        shutil.rmtree(cache)


def ensure_modules(ordered: Sequence[tuple[str, bytes]]) -> Path:
    """`modules.cpio`: these modules (name, contents), which /init loads in this order."""

    def make(new: Path) -> None:
        into = new / "root" / "usr" / "lib" / "modules" / "lab"  # /lib is a link
        into.mkdir(parents=True)
        for name, data in ordered:
            (into / f"{name}.ko").write_bytes(data)
        (into / "order").write_text("".join(f"{name}.ko\n" for name, _ in ordered))
        with (new / "modules.cpio").open("wb") as out:
            write_tree(new / "root", out)
        shutil.rmtree(new / "root")

    key = digest(str(RECIPE), *(part for name, data in ordered for part in (name, data)))
    _forget_old(cache_root() / "guest-modules", keep=20)
    return build_once("guest-modules", key, make) / "modules.cpio"


# -- this checkout ------------------------------------------------------------------------------------------


def _our_files(system: System) -> dict[str, bytes]:
    """Path in the guest → contents, of what the checkout gives to it."""
    files: dict[str, bytes] = {
        "init": (GUEST_FILES / "init").read_bytes(),
        "usr/local/lib/lab/agent.py": (GUEST_FILES / "agent.py").read_bytes(),
    }
    for package in OUR_PACKAGES:
        for path in sorted((REPO / package).rglob("*")):
            parts = path.relative_to(REPO).parts
            if path.is_file() and "__pycache__" not in parts and parts[:2] != KERNEL_DRIVER:
                files[f"{system.local}/{'/'.join(parts)}"] = path.read_bytes()
    version = _version()
    entry = "#!/usr/bin/python3\nimport sys\n\nfrom virtio_tee.__main__ import main\n\nsys.exit(main())\n"
    files["usr/local/bin/virtio-tee"] = entry.encode()
    metadata = f"Metadata-Version: 2.1\nName: virtio-tee\nVersion: {version}\n"
    files[f"{system.local}/virtio_tee-{version}.dist-info/METADATA"] = metadata.encode()
    return files


def _version() -> str:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(REPO / "setup.cfg")
    return parser.get("metadata", "version", fallback="0")


def ensure_checkout(extra: Sequence[tuple[str, Path]] = (), system: System = BOOKWORM) -> Path:
    """`ours.cpio`: what this checkout gives to a guest. `extra`: files to add, each as (path there, file here)."""
    files = _our_files(system)
    for name, path in extra:
        if not path.is_file():
            raise LabError(f"{path}, meant for the guest's {name}, is not there")
        files[name.lstrip("/")] = path.read_bytes()
    key = digest(str(RECIPE), *(part for item in sorted(files.items()) for part in item))

    def make(new: Path) -> None:
        root = new / "root"
        for name, data in files.items():
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            path.chmod(0o755 if data.startswith(PROGRAMS) else 0o644)
        for path in [p for p in root.rglob("*") if p.is_dir()]:
            path.chmod(0o755)
        try:
            _compile_python(root, system, [system.local, "usr/local/lib/lab"])
        except LabError as error:
            # a file that does not compile is for the guest to complain about, if it is used there
            say(f"not all of this checkout compiles:\n{tail(str(error), 5)}")
        with (new / "ours.cpio").open("wb") as out:
            write_tree(root, out)
        shutil.rmtree(root)

    _forget_old(cache_root() / "guest-ours", keep=20)
    return build_once("guest-ours", key, make) / "ours.cpio"


def _forget_old(folder: Path, keep: int) -> None:
    """Each change of the code makes one of these: keep the latest few."""
    if folder.is_dir():
        for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)[keep:]:
            shutil.rmtree(path, ignore_errors=True)
