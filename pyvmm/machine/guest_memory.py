"""What lies in guest memory when a VM starts: the program, and the firmware tables that it may look for."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pyvmm.boot.entry import EntryState
    from pyvmm.core.memory import GuestMemory
    from pyvmm.machine.config import VmConfig


def load_guest(memory: GuestMemory, config: VmConfig, vmbus: bool) -> EntryState:
    """Load the firmware or kernel of `config`, with ACPI and SMBIOS tables for a kernel; return where it starts.

    Raises BootError if a file cannot be booted.
    """
    if config.firmware is not None:
        from pyvmm.boot.firmware import load_firmware

        return load_firmware(memory, config.firmware)
    import uuid

    from pyvmm.boot.acpi.tables import build_acpi
    from pyvmm.boot.kernel import load_kernel
    from pyvmm.boot.smbios import build_smbios

    assert config.kernel is not None
    entry = load_kernel(memory, config.kernel, config.initrd, config.cmdline)
    identity = uuid.uuid5(uuid.NAMESPACE_DNS, f"{config.name}.pyvmm").bytes_le
    for gpa, table in (
        *build_acpi(memory.top, config.cpus, vmbus=vmbus),
        *build_smbios(memory.ram_ranges(), config.cpus, identity, config.smbios or ("hyper-v" if vmbus else "pyvmm")),
    ):
        memory.write(gpa, table)
    return entry
