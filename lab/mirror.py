"""The Debian mirror that this machine's own apt uses."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from lab.cache import LabError

APT_ETC = Path("/etc/apt")


def parse_one_line(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(URI, suite, components) of each `deb` line of a sources.list."""
    for line in text.splitlines():
        words = re.sub(r"\[[^]]*\]", "", line.split("#")[0]).split()
        if len(words) >= 3 and words[0] == "deb":
            yield words[1], words[2], words[3:]


def parse_deb822(text: str) -> Iterator[tuple[str, str, list[str]]]:
    """(URI, suite, components) of each stanza of a .sources file."""
    for stanza in re.split(r"\n\s*\n", text):
        fields: dict[str, str] = {}
        last = ""
        for line in stanza.splitlines():
            if line.startswith("#"):
                continue
            if line[:1] in (" ", "\t") and last:
                fields[last] += " " + line.strip()
            elif ":" in line:
                key, value = line.split(":", 1)
                last = key.strip().lower()
                fields[last] = value.strip()
        if "deb" not in fields.get("types", "").split() or fields.get("enabled", "yes").lower() == "no":
            continue
        for uri in fields.get("uris", "").split():
            for suite in fields.get("suites", "").split():
                yield uri, suite, fields.get("components", "").split()


def choose(entries: list[tuple[str, str, list[str]]]) -> str | None:
    """The first archive that looks like Debian's own: component main of a suite, at a path `…/debian`."""
    for uri, suite, components in entries:
        if "main" in components and uri.rstrip("/").endswith("/debian") and "security" not in suite:
            return uri.rstrip("/")
    return None


def debian_mirror(etc: Path = APT_ETC) -> str:
    given = os.environ.get("VIRTIO_TEE_DEBIAN_MIRROR")
    if given:
        return given.rstrip("/")
    entries: list[tuple[str, str, list[str]]] = []
    lists = [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*.list"))]
    for path in sorted((etc / "sources.list.d").glob("*.sources")):
        entries += parse_deb822(path.read_text())
    for path in lists:
        if path.exists():
            entries += parse_one_line(path.read_text())
    found = choose(entries)
    if found is None:
        raise LabError(
            f"no Debian archive found in {etc}/sources.list and sources.list.d;"
            " name one: VIRTIO_TEE_DEBIAN_MIRROR=http://…/debian"
        )
    return found
