"""Tests of the public suites that need what no model of calls has."""

from __future__ import annotations

from ffa.conformance.registry import INTERRUPTS, MEMORY, register

_WHY = {
    "physical interrupts, and what runs when one comes": (
        INTERRUPTS,
        """
        vm_to_sp_preempt ns_intr_queued s_int_sp_preempt other_secure_int1 other_secure_int6 ns_int_precedence
        sp_el1_running sp_waiting_el1 vm_to_sp_managed_exit vm_to_sp_managed_exit_1 vm_to_sp_managed_exit_2
        vm_to_sp_managed_exit_3 sp_to_sp_blocked sp_preempted_el1 s_int_ec_blocked sp_el0_blocked sp_el0_running
        sp_waiting_el0 sp_preempted_el0 vm_to_up_sp_preempt vm_to_sp_managed_exit_4 other_secure_int2
        other_secure_int7 sp_el1_int_mask sp_yield_spmc_mode
        """,
    ),
    "transactions of a device, which DMA makes": (
        MEMORY,
        "static_mapping_dma lend_sepid share_sepid donate_sepid share_sepid_multiple_borrowers",
    ),
}

for _why, (_suite, _ids) in _WHY.items():
    for _id in _ids.split():
        register(_suite, _id, None, _why)
