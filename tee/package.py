"""TA packages: the signed file that a supplicant hands over and from which the software TEE loads a TA.

The layout is OP-TEE's public signed header for a bootstrap TA (core/include/signed_hdr.h), all integers little-endian::

    header      magic, image type, payload size, algorithm, hash size, signature size    20 bytes (HEADER)
    hash        SHA-256 over header + subheader + payload                                32 bytes
    signature   of the hash
    subheader   UUID (16 octets, big-endian fields), TA version                          20 bytes (BOOTSTRAP)
    payload     here: a Python module, UTF-8

so a package that OP-TEE's ``scripts/sign_encrypt.py`` signed with the same key verifies here. OP-TEE itself takes RSA
only; ECDSA (GlobalPlatform's algorithm number, the signature as r and s of 32 octets each) is an addition.

**Whoever holds the private key runs code in the backend**, with all the rights of its process, just as a TA vendor's
key opens a secure world. There is no default key. Nothing of a payload is looked at before :func:`verify` has
returned.

The ``cryptography`` package is imported only by the functions that sign or verify, so that a guest without it can
still import this module and :func:`parse` packages.
"""

from __future__ import annotations

import hmac
import uuid as uuid_module
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import construct

from tee.results import Origin, Result, TeeError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey
    PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey

__all__ = [
    "ALGORITHMS",
    "BOOTSTRAP",
    "DEFAULT_ALGORITHM",
    "HEADER",
    "MAGIC",
    "MAX_PACKAGE",
    "Algorithm",
    "KeyPair",
    "Package",
    "VerifiedTa",
    "algorithm_named",
    "default_algorithm",
    "key_id",
    "keygen",
    "load_private_key",
    "load_public_key",
    "parse",
    "sign",
    "sign_digest",
    "signature_size",
    "verify",
    "verify_digest",
]

MAGIC = 0x4F545348
IMAGE_BOOTSTRAP_TA = 1

#: Image types of OP-TEE that are known and refused.
_OTHER_IMAGES = {0: "a TA without version", 2: "an encrypted TA", 3: "a subkey"}

#: The largest package in bytes unless the caller says otherwise.
MAX_PACKAGE = 16 << 20

#: RSA keys shorter than this many bits are refused.
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192

HEADER = construct.Struct(
    "magic" / construct.Int32ul * "0x4f545348",
    "img_type" / construct.Int32ul * "1: a TA with UUID and version (bootstrap TA)",
    "img_size" / construct.Int32ul * "size of the payload in bytes",
    "algo" / construct.Int32ul * "signature algorithm (GlobalPlatform's number)",
    "hash_size" / construct.Int16ul * "size of the hash in bytes",
    "sig_size" / construct.Int16ul * "size of the signature in bytes",
)

BOOTSTRAP = construct.Struct(
    "uuid" / construct.Bytes(16) * "the TA's UUID, octets as in RFC 4122",
    "ta_version" / construct.Int32ul * "version, for roll-back protection",
)


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A signature algorithm: its GlobalPlatform number, its name for people, the kind of key that it takes."""

    number: int
    name: str
    key: str  #: "rsa" or "ec"


ALGORITHMS = {
    algorithm.number: algorithm
    for algorithm in (
        Algorithm(0x70414930, "rsa-pss-sha256", "rsa"),
        Algorithm(0x70004830, "rsa-pkcs1-sha256", "rsa"),
        Algorithm(0x70003042, "ecdsa-p256-sha256", "ec"),
    )
}

#: OP-TEE's own default.
DEFAULT_ALGORITHM = ALGORITHMS[0x70414930]

_HASH_SIZE = 32
_EC_HALF = 32
_HEADER_SIZE: int = HEADER.sizeof()
_BOOTSTRAP_SIZE: int = BOOTSTRAP.sizeof()


@dataclass(frozen=True, slots=True)
class Package:
    """What a package says about itself; nothing of it is verified."""

    uuid: uuid_module.UUID
    version: int
    algorithm: Algorithm
    digest: bytes
    signature: bytes
    payload: bytes
    hashed: tuple[bytes, bytes, bytes]  #: the bytes that the hash covers: header, subheader, payload


@dataclass(frozen=True, slots=True)
class VerifiedTa:
    """A TA whose package verified. ``key_number`` counts in the keys that were given to :func:`verify`."""

    uuid: uuid_module.UUID
    version: int
    payload: bytes
    algorithm: Algorithm
    key_number: int
    digest: bytes  #: the hash in the package's header


@dataclass(frozen=True, slots=True)
class KeyPair:
    """A fresh key as PEM: the private half (PKCS #8, not encrypted) and the public one."""

    private: bytes
    public: bytes


def algorithm_named(name: str) -> Algorithm:
    """The algorithm of that name. Raises ValueError with the names there are."""
    for algorithm in ALGORITHMS.values():
        if algorithm.name == name:
            return algorithm
    raise ValueError(f"no algorithm {name!r}; there are {', '.join(a.name for a in ALGORITHMS.values())}")


def parse(data: bytes, *, limit: int = MAX_PACKAGE) -> Package:
    """Take a package apart. Nothing is verified: use it to show a package, never to run one.

    :param limit: the largest package accepted, in bytes
    :raises TeeError: BAD_FORMAT, with what is wrong; SECURITY where there is no signature at all
    """
    if len(data) > limit:
        raise _bad(f"{len(data)} bytes are more than the limit of {limit}")
    if len(data) < _HEADER_SIZE:
        raise _bad(f"{len(data)} bytes cannot hold a header of {_HEADER_SIZE}")
    data = bytes(data)
    header = HEADER.parse(data[:_HEADER_SIZE])
    if header.magic != MAGIC:
        raise _bad(f"magic {header.magic:#010x}: this is not a TA package, or it is not signed")
    if header.img_type != IMAGE_BOOTSTRAP_TA:
        what = _OTHER_IMAGES.get(header.img_type, "unknown")
        raise _bad(f"image type {header.img_type} ({what}); only 1 (TA with UUID and version) is supported")
    algorithm = ALGORITHMS.get(header.algo)
    if algorithm is None:
        raise _bad(f"signature algorithm {header.algo:#010x} is not supported")
    if header.hash_size != _HASH_SIZE:
        raise _bad(f"a hash of {header.hash_size} bytes; SHA-256 has {_HASH_SIZE}")
    if not header.sig_size:
        raise _insecure("the package is not signed")
    signature_at = _HEADER_SIZE + _HASH_SIZE
    bootstrap_at = signature_at + header.sig_size
    payload_at = bootstrap_at + _BOOTSTRAP_SIZE
    size = payload_at + header.img_size
    if len(data) != size:
        raise _bad(f"the header describes {size} bytes, there are {len(data)}")
    if not header.img_size:
        raise _bad("the payload is empty")
    head, subheader, payload = data[:_HEADER_SIZE], data[bootstrap_at:payload_at], data[payload_at:]
    bootstrap = BOOTSTRAP.parse(subheader)
    return Package(
        uuid=uuid_module.UUID(bytes=bootstrap.uuid),
        version=bootstrap.ta_version,
        algorithm=algorithm,
        digest=data[_HEADER_SIZE:signature_at],
        signature=data[signature_at:bootstrap_at],
        payload=payload,
        hashed=(head, subheader, payload),
    )


def verify(
    data: bytes,
    uuid: uuid_module.UUID,
    keys: Iterable[bytes | PublicKey],
    *,
    limit: int = MAX_PACKAGE,
) -> VerifiedTa:
    """The TA in a package, if it is ``uuid`` and one of ``keys`` signed it.

    :param keys: public keys, as PEM or as objects of ``cryptography``
    :raises TeeError: BAD_FORMAT where the layout is wrong; SECURITY where the UUID, the hash or the signature is
    """
    package = parse(data, limit=limit)
    if package.uuid != uuid:
        raise _insecure(f"the package is of {package.uuid}, not of {uuid}")
    if not hmac.compare_digest(_digest(package.hashed), package.digest):
        raise _insecure("the hash does not fit the package: it was damaged or changed after it was signed")
    check = _VERIFY[package.algorithm.name]
    tried = 0
    for number, given in enumerate(keys):
        key = load_public_key(given)
        if _kind(key) != package.algorithm.key or len(package.signature) != _signature_size(key):
            continue
        tried += 1
        if check(key, package.signature, package.digest):
            return VerifiedTa(package.uuid, package.version, package.payload, package.algorithm, number, package.digest)
    if not tried:
        raise _insecure(f"none of the trusted keys fits a signature by {package.algorithm.name}")
    raise _insecure("no trusted key made the signature")


def sign(
    payload: bytes,
    uuid: uuid_module.UUID,
    version: int,
    key: bytes | PrivateKey,
    algorithm: Algorithm | None = None,
) -> bytes:
    """A package of ``payload``. ``algorithm`` is, unless given, the default for the kind of key (RSA: PSS).

    :raises ValueError: a key of the wrong kind, a payload that is empty or too large, a version over 32 bits
    """
    private = load_private_key(key)
    kind = _kind(private)
    if algorithm is None:
        algorithm = default_algorithm(private)
    if algorithm.key != kind:
        raise ValueError(f"{algorithm.name} needs a key of kind {algorithm.key}, this one is {kind}")
    if not 0 < len(payload) < 1 << 32:
        raise ValueError(f"a payload of {len(payload)} bytes cannot be packaged")
    if not 0 <= version < 1 << 32:
        raise ValueError(f"version {version} does not fit 32 bits")
    head = HEADER.build(
        {
            "magic": MAGIC,
            "img_type": IMAGE_BOOTSTRAP_TA,
            "img_size": len(payload),
            "algo": algorithm.number,
            "hash_size": _HASH_SIZE,
            "sig_size": _signature_size(private),
        }
    )
    subheader = BOOTSTRAP.build({"uuid": uuid.bytes, "ta_version": version})
    digest = _digest((head, subheader, payload))
    signature = _SIGN[algorithm.name](private, digest)
    return b"".join((head, digest, signature, subheader, payload))


def keygen(algorithm: Algorithm = DEFAULT_ALGORITHM, *, rsa_bits: int = 3072) -> KeyPair:
    """A new key for ``algorithm``. Keep the private half as you would keep a root password of the backend's host."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    private: Any
    if algorithm.key == "rsa":
        if not MIN_RSA_BITS <= rsa_bits <= MAX_RSA_BITS or rsa_bits % 8:
            raise ValueError(f"RSA keys have {MIN_RSA_BITS} to {MAX_RSA_BITS} bits, in whole octets")
        private = rsa.generate_private_key(public_exponent=65537, key_size=rsa_bits)
    else:
        private = ec.generate_private_key(ec.SECP256R1())
    return KeyPair(
        private=private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ),
        public=private.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        ),
    )


def load_public_key(key: bytes | PublicKey) -> PublicKey:
    """A public key from PEM (of the public key, or of a private one), checked to be one that may sign TAs.

    :raises ValueError: not PEM, or a key that is too weak or of another kind
    """
    if isinstance(key, bytes):
        from cryptography.hazmat.primitives import serialization

        if b"PRIVATE KEY" in key:
            return load_private_key(key).public_key()
        key = serialization.load_pem_public_key(key)  # type: ignore[assignment]
    _accept(key)
    return key  # type: ignore[return-value]


def load_private_key(key: bytes | PrivateKey) -> PrivateKey:
    """A private key from PEM without pass phrase, checked as :func:`load_public_key` does."""
    if isinstance(key, bytes):
        from cryptography.hazmat.primitives import serialization

        key = serialization.load_pem_private_key(key, password=None)  # type: ignore[assignment]
    _accept(key)
    return key  # type: ignore[return-value]


def default_algorithm(key: PrivateKey) -> Algorithm:
    """What ``key`` signs with unless told otherwise (RSA: PSS)."""
    kind = _kind(key)
    return DEFAULT_ALGORITHM if kind == "rsa" else next(a for a in ALGORITHMS.values() if a.key == kind)


def signature_size(key: PrivateKey | PublicKey) -> int:
    """Bytes of a signature by ``key``."""
    return _signature_size(key)


def key_id(key: PrivateKey | PublicKey) -> bytes:
    """SHA-256 of the public key (DER, SubjectPublicKeyInfo)."""
    from cryptography.hazmat.primitives import serialization

    public: Any = key.public_key() if hasattr(key, "public_key") else key
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return sha256(der).digest()


def sign_digest(key: PrivateKey, algorithm: Algorithm, digest: bytes) -> bytes:
    """The signature of a SHA-256 ``digest``."""
    return _SIGN[algorithm.name](key, digest)


def verify_digest(key: PublicKey, algorithm: Algorithm, signature: bytes, digest: bytes) -> bool:
    """Whether ``key`` made this signature of a SHA-256 ``digest``."""
    if _kind(key) != algorithm.key or len(signature) != _signature_size(key):
        return False
    return _VERIFY[algorithm.name](key, signature, digest)


def _accept(key: object) -> None:
    """Raise ValueError unless ``key`` is of a kind and size that may sign TAs."""
    if _kind(key) == "ec":
        curve = key.curve.name  # type: ignore[attr-defined]
        if curve != "secp256r1":
            raise ValueError(f"EC keys must be on P-256, this one is on {curve}")
        return
    bits = key.key_size  # type: ignore[attr-defined]
    if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
        raise ValueError(f"an RSA key of {bits} bits; {MIN_RSA_BITS} to {MAX_RSA_BITS} are accepted")


def _kind(key: object) -> str:
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    if isinstance(key, rsa.RSAPublicKey | rsa.RSAPrivateKey):
        return "rsa"
    if isinstance(key, ec.EllipticCurvePublicKey | ec.EllipticCurvePrivateKey):
        return "ec"
    raise ValueError(f"keys are RSA or EC, not {type(key).__name__}")


def _signature_size(key: Any) -> int:
    return 2 * _EC_HALF if _kind(key) == "ec" else (int(key.key_size) + 7) // 8


def _digest(parts: Iterable[bytes]) -> bytes:
    digest = sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _rsa_padding(name: str) -> Any:
    from cryptography.hazmat.primitives.asymmetric import padding
    from cryptography.hazmat.primitives.hashes import SHA256

    if name == "rsa-pkcs1-sha256":
        return padding.PKCS1v15()
    return padding.PSS(mgf=padding.MGF1(SHA256()), salt_length=_HASH_SIZE)


def _prehashed() -> Any:
    from cryptography.hazmat.primitives.asymmetric.utils import Prehashed
    from cryptography.hazmat.primitives.hashes import SHA256

    return Prehashed(SHA256())


def _rsa_sign(name: str) -> Callable[[Any, bytes], bytes]:
    def run(key: Any, digest: bytes) -> bytes:
        return bytes(key.sign(digest, _rsa_padding(name), _prehashed()))

    return run


def _rsa_verify(name: str) -> Callable[[Any, bytes, bytes], bool]:
    def run(key: Any, signature: bytes, digest: bytes) -> bool:
        from cryptography.exceptions import InvalidSignature

        try:
            key.verify(signature, digest, _rsa_padding(name), _prehashed())
        except InvalidSignature:
            return False
        return True

    return run


def _ec_sign(key: Any, digest: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    r, s = decode_dss_signature(key.sign(digest, ec.ECDSA(_prehashed())))
    return r.to_bytes(_EC_HALF, "big") + s.to_bytes(_EC_HALF, "big")


def _ec_verify(key: Any, signature: bytes, digest: bytes) -> bool:
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.asymmetric.utils import encode_dss_signature

    r, s = int.from_bytes(signature[:_EC_HALF], "big"), int.from_bytes(signature[_EC_HALF:], "big")
    try:
        key.verify(encode_dss_signature(r, s), digest, ec.ECDSA(_prehashed()))
    except InvalidSignature:
        return False
    return True


_SIGN: dict[str, Callable[[Any, bytes], bytes]] = {
    "rsa-pss-sha256": _rsa_sign("rsa-pss-sha256"),
    "rsa-pkcs1-sha256": _rsa_sign("rsa-pkcs1-sha256"),
    "ecdsa-p256-sha256": _ec_sign,
}

_VERIFY: dict[str, Callable[[Any, bytes, bytes], bool]] = {
    "rsa-pss-sha256": _rsa_verify("rsa-pss-sha256"),
    "rsa-pkcs1-sha256": _rsa_verify("rsa-pkcs1-sha256"),
    "ecdsa-p256-sha256": _ec_verify,
}


def _bad(why: str) -> TeeError:
    return TeeError(Result.BAD_FORMAT, Origin.TEE, f"TA package: {why}")


def _insecure(why: str) -> TeeError:
    return TeeError(Result.SECURITY, Origin.TEE, f"TA package: {why}")
