"""What a kernel exports to modules, read from its ELF file as a `Module.symvers`: a stripped kernel keeps this, too.

Sources: the ELF-64 specification; include/linux/export.h (`struct kernel_symbol`, without relative references, as
user-mode-linux has it), scripts/mod/modpost.c (the lines of Module.symvers).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lab.cache import LabError

TABLES = {"__ksymtab": "EXPORT_SYMBOL", "__ksymtab_gpl": "EXPORT_SYMBOL_GPL"}
STRINGS = "__ksymtab_strings"
_ELF64_LITTLE = b"\x7fELF\x02\x01"
_SECTION = struct.Struct("<IIQQQQ")  # name, type, flags, address, offset, size; more follows
_SYMBOL = struct.Struct("<QQQ")  # address, name, namespace or 0


@dataclass(frozen=True)
class _Section:
    address: int
    data: bytes

    def text(self, address: int) -> str:
        """The string at this address of the program. Strings share their ends."""
        start = address - self.address
        if not 0 <= start < len(self.data):
            raise LabError(f"a symbol's name at {address:#x} is outside of {STRINGS}")
        return self.data[start : self.data.index(b"\0", start)].decode()


def _sections(elf: bytes) -> dict[str, _Section]:
    if not elf.startswith(_ELF64_LITTLE):
        raise LabError("the kernel is no ELF file of 64 bits, little-endian")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names_at = struct.unpack_from("<HHH", elf, 0x3A)
    heads = [_SECTION.unpack_from(elf, table + n * size) for n in range(count)]
    bodies = [_Section(address, elf[offset : offset + length]) for _, _, _, address, offset, length in heads]
    names = _Section(0, bodies[names_at].data)
    return {names.text(head[0]): body for head, body in zip(heads, bodies, strict=True)}


def symvers(elf: bytes) -> Iterator[str]:
    """The lines of Module.symvers for a kernel without MODVERSIONS (all checksums are 0)."""
    sections = _sections(elf)
    for table, kind in TABLES.items():
        for _, name, namespace in _SYMBOL.iter_unpack(sections[table].data):
            strings = sections[STRINGS]
            space = strings.text(namespace) if namespace else ""
            yield f"0x00000000\t{strings.text(name)}\tvmlinux\t{kind}\t{space}\n"
