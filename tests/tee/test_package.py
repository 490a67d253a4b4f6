"""TA packages: the layout by hand-written bytes, and everything that must be refused."""

from __future__ import annotations

import hashlib
import struct
import subprocess
import sys
from typing import Any
from uuid import UUID

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tee import package
from tee.results import Result, TeeError

UUID_1 = UUID("12345678-9abc-def0-1122-334455667788")
OCTETS_1 = bytes.fromhex("123456789abcdef01122334455667788")
PAYLOAD = b"print('hello')\n"


def refused(code: int, data: bytes, uuid: UUID, *keys: Any, why: str = "", **options: Any) -> None:
    with pytest.raises(TeeError) as caught:
        package.verify(data, uuid, keys, **options)
    assert caught.value.code == code, caught.value
    assert why in str(caught.value)


@pytest.fixture(scope="module")
def pairs() -> dict[str, package.KeyPair]:
    rsa_pair = package.keygen(rsa_bits=2048)
    ec_pair = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
    return {"rsa": rsa_pair, "ec": ec_pair}


@pytest.mark.parametrize("algorithm", package.ALGORITHMS.values(), ids=lambda a: a.name)
class TestEachAlgorithm:
    def test_signed_is_verified(self, algorithm: package.Algorithm, pairs: dict[str, package.KeyPair]) -> None:
        pair = pairs[algorithm.key]
        data = package.sign(PAYLOAD, UUID_1, 7, pair.private, algorithm)
        ta = package.verify(data, UUID_1, [pair.public])
        assert (ta.uuid, ta.version, ta.payload, ta.algorithm, ta.key_number) == (UUID_1, 7, PAYLOAD, algorithm, 0)

    def test_any_of_the_keys_will_do(self, algorithm: package.Algorithm, pairs: dict[str, package.KeyPair]) -> None:
        pair = pairs[algorithm.key]
        other = package.keygen(algorithm, rsa_bits=2048)
        data = package.sign(PAYLOAD, UUID_1, 7, pair.private, algorithm)
        assert package.verify(data, UUID_1, [other.public, pair.public]).key_number == 1
        refused(Result.SECURITY, data, UUID_1, other.public, why="no trusted key made")

    def test_cut_at_every_length(self, algorithm: package.Algorithm, pairs: dict[str, package.KeyPair]) -> None:
        pair = pairs[algorithm.key]
        data = package.sign(PAYLOAD, UUID_1, 7, pair.private, algorithm)
        for length in range(len(data)):
            refused(Result.BAD_FORMAT, data[:length], UUID_1, pair.public)
        refused(Result.BAD_FORMAT, data + b"\0", UUID_1, pair.public)

    def test_header_by_hand(self, algorithm: package.Algorithm, pairs: dict[str, package.KeyPair]) -> None:
        """The same bytes as struct and hashlib give, written down here a second time."""
        number = {"rsa-pss-sha256": 0x70414930, "rsa-pkcs1-sha256": 0x70004830, "ecdsa-p256-sha256": 0x70003042}
        signature_size = 64 if algorithm.key == "ec" else 256
        data = package.sign(PAYLOAD, UUID_1, 0x01020304, pairs[algorithm.key].private, algorithm)
        head = b"HSTO" + struct.pack("<IIIHH", 1, len(PAYLOAD), number[algorithm.name], 32, signature_size)
        sub = OCTETS_1 + b"\x04\x03\x02\x01"
        assert data[:20] == head
        assert data[20:52] == hashlib.sha256(head + sub + PAYLOAD).digest()
        assert data[52 + signature_size :] == sub + PAYLOAD


def test_package_by_hand_verifies() -> None:
    """A package put together from the published layout, signed by textbook RSA (RFC 8017, 9.2)."""
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    numbers = key.private_numbers()
    head = bytes.fromhex("48 53 54 4f 01 00 00 00") + struct.pack("<II", len(PAYLOAD), 0x70004830)
    head += struct.pack("<HH", 32, 256)
    sub = OCTETS_1 + struct.pack("<I", 3)
    digest = hashlib.sha256(head + sub + PAYLOAD).digest()
    info = bytes.fromhex("3031300d060960864801650304020105000420") + digest
    block = b"\0\1" + b"\xff" * (256 - 3 - len(info)) + b"\0" + info
    signature = pow(int.from_bytes(block, "big"), numbers.d, numbers.public_numbers.n).to_bytes(256, "big")
    ta = package.verify(head + digest + signature + sub + PAYLOAD, UUID_1, [key.public_key()])
    assert (ta.uuid, ta.version, ta.payload) == (UUID_1, 3, PAYLOAD)


class TestRefused:
    @pytest.fixture
    def good(self, keys: package.KeyPair) -> bytes:
        return package.sign(PAYLOAD, UUID_1, 1, keys.private)

    def test_another_uuid(self, good: bytes, keys: package.KeyPair) -> None:
        refused(Result.SECURITY, good, UUID(int=1), keys.public, why="not of 00000000")

    def test_no_key(self, good: bytes) -> None:
        refused(Result.SECURITY, good, UUID_1, why="none of the trusted keys")

    def test_key_of_another_kind(self, good: bytes, rsa_keys: package.KeyPair) -> None:
        refused(Result.SECURITY, good, UUID_1, rsa_keys.public, why="none of the trusted keys")

    def test_plain_module(self, keys: package.KeyPair) -> None:
        refused(Result.BAD_FORMAT, PAYLOAD * 10, UUID_1, keys.public, why="not signed")

    def test_without_signature(self, keys: package.KeyPair) -> None:
        head = struct.pack("<IIIIHH", package.MAGIC, 1, len(PAYLOAD), 0x70003042, 32, 0)
        sub = UUID_1.bytes + bytes(4)
        digest = hashlib.sha256(head + sub + PAYLOAD).digest()
        refused(Result.SECURITY, head + digest + sub + PAYLOAD, UUID_1, keys.public, why="not signed")

    def test_limit(self, good: bytes, keys: package.KeyPair) -> None:
        refused(Result.BAD_FORMAT, good, UUID_1, keys.public, why="limit", limit=len(good) - 1)
        package.verify(good, UUID_1, [keys.public], limit=len(good))

    @pytest.mark.parametrize(
        ("at", "value", "why"),
        [
            (0, 0x4F545349, "not a TA package"),
            (4, 0, "image type 0"),
            (4, 2, "encrypted"),
            (4, 3, "subkey"),
            (4, 9, "unknown"),
            (8, 0xFFFFFFFF, "describes"),
            (8, 0, "describes"),
            (8, len(PAYLOAD) - 1, "describes"),
            (12, 0x70001042, "not supported"),
            (16, 20 | 64 << 16, "a hash of 20"),
            (16, 32 | 0xFFFF << 16, "describes"),
        ],
    )
    def test_header_field(self, good: bytes, keys: package.KeyPair, at: int, value: int, why: str) -> None:
        data = bytearray(good)
        struct.pack_into("<I", data, at, value)
        refused(Result.BAD_FORMAT, bytes(data), UUID_1, keys.public, why=why)

    def test_empty_payload(self, keys: package.KeyPair) -> None:
        head = struct.pack("<IIIIHH", package.MAGIC, 1, 0, 0x70003042, 32, 64)
        refused(Result.BAD_FORMAT, head + bytes(32 + 64 + 20), UUID_1, keys.public, why="empty")

    def test_bytes_moved_between_payload_and_signature(self, good: bytes, keys: package.KeyPair) -> None:
        """Sizes that still add up, but cut the same bytes elsewhere."""
        data = bytearray(good)
        struct.pack_into("<I", data, 8, len(PAYLOAD) - 1)
        struct.pack_into("<H", data, 18, 65)
        refused(Result.SECURITY, bytes(data), UUID_1, keys.public)

    def test_hash_made_to_fit_is_not_enough(self, good: bytes, keys: package.KeyPair) -> None:
        data = bytearray(good[:-1] + b"#")
        data[20:52] = hashlib.sha256(data[:20] + data[52 + 64 :]).digest()
        refused(Result.SECURITY, bytes(data), UUID_1, keys.public, why="no trusted key")

    @settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(data=st.data())
    def test_any_bit_flipped(self, data: st.DataObject, keys: package.KeyPair, good: bytes) -> None:
        bit = data.draw(st.integers(0, len(good) * 8 - 1))
        changed = bytearray(good)
        changed[bit // 8] ^= 1 << bit % 8
        with pytest.raises(TeeError) as caught:
            package.verify(bytes(changed), UUID_1, [keys.public])
        assert caught.value.code in (Result.SECURITY, Result.BAD_FORMAT)

    @settings(max_examples=150)
    @given(data=st.binary(max_size=300))
    def test_anything(self, data: bytes) -> None:
        with pytest.raises(TeeError):
            package.parse(data)

    @given(rest=st.binary(max_size=300))
    def test_anything_after_a_good_start(self, rest: bytes) -> None:
        head = struct.pack("<IIIIHH", package.MAGIC, 1, 100, 0x70003042, 32, 64)
        try:
            parsed = package.parse(head + rest)
        except TeeError:
            return
        assert len(parsed.payload) == 100


class TestKeys:
    def test_weak_rsa(self) -> None:
        with pytest.raises(ValueError, match="1024 bits"):
            package.load_public_key(rsa.generate_private_key(public_exponent=65537, key_size=1024).public_key())
        with pytest.raises(ValueError, match="RSA keys have"):
            package.keygen(rsa_bits=1024)

    def test_other_curve(self) -> None:
        with pytest.raises(ValueError, match="secp384r1"):
            package.load_private_key(ec.generate_private_key(ec.SECP384R1()))

    def test_other_kind(self) -> None:
        with pytest.raises(ValueError, match="not str"):
            package.load_public_key("key")  # type: ignore[arg-type]

    def test_public_key_of_a_private_pem(self, keys: package.KeyPair) -> None:
        data = package.sign(PAYLOAD, UUID_1, 1, keys.private)
        package.verify(data, UUID_1, [keys.private])

    def test_wrong_algorithm_for_the_key(self, keys: package.KeyPair) -> None:
        with pytest.raises(ValueError, match="needs a key of kind rsa"):
            package.sign(PAYLOAD, UUID_1, 1, keys.private, package.DEFAULT_ALGORITHM)

    def test_what_cannot_be_signed(self, keys: package.KeyPair) -> None:
        with pytest.raises(ValueError, match="payload"):
            package.sign(b"", UUID_1, 1, keys.private)
        with pytest.raises(ValueError, match="version"):
            package.sign(PAYLOAD, UUID_1, 1 << 32, keys.private)

    def test_names(self) -> None:
        with pytest.raises(ValueError, match="there are rsa-pss-sha256, "):
            package.algorithm_named("md5")


def test_parse_needs_no_cryptography(keys: package.KeyPair) -> None:
    data = package.sign(PAYLOAD, UUID_1, 5, keys.private)
    program = (
        "import sys; sys.modules['cryptography'] = None\n"
        "from tee import package; import tee.soft, tee.io.supplicant\n"
        f"print(package.parse(bytes.fromhex('{data.hex()}')).version)"
    )
    found = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=60)
    assert found.stdout == "5\n"
