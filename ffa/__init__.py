"""FF-A for virtual machines: the other way to a TEE, without the host in between.

The room of the FF-A ABI, its memory transactions, the roles of hypervisor and SPMC, and OP-TEE over FF-A. Nothing lives
here yet; ``docs/specification.md`` says how the device takes memory that was shared by FF-A (REGISTER_FFA).
"""
