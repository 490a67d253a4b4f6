"""What the kernel's refusal of a call means to its client: error numbers of the TEE ioctls as TEE results.

Source: Linux drivers/tee/tee_core.c, tee_shm.c and drivers/tee/optee, and what OP-TEE's client library makes of them.
"""

from __future__ import annotations

import errno

from tee.results import Result

RESULTS: dict[int, Result] = {
    errno.EINVAL: Result.BAD_PARAMETERS,
    errno.E2BIG: Result.BAD_PARAMETERS,
    errno.EFAULT: Result.BAD_PARAMETERS,
    errno.ENOENT: Result.ITEM_NOT_FOUND,
    errno.EACCES: Result.ACCESS_DENIED,
    errno.EPERM: Result.ACCESS_DENIED,
    errno.ENOMEM: Result.OUT_OF_MEMORY,
    errno.ENOSPC: Result.OUT_OF_MEMORY,
    errno.EMFILE: Result.OUT_OF_MEMORY,
    errno.ENFILE: Result.OUT_OF_MEMORY,
    errno.EBUSY: Result.BUSY,
    errno.EAGAIN: Result.BUSY,
    errno.EOPNOTSUPP: Result.NOT_SUPPORTED,
    errno.ENOTTY: Result.NOT_SUPPORTED,
    errno.ENOSYS: Result.NOT_SUPPORTED,
    errno.ENODEV: Result.TARGET_DEAD,
    errno.ENXIO: Result.TARGET_DEAD,
    errno.ESTALE: Result.TARGET_DEAD,
}
"""Refusals before the TEE has run anything. After any other error (EINTR, EIO) it may have."""

LOST = frozenset({errno.ENODEV, errno.ENXIO, errno.ESTALE})
"""The TEE has gone, or has forgotten all that was opened."""


def result_of(error: OSError) -> tuple[Result, bool]:
    """The result of a call that the kernel has ended with ``error``, and whether the TEE may have run it."""
    found = RESULTS.get(error.errno or 0)
    return (found, False) if found is not None else (Result.COMMUNICATION, True)
