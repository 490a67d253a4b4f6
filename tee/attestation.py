"""Attestation statements: what a TEE signs about one of its services, and how whoever relies on one checks it.

The layout is docs/specification.md's "SERVICE_ATTEST". The signature is over all bytes before it.
"""

from __future__ import annotations

import hmac
import uuid as uuid_module
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from construct import Bytes, Const, ConstructError, Int32ul, Struct

from tee import package
from tee.results import Origin, Result, TeeError

if TYPE_CHECKING:
    from tee.package import PrivateKey, PublicKey

STATEMENT_MAGIC = 0x54415456
"""``VTAT`` in the first four bytes of a statement."""

SIGNED_HERE = 1
"""``format``: the signature signs all bytes before it."""

AttestationStatement = Struct(
    "magic" / Const(STATEMENT_MAGIC, Int32ul) * "0x54415456, the bytes `VTAT`",
    "format"
    / Int32ul
    * "1: `signature` signs all bytes before it; 2: `signature` is what OP-TEE's attestation pseudo-TA gave",
    "uuid" / Bytes(16) * "UUID of the service",
    "version" / Int32ul * "its version",
    "tee_kind" / Int32ul * "as in the config space",
    "digest" / Bytes(32) * "SHA-256 of what was measured: the hash in the header of the service's package",
    "nonce" / Bytes(32) * "the nonce of the request",
    "key_id" / Bytes(32) * "SHA-256 of the signer's public key (DER, SubjectPublicKeyInfo)",
    "algorithm" / Int32ul * "signature algorithm, by GlobalPlatform's number as in a TA package",
    "signature_size" / Int32ul * "bytes of the signature, which follows",
)
"""What an attestation begins with."""

_HEAD: int = AttestationStatement.sizeof()


@dataclass(frozen=True, slots=True)
class Statement:
    """What a checked statement says."""

    uuid: uuid_module.UUID
    version: int
    tee_kind: int
    digest: bytes  #: SHA-256 of what was measured


def size(key: PrivateKey) -> int:
    """Bytes of a statement that ``key`` signs."""
    return _HEAD + package.signature_size(key)


def make(key: PrivateKey, said: Statement, nonce: bytes) -> bytes:
    """A statement, signed with ``key``."""
    algorithm = package.default_algorithm(key)
    head: bytes = AttestationStatement.build(
        {
            "format": SIGNED_HERE,
            "uuid": said.uuid.bytes,
            "version": said.version,
            "tee_kind": said.tee_kind,
            "digest": said.digest,
            "nonce": nonce,
            "key_id": package.key_id(key),
            "algorithm": algorithm.number,
            "signature_size": package.signature_size(key),
        }
    )
    return head + package.sign_digest(key, algorithm, sha256(head).digest())


def check(data: bytes, key: bytes | PublicKey, nonce: bytes) -> Statement:
    """What a statement says, if ``key`` signed it, for this ``nonce``. The key must come by another way than the
    device that gave the statement.

    :raises TeeError: BAD_FORMAT for what is no statement; SECURITY where nonce, key or signature is another
    """
    public = package.load_public_key(key)
    try:
        head = AttestationStatement.parse(data[:_HEAD])
    except ConstructError as e:
        raise TeeError(Result.BAD_FORMAT, Origin.API, f"this is no statement: {e}") from None
    algorithm = package.ALGORITHMS.get(head.algorithm)
    if head.format != SIGNED_HERE or algorithm is None or len(data) != _HEAD + head.signature_size:
        raise TeeError(Result.BAD_FORMAT, Origin.API, "a statement of another format, or cut short")
    if not hmac.compare_digest(head.nonce, nonce):
        raise TeeError(Result.SECURITY, Origin.API, "the statement has another nonce: it was not made for this request")
    if not hmac.compare_digest(head.key_id, package.key_id(public)):
        raise TeeError(Result.SECURITY, Origin.API, "another key has signed the statement")
    if not package.verify_digest(public, algorithm, data[_HEAD:], sha256(data[:_HEAD]).digest()):
        raise TeeError(Result.SECURITY, Origin.API, "the signature does not fit the statement")
    return Statement(uuid_module.UUID(bytes=head.uuid), head.version, head.tee_kind, head.digest)
