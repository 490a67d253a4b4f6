"""What all paths have in common: a TA that is loaded, guests' supplicants, and clients' runtimes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from ffa.optee.client import Pages
from guest_driver.client import REGISTER_FROM, Context
from tee import package
from tee.driver import TeeDriver
from tee.io.runtime import TeeRuntime
from tee.io.supplicant import Services
from tee.memory import Memory
from tee.soft.examples import UUIDS, source

LOADED = "hello_world"
"""The TA that every guest's supplicant has, and the TEE has not."""

FIRST = "vm0"
"""The machine that a client of :mod:`~virtio_tee.compare.direct` is on, and its supplicant."""

GUEST_BYTES = 48 << 20
"""Bytes of a guest's memory."""


@dataclass(frozen=True, slots=True)
class Kit:
    """A folder with a vendor's key and a signed TA."""

    folder: Path

    @classmethod
    def new(cls, folder: Path) -> Kit:
        """Makes keys and signs the TA."""
        kit = cls(folder)
        kit.tas.mkdir()
        pair = package.keygen(package.algorithm_named("ecdsa-p256-sha256"))
        kit.key_file.write_bytes(pair.public)
        uuid = UUIDS[LOADED]
        (kit.tas / f"{uuid}.ta").write_bytes(package.sign(source(LOADED), uuid, 1, pair.private))
        return kit

    @property
    def tas(self) -> Path:
        """The folder of the guests' signed TAs."""
        return self.folder / "tas"

    @property
    def key_file(self) -> Path:
        """The public key of their signer."""
        return self.folder / "vendor.pem"

    @property
    def key(self) -> bytes:
        """That key (PEM)."""
        return self.key_file.read_bytes()

    @property
    def package(self) -> bytes:
        """The signed TA."""
        return (self.tas / f"{UUIDS[LOADED]}.ta").read_bytes()

    def services(self, name: str) -> Services:
        """What the supplicant of guest ``name`` serves."""
        return Services(ta_folders=(str(self.tas),), fs_folder=str(self.folder / f"files-{name}"), fs_sync=False)


Shared = Callable[[Memory], AbstractContextManager[Memory]]
"""Makes memory that the first guest has put together ready to be registered."""


@dataclass(frozen=True, slots=True)
class Site:
    """Guests' clients on one path. ``vms`` name the guests, where the client says whose it is.

    ``register_from``: of how many bytes on clients register temporary memory. ``pages`` gives out the first guest's
    pages, which ``shared`` makes ready to be registered, while nothing else goes on.
    """

    guests: Sequence[TeeRuntime]
    vms: Sequence[str]
    register_from: int = REGISTER_FROM
    pages: Pages | None = None
    shared: Shared = nullcontext

    def context(self, number: int = 0) -> Context:
        """A new context of a guest's client."""
        return Context(self.guests[number], vm=self.vms[number], register_from=self.register_from)


@contextmanager
def running(kit: Kit, place: str, drivers: Sequence[TeeDriver]) -> Iterator[list[TeeRuntime]]:
    """A runtime and a supplicant for each guest's driver. ``place``: a name for their files, not used before."""
    with ExitStack() as stack:
        runtimes = []
        for number, driver in enumerate(drivers):
            supplicant = stack.enter_context(closing(kit.services(f"{place}-{number}").supplicant()))
            runtimes.append(stack.enter_context(TeeRuntime(driver, supplicant, vm=FIRST)))
        yield runtimes
