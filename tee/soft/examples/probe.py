"""A TA for tests and benchmarks: one command for each kind of use (UUID 3f0c8d2e-6a51-4b7c-9d14-8e2b7a90c5f6).

===========  ===============================================  =======================================================
command      parameters                                       does
===========  ===============================================  =======================================================
0 NULL       any                                              nothing
1 ADD        value IN, value OUT, value INOUT (64 bits)       OUT: c = IN.a + IN.b; INOUT: c = a + b (a, b stay)
2 XOR        memory INOUT, value IN                           each byte is xored with the low byte of value a
3 TOUCH      memory INOUT                                     adds 1 to the first byte of every 4 KiB
4 WAIT       value IN                                         waits until cancelled; a > 0: or for a milliseconds
5 SHORT      memory OUT, value IN                             writes a bytes of 0x5a; SHORT_BUFFER if they are too many
6 PANIC      any                                              panics
7 ECHO       value OUT for the answer, then any (up to 126)   a = how many follow, b = sum of their kinds × places,
                                                              c = sum of sizes (kind as in Linux: 0 none, 1 to 3
                                                              value, 5 to 7 memory; places count from 1)
8 HOLD       memory INOUT, value INOUT                        a = byte 0 now, b = byte 0 after a milliseconds
9 FAIL       value IN                                         ends with the code a (a TA's own, e.g. 0x10000001)
10 SPIN      value IN                                         a checkpoints in a row, unmasked; then ends
11 HASH      memory IN, memory OUT                            OUT: the SHA-256 of IN (32 bytes); can be cancelled
12 WORK      memory INOUT                                     4,096 times, page after page and round again: adds 1 to
                                                              the first byte of 4 KiB; the same work for any size
===========  ===============================================  =======================================================
"""

from hashlib import sha256

from tee.soft.ta import (
    UUID,
    Client,
    Direction,
    MemoryReference,
    Origin,
    Parameters,
    Result,
    TeeError,
    TrustedApplication,
    Value,
    bad_command,
)

PAGE = 4096
WORK = 4096  # changes
PIECE = 1 << 18  # bytes between two checkpoints
WORD = (1 << 64) - 1


class Probe(TrustedApplication):
    """See the module's table. Opening takes no parameters, or one value IN: its a ≠ 0 is the code to refuse with."""

    uuid = UUID("3f0c8d2e-6a51-4b7c-9d14-8e2b7a90c5f6")

    async def open_session(self, params: Parameters, client: Client) -> None:
        """Open, or refuse."""
        if params and type(params[0]) is Value and params[0].a:
            raise TeeError(params[0].a, Origin.TRUSTED_APP, "refused as asked")

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """See the module's table."""
        if command == 0:
            return
        action = COMMANDS.get(command)
        if action is None:
            raise bad_command(command)
        await action(self, params)

    async def add(self, params: Parameters) -> None:
        """Command 1."""
        params.expect(3)
        given, result, both = (
            params.value(0, Direction.IN),
            params.value(1, Direction.OUT),
            params.value(2, Direction.INOUT),
        )
        result.c = (given.a + given.b) & WORD
        both.c = (both.a + both.b) & WORD

    async def xor(self, params: Parameters) -> None:
        """Command 2."""
        params.expect(2)
        memory, mask = params.memory(0, Direction.INOUT), params.value(1, Direction.IN).a & 0xFF
        self.env.unmask_cancellation()
        table = bytes(byte ^ mask for byte in range(256))
        for offset in range(0, memory.capacity, PIECE):
            memory.write(memory.read(offset, min(PIECE, memory.capacity - offset)).translate(table), offset)
            await self.env.checkpoint()

    async def touch(self, params: Parameters) -> None:
        """Command 3."""
        params.expect(1)
        memory = params.memory(0, Direction.INOUT)
        view = memory.view()
        for offset in range(0, memory.capacity, PAGE):
            if view is not None:
                view[offset] = (view[offset] + 1) & 0xFF
            else:
                memory.write(bytes([(memory.read(offset, 1)[0] + 1) & 0xFF]), offset)

    async def wait(self, params: Parameters) -> None:
        """Command 4."""
        params.expect(1)
        milliseconds = params.value(0, Direction.IN).a
        self.env.unmask_cancellation()
        if milliseconds:
            await self.env.sleep(milliseconds / 1000)
            return
        while True:
            await self.env.sleep(3600.0)

    async def short(self, params: Parameters) -> None:
        """Command 5."""
        params.expect(2)
        memory, size = params.memory(0, Direction.OUT), params.value(1, Direction.IN).a
        if size > memory.capacity:
            memory.need(size)
        memory.put(b"\x5a" * size)

    async def panic(self, params: Parameters) -> None:
        """Command 6."""
        raise RuntimeError("panic as asked")

    async def echo(self, params: Parameters) -> None:
        """Command 7."""
        answer = params.value(0, Direction.OUT)
        for place, param in enumerate(params[1:], 1):
            if isinstance(param, Value):
                answer.b += param.direction * place
            elif isinstance(param, MemoryReference):
                answer.b += (param.direction + 4) * place
                answer.c = (answer.c + param.size) & WORD
        answer.a = len(params) - 1

    async def hold(self, params: Parameters) -> None:
        """Command 8."""
        params.expect(2)
        memory, value = params.memory(0, Direction.INOUT), params.value(1, Direction.INOUT)
        if not memory.capacity:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, "there is no byte 0")
        self.env.unmask_cancellation()
        milliseconds, value.a = value.a, memory.read(0, 1)[0]
        await self.env.sleep(milliseconds / 1000)
        value.b = memory.read(0, 1)[0]

    async def fail(self, params: Parameters) -> None:
        """Command 9."""
        params.expect(1)
        raise TeeError(params.value(0, Direction.IN).a, Origin.TRUSTED_APP, "failed as asked")

    async def spin(self, params: Parameters) -> None:
        """Command 10."""
        params.expect(1)
        self.env.unmask_cancellation()
        for _ in range(params.value(0, Direction.IN).a):
            await self.env.checkpoint()

    async def hash(self, params: Parameters) -> None:
        """Command 11."""
        params.expect(2)
        memory, digest = params.memory(0, Direction.IN), sha256()
        view = memory.view()
        self.env.unmask_cancellation()
        for offset in range(0, memory.capacity, PIECE):
            size = min(PIECE, memory.capacity - offset)
            digest.update(memory.read(offset, size) if view is None else view[offset : offset + size])
            await self.env.checkpoint()
        params.memory(1, Direction.OUT).put(digest.digest())

    async def work(self, params: Parameters) -> None:
        """Command 12."""
        params.expect(1)
        memory = params.memory(0, Direction.INOUT)
        view, size = memory.view(), memory.capacity
        if view is None or not size:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, "memory in one piece is needed")
        for number in range(WORK):
            offset = number * PAGE % size
            view[offset] = (view[offset] + 1) & 0xFF


COMMANDS = {
    1: Probe.add,
    2: Probe.xor,
    3: Probe.touch,
    4: Probe.wait,
    5: Probe.short,
    6: Probe.panic,
    7: Probe.echo,
    8: Probe.hold,
    9: Probe.fail,
    10: Probe.spin,
    11: Probe.hash,
    12: Probe.work,
}

TA = Probe
