"""OP-TEE over FF-A: the partition that serves OPTEE_FFA_* on any TEE, and the client's driver.

``ffa.optee.msg`` is what travels: registers, ``optee_msg_arg`` and its parameters; ``ffa.optee.partition`` the secure
side, ``ffa.optee.client`` a :class:`~tee.driver.TeeDriver` for a VM's own clients.
"""
