"""Where TAs may connect to: the operator's list, and the rule that only what is on it is ever resolved.

An entry is ``HOST:PORT``, with ``tcp://`` or ``udp://`` in front where it is for one of them only. HOST is a name, an
address (IPv6 in brackets) or a network (``10.0.0.0/8``); PORT is a number or ``*``. A name is asked of DNS only if it
is on the list as it stands: otherwise a TA could tell things to whoever answers for a domain. A name that is not on
the list is not allowed because its address is.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

_ENTRY = re.compile(r"(?:(?P<kind>tcp|udp)://)?(?:\[(?P<v6>[^\]]+)\]|(?P<host>[^:\[\]]+)):(?P<port>\d{1,5}|\*)")
_NAME = re.compile(r"(?!-)[a-z0-9-]{1,63}(?:\.(?!-)[a-z0-9-]{1,63})*\.?")


@dataclass(frozen=True, slots=True)
class Destination:
    """One entry of the list. ``kind`` "" stands for both, ``port`` 0 for all."""

    kind: str
    host: str | Network
    port: int

    @classmethod
    def parse(cls, entry: str) -> Destination:
        """An entry from its text. Raises ValueError that says what is wrong."""
        found = _ENTRY.fullmatch(entry)
        if found is None:
            raise ValueError(f"{entry!r} is no HOST:PORT (IPv6 in brackets, PORT may be *)")
        port = 0 if found["port"] == "*" else int(found["port"])
        if found["port"] != "*" and not 1 <= port <= 65535:
            raise ValueError(f"{entry!r}: there is no port {port}")
        text = found["v6"] or found["host"]
        try:
            return cls(found["kind"] or "", ipaddress.ip_network(text, strict=False), port)
        except ValueError:
            name = text.lower()
            # what consists of figures is a mistyped address, and systems differ in what they make of it
            if found["v6"] or not _NAME.fullmatch(name) or not re.search("[a-z]", name) or name.startswith("0x"):
                raise ValueError(f"{entry!r}: {text!r} is neither a name nor an address") from None
            return cls(found["kind"] or "", name.rstrip("."), port)


@dataclass(frozen=True, slots=True)
class AllowList:
    """What is allowed."""

    entries: tuple[Destination, ...] = ()

    @classmethod
    def parse(cls, entries: tuple[str, ...] | list[str]) -> AllowList:
        """A list from its texts. Raises ValueError."""
        return cls(tuple(Destination.parse(entry) for entry in entries))

    def allows(self, kind: str, host: str, port: int) -> bool:
        """Whether a TA may connect there; ``host`` is what it says, a name or an address."""
        address = literal(host)
        name = host.lower().rstrip(".")
        for entry in self.entries:
            if entry.kind not in ("", kind) or entry.port not in (0, port):
                continue
            if address is None and entry.host == name:
                return True
            if address is not None and not isinstance(entry.host, str) and address in entry.host:
                return True
        return False


def literal(host: str) -> Address | None:
    """The address that ``host`` is, or None. IPv4 within IPv6 counts as the IPv4 address that it leads to; an address
    of one interface (``%``) is none: the list cannot say which."""
    try:
        if "%" in host:
            return None
        address = ipaddress.ip_address(host)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address
