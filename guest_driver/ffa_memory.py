"""Memory that a VM shares with the TEE by FF-A, so that its virtio-tee device is only told a handle."""

from __future__ import annotations

from ffa.abi.ids import PAGE_SIZE
from ffa.optee.client import Pages, find_optee, share
from ffa.optee.msg import MessageError
from ffa.roles.endpoint import Endpoint
from tee.memory import FfaShare, Memory


class FfaMemory:
    """Gives a :class:`~guest_driver.core.VirtioTeeDriver` memory that neither the device nor its host can read.

    ``endpoint`` is the VM's own, ``pages`` are the VM's memory. Each piece is whole pages, shared with OP-TEE's
    partition as long as it is given out. Raises TeeError(COMMUNICATION): there is no such partition. Not thread-safe.
    """

    def __init__(self, endpoint: Endpoint, pages: Pages) -> None:
        self._endpoint = endpoint
        self._pages = pages
        self._partition = find_optee(endpoint)
        self._lost: set[Memory] = set()
        """Released, but the TEE still has it: a device has gone without a word, say."""

    @property
    def lost(self) -> int:
        """Pieces that were released and that the TEE has not relinquished: nobody gets them before."""
        return len(self._lost)

    def allocate(self, size: int) -> Memory:
        """Zeroed and shared; ``ffa`` has its handle. Raises MemoryError."""
        self._take_back()
        memory = self._pages.allocate(size)
        try:
            memory.ffa = FfaShare(share(self._endpoint, self._partition, memory.ranges))
        except (MessageError, MemoryError) as e:
            self._pages.release(memory)
            raise MemoryError(str(e)) from None
        return memory

    def release(self, memory: Memory) -> None:
        """Takes it back, now or as soon as the TEE lets go of it."""
        self._lost.add(memory)
        self._take_back()

    def _take_back(self) -> None:
        for memory in list(self._lost):
            assert memory.ffa is not None
            if self._endpoint.reclaim(memory.ffa.handle).ok:
                self._lost.discard(memory)
                self._pages.release(memory)


def shared_size(memory: Memory) -> int:
    """Bytes of the pages that ``memory`` lies in: those that are shared."""
    return -(-memory.size // PAGE_SIZE) * PAGE_SIZE
