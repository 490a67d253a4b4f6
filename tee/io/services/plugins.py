"""PLUGIN: callables that TAs call by UUID, as OP-TEE's tee-supplicant has shared libraries for.

A plug-in is called with (command, sub-command, data) and gives bytes, which go back into the same memory; a
:class:`~tee.results.TeeError` that it raises gives the result. Plug-ins are found by what the operator names
(``UUID=MODULE:NAME``), or as entry points of installed packages: group ``virtio_tee.plugins``, the name the UUID.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import entry_points
from typing import cast
from uuid import UUID

from tee.io.services.base import Allocator, Log, ReplyError, Result, bad, count, memref, put, refuse, value
from tee.params import Direction, MemRef, Param, Value
from tee.results import TeeError

Plugin = Callable[[int, int, bytes], bytes]

#: The group of entry points.
GROUP = "virtio_tee.plugins"

#: The only function of the command.
INVOKE = 0

#: How many bytes a plug-in may be called with.
MAX_DATA = 4 << 20

_WORD = 0xFFFF_FFFF


class Plugins:
    """Serves PLUGIN with ``plugins`` by UUID."""

    def __init__(self, plugins: Mapping[UUID, Plugin], log: Log) -> None:
        self._plugins = dict(plugins)
        self._log = log

    def serve(self, params: list[Param], _: Allocator) -> list[Param]:
        """PLUGIN: [a = 0, b, c = words of the UUID], [a, b = its other words, c = command],
        [INOUT a = sub-command; answered b = bytes that the plug-in gives], [INOUT memory]."""
        count(params, 4)
        first = value(params, 0, Direction.IN)
        second = value(params, 1, Direction.IN)
        third = value(params, 2, Direction.INOUT)
        data = memref(params, 3, Direction.INOUT)
        if first.a != INVOKE:
            raise refuse(Result.NOT_SUPPORTED, f"function {first.a} of plug-ins")
        words = (first.b, first.c, second.a, second.b)
        if any(not 0 <= word <= _WORD for word in words):
            raise bad("a plug-in's UUID is four words of 32 bits")
        uuid = UUID(bytes=b"".join(word.to_bytes(4, "little") for word in words))
        plugin = self._plugins.get(uuid)
        if plugin is None:
            raise refuse(Result.ITEM_NOT_FOUND, f"there is no plug-in {uuid}: register it with --plugin")
        if data.size > MAX_DATA or (data.size and data.memory is None):
            raise bad(f"{data.size} bytes for a plug-in")
        given = data.memory.read(data.offset, data.size) if data.memory is not None else b""
        answer = self._call(uuid, plugin, second.c & _WORD, third.a & _WORD, given)
        counted = Value(Direction.INOUT, third.a, len(answer), third.c)
        if len(answer) > data.size:
            raise ReplyError(Result.SHORT_BUFFER, [first, second, counted, data])
        if answer:
            put(data, answer)
        # the reference keeps its size, as with OP-TEE's supplicant: how much of it is the answer stands in the value
        return [first, second, counted, MemRef(data.direction, data.memory, data.offset, data.size)]

    def _call(self, uuid: UUID, plugin: Plugin, command: int, sub_command: int, data: bytes) -> bytes:
        try:
            return bytes(plugin(command, sub_command, data))
        except TeeError:
            raise
        except Exception as error:  # it is code of somebody else's
            self._log(f"plug-in {uuid} failed, and its TA was told GENERIC; tell its author: {error!r}")
            raise refuse(Result.GENERIC, f"plug-in {uuid}") from None


def load(specs: Iterable[str]) -> dict[UUID, Plugin]:
    """Plug-ins from texts ``UUID=MODULE:NAME``. Raises ValueError that says which is wrong, and why."""
    found: dict[UUID, Plugin] = {}
    for spec in specs:
        name, _, where = spec.partition("=")
        module, _, attribute = where.partition(":")
        try:
            uuid = UUID(name)
            plugin = getattr(importlib.import_module(module), attribute)
        except (ValueError, ImportError, AttributeError) as error:
            raise ValueError(f"plug-in {spec!r}: {error}") from None
        if not callable(plugin):
            raise ValueError(f"plug-in {spec!r}: {attribute} cannot be called")
        if uuid in found:
            raise ValueError(f"plug-in {spec!r}: {uuid} is given twice")
        found[uuid] = cast(Plugin, plugin)
    return found


def installed() -> list[str]:
    """The plug-ins that installed packages offer, as :func:`load` takes them."""
    return [f"{entry.name}={entry.module}:{entry.attr}" for entry in entry_points(group=GROUP)]
