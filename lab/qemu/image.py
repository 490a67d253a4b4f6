"""Builds what a guest boots: Debian's kernel, and an initramfs with Python in it: `ensure_image()`.

The initramfs has two parts. The big one holds Debian's and PyPI's packages; the small one holds what this
checkout contains (our packages, the agent, /init), so that a change of the code costs a second.
"""

from __future__ import annotations

import configparser
import shutil
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.apt import Apt, unpack_deb, unpack_debs
from lab.cache import LabError, build_once, cache_root, digest, say, scratch
from lab.cpio import write_tree
from lab.kernel import load_order, unpacked_image
from lab.pypi import wheels
from lab.qemu.arch import HOST, X86_64, Arch
from lab.run import output, tail

REPO = Path(__file__).resolve().parents[2]
OUR_PACKAGES = ("pyvhost", "tee", "device", "guest_driver", "host_backend", "ffa", "virtio_tee")
KERNEL_DRIVER = ("guest_driver", "linux")  # in C: nothing for Python
GUEST_FILES = REPO / "lab" / "guest"

SUITE = "bookworm"
KERNEL_SUITE = "bookworm-backports"
MODULES = ("uio", "uio_pci_generic", "virtio_rng")
PYTHON_DEBS = (
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
)
DEBS = ("busybox-static", *PYTHON_DEBS)
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
APPLETS = tuple(
    """
    [ awk basename cat chmod chown cp cttyhack cut date dd df dirname dmesg du echo env expr false find free grep
    head hexdump hostname id ifconfig insmod ip kill killall ln ls lsmod mkdir mknod mktemp mount mv ping
    poweroff printf ps pwd readlink reboot rm rmdir rmmod sed seq setsid sh sha256sum sleep sort stat stty sync
    tail tee test time timeout top touch tr true umount uname uniq vi wc which xargs yes
    """.split()  # noqa: SIM905
)
NOT_NEEDED = (
    "usr/include",
    "usr/share",
    "usr/lib/python3.11/ensurepip",
    "usr/lib/python3.11/idlelib",
    "usr/lib/python3.11/lib2to3",
    "usr/lib/python3.11/pydoc_data",
    "usr/lib/python3.11/test",
    "usr/lib/python3.11/tkinter",
    "usr/lib/python3.11/turtledemo",
)
STDLIB = "usr/lib/python3.11"
SITE = "usr/lib/python3/dist-packages"  # where Debian's Python looks, without any variable set
LOCAL = "usr/local/lib/python3.11/dist-packages"
PROGRAMS = (b"#!", b"\x7fELF")  # how their files begin
RECIPE = 2


@dataclass(frozen=True)
class GuestImage:
    kernel: Path
    initrds: tuple[Path, ...]  # to be concatenated, in this order
    kernel_release: str
    arch: Arch


def ensure_image(
    modules: Sequence[str] = MODULES, extra: Sequence[tuple[str, Path]] = (), arch: Arch = X86_64
) -> GuestImage:
    """Kernel and initramfs, from the cache or built now.

    `modules`: kernel modules that /init loads, by name; what they need is found. `extra`: files to add, each
    as (path in the guest, file here).
    """
    apt = Apt(KERNEL_SUITE, arch.debian)
    kernel_package = apt.name_like(arch.kernel)
    kernel_deb = apt.debs([kernel_package])[kernel_package]
    release = kernel_package.removeprefix("linux-image-")
    kernel = _kernel(kernel_deb, release)
    base = _base(arch, kernel, release, tuple(modules))
    return GuestImage(kernel / "vmlinux", (base / "base.cpio", _ours(extra) / "ours.cpio"), release, arch)


def _kernel(deb: Path, release: str) -> Path:
    """The kernel image and all its modules."""

    def make(new: Path) -> None:
        say(f"unpacking the kernel {release}")
        with scratch("kernel") as folder:
            unpack_deb(deb, folder)
            boot = folder / "boot" / f"vmlinuz-{release}"
            (new / "vmlinux").write_bytes(unpacked_image(boot.read_bytes()) or boot.read_bytes())
            lib = folder / "usr" / "lib" if (folder / "usr" / "lib" / "modules").is_dir() else folder / "lib"
            shutil.move(lib / "modules" / release, new / "modules")

    return build_once("guest-kernel", f"{release}-{digest(str(RECIPE), deb.parent.name)}", make)


def _base(arch: Arch, kernel: Path, release: str, modules: tuple[str, ...]) -> Path:
    debs = Apt(SUITE, arch.debian).debs((*DEBS, *arch.packages))
    packages = wheels(WHEELS, arch.debian, arch.wheels)
    key = digest(
        str(RECIPE),
        release,
        *modules,
        *APPLETS,
        *NOT_NEEDED,
        *(p.parent.name for p in (*debs.values(), *packages.values())),
    )

    def make(new: Path) -> None:
        say(f"building the guest's file system of {len(debs)} Debian packages and {len(packages)} wheels")
        root = new / "root"
        unpack_debs(debs.values(), root)
        _finish_root(root, root / "usr" / "lib" / arch.triplet)
        site = root / SITE
        site.mkdir(parents=True, exist_ok=True)
        for wheel in packages.values():
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(site)
        compile_python(root, [STDLIB, SITE])
        _drop_sources(root / STDLIB)
        _modules(root, kernel / "modules", modules)
        with (new / "base.cpio").open("wb") as out:
            write_tree(root, out)
        say(f"the guest's file system has {(new / 'base.cpio').stat().st_size / 1e6:.0f} MB")

    return build_once("guest-base", key, make)


def _finish_root(root: Path, libraries: Path) -> None:
    for path in (*(root / name for name in NOT_NEEDED), libraries / "audit", libraries / "gconv"):
        shutil.rmtree(path, ignore_errors=True)
    for folder in ("dev", "proc", "sys", "tmp", "run", "root", "mnt", "etc", "var", "usr/local/bin"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in APPLETS:
        applet = root / "usr" / "bin" / name
        if not applet.exists() and not applet.is_symlink():
            applet.symlink_to("busybox")
    python = root / "usr" / "bin" / "python3"
    if not python.is_symlink():
        python.symlink_to("python3.11")
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534::/:/bin/false\n")
    (root / "etc" / "group").write_text("root:x:0:\nnogroup:x:65534:\n")
    (root / "etc" / "hosts").write_text("127.0.0.1 localhost\n")


def compile_python(root: Path, folders: Sequence[str]) -> None:
    """Compile with the Python that the guest has, as this machine can run it: the guest's CPU is slow."""
    home = Apt(SUITE, HOST).tree(PYTHON_DEBS) / "usr"
    libraries = home / "lib" / X86_64.triplet
    command: list[str | Path] = [
        *(libraries / "ld-linux-x86-64.so.2", "--library-path", libraries, home / "bin" / "python3.11"),
        *("-m", "compileall", "-q", "-j", "0", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/"),
    ]
    env = {"PYTHONHOME": str(home), "PATH": "/usr/bin:/bin", "PYTHONDONTWRITEBYTECODE": "1"}
    output([*command, *(root / f for f in folders)], env=env)


def _drop_sources(stdlib: Path) -> None:
    """Keep only the compiled standard library: the initramfs is unpacked at each boot."""
    for cache in sorted(stdlib.rglob("__pycache__")):
        for compiled in cache.glob("*.cpython-311.pyc"):
            source = cache.parent / f"{compiled.name.removesuffix('.cpython-311.pyc')}.py"
            if source.exists() and not source.is_symlink():
                compiled.replace(source.with_suffix(".pyc"))
                source.unlink()
        shutil.rmtree(cache)


def _modules(root: Path, folder: Path, wanted: Sequence[str]) -> None:
    into = root / "lib" / "modules" / "lab"
    into.mkdir(parents=True)
    names = []
    for name, data in load_order(folder, wanted):
        (into / f"{name}.ko").write_bytes(data)
        names.append(f"{name}.ko")
    (into / "order").write_text("".join(f"{n}\n" for n in names))


# -- this checkout ------------------------------------------------------------------------------------------


def _our_files() -> dict[str, bytes]:
    """Path in the guest → contents, of what the checkout gives to it."""
    files: dict[str, bytes] = {
        "init": (GUEST_FILES / "init").read_bytes(),
        "usr/local/lib/lab/agent.py": (GUEST_FILES / "agent.py").read_bytes(),
    }
    for package in OUR_PACKAGES:
        for path in sorted((REPO / package).rglob("*")):
            parts = path.relative_to(REPO).parts
            if path.is_file() and "__pycache__" not in parts and parts[:2] != KERNEL_DRIVER:
                files[f"{LOCAL}/{'/'.join(parts)}"] = path.read_bytes()
    version = _version()
    entry = "#!/usr/bin/python3\nimport sys\n\nfrom virtio_tee.__main__ import main\n\nsys.exit(main())\n"
    files["usr/local/bin/virtio-tee"] = entry.encode()
    metadata = f"Metadata-Version: 2.1\nName: virtio-tee\nVersion: {version}\n"
    files[f"{LOCAL}/virtio_tee-{version}.dist-info/METADATA"] = metadata.encode()
    return files


def _version() -> str:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(REPO / "setup.cfg")
    return parser.get("metadata", "version", fallback="0")


def _ours(extra: Sequence[tuple[str, Path]]) -> Path:
    files = _our_files()
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
            compile_python(root, [LOCAL, "usr/local/lib/lab"])
        except LabError as error:
            # a file that does not compile is for the guest to complain about, if it is used there
            say(f"not all of this checkout compiles:\n{tail(str(error), 5)}")
        with (new / "ours.cpio").open("wb") as out:
            write_tree(root, out)
        shutil.rmtree(root)

    _forget_old(cache_root() / "guest-ours", keep=20)
    return build_once("guest-ours", key, make)


def _forget_old(folder: Path, keep: int) -> None:
    """Each change of the code makes one of these: keep the latest few."""
    if folder.is_dir():
        for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime, reverse=True)[keep:]:
            shutil.rmtree(path, ignore_errors=True)
