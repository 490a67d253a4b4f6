"""The host's one supplicant, for many backends: it owns ``/dev/teepriv0`` and finds out who is to answer an RPC.

:mod:`~host_backend.broker.flights` knows which calls are under way, :mod:`~host_backend.broker.routes` who may be asked
in which order, :mod:`~host_backend.broker.handles` who has given a socket's handle; :mod:`~host_backend.broker.params`
carries memory over. :mod:`~host_backend.broker.broker` asks, :mod:`~host_backend.broker.connection` is an attached
backend, :mod:`~host_backend.broker.server` lets them attach.
"""
