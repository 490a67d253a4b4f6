"""The supplicant: what a TEE asks of the normal world, over any driver.

One :class:`Supplicant` serves one TEE; :meth:`Supplicant.serve` takes an RPC and gives its answer, blocking where it
reads files. It is used by guests, by the host's broker and by tests.

What it serves is a table of services (:mod:`tee.io.services`), one for each command; anything else is answered
NOT_SUPPORTED. It never names a path to the TEE, never opens a file outside its folders (symbolic links are not
followed), connects only where the operator allows, and bounds what it reads and what it allocates. Files, sockets and
plug-ins are there only if they are asked for: :class:`Services` says what there is.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from tee.io.services import plugins as plugin_service
from tee.io.services.base import Allocator as Allocator
from tee.io.services.base import Log, ReplyError, Service
from tee.io.services.destinations import AllowList
from tee.io.services.file_store import FileLimits, FileStore
from tee.io.services.files import Files
from tee.io.services.plugins import Plugin, Plugins
from tee.io.services.refused import I2C, NO_FILES, NO_PLUGINS, NO_SOCKETS, PROFILES, RPMB, refused
from tee.io.services.shared_memory import MAX_ALLOCATIONS as MAX_ALLOCATIONS
from tee.io.services.shared_memory import MAX_SHARED_MEMORY as MAX_SHARED_MEMORY
from tee.io.services.shared_memory import SharedMemory
from tee.io.services.sockets import Sockets
from tee.io.services.ta_loader import MAX_TA_SIZE as MAX_TA_SIZE
from tee.io.services.ta_loader import TaLoader
from tee.io.throttle import Throttle
from tee.memory import Memory
from tee.results import Result, TeeError
from tee.rpc import Rpc, RpcCommand, RpcReply, describe_command

_LIMITS = FileLimits()


class RpcServer(Protocol):
    """Whatever answers RPCs: a :class:`Supplicant`, or one in another process."""

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """The answer to ``rpc``. Never raises."""

    def forget(self, memory: Memory) -> None:
        """Free an allocation whose answer never reached the TEE. Nothing where it is not one."""

    def close(self) -> None:
        """Give back all that is held for the TEE."""


@dataclass(frozen=True, slots=True)
class Services:
    """What a supplicant serves, as text: it can be given to another process.

    ``fs_folder`` "": no files. ``allow_sockets``: entries as :mod:`tee.io.services.destinations` has them; none: no
    sockets. ``plugins``: ``UUID=MODULE:NAME``; ``installed_plugins`` adds those of installed packages.
    """

    ta_folders: tuple[str, ...] = ()
    fs_folder: str = ""
    fs_max_bytes: int = _LIMITS.max_bytes
    fs_max_files: int = _LIMITS.max_files
    fs_sync: bool = True
    allow_sockets: tuple[str, ...] = ()
    plugins: tuple[str, ...] = ()
    installed_plugins: bool = False

    def arguments(self) -> list[str]:
        """The command line that :meth:`parse` takes."""
        out: list[str] = []
        for folder in self.ta_folders:
            out += ["--ta-folder", folder]
        if self.fs_folder:
            out += ["--fs-folder", self.fs_folder]
        out += ["--fs-max-bytes", str(self.fs_max_bytes), "--fs-max-files", str(self.fs_max_files)]
        if not self.fs_sync:
            out.append("--fs-no-sync")
        for entry in self.allow_sockets:
            out += ["--allow-socket", entry]
        for plugin in self.plugins:
            out += ["--plugin", plugin]
        if self.installed_plugins:
            out.append("--installed-plugins")
        return out

    @staticmethod
    def add_to(parser: argparse.ArgumentParser) -> None:
        """Add the options to a command line."""
        parser.add_argument("--ta-folder", action="append", default=[], help="where <uuid>.ta files lie")
        parser.add_argument("--fs-folder", default="", help="where the TEE's files are kept")
        parser.add_argument("--fs-max-bytes", type=int, default=_LIMITS.max_bytes)
        parser.add_argument("--fs-max-files", type=int, default=_LIMITS.max_files)
        parser.add_argument("--fs-no-sync", action="store_true", help="answer before files are on the disk")
        parser.add_argument("--allow-socket", action="append", default=[], help="HOST:PORT that TAs may connect to")
        parser.add_argument("--plugin", action="append", default=[], help="UUID=MODULE:NAME that TAs may call")
        parser.add_argument("--installed-plugins", action="store_true", help="and those of installed packages")

    @classmethod
    def parsed(cls, options: argparse.Namespace) -> Services:
        """What a command line says."""
        return cls(
            tuple(options.ta_folder),
            options.fs_folder,
            options.fs_max_bytes,
            options.fs_max_files,
            not options.fs_no_sync,
            tuple(options.allow_socket),
            tuple(options.plugin),
            options.installed_plugins,
        )

    def check(self) -> None:
        """Raises ValueError for what makes no sense; opens nothing."""
        AllowList.parse(self.allow_sockets)
        plugin_service.load(self._plugins())

    def supplicant(self, *, log: Log | None = None) -> Supplicant:
        """A supplicant that serves this. Raises ValueError, and OSError where the folder cannot be used."""
        allowed = AllowList.parse(self.allow_sockets)
        plugins = plugin_service.load(self._plugins())
        limits = FileLimits(self.fs_max_bytes, self.fs_max_files)
        files = FileStore(self.fs_folder, limits, sync=self.fs_sync) if self.fs_folder else None
        return Supplicant(self.ta_folders, files=files, sockets=allowed, plugins=plugins, log=log)

    def _plugins(self) -> list[str]:
        return [*self.plugins, *(plugin_service.installed() if self.installed_plugins else ())]


class Supplicant:
    """The services over ``ta_folders``, which are searched in order for ``<uuid>.ta``; files in ``files``, sockets to
    destinations in ``sockets``, ``plugins`` by UUID, each only where it is given.

    Not thread-safe, but for SOCKET: one thread calls :meth:`serve` with everything else (:mod:`tee.io.lanes`).
    """

    def __init__(
        self,
        ta_folders: Sequence[str | os.PathLike[str]] = (),
        *,
        files: FileStore | None = None,
        sockets: AllowList | None = None,
        plugins: Mapping[UUID, Plugin] | None = None,
        max_ta_size: int = MAX_TA_SIZE,
        max_shared_memory: int = MAX_SHARED_MEMORY,
        log: Log | None = None,
    ) -> None:
        self._log = log = throttled(log) if log is not None else _no_log
        self._shared = SharedMemory(max_shared_memory, log)
        self._files = Files(files, log) if files is not None else None
        self._sockets = Sockets(sockets, log) if sockets is not None and sockets.entries else None
        self.services: dict[int, Service] = {
            RpcCommand.LOAD_TA: TaLoader(ta_folders, max_ta_size, log).serve,
            RpcCommand.SHM_ALLOC: self._shared.allocate,
            RpcCommand.SHM_FREE: self._shared.free,
            RpcCommand.FS: self._files.serve if self._files is not None else refused("FS", NO_FILES, log),
            RpcCommand.SOCKET: (
                self._sockets.serve if self._sockets is not None else refused("SOCKET", NO_SOCKETS, log)
            ),
            RpcCommand.PLUGIN: Plugins(plugins, log).serve if plugins else refused("PLUGIN", NO_PLUGINS, log),
            RpcCommand.GPROF: refused("GPROF", PROFILES, log),
            RpcCommand.FTRACE: refused("FTRACE", PROFILES, log),
            RpcCommand.RPMB: refused("RPMB", RPMB, log),
            RpcCommand.RPMB_PROBE_RESET: refused("RPMB_PROBE_RESET", RPMB, log),
            RpcCommand.RPMB_PROBE_NEXT: refused("RPMB_PROBE_NEXT", RPMB, log),
            RpcCommand.RPMB_FRAMES: refused("RPMB_FRAMES", RPMB, log),
            RpcCommand.I2C_TRANSFER: refused("I2C_TRANSFER", I2C, log),
        }
        """What serves each command."""

    @property
    def shared_memory(self) -> tuple[int, int]:
        """How many allocations the TEE has here, and of how many bytes together."""
        return self._shared.usage

    def serve(self, rpc: Rpc, allocator: Allocator) -> RpcReply:
        """The answer to ``rpc``; ``allocator`` gives and takes the memory of SHM_ALLOC and SHM_FREE. Never raises."""
        service = self.services.get(rpc.command)
        if service is None:
            return RpcReply(Result.NOT_SUPPORTED)
        try:
            return RpcReply(Result.SUCCESS, service(rpc.params, allocator))
        except ReplyError as error:
            return RpcReply(error.code, error.params)
        except TeeError as error:
            if error.why:
                self._log(f"{describe_command(rpc.command)} is answered with an error: {error}")
            return RpcReply(error.code)
        except MemoryError:
            return RpcReply(Result.OUT_OF_MEMORY)
        except (ValueError, OverflowError) as error:  # of memory that is not as the TEE says
            self._log(f"{describe_command(rpc.command)} makes no sense: {error}")
            return RpcReply(Result.BAD_PARAMETERS)
        except OSError as error:
            self._log(f"{describe_command(rpc.command)} failed: {error}")
            return RpcReply(Result.GENERIC)

    def close(self) -> None:
        """Free all that the TEE has not, close its files and sockets."""
        self._shared.close()
        if self._files is not None:
            self._files.close()
        if self._sockets is not None:
            self._sockets.close()

    def forget(self, memory: Memory) -> None:
        """Free an allocation whose answer never reached the TEE. Nothing where it is not one."""
        self._shared.forget(memory)


def throttled(log: Log) -> Log:
    """``log``, but so that a TEE cannot fill it."""
    throttle, lock = Throttle(), threading.Lock()

    def limited(line: str) -> None:
        with lock:
            more = throttle.admit()
        if more is not None:
            log(line + more)

    return limited


def _no_log(_: str) -> None:
    return
