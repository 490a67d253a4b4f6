"""OP-TEE's random: command 0 fills the memory reference of parameter 0 (OUT) with random bytes."""

from tee.soft.ta import UUID, Direction, Parameters, TrustedApplication, bad_command

PIECE = 1 << 16  # bytes between two checkpoints


class Random(TrustedApplication):
    """The TA of the public example, with its UUID and its command."""

    uuid = UUID("b6c53aba-9669-4668-a7f2-205629d00f86")

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """All of the buffer is filled; its size stays."""
        if command != 0:
            raise bad_command(command)
        params.expect(1)
        buffer = params.memory(0, Direction.OUT)
        self.env.unmask_cancellation()
        for offset in range(0, buffer.capacity, PIECE):
            buffer.write(self.env.random(min(PIECE, buffer.capacity - offset)), offset)
            await self.env.checkpoint()


TA = Random
