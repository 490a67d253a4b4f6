"""``virtio-tee bench``: latency and throughput beside a C peer.

``command`` is the command, ``plan`` says what is measured and what must come out, ``peers`` starts the backends,
``driver.c`` drives them, ``direct`` measures the software TEE without a device.
"""
