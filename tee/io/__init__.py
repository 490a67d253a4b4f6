"""The parts of ``tee`` that do I/O.

* :mod:`tee.io.supplicant`: the services that a TEE asks of the normal world, over any driver,
* :mod:`tee.io.services`: those services, one a module: TAs, shared memory, files, sockets, plug-ins,
* :mod:`tee.io.supplicant_process`: the same in a process of its own, which may die and be started again,
* :mod:`tee.io.linux`: the system calls of a Linux TEE device; :mod:`tee.io.linux_supplicant`: a supplicant for one,
* :mod:`tee.io.runtime`: a thread that owns a :class:`~tee.driver.TeeDriver`, and a synchronous API to it.
"""
