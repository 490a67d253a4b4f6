"""What the tests of ``tee`` share."""

from __future__ import annotations

import pytest

from tee import package
from tests.tee.bench import Bench


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.fixture(scope="session")
def keys() -> package.KeyPair:
    return package.keygen(package.algorithm_named("ecdsa-p256-sha256"))


@pytest.fixture(scope="session")
def rsa_keys() -> package.KeyPair:
    return package.keygen(rsa_bits=2048)
