"""FF-A for virtual machines: the other way to a TEE, without the host in between.

``ffa.abi`` is what travels in registers and buffers; ``ffa.roles`` who takes part: endpoints, hypervisor, SPMC, and the
machine's memory; ``ffa.fuzz`` calls them at random and keeps account of every page; ``ffa.replay`` holds recorded
sessions of real firmware against them.
"""
