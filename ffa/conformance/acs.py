"""What the public documents of Arm's ACS say of its tests: the list for Xen and Linux, and the specification sections.

The sections are those of the version that ACS's own scenario table was written for; a test may be in several.
"""

from __future__ import annotations

XEN_LINUX = (
    "ffa_features",
    "ffa_version",
    "ffa_id_get",
    "ffa_partition_info_get",
    "ffa_rx_release",
    "ffa_rxtx_map_and_unmap",
    "rxtx_exclusive_access",
    "ffa_direct_message_32",
    "ffa_direct_message_64",
    "ffa_direct_message2",
    "share_invalid_handle_tag",
    "share_state_machine_5",
    "share_rw_retrieve_ro",
    "share_retrieve_align_hint_check",
    "share_relinquish_input_checks",
    "share_state_machine_2",
    "share_state_machine_3",
    "share_multiple_retrievals",
    "ffa_mem_perm_set",
    "ffa_mem_perm_get",
    "ffa_mem_share",
    "share_input_error_checks",
    "share_input_error_checks1",
    "mem_security_state_ns_bit_retrieve_check",
    "mem_security_state_ns_bit_share_invalid",
    "mem_security_state_ns_bit_lend_invalid",
    "mem_security_state_ns_bit_donate_invalid",
    "notification_bind",
    "notification_unbind",
    "notification_get",
    "notification_set",
    "notification_info_get",
    "vm_to_sp_notification",
    "vm_to_sp_notification_pcpu",
    "sp_signals_vm",
)
"""The tests of the v1.2 Xen and Linux databases, which are the same."""

_TESTS = {
    "1.11.3": """
        mem_donate_impdef mem_lend_impdef mem_share_impdef
    """,
    "2.9": """
        mp_execution_contexts
    """,
    "2.9, 4.4.1": """
        up_migrate_capable
    """,
    "2.10, 5.12.3": """
        lend_input_error_checks
    """,
    "2.10, 5.12.3, 5.11.2, 5.11.3": """
        donate_input_error_checks
    """,
    "2.10, 5.12.3, 5.12.4.1, 5.11.3": """
        share_input_error_checks
    """,
    "3.2": """
        ffa_partition_info_get_lsp
    """,
    "4.2.1": """
        static_mapping_dma
    """,
    "4.2.2.3, 8.4, 8.5": """
        ffa_rxtx_map_and_unmap
    """,
    "4.2, 11.6": """
        share_relinquish_input_checks
    """,
    "4.3.1": """
        ffa_direct_message_error1
    """,
    "4.4.1": """
        ffa_msg_send_error
    """,
    "5.6.1": """
        donate_state_machine_1 donate_state_machine_2 donate_state_machine_3 donate_state_machine_4
        donate_state_machine_5
    """,
    "5.7.1": """
        lend_state_machine_1 lend_state_machine_2 lend_state_machine_3 lend_state_machine_4 lend_state_machine_5
        lend_state_machine_6
    """,
    "5.8.1": """
        share_state_machine_1 share_state_machine_2 share_state_machine_3 share_state_machine_5
    """,
    "5.9.1": """
        relinquish_state_machine_5
    """,
    "5.9.1, 5.12.4.1, 11.6": """
        relinquish_state_machine_3
    """,
    "5.9.1, 11.6": """
        relinquish_state_machine_2 relinquish_state_machine_4
    """,
    "5.11.2": """
        share_ro_retrieve_rw_32_spsp share_ro_retrieve_rw_32_vmsp share_ro_retrieve_rw_32_vmvm
        share_ro_retrieve_rw_64_spsp share_ro_retrieve_rw_64_vmsp share_ro_retrieve_rw_64_vmvm share_rw_retrieve_ro
    """,
    "5.11.3": """
        donate_retrieve_input_checks3 lend_input_error_checks3 lend_retrieve_input_checks4
        lend_retrieve_input_checks5
    """,
    "5.11.3, 5.11.4, 5.12.4.1, 11.4": """
        share_retrieve_input_checks
    """,
    "5.11.3, 5.11.4, 11.2": """
        lend_input_error_checks1
    """,
    "5.11.4": """
        lend_cache_attr lend_cache_attr1 lend_shareability_attr lend_shareability_attr1 lend_shareability_attr2
        lend_shareability_attr3 share_cache_attr share_shareability_attr share_shareability_attr1
    """,
    "5.12.1, 5.12.2": """
        donate_invalid_handle_tag lend_invalid_handle_tag share_invalid_handle_tag
    """,
    "5.12.3": """
        lend_input_error_checks2
    """,
    "5.12.3.3": """
        lend_retrieve_input_checks7
    """,
    "5.12.3, 5.12.4.1": """
        donate_retrieve_with_address_range lend_retrieve_with_address_range share_retrieve_with_address_range
    """,
    "5.12.3, 11.3": """
        share_input_error_checks1
    """,
    "5.12.4.1": """
        donate_input_error_checks4 donate_retrieve_align_hint_check donate_retrieve_input_checks1
        donate_retrieve_input_checks2 donate_retrieve_input_checks5 lend_input_error_checks4
        lend_retrieve_align_hint_check lend_retrieve_input_checks1 lend_retrieve_input_checks2
        lend_retrieve_input_checks3 lend_retrieve_input_checks8 share_retrieve_align_hint_check
    """,
    "5.12.4.1, 11.4": """
        lend_multiple_retrievals
    """,
    "5.12.4.1, 11.6": """
        lend_retrieve_input_checks
    """,
    "5.12.4.1, 11.6, 11.2": """
        ffa_mem_lend
    """,
    "6.4.2": """
        ffa_direct_message_error2 sp_yield_spmc_mode
    """,
    "6.11.2": """
        lend_ro_retrieve_rw lend_rw_retrieve_ro
    """,
    "7.3": """
        ffa_msg_send2_uuid_check
    """,
    "8.1.2": """
        ffa_version
    """,
    "8.2": """
        ffa_features sp_to_sp_blocked
    """,
    "8.2.1": """
        sp_el1_running sp_waiting_el1
    """,
    "8.3": """
        ffa_rx_release
    """,
    "8.3.1.1": """
        vm_to_up_sp_preempt
    """,
    "8.3.1.2": """
        vm_to_sp_managed_exit
    """,
    "8.3.1.2.1": """
        vm_to_sp_managed_exit_1 vm_to_sp_managed_exit_2 vm_to_sp_managed_exit_3 vm_to_sp_managed_exit_4
    """,
    "8.3.1.3": """
        ns_intr_queued
    """,
    "8.3.1.4": """
        ns_int_precedence
    """,
    "8.3.2.1": """
        s_int_ec_blocked s_int_sp_preempt
    """,
    "8.4": """
        rxtx_exclusive_access vm_to_sp_preempt
    """,
    "8.6, 3.2, 3.3, 13.8": """
        ffa_partition_info_get
    """,
    "8.7": """
        ffa_id_get
    """,
    "9.2.3": """
        ffa_run_direct_req sp_el1_int_mask
    """,
    "9.3": """
        ffa_run
    """,
    "9.5.1.1": """
        sp_signals_vm_sp
    """,
    "9.7": """
        ffa_features_intr
    """,
    "10.1, 10.3, 9.1, 8.4, 8.5, 10.1.2.2, 9.2": """
        ffa_msg_send
    """,
    "10.2.1.2": """
        ffa_direct_message_error
    """,
    "10.2, 10.3, 4.5.2": """
        ffa_direct_message_32 ffa_direct_message_64
    """,
    "10.10.4.1": """
        ffa_features_nsbit mem_security_state_ns_bit_donate_invalid mem_security_state_ns_bit_lend_invalid
        mem_security_state_ns_bit_retrieve_check mem_security_state_ns_bit_share_invalid
    """,
    "11.1": """
        donate_input_error_checks2 donate_input_error_checks3 donate_sepid ffa_mem_donate
    """,
    "11.1.1.2": """
        donate_mem_access_after_donate_32_sp donate_mem_access_after_donate_32_vm
        donate_mem_access_after_donate_64_sp donate_mem_access_after_donate_64_vm
    """,
    "11.2": """
        lend_sepid
    """,
    "11.2.12": """
        lend_mem_access_after_lend_32_sp lend_mem_access_after_lend_32_vm lend_mem_access_after_lend_64_sp
        lend_mem_access_after_lend_64_vm
    """,
    "11.3": """
        share_sepid
    """,
    "11.3, 5.8.1": """
        share_state_machine_4
    """,
    "11.3, 5.11.3, 10.10.4.1": """
        ffa_mem_share
    """,
    "11.4": """
        donate_retrieve_input_checks4 lend_retrieve_input_checks6 share_multiple_retrievals
    """,
    "11.4.1.2": """
        donate_retrieve_input_checks6 lend_retrieve_input_checks10 lend_retrieve_input_checks9
        lend_retrieve_mem_access_32_spsp lend_retrieve_mem_access_32_vmsp lend_retrieve_mem_access_32_vmvm
        lend_retrieve_mem_access_64_spsp lend_retrieve_mem_access_64_vmsp lend_retrieve_mem_access_64_vmvm
    """,
    "11.6": """
        relinquish_mem_unmap_check_spsp relinquish_mem_unmap_check_vmsp relinquish_mem_unmap_check_vmvm
    """,
    "11.7": """
        reclaim_input_error_checks reclaim_zero_flag
    """,
    "11.11.4.2": """
        lend_multi_borrower_flag_check share_multi_borrower_flag_check
    """,
    "13.2.2": """
        ffa_version_negotiation
    """,
    "13.9": """
        ffa_spm_id_get
    """,
    "13.9.1": """
        ffa_partition_info_get_regs
    """,
    "13.12": """
        ffa_console_log
    """,
    "14.1": """
        ffa_msg_wait_rx_buff_rel
    """,
    "15.1": """
        ffa_msg_send2 ffa_msg_send2_sp
    """,
    "15.2": """
        direct_msg_sp_to_vm
    """,
    "15.4/5": """
        ffa_direct_message2
    """,
    "17.1": """
        notification_bitmap_create
    """,
    "17.2": """
        notification_bitmap_destroy
    """,
    "17.3": """
        notification_bind
    """,
    "17.4": """
        notification_unbind
    """,
    "17.5": """
        notification_set
    """,
    "17.5, 9.5, 9.4": """
        vm_to_sp_notification_pcpu vm_to_sp_notification_pcpu_el0
    """,
    "17.5, 17.7, 9.5, 9.4": """
        vm_to_sp_notification vm_to_sp_notification_el0
    """,
    "17.6": """
        notification_get
    """,
    "17.7": """
        notification_info_get
    """,
}

SECTIONS = {test: section for section, tests in _TESTS.items() for test in tests.split()}
"""Test → sections, where the tables give any."""
