"""TA payloads: each module here is what one TA package holds. :func:`source` gives its bytes, to be signed.

==============  =====================================  ==============================================================
module          UUID                                   what it is
==============  =====================================  ==============================================================
hello_world     8aaaf200-2450-11e4-abe2-0002a5d5c51b   OP-TEE's public example: increments and decrements a value
random          b6c53aba-9669-4668-a7f2-205629d00f86   OP-TEE's public example: fills a buffer with random bytes
aes             5dbac793-f574-4871-8ad3-04331ec17f24   OP-TEE's public example: ciphers with AES
hotp            484d4143-2d53-4841-3120-4a6f636b6542   OP-TEE's public example: one-time passwords (RFC 4226)
secure_storage  f4e750bb-1437-4fbf-8785-8d3580c34994   OP-TEE's public example: objects that outlive the TA
acipher         a734eed9-d6a1-4244-aa50-7c99719e7b7b   OP-TEE's public example: ciphers with RSA
ocall           6d9a1f57-0c5e-4c0b-9a0d-2f6f3b1c8e44   calls its client
stage           5c6f5ab6-31a5-4d0f-9d44-0d3f1f0b6a27   a server enclave; enclaves call one another
probe           3f0c8d2e-6a51-4b7c-9d14-8e2b7a90c5f6   for tests and benchmarks: one command for each kind of use
==============  =====================================  ==============================================================
"""

from __future__ import annotations

import importlib
from importlib import resources
from uuid import UUID

from tee.soft.ta import TrustedApplication

#: The examples by name.
UUIDS = {
    "hello_world": UUID("8aaaf200-2450-11e4-abe2-0002a5d5c51b"),
    "random": UUID("b6c53aba-9669-4668-a7f2-205629d00f86"),
    "aes": UUID("5dbac793-f574-4871-8ad3-04331ec17f24"),
    "hotp": UUID("484d4143-2d53-4841-3120-4a6f636b6542"),
    "secure_storage": UUID("f4e750bb-1437-4fbf-8785-8d3580c34994"),
    "acipher": UUID("a734eed9-d6a1-4244-aa50-7c99719e7b7b"),
    "ocall": UUID("6d9a1f57-0c5e-4c0b-9a0d-2f6f3b1c8e44"),
    "stage": UUID("5c6f5ab6-31a5-4d0f-9d44-0d3f1f0b6a27"),
    "probe": UUID("3f0c8d2e-6a51-4b7c-9d14-8e2b7a90c5f6"),
}


def source(name: str) -> bytes:
    """The payload of the example ``name``. KeyError where there is none."""
    if name not in UUIDS:
        raise KeyError(name)
    return resources.files(__name__).joinpath(f"{name}.py").read_bytes()


def built_in(*names: str) -> dict[UUID, type[TrustedApplication]]:
    """Examples as :class:`~tee.soft.SoftTee` takes built-in TAs (all of them unless named)."""
    found: dict[UUID, type[TrustedApplication]] = {}
    for name in names or UUIDS:
        module = importlib.import_module(f"{__name__}.{name}")
        found[UUIDS[name]] = module.TA
    return found
