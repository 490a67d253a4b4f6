"""The backend: a guest's requests on one side, a :class:`~tee.driver.TeeDriver` on the other.

* :mod:`host_backend.epoch`: one life of a guest's state (contexts, sessions, regions, requests, RPCs): the bridge,
* :mod:`host_backend.rpcs`: RPCs of one epoch on their way to the guest and back,
* :mod:`host_backend.guest`: a guest over its resets, pauses and restarts; what epochs need of the rings,
* :mod:`host_backend.router`: one TEE for many guests; who answers which RPC,
* :mod:`host_backend.device`: the guest as a vhost-user device,
* :mod:`host_backend.trace`: what is recorded of all that, and a trace of it; :mod:`host_backend.metrics` counts it,
  :mod:`host_backend.exporter` tells the counts,
* :mod:`host_backend.serve`: the process around it.
"""
