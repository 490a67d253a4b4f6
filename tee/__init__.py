"""What a TEE call is, whoever carries it.

This package is sans-I/O (but for ``tee.io``): it knows neither virtio nor FF-A nor Linux. Everything above it (the
virtio device, the FF-A partition, the TEE Client API, the supplicant) speaks in the terms defined here:

* :mod:`tee.results`: result codes and their origins,
* :mod:`tee.params`: values, memory references and their directions,
* :mod:`tee.memory`: memory that two sides see,
* :mod:`tee.calls`: the calls that one can start,
* :mod:`tee.rpc`: the calls that a TEE makes to the outside,
* :mod:`tee.driver`: the :class:`~tee.driver.TeeDriver` contract that joins them.
"""
