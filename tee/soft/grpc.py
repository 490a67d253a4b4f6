"""The generic RPC pseudo-TA: TAs open a session with it, and what they invoke it for, their client runs.

Source: OP-TEE's pull request 3292. The upper 4 bits of a command are this TA's: 1 executes; the lower 28 are the
function for the client.
"""

from __future__ import annotations

from tee.rpc import GRPC_EXECUTE, GRPC_UUID
from tee.soft.ta import Client, Login, Origin, Parameters, Result, TeeError, TrustedApplication, bad_command

_FUNCTION = (1 << 28) - 1


class GenericRpc(TrustedApplication):
    """See the module."""

    uuid = GRPC_UUID
    description = "generic RPC"

    async def open_session(self, params: Parameters, client: Client) -> None:
        """Open to TAs only."""
        if client.login != Login.TRUSTED_APP:
            raise TeeError(Result.ACCESS_DENIED, Origin.TRUSTED_APP, "generic RPC is for TAs")

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """Have the client that made the call run the function, and end with what it returned."""
        if command >> 28 != GRPC_EXECUTE:
            raise bad_command(command)
        code = await self.env.ocall(command & _FUNCTION, params)
        if code != Result.SUCCESS:
            raise TeeError(code, Origin.TRUSTED_APP, "the client's function failed")
