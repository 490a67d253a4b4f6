"""Debian packages and source packages of any suite, through an apt state of the lab's own.

Nothing of the host's package system changes: own lists, own sources, no installed packages known.
A version that `packages.lock` names is preferred. If the archive has it no more, that is said, and the
newest of the same suite takes its place in the lock file.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from lab.cache import LabError, build_once, cache_root, digest, locked, say, scratch, sha256_of
from lab.lock import File, Lock, Pin
from lab.mirror import debian_mirror
from lab.run import output

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_URI_LINE = re.compile(r"^'([^']+)' (\S+) (\d+) SHA256:([0-9a-f]{64})", re.MULTILINE)


def newest(versions: Iterable[str]) -> str:
    """The highest version in dpkg's order."""

    def order(a: str, b: str) -> int:
        if a == b:
            return 0
        later = subprocess.run(["dpkg", "--compare-versions", a, "gt", b]).returncode == 0
        return 1 if later else -1

    return max(versions, key=functools.cmp_to_key(order))


def parse_uris(text: str) -> list[File]:
    """The files that `apt-get --print-uris` names, with sizes and hashes."""
    return [File(name, sha, int(size)) for _, name, size, sha in _URI_LINE.findall(text)]


def parse_madison(text: str, kind: str) -> dict[str, list[str]]:
    """Package → versions, from `apt-cache madison`; `kind` is Packages or Sources."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        columns = [c.strip() for c in line.split("|")]
        if len(columns) == 3 and columns[2].split()[-1:] == [kind]:
            found.setdefault(columns[0], []).append(columns[1])
    return found


class Apt:
    """One suite for one architecture."""

    def __init__(self, suite: str, arch: str = "amd64", lock: Lock | None = None) -> None:
        self.suite = suite
        self.arch = arch
        self.lock = lock or Lock()
        self._updated = False

    # -- what others call -------------------------------------------------------------------------------

    def debs(self, names: Sequence[str]) -> dict[str, Path]:
        """Package name → its .deb file."""
        pins = self._pins(f"{self.suite}/{self.arch}", names, source=False)
        return {name: pin.files[0].stored for name, pin in pins.items()}

    def tree(self, names: Sequence[str]) -> Path:
        """The root folder of a system with these packages only, in the cache: for reading, and for copying from."""
        debs = self.debs(names).values()
        key = digest(*(deb.parent.name for deb in debs))
        return build_once(f"packages-{self.suite}-{self.arch}", key, lambda new: unpack_debs(debs, new))

    def source(self, name: str) -> tuple[str, list[Path]]:
        """The version of a source package, and its files (.dsc, tarballs)."""
        pin = self._pins(f"{self.suite}/source", [name], source=True)[name]
        return pin.version, [f.stored for f in pin.files]

    def name_like(self, pattern: str) -> str:
        """The package whose name matches the pattern; of several, the one with the highest name. Kept in the lock."""
        section = f"{self.suite}/names"
        pin = self.lock.get(section, pattern)
        if pin is not None:
            known = self.lock.get(f"{self.suite}/{self.arch}", pin.version)
            if (known is not None and known.is_stored) or self._versions([pin.version], "Packages"):
                return pin.version
            say(f"{self.suite}: {pin.version} has vanished from the archive")
        self._update()
        names = self._tool("apt-cache", "pkgnames").split()
        fitting = [n for n in names if re.fullmatch(pattern, n)]
        if not fitting:
            raise LabError(f"{self.suite}: no package is named like {pattern}")
        # dpkg compares what starts with a digit
        versions = {re.sub(r"^\D*", "", n): n for n in fitting}
        chosen = versions[newest(versions)]
        say(f"{self.suite}: {pattern} is {chosen}")
        self.lock.put(section, {pattern: Pin(chosen)})
        return chosen

    # -- how --------------------------------------------------------------------------------------------

    @property
    def _state(self) -> Path:
        return cache_root() / "apt" / f"{self.suite}-{self.arch}"

    def _config(self) -> Path:
        """The apt configuration that is read last, over the host's."""
        state = self._state
        (state / "lists" / "partial").mkdir(parents=True, exist_ok=True)
        (state / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
        mirror = debian_mirror()
        signed = f" signed-by={KEYRING}" if KEYRING.exists() else ""
        (state / "sources.list").write_text(
            f"deb [arch={self.arch}{signed}] {mirror} {self.suite} main\n"
            f"deb-src [{signed.strip()}] {mirror} {self.suite} main\n".replace(" []", "")
        )
        options = {
            "APT::Architecture": self.arch,
            "APT::Sandbox::User": "root",
            "Acquire::Languages": "none",
            "Dir::Cache": state / "cache",
            "Dir::Etc::sourcelist": state / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "Dir::State": state,
            "Dir::State::Lists": state / "lists",
            "Dir::State::status": "/dev/null",
        }
        config = state / "apt.conf"
        config.write_text(
            "#clear APT::Update::Post-Invoke;\n#clear APT::Update::Post-Invoke-Success;\n"
            f'#clear APT::Architectures;\nAPT::Architectures {{ "{self.arch}"; }};\n'
            + "".join(f'{key} "{value}";\n' for key, value in options.items())
        )
        return config

    def _tool(self, tool: str, *argv: str, cwd: Path | None = None) -> str:
        return output([tool, "-c", self._config(), "-q", *argv], cwd=cwd)

    def _update(self) -> None:
        if not self._updated:
            say(f"reading the package lists of {self.suite} ({self.arch})")
            self._tool("apt-get", "update", "-o", "APT::Update::Error-Mode=any")
            self._updated = True

    def _versions(self, names: Sequence[str], kind: str) -> dict[str, list[str]]:
        self._update()
        return parse_madison(self._tool("apt-cache", "madison", *names), kind)

    def _pins(self, section: str, names: Sequence[str], *, source: bool) -> dict[str, Pin]:
        pins = {name: self.lock.get(section, name) for name in names}
        missing = [name for name, pin in pins.items() if pin is None or not pin.is_stored]
        if missing:
            with locked(f"apt-{self.suite}-{self.arch}"):
                found = self._download(section, missing, pins, source=source)
            self.lock.put(section, found)
            pins.update(found)
        return {name: pin for name, pin in pins.items() if pin is not None}

    def _download(
        self, section: str, names: Sequence[str], pins: dict[str, Pin | None], *, source: bool
    ) -> dict[str, Pin]:
        versions = self._versions(names, "Sources" if source else "Packages")
        chosen: dict[str, str] = {}
        for name in names:
            pin = pins[name]
            if name not in versions:
                was = f" (the lock file has {pin.version})" if pin else ""
                raise LabError(f"{section}: the archive has no package {name}{was}")
            if pin is not None and pin.version in versions[name]:
                chosen[name] = pin.version
                continue
            chosen[name] = newest(versions[name])
            if pin is not None:
                say(f"{section}: {name} {pin.version} has vanished from the archive; taking {chosen[name]}")
        result: dict[str, Pin] = {}
        verb = ["source", "--download-only"] if source else ["download"]
        wanted = [f"{name}={version}" for name, version in chosen.items()]
        per_name = {
            name: parse_uris(self._tool("apt-get", *verb, "--print-uris", want))
            for name, want in zip(chosen, wanted, strict=True)
        }
        total = sum(f.size for files in per_name.values() for f in files)
        say(f"{section}: downloading {len(names)} packages, {total / 1e6:.1f} MB")
        with scratch("download") as folder:
            self._tool("apt-get", *verb, *wanted, cwd=folder)
            for name, files in per_name.items():
                pin = pins[name]
                if not files:
                    raise LabError(f"{section}: apt names no file with a SHA256 for {name}")
                if pin is not None and pin.files and pin.version == chosen[name] and pin.files != tuple(files):
                    raise LabError(f"{section}: {name} {pin.version} is not the file that {self.lock.path} names")
                for file in files:
                    _store(folder / file.name, file)
                result[name] = Pin(chosen[name], tuple(files))
        return result


def _store(path: Path, file: File) -> None:
    if not path.is_file():
        raise LabError(f"apt did not download {file.name}")
    if sha256_of(path) != file.sha256:
        raise LabError(f"{file.name}: the SHA256 differs from what the archive's lists say")
    file.stored.parent.mkdir(parents=True, exist_ok=True)
    path.replace(file.stored)


def unpack_deb(deb: Path, into: Path) -> None:
    """The files of a .deb, without running anything of it. Links to folders in `into` are followed."""
    into.mkdir(parents=True, exist_ok=True)
    if not shutil.which("dpkg-deb"):
        raise LabError("dpkg-deb is not there: install the Debian package dpkg")
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as reader:
        tar = ["tar", "-C", str(into), "-x", "--keep-directory-symlink", "--no-same-owner", "--delay-directory-restore"]
        status = subprocess.run(tar, stdin=reader.stdout).returncode
    if status or reader.returncode:
        raise LabError(f"{deb.name} could not be unpacked into {into}")


def unpack_debs(debs: Iterable[Path], root: Path) -> None:
    """The files of several .debs in a root folder whose /usr is merged, as Debian's is."""
    for name in ("bin", "lib", "lib64", "sbin"):
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        unpack_deb(deb, root)
