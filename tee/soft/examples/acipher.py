"""OP-TEE's asymmetric cipher: RSA with a key that the TA makes and never shows.

Command 0 makes a key pair (value IN: bits, 1024 to 4096) for the session. Command 1 ciphers: memory IN, memory OUT,
value IN (0 decrypt, else encrypt), value IN (GlobalPlatform's number of the algorithm). SHORT_BUFFER tells the room
that is needed.

Making a key takes up to some seconds at 4096 bits and cannot be cut into steps, so it is done beside the TEE.
"""

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa

from tee.soft.ta import (
    UUID,
    Client,
    Direction,
    Origin,
    Parameters,
    Result,
    TeeError,
    TrustedApplication,
    bad_command,
)

IN, OUT = Direction.IN, Direction.OUT
MIN_BITS, MAX_BITS = 1024, 4096


def oaep(algorithm: hashes.HashAlgorithm) -> padding.OAEP:
    """OAEP with MGF1, both with ``algorithm``."""
    return padding.OAEP(padding.MGF1(algorithm), algorithm, None)


PKCS1 = 0x60000130
OAEP: dict[int, hashes.HashAlgorithm] = {
    0x60210230: hashes.SHA1(),
    0x60310230: hashes.SHA224(),
    0x60410230: hashes.SHA256(),
    0x60510230: hashes.SHA384(),
    0x60610230: hashes.SHA512(),
}


class Session:
    """Has a key, once it was made."""

    key: rsa.RSAPrivateKey | None = None


class Acipher(TrustedApplication):
    """The TA of the public example, with its UUID and its commands."""

    uuid = UUID("a734eed9-d6a1-4244-aa50-7c99719e7b7b")
    description = "Example of TA using asymmetric cipher"

    async def open_session(self, params: Parameters, client: Client) -> Session:
        """Nothing yet."""
        return Session()

    async def invoke(self, session: Session, command: int, params: Parameters) -> None:
        """See the module's text."""
        if command == 0:
            await self.make_key(session, params)
        elif command == 1:
            cipher(session, params)
        else:
            raise bad_command(command)

    async def make_key(self, session: Session, params: Parameters) -> None:
        """Command 0."""
        params.expect(1)
        bits = params.value(0, IN).a
        if not MIN_BITS <= bits <= MAX_BITS or bits % 2:
            raise TeeError(Result.NOT_SUPPORTED, Origin.TRUSTED_APP, f"a key of {bits} bits")
        self.env.unmask_cancellation()
        session.key = await self.env.work(lambda: rsa.generate_private_key(65537, bits))


def cipher(session: Session, params: Parameters) -> None:
    """Command 1."""
    params.expect(4)
    source, target = params.memory(0, IN), params.memory(1, OUT)
    encrypt, algorithm = params.value(2, IN).a != 0, params.value(3, IN).a
    key = session.key
    if key is None:
        raise TeeError(Result.BAD_STATE, Origin.TRUSTED_APP, "there is no key")
    if algorithm != PKCS1 and algorithm not in OAEP:
        raise TeeError(Result.NOT_SUPPORTED, Origin.TRUSTED_APP, f"algorithm {algorithm:#x}")
    room = (key.key_size + 7) // 8
    if source.capacity > room or (not encrypt and source.capacity != room):
        raise bad(f"{source.capacity} bytes")
    if target.capacity < room and encrypt:
        target.need(room)
    text = source.read()
    filling = padding.PKCS1v15() if algorithm == PKCS1 else oaep(OAEP[algorithm])
    try:
        result = key.public_key().encrypt(text, filling) if encrypt else key.decrypt(text, filling)
    except ValueError:
        raise bad("the text is too long, or is not one of this key's") from None
    target.put(result)


def bad(why: str) -> TeeError:
    """BAD_PARAMETERS."""
    return TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, why)


TA = Acipher
