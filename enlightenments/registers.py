"""Synthetic registers by name, for HvGetVpRegisters and HvSetVpRegisters. TLFS v6.0b, chapters 7.8.2 and 7.10."""

from __future__ import annotations

from enlightenments.tlfs import (
    INVALID_PARAMETER,
    INVALID_VP_STATE,
    MSR_CRASH_CTL,
    MSR_CRASH_P0,
    MSR_GUEST_OS_ID,
    MSR_HYPERCALL,
    MSR_REFERENCE_TSC,
    MSR_SCONTROL,
    MSR_SINT0,
    MSR_STIMER0_CONFIG,
    MSR_TIME_REF_COUNT,
    MSR_VP_ASSIST_PAGE,
    MSR_VP_INDEX,
    MSR_VP_RUNTIME,
    SUCCESS,
)

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection

#: Names of registers that are MSRs too. They exist if the MSR does.
_MSRS = {
    **{0x210 + i: MSR_CRASH_P0 + i for i in range(5)},
    0x215: MSR_CRASH_CTL,
    0x9_0000: MSR_VP_RUNTIME,
    0x9_0001: MSR_HYPERCALL,
    0x9_0002: MSR_GUEST_OS_ID,
    0x9_0003: MSR_VP_INDEX,
    0x9_0004: MSR_TIME_REF_COUNT,
    0x9_0013: MSR_VP_ASSIST_PAGE,
    0x9_0017: MSR_REFERENCE_TSC,
    **{0xA_0000 + i: MSR_SINT0 + i for i in range(16)},
    # SCONTROL, SVERSION, SIFP, SIPP and EOM, in the order of their MSRs.
    **{0xA_0010 + i: MSR_SCONTROL + i for i in range(5)},
    **{0xB_0000 + i: MSR_STIMER0_CONFIG + i for i in range(8)},
}

#: Names of registers that are CPUID leaves too.
_LEAVES = {
    0x100: 0x4000_0002,
    0x200: 0x4000_0003,
    0x201: 0x4000_0004,
    0x202: 0x4000_0005,
    0x203: 0x4000_0006,
}


class Registers:
    """The named registers of a partition's VPs.

    `read` takes (VP, MSR) and returns the value or None, `write` takes (VP, MSR, value) and says whether it was valid;
    both are asked only for MSRs `offered`. `leaves` are the hypervisor's CPUID leaves.
    """

    def __init__(
        self,
        offered: Collection[int],
        leaves: dict[int, tuple[int, int, int, int]],
        read: Callable[[int, int], int | None],
        write: Callable[[int, int, int], bool],
    ) -> None:
        self._msrs = {name: msr for name, msr in _MSRS.items() if msr in offered}
        self._leaves = leaves
        self._read = read
        self._write = write

    def get(self, caller: int, vp: int, name: int) -> tuple[int, int]:
        """(status, value of 128 bits) of a register of `vp`; on the thread of `caller`."""
        leaf = self._leaves.get(_LEAVES.get(name, 0))
        if leaf is not None:
            return SUCCESS, sum(value << 32 * i for i, value in enumerate(leaf))
        msr = self._msrs.get(name)
        if msr is None:
            return INVALID_PARAMETER, 0
        if msr == MSR_VP_RUNTIME and vp != caller:  # counted by the thread
            return INVALID_VP_STATE, 0
        value = self._read(vp, msr)
        return (INVALID_PARAMETER, 0) if value is None else (SUCCESS, value)

    def set(self, caller: int, vp: int, name: int, value: int) -> int:
        """Set a register of `vp`, which must be the caller: the others may be running. Returns a status."""
        msr = self._msrs.get(name)
        if msr is None or value >> 64:
            return INVALID_PARAMETER
        if vp != caller:
            return INVALID_VP_STATE
        return SUCCESS if self._write(vp, msr, value) else INVALID_PARAMETER
