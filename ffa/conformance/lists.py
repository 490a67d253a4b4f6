"""The tests of the public suites by their names, and the case of ours that covers each.

Arm's ACS (``test/common/test_database_*.c``), Hafnium's memory sharing (``memory_sharing.c``), tf-a-tests
(``tests-spm.xml``). A name is a fact; what a case does is ours. docs/ffa.md is generated from this.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from ffa.conformance.acs import XEN_LINUX

_ACS = {
    ("setup", "v1.0"): """
        ffa_features ffa_version ffa_id_get ffa_partition_info_get ffa_rx_release ffa_rxtx_map_and_unmap
        rxtx_exclusive_access mp_execution_contexts up_migrate_capable
    """,
    ("direct messaging", "v1.0"): """
        ffa_direct_message_32 ffa_direct_message_64 ffa_direct_message_error ffa_direct_message_error1
    """,
    ("indirect messaging", "v1.0"): """
        ffa_msg_send ffa_msg_send_error ffa_run
    """,
    ("memory", "v1.0"): """
        ffa_mem_share share_invalid_handle_tag share_input_error_checks share_state_machine_2
        share_state_machine_3 share_state_machine_5 share_rw_retrieve_ro share_retrieve_align_hint_check
        share_relinquish_input_checks ffa_mem_lend lend_invalid_handle_tag lend_input_error_checks
        lend_input_error_checks2 lend_retrieve_align_hint_check lend_retrieve_input_checks1
        lend_retrieve_input_checks3 lend_ro_retrieve_rw lend_rw_retrieve_ro ffa_mem_donate
        donate_input_error_checks3 donate_invalid_handle_tag donate_retrieve_input_checks2
        relinquish_state_machine_2 relinquish_state_machine_5 reclaim_input_error_checks reclaim_zero_flag
        donate_retrieve_input_checks4 donate_retrieve_input_checks6 lend_input_error_checks3
        lend_retrieve_input_checks6 lend_state_machine_2 lend_state_machine_3 lend_state_machine_5
        donate_state_machine_1 donate_state_machine_2 donate_state_machine_4 donate_retrieve_input_checks3
        donate_state_machine_5 donate_state_machine_3 lend_state_machine_6 lend_state_machine_4
        lend_state_machine_1 relinquish_state_machine_3 relinquish_state_machine_4 lend_retrieve_input_checks9
        lend_retrieve_input_checks2 share_state_machine_6 share_state_machine_4 share_state_machine_1
        share_input_error_checks1 share_multiple_retrievals lend_retrieve_input_checks5
        donate_input_error_checks lend_retrieve_input_checks4 donate_input_error_checks2
        lend_multiple_retrievals donate_retrieve_input_checks1 lend_retrieve_input_checks
        lend_input_error_checks1 donate_lower_upper_boundary_32_spsp donate_lower_upper_boundary_32_vmvm
        donate_lower_upper_boundary_64_spsp donate_lower_upper_boundary_64_vmvm
        donate_mem_access_after_donate_32_vm donate_mem_access_after_donate_32_sp
        donate_mem_access_after_donate_64_vm donate_mem_access_after_donate_64_sp
        lend_lower_upper_boundary_32_vmsp lend_lower_upper_boundary_32_spsp lend_lower_upper_boundary_32_vmvm
        lend_lower_upper_boundary_64_vmsp lend_lower_upper_boundary_64_spsp lend_lower_upper_boundary_64_vmvm
        lend_mem_access_after_lend_32_vm lend_mem_access_after_lend_32_sp lend_mem_access_after_lend_64_vm
        lend_mem_access_after_lend_64_sp lend_retrieve_mem_access_32_vmvm lend_retrieve_mem_access_32_vmsp
        lend_retrieve_mem_access_32_spsp lend_retrieve_mem_access_64_vmvm lend_retrieve_mem_access_64_vmsp
        lend_retrieve_mem_access_64_spsp relinquish_mem_unmap_check_vmsp relinquish_mem_unmap_check_vmvm
        relinquish_mem_unmap_check_spsp share_lower_upper_boundary_32_vmsp share_lower_upper_boundary_32_spsp
        share_lower_upper_boundary_32_vmvm share_lower_upper_boundary_64_vmsp share_lower_upper_boundary_64_spsp
        share_lower_upper_boundary_64_vmvm share_ro_retrieve_rw_64_vmsp share_ro_retrieve_rw_64_spsp
        share_ro_retrieve_rw_64_vmvm share_ro_retrieve_rw_32_vmsp share_ro_retrieve_rw_32_spsp
        share_ro_retrieve_rw_32_vmvm lend_retrieve_with_address_range share_retrieve_with_address_range
        lend_cache_attr lend_cache_attr1 lend_shareability_attr lend_shareability_attr1 lend_shareability_attr2
        lend_shareability_attr3 lend_device_attr lend_device_attr1 lend_retrieve_input_checks10
        lend_retrieve_input_checks7 share_sepid_multiple_borrowers share_cache_attr share_shareability_attr
        share_shareability_attr1 share_device_attr share_device_attr1 lend_sepid share_sepid donate_sepid
        share_input_error_checks2 share_retrieve_input_checks donate_retrieve_input_checks5
        donate_retrieve_align_hint_check donate_retrieve_with_address_range donate_input_error_checks1
        donate_input_error_checks4 lend_retrieve_input_checks8 lend_input_error_checks4
    """,
    ("setup", "v1.1"): """
        ffa_features_intr ffa_features_nsbit ffa_spm_id_get
    """,
    ("direct messaging", "v1.1"): """
        direct_msg_sp_to_vm ffa_direct_message_error2
    """,
    ("indirect messaging", "v1.1"): """
        ffa_msg_send2 ffa_msg_send2_sp
    """,
    ("memory", "v1.1"): """
        mem_lend_mmio mem_share_mmio mem_donate_mmio static_mapping_dma mem_security_state_ns_bit_retrieve_check
        mem_security_state_ns_bit_share_invalid mem_security_state_ns_bit_lend_invalid
        mem_security_state_ns_bit_donate_invalid ffa_mem_perm_set ffa_mem_perm_get
    """,
    ("notifications", "v1.1"): """
        notification_bitmap_create notification_bitmap_destroy notification_bind notification_unbind
        notification_get notification_set notification_info_get notification_comp vm_to_sp_notification
        vm_to_sp_notification_pcpu sp_signals_vm_sp vm_to_sp_notification_el0 vm_to_sp_notification_pcpu_el0
    """,
    ("interrupts", "v1.1"): """
        vm_to_sp_preempt ns_intr_queued s_int_sp_preempt other_secure_int1 other_secure_int6 ns_int_precedence
        sp_el1_running sp_waiting_el1 vm_to_sp_managed_exit vm_to_sp_managed_exit_1 vm_to_sp_managed_exit_2
        vm_to_sp_managed_exit_3 sp_to_sp_blocked sp_preempted_el1 s_int_ec_blocked sp_el0_blocked sp_el0_running
        sp_waiting_el0 sp_preempted_el0 vm_to_up_sp_preempt vm_to_sp_managed_exit_4 other_secure_int2
        other_secure_int7
    """,
    ("setup", "v1.2"): """
        ffa_version_negotiation ffa_msg_wait_rx_buff_rel ffa_partition_info_get_regs ffa_partition_info_get_lsp
        ffa_console_log
    """,
    ("direct messaging", "v1.2"): """
        ffa_run_direct_req ffa_direct_message2
    """,
    ("indirect messaging", "v1.2"): """
        ffa_msg_send2_uuid_check
    """,
    ("memory", "v1.2"): """
        mem_share_impdef mem_lend_impdef mem_donate_impdef share_multi_borrower_flag_check
        lend_multi_borrower_flag_check
    """,
    ("interrupts", "v1.2"): """
        sp_el1_int_mask sp_yield_spmc_mode
    """,
}
"""By area and version: the tests that no earlier version's list has."""

_HAFNIUM = {
    "memory_sharing": """
        donate_reclaim lend_reclaim share_reclaim share_retrieve_memory_type_not_specified concurrent
        share_concurrently_and_get_back cannot_share_device_memory lend_relinquish lend_fragmented_relinquish
        lend_force_fragmented_relinquish donate_relinquish give_and_get_back lend_and_get_back
        relend_after_return lend_elsewhere_after_return give_memory_and_lose_access lend_memory_and_lose_access
        donate_check_upper_bounds donate_check_lower_bounds donate_and_donate_elsewhere donate_vms
        lend_device_memory_and_lose_access lend_normal_memory_as_device_and_lose_access
        lend_normal_as_device_to_multiple lend_device_memory_between_sps_and_reclaim
        lend_device_memory_to_sp_and_reclaim mem_lend_relinquish_reclaim_normal_memory_as_device
        mem_lend_zero_memory_after_relinquish_device_memory lend_device_memory_as_normal_fails
        invalid_device_share_fails donate_twice donate_to_self lend_to_self share_to_self donate_invalid_source
        give_and_get_back_unaligned lend_invalid_source lend_relinquish_X_RW share_X share_relinquish_NX_RW
        share_relinquish_clear lend_relinquish_RW_X lend_relinquish_RO_X lend_donate share_donate lend_twice
        share_twice lend_clear share_clear ffa_lend_check_upper_bounds ffa_lend_check_lower_bounds
        ffa_validate_mbz ffa_validate_attributes ffa_memory_access_no_overflow ffa_validate_retrieve_req_mbz
        ffa_validate_impdef_equal ffa_validate_retrieve_req_attributes
        ffa_validate_retrieve_req_clear_flag_if_mem_share ffa_validate_retrieve_req_clear_flag_if_RO
        ffa_validate_retrieve_req_clear_flag_if_sender_not_clear ffa_validate_retrieve_transaction_type
        mem_share_multiple_borrowers mem_share_bypass_multiple_borrowers
        mem_share_bypass_multiple_borrowers_wrong_receiver_count
        mem_share_bypass_multiple_borrowers_single_receiver_fails mem_lend_relinquish_reclaim_multiple_borrowers
        fail_if_multi_receiver_donate fail_if_one_receiver_wrong_permissions fail_if_repeated_borrower
        fail_if_one_receiver_is_self lend_fragmented_relinquish_multi_receiver share_ffa_current_version_to_v1_1
        v1_1_service_shares_memory fail_fragmented_if_retrieve_before_sent lend_zero_memory_after_relinquish
        lend_zero_memory_after_relinquish_multiple_borrowers fail_inconsistent_page_count fail_page_overlap
        retrieve_instruction_access_not_specified invalid_from_sp cannot_zero_ro_memory_on_lend_or_donate
        cannot_zero_ro_memory_on_retrieve
    """,
    "memory_sharing_v1_1": """
        ffa_validate_memory_access_reserved_mbz share_ffa_v1_1_to_current_version
    """,
    "memory_sharing_v1_0": """
        ffa_validate_memory_access_reserved_mbz
    """,
    "ffa_ns_res_info_get": """
        get_all_sp_info get_service1_info get_lent_info get_lent_reclaim get_multiple_calls get_all_sp_info_sel0
        get_lent_info_sel0 get_lent_info_multi_perm get_all_lent_info_multi_rec get_target_lent_info_multi_rec
        get_lent_info_diff_perm get_lent_info_diff_perm_multi_rec get_shared_info get_donated_info
        get_donated_info_sel0 invalid_endpoint_id invalid_resource_type no_data_generated call_ffa_features
    """,
}
"""By fixture."""

_TF_A_TESTS = {
    "setup and discovery": """
        test_ffa_features test_ffa_features_rxtx_map test_ffa_version_equal test_ffa_version_bit31
        test_ffa_version_bigger test_ffa_version_smaller test_ffa_rxtx_map_success test_ffa_rxtx_map_fail
        test_ffa_rxtx_map_secure_memory_fail test_ffa_rxtx_map_nonsecure_memory_fail
        test_ffa_rxtx_map_memory_share_fail test_ffa_rxtx_unmap_nonexistent_vm_id_fail
        test_ffa_rxtx_unmap_success test_ffa_rxtx_unmap_fail test_ffa_rxtx_map_unmapped_success
        test_ffa_rxtx_map_forward_success test_ffa_rxtx_map_forward_consecutive_success
        test_ffa_rxtx_map_forward_unmapped_buffers_fail test_ffa_rxtx_map_forward_different_ids_fail
        test_ffa_rxtx_map_forward_memory_share_fail test_ffa_rxtx_unmap_fail_if_sp test_ffa_spm_id_get
        test_ffa_partition_info
    """,
    "SMCCC": """
        test_smccc_callee_preserved test_smccc_ext_callee_preserved
    """,
    "memory sharing": """
        test_hypervisor_share_retrieve test_hypervisor_lend_retrieve test_hypervisor_donate_retrieve
        test_hypervisor_share_retrieve_multiple_receivers test_hypervisor_lend_retrieve_multiple_receivers
        test_hypervisor_share_retrieve_fragmented test_hypervisor_lend_retrieve_fragmented test_mem_lend_sp
        test_mem_share_to_sp_clear_memory test_mem_share_sp test_mem_donate_sp test_req_mem_share_sp_to_sp
        test_req_mem_lend_sp_to_sp test_req_mem_donate_sp_to_sp test_req_ns_mem_share_sp_to_sp
        test_req_mem_share_sp_to_vm test_req_mem_lend_sp_to_vm test_share_forbidden_ranges
        test_consecutive_donate test_ffa_memory_retrieve_request_from_vm
    """,
}
"""By suite."""


@dataclass(frozen=True, slots=True)
class PublicList:
    """A list of a public suite."""

    suite: str
    name: str
    tests: tuple[str, ...]

    def case_of(self, test: str) -> str:
        """The id of our case for one of the tests."""
        return _CASES.get((self.name, test), test)


_CASES = {
    ("ffa_ns_res_info_get", test): f"ffa_ns_res_info_get_{test}" for test in _HAFNIUM["ffa_ns_res_info_get"].split()
} | {
    (f"memory_sharing_{version}", "ffa_validate_memory_access_reserved_mbz"): (
        f"ffa_validate_memory_access_reserved_mbz_{version}"
    )
    for version in ("v1_0", "v1_1")
}
"""Cases that are not called as their test: two tests of Hafnium's have one name, and others would say too little."""


def _lists() -> Iterator[PublicList]:
    yield PublicList("Arm ACS", "v1.2, Xen and Linux", XEN_LINUX)
    for (area, version), tests in _ACS.items():
        more = "" if version == "v1.0" else ", new"
        yield PublicList("Arm ACS", f"{version}{more}: {area}", tuple(tests.split()))
    for fixture, tests in _HAFNIUM.items():
        yield PublicList("Hafnium", fixture, tuple(tests.split()))
    for suite, tests in _TF_A_TESTS.items():
        yield PublicList("tf-a-tests", suite, tuple(tests.split()))


LISTS = tuple(_lists())
"""All of them."""
