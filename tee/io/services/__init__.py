"""What a supplicant serves, one service a module.

=====================================  =========================================================================
:mod:`tee.io.services.ta_loader`       LOAD_TA: TA files by UUID
:mod:`tee.io.services.shared_memory`   SHM_ALLOC, SHM_FREE
:mod:`tee.io.services.files`           FS: OP-TEE's REE file system; :mod:`tee.io.services.file_store` is its folder
:mod:`tee.io.services.sockets`         SOCKET: TCP and UDP; :mod:`tee.io.services.destinations` says where to
:mod:`tee.io.services.plugins`         PLUGIN: callables by UUID
:mod:`tee.io.services.refused`         what is refused, and what the log says about it
=====================================  =========================================================================

A service takes the parameters of its command and gives those of the answer; layouts are those that OP-TEE's
tee-supplicant has. What it raises becomes the result (see :mod:`tee.io.services.base`).
"""
