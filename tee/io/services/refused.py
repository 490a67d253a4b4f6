"""What is refused: the TEE gets NOT_SUPPORTED, the log says once why and what to do."""

from __future__ import annotations

from tee.io.services.base import Allocator, Log, Result, Service, refuse
from tee.params import Param

PROFILES = "profiles and traces of TAs are not kept: build the TA without CFG_TA_GPROF_SUPPORT and CFG_FTRACE_SUPPORT"
RPMB = "a replay-protected memory block belongs to the host, and is not given to a guest: use file storage"
I2C = "I2C buses belong to the host, and are not given to a guest: drive the bus from a driver of the host"
NO_FILES = "no folder for the TEE's files is given: name one with --fs-folder"
NO_SOCKETS = "no destination is allowed: allow some with --allow-socket HOST:PORT"
NO_PLUGINS = "no plug-in is registered: register some with --plugin UUID=MODULE:NAME"


def refused(what: str, why: str, log: Log) -> Service:
    """A service that refuses."""
    told = False

    def serve(_: list[Param], __: Allocator) -> list[Param]:
        nonlocal told
        if not told:
            told = True
            log(f"{what} is refused: {why}")
        raise refuse(Result.NOT_SUPPORTED, "")

    return serve
