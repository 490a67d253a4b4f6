"""TA payloads: each module here is what one TA package holds. :func:`source` gives its bytes, to be signed.

==============  =====================================  ==============================================================
module          UUID                                   what it is
==============  =====================================  ==============================================================
hello_world     8aaaf200-2450-11e4-abe2-0002a5d5c51b   OP-TEE's public example: increments and decrements a value
random          b6c53aba-9669-4668-a7f2-205629d00f86   OP-TEE's public example: fills a buffer with random bytes
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
