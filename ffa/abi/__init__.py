"""The FF-A ABI: function ids, error codes, register frames and the layouts of everything that travels in buffers.

Sources: the Arm Firmware Framework for A-profile (DEN0077) 1.0 to 1.2, as Hafnium, OP-TEE, Xen and Linux implement it.
All integers are little-endian; a page is always 4 KiB. Parsers are total: any bytes give a value or
:class:`ffa.abi.ids.FfaError`, which carries the FF-A error code to answer with.
"""
