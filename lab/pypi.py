"""Wheels from PyPI for the guest, and the Python tools that QEMU's build needs on the host."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.cache import LabError, build_once, digest, say, scratch, sha256_of
from lab.lock import File, Lock, Pin
from lab.run import output

DEFAULT_PYTHON = "3.11"


def for_python(version: str) -> tuple[str, ...]:
    """pip must not find what a folder on this machine happens to hold for another Python."""
    number = version.replace(".", "")
    return f"--python-version={version}", "--implementation=cp", f"--abi=cp{number}", "--abi=abi3", "--abi=none"


def split_wheel_name(name: str) -> tuple[str, str]:
    """(project, version) of a wheel's file name, the project in PyPI's normal form."""
    project, version = name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", project).lower(), version


def wheels(
    names: Sequence[str],
    arch: str,
    platforms: Sequence[str],
    python: str = DEFAULT_PYTHON,
    lock: Lock | None = None,
) -> dict[str, Path]:
    """Project → wheel for the guest's Python, of the locked version where PyPI still has it."""
    lock = lock or Lock()
    section = f"pypi/{arch}" if python == DEFAULT_PYTHON else f"pypi/{arch}/{python}"
    pins = {name: lock.get(section, name) for name in names}
    for name, pin in pins.items():
        if pin is not None and pin.is_stored:
            continue
        found = _download(name, pin, section, [*for_python(python), *(f"--platform={one}" for one in platforms)])
        lock.put(section, {name: found})
        pins[name] = found
    return {name: pin.files[0].stored for name, pin in pins.items() if pin is not None}


def _pip() -> list[str | Path]:
    probe = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True)
    if probe.returncode == 0:
        return [sys.executable, "-m", "pip"]
    return [_empty_venv() / "bin" / "python3", "-m", "pip"]


def _empty_venv() -> Path:
    return build_once("venv", f"pip-{digest(sys.version)}", lambda path: _make_venv(path))


def _make_venv(path: Path) -> None:
    output([sys.executable, "-m", "venv", "--copies", path])


def _download(name: str, pin: Pin | None, section: str, fitting: Sequence[str]) -> Pin:
    with scratch("wheel") as folder:
        fetch: list[str | Path] = [*_pip(), "download", "-q", "--no-deps", "--only-binary=:all:"]
        fetch += [*fitting, "-d", folder]
        try:
            output([*fetch, f"{name}=={pin.version}" if pin else name])
        except LabError:
            if pin is None:
                raise
            say(f"{section}: {name} {pin.version} could not be had; taking the newest")
            output([*fetch, name])
        (wheel,) = folder.glob("*.whl")
        version = split_wheel_name(wheel.name)[1]
        file = File(wheel.name, sha256_of(wheel), wheel.stat().st_size)
        if pin is not None and pin.version == version and pin.files and file not in pin.files:
            raise LabError(f"{section}: {wheel.name} is not the file that the lock file names")
        file.stored.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(wheel, file.stored)
        say(f"{section}: {name} {version}")
        return Pin(version, (file,))


def tool_python(specs: Sequence[str], lock: Lock | None = None) -> Path:
    """The Python of a virtual environment that has these (`name` or `name<limit`) installed."""
    lock = lock or Lock()
    section = "pypi/tools"
    names = {re.split(r"[<>=!~]", spec)[0]: spec for spec in specs}
    pins = {name: lock.get(section, name) for name in names}
    wanted = [f"{name}=={pin.version}" if (pin := pins[name]) else spec for name, spec in names.items()]

    def make(path: Path) -> None:
        _make_venv(path)
        pip: list[str | Path] = [path / "bin" / "python3", "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        try:
            output([*pip, *wanted])
        except LabError:
            for want, (name, spec) in zip(wanted, names.items(), strict=True):
                try:
                    output([*pip, want])
                except LabError:
                    if pins[name] is None:
                        raise
                    say(f"{section}: {want} could not be had; taking the newest that fits {spec}")
                    output([*pip, spec])
        listed = output([path / "bin" / "python3", "-m", "pip", "list", "--format=freeze"])
        versions = dict(line.split("==", 1) for line in listed.splitlines() if "==" in line)
        normal = {re.sub(r"[-_.]+", "-", k).lower(): v for k, v in versions.items()}
        lock.put(section, {name: Pin(normal[re.sub(r"[-_.]+", "-", name).lower()]) for name in names})

    # the path is part of a virtual environment, so it cannot be built elsewhere and renamed: --copies and
    # `python3 -m` keep it working
    return build_once("venv", digest(sys.version, *wanted), make) / "bin" / "python3"
