"""The TAs of OP-TEE's public examples, against vectors of others."""

from __future__ import annotations

from typing import Any

import pytest

from tee import package
from tee.calls import Invoke, OpenSession
from tee.memory import Memory
from tee.params import Direction, MemRef, Nothing, Param, Value
from tee.results import Origin, Result
from tee.soft import examples
from tests.tee.bench import Bench
from tests.tee.soft.keeper import Keeper

IN, OUT, INOUT = Direction.IN, Direction.OUT, Direction.INOUT
ECB, CBC, CTR, CCM, GCM = range(5)


def given(data: bytes | str) -> MemRef:
    raw = bytes.fromhex(data) if isinstance(data, str) else data
    return MemRef(IN, Memory.of(bytearray(raw)), 0, len(raw)) if raw else MemRef(IN, None)


def room(size: int, direction: Direction = OUT, data: bytes = b"") -> MemRef:
    return MemRef(direction, Memory.of(bytearray(data.ljust(size, b"\0"))), 0, size)


def content(reference: MemRef) -> bytes:
    assert reference.memory is not None
    return reference.memory.read(reference.offset, reference.size)


@pytest.fixture(params=["built in", "loaded"])
def tee(request: Any, keys: package.KeyPair) -> Tee:
    return Tee(keys if request.param == "loaded" else None)


class Tee:
    """A session with an example, built in or loaded from a signed package, and a supplicant."""

    def __init__(self, keys: package.KeyPair | None) -> None:
        self.keys = keys
        built_in = {} if keys is not None else examples.built_in()
        self.bench = Bench(built_in=built_in, keys=[keys.public] if keys is not None else [])
        self.keeper = Keeper(self.bench)
        self.session: Any = None

    def open(self, name: str) -> Any:
        uuid = examples.UUIDS[name]
        if self.keys is not None:
            self.keeper.data = package.sign(examples.source(name), uuid, 1, self.keys.private)
        call = self.bench.start(OpenSession(context=self.bench.context(), uuid=uuid))
        self.keeper.serve()
        done = self.bench.finish(call)
        if done.code == Result.SUCCESS:
            self.session = done.value
        return done

    def invoke(self, func: int, *params: Param) -> int:
        padded = [*params, *[Nothing()] * (4 - len(params))]
        call = self.bench.start(Invoke(session=self.session, func=func, params=padded))
        self.keeper.serve()
        done = self.bench.finish(call)
        assert done.origin == Origin.TRUSTED_APP
        return done.code


@pytest.mark.feature("TAs: OP-TEE's public examples: AES")
class TestAes:
    KEY_128 = "2b7e151628aed2a6abf7158809cf4f3c"
    KEY_256 = "603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4"
    IV = "000102030405060708090a0b0c0d0e0f"
    COUNTER = "f0f1f2f3f4f5f6f7f8f9fafbfcfdfeff"
    PLAIN = (
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    VECTORS = (
        # NIST SP 800-38A, appendix F: F.1.1, F.1.5, F.2.1, F.2.5, F.5.1, F.5.5; the first and the last block
        (ECB, KEY_128, "", "3ad77bb40d7a3660a89ecaf32466ef97", "7b0c785e27e8ad3f8223207104725dd4"),
        (ECB, KEY_256, "", "f3eed1bdb5d2a03c064b5a7e3db181f8", "23304b7a39f9f3ff067d8d8f9e24ecc7"),
        (CBC, KEY_128, IV, "7649abac8119b246cee98e9b12e9197d", "3ff1caa1681fac09120eca307586e1a7"),
        (CBC, KEY_256, IV, "f58c4c04d6e5f1ba779eabfb5f7bfbd6", "b2eb05e2c39be9fcda6c19078c6a9d1b"),
        (CTR, KEY_128, COUNTER, "874d6191b620e3261bef6864990db6ce", "1e031dda2fbe03d1792170a0f3009cee"),
        (CTR, KEY_256, COUNTER, "601ec313775789a5b7a7f504bbf3d228", "dfc9c58db67aada613c2dd08457941a6"),
    )

    def prepare(self, tee: Tee, algorithm: int, key: str, encrypt: int, iv: str | None = None) -> None:
        if tee.session is None:
            tee.open("aes")
        size = len(key) // 2
        assert tee.invoke(0, Value(IN, algorithm), Value(IN, size), Value(IN, encrypt)) == Result.SUCCESS
        assert tee.invoke(1, given(key)) == Result.SUCCESS
        if iv is not None:
            assert tee.invoke(2, given(iv)) == Result.SUCCESS

    @pytest.mark.parametrize(("algorithm", "key", "iv", "first", "last"), VECTORS)
    def test_nist(self, tee: Tee, algorithm: int, key: str, iv: str, first: str, last: str) -> None:
        self.prepare(tee, algorithm, key, 1, iv)
        sealed = room(64)
        assert tee.invoke(3, given(self.PLAIN), sealed) == Result.SUCCESS
        assert (content(sealed)[:16].hex(), content(sealed)[48:].hex()) == (first, last)
        self.prepare(tee, algorithm, key, 0, iv)
        plain = room(100)
        assert tee.invoke(3, given(content(sealed)), plain) == Result.SUCCESS
        assert content(plain).hex() == self.PLAIN

    def test_in_pieces(self, tee: Tee) -> None:
        """What does not fill a block comes with the next call."""
        self.prepare(tee, CBC, self.KEY_128, 1, self.IV)
        data, done = bytes.fromhex(self.PLAIN), b""
        for start, end, size in ((0, 5, 0), (5, 33, 32), (33, 64, 32)):
            out = room(64)
            assert tee.invoke(3, given(data[start:end]), out) == Result.SUCCESS
            assert out.size == size
            done += content(out)
        assert done[:16].hex() == "7649abac8119b246cee98e9b12e9197d"
        assert done[48:].hex() == "3ff1caa1681fac09120eca307586e1a7"

    def test_large(self, tee: Tee) -> None:
        self.prepare(tee, CTR, self.KEY_128, 1, self.COUNTER)
        out = room(1 << 20)
        assert tee.invoke(3, given(bytes(1 << 20)), out) == Result.SUCCESS
        self.prepare(tee, CTR, self.KEY_128, 0, self.COUNTER)
        back = room(1 << 20)
        assert tee.invoke(3, given(content(out)), back) == Result.SUCCESS
        assert content(back) == bytes(1 << 20)

    def test_gcm_and_ccm(self, tee: Tee) -> None:
        """Computed with OpenSSL's AES-GCM and AES-CCM for the example's fixed nonce; and what was changed is found."""
        from cryptography.hazmat.primitives.ciphers.aead import AESCCM, AESGCM

        text, key, nonce = bytes.fromhex(self.PLAIN), bytes.fromhex(self.KEY_256), bytes(range(12))
        for algorithm, cipher in ((GCM, AESGCM(key)), (CCM, AESCCM(key))):
            self.prepare(tee, algorithm, self.KEY_256, 1)
            out, tag = room(64), room(16, INOUT)
            assert tee.invoke(4, given(text), out, Value(IN, 7), tag) == Result.SUCCESS
            assert content(out) + content(tag) == cipher.encrypt(nonce, text, None)
            self.prepare(tee, algorithm, self.KEY_256, 0)
            back = room(64)
            good = room(16, INOUT, content(tag))
            assert tee.invoke(4, given(content(out)), back, Value(IN, 0), good) == Result.SUCCESS
            assert content(back) == text
            bad = room(16, INOUT, content(tag)[:-1] + b"x")
            assert tee.invoke(4, given(content(out)), room(64), Value(IN, 0), bad) == Result.MAC_INVALID
            assert tee.invoke(4, given(text), room(64), Value(IN, 1), bad) == Result.BAD_STATE
            assert tee.invoke(4, given(text), room(64), Value(IN, 0), room(3, INOUT)) == Result.BAD_PARAMETERS
            assert tee.invoke(4, given(text), room(63), Value(IN, 0), good) == Result.SHORT_BUFFER

    def test_nothing_to_seal(self, tee: Tee) -> None:
        """NIST's GCM test case 13 has another nonce; here only the tag of nothing comes back."""
        self.prepare(tee, GCM, self.KEY_128, 1)
        tag = room(16, INOUT)
        assert tee.invoke(4, given(b""), MemRef(OUT, None), Value(IN, 1), tag) == Result.SUCCESS
        self.prepare(tee, GCM, self.KEY_128, 0)
        assert tee.invoke(4, given(b""), MemRef(OUT, None), Value(IN, 0), tag) == Result.SUCCESS

    def test_bad(self, tee: Tee) -> None:
        tee.open("aes")
        assert tee.invoke(3, given(self.PLAIN), room(64)) == Result.BAD_STATE
        assert tee.invoke(2, given(self.IV)) == Result.BAD_STATE
        assert tee.invoke(1, given(self.KEY_128)) == Result.BAD_PARAMETERS
        for values in ((5, 16, 1), (0, 24, 1), (0, 16, 2)):
            assert tee.invoke(0, *(Value(IN, value) for value in values)) == Result.BAD_PARAMETERS
        self.prepare(tee, CBC, self.KEY_128, 1)
        assert tee.invoke(3, given(self.PLAIN), room(64)) == Result.BAD_STATE
        assert tee.invoke(2, given(self.IV[2:])) == Result.BAD_PARAMETERS
        assert tee.invoke(2, given(self.IV)) == Result.SUCCESS
        assert tee.invoke(3, given(self.PLAIN), room(63)) == Result.BAD_PARAMETERS
        assert tee.invoke(4, given(self.PLAIN), room(64), Value(IN, 1), room(16, INOUT)) == Result.BAD_STATE
        assert tee.invoke(5) == Result.NOT_SUPPORTED


@pytest.mark.feature("TAs: OP-TEE's public examples: HOTP")
class TestHotp:
    def test_rfc_4226(self, tee: Tee) -> None:
        """Appendix D: HOTP values for the secret "12345678901234567890" and the counters 0 to 9."""
        tee.open("hotp")
        assert tee.invoke(0, given(b"12345678901234567890")) == Result.SUCCESS
        found = []
        for _ in range(10):
            value = Value(OUT)
            assert tee.invoke(1, value) == Result.SUCCESS
            found.append(value.a)
        assert found == [755224, 287082, 359152, 969429, 338314, 254676, 287922, 162583, 399871, 520489]

    def test_bad(self, tee: Tee) -> None:
        tee.open("hotp")
        assert tee.invoke(1, Value(OUT)) == Result.BAD_PARAMETERS
        assert tee.invoke(0, given(bytes(65))) == Result.BAD_PARAMETERS
        assert tee.invoke(0, given(bytes(9))) == Result.SUCCESS
        assert tee.invoke(1, Value(OUT)) == Result.BAD_PARAMETERS
        assert tee.invoke(1, Value(IN)) == Result.BAD_PARAMETERS
        assert tee.invoke(2) == Result.BAD_PARAMETERS


@pytest.mark.feature("TAs: OP-TEE's public examples: secure storage")
class TestSecureStorage:
    def test_what_the_public_client_does(self, tee: Tee) -> None:
        """7000 bytes are written, read and deleted; another object comes and goes."""
        tee.open("secure_storage")
        data = b"\xa1" * 7000
        assert tee.invoke(1, given(b"object#1"), given(data)) == Result.SUCCESS
        out = room(7000)
        assert tee.invoke(0, given(b"object#1"), out) == Result.SUCCESS
        assert content(out) == data
        assert tee.invoke(2, given(b"object#1")) == Result.SUCCESS
        assert tee.invoke(0, given(b"object#2"), room(7000)) == Result.ITEM_NOT_FOUND
        assert tee.invoke(1, given(b"object#2"), given(b"This is data\n\0")) == Result.SUCCESS
        short = room(3)
        assert tee.invoke(0, given(b"object#2"), short) == Result.SHORT_BUFFER
        assert short.size == 14
        assert tee.invoke(1, given(b"object#2"), given(b"")) == Result.SUCCESS
        assert tee.invoke(0, given(b"object#2"), MemRef(OUT, None)) == Result.SUCCESS
        assert tee.invoke(2, given(b"object#2")) == Result.SUCCESS
        assert tee.invoke(2, given(b"object#2")) == Result.ITEM_NOT_FOUND
        assert tee.invoke(0, given(bytes(65)), room(1)) == Result.BAD_PARAMETERS
        assert tee.invoke(3) == Result.NOT_SUPPORTED

    def test_one_session_at_a_time(self, tee: Tee) -> None:
        tee.open("secure_storage")
        assert tee.open("secure_storage").code == Result.BUSY

    def test_a_supplicant_that_changes_a_bit(self, tee: Tee) -> None:
        tee.open("secure_storage")
        tee.invoke(1, given(b"a"), given(b"data"))
        for name, held in tee.keeper.files.items():
            tee.keeper.files[name] = held[:-1] + bytes([held[-1] ^ 1])
        assert tee.invoke(0, given(b"a"), room(4)) == Result.CORRUPT_OBJECT
        tee.keeper.present = False
        assert tee.invoke(1, given(b"a"), given(b"data")) == Result.STORAGE_NOT_AVAILABLE


@pytest.mark.feature("TAs: OP-TEE's public examples: asymmetric cipher")
class TestAcipher:
    ALGORITHMS = (0x60000130, 0x60210230, 0x60310230, 0x60410230, 0x60510230, 0x60610230)

    def test_round_trip(self, tee: Tee) -> None:
        """As the public client does it: the sizes are asked for first."""
        tee.open("acipher")
        assert tee.invoke(0, Value(IN, 2048)) == Result.SUCCESS
        for algorithm in self.ALGORITHMS:
            text = b"teststring"
            for encrypt in (1, 0):
                ask = MemRef(OUT, None)
                assert tee.invoke(1, given(text), ask, Value(IN, encrypt), Value(IN, algorithm)) == Result.SHORT_BUFFER
                out = room(ask.size)
                assert tee.invoke(1, given(text), out, Value(IN, encrypt), Value(IN, algorithm)) == Result.SUCCESS
                assert (out.size == 256) is bool(encrypt)
                text = content(out)
            assert text == b"teststring"

    def test_bad(self, tee: Tee) -> None:
        tee.open("acipher")
        values = Value(IN, 1), Value(IN, self.ALGORITHMS[0])
        assert tee.invoke(1, given(b"a"), room(256), *values) == Result.BAD_STATE
        for bits in (0, 1023, 1025, 4098, 1 << 63):
            assert tee.invoke(0, Value(IN, bits)) == Result.NOT_SUPPORTED
        assert tee.invoke(0, Value(IN, 1024)) == Result.SUCCESS
        assert tee.invoke(1, given(bytes(129)), room(256), *values) == Result.BAD_PARAMETERS
        assert tee.invoke(1, given(bytes(128)), room(256), *values) == Result.BAD_PARAMETERS
        assert tee.invoke(1, given(bytes(9)), room(256), Value(IN, 0), values[1]) == Result.BAD_PARAMETERS
        oaep = Value(IN, self.ALGORITHMS[1])
        assert tee.invoke(1, given(bytes(128)), room(256), Value(IN, 0), oaep) == Result.BAD_PARAMETERS
        assert tee.invoke(1, given(b"a"), room(256), values[0], Value(IN, 0x70004830)) == Result.NOT_SUPPORTED
        assert tee.invoke(2) == Result.NOT_SUPPORTED
