"""The software TEE: a :class:`~tee.driver.TeeDriver` whose TAs are Python coroutines in this process. Sans-I/O.

* :mod:`tee.soft.ta`: how a TA is written,
* :mod:`tee.soft.driver`: :class:`SoftTee`, the driver,
* :mod:`tee.soft.scheduler`: runs the coroutines,
* :mod:`tee.soft.states`: its state machines, as tables,
* :mod:`tee.soft.loader`: fetches TAs over RPC, verifies and executes them,
* :mod:`tee.soft.storage`: TAs' objects, whose bytes lie with the caller's supplicant,
* :mod:`tee.soft.outside`: memory that supplicants lend,
* :mod:`tee.soft.limits`: how much of everything there is,
* :mod:`tee.soft.examples`: TA payloads.

It isolates TAs from *clients*, and clients from one another. It does not isolate TAs from the backend's process:
whoever may sign TAs (:mod:`tee.package`) runs code in it.
"""

from tee.soft.driver import SoftTee

__all__ = ["SoftTee"]
