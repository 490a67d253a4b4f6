"""A server enclave, one stage of several: register 0 says what a call does to the memory that it is given.

==========  =======================================================================================
register 0  what it does
==========  =======================================================================================
0           adds register 1 to a total, which is what it returns
1           combines each byte with register 1 (exclusive or), in place; returns all of them
2           passes the call on to the enclave ``stage-N``, N being register 1, with the registers from 2 on
==========  =======================================================================================
"""

from tee.soft.ta import UUID, CallReturn, Client, MemoryReference, Result, TeeError, TrustedApplication

ADD, XOR, PASS_ON = range(3)
PIECE = 64 << 10


class Stage(TrustedApplication):
    """See the module."""

    uuid = UUID("5c6f5ab6-31a5-4d0f-9d44-0d3f1f0b6a27")
    description = "a stage of a chain of enclaves"

    async def create(self) -> None:
        """The enclave begins."""
        self.total = 0

    async def enclave_call(self, client: Client, regs: tuple[int, ...], memory: MemoryReference | None) -> CallReturn:
        """One of the three."""
        if regs[0] == ADD:
            self.total = (self.total + regs[1]) & 0xFFFF_FFFF_FFFF_FFFF
            return CallReturn(self.total)
        if regs[0] == PASS_ON:
            return await self.env.acquire(f"stage-{regs[1]}").call(*regs[2:], memory=memory)
        if regs[0] != XOR or memory is None:
            raise TeeError(Result.BAD_PARAMETERS)
        key = bytes([regs[1] & 0xFF]) * PIECE
        for at in range(0, memory.capacity, PIECE):
            piece = memory.read(at, min(PIECE, memory.capacity - at))
            mixed = int.from_bytes(piece, "little") ^ int.from_bytes(key[: len(piece)], "little")
            memory.write(mixed.to_bytes(len(piece), "little"), at)
            await self.env.checkpoint()
        return CallReturn(memory.capacity, 0, memory.capacity)


TA = Stage
