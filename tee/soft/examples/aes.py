"""OP-TEE's AES: a session is one operation, with the key and the initial vector of its client.

=========  =======================================================  ===================================================
command    parameters                                               does
=========  =======================================================  ===================================================
0 PREPARE  value IN: algorithm (0 ECB, 1 CBC, 2 CTR, 3 CCM, 4 GCM)  begins a new operation; its key is all zeros
           value IN: bytes of the key (16, 32)
           value IN: 1 encrypt, 0 decrypt
1 SET_KEY  memory IN: the key                                       sets the key; an initial vector has to follow
2 SET_IV   memory IN: the initial vector (ECB: ignored)             begins to cipher
3 CIPHER   memory IN, memory OUT                                    ciphers more (ECB, CBC, CTR; no padding)
4 AUTHENC  memory IN, memory OUT, value IN: 0 decrypt, else         ciphers all at once (CCM, GCM); the tag is written,
           encrypt, memory INOUT: the tag                           or checked
=========  =======================================================  ===================================================

**AUTHENC always uses one and the same nonce, as the public example does.** Two messages under one key betray both.
Where the public example panics (a command without those before it) this one says BAD_STATE.
"""

from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESCCM

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

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
ECB, CBC, CTR, CCM, GCM = range(5)
KEY_SIZES = (16, 32)
BLOCK = 16
NONCE = bytes(range(12))
CCM_TAGS = (4, 6, 8, 10, 12, 14, 16)
GCM_TAGS = range(12, 17)
PIECE = 1 << 18  # bytes between two checkpoints


@dataclass
class Operation:
    """What a session has prepared."""

    algorithm: int = -1
    key_size: int = 0
    encrypt: bool = True
    key: bytes = field(default=b"", repr=False)
    stream: Any = None


class Aes(TrustedApplication):
    """The TA of the public example, with its UUID and its commands."""

    uuid = UUID("5dbac793-f574-4871-8ad3-04331ec17f24")
    description = "Example of TA using an AES sequence"

    async def open_session(self, params: Parameters, client: Client) -> Operation:
        """A session has one operation, which is not prepared yet."""
        return Operation()

    async def invoke(self, session: Operation, command: int, params: Parameters) -> None:
        """See the module's table."""
        if command == 0:
            prepare(session, params)
        elif command == 1:
            set_key(session, params)
        elif command == 2:
            set_iv(session, params)
        elif command == 3:
            await self.cipher(session, params)
        elif command == 4:
            authenc(session, params)
        else:
            raise bad_command(command)

    async def cipher(self, session: Operation, params: Parameters) -> None:
        """Command 3. What does not fill a block is kept for the next time."""
        params.expect(2)
        source, target = params.memory(0, IN), params.memory(1, OUT)
        if target.capacity < source.capacity:
            raise bad("the output is smaller than the input")
        stream = session.stream
        if stream is None:
            raise state("there is no initial vector")
        self.env.unmask_cancellation()
        written = 0
        for offset in range(0, source.capacity, PIECE):
            done = stream.update(source.read(offset, min(PIECE, source.capacity - offset)))
            if written + len(done) > target.capacity:  # a block began in an earlier call
                session.stream = None
                target.need(written + len(done))
            target.write(done, written)
            written += len(done)
            await self.env.checkpoint()
        target.size = written


def prepare(session: Operation, params: Parameters) -> None:
    """Command 0."""
    params.expect(3)
    algorithm, size, mode = (params.value(place, IN).a for place in range(3))
    if algorithm > GCM or size not in KEY_SIZES or mode > 1:
        raise bad(f"algorithm {algorithm}, a key of {size} bytes, mode {mode}")
    session.algorithm, session.key_size, session.encrypt = algorithm, size, mode == 1
    session.key, session.stream = bytes(size), None


def set_key(session: Operation, params: Parameters) -> None:
    """Command 1."""
    params.expect(1)
    key = params.memory(0, IN).read()
    if len(key) != session.key_size:
        raise bad(f"a key of {len(key)} bytes, not {session.key_size}")
    session.key, session.stream = key, None


def set_iv(session: Operation, params: Parameters) -> None:
    """Command 2."""
    params.expect(1)
    vector = params.memory(0, IN).read()
    if session.algorithm not in (ECB, CBC, CTR):
        raise state("it is not prepared, or not for a cipher with an initial vector")
    if session.algorithm != ECB and len(vector) != BLOCK:
        raise bad(f"an initial vector of {len(vector)} bytes")
    mode: modes.ECB | modes.CBC | modes.CTR = modes.ECB()
    if session.algorithm != ECB:
        mode = modes.CBC(vector) if session.algorithm == CBC else modes.CTR(vector)
    cipher = Cipher(algorithms.AES(session.key), mode)
    session.stream = cipher.encryptor() if session.encrypt else cipher.decryptor()


def authenc(session: Operation, params: Parameters) -> None:
    """Command 4."""
    params.expect(4)
    source, target, tag = params.memory(0, IN), params.memory(1, OUT), params.memory(3, INOUT)
    encrypt = params.value(2, IN).a != 0
    if session.algorithm not in (CCM, GCM) or encrypt != session.encrypt:
        raise state("it is not prepared for that")
    if tag.size not in (CCM_TAGS if session.algorithm == CCM else GCM_TAGS):
        raise bad(f"a tag of {tag.size} bytes")
    if target.capacity < source.capacity:
        target.need(source.capacity)
    text = source.read()
    if encrypt:
        sealed = seal(session, text, tag.size)
        target.put(sealed[: len(text)])
        tag.put(sealed[len(text) :])
        return
    try:
        plain = unseal(session, text, tag.read())
    except InvalidTag:
        raise TeeError(Result.MAC_INVALID, Origin.TRUSTED_APP, "the tag is not that of the text") from None
    target.put(plain)


def seal(session: Operation, text: bytes, tag_size: int) -> bytes:
    """The cipher text, and then the tag."""
    if session.algorithm == CCM:
        return AESCCM(session.key, tag_size).encrypt(NONCE, text, None)
    stream = Cipher(algorithms.AES(session.key), modes.GCM(NONCE)).encryptor()
    sealed = stream.update(text) + stream.finalize()
    return sealed + stream.tag[:tag_size]


def unseal(session: Operation, text: bytes, tag: bytes) -> bytes:
    """The plain text. Raises InvalidTag."""
    if session.algorithm == CCM:
        return AESCCM(session.key, len(tag)).decrypt(NONCE, text + tag, None)
    stream = Cipher(algorithms.AES(session.key), modes.GCM(NONCE, tag, min_tag_length=len(tag))).decryptor()
    return stream.update(text) + stream.finalize()


def bad(why: str) -> TeeError:
    """BAD_PARAMETERS."""
    return TeeError(Result.BAD_PARAMETERS, Origin.TRUSTED_APP, why)


def state(why: str) -> TeeError:
    """BAD_STATE."""
    return TeeError(Result.BAD_STATE, Origin.TRUSTED_APP, why)


TA = Aes
