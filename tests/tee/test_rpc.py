"""Numbers of OP-TEE's RPCs, as its own headers have them: unmodified supplicants go by them."""

from __future__ import annotations

from tee.rpc import FsCommand, RpcCommand, ShmType


def test_commands() -> None:
    """optee_client, tee-supplicant/src/optee_msg_supplicant.h: OPTEE_MSG_RPC_CMD_…"""
    served = ("LOAD_TA", "RPMB", "FS", "SHM_ALLOC", "SHM_FREE", "GPROF", "SOCKET", "FTRACE", "PLUGIN")
    assert [RpcCommand[name] for name in served] == [0, 1, 2, 6, 7, 9, 10, 11, 12]
    # optee_os, core/include/optee_rpc_cmd.h: those that the kernel's driver serves, and the types of memory
    kernels = ("GET_TIME", "NOTIFICATION", "SUSPEND", "I2C_TRANSFER")
    assert [RpcCommand[name] for name in kernels] == [3, 4, 5, 21]
    assert [ShmType[name] for name in ("APPLICATION", "KERNEL", "GLOBAL")] == [0, 1, 2]


def test_file_operations() -> None:
    """optee_client, tee-supplicant/src/optee_msg_supplicant.h: OPTEE_MRF_…

    What parameters they have, tests.tee.soft.keeper checks of each that a test's TEE sends; tests/lab lets the real
    tee-supplicant judge.
    """
    names = "OPEN CREATE CLOSE READ WRITE TRUNCATE REMOVE RENAME OPENDIR CLOSEDIR READDIR"
    assert [operation.name for operation in sorted(FsCommand)] == names.split()
    assert [int(operation) for operation in sorted(FsCommand)] == list(range(11))
