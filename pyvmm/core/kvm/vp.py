"""One VP of KVM: its registers and its shared run page. The run loop itself is `pyvmm.core._hot.Vp`."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os

from pyvmm.core.kvm import abi
from pyvmm.core.kvm.errors import KvmError, ioctl

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any


class Vp:
    """A VCPU file descriptor of KVM. Apart from `close`, use it on the VP's own thread or while that one is parked."""

    def __init__(self, fd: int, index: int, run_size: int) -> None:
        self.fd = fd
        self.index = index
        self.run_map = mmap.mmap(fd, run_size, mmap.MAP_SHARED)

    def close(self) -> None:
        """Close the file. The run page stays mapped until its last user lets go."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    @property
    def run(self) -> abi.Run:
        """A copy of the run page's head as it is now."""
        return abi.Run.from_buffer_copy(self.run_map)

    def get_regs(self) -> abi.Regs:
        """General registers."""
        regs = abi.Regs()
        ioctl(self.fd, abi.GET_REGS, regs)
        return regs

    def set_regs(self, regs: abi.Regs) -> None:
        """Set the general registers."""
        ioctl(self.fd, abi.SET_REGS, regs)

    def get_sregs(self) -> abi.Sregs:
        """Segments, control registers and EFER."""
        sregs = abi.Sregs()
        ioctl(self.fd, abi.GET_SREGS, sregs)
        return sregs

    def set_sregs(self, sregs: abi.Sregs) -> None:
        """Set segments, control registers and EFER."""
        ioctl(self.fd, abi.SET_SREGS, sregs)

    def get_msr(self, index: int) -> int:
        """Read one MSR that KVM keeps; raises KvmError if it does not."""
        request = abi.msr_list(1)()
        request.nmsrs = 1
        request.entries[0].index = index
        if ioctl(self.fd, abi.GET_MSRS, request) != 1:
            raise KvmError(f"reading MSR {index:#x}", errno.EINVAL)
        return int(request.entries[0].data)

    def set_msrs(self, values: Iterable[tuple[int, int]]) -> int:
        """Set MSRs in order, passing over those that KVM refuses; return how many were set."""
        pairs = list(values)
        total = 0
        while pairs:
            request = abi.msr_list(len(pairs))()
            request.nmsrs = len(pairs)
            for entry, (index, value) in zip(request.entries, pairs, strict=True):
                entry.index, entry.data = index, value
            done = ioctl(self.fd, abi.SET_MSRS, request)
            total += done
            pairs = pairs[done + 1 :]
        return total

    def enable_capability(self, number: int) -> None:
        """KVM_ENABLE_CAP without arguments."""
        ioctl(self.fd, abi.ENABLE_CAP, abi.EnableCap(cap=number))

    def set_cpuid(self, entries: list[abi.CpuidEntry]) -> None:
        """Give the VP its CPUID leaves."""
        table = abi.cpuid_table(len(entries))()
        table.nent = len(entries)
        for position, entry in enumerate(entries):
            table.entries[position] = entry
        ioctl(self.fd, abi.SET_CPUID2, table)

    def get_mp_state(self) -> int:
        """KVM_MP_STATE_*: 0 runs, 1 waits for INIT, 3 is halted."""
        state = abi.MpState()
        ioctl(self.fd, abi.GET_MP_STATE, state)
        return int(state.mp_state)

    def set_mp_state(self, state: int) -> None:
        """Set KVM_MP_STATE_*."""
        ioctl(self.fd, abi.SET_MP_STATE, abi.MpState(state))

    def get_state(self, msr_indices: list[int]) -> dict[str, Any]:
        """All of the VP that KVM keeps: blobs by the names of `abi.VP_STATE`, and ``msrs`` as {index: value}.

        What this KVM does not have (XSAVE on some) is left out.
        """
        state: dict[str, Any] = {}
        for name, get, _, size in abi.VP_STATE:
            blob = (ctypes.c_uint8 * size)()
            try:
                ioctl(self.fd, get, blob)
            except KvmError as error:
                if error.errno not in (errno.EINVAL, errno.ENXIO, errno.ENOTTY):
                    raise
                continue
            if name == "xcrs" and not any(blob[:4]):  # no XSAVE: KVM gives none, and refuses to set none
                continue
            state[name] = bytes(blob)
        state["msrs"] = self._get_msrs(msr_indices)
        return state

    def set_state(self, state: dict[str, Any]) -> None:
        """Set what `get_state` returned."""
        for name, _, request, size in abi.VP_STATE:
            if name in state:
                ioctl(self.fd, request, (ctypes.c_uint8 * size).from_buffer_copy(state[name]))
            if name == "sregs":  # EFER and the APIC base decide which MSRs may be set
                self.set_msrs(state["msrs"].items())

    def _get_msrs(self, indices: list[int]) -> dict[int, int]:
        values: dict[int, int] = {}
        while indices:
            request = abi.msr_list(len(indices))()
            request.nmsrs = len(indices)
            for entry, index in zip(request.entries, indices, strict=True):
                entry.index = index
            done = ioctl(self.fd, abi.GET_MSRS, request)
            values.update((int(entry.index), int(entry.data)) for entry in request.entries[:done])
            indices = indices[done + 1 :]  # KVM stops at the first that it does not have after all
        return values

    def tsc_khz(self) -> int:
        """The guest's TSC frequency in kHz."""
        return ioctl(self.fd, abi.GET_TSC_KHZ)

    def tsc_offset(self) -> int:
        """Guest TSC minus host TSC modulo 2**64."""
        value = ctypes.c_uint64()
        attribute = abi.DeviceAttr(group=abi.VCPU_TSC_CTRL, attr=abi.VCPU_TSC_OFFSET, addr=ctypes.addressof(value))
        ioctl(self.fd, abi.GET_DEVICE_ATTR, attribute)
        return value.value
