"""The calls that can be started on a :class:`~tee.driver.TeeDriver`.

All of them may block on a real TEE (registering memory and closing a session enter the secure world as an invoke does),
so all are started and end later with :class:`~tee.driver.Done`. A call object names one call for its whole life:
``cancel`` takes it, RPCs refer to it, ``Done`` returns it. ``owner`` is whoever started it and is only passed along.
"""

from __future__ import annotations

import uuid as uuid_module
from dataclasses import dataclass, field
from enum import IntEnum

from tee.memory import Memory
from tee.params import Param


class Login(IntEnum):
    """How a client identifies itself (GlobalPlatform TEE Client API, table 4-5; REE_KERNEL from Linux's
    uapi/linux/tee.h; TRUSTED_APP from the TEE Internal Core API: no client can have it, a TEE gives it to a TA that
    calls another).
    """

    PUBLIC = 0
    USER = 1
    GROUP = 2
    APPLICATION = 4
    USER_APPLICATION = 5
    GROUP_APPLICATION = 6
    REE_KERNEL = 0x80000000
    TRUSTED_APP = 0xF0000000


NIL_UUID = uuid_module.UUID(int=0)


@dataclass(frozen=True, slots=True)
class Client:
    """Who calls: a login, its UUID, and the VM that the call comes from (empty: this machine)."""

    login: int = Login.PUBLIC
    uuid: uuid_module.UUID = NIL_UUID
    vm: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class Call:
    """What all calls have in common."""

    owner: object = None


@dataclass(slots=True, eq=False, kw_only=True)
class OpenContext(Call):
    """One client's connection to the TEE: everything else hangs under one. Done gives the context."""

    vm: str = ""


@dataclass(slots=True, eq=False, kw_only=True)
class CloseContext(Call):
    """Ends the context and all under it: sessions closed, calls cancelled, memory released."""

    context: object


@dataclass(slots=True, eq=False, kw_only=True)
class OpenSession(Call):
    """Opens a session with the TA ``uuid``; Done gives the session. ``params`` are given to the TA."""

    context: object
    uuid: uuid_module.UUID
    client: Client = Client()
    params: list[Param] = field(default_factory=list)


@dataclass(slots=True, eq=False, kw_only=True)
class CloseSession(Call):
    """Ends a session."""

    session: object


@dataclass(slots=True, eq=False, kw_only=True)
class Invoke(Call):
    """Asks the TA of ``session`` for its command ``func`` (32 bits)."""

    session: object
    func: int
    params: list[Param] = field(default_factory=list)


@dataclass(slots=True, eq=False, kw_only=True)
class RegisterMemory(Call):
    """Makes ``memory`` known to the TEE, which uses it in place where it can. Done has set ``memory.handle``. Memory
    that has ``ffa`` is for drivers that are :class:`~tee.driver.TakesHandles`."""

    context: object
    memory: Memory


@dataclass(slots=True, eq=False, kw_only=True)
class UnregisterMemory(Call):
    """Ends a registration. Done comes when the last call that uses the memory has ended."""

    context: object
    memory: Memory
