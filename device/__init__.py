"""The virtio-tee device (virtio ID 46) as both sides see it: sans-I/O, shared by the backend and the guest driver.

* :mod:`device.wire`: every layout of ``docs/specification.md``, as construct definitions (the single definition),
* :mod:`device.messages`: the tables of requests, responses and events over those layouts, and their codecs,
* :mod:`device.params`: parameter arrays between the wire and :mod:`tee.params`,
* :mod:`device.config`: the config space and the limits it announces,
* :mod:`device.machines`: the state machines of requests and RPCs, as tables,
* :mod:`device.ids`: identifiers that are never reused while anybody may still mean the old one.
"""
