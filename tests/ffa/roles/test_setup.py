"""Setup and discovery: versions, features, ids, partition information, buffers, the console."""

from __future__ import annotations

from uuid import UUID

import pytest

from ffa.abi import messages
from ffa.abi.frame import Frame
from ffa.abi.ids import BY_FID, VERSION_1_0, VERSION_1_1, VERSION_1_2, Call, Error, fid
from ffa.roles.endpoint import Endpoint
from ffa.roles.hypervisor import Hypervisor
from ffa.roles.machine import POISON, Machine
from ffa.roles.profile import OPTEE_4_10
from ffa.roles.spmc import Spmc

from .conftest import Bench

NOT_SUPPORTED = 0xFFFFFFFF


def fresh() -> Endpoint:
    """A VM that has made no call."""
    machine = Machine()
    vm = Endpoint(1, machine, contexts=2)
    Hypervisor(machine).add(vm)
    machine.add(1, 0x4000_0000, 64)
    return vm


@pytest.mark.parametrize(
    ("asked", "answer"),
    [
        (0x10000, VERSION_1_2),
        (0x10001, VERSION_1_2),
        (0x10002, VERSION_1_2),
        (0x10009, VERSION_1_2),  # newer by its minor version: comes down to ours
        (0x20000, NOT_SUPPORTED),
        (0x00009, NOT_SUPPORTED),
        (0x8001_0000, NOT_SUPPORTED),  # bit 31 must be zero
    ],
)
def test_version(asked: int, answer: int) -> None:
    assert fresh().call(Call.VERSION, asked) == Frame(answer)


def test_a_version_stays_after_other_calls() -> None:
    vm = fresh()
    assert vm.call(Call.VERSION, VERSION_1_0)[0] == VERSION_1_2
    assert vm.call(Call.VERSION, VERSION_1_1)[0] == VERSION_1_2
    assert vm.call(Call.ID_GET).ok
    assert vm.call(Call.VERSION, VERSION_1_1)[0] == VERSION_1_2
    assert vm.call(Call.VERSION, VERSION_1_2)[0] == NOT_SUPPORTED
    assert vm.call(Call.SPM_ID_GET).error is Error.NOT_SUPPORTED  # none below


def test_each_caller_has_its_own_version(bench: Bench) -> None:
    sizes = {id: bench.vms[id].call(Call.PARTITION_INFO_GET)[3] for id in (1, 2, 3)}
    assert sizes == {1: 24, 2: 24, 3: 0}  # 1.0 has no size in its answer
    assert bench.vms[3].call(Call.MSG_SEND2).error is Error.NOT_SUPPORTED
    assert bench.vms[1].call(Call.MSG_POLL).error is Error.NOT_SUPPORTED


def test_features_tell_of_what_works(bench: Bench) -> None:
    """Whatever FEATURES denies is NOT_SUPPORTED, and what it announces is not, for every caller and function."""
    denied = {Call.MEM_PERM_GET, Call.MEM_PERM_SET}  # to partitions that are not at S-EL0, as Hafnium does
    only_answers = {Call.ERROR, Call.SUCCESS, Call.INTERRUPT, Call.MEM_RETRIEVE_RESP}
    for endpoint in bench.all.values():
        for number, (function, _) in BY_FID.items():
            told = endpoint.call(Call.FEATURES, number, 2)
            assert told.ok or told.error is Error.NOT_SUPPORTED
            called = endpoint.send(Frame(number, 0xFFFF_FFFF, 0xFFFF_FFFF, 0xFFFF_FFFF))
            works = called.error is not Error.NOT_SUPPORTED and called[0] != NOT_SUPPORTED
            if function.call not in only_answers | {Call.VERSION, Call.FEATURES} | (set() if endpoint.el0 else denied):
                assert works is told.ok, (endpoint.id, function, called)


def test_features_of_interrupts_and_buffers(bench: Bench) -> None:
    vm = bench.vms[1]
    assert vm.call(Call.FEATURES, 2)[2] == 8
    assert vm.call(Call.FEATURES, 1)[2] == 5
    assert vm.call(Call.FEATURES, 3).error is Error.NOT_SUPPORTED
    assert vm.call(Call.FEATURES, 2, 1).error is Error.NOT_SUPPORTED
    assert vm.call(Call.FEATURES, fid(Call.RXTX_MAP, True))[2] == 63 << 16
    assert bench.vms[2].call(Call.FEATURES, fid(Call.RXTX_MAP))[2] == 0  # 1.1 has no maximum there
    sp = bench.sps[0x8001]
    assert sp.call(Call.FEATURES, fid(Call.MEM_RETRIEVE_REQ)).error is Error.NOT_SUPPORTED  # must use the NS bit
    assert sp.call(Call.FEATURES, fid(Call.MEM_RETRIEVE_REQ), 2)[2:4] == (3, 0)


def test_ids(bench: Bench) -> None:
    for id, endpoint in bench.all.items():
        assert endpoint.call(Call.ID_GET) == Frame.success(id)
    assert bench.vms[1].call(Call.SPM_ID_GET) == Frame.success(0x8000)
    assert bench.sps[0x8001].call(Call.SPM_ID_GET) == Frame.success(0x8000)


def test_unknown_callers_and_functions() -> None:
    machine = Machine()
    hypervisor = Hypervisor(machine)
    assert hypervisor.call(7, Frame.of(Call.ID_GET)).error is Error.NOT_SUPPORTED
    vm = Endpoint(1, machine)
    hypervisor.add(vm)
    assert vm.send(Frame(0x84000020)).error is Error.NOT_SUPPORTED
    assert vm.send(Frame(0xC4000000 | Call.ID_GET)).error is Error.NOT_SUPPORTED  # no such form


def test_upper_halves_of_smc32_registers_are_ignored(bench: Bench) -> None:
    assert bench.vms[1].send(Frame(0xFFFF_FFFF_0000_0000 | fid(Call.ID_GET), 0)).ok
    assert bench.vms[1].send(Frame(fid(Call.FEATURES), 0xABCD_0000_0000_0002)).ok


# -- partition information


def test_partition_information(bench: Bench) -> None:
    vm = bench.vms[1]
    assert vm.call(Call.PARTITION_INFO_GET, 0, 0, 0, 0, 1)[2] == 5
    answer = vm.call(Call.PARTITION_INFO_GET)
    infos = messages.parse_infos(vm.got(answer[2] * 24), answer[2], VERSION_1_2)
    assert {i.id: i.uuid for i in infos} == {id: UUID(int=id) for id in (1, 2, 3, 0x8001, 0x8002)}
    assert vm.call(Call.PARTITION_INFO_GET).error is Error.BUSY  # RX is not released
    assert vm.call(Call.RX_RELEASE).ok
    one = vm.call(Call.PARTITION_INFO_GET, *messages.uuid_to_words(UUID(int=0x8002)))
    (found,) = messages.parse_infos(vm.got(24), one[2], VERSION_1_2)
    assert (found.id, found.uuid) == (0x8002, messages.NIL)  # who asks for a UUID knows it
    assert vm.call(Call.PARTITION_INFO_GET, 9).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.PARTITION_INFO_GET, 0, 0, 0, 0, 2).error is Error.INVALID_PARAMETERS


def test_partition_information_in_registers(bench: Bench) -> None:
    vm = bench.vms[1]
    answer = vm.call(Call.PARTITION_INFO_GET_REGS)
    infos, last = messages.infos_from_registers(answer, 0)
    assert ([i.id for i in infos], last) == ([1, 2, 3, 0x8001, 0x8002], 4)
    assert vm.call(Call.PARTITION_INFO_GET_REGS, 0, 0, 5).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.PARTITION_INFO_GET_REGS, 0, 0, 1 << 16).error is Error.RETRY
    assert bench.vms[2].call(Call.PARTITION_INFO_GET_REGS).error is Error.NOT_SUPPORTED


def test_partition_information_needs_buffers() -> None:
    vm = fresh()
    assert vm.call(Call.PARTITION_INFO_GET).error is Error.BUSY
    assert vm.call(Call.PARTITION_INFO_GET, 0, 0, 0, 0, 1)[2] == 1


# -- buffers


@pytest.mark.parametrize(
    ("tx", "rx", "pages", "code"),
    [
        (0x4000_0100, 0x4000_1000, 1, Error.INVALID_PARAMETERS),  # not page-aligned
        (0x4000_0000, 0x4000_1800, 1, Error.INVALID_PARAMETERS),
        (0x4000_0000, 0x4000_0000, 1, Error.INVALID_PARAMETERS),  # the same
        (0x4000_0000, 0x4000_1000, 2, Error.INVALID_PARAMETERS),  # overlapping
        (0x4000_0000, 0x4000_1000, 0, Error.INVALID_PARAMETERS),
        (0x4000_0000, 0x4020_0000, 64, Error.INVALID_PARAMETERS),  # more than the field holds
        (0x4000_0000, 0x4003_F000, 2, Error.INVALID_PARAMETERS),  # beyond its memory
        (0x4000_0000, 0x9000_0000, 1, Error.INVALID_PARAMETERS),  # no memory
        (0x4000_0000, (1 << 64) - 0x1000, 1, Error.INVALID_PARAMETERS),
    ],
)
def test_buffers_that_cannot_be_mapped(tx: int, rx: int, pages: int, code: Error) -> None:
    vm = fresh()
    assert vm.call(Call.RXTX_MAP, tx, rx, pages, smc64=True).error is code
    assert vm.map_buffers(0x4000_0000, 0x4000_1000).ok  # nothing was changed


def test_buffers_map_once_and_unmap_once() -> None:
    vm = fresh()
    assert vm.call(Call.RXTX_UNMAP).error is Error.INVALID_PARAMETERS
    assert vm.map_buffers(0x4000_0000, 0x4000_1000).ok
    assert vm.call(Call.RXTX_MAP, 0x4000_2000, 0x4000_3000, 1, smc64=True).error is Error.DENIED
    assert vm.call(Call.RXTX_UNMAP, 1 << 16).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.RXTX_UNMAP).ok
    assert vm.call(Call.RXTX_MAP, 0x4000_2000, 0x4000_3000, 1, smc64=True).ok


def test_buffers_of_another_are_not_mapped(bench: Bench) -> None:
    vm = bench.vms[1]
    assert vm.call(Call.RXTX_UNMAP).ok
    other = bench.memory(2) + 0x10_0000
    assert vm.call(Call.RXTX_MAP, other, other + 0x1000, 1, smc64=True).error is Error.INVALID_PARAMETERS
    secure = bench.memory(0x8001) + 0x10_0000
    assert vm.call(Call.RXTX_MAP, secure, secure + 0x1000, 1, smc64=True).error is Error.INVALID_PARAMETERS


def test_rx_is_released_by_who_has_it(bench: Bench) -> None:
    vm = bench.vms[1]
    assert vm.call(Call.RX_RELEASE).error is Error.DENIED
    vm.call(Call.PARTITION_INFO_GET)
    assert vm.call(Call.RX_RELEASE, 2).error is Error.INVALID_PARAMETERS
    assert vm.call(Call.RX_RELEASE).ok
    assert vm.call(Call.RX_RELEASE).error is Error.DENIED


def test_released_buffers_are_poisoned(bench: Bench) -> None:
    vm = bench.vms[1]
    answer = vm.call(Call.PARTITION_INFO_GET)
    size = answer[2] * 24
    assert vm.got(size) != bytes([POISON]) * size
    vm.call(Call.RX_RELEASE)
    assert vm.got(size) == bytes([POISON]) * size


def test_unmapped_rx_is_nobodys(bench: Bench) -> None:
    vm = bench.vms[1]
    vm.call(Call.PARTITION_INFO_GET)
    assert vm.call(Call.RXTX_UNMAP).ok
    assert vm.call(Call.RX_RELEASE).error is Error.DENIED
    base = bench.memory(1)
    assert vm.map_buffers(base, base + 0x1000).ok
    assert vm.call(Call.PARTITION_INFO_GET).ok


def test_the_hypervisor_acquires_rx_from_the_spmc(bench: Bench) -> None:
    port = bench.hypervisor.port
    assert port.call(Call.RX_ACQUIRE, 1).ok
    assert port.call(Call.RX_ACQUIRE, 1).error is Error.DENIED
    assert bench.vms[1].call(Call.PARTITION_INFO_GET).error is Error.BUSY
    assert port.call(Call.RX_RELEASE, 1).ok
    assert port.call(Call.RX_ACQUIRE, 9).error is Error.INVALID_PARAMETERS
    assert bench.vms[1].call(Call.RX_ACQUIRE, 1).error is Error.NOT_SUPPORTED
    assert bench.vms[1].call(Call.PARTITION_INFO_GET).ok


# -- the rest


def test_console(bench: Bench) -> None:
    vm = bench.vms[1]
    assert vm.call(Call.CONSOLE_LOG, 6, 0x6C6C6568, 0x216F).ok
    words = [int.from_bytes(bytes([65 + n]) * 8, "little") for n in range(16)]
    assert vm.call(Call.CONSOLE_LOG, 128, *words, smc64=True).ok
    assert list(bench.hypervisor.console) == [(1, "hello!"), (1, "".join(chr(65 + n) * 8 for n in range(16)))]
    for count, smc64 in ((0, False), (25, False), (129, True)):
        assert vm.call(Call.CONSOLE_LOG, count, smc64=smc64).error is Error.INVALID_PARAMETERS


def test_permissions_of_s_el0_partitions(bench: Bench) -> None:
    el0, el1, vm = bench.sps[0x8002], bench.sps[0x8001], bench.vms[1]
    page = bench.memory(0x8002) + 0x10_0000
    assert el0.call(Call.MEM_PERM_GET, page)[2] == 5
    assert el0.call(Call.MEM_PERM_SET, page, 2, 7).ok
    assert [el0.call(Call.MEM_PERM_GET, page + n * 0x1000)[2] for n in range(3)] == [7, 7, 5]
    for arguments in ((page + 1, 1, 7), (page, 0, 7), (page, 1, 1), (bench.memory(1), 1, 7), (0x10, 1, 7)):
        assert el0.call(Call.MEM_PERM_SET, *arguments).error is Error.INVALID_PARAMETERS
    assert el1.call(Call.MEM_PERM_GET, bench.memory(0x8001)).error is Error.DENIED
    assert vm.call(Call.MEM_PERM_GET, bench.memory(1)).error is Error.NOT_SUPPORTED
    assert vm.call(Call.MEM_PERM_SET, bench.memory(1), 1, 7).error is Error.NOT_SUPPORTED


def test_op_tee_4_10_leaves_out_what_it_left_out_when_recorded() -> None:
    machine = Machine()
    host = Endpoint(0, machine)
    Spmc(machine, OPTEE_4_10).attach(host)
    for call, smc64, there in (
        (Call.RXTX_MAP, True, True),
        (Call.MEM_LEND, True, False),
        (Call.MEM_SHARE, True, True),
        (Call.MSG_SEND_DIRECT_REQ2, True, False),
        (Call.MSG_SEND_DIRECT_RESP2, True, False),
        (Call.NOTIFICATION_BITMAP_CREATE, False, True),
        (Call.PARTITION_INFO_GET_REGS, True, False),
    ):
        assert host.call(Call.FEATURES, fid(call, smc64)).ok is there
    assert host.call(Call.MEM_LEND, 0x70, 0x70, smc64=True).error is Error.NOT_SUPPORTED


def test_ids_are_taken_once_and_are_of_the_right_world() -> None:
    machine = Machine()
    spmc = Spmc(machine)
    with pytest.raises(ValueError, match="bit 15"):
        spmc.add(Endpoint(1, machine))
    with pytest.raises(ValueError, match="bit 15"):
        spmc.add(Endpoint(0x8000, machine))
    spmc.add(Endpoint(0x8001, machine))
    with pytest.raises(ValueError, match="already"):
        spmc.add(Endpoint(0x8001, machine))
    with pytest.raises(ValueError, match="id 0"):
        spmc.attach(Endpoint(1, machine))
    hypervisor = Hypervisor(machine)
    for id in (0, 0x8001):
        with pytest.raises(ValueError, match="0x7fff"):
            hypervisor.add(Endpoint(id, machine))


def test_an_endpoint_without_a_manager_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"manager\.add"):
        Endpoint(1, Machine()).call(Call.ID_GET)
