"""Who takes part in FF-A: endpoints, the hypervisor that relays, the SPMC below it, and the memory they share.

All of them have one interface, ``call(caller, frame, vcpu) -> Frame``: a :class:`~ffa.roles.hypervisor.Hypervisor` and
an :class:`~ffa.roles.spmc.Spmc` answer it; an :class:`~ffa.roles.endpoint.Endpoint` (a VM, a partition) makes such
calls, and answers ``receive``. A hypervisor stands on an SPMC or alone; an SPMC may have the operating system (endpoint
0) directly above it.
"""
