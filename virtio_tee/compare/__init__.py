"""``virtio-tee compare``: the same work over each path to a TEE, counted and timed.

* :mod:`virtio_tee.compare.workloads`: what is done, as a table,
* :mod:`virtio_tee.compare.paths`: over what, as a table; ``direct``, ``virtio`` and ``over_ffa`` build them,
* :mod:`virtio_tee.compare.meter`: what is counted, and who can read what,
* :mod:`virtio_tee.compare.run`: does all of it; :mod:`virtio_tee.compare.report` and ``page`` show what came of it.
"""
