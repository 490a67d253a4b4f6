"""OP-TEE's secure storage: objects by name, kept by the caller's supplicant, which can neither read nor change them.

Each command has the object's name first (memory IN). 0 READ: memory OUT, SHORT_BUFFER with the size where it is too
small; 1 WRITE: memory IN, replaces an object of that name; 2 DELETE. ITEM_NOT_FOUND where there is no such object.
"""

from tee.soft.ta import UUID, DataFlag, Direction, Origin, Parameters, Result, TeeError, TrustedApplication, bad_command

READ = DataFlag.ACCESS_READ
META = DataFlag.ACCESS_WRITE_META


class SecureStorage(TrustedApplication):
    """The TA of the public example, with its UUID and its commands."""

    uuid = UUID("f4e750bb-1437-4fbf-8785-8d3580c34994")
    description = "Example of TA writing/reading data from its secure storage"
    single_instance = True
    data_size = 2 << 20  # a private copy of what a client gives

    async def invoke(self, session: None, command: int, params: Parameters) -> None:
        """See the module's text."""
        if command not in (0, 1, 2):
            raise bad_command(command)
        params.expect(1 if command == 2 else 2)
        given = params.memory(0, Direction.IN)
        if given.capacity > 64:
            raise TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, "a name has up to 64 bytes")
        name = given.read()
        if command == 0:
            target = params.memory(1, Direction.OUT)
            with await self.env.storage.open(name, READ | DataFlag.SHARE_READ) as stored:
                if stored.size > target.capacity:
                    target.need(stored.size)
                target.put(await stored.read())
        elif command == 1:
            source = params.memory(1, Direction.IN)
            buffer = self.env.allocate(source.capacity)
            try:
                buffer[:] = source.read()
                flags = READ | DataFlag.ACCESS_WRITE | META | DataFlag.OVERWRITE
                (await self.env.storage.create(name, bytes(buffer), flags)).close()
            finally:
                self.env.free(buffer)
        else:
            await (await self.env.storage.open(name, READ | META)).delete()


TA = SecureStorage
