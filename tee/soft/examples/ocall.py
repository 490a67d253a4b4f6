"""A TA that calls its client (UUID 6d9a1f57-0c5e-4c0b-9a0d-2f6f3b1c8e44).

===========  ================================================  ======================================================
command      parameters                                        does
===========  ================================================  ======================================================
0 CALL       value INOUT, then any (up to 15)                  OCALL of function a with the other parameters;
                                                               b = what the client's handler returned; with
                                                               SHORT_BUFFER the call ends
1 LEND       value INOUT                                       asks the client for b bytes of memory, fills them with
                                                               0, 1, 2 …, OCALL of function a with them INOUT;
                                                               b = the result, c = the sum of the bytes afterwards
2 GRPC       value INOUT, then any (up to 15)                  as CALL, by way of the generic RPC pseudo-TA
3 MANY       value INOUT                                       OCALL of function a, b times in a row, each with a value
                                                               IN that counts; c = the sum of the results
4 CANCEL     value INOUT                                       as CALL, and a cancel reaches it
5 TIMED      value INOUT                                       as CALL, for b milliseconds at most
===========  ================================================  ======================================================

Opening with a value INOUT does CALL, too. What the client does not serve ends the call with NOT_SUPPORTED, COMMS.
"""

from tee.soft.ta import (
    UUID,
    Client,
    Direction,
    Origin,
    Parameters,
    Result,
    TeeError,
    TrustedApplication,
    Value,
    bad_command,
)

GRPC = UUID("ad0fd0ae-09e1-464b-98ed-0607ec9ebd8b")
EXECUTE = 1 << 28


class Ocall(TrustedApplication):
    """See the module's table."""

    uuid = UUID("6d9a1f57-0c5e-4c0b-9a0d-2f6f3b1c8e44")

    async def open_session(self, params: Parameters, client: Client) -> None:
        """Open, and call the client where it says so."""
        if params and type(params[0]) is Value:
            await self.call(params)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """See the module's table."""
        action = COMMANDS.get(command)
        if action is None:
            raise bad_command(command)
        await action(self, params)

    async def call(self, params: Parameters) -> None:
        """Command 0."""
        await self._call(params, None)

    async def lend(self, params: Parameters) -> None:
        """Command 1."""
        value = params.value(0, Direction.INOUT)
        async with self.env.client_memory(value.b) as memory:
            both = memory.reference(Direction.INOUT)
            both.write(bytes(at & 0xFF for at in range(memory.size)))
            value.b = await self.env.ocall(value.a, [both])
            value.c = sum(both.read())

    async def grpc(self, params: Parameters) -> None:
        """Command 2."""
        value = params.value(0, Direction.INOUT)
        async with await self.env.open_session(GRPC) as session:
            await session.invoke(EXECUTE | value.a, params[1:])
        value.b = 0

    async def many(self, params: Parameters) -> None:
        """Command 3."""
        value = params.value(0, Direction.INOUT)
        for number in range(value.b):
            value.c += await self.env.ocall(value.a, [Value(Direction.IN, number)])

    async def cancel(self, params: Parameters) -> None:
        """Command 4."""
        self.env.unmask_cancellation()
        await self.call(params)

    async def timed(self, params: Parameters) -> None:
        """Command 5."""
        await self._call(params, params.value(0, Direction.INOUT).b / 1000)

    async def _call(self, params: Parameters, timeout: float | None) -> None:  # noqa: ASYNC109
        value = params.value(0, Direction.INOUT)
        value.b = await self.env.ocall(value.a, params[1:], timeout=timeout)
        if value.b == Result.SHORT_BUFFER:  # the client's own parameters say how much is needed
            raise TeeError(Result.SHORT_BUFFER, Origin.TRUSTED_APP)


COMMANDS = {0: Ocall.call, 1: Ocall.lend, 2: Ocall.grpc, 3: Ocall.many, 4: Ocall.cancel, 5: Ocall.timed}

TA = Ocall
