"""A real OP-TEE in a virtual machine, and a virtual machine in that one, which has virtio-tee's device."""
