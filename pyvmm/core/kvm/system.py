"""``/dev/kvm`` itself: what this host can do, and the making of VMs."""

from __future__ import annotations

import ctypes
import os

from pyvmm.core.kvm import abi, capabilities
from pyvmm.core.kvm.errors import KvmError, MissingCapability, ioctl
from pyvmm.core.kvm.vm import Vm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType

_CPUID_ENTRIES = 256
_MSR_INDICES = 1024


class System:
    """An open ``/dev/kvm``. Raises KvmError, with the remedy, if it cannot be opened or speaks another version."""

    def __init__(self, path: str = "/dev/kvm") -> None:
        try:
            self.fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise KvmError(f"opening {path}", error.errno or 0) from error
        try:
            version = ioctl(self.fd, abi.GET_API_VERSION)
            if version != abi.API_VERSION:
                raise MissingCapability(f"API version {abi.API_VERSION}", f"it speaks version {version}")
            self.run_size = ioctl(self.fd, abi.GET_VCPU_MMAP_SIZE)
        except KvmError:
            self.close()
            raise

    def __enter__(self) -> System:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; VMs made from it live on."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def check_extension(self, number: int) -> int:
        """What KVM_CHECK_EXTENSION says of a capability: 0 for absent."""
        return ioctl(self.fd, abi.CHECK_EXTENSION, number)

    def require_capabilities(self) -> None:
        """Raise MissingCapability for the first needed capability that is absent."""
        for name, number, needed, purpose in capabilities.CAPABILITIES:
            if needed and not self.check_extension(number):
                raise MissingCapability(name, purpose)

    def supported_cpuid(self) -> list[abi.CpuidEntry]:
        """The CPUID leaves that this host's KVM can give a guest."""
        table = abi.cpuid_table(_CPUID_ENTRIES)()
        table.nent = _CPUID_ENTRIES
        ioctl(self.fd, abi.GET_SUPPORTED_CPUID, table)
        return [abi.CpuidEntry.from_buffer_copy(table.entries[i]) for i in range(table.nent)]

    def msr_indices(self) -> list[int]:
        """The MSRs that make up a VP's state, without the TSC, which runs on."""
        table = (ctypes.c_uint32 * (1 + _MSR_INDICES))(_MSR_INDICES)
        ioctl(self.fd, abi.GET_MSR_INDEX_LIST, table)
        return [index for index in table[1 : 1 + table[0]] if index != abi.MSR_IA32_TSC]

    def create_vm(self) -> Vm:
        """Make an empty VM."""
        return Vm(ioctl(self.fd, abi.CREATE_VM, 0), self.run_size)


def kvm_kind() -> str:
    """The name of the KVM module in use: ``kvm_amd``, ``kvm_intel``, ``kvm_pvm`` or ``unknown``."""
    for kind in ("kvm_pvm", "kvm_amd", "kvm_intel"):
        if os.path.isdir(f"/sys/module/{kind}"):
            return kind
    return "unknown"


assert ctypes.sizeof(ctypes.c_void_p) == 8, "pyvmm runs on 64-bit hosts"
