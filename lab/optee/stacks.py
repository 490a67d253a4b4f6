"""The real TEEs that the lab can boot: a table, `STACKS`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from lab.arch import AARCH64
from lab.qemu.image import KERNEL_SUITE

PLATFORM = "vexpress-qemu_armv8a"
CORE = (
    f"PLATFORM={PLATFORM}",
    "CFG_ARM64_core=y",
    "CFG_USER_TA_TARGETS=ta_arm64",
    "CFG_ARM_GICV3=y",
    "CFG_TEE_CORE_LOG_LEVEL=2",
)
SPMC = "CFG_CORE_SEL1_SPMC=y"
STATS = "CFG_WITH_STATS=y"


@dataclass(frozen=True)
class KernelSource:
    """See :func:`lab.kernel.ensure_kernel`."""

    suite: str
    pattern: str
    more: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()  # beside the TEE's


@dataclass(frozen=True)
class Stack:
    name: str
    does: str
    suite: str  # OP-TEE's: the core, user space, TAs, which must be of one version
    dispatcher: tuple[str, ...]  # TF-A's options
    kernel: KernelSource
    core: tuple[str, ...] | None = None  # options to build OP-TEE with; None: the core that Debian has built

    @property
    def has_stats(self) -> bool:
        """Whether it keeps statistics: Debian's builds do."""
        return self.core is None or STATS in self.core


LINUX_6_12 = KernelSource(KERNEL_SUITE, AARCH64.kernel)
LINUX_SID = KernelSource(  # 6.12 has no FF-A
    "sid",
    r"linux-binary-7\.[0-9.]+\+deb14-cloud-arm64",
    ("linux-modules-{}",),
    ("ffa-core", "ffa-module"),
)
SMC = ("SPD=opteed",)
FFA = (
    "SPD=spmd",
    "SPMD_SPM_AT_SEL2=0",
    "CTX_INCLUDE_EL2_REGS=0",
    "SPMC_OPTEE=1",
    "ENABLE_SME_FOR_NS=0",
    "ENABLE_SVE_FOR_SWD=1",
)
STACKS = {
    stack.name: stack
    for stack in (
        Stack("smc45", "OP-TEE 4.5.0 by SMC, Linux 6.12", "trixie", SMC, LINUX_6_12),
        Stack("smc410", "OP-TEE 4.10.0 by SMC, Linux 6.12", "sid", SMC, LINUX_6_12),
        Stack("ffa410", "OP-TEE 4.10.0 as SPMC by FF-A, Linux 7.2", "sid", FFA, LINUX_SID, (*CORE, SPMC)),
    )
}
DEFAULT = "smc45"


def with_stats(stack: Stack) -> Stack:
    """The same, but built with statistics."""
    return stack if stack.has_stats or stack.core is None else replace(stack, core=(*stack.core, STATS))
