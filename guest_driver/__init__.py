"""The guest's side of the virtio-tee device.

* :mod:`guest_driver.core`: the driver, a :class:`~tee.driver.TeeDriver` over any transport (sans-I/O),
* :mod:`guest_driver.transport`: what it needs of a transport,
* :mod:`guest_driver.vhost_user`: a transport that is a vhost-user frontend: a small VMM of our own, no VM needed,
* :mod:`guest_driver.virtio_pci`: a transport in a real guest, through ``uio_pci_generic``,
* :mod:`guest_driver.client`: the TEE Client API,
* ``guest_driver/linux/``: the Linux kernel driver.
"""
