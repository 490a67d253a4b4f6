"""OP-TEE's hello world: command 0 increments the value ``a`` of parameter 0 (INOUT), command 1 decrements it."""

from tee.soft.ta import UUID, Client, Direction, Parameters, TrustedApplication, bad_command

STEPS = {0: 1, 1: -1}


class HelloWorld(TrustedApplication):
    """The TA of the public example, with its UUID and its commands."""

    uuid = UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b")

    async def open_session(self, params: Parameters, client: Client) -> None:
        """No parameters."""
        params.expect(0)

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """A 32-bit value goes up or down, and wraps as it does in C."""
        if command not in STEPS:
            raise bad_command(command)
        params.expect(1)
        value = params.value(0, Direction.INOUT)
        value.a = (value.a + STEPS[command]) & 0xFFFFFFFF


TA = HelloWorld
