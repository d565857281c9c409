"""What can go wrong in an ioctl, told with its remedy, and the one place that calls it."""

from __future__ import annotations

import ctypes
import errno
import os

from pyvmm.core.kvm import abi

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
_libc.ioctl.argtypes = (ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p)

_REMEDIES = {
    errno.ENOENT: "load the module: modprobe kvm_amd or kvm_intel",
    errno.ENODEV: "enable virtualisation in the firmware setup, then modprobe kvm_amd or kvm_intel",
    errno.EACCES: "add your user to the group kvm, then log in again",
    errno.EPERM: "add your user to the group kvm, then log in again",
    errno.ENOMEM: "free some host memory or give the VM less",
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.EBUSY: "another hypervisor may own the processor: stop it",
    errno.ENOTTY: "use a newer kernel: this one does not know the request",
    errno.EEXIST: "use lower VP numbers only once",
}


class KvmError(Exception):
    """A KVM request that failed: the message names the request, the errno and what to do."""

    def __init__(self, request: str, number: int) -> None:
        remedy = _REMEDIES.get(number, "run 'pyvmm doctor' to see what this host lacks")
        name = errno.errorcode.get(number, str(number))
        super().__init__(f"{request} failed with {name} ({os.strerror(number)}): {remedy}")
        self.request = request
        self.errno = number


class MissingCapability(KvmError):
    """This host's KVM lacks something that pyvmm needs."""

    def __init__(self, name: str, purpose: str) -> None:
        Exception.__init__(
            self,
            f"this host's KVM lacks {name} ({purpose}): use Linux 5.16 or later; 'pyvmm doctor' tells more",
        )
        self.request = name
        self.errno = errno.ENOSYS


def ioctl(fd: int, request: int, argument: Any = None) -> int:
    """Call ioctl(2) with a number, a ctypes object or nothing; raises KvmError."""
    if argument is not None and not isinstance(argument, int):
        argument = ctypes.byref(argument)
    while True:
        result: int = _libc.ioctl(fd, request, argument)
        if result >= 0:
            return result
        number = ctypes.get_errno()
        if number != errno.EINTR:
            raise KvmError(abi.IOCTL_NAMES.get(request, f"ioctl {request:#x}"), number)
