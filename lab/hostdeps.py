"""What the host itself must have installed: `python -m lab.hostdeps --for base|lab|optee`.

As root the missing Debian packages are installed; for anyone else the exact command is printed and the
exit status is 2.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys

from lab.cache import LabError, say

BASE = ("python3-venv",)
LAB = (
    *BASE,
    "bc",
    "bison",
    "ca-certificates",
    "dpkg-dev",
    "e2fsprogs",
    "flex",
    "gcc",
    "gcc-aarch64-linux-gnu",
    "libc6-dev",
    "libc6-dev-arm64-cross",
    "libfdt-dev",
    "libglib2.0-dev",
    "libpixman-1-dev",
    "make",
    "ninja-build",
    "patch",
    "perl",
    "pkg-config",
    "qemu-user",
    "systemd",
    "xz-utils",
    "zstd",
)
OPTEE = (
    *LAB,
    "device-tree-compiler",
    "libssl-dev",
    "python3",
    "python3-cryptography",
    "python3-pyelftools",
)
SETS: dict[str, tuple[str, ...]] = {"base": BASE, "lab": LAB, "optee": OPTEE}


def missing(names: tuple[str, ...]) -> list[str]:
    """Those that dpkg does not know as installed, or provided by something installed."""
    query = ["dpkg-query", "-W", "-f", "${db:Status-Abbrev}\t${Package}\t${Provides}\n"]
    try:
        listed = subprocess.run(query, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise LabError(f"this needs a Debian host; dpkg-query: {error}") from error
    return [name for name in names if name not in _installed(listed)]


def _installed(listed: str) -> set[str]:
    found: set[str] = set()
    for line in listed.splitlines():
        status, package, provides = (*line.split("\t"), "", "")[:3]
        if status.startswith("ii"):
            found.add(package)
            found.update(p.split("(")[0].strip() for p in provides.split(",") if p.strip())
    return found


def require(which: str) -> None:
    """Have the packages of a set installed, or raise with the command that does it."""
    need = missing(SETS[which])
    if not need:
        return
    if os.geteuid() != 0:
        raise LabError(f"Debian packages are missing. Type:\n  sudo apt-get install {' '.join(need)}")
    say(f"installing {' '.join(need)}")
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "-q", "-y", "--no-install-recommends", "install", *need]
    for argv in (["apt-get", "-q", "update"], install):
        done = subprocess.run(argv, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if done.returncode and argv is install:
            raise LabError(f"{' '.join(argv)}\nended with {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m lab.hostdeps", description=__doc__)
    parser.add_argument("--for", dest="which", choices=sorted(SETS), default="base", help="the set of packages")
    parser.add_argument("--list", action="store_true", help="only print the names of the set")
    args = parser.parse_args()
    if args.list:
        print("\n".join(SETS[args.which]))
        return 0
    try:
        require(args.which)
    except LabError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
