"""Which services each machine has: those that are built in, and those that it has installed itself."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from hashlib import sha256
from uuid import UUID

from tee import package
from tee.results import Origin, Result, TeeError
from tee.rpc import GRPC_UUID
from tee.services import Refusal, RefusedError
from tee.soft.entities import Program
from tee.soft.limits import SoftLimits
from tee.soft.loader import execute
from tee.soft.ta import TrustedApplication

#: Built in, but not for clients.
_HIDDEN = frozenset({GRPC_UUID})


def measured(ta: type[TrustedApplication]) -> bytes:
    """What is measured of a built-in service: the SHA-256 of its module's source.

    :raises TeeError: NOT_SUPPORTED where there is no source
    """
    try:
        source = inspect.getsource(inspect.getmodule(ta) or ta)
    except (OSError, TypeError):
        raise TeeError(Result.NOT_SUPPORTED, Origin.TEE, f"the source of service {ta.uuid} is not there") from None
    return sha256(source.encode()).digest()


class Installed:
    """What one machine has installed. ``floors`` outlive the services: the lowest version of each that is accepted."""

    __slots__ = ("floors", "programs", "sizes")

    def __init__(self) -> None:
        self.programs: dict[UUID, Program] = {}
        self.sizes: dict[UUID, int] = {}
        self.floors: dict[UUID, int] = {}


class Services:
    """The services of all machines. ``keys`` are the public keys of those who may sign packages, ``limit`` bytes the
    largest one."""

    def __init__(
        self,
        keys: Sequence[bytes | package.PublicKey],
        limit: int,
        limits: SoftLimits,
        built_in: Mapping[UUID, Program],
    ) -> None:
        self._keys = tuple(package.load_public_key(key) for key in keys)
        self.limit = limit
        self._limits = limits
        self._built_in = built_in
        self._machines: dict[str, Installed] = {}

    def installed(self, vm: str, uuid: UUID) -> Program | None:
        """The service ``uuid`` that the machine has installed, if any."""
        machine = self._machines.get(vm)
        return None if machine is None else machine.programs.get(uuid)

    def seen(self, vm: str, uuid: UUID) -> Program | None:
        """The service ``uuid`` as the machine's clients see it, if they do."""
        return self.installed(vm, uuid) or (None if uuid in _HIDDEN else self._built_in.get(uuid))

    def of(self, vm: str) -> list[Program]:
        """All services of a machine, by UUID."""
        machine = self._machines.get(vm)
        programs = [program for uuid, program in self._built_in.items() if uuid not in _HIDDEN]
        return sorted([*programs, *(machine.programs.values() if machine else ())], key=lambda program: program.uuid)

    def count(self) -> int:
        """How many are installed."""
        return sum(len(machine.programs) for machine in self._machines.values())

    def verify(self, data: bytes) -> package.VerifiedTa:
        """The service in a package. Raises TeeError BAD_FORMAT or SECURITY. Touches nothing: for another thread, too.

        The package says itself whose it is; that counts only because it is signed.
        """
        claimed = package.parse(data, limit=self.limit).uuid
        return package.verify(data, claimed, self._keys, limit=self.limit)

    def install(self, vm: str, ta: package.VerifiedTa, size: int) -> Program | None:
        """Install what was verified, a package of ``size`` bytes; returns the program that it replaces.

        :raises RefusedError: DENIED for a built-in service; LIMIT
        :raises TeeError: SECURITY for a roll-back; ACCESS_CONFLICT; BAD_FORMAT where the module does not run
        """
        if ta.uuid in self._built_in:
            raise RefusedError(Refusal.DENIED, f"service {ta.uuid} is built in")
        machine = self._machines.get(vm) or Installed()
        floor, old = machine.floors.get(ta.uuid, 0), machine.programs.get(ta.uuid)
        if ta.version < floor:
            raise TeeError(Result.SECURITY, Origin.TEE, f"version {ta.version} after {floor}: a roll-back")
        if old is not None and old.version == ta.version:
            if old.digest != ta.digest:
                raise TeeError(Result.ACCESS_CONFLICT, Origin.TEE, f"version {ta.version} is there, with other code")
            return None
        others = sum(machine.sizes.values()) - machine.sizes.get(ta.uuid, 0)
        if old is None and len(machine.programs) >= self._limits.services:
            raise RefusedError(Refusal.LIMIT, f"{len(machine.programs)} services are installed")
        if others + size > self._limits.service_bytes:
            raise RefusedError(Refusal.LIMIT, f"{others + size} bytes of services")
        program = execute(ta)
        program.installed = True
        self._machines[vm] = machine
        machine.programs[ta.uuid], machine.sizes[ta.uuid] = program, size
        machine.floors[ta.uuid] = ta.version
        return old

    def check_removal(self, vm: str, uuid: UUID) -> Program:
        """The program to remove. Raises RefusedError DENIED or NOT_FOUND."""
        if uuid in self._built_in:
            raise RefusedError(Refusal.DENIED, f"service {uuid} is built in")
        program = self.installed(vm, uuid)
        if program is None:
            raise RefusedError(Refusal.NOT_FOUND, f"service {uuid} is not installed")
        return program

    def remove(self, vm: str, uuid: UUID) -> None:
        """Remove it; the lowest version that is accepted stays."""
        machine = self._machines[vm]
        del machine.programs[uuid], machine.sizes[uuid]

    def forget(self, vm: str) -> list[Program]:
        """The machine has gone, or begins anew: remove all that it has installed, and return that."""
        machine = self._machines.get(vm)
        if machine is None:
            return []
        programs = list(machine.programs.values())
        machine.programs.clear()
        machine.sizes.clear()
        return programs
