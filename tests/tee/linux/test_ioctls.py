"""Ioctl numbers and layouts against the system's own <linux/tee.h>, as the C compiler sees it."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from construct import Struct

from tee.linux import ioctls

pytestmark = pytest.mark.skipif(
    shutil.which("gcc") is None or not Path("/usr/include/linux/tee.h").exists(),
    reason="no C compiler or no kernel headers: apt-get install gcc libc6-dev",
)

STRUCTS: dict[str, Struct[Any, Any]] = {
    "tee_ioctl_version_data": ioctls.Version,
    "tee_ioctl_shm_alloc_data": ioctls.ShmAlloc,
    "tee_ioctl_shm_register_data": ioctls.ShmRegister,
    "tee_ioctl_buf_data": ioctls.Buffer,
    "tee_ioctl_param": ioctls.Param,
    "tee_ioctl_open_session_arg": ioctls.OpenSession,
    "tee_ioctl_invoke_arg": ioctls.Invoke,
    "tee_ioctl_cancel_arg": ioctls.Cancel,
    "tee_ioctl_close_session_arg": ioctls.CloseSession,
    "tee_iocl_supp_recv_arg": ioctls.SupplRecv,
    "tee_iocl_supp_send_arg": ioctls.SupplSend,
}
NEWER = ("SHM_REGISTER_FD", "OBJECT_INVOKE")
NUMBERS = {
    "TEE_IOC_MAGIC": ioctls.MAGIC,
    "TEE_MAX_ARG_SIZE": ioctls.MAX_ARG_SIZE,
    "TEE_MEMREF_NULL": ioctls.MEMREF_NULL,
    "TEE_IOCTL_PARAM_ATTR_META": ioctls.ATTR_META,
    "TEE_IOCTL_PARAM_ATTR_TYPE_MASK": ioctls.ATTR_TYPE_MASK,
    "TEE_IMPL_ID_OPTEE": ioctls.IMPL_OPTEE,
    "TEE_IOCTL_PARAM_ATTR_TYPE_NONE": ioctls.ParamType.NONE,
    "TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INPUT": ioctls.ParamType.VALUE_IN,
    "TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_OUTPUT": ioctls.ParamType.VALUE_OUT,
    "TEE_IOCTL_PARAM_ATTR_TYPE_VALUE_INOUT": ioctls.ParamType.VALUE_INOUT,
    "TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INPUT": ioctls.ParamType.MEMREF_IN,
    "TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_OUTPUT": ioctls.ParamType.MEMREF_OUT,
    "TEE_IOCTL_PARAM_ATTR_TYPE_MEMREF_INOUT": ioctls.ParamType.MEMREF_INOUT,
    # those that the C library's header does not have in every version
    **{f"TEE_IOC_{ioctl.name}": ioctl.value for ioctl in ioctls.Ioctl if ioctl.name not in NEWER},
}


@cache
def compiled(expressions: tuple[str, ...]) -> list[int]:
    prints = "".join(f'printf("%llu\\n", (unsigned long long)({e}));' for e in expressions)
    program = f"#include <stddef.h>\n#include <stdio.h>\n#include <linux/tee.h>\nint main(void) {{ {prints} }}\n"
    with tempfile.TemporaryDirectory() as folder:
        binary = f"{folder}/tee"
        subprocess.run(["gcc", "-x", "c", "-", "-o", binary], input=program, text=True, check=True, timeout=60)
        return [int(n) for n in subprocess.run([binary], capture_output=True, check=True, timeout=10).stdout.split()]


def test_numbers() -> None:
    assert dict(zip(NUMBERS, compiled(tuple(NUMBERS)), strict=True)) == NUMBERS
    assert [ioctls.Ioctl[name] for name in NEWER] == [0xC018A408, 0x8010A40A]


def test_how_many_parameters_a_call_can_have() -> None:
    """As long as all of an argument fits what the kernel takes."""
    size, param = compiled(("sizeof(struct tee_ioctl_open_session_arg)", "sizeof(struct tee_ioctl_param)"))
    assert size + ioctls.MOST_PARAMS * param <= ioctls.MAX_ARG_SIZE < size + (ioctls.MOST_PARAMS + 1) * param


@pytest.mark.parametrize("name", STRUCTS)
def test_layouts(name: str) -> None:
    fields = [f for f in STRUCTS[name].subcons if f.name != "params"]
    ends, at = [], 0
    for field in fields:
        ends.append((at, field.sizeof()))
        at += field.sizeof()
    asked = [f"sizeof(struct {name})"]
    # the names of a parameter's words have changed between versions of the header
    if name != "tee_ioctl_param":
        for field in fields:
            c_name = field.name
            asked += [f"offsetof(struct {name}, {c_name})", f"sizeof(((struct {name} *)0)->{c_name})"]
    size, *rest = compiled(tuple(asked))
    assert size == at
    if rest:
        assert list(zip(rest[::2], rest[1::2], strict=True)) == ends
